# SPDX-License-Identifier: MIT
"""Data and model parallelism without PyTorch: a NumPy network on processes that exchange arrays by
MPI.

    mpirun -n 2 python examples/train_mpi.py
    mpirun -n 2 python examples/train_mpi.py --batch-size 10 --hidden 30 --lr 0.1 --momentum 0.5
    mpirun -n 2 python examples/train_mpi.py --compare

Each process draws the same weights and the same batches. The work of a step is divided in one of
two ways:

``--split data``: a process computes the gradient of its share of the batch. Allreduce adds up the
gradients. ``--split model``: a process has its share of the hidden units, and takes the whole
batch. Allreduce adds up their contributions to the outputs z. The backward pass sends no message.

Either way all processes take the steps that one process would, so the losses are the same. A table
at the end shows the time of each phase, and the bytes of a step's message. A process waits for
Allreduce, where DistributedDataParallel computes on. With batches of 10, as in the second command,
the messages cost more time than two processes save. The third trains on one process with one
thread, on one with all threads, and by both splits. It sets them side by side, and checks that all
losses are the same.

NumPy computes on the CPU. A GPU for each process is what torchrun gives to `train_ddp.py --plain`,
which divides the samples, and to `train_tensor_parallel.py`, which divides the hidden units.

PyTorch is needed for --log-dir alone. --report needs matplotlib and jinja2. Otherwise a checkout
needs

    pip install --no-deps -e . && pip install numpy mpi4py mpich rich tyro
"""

import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal, NamedTuple, TypeVar

