# SPDX-License-Identifier: MIT
"""Random programs of `Muon`, `Muon.for_model` and `ChainedOptimizer`, beside PyTorch's own
optimizers, and on several ranks beside Muon on whole matrices.

A program steps, changes settings, edits groups, drops gradients, and saves and loads the state.
Both optimizers do the same. A `ConfigError`, or the RuntimeError and NotImplementedError that
docstrings name, is the documented refusal.

On several ranks some of the matrices are sharded, each in its own way, and others are not. The
weights must have the bits of whole matrices, and nothing is refused but models without a matrix.
Some of these programs run in `torchpar.exact.mode`.
"""

import atexit
import copy
import itertools
import math
import random
import sys
from functools import cache, partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch._dynamo  # which an optimizer's first step would import
from driver import Found, Refused, run
from placed_muon import BOTH, FUSED, HOW, REFUSED, SPLIT, STYLES, Layer, Program, meshes_of, train
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from torchpar.errors import ConfigError
from torchpar.optim import ChainedOptimizer, Muon
from torchpar.optim import muon as muon_module
from torchpar.parallel.launch.local import PRELOAD, Ranks, fork_context

fault = ""  # of `train`
SIZES = (1, 2, 3, 8, 17, 32)
DTYPES = (torch.float32, torch.float32, torch.float32, torch.bfloat16)
# A step rounds numbers of the parameter's and of the update's size to float32 some times.
UNITS = 16


def exactly(matrix: Tensor, coefficients: Any, steps: int, eps: float) -> Tensor:
    """The Newton–Schulz iteration in float64, from and to bfloat16, in which Muon exchanges
    matrices."""
    x = matrix.bfloat16().double()
    wide = x.shape[0] > x.shape[1]
    x = x.T if wide else x
    x = x / x.norm().clamp(min=eps)
    a, b, c = coefficients
    for _ in range(steps):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return (x.T if wide else x).bfloat16()


def ours_exactly(matrices: Any, coefficients: Any, steps: int, eps: float, ns: str) -> list[Tensor]:
    return [exactly(matrix, coefficients, steps, eps) for matrix in matrices]


def orthogonalize_exactly() -> None:
    """Let both sides of this process orthogonalize in float64, and compare the rest of the
    optimizers.

    Rounding can change the update of an ill-conditioned matrix by much; tests/optim/test_optim.py
    judges it.
    """
    torch.optim._muon._zeropower_via_newtonschulz = exactly
    muon_module.orthogonalize_all = ours_exactly  # type: ignore[assignment]


