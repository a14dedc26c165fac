# SPDX-License-Identifier: MIT
"""Gradients of an operator and of its reference, for given incoming gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from torchpar.testing.operators.attempts import OutcomeException
from torchpar.testing.operators.case import Case
from torchpar.testing.operators.tensors import Function, Layout, Tensors, normal_like


def gradients(
    ys: Sequence[Tensor], xs: Sequence[Tensor], incoming: Sequence[Tensor], **how: bool
) -> Tensors:
    dependent = [i for i, y in enumerate(ys) if y.requires_grad] or range(len(ys))
    ys, incoming = [ys[i] for i in dependent], [incoming[i] for i in dependent]
    found: Tensors = torch.autograd.grad(
        ys, xs, incoming, allow_unused=True, materialize_grads=True, **how
    )
    return found


def pulled_back(
    f: Function,
    case: Case,
    layout: Layout = lambda t: t,
    of_operands: Layout = lambda t: t,
    required: Sequence[int] | None = None,
    used: slice = slice(None),
) -> Tensors:
    """Gradients of ``f`` for normally distributed incoming gradients, of any layout."""
    xs = case.leaves()
    chosen = xs if required is None else [xs[i] for i in required]
    for x in xs:
        x.requires_grad_(any(x is one for one in chosen))
    ys = f(*map(of_operands, xs))[used]
    incoming, kept = ([layout(normal_like(y)) for y in ys] for _ in range(2))
    found = gradients(ys, chosen, incoming)
    if not all(map(torch.equal, incoming, kept)):
        raise OutcomeException("wrong", "the backward writes to its incoming gradient")
    return found
