# SPDX-License-Identifier: MIT
"""float32 layers and symmetric products by oneDNN: values, gradients, and what stays with
PyTorch."""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import assert_accurate, bits, error, halves, normal, to_numpy
from test_symmetric_matmul import contract
from test_symmetric_matmul import operands as symmetric
from torch import Tensor
from torch.func import jvp, vmap
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import torchpar
from benchmarks.records import OPERATORS
from torchpar.nn import Linear, LinearReLU, LinearSigmoid
from torchpar.ops import cpu, processor
from torchpar.ops.cpu import linear
from torchpar.testing import check_operator

LINEAR_SIGMOID = OPERATORS["linear_sigmoid"]


LAYERS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], int]] = {
    # ours, PyTorch's, and roundings of a result: linear's sum and bias, linear_sigmoid's as in its
    # record
    "linear": (linear, F.linear, 2),
    "linear_sigmoid": (torchpar.linear_sigmoid, LINEAR_SIGMOID.native, LINEAR_SIGMOID.roundings),
}
# A second derivative multiplies up to five factors that are rounded like the first, and adds two
# terms.
SECOND = 12
AWKWARD = (129, 265, 127)  # two chains, of 133 and of 132 terms


@pytest.fixture
def on_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor whose oneDNN is faster than its BLAS library, with bfloat16."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("oneDNN is not in this build of PyTorch")
    monkeypatch.setattr(processor, "prefers_onednn", lambda: True)
    monkeypatch.setattr(sys.modules["torchpar.ops.linear_sigmoid"], "has_bfloat16", lambda: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch, on_onednn: None) -> list[list[int]]:
    """The lengths of the chains of oneDNN's products, which takes small float32 layers on a CPU,
    too."""
    products: list[list[int]] = []
    in_chains = cpu.in_chains

    def recorded(terms: list[Any], *bias: Any) -> Tensor:
        products.append([a.shape[1] for a, _ in terms])
        return in_chains(terms, *bias)

    monkeypatch.setattr(cpu, "_MIN_PRODUCT", 1)
    monkeypatch.setattr(cpu, "_LEAST_ROWS", 1)
    monkeypatch.setattr(cpu, "in_chains", recorded)
    return products


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> str:
    return request.param


def operands(m: int | tuple[int, ...], k: int, n: int, bias: bool = True) -> tuple[Tensor, ...]:
    """float32 x, weight and bias. Where results are few, sums are exact: an error of one sum is
    chance."""
    lead = m if isinstance(m, tuple) else (m,)
    make = normal if torch.Size(lead).numel() * n >= 1000 else halves
    shapes = [(*lead, k), (n, k), (n,)][: 2 + bias]
    args = [make(*shape, dtype=torch.float32, seed=seed) for seed, shape in enumerate(shapes)]
    return args[0], args[1] / max(k, 1) ** 0.5, *args[2:]


def first(op: Callable[..., Tensor], args: tuple[Tensor, ...]) -> list[Tensor]:
    """The result and the gradients of ``args``."""
    leaves = [arg.clone().requires_grad_() for arg in args]
    y = op(*leaves)
    incoming = normal(*y.shape, dtype=torch.float32, seed=9).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, incoming)]


