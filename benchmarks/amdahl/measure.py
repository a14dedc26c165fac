# SPDX-License-Identifier: MIT
"""Epochs of data-parallel training, timed by phase on several numbers of processes."""

import logging
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from benchmarks.amdahl.law import PHASES, Scaling
from benchmarks.scaling.plan import CORES
from torchpar import training
from torchpar.collectives import WatchedStep
from torchpar.data import Samples
from torchpar.errors import ConfigError
from torchpar.parallel.step import ReplicaStep, Step
from torchpar.parallel.world import World, join_world
from torchpar.phases import Phases

PROCESSES = tuple(2**i for i in range(max(CORES, 2).bit_length()))  # 1, 2, 4 … to the cores
ROUNDS = 8  # after one that is not counted


@dataclass(frozen=True)
class Job:
    """What to train.

    Attributes:
        build: the model and its optimizer.
        draw: the samples of an epoch.
        make_step: from the model, which DistributedDataParallel may wrap, and the number of ranks.
    """

    build: Callable[[World], tuple[torch.nn.Module, Optimizer]]
    draw: Callable[[World], Samples]
    make_step: Callable[[torch.nn.Module, int], Step] = ReplicaStep


def check(processes: Sequence[int], sizes: Sequence[int]) -> None:
    """Refuse numbers of processes, or batch sizes, that `measure` cannot work with."""
    if len(processes) < 2 or processes[0] != 1 or any(b <= a or b % a for a, b in pairwise(processes)):
        raise ConfigError(f"--processes is {processes}, expected 1 and then multiples of the last, as 1 2 4")
    if min(sizes, default=0) < processes[-1]:
        raise ConfigError(f"--sizes is {sizes}, expected at least {processes[-1]}, one sample a process")


def measure(job: Job, processes: Sequence[int], sizes: Sequence[int]) -> list[Scaling]:
    """Time epochs of data-parallel training on the CPU, a thread to a process; a `Scaling` for each size.

    PyTorch's launcher starts as many processes as the largest number asks for, once. Each round times all
    numbers and sizes in turn, so that whatever else the machine does meets all alike; the first round is
    not counted, and of the others' times the medians are given. They are rank 0's, so that "collectives"
    includes its wait for slower ranks.

    While phases are timed a collective overlaps with nothing (`torchpar.phases.Phases`).

    Args:
        job: what is trained; it must be picklable, and the same on every rank.
        processes: 1, then each a multiple of the last.
        sizes: of batches, over all processes.

    Raises:
        ConfigError: numbers or sizes that do not fit, or a process that failed; the others are ended.
    """
    check(processes, sizes)
    most = processes[-1]
    with TemporaryDirectory() as logs, Console().status(f"timing epochs on {processes} processes"):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=most,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
            run_id="amdahl",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            signals_to_handle="SIGTERM",  # SIGINT stays KeyboardInterrupt
        )
        # What its launcher and its children's starter log of a death, the error below says in one line.
        for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        before = signal.getsignal(signal.SIGTERM)  # which the launcher sets, and leaves
        try:
            scalings: list[Scaling] = elastic_launch(config, _rank)(job, processes, sizes)[0]
        except SignalException as e:
            sys.exit(128 + e.sigval)
        except ChildFailedError as e:
            rank, failure = e.get_first_failure()
            said: Any = failure.message  # a dictionary if an exception was recorded
            said = said["message"] if isinstance(said, dict) else f"exit status {failure.exitcode}"
            raise ConfigError(f"process {rank} of {most} failed: {said.splitlines()[0]}") from e
        finally:
            signal.signal(signal.SIGTERM, before)
    return scalings


@dataclass(frozen=True)
class _Team(World):
    """The first ``world_size`` ranks, which train together while the others wait."""

    group: dist.ProcessGroup | None = None

    def sum(self, t: Tensor) -> Tensor:
        dist.all_reduce(t, group=self.group)
        return t

    def check_alike(self, what: str, values: dict[str, Any]) -> None:
        """One process gave all of them their arguments."""


def _rank(job: Job, processes: Sequence[int], sizes: Sequence[int]) -> list[Scaling]:
    # When the launcher is killed, PyTorch sends its workers SIGINT, which a shell's background jobs ignore.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    with join_world("cpu", timeout=300) as everyone:
        epochs: dict[tuple[int, int], Callable[[int, Phases], float]] = {}
        for n in processes:
            mesh = everyone.split(dp=n, pp=everyone.world_size // n).mesh
            assert mesh is not None
            group = mesh["dp"].get_group()
            team = _Team(everyone.rank, everyone.local_rank, n, everyone.device, group=group)
            epochs |= {(size, n): _epoch(job, team, size) for size in sizes}
        seconds: dict[tuple[int, int], list[dict[str, float]]] = {key: [] for key in epochs}
        losses: dict[tuple[int, int], float] = {}
        for seed, (key, epoch) in product(range(1 + ROUNDS), epochs.items()):
            dist.barrier()
            if everyone.rank < key[1]:
                phases = Phases(everyone.device)
                losses[key] = epoch(seed, phases)
                seconds[key].append(phases.seconds)
        dist.barrier()
    if everyone.rank:
        return []
    return [
        Scaling(
            size,
            {n: _medians(seconds[size, n][1:]) for n in processes},
            {n: losses[size, n] for n in processes},
        )
        for size in sizes
    ]


def _epoch(job: Job, team: _Team, batch_size: int) -> Callable[[int, Phases], float]:
    model, optimizer = job.build(team)
    samples = job.draw(team)
    forward = DistributedDataParallel(model, process_group=team.group) if team.world_size > 1 else model
    step = WatchedStep(job.make_step(forward, team.world_size), team)

    def epoch(seed: int, phases: Phases) -> float:
        (result,) = training.fit(
            *(model, optimizer, samples, samples, team),
            step=step,
            epochs=1,
            batch_size=batch_size,
            schedule="constant",
            seed=seed,
            phases=phases,
        )
        return result.test_loss

    return epoch


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {phase: median(seconds[phase] for seconds in rounds) for phase in PHASES}
