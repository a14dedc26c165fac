# SPDX-License-Identifier: MIT
"""Exact SGD: the steps, state and refusals of `torch.optim.SGD`, and the bits of any part."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from samples import normal
from torch import Tensor
from torch.testing import assert_close

from torchpar.exact import ExactSGD

TORCH = torch.optim.SGD
SHAPES = [(20, 30), (30,), (), (0, 3), (129, 1)]
ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.5, "weight_decay": 0.1, "nesterov": True},
]
STEPS = 4
# Each step rounds four products and three sums, and multiplies none of them again by more than 1. What it is
# compared with is rounded once, at the end.
ROUNDING = STEPS * (6 + 4) / 2 + 0.5


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        scale = torch.stack([t.detach().abs().max() for t in (b, *expected) if t.numel()]).max().item() + 1
        assert_close(a, b, rtol=0, atol=ROUNDING * torch.finfo(b.dtype).eps * scale)


def run(kind: Callable[..., Any], dtype: torch.dtype = torch.float32, **arguments: Any) -> list[Tensor]:
    """Parameters and momenta after some steps, in two groups of different values, under a schedule."""
    params = [normal(*shape, dtype=dtype, seed=i).requires_grad_() for i, shape in enumerate(SHAPES)]
    groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.01, "lr": 0.05}]
    optimizer = kind(groups, lr=0.1, **arguments)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(STEPS):
        for i, p in enumerate(params):
            p.grad = normal(*p.shape, dtype=p.dtype, seed=100 * step + i)
        if step == 1:
            params[0].grad = None
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    momenta = [state["momentum_buffer"] for state in optimizer.state.values() if state]
    assert len(momenta) == (len(params) if arguments.get("momentum") else 0)
    return params + momenta


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_steps_are_torchs_in_float64_rounded_at_the_end(arguments: dict[str, Any]) -> None:
    expected = [t.float() for t in run(TORCH, torch.float64, **arguments)]
    assert_same(run(ExactSGD, **arguments), expected)
    with pytest.raises(AssertionError):
        assert_same(run(ExactSGD, **{**arguments, "weight_decay": 0.11}), expected)


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_steps_of_parts_have_the_bits_of_the_whole(arguments: dict[str, Any]) -> None:
    whole, gradients = normal(37, 41, dtype=torch.float32), normal(STEPS, 37, 41, dtype=torch.float32, seed=1)

    def stepped(part: Callable[[Tensor], Tensor]) -> Tensor:
        p = part(whole.clone()).detach().requires_grad_()
        optimizer = ExactSGD([p], lr=0.1, **arguments)
        for gradient in gradients:
            p.grad = part(gradient)
            optimizer.step()
        return p.detach()

    expected = stepped(lambda t: t)
    parts: list[Callable[[Tensor], Tensor]] = [
        lambda t: t[3:4, 5:6].clone(),
        lambda t: t.T,
        lambda t: t.flatten()[1:],
    ]
    for part in parts:
        assert torch.equal(stepped(part), part(expected))


def test_a_closure_and_a_scaler_are_taken() -> None:
    p = torch.ones(3, requires_grad=True)
    optimizer = ExactSGD([p], lr=0.1)

    def closure() -> Tensor:
        loss = p.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 3
    assert_close(p, torch.full((3,), 0.8, requires_grad=True))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor in (1.0, float("inf"), 2.0):  # the second step is left out
        optimizer.zero_grad()
        scaler.scale((p * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert_close(p, torch.full((3,), 0.5, requires_grad=True))


P = torch.ones(3, requires_grad=True)
DAMPENED = TORCH([P], momentum=0.9, dampening=0.5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ExactSGD([P]).load_state_dict(DAMPENED.state_dict()), r"dampening is 0\.5, expected 0"),
        (lambda: ExactSGD([{"params": [P], "maximize": True}]), "maximize is True, expected 0"),
    ],
)
def test_refusals(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
