# SPDX-License-Identifier: MIT
"""Tensors of a sample in other dtypes or with other numbers, and the types of their functions."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import Parameter

Tensors = tuple[Tensor, ...]
Function = Callable[..., Tensors]
"""A function of tensors to a tuple of tensors."""

Layout = Callable[[Tensor], Tensor]
LOW = (torch.bfloat16, torch.float16)


class Memory:
    """The memory that dense tensors view, and a copy of it. Subclasses are left out."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._pairs = [
            (memory, memory.clone())
            for t in tensors
            if type(t) in (Tensor, Parameter) and t.layout == torch.strided
            if not (t.is_meta or t.is_nested or torch._is_zerotensor(t))
            for memory in [t.detach().new_empty(0, dtype=torch.uint8).set_(t.untyped_storage())]
        ]

    def has_changed(self) -> bool:
        return not all(torch.equal(memory, before) for memory, before in self._pairs)

    def restore(self) -> None:
        for memory, before in self._pairs:
            if not torch.equal(memory, before):
                memory.copy_(before)


def is_differentiable(t: Tensor) -> bool:
    """Whether a tensor's dtype is a floating or a complex one."""
    return t.is_floating_point() or t.is_complex()


def normal_like(t: Tensor, seed: int = 9) -> Tensor:
    """Normally distributed numbers like ``t`` in shape, dtype and device, the same in each run."""
    generator = torch.Generator().manual_seed(seed)
    # Rounded to float32, so that a tensor and its copy in float64 get the same numbers.
    found = torch.randn(
        (*t.shape, 1 + t.is_complex()), generator=generator, dtype=torch.float64, device="cpu"
    ).float()
    return (torch.view_as_complex(found) if t.is_complex() else found[..., 0]).to(t.device, t.dtype)


def moved_by_a_rounding(t: Tensor, seed: int) -> Tensor:
    """Change each number by about one rounding, which depends on the seed."""
    return t * (1 + torch.finfo(t.dtype).eps * normal_like(t, seed)) if is_differentiable(t) else t


def cast(operands: Tensors, dtype: torch.dtype) -> Tensors:
    """Convert floating tensors to ``dtype``, and complex tensors to its complex counterpart.

    The counterpart is complex128 for float64, and complex64 for all other dtypes.
    """
    of_complex = torch.complex128 if dtype == torch.float64 else torch.complex64
    dtypes = [
        dtype if t.is_floating_point() else of_complex if t.is_complex() else t.dtype
        for t in operands
    ]
    return tuple(t.to(to) for t, to in zip(operands, dtypes, strict=True))


def real(t: Tensor) -> Tensor:
    """A real tensor, or the real and imaginary parts of a complex one."""
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def rolled(t: Tensor, by: int) -> Tensor:
    """The same numbers in another order, so that they stay in the domain of an operator."""
    return t.flatten().roll(by).view(t.shape)