def second(op: Callable[..., Tensor], args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Second derivatives by ``args`` and by the incoming gradient, and gradients of a batch."""
    leaves = [arg.clone().requires_grad_() for arg in args]
    y = op(*leaves)
    batch = normal(3, *y.shape, dtype=torch.float32, seed=9).to(y.dtype).requires_grad_()
    gradients = torch.autograd.grad(y, leaves, batch[0], create_graph=True)
    total = sum(g.square().sum() for g in gradients)
    again = torch.autograd.grad(total, (*leaves, batch), retain_graph=True, materialize_grads=True)
    return *again, *torch.autograd.grad(y, leaves, batch.detach(), is_grads_batched=True)


def compare(
    name: str, args: tuple[Tensor, ...], results: Any = first, roundings: int | None = None
) -> None:
    """``results`` of the layer have at most twice the error of those of PyTorch's operators."""
    ours, native, own = LAYERS[name]
    exact = results(native, tuple(arg.double() for arg in args))
    for a, n, e in zip(results(ours, args), results(native, args), exact, strict=True):
        assert (a.shape, a.dtype) == (n.shape, n.dtype)
        assert_accurate(a, n, to_numpy(e), roundings or own)


@pytest.mark.parametrize(
    "sizes", [(1, 264, 129), AWKWARD, ((), 265, 127), ((3, 43), 529, 127)], ids=str
)
def test_a_layer_is_as_accurate_as_pytorchs(
    layer: str, sizes: Any, onednn: list[list[int]]
) -> None:
    for args in (operands(*sizes), operands(*sizes, bias=False)):
        onednn.clear()
        compare(layer, args)
        # Of y, dL/dx and dL/dW.
        terms = (sizes[1], sizes[2], torch.Size(args[0].shape[:-1]).numel())
        assert [len(chains) for chains in onednn] == [-(-k // cpu.CHAIN) for k in terms]
        with torch.no_grad():
            again = LAYERS[layer][0](*args)
        assert torch.equal(bits(again), bits(first(LAYERS[layer][0], args)[0]))


def test_second_derivatives_and_batches(layer: str, onednn: list[list[int]]) -> None:
    compare(layer, operands(*AWKWARD), second, SECOND)
    assert onednn


RULES = (
    *(
        "layouts and sizes",
        "low precision",
        "incoming gradients of any layout",
        "batched gradients",
    ),
    *("forward mode", "vmap over all operands", "tensor subclass", "torch.compile"),
)


def test_every_part_of_pytorch_takes_a_layer(layer: str, onednn: list[list[int]]) -> None:
    ours, native, _ = LAYERS[layer]
    # Sums of products are exact; σ is saturated nowhere.
    sample = tuple(halves(*t.shape, dtype=t.dtype) / 16 for t in operands(*AWKWARD))
    table = check_operator(ours, [sample], reference=native, rules=RULES)
    assert {row.outcome for row in table.rows} <= {"works", "falls back"}, str(table)
    assert 2 in map(len, onednn)


def test_compilers_and_autocast_are_pytorchs(layer: str, onednn: list[list[int]]) -> None:
    ours, native, _ = LAYERS[layer]
    args = operands(*AWKWARD)
    assert torch.equal(
        torch.compile(ours, backend="aot_eager", fullgraph=True)(*args), native(*args)
    )
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = ours(*args), native(*args)
    assert found.dtype == torch.bfloat16
    assert_accurate(found, expected, to_numpy(native(*(arg.double() for arg in args))), 2)
    torch.testing.assert_close(jvp(linear, args, args), jvp(F.linear, args, args))
    torch.testing.assert_close(vmap(linear, (0, None, None))(*args), F.linear(*args))
    assert onednn == []


def test_other_operands_of_a_linear_layer_are_pytorchs(onednn: list[list[int]]) -> None:
    x, weight, bias = operands(*AWKWARD)
    for args in (
        (x, weight, bias[:1]),
        (x, weight, bias[0]),
        (x, weight, bias.expand(129, 127)),
        (x, weight[0]),
        (x.to_sparse(), weight),
    ):
        leaves = [arg.detach().requires_grad_() for arg in args]
        found, expected = (op(*leaves) for op in (linear, F.linear))
        assert torch.equal(found, expected)
        gradients = [torch.autograd.grad(y.square().sum(), leaves[1:]) for y in (found, expected)]
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert onednn == []


def names(x: Tensor, out: int = 128) -> tuple[str, ...]:
    """Names of the autograd nodes of a `Linear` and of a `LinearSigmoid`."""
    modules = (kind(x.shape[1], out, dtype=x.dtype) for kind in (Linear, LinearSigmoid))
    return tuple(type(module(x).grad_fn).__name__ for module in modules)


# Of PyTorch's own flags (2.15).
@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")
def test_only_large_float32_layers_have_an_autograd_of_their_own(
    monkeypatch: Any, on_onednn: None
) -> None:
    native = ("AddmmBackward0", "SigmoidBackward0")
    large = torch.ones(128, 784)
    # 4.01 million multiplications.
    assert names(large, 40) == ("LinearFunctionBackward", "SigmoidBackward0")
    assert names(large, 39) == native  # 3.91 million, less than `_MIN_PRODUCT`
    assert names(large.double()) == native
    # 784 is no multiple of the tiles of AMX, which some processors have.
    assert names(large[:, :768].bfloat16()) == native
    with torch.backends.mkldnn.flags(enabled=False):
        assert names(large) == native
    for module, reason, value in (
        (processor, "prefers_onednn", False),
        (torch, "get_num_threads", 6),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, reason, lambda value=value: value)
            assert names(large) == native


def test_onednn_is_for_amd_processors_from_zen_5_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for library in (torch.backends.mkldnn, torch.backends.mkl):
        monkeypatch.setattr(library, "is_available", lambda: True)
    vendors, families = ("AuthenticAMD", "GenuineIntel", ""), ("25", "26", "27", "")
    for vendor, family, capability in itertools.product(vendors, families, ("AVX512", "AVX2")):
        text = f"vendor_id : {vendor}\ncpu family : {family}"
        monkeypatch.setattr(Path, "read_text", lambda path, text=text: text)
        monkeypatch.setattr(
            torch.backends.cpu, "get_cpu_capability", lambda found=capability: found
        )
        expected = vendor == "AuthenticAMD" and family in ("26", "27") and capability == "AVX512"
        assert processor.prefers_onednn.__wrapped__() == expected


def test_large_products_are_computed_in_blocks_of_rows(
    onednn: list[list[int]], monkeypatch: Any
) -> None:
    monkeypatch.setattr(cpu, "_BLOCK", 50)
    compare("linear", operands(*AWKWARD))
    assert len(onednn) == 3 + 1 + 1  # blocks of the 129 rows of y; dL/dX and dL/dW have one chain


# Symmetric products


# PyTorch's own context manager warns of a flag that it does not change (2.15).
@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")
@pytest.mark.parametrize("shape", [(513, 1), (600, 300)], ids=str)
def test_either_library_of_the_cpu_is_right(
    shape: tuple[int, ...], onednn: list[list[int]]
) -> None:
    a, b, c = symmetric(*shape, make=normal, dtype=torch.float32)
    for enabled in (True, False):
        with torch.backends.mkldnn.flags(enabled=enabled):
            contract(a, b)
            contract(a, a, c, alpha=-2.5, beta=1 / 3)
            in_place = torchpar.symmetric_matmul(
                a, a, c, alpha=-2.5, beta=1 / 3, out=torch.empty_like(c)
            )
            assert torch.equal(in_place, torchpar.symmetric_matmul(a, a, c, alpha=-2.5, beta=1 / 3))
            assert max(itertools.chain(*onednn), default=0) <= cpu.CHAIN
            actual = torch.ops.torchpar.matmul_t_backward(c.tril(), a)
        total = c.tril() + c.tril().mT
        assert_accurate(actual, total @ a, to_numpy(total) @ to_numpy(a), roundings=3)
        assert any(onednn) == enabled
        assert max(itertools.chain(*onednn), default=0) <= cpu.CHAIN
        onednn.clear()


def test_only_large_float32_matrices_go_to_onednn(onednn: list[list[int]]) -> None:
    for n, k, dtype in ((383, 3, torch.float32), (384, 0, torch.float32), (400, 3, torch.float64)):
        torchpar.symmetric_matmul(*symmetric(n, k, dtype=dtype), beta=1)
    assert onednn == []
    torchpar.symmetric_matmul(*symmetric(512, 3, dtype=torch.float32), beta=1)
    assert onednn != []


@pytest.mark.skipif(
    not processor.prefers_onednn(),
    reason="float32 goes to oneDNN on AMD processors from Zen 5 on, for which chains were cut",
)
def test_chains_keep_pytorchs_accuracy_and_one_chain_would_lose_it(
    onednn: list[list[int]], monkeypatch
) -> None:
    x = normal(512, 2000, dtype=torch.float32)
    expected = to_numpy(x) @ to_numpy(x).T
    in_chains = error(torchpar.symmetric_matmul(x, x), expected)
    assert_accurate(torchpar.symmetric_matmul(x, x), x @ x.mT, expected)
    # Beside chains, not beside PyTorch: how MKL sums depends on the processor.
    monkeypatch.setattr(cpu, "CHAIN", 2000)
    assert error(torchpar.symmetric_matmul(x, x), expected) > 1.5 * in_chains


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_the_backward_operator_takes_chains_of_half_the_length(
    mode, onednn: list[list[int]]
) -> None:
    x, g = (normal(256, 256, dtype=torch.float32, seed=seed) for seed in (0, 1))
    with mode():
        torch.ops.torchpar.matmul_t_backward(g, x)
    assert onednn == [[128, 128]]


@pytest.mark.skipif(
    not processor.prefers_onednn(), reason="float32 goes to oneDNN on AMD processors from Zen 5 on"
)
def test_the_gradient_of_a_symmetric_product_needs_chains_of_half_the_length(
    onednn: list[list[int]], monkeypatch: Any
) -> None:
    def largest_error(op: Callable[..., Tensor]) -> float:
        errors = []
        for seed in range(8):  # the largest error of one product is chance
            x, g = (normal(256, 256, dtype=torch.float32, seed=2 * seed + i) for i in (0, 1))
            errors.append(error(op(g, x), (to_numpy(g) + to_numpy(g).T) @ to_numpy(x)))
        return max(errors)

    native = largest_error(lambda g, x: g @ x + g.mT @ x)
    assert largest_error(torch.ops.torchpar.matmul_t_backward) <= 2 * native
    assert onednn
    monkeypatch.setattr(cpu, "CHAIN", 2 * cpu.CHAIN)
    assert largest_error(torch.ops.torchpar.matmul_t_backward) > 2 * native


@pytest.mark.parametrize("shape", [(256, 784), (2, 128, 784)])
@pytest.mark.parametrize("layer", [torchpar.nn.Linear, torchpar.nn.LinearSigmoid])
def test_a_result_without_a_gradient_may_be_changed_in_place(layer, shape, onednn):
    factor = torch.tensor(3.0, requires_grad=True)
    with torch.no_grad():
        y = layer(784, 512)(torch.randn(shape))
    total = y.sum()
    y.mul_(factor).sum().backward()
    assert_close(factor.grad, total)


def test_a_mode_sees_pytorchs_products(on_onednn: None) -> None:
    """It has no rule for oneDNN's: exact arithmetic would refuse them, and a counter count 0."""
    layer, x = LinearReLU(784, 512), torch.ones(128, 784)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 128 * 784 * 512
    with torchpar.exact.mode():
        y = layer(x)
    assert y.shape == (128, 512)
