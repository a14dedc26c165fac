# SPDX-License-Identifier: MIT
"""Training under faults: killed, hanging and stopped ranks, full disks, damaged checkpoints, wrong flags.

Each kind of fault has a row in the default run. The others of its kind are marked slow.
"""

import math
import os
import re
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_data import fashion_mnist
from faults import (
    TRAIN,
    Rank,
    finish,
    latest,
    losses,
    same,
    start,
    steps,
    tensors,
    torchrun,
    train,
    wait_for,
)

pytest.importorskip("torchvision", reason="torchvision reads the data sets")
pytest.importorskip("tyro", reason="tyro reads the flags")
import soak

STEPS = 48  # of four epochs
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    """Flags of a short run. The numbers of ranks divide neither its batches nor its layers."""
    root = tmp_path_factory.mktemp("data")
    fashion_mnist(root / "FashionMNIST" / "raw", train=600, test=101)
    flags = "--dataset fashion-mnist --device cpu --hidden 33 7 --epochs 4 --batch-size 51 --timeout 60"
    return [*flags.split(), "--data", str(root)]


@pytest.fixture(scope="module")
def flags(data) -> list[str]:
    return [*data, "--arithmetic", "exact"]


def saving(folder: Path, every: int = 1) -> list[str]:
    return ["--checkpoint", str(folder), "--save-every", str(every), "--metrics", f"{folder}.jsonl"]


@pytest.fixture(scope="module")
def undisturbed(ranks, flags, tmp_path_factory) -> Path:
    """The checkpoints of one process; with ``--arithmetic exact`` those of every mesh are the same."""
    folder = tmp_path_factory.mktemp("undisturbed") / "saved"
    assert ranks(1, train, *flags, *saving(folder, every=7), "--keep", "3", "--async-save") == [""]
    assert steps(folder) == ["step-35", "step-42", "step-48"]
    return folder


@pytest.fixture
def finished(undisturbed, tmp_path) -> Path:
    """A copy of a run's folder."""
    shutil.copytree(undisturbed, tmp_path / "saved")
    shutil.copy(f"{undisturbed}.jsonl", tmp_path / "saved.jsonl")
    return tmp_path / "saved"


def is_undisturbed(folder: Path, undisturbed: Path) -> None:
    final = tensors(folder / f"step-{STEPS}")
    assert same(final, tensors(undisturbed / f"step-{STEPS}"))
    assert not same(final, tensors(undisturbed / "step-42"))
    assert losses(Path(f"{folder}.jsonl")) == losses(Path(f"{undisturbed}.jsonl"))
    assert [epoch for epoch, *_ in losses(Path(f"{folder}.jsonl"))] == [1, 2, 3, 4]
    assert {p.name for p in folder.glob("[!.]*")} == {"latest", *steps(folder)}  # nothing unfinished


@pytest.fixture
def processes() -> Iterator[list[Rank]]:
    """Ranks to end, whatever happens."""
    ranks: list[Rank] = []
    yield ranks
    for rank in ranks:
        rank.process.kill()
        rank.process.join()


FULL = "a full disk"
FAULTS = [  # mesh, fault of one rank, exit status of the others, the line about it
    ("--dp 2 --async-save", 1, signal.SIGKILL, 2, "rank 1 does not answer"),
    ("--dp 2 --tp 2 --timeout 3", 0, signal.SIGSTOP, 2, "rank 0 does not answer"),
    ("--pp 3 --micro-batches 5 --async-save", 2, signal.SIGTERM, 0, "stopped by SIGTERM; the state is saved"),
    ("--dp 2", 0, FULL, 2, r"could not be saved: rank 0: .*File too large"),
    pytest.param("--tp 3", 0, signal.SIGINT, 130, "stopped by SIGINT; the state is saved", marks=slow),
    pytest.param("--dp 2", 0, signal.SIGKILL, 2, "rank 0 does not answer", marks=slow),
    pytest.param("--dp 2 --tp 2 --timeout 3", 3, signal.SIGSTOP, 2, "rank 3 does not answer", marks=slow),
    pytest.param("--dp 2 --async-save", 1, FULL, 2, "rank 1: .*File too large", marks=slow),
]


@pytest.mark.parametrize("mesh, victim, fault, status, line", FAULTS)
def test_a_fault_is_named_and_another_mesh_goes_on(
    ranks, flags, undisturbed, tmp_path, processes, mesh, victim, fault, status, line
):
    """With the same bits at the end. Rank 0 hosts the store, and exchanges nothing with rank 3."""
    folder = tmp_path / "saved"
    command = [*flags, *saving(folder)]
    world_size = math.prod(map(int, re.findall(r"--[dtp]p (\d)", mesh)))
    processes += start(tmp_path, [*command, *mesh.split()], world_size)
    wait_for(lambda: latest(folder) not in ("", "step-1"))
    if fault == FULL:
        resource.prlimit(processes[victim].process.pid, resource.RLIMIT_FSIZE, (4096, 4096))
    else:
        os.kill(processes[victim].process.pid, fault)
    gone = fault in (signal.SIGKILL, signal.SIGSTOP)
    others = [rank for rank in processes if not gone or rank is not processes[victim]]
    codes, out, err = finish(others)
    assert codes == [status] * len(others), err
    if status == 2:
        said = [said for said in err.splitlines() if said.startswith("train_parallel.py: error: ")]
        assert len(said) == len(others)
        assert all(re.search(line, one) for one in said)
        assert "Traceback" not in err
    else:
        assert err == ""
        assert out.count(line) == 1
        assert "test accuracy" not in out.splitlines()[-1]
    if not gone:  # all ranks have ended by themselves: nothing unfinished is left
        assert not list(folder.glob("*.tmp"))
        assert latest(folder) == steps(folder)[-1]
    assert latest(folder) != f"step-{STEPS}"
    for process in processes:
        process.process.kill()
        process.process.join()
    assert ranks(2, train, *flags, *saving(folder, every=7), "--tp", "2") == ["", ""]
    is_undisturbed(folder, undisturbed)


