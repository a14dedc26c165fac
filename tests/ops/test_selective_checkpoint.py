# SPDX-License-Identifier: MIT
"""Selective checkpoints of layers and operators: what a policy names is saved, and all is right."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from samples import normal
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import torchpar

aten, ours = torch.ops.aten, torch.ops.torchpar
LAYERS: dict[str, Callable[[], nn.Module]] = {
    **{
        name: partial(getattr(torchpar.nn, name), 4, 4, dtype=torch.float64)
        for name in ("Linear", "LinearSigmoid", "LinearReLU", "LinearTanh", "LinearMaxout")
    },
    "MLP": partial(torchpar.nn.MLP, [4, 6, 4], output="sigmoid", dtype=torch.float64),
}
X, W, B = normal(5, 4), normal(3, 4, seed=1), normal(3, seed=2)
# By the operator: a function that calls it, and its operands.
OPERATORS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "maximum": (torchpar.maximum, (X, normal(4, seed=1))),
    "matmul_t": (torchpar.matmul_t, (X,)),
    "symmetric_matmul": (lambda x: torchpar.symmetric_matmul(x, 2 * x), (X,)),
    "linear_sigmoid": (torchpar.linear_sigmoid, (X, W, B)),
    "exact_matmul": (torchpar.exact_matmul, (X.float(), W.float())),
}
SAVED: dict[str, Any] = {
    "products": [aten.addmm.default, aten.mm.default, aten.bmm.default, aten.baddbmm.default],
    "operators": [getattr(ours, name).default for name in OPERATORS],
    "packets": [getattr(ours, name) for name in OPERATORS],
    "everything": None,
}


def computed(
    function: Callable[..., Tensor],
    operands: Sequence[Tensor],
    saved: Sequence[Any] | None,
    incoming: Tensor | None = None,
) -> tuple[list[tuple[Tensor, ...]], set[Any]]:
    """The value and the gradients without a checkpoint, and with one; what its policy has saved."""
    chosen = set()

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if saved is None or op in saved or op.overloadpacket in saved:
            chosen.add(op)
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    leaves = [t.clone().requires_grad_() for t in operands]
    found = []
    for call in (
        function,
        partial(
            checkpoint,
            function,
            use_reentrant=False,
            context_fn=partial(create_selective_checkpoint_contexts, policy),
        ),
    ):
        y = call(*leaves)
        g = normal(*y.shape, seed=9).to(y) if incoming is None else incoming
        found.append((y, *torch.autograd.grad(y, leaves, g)))
    return found, chosen


def check(
    function: Callable[..., Tensor], operands: Sequence[Tensor], saved: Sequence[Any] | None
) -> set[Any]:
    """Compare a checkpoint's gradients with those without one; return what the policy has saved."""
    (plain, kept), chosen = computed(function, operands, saved)
    assert_close(kept, plain)
    return chosen


@pytest.mark.parametrize("shape", [(5, 4), (2, 5, 4)], ids=str)
@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer(name: str, saved: str, shape: tuple[int, ...]) -> None:
    chosen = check(LAYERS[name](), [normal(*shape)], SAVED[saved])
    if name == "LinearSigmoid" and saved != "products":
        assert ours.linear_sigmoid.default in chosen
    if name not in ("LinearSigmoid", "MLP") and saved == "products":
        assert aten.addmm.default in chosen or len(shape) > 2


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_is_what_a_policy_sees(name: str, saved: str) -> None:
    function, operands = OPERATORS[name]
    chosen = check(function, operands, SAVED[saved])
    assert (getattr(ours, name).default in chosen) == (saved != "products")
    assert not chosen & {*SAVED["products"]}


@pytest.mark.parametrize("saved", SAVED)
def test_weights_of_each_sample(saved: str) -> None:
    """vmap multiplies by PyTorch's operators."""
    operands = normal(2, 5, 4), normal(2, 3, 4, seed=1), normal(2, 3, seed=2)
    chosen = check(torch.vmap(torchpar.linear_sigmoid), operands, SAVED[saved])
    assert (aten.baddbmm.default in chosen) == (saved in ("products", "everything"))


@pytest.mark.parametrize("saved", SAVED)
def test_exact_arithmetic(saved: str) -> None:
    """The mode has rules for PyTorch's operators alone, which a policy then sees."""
    layer, x, incoming = torchpar.nn.LinearSigmoid(4, 4), X.float(), normal(5, 4, seed=9).float()
    with torchpar.exact.mode():
        (plain, kept), chosen = computed(layer, [x], SAVED[saved], incoming)
    assert all(map(torch.equal, plain, kept))
    assert (aten.addmm.default in chosen) == (saved in ("products", "everything"))


def test_a_layer_that_writes_to_what_was_saved_is_refused() -> None:
    weight = normal(4, 4, seed=1)
    with pytest.raises(RuntimeError, match="has been mutated"):
        check(lambda x: F.linear(x, weight).sigmoid_(), [X], SAVED["products"])
