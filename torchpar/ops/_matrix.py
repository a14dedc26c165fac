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
