# SPDX-License-Identifier: MIT
"""The parts of a step of Muon that are no products, each by one launch on a GPU.

On a CPU, and where a compiler, a mode or a subclass intercepts calls, PyTorch's functions compute.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from torchpar.library.private import num_dispatch_modes
from torchpar.library.transforms import is_plain
from torchpar.ops.matrix import runs_kernels


def is_direct(*tensors: Tensor) -> bool:
    """Whether no compiler, mode or subclass intercepts calls with these tensors."""
    return is_plain(*tensors) and not num_dispatch_modes()


def launches_kernels(*tensors: Tensor) -> bool:
    """Whether kernels are launched straight for such tensors, without the dispatcher."""
    first = tensors[0]
    return runs_kernels(first) and first.numel() > 0 and is_direct(*tensors)


def on_device_of(t: Tensor) -> AbstractContextManager[object]:
    """Launches go to the current GPU: make it that of ``t``."""
    return torch.cuda.device_of(t) if t.is_cuda else nullcontext()


def normalized(x: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """``x / max(‖x‖, eps)`` for ``x (n, m)``, or for each matrix of a batch, in ``dtype``.

    PyTorch's functions take x rounded to bfloat16, and round the norm to ``dtype``. The kernel
    rounds the result alone.
    """
    if launches_kernels(x) and (x.is_contiguous() or x.mT.is_contiguous()):
        from torchpar.kernels import muon as kernel

        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        norm = torch.linalg.vector_norm(x, dim=(-2, -1), dtype=wide)
        out = torch.empty_like(x, dtype=dtype)
        with on_device_of(x):
            kernel.normalize(x, norm, out, eps)
        return out
    x = x.to(torch.bfloat16).to(dtype)
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    return x.div(norm.clamp(min=eps))


def update_alone(p: Tensor, update: Tensor, lr: float | Tensor, decay: float, ratio: float) -> bool:
    """``p ← (1 − lr·decay)·p − lr·ratio·update`` by a kernel, if one takes these tensors.

    The bits are those of PyTorch's functions: ranks that hold the same parameter may receive
    updates of other layouts, and their parameters must stay equal.

    Returns:
        Whether a kernel did it.
    """
    rates = [lr] if isinstance(lr, Tensor) else []
    if not launches_kernels(p, update, *rates) or p.stride() != update.stride():
        return False
    if not (p.is_contiguous() or (p.dim() == 2 and p.mT.is_contiguous())):
        return False
    if rates and p.dtype.itemsize == 2:  # PyTorch rounds the tensor lr·decay to 16 bits, too
        return False
    from torchpar.kernels import muon as kernel

    with on_device_of(p):
        kernel.update(p, update, lr, decay, ratio)
    torch.autograd.graph.increment_version(p)  # a launch does not
    return True
