# SPDX-License-Identifier: MIT
"""Tests of what PyTorch's `FlopCounterMode` counts of the operators, and of operators' formulas."""

import importlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import torchpar
from benchmarks.records import OPERATORS
from torchpar.library.tape import operators
from torchpar.nn import MLP
from torchpar.ops import cpu

OPS = torch.ops.torchpar


def counts(call: Callable[[], object]) -> dict[str, int]:
    """The operations of a call, by operator."""
    with FlopCounterMode(display=False) as counter:
        call()
    return {str(op): n for op, n in counter.get_flop_counts().get("Global", {}).items()}


def total(call: Callable[[], object]) -> int:
    return sum(counts(call).values())


def of(*shape: int, **options: Any) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).requires_grad_(**options)


@pytest.mark.parametrize("shape", [(7, 5), (5,), (2, 3, 5), (0, 5)], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_sigmoid_counts_as_pytorchs_product(shape, has_bias):
    x, weight, bias = of(*shape), of(4, 5), of(4) if has_bias else None
    expected = total(lambda: F.linear(x, weight, bias).sigmoid())
    backward = total(lambda: F.linear(x, weight, bias).sigmoid().sum().backward())
    for call in (torchpar.linear_sigmoid, OPS.linear_sigmoid):
        assert total(lambda: call(x, weight, bias)) == expected  # noqa: B023
        assert total(lambda: call(x, weight, bias).sum().backward()) == backward  # noqa: B023
    assert expected == 2 * x.numel() * 4


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_call_is_counted_once_in_each_grad_mode(mode):
    x, weight = of(7, 5), of(4, 5)
    calls: dict[str, tuple[Callable[[], object], int]] = {
        "linear_sigmoid": (lambda: torchpar.linear_sigmoid(x, weight), 2 * 7 * 5 * 4),
        "matmul_t": (lambda: torchpar.matmul_t(x), 2 * 7 * 7 * 5),
        "symmetric_matmul": (lambda: torchpar.symmetric_matmul(x, x), 2 * 7 * 7 * 5),
        "exact_matmul": (lambda: torchpar.exact_matmul(x, weight), 2 * 7 * 5 * 4),
        "maximum": (lambda: torchpar.maximum(x, x), 0),
    }
    with mode():
        for name, (call, expected) in calls.items():
            assert counts(call) == {f"torchpar.{name}": expected}


# The limits of blocks, and shapes beside them.
SHAPES = [(383, 128), (384, 127), (384, 128), (511, 100), (512, 100), (191, 2048), (192, 2048)]
SHAPES += [(0, 5), (1, 1), (129, 7), (640, 130), (1000, 129)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_half_a_product_counts_what_pytorchs_products_compute(shape, monkeypatch):
    monkeypatch.setattr(cpu, "takes_onednn", lambda t: False)  # whose blocks are larger
    x = of(*shape, requires_grad=False)  # of float32, which AMX does not multiply
    executed = total(lambda: cpu.symmetric_matmul(x, x))
    n, k = shape
    assert counts(lambda: torchpar.matmul_t(x)) == {"torchpar.matmul_t": executed}
    out = x.new_empty(n, n)
    assert total(lambda: torchpar.symmetric_matmul(x, x, alpha=2.0)) == executed
    assert total(lambda: torchpar.symmetric_matmul(x, x, out=out)) == executed
    assert n * (n + 1) * k <= executed <= 2 * n * n * k
    is_halved = shape in [(384, 128), (512, 100), (192, 2048), (640, 130), (1000, 129)]
    assert (executed < 2 * n * n * k) == is_halved
    if n % 128 == 0 and is_halved:
        assert executed == k * n * (n + 128)


def test_the_backward_passes_count_their_products():
    n, k = 7, 5
    x, y = of(n, k), of(n, k)
    assert counts(lambda: torchpar.matmul_t(x).sum().backward()) == {
        "torchpar.matmul_t": 2 * n * n * k,
        "torchpar.matmul_t_backward": 2 * n * n * k,
    }
    assert total(lambda: torchpar.symmetric_matmul(x, y).sum().backward()) == 3 * 2 * n * n * k
    assert total(lambda: torchpar.exact_matmul(x, y).sum().backward()) == 3 * 2 * n * n * k
    assert total(lambda: torchpar.maximum(x, y).sum().backward()) == 0
    with torchpar.fp32_products("tf32x3"):
        assert counts(lambda: torchpar.matmul_t(x)) == {"torchpar.matmul_t": 2 * n * n * k}


def test_an_mlp_counts_as_one_of_pytorchs_modules():
    for hidden, pieces in (("sigmoid", 1), ("relu", 1), ("tanh", 1), ("maxout", 2)):
        model, x = MLP([6, 5, 3], hidden), of(4, 6, requires_grad=False)
        forward = 2 * 4 * (6 * 5 * pieces + 5 * 3)
        assert total(lambda: model(x)) == forward  # noqa: B023
        backward = 2 * 4 * (6 * 5 * pieces + 2 * 5 * 3)  # no gradient of x
        assert total(lambda: model(x).sum().backward()) == forward + backward  # noqa: B023


def test_transforms_and_graphs_count_as_calls_do():
    x, weight = of(3, 7, 5, requires_grad=False), of(4, 5, requires_grad=False)
    batched = {"torchpar.matmul_t": 3 * 2 * 7 * 7 * 5}
    assert counts(lambda: torchpar.matmul_t(x)) == batched
    assert counts(lambda: torch.vmap(torchpar.matmul_t)(x)) == batched
    # The formula is evaluated in the operator's place, and counts once: forward and backward.
    gradient = torch.func.grad(lambda t: torchpar.matmul_t(t).sum())
    assert counts(lambda: gradient(x[0])) == {"aten.mm": 3 * 2 * 7 * 7 * 5}
    layer = torchpar.nn.LinearSigmoid(5, 4)
    expected = {"torchpar.linear_sigmoid": 2 * 7 * 5 * 4}
    exported = torch.export.export(layer, (x[0],))
    assert counts(lambda: exported.module()(x[0])) == expected
    assert counts(lambda: OPS.linear_sigmoid(x[0].to("meta"), weight.to("meta"))) == expected


def test_every_operator_has_a_formula():
    from torch.utils.flop_counter import flop_registry

    own = [name for name in operators if name.startswith("torchpar::")]
    packets = {getattr(OPS, name.partition("::")[2].partition(".")[0]) for name in own}
    assert {*OPERATORS} <= {str(packet).rpartition(".")[2] for packet in packets}
    assert packets <= flop_registry.keys()
    assert torch.ops.aten.relu not in flop_registry


def made(name: str, **options: Any) -> Any:
    def double(x: Tensor) -> Tensor:
        return 2 * x

    return torchpar.library.triton_op(f"torchpar_flops::{name}", double, mutates_args=(), **options)


def test_an_own_operator_takes_a_formula():
    x = torch.ones(3, 4)
    assert counts(lambda: made("none")(x)) == {}
    op = made("given", flops=lambda x_shape, *, out_shape: x_shape.numel() + out_shape[0])
    assert counts(lambda: op(x)) == {"torchpar_flops.given": 12 + 3}
    op.register_flops(lambda *shapes, **_: 7)
    assert counts(lambda: op(x)) == {"torchpar_flops.given": 7}
    again = made("given", flops=lambda *shapes, **_: 8)  # as in a notebook
    assert counts(lambda: again(x)) == {"torchpar_flops.given": 8}
    by_custom_op = torchpar.library.custom_op(
        "torchpar_flops::custom", lambda x: 2 * x, mutates_args=(), schema="(Tensor x) -> Tensor"
    )
    by_custom_op.register_flops(lambda *shapes, **_: 9)
    assert counts(lambda: by_custom_op(x)) == {"torchpar_flops.custom": 9}


def test_formulas_wait_for_the_import_of_the_counter(monkeypatch):
    """Importing the counter imports Triton, which an operator's definition must not do."""
    before = sys.modules["torch.utils.flop_counter"]
    monkeypatch.setattr(torch.utils, "flop_counter", before)
    monkeypatch.delitem(sys.modules, "torch.utils.flop_counter")
    finders = [*sys.meta_path]
    first, second = (made(name, flops=lambda *shapes, **_: 5) for name in ("first", "second"))
    assert "torch.utils.flop_counter" not in sys.modules
    (finder,) = [one for one in sys.meta_path if one not in finders]
    assert finder.find_spec("torch.utils.checkpoint", None) is None
    counter = importlib.import_module("torch.utils.flop_counter")
    assert counter is not before
    assert sys.meta_path == finders
    with counter.FlopCounterMode(display=False) as counted:
        first(torch.ones(3)), second(torch.ones(3))
    assert counted.get_total_flops() == 10
    assert torch.ops.torchpar_flops.first not in before.flop_registry
