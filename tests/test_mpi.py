# SPDX-License-Identifier: MIT
"""Data parallelism over MPI, and the pooled exercise in all its ways: the same losses as one process.

Most tests run several processes as threads of this one, on a communicator of theirs; the last start mpirun.
"""

import math
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from commands import ROOT, rows_of, start
from fake_data import fashion_mnist
from matplotlib.figure import Figure
from test_examples import LAST_LINE

from benchmarks.baselines import full_batch, mpi, numpy_mlp
from benchmarks.baselines.numpy_mlp import MLP, SGD
from torchpar import cli
from torchpar.errors import ConfigError
from torchpar.parallel.rendezvous import Place
from torchpar.parallel.world import join_world

pytest.importorskip("torchvision", reason="torchvision reads the data sets")
pytest.importorskip("tyro", reason="tyro reads the flags")

TRAIN_MPI, POOLED = (str(ROOT / "examples" / name) for name in ("train_mpi.py", "fashion_pooled.py"))
MPIRUN = str(Path(sys.executable).with_name("mpirun"))
MPIRUN = MPIRUN if Path(MPIRUN).exists() else shutil.which("mpirun")
needs_mpirun = pytest.mark.skipif(MPIRUN is None, reason="no mpirun; pip install mpich")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A small data set; a batch of ten leaves a remainder of one."""
    root = tmp_path_factory.mktemp("data")
    fashion_mnist(root / "FashionMNIST" / "raw", train=61, test=11)
    return root


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "examples"), *sys.path])
    import fashion_pooled
    import train_mpi

    return SimpleNamespace(train_mpi=train_mpi, fashion_pooled=fashion_pooled)


def mpi4py_of(world) -> SimpleNamespace:
    return SimpleNamespace(MPI=SimpleNamespace(COMM_WORLD=world, get_vendor=lambda: ("MPICH", (4, 3, 0))))


@pytest.fixture
def without_mpi(monkeypatch):
    """A single process, on which MPI is not initialised."""
    monkeypatch.setitem(sys.modules, "mpi4py", mpi4py_of(mpi.Alone()))


class Thread:
    """What is used of a communicator, between threads."""

    def __init__(self, rank: int, size: int, shared: dict, barrier: threading.Barrier):
        self.rank, self.size = rank, size
        self._shared, self._barrier = shared, barrier

    def _exchange(self, value) -> list:
        self._shared[self.rank] = value
        self._barrier.wait()
        values = [self._shared[rank] for rank in range(self.size)]
        self._barrier.wait()
        return values

    def bcast(self, value):
        return self._exchange(value)[0]

    def Bcast(self, array) -> None:
        array[:] = self._exchange(array.copy())[0]

    def Scatterv(self, send, received) -> None:
        array, numbers = self._exchange(send)[0]
        ends = np.cumsum([0, *numbers])
        assert ends[-1] == array.size
        received.reshape(-1)[:] = array.reshape(-1)[ends[self.rank] : ends[self.rank + 1]]

    def Allreduce(self, own, total) -> None:
        total[:] = sum(self._exchange(own.copy()))


class Deaf(Thread):
    """A broken one, whose processes hear only themselves."""

    def Allreduce(self, own, total) -> None:
        total[:] = self._exchange(own.copy())[self.rank]


def on_threads(size: int, function, kind: type[Thread] = Thread) -> list:
    """``function(communicator)`` on each process."""
    shared, barrier = {}, threading.Barrier(size, timeout=20)

    def call(rank: int):
        try:
            return function(kind(rank, size, shared, barrier))
        except BaseException:
            barrier.abort()  # the others would wait
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(call, range(size)))


def problem(samples: int) -> mpi.Samples:
    random = np.random.default_rng(0)
    return mpi.Samples(random.integers(0, 256, (samples, 6), dtype=np.uint8), random.integers(0, 3, samples))


# Several processes as threads


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_scatter_gives_each_its_share(size):
    samples = problem(7)
    order = np.array_split(np.random.default_rng(0).permutation(7), size)
    found = on_threads(size, lambda world: mpi.scatter(world, None if world.rank else samples, order))
    for own, indices in zip(found, order, strict=True):
        np.testing.assert_array_equal(own.x, samples.x[indices])
        np.testing.assert_array_equal(own.labels, samples.labels[indices])
        assert (own.x.dtype, own.labels.dtype) == (np.uint8, samples.labels.dtype)


def train(world, samples: int, batch_size: int) -> tuple[list[float], np.ndarray, tuple[float, float]]:
    """Losses, parameters, and the evaluation, after three epochs in float64."""
    own = None if world.rank else problem(samples)
    model = MLP((6, 4, 3), seed=world.rank, dtype=np.float64)  # of which process 0's are broadcast
    optimizer = SGD(model, 0.5, 0.5, 0.01)
    trainer = mpi.Trainer(world, model, optimizer, lambda phase: nullcontext())
    order = np.random.default_rng(0)
    losses = [trainer.epoch(own, samples, batch_size, order) for _ in range(3)]
    shares = np.array_split(np.arange(samples), world.size)
    return losses, model.parameters, trainer.evaluate(mpi.scatter(world, own, shares), samples)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("samples, batch_size", [(21, 4), (5, 1), (1, 10), (9, 20)])
def test_processes_train_as_one(size, samples, batch_size):
    """At most 63 steps, whose few dozen roundings of 1e-16 each may add up: to less than 1e-12.

    Batches of one leave all processes but the first without a sample, remainders some of them.
    """
    ((losses, parameters, ends),) = on_threads(1, lambda world: train(world, samples, batch_size))
    for found in on_threads(size, lambda world: train(world, samples, batch_size)):
        np.testing.assert_allclose(found[0], losses, rtol=1e-12)
        np.testing.assert_allclose(found[1], parameters, rtol=0, atol=1e-12)
        np.testing.assert_allclose(found[2], ends, rtol=1e-12)
    broken, *_ = on_threads(size, lambda world: train(world, samples, batch_size), Deaf)
    if samples > 5:  # else process 0 has all
        assert abs(np.array(broken[0]) / losses - 1).max() > 0.1


def test_one_process_trains_as_the_loop_would():
    samples, batch_size = 21, 4
    x, labels = problem(samples)
    model = MLP((6, 4, 3), dtype=np.float64)
    optimizer, order, losses = SGD(model, 0.5, 0.5, 0.01), np.random.default_rng(0), []
    for _ in range(3):
        total = 0.0
        for batch in numpy_mlp.batches(samples, batch_size, order):
            loss, gradient = model.gradients(x[batch] / np.float32(255), labels[batch])
            optimizer.step(gradient / len(batch))
            total += loss
        losses.append(total / samples)
    assert losses[-1] < losses[0]
    for world in (mpi.Alone(), Thread(0, 1, {}, threading.Barrier(1))):
        found, parameters, ends = train(world, samples, batch_size)
        np.testing.assert_array_equal(found, losses)
        np.testing.assert_array_equal(parameters, model.parameters)
        loss, right = model.evaluate(x / np.float32(255), labels)
        assert ends == (loss / samples, right / samples)


def test_bytes_become_numbers_from_0_to_1():
    x = mpi.inputs(np.array([[0, 51, 255]], np.uint8))
    np.testing.assert_array_equal(x, np.array([[0, 0.2, 1]], np.float32))
    assert x.dtype == np.float32
    assert mpi.inputs(x) is x


def test_an_error_of_process_0_is_met_on_all():
    def meet(world) -> tuple[str, bool]:
        def fail():
            raise ConfigError("no data")

        with pytest.raises(ConfigError) as caught:
            mpi.on_rank_0(world, fail)
        return str(caught.value), caught.value.told

    assert [message for message, _ in on_threads(2, meet)] == ["no data"] * 2
    assert meet(mpi.Alone()) == ("no data", False)
    assert on_threads(2, lambda world: mpi.on_rank_0(world, lambda: world.rank + 7)) == [7, None]


# Joining


def test_a_process_that_meets_an_error_ends_all(monkeypatch, capsys):
    aborted = []
    for size, error, expected in [
        (2, RuntimeError("lost"), [1]),
        (2, KeyboardInterrupt(), [1]),
        (2, ConfigError("all know"), []),
        (1, RuntimeError("lost"), []),
    ]:
        world = SimpleNamespace(rank=0, size=size, Abort=aborted.append)
        monkeypatch.setitem(sys.modules, "mpi4py", mpi4py_of(world))
        with pytest.raises(type(error)), mpi.join():
            raise error
        assert aborted == expected
        aborted.clear()
        assert ("Traceback" in capsys.readouterr().err) is (expected != [] and isinstance(error, Exception))


class Broken:
    """mpi4py where it finds no library."""

    @property
    def MPI(self):
        raise RuntimeError("cannot load MPI library")


@pytest.mark.parametrize(
    "module, reason", [(None, "None in sys.modules"), (Broken(), "cannot load MPI library")]
)
@pytest.mark.parametrize("script", ["train_mpi", "fashion_pooled"])
def test_a_missing_mpi_is_told_in_one_line(examples, data, monkeypatch, capsys, module, reason, script):
    monkeypatch.setitem(sys.modules, "mpi4py", module)
    example = getattr(examples, script)
    if script == "fashion_pooled":  # which does without, alone
        place = Place(0, 0, 2, 2, "127.0.0.1", 29400, "mpich")
        monkeypatch.setattr(example, "find_place", lambda: place)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--data", str(data), "--dataset", "fashion-mnist"])
    with pytest.raises(SystemExit) as caught:
        cli.main(example.main, example.Flags)
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, "")
    expected = (
        rf"{script}\.py: error: MPI cannot be used \(.*{reason}.*\); pip install 'torchpar\[baselines\]'\n"
    )
    assert re.fullmatch(expected, err)


def stand(monkeypatch, rank: int) -> None:
    """Stand where MPICH's mpirun would put one of two processes."""
    variables = {"PMI_RANK": rank, "PMI_SIZE": 2, "MPI_LOCALRANKID": rank, "MPI_LOCALNRANKS": 2}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("rank", [0, 1])
