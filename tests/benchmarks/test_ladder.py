# SPDX-License-Identifier: MIT
"""The ladder's rows, a course's first kernels, and the functions of a student's file."""

import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from itertools import cycle
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from commands import forget_modules

pytest.importorskip("rich", reason="rich prints the tables")
from benchmarks import results
from benchmarks.ladder import emulated, page, rungs, student
from benchmarks.ladder.cases import LADDERS, make_case
from benchmarks.results import CORES, Result
from benchmarks.timing import Rejected
from torchpar.baselines import numpy_mlp, pure_python
from torchpar.errors import ConfigError
from torchpar.parallel.launch.guard import TooSlow

# Rows


def helpers(interpreter: Callable[..., Any]) -> Any:
    """Stand-ins for the processes beside the ladder, of which only the interpreter computes."""

    def submit(function: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(interpreter(function, *args))
        return future

    return SimpleNamespace(ranks=None, threads=None, interpreter=SimpleNamespace(submit=submit))


@pytest.mark.parametrize("operator", LADDERS)
def test_each_row_is_compared_with_a_row_above_and_what_is_left_out_has_a_reason(
    operator, interpreter
):
    pytest.importorskip("numba", reason="Numba compiles the loops")
    shapes = {"maximum": (5, 7), "matmul_t": (5, 7), "matmul": (5, 7, 3)}  # larger ones are below
    small = {name: LADDERS[name]._replace(interpreted=shape) for name, shape in shapes.items()}
    with (
        patch.object(rungs, "CORES", 2),
        patch.object(torch.cuda, "is_available", lambda: False),
        patch.dict(LADDERS, small),
    ):
        rows = list(
            rungs.rungs(make_case(operator, LADDERS[operator].quick), helpers(interpreter), False)
        )
    names: set[str] = set()
    for one in rows:
        label = f"{one.name}, {one.note}" if one.note else one.name
        assert label not in names
        assert one.than in names or one.name == "pure Python" or one.left_out or not one.whole, (
            label
        )
        assert (one.turn is None) == bool(one.left_out)
        names |= {one.name, label} if one.turn else set()
    reasons = {f"{one.name}, {one.note}".rstrip(", "): one.left_out for one in rows if one.left_out}
    assert {f"njit, parallel, {count} threads on 2 cores" for count in (4, 8)} <= names
    assert reasons["torch eager GPU"] == "no GPU"
    taught = [reason for name, reason in reasons.items() if name.startswith("Triton")]
    assert len(taught) == len(LADDERS[operator].taught)
    assert all("right in Triton's interpreter at" in reason for reason in taught)


def test_threads_are_those_of_the_course_also_above_the_cores():
    assert rungs.thread_counts(quick=False) == [1, 2, 4, 8]
    assert rungs.thread_counts(quick=True) == [1]
    with patch.object(rungs, "CORES", 2):
        assert [rungs.threads_note(count) for count in (2, 4)] == [
            "2 threads",
            "4 threads on 2 cores",
        ]


def test_without_numba_the_other_rows_are_there(interpreter):
    with patch.object(rungs, "find_spec", lambda name: None):
        rows = list(rungs.by_njit(make_case("matmul", (5, 7, 3)), helpers(interpreter), False))
    assert [one.left_out for one in rows] == ["numba is not installed; pip install numba"] * 3


def test_a_wrong_kernel_of_the_course_is_a_row_that_is_not_right():
    pytest.importorskip("triton", reason="the course's kernels are written in Triton")
    name, launcher = next(iter(LADDERS["maximum"].taught.items()))

    def wrong(*_: Any) -> Any:
        return 1 + numpy_mlp.maximum(
            *make_case("maximum", LADDERS["maximum"].interpreted).arguments
        )

    def failing(*_: Any) -> Any:
        raise ValueError("no such kernel\nand more")

    reasons = {
        wrong: r"Rejected: Rejected in Triton's interpreter, 20×30: result\[0, 0\] is \d+, "
        r"expected \d+; 600",
        failing: "Rejected: ValueError in Triton's interpreter, 20×30: no such kernel$",
    }
    case = make_case("maximum", LADDERS["maximum"].quick)
    for function, reason in reasons.items():
        stand_in = helpers(lambda _, *args, function=function: function(*args)).interpreter
        row = rungs.without_gpu(stand_in, "maximum", name, launcher)
        (result,) = rungs.measure(case, [row], rounds=1)
        assert (result.ok, result.columns["left_out"]) == (False, "")
        assert re.match(reason, result.reason), result.reason


def test_halves_left_apart_have_no_speed_up():
    """Nobody has the whole result."""
    case = make_case("maximum", LADDERS["maximum"].quick)
    one, apart, joined = (
        replace(rung, turn=lambda index: [1.0]) for rung in rungs.by_ranks(case, None)
    )
    alone = replace(one, name="pure Python")
    results = rungs.measure(case, [alone, one, apart, joined], rounds=1)
    compared = [(x.columns["over_pure_python"], x.columns["faster"]) for x in results[1:]]
    assert compared == [(1.0, None), (None, None), (1.0, 1.0)]
    assert page.label(results[2]) == "2 ranks, halves left apart, no speed-up of the whole"


def test_limits_are_medians():
    """So that the speed of a row is that of its time."""
    seconds = cycle([1.0, *(2.0, 4.0, 8.0) * 3])  # one chooses how many calls, and nine are kept
    timed = SimpleNamespace(seconds=lambda: next(seconds))
    with patch.object(rungs, "time_calls", lambda *_, **options: timed):
        copy, *_ = rungs.limits(quick=True)
    assert (copy.contestant, copy.p50_ms) == ("copy in memory", 4000.0)
    assert copy.columns["gb_per_s"] == pytest.approx(2 * 2**20 / 4e9)


def test_integers_are_from_0_to_255():
    a, b = make_case("maximum", (200, 300)).arguments
    assert set(np.unique(a)) == set(np.unique(b)) == set(range(256))


def result(name: str, ms: float | None, **columns: Any) -> Result:
    own = {
        "note": "",
        "threads": 1.0,
        "cores": 2,
        "load_before": 1.5,
        "over_pure_python": 8 / ms if ms else None,
    }
    return Result(
        case={"workload": "X"},
        contestant=name,
        p20_ms=ms,
        p50_ms=ms,
        p80_ms=ms and 3 * ms,
        columns=own | columns,
    )


def test_tables_name_the_other_row_the_spread_the_load_and_what_is_left_out():
    threads = {
        "note": "4 threads on 2 cores",
        "threads": 4.0,
        "faster": 0.5,
        "than": "njit, parallel, 2 threads",
    }
    rows = [
        result("pure Python", 8.0),
        result("njit, parallel", 0.5, note="1 thread"),
        result("njit, parallel", 0.25, note="2 threads", threads=2.0),
        result("njit, parallel", 0.5, **threads),
        result("torchpar GPU", None, left_out="no GPU", threads=None),
    ]
    text = page.as_markdown(rows)
    cells = [
        "njit, parallel, 4 threads on 2 cores",
        "500 µs",
        "0.5–1.5 ms",
        "16",
        "0.5 × njit, parallel, 2 threads",
    ]
    assert f"| {' | '.join(cells)} |" in text
    assert "\nLeft out (no GPU): torchpar GPU.\n" in text
    assert "was 1.50: other programs disturb the times" in page.load_note(rows)
    assert "quiet" in page.load_note([result("njit", 1.0, load_before=0.2)])
    summary = page.summary({"X": rows}, ["X"])
    assert summary.splitlines()[2:] == [
        "| pure Python | 8 ms | 1 |",
        "| njit, the loops in 2 threads | 250 µs | 32 |",
    ]


@pytest.mark.parametrize(
    "width, widest, spared",
    [
        (170, 170, ""),
        (100, 100, ""),
        (80, 80, "switches, GB/s"),
        (60, 80, "switches, GB/s"),
    ],
)
def test_a_narrow_terminal_has_the_names_and_numbers_of_a_table_whole(
    capsys, width, widest, spared
):
    columns = {"over_pure_python": 1234.5, "gb_per_s": 0.0476, "switches": 12.0}
    rows = [
        result("pure Python", 0.05, **columns),
        result("my.py: matmul_transpose_numba", 0.05, faster=0.284, than="njit", **columns),
        result("2 ranks, halves left apart, no speed-up of the whole", 0.05, **columns),
    ]
    with patch.object(results, "WIDTH", width):
        results.print_cells("X", list(page.lines(rows, "contestant")), page.SPARE[:2])
    out = capsys.readouterr().out
    words = [
        "contestant",
        "matmul_transpose_numba",
        "no speed-up",
        "50 µs",
        "1,234",
        "0.284 × njit",
    ]
    assert [one for one in words if f" {one} " not in out] == []
    assert max(map(len, out.splitlines())) <= widest
    assert ("0.0476" in out) == ("GB/s" not in spared)
    (*_, last) = out.splitlines()
    assert last.startswith(f"Columns left out: {spared}; a terminal 9") == bool(spared)


def test_a_narrow_terminal_has_no_samples_and_spread_and_the_other_numbers_whole(capsys):
    times = {f"p{share}_ms": 0.05 + share / 1e3 for share in (20, 50, 80)}
    further = {"gb_per_s": 1.34, "gflop_per_s": 0.163, "over eager": 0.107, "max_error": 1e-6}
    row = Result(case={"mode": "forward, warm"}, contestant="eager, mirrored", samples=2, **times)
    other = replace(row, case={"mode": "backward"}, speedup=11.37)
    with patch.object(results, "WIDTH", 80):
        results.print_results("X", [row.plus(**further), other.plus(**further)])
    out = capsys.readouterr().out
    for word in ("forward, warm", "eager, mirrored", "100 µs", "11.37", "0.107", "1.0e-06", "yes"):
        assert f" {word} " in out
    assert max(map(len, out.splitlines()[:-1])) <= 80
    assert "\nColumns left out: samples, GFLOP/s, GB/s, p20" in out


def test_the_legend_of_a_picture_leaves_the_title_free(tmp_path):
    """The case has a long name, and all kinds of rows."""
    pytest.importorskip("matplotlib", reason="it draws the pictures")
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    product = {"intensity": 1.0, "gflop_per_s": 2.0}
    rows = [result("njit", 1.0, threads=count, **product) for count in (1, 2, 4, 8, None)]
    rows.append(result("my.py: matmul", 1.0, threads=None))
    name = "linear+sigmoid of 64×784→128 float32"
    for one in rows:
        one.case["workload"] = name
    with patch.object(Figure, "savefig", autospec=True, side_effect=Figure.savefig) as save:
        page.draw(tmp_path / "picture.png", rows, rows[:1])
    figure = save.call_args.args[0]
    top = figure.axes[0]
    (title,) = top.findobj(lambda one: isinstance(one, Text) and one.get_text() == name)
    (legend,) = figure.legends or [top.get_legend()]
    frame = legend.get_window_extent()
    assert len(legend.get_texts()) == 6
    assert not frame.overlaps(title.get_window_extent())
    assert figure.bbox.x0 <= frame.x0
    assert frame.y1 <= figure.bbox.y1


# A course's first kernels


def check_taught_kernels() -> None:
    from torchpar.baselines import triton_kernels

    shapes = {
        "maximum": [(1, 1), (3, 129), (5, 64)],
        "matmul_t": [(1, 1), (5, 7), (33, 5)],
        # Whole tiles, and some above them in each dimension; a tile has 64 × 32 numbers at most.
        "matmul": [(1, 1, 1), (64, 32, 64), (70, 35, 41), (5, 67, 65)],
    }
    for operator, ladder in LADDERS.items():
        for launcher in ladder.taught.values():
            for shape in shapes[operator]:
                case = make_case(operator, shape)
                arguments = [torch.from_numpy(t) for t in case.arguments]
                found = getattr(triton_kernels, launcher)(*arguments).numpy()
                case.check(found)
                found.flat[-1] += 1
                with pytest.raises(Rejected):
                    case.check(found)


def test_taught_kernels_are_right_in_the_interpreter(interpreter):
    interpreter(check_taught_kernels)


def check_gpu_rows() -> None:
    """Every row of a GPU, with the CPU in its place."""
    counts = {}
    with (
        patch.object(torch.cuda, "is_available", lambda: True),
        patch.object(torch.Tensor, "cuda", torch.Tensor.clone),
        patch.object(rungs, "flush", lambda device: None),  # which takes longer than a row
    ):
        for operator in LADDERS:
            case = make_case(operator, (5, 7, 3)[: len(LADDERS[operator].shape)])
            rows = list(rungs.on_gpu(case, None))
            counts[operator] = len(rows)
            assert sum("with copies" in one.name for one in rows) == 1
            for one in rows:
                assert one.turn(0)[0] > 0
    assert counts == {"maximum": 4, "matmul_t": 4, "matmul": 4, "linear_sigmoid": 3}


def check_gpu_command() -> None:
    """With the CPU in the place of a GPU: only its rows, and those that they are compared with."""
    with (
        patch.object(torch.cuda, "is_available", lambda: True),
        patch.object(torch.cuda, "get_device_name", lambda: "NVIDIA Test"),
        patch.object(torch.Tensor, "cuda", torch.Tensor.clone),
        patch.object(rungs, "start_helpers", None),
        patch.object(rungs, "show", lambda measured, own: found.update(measured)),
    ):
        found: dict[str, Any] = {}
        assert rungs.main(["--gpu", "--quick", "--cases", "maximum"]) == 0
    (results,) = found.values()
    names = [one.contestant for one in results]
    assert names[0] == "torch eager GPU"
    assert names[-2:] == ["torch eager", "pure Python"]
    ours = results[names.index("torchpar GPU")]
    times = results[-1].p50_ms / ours.p50_ms
    assert ours.columns["over_pure_python"] == times
    assert any(line.startswith("torchpar GPU: ") for line in page.over_loops(results))


def test_the_command_for_a_gpu_needs_no_other_rows(interpreter):
    interpreter(check_gpu_command)


def test_the_command_for_a_gpu_needs_one():
    with (
        patch.object(torch.cuda, "is_available", lambda: False),
        pytest.raises(ConfigError, match="finds no CUDA GPU"),
    ):
        rungs.main(["--gpu"])


def test_a_gpu_is_at_least_40_times_as_fast_as_loops_or_not():
    def row(contestant: str, times: float | None, ok: bool = True) -> Result:
        columns = {"over_pure_python": times}
        return Result(case={"workload": "maximum"}, contestant=contestant, ok=ok, columns=columns)

    rows = [row("torchpar GPU", 9511), row("torchpar GPU, with copies", 28.5), row("njit", 63.0)]
    rows += [row("torchpar GPU", None), row("torchpar GPU", 99.0, ok=False)]
    assert list(page.over_loops(rows)) == [
        "torchpar GPU: 9,511 times as fast as pure Python, at least 40.",
        "torchpar GPU, with copies: 28.5 times as fast as pure Python, less than 40.",
    ]


def test_the_rows_of_a_gpu_are_ready(interpreter):
    interpreter(check_gpu_rows)


# A student's file

RIGHT = """
import sys
import numpy as np
from numpy import matmul

with open(__file__ + ".log", "a") as file:
    file.write(" ".join(sys.argv[1:]) + "run\\n")

def max_cpu(A, B):
    return [[max(a, b) for a, b in zip(*rows)] for rows in zip(A.tolist(), B.tolist())]

def max_gpu(A, B):
    return np.maximum(A, B)

def matmul_transpose_trivial(X):
    C = np.zeros((len(X), len(X)))
    for i in range(len(X)):
        for j in range(len(X)):
            for m in range(X.shape[1]):
                C[i, j] += X[i, m] * X[j, m]
    return C

matmul_t = 3
"""
WRONG = """
import numpy as np

def max_cpu(A, B):
    C = np.maximum(A, B)
    C[2, 1] = -7
    return C

def max_numba(A, B):
    rows = A.tolist()
    return rows[len(rows)]

def maximum(A, B):
    A[A < B] = B[A < B]
    return A

def matmul_t(X):
    pass

def matmul_transpose_numba():
    return 0

def matmul_transpose_trivial(X):
    raise SystemExit("bye")

def linear_sigmoid(x, weight, bias):
    return "text"

print(undefined)

def matmul(a, b):
    return a @ b.T
"""
REASONS = {
    "max_cpu": r"result\[2, 1\] is -7, expected \d+; 1 of 600 numbers are wrong",
    "max_numba": "my.py, line 11: IndexError: list index out of range",
    "maximum": "it changes its argument 1; write to a new array",
    "matmul_t": "it returns None, expected an array",
    "matmul_transpose_numba": r"my.py, line 20: TypeError: matmul_transpose_numba\(\) takes 0 "
    "positional",
    "matmul_transpose_trivial": "my.py, line 24: SystemExit: bye",
    "linear_sigmoid": r"the result has dtype <U4, expected numbers",
}


IMPORTED = """
from helper import SCALE, max_gpu
from numba import njit
from torchpar import linear_sigmoid, matmul_t
from numpy import maximum

def max_cpu(A, B):
    import late
    return late.larger(A, B) * SCALE

max_numba = njit(lambda A, B: A)

class Product:
    def __call__(self, a, b):
        return a @ b.T

matmul = Product()
"""


def entry(
    name: str, function: Callable[..., Any], file: str = "my.py", **shape: Any
) -> student.Entry:
    case = make_case(
        student.OPERATORS[name][0], shape.get("shape", LADDERS[student.OPERATORS[name][0]].quick)
    )
    return student.Entry(file, name, function, case, case)


def test_a_right_file_is_executed_once_and_its_functions_are_right(tmp_path):
    path = tmp_path / "my.py"
    path.write_text(RIGHT)
    with patch.object(sys, "argv", ["x", "--with"]):
        functions, error = student.load(path)
    assert (set(functions), error) == ({"max_cpu", "max_gpu", "matmul_transpose_trivial"}, "")
    for name, function in functions.items():
        assert entry(name, function).turn(0)[0] > 0
    assert (tmp_path / "my.py.log").read_text() == "run\n"


def test_wrong_functions_are_told_apart_and_do_not_stop_the_others(tmp_path):
    path = tmp_path / "my.py"
    path.write_text(WRONG)
    functions, error = student.load(path)
    assert error == "my.py, line 29: NameError: name 'undefined' is not defined"
    assert set(functions) == set(REASONS)  # not what comes below the error
    for name, reason in REASONS.items():
        with pytest.raises(Rejected, match=f"^{reason}"):
            entry(name, functions[name], str(path)).turn(0)


def test_a_slow_function_gets_smaller_arguments_and_an_endless_one_is_stopped(tmp_path, capsys):
    def endless(x: Any) -> None:
        while True:
            pass

    slow = entry(
        "matmul_transpose_trivial", lambda x: pure_python.matmul_t(x.tolist()), shape=(300, 300)
    )
    with patch.object(student, "LIMIT", 0.2), patch.object(student, "SECONDS", 0.02):
        seconds = slow.begin()
        assert 32 <= slow.tried.shape[0] < 300
        assert slow.note == f"from {slow.tried.shape[0]}×{slow.tried.shape[1]}"
        assert seconds > 0.2  # those of the whole case
        never = student.enter(
            tmp_path / "my.py", "matmul_t", endless, make_case("matmul_t", (300, 300))
        )
    out, err = capsys.readouterr()
    assert out == "my.py: matmul_t is too slow: it takes more than 0 s for 32×32\n"
    assert err.startswith("my.py: matmul_t takes more than 0 s for 32×32; it is called once more")
    with pytest.raises(Rejected, match="it takes more than 0 s for 32×32"):  # at once
        never.turn(0)


def test_a_function_that_is_endless_above_some_size_is_rejected(tmp_path, capsys):
    def endless_above(x: Any) -> Any:
        while len(x) > 32:
            pass
        return x @ x.T

    case = make_case("matmul_t", (40, 40))
    with patch.object(student, "LIMIT", 0.1):
        slow = student.enter(tmp_path / "my.py", "matmul_t", endless_above, case)
        assert (
            "my.py: matmul_t is too slow: it takes more than 0 s for 40×40"
            in capsys.readouterr().out
        )
        (result,) = rungs.measure(
            case, [rungs.Rung(name="my.py: matmul_t", turn=slow.turn)], rounds=1
        )
    assert result.reason == "SlowCall: it takes more than 0 s for 40×40"
    line = "Too slow: my.py: matmul_t: it takes more than 0 s for 40×40"
    assert list(page.notes([result])) == [line]


def test_the_verdict_on_a_wrong_slow_function_names_the_smaller_size(tmp_path, capsys):
    def wrong(x: Any) -> Any:
        if len(x) > 32:
            raise TooSlow
        return x @ x.T + 1

    student.enter(tmp_path / "my.py", "matmul_t", wrong, make_case("matmul_t", (40, 40)))
    assert "my.py: matmul_t is not right at 32×32: result[0, 0]" in capsys.readouterr().out


def test_a_first_call_that_compiles_leaves_the_whole_case():
    seconds = iter([0.5, 0.0, 0.0])  # the first one compiles

    def compiled(x: Any) -> Any:
        time.sleep(next(seconds))
        return x @ x.T

    with patch.object(student, "LIMIT", 0.4):
        one = entry("matmul_t", compiled, shape=(40, 40))
        assert one.begin() < 0.4
    assert (one.tried, one.note) == (one.case, "")


def test_a_function_that_slows_down_later_keeps_its_row(tmp_path):
    """Times of two sizes would be mixed."""
    calls = iter(range(9))

    def slower(x: Any) -> Any:
        time.sleep(0.5 if next(calls) == 3 else 0)
        return x @ x.T

    one = entry("matmul_t", slower, shape=(40, 40))
    with patch.object(student, "LIMIT", 0.3):
        assert one.begin() + one.turn(0)[0] < 0.3
        with pytest.raises(Rejected, match="it takes more than 0 s for 40×40"):
            one.turn(1)
    assert one.note == ""


@pytest.mark.parametrize("operator, flushes, calls", [("matmul_t", 2, 1), ("linear_sigmoid", 0, 6)])
def test_caches_and_calls_of_a_turn_are_those_of_the_other_rows(operator, flushes, calls):
    """A turn of linear+sigmoid is as many calls as take 5 ms; each takes 1 ms here."""
    counted: list[int] = []
    timed: list[int] = []

    def time_calls(call: Callable[[], Any], device: Any = None, calls: int = 1) -> Any:
        timed.append(calls)
        return SimpleNamespace(result=call(), seconds=lambda: 0.00099)

    with (
        patch.object(student, "flush", counted.append),
        patch.object(student, "time_calls", time_calls),
        patch.object(rungs, "flush", counted.append),
        patch.object(rungs, "time_calls", time_calls),
    ):
        one = entry(operator, getattr(numpy_mlp, operator))
        theirs = rungs.timed_turn(one.case, partial(one.function, *one.case.arguments))
        for turn in (one.turn, theirs):
            counted.clear()
            timed.clear()
            turn(0), turn(1)
            assert (len(counted), timed[-1]) == (flushes, calls)


def test_what_comes_from_a_library_is_not_its_own_and_modules_beside_it_are(tmp_path):
    pytest.importorskip("numba", reason="the file has a function for Numba")
    path = tmp_path / "my.py"
    path.write_text(IMPORTED)
    (tmp_path / "helper.py").write_text("import numpy as np\nSCALE = 1\nmax_gpu = np.fmax\n")
    (tmp_path / "late.py").write_text("from numpy import maximum as larger\n")
    before = list(sys.path)
    with patch.dict(sys.modules):
        functions, error = student.load(path)
        assert set(functions) == {"max_cpu", "max_numba", "max_gpu", "matmul"}
        assert error == ""
        for name in ("max_cpu", "matmul"):
            assert entry(name, functions[name], str(path)).turn(0)[0] > 0
    assert sys.path == before


def test_a_function_of_the_exercises_or_of_a_library_is_refused_in_one_line(tmp_path):
    path = tmp_path / "my.py"
    for text, reason in (
        ("def sigmoid(z): pass", f"check sigmoid by python -m torchpar exercises --with {path}"),
        ("from torchpar import matmul_t", "define any of max_cpu, max_numba, "),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=f"it has no function that is known; {reason}"):
            student.load(path)
        forget_modules(tmp_path)


def test_a_gpus_function_without_a_gpu_is_executed_and_has_no_time(tmp_path, capsys):
    cases = {"maximum": make_case("maximum", (3, 5))}
    functions = {
        "max_gpu": numpy_mlp.maximum,
        "max_cpu": numpy_mlp.maximum,
        "matmul_t": numpy_mlp.matmul_t,
    }
    with (
        patch.object(torch.cuda, "is_available", lambda: False),
        patch.object(emulated, "has_nogpu", lambda: False),  # which takes seconds
    ):
        entries = rungs.students_entries(tmp_path / "my.py", functions, cases)
    assert [one.left_out for one in entries["maximum"]] == ["no GPU", ""]
    lines = [one for one in capsys.readouterr().out.splitlines() if ": note: " not in one]
    nothing = "and has launched no kernel of Triton or Numba"
    assert lines[0] == f"my.py: max_gpu is right at 3×5, {nothing}"
    assert lines[1].startswith("my.py: max_cpu is right (first call ")


class Stopped(Exception):
    """Enough of a command."""


def test_a_students_file_chooses_the_cases(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_NUM_THREADS", str(CORES))  # which Numba takes once in a process
    path = tmp_path / "my.py"
    path.write_text(RIGHT)
    with (
        patch.object(rungs, "students_entries", side_effect=Stopped) as entries,
        pytest.raises(Stopped),
    ):
        rungs.main(["--quick", f"--with={path}"])
    assert [*entries.call_args.args[2]] == ["maximum", "matmul_t"]


def test_files_of_which_nothing_would_be_checked_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NUMBA_NUM_THREADS", str(CORES))  # which Numba takes once in a process
    path = tmp_path / "my.py"
    path.write_text("def max_cpu(A, B): pass\ndef gemm(A, B): pass\n")
    said = "--cases matmul_t leaves out all functions of the files; add matmul or maximum, or drop"
    with pytest.raises(ConfigError, match=said):
        rungs.main(["--quick", "--cases", "matmul_t", f"--with={path}"])
    forget_modules(tmp_path)
    cases = {"maximum": rungs.make_case("maximum", (3, 5))}
    (row,) = rungs.students_entries(path, {"gemm": min, "max_cpu": max}, cases)["maximum"]
    assert "my.py: gemm is left out; add matmul to --cases\n" in capsys.readouterr().out
    assert rungs.is_any_tried({"maximum": [row], "matmul": []})
    left_out = rungs.Rung(name="my.cu: gemm", left_out="a GPU is there")
    for rows in ([], [left_out]):
        assert not rungs.is_any_tried({"matmul": rows})
        assert "No function of the files is checked" in capsys.readouterr().out
    assert rungs.is_any_tried({"matmul": [rungs.Rung(name="x", left_out="no GPU", executed="r")]})
