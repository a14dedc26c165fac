# SPDX-License-Identifier: MIT
"""A student's function that never returns or ends the ladder, and signals meanwhile:
`torchpar.parallel.launch.guard`."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryFile

import pytest
from commands import ROOT, forked, import_path

pytest.importorskip("rich", reason="rich prints the tables of the ladder")
from torchpar.parallel.launch.guard import Call, Child

needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="the ladder forks on Linux alone")

# A ladder of three functions, the second of which returns after a while, or never. No handler of
# Python's ends it, as in compiled code.
LADDER = """
import os, signal, sys, time
from pathlib import Path
from benchmarks.flags import run
from torchpar.parallel.launch import guard

guard.NOTICE, guard.TICK, guard.GRACE = 0.2, 0.01, 0.2

def call(name, seconds, compilation=0.0):
    try:
        with guard.WATCHED.calling("my.py", name, {limit}) as compiling:
            compute(name, seconds, compilation, compiling)
    except guard.GivenUp as e:
        print(name, "is given up:", e)
    else:
        print(name, "has returned")

def compute(name, seconds, compilation, compiling):
    compiling(True)
    time.sleep(compilation)
    compiling(False)
    Path(name).touch()
    end = time.monotonic() + seconds
    while time.monotonic() < end: pass

def main():
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    call("first", 0)
    call("second", {seconds}, {compilation})
    call("third", 0)
    return 7

run(lambda: guard.guarded(main, "the ladder"), "run ladder")
"""


def script_of_ladder(folder: Path, **seconds: float) -> str:
    script = folder / "ladder.py"
    script.write_text(LADDER.format(**seconds))
    return str(script)


@needs_fork
def test_an_endless_function_is_given_up_and_the_others_are_called_again(tmp_path):
    script = script_of_ladder(tmp_path, seconds=60, compilation=0, limit=0.5)
    status, out, err = forked(script, cwd=tmp_path)
    assert (status, out.splitlines()) == (
        7,
        [
            "first has returned",
            "my.py: second does not end within 0 s (ladder.py, line 24); the ladder begins again "
            "without it",
            "first has returned",
            "second is given up: it does not end within 0 s (ladder.py, line 24)",
            "third has returned",
        ],
    )
    assert err == "my.py: second has not ended for 0 s; the ladder gives it up after 0 s\n"


@needs_fork
def test_a_slow_function_is_waited_for_and_compilation_takes_any_time(tmp_path):
    script = script_of_ladder(tmp_path, seconds=0.4, compilation=3.3, limit=3)
    status, out, err = forked(script, cwd=tmp_path)
    assert status == 7
    assert out == "first has returned\nsecond has returned\nthird has returned\n"
    notice, *at_end = err.splitlines()
    assert notice == "my.py: second has not ended for 0 s; the ladder gives it up after 3 s"
    # Where the machine is busy, the process has not ended within the guard's time.
    assert at_end in ([], ["the ladder is done, but its process does not end, and is stopped"])


@needs_fork
def test_a_process_that_ends_slowly_is_waited_for(tmp_path):
    script = script_of_ladder(tmp_path, seconds=0, compilation=0, limit=3)
    # As where a busy machine takes long to unload PyTorch.
    text = Path(script).read_text().replace("\nrun(", "\ntry: run(")
    Path(script).write_text(f"{text}finally: time.sleep(8 * guard.GRACE)\n")
    status, out, err = forked(script, cwd=tmp_path)
    assert (status, out.splitlines()[-1], err) == (7, "third has returned", "")


@needs_fork
@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, id="Ctrl-C"),
        pytest.param(signal.SIGTERM, id="SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_a_ladder_that_waits_for_an_endless_function(tmp_path, number):
    script = script_of_ladder(tmp_path, seconds=60, compilation=0, limit=60)
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


# Functions that end their process or fork it, each in its own way.
ENDS = """
import ctypes, os, signal, sys
from torchpar.parallel.launch import guard

FUNCTIONS = {
    "right": lambda: None,
    "exits": lambda: os._exit(0),
    "exits_in_c": lambda: ctypes.CDLL(None)._exit(3),
    "faults": lambda: ctypes.string_at(0),
    "is_killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "raises": lambda: sys.exit("bye"),
    "forks": lambda: os.fork(),
    "forks_and_raises": lambda: os.fork() or sys.exit("a child"),
}

def main():
    for name, function in FUNCTIONS.items():
        try:
            with guard.WATCHED.calling("my.py", name, 60.0):
                function()
        except (guard.GivenUp, SystemExit) as e:
            print(name, "is wrong:", e)
        else:
            print(name, "is right")
    if "--late" in sys.argv:
        os._exit(0)
    if "--exit" in sys.argv:  # as an error's str may do, outside of a call
        sys.exit(0)
    return 7

sys.exit(guard.guarded(main, "the ladder"))
"""
HOW = {
    "exits": "with status 0, as os._exit does",
    "exits_in_c": "with status 3, as os._exit does",
    "faults": "by SIGSEGV (ends.py, line 9)",
    "is_killed": "by SIGKILL",
}


@needs_fork
def test_an_end_of_the_process_is_named_with_its_function_and_a_fork_ends_in_silence(tmp_path):
    script = tmp_path / "ends.py"
    script.write_text(ENDS)
    status, out, err = forked(str(script), cwd=tmp_path)
    assert (status, err) == (7, "")
    lines = out.splitlines()
    assert [line for line in lines if "begins again" in line] == [
        f"my.py: {name} ends the process {how}; the ladder begins again without it"
        for name, how in HOW.items()
    ]
    assert lines[-8:] == [
        "right is right",
        *(
            f"{name} is wrong: it ends the process {how}"
            f"{'; return the result instead' if 'status' in how else ''}"
            for name, how in HOW.items()
        ),
        "raises is wrong: bye",
        "forks is right",
        "forks_and_raises is right",
    ]
    assert out.count("forks is right") == 1
    status, _, err = forked(str(script), "--late", cwd=tmp_path)
    assert (status, err) == (1, "the ladder was ended with status 0, as os._exit does\n")
    status, _, err = forked(str(script), "--exit", cwd=tmp_path)
    assert (status, err) == (1, "the ladder was ended by sys.exit(0)\n")


# What a reader's module does when it is imported, of which a command finds the status 7 or 0, and
# what stderr says then. Python ends each process, and calls its handlers.
LATE = """
import atexit, os, signal, sys, threading, time
from torchpar.parallel.launch import guard

