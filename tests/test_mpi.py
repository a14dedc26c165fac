# SPDX-License-Identifier: MIT
"""Tests of data parallelism over MPI, and of the pooled exercise: the same losses as one process.

Collectives are tested on threads of this process; the last tests start mpirun.
"""

import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from commands import ROOT, error_of, rows_of, scalars, start
from fake_data import fashion_mnist
from test_examples import LAST_LINE

from torchpar.baselines import mpi, numpy_mlp
from torchpar.baselines.numpy_mlp import MLP, SGD
from torchpar.errors import ConfigError
from torchpar.parallel.launch.rendezvous import RankInfo
from torchpar.parallel.launch.world import join_world

pytest.importorskip("torchvision", reason="torchvision reads the data sets")
pytest.importorskip("tyro", reason="tyro reads the flags")
pytest.importorskip("matplotlib", reason="--plots draws with it")

import fashion_pooled
import train_mpi
from support.pooled import SIZES, Plan, Result, prepare

TRAIN_MPI, POOLED = (str(ROOT / "examples" / name) for name in ("train_mpi.py", "fashion_pooled.py"))
MPIRUN = str(Path(sys.executable).with_name("mpirun"))
MPIRUN = MPIRUN if Path(MPIRUN).exists() else shutil.which("mpirun")
needs_mpirun = pytest.mark.skipif(MPIRUN is None, reason="no mpirun; pip install mpich")
FASHION = "--dataset fashion-mnist"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A small data set; a batch of ten leaves a remainder of one."""
    root = tmp_path_factory.mktemp("data")
    fashion_mnist(root / "FashionMNIST" / "raw", train=61, test=11)
    return root


def mpi4py_of(world) -> SimpleNamespace:
    return SimpleNamespace(MPI=SimpleNamespace(COMM_WORLD=world, get_vendor=lambda: ("MPICH", (4, 3, 0))))


@pytest.fixture
def without_mpi(monkeypatch):
    """A single process, on which MPI is not initialised."""
    monkeypatch.setitem(sys.modules, "mpi4py", mpi4py_of(mpi.OneProcess()))


class Thread:
    """A communicator between threads, with the methods that are used here."""

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

    def Scatterv(self, send, received) -> None:
        array, numbers = self._exchange(send)[0]
        ends = np.cumsum([0, *numbers])
        assert ends[-1] == array.size
        received.reshape(-1)[:] = array.reshape(-1)[ends[self.rank] : ends[self.rank + 1]]

    def Allreduce(self, own, total) -> None:
        total[:] = sum(self._exchange(own.copy()))


def on_threads(size: int, function) -> list:
    """Run ``function(communicator)`` on each of ``size`` threads."""
    shared, barrier = {}, threading.Barrier(size, timeout=20)

    def call(rank: int):
        try:
            return function(Thread(rank, size, shared, barrier))
        except BaseException:
            barrier.abort()  # the others would wait
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(call, range(size)))


def problem(samples: int) -> mpi.Samples:
    random = np.random.default_rng(0)
    return mpi.Samples(random.integers(0, 256, (samples, 6), dtype=np.uint8), random.integers(0, 3, samples))


# Collectives


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("samples, batch_size", [(21, 4), (5, 1), (1, 10)])
def test_shares_make_up_the_batches_of_one_process(size, samples, batch_size):
    """Batches of one leave all processes but the first without a sample, remainders some of them."""
    everything = problem(samples)

    def share_out(world) -> list[mpi.Batch]:
        own = None if world.rank else everything
        return mpi.scatter_batches(world, own, samples, batch_size, np.random.default_rng(7))

    order = list(numpy_mlp.batches(samples, batch_size, np.random.default_rng(7)))
    for indices, *shares in zip(order, *on_threads(size, share_out), strict=True):
        assert [share.global_size for share in shares] == [len(indices)] * size
        np.testing.assert_array_equal(np.concatenate([s.x for s in shares]), everything.x[indices])
        np.testing.assert_array_equal(np.concatenate([s.labels for s in shares]), everything.labels[indices])
        assert max(len(s.x) for s in shares) - min(len(s.x) for s in shares) <= 1
        assert shares[0].x.dtype == np.uint8


@pytest.mark.parametrize("size", [1, 3])
def test_evaluation_covers_all_samples(size):
    model, samples = MLP((6, 4, 3), dtype=np.float64), problem(7)
    order = np.array_split(np.arange(7), size)

    def evaluate(world):
        own = mpi.scatter(world, None if world.rank else samples, order)
        return mpi.evaluate(world, model, own, 7)

    loss, right = model.evaluate(samples.x / np.float32(255), samples.labels)
    for found in on_threads(size, evaluate):
        assert found == pytest.approx((loss / 7, right / 7), rel=1e-12)


def test_bytes_become_numbers_from_0_to_1():
    x = mpi.scale_pixels(np.array([[0, 51, 255]], np.uint8))
    np.testing.assert_array_equal(x, np.array([[0, 0.2, 1]], np.float32))
    assert x.dtype == np.float32
    assert mpi.scale_pixels(x) is x


def test_an_error_of_process_0_is_raised_on_all():
    def meet(world) -> str:
        def fail():
            raise ConfigError("no data")

        with pytest.raises(ConfigError) as caught:
            mpi.on_rank_0(world, fail)
        return str(caught.value)

    assert on_threads(2, meet) == ["no data"] * 2
    assert meet(mpi.OneProcess()) == "no data"
    assert on_threads(2, lambda world: mpi.on_rank_0(world, lambda: world.rank + 7)) == [7, None]


# Joining


class Broken:
    """A module like mpi4py that finds no library."""

    @property
    def MPI(self):
        raise RuntimeError("cannot load MPI library")


@pytest.mark.parametrize("example", [train_mpi, fashion_pooled])
@pytest.mark.parametrize("module, reason", [(None, "None in sys.modules"), (Broken(), "cannot load MPI")])
def test_a_missing_mpi_is_one_line(data, monkeypatch, capsys, example, module, reason):
    monkeypatch.setitem(sys.modules, "mpi4py", module)
    if example is fashion_pooled:  # it needs MPI on several processes only
        info = RankInfo(0, 0, 2, 2, "127.0.0.1", 29400, "mpich")
        monkeypatch.setattr(example, "find_rank_info", lambda: info)
    error = error_of(example, f"--data {data} {FASHION}", monkeypatch, capsys)
    expected = rf"\w+\.py: error: MPI cannot be used \(.*{reason}.*\); pip install 'torchpar\[baselines\]'"
    assert re.fullmatch(expected, error)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_mpirun_of_another_mpi_is_refused(monkeypatch, rank):
    monkeypatch.setitem(sys.modules, "mpi4py", mpi4py_of(mpi.OneProcess()))
    variables = {"PMI_RANK": rank, "PMI_SIZE": 2, "MPI_LOCALRANKID": rank, "MPI_LOCALNRANKS": 2}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ConfigError) as caught, mpi.join():
        pass
    assert str(caught.value) == (
        "mpich started 2 processes, of which mpi4py sees 1; "
        "start them by the mpirun of the MPI that mpi4py loads, MPICH"
    )
    monkeypatch.setitem(sys.modules, "mpi4py", mpi4py_of(SimpleNamespace(rank=rank, size=2)))
    with mpi.join() as world:
        assert world.size == 2


@pytest.mark.parametrize(
    "example, flags, message",
    [
        (train_mpi, "--device cuda", "--device cuda: NumPy computes on the CPU"),
        (train_mpi, "--hidden 3 0", "--hidden is (3, 0), expected at least 1"),
        (train_mpi, "--init ones", "invalid choice 'ones' for argument '--init'"),
        (train_mpi, "--data /nonexistent", "train-images-idx3-ubyte.gz is missing"),
        (train_mpi, "--metrics /dev/null/m.jsonl", "cannot be written"),
        (fashion_pooled, "--samples 0", "--samples is 0, expected at least 1"),
        (fashion_pooled, "--iterations 0", "--iterations is 0, expected at least 1"),
        (fashion_pooled, "--plots /dev/null/p", "cannot be written"),
        (fashion_pooled, "--engine numpy --device cuda", "take --engine torch"),
    ],
)  # fmt: skip
def test_errors(data, without_mpi, monkeypatch, capsys, example, flags, message):
    assert message in error_of(example, f"--data {data} {FASHION} {flags}", monkeypatch, capsys)


# The MPI example in one process


def test_one_process_trains_as_a_plain_loop(data, without_mpi, tmp_path):
    metrics = tmp_path / "m.jsonl"
    flags = {"data": data, "dataset": "fashion-mnist", "epochs": 3, "hidden": (12,), "seed": 5}
    train_mpi.main(train_mpi.Flags(metrics=metrics, **flags))
    train, test = (train_mpi.as_arrays(s) for s in train_mpi.read(train_mpi.Flags(**flags)))
    model = MLP((784, 12, 10), seed=5)
    optimizer, order = SGD(model, 0.1, 0.5, 1e-5), np.random.default_rng(5)
    for row in rows_of(metrics):
        total = 0.0
        for batch in numpy_mlp.batches(61, 10, order):
            loss, gradient = model.gradients(train.x[batch] / np.float32(255), train.labels[batch])
            optimizer.step(gradient / len(batch))
            total += loss
        loss, right = model.evaluate(test.x / np.float32(255), test.labels)
        assert row["train_loss"] == pytest.approx(total / 61, rel=1e-6)  # the sum is in float32
        assert (row["test_loss"], row["test_accuracy"]) == (loss / 11, right / 11)


def test_tensorboard_has_the_losses(data, without_mpi, tmp_path):
    metrics, log_dir = tmp_path / "m.jsonl", tmp_path / "log"
    train_mpi.main(train_mpi.Flags(data=data, dataset="fashion-mnist", metrics=metrics, log_dir=log_dir))
    assert [(row["epoch"], row["test_loss"]) for row in rows_of(metrics)] == scalars(log_dir, "test_loss")


def test_mnist_is_learnt(without_mpi, tmp_path, capsys):
    metrics = tmp_path / "m.jsonl"
    train_mpi.main(train_mpi.Flags(metrics=metrics, samples=20000, epochs=2))
    assert rows_of(metrics)[-1]["test_accuracy"] > 0.9
    assert re.fullmatch(LAST_LINE, capsys.readouterr().out.splitlines()[-1]).groups() == ("1", "cpu")


def test_from_zeros_little_is_learnt(data, without_mpi, tmp_path):
    accuracies = {}
    for init in ("xavier", "zeros"):
        metrics = tmp_path / "m.jsonl"
        flags = {"data": data, "dataset": "fashion-mnist", "epochs": 20, "init": init, "metrics": metrics}
        train_mpi.main(train_mpi.Flags(**flags))
        accuracies[init] = rows_of(metrics)[-1]["test_accuracy"]
    assert accuracies["zeros"] < 0.5 < accuracies["xavier"]


# The pooled exercise

ITERATIONS = {"samples": 50, "iterations": 30}
ROUNDING = 1e-5  # of a cost: 60 iterations of some roundings of 6e-8 each
PLANS = [Plan(60, 0.1, 0.0, 0), Plan(ITERATIONS["iterations"], 0.1, 0.9, 0)]


@pytest.fixture
def splits(data) -> list[mpi.Samples]:
    return prepare(fashion_pooled.Flags(data=data, dataset="fashion-mnist", **ITERATIONS))


def in_numpy(splits, plan) -> Result:
    counts = [len(samples.labels) for samples in splits]
    return fashion_pooled.train_numpy(mpi.OneProcess(), splits, counts, plan)


def in_torch(splits, plan) -> Result:
    with join_world("cpu") as world:
        return fashion_pooled.train_torch(world, splits, plan)


def same(run: Result, other: Result) -> bool:
    assert len(run.costs) == len(other.costs)
    numbers = ([*one.costs, *one.ends[0], *one.ends[1]] for one in (run, other))
    return np.allclose(*numbers, rtol=ROUNDING, atol=0)


def test_images_are_pooled(splits):
    """Their pixels are means over parts of 28 × 28 pixels."""
    assert [(s.x.shape, s.x.dtype, len(s.labels)) for s in splits] == [
        ((50, 400), np.float32, 50),
        ((11, 400), np.float32, 11),
    ]
    assert splits[0].x.min() >= 0
    assert splits[0].x.max() <= 1
    assert splits[0].x.std() > 0.05


def test_all_ways_have_the_same_costs(splits, ranks):
    for plan in PLANS:
        expected = in_numpy(splits, plan)
        assert len(expected.costs) == plan.iterations
        assert expected.costs[-1] < 0.7 * expected.costs[0]
        for way in (in_torch(splits, plan), *ranks(2, in_torch, splits, plan)):
            assert same(way, expected)
            assert way.seconds > 0
            np.testing.assert_allclose(way.weights, expected.weights, rtol=0, atol=ROUNDING)
        shuffled = [mpi.Samples(splits[0].x, np.roll(splits[0].labels, 1)), splits[1]]
        assert not same(in_numpy(shuffled, plan), expected)
        for other in (plan._replace(lr=1.001 * plan.lr), plan._replace(seed=1)):
            assert not same(in_numpy(splits, other), expected)


def test_the_cost_is_the_binary_cross_entropy(splits):
    """−1/n · Σ_samples Σ_classes t·log p + (1 − t)·log(1 − p), at the first weights."""
    x, labels = splits[0]
    p = numpy_mlp.sigmoid(MLP(SIZES, loss="bce").forward(x)[1].astype(np.float64))
    t = np.eye(10)[labels]
    cost = -(t * np.log(p) + (1 - t) * np.log(1 - p)).sum() / len(labels)
    assert in_numpy(splits, PLANS[0]).costs[0] == pytest.approx(cost, rel=ROUNDING)


@pytest.mark.parametrize("engine, launcher", [("numpy", None), ("torch", None), ("auto", "torchrun")])
def test_pooled_reports(data, splits, tmp_path, capsys, monkeypatch, engine, launcher):
    """Under torchrun "auto" takes PyTorch."""
    if launcher:
        info = RankInfo(0, 0, 1, 1, "127.0.0.1", 29400, launcher)
        monkeypatch.setattr(fashion_pooled, "find_rank_info", lambda: info)
    metrics, pictures = tmp_path / "m.jsonl", tmp_path / "pictures"
    flags = {"data": data, "dataset": "fashion-mnist", "engine": engine, "device": "cpu", **ITERATIONS}
    fashion_pooled.main(fashion_pooled.Flags(metrics=metrics, plots=pictures, **flags))
    lines, rows = capsys.readouterr().out.splitlines(), rows_of(metrics)
    assert lines[0].startswith("published, one process: cost 7.50 → 3.217, precision 0.36")
    assert re.fullmatch(LAST_LINE, lines[-1]).groups() == ("1", "cpu")
    assert len(lines) == len(PLANS) + 2
    for plan, line, row in zip(PLANS, lines[1:-1], rows, strict=True):
        run = in_numpy(splits, plan)
        assert line.startswith(f"{plan.iterations} iterations at rate 0.1, momentum {plan.momentum:g}: ")
        assert f"cost {row['first_cost']:.2f} → {row['last_cost']:.3f}" in line
        figures = [row["first_cost"], row["last_cost"], row["precision"], row["test_loss"]]
        expected = [run.costs[0], run.costs[-1], run.ends[0][1], run.ends[1][0]]
        assert figures == pytest.approx(expected, rel=ROUNDING)
        library = "NumPy" if engine == "numpy" else "PyTorch"
        assert (row["library"], row["ranks"], row["device"]) == (library, 1, "cpu")
    assert f"test accuracy {rows[-1]['test_accuracy']:.4f} | loss {rows[-1]['test_loss']:.4f}" in lines[-1]
    for name in ("costs", "neurons"):
        assert (pictures / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_pooled_mnist_is_learnt(tmp_path, capsys):
    """The published figures, which are of another data set, do not appear."""
    metrics = tmp_path / "m.jsonl"
    fashion_pooled.main(fashion_pooled.Flags(metrics=metrics, device="cpu", samples=2000, iterations=300))
    first, second = rows_of(metrics)
    assert first["test_accuracy"] < second["test_accuracy"]
    assert second["test_accuracy"] > 0.7
    assert "published" not in capsys.readouterr().out


# Under mpirun


def by_mpirun(processes: int, *command: str) -> tuple[int, str, str]:
    """Return the exit status and the output of all processes. A command that hangs fails the test."""
    process = start(MPIRUN, "-n", str(processes), sys.executable, *command)
    try:
        out, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.terminate()  # mpirun ends its processes
        process.communicate()
        pytest.fail(f"{command} hangs")
    return process.returncode, out, err


def without_times(rows: list[dict]) -> list[dict]:
    times = ("seconds", "samples_per_s", "ranks", "device", "library", "ms", "ms_once")
    return [{key: value for key, value in row.items() if key not in times} for row in rows]


@pytest.mark.slow
@needs_mpirun
def test_two_processes_train_as_one(data, without_mpi, tmp_path):
    """The last batch is of one sample, which leaves process 1 none."""
    given = [*FASHION.split(), "--epochs", "4", "--hidden", "12", "8", "--lr", "0.3"]
    metrics, pictures = tmp_path / "two.jsonl", tmp_path / "pictures"
    outputs = ["--metrics", str(metrics), "--plots", str(pictures)]
    code, out, err = by_mpirun(2, TRAIN_MPI, "--data", str(data), *given, *outputs)
    assert code == 0, err
    lines = out.splitlines()
    assert re.fullmatch(LAST_LINE, lines[-1]).groups() == ("2", "cpu")
    assert sum("test accuracy" in line for line in lines) == 4 + 1  # process 0 alone prints
    for phase in ("data", "forward", "backward", "collectives", "optimizer"):
        assert len(re.findall(rf"│ {phase} +│ +\d+\.\d\d +│ +\d+\.\d% +│", out)) == 1
    assert (pictures / "confusion.png").exists()

    one = tmp_path / "one.jsonl"
    flags = {"data": data, "dataset": "fashion-mnist", "epochs": 4, "hidden": (12, 8), "lr": 0.3}
    train_mpi.main(train_mpi.Flags(metrics=one, **flags))
    rows, expected = rows_of(metrics), rows_of(one)
    assert [(row["ranks"], row["device"]) for row in rows] == [(2, "cpu")] * 4
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    for row, other in zip(without_times(rows), without_times(expected), strict=True):
        assert row == pytest.approx(other, rel=ROUNDING)
        assert row != pytest.approx(other | {"train_loss": 1.001 * other["train_loss"]}, rel=ROUNDING)
    assert f"test accuracy {rows[-1]['test_accuracy']:.4f} | loss {rows[-1]['test_loss']:.4f}" in lines[-1]


@pytest.mark.slow
@needs_mpirun
def test_pooled_on_three_processes(data, tmp_path):
    one, three = tmp_path / "one.jsonl", tmp_path / "three.jsonl"
    flags = {"data": data, "dataset": "fashion-mnist", "device": "cpu", "samples": 50, "iterations": 30}
    given = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    code, out, err = by_mpirun(3, POOLED, *given, "--metrics", str(three))
    assert code == 0, err
    lines = out.splitlines()
    assert len(lines) == 4, lines  # process 0 alone prints
    assert lines[0].startswith("published, two processes: cost 6.70 → 3.210")
    assert re.fullmatch(LAST_LINE, lines[-1]).groups() == ("3", "cpu")
    fashion_pooled.main(fashion_pooled.Flags(metrics=one, **flags))
    rows, expected = rows_of(three), rows_of(one)
    assert [(row["library"], row["ranks"]) for row in rows] == [("NumPy", 3)] * 2
    assert set(rows[-1]["ms"]) == {"forward", "backward", "collectives", "optimizer"}
    for row, other in zip(without_times(rows), without_times(expected), strict=True):
        assert row == pytest.approx(other, rel=ROUNDING)


@pytest.mark.slow
@needs_mpirun
def test_missing_data_is_one_line_on_two_processes():
    """Process 1 waits before it prints, and is ended with process 0."""
    code, out, err = by_mpirun(2, TRAIN_MPI, "--data", "/nonexistent")
    assert code != 0
    (line,) = (line for line in err.splitlines() if "error: " in line)
    assert line.startswith(
        "train_mpi.py: error: /nonexistent/MNIST/raw/train-images-idx3-ubyte.gz is missing"
    )
    assert "Traceback" not in err
    assert "test accuracy" not in out


DIE = """
import numpy as np
from torchpar.baselines import mpi

with mpi.join() as world:
    assert world.bcast(world.rank) == 0
    if world.rank == 1:
        raise RuntimeError("process 1 has met an error")
    world.Allreduce(np.ones(1), np.empty(1))
print("process 0 goes on")
"""


@needs_mpirun
def test_a_process_that_dies_ends_all():
    """Process 1 dies while process 0 waits for it."""
    code, out, err = by_mpirun(2, "-c", DIE)
    assert code != 0
    assert "RuntimeError: process 1 has met an error" in err
    assert "goes on" not in out
