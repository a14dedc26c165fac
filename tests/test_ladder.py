# SPDX-License-Identifier: MIT
"""The ladder: what is measured, what is rejected, what is shown; and that all of it runs."""

import csv
import importlib.util
import io
import re
import shutil
import subprocess
import sys
import time
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run
from rich.console import Console

from benchmarks.baselines import numpy_mlp
from benchmarks.harness import Work
from benchmarks.ladder import epochs, inputs, operators, show, split, training, whole
from benchmarks.ladder.inputs import Problem, Training, operands
from benchmarks.ladder.measure import CPU, Row, Rung, Sample, Workload, measure
from benchmarks.scaling.plan import CORES
from benchmarks.scaling.ranks import Ranks
from benchmarks.timing import Ceiling, Rejected
from torchpar.parallel.world import World

pytest.importorskip("torchvision", reason="torchvision reads the data sets")

ALONE = World(rank=0, local_rank=0, world_size=1, device=CPU)
CEILINGS = {"cpu": Ceiling(4e9, {torch.float32: 8e9}), "cuda": Ceiling(4e12, {torch.float32: 8e12})}
ORIGIN = {
    "device": "a machine",
    "torch": "2",
    "numpy": "2",
    "date": "2026-01-02T03:04:05",
    "cores": 2,
    "gpu": "",
}


# What is measured


def steady(seconds: float, part: float = 1.0):
    return lambda: Sample(seconds, part, part)


def fail():
    raise RuntimeError("out of order\nand more")


def measured(*rungs: Rung, unit="GB/s", seconds=100.0, rounds=5) -> list[Row]:
    return measure(Workload("work", Work(8e9, 2e9), unit, rungs, seconds), CEILINGS, rounds)


def test_rows():
    pure, fast, gpu = measured(
        Rung("pure Python", steady(8.0)),
        Rung("njit", steady(2.0), note="fast", compiles=True, intensity=0.5),
        Rung("GPU", steady(0.5), device=torch.device("cuda")),
    )
    assert (pure.seconds, pure.over_pure_python, pure.over_row_above) == (8.0, 1.0, None)
    assert (fast.seconds, fast.over_pure_python, fast.over_row_above) == (2.0, 4.0, 4.0)
    assert (gpu.seconds, gpu.over_pure_python, gpu.over_row_above) == (0.5, 16.0, 4.0)
    assert (fast.workload, fast.note, fast.intensity, fast.samples, fast.covered) == (
        "work",
        "fast",
        0.5,
        5,
        1.0,
    )
    assert (fast.rate, fast.ceiling, gpu.rate, gpu.ceiling) == (4.0, 1.0, 16.0, 0.004)
    assert fast.first_call >= 0
    assert pure.first_call is None
    assert all(row.ok and not row.reason and row.unit == "GB/s" for row in (pure, fast, gpu))
    (flops,) = measured(Rung("pure Python", steady(2.0)), unit="GFLOP/s")
    assert (flops.rate, flops.ceiling, flops.unit) == (1.0, 0.125, "GFLOP/s")


def test_the_median_of_the_samples_is_quoted():
    times = iter([50.0, 3.0, 1.0, 2.0])  # the first warms up
    (row,) = measured(Rung("pure Python", lambda: Sample(next(times))), rounds=3)
    assert (row.seconds, row.samples) == (2.0, 3)


def test_a_part_is_extrapolated():
    parts = iter([Sample(1.0, 0.25, 0.25), Sample(1.0, 0.25, 0.5), Sample(0.8, 0.1, 0.6), None])
    slow, fast = measured(
        Rung("pure Python", lambda: next(parts), warm=lambda: None), Rung("njit", steady(2.0))
    )
    assert (slow.seconds, slow.samples, slow.covered, slow.ok) == (4.0, 3, 0.6, True)
    assert fast.over_pure_python == 2.0


def reject() -> Sample:
    raise Rejected("a number is off")


