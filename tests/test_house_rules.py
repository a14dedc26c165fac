# SPDX-License-Identifier: MIT
"""Rules of CONTRIBUTING that a reader would otherwise have to check: first lines, imports, lengths."""

import ast
import re

import pytest
from commands import ROOT

FILES = sorted(
    path
    for folder in ("torchpar", "kernels", "examples", "benchmarks", "tests", "docs")
    for path in (ROOT / folder).rglob("*.py")
    if not path.is_relative_to(ROOT / "torchpar" / "kernels")
)
LESSONS = sorted((ROOT / "examples").glob("*.py"))
NO_FIRST_WORD = r"(What|Who|That|Where|Whether|How)\b"
FORBIDDEN = {  # folder: what its files do not import
    "kernels": "torchpar|benchmarks|support",
    "torchpar": "benchmarks|support|kernels",
    "examples": "benchmarks",
}


def imported(source: str) -> set[str]:
    """Return the modules that a source file imports, at any depth."""
    nodes = list(ast.walk(ast.parse(source)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}


def offenders(source: str, forbidden: str) -> set[str]:
    return {name for name in imported(source) if re.match(rf"({forbidden})(\.|$)", name)}


def test_first_lines_name_their_subject():
    docs = {path: ast.get_docstring(ast.parse(path.read_text())) or "" for path in FILES}
    assert not [str(path) for path, text in docs.items() if re.match(NO_FIRST_WORD, text)]
    assert re.match(NO_FIRST_WORD, "What a run has come to, and how it is saved and resumed.")


def test_arrows_go_one_way():
    for folder, forbidden in FORBIDDEN.items():
        for path in (path for path in FILES if path.is_relative_to(ROOT / folder)):
            assert not offenders(path.read_text(), forbidden), path
    assert offenders("def f():\n    from benchmarks.timing import flush", "benchmarks")


def test_only_tests_change_the_import_path():
    for path in (path for path in FILES if not path.is_relative_to(ROOT / "tests")):
        assert "sys.path" not in path.read_text(), path


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.name)
def test_lessons_fit_on_a_page(lesson):
    limit = 120 if lesson.name.startswith("train_") else 150
    assert len(lesson.read_text().splitlines()) <= limit
