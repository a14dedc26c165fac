# SPDX-License-Identifier: MIT
"""Predict the time of each configuration and of PyTorch's library. The one with the least time
computes the product.

The times are in µs, of one H200 (sm_90, 132 multiprocessors), with operands that are not in its L2
cache. For a kernel,

    busy = launch + result·waves + steps·(latency⁴ + (step·waves)⁴)^¼
    time = busy·(1 + CLOCK·ln(1 + busy/100))

A multiprocessor computes ``waves`` tiles, each of which sums ``steps`` times BLOCK_K columns. A
step takes ``step`` for each tile, and at least ``latency`` and the time of its loads. The second
line holds the clock, which the GPU lowers in long launches of its tensor cores.

Persistent programs of 4 warps share a multiprocessor in pairs. Of an odd number of tiles, the last
one is computed by one program alone. A step then takes the time of ``waves`` - 1 tiles, and that of
one more tile, whose ``latency`` no other tile hides.

The numbers were fitted to all shapes and configurations of operators.csv and operators-queued.csv
in benchmarks/results/nvidia-h200, in relative errors; those near the fastest of a shape weigh most.
One fit takes 16 bits and TF32, with operators-graphs.csv, whose operands are in the L2 cache, and
another fit takes the other kinds. With each shape left out of the fit in turn, the choice took at
most 1.06 times the best of that shape, 1.005 times in the geometric mean, and never more than the
library. Then the step of one configuration of `linear_sigmoid` was raised by 1%: this configuration
is up to 3% faster than the next one on the H200, and up to 11% slower on an H100, which lowers its
clock there. At last the term of a lone tile was added, which takes no number of its own, and the
two numbers of flat tiles of 64 × 128 were fitted anew. The choice for these shapes stayed the same,
also with each shape left out of this fit.

On an H100 the choice took at most 1.10 times the fastest configuration, and 1.005 times in the
geometric mean. Other architectures were not measured. On them the rule compares the times that the
configurations, and the library, would take on an sm_90 with as many multiprocessors.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import ceil, gcd, log1p
from typing import NamedTuple

import torch

WITH_TMA = (90, 100, 103)  # sm_120 has too little shared memory for tiles that gain by it
PRECISIONS = ("ieee", "tf32", "tf32x3")  # of float32


class Tiles(NamedTuple):
    """Tile sizes and launch options of a matrix kernel.

    The variants:

    - "pointers": an address for each element, or for each 16 bytes. Any GPU.
    - "tma": persistent programs that load by TMA, for `WITH_TMA`. If block_n is 2·block_m,
      `symmetric_matmul` has such tiles below the diagonal and square ones on it.
    - "flat": as "tma", with wide tiles on the diagonal, too, and the loops over tiles and over k
      merged: the next tile is loaded while the last one is stored. `symmetric_matmul`.
    - "split_k": as "pointers", with several programs for a tile (`split_k`). `linear_sigmoid`.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    variant: str = "pointers"

    @property
    def by_tma(self) -> bool:
        return self.variant in ("tma", "flat")

    @property
    def blocks(self) -> dict[str, int]:
        """The constants of a kernel that takes all three sizes."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}

    @property
    def options(self) -> dict[str, int]:
        """The options of a launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    def __str__(self) -> str:
        sizes = f"{self.block_m}x{self.block_n}x{self.block_k}"
        return f"{sizes} w{self.num_warps} s{self.num_stages} {self.variant}"


class Device(NamedTuple):
    """The properties of a device on which tiles depend.

    The capability 90 is sm_90; 0 is a device that is no NVIDIA GPU.
    """

    name: str
    capability: int
    multiprocessors: int


class Speed(NamedTuple):
    """The µs that BLOCK_K columns take: at least, and for each tile of a multiprocessor."""

    latency: float
    step: float


class Library(NamedTuple):
    """The speed of PyTorch's library, as if it had `_LIBRARY_TILES`.

    ``area`` and ``edge``: µs for 128 bytes of k, of a tile of 128 × 256, and what its loads add to
    that. ``part``: the least steps of 128 bytes in a part of a tile that is cut along k.
    ``streams``: whether it cuts any tiles, and not only very few.
    """

    area: float
    edge: float
    latency: float
    part: int
    streams: bool


class Kind(NamedTuple):
    """A kind of operands."""

    dtype: torch.dtype
    precision: str
    library: Library


