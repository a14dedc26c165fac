# SPDX-License-Identifier: MIT
"""Tests of Muon and Newton–Schulz against float64 and `torch.optim.Muon`, on one rank and on several."""

import copy
import doctest
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz
from torch.utils._python_dispatch import TorchDispatchMode

from torchpar import reference
from torchpar.optim import ChainedOptimizer, Muon, muon, newton_schulz, orthogonalize
from torchpar.optim import matrices as batches
from torchpar.optim.newton_schulz import COEFFICIENTS

TORCH = torch.optim.Muon


@pytest.fixture(autouse=True)
def bfloat16(monkeypatch):
    """Products of bfloat16, as torch's, also on a CPU where those of float32 are faster."""
    monkeypatch.setattr(newton_schulz, "has_bfloat16", lambda: True)


def torchs(x: Tensor, steps: int = 5) -> Tensor:
    return _zeropower_via_newtonschulz(x, COEFFICIENTS, steps, 1e-7).double()


def exact(x: Tensor, steps: int = 5) -> Tensor:
    return reference.orthogonalize(x.double(), steps)


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (2, 5, 8), (127, 129), (20, 3)])
def test_the_reference_applies_its_polynomial_to_the_singular_values(shape):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    u, values, vh = torch.linalg.svd(x, full_matrices=False)
    values /= values.norm(dim=-1, keepdim=True)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    # Each of five iterations multiplies a rounding error of x by at most a = 3.4445.
    rounding = max(shape) * 3.4445**5 * torch.finfo(torch.float64).eps
    torch.testing.assert_close(
        reference.orthogonalize(x), u * values.unsqueeze(-2) @ vh, rtol=0, atol=rounding
    )
    assert torch.equal(reference.orthogonalize(torch.zeros(shape)), torch.zeros(shape))


def matrices(n: int, m: int) -> Iterator[Tensor]:
    torch.manual_seed(0)
    yield torch.randn(n, m)
    u, v = torch.linalg.qr(torch.randn(n, n))[0], torch.linalg.qr(torch.randn(m, n))[0]
    yield u * torch.logspace(0, -6, n) @ v.T
    yield torch.randn(n, 4) @ torch.randn(4, m)


def assert_as_orthogonal(found: Tensor, torchs: Tensor, exact: Tensor) -> None:
    """Singular values are at most twice as far as torch's from 1 and from each other.

    This holds for all of them, and for those of directions in which x is not near 0.
    """
    values_of = [torch.linalg.svdvals(x) for x in (found, torchs, exact)]
    large = values_of[2] > 0.6
    for kept in (large, torch.ones_like(large)):
        values, torchs_values = (v[kept] for v in values_of[:2])
        assert (values - 1).abs().max() <= 2 * (torchs_values - 1).abs().max()
        assert (values - 1).norm() <= 2 * (torchs_values - 1).norm()
        assert values.max() - values.min() <= 2 * (torchs_values.max() - torchs_values.min())


def compare_orthogonality(n: int, m: int, steps: int, ns: str, coefficients: Any = COEFFICIENTS) -> None:
    """Singular values as in `assert_as_orthogonal`; the error to float64 is at most twice torch's."""
    for x in matrices(n, m):
        ideal, expected = exact(x, steps), torchs(x, steps)
        found = orthogonalize(x, coefficients, steps, ns=ns).double()
        assert_as_orthogonal(found, expected, ideal)
        assert (found - ideal).norm() <= 2 * (expected - ideal).norm()


@pytest.mark.parametrize("ns", ["standard", "gram"])
@pytest.mark.parametrize("n, m", [(64, 64), (127, 129), (129, 258), (65, 300)])
def test_orthogonality_is_no_worse_than_torchs(n, m, ns):
    compare_orthogonality(n, m, 5, ns)


@pytest.mark.parametrize("ns", ["standard", "gram"])
def test_orthogonality_of_halved_products(ns):
    with patch.object(newton_schulz, "_SYMMETRIC_ROWS", 257):
        compare_orthogonality(257, 520, 5, ns)


