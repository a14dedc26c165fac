# SPDX-License-Identifier: MIT
"""Check a student's mpi4py program: ``python -m torchpar exercises --with my_mpi.py``.

The program is a course's full-batch descent, which prints its cost in each iteration. It runs by
``mpirun`` on one process and on two. Both must end, and the costs of two must be those of one,
which fall. Then the messages of process 0 are listed by their time.
"""

import ast
import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from torchpar.baselines.grader import TOP_LEVEL, watching
from torchpar.baselines.mpi import find_mpirun
from torchpar.errors import ConfigError
from torchpar.parallel.launch.guard import WATCHED
from torchpar.parallel.launch.processes import die_with_parent

WATCH = Path(__file__).with_name("mpi_watch.py")
NOTICED = 5.0  # seconds before the limit of a run, when the processes write where they are
# Seconds of a run on two processes, to which so many times the seconds of one are added.
LEAST, TIMES = 20.0, 10.0
# Sums in another order differ by less. A sample that is left out of thousands shows more.
TOLERANCE = 1e-4
NUMBER = r"[-+]?(?:\d+(?:\.\d*)?(?:e[-+]?\d+)?|\.\d+|nan|inf)"
COST = rf"(?<![a-z])(?:cost|loss)\b[^|]*?(?<![\w.])({NUMBER})(?!\w)"
# What a line may say of a cost before its number: "(iter 5)", "at iteration 12", "after 3 epochs".
OF_COST = r"\s\([^)]*\)|\b(?:at|in|of|after)\s+(?:[a-z]+\s+\d+|\d+\s+[a-z]+)"


class Message(NamedTuple):
    """What the calls of one of MPI's functions take together."""

    name: str
    calls: int
    seconds: float
    bytes: int


class Started(NamedTuple):
    """A run that has ended: its costs, its seconds, and the messages of process 0."""

    costs: list[float]
    seconds: float
    messages: list[Message]


class Failed(Exception):
    """A run did not end as it should; says how."""


