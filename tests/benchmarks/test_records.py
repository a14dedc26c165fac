# SPDX-License-Identifier: MIT
"""A record is all that benchmarks and tests need to take in a new operator."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT

pytest.importorskip("rich", reason="rich prints the tables")

from benchmarks import calls, operators, products
from benchmarks.host import calls as host_calls
from benchmarks.records import OPERATORS, workloads
from benchmarks.timing import CPU

MADE_UP = "made_up"


@pytest.fixture
def made_up(monkeypatch) -> str:
    """The record of a new operator, like that of `matmul_t`."""
    like = OPERATORS["matmul_t"]
    named = [one._replace(name=MADE_UP) for one in like.workloads]
    monkeypatch.setitem(OPERATORS, MADE_UP, like._replace(name=MADE_UP, workloads=named))
    for namespace in (operators.torch.ops.torchpar, sys.modules["torchpar"]):
        monkeypatch.setattr(namespace, MADE_UP, like.function, raising=False)
    return MADE_UP


def listed(main: Any, capsys: Any) -> str:
    """What ``--help`` prints."""
    with pytest.raises(SystemExit):
        main(["--help"])
    return str(capsys.readouterr().out)


def test_a_new_record_is_timed_by_operators_and_products(made_up, capsys):
    assert made_up in workloads()
    assert made_up in {case.operator for *_, case in operators.cases(CPU, quick=True)}
    assert made_up in listed(operators.main, capsys)
    assert made_up in {case.operator for _, _, case, _ in products.cases(quick=True)}


def test_a_new_record_is_timed_by_calls(made_up, monkeypatch, capsys):
    monkeypatch.setattr(calls, "time_registrations", lambda rounds: [])
    monkeypatch.setattr(calls, "time_contestants", lambda *args, **options: {})
    timed: list[str] = []
    monkeypatch.setattr(
        calls, "time_operator", lambda operator, *others: timed.append(operator.name) or []
    )
    calls.main(["--quick"])
    assert timed.count(made_up) == 2, "of 64 and of 128 rows"
    assert timed.count("exact_matmul") == 1


def test_a_new_record_is_timed_by_autotune(made_up, capsys):
    pytest.importorskip("triton", reason="the kernels are written in Triton")
    from benchmarks import autotune, compile_kernels

    assert made_up in listed(autotune.main, capsys)
    jobs = list(compile_kernels.tuned_jobs([made_up], "bfloat16", [90]))
    assert {job.operator for job in jobs} == {made_up}
    assert made_up in {job.operator for job in compile_kernels.all_jobs(90)}


def test_a_new_record_is_timed_by_host(made_up, monkeypatch):
    pytest.importorskip("triton", reason="the launchers import Triton")
    monkeypatch.setattr(host_calls, "records", lambda: sys.modules["benchmarks.records"])
    names = host_calls.operators_calls("cpu")
    assert f"{made_up}, full, torchpar" in names
    assert f"{made_up}, no gradient, ATen" in names
    assert not any(name.startswith("exact_matmul, ") for name in names), "its record has no host"


@pytest.mark.parametrize("file", ["values", "errors", "autograd"])
def test_the_operators_tests_iterate_over_a_new_record(made_up, file):
    values = parametrized(ROOT / "tests" / "ops" / f"test_operators_{file}.py")
    assert any(made_up in str(value) for value in values)


def parametrized(path: Path) -> list[Any]:
    """The values over which the tests of a file iterate."""
    tests = runpy.run_path(str(path)).values()
    marks = [mark for test in tests for mark in getattr(test, "pytestmark", [])]
    return [value for mark in marks if mark.name == "parametrize" for value in mark.args[1]]
