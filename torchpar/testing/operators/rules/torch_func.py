# SPDX-License-Identifier: MIT
"""Derivatives by `torch.func`."""

from collections.abc import Callable

from torch import Tensor
from torch.func import hessian, jacfwd, jacrev, jvp, vjp

from torchpar.testing.operators.attempts import OutcomeException
from torchpar.testing.operators.case import Case
from torchpar.testing.operators.tensors import Function, Tensors, normal_like, real


def scalar(f: Function) -> Callable[..., Tensor]:
    """A scalar whose gradient differs from element to element."""
    return lambda *xs: sum((y + y.square()).sum() for y in map(real, f(*xs)))  # type: ignore[return-value]


def of_vjp(f: Function, case: Case) -> object:
    ys, pull, *_ = vjp(f, *case.floating)
    return pull(tuple(map(normal_like, ys)))


def _jvp_of_operator(f: Function, xs: Tensors) -> tuple[Tensors, Tensors]:
    ys, pushed, *_ = jvp(f, xs, tuple(map(normal_like, xs)))
    return ys, pushed


def of_jvp(f: Function, case: Case) -> object:
    return _jvp_of_operator(f, case.floating)


def of_jvp_of_jvp(f: Function, case: Case) -> object:
    return _jvp_of_operator(lambda *xs: _jvp_of_operator(f, xs)[1], case.floating)


def of_jacrev(f: Function, case: Case) -> object:
    return jacrev(f, case.indices)(*case.floating)


MOST_SQUARED = 2**24  # numbers that a rule may keep, of 8 bytes each


def _of_every_pair(f: Callable[[], object], xs: Tensors) -> object:
    """Compute derivatives by all operands at once, unless they take too much memory."""
    count = sum(x.numel() for x in xs)
    if count**2 > MOST_SQUARED:
        raise OutcomeException(
            "not run", f"{count}² derivatives, expected at most 2²⁴ numbers; take a smaller sample"
        )
    return f()


def forward_jacobian(f: Function, xs: Tensors) -> object:
    return _of_every_pair(lambda: jacfwd(f, tuple(range(len(xs))))(*xs), xs)


def hessian_of_scalar(f: Function, xs: Tensors) -> object:
    return _of_every_pair(lambda: hessian(scalar(f), tuple(range(len(xs))))(*xs), xs)


def of_jacfwd(f: Function, case: Case) -> object:
    return forward_jacobian(f, case.floating)


def of_hessian(f: Function, case: Case) -> object:
    return hessian_of_scalar(f, case.floating)