def test_the_mpirun_of_another_mpi_is_told(monkeypatch, rank):
    monkeypatch.setitem(sys.modules, "mpi4py", mpi4py_of(mpi.Alone()))
    stand(monkeypatch, rank)
    with pytest.raises(ConfigError) as caught, mpi.join():
        pass
    assert str(caught.value) == (
        "mpich started 2 processes, of which mpi4py sees 1; "
        "start them by the mpirun of the MPI that mpi4py loads, MPICH"
    )
    assert caught.value.told is (rank != 0)  # all find it, and process 0 tells it
    monkeypatch.setitem(sys.modules, "mpi4py", mpi4py_of(SimpleNamespace(rank=rank, size=2)))
    with mpi.join() as world:
        assert world.size == 2


@pytest.mark.parametrize("rank", [0, 1])
def test_bad_flags_are_told_by_process_0(examples, monkeypatch, capsys, rank):
    """At once: mpirun does not end the others before they have joined."""
    stand(monkeypatch, rank)
    slept = []
    monkeypatch.setattr(cli.time, "sleep", slept.append)
    monkeypatch.setattr(sys, "argv", ["train_mpi.py", "--epochs", "0"])
    with pytest.raises(SystemExit) as caught:
        cli.main(examples.train_mpi.main, examples.train_mpi.Flags)
    assert caught.value.code == 2
    error = "train_mpi.py: error: --epochs is 0, expected at least 1; see --help\n"
    assert capsys.readouterr() == ("", "" if rank else error)
    assert sum(slept) < cli.GRACE


