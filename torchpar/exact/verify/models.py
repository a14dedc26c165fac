# SPDX-License-Identifier: MIT
"""A small MLP that learns pictures, a small GPT that learns a text, and the lesson's MLP.

The lesson is that of `examples/train_ddp.py --arithmetic exact`, from an installed package.
"""

import math
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from torchpar.console import say_progress
from torchpar.data import batches, load
from torchpar.exact.data_parallel import DataParallel
from torchpar.exact.dispatch import mode
from torchpar.exact.tensor_parallel import Linear
from torchpar.exact.verify.drawn import CHARACTERS, draw_pictures, draw_text
from torchpar.nn import MLP
from torchpar.parallel.launch.world import World
from torchpar.parallel.split.schedules import P2PCommunicator, gpipe
from torchpar.training.optimizers import muon

SIZES = (784, 128, 64, 10)  # of the MLP's layers
MLP_STEPS, BATCH_SIZE = 100, 128  # of the MLP's training; samples of a step
UNIT = 32  # samples of a unit of work, on any number of ranks
CONTEXT, WIDTH = 64, 64  # of the GPT: characters that it sees; features of a character
HEADS, BLOCKS = 4, 2  # of the GPT
SEQUENCES, GPT_STEPS, LR = 8, 20, 3e-3  # windows of a step; of the GPT's training
TEXT = 20_000  # characters
# The lesson's defaults.
LESSON_SIZES, LESSON_EPOCHS, LESSON_BATCH, LESSON_UNIT = (121, 512, 10), 3, 1024, 512
LESSON_CROP, LESSON_POOL, LESSON_SMOOTHING = 3, 2, 0.05
LESSON_MUON = 0.5, 0.8, 0.0  # learning rate, momentum and weight decay


class SplitMLP(nn.Module):
    """This rank's part of an MLP with sigmoids: its shards of the layers of its stage."""

    def __init__(self, world: World):
        super().__init__()
        tp, pp = world.mesh["tp"], world.mesh["pp"]
        first, second, third = pairwise(SIZES)
        layers = [Linear(*first, tp, 0), Linear(*second, tp, 1), nn.Linear(*third)]
        mine = torch.arange(len(layers), device="cpu").tensor_split(pp.size())[pp.get_local_rank()]
        self.layers = nn.ModuleDict({str(i): layers[i] for i in mine.tolist()})

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in self.layers.items():
            x = layer(x if i == "0" else x.sigmoid())
        return x


@mode()
def train_mlp(world: World) -> SplitMLP:
    """Train on one epoch of pictures by SGD."""
    torch.manual_seed(0)
    model = SplitMLP(world).to(world.device)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.5, momentum=0.9, weight_decay=3e-5, foreach=False
    )
    pictures = draw_pictures(MLP_STEPS * BATCH_SIZE).to(world.device)
    drawn = batches(pictures, BATCH_SIZE, seed=0, epoch=1)
    steps = ([*zip(x.split(UNIT), labels.split(UNIT), strict=True)] for x, labels, _ in drawn)
    schedule = LambdaLR(optimizer, lambda step: 1 - step / MLP_STEPS)
    _train(model, optimizer, schedule, steps, MLP_STEPS, world)
    return model


