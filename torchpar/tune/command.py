# SPDX-License-Identifier: MIT
"""The command ``python -m torchpar tune``, which writes the tables of this GPU or of this processor."""

import argparse
import sys
from collections.abc import Sequence

import torch

from torchpar.errors import ConfigError, TorchparError
from torchpar.tune import cpu, gpu


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        "python -m torchpar tune",
        description="Measure the fastest configurations of the kernels on this GPU. The same command "
        "continues a run that was interrupted; without the table, all is measured anew. On a CPU measure its "
        "products, in about a minute; the other options are for GPUs.",
    )
    device = "by default a GPU if there is one"
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help=device)
    parser.add_argument("--minutes", type=float, default=10.0, help="begin no problem later than this")
    parser.add_argument("--sizes", nargs="+", type=int, default=(), help="square problems alone")
    options = parser.parse_args(arguments)
    try:
        if options.device == "cpu" or (options.device == "auto" and not torch.cuda.is_available()):
            given = [n for n in ("minutes", "sizes") if vars(options)[n] != parser.get_default(n)]
            if given:
                raise ConfigError(f"--{given[0]} is for GPUs; leave it out on a CPU")
            print(cpu.tune())
            return 0
        return gpu.tune(options.sizes, options.minutes)
    except (TorchparError, OSError) as e:
        print(f"python -m torchpar tune: error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130  # the status a shell reports for SIGINT
