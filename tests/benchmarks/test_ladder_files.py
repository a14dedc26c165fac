# SPDX-License-Identifier: MIT
"""A student's files in the ladder: several of them, compilation, a GPU's functions, and ratios."""

import csv
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from commands import ROOT, forget_modules, run

pytest.importorskip("rich", reason="rich prints the tables")
from benchmarks.flags import called
from benchmarks.ladder import command, emulated, homework, page, rungs, student
from benchmarks.ladder.cases import LADDERS, make_case
from benchmarks.results import CORES, Result
from benchmarks.timing import Rejected
from torchpar.errors import ConfigError
from torchpar.parallel.launch import guard

# Columns of the CSV
COLUMNS = ("contestant", "p20_ms", "p50_ms", "p80_ms", "samples", "ok", "torch", "device", "date")
LADDER = (
    *("workload", "note", "threads", "left_out", "over_pure_python", "than", "faster", "switches"),
    *("intensity", "load_before"),
)

FIRST = """
with open(__file__ + ".log", "a") as file:
    file.write("run ")

def max_cpu(A, B):
    return [[max(a, b) for a, b in zip(*rows)] for rows in zip(A.tolist(), B.tolist())]
"""
WRONG = """
def maximum(A, B):
    return A
"""
SECOND = """
from first_of_two import max_cpu
from torchpar import linear_sigmoid

def matmul_transpose_numba(X):
    return X @ X.T
"""


@pytest.fixture(autouse=True)
def threads_of_numba(monkeypatch):
    """Numba starts its threads once in a process, and refuses another number of them later."""
    monkeypatch.setenv("NUMBA_NUM_THREADS", str(CORES))


@pytest.fixture(autouse=True)
def forgotten_modules(tmp_path):
    """Modules of a test's files are no others' afterwards."""
    yield
    forget_modules(tmp_path)


def test_two_files_work_together_and_one_that_imports_is_followed(tmp_path):
    (tmp_path / "first_of_two.py").write_text(FIRST)
    (tmp_path / "second_of_two.py").write_text(SECOND)
    paths = [tmp_path / f"{name}.py" for name in ("first_of_two", "second_of_two")]
    with patch.dict(os.environ):
        files, status = rungs.load_files(paths)
        assert [set(one.functions) for _, one in files] == [
            {"max_cpu"},
            {"matmul_transpose_numba"},
        ]
    assert status == 0
    assert (tmp_path / "first_of_two.py.log").read_text() == "run "


def test_a_file_with_the_name_of_a_library_is_executed_once(tmp_path):
    (tmp_path / "wave.py").write_text(FIRST)  # of the standard library
    (tmp_path / "second_of_two.py").write_text(SECOND.replace("first_of_two", "wave"))
    before = sys.modules.get("wave")
    with patch.dict(os.environ):
        files, _ = rungs.load_files([tmp_path / "wave.py", tmp_path / "second_of_two.py"])
    assert [len(one.functions) for _, one in files] == [1, 1]
    assert (tmp_path / "wave.py.log").read_text() == "run "
    assert sys.modules.get("wave") is before


def test_a_file_alone_has_the_functions_that_it_imports_from_one_beside_it(tmp_path, capsys):
    (tmp_path / "first_of_two.py").write_text(FIRST)
    (tmp_path / "second_of_two.py").write_text(SECOND)
    path = tmp_path / "second_of_two.py"
    with patch.dict(os.environ):
        ((_, one),), _ = rungs.load_files([path])
        cases = {"maximum": make_case("maximum", (3, 5))}
        (row,) = rungs.students_entries(path, one.functions, cases)["maximum"]
    assert set(one.functions) == {"max_cpu", "matmul_transpose_numba"}  # not torchpar's
    assert row.name == "first_of_two.py: max_cpu"
    assert capsys.readouterr().out.startswith("first_of_two.py: max_cpu is right (first call ")


# Compilation


def entry(name: str, function: Any, shape: tuple[int, ...]) -> student.Entry:
    case = make_case(student.OPERATORS[name][0], shape)
    return student.Entry("my.py", name, function, case, case)


