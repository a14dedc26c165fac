# SPDX-License-Identifier: MIT
"""The pages that readers type along: their code runs as it stands there."""

import re
from typing import Any

import pytest
import torch
from commands import ROOT, TORCHRUN, run


def blocks(page: str) -> list[str]:
    """The Python code of a page of the documentation."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


def execute(code: list[str], page: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "guide"}
    for block in code:
        exec(compile(block, page, "exec"), names)
    return names


def test_the_tours_operator_and_network():
    *code, script = blocks("tour.md")
    assert len(code) == 3
    assert "join_world" in script
    execute(code, "tour.md")


PAGES = ("maximum.md", "matmul_t.md", "symmetric_matmul.md", "linear_sigmoid.md")


@pytest.mark.parametrize("page", PAGES)
def test_the_pages_of_operators_run(page):
    y = execute(blocks(page), page)["y"]
    assert y.isfinite().all()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # in opcheck
def test_a_custom_operator_step_by_step():
    names = execute(blocks("citizen.md"), "citizen.md")
    assert names["gram"](torch.ones(2, 3)).tolist() == [[3, 3], [3, 3]]


@pytest.mark.slow
def test_the_tours_script_learns_on_two_ranks(tmp_path):
    script = blocks("tour.md")[-1]
    (tmp_path / "two_ranks.py").write_text(script)
    code, out, err = run(*TORCHRUN, str(tmp_path / "two_ranks.py"), cwd=tmp_path)
    assert code == 0, err
    (accuracy,) = re.fullmatch(r"accuracy (\d\.\d{3}) on 2 ranks\n", out).groups()
    assert float(accuracy) > 0.97


@pytest.mark.slow
def test_the_guides_script_trains_on_two_ranks_and_its_model_loads(tmp_path, monkeypatch):
    script, use = blocks("own_model.md")
    assert len(script.splitlines()) <= 45
    (tmp_path / "own_model.py").write_text(script)
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*TORCHRUN, str(tmp_path / "own_model.py"), cwd=tmp_path)
    assert code == 0, err
    (accuracy,) = re.fullmatch(r"test accuracy (\d\.\d{3})\n", out).groups()
    assert float(accuracy) > 0.9
    definitions, _ = script.split("with join_world()")
    names = execute([definitions + use], "own_model.md")
    assert torch.equal(names["classes"], torch.tensor([0, 1, 2]))
