# SPDX-License-Identifier: MIT
"""A student's function that never returns, and signals meanwhile: `benchmarks.ladder.guard`."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import ROOT, forked, import_path

pytest.importorskip("rich", reason="rich prints the tables of the ladder")
from benchmarks.ladder.guard import Call, Child

needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="the ladder forks on Linux alone")

# A ladder of three functions, the second of which returns after a while, or never. No handler of
# Python's ends it, as in compiled code.
LADDER = """
import os, signal, sys, time
from pathlib import Path
from benchmarks.flags import run
from benchmarks.ladder import guard

guard.PATIENCE, guard.NOTICE, guard.TICK, guard.GRACE = {patience}, 0.1, 0.01, 0.2
sys.argv.append("--with")

def call(name, seconds, compilation=0.0):
    if waited := guard.WATCHED.endless.get(("my.py", name)):
        print(name, "was given up after", waited)
        return
    with guard.WATCHED.calling("my.py", name, 0.1) as compiling:
        compiling(True)
        time.sleep(compilation)
        compiling(False)
        Path(name).touch()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pass
    print(name, "has returned")

def main():
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    call("first", 0)
    call("second", {seconds}, {compilation})
    call("third", 0)
    return 7

run(lambda: guard.guarded(main), "run ladder")
"""


def script_of_ladder(folder: Path, **seconds: float) -> str:
    script = folder / "ladder.py"
    script.write_text(LADDER.format(**seconds))
    return str(script)


@needs_fork
def test_an_endless_function_is_given_up_and_the_others_are_called_again(tmp_path):
    script = script_of_ladder(tmp_path, seconds=60, compilation=0, patience=0.4)
    status, out, err = forked(script, cwd=tmp_path)
    assert (status, out.splitlines()) == (
        7,
        [
            "first has returned",
            "my.py: second does not return; the ladder begins again without it",
            "first has returned",
            "second was given up after 0.5",
            "third has returned",
        ],
    )
    line = "my.py: second has been in compiled code, which cannot be stopped, for 0 s; the ladder"
    assert err.startswith(line)
    assert len(err.splitlines()) == 1


@needs_fork
def test_a_slow_function_is_waited_for_and_compilation_takes_any_time(tmp_path):
    script = script_of_ladder(tmp_path, seconds=0.3, compilation=1.3, patience=1)
    status, out, err = forked(script, cwd=tmp_path)
    assert status == 7
    assert out == "first has returned\nsecond has returned\nthird has returned\n"
    assert len(err.splitlines()) == 1


@needs_fork
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_ends_a_ladder_that_waits_for_an_endless_function(tmp_path, number):
    script = script_of_ladder(tmp_path, seconds=60, compilation=0, patience=60)
    environment = os.environ | {"PYTHONPATH": import_path(ROOT)}
    with subprocess.Popen(
        [sys.executable, script],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        end = time.monotonic() + 60
        while not (tmp_path / "second").exists() and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)  # the child holds the streams until it ends
    what = {signal.SIGINT: "interrupted", signal.SIGTERM: "ended by SIGTERM"}[number]
    line = f"python -m benchmarks run ladder: {what}; a CSV in --output holds complete cases only"
    assert err.splitlines()[-1] == line
    assert process.returncode == 128 + number


@needs_fork
def test_a_signal_that_ends_the_ladder_is_named_with_the_function(capsys):
    pid = os.posix_spawnp("sh", ["sh", "-c", "kill -KILL $$"], os.environ)
    child = Child(pid, pipe=-1)
    child.call = Call("folder/my.py", "max_numba", 10.0)
    assert child.status() == 128 + signal.SIGKILL
    assert capsys.readouterr().err == "my.py: max_numba has ended the ladder by SIGKILL\n"


@needs_fork
@pytest.mark.slow
def test_numbas_code_that_never_returns_is_named_and_the_others_are_tried(tmp_path):
    pytest.importorskip("numba", reason="the function is Numba's")
    (tmp_path / "my.py").write_text(
        "from numba import njit\n\n"
        "@njit\ndef max_numba(A, B):\n"
        "    i = 0\n    while i < A.shape[0]:\n        A[0, 0] = i // 2\n    return A\n\n"
        "def max_cpu(A, B):\n"
        "    return [[max(a, b) for a, b in zip(*rows)] for rows in zip(A.tolist(), B.tolist())]\n"
    )
    script = tmp_path / "command.py"
    script.write_text(
        "import sys\nfrom benchmarks.flags import run\n"
        "from benchmarks.ladder import guard, rungs, student\n"
        "guard.PATIENCE = student.LIMIT = 1.0\n"
        "sys.argv[1:] = ['--quick', '--with', 'my.py']\n"
        "if __name__ == '__main__':\n    run(lambda: guard.guarded(rungs.main), 'run ladder')\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": import_path(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 1
    assert "my.py: max_numba does not return; the ladder begins again without it" in done.stdout
    reason = "my.py: max_numba, 1 core: its compiled code did not return within 2 s"
    assert f"Too slow: {reason}" in done.stdout
    assert "│ my.py: max_cpu" in done.stdout