def is_program(path: Path, functions: Sequence[str]) -> bool:
    """Whether a file imports mpi4py, and defines none of the ``functions``."""
    try:
        tree = ast.parse(path.read_text("utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return False
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    imported = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {one.name.partition(".")[0] for one in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
    return "mpi4py" in imported and not defined & {*functions}


def costs_of(text: str) -> list[float]:
    """The numbers behind the words cost or loss, one of each line."""
    plain = re.sub(r"(?<=\d),(?=\d{3}\b)", "", re.sub(OF_COST, "", text, flags=re.IGNORECASE))
    found = (re.search(COST, line, re.IGNORECASE) for line in plain.splitlines())
    return [float(one[1]) for one in found if one]


def run(file: Path, processes: int, limit: float) -> Started:
    """Run a program by mpirun, for ``limit`` seconds.

    Raises:
        Failed: it does not end by then, or ends by an error.
        ConfigError: mpi4py or mpirun is missing.
    """
    mpirun = find_mpirun()
    if mpirun is None or importlib.util.find_spec("mpi4py") is None:
        raise ConfigError("a program of mpi4py needs mpi4py and mpirun; pip install mpi4py mpich")
    command = [mpirun, "-n", str(processes), sys.executable, str(WATCH)]
    variables = dict(os.environ)
    variables |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with TemporaryDirectory() as name:
        folder, where = Path(name), str(max(limit - NOTICED, 0.1))
        with (folder / "stderr").open("w") as stderr:
            started = subprocess.Popen(
                [*command, name, where, str(file.resolve())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env=variables,
                start_new_session=True,
                preexec_fn=lambda: die_with_parent(signal.SIGTERM),
            )
        try:
            wait_for_start(started, [folder / f"{rank}.out" for rank in range(processes)])
            status = started.wait(limit)
        except subprocess.TimeoutExpired as e:
            raise Failed(f"does not end within {e.timeout:.0f} s{places(folder, file)}") from None
        finally:
            end(started)
        if errors := sorted(folder.glob("*.error")):
            raise Failed(f"ends by an error of process {errors[0].stem}: {errors[0].read_text()}")
        ranks = [folder / f"{rank}.json" for rank in range(processes)]
        if status or not all(one.is_file() for one in ranks):
            said = (folder / "stderr").read_text(errors="replace").strip().splitlines()
            last = f": {said[-1]}" if said else ""
            raise Failed(f"ends with status {status}{last}")
        taken = json.loads(ranks[0].read_text())
        printed = (
            (folder / f"{rank}.out").read_text(errors="replace") for rank in range(processes)
        )
        costs = next(filter(None, map(costs_of, printed)), [])
    messages = [Message(name, *one) for name, one in taken["messages"].items()]
    return Started(costs, taken["seconds"], sorted(messages, key=lambda one: -one.seconds))


def wait_for_start(started: "subprocess.Popen[bytes]", files: Sequence[Path]) -> None:
    """Wait until all processes have begun the program, which its limit does not count."""
    last = time.monotonic() + TOP_LEVEL
    while started.poll() is None and not all(one.is_file() for one in files):
        if time.monotonic() > last:
            raise subprocess.TimeoutExpired("mpirun", TOP_LEVEL)
        time.sleep(0.02)


def end(started: "subprocess.Popen[bytes]") -> None:
    """End mpirun, which ends its processes, and whatever is left of its group."""
    if started.poll() is None:
        started.terminate()
        try:
            started.wait(3)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)
            started.wait()


def places(folder: Path, file: Path) -> str:
    """The lines of a program where its processes were last, as " (process 0: my.py, line 7)"."""
    found = []
    for where in sorted(folder.glob("*.where")):
        if where.with_suffix(".json").is_file():
            found.append(f"process {where.stem} has ended")
            continue
        line = re.search(rf'File "{re.escape(str(file.resolve()))}", line (\d+)', where.read_text())
        if line:
            found.append(f"process {where.stem}: {file.name}, line {line[1]}")
    return f" ({'; '.join(found)})" * bool(found)


def compare(one: Started, two: Started) -> str:
    """How far the costs of two processes are those of one.

    Raises:
        Failed: they do not fall, or differ.
    """
    for who, costs in (("1 process", one.costs), ("2 processes", two.costs)):
        if len(costs) < 2:
            raise Failed(
                f"prints {len(costs)} costs on {who}, expected one of each iteration; print lines "
                "such as 'cost 7.39'"
            )
        if unknown := [i for i, cost in enumerate(costs, 1) if not math.isfinite(cost)]:
            raise Failed(
                f"prints the cost {costs[unknown[0] - 1]:g} on {who}, as its cost {unknown[0]} of "
                f"{len(costs)}; look for a logarithm of 0, too high a rate, or a buffer of another "
                "dtype"
            )
        if not costs[-1] < costs[0]:
            raise Failed(f"has costs that do not fall on {who}: {costs[0]:g} to {costs[-1]:g}")
    if len(one.costs) != len(two.costs):
        raise Failed(f"prints {len(one.costs)} costs on 1 process, and {len(two.costs)} on 2")
    pairs = list(zip(one.costs, two.costs, strict=True))
    off = [abs(b - a) / max(abs(a), 1e-12) for a, b in pairs]
    for i, (a, b) in enumerate(pairs):
        if not off[i] <= TOLERANCE:
            raise Failed(
                f"prints the cost {b:g} on 2 processes as its cost {i + 1} of {len(off)}, and "
                f"{a:g} on 1; sums over shares must be those of all processes, divided by the "
                "number of all samples"
            )
    return f"the costs of 2 processes are those of 1, to {max(off):.0e}"


def in_messages(taken: Started) -> Iterator[str]:
    """Lines on the messages of process 0, and which dominates."""
    if not taken.messages:
        yield (
            "process 0 sends no message by MPI.COMM_WORLD that is timed; messages such as Isend "
            "and Iallreduce are not"
        )
        return
    for one in taken.messages:
        size = f", {one.bytes // one.calls:,} bytes each" * bool(one.bytes)
        calls = f"{one.calls} call{'s' * (one.calls > 1)}"
        yield f"  {one.name}: {1000 * one.seconds:.3g} ms in {calls}{size}"
    whole, first = sum(one.seconds for one in taken.messages), taken.messages[0]
    yield (
        f"{first.name} dominates: {first.seconds / whole:.0%} of the {1000 * whole:.3g} ms that "
        f"process 0 spends in messages, of {1000 * taken.seconds:.3g} ms; waiting for the other "
        "process is a part of it"
    )


def check(path: Path) -> int:
    """Run a program on one process and on two, and print what is found; 1 if it is not right.

    Raises:
        ConfigError: mpi4py or mpirun is missing.
    """
    file, runs = str(path.resolve()), list[Started]()
    limit, who = TOP_LEVEL, ""
    try:
        for processes in (1, 2):
            who = f"mpirun -n {processes}"
            with watching(file, who, TOP_LEVEL + limit, limit):
                runs.append(run(path, processes, limit))
            costs = runs[-1].costs
            told = f"{len(costs)} costs" + (f", {costs[0]:g} to {costs[-1]:g}" if costs else "")
            WATCHED.say(f"{path.name}: {who} ends after {runs[-1].seconds:.3g} s; {told}")
            limit = min(TOP_LEVEL, LEAST + TIMES * runs[-1].seconds)
        who = ""
        agreement = compare(*runs)
    except Failed as e:
        print(f"{path.name} is not right: {who or 'it'} {e}")
        return 1
    for line in in_messages(runs[1]):
        print(line)
    times = runs[0].seconds / runs[1].seconds
    print(f"1 process takes {times:.3g} times as long as 2, with one thread each")
    print(f"{path.name} is right: {agreement}")
    return 0