_TENSOR_CORES = Library(0.457, 0.313, 0.213, 2, True)
_FMA = Library(5.58, 0.0, 0.563, 11, False)
KINDS = {
    "bfloat16": Kind(torch.bfloat16, "ieee", _TENSOR_CORES),
    "float16": Kind(torch.float16, "ieee", _TENSOR_CORES),
    "tf32": Kind(torch.float32, "tf32", _TENSOR_CORES),
    "tf32x3": Kind(torch.float32, "tf32x3", _FMA),  # the library computes in float32
    "float32": Kind(torch.float32, "ieee", _FMA),
    "float64": Kind(torch.float64, "ieee", Library(2.20, 0.03, 0.132, 11, False)),
}


class Variant(NamedTuple):
    """A variant of a product's kernels.

    ``launch`` and ``result``: µs of a launch, and of the result of 128 × 256 elements. ``widths``:
    what block_n may be, in multiples of block_m; by default anything.
    """

    launch: float
    result: float
    widths: tuple[int, ...] = ()


class Product(NamedTuple):
    """The kernels of an operator's product: their configurations, and what they cost.

    Attributes:
        name: of the launch function, for messages.
        variants: by the ``variant`` of tiles.
        tiles: the configurations by kind of operands. The first wins a tie.
        unaligned: by kind, for operands that no configuration loads. An address for each element
            takes registers: larger tiles would spill. Outside sm_90 all tiles but the first spill.
        library_passes: what PyTorch's library moves after its product, in bytes of the result.
        estimated: kinds whose configurations were not timed.
        is_symmetric: whether only tiles on and below the diagonal are computed.
        single_stores: the most elements of a tile that stores them one by one. If it is 0, kernels
            that load by TMA store by TMA alone.
    """

    name: str
    variants: Mapping[str, Variant]
    tiles: Mapping[str, Mapping[Tiles, Speed]]
    unaligned: Mapping[str, Sequence[Tiles]]
    library_passes: int
    estimated: Sequence[str] = ()
    is_symmetric: bool = False
    single_stores: int = 0


def halved(tiles: Mapping[Tiles, Speed]) -> dict[Tiles, Speed]:
    """The configurations of TF32, from those of 16 bits: half the columns fill as many bytes.

    Twice the result's bytes do not fit beside a fourth stage of 128 × 256, nor beside three of
    "flat" tiles. By 4 warps, tiles of 128 × 128 took 1.4 times as long as those of 128 × 256.
    """
    return {
        one._replace(
            block_k=one.block_k // 2, num_stages=3 if one.block_n == 256 else one.num_stages
        ): speed
        for one, speed in tiles.items()
        if one.variant != "flat" and one[:5] != (128, 128, 64, 4, 3)
    }


_LIBRARY_LAUNCH, _LIBRARY_RESULT = 5.30, 2.10
_LIBRARY_TILES = ((64, 64), (64, 128), (128, 64), (128, 128), (128, 192), (128, 256))
_CUT = 1.60  # µs to sum the parts of tiles that are cut along k
# The µs of a second launch (the mirror, the sigmoid in place, the sum of a split product's parts, a
# copy by columns), and the bytes that it reads or writes in a µs.
SECOND, BYTES = 2.63, 4.09e6
_WIDE = 1.72  # times a result, if its numbers have 4 or 8 bytes
_WITH_C = 1.52  # times a result, to read C
_WAITS_FOR_C = 0.81
_ADDS_C = 3.92  # the library's passes over C
# Elements of 16 bits are loaded one by one if rows do not begin at multiples of 16 bytes. The
# factors were measured at k = 121.
_UNALIGNED, _LIBRARY_UNALIGNED = 5.5, 9.0
_CLOCK = 0.057
# Where programs share a multiprocessor, a program of the last wave that is alone is faster. An
# empty place shortens the wave by so much.
_ALONE = {"pointers": 0.26, "split_k": 0.26, "tma": 0.44, "flat": 0.44}
_LIBRARY_ALONE = 0.23  # the library's, in float32 and float64
_LINE = 128 / 64 / 1980  # µs to load 128 bytes from the L2 cache: 64 bytes a clock, at 1980 MHz


def kind_of(dtype: torch.dtype, precision: str) -> str:
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}, expected one of {PRECISIONS}")
    if dtype == torch.float32 and precision != "ieee":
        return precision
    return str(dtype).removeprefix("torch.")


