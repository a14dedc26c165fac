# SPDX-License-Identifier: MIT
"""What the operators on matrices share."""

import math

import torch
from torch import Tensor

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_dtype(operator: str, name: str, x: Tensor) -> None:
    """Raise a RuntimeError unless ``x``, called ``name``, has a floating dtype that the kernels take."""
    if x.dtype not in _DTYPES:
        raise RuntimeError(
            f"torchpar::{operator}: {name} has dtype {x.dtype}, expected float16, bfloat16, float32 or "
            "float64"
        )


def check_like(operator: str, name: str, t: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """Raise a RuntimeError unless ``t`` has ``shape``, and ``like``'s dtype and device."""
    found = (tuple(t.shape), t.dtype, t.device)
    expected = (tuple(shape), like.dtype, like.device)
    if found != expected:
        raise RuntimeError(f"torchpar::{operator}: {name} is {found}, expected {expected}")


def fp32_precision() -> str:
    """How float32 products on CUDA round their operands: "ieee" or "tf32"."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def rows(t: Tensor) -> Tensor:
    """``(*, features)`` as a matrix; a view where the strides allow."""
    return t if t.dim() == 2 else t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def product(
    a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float, out: Tensor | None = None
) -> Tensor:
    """``alpha * a @ b.mT + beta * c`` by PyTorch's libraries, for ``a, b (*, n, k)`` and ``c (*, n, n)``."""
    if c is None and alpha == 1:
        return torch.matmul(a, b.mT, out=out)
    if a.dim() == 2:
        c, beta = (a.new_zeros(()), 0.0) if c is None else (c, beta)
        return torch.addmm(c, a, b.mT, alpha=alpha, beta=beta, out=out)
    a3, b3 = (t.reshape(math.prod(t.shape[:-2]), *t.shape[-2:]) for t in (a, b))
    if c is None:
        c3, beta = a.new_zeros(()), 0.0
    else:
        c3 = c.reshape(len(a3), *c.shape[-2:])
    return torch.baddbmm(c3, a3, b3.mT, alpha=alpha, beta=beta).view(*a.shape[:-1], a.shape[-2])


def mirrored(c: Tensor) -> Tensor:
    """The lower triangles of ``c (*, n, n)``, and above them their mirrors."""
    lower = torch.ones(c.shape[-2:], dtype=torch.bool, device=c.device).tril()
    return torch.where(lower, c, c.mT)
