# SPDX-License-Identifier: MIT
"""`python -m benchmarks.autotune`: what is compiled and predicted, and Triton's autotuner interpreted."""

import csv
import importlib
import math
import re
import sys
from collections import Counter

import pytest
import torch

pytest.importorskip("rich", reason="rich prints the tables")
pytest.importorskip("triton", reason="Triton compiles the configurations")

import benchmarks
from benchmarks import autotune
from benchmarks.compiled import fresh_cache, target
from benchmarks.cost_model import Peak, predict
from torchpar.kernels import tuning
from torchpar.kernels.tuning import Tiles
from torchpar.search import Problem


def test_autotune_without_a_gpu_compiles_and_says_that_it_did_not_measure(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    assert autotune.main(["--quick", "--target", "sm_80", "--sizes", "512", "2048", "--csv", str(path)]) == 0
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert Counter(row["kernel"] for row in rows) == dict.fromkeys(autotune.KERNELS, 2 * autotune.QUICK)
    for row in rows:
        assert 16 <= int(row["registers"]) <= 255
        assert bool(row["rejected"]) == (row["spills"] != "0")
        assert (int(row["shared_memory"]) > 0) == (row["kernel"] != "maximum")
        assert float(row["compile_s"]) > 0
        assert float(row["predicted_ms"]) > 0
        assert (row["p20_ms"], row["p50_ms"], row["p80_ms"]) == ("", "", "")
        assert row["target"] == "sm_80"
    out = capsys.readouterr().out
    assert "No time was measured" in out
    assert "predicted, none was measured" in out


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
    problem = Problem("symmetric_product", "bfloat16", 1024)
    case = autotune.prepare_case(problem, torch.device("meta"))
    row = autotune.Row(
        kernel=problem.kernel, dtype=problem.dtype, configuration="", n=problem.n, predicted_ms=1
    )
    with target(90), fresh_cache() as folder:
        row = autotune.compiled(case.launch, row, tiles, 90, folder)
    assert re.fullmatch(rejected, row.rejected), row.rejected
    assert autotune.time_of(row) == (None if rejected else 1)


@pytest.mark.parametrize("name", ["rich.console", "triton"])
def test_autotune_names_what_is_not_installed_when_it_is_run(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "benchmarks.autotune")
    monkeypatch.setattr(benchmarks, "autotune", autotune)  # to be put back
    module = importlib.import_module("benchmarks.autotune")
    with pytest.raises(SystemExit, match=f"pip install them: .*{name}"):
        module.main([])


PEAK = Peak({"bfloat16": 1e12}, bandwidth=1e9, multiprocessors=10)


@pytest.mark.parametrize(
    "kernel, n, tiles, ms",
    [
        ("maximum", 1000, (1024, 4), 6),  # 3 arrays of 2 MB
        ("linear_sigmoid", 1000, (1000, 1000), 20),  # one of ten multiprocessors makes 2e9 flops
        ("linear_sigmoid", 1000, (1000, 100), 6),  # all of them 2e8, in 2 ms: the memory takes longer
        ("symmetric_product", 4000, (1000, 1000), 80),  # ten tiles of 8e9 flops
        ("symmetric_product", 4001, (1000, 1000), 160.04),  # fifteen: five wait for another
        ("linear_sigmoid", 4000, (1000, 1000), 160),
    ],
)
def test_the_model_predicts_what_its_formula_says(kernel, n, tiles, ms):
    assert predict(Problem(kernel, "bfloat16", n), tiles, PEAK) == pytest.approx(ms)


def autotuned(kernel: str, tiles: list[tuple[int, ...]], fastest: int, failing: int) -> tuple:
    """Where kernels are interpreted: the times that the autotuner found, and the errors of its calls."""
    from benchmarks.autotune import autotune, prepare_case

    case = prepare_case(Problem(kernel, "float32", 129), torch.device("cpu"))
    called: list[torch.Tensor] = []

    def bench(call, quantiles):
        case.out.fill_(math.nan)
        call()
        called.append((case.out - case.oracle).abs().max().item())
        ms = math.inf if len(called) - 1 == failing else 1.0 if len(called) - 1 == fastest else 2.0
        return [ms, ms - 0.1, ms + 0.1]

    timings = autotune(case.launch, tiles, bench)
    return timings, called, (case.out - case.oracle).abs().max().item()


@pytest.mark.parametrize(
    "kernel, tiles",
    [
        ("symmetric_product", [Tiles(32, 32, 32, 4, 2), Tiles(64, 64, 32, 4, 2), Tiles(64, 64, 32, 8, 2)]),
        ("linear_sigmoid", [Tiles(32, 64, 32, 4, 2), Tiles(64, 32, 32, 4, 2), Tiles(64, 64, 32, 8, 2)]),
        ("maximum", [tuning.Block(4096, 4), tuning.Block(8192, 4), tuning.Block(8192, 8)]),
    ],
)
def test_tritons_autotuner_runs_each_configuration_on_its_own_grid(interpreter, kernel, tiles):
    timings, errors, last = interpreter(autotuned, kernel, tiles, 1, 2)
    assert timings == {tiles[0]: [2.0, 1.9, 2.1], tiles[1]: [1.0, 0.9, 1.1], tiles[2]: [math.inf] * 3}
    assert len(errors) == 3
    assert max(*errors, last) < 1e-3  # an element that a grid left out is NaN
