# SPDX-License-Identifier: MIT
"""Measure the speed-up of a training step on more ranks: ``python -m benchmarks run scaling``.

A step is forward, backward, exchange of gradients and SGD, on CPUs: data parallelism averages
through shared memory, tensor parallelism by gloo. Speed-ups are over one process with two threads,
which is what somebody with one process would run. Before a step is timed, its gradients and its
loss are checked with a float64 oracle. All ranks live throughout; steps take turns within a round,
a few each. Medians are quoted, and means, in which alone gloo's stalls show.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from torchpar.nn import MLP
from torchpar.parallel.launch.world import World
from torchpar.parallel.split.mlp import parallel_mlp
from torchpar.parallel.split.parts import part_of
from torchpar.parallel.split.shared_memory import (
    SUPPORTED,
    make_shared_sum,
    register_shared_memory_hook,
)
from torchpar.training.classification import cross_entropy_sum
from torchpar.training.profile.collectives import Collectives

from .flags import Command, run
from .processes import Group, current_world, start_ranks
from .results import CORES, Result, Table, print_results
from .timing import CPU, Rejected, Times, take_turns, time_calls

BLOCK_SECONDS = 0.15  # of one case's steps in a round, about
ALL_REDUCES = [2**power for power in (2, 6, *range(10, 26, 2))]  # bytes of each
COUNT = 20  # all-reduces of a size in a round
THREADS = 2  # of the one process with which every step is compared
GLOO = "gloo"


@dataclass(frozen=True)
class StepCase:
    """A training step: the model, the batch over all ranks, and how both are split over ranks."""

    sizes: tuple[int, ...]
    batch: int
    dp: int = 1
    tp: int = 1
    threads: int = 1

    @property
    def ranks(self) -> int:
        return self.dp * self.tp

    @property
    def contestant(self) -> str:
        if self.ranks == 1:
            return f"1 rank × {self.threads} thread{'s' if self.threads > 1 else ''}"
        return " × ".join(f"{name} {n}" for name, n in (("dp", self.dp), ("tp", self.tp)) if n > 1)


class Plan(NamedTuple):
    """The steps and all-reduces to measure. A width w stands for the model 784-w-w-10."""

    hidden: int = 512
    batches: Sequence[int] = (128, 256, 512, 1024, 2048, 4096, 8192)
    widths: Sequence[int] = (512, 1024, 2048, 4096)
    width_batch: int = 512
    most: int = 4  # ranks
    all_reduces: Sequence[int] = ALL_REDUCES
    rounds: int = 12

    def cases(self) -> Iterator[StepCase]:
        by_batch = [StepCase((784, self.hidden, 10), batch) for batch in self.batches]
        by_width = [StepCase((784, w, w, 10), self.width_batch) for w in self.widths]
        for alone in by_batch + by_width:
            yield from (alone, replace(alone, threads=THREADS))
            for ranks in range(2, self.most + 1, 2):
                yield from (replace(alone, dp=ranks), replace(alone, tp=ranks))


FULL = Plan()
QUICK = Plan(64, [128, 256], [64], 64, 2, [4, 2**18], 1)


# On each rank


class Step:
    """A case's model, its optimizer and this rank's share of the batch."""

    def __init__(self, case: StepCase):
        self.case, self.world = case, mesh(case.dp, case.tp)
        model, x, labels = unsplit(case)
        self.model = parallel_mlp(model, self.world.mesh["tp"]) if case.tp > 1 else model
        self.wrapped: torch.nn.Module = self.model
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        if case.dp > 1:
            group = self.world.mesh["dp"].get_group()
            replica = DistributedDataParallel(
                self.model, process_group=group, gradient_as_bucket_view=True
            )
            register_shared_memory_hook(replica, self.world)
            self.wrapped = replica
        self.x, self.labels = self.world.share(x).clone(), self.world.share(labels).clone()

    def gradients(self) -> Tensor:
        """Set the gradients; return this rank's part of the sum of the losses."""
        loss = cross_entropy_sum(self.wrapped(self.x), self.labels)
        # DistributedDataParallel averages over dp.
        (loss * (self.case.dp / self.case.batch)).backward()
        return loss.detach()

    def run(self) -> None:
        self.gradients()
        self.optimizer.step()
        self.model.zero_grad()


@cache
def mesh(dp: int, tp: int) -> World:
    return current_world().with_mesh(dp=dp, tp=tp)


