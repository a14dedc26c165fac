# SPDX-License-Identifier: MIT
"""README, CONTRIBUTING and docs: what they name exists, their code runs, and their tables are
true."""

import csv
import re
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from inspect import ismodule
from itertools import groupby
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch
import torch.distributed.checkpoint as dcp
from commands import ROOT, blocks, execute, forked_ranks
from torch.distributed.checkpoint import CheckpointException

import nogpu
import torchpar
from benchmarks import speedrun, train
from benchmarks.ladder import page as ladder_page
from benchmarks.ladder import rungs, student
from benchmarks.records import OPERATORS
from benchmarks.records.record import Operator
from benchmarks.results import Result, duration, markdown
from torchpar.exact.verify.verify import EXPECTED
from torchpar.testing.operators.rules import RULES

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "nogpu" / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
    )
}
README = PAGES["README.md"]
RESULTS = ROOT / "benchmarks" / "results" / "cpu-2-cores-amd-epyc-family-26-model-2"
RESULTS_ZEN3 = RESULTS.with_name("cpu-2-cores-amd-epyc-family-25-model-1")
RESULTS_H200 = RESULTS.with_name("nvidia-h200")
RESULTS_H100 = RESULTS.with_name("nvidia-h100")
SUITE = "".join(path.read_text() for path in sorted((ROOT / "tests").rglob("*.py")))
FIGURES = ("p50_ms", "speedup", "seconds", "accuracy")
OTHERS_FLAGS = {  # of the launchers, pip, pytest, Lightning and .ci/release
    *(
        "local_addr",
        "nproc_per_node",
        "nnodes",
        "rdzv_backend",
        "rdzv_endpoint",
        "max_restarts",
        "no_deps",
        "no_build_isolation",
        "ntasks",
        "num_processes",
        "index_url",
        "junitxml",
    ),
    *("maxprocesses", "config", "help", "strict", "tyro_print_completion", "logdir", "torch"),
    *("collect_only", "timeout"),
}


def our_flags() -> set[str]:
    """Return the fields of the examples' flags, and the arguments of parsers."""
    paths = [
        path
        for folder in ("benchmarks", "torchpar", "tests/fuzz", "nogpu/src")
        for path in (ROOT / folder).rglob("*.py")
    ]
    paths.append(ROOT / "nogpu" / "tests" / "draw_tests.py")
    parsers = "".join(path.read_text() for path in paths)
    examples = "".join(path.read_text() for path in (ROOT / "examples").rglob("*.py"))
    flags = re.findall(r'"--([a-z][\w-]+)"', parsers) + re.findall(
        r"^    (\w+): ", examples, re.MULTILINE
    )
    return {flag.replace("-", "_") for flag in flags}


def missing(text: str, folder: Path, flags: set[str]) -> list[str]:
    """Return the links, paths, modules, tests and flags in ``text`` that do not exist."""
    links = [
        link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link
    ]
    paths = re.findall(
        r"(?<![\w/])(?:examples|benchmarks|tests|docs|torchpar|nogpu)/[\w/.-]*\.(?:py|sh|yaml|sbatch|md)\b",
        text,
    )
    modules = re.findall(r"-m (benchmarks\.[a-z]\w*|torchpar)\b", text)
    modules += [f"benchmarks.{name}" for name in re.findall(r"-m benchmarks run ([a-z]\w*)", text)]
    used = {flag.replace("-", "_") for flag in re.findall(r"(?<![\w-])--([a-z][\w-]+)", text)}
    return [
        *(link for link in links if link and not (folder / link).exists()),
        *(path for path in paths if not (ROOT / path).exists()),
        *(module for module in modules if not find_spec(module)),
        *(test for test in re.findall(r"`(test_\w+)`", text) if f"def {test}(" not in SUITE),
        *(f"--{flag}" for flag in sorted(used - flags - OTHERS_FLAGS)),
    ]


def test_pages_name_only_what_exists():
    flags = our_flags()
    others = ("benchmarks/reproductions.md", "examples/data/README.md", "tests/README.md")
    for page, text in {**PAGES, **{page: (ROOT / page).read_text() for page in others}}.items():
        assert missing(text, (ROOT / page).parent, flags) == [], page
    wrong = (
        "[a](none.md) tests/none.py -m benchmarks.none -m benchmarks run none `test_none` "
        "--no-such-flag"
    )
    assert len(missing(wrong, ROOT, flags)) == 6


def test_the_site_shows_all_pages():
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2].partition("\nhooks:")[0]
    shown = re.findall(r"([\w-]+\.md)$", nav, re.MULTILINE)
    assert sorted(shown) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def placeholders(text: str) -> list[str]:
    """Return marks such as @NAME@, for which figures or text are still to come."""
    return re.findall(r"@[A-Z_0-9]+@", text)


