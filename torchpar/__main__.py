# SPDX-License-Identifier: MIT
"""The package's commands, ``python -m torchpar COMMAND``.

Each command is a module with a function ``main(arguments)`` that returns the exit status.
"""

import argparse
import importlib
import signal
import sys

from torchpar.errors import printing

COMMANDS = {
    "verify": (
        "torchpar.exact.verify.verify",
        "train on any mesh of ranks, and compare the weights' hash",
    ),
    "check": (
        "torchpar.testing.operators.command_line",
        "try an operator of yours with every part of PyTorch",
    ),
    "ptx": ("torchpar.ptx.command", "run a script's Triton kernels as compiled for a GPU, here"),
    "doctor": (
        "torchpar.testing.doctor",
        "say what works on this machine, and how to mend what does not",
    ),
    "ladder": (
        "torchpar.baselines.ladder",
        "time an operator from loops to a GPU, and functions of yours beside it",
    ),
    "exercises": (
        "torchpar.baselines.exercises",
        "check the functions of a NumPy network of yours, and train through them",
    ),
    "explain": (
        "torchpar.ptx.explain",
        "say who computes a product on a GPU: which tiles, or the library",
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser("python -m torchpar")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, text) in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    command = parser.parse_args(sys.argv[1:2]).command
    try:
        module = importlib.import_module(COMMANDS[command][0])
    except ModuleNotFoundError as e:
        parser.error(f"{command}: {e}; pip install 'torchpar[examples]'")
    try:
        with printing(f"{parser.prog} {command}"):
            status: int = module.main(sys.argv[2:])
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return status


if __name__ == "__main__":
    sys.exit(main())
