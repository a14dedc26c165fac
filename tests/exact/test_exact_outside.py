# SPDX-License-Identifier: MIT
"""Around torchpar.exact.mode: what autograd calls again, loaders' workers, later arithmetic."""

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from architectures import make_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.data import DataLoader, Dataset

from torchpar import exact
from torchpar.errors import ConfigError
from torchpar.exact import dispatch, watch

slow = pytest.mark.slow

# Functions that the backward pass calls again

MASK = torch.ones(9, 9, dtype=torch.bool).tril()
Function = Callable[..., Tensor]


def attention(q: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, q, q, **options)


def with_layer(layer: Callable[[], nn.Module], *shape: int) -> Callable[[], tuple[Function, Any]]:
    """A layer that is made in the mode, and its input."""
    return lambda: (layer(), torch.randn(*shape))


class SelfAttention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x, x, need_weights=False, attn_mask=~MASK)[0]


class Biased(nn.Module):
    """Attention whose mask is learnt, one for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(4, 9, 9))

    def forward(self, q: Tensor) -> Tensor:
        return attention(q, attn_mask=self.bias)


FUNCTIONS: dict[str, Callable[[], tuple[Function, Tensor]]] = {
    "group norm": with_layer(partial(nn.GroupNorm, 2, 4), 3, 4, 8, 8),
    "causal": lambda: (partial(attention, is_causal=True), torch.randn(2, 4, 9, 8)),
    "mask": lambda: (partial(attention, attn_mask=MASK), torch.randn(2, 4, 9, 8)),
    "three dimensions": lambda: (attention, torch.randn(4, 9, 8)),
    "grouped queries": lambda: (
        lambda q: F.scaled_dot_product_attention(q, q[:, :2], q[:, :2], enable_gqa=True),
        torch.randn(2, 4, 9, 8),
    ),
    "learnt mask": with_layer(Biased, 2, 4, 9, 8),
    "multi-head attention": with_layer(partial(SelfAttention, 8, 2, batch_first=True), 2, 9, 8),
}


def selected() -> Any:
    """Save the products of matrices, and compute everything else again."""

    def policy(context: Any, op: Any, *args: object, **options: object) -> CheckpointPolicy:
        saves = "mm" in str(op)
        return CheckpointPolicy.MUST_SAVE if saves else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


class CalledAgain(torch.autograd.Function):
    """A checkpoint by hand."""

    @staticmethod
    def forward(ctx: Any, function: Function, x: Tensor, *_: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(x)
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor | None, ...]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        function = ctx.function
        own = list(function.parameters()) if isinstance(function, nn.Module) else []
        with torch.enable_grad():
            return None, *torch.autograd.grad(function(x), [x, *own], g)


def by_hand(function: Function, x: Tensor) -> Tensor:
    own = list(function.parameters()) if isinstance(function, nn.Module) else []
    return CalledAgain.apply(function, x, *own)


WAYS: dict[str, Callable[[Function, Tensor], Tensor]] = {
    "not reentrant": partial(checkpoint, use_reentrant=False),
    "reentrant": partial(checkpoint, use_reentrant=True),
    "selective": partial(checkpoint, use_reentrant=False, context_fn=selected),
    "by hand": by_hand,
}


def slopes(name: str, way: Callable[[Function, Tensor], Tensor], by_grad: bool) -> list[Tensor]:
    """The gradients of a function's parameters and of its input."""
    torch.manual_seed(0)
    function, x = FUNCTIONS[name]()
    x.requires_grad_()
    own = list(function.parameters()) if isinstance(function, nn.Module) else []
    loss = way(function, x).square().sum()
    if by_grad:
        return list(torch.autograd.grad(loss, [x, *own]))
    loss.backward()
    return [t.grad for t in (x, *own)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_computed_again_has_the_same_bits(name):
    with exact.mode():
        expected = slopes(name, lambda function, x: function(x), by_grad=False)
        for way, compute in WAYS.items():
            for by_grad in (False, True):
                if by_grad and way == "reentrant":  # which PyTorch refuses
                    continue
                found = slopes(name, compute, by_grad)
                assert all(map(torch.equal, found, expected)), (way, by_grad)


@pytest.mark.parametrize("name", ["group norm", "mask"])
def test_a_backward_pass_without_the_functions_is_noticed(monkeypatch, name):
    monkeypatch.setattr(dispatch, "within", lambda mode: {})
    with pytest.raises((AssertionError, RuntimeError)):
        test_what_is_computed_again_has_the_same_bits(name)


def test_a_mask_that_needs_a_gradient_changes_no_bit_and_gets_pytorchs_gradient():
    with exact.mode():
        torch.manual_seed(0)
        function, q = Biased(), torch.randn(2, 4, 9, 8)
        with torch.no_grad():
            expected = attention(q, attn_mask=function.bias.detach())
        y = function(q)
        assert torch.equal(y, expected)
        found = torch.autograd.grad(y.square().sum(), function.bias)[0]
        second = torch.autograd.grad(function(q).square().sum(), function.bias, create_graph=True)[
            0
        ]
        assert second.requires_grad
    wide, q = copy.deepcopy(function).double(), q.double()
    ideal = torch.autograd.grad(wide(q).square().sum(), wide.bias)[0]
    torchs, q = copy.deepcopy(function), q.float()
    native = torch.autograd.grad(torchs(q).square().sum(), torchs.bias)[0]
    for one in (found, second.detach().clone()):
        assert (one.double() - ideal).abs().max() <= 2 * (native - ideal).abs().max()


def test_hooks_and_second_derivatives_are_in_the_mode():
    """Of a hook the gradient, and of a penalty on a gradient the slope, are those of the parts."""

    def normed(x: Tensor) -> Tensor:
        return F.group_norm(x, 2)

    with exact.mode():
        g, x = torch.randn(3, 4, 8), torch.randn(3, 4, 8, requires_grad=True)
        hooked = x.clone()
        hooked.register_hook(normed)
        hooked.backward(g)
        assert torch.equal(x.grad, normed(g))

        def penalty(function: Function) -> Tensor:
            slope = torch.autograd.grad(function(x).pow(3).sum(), x, create_graph=True)[0]
            return torch.autograd.grad(slope.square().sum(), x)[0]

        again = partial(checkpoint, normed, use_reentrant=False)
        assert torch.equal(penalty(again), penalty(normed))


def test_other_function_modes_see_the_backward_pass():
    """Below the mode, and above it."""
    seen = []

    class Other(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func.__name__)
            return func(*args, **kwargs or {})

    for outer, inner in ((Other, exact.mode), (exact.mode, Other)):
        with outer(), inner():
            found = slopes("group norm", WAYS["not reentrant"], by_grad=False)
        with exact.mode():
            expected = slopes("group norm", lambda function, x: function(x), by_grad=False)
        assert all(map(torch.equal, found, expected))
        assert "backward" in seen
        seen.clear()


def enable(model: Any) -> Callable[[dict[str, bool]], None]:
    """The method that turns a model's checkpoints on, whose name transformers changed."""
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    return next(getattr(model, name) for name in names if hasattr(model, name))


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        *(pytest.param(name, marks=slow) for name in ("gpt2", "bert", "opt", "t5", "modernbert")),
    ],
)
def test_whole_models_with_checkpoints_have_the_same_bits(name):
    """Sequences of different lengths, padded."""
    with exact.mode():
        torch.manual_seed(0)
        model: Any = make_model(name)
        text, mask = torch.randint(3, 96, (2, 8)), torch.ones(2, 8, dtype=torch.long)
        mask[1, 5:] = 0

        def gradients() -> dict[str, Tensor]:
            model.zero_grad()
            torch.manual_seed(1)  # of dropout
            model(input_ids=text, attention_mask=mask, labels=text).loss.backward()
            return {name: p.grad.clone() for name, p in model.named_parameters()}

        expected = gradients()
        # A reentrant one adds three gradients in another order, as of the output of T5's encoder.
        for use_reentrant in (False, True)[: 1 if name == "t5" else 2]:
            enable(model)({"use_reentrant": use_reentrant})
            found = gradients()
            assert [name for name, t in found.items() if not torch.equal(t, expected[name])] == []


