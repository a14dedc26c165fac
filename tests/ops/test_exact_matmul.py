# SPDX-License-Identifier: MIT
"""Exact products: the bits of the plain reference, whatever computes them, and errors against
float64."""

import json
import math
import os
import sys
from itertools import product
from unittest.mock import patch

import exact_bits
import pytest
import torch
from commands import ROOT, run
from exact_operands import HARD, random, wide
from samples import bits
from torch import Tensor
from torch.func import jvp, vjp
from torch.testing import assert_close

from torchpar import exact_matmul, exact_matmul_t, reference
from torchpar.errors import ConfigError
from torchpar.exact.products import wide_product
from torchpar.ops import exact_digits


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert torch.equal(bits(actual.cpu()), bits(expected.cpu()))


# The error beside half an ulp for each term; significant bits, and the exponents of the largest
# numbers and of normal ones.
BOUNDS = {
    torch.float32: (2.0**-27, 24, 128, -126),
    torch.bfloat16: (2.0**-20, 8, 128, -126),
    torch.float16: (2.0**-20, 11, 16, -14),
}


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", HARD)
def test_hard_products(name: str, dtype: torch.dtype, device: str) -> None:
    """The reference's bits, and at most the documented error beyond half an ulp."""
    most = torch.finfo(dtype).max
    a, b = (t.clamp(-most, most).to(dtype).to(device) for t in HARD[name])
    found = exact_matmul(a, b)
    assert_same_bits(found, reference.exact_matmul(a, b))
    assert_same_bits(exact_matmul_t(a), reference.exact_matmul(a, a))
    in_float32 = wide_product(a, b)
    assert_within_bound(found, a, b, *BOUNDS[dtype])
    assert_within_bound(in_float32, a, b, BOUNDS[dtype][0], *BOUNDS[torch.float32][1:])


def assert_within_bound(
    found: Tensor, a: Tensor, b: Tensor, term: float, significant: int, most: int, least: int
) -> None:
    a, b, found = a.cpu().double(), b.cpu().double(), found.cpu().double()
    exact = [[math.fsum(products) for products in row] for row in (a[:, None] * b).tolist()]
    exact, found = (
        t.clamp(-(2.0**most), 2.0**most) for t in (torch.tensor(exact, dtype=torch.float64), found)
    )
    larger = torch.maximum(found.abs(), exact.abs()).clamp(min=2.0**least)
    half_ulp = 2 ** (larger.frexp().exponent.double() - significant - 1)
    largest = a.abs().amax(1, keepdim=True) * b.abs().amax(1)
    assert ((found - exact).abs() <= half_ulp + a.shape[1] * term * largest).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("outliers", [1.0, 1000.0])
def test_errors_of_16_bits_are_at_most_twice_pytorchs(outliers: float, dtype: torch.dtype) -> None:
    """Of rows with outliers, whose products with the other operand's zeros do not hide an error."""
    a, b = random(64, 1024), random(48, 1024, seed=1)
    a[:, ::97] *= outliers
    b[:, ::97] *= outliers == 1
    a, b = a.to(dtype), b.to(dtype)
    exact = a.double() @ b.double().mT
    error, torchs = ((y.double() - exact).abs().max() for y in (exact_matmul(a, b), a @ b.mT))
    assert error <= 2 * torchs
    # Two digits would not do.
    coarse = [(t.double() * 2.0**15 / 4096 / outliers).round() for t in (a, b)]
    by_two = (coarse[0] @ coarse[1].mT * (4096 * outliers / 2.0**15) ** 2).to(dtype)
    assert (by_two.double() - exact).abs().max() > 2 * torchs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_product_is_rounded_once(dtype: torch.dtype) -> None:
    """Float32 is no stop on the way: it would lose which side of a middle the sum is on."""
    middle = 1 + torch.finfo(dtype).eps / 2
    a = torch.tensor([[middle - 0.5, 0.5, 2.0**-12], [middle - 0.5, 0.5, -(2.0**-12)]])
    b = torch.tensor([[1.0, 1.0, 2.0**-14], [1.0, 1.0, 0.0]])
    found = exact_matmul(a.to(dtype), b.to(dtype))
    above = torch.nextafter(torch.tensor(1.0, dtype=dtype), torch.tensor(2.0, dtype=dtype))
    assert found.tolist() == [[above.item(), 1.0], [1.0, 1.0]]


