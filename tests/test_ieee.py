# SPDX-License-Identifier: MIT
"""Functions whose bits are the same on every processor: their errors, special values, gradient, and bits."""

import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from unittest.mock import patch

import pytest
import torch
from exact_bits import floats
from samples import normal
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from torchpar.errors import ConfigError
from torchpar.exact import ieee
from torchpar.exact.loss import cross_entropy_sum

# Ours, float64's, and our error in units in the last place. Over all float32 from −104 to 89 the largest
# errors were 1.081 for exp and 2.621 for sigmoid.
FUNCTIONS = {"exp": (ieee.exp, torch.exp, 1.1), "sigmoid": (ieee.sigmoid, torch.sigmoid, 2.7)}


def errors(found: Tensor, expected: Tensor) -> Tensor:
    """Errors in units in the last place, where float64 does not overflow float32."""
    finite = expected < torch.finfo(torch.float32).max
    assert torch.equal(found[~finite], torch.full_like(found[~finite], torch.inf))
    last_place = 2 ** (expected.clamp(min=2.0**-126).frexp().exponent.double() - 24)
    return ((found.double() - expected) / last_place)[finite].abs()


@pytest.mark.parametrize("ours, float64s, limit", FUNCTIONS.values(), ids=FUNCTIONS)
def test_errors_are_within_their_bounds(ours: Callable, float64s: Callable, limit: float):
    chance = torch.randint(-(2**31), 2**31, (2**17,), generator=torch.Generator().manual_seed(0))
    chance = chance.to(torch.int32).view(torch.float32)
    # Where n, the integer nearest to x / ln 2, changes, and the floats around.
    seams = ((torch.arange(-150, 128) + 0.5) * math.log(2)).float().view(torch.int32)
    seams = (seams[:, None] + torch.arange(-200, 200, dtype=torch.int32)).view(torch.float32)
    x = torch.cat([floats(-110, 90, 10007), chance[chance.isfinite()], seams.flatten()])
    assert errors(ours(x), float64s(x.double())).max() < limit
    few = x[x.abs() < 10]
    wrong = ours(few).view(torch.int32) + 2
    assert errors(wrong.view(torch.float32), float64s(few.double())).max() > limit


def test_special_values(device: str):
    x = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 88.7, 88.8, 3e38, -103.9, -104, -3e38, 1e-45])
    exp, sigmoid = ieee.exp(x.to(device)).cpu(), ieee.sigmoid(x.to(device)).cpu()
    e, least = math.exp(88.69999694824219), 2.0**-149
    expected = [1, 1, math.inf, 0, math.nan, e, math.inf, math.inf, least, 0, 0, 1]
    assert_close(exp, torch.tensor(expected), rtol=2**-22, atol=0, equal_nan=True)
    expected = torch.tensor([0.5, 0.5, 1, 0, math.nan, 1, 1, 1, least, 0, 0, 0.5])
    assert_close(sigmoid, expected, rtol=0, atol=0, equal_nan=True)
    x = torch.tensor([1.0, 2.0**1023, math.inf, math.nan, 0.0, -1.0, 2.0**-1060], dtype=torch.float64)
    expected = torch.tensor([0.0, 1023 * math.log(2), math.inf] + 4 * [math.nan], dtype=torch.float64)
    assert_close(ieee.log(x.to(device)).cpu(), expected, rtol=2**-52, atol=0, equal_nan=True)


def test_log_errs_by_less_than_one_unit():
    near_one = [1 + sign * k * 2.0**-e for e in (52, 40, 30, 20, 10) for k in (1, 3, 401) for sign in (1, -1)]
    seams = [math.sqrt(2) * 2.0**k * (1 + j * 2.0**-50) for k in (-3, -1, 0, 1, 40) for j in range(-4, 5)]
    x = [*near_one, *seams, *(1.01**k for k in range(-700, 1500))]
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
    losses = cross_entropy_sum(logits, labels), F.cross_entropy(logits, labels, reduction="sum")
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


def test_loss_has_the_same_bits_in_any_order_and_any_parts(device: str):
    logits, labels = batch(1000, 10, scale=20, device=device)
    loss = cross_entropy_sum(logits, labels)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).to(device)
    assert torch.equal(cross_entropy_sum(logits[order], labels[order]), loss)
    parts = zip(logits[order].split(131), labels[order].split(131), strict=True)
    assert torch.equal(sum(cross_entropy_sum(*part) for part in parts), loss)
    classes = torch.randperm(10, generator=torch.Generator().manual_seed(0)).to(device)
    assert torch.equal(cross_entropy_sum(logits[:, classes], classes.argsort()[labels]), loss)


def test_losses_that_no_integer_holds(device: str):
    def loss(*rows: list[float]) -> float:
        labels = torch.zeros(len(rows), dtype=torch.int64, device=device)
        return cross_entropy_sum(torch.tensor(rows, device=device), labels).item()

    assert loss([0, 2.0**37], [0, 2.0**30 + 2.0**20]) == 2**37 + 2**30 + 2**20
    assert loss(*100 * [[0, 2.0**38]]) == 100 * 2**38  # more than an int64 holds in units of 2⁻²⁴
    assert loss([0, 2.0**39]) == loss([-math.inf, 0]) == loss([-3e38, 3e38]) == math.inf
    assert loss([0, -math.inf]) == 0
    bad = [[math.nan, 0], [0, math.nan], [math.inf, 0], [0, math.inf], [-math.inf, -math.inf]]
    assert all(math.isnan(loss(row)) and math.isnan(loss(row, [0, 2.0**39])) for row in bad)


def test_refusals():
    logits, labels = batch(4, 3)
    double, loss = logits.detach().double(), cross_entropy_sum
    create_graph = {"create_graph": True}
    for call, message in (
        (lambda: torch.autograd.grad(loss(logits, labels), logits, **create_graph), "create_graph"),
        (lambda: ieee.exp(double), "the input is torch.float64, expected torch.float32; convert it"),
        (lambda: ieee.log(logits), "expected torch.float64"),
        (lambda: loss(double, labels), "the logits' dtype is torch.float64, expected torch.float32"),
        (lambda: loss(logits, labels.int()), "the labels' dtype is torch.int32, expected torch.int64"),
        (lambda: loss(logits, labels[:2]), r"logits \(4, 3\) and labels \(2,\) differ in samples, expected"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()


def test_bits_do_not_depend_on_size_or_pieces():
    x = floats(-104, 89, 10007)
    assert len(x) > 3 * ieee.PIECE
    for function in (ieee.exp, ieee.sigmoid):
        y = function(x)
        for size in (0, 1, 7, 33, 129, ieee.PIECE - 1, ieee.PIECE + 1):
            assert torch.equal(function(x[50001:][:size]), y[50001:][:size])
        with patch.object(ieee, "PIECE", 1001):
            assert torch.equal(function(x), y)
        assert function(x[0]).shape == ()
