# SPDX-License-Identifier: MIT
"""Gluon on the emulator: right kernels have right values and no error, wrong ones are named.

The kernels are of the subjects of Triton's Gluon tutorials: `gluon_cases`. Gluon changes from one
version of Triton to the next, and these are of 3.8.
"""

import re
import runpy
from pathlib import Path
from unittest.mock import patch

import pytest
import triton

from nogpu import command, emulate

if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8):
    pytest.skip("Gluon of Triton 3.8", allow_module_level=True)

import gluon_cases

FAST = ("03 asynchronous copies", "04 boxes by TMA")


@pytest.mark.parametrize(
    "name, arch",
    [
        pytest.param(
            name, arch, marks=[] if name in FAST and arch == 90 else pytest.mark.slow
        )
        for name, case in gluon_cases.CASES.items()
        for arch in case.architectures
    ],
)  # fmt: skip
def test_tutorials_have_right_values_and_no_errors(name, arch):
    with emulate(f"sm_{arch}", schedules="all") as gpu:
        results = gluon_cases.CASES[name].run()
    assert [str(fault) for fault in gpu.faults if fault.kind == "error"] == []
    for found, expected, bound in results:
        assert ((found.double() - expected).abs() <= bound).all()


@pytest.mark.slow
@pytest.mark.parametrize("waits", [True, False])
def test_consan_finds_what_the_page_shows(waits, tmp_path):
    """Its checks are assertions of the kernel."""
    page = (Path(__file__).parents[2] / "docs" / "ptx.md").read_text("utf-8")
    (code,) = re.findall(r"```py\n(# double.py\n.*?)```", page, re.DOTALL)
    missing = "    async_copy.commit_group()\n"
    if waits:
        code = code.replace(missing, f"{missing}    async_copy.wait_group(0)\n")
    (tmp_path / "double.py").write_text(code, "utf-8")
    with (
        patch.object(triton.knobs.compilation, "instrumentation_mode", "consan"),
        emulate("sm_90") as gpu,
    ):
        runpy.run_path(str(tmp_path / "double.py"))
    errors = [f"{one.name}: {one.message}" for one in gpu.faults if one.kind == "error"]
    assert bool(errors) != waits
    assert waits or "Accessing buffer with pending access" in errors[0]


@pytest.mark.slow
def test_the_example_of_the_page_is_what_the_command_prints(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "ptx.md").read_text("utf-8")
    (code,) = re.findall(r"```py\n(# double.py\n.*?)```", page, re.DOTALL)
    (shown,) = re.findall(r"```\n\$ python -m nogpu double.py\n(.*?)```", page, re.DOTALL)
    (tmp_path / "double.py").write_text(code, "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nogpu.record.source.STARTED_IN", str(tmp_path))
    assert command.main(["double.py"]) == 1

    def same_everywhere(text: str) -> list[str]:
        return re.sub(r"[\d,]+ +\d+\.\d{3}|line \d+ of the PTX", "", text).split()

    assert same_everywhere(capsys.readouterr().out) == same_everywhere(shown)


@pytest.mark.slow
@pytest.mark.parametrize("name", gluon_cases.FAULTS)
def test_a_fault_is_named_at_its_line(name):
    run, arch, kind = gluon_cases.FAULTS[name]
    with emulate(f"sm_{arch}") as gpu:
        run()
    errors = [fault for fault in gpu.faults if fault.kind == "error"]
    assert kind in {fault.name for fault in errors}
    assert {Path(fault.source[0]).name for fault in errors if fault.source} == {"gluon_cases.py"}