@pytest.mark.parametrize(
    "sample, reason", [(reject, "Rejected: a number is off"), (fail, "RuntimeError: out of order")]
)
@pytest.mark.parametrize("good", [0, 2])
def test_what_fails_has_no_time(sample, reason, good):
    """At once, or after some samples."""
    calls = iter([steady(1.0)] * good + [sample] * 9)
    first, wrong, last = measured(
        Rung("pure Python", steady(4.0)), Rung("njit", lambda: next(calls)()), Rung("NumPy", steady(2.0))
    )
    assert (wrong.ok, wrong.reason) == (False, reason)
    numbers = (wrong.seconds, wrong.rate, wrong.ceiling, wrong.over_pure_python, wrong.over_row_above)
    assert numbers == (None,) * 5
    assert (last.over_row_above, last.over_pure_python, last.ok) == (None, 2.0, True)
    assert first.ok
    assert len(list(calls)) == 9 - 1  # it is not called again


def test_without_pure_python_nothing_is_compared_with_it():
    _, row = measured(Rung("pure Python", fail), Rung("njit", steady(2.0)))
    assert (row.seconds, row.over_pure_python, row.over_row_above) == (2.0, None, None)


def test_what_has_no_sample_is_not_right():
    (row,) = measured(Rung("pure Python", lambda: None))
    assert (row.seconds, row.samples, row.ok) == (None, 0, False)
    assert row.reason


def test_rungs_take_turns_until_their_seconds_are_spent():
    calls, rounds = [], []

    def called(name: str, seconds: float):
        return lambda: calls.append(name) or Sample(seconds)

    rungs = [Rung("a", called("a", 1.0)), Rung("b", called("b", 10.0)), Rung("c", called("c", 4.0))]
    workload = Workload("work", Work(1, 1), "GB/s", rungs, seconds=15.5)
    rows = measure(workload, CEILINGS, 6, lambda: rounds.append(len(calls)))
    assert "".join(calls) == "abc" * 3 + "ac" * 2 + "aa"
    assert [row.samples for row in rows] == [6, 2, 4]
    assert len(rounds) == 6


def test_warming_up_is_no_sample():
    calls = []
    rung = Rung("a", lambda: calls.append("sample") or Sample(1.0), warm=lambda: calls.append("warm"))
    (row,) = measured(rung, rounds=2)
    assert (calls, row.samples) == (["warm", "sample", "sample"], 2)
    (row,) = measured(replace(rung, warm=fail, compiles=True), rounds=2)
    assert (len(calls), row.samples, row.reason) == (3, 0, "RuntimeError: out of order")


# What an operator's result must be


@pytest.mark.parametrize(
    "name, shape", [("maximum", (3, 5)), ("matmul_t", (5, 7)), ("linear_sigmoid", (3, 7, 5))]
)
def test_operands_reject_what_is_wrong(name, shape):
    given = operands(name, shape)
    result = getattr(numpy_mlp, name)(*given.arguments)
    given.check(result)
    given.check(result[:2], slice(2))
    off = np.zeros_like(result)
    off[-1, -1] = 1 if name == "maximum" else 1e-4
    for wrong in (
        result + off,
        result - off,
        result * np.where(off, np.nan, 1),
        result[::-1],
        result[:, ::-1],
        result[:2],
    ):
        with pytest.raises(Rejected, match=r"more than rounding|has shape"):
            given.check(wrong)
    for t in given.arguments:  # a perturbed input
        changed = [
            np.where(np.arange(s.size).reshape(s.shape), s, s + 300) if s is t else s for s in given.arguments
        ]
        with pytest.raises(Rejected):
            given.check(getattr(numpy_mlp, name)(*changed))


def fake_ranks(wrong: float = 0.0) -> Ranks:
    """Two ranks that take 2 and 3 s, in this process."""

    class Fake:
        def all(self, function, name, shape, cold):
            assert function is split.operate
            given = operands(name, shape)
            result = getattr(numpy_mlp, name)(*given.arguments) + wrong
            axis = 1 if name == "linear_sigmoid" else 0
            return list(zip((2.0, 3.0), np.array_split(result, 2, axis=axis), strict=True))

    return Fake()


