# SPDX-License-Identifier: MIT
"""Warnings in the tests: ours are errors, and those of other packages are not, unless CI asks."""

import ast
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from commands import ROOT
from foreign_warnings import ARE_ERRORS, RAISED, foreign_folders

shown = pytest.mark.skipif(ARE_ERRORS, reason="FOREIGN_WARNINGS=error makes all errors")
OWN = [
    *("torchpar.ops.environment", "torchpar.kernels.tiles", "benchmarks.timing", "docs.house"),
    *("train_ddp", "support.lesson", "softmax", "conftest", "commands", "test_ways", __name__),
    *("__main__", "script_that_a_test_wrote"),
]
FOREIGN = ["triton.compiler.code_generator", "torch", "ast", "importlib._bootstrap"]


def warn_from(module: str, message: str) -> None:
    """Warn as a line of ``module`` does."""
    line = f"import warnings; warnings.warn({message!r}, DeprecationWarning)"
    exec(line, {"__name__": module})


@pytest.mark.parametrize("module", OWN)
def test_a_warning_of_a_line_of_ours_is_an_error(module):
    with pytest.raises(DeprecationWarning, match=r"^old$"):
        warn_from(module, "old")


@pytest.mark.parametrize("module", FOREIGN)
def test_a_warning_of_a_line_of_another_package_is_shown_unless_ci_asks(module):
    error = pytest.raises(DeprecationWarning) if ARE_ERRORS else nullcontext()
    with warnings.catch_warnings(record=True) as found, error:
        warn_from(module, "old")
    assert [str(one.message) for one in found] == ["old"] * (not ARE_ERRORS)


def test_a_folder_of_ours_is_not_foreign_wherever_it_is_on_the_path():
    installed = ROOT / ".venv" / "lib" / "site-packages"
    elsewhere = Path(ast.__file__).parent
    added = [ROOT, ROOT / "tests" / "optim", ROOT / "examples", ROOT.parent, Path(ROOT.anchor)]
    own = [ROOT, ROOT / "tests"]
    given = [installed, elsewhere, *added]
    assert {*foreign_folders(given, own)} == {installed.resolve(), elsewhere.resolve()}


@shown
def test_a_file_of_ours_must_compile_without_warnings_and_one_of_python_need_not():
    """A warning of the compiler is an error in the syntax."""
    text = '"0" is x'
    with warnings.catch_warnings(record=True) as found:
        compile(text, ast.__file__, "exec")
    assert len(found) == 1
    with pytest.raises(SyntaxError, match='"is" with'):
        compile(text, str(ROOT / "torchpar" / "new.py"), "exec")


@shown
def test_a_warning_that_we_raise_is_an_error_in_the_line_of_another_package():
    raised = [*raised_messages()]
    assert len(raised) == len(RAISED)
    for message in raised:
        with pytest.raises(DeprecationWarning):
            warn_from("torch", message)


def raised_messages() -> Iterator[str]:
    """The message of each warning that our modules raise, with 7 for each value in it."""
    for room in ("torchpar", "kernels", "examples", "benchmarks", "nogpu/src"):
        for path in (ROOT / room).rglob("*.py"):
            if "warnings.warn" not in (text := path.read_text()):
                continue
            tree = ast.parse(text)
            constants = {
                ast.unparse(line.targets[0]): line.value
                for line in tree.body
                if isinstance(line, ast.Assign)
            }
            for call in ast.walk(tree):
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "warnings.warn":
                    (message, *_) = call.args
                    yield _text(constants.get(ast.unparse(message), message))


def _text(message: ast.expr) -> str:
    if isinstance(message, ast.JoinedStr):
        return "".join(map(_text, message.values))
    return str(message.value) if isinstance(message, ast.Constant) else "7"
