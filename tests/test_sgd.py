# SPDX-License-Identifier: MIT
"""SGD in one call: the steps, state, hooks and refusals of `torch.optim.SGD`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from samples import LAYOUTS, normal
from torch import Tensor
from torch.optim import optimizer as torch_optimizer
from torch.testing import assert_close

from torchpar.optim import SGD

TORCH = torch.optim.SGD
SHAPES = [(20, 30), (30,), (), (0, 3), (129, 1)]
ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.5, "weight_decay": 0.1, "nesterov": True},
]
# Each step rounds an update at most thrice in either order of its three sums: 2·3·u of the largest term.
STEPS = 4
ROUNDING = STEPS * 6 / 2


def parameters(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [normal(*shape, dtype=dtype, seed=i).requires_grad_() for i, shape in enumerate(SHAPES)]


def fill(params: list[Tensor], step: int) -> None:
    for i, p in enumerate(params):
        p.grad = normal(*p.shape, dtype=p.dtype, seed=100 * step + i)


def assert_same(found: list[Tensor], expected: list[Tensor], rounding: float = ROUNDING) -> None:
    for a, b in zip(found, expected, strict=True):
        scale = torch.stack([t.detach().abs().max() for t in (b, *expected) if t.numel()]).max().item() + 1
        assert_close(a, b, rtol=0, atol=rounding * torch.finfo(b.dtype).eps * scale)


def run(kind: Callable[..., Any], dtype: torch.dtype = torch.float32, **arguments: Any) -> list[Tensor]:
    """Parameters and momenta after some steps, in two groups of different values, under a schedule."""
    params = parameters(dtype)
    groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.01, "lr": 0.05}]
    optimizer = kind(groups, lr=0.1, **arguments)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(STEPS):
        fill(params, step)
        if step == 1:
            params[0].grad = None
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        assert all(p.grad is None for p in params)
    momenta = [state["momentum_buffer"] for state in optimizer.state.values() if state]
    assert len(momenta) == (len(params) if arguments.get("momentum") else 0)
    return params + momenta


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_steps_are_torchs(arguments: dict[str, Any]) -> None:
    for dtype in (torch.float32, torch.float64):
        found = run(SGD, dtype, **arguments)
        assert_same(found, run(TORCH, dtype, **arguments))
        assert all(torch.equal(a, b) for a, b in zip(found, run(SGD, dtype, **arguments), strict=True))
        with pytest.raises(AssertionError):
            assert_same(run(SGD, dtype, **{**arguments, "weight_decay": 0.11}), found)


def test_a_closure_is_called_with_gradients() -> None:
    for kind, rate in ((SGD, torch.tensor(0.1)), (SGD, 0.1)):
        p = torch.ones(3, requires_grad=True)
        optimizer = kind([p], lr=rate)

        def closure(p: Tensor = p) -> Tensor:
            loss = p.square().sum()
            loss.backward()
            return loss

        with torch.no_grad():
            assert optimizer.step(closure).item() == 3
        assert_close(p, torch.full((3,), 0.8, requires_grad=True))
        optimizer.zero_grad(set_to_none=False)
        assert torch.equal(p.grad, torch.zeros(3))
        assert optimizer.step() is None


# PyTorch does not step a parameter whose elements share memory, and its call takes no negated tensor.
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "negated"])
def test_any_layout(layout: str) -> None:
    results = []
    laid_out, plain = LAYOUTS[layout], LAYOUTS["contiguous"]
    for kind in (SGD, TORCH):
        p = (plain if "expanded" in layout else laid_out)(normal(20, 30, dtype=torch.float32)).detach()
        optimizer = kind([p.requires_grad_()], lr=0.1, momentum=0.9)
        momentum = (laid_out if kind is SGD else plain)(laid_out(normal(20, 30, dtype=torch.float32, seed=7)))
        optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: {"momentum_buffer": momentum}}})
        for step in range(2):
            p.grad = laid_out(normal(20, 30, dtype=torch.float32, seed=step))
            optimizer.step()
        results.append([p, optimizer.state[p]["momentum_buffer"]])
    assert_same(*results)


def test_scaled_gradients() -> None:
    """GradScaler leaves it to SGD to divide by the scale and to skip a step."""
    results = []
    for kind in (TORCH, SGD):
        p = torch.zeros(3, requires_grad=True)
        optimizer, scaler = kind([p], lr=0.1, momentum=0.9), torch.amp.GradScaler("cpu", init_scale=4.0)
        for factor in (1.0, float("inf"), 2.0):
            scaler.scale((p * factor).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        results.append([p])
    assert_same(*results)


P = torch.ones(3, requires_grad=True)
DAMPENED = TORCH([P], momentum=0.9, dampening=0.5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: SGD([{"params": [P], "dampening": 0.5}]), r"dampening is 0\.5, expected 0; take torch"),
        (lambda: SGD([P]).load_state_dict(DAMPENED.state_dict()), r"dampening is 0\.5, expected 0"),
    ],
)
def test_refusals(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_hooks_and_the_profiler_see_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [torch.ones(3, requires_grad=True)]
    calls: list[str] = []
    optimizer = SGD(params, lr=0.1)
    fill(params, 0)
    call = torch._fused_sgd_
    monkeypatch.setattr(torch, "_fused_sgd_", lambda *a, **k: calls.append("step") or call(*a, **k))
    for register, expected in (
        (optimizer.register_step_pre_hook, ["hook", "step"]),
        (optimizer.register_step_post_hook, ["step", "hook"]),
        (torch_optimizer.register_optimizer_step_pre_hook, ["hook", "step"]),
        (torch_optimizer.register_optimizer_step_post_hook, ["step", "hook"]),
    ):
        calls.clear()
        handle = register(lambda *_: calls.append("hook"))
        optimizer.step()
        handle.remove()
        assert calls == expected
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert "Optimizer.step#SGD.step" in [event.key for event in profile.key_averages()]
