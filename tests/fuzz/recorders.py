# SPDX-License-Identifier: MIT
"""Fuzz `profile.replay` and `exact.record` around training loops that are drawn at random.

A recorded loop has the bits of the loop alone: weights, the optimizer's state, losses and random
numbers. The page and its trace are complete. Two recordings are the same, and a planted difference
is named by its step, and by its tensor.
"""

import io
import json
import math
import random
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._dynamo  # which an optimizer's first step would import
from driver import Found, run
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from torchpar import exact
from torchpar import nn as own
from torchpar.exact.divergence import recording
from torchpar.exact.divergence.compare_runs import main as compare
from torchpar.optim import Muon
from torchpar.training import profile
from torchpar.training.profile import replaying

STEPS, RECORDED, WIDTH, SAMPLES, CLASSES = 10, 3, 6, 5, 3


class Residual(nn.Module):
    """A parameter of its own, and the input."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(WIDTH, WIDTH))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + torch.tanh(x @ self.scale)


class Around(nn.Module):
    """A layer of sequences, of length 1; its first result."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        of = x[:, None]
        found = (
            self.layer(of, of, of) if type(self.layer) is nn.MultiheadAttention else self.layer(of)
        )
        return (found[0] if isinstance(found, tuple) else found)[:, 0]


class Repeated(nn.Module):
    """A layer that is called twice, perhaps by checkpoints."""

    def __init__(self, layer: nn.Module, by_checkpoint: bool):
        super().__init__()
        self.layer, self.by_checkpoint = layer, by_checkpoint

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = (
                checkpoint(self.layer, x, use_reentrant=False)
                if self.by_checkpoint
                else self.layer(x)
            )
        return x


LINEAR = partial(nn.Linear, WIDTH, WIDTH)
EXACT: dict[str, Callable[[], nn.Module]] = {
    "linear": LINEAR,
    "own": partial(own.LinearReLU, WIDTH, WIDTH),
    "relu": lambda: nn.Sequential(LINEAR(), nn.ReLU(inplace=True)),
    "residual": Residual,
    "norm": partial(nn.LayerNorm, WIDTH),
    "twice": lambda: Repeated(LINEAR(), by_checkpoint=False),
}
LAYERS: dict[str, Callable[[], nn.Module]] = EXACT | {
    "sigmoid": partial(own.LinearSigmoid, WIDTH, WIDTH),
    "maxout": partial(own.LinearMaxout, WIDTH, WIDTH),
    "dropout": partial(nn.Dropout, 0.2),
    "batch norm": partial(nn.BatchNorm1d, WIDTH),
    "weight norm": lambda: weight_norm(LINEAR()),
    "gru": lambda: Around(nn.GRU(WIDTH, WIDTH, batch_first=True)),
    "attention": lambda: Around(nn.MultiheadAttention(WIDTH, 2, dropout=0.1, batch_first=True)),
    "encoder": lambda: Around(nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True)),
    "checkpoints": lambda: Repeated(nn.Sequential(LINEAR(), nn.Dropout(0.1)), by_checkpoint=True),
}
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, foreach=False),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), 1e-2, foreach=False),
    "muon": lambda model: Muon.for_model(
        model, lr=0.02, others=partial(torch.optim.AdamW, lr=1e-3, foreach=False)
    ),
}


class Program(NamedTuple):
    """A training.

    Attributes:
        tied: whether the first two linear layers share a weight.
        frozen: the index of a layer that is frozen, or None.
        micro: backward passes in a step.
        habits: what else the loop does: "clip", "closure", "evaluate" before a step, "penalty" by
            `torch.autograd.grad`, "schedule", "skip" a batch whose forward pass raises, "keep"
            gradients that are zeroed in place.
    """

    layers: tuple[str, ...]
    optimizer: str
    tied: bool
    frozen: int | None
    micro: int
    habits: frozenset[str]
    exact: bool
    seed: int


class Plant(NamedTuple):
    """What differs: "weight" number ``index``, "labels" or "rate", from ``step`` on."""

    kind: str
    step: int
    index: int


def make(program: Program) -> nn.Module:
    torch.manual_seed(program.seed)
    layers = [LAYERS[name]() for name in program.layers]
    linear = [layer for layer in layers if type(layer) is nn.Linear]
    if program.tied and len(linear) > 1:
        linear[1].weight = linear[0].weight
    if program.frozen is not None:
        layers[program.frozen].requires_grad_(False)
    return nn.Sequential(LINEAR(), *layers, nn.Linear(WIDTH, CLASSES))


def train(
    program: Program,
    context: Callable[[nn.Module, torch.optim.Optimizer], Any] = lambda *_: nullcontext(),
    plant: Plant | None = None,
) -> list[Tensor]:
    """The weights, buffers, states, losses and the random state after a training."""
    with exact.mode() if program.exact else nullcontext():
        model = make(program)
        optimizer = OPTIMIZERS[program.optimizer](model)
        losses: list[Tensor] = []
        with context(model, optimizer):
            for step in range(STEPS):
                losses += take_step(program, model, optimizer, step, plant)
    states = [value for of in optimizer.state.values() for value in of.values()]
    tensors = [*model.parameters(), *model.buffers(), *filter(torch.is_tensor, states), *losses]
    return [t.detach().clone() for t in tensors] + [torch.get_rng_state()]


