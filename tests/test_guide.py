# SPDX-License-Identifier: MIT
"""The guide to one's own model: its script runs on two ranks, and the trained model loads as it says."""

import re

import pytest
import torch
from commands import ROOT, TORCHRUN, run

GUIDE = (ROOT / "docs" / "own_model.md").read_text()


@pytest.mark.slow
def test_the_guides_script_trains_on_two_ranks_and_its_model_loads(tmp_path, monkeypatch):
    script, use = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    assert len(script.splitlines()) <= 45
    (tmp_path / "own_model.py").write_text(script)
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*TORCHRUN, str(tmp_path / "own_model.py"), cwd=tmp_path)
    assert code == 0, err
    (accuracy,) = re.fullmatch(r"test accuracy (\d\.\d{3})\n", out).groups()
    assert float(accuracy) > 0.9
    names: dict[str, object] = {"__name__": "guide"}
    definitions, _ = script.split("with join_world()")
    exec(compile(definitions + use, "own_model.md", "exec"), names)
    assert torch.equal(names["classes"], torch.tensor([0, 1, 2]))