def configurations(product: Product, kind: str, capability: int) -> list[Tiles]:
    """The configurations that a device of ``capability`` can run."""

    def exists(tiles: Tiles) -> bool:
        if tiles.variant == "flat":
            return capability == 90
        # Outside sm_90 tiles of other widths spill.
        return (
            not tiles.by_tma
            or capability == 90
            or (capability in WITH_TMA and tiles.block_n == 128)
        )

    def fit(tiles: Tiles) -> Tiles:
        """With a fourth stage, transposed operands and a matrix C would not fit into sm_100's
        shared memory."""
        fits = capability == 90 or kind != "tf32" or not tiles.by_tma
        return tiles if fits else tiles._replace(num_stages=3)

    return [fit(one) for one in product.tiles[kind] if exists(one)]


def unaligned_tiles(product: Product, kind: str, capability: int) -> Sequence[Tiles]:
    """The tiles for operands that no configuration loads."""
    return product.unaligned[kind][: None if capability == 90 else 1]


def count_tiles(tiles: Tiles, m: int, n: int, symmetric: bool) -> int:
    """The number of tiles of a result; if it is symmetric, only on and below the diagonal."""
    rows = (m + tiles.block_m - 1) // tiles.block_m
    columns = (n + tiles.block_n - 1) // tiles.block_n
    if not symmetric:
        return rows * columns
    if tiles.block_m == tiles.block_n:
        return rows * (rows + 1) // 2
    if tiles.variant == "flat":
        return columns * (columns + 1)
    # Wide tiles, and pairs of square ones on the diagonal.
    return columns * columns + (columns + 1) // 2


def resident_programs(tiles: Tiles, present: Device) -> int:
    """The number of persistent programs that run at a time, two of 4 warps on a multiprocessor."""
    return present.multiprocessors * (2 if tiles.num_warps == 4 else 1)


def _is_last_alone(tiles: Tiles, count: int) -> bool:
    """Whether two persistent programs share a multiprocessor that computes ``count`` tiles, and one
    of them computes the last tile after the other one has ended."""
    return tiles.by_tma and tiles.num_warps == 4 and count > 1 and count % 2 == 1


