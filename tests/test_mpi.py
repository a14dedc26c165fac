# SPDX-License-Identifier: MIT
"""Data parallelism over MPI, and the pooled exercise: the same losses as one process."""

import re
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from commands import LAST_LINE, MPIRUN, ROOT, lesson, needs_mpirun, rows_of, run
from fake_data import fashion_mnist

from torchpar.baselines import mpi, numpy_mlp
from torchpar.baselines.numpy_mlp import MLP
from torchpar.parallel.launch.world import join_world

pytest.importorskip("tyro", reason="tyro reads the flags")

import fashion_pooled
from fashion_pooled import SIZES, Plan, Result, pooled

ROUNDING = 1e-5  # of a loss: some hundred steps of some roundings of 6e-8 each


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A small data set; a batch of ten leaves a remainder of one."""
    return fashion_mnist(tmp_path_factory.mktemp("data"), train=61, test=11)


@pytest.mark.slow
@needs_mpirun
@pytest.mark.parametrize(
    "name, flags, compared",
    [
        # The last batch is of one sample, which leaves process 1 none.
        ("train_mpi", "--epochs 2 --hidden 12 8 --lr 0.3", ["train_loss", "test_loss", "test_accuracy"]),
        ("fashion_pooled", "--samples 50 --iterations 30", ["last_cost"]),
    ],
)
def test_two_processes_train_as_one(data, tmp_path, name, flags, compared):
    found, script = [], str(ROOT / "examples" / f"{name}.py")
    flags = ["--dataset=fashion-mnist", f"--data={data}", *flags.split()]
    for ranks in ("1", "2"):
        metrics = tmp_path / ranks
        code, out, err = run(MPIRUN, "-n", ranks, sys.executable, script, *flags, f"--metrics={metrics}")
        assert code == 0, err
        assert re.fullmatch(LAST_LINE, out.splitlines()[-1]).groups() == (ranks, "cpu")
        found.append([[row[column] for column in compared] for row in rows_of(metrics)])
    np.testing.assert_allclose(*found, rtol=ROUNDING)
    if name == "train_mpi":
        assert out.count("test accuracy") == 2 + 1  # process 0 alone prints
        for phase in ("data", "forward", "backward", "collectives", "optimizer"):
            assert len(re.findall(rf"│ {phase} +│ +\d+\.\d\d +│ +\d+\.\d% +│", out)) == 1


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
    in_numpy = partial(fashion_pooled.train_numpy, mpi.OneProcess(), splits)
    x, labels = splits[0].features.numpy(), splits[0].labels
    assert (x.shape, x.dtype) == ((50, 400), np.float32)
    p = numpy_mlp.sigmoid(MLP(SIZES, loss="bce").forward(x)[1].astype(np.float64))
    t = np.eye(10)[labels]
    cost = -(t * np.log(p) + (1 - t) * np.log(1 - p)).sum() / len(labels)
    for plan in (Plan(60, 0.1, 0.0, 0), Plan(30, 0.1, 0.9, 0)):
        expected = in_numpy(plan)
        assert len(expected.costs) == plan.iterations
        assert expected.costs[0] == pytest.approx(cost, rel=ROUNDING)
        assert expected.costs[-1] < 0.7 * expected.costs[0]
        for way in ranks(2, in_torch, splits, plan):
            assert same(way, expected)
            np.testing.assert_allclose(way.weights, expected.weights, rtol=0, atol=ROUNDING)
        assert not same(in_numpy(plan._replace(lr=1.001 * plan.lr)), expected)
