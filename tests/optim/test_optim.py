# SPDX-License-Identifier: MIT
"""Muon and Newton–Schulz against float64 and `torch.optim.Muon`, on one rank."""

import copy
import inspect
import operator
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim._muon import _zeropower_via_newtonschulz
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from torchpar import reference
from torchpar.errors import ConfigError
from torchpar.ops import cpu
from torchpar.optim import ChainedOptimizer, Muon, newton_schulz, orthogonalize
from torchpar.optim import matrices as batches
from torchpar.optim.newton_schulz import COEFFICIENTS

TORCH = torch.optim.Muon
both_iterations = pytest.mark.parametrize("ns", ["standard", "gram"])


@pytest.fixture(autouse=True)
def bfloat16(monkeypatch):
    """Products of bfloat16, as torch's, also on a CPU where those of float32 are faster."""
    monkeypatch.setattr(newton_schulz, "has_bfloat16", lambda: True)


def torchs(x: Tensor, steps: int = 5) -> Tensor:
    return _zeropower_via_newtonschulz(x, COEFFICIENTS, steps, 1e-7).double()


def exact(x: Tensor, steps: int = 5) -> Tensor:
    return reference.orthogonalize(x.double(), steps)


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (2, 5, 8), (20, 3)])
def test_the_reference_applies_its_polynomial_to_the_singular_values(shape):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    u, values, vh = torch.linalg.svd(x, full_matrices=False)
    values /= values.norm(dim=-1, keepdim=True)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    # Each of five iterations multiplies a rounding error of x by at most a = 3.4445.
    rounding = max(shape) * 3.4445**5 * torch.finfo(torch.float64).eps
    assert_close(reference.orthogonalize(x), u * values.unsqueeze(-2) @ vh, rtol=0, atol=rounding)
    assert torch.equal(reference.orthogonalize(torch.zeros(shape)), torch.zeros(shape))


def matrices(n: int, m: int) -> Iterator[tuple[Tensor, float]]:
    """Random ones, of many decades, and of low rank, each with the error allowed as a multiple of
    torch's."""
    torch.manual_seed(0)
    yield torch.randn(n, m), 2
    u, v = torch.linalg.qr(torch.randn(n, n))[0], torch.linalg.qr(torch.randn(m, n))[0]
    yield u * torch.logspace(0, -6, n) @ v.T, 2
    yield torch.randn(n, 4) @ torch.randn(4, m), 2


def hard_matrices(n: int, m: int) -> Iterator[tuple[Tensor, float]]:
    """Spectra for which Gram iterations lose accuracy, each with the factor that newton_schulz.py
    states."""
    torch.manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(n, n))[0], torch.linalg.qr(torch.randn(m, n))[0]
    for decades, factor in ((1, 1.8), (2, 6), (3, 6)):
        yield u * torch.logspace(0, -decades, n) @ v.T, factor
    for times in (2, 4):
        yield torch.randn(n // times, m).repeat(times, 1), 11


def compare_orthogonality(
    make: Any, n: int, m: int, steps: int, ns: Any, triple: Any = COEFFICIENTS
) -> None:
    """Singular values are at most twice as far as torch's from 1 and from each other, and so is the
    result.

    This holds for all of them, and for those of directions in which x is not near 0.
    """
    for x, factor in make(n, m):
        ideal, by_torch = exact(x, steps), torchs(x, steps)
        found = orthogonalize(x, triple, steps, ns=ns).double()
        if make is matrices or steps == 5:
            assert (found - ideal).norm() <= factor * (by_torch - ideal).norm()
        values_of = [torch.linalg.svdvals(t) for t in (found, by_torch, ideal)]
        for kept in (values_of[2] > 0.6, values_of[2] >= 0):
            values, torchs_values = (v[kept] for v in values_of[:2])
            assert (values - 1).abs().max() <= 2 * (torchs_values - 1).abs().max()
            assert (values - 1).norm() <= 2 * (torchs_values - 1).norm()
            assert values.max() - values.min() <= 2 * (torchs_values.max() - torchs_values.min())


@pytest.mark.parametrize(
    "case",
    [
        (matrices, 64, 64, 5, "standard"),
        (matrices, 127, 129, 5, "gram"),
        (matrices, 65, 300, 5, "standard"),
        *((matrices, 64, 130, steps, "gram") for steps in (1, 2, 3, 4, 5, 7, 8)),
        (matrices, 257, 520, 5, "standard"),
        (matrices, 257, 520, 5, "gram"),
        *(
            pytest.param((hard_matrices, 256, 512, steps, "auto"), marks=pytest.mark.slow)
            for steps in (4, 5, 8)
        ),
    ],
)
def test_orthogonality_is_no_worse_than_torchs(monkeypatch, case):
    """By whole products of up to 256 rows, and by half products of more."""
    monkeypatch.setattr(cpu, "is_halved", lambda x: x.shape[-2] > 256)
    compare_orthogonality(*case)


def test_the_comparison_rejects_a_wrong_coefficient():
    a, b, c = COEFFICIENTS
    with pytest.raises(AssertionError):
        compare_orthogonality(matrices, 65, 300, 5, "standard", (a, b, 1.03 * c))


@both_iterations
def test_products_of_float32_leave_the_rounding_of_the_result_alone(monkeypatch, ns):
    monkeypatch.setattr(newton_schulz, "has_bfloat16", lambda: False)
    for x, _ in matrices(65, 300):
        found = orthogonalize(x.mT, ns=ns)
        assert found.dtype == torch.bfloat16
        ideal = exact(x.bfloat16()).mT  # the steps multiply a rounding of x by up to 3.4445⁵
        assert (found.double() - ideal).norm() <= 2 * 2**-8 * ideal.norm()


@both_iterations
def test_any_layout(ns):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 20, 45)
    before, expected = x.clone(), orthogonalize(x, ns=ns)
    assert expected.dtype == torch.bfloat16
    for same in (torch.stack([x, x], -1)[..., 0], x.double()):
        assert_close(orthogonalize(same, ns=ns), expected, rtol=0, atol=0)
    assert_close(orthogonalize(x.mT, ns=ns), expected.mT, rtol=0, atol=0)
    by_columns = orthogonalize(x.mT.contiguous().mT, ns=ns)
    assert by_columns.mT.is_contiguous()
    error = (torchs(x[1, 2]) - exact(x[1, 2])).norm()
    for other in (by_columns[1, 2], orthogonalize(x[1, 2], ns=ns)):  # sums in other orders
        assert (other.double() - expected[1, 2].double()).norm() <= 4 * error
    assert torch.equal(x, before)
    for shape in [(0, 5), (5, 0), (3, 0, 4), (0, 3, 4)]:
        assert orthogonalize(torch.ones(shape), ns=ns).shape == shape
    assert torch.equal(
        orthogonalize(torch.zeros(64, 200), ns=ns), torch.zeros(64, 200, dtype=torch.bfloat16)
    )
    x = torch.randn(3, 7).bfloat16()
    assert torch.equal(orthogonalize(x, steps=0, ns=ns), x / x.norm())


