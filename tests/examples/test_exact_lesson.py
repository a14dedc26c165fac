# SPDX-License-Identifier: MIT
"""The lesson `train_ddp.py` in exact arithmetic: one hash on any ranks, and that of `verify`."""

import re
from pathlib import Path
from unittest.mock import patch

import pytest
import train_ddp
from commands import ROOT, forked, lesson
from fake_data import fashion_mnist

from torchpar.data import load
from torchpar.exact.verify import models, verify
from torchpar.parallel import join_world

SAMPLES, EPOCHS, UNIT = 150, 2, 48  # of a batch: units of 48, 48, 48 and 6 samples


def hash_of_lesson(root: Path, unit: int = UNIT) -> str:
    flags = f"--dataset fashion-mnist --data {root} --samples {SAMPLES} --epochs {EPOCHS}"
    with patch.object(train_ddp, "UNIT", unit):
        code, out, err = lesson("train_ddp", *flags.split(), "--arithmetic", "exact")
    assert code == 0, err
    *_, accuracy, last = out.splitlines() or ["", ""]
    assert not out or accuracy.startswith("test accuracy ")
    return last.removeprefix("SHA-256 of the weights: ")


def hash_of_verify(root: Path) -> str:
    train, test = load("fashion-mnist", root)
    with (
        patch.multiple(models, LESSON_EPOCHS=EPOCHS, LESSON_UNIT=UNIT),
        patch.object(models, "load", lambda *_: (train[:SAMPLES], test)),
        join_world("cpu") as world,
    ):
        return verify.trained(world, verify.Plan("lesson", world.world_size))


@pytest.mark.slow
def test_any_ranks_and_the_command_have_one_hash(ranks, tmp_path):
    root = fashion_mnist(tmp_path, train=SAMPLES, test=20)
    (expected,) = ranks(1, hash_of_lesson, root)
    assert re.fullmatch("[0-9a-f]{64}", expected)
    for world_size in (2, 3):
        assert ranks(world_size, hash_of_lesson, root) == [expected] + [""] * (world_size - 1)
    assert ranks(2, hash_of_verify, root) == [expected] * 2
    assert ranks(1, hash_of_lesson, root, UNIT - 1) != [expected]


@pytest.mark.slow
def test_a_lesson_resumed_on_other_ranks_has_the_hash_of_one_that_did_not_stop(ranks, tmp_path):
    root = fashion_mnist(tmp_path, train=2048, test=20)
    flags = f"--dataset fashion-mnist --data {root} --hidden 16 --schedule constant"
    flags += " --arithmetic exact --samples 2048 --epochs"

    def last_line(world_size: int, epochs: int, *others: str) -> str:
        given = *flags.split(), str(epochs), *others
        (code, out, err), *_ = ranks(world_size, lesson, "train_ddp", *given)
        assert code == 0, err
        assert out.startswith("resumed from step 2\n") == (saved.exists() and epochs == 2), out
        return out.splitlines()[-1]

    saved = tmp_path / "none"
    expected = last_line(1, 2)
    assert re.fullmatch("SHA-256 of the weights: [0-9a-f]{64}", expected)
    for first, second in ((1, 2), (2, 3), (3, 1)):
        saved = tmp_path / f"saved{first}"
        assert last_line(first, 1, "--checkpoint", str(saved)) != expected
        assert last_line(second, 2, "--checkpoint", str(saved)) == expected


@pytest.mark.slow
def test_an_emulated_gpu_has_the_hash_of_the_cpu(fork_server, tmp_path):
    root = fashion_mnist(tmp_path, train=60, test=20)
    script = str(ROOT / "examples" / "train_ddp.py")
    flags = f"--dataset fashion-mnist --data {root} --epochs 1 --hidden 16 --arithmetic exact"
    hashes = []
    for command, device in (((), "cpu"), (("-m", "nogpu", "--cuda-is-cpu"), "cuda")):
        code, out, err = forked(*command, script, *flags.split(), "--device", device)
        assert code == 0, out + err
        hashes += re.findall(r"^SHA-256 of the weights: ([0-9a-f]{64})$", out, re.MULTILINE)
    assert len(hashes) == 2
    assert len(set(hashes)) == 1
    assert "exact_product_kernel" in out


def test_the_command_trains_with_the_lessons_defaults():
    flags = train_ddp.Flags()
    assert (flags.epochs, flags.batch_size) == (models.LESSON_EPOCHS, models.LESSON_BATCH)
    assert (flags.crop, flags.pool) == (models.LESSON_CROP, models.LESSON_POOL)
    assert models.LESSON_SIZES[1:-1] == flags.hidden
    assert train_ddp.UNIT == models.LESSON_UNIT
    muon = tuple(flags.MUON[name] for name in ("lr", "momentum", "weight_decay"))
    assert muon == models.LESSON_MUON
    assert flags.label_smoothing == models.LESSON_SMOOTHING
    assert (flags.optimizer, flags.schedule, flags.activation) == ("muon", "linear", "sigmoid")
