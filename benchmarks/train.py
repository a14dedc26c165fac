# SPDX-License-Identifier: MIT
"""Train MLPs on MNIST in many ways, side by side: ``python -m benchmarks run train``.

Every contestant trains by plain SGD from the same first weights, and all but MPI's on the same
batches. The loss of each batch is checked with float64; of MPI and Lightning, which are whole
programs, the mean loss. They take turns of an epoch each. A time is the median over the turns, and
a speed-up the median of the ratios. One thread, unless ``--threads`` says otherwise; two ranks have
one each.

With ``--device cuda`` the same step is launched in other ways: eagerly, compiled, and as a CUDA
graph by PyTorch's own means and by `torchpar.training.graphed`.
"""

import argparse
import os

if __name__ == "__main__":  # libraries read the environment when they are imported
    early = argparse.ArgumentParser("python -m benchmarks run train", add_help=False)
    early.add_argument("--threads", type=int, default=1)
    if (count := early.parse_known_args()[0].threads) < 1:
        early.error(f"--threads is {count}, expected at least 1")
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[name] = str(count)

import json
import logging
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import cache, cached_property, lru_cache, partial
from importlib.util import find_spec
from itertools import chain, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from torchpar import data
from torchpar.baselines import mpi, numpy_mlp, pure_python
from torchpar.baselines.numpy_mlp import Array
from torchpar.data import Batch
from torchpar.errors import ConfigError, writing
from torchpar.nn import MLP
from torchpar.parallel.launch.world import World, join_world
from torchpar.parallel.split.shared_memory import register_shared_memory_hook
from torchpar.training import Classification, Run, graphed, sgd
from torchpar.training.fused import FusedGradients
from torchpar.training.graphed import WARMUP

from .digits import DATA, Digits
from .flags import Command, require, run
from .processes import Group, current_world, start_ranks
from .results import CORES, Result, Table, markdown, number, print_results
from .timing import Contestant, Rejected, Turn, take_turns, time_calls

LR = 0.1
ROUNDS = 4  # epochs
SECONDS = 20.0  # of a contestant's epochs
SLOW = {"pure Python": 200, "tutorial script": 2000}  # digits, of which an epoch is extrapolated
# The error that is allowed, of the mean loss of any batch. Rounding moves it by less than 1e-5
# within an epoch; a learning rate that is 1% off, or another order of the samples, moves that of
# some batch by 1e-2.
LOSS_ERROR = 1e-3
# The same of the mean loss of an epoch. Rounding moves it by less than 1e-7; a learning rate that
# is 1% off by 7e-4 and more, another order of the samples by 6e-5 and more.
MEAN_LOSS_ERROR = 1e-5
MPIRUN = mpi.find_mpirun()
INSTALLED = {"MPI": MPIRUN and find_spec("mpi4py"), "Lightning": find_spec("lightning")}
TIMEOUT = 120  # seconds of an epoch by MPI
PLAIN, FUSED = "plain eager", "torchpar"
COLUMNS = ("contestant", "note", "p50_ms", "samples", "samples_per_s", "speedup", "first_s", "ok")

Order = Sequence[Array]  # the indices of each batch
# Prepares, yields None, then trains on the batches and yields the mean loss of each.
Losses = Iterator[Tensor | None] | Iterator[float | None]
Train = Callable[["Inputs", Order], Losses]
Gradients = Callable[[Tensor, Tensor, int], Tensor]  # sets them; the sum of the losses
Epoch = Callable[[Order], tuple[float, Array]]  # the seconds, and the mean loss of each batch
Step = Callable[[Tensor, Tensor], Tensor]  # trains on a batch; its mean loss


class Training(NamedTuple):
    """An epoch of a network with a batch size, on the first samples of MNIST; 0 means all."""

    sizes: tuple[int, ...]
    batch_size: int
    samples: int = 0


FULL = [
    Training((784, 30, 10), 10),
    Training((784, 128, 10), 64),
    Training((784, 128, 64, 10), 128),
    Training((784, 512, 512, 10), 128),
]
QUICK = [Training((784, 30, 10), 10, samples=105)]