def test_auto_is_gram_for_large_matrices_with_one_side_twice_the_other():
    for n, m, ns in ((255, 600, "standard"), (256, 511, "standard"), (256, 512, "gram")):
        x = torch.randn(n, m)
        assert torch.equal(orthogonalize(x), orthogonalize(x, ns=ns))


def test_polar_express_ends_nearer_to_1():
    for x, _ in matrices(65, 300):
        large = torch.linalg.svdvals(exact(x)) > 0.6  # directions that the usual coefficients raise
        spread = {}
        for coefficients in (COEFFICIENTS, "polar_express"):
            values = torch.linalg.svdvals(orthogonalize(x, coefficients, 8, ns="standard").double())
            spread[coefficients] = (values[large] - 1).abs().max()
        assert spread["polar_express"] < spread[COEFFICIENTS] / 2


def test_coefficients_of_each_iteration():
    x = torch.randn(20, 30)
    one, other = COEFFICIENTS, (2.0, -1.5, 0.5)
    expected = x.double() / x.double().norm()
    for a, b, c in (one, other, other):
        r = expected @ expected.mT
        expected = a * expected + (b * r + c * r @ r) @ expected
    for ns in ("standard", "gram"):
        found = orthogonalize(x, [one, other], 3, ns=ns)
        # x and nine products are rounded to bfloat16.
        assert (found.double() - expected).norm() <= 10 * 2**-9 * expected.norm()


# Steps


SHAPES = [(20, 30), (30, 20), (20, 30), (16, 80), (33, 33), (90, 17)]
ITERATION = "torch.optim._muon._zeropower_via_newtonschulz"


def fill_gradients(params: list[Tensor]) -> None:
    for p in params:
        p.grad = torch.randn_like(p)


