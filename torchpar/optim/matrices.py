# SPDX-License-Identifier: MIT
"""Parameters seen as matrices, and matrices orthogonalized in batches."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from torchpar.errors import ConfigError
from torchpar.library.sharding import is_dtensor, local
from torchpar.ops.matrix import runs_kernels
from torchpar.optim.newton_schulz import (
    Coefficients,
    NewtonSchulz,
    dtype_of_updates,
    orthogonalize,
)
from torchpar.parallel.split.parts import Part

View = Callable[[Tensor], Tensor | Sequence[Tensor]]
"""A function from a parameter to its matrices.

The matrices are views ``(*, n, m)`` that together hold each element once.
"""

_PADDED_UP_TO, _PADDING = 256, 32  # columns or rows
# Multiplications in X·Xᵀ of a batch on a CPU: larger products keep all cores busy by themselves.
_BATCH_MULTIPLICATIONS = 2**31
# The bytes of a batch in bfloat16 on a GPU. The iterations take up to six times as much memory
# beside the batch. The result takes twice as much, and so do the copies of float32 matrices.
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

    def _check_memory(self) -> None:
        """Raise a ConfigError unless this rank has its part of the parameter."""
        if _is_freed(self.p):
            raise ConfigError(
                f"Muon: {self.name} has no memory, as the unsharded parameter that a forward pass "
                "of fully_shard without a backward pass has left; call model.reshard(), and then "
                "make the optimizer"
            )
        if is_dtensor(self.p) and self.p.device_mesh.get_coordinate() is None:
            raise ConfigError(
                f"Muon: {self.name} is a DTensor of other ranks, expected a mesh with this rank; "
                "give each rank's Muon the parameters that the rank has"
            )
        if tuple(local(self.p).shape) != tuple(self.part.size):
            raise ConfigError(
                f"Muon: this rank's part of {self.name} has shape {tuple(local(self.p).shape)}, "
                f"expected {tuple(self.part.size)}, as when its layer was split; split the layer "
                "again"
            )

    def check(self) -> None:
        """Raise a ConfigError unless the parameter is a matrix, or has a view."""
        shape = self.part.whole
        if not self.p.is_floating_point() or self.p.dtype.itemsize < 2:
            expected = "a floating dtype of 16, 32 or 64 bits"
            raise ConfigError(f"Muon: {self.name} is {self.p.dtype}, expected {expected}")
        if self.p.layout is not torch.strided:
            raise ConfigError(f"Muon: {self.name} is {self.p.layout}, expected torch.strided")
        self._check_memory()
        if self.view is None:
            if len(shape) != 2:
                raise ConfigError(
                    f"Muon: {self.name} has shape {shape}, expected 2D, a matrix; name a view of "
                    "it in views, or give it to another optimizer, as Muon.for_model does"
                )
            return
        counted = torch.zeros(shape, dtype=torch.int8, device="cpu")
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


def _is_freed(p: Tensor) -> bool:
    """Whether the memory of a plain parameter was freed, as `fully_shard` frees unsharded ones."""
    is_plain = type(p) in (Tensor, torch.nn.Parameter) and not p.is_meta
    return is_plain and p.numel() > 0 and not p.untyped_storage().size()


def orthogonalize_all(
    matrices: Sequence[Tensor], coefficients: Coefficients, steps: int, eps: float, ns: NewtonSchulz
) -> list[Tensor]:
    """`orthogonalize` each matrix, in batches of nearly equal shapes, which keep a device busy.

    Results of a batch are parts of one tensor of float32. Outside of `torchpar.exact.mode` their
    values are those of bfloat16.
    """
    kinds: dict[tuple[tuple[int, ...], torch.device, torch.dtype], tuple[list[int], list[int]]] = {}
    on_gpu: dict[torch.device, bool] = {}
    for i, matrix in enumerate(matrices):
        shape, device = tuple(matrix.shape), matrix.device
        if device not in on_gpu:
            on_gpu[device] = runs_kernels(matrix)
        batched = _shape_in_batch(shape, on_gpu[device])
        is_transposed = batched == shape[::-1] != shape
        # On a GPU a matrix is rounded when it is divided by its norm, as it is if it is alone.
        dtype = matrix.dtype if on_gpu[device] else dtype_of_updates()
        kinds.setdefault((batched, device, dtype), ([], []))[is_transposed].append(i)

    def run(x: Tensor) -> Tensor:
        return orthogonalize(x, coefficients, steps, eps, ns)

    results: dict[int, Tensor] = {}
    for (shape, device, dtype), (straight, transposed) in kinds.items():
        order, size = straight + transposed, _batch_size(shape, on_gpu[device])
        for first in range(0, len(order), size):
            indices = order[first : first + size]
            batch = [matrices[i] for i in indices]
            count = max(len(straight) - first, 0)
            updates = _orthogonalize_batch(batch[:count], batch[count:], shape, dtype, run)
            results |= zip(indices, updates, strict=True)
    return [results[i] for i in range(len(matrices))]


def _batch_size(shape: Sequence[int], on_gpu: bool) -> int:
    """The most matrices of ``shape`` in a batch."""
    if on_gpu:
        return max(_BATCH_BYTES // max(2 * math.prod(shape), 1), 1)
    return max(_BATCH_MULTIPLICATIONS // max(multiplications(shape), 1), 1)


def _shape_in_batch(shape: tuple[int, ...], on_gpu: bool) -> tuple[int, ...]:
    """The shape that a matrix of ``shape`` has in a batch.

    Small matrices are padded, so that there are fewer and larger batches. On a GPU tall matrices
    are transposed, so that they join wide ones; on a CPU the copies would take longer.
    """
    if max(shape) > _PADDED_UP_TO:
        return shape[::-1] if on_gpu and shape[0] > shape[1] else shape
    return tuple(-(-size // _PADDING) * _PADDING for size in shape)


def _orthogonalize_batch(
    straight: list[Tensor],
    transposed: list[Tensor],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    run: Callable[[Tensor], Tensor],
) -> list[Tensor]:
    """Orthogonalize a batch of ``dtype``: matrices that fit into ``shape``, as they are or
    transposed."""
    if not straight:
        straight, transposed, shape = transposed, [], shape[::-1]
    count = len(straight) + len(transposed)
    if count == 1 and straight[0].shape == shape:
        # On a CPU a product of a batch of one takes up to twice the time of a product of matrices.
        return [run(straight[0])]
    x = None if transposed else _side_by_side(straight, shape)
    x = _stacked(straight, shape, count, dtype) if x is None else x
    if transposed:
        # A GPU copies many matrices by one launch where their layouts are equal, and turns all at
        # once.
        x[len(straight) :] = _stacked(transposed, shape[::-1], len(transposed), dtype).mT
    x = run(x if count > 1 else x[0]).float().view(x.shape)
    found = _cut(x, straight)
    return [*found, *x[len(straight) :].mT.contiguous().unbind()] if transposed else found


def _side_by_side(matrices: list[Tensor], shape: tuple[int, ...]) -> Tensor | None:
    """A view of matrices of ``shape`` that lie side by side in memory, such as the matrices of a
    parameter of three dimensions; None if they lie elsewhere."""
    first, size = matrices[0], math.prod(shape)
    start, memory = first.storage_offset(), first.untyped_storage().data_ptr()
    for i, t in enumerate(matrices):
        if t.storage_offset() != start + i * size or t.dtype != first.dtype:
            return None
        if t.shape != shape or not t.is_contiguous() or t.untyped_storage().data_ptr() != memory:
            return None
    return first.as_strided((len(matrices), *shape), (size, shape[1], 1))


def _stacked(
    matrices: list[Tensor], shape: tuple[int, ...], count: int, dtype: torch.dtype
) -> Tensor:
    """``count`` matrices of ``shape``, of which the first are copies of ``matrices``, padded by
    zeros.

    The zeros do not change the orthogonalized matrices, and stay zeros.
    """
    make = torch.empty if all(matrix.shape == shape for matrix in matrices) else torch.zeros
    x = make(count, *shape, dtype=dtype, device=matrices[0].device)
    torch._foreach_copy_(_cut(x, matrices), matrices)
    return x


def _cut(x: Tensor, matrices: list[Tensor]) -> list[Tensor]:
    """The first matrices of ``x``, each cut to the shape of one of ``matrices``."""
    return [
        t if t.shape == matrix.shape else t[tuple(map(slice, matrix.shape))]
        for t, matrix in zip(x.unbind(), matrices, strict=False)
    ]


def multiplications(shape: Sequence[int]) -> int:
    """Multiplications in X·Xᵀ of each matrix, with the shorter side as rows."""
    return math.prod(shape) * min(shape)
