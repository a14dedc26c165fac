# SPDX-License-Identifier: MIT
"""Transforms of torch.func and forward mode: detect them, and help rules of vmap."""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten

from torchpar.library.private import peek_interpreter_stack
from torchpar.library.sharding import any_dtensor

_is_tracing = torch._C._is_tracing
_PLAIN = {Tensor, torch.nn.Parameter, type(None)}


def batch_first(t: Tensor, dim: int | None, batch_size: int) -> Tensor:
    """For rules of vmap: ``t`` with its batch dimension first.

    If ``dim`` is None, ``t`` has no batch dimension, and is expanded to a batch.
    """
    return t.expand(batch_size, *t.shape) if dim is None else t.movedim(dim, 0)


def sample(t: Tensor, dim: int | None) -> Tensor:
    """For rules of vmap: a tensor like one sample of ``t``, whose values are undefined."""
    return (
        t
        if dim is None
        else t.new_empty(()).expand([size for d, size in enumerate(t.shape) if d != dim])
    )


def is_transformed(values: object) -> bool:
    """Whether torch.func transforms or forward mode act on a call with these arguments."""
    if peek_interpreter_stack() is not None:
        return True
    if forward_ad._current_level < 0:
        return False
    # PyTorch counts the levels of forward mode for all threads together, so the tangents decide.
    tensors = [t for t in tree_flatten(values)[0] if isinstance(t, Tensor)]
    return any(forward_ad.unpack_dual(t, level=0).tangent is not None for t in tensors)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether no compiler, transform or tensor subclass intercepts calls with these tensors."""
    if torch.compiler.is_compiling() or not _PLAIN.issuperset(map(type, tensors)):
        return False
    return not (_is_tracing() or is_transformed(tensors))


def needs_formula(*tensors: Tensor) -> bool:
    """Whether a backward pass must consist of operators with derivatives and sharding rules."""
    return torch.is_grad_enabled() or is_transformed(tensors) or any_dtensor(tensors)