def test_without_checkpoints_an_interrupt_ends_at_once(data, tmp_path, processes):
    metrics = tmp_path / "metrics"
    processes += start(tmp_path, [*data, "--epochs", "4000", "--metrics", str(metrics)], 2)
    wait_for(lambda: metrics.exists() and metrics.read_text())
    for rank in processes:
        os.kill(rank.process.pid, signal.SIGINT)
    codes, out, err = finish(processes, 10)
    assert codes == [130, 130]
    assert err == ""
    assert "the state is saved" not in out


@slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_torchrun_is_stopped_and_the_same_command_goes_on(ranks, flags, undisturbed, tmp_path, number):
    """A terminal sends Ctrl-C to the launcher's process group."""
    folder = tmp_path / "saved"
    command = [*flags, *saving(folder, every=5)]
    process = torchrun(TRAIN, *command)
    try:
        wait_for(lambda: latest(folder))
        os.killpg(process.pid, number)
        out, err = process.communicate(timeout=40)
    finally:
        process.kill()
    assert out.count(f"stopped by {number.name}; the state is saved") == 1
    assert 'train_parallel.py", line' not in err  # no traceback of a rank
    assert "exitcode" not in err  # and torchrun reports no failed rank
    assert latest(folder) == steps(folder)[-1] != f"step-{STEPS}"
    assert ranks(2, train, *command) == ["", ""]
    is_undisturbed(folder, undisturbed)


@slow
def test_torchrun_starts_killed_ranks_again_and_they_end_with_the_same_bits():
    assert soak.main(["--kills", "2"]) == 0


def test_a_damaged_checkpoint_is_skipped_for_the_one_before(ranks, flags, undisturbed, finished):
    """`test_checkpoint` has the other damages."""
    shard = finished / f"step-{STEPS}" / "__0_0.distcp"
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged)
    assert ranks(2, train, *flags, *saving(finished, every=7)) == ["", ""]
    is_undisturbed(finished, undisturbed)


def test_a_finished_run_is_left_as_it_is_and_refuses_another(ranks, flags, undisturbed, finished):
    """A run on another mesh, with other settings of checkpoints, is the same run."""
    before = (finished / "latest").stat()
    for change, message in [
        ("--seed 1 --clip 2", "a run with clip None, seed 0, this one has clip 2.0, seed 1"),
        ("--epochs 5", "a run with epochs 4, this one has epochs 5"),
        ("--arithmetic fast", "a run with arithmetic exact, this one has arithmetic fast"),
    ]:
        (error,) = ranks(1, train, *flags, *saving(finished), *change.split())
        assert message in error
    others = ["--tp", "2", "--keep", "5", "--timeout", "33", "--async-save"]
    assert ranks(2, train, *flags, *saving(finished, every=2), *others) == ["", ""]
    assert (finished / "latest").stat() == before
    is_undisturbed(finished, undisturbed)


def train_differing(flags: list[str], each: list[list[str]]) -> str:
    return train(*flags, *each[int(os.environ["RANK"]) % 2])


DIFFER = " on rank 0 and .* on rank 1"
REFUSED = [  # ranks, the flags of all, those of the even and of the odd ranks, the error of each rank
    (2, "", "--hidden 33 7", "--hidden 33 8", DIFFER),
    (2, "--arithmetic exact --pp 2", "--hidden 33 7", "--hidden 33 8", DIFFER),
    (2, "", "--batch-size 51", "--batch-size 50", DIFFER),
    (2, "", "--tp 2", "--dp 2", DIFFER),
    (2, "", "--arithmetic fast", "--arithmetic exact", DIFFER),
    (2, "--pp 2", "--micro-batches 4", "--micro-batches 3", DIFFER),
    (2, "--pp 2", "--pipeline 1f1b", "--pipeline gpipe", DIFFER),
    (2, "--checkpoint {}", "--save-every 2", "--save-every 3", DIFFER),
    (2, "", "--checkpoint {}", "", DIFFER),
    (2, "--schedule constant", "--epochs 1", "--epochs 2", DIFFER),
    (2, "--dp 3", "", "", "dp 3 × tp 1 × pp 1 is 3 ranks, but 2 were started"),
    (4, "--pp 4", "", "", "stages"),
    (2, "--arithmetic exact --optimizer muon", "", "", "take --optimizer sgd"),
    (2, "--tp 2 --arithmetic exact --compile", "", "", "exact arithmetic forbids; drop --compile"),
    (2, "--pp 2 --arithmetic exact --micro-batches 1", "", "", "fewer than the 2 stages"),
]


@pytest.mark.parametrize("world_size, of_all, of_even, of_odd, message", REFUSED)
def test_wrong_flags_are_the_same_error_on_every_rank(
    ranks, data, tmp_path, world_size, of_all, of_even, of_odd, message
):
    """Before a collective aborts the ranks, or makes one wait for the other."""
    flags, *each = (text.format(tmp_path / "saved").split() for text in (of_all, of_even, of_odd))
    found = ranks(world_size, train_differing, [*data, "--epochs", "1", "--timeout", "5", *flags], each)
    assert len(set(found)) == 1
    assert re.search(message, found[0])
    assert "\n" not in found[0]
