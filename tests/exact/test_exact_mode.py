# SPDX-License-Identifier: MIT
"""torchpar.exact.mode: values against float64, bits on every processor, decoding, and refusals."""

import inspect
import math
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from architectures import make_model
from exact_bits import Layers
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor

import torchpar
from torchpar import exact, linear_sigmoid
from torchpar.errors import ConfigError
from torchpar.exact.random import philox

# Values


def ulps(found: Tensor, expected: Tensor) -> float:
    """The largest distance in units of float32's last place, where the result is a normal
    number."""
    unit = torch.exp2(expected.abs().clamp(min=2.0**-126).log2().floor() - 23)
    return ((found.double() - expected).abs() / unit).max().item()


X = torch.cat(
    [torch.linspace(-9, 9, 20001), torch.logspace(-30, 1, 999), -torch.logspace(-30, 1, 999)]
)
POSITIVE = X.abs().clamp(min=2.0**-100)  # without AVX2 one number of X is 0
UNIT = torch.linspace(-0.999, 0.999, 4001)
# 64 bits cannot hold its sum, nor that of the squares.
LONG = (torch.arange(3 * 2**22) % 3 + 5) / 7.5
# Rounding once is half a unit; GELU's tail multiplies by a number with an absolute error.
FUNCTIONS: dict[str, tuple[Any, Tensor, float]] = {
    "exp": (torch.exp, X, 0.51),
    "exp2": (torch.exp2, X, 0.51),
    "expm1": (torch.expm1, X, 0.51),
    "log": (torch.log, POSITIVE, 0.51),
    "sigmoid": (torch.sigmoid, X, 0.51),
    "tanh": (torch.tanh, X, 0.51),
    "sin": (torch.sin, 1000 * X, 0.51),
    "cos": (torch.cos, 1000 * X, 0.51),
    "erf": (torch.erf, X, 0.51),
    "rsqrt": (torch.rsqrt, POSITIVE, 0.51),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.125), X, 0.51),
    "silu": (F.silu, X, 0.51),
    "softplus of beta 2.5": (lambda x: F.softplus(x, 2.5), X, 0.51),
    "pow": (lambda x: x**1.7, X.abs().clamp(min=2.0**-40), 0.51),
    "log1p": (torch.log1p, torch.cat([X[X > -1], UNIT]), 0.51),
    "erfinv": (torch.erfinv, UNIT, 0.51),
    "logsumexp": (lambda x: x.view(-1, 1999).logsumexp(1), X[: 11 * 1999], 0.51),
    "softplus_backward": (lambda x: torch.func.grad(lambda x: F.softplus(x).sum())(x), X, 0.51),
    "norm": (lambda x: x.view(-1, 1999).norm(dim=1), X[: 11 * 1999] * 1e-19, 0.51),
    "norm of subnormal numbers": (lambda x: x.norm(dim=0, keepdim=True), X[:999] * 1e-42, 0.51),
    "norm of 12 million": (lambda x: x.norm(dim=0, keepdim=True), LONG, 0.51),
    "sum to one place": (
        lambda x: x.new_zeros(1).index_add(0, torch.zeros_like(x).int(), x),
        LONG,
        0.51,
    ),
    "power": (lambda x: x**3, X.abs().clamp(min=2.0**-40), 0.51),
    # These round twice.
    "std": (lambda x: x.view(-1, 1999).std(1), X[: 11 * 1999], 1.01),
    "mse_loss": (lambda x: F.mse_loss(x, x.flip(0)), X, 1.01),
    "index_add": (lambda x: x.index_add(0, torch.arange(len(x)) % 7, x), X.abs(), 1.01),
    "scatter_add": (lambda x: x.scatter_add(0, torch.arange(len(x)) % 7, x), X.abs(), 1.01),
}


LONGEST = ("norm of 12 million", "sum to one place")  # which are slow tests


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONGEST)) for name in FUNCTIONS]
)
def test_functions_round_once(name):
    function, x, bound = FUNCTIONS[name]
    with exact.mode():
        found = function(x)
    assert ulps(found, function(x.double())) <= bound