@pytest.mark.parametrize("ns", ["standard", "gram"])
@pytest.mark.parametrize("shape", [(64, 64), (300, 65)])
def test_products_of_float32_leave_the_rounding_of_the_result_alone(monkeypatch, ns, shape):
    monkeypatch.setattr(newton_schulz, "has_bfloat16", lambda: False)
    for x in matrices(min(shape), max(shape)):
        x = x.reshape(shape)
        found = orthogonalize(x, ns=ns)
        assert found.dtype == torch.bfloat16
        ideal = exact(x.bfloat16())  # the steps multiply a rounding of x by up to 3.4445⁵
        rounding = 2**-8 * ideal.norm()
        assert (found.double() - ideal).norm() <= 2 * rounding
        error = (torchs(x) - exact(x)).norm()
        assert (found.double() - exact(x)).norm() <= error
    with pytest.raises(AssertionError), patch.object(newton_schulz, "has_bfloat16", lambda: True):
        assert (orthogonalize(x, ns=ns).double() - ideal).norm() <= 2 * rounding


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 8])
def test_orthogonality_after_other_numbers_of_steps(steps):
    compare_orthogonality(64, 130, steps, "gram")


@cache
def hard_references(steps: int) -> list[tuple[Tensor, float, Tensor, Tensor]]:
    """Of each of the `hard_matrices` its factor, and what float64 and PyTorch make of it."""
    return [(x, factor, exact(x, steps), torchs(x, steps)) for x, factor in hard_matrices(256, 512)]


def hard_matrices(n: int, m: int) -> Iterator[tuple[Tensor, float]]:
    """Spectra for which Gram iterations lose accuracy, each with the factor that newton_schulz.py states."""
    torch.manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(n, n))[0], torch.linalg.qr(torch.randn(m, n))[0]
    for decades, factor in ((1, 1.8), (2, 6), (3, 6)):
        yield u * torch.logspace(0, -decades, n) @ v.T, factor
    for times in (2, 4):
        yield torch.randn(n // times, m).repeat(times, 1), 11


@pytest.mark.parametrize("steps", [4, 5, 8])
def test_orthogonality_of_hard_matrices(steps):
    for x, factor, ideal, expected in hard_references(steps):
        found = orthogonalize(x, steps=steps).double()
        assert_as_orthogonal(found, expected, ideal)
        assert steps != 5 or (found - ideal).norm() <= factor * (expected - ideal).norm()


def test_orthogonality_rejects_iterations_after_three_on_one_gram_matrix():
    with (
        patch.object(newton_schulz, "_iterations_per_gram", lambda *_: [2, 3, 3]),
        pytest.raises(AssertionError),
    ):
        test_orthogonality_of_hard_matrices(8)


@pytest.mark.parametrize("iterations", [[5], [2, 3], [1, 4]])
def test_orthogonality_rejects_missing_restarts(iterations):
    with (
        patch.object(newton_schulz, "_iterations_per_gram", lambda *_: iterations),
        pytest.raises(AssertionError),
    ):
        compare_orthogonality(64, 64, 5, "gram")


@pytest.mark.parametrize("ns", ["standard", "gram"])
def test_orthogonality_rejects_a_wrong_coefficient(ns):
    a, b, c = COEFFICIENTS
    with pytest.raises(AssertionError):
        compare_orthogonality(65, 300, 5, ns, (a, b, 1.03 * c))


@pytest.mark.parametrize("ns", ["standard", "gram"])
def test_any_layout(ns):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 20, 45)
    expected = orthogonalize(x, ns=ns)
    assert expected.dtype == torch.bfloat16
    for same in (torch.stack([x, x], -1)[..., 0], x.double()):
        torch.testing.assert_close(orthogonalize(same, ns=ns), expected, rtol=0, atol=0)
    torch.testing.assert_close(orthogonalize(x.mT, ns=ns), expected.mT, rtol=0, atol=0)
    by_columns = orthogonalize(x.mT.contiguous().mT, ns=ns)
    assert by_columns.mT.is_contiguous()
    for i in range(2):
        for j in range(3):
            error = (torchs(x[i, j]) - exact(x[i, j])).norm()
            for other in (by_columns[i, j], orthogonalize(x[i, j], ns=ns)):  # sums in other orders
                assert (other.double() - expected[i, j].double()).norm() <= 4 * error
    assert torch.equal(x, torch.stack([x, x], -1)[..., 0])


