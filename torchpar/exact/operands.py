# SPDX-License-Identifier: MIT
"""Operands of exact sums over several ranks or backward passes (`torchpar.ops._exact` has the formula)."""

import torch
from torch import Tensor

from torchpar.errors import ConfigError
from torchpar.ops._exact import LONG_CHAIN, SCALE, Sums, digits, finite_power, scaled


class Operand:
    """The rows of a float32 matrix ``x (m, k)``, with exponents ``e (m, 1)``, as integers.

    On a CPU they are cut when the operand is made.
    """

    def __init__(self, x: Tensor, e: Tensor, cut: Tensor | None = None):
        self.x, self.e = x, e
        self.digits = digits(x, e) if cut is None and not x.is_cuda else cut

    @classmethod
    def cat(cls, operands: "list[Operand]") -> "Operand":
        """The rows of all ``operands``."""
        if len(operands) == 1:
            return operands[0]
        x, e = (torch.cat([getattr(one, name) for one in operands]) for name in ("x", "e"))
        cut = [one.digits for one in operands if one.digits is not None]
        return cls(x, e, torch.cat(cut) if cut else None)

    def columns(self) -> "Operand":
        """The columns ``(k, m)`` of 2^(−e)·x, of exponents 0, by the same digits."""
        e = self.e.new_zeros(self.x.shape[1], 1)
        if self.digits is None:
            return Operand(scaled(self.x, -self.e).T, e)
        return Operand(self.x.T, e, self.digits.permute(2, 1, 0))

    def sums(self, other: "Operand") -> Tensor:
        """T of the product with the transpose of ``other``, as int64 ``(m, n)``.

        Raises:
            ConfigError: more than `LONG_CHAIN` terms, which int64 may not hold.
        """
        if self.x.shape[1] > LONG_CHAIN:
            terms = f"a sum has {self.x.shape[1]} terms, expected at most {LONG_CHAIN}"
            raise ConfigError(f"{terms}; take smaller batches or layers")
        if self.digits is None or other.digits is None:
            return self._by_kernel(other, torch.int64)
        return Sums(self.digits, other.digits).long()

    def product(self, other: "Operand") -> Tensor:
        """The product with the transpose of ``other``, float32 ``(m, n)``."""
        if self.digits is None or other.digits is None:
            return self._by_kernel(other, torch.float32)
        return Sums(self.digits, other.digits).rounded(self.e, other.e)

    def _by_kernel(self, other: "Operand", dtype: torch.dtype) -> Tensor:
        from torchpar.kernels.exact_matmul import exact_product

        out = self.x.new_empty(len(self.x), len(other.x), dtype=dtype)
        return exact_product(self.x, other.x, self.e, other.e, None, out=out)


def row_sums(x: Tensor, e: Tensor) -> Tensor:
    """The sums of the rows of ``x (m, k)``, k ≤ 2³², as integers ``(m, 1)`` int64 in units of 2^(e − 31)."""
    return scaled(x, SCALE - e).round_().to(torch.int32).sum(-1, keepdim=True)


def rounded_sums(total: Tensor, e: Tensor) -> Tensor:
    """float32 of `row_sums`."""
    return (total.double() * finite_power(e, -SCALE)).float()
