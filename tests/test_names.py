# SPDX-License-Identifier: MIT
"""Names of files, classes and functions: one for each thing."""

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest
from commands import ROOT

# Of an operator: its kernel, the operator, and for Muon what the steps share with its kernel.
ONE_SUBJECT = {"exact_matmul", "fp32_matmul", "linear_sigmoid", "matmul_t", "maximum", "muon"}
ONE_CLASS = ("Kernel", "Product", "Recording", "Registers", "Row", "Run")
SOURCES = {
    str(path.relative_to(ROOT)): path.read_text()
    for folder in ("torchpar", "kernels")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


@cache  # for both tests
def nodes(source: str) -> list[ast.AST]:
    """The definitions of a file, and the file, in the order of `ast.walk`."""
    defined = ast.Module | ast.ClassDef | ast.FunctionDef
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, defined)]


def of_one_name(names: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """The places of each name that has several."""
    places: dict[str, list[str]] = defaultdict(list)
    for name, place in names:
        places[name].append(place)
    return {name: found for name, found in places.items() if len(found) > 1}


def files(sources: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for path in sources:
        if not Path(path).stem.startswith("__"):
            yield Path(path).stem, path


def classes(sources: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for path, source in sources.items():
        for node in nodes(source):
            if isinstance(node, ast.ClassDef):
                yield node.name, path


def first_sentences(sources: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The first sentences of docstrings."""
    for path, source in sources.items():
        for node in nodes(source):
            if text := ast.get_docstring(node):
                paragraph = " ".join(text.partition("\n\n")[0].split())
                yield paragraph.partition(". ")[0].removesuffix("."), path


def test_files_have_names_of_their_own() -> None:
    assert of_one_name(files(SOURCES)).keys() <= ONE_SUBJECT


def test_a_class_of_these_names_means_one_thing() -> None:
    found = of_one_name(classes(SOURCES))
    assert [name for name in ONE_CLASS if name in found] == []


def test_no_two_docstrings_begin_with_one_sentence() -> None:
    # The baselines compute the same at several levels.
    sources = {path: text for path, text in SOURCES.items() if "baselines" not in path}
    assert of_one_name(first_sentences(sources)) == {}


@pytest.mark.parametrize("names", [files, classes, first_sentences])
def test_a_second_thing_of_a_name_is_found(names: object) -> None:
    text = 'class Row:\n    """A row. It is long."""\n'
    other = text.replace("It is long", "It is short")
    assert callable(names)
    found = of_one_name(names({"torchpar/a/b.py": text, "torchpar/c/b.py": other}))
    assert [*found.values()] == [["torchpar/a/b.py", "torchpar/c/b.py"]]