@pytest.mark.parametrize("ns", ["standard", "gram"])
def test_degenerate_matrices(ns):
    for shape in [(0, 5), (5, 0), (3, 0, 4), (0, 3, 4)]:
        assert orthogonalize(torch.ones(shape), ns=ns).shape == shape
    assert torch.equal(orthogonalize(torch.zeros(64, 200), ns=ns), torch.zeros(64, 200, dtype=torch.bfloat16))
    x = torch.randn(3, 7)
    assert torch.equal(orthogonalize(x, steps=0, ns=ns), (x.bfloat16() / x.bfloat16().norm()))


def test_auto_takes_the_faster():
    assert newton_schulz._iterations_per_gram(255, 4096, 5, "auto") == [1] * 5
    assert newton_schulz._iterations_per_gram(256, 511, 5, "auto") == [1] * 5
    assert newton_schulz._iterations_per_gram(256, 512, 5, "auto") == [2, 3]
    assert newton_schulz._iterations_per_gram(256, 511, 5, "gram") == [2, 1, 1, 1]
    assert newton_schulz._iterations_per_gram(256, 512, 5, "standard") == [1] * 5
    for steps in range(20):
        for n, m in [(300, 300), (300, 600), (300, 1200)]:
            assert sum(newton_schulz._iterations_per_gram(n, m, steps, "gram")) == steps


SHAPES = [(20, 30), (30, 20), (20, 30), (16, 80), (33, 33), (90, 17)]
ITERATION = "torch.optim._muon._zeropower_via_newtonschulz"


def fill_gradients(params: list[Tensor]) -> None:
    for p in params:
        p.grad = torch.randn_like(p)


def run(
    *kinds: Callable[..., TORCH],
    dtype: torch.dtype = torch.float32,
    carry: Callable[[dict[str, Any]], dict[str, Any]] = copy.deepcopy,
    **arguments: Any,
) -> list[Tensor]:
    """The parameters after three steps of each kind of optimizer, which loads the state of the one before.

    The gradients do not depend on the parameters, so that every run orthogonalises the same matrices.
    """
    torch.manual_seed(0)
    params = [torch.randn(shape, dtype=dtype).requires_grad_() for shape in SHAPES]
    state = None
    for kind in kinds:
        optimizer = kind(params, **{"lr": 0.1, **arguments})
        if state is not None:
            optimizer.load_state_dict(carry(state))
        for _ in range(3):
            fill_gradients(params)
            optimizer.step()
        state = optimizer.state_dict()
    return [p.detach().double() for p in params]


def compare_runs(*kinds: Callable[..., TORCH], **arguments: Any) -> None:
    """Parameters are at most twice as far as torch's from those of an orthogonalisation in float64."""
    found = run(*kinds, **arguments)
    arguments.pop("carry", None)
    expected = run(*[TORCH] * len(kinds), **arguments)
    with patch(ITERATION, lambda x, coefficients, steps, eps: exact(x, steps).to(x.dtype)):
        ideal = run(*[TORCH] * len(kinds), **arguments)
    for x, y, z in zip(found, expected, ideal, strict=True):
        assert (x - z).norm() <= 2 * (y - z).norm()


def gram(params: Any, **arguments: Any) -> Muon:
    return Muon(params, ns="gram", **arguments)


@pytest.mark.parametrize("ours", [Muon, gram])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"nesterov": False, "momentum": 0.5},
        {"weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw", "ns_steps": 4},
        {"dtype": torch.float64, "eps": 1e-3},
        {"dtype": torch.bfloat16},
        {"lr": torch.tensor(0.1)},
    ],
)
def test_steps_are_torchs(ours, arguments):
    compare_runs(ours, **arguments)


@pytest.mark.parametrize("ours", [Muon, gram])
def test_checkpoints_interchange_with_torchs(ours):
    compare_runs(TORCH, ours)
    compare_runs(ours, TORCH)


def test_the_comparison_of_runs_rejects_a_lost_momentum():
    with pytest.raises(AssertionError):
        compare_runs(TORCH, Muon, carry=lambda state: {**state, "state": {}})


