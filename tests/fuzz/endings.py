# SPDX-License-Identifier: MIT
"""Random ends: of a student's functions, and of training that a signal stops.

A trial is one of two kinds:

- exercise: under ``python -m torchpar exercises`` some of a student's functions end the process,
  fork it, raise, or never return: when they are checked, or late in the training. So may the file's
  top level. Each is named once, in a verdict of its own and with a status that is not 0. The other
  functions are right, and nothing runs twice.
- stopped: after a random step, some of the ranks of a run receive SIGTERM, SIGINT, SIGHUP or
  SIGQUIT. All ranks save the same step, and end with a status that is not 0. The same command ends
  with the bits of a run that nothing stopped.
"""

import os
import random
import re
import runpy
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torch._dynamo  # which an optimizer's first step would import
from driver import Found, run
from plain_loop import train as train_plainly  # which `driver` puts on the path
from saved import latest, same, steps, tensors
from torch.nn.parallel import DistributedDataParallel

from torchpar.baselines import exercises, grader
from torchpar.data import Samples
from torchpar.nn import MLP
from torchpar.parallel import join_world
from torchpar.parallel.launch import guard
from torchpar.training import CheckpointConfig, sgd, stop
from torchpar.training.answers import STOPPING

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
    "raises(Silent)": "Silent: (str of it raises RuntimeError)",
    "atexit.register(os._exit, 0)": "",
    "atexit.register(os.kill, os.getpid(), signal.SIGKILL)": "",
    "setattr(sys, 'stdout', None)": "",
    "os.closerange(1, 3)": "",
    "os.dup2(os.open(os.devnull, os.O_WRONLY), 1)": "",
    "os.fork()": "",
    "os.fork() or sys.exit(3)": "",
    "os.fork() or os._exit(3)": "",
}
IMPORTS = """import atexit, ctypes, os, signal, sys
calls = []

class Silent(BaseException):
    def __str__(self): raise RuntimeError

def raises(error): raise error
"""
LATE = 30  # calls, which no check makes
EPOCHS, STEPS = 20, 5  # of a run, and of its epochs
PER_BATCH = ("sigmoid", "sigmoid_prime", "zeros_weights", "zeros_biases", "add_elementwise")


def trial(rng: random.Random) -> str:
    return (stopped if rng.random() < 0.3 else exercise)(rng)


def exercise(rng: random.Random) -> str:
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
    err = re.sub(r"\d+ of \d+ batches after \d+ s\n", "", err)  # of a busy machine
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
        raise Found(f"in the training {late!r}: {out.splitlines()[-1]!r}, {out!r}, {err!r}")
    if status != int(bool(any(expected.values()) or late or top)) or err:
        raise Found(f"status {status}: {expected} {late!r} {top!r}: {out!r}, {err!r}")


def exercised(text: str) -> tuple[int, str, str]:
    """The status of the command for a file of this text, and its streams."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "my.py").write_text(text)
        sys.argv = ["torchpar", "exercises", "--with", "my.py"]
        pid = forked(Path(folder), lambda: runpy.run_module("torchpar", run_name="__main__"))
        return ended(pid, Path(folder))


def forked(folder: Path, function: Callable[[], object]) -> int:
    """Call a function in a fork, with its streams in ``folder``; return the process."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    os.chdir(folder)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_APPEND), number)
    status = 99
    try:
        function()
        status = 0
    except SystemExit as e:
        status = int(e.code or 0)
    finally:
        sys.stdout.flush()
        os._exit(status)


def ended(pid: int, folder: Path) -> tuple[int, str, str]:
    """Wait for a fork; return its status and its streams."""
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    out, err = (Path(folder, name).read_text() for name in ("out", "err"))
    return status, out, err


# Runs that a signal stops


def stopped(rng: random.Random) -> str:
    ranks, number, after = rng.choice([1, 2]), rng.choice(STOPPING), rng.randint(1, 60)
    told = rng.sample(range(ranks), rng.randint(1, ranks))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        where = f"{number.name} to ranks {told} of {ranks} in step {after}"
        statuses, out = train(folder, ranks, after, told, number)
        saved = latest(folder / "saved")
        if statuses == [0] * ranks and saved == f"step-{EPOCHS * STEPS}":  # it had ended before
            return f"ended {where}"
        lines = out.count(f"stopped by {number.name}; the state is saved")
        if statuses != [128 + number] * ranks or lines != 1:
            raise Found(f"{where}: statuses {statuses}, {out!r}")
        if steps(folder / "saved")[-1] != saved or int(saved.removeprefix("step-")) < after:
            raise Found(f"{where}: saved {steps(folder / 'saved')}")
        statuses, out = train(folder, ranks)
        if statuses != [0] * ranks or not same(last(folder), undisturbed(ranks)):
            raise Found(f"{where}: resumed with statuses {statuses}, {out!r}, or other bits")
    return f"stopped {where}"


