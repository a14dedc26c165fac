# SPDX-License-Identifier: MIT
"""Parameters seen as matrices, and matrices orthogonalised in batches."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from torchpar.errors import ConfigError
from torchpar.ops._operator import runs_kernels
from torchpar.optim.newton_schulz import Coefficients, NewtonSchulz, orthogonalize
from torchpar.parts import Part, local

View = Callable[[Tensor], Tensor | Sequence[Tensor]]
"""A function from a parameter to its matrices.

The matrices are views ``(*, n, m)`` that together hold each element once.
"""

_PADDED_UP_TO, _PADDING = 256, 32  # columns or rows
# On a CPU, multiplications in X·Xᵀ of a batch: larger products keep all cores busy by themselves.
_BATCH_MULTIPLICATIONS = 2**31
# On a GPU, of a batch in bfloat16. Its iterations take up to five times as much beside it.
_BATCH_BYTES = 2**28


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


def orthogonalize_all(
    matrices: Sequence[Tensor], coefficients: Coefficients, steps: int, eps: float, ns: NewtonSchulz
) -> list[Tensor]:
    """`orthogonalize` each matrix, in batches of nearly equal shapes, which keep a device busy.

    The results are of bfloat16, and may be parts of one tensor.
    """
    by_kind: dict[tuple[tuple[int, ...], torch.device], list[int]] = {}
    for i, matrix in enumerate(matrices):
        by_kind.setdefault((_shape_in_batch(matrix), matrix.device), []).append(i)
    results: dict[int, Tensor] = {}
    for (shape, _), same in by_kind.items():
        same.sort(key=lambda i: _is_transposed(matrices[i], shape))
        size = _batch_size(shape, runs_kernels(matrices[same[0]]))
        for first in range(0, len(same), size):
            indices = same[first : first + size]
            batch = [matrices[i] for i in indices]
            if _is_transposed(batch[0], shape):  # so all are
                shape = shape[::-1]
            updates = orthogonalize(_stacked(batch, shape), coefficients, steps, eps, ns)
            results |= zip(indices, _unstacked(updates, batch, shape), strict=True)
    return [results[i] for i in range(len(matrices))]


def _batch_size(shape: Sequence[int], on_gpu: bool) -> int:
    """The most matrices of ``shape`` in a batch."""
    if on_gpu:
        return max(_BATCH_BYTES // max(2 * math.prod(shape), 1), 1)
    return max(_BATCH_MULTIPLICATIONS // max(multiplications(shape), 1), 1)


def _shape_in_batch(matrix: Tensor) -> tuple[int, ...]:
    """The shape that a matrix has in a batch.

    Small matrices are padded, so that there are fewer and larger batches. On a GPU tall matrices
    are transposed, so that they join wide ones; on a CPU the copies would take longer.
    """
    shape = tuple(matrix.shape)
    if max(shape) > _PADDED_UP_TO:
        return (min(shape), max(shape)) if runs_kernels(matrix) else shape
    return tuple(-(-size // _PADDING) * _PADDING for size in shape)


def _is_transposed(matrix: Tensor, shape: tuple[int, ...]) -> bool:
    return matrix.shape == shape[::-1] != shape


def _stacked(matrices: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """A batch of matrices, padded by zeros to ``shape``; the last ones may be transposed to it.

    The zeros do not change the orthogonalised matrices, and stay zeros.
    """
    if len(matrices) == 1 and matrices[0].shape == shape:
        # On a CPU a product of a batch of one takes up to twice the time of a product of matrices.
        return matrices[0]
    straight = [matrix for matrix in matrices if not _is_transposed(matrix, shape)]
    fits = all(matrix.shape == shape for matrix in straight)
    x = (torch.empty if fits else torch.zeros)(
        len(matrices), *shape, dtype=torch.bfloat16, device=matrices[0].device
    )
    torch._foreach_copy_(_cut(x[: len(straight)], straight), straight)
    if len(straight) < len(matrices):
        # A GPU copies many matrices by one launch where their layouts are equal, and turns all at
        # once.
        x[len(straight) :] = _stacked(matrices[len(straight) :], shape[::-1]).mT
    return x if len(matrices) > 1 else x[0]


def _unstacked(x: Tensor, matrices: list[Tensor], shape: tuple[int, ...]) -> list[Tensor]:
    """The matrices of a batch ``x`` that `_stacked` made."""
    x = x.view(len(matrices), *x.shape[-2:])
    straight = [matrix for matrix in matrices if not _is_transposed(matrix, shape)]
    found = _cut(x[: len(straight)], straight)
    if len(straight) < len(matrices):
        found += x[len(straight) :].mT.contiguous().unbind()
    return found


def _cut(x: Tensor, matrices: list[Tensor]) -> list[Tensor]:
    """The part of each matrix of ``x`` that has the shape of one of ``matrices``."""
    return [
        t if t.shape == matrix.shape else t[tuple(map(slice, matrix.shape))]
        for t, matrix in zip(x.unbind(), matrices, strict=True)
    ]


def multiplications(shape: Sequence[int]) -> int:
    """Multiplications in X·Xᵀ of each matrix, with the shorter side as rows."""
    return math.prod(shape) * min(shape)
