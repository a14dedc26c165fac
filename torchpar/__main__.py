# SPDX-License-Identifier: MIT
"""The package's commands, ``python -m torchpar COMMAND``.

Each command is a module with a function ``main(arguments)`` that returns the exit status.
"""

import importlib
import sys

COMMANDS = {
    "tune": ("torchpar.tune.command", "measure the fastest ways to compute the operators on this machine"),
    "verify": (
        "torchpar.exact.verify",
        "train on any mesh of ranks, and compare the weights' hash",
    ),
    "doctor": ("torchpar.doctor", "say what works on this machine, and how to mend what does not"),
}


def main() -> int:
    lines = "".join(f"  {name:8}{text}\n" for name, (_, text) in COMMANDS.items())
    usage = f"usage: python -m torchpar COMMAND [--help]\n\n{lines}"
    command, *arguments = sys.argv[1:] or [""]
    if command in ("-h", "--help"):
        print(usage, end="")
        return 0
    if command not in COMMANDS:
        wrong = f"no command {command!r}" if command else "no command given"
        print(f"{usage}\npython -m torchpar: error: {wrong}, expected {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        module = importlib.import_module(COMMANDS[command][0])
    except ModuleNotFoundError as e:
        print(f"python -m torchpar {command}: error: {e}; pip install 'torchpar[examples]'", file=sys.stderr)
        return 2
    status: int = module.main(arguments)
    return status


if __name__ == "__main__":
    sys.exit(main())
