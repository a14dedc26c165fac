# SPDX-License-Identifier: MIT
"""Models, optimizers and schedules of resumed runs, and the first difference of two outcomes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedules
from torch.optim import swa_utils

from torchpar.optim import ChainedOptimizer, Muon

FEATURES, CLASSES = 6, 3


class Net(nn.Module):
    """Layers of the kinds that a checkpoint treats in different ways."""

    def __init__(self, sparse: bool, dropout: bool):
        super().__init__()
        self.first = nn.Linear(FEATURES, 5)
        self.norm = nn.BatchNorm1d(5)
        self.drop = nn.Dropout(0.3 if dropout else 0.0)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.last = nn.Linear(5, CLASSES)
        self.table = nn.Embedding(7, CLASSES, sparse=True) if sparse else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.first(x.to(self.scale.dtype))).relu()
        y = self.last(self.drop(hidden) * self.scale)
        if self.table is not None:
            y = y + self.table(x[:, 0].abs().long() % 7)
        return y.float()


class TwoModes(torch.optim.SGD):
    """Plain SGD of weights z; judged are weights between z and their average, as schedule-free."""

    def __init__(self, params: Any, lr: float = 0.1):
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group["train_mode"] = True

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for p in self.param_groups[0]["params"]:
            mean = self.state[p].setdefault("mean", p.detach().clone())
            mean.lerp_(p.detach(), 0.3)
        return loss

    @torch.no_grad()
    def _switch(self, trains: bool, weight: float) -> None:
        for group in self.param_groups:
            for p in group["params"] if group["train_mode"] != trains else ():
                if "mean" in self.state[p]:
                    p.lerp_(self.state[p]["mean"], weight)
            group["train_mode"] = trains

    def eval(self) -> None:
        self._switch(False, 0.9)

    def train(self) -> None:
        self._switch(True, 1 - 1 / 0.1)


class Counting(torch.optim.SGD):
    """SGD with state in other kinds than tensors, as optimizers of other libraries have."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["count"] = state.get("count", 0) + 1
                state["history"] = [*state.get("history", []), p.detach().clone()][-2:]
                if p.grad is not None:
                    p.grad += 0.01 * state["count"] * state["history"][0]
        return super().step(closure)


def chain(muon: Any, model: nn.Module) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    return ChainedOptimizer(muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=0.01))


def pair(model: nn.Module) -> torch.optim.Optimizer:
    dense = [p for name, p in model.named_parameters() if "table" not in name]
    return ChainedOptimizer(
        torch.optim.SparseAdam([model.table.weight], lr=0.02),  # type: ignore[union-attr]
        torch.optim.Adagrad(dense, lr=0.05),
    )


def of(kind: str, **options: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: getattr(torch.optim, kind)(model.parameters(), **options)


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": of("SGD", lr=0.1),
    "SGD with momentum": of("SGD", lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "SGD, rate a tensor": lambda model: torch.optim.SGD(
        model.parameters(), torch.tensor(0.1), momentum=0.5
    ),
    **{
        kind: of(kind, lr=0.02)
        for kind in (
            *("Adadelta", "Adagrad", "Adafactor", "Adam", "AdamW", "Adamax", "ASGD", "NAdam"),
            *("RAdam", "RMSprop", "Rprop"),
        )
    },
    "AMSGrad": of("Adam", lr=0.02, amsgrad=True),
    "RMSprop, centered": of("RMSprop", lr=0.01, centered=True, momentum=0.5),
    "LBFGS": of("LBFGS", lr=0.1, max_iter=3, history_size=3),
    "LBFGS, line search": of("LBFGS", max_iter=2, line_search_fn="strong_wolfe"),
    "Muon and AdamW": partial(chain, Muon),
    "PyTorch's Muon and AdamW": partial(chain, torch.optim.Muon),
    "SparseAdam and Adagrad": pair,
    "two modes": lambda model: TwoModes(model.parameters()),
    "values of other kinds": lambda model: Counting(model.parameters(), lr=0.05),
}

Schedule = Callable[[torch.optim.Optimizer, int], Any]
SCHEDULES: dict[str, Schedule | None] = {
    "none": None,
    "step": lambda o, n: schedules.StepLR(o, 2, 0.5),
    "multi-step": lambda o, n: schedules.MultiStepLR(o, [1, 3, 4], 0.5),
    "constant": lambda o, n: schedules.ConstantLR(o, 0.5, 3),
    "linear": lambda o, n: schedules.LinearLR(o, 1.0, 0.0, n),
    "exponential": lambda o, n: schedules.ExponentialLR(o, 0.9),
    "cosine": lambda o, n: schedules.CosineAnnealingLR(o, n),
    "warm restarts": lambda o, n: schedules.CosineAnnealingWarmRestarts(o, 2, 2),
    "one cycle": lambda o, n: schedules.OneCycleLR(o, 0.2, total_steps=n, cycle_momentum=False),
    "cyclic": lambda o, n: schedules.CyclicLR(o, 0.01, 0.1, 3, cycle_momentum=False),
    "cyclic, decaying": lambda o, n: schedules.CyclicLR(
        o, 0.01, 0.1, 2, mode="exp_range", gamma=0.9, cycle_momentum=False
    ),
    "polynomial": lambda o, n: schedules.PolynomialLR(o, n, 2.0),
    "lambda": lambda o, n: schedules.LambdaLR(o, lambda step: 1 / (1 + step)),
    "multiplicative": lambda o, n: schedules.MultiplicativeLR(o, lambda step: 0.95),
    "averaging": lambda o, n: swa_utils.SWALR(o, 0.05, anneal_epochs=4),
    "in turn": lambda o, n: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, 1.0, 3), schedules.StepLR(o, 2, 0.5)], [3]
    ),
    "together": lambda o, n: schedules.ChainedScheduler(
        [schedules.ConstantLR(o, 0.5, 2), schedules.ExponentialLR(o, 0.9)]
    ),
}


def first_difference(a: Any, b: Any) -> str:
    """Where two nested values have other bits; "" if they have the same."""
    if type(a) is not type(b):
        return f": {a!r} and {b!r}"
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return f": {sorted(a.keys() ^ b.keys())}"
        return next((f".{k}{d}" for k in a if (d := first_difference(a[k], b[k]))), "")
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return f": {len(a)} and {len(b)}"
        pairs = enumerate(zip(a, b, strict=True))
        return next((f".{i}{d}" for i, (x, y) in pairs if (d := first_difference(x, y))), "")
    is_same = same_bits(a, b) if isinstance(a, Tensor) else a == b or (a != a and b != b)
    return "" if is_same else f": {a!r} and {b!r}"


def same_bits(a: Tensor, b: Tensor) -> bool:
    is_alike = a.dtype == b.dtype and a.shape == b.shape
    return is_alike and torch.equal(*(t.detach().reshape(-1).view(torch.uint8) for t in (a, b)))
