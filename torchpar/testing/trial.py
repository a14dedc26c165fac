# SPDX-License-Identifier: MIT
"""One optimizer in one situation on this rank: a model, its gradients, and a record of the steps."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

SHAPES = {"square": (32, 32), "tall": (64, 24), "wide": (24, 64), "uneven": (13, 10), "flat": (4, 20)}
STEPS = range(3)
# Muon's iterations amplify rounding where a gradient is singular, as that of a small batch is.
FAMILIES = ("full rank", "low rank")

Batch = dict[str, tuple[Tensor, Tensor]]
Make = Callable[..., torch.optim.Optimizer]


class NotApplicable(Exception):
    """The optimizer has no argument for what the situation is about."""


class Layers(nn.Module):
    """Linear layers, and convolutions for weights of four axes, side by side.

    The loss of a batch ``{name: (x, y)}`` is Σ (layer(x)·y), so the batch alone determines the gradients. That
    of a linear layer is yᵀ·x.
    """

    def __init__(self, weights: Mapping[str, Tensor]):
        super().__init__()
        for name, weight in weights.items():
            n, m, *kernel = weight.shape
            layer = nn.Conv2d(m, n, kernel, bias=False) if kernel else nn.Linear(m, n, bias=False)  # type: ignore[arg-type]
            layer.weight = nn.Parameter(weight.clone())
            self.add_module(name, layer)

    def forward(self, batch: Batch) -> Any:
        return sum((self.get_submodule(name)(x) * y).sum() for name, (x, y) in batch.items())


@dataclass
class Record:
    """The weights before and after each step, and the gradients: whole matrices by name, in float64."""

    dtype: torch.dtype
    options: dict[str, Any]
    weights: dict[str, list[np.ndarray]] = field(default_factory=dict)
    gradients: dict[str, list[np.ndarray]] = field(default_factory=dict)


@dataclass
class Trial:
    """What a situation needs on a rank.

    Attributes:
        family: "full rank" or "low rank", the kind of gradients.
        folder: a folder of all ranks, which is empty at first.
        phase: the index of the part of a situation that starts its ranks anew.
        decades: over which the singular values of a gradient are spread.
        views: the views that the optimizer gets, by the name of a parameter.
    """

    make: Make
    family: str
    seed: int
    folder: Path
    phase: int = 0
    dtype: torch.dtype = torch.float32
    shapes: dict[str, tuple[int, ...]] = field(default_factory=lambda: dict(SHAPES))
    decades: float = 1.0
    views: dict[str, Callable[[Tensor], Any]] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.record = Record(self.dtype, self.options)

    def use(self, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        """Take parameters of ``dtype``, and give ``options`` to the optimizer and to the reference."""
        self.dtype = self.record.dtype = dtype
        self.options.update(options)

    def model(self) -> Layers:
        """The layers of `shapes`, the same on every rank."""
        return Layers(
            {
                name: 0.05 * torch.randn(shape, generator=self._generator(name)).to(self.dtype)
                for name, shape in self.shapes.items()
            }
        )

    def optimizer(self, model: nn.Module, **options: Any) -> torch.optim.Optimizer:
        """Make the optimizer, which a situation that passes unknown options is not about."""
        options |= self.options
        if self.views:
            options["views"] = self.views
        if unknown := options.keys() - inspect.signature(self.make).parameters:
            raise NotApplicable(f"make has no argument {min(unknown)}")
        return self.make(model, **options)

    def batch(self, step: int, part: int = 0, parts: int = 1) -> Batch:
        """Inputs and their weights in the loss: those of one of several ``parts`` of the samples."""
        samples = {name: self._samples(name, shape, step) for name, shape in self.shapes.items()}
        return {name: (x[part::parts], y[part::parts]) for name, (x, y) in samples.items()}

    def gradients(self, step: int, part: int = 0, parts: int = 1) -> dict[str, Tensor]:
        """The gradients of `batch`, without a model."""
        batch = self.batch(step, part, parts)
        return {
            name: (y.flatten(1).T @ x.flatten(1)).view(self.shapes[name]) for name, (x, y) in batch.items()
        }

    def train(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        backward: Callable[[int], None] | None = None,
        *,
        take_step: Callable[[int], Any] | None = None,
        whole: Callable[[str, Tensor], Tensor] | None = None,
        steps: Iterable[int] = STEPS,
    ) -> None:
        """Record ``steps``.

        Args:
            backward: computes the gradients of a step.
            take_step: the default calls ``optimizer.step()``.
            whole: the whole matrix of a rank's part of it. The default takes DTensors and whole parameters.
        """
        whole = whole or (lambda name, t: t.full_tensor() if isinstance(t, DTensor) else t)
        for step in steps:
            optimizer.zero_grad()
            (backward or (lambda step: model(self.batch(step)).backward()))(step)
            before, gradients = {}, {}
            for name, p in named_weights(model):
                assert p.grad is not None, f"{name} has no gradient"
                before |= self._matrices(name, whole(name, p.detach()))
                gradients |= self._matrices(name, whole(name, p.grad))
            (take_step or (lambda step: optimizer.step()))(step)
            for name, p in named_weights(model):
                for part, weight in self._matrices(name, whole(name, p.detach())).items():
                    self.record.weights.setdefault(part, [before[part]]).append(weight)
                    self.record.gradients.setdefault(part, []).append(gradients[part])

    def _matrices(self, name: str, whole: Tensor) -> dict[str, np.ndarray]:
        view = self.views.get(f"{name}.weight")
        if view is None:
            return {name: _array(whole)}
        matrices = view(whole.contiguous())
        matrices = matrices.flatten(0, -3) if isinstance(matrices, Tensor) else matrices
        return {f"{name}_{i}": _array(matrix) for i, matrix in enumerate(matrices)}

    def _samples(self, name: str, shape: tuple[int, ...], step: int) -> tuple[Tensor, Tensor]:
        """Inputs x and weights y with yᵀ·x = U·Σ·Vᵀ, where Σ is spread over `decades`."""
        n, m = shape[0], math.prod(shape[1:])
        generator = self._generator(name, step)
        rank = min(n, m) if self.family == "full rank" else min(16, max(min(n, m) // 2, 1))
        u, v, mixed = (
            torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64)).Q
            for size in (n, m, max(rank, 16))
        )
        mixed = mixed * torch.logspace(0, -self.decades / 2, rank, dtype=torch.float64)
        x, y = (mixed @ v.T).to(self.dtype), (mixed @ u.T).to(self.dtype)
        return x.view(-1, *shape[1:]), y.view(*y.shape, *[1] * (len(shape) - 2))

    def _generator(self, *of: Any) -> torch.Generator:
        return torch.Generator().manual_seed(crc32(repr((self.seed, self.family, *of)).encode()))


def named_weights(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The parameters by the names of their layers, also within a wrapper such as DistributedDataParallel."""
    return [(name.split(".")[-2], p) for name, p in model.named_parameters()]


def _array(t: Tensor) -> np.ndarray:
    # A tensor would travel between processes by shared memory.
    return t.detach().double().numpy().copy()