# The same bits, whatever computes them.


@pytest.mark.slow
@pytest.mark.parametrize("aten, onednn, threads", [("default", "SSE41", 1), ("avx2", "AVX2", 2)])
def test_bits_are_the_recorded_ones_on_other_processors_and_any_threads(
    aten: str, onednn: str, threads: int
) -> None:
    variables = {"ATEN_CPU_CAPABILITY": aten, "ONEDNN_MAX_CPU_ISA": onednn}
    variables["OMP_WAIT_POLICY"] = "passive"  # threads that spin take a core from other tests
    command = [sys.executable, str(ROOT / "tests" / "exact_bits.py"), str(threads)]
    with patch.dict(os.environ, variables):
        status, out, err = run(*command)
    assert status == 0, err
    assert json.loads(out) == exact_bits.RECORDED


def test_bits_are_the_recorded_ones_on_this_device(device: str) -> None:
    found = exact_bits.products(device) | exact_bits.rules(device)
    assert found.items() < exact_bits.RECORDED.items()


def by_int8(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have int8 products taken, which any processor computes; returns the lengths of their sums."""
    calls: list[int] = []

    def int_mm(a: Tensor, b: Tensor, *, out: Tensor) -> None:
        calls.append(a.shape[1])
        out.copy_(a.long() @ b.long())

    monkeypatch.setattr(exact_digits, "has_int8", lambda: True)
    monkeypatch.setattr(exact_digits, "_MIN_LARGE_PRODUCT", 1)
    monkeypatch.setattr(torch, "_int_mm", int_mm)
    return calls


PAIRS = [(wide(23, 35), wide(7, 35, seed=9)), (wide(3, 5, 7), wide(3, 4, 7, seed=9))]
CONSTANTS = [
    {"_BLOCK": 1, "_LEAST_ROWS": 1, "CHAIN": 1},
    {"_BLOCK": 7, "_LEAST_FLOAT_ROWS": 2, "_MIN_LARGE_PRODUCT": 1},
    {"_BLOCK": 100, "_LEAST_ROWS": 2, "CHAIN": 8, "_FLOAT_CHAIN": 3},
]


@pytest.mark.parametrize(
    "constants, dtype",
    [*product(CONSTANTS, [torch.float32]), *product(CONSTANTS[1:], [torch.bfloat16])],
    ids=str,
)
def test_blocks_and_chains_do_not_matter(
    constants: dict[str, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [[(t * 2.0**-9).to(dtype) for t in pair] for pair in PAIRS]
    expected = [(exact_matmul(a, b), exact_matmul(a, a.clone())) for a, b in pairs]
    assert_same_bits(expected[0][0], reference.exact_matmul(*pairs[0]))
    for name, value in constants.items():
        monkeypatch.setattr(exact_digits, name, value)
    for int8 in (False, True):
        calls = by_int8(monkeypatch) if int8 else []
        for (a, b), (found, square) in zip(pairs, expected, strict=True):
            for x, y in ((a, b), (a.mT.contiguous().mT, b.mT.contiguous().mT)):
                assert_same_bits(exact_matmul(x, y), found)
                assert_same_bits(exact_matmul_t(x), square)
        assert any(calls) == int8
    with pytest.raises(AssertionError):
        assert_same_bits(pairs[0][0].float() @ pairs[0][1].float().mT, expected[0][0].float())


@pytest.mark.parametrize("k", [exact_digits.CHAIN, exact_digits.CHAIN + 1])
def test_the_longest_chains_of_the_least_digits(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.full((1, 8 * k), -(127 * 2.0**24 - 2.0**23 + 2.0**15 + 2.0**7) / 2.0**31)
    # So that sums of two products are odd.
    x += torch.arange(8 * k) % 9 * (2.0**16 + 2.0**8) / 2.0**31
    x[:, -1] = (2.0**24 + 2) / 2.0**31  # so that T has 54 significant bits
    a, b = torch.cat([x, wide(1, 8 * k)]), x.clone()
    expected = reference.exact_matmul(a[:, :k], b[:, :k])
    monkeypatch.setattr(exact_digits, "has_int8", lambda: False)
    assert_same_bits(exact_matmul(a[:, :k], b[:, :k]), expected)
    e, f = (exact_digits.row_exponents(t) for t in (a, b))
    total = exact_digits.sums(a, b, e, f)
    by_int8(monkeypatch)
    assert_same_bits(exact_matmul(a[:, :k], b[:, :k]), expected)
    assert torch.equal(exact_digits.sums(a, b, e, f), total)
    for name in ("_MIN_PRODUCT", "_MIN_LARGE_PRODUCT"):
        monkeypatch.setattr(exact_digits, name, 2**30)
    for name, too_long in (("CHAIN", 8 * k), ("_FLOAT_CHAIN", 2 * exact_digits._FLOAT_CHAIN)):
        with monkeypatch.context() as patched:
            patched.setattr(exact_digits, name, too_long)
            assert not torch.equal(exact_digits.sums(a, b, e, f), total)


def test_sums_that_int64_may_not_hold_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_digits, "LONGEST", 8)
    exact_matmul(random(2, 8), random(3, 8))
    with pytest.raises(ConfigError, match="an exact sum has 9 terms, expected at most 8; split it"):
        exact_matmul(random(2, 9), random(3, 9))


def test_rows_that_are_not_finite_change_no_others(device: str) -> None:
    nan, inf = math.nan, math.inf
    a, b = random(8, 6, device=device), random(7, 6, device=device, seed=1)
    a[0, 2], a[1, 3], a[2, 0], a[2, 1], a[3, 4], a[3, 5], a[4] = nan, inf, inf, -inf, -inf, inf, 0.0
    b[0, 3], b[1, 3], b[2, 5], b[3], b[4, 2:4] = 0.0, -inf, nan, 0.0, inf
    usual = (a.isfinite().all(1)[:, None]) & b.isfinite().all(1)
    found, finite = exact_matmul(a, b), exact_matmul(a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0))
    assert_same_bits(found[usual], finite[usual])
    assert_close(exact_matmul_t(a), exact_matmul(a, a.clone()), rtol=0, atol=0, equal_nan=True)
    assert_close(exact_matmul(a[None], b[None])[0], found, rtol=0, atol=0, equal_nan=True)


# Derivatives are exact products.


@pytest.mark.parametrize("dims", [(0, 0), (0, 1), (2, 0)], ids=str)
def test_vmap_over_two_dimensions_of_one_tensor(dims: tuple[int, int], device: str) -> None:
    """Only a product of the same slices is symmetric."""
    x = random(5, 5, 5).to(device)
    found = torch.vmap(exact_matmul, dims)(x, x)
    pairs = zip(x.unbind(dims[0]), x.unbind(dims[1]), strict=True)
    assert_same_bits(found, torch.stack([reference.exact_matmul(a, b) for a, b in pairs]))


def test_derivatives_are_exact_products(device: str) -> None:
    a, b, g, x, h, da, db = (
        wide(*shape, device=device, seed=seed)
        for seed, shape in enumerate([(6, 5), (4, 5), (6, 4), (7, 5), (7, 7), (6, 5), (4, 5)])
    )
    for found, expected in zip(
        vjp(exact_matmul, a, b)[1](g),
        (exact_matmul(g, b.mT), exact_matmul(g.mT, a.mT)),
        strict=True,
    ):
        assert_same_bits(found, expected)
    (by_x,) = vjp(exact_matmul_t, x)[1](h)
    assert_same_bits(by_x, exact_matmul(h, x.mT) + exact_matmul(h.mT, x.mT))
    both = exact_matmul(da, b) + exact_matmul(a, db)
    assert_same_bits(jvp(exact_matmul, (a, b), (da, db))[1], both)
