# SPDX-License-Identifier: MIT
"""A small network by full-batch descent: sequentially, by MPI, by DDP, on a GPU.

    python examples/fashion_pooled.py                                # NumPy, one process
    mpirun -n 2 python examples/fashion_pooled.py                    # NumPy, MPI
    torchrun --nproc_per_node=2 examples/fashion_pooled.py           # PyTorch, DDP
    python examples/fashion_pooled.py --engine torch --device cuda   # PyTorch, a GPU

5000 images are pooled to 20 × 20; the network is 400-25-10 with sigmoids, its cost the binary cross-entropy
of each class against the one-hot label, summed over the classes and averaged over the samples:

    C = −1/n · Σ_samples Σ_classes t·log p + (1 − t)·log(1 − p)

Every iteration descends by the gradient over all samples. The first run is as a university project did it,
60 iterations at rate 0.1, after which the network has hardly begun to learn; the second takes a rate and a
number of iterations that train it. What an iteration exchanges is the gradient, 10 285 numbers however many
samples there are; so it pays to share the work.
"""

import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# Before NumPy is imported: a process per core, so a thread per process, unless it is told otherwise.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks is not installed

import torch
from torch.nn.functional import adaptive_avg_pool2d

from benchmarks.baselines import mpi
from benchmarks.baselines.full_batch import Plan, Run, in_numpy, in_torch
from torchpar import cli, report
from torchpar.data import Dataset, load
from torchpar.errors import ConfigError
from torchpar.parallel.rendezvous import find_place
from torchpar.parallel.world import World, join_world

SIZES = (400, 25, 10)
# What the project reports of Fashion-MNIST, at rate 0.1 after 60 iterations.
ONE = "7.50 → 3.217, precision 0.36; 1.1 to 1.16 s"
TWO = "6.70 → 3.210, precision 0.36; 0.83 to 0.90 s"
PUBLISHED = {"NumPy": ONE, "NumPy, MPI": TWO, "PyTorch": ONE, "PyTorch, DDP": TWO}
PUBLISHED["PyTorch, GPU"] = "6.55 → 3.214, precision 0.30; no time"


@dataclass(kw_only=True)
class Flags(cli.ExampleFlags):
    """Train a small network on pooled images by full-batch descent."""

    data: Path = Path(__file__).parent / "data"
    """Folder of the data sets, as torchvision's root."""
    dataset: Dataset = "mnist"
    """What to learn; fashion-mnist is what was published."""
    samples: int = 5000
    """Training images, the first ones."""
    iterations: int = 800
    """Of the second run."""
    lr: float = 0.1
    """Learning rate of the second run."""
    momentum: float = 0.9
    """Momentum of the second run."""
    engine: Literal["auto", "numpy", "torch"] = "auto"
    """What computes; auto takes PyTorch under torchrun and with --device cuda, else NumPy."""


def main(flags: Flags) -> None:
    as_published = Plan(SIZES, iterations=60, lr=0.1, seed=flags.seed)
    plans = [as_published, Plan(SIZES, flags.iterations, flags.lr, flags.momentum, flags.seed)]
    place = find_place()
    by_torchrun = place is not None and place.launcher in ("torchrun", "env")
    if flags.engine == "torch" or (flags.engine == "auto" and (by_torchrun or flags.device == "cuda")):
        with join_world(flags.device) as world:
            spread = "PyTorch, DDP" if world.world_size > 1 else "PyTorch"
            way = "PyTorch, GPU" if world.device.type == "cuda" else spread
            splits = pooled(flags, world)
            runs = [(plan, in_torch(world, splits, plan)) for plan in plans]
            if world.rank == 0:
                tell(flags, way, world.device.type, world.world_size, runs)
        return
    if by_torchrun or flags.device == "cuda":
        raise ConfigError("--engine numpy computes on CPUs, alone or under mpirun; take --engine torch")
    with mpi.join() if place else nullcontext(mpi.Alone()) as comm:
        alone = World(comm.rank, comm.rank, world_size=1, device=torch.device("cpu"))  # MPI connects them
        found = mpi.on_rank_0(comm, lambda: pooled(flags, alone))
        counts = comm.bcast([len(samples.labels) for samples in found or ()])
        runs = [(plan, in_numpy(comm, found or (None, None), counts, plan)) for plan in plans]
        if comm.rank == 0:
            tell(flags, "NumPy, MPI" if comm.size > 1 else "NumPy", "cpu", comm.size, runs)


def pooled(flags: Flags, world: World) -> list[mpi.Samples]:
    """Training and test images as rows of 400 numbers in [0, 1], and their labels."""
    report.prepare_outputs(world, folders=[flags.plots], files=[flags.metrics])
    train, test = load(flags.dataset, flags.data, world)
    found = []
    for samples in (train[: flags.samples], test):
        images = adaptive_avg_pool2d(samples.images.cpu() / 255, 20).flatten(1)
        found.append(mpi.Samples(images.numpy(), samples.labels.cpu().numpy()))
    return found


def tell(flags: Flags, way: str, device: str, ranks: int, runs: list[tuple[Plan, Run]]) -> None:
    """Print what came of the runs, and write it where the flags say."""
    print(f"published, Fashion-MNIST {way}: cost {PUBLISHED[way]} per iteration")
    lines: list[dict[str, Any]] = []
    for plan, run in runs:
        ms = {phase: 1e3 * t / plan.iterations for phase, t in run.phases.items() if t}
        once = sum(ms.pop(phase, 0.0) for phase in ("scatter", "data")) * plan.iterations
        print(
            f"{plan.iterations} iterations at rate {plan.lr:g}, momentum {plan.momentum:g}: "
            f"cost {run.costs[0]:.2f} → {run.costs[-1]:.3f}, precision {run.train[1]:.2f}, "
            f"test {run.test[1]:.4f}; ms once: {once:.1f}; per iteration: "
            f"{1e3 * run.seconds / plan.iterations:.2f}, of it "
            + ", ".join(f"{phase} {t:.2f}" for phase, t in ms.items())
        )
        lines.append(
            plan._asdict()
            | {"way": way, "ranks": ranks, "device": device, "ms": ms, "ms_once": once}
            | {"first_cost": run.costs[0], "last_cost": run.costs[-1], "seconds": run.seconds}
            | {"precision": run.train[1], "test_loss": run.test[0], "test_accuracy": run.test[1]}
        )
    if flags.metrics:
        report.write_metrics(flags.metrics, lines)
    if flags.plots:
        plot(flags.plots, runs)
    print(report.last_line(run.test[1], run.test[0], run.seconds, ranks, device))


def plot(folder: Path, runs: list[tuple[Plan, Run]]) -> None:
    """The costs, and what each hidden neuron of the last run looks for."""
    import matplotlib.pyplot as plt

    from torchpar import plots

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for plan, run in runs:
        axes.plot(range(1, 1 + len(run.costs)), run.costs, label=f"rate {plan.lr}, momentum {plan.momentum}")
    axes.set(xlabel="iteration", ylabel="cost", xscale="log", ylim=(0, None))
    axes.legend()
    figure.savefig(folder / "costs.png", dpi=120)
    neurons = torch.from_numpy(runs[-1][1].weights.T.reshape(-1, 20, 20))
    plots.save_matrices(folder / "neurons.png", neurons, "what each hidden neuron looks for")


if __name__ == "__main__":
    cli.main(main, Flags)