# The examples in one process

MPI_ERRORS = [
    ("--device cuda", "--device cuda: NumPy computes on the CPU"),
    ("--hidden 3 0", r"--hidden is \(3, 0\), expected at least 1"),
    ("--samples 0", "--samples is 0, expected at least 1"),
    ("--batch-size 0", "--batch-size is 0, expected at least 1"),
    ("--momentum 1", r"--momentum is 1\.0, expected less than 1"),
    ("--init ones", "invalid choice 'ones' for argument '--init'"),
    ("--data /nonexistent", "/nonexistent/FashionMNIST/raw/train-images-idx3-ubyte.gz is missing"),
    ("--metrics /dev/null/m.jsonl", "cannot be written.*/dev/null"),
    ("--plots /dev/null/p", "cannot be written.*/dev/null"),
]
POOLED_ERRORS = [
    *(
        error
        for error in MPI_ERRORS
        if error[0].split()[0] in ("--samples", "--momentum", "--data", "--metrics")
    ),
    ("--iterations 0", "--iterations is 0, expected at least 1"),
    ("--lr nan", "--lr is nan, expected at least 0"),
    ("--engine jax", "invalid choice 'jax' for argument '--engine'"),
    ("--engine numpy --device cuda", "--engine numpy computes on CPUs.*take --engine torch"),
]


@pytest.mark.parametrize(
    "script, flags, message",
    [("train_mpi", *error) for error in MPI_ERRORS] + [("fashion_pooled", *error) for error in POOLED_ERRORS],
)
def test_errors_are_one_line(examples, data, without_mpi, monkeypatch, capsys, script, flags, message):
    example = getattr(examples, script)
    given = ["--data", str(data), "--dataset", "fashion-mnist", *flags.split()]
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *given])
    with pytest.raises(SystemExit) as caught:
        cli.main(example.main, example.Flags)
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, "")
    assert re.fullmatch(rf"{script}\.py: error: .*{message}.*\n", err)