guard.TICK, guard.GRACE = 0.01, 0.2

class Out:
    def __getattr__(self, name): raise SystemExit(0)

def redirected():
    null = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2): os.dup2(null, number)

def patched():
    sys.stdout = sys.stderr = Out()

IMPORTED = {
    "nothing": lambda: None,
    "os._exit": lambda: atexit.register(os._exit, 0),
    "another status": lambda: atexit.register(os._exit, 5),
    "sys.exit": lambda: atexit.register(sys.exit, 0),
    "a signal": lambda: atexit.register(os.kill, os.getpid(), signal.SIGKILL),
    "a thread": lambda: threading.Thread(target=time.sleep, args=[60], name="T").start(),
    "hooks": lambda: setattr(sys, "excepthook", lambda *_: os._exit(0)),
    "no stdout": lambda: setattr(sys, "stdout", None),
    "another stdout": patched,
    "no files": lambda: (os.close(1), os.close(2)),
    "other files": redirected,
    "other lines": lambda: os.write(guard.WATCHED.pipe, b'[0, ""]\\n{]\\n[1]\\n7\\n[[\\n'),
}

def main(name, status):
    with guard.WATCHED.calling("my.py", name, 60.0):
        IMPORTED[name]()
    print(name, "has", status, flush=True)
    return status

for name in IMPORTED:
    for status in (7, 0):
        if os.fork() == 0:
            sys.exit(guard.guarded(lambda: main(name, status), "the ladder"))
        _, found = os.wait()
        if os.waitstatus_to_exitcode(found) != status:
            print(name, "ends with", os.waitstatus_to_exitcode(found), "instead of", status)
"""


@needs_fork
def test_the_status_is_that_which_was_found_whatever_the_process_does_then(tmp_path):
    script = tmp_path / "late.py"
    script.write_text(LATE)
    status, out, err = forked(str(script), cwd=tmp_path)
    assert status == 0
    names = LATE.split("IMPORTED = {")[1].split("}\n\ndef")[0]
    expected = [line.split('"')[1] for line in names.splitlines() if line.startswith('    "')]
    assert out.splitlines() == [f"{name} has {number}" for name in expected for number in (7, 0)]
    said = {line for line in err.splitlines() if line.startswith("the ladder")}
    assert said == {
        "the ladder is done, but its process does not end, and is stopped: its thread T has not "
        "ended; join it, or start it with daemon=True"
    }


@needs_fork
def test_a_signal_that_ends_the_ladder_is_named_with_the_function(capsys):
    read, write = os.pipe()
    os.close(write)
    with TemporaryFile() as dump:
        for call, line in (
            (Call("folder/my.py", "max_numba", 10.0), "my.py: max_numba has ended the ladder"),
            (None, "the ladder was ended"),
        ):
            pid = os.posix_spawnp("sh", ["sh", "-c", "kill -KILL $$"], os.environ)
            child = Child(pid, read, "the ladder", dump)
            child.call = call
            assert child.say(*child.status()) == 128 + signal.SIGKILL
            assert capsys.readouterr().err == f"{line} by SIGKILL\n"
    os.close(read)


@needs_fork
@pytest.mark.slow
def test_functions_that_end_the_ladder_or_never_return_are_named_and_the_others_are_tried(tmp_path):
    pytest.importorskip("numba", reason="a function is Numba's")
    (tmp_path / "my.py").write_text(
        "import os\nfrom numba import njit\n\n"
        "@njit\ndef max_numba(A, B):\n"
        "    i = 0\n    while i < A.shape[0]:\n        A[0, 0] = i // 2\n    return A\n\n"
        "def max_cpu(A, B):\n    os.fork()\n"
        "    return [[max(a, b) for a, b in zip(*rows)] for rows in zip(A.tolist(), B.tolist())]\n"
        "def maximum(A, B):\n    os._exit(0)\n"
    )
    script = tmp_path / "command.py"
    script.write_text(
        "import sys\nfrom benchmarks.flags import run\n"
        "from benchmarks.ladder import rungs, student\n"
        "from torchpar.baselines import grader\n"
        "from torchpar.parallel.launch.guard import guarded\n"
        "grader.PATIENCE = student.LIMIT = 1.0\n"
        "sys.argv[1:] = ['--quick', '--with', 'my.py']\n"
        "if __name__ == '__main__':\n"
        "    run(lambda: guarded(rungs.main, 'the ladder'), 'run ladder')\n"
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
    assert "my.py: max_numba does not end within 2 s" in done.stdout
    reason = "my.py: max_numba, 1 core: it does not end within 2 s"
    assert f"Too slow: {reason}" in done.stdout
    how = "it ends the process with status 0, as os._exit does; return the result instead"
    assert f"Not right: my.py: maximum: {how}" in done.stdout
    assert done.stdout.count("│ my.py: max_cpu") == 1
