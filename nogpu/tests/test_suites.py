# SPDX-License-Identifier: MIT
"""Suites of tests on the emulator: their faults for other programs, summaries, and limits."""

import json
import re
import textwrap
from pathlib import Path
from types import SimpleNamespace

import draw_tests
import pytest
import torch
import triton
import triton.language as tl
from foreign_warnings import filters
from processes import ROOT
from torch._subclasses import FakeTensorMode

from nogpu import command, emulate
from nogpu.machine.gpu_state import TooLarge
from nogpu.native.cache import cache_folder
from nogpu.record.fault_names import NAMES
from nogpu.report.findings import Finding, from_plain, merged
from nogpu.report.github import annotations
from nogpu.report.sarif import as_sarif
from nogpu.triton.account import Account
from nogpu.triton.defined_kernels import defined_kernels

pytest_plugins = ["pytester"]

CACHE = cache_folder("core").parents[1]

KERNELS = """
    import torch, triton, triton.language as tl


    @triton.jit
    def twice(x):
        return x + x


    @triton.jit
    def apply(x, function: tl.constexpr):
        return function(x)


    @triton.jit
    def negative(x):
        return -x


    @triton.jit
    def copy(x, out, n, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out + i, tl.load(x + i), mask=i < n)


    @triton.jit
    def change(x, out, n, function: tl.constexpr, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out + i, twice(apply(tl.load(x + i, mask=i < n), function)), mask=i < n)


    @triton.autotune([triton.Config({"BLOCK": 64})], key=[])
    @triton.jit
    def never(x, out, n, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out + i, twice(tl.load(x + i)), mask=i < n)


    def launch(n):
        x, out = torch.ones(n), torch.empty(n)
        copy[(triton.cdiv(n, 64),)](x, out, n, BLOCK=64)
        return out
"""
TESTS = """
    import unittest

    import pytest, torch
    from the_kernels import change, launch, negative

    @pytest.mark.parametrize("n", [128, 100, 90])
    def test_copy(n):
        assert launch(n).sum() == n

    def test_change():
        x, out = torch.ones(100), torch.empty(100)
        change[(2,)](x, out, 100, negative, BLOCK=64)
        assert out.sum() == -200

    @pytest.mark.nogpu_allow("race", "out of bounds")
    def test_allowed():
        launch(100)

    @pytest.mark.nogpu_allow("out of bound")
    def test_unknown(): ...

    @pytest.mark.xfail
    def test_expected():
        launch(100)

    class TestOld(unittest.TestCase):
        def test_wrong(self):
            launch(100)
            raise AssertionError("of the test")
"""
LINE = 1 + KERNELS.splitlines().index("        tl.store(out + i, tl.load(x + i), mask=i < n)") - 1


@pytest.fixture
def suite(pytester, monkeypatch):
    """A function that runs a repository's tests, which launch the kernels of a module there."""

    def run(tests: str, *flags: str, in_process: bool = True):
        (pytester.path / ".git").mkdir()
        (pytester.path / "the_kernels.py").write_text(textwrap.dedent(KERNELS).lstrip(), "utf-8")
        pytester.makepyfile(test_it=textwrap.dedent(tests))
        lines = "\n    ".join(["error", *filters([ROOT])])
        pytester.makeini(f"[pytest]\nfilterwarnings =\n    {lines}")
        pytester.syspathinsert()
        monkeypatch.setattr("nogpu.record.source.STARTED_IN", str(pytester.path))
        monkeypatch.setenv("XDG_CACHE_HOME", str(CACHE))  # `pytester` changes the home
        start = pytester.runpytest_inprocess if in_process else pytester.runpytest_subprocess
        return start("--nogpu", *flags)

    return run


FLAGS = ("--nogpu-annotate=github", "--nogpu-sarif=found.sarif", "--junitxml=found.xml")


