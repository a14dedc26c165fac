# SPDX-License-Identifier: MIT
"""SGD in one call, and exact SGD: the steps, state and hooks of `torch.optim.SGD`, and its private names."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from samples import LAYOUTS, normal
from torch import Tensor
from torch.optim import optimizer as torch_optimizer
from torch.testing import assert_close

from torchpar.optim import SGD, ExactSGD

SHAPES = [(20, 30), (30,), (), (0, 3), (129, 1)]
ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"weight_decay": 0.1},
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


# ExactSGD also rounds each of its four products, of which it multiplies none again by more than 1.
EXACT_ROUNDING = STEPS * (6 + 4) / 2


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_steps_are_torchs(arguments: dict[str, Any], dtype: torch.dtype) -> None:
    found = run(SGD, dtype, **arguments)
    assert_same(found, run(torch.optim.SGD, dtype, **arguments))
    assert all(torch.equal(a, b) for a, b in zip(found, run(SGD, dtype, **arguments), strict=True))
    with pytest.raises(AssertionError):
        assert_same(run(SGD, dtype, **{**arguments, "weight_decay": 0.11}), found)


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_exact_steps_are_torchs_in_float64(arguments: dict[str, Any]) -> None:
    """Which begin at the same numbers with the same gradients, and are rounded to float32 at the end."""
    expected = [t.float() for t in run(torch.optim.SGD, torch.float64, **arguments)]
    assert_same(run(ExactSGD, **arguments), expected, EXACT_ROUNDING + 0.5)
    others = run(ExactSGD, **{**arguments, "weight_decay": 0.11})
    with pytest.raises(AssertionError):
        assert_same(others, expected, EXACT_ROUNDING + 0.5)


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_exact_steps_of_parts_have_the_bits_of_the_whole(arguments: dict[str, Any]) -> None:
    """Parts of any length and alignment, as ranks hold them, of any layout."""
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
        lambda t: t[:, 7:],
        lambda t: t[1:36].contiguous(),
        lambda t: t.T,
        lambda t: t.flatten()[1:],
    ]
    for part in parts:
        assert torch.equal(stepped(part), part(expected))
    assert not torch.equal(stepped(lambda t: t[1:]), expected[:-1])


KINDS: list[tuple[Any, Any]] = [
    (SGD, torch.optim.SGD),
    (torch.optim.SGD, SGD),
    (SGD, SGD),
    (ExactSGD, torch.optim.SGD),
    (torch.optim.SGD, ExactSGD),
    (ExactSGD, SGD),
    (SGD, ExactSGD),
]


@pytest.mark.parametrize("kinds", KINDS)
def test_state_dicts_are_torchs(kinds: tuple[Any, Any]) -> None:
    results = []
    for pair in (kinds, (torch.optim.SGD, torch.optim.SGD)):
        params = parameters()
        optimizer = pair[0](params, lr=0.1, momentum=0.9, nesterov=True)
        for step in range(2):
            fill(params, step)
            optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer = pair[1](params, lr=0.3)
        optimizer.load_state_dict(saved)
        for step in range(2, STEPS):
            fill(params, step)
            optimizer.step()
        results.append(params)
    assert_same(*results, EXACT_ROUNDING if ExactSGD in kinds else ROUNDING)


def test_a_copy_steps_like_its_original() -> None:
    (p,) = params = [torch.ones(3, requires_grad=True)]
    optimizer = SGD(params, lr=0.1, momentum=0.9)
    fill(params, 0)
    optimizer.step()
    copied = copy.deepcopy(optimizer)
    (q,) = copied.param_groups[0]["params"]
    q.grad = p.grad.clone()
    copied.step()
    assert not torch.equal(p, q)
    optimizer.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize("kind", [SGD, ExactSGD])
@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_a_closure_is_called_with_gradients(rate: Any, kind: Any) -> None:
    p = torch.ones(3, requires_grad=True)
    optimizer = kind([p], lr=rate)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 3
    assert_close(p, torch.full((3,), 0.8, requires_grad=True))
    optimizer.zero_grad(set_to_none=False)
    assert torch.equal(p.grad, torch.zeros(3))
    optimizer.zero_grad()
    assert optimizer.step() is None


# PyTorch does not step a parameter whose elements share memory, and its call takes no negated tensor.
LAID_OUT = [
    (layout, of)
    for layout in LAYOUTS
    for of in ("parameter", "gradient", "both")
    if layout != "negated" and (of == "gradient" or "expanded" not in layout)
]


@pytest.mark.parametrize("layout, of", LAID_OUT)
def test_any_layout(layout: str, of: str) -> None:
    results = []
    for kind in (SGD, torch.optim.SGD):
        plain = LAYOUTS["contiguous"]
        p = (plain if of == "gradient" else LAYOUTS[layout])(normal(20, 30, dtype=torch.float32)).detach()
        gap = None if p._base is None else p._base
        optimizer = kind([p.requires_grad_()], lr=0.1, momentum=0.9)
        for step in range(2):
            p.grad = (plain if of == "parameter" else LAYOUTS[layout])(
                normal(20, 30, dtype=torch.float32, seed=step + 1)
            )
            optimizer.step()
        assert gap is None or layout != "stepped" or gap.isnan().sum() == gap.numel() - p.numel()
        results.append([p, optimizer.state[p]["momentum_buffer"]])
    assert_same(*results)


def test_momenta_of_another_layout_are_loaded() -> None:
    results = []
    for kind in (SGD, torch.optim.SGD):
        (p,) = params = [normal(30, 20, dtype=torch.float32).mT.requires_grad_()]
        optimizer = kind(params, lr=0.1, momentum=0.9)
        momentum = normal(30, 20, dtype=torch.float32, seed=7).mT
        optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: {"momentum_buffer": momentum}}})
        fill(params, 0)
        optimizer.step()
        results.append([p])
    assert_same(*results)


def test_scaled_gradients() -> None:
    """GradScaler leaves it to a fused optimizer to divide by the scale and to skip a step."""
    results = []
    for kind in (SGD, torch.optim.SGD):
        p = torch.zeros(3, requires_grad=True)
        optimizer, scaler = kind([p], lr=0.1, momentum=0.9), torch.amp.GradScaler("cpu", init_scale=4.0)
        for factor in (1.0, float("inf"), 2.0):
            scaler.scale((p * factor).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        results.append([p])
    assert_same(*results)


def test_refusals() -> None:
    p = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match=r"dampening is 0\.5, expected 0; take torch\.optim\.SGD"):
        SGD([{"params": [p], "dampening": 0.5}])
    other = torch.optim.SGD([p], momentum=0.9, dampening=0.5)
    with pytest.raises(ValueError, match=r"dampening is 0\.5, expected 0"):
        SGD([p], momentum=0.9).load_state_dict(other.state_dict())
    for optimizer, name in ((other, "dampening"), (torch.optim.SGD([p], maximize=True), "maximize")):
        with pytest.raises(ValueError, match=rf"{name} is .*, expected 0; take torch\.optim\.SGD"):
            ExactSGD([p]).load_state_dict(optimizer.state_dict())
        with pytest.raises(ValueError, match=f"{name} is .*, expected 0"):
            ExactSGD([{"params": [p], name: optimizer.param_groups[0][name]}])
    with pytest.raises(ValueError, match="Nesterov momentum requires a momentum"):
        SGD([p], nesterov=True)
    with pytest.raises(ValueError, match="Invalid learning rate"):
        SGD([p], lr=-1.0)


# Hooks and the profiler, and PyTorch's private names for them.


def own_hooks(optimizer: SGD, calls: list[str]) -> list[Any]:
    return [
        optimizer.register_step_pre_hook(lambda *_: calls.append("before")),
        optimizer.register_step_post_hook(lambda *_: calls.append("after")),
    ]


def global_hooks(optimizer: SGD, calls: list[str]) -> list[Any]:
    return [
        torch_optimizer.register_optimizer_step_pre_hook(lambda *_: calls.append("before")),
        torch_optimizer.register_optimizer_step_post_hook(lambda *_: calls.append("after")),
    ]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("register", [own_hooks, global_hooks])
def test_hooks_are_called(register: Any, which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    params = [torch.ones(3, requires_grad=True)]
    calls: list[str] = []
    optimizer = SGD(params, lr=0.1)
    fill(params, 0)
    call = torch._fused_sgd_
    monkeypatch.setattr(torch, "_fused_sgd_", lambda *a, **k: calls.append("step") or call(*a, **k))
    optimizer.step()
    handles = register(optimizer, calls)
    handles[1 - which].remove()  # either kind alone
    optimizer.step()
    handles[which].remove()
    optimizer.step()
    assert calls == [["step", "before", "step", "step"], ["step", "step", "after", "step"]][which]


def test_a_hook_may_replace_the_closure() -> None:
    p = torch.ones(3, requires_grad=True)
    optimizer = SGD([p], lr=0.1)
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, lambda: 7), {}))
    assert optimizer.step() == 7


def test_the_profiler_shows_a_step_as_torchs() -> None:
    shown = []
    for kind in (SGD, torch.optim.SGD):
        params = [torch.ones(3, requires_grad=True)]
        optimizer = kind(params, lr=0.1)
        fill(params, 0)
        assert not torch.autograd._profiler_enabled()
        with torch.profiler.profile() as profile:
            assert torch.autograd._profiler_enabled()
            optimizer.step()
        shown.append([event.key for event in profile.key_averages() if event.key.startswith("Optimizer.")])
    assert shown == [["Optimizer.step#SGD.step"]] * 2


def test_private_names_of_optimizers() -> None:
    """PyTorch wraps a step that has no `hooked` in `profile_hook_step`, which calls the hooks in these."""

    class Plain(torch.optim.Optimizer):
        def step(self) -> int:  # type: ignore[override]
            return 1

    class Hooked(Plain):
        def step(self) -> int:  # type: ignore[override]
            return 2

        step.hooked = True  # type: ignore[attr-defined]

    bare = Hooked.__dict__["step"]
    optimizers = [kind([torch.ones(1)], {}) for kind in (Plain, Hooked)]
    assert Plain.__dict__["step"].__wrapped__
    assert Hooked.__dict__["step"] is bare
    assert SGD.__dict__["step"].hooked
    assert not hasattr(SGD.__dict__["step"], "__wrapped__")
    assert torch.optim.Optimizer.profile_hook_step(bare)(optimizers[1]) == 2
    hooks = [lambda *_: None] * 4
    for optimizer in optimizers:
        handles = [
            optimizer.register_step_pre_hook(hooks[0]),
            optimizer.register_step_post_hook(hooks[1]),
            torch_optimizer.register_optimizer_step_pre_hook(hooks[2]),
            torch_optimizer.register_optimizer_step_post_hook(hooks[3]),
        ]
        registered = [
            optimizer._optimizer_step_pre_hooks,
            optimizer._optimizer_step_post_hooks,
            torch_optimizer._global_optimizer_pre_hooks,
            torch_optimizer._global_optimizer_post_hooks,
        ]
        assert [list(dictionary.values()) for dictionary in registered] == [[hook] for hook in hooks]
        for handle in handles:
            handle.remove()
        assert not any(registered)


def test_fused_sgd_updates_lists_of_tensors_in_place() -> None:
    p, g, m = (torch.tensor([value]) for value in (1.0, 2.0, 3.0))
    settings: dict[str, Any] = {"dampening": 0.0, "nesterov": True, "maximize": False, "is_first_step": False}
    torch._fused_sgd_([p], [g], [m], weight_decay=0.5, momentum=0.5, lr=0.1, **settings)
    # g + λ·p = 2.5, m = 0.5·3 + 2.5 = 4, p - 0.1·(2.5 + 0.5·4)
    assert_close((p, m), (torch.tensor([0.55]), torch.tensor([4.0])))


def test_exact_steps_take_gradients_that_a_scaler_has_unscaled():
    plain, scaled = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizers = ExactSGD([plain], lr=0.5), ExactSGD([scaled], lr=0.5)
    plain.sum().backward()
    scaler.scale(scaled.sum()).backward()
    optimizers[0].step()
    scaler.step(optimizers[1])
    assert torch.equal(plain, scaled)
