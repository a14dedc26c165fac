# SPDX-License-Identifier: MIT
"""``python -m nogpu SCRIPT``: run a script's Triton kernels without a GPU."""

import sys

from nogpu.console import printing


def main() -> int:
    """Run the command. A package that it lacks ends the process in one line."""
    try:
        from nogpu import command
    except ModuleNotFoundError as e:
        print(f"python -m nogpu: error: {e}; pip install {e.name}", file=sys.stderr)
        return 2
    with printing("python -m nogpu"):
        return command.main(sys.argv[1:])


if __name__ == "__main__":
    try:
        status = main()
    except KeyboardInterrupt:
        print("python -m nogpu: interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)
