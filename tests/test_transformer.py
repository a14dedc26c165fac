# SPDX-License-Identifier: MIT
"""The lesson of a transformer by Muon and AdamW: it learns, on one rank and on two, and draws its picture."""

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tyro", reason="tyro reads the flags")
pytest.importorskip("matplotlib", reason="matplotlib draws the picture")

from commands import lesson, rows_of, scalars

LAST = r"(muon|adamw): loss (\d\.\d{3}) after 12 steps, \d+\.\d s"


def run(ranks: Any, world_size: int, folder: Path) -> tuple[str, list[dict[str, Any]]]:
    metrics, plots = folder / f"{world_size}.jsonl", folder / str(world_size)
    flags = ["--steps", "12", "--device", "cpu", "--metrics", str(metrics), "--plots", str(plots)]
    (code, out, err), *others = ranks(world_size, lesson, "train_transformer", *flags)
    assert code == 0, err
    assert others == [(0, "", "")] * (world_size - 1)
    assert (plots / "transformer.png").read_bytes().startswith(b"\x89PNG")
    return out, rows_of(metrics)


def test_two_ranks_learn_what_one_does(ranks, tmp_path):
    out, alone = run(ranks, 1, tmp_path)
    lines = out.splitlines()
    assert re.match(r"parameter +shape +optimizer +reason", lines[0])
    assert any(re.match(r"blocks\.0\.linear1\.weight +512×128 +Muon +hidden matrix", line) for line in lines)
    found = [re.fullmatch(LAST, line).groups() for line in lines[-2:]]
    assert [name for name, _ in found] == ["muon", "adamw"]
    assert len(alone) == 24
    for name in ("muon", "adamw"):
        losses = [row["loss"] for row in alone if row["optimizer"] == name]
        assert losses[-1] < losses[0] - 1
    assert alone[0]["loss"] == alone[12]["loss"]  # the same weights and windows
    _, together = run(ranks, 2, tmp_path)
    for one, two in zip(alone, together, strict=True):
        # Roundings of other sums, which Muon takes to bfloat16.
        assert two["loss"] == pytest.approx(one["loss"], rel=2**-8)


def test_tensorboard_has_the_losses_of_both_optimizers(tmp_path):
    flags = ["--steps", "2", "--device", "cpu"]
    files = ["--metrics", str(tmp_path / "metrics"), "--log-dir", str(tmp_path / "log")]
    code, _, err = lesson("train_transformer", *flags, *files)
    assert code == 0, err
    for name in ("muon", "adamw"):
        rows = [row for row in rows_of(tmp_path / "metrics") if row["optimizer"] == name]
        assert [(row["step"], row["loss"]) for row in rows] == scalars(tmp_path / "log" / name, "loss")


def test_a_batch_that_ranks_cannot_share_is_refused(ranks):
    for code, _, err in ranks(3, lesson, "train_transformer", "--device", "cpu")[:1]:
        assert code == 2
        assert "--batch-size is 32, expected a multiple of the ranks" in err