@pytest.mark.parametrize("compiles", [True, False])
def test_compilation_is_outside_of_times_and_limits(compiles):
    pytest.importorskip("numba", reason="Numba tells of its compilations")
    from numba.core import event

    def slow(x: Any) -> Any:
        with event.trigger_event("numba:compile") if compiles else nullcontext():
            time.sleep(0.15)
        return x @ x.T

    one = entry("matmul_t", slow, (5, 7))
    with patch.object(student, "LIMIT", 0.1):
        if compiles:
            assert one.call() < 0.1
            assert one.compiled > 0.14
        else:
            with pytest.raises(guard.TooSlow):
                one.call()


def test_a_function_is_compiled_before_its_first_call_is_timed():
    sizes: list[int] = []

    def function(x: Any) -> Any:
        sizes.append(len(x))
        return x @ x.T

    entry("matmul_t", function, (40, 40)).begin()
    assert sizes == [student.SMALL, 40]


# Cores


def test_a_row_for_each_number_of_cores():
    """No number of cores is measured twice."""
    one = entry("max_numba", np.maximum, (3, 5))
    with patch.object(rungs, "CORES", 2):
        rows = list(rungs.entry_rungs(one, "njit"))
        loops = list(rungs.entry_rungs(entry("max_cpu", np.maximum, (3, 5)), "pure Python"))
    notes = ["1 core", "all 2 cores", "4 threads on 2 cores", "8 threads on 2 cores"]
    assert [row.note for row in rows] == notes
    assert [row.than for row in rows[:3]] == [
        "njit",
        "my.py: max_numba, 1 core",
        "my.py: max_numba, all 2 cores",
    ]
    assert all(row.turn and not row.left_out for row in rows)
    assert len(loops) == 1
    with patch.object(rungs, "CORES", 6):
        notes = [row.note for row in rungs.entry_rungs(one, "njit")]
    assert notes == ["1 core", "2 cores", "4 cores", "all 6 cores", "8 threads on 6 cores"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux has it")
def test_a_function_has_the_cores_of_its_row_and_others_have_all():
    before, seen = os.sched_getaffinity(0), set[int]()

    def function(a: Any, b: Any) -> Any:
        seen.update(os.sched_getaffinity(0))
        return np.maximum(a, b)

    one = entry("max_numba", function, (3, 5))
    one.cores = 1
    one.turn(0)
    assert seen == {min(before)}
    assert os.sched_getaffinity(0) == before


def test_more_threads_than_cores_share_them_and_pytorch_keeps_its_own():
    numba = pytest.importorskip("numba", reason="it has the threads")
    before, seen = torch.get_num_threads(), list[int]()

    def function(a: Any, b: Any) -> Any:
        seen.append(numba.get_num_threads())
        torch.set_num_threads(before + 1)  # as the start of Numba's threads does
        return np.maximum(a, b)

    one = entry("max_numba", function, (3, 5))
    most = numba.config.NUMBA_NUM_THREADS
    for one.cores in (1, most, most + 1):
        one.turn(0)
    assert seen == [1, most, most]
    assert torch.get_num_threads() == before


# Mistakes


def test_a_mistake_of_a_function_with_rows_by_cores_is_said_once():
    wrong = [row("b.py: max_numba", None, note) for note in ("", "1 core", "2 cores")]
    wrong = [replace(one, ok=False, reason="Rejected: it returns None") for one in wrong]
    wrong[2] = replace(wrong[2], reason="SlowCall: it takes more than 10 s")
    for one in wrong:
        one.columns["left_out"] = ""
    assert list(page.notes(wrong)) == [
        "Not right: b.py: max_numba: it returns None",
        "Too slow: b.py: max_numba, 2 cores: it takes more than 10 s",
    ]


def test_what_has_ended_the_ladder_or_never_returned_is_not_called_again(tmp_path, capsys):
    path = tmp_path / "first_of_two.py"
    path.write_text(FIRST)
    given_up = {
        (str(path), guard.TOP): guard.GivenUp("ends the process by SIGKILL", False),
        ("my.py", "max_numba"): guard.GivenUp("does not end within 60 s", True),
        ("my.py", "max_gpu"): guard.GivenUp("ends the process by SIGKILL", False),
    }
    how = "ends the process by SIGKILL"
    with patch.dict(guard.WATCHED.given_up, given_up):
        with pytest.raises(ConfigError) as raised:
            student.load(path)
        with pytest.raises(student.SlowCall, match=r"^it does not end within 60 s$"):
            entry("max_numba", np.maximum, (3, 5)).turn(0)
        with pytest.raises(Rejected, match=f"^it {how}$"):
            emulated.execute(entry("max_gpu", np.maximum, (300, 300)))
    advice = 'put that behind if __name__ == "__main__"'
    assert str(raised.value) == f"--with {path}: its top level {how}; {advice}"
    assert not path.with_suffix(".py.log").exists()
    assert capsys.readouterr().out == ""  # not that the whole size is tried


# A GPU's functions

TRITON = """
import torch, triton, triton.language as tl

@triton.jit
def kernel(a, b, c, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = i < n
    tl.store(c + i, tl.maximum(tl.load(a + i, here), tl.load(b + i, here)), MASK)

def max_gpu(A, B):
    a, b = torch.from_numpy(A).cuda(), torch.from_numpy(B).cuda()
    c = torch.empty_like(a)
    kernel[(1,)](a, b, c, a.numel(), BLOCK=64)
    return c.cpu().numpy()
"""


def triton_row(folder: Path, mask: str) -> rungs.Rung:
    path = folder / "tri.py"
    path.write_text(TRITON.replace("MASK", mask))
    functions, error = student.load(path)
    assert error == ""
    case = make_case("maximum", (3, 5))
    return rungs.student_without_gpu(path, "max_gpu", functions["max_gpu"], case)


def test_a_triton_file_is_executed_with_counters_and_a_bound(tmp_path, capsys):
    pytest.importorskip("triton", reason="the file has a kernel in Triton")
    row = triton_row(tmp_path, "here")
    assert "tri.py: max_gpu is right in nogpu at 3×5, at least " in capsys.readouterr().out
    # In each matrix 15 numbers of 4 bytes lie in two sectors of 32 bytes, or in three.
    distinct = row.executed.rpartition(" of them distinct")[0].rpartition(" ")[2]
    assert 6 <= int(distinct) <= 9
    (result,) = rungs.measure(make_case("maximum", (3, 5)), [row], rounds=1)
    assert result.columns["least_us"] == row.least_us > 0
    (cells,) = page.lines([result], "contestant")
    assert cells["time"].startswith("at least ")
    note, remark = page.notes([result])
    assert remark.startswith("Note on tri.py: max_gpu: it launches 1 block at 3×5, and the assign")
    assert note.startswith("Without a GPU: tri.py: max_gpu is right in nogpu at 3×5, ")


@pytest.mark.slow
def test_a_fault_of_a_triton_file_is_its_verdict(tmp_path):
    pytest.importorskip("triton", reason="the file has a kernel in Triton")
    row = triton_row(tmp_path, "i < n + 1")
    with pytest.raises(Rejected, match=r"^tri.py, line 8: out of bounds: "):
        row.turn(0)


def test_sizes_grow_while_the_next_takes_seconds_and_a_whole_one_is_tried_after_a_failure(capsys):
    sizes: list[tuple[int, ...]] = []

    def execute_once(one: student.Entry, records: bool = False) -> tuple[emulated.Executed, float]:
        sizes.append(one.tried.shape)
        if one.tried.shape <= (32, 32) and fails:
            raise error("it is for 1000×1000")
        seen = "no race" if records and by_numba else ""
        return emulated.Executed(one.tried, "right", races=seen), seconds

    def of(one: student.Entry) -> list[tuple[int, ...]]:
        sizes.clear()
        emulated.execute(one)
        return list(sizes)

    with patch.object(emulated, "execute_once", execute_once):
        one = entry("max_gpu", np.maximum, (300, 300))
        fails, seconds, by_numba, error = False, 0.1, False, Rejected
        assert of(one) == [(32, 32), (128, 128), (300, 300)]
        seconds = 2.0  # 16 times as many numbers would take 32 s
        assert of(one) == [(32, 32)]
        fails = True
        assert capsys.readouterr().out == ""
        assert of(one) == [(32, 32), (300, 300)]
        line = f"{Path(one.file).name}: max_gpu fails at 32×32; 300×300 is tried, for at most 90 s"
        assert capsys.readouterr().out == f"{line}\n"
        with pytest.raises(Rejected, match="it is for 1000"):  # there is no larger one
            of(entry("max_gpu", np.maximum, (3, 5)))
        assert (sizes, capsys.readouterr().out) == ([(3, 5)], "")
        error = emulated.Raced  # which a larger size does not cure
        with pytest.raises(emulated.Raced):
            of(one)
        assert (sizes, capsys.readouterr().out) == ([(32, 32)], "")
        fails, seconds, by_numba = False, 0.1, True  # races are recorded once, and nobody times it
        assert of(one) == [(32, 32), (32, 32), (128, 128), (300, 300)]
        assert emulated.execute(one).races == "no race"


def test_threads_that_need_others_are_told_by_the_names_in_a_kernel():
    def waiting(cuda: Any) -> None:
        cuda.syncthreads()

    def alone(cuda: Any) -> None:
        cuda.grid(1)

    assert emulated.waits(waiting, type(None))
    assert not emulated.waits(alone, int)


def test_the_time_of_kernels_has_no_copies():
    def event(name: str, device: Any, microseconds: float) -> Any:
        time_range = SimpleNamespace(elapsed_us=lambda: microseconds)
        return SimpleNamespace(name=name, device_type=device, time_range=time_range)

    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [event("kernel", cuda, 3.0), event("Memcpy HtoD (Pageable -> Device)", cuda, 900.0)]
    events += [event("aten::max", cpu, 50.0), event("another", cuda, 4.0)]
    record = nullcontext(SimpleNamespace(events=lambda: events))
    with patch.object(student, "profile", lambda activities: record):
        one = entry("max_gpu", np.maximum, (3, 5))
        assert one.turn_of_kernels(1) == [pytest.approx(7e-6)]
        events = events[1:3]
        with pytest.raises(Rejected, match="no kernel ran on the GPU"):
            one.turn_of_kernels(1)


NUMBA_CUDA = """
import numpy as np
from numba import cuda

@cuda.jit
def rows(A, B, C):
    i, j = cuda.blockIdx.x, cuda.threadIdx.x
    if i < A.shape[0] and j < A.shape[1]:
        C[i, j] = max(A[i, j], B[i, j])

def max_gpu(A, B):
    C = np.zeros_like(A)
    rows[1000, 1000](A, B, C)
    return C

@cuda.jit
def one_block(X, C):
    tile = cuda.shared.array(4, np.float32)
    cuda.syncthreads()
    for p in range(cuda.threadIdx.x, C.size, 64):
        i, j = p // C.shape[1], p % C.shape[1]
        total = 0.0
        for m in range(X.shape[1]):
            total += X[i, m] * X[j, m]
        C[i, j] = total + 1

def matmul_transpose_gpu(X):
    C = cuda.device_array((len(X), len(X)), np.float32)
    one_block[1, 64](cuda.to_device(X), C)
    return C.copy_to_host()
"""


@pytest.mark.slow
def test_the_command_works_from_a_students_folder_with_files_for_the_cpu_and_numbas_gpu(tmp_path):
    """It times the students' functions beside ours, in all cases."""
    pytest.importorskip("numba", reason="a file has kernels for Numba")
    pytest.importorskip("matplotlib", reason="matplotlib draws the pictures")
    (tmp_path / "kernels.py").write_text(NUMBA_CUDA.replace("1000, 1000", "30, 30"))
    (tmp_path / "loops.py").write_text(f"from kernels import *\n{FIRST}{WRONG}")
    command = [sys.executable, "-m", "torchpar", "ladder", "--quick", "--with"]
    command += ["kernels.py", "loops.py", "--output=out", "--cases", *LADDERS]
    status, out, err = run(*command, cwd=tmp_path)
    assert status == 1, err
    assert (tmp_path / "loops.py.log").read_text() == "run "  # no process executes it again
    told = "which tells no time; no race of threads was seen at 20×30"
    assert f"kernels.py: max_gpu is right in Numba's simulator at 20×30, {told}" in out
    assert "kernels.py: matmul_transpose_gpu is not right at 33×17: result[0, 0] is " in out
    assert "loops.py: max_cpu is right (first call " in out
    assert "loops.py: maximum is not right at 20×30: result[0, " in out
    assert out.count("Without a GPU: ") == 1
    rows = list(csv.DictReader((tmp_path / "out" / "ladder.csv").read_text().splitlines()))
    own = {row["contestant"]: row for row in rows if ".py: " in row["contestant"]}
    assert own["loops.py: max_cpu"]["than"] == "pure Python"
    assert float(own["loops.py: max_cpu"]["faster"]) > 0
    labels = {make_case(name, LADDERS[name].quick).label for name in LADDERS}
    assert {row["workload"] for row in rows} == {*labels, page.LIMITS}
    wrong = {row["contestant"] for row in rows if row["ok"] == "False"}
    assert wrong == {"loops.py: maximum", "kernels.py: matmul_transpose_gpu"}
    assert all((row["ok"], row["reason"]) == ("True", "") for row in rows if row["ok"] != "False")
    for column in (*COLUMNS, *LADDER):
        assert any(row[column] for row in rows), f"nothing in {column}"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("ladder.csv", "ladder.md", *(f"ladder-{case}.png" for case in LADDERS)),
    }