@cache
def step_of(case: StepCase) -> Step:
    return Step(case)


def unsplit(case: StepCase) -> tuple[MLP, Tensor, Tensor]:
    """Return the whole model and the whole batch, the same on every rank."""
    torch.manual_seed(0)
    mlp = MLP(case.sizes)
    x = torch.rand(case.batch, case.sizes[0])
    return mlp, x, torch.randint(case.sizes[-1], (case.batch,))


def check(case: StepCase) -> dict[str, float]:
    """Check a step on this rank, and return the columns of its result: error and messages.

    Raises:
        Rejected: its gradient or its loss is wrong.
    """
    step = step_of(case)
    whole, x, labels = unsplit(case)
    losses, grads = [], []
    for dtype in (torch.float32, torch.float64):
        single = whole.to(dtype)
        loss = cross_entropy_sum(single(x.to(dtype)), labels) / case.batch
        names, parameters = zip(*single.named_parameters(), strict=True)
        gradients = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
        for name, p in step.model.named_parameters():
            gradients[name] = part_of(p).narrow(gradients[name])
        losses.append(loss.item())
        grads.append(flat(gradients))
    part = step.gradients()
    total = step.world.sum(part.double() * step.world.owns_outputs).item() / case.batch
    grad = flat({name: p.grad for name, p in step.model.named_parameters() if p.grad is not None})
    step.model.zero_grad()
    step.run()  # in which DistributedDataParallel rebuilds its buckets
    with Collectives(step.world) as recorded:
        step.run()
    # Only now may a rank be alone with an error.
    error = compare_with_one_rank(
        grad, (grads[0], grads[1]), total, (losses[0], losses[1]), case.batch
    )
    sent = [call.bytes for call in recorded.calls if call.operation != "recv"]
    return {"calls": len(sent), "call_bytes": sum(sent), "error": error}


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def compare_with_one_rank(
    grad: Tensor, grads: tuple[Tensor, Tensor], loss: float, losses: tuple[float, float], batch: int
) -> float:
    """Return a gradient's error, over the norm of the exact one.

    The gradient may be off from float64's by twice what one rank's float32 one is, in the norm over
    all of a rank's parameters, whose hundreds of roundings a parameter make it steady. The loss, a
    single number, may be off by as much and by a rounding, of random sign, for each sample that is
    added.

    Args:
        grads, losses: those of one rank, in float32 and in float64.

    Raises:
        Rejected: the gradient or the loss is off by more.
    """
    (grad32, grad64), (loss32, loss64) = grads, losses
    norm = grad64.norm().item()
    error: float = (grad - grad64).norm().item() / norm
    allowed = 2 * (grad32 - grad64).norm().item() / norm
    if not error <= allowed:
        raise Rejected(f"the gradient is off by {error:.1e} of its norm, {allowed:.1e} are allowed")
    off = abs(loss - loss64)
    may = 2 * abs(loss32 - loss64) + math.sqrt(batch) * torch.finfo(torch.float32).eps / 2 * abs(
        loss64
    )
    if not off <= may:
        raise Rejected(f"the loss is off by {off:.1e}, {may:.1e} are allowed")
    return error


def time_steps(case: StepCase, count: int) -> list[float]:
    """Return the seconds of each of ``count`` steps, after one that warms up."""
    step = step_of(case)
    step.run()
    return [time_calls(step.run).seconds() for _ in range(count)]


