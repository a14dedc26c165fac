# SPDX-License-Identifier: MIT
"""The ladder: its checks, its rungs and rows, what is shown, and that it runs."""

import csv
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import fork_context

pytest.importorskip("rich", reason="rich prints the tables")
pytest.importorskip("numba", reason="Numba compiles the loops")
pytest.importorskip("torchvision", reason="torchvision reads the data sets")

from benchmarks.compare import Work
from benchmarks.ladder import __main__ as ladder
from benchmarks.ladder import on_ranks, operators, show
from benchmarks.ladder.inputs import operands
from benchmarks.ladder.rungs import Rung, Workload, measure
from benchmarks.results import CORES, Result
from benchmarks.timing import Ceiling, Rejected
from torchpar.baselines import numba_njit, numpy_mlp

CEILINGS = {"cpu": Ceiling(4e9, {torch.float32: 8e9}), "cuda": Ceiling(4e12, {torch.float32: 8e12})}
SHAPES = [("maximum", (3, 5)), ("matmul_t", (5, 7)), ("linear_sigmoid", (3, 7, 5))]
PNG = b"\x89PNG"


# Rows


def steady(seconds: float):
    return lambda index: [seconds]


def reject(index: int) -> list[float]:
    raise Rejected("a number is off")


def measured(*rungs: Rung, unit="GB/s") -> list[Result]:
    return measure(Workload("work", Work(8e9, 2e9), unit, rungs, 100.0), CEILINGS, 3)


def test_rows_compare_with_pure_python_and_with_the_rung_before():
    pure, fast, gpu = measured(
        Rung("pure Python", steady(8.0), "from a part", covered=0.25),
        Rung("njit", steady(2.0), compiles=True, intensity=0.5),
        Rung("GPU", steady(0.5), device=torch.device("cuda")),
    )
    found = [
        (row.p50_ms, row.found["over_pure_python"], row.found["over_rung_before"])
        for row in (pure, fast, gpu)
    ]
    assert found == [(8000, 1.0, None), (2000, 4.0, 4.0), (500, 16.0, 4.0)]
    assert [row.found["gb_per_s"] for row in (pure, fast, gpu)] == [1.0, 4.0, 16.0]
    assert [row.found["of_ceiling"] for row in (pure, fast, gpu)] == [0.25, 1.0, 0.004]
    assert (pure.found["note"], pure.found["covered"], pure.found["first_s"]) == ("from a part", 0.25, None)
    assert fast.found["first_s"] >= 0
    assert fast.found["intensity"] == 0.5
    (flops,) = measured(Rung("pure Python", steady(2.0)), unit="GFLOP/s")
    assert (flops.found["gflop_per_s"], flops.found["of_ceiling"]) == (1.0, 0.125)


def test_a_rung_that_fails_has_no_time_and_the_next_no_ratio():
    _, wrong, last = measured(
        Rung("pure Python", steady(4.0)), Rung("njit", reject), Rung("NumPy", steady(2.0))
    )
    assert (wrong.ok, wrong.p50_ms, "over_pure_python" in wrong.found) == (False, None, False)
    assert (last.found["over_rung_before"], last.found["over_pure_python"]) == (None, 2.0)
    _, row = measured(Rung("pure Python", reject), Rung("njit", steady(2.0)))
    assert (row.p50_ms, row.found["over_pure_python"], row.found["over_rung_before"]) == (2000, None, None)


# Operators


@pytest.mark.parametrize("name, shape", SHAPES)
def test_operands_reject_what_is_wrong(name, shape):
    given = operands(name, shape)
    result = getattr(numpy_mlp, name)(*given.arguments)
    given.check(result)
    given.check(result[:2], slice(2))
    off = np.zeros_like(result)
    off[-1, -1] = 1 if name == "maximum" else 1e-4
    wrong = [result + off, result - off, result * np.where(off, np.nan, 1)]
    for found in (*wrong, result[::-1], result[:, ::-1], result[:2]):
        with pytest.raises(Rejected, match=r"more than rounding|has shape"):
            given.check(found)
    for t in given.arguments:  # a perturbed input
        changed = [
            np.where(np.arange(s.size).reshape(s.shape), s, s + 300) if s is t else s for s in given.arguments
        ]
        with pytest.raises(Rejected):
            given.check(getattr(numpy_mlp, name)(*changed))


class TwoRanks:
    """Two ranks in this process that take 2 and 3 s, and whose results are off by ``wrong``."""

    def __init__(self, wrong: float = 0.0):
        self.wrong = wrong

    def run(self, function, *args):
        assert function is on_ranks.operate
        name, shape, _ = args
        given = operands(name, shape)
        result = getattr(numpy_mlp, name)(*given.arguments) + self.wrong
        axis = 1 if name == "linear_sigmoid" else 0
        return list(zip((2.0, 3.0), np.array_split(result, 2, axis=axis), strict=True))