def check_files(folder: Path, said: str) -> None:
    """Check the annotations and the files of `TESTS`, which are those of all workers."""
    (one,) = re.findall(r"^::.*", said, re.MULTILINE)
    assert one.startswith(f"::error file=the_kernels.py,line={LINE},title=out of bounds in copy::")
    assert re.search(r"%0A8 times%0Ain test_it.py::\S+, and 2 more$", one)
    (run,) = json.loads((folder / "found.sarif").read_text("utf-8"))["runs"]
    (result,) = run["results"]
    assert run["tool"]["driver"]["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
    assert (result["ruleId"], result["level"]) == ("out-of-bounds", "error")
    (location,) = result["locations"]
    physical = location["physicalLocation"]
    assert physical["artifactLocation"]["uri"] == "the_kernels.py"
    assert physical["region"]["startLine"] == LINE
    assert len(result["properties"]["tests"]) == 3
    in_junit = (folder / "found.xml").read_text("utf-8")
    # Two tests fail by it, of which one has an error of its own; two are excused.
    assert in_junit.count("error: out of bounds in copy") >= 4


def test_a_suite_is_summed_up(suite, pytester):
    done = suite(TESTS, *FLAGS)
    done.assert_outcomes(passed=3, failed=3, errors=1, xfailed=1)
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    said = done.stdout.str()
    done.stdout.fnmatch_lines(
        [
            "*nogpu_allow does not know 'out of bound'; it knows * out of bounds, *",
            "7 launches of 2 kernels in 7 tests, executed in *",
            "faults by kernel and line:",
            f"✗ error: out of bounds in copy, the_kernels.py:{LINE}",
            "    8 times, in test_it.py::test_copy[[]100], and 2 more",
            f"✗ error: out of bounds in copy (allowed), the_kernels.py:{LINE}",
            f"✗ error: out of bounds in copy (expected to fail), the_kernels.py:{LINE}",
            "kernels never launched:",
            "    the_kernels.py:* never",
            "the tests whose launches took longest:",
        ]
    )
    never = said.partition("kernels never launched:\n")[2].partition("\nthe tests")[0]
    assert len(never.splitlines()) == 1  # and no function that a kernel calls
    check_files(pytester.path, said)


def test_kernels_beside_the_folder_of_the_tests_belong_to_the_project(suite, pytester):
    done = suite(TESTS, f"--rootdir={pytester.mkdir('tests')}")
    done.stdout.fnmatch_lines(["kernels never launched:", "    the_kernels.py:* never"])


@pytest.mark.slow
def test_workers_of_xdist_tell_all_to_their_controller(suite, pytester):
    pytest.importorskip("xdist", reason="pytest-xdist divides the tests")
    done = suite(TESTS, *FLAGS, "-n2", in_process=False)
    done.assert_outcomes(passed=3, failed=3, errors=1, xfailed=1)
    done.stdout.fnmatch_lines(
        ["7 launches of 2 kernels in 7 tests, executed in *", "    the_kernels.py:* never"]
    )
    check_files(pytester.path, done.stdout.str())


def test_a_suite_without_a_launch_says_so(suite, pytester):
    done = suite("def test(): ...", "--nogpu-sarif=found.sarif")
    done.assert_outcomes(passed=1)
    done.stdout.fnmatch_lines(["no kernel was launched*"])
    assert json.loads((pytester.path / "found.sarif").read_text())["runs"][0]["results"] == []


def test_a_suite_that_asks_for_cuda_is_told_of_the_flag(suite):
    tests = """
    import pytest, torch

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test(): ...
    """
    done = suite(tests)
    done.assert_outcomes(**{"passed" if torch.cuda.is_available() else "skipped": 1})
    done.stdout.fnmatch_lines(["no kernel was launched; * need --cuda-is-cpu"])


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--nogpu-limit=0"], "*is 0, expected a number of seconds above 0"),
        (["--nogpu-budget=inf"], "*is inf, expected a number of seconds above 0"),
        (["--nogpu-sarif=no/a.sarif"], "*--nogpu-sarif no/a.sarif cannot be written*"),
        (["--nogpu-annotate=gitlab"], "*invalid choice: 'gitlab'*"),
    ],
)
def test_wrong_values_of_the_flags_are_refused(suite, flags, said):
    done = suite("def test(): ...", *flags)
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines([said])


# Limits

