# SPDX-License-Identifier: MIT
"""Homework as a course asks for it: its numbers, its product, and notes on what is forbidden."""

import time
from collections.abc import Callable
from dataclasses import replace
from time import perf_counter, sleep

import numpy as np
import pytest

from benchmarks.ladder import assignment, homework, page, student
from benchmarks.ladder.assignment import Launch
from benchmarks.ladder.cases import make_case
from benchmarks.results import Result
from benchmarks.timing import Rejected

# Notes on sources


def loops(A, B):
    rows = zip(A.tolist(), B.tolist(), strict=True)
    return np.array([[max(a, b) for a, b in zip(x, y, strict=True)] for x, y in rows])


def helped(A, B):
    return helper(A, B)


def helper(A, B):
    time.sleep(0.001)
    return np.fmax(A, B)


def waiting(A, B):
    sleep(0.001)
    end = perf_counter() + 0.001
    while perf_counter() < end:
        pass
    return loops(A, B)


def product(X):
    C = np.zeros((len(X), len(X)), X.dtype)
    C[:] = X @ X.T
    return X.dot(X.T)


def line(function: Callable[..., object], offset: int) -> int:
    return function.__code__.co_firstlineno + offset


@pytest.mark.parametrize(
    "name, function, said",
    [
        ("max_cpu", loops, []),
        (
            "max_cpu",
            helped,
            [
                (helper, 2, "calls np.fmax, and the assignment asks for loops of Python"),
                (helper, 1, "delays it, which the assignment forbids"),
            ],
        ),
        (
            "max_cpu",
            waiting,
            [
                (waiting, 1, "delays it, which the assignment forbids"),
                (waiting, 3, "delays it, which the assignment forbids"),
            ],
        ),
        (
            "matmul_transpose_trivial",
            product,
            [
                (product, 2, "computes by @, and the assignment asks for loops of Python"),
                (product, 3, "calls X.dot, and the assignment asks for loops of Python"),
            ],
        ),
        ("matmul_t", product, []),  # the ladder's own name, which no assignment has
    ],
)
def test_what_the_assignment_forbids_is_named_with_its_line(name, function, said):
    found = list(assignment.on_source(name, function))
    assert found == [f"line {line(where, offset)} {text}" for where, offset, text in said]


def test_a_function_by_numba_is_told_from_one_without():
    numba = pytest.importorskip("numba", reason="it compiles")
    compiled = numba.njit(loops)
    assert list(assignment.on_source("max_numba", compiled)) == []
    (without,) = assignment.on_source("max_numba", loops)
    assert without == "Numba compiles nothing of it, and the assignment asks for loops by njit"
    (with_it,) = assignment.on_source("max_cpu", compiled)
    assert with_it.startswith("Numba compiles a part of it, ")


def test_launches_are_those_of_the_assignment():
    def said(name: str, *launches: Launch) -> list[str]:
        return list(assignment.on_launches(name, launches, (33, 17)))

    assert said("matmul_transpose_gpu", Launch(1, 1024), Launch(1)) == []  # Triton's has no threads
    assert said("matmul_transpose_gpu", *[Launch(9, 256)] * 2) == [
        "it launches 9 blocks of 256 threads at 33×17, and the assignment asks for one block of "
        "1024 threads"
    ]
    assert said("max_gpu", Launch(1000, 1000), Launch(33, 17), Launch(33)) == []
    (other,) = said("max_gpu", Launch(1, 1000))
    assert other.endswith(
        "1 block of 1000 threads at 33×17, and the assignment asks for 1000 "
        "blocks of 1000 threads for 1000×1000"
    )
    assert said("matmul_t", Launch(3, 3)) == []


def test_notes_stand_once_below_the_table():
    columns = {"note": "", "remarks": "line 3 calls np.dot\nline 4 delays it"}
    case = {"workload": "maximum"}
    rows = [Result(case=case, contestant="a.py: max_numba", columns=columns)] * 2
    assert list(page.notes(rows)) == [
        "Note on a.py: max_numba: line 3 calls np.dot.",
        "Note on a.py: max_numba: line 4 delays it.",
    ]


