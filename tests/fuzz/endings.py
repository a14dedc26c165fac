# SPDX-License-Identifier: MIT
"""Random ends of a student's functions under ``python -m torchpar exercises``.

Some functions end the process, fork it, raise, or never return: when they are checked, or late in
the training. So may the file's top level. Each is named once, in a verdict of its own and with a
status that is not 0. The other functions are right, and nothing runs twice.
"""

import os
import random
import re
import runpy
import signal
import sys
import tempfile
from pathlib import Path

from driver import Found, run

from torchpar.baselines import exercises, grader
from torchpar.parallel.launch import guard

EXIT = "ends the process with status {}, as os._exit does"
HOLDS = "does not end within 2 s"
# An expression that ends a function, and what is said of it; "" where the function is right.
ENDS = {
    "os._exit(0)": EXIT.format(0),
    "os._exit(5)": EXIT.format(5),
    "ctypes.CDLL(None)._exit(0)": EXIT.format(0),
    "ctypes.string_at(0)": "ends the process by SIGSEGV",
    "os.abort()": "ends the process by SIGABRT",
    "os.kill(os.getpid(), signal.SIGKILL)": "ends the process by SIGKILL",
    "ctypes.PyDLL(None).pause()": HOLDS,
    "sys.exit(0)": "SystemExit: 0; return the result instead",
    "exit('bye')": "SystemExit: bye; return the result instead",
    "1 / 0": "ZeroDivisionError: division by zero",
    "os.fork()": "",
    "os.fork() or sys.exit(3)": "",
    "os.fork() or os._exit(3)": "",
}
IMPORTS = "import ctypes, os, signal, sys\ncalls = []"
LATE = 30  # calls, which no check makes
PER_BATCH = ("sigmoid", "sigmoid_prime", "zeros_weights", "zeros_biases", "add_elementwise")


def trial(rng: random.Random) -> str:
    from baselines.test_students_network import RIGHT, beginning  # which `driver` puts on the path

    text, expected = f"{IMPORTS}{RIGHT}", dict.fromkeys(exercises.CHECKS, "")
    for name in exercises.CHECKS:
        if rng.random() < 0.2:
            end = rng.choice([*ENDS])
            text, expected[name] = beginning(text, **{name: end}), ENDS[end]
    expected["sigmoid_prime"] = expected["sigmoid_prime"] or expected["sigmoid"]  # which it calls
    late = ""
    if not any(expected.values()) and rng.random() < 0.7:
        name, end = rng.choice(PER_BATCH), rng.choice([one for one in ENDS if ENDS[one]])
        line = f"calls.append(0); len(calls) > {LATE} and {end}"
        text, late = beginning(text, **{name: line}), ENDS[end]
    top = rng.choice([*ENDS]) if rng.random() < 0.2 else ""
    status, out, err = exercised(f"{text}\n{top}\n")
    check(status, out, err, expected, late, ENDS.get(top, ""))
    return f"{status} {re.sub('epoch.*', '', out)}"


def check(status: int, out: str, err: str, expected: dict[str, str], late: str, top: str) -> None:
    """Raise `Found` unless each end is named, and no other."""
    ends_top = top.startswith(("ends", "does not end"))
    if ends_top:
        if status != 2 or out or f"its top level {top}" not in err or err.count("\n") != 1:
            raise Found(f"top level {top!r}: status {status}, {out!r}, {err!r}")
        return
    for name, how in expected.items():
        verdicts = re.findall(rf"my.py: {name} is (right|not right)(.*)", out)
        right = "not right" if how else "right"
        if [one for one, _ in verdicts] != [right] or how not in verdicts[0][1]:
            raise Found(f"{name} {how!r}: {verdicts}, {out!r}, {err!r}")
    if late and late.removesuffix("; return the result instead") not in out.splitlines()[-1]:
        raise Found(f"in the training {late!r}: {out!r}, {err!r}")
    if status != int(bool(any(expected.values()) or late or top)) or err:
        raise Found(f"status {status}: {expected} {late!r} {top!r}: {out!r}, {err!r}")


def exercised(text: str) -> tuple[int, str, str]:
    """The status of the command for a file of this text, and its streams."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "my.py").write_text(text)
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            os.chdir(folder)
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
            sys.argv = ["torchpar", "exercises", "--with", "my.py"]
            status = 99
            try:
                runpy.run_module("torchpar", run_name="__main__")
            except SystemExit as e:
                status = int(e.code or 0)
            finally:
                sys.stdout.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        out, err = (Path(folder, name).read_text() for name in ("out", "err"))
        return status, out, err


def forgets() -> None:
    """Let the parent take each status for the command's own."""
    own = guard.Child.status
    guard.Child.status = lambda child: (own(child)[0], "")  # type: ignore[method-assign]


def goes_on() -> None:
    """Let a fork of a student's function go on as the command."""
    guard.os = type(os)("os")
    vars(guard.os).update(vars(os), getpid=lambda: 0)


if __name__ == "__main__":
    from baselines.test_students_network import images

    exercises.read = lambda *_: (images(2000), images(100))  # type: ignore[assignment]
    grader.PATIENCE, guard.TICK = 2.0 - grader.LIMIT, 0.05  # type: ignore[misc]
    grader.TOP_LEVEL = grader.LIMIT
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(run(trial, {"forgets": forgets, "goes-on": goes_on}))
