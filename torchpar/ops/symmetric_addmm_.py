# SPDX-License-Identifier: MIT
"""A product, known to be symmetric, that is added to a matrix in place: ``symmetric_matmul(…, out=H)``.

    H ← β·H + α·A·Bᵀ

A and B may be float16 or bfloat16 where H is float32, as in sums of many products X·Xᵀ. It has no gradient.
"""

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from torchpar.library import Wrap
from torchpar.ops import symmetric_cpu
from torchpar.ops._operator import operator
from torchpar.ops.matrix import check_dtype, check_like, fp32_precision, product

_NO_GRADIENT = (
    "symmetric_matmul(): functions with out=... arguments don't support automatic differentiation, but one "
    "of the arguments requires grad."
)


def symmetric_addmm_(h: Tensor, a: Tensor, b: Tensor, *, alpha: float, beta: float) -> None:
    """``h ← beta * h + alpha * a @ b.mT``, of which half is computed; of ``h`` the lower triangle is read.

    The arguments of `torchpar.symmetric_matmul`, with ``h`` as ``out`` and ``c``.
    """
    _op(h, a, b, alpha=alpha, beta=beta)


def check_out(out: Tensor, a: Tensor, b: Tensor, c: Tensor | None) -> None:
    """Raise a RuntimeError before ``out`` is written, if it cannot be."""
    _check(out, a, b)
    if c is not None:
        check_like("symmetric_matmul", "c", c, out.shape, out)
    _check_no_gradient(*(t for t in (out, a, b, c) if t is not None))


def _check_no_gradient(*tensors: Tensor) -> None:
    transformed = peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    if transformed and not torch.compiler.is_compiling():
        raise RuntimeError("symmetric_matmul(): neither torch.func nor forward mode supports out=...")
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise RuntimeError(_NO_GRADIENT)


def _check(h: Tensor, a: Tensor, b: Tensor) -> None:
    check_dtype("symmetric_matmul", "a", a)
    if a.dim() < 2:
        raise RuntimeError(f"torchpar::symmetric_matmul: a has shape {tuple(a.shape)}, expected (*, n, k)")
    check_like("symmetric_matmul", "b", b, a.shape, a)
    dtypes = [a.dtype, torch.float32] if a.dtype.itemsize == 2 else [a.dtype]
    shape = (*a.shape[:-1], a.shape[-2])
    if tuple(h.shape) != shape or h.dtype not in dtypes or h.device != a.device:
        actual = f"out is {tuple(h.shape)}, {h.dtype} on {h.device}"
        expected = f"{shape}, {' or '.join(map(str, dtypes))} on {a.device}"
        raise RuntimeError(f"torchpar::symmetric_matmul: {actual}, expected {expected}")


# Compilers keep the operator whole: it writes to an operand.
@operator(
    "symmetric_addmm_(Tensor(a!) h, Tensor a, Tensor b, *, float alpha, float beta) -> ()",
    kernels="matmul_t",
    opaque=lambda *args, **kwargs: True,
)
def _op(h: Tensor, a: Tensor, b: Tensor, *, alpha: float, beta: float, wrap: Wrap) -> None:
    _check(h, a, b)
    if any(t.untyped_storage().data_ptr() == h.untyped_storage().data_ptr() for t in (a, b)) and h.numel():
        raise RuntimeError("torchpar::symmetric_matmul: out shares its storage with a or b, expected its own")
    if torch._debug_has_internal_overlap(h) == 1:
        raise RuntimeError("torchpar::symmetric_matmul: elements of out share memory, expected each its own")
    if alpha == 0 or a.shape[-1] == 0 or h.numel() == 0:
        if beta == 0:
            h.zero_()
        else:
            symmetric_cpu.mirror_(h.mul_(beta))
    elif not h.is_cuda:
        symmetric_cpu.symmetric_product(a, b, h, alpha, beta, h)
    elif not h.is_contiguous():
        h.copy_(_by_kernel(h.contiguous(), a, b, alpha, beta))
    else:
        _by_kernel(h, a, b, alpha, beta)


def _by_kernel(h: Tensor, a: Tensor, b: Tensor, alpha: float, beta: float) -> Tensor:
    from torchpar.kernels import matmul_t as kernels

    # A kernel by TMA stores tiles of the operands' dtype, and may load tiles of H that others have stored.
    out = kernels.symmetric_product(a, b, fp32_precision(), None, h, alpha, beta, out=h, tma=False)
    if out is None:  # PyTorch's library is faster by the device's table
        h.copy_(product(a.to(h.dtype), b.to(h.dtype), h, alpha, beta))
        out = kernels.mirror(h, None)
    return out


@_op.register_fake
def _(h: Tensor, a: Tensor, b: Tensor, **_: Any) -> None:
    _check(h, a, b)


_op.register_autocast(cast=False)
