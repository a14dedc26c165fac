# SPDX-License-Identifier: MIT
"""What runs on the ranks: a step is checked by a float64 oracle, its calls are counted, and it is timed.

The ranks are processes that form a world and wait between calls. What has no underscore is called there
by `Ranks.all` and `Ranks.slowest`.
"""

import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import cache, partial
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.scaling.plan import Configuration
from torchpar.collectives import Collectives
from torchpar.nn import MLP
from torchpar.parallel import cost
from torchpar.parallel.cost import Expected
from torchpar.parallel.layers import split_parameters
from torchpar.parallel.mlp import parallel_mlp
from torchpar.parallel.step import InvariantStep, ReplicaStep, Step
from torchpar.parallel.world import World, join_world
from torchpar.phases import NoPhases
from torchpar.training import loss_sum

_cross_entropy = partial(loss_sum, "cross-entropy")
_joined = ExitStack()
_world: World


class _Job(NamedTuple):
    """A configuration, ready to run on this rank."""

    world: World
    model: torch.nn.Module
    step: Step
    optimizer: torch.optim.Optimizer
    x: Tensor
    labels: Tensor
    batch: int

    def gradients(self) -> Tensor:
        return self.step.gradients(self.x, self.labels, self.batch, _cross_entropy, NoPhases())

    def run(self) -> None:
        self.gradients()
        self.optimizer.step()
        self.model.zero_grad()


class Prepared(NamedTuple):
    """What a rank found before the timing.

    Attributes:
        reason: why the step is not right, else "".
        error: of the gradient, over the norm of the exact one.
        calls: a step's collectives and their bytes, recorded.
    """

    reason: str
    error: float
    calls: int
    call_bytes: int
    expected: list[Expected]


def prepare(configuration: Configuration) -> Prepared:
    job = _job(configuration)
    reason, error = _check(configuration, job)
    job.run()  # in which DistributedDataParallel rebuilds its buckets
    recorded = Collectives(job.world)
    with recorded:
        job.run()
    sent = [call.bytes for call in recorded.calls if call.operation != "recv"]
    return Prepared(reason, error, len(sent), sum(sent), expected(configuration))


def expected(configuration: Configuration) -> list[Expected]:
    """What this rank is predicted to send in a step."""
    mesh = _split(configuration.dp, configuration.tp).mesh
    sizes, batch, ranks = configuration.sizes, configuration.batch, configuration.ranks
    return cost.collectives(sizes, batch, mesh, ranks, reduction=configuration.reduction)


def time_steps(configuration: Configuration, count: int) -> list[float]:
    return _times(_job(configuration).run, count)


