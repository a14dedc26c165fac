# SPDX-License-Identifier: MIT
"""Transforms of torch.func and forward mode: detect them, and help rules of vmap."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.jit import is_tracing  # type: ignore[attr-defined]

from torchpar.library.private import peek_interpreter_stack
from torchpar.library.sharding import any_dtensor

_PLAIN = {Tensor, torch.nn.Parameter, type(None)}


def batch_first(t: Tensor, dim: int | None, batch_size: int) -> Tensor:
    """For rules of vmap: ``t`` with its batch dimension first, ``(batch_size, *)``.

    Args:
        t: an operand of the rule.
        dim: the batch dimension of ``t``. None says that it has no batch dimension: then it is
            expanded to a batch.
        batch_size: ``info.batch_size`` of the rule.
    """
    return t.expand(batch_size, *t.shape) if dim is None else t.movedim(dim, 0)


def sample(t: Tensor, dim: int | None) -> Tensor:
    """For rules of vmap: a tensor with the shape and dtype of one sample of ``t``, without values.

    ``dim`` is the batch dimension of ``t``. If it is None, ``t`` is the sample.
    """
    return (
        t
        if dim is None
        else t.new_empty(()).expand([size for d, size in enumerate(t.shape) if d != dim])
    )


def tensors_of(values: Iterable[object]) -> Iterator[Tensor]:
    """The tensors among the values, and in the lists among these."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_of(value)


def is_transformed(values: Iterable[object]) -> bool:
    """Whether torch.func transforms or forward mode act on a call with these arguments."""
    if peek_interpreter_stack() is not None:
        return True
    if forward_ad._current_level < 0:
        return False
    # PyTorch counts the levels of forward mode for all threads together, so the tangents decide.
    return any(forward_ad.unpack_dual(t, level=0).tangent is not None for t in tensors_of(values))


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether no compiler, transform or tensor subclass intercepts calls with these tensors."""
    if torch.compiler.is_compiling() or not _PLAIN.issuperset(map(type, tensors)):
        return False
    return not (is_tracing() or is_transformed(tensors))


def needs_formula(*tensors: Tensor) -> bool:
    """Whether a backward pass must consist of operators with derivatives and sharding rules."""
    return torch.is_grad_enabled() or is_transformed(tensors) or any_dtensor(tensors)
