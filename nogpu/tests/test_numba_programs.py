# SPDX-License-Identifier: MIT
"""Programs of numba.cuda, right and wrong, and what the report says of each."""

import json
import re
from contextlib import suppress
from pathlib import Path

import pytest

from nogpu import command
from nogpu.numba.numba_kernels import LaunchError
from nogpu.numba.numba_stand_in import has_numba_cuda

if not has_numba_cuda():
    reason = "numba-cuda is not installed: pip install 'numba-cuda[cu13]'"
    pytest.skip(reason, allow_module_level=True)

FOLDER = Path(__file__).with_name("numba_programs")
PROGRAMS = sorted(FOLDER.glob("*.py"))
# The first comment of a program, and of a wrong one the fault's name. A comment "# fault" stands at
# each line that the report may name.
COMMENT = re.compile(r"^# (Right|Wrong): (?:([\w ]+): )?", re.MULTILINE)
# What ends a wrong program, as it would on a GPU, or because it is refused.
ENDED_BY = (LaunchError, NotImplementedError)


@pytest.mark.filterwarnings("ignore:.*Grid size")
@pytest.mark.filterwarnings("ignore:.*Host array")
@pytest.mark.filterwarnings("ignore:nopython is set")
@pytest.mark.usefixtures("without_simulator")
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.stem)
def test_program_of_numba(program, tmp_path, capsys):
    text, report = program.read_text("utf-8"), tmp_path / "report.json"
    kind, name = COMMENT.search(text).groups()
    lines = {n for n, line in enumerate(text.splitlines(), 1) if line.endswith("# fault")}
    status = 1
    with suppress(*ENDED_BY):
        status = command.main(["--cuda-is-cpu", f"--json={report}", str(program)])
    faults = json.loads(report.read_text("utf-8"))["faults"]
    out = capsys.readouterr().out
    if kind == "Right":
        assert (status, faults) == (0, []), out
        assert lines == set()
        return
    assert {(one["name"], one["source"]["line"] in lines) for one in faults} == {(name, True)}, out
    assert status == int(any(one["kind"] == "error" for one in faults)), out


def test_half_of_the_programs_are_wrong():
    kinds = [COMMENT.search(program.read_text("utf-8"))[1] for program in PROGRAMS]
    assert kinds.count("Right") >= 10
    assert kinds.count("Wrong") >= 10
