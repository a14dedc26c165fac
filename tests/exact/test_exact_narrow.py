# SPDX-License-Identifier: MIT
"""Exact arithmetic of bfloat16 and float16: every rule, operations, casts, autocast, training."""

import hashlib
import itertools
from typing import Any

import pytest
import test_exact_rules as rules
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from torchpar import exact
from torchpar.errors import ConfigError
from torchpar.exact.registry import NARROW
from torchpar.ops.exact_digits import rounded_to

DTYPES = sorted(NARROW, key=str)
of_each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def results(name: str, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, ...]:
    """A case of a rule, whose constants have the dtype of its operand."""
    with monkeypatch.context() as patched:
        for constant in ("WEIGHT", "KERNEL"):
            patched.setattr(rules, constant, getattr(rules, constant).to(x.dtype))
        found = rules.ROW_CASES[name](x)
    return found if isinstance(found, tuple) else (found,)


@of_each_dtype
@pytest.mark.parametrize("name", rules.ROW_CASES)
def test_errors_of_every_rule(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """Dtypes are PyTorch's, and errors at most twice its own; a row is the same in a batch."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rules.ROWS, rules.COLUMNS, generator=generator).to(dtype)
    with exact.mode():
        found = [t.clone() for t in results(name, x, monkeypatch)]
        alone = [results(name, x[i : i + 1].clone(), monkeypatch) for i in range(rules.ROWS)]
        beside = results(name, torch.cat([x, 1000 * x]), monkeypatch)
    native, ideal = results(name, x, monkeypatch), results(name, x.double(), monkeypatch)
    for i, (one, torchs, wide) in enumerate(zip(found, native, ideal, strict=True)):
        assert torch.equal(torch.cat([row[i] for row in alone]), one)
        assert torch.equal(beside[i][: rules.ROWS], one)
        if not (i and name == "native_group_norm"):
            assert one.dtype == torchs.dtype
        errors = [(t.double() - wide).abs().max() for t in (one, torchs)]
        assert errors[0] <= 2 * errors[1]


ELEMENTWISE: dict[str, Any] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "sqrt": lambda x, y: x.abs().sqrt(),
    "reciprocal": lambda x, y: y.reciprocal(),
}


@of_each_dtype
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_operations_round_once(name: str, dtype: torch.dtype):
    """Of numbers of all magnitudes: the rounded result of float64."""
    i = torch.arange(2**16, dtype=torch.int32)
    x = (i - 2**15).to(torch.int16).view(dtype)
    y = (i * 40503 % 2**16 - 2**15).to(torch.int16).view(dtype)
    with exact.mode():
        found = ELEMENTWISE[name](x, y).double()
    expected = rounded_to(ELEMENTWISE[name](x.double(), y.double()), dtype).double()
    torch.testing.assert_close(found.clone(), expected, rtol=0, atol=0, equal_nan=True)


@of_each_dtype
@pytest.mark.parametrize("name", ["add", "sub", "mul", "div"])
def test_a_tensor_of_one_number_is_taken_as_a_number(name: str, dtype: torch.dtype):
    """PyTorch rounds it to 16 bits if it comes first, and on a GPU."""
    x = torch.linspace(1, 2, 100).to(dtype)
    for number in (torch.tensor(0.0013), torch.tensor(2049)):
        for a, b in ((x, number), (number, x)):
            expected = ELEMENTWISE[name](a.float(), b.float()).to(dtype)
            with exact.mode():
                found = ELEMENTWISE[name](a, b)
                written = torch.empty_like(x)
                getattr(torch, name)(a, b, out=written)
                if a is x:
                    assert torch.equal(getattr(x.clone(), f"{name}_")(b), expected)
            assert found.dtype == dtype
            assert torch.equal(found, expected)
            assert torch.equal(written, expected)
            if name in ("mul", "div") and b is x and number.is_floating_point():
                assert not torch.equal(ELEMENTWISE[name](a, b), expected)


@of_each_dtype
def test_casts_round_once(dtype: torch.dtype):
    """Whatever the operand's dtype is; PyTorch rounds to float32 before."""
    middle = 1 + torch.finfo(dtype).eps / 2
    above = 1 + torch.finfo(dtype).eps
    x = torch.tensor([middle, middle * (1 + 2.0**-40), 3.0], dtype=torch.float64)
    with exact.mode():
        found = [x.to(dtype), torch.empty(3, dtype=dtype).copy_(x)]
        whole = (x * 2.0**40).long().to(dtype)
        counted = torch.arange(1000, dtype=dtype)
    for y in found:
        assert y.tolist() == [1, above, 3]
    assert x.to(dtype).tolist() != [1, above, 3]
    if dtype == torch.bfloat16:  # whose range holds these
        assert whole.tolist() == [2.0**40, above * 2.0**40, 3 * 2.0**40]
    assert torch.equal(counted, torch.arange(1000.0).to(dtype))


@of_each_dtype
@pytest.mark.parametrize("order", [1, 2, float("inf")])
def test_a_norm_may_name_its_operands_own_dtype(order: float, dtype: torch.dtype):
    """The rule computes in float32, which PyTorch does not narrow."""
    x, mask = torch.tensor([3.0, -4.0, 12.0], dtype=dtype), torch.tensor([True, True, False])

    def norms() -> list[Tensor]:
        largest = torch.linalg.vector_norm(x, order, dtype=dtype)
        wide = torch.linalg.vector_norm(x, order, dtype=torch.float64)
        return [largest, wide, torch.masked.norm(x, order, 0, mask=mask)]

    with exact.mode():
        found = norms()
    for one, native in zip(found, norms(), strict=True):
        assert (one.dtype, one.item()) == (native.dtype, native.item())


@of_each_dtype
def test_sums_round_once(dtype: torch.dtype):
    """Of integers, whose sum float64 holds, as PyTorch's rounding to float32 does not."""
    eps = torch.finfo(dtype).eps
    x = torch.tensor([1.0, eps / 2, 2.0**-24, 0]).to(dtype)
    with exact.mode():
        assert x.sum() == 1 + eps
        assert x.mean() == (1 + eps) / 4
        assert x.sum(dtype=torch.float32) == 1 + eps / 2 + (2.0**-24 if eps < 2.0**-8 else 0)
    assert x.sum() != 1 + eps


def blocks() -> nn.Sequential:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, "gelu", batch_first=True)
    return nn.Sequential(nn.Linear(8, 16), layer, nn.Linear(16, 3))


