# SPDX-License-Identifier: MIT
"""Random runs that are stopped and resumed: the bits of the run that was not stopped.

A trial draws a model in float32, bfloat16 or float64, an optimizer and a schedule, and what the
loop keeps beside them: an average of the weights, a gradient scaler, a generator, and random
numbers of Python, NumPy and PyTorch. The run is stopped once or more, by SIGTERM within an epoch or
after an epoch, on one rank or on two. Weights, averages, the optimizer's state and all figures are
those of the whole run. Where an average or a scaler is not given to `Run`, it is refused.
"""

import atexit
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from driver import Found, Refused, run
from resumed import CLASSES, FEATURES, OPTIMIZERS, SCHEDULES, Net, first_difference
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import swa_utils

from torchpar.data import Samples
from torchpar.errors import ConfigError
from torchpar.parallel import GradScaler, World, join_world
from torchpar.parallel.launch.local import PRELOAD, Ranks, fork_context
from torchpar.training import (
    CheckpointConfig,
    Classification,
    Run,
    Stopped,
    optimizer_state,
    unsaved,
)
from torchpar.training import stateful as kept

BATCH, SAMPLES = 8, 20
STEPS = -(-SAMPLES // BATCH)  # of an epoch
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


AVERAGES: dict[str, Callable[[nn.Module], nn.Module] | None] = {
    "none": None,
    "mean": swa_utils.AveragedModel,
    "ema": lambda m: swa_utils.AveragedModel(
        m, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
    ),
    "function": lambda m: swa_utils.AveragedModel(m, avg_fn=lambda a, b, n: a * 0.5 + b * 0.5),
}

JUDGES = "model", "average", "function of the average"


class Drawn(NamedTuple):
    """A run, in words."""

    optimizer: str
    schedule: str
    average: str
    scaler: str
    dtype: str
    dropout: bool
    noise: str
    judged: str
    every: int | None
    asynchronous: bool
    ranks: int
    epochs: int
    stops: tuple[int, ...]  # steps after which the run is stopped
    seed: int


def draw(rng: random.Random) -> Drawn:
    optimizer, epochs = rng.choice([*OPTIMIZERS]), rng.randint(1, 3)
    average = rng.choice([*AVERAGES])
    by_closure = optimizer.startswith("LBFGS")
    return Drawn(
        optimizer,
        rng.choice([*SCHEDULES]),
        average,
        rng.choice(("none", "PyTorch's", "ours")) if not by_closure else "none",
        rng.choice([*DTYPES]),
        rng.random() < 0.5 and not by_closure,
        rng.choice(("none", "torch", "python", "numpy", "own", "own of NumPy")),
        rng.choice(JUDGES[: 1 if average == "none" else 3]),
        rng.choice((None, 1, 2, 4)),
        rng.random() < 0.2,
        1 if rng.random() < 0.8 else 2,
        epochs,
        tuple(rng.randint(1, STEPS * epochs) for _ in range(rng.randint(1, 2))),
        rng.getrandbits(32),
    )


def samples(n: int, seed: int) -> Samples:
    x = torch.randn(n, FEATURES, generator=torch.Generator().manual_seed(seed))
    return Samples(x, x[:, :CLASSES].argmax(1), classes=("a", "b", "c"))


class Loop:
    """A training loop, and what it keeps beside its run.

    Args:
        drawn: the run.
        stop: the step after which SIGTERM comes; None for a run to the end.
    """

    def __init__(self, drawn: Drawn, world: World, stop: int | None):
        self.drawn, self.world, self.stop = drawn, world, stop
        self.model = Net("Sparse" in drawn.optimizer, drawn.dropout).to(DTYPES[drawn.dtype])
        self.optimizer = OPTIMIZERS[drawn.optimizer](self.model)
        make = SCHEDULES[drawn.schedule]
        self.scheduler = make(self.optimizer, STEPS * drawn.epochs) if make else None
        average = AVERAGES[drawn.average]
        self.average: Any = average(self.model) if average else None
        options: Any = {"init_scale": 2.0**6, "growth_interval": 2}
        self.scaler: Any = None
        if drawn.scaler == "PyTorch's":
            self.scaler = torch.amp.GradScaler("cpu", **options)
        elif drawn.scaler == "ours":
            self.scaler = GradScaler(world, **options)
        self.own: Any = None
        if drawn.noise == "own":
            self.own = torch.Generator().manual_seed(5)
        elif drawn.noise == "own of NumPy":
            self.own = np.random.default_rng(5)

    @property
    def stateful(self) -> dict[str, Any]:
        found = {"average": self.average, "scaler": self.scaler, "own": self.own}
        return {name: one for name, one in found.items() if one is not None}

    @property
    def predict(self) -> Any:
        judges = {"average": self.average, "function of the average": lambda x: self.average(x)}
        return judges.get(self.drawn.judged)

    def noise(self) -> float:
        draws: dict[str, Callable[[], float]] = {
            "torch": lambda: torch.rand(()).item(),
            "python": random.random,
            "numpy": np.random.rand,  # programs draw from the global one
            "own": lambda: torch.rand((), generator=self.own).item(),
            "own of NumPy": lambda: self.own.random(),
        }
        return draws.get(self.drawn.noise, lambda: 0.0)()

    def backward(self, x: Tensor, labels: Tensor, size: int) -> Tensor:
        """Compute the gradients; return this rank's sum of the losses."""
        self.optimizer.zero_grad()
        loss = cross_entropy(self.model(x), labels, reduction="sum")
        mean = loss * self.world.dp_size / size
        (self.scaler.scale(mean) if self.scaler else mean).backward()
        for p in self.model.parameters() if self.world.dp_size > 1 else ():
            gradient: Any = p.grad
            dense = gradient.to_dense() if gradient.is_sparse else gradient
            torch.distributed.all_reduce(dense)
            dense /= self.world.dp_size
            p.grad = dense.to_sparse(1) if gradient.is_sparse else dense
        return loss.detach()

    def step(self, x: Tensor, labels: Tensor, size: int) -> Tensor:
        optimizer: Any = self.optimizer
        backward = partial(self.backward, x + self.noise(), labels, size)
        if self.drawn.optimizer.startswith("LBFGS"):
            losses: list[Tensor] = []

            def closure() -> Tensor:
                losses.append(backward())
                return self.world.sum(losses[-1].clone())  # the same on all ranks

            optimizer.step(closure)
            return losses[0]
        loss = backward()
        if self.scaler:
            self.scaler.step(optimizer)
            self.scaler.update()
        else:
            optimizer.step()
        return loss

    def train(self, run: Run) -> None:
        run.resume()
        for epoch in run.epochs():
            for batch in run.batches(epoch):
                loss = self.step(*batch)
                if self.scheduler:
                    self.scheduler.step()
                if self.average is not None:
                    self.average.update_parameters(self.model)
                if run.total_steps + 1 == self.stop:
                    os.kill(os.getpid(), signal.SIGTERM)
                run.end_step(loss_sum=loss)
            run.end_epoch()

    def outcome(self, run: Run) -> dict[str, Any]:
        state = {
            f"{name}.{key}": value
            for name, p in self.model.named_parameters()
            for key, value in self.optimizer.state.get(p, {}).items()
        }
        return {
            "steps": run.total_steps,
            "weights": dict(self.model.state_dict()),
            "state": state,
            "figures": [(r.epoch, r.train_loss, r.test_loss, r.test_accuracy) for r in run.results],
            "rates": [float(group["lr"]) for group in self.optimizer.param_groups],
            "average": dict(self.average.state_dict()) if self.average is not None else {},
            "scale": self.scaler.state_dict() if self.scaler else {},
            "next": [random.random(), np.random.rand(), torch.rand(()).item(), self.noise()],  # noqa: NPY002
        }


def train(drawn: Drawn, folder: str, stop: int | None, gives: bool = True) -> dict[str, Any]:
    """Train from the newest checkpoint, until the run is stopped after a step, or to the end.

    Args:
        gives: whether `Run` is given what the loop keeps.
    """
    with join_world("cpu") as world:
        torch.manual_seed(drawn.seed)
        random.seed(drawn.seed)
        np.random.seed(drawn.seed)  # noqa: NPY002
        loop = Loop(drawn, world, stop)
        task = Classification(samples(SAMPLES, 1), samples(9, 2), BATCH, predict=loop.predict)
        run = Run(
            loop.model,
            loop.optimizer,
            loop.scheduler,
            world,
            task,
            epochs=drawn.epochs,
            checkpoint=CheckpointConfig(Path(folder), drawn.every, 2, drawn.asynchronous),
            stateful=loop.stateful if gives else None,
        )
        with contextlib.suppress(Stopped), run:
            loop.train(run)
        return loop.outcome(run)


@cache
def ranks() -> Ranks:
    fork_context([*PRELOAD, "torchpar.training", "resumes"])
    started = Ranks()
    atexit.register(started.close)
    return started


def train_on(drawn: Drawn, folder: str, stop: int | None) -> list[dict[str, Any]]:
    if drawn.ranks == 1:
        return [train(drawn, folder, stop)]
    return ranks()(drawn.ranks, train, drawn, folder, stop)


def trial(rng: random.Random) -> str:
    drawn = draw(rng)
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        beside = drawn.average != "none" or drawn.scaler != "none"
        if beside and drawn.ranks == 1 and rng.random() < 0.2:
            return refused(drawn, str(folder / "refused"))
        whole = train_on(drawn, str(folder / "whole"), None)
        for stop in (*sorted(drawn.stops), None):
            parts = train_on(drawn, str(folder / "parts"), stop)
        for rank, (one, other) in enumerate(zip(whole, parts, strict=True)):
            for name in one:
                if difference := first_difference(one[name], other[name]):
                    raise Found(f"{name}{difference} differs on rank {rank} after {drawn}")
        return f"{drawn.optimizer} {whole[0]['steps']}"
    except ConfigError as e:
        raise Found(f"{e} after {drawn}") from e
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def refused(drawn: Drawn, folder: str) -> str:
    try:
        train(drawn, folder, None, gives=False)
    except ConfigError as e:
        if "a resumed run would lose" in str(e):
            raise Refused(str(e)) from e
        raise
    raise Found(f"an average or a scaler was not given, and was not refused after {drawn}")


def loses() -> None:
    """Let checkpoints hold nothing of objects beside the model."""
    vars(kept)["objects_of"] = lambda _: {}
    from torchpar.training import state

    vars(state)["objects_of"] = lambda _: {}


def rounds() -> None:
    """Let the optimizer's state come back in the dtype of its parameter."""
    from torchpar.training import state

    own = optimizer_state.optimizer_tensors

    def rounded(of: Any, folder: Any, shapes: Any, dtypes: Any, host: Any) -> Any:
        model = dict(of.model.named_parameters())
        dtypes = {
            key: model[max((n for n in model if f".{n}." in key), key=len)].dtype
            if key.startswith("optimizer.")
            else dtype
            for key, dtype in dtypes.items()
        }
        return own(of, folder, shapes, dtypes, host)

    vars(state)["optimizer_tensors"] = rounded


def forgets() -> None:
    """Let checkpoints hold PyTorch's random numbers alone."""
    from torchpar.training import state

    own = kept.generators
    vars(state)["generators"] = lambda: {"cpu": own()["cpu"]}


def blind() -> None:
    """Let `Run` look at nothing beside the model."""
    vars(unsaved)["_reachable"] = lambda _: iter(())


if __name__ == "__main__":
    faults = {"loses": loses, "rounds": rounds, "forgets": forgets, "blind": blind}
    sys.exit(run(trial, faults))
