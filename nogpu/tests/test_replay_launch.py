# SPDX-License-Identifier: MIT
"""A launch as a recording: warps, barriers, copies in flight, and the two accesses of a fault."""

import copy
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import cuda_programs
import gluon_cases
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from faults import FAULTS
from pages import Page, check_in, chromium
from right import RIGHT
from small_kernels import matmul_kernel
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

import nogpu.cuda
from nogpu import command, emulate
from nogpu.report import launch_recording

Recording = dict[str, Any]
slow = pytest.mark.slow


def recorded(call: Callable[[], object], **options: Any) -> Recording:
    with emulate(**{"traces": 8, **options}) as gpu:
        call()
    made = gpu.report().recording("a test", "python -m nogpu test.py")
    assert wrong_of(made) == []
    return json.loads(launch_recording.as_json(made))


def wrong_of(made: Recording) -> list[str]:
    """Say what is wrong with a recording: its format, and times that cannot be."""
    found, facts = [], made["otherData"]
    (end,) = (stop for _, stop in facts["steps"])
    times = [one["ts"] for one in made["traceEvents"] if one["ph"] != "M"]
    if times != sorted(times):
        found.append("events are not in the order of time")
    named = {(one["pid"], one.get("tid")) for one in of(made, "M")}
    for one in [*of(made, "X"), *of(made, "i")]:
        where = f"{one['name']} at {one['ts']}"
        duration = one.get("dur", 0)
        if not math.isfinite(duration) or one["ts"] < 0 or duration < (one["ph"] == "X"):
            found.append(f"{where} has a wrong time")
        if one["ts"] + duration > end:
            found.append(f"{where} ends behind the step")
        if (one["pid"], one["tid"]) not in named or (one["pid"], None) not in named:
            found.append(f"{where} is in a row without a name")
        if one["cat"] not in facts["kinds"]:
            found.append(f"{where} is of an unknown kind")
    return found + overlaps(made)


def overlaps(made: Recording) -> list[str]:
    rows = defaultdict(list)
    for one in of(made, "X"):
        rows[one["pid"], one["tid"]].append((one["ts"], one["ts"] + one["dur"]))
    spans = [pairwise(sorted(row)) for row in rows.values()]
    return ["boxes of one row overlap" for row in spans if any(a[1] > b[0] for a, b in row)]


def of(made: Recording, phase: str, kind: str | None = None) -> list[dict[str, Any]]:
    return [
        one for one in made["traceEvents"] if one["ph"] == phase and kind in (None, one.get("cat"))
    ]


def row_of(made: Recording, one: dict[str, Any]) -> str:
    """Return the names of an event's lane and row."""
    names = {(m["pid"], m.get("tid")): m["args"]["name"] for m in of(made, "M")}
    return f"{names[one['pid'], None]}, {names[one['pid'], one['tid']]}"


def place(one: dict[str, Any]) -> tuple[str, int]:
    name, _, line = one["args"]["line"].rpartition(":")
    return Path(name).name, int(line)


def line_with(text: str, file: str = __file__) -> int:
    """Return the first line of a file that has a text."""
    lines = Path(file).read_text("utf-8").splitlines()
    return next(n for n, line in enumerate(lines, 1) if text in line)