# Numbers and products


def entry(name: str, function: Callable[..., object], shape: tuple[int, ...]) -> student.Entry:
    case = make_case(student.OPERATORS[name][0], shape)
    return student.Entry(__file__, name, function, case, case)


@pytest.mark.parametrize(
    "name, dtype, wider",
    [
        ("max_numba", "int32", "int64"),
        pytest.param("matmul_t", "float32", "float64", marks=pytest.mark.slow),
    ],
)
def test_signatures_of_wider_numbers_get_those(name, dtype, wider):
    numba = pytest.importorskip("numba", reason="it compiles")

    def of_two(a, b):
        return np.maximum(a, b)

    def of_one(x):
        c = np.zeros((len(x), len(x)), x.dtype)
        for i in range(len(x)):
            for j in range(len(x)):
                for p in range(x.shape[1]):
                    c[i, j] += x[i, p] * x[j, p]
        return c

    function = of_two if name == "max_numba" else of_one
    count = 2 if name == "max_numba" else 1
    for given, variant in ((dtype, ""), (wider, wider), ("complex128", None)):
        array = getattr(numba, given)[:, :]
        one = entry(name, numba.njit(array(*[array] * count))(function), (7, 5))
        if variant is None:
            advice = f"; let its signatures take {dtype} or {wider}, or leave them out$"
            with pytest.raises(Rejected, match=f"No matching definition .*{advice}"):
                one.begin()
            continue
        one.begin()
        assert (one.case.variant, one.note) == (variant, variant)
        assert {t.dtype.name for t in one.tried.arguments} == {variant or dtype}
        assert one.turn(0)


@pytest.mark.parametrize("shape", [(7, 5, 3), (40, 33, 9), (5, 5, 5)])
def test_both_products_are_judged_as_what_they_are(shape, capsys):
    for function, variant in ((lambda a, b: a @ b.T, ""), (lambda a, b: a @ b, "A·B")):
        one = entry("matmul", function, shape)
        one.begin()
        assert one.case.variant == variant
        assert one.turn(0)
        _, k, n = shape
        assert one.case.arguments[1].shape == ((k, n) if variant else (n, k))
    case = make_case("matmul", shape)
    one = student.enter(student.Path(__file__), "matmul", lambda a, b: a @ b, case)
    assert " is right (A·B, first call " in capsys.readouterr().out


def test_a_product_that_is_neither_says_so():
    for function in (lambda a, b: a @ b + 1e-3, lambda a, b: a.T @ b, lambda a, b: (a @ b)[1:]):
        with pytest.raises(Rejected, match=r"; it is neither A·Bᵀ of b \(n, k\) nor A·B of b \(k,"):
            entry("matmul", function, (7, 5, 3)).begin()


# At least 40


def test_forty_is_asked_of_the_maximum_alone():
    def lines(operator: str, gpu: str, loops_: str) -> str:
        case = make_case(operator, (20, 30))

        def row(name: str, ms: float | None, **columns: object) -> Result:
            columns = {"note": "", "over_pure_python": 99.0, **columns}
            return Result(
                case={"workload": case.label},
                contestant=f"a.py: {name}",
                p50_ms=ms,
                columns=columns,
            )

        rows = [row(gpu, 1.0), row(loops_, 80.0), row(gpu, None, executed="right")]
        torchpars = [replace(rows[0], contestant="torchpar GPU")]
        return "\n".join([*homework.lines(case, rows), *page.over_loops(torchpars)])

    assert lines("maximum", "max_gpu", "max_cpu").count("at least 40") == 3
    found = lines("matmul_t", "matmul_transpose_gpu", "matmul_transpose_trivial")
    assert "at least 40" not in found
    assert "matmul_transpose_gpu: 80 times as fast as matmul_transpose_trivial." in found
    assert "torchpar GPU: 99 times as fast as pure Python." in found
