# SPDX-License-Identifier: MIT
"""A student's file: its execution, the lines of its errors, time limits, and comparisons.

The tests of `exercises` and of the ladder run both commands on such files.
"""

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from commands import forget_modules

from torchpar import console
from torchpar.baselines import grader, numpy_mlp
from torchpar.errors import ConfigError

NAMES = ("sigmoid", "max_cpu")
BEHIND_MAIN = 'put that behind if __name__ == "__main__"'


@pytest.fixture(autouse=True)
def forgotten_modules(tmp_path):
    yield
    forget_modules(tmp_path)


def load(folder: Path, text: str, **options: bool) -> grader.Loaded:
    (folder / "my.py").write_text(text)
    return grader.load(folder / "my.py", NAMES, {"other": ("theirs",)}, **options)


# What stands below a function, and the error that is told of it.
ENDS = {
    "sigmoid(None)": "my.py, line 3: ZeroDivisionError: division by zero (my.py, line 2)",
    "import beside": "my.py, line 3: SyntaxError: invalid syntax (beside.py, line 1)",
    "import wrong": "my.py, line 3: ZeroDivisionError: division by zero (wrong.py, line 2)",
    "import csv; csv.reader()": "my.py, line 3: TypeError: expected at least 1 argument, got 0",
    "raise ValueError": "my.py, line 3: ValueError",
    "raise SystemExit(3)": "my.py, line 3: SystemExit: 3",
    "import numba": "my.py, line 3: ModuleNotFoundError: import of numba halted; None in "
    "sys.modules; pip install numba",
    "import my_part": "my.py, line 3: ModuleNotFoundError: No module named 'my_part'",
    "raise ValueError('a\\n  b\\nc')": "my.py, line 3: ValueError: a b",
    "raise ValueError('\\x1b[31mred\\x1b[0m')": "my.py, line 3: ValueError: red",
}


@pytest.mark.parametrize("end", ENDS)
def test_functions_above_a_line_that_fails_are_taken_and_the_line_is_named(
    tmp_path, monkeypatch, capsys, end
):
    monkeypatch.setitem(sys.modules, "numba", None)
    (tmp_path / "beside.py").write_text("1 +\n")
    (tmp_path / "wrong.py").write_text("\n1 / 0\n")
    text = f"def sigmoid(z):\n    return 1 / 0\n{end}\ndef max_cpu(A, B): pass\n"
    functions, error = load(tmp_path, text)
    assert (list(functions), error) == (["sigmoid"], ENDS[end])
    assert capsys.readouterr().out == f"{error}; functions above this line are checked\n"


def test_a_top_level_that_never_ends_is_stopped_at_its_line(tmp_path, capsys):
    text = "def sigmoid(z): pass\nwhile True: pass\ndef max_cpu(A, B): pass\n"
    with patch.object(grader, "TOP_LEVEL", 0.5), patch.object(console, "SILENCE", 0.05):
        functions, error = load(tmp_path, text)
    assert set(functions) == {"sigmoid"}
    assert error == f"my.py, line 2: TooSlow: it takes more than 0 s; {BEHIND_MAIN}"
    err = capsys.readouterr().err
    assert re.match(r"my.py, line 2: its top level has not ended after \d+ s\n", err)


REFUSED = {
    "def f(): pass": "it has no function that is known; define any of sigmoid, max_cpu",
    "def theirs(): pass": "it has no function that is known; check theirs by python -m torchpar "
    "other --with {}",
    "from operator import truth as theirs": "it has no function that is known; define any of "
    "sigmoid, max_cpu",
    "pass\n1 / 0": "my.py, line 2: ZeroDivisionError: division by zero",
    "import numpy\ndef sigmoid(z)\n    pass": "my.py, line 2: SyntaxError: expected ':'",
}


@pytest.mark.parametrize("text", REFUSED)
def test_a_file_without_functions_is_refused_in_one_line(tmp_path, text):
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, text)
    path = tmp_path / "my.py"
    assert str(raised.value) == f"--with {path}: {REFUSED[text].format(path)}"


def test_a_file_that_is_not_there_is_refused_from_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as raised:
        grader.load(Path("my.py"), NAMES, {})
    known = "name a Python file that defines any of sigmoid, max_cpu"
    assert str(raised.value) == f"--with my.py is no file; {known}"
    Path("my.py").write_text("def sigmoid(z)\n")
    with pytest.raises(ConfigError, match=r"^--with my.py: my.py, line 1: SyntaxError: expected"):
        grader.load(Path("my.py"), NAMES, {})


