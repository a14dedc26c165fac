# SPDX-License-Identifier: MIT
"""The choice for a product on a GPU: ``python -m torchpar explain matmul_t 4096x4096``.

It names the tiles, or PyTorch's library, and the times by which they were chosen. No GPU is needed.
"""

import argparse
import csv
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from torchpar.errors import ConfigError
from torchpar.kernels import rule
from torchpar.kernels.device import GPUS
from torchpar.kernels.linear_sigmoid import LINEAR_SIGMOID
from torchpar.kernels.matmul_t import SYMMETRIC_MATMUL
from torchpar.kernels.rule import KINDS, Device, Product, Tiles
from torchpar.kernels.tiles import Choice, library_is_faster
from torchpar.optional import has_nogpu, import_nogpu


class Operator(NamedTuple):
    """``library``: PyTorch's product, and the product with what follows.

    ``with_c``: whether a matrix C is added.
    """

    product: Product
    shape: str
    library: tuple[str, str]
    with_c: bool = False


OPERATORS = {
    "matmul_t": Operator(
        SYMMETRIC_MATMUL, "NxK, or BATCHxNxK", ("torch.mm", "torch.mm and mirror")
    ),
    "symmetric_matmul": Operator(
        SYMMETRIC_MATMUL,
        "NxK, or BATCHxNxK; with a matrix C",
        ("torch.addmm", "addmm and mirror"),
        with_c=True,
    ),
    "linear_sigmoid": Operator(LINEAR_SIGMOID, "MxK->N", ("addmm", "addmm and sigmoid_")),
}
# The configurations in benchmarks/results/nvidia-h200, which is not installed: operators.csv and
# operators-queued.csv. For a shape in both files, the second file counts.
MEASURED, MEASURED_ON = Path(__file__).with_name("measured.csv"), "H200"
RUNNERS_UP = 4


class Contestant(NamedTuple):
    """``is_measured``: whether this shape was timed; otherwise the time is predicted."""

    name: str
    microseconds: float
    is_measured: bool


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "python -m torchpar explain",
        description="Say who computes a product on a GPU, and the times by which it was chosen.",
    )
    parser.add_argument("operator", choices=OPERATORS)
    shapes = "; ".join(f"{name}: {one.shape}" for name, one in OPERATORS.items())
    parser.add_argument("shape", help=f"of the operands, such as 4096x4096. {shapes}")
    parser.add_argument("--dtype", choices=KINDS, default="bfloat16", help="by default bfloat16")
    parser.add_argument("--gpu", choices=GPUS, default="H200", help="by default H200")
    parser.add_argument(
        "--all", action="store_true", help="estimate each configuration, also those not chosen from"
    )
    options = parser.parse_args(arguments)
    try:
        sizes = sizes_of(options.operator, options.shape)
    except ValueError as e:
        parser.error(str(e))
    say = estimates if options.all else explain
    try:
        print(say(options.operator, sizes, options.dtype, options.gpu))
    except ConfigError as e:
        print(f"{parser.prog}: error: {e}", file=sys.stderr)
        return 2
    return 0


def sizes_of(operator: str, shape: str) -> tuple[int, int, int, int]:
    """m, n, k and batch, of a shape such as "12x768x768" or "4096x1024->4096"."""
    is_layer = not OPERATORS[operator].product.is_symmetric
    pattern = r"(\d+)x(\d+)->(\d+)" if is_layer else r"((?:\d+x)*)(\d+)x(\d+)"
    match = re.fullmatch(pattern, shape, re.ASCII)
    example = "4096x1024->4096" if is_layer else "4096x4096 or 12x768x768"
    if match is None:
        raise ValueError(
            f"shape is {shape!r}, expected {OPERATORS[operator].shape}, such as {example}"
        )
    if is_layer:
        m, k, n = map(int, match.groups())
        batch = 1
    else:
        batch = 1
        for size in match[1].split("x")[:-1]:
            batch *= int(size)
        m, k = int(match[2]), int(match[3])
        n = m
    if not all(0 < size < 2**31 for size in (m, n, k, batch)):
        raise ValueError(f"shape is {shape!r}, expected sizes from 1 to 2147483647")
    return m, n, k, batch


