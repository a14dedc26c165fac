# SPDX-License-Identifier: MIT
"""The choice of tiles for given tensors, and of the library. The rule itself is in `rule`."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import autotune
from .device import device
from .launch import Plan
from .rule import (
    KINDS,
    Device,
    Tiles,
    configurations,
    kernel_time,
    kind_of,
    library_time,
    unaligned_tiles,
)


def aligned(t: Tensor, unit: int) -> bool:
    """Whether ``t`` begins on 16 bytes, and its rows or columns at multiples of ``unit`` elements.

    The rows, or the columns, must be contiguous. By pointers Triton loads 16 bytes at a time where
    ``unit`` is 16, for it asks for no other divisor.
    """
    steps = [
        size if stride == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True)
    ]
    # Rows come first: where their step does not suit, a compiled graph asks no more of the batch.
    are_even = 1 in t.stride() and all(step % unit == 0 for step in reversed(steps))
    return are_even and _begins_on_16_bytes(t)


def loads_by_tma(t: Tensor) -> bool:
    """Whether a TMA descriptor can describe the matrices of ``t (*, rows, cols)`` or ``t.mT``."""
    *batch, row, col = t.stride()
    if any(isinstance(size, int) and not 1 < size < 2**31 for size in t.shape[-2:]):
        # Triton makes a size of 1 a constant, and takes no larger ones in a descriptor.
        return False
    unit = 16 // t.element_size()
    steps = (row if col == 1 else col, *(s for s, n in zip(batch, t.shape, strict=False) if n != 1))
    return (
        1 in (row, col) and all(s > 0 and s % unit == 0 for s in steps) and _begins_on_16_bytes(t)
    )


def _begins_on_16_bytes(t: Tensor) -> bool:
    try:
        return t.data_ptr() % 16 == 0
    except RuntimeError:  # a tracer's tensor has no address; the compiler will allocate it aligned
        return bool(t.storage_offset() * t.element_size() % 16 == 0)


def allows_tma(kernel: str, n: int, *operands: Tensor) -> bool:
    """Whether a kernel by TMA takes the operands, and can store ``n`` columns.

    A symmetric product stores by TMA, and a linear layer also by pointers.
    """
    stores = kernel == "linear_sigmoid" or n * operands[0].element_size() % 16 == 0
    return stores and operands[0].dtype != torch.float64 and all(map(loads_by_tma, operands))


def suits(tiles: Tiles, kernel: str, n: int, *operands: Tensor, tma: bool = True) -> bool:
    """Whether ``tiles`` load the operands, and store ``n`` columns, without spills.

    A small tile of a linear layer may store single elements: their addresses are few.
    """
    unit = 16 // operands[0].element_size()
    if tiles.by_tma:
        loads = tma and allows_tma(kernel, n, *operands)
    else:
        unit = 16 if unit == 8 else unit  # single elements of 2 bytes are not loaded asynchronously
        loads = all(aligned(t, unit) for t in operands)
    small = kernel == "linear_sigmoid" and tiles.block_m * tiles.block_n <= 64 * 128
    return loads and bool(small or n % unit == 0)


def check_variant(tiles: Tiles, kernel: str, n: int, *operands: Tensor) -> None:
    """Raise a ValueError if ``tiles`` are of a shape or variant that cannot take the operands."""
    symmetric = kernel == "symmetric_matmul"
    variants = ("pointers", "tma", "flat" if symmetric else "split_k")
    if tiles.variant not in variants:
        raise ValueError(f"{kernel} has no {tiles}, expected one of the variants {variants}")
    widths = {"pointers": (1,), "tma": (1, 2), "flat": (2,)}.get(tiles.variant, ())
    if symmetric and tiles.block_n not in [tiles.block_m * width for width in widths]:
        expected = " or ".join(f"{width}·block_m" for width in widths)
        raise ValueError(f"{kernel} has no {tiles}, expected a block_n of {expected}")
    if tiles.by_tma and not allows_tma(kernel, n, *operands):
        raise ValueError(
            f"{kernel} cannot take these operands by {tiles}, expected the variant pointers"
        )


def suitable(
    kernel: str,
    precision: str,
    n: int,
    *operands: Tensor,
    tma: bool = True,
    present: Device | None = None,
) -> list[Tiles]:
    """The configurations of a device that suit the operands, and ``n`` columns of a result.

    ``present``: by default the operands' device.
    """
    capability = (present or device(operands[0])).capability
    possible = configurations(kernel, operands[0].dtype, precision, capability)
    return [tiles for tiles in possible if suits(tiles, kernel, n, *operands, tma=tma)]


def predict(
    kernel: str,
    precision: str,
    sizes: Sequence[int],
    *operands: Tensor,
    tma: bool = True,
    with_c: bool = False,
    present: Device | None = None,
) -> dict[Tiles, float]:
    """The predicted µs of the configurations for products of ``sizes`` (m, n, k and batch).

    ``present``: by default the operands' device.
    """
    present, kind = present or device(operands[0]), kind_of(operands[0].dtype, precision)
    possible = suitable(kernel, precision, sizes[1], *operands, tma=tma, present=present)
    possible = possible or unaligned_tiles(kernel, KINDS[kind], present.capability)
    return {
        tiles: kernel_time(kernel, kind, tiles, sizes, present, with_c=with_c) for tiles in possible
    }


def choose_tiles(
    kernel: str,
    precision: str,
    sizes: Sequence[int],
    *operands: Tensor,
    tma: bool = True,
    with_c: bool = False,
) -> Tiles:
    """The tiles with the least predicted time.

    A compiled graph keeps the tiles of the sizes that it was traced with; only their alignment is
    guarded.
    """
    times = predict(kernel, precision, sizes, *operands, tma=tma, with_c=with_c)
    return min(times, key=times.__getitem__)


def library_is_faster(
    kernel: str,
    precision: str,
    sizes: Sequence[int],
    *operands: Tensor,
    tma: bool = True,
    with_c: bool = False,
    exact: bool = True,
    present: Device | None = None,
) -> bool:
    """Whether PyTorch's library is predicted to take less time than the kernel.

    ``exact``: whether a symmetric product of the library is mirrored, so that it is exactly so.
    """
    present, kind = present or device(operands[0]), kind_of(operands[0].dtype, precision)
    times = predict(kernel, precision, sizes, *operands, tma=tma, with_c=with_c, present=present)
    tiles = min(times, key=times.__getitem__)
    if kernel == "symmetric_matmul" and not suits(tiles, kernel, sizes[1], *operands, tma=tma):
        return True  # an address, or a store, for each element; never timed
    product, both = library_time(kernel, kind, sizes, present, with_c=with_c)
    return (both if exact else product) < times[tiles]


def choose_plan(
    make: Callable[[Tiles], Plan],
    kernel: str,
    precision: str,
    sizes: Sequence[int],
    operands: Sequence[Tensor],
    tiles: Tiles | None,
    tma: bool,
    only_if_faster: bool,
    traced: bool,
    with_c: bool = False,
    exact: bool = True,
) -> Plan | None:
    """The plan of a launch; None if the library computes.

    Args:
        make: the plan for given tiles.
        sizes: m, n, k and batch.
        tiles, tma, only_if_faster: as the launch functions take them.
        traced: whether a compiler traces the launch, without tensors to time.
        with_c: whether a matrix C is added, to which the kernel may write the result.
        exact: as `library_is_faster` takes it.
    """
    if only_if_faster and library_is_faster(
        kernel, precision, sizes, *operands, tma=tma, with_c=with_c, exact=exact
    ):
        return None
    if tiles is not None:
        return make(tiles)
    tiles = choose_tiles(kernel, precision, sizes, *operands, tma=tma, with_c=with_c)
    if autotune.ENABLED and not traced and not operands[0].is_cpu and tiles.variant != "split_k":
        possible = suitable(kernel, precision, sizes[1], *operands, tma=tma)
        same_kernel = [t for t in possible if t.by_tma == tiles.by_tma and t.variant != "split_k"]
        plans = [make(one) for one in same_kernel]
        if len(plans) > 1:
            return autotune.AutotunedPlan(plans, restore=["out_ptr"] if with_c else [])
    return make(tiles)
