# SPDX-License-Identifier: MIT
"""Functions whose bits are the same on every processor: their errors, special values, gradient, and bits."""

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal, localcontext
from unittest.mock import patch

import pytest
import torch
from commands import ROOT, start
from ieee_bits import BITS, CONTROLS, digests, floats
from samples import LAYOUTS, normal
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from torchpar import ieee
from torchpar.errors import ConfigError

# Ours, torch's, and our error in units in the last place. Over all float32 from −104 to 89 the largest errors
# were 1.081 for exp (torch's 0.568) and 2.621 for sigmoid (torch's 2.481 where it does not underflow).
FUNCTIONS = {"exp": (ieee.exp, torch.exp, 1.1), "sigmoid": (ieee.sigmoid, torch.sigmoid, 2.7)}
functions = pytest.mark.parametrize("ours, torchs, error", FUNCTIONS.values(), ids=FUNCTIONS)


def spacing(y: Tensor) -> Tensor:
    """One unit in the last place of a float32 near each float64."""
    exponents = ((y.abs().view(torch.int64) >> 52) - 1023).clamp(min=-126)
    return ((exponents - 23 + 1023) << 52).view(torch.float64)


def errors(found: Tensor, expected: Tensor) -> Tensor:
    """Errors in units in the last place, where float64 does not overflow float32."""
    finite = expected < torch.finfo(torch.float32).max
    assert torch.equal(found[~finite], torch.full_like(found[~finite], torch.inf))
    return ((found.double() - expected) / spacing(expected))[finite].abs()


@functions
def test_errors_are_near_torchs(ours: Callable, torchs: Callable, error: float):
    chance = torch.randint(-(2**31), 2**31, (2**19,), generator=torch.Generator().manual_seed(0))
    chance = chance.to(torch.int32).view(torch.float32)
    x = torch.cat([floats(-110, 90, 1009), chance[chance.isfinite()]])
    expected = torchs(x.double())
    largest = errors(ours(x), expected).max()
    assert largest < error
    normals = x > -87  # torch.sigmoid is 0 from −89 on
    assert largest <= errors(torchs(x[normals]), expected[normals]).max() + 1
    few = x[x.abs() < 10]
    wrong = ours(few).view(torch.int32) + 2
    assert errors(wrong.view(torch.float32), torchs(few.double())).max() > error


@functions
def test_no_jumps_where_n_changes(ours: Callable, torchs: Callable, error: float):
    seams = ((torch.arange(-150, 128) + 0.5) * math.log(2)).float().view(torch.int32)
    x = (seams[:, None] + torch.arange(-200, 200, dtype=torch.int32)).view(torch.float32)
    x = x.sort(1).values
    y, expected = ours(x), torchs(x.double())
    assert errors(y.flatten(), expected.flatten()).max() < error
    falls = -y.double().diff(dim=1).nan_to_num(0) / spacing(expected[:, 1:])  # NaN: from infinity to infinity
    assert falls.max() < 2 * error


def test_special_values(device: str):
    x = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 88.7, 88.8, 3e38, -103.9, -104, -3e38, 1e-45])
    exp, sigmoid = ieee.exp(x.to(device)).cpu(), ieee.sigmoid(x.to(device)).cpu()
    e, least = math.exp(88.69999694824219), 2.0**-149
    expected = [1, 1, math.inf, 0, math.nan, e, math.inf, math.inf, least, 0, 0, 1]
    assert_close(exp, torch.tensor(expected), rtol=2**-22, atol=0, equal_nan=True)
    assert_close(
        sigmoid,
        torch.tensor([0.5, 0.5, 1, 0, math.nan, 1, 1, 1, least, 0, 0, 0.5]),
        rtol=0,
        atol=0,
        equal_nan=True,
    )
    x = torch.tensor([1.0, 2.0**1023, math.inf, math.nan, 0.0, -1.0, 2.0**-1060], dtype=torch.float64)
    expected = torch.tensor([0.0, 1023 * math.log(2), math.inf] + 4 * [math.nan], dtype=torch.float64)
    assert_close(ieee.log(x.to(device)).cpu(), expected, rtol=2**-52, atol=0, equal_nan=True)


