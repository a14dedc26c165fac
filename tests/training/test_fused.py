# SPDX-License-Identifier: MIT
"""Gradients of an MLP by hand equal autograd's in every dtype; a reason says where they cannot.

`test_training` compares whole runs, on one and on several ranks.
"""

from typing import Any

import pytest
import torch
from samples import assert_accurate, bits, halves, normal, to_numpy
from torch import Tensor
from torch.nn.functional import cross_entropy

from torchpar.errors import ConfigError
from torchpar.nn import MLP, Linear, LinearSigmoid
from torchpar.training.fused import FusedGradients, why_not_fused


def make(
    sizes: tuple[int, ...], dtype: torch.dtype = torch.float32, hidden: Any = "sigmoid"
) -> MLP:
    torch.manual_seed(0)
    model = MLP(sizes, hidden, dtype=dtype)
    for layer in model.layers:  # biases begin at 0, with which a lost one would not be seen
        torch.nn.init.normal_(layer.bias)
    return model


def batch(
    b: int, sizes: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return normal(b, sizes[0], dtype=dtype), torch.randint(sizes[-1], (b,), generator=generator)


def by_autograd(
    model: MLP, x: Tensor, labels: Tensor, global_size: int, smoothing: float = 0.0
) -> Tensor:
    outputs = model(x)
    outputs = outputs.float() if outputs.dtype.itemsize == 2 else outputs  # as under autocast
    loss = cross_entropy(outputs, labels, reduction="sum", label_smoothing=smoothing)
    (loss / global_size).backward()
    return loss.detach()


def by_rounded_logits(
    model: MLP, x: Tensor, labels: Tensor, smoothing: float, dtype: torch.dtype
) -> float:
    """The most by which the sum of losses changes if the logits are stored in ``dtype``, to first
    order."""
    logits = model(x).detach().requires_grad_()
    loss = cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    (gradient,) = torch.autograd.grad(loss, logits)
    return float((gradient * logits.detach()).abs().sum()) * torch.finfo(dtype).eps / 2


def gradients(model: MLP) -> list[Tensor]:
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("hidden", ["sigmoid", "tanh", "relu"])
@pytest.mark.parametrize(
    "sizes, b, smoothing, dtype",
    [
        ((5, 3), 1, 0.0, torch.float32),
        ((127, 1), 129, 0.1, torch.float32),
        ((33, 17, 10), 0, 0.0, torch.float32),
        ((65, 127, 129, 10), 128, 1.0, torch.float32),
        ((784, 512, 10), 128, 0.0, torch.float32),  # layers that oneDNN takes where it is used
        ((20, 16, 16), 300, 0.1, torch.float32),  # the most classes in columns
        ((20, 16, 1000), 300, 0.1, torch.float32),
        ((129, 127, 10), 64, 0.1, torch.bfloat16),
        ((20, 16, 17), 300, 0.1, torch.float16),
        ((20, 16, 16), 300, 0.0, torch.float64),
    ],
    ids=str,
)
def test_gradients_are_as_accurate_as_autograds(sizes, b, smoothing, dtype, hidden):
    """Loss and accumulated gradients have at most twice the error of autograd's, both against
    float64."""
    fused, plain, exact = (make(sizes, dtype, hidden) for _ in range(3))
    exact.double()
    x, labels = batch(b, sizes, dtype)
    compute = FusedGradients(fused, label_smoothing=smoothing)
    for global_size in (b + 1, b + 2, b + 1):
        loss = compute(x, labels, global_size)
        expected = by_autograd(plain, x, labels, global_size, smoothing)
        ideal = by_autograd(exact, x.double(), labels, global_size, smoothing)
    # z + b, the sigmoid's or tanh's 3, the derivative's 3 for each hidden layer. The softmax: z +
    # b, z - max, exp, sum, log, their difference, exp; minus targets, over N. Two sums over the
    # calls.
    roundings = 11 + 7 * (len(sizes) - 2)
    # The loss is a float32 number of logits that may be stored in 16 bits.
    stored = (
        by_rounded_logits(exact, x.double(), labels, smoothing, dtype)
        if dtype.itemsize == 2
        else 0.0
    )
    assert_accurate(loss, expected, to_numpy(ideal), roundings, stored)
    for a, n, e in zip(gradients(fused), gradients(plain), gradients(exact), strict=True):
        assert_accurate(a, n, to_numpy(e), roundings)
    for a, n in zip([loss, *gradients(fused)], [expected, *gradients(plain)], strict=True):
        assert (a.shape, a.dtype, a.stride()) == (n.shape, n.dtype, n.stride())


def test_a_relu_at_exactly_0_has_no_gradient_by_hand_and_by_autograd() -> None:
    fused, plain = MLP((3, 4, 2), "relu"), MLP((3, 4, 2), "relu")
    x, labels = torch.zeros(2, 3), torch.tensor([1, 1])  # the biases are 0, and so is each sum
    FusedGradients(fused)(x, labels, 3)
    by_autograd(plain, x, labels, 3)
    for model in (fused, plain):
        assert not model.layers[0].bias.grad.any()
        assert model.layers[1].bias.grad.any()


def share(model: MLP) -> None:
    model.layers[2].weight, model.layers[2].bias = model.layers[1].weight, model.layers[1].bias


def replace(model: MLP) -> None:
    model.load_state_dict({name: t / 2 for name, t in model.state_dict().items()}, assign=True)


@pytest.mark.parametrize("change", [share, replace])
def test_parameters_that_are_shared_or_replaced_afterwards_are_trained(change: Any) -> None:
    fused, plain = (make((5, 4, 4, 4, 3), torch.float64) for _ in range(2))
    before = FusedGradients(fused)
    for model in (fused, plain):
        change(model)
    x, labels = batch(6, (5, 3), torch.float64)
    for compute in (before, FusedGradients(fused)):
        compute(x, labels, 6)
        by_autograd(plain, x, labels, 6)
    torch.testing.assert_close(gradients(fused), gradients(plain))


@pytest.mark.parametrize("hidden", ["sigmoid", "tanh", "relu"])
@pytest.mark.parametrize("stored, products", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_products_of_another_dtype(stored: str, products: str, hidden: str) -> None:
    """The gradients have the bits of a model of that dtype, under autocast too, and the parameters'
    dtype."""
    sizes, computed = (33, 17, 10), getattr(torch, products)
    mixed, other = (make(sizes, getattr(torch, stored), hidden) for _ in range(2))
    x, labels = batch(20, sizes)
    with torch.autocast("cpu", torch.bfloat16):
        loss = FusedGradients(mixed, label_smoothing=0.1, dtype=computed)(x, labels, 21)
    expected = FusedGradients(other.to(computed), label_smoothing=0.1)(x, labels, 21)
    assert torch.equal(bits(loss), bits(expected))
    for a, e in zip(gradients(mixed), gradients(other), strict=True):
        assert torch.equal(bits(a), bits(e.to(getattr(torch, stored))))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38, -1e30])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_logits_that_are_not_finite_or_huge(value: float, smoothing: float) -> None:
    fused, plain = make((3, 4)), make((3, 4))
    x, labels = halves(5, 3, dtype=torch.float32), torch.tensor([0, 1, 2, 3, 1])
    for model in (fused, plain):
        model.layers[0].bias.data[1] = value
    loss = FusedGradients(fused, label_smoothing=smoothing)(x, labels, 5)
    expected = by_autograd(plain, x, labels, 5, smoothing)
    torch.testing.assert_close(
        [loss, *gradients(fused)], [expected, *gradients(plain)], equal_nan=True
    )


