# SPDX-License-Identifier: MIT
"""The command ``python -m torchpar tune``, which writes the table of this GPU."""

import argparse
import sys
from collections.abc import Sequence

from torchpar.errors import TorchparError
from torchpar.tune import gpu


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        "python -m torchpar tune",
        description="Measure the fastest configurations of the kernels on this GPU. The same command "
        "continues a run that was interrupted; without the table, all is measured anew.",
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="begin no problem later than this")
    parser.add_argument("--sizes", nargs="+", type=int, default=(), help="square problems alone")
    options = parser.parse_args(arguments)
    try:
        return gpu.tune(options.sizes, options.minutes)
    except (TorchparError, OSError) as e:
        print(f"python -m torchpar tune: error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130  # the status a shell reports for SIGINT