def test_log_errs_by_less_than_one_unit():
    near_one = [1 + sign * k * 2.0**-e for e in (52, 40, 30, 20, 10) for k in (1, 3, 401) for sign in (1, -1)]
    seams = [math.sqrt(2) * 2.0**k * (1 + j * 2.0**-50) for k in (-3, -1, 0, 1, 40) for j in range(-4, 5)]
    spread = [1.01**k for k in range(-700, 1500)]
    x = [*near_one, *seams, *spread]
    found = ieee.log(torch.tensor(x, dtype=torch.float64)).tolist()
    with localcontext(prec=40):
        exact = [Decimal(value).ln() for value in x]
        ulps = [abs(Decimal(f) - e) / Decimal(math.ulp(e)) for f, e in zip(found, exact, strict=True)]
    assert max(ulps) < 1


def batch(b: int, classes: int, scale: float = 5, device: str = "cpu") -> tuple[Tensor, Tensor]:
    logits = scale * normal(b, classes, dtype=torch.float32, device=device)
    labels = torch.randint(classes, (b,), generator=torch.Generator().manual_seed(1)).to(device)
    return logits.requires_grad_(), labels


@pytest.mark.parametrize("b, classes", [(0, 10), (1, 1), (127, 10), (129, 129)])
def test_cross_entropy_against_float64(b: int, classes: int, device: str):
    logits, labels = batch(b, classes, device=device)
    losses = ieee.cross_entropy_sum(logits, labels), F.cross_entropy(logits, labels, reduction="sum")
    wide = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(wide, labels, reduction="sum")
    (exact,) = torch.autograd.grad(3 * expected, wide)
    assert losses[0].dtype == torch.float64
    # A loss is rounded to 2⁻²⁴, log s errs by a term's 1.1·2⁻²³ at most, and z − m by 2⁻²⁴ of itself.
    bound = b * (2**-24 + 1.1 * 2**-23 + classes * 2**-33) + 2**-24 * expected.item()
    assert_close(losses[0], expected, rtol=0, atol=bound)
    gradients = [torch.autograd.grad(3 * loss, logits)[0] for loss in losses]
    assert gradients[0].dtype == torch.float32
    if b:
        our_error, torchs_error = ((g.double() - exact).abs().max() for g in gradients)
        assert our_error <= 2 * torchs_error
        assert (gradients[0].double() / 3 - exact).abs().max() > 2 * torchs_error or classes == 1


def test_loss_has_the_same_bits_in_any_order_and_any_parts(device: str):
    logits, labels = batch(1000, 10, scale=20, device=device)
    loss = ieee.cross_entropy_sum(logits, labels)
    for seed in range(5):
        order = torch.randperm(1000, generator=torch.Generator().manual_seed(seed)).to(device)
        assert torch.equal(ieee.cross_entropy_sum(logits[order], labels[order]), loss)
        parts = zip(logits[order].split(1 + 130 * seed), labels[order].split(1 + 130 * seed), strict=True)
        assert torch.equal(sum(ieee.cross_entropy_sum(*part) for part in parts), loss)
    classes = torch.randperm(10, generator=torch.Generator().manual_seed(0)).to(device)
    assert torch.equal(ieee.cross_entropy_sum(logits[:, classes], classes.argsort()[labels]), loss)
    plain = {F.cross_entropy(logits.roll(i, 0), labels.roll(i), reduction="sum").item() for i in range(50)}
    assert len(plain) > 1


def test_losses_that_no_integer_holds(device: str):
    def loss(*rows: list[float]) -> float:
        labels = torch.zeros(len(rows), dtype=torch.int64, device=device)
        return ieee.cross_entropy_sum(torch.tensor(rows, device=device), labels).item()

    assert loss([0, 2.0**37], [0, 2.0**30 + 2.0**20]) == 2**37 + 2**30 + 2**20
    assert loss(*100 * [[0, 2.0**38]]) == 100 * 2**38  # more than an int64 holds in units of 2⁻²⁴
    assert loss([0, 2.0**39]) == loss([-math.inf, 0]) == loss([-3e38, 3e38]) == math.inf
    assert loss([0, -math.inf]) == 0
    bad = [[math.nan, 0], [0, math.nan], [math.inf, 0], [0, math.inf], [-math.inf, -math.inf]]
    assert all(math.isnan(loss(row)) and math.isnan(loss(row, [0, 2.0**39])) for row in bad)