# Ratios


def row(contestant: str, ms: float | None, note: str = "", **columns: Any) -> Result:
    label = LADDERS["maximum"].label.format(1000, 1000)
    return Result(
        case={"workload": label},
        contestant=contestant,
        p50_ms=ms,
        columns={"note": note, **columns},
    )


def test_the_ratios_of_a_report_are_those_of_the_students_functions():
    case = make_case("maximum", (20, 30))
    slow = {"than": "pure Python", "faster": 0.1}
    rows = [
        row("pure Python", 25.0),
        row("a.py: max_cpu", 250.0, **slow),
        row("b.py: max_numba", 2.0, "1 core"),
        row("b.py: max_numba", 1.0, "all 2 cores"),
        row("b.py: max_numba", 4.0, "4 threads on 2 cores"),
        row("b.py: max_numba", 4.0, "8 threads on 2 cores"),
        row("c.py: max_gpu", 10.0),
        row("c.py: max_gpu", 0.01, "without copies"),
    ]
    loops = (
        "over lists. If yours read A[i, j] of an array, each makes a new object, and a list has it "
        "already"
    )
    assert [line.partition(": loops")[0] for line in homework.lines(case, rows)] == [
        "max_gpu: 0.1 times as fast as max_numba.",
        "max_gpu, without copies: 100 times as fast as max_numba.",
        "max_gpu: 25 times as fast as max_cpu, less than 40.",
        "max_gpu, without copies: 25,000 times as fast as max_cpu, at least 40.",
        "max_numba: 250 times as fast as max_cpu.",
        "max_numba: on all 2 cores 2 times as fast as on 1 core.",
        "max_numba: 4 and 8 threads on 2 cores share them: a core computes for one thread at a "
        "time, so that they add no arithmetic, and each switch between threads costs some "
        "microseconds.",
        "max_cpu takes one core, however many there are: it is one thread of Python.",
        f"max_cpu is 0.1 times as fast as pure Python, whose loops are {loops}",
    ]


