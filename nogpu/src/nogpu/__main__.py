# SPDX-License-Identifier: MIT
"""``python -m nogpu SCRIPT``: run a script's Triton kernels without a GPU."""

import sys

from nogpu.command import main
from nogpu.console import printing

if __name__ == "__main__":
    try:
        with printing("python -m nogpu"):
            status = main(sys.argv[1:])
    except KeyboardInterrupt:
        print("python -m nogpu: interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)
