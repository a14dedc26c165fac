# SPDX-License-Identifier: MIT
"""Seconds of each script of tests/fuzz, and a planted fault that each must find."""

import json
import re
import sys
from pathlib import Path

import pytest
from commands import ROOT, forked, run
from playing import needs_cpp

pytest.importorskip("tyro", reason="tyro reads the flags")
SCRIPTS = {
    "exact_mode": ["exp", "rows", "checkpoint", "digits", "rounded-muon", "batched-muon"],
    "training": ["bits", "alone", "parts"],
    "optimizers": ["decay", "closure", "exchange", "late"],
    "heads": ["blocks", "last", "silent"],
    "operators": [
        *("transposed", "last-bit", "behind", "overwritten", "overflow"),
        *("limit", "minus-infinity", "five-dimensions", "seed"),
    ],
    "sizes": ["compared", "unsummed"],
    "library": ["keywords", "twice"],
    "flags": ["unchecked", "any-number"],
    "endings": ["forgets", "goes-on", "hangs-up", "looks-whole"],
    "emulator": ["minimum", "silent"],
    "captures": ["bound", "lists", "nodes", "pageable", "pinned", "straight", "table"],
    "resumes": ["loses", "rounds", "forgets", "blind"],
    "recorders": ["blind", "draws"],
    "graphed": ["copies", "gradients", "others", "pool", "steps", "unpassed"],
}
# Of the calls that C++ plays.
BY_CPP = {"operators": ["stale-key", "wrong-stride", "dropped-gradient"], "library": []}
FAULTS = [(script, fault) for script, faults in SCRIPTS.items() for fault in faults]
# With these the trials come to the fault early.
SEEDS = {"bits": 1, "rows": 19, "checkpoint": 3, "exp": 5, "steps": 1352, "unpassed": 2032}

# A trial that finds it is repeated alone, which is the same code in all scripts.
ALONE = ("transposed", "last-bit")

# Processes that start and end others, and that remove folders at their end, are not forked.
OWN_PROCESS = ("training", "flags", "endings", "optimizers", "resumes")
# Run a script with several flags, each in a fork of a process that has imported PyTorch's samples,
# which takes seconds. Write each output into a file, and print the exit statuses.
EACH_FORKED = """
import json, os, runpy, sys
from torch.testing._internal import common_methods_invocations

path, *runs = map(json.loads, sys.argv[1:])
sys.path.insert(0, os.path.dirname(path))
for number, flags in enumerate(runs):
    if not (child := os.fork()):
        for stream in (1, 2):
            os.dup2(os.open(f"{number}.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
        sys.argv = [path, *flags]
        runpy.run_path(path, run_name="__main__")
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def path_of(script: str) -> str:
    return str(ROOT / "tests" / "fuzz" / f"{script}.py")


def flags_of(script: str, fault: str = "") -> list[str]:
    """What a script's trials are limited by, with a planted fault and without."""
    if not fault:  # runs of training take seconds each
        return ["--seconds", "5" if script == "training" else "2"]
    seed = str(SEEDS.get(fault, 0))
    return ["--seconds", "60", "--fault", fault, "--until-failure", "--seed", seed]


@pytest.fixture(scope="module")
def of_samples(fork_server, tmp_path_factory) -> dict[str, tuple[int, str]]:
    """The exit statuses and outputs of exact_mode.py, by the fault."""
    faults, folder = ["", *SCRIPTS["exact_mode"]], tmp_path_factory.mktemp("exact_mode")
    runs = [json.dumps(flags_of("exact_mode", fault)) for fault in faults]
    path = json.dumps(path_of("exact_mode"))
    status, out, err = forked("-c", EACH_FORKED, path, *runs, cwd=folder)
    assert status == 0, err
    outputs = [Path(folder, f"{number}.txt").read_text() for number in range(len(runs))]
    return dict(zip(faults, zip(map(int, out.split()), outputs, strict=True), strict=True))


@pytest.fixture
def fuzz(fork_server, request):
    """``fuzz(script, fault, *flags)``: the exit status of a script, and its output."""

    def run_script(script: str, fault: str = "", *flags: str) -> tuple[int, str]:
        flags = flags or tuple(flags_of(script, fault))
        if script == "exact_mode":
            status, out = request.getfixturevalue("of_samples")[fault]
            err = ""
        elif script in OWN_PROCESS:
            status, out, err = run(sys.executable, path_of(script), *flags)
        else:
            status, out, err = forked(path_of(script), *flags)
        assert re.search(r"\d+ trials \| \d+ refused \| \d+ failed \| seed \d", out), out + err
        return status, out

    return run_script


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_trials_find_nothing(fuzz, script):
    status, out = fuzz(script)
    assert status == 0, out


@pytest.mark.slow
@needs_cpp
@pytest.mark.parametrize("script", BY_CPP)
def test_trials_of_calls_by_cpp_find_planted_faults_alone(fuzz, script):
    status, out = fuzz(script, "", *flags_of(script), "--by-cpp")
    assert status == 0, out
    for fault in BY_CPP[script]:
        status, out = fuzz(script, fault, *flags_of(script, fault), "--by-cpp")
        assert status == 1, out


@pytest.mark.slow
@pytest.mark.parametrize("script, fault", FAULTS)
def test_trials_find_a_planted_fault(fuzz, script, fault):
    status, out = fuzz(script, fault)
    assert status == 1, out
    if fault in ALONE:
        number = re.search(r"--trial (\d+)", out)[1]
        alone = "--trial", number, "--seed", str(SEEDS.get(fault, 0))
        assert fuzz(script, fault, *alone, "--fault", fault)[0] == 1
        assert fuzz(script, "", *alone)[0] == 0  # without the fault
