# SPDX-License-Identifier: MIT
"""Pages of operators show what the command prints, and which thread loads which numbers."""

import re
import runpy
from unittest.mock import patch

import pytest
import torch
import triton
import walk
from commands import ROOT

from nogpu import Launch, command, emulate
from nogpu.machine.address_space import MISALIGNED, OUT_OF_BOUNDS
from nogpu.machine.instruction_counts import SECTOR
from torchpar.kernels import matmul_t
from torchpar.kernels.rule import Tiles

COUNTERS = runpy.run_path(str(ROOT / "docs" / "counters.py"))
SECTION = re.compile(
    r"^## Executed without a GPU\n.*?```py\n(.*?)```\n\n```\n\$ [^\n]*\n(.*?)```",
    re.MULTILINE | re.DOTALL,
)


def without_seconds(text: str) -> str:
    return re.sub(r" \d+\.\d{3}  ", "  ", text)


@pytest.mark.parametrize("page", ["maximum", "matmul_t", "linear_sigmoid"])
def test_a_page_shows_what_the_command_prints(page, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("nogpu.record.source.STARTED_IN", str(tmp_path))
    code, printed = SECTION.search((ROOT / "docs" / f"{page}.md").read_text("utf-8")).groups()
    script = tmp_path / "script.py"
    script.write_text(code, "utf-8")
    assert command.main([str(script)]) == 0
    assert without_seconds(capsys.readouterr().out) == without_seconds(printed)


def test_the_picture_of_threads_is_true():
    """What docs/maximum.md says of it, too."""
    pytest.importorskip("matplotlib")
    loads = runpy.run_path(str(ROOT / "docs" / "threads.py"))["loads"](4096)
    numbers = [n for one in loads for n in range(one.first, one.first + one.count)]
    assert sorted(numbers) == list(range(4096))  # each once
    assert {one.count for one in loads} == {4}
    assert {one.program for one in loads} == {0, 1, 2, 3}
    for one in loads:
        assert one.first // 1024 == one.program
        assert one.first % 512 == 4 * one.thread


def test_the_first_fault_of_the_page_is_what_the_command_prints(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "ptx.md").read_text("utf-8")
    (code,) = re.findall(r"```py\n(# scale.py\n.*?)```", page, re.DOTALL)
    (shown,) = re.findall(r"```\n\$ python -m nogpu scale.py\n(.*?)```", page, re.DOTALL)
    (tmp_path / "scale.py").write_text(code, "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nogpu.record.source.STARTED_IN", str(tmp_path))
    assert command.main(["scale.py"]) == 1

    def same_everywhere(text: str) -> list[str]:
        # Without the time, and what depends on Triton's version.
        return re.sub(r"[\d,]+ +\d+\.\d{3}|line \d+ of the PTX", "", text).split()

    assert same_everywhere(capsys.readouterr().out) == same_everywhere(shown)


README = (ROOT / "nogpu" / "README.md").read_text("utf-8")
PRINTED = {  # by a command of nogpu's README; the pattern finds the command, and what it prints
    command: rf"`python -m nogpu {command}`[^`]*```\n(.*?)```"
    for command in ("examples/scale.py", "--counters --time transpose.py")
}


@pytest.mark.parametrize("given", PRINTED)
def test_nogpus_readme_shows_what_its_commands_print(given, tmp_path, monkeypatch, capsys):
    (shown,) = re.findall(PRINTED[given], README, re.DOTALL)
    if "transpose" in given and not triton.__version__.startswith(COUNTERS["TRITON"]):
        pytest.skip(f"the registers are those of Triton {COUNTERS['TRITON']}")
    (code,) = re.findall(r"```py\n(# transpose.py\n.*?)```", README, re.DOTALL)
    (tmp_path / "transpose.py").write_text(code, "utf-8")
    folder = tmp_path if "transpose" in given else ROOT
    monkeypatch.chdir(folder)
    monkeypatch.setattr("nogpu.record.source.STARTED_IN", str(folder))
    status = command.main(given.split())
    printed = capsys.readouterr().out
    assert status == int("✗ error" in printed)
    lines = re.sub(r"\d+\.\d{3}  |line \d+ of the PTX", "", printed).splitlines()
    wanted = re.sub(r"\d+\.\d{3}  |line \d+ of the PTX", "", shown).splitlines()
    assert [line for line in wanted if line not in lines] == []
    if "transpose" in given:  # of the tiles, the second launch
        stores = [line.split() for line in lines if re.search("global +store", line)]
        assert {one[5] for one in stores} == {"131,072", "1,048,576"}
        assert any(line.startswith("H200  7.5 µs") for line in lines)


def test_each_name_of_a_fault_is_explained():
    page = (ROOT / "docs" / "ptx.md").read_text("utf-8")
    table = page.partition("## What it finds")[2].partition("\n\nAn *error*")[0]
    explained = {
        name
        for names in re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE)
        for name in names.split(", ")
    }
    files = (ROOT / "nogpu" / "src" / "nogpu").rglob("*.py")
    code = "".join(path.read_text("utf-8") for path in files)
    noted = re.findall(r"""\.fault\(\s*(?:"\w+"|kind), "([a-z ]+)",""", code)
    causes = re.findall(r"""Cause\(\s*"([a-z ]+)",""", code)
    raised = re.findall(r"""PtxError\((?:[^()]|\([^()]*\))*?, "([a-z ]+)"\s*\)""", code)
    raised = [name for name in raised if len(name.split()) < 3]  # others are reasons
    found = {*noted, *causes, *raised, "race between programs", "invalid operation"}
    found |= {OUT_OF_BOUNDS, MISALIGNED}
    assert {"deadlock", "endless loop", "misaligned access", "missing fence"} <= found
    assert found <= explained, found - explained