def test_functions_of_unusual_numbers():
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45])
    for name in ("exp", "exp2", "log", "sigmoid", "tanh", "sin", "erf", "rsqrt"):
        with exact.mode():
            found = getattr(torch, name)(x)
        expected = getattr(torch, name)(x)
        torch.testing.assert_close(
            found, expected, equal_nan=True, rtol=1e-6, atol=0, msg=f"{name}: {found}"
        )
    with exact.mode():
        assert [t.norm().item() for t in (x[1:], x[3:5])] == [math.inf, 0]
    with exact.mode(), pytest.raises(ConfigError, match=r"is 2.09715e\+06, expected below"):
        torch.sin(torch.tensor([2.0**21]))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_as_near_as_torchs(approximate):
    def results(x: Tensor) -> tuple[Tensor, Tensor]:
        y, gradient = torch.func.vjp(lambda x: F.gelu(x, approximate=approximate), x)
        return y, gradient(torch.ones_like(y))[0]

    with exact.mode():
        found = results(X)
    for one, other, ideal in zip(found, results(X), results(X.double()), strict=True):
        assert (one - ideal).abs().max() <= 2 * (other - ideal).abs().max()


def products(x: Tensor, g: Tensor) -> list[Tensor]:
    """Symmetric products, and the gradients of their operands."""
    a, b, c = x.requires_grad_(), x.detach().flip(0).requires_grad_(), g.clone().requires_grad_()
    h = g.detach().clone()
    torchpar.symmetric_matmul(x.detach(), x.detach().clone(), h, alpha=0.5, beta=2.0, out=h)
    found = [
        torchpar.matmul_t(a),
        torchpar.symmetric_matmul(a, a * 1, c, alpha=0.3, beta=0.7, check=True),
        torchpar.symmetric_matmul(a @ a.mT @ a @ a.mT, a @ a.mT),
    ]
    total = sum((y * (i + g)).sum() for i, y in enumerate(found))
    b_times = torchpar.symmetric_matmul(b, b.detach() * 1)
    return [*found, h, *torch.autograd.grad(total + (b_times * g).sum(), (a, b, c))]


@pytest.mark.parametrize("rows, columns", [(0, 3), (1, 1), (5, 0), (127, 9), (9, 129)])
def test_symmetric_products_are_exact(rows: int, columns: int) -> None:
    """`matmul_t` has the bits of `exact_matmul_t`, and all equal their transposes; values and
    gradients are as near to float64 as PyTorch's."""
    generator = torch.Generator().manual_seed(rows)
    x, g = (torch.randn(rows, n, generator=generator) for n in (columns, rows))
    g = g + g.mT
    with exact.mode():
        found = [t.detach().clone() for t in products(x.clone(), g)]
        assert torch.equal(found[0], torchpar.exact_matmul_t(x))
    native, ideal = products(x.clone(), g), products(x.double(), g.double())
    for y in found[:4]:
        assert torch.equal(y, y.mT)
    for one, torchs, wide in zip(found, native, ideal, strict=True):
        assert one.shape == torchs.shape
        if one.numel():
            errors = [(t.double() - wide).abs().max() for t in (one, torchs)]
            # A term of a sum may round once more than PyTorch's fused operations do.
            assert errors[0] <= 2 * errors[1] + 2**-24 * wide.abs().max()


def test_symmetric_products_leave_terms_of_factor_0_out() -> None:
    nan, x = torch.full((3, 3), math.nan), torch.ones(3, 2)
    with exact.mode():
        assert torchpar.symmetric_matmul(x, x, nan, beta=0.0).tolist() == [[2.0] * 3] * 3
        wrong = torchpar.symmetric_matmul(nan, nan, torch.eye(3), alpha=0.0, beta=2.0)
        assert torch.equal(wrong, 2 * torch.eye(3))
        # Whatever the product is, the result is symmetric: its lower triangle counts.
        left, right = torch.tensor([[[1.0], [2.0]], [[3.0], [5.0]]])
        lower = torchpar.symmetric_matmul(left, right)
        assert lower.tolist() == [[3.0, 6.0], [6.0, 10.0]]


