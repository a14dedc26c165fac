# SPDX-License-Identifier: MIT
"""Recipes: settings of a training, and the loop that follows them."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from torchpar import data, training
from torchpar.data import Samples
from torchpar.errors import ConfigError
from torchpar.nn import MLP
from torchpar.parallel.launch.world import World
from torchpar.training.fused import FusedGradients
from torchpar.training.graph import GraphedStep, why_not_graphed

# Pixels by which the part that is kept moves: not at all in the last epoch, to the right in the one before.
SHIFTS = [(0, 0), (0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, -1), (1, -1), (-1, 1)]


class Trainer(Protocol):
    """Trains one network after another."""

    def train(self, seed: int) -> None:
        """Train a new network. The clock runs."""

    def outputs(self, samples: Samples) -> Tensor:
        """The outputs ``(n, classes)`` of that network for images ``(n, 28, 28)`` uint8."""


class Entry(Protocol):
    """An entry in the speedrun: a `Recipe`, or anything else that makes a `Trainer`.

    Attributes:
        name: in tables.
        change: the difference from the entry before.
    """

    @property
    def name(self) -> str: ...

    @property
    def change(self) -> str: ...

    def prepare(self, samples: Samples, world: World) -> Trainer:
        """Compile and allocate; compute nothing from ``samples``, the training images. No clock runs."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of a training of a `torchpar.nn.MLP`.

    Attributes:
        name, change: as in `Entry`.
        epochs: passes over the training images.
        batch_size: samples per step.
        hidden: widths of the hidden layers.
        activation: between the layers.
        optimizer: Adam, or Muon for the weights and SGD for the biases (`torchpar.training.muon`).
        lr: the highest learning rate.
        momentum: of Muon and SGD.
        ns_steps: iterations of Newton–Schulz in a step of Muon.
        warmup: part of the steps in which the rate rises to ``lr``.
        decay: let the rate fall linearly to 0 afterwards.
        fused: compute gradients by formulas, else by autograd.
        dtype: of the images and of the products; another one than float32 needs ``fused``.
        crop: pixels to leave out on each side of an image.
        pool: side of the squares of pixels that are averaged to one.
        shift: move the images by a pixel, in each epoch to another side, as `SHIFTS` says; needs a ``crop``.
        label_smoothing: as in `torch.nn.functional.cross_entropy`.
        average: decay of an exponential moving average of the parameters, which is then scored; 0 for none.
    """

    name: str
    change: str
    epochs: int
    batch_size: int = 128
    hidden: tuple[int, ...] = (512,)
    activation: Literal["sigmoid", "relu"] = "relu"
    optimizer: Literal["adam", "muon"] = "adam"
    lr: float = 1e-3
    momentum: float = 0.8
    ns_steps: int = 5
    warmup: float = 0.0
    decay: bool = False
    fused: bool = False
    dtype: torch.dtype = torch.float32
    crop: int = 0
    pool: int = 1
    shift: bool = False
    label_smoothing: float = 0.0
    average: float = 0.0

    def prepare(self, samples: Samples, world: World) -> "RecipeTrainer":
        return RecipeTrainer(self, samples, world)

    def pooled(self, samples: Samples, shift: tuple[int, int] = (0, 0)) -> Samples:
        return samples.pooled(self.crop, self.pool, shift=shift, dtype=self.dtype)

    def make_optimizer(self, model: MLP) -> Optimizer:
        if self.optimizer == "adam":
            return torch.optim.Adam(model.parameters(), self.lr)
        if self.optimizer == "muon":
            return training.muon(model, self.lr, self.momentum, weight_decay=0, ns_steps=self.ns_steps)
        raise ConfigError(f"optimizer is {self.optimizer!r}, expected 'adam' or 'muon'")

    def lr_factor(self, step: int, steps: int) -> float:
        """The learning rate of step 0, 1, … relative to ``lr``."""
        rising = self.warmup * steps
        if step < rising:
            return min((step + 1) / rising, 1.0)
        return (steps - step) / (steps - rising) if self.decay else 1.0


class RecipeTrainer:
    """The `Trainer` of a recipe. Each network takes the memory of the one before.

    Args:
        samples: the training images, ``(n, 28, 28)`` uint8.
        world: its ranks share each batch.

    Raises:
        ConfigError: settings that do not fit together.
    """

    def __init__(self, recipe: Recipe, samples: Samples, world: World):
        if not recipe.fused and (world.world_size > 1 or recipe.dtype != torch.float32):
            raise ConfigError(
                f"{recipe.name} computes gradients by autograd, here on one rank and in float32 alone; "
                "set fused, or take --ranks 1 and float32"
            )
        self.recipe = recipe
        self.raw = samples
        self.world = world
        shape = recipe.pooled(samples[:1]).features.shape[1:]
        device = samples.labels.device
        features = torch.empty(len(samples), *shape, dtype=recipe.dtype, device=device)
        self.samples = Samples(features, samples.labels, samples.classes)
        sizes = (shape.numel(), *recipe.hidden, len(samples.classes))
        self.model = MLP(sizes, recipe.activation, device=device)
        self.scored: torch.nn.Module = self.model
        self.gradients: Callable[[Tensor, Tensor, int], Tensor] = self._by_autograd
        if recipe.fused:
            self.gradients = FusedGradients(self.model, world, recipe.label_smoothing, recipe.dtype)
        self.optimizer = recipe.make_optimizer(self.model)
        self.lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.graph: GraphedStep | None = None
        if not why_not_graphed(self.optimizer, world, recipe.fused):
            self.graph = GraphedStep(self._step, self.samples, self.optimizer, _fail)

    def train(self, seed: int) -> None:
        recipe, size = self.recipe, self.recipe.batch_size
        torch.manual_seed(seed)
        for layer in self.model.layers:
            layer.reset_parameters()  # type: ignore[operator]
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()
        if recipe.average:
            multi_avg_fn = get_ema_multi_avg_fn(recipe.average)
            self.scored = average = AveragedModel(self.model, multi_avg_fn=multi_avg_fn)
        steps, step = recipe.epochs * -(-len(self.raw) // size), count()
        for epoch in range(1, recipe.epochs + 1):
            if epoch == 1 or recipe.shift:
                shift = SHIFTS[(recipe.epochs - epoch) % len(SHIFTS)] if recipe.shift else (0, 0)
                self.samples.features.copy_(recipe.pooled(self.raw, shift).features)
            order: dict[str, Any] = {"seed": seed, "epoch": epoch, "share": self.world.share}
            read, train = (data.indices, self.graph) if self.graph else (data.batches, self._step)
            for batch in read(self.samples, size, **order):
                factor = recipe.lr_factor(next(step), steps)
                for group, lr in zip(self.optimizer.param_groups, self.lrs, strict=True):
                    group["lr"] = lr * factor
                train(*batch)
                if recipe.average:
                    average.update_parameters(self.model)

    def outputs(self, samples: Samples) -> Tensor:
        x = self.recipe.pooled(samples).inputs(slice(None)).float()
        return self.scored(x)  # type: ignore[no-any-return]

    def _step(self, x: Tensor, labels: Tensor, global_size: int) -> Tensor:
        loss = self.gradients(x, labels, global_size)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def _by_autograd(self, x: Tensor, labels: Tensor, global_size: int) -> Tensor:
        smoothing = self.recipe.label_smoothing
        loss = cross_entropy(self.model(x), labels, reduction="sum", label_smoothing=smoothing)
        (loss / global_size).backward()
        return loss.detach()


def _fail(reason: str) -> None:
    raise ConfigError(f"a step cannot be a CUDA graph: {reason}")
