# SPDX-License-Identifier: MIT
"""Full-batch descent of a small network in NumPy or in PyTorch, on one process and on several.

    python examples/fashion_pooled.py
    mpirun -n 2 python examples/fashion_pooled.py
    mpirun -n 2 python examples/fashion_pooled.py --exchange gather
    torchrun --nproc_per_node=2 examples/fashion_pooled.py --library torch

5000 images are pooled to 20 × 20. The network is 400-25-10 with sigmoids. The cost is the binary
cross-entropy of each class, summed over the classes and averaged over the samples:

    C = −1/n · Σ_samples Σ_classes [t·log p + (1 − t)·log(1 − p)]

Every iteration takes the gradient over all samples. The first run has the settings of a university
project: 60 iterations at rate 0.1, without momentum. The project ended at a cost of 3.2 and a
precision of 0.36, since the network has hardly begun to learn: a network that gives each of ten
classes the probability 0.1, whatever the image, has the cost −10·(0.1·log 0.1 + 0.9·log 0.9) =
3.25. The second run trains on: 800 iterations with momentum 0.9.

Process 0 reads the images. Scatter sends each process its share of inputs and labels. Then there
are two ways to exchange 10 286 numbers in an iteration, the gradient and the cost, as many for any
number of samples:

``--exchange allreduce``: Bcast sends the first weights, once. Allreduce adds up the gradients of
the shares and gives all processes the sum, so all take the same step. ``--exchange gather``, the
project's: Bcast sends the weights in each iteration. Gather brings the gradients of the shares to
process 0, which adds them up and takes the step. ``--scatter each``, also the project's: Scatter
sends inputs and labels in each iteration, though they are the same ones.

``--backward samples``, the project's: back-propagation is a loop over samples in NumPy, which adds
up their gradients. By default a product computes the gradient of all samples.

--images takes a file of MATLAB in place of a data set: X (n, 400) and y (n, 1), of which every
fifth sample is for tests. --weights takes one with the first weights: Theta1 (25, 401) and Theta2
(10, 26), whose first columns are the biases. Row k of Theta2 is label k + 1 if the labels are 1 to
10, and label k if they are 0 to 9; --first-label says otherwise. --every-iteration prints the cost
and the milliseconds of all phases in each iteration.

Under mpirun process 0 first trains alone, while the others wait: with one thread, and in a process
of its own with all threads. A table sets the times by phase side by side. ``--library torch`` needs
PyTorch, by which ``--device cuda`` takes a GPU. NumPy alone needs a checkout, and

    pip install --no-deps -e . && pip install numpy mpi4py mpich rich tyro
"""

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