class Both:
    """The parameters of both sides, and their optimizers."""

    def __init__(self, rng: random.Random):
        self.rng, self.steps, self.updates = rng, 0, 0.0
        self.done: list[str] = []
        kind = rng.choice(["muon", "muon", "model", "chain", "chain of chains"])
        self.kind, self.chained = kind, kind != "muon"
        if kind == "model":
            sizes = [rng.choice(SIZES) for _ in range(4)]
            self.model = nn.Sequential(*(nn.Linear(*pair) for pair in itertools.pairwise(sizes)))
            params = list(self.model.parameters())
        else:
            params = [
                nn.Parameter(torch.randn(rng.choice(SIZES), rng.choice(SIZES)))
                for _ in range(rng.randint(2, 5))
            ]
        self.ours = params
        self.theirs = [nn.Parameter(p.detach().clone()) for p in params]
        self.settings: dict[str, Any] = {
            "lr": rng.choice([0.1, 0.02, 1e-3]),
            "weight_decay": rng.choice([0.0, 0.1, 1.0]),
            "momentum": rng.choice([0.0, 0.9]),
            "nesterov": rng.random() < 0.5,
            "adjust_lr_fn": rng.choice([None, "original", "match_rms_adamw"]),
        }
        self.one, self.other = self.make()

    def make(self) -> tuple[Optimizer, list[Optimizer]]:
        """Ours, and the list of PyTorch's, whose groups in turn are ours."""
        muon = partial(Muon, ns="standard", **self.settings)
        theirs = partial(torch.optim.Muon, **self.settings)
        adamw = partial(AdamW, lr=1e-3, weight_decay=0.3)
        a, b = self.ours, self.theirs
        if self.kind == "muon":
            cut = self.rng.randrange(len(a) + 1)
            parts = [slice(0, cut), slice(cut, None)] if 0 < cut < len(a) else [slice(None)]
            rates = [self.rng.choice([0.1, 0.02]) for _ in parts]
            groups = [
                [{"params": p[s], "lr": lr} for s, lr in zip(parts, rates, strict=True)]
                for p in (a, b)
            ]
            return muon(groups[0]), [theirs(groups[1])]
        if self.kind == "model":
            given = dict(self.settings)
            one = Muon.for_model(self.model, given.pop("lr"), others=adamw, ns="standard", **given)
            pairs = dict(zip(map(id, a), b, strict=True))
            made = []
            for optimizer in one.optimizers:
                is_muon = isinstance(optimizer, Muon)
                groups = [
                    {
                        "params": [pairs[id(p)] for p in g["params"]],
                        "weight_decay": g["weight_decay"],
                    }
                    for g in optimizer.param_groups
                ]
                made.append((theirs if is_muon else adamw)(groups))
            return one, made
        if self.kind == "chain of chains" and len(a) > 2:
            one = ChainedOptimizer(ChainedOptimizer(muon(a[:1]), adamw(a[1:2])), muon(a[2:]))
            return one, [theirs(b[:1]), adamw(b[1:2]), theirs(b[2:])]
        return ChainedOptimizer(muon(a[:1]), adamw(a[1:])), [theirs(b[:1]), adamw(b[1:])]

    def groups(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        theirs = [group for optimizer in self.other for group in optimizer.param_groups]
        return list(zip(self.one.param_groups, theirs, strict=True))

    def do(self, what: str) -> None:
        self.done.append(what)
        getattr(self, what)()

    def step(self) -> None:
        for a, b in zip(self.ours, self.theirs, strict=True):
            grad = torch.randn_like(a) * self.rng.choice([1e-3, 1.0, 30.0])
            a.grad, b.grad = grad.clone(), grad.clone()
            self.forget(a, b)
        before = [p.detach().clone() for p in self.theirs]
        if self.rng.random() < 0.2:
            self.step_by_closure()
        else:
            self.one.step()
        for optimizer in self.other:
            optimizer.step()
        for i, (a, b, old) in enumerate(zip(self.ours, self.theirs, before, strict=True)):
            difference, update = (a - b).norm().item(), (b - old).norm().item()
            size = update + b.norm().item() + old.norm().item()
            if not difference <= UNITS * 2.0**-24 * size:
                who = f"parameter {i} of {self.kind} {tuple(a.shape)}"
                raise Found(
                    f"{who} differs by {difference:.2g}, its update is {update:.2g}; {self.done}"
                )
            with torch.no_grad():
                a.copy_(b)  # so that differences do not add up

    def step_by_closure(self) -> None:
        """A closure brings the gradients; before it there are others."""
        grads, calls = [p.grad for p in self.ours], [0]

        def closure() -> Tensor:
            calls[0] += 1
            for p, grad in zip(self.ours, grads, strict=True):
                p.grad = None if grad is None else grad * calls[0]
            return torch.tensor(2.5)

        for p in self.ours:
            p.grad = torch.ones_like(p)
        loss = self.one.step(closure)
        if loss != 2.5 or calls != [1]:
            raise Found(
                f"step(closure) returns {loss} after {calls[0]} calls of the closure; {self.done}"
            )

    def forget(self, a: nn.Parameter, b: nn.Parameter) -> None:
        """Leave a parameter without a gradient; both optimizers skip it."""
        if self.steps and self.rng.random() < 0.1:
            a.grad = b.grad = None

    def set_rate(self) -> None:
        for group, other in (self.rng.choice(self.groups()),):
            group["lr"] = other["lr"] = self.rng.choice([0.5, 0.01, 0.0])

    def set_decay(self) -> None:
        for group, other in (self.rng.choice(self.groups()),):
            group["weight_decay"] = other["weight_decay"] = self.rng.choice([0.0, 0.5])

    def schedule(self) -> None:
        factor = self.rng.choice([0.5, 0.1])
        for optimizer in (self.one, *self.other):
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: factor)
            for group in optimizer.param_groups:
                group.pop("initial_lr", None)

    def save_and_load(self) -> None:
        if self.kind == "model":
            state = copy.deepcopy(self.one.state_dict())
            self.one.load_state_dict(state)
            return
        states = [self.state_of(optimizer) for optimizer in (self.one, *self.other)]
        if None in states:
            if any(states):
                raise Found(f"only one side can save its state; {self.done}")
            raise Refused("the state of a parameter that is in no group")
        random_state = self.rng.getstate()
        self.one, self.other = self.make()
        self.rng.setstate(random_state)
        try:
            for optimizer, state in zip((self.one, *self.other), states, strict=True):
                optimizer.load_state_dict(state)
        except ValueError:
            # Groups of other sizes, which a cut at another place makes: both must refuse.
            raise Refused("state of other groups") from None

    @staticmethod
    def state_of(optimizer: Optimizer) -> Any:
        """The state dict; None where PyTorch has none, as after a group with states was deleted."""
        try:
            return copy.deepcopy(optimizer.state_dict())
        except KeyError:
            return None

    def delete_group(self) -> None:
        if self.chained or len(self.one.param_groups) < 2:
            return
        at = self.rng.randrange(len(self.one.param_groups))
        del self.one.param_groups[at], self.other[0].param_groups[at]

    def append(self) -> None:
        if self.chained:
            return
        new = nn.Parameter(torch.randn(3, 4))
        self.ours.append(new)
        self.theirs.append(nn.Parameter(new.detach().clone()))
        self.one.param_groups[0]["params"].append(self.ours[-1])
        self.other[0].param_groups[0]["params"].append(self.theirs[-1])

    def add_group(self) -> None:
        if self.chained:
            return
        new = nn.Parameter(torch.randn(5, 2))
        self.ours.append(new)
        self.theirs.append(nn.Parameter(new.detach().clone()))
        self.one.add_param_group({"params": [self.ours[-1]], "lr": 0.3})
        self.other[0].add_param_group({"params": [self.theirs[-1]], "lr": 0.3})

    def reverse_groups(self) -> None:
        if not self.chained:
            self.one.param_groups.reverse()
            self.other[0].param_groups.reverse()

    def copy(self) -> None:
        """Continue with a copy: its parameters are copies, too."""
        if self.kind != "muon":
            return
        (self.one, self.ours), (self.other, self.theirs) = copy.deepcopy(
            ((self.one, self.ours), (self.other, self.theirs))
        )