def test_gradients_of_bad_samples_are_nan_and_others_unchanged():
    logits, labels = batch(8, 3)
    (good,) = torch.autograd.grad(ieee.cross_entropy_sum(logits, labels), logits)
    spoilt = logits.detach().clone()
    spoilt[2, 1] = math.inf
    spoilt.requires_grad_()
    (gradient,) = torch.autograd.grad(ieee.cross_entropy_sum(spoilt, labels), spoilt)
    assert gradient[2].isnan().all()
    others = torch.arange(8) != 2
    assert torch.equal(gradient[others], good[others])


def test_what_is_refused():
    logits, labels = batch(4, 3)
    with pytest.raises(ConfigError, match="create_graph"):
        torch.autograd.grad(ieee.cross_entropy_sum(logits, labels), logits, create_graph=True)
    double = logits.detach().double()
    for call in (
        lambda: ieee.exp(double),
        lambda: ieee.sigmoid(double),
        lambda: ieee.log(logits),
        lambda: ieee.cross_entropy_sum(double, labels),
        lambda: ieee.cross_entropy_sum(logits, labels.int()),
        lambda: ieee.cross_entropy_sum(logits, labels[:2]),
        lambda: ieee.cross_entropy_sum(logits[0], labels),
    ):
        with pytest.raises(ConfigError, match="expected"):
            call()
    assert not ieee.exp(logits).requires_grad
    assert not ieee.sigmoid(logits).requires_grad


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_do_not_depend_on_strides(layout: str, device: str):
    x = LAYOUTS[layout](10 * normal(7, 129, 3, dtype=torch.float32, device=device))
    for function in (ieee.exp, ieee.sigmoid):
        y = function(x)
        assert torch.equal(y, function(x.clone(memory_format=torch.contiguous_format)))
        assert y.is_contiguous()
    x = x.double().abs() + 1
    assert torch.equal(ieee.log(LAYOUTS[layout](x.clone())), ieee.log(LAYOUTS[layout](x.clone()).clone()))


def test_bits_do_not_depend_on_size_or_pieces():
    x = floats(-104, 89, 10007)
    for function in (ieee.exp, ieee.sigmoid):
        y = function(x)
        assert len(x) > 3 * ieee.PIECE
        for size in (0, 1, 3, 7, 8, 9, 15, 17, 31, 33, 127, 129, ieee.PIECE - 1, ieee.PIECE + 1):
            for start_ in (0, 1, 50001):
                assert torch.equal(function(x[start_ : start_ + size]), y[start_ : start_ + size])
        with patch.object(ieee, "PIECE", 1001):
            assert torch.equal(function(x), y)
        assert function(x[0]).shape == ()


def started(capability: str) -> subprocess.Popen[str]:
    """Prints the hashes under 1 and 2 threads, in a process where ATen uses the named instructions."""
    with patch.dict(os.environ, ATEN_CPU_CAPABILITY=capability):
        return start(sys.executable, str(ROOT / "tests" / "ieee_bits.py"))


def test_bits_are_the_recorded_ones_under_any_instructions_and_threads():
    processes = [started(capability) for capability in ("default", "avx2")]
    found = [digests()]
    for process in processes:
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
        found += map(json.loads, out.splitlines())
    assert len(found) == 5
    for bits in found:
        assert {name: bits[name] for name in BITS} == BITS
    if platform.machine() in ("x86_64", "AMD64"):
        # The same comparison rejects a library's function, and products that may be fused with their sums.
        default, vectorized = found[1], found[3]
        assert all(default[name] != vectorized[name] for name in CONTROLS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_bits_are_the_recorded_ones_on_a_gpu():
    bits = digests("cuda")
    assert {name: bits[name] for name in BITS} == BITS
