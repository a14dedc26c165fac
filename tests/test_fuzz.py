# SPDX-License-Identifier: MIT
"""Seconds of each script of tests/fuzz, and a planted fault that each must find."""

import re
import sys

import pytest
from commands import ROOT, forked, run

pytest.importorskip("tyro", reason="tyro reads the flags")
SCRIPTS = {
    "exact_mode": ["exp", "rows", "checkpoint"],
    "training": ["bits", "alone"],
    "optimizers": ["decay", "closure"],
    "operators": ["transposed", "last-bit", "behind", "overwritten", "overflow"],
    "library": ["keywords", "unkeyed"],
    "flags": ["unchecked"],
    "emulator": ["minimum", "silent"],
}
FAULTS = [(script, fault) for script, faults in SCRIPTS.items() for fault in faults]
# With these the trials come to the fault early.
SEEDS = {"bits": 1, "rows": 2, "checkpoint": 3, "exp": 5}


# Processes that start and end others, and that remove folders at their end, are not forked.
OWN_PROCESS = ("training", "flags")


@pytest.fixture
def fuzz(fork_server):
    """``fuzz(script, *flags)``: the exit status of a script, and its output."""

    def run_script(script: str, *flags: str) -> tuple[int, str]:
        path = str(ROOT / "tests" / "fuzz" / f"{script}.py")
        own = script in OWN_PROCESS
        status, out, err = run(sys.executable, path, *flags) if own else forked(path, *flags)
        assert re.search(r"\d+ trials \| \d+ refused \| \d+ failed \| seed \d", out), out + err
        return status, out

    return run_script


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_trials_find_nothing(fuzz, script):
    # Runs of training take seconds each.
    status, out = fuzz(script, "--seconds", "5" if script == "training" else "2")
    assert status == 0, out


@pytest.mark.slow
@pytest.mark.parametrize("script, fault", FAULTS)
def test_trials_find_a_planted_fault(fuzz, script, fault):
    seed = str(SEEDS.get(fault, 0))
    status, out = fuzz(
        script, "--seconds", "60", "--fault", fault, "--until-failure", "--seed", seed
    )
    assert status == 1, out
    if script == "operators":  # all have one driver
        number = re.search(r"--trial (\d+)", out)[1]
        alone = script, "--trial", number, "--seed", seed
        assert fuzz(*alone, "--fault", fault)[0] == 1
        assert fuzz(*alone)[0] == 0  # without the fault
