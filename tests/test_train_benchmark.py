# SPDX-License-Identifier: MIT
"""The benchmark of whole trainings: its checks, its rungs, its tables, and that it runs."""

import csv
import subprocess
from collections.abc import Iterator, Sequence
from functools import partial
from types import SimpleNamespace

import fake_graph
import numpy as np
import pytest
import torch
from ranks import fork_context

pytest.importorskip("rich", reason="rich prints the tables")
pytest.importorskip("numba", reason="Numba compiles the loops")
pytest.importorskip("torchvision", reason="torchvision reads the data sets")

from benchmarks.results import Result
from benchmarks.timing import Rejected
from benchmarks.train import __main__ as benchmark
from benchmarks.train import epochs, inputs, on_ranks, programs, rungs
from benchmarks.train.inputs import Training, TrainingInputs
from torchpar.baselines import numba_njit, numpy_mlp
from torchpar.nn import MLP
from torchpar.parallel.launch.world import join_world_of_one
from torchpar.training.graph import GraphedStep

SMALL = Training((784, 30, 10), 10, samples=205)


@pytest.fixture(scope="module")
def epoch() -> TrainingInputs:
    return TrainingInputs(SMALL)


def train(epoch: TrainingInputs, lr: float = inputs.LR, order=None) -> np.ndarray:
    model = numpy_mlp.MLP(epoch.training.sizes)
    model.parameters[:] = epoch.start.parameters
    optimizer, losses = numpy_mlp.SGD(model, lr), []
    for batch in order or epoch.order:
        loss, gradient = model.gradients(epoch.x[batch], epoch.labels[batch])
        optimizer.step(gradient / len(batch))
        losses.append(loss / len(batch))
    return np.array(losses)


def test_an_epoch_covers_the_samples(epoch):
    assert [len(batch) for batch in epoch.order] == [10] * 20 + [5]
    assert sorted(np.concatenate(epoch.order)) == list(range(205))
    assert (epoch.x.shape, epoch.x.min(), epoch.x.max(), epoch.x.dtype) == ((205, 784), 0, 1, np.float32)


def test_losses_of_another_training_are_rejected(epoch):
    losses = train(epoch)
    epoch.check(losses, 0, 21)
    epoch.check(losses[3:5], 3, 5)
    other = list(numpy_mlp.batches(205, 10, np.random.default_rng(1)))
    last = losses.copy()
    last[-1] = np.nan
    swapped = [epoch.order[1], epoch.order[0], *epoch.order[2:]]
    wrong = [train(epoch, 1.01 * inputs.LR), train(epoch, order=other), train(epoch, order=swapped)]
    for found in (*wrong, losses[::-1], 1.01 * losses, last):
        with pytest.raises(Rejected, match="a loss is off"):
            epoch.check(found, 0, 21)
    with pytest.raises(Rejected, match="2 losses of 3 batches"):
        epoch.check(losses[:2], 0, 3)


def scripted(asked: list[int], factor: float = 1.0):
    """A rung that yields the right losses, times ``factor``, and notes the batches that it trained on."""

    def train(epoch: TrainingInputs, order: Sequence[np.ndarray]) -> Iterator[float | None]:
        asked.clear()
        yield None
        for number, loss in enumerate(epoch.losses_of(order)):
            asked.append(number)
            yield factor * loss

    return train


