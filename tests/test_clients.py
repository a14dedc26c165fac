# SPDX-License-Identifier: MIT
"""Tests of the layers and the operators in other packages: peft, torchao, timm, schedulefree, ONNX.

``pip install -e '.[clients]'`` installs the packages. `tests/test_nn.py` has stand-ins for them.
"""

import math
import re
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
from commands import ROOT
from layer_tools import CLIENTS, LAYERS, OF_PYTORCH, ByInheritance, outcome
from torch import Tensor, nn

import torchpar
from torchpar.nn import MLP, Linear

pytestmark = pytest.mark.filterwarnings("ignore")  # of these packages, about each other
PAGE = (ROOT / "docs" / "own_model.md").read_text()
# Tried by tests/parallel/test_parallel_layers.py and tests/optim/test_assign.py.
OF_RANKS = (
    "`parallelize_module`, by PyTorch's styles",
    "`parallelize_module`, by `torchpar.parallel.split.styles`",
    "`fully_shard`",
    "`torchpar.optim.Muon.for_model`",
    "`torchpar.parallel.parallel_mlp`",
)
WRONG_BY_INHERITANCE = [row for row in CLIENTS if "target_modules" in row or "float8" in row]


def needs(package: str) -> None:
    """Skip the test where ``package`` is not installed, and say what installs it."""
    if not find_spec(package):
        pytest.skip(f"{package} is not installed: pip install -e '.[clients]'")


def row_of(tool: str) -> str:
    """The outcome that the page's table has for a tool."""
    (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| {tool} |")]
    return line.split("|")[2].strip()


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("row", CLIENTS)
def test_a_tool_makes_of_a_layer_what_the_page_says(row, layer):
    package, tool = CLIENTS[row]
    needs(package)
    assert outcome(tool, LAYERS[layer]) == row_of(row)


@pytest.mark.parametrize("row", WRONG_BY_INHERITANCE)
def test_a_tool_is_wrong_with_a_layer_that_inherits_from_linear(row):
    package, tool = CLIENTS[row]
    needs(package)
    assert outcome(tool, ByInheritance) == "wrong"


@pytest.mark.parametrize("row", [row for row in CLIENTS if "target" in row])
def test_a_tool_is_right_with_a_linear_layer(row):
    package, tool = CLIENTS[row]
    needs(package)
    assert outcome(tool, Linear) == "right"


def test_the_page_has_the_tools_of_the_tests():
    rows = re.findall(r"^\| (.+) \| (?:right|left as it is|raises)\b.* \|$", PAGE, re.M)
    assert rows == [*CLIENTS, *OF_PYTORCH, *OF_RANKS]
    assert [row_of(tool) for tool in OF_PYTORCH] == ["right", "left as it is", "right"]


class Calling(nn.Module):
    """A module that calls a function."""

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(*args)


def exported(model: nn.Module, *args: Tensor, **options: object) -> Tensor:
    """The result of the model in ONNX, by ONNX's reference evaluator."""
    needs("onnxscript")
    from onnx.reference import ReferenceEvaluator

    program = torch.onnx.export(model.eval(), args, dynamo=True, verbose=False, **options)
    evaluator = ReferenceEvaluator(program.model_proto)
    operands = (t.detach().numpy() for t in args)
    (result,) = evaluator.run(None, dict(zip(evaluator.input_names, operands, strict=True)))
    return torch.from_numpy(result)


def of_size(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(math.prod(shape)))


X, GRAM = of_size(7, 5), of_size(7, 7)
CALLS: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {
    **{hidden: (MLP([5, 9, 3], hidden), (X,)) for hidden in ("sigmoid", "relu", "tanh", "maxout")},
    "sigmoid at the end": (MLP([5, 9, 3], output="sigmoid"), (of_size(2, 3, 5),)),
    "matmul_t": (Calling(torchpar.matmul_t), (X,)),
    "matmul_t, in blocks": (Calling(torchpar.matmul_t), (of_size(400, 129),)),
    "matmul_t, a batch": (Calling(torchpar.matmul_t), (of_size(2, 4, 5),)),
    "symmetric_matmul": (
        Calling(lambda a, c: torchpar.symmetric_matmul(a, a, c, alpha=2.0, beta=0.5)),
        (X, GRAM + GRAM.T),
    ),
    "maximum": (Calling(torchpar.maximum), (X, of_size(5))),
}


@pytest.mark.parametrize("name", CALLS)
def test_onnx_has_the_values_of_the_operators(name):
    model, args = CALLS[name]
    actual, expected = exported(model, *args), model(*args).detach()
    wide = model.double()(*(t.double() for t in args)).detach()
    model.float()
    # Both add at most 400 terms; the result's size bounds the errors of all sums here.
    bound = args[0].shape[-1] * 4 * torch.finfo(torch.float32).eps * wide.abs().max()
    assert (actual - wide).abs().max() <= bound
    assert (expected - wide).abs().max() <= bound
    assert not torch.allclose(actual, expected.roll(1, 0), atol=bound)


def test_onnx_of_any_number_of_rows():
    model, batch = MLP([5, 9, 3]), torch.export.Dim("batch")
    actual = exported(model, X, dynamic_shapes=({0: batch},))
    torch.testing.assert_close(actual, model(X).detach())


def test_onnx_takes_a_translation_of_an_operator_without_a_formula():
    needs("onnxscript")
    from onnxscript import opset18

    def plain(a, b):
        return opset18.MatMul(a, opset18.Transpose(b, perm=[1, 0]))

    model = Calling(torchpar.exact_matmul)
    table = {torch.ops.torchpar.exact_matmul.default: plain}
    with pytest.warns(UserWarning, match=r"custom_translation_table=\{torch.ops.torchpar.exact_m"):
        actual = exported(model, X, of_size(4, 5), custom_translation_table=table)
    torch.testing.assert_close(actual, X @ of_size(4, 5).T)
    with pytest.raises(Exception, match=r"No ONNX function found for .*torchpar.exact_matmul"):
        exported(model, X, X)