@pytest.mark.parametrize("name, shape", SHAPES)
def test_operators_have_their_rungs(name, shape):
    workload = operators.workload(name, shape, TwoRanks(), [1, 2])
    rungs = {f"{rung.name} {rung.note}".strip(): rung for rung in workload.rungs}
    names = ["pure Python", "njit", "NumPy", "torch eager", "torch.compile", "torchpar CPU"]
    names += ["njit, parallel 1 thread", "njit, parallel 2 threads"]
    if name == "matmul_t":
        ways = [rungs[f"njit{way}"].intensity for way in ("", ", blocked", ", triangular")]
        assert ways == [1 / 8, 1 / 2, 1]
    assert rungs.keys() >= set(names)
    assert workload.unit == ("GB/s" if name == "maximum" else "GFLOP/s")
    for rung in ("pure Python", "NumPy", "torch eager", "torchpar CPU"):
        assert rungs[rung].turn(0)[0] > 0
    assert workload.rungs[-1].turn(1) == [3.0]  # the slower one's
    with pytest.raises(Rejected):
        operators.two_ranks_rung(operands(name, shape), shape, TwoRanks(wrong=1.0)).turn(1)


def test_pure_python_computes_some_rows(monkeypatch):
    monkeypatch.setattr(operators, "PRODUCTS", 2 * 5 * 7 + 1)
    rung = operators.pure_python_rung(operands("matmul_t", (5, 7)))
    assert (rung.note, rung.covered) == ("from 2 of 5 rows", 0.4)
    assert rung.turn(0)[0] > 0


def test_a_part_is_extrapolated():
    given = operands("matmul_t", (5, 7))
    turn = operators.cpu_turn(given, lambda: time.sleep(0.01) or given.expected[:2], rows=2)
    assert 0.025 <= turn(0)[0] < 1


@pytest.mark.parametrize("name, shape", [SHAPES[2], SHAPES[0]])
def test_what_is_warm_is_called_many_times(name, shape):
    """However long the first call took, which may compile; what is cold is called once."""
    calls, given = [], operands(name, shape)

    def slow_at_first():
        if not calls:
            time.sleep(2 * operators.WARM_SECONDS)
        calls.append(1)
        return given.expected

    turn = operators.cpu_turn(given, slow_at_first)
    turn(0)
    before = len(calls)
    turn(1)
    assert (len(calls) == before + 1) == (name == "maximum")


# What is shown


def some_rows(workload: str = "work") -> list[Result]:
    rows = measured(
        Rung("pure Python", steady(16.0), "from 25%", covered=0.25),
        Rung("njit", steady(0.002), note="1 thread", compiles=True, intensity=0.5),
        Rung("NumPy", reject),
        Rung("torchpar GPU", steady(2e-6), device=torch.device("cuda")),
        unit="GFLOP/s",
    )
    return [replace(row, case={"workload": workload}) for row in rows]


def test_the_readmes_table():
    assert show.table(some_rows()).splitlines()[:5] == [
        "| work | time | × pure Python | × rung before |",
        "|---|---|---|---|",
        "| pure Python, from 25% | 16 s | 1 |  |",
        "| njit, 1 thread | 2 ms | 8,000 | 8,000 |",
        "| NumPy |  |  |  |",
    ]


@pytest.mark.parametrize("failed", [False, True])
def test_pictures(tmp_path, failed):
    """A workload of which nothing could be measured leaves the others their picture."""
    rows = some_rows()
    if failed:
        rows = [replace(row, p50_ms=None, found={"note": ""}, ok=False) for row in rows]
    show.bars([rows, some_rows("other work")], tmp_path / "bars.png", "a machine")
    show.intensity(rows, tmp_path / "intensity.png", "a machine", {"memory": 1e10}, 1e11)
    for name in ("bars", "intensity"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(PNG)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True])
def test_the_ladder_runs(tmp_path, capsys, monkeypatch, whole):
    """Unless it is to be ``whole``, loops are not compiled, and parallel ones left out."""
    pytest.importorskip("matplotlib", reason="an extra")
    fork_context()
    if not whole:
        loops = {loop.__name__: loop for loop in numba_njit.LOOPS}
        monkeypatch.setattr(numba_njit, "SERIAL", SimpleNamespace(**loops))
        monkeypatch.setattr(ladder, "THREADS", ())
    assert ladder.main(["--quick", f"--output={tmp_path}"]) == 0
    names = {"ladder.csv", "ladder.md", "ladder.png", "intensity.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    with (tmp_path / "ladder.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["cores"] for row in rows} == {str(CORES)}
    found: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows:
        assert (row["ok"], row["reason"]) == ("True", ""), row
        assert float(row["p50_ms"]) > 0
        found.setdefault(row["workload"], {})[f"{row['contestant']} {row['note']}".strip()] = row
    assert list(found) == [
        "maximum of 20×30 int32",
        "X·Xᵀ of 33×17 float32",
        "linear+sigmoid of 7×33→5 float32",
    ]
    for rungs in found.values():
        names = {"pure Python", "njit", "NumPy", "torch eager", "torchpar CPU"}
        names |= {"njit, parallel 1 thread"} if whole else set()
        assert {name.partition(" from")[0] for name in rungs} >= names
        assert any(name.startswith("2 ranks") for name in rungs)
    out = capsys.readouterr().out
    assert ("not measured: njit with 8 threads" in out) is (CORES < 8 and whole)
    assert all(f"{workload}\n" in out for workload in found)
    assert (tmp_path / "ladder.md").read_text().count("× rung before") == len(found)
