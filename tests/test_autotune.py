# SPDX-License-Identifier: MIT
"""`python -m benchmarks run autotune`: configurations that are compiled, timed, and that cannot be used."""

import csv
import re

import pytest
import torch

pytest.importorskip("rich", reason="rich prints the tables")
pytest.importorskip("triton", reason="Triton compiles the configurations")

from benchmarks import autotune
from torchpar.kernels.tiles import Tiles, configurations
from torchpar.tune.measure import LIBRARY, PRODUCT, Problem, describe, prepare

KERNEL = "symmetric_product"


@pytest.mark.parametrize(
    "tiles, rejected",
    [
        pytest.param(
            Tiles(128, 128, 16, 2, 2), r"spills \d+ bytes of a thread", marks=pytest.mark.slow, id="spills"
        ),
        (Tiles(128, 128, 128, 8, 4), r"\d+ bytes of shared memory, of 232448"),
        (Tiles(64, 64, 24, 8, 2), r".*power of 2"),
        (Tiles(64, 64, 32, 8, 2), ""),
    ],
)
def test_what_cannot_be_used_is_rejected(tiles, rejected):
    launch = prepare(Problem(KERNEL, "bfloat16", 1024, 1024, 1024), torch.device("meta")).launch
    _, reason = autotune.compile_tiles(launch, tiles, 90)
    assert re.fullmatch(rejected, reason), reason


def test_on_a_gpu_configurations_stand_beside_the_library(tmp_path, monkeypatch):
    wrong, spilling, right = configurations(KERNEL, torch.bfloat16, "ieee", 90)[:3]

    def measure(problem, usable, device):
        times = {tiles: [[2.0], [4.0]] for tiles in usable if tiles != wrong}
        return times | {LIBRARY: [[6.0], [10.0]], PRODUCT: [[5.0], [8.0]]}, {wrong: "an error of 1"}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    compiled = {spilling: ({"registers": 64}, "it spills")}
    monkeypatch.setattr(
        autotune, "compile_tiles", lambda _, tiles, __: compiled.get(tiles, ({"registers": 64}, ""))
    )
    monkeypatch.setattr(autotune, "measure", measure)
    monkeypatch.setattr("benchmarks.results.provenance", lambda device: {})
    assert autotune.main([f"--kernels={KERNEL}", "--sizes=512", f"--output={tmp_path}"]) == 1
    rows = list(csv.DictReader((tmp_path / "autotune.csv").read_text().splitlines()))
    found = {row["contestant"]: [row[name] for name in ("p50_ms", "speedup", "ok", "reason")] for row in rows}
    assert found["library"] == ["8.0", "0.8166666666666667", "True", ""]
    assert found[describe(right)] == ["3.0", "2.25", "True", ""]
    assert found[describe(wrong)] == ["", "", "False", "an error of 1"]
    assert found[describe(spilling)] == ["3.0", "2.25", "False", "it spills"]
