# SPDX-License-Identifier: MIT
"""Tests of the formulas that take the operators' places in an export to ONNX.

tests/test_clients.py exports to ONNX itself, where onnxscript is installed.
"""

from collections.abc import Callable

import pytest
import torch
import torch.onnx
from torch import Tensor, nn

import torchpar
from torchpar.nn import MLP


class Calling(nn.Module):
    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(*args)


X = torch.arange(35.0).view(7, 5).sin()
MODELS: dict[str, nn.Module] = {
    **{hidden: MLP([5, 9, 3], hidden) for hidden in ("sigmoid", "maxout")},
    "matmul_t": Calling(torchpar.matmul_t),
    "symmetric_matmul": Calling(lambda x: torchpar.symmetric_matmul(x, x, x @ x.mT, beta=0.5)),
}


@pytest.fixture
def exporting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)


def operators_of(program: torch.export.ExportedProgram) -> set[str]:
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    return {one.namespace for one in targets if isinstance(one, torch._ops.OpOverload)}


@pytest.mark.parametrize("name", MODELS)
def test_pytorchs_operators_take_an_operators_place(name, exporting, monkeypatch):
    model = MODELS[name]
    program = torch.export.export(model, (X,)).run_decompositions()
    assert operators_of(program) == {"aten"}
    torch.testing.assert_close(program.module()(X), model(X))
    monkeypatch.undo()
    assert "torchpar" in operators_of(torch.export.export(model, (X,)))


def test_an_operator_without_a_formula_names_the_way_out(exporting):
    model = Calling(lambda x: torchpar.exact_matmul(x, x))
    message = (
        r"torchpar::exact_matmul has no formula, and stays one operator in the export to ONNX; "
        r"translate it by custom_translation_table=\{torch.ops.torchpar.exact_matmul.default: …\}"
    )
    with pytest.warns(UserWarning, match=message):
        program = torch.export.export(model, (X,))
    assert "torchpar" in operators_of(program)
