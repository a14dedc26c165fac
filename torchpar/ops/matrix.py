# SPDX-License-Identifier: MIT
"""Checks and products shared by the matrix operators."""

import math

import torch
from torch import Tensor

from torchpar.library.private import get_fp32_precision
from torchpar.library.sharding import is_dtensor

DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))


def check_dtype(operator: str, name: str, x: Tensor) -> None:
    """Raise a RuntimeError unless ``x``, the argument ``name``, has a dtype of the kernels."""
    if x.dtype not in DTYPES:
        raise RuntimeError(
            f"torchpar::{operator}: {name} has dtype {x.dtype}, expected float16, bfloat16, "
            "float32 or float64"
        )


def check_like(operator: str, name: str, t: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """Raise a RuntimeError unless ``t`` has ``shape``, and ``like``'s dtype and device."""
    if t.shape != shape or t.dtype != like.dtype or t.device != like.device:
        actual = (tuple(t.shape), t.dtype, t.device)
        expected = (tuple(shape), like.dtype, like.device)
        raise RuntimeError(f"torchpar::{operator}: {name} is {actual}, expected {expected}")


def fp32_precision(x: Tensor) -> str:
    """The precision of products of ``x`` on CUDA, "ieee" or "tf32", which float32 can have."""
    is_tf32 = x.dtype == torch.float32 and get_fp32_precision("cuda", "matmul") == "tf32"
    return "tf32" if is_tf32 else "ieee"


def rows(t: Tensor) -> Tensor:
    """``(*, features)`` as a matrix; a view where the strides allow."""
    return t if t.dim() == 2 else t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def is_paired(t: Tensor) -> bool:
    """Whether a product may read the elements of ``t`` in pairs, as AMX reads 16-bit floats.

    Where rows have an odd length, oneDNN pairs the last element with its neighbour in memory, and
    multiplies the neighbour by 0. If the neighbour is not finite, the result is NaN.
    """
    return t.is_cpu and t.dtype.itemsize == 2


def pad_to_even(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Append a column of zeros to ``a (*, n, k)`` and ``b (*, m, k)``, if `is_paired` and k is odd.

    A graph with a symbolic k appends two or three columns, also to an even k. DTensors are left as
    they are.
    """
    if not is_paired(a) or is_dtensor(a) or is_dtensor(b):
        return a, b
    k = a.shape[-1]
    if isinstance(k, torch.SymInt):
        columns = 2 + k % 2  # `if k % 2` would specialize the graph on k, and so would 0 columns
    elif k % 2:
        columns = 1
    else:
        return a, b
    padded = _with_zeros(a, columns)
    return padded, padded if b is a else _with_zeros(b, columns)


def _with_zeros(t: Tensor, columns: int) -> Tensor:
    return torch.cat((t, t.new_zeros(*t.shape[:-1], columns)), -1)


def product(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """``alpha * a @ b.mT + beta * c`` by PyTorch's libraries, for ``a (*, n, k)``, ``b (*, m, k)``.

    As in BLAS, a factor of 0 leaves its term out, whatever the operands hold.
    """
    if c is not None and beta == 0:
        c = None
    a, b = pad_to_even(a, b)
    if c is None and alpha == 1:
        # `matmul` takes a microsecond longer.
        return (
            torch.mm(a, b.mT, out=out)
            if a.dim() == b.dim() == 2
            else torch.matmul(a, b.mT, out=out)
        )
    if alpha == 0 or not abs(alpha) < math.inf:
        # At some sizes PyTorch's libraries return NaN for alpha 0, and finite numbers for an
        # infinite alpha.
        result = alpha * (a @ b.mT) if alpha else a.new_zeros(*a.shape[:-1], b.shape[-2])
        result = result if c is None else result + beta * c
        return result.contiguous() if out is None else out.copy_(result)
    beta = 0.0 if c is None else beta
    if a.dim() == 2:
        c = a.new_zeros(()) if c is None else c  # vmap reads it: 0·NaN is NaN
        return torch.addmm(c, a, b.mT, alpha=alpha, beta=beta, out=out)
    a3, b3 = (t.reshape(math.prod(t.shape[:-2]), *t.shape[-2:]) for t in (a, b))
    c3 = a.new_zeros(()) if c is None else c.reshape(a3.shape[0], *c.shape[-2:])
    return torch.baddbmm(c3, a3, b3.mT, alpha=alpha, beta=beta).view(*a.shape[:-1], b.shape[-2])


def mean_with_transpose(g: Tensor) -> Tensor:
    """``(g + g.mT) / 2`` for ``g (*, n, n)``; unlike ``g + g.mT``, it cannot overflow."""
    half = g * 0.5
    return half + half.mT
