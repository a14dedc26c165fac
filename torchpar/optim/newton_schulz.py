# SPDX-License-Identifier: MIT
"""Newton–Schulz iterations on products that are known to be symmetric.

They find a matrix near U·Vᵀ, where M = U·Σ·Vᵀ, by products alone: every direction that M holds is given
about the same length. X = M/‖M‖, with n rows and m ≥ n columns, and then a few times the standard iteration

    R = X·Xᵀ        Z = b·R + c·R²        X ← a·X + Z·X

R and Z are symmetric, so half of each is enough: 3n²m + n³ multiplications in the place of 4n²m + 2n³. With
(a, b, c) = (3.4445, −4.7750, 2.0315) the singular values end between 0.7 and 1.2, for a steep start.

Gram Newton–Schulz leaves X alone for k iterations, which multiply it by polynomials in R: their product is Q,
and R follows without X.

    R = X·Xᵀ    k times: Z = b·R + c·R²,  Q ← Q·(a·I + Z),  R ← (a·I + Z)·R·(a·I + Z)    X ← Q·X

All of this is symmetric and n×n, but for X·Xᵀ and Q·X. The price is accuracy: a rounding error of R is
multiplied by a² ≈ 12 in each iteration that follows, and a singular value near 0 is lost in it. A new X·Xᵀ
has none of it: five iterations are 2 and 3, as published, and more are 2, 1, …, 1, 2; of nearly square
matrices all but the first 2 are single.

The singular values lie at most 1.5 times as far from 1 as by the standard iteration. Beside the same in
float64 the result is 1.1 to 1.8 times as far off as the standard iteration's where the singular values lie
within a decade, 2 to 6 times where they range over two or three, 3 to 11 times where each row stands there
two or four times, and up to 31 times where all rows are one (measured with 200 to 512 rows).
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from torchpar.ops import matmul_t, symmetric_matmul
from torchpar.ops._library import is_dtensor

NewtonSchulz = Literal["auto", "standard", "gram"]
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan, 2024, https://kellerjordan.github.io/posts/muon

_SYMMETRIC_ROWS = 768  # below, a whole product takes less time on CPUs than half of one
_GRAM_ROWS, _GRAM_ASPECT = 256, 2  # below, the standard iteration is as fast


@torch.no_grad()
def orthogonalize(
    x: Tensor,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    steps: int = 5,
    eps: float = 1e-7,
    ns: NewtonSchulz = "auto",
) -> Tensor:
    """The matrix of ``x``'s singular vectors with singular values near 1, by Newton–Schulz in bfloat16.

    ``f(f(…f(x / max(‖x‖, eps))))`` with ``f(x) = a·x + b·(x·xᵀ)·x + c·(x·xᵀ)²·x``. It has no gradient.

    Args:
        x: ``(*, n, m)``, floating; a batch is a batch of matrices.
        coefficients: ``(a, b, c)``.
        steps: how often f is applied, 0 to 99.
        eps: the least norm to divide by, so that 0 stays 0.
        ns: "standard" multiplies x in each step, and is as accurate as `torch.optim.Muon`. "gram" iterates on
            the Gram matrix, which is less accurate, and faster where one side is at least twice the other.
            "auto" takes it there, if both are at least 256.

    Returns:
        ``(*, n, m)``, bfloat16.

    Raises:
        ValueError: an argument outside these bounds.

    Source: Jordan, Muon, 2024; Zhang, Amsel, Chen and Dao, Gram Newton–Schulz, 2026,
    https://dao-ailab.github.io/blog/2026/gram-newton-schulz/.
    """
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(f"orthogonalize: x is {tuple(x.shape)} {x.dtype}, expected floating (*, n, m)")
    if len(coefficients) != 3:
        raise ValueError(f"orthogonalize: {len(coefficients)} coefficients, expected 3: (a, b, c)")
    if not 0 <= steps < 100:
        raise ValueError(f"orthogonalize: steps is {steps}, expected 0 to 99")
    check_ns(ns)
    if x.dim() > 3:
        return orthogonalize(x.flatten(0, -3), coefficients, steps, eps, ns).view(x.shape)
    if x.shape[-2] > x.shape[-1]:
        return orthogonalize(x.mT, coefficients, steps, eps, ns).mT
    x = x.to(torch.bfloat16, copy=True)
    x.div_(x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps))
    for i, length in enumerate(_segments(x.shape[-2], x.shape[-1], steps, ns)):
        x = _advance(x, coefficients, length, apart=i == 0 or length == 1)
    return x


def check_ns(ns: str) -> None:
    """Raise a ValueError unless ``ns`` names an iteration."""
    if ns not in get_args(NewtonSchulz):
        raise ValueError(f"ns is {ns!r}, expected 'auto', 'standard' or 'gram'")


def _segments(n: int, m: int, steps: int, ns: NewtonSchulz) -> list[int]:
    """How many iterations are done on one Gram matrix, before x is multiplied and the next is computed."""
    if ns == "standard" or (ns == "auto" and (n < _GRAM_ROWS or m < _GRAM_ASPECT * n)):
        return [1] * steps
    # Three on one Gram matrix end with singular values up to 1.45: from there another iteration diverges, and
    # after more than five iterations the standard one ends nearer to 1. Square matrices lose more by them.
    longest = 1 if m < _GRAM_ASPECT * n else 3 if steps <= 5 else 2
    last = min(steps - 2, longest)
    return [length for length in (min(steps, 2), *[1] * (steps - 2 - last), last) if length > 0]


def _advance(x: Tensor, coefficients: tuple[float, float, float], steps: int, apart: bool) -> Tensor:
    """``Q·x`` for the product Q of so many iterations' polynomials, held as ``Q = shift·I + p``.

    While singular values are small, Q is near aᵏ·I, which costs p no bits if it is kept ``apart``. Later
    Q is of order 1, aᵏ·I and p would cancel, and the shift is 0. One iteration apart is the standard one.
    """
    a, b, c = coefficients
    r = _whole(matmul_t(x) if _halves(x) else x @ x.mT)
    p, shift = r, 0.0
    for step in range(steps):
        z = _symmetric(r, r, r, alpha=c, beta=b)
        if step > 0:
            p = _symmetric(p, z, torch.add(p, z, alpha=shift / a) if apart else p, beta=a)
            shift *= a
        elif apart:
            p, shift = z, a
        else:
            p = z.clone()
            p.diagonal(dim1=-2, dim2=-1).add_(a)
        if step < steps - 1:
            rz = _symmetric(r, z, r, beta=a)
            r = _symmetric(rz, z, rz, beta=a)
    if x.is_contiguous():
        return _add_product(x, p, x, beta=shift) if apart else p @ x
    tall = x.mT  # and so is the result, for a gradient that is
    return (_add_product(tall, tall, p, beta=shift) if apart else tall @ p).mT


def _whole(r: Any) -> Any:
    """A DTensor's small matrix on every rank: gathered once, and with a diagonal that can be written to."""
    if not is_dtensor(r):
        return r
    from torch.distributed.tensor import Replicate

    return r.redistribute(placements=[Replicate()] * r.device_mesh.ndim)


def _halves(x: Tensor) -> bool:
    # On a GPU the operators themselves know from where on.
    return x.is_cuda or x.shape[-2] >= _SYMMETRIC_ROWS


def _symmetric(a: Tensor, b: Tensor, c: Tensor, *, alpha: float = 1.0, beta: float) -> Tensor:
    """``alpha·a·b + beta·c`` of polynomials in one symmetric matrix."""
    if _halves(a):
        return symmetric_matmul(a, b, c, alpha=alpha, beta=beta)
    return _add_product(c, a, b, alpha=alpha, beta=beta)


def _add_product(c: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, beta: float) -> Tensor:
    return (torch.addmm if a.dim() == 2 else torch.baddbmm)(c, a, b, alpha=alpha, beta=beta)