def gradients(model: nn.Module, x: Tensor, **options: Any) -> dict[str, Tensor]:
    model.zero_grad()
    y = checkpoint(model, x, **options) if options else model(x)
    F.cross_entropy(y.flatten(0, 1), torch.arange(y.shape[:2].numel()) % 3).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@of_each_dtype
def test_gradients_of_a_model(dtype: torch.dtype):
    """At most twice PyTorch's error; the same bits with checkpoints, threads and other batches."""
    x = torch.randn(2, 5, 8).to(dtype)
    with exact.mode():
        model = blocks().to(dtype)
        found = gradients(model, x)
        recomputed = gradients(model, x, use_reentrant=False)
        alone = model(x[:1])
        assert torch.equal(model(x)[:1], alone)
    found, recomputed = ({n: t.clone() for n, t in g.items()} for g in (found, recomputed))
    for name, gradient in found.items():
        assert gradient.dtype == dtype
        assert torch.equal(gradient, recomputed[name])
    model = blocks().to(dtype)
    torchs, ideal = gradients(model, x), gradients(model.double(), x.double())
    errors = [
        max(((one[name].double() - t).norm() / t.norm()).item() for name, t in ideal.items())
        for one in (found, torchs)
    ]
    assert errors[0] <= 2 * errors[1]


def test_autocast_computes_products_in_its_dtype():
    """In the forward pass and, of a convolution's gradient, in the backward pass."""
    x = torch.randn(2, 5, 8)
    with exact.mode():
        model = blocks()
        layer, image = nn.Conv1d(5, 3, 3), torch.randn(2, 5, 8, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y, of_image = model(x), layer(image)
            of_image.float().square().sum().backward()
            found = gradients(model, x)
        narrow = model.bfloat16()(x.bfloat16())
        slope = torch.autograd.grad(
            F.conv1d(image.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16())
            .float()
            .square()
            .sum(),
            image,
        )[0]
    assert y.dtype == of_image.dtype == torch.bfloat16
    assert torch.equal(y.clone(), narrow.clone())  # the norm's weights are 1
    assert torch.equal(image.grad.clone(), slope.clone())
    assert all(g.dtype == torch.float32 for g in found.values())


def test_a_scaler_of_gradients_is_refused_by_name():
    weight = nn.Parameter(torch.ones(2))
    optimizer, scaler = torch.optim.SGD([weight], foreach=False), torch.amp.GradScaler("cpu")
    with exact.mode():
        scaler.scale(weight.sum()).backward()
        with pytest.raises(ConfigError, match="without GradScaler"):
            scaler.step(optimizer)


def trained(dtype: torch.dtype, ranks: int, autocast: bool) -> str:
    """The hash of weights, with the units of each step divided among ``ranks`` sums."""
    with exact.mode():
        model = blocks().to(dtype)
        # float16 rounds the default of eps to 0.
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-4, foreach=False)
        for step in range(2):
            optimizer.zero_grad()
            parallel = exact.DataParallel(model)
            for rank, unit in itertools.product(range(ranks), range(4)):
                if unit % ranks != rank:
                    continue
                torch.manual_seed(10 * step + unit)
                x = torch.rand(1, 5, 8).to(dtype)
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = F.cross_entropy(model(x)[0], torch.arange(5) % 3)
                parallel.backward(loss / 4)
            parallel.all_reduce()
            assert all(p.grad.dtype == dtype for p in model.parameters())
            nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False)
            optimizer.step()
        state = [p.detach().view(-1).view(torch.uint8) for p in model.parameters()]
    return hashlib.sha256(torch.cat(state).clone().numpy().tobytes()).hexdigest()[:16]


RECORDED = {
    (torch.bfloat16, False): "7339f4b11c124efa",
    (torch.float16, False): "9addfcb04a3aad37",
    (torch.float32, True): "fcace93664f74864",
}


@pytest.mark.parametrize(
    "dtype, autocast",
    [pytest.param(*one, marks=[pytest.mark.slow] * bool(i)) for i, one in enumerate(RECORDED)],
    ids=str,
)
def test_a_training_has_the_recorded_bits(dtype: torch.dtype, autocast: bool):
    """In any order of the units."""
    assert trained(dtype, 1, autocast) == RECORDED[dtype, autocast]
    assert trained(dtype, 2, autocast) == RECORDED[dtype, autocast]