# NumPy reads it when it is imported. With a process per core each process needs one thread. One
# process alone takes all threads.
if any(os.environ.get(size, "1") != "1" for size in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE")):
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from support import cli, console, one_process, report

import numpy as np

from torchpar.baselines import mpi
from torchpar.baselines.numpy_mlp import SGD, Array, Hidden, Init, NumpyMLP, batches
from torchpar.data.files import Images, checksums, read
from torchpar.errors import ConfigError, check_finite
from torchpar.training.outcome import EpochResult
from torchpar.training.profile.phases import Phases, phase
from torchpar.training.profile.record import Call, RankRecord
from torchpar.training.profile.replay_trace import from_records, recording, write

T = TypeVar("T")
Split = Literal["data", "model"]
NO_RESULT = "?"  # in place of a figure that the work itself cannot have
PHASES = ("data", "forward", "backward", "collectives", "optimizer")


@dataclass(kw_only=True)
class Flags(cli.DataFlags):
    """Train a digit classifier in NumPy, by data or model parallelism over MPI."""

    # The processes share the samples of a batch, or the units of the hidden layer.
    split: Split = "data"
    # Train on one process with one thread and with all, then by both splits; print their times side
    # by side.
    compare: bool = False
    epochs: cli.Count = 10  # Passes over the training samples.
    batch_size: cli.Count = 512  # Samples per step, over all processes.
    lr: cli.Number = 0.5  # Learning rate.
    momentum: cli.Share = 0.9  # Momentum.
    weight_decay: cli.Number = 1e-5  # L2 penalty λ of the weights: λ/2·‖W‖² in the loss.
    decay_biases: bool = False  # Penalise the biases, too.
    hidden: tuple[cli.Size, ...] = (256,)  # Widths of the hidden layers.
    activation: Hidden = "sigmoid"  # Activation of the hidden layers.
    init: Init = "xavier"  # First weights; zero shows why they are drawn at random.
    samples: cli.Count | None = None  # Train on the first ones only.
    log_dir: cli.LogDir = None  # Folder for TensorBoard: losses, accuracy and speed.
    report: cli.Report = None  # Folder for a page of the run, run.html.
    # A page that plays some recorded steps, such as step.html; with --compare both splits.
    replay: cli.Replay = None

    def check(self) -> None:
        super().check()
        if self.replay:
            cli.check_replay(self.replay)
        if self.device == "cuda":
            raise ConfigError(
                "--device cuda: NumPy computes on the CPU; torchrun examples/train_ddp.py takes a "
                "GPU for each process"
            )
        if len(self.hidden) != 1 and (self.compare or self.split == "model"):
            widths = " ".join(map(str, self.hidden))
            raise ConfigError(
                f"--hidden {widths} with --split model, expected one hidden layer; take one width"
            )


class Messages:
    """A communicator that records the calls of Allreduce, and the bytes that this process gives."""

    def __init__(self, world: mpi.Communicator, dimension: str):
        self.world, self.dimension = world, dimension
        self.rank, self.size = world.rank, world.size
        self.calls: list[Call] = []  # of the current step

    def Allreduce(self, mine: Array, total: Array) -> None:
        start = time.perf_counter()
        with phase("collectives"):
            self.world.Allreduce(mine, total)
        if self.size > 1:
            seconds = time.perf_counter() - start
            self.calls.append(Call(self.dimension, "Allreduce", mine.nbytes, start, seconds))

    def allgather(self, value: T) -> list[T]:
        return self.world.allgather(value)  # type: ignore[no-any-return]


class DataParallel:
    """Data parallelism: every process has all weights, and takes its share of the samples."""

    def __init__(self, model: NumpyMLP, world: Messages):
        self.model, self.world = model, world
        self.own = np.empty(model.parameters.size + 1, model.parameters.dtype)  # gradient and loss
        self.total = np.empty_like(self.own)

    def share(self, rows: Array) -> Array:
        own: Array = rows[mpi.shares(len(rows), self.world.size)[self.world.rank]]
        return own

    def gradients(self, x: Array, labels: Array) -> tuple[float, Array]:
        inputs, z = self.model.forward(x)
        self.own[-1], delta = self.model.loss_sum(z, labels)
        with phase("backward"):
            self.own[:-1] = self.model.backward(inputs, delta)
        self.world.Allreduce(self.own, self.total)
        return float(self.total[-1]), self.total[:-1]

    def evaluate(self, x: Array, labels: Array) -> tuple[float, float]:
        return mpi.evaluate(self.world, self.model, (self.share(x), self.share(labels)), len(x))

    def whole(self) -> NumpyMLP:
        return self.model


class ModelParallel:
    """Model parallelism: every process has its share of the hidden units, and takes all samples."""

    def __init__(self, whole: NumpyMLP, world: Messages):
        self.model = mpi.HiddenSplitMLP(whole, world)

    def share(self, rows: Array) -> Array:
        return rows

    def gradients(self, x: Array, labels: Array) -> tuple[float, Array]:
        inputs, z = self.model.forward(x)  # the step's only Allreduce is in the output layer
        loss, delta = self.model.loss_sum(z, labels)
        with phase("backward"):
            return loss, self.model.backward(inputs, delta)

    def evaluate(self, x: Array, labels: Array) -> tuple[float, float]:
        loss, right = self.model.evaluate(x, labels)
        return loss / len(x), right / len(x)

    def whole(self) -> NumpyMLP:
        return self.model.whole()


class Training(NamedTuple):
    """A run's figures.

    Attributes:
        results: of each epoch.
        steps: number of them.
        records: what the steps took on each process.
        sent: the calls of Allreduce in the first step.
        model: the trained network, with all units.
    """

    results: list[EpochResult]
    steps: int
    records: list[RankRecord]
    sent: list[Call]
    model: NumpyMLP

    @property
    def seconds(self) -> Mapping[str, float]:
        """Of each phase of the steps, on process 0."""
        return self.records[0].seconds

    @property
    def bytes(self) -> int:
        """Of the arrays that each process gives to Allreduce in a step."""
        return sum(call.bytes for call in self.sent)


def train(
    flags: Flags, split: Split, world: mpi.Communicator, data: tuple[Images, Images]
) -> Training:
    """Train on the processes of ``world``; all of them call this."""
    train, test = data
    cli.check_samples(flags.samples, len(train.labels))
    count = len(train.labels[: flags.samples])
    x, labels = train.inputs()[:count], train.labels[:count]
    test_x = test.inputs()
    sizes = [x.shape[1], *flags.hidden, len(test.classes)]
    cli.check_memory(sizes)
    # One seed draws the same weights in every process.
    model = NumpyMLP(sizes, hidden=flags.activation, init=flags.init, seed=flags.seed)
    messages = Messages(world, "dp" if split == "data" else "tp")
    parallel = DataParallel(model, messages) if split == "data" else ModelParallel(model, messages)
    optimizer = SGD(
        parallel.model, flags.lr, flags.momentum, flags.weight_decay, flags.decay_biases
    )
    order = np.random.default_rng(flags.seed)  # the same everywhere
    phases, results = Phases(names=PHASES), list[EpochResult]()
    steps = 0

    def draw() -> Iterator[tuple[Array, Array, int]]:
        """Yield this process's samples of each batch, perhaps none, and the batch's size."""
        for batch in batches(count, flags.batch_size, order):
            indices = parallel.share(batch)
            yield x[indices], labels[indices], len(batch)

    for epoch in console.progress(range(1, flags.epochs + 1), "epochs", world.rank == 0):
        start, train_loss = time.perf_counter(), 0.0
        with phases:
            for own_x, own_labels, size in phases.steps(draw()):
                loss, gradient = parallel.gradients(own_x, own_labels)
                optimizer.step(gradient / size)
                train_loss += loss
                steps += 1
                if steps == 1:
                    sent = messages.calls
                phases.current.calls, messages.calls = messages.calls, []
        speed = count / (time.perf_counter() - start)
        test_loss, accuracy = parallel.evaluate(test_x, test.labels)
        check_finite(f"a loss of epoch {epoch}", train_loss, test_loss)
        figures = (epoch, train_loss / count, test_loss, accuracy, speed)
        results.append(EpochResult(*figures, time.perf_counter() - start, world.size, "cpu"))
        if world.rank == 0:
            print(console.epoch_line(results[-1], flags.epochs))
    memory = {"weights": parallel.model.parameters.nbytes}
    records = world.allgather(phases.record(world.rank, memory))
    return Training(results, steps, records, sent, parallel.whole())


def compare(
    flags: Flags, world: mpi.Communicator, data: tuple[Images, Images]
) -> dict[str, Training]:
    """Train on one process, while the others wait, and by each split. Process 0 prints a table."""
    if world.rank == 0:
        console.print_load()
    alone = one_process.train_on_one(world, partial(train, flags, "data", data=data))
    splits: dict[str, Training] = {}
    ways: tuple[Split, ...] = ("data", "model")
    for split in ways:
        if world.rank == 0:
            print(f"{world.size} processes, --split {split}")
        splits[f"--split {split}"] = train(flags, split, world, data)
    if world.rank == 0:
        losses = {name: [epoch.train_loss for epoch in run.results] for name, run in splits.items()}
        one, *_ = alone.values()
        if flags.init == "zero":
            agreement = (
                "the losses are not compared: from zero roundings tell the hidden units apart"
            )
        else:
            agreement = one_process.compare_losses(
                [epoch.train_loss for epoch in one.results], losses
            )
        print_comparison(flags, world.size, alone | splits, base=[*alone][-1])
        print(agreement)
    return alone | splits


def print_comparison(flags: Flags, processes: int, runs: dict[str, Training], base: str) -> None:
    """Print the phases and the messages of the runs side by side; speed-ups are over the run
    ``base``."""
    rows: list[dict[str, str]] = []
    columns = [run.replace(", ", ",\n") for run in runs]

    def add(row: str, values: Iterable[str]) -> None:
        rows.append({"": row} | dict(zip(columns, values, strict=True)))

    ms = [{name: 1000 * s / run.steps for name, s in run.seconds.items()} for run in runs.values()]
    steps = {name: sum(of_run.values()) for name, of_run in zip(runs, ms, strict=True)}
    for name in PHASES:
        add(f"{name}, ms", (f"{of_run[name]:.3f}" for of_run in ms))
    add("a step, ms", (f"{step:.3f}" for step in steps.values()))
    all_threads = base.removeprefix("1 process, ")
    gains = [steps[base] / step for step in steps.values()]
    add(
        f"speed-up over {all_threads}",
        (f"{gain:.2f}" if gain <= processes else NO_RESULT for gain in gains),
    )
    add("messages a step", (str(len(run.sent)) for run in runs.values()))
    add("bytes a step", (f"{run.bytes:,}" for run in runs.values()))
    console.print_rows(rows, f"{processes} processes, batches of {flags.batch_size}")
    if max(gains) > processes:
        print(
            f"{NO_RESULT}: a speed-up above {processes} on {processes} processes is no result; "
            "other programs have disturbed the times, so repeat it on an idle machine"
        )


def main(flags: Flags) -> None:
    # A loss that is not finite is an error of its own.
    with mpi.join() as world, np.errstate(over="ignore", invalid="ignore"):
        if flags.compare and world.size == 1:
            raise ConfigError(
                "--compare needs several processes; mpirun -n 2 python examples/train_mpi.py"
            )
        if flags.replay and len({*world.allgather(platform.node())}) > 1:
            raise ConfigError("--replay compares the clocks of one machine; start all ranks on one")
        data = read(flags.dataset, flags.data)
        digests = checksums([(images.features, images.labels) for images in data])
        mpi.check_same(world, digests, "copy the files of --data from one machine to the others")
        if flags.compare:
            runs = compare(flags, world, data)
        else:
            runs = {f"--split {flags.split}": train(flags, flags.split, world, data)}
        if world.rank > 0:
            return
        rows = [
            asdict(result) | {"run": name} for name, run in runs.items() for result in run.results
        ]
        *_, run = runs.values()
        console.write_metrics(flags.metrics, rows)
        console.write_log(flags.log_dir, rows[-flags.epochs :], "epoch")
        if flags.report:
            page = {name: report.as_run(run.results, run.records) for name, run in runs.items()}
            test = data[1]
            report.write(flags.report, page, run.model.forward(test.inputs())[1], test)
        if flags.replay:
            chosen = [*runs.items()][-2:]  # with --compare the two splits
            launcher = "mpirun -n {} python"
            found = [
                recording(from_records(run.records), name, launcher=launcher)
                for name, run in chosen
            ]
            print(f"replay: {write(flags.replay, *found)}")
        if not flags.compare:
            console.print_phases(run.seconds)
            if run.sent:
                print(
                    f"in each step a process gives {run.bytes:,} bytes to {len(run.sent)} Allreduce"
                )
        if flags.init == "zero":
            first, *others = run.model.weights[0].T
            apart = max((np.abs(first - other).max() for other in others), default=0)
            largest = np.abs(first).max()
            most = f"at most {largest:.1g} in magnitude, and {apart:.1g} from unit to unit"
            print(f"weights of the hidden units: {most}")
        print(console.summary(run.results))


if __name__ == "__main__":
    cli.main(main, Flags, mpi.agreeing)
