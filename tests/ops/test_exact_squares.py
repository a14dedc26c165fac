# SPDX-License-Identifier: MIT
"""Sums of squares as integers, whose bits no order changes, and whose error has a bound."""

import math

import pytest
import torch
from torch import Tensor

from torchpar.ops.exact_squares import SumOfSquares


def squares_of(parts: list[list[tuple[Tensor, int]]], times: int) -> Tensor:
    """The sum by ranks, of which each has tensors, and how often it adds their squares."""
    tensors = [x for part in parts for x, _ in part if x.numel()]
    largest = max(float(x.double().abs().nan_to_num(math.inf).max()) for x in tensors)
    ranks = [SumOfSquares(torch.tensor(largest, dtype=torch.float64)) for _ in parts]
    for rank, part in zip(ranks, parts, strict=True):
        for x, count in part:
            rank.add(x, count)
    ranks[0].words = torch.stack([rank.words for rank in ranks]).sum(0)
    return ranks[0].total(times)


def drawn(n: int = 3001) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, generator=generator) * 10 ** torch.randn(n, generator=generator)


def test_the_bits_depend_neither_on_the_order_nor_on_the_ranks():
    x = drawn()
    alone = squares_of([[(x, 1)]], 1)
    # In floating-point arithmetic the order changes the last bits.
    assert len({float(one.double().square().cumsum(0)[-1]) for one in (x, x.flip(0))}) == 2
    others = {
        "reversed": squares_of([[(x.flip(0), 1)]], 1),
        "by 7": squares_of([[(one, 1) for one in x.split(7)]], 1),
        "shards": squares_of([[(one, 3)] for one in x.tensor_split(3)], 3),
        "copies, and an empty shard": squares_of(
            [[(x[:9], 1), (x[9:], 2)], [(x[:9], 1), (x[:0], 2)]], 2
        ),
    }
    assert {name: float(one) for name, one in others.items()} == dict.fromkeys(others, float(alone))


@pytest.mark.parametrize("scale", [2.0**-140, 1.0, 2.0**100])
@pytest.mark.parametrize("small", [1.0, 2.0**-20, 2.0**-25, 0.0])
def test_the_error_is_below_the_bound_also_beside_an_outlier(scale, small):
    x = drawn() * small * scale
    x[100] = 64 * scale
    exact = math.fsum(float(one) ** 2 for one in x)
    upper = 2.0 ** math.frexp(float(x.abs().max()) ** 2)[1]
    rounding = 2.0**-53 * exact
    assert abs(float(squares_of([[(x, 1)]], 1)) - exact) <= len(x) * 2.0**-53 * upper + rounding


@pytest.mark.parametrize("unusual", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_reaches_the_sum(unusual):
    x = drawn()
    x[5] = unusual
    total = squares_of([[(x[:3], 1)], [(x[3:], 1)]], 1)
    assert bool(total.isnan()) == math.isnan(unusual)
    assert not total.isfinite()