LARGE = """
    import pytest, torch
    from the_kernels import copy, launch

    def test_values():
        assert launch(64 * 64).sum() == 64 * 64

    def test_wrong():
        assert launch(64 * 64 - 1).sum() == 64 * 64 - 1

    @pytest.mark.nogpu_allow("too large")
    def test_allowed():
        assert launch(64 * 64).sum() == 64 * 64

    def test_own_error():
        launch(64 * 64)
        raise ValueError("of the test")

    def test_later():
        copy[(64,)](launch(64 * 64), torch.empty(64 * 64 - 32), 64 * 64, BLOCK=64)
"""
NO_TIME = 1e-9  # seconds


def test_a_launch_beyond_the_limit_is_too_large(suite, monkeypatch):
    monkeypatch.setattr("nogpu.triton.emulator.SECONDS", 0)
    done = suite(LARGE, f"--nogpu-limit={NO_TIME}", "--nogpu-annotate=github", "-rs")
    done.assert_outcomes(failed=4, skipped=1)
    said = done.stdout.str()
    assert re.search(
        r"✗ error: too large\n    the_kernels.py:\d+\n        copy\[.*\n"
        r"    copy\[64×1×1\]: \d+ of 64 programs took \S+ s, and the limit is 1e-09 s; take ",
        said,
    )
    assert "::error file=the_kernels.py," in said
    assert "During handling" not in said
    assert re.search(r"SKIPPED.*: too large: \d+ of 64 programs took", said)


def test_a_budget_samples_launches(suite):
    done = suite(LARGE, f"--nogpu-budget={NO_TIME}", "-rs")
    # A fault of a sampled launch is one. One of a later launch may come from what it left out.
    done.assert_outcomes(failed=2, skipped=2, passed=1)
    done.stdout.fnmatch_lines(
        [
            "✗ error: out of bounds in copy*",
            "E   *ValueError: of the test",
            "E   *values are not judged, since only samples of programs were executed: *",
            "6 launches of 1 kernel in 5 tests, executed in *; 6 of them by a sample *",
            "✗ error: out of bounds in copy (after a sampled launch), *",
            "*SKIPPED*: values are not judged, since only samples of programs were executed: "
            "6 of 64 programs of copy[[]64×1×1[]]",
        ]
    )


def test_a_budget_with_time_executes_all(suite):
    done = suite(LARGE, "--nogpu-budget=1000", "--nogpu-limit=1000")
    done.assert_outcomes(failed=3, passed=2)
    assert "sample" not in done.stdout.str().partition("6 launches of 1 kernel")[2]


@triton.jit
def double(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, 2 * tl.load(x + i, mask=i < n), mask=i < n)


def launched(seconds: float | None, programs: int = 64):
    """The launch of a kernel for which there are so many seconds, and what it has written."""
    n = 64 * programs
    x, out = torch.ones(n), torch.zeros(n)
    with emulate("sm_90") as gpu:
        gpu.account = Account(budget=None if seconds is None else 2 * seconds)
        double[(programs,)](x, out, n, BLOCK=64)
    assert gpu.faults == []
    (launch,) = gpu.launches
    return launch, out


def test_a_sample_grows_while_there_is_time(monkeypatch):
    ticks = iter(range(10**6))  # a second for each look at the clock
    clock = SimpleNamespace(perf_counter=lambda: float(next(ticks)))
    monkeypatch.setattr("nogpu.machine.gpu.time", clock)
    whole, _ = launched(None)
    # The first 6 take a second: there is time for 18, and then for 27, which are not many more.
    grown, out = launched(3)
    assert 6 < grown.executed <= 18
    assert out.count_nonzero() == 64 * grown.executed
    assert grown.counters.total == whole.counters.total
    assert grown.counters.distinct_written == whole.counters.distinct_written
    # For 30, of which the second look says that they leave time for all.
    full, out = launched(5)
    assert full.executed is None
    assert out.count_nonzero() == out.numel()
    assert full.counters.total == whole.counters.total


def test_a_launch_ends_before_the_memory_is_gone(monkeypatch):
    monkeypatch.setattr("nogpu.triton.emulator.free_memory", lambda: 2**20)
    x = torch.ones(64)
    with emulate("sm_90") as gpu, pytest.raises(TooLarge, match="1 MiB of memory are free"):
        double[(1,)](x, x, 64, BLOCK=64)
    assert [fault.name for fault in gpu.faults] == ["too large"]


