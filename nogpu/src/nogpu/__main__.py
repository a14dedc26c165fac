# SPDX-License-Identifier: MIT
"""``python -m nogpu SCRIPT``: run a script's kernels, or say how those of CUDA C++ are launched."""

import sys

from nogpu.console import printing


def main() -> int:
    """Run the command. A package that it lacks ends the process in one line."""
    try:
        if sys.argv[1:] and sys.argv[-1].endswith((".cu", ".cuh")) and not _has_script():
            from nogpu.cpp.summary import command_line

            with printing("python -m nogpu"):
                return command_line(sys.argv[1:])
        if sys.argv[1:2] == ["judge"]:
            from nogpu.judge.judging import main as judge

            with printing("python -m nogpu judge"):
                return judge(sys.argv[2:])
        from nogpu import command
    except ModuleNotFoundError as e:
        print(f"python -m nogpu: error: {e}; pip install {e.name}", file=sys.stderr)
        return 2
    with printing("python -m nogpu"):
        return command.main(sys.argv[1:])


def _has_script() -> bool:
    """Whether a file of Python stands before the last argument, which is then the script's own."""
    return any(one.endswith(".py") for one in sys.argv[1:-1])


if __name__ == "__main__":
    try:
        status = main()
    except KeyboardInterrupt:
        print("python -m nogpu: interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)
