# SPDX-License-Identifier: MIT
"""Training under faults: killed, hanging and stopped ranks, and wrong flags.

Each kind of fault has a row in the default run. The others of its kind are marked slow.
`test_checkpoint` has full disks and damaged checkpoints.
"""

import math
import os
import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

import pytest
from commands import ROOT, TORCHRUN, lesson, rows_of
from fake_data import fashion_mnist
from saved import latest, same, steps, tensors

from torchpar.parallel.launch.local import Ranks

pytest.importorskip("tyro", reason="tyro reads the flags")

STEPS = 36  # of three epochs
TRAIN = str(ROOT / "examples" / "train_parallel.py")
KILLS = int(os.environ.get("KILLS", "1"))
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    """Flags of a short run. The numbers of ranks divide neither its batches nor its layers."""
    root = fashion_mnist(tmp_path_factory.mktemp("data"), train=600, test=101)
    flags = (
        "--dataset fashion-mnist --device cpu --hidden 33 7 --epochs 3 --batch-size 51 --timeout 60"
    )
    return [*flags.split(), "--data", str(root)]


def train_alone(rank: int, world_size: int, port: int, *flags: str) -> tuple[int, str, str]:
    """Train as a rank of train_parallel.py, without a launcher; return its exit status and its
    streams."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(address, RANK=str(rank), WORLD_SIZE=str(world_size))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background shells ignore it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
    return lesson("train_parallel", *flags)


def train(*flags: str) -> str:
    """Run train_parallel.py in this process, one of the fixture's ranks; return its error, or
    ""."""
    status, _, err = lesson("train_parallel", *flags)
    return err if status else ""


def torchrun(*command: str, stderr: int | IO[str] = subprocess.PIPE) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*TORCHRUN, "--monitor_interval=0.1", *command],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        start_new_session=True,  # a terminal's Ctrl-C goes to a process group
    )


def wait_for(condition: Callable[[], Any], seconds: float = 0.001) -> None:
    """Ask for a condition every so many seconds."""
    deadline = time.monotonic() + 240.0  # torchrun starts slowly on a busy machine
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(seconds)


def losses(metrics: Path) -> list[tuple[float, ...]]:
    """Return the losses and the accuracy of each epoch, bit for bit, from the metrics file."""
    rows = rows_of(metrics)
    return [
        (row["epoch"], row["train_loss"], row["test_loss"], row["test_accuracy"]) for row in rows
    ]


def saving(folder: Path, every: int = 1) -> list[str]:
    return ["--checkpoint", str(folder), "--save-every", str(every), "--metrics", f"{folder}.jsonl"]


@pytest.fixture(scope="module")
def undisturbed(ranks, data, tmp_path_factory) -> Callable[[str], Path]:
    """The checkpoints of a run on a mesh, on which its bits depend."""

    @cache
    def run(mesh: str) -> Path:
        folder = tmp_path_factory.mktemp("undisturbed") / "saved"
        command = [*data, *saving(folder, every=7), "--keep", "3", "--async-save", *mesh.split()]
        assert set(ranks(ranks_of(mesh), train, *command)) == {""}
        assert steps(folder) == ["step-28", "step-35", "step-36"]
        return folder

    return run


def ranks_of(mesh: str) -> int:
    return math.prod(map(int, re.findall(r"--[dtp]p (\d)", mesh)))


def is_undisturbed(folder: Path, undisturbed: Path) -> None:
    *_, before, last = steps(undisturbed)
    final = tensors(folder / last)
    assert same(final, tensors(undisturbed / last))
    assert not same(final, tensors(undisturbed / before))
    of_epochs = losses(Path(f"{folder}.jsonl"))
    assert of_epochs == losses(Path(f"{undisturbed}.jsonl"))
    assert [epoch for epoch, *_ in of_epochs] == [*range(1, len(of_epochs) + 1)]
    # Nothing unfinished.
    assert {p.name for p in folder.glob("[!.]*")} == {"latest", *steps(folder)}


FAULTS = [  # flags, fault of one rank, exit status of the others, the line about it
    ("--dp 2 --async-save", 1, signal.SIGKILL, 2, "rank 1 does not answer"),
    pytest.param(
        "--dp 2 --tp 2 --timeout 3", 0, signal.SIGSTOP, 2, "rank 0 does not answer", marks=slow
    ),
    pytest.param(
        "--pp 3 --micro-batches 5 --async-save",
        *(2, signal.SIGTERM, 143, "stopped by SIGTERM; the state is saved"),
        marks=slow,
    ),
    pytest.param(
        "--tp 3", 0, signal.SIGINT, 130, "stopped by SIGINT; the state is saved", marks=slow
    ),
    pytest.param(
        "--dp 2", 1, signal.SIGHUP, 129, "stopped by SIGHUP; the state is saved", marks=slow
    ),
    pytest.param("--dp 2", 0, signal.SIGKILL, 2, "rank 0 does not answer", marks=slow),
]


@pytest.mark.parametrize("flags, victim, fault, status, line", FAULTS)
def test_a_fault_is_named_and_a_later_run_goes_on(
    ranks, data, undisturbed, tmp_path, flags, victim, fault, status, line
):
    """Rank 0 hosts the store."""
    folder = tmp_path / "saved"
    mesh = " ".join(re.findall(r"--(?:[dtp]p|micro-batches) \d", flags))
    command = [*data, *saving(folder), *flags.split()]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with Ranks() as pool:
        pool.start(ranks_of(mesh))
        pool.callback(pool.kill)
        pids = [worker.submit(os.getpid).result() for worker in pool.workers]
        calls = enumerate(pool.workers)
        futures = [one.submit(train_alone, rank, len(pids), port, *command) for rank, one in calls]
        wait_for(lambda: latest(folder) not in ("", "step-1"))
        began = time.monotonic()
        os.kill(pids[victim], fault)
        lost = fault in (signal.SIGKILL, signal.SIGSTOP)
        others = [rank for rank in range(len(pids)) if not lost or rank != victim]
        codes, outs, errs = zip(*(futures[rank].result(60) for rank in others), strict=True)
        for rank in others:
            pool.workers[rank].shutdown()  # the processes can end
    assert set(codes) == {status}, errs
    assert latest(folder) != f"step-{STEPS}"
    assert fault != signal.SIGSTOP or time.monotonic() - began > 2  # --timeout is 3 seconds
    if lost:
        error = rf"train_parallel\.py: error: .*{line}.*\n"
        assert all(re.fullmatch(error, err) for err in errs), errs
    else:
        # Where a step takes long, rank 0 has said that it stops.
        answer = rf"(received {fault.name}: the run stops after the next step, [^\n]*\n)?"
        assert all(re.fullmatch(answer if rank == 0 else "", err) for rank, err in enumerate(errs))
        assert "".join(outs).count(line) == 1
        assert "test accuracy" not in outs[0].splitlines()[-1]
        # All have ended by themselves: nothing is unfinished.
        assert latest(folder) == steps(folder)[-1]
    assert set(ranks(ranks_of(mesh), train, *data, *saving(folder, every=7), *mesh.split())) == {""}
    is_undisturbed(folder, undisturbed(mesh))


def stop(process: subprocess.Popen[str], number: signal.Signals, folder: Path) -> str:
    """Send a signal to the process group of a torchrun, as a terminal does for Ctrl-C: all
    ranks save the state, and end. Return what was printed to stderr."""
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=40)
    assert out.count(f"stopped by {number.name}; the state is saved") == 1
    assert latest(folder) == steps(folder)[-1]
    return err


@slow
def test_torchrun_is_stopped_and_the_same_command_goes_on(ranks, data, undisturbed, tmp_path):
    folder = tmp_path / "saved"
    command = [*data, *saving(folder, every=5)]
    process = torchrun(TRAIN, *command)
    wait_for(lambda: latest(folder), 0.01)
    err = stop(process, signal.SIGTERM, folder)
    assert 'train_parallel.py", line' not in err  # no traceback of a rank
    assert "exitcode" not in err  # and torchrun reports no failed rank
    assert latest(folder) != f"step-{STEPS}"
    assert ranks(2, train, *command) == ["", ""]
    is_undisturbed(folder, undisturbed("--dp 2"))


@slow
@pytest.mark.parametrize("number, restarts", [(signal.SIGTERM, 0), (signal.SIGQUIT, 3)])
def test_a_run_that_is_stopped_by_a_signal_to_one_rank_is_no_success(
    data, tmp_path, number, restarts
):
    """Nor is it started again. torchrun would do either, by the status of the ranks."""
    folder = tmp_path / "saved"
    command = [TRAIN, *data, "--epochs", "1000", *saving(folder, every=5)]
    process = torchrun(f"--max_restarts={restarts}", *command)
    wait_for(lambda: latest(folder), 0.01)
    os.kill(living_ranks(process.pid)[-1], number)
    out, err = process.communicate(timeout=60)
    line = f"stopped by {number.name}; the state is saved, the same command resumes from it"
    assert (process.returncode, out.count(line), "resumed" in out) == (1, 1, False), out + err
    assert latest(folder) == steps(folder)[-1]
    end = f"got signal: {number}" if restarts else f"train_parallel.py: {line}"
    assert end in "".join(err.splitlines()[-2:]), err  # the last lines of torchrun's report


def choose_moment(folder: Path, generator: random.Random, ended: Callable[[], bool]) -> None:
    """Wait for the moment of the next kill."""
    where = generator.choice(["step", "save", "start"])
    for _ in range(0 if where == "start" else generator.randint(1, 6)):
        before = latest(folder)
        wait_for(lambda before=before: ended() or latest(folder) != before)
    if where == "save":
        wait_for(lambda: ended() or any(folder.glob("step-*.tmp")))
    else:
        time.sleep(generator.uniform(0, 3.0 if where == "start" else 0.03))


def living_ranks(launcher: int) -> list[int]:
    """Return the processes of the ranks that a torchrun started."""

    def is_rank(child: str) -> bool:
        with suppress(OSError):  # it has ended
            return "\0RANK=" in Path(f"/proc/{child}/environ").read_text()
        return False

    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text()
    return [int(child) for child in children.split() if is_rank(child)]


def wait_for_a_save_of_others(folder: Path, launcher: int, known: set[int]) -> None:
    """Wait until other ranks than the ``known`` ones have saved."""
    # These processes import PyTorch, for seconds.
    wait_for(lambda: (living := living_ranks(launcher)) and known.isdisjoint(living), 0.05)
    before = latest(folder)
    wait_for(lambda: latest(folder) != before, 0.05)


@slow
def test_ranks_killed_at_random_moments_start_again_and_end_with_the_same_bits(
    ranks, data, tmp_path
):
    """A third of the kills fall on a step, a third on a save, and a third on the start of the
    processes. Last the launcher is stopped by Ctrl-C, and the same command goes on."""
    epochs = 2 + 2 * KILLS  # of 12 steps; a life of the ranks takes 1 to 10
    undisturbed, folder = tmp_path / "undisturbed", tmp_path / "disturbed"
    flags = [*data, "--epochs", str(epochs), "--async-save"]
    assert ranks(2, train, *flags, *saving(undisturbed, every=7)) == ["", ""]
    generator, kills, starts, known = random.Random(0), 0, 0, set[int]()
    with (tmp_path / "err").open("w") as err:
        process = torchrun(f"--max_restarts={KILLS}", TRAIN, *flags, *saving(folder), stderr=err)
        while process.poll() is None and kills < KILLS:
            choose_moment(folder, generator, lambda: process.poll() is not None)
            if process.poll() is None and (living := living_ranks(process.pid)):
                starts += known.isdisjoint(living)
                known.update(living)
                victim = generator.choice(living)
                os.kill(victim, signal.SIGKILL)
                kills += 1
                wait_for(lambda victim=victim: victim not in living_ranks(process.pid))
        wait_for_a_save_of_others(folder, process.pid, known)
        stop(process, signal.SIGINT, folder)
    said = (tmp_path / "err").read_text()
    print(f"{kills} kills | {starts} starts | {said.count(' is damaged')} refused checkpoints")
    assert kills == KILLS, said
    assert latest(folder) != latest(undisturbed)
    assert ranks(2, train, *flags, *saving(folder)) == ["", ""]
    is_undisturbed(folder, undisturbed)


def train_differing(flags: list[str], each: list[list[str]]) -> str:
    return train(*flags, *each[int(os.environ["RANK"])])


REFUSED = [  # the flags of both ranks, those of rank 0 and of rank 1
    ("", "--hidden 33 7", "--hidden 33 8"),
    ("--pp 2", "--hidden 33 7", "--hidden 33 8"),
    ("", "--batch-size 51", "--batch-size 50"),
    ("", "--tp 2", "--dp 2"),
    ("", "--checkpoint {}", ""),
    ("--schedule constant", "--epochs 1", "--epochs 2"),
]


@pytest.mark.parametrize("of_both, of_first, of_second", REFUSED)
def test_wrong_flags_are_the_same_error_on_both_ranks(
    ranks, data, tmp_path, of_both, of_first, of_second
):
    flags, *each = (
        text.format(tmp_path / "saved").split() for text in (of_both, of_first, of_second)
    )
    first, second = ranks(
        2, train_differing, [*data, "--epochs", "1", "--timeout", "5", *flags], each
    )
    assert first == second
    assert re.fullmatch(r"train_parallel\.py: error: .* on rank 0 and .* on rank 1.*\n", first)
