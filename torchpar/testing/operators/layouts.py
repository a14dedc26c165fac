# SPDX-License-Identifier: MIT
"""Operands in other layouts and of other sizes."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from torchpar.testing.operators.attempts import Attempts
from torchpar.testing.operators.case import Case
from torchpar.testing.operators.tensors import Layout, Tensors, is_differentiable, rolled


def _permuted(t: Tensor, dims: list[int]) -> Tensor:
    return t.permute(dims).contiguous().permute([dims.index(dim) for dim in range(t.dim())])


def _stepped(t: Tensor) -> Tensor:
    """A view of every second element, between which the buffer holds NaN."""
    every_second = (slice(None, None, 2),) * t.dim()
    buffer = t.new_full([2 * size for size in t.shape], math.nan if is_differentiable(t) else 1)
    buffer[every_second] = t
    return buffer[every_second]


def _channels_last(t: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.clone(memory_format=formats.get(t.dim(), torch.contiguous_format))


# Functions of a tensor to a tensor of the same shape and, if not expanded, of the same values.
LAYOUTS: dict[str, Layout] = {
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t.clone(),
    "permuted": lambda t: _permuted(t, [*range(t.dim())][1:] + [*range(t.dim())][:1]),
    "channels last": _channels_last,
    "stepped": _stepped,
    "expanded": lambda t: t[:1].expand_as(t) if t.dim() and t.numel() else t,
    "expanded last": lambda t: t[..., :1].expand_as(t) if t.dim() and t.numel() else t,
    # All strides are 0, as in the gradient that a sum gives its operand.
    "expanded everywhere": lambda t: t.flatten()[:1].view(()).expand(t.shape) if t.numel() else t,
    # At an address that is not aligned.
    "offset": lambda t: torch.cat([t.new_zeros(3), t.flatten()])[3:].view(t.shape),
    # Like z.conj().imag, whose sign is pending.
    "negated": lambda t: torch._neg_view(-t) if is_differentiable(t) else t,
    # Like z.conj(), whose sign of the imaginary part is pending.
    "conjugated": lambda t: t.conj().resolve_conj().conj() if t.is_complex() else t,
}


def layouts(tensors: Sequence[Tensor]) -> dict[str, Layout]:
    """The layouts that differ from the contiguous layout for these tensors."""
    dims, is_complex = {t.dim() for t in tensors}, any(t.is_complex() for t in tensors)
    unlike = {
        "channels last": dims & {4, 5},
        "expanded everywhere": max(dims, default=0) > 1,
        "conjugated": is_complex,
    }
    return {name: layout for name, layout in LAYOUTS.items() if unlike.get(name, True)}


def _first(n: int, t: Tensor, dim: int) -> Tensor:
    return t.narrow(dim, 0, min(t.shape[dim], n))


def _other_operands(case: Case) -> Iterator[tuple[str, Tensors]]:
    yield "as given", case.operands
    for name, layout in layouts(case.operands).items():
        yield f"{name} operands", tuple(map(layout, case.operands))
        for i, t in enumerate(case.operands if len(case.operands) > 1 else ()):
            yield f"{name} operand {i}", (*case.operands[:i], layout(t), *case.operands[i + 1 :])
    for n in (0, 1):
        for name, operands in case.resized(partial(_first, n)):
            yield f"{n} in place of {name}", operands
    yield (
        "operands without dimensions",
        tuple(t.flatten()[0] if t.numel() else t for t in case.operands),
    )
    yield from _of_other_dimensions(case)


MOST_DIMENSIONS = 5


def _of_other_dimensions(case: Case) -> Iterator[tuple[str, Tensors]]:
    """Operands of one and of five dimensions: all, each alone, and those of the most dimensions."""
    every, most = range(len(case.operands)), max((t.dim() for t in case.operands), default=0)
    longest = [i for i in every if case.operands[i].dim() == most]
    for count, change in {1: _of_one_dimension, MOST_DIMENSIONS: _of_most_dimensions}.items():
        changed: set[tuple[int, ...]] = set()
        for chosen in ([*every], longest, *([i] for i in every)):
            key = tuple(i for i in chosen if case.operands[i].dim() != count)
            if key and key not in changed:
                changed.add(key)
                who = "operands" if len(key) == len(every) else f"operands {key}"
                operands = [change(t) if i in key else t for i, t in enumerate(case.operands)]
                yield f"{who} of {count} dimension{'s' * (count > 1)}", tuple(operands)


def _of_one_dimension(t: Tensor) -> Tensor:
    return t[(0,) * (t.dim() - 1)] if t.dim() and t.numel() else t.flatten()


def _of_most_dimensions(t: Tensor) -> Tensor:
    """The tensor in a batch, in which each sample has the numbers in another order."""
    batch = (2, 1, 3, 1, 2)[: max(MOST_DIMENSIONS - t.dim(), 0)]
    rolls = torch.stack([rolled(t, k) for k in range(math.prod(batch))])
    return rolls.view(*batch, *t.shape) if batch else t


def in_layouts_and_sizes(check: Callable[[Case, Tensors], None], case: Case) -> Attempts:
    for name, operands in _other_operands(case):
        yield name, partial(check, case, operands)