def _train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: LambdaLR,
    steps: Iterable[list[tuple[Tensor, Tensor]]],
    count: int,
    world: World,
    smoothing: float = 0.0,
) -> None:
    """Train by ``count`` steps of units of work, each of inputs and targets. A slow rank 0 says how
    far it is.

    The ranks of "dp" share the units of each step, which pass through the stages of "pp".
    """
    features = next(model.parameters()).shape[1]  # of the activations that this stage receives
    parallel = DataParallel(model, world.mesh["dp"].get_group())
    p2p = P2PCommunicator(world.mesh["pp"].get_group(), world.device, torch.float32)
    for units in steps if world.rank else say_progress(steps, "steps", count):
        size = sum(len(targets) for _, targets in units)
        mine = units[world.dp_rank :: world.dp_size]

        def forward(i: int, activations: Tensor | None) -> Tensor:
            x, targets = mine[i]  # noqa: B023 (called within this step)
            y: Tensor = model(x if activations is None else activations)
            if not p2p.is_last:
                return y
            loss = F.cross_entropy(y, targets, reduction="sum", label_smoothing=smoothing)
            return loss / size  # noqa: B023  # likewise

        gpipe(forward, parallel.backward, [(len(x), features) for x, _ in mine], p2p)
        parallel.all_reduce()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def train_lesson(world: World, folder: Path) -> MLP:
    """Train on MNIST in ``folder``, torchvision's root, by Muon and by SGD for the biases."""
    pictures, _ = load("mnist", folder, world.device)
    pictures = pictures.pooled(LESSON_CROP, LESSON_POOL)
    drawn = (
        batch
        for epoch in range(1, LESSON_EPOCHS + 1)
        for batch in batches(pictures, LESSON_BATCH, seed=0, epoch=epoch)
    )
    steps = (
        [*zip(x.split(LESSON_UNIT), labels.split(LESSON_UNIT), strict=True)]
        for x, labels, _ in drawn
    )
    count = LESSON_EPOCHS * math.ceil(len(pictures) / LESSON_BATCH)
    with mode():
        torch.manual_seed(0)
        model = MLP(LESSON_SIZES).to(world.device)
        optimizer = muon(model, *LESSON_MUON, foreach=False)
        schedule = LambdaLR(optimizer, lambda step: 1 - step / count)
        _train(model, optimizer, schedule, steps, count, world, LESSON_SMOOTHING)
    return model


class Block(nn.Module):
    """Causal attention and a hidden layer. Each has a normalisation and a residual connection."""

    def __init__(self, mesh: DeviceMesh):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.query, self.key, self.value = (Linear(WIDTH, WIDTH, mesh, 0) for _ in range(3))
        self.out = Linear(WIDTH, WIDTH, mesh, 1)
        self.up, self.down = Linear(WIDTH, 4 * WIDTH, mesh, 0), Linear(4 * WIDTH, WIDTH, mesh, 1)

    def forward(self, x: Tensor) -> Tensor:
        normal = self.norms[0](x)
        query, key, value = (
            layer(normal).unflatten(-1, (-1, WIDTH // HEADS)).transpose(-2, -3)
            for layer in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(attended.transpose(-2, -3).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))  # type: ignore[no-any-return]


class GPT(nn.Module):
    """The logits ``(*, n, characters)`` of the next characters of texts ``(*, n)``.

    Args:
        mesh: the ranks over which heads and linear layers are sharded. Their number divides
            `HEADS`.
    """

    def __init__(self, characters: int, mesh: DeviceMesh):
        super().__init__()
        self.tokens = nn.Embedding(characters, WIDTH)
        device = torch.get_default_device()  # as for layers of torch.nn
        self.positions = nn.Parameter(torch.randn(CONTEXT, WIDTH, device=device) * 0.02)
        self.blocks = nn.Sequential(*(Block(mesh) for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, characters, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        x = self.tokens(text) + self.positions[: text.shape[-1]]
        return self.head(self.norm(self.blocks(x)))  # type: ignore[no-any-return]


@mode()
def train_gpt(world: World) -> GPT:
    """Train on windows of a text by AdamW. Each window of a step is a unit of work."""
    text = draw_text(TEXT).to(world.device)
    torch.manual_seed(0)
    model = GPT(CHARACTERS, world.mesh["tp"]).to(world.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, foreach=False)
    windows = text.unfold(0, CONTEXT + 1, 1)
    last = len(text) - CONTEXT
    drawn = (torch.randint(last, (SEQUENCES,), device="cpu") for _ in range(GPT_STEPS))
    steps = ([(window[:-1], window[1:]) for window in windows[places]] for places in drawn)
    constant = LambdaLR(optimizer, lambda _: 1.0)
    _train(model, optimizer, constant, steps, GPT_STEPS, world)
    return model
