# SPDX-License-Identifier: MIT
"""The package's commands, ``python -m torchpar COMMAND``.

Each command is a module with a function ``main(arguments)`` that returns the exit status.
"""

import argparse
import importlib
import io
import signal
import sys

from torchpar.machine import stop_printing

COMMANDS = {
    "verify": (
        "torchpar.verify.command",
        "train on any mesh of ranks, and compare the weights' hash",
    ),
    "check": ("torchpar.testing.command", "try an operator of yours with every part of PyTorch"),
    "ptx": ("torchpar.ptx.command", "run a script's Triton kernels as compiled for a GPU, here"),
    "doctor": ("torchpar.doctor", "say what works on this machine, and how to mend what does not"),
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
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where there is only ASCII, print ? for others
    try:
        status: int = module.main(sys.argv[2:])
        sys.stdout.flush()
    except BrokenPipeError:  # of a reader such as head, that has read enough
        stop_printing()
        return 128 + signal.SIGPIPE
    except OSError as e:
        if e.filename is not None or _can_print():  # then it is another file's
            raise
        stop_printing()
        parser.exit(1, f"{parser.prog} {command}: error: the output cannot be written: {e}\n")
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return status


def _can_print() -> bool:
    try:
        print(flush=True)  # a flush alone would find an empty buffer
    except OSError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
