# SPDX-License-Identifier: MIT
"""An epoch of training on each rung."""

from collections.abc import Iterator

import torch

from benchmarks.baselines.numpy_mlp import Array
from benchmarks.ladder import split, whole
from benchmarks.ladder.epochs import Chunks, Njit, NumPy, PurePython, Run, Torch, native
from benchmarks.ladder.inputs import Problem, Training
from benchmarks.ladder.measure import Rung, Workload
from benchmarks.ladder.operators import THREADS
from benchmarks.scaling.plan import CORES
from benchmarks.scaling.ranks import Ranks
from torchpar.nn import MLP
from torchpar.parallel.world import World

CHUNKS = 20  # samples that make up an epoch
SECONDS = 6.0  # of a rung's samples
PURE_PYTHON = 200  # digits


class Replicas(Run):
    """Data parallelism over the ranks, as one run."""

    def __init__(self, problem: Problem, ranks: Ranks):
        self.ranks = ranks
        super().__init__(problem)

    def restart(self) -> None:
        self.ranks.all(split.restart, self.problem.training)

    def train(self, first: int, last: int) -> Array:
        return self.timed(first, last)[1]

    def timed(self, first: int, last: int) -> tuple[float, Array]:
        seconds, losses = zip(*self.ranks.all(split.train, self.problem.training, first, last), strict=True)
        return max(seconds), losses[0]


def workload(training: Training, ranks: Ranks, world: World) -> Workload:
    """All rungs of an epoch."""
    problem = Problem(training, world)
    rungs = list(_rungs(problem, ranks, world))
    return Workload(problem.label, problem.work, "GFLOP/s", rungs, SECONDS)


def _rungs(problem: Problem, ranks: Ranks, world: World) -> Iterator[Rung]:
    def rung(name: str, run: Run, note: str = "", compiles: bool = False, device: str = "cpu") -> Rung:
        chunks = Chunks(run, chunk, len(problem.order))
        return Rung(name, chunks.sample, chunks.warm, note, compiles, torch.device(device))

    sizes, batch_size, _ = problem.training
    chunk = -(-len(problem.order) // CHUNKS)
    batches = -(-PURE_PYTHON // batch_size)
    slow = Chunks(PurePython(problem, batches), 1, batches)
    note = f"from {batches * batch_size} of {len(problem.x):,} digits"
    yield Rung("pure Python", slow.sample, slow.run.restart, note)
    yield rung("njit", Njit(problem, None), compiles=True)
    for threads in THREADS:
        if threads <= CORES:
            note = f"{threads} thread{'s' if threads > 1 else ''}"
            yield rung("njit, parallel", Njit(problem, threads), note, compiles=threads == 1)
    yield rung("NumPy", NumPy(problem))
    yield from filter(None, [whole.mpi(problem)])
    yield rung("torch eager", Torch(problem, native(sizes)))
    compiled = native(sizes)
    compiled.compile()
    yield rung("torch.compile", Torch(problem, compiled), compiles=True)
    yield rung("torchpar CPU", Torch(problem, MLP(sizes)))
    loops = whole.Loops(problem, world)
    yield from filter(None, [loops.plain(), loops.lightning()])
    if torch.cuda.is_available():
        cuda = torch.device("cuda")
        yield rung("torch eager GPU", Torch(problem, native(sizes), cuda), device="cuda")
        yield rung("torchpar GPU", Torch(problem, MLP(sizes), cuda), device="cuda")
    yield rung("2 ranks", Replicas(problem, ranks), split.noted("DDP over gloo"))
