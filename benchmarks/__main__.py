# SPDX-License-Identifier: MIT
"""The one way in to the benchmarks: ``python -m benchmarks list | run NAMES | report``."""

import ast
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
NAMES = (
    *("operators", "matmul_t", "muon", "train", "speedrun", "scaling", "ladder", "host"),
    *("autotune", "ncu", "scale_model"),
)
USAGE = """usage: python -m benchmarks COMMAND

  list                  name the benchmarks
  run NAMES [FLAGS]     run them one after the other; run NAME --help shows its flags
      --quick           small sizes: does it run?
      --output DIR      for the CSV and pictures; without it nothing is written
  report [--help]       make an HTML page of all committed results
"""


def title(name: str) -> str:
    """Return the first line of a benchmark's docstring, without importing the benchmark."""
    path = FOLDER / f"{name}.py"
    if not path.exists():
        path = FOLDER / name / "__main__.py"
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    return docstring.partition("\n")[0].partition(": ``")[0].removesuffix(".")


def show() -> int:
    width = max(map(len, NAMES))
    for name in NAMES:
        print(f"{name:{width}}  {title(name)}")
    return 0


def run(arguments: Sequence[str]) -> int:
    """Run the benchmarks that come first in ``arguments``, each in a process, with the flags that follow."""
    end = next((i for i, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    names, flags = arguments[:end], arguments[end:]
    if unknown := [name for name in names if name not in NAMES]:
        return wrong(f"no benchmark {unknown[0]!r}, expected some of {', '.join(NAMES)}")
    if not names:
        return wrong("no benchmark is named; python -m benchmarks list shows them")
    commands = [(name, [sys.executable, "-m", f"benchmarks.{name}", *flags]) for name in names]
    if len(commands) == 1:
        os.execv(sys.executable, commands[0][1])
    failed = []
    for name, command in commands:
        print(f"== {name}", flush=True)
        child = subprocess.Popen(command)
        # A terminal's Ctrl-C reaches the child, which ends with 130; so that this process waits for it.
        signal.signal(signal.SIGINT, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_, child=child: child.terminate())
        status = child.wait()
        if status:
            failed.append(f"{name} (status {status})")
        if status in (130, -signal.SIGINT, -signal.SIGTERM):
            break
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def wrong(message: str) -> int:
    print(f"{USAGE}\npython -m benchmarks: error: {message}", file=sys.stderr)
    return 2


def main(arguments: Sequence[str]) -> int:
    command, *others = arguments or [""]
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if command == "list" and not others:
        return show()
    if command == "run":
        return run(others)
    if command == "report":
        from benchmarks import command as runner
        from benchmarks import report

        runner.run(lambda: report.main(others), "report")
    return wrong(f"{' '.join(arguments)!r}, expected list, run or report" if command else "no command given")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
