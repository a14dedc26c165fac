# SPDX-License-Identifier: MIT
"""The check of a student's mpi4py program: its ends, its costs, and its messages."""

import re
from pathlib import Path
from unittest.mock import patch

import pytest
from commands import needs_mpirun

from torchpar.baselines import exercises, mpi_watch, students_mpi
from torchpar.baselines.students_mpi import Failed, Message, Started
from torchpar.errors import ConfigError

PROGRAM = """
import numpy as np
from mpi4py import MPI

comm = MPI.COMM_WORLD
rank, size, n = comm.rank, comm.size, 40
x = y = None
if rank == 0:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 5))
    y = (x.sum(1) > 0).astype(float)
w, mine, labels = np.zeros(5), np.empty((n // size, 5)), np.empty(n // size)
for i in range(10):
    comm.Scatter(x, mine)
    comm.Scatter(y, labels)
    comm.Bcast(w)
    p = 1 / (1 + np.exp(-mine @ w))
    costs = comm.gather(-(labels * np.log(p) + (1 - labels) * np.log(1 - p)).sum())
    gradients = np.empty((size, 5)) if rank == 0 else None
    comm.Gather(mine.T @ (p - labels), gradients)
    if rank == 0:
        print(f"iteration {i + 1}/10 | cost {sum(costs) / n:.6f} | {i} ms")
        w -= 0.5 * gradients.sum(0) / n
"""


def checked(folder: Path, text: str) -> int:
    (folder / "my_mpi.py").write_text(text)
    return exercises.main(["--with", str(folder / "my_mpi.py")])


