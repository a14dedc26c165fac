# SPDX-License-Identifier: MIT
"""The choice of tiles: measured where the device has been tuned, estimated elsewhere.

Nothing is searched for at run time.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import ceil

import torch
from torch import Tensor

from .candidates import KINDS, Device, Tiles, configurations, device, kind_of, split_k
from .tables import nearest

SECOND_LAUNCH = 3.0  # µs on a GPU, an estimate
BYTES_PER_US = 4.8e6  # of an H200's memory, by NVIDIA's data sheet


def choose_tiles(
    kernel: str, precision: str, sizes: Sequence[int], *operands: Tensor, tma: bool = True
) -> Tiles | None:
    """Tiles for products of ``sizes`` (m, n, k and batch); None if PyTorch's library is faster.

    They are those of the table's nearest problem, or the default ones if none is nearer than `FAR`. No guard
    is added for a symbolic size: a compiled graph keeps the tiles of the sizes that it was traced with.
    """
    kind = kind_of(operands[0].dtype, precision)
    entry = nearest(device(operands[0]), kernel, kind, tuple(map(_hint, sizes)))
    if entry:
        tiles = entry[1]
        aligned = _hint(sizes[1]) * operands[0].element_size() % 16 == 0
        usable = variants(kernel, sizes[1], *operands, tma=tma)
        if tiles is None or (tiles.variant in usable and can_store(tiles, aligned)):
            return tiles
    return default_tiles(kernel, precision, sizes, *operands, tma=tma)


def default_tiles(
    kernel: str, precision: str, sizes: Sequence[int], *operands: Tensor, tma: bool = True
) -> Tiles:
    """Without a table: the tiles with the least estimated time for ``sizes`` (m, n, k and batch)."""
    kind, present = kind_of(operands[0].dtype, precision), device(operands[0])
    usable = variants(kernel, sizes[1], *operands, tma=tma)
    if not usable:
        return KINDS[kind].unaligned
    symbolic = any(isinstance(size, torch.SymInt) for size in sizes)  # of which no sum is split
    usable = tuple(v for v in usable if v != "specialized" and not (symbolic and v == "split_k"))
    return _least_estimate(kernel, kind, present, tuple(map(_hint, sizes)), usable, _steps_of_16(*operands))


@lru_cache(4096)
def _least_estimate(
    kernel: str, kind: str, present: Device, sizes: tuple[int, ...], variants: tuple[str, ...], steps: bool
) -> Tiles:
    """The tiles with the least estimated time among the ``variants``.

    By pointers Triton loads 16 bytes at a time only where ``steps``, those of the operands, are multiples of
    16 elements.
    """
    m, n, k, batch = sizes
    dtype, precision, speed = KINDS[kind][:3]
    aligned = n * dtype.itemsize % 16 == 0
    part = max(dtype.itemsize, 4)  # bytes of an element of a part of the sum, written and read

    def estimate(tiles: Tiles) -> float:
        """In µs: the waves of tiles over the multiprocessors, times a tile's work.

        To load a row of an operand's tile counts as 64 products.
        """
        block_m, block_n = tiles[:2]
        rows, columns = ceil(m / block_m), ceil(n / block_n)
        if kernel != "symmetric_product":
            units = rows * columns
        elif block_m == block_n:
            units = rows * (rows + 1) // 2
        else:  # full tiles, and pairs of the square tiles on the diagonal
            units = columns**2 + ceil(columns / 2)
        count, columns_each = split_k(tiles, present, m, n, k) if tiles.variant == "split_k" else (1, k)
        waves = ceil(units * batch * count / present.multiprocessors)
        time = waves * columns_each * (block_m * block_n + 64 * (block_m + block_n)) / speed
        return time if count == 1 else time + SECOND_LAUNCH + 2 * part * m * n * count / BYTES_PER_US

    possible = configurations(kernel, dtype, precision, present.capability)
    possible = [one for one in possible if one.variant in variants and can_store(one, aligned)]
    by_tma = [one for one in possible if one.variant == "tma"]
    return min(possible if steps or not by_tma else by_tma, key=estimate)


def can_store(tiles: Tiles, aligned: bool) -> bool:
    """Whether a tile can be stored without spills.

    ``aligned``: rows of the result begin at multiples of 16 bytes.
    """
    return aligned or tiles.block_m * tiles.block_n <= 64 * 128


def _hint(size: int) -> int:
    """The value that a symbolic size was traced with, without a guard; 1024 where there is none."""
    return size.node.hint or 1024 if isinstance(size, torch.SymInt) else size


def variants(kernel: str, n: int, *operands: Tensor, tma: bool = True) -> tuple[str, ...]:
    """The variants of ``kernel`` that operands and a result of ``n`` columns allow; maybe none.

    The symmetric product stores its mirror too, for which rows of the result must begin at multiples of 16
    bytes.
    """
    symmetric = kernel == "symmetric_product"
    if not _moves_16_bytes(n if symmetric else 0, *operands):
        return ()
    allowed = ("pointers",) if symmetric else ("pointers", "split_k")
    if not tma or operands[0].dtype == torch.float64 or not all(map(loads_by_tma, operands)):
        return allowed
    plain = symmetric and all(t.stride(-1) == 1 and (t.dim() == 2 or t.shape[0] == 1) for t in operands)
    return (*allowed, "tma", "specialized") if plain else (*allowed, "tma")


def check_variant(tiles: Tiles, kernel: str, n: int, *operands: Tensor) -> None:
    """Raise a ValueError if ``tiles`` are of a variant that cannot take the operands."""
    if tiles.variant == "pointers":
        return
    possible = variants(kernel, n, *operands)
    if tiles.variant not in possible:
        expected = " or ".join(("pointers", *(v for v in possible if v != "pointers")))
        raise ValueError(f"{kernel} cannot take these operands by {tiles}, expected the variant {expected}")


def loads_by_tma(t: Tensor) -> bool:
    """Whether a TMA descriptor can describe the matrices of ``t (*, rows, cols)`` or their transposes."""
    if t.dim() < 2:
        return False
    *batch, row, col = t.stride()
    step, unit = row if col == 1 else col, 16 // t.element_size()
    steps = (step, *(s for s, n in zip(batch, t.shape, strict=False) if n != 1))
    if any(isinstance(size, int) and not 1 < size < 2**31 for size in t.shape[-2:]):
        return False  # Triton makes a size of 1 a constant, and takes no larger ones in a descriptor
    if 1 not in (row, col) or t.storage_offset() % unit or any(s <= 0 or s % unit for s in steps):
        return False
    try:
        return t.data_ptr() % 16 == 0
    except RuntimeError:  # a tracer's tensor has no address; the compiler will allocate it aligned
        return True


def _moves_16_bytes(columns: int, *operands: Tensor) -> bool:
    """Whether operands can be loaded, and rows of a result of ``columns`` stored, 16 bytes at a time."""
    for t in operands:
        unit = 16 // t.element_size()
        if any(step % unit for step in (columns, t.storage_offset(), *_steps(t))):
            return False
    return True


def _steps_of_16(*operands: Tensor) -> bool:
    return all(step % 16 == 0 for t in operands for step in _steps(t))


def _steps(t: Tensor) -> list[int]:
    """The strides of ``t``; of a contiguous dimension its size."""
    return [size if stride == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True)]
