# SPDX-License-Identifier: MIT
"""The choice of tiles for given tensors, and of the library. The rule itself is in `rule`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from . import autotune
from .device import device
from .launch import Plan, emulated_kind
from .rule import (
    Device,
    Product,
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


def descriptor_layout(t: Tensor) -> str:
    """The layout of a matrix, or of a batch, as `gemm.make_descriptor` takes it."""
    return "N" if t.stride(-1) == 1 else "T"


def _begins_on_16_bytes(t: Tensor) -> bool:
    try:
        return t.data_ptr() % 16 == 0
    except RuntimeError:  # a tracer's tensor has no address; the compiler will allocate it aligned
        return bool(t.storage_offset() * t.element_size() % 16 == 0)


@dataclass
class Choice:
    """A choice to be made: of tiles for given operands, and of PyTorch's library.

    Attributes:
        sizes: m, n, k and batch.
        tma: whether the kernel may make TMA descriptors.
        with_c: whether a matrix C is added, to which the kernel may write the result.
        exact: whether a symmetric product of the library is mirrored, to be exactly symmetric.
        present: the device; by default that of the operands.
    """

    product: Product
    precision: str
    sizes: Sequence[int]
    operands: Sequence[Tensor]
    tma: bool = True
    with_c: bool = False
    exact: bool = True
    present: Device | None = None

    @cached_property
    def kind(self) -> str:
        return kind_of(self.operands[0].dtype, self.precision)

    @cached_property
    def device(self) -> Device:
        return self.present or device(self.operands[0])

    @cached_property
    def allows_tma(self) -> bool:
        """Whether a kernel by TMA takes the operands, and can store the columns of the result."""
        first, n = self.operands[0], self.sizes[1]
        stores = self.product.single_stores or n * first.element_size() % 16 == 0
        return bool(
            stores and first.dtype != torch.float64 and all(map(loads_by_tma, self.operands))
        )

    @cached_property
    def suitable(self) -> list[Tiles]:
        """The configurations of the device that load the operands, and store the columns of a
        result, without spills.

        A small tile may store single elements: their addresses are few.
        """
        unit = 16 // self.operands[0].element_size()
        # Single elements of 2 bytes are not loaded asynchronously.
        by_pointers = 16 if unit == 8 else unit
        are_aligned = all(aligned(t, by_pointers) for t in self.operands)

        def suits(tiles: Tiles) -> bool:
            loads = self.tma and self.allows_tma if tiles.by_tma else are_aligned
            small = tiles.block_m * tiles.block_n <= self.product.single_stores
            return loads and bool(
                small or self.sizes[1] % (unit if tiles.by_tma else by_pointers) == 0
            )

        possible = configurations(self.product, self.kind, self.device.capability)
        return [tiles for tiles in possible if suits(tiles)]

    @cached_property
    def times(self) -> dict[Tiles, float]:
        """The predicted µs of the configurations."""
        possible = self.suitable or unaligned_tiles(self.product, self.kind, self.device.capability)
        case = self.sizes, self.device
        return {
            one: kernel_time(self.product, self.kind, one, *case, with_c=self.with_c)
            for one in possible
        }

    @property
    def library_times(self) -> tuple[float, float]:
        """As `library_time`."""
        return library_time(self.product, self.kind, self.sizes, self.device, with_c=self.with_c)

    @property
    def tiles(self) -> Tiles:
        """The tiles with the least predicted time.

        A compiled graph keeps the tiles of the sizes that it was traced with; only their alignment
        is guarded.
        """
        return min(self.times, key=self.times.__getitem__)

    def check(self, tiles: Tiles) -> None:
        """Raise a ValueError for tiles of a shape or variant that cannot take the operands."""
        name, variants = self.product.name, self.product.variants
        if tiles.variant not in variants:
            raise ValueError(f"{name} has no {tiles}, expected one of the variants {(*variants,)}")
        widths = variants[tiles.variant].widths
        if widths and tiles.block_n not in [tiles.block_m * width for width in widths]:
            expected = " or ".join(f"{width}·block_m" for width in widths)
            raise ValueError(f"{name} has no {tiles}, expected a block_n of {expected}")
        if tiles.by_tma and not self.allows_tma:
            raise ValueError(
                f"{name} cannot take these operands by {tiles}, expected the variant pointers"
            )


def library_is_faster(choice: Choice) -> bool:
    """Whether PyTorch's library is predicted to take less time than the kernel."""
    if choice.product.is_symmetric and not choice.suitable:
        return True  # an address, or a store, for each element; never timed
    product, both = choice.library_times
    return (both if choice.exact else product) < choice.times[choice.tiles]


def choose_plan(
    make: Callable[[Choice, Tiles], Plan],
    choice: Choice,
    tiles: Tiles | None,
    only_if_faster: bool,
    traced: bool,
) -> Plan | None:
    """The plan of a launch; None if the library computes.

    Args:
        make: the plan for given tiles.
        tiles, only_if_faster: as the launch functions take them.
        traced: whether a compiler traces the launch, without tensors to time.
    """
    if only_if_faster and library_is_faster(choice):
        return None
    if tiles is not None:
        choice.check(tiles)
        return make(choice, tiles)
    tiles = choice.tiles
    is_timed = autotune.ENABLED and not (choice.operands[0].is_cpu or emulated_kind() >= 0)
    if is_timed and not traced and tiles.variant != "split_k":
        same_kernel = [
            one for one in choice.times if one.by_tma == tiles.by_tma and one.variant != "split_k"
        ]
        plans = [make(choice, one) for one in same_kernel]
        if len(plans) > 1:
            return autotune.AutotunedPlan(plans, restore=["out_ptr"] if choice.with_c else [])
    return make(choice, tiles)