@pytest.mark.parametrize("page", PAGES)
def test_no_page_has_a_placeholder(page):
    assert placeholders(PAGES[page]) == []
    assert placeholders("two ranks take @DP_128@ of @torch's time") == ["@DP_128@"]


def undefined(page: str) -> tuple[list[str], int]:
    """Return the names in "your code" that their file does not define, and the number of all names.

    A cell's files are those that it names. If it names none, they are the row's script and the last
    file that is linked above in the table, or "my.py", a student's file, which defines what the
    ladder knows.
    """
    paths = {
        Path(link).name: ROOT / "docs" / link for link in re.findall(r"\]\(([^)#\s]+\.py)\)", page)
    }
    wrong, count, linked, column = [], 0, [], None
    for line in page.splitlines():
        cells = (
            [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        )
        if not cells:
            column = None
        elif column is None:
            column, linked = cells.index("your code") if "your code" in cells else -1, []
        elif column >= 0:
            cell = cells[column]
            linked = re.findall(r"(?<=\[)\w+\.py(?=\])|my\.py", cell)[-1:] or linked
            files = re.findall(r"\w+\.py", cell) or linked + re.findall(r"examples/(\w+\.py)", line)
            for name in re.findall(r"`([A-Za-z_][\w.]*)[^`]*`", cell):
                if name.endswith((".py", ".cu")):
                    continue
                count += 1
                if not any(defines(file, name, paths) for file in files):
                    wrong.append(name)
    return wrong, count


def defines(file: str, name: str, paths: dict[str, Path]) -> bool:
    if file == "my.py":
        return name in student.OPERATORS
    code = paths.get(file, ROOT / "examples" / file).read_text()
    assigned = r"^[\w,. ]*\b{0}\b[^=\n(]*= "
    return all(
        re.search(rf"(?:def|class) {part}\b|{assigned.format(part)}", code, re.MULTILINE)
        for part in name.split(".")
    )


def test_the_exercises_name_functions_that_there_are():
    page = PAGES["docs/exercises.md"]
    wrong, count = undefined(page)
    assert wrong == []
    assert count > 30
    assert page.count("| `pool` in") == 1
    assert undefined(page.replace("| `pool` in", "| `pooled` in"))[0] == ["pooled"]
    assert undefined(page.replace("`NumpyMLP.loss_sum`", "`NumpyMLP.lost_sum`"))[0] == [
        "NumpyMLP.lost_sum"
    ]


def other_schedules(page: str) -> list[str]:
    """The commands of the rows that name gpipe as the code, and run another schedule."""
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    commands = [cells[1] for cells in rows if len(cells) > 3 and "`gpipe`" in cells[3]]
    assert commands
    return [one for one in commands if "--pipeline gpipe" not in one]


def test_the_exercise_that_names_gpipe_runs_it():
    page = PAGES["docs/exercises.md"]
    assert other_schedules(page) == []
    assert len(other_schedules(page.replace("--draw --pipeline gpipe", "--draw"))) == 1


def public_names() -> set[str]:
    """The names in ``__all__`` of each public package, and those that a module without one
    defines."""
    names = {
        f"torchpar.{name}" for name in torchpar.__all__ if not ismodule(getattr(torchpar, name))
    }
    for part in (
        "library",
        "testing",
        "nn",
        "optim",
        "parallel",
        "parallel.split.styles",
        "exact",
        "training",
        "errors",
        "data",
    ):
        module = import_module(f"torchpar.{part}")
        defined = [
            name
            for name, value in vars(module).items()
            if getattr(value, "__module__", "") == module.__name__ and name[0] != "_"
        ]
        names |= {f"{module.__name__}.{name}" for name in getattr(module, "__all__", defined)}
    return names | {f"nogpu.{name}" for name in nogpu.__all__ if name != "__version__"}


def test_the_reference_has_all_public_names_and_no_other():
    entries = r"^::: (\S+)(?:\n    options:\n      heading: (\S+))?$"
    found = re.findall(entries, PAGES["docs/api.md"], re.MULTILINE)
    documented = [heading or name for name, heading in found]
    assert len(documented) == len(set(documented))
    assert set(documented) == public_names()
    assert all(map(resolve_name, documented))
    # The site would show the module, and not the function that has its name.
    assert [name for name, _ in found if is_module(name)] == []
    assert is_module("torchpar.training.graphed")


def is_module(name: str) -> bool:
    return (ROOT / f"{name.replace('.', '/')}.py").exists()


def test_the_pages_install_extras_that_there_are():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for text in PAGES.values():
        for names in re.findall(r"(?:\.|torchpar)\[([\w,]+)\]'", text):
            assert set(names.split(",")) <= set(extras)


def results(name: str) -> Iterator[Result]:
    with (RESULTS / f"{name}.csv").open() as file:
        for row in csv.DictReader(file):
            row |= {key: float(row[key]) for key in FIGURES if row.get(key)}
            named = {name: row[name] for name in ("contestant", "p50_ms", "speedup")}
            yield Result(case=row, columns=row, **named)


def unnamed_commits(page: str, text: str) -> set[str]:
    """Return the commits that measured the CSVs which a page links, and which it does not name."""
    commits = set()
    for link in re.findall(r"\]\(([^)\s]*benchmarks/results/[^)\s]+\.csv)\)", text):
        with ((ROOT / page).parent / link).open() as file:
            commits |= {row["commit"][:8] for row in csv.DictReader(file)}
    return commits - set(re.findall(r"\b[0-9a-f]{8}\b", text))


def test_each_page_names_the_commits_that_measured_its_csvs():
    assert {page: unnamed_commits(page, text) for page, text in PAGES.items()} == {
        page: set() for page in PAGES
    }
    page = "docs/gloo.md"
    assert unnamed_commits(page, PAGES[page].replace("60f0f7ca", "60f0f7cb")) == {"60f0f7ca"}


def test_the_page_shows_the_measured_trainings():
    tables = [[*group] for _, group in groupby(results("train"), lambda one: one.case["network"])]
    table = (RESULTS / "train.md").read_text()
    assert table == train.summary(tables, threads=1)
    assert f"\n{table}\n" in PAGES["docs/training.md"]


def read_ladder(path: Path) -> dict[str, list[Result]]:
    """Return the results in a CSV of the ladder, by workload."""
    attributes = {"workload", *(field.name for field in fields(Result))}

    def parsed(cell: str) -> float | str | None:
        with suppress(ValueError):
            return float(cell)
        return cell or None

    def milliseconds(cell: str) -> float | None:
        return float(cell) if cell else None

    with path.open() as file:
        results = [
            Result(
                case={"workload": row["workload"]},
                contestant=row["contestant"],
                p20_ms=milliseconds(row["p20_ms"]),
                p50_ms=milliseconds(row["p50_ms"]),
                p80_ms=milliseconds(row["p80_ms"]),
                ok=row["ok"] == "True",
                reason=row["reason"],
                columns={name: parsed(row[name]) for name in row if name not in attributes},
            )
            for row in csv.DictReader(file)
        ]
    return {name: [*group] for name, group in groupby(results, lambda one: one.case["workload"])}


def test_the_ladder_shows_the_measured_tables():
    measured = read_ladder(RESULTS / "ladder.csv")
    readme = rungs.readme_table(measured)
    load = ladder_page.load_note(measured[ladder_page.LIMITS])
    tables = [ladder_page.as_markdown(rows) for rows in measured.values()]
    assert (RESULTS / "ladder.md").read_text() == "\n".join([readme, f"{load}\n", *tables])
    for part in (load, *tables):
        assert f"\n{part}\n" in PAGES["docs/ladder.md"], part.partition("\n")[0]


def test_the_readme_shows_the_ladder():
    section = README.partition("\n**From loops to processes.**")[2].partition("\n## ")[0]
    assert f"\n\n{rungs.readme_table(read_ladder(RESULTS / 'ladder.csv'))}\n" in section


def of_matmul_t(shape: str) -> dict[str, str]:
    one = {"operator": "matmul_t", "mode": "forward", "dtype": "float32", "threads": "2"}
    return {**one, "shape": shape}


def of_two_ranks(batch: str) -> dict[str, str]:
    return {"kind": "step", "sizes": "784-512-10", "contestant": "dp 2", "batch": batch}


# The first words of a row, its benchmark, and its row of the CSV.
SPEED_UPS = {
    "`matmul_t`, X·Xᵀ of 2048 rows": ("operators", of_matmul_t("2048x2048")),
    "`matmul_t`, X·Xᵀ of 256 rows": ("operators", of_matmul_t("256x256")),
    "a Muon step, one weight of 4096 × 1024": ("muon", {"weight": "4096x1024"}),
    "a Muon step, 50 weights of 128 × 128": ("muon", {"weight": "50 of 128x128"}),
    "a step of 784-512-10, batch 8192": ("scaling", of_two_ranks("8192")),
    "the same, batch 512": ("scaling", of_two_ranks("512")),
    "a step of `train_ddp.py": (
        "ddp",
        {"network": "512", "batch": "1024", "ranks": "2", "contestant": "train_ddp.py"},
    ),
    "an all-reduce of 256 KB": ("scaling", {"nbytes": "262144", "contestant": "shared memory"}),
}


@pytest.mark.parametrize("start", SPEED_UPS)
def test_the_readme_shows_the_measured_speed_ups(start):
    benchmark, case = SPEED_UPS[start]
    (row,) = re.findall(rf"^\| {re.escape(start)}.*", README, re.MULTILINE)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[4] == benchmark
    for cell, folder in zip(cells[1:3], (RESULTS, RESULTS_ZEN3), strict=True):
        case = {"contestant": "torchpar"} | case
        text = (folder / f"{benchmark}.csv").read_text()
        measured = [
            float(f"{float(one['speedup']):.2g}")
            for one in csv.DictReader(text.splitlines())
            if all(one.get(key) == value for key, value in case.items())
        ]
        assert measured == ([float(cell)] if cell else []), row


def on_h200(
    benchmark: str, column: str, case: dict[str, str], folder: Path = RESULTS_H200
) -> float:
    """Return the milliseconds in the only row of an H200's CSV with the columns of ``case``."""
    with (folder / f"{benchmark}.csv").open() as file:
        (row,) = (
            row
            for row in csv.DictReader(file)
            if case.items() <= row.items() and row[column] and row["ok"] == "True"
        )
    return float(row[column])


def of_operator(operator: str, shape: str, dtype: str = "bfloat16", mode: str = "forward"):
    return {"operator": operator, "mode": mode, "shape": shape, "dtype": dtype}


OURS, TF32X3 = {"contestant": "torchpar"}, {"contestant": "128x128x32 w8 s3 tma"}
MM, MM_FLOAT32 = {"contestant": "torch.mm"}, {"contestant": "torch.mm, float32"}
EAGER, TORCH_MUON = {"contestant": "eager"}, {"contestant": "torch.optim.Muon"}
# The first words of a row, its benchmark, what both have in common, and torchpar's and the other's
# contestant.
GPU_SPEED_UPS = {
    "`matmul_t`, X·Xᵀ of 4096 rows": (
        "operators",
        of_operator("matmul_t", "4096x4096"),
        OURS,
        MM,
    ),
    "X·Xᵀ of 1024 rows": ("operators", of_operator("matmul_t", "1024x1024"), OURS, MM),
    "X·Xᵀ of 1024 rows, exactly symmetric": (
        "operators",
        of_operator("matmul_t", "1024x1024"),
        OURS,
        {"contestant": "torch.mm, mirrored"},
    ),
    "4096 rows of float32, by three products": (
        "operators",
        of_operator("matmul_t", "4096x4096", "tf32x3"),
        TF32X3,
        MM_FLOAT32,
    ),
    "X·Xᵀ of 4096 rows of float32, [with the same bits": (
        "operators",
        of_operator("exact_matmul", "4096x4096->4096", "float32"),
        {"contestant": "torchpar, exact_matmul_t"},
        MM_FLOAT32,
    ),
    "A·Bᵀ of 1024 rows of float32": (
        "operators",
        of_operator("exact_matmul", "1024x1024->1024", "float32"),
        OURS,
        MM_FLOAT32,
    ),
    "`symmetric_matmul` with C": (
        "operators",
        of_operator("symmetric_matmul", "4096x4096"),
        OURS,
        {"contestant": "torch.addmm"},
    ),
    "`maximum` of 16384 × 16384 numbers and a row": (
        "operators",
        of_operator("maximum", "16384x16384 16384", "float32"),
        OURS,
        {"contestant": "torch.maximum"},
    ),
    "the backward pass of `maximum`, two operands of 2²⁶ numbers": (
        "operators",
        of_operator("maximum", f"{2**26} {2**26}", "float32", "backward"),
        OURS,
        EAGER,
    ),
    "`linear_sigmoid`, 4096 × 1024 → 4096": (
        "operators",
        of_operator("linear_sigmoid", "4096x1024->4096"),
        OURS,
        {"contestant": "addmm, sigmoid_"},
    ),
    "`linear_sigmoid`, 256 × 1024 → 4096, as a CUDA graph": (
        "autotune",
        {"operator": "linear_sigmoid", "shape": "256x1024->4096"},
        OURS,
        {"contestant": "torch.compile"},
    ),
    "a layer 1024 × 1024 → 4096, forward and backward": (
        "operators",
        of_operator("linear_sigmoid", "1024x1024->4096", mode="full"),
        OURS,
        EAGER,
    ),
    "a call of `maximum` of 64 × 64 numbers": (
        "host",
        {"operator": "maximum", "mode": "no gradient"},
        OURS,
        {"contestant": "ATen"},
    ),
    "a step of [Muon](docs/muon.md#measured), one weight of 2048 × 2048": (
        "muon",
        {"weight": "2048x2048"},
        OURS,
        TORCH_MUON,
    ),
    "a step of Muon, the 48 matrices of GPT-2 small": (
        "muon",
        {"weight": "48 of GPT-2 small"},
        OURS,
        TORCH_MUON,
    ),
}


def test_the_readme_shows_what_an_h200_measured():
    table = README.partition("\n**Measured on one NVIDIA H200**")[2].partition("\n\n**From")[0]
    _, _, *lines = re.findall(r"^\|.*", table, re.MULTILINE)
    assert len(lines) == len(GPU_SPEED_UPS)
    for line, (start, (benchmark, case, *both)) in zip(lines, GPU_SPEED_UPS.items(), strict=True):
        own, other = (on_h200(benchmark, "p20_ms", case | one) for one in both)
        what, *times, ratio, _ = (cell.strip() for cell in line.strip("|").split("|"))
        assert what.startswith(start)
        assert times == [duration(own / 1e3), duration(other / 1e3)], line
        assert float(ratio) == float(f"{other / own:.2g}"), line
    case = of_operator("matmul_t", "4096x4096", "tf32x3")
    own, other = (on_h200("operators", "max_error", case | one) for one in (TF32X3, MM_FLOAT32))
    assert f"with {other / own:.2g} times the error" in table


# The operators of the tables on a page, in order; and the contestants of their columns.
H200_TABLES = {
    "docs/matmul_t.md": ["matmul_t"],
    "docs/numerics.md": ["matmul_t"],
    "docs/linear_sigmoid.md": ["linear_sigmoid", "linear_sigmoid_backward"],
    "docs/symmetric_matmul.md": ["symmetric_matmul"],
    "docs/maximum.md": ["maximum"],
    "docs/exact.md": ["exact_matmul"],
}
H200_COLUMNS = {
    "`torch.mm`": {"torch.mm", "torch.bmm", "torch.mm, float32", "eager"},
    "`torch.mm` and a mirror": {"torch.mm, mirrored", "torch.bmm, mirrored"},
    "`torch.mm` in float64": {"torch.mm, float64"},
    "torchpar": {"torchpar", "torchpar, float32"},
    "`exact_matmul`": {"torchpar"},
    "`exact_matmul_t`": {"torchpar, exact_matmul_t"},
    "addmm alone": {"addmm alone"},
    "addmm, `sigmoid_`": {"addmm, sigmoid_", "eager"},
    "`torch.addmm`": {"torch.addmm"},
    "`torch.maximum`": {"torch.maximum", "eager"},
    "PyTorch": {"eager"},
}
POWERS = {f"2{power}": str(2 ** int(n)) for power, n in (("²²", 22), ("²⁶", 26), ("²⁸", 28))}


def measured_on_h200(operator: str, what: str, column: str) -> str:
    """Return the time, or the error, in a cell: "" if it was not measured."""
    shapes, dtype, *mode = what.split(", ")
    shapes = re.sub(r" (×|→) ", lambda match: {"×": "x", "→": "->"}[match[1]], shapes)
    shape = " ".join(POWERS.get(one, one) for one in shapes.split(" and "))
    case = of_operator(operator, shape, dtype, *mode)
    with (RESULTS_H200 / "operators.csv").open() as file:
        rows = [one for one in csv.DictReader(file) if case.items() <= one.items()]
    assert rows, what
    contestant = column.removeprefix("error of ")
    found = [
        one
        for one in rows
        if one["ok"] == "True"
        and (
            one["contestant"] == one["config"]
            if contestant == "the fastest kernel"
            else one["contestant"] in H200_COLUMNS[contestant]
        )
    ]
    assert len(found) <= 1 or contestant == "the fastest kernel"
    if not found:
        return ""
    fastest = min(found, key=lambda one: float(one["p20_ms"]))
    if contestant != column:
        return f"{float(fastest['max_error']):.1e}"
    return duration(float(fastest["p20_ms"]) / 1e3)


@pytest.mark.parametrize("page", H200_TABLES)
def test_the_pages_show_what_an_h200_measured(page):
    tables = re.findall(r"^\| on an H200 \|.*\n(?:\|.*\n)+", PAGES[page], re.MULTILINE)
    for operator, table in zip(H200_TABLES[page], tables, strict=True):
        (_, *columns), _, *rows = (
            [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()
        )
        for what, *cells in rows:
            assert cells == [measured_on_h200(operator, what, one) for one in columns], what


def rows_of(page: str, header: str) -> list[list[str]]:
    """Return the cells of the rows of the table on a page whose first line starts so."""
    (table,) = re.findall(
        rf"^\| {re.escape(header)}.*\n\|-.*\n((?:\|.*\n)+)", PAGES[page], re.MULTILINE
    )
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_tuning_shows_where_the_rule_lost():
    lines = rows_of("docs/tuning.md", "operands in bfloat16, or TF32")
    assert len(lines) > 10
    for operator, shape, *how, rule, fastest, tiles, library in (
        (*cells[0].split(", "), *cells[1:]) for cells in lines
    ):
        shape = re.sub(r" (×|→) ", lambda match: {"×": "x", "→": "->"}[match[1]], shape)
        case = of_operator(operator.strip("`"), shape, "tf32" if how == ["TF32"] else "bfloat16")
        name = "operators"
        if how == ["graph"]:
            case, name = case | {"mode": "forward, warm"}, "operators-graphs"
        with (RESULTS_H200 / f"{name}.csv").open() as file:
            rows = [one for one in csv.DictReader(file) if case.items() <= one.items()]
        times = {one["contestant"]: float(one["p20_ms"]) for one in rows if one["p20_ms"]}
        kernels = {one["config"] for one in rows if one["config"] == one["contestant"]}
        best = min((one for one in times if one in kernels), key=times.__getitem__)
        assert tiles.split() == re.findall(r"\d+|[a-z_]{3,}", best), shape
        assert fastest == duration(times[best] / 1e3), shape
        assert rule in ("the library", duration(times["torchpar"] / 1e3)), shape
        (other,) = {"torch.mm, mirrored", "torch.bmm, mirrored", "addmm, sigmoid_"} & times.keys()
        assert library == duration(times[other] / 1e3), shape
        assert times[best] < times["torchpar"]


HOST = {
    "`maximum` of 64 × 64, float32": ("maximum", "no gradient"),
    "`maximum`, where an operand requires a gradient": ("maximum", "forward"),
    "`matmul_t` of 1024 × 1024, bfloat16": ("matmul_t", "no gradient"),
    "`symmetric_matmul` of 1024 × 1024 with C, bfloat16": ("symmetric_matmul", "no gradient"),
    "`linear_sigmoid` of 64 × 64 → 64, bfloat16": ("linear_sigmoid", "no gradient"),
    "`linear_sigmoid`, where its operands require a gradient": ("linear_sigmoid", "forward"),
}


def test_operators_shows_what_a_call_takes_an_h200s_host():
    lines = rows_of("docs/operators.md", "call | µs | µs of PyTorch's call")
    assert len(lines) == len(HOST)
    for what, *cells in lines:
        operator, mode = HOST[what]
        case = {"operator": operator, "mode": mode}
        times = [on_h200("host", "p20_ms", case | one) for one in (OURS, {"contestant": "ATen"})]
        part = on_h200("host", "of_before", case | OURS)
        assert cells == [*(f"{1e3 * ms:.3g}" for ms in times), f"{part:.2g}"], what


def test_operators_shows_what_a_call_takes_beside_the_time_before():
    folder = ROOT / "benchmarks" / "results" / "cpu-2-cores-amd-epyc-family-25-model-17"
    with (folder / "host.csv").open() as file:
        rows = {(r["operator"], r["mode"], r["contestant"]): r for r in csv.DictReader(file)}
    lines = rows_of("docs/operators.md", "call | `torch.ops.torchpar`")
    assert len(lines) == 12
    for what, *cells in lines:
        operator = re.findall(r"`(\w+)`", what)[0]
        mode = "forward" if "gradient" in what else "full" if "backward" in what else "no gradient"
        by_packet, own = (rows[operator, mode, n] for n in ("torch.ops.torchpar", "torchpar"))
        found = by_packet["of_before"], own["of_before"], own["over_aten"]
        assert cells == [f"{float(ratio):.2g}" for ratio in found], what


def test_operators_shows_both_ways_of_a_call():
    folder = ROOT / "benchmarks" / "results" / "cpu-2-cores-amd-epyc-family-25-model-1"
    with (folder / "host.csv").open() as file:
        rows = {(r["operator"], r["mode"], r["contestant"]): r for r in csv.DictReader(file)}
    lines = rows_of("docs/operators.md", "call | µs by Python")
    assert len(lines) == 12
    for what, *cells in lines:
        operator = re.findall(r"`(\w+)`", what)[0]
        mode = "forward" if "gradient" in what else "full" if "backward" in what else "no gradient"
        by_python, aten = (rows[operator, mode, name] for name in ("torch.ops.torchpar", "ATen"))
        by_cpp, by_object = (
            rows[operator, mode, f"{name} by C++"] for name in ("torch.ops.torchpar", "torchpar")
        )
        times = [f"{float(one['us']):.3g}" for one in (by_python, by_cpp, aten)]
        ratios = [f"{float(one['over_aten']):.2g}" for one in (by_cpp, by_object)]
        assert cells == times + ratios, what


def test_muon_shows_what_a_cpu_measured():
    with (RESULTS / "muon.csv").open() as file:
        speedups = {
            row["weight"]: f"{float(row['speedup']):.2g}×"
            for row in csv.DictReader(file)
            if row["contestant"] == "torchpar"
        }
    names = {"126 of different shapes, up to 128 × 141": "126 unequal"}
    shown = {
        names.get(weight, weight.replace(" × ", "x")): cell
        for weights, cells in rows_of("docs/muon.md", "weights | speed-up |")
        for weight, cell in zip(weights.split("; "), cells.split("; "), strict=True)
    }
    assert shown == speedups


def test_muon_shows_what_an_h200_measured():
    graph, eager = {"mode": "CUDA graph"}, {"mode": "eager"}
    for what, *cells in rows_of("docs/muon.md", "matrices | PyTorch's, in a batch"):
        weight = {"weight": what.replace(" × ", "x")} | graph
        columns = ("ATen", "torchpar, standard", "torchpar, gram")
        times = [
            on_h200("muon-newton_schulz", "p20_ms", weight | {"contestant": one}) for one in columns
        ]
        assert cells == [duration(ms / 1e3) for ms in times], what
    for what, *cells in rows_of("docs/muon.md", "weights | `torch.optim.Muon` | torchpar | torchp"):
        cases = [TORCH_MUON | eager, OURS | eager, OURS | graph]
        times = [on_h200("muon-graphs", "p20_ms", {"weight": what} | case) for case in cases]
        assert cells == [duration(ms / 1e3) for ms in times], what


@pytest.mark.parametrize("gpu, folder", [("H200", RESULTS_H200), ("H100", RESULTS_H100)])
def test_muon_shows_steps_of_each_gpu(gpu, folder):
    lines = rows_of("docs/muon.md", f"on an {gpu} | `torch.optim.Muon` | torchpar | speed-")
    assert len(lines) == 9
    for what, *cells in lines:
        other, own = ({"weight": what} | one for one in (TORCH_MUON, OURS))
        times = [on_h200("muon", "p20_ms", case, folder) for case in (other, own)]
        ratio, queued = f"{times[0] / times[1]:.2g}", ""
        # A queue does not hold the launches of torch.optim.Muon for many matrices.
        if what[:2] not in ("48", "50"):
            queued = f"{on_h200('muon', 'queued_speedup', own, folder):.2g}"
        assert cells == [*(duration(ms / 1e3) for ms in times), ratio, queued], what


def test_tuning_shows_where_the_rule_lost_on_an_h100():
    lines = rows_of("docs/tuning.md", "on an H100, in bfloat16")
    assert len(lines) == 4
    for what, *cells in lines:
        operator, shape = what.strip("`").replace("`", "").split(", ")
        shape = shape.replace(" × ", "x").replace(" → ", "->")
        chosen = {"matmul_t": "64x128x64 w4 s4 tma", "linear_sigmoid": "128x128x64 w4 s3 tma"}
        m, n, k, warps, stages, variant = cells[2].split()
        fastest = f"{m}x{n}x{k} w{warps} s{stages} {variant}"
        library = {"matmul_t": "torch.mm, mirrored", "linear_sigmoid": "addmm, sigmoid"}
        times = [
            on_h200(
                "autotune",
                "p20_ms",
                {"operator": operator, "shape": shape, "contestant": one},
                RESULTS_H100,
            )
            for one in (chosen[operator], fastest, library[operator])
        ]
        expected = [duration(ms / 1e3) for ms in times]
        assert [cells[0], cells[1], cells[3]] == expected, what


def test_the_page_shows_what_nsight_and_the_emulator_count():
    page = PAGES["docs/performance.md"].partition("\n## Beside a profiler\n")[2]
    with (RESULTS_H200 / "ptx-counters.csv").open() as file:
        rows = [*csv.DictReader(file)]
    pairs = [both for both in zip(rows[::2], rows[1::2], strict=True)]
    columns = "registers", "shared_load_wavefronts", "shared_store_wavefronts"
    shown = re.findall(r"^\| `(\w+)`[^|]*\|(.*)\|$", page, re.MULTILINE)
    assert [(name, cells.replace(",", "").split(" | ")) for name, cells in shown] == [
        (
            both[0]["kernel"],
            f" {' | '.join(one[name] for name in columns for one in both)} ".split(" | "),
        )
        for both in pairs
    ]


@pytest.mark.parametrize(
    "name, page",
    [
        ("speedrun-ladder", "speedrun"),
        ("speedrun-tried-validated", "speedrun"),
        ("speedrun-lesson-validated", "training"),
    ],
)
def test_the_pages_show_the_measured_recipes(name, page):
    changes = {recipe.name: recipe.change for group in speedrun.GROUPS.values() for recipe in group}
    lines = speedrun.summary(list(results(name)), changes)
    table = markdown([list(lines[0]), *(list(line.values()) for line in lines)])
    assert f"\n\n{table}\n" in PAGES[f"docs/{page}.md"]


def test_the_readme_shows_the_mission():
    """A stranger finds each part of the mission in the README."""
    parts = (
        *("python3 -m venv", "examples/train_ddp.py", "import torchpar", "linear_sigmoid("),
        *("matmul_t(", "maximum(", "**Measured on one", "**From loops", "python -m nogpu"),
        *("torchpar verify", "benchmarks run optimizers"),
    )
    assert [part for part in parts if part not in README] == []


def test_each_page_of_the_site_says_first_for_whom_it_is():
    def first_paragraph(text: str) -> str:
        return text.partition("\n# ")[2].split("\n\n")[1]

    for page, text in PAGES.items():
        if page.startswith("docs/"):
            assert re.search(r"\b(is for|[Ff]or readers)\b", first_paragraph(f"\n{text}")), page
    assert first_paragraph("\n# A\n\nOne.\n\nThis is for you.") == "One."


def test_the_readmes_command_runs_the_script_of_the_page_of_kernels():
    (script,) = re.findall(r"`python -m nogpu [^`]*\b(examples/\S+\.py)`", README)
    (shown,) = re.findall(r"```py\n(# scale.py\n.*?)```", PAGES["docs/ptx.md"], re.DOTALL)
    _, *lines = (ROOT / script).read_text().splitlines()  # the first one is the licence
    assert [line.partition("  #")[0] for line in lines] == shown.splitlines()[1:]


@pytest.mark.parametrize("page", ["README.md", "nogpu/README.md"])
def test_the_readmes_commands_name_scripts_that_there_are(page):
    lines = "\n".join(re.findall(r"^```sh\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE))
    scripts = re.findall(r"(?<!\S)[\w./]+\.(?:py|cu)\b", lines)
    assert scripts
    assert [one for one in scripts if not (ROOT / one).exists()] == []


# The README's table of operators


def is_cast(operator: Operator) -> bool:
    args = [torch.ones(shape) for shape in operator.small[0]]
    with torch.autocast("cpu", torch.bfloat16):
        return operator.op(*args).dtype == torch.bfloat16


def test_the_readmes_table_is_what_the_record_of_operators_says():
    lines = (
        re.search(r"^\| \| `maximum`.*\n((?:\|.*\n)+)", README, re.MULTILINE).group(0).splitlines()
    )
    (_, *names), _, *rows = (
        [cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines
    )
    assert (
        set(names) == set(OPERATORS) == set(re.findall(r"`torch\.ops\.torchpar\.(\w+)\(", README))
    )
    for row, *cells in rows:
        dtypes = [
            getattr(torch, name)
            for name in re.findall(r"\b(?:(?:b?float|u?int|complex)\d+|bool)\b", row)
        ]
        for name, cell in zip(names, cells, strict=True):
            if dtypes:
                assert {dtype in OPERATORS[name].dtypes for dtype in dtypes} == {cell == "yes"}
            elif row == "torch.autocast casts to its dtype":
                assert cell == ("yes" if is_cast(OPERATORS[name]) else "no")
            elif row in ("cpu", "cuda"):
                assert cell == ("ATen" if row == "cpu" else "Triton")
            else:  # tests/ops/test_our_operators.py compares the cell
                assert row in RULES


def test_the_published_hash_is_the_one_that_is_checked():
    assert re.findall(r"prints `([0-9a-f]{64})`", README) == [EXPECTED["mlp"]]
    exact = (ROOT / "docs" / "exact.md").read_text()
    assert EXPECTED["gpt"] in exact
    assert EXPECTED["lesson"] in exact


# Code

ELSEWHERE = (
    "docs/own_model.md",
    "docs/trainers.md",
)  # below, and in tests/examples/test_trainers.py


# In opcheck.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    "page",
    [
        # This one tries an operator by all rules.
        pytest.param(page, marks=[pytest.mark.slow] * (page == "docs/citizen.md"))
        for page in PAGES
        if blocks(page) and page not in ELSEWHERE
    ],
)
def test_code_of_pages_runs(page, monkeypatch, tmp_path, request):
    monkeypatch.chdir(tmp_path)
    if page == "docs/muon.md":
        request.getfixturevalue("world")
    # With Inductor the operators are compiled in tests/ops/test_operators_compile.py.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    left_out = "join_world" if torch.cuda.is_available() else "join_world|CUDAGraph"
    execute(*(block for block in blocks(page) if not re.search(left_out, block)))


def test_a_save_writes_metadata_last(world, monkeypatch, tmp_path):
    # docs/muon.md takes a folder with this file for a complete checkpoint.
    weights = {"weight": torch.ones(2)}
    dcp.save(weights, checkpoint_id=tmp_path / "step-1")

    def is_killed(*args):
        raise OSError

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", is_killed)
    with pytest.raises(CheckpointException):
        dcp.save(weights, checkpoint_id=tmp_path / "step-2")
    assert (tmp_path / "step-2").is_dir()
    assert [path.parent.name for path in tmp_path.glob("step-*/.metadata")] == ["step-1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "page, accuracy, last_line",
    [("tour", 0.97, r"accuracy (\S+) on 2 ranks\n"), ("own_model", 0.9, r"test accuracy (\S+)\n")],
)
def test_scripts_of_pages_learn_on_two_ranks(
    fork_server, tmp_path, monkeypatch, page, accuracy, last_line
):
    code = blocks(f"docs/{page}.md")
    (script,) = (block for block in code if "join_world" in block)
    (tmp_path / "script.py").write_text(script)
    ranks = forked_ranks(2, str(tmp_path / "script.py"), cwd=tmp_path)
    assert [status for status, _, _ in ranks] == [0, 0], ranks
    assert float(re.fullmatch(last_line, "".join(out for _, out, _ in ranks)).group(1)) > accuracy
    if page == "own_model":  # its model is loaded by the next block
        monkeypatch.chdir(tmp_path)
        names = execute(script.partition("with join_world()")[0] + code[-1])
        assert names["classes"].tolist() == [0, 1, 2]
