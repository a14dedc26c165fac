# SPDX-License-Identifier: MIT
"""Stand-ins for what runs on a GPU without Triton: cuBLAS, and kernels in CUDA C++.

Scripts make them when they are imported, and many never use them. cuBLAS multiplies on the CPU;
kernels in CUDA C++ are refused when they are called.
"""

from typing import NoReturn

import torch
from torch import Tensor


class CublasLt:
    """A stand-in for ``triton._C.libtriton.nvidia.cublas.CublasLt``.

    Args:
        workspace: that cuBLAS would take.
    """

    def __init__(self, workspace: Tensor):
        self.workspace = workspace

    def matmul(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """Write A·Bᵀ to ``out (M, N)``, where ``a`` is ``(M, K)`` and ``b`` is ``(N, K)``."""
        self._check(a, b, out)
        out.copy_(_wide(a) @ _wide(b).T)

    def gemm(self, a: Tensor, b: Tensor, c: Tensor, out: Tensor, alpha: float, beta: float) -> None:
        """Write alpha·A·Bᵀ + beta·C to ``out``."""
        self._check(a, b, out)
        out.copy_(alpha * (_wide(a) @ _wide(b).T) + beta * _wide(c))

    def _check(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        expected = (*a.shape[:1], *b.shape[:1])
        if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1] or out.shape != expected:
            shapes = f"{list(a.shape)}, {list(b.shape)} and {list(out.shape)}"
            raise RuntimeError(
                f"cuBLAS is given matrices of shapes {shapes}, expected (M, K), (N, K) and (M, N)"
            )

    def __getattr__(self, name: str) -> NoReturn:
        raise NotImplementedError(
            f"CublasLt.{name} is not emulated, only matmul and gemm are; use torch.matmul"
        )


def _wide(t: Tensor) -> Tensor:
    """Return the numbers in float32, in which cuBLAS sums, or in float64."""
    return t if t.dtype == torch.float64 else t.float()


class CudaKernel:
    """A stand-in for a kernel in CUDA C++, which `torch.cuda._compile_kernel` would compile."""

    def __init__(self, kernel_source: str, kernel_name: str, *args: object, **kwargs: object):
        self.name = kernel_name

    def set_shared_memory_config(self, shared_mem_bytes: int) -> None:
        """A GPU would set it for later calls."""

    def __call__(self, *args: object, **kwargs: object) -> None:
        raise NotImplementedError(
            f"{self.name} is a kernel in CUDA C++, which is not emulated; only Triton kernels are"
        )
