# SPDX-License-Identifier: MIT
"""The programs of the page of faults in others' kernels, and what is said of each."""

import re
from pathlib import Path

import pytest
import triton

from nogpu import command

PAGE = Path(__file__).parents[2] / "docs" / "found.md"
FENCED = r"```(?:py)?\n(.*?)```"
SECTIONS = re.findall(
    rf"^{FENCED}\n\n`python -m nogpu (.*?)(\w+\.py)` says:\n\n{FENCED}",
    PAGE.read_text("utf-8"),
    re.MULTILINE | re.DOTALL,
)


def test_each_row_of_the_table_has_a_program():
    rows = re.findall(r"^\| \[", PAGE.read_text("utf-8"), re.MULTILINE)
    assert len(rows) == len(SECTIONS) > 0


@pytest.mark.skipif(
    not triton.__version__.startswith("3.8."), reason="the page is by Triton 3.8's compiler"
)
@pytest.mark.parametrize(
    "code, flags, name, shown", [pytest.param(*one, id=one[2]) for one in SECTIONS]
)
def test_a_fault_of_the_page_is_named(code, flags, name, shown, tmp_path, capsys):
    (script := tmp_path / name).write_text(code, "utf-8")
    assert command.main([*flags.split(), str(script)]) == ("✗ error" in shown)
    printed = capsys.readouterr().out.replace(f"{tmp_path}/", "")
    printed = re.sub(r" \(line \d+ of the PTX\)", "", printed)
    printed = re.sub(r", \d+ times$", "", printed, flags=re.MULTILINE)
    assert f"\n{shown}launches: 1; " in printed
