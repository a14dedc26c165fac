# SPDX-License-Identifier: MIT
"""Random training loops with `graphed`, on an emulated GPU, beside the same loops without it.

A loop draws where gradients become zero or None, what adds to them before the step, which
optimizers step, what is averaged, scheduled, loaded and edited, and the sizes of its batches. All
losses, gradients, weights and averages must have the bits of the plain loop, and the emulator must
see no error. A step that a graph would get wrong may be refused; others may not.
"""

import copy
import itertools
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from driver import Found, Refused, run
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel

from nogpu import cuda_is_cpu, emulate
from nogpu.cuda import capture
from torchpar.errors import ConfigError
from torchpar.training import graphed, leaf_gradients, muon
from torchpar.training.graphed import _GraphedStep

IN, OUT = 6, 3
RATES = (0.25, 0.125, 0.0625)  # which float32 holds exactly
WHERE = ("begin", "end", "before", "after", "some calls", "never")
EDITS = (
    *("drop a gradient", "scale a gradient", "replace a gradient", "drop the critic's"),
    *("rate", "rate", "decay", "argument", "loss weight", "save", "load", "load", "load model"),
)
# What a graph would get wrong, and a step may be refused for.
WRONG = ("counter", "averaged within", "unpassed", "random on the host", "skips the head")


class Plan:
    """What both loops do."""

    def __init__(self, rng: random.Random):
        draw = rng.choice
        self.seed = rng.randrange(1000)
        self.hidden, self.calls = draw([1, 2, 5, 8]), rng.randint(6, 12)
        self.optimizer = draw(["sgd", "sgd", "momentum", "adamw", "adamw", "muon"])
        self.layer = draw(["", "", "batch norm", "dropout", "unused"])
        self.zero, self.to_none = draw(WHERE), rng.random() < 0.6
        self.of_model = rng.random() < 0.5  # whose zero_grad is called
        self.every = draw([2, 3])
        self.passes = draw([1, 1, 2])
        self.penalty = draw(["", "", "each", "some calls"])
        self.critic = draw(["", "", "left", "trained before", "trained after"])
        self.norm = draw(["", "", "first", "clip"])
        self.second = rng.random() < 0.3
        self.host_weight = rng.random() < 0.3
        self.average = draw(["", "", "within", "outside"])
        self.wrong = draw(WRONG) if rng.random() < 0.15 else ""
        sizes = draw([[4], [4], [4, 4, 4, 3], [4, 4, 2, 2], [4, 2]])
        self.sizes = [*itertools.islice(itertools.cycle(sizes), self.calls)]
        self.edits: dict[int, list[str]] = {}
        for _ in range(draw([0, 0, 1, 2, 4])):
            self.edits.setdefault(rng.randrange(1, self.calls), []).append(draw(EDITS))

    def __str__(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if value)