def lines_of_the_table(operands: str) -> list[str]:
    if not triton.__version__.startswith(COUNTERS["TRITON"]):
        pytest.skip(f"the table is of Triton {COUNTERS['TRITON']}")
    page = (ROOT / "docs" / "performance.md").read_text("utf-8")
    found = [line for line in page.splitlines() if f" | {operands} | " in line]
    assert found
    return found


@pytest.mark.parametrize(
    "operands",
    [
        pytest.param(name, marks=[] if " and " in name else pytest.mark.slow)
        for name in COUNTERS["CALLS"]
    ],
)
def test_kernels_take_what_the_table_says(operands):
    """docs/performance.md: a sector, a bank conflict or a register more is noticed."""
    launches = COUNTERS["elementwise_launches"](operands)
    assert launches
    for launch in launches:
        assert within_limits(launch)
    rows = [COUNTERS["elementwise_row"](one, operands) for one in launches]
    assert rows == lines_of_the_table(operands)


@pytest.mark.slow  # products of 512³ and 1024³
@pytest.mark.parametrize("name", COUNTERS["PRODUCTS"])
def test_products_take_what_the_table_says(name):
    product = COUNTERS["PRODUCTS"][name]
    launch = COUNTERS["product_launch"](name)
    moved = launch.counters.sums("global").transactions * SECTOR
    assert product.bytes_of_tiles() <= moved <= 1.1 * product.bytes_of_tiles()
    assert within_limits(launch)
    assert launch.counters.total.most_in_flight > 0
    row = COUNTERS["matrix_row"](launch, product)
    tiles = " ".join(map(str, product.tiles))
    of_product = [
        line
        for line in lines_of_the_table(product.operands)
        if f" | {tiles} | " in line and f"`{launch.kernel}`" in line
    ]
    assert of_product == [row]


def within_limits(launch: Launch) -> bool:
    """Whether a launch moves at most 1.1 times the least, and spills nothing."""
    spaces = [launch.counters.sums(space) for space in ("global", "shared")]
    ratios = [one.ratio for one in spaces if one.least]
    return max(ratios) <= 1.1 and launch.resources.spilled_bytes == 0


