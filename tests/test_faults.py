# SPDX-License-Identifier: MIT
"""Faults of machines, of people and of launchers, and what becomes of a run that meets them."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from fake_data import fashion_mnist
from faults import (
    TRAIN,
    Rank,
    alive,
    errors,
    finish,
    latest,
    losses,
    run,
    same,
    start,
    steps,
    tensors,
    torchrun,
    wait_for,
    workers,
)

pytest.importorskip("torchvision", reason="torchvision reads the data sets")
pytest.importorskip("tyro", reason="tyro reads the flags")

STEPS = 48  # of four epochs


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    """Flags of a short run; neither its batches nor its layers divide by the ranks."""
    root = tmp_path_factory.mktemp("data")
    fashion_mnist(root / "FashionMNIST" / "raw", train=600, test=101)
    flags = "--dataset fashion-mnist --device cpu --hidden 33 7 --epochs 4 --batch-size 51 --timeout 60"
    return [*flags.split(), "--data", str(root)]


@pytest.fixture(scope="module")
def flags(data) -> list[str]:
    return [*data, "--reduction", "invariant"]


def saving(folder: Path, every: int = 1) -> list[str]:
    return ["--checkpoint", str(folder), "--save-every", str(every), "--metrics", f"{folder}.jsonl"]


@pytest.fixture(scope="module")
def undisturbed(flags, tmp_path_factory) -> Path:
    """What one process comes to; with ``--reduction invariant`` every mesh should come to the same."""
    folder = tmp_path_factory.mktemp("undisturbed") / "saved"
    run(folder.parent, [*flags, *saving(folder, every=7)])
    assert steps(folder) == ["step-42", "step-48"]
    return folder


def is_undisturbed(folder: Path, undisturbed: Path) -> None:
    final = tensors(folder / f"step-{STEPS}")
    assert same(final, tensors(undisturbed / f"step-{STEPS}"))
    assert not same(final, tensors(undisturbed / "step-42"))
    assert losses(Path(f"{folder}.jsonl")) == losses(Path(f"{undisturbed}.jsonl"))
    assert [epoch for epoch, *_ in losses(Path(f"{folder}.jsonl"))] == [1, 2, 3, 4]


def test_killed_ranks_are_started_again_and_end_with_the_same_bits(flags, undisturbed, tmp_path):
    """At random moments, and as each step is saved meanwhile, in saves too."""
    folder, generator, kills = tmp_path / "saved", random.Random(0), 0
    command = [TRAIN, *flags, *saving(folder), "--async-save"]
    process = torchrun("--nproc_per_node=2", "--max_restarts=3", *command)
    try:
        for _ in range(2):
            before = latest(folder)
            wait_for(lambda before=before: latest(folder) != before)
            assert latest(folder) != f"step-{STEPS}"
            time.sleep(generator.uniform(0, 0.15))
            victim = generator.choice(sorted(workers(process.pid).items()))[1]
            os.kill(victim, signal.SIGKILL)
            kills += 1
            wait_for(lambda victim=victim: not alive(victim))
        _, err = process.communicate(timeout=120)
    finally:
        end(process)
    assert process.returncode == 0, err
    assert kills == err.count("exitcode: -9") == 2
    is_undisturbed(folder, undisturbed)


def end(process: subprocess.Popen[str]) -> None:
    """torchrun and the ranks it leaves behind."""
    ranks = workers(process.pid).values()
    process.kill()
    for rank in ranks:
        with suppress(ProcessLookupError):
            os.kill(rank, signal.SIGKILL)
    process.communicate()


def test_a_rank_that_hangs_is_named(data, tmp_path):
    timeout, folder = 3, tmp_path / "saved"
    flags = [*data, *saving(folder), "--epochs", "4000", "--timeout", str(timeout)]
    process = torchrun("--nproc_per_node=2", TRAIN, *flags)
    try:
        wait_for(lambda: latest(folder))
        ranks = workers(process.pid)
        os.kill(ranks[1], signal.SIGSTOP)
        stopped = time.monotonic()
        wait_for(lambda: not alive(ranks[0]), timeout + 5)
        assert time.monotonic() - stopped > timeout - 1
        os.kill(ranks[1], signal.SIGKILL)  # torchrun waits 30 s for a process that does not end
        _, err = process.communicate(timeout=30)
    finally:
        end(process)
    assert process.returncode != 0
    (line,) = errors(err)
    assert "rank 1 does not answer" in line


@pytest.fixture
def stopped_later(tmp_path) -> Iterator[list[Rank]]:
    """Ranks to end whatever happens."""
    ranks: list[Rank] = []
    yield ranks
    for rank in ranks:
        rank.process.kill()


@pytest.mark.parametrize("victim", [0, 3])
def test_in_a_mesh_only_the_rank_that_hangs_is_named(data, tmp_path, stopped_later, victim):
    """Rank 0 hosts the store where the others meet; rank 1 or 2 is no neighbour of it."""
    timeout, folder = 3, tmp_path / "saved"
    flags = [*data, *saving(folder), "--epochs", "4000", "--tp", "2", "--timeout", str(timeout)]
    ranks = start(tmp_path, flags, 4)
    stopped_later += ranks
    wait_for(lambda: latest(folder))
    os.kill(ranks[victim].pid, signal.SIGSTOP)
    stopped = time.monotonic()
    others = [rank for rank in ranks if rank is not ranks[victim]]
    wait_for(lambda: any(not rank.process.is_alive() for rank in others), timeout + 5)
    assert time.monotonic() - stopped > timeout - 1
    codes, _, err = finish(others)
    assert all(codes)
    (line,) = errors(err)
    assert f"rank {victim} does not answer" in line


def test_stopped_on_any_mesh_another_goes_on(flags, undisturbed, tmp_path):
    """SIGTERM to one rank at a random moment: all save the same step and exit 0."""
    folder, generator, stops = tmp_path / "saved", random.Random(1), []
    command = [*flags, *saving(folder, every=5)]
    for world_size, mesh in ((4, "--dp 4"), (1, "--tp 1"), (2, "--tp 2"), (4, "--dp 2 --tp 2")):
        ranks = start(tmp_path, [*command, *mesh.split()], world_size)
        before = latest(folder)
        wait_for(lambda b=before, r=ranks: latest(folder) != b or not r[0].process.is_alive())
        time.sleep(generator.uniform(0, 0.05))
        os.kill(generator.choice(ranks).pid, signal.SIGTERM)
        codes, out, err = finish(ranks)
        assert codes == [0] * world_size, err
        assert err == ""
        assert out.count("stopped by SIGTERM; the state is saved") == 1
        assert "test accuracy" not in out.splitlines()[-1]
        stops.append(latest(folder))
        assert stops[-1] == steps(folder)[-1] != f"step-{STEPS}"
    assert len(set(stops)) == len(stops)
    run(tmp_path, command, 2)
    is_undisturbed(folder, undisturbed)


def test_torchrun_is_terminated_and_the_same_command_goes_on(flags, undisturbed, tmp_path):
    folder = tmp_path / "saved"
    command = [*flags, *saving(folder, every=5)]
    process = torchrun("--nproc_per_node=2", TRAIN, *command)
    try:
        wait_for(lambda: latest(folder))
        process.terminate()  # which it hands to every rank
        out, err = process.communicate(timeout=40)
    finally:
        end(process)
    assert out.count("stopped by SIGTERM; the state is saved") == 1
    assert 'train_parallel.py", line' not in err  # no traceback of a rank
    assert "exitcode" not in err  # none that torchrun would tell of
    stopped = latest(folder)
    assert stopped == steps(folder)[-1] != f"step-{STEPS}"
    _, err = run(tmp_path, command, 2)
    assert err == ""
    is_undisturbed(folder, undisturbed)


DIFFERENT = [  # the flags of all, and those of each of two ranks
    ("", "--hidden 33 7", "--hidden 33 8"),
    ("--tp 2", "--hidden 33 7", "--hidden 33 8"),
    ("--pp 2", "--hidden 33 7", "--hidden 33 8"),
    ("--reduction invariant", "--hidden 33 7", "--hidden 33 8"),
    ("", "--batch-size 51", "--batch-size 50"),
    ("", "--tp 2", "--dp 2"),
    ("", "--reduction fast", "--reduction invariant"),
    ("--pp 2", "--micro-batches 4", "--micro-batches 3"),
    ("--pp 2", "--pipeline 1f1b", "--pipeline gpipe"),
    ("--checkpoint {}", "--save-every 2", "--save-every 3"),
    ("", "--checkpoint {}", ""),
    ("--schedule constant", "--epochs 1", "--epochs 2"),
]


@pytest.mark.parametrize("of_all, of_0, of_1", DIFFERENT)
def test_ranks_that_differ_are_told_on_every_rank(data, tmp_path, of_all, of_0, of_1):
    """Before a collective aborts them, or has one wait for the other."""
    flags, *each = (text.format(tmp_path / "saved").split() for text in (of_all, of_0, of_1))
    command = [*data, "--epochs", "1", "--timeout", "5", *flags]
    ranks = start(tmp_path, command, 2, differing=each, grace=0.2)
    codes, out, err = finish(ranks, launched=False)
    assert codes == [2, 2], err
    (line,) = errors(err)
    assert " on rank 0 and " in line
    assert " on rank 1" in line
    assert out == ""


@pytest.mark.parametrize("mesh", ["--dp 3", "--tp 3", "--pp 3"])
def test_sizes_that_do_not_divide_are_supported(data, tmp_path, undisturbed, mesh):
    """Batches of 51 and 39 samples, layers of 33, 7 and 10, on three ranks."""
    folder = tmp_path / "saved"
    run(tmp_path, [*data, *saving(folder, every=1000), *mesh.split()], 3)
    for mine, ones in zip(losses(Path(f"{folder}.jsonl")), losses(Path(f"{undisturbed}.jsonl")), strict=True):
        assert mine == pytest.approx(ones, rel=1e-4)
    mine, ones = tensors(folder / f"step-{STEPS}"), tensors(undisturbed / f"step-{STEPS}")
    assert {name: t.shape for name, t in mine.items()} == {name: t.shape for name, t in ones.items()}


BAD = [
    (2, "--dp 3", "dp 3 × tp 1 × pp 1 is 3 ranks, but 2 were started"),
    (2, "--tp 2 --pp 2", "dp 1 × tp 2 × pp 2 is 4 ranks, but 2 were started"),
    (2, "--tp 0", "--tp is 0, expected at least 1"),
    (2, "--pp 2 --hidden", "stages"),
    (4, "--pp 4", "stages"),
    (3, "--dp 3 --reduction invariant", "reduction 'invariant' takes 1, 2 or 4 ranks"),
    (2, "--pp 2 --reduction invariant", "not pp 2"),
    (2, "--keep 0", "--keep is 0, expected at least 1"),
    (2, "--pp 2 --micro-batches 0", "--micro-batches is 0, expected at least 1"),
]


@pytest.mark.parametrize("world_size, bad, message", BAD)
def test_bad_flags_end_every_rank(data, tmp_path, world_size, bad, message):
    ranks = start(tmp_path, [*data, *bad.split()], world_size, grace=0.2)
    codes, out, err = finish(ranks, launched=False)
    assert codes == [2] * world_size, err
    # Ranks that have met know that rank 0 tells; of a bad value alone each would tell, if it were let.
    assert len(errors(err)) == len(err.splitlines()) == (world_size if message.startswith("--") else 1)
    assert len(set(errors(err))) == 1
    assert message in err
    assert out == ""


def test_bad_flags_are_told_by_rank_0_alone(data, tmp_path):
    ranks = start(tmp_path, [*data, "--dp", "3"], 2)
    codes, _, err = finish(ranks)
    assert codes[0] == 2
    assert codes[1] in (2, -signal.SIGTERM)  # it had left rank 0 to speak
    assert len(errors(err)) == 1
    assert ranks[1].err.read_text() == ""


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system that two checkpoints fit in, and not three."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small file system, where the container allows it")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def ends_with_one_line(ranks: list[Rank], folder: Path, reason: str) -> None:
    codes, _, err = finish(ranks)
    assert codes[0] == 2, err
    (line,) = errors(err)
    assert "could not be saved" in line
    assert "Traceback" not in err
    assert len(steps(folder)) == 2  # the old are kept, and nothing half done is left
    assert latest(folder) == steps(folder)[-1]
    for step in steps(folder):
        tensors(folder / step)
    assert reason in line


@pytest.mark.parametrize("asynchronous", [[], ["--async-save"]], ids=["synchronous", "asynchronous"])
def test_a_full_disk_keeps_the_old(flags, undisturbed, tmp_path, small_disk, asynchronous):
    folder = small_disk / "saved"
    metrics = ["--metrics", str(tmp_path / "saved.jsonl")]
    ranks = start(tmp_path, [*flags, *saving(folder), *metrics, *asynchronous], 2)
    ends_with_one_line(ranks, folder, "No space left on device")
    shutil.copytree(folder, tmp_path / "saved")  # there is more room here
    _, err = run(tmp_path, [*flags, *saving(tmp_path / "saved"), *asynchronous], 2)
    assert err == ""
    is_undisturbed(tmp_path / "saved", undisturbed)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_may_write_no_more_keeps_the_old(flags, undisturbed, tmp_path, victim):
    folder = tmp_path / "saved"
    ranks = start(tmp_path, [*flags, *saving(folder)], 2)
    wait_for(lambda: latest(folder) not in ("", "step-1"))
    resource.prlimit(ranks[victim].pid, resource.RLIMIT_FSIZE, (4096, 4096))
    ends_with_one_line(ranks, folder, "File too large")
    run(tmp_path, [*flags, *saving(folder)], 2)
    is_undisturbed(folder, undisturbed)


@pytest.fixture
def finished(undisturbed, tmp_path) -> Path:
    """A copy of a run's folder."""
    shutil.copytree(undisturbed, tmp_path / "saved")
    shutil.copy(f"{undisturbed}.jsonl", tmp_path / "saved.jsonl")
    return tmp_path / "saved"


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_damaged_checkpoint_is_passed_over_aloud(flags, undisturbed, finished, world_size):
    """The run goes on from the one before, to the same end."""
    shard = finished / f"step-{STEPS}" / "__0_0.distcp"
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged)
    _, err = run(finished.parent, [*flags, *saving(finished, every=7)], world_size)
    (line,) = err.splitlines()
    assert f"{shard} is damaged" in line
    is_undisturbed(finished, undisturbed)