# NumPy reads it when it is imported. With a process per core each process needs one thread. One
# process alone takes all threads.
if any(os.environ.get(size, "1") != "1" for size in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE")):
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from support import cli, console, mat, one_process, plots

import numpy as np

from torchpar.baselines import mpi, numpy_mlp
from torchpar.baselines.numpy_mlp import Array
from torchpar.console import say_progress
from torchpar.data.files import FOLDERS, Dataset, Images, checksums, read
from torchpar.errors import ConfigError, check_finite
from torchpar.training.profile.phases import Phases, phase

if TYPE_CHECKING:
    from torchpar.parallel import World

DEFAULT_SAMPLES = 5000  # of the exercise
SIZES = (400, 25, 10)
SIDE = 20  # of the pooled images
DIGITS = tuple("0123456789")
FORWARD = ("hidden layer", "output layer", "cost")
LOOP = (*FORWARD, "backward", "exchange", "descent")  # phases of every iteration
# Iterations that print a line, and the last.
SHOWN = {1, 2, 5, 10, 20, 30, 60, 100, 200, 400, 800, 1600}
Exchange = Literal["allreduce", "gather"]
Scatter = Literal["once", "each"]
Backward = Literal["batch", "samples"]


@dataclass(kw_only=True)
class Flags(cli.ExampleFlags):
    """Train a small network on pooled images by full-batch descent."""

    data: cli.DataFolder = cli.DATA  # Folder of the data sets, as torchvision's root.
    # Data set; auto takes Fashion-MNIST if its files are there, else MNIST.
    dataset: Dataset | Literal["auto"] = "auto"
    images: cli.MatFile = None  # A .mat file with X (n, 400) and y (n, 1), in place of a data set.
    weights: cli.MatFile = None  # A .mat file with Theta1 (25, 401) and Theta2 (10, 26).
    # Label of the first row of Theta2; by default that of the images, 0 for a data set.
    first_label: Literal[0, 1] | None = None
    library: Literal["numpy", "torch"] = "numpy"  # Library that computes.
    plots: cli.Plots = None  # Folder for pictures.
    exchange: Exchange = "allreduce"  # MPI's messages of an iteration.
    scatter: Scatter = "once"  # Inputs and labels are sent once, or in each iteration.
    # Back-propagation by a product for all samples, or by a loop over samples.
    backward: Backward = "batch"
    # Number of training images, the first ones; by default at most 5000.
    samples: cli.Count | None = None
    iterations: cli.Count = 800  # Iterations of the second run.
    lr: cli.Number = 0.1  # Learning rate of the second run.
    momentum: cli.Share = 0.9  # Momentum of the second run.
    # Print all iterations, and the milliseconds of their phases.
    every_iteration: cli.Switch = False

    def check(self) -> None:
        super().check()
        if self.first_label is not None and not self.weights:
            raise ConfigError("--first-label is of --weights, which are not given; drop it")
        if self.library == "numpy" and self.device == "cuda":
            raise ConfigError(
                "--device cuda: NumPy computes on the CPU; --library torch takes a GPU"
            )
        of_numpy = {
            "--exchange gather": self.exchange == "gather",
            "--scatter each": self.scatter == "each",
            "--backward samples": self.backward == "samples",
        }
        if self.library == "torch" and (given := [flag for flag, on in of_numpy.items() if on]):
            raise ConfigError(
                f"{given[0]} is NumPy's, and --library torch has its own way; drop one of them"
            )
        if self.library == "torch" and find_spec("torch") is None:
            raise ConfigError("--library torch needs PyTorch; pip install torch")


class Pixels(NamedTuple):
    """Pooled images.

    Attributes:
        x: ``(n, 400)`` float32 in [0, 1].
        labels: ``(n)`` int64.
    """

    x: Array
    labels: Array


class Way(NamedTuple):
    """What an iteration sends, and how it computes gradients; all ways have the same costs."""

    exchange: Exchange = "allreduce"
    scatter: Scatter = "once"
    backward: Backward = "batch"


class Plan(NamedTuple):
    """Settings of a run: full-batch steps of SGD, and the seed or the file of the first weights.

    Attributes:
        first_label: as of `mat.load_weights`.
    """

    iterations: int
    lr: float
    momentum: float
    seed: int
    weights: str = ""
    first_label: int = 0


class Result(NamedTuple):
    """Figures of a run."""

    costs: list[float]  # of each iteration, before its step; after Gather on process 0 alone
    times: list[float]  # seconds of each iteration
    # Mean cost and accuracy at the end, on training and on test samples.
    ends: Sequence[Sequence[float]]
    weights: Array  # of the first layer, (400, 25)
    phases: Sequence[dict[str, float]] = ()  # seconds of each iteration by phase, if they are timed


def averages(side: int, pooled: int) -> Array:
    """Return the matrix ``(pooled, side)`` whose product with an image's columns pools them.

    Row i averages the pixels ⌊i·side/pooled⌋ to ⌈(i + 1)·side/pooled⌉, as PyTorch's adaptive
    average pooling.
    """
    i = np.arange(pooled)[:, None]
    first, end = i * side // pooled, -(-(i + 1) * side // pooled)
    pixel = np.arange(side)
    inside: Array = ((first <= pixel) & (pixel < end)).astype(np.float32)
    inside /= inside.sum(1, keepdims=True)
    return inside


def pool(images: Images) -> Pixels:
    """Average the pixels of 28 × 28 images to 20 × 20: P·X·Pᵀ of each image X."""
    p = averages(images.features.shape[1], SIDE)
    features = images.features.astype(np.float32) / 255
    return Pixels((p @ features @ p.T).reshape(len(images.labels), -1), images.labels)


def find_dataset(flags: Flags) -> tuple[Dataset, str]:
    """Return the data set, and a line that says so if it is not the project's."""
    if flags.dataset != "auto":
        return flags.dataset, ""
    folder, instead = (flags.data / FOLDERS[one] / "raw" for one in ("fashion-mnist", "mnist"))
    has_files, has_others = (any(f.glob("train-images-idx3-ubyte*")) for f in (folder, instead))
    if has_files or not has_others:  # without either, reading names the file that is missing
        return "fashion-mnist", ""
    return "mnist", f"MNIST stands in for Fashion-MNIST, of which {folder} holds no files"


def load(flags: Flags, speaks: bool = True) -> tuple[Sequence[Pixels], int]:
    """Return the pooled training and test images, and the label of the weights' first row. Say so,
    if they are not the project's."""
    if flags.weights:  # a wrong file is an error before the first line
        mat.load_weights(flags.weights, numpy_mlp.NumpyMLP(SIZES))
    first: int | None = 0  # of the data sets
    if flags.images:
        *found, first = mat.read_images(flags.images, SIZES[0])
        pixels, source = Pixels(*found), str(flags.images)
        is_test = np.arange(len(pixels.labels)) % 5 == 4  # files may be sorted by class
        train, test = (Pixels(*(t[chosen] for t in pixels)) for chosen in (~is_test, is_test))
        if not len(test.labels):
            raise ConfigError(f"{flags.images} has fewer than five samples, expected more")
        if unseen := sorted({*test.labels.tolist()} - {*train.labels.tolist()}):
            raise ConfigError(
                f"{flags.images}: every fifth sample is for tests, so that training lacks the "
                f"labels {unseen}; shuffle the samples, or sort them by class"
            )
        line = f"{flags.images}: {len(train.labels)} samples, and every fifth one for tests"
    else:
        source, line = find_dataset(flags)
        train, test = map(pool, read(source, flags.data))
        if (shape := train.x.shape) != (expected := (len(train.labels), SIZES[0])):
            raise ConfigError(
                f"pool returns images of shape {shape}, expected {expected}, {SIDE} × {SIDE} each; "
                "mend it"
            )
    if line and speaks:
        print(line)
    cli.check_samples(flags.samples, len(train.labels))
    train = Pixels(*(t[: flags.samples or DEFAULT_SAMPLES] for t in train))
    first_label = 0
    if flags.weights:
        images, model = mat.LabelledImages(*train, first), numpy_mlp.NumpyMLP(SIZES)
        first_label, line = mat.settle_first_label(
            flags.weights, model, images, source, flags.first_label
        )
        if speaks:
            print(line)
    return (train, test), first_label


def first_model(plan: Plan) -> numpy_mlp.NumpyMLP:
    """Return the network with the first weights of a run: of a file, or drawn."""
    model = numpy_mlp.NumpyMLP(SIZES, loss="bce", seed=plan.seed)
    if plan.weights:
        mat.load_weights(Path(plan.weights), model, plan.first_label)
    return model


def seconds_since(before: dict[str, float]) -> dict[str, float]:
    """Return the seconds by phase since ``before``, and set it to now."""
    if Phases.active is None:
        return {}
    now = Phases.active.seconds
    found = {name: s - before.get(name, 0.0) for name, s in now.items() if s > before.get(name, 0)}
    before.update(now)
    return found


def counted(plan: Plan, rank: int, ranks: int) -> Iterable[int]:
    """Return the iterations of a run. Where they take long, process 0 says how far they are, by
    lines, since a bar would take time from what is timed."""
    iterations, processes = range(plan.iterations), "processes" if ranks > 1 else "process"
    return iterations if rank else say_progress(iterations, f"iterations on {ranks} {processes}")


def backward_by_samples(model: numpy_mlp.NumpyMLP, inputs: Sequence[Array], delta: Array) -> Array:
    """Return what `NumpyMLP.backward` does, by a loop over samples."""
    total = np.zeros_like(model.parameters)
    for i in range(len(delta)):
        total += model.backward([layer[i : i + 1] for layer in inputs], delta[i : i + 1])
    return total


def train_numpy(
    world: mpi.Communicator,
    splits: Sequence[Pixels] | None,
    plan: Plan,
    way: Way = Way(),  # noqa: B008
) -> Result:
    """Train on the processes of an MPI communicator. Process 0 has the samples; the others pass
    None."""
    with phase("scatter"):
        pairs: Sequence[Sequence[Array | None]] = splits or [(None, None)] * 2
        shares = [[mpi.scatter(world, array) for array in pair] for pair in pairs]
    counts = world.bcast([len(labels) for _, labels in splits] if splits else None)
    (x, labels), count = shares[0], counts[0]
    # Process 0 has the weights. One vector has both matrices and both biases, so one message
    # carries them.
    model = numpy_mlp.NumpyMLP(SIZES, loss="bce", init="zero") if world.rank else first_model(plan)
    optimizer = numpy_mlp.SGD(model, plan.lr, plan.momentum)
    # The gradient and the cost of this process's share.
    summed = np.empty(model.parameters.size + 1, model.parameters.dtype)
    total = np.empty_like(summed)
    rows = np.empty((world.size, summed.size), summed.dtype) if world.rank == 0 else None
    costs, times, by_phase = [], [], []
    with phase("broadcast"):
        world.Bcast(model.parameters)
    before: dict[str, float] = {}
    seconds_since(before)
    for iteration in counted(plan, world.rank, world.size):
        start = time.perf_counter()
        if way.scatter == "each" and iteration:
            with phase("scatter"):
                x, labels = (mpi.scatter(world, array) for array in pairs[0])
        if way.exchange == "gather" and iteration:
            with phase("broadcast"):
                world.Bcast(model.parameters)
        with phase("hidden layer"):
            inputs = model.hidden_layers(x)
        with phase("output layer"):
            z = model.output_layer(inputs[-1])
        with phase("cost"):
            summed[-1], delta = model.loss_sum(z, labels)
        with phase("backward"):
            backward = model.backward
            if way.backward == "samples":
                backward = partial(backward_by_samples, model)
            summed[:-1] = backward(inputs, delta)
        with phase("exchange"):
            if way.exchange == "allreduce":
                world.Allreduce(summed, total)
            else:
                world.Gather(summed, rows)
                if rows is not None:
                    rows.sum(0, out=total)
        if way.exchange == "allreduce" or world.rank == 0:  # after Gather the others have no sum
            with phase("descent"):
                optimizer.step(total[:-1] / count)
            costs.append(float(total[-1]) / count)
        times.append(time.perf_counter() - start)
        by_phase.append(seconds_since(before))
    world.Bcast(model.parameters)
    ends = [mpi.evaluate(world, model, *pair) for pair in zip(shares, counts, strict=True)]
    check_finite(f"a cost at the rate {plan.lr:g}", *costs, *(cost for cost, _ in ends))
    return Result(costs, times, ends, model.weights[0], by_phase)


def train_plans(
    world: mpi.Communicator,
    splits: Sequence[Pixels] | None,
    plans: Sequence[Plan],
    way: Way,
) -> tuple[Phases, dict[Plan, Result]]:
    """Train by each of the ``plans``, and return the phases of all of them, and each one's
    result."""
    with Phases(names=("scatter", "broadcast", *LOOP)) as phases:
        return phases, {plan: train_numpy(world, splits, plan, way) for plan in plans}


def train_torch(world: "World", splits: Sequence[Pixels], plan: Plan) -> Result:
    """Train on all ranks by DistributedDataParallel, from the weights of `train_numpy`."""
    import torch
    from torch.nn.functional import one_hot
    from torch.nn.parallel import DistributedDataParallel

    from torchpar.data import Samples
    from torchpar.nn import MLP
    from torchpar.training import evaluate

    def cost_sum(p: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the binary cross-entropy of the probabilities ``p (b, classes)``, summed over
        both.

        `binary_cross_entropy` would cut each term at 100, and hide a divergence.
        """
        is_right = one_hot(labels, p.shape[-1]).bool()
        return -torch.where(is_right, p, 1 - p).log().sum()

    model = MLP(SIZES, output="sigmoid").to(world.device)
    first_model(plan).copy_to(model)
    replica = DistributedDataParallel(model) if world.world_size > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), plan.lr, plan.momentum)
    costs, times, by_phase = torch.zeros(plan.iterations, device=world.device), [], []
    train, test = (
        Samples(torch.from_numpy(split.x), torch.from_numpy(split.labels), DIGITS).to(world.device)
        for split in splits
    )
    x, labels = map(world.share, (train.features, train.labels))
    cost_sum(replica(x), labels).backward()  # a GPU's kernels are compiled in the first call
    optimizer.zero_grad()
    before: dict[str, float] = {}
    seconds_since(before)
    for i in counted(plan, world.rank, world.world_size):
        start = time.perf_counter()
        with nullcontext() if Phases.active is None else Phases.active.step():
            loss = cost_sum(replica(x), labels)
            (loss * (world.dp_size / len(train))).backward()  # the wrapper averages over the ranks
            optimizer.step()
            optimizer.zero_grad()
        costs[i] = loss.detach()
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        by_phase.append(seconds_since(before))
    costs = world.sum(costs) / len(train)
    ends = []
    for samples in (train, test):
        cost, p = evaluate(model, samples, world, cost_sum)
        ends.append((cost, (p.argmax(1) == samples.labels).double().mean().item()))
    check_finite(f"a cost at the rate {plan.lr:g}", *costs.tolist(), *(cost for cost, _ in ends))
    weights = next(model.parameters()).detach().cpu().numpy().T
    return Result(costs.tolist(), times, ends, weights, by_phase)


def costs_of(runs: dict[Plan, Result]) -> list[float]:
    """Return the costs of all iterations of all runs."""
    return [cost for run in runs.values() for cost in run.costs]


def iteration_rows(runs: dict[Plan, Result], **labels: object) -> Iterator[console.Row]:
    """Yield the cost and the seconds of every iteration of every run."""
    for plan, run in runs.items():
        for i, (cost, seconds) in enumerate(zip(run.costs, run.times, strict=True), 1):
            row = labels | plan._asdict() | {"iteration": i, "cost": cost, "seconds": seconds}
            yield row | {f"{name}_seconds": s for name, s in phases_of(run, i).items()}


def phases_of(run: Result, iteration: int) -> dict[str, float]:
    return run.phases[iteration - 1] if run.phases else {}


def print_phases(way: Way, columns: dict[str, tuple[Phases, dict[Plan, Result]]]) -> None:
    """Print a table of the milliseconds of an iteration by phase, and of what is done once in a
    run."""
    often = {"scatter": way.scatter == "each", "broadcast": way.exchange == "gather"}
    once = [name for name, each in often.items() if not each]
    each = [name for name, each in often.items() if each] + [*LOOP]
    rows: list[dict[str, str]] = [{"phase": f"{name}, once"} for name in once]
    rows += [{"phase": way.exchange if name == "exchange" else name} for name in each]
    at = 1 + rows.index({"phase": "cost"})
    rows[at:at] = [{"phase": "forward: these three"}]
    rows += [{"phase": "iteration"}]
    for column, (phases, runs) in columns.items():
        count = sum(len(run.costs) for run in runs.values())
        forward = sum(phases.seconds[name] for name in FORWARD) / count
        values = [phases.seconds[name] / len(runs) for name in once]
        values += [phases.seconds[name] / count for name in each]
        values[at:at] = [forward]
        values += [sum(sum(run.times) for run in runs.values()) / count]
        for row, seconds in zip(rows, values, strict=True):
            row[column.replace(", ", ",\n")] = f"{1000 * seconds:.3f}"
    console.print_rows(rows, "milliseconds by phase, process 0")


def report(
    flags: Flags,
    device: str,
    ranks: int,
    runs: dict[Plan, Result],
    metrics: Sequence[console.Row],
) -> None:
    """Print the figures of the runs, and write the metrics and plots that the flags ask for."""
    rows: list[console.Row] = []
    for plan, (costs, times, (train, test), *_) in runs.items():
        figures = {"first_cost": costs[0], "last_cost": costs[-1], "train_accuracy": train[1]}
        figures |= {"test_loss": test[0], "test_accuracy": test[1], "seconds": sum(times)}
        rows.append(plan._asdict() | figures | {"library": flags.library, "ranks": ranks})
    columns = (
        "iterations",
        "lr",
        "momentum",
        "first_cost",
        "last_cost",
        "train_accuracy",
        "test_accuracy",
    )
    console.print_rows(rows, columns=columns)
    console.write_metrics(flags.metrics, [*metrics, *iteration_rows(runs, ranks=ranks), *rows])
    if flags.plots:
        curves = {
            f"rate {plan.lr:g}, momentum {plan.momentum:g}": run.costs for plan, run in runs.items()
        }
        plots.save_curves(flags.plots / "costs.png", curves, "iteration", "cost")
        neurons = runs[plan].weights.T.reshape(-1, SIDE, SIDE)
        plots.save_matrices(flags.plots / "neurons.png", neurons, "Weights of each hidden neuron")
    print(console.last_line(test[1], test[0], sum(times), ranks, device))


def print_iterations(plan: Plan, run: Result, every: bool = False) -> None:
    """Print the cost and the time of some iterations, or of ``every`` one with its phases;
    --metrics has all."""
    print(f"rate {plan.lr:g}, momentum {plan.momentum:g}")
    for i, (cost, seconds) in enumerate(zip(run.costs, run.times, strict=True), 1):
        if every or i in SHOWN or i == plan.iterations:
            line = f"iteration {i}/{plan.iterations} | cost {cost:.4f} | {1000 * seconds:.2f} ms"
            parts = [f"{name} {1000 * s:.2f}" for name, s in phases_of(run, i).items()] * every
            print(" | ".join([line, *parts]))


def run_numpy(flags: Flags, plans: Sequence[Plan]) -> None:
    """Train in NumPy: on several processes, after one has trained alone."""
    # A loss that is not finite is an error of its own.
    with mpi.join() as world, np.errstate(over="ignore", invalid="ignore"):
        splits = None
        if world.rank == 0:  # the others get the samples and the weights
            splits, first_label = load(flags)
            plans = [plan._replace(first_label=first_label) for plan in plans]
            console.print_load()
        way = Way(flags.exchange, flags.scatter, flags.backward)
        train = partial(train_plans, splits=splits, plans=plans, way=way)
        columns = alone = one_process.train_on_one(world, train)
        if world.size > 1:
            columns = alone | {f"{world.size} processes": train(world)}
        if world.rank > 0:
            return
        *_, (_, runs) = columns.values()
        metrics: list[console.Row] = []
        agreement = ""
        if world.size > 1:
            (_, one), *_ = alone.values()
            agreement = one_process.compare_losses(
                costs_of(one), {f"--exchange {flags.exchange}": costs_of(runs)}
            )
            for name, (_, of_one) in alone.items():
                metrics += iteration_rows(of_one, run=name, ranks=1)
                if flags.every_iteration:
                    print(name)
                    for plan, run in of_one.items():
                        print_iterations(plan, run, every=True)
            print(f"{world.size} processes")
        for plan, run in runs.items():
            print_iterations(plan, run, flags.every_iteration)
        print_phases(way, columns)
        if agreement:
            print(agreement)
        report(flags, "cpu", world.size, runs, metrics)


def run_torch(flags: Flags, plans: Sequence[Plan]) -> None:
    """Train in PyTorch on all ranks."""
    from torchpar.parallel import join_world
    from torchpar.parallel.launch.agreement import check_same_on_all_ranks

    with join_world(flags.device, gloo_yields=True) as world:
        splits, first_label = load(flags, speaks=world.rank == 0)
        plans = [plan._replace(first_label=first_label) for plan in plans]
        check_same_on_all_ranks(None, "the flags and the data", flags.shared() | checksums(splits))
        # Phases wait for the device, which costs time.
        with Phases(world.device) if flags.every_iteration else nullcontext():
            runs = {plan: train_torch(world, splits, plan) for plan in plans}
        if world.rank == 0:
            for plan, run in runs.items():
                print_iterations(plan, run, flags.every_iteration)
            report(flags, world.device.type, world.world_size, runs, ())


def main(flags: Flags) -> None:
    first = flags.seed, str(flags.weights or "")
    plans = (
        Plan(60, 0.1, 0.0, *first),
        Plan(flags.iterations, flags.lr, flags.momentum, *first),
    )
    (run_torch if flags.library == "torch" else run_numpy)(flags, plans)


if __name__ == "__main__":
    cli.main(main, Flags, mpi.agreeing)