def explain(operator: str, sizes: tuple[int, int, int, int], kind: str, gpu: str) -> str:
    """The line that names who computes, and the runners-up below it."""
    choice = _choice(operator, sizes, kind, gpu)
    product, _, library, with_c = OPERATORS[operator]
    device = choice.device
    timed = measured(operator, sizes, kind) if gpu == MEASURED_ON else {}
    by_library = library_is_faster(choice)
    alone, whole = (
        _contestant(name, time, timed)
        for name, time in zip(library, choice.library_times, strict=True)
    )
    predicted = choice.times
    if not rule.is_measured(product, kind, device) and has_nogpu():
        from torchpar.testing.estimate import estimate_tiles

        predicted = {
            one: estimate_tiles(product, kind, one, sizes, gpu, with_c=with_c).microseconds
            for one in predicted
        }
    of_tiles = {
        one: _contestant(str(one), time, timed)
        for one, time in predicted.items()
        if _splits(one, device, sizes)
    }
    chosen = whole if by_library else of_tiles[min(of_tiles, key=choice.times.__getitem__)]
    if chosen.is_measured:
        basis = "measured"
    elif rule.is_measured(product, kind, device):
        basis = "predicted from measurements"
    else:
        basis = "estimated" if has_nogpu() else "as an sm_90; nogpu estimates it"
    beside = "" if by_library else f"; {alone.name} {shown(alone.microseconds)}"
    lines = [f"computed by: {chosen.name} ({basis}, {shown(chosen.microseconds)}{beside})"]
    others = [one for one in (*of_tiles.values(), whole) if one is not chosen]
    others.sort(key=lambda one: one.microseconds)
    kept = others[:RUNNERS_UP]
    if whole in others and whole not in kept:
        kept.append(whole)
    for one in kept:
        mark = "" if one.is_measured or not chosen.is_measured else ", predicted"
        lines.append(f"  {one.name:26} {shown(one.microseconds)}{mark}")
    return "\n".join(lines)


def estimates(operator: str, sizes: tuple[int, int, int, int], kind: str, gpu: str) -> str:
    """A line for each configuration: the estimate, and the measured time where there is one."""
    import_nogpu("--all")
    from nogpu import ESTIMATE_ACCURACY
    from torchpar.testing.estimate import candidates, estimate_tiles

    choice, with_c = _choice(operator, sizes, kind, gpu), OPERATORS[operator].with_c
    timed = measured(operator, sizes, kind) if gpu == MEASURED_ON else {}
    with MEASURED.open(newline="", encoding="utf-8") as file:
        tried = [
            row["contestant"]
            for row in csv.DictReader(file)
            if OPERATORS[row["operator"]].product is choice.product
            and KINDS[row["dtype"]].dtype.itemsize == KINDS[kind].dtype.itemsize
            and KINDS[row["dtype"]].precision == KINDS[kind].precision
        ]
    found = [
        (one, estimate_tiles(choice.product, kind, one, sizes, gpu, with_c=with_c).microseconds)
        for one in candidates(choice, tried)
        if _splits(one, choice.device, sizes)
    ]
    lines = []
    for tiles, time in sorted(found, key=lambda one: one[1]):
        line = f"{tiles!s:26} {shown(time):>10}"
        if str(tiles) in timed:
            line += f"  measured {shown(timed[str(tiles)])}"
        lines.append(line)
    return "\n".join([*lines, ESTIMATE_ACCURACY])


def _choice(operator: str, sizes: tuple[int, int, int, int], kind: str, gpu: str) -> Choice:
    product, _, _, with_c = OPERATORS[operator]
    return Choice(
        product,
        KINDS[kind].precision,
        sizes,
        _meta_operands(product, sizes, kind),
        with_c=with_c,
        present=GPUS[gpu],
    )


def measured(operator: str, sizes: tuple[int, int, int, int], kind: str) -> dict[str, float]:
    """µs of an H200 by contestant, for a shape that was timed; else nothing."""
    m, n, k, batch = sizes
    shape = f"{m}x{k}" if OPERATORS[operator].product.is_symmetric else f"{m}x{k}->{n}"
    shape = f"{batch}x{shape}" if batch > 1 else shape
    with MEASURED.open(newline="", encoding="utf-8") as file:
        return {
            row["contestant"]: float(row["us"])
            for row in csv.DictReader(file)
            if (row["operator"], row["dtype"], row["shape"]) == (operator, kind, shape)
        }


def shown(microseconds: float) -> str:
    """A time as text: "101.3 µs"."""
    return f"{microseconds:.1f} µs" if microseconds < 1000 else f"{microseconds:,.0f} µs"


def _contestant(name: str, predicted: float, timed: dict[str, float]) -> Contestant:
    return Contestant(name, timed.get(name, predicted), name in timed)


def _meta_operands(product: Product, sizes: tuple[int, int, int, int], kind: str) -> list[Tensor]:
    m, n, k, batch = sizes
    rows = [m] if product.is_symmetric else [m, n]
    dtype = KINDS[kind].dtype
    if kind == "float32":  # the launchers copy operands by columns, which begin at 16 elements
        return [
            torch.empty(batch, k, -(-size // 16) * 16, device="meta", dtype=dtype).mT[:, :size]
            if batch > 1
            else torch.empty(k, -(-size // 16) * 16, device="meta", dtype=dtype).mT[:size]
            for size in rows
        ]
    leading = [batch] if batch > 1 else []
    return [torch.empty(*leading, size, k, device="meta", dtype=dtype) for size in rows]


def _splits(tiles: Tiles, device: Device, sizes: tuple[int, int, int, int]) -> bool:
    """Whether a configuration that may split k splits it; otherwise it is one of pointers."""
    return tiles.variant != "split_k" or rule.split_k(tiles, device, *sizes[:3])[0] > 1
