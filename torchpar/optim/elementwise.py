# SPDX-License-Identifier: MIT
"""The elementwise parts of Muon's step, each by one launch on a GPU.

On a CPU, and where a compiler, a mode or a subclass intercepts calls, PyTorch's functions compute.
"""

import struct
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from torchpar.ops.matrix import is_direct, runs_kernels


def launches_kernels(*tensors: Tensor) -> bool:
    """Whether kernels are launched straight for such tensors, without the dispatcher."""
    first = tensors[0]
    if not runs_kernels(first) or first.numel() == 0 or not is_direct(*tensors):
        return False
    # A kernel would read the memory of such tensors as it is.
    return not any(t.is_neg() or t._is_zerotensor() for t in tensors)


def on_device_of(t: Tensor) -> AbstractContextManager[object]:
    """Launches go to the current GPU: make it that of ``t``."""
    return torch.cuda.device_of(t) if t.is_cuda else nullcontext()


def normalized(x: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """``x / max(‖x‖, eps)`` for ``x (n, m)``, or for each matrix of a batch, on a GPU.

    Only the result is rounded to ``dtype``, with the same bits whether the kernel or PyTorch's
    functions compute it: a mode may be active on one rank alone, and replicas must stay equal.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), dtype=wide)
    if not launches_kernels(x) or not (x.is_contiguous() or x.mT.is_contiguous()):
        return x.to(wide).div(norm.clamp(min=eps)[..., None, None]).to(dtype)
    from torchpar.kernels import muon as kernel

    out = torch.empty_like(x, dtype=dtype)
    with on_device_of(x):
        kernel.normalize(x, norm, out, eps)
    return out


def update_alone(
    p: Tensor, direction: Tensor, lr: float | Tensor, decay: float, ratio: float
) -> bool:
    """``p ← (1 − lr·decay)·p − lr·ratio·direction`` by a kernel, if one takes these tensors.

    Returns:
        Whether a kernel did it.
    """
    rate = lr if isinstance(lr, Tensor) else None
    return update_by_words(p, direction, rate, words_of_update(lr, decay, ratio))


def words_of_update(lr: float | Tensor, decay: float, ratio: float) -> tuple[int, ...]:
    """The numbers of `update_by_words`: lr·decay and lr·ratio, each as two integers of 32 bits; for
    a tensor ``lr`` decay and ratio."""
    factors = (decay, ratio) if isinstance(lr, Tensor) else (lr * decay, lr * ratio)
    return struct.unpack("<4i", struct.pack("<2d", *factors))


def update_by_words(p: Tensor, direction: Tensor, lr: Tensor | None, words: Sequence[int]) -> bool:
    """`update_alone` for the numbers of `words_of_update`.

    The bits are those of PyTorch's functions: ranks that hold the same parameter may receive
    directions of other layouts, and their parameters must stay equal.

    Returns:
        Whether a kernel did it.
    """
    rates = [] if lr is None else [lr]
    if not launches_kernels(p, direction, *rates) or p.stride() != direction.stride():
        return False
    if not (p.is_contiguous() or (p.dim() == 2 and p.mT.is_contiguous())):
        return False
    if p.is_inference() and not torch.is_inference_mode_enabled():
        return False  # PyTorch's functions raise an error
    from torchpar.kernels import muon as kernel

    with on_device_of(p):
        kernel.update(p, direction, lr, words)
    torch.autograd.graph.increment_version(p)  # a launch does not
    return True
