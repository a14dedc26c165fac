# SPDX-License-Identifier: MIT
"""Check that README and docs name only files, modules, tests and flags that exist."""

import ast
import csv
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from commands import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SUITE = "".join(path.read_text() for path in sorted((ROOT / "tests").glob("*.py")))
OTHERS_FLAGS = {  # of the launchers, pip, pytest and Lightning
    *("nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint", "max_restarts", "ntasks"),
    *("dist", "maxprocesses", "config", "help", "strict", "tyro_print_completion", "logdir"),
}


def our_flags() -> set[str]:
    """Return the fields of the examples' flags, and the arguments of parsers."""
    flags = set()
    for path in (ROOT / "examples").rglob("*.py"):
        fields = (
            node.target for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.AnnAssign)
        )
        flags |= {target.id for target in fields if isinstance(target, ast.Name)}
    parsers = (
        *(ROOT / "benchmarks").rglob("*.py"),
        *(ROOT / "torchpar").rglob("*.py"),
        ROOT / "tests" / "soak.py",
    )
    for path in parsers:
        flags |= {flag.replace("-", "_") for flag in re.findall(r'"--([a-z][\w-]+)"', path.read_text())}
    return flags


def missing(text: str, folder: Path, flags: set[str]) -> list[str]:
    """Return the links, paths, modules, tests and flags in ``text`` that do not exist."""
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    paths = re.findall(
        r"\b(?:examples|benchmarks|tests|docs|torchpar)/[\w/.-]*\.(?:py|sh|yaml|sbatch|md)\b", text
    )
    modules = re.findall(r"-m (benchmarks\.[a-z]\w*|torchpar)\b", text)
    modules += [f"benchmarks.{name}" for name in re.findall(r"-m benchmarks run ([a-z]\w*)", text)]
    tests = re.findall(r"`(test_\w+)`", text)
    used = {flag.replace("-", "_") for flag in re.findall(r"(?<![\w-])--([a-z][\w-]+)", text)}
    return [
        *(link for link in links if link and not (folder / link).exists()),
        *(path for path in paths if not (ROOT / path).exists()),
        *(module for module in modules if not find_spec(module)),
        *(test for test in tests if f"def {test}(" not in SUITE),
        *(f"--{flag}" for flag in sorted(used - flags - OTHERS_FLAGS)),
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_only_what_exists(page):
    assert missing(page.read_text(), page.parent, our_flags()) == []


@pytest.mark.parametrize(
    "text",
    [
        "[a](none.md)",
        "`tests/none.py`",
        "`python -m benchmarks.none`",
        "`python -m benchmarks run none`",
        "`test_none`",
        "`--no-such-flag`",
    ],
)
def test_what_does_not_exist_is_found(text):
    assert len(missing(text, ROOT, our_flags())) == 1


def test_the_readme_fits_on_150_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_readme_shows_the_measured_trainings():
    (table,) = re.findall(r"^\| ms a step.*\n(?:\|.*\n)+", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert table == (ROOT / "benchmarks" / "results" / "cpu-2-cores-avx512" / "train.md").read_text()


@pytest.mark.parametrize("name", ["speedrun-ladder", "speedrun-tried-validated"])
def test_the_speedrun_shows_the_measured_recipes(name):
    from benchmarks import speedrun
    from benchmarks.results import Result, markdown

    with (ROOT / "benchmarks" / "results" / "cpu-2-cores-avx512" / f"{name}.csv").open() as file:
        results = [
            Result(
                case={},
                contestant=row["contestant"],
                found={key: float(row[key]) for key in ("seconds", "accuracy")},
            )
            for row in csv.DictReader(file)
        ]
    changes = {recipe.name: recipe.change for group in speedrun.GROUPS.values() for recipe in group}
    lines = speedrun.summary(results, changes)
    table = markdown([list(lines[0]), *(list(line.values()) for line in lines)])
    assert f"\n\n{table}\n" in (ROOT / "docs" / "speedrun.md").read_text()