def test_ratios_of_a_quick_run_are_no_results():
    case, rows = make_case("maximum", (20, 30)), [row("a.py: max_cpu", 250.0)]
    first, *others = homework.lines(case, rows, is_quick=True)
    assert first == homework.QUICK
    assert others == list(homework.lines(case, rows))
    assert not list(homework.lines(case, [row("a.py: max_gpu", None)], is_quick=True))


def test_more_cores_that_gain_nothing_have_advice():
    rows = [row("b.py: max_numba", 1.0, "1 core"), row("b.py: max_numba", 1.0, "all 2 cores")]
    (line,) = homework.on_cores(rows)
    assert ". Only loops over prange, by njit(parallel=True), take several; the memory" in line


def test_each_file_has_its_own_gain_and_the_first_row_is_that_of_one_core():
    rows = [row("a.py: max_numba", 4.0, "1 core"), row("a.py: max_numba", 2.0, "all 4 cores")]
    rows += [row("b.py: max_numba", 8.0, "2 cores"), row("b.py: max_numba", 2.0, "all 4 cores")]
    rows += [row("b.py: max_numba", 2.0, f"{n} threads on 1 core") for n in (2, 4, 8)]
    first, second = homework.on_cores(rows)
    assert first == "max_numba: on all 4 cores 2 times as fast as on 1 core."
    assert second.startswith("max_numba: 2, 4 and 8 threads on 1 core share them: ")