def last(folder: Path) -> dict[str, torch.Tensor]:
    return tensors(folder / "saved" / f"step-{EPOCHS * STEPS}")


@cache
def undisturbed(ranks: int) -> dict[str, torch.Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        train(Path(folder), ranks)
        return last(Path(folder))


def train(
    folder: Path,
    ranks: int,
    after: int = 0,
    told: list[int] | None = None,
    number: signal.Signals = signal.SIGTERM,
) -> tuple[list[int], str]:
    """Train on forks; the ranks ``told`` receive a signal when they have made ``after`` steps.

    Returns:
        The status of each rank, and all that they have printed.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    pids, made = [], []
    for rank in range(ranks):
        (folder / str(rank)).mkdir(exist_ok=True)
        reading, writing = os.pipe()
        as_rank = {"RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
        environment = {**as_rank, "MASTER_PORT": port}
        pids.append(forked(folder / str(rank), lambda: run_of_rank(environment, folder, writing)))  # noqa: B023
        os.close(writing)
        made.append(reading)
    for rank in told or ():
        if sum(len(os.read(made[rank], 1)) for _ in range(after)) == after:
            os.kill(pids[rank], number)
    ends = [ended(pid, folder / str(rank)) for rank, pid in enumerate(pids)]
    for reading in made:
        os.close(reading)
    return [status for status, _, _ in ends], "".join(out + err for _, out, err in ends)


def run_of_rank(environment: dict[str, object], folder: Path, made: int) -> None:
    """Train on this rank; write a byte to the file ``made`` after each step."""
    from support import ending

    os.environ.update({name: str(value) for name, value in environment.items()})
    for number in STOPPING:  # which nohup and a shell's background ignore
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.manual_seed(0)
    samples = Samples(torch.rand(8 * STEPS, 6), torch.arange(8 * STEPS) % 3, ("a", "b", "c"))
    with ending.ending(), join_world("cpu", timeout=60) as world:
        model = MLP([6, 5, 3])
        optimizer = sgd(model, 0.1, 0.9, 0.0)
        optimizer.register_step_post_hook(lambda *_: os.write(made, b"."))
        config = CheckpointConfig(folder / "saved", every=1000)
        replica = DistributedDataParallel(model)
        parts = model, optimizer, world, samples, samples
        options = {"epochs": EPOCHS, "batch_size": 8, "checkpoint": config}
        train_plainly(*parts, replica=replica, **options)


def forgets() -> None:
    """Let the parent take each status for the command's own."""
    own = guard.Child.status
    guard.Child.status = lambda child: (own(child)[0], "")  # type: ignore[method-assign]


def goes_on() -> None:
    """Let a fork of a student's function go on as the command."""
    guard.os = type(os)("os")
    vars(guard.os).update(vars(os), getpid=lambda: 0)


def hangs_up() -> None:
    """Let SIGHUP and SIGQUIT end a run without a save."""
    stop.STOPPING = [signal.SIGTERM, signal.SIGINT]


def looks_whole() -> None:
    """Let a run that was stopped end with status 0."""
    from support import ending

    ending.sys = type(sys)("sys")
    vars(ending.sys).update(vars(sys), exit=lambda status: sys.exit(status * (status < 128)))


FAULTS = {
    "forgets": forgets,
    "goes-on": goes_on,
    "hangs-up": hangs_up,
    "looks-whole": looks_whole,
}

if __name__ == "__main__":
    from baselines.test_students_network import images

    exercises.read = lambda *_: (images(2000), images(100))  # type: ignore[assignment]
    grader.PATIENCE, guard.TICK = 2.0 - grader.LIMIT, 0.05  # type: ignore[misc]
    grader.TOP_LEVEL = grader.LIMIT
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(run(trial, FAULTS))
