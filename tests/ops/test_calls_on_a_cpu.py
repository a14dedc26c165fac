# SPDX-License-Identifier: MIT
"""Calls of `torchpar.linear_sigmoid` that PyTorch's operators compute without the dispatcher."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import torchpar

module: Any = sys.modules["torchpar.ops.linear_sigmoid"]
OPERATOR = torch.ops.torchpar.linear_sigmoid


def operands(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = shape, (5, shape[-1]), (5,)
    return tuple(torch.randn(one, generator=generator, dtype=dtype) for one in shapes)  # type: ignore[return-value]


@pytest.mark.parametrize("shape", [(7, 3), (3,), (0, 3), (2, 4, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("biased", [True, False])
def test_a_call_has_the_values_and_gradients_of_the_operator(shape, dtype, biased):
    found = []
    for function in (torchpar.linear_sigmoid, OPERATOR):
        given = [t.requires_grad_() for t in operands(*shape, dtype=dtype)][: 2 + biased]
        y = function(*given)
        y.square().sum().backward()
        found.append([y, *(t.grad for t in given)])
    assert module._needs_no_dispatcher(*given, *[None] * (not biased))
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=0)


class Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **kwargs or {})


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **kwargs or {})


@contextmanager
def derived_by_others() -> Iterator[None]:
    with patch.object(module._op, "_decompose", None):
        yield


@pytest.mark.parametrize(
    "context",
    [
        lambda: torch.autocast("cpu"),
        torch.profiler.profile,
        Functions,
        Dispatched,
        derived_by_others,
        lambda: patch.object(module, "implementations", {module._KERNEL_OF_OTHERS}),
    ],
)
def test_what_is_to_see_the_operator_gets_it(context: Callable[[], Any]) -> None:
    given = operands(7, 3)
    assert module._needs_no_dispatcher(*given)
    with context():
        assert not module._needs_no_dispatcher(*given)


def test_transforms_and_compilers_get_the_operator():
    seen = []

    def call(x: Tensor, *others: Tensor) -> Tensor:
        seen.append(module._needs_no_dispatcher(x, *others))
        return torchpar.linear_sigmoid(x, *others)

    x, *others = operands(7, 3)
    torch.func.vmap(lambda x: call(x, *others))(x)
    torch.func.grad(lambda x: call(x, *others).sum())(x)
    assert seen == [False, False]
    graph = torch.fx.experimental.proxy_tensor.make_fx(torchpar.linear_sigmoid)(x, *others)
    assert OPERATOR.default in [node.target for node in graph.graph.nodes]


@pytest.mark.parametrize(
    "change",
    [
        lambda x, w, b: (x[0, 0], w, b),
        lambda x, w, b: (x[:, :2], w, b),
        lambda x, w, b: (x, w[0], b),
        lambda x, w, b: (x, w, b[:1]),
        lambda x, w, b: (x, w, b[None]),
        lambda x, w, b: (x.double(), w, b),
        lambda x, w, b: (x, w, b.double()),
        lambda x, w, b: (x.half(), w.half(), b.half()),
        lambda x, w, b: (x.int(), w.int(), b.int()),
        lambda x, w, b: (x.to_sparse(), w, b),
        lambda x, w, b: (x.to("meta"), w.to("meta"), b.to("meta")),
        lambda x, w, b: (torch.nested.nested_tensor([x, x]), w, b),
        lambda x, w, b: (None, w, b),
        lambda x, w, b: (x, None, b),
        lambda x, w, b: (x, w, 1.0),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_other_operands_get_the_operator_and_its_errors(change):
    given = change(*operands(7, 3))
    assert not module._needs_no_dispatcher(*given)
    assert said(torchpar.linear_sigmoid, given) == said(module._op, given)


def said(function: Callable[..., Tensor], given: tuple[Any, ...]) -> str:
    """The error of a call, or "" for a result."""
    try:
        function(*given)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