class Inputs:
    """An epoch of SGD at rate `LR` for all contestants: the same samples, batches and first
    weights."""

    def __init__(self, training: Training):
        train, self.test = data.load("mnist", DATA)
        self.train = train[: training.samples or None]
        self.training = training
        self.x: Array = self.train.inputs(slice(None)).numpy()  # (n, 784) float32 in [0, 1]
        self.labels: Array = self.train.labels.numpy()
        # In the place of the labels: each sample is its own class.
        numbers = torch.arange(len(self.train))
        numbered = data.Samples(self.train.features, numbers, tuple(map(str, numbers.tolist())))
        batches = data.batches(numbered, training.batch_size, seed=0, epoch=1)
        # As `torchpar.training.Run` has it.
        self.order = [batch.labels.numpy() for batch in batches]
        self.start = numpy_mlp.NumpyMLP(training.sizes, seed=0)

    @cached_property
    def losses(self) -> Array:
        """The mean loss of each batch of ``order``, in float64."""
        return self.losses_of(self.order)

    def losses_of(self, order: Order) -> Array:
        """Return the mean loss of each batch of ``order``, trained in this order in float64."""
        model = numpy_mlp.NumpyMLP(self.training.sizes, dtype=np.float64)
        model.parameters[:] = self.start.parameters
        optimizer, losses = numpy_mlp.SGD(model, LR), []
        for indices in order:
            loss, gradient = model.gradients(
                self.x[indices].astype(np.float64), self.labels[indices]
            )
            optimizer.step(gradient / len(indices))
            losses.append(loss / len(indices))
        return np.array(losses)

    def check(self, losses: Array, count: int) -> None:
        """Raise if these are not the mean losses of the first ``count`` batches."""
        expected = self.losses[:count]
        if len(losses) != count:
            raise Rejected(f"{len(losses)} losses of {count} batches")
        off = np.abs(losses - expected).max() / expected.mean()
        if not off <= LOSS_ERROR:
            raise Rejected(
                f"a loss is off by {off:.0e} of their mean, {LOSS_ERROR:.0e} are allowed"
            )


# Contestants on one rank


def by_pure_python(inputs: Inputs, order: Order) -> Iterator[float | None]:
    weights = [weight.tolist() for weight in inputs.start.weights]
    biases = [bias.tolist() for bias in inputs.start.biases]
    batches = [(inputs.x[indices].tolist(), inputs.labels[indices].tolist()) for indices in order]
    yield None
    for x, labels in batches:
        loss, d_weights, d_biases = pure_python.gradients(weights, biases, x, labels)
        pairs = [*zip(biases, d_biases, strict=True)]
        for weight, d_weight in zip(weights, d_weights, strict=True):
            pairs += zip(weight, d_weight, strict=True)
        for row, d_row in pairs:
            for j, d in enumerate(d_row):
                row[j] -= LR / len(x) * d
        yield loss / len(x)


def by_numpy(
    inputs: Inputs,
    order: Order,
    gradients: Callable[
        [numpy_mlp.NumpyMLP, Array, Array], tuple[float, Array]
    ] = numpy_mlp.NumpyMLP.gradients,
) -> Iterator[float | None]:
    model = numpy_mlp.NumpyMLP(inputs.training.sizes)
    model.parameters[:] = inputs.start.parameters
    optimizer = numpy_mlp.SGD(model, LR)
    yield None
    for indices in order:
        loss, gradient = gradients(model, inputs.x[indices], inputs.labels[indices])
        optimizer.step(gradient / len(indices))
        yield loss / len(indices)


def by_njit(inputs: Inputs, order: Order, threads: int | None) -> Iterator[float | None]:
    """Train the NumPy network, its gradients by compiled loops."""
    import numba

    from torchpar.baselines import numba_njit

    def gradients(model: numpy_mlp.NumpyMLP, x: Array, labels: Array) -> tuple[float, Array]:
        loops = numba_njit.PARALLEL if threads else numba_njit.SERIAL
        numba.set_num_threads(threads or 1)
        loss, *layers = numba_njit.gradients(loops, model.weights, model.biases, x, labels)
        return loss, np.concatenate(
            [t.ravel() for layer in zip(*layers, strict=True) for t in layer]
        )

    return by_numpy(inputs, order, gradients)


