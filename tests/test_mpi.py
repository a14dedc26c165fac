# SPDX-License-Identifier: MIT
"""Data parallelism over MPI, and the pooled exercise: the same losses as one process."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from commands import LAST_LINE, MPIRUN, ROOT, lesson, needs_mpirun, rows_of, run, scalars
from fake_data import fashion_mnist

from torchpar.baselines import mpi, numpy_mlp
from torchpar.baselines.numpy_mlp import MLP
from torchpar.parallel.launch.world import join_world

pytest.importorskip("torchvision", reason="torchvision reads the data sets")
pytest.importorskip("tyro", reason="tyro reads the flags")

import fashion_pooled
from fashion_pooled import SIZES, Plan, Result, pooled

TRAIN_MPI, POOLED = (str(ROOT / "examples" / name) for name in ("train_mpi.py", "fashion_pooled.py"))
ROUNDING = 1e-5  # of a loss: some hundred steps of some roundings of 6e-8 each


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A small data set; a batch of ten leaves a remainder of one."""
    return fashion_mnist(tmp_path_factory.mktemp("data"), train=61, test=11)


# The lesson


@pytest.mark.slow
@needs_mpirun
def test_two_processes_train_as_one(data, tmp_path):
    """The last batch is of one sample, which leaves process 1 none."""
    metrics = tmp_path / "two"
    flags = f"--dataset fashion-mnist --data {data} --epochs 2 --hidden 12 8 --lr 0.3"
    command = [MPIRUN, "-n", "2", sys.executable, TRAIN_MPI, *flags.split()]
    code, out, err = run(*command, f"--metrics={metrics}")
    assert code == 0, err
    lines = out.splitlines()
    assert re.fullmatch(LAST_LINE, lines[-1]).groups() == ("2", "cpu")
    assert sum("test accuracy" in line for line in lines) == 2 + 1  # process 0 alone prints
    for phase in ("data", "forward", "backward", "collectives", "optimizer"):
        assert len(re.findall(rf"│ {phase} +│ +\d+\.\d\d +│ +\d+\.\d% +│", out)) == 1
    files = [f"--metrics={tmp_path / 'one'}", f"--log-dir={tmp_path / 'log'}"]
    assert lesson("train_mpi", *flags.split(), *files)[0] == 0
    alone = rows_of(tmp_path / "one")
    for row, other in zip(rows_of(metrics), alone, strict=True):
        for name in ("train_loss", "test_loss", "test_accuracy"):
            assert row[name] == pytest.approx(other[name], rel=ROUNDING)
    logged = [(row["epoch"], row["test_loss"]) for row in alone]
    assert logged == scalars(tmp_path / "log", "test_loss")


@pytest.mark.slow
@needs_mpirun
def test_two_processes_share_the_pooled_exercise(data, tmp_path):
    flags = ["--dataset=fashion-mnist", f"--data={data}", "--samples=50", "--iterations=30"]
    rows = []
    for ranks in (1, 2):
        metrics = tmp_path / str(ranks)
        code, out, err = run(MPIRUN, "-n", f"{ranks}", sys.executable, POOLED, *flags, f"--metrics={metrics}")
        assert code == 0, err
        assert re.fullmatch(LAST_LINE, out.splitlines()[-1]).groups() == (f"{ranks}", "cpu")
        rows += [[row["last_cost"] for row in rows_of(metrics)]]
    assert rows[0] == pytest.approx(rows[1], rel=ROUNDING)


def test_an_error_ends_all_processes(monkeypatch):
    ended = []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    two = SimpleNamespace(COMM_WORLD=SimpleNamespace(size=2))
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=two))
    monkeypatch.setitem(sys.modules, "mpi4py.run", SimpleNamespace(set_abort_status=ended.append))
    with pytest.raises(RuntimeError, match="an error"), mpi.join():
        raise RuntimeError("an error")
    assert ended == [2]


def test_a_missing_mpi_is_one_line(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    code, _, err = lesson("train_mpi")
    assert code == 2
    expected = r"the processes need mpi4py and an MPI \(.*None in sys.modules.*\); "
    expected += r"pip install 'torchpar\[baselines\]'"
    assert re.fullmatch(rf"train_mpi\.py: error: {expected}\n", err)


# The pooled exercise


def in_numpy(splits, plan) -> Result:
    return fashion_pooled.train_numpy(mpi.OneProcess(), splits, plan)


def in_torch(splits, plan) -> Result:
    with join_world("cpu") as world:
        return fashion_pooled.train_torch(world, splits, plan)


def same(run: Result, other: Result) -> bool:
    assert len(run.costs) == len(other.costs)
    numbers = ([*one.costs, *one.ends[0], *one.ends[1]] for one in (run, other))
    return np.allclose(*numbers, rtol=ROUNDING, atol=0)


def test_all_ways_have_the_same_costs(data, ranks):
    """The first is −1/n · Σ_samples Σ_classes t·log p + (1 − t)·log(1 − p), at the first weights."""
    splits = pooled(fashion_pooled.Flags(data=data, dataset="fashion-mnist", samples=50, iterations=30))
    x, labels = splits[0].features.numpy(), splits[0].labels
    assert (x.shape, x.dtype) == ((50, 400), np.float32)
    p = numpy_mlp.sigmoid(MLP(SIZES, loss="bce").forward(x)[1].astype(np.float64))
    t = np.eye(10)[labels]
    cost = -(t * np.log(p) + (1 - t) * np.log(1 - p)).sum() / len(labels)
    for plan in (Plan(60, 0.1, 0.0, 0), Plan(30, 0.1, 0.9, 0)):
        expected = in_numpy(splits, plan)
        assert len(expected.costs) == plan.iterations
        assert expected.costs[0] == pytest.approx(cost, rel=ROUNDING)
        assert expected.costs[-1] < 0.7 * expected.costs[0]
        for way in ranks(2, in_torch, splits, plan):
            assert same(way, expected)
            np.testing.assert_allclose(way.weights, expected.weights, rtol=0, atol=ROUNDING)
        assert not same(in_numpy(splits, plan._replace(lr=1.001 * plan.lr)), expected)