def split_k(tiles: Tiles, present: Device, m: int, n: int, k: int) -> tuple[int, int]:
    """The number of programs that sum a tile, and the columns of x that each program takes.

    The number is 1 for other variants than "split_k", and for symbolic sizes: another number would
    make a guard.
    """
    if tiles.variant != "split_k" or any(isinstance(size, torch.SymInt) for size in (m, n, k)):
        return 1, k
    units = max(1, count_tiles(tiles, m, n, symmetric=False))
    steps = ceil(k / tiles.block_k)
    count = max(1, min(present.multiprocessors // units, steps // 4, 16))
    steps_each = ceil(steps / count)
    return ceil(steps / steps_each), steps_each * tiles.block_k


def kernel_time(
    product: Product,
    kind: str,
    tiles: Tiles,
    sizes: Sequence[int],
    present: Device,
    *,
    with_c: bool = False,
) -> float:
    """The predicted time of a kernel in µs, for products of ``sizes`` (m, n, k and batch)."""
    m, n, k, batch = map(hint, sizes)
    of_kind, symmetric = KINDS[kind], product.is_symmetric
    count, columns = split_k(tiles, present, m, n, k)
    filled = count_tiles(tiles, m, n, symmetric) * batch * count / present.multiprocessors
    waves = float(ceil(filled))
    streams = of_kind.library.streams
    if streams and waves > 1 and (tiles.num_warps == 4 or not tiles.by_tma):
        waves -= _ALONE[tiles.variant] * (waves - filled)
    launch, result, _ = product.variants[tiles.variant]
    result *= tiles.block_m * tiles.block_n / (128 * 256) * _width(of_kind)
    if with_c:
        launch, result = launch + _WAITS_FOR_C, result * _WITH_C
    if _has_single_loads(of_kind, n):
        result *= _UNALIGNED
    latency, step = _speed(product.tiles[kind], tiles)
    if _has_single_loads(of_kind, k):
        latency *= _UNALIGNED
    else:
        pieces = tiles.block_k * of_kind.dtype.itemsize / 128
        step = max(step, pieces * _loads(of_kind, k, tiles.block_m + tiles.block_n))
    steps = ceil(columns / tiles.block_k)
    if _is_last_alone(tiles, ceil(filled)):
        each = _of_step(latency, step, waves - 1) + _of_step(latency, step, 1)
    else:
        each = _of_step(latency, step, waves)
    time = launch + result * waves + steps * each
    if streams:
        time *= 1 + _CLOCK * log1p(time / 100)
    if count > 1:  # the parts are written and read
        time += _second(2 * count * m * n * max(4, of_kind.dtype.itemsize))
    if kind == "float32":  # copies by columns
        copied = [m * k * batch] if symmetric else [m * k, n * k]
        time += sum(_second(2 * numbers * of_kind.dtype.itemsize) for numbers in copied)
    return float(time)


def library_time(
    product: Product, kind: str, sizes: Sequence[int], present: Device, *, with_c: bool = False
) -> tuple[float, float]:
    """The predicted times of PyTorch's library in µs: of ``mm`` or ``addmm``, and with the pass
    that follows, a mirror or a sigmoid in place."""
    m, n, _, batch = map(hint, sizes)
    of_kind = KINDS[kind]
    result = m * n * batch * of_kind.dtype.itemsize
    products = min(_library_products(of_kind, sizes, present))
    time = _LIBRARY_LAUNCH + products + (_ADDS_C * result / BYTES if with_c else 0)
    if of_kind.library.streams:
        time *= 1 + _CLOCK * log1p(time / 100)
    return time, time + _second(product.library_passes * result)


def _library_products(kind: Kind, sizes: Sequence[int], present: Device) -> Iterator[float]:
    """The times of the library's product, by tiles: in whole waves, or cut along k."""
    m, n, k, batch = map(hint, sizes)
    area, edge, latency, least, streams = kind.library
    steps, result = k * kind.dtype.itemsize / 128, _LIBRARY_RESULT * _width(kind)
    single = _has_single_loads(kind, k)
    slower = _LIBRARY_UNALIGNED if single else 1.0
    for block_m, block_n in _LIBRARY_TILES:
        if not streams and block_n > 128:
            continue
        filled = ceil(m / block_m) * ceil(n / block_n) * batch / present.multiprocessors
        waves, part = float(ceil(filled)), block_m * block_n / (128 * 256)
        if not streams and waves > 1:
            waves -= _LIBRARY_ALONE * (waves - filled)
        step = area * (part + edge * (block_m + block_n) / (128 + 256))
        if not single:
            step = max(step, _loads(kind, k, block_m + block_n))
        whole = ceil(steps) * _of_step(latency, step, waves)
        yield result * part * waves + slower * whole
        each = max(filled * steps, steps / 32, least)  # steps of a multiprocessor
        if (streams or filled < 0.25) and each < ceil(steps) * waves:
            cut = each * (step if filled > 1 else _of_step(latency, step, 1))
            yield result * part * max(1, filled) + slower * cut + _CUT


def is_measured(product: Product, kind: str, present: Device) -> bool:
    """Whether the times were fitted to measurements of this architecture and kind of operands."""
    return present.capability == 90 and kind not in product.estimated


def _speed(known: Mapping[Tiles, Speed], tiles: Tiles) -> Speed:
    for one in (tiles, tiles._replace(num_stages=4)):
        if one in known:
            return known[one]
    # As much for each product as in the smallest tiles that were timed.
    like, speed = min(known.items(), key=lambda item: item[0].block_m * item[0].block_n)
    columns = tiles.block_k / like.block_k
    area = tiles.block_m * tiles.block_n / (like.block_m * like.block_n)
    return Speed(speed.latency * columns, speed.step * columns * area)


def _of_step(latency: float, step: float, waves: float) -> float:
    """µs of a step of ``waves`` tiles that a multiprocessor computes."""
    return float((latency**4 + (step * waves) ** 4) ** 0.25)


def _has_single_loads(kind: Kind, columns: int) -> bool:
    return kind.dtype.itemsize == 2 and columns % 8 != 0


def _width(kind: Kind) -> float:
    return 1.0 if kind.dtype.itemsize == 2 else _WIDE


def _loads(kind: Kind, k: int, rows: int) -> float:
    """µs to load 128 bytes of each of ``rows`` rows of k numbers, most of which lie in two lines of
    the cache where rows do not begin at multiples of 128 bytes."""
    return _LINE * rows * (2 - gcd(k * kind.dtype.itemsize, 128) / 128)


def _second(moved: int) -> float:
    return SECOND + moved / BYTES


def hint(size: int) -> int:
    """The value that a symbolic size was traced with, without a guard; 1024 where there is none."""
    return size.node.hint or 1024 if isinstance(size, torch.SymInt) else size
