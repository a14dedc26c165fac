# SPDX-License-Identifier: MIT
"""The products of Newton–Schulz iterations, written into buffers that are made once.

On a GPU the measured rule of the kernels decides who computes a symmetric product: a Triton kernel,
which computes half of it, or PyTorch's library, which computes all of it. The library's product may
differ from its transpose in the last bits, which does no harm here. The kernels are launched
straight from here: a call through the dispatcher takes the host as long as the launch. On a CPU
large symmetric products are computed by halves, and all other products by PyTorch.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from torchpar.ops import cpu, matmul_t, symmetric_matmul
from torchpar.ops.matrix import is_direct, runs_kernels

Launch = Callable[[Tensor, Tensor, Tensor | None, Tensor, float, float], None]


class Products:
    """Products of matrices like ``x (*, n, m)``, with at most one batch dimension, and of symmetric
    ones ``(*, n, n)``.

    A product may overwrite any earlier result that is neither its operand nor in ``kept``. Where a
    compiler, a mode or a subclass intercepts calls, the operators compute, and each result is a new
    tensor.

    Args:
        squares: how many buffers ``(*, n, n)`` the products take.

    Attributes:
        launches_kernels: whether the kernels are launched straight from here.
    """

    def __init__(self, x: Tensor, squares: int):
        self._is_direct = is_direct(x)
        self.launches_kernels = self._is_direct and runs_kernels(x) and x.numel() > 0
        self._launches: dict[tuple[bool, bool], Launch | None] = {}
        self._squares: list[Tensor] = []
        self._other: Tensor | None = None
        if self._is_direct:
            shape = *x.shape[:-1], x.shape[-2]
            self._squares = [x.new_empty(shape) for _ in range(squares)]
            self._other = torch.empty_like(x)

    def gram(self, x: Tensor) -> Tensor:
        """``x @ x.mT``."""
        if not self._is_direct:
            return matmul_t(x) if _is_for_operators(x) else x @ x.mT
        out = self._free()
        if self.launches_kernels:
            launch = self._launch(x, x, None, out)
            if launch is not None:
                launch(x, x, None, out, 1.0, 0.0)
                return out
        elif cpu.is_halved(x):
            return cpu.symmetric_matmul(x, x, out=out)
        return torch.matmul(x, x.mT, out=out)

    def symmetric(
        self,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        *,
        alpha: float = 1.0,
        beta: float,
        kept: tuple[Tensor, ...] = (),
    ) -> Tensor:
        """``alpha·a·b + beta·c`` for polynomials in one symmetric matrix."""
        if not self._is_direct:
            if _is_for_operators(a):
                return symmetric_matmul(a, b, c, alpha=alpha, beta=beta)
            return _addmm_into(c, a, b, alpha=alpha, beta=beta)
        out = self._free(a, b, c, *kept)
        if self.launches_kernels:
            launch = self._launch(a, b, c, out)
            if launch is not None:
                launch(a, b, c, out, alpha, beta)
                return out
        elif cpu.is_halved(a):
            return cpu.symmetric_matmul(a, b, c, alpha, beta, out)
        return _addmm_into(c, a, b, alpha=alpha, beta=beta, out=out)

    def add(self, p: Tensor, z: Tensor, alpha: float, kept: tuple[Tensor, ...]) -> Tensor:
        """``p + alpha·z``."""
        out = self._free(p, z, *kept) if self._is_direct else None
        return torch.add(p, z, alpha=alpha, out=out)

    def add_diagonal(self, z: Tensor, a: float, kept: tuple[Tensor, ...]) -> Tensor:
        """``z + a·I``."""
        out = self._free(z, *kept).copy_(z) if self._is_direct else z.clone()
        out.diagonal(dim1=-2, dim2=-1).add_(a)
        return out

    def apply(self, p: Tensor, x: Tensor, shift: float | None) -> Tensor:
        """``p·x + shift·x``; ``x`` is overwritten by the next result."""
        out, self._other = self._other, x if self._is_direct else None
        if not x.is_contiguous():  # the result keeps the layout of a tall gradient
            tall, out = x.mT, None if out is None else out.mT
            if shift is None:
                return torch.matmul(tall, p, out=out).mT
            return _addmm_into(tall, tall, p, beta=shift, out=out).mT
        if shift is None:
            return torch.matmul(p, x, out=out)
        return _addmm_into(x, p, x, beta=shift, out=out)

    def _free(self, *used: Tensor) -> Tensor:
        """A buffer that holds none of ``used``."""
        ids = [*map(id, used)]
        return next(one for one in self._squares if id(one) not in ids)

    def _launch(self, a: Tensor, b: Tensor, c: Tensor | None, out: Tensor) -> Launch | None:
        """The launch of the kernel for such operands, whose layouts do not change; None where the
        library is faster."""
        key = a is b, c is None
        if key not in self._launches:
            from torchpar.kernels import matmul_t as kernel

            self._launches[key] = kernel.symmetric_matmul_launch(a, b, c, out)
        return self._launches[key]


def _is_for_operators(x: Tensor) -> bool:
    # On a GPU the operators choose by size. On a CPU, a product of which all is computed need not
    # be made symmetric here.
    return runs_kernels(x) or cpu.is_halved(x)


def _addmm_into(
    c: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, beta: float, out: Tensor | None = None
) -> Tensor:
    of_library = torch.addmm if a.dim() == 2 else torch.baddbmm
    return of_library(c, a, b, alpha=alpha, beta=beta, out=out)
