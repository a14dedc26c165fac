# SPDX-License-Identifier: MIT
"""The comparison of ranks on GPUs with ranks on CPUs, rehearsed by gloo, and its judge."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import ranks_on_gpus
from commands import ROOT, import_path
from ranks_on_gpus import PARTS, TOLERANCES, judged

PART = {part.judge: part for part in reversed(PARTS)}  # the first one of each kind
SCRIPT = str(ROOT / "tests" / "ranks_on_gpus.py")


def rehearsed(folder: Path, device: str, *parts: str) -> dict[str, dict]:
    """Return the rows of some parts, by name."""
    words = [sys.executable, SCRIPT, str(folder), "--device", device, "--parts", *parts]
    environment = {"PYTHONPATH": import_path()}
    done = subprocess.run(
        words, env=ranks_on_gpus.os.environ | environment, capture_output=True, text=True
    )
    last = done.stdout.splitlines()[-1]
    assert last == f"0 of {len(parts)} parts wrong", done.stdout + done.stderr
    rows = map(json.loads, (folder / "ranks.jsonl").read_text().splitlines())
    return {row["part"]: row for row in rows}


@pytest.mark.parametrize("kind", TOLERANCES)
def test_a_loss_beyond_what_rounding_explains_is_wrong(kind):
    """As one that is not a number is, and one epoch fewer."""
    part, loss, most = PART[kind], 1.25, TOLERANCES[kind]
    cpus = {"losses": [loss, loss]}
    assert judged(part, {"losses": [loss, loss + most / 2]}, cpus, "cpu") == ""
    for off in (loss - 1.1 * most, loss + 2 * most, float("nan")):
        assert "losses differ by" in judged(part, {"losses": [loss, off]}, cpus, "cpu")
    fewer = judged(part, {"losses": [loss]}, cpus, "cpu")
    assert fewer == "1 losses on the GPUs, and 2 on the CPUs"
    assert judged(part, {}, {}, "cpu") == "0 losses on the GPUs, and 0 on the CPUs"


def test_another_hash_is_wrong_and_so_is_another_backend():
    part = PART["bits"]
    ours, others = {"hashes": ["ab", "cd"]}, {"hashes": ["ab", "ce"]}
    assert judged(part, ours, ours, "cpu") == ""
    assert judged(part, ours, others, "cpu") == "the hashes differ"
    none = {"hashes": []}
    assert judged(part, none, none, "cpu") == "0 hashes on the GPUs, and 0 on the CPUs"
    assert judged(part, ours | {"backend": "nccl"}, ours) == ""
    for found, said in ((ours | {"backend": "gloo"}, "gloo"), (ours, "no backend")):
        assert judged(part, found, ours) == (
            f"{said} is seen to connect the ranks on the GPUs, expected nccl"
        )
    assert judged(part, {"reason": "status 1: no"}, ours) == "on the GPUs: status 1: no"


@pytest.mark.parametrize("gpus, said", [(0, "no GPU"), (1, "1 GPU")])
def test_fewer_than_two_gpus_are_refused_in_one_line(monkeypatch, tmp_path, capsys, gpus, said):
    monkeypatch.setattr(ranks_on_gpus.torch.cuda, "device_count", lambda: gpus)
    assert ranks_on_gpus.main([str(tmp_path)]) == 2
    line = f"ranks_on_gpus.py: PyTorch finds {said}, expected 2 or more\n"
    assert capsys.readouterr().err == line


@pytest.mark.slow
def test_parts_of_each_kind_are_right_by_gloo_on_both_sides(tmp_path):
    pytest.importorskip("tyro", reason="the lessons need tyro")
    names = [PART[judge].name for judge in ("bits", "float32", "killed")]
    rows = rehearsed(tmp_path, "cpu", "Muon's exchanges", *names)
    exchanges = rows["Muon's exchanges"]["gpus"]
    assert exchanges["backend"] == "gloo"
    # The bits do not depend on how the matrices lie on the ranks.
    assert len(exchanges["hashes"]) == 3
    assert len({*exchanges["hashes"]}) == 1
    line = rows["a killed rank"]["gpus"]["line"]
    assert line.startswith("train_parallel.py: error: rank 1 does not answer")


@pytest.mark.slow
def test_muons_exchanges_have_the_bits_of_cpus_on_emulated_gpus(tmp_path):
    pytest.importorskip("tyro", reason="the lessons need tyro")
    rehearsed(tmp_path, "emulated", "Muon's exchanges")
