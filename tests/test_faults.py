# SPDX-License-Identifier: MIT
"""Training under faults: killed, hanging and stopped ranks, wrong flags, full disks, damaged checkpoints.

Each kind of fault has a test in the default run. The others of its kind are marked slow.
"""

import json
import math
import os
import random
import re
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
    train,
    wait_for,
    workers,
)

pytest.importorskip("torchvision", reason="torchvision reads the data sets")
pytest.importorskip("tyro", reason="tyro reads the flags")
import train_parallel

from torchpar.errors import ConfigError
from torchpar.parallel import join_world
from torchpar.training.stop import StopSignal

STEPS = 48  # of four epochs


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
def undisturbed(flags, tmp_path_factory) -> Path:
    """The checkpoints of one process; with ``--arithmetic exact`` those of every mesh are the same."""
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


@pytest.fixture
def processes() -> Iterator[list[Rank]]:
    """Ranks to end, whatever happens."""
    ranks: list[Rank] = []
    yield ranks
    for rank in ranks:
        rank.process.kill()


VICTIMS = [
    (signal.SIGSTOP, 3),
    pytest.param(signal.SIGKILL, 0, marks=pytest.mark.slow),
    pytest.param(signal.SIGSTOP, 0, marks=pytest.mark.slow),
    pytest.param(signal.SIGKILL, 3, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("number, victim", VICTIMS)
def test_the_rank_that_hangs_or_was_killed_is_named(data, tmp_path, processes, number, victim):
    """On every other rank. Rank 0 hosts the store; rank 0 or 3 exchanges nothing with the victim.

    One that hangs is named alone. A killed rank's neighbours fail at once, and may name another rank too that
    still waits for them.
    """
    timeout, folder = 3, tmp_path / "saved"
    flags = [*data, *saving(folder), "--epochs", "4000", "--tp", "2", "--timeout", str(timeout)]
    processes += start(tmp_path, flags, 4)
    wait_for(lambda: latest(folder))
    os.kill(processes[victim].pid, number)
    began = time.monotonic()
    others = [rank for rank in processes if rank is not processes[victim]]
    wait_for(lambda: any(not rank.process.is_alive() for rank in others), timeout + 5)
    assert number == signal.SIGKILL or time.monotonic() - began > timeout - 1
    codes, _, err = finish(others, launched=False)
    assert codes == [2, 2, 2]
    for rank in others:
        (line,) = errors(rank.err.read_text())
        (named,) = re.findall(r"rank ([\d, ]+) does not answer", line)
        assert named == str(victim) if number == signal.SIGSTOP else str(victim) in named.split(", ")
    assert "Traceback" not in err


@pytest.mark.slow
def test_torchrun_ends_after_the_line_about_a_hanging_rank(data, tmp_path):
    timeout, folder = 6, tmp_path / "saved"
    flags = [*data, *saving(folder), "--epochs", "4000", "--timeout", str(timeout)]
    process = torchrun("--nproc_per_node=2", TRAIN, *flags)
    try:
        wait_for(lambda: latest(folder))
        ranks = workers(process.pid)
        os.kill(ranks[1], signal.SIGSTOP)
        wait_for(lambda: not alive(ranks[0]), timeout + 5)
        os.kill(ranks[1], signal.SIGKILL)  # torchrun waits 30 s for a process that does not end
        _, err = process.communicate(timeout=30)
    finally:
        end(process)
    assert process.returncode != 0
    (line,) = errors(err)
    assert "rank 1 does not answer" in line


def test_after_a_kill_the_same_command_ends_with_the_same_bits(flags, undisturbed, tmp_path, processes):
    folder, generator = tmp_path / "saved", random.Random(0)
    command = [*flags, *saving(folder), "--async-save"]
    processes += start(tmp_path, command, 2)
    wait_for(lambda: latest(folder))
    time.sleep(generator.uniform(0, 0.1))
    os.kill(processes[1].pid, signal.SIGKILL)
    codes, _, _ = finish(processes)
    assert codes[1] == -signal.SIGKILL
    assert latest(folder) != f"step-{STEPS}"
    run(tmp_path, command, 2)
    is_undisturbed(folder, undisturbed)


@pytest.mark.slow
def test_torchrun_starts_killed_ranks_again_and_they_end_with_the_same_bits(flags, undisturbed, tmp_path):
    """At random moments and, because each step is saved, during saves."""
    folder, generator = tmp_path / "saved", random.Random(0)
    command = [TRAIN, *flags, *saving(folder), "--async-save"]
    process = torchrun("--nproc_per_node=2", "--max_restarts=3", *command)
    try:
        for _ in range(2):
            before = latest(folder)
            wait_for(lambda before=before: latest(folder) != before)
            assert latest(folder) != f"step-{STEPS}"
            time.sleep(generator.uniform(0, 0.15))
            ranks = workers(process.pid)
            os.kill(ranks[generator.choice(sorted(ranks))], signal.SIGKILL)
            # The other rank may finish a save before it ends; the next kill is one of ranks started again.
            wait_for(lambda ranks=ranks: not any(map(alive, ranks.values())))
        _, err = process.communicate(timeout=120)
    finally:
        end(process)
    assert process.returncode == 0, err
    is_undisturbed(folder, undisturbed)


def end(process: subprocess.Popen[str]) -> None:
    """Kill torchrun and its ranks."""
    ranks = workers(process.pid).values()
    process.kill()
    for rank in ranks:
        with suppress(ProcessLookupError):
            os.kill(rank, signal.SIGKILL)
    process.communicate()


STOPS = [  # mesh, signal, exit status
    [("--dp 2 --pp 2", signal.SIGTERM, 0), ("", signal.SIGINT, 130), ("--tp 3", signal.SIGTERM, 0)],
    pytest.param(
        [
            (f"--dp {dp} --tp {tp} --pp {pp}", signal.SIGTERM, 0)
            for dp, tp, pp in ((4, 1, 1), (1, 1, 3), (1, 2, 1), (2, 2, 1), (1, 2, 2), (5, 1, 1))
        ],
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize("stops", STOPS)
def test_stopped_by_a_signal_to_one_rank_another_mesh_goes_on(flags, undisturbed, tmp_path, stops):
    """At a random moment: all ranks save the same step."""
    folder, generator, stopped = tmp_path / "saved", random.Random(1), []
    command = [*flags, *saving(folder, every=5)]
    for mesh, number, status in stops:
        world_size = math.prod(map(int, mesh.split()[1::2]))
        ranks = start(tmp_path, [*command, *mesh.split()], world_size)
        before = latest(folder)
        wait_for(lambda b=before, r=ranks: latest(folder) != b or not r[0].process.is_alive())
        time.sleep(generator.uniform(0, 0.05))
        os.kill(generator.choice(ranks).pid, number)
        codes, out, err = finish(ranks)
        assert codes == [status] * world_size, err
        assert err == ""
        assert out.count(f"stopped by {number.name}; the state is saved") == 1
        assert "test accuracy" not in out.splitlines()[-1]
        stopped.append(latest(folder))
        assert stopped[-1] == steps(folder)[-1] != f"step-{STEPS}"
    assert len(set(stopped)) == len(stopped)
    run(tmp_path, command, 2)
    is_undisturbed(folder, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_torchrun_is_stopped_and_the_same_command_goes_on(flags, undisturbed, tmp_path, number):
    """A terminal sends Ctrl-C to the launcher's process group."""
    folder = tmp_path / "saved"
    command = [*flags, *saving(folder, every=5)]
    process = torchrun("--nproc_per_node=2", TRAIN, *command)
    try:
        wait_for(lambda: latest(folder))
        os.killpg(process.pid, number)
        out, err = process.communicate(timeout=40)
    finally:
        end(process)
    assert out.count(f"stopped by {number.name}; the state is saved") == 1
    assert 'train_parallel.py", line' not in err  # no traceback of a rank
    assert "exitcode" not in err  # and torchrun reports no failed rank
    assert latest(folder) == steps(folder)[-1] != f"step-{STEPS}"
    _, err = run(tmp_path, command, 2)
    assert err == ""
    is_undisturbed(folder, undisturbed)


@pytest.mark.parametrize("world_size", [1, 2])
def test_without_checkpoints_an_interrupt_ends_at_once(data, tmp_path, processes, world_size):
    metrics = tmp_path / "metrics"
    processes += start(tmp_path, [*data, "--epochs", "4000", "--metrics", str(metrics)], world_size)
    wait_for(lambda: metrics.exists() and metrics.read_text())
    for rank in processes:
        os.kill(rank.pid, signal.SIGINT)
    codes, out, err = finish(processes, 10, launched=False)
    assert codes == [130] * world_size
    assert err == ""
    assert "the state is saved" not in out


def test_a_second_interrupt_ends_at_once():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with join_world("cpu") as world, StopSignal(world) as stop:
            os.kill(os.getpid(), signal.SIGINT)
            stop.ask()
            assert stop.answer() == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        for number, handler in before.items():  # a process that stops ignores them
            signal.signal(number, handler)


DIFFERENT = [  # the flags of all, and those of each of two ranks
    ("", "--hidden 33 7", "--hidden 33 8"),
    ("--tp 2", "--hidden 33 7", "--hidden 33 8"),
    ("--pp 2", "--hidden 33 7", "--hidden 33 8"),
    ("--arithmetic exact", "--hidden 33 7", "--hidden 33 8"),
    ("", "--batch-size 51", "--batch-size 50"),
    ("", "--tp 2", "--dp 2"),
    ("", "--arithmetic fast", "--arithmetic exact"),
    ("--pp 2", "--micro-batches 4", "--micro-batches 3"),
    ("--pp 2", "--pipeline 1f1b", "--pipeline gpipe"),
    ("--checkpoint {}", "--save-every 2", "--save-every 3"),
    ("", "--checkpoint {}", ""),
    ("--schedule constant", "--epochs 1", "--epochs 2"),
]


def train_differing(flags: list[str], each: list[list[str]]) -> str:
    return train(*flags, *each[int(os.environ["RANK"])])


@pytest.mark.parametrize("of_all, of_0, of_1", DIFFERENT)
def test_ranks_whose_flags_differ_raise_the_same_error(ranks, data, tmp_path, of_all, of_0, of_1):
    """Before a collective aborts them, or makes one wait for the other."""
    flags, *each = (text.format(tmp_path / "saved").split() for text in (of_all, of_0, of_1))
    messages = ranks(2, train_differing, [*data, "--epochs", "1", "--timeout", "5", *flags], each)
    assert " on rank 0 and " in messages[0]
    assert " on rank 1" in messages[0]
    assert messages[0] == messages[1]


def test_ranks_whose_flags_differ_end_with_status_2(data, tmp_path):
    each = [["--hidden", "33", "7"], ["--hidden", "33", "8"]]
    codes, out, err = finish(start(tmp_path, data, 2, differing=each, grace=0.2), launched=False)
    assert codes == [2, 2], err
    assert len(errors(err)) == len(err.splitlines()) == 2
    assert len(set(errors(err))) == 1
    assert out == ""


@pytest.mark.parametrize("mesh", ["--dp 3", "--tp 3", "--pp 3"])
def test_sizes_that_do_not_divide_are_supported(ranks, data, tmp_path, undisturbed, mesh):
    """Batches of 51 and 39 samples, layers of 33, 7 and 10, on three ranks."""
    folder = tmp_path / "saved"
    assert ranks(3, train, *data, *saving(folder, every=1000), *mesh.split()) == [""] * 3
    for mine, ones in zip(losses(Path(f"{folder}.jsonl")), losses(Path(f"{undisturbed}.jsonl")), strict=True):
        assert mine == pytest.approx(ones, rel=1e-4)
    mine, ones = tensors(folder / f"step-{STEPS}"), tensors(undisturbed / f"step-{STEPS}")
    assert {name: t.shape for name, t in mine.items()} == {name: t.shape for name, t in ones.items()}


@pytest.mark.parametrize(
    "mesh",
    [
        "--dp 3",
        "--tp 3",
        "--pp 3 --micro-batches 5",
        pytest.param("--dp 5", marks=pytest.mark.slow),
        pytest.param("--dp 2 --pp 2 --pipeline gpipe", marks=pytest.mark.slow),
        pytest.param("--tp 2 --pp 2", marks=pytest.mark.slow),
    ],
)
def test_exact_arithmetic_has_the_same_bits_on_any_mesh(ranks, flags, tmp_path, undisturbed, mesh):
    """Weights, momenta and losses, of training and of test samples."""
    folder = tmp_path / "saved"
    world_size = math.prod(int(n) for n in re.findall(r"--[dtp]p (\d)", mesh))
    saved = saving(folder, every=1000)
    assert ranks(world_size, train, *flags, *saved, *mesh.split()) == [""] * world_size
    is_undisturbed(folder, undisturbed)


BAD = [
    (2, "--dp 3", "dp 3 × tp 1 × pp 1 is 3 ranks, but 2 were started"),
    (2, "--tp 2 --pp 2", "dp 1 × tp 2 × pp 2 is 4 ranks, but 2 were started"),
    (2, "--pp 2 --hidden", "stages"),
    (4, "--pp 4", "stages"),
    (2, "--arithmetic exact --optimizer muon", "take --optimizer sgd"),
    (2, "--tp 2 --arithmetic exact --compile", "exact arithmetic forbids; drop --compile"),
    (2, "--pp 2 --arithmetic exact --micro-batches 1", "fewer than the 2 stages"),
]


@pytest.mark.parametrize("world_size, bad, message", BAD)
def test_bad_flags_are_an_error_on_every_rank(ranks, data, world_size, bad, message):
    messages = ranks(world_size, train, *data, *bad.split())
    assert len(set(messages)) == 1
    assert message in messages[0]
    assert "\n" not in messages[0]


@pytest.mark.parametrize(
    "bad, message",
    [("--dp 3", "dp 3 × tp 1 × pp 1 is 3 ranks"), ("--tp 0", "--tp is 0, expected at least 1")],
)
def test_rank_0_prints_the_error_while_the_others_wait(data, tmp_path, bad, message):
    """With a mesh that the ranks compare, and with a value that each rank refuses by itself."""
    codes, _, err = finish(start(tmp_path, [*data, *bad.split()], 2, grace=60))
    assert codes == [2, -signal.SIGTERM]  # the launcher ends rank 1 meanwhile
    assert err.count(message) == 1


@pytest.mark.parametrize("flag", ["tp", "keep", "micro_batches"])
def test_the_least_value_of_a_flag_is_1(flag):
    with pytest.raises(ConfigError, match=f"--{flag.replace('_', '-')} is 0, expected at least 1"):
        train_parallel.Flags(**{flag: 0})


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system with room for two checkpoints, but not for three."""
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
    assert len(steps(folder)) == 2  # the old ones; nothing unfinished is left
    assert latest(folder) == steps(folder)[-1]
    for step in steps(folder):
        tensors(folder / step)
    assert reason in line


@pytest.mark.parametrize("asynchronous", [pytest.param([], marks=pytest.mark.slow), ["--async-save"]])
def test_a_full_disk_keeps_the_old(flags, undisturbed, tmp_path, small_disk, asynchronous):
    folder = small_disk / "saved"
    metrics = ["--metrics", str(tmp_path / "saved.jsonl")]
    ranks = start(tmp_path, [*flags, *saving(folder), *metrics, *asynchronous], 2)
    ends_with_one_line(ranks, folder, "No space left on device")
    shutil.copytree(folder, tmp_path / "saved")  # there is more room here
    _, err = run(tmp_path, [*flags, *saving(tmp_path / "saved"), *asynchronous], 2)
    assert err == ""
    is_undisturbed(tmp_path / "saved", undisturbed)


@pytest.mark.slow
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


def test_a_damaged_checkpoint_is_skipped_and_named(flags, undisturbed, finished):
    """The run resumes from the one before, and ends with the same bits."""
    shard = finished / f"step-{STEPS}" / "__0_0.distcp"
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged)
    _, err = run(finished.parent, [*flags, *saving(finished, every=7)], 2)
    (line,) = err.splitlines()
    assert f"{shard} is damaged" in line
    is_undisturbed(finished, undisturbed)


def test_all_damaged_is_an_error_on_every_rank(ranks, flags, finished):
    for step in steps(finished):
        os.truncate(finished / step / "__0_0.distcp", 1000)
    messages = ranks(2, train, *flags, *saving(finished))
    assert messages[0] == messages[1]
    assert str(finished / f"step-{STEPS}" / "__0_0.distcp") in messages[0]


@pytest.mark.parametrize(
    "change, message",
    [
        ("--lr 0.25", "a run with lr 0.5, this one has lr 0.25"),
        ("--seed 1 --clip 2", "a run with clip None, seed 0, this one has clip 2.0, seed 1"),
        ("--epochs 5", "a run with epochs 4, this one has epochs 5"),
        ("--arithmetic fast", "a run with arithmetic exact, this one has arithmetic fast"),
    ],
)
def test_another_run_is_refused(ranks, flags, finished, change, message):
    before = (finished / "latest").stat()
    (error,) = ranks(1, train, *flags, *saving(finished), *change.split())
    assert message in error
    assert (finished / "latest").stat() == before


def test_a_finished_run_is_left_as_it_is(flags, undisturbed, finished):
    """A run on another mesh, with other settings of checkpoints, is the same run."""
    others = ["--tp", "2", "--keep", "5", "--timeout", "33", "--async-save"]
    out, err = run(finished.parent, [*flags, *saving(finished, every=2), *others], 2)
    assert err == ""
    assert [line.partition(" ")[0] for line in out.splitlines()] == ["complete", "test"]
    is_undisturbed(finished, undisturbed)


def test_keep_is_the_number_of_checkpoints(ranks, flags, tmp_path):
    folder = tmp_path / "saved"
    assert ranks(1, train, *flags, *saving(folder, every=7), "--keep", "3", "--async-save") == [""]
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