def by_tutorial_script(inputs: Inputs, order: Order) -> Iterator[Tensor | None]:
    model = native(inputs.training.sizes)
    inputs.start.copy_to(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    loader = DataLoader(Digits(inputs.train), batch_sampler=[indices.tolist() for indices in order])
    yield None
    for images, labels in loader:
        optimizer.zero_grad()
        loss = cross_entropy(model(images.flatten(1)), labels)
        loss.backward()
        optimizer.step()
        yield loss.detach()


def native(sizes: tuple[int, ...]) -> torch.nn.Module:
    """Return the network of PyTorch's own layers."""
    layers: list[torch.nn.Module] = []
    for m, n in pairwise(sizes):
        layers += [torch.nn.Linear(m, n), torch.nn.Sigmoid()]
    return torch.nn.Sequential(*layers[:-1])


def step_of(forward: Callable[..., Any], optimizer: torch.optim.Optimizer) -> Step:
    """The step that most scripts take."""

    def step(x: Tensor, labels: Tensor) -> Tensor:
        loss = cross_entropy(forward(x), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def by_steps(model: torch.nn.Module, step: Step, device: str = "cpu") -> Train:
    """Train a network, whose parameters are weight and bias of each layer in turn, by ``step``."""

    def train(inputs: Inputs, order: Order) -> Iterator[Tensor | None]:
        inputs.start.copy_to(model)
        x, labels = (torch.from_numpy(one).to(device) for one in (inputs.x, inputs.labels))
        batches = [torch.from_numpy(indices).to(device) for indices in order]
        yield None
        for indices in batches:
            yield step(x[indices], labels[indices])

    return train


def by_torch(sizes: tuple[int, ...], compiled: bool = False) -> Train:
    model = native(sizes)
    if compiled:
        model.compile()
    return by_steps(model, step_of(model, torch.optim.SGD(model.parameters(), lr=LR)))


def by_autograd(model: torch.nn.Module, ranks: int = 1) -> Gradients:
    """Gradients as `FusedGradients` computes them: of the mean loss over the batch of all ranks."""

    def gradients(x: Tensor, labels: Tensor, size: int) -> Tensor:
        loss = cross_entropy(model(x), labels, reduction="sum")
        # DistributedDataParallel averages over the ranks, whose shares may differ in size.
        (loss * (ranks / size)).backward()
        return loss.detach()

    return gradients


def by_lesson(world: World, fused: bool) -> Train:
    """Train by the loop of the lessons. It has an order of its own, that of `Inputs.order`."""

    def train(inputs: Inputs, order: Order) -> Iterator[float | None]:
        sizes, batch_size, _ = inputs.training
        model = MLP(sizes)
        inputs.start.copy_to(model)
        optimizer = sgd(model, LR, momentum=0, weight_decay=0)
        gradients = FusedGradients(model) if fused else by_autograd(model)
        yield None
        task = Classification(inputs.train, inputs.test[:10], batch_size)
        with Run(model, optimizer, None, world, task, epochs=1) as run:
            for epoch in run.epochs():
                for x, labels, size in run.batches(epoch):
                    loss = gradients(x, labels, size)
                    optimizer.step()
                    optimizer.zero_grad()
                    run.end_step(loss_sum=loss)
                    yield loss.item() / size

                run.end_epoch()

    return train


# Contestants on a GPU

COMPILED = {
    "torch.compile": None,
    "torch.compile, reduce-overhead": "reduce-overhead",
}
CALLABLES, GRAPH = "make_graphed_callables", "torchpar.training.graphed"
WAYS = (CALLABLES, GRAPH, *COMPILED)


def by_gpu(training: Training, way: str) -> Train:
    """Train `torchpar.nn.MLP` on a GPU. What is compiled or captured serves all epochs."""
    model = MLP(training.sizes, device="cuda")
    # Its update is one kernel, in all ways.
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, fused=True)
    eager = model.forward
    forward: Callable[..., Any] = eager
    if way in COMPILED:
        forward = torch.compile(model, mode=COMPILED[way])
    elif way == CALLABLES:
        sample = torch.zeros(training.batch_size, training.sizes[0], device="cuda")
        captured = torch.cuda.make_graphed_callables(model, (sample,))

        def forward_in_graph(x: Tensor) -> Any:
            # PyTorch's graph takes batches of one size.
            return (captured if len(x) == training.batch_size else eager)(x)

        forward = forward_in_graph

    step = step_of(forward, optimizer)
    return by_steps(model, graphed(step, optimizer) if way == GRAPH else step, "cuda")


# Contestants on two ranks

ON_RANKS = (
    "DistributedDataParallel",
    "DistributedDataParallel, shared memory",
    "gradients by hand",
)
inputs_on_rank = lru_cache(maxsize=1)(Inputs)


def epoch_on_rank(training: Training, contestant: str) -> tuple[float, Array]:
    """Train for an epoch: the seconds, and this rank's parts of the mean losses."""
    losses = data_parallel(training, contestant)
    dist.barrier()
    return timed_epoch(losses)


def data_parallel(training: Training, contestant: str) -> Iterator[Tensor | None]:
    world, inputs = current_world(), inputs_on_rank(training)
    model = MLP(training.sizes)
    inputs.start.copy_to(model)
    gradients: Gradients
    if contestant == ON_RANKS[2]:
        gradients = FusedGradients(model, world)
    else:
        replica = DistributedDataParallel(model, gradient_as_bucket_view=True)
        gradients = by_autograd(replica, world.world_size)
        if contestant == ON_RANKS[1]:
            register_shared_memory_hook(replica, world)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    yield None
    for x, labels, size in data.batches(
        inputs.train, training.batch_size, seed=0, epoch=1, share=world.share
    ):
        loss = gradients(x, labels, size)
        optimizer.step()
        optimizer.zero_grad()
        yield loss / size


# Whole programs, which train for an epoch in loops of their own: the seconds, and the mean loss


def lightning_epoch(inputs: Inputs) -> tuple[float, float]:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import Timer

    # It would list the hardware that it has not found.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

    class Network(LightningModule):
        """The network of the other contestants."""

        def __init__(self) -> None:
            super().__init__()
            self.mlp, self.total = MLP(sizes), 0.0

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            loss = cross_entropy(self.mlp(batch.x), batch.labels, reduction="sum")
            self.total += loss.item()
            return loss / batch.global_size

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=LR)

    sizes, batch_size = inputs.training[:2]
    model = Network()
    inputs.start.copy_to(model.mlp)
    timer = Timer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of workers and loggers that are not wanted here
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=1,
            callbacks=[timer],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, data.batches(inputs.train, batch_size, seed=0, epoch=1))
    return timer.time_elapsed("train"), model.total / len(inputs.x)