def time_all_reduces(nbytes: int, count: int) -> list[float]:
    t = _world.sum(torch.ones(nbytes // 4))
    if not (t == _world.world_size).all():
        raise RuntimeError(f"an all-reduce of ones gave {t[0]}, expected {_world.world_size}")
    t.zero_()
    return _times(lambda: _world.sum(t), count)


def _times(call: Callable[[], object], count: int) -> list[float]:
    """Seconds of each of ``count`` calls, after one that warms up."""
    times = []
    for _ in range(1 + count):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times[1:]


@cache
def _split(dp: int, tp: int) -> World:
    return _world.split(dp=dp, tp=tp)


@cache
def _job(configuration: Configuration) -> _Job:
    world = replace(_split(configuration.dp, configuration.tp), reduction=configuration.reduction)
    assert world.mesh is not None
    model, x, labels = _whole(configuration)
    if configuration.tp > 1 or configuration.reduction == "invariant":
        model = parallel_mlp(model, world.mesh["tp"], configuration.reduction)
    step: Step
    if configuration.reduction == "invariant":
        step = InvariantStep(model, world)
    else:
        forward: torch.nn.Module = model
        if configuration.dp > 1:
            group = world.mesh["dp"].get_group()
            forward = DistributedDataParallel(model, process_group=group, gradient_as_bucket_view=True)
        step = ReplicaStep(forward, configuration.dp)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    share = world.share(configuration.batch)
    x, labels = share.narrow(x, 0).clone(), share.narrow(labels, 0).clone()
    return _Job(world, model, step, optimizer, x, labels, configuration.batch)


def _whole(configuration: Configuration) -> tuple[MLP, Tensor, Tensor]:
    """The model and the batch, the same on every rank."""
    torch.manual_seed(0)
    mlp = MLP(configuration.sizes)
    x = torch.rand(configuration.batch, configuration.sizes[0])
    return mlp, x, torch.randint(configuration.sizes[-1], (configuration.batch,))


def _check(configuration: Configuration, job: _Job) -> tuple[str, float]:
    """Why the step is wrong, and the error of its gradient."""
    whole, x, labels = _whole(configuration)
    losses, grads = [], []
    for dtype in (torch.float32, torch.float64):
        single = whole.to(dtype)
        loss = _cross_entropy(single(x.to(dtype)), labels) / job.batch
        names, parameters = zip(*single.named_parameters(), strict=True)
        own = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
        for name, axis, layer in split_parameters(job.model):
            own[name] = layer.partition.narrow(own[name], axis)
        losses.append(loss.item())
        grads.append(_flat(own))
    part = job.gradients()
    total = job.world.sum(part.double() * job.world.counts).item() / job.batch
    grad = _flat({name: p.grad for name, p in job.model.named_parameters() if p.grad is not None})
    job.model.zero_grad()
    return compare(grad, (grads[0], grads[1]), total, (losses[0], losses[1]), job.batch)


def _flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def compare(
    grad: Tensor, grads: tuple[Tensor, Tensor], loss: float, losses: tuple[float, float], batch: int
) -> tuple[str, float]:
    """Why a step's gradient and loss are not one process's in float32 and float64, else "", and the error.

    The gradient may be off from float64's by twice what one process's float32 one is, in the norm over
    all of a rank's parameters, whose hundreds of roundings a parameter make it steady. The loss, a
    single number, by as much and by a rounding, of random sign, for each sample that is added.
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


class Ranks(NamedTuple):
    """Processes of one thread or more each, one for each rank."""

    workers: list[ProcessPoolExecutor]

    def all(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """The result of a module-level ``function`` on each rank."""
        futures = [worker.submit(function, *args) for worker in self.workers]
        return [future.result() for future in futures]

    def slowest(self, function: Callable[..., Sequence[float]], *args: Any) -> list[float]:
        """For each of the numbers that ``function`` returns, the largest of all ranks'."""
        return [max(times) for times in zip(*self.all(function, *args), strict=True)]


@contextmanager
def start_ranks(ranks: int, threads: int = 1, calm: bool = True) -> Iterator[Ranks]:
    """``ranks`` processes of ``threads`` threads each.

    Args:
        calm: join by `join_world`, which sets the scheduling of gloo's polling thread; else leave it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = get_context("forkserver")  # imports once for all, in a process without threads
    context.set_forkserver_preload([__name__])
    with ExitStack() as stack:
        started = Ranks([stack.enter_context(ProcessPoolExecutor(1, context)) for _ in range(ranks)])
        joining = [
            worker.submit(_join, rank, ranks, threads, port, calm)
            for rank, worker in enumerate(started.workers)
        ]
        for future in joining:
            future.result()
        yield started
        with suppress(BrokenProcessPool):  # of a rank that was killed
            started.all(_leave)


def _join(rank: int, ranks: int, threads: int, port: int, calm: bool) -> None:
    global _world
    torch.set_num_threads(threads)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    if not calm:
        # join_world takes a group that is there as it is.
        dist.init_process_group("gloo")
        _joined.callback(dist.destroy_process_group)
    _world = _joined.enter_context(join_world("cpu", timeout=300.0))


def _leave() -> None:
    _job.cache_clear()
    _split.cache_clear()
    _joined.close()