def test_a_ratio_of_times_that_spread_by_more_than_2_is_called_rough():
    loops = row("a.py: max_cpu", 250.0)
    steady, wide = (
        replace(row("b.py: max_numba", 1.0, "all 2 cores"), p20_ms=low, p80_ms=1.8)
        for low in (0.9, 0.4)
    )
    assert list(homework.ratios([steady], [loops])) == ["max_numba: 250 times as fast as max_cpu."]
    rough = "This is rough: max_numba, all 2 cores took 0.4–1.8 ms (p20–p80)."
    assert list(homework.ratios([wide], [loops])) == [
        f"max_numba: 250 times as fast as max_cpu. {rough}"
    ]
    assert rough in homework.gain(row("b.py: max_numba", 2.0, "1 core"), wide)


def test_a_product_by_numba_that_adds_in_order_has_the_reason():
    """The options are those of the ladder's loops."""
    case = make_case("matmul_t", (20, 30))
    name, slow = "b.py: matmul_transpose_numba", {"than": "njit", "faster": 0.09}
    rows = [row(name, 455.0, "1 core", **slow), row(name, 233.0, "all 2 cores")]
    (line,) = (one for one in homework.lines(case, rows) if "njit" in one)
    assert line.startswith("matmul_transpose_numba, 1 core: 0.09 times as fast as njit, which ")
    assert line.endswith(" If yours has no fastmath, it adds one at a time.")
    assert not list(homework.adds_in_order([row(name, 41.0, "1 core", than="njit", faster=0.97)]))
    numba_njit = pytest.importorskip("torchpar.baselines.numba_njit", reason="it needs Numba")
    assert all(f"'{option}'" in line for option in numba_njit.FASTMATH)
    maximum = make_case("maximum", (20, 30))  # which has no sums
    assert not list(homework.lines(maximum, [row("b.py: max_numba", 4.0, "1 core", **slow)]))


