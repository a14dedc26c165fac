# SPDX-License-Identifier: MIT
"""The rungs of an epoch of training, and their turns."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.ladder.rungs import Rung, plural
from benchmarks.timing import Turn, time_calls
from benchmarks.train import epochs, gpu, programs
from benchmarks.train.epochs import Order, Train
from benchmarks.train.inputs import TrainingInputs
from torchpar.baselines.numpy_mlp import Array
from torchpar.parallel.launch.local import Ranks
from torchpar.parallel.launch.world import World

Advance = Callable[[int], tuple[float, Array]]  # train on so many batches: the seconds, and their losses

ROUNDS = 10  # turns of an epoch
PLAIN, FUSED = gpu.PLAIN, "torchpar"
SLOW = {"pure Python": 200, "customary script": 2000}  # digits, of which an epoch is extrapolated


def rungs(inputs: TrainingInputs, world: World, ranks: Ranks, compiled: bool = True) -> Iterator[Rung]:
    """All ways to train; without ``compiled`` less torch.compile."""
    sizes, batch_size = inputs.training[:2]

    def rung(name: str, train: Train, note: str = "", **options: Any) -> Rung:
        digits = SLOW.get(name, len(inputs.x))
        end = min(-(-digits // batch_size), len(inputs.order))
        part = end < len(inputs.order)
        note = f"from {end * batch_size:,} of {len(inputs.x):,} digits" if part else note
        turn = epoch_turn(inputs, local(inputs, train), 1 if part else 0, end)
        return Rung(name, turn, note, **options)

    if torch.cuda.is_available():
        for name, note, train, compiles in gpu.rungs(inputs, world, compiled):
            figures = partial(gpu.figures, inputs, train)
            yield rung(name, train, note, compiles=compiles, device=torch.device("cuda"), figures=figures)
    if inputs.training.dtype != torch.float32:
        return  # an epoch takes minutes on a CPU
    if len(sizes) == 3:  # a step of the others takes a minute
        yield rung("pure Python", epochs.pure_python_epoch)
    yield rung("customary script", epochs.customary_epoch, "DataLoader, transforms")
    yield rung("njit", partial(epochs.njit_epoch, threads=None), compiles=True)
    if torch.get_num_threads() > 1:
        threads = torch.get_num_threads()
        yield rung("njit, parallel", partial(epochs.njit_epoch, threads=threads), plural(threads, "thread"))
    yield rung("NumPy", epochs.numpy_epoch)
    if not programs.missing("MPI"):
        yield programs.mpi(inputs)
    if not programs.missing(programs.LIGHTNING):
        yield programs.lightning(inputs)
    yield rung(PLAIN, epochs.torch_epoch(epochs.native(sizes)), "nn.Sequential, SGD")
    if compiled:
        fast = epochs.native(sizes)
        fast.compile()
        yield rung("torch.compile", epochs.torch_epoch(fast), compiles=True)
    yield rung("torchpar, autograd", epochs.run_epoch(world, fused=False))
    yield rung(FUSED, epochs.run_epoch(world, fused=True), "gradients by formulas")
    ways = {"DDP": "DistributedDataParallel", "shared": "DistributedDataParallel, shared memory"}
    for way, note in {**ways, "fused": "gradients by formulas"}.items():
        turn = epoch_turn(inputs, partial(on_ranks, ranks, inputs, way))
        yield Rung(f"{FUSED}, 2 ranks", turn, note)


def epoch_turn(
    inputs: TrainingInputs, begin: Callable[[Order], Advance], chunk: int = 0, end: int = 0
) -> Turn:
    """The turns that make up an epoch: ``chunk`` batches each, up to batch ``end``; each loss is checked.

    The seconds are those of a step of a whole batch. The warm-up trains on a batch of either size, and
    begins anew.
    """
    chunk, end = chunk or -(-len(inputs.order) // ROUNDS), end or len(inputs.order)
    done = 0
    advance: Advance

    def turn(index: int) -> list[float] | None:
        nonlocal done, advance
        if index == 0:
            begin([inputs.order[0], inputs.order[-1]])(2)
            advance = begin(inputs.order[:end])
            return []
        first, done = done, min(done + chunk, end)
        if first == done:
            return None
        seconds, losses = advance(done - first)
        inputs.check(losses, first, done)
        return [seconds * inputs.training.batch_size / sum(map(len, inputs.order[first:done]))]

    return turn


def local(inputs: TrainingInputs, train: Train) -> Callable[[Order], Advance]:
    threads = torch.get_num_threads()

    def begin(order: Order) -> Advance:
        advance = advance_by(train(inputs, order))

        def with_threads(batches: int) -> tuple[float, Array]:
            torch.set_num_threads(threads)  # Numba and Lightning set those of OpenMP
            return advance(batches)

        return with_threads

    return begin


def advance_by(losses: Iterator[Any]) -> Advance:
    """Train by taking losses from ``losses``, after its preparation."""
    next(losses)

    def take(batches: int) -> Array:
        taken = list(islice(losses, batches))
        if taken and isinstance(taken[0], Tensor):
            return np.array(torch.stack(taken).tolist())
        return np.array(taken)

    def advance(batches: int) -> tuple[float, Array]:
        timed = time_calls(partial(take, batches))
        return timed.seconds(), timed.result

    return advance


def on_ranks(ranks: Ranks, inputs: TrainingInputs, way: str, order: Order) -> Advance:
    """Train by data parallelism, in the order of `torchpar.training.Run`; the ranks' losses add up."""
    from benchmarks.train import on_ranks as rank

    ranks.run(rank.begin, inputs.training, way)

    def advance(batches: int) -> tuple[float, Array]:
        seconds, losses = zip(*ranks.run(rank.advance, way, batches), strict=True)
        return max(seconds), sum(losses)

    return advance