def test_mnist_is_learnt_with_the_flags_as_they_are(examples, without_mpi, tmp_path, capsys):
    metrics = tmp_path / "m.jsonl"
    examples.train_mpi.main(examples.train_mpi.Flags(metrics=metrics))
    rows = rows_of(metrics)
    assert rows[-1]["test_accuracy"] > 0.95
    assert re.fullmatch(LAST_LINE, capsys.readouterr().out.splitlines()[-1]).groups() == ("1", "cpu")


def test_from_zeros_little_is_learnt(examples, data, without_mpi, tmp_path):
    accuracies = {}
    for init in ("xavier", "zeros"):
        metrics = tmp_path / "m.jsonl"
        flags = {"data": data, "dataset": "fashion-mnist", "epochs": 20, "init": init, "metrics": metrics}
        examples.train_mpi.main(examples.train_mpi.Flags(**flags))
        accuracies[init] = rows_of(metrics)[-1]["test_accuracy"]
    assert accuracies["zeros"] < 0.5 < accuracies["xavier"]


# The pooled exercise

ITERATIONS = {"samples": 50, "iterations": 30}
ROUNDING = 1e-5  # of a cost: 60 iterations of some roundings of 6e-8 each


@pytest.fixture
def splits(examples, data) -> list[mpi.Samples]:
    flags = examples.fashion_pooled.Flags(data=data, dataset="fashion-mnist", **ITERATIONS)
    with join_world("cpu") as world:
        return examples.fashion_pooled.pooled(flags, world)


@pytest.fixture
def plans(examples) -> list[full_batch.Plan]:
    """As published, and with the flags' iterations, rate and momentum."""
    sizes = examples.fashion_pooled.SIZES
    return [full_batch.Plan(sizes, 60, 0.1), full_batch.Plan(sizes, ITERATIONS["iterations"], 0.1, 0.9)]


def shared(splits, plan, world) -> full_batch.Run:
    counts = [len(samples.labels) for samples in splits]
    return full_batch.in_numpy(world, (None, None) if world.rank else splits, counts, plan)


def alone(splits, plan) -> full_batch.Run:
    return shared(splits, plan, mpi.Alone())


def in_ddp(splits, plan) -> full_batch.Run:
    with join_world("cpu") as world:
        return full_batch.in_torch(world, splits, plan)


def same(run: full_batch.Run, other: full_batch.Run) -> bool:
    assert len(run.costs) == len(other.costs)
    numbers = ([*one.costs, *one.train, *one.test] for one in (run, other))
    return np.allclose(*numbers, rtol=ROUNDING, atol=0)


def test_images_are_pooled(splits):
    """To 20 × 20 means over parts of 28 × 28, in which borders fall into two."""
    assert [(s.x.shape, s.x.dtype, len(s.labels)) for s in splits] == [
        ((50, 400), np.float32, 50),
        ((11, 400), np.float32, 11),
    ]
    assert splits[0].x.min() >= 0
    assert splits[0].x.max() <= 1
    assert splits[0].x.std() > 0.05


def test_all_ways_come_to_the_same_costs(splits, plans, ranks):
    for plan in plans:
        expected = alone(splits, plan)
        assert len(expected.costs) == plan.iterations
        assert expected.costs[-1] < 0.7 * expected.costs[0]
        with join_world("cpu") as world:
            ways = [full_batch.in_torch(world, splits, plan)]
        ways += on_threads(3, partial(shared, splits, plan))
        ways += ranks(2, in_ddp, splits, plan)
        for way in ways:
            assert same(way, expected)
            assert way.seconds > 0
            assert way.weights.shape == (400, 25)
            np.testing.assert_allclose(way.weights, expected.weights, rtol=0, atol=ROUNDING)
        for other in (
            alone([mpi.Samples(splits[0].x, np.roll(splits[0].labels, 1)), splits[1]], plan),
            alone(splits, plan._replace(lr=1.001 * plan.lr)),
            alone(splits, plan._replace(seed=1)),
        ):
            assert not same(other, expected)


