# SPDX-License-Identifier: MIT
"""The commands that measure X·Xᵀ and Muon, at small sizes."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich", reason="rich prints the tables")
pytest.importorskip("tyro", reason="tyro reads the flags")
from benchmarks import matmul_t, muon


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_matmul_t_beside_torch_and_numpy(tmp_path, capsys):
    file = tmp_path / "rows.csv"
    assert matmul_t.main(["--quick", "--device=cpu", "--threads=1", f"--csv={file}"]) == 0
    rows = rows_of(file)
    found = {(row["mode"], row["provider"]) for row in rows}
    assert found == {
        *(("forward", name) for name in ("torch.mm", "torchpar", "numpy")),
        *(("backward", name) for name in ("torch.mm", "torchpar")),
    }
    assert all(row["ok"] == "True" and float(row["speedup"]) > 0 for row in rows)
    calls = [row["configuration"].split(", ")[0].split(" of ")[1] for row in rows if row["mode"] == "forward"]
    assert calls == ["1 calls"] * 3 + [f"{matmul_t.WARM_CALLS} calls"] * 3
    shown = capsys.readouterr().out
    assert "256x256" in shown.splitlines()[-2]


def test_a_wrong_product_has_no_speed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("torchpar.matmul_t", lambda x: x @ x)
    file = tmp_path / "rows.csv"
    arguments = ["--quick", "--device=cpu", "--threads=1", "--modes", "forward", f"--csv={file}"]
    assert matmul_t.main(arguments) == 1
    assert [row["speedup"] for row in rows_of(file) if row["provider"] == "torchpar"] == ["", ""]
    assert "wrong" in capsys.readouterr().out


@pytest.fixture
def small(monkeypatch, tmp_path) -> Any:
    monkeypatch.setattr(muon, "SHAPES", ((1, 24, 64), (3, 64, 24)))

    def run() -> list[dict[str, str]]:
        muon.main(muon.Flags(output=tmp_path, rounds=2, epochs=0))
        return rows_of(tmp_path / "muon.csv")

    return run


def test_muon_takes_the_way_of_torchs(small):
    rows = small()
    assert {row["weight"] for row in rows} == {"24x64", "3 of 64x24"}
    assert {row["optimizer"] for row in rows} == set(muon.OPTIMIZERS)
    for row in rows:
        assert float(row["p50_ms"]) > 0


def test_another_optimizer_goes_elsewhere(small, monkeypatch):
    monkeypatch.setitem(muon.OPTIMIZERS, "torchpar", lambda params: torch.optim.SGD(params, lr=1e-3))
    with pytest.raises(SystemExit, match="torchpar of 24x64, torchpar of 3 of 64x24 went another way"):
        small()