@pytest.mark.parametrize(
    "name, shape", [("maximum", (3, 5)), ("matmul_t", (5, 7)), ("linear_sigmoid", (3, 7, 5))]
)
def test_operators_have_their_rungs(name, shape):
    workload = operators.workload(name, shape, fake_ranks())
    rungs = {f"{rung.name} {rung.note}".strip(): rung for rung in workload.rungs}
    names = ["pure Python", "njit", "NumPy", "torch eager", "torch.compile", "torchpar CPU"]
    names += [f"njit, parallel {n} thread{'s' * (n > 1)}" for n in (1, 2, 4, 8) if n <= CORES]
    if name == "matmul_t":
        names += [f"njit, {way}" for way in ("blocked", "triangular")]
        assert [rungs[f"njit{way}"].intensity for way in ("", ", blocked", ", triangular")] == [
            1 / 8,
            1 / 2,
            1,
        ]
    assert rungs.keys() >= set(names)
    assert workload.unit == ("GB/s" if name == "maximum" else "GFLOP/s")
    for rung in ("pure Python", "NumPy", "torch eager", "torchpar CPU"):
        assert rungs[rung].sample().covered == 1
    two = [rung for rung in workload.rungs if rung.name == "2 ranks"]
    assert two[0].sample().seconds == 3.0  # the slower one's
    *_, two = operators.workload(name, shape, fake_ranks(wrong=1)).rungs
    with pytest.raises(Rejected):
        two.sample()


def test_pure_python_computes_some_rows(monkeypatch):
    monkeypatch.setattr(operators, "PRODUCTS", 2 * 5 * 7 + 1)
    pure, *_ = operators.workload("matmul_t", (5, 7), fake_ranks()).rungs
    assert pure.note == "from 2 of 5 rows"
    assert pure.sample()[1:] == (0.4, 0.4)


@pytest.mark.parametrize("name, shape", [("linear_sigmoid", (3, 7, 5)), ("maximum", (3, 5))])
def test_what_is_warm_is_called_many_times(monkeypatch, name, shape):
    """However long the first call took, which may compile; what is cold is called once."""
    calls, right = [], getattr(numpy_mlp, name)

    def slow_at_first(*args):
        if not calls:
            time.sleep(2 * operators.WARM_SECONDS)
        calls.append(1)
        return right(*args)

    monkeypatch.setattr(numpy_mlp, name, slow_at_first)
    (rung,) = (rung for rung in operators.workload(name, shape, fake_ranks()).rungs if rung.name == "NumPy")
    rung.sample()
    before = len(calls)
    rung.sample()
    if name == "maximum":
        assert len(calls) == before + 1
    else:
        assert len(calls) > before + 1


# What an epoch must come to

SMALL = Training((784, 30, 10), 10, samples=205)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem(SMALL, ALONE)


def train(problem: Problem, rate: float = inputs.RATE, order=None) -> np.ndarray:
    model = numpy_mlp.MLP(problem.training.sizes)
    model.parameters[:] = problem.start.parameters
    optimizer, losses = numpy_mlp.SGD(model, rate), []
    for batch in order or problem.order:
        loss, gradient = model.gradients(problem.x[batch], problem.labels[batch])
        optimizer.step(gradient / len(batch))
        losses.append(loss / len(batch))
    return np.array(losses)


def test_an_epoch_covers_the_samples(problem):
    assert [len(batch) for batch in problem.order] == [10] * 20 + [5]
    assert sorted(np.concatenate(problem.order)) == list(range(205))
    assert problem.x.shape == (205, 784)
    assert (problem.x.min(), problem.x.max(), problem.x.dtype) == (0, 1, np.float32)
    products = [m * n for m, n in pairwise(SMALL.sizes)]
    assert problem.work.flops == 205 * (3 * 2 * sum(products) - 2 * products[0])