@pytest.mark.parametrize("chunk, end", [(1, 21), (4, 21), (21, 21), (50, 21), (3, 7), (0, 0)])
def test_turns_cover_an_epoch(epoch, chunk, end):
    asked: list[int] = []
    turn = rungs.epoch_turn(epoch, rungs.local(epoch, scripted(asked)), chunk, end)
    assert turn(0) == []
    assert asked == []  # it has begun anew
    samples = list(iter(partial(turn, 1), None))
    assert asked == list(range(end or 21))
    assert len(samples) == -(-(end or 21) // (chunk or 3))  # a tenth of 21 batches
    assert turn(1) is None


@pytest.mark.parametrize("kind", ["off", "lazy"])
def test_a_wrong_epoch_is_rejected(epoch, kind):
    def lazy(epoch: TrainingInputs, order: Sequence[np.ndarray]) -> Iterator[float | None]:
        """Trains on the first batches alone."""
        yield None
        yield from epoch.losses_of(order)[:3]

    train = lazy if kind == "lazy" else scripted([], 1.01)
    turn = rungs.epoch_turn(epoch, rungs.local(epoch, train), 5)
    turn(0)
    with pytest.raises(Rejected):
        turn(1)


@pytest.mark.parametrize("kind", ["pure Python", "NumPy", "torch", "torchpar", "customary"])
def test_rungs_train_as_float64_does(kind):
    """The remainder comes first, as the last step shows in no loss."""
    epoch = TrainingInputs(SMALL)
    epoch.order = [epoch.order[-1], *epoch.order[:-1]]
    makers = {
        "pure Python": lambda: epochs.pure_python_epoch,
        "NumPy": lambda: epochs.numpy_epoch,
        "torch": lambda: epochs.torch_epoch(epochs.native(SMALL.sizes)),
        "torchpar": lambda: epochs.torch_epoch(MLP(SMALL.sizes)),
        "customary": lambda: epochs.customary_epoch,
    }
    turn = rungs.epoch_turn(epoch, rungs.local(epoch, makers[kind]()), 4)
    turn(0)
    samples = list(iter(partial(turn, 1), None))
    assert len(samples) == 6
    assert all(seconds > 0 for (seconds,) in samples)


class TwoRanks:
    """Two ranks in this process that take 2 and 3 s, and whose losses are off by ``wrong``."""

    def __init__(self, wrong: float = 0.0):
        self.wrong = wrong

    def run(self, function, *args):
        if function is on_ranks.begin:
            given = TrainingInputs(args[0])
            self.losses = iter(given.losses)
            return [None, None]
        losses = np.array([next(self.losses) for _ in range(args[1])])
        return [(2.0, 0.25 * losses), (3.0, 0.75 * losses + self.wrong)]


def test_losses_of_ranks_add_up(epoch):
    for wrong in (0.0, 0.1):
        turn = rungs.epoch_turn(epoch, partial(rungs.on_ranks, TwoRanks(wrong), epoch, "DDP"), 21)
        if wrong:
            with pytest.raises(Rejected):
                [turn(0), turn(1)]
        else:
            assert [turn(0), turn(1)] == [[], [pytest.approx(3.0 * 10 / 205)]]


@pytest.mark.parametrize("fused, graph", [(False, False), (True, False), (True, True)])
def test_the_lessons_loop_trains_in_its_own_order(epoch, fused, graph, monkeypatch):
    """A rate that is 1% off, or another order of the samples, is rejected."""
    monkeypatch.setattr(GraphedStep, "_capture", fake_graph.capture)
    with join_world_of_one("cpu") as world:

        def turn_of(given: TrainingInputs):
            turn = rungs.epoch_turn(given, rungs.local(given, epochs.run_epoch(world, fused, graph)), 21)
            turn(0)
            return turn

        assert turn_of(epoch)(1)[0] > 0
        other = TrainingInputs(SMALL)
        other.order = other.order[::-1]
        with pytest.raises(Rejected, match="a loss is off"):
            turn_of(other)(1)
        monkeypatch.setattr(epochs, "LR", 1.01 * inputs.LR)
        with pytest.raises(Rejected, match="a loss is off"):
            turn_of(epoch)(1)


def test_a_program_that_trains_otherwise_is_rejected(epoch):
    """Another order of the samples moves the mean loss."""
    losses = epoch.losses_of(epoch.order)
    mean = float(np.average(losses, weights=[len(batch) for batch in epoch.order]))
    rung = programs.program_rung("program", epoch, epoch.order, lambda: (20.5, mean))
    assert (rung.turn(0), rung.turn(1), rung.turn(1 + programs.EPOCHS)) == ([], [1.0], None)
    other = programs.program_rung("program", epoch, epoch.order[::-1], lambda: (20.5, mean))
    with pytest.raises(Rejected, match="the mean loss is"):
        other.turn(1)


def test_an_mpirun_that_fails_or_is_missing(epoch, monkeypatch):
    failed = subprocess.CompletedProcess([], 3, "", "no slots")
    monkeypatch.setattr(programs.subprocess, "run", lambda *args, **options: failed)
    monkeypatch.setattr(programs.shutil, "which", lambda name: "/usr/bin/mpirun")
    with pytest.raises(Rejected, match="mpirun ended with 3: no slots"):
        programs.mpi(epoch).turn(1)
    monkeypatch.setattr(programs.shutil, "which", lambda name: None)
    monkeypatch.setattr(programs.sys, "executable", "/nonexistent/python")
    assert "mpirun" in programs.missing("MPI")


def test_seconds_to_an_accuracy(epoch, monkeypatch):
    monkeypatch.setattr(benchmark, "ACCURACIES", (0.05, 0.97))
    (row,) = benchmark.with_accuracy(
        [Result(case={}, contestant="way", p50_ms=2.0, found={"note": ""})], epoch, 1
    )
    # One epoch of 205 digits reaches the first accuracy and not the second.
    assert row.found["to_5_s"] == pytest.approx(205 / 10 * 2e-3)
    assert (row.found["to_97_s"], row.found["samples_per_s"]) == (None, 5000)


def test_the_readmes_table_of_trainings():
    def row(network: str, contestant: str, ms: float | None, speedup: float | None, note: str = "") -> Result:
        work = {"network": network, "batch": 8}
        return Result(case=work, contestant=contestant, p50_ms=ms, speedup=speedup, found={"note": note})

    tables = [
        [row("9-1", rungs.PLAIN, 2.0, 1.0, "SGD"), row("9-1", rungs.FUSED, 0.5, 4.0, "from 3 of 9 digits")],
        [row("9-2", rungs.PLAIN, 3.0, 1.0, "SGD"), row("9-2", rungs.FUSED, None, None, "from 4 of 9 digits")],
    ]
    assert benchmark.as_markdown(tables, 2).splitlines() == [
        "| ms a step, 2 threads | 9-1, batch 8 | 9-2, batch 8 |",
        "|---|---|---|",
        f"| {rungs.PLAIN}, SGD | 2 | 3 |",
        f"| {rungs.FUSED} | 0.5 (4×) |  |",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True])
