# SPDX-License-Identifier: MIT
"""`python -m benchmarks run autotune`: configurations that are compiled, timed, and that cannot be used."""

import csv
import re
from collections import Counter

import pytest
import torch

pytest.importorskip("rich", reason="rich prints the tables")
pytest.importorskip("triton", reason="Triton compiles the configurations")

from benchmarks import autotune
from torchpar.errors import ConfigError
from torchpar.kernels import candidates
from torchpar.kernels.candidates import Tiles
from torchpar.tune.measure import LIBRARY, PRODUCT, Problem, describe, prepare

LARGE = ("symmetric_product", torch.bfloat16, "ieee")


def rows_of(folder) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "autotune.csv").read_text().splitlines()))


def test_without_a_gpu_it_compiles_and_says_that_it_did_not_measure(tmp_path, capsys):
    flags = ["--quick", "--target", "sm_80", "--sizes", "512", "2048", "--output", str(tmp_path)]
    assert autotune.main(flags) == 0
    rows = rows_of(tmp_path)
    assert Counter(row["kernel"] for row in rows) == dict.fromkeys(autotune.KERNELS, 2 * autotune.QUICK)
    for row in rows:
        assert 16 <= int(row["registers"]) <= 255
        assert (row["ok"] == "True") == (row["spills"] == "0")
        assert int(row["shared_memory"]) > 0
        assert float(row["compile_s"]) > 0
        assert (row["p20_ms"], row["p50_ms"], row["p80_ms"]) == ("", "", "")
        assert row["target"] == "sm_80"
    assert "nothing was timed" in capsys.readouterr().out


def test_on_a_gpu_the_variants_stand_beside_the_library(tmp_path, capsys, monkeypatch):
    variants = {tiles.variant: tiles for tiles in candidates.configurations(*LARGE, 90)}  # the last of each
    wrong, spilling = variants["specialized"], variants["tma"]

    def compile_tiles(launch, tiles, capability):
        found = {"registers": 64, "spills": 8 * (tiles == spilling), "shared_memory": 1024, "compile_s": 0.5}
        return found, "it [bold]spills" * (tiles == spilling)

    def measure(problem, configurations, device):
        times = {tiles: [[2.0], [4.0]] for tiles in configurations if tiles != wrong}
        times |= {LIBRARY: [[6.0], [10.0]], PRODUCT: [[5.0], [8.0]]}
        return times, {wrong: "ValueError: an error of 1"}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(autotune, "compile_tiles", compile_tiles)
    monkeypatch.setattr(autotune, "measure", measure)
    monkeypatch.setattr("benchmarks.results.provenance", lambda device: {})
    monkeypatch.setattr(candidates, "configurations", lambda *_: list(variants.values()))
    flags = ["--kernels", LARGE[0], "--sizes", "512", "1024", "--output", str(tmp_path)]
    assert autotune.main(flags) == 1, "two rows are wrong"
    rows = rows_of(tmp_path)
    names = ["product alone", "library", *map(describe, variants.values())]
    assert [row["contestant"] for row in rows] == 2 * names
    assert [row["n"] for row in rows] == ["512"] * 5 + ["1024"] * 5
    of = dict(zip(names, rows, strict=False))
    assert (of["library"]["p50_ms"], of["library"]["registers"]) == ("8.0", "")
    right = of[describe(variants["pointers"])]
    assert (right["p50_ms"], right["speedup"], right["registers"], right["ok"]) == (
        "3.0",
        "2.25",
        "64",
        "True",
    )
    assert (of[describe(wrong)]["p50_ms"], of[describe(wrong)]["reason"]) == ("", "ValueError: an error of 1")
    assert (of[describe(spilling)]["p50_ms"], of[describe(spilling)]["ok"]) == ("3.0", "False")
    assert "it [bold]spills" in capsys.readouterr().out


def test_the_sizes_before_a_fault_of_the_gpu_are_kept(tmp_path, monkeypatch):
    def measure(problem, configurations, device):
        if problem.n == 1024:
            raise ConfigError("the GPU fails")
        return {tiles: [[1.0]] for tiles in (*configurations, LIBRARY, PRODUCT)}, {}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(autotune, "compile_tiles", lambda *_: ({"registers": 64}, ""))
    monkeypatch.setattr(autotune, "measure", measure)
    monkeypatch.setattr("benchmarks.results.provenance", lambda device: {})
    flags = ["--quick", "--kernels", LARGE[0], "--sizes", "512", "1024", "--output", str(tmp_path)]
    with pytest.raises(ConfigError, match="the GPU fails"):
        autotune.main(flags)
    assert [row["n"] for row in rows_of(tmp_path)] == ["512"] * 4


@pytest.mark.parametrize(
    "tiles, rejected",
    [
        (Tiles(128, 128, 16, 2, 2), r"spills \d+ bytes of a thread"),
        (Tiles(128, 128, 128, 8, 4), r"\d+ bytes of shared memory, of 232448"),
        (Tiles(64, 64, 24, 8, 2), r".*power of 2"),
        (Tiles(64, 64, 32, 8, 2), ""),
    ],
)
def test_what_cannot_be_used_is_rejected(tiles, rejected):
    launch = prepare(Problem("symmetric_product", "bfloat16", 1024, 1024, 1024), torch.device("meta")).launch
    _, reason = autotune.compile_tiles(launch, tiles, 90)
    assert re.fullmatch(rejected, reason), reason


def test_a_size_below_one_is_refused():
    with pytest.raises(ConfigError, match="--sizes is 0"):
        autotune.main(["--sizes", "0"])
