# SPDX-License-Identifier: MIT
"""The lesson of a transformer by Muon and AdamW: two ranks learn what one does."""

import re

import pytest

pytest.importorskip("tyro", reason="tyro reads the flags")

from commands import lesson, rows_of, scalars


def test_two_ranks_learn_what_one_does(ranks, tmp_path):
    found = []
    for world_size in (1, 2):
        metrics = tmp_path / str(world_size)
        log = tmp_path / f"log-{world_size}"
        flags = ["--steps=12", "--device=cpu", f"--metrics={metrics}", f"--log-dir={log}"]
        (code, out, err), *others = ranks(world_size, lesson, "train_transformer", *flags)
        assert code == 0, err
        assert others == [(0, "", "")] * (world_size - 1)
        found.append(rows_of(metrics))
    alone, together = found
    assert re.match(r"parameter +shape +optimizer +reason\n", out)
    assert re.search(r"\nblocks\.0\.linear1\.weight +512×128 +Muon +hidden matrix", out)
    assert [row["optimizer"] for row in alone] == ["muon"] * 12 + ["adamw"] * 12
    for name, losses in (("muon", alone[:12]), ("adamw", alone[12:])):
        assert losses[-1]["loss"] < losses[0]["loss"] - 1
        assert [(row["step"], row["loss"]) for row in losses] == scalars(tmp_path / "log-1" / name, "loss")
    assert alone[0]["loss"] == alone[12]["loss"]  # the same weights and windows
    for one, two in zip(alone, together, strict=True):
        # Roundings of other sums, which Muon takes to bfloat16.
        assert two["loss"] == pytest.approx(one["loss"], rel=2**-8)
