# SPDX-License-Identifier: MIT
"""The command ``python -m torchpar tune``, which writes the table that the launchers read.

A problem is measured as a whole, and the table is saved after each: the same command continues.
"""

import argparse
import hashlib
import math
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from torchpar.errors import ConfigError, TorchparError
from torchpar.tune import cpu
from torchpar.tune.measure import LIBRARY, Problem, check_gpu, describe, error_line, measure

if TYPE_CHECKING:  # it imports Triton
    from torchpar.kernels.tiles import Device

KERNELS = ("symmetric_product", "linear_sigmoid")
VARIANTS = ("pointers", "split_k", "tma")
DTYPES = ("bfloat16", "float16", "tf32", "float32", "float64")
# The problems of each dtype, the most important first: m, n, k and batch.
PROBLEMS = (
    *(("symmetric_product", n, n, n, 1) for n in (4096, 8192, 2048, 1024)),
    ("linear_sigmoid", 8192, 4096, 4096, 1),
    ("linear_sigmoid", 512, 12288, 3072, 1),
    ("linear_sigmoid", 128, 512, 784, 1),
    ("linear_sigmoid", 64, 1024, 8192, 1),
    ("linear_sigmoid", 8192, 512, 784, 1),
    ("linear_sigmoid", 2048, 2048, 2048, 1),
    ("linear_sigmoid", 8192, 8192, 8192, 1),
    *(("symmetric_product", n, n, n, batch) for n, batch in ((512, 1), (256, 1), (512, 64), (1024, 32))),
)


def list_problems(options: argparse.Namespace) -> list[Problem]:
    problems = [(kernel, n, n, n, 1) for n in options.sizes for kernel in KERNELS] or PROBLEMS
    return [Problem(kernel, kind, *sizes) for kind in options.dtypes for kernel, *sizes in problems]


def tune(options: argparse.Namespace) -> int:
    """Measure the problems that the device's table lacks, and save the table after each.

    Returns the exit status: 1 if a problem could not be measured.

    Raises:
        ConfigError: an option is out of bounds, there is no GPU, or a configuration has broken it.
    """
    if not 0 < options.minutes < math.inf:
        raise ConfigError(f"--minutes is {options.minutes}, expected a finite number above 0")
    if not all(n > 0 and n % 16 == 0 for n in options.sizes):  # tables are for aligned operands
        raise ConfigError(f"--sizes is {options.sizes}, expected positive multiples of 16")
    if not torch.cuda.is_available():
        raise ConfigError("PyTorch finds no GPU, expected one to tune the kernels on")
    from torchpar.kernels import tiles

    end = time.monotonic() + 60 * options.minutes
    present = tiles.device(torch.empty(0, device="meta"))
    header = environment(present)
    table: dict[str, Any] = tiles.load_table(present) or header | {"tiles": {}}
    if table | header != table:
        print("the table is of other versions or kernels; a new one is begun")
        table = header | {"tiles": {}}
    left = [problem for problem in list_problems(options) if not is_measured(problem, table)]
    print(f"{present.name}: {len(left)} problems that are not in the table")
    path: Path | str = "nothing was measured, no table was written"
    left_out = 0
    try:
        while left and time.monotonic() < end:
            problem = left[0]
            if entry := tune_problem(problem, options.variants, present):
                table["tiles"].setdefault(problem.kernel, {}).setdefault(problem.kind, []).append(entry)
                date = datetime.now(UTC).date().isoformat()
                path = tiles.save_table(present, table | {"date": date})
            left_out += entry is None
            del left[0]
    finally:  # after Ctrl-C too
        print(f"left to measure: {len(left)}; the same command continues" if left else "complete")
        if left_out:
            print(f"left out: {left_out}")
        print(path)
    return 1 if left_out else 0


def is_measured(problem: Problem, table: dict[str, Any]) -> bool:
    entries = table["tiles"].get(problem.kernel, {}).get(problem.kind, [])
    return any(tuple(entry[:4]) == problem[2:] for entry in entries)


def environment(present: "Device") -> dict[str, str]:
    """The device, the versions and a hash of the kernels; if one has changed, all is measured again."""
    import triton

    from torchpar import kernels

    sources = sorted(Path(kernels.__path__[0]).glob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    versions = {"triton": triton.__version__, "torch": torch.__version__}
    return {"device": present.name, **versions, "kernels": digest[:16]}


def tune_problem(problem: Problem, variants: Sequence[str], present: "Device") -> list[Any] | None:
    """Measure a problem and print the result; return its entry, or None if it cannot be measured."""
    from torchpar.kernels.tiles import KINDS, configurations, split_k

    possible = [
        tiles
        for tiles in configurations(problem.kernel, *KINDS[problem.kind][:2], present.capability)
        if tiles.variant in variants
        # Where split-K splits nothing, it is the kernel by pointers.
        and (tiles.variant != "split_k" or split_k(tiles, present, *problem[2:5])[0] > 1)
    ]
    try:
        ms = measure(problem, possible, torch.device("cuda"))
    except TorchparError:
        raise
    except Exception as e:  # such as too little memory
        check_gpu(str(problem))
        print(f"{problem}: left out, {error_line(e)}")
        return None
    ranked = sorted(ms, key=ms.__getitem__)
    if ranked == [LIBRARY]:
        print(f"{problem}: left out, no configuration could be used")
        return None
    print(f"{problem}: {', '.join(f'{describe(name)} {ms[name]:.4g} ms' for name in ranked)}")
    return [*problem[2:], None if ranked[0] == LIBRARY else ranked[0]]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m torchpar tune",
        description="Measure the fastest configurations of the kernels on this GPU. The same command "
        "continues a run that was interrupted; without the table, all is measured anew. The dtype tf32 is "
        "float32 with operands rounded for tensor cores. On a CPU measure its products, in about a minute; "
        "the other options are for GPUs.",
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="by default a GPU")
    parser.add_argument("--minutes", type=float, default=10.0, help="begin no problem later than this")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="of the kernels")
    parser.add_argument("--sizes", nargs="+", type=int, default=(), help="square problems alone")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit status."""
    options = parse(arguments)
    try:
        if options.device == "cpu" or (options.device == "auto" and not torch.cuda.is_available()):
            print(cpu.tune())
            return 0
        return tune(options)
    except (TorchparError, OSError) as e:
        print(f"python -m torchpar tune: error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130  # the status a shell reports for SIGINT