def test_a_function_executed_without_a_gpu_has_a_bound_and_no_ratio():
    executed = {"executed": "right in nogpu at 20×30", "left_out": "no GPU"}
    loops = row("c.py: max_cpu", 250.0)
    unknown = "no GPU, so no time, and whether it is at least 40 is unknown"
    assert list(homework.without_time([row("c.py: max_gpu", None, **executed)], [loops])) == [
        f"max_gpu over max_cpu: {unknown}."
    ]
    bounded = row("c.py: max_gpu", None, **executed, least_us=3.58)
    assert list(homework.without_time([bounded], [])) == [
        f"max_gpu: {unknown}; at least 3.58 µs is a bound on an H100, not a time."
    ]


def test_without_a_gpu_the_times_of_an_h200_stand_beside():
    whole = SimpleNamespace(
        operator="maximum",
        label="maximum of 1000×1000 int32",
        arguments=(np.zeros((1000, 1000), np.int32),) * 2,
        expected=np.zeros((1000, 1000)),
    )
    lines = list(homework.lines(whole, [row("a.py: max_cpu", 250.0)]))
    assert lines[1:] == [
        "Measured on an H200: torchpar GPU 7.15 µs, 9,511 times as fast as pure Python on its "
        "host, at least 40; with copies 2.38 ms, 28.5 times, less than 40.",
        "Copies take 99.7% of that: 12 MB pass from the computer's memory to the GPU and back at "
        "5 GB/s. Keep arrays on the GPU between operators.",
    ]
    measured = [row("a.py: max_gpu", 1.0)]
    assert list(homework.lines(whole, measured)) == []


# The command


def test_the_command_runs_the_benchmark_and_names_itself(tmp_path, monkeypatch):
    """The ladder's process finds torchpar, also if Python finds it by the current folder alone."""
    monkeypatch.setenv("PYTHONPATH", "there")
    assert called("run ladder") == "python -m benchmarks run ladder"
    for folder, path in ((tmp_path, "there"), (ROOT, f"{ROOT}{os.pathsep}there")):
        monkeypatch.chdir(folder)
        with (
            patch.dict(os.environ),
            patch.object(command, "INSTALLED", ROOT),
            patch.object(os, "execve", side_effect=SystemExit) as replaced,
            pytest.raises(SystemExit),
        ):
            command.main(["--with", "my.py"])
        python, words, environment = replaced.call_args.args
        assert words == [python, "-m", "benchmarks.ladder.rungs", "--with", "my.py"]
        assert (environment["PYTHONPATH"], environment["PYTHONSAFEPATH"]) == (path, "1")
        with patch.dict(os.environ, environment):
            assert called("run ladder") == "python -m torchpar ladder"