def test_a_librarys_function_is_the_students_where_the_command_says_so(tmp_path):
    text = "from torch import sigmoid\nfrom part import max_cpu\n"
    (tmp_path / "part.py").write_text("def max_cpu(A, B): pass\n")
    assert list(load(tmp_path, text).functions) == ["sigmoid", "max_cpu"]
    forget_modules(tmp_path)
    assert list(load(tmp_path, text, takes_imports=False).functions) == ["max_cpu"]
    assert grader.is_imported("maximum", numpy_mlp.maximum, "/nowhere/my.py")


def test_a_file_has_its_own_arguments_and_classes_and_any_suffix(tmp_path):
    path = tmp_path / "my.txt"
    path.write_text(
        "import dataclasses, sys\nassert sys.argv == [__file__]\n"
        "@dataclasses.dataclass\nclass A:\n    a: 'int'\n"
        "def sigmoid(z): import late; return late.A\n"
    )
    (tmp_path / "late.py").write_text("A = 1\n")
    before = list(sys.path)
    functions, error = grader.load(path, NAMES, {})
    assert error == ""
    with grader.calling(str(path), "sigmoid", 1.0):
        assert functions["sigmoid"](0) == 1  # which imports a module beside it
    assert sys.path == before


# Calls


def test_compilation_inside_another_one_counts_once():
    compilation = grader.Compilation()
    with patch.object(grader.time, "perf_counter", iter([1.0, 6.0]).__next__):
        for is_start in (True, True, False, False):
            compilation.notify(SimpleNamespace(is_start=is_start))
    assert compilation.seconds == 5.0


def test_an_endless_call_is_stopped_and_a_wrong_one_has_its_line(tmp_path):
    def sigmoid() -> None:
        while True:
            pass

    def wrong() -> int:
        return [][1]

    with (
        pytest.raises(grader.TooSlow, match=r"^it takes more than 0 s$"),
        grader.calling(__file__, "sigmoid", 0.05),
    ):
        sigmoid()
    line = wrong.__code__.co_firstlineno
    with (
        pytest.raises(grader.Wrong, match=rf"^test_grader.py, line {line + 1}: IndexError: list"),
        grader.calling(__file__, "wrong", 1.0),
    ):
        wrong()
    with (  # the call is in another folder's file
        pytest.raises(grader.Wrong, match=rf"^test_grader.py, line {line}: TypeError: "),
        grader.calling(str(tmp_path / "my.py"), "wrong", 1.0, wrong),
    ):
        wrong(1)  # type: ignore[call-arg]


# Results


def test_a_result_of_another_kind_is_wrong():
    expected, bound = np.arange(6.0).reshape(2, 3), np.full((2, 3), 0.5)
    grader.compare(expected + 0.5, expected, bound)
    for found, where, message in (
        (
            expected + 2 * (expected % 3 == 2),
            "",
            "result[0, 2] is 4, expected 2; 2 of 6 numbers are wrong",
        ),
        (expected * np.nan, "at z", "at z = 0: result[0, 0] is nan, expected 0; 6 of 6 numbers"),
        (expected.T, "at z", "the result at z has shape (3, 2), expected (2, 3)"),
        (expected.astype(str), "", "the result has dtype <U32, expected numbers"),
        (np.asarray({}), "", "the result has dtype object, expected numbers"),
    ):
        with pytest.raises(grader.Wrong, match=f"^{re.escape(message)}"):
            grader.compare(found, expected, bound, where, expected if where else None)
    with pytest.raises(grader.Wrong, match=r"^of a number: the result is 1, expected 0$"):
        grader.compare(np.array(1), np.array(0), np.array(0), "of a number")


def test_a_result_is_an_array_lists_or_a_tensor_or_lies_on_a_gpu():
    on_gpu = SimpleNamespace(copy_to_host=lambda: np.ones(2))
    leaf = torch.ones(2, requires_grad=True)
    for result in (np.ones(2), [1, 1], leaf, on_gpu):
        assert grader.as_array(result).tolist() == [1, 1]
    with pytest.raises(grader.Wrong, match=r"^it returns None, expected an array$"):
        grader.as_array(None)


def test_an_argument_that_a_call_changes_is_named():
    one, lists = np.ones(2), [np.ones(2), np.ones(3)]
    grader.check_unchanged((one, lists, 3), (one.copy(), [t.copy() for t in lists], 3))
    for given in ((one, [np.ones(2), np.zeros(3)]), (one, lists[:1])):
        with pytest.raises(grader.Wrong, match=r"^it changes its argument 2; write to a new array"):
            grader.check_unchanged((one, lists), given)
