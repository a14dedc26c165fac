# SPDX-License-Identifier: MIT
"""Recipes: settings of a training, and the loop that follows them."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from torchpar import data
from torchpar.data import Samples
from torchpar.errors import ConfigError
from torchpar.nn import MLP
from torchpar.optim import SGD, ChainedOptimizer, Muon
from torchpar.parallel.launch.world import World
from torchpar.training.fused import FusedGradients
from torchpar.training.graph import GraphedStep

BIAS_LR = 0.1  # of SGD, beside Muon
# The images of the last epoch lie as the test images do; those of the epoch before are one pixel to the left.
SHIFTS = [(0, 0), (0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, -1), (1, -1), (-1, 1)]


class Trainer(Protocol):
    """Trains a network for one seed after another."""

    def train(self, seed: int) -> None:
        """Train a new network; the clock runs. All that depends on the seed or the images is done here."""

    def outputs(self, samples: Samples) -> Tensor:
        """The outputs ``(n, classes)`` of the network for images ``(n, 28, 28)`` uint8."""


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
        """Do what is done once, before the clock runs; ``samples`` are the training images."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of a training of a `torchpar.nn.MLP` with ReLU layers.

    Attributes:
        name, change: as in `Entry`.
        epochs: passes over the training images.
        batch_size: samples per step.
        hidden: widths of the hidden layers.
        activation: "relu" or "sigmoid".
        optimizer: "adam"; or "muon" for the weights, and SGD at rate `BIAS_LR` for the biases.
        lr: learning rate of "adam", or of Muon.
        momentum: of Muon and SGD.
        ns_steps: iterations of Newton–Schulz in a step of Muon.
        warmup: part of the steps in which the rate rises to ``lr``.
        decay: let the rate fall linearly to 0 afterwards.
        fused: compute gradients by formulas, else by autograd.
        dtype: of the images and, if ``fused``, of the products.
        crop: pixels to leave out on each side of an image.
        pool: side of the squares of pixels that are averaged to one.
        shift: move the images by a pixel in each epoch, in the order of `SHIFTS`; needs a ``crop``.
        smoothing: label smoothing, see `torch.nn.functional.cross_entropy`.
        average: decay of an exponential moving average of the parameters, which is then scored; 0 for none.
    """

    name: str
    change: str
    epochs: int
    batch_size: int = 128
    hidden: tuple[int, ...] = (512,)
    activation: Any = "relu"
    optimizer: str = "adam"
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
    smoothing: float = 0.0
    average: float = 0.0

    def prepare(self, samples: Samples, world: World) -> "MLPTrainer":
        return MLPTrainer(self, samples, world)

    def inputs(self, samples: Samples, shift: tuple[int, int] = (0, 0)) -> Samples:
        return samples.pooled(self.crop, self.pool, shift=shift, dtype=self.dtype)

    def make_optimizer(self, model: MLP) -> torch.optim.Optimizer:
        if self.optimizer == "adam":
            return torch.optim.Adam(model.parameters(), self.lr)
        weights = [p for p in model.parameters() if p.dim() == 2]
        biases = [p for p in model.parameters() if p.dim() == 1]
        return ChainedOptimizer(
            Muon(weights, self.lr, weight_decay=0, momentum=self.momentum, ns_steps=self.ns_steps),
            SGD(biases, BIAS_LR, momentum=self.momentum, nesterov=True),
        )

    def lr_factor(self, step: int, steps: int) -> float:
        """The learning rate of step 0, 1, … relative to ``lr``."""
        rising = self.warmup * steps
        if step < rising:
            return (step + 1) / rising
        return (steps - step) / (steps - rising) if self.decay else 1.0


class MLPTrainer:
    """Follows a recipe; a `Trainer`. A new network takes the memory of the one before.

    Args:
        recipe: the settings.
        samples: the training images, ``(n, 28, 28)`` uint8.
        world: its ranks share each batch.
    """

    def __init__(self, recipe: Recipe, samples: Samples, world: World):
        self.recipe = recipe
        self.raw = samples
        self.world = world
        self.samples = recipe.inputs(samples)
        sizes = (self.samples.inputs(slice(0, 1)).shape[1], *recipe.hidden, len(samples.classes))
        self.model = MLP(sizes, recipe.activation, device=samples.labels.device)
        if world.world_size > 1 and not recipe.fused:
            raise ConfigError(
                f"{recipe.name} takes autograd, which adds no gradients over ranks; take 1 rank"
            )
        self.gradients: Callable[[Tensor, Tensor, int], Tensor] = self._by_autograd
        if recipe.fused:
            self.gradients = FusedGradients(self.model, world, recipe.smoothing, recipe.dtype)
        self.optimizer = recipe.make_optimizer(self.model)
        self.lrs = [group["lr"] for group in self.optimizer.param_groups]
        on_gpu = samples.labels.is_cuda and recipe.fused
        self.graph = GraphedStep(self._step, self.samples, self.optimizer) if on_gpu else None
        self.scored: torch.nn.Module = self.model

    def train(self, seed: int) -> None:
        recipe, size = self.recipe, self.recipe.batch_size
        torch.manual_seed(seed)
        for layer in self.model.layers:
            layer.reset_parameters()  # type: ignore[operator]
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()
        if recipe.average:
            self.scored = average = AveragedModel(
                self.model, multi_avg_fn=get_ema_multi_avg_fn(recipe.average)
            )
        steps, step = recipe.epochs * -(-len(self.raw) // size), count()
        for epoch in range(1, recipe.epochs + 1):
            if epoch == 1 or recipe.shift:
                shift = SHIFTS[(recipe.epochs - epoch) % len(SHIFTS)] if recipe.shift else (0, 0)
                self.samples.features.copy_(recipe.inputs(self.raw, shift).features)
            order: dict[str, Any] = {"seed": seed, "epoch": epoch, "share": self.world.share}
            read, train = (data.indices, self.graph) if self.graph else (data.batches, self._step)
            for batch in read(self.samples, size, **order):
                factor = recipe.lr_factor(next(step), steps)
                for group, lr in zip(self.optimizer.param_groups, self.lrs, strict=True):
                    group["lr"] = lr * factor
                train(*batch)
                if recipe.average:
                    average.update_parameters(self.model)

    @torch.no_grad()
    def outputs(self, samples: Samples) -> Tensor:
        x = self.recipe.inputs(samples).inputs(slice(None)).float()
        return self.scored(x)  # type: ignore[no-any-return]

    def _step(self, x: Tensor, labels: Tensor, global_size: int) -> Tensor:
        loss = self.gradients(x, labels, global_size)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def _by_autograd(self, x: Tensor, labels: Tensor, global_size: int) -> Tensor:
        loss = cross_entropy(self.model(x), labels, reduction="sum", label_smoothing=self.recipe.smoothing)
        (loss / global_size).backward()
        return loss.detach()