@gluon.jit
def without_wait(x, out, N: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    i = gl.arange(0, N, layout)
    shared = gl.allocate_shared_memory(gl.float32, [N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    async_copy.async_load(shared, x + i)  # COPIES
    async_copy.commit_group()
    gl.store(out + i, 2 * shared.load(layout))  # READS


def run_without_wait() -> None:
    without_wait[(1,)](torch.randn(128), torch.empty(128), 128)


def test_a_missing_wait_connects_the_copy_and_the_read():
    made = recorded(run_without_wait)
    copied, read = of(made, "i", "fault")
    assert (row_of(made, copied), row_of(made, read)) == (
        "multiprocessor 0, copies",
        "multiprocessor 0, warp 0",
    )
    here = Path(__file__).name
    assert place(copied) == (here, line_with("# COPIES"))
    assert place(read) == (here, line_with("# READS"))
    assert copied["args"]["id"] == read["args"]["id"]
    assert copied["args"]["text"].startswith("A copy of warp 0 writes it")
    assert read["args"]["text"].startswith("Warp 0 reads byte 0 of shared memory, which a copy")
    (flight,) = of(made, "X", "copy")
    assert copied["ts"] == flight["ts"] < read["ts"] < flight["ts"] + flight["dur"]
    assert flight["args"]["bytes"] == 512
    assert flight["args"]["text"].endswith("No warp waits for it.")
    said = made["otherData"]["remarks"]
    assert said[0] == "✗ error: race in without_wait, 4 times"
    assert "warp 0 reads byte 0 of shared memory, which a copy of warp 0 writes" in said[3]


def test_a_missing_barrier_connects_two_warps():
    file = cuda_programs.FOLDER / "missing_barrier.cu"
    kernels = nogpu.cuda.load(str(file))
    made = recorded(lambda: cuda_programs.missing_barrier(kernels))
    marks = of(made, "i", "fault")
    assert len(marks) == 2
    assert {place(one) for one in marks} == {
        (file.name, line_with("held[threadIdx.x] =", str(file))),
        (file.name, line_with("= held[127", str(file))),
    }
    whole = next(one["args"]["text"] for one in marks if "which" in one["args"]["text"])
    threads = map(int, re.findall(r"[Tt]hread \((\d+), 0, 0\)", whole))
    rows = {f"multiprocessor 0, warp {thread // 32}" for thread in threads}
    assert len(rows) == 2
    assert {row_of(made, one) for one in marks} == rows
    assert "waits 0 cycles" not in str(made)


@triton.jit
def on_one_element(out):
    tl.store(out, tl.program_id(0))


def test_a_race_between_programs_connects_two_multiprocessors():
    made = recorded(lambda: on_one_element[(3,)](torch.zeros(1, dtype=torch.int32), num_warps=1))
    marks = of(made, "i", "fault")
    assert sorted(row_of(made, one) for one in marks) == [
        "multiprocessor 0, warp 0",
        "multiprocessor 1, warp 0",
    ]
    assert {place(one)[1] for one in marks} == {line_with("tl.store(out, tl.program_id(0))")}


@triton.jit
def past_the_end(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, 2 * tl.load(x + i), mask=i < n)  # PAST


def test_an_access_out_of_bounds_has_one_mark():
    def call() -> None:
        x = torch.randn(1000)
        past_the_end[(4,)](x, torch.empty(1000), 1000, BLOCK=256)

    made = recorded(call)
    (mark,) = of(made, "i", "fault")
    assert row_of(made, mark) == "multiprocessor 3, warp 3"  # thread 116 of program 3
    assert place(mark)[1] == line_with("# PAST")


def test_a_copy_of_two_buffers_is_in_flight_while_the_warps_compute():
    made = recorded(gluon_cases.copies)
    assert of(made, "i") == []
    assert made["otherData"]["remarks"][0] == "nogpu finds no fault in this launch."
    flights = of(made, "X", "copy")
    assert [one["args"]["bytes"] for one in flights] == [512, 512, 512]
    stores = [
        one
        for one in of(made, "X", "global memory")
        if place(one)[1] == line_with("gl.store(out + step", gluon_cases.__file__)
    ]
    for flight in flights[1:]:  # the store of a step, while the next one is copied
        during = [
            one
            for one in stores
            if flight["ts"] < one["ts"] + one["dur"] and one["ts"] < flight["ts"] + flight["dur"]
        ]
        assert {row_of(made, one)[-6:] for one in during} == {f"warp {n}" for n in range(4)}
    first, second, _ = flights
    assert second["ts"] < first["ts"] + first["dur"]
    assert first["tid"] != second["tid"]
    (share,) = (one for one in made["otherData"]["remarks"] if "in flight" in one)
    assert 0 < int(share.partition("%")[0]) < 100


def product() -> None:
    a, b, c = (torch.randn(128, 128, dtype=torch.float16) for _ in range(3))
    matmul_kernel[(2, 2)](a, b, c, 128, BM=64, BN=64, BK=32)


def test_all_warps_meet_at_a_barrier():
    made = recorded(product)
    ends = defaultdict(list)
    for one in of(made, "X", "barrier"):
        ends[one["pid"], one["ts"] + one["dur"]].append(row_of(made, one)[-6:])
    assert ends
    assert all(rows == [f"warp {n}" for n in range(4)] for rows in map(sorted, ends.values()))
    # The table of the page says the same of the instructions as the counters.
    (table, flights) = made["otherData"]["tables"]
    assert {row[0] for row in table["rows"]} == {f"({x}, {y}, 0)" for x in (0, 1) for y in (0, 1)}
    executed = sum(int(row[2].replace(",", "")) for row in table["rows"])
    with emulate() as gpu:
        product()
    assert executed == gpu.launches[0].counters.total.instruction_count
    assert {row[1] for row in flights["rows"]} == {"copy", "product"}
    sizes = [one["args"]["shared memory"] for one in of(made, "C")]
    assert sizes == [gpu.launches[0].shared] * 4 + [0] * 4


BARRIER = """extern "C" __global__ void staggered(float* out, int n)
{
    float sum = 0;
    for (int i = 0; i < n * (threadIdx.x / 32); i++)
        sum += out[i];
    __syncthreads();
    out[32 + threadIdx.x] = sum;
}
"""


def test_a_warp_waits_for_the_one_that_comes_last():
    kernel = nogpu.cuda.compile(BARRIER)["staggered"]
    made = recorded(lambda: kernel[1, 96](np.zeros(128, np.float32), 5))
    waits = sorted(of(made, "X", "barrier"), key=lambda one: one["tid"])
    assert [one["dur"] for one in waits] == sorted((one["dur"] for one in waits), reverse=True)
    assert waits[-1]["dur"] == 1
    assert len({one["ts"] + one["dur"] for one in waits}) == 1
    assert all("for warp 2, which comes last" in one["args"]["text"] for one in waits[:2])


def test_a_specialized_warp_waits_for_the_copy_of_another_one():
    made = recorded(gluon_cases.specialized)
    loads = of(made, "X", "copy")
    assert len(loads) == 3
    assert all(one["args"]["text"].startswith("A bulk load of warp 6") for one in loads)
    stores = [
        one
        for one in of(made, "X")
        if place_or_none(one) == line_with("gl.store(out + (16 * step", gluon_cases.__file__)
    ]
    for number, load in enumerate(loads):  # a step is stored behind its load
        mine = [one for one in stores if row_of(made, one).endswith("warp 0")]
        later = [one for one in mine if one["ts"] >= load["ts"] + load["dur"] - 1]
        assert len({one["ts"] for one in later}) >= 3 - number


def place_or_none(one: dict[str, Any]) -> int | None:
    return place(one)[1] if "line" in one["args"] else None


@triton.jit
def scale(x, out, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, 2 * tl.load(x + i))


def scaled(programs: int, **options: Any) -> None:
    x = torch.randn(1024 * programs)
    scale[(programs,)](x, torch.empty_like(x), BLOCK=1024, **options)


def test_programs_follow_one_another_where_there_is_no_place():
    """A multiprocessor has 64 warps at most, which are two programs of 32."""
    made = recorded(lambda: scaled(6, num_warps=32), multiprocessors=1)
    (lane,) = {one["pid"] for one in of(made, "X")}
    assert lane == 0
    begins: dict[str, float] = {}
    for one in of(made, "X"):
        begins.setdefault(row_of(made, one), one["ts"])
    (end,) = (stop for _, stop in made["otherData"]["steps"])
    firsts = [begins[f"multiprocessor 0, ({n}, 0, 0) warp 0"] for n in range(4)]
    assert firsts == [0, 0, end / 2, end / 2]
    assert any("6 programs, of which 4 are shown" in one for one in made["otherData"]["remarks"])


def test_only_the_first_programs_of_a_larger_launch_are_shown():
    made = recorded(lambda: scaled(20))
    assert {one["pid"] for one in of(made, "X")} == set(range(8))
    remarks = made["otherData"]["remarks"]
    assert "The launch has 20 programs, of which 8 are shown: the first ones are recorded." in (
        remarks
    )


@triton.jit
def repeat(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    for _ in range(n):
        sums += tl.load(x + i)
        tl.debug_barrier()
    tl.store(out + i, sums)


@pytest.mark.parametrize("count", [40, pytest.param(3000, marks=slow)])
def test_a_long_launch_has_longer_boxes(monkeypatch, count):
    most = launch_recording.MOST_BYTES if count > 1000 else 60_000
    monkeypatch.setattr(launch_recording, "MOST_BYTES", most)
    made = recorded(lambda: repeat[(1,)](torch.ones(256), torch.empty(256), count, BLOCK=256))
    assert len(launch_recording.as_json(made)) <= most
    assert any(one.startswith("Runs of") for one in made["otherData"]["about"])
    rows = made["otherData"]["tables"][0]["rows"]
    (end,) = (stop for _, stop in made["otherData"]["steps"])
    assert {row[-1] for row in rows} == {f"{end:,}"}


def test_the_first_launch_with_an_error_is_shown():
    def call() -> None:
        scaled(1)
        run_without_wait()

    made = recorded(call)
    facts = made["otherData"]
    assert facts["title"] == "a test: without_wait[1×1×1]"
    assert facts["remarks"][-1] == "This is launch 2 of 2. The kernels are scale, without_wait."


def test_what_is_executed_does_not_depend_on_the_record():
    def results(**options: Any) -> tuple[list[str], int]:
        with emulate(**options) as gpu:
            gluon_cases.FAULTS["a wait for a group too few"][0]()
        return [str(one) for one in gpu.faults], gpu.launches[0].instructions

    assert results() == results(traces=8)


UNMARKED = {"more programs than fit"}  # the one that is named is not among those that are shown
# These take Python minutes.
ENDLESS = {"search that stays", "step of zero"}


@slow
@pytest.mark.parametrize("name", sorted(set(FAULTS) - ENDLESS))
def test_a_fault_of_triton_is_marked(name):
    fault = FAULTS[name]
    with emulate(traces=8) as gpu, suppress(RuntimeError):
        fault.run()
    made = gpu.report().recording(name)
    assert wrong_of(made) == []
    errors = [one for one in gpu.faults if one.kind == "error"]
    shown = {one.name for one in errors if one.launch == errors[0].launch}
    assert name in UNMARKED or shown <= {one["name"] for one in of(made, "i")}


@slow
@pytest.mark.parametrize("name", cuda_programs.PROGRAMS)
def test_a_fault_of_cuda_is_marked_at_its_line(name):
    kind, _, lines = cuda_programs.said_of(name)
    with emulate(traces=8) as gpu:
        cuda_programs.PROGRAMS[name](cuda_programs.loaded(name))
    made = gpu.report().recording(name)
    assert wrong_of(made) == []
    marks = of(made, "i")
    assert bool(marks) == (kind != "right")
    assert not marks or {place(one)[1] for one in marks} & set(lines)


@slow
@pytest.mark.parametrize("name", RIGHT)
def test_a_right_launch_has_no_mark_of_an_error(name):
    made = recorded(RIGHT[name])
    assert not any("error" in one for one in made["otherData"]["remarks"])


def test_the_page_of_the_documentation(tmp_path, monkeypatch, capsys):
    """A wait before the last line ends the copy, and then there is no fault."""
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "ptx.md").read_text("utf-8")
    (code,) = re.findall(r"```py\n(# double.py\n.*?)```", text, re.DOTALL)
    flags = re.findall(r"^python -m nogpu (--replay .* double.py)$", text, re.MULTILINE)
    Path("double.py").write_text(code, "utf-8")
    assert command.main(flags[0].split()) == 1
    assert "No warp waits for it" in Path("double.html").read_text("utf-8")
    store = "    gl.store(out + i"
    mended = code.replace(store, f"    async_copy.wait_group(0)\n{store}")
    Path("double.py").write_text(mended, "utf-8")
    assert command.main(flags[0].split()) == 0
    page = Path("double.html").read_text("utf-8")
    assert "nogpu finds no fault in this launch." in page
    assert "from the issue until a warp has waited for it" in page
    capsys.readouterr()


@triton.jit
def shared_by_two(a, b, c, BM: tl.constexpr, BK: tl.constexpr):
    m, k = tl.arange(0, BM)[:, None], tl.arange(0, BK)
    left = tl.load(a + m * BK + k[None, :])
    right = tl.load(b + k[:, None] * BM + tl.arange(0, BM)[None, :])
    tl.store(c + m * BM + tl.arange(0, BM)[None, :], tl.dot(left, right))


def test_the_ctas_of_a_cluster_are_on_several_multiprocessors():
    def call() -> None:
        a, b = torch.randn(128, 64).half(), torch.randn(64, 128).half()
        shared_by_two[(2,)](a, b, torch.empty(128, 128), BM=128, BK=64, num_ctas=2)

    made = recorded(call)
    lanes = {one["pid"]: one["args"]["text"] for one in of(made, "M") if "tid" not in one}
    assert lanes == {
        2 * n + rank: f"CTA {rank} of program ({n}, 0, 0)" for n in (0, 1) for rank in (0, 1)
    }
    assert {one["pid"] for one in of(made, "X")} == set(range(4))


def lengthened(made: Recording) -> None:
    of(made, "X")[0]["dur"] += 10_000


def reversed_copy(made: Recording) -> None:
    of(made, "X", "copy")[0]["dur"] *= -1


def overlapping(made: Recording) -> None:
    a, b = (one for one in of(made, "X") if one["tid"] == 0 and one["ts"] < 4)
    a["dur"] += b["dur"] / 2


def late(made: Recording) -> None:
    made["traceEvents"].append(made["traceEvents"].pop(8))


def elsewhere(made: Recording) -> None:
    of(made, "i")[0]["tid"] = 99


@pytest.mark.parametrize(
    "change, said",
    [
        (lengthened, "ends behind the step"),
        (reversed_copy, "has a wrong time"),
        (overlapping, "boxes of one row overlap"),
        (late, "not in the order of time"),
        (elsewhere, "in a row without a name"),
    ],
)
def test_a_wrong_recording_is_rejected(change, said):
    made = copy.deepcopy(recorded(run_without_wait))
    change(made)
    assert any(said in one for one in wrong_of(made))


# The command


SCRIPT = """import torch
import triton
import triton.language as tl


@triton.jit
def scale(x, out, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, 2 * tl.load(x + i))


scale[(2,)](torch.randn(400), torch.empty(512), BLOCK=256)
"""


def test_the_command_writes_a_page_and_a_trace(tmp_path, capsys):
    script, page = tmp_path / "scale.py", tmp_path / "scale.html"
    script.write_text(SCRIPT)
    assert command.main([f"--replay={page}", str(script)]) == 1
    capsys.readouterr()
    made = json.loads(page.with_suffix(".json").read_text("utf-8"))
    assert wrong_of(made) == []
    facts = made["otherData"]
    assert facts["title"] == f"{script}: scale[2×1×1]"
    assert facts["command"] == f"python -m nogpu --replay={page} {script}"
    assert place(of(made, "i")[0]) == ("scale.py", 9)
    found = Page(page)
    assert found.headings[0] == facts["title"]
    assert [row[0] for row in found.tables[-1]] == ["program"] + 4 * ["(0, 0, 0)"] + 4 * [
        "(1, 0, 0)"
    ]
    assert all(one.startswith(("#", "data:")) for one in found.addresses)
    assert len(found.text) < 1_000_000


def test_a_script_without_a_launch_has_no_page(tmp_path, capsys):
    script, page = tmp_path / "none.py", tmp_path / "none.html"
    script.write_text("import torch\n")
    assert command.main([f"--replay={page}", str(script)]) == 0
    assert f"{page} is not written: no kernel was launched" in capsys.readouterr().err
    assert not page.exists()
    with emulate(traces=8) as gpu, pytest.raises(ValueError, match="no launch was recorded"):
        gpu.report().recording("nothing")


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--replay=a.json"], "--replay a.json would be the page and its recording"),
        (["--replay=a.html", "--json=a.json"], "both name a.json; name two files"),
        (["--replay=missing/a.html"], "--replay missing/a.html cannot be written"),
    ],
)
def test_names_of_files_that_do_not_fit_are_refused(tmp_path, monkeypatch, capsys, flags, said):
    monkeypatch.chdir(tmp_path)
    Path("script.py").write_text("")
    with pytest.raises(SystemExit):
        command.main([*flags, "script.py"])
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("count", [-1, 1.5, "8"])
def test_a_wrong_number_of_traces_is_refused(count):
    with pytest.raises(ValueError, match="expected an integer from 0 on"), emulate(traces=count):
        pass


def test_the_page_is_legible_on_a_phone(tmp_path):
    with emulate(traces=8) as gpu:
        run_without_wait()
    text = gpu.report().as_replay("double.py")
    with chromium() as browser:
        for scheme in ("light", "dark"):
            check_in(browser, text, tmp_path, scheme)