def test_the_benchmark_of_trainings_runs(tmp_path, capsys, monkeypatch, whole):
    """Unless it is to be ``whole``, loops are not compiled, and MPI and Lightning are left out."""
    pytest.importorskip("matplotlib", reason="an extra")
    fork_context()
    monkeypatch.setattr(programs, "EPOCHS", 1)
    if not whole:
        loops = {loop.__name__: loop for loop in numba_njit.LOOPS}
        monkeypatch.setattr(numba_njit, "SERIAL", SimpleNamespace(**loops))
        monkeypatch.setattr(numba_njit, "cross_entropy", numba_njit.cross_entropy.py_func)
        monkeypatch.setattr(programs, "missing", lambda name: ["something"])
    threads = torch.get_num_threads()
    assert benchmark.main(["--quick", f"--output={tmp_path}"]) == 0
    assert torch.get_num_threads() == threads
    assert {path.name for path in tmp_path.iterdir()} == {"train.csv", "train.md", "train.png"}
    assert (tmp_path / "train.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "train.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["network"], row["batch"], row["threads"]) for row in rows} == {("784-30-10", "10", "1")}
    assert all((row["ok"], row["reason"]) == ("True", "") and float(row["p50_ms"]) > 0 for row in rows), rows
    found = [row["contestant"] for row in rows]
    expected = {"pure Python", "customary script", "njit", "NumPy", rungs.PLAIN, "torchpar, autograd"}
    assert {*found} >= expected | {rungs.FUSED, f"{rungs.FUSED}, 2 ranks"}
    assert found.count(f"{rungs.FUSED}, 2 ranks") == 3
    assert ("Lightning" in found) is (whole and not programs.missing(programs.LIGHTNING))
    assert ("not measured: MPI" in capsys.readouterr().out) is bool(programs.missing("MPI"))


def test_a_number_of_threads_that_cannot_be(capsys):
    with pytest.raises(benchmark.ConfigError, match="--threads is 0, expected at least 1"):
        benchmark.main(["--quick", "--threads=0"])