@pytest.mark.parametrize(
    "wrong", [{"lr": 0.11}, {"weight_decay": 0.11}, {"nesterov": False}, {"ns_steps": 4}]
)
def test_the_comparison_of_runs_rejects(wrong):
    with pytest.raises(AssertionError):
        compare_runs(lambda params, **arguments: Muon(params, **{**arguments, **wrong}))


@pytest.mark.parametrize("name", ["original", "match_rms_adamw", "spectral_unclamped"])
def test_every_adjustment_is_torchs(name):
    try:
        TORCH([torch.zeros(2, 2)], adjust_lr_fn=name)
    except ValueError:
        pytest.skip(f"torch.optim.Muon of PyTorch {torch.__version__} has no {name}")
    compare_runs(Muon, adjust_lr_fn=name)


def test_an_unknown_adjustment_is_refused():
    with pytest.raises(ValueError, match="adjust_lr_fn is 'unknown', expected None, 'original'"):
        Muon([torch.zeros(2, 2)], adjust_lr_fn="unknown")


def test_the_state_dict_is_torchs():
    params = [torch.randn(shape).requires_grad_() for shape in SHAPES]
    fill_gradients(params)
    ours, theirs = Muon(params, ns="gram"), TORCH(params)
    for optimizer in (ours, theirs):
        optimizer.step()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    assert copy.deepcopy(ours).ns == "gram"


@contextmanager
def record_batches() -> Iterator[list[tuple[int, ...]]]:
    """A list of the shapes that `Muon` orthogonalises meanwhile."""
    shapes: list[tuple[int, ...]] = []

    def recorded(x: Tensor, *arguments: Any) -> Tensor:
        shapes.append((1, *x.shape)[-3:])
        return orthogonalize(x, *arguments)

    with patch.object(batches, "orthogonalize", recorded):
        yield shapes


def test_matrices_of_one_shape_are_orthogonalised_together():
    params = [torch.randn(s).requires_grad_() for s in [(20, 30), (30, 20), (33, 33), (20, 30), (20, 30)]]
    params.append(torch.randn(33, 33, dtype=torch.float64).requires_grad_())
    fill_gradients(params)
    for work, expected in [
        (batches._BATCH_MULTIPLICATIONS, [(3, 20, 30), (1, 30, 20), (1, 33, 33), (1, 33, 33)]),
        (2 * 20 * 20 * 30, [(2, 20, 30), (1, 20, 30), (1, 30, 20), (1, 33, 33), (1, 33, 33)]),
        (1, [(1, 20, 30)] * 3 + [(1, 30, 20), (1, 33, 33), (1, 33, 33)]),
    ]:
        with record_batches() as shapes, patch.object(batches, "_BATCH_MULTIPLICATIONS", work):
            Muon(params).step()
        assert shapes == expected


def test_padded_batches_hold_matrices_of_unequal_shapes():
    """As on a GPU; each ends where it does alone, up to sums in another order."""
    torch.manual_seed(0)
    params = [torch.randn(s).requires_grad_() for s in [(20, 30), (64, 64), (33, 5), (70, 10), (200, 300)]]
    alone = [p.detach().clone().requires_grad_() for p in params]
    fill_gradients(params)
    for p, q in zip(params, alone, strict=True):
        q.grad = p.grad
    Muon(alone, lr=1.0, ns="standard").step()
    with record_batches() as shapes, patch.object(batches, "_PADDING_DEVICE", "cpu"):
        Muon(params, lr=1.0, ns="standard").step()
    assert shapes == [(3, 64, 64), (1, 128, 64), (1, 200, 300)]
    for p, q in zip(params, alone, strict=True):
        # Five iterations of three products round to bfloat16, each times the rate.
        torch.testing.assert_close(p, q, rtol=0, atol=max(1, p.shape[0] / p.shape[1]) ** 0.5 * 15 * 2**-8)


