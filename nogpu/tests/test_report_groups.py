# SPDX-License-Identifier: MIT
"""The report of many launches: groups, those that took longest, faults last, and JSON."""

import json
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from pages import Page
from processes import ROOT

from nogpu import Fault, Launch, Report, command
from nogpu.data_sheets import DATA_SHEETS
from nogpu.machine.instruction_counts import Column, Counts
from nogpu.machine.parse import parse
from nogpu.record import source
from nogpu.record.faults import HostFault
from nogpu.record.launch import CapturedGraph, counted
from nogpu.record.time import work_of
from nogpu.report import page
from nogpu.report.data import COUNTED
from nogpu.triton import driver

PTX = """
.version 8.4
.target sm_90
.address_size 64
.visible .entry NAME()
{
  ret;
}
"""


def launch(kernel="scale", grid=(4, 1, 1), block=64, line=1, **others) -> Launch:
    """A launch whose PTX depends on its block."""
    made = Launch(
        kernel,
        "sm_90",
        grid,
        4,
        0,
        ptx=PTX.replace("NAME", f"{kernel}_{block}"),
        launched=("/tmp/a.py", line),
        constants={"BLOCK": str(block)},
        **others,
    )
    made.counts = Counts(parse(made.ptx))
    return made


def fault(kind="error", **others) -> Fault:
    return Fault(kind, "race", "two warps write", "scale", (1, 0, 0), 7, None, **others)