def time_all_reduces(shared: bool, nbytes: int, count: int) -> list[float]:
    """Return the seconds of each of ``count`` all-reduces, after one that is checked.

    Args:
        shared: through shared memory, else by gloo.
    """
    world, t = current_world(), torch.ones(nbytes // 4)
    add: Callable[[], Tensor | None] = partial(world.sum, t)
    if shared:
        share = make_shared_sum(world.mesh.get_group("dp"), [t.shape], t.dtype, world.timeout)
        if share is None:
            raise RuntimeError("the ranks cannot share memory")
        add = partial(share, [t])
    add()
    if not (t == world.world_size).all():
        raise Rejected(f"an all-reduce of ones gave {t[0]}, expected {world.world_size}")
    t.zero_()
    add()
    return [time_calls(add).seconds() for _ in range(count)]


def use_default_polling() -> None:
    """Schedule gloo's polling thread as gloo leaves it; `join_world` has put it under
    SCHED_BATCH."""
    for task in Path("/proc/self/task").glob("*"):
        with suppress(OSError):
            if (task / "comm").read_text().strip() == "gloo_tcp_loop":
                os.sched_setscheduler(int(task.name), os.SCHED_OTHER, os.sched_param(0))


def forget() -> None:
    """Drop models and groups, before the ranks leave."""
    step_of.cache_clear()
    mesh.cache_clear()


# On the process that measures


def slowest(times: Sequence[Sequence[float]]) -> list[float]:
    """Return for each call the time of the rank that took longest."""
    return [max(of_ranks) for of_ranks in zip(*times, strict=True)]


class StepTurn:
    """The turns of one case: check it, then time some steps in each round."""

    def __init__(self, case: StepCase, ranks: Group):
        self.case, self.ranks = case, ranks
        self.checked: list[dict[str, float]] = []

    def __call__(self, index: int) -> list[float]:
        if index == 0:
            self.checked = self.ranks.run(check, self.case)
            pilot = slowest(self.ranks.run(time_steps, self.case, 1))[0]
            self.count = min(max(round(BLOCK_SECONDS / pilot), 1), 20)
            return []
        return slowest(self.ranks.run(time_steps, self.case, self.count))

    def result(self, times: Times, alone: Times) -> Result:
        """Return the result of this case, with its speed-up over ``alone``, the times of one
        rank."""
        sizes = "-".join(map(str, self.case.sizes))
        case = {"kind": "step", **asdict(self.case), "sizes": sizes}
        over = self.case.ranks * self.case.threads > CORES
        columns: dict[str, object] = {"oversubscribed": over}
        if self.checked:
            columns |= self.checked[0] | {"error": max(rank["error"] for rank in self.checked)}
        return times.result(case, self.case.contestant, alone, **columns)


def measure(plan: Plan, default_polling: bool) -> list[Result]:
    """Start the ranks, check every case, and time them in turn."""
    cases = list(plan.cases())
    with ExitStack() as stack:
        groups: dict[tuple[int, int], Group] = {}
        for one in cases:
            key = one.ranks, one.threads
            if key not in groups:
                groups[key] = stack.enter_context(start_ranks(*key))
                stack.callback(groups[key].run, forget)
        contestants = {GLOO: (groups[2, 1], False)}
        if SUPPORTED:
            contestants["shared memory"] = groups[2, 1], True
        if default_polling:
            ranks = stack.enter_context(start_ranks(2))
            ranks.run(use_default_polling)
            contestants["gloo's default"] = ranks, False

        def all_reduce(ranks: Group, shared: bool, nbytes: int, index: int) -> list[float]:
            return slowest(ranks.run(time_all_reduces, shared, nbytes, COUNT if index else 1))

        turns = {one: StepTurn(one, groups[one.ranks, one.threads]) for one in cases}
        all_reduces = {
            (contestant, nbytes): partial(all_reduce, ranks, shared, nbytes)
            for contestant, (ranks, shared) in contestants.items()
            for nbytes in plan.all_reduces
        }
        times = take_turns({**all_reduces, **turns}, plan.rounds, label="scaling")
    alone = {one: times[StepCase(one.sizes, one.batch, threads=THREADS)] for one in cases}
    results = [turns[one].result(times[one], alone[one]) for one in cases]
    for contestant, nbytes in all_reduces:
        case = {"kind": "all_reduce", "dp": 2, "nbytes": nbytes}
        results.append(times[contestant, nbytes].result(case, contestant, times[GLOO, nbytes]))
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    command = Command("scaling")
    polling = "also time all-reduces with gloo's default thread scheduling"
    command.parser.add_argument("--default-polling", action="store_true", help=polling)
    options = command.parse(arguments)
    results = measure(QUICK if options.quick else FULL, options.default_polling)
    table = Table(command.csv(options), CPU, cores=CORES)
    table.add(results)
    steps = [one for one in results if one.case["kind"] == "step"]
    title = f"a training step; speed-ups are over one rank with {THREADS} threads"
    figures = ("p50_ms", "samples", "speedup", "oversubscribed")
    print_results(title, steps, ("sizes", "batch", "contestant", *figures))
    columns = ("nbytes", "contestant", "p50_ms", "mean_ms", "samples", "speedup")
    print_results(
        "an all-reduce between 2 ranks", [one for one in results if one not in steps], columns
    )
    return table.status


if __name__ == "__main__":
    run(main)