def test_a_step_moves_parameters_with_a_gradient_and_returns_the_loss():
    p, other = torch.randn(4, 6).requires_grad_(), torch.randn(4, 6).requires_grad_()
    before = other.detach().clone()
    optimizer = Muon([p, other], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    loss = closure().item()
    assert optimizer.step(closure).item() == loss
    assert p.square().sum() < loss
    assert torch.equal(other, before)
    optimizer.zero_grad()
    assert optimizer.step() is None


class NoReading(TorchDispatchMode):
    """Refuse to copy a value from a device to Python."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("lr", [0.1, torch.tensor([0.1])])
def test_a_step_reads_nothing_back(lr):
    params = [torch.randn(shape).requires_grad_() for shape in SHAPES]
    for kind in (Muon, gram):
        optimizer = kind(params, lr=lr)
        fill_gradients(params)
        with NoReading():
            optimizer.step()
    if isinstance(lr, Tensor):
        with pytest.raises(AssertionError), NoReading():
            TORCH(params, lr=lr).step()


def test_the_parameters_are_torchs():
    """A torch with other parameters fails this test: write them out in Muon too."""
    ours, theirs = (inspect.signature(kind).parameters for kind in (Muon, TORCH))
    described = [[(p.name, p.kind, p.default) for p in kind.values()] for kind in (ours, theirs)]
    assert described[0][: len(theirs)] == described[1]
    assert list(ours)[len(theirs) :] == ["ns", "views", "process_group"]
    with pytest.raises(TypeError, match="momentm"):
        Muon([torch.zeros(2, 2)], momentm=0.3)


def test_the_example_prints_its_table_and_trains_every_parameter():
    (example,) = doctest.DocTestFinder(recurse=False).find(Muon.for_model, "for_model", module=muon)
    names: dict[str, Any] = {"Muon": Muon, "torch": torch}
    example.globs = names
    assert doctest.DocTestRunner().run(example, clear_globs=False) == (0, len(example.examples))
    model, chain = names["model"], names["optimizer"]
    model(torch.arange(10)).square().mean().backward()
    before = copy.deepcopy(model.state_dict())
    chain.step()
    assert all(not torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert str(copy.deepcopy(chain)) == str(chain)


class Model(torch.nn.Module):
    """A bit of everything: tables, convolutions, blocks with attention, norms, and a head that is shared."""

    def __init__(self, blocks: int = 2, tied: bool = False):
        super().__init__()
        self.tokens = torch.nn.Embedding(50, 16)
        self.position = torch.nn.Parameter(torch.randn(10, 16))
        self.mixing = torch.nn.Parameter(torch.randn(16, 16))
        self.conv = torch.nn.Conv2d(3, 8, 3)
        self.column = torch.nn.Parameter(torch.randn(16, 1))
        self.norm = torch.nn.LayerNorm((4, 16))
        self.stack = torch.nn.Parameter(torch.randn(4, 16, 8))
        layer = partial(torch.nn.TransformerEncoderLayer, 16, nhead=4, dim_feedforward=32)
        self.blocks = torch.nn.ModuleList([layer() for _ in range(blocks)])
        self.head = torch.nn.Linear(16, 50)
        if tied:
            self.head.weight = self.tokens.weight


def choices(model: torch.nn.Module, **arguments: Any) -> dict[str, str]:
    return {one.name: one.choice for one in Muon.for_model(model, **arguments).assignments}


def test_muon_gets_the_hidden_matrices_alone():
    by_muon = [name for name, choice in choices(Model()).items() if choice == "muon"]
    blocks = [
        f"blocks.{i}.{name}.weight" for i in range(2) for name in ("self_attn.out_proj", "linear1", "linear2")
    ]
    attention = [f"blocks.{i}.self_attn.in_proj_weight" for i in range(2)]
    assert sorted(by_muon) == sorted(["mixing", "conv.weight", *blocks, *attention])
    tied = choices(Model(tied=True))
    assert tied["tokens.weight"] == "others"
    assert "head.weight" not in tied
    headless = Model()
    del headless.head
    assert choices(headless)["blocks.1.linear2.weight"] == "muon"  # one of several blocks
    chain = Muon.for_model(Model(), lr=0.02, others=partial(torch.optim.SGD, lr=0.5, weight_decay=0.1))
    own, others = chain.optimizers
    assert (own.defaults["lr"], type(others)) == (0.02, torch.optim.SGD)
    assert [group["weight_decay"] for group in others.param_groups] == [0.1, 0.0]
    assert {p.dim() > 1 for p in others.param_groups[1]["params"]} == {False}


def test_choices_can_be_overridden():
    model = Model()
    found = choices(
        model, overrides={"blocks.*": "others", "blocks.1.linear1.weight": "muon", "tokens.weight": "muon"}
    )
    by_muon = [name for name, choice in found.items() if choice == "muon"]
    assert sorted(by_muon) == ["blocks.1.linear1.weight", "conv.weight", "mixing", "tokens.weight"]
    assert choices(model, views={"stack": lambda p: p})["stack"] == "muon"
    for wrong, text in [
        ({"overrides": {"block.*": "muon"}}, "no parameter is named block"),
        ({"views": {"stak": lambda p: p}}, "no parameter is named stak"),
        ({"overrides": {"stack": "adam"}}, "stack goes to 'adam', expected 'muon' or 'others'"),
        ({"overrides": {"*": "others"}}, "the model has no hidden matrix"),
        ({"overrides": {"stack": "muon"}}, r"stack has shape \(4, 16, 8\), expected 2D"),
    ]:
        with pytest.raises(ValueError, match=text):
            Muon.for_model(model, **wrong)


def test_views_are_orthogonalised_one_by_one():
    """Of a convolution, of attention, and of matrices of unequal shapes; each at its own rate."""
    torch.manual_seed(0)
    conv, attention = torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.MultiheadAttention(12, 3, bias=False)
    joint = torch.nn.Parameter(torch.randn(11, 6))
    model = torch.nn.ParameterDict({"joint": joint})
    model.conv, model.attention = conv, attention
    model.head = torch.nn.Linear(2, 2)
    optimizer = Muon.for_model(
        model,
        lr=0.1,
        weight_decay=0.0,
        ns="standard",
        views={"joint": lambda p: (p[:8].view(2, 4, 6), p[8:])},
    )
    apart = []
    for p, matrices in [
        (conv.weight, lambda p: [p.flatten(1)]),
        (attention.in_proj_weight, lambda p: p.chunk(3)),
        (joint, lambda p: [p[:4], p[4:8], p[8:]]),
    ]:
        p.grad = torch.randn_like(p)
        for part, gradient in zip(matrices(p.detach()), matrices(p.grad), strict=True):
            alone = part.clone().requires_grad_()
            alone.grad = gradient.clone()
            Muon([alone], lr=0.1, weight_decay=0.0, ns="standard").step()
            apart.append((part, alone))
    optimizer.step()
    for part, alone in apart:
        # Rounded to bfloat16; a ratio of rates rounds once more, and a batch may add in another order.
        torch.testing.assert_close(part, alone.detach(), rtol=0, atol=0.1 * 1.5 * 4 * 2**-8)


def test_other_strides_change_no_update():
    torch.manual_seed(0)
    usual = torch.nn.Conv2d(8, 16, 3, bias=False)
    strided = copy.deepcopy(usual).to(memory_format=torch.channels_last)
    usual.weight.grad = 1000 * torch.randn(16, 8, 3, 3)
    strided.weight.grad = usual.weight.grad.to(memory_format=torch.channels_last)
    for conv in (usual, strided):
        Muon([("kernels", conv.weight)], lr=0.1, views={"kernels": lambda p: p.flatten(1)}).step()
    torch.testing.assert_close(strided.weight, usual.weight, rtol=0, atol=0)


def test_heads_of_unlike_parts_are_found():
    linear, relu = partial(torch.nn.Linear, 8, 8), torch.nn.ReLU
    features, classifier = torch.nn.Sequential(linear(), relu()), torch.nn.Sequential(relu(), linear())
    found = choices(torch.nn.Sequential(features, torch.nn.Sequential(linear(), relu()), classifier))
    assert [name for name, choice in found.items() if choice == "muon"] == ["0.0.weight", "1.0.weight"]
    shared = choices(Model(tied=True), overrides={"head.weight": "muon"})
    assert shared["tokens.weight"] == "muon"
    named = torch.nn.ParameterDict({"composite": torch.randn(3, 4), "pos_table": torch.randn(3, 4)})
    assert choices(named) == {"composite": "muon", "pos_table": "others"}


def test_a_refused_group_is_not_added_and_an_empty_parameter_is_no_gap():
    p, q = torch.randn(4, 5).requires_grad_(), torch.randn(0, 5).requires_grad_()
    optimizer = Muon([{"params": [p]}, {"params": [q]}])
    with pytest.raises(ValueError, match="expected 2D"):
        optimizer.add_param_group({"params": [torch.zeros(3)]})
    assert len(optimizer.param_groups) == 2
    fill_gradients([p, q])
    optimizer.step()
    assert len(optimizer.state_dict()["state"]) == 2


@pytest.mark.parametrize(
    "view", [lambda p: p[:5], lambda p: p.clone(), lambda p: [p, p[:1]], lambda p: p.flatten()]
)
def test_a_view_has_each_element_once(view):
    Muon([("weight", torch.randn(6, 4))], views={"weight": lambda p: p.mT})
    with pytest.raises(ValueError, match=r"the view of weight returns .*, expected views \(\*, n, m\)"):
        Muon([("weight", torch.randn(6, 4))], views={"weight": view})


def test_a_view_that_fails_is_named_and_its_group_not_added():
    optimizer = Muon([("weight", torch.randn(6, 4))], views={"weight": lambda p: p.mT})
    with pytest.raises(ValueError, match=r"the view of qkv, of shape \(6, 4\), fails: shape '\[5, -1\]' is"):
        Muon([("qkv", torch.randn(6, 4))], views={"qkv": lambda p: p.view(5, -1)})
    with pytest.raises(TypeError):
        optimizer.add_param_group({"params": [("other", torch.randn(6, 4))], "ns_steps": "3"})
    assert len(optimizer.param_groups) == 1
    optimizer = Muon([("weight", torch.randn(6, 4))], views={"weight": lambda p: p.mT})
    optimizer.views = {"other": lambda p: p.view(2, 3, 4)}
    for ns_steps, refused in (("3", pytest.raises(TypeError)), (5, nullcontext())):
        with refused:
            name = "other" if ns_steps == "3" else "without a view"
            optimizer.add_param_group({"params": [(name, torch.randn(6, 4))], "ns_steps": ns_steps})
    assert [item.view is None for item in optimizer._items()] == [False, True]


def test_views_stay_where_a_state_dict_has_other_names():
    steps = []
    for name in ("qkv", "module.qkv"):
        p = torch.arange(24.0).view(6, 4).sin().requires_grad_()
        optimizer = Muon([("qkv", p)], views={"qkv": lambda p: p.view(2, 3, 4)})
        saved = Muon([(name, p)], views={name: lambda p: p.view(2, 3, 4)}).state_dict()
        optimizer.load_state_dict(saved)
        for one in (optimizer, copy.deepcopy(optimizer)):
            p = one.param_groups[0]["params"][0]
            p.grad = torch.arange(24.0).view(6, 4).cos()
            one.step()
            steps.append(p.detach())
    for p in steps[1:]:
        assert torch.equal(p, steps[0])


def test_a_copy_of_an_optimizer_without_parameters_steps():
    assert copy.deepcopy(Muon([{"params": []}])).step() is None


def test_a_group_that_would_be_left_out_is_named():
    p, q = torch.randn(3, 4).requires_grad_(), torch.randn(3, 4).requires_grad_()
    optimizer = Muon([{"params": [("first", p)]}, {"params": [("second", q)]}])
    optimizer.step()  # nothing has a gradient: nothing is left out
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"no parameter of group 1 has a gradient \(second, …\)"):
        optimizer.step()
    q.requires_grad_(False)
    optimizer.step()


def test_momentum_without_nesterov_stays_as_it_is_in_bfloat16():
    """`torch.optim.Muon` of PyTorch 2.11 divides it by its norm, in place (pytorch#190597)."""
    torch.manual_seed(0)
    momenta = []
    for kind in (Muon, TORCH):
        p = torch.zeros(8, 16, dtype=torch.bfloat16).requires_grad_()
        p.grad = torch.full_like(p, 3.0)
        optimizer = kind([p], momentum=0.5, nesterov=False)
        optimizer.step()
        momenta.append(optimizer.state[p]["momentum_buffer"])
    assert torch.equal(momenta[0], torch.full_like(momenta[0], 1.5))
    copies = "copy=True" in inspect.getsource(_zeropower_via_newtonschulz)  # as that of 2.15
    assert torch.equal(momenta[1], momenta[0]) == copies


@pytest.mark.parametrize("shape", [(64, 64), (65, 300)])
def test_polar_express_ends_nearer_to_1(shape):
    for x in matrices(*shape):
        ideal = torch.linalg.svdvals(exact(x))
        large = ideal > 0.6  # directions that the usual coefficients raise
        spread = {}
        for coefficients in (COEFFICIENTS, "polar_express"):
            values = torch.linalg.svdvals(orthogonalize(x, coefficients, 8, ns="standard").double())
            spread[coefficients] = (values[large] - 1).abs().max()
        assert spread["polar_express"] < spread[COEFFICIENTS] / 2


def test_coefficients_of_each_iteration():
    x = torch.randn(20, 30)
    one, other = COEFFICIENTS, (2.0, -1.5, 0.5)
    expected = x.bfloat16() / x.bfloat16().norm()
    for a, b, c in (one, other, other):
        r = expected @ expected.mT
        expected = a * expected + (b * r + c * r @ r) @ expected
    for ns in ("standard", "gram"):
        found = orthogonalize(x, [one, other], 3, ns=ns)
        assert (found.double() - expected.double()).norm() <= 0.02 * expected.double().norm()
    with pytest.raises(ValueError, match="expected 3"):
        orthogonalize(x, [one, (1.0, 2.0)])
    assert len(Muon([x.requires_grad_()], ns_coefficients="polar_express").param_groups) == 1


def test_a_chain_of_optimizers_is_one():
    """It can be copied, takes a closure, and refuses a group, which none of its optimizers would step."""
    p, q = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    chain = ChainedOptimizer(torch.optim.SGD([p], lr=0.1), torch.optim.SGD([q], lr=0.2))
    copied = copy.deepcopy(chain)
    for optimizer in (chain, copied):
        (a,), (b,) = (group["params"] for group in optimizer.param_groups)

        def closure(a: torch.Tensor = a, b: torch.Tensor = b) -> torch.Tensor:
            loss = (a + 2 * b).sum()
            loss.backward()
            return loss

        assert optimizer.step(closure).item() == 6
        torch.testing.assert_close(a, torch.full((2,), 0.9))
        torch.testing.assert_close(b, torch.full((2,), 0.6))
    with pytest.raises(NotImplementedError, match="add the group to one of its optimizers"):
        chain.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})


