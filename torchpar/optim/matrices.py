# SPDX-License-Identifier: MIT
"""Parameters seen as matrices, and matrices orthogonalised in batches."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from torchpar.errors import ConfigError
from torchpar.optim.newton_schulz import Coefficients, NewtonSchulz, orthogonalize
from torchpar.parts import Part, local

View = Callable[[Tensor], Tensor | Sequence[Tensor]]
"""A function from a parameter to its matrices.

The matrices are views ``(*, n, m)`` that together hold each element once.
"""

_PADDED_UP_TO, _PADDING = 256, 32  # columns or rows
# In X·Xᵀ of a batch: a GPU takes about as long for so many multiplications as for a launch.
_BATCH_MULTIPLICATIONS = 2**31


@dataclass(frozen=True, eq=False)
class ParamInfo:
    """A parameter, and the part of it that this rank holds.

    Attributes:
        group_index: the index of its parameter group.
    """

    name: str
    group_index: int
    p: Tensor
    part: Part
    view: View | None

    def matrices(self, t: Tensor) -> list[Tensor]:
        """The matrices of ``t``, which has the unsharded parameter's shape; views of ``t``."""
        views = t if self.view is None else self.view(t)
        views = [views] if isinstance(views, Tensor) else list(views)
        return [
            matrix for one in views for matrix in ([one] if one.dim() <= 2 else one.flatten(0, -3))
        ]

    @cached_property
    def shapes(self) -> list[tuple[int, ...]]:
        return [tuple(t.shape) for t in self.matrices(torch.empty(self.part.whole, device="meta"))]

    @property
    def description(self) -> str:
        """The text that must be the same on all ranks that hold the parameter."""
        shape, dtype = self.part.whole, self.p.dtype
        return f"{self.name} {shape} ({dtype}, matrices {self.shapes}, group {self.group_index})"

    @property
    def cost(self) -> int:
        return sum(map(multiplications, self.shapes))

    def check(self) -> None:
        """Raise a ConfigError unless the parameter is a matrix, or has a view."""
        shape = self.part.whole
        if not self.p.is_floating_point():
            raise ConfigError(f"Muon: {self.name} is {self.p.dtype}, expected a floating dtype")
        if tuple(local(self.p).shape) != tuple(self.part.size):
            raise ConfigError(
                f"Muon: this rank's part of {self.name} has shape {tuple(local(self.p).shape)}, "
                f"expected {tuple(self.part.size)}, as when its layer was split; split the layer "
                "again"
            )
        if self.view is None:
            if len(shape) != 2:
                raise ConfigError(
                    f"Muon: {self.name} has shape {shape}, expected 2D, a matrix; name a view of "
                    "it in views, or give it to another optimizer, as Muon.for_model does"
                )
            return
        counted = torch.zeros(shape, dtype=torch.int8)
        try:
            matrices = self.matrices(counted)
        except Exception as e:
            raise ConfigError(f"Muon: the view of {self.name}, of shape {shape}, fails: {e}") from e
        for matrix in matrices:
            matrix.add_(1)
        if not counted.eq(1).all() or any(matrix.dim() != 2 for matrix in matrices):
            raise ConfigError(
                f"Muon: the view of {self.name} returns {[tuple(m.shape) for m in matrices]}, "
                f"expected views (*, n, m) that together hold each element of {shape} once"
            )


def orthogonalize_in_place(
    matrices: Sequence[Tensor], coefficients: Coefficients, steps: int, eps: float, ns: NewtonSchulz
) -> None:
    """`orthogonalize` each matrix, in batches of nearly equal shapes, which keep a device busy."""
    by_kind: dict[tuple[tuple[int, ...], torch.device], list[Tensor]] = {}
    for matrix in matrices:
        by_kind.setdefault((_padded(matrix.shape), matrix.device), []).append(matrix)
    for (shape, _), same in by_kind.items():
        size = max(_BATCH_MULTIPLICATIONS // max(multiplications(shape), 1), 1)
        for first in range(0, len(same), size):
            batch = same[first : first + size]
            updates = orthogonalize(_stacked(batch, shape), coefficients, steps, eps, ns)
            updates = updates.view(len(batch), *shape)
            cut = [
                t[tuple(map(slice, matrix.shape))] for t, matrix in zip(updates, batch, strict=True)
            ]
            torch._foreach_copy_(batch, cut)


def _padded(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape to which a matrix of ``shape`` is padded before it joins a batch.

    Small matrices are padded, so that there are fewer and larger batches.
    """
    if max(shape) > _PADDED_UP_TO:
        return tuple(shape)
    return tuple(-(-size // _PADDING) * _PADDING for size in shape)


def _stacked(matrices: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """A batch of matrices, padded by zeros to ``shape``.

    The zeros do not change the orthogonalised matrices, and stay zeros.
    """
    if all(matrix.shape == shape for matrix in matrices):
        # On a CPU a product of a batch of one takes up to twice the time of a product of matrices.
        return torch.stack(matrices) if len(matrices) > 1 else matrices[0]
    x = matrices[0].new_zeros(len(matrices), *shape)
    for padded, matrix in zip(x, matrices, strict=True):
        padded[tuple(map(slice, matrix.shape))] = matrix
    return x if len(matrices) > 1 else x[0]


def multiplications(shape: Sequence[int]) -> int:
    """Multiplications in X·Xᵀ of each matrix, with the shorter side as rows."""
    return math.prod(shape) * min(shape)