# Workers


class Drawn(Dataset[Tensor]):
    """Random rows whose standard deviation differs between processors."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> Tensor:
        x = torch.randn(64)
        return (x - x.mean()) / x.std()


def seeded(worker: int) -> None:
    torch.manual_seed(worker)


def drawn(workers: int, **options: Any) -> Tensor:
    torch.manual_seed(1)
    return torch.cat(list(DataLoader(Drawn(), 2, num_workers=workers, **options)))


@pytest.mark.parametrize(
    "start, workers", [("forkserver", 2), pytest.param("spawn", 1, marks=slow)]
)
def test_workers_are_in_the_mode(fork_server, start, workers):
    """Those of another process, too, with and without a function of the loader's own."""
    with exact.mode():
        expected = drawn(workers, multiprocessing_context=get_context("fork"))
        found = drawn(workers, multiprocessing_context=get_context(start))
    ordinary = drawn(workers, multiprocessing_context=get_context("fork"))
    assert not torch.equal(ordinary, expected)
    assert torch.equal(found, expected)
    if start == "spawn":  # each process imports PyTorch again
        return
    with exact.mode():
        found = drawn(workers, multiprocessing_context=get_context(start), worker_init_fn=seeded)
    assert found.shape == expected.shape
    assert not torch.equal(found, expected)  # the function was called