def test_a_chain_of_optimizers_keeps_their_state():
    p, q, r = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    members = torch.optim.SGD([p], lr=0.1, momentum=0.9), torch.optim.SGD([q], lr=0.1, momentum=0.5)
    for _ in range(2):
        for t in (p, q):
            t.grad = torch.ones(2)
        for member in members:
            member.step()
    chain = ChainedOptimizer(*members)
    torch.testing.assert_close(chain.state[p]["momentum_buffer"], torch.full((2,), 1.9))
    torch.testing.assert_close(chain.state[q]["momentum_buffer"], torch.full((2,), 1.5))
    saved = chain.state_dict()
    members[0].add_param_group({"params": [r]})
    with pytest.raises(RuntimeError, match="a group was added to one of its optimizers; make a new chain"):
        chain.load_state_dict(saved)
    assert len(ChainedOptimizer(*members).state) == 2


def test_refusals():
    for kind in (orthogonalize, lambda x, ns: Muon([x], ns=ns)):
        with pytest.raises(ValueError, match="ns is 'gramm', expected 'auto', 'standard' or 'gram'"):
            kind(torch.randn(3, 4), ns="gramm")
    for x in (torch.randn(3), torch.ones(3, 4, dtype=torch.int64), torch.ones(3, 4, dtype=torch.complex64)):
        with pytest.raises(ValueError, match=r"x is .*, expected floating \(\*, n, m\)"):
            orthogonalize(x)
    with pytest.raises(ValueError, match=r"2 coefficients, expected 3"):
        orthogonalize(torch.randn(3, 4), (1.0, 2.0))
    for steps in (-1, 100):
        with pytest.raises(ValueError, match=f"steps is {steps}, expected 0 to 99"):
            orthogonalize(torch.randn(3, 4), steps=steps)
    with pytest.raises(ValueError, match="2D"):
        Muon([torch.randn(3)])