class Loop:
    """A training loop; its results are in ``found``."""

    def __init__(self, plan: Plan, *, graph: bool):
        self.plan, self.graph, self.found = plan, graph, list[Tensor | None]()
        torch.manual_seed(plan.seed)
        middle = {"batch norm": nn.BatchNorm1d(plan.hidden), "dropout": nn.Dropout(0.25)}
        layer = middle.get(plan.layer, nn.Tanh())
        self.body = nn.Sequential(nn.Linear(IN, plan.hidden), layer, nn.Tanh()).cuda()
        self.head = nn.Linear(plan.hidden, OUT, device="cuda")
        self.critic = nn.Linear(OUT, 1, device="cuda")
        self.unused = nn.Linear(2, 2, device="cuda")
        self.average = AveragedModel(self.body)
        self.mean = self.head.weight.detach().clone()
        self.loss_weight = torch.tensor(0.5)
        modules = [self.body, self.head, *([self.unused] if plan.layer == "unused" else [])]
        apart = plan.second or plan.wrong in ("unpassed", "skips the head")
        parts = [modules[:1] + modules[2:], [self.head]] if apart else [modules]
        self.optimizers = [self._optimizer(nn.ModuleList(part)) for part in parts]
        self.critics = self._optimizer(self.critic, "sgd")
        self.everything = nn.ModuleList([*modules, self.critic])
        self.number, self.factor = 0, 1.0
        self.saved: list[Any] = []

    def _optimizer(self, model: nn.Module, kind: str = "") -> torch.optim.Optimizer:
        params, kind = list(model.parameters()), kind or self.plan.optimizer
        if kind == "muon":
            made = muon(nn.ModuleList(model.children()), RATES[0], momentum=0.5, weight_decay=0.125)
        elif kind == "adamw":
            made = torch.optim.AdamW(params, RATES[0], capturable=not self.graph)
        else:
            momentum = 0.5 if kind == "momentum" else 0.0
            made = torch.optim.SGD(params, RATES[0], momentum, fused=None if self.graph else True)
        self._set_rate(made, RATES[0])
        return made

    def _set_rate(self, optimizer: torch.optim.Optimizer, rate: float) -> None:
        """Set what `graphed` would, in the plain loop: there, the rate is a tensor, too."""
        for group in optimizer.param_groups:
            group["lr"] = rate if self.graph else torch.tensor(rate, device="cuda")
            if not self.graph and "nesterov" in group and "ns_steps" not in group:
                group["fused"], group["foreach"] = True, False

    def _zero(self) -> None:
        for one in [self.everything] if self.plan.of_model else self.optimizers:
            one.zero_grad(set_to_none=self.plan.to_none)

    def _step(self, x: Tensor, labels: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        plan = self.plan
        self.number += 1
        own = [p for one in self.optimizers for group in one.param_groups for p in group["params"]]
        norm = torch.zeros((), device="cuda")
        if plan.norm == "first":
            norm = sum((p.grad.square().sum() for p in own if p.grad is not None), norm)
        if plan.zero == "begin":
            self._zero()
        for _ in range(plan.passes):
            loss = self._loss(x, labels, factor)
            loss.backward()
        if plan.norm == "clip":
            norm = nn.utils.clip_grad_norm_([p for p in own if p.grad is not None], 0.5)
        for one in filter(self._is_due, self.optimizers):
            one.step()
        if plan.average == "within":
            self.mean.lerp_(self.head.weight.detach(), 0.25)
        if plan.wrong == "averaged within":
            self.average.update_parameters(self.body)
        if plan.zero == "end":
            self._zero()
        return loss, norm

    def _loss(self, x: Tensor, labels: Tensor, factor: float) -> Tensor:
        logits = self.head(self.body(x))
        loss = factor * cross_entropy(logits, labels)
        if self.plan.critic:
            loss = loss + self.critic(logits.tanh()).mean()
        if self.plan.host_weight:
            loss = loss * self.loss_weight
        if self.plan.wrong == "random on the host":
            loss = loss * (0.5 if torch.rand(()).item() < 0.5 else 1.0)
        return loss

    def _is_due(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the step updates by an optimizer; wrong steps decide it by their counter."""
        by_counter = self.plan.wrong == "counter" or (
            self.plan.wrong == "skips the head" and optimizer is self.optimizers[-1]
        )
        return not by_counter or self.number % self.plan.every == 1

    def run(self) -> None:
        plan, take = self.plan, self._step
        if self.graph:
            passed = self.optimizers[:1] if plan.wrong == "unpassed" else self.optimizers
            take = graphed(self._step, passed if len(passed) > 1 else passed[0], warmup=2)
        for number, size in enumerate(plan.sizes):
            generator = torch.Generator().manual_seed(100 * plan.seed + number)
            x = torch.randn(size, IN, generator=generator).cuda()
            labels = torch.randint(OUT, (size,), generator=generator).cuda()
            for edit in plan.edits.get(number, ()):
                self._edit(edit, number)
            self._before(number, x)
            outputs = [t.detach().clone() for t in take(x, labels, self.factor)]
            self.found += outputs
            self.found += [None if t is None else t.clone() for t in self._gradients()]
            self._after(number, x)
        modules = (self.body, self.head, self.critic, self.average.module)
        self.found += [t.detach().clone() for one in modules for t in one.state_dict().values()]
        self.found.append(self.mean)

    def _gradients(self) -> Iterator[Tensor | None]:
        yield from (p.grad for p in self.everything.parameters())

    def _before(self, number: int, x: Tensor) -> None:
        plan = self.plan
        if plan.zero == "before" or (plan.zero == "some calls" and number % plan.every == 0):
            self._zero()
        if plan.critic == "trained before":
            self._train_critic(x)
        if plan.penalty == "each" or (plan.penalty and number % plan.every == 0):
            (0.0625 * self.head.weight.square().sum()).backward()

    def _after(self, number: int, x: Tensor) -> None:
        if self.plan.zero == "after":
            self._zero()
        if self.plan.average == "outside":
            self.average.update_parameters(self.body)
        if self.plan.critic == "trained after":
            self._train_critic(x)

    def _train_critic(self, x: Tensor) -> None:
        """Train what the step leaves gradients in, with them or without."""
        if self.plan.to_none:
            self.critics.zero_grad()
        with torch.no_grad():
            logits = self.head(self.body.eval()(x))
        self.body.train()
        (-self.critic(logits).square().mean()).backward()
        self.critics.step()

    def _edit(self, edit: str, number: int) -> None:
        p, one = self.head.weight, self.optimizers[0]
        edits: dict[str, Callable[[], object]] = {
            "drop a gradient": lambda: setattr(p, "grad", None),
            "scale a gradient": lambda: p.grad is None or p.grad.mul_(0.5),
            "replace a gradient": lambda: setattr(p, "grad", torch.full_like(p, 0.125)),
            "drop the critic's": self.critic.zero_grad,
            "rate": lambda: [self._set_rate(x, RATES[1 + number % 2]) for x in self.optimizers],
            "decay": lambda: [group.update(weight_decay=0.25) for group in one.param_groups],
            "argument": lambda: setattr(self, "factor", self.factor / 2),
            "loss weight": lambda: self.loss_weight.mul_(0.5),
            "save": self._save,
            "load": self._load,
            "load model": lambda: self.saved and self.head.load_state_dict(self.saved[1]),
        }
        edits[edit]()

    def _save(self) -> None:
        self.saved = [copy.deepcopy(one.state_dict()) for one in (self.optimizers[0], self.head)]

    def _load(self) -> None:
        if self.saved:
            self.optimizers[0].load_state_dict(copy.deepcopy(self.saved[0]))
            self._set_rate(self.optimizers[0], RATES[0])


def same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.equal(a.nan_to_num(7e9), b.nan_to_num(7e9))


def trial(rng: random.Random) -> str:
    plan = Plan(rng)
    loops = []
    for graph in (False, True):
        with emulate() as gpu, cuda_is_cpu(gpu), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loop = Loop(plan, graph=graph)
            loops.append(loop)
            try:
                loop.run()
            except ConfigError as error:
                if graph and plan.wrong:
                    raise Refused(f"{plan.wrong}: {error}") from None
                raise Found(f"{error}; {plan}") from error
            errors = [str(one) for one in gpu.faults if one.kind == "error"]
            if errors:
                raise Found(f"the emulator says {errors[0]}; {plan}")
    pairs = zip(loops[0].found, loops[1].found, strict=True)
    wrong = [number for number, (a, b) in enumerate(pairs) if not same(a, b)]
    if wrong:
        raise Found(f"results {wrong[:3]} of {len(loops[0].found)} differ; {plan}")
    return plan.wrong or "equal"


def nothing(*args: Any, **kwargs: Any) -> None: ...


def plant(owner: Any, name: str, value: Any) -> Callable[[], None]:
    return partial(setattr, owner, name, value)


def without_comparison() -> None:
    """Let a replay begin with whatever gradients there are."""
    leaf_gradients.LeafGradients.fit = lambda self: True  # type: ignore[method-assign]
    leaf_gradients.LeafGradients.begin = nothing  # type: ignore[method-assign]


FAULTS = {
    "gradients": without_comparison,
    "copies": plant(leaf_gradients.LeafGradients, "begin", nothing),
    "others": plant(leaf_gradients, "_leaves", lambda: ()),
    "steps": plant(_GraphedStep, "_check_steps", lambda self, *call: self._steps.setdefault(*call)),
    "unpassed": plant(_GraphedStep, "_check_is_known", nothing),
    "pool": plant(capture.Capture, "_is_outside", lambda self, memory: memory.graph is None),
}

if __name__ == "__main__":
    sys.exit(run(trial, FAULTS))
