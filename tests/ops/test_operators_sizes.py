# SPDX-License-Identifier: MIT
"""Operators and layers with sizes that a compiler does not know, beside PyTorch's operators.

`test_our_operators.py` tries each size of the samples of the records.
"""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from samples import normal
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.func import grad, vmap
from torch.testing import assert_close

import torchpar
from benchmarks.records import OPERATORS
from torchpar.ops.sizes import are_alike
from torchpar.testing import check_operator

slow = pytest.mark.slow
# Of PyTorch's own compiler, and of its own export (2.11).
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec"),
]
RULES = ("torch.compile, each size dynamic", "torch.compile, data-dependent sizes")
MASK = torch.tensor([True, False, True, True, False])


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    options = {"capture_dynamic_output_shape_ops": True, "capture_scalar_outputs": True}
    with torch._dynamo.config.patch(options):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "shapes",
    [
        ((5, 4), (4,)),
        # As many rows as columns; broadcast dimensions; no dimension of one operand alone.
        *(
            pytest.param(shapes, marks=slow)
            for shapes in (
                ((4, 4), (4,)),
                ((3, 5, 4), (1, 1, 4)),
                ((5, 1), (1, 4)),
                ((2, 3), (2, 3)),
            )
        ),
    ],
)
def test_any_size_of_a_maximum(shapes: Any) -> None:
    operator = OPERATORS["maximum"]
    samples = [tuple(normal(*shape, seed=i) for i, shape in enumerate(shapes))]
    table = check_operator(operator.overload, samples, reference=torch.maximum, rules=RULES)
    assert {row.outcome for row in table.rows} == {"works"}, str(table)


class Maximum(torch.nn.Module):
    def forward(self, x: Tensor, row: Tensor) -> Tensor:
        return torchpar.maximum(x, row)


@pytest.mark.parametrize("rows", [4, 5])
def test_one_exported_program_takes_any_rows(rows: int) -> None:
    row = normal(4, seed=1)
    program = torch.export.export(
        Maximum(), (normal(rows, 4), row), dynamic_shapes=({0: Dim("n", min=2, max=64)}, None)
    )
    decomposed = program.run_decompositions(decompose_custom_triton_ops=True)
    for each in (program, decomposed):
        for n in (3, 4, 7, 64):
            assert torch.equal(each.module()(normal(n, 4), row), torch.maximum(normal(n, 4), row))


@pytest.mark.parametrize("op", [torch.maximum, torchpar.maximum])
def test_one_graph_for_any_rows(op: Callable[..., Tensor]) -> None:
    counter, row = CompileCounterWithBackend("aot_eager"), normal(4, seed=1)
    compiled = torch.compile(lambda x: op(x, row), backend=counter, dynamic=True)
    for n in (3, 5, 4, 9):
        assert torch.equal(compiled(normal(n, 4)), torch.maximum(normal(n, 4), row))
    assert counter.frame_count == 1


@pytest.mark.parametrize("op", [torch.maximum, torchpar.maximum])
def test_rows_that_are_not_as_many_are_refused_when_the_graph_runs(op: Any) -> None:
    compiled = torch.compile(lambda x, mask, y: op(x[mask], y), backend="aot_eager", fullgraph=True)
    x, y = normal(5, 4), normal(3, 4, seed=1)
    assert torch.equal(compiled(x, MASK, y), torch.maximum(x[MASK], y))
    with pytest.raises(RuntimeError):
        compiled(x, ~MASK, y)


def check_compiled(function: Callable[..., Tensor], *leaves: Tensor) -> None:
    """Compare values and gradients of one graph with those of eager mode, for two masks."""
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for mask in (MASK, ~MASK):
        actual, expected = compiled(*leaves, mask), function(*leaves, mask)
        assert_close(actual, expected)
        incoming = normal(*expected.shape, seed=9)
        assert_close(*(torch.autograd.grad(y, leaves, incoming) for y in (actual, expected)))


TRANSFORMED = {
    "vmap over rows": lambda x, row, mask: vmap(torchpar.maximum, (0, None))(x[mask], row),
    "vmap of a column": lambda x, row, mask: vmap(lambda t: torchpar.maximum(t, row.sum()))(
        x[mask].mT
    ),
    "vmap(grad)": lambda x, row, mask: vmap(grad(lambda t: torchpar.maximum(t, row).pow(3).sum()))(
        x[mask]
    ),
    "linear_sigmoid, vmap over weights": lambda x, row, mask: vmap(torchpar.linear_sigmoid)(
        x[mask][:, None], row.expand(2, 4) * x[mask].sum(1)[:, None, None]
    ),
    "matmul_t, vmap": lambda x, row, mask: vmap(torchpar.matmul_t)((x[mask] * row)[:, :, None]),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[slow] * (name != "vmap(grad)")) for name in TRANSFORMED]
)
def test_transforms_of_rows_that_a_mask_chooses(name: str) -> None:
    leaves = normal(5, 4).requires_grad_(), normal(4, seed=1).requires_grad_()
    check_compiled(TRANSFORMED[name], *leaves)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[slow] * (name != "LinearMaxout"))
        for name in ("Linear", "LinearSigmoid", "LinearReLU", "LinearTanh", "LinearMaxout")
    ],
)
def test_a_layer_of_rows_that_a_mask_chooses(name: str) -> None:
    layer = getattr(torchpar.nn, name)(4, 3, dtype=torch.float64)
    check_compiled(lambda x, mask: layer(x[mask][:, None]), normal(5, 4).requires_grad_())


def test_a_gpu_computes_the_formula_of_data_dependent_sizes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether a gradient is a sum, and so its layout, is not known before the launch."""
    module = importlib.import_module("torchpar.ops.maximum")
    leaves = normal(5, 3, 4).requires_grad_(), normal(1, 1, 4, seed=1).requires_grad_()

    def gradients(op: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        compiled = torch.compile(
            lambda x, row, mask: op(x[mask], row), backend="aot_eager", fullgraph=True
        )
        y = compiled(*leaves, MASK)
        return torch.autograd.grad(y, leaves, normal(*y.shape, seed=9))

    expected = gradients(torch.maximum)
    monkeypatch.setattr(module, "runs_kernels", lambda *_: True)
    assert_close(gradients(torchpar.maximum), expected)
    monkeypatch.setattr(module, "has_unbacked_symbols", lambda *tensors: False)
    torch._dynamo.reset()
    with pytest.raises(Exception):  # noqa: B017, PT011  # of Triton, which finds no GPU here
        gradients(torchpar.maximum)


def test_a_result_of_data_dependent_sizes() -> None:
    def into(x: Tensor, mask: Tensor) -> Tensor:
        chosen, count = x[mask], mask.sum().item()
        out = x.new_empty(count, count)  # known to fit only when the graph runs
        return torchpar.symmetric_matmul(chosen, chosen, chosen @ chosen.mT, beta=1.0, out=out)

    compiled = torch.compile(into, backend="aot_eager", fullgraph=True)
    for mask in (MASK, ~MASK):
        assert_close(compiled(normal(5, 4), mask), into(normal(5, 4), mask))


def test_sizes_without_symbols_are_compared_as_numbers() -> None:
    assert are_alike((2, 3), torch.Size([2, 3]))
    assert not are_alike((2, 3), (2, 3, 1))
    assert not are_alike((2, 3), (2, 4))
