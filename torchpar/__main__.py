# SPDX-License-Identifier: MIT
"""The package's commands, ``python -m torchpar COMMAND``.

Each command is a module with a function ``main(arguments)`` that returns the exit status.
"""

import argparse
import importlib
import signal
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torchpar
from torchpar.console import printing
from torchpar.errors import TorchparError

COMMANDS = {
    "verify": (
        "torchpar.exact.verify.verify",
        "train on any mesh of ranks, and compare the weights' hash",
    ),
    "compare": (
        "torchpar.exact.divergence.compare_runs",
        "name the first tensor in which two recorded trainings differ",
    ),
    "replay": (
        "torchpar.training.profile.replay_command",
        "write a page that plays a recorded step, or two of them side by side",
    ),
    "check": (
        "torchpar.testing.operators.command_line",
        "try an operator of yours with every part of PyTorch",
    ),
    "build": (
        "torchpar.library.build",
        "compile the C++ by which a call on a GPU costs what PyTorch's own calls cost",
    ),
    "doctor": (
        "torchpar.testing.doctor",
        "say what works on this machine, and how to mend what does not",
    ),
    "ladder": (
        "torchpar.benchmarks.ladder.command",
        "time an operator from loops to a GPU, and functions of yours beside it",
    ),
    "exercises": (
        "torchpar.baselines.exercises",
        "check the functions of a NumPy network of yours and train through them, or run an mpi4py "
        "program of yours",
    ),
    "explain": (
        "torchpar.testing.explain",
        "say who computes a product on a GPU: which tiles, or the library",
    ),
}
# The commands that run a reader's code, as `torchpar.parallel.launch.guard.guarded` takes them.
# Another one, exercises, has a process for that code alone.
GUARDED = {
    "check": ("python -m torchpar check", "take smaller samples, or a longer --limit"),
}

PTX = (
    "ptx is now nogpu, a package of its own; in a checkout, pip install ./nogpu; then run "
    "python -m nogpu SCRIPT"
)


def main() -> int:
    parser = argparse.ArgumentParser("python -m torchpar")
    parser.add_argument("--version", action="version", version=f"torchpar {torchpar.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, text) in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    if sys.argv[1:2] == ["ptx"]:
        print(f"{parser.prog}: error: {PTX}", file=sys.stderr)
        return 2
    command = parser.parse_args(sys.argv[1:2]).command
    try:
        module = import_command(command, parser)
        with printing(f"{parser.prog} {command}"):
            return run(command, partial(module.main, sys.argv[2:]))
    except TorchparError as e:
        print(f"{parser.prog} {command}: error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog} {command}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def import_command(command: str, parser: argparse.ArgumentParser) -> Any:
    """The module of a command. A package that it lacks ends the process in one line."""
    try:
        return importlib.import_module(COMMANDS[command][0])
    except ModuleNotFoundError as e:
        parser.error(f"{command}: {e}; pip install 'torchpar[examples]'")


def run(command: str, main: Callable[[], int]) -> int:
    """Run a command, in a child process if it runs a reader's code."""
    if command not in GUARDED:
        return main()
    from torchpar.parallel.launch.guard import guarded

    return guarded(main, *GUARDED[command])


if __name__ == "__main__":
    sys.exit(main())