def test_workers_that_began_outside_are_refused():
    loader = DataLoader(Drawn(), 4, num_workers=1, persistent_workers=True)
    next(iter(loader))
    with exact.mode(), pytest.raises(ConfigError, match=r"persistent workers .* outside"):
        next(iter(loader))
    assert DataLoader.__iter__.__module__ == "torch.utils.data.dataloader"


def test_another_replacement_of_the_loaders_method_stays(monkeypatch):
    monkeypatch.setattr(DataLoader, "__iter__", DataLoader.__iter__)  # which restores it
    with exact.mode():
        iterate = DataLoader.__iter__
        other = DataLoader.__iter__ = lambda self: iterate(self)
    assert DataLoader.__iter__ is other
    assert len(list(DataLoader(Drawn(), 4))) == 2


# Arithmetic outside


@pytest.fixture
def trained() -> Iterator[tuple[nn.Module, Tensor, Tensor, torch.optim.Optimizer]]:
    with exact.mode():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 2))
        optimizer = torch.optim.SGD(model.parameters(), foreach=False)
        x = torch.rand(3, 4)
        model(x).square().mean().backward()
        optimizer.step()
        loss = model(x).square().mean()
    return model, x, loss, optimizer


USES: dict[str, Callable[[Any, Any, Any, Any], object]] = {
    "pow": lambda model, x, loss, optimizer: loss.backward(),
    "add_": lambda model, x, loss, optimizer: optimizer.step(),
    "addmm": lambda model, x, loss, optimizer: model(torch.ones(3, 4)),
    "sum": lambda model, x, loss, optimizer: x.sum(),
    "mm": lambda model, x, loss, optimizer: torch.ones(2, 3).mm(x),
    "mul": lambda model, x, loss, optimizer: torch._foreach_mul([torch.ones(4), x[0]], 2.0),
    "norm": lambda model, x, loss, optimizer: nn.utils.clip_grad_norm_(
        model.parameters(), 1.0, foreach=False
    ),
    "add": lambda model, x, loss, optimizer: torch.add(x, x, alpha=0.3),
}


@pytest.mark.parametrize("operator", USES)
def test_arithmetic_outside_is_warned_of_at_its_line(trained, operator):
    use = USES[operator]
    with pytest.warns(UserWarning, match=rf"aten\.\w*{operator}\w*\.\w+ outside of ") as caught:
        use(*trained)
    first, (_, line) = caught[0], inspect.getsourcelines(use)
    assert first.filename == __file__
    assert line <= first.lineno <= line + 2
    refused = {"pow": "second time"}.get(operator)
    error = pytest.raises((ConfigError, RuntimeError), match=refused)
    with error if refused else nullcontext(), exact.mode():  # where the line is right, or refused
        use(*trained)


def test_what_has_the_same_bits_everywhere_is_not_warned_of(trained):
    model, x, _, _ = trained
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.cat([x * 2, x + x, x - 1]).relu()
        assert torch.equal(x, x)
        x.clone().sum()
        x.double().sum()
        torch.ones(3, 4).sum()
        torch.func.vmap(lambda t: t * 2)(x)
        model.state_dict()
        repr(x)
        with exact.mode():
            x.sum()


def test_the_default_device_is_below_the_watch(trained):
    """PyTorch expects it there when another one is set."""
    try:
        for device in ("cpu", "meta", None):
            torch.set_default_device(device)
            with exact.mode():
                torch.ones(3)
    finally:
        torch.set_default_device(None)


def test_coverage_leaves_no_marks_and_no_second_watch(monkeypatch):
    monkeypatch.setattr(watch.marks, "_marks", {})  # of other tests
    weight = torch.ones(3, 3)
    exact.coverage(lambda: weight.mul_(0.5).sum())
    weight.sum()
    with exact.mode():
        x = torch.rand(3, 3)
        exact.coverage(torch.sum, x)
        x.mm(x)
    assert len(torch.overrides._get_current_function_mode_stack()) == 1


def test_what_is_only_written_to_is_no_operand(trained):
    _, x, _, _ = trained
    torch.mm(torch.ones(3, 2), torch.ones(2, 4), out=x)
    torch.add(torch.ones(3, 4), 1, out=x)


def test_arithmetic_is_not_watched_where_nothing_lives(monkeypatch):
    """Nor is a compiler disturbed."""
    monkeypatch.setattr(watch.marks, "_marks", {})  # of other tests
    with exact.mode():
        x = torch.rand(3, 3)
    product = torch.compile(lambda t: (t @ t.T).sin(), backend="eager", fullgraph=True)
    product(torch.ones(3, 3))
    stack = torch.overrides._get_current_function_mode_stack
    assert [type(mode) for mode in stack()] == [watch.Watch]
    del x
    with exact.mode():
        assert watch.Watch not in map(type, stack())
    assert stack() == []
