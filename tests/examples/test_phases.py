# SPDX-License-Identifier: MIT
"""The table of phases, and what it says below."""

import pytest

pytest.importorskip("tyro", reason="tyro reads the flags")

from support import console

from torchpar.training.profile.phases import PHASES


def test_each_phase_that_took_time_has_a_line_below_the_table(capsys):
    assert [*console.LIFTED_BY] == [*PHASES]
    console.print_phases({"data": 1.0, "forward": 0.0, "optimizer": 3.0, "of my own": 1.0})
    table, below = capsys.readouterr().out.rsplit("┘\n", 1)
    assert "forward" not in table
    expected = [f"{name}: {console.LIFTED_BY[name]}" for name in ("data", "optimizer")]
    assert below.splitlines() == expected