def mpi_epoch(inputs: Inputs) -> tuple[float, float]:
    """Run the lesson ``examples/train_mpi.py`` on two processes."""
    sizes, batch_size = inputs.training[:2]
    flags = f"--epochs 1 --batch-size {batch_size} --lr {LR} --momentum 0 --weight-decay 0"
    flags += f" --samples {len(inputs.x)} --hidden {' '.join(map(str, sizes[1:-1]))}"
    with TemporaryDirectory() as folder:
        metrics = Path(folder, "metrics")
        command = [
            str(MPIRUN),
            "-n",
            "2",
            sys.executable,
            str(DATA.parent / "train_mpi.py"),
            *flags.split(),
        ]
        done = subprocess.run(
            [*command, f"--metrics={metrics}"], capture_output=True, text=True, timeout=TIMEOUT
        )
        if done.returncode:
            raise Rejected(f"mpirun ended with {done.returncode}: {done.stderr.strip()[-200:]}")
        epoch = json.loads(metrics.read_text())
    # Give torch's threads work for a second: after they slept while other processes had the cores,
    # the next contestant's steps took ten times as long.
    x, start = torch.ones(300, 300), time.perf_counter()
    while time.perf_counter() - start < 1:
        torch.mm(x, x)
    return len(inputs.x) / epoch["samples_per_s"], epoch["train_loss"]


# Contestants and their turns


