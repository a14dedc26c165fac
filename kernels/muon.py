# SPDX-License-Identifier: MIT
"""The parts of a step of Muon that are no products: one launch divides matrices by their norms, and
another launch updates a parameter.

PyTorch's functions take three launches for the first part, and four for the second.
"""

import struct
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .gemm import float_of_words
from .launch import Plan, PreparedLaunch, Step, prepared

BLOCK = 1024  # elements: 8 for each of 128 threads, which is one access of 16 bytes to bfloat16


@triton.jit(do_not_specialize=["eps_low", "eps_high"])
def normalize_kernel(x_ptr, norm_ptr, out_ptr, eps_low, eps_high, size, BLOCK: tl.constexpr):
    """``x / max(norm, eps)`` for matrices of ``size`` elements, each with a norm of its own."""
    blocks = (size - 1) // BLOCK + 1  # tl.cdiv overflows just below 2³¹
    matrix = (tl.program_id(0) // blocks).to(tl.int64)
    place = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    norm = tl.load(norm_ptr + matrix)
    eps = float_of_words(eps_low, eps_high).to(norm.dtype)
    # PyTorch's clamp of a NaN to eps is the NaN.
    norm = tl.where(norm < eps, eps, norm)
    x = tl.load(x_ptr + matrix * size + place, mask=place < size).to(norm.dtype)
    # For float32, `/` is an approximation.
    out = x / norm if norm.dtype == tl.float64 else tl.div_rn(x, norm)
    # PyTorch rounds float64 to 16 bits by float32.
    out = out.to(tl.float32).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + matrix * size + place, out, mask=place < size)


@triton.jit(do_not_specialize=["decay_low", "decay_high", "rate_low", "rate_high"])
def update_kernel(
    p_ptr,
    direction_ptr,
    lr_ptr,
    decay_low,
    decay_high,
    rate_low,
    rate_high,
    size,
    LOAD_LR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``p ← (1 − lr·decay)·p − lr·ratio·direction``, with the roundings of PyTorch's functions.

    The two numbers, each of two words, are lr·decay and lr·ratio; with LOAD_LR, decay and ratio.
    """
    p_dtype: tl.constexpr = p_ptr.dtype.element_ty
    dtype: tl.constexpr = tl.float64 if p_dtype == tl.float64 else tl.float32
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    decay = float_of_words(decay_low, decay_high)
    rate = float_of_words(rate_low, rate_high)
    p = tl.load(p_ptr + place, mask=place < size)
    step = tl.load(direction_ptr + place, mask=place < size).to(tl.float32) * rate.to(tl.float32)
    if LOAD_LR:
        lr = tl.load(lr_ptr)
        decay = lr * decay.to(lr.dtype)
        step *= lr.to(tl.float32)
    if p_dtype.primitive_bitwidth == 16:
        decay = decay.to(dtype)
        if LOAD_LR:  # PyTorch rounds the tensor lr·decay to the parameter's dtype
            decay = decay.to(p_dtype).to(dtype)
        p -= (p.to(dtype) * decay).to(p_dtype)
    else:
        p *= (1.0 - decay).to(dtype)
    tl.store(p_ptr + place, (p.to(dtype) - step).to(p_dtype), mask=place < size)


def normalize(x: Tensor, norm: Tensor, out: Tensor, eps: float) -> None:
    """Write ``x / max(norm, eps)`` to ``out``.

    ``x (*, n, m)`` is not empty, fills its memory matrix by matrix, and has ``out``'s strides.
    ``norm`` has a contiguous number for each matrix, in at least the precision of float32.
    """
    launch = prepared(_prepare_normalize, None, (x, norm, out))
    assert launch is not None
    launch.run(None, (x, norm, out), struct.unpack("<2i", struct.pack("<d", eps)))


def update(p: Tensor, direction: Tensor, lr: Tensor | None, words: Sequence[int]) -> None:
    """``p ← (1 − lr·decay)·p − lr·ratio·direction``, for a ``direction`` of at most float32.

    ``words`` are lr·decay and lr·ratio, each of two words, and with a tensor ``lr`` decay and
    ratio. ``p`` is not empty, fills its memory, and has ``direction``'s strides. A tensor ``lr``
    has at least the precision of float32, and is on the device of ``p``.
    """
    launch = prepared(_prepare_update, None, (p, direction, lr))
    assert launch is not None
    launch.run(None, (p, direction, lr), tuple(words))


def _prepare_normalize(x: Tensor, norm: Tensor, out: Tensor) -> PreparedLaunch:
    size = x.shape[-2] * x.shape[-1]
    programs = norm.numel() * triton.cdiv(size, BLOCK)
    plan = Plan(normalize_kernel, programs, (size,), {"BLOCK": BLOCK}, {})
    return PreparedLaunch((x, norm, out), [Step(plan, (0, 1, 2))], [], (2,))


def _prepare_update(p: Tensor, direction: Tensor, lr: Tensor | None) -> PreparedLaunch:
    constants = {"LOAD_LR": lr is not None, "BLOCK": BLOCK}
    # Each product is rounded before it is added, as between PyTorch's functions.
    options = {"enable_fp_fusion": False}
    plan = Plan(update_kernel, triton.cdiv(p.numel(), BLOCK), (p.numel(),), constants, options)
    # The kernel takes a tensor for the rate, also where it does not read it.
    step = Step(plan, (0, 1, 0 if lr is None else 2))
    return PreparedLaunch((p, direction, lr), [step], [], (0,))