def test_the_cost_is_the_binary_cross_entropy(splits, plans):
    """−1/n · Σ_samples Σ_classes t·log p + (1 − t)·log(1 − p), at the first weights."""
    x, labels = splits[0]
    model = MLP((400, 25, 10), loss="bce", seed=plans[0].seed)
    p = numpy_mlp.sigmoid(model.forward(x)[1].astype(np.float64))
    t = np.eye(10)[labels]
    cost = -(t * np.log(p) + (1 - t) * np.log(1 - p)).sum() / len(labels)
    assert alone(splits, plans[0]).costs[0] == pytest.approx(cost, rel=ROUNDING)


def test_from_zeros_the_cost_is_10_ln_2(splits, plans, monkeypatch):
    monkeypatch.setattr(full_batch.numpy_mlp, "MLP", lambda *args, **more: MLP(*args, init="zeros", **more))
    with join_world("cpu") as world:
        costs = [alone(splits, plans[0]).costs[0], full_batch.in_torch(world, splits, plans[0]).costs[0]]
    # ln 2 in float32, and the sum of 500 of them
    assert costs == pytest.approx([10 * math.log(2)] * 2, rel=500 * 2.0**-24)


@pytest.mark.parametrize("engine", ["numpy", "torch"])
def test_pooled_reports(examples, data, splits, plans, tmp_path, capsys, monkeypatch, engine):
    labels, save = [], Figure.savefig

    def noted(figure, *args, **options) -> None:
        labels.append(figure.axes[0].get_legend_handles_labels()[1])
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", noted)
    flags = {"data": data, "dataset": "fashion-mnist", "engine": engine, "device": "cpu", **ITERATIONS}
    metrics, pictures = tmp_path / "m.jsonl", tmp_path / "pictures"
    metrics.write_text("old\n")
    examples.fashion_pooled.main(examples.fashion_pooled.Flags(metrics=metrics, plots=pictures, **flags))
    lines, rows = capsys.readouterr().out.splitlines(), rows_of(metrics)
    way = {"numpy": "NumPy", "torch": "PyTorch"}[engine]
    assert lines[0].startswith(f"published, Fashion-MNIST {way}: cost 7.50 → 3.217, precision 0.36")
    assert re.fullmatch(LAST_LINE, lines[-1]).groups() == ("1", "cpu")
    assert len(lines) == len(plans) + 2
    for plan, line, row in zip(plans, lines[1:-1], rows, strict=True):
        run = alone(splits, plan)
        assert line.startswith(f"{plan.iterations} iterations at rate 0.1, momentum {plan.momentum:g}: ")
        assert f"cost {row['first_cost']:.2f} → {row['last_cost']:.3f}" in line
        found = [row["first_cost"], row["last_cost"], row["test_loss"]]
        assert found == pytest.approx([run.costs[0], run.costs[-1], run.test[0]], rel=ROUNDING)
        assert (row["precision"], row["test_accuracy"]) == pytest.approx((run.train[1], run.test[1]))
        assert (row["way"], row["ranks"], row["device"]) == (way, 1, "cpu")
    assert f"test accuracy {rows[-1]['test_accuracy']:.4f} | loss {rows[-1]['test_loss']:.4f}" in lines[-1]
    for name in ("costs", "neurons"):
        assert (pictures / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert len(set(labels[0])) == len(plans)  # the curves can be told apart


def test_pooled_under_torchrun_takes_pytorch(examples, data, monkeypatch, capsys):
    example = examples.fashion_pooled
    place = Place(0, 0, 1, 1, "127.0.0.1", 29400, "torchrun")
    monkeypatch.setattr(example, "find_place", lambda: place)
    flags = {"data": data, "dataset": "fashion-mnist", "device": "cpu", **ITERATIONS}
    example.main(example.Flags(**flags))
    assert capsys.readouterr().out.startswith("published, Fashion-MNIST PyTorch:")
    with pytest.raises(ConfigError, match="take --engine torch"):
        example.main(example.Flags(engine="numpy", **flags))


def test_pooled_mnist_is_learnt_with_the_flags_as_they_are(examples, tmp_path, capsys):
    metrics = tmp_path / "m.jsonl"
    examples.fashion_pooled.main(examples.fashion_pooled.Flags(metrics=metrics, device="cpu"))
    first, second = rows_of(metrics)
    assert second["test_accuracy"] >= 0.88
    assert first["test_accuracy"] < second["test_accuracy"]


# Under mpirun


def on_two(*command: str) -> tuple[int, str, str]:
    """The exit status, and what both wrote; those who hang are ended."""
    process = start(MPIRUN, "-n", "2", sys.executable, *command)
    try:
        out, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.terminate()  # mpirun ends its processes
        process.communicate()
        pytest.fail(f"{command} hangs")
    return process.returncode, out, err


def without_times(rows: list[dict]) -> list[dict]:
    return [
        {
            k: v
            for k, v in row.items()
            if k not in ("seconds", "samples_per_s", "ranks", "ms", "ms_once", "way")
        }
        for row in rows
    ]


@needs_mpirun
def test_two_processes_train_as_one(examples, data, without_mpi, tmp_path, capsys):
    """The last batch is of one sample, which leaves process 1 none."""
    given = ["--dataset", "fashion-mnist", "--epochs", "4", "--hidden", "12", "8", "--lr", "0.3"]
    metrics, pictures = tmp_path / "two.jsonl", tmp_path / "pictures"
    outputs = ["--metrics", str(metrics), "--plots", str(pictures)]
    code, out, err = on_two(TRAIN_MPI, "--data", str(data), *given, *outputs)
    assert code == 0, err
    lines = out.splitlines()
    assert re.fullmatch(LAST_LINE, lines[-1]).groups() == ("2", "cpu")
    assert sum("test accuracy" in line for line in lines) == 4 + 1  # process 0 alone speaks
    for phase in mpi.PHASES:
        assert len(re.findall(rf"│ {phase} +│ +\d+\.\d\d +│ +\d+\.\d% +│", out)) == 1
    assert (pictures / "confusion.png").exists()

    one = tmp_path / "one.jsonl"
    flags = {"data": data, "dataset": "fashion-mnist", "epochs": 4, "hidden": (12, 8), "lr": 0.3}
    examples.train_mpi.main(examples.train_mpi.Flags(metrics=one, **flags))
    rows, expected = rows_of(metrics), rows_of(one)
    assert [row["ranks"] for row in rows] == [2] * 4
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    for row, other in zip(without_times(rows), without_times(expected), strict=True):
        assert row.pop("device") == other.pop("device") == "cpu"
        assert row == pytest.approx(other, rel=ROUNDING)
    assert f"test accuracy {rows[-1]['test_accuracy']:.4f} | loss {rows[-1]['test_loss']:.4f}" in lines[-1]


@needs_mpirun
def test_missing_data_is_told_once_on_two_processes():
    code, out, err = on_two(TRAIN_MPI, "--data", "/nonexistent")
    assert code != 0
    lines = [line for line in err.splitlines() if "error: " in line]
    assert len(lines) == 1
    assert lines[0].startswith(
        "train_mpi.py: error: /nonexistent/MNIST/raw/train-images-idx3-ubyte.gz is missing"
    )
    assert "Traceback" not in err
    assert "test accuracy" not in out


DIE = """
import numpy as np
from benchmarks.baselines import mpi

with mpi.join() as world:
    assert world.bcast(world.rank) == 0
    if world.rank == 1:
        raise RuntimeError("process 1 has met an error")
    world.Allreduce(np.ones(1), np.empty(1))
print("process 0 goes on")
"""


@needs_mpirun
def test_a_process_that_dies_ends_all():
    """Process 1 does, while 0 waits for it."""
    code, out, err = on_two("-c", DIE)
    assert code != 0
    assert "RuntimeError: process 1 has met an error" in err
    assert "goes on" not in out


@needs_mpirun
def test_pooled_on_two_processes(examples, data, tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    flags = {"data": data, "dataset": "fashion-mnist", "device": "cpu", "samples": 51, "iterations": 30}
    given = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    code, out, err = on_two(POOLED, *given, "--metrics", str(two))
    assert code == 0, err
    lines = out.splitlines()
    assert len(lines) == 4, lines  # process 0 alone speaks
    assert lines[0].startswith("published, Fashion-MNIST NumPy, MPI: cost 6.70 → 3.210")
    assert re.fullmatch(LAST_LINE, lines[-1]).groups() == ("2", "cpu")
    examples.fashion_pooled.main(examples.fashion_pooled.Flags(metrics=one, **flags))
    rows, expected = rows_of(two), rows_of(one)
    assert [(row["way"], row["ranks"]) for row in rows] == [("NumPy, MPI", 2)] * 2
    assert set(rows[-1]["ms"]) == set(mpi.PHASES) - {"scatter"}
    for row, other in zip(without_times(rows), without_times(expected), strict=True):
        for name, value in (("sizes", [400, 25, 10]), ("device", "cpu")):
            assert row.pop(name) == other.pop(name) == value
        assert row == pytest.approx(other, rel=ROUNDING)