def contestants(
    inputs: Inputs, world: World, ranks: Group, compiled: bool = True
) -> Iterator[Contestant]:
    """Yield all contestants; without ``compiled`` less torch.compile. A turn trains on a part of an
    epoch."""
    sizes, batch_size, _ = inputs.training
    threads = torch.get_num_threads()

    def by(train: Train, name: str, note: str = "", compiles: bool = False) -> Contestant:
        end = -(-SLOW.get(name, len(inputs.x)) // batch_size)
        order = inputs.order[:end]
        note = (
            f"from {end * batch_size:,} of {len(inputs.x):,} digits"
            if end < len(inputs.order)
            else note
        )
        turn = epoch_turn(inputs, order, by_epochs(inputs, train, threads))
        return Contestant(name, turn, note, compiles)

    if len(sizes) == 3:  # a step of the others takes a minute
        yield by(by_pure_python, "pure Python")
    yield by(by_tutorial_script, "tutorial script", "DataLoader, transforms")
    yield by(partial(by_njit, threads=None), "njit", compiles=True)
    if threads > 1:
        yield by(partial(by_njit, threads=threads), "njit, parallel", f"{threads} threads")
    yield by(by_numpy, "NumPy")
    if INSTALLED["MPI"]:
        order = list(numpy_mlp.batches(len(inputs.x), batch_size, np.random.default_rng(0)))
        turn = program_turn(inputs, order, partial(mpi_epoch, inputs))
        yield Contestant("NumPy, 2 processes", turn, "by MPI")
    if INSTALLED["Lightning"]:
        yield Contestant(
            "Lightning", program_turn(inputs, inputs.order, partial(lightning_epoch, inputs))
        )
    yield by(by_torch(sizes), PLAIN, "nn.Sequential, SGD")
    if compiled:
        yield by(by_torch(sizes, compiled=True), "torch.compile", compiles=True)
    yield by(by_lesson(world, fused=False), "torchpar, autograd")
    yield by(by_lesson(world, fused=True), FUSED, "gradients by hand")
    for note in ON_RANKS:
        turn = epoch_turn(inputs, inputs.order, partial(on_ranks, ranks, inputs, note))
        yield Contestant(f"{FUSED}, 2 ranks", turn, note)


def contestants_on_gpu(inputs: Inputs, compiled: bool, ways: Sequence[str]) -> Iterator[Contestant]:
    """Yield the plain way to launch a step on a GPU, and others; without ``compiled`` less
    torch.compile."""
    for way in (PLAIN, *(way for way in ways if compiled or way not in COMPILED)):
        epoch = by_epochs(inputs, by_gpu(inputs.training, way))
        turn = epoch_turn(inputs, inputs.order, epoch, warmup=WARMUP + 1)
        yield Contestant(way, turn, compiles=way in COMPILED)


def by_epochs(inputs: Inputs, train: Train, threads: int = 1) -> Epoch:
    return lambda order: timed_epoch(train(inputs, order), threads)


def epoch_turn(inputs: Inputs, order: Order, epoch: Epoch, warmup: int = 1) -> Turn:
    """Return turns of an epoch each: the seconds of a step of a whole batch, if each loss is right.

    The warm-up trains on ``warmup`` batches, and on one of the last one's size.
    """

    def turn(index: int) -> list[float]:
        if index == 0:
            epoch([*order[:warmup], order[-1]])
            return []
        seconds, losses = epoch(order)
        inputs.check(losses, len(order))
        return [seconds * inputs.training.batch_size / sum(map(len, order))]

    return turn


def timed_epoch(losses: Losses, threads: int = 1) -> tuple[float, Array]:
    """Train by taking all of ``losses``, after its preparation: the seconds, and the losses."""
    next(losses)

    def take() -> Array:
        taken = list(losses)
        tensors = [loss for loss in taken if isinstance(loss, Tensor)]
        return np.array(torch.stack(tensors).tolist() if tensors else taken)

    torch.set_num_threads(threads)  # Numba and Lightning set those of OpenMP
    timed = time_calls(take)
    return timed.seconds(), timed.result


def on_ranks(ranks: Group, inputs: Inputs, contestant: str, order: Order) -> tuple[float, Array]:
    """Train by data parallelism, in the order of `torchpar.training.Run`; the ranks' losses add
    up."""
    seconds, losses = zip(*ranks.run(epoch_on_rank, inputs.training, contestant), strict=True)
    return max(seconds), sum(losses)


def program_turn(inputs: Inputs, order: Order, epoch: Callable[[], tuple[float, float]]) -> Turn:
    """Return turns of an epoch each by ``epoch``, whose mean loss is checked.

    Args:
        order: of the batches of ``epoch``, on which the mean loss depends.
    """

    @cache
    def expected() -> float:
        return float(
            np.average(inputs.losses_of(order), weights=[len(indices) for indices in order])
        )

    def turn(index: int) -> list[float]:
        if index == 0:
            return []
        seconds, loss = epoch()
        if not abs(loss - expected()) <= MEAN_LOSS_ERROR * expected():
            raise Rejected(f"the mean loss is {loss:.5f}, expected {expected():.5f}")
        return [seconds * inputs.training.batch_size / len(inputs.x)]

    return turn


def measure(inputs: Inputs, contestants: Sequence[Contestant]) -> list[Result]:
    """Return a result for each contestant; speed-ups are over plain eager."""
    sizes, batch_size = inputs.training[:2]
    case = {"network": "-".join(map(str, sizes)), "batch": batch_size}
    label = f"{case['network']}, batch {batch_size}"
    times = take_turns({one: one.turn for one in contestants}, ROUNDS, seconds=SECONDS, label=label)
    (plain,) = (times[one] for one in contestants if one.name == PLAIN)
    results = []
    for one in contestants:
        columns = {"note": one.note, "first_s": times[one].first if one.compiles else None}
        result = times[one].result(case, one.name, plain, **columns)
        speed = 1e3 * batch_size / result.p50_ms if result.p50_ms else None
        results.append(result.plus(samples_per_s=speed))
    return results


def title(result: Result) -> str:
    return f"{result.case['network']}, batch {result.case['batch']}"


def summary(tables: Sequence[Sequence[Result]], threads: int) -> str:
    """Return milliseconds a step in Markdown, a column for each network, and speed-ups over plain
    eager."""

    def name(result: Result) -> str:
        """Without how much was extrapolated."""
        note = result.columns["note"].partition("from ")[0]
        return ", ".join(filter(None, (result.contestant, note)))

    def cell(result: Result | None) -> str:
        if result is None or not result.p50_ms:
            return ""
        is_compared = result.speedup and result.contestant != PLAIN
        gain = f" ({number(result.speedup)}×)" if is_compared else ""
        return f"{number(result.p50_ms)}{gain}"

    columns = [{name(result): result for result in results} for results in tables]
    head = [f"ms a step, {threads} thread{'s' * (threads > 1)}", *(title(one[0]) for one in tables)]
    names = dict.fromkeys(chain.from_iterable(columns))
    return markdown([head, *([one, *(cell(of.get(one)) for of in columns)] for one in names)])


def main(arguments: Sequence[str] | None = None) -> int:
    command = Command("train")
    flag = command.parser.add_argument
    flag("--threads", type=int, default=1, help="of each process; ranks have one; by default 1")
    flag("--device", choices=("cpu", "cuda"), default="cpu", help="by default the CPU")
    flag(
        "--ways",
        nargs="+",
        choices=WAYS,
        metavar="WAY",
        help=f"on a GPU, only these of {', '.join(WAYS)}",
    )
    options = command.parse(arguments)
    if (threads := options.threads) > CORES:
        raise ConfigError(
            f"--threads is {threads}, expected at most {CORES}, the cores of this machine"
        )
    on_gpu, compiled = options.device == "cuda", not options.quick
    if options.ways and not on_gpu:
        raise ConfigError("--ways are those of a GPU; add --device cuda, or leave --ways out")
    if not on_gpu:
        require("numba", "torchvision")
    name = "train-gpu" if on_gpu else "train" if threads == 1 else f"train-{threads}-threads"
    columns = {} if on_gpu else {"cores": CORES, "threads": threads}
    table = Table(command.csv(options, name), torch.device(options.device), **columns)
    trainings = FULL[1:] if on_gpu else FULL  # on a GPU batches of 10 take a minute
    tables, before = [], torch.get_num_threads()
    with ExitStack() as stack:
        compared: Callable[..., Iterator[Contestant]] = partial(
            contestants_on_gpu, ways=options.ways or WAYS
        )
        if not on_gpu:
            ranks = stack.enter_context(start_ranks(2))
            world = stack.enter_context(join_world("cpu", alone=True))
            compared = partial(contestants, world=world, ranks=ranks)
        for training in QUICK if options.quick else trainings:
            torch.set_num_threads(threads)
            inputs = Inputs(training)
            results = table.add(measure(inputs, list(compared(inputs, compiled=compiled))))
            tables.append(results)
            print_results(title(results[0]), results, COLUMNS)
    torch.set_num_threads(before)
    for program, found in INSTALLED.items():
        if not found and not on_gpu:
            print(f"not measured: {program}; pip install 'torchpar[baselines,lightning]'")
    if options.output:
        with writing(file := options.output / f"{name}.md", "--output"):
            file.write_text(summary(tables, threads), "utf-8")
    return table.status


if __name__ == "__main__":
    run(main)
