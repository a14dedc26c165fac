# SPDX-License-Identifier: MIT
"""The products of Newton–Schulz iterations in exact arithmetic: float32, the same bits everywhere.

`buffered_products` has the same methods for ordinary arithmetic. Here each product and each sum
rounds once for each element, so the bits depend neither on the processor nor on the layouts, nor on
the other matrices of a batch.
"""

from torch import Tensor

from torchpar.ops import exact_matmul, exact_matmul_t


class ExactProducts:
    """`Products` in exact arithmetic. Each result is a new tensor, so that nothing is ``kept``."""

    launches_kernels = False

    def gram(self, x: Tensor) -> Tensor:
        return exact_matmul_t(x)

    def symmetric(
        self,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        *,
        alpha: float = 1.0,
        beta: float,
        kept: tuple[Tensor, ...] = (),  # noqa: ARG002
    ) -> Tensor:
        """``alpha·a·b + beta·c``, where each product and the sum round."""
        # A Gram matrix equals its transpose bit for bit, and so does its square.
        product = exact_matmul_t(a) if a is b else exact_matmul(a, b.mT)
        return (product if alpha == 1 else alpha * product) + beta * c

    def add(self, p: Tensor, z: Tensor, alpha: float, kept: tuple[Tensor, ...]) -> Tensor:  # noqa: ARG002
        return p + alpha * z

    def add_diagonal(self, z: Tensor, a: float, kept: tuple[Tensor, ...]) -> Tensor:  # noqa: ARG002
        out = z.clone()
        out.diagonal(dim1=-2, dim2=-1).add_(a)
        return out

    def apply(self, p: Tensor, x: Tensor, shift: float | None) -> Tensor:
        product = exact_matmul(p, x.mT)
        return product if shift is None else product + shift * x
