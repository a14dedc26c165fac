# SPDX-License-Identifier: MIT
"""Command line of the benchmarks: ``python -m benchmarks list | run NAMES | report``."""

import ast
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

NAMES = (
    "operators",
    "calls",
    "muon",
    "optimizers",
    "train",
    "speedrun",
    "scaling",
    "ladder",
    "host",
)
# In these benchmarks libraries with threads of their own take turns, and idle threads of OpenMP and OpenBLAS
# sleep soon. By default they spin for milliseconds on the core that the next call needs; after a product in
# NumPy, PyTorch's took three times as long. Without any spinning a step of PyTorch takes four times as long.
MIXED = {"operators", "train", "ladder"}
SHORT_SPINS = {"GOMP_SPINCOUNT": "10000", "OPENBLAS_THREAD_TIMEOUT": "16"}  # 2¹⁶ cycles
USAGE = """usage: python -m benchmarks COMMAND

  list                  name the benchmarks
  run NAMES [FLAGS]     run them one after the other; run NAME --help shows its flags
      --quick           small sizes: does it run?
      --output DIR      for the CSV and other files; without it nothing is written
  report [--help]       make an HTML page of all committed results
"""


def first_line(name: str) -> str:
    """Return the first line of a benchmark's docstring, without importing the benchmark."""
    spec = find_spec(f"benchmarks.{name}")
    assert spec is not None
    docstring = ast.get_docstring(ast.parse(Path(str(spec.origin)).read_text("utf-8"))) or ""
    return docstring.partition("\n")[0].partition(": ``")[0].removesuffix(".")


def list_benchmarks() -> int:
    import torch

    from benchmarks.results import machine

    width = max(map(len, NAMES))
    for name in NAMES:
        print(f"{name:{width}}  {first_line(name)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"\nThis machine's results go to benchmarks/results/{machine(device)}.")
    return 0


def run(arguments: Sequence[str]) -> int:
    """Run the benchmarks that come first in ``arguments``, each in a process, with the flags that follow."""
    end = next((i for i, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    names, flags = list(dict.fromkeys(arguments[:end])), arguments[end:]
    if not names or not set(names) <= set(NAMES):
        return usage_error(f"run {' '.join(arguments)}: expected first some of {', '.join(NAMES)}")
    commands = {name: [sys.executable, "-m", f"benchmarks.{name}", *flags] for name in names}
    environments = {name: {**(SHORT_SPINS if name in MIXED else {}), **os.environ} for name in names}
    if len(names) == 1:
        os.execve(sys.executable, commands[names[0]], environments[names[0]])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    failed = []
    for name, command in commands.items():
        print(f"== {name}", flush=True)
        with subprocess.Popen(command, env=environments[name]) as child:  # whose end is awaited
            try:
                if status := child.wait():
                    failed.append(f"{name} (status {status})")
            except SystemExit:
                child.terminate()
                raise
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def usage_error(message: str) -> int:
    print(f"{USAGE}\npython -m benchmarks: error: {message}", file=sys.stderr)
    return 2


def main(arguments: Sequence[str]) -> int:
    command, *others = arguments or [""]
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if command == "list" and not others:
        return list_benchmarks()
    if command == "run":
        return run(others)
    if command == "report":
        from benchmarks import command as runner
        from benchmarks import report

        runner.run(lambda: report.main(others), "report")
    return usage_error(
        f"{' '.join(arguments)!r}, expected list, run or report" if command else "no command given"
    )


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:  # the terminal sends it to the benchmark, too
        sys.exit(130)