def test_the_table_has_no_other_products():
    page = (ROOT / "docs" / "performance.md").read_text("utf-8")
    rows = page.partition("\n## Products\n")[2].partition("\n## ")[0].count("\n| `")
    assert rows == len(COUNTERS["PRODUCTS"])


def test_bank_conflicts_are_beyond_the_limits():
    """Of float32 whose rows are contiguous, which the launchers copy."""
    x = torch.randn(64, 64)
    with (
        patch("torchpar.kernels.matmul_t.by_columns", lambda t, precision: t),
        patch("torchpar.kernels.matmul_t.empty_by_columns", lambda t, precision: t),
        emulate() as gpu,
    ):
        matmul_t.symmetric_matmul(x, x, "ieee", None, tiles=Tiles(32, 32, 16, 4, 3))
    assert not within_limits(gpu.launches[0])


def test_the_walk_of_the_transpose_is_true():
    """docs/ptx.md has these kernels, and their counters."""
    page = (ROOT / "docs" / "ptx.md").read_text("utf-8")
    section = page.partition("### A slow transpose")[2].partition("\n## ")[0]
    for kernel in (walk.by_rows, walk.by_tiles):
        assert kernel.src.strip() in section
    x, out = torch.randn(256, 256), torch.empty(256, 256)
    launches = {
        "by_rows[(256,)](x, out, 256, BLOCK=256)": lambda: walk.by_rows[(256,)](
            x, out, 256, BLOCK=256
        ),
        "by_tiles[(64, 4)](x, out, 256, ROWS=4, COLUMNS=64)": lambda: walk.by_tiles[(64, 4)](
            x, out, 256, ROWS=4, COLUMNS=64
        ),
        "by_tiles[(8, 8)](x, out, 256, ROWS=32, COLUMNS=32)": lambda: walk.by_tiles[(8, 8)](
            x, out, 256, ROWS=32, COLUMNS=32
        ),
    }
    steps = section.split("\n**")[1:]
    for step, (code, launch) in zip(steps, launches.items(), strict=True):
        with emulate() as gpu:
            launch()
        assert code in step
        assert torch.equal(out, x.T)
        lines = [
            f"| {one.what} | {one.space} | {one.requests:,} | {one.transactions:,} "
            f"| {one.least:,} | {one.per_request:.4g} |"
            for one in gpu.launches[0].counters.accesses
        ]
        assert lines == [
            line for line in step.splitlines() if line.startswith(("| load", "| store"))
        ]


def test_the_example_of_graphs_is_what_the_command_prints(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "graphs.md").read_text("utf-8")
    (code,) = re.findall(r"```py\n(# train.py\n.*?)```", page, re.DOTALL)
    (shown,) = re.findall(r"```\n\$ python -m nogpu [^\n]*\n(.*?)```", page, re.DOTALL)
    (tmp_path / "train.py").write_text(code, "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nogpu.record.source.STARTED_IN", str(tmp_path))
    assert command.main(["--cuda-is-cpu", "train.py"]) == 1
    assert capsys.readouterr().out == shown


GRAPHS = ("watcher", "graph", "capture", "context", "stale_streams")


def test_each_fault_of_graphs_is_explained():
    page = (ROOT / "docs" / "graphs.md").read_text("utf-8")
    table = page.partition("## What is found")[2].partition("\n\nWhat a replay")[0]
    explained = re.findall(r"^\| ([a-z][^|]+) \| [a-z`]", table, re.MULTILINE)[1:]
    folder = ROOT / "nogpu" / "src" / "nogpu" / "cuda"
    code = "".join((folder / f"{name}.py").read_text("utf-8") for name in GRAPHS)
    refused = re.findall(r"""\.refuse\(\s*"([^"]+)",""", code)
    noted = re.findall(r"""note(?:_gradient)?\(\s*"(?:error|warning)"[^,]*,\s*"([^"]+)",""", code)
    assert len(set(refused)) > 4 < len(set(noted))
    assert sorted({*refused, *noted}) == sorted(explained)