def test_losses_of_another_training_are_rejected(problem):
    losses = train(problem)
    problem.check(losses)
    problem.check(losses[3:5], 3)
    other = list(numpy_mlp.batches(205, 10, np.random.default_rng(1)))
    last = losses.copy()
    last[-1] = np.nan
    swapped = [problem.order[1], problem.order[0], *problem.order[2:]]
    wrong = [train(problem, 1.01 * inputs.RATE), train(problem, order=other), train(problem, order=swapped)]
    for found in (*wrong, losses[::-1], 1.01 * losses, last):
        with pytest.raises(Rejected, match="a loss is off"):
            problem.check(found)
    with pytest.raises(Rejected):
        problem.check(losses[:2], 3)


class Scripted(epochs.Run):
    """A run that has the right losses, and notes what it is asked."""

    def restart(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def train(self, first: int, last: int) -> np.ndarray:
        self.asked.append((first, last))
        return self.problem.losses[first:last]


@pytest.mark.parametrize("batches, end", [(1, 21), (2, 21), (4, 21), (21, 21), (50, 21), (3, 7)])
def test_chunks_cover_an_epoch(problem, batches, end):
    run = Scripted(problem)
    chunks = epochs.Chunks(run, batches, end)
    chunks.warm()
    assert run.asked == []  # it has started again
    samples = list(iter(chunks.sample, None))
    assert chunks.sample() is None
    trained = [number for first, last in run.asked for number in range(first, last)]
    assert trained == list(range(end))
    assert all(last - first <= batches for first, last in run.asked)
    part = sum(len(batch) for batch in problem.order[:end]) / 205
    assert sum(sample.part for sample in samples) == pytest.approx(part)
    assert samples[-1].covered == part
    assert (part == 1) is (end == 21)


class Lazy(Scripted):
    """Trains on the first batch that it is asked to, and leaves the others."""

    def train(self, first: int, last: int) -> np.ndarray:
        return self.problem.losses[first : first + 1]


class Wrong(epochs.NumPy):
    """Takes half a step."""

    def restart(self) -> None:
        super().restart()
        self.optimizer.lr /= 2


@pytest.mark.parametrize("kind", [Lazy, Wrong])
def test_a_wrong_run_is_rejected(problem, kind):
    chunks = epochs.Chunks(kind(problem), 5, 21)
    with pytest.raises(Rejected):
        list(iter(chunks.sample, None))


@pytest.mark.parametrize("kind", ["pure Python", "NumPy", "torch", "torchpar"])
def test_runs_train_as_float64_does(problem, kind):
    """The remainder comes first, as the last step shows in no loss."""
    problem, order = Problem(SMALL, ALONE), problem.order
    problem.order = [order[-1], *order[:-1]]
    makers = {
        "pure Python": lambda: epochs.PurePython(problem, 21),
        "NumPy": lambda: epochs.NumPy(problem),
        "torch": lambda: epochs.Torch(problem, epochs.native(SMALL.sizes)),
        "torchpar": lambda: epochs.Torch(problem, whole.MLP(SMALL.sizes)),
    }
    chunks = epochs.Chunks(makers[kind](), 4, 21)
    chunks.warm()
    samples = list(iter(chunks.sample, None))
    assert len(samples) == 6
    assert all(sample.seconds > 0 for sample in samples)
    assert samples[-1].covered == 1
    chunks.run.restart()
    problem.check(chunks.run.train(0, 3))


def test_a_whole_program_that_trains_otherwise_is_rejected(problem, monkeypatch):
    """torchpar's own loop: at a rate that is 1% off, or in another order than the one compared with."""
    loops = whole.Loops(problem, ALONE)
    rung = loops.plain()
    assert (rung.sample().part, rung.sample().covered, rung.sample()) == (1.0, 1.0, None)
    other = whole.Loops(problem, ALONE)
    other.order = problem.order
    with pytest.raises(Rejected, match="the mean loss is"):
        other.plain().sample()
    monkeypatch.setattr(whole, "RATE", 1.01 * inputs.RATE)
    with pytest.raises(Rejected, match="the mean loss is"):
        loops.plain().sample()


def test_an_mpirun_that_fails_is_told(problem, monkeypatch):
    monkeypatch.setattr(
        whole.subprocess, "run", lambda *args, **options: subprocess.CompletedProcess(args, 3, "", "no slots")
    )
    monkeypatch.setattr(whole.shutil, "which", lambda name: "/usr/bin/mpirun")
    with pytest.raises(Rejected, match="mpirun ended with 3: no slots"):
        whole.mpi(problem).sample()
    monkeypatch.setattr(whole.shutil, "which", lambda name: None)
    monkeypatch.setattr(whole.sys, "executable", "/nonexistent/python")
    assert whole.mpi(problem) is None


def test_trainings_have_their_rungs(problem):
    class Fake:
        def all(self, function, *args):
            return [None, None]

    workload = training.workload(SMALL, Fake(), ALONE)
    names = {rung.name for rung in workload.rungs}
    assert names >= {"pure Python", "njit", "njit, parallel", "NumPy", "torch eager", "torch.compile"}
    assert names >= {"torchpar CPU", whole.PLAIN, "2 ranks"}
    assert workload.rungs[0].note == "from 200 of 205 digits"
    assert workload.name == "an epoch of 205 MNIST digits, 784-30-10, batch 10"


# What is shown


def shown(thing) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(thing)
    return console.file.getvalue()


def some_rows(workload: str = "work") -> list[Row]:
    rows = measured(
        Rung("pure Python", steady(4.0, 0.25)),
        Rung("njit", steady(0.002), note="1 thread", compiles=True, intensity=0.5),
        Rung("NumPy", reject),
        Rung(whole.PLAIN, steady(0.5)),
        Rung(whole.LIGHTNING, steady(0.75)),
        Rung("torchpar GPU", steady(2e-6), device=torch.device("cuda")),
        unit="GFLOP/s",
    )
    return [replace(row, workload=workload) for row in rows]


def test_table():
    lines = shown(show.table(some_rows())).splitlines()
    line = {
        name: next(line for line in lines if f"│ {name} " in line)
        for name in ("pure Python", "njit", "NumPy")
    }
    cells = [cell.strip() for cell in re.split("[│┃]", line["pure Python"])]
    assert cells[1:7] == ["pure Python", "from 25%", "~ 16 s", "1", "", "0.125"]
    cells = [cell.strip() for cell in re.split("[│┃]", line["njit"])]
    assert cells[1:5] == ["njit", "1 thread", "2 ms", "8,000"]
    assert "Rejected: a number is off" in line["NumPy"]
    assert lines[0].strip() == "work"
    assert "e+" not in "".join(lines)  # large numbers are written out: one is 8 million


@pytest.mark.parametrize(
    "reason",
    [
        "RuntimeError: [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer",
        "RuntimeError: [enforce fail at alloc_cpu.cpp:127] out of memory",
    ],
)
def test_reasons_are_shown_as_they_are(reason):
    row = replace(some_rows()[2], reason=reason)
    assert reason in shown(show.table([row]))


@pytest.mark.parametrize(
    "seconds, text",
    [
        (None, ""),
        (0.0, "0 µs"),
        (1.5e-9, "0.0015 µs"),
        (1.234e-6, "1.23 µs"),
        (0.00025, "250 µs"),
        (0.0009996, "1,000 µs"),
        (0.0125, "12.5 ms"),
        (0.9996, "1,000 ms"),
        (59.94, "59.9 s"),
        (2512.0, "2,512 s"),
    ],
)
def test_duration(seconds, text):
    assert show.duration(seconds) == text


def test_overhead():
    rows = some_rows()
    expected = f"work: a step takes 5000 µs in {whole.PLAIN}, 2500 µs more in Lightning"
    assert show.overhead(rows, 100) == expected
    assert show.overhead(rows[:4], 100) == ""


@pytest.mark.parametrize(
    "gpu, end",
    [
        (40e-6, "the GPU is 400,000× pure Python, 50× njit (at least 40×: met)"),
        (1e-3, "NOT met)"),
        (None, "not measured on the GPU"),
    ],
)
def test_against_gpu(gpu, end):
    *rows, last = some_rows()
    assert show.against_gpu([*rows, replace(last, seconds=gpu)]).endswith(end)


def test_pictures(tmp_path):
    path = tmp_path / "bars.png"
    ladder = [some_rows(), some_rows("an epoch of work")]
    show.bars(ladder, path, ORIGIN)
    show.intensity(some_rows(), tmp_path / "intensity.png", ORIGIN, CEILINGS["cpu"], 1e10)
    for name in ("bars", "intensity"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_of_what_failed(tmp_path):
    """A workload of which nothing could be measured leaves the others their picture."""
    failed = [replace(row, seconds=None, rate=None, ok=False) for row in some_rows()]
    show.bars([failed, some_rows("an epoch of work")], tmp_path / "bars.png", ORIGIN)
    show.intensity(failed, tmp_path / "intensity.png", ORIGIN, CEILINGS["cpu"], 1e10)


# All of it


def test_the_ladder_runs(tmp_path):
    code, out, err = run(sys.executable, "-m", "benchmarks.ladder", "--quick", "--output", str(tmp_path))
    assert code == 0, out + err
    assert {path.name for path in tmp_path.iterdir()} == {"ladder.csv", "ladder.png", "intensity.png"}
    for name in ("ladder", "intensity"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "ladder.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = {field.name for field in fields(Row)} | {
        "cores",
        "torch",
        "numpy",
        "python",
        "device",
        "commit",
        "date",
    }
    assert rows[0].keys() >= columns
    ladder: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows:
        assert (row["ok"], row["reason"]) == ("True", ""), row
        assert float(row["seconds"]) > 0
        assert float(row["rate"]) > 0
        assert int(row["samples"]) >= 1
        ladder.setdefault(row["workload"], {})[f"{row['rung']} {row['note']}".strip()] = row
    *_, epoch = ladder.values()
    assert list(ladder) == [
        "maximum of 100×90 int32",
        "X·Xᵀ of 130×70 float32",
        "linear+sigmoid of 7×33→5 float32",
        "an epoch of 405 MNIST digits, 784-30-10, batch 10",
    ]
    for rungs in ladder.values():
        names = {"njit", "njit, parallel 1 thread", "NumPy", "torch eager", "torch.compile", "torchpar CPU"}
        assert rungs.keys() >= names
        assert any(name.startswith("2 ranks") for name in rungs)
        previous = None
        for row in rungs.values():
            assert (previous is None) is (row["over_row_above"] == "")
            if previous is not None:
                expected = float(previous["seconds"]) / float(row["seconds"])
                assert float(row["over_row_above"]) == pytest.approx(expected)
            previous = row
        assert float(rungs["njit"]["first_call"]) > 0
    assert float(epoch["pure Python from 200 of 405 digits"]["covered"]) == pytest.approx(200 / 405)
    assert whole.PLAIN in epoch
    beside = Path(sys.executable).with_name("mpirun")
    assert ("NumPy, 2 processes by MPI" in epoch) is (beside.exists() or shutil.which("mpirun") is not None)
    has_lightning = importlib.util.find_spec("lightning") is not None
    assert ("Lightning" in epoch) is has_lightning
    assert ("µs more in Lightning" in out) is has_lightning
    for workload in ladder:
        assert f"{workload} " in out
    assert f"written: {tmp_path}/ladder.csv, ladder.png, intensity.png" in out
    assert ("not measured: njit with 8 threads" in out) is (CORES < 8)