NOT_ORDINARY = "a weight or a bias is not an ordinary parameter, or needs no gradient"
SAME_NAME = type("LinearSigmoid", (LinearSigmoid,), {})
REPLACED = "the model's forward has been replaced or compiled"
CHANGES = [
    (lambda model: model.layers[0].register_forward_hook(print), "the model has hooks"),
    (lambda model: model.register_full_backward_hook(print), "the model has hooks"),
    (
        lambda model: model.layers[0].bias.register_post_accumulate_grad_hook(print),
        "the model has hooks",
    ),
    (lambda model: model.layers[1].bias.requires_grad_(False), NOT_ORDINARY),
    (lambda model: setattr(model.layers[0], "bias", None), NOT_ORDINARY),
    (lambda model: setattr(model.layers[0], "forward", print), REPLACED),
    (lambda model: model.compile(), REPLACED),
    (
        lambda model: model.layers.__setitem__(0, Linear(4, 3)),
        "a layer of the model has been replaced",
    ),
    (
        lambda model: model.layers.__setitem__(1, Linear(3, 5)),
        "a layer of the model has been replaced",
    ),
    (lambda model: model.layers.append(torch.nn.ReLU()), "a layer of the model has been replaced"),
    (
        lambda model: setattr(model.layers[0], "__class__", SAME_NAME),
        "a layer of the model has been replaced",
    ),
    (
        lambda model: setattr(model, "__class__", type("Subclass", (MLP,), {})),
        "the model is a Subclass",
    ),
    (lambda model: torch.nn.Linear(4, 3), "the model is a Linear, not a torchpar.nn.MLP"),
    (lambda model: MLP((4, 1001)), "the model has 1001 classes, not 1 to 1000"),
    (lambda model: MLP((4, 3, 2), output="sigmoid"), "the model has sigmoid outputs, not logits"),
    (
        lambda model: MLP((4, 3, 2), "maxout"),
        "the model has maxout layers, not one of sigmoid, tanh, relu",
    ),
]


@pytest.mark.parametrize("change, reason", CHANGES)
def test_other_models_are_refused(change: Any, reason: str) -> None:
    model = MLP((4, 3, 2))
    assert why_not_fused(model) == ""
    made = change(model)
    model = made if isinstance(made, MLP | torch.nn.Linear) else model
    assert reason in why_not_fused(model)
    with pytest.raises(
        ConfigError, match=rf"gradients cannot be fused: .*{reason}.*; take autograd"
    ):
        FusedGradients(model)


def test_a_smoothing_out_of_range_is_refused() -> None:
    for value in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match=r"label_smoothing is .*, expected 0 to 1"):
            FusedGradients(MLP((4, 3, 2)), label_smoothing=value)
