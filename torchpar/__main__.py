# SPDX-License-Identifier: MIT
"""The package's commands: ``python -m torchpar COMMAND``.

A command is a module of the package with a function ``main()``, which parses ``sys.argv`` itself.
"""

import importlib
import sys

COMMANDS = {
    "tune": "search for the fastest configurations of the kernels on this GPU",
}


def main() -> int:
    commands = "".join(f"  {name:8}{what}\n" for name, what in COMMANDS.items())
    usage = f"usage: python -m torchpar COMMAND [--help]\n\n{commands}"
    command, *arguments = sys.argv[1:] or [""]
    if command in ("-h", "--help"):
        print(usage, end="")
        return 0
    if command not in COMMANDS:
        wrong = f"no command {command!r}" if command else "no command given"
        print(f"{usage}\npython -m torchpar: error: {wrong}, expected {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    sys.argv = [f"python -m torchpar {command}", *arguments]
    try:
        module = importlib.import_module(f"torchpar.{command}")
    except ModuleNotFoundError as e:
        print(f"{sys.argv[0]}: error: {e}; pip install 'torchpar[examples]'", file=sys.stderr)
        return 2
    module.main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