def test_all_damaged_is_one_error(flags, finished):
    for step in steps(finished):
        os.truncate(finished / step / "__0_0.distcp", 1000)
    codes, out, err = finish(start(finished.parent, [*flags, *saving(finished)], 2))
    assert codes[0] == 2
    (line,) = errors(err)
    assert str(finished / f"step-{STEPS}" / "__0_0.distcp") in line
    assert "Traceback" not in err
    assert out == ""


@pytest.mark.parametrize(
    "change, message",
    [
        ("--lr 0.25", "a run with lr 0.5, this one has lr 0.25"),
        ("--seed 1 --clip 2", "a run with clip None, seed 0, this one has clip 2.0, seed 1"),
        ("--epochs 5", "a run with epochs 4, this one has epochs 5"),
        ("--reduction fast", "a run with reduction invariant, this one has reduction fast"),
    ],
)
def test_another_run_is_refused(flags, finished, change, message):
    before = (finished / "latest").stat()
    command = [*flags, *saving(finished), *change.split()]
    codes, _, err = finish(start(finished.parent, command))
    assert codes == [2]
    (line,) = errors(err)
    assert message in line
    assert (finished / "latest").stat() == before


def test_a_finished_run_is_left_as_it_is(flags, undisturbed, finished):
    """Only where it runs and what it writes may differ."""
    others = ["--tp", "2", "--keep", "5", "--timeout", "33", "--async-save"]
    out, err = run(finished.parent, [*flags, *saving(finished, every=2), *others], 2)
    assert err == ""
    assert len(out.splitlines()) == 5
    is_undisturbed(finished, undisturbed)


def test_keep_keeps_as_many(flags, tmp_path):
    folder = tmp_path / "saved"
    run(tmp_path, [*flags, *saving(folder, every=7), "--keep", "3", "--async-save"])
    assert steps(folder) == ["step-35", "step-42", "step-48"]
    assert latest(folder) == "step-48"
    assert {p.name for p in folder.glob("[!.]*")} == {"latest", *steps(folder)}
    for step in steps(folder):
        assert json.loads((folder / step / "manifest.json").read_text())["mesh"] == {
            "pp": 1,
            "dp": 1,
            "tp": 1,
        }
        assert all(t.isfinite().all() for t in tensors(folder / step).values() if t.is_floating_point())