@needs_mpirun
def test_a_right_program_has_the_costs_of_one_process_and_its_messages_by_time(tmp_path, capsys):
    pytest.importorskip("mpi4py", reason="the program is of mpi4py")
    assert checked(tmp_path, PROGRAM) == 0
    lines = capsys.readouterr().out.splitlines()
    for processes, line in enumerate(lines[:2], 1):
        told = rf"mpirun -n {processes} ends after \S+ s; 10 costs, 0\.693147 to 0\.\d+"
        assert re.fullmatch(f"my_mpi.py: {told}", line)
    messages = [
        re.fullmatch(r"  (\w+): \S+ ms in (\d+) calls, (\d+) bytes each", one) for one in lines[2:6]
    ]
    found = {one[1]: (int(one[2]), int(one[3])) for one in messages if one}
    # Of both Scatters 20 calls: 40·5 and 40 numbers of 8 bytes in turn. gather has two numbers.
    assert found == {
        "Scatter": (20, (1600 + 320) // 2),
        "Bcast": (10, 40),
        "Gather": (10, 80),
        "gather": (10, 16),
    }
    assert re.match(rf"{messages[0][1]} dominates: \d+% of the ", lines[6])
    assert lines[-1].startswith("my_mpi.py is right: the costs of 2 processes are those of 1, to ")


@pytest.mark.slow
@needs_mpirun
@pytest.mark.parametrize(
    "line, instead, says",
    [
        (
            "gradients.sum(0) / n",
            "gradients.mean(0) / n",
            r"it prints the cost \S+ on 2 processes as its cost 2 of \d+, and \S+ on 1; sums over",
        ),
        (
            "    comm.Bcast(w)",
            "    pass",  # the other process keeps the first weights
            r"it prints the cost \S+ on 2 processes as its cost 2 of \d+, and \S+ on 1; ",
        ),
        (
            "    comm.Bcast(w)",
            "    comm.Bcast(w)\n    if rank == 1:\n        comm.recv(source=0)",
            r"mpirun -n 2 does not end within \d+ s \(process 0: my_mpi.py, line \d+; process 1: "
            r"my_mpi.py, line 18\)",
        ),
        (
            "    comm.Bcast(w)",
            "    comm.Bcast(w[:7 - 3 * size])\n    assert size == 1, 'for one'",
            r"mpirun -n 2 ends by an error of process \d: my_mpi.py, line 17: AssertionError: for",
        ),
        (
            "    comm.Bcast(w)",
            "    class E(BaseException):\n        __str__ = lambda self: 1 / 0\n    raise E",
            r"mpirun -n 1 ends by an error of process 0: my_mpi.py, line 18: E: \(str of it raises "
            r"ZeroDivisionError\)",
        ),
        (
            "import numpy as np",
            "import numpy as np, sys\nsys.stdout = None",
            "it prints 0 costs on 1 process, expected one of each ",
        ),
        ("w -= 0.5", "w += 0.5", "it has costs that do not fall on 1 process: 0.693147 to "),
        ("cost {sum", "value {sum", "it prints 0 costs on 1 process, expected one of each "),
    ],
)
def test_what_is_wrong_with_a_program_is_named(tmp_path, capsys, line, instead, says):
    pytest.importorskip("mpi4py", reason="the program is of mpi4py")
    assert line in PROGRAM
    with patch.object(students_mpi, "LEAST", 12.0):
        assert checked(tmp_path, PROGRAM.replace(line, instead)) == 1
    assert re.search(f"^my_mpi.py is not right: {says}", capsys.readouterr().out, re.M)


@pytest.mark.parametrize(
    "text, costs",
    [
        ("iteration 3/60 | cost 7.39 | 2.67 ms", [7.39]),
        ("Cost at iteration 12: 7.5e-1\nloss = .5 (rate 0.1)", [0.75, 0.5]),
        ("cost after 3 iterations: 0.25\ncost: [np.float64(0.5)]", [0.25, 0.5]),
        ("loss (iter 5): 0.3\nThe cost is 1,234.5\ntotal_loss=4", [0.3, 1234.5, 4.0]),
        ("cost 0.5, accuracy: 0.9\nlossless 7\ncost info 3", [0.5, 3.0]),
        ("costs of 3 runs\n12 images\ncost nan\nCOST: -1", [float("nan"), -1.0]),
    ],
)
def test_costs_are_the_numbers_behind_their_word(text, costs):
    assert students_mpi.costs_of(text) == pytest.approx(costs, nan_ok=True)


@pytest.mark.parametrize(
    "one, two, reason",
    [
        ([3.0, 2.0, 1.0], [3.0, 2.0, 1.00002], ""),
        ([3.0, 2.0, 1.0], [3.0, 2.0, 1.001], "1.001 on 2 processes as its cost 3 of 3, and 1 on 1"),
        ([3.0, 2.0], [3.0, 2.0, 1.0], "prints 2 costs on 1 process, and 3 on 2"),
        ([3.0, 2.0], [3.0, 3.0], "do not fall on 2 processes: 3 to 3"),
        (
            [3.0, float("nan")],
            [3.0, 2.0],
            "nan on 1 process, as its cost 2 of 2; look for a logarit",
        ),
        (
            [3.0, 2.0],
            [3.0, float("inf")],
            "inf on 2 processes, as its cost 2 of 2; look for a logar",
        ),
        ([3.0], [3.0, 2.0], "prints 1 costs on 1 process, expected one of each iteration"),
    ],
)
def test_costs_fall_as_those_of_one_process(one, two, reason):
    runs = Started(one, 1.0, []), Started(two, 1.0, [])
    if not reason:
        assert students_mpi.compare(*runs) == "the costs of 2 processes are those of 1, to 2e-05"
        return
    with pytest.raises(Failed, match=re.escape(reason)):
        students_mpi.compare(*runs)


def test_a_process_that_has_ended_is_told_from_one_that_waits(tmp_path):
    file = tmp_path / "my_mpi.py"
    for rank in (0, 1):
        (tmp_path / f"{rank}.where").write_text(f'  File "{file}", line {7 + rank} in <module>')
    (tmp_path / "0.json").touch()
    said = students_mpi.places(tmp_path, file)
    assert said == " (process 0 has ended; process 1: my_mpi.py, line 8)"


def test_an_error_has_one_line_whatever_its_class_does():
    class Silent(Exception):
        def __str__(self) -> str:
            raise SystemExit

    class Long(Exception):
        def __str__(self) -> str:
            return "x" * 10**6

    assert mpi_watch.told_by(ValueError("a\nb")) == "ValueError: a"
    assert mpi_watch.told_by(Silent()) == "Silent: (str of it raises SystemExit)"
    assert mpi_watch.told_by(Long()) == f"Long: {'x' * 994}"


def test_the_message_that_takes_most_is_named():
    messages = [Message("Gather", 10, 0.3, 1000), Message("barrier", 1, 0.1, 0)]
    *lines, last = students_mpi.in_messages(Started([], 1.0, messages))
    assert lines == ["  Gather: 300 ms in 10 calls, 100 bytes each", "  barrier: 100 ms in 1 call"]
    assert last.startswith("Gather dominates: 75% of the 400 ms that process 0 spends in messages")
    (none,) = students_mpi.in_messages(Started([], 1.0, []))
    assert none.startswith("process 0 sends no message by MPI.COMM_WORLD that is timed; ")


def test_bytes_are_those_of_arrays():
    class Array:
        nbytes = 24

    assert mpi_watch.size_of([Array(), (Array(), 3), None]) == 48
    assert mpi_watch.size_of(3) == 0


@pytest.mark.parametrize(
    "text, is_program",
    [
        (PROGRAM, True),
        ("import mpi4py.MPI as m", True),
        (f"{PROGRAM}\ndef sigmoid(z): pass", False),  # whose functions are checked
        ("import numpy", False),
        ("from mpi4py import (", False),
    ],
)
def test_a_program_is_told_from_functions(tmp_path, text, is_program):
    (tmp_path / "my.py").write_text(text)
    assert students_mpi.is_program(tmp_path / "my.py", list(exercises.CHECKS)) == is_program


def test_a_missing_mpirun_is_one_line(monkeypatch):
    monkeypatch.setattr(students_mpi, "find_mpirun", lambda: None)
    with pytest.raises(ConfigError, match="needs mpi4py and mpirun; pip install mpi4py mpich"):
        students_mpi.run(Path("my.py"), 1, 1.0)