class NoReading(TorchDispatchMode):
    """Refuse to copy a value from a device to Python."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def run(
    *kinds: Callable[..., TORCH], dtype: torch.dtype = torch.float32, **arguments: Any
) -> list[Tensor]:
    """The parameters after three steps of each kind of optimizer, which loads the state of the one
    before.

    The gradients do not depend on the parameters, so that every run orthogonalises the same
    matrices.
    """
    torch.manual_seed(0)
    params = [torch.randn(shape, dtype=dtype).requires_grad_() for shape in SHAPES]
    state = None
    for kind in kinds:
        optimizer = kind(params, **{"lr": 0.1, **arguments})
        if state is not None:
            optimizer.load_state_dict(copy.deepcopy(state))
        for _ in range(3):
            fill_gradients(params)
            with NoReading() if isinstance(optimizer, Muon) else nullcontext():
                optimizer.step()
        state = optimizer.state_dict()
    return [p.detach().double() for p in params]


def compare_runs(*kinds: Callable[..., TORCH], **arguments: Any) -> None:
    """Parameters are at most twice as far as torch's from those of an orthogonalisation in
    float64."""
    found = run(*kinds, **arguments)
    expected = run(*[TORCH] * len(kinds), **arguments)
    with patch(ITERATION, lambda x, coefficients, steps, eps: exact(x, steps).to(x.dtype)):
        ideal = run(*[TORCH] * len(kinds), **arguments)
    for x, y, z in zip(found, expected, ideal, strict=True):
        assert (x - z).norm() <= 2 * (y - z).norm()


gram = partial(Muon, ns="gram")


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"nesterov": False, "momentum": 0.5},
        {"weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw", "ns_steps": 4},
        {"adjust_lr_fn": "original", "dtype": torch.float64, "eps": 1e-3},
        {"dtype": torch.bfloat16},
        {"lr": torch.tensor([0.1])},
        {"adjust_lr_fn": "spectral_unclamped"},
    ],
)
def test_steps_are_torchs(arguments):
    """They read nothing back from the device."""
    compare_runs(Muon, **arguments)
    compare_runs(gram, **arguments)


def test_checkpoints_interchange_with_torchs():
    compare_runs(TORCH, Muon)
    compare_runs(gram, TORCH)
    with pytest.raises(AssertionError):
        compare_runs(partial(Muon, momentum=0.9))
    params = [torch.randn(shape).requires_grad_() for shape in SHAPES]
    fill_gradients(params)
    ours, theirs = Muon(params, ns="gram"), TORCH(params)
    for optimizer in (ours, theirs):
        optimizer.step()
    assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    assert copy.deepcopy(ours).ns == "gram"


def test_matrices_share_batches():
    """Small ones of nearly equal shapes do; each ends where it does alone, but for rounding."""
    torch.manual_seed(0)
    shapes = [(20, 30), (32, 32), (300, 300), (33, 5), (25, 32), (20, 30)]
    params = [torch.randn(shape).requires_grad_() for shape in shapes]
    alone = [p.detach().clone().requires_grad_() for p in params]
    fill_gradients(params)
    for p, q in zip(params, alone, strict=True):
        q.grad = p.grad
        Muon([q], lr=1.0, ns="standard").step()
    optimizer = Muon(params, lr=1.0, ns="standard")
    with (
        patch.object(batches, "orthogonalize", wraps=orthogonalize) as called,
        patch.object(batches, "_BATCH_MULTIPLICATIONS", 3 * 32**3),
    ):
        optimizer.step()
    found = [tuple(call.args[0].shape) for call in called.call_args_list]
    assert found == [(3, 32, 32), (32, 32), (300, 300), (64, 32)]
    for p, q in zip(params, alone, strict=True):
        # Five iterations of three products round to bfloat16, each times the rate.
        assert_close(p, q, rtol=0, atol=max(1, p.shape[0] / p.shape[1]) ** 0.5 * 15 * 2**-8)


def test_the_parameters_are_torchs():
    """A torch with other parameters fails this test: write them out in Muon too."""
    ours, theirs = (inspect.signature(kind).parameters for kind in (Muon, TORCH))
    described = [[(p.name, p.kind, p.default) for p in kind.values()] for kind in (ours, theirs)]
    assert described[0][: len(theirs)] == described[1]
    assert list(ours)[len(theirs) :] == ["ns", "views", "process_group"]


@pytest.mark.parametrize("stored", [torch.float32, torch.float64])
def test_a_momentum_that_was_stored_wider_goes_on_as_before(stored):
    """It stayed wider than the gradient, and the next step failed (DeepSpeed#8433)."""
    gradients = torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    p = torch.ones(8, 6, dtype=torch.bfloat16).requires_grad_()
    first = Muon([p], lr=0.1)
    p.grad = gradients[0]
    first.step()
    q, state = p.detach().clone().requires_grad_(), copy.deepcopy(first.state_dict())
    state["state"][0]["momentum_buffer"] = state["state"][0]["momentum_buffer"].to(stored)
    second = Muon([q], lr=0.1)
    second.load_state_dict(state)
    for one in gradients[1:]:
        p.grad, q.grad = one.clone(), one.clone()
        first.step()
        second.step()
    assert torch.equal(p, q)
    assert second.state[q]["momentum_buffer"].dtype == torch.bfloat16


def test_views_stay_with_their_parameters():
    """In a copy, after a state dict of other names was loaded, and where a view would copy other
    strides."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 30, (1, 2), bias=False).to(memory_format=torch.channels_last)
    arguments: Any = {"lr": 0.1, "weight_decay": 0.0, "ns": "standard"}

    def view(p: Tensor) -> Any:  # two matrices with different rates
        return p.flatten(1).split([24, 6])

    optimizer = Muon(conv.named_parameters(), views={"weight": view}, **arguments)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["param_names"] = ["module.weight"]
    optimizer.load_state_dict(saved)
    conv, optimizer = copy.deepcopy((conv, optimizer))
    conv.weight.grad = torch.randn_like(conv.weight)
    alone = [part.clone().requires_grad_() for part in view(conv.weight.detach())]
    for part, gradient in zip(alone, view(conv.weight.grad), strict=True):
        part.grad = gradient
    for each in (optimizer, Muon(alone, **arguments)):
        each.step()
    for found, expected in zip(view(conv.weight), alone, strict=True):
        # Rounded to bfloat16; a ratio of rates rounds once more, and products may add in another
        # order.
        assert_close(found, expected, rtol=0, atol=0.1 * 1.5 * 4 * 2**-8)


def test_a_refused_group_is_not_added():
    params = [torch.randn(shape).requires_grad_() for shape in [(4, 5), (0, 5), (6, 4)]]
    optimizer = Muon([{"params": [p]} for p in params[:2]])
    with pytest.raises(ValueError, match="expected 2D"):
        optimizer.add_param_group({"params": [torch.randn(3)]})
    with pytest.raises(ValueError, match="group 2: Learning rate"):
        optimizer.add_param_group({"params": [torch.randn(3, 3)], "lr": -1.0})
    optimizer.add_param_group({"params": params[2:]})
    fill_gradients(params)
    optimizer.step()
    assert len(optimizer.state_dict()["state"]) == 3  # also of the empty one


def test_a_group_that_would_be_left_out_is_named():
    p, q = torch.randn(3, 4).requires_grad_(), torch.randn(3, 4).requires_grad_()
    optimizer = Muon([{"params": [("first", p)]}, {"params": [("second", q)]}])
    with pytest.raises(ValueError, match=r"no parameter of group 0 has a gradient \(first, …\)"):
        optimizer.step()
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"no parameter of group 1 has a gradient \(second, …\)"):
        optimizer.step()
    q.requires_grad_(False)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()  # a later step may have nothing to do


# Groups and parameters that change between steps


def by_both(change: Callable[[Any, list[Tensor]], Any]) -> list[list[Tensor]]:
    """Weights after steps, a change of the optimizer, and more steps, by Muon and by
    `torch.optim.Muon`.

    Both only divide by the norm instead of iterating, so that a weight which moves wrongly stands
    out.
    """
    weights = []
    for kind in (Muon, TORCH):
        torch.manual_seed(0)
        params = [torch.randn(5, 7).requires_grad_() for _ in range(4)]
        optimizer = kind([{"params": params[:2]}, {"params": params[2:3], "lr": 2.0}], lr=1.0)
        with (
            patch.object(
                batches, "orthogonalize", lambda x, *_: x / x.norm(dim=(-2, -1), keepdim=True)
            ),
            patch(ITERATION, lambda x, *_: x / x.norm()),
        ):
            for now in (lambda *_: None, change):
                now(optimizer, params)
                for _ in range(2):
                    fill_gradients(params)
                    optimizer.step()
        weights.append([p.detach() for p in params])
    return weights


def reverse(optimizer: Any, params: list[Tensor]) -> None:
    optimizer.param_groups.reverse()
    optimizer.param_groups[0]["lr"] = 3.0


def swap_data(optimizer: Any, params: list[Tensor]) -> None:
    params[0].data = torch.ones(7, 3)
    optimizer.state.clear()


@pytest.mark.parametrize(
    "change",
    [
        lambda optimizer, params: optimizer.param_groups.pop(0),
        lambda optimizer, params: optimizer.param_groups[0]["params"].pop(0),
        lambda optimizer, params: optimizer.param_groups[0]["params"].append(params[3]),
        lambda optimizer, params: optimizer.param_groups[0]["params"].insert(0, params[3]),
        lambda optimizer, params: operator.setitem(
            optimizer.param_groups[0]["params"], 0, params[3]
        ),
        reverse,
        lambda optimizer, params: optimizer.param_groups.append(
            {**optimizer.param_groups[0], "params": [params[3]], "lr": 3.0}
        ),
        lambda optimizer, params: optimizer.add_param_group({"params": [params[3]], "lr": 3.0}),
        swap_data,
    ],
)
def test_changed_groups_step_as_torchs(change):
    found, expected = by_both(change)
    assert any(
        not torch.equal(p, q) for p, q in zip(found, by_both(lambda *_: None)[0], strict=True)
    )
    for p, q in zip(found, expected, strict=True):
        # Of numbers up to 1 times a rate, two roundings to bfloat16 in each of four steps.
        assert_close(p, q, rtol=0, atol=4 * 3 * 2**-8)


def test_a_parameter_that_is_put_in_later_is_checked():
    p = torch.randn(4, 5).requires_grad_()
    optimizer = Muon([("w", p)], views={"w": lambda t: t.split(2)})
    fill_gradients([p])
    optimizer.step()
    optimizer.param_groups[0]["params"].append(torch.randn(3).requires_grad_())
    with pytest.raises(ValueError, match=r"parameter 1 of group 0 has shape \(3,\), expected 2D"):
        optimizer.step()
    optimizer.param_groups[0]["params"].pop()
    p.data, p.grad = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"w is torch.float64 on cpu, and its momentum torch.float32"
    ):
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())  # as the message says
    optimizer.step()
    optimizer.param_groups[0]["params"][0] = torch.randn(6).requires_grad_()
    with pytest.raises(ValueError, match="expected views"):  # the view of the name stays
        optimizer.step()


def test_a_copy_of_changed_groups_steps_as_they_do():
    """By copy.deepcopy and by pickle; the copies have parameters of their own."""
    params = [torch.randn(4, 5).requires_grad_() for _ in range(3)]
    optimizer = Muon([{"params": [params[0]]}, {"params": params[1:]}])
    fill_gradients(params)
    optimizer.step()
    del optimizer.param_groups[0]
    for twins, twin in (
        copy.deepcopy((params, optimizer)),
        pickle.loads(pickle.dumps((params, optimizer))),
    ):
        for p, q in zip(params, twins, strict=True):
            q.grad = p.grad
        twin.step()
        assert [torch.equal(p, q) for p, q in zip(params, twins, strict=True)] == [
            True,
            False,
            False,
        ]


# Chains of optimizers


def test_a_chain_of_optimizers_is_one():
    """It takes a closure, and keeps its members' state."""
    p, q = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    members = torch.optim.SGD([p], lr=0.1, momentum=0.9), torch.optim.SGD([q], lr=0.2, momentum=0.5)
    for t, member in zip((p, q), members, strict=True):
        t.grad = torch.ones(2)
        member.step()
    chain = ChainedOptimizer(*members)

    def closure() -> Tensor:
        chain.zero_grad()
        (p + 2 * q).sum().backward()
        return torch.tensor(7)

    assert chain.step(closure) == 7
    # Momenta of 1 and 1 after the first step; then of 1.9 and 2.5.
    for t, momentum, value in ((p, 1.9, 0.9 - 0.19), (q, 2.5, 0.8 - 0.5)):
        assert_close(chain.state[t]["momentum_buffer"], torch.full((2,), momentum))
        assert_close(t.detach(), torch.full((2,), value))


def test_a_scheduler_cycles_the_momentum_of_a_chain():
    """That of Muon, or the betas of AdamW if all members have some; the others keep theirs."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    adamw = [torch.optim.AdamW([p]) for p in model.parameters()]
    muon, vectors = (0.95, None), (None, (0.9, 0.999))
    for chain, expected in (
        (Muon.for_model(model), [muon, vectors, vectors]),
        (ChainedOptimizer(*adamw), [(None, (0.95, 0.999))] * 4),
    ):
        torch.optim.lr_scheduler.OneCycleLR(chain, max_lr=0.1, total_steps=5)
        cycled = [(group.get("momentum"), group.get("betas")) for group in chain.param_groups]
        # OneCycleLR writes a momentum into all groups
        assert [one if one[1] is None else (None, one[1]) for one in cycled] == expected


class Averaged(torch.optim.SGD):
    """SGD that steps in training mode alone, and shows averages in evaluation mode, as the
    optimizers of the package schedulefree do."""

    def __init__(self, params: Any, lr: float = 0.1):
        super().__init__(params, lr)
        for group in self.param_groups:
            group["train_mode"] = False

    def train(self) -> None:
        self.switch(True)

    def eval(self) -> None:
        self.switch(False)

    @torch.no_grad()
    def switch(self, mode: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] != mode:
                for p in group["params"]:
                    p.mul_(2.0 if mode else 0.5)
            group["train_mode"] = mode

    def step(self, closure: Any = None) -> Any:
        assert all(group["train_mode"] for group in self.param_groups), "not in training mode"
        return super().step(closure)


def test_a_chain_switches_the_modes_of_its_parts() -> None:
    """Trainers ask for the methods by hasattr; a chain of optimizers without modes has none."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    chain: Any = Muon.for_model(model, 0.1, others=Averaged)
    hidden, head = model[0].weight, model[1].weight
    for one in (chain, copy.deepcopy(chain), ChainedOptimizer(chain)):
        assert hasattr(one, "train")
        assert hasattr(one, "eval")
    before = hidden.detach().clone(), head.detach().clone()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(AssertionError, match="not in training mode"):
        chain.step()
    ChainedOptimizer(chain).train()
    chain.train()
    chain.step()
    assert torch.equal(head, 2 * before[1])
    chain.eval()
    assert torch.equal(head, before[1])
    assert [group.get("train_mode") for group in chain.param_groups] == [None, False, False]
    assert not torch.equal(hidden, before[0])  # which decays, and is not averaged
    plain = Muon.for_model(model)
    for one in (plain, ChainedOptimizer(plain)):
        assert not hasattr(one, "train")
        assert not hasattr(one, "eval")
        with pytest.raises(AttributeError, match=r"none of its optimizers has eval\(\)"):
            one.eval()


def test_a_chain_has_the_defaults_that_schedules_read() -> None:
    """Those that all parts have: "lr" for transformers' schedules, and not "betas" beside Muon."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    adamw = partial(torch.optim.AdamW, lr=3e-4)
    chain = Muon.for_model(model, 0.02, others=adamw)
    assert {name: chain.defaults[name] for name in ("lr", "weight_decay", "momentum", "eps")} == {
        "lr": 0.02, "weight_decay": 0.1, "momentum": 0.95, "eps": 1e-7,
    }  # fmt: skip
    assert "betas" not in chain.defaults
    alone = ChainedOptimizer(*(adamw([p]) for p in model.parameters()))
    assert alone.defaults == {**adamw([model[0].weight]).defaults}
    assert ChainedOptimizer(chain).defaults == chain.defaults
    transformers = pytest.importorskip("transformers", reason="transformers has the schedules")
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    rates: list[list[float]] = []
    for one in (chain, torch.optim.Muon([model[0].weight], lr=0.02)):
        scheduler = transformers.get_scheduler("polynomial", one, 2, 10)
        rates.append([])
        for _ in range(10):
            one.step()
            scheduler.step()
            rates[-1].append(one.param_groups[0]["lr"])
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 5


def test_a_chain_answers_as_one_optimizer_of_all_groups() -> None:
    """Each public method of `torch.optim.Optimizer`, with its hooks, beside SGD of two groups."""
    answers = []
    for chained in (False, True):
        torch.manual_seed(0)
        p, q = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
        sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
        groups = [{"params": [p]}, {"params": [q], "lr": 0.2}]
        one: Any = ChainedOptimizer(*(sgd([g]) for g in groups)) if chained else sgd(groups)
        called: list[str] = []
        for name in (
            "step_pre", "step_post", "state_dict_pre", "state_dict_post",
            "load_state_dict_pre", "load_state_dict_post",
        ):  # fmt: skip
            register = getattr(one, f"register_{name}_hook")
            note = partial(called.append, name)
            register(lambda *_, note=note: note())
        scheduler = torch.optim.lr_scheduler.ExponentialLR(one, 0.5)
        for t in (p, q):
            t.grad = torch.full((2,), 3.0)
        losses = [one.step(lambda: 7.0), one.step()]
        scheduler.step()
        saved = copy.deepcopy(one.state_dict())
        one.load_state_dict(saved)
        one.zero_grad(set_to_none=False)
        zeroed = [t.grad.tolist() for t in (p, q)]
        one.zero_grad()
        described = repr(one).partition("\n")[2]
        twin = pickle.loads(pickle.dumps(one))
        with pytest.raises(ValueError, match="different number of parameter groups"):
            one.load_state_dict({**saved, "param_groups": []})
        answers.append(
            (
                *(called, losses, saved, zeroed, p.grad, q.grad, described, one.defaults),
                *(twin.state_dict(), p.tolist(), q.tolist(), list(one.state) == [p, q]),
            )
        )
    for ours, theirs in zip(*answers, strict=True):
        assert str(ours) == str(theirs)


class Counting(torch.optim.SGD):
    """SGD whose state dict has a format of its own, as that of optimizers in 8 bits."""

    def state_dict(self) -> dict[str, Any]:
        saved = super().state_dict()
        state = {i: {"packed": t["momentum_buffer"] * 2} for i, t in saved["state"].items()}
        return {**saved, "state": state, "format": 2}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert state_dict["format"] == 2
        state = {i: {"momentum_buffer": t["packed"] / 2} for i, t in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "state": state})


def test_each_part_of_a_chain_saves_and_loads_in_its_own_way() -> None:
    """By its own methods and hooks, also in a chain of chains; a refusal changes no part."""
    p, q = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    p.grad, q.grad = torch.ones(2), torch.full((2,), 3.0)

    def make(called: list[str]) -> tuple[ChainedOptimizer, torch.optim.Optimizer]:
        first = torch.optim.SGD([p], lr=0.0, momentum=0.5)
        second = Counting([q], lr=0.0, momentum=0.5)
        for name in ("state_dict_pre", "state_dict_post", "load_state_dict_pre"):
            note = partial(called.append, name)
            getattr(first, f"register_{name}_hook")(lambda *_, note=note: note())
        return ChainedOptimizer(ChainedOptimizer(first), second), first

    called: list[str] = []
    (chain, _), (other, _) = make(called), make(called)
    chain.step()
    saved = copy.deepcopy(chain.state_dict())
    assert saved["parts"] == [{}, {"format": 2}]
    assert saved["state"][0]["momentum_buffer"].tolist() == [1.0, 1.0]
    assert saved["state"][1]["packed"].tolist() == [6.0, 6.0]
    assert [group["params"] for group in saved["param_groups"]] == [[0], [1]]
    other.load_state_dict(saved)
    assert other.state[q]["momentum_buffer"].tolist() == [3.0, 3.0]
    assert called == ["state_dict_pre", "state_dict_post", "load_state_dict_pre"]
    other.step()
    assert other.state[q]["momentum_buffer"].tolist() == [4.5, 4.5]
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(AssertionError):
        other.load_state_dict({**saved, "parts": [{}, {"format": 3}]})
    assert str(other.state_dict()) == str(before)
    other.step()
    flat = {key: value for key, value in saved.items() if key != "parts"}  # of version 0.5
    other.load_state_dict({**flat, "format": 2})
    assert other.state[q]["momentum_buffer"].tolist() == [3.0, 3.0]
    with pytest.raises(ConfigError, match="the state dict is of 1 optimizers, expected 2; load"):
        other.load_state_dict({**saved, "parts": [{}]})


class Scaled(torch.optim.SGD):
    """SGD with a number of its own in its state dict."""

    rho = 0

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "rho": self.rho}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state_dict = {**state_dict}
        self.rho = state_dict.pop("rho")
        super().load_state_dict(state_dict)


def test_parts_of_a_chain_keep_their_own_keys() -> None:
    """Also in a chain beside a chain, and beside an optimizer without keys of its own."""
    for nest in (lambda a, b, c: (a, b, c), lambda a, b, c: (ChainedOptimizer(a, b), c)):
        parts: list[Any] = [
            kind([torch.nn.Parameter(torch.ones(2))], lr=0.1)
            for kind in (Scaled, Scaled, torch.optim.SGD)
        ]
        parts[0].rho, parts[1].rho = 1, 2
        chain = ChainedOptimizer(*nest(*parts))
        saved = copy.deepcopy(chain.state_dict())
        parts[0].rho, parts[1].rho = 3, 4
        chain.load_state_dict(saved)
        assert (parts[0].rho, parts[1].rho) == (1, 2)


class WithSteps(torch.optim.SGD):
    """SGD that counts its steps under a key that is no parameter."""

    def step(self, closure: Any = None) -> Any:
        steps = self.state["global"]
        steps["step"] = steps.get("step", 0) + 1
        return super().step(closure)


def test_state_of_no_parameter_is_of_one_part() -> None:
    def make(*kinds: type[torch.optim.SGD]) -> list[Any]:
        return [kind([torch.nn.Parameter(torch.ones(2))], lr=0.1) for kind in kinds]

    message = "two of its optimizers keep state under 'global', which is no parameter; take"
    for steps in (0, 1):  # the counter is made before the chain, or by its first step
        first, second = make(WithSteps, WithSteps)
        for _ in range(steps):
            first.step()
            second.step()
        with pytest.raises(ConfigError, match=message):
            ChainedOptimizer(first, second).step()
    for kinds in ((WithSteps, torch.optim.SGD), (torch.optim.SGD, WithSteps)):
        chain = ChainedOptimizer(ChainedOptimizer(*make(*kinds)), *make(torch.optim.SGD))
        for _ in range(3):
            chain.step()
        loaded = ChainedOptimizer(ChainedOptimizer(*make(*kinds)), *make(torch.optim.SGD))
        loaded.load_state_dict(copy.deepcopy(chain.state_dict()))
        for one in (chain, loaded, copy.deepcopy(chain), ChainedOptimizer(*chain.optimizers)):
            one.step()
            one.step()
        assert loaded.state["global"] == {"step": 5}


def test_a_switch_passes_its_arguments_on() -> None:
    class Switched(torch.optim.SGD):
        mode: bool | None = None

        def train(self, mode: bool = True) -> None:
            self.mode = mode

    part = Switched([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    chain: Any = ChainedOptimizer(
        ChainedOptimizer(part), torch.optim.SGD([torch.nn.Parameter(torch.ones(2))])
    )
    found = []
    for arguments, options in (((False,), {}), ((), {"mode": False}), ((), {})):
        chain.train(*arguments, **options)
        found.append(part.mode)
    assert found == [False, False, True]


def test_a_chain_of_what_is_no_optimizer_is_refused() -> None:
    p = torch.nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ConfigError, match="an argument is of type list, expected optimizers of"):
        ChainedOptimizer([Muon([p])])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no optimizer is given, expected at least one"):
        ChainedOptimizer()


def test_a_chain_of_chains_saves_the_state_of_all_and_takes_a_new_rate():  # noqa: C901  # a loop for each kind of chain
    """It is saved and loaded, and a copy of it is one, too."""

    def train(
        steps: int, saved: Any = None, first: Sequence[Tensor] = ()
    ) -> tuple[Any, list[Tensor]]:
        torch.manual_seed(0)
        models = [
            torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 3)) for _ in range(2)
        ]
        params = [p for model in models for p in model.parameters()]
        chain = ChainedOptimizer(*(Muon.for_model(model) for model in models))
        if saved:
            chain.load_state_dict(saved)
            for p, q in zip(params, first, strict=True):
                p.data.copy_(q)
        for group in chain.param_groups:
            group["lr"] = 0.5
        for number in range(steps):
            for p in params:
                p.grad = torch.full_like(p, 1.0 + number) + torch.arange(p.shape[-1])
            chain.step()
        return chain, [p.detach().clone() for p in params]

    chain, first = train(1)
    assert len(chain.state_dict()["state"]) == len(first) == 8
    twin, weights = copy.deepcopy(chain), list[list[Tensor]]()
    resumed, _ = train(0, chain.state_dict(), first)  # whose tensors the chain goes on to update
    for optimizer in (chain, twin, resumed):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        weights.append([p.detach().clone() for p in params])
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.step()
        assert all(map(torch.equal, params, weights[-1]))
    for others in weights[1:]:
        assert all(map(torch.equal, others, weights[0]))


def test_a_chain_whose_groups_have_changed_is_refused():
    p, q = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    for change in (
        lambda chain: chain.param_groups.pop(),
        lambda chain: chain.param_groups.append({**chain.param_groups[0]}),
        lambda chain: operator.setitem(chain.param_groups, 0, {**chain.param_groups[0]}),
        lambda chain: chain.optimizers[0].add_param_group(
            {"params": [torch.nn.Parameter(torch.ones(2))]}
        ),
    ):
        chain = ChainedOptimizer(torch.optim.SGD([p], lr=0.1), torch.optim.SGD([q], lr=0.2))
        chain.step()
        change(chain)
        with pytest.raises(
            RuntimeError, match="was added to, removed from or replaced in the chain"
        ):
            chain.step()


def test_a_state_of_another_optimizer_or_model_is_refused() -> None:
    p, q = (torch.nn.Parameter(torch.ones(shape)) for shape in ((2, 3), (3, 2)))
    p.grad, q.grad = torch.ones(2, 3), torch.ones(3, 2)
    mine, others = Muon([p]), Muon([q])
    with pytest.raises(ConfigError, match=r"group 0 .* has no adjust_lr_fn, momentum, .*of a Muon"):
        mine.load_state_dict(torch.optim.AdamW([p]).state_dict())
    others.step()
    mine.load_state_dict(others.state_dict())
    with pytest.raises(ConfigError, match="whose parameters are in the same order"):
        mine.step()


def test_a_chain_refuses_the_state_of_another_optimizer_and_goes_on() -> None:
    p, q = (torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2))
    p.grad, q.grad = torch.ones(2, 3), torch.ones(2, 3)
    chain = ChainedOptimizer(torch.optim.SGD([q], lr=0.1), Muon([p]))
    chain.step()
    before = copy.deepcopy(chain.state_dict())
    others = ChainedOptimizer(torch.optim.SGD([q]), torch.optim.AdamW([p]))
    others.step()
    with pytest.raises(ConfigError, match=r"has no adjust_lr_fn, momentum, .*of a Muon"):
        chain.load_state_dict(others.state_dict())
    swapped = ChainedOptimizer(torch.optim.AdamW([q], lr=0.1), Muon([p]))
    with pytest.raises(ConfigError, match=r"has no betas, eps, which AdamW needs; load"):
        swapped.load_state_dict(before)
    with pytest.raises(
        ConfigError, match=r"the state dict has no param_groups; load one of a Chai"
    ):
        chain.load_state_dict({})
    assert_close(chain.state_dict(), before, rtol=0, atol=0)
    chain.step()
    chain.load_state_dict(before)
    chain.step()


def test_a_state_is_loaded_again_into_copies_and_from_pytorchs_muon() -> None:
    p = torch.nn.Parameter(torch.ones(2, 3))
    p.grad = torch.ones(2, 3)
    theirs, mine = torch.optim.Muon([p]), Muon([p])
    theirs.step()
    copies = copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))
    for optimizer in (mine, mine, *copies):
        optimizer.load_state_dict(theirs.state_dict())
    momentum = theirs.state[p]["momentum_buffer"].clone()
    of_user = theirs.state_dict()  # which PyTorch's optimizers load as they are
    of_user["state"] |= {"steps": 5, "seen": [torch.ones(1)]}
    mine.load_state_dict(of_user)
    assert (mine.state["steps"], mine.state["seen"]) == (5, [torch.ones(1)])
    mine.step()
    assert torch.equal(theirs.state[p]["momentum_buffer"], momentum)
    old = theirs.state_dict()
    del old["param_groups"][0]["adjust_lr_fn"]
    with pytest.raises(ConfigError, match="has no adjust_lr_fn"):
        mine.load_state_dict(old)
    mine.register_load_state_dict_pre_hook(
        lambda _, state: state["param_groups"][0].update(adjust_lr_fn=None)
    )
    mine.load_state_dict(old)


def test_a_matrix_that_is_frozen_after_the_state_is_loaded_keeps_its_momentum() -> None:
    """PyTorch loads no state of a matrix that is frozen before, as docs/muon.md says."""

    def make() -> tuple[torch.nn.Module, Any]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
        return model, Muon.for_model(model, lr=0.1)

    def step(model: torch.nn.Module, optimizer: Any) -> None:
        optimizer.zero_grad()
        model(torch.eye(4)).square().sum().backward()
        optimizer.step()

    model, optimizer = make()
    step(model, optimizer)
    model[1].requires_grad_(False)
    step(model, optimizer)
    weights, state = get_state_dict(model, optimizer)
    resumed, loaded = make()
    set_state_dict(resumed, loaded, model_state_dict=weights, optim_state_dict=state)
    resumed[1].requires_grad_(False)
    for one, its in (model, optimizer), (resumed, loaded):
        step(one, its)
        one[1].requires_grad_()
        step(one, its)
    assert all(map(torch.equal, model.parameters(), resumed.parameters()))


X = torch.randn(6, 4)


def view(function: Callable[[Tensor], Any]) -> Muon:
    return Muon([("w", X)], views={"w": function})


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: orthogonalize(X, ns="gramm"),
            "ns is 'gramm', expected 'auto', 'standard' or 'gram'",
        ),
        (lambda: orthogonalize(X[0]), r"x is \(4,\) torch.float32, expected floating \(\*, n, m\)"),
        (lambda: orthogonalize(X, [COEFFICIENTS, (1.0, 2.0)]), r"\(1.0, 2.0\)\], expected 3"),
        (lambda: orthogonalize(X, "polar"), "coefficients is 'polar', expected 3"),
        (lambda: orthogonalize(X, steps=-1), "steps is -1, expected a whole number from 0 to 99"),
        (lambda: Muon([X], ns_steps=2.5), r"steps is 2\.5, expected a whole number"),
        (lambda: Muon([X], ns_steps="5"), "steps is '5', expected a whole number"),
        (lambda: Muon([X], adjust_lr_fn="no"), "Adjust learning rate function no is not supported"),
        (lambda: Muon([X[0]]), r"parameter 0 of group 0 has shape \(4,\), expected 2D, a matrix"),
        (lambda: Muon(torch.nn.Linear(4, 4)), r"a model, Linear; pass model\.parameters\(\), or"),
        (lambda: Muon([X.long()]), "is torch.int64, expected a floating dtype"),
        (lambda: Muon([X.to(torch.float8_e4m3fn)]), "is torch.float8_e4m3fn, expected a floating"),
        (lambda: Muon([X.to_sparse()]), "is torch.sparse_coo, expected torch.strided"),
        (
            lambda: Muon([{"params": [X], "ns": "gram"}]),
            "ns applies to the whole optimizer, not to a group",
        ),
        (lambda: Muon([X], "0.1"), "lr is '0.1', expected a number or a tensor of one"),
        (lambda: Muon([X], None), "lr is None, expected a number"),
        (lambda: Muon([X], momentum="0.9"), "Muon: momentum is '0.9', expected a number"),
        (lambda: Muon([{"param": [X]}]), "a group has param, expected params"),
        (lambda: Muon([{"params": [X], "lr": -1}]), "group 0: Learning rate should be >= 0"),
        (lambda: Muon([{"params": [X], "lr": "1"}]), "Muon: group 0: lr is '1', expected"),
        (lambda: Muon([{"params": [X], "momentum": -1}]), "group 0: momentum should be >= 0"),
        (lambda: Muon([{"params": [X], "weight_decay": -1}]), "group 0: weight decay should be"),
        (lambda: Muon([{"params": [X], "ns_steps": 100}]), "group 0: .*steps is 100, expected"),
        (lambda: Muon([{"params": [X], "ns_coefficients": "no"}]), "group 0: .*'no', expected 3"),
        (lambda: Muon([{"params": [X], "adjust_lr_fn": "no"}]), "group 0: .*no is not supported"),
        (
            lambda: Muon([{"params": [X]}, X]),
            "a group is of type Tensor, expected a dict that has pa",
        ),
        (lambda: Muon([X]).load_state_dict({}), "the state dict has no param_groups; load one of"),
        (
            lambda: Muon([("w", X)], views={"v": lambda p: p}),
            "views has v, expected names of parameters",
        ),
        (
            lambda: view(lambda p: p[:5]),
            r"the view of w returns \[\(5, 4\)\], expected views \(\*, n, m\)",
        ),
        (lambda: view(lambda p: p.view(5, -1)), r"the view of w, of shape \(6, 4\), fails: shape"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_module_of_parameters_is_no_mistake():
    p = torch.nn.Parameter(X.clone())
    (group,) = Muon(torch.nn.ParameterList([p])).param_groups
    assert group["params"] == [p]


def test_a_step_takes_the_coefficients_given():
    for coefficients in ((2.0, -1.5, 0.5), [COEFFICIENTS, (2.0, -1.5, 0.5)], "polar_express"):
        p = torch.zeros(20, 30).requires_grad_()
        p.grad = torch.randn(20, 30)
        Muon([p], 1.0, 0.0, momentum=0.0, nesterov=False, ns_coefficients=coefficients).step()
        assert_close(-p.detach(), orthogonalize(p.grad, coefficients).float(), rtol=0, atol=0)


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1, dtype=torch.float64)])
def test_an_update_does_not_depend_on_the_other_parameters(lr):
    torch.manual_seed(0)
    start, gradient = torch.randn(40, 30), torch.randn(40, 30)
    found = []
    for others in ([], [torch.randn(30, 90)], [torch.randn(30, 30).bfloat16()]):
        p = start.clone().requires_grad_()
        p.grad = gradient.clone()
        others = [other.requires_grad_() for other in others]
        fill_gradients(others)
        Muon([p, *others], lr).step()
        found.append(p.detach())
    assert all(torch.equal(one, found[0]) for one in found)


def test_a_rate_in_bfloat16_keeps_the_decay():
    p = torch.full((4, 4), 100.0).requires_grad_()
    p.grad = torch.zeros(4, 4)
    Muon([p], torch.tensor(0.01, dtype=torch.bfloat16), weight_decay=0.1).step()
    # 0.01 has 8 bits.
    assert_close(p.detach(), torch.full((4, 4), 99.9), rtol=0, atol=0.1 * 2**-8)


def test_vmap_orthogonalises_each():
    torch.manual_seed(0)
    x = torch.randn(3, 20, 30)
    for found, one in zip(torch.vmap(orthogonalize)(x), x, strict=True):
        # Sums in other orders.
        assert (found.double() - exact(one)).norm() <= 4 * (torchs(one) - exact(one)).norm()