EDITS = (
    "set_rate",
    "set_decay",
    "schedule",
    "save_and_load",
    "delete_group",
    "append",
    "add_group",
    "reverse_groups",
    "copy",
)


@cache
def ranks() -> Ranks:
    fork_context([*PRELOAD, "placed_muon"])
    started = Ranks()
    atexit.register(started.close)
    return started


def draw_layer(rng: random.Random, mesh: tuple[int, ...], layers: list[Layer]) -> Layer:
    """A layer, or sometimes a layer with the weight of an earlier one."""
    alone = [i for i, layer in enumerate(layers) if layer.how not in (*STYLES, *SPLIT)]
    alone = [i for i in alone if not layers[i].how.startswith("fully_shard")]
    if alone and rng.random() < 0.1:
        twin = rng.choice(alone)
        first = twin if layers[twin].twin is None else layers[twin].twin
        return layers[twin]._replace(twin=first, name="")
    how = "whole" if rng.random() < 0.4 else rng.choice([*HOW, *[BOTH] * (len(mesh) > 1)])
    on, inputs, outputs = rng.choice(meshes_of(mesh, how)), rng.choice(SIZES), rng.choice(SIZES)
    free = [name for name in FUSED if all(layer.name != name for layer in layers)]
    if not free or rng.random() < 0.7:
        return Layer(inputs, outputs, how, on)
    name = rng.choice(free)
    return Layer(inputs, FUSED[name] * inputs, how, on, name=name)