@pytest.mark.parametrize("make", [torch.zeros, torch.empty, torch.randn, torch.ones(1).new_zeros])
def test_a_tensor_for_which_there_is_no_memory_is_not_made(make, monkeypatch):
    monkeypatch.setattr("nogpu.triton.host_memory.free_memory", lambda: 2**27)
    with emulate("sm_90") as gpu:
        with pytest.raises(TooLarge, match=r"a tensor of float32 \[67108864\] takes 0.2 GiB, and"):
            make(2**26)
        assert make(2**24).numel() == 2**24
        # These have no memory.
        assert torch.empty(2**26, device="meta").new_zeros(2**26).is_meta
        with torch.device("meta"):
            assert torch.zeros(2**26).is_meta
        with FakeTensorMode():
            assert torch.zeros(2**26).new_zeros(2**26).numel() == 2**26
    (fault,) = gpu.faults
    assert fault.source[0] == __file__


def test_launches_of_an_inner_emulator_count():
    with emulate("sm_90") as outer:
        outer.account = Account(limit=NO_TIME)
        with emulate("sm_90"), pytest.raises(TooLarge):
            double[(1,)](torch.ones(64), torch.ones(64), 64, BLOCK=64)
    assert outer.account.launches == 1
    assert (__file__, "double") in outer.account.kernels


# Findings


def finding(**changes) -> Finding:
    given = {"kind": "error", "name": "race", "message": "a\nb", "kernel": "k", "source": None}
    return Finding(**given | {"launched": None, "count": 1, "tests": ["t"]} | changes)


def test_an_annotation_escapes_what_would_end_it(tmp_path):
    (tmp_path / ".git").mkdir()
    path = tmp_path / "a,b:c%.py"
    path.write_text("\n")
    (line,) = annotations([finding(source=(str(path), 1), message="50%\r\nx: y, z")])
    assert line == (
        "::error file=a%2Cb%3Ac%25.py,line=1,title=race in k::50%25%0D%0Ax: y, z%0Ain t"
    )


def test_a_fault_outside_of_the_repository_is_where_its_kernel_is_launched(tmp_path):
    (tmp_path / ".git").mkdir()
    library = tmp_path / "lib" / "site-packages" / "library.py"
    library.parent.mkdir(parents=True)
    mine = tmp_path / "tests" / "mine.py"
    mine.parent.mkdir()
    for path in (library, mine):
        path.write_text("first\nsecond\n")
    of_library = finding(source=(str(library), 1), launched=(str(mine), 2), kind="warning")
    (line,) = annotations([of_library, finding(excused="allowed")])
    assert line.startswith("::warning file=tests/mine.py,line=2,title=")
    nowhere = finding(source=(str(library), 1))
    assert annotations([nowhere]) == ["::error title=race in k::a%0Ab%0Ain t"]
    (run,) = json.loads(as_sarif([of_library, nowhere]))["runs"]
    (result,) = run["results"]
    region = result["locations"][0]["physicalLocation"]["region"]
    assert region == {"startLine": 2, "snippet": {"text": "second"}}


def test_findings_of_one_line_are_one():
    first, second = finding(source=("a.py", 1)), finding(source=("a.py", 1), tests=["u"])
    other, note = finding(source=("a.py", 2)), finding(source=("a.py", 1), kind="note")
    plain = [from_plain(json.loads(json.dumps(one.as_plain()))) for one in (note, first, second)]
    found = merged([*plain, other])
    assert [(one.kind, one.where, one.count, one.tests) for one in found] == [
        ("error", "a.py:1", 2, ["t", "u"]),
        ("error", "a.py:2", 1, ["t"]),
        ("note", "a.py:1", 1, ["t"]),
    ]


def test_the_command_annotates_and_writes_sarif(tmp_path, capsys):
    script, file = tmp_path / "script.py", tmp_path / "found.sarif"
    script.write_text(f"{textwrap.dedent(KERNELS)}\nlaunch(100)\n", "utf-8")
    (tmp_path / ".git").mkdir()
    assert command.main(["--annotate", "github", "--sarif", str(file), str(script)]) == 1
    assert "\n::error file=script.py,line=" in capsys.readouterr().out
    assert json.loads(file.read_text("utf-8"))["runs"][0]["results"][0]["level"] == "error"
    with pytest.raises(SystemExit, match="2"):
        command.main([f"--json={file}", f"--sarif={file}", str(script)])
    assert f"--json and --sarif both name {file}; name two files" in capsys.readouterr().err


