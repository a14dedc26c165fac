# SPDX-License-Identifier: MIT
"""A training step on one rank: checked with a float64 oracle, its collectives counted, and timed.

`benchmarks.scaling` runs `prepare`, `time_steps` and `time_all_reduces` on ranks of
`torchpar.parallel.launch.local`.
"""

import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.timing import time_calls
from torchpar import ieee
from torchpar.nn import MLP
from torchpar.parallel.launch.local import current_world
from torchpar.parallel.launch.world import World
from torchpar.parallel.split.exact_gradients import ExactGradients
from torchpar.parallel.split.layers import Arithmetic, split_parameters
from torchpar.parallel.split.mlp import parallel_mlp
from torchpar.parallel.split.shared_memory import make_shared_sum, register_shared_memory_hook
from torchpar.profile.collectives import Collectives
from torchpar.training import cost, loss_sum, sgd

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
cross_entropy_sum = partial(loss_sum, "cross-entropy")


@dataclass(frozen=True)
class Configuration:
    """A training step: the model, the batch over all ranks, and how both are split over ranks."""

    sizes: tuple[int, ...]
    batch: int
    dp: int = 1
    tp: int = 1
    threads: int = 1
    arithmetic: Arithmetic = "fast"

    @property
    def ranks(self) -> int:
        return self.dp * self.tp

    @property
    def one_rank(self) -> "Configuration":
        """The same step on one rank with one thread."""
        return Configuration(self.sizes, self.batch)

    @property
    def tensor_split(self) -> bool:
        """Whether the layers are those of `parallel_mlp`, also on one rank."""
        return self.tp > 1 or self.arithmetic == "exact"

    @property
    def oversubscribed(self) -> bool:
        return self.ranks * self.threads > CORES

    @property
    def model(self) -> str:
        return "-".join(map(str, self.sizes))

    @property
    def name(self) -> str:
        if self.ranks == 1:
            return f"1 rank × {self.threads} thread{'s' if self.threads > 1 else ''}"
        return " × ".join(f"{name} {n}" for name, n in (("dp", self.dp), ("tp", self.tp)) if n > 1)


class Prepared(NamedTuple):
    """The findings of a rank before its steps are timed.

    Attributes:
        reason: why the step is wrong, or "".
        error: of the gradient, over the norm of the exact one.
        calls, call_bytes: collectives of a step and their bytes, as recorded.
        predicted_calls, predicted_bytes: the same by `torchpar.training.cost`.
    """

    reason: str
    error: float
    calls: int
    call_bytes: int
    predicted_calls: int
    predicted_bytes: int


class Step(NamedTuple):
    """A configuration's model, its optimizer and this rank's share of the batch."""

    configuration: Configuration
    world: World
    model: torch.nn.Module
    wrapped: torch.nn.Module
    optimizer: torch.optim.Optimizer
    x: Tensor
    labels: Tensor
    exact_gradients: ExactGradients | None

    def gradients(self) -> Tensor:
        """Set the gradients; this rank's part of the sum of the losses."""
        batch = self.configuration.batch
        if self.exact_gradients is not None:
            exact_loss = ieee.cross_entropy_sum(self.model(self.x), self.labels)
            (exact_loss / batch).backward()
            self.exact_gradients()
            return exact_loss.detach()
        loss: Tensor = cross_entropy_sum(self.wrapped(self.x), self.labels)
        (loss * (self.configuration.dp / batch)).backward()  # DistributedDataParallel averages over dp
        return loss.detach()

    def run(self) -> None:
        self.gradients()
        self.optimizer.step()
        self.model.zero_grad()


def prepare(configuration: Configuration) -> Prepared:
    """Check the step, and count what it sends."""
    step = _step(configuration)
    reason, error = _check(step)
    step.run()  # in which DistributedDataParallel rebuilds its buckets
    with Collectives(step.world) as recorded:
        step.run()
    sent = [call.bytes for call in recorded.calls if call.operation != "recv"]
    expected = cost.collectives(
        configuration.sizes,
        configuration.batch,
        step.world.mesh,
        tensor_split=configuration.tensor_split,
        arithmetic=configuration.arithmetic,
    )
    predicted = [e.nbytes for e in expected if e.operation != "recv"]
    return Prepared(reason, error, len(sent), sum(sent), len(predicted), sum(predicted))


def time_steps(configuration: Configuration, count: int) -> list[float]:
    """Seconds of each of ``count`` steps, after one that warms up."""
    return _times(_step(configuration).run, count)


