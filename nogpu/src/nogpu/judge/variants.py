# SPDX-License-Identifier: MIT
"""Other inputs than a reference's own: smaller ones, other shapes, values and layouts."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from nogpu.check.compare import chain_error
from nogpu.judge.problem import Inputs

LEAST = 8  # smaller sizes are taken for no size: numbers of heads, or of a dimension
ELEMENTS = 2**15  # of inputs that are executed as a whole
SHAPES = 3  # sizes of which there are variants: the largest ones


def sizes_of(inputs: Inputs) -> list[int]:
    """Return the sizes of tensors, each once, the largest ones first."""
    found = {size for t in _tensors(inputs) for size in t.shape if size >= LEAST}
    return sorted(found, reverse=True)


def elements(inputs: Inputs) -> int:
    return sum(t.numel() for t in _tensors(inputs))


def resized(inputs: Inputs, sizes: Mapping[int, int]) -> Inputs:
    """Return inputs in which each size, and each integer that equals one, is another one.

    Numbers are those of the given tensors, over again where a tensor is longer.
    """

    def other(one: Any) -> Any:
        if type(one) is int:
            return sizes.get(one, one)
        if not isinstance(one, Tensor):
            return one
        for d, size in enumerate(one.shape):
            if size in sizes:
                one = one.index_select(d, torch.arange(sizes[size]) % max(size, 1))
        return one.contiguous()

    return Inputs(tree_map(other, inputs.data), tree_map(other, list(inputs.init)))


def smaller(inputs: Inputs, accepts: Callable[[Inputs], bool]) -> dict[int, int]:
    """Return sizes by which inputs are small enough to be executed as a whole; {} if none are.

    All sizes are divided by one power of two; if the reference doesn't accept them, each is halved
    by itself as often as it does.
    """
    if elements(inputs) <= ELEMENTS:
        return {}
    chosen: dict[int, int] = {}
    for shift in range(1, 16):
        sizes = {size: max(size >> shift, 32) for size in sizes_of(inputs) if size > 32}
        one = resized(inputs, sizes)
        if elements(one) <= ELEMENTS:
            if accepts(one):
                return sizes
            break
    for size in sizes_of(inputs):
        for shift in range(15, 0, -1):
            if size >> shift >= 32 and accepts(resized(inputs, {**chosen, size: size >> shift})):
                chosen[size] = size >> shift
                break
        if elements(resized(inputs, chosen)) <= ELEMENTS:
            break
    return chosen


def shapes(inputs: Inputs) -> Iterator[tuple[str, Inputs]]:
    """Yield inputs of other shapes: sizes one more and one less, one, and none."""
    for size in sizes_of(inputs)[:SHAPES]:
        for other in (size + 1, size - 1, 1, 0):
            yield f"{size} → {other}", resized(inputs, {size: other})


def values(inputs: Inputs) -> Iterator[tuple[str, Inputs]]:
    """Yield inputs with other numbers, in tensors of floats."""

    def floats(change: Callable[[Tensor], Tensor]) -> Inputs:
        def other(one: Any) -> Any:
            is_float = isinstance(one, Tensor) and one.is_floating_point() and one.numel()
            return change(one).to(one.dtype) if is_float else one

        return Inputs(tree_map(other, inputs.data), inputs.init)

    if not any(t.is_floating_point() for t in _tensors(inputs)):
        return

    places = itertools.count()

    def with_nan(t: Tensor) -> Tensor:
        """Put NaN at another place in each tensor."""
        found = t.clone()
        found.view(-1)[(found.numel() // 2 + next(places)) % found.numel()] = torch.nan
        return found

    yield "large", floats(lambda t: 100 * t)
    yield "tiny", floats(lambda t: 1e-6 * t)
    yield "±0", floats(lambda t: torch.zeros_like(t).copysign(t))
    yield "NaN", floats(with_nan)
    yield "repeated", floats(lambda t: t.flatten()[0].expand(t.shape).contiguous())


def layouts(inputs: Inputs) -> Iterator[tuple[str, Inputs]]:
    """Yield inputs with other strides."""

    def strided(change: Callable[[Tensor], Tensor]) -> Inputs:
        def other(one: Any) -> Any:
            return change(one) if isinstance(one, Tensor) and one.dim() > 1 else one

        return Inputs(tree_map(other, inputs.data), inputs.init)

    def transposed(t: Tensor) -> Tensor:
        return t.mT.contiguous().mT

    def in_wider(t: Tensor) -> Tensor:
        return torch.cat([t, t], -1)[..., : t.shape[-1]]

    if any(t.dim() > 1 for t in _tensors(inputs)):
        yield "transposed", strided(transposed)
        yield "in wider rows", strided(in_wider)


def rounded(inputs: Inputs) -> Inputs:
    """Return inputs of float64 that differ by the rounding of a sum in float32, up or down."""
    most = max(chain_error(_tensors(inputs)), torch.finfo(torch.float32).eps)
    generator = torch.Generator().manual_seed(0)

    def other(one: Any) -> Any:
        if not (isinstance(one, Tensor) and one.is_floating_point()):
            return one
        signs = torch.randint(0, 2, one.shape, generator=generator, dtype=torch.float64) * 2 - 1
        return one.double() * (1 + most * signs)

    return Inputs(tree_map(other, inputs.data), inputs.init)


def _tensors(inputs: Inputs) -> list[Tensor]:
    return [one for one in tree_leaves(inputs.data) if isinstance(one, Tensor)]