def test_kernels_of_a_folder_are_found():
    here = {name for _, name in defined_kernels(Path(__file__).parent)}
    assert "double" in here
    assert defined_kernels(Path("/no/such/folder")) == {}


def test_the_pages_explain_all_names_of_faults():
    pages = ROOT.parent / "docs"
    named = set()
    for page, heading in (
        ("ptx.md", "What it finds"),
        ("graphs.md", "What is found"),
        ("nogpu.md", "CUDA C++"),
        ("nogpu.md", "Kernels of numba.cuda"),
    ):
        section = (pages / page).read_text("utf-8").partition(f"\n## {heading}\n")[2]
        for table in re.findall(
            r"^\| (?:name|fault) \|.*\n\|-.*\n((?:\|.*\n)+)", section.partition("\n## ")[0], re.M
        ):
            cells = (row.split("|")[1].strip() for row in table.splitlines())
            named |= {name for cell in cells for name in cell.split(", ")} - {""}
    assert named == set(NAMES) - {"a kernel of numba.cuda"}


SKIPPING = """
    import unittest

    import pytest
    from the_kernels import launch


    def test_that_skips():
        launch({n})
        pytest.skip("mine")


    class TestOfUnittest(unittest.TestCase):
        def test_that_skips(self):
            launch({n})
            self.skipTest("mine")


    @pytest.fixture
    def launched():
        launch({n})
        pytest.skip("mine")


    def test_whose_fixture_skips(launched): ...
"""


@pytest.mark.parametrize("n, outcomes", [(63, {"failed": 2, "errors": 1}), (64, {"skipped": 3})])
def test_a_skip_behind_a_fault_hides_nothing(suite, n, outcomes):
    done = suite(SKIPPING.format(n=n))
    done.assert_outcomes(**outcomes)


@pytest.mark.parametrize(
    "code, flags, said",
    [
        ("import nothing_here", (), "found.sarif is not written: not all tests have run"),
        ("def test(): ...", ("--collect-only",), ""),
    ],
)
def test_a_file_is_written_only_of_a_whole_run(suite, code, flags, said):
    """Faults of tests that did not run would be taken for mended."""
    done = suite(code, "--nogpu-sarif=found.sarif", *flags)
    assert not Path("found.sarif").exists()
    assert said in done.stdout.str()


def test_a_file_that_cannot_be_written_is_named_behind_the_summary(suite):
    done = suite("def test(): ...", "--nogpu-sarif=/proc/found.sarif")
    assert done.ret == 1
    assert re.search(r"/proc/found.sarif is not written: .*; name another file", done.stdout.str())


@pytest.mark.parametrize("mark", ["", "()", "(name='race')", "(['race'])"])
def test_a_mark_without_names_is_refused(suite, mark):
    done = suite(f"import pytest\n@pytest.mark.nogpu_allow{mark}\ndef test(): ...")
    done.assert_outcomes(errors=1)
    assert re.search("nogpu_allow (takes names of faults|does not know)", done.stdout.str())


def test_small_tests_are_drawn_by_their_names():
    tests = [f"test_a.py::test_sum[False-{n}-bfloat16-0.5-1e-08]" for n in range(1, 200)]
    tests += ["test_a.py::test_other", "test_a.py::test_lengths[D8-[0, 15, 99]-torch.float16]"]
    assert [draw_tests.size(test) for test in tests[-3:]] == [199, 1, 792]
    drawn = draw_tests.draw(tests, largest=200, most=4)
    assert len(drawn) == 5
    assert "test_a.py::test_other" in drawn
    assert drawn == draw_tests.draw(tests, largest=200, most=4)
    assert drawn != draw_tests.draw(tests, largest=200, most=4, seed=1)
    assert draw_tests.draw(tests, largest=200, most=4, number=2) == drawn[:2]
    assert len(draw_tests.draw(tests, number=1000, most=1000)) == len(tests)
