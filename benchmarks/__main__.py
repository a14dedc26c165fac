# SPDX-License-Identifier: MIT
"""Command line of the benchmarks: ``python -m benchmarks list | run NAMES | report``."""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence

from . import NAMES, module_of, title

# In these benchmarks libraries with threads of their own take turns, and idle threads of OpenMP and
# OpenBLAS sleep soon. By default they spin for milliseconds on the core that the next call needs;
# after a product in NumPy, PyTorch's took three times as long. Without any spinning a step of
# PyTorch takes four times as long.
MIXED = {"operators", "exact", "train", "ladder", "scaling"}
SHORT_SPINS = {"GOMP_SPINCOUNT": "10000", "OPENBLAS_THREAD_TIMEOUT": "16"}  # 2¹⁶ cycles


def list_benchmarks() -> int:
    import torch

    from torchpar.console import printing

    from .results import machine

    width = max(map(len, NAMES))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with printing("python -m benchmarks list"):
        for name in NAMES:
            print(f"{name:{width}}  {title(name)}")
        print(f"\nThis machine's results go to benchmarks/results/{machine(device)}.")
    return 0


def run(names: Sequence[str], flags: Sequence[str]) -> int:
    """Run the benchmarks, each in a process, with ``flags``."""
    commands = {name: [sys.executable, "-m", module_of(name), *flags] for name in names}
    environments = {
        name: {**(SHORT_SPINS if name in MIXED else {}), **os.environ} for name in names
    }
    if len(names) == 1:
        os.execve(sys.executable, commands[names[0]], environments[names[0]])
    # With PyTorch, which one benchmark alone imports itself:
    from torchpar.console import printing
    from torchpar.parallel.launch.processes import Terminated, terminable

    failed = []
    try:
        with terminable(), printing("python -m benchmarks run"):
            for name, command in commands.items():
                print(f"== {name}", flush=True)
                with subprocess.Popen(command, env=environments[name]) as child:
                    try:
                        if status := child.wait():
                            failed.append(f"{name} (status {status})")
                    except Terminated:
                        child.terminate()
                        raise
    except Terminated as e:  # which the benchmark says
        return e.status
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="name the benchmarks")
    runs = "run them one after the other, with the flags that follow; run NAME --help shows them"
    named = any(name in arguments for name in NAMES)  # then --help is the benchmark's
    runner = commands.add_parser("run", help=runs, description=runs, add_help=not named)
    runner.add_argument("names", nargs="+", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    commands.add_parser("report", help="make an HTML page of all committed results", add_help=False)
    options, flags = parser.parse_known_args(arguments)
    if options.command == "run":
        return run(list(dict.fromkeys(options.names)), flags)
    if options.command == "report":
        from . import report
        from .flags import run as run_command

        run_command(lambda: report.main(flags), "report")
    if flags:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    return list_benchmarks()


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:  # the terminal sends it to the benchmark, too
        sys.exit(130)
