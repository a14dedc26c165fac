# SPDX-License-Identifier: MIT
"""Training under faults: killed, hanging and stopped ranks, and wrong flags.

Each kind of fault has a row in the default run. The others of its kind are marked slow. `test_checkpoint` has
full disks and damaged checkpoints.
"""

import math
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from functools import cache
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
from fake_data import fashion_mnist
from faults import TRAIN, latest, losses, same, start, steps, tensors, torchrun, train, wait_for

pytest.importorskip("torchvision", reason="torchvision reads the data sets")
pytest.importorskip("tyro", reason="tyro reads the flags")
import soak

STEPS = 48  # of four epochs
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    """Flags of a short run. The numbers of ranks divide neither its batches nor its layers."""
    root = fashion_mnist(tmp_path_factory.mktemp("data"), train=600, test=101)
    flags = "--dataset fashion-mnist --device cpu --hidden 33 7 --epochs 4 --batch-size 51 --timeout 60"
    return [*flags.split(), "--data", str(root)]


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
        assert steps(folder) == ["step-35", "step-42", "step-48"]
        return folder

    return run


def ranks_of(mesh: str) -> int:
    return math.prod(map(int, re.findall(r"--[dtp]p (\d)", mesh)))


def is_undisturbed(folder: Path, undisturbed: Path) -> None:
    final = tensors(folder / f"step-{STEPS}")
    assert same(final, tensors(undisturbed / f"step-{STEPS}"))
    assert not same(final, tensors(undisturbed / "step-42"))
    assert losses(Path(f"{folder}.jsonl")) == losses(Path(f"{undisturbed}.jsonl"))
    assert [epoch for epoch, *_ in losses(Path(f"{folder}.jsonl"))] == [1, 2, 3, 4]
    assert {p.name for p in folder.glob("[!.]*")} == {"latest", *steps(folder)}  # nothing unfinished


@pytest.fixture
def processes() -> Iterator[list[ForkServerProcess]]:
    processes: list[ForkServerProcess] = []
    yield processes
    for process in processes:
        process.kill()
        process.join()


FAULTS = [  # flags, fault of one rank, exit status of the others, the line about it
    ("--dp 2 --async-save", 1, signal.SIGKILL, 2, "rank 1 does not answer"),
    pytest.param("--dp 2 --tp 2 --timeout 3", 0, signal.SIGSTOP, 2, "rank 0 does not answer", marks=slow),
    pytest.param(
        "--pp 3 --micro-batches 5 --async-save",
        *(2, signal.SIGTERM, 0, "stopped by SIGTERM; the state is saved"),
        marks=slow,
    ),
    pytest.param("--tp 3", 0, signal.SIGINT, 130, "stopped by SIGINT; the state is saved", marks=slow),
    pytest.param("--dp 2", 0, signal.SIGKILL, 2, "rank 0 does not answer", marks=slow),
]


@pytest.mark.parametrize("flags, victim, fault, status, line", FAULTS)
def test_a_fault_is_named_and_a_later_run_goes_on(
    ranks, data, undisturbed, tmp_path, processes, flags, victim, fault, status, line
):
    """Rank 0 hosts the store."""
    folder = tmp_path / "saved"
    mesh = " ".join(re.findall(r"--(?:[dtp]p|micro-batches) \d", flags))
    processes += start(tmp_path, [*data, *saving(folder), *flags.split()], ranks_of(mesh))
    wait_for(lambda: latest(folder) not in ("", "step-1"))
    began = time.monotonic()
    os.kill(processes[victim].pid, fault)
    lost = fault in (signal.SIGKILL, signal.SIGSTOP)
    others = [process for rank, process in enumerate(processes) if not lost or rank != victim]
    for process in others:
        process.join(60)
    out, err = (tmp_path / "out").read_text(), (tmp_path / "err").read_text()
    assert [process.exitcode for process in others] == [status] * len(others), err
    assert latest(folder) != f"step-{STEPS}"
    assert fault != signal.SIGSTOP or time.monotonic() - began > 2  # --timeout is 3 seconds
    if lost:
        said = [said for said in err.splitlines() if said.startswith("train_parallel.py: error: ")]
        assert len(said) == len(others)
        assert all(line in one for one in said)
        assert "Traceback" not in err
        processes[victim].kill()
        processes[victim].join()
    else:
        assert err == ""
        assert out.count(line) == 1
        assert "test accuracy" not in out.splitlines()[-1]
        assert latest(folder) == steps(folder)[-1]  # all have ended by themselves: nothing is unfinished
    assert set(ranks(ranks_of(mesh), train, *data, *saving(folder, every=7), *mesh.split())) == {""}
    is_undisturbed(folder, undisturbed(mesh))


@slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_torchrun_is_stopped_and_the_same_command_goes_on(ranks, data, undisturbed, tmp_path, number):
    """A terminal sends Ctrl-C to the launcher's process group."""
    folder = tmp_path / "saved"
    command = [*data, *saving(folder, every=5)]
    process = torchrun(TRAIN, *command)
    wait_for(lambda: latest(folder))
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=40)
    assert out.count(f"stopped by {number.name}; the state is saved") == 1
    assert 'train_parallel.py", line' not in err  # no traceback of a rank
    assert "exitcode" not in err  # and torchrun reports no failed rank
    assert latest(folder) == steps(folder)[-1] != f"step-{STEPS}"
    assert ranks(2, train, *command) == ["", ""]
    is_undisturbed(folder, undisturbed("--dp 2"))


@slow
def test_torchrun_starts_killed_ranks_again_and_they_end_with_the_same_bits():
    assert soak.main(["--kills", "1", "--ranks", "3"]) == 0


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
def test_wrong_flags_are_the_same_error_on_both_ranks(ranks, data, tmp_path, of_both, of_first, of_second):
    flags, *each = (text.format(tmp_path / "saved").split() for text in (of_both, of_first, of_second))
    first, second = ranks(2, train_differing, [*data, "--epochs", "1", "--timeout", "5", *flags], each)
    assert first == second
    assert re.fullmatch(r"train_parallel\.py: error: .* on rank 0 and .* on rank 1.*\n", first)