def thousand() -> Report:
    """1,000 launches of two kernels, each in two configurations, and two faults."""
    draw = random.Random(0)
    launches = [
        launch(
            ("scale", "add")[k % 2],
            (1 + k // 250, 1, 1),
            (64, 128)[k // 2 % 2],
            line=k + 1,
            seconds=draw.random(),
            instructions=1 + k % 4,
        )
        for k in range(1000)
    ]
    return Report(launches, [fault(), fault("note")])


def test_launches_are_grouped_by_kernel_and_configuration():
    report = thousand()
    groups = report.groups()
    assert [(one.first.kernel, one.first.constants["BLOCK"]) for one in groups] == [
        ("add", "128"),
        ("scale", "128"),
        ("add", "64"),
        ("scale", "64"),
    ]
    assert [one.instructions for one in groups] == [1000, 750, 500, 250]
    assert sorted(n for one in groups for n in one.numbers) == list(range(1, 1001))
    scale = groups[3]
    assert scale.numbers == list(range(1, 1001, 4))
    assert scale.seconds == sum(one.seconds for one in report.launches[::4])
    assert scale.name == "scale[1×1×1 to 4×1×1]"
    assert scale.launched == "launched first at /tmp/a.py:1, last at /tmp/a.py:997"
    assert scale.configuration == "BLOCK=64, 4 warps"


def test_an_autotuned_configuration_is_a_group():
    launches = [launch(configuration=name) for name in ("BLOCK: 64", "BLOCK: 64, num_stages: 2")]
    configurations = [one.configuration for one in Report(launches, []).groups()]
    assert [one.partition("autotuned: ")[2] for one in configurations] == [
        "BLOCK: 64",
        "BLOCK: 64, num_stages: 2",
    ]


def test_groups_of_a_kernel_are_told_apart_by_types():
    launches = [
        launch(block=64, specialization={"x": "*fp32", "n": "i32", "num_stages": "3"}),
        launch(block=65, specialization={"x": "*fp16", "n": "i32", "num_stages": "3"}),
        launch("add", specialization={"x": "*fp64", "n": "i32"}),
    ]
    words = [one.configuration for one in Report(launches, []).groups()]
    assert words == [
        "BLOCK=64, x: *fp32, 4 warps",
        "BLOCK=65, x: *fp16, 4 warps",
        "BLOCK=64, 4 warps",
    ]


def test_a_thousand_launches_are_a_screen_that_ends_with_the_errors():
    report = thousand()
    lines = str(report).splitlines()
    head, *rows = lines[:9]
    assert head.split() == ["launches", "instructions", "seconds", "kernel,", "for", "sm_90"]
    assert [row.split()[0] for row in rows[::2]] == ["250"] * 4
    assert lines[9] == "the 10 launches that took longest:"
    slowest = sorted(range(1000), key=lambda k: -report.launches[k].seconds)[:10]
    assert [int(row.split()[0]) - 1 for row in lines[11:21]] == slowest
    assert lines[21:] == [
        "· note: race in scale",
        "    line 7 of the PTX",
        "    program (1, 0, 0): two warps write",
        "✗ error: race in scale",
        "    line 7 of the PTX",
        "    program (1, 0, 0): two warps write",
        "launches: 1000; 1 error, 0 warnings, 1 note",
    ]


def test_all_launches_are_listed_on_demand():
    report = thousand()
    lines = report.as_text(lists_launches=True).splitlines()
    assert [int(row.split()[0]) for row in lines[1:1001]] == list(range(1, 1001))
    assert lines[1000].endswith("add[4×1×1], launched at /tmp/a.py:1000")
    assert lines[1001:] == str(report).splitlines()


@pytest.mark.parametrize("count", [0, 1, 10, 11])
def test_those_that_took_longest_are_named_where_there_are_more_than_ten(count):
    text = str(Report([launch(line=1) for _ in range(count)], []))
    assert ("that took longest" in text) == (count > 10)
    assert ("launches  instructions" in text) == (count > 0)
    assert text.endswith(f"launches: {count}; 0 errors, 0 warnings, 0 notes")


def test_what_a_kernel_has_printed_names_its_launch():
    text = str(Report([launch(), launch(printed=["x: 1"])], []))
    assert text.startswith("printed by launch 2, scale[4×1×1]:\n  x: 1\nlaunches")


def test_json_has_everything():
    report = thousand()
    at = ("/tmp/a.py", 3)
    of_program = HostFault("warning", "freed input", "freed", source=at, earlier=("captured", at))
    report.faults.append(of_program)
    report.graphs.append(CapturedGraph(at, 7, 2, 3))
    found = json.loads(report.as_json())
    assert found["version"] == 1
    assert found["counts"] == {"launches": 1000, "errors": 1, "warnings": 1, "notes": 1}
    line = {"file": "/tmp/a.py", "line": 3}
    assert found["launches"][2] == {
        "kernel": "scale",
        "grid": [1, 1, 1],
        "instructions": 3,
        "seconds": report.launches[2].seconds,
        "sampled_programs": None,
        "ended": None,
        "launched": line,
        "printed": [],
    }
    group = found["groups"][1]
    assert group["launches"] == list(range(2, 1000, 4))
    assert group["seconds"] == report.groups()[1].seconds
    assert group["grids"] == [[n, 1, 1] for n in (1, 2, 3, 4)]
    assert (group["first_launched"], group["last_launched"]["line"]) == (line, 999)
    assert found["graphs"] == [{"captured": line, "operators": 7, "launches": 2, "replays": 3}]
    first, _, last = found["faults"]
    assert (first["kind"], first["program"], first["ptx_line"]) == ("error", [1, 0, 0], 7)
    assert first["earlier"] is None
    assert (last["kernel"], last["program"], last["source"]) == (None, None, line)
    assert last["earlier"] == {"word": "captured", **line}


def test_each_key_of_json_is_documented():
    section = (ROOT.parent / "docs" / "ptx.md").read_text("utf-8").partition("### For machines")[2]
    table, _, of_group = section.partition("\n## ")[0].partition("| key of a group |")
    report = thousand()
    report.graphs.append(CapturedGraph(None, 7, 2, 3))
    found = json.loads(report.as_json())
    for name, value in found.items():
        row = of_group if name == "groups" else row_of(table, name)
        for key in value[0] if isinstance(value, list) else value if name == "counts" else ():
            assert f"`{key}`" in row, (name, key)
    group = found["groups"][0]
    assert set(group["time"]) == set(DATA_SHEETS)
    for key in (*(group["counters"].keys() - COUNTED), *group["time"]["H100"]):
        assert f"`{key}`" in row_of(of_group, "counters") + row_of(of_group, "time"), key


def row_of(table: str, key: str) -> str:
    (row,) = [line for line in table.splitlines() if line.startswith(f"| `{key}` |")]
    return row


def test_json_has_the_sums_of_counters_and_the_time_of_the_first_launch():
    shared = """
.version 8.4
.target sm_90
.address_size 64
.visible .entry touch(.param .u64 p)
.reqntid 32
{
  .reg .b64 %rd<2>;
  .reg .b32 %r<3>;
  .reg .f32 %f<2>;
  ld.param.b64 %rd1, [p];
  mov.b32 %r1, %tid.x;
  ld.global.f32 %f1, [%rd1];
  add.f32 %f1, %f1, %f1;
  bar.sync 0;
  ret;
}
"""
    made = []
    for executions in (1, 2):
        one = launch()
        one.ptx = shared
        one.counts = Counts(parse(shared))
        loads, adds = (
            n
            for n, i in enumerate(one.counts.kernel.instructions)
            if i.opcode in ("ld.global.f32", "add.f32")
        )
        one.counts.table[loads, Column.EXECUTIONS] = executions
        one.counts.table[loads, Column.REQUESTS : Column.REQUESTS + 4] = (
            executions,
            4 * executions,
            executions,
            executions,
        )
        one.counts.table[adds, Column.EXECUTIONS] = executions
        one.counts.table[adds, Column.THREADS] = 32 * executions
        one.counts.distinct, one.counts.distinct_read = np.ones(1, np.int64), 1
        made.append(one)
    report = Report([*made, made[1]], [])
    (group,) = json.loads(report.as_json())["groups"]
    found = group["counters"]
    assert found["instructions"] == {"global memory": 5, "floating point": 5}
    assert (found["threads"], found["flops"], found["barriers"]) == (160, {"f32": 160}, 0)
    assert found["global"] == {
        "requests": 5,
        "bytes": 20,
        "transactions": 5,
        "least": 5,
        "distinct": 3,
    }
    assert set(found["shared"].values()) == {0}
    assert (found["distinct_read"], found["distinct_written"]) == (3, 0)
    first = made[0].time["H200"]
    assert group["time"]["H200"] == {
        "microseconds": first.microseconds,
        "binds": "launch",
        "waves": first.waves,
        "terms": first.terms,
    }


@pytest.mark.parametrize("ctas", [1, 2])
def test_each_cta_of_a_cluster_is_counted(ctas):
    one = launch(ctas=ctas)
    one.ptx = PTX.replace("NAME", "wait").replace("  ret;", "  bar.sync 0;\n  ret;")
    one.counts = Counts(parse(one.ptx))
    one.counts.table[0, Column.EXECUTIONS] = one.programs * ctas * one.warps * 3
    assert "barriers: each warp arrives at 3" in counted(one)
    assert work_of(one).programs == 4 * ctas


def test_a_page_of_a_thousand_launches_lists_them(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "section", lambda group, draws: drawn.append(draws))
    monkeypatch.setattr(page, "SECTIONS", 3)
    monkeypatch.setattr(page, "DRAWN", 1)
    monkeypatch.setattr(page, "find_spec", lambda name: True)
    monkeypatch.setattr(page, "TEMPLATE", tmp_path / "template.html")
    text = page.Path(page.__file__).with_name("report.html").read_text("utf-8")
    before, _, rest = text.partition("{% for one in sections %}")
    page.TEMPLATE.write_text(before + rest.partition("</section>\n{% endfor %}")[2], "utf-8")
    drawn: list[bool] = []
    report = thousand()
    path = tmp_path / "page.html"
    path.write_text(report.as_html("many"), "utf-8")
    found = Page(path)
    groups, slowest, launches = found.tables
    assert drawn == [True, False, False]
    assert [row[3] for row in groups[1:]] == [one.name for one in report.groups()]
    assert len(slowest) == 11
    assert [row[0] for row in launches[1:]] == [str(n) for n in range(1, 1001)]
    assert "counters are left out here: 1" in found.text
    assert found.addresses == ["#kernel-1", "#kernel-2", "#kernel-3"]


def test_the_command_writes_json_and_lists_launches(tmp_path, capsys):
    script, file = tmp_path / "script.py", tmp_path / "report.json"
    script.write_text("import torch\nprint(1)", "utf-8")
    assert command.main(["--launches", "--json", str(file), str(script)]) == 0
    assert json.loads(file.read_text("utf-8"))["counts"]["launches"] == 0
    assert capsys.readouterr().out.startswith("1\nlaunches: 0")
    with pytest.raises(SystemExit, match="2"):
        command.main([f"--json={file}", f"--report={file}", str(script)])
    assert f"--report and --json both name {file}; name two files" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        command.main(["--json", "-", str(script)])
    assert "--json: is -, the standard output, where the script prints, too; name a file" in (
        capsys.readouterr().err
    )
    precious = tmp_path / "precious.py"
    precious.touch()
    with pytest.raises(SystemExit, match="2"):
        command.main([f"--json={precious}", str(script)])
    assert (
        "exists, and is no file of JSON; name a file that ends in .json" in capsys.readouterr().err
    )


def test_lines_of_libraries_launch_for_the_program(monkeypatch):
    def place_from(module: str) -> tuple[str, int] | None:
        code = compile("def call(function): return function()", "library.py", "exec")
        exec(code, names := {"__name__": module})
        return names["call"](source.program_line)

    for module in ("nogpu.cuda.graph", "triton.runtime.jit"):
        assert place_from(module)[0] == __file__
    assert place_from("other_library.kernels") == ("library.py", 1)
    monkeypatch.setitem(sys.modules, "other_library", SimpleNamespace(__nogpu__={}))
    assert place_from("other_library.kernels")[0] == __file__


def test_constants_and_types_are_those_of_the_compiled_kernel():
    source = SimpleNamespace(
        fn=SimpleNamespace(arg_names=["x", "n", "pair", "ACT"]),
        signature={"x": "*fp32", "n": "i32", "pair": ("i32", "constexpr"), "ACT": "constexpr"},
        constants={(2, 1): 1, (3,): len},
        attrs={(0,): [["tt.divisibility", 16]], (1,): []},
    )
    assert driver._constants(source) == {"pair[1]": "1", "ACT": "len"}
    assert driver._specialization(source, SimpleNamespace(num_stages=3, maxnreg=None)) == {
        "x": "*fp32, a multiple of 16",
        "n": "i32",
        "pair": "('i32', 'constexpr')",
        "num_stages": "3",
    }