def draw_program(rng: random.Random) -> Program:
    mesh = rng.choice([(2,), (2,), (3,), (2, 2)])
    layers: list[Layer] = []
    for _ in range(rng.randint(2, 6)):
        layers.append(draw_layer(rng, mesh, layers))
    count = len([layer for layer in layers if layer.twin is None])
    of_model, is_exact = rng.random() < 0.25, rng.random() < 0.3
    return Program(
        mesh=mesh,
        layers=tuple(layers),
        order=tuple(rng.sample(range(count), count)),
        cut=0 if of_model or rng.random() < 0.6 else rng.randrange(1, max(count, 2)) % count,
        of_model=of_model,
        group=rng.choice(["", "", "", "world", "mesh"]),
        named=rng.random() < 0.5,
        dtype=torch.float32 if is_exact else rng.choice(DTYPES),
        nesterov=rng.random() < 0.7,
        edits=tuple(
            rng.choice(["", "lr", "decay", "resume", "lose", "zeros"])
            for _ in range(rng.randint(1, 4))
        ),
        seed=rng.randrange(1000),
        exact=is_exact,
    )


def placed(rng: random.Random) -> str:
    """A program on several ranks."""
    program = draw_program(rng)
    outcomes = ranks().outcomes(math.prod(program.mesh), train, program, fault)
    if outcomes == [REFUSED] * len(outcomes):
        raise Refused("the model has no matrix for Muon")
    for rank, outcome in enumerate(outcomes):
        if outcome:
            raise Found(f"rank {rank}: {' '.join(str(outcome).split())[-200:]}; {program}")
    return "placed"


def trial(rng: random.Random) -> str:
    return placed(rng) if rng.random() < 0.5 else on_one_rank(rng)


def on_one_rank(rng: random.Random) -> str:
    both = None
    try:
        both = Both(rng)
        # Sixty steps show what begins late, such as a switch or a refresh.
        for _ in range(60 if rng.random() < 0.03 else rng.randint(2, 8)):
            both.do("step")
            both.steps += 1
            if rng.random() < 0.6:
                both.do(rng.choice(EDITS))
        both.do("step")
    except (ConfigError, NotImplementedError) as error:
        raise Refused(str(error)) from None
    except RuntimeError as error:
        if "make a new" in str(error):
            raise Refused(str(error)) from None
        raise Found(f"{error}; {both and both.done}") from error
    return both.kind


def decay_once_too_often() -> None:
    """Let Muon decay weights by twice the weight decay."""
    right = Muon._apply

    def wrong(self: Muon, group: dict[str, Any], tensors: Any) -> None:
        right(self, {**group, "weight_decay": 2 * group["weight_decay"]}, tensors)

    Muon._apply = wrong  # type: ignore[method-assign]


def closure_for_each() -> None:
    """Let each optimizer of a chain call the closure."""

    def wrong(self: ChainedOptimizer, closure: Any = None) -> Any:
        losses = [optimizer.step(closure) for optimizer in self.optimizers]
        return losses[0]

    ChainedOptimizer.step = wrong  # type: ignore[method-assign]


def results_of_all_exchanges() -> None:
    """Let an exchange of one rank alone return the results of all exchanges."""
    global fault
    fault = "exchange"


def late_rate() -> None:
    """Let the tenth step of each Muon, and all later ones, be 30% too large."""
    right, counts = Muon._apply, WeakKeyDictionary[Muon, int]()

    def wrong(self: Muon, group: dict[str, Any], tensors: Any) -> None:
        counts[self] = counts.get(self, 0) + (group is self.param_groups[0])
        rate = group["lr"] * (1.3 if counts[self] >= 10 else 1.0)
        right(self, {**group, "lr": rate}, tensors)

    Muon._apply = wrong  # type: ignore[method-assign]


FAULTS = {
    "late": late_rate,
    "decay": decay_once_too_often,
    "closure": closure_for_each,
    "exchange": results_of_all_exchanges,
}

if __name__ == "__main__":
    orthogonalize_exactly()
    sys.exit(run(trial, FAULTS))