# Made here, since random numbers differ in the mode.
DRAWN = 3 * torch.randn(600, generator=torch.Generator().manual_seed(3)) + 1
STATISTICS = [torch.linspace(*ends, 5) for ends in ((0.5, 1.5), (-1, 1), (0.1, 9))]
NORMED: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {  # shapes, and options of the layer
    "1d": ((6, 5), {}),
    "a sequence": ((3, 5, 7), {"momentum": None}),
    "2d": ((4, 5, 3, 2), {"affine": False}),
    "3d": ((2, 5, 3, 1, 2), {"track_running_stats": False}),
    "no sample": ((0, 5, 3, 2), {}),
}


def normed(name: str, training: bool, dtype: torch.dtype, wide: bool) -> list[Tensor]:
    """A result of batch norm, its gradients, and the running statistics after two batches."""
    shape, options = NORMED[name]
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    x, g = DRAWN[: 2 * math.prod(shape)].to(dtype).view(2, *shape)
    layer = kind(5, **options).train(training)
    for p in layer.parameters():
        p.data.copy_(STATISTICS[0])
    if not training and layer.running_mean is not None:
        layer.running_mean.copy_(STATISTICS[1])
        layer.running_var.copy_(STATISTICS[2])
    layer = layer.to(torch.float64 if wide else dtype)
    x, g = (t.double() if wide else t for t in (x, g))
    x = x.clone().requires_grad_()
    layer(x.detach() * 2)
    y = layer(x)
    y.backward(g)
    found = [y, x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()]
    return [t.detach().clone() for t in found]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NORMED)
def test_batch_norm_is_as_near_as_torchs(name: str, training: bool, dtype: torch.dtype) -> None:
    """Values, gradients and running statistics; dtypes are PyTorch's."""
    with exact.mode():
        found = normed(name, training, dtype, False)
    native, ideal = normed(name, training, dtype, False), normed(name, training, dtype, True)
    for one, torchs, wide in zip(found, native, ideal, strict=True):
        assert (one.dtype, one.shape) == (torchs.dtype, torchs.shape)
        if one.numel():
            errors = [(t.double() - wide.double()).abs().max() for t in (one, torchs)]
            unit = torch.finfo(dtype).eps / 2 * wide.double().abs().max()
            assert errors[0] <= 2 * errors[1] + unit


def test_batch_norm_does_not_depend_on_the_order_of_samples() -> None:
    """Its sums are exact, unlike PyTorch's."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 3, 5, generator=generator)
    order = torch.randperm(400, generator=generator)

    def train(x: Tensor) -> list[Tensor]:
        layer = nn.BatchNorm1d(3)
        y = layer(x)
        y.square().mul(x).sum().backward()
        return [y.detach(), layer.weight.grad, layer.running_mean, layer.running_var]

    with exact.mode():
        (first, *rest), (other, *others) = train(x), train(x[order])
        assert torch.equal(first[order], other)
        assert all(map(torch.equal, rest, others))
        arguments = {"weight": None, "bias": None, "running_mean": None, "running_var": None}
        arguments |= {"training": True, "momentum": 0.1, "eps": 1e-5, "cudnn_enabled": True}
        expected = F.batch_norm(x, None, None, training=True)
        assert torch.equal(torch.batch_norm(x, *arguments.values()), expected)
        assert torch.equal(torch.batch_norm(input=x, **arguments), expected)
        _, *others = train(torch.cat([x[:1] * (1 + 2**-10), x[1:]]))
        assert not any(map(torch.equal, rest, others))


def test_units_of_a_batch_norm_with_running_statistics_are_refused() -> None:
    """They depend on the order of the units, and so on the ranks."""
    x = torch.rand(4, 3)
    with exact.mode():
        model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        # Before a forward pass changes them.
        with pytest.raises(ConfigError, match=r"^1 is a BatchNorm1d that trains its running stat"):
            exact.DataParallel(model)
        with pytest.raises(ConfigError, match=r"^the model is a BatchNorm1d that trains its runn"):
            exact.DataParallel(nn.BatchNorm1d(3))
        parallel = exact.DataParallel(model.eval())
        parallel.backward(model(x).square().sum())
        model.train()
        with pytest.raises(ConfigError, match=r"^1 is a BatchNorm1d that trains its running stat"):
            parallel.backward(model(x).square().sum())
        for other in (model.eval(), nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False))):
            parallel = exact.DataParallel(other)
            parallel.backward(other(x).square().sum())
            parallel.all_reduce()
            assert next(other.parameters()).grad is not None
            other.zero_grad()


SEEDED = torch.Generator().manual_seed(0)
# Made here, since random numbers differ in the mode.
TEXT = torch.randint(7, (4, 6), generator=SEEDED)
IMAGE = torch.randn(4, 3, 8, 5, generator=SEEDED)


def gradients(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    image = IMAGE.to(dtype, copy=True).requires_grad_()
    model.zero_grad()
    output = model(TEXT, image)
    loss = (
        F.nll_loss(output.flatten(0, 1), torch.arange(24) % 5, ignore_index=3) + output.exp().std()
    )
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    return found | {"output": output.detach(), "loss": loss.detach(), "image": image.grad}


def test_layers_are_as_near_as_torchs():
    """The largest relative error, measured against float64, is at most twice PyTorch's."""
    torch.manual_seed(0)
    model = Layers()
    with exact.mode():
        found = gradients(model, torch.float32)
    torchs, ideal = gradients(model, torch.float32), gradients(model.double(), torch.float64)
    errors = [
        max(((one[name].double() - t).norm() / t.norm()).item() for name, t in ideal.items())
        for one in (found, torchs)
    ]
    assert errors[0] <= 2 * errors[1]