def time_all_reduces(nbytes: int, count: int) -> list[float]:
    """Seconds of each of ``count`` all-reduces over all ranks, after one that is checked."""
    world = current_world()
    t = world.sum(torch.ones(nbytes // 4))
    if not (t == world.world_size).all():
        raise RuntimeError(f"an all-reduce of ones gave {t[0]}, expected {world.world_size}")
    t.zero_()
    return _times(lambda: world.sum(t), count)


def time_shared_sums(nbytes: int, count: int) -> list[float]:
    """The same through shared memory."""
    world, t = current_world(), torch.ones(nbytes // 4)
    add = make_shared_sum(world.mesh.get_group("dp"), [t.shape], t.dtype, world.timeout)
    if add is None:
        raise RuntimeError("the ranks cannot share memory")
    add([t])
    if not (t == world.world_size).all():
        raise RuntimeError(f"a sum of ones gave {t[0]}, expected {world.world_size}")
    t.zero_()
    return _times(lambda: add([t]), count)


def _times(call: Callable[[], object], count: int) -> list[float]:
    call()
    return [time_calls(call).seconds() for _ in range(count)]


def use_default_polling() -> None:
    """Schedule gloo's polling thread as gloo leaves it; `join_world` has put it under SCHED_BATCH."""
    for task in Path("/proc/self/task").glob("*"):
        with suppress(OSError):
            if (task / "comm").read_text().strip() == "gloo_tcp_loop":
                os.sched_setscheduler(int(task.name), os.SCHED_OTHER, os.sched_param(0))


def forget() -> None:
    """Drop models and groups, before the ranks leave."""
    _step.cache_clear()
    _mesh.cache_clear()


@cache
def _mesh(dp: int, tp: int) -> World:
    return current_world().with_mesh(dp=dp, tp=tp)


@cache
def _step(configuration: Configuration) -> Step:
    world, exact = _mesh(configuration.dp, configuration.tp), configuration.arithmetic == "exact"
    model, x, labels = _unsplit(configuration)
    if configuration.tensor_split:
        model = parallel_mlp(model, world.mesh["tp"], configuration.arithmetic)
    wrapped: torch.nn.Module = model
    if configuration.dp > 1 and not exact:
        group = world.mesh["dp"].get_group()
        wrapped = replica = DistributedDataParallel(model, process_group=group, gradient_as_bucket_view=True)
        register_shared_memory_hook(replica, world)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    if exact:
        optimizer = sgd(model, lr=1e-3, momentum=0.0, weight_decay=0.0, arithmetic="exact")
    share = world.share(configuration.batch)
    x, labels = share.narrow(x, 0).clone(), share.narrow(labels, 0).clone()
    exact_gradients = ExactGradients(model, world) if exact else None
    return Step(configuration, world, model, wrapped, optimizer, x, labels, exact_gradients)


def _unsplit(configuration: Configuration) -> tuple[MLP, Tensor, Tensor]:
    """The whole model and the whole batch, the same on every rank."""
    torch.manual_seed(0)
    mlp = MLP(configuration.sizes)
    x = torch.rand(configuration.batch, configuration.sizes[0])
    return mlp, x, torch.randint(configuration.sizes[-1], (configuration.batch,))


def _check(step: Step) -> tuple[str, float]:
    """Why the step is wrong, or "", and the error of its gradient."""
    batch = step.configuration.batch
    whole, x, labels = _unsplit(step.configuration)
    losses, grads = [], []
    for dtype in (torch.float32, torch.float64):
        single = whole.to(dtype)
        loss = cross_entropy_sum(single(x.to(dtype)), labels) / batch
        names, parameters = zip(*single.named_parameters(), strict=True)
        own = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
        for name, axis, layer in split_parameters(step.model):
            own[name] = layer.partition.narrow(own[name], axis)
        losses.append(loss.item())
        grads.append(_flat(own))
    part = step.gradients()
    total = step.world.sum(part.double() * step.world.owns_outputs).item() / batch
    grad = _flat({name: p.grad for name, p in step.model.named_parameters() if p.grad is not None})
    step.model.zero_grad()
    return compare_with_one_rank(grad, (grads[0], grads[1]), total, (losses[0], losses[1]), batch)


def _flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def compare_with_one_rank(
    grad: Tensor, grads: tuple[Tensor, Tensor], loss: float, losses: tuple[float, float], batch: int
) -> tuple[str, float]:
    """Why a step's gradient and loss are not one rank's in float32 and float64, or ""; and the error.

    The gradient may be off from float64's by twice what one rank's float32 one is, in the norm over all of
    a rank's parameters, whose hundreds of roundings a parameter make it steady. The loss, a single number,
    may be off by as much and by a rounding, of random sign, for each sample that is added.
    """
    (grad32, grad64), (loss32, loss64) = grads, losses
    norm = grad64.norm().item()
    error = (grad - grad64).norm().item() / norm
    allowed = 2 * (grad32 - grad64).norm().item() / norm
    if not error <= allowed:
        return f"the gradient is off by {error:.1e} of its norm, {allowed:.1e} are allowed", error
    off = abs(loss - loss64)
    may = 2 * abs(loss32 - loss64) + math.sqrt(batch) * torch.finfo(torch.float32).eps / 2 * abs(loss64)
    if not off <= may:
        return f"the loss is off by {off:.1e}, {may:.1e} are allowed", error
    return "", error