def take_step(  # noqa: C901  # some lines for each habit
    program: Program,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    plant: Plant | None,
) -> list[Tensor]:
    habits, losses = program.habits, list[Tensor]()
    planted = plant.kind if plant is not None and plant.step == step else ""
    if planted == "weight":
        flip_a_bit([*model.parameters()][plant.index])  # type: ignore[union-attr]
    if planted == "rate":
        optimizer.param_groups[0]["lr"] *= 2
    if "evaluate" in habits and step % 3 == 1:
        model.eval()
        with torch.no_grad():
            losses.append(model(torch.ones(2, WIDTH)).sum())
        model.train()

    def compute() -> Tensor:
        optimizer.zero_grad(set_to_none="keep" not in habits)
        loss = torch.zeros(())
        for _ in range(program.micro):
            x, labels = torch.randn(SAMPLES, WIDTH), torch.randint(CLASSES, (SAMPLES,))
            if planted == "labels":
                labels = (labels + 1) % CLASSES
            loss = F.cross_entropy(model(x), labels)
            if "penalty" in habits:
                weight = model[-1].weight
                (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
                losses.append(gradient.sum())
            loss.backward()
        if "clip" in habits:
            nn.utils.clip_grad_norm_(model.parameters(), 0.5, foreach=False)
        losses.append(loss.detach())
        return loss

    if "skip" in habits and step % 4 == 2:
        try:
            model(torch.randn(SAMPLES, WIDTH + 1))
        except RuntimeError:
            pass
        else:
            raise Found("the forward pass takes another width")
    if "closure" in habits:
        optimizer.step(compute)  # type: ignore[arg-type]
    else:
        compute()
        optimizer.step()
    if "schedule" in habits:
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
    return losses


def flip_a_bit(p: Tensor) -> None:
    with torch.no_grad():
        p.view(torch.int32).view(-1)[p.numel() // 2] ^= 1


def check_same(found: list[Tensor], expected: list[Tensor], by: str) -> None:
    if len(found) != len(expected):
        raise Found(f"{by}: {len(found)} tensors, expected {len(expected)}")
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        if not torch.equal(a.nan_to_num(), b.nan_to_num()):
            raise Found(f"{by}: tensor {number} of {len(found)} has other bits")


def check_page(page: Path) -> None:
    """The page is complete, and its trace has boxes within each of the recorded steps."""
    text, trace = page.read_text(), json.loads(page.with_suffix(".json").read_text())
    if "<svg" not in text or not text.rstrip().endswith("</html>"):
        raise Found("the page is not complete")
    if len(steps := trace["otherData"]["steps"]) != RECORDED:
        raise Found(f"the trace has {len(steps)} steps, expected {RECORDED}")
    boxes = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    if any(not math.isfinite(e["ts"]) or not e["dur"] >= 0 for e in boxes):
        raise Found("the trace has a box without a time")
    for start, end in steps:
        kinds = {e["cat"] for e in boxes if start <= e["ts"] <= end}
        if lacking := {"forward", "backward", "optimizer"} - kinds:
            raise Found(f"a step has no box of {sorted(lacking)}, but {sorted(kinds)}")


def compared(*paths: Path) -> tuple[int, str]:
    with redirect_stdout(io.StringIO()) as out:
        status = compare([*map(str, paths)])
    return status, out.getvalue()


def draw(rng: random.Random) -> Program:
    is_exact = rng.random() < 0.2
    names = [*EXACT] if is_exact else [*LAYERS]
    layers = tuple(rng.choice(names) for _ in range(rng.randint(0, 4)))
    habits = ["clip", "closure", "evaluate", "penalty", "schedule", "skip", "keep"]
    return Program(
        layers=layers,
        optimizer=rng.choice([*OPTIMIZERS]),
        tied=rng.random() < 0.3,
        frozen=rng.randrange(len(layers)) if layers and rng.random() < 0.2 else None,
        micro=rng.choice([1, 1, 2, 3]),
        habits=frozenset(rng.sample(habits, rng.randint(0, 3))),
        exact=is_exact,
        seed=rng.randrange(1000),
    )


def trial(rng: random.Random) -> str:
    program = draw(rng)
    expected = train(program)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        page, first, second = folder / "step.html", folder / "first", folder / "second"
        if rng.random() < 0.6:
            check_same(train(program, partial(profile.replay, page)), expected, "replay")
            check_page(page)
        operators = rng.random() < 0.2
        record = partial(recording.record, operators=operators)
        check_same(train(program, lambda *_: record(first)), expected, "record")
        train(program, lambda *_: record(second))
        status, out = compared(first, second)
        if status:
            raise Found(f"two equal runs: {out}")
        names = [name for name, _ in make(program).named_parameters()]
        kind = rng.choice(["weight", "weight", "labels", "rate"])
        plant = Plant(kind, rng.randrange(STEPS), rng.randrange(len(names)))
        train(program, lambda *_: record(second), plant)
        status, out = compared(first, second)
        of = {
            "weight": f": weight {names[plant.index]}",
            "labels": ": operator aten.nll_loss" if operators else ": loss",
            "rate": ": setting lr",
        }
        if status != 1 or f"parted in step {plant.step}{of[kind]}" not in out:
            raise Found(f"{plant} of {names[plant.index]}: status {status}, {out.splitlines()[:3]}")
        stack.pop_all()
    return f"{program.optimizer} {kind}"


def draws() -> None:
    """Let the recording of steps draw a random number."""
    own_enter = replaying.Replay.__enter__

    def enter(self: replaying.Replay) -> replaying.Replay:
        torch.rand(1)
        return own_enter(self)

    replaying.Replay.__enter__ = enter  # type: ignore[method-assign]


def blind() -> None:
    """Let all checksums be equal."""
    from torchpar.exact.divergence import checksums

    own_take = checksums.HostRows.take
    checksums.HostRows.take = lambda rows: own_take(rows) * 0  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.exit(run(trial, {"blind": blind, "draws": draws}))