def test_random_numbers():
    """Philox has the words of its authors' known answers; draws have their distributions'
    moments."""
    words = philox(torch.tensor([0]), (0, 0))[:, 0].tolist()
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    with exact.mode():
        torch.manual_seed(0)
        x = torch.randn(10**5)
        # The dispatcher omits 0.5.
        masks = {p: F.dropout(torch.ones(10**5), p) for p in (0.3, 0.5, 1.0)}
    x = x.clone()  # outside of the mode
    # Five standard deviations of the mean, of the variance and of the number of ones.
    assert x.mean().abs() < 5 / math.sqrt(1e5)
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / 1e5)
    for p, mask in masks.items():
        assert abs((mask > 0).double().mean() - (1 - p)) <= 5 * math.sqrt(p * (1 - p) / 1e5)
        assert p == 1 or mask.max() == 1 / torch.tensor(1 - p)


# Bits


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_steps_of_parts_have_the_bits_of_the_whole(kind):
    """A product and a sum are nowhere fused, which would depend on an element's place in the
    tensor."""
    options = {"momentum": 0.9, "nesterov": True} if kind is torch.optim.SGD else {}
    whole, gradients = torch.randn(37, 41), torch.randn(4, 37, 41)

    def stepped(part: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        p = nn.Parameter(part(whole).to(dtype, copy=True))
        optimizer = kind([p], lr=0.1, weight_decay=0.1, foreach=False, **options)
        for gradient in gradients:
            p.grad = part(gradient).to(dtype)
            optimizer.step()
        return p.detach()

    with exact.mode():
        expected = stepped(lambda t: t)
        for part in (lambda t: t[3:4, 5:6], lambda t: t.T, lambda t: t.flatten()[1:]):
            assert torch.equal(stepped(part), part(expected))
    rounding = 4 * 10 * 2.0**-23  # of ten numbers below 4 in each step
    torch.testing.assert_close(
        expected.double(), stepped(lambda t: t, torch.float64), rtol=0, atol=rounding
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_decoding_equals_one_pass(name):
    """Token by token with a cache, in a batch, and beside padding; ordinary arithmetic differs."""
    torch.manual_seed(0)
    with exact.mode(), torch.no_grad():
        model: Any = make_model(name).eval()
        for p in model.parameters():
            p.mul_(3)
        text = torch.randint(3, 96, (1, 8))
        whole = model(input_ids=text).logits
        # Transformers 5.24 renames the argument.
        parameters = inspect.signature(model.forward).parameters
        argument = "cache" if "cache" in parameters else "past_key_values"
        cache, tokens = None, []
        for i in range(8):
            output = model(input_ids=text[:, i : i + 1], use_cache=True, **{argument: cache})
            cache = output.past_key_values
            tokens.append(output.logits)
        assert torch.equal(torch.cat(tokens, 1), whole)
        others = torch.randint(3, 96, (63, 8))
        assert torch.equal(model(input_ids=torch.cat([text, others])).logits[:1], whole)
        padded, mask = F.pad(text, (0, 4), value=3), torch.ones(1, 12, dtype=torch.long)
        mask[:, 8:] = 0
        assert torch.equal(model(input_ids=padded, attention_mask=mask).logits[:, :8], whole)


# What is refused


def test_modes_inside_modes():
    x = torch.randn(3, 4)
    layer = nn.Sequential(nn.Linear(4, 5), nn.Softmax(-1))
    with exact.mode():
        expected = layer(x)
        for inner in (exact.mode(), torch.inference_mode()):
            with inner:
                assert torch.equal(layer(x), expected)
        assert not torch.equal(torch.randn(999).exp(), torch.randn(999).exp())


def step(**options: bool) -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    torch.optim.SGD([p], **options).step()


def test_a_fused_layer_is_composed_on_any_device():
    """The mode would refuse the layer's own operator, for which it has no rule."""
    x, weight = torch.rand(3, 4), torch.rand(5, 4)
    with exact.mode():
        assert torch.equal(linear_sigmoid(x, weight), F.linear(x, weight).sigmoid())
        assert linear_sigmoid(x.to("meta"), weight.to("meta")).shape == (3, 5)


COMPLEX, SPARSE = torch.ones(3) + 1j, torch.eye(3).to_sparse()  # which the mode does not make
WIDE = torch.ones(3, 3, dtype=torch.float64)
# Some of these forms of an operator would give other results than PyTorch's, silently.
REFUSED: dict[str, Any] = {
    r"no exact version of aten\.erfc\.default; make it of other": lambda: torch.ones(3).erfc(),
    r"no exact version of aten\.cumsum\.default for these": lambda: (torch.ones(3) / 3).cumsum(0),
    r"no exact version of aten\.cumsum\.default; make": lambda: TEXT.cumsum(0, dtype=torch.float32),
    r"and float16, an operand is torch\.float64": lambda: torch.ones(3).double().sum(),
    r"takes float32, .* torch\.float64": lambda: F.scaled_dot_product_attention(
        *3 * [IMAGE.double()]
    ),
    r"float16, an operand is torch\.float64": lambda: WIDE.scatter_add(0, WIDE.long(), WIDE),
    "foreach.*; give foreach=False to clip_grad_norm_": lambda: step(foreach=True),
    "fused.*, no fused=True": lambda: step(fused=True),
    r"no exact version of aten\.sum\.default": lambda: COMPLEX.sum(),
    r"no exact version of aten\.mm\.default": lambda: SPARSE @ torch.ones(3, 3),
    r"no exact version of aten\.put_": lambda: torch.arange(3).put_(
        torch.tensor([0, 0]), torch.arange(2)
    ),
    "aten.normal.Tensor_float": lambda: torch.normal(torch.ones(4), 1.0),
    r"prims\.sin\.default; make it of other": lambda: torch.ops.prims.sin(torch.ones(3)),
    "scatter.reduce": lambda: IMAGE.scatter(0, torch.zeros_like(IMAGE).long(), IMAGE, reduce="add"),
    "index -1 is out of bounds": lambda: torch.ones(3).scatter_add(
        0, torch.tensor([-1]), torch.ones(1)
    ),
    "index out of range": lambda: torch.ones(3).index_add(0, torch.tensor([-1]), torch.ones(1)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_operators_without_a_rule_are_named(message):
    with exact.mode(), pytest.raises((ConfigError, IndexError, RuntimeError), match=message):
        REFUSED[message]()


def test_special_forms():
    with exact.mode():
        ones = torch.ones(3).long()
        assert ones.cumsum(0).tolist() == [1, 2, 3]
        assert ones[None].index_add(1, torch.tensor([2, 2, 0]), ones[None]).tolist() == [[2, 1, 3]]
        assert (3 ** torch.arange(5)).tolist() == [1, 3, 9, 27, 81]
        # Added as integers.
        assert torch.tensor([2**24, 1, 1]).sum(dtype=torch.float32) == 2**24 + 2
        assert (
            torch.ops.aten._safe_softmax(torch.full((2, 3), -math.inf), -1).tolist()
            == [[0.0] * 3] * 2
        )
        powers = (torch.arange(4.0) - 2) ** 101
        assert F.group_norm(torch.ones(0, 4, 5), 2).shape == (0, 4, 5)
        kernel = torch.randn(2, 4, 2, 3, 2)
        volume = F.conv3d(IMAGE[None], kernel, stride=2, padding=1)
        by_kernel = torch.func.grad(lambda k: F.conv3d(IMAGE[None], k, padding="valid").sum())(
            kernel
        )
        scores = torch.randn(4, 6, 7)
        losses = (
            F.cross_entropy(scores.mT, TEXT),
            F.cross_entropy(scores.flatten(0, 1), TEXT.flatten()),
        )
        mask = torch.randn(6, 6).requires_grad_()
        attended = F.scaled_dot_product_attention(scores, scores, scores, mask)
        slopes = [torch.autograd.grad(attended.square().sum(), mask)[0]]
        dropped = []
        for dropout in (F.dropout, torch.native_dropout):  # a GPU's is the latter
            torch.manual_seed(0)
            dropped.append(dropout(scores, 0.3, True))
        assert torch.equal(torch.native_dropout(scores, 0.3, False)[0], scores)
    # Outside of the mode, which warns of its own tensors there.
    kernel, scores, mask = kernel.clone(), scores.clone(), mask.detach().clone().requires_grad_()
    attended = F.scaled_dot_product_attention(scores, scores, scores, mask)
    slopes += torch.autograd.grad(attended.square().sum(), mask)
    torch.testing.assert_close(volume, F.conv3d(IMAGE[None], kernel, stride=2, padding=1))
    expected = torch.func.grad(lambda k: F.conv3d(IMAGE[None], k).sum())(kernel)
    torch.testing.assert_close(by_kernel, expected)
    assert torch.equal(*losses)
    torch.testing.assert_close(*slopes)
    assert torch.equal(dropped[0], dropped[1][0])
    assert powers.tolist() == [-(2.0**101), -1.0, 0.0, 1.0]


def test_largest_and_smallest_zeros_are_positive():
    zeros = torch.tensor([0.0, -0.0]).repeat(5, 20)
    with exact.mode():
        found = [
            f(zeros, -zeros) for f in (torch.maximum, torchpar.maximum, torch.minimum, torch.clamp)
        ]
        found += [zeros.amax(0), zeros.mT.amin(0), zeros.max(), (-zeros).clamp_(max=zeros)]
        assert torch.tensor([True, False]).maximum(torch.tensor(False)).tolist() == [True, False]
    assert all((t == 0).all() and not t.signbit().any() for t in found)


def test_the_last_value_for_a_place_is_written():
    torch.set_num_threads(2)
    places, values = torch.arange(10**5) % 1000, torch.arange(1e5)
    with exact.mode():
        assert torch.equal(torch.zeros(1000).index_put((places,), values), values[-1000:])
        assert torch.equal(torch.zeros(1000).index_copy(0, places, values), values[-1000:])
        assert torch.equal(torch.zeros(1000).scatter(0, places, values), values[-1000:])


def test_a_model_without_values_has_shapes():
    """Such as one that is made on the meta device, and whose weights are loaded later."""

    def shapes(device):
        made = nn.ModuleList([nn.Embedding(9, 8), nn.TransformerEncoderLayer(8, 2, 16, 0.1)])
        embedding, layer = made.to(device)
        tokens = torch.zeros(5, 3, dtype=torch.long, device=device)
        y = layer(embedding(tokens)).flatten(1).log_softmax(1)
        F.nll_loss(y, tokens[:, 0]).backward()
        return [y.shape, *[p.grad.shape for p in made.parameters()]]

    with torchpar.exact.mode():
        with torch.device("meta"):
            assert nn.Embedding(9, 8).weight.is_meta  # drawn by a rule
        assert shapes("meta") == shapes("cpu")
        with pytest.raises(ConfigError, match=r"float16, an operand is torch\.float64"):
            torch.ones(3, dtype=torch.float64, device="meta").sum()


@pytest.mark.parametrize("is_outer", [False, True])
def test_fake_tensors_have_shapes(is_outer):
    """Such as those by which a program finds out how much memory a model takes."""
    modes = [torchpar.exact.mode(), FakeTensorMode()]
    with ExitStack() as stack:
        for one in modes if is_outer else modes[::-1]:
            stack.enter_context(one)
        model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.GELU())  # draws, and has rules
        y = model(torch.randn(2, 4)).log_softmax(1)
        F.nll_loss(y, torch.zeros(2, dtype=torch.long)).backward()
        assert isinstance(y, FakeTensor)
        assert (y.shape, model[0].weight.grad.shape) == ((2, 3), (3, 4))
        with pytest.raises(ConfigError, match=r"no exact version of aten\.erfc\.default"):
            y.erfc()


def test_a_tensor_of_tensors_has_their_bits():
    """Subclasses compute by operators on the tensors that they hold."""
    layers = nn.Sequential(nn.Linear(40, 30), nn.GELU(), nn.LayerNorm(30))
    x, other = torch.randn(5, 40), torch.randn(5, 40)
    with torchpar.exact.mode():
        both = layers(TwoTensor(x, other))
        both.sum().backward()
        gradient = layers[0].weight.grad
        for found, found_gradient, one in [
            (both.a, gradient.a, x),
            (both.b, gradient.b, other),
        ]:
            layers.zero_grad()
            y = layers(one)
            y.sum().backward()
            assert torch.equal(found, y)
            assert torch.equal(found_gradient, layers[0].weight.grad)


class Own(Tensor):
    """A tensor with values of its own, whose class computes with them outside of all modes."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return super().__torch_dispatch__(func, types, args, kwargs or {})


def test_a_subclass_with_values_of_its_own_does_not_leave_the_mode():
    layers, x = nn.Sequential(nn.Linear(40, 30), nn.GELU()), torch.randn(5, 40)
    with torchpar.exact.mode():
        assert torch.equal(layers(x.as_subclass(Own)), layers(x))
        with pytest.raises(ConfigError, match=r"no exact version of aten\.erfc\.default"):
            x.as_subclass(Own).erfc()


class Placed(nn.Sequential):
    """Layers that add the number of its row to each input: an operator takes the number of rows."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(40, 30), nn.GELU(), nn.Linear(30, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.arange(x.shape[0])[:, None])


@pytest.mark.parametrize("is_dynamic", [False, True])
def test_a_model_is_exported_in_the_mode(is_dynamic):
    """torch.export asks its tensors for their device, where an error would end the process."""
    shapes = ({0: torch.export.Dim("rows", min=2, max=9)},) if is_dynamic else None
    with torchpar.exact.mode():
        model = Placed()
        x = torch.randn(5, 40)
        exported = torch.export.export(model, (x,), dynamic_shapes=shapes).module()
        assert torch.equal(exported(x), model(x))
        if is_dynamic:
            assert torch.equal(exported(x[:3]), model(x[:3]))


def test_coverage_lists_what_is_missing():
    def function(x: Tensor) -> Tensor:
        attended = F.scaled_dot_product_attention(x, F.group_norm(x, 3), x)
        return (attended @ x.mT).cumsum(0).exp() + torch.linspace(0, 1, 3) + x.norm(3)

    found = exact.coverage(function, torch.randn(2, 3, 3))
    missing = {"aten.cumsum.default", "aten.linspace.default", "aten.linalg_vector_norm.default"}
    assert set(found.missing) == missing
    assert {"aten.exp.default", "aten.bmm.default"} <= set(found.rules)
    assert "missing: aten.cumsum.default (1), " in str(found)
    assert not exact.coverage(lambda x: x.bitwise_and(1).cumsum(0), torch.arange(3)).rules


def test_coverage_counts_the_operators_of_a_subclass_on_what_it_holds():
    found = exact.coverage(lambda x: x.erfc().exp(), TwoTensor(torch.randn(3), torch.randn(3)))
    assert (found.missing, found.rules) == ({"aten.erfc.default": 2}, {"aten.exp.default": 2})
