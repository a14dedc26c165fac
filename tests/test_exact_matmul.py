# SPDX-License-Identifier: MIT
"""Exact products beside their formula in Python's integers: bits, whatever the order, and errors."""

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from unittest.mock import patch

import exact_bits
import pytest
import torch
from commands import ROOT, start
from exact_bits import BITS, CONTROL, digests, made_of_integers
from hypothesis import given
from hypothesis import strategies as st
from samples import LAYOUTS, assert_symmetric, bits, normal, property_test
from torch import Tensor
from torch.func import grad, hessian, jvp, vjp, vmap
from torch.testing import assert_close

from torchpar import exact_matmul, exact_matmul_t, reference
from torchpar.errors import ConfigError
from torchpar.ops import _exact
from torchpar.ops._matrix import half_sum
from torchpar.parallel.split import operands
from torchpar.parallel.split.operands import Operand

LARGEST = torch.finfo(torch.float32).max
LEAST = 2.0**-149  # subnormal


# The formula, in Python's integers.


def exponent(row: list[float]) -> int:
    """The least e from −149 on for which all |x| are less than (1 − 2⁻⁷)·2^e."""
    e = -149
    while any(abs(x) >= (1 - 2.0**-7) * 2.0**e for x in row):
        e += 1
    return e


def integer_digits(x: float, e: int) -> list[int]:
    """The four digits of round(x · 2^(31 − e)), ties to even, each from −128 to 127; the first one first."""
    integer, found = round(Fraction(x) * Fraction(2) ** (31 - e)), []
    for _ in range(3):
        digit = (integer + 128) % 256 - 128
        integer, found = (integer - digit) // 256, [digit, *found]
    assert -128 <= integer <= 127
    return [integer, *found]


def integer_sums(a: list[list[float]], b: list[list[float]]) -> list[list[int]]:
    """T of the rows of a and b."""

    def cut(row: list[float]) -> list[tuple[int, ...]]:
        e = exponent(row)
        return list(zip(*(integer_digits(x, e) for x in row), strict=True))

    def total(d: list[tuple[int, ...]], c: list[tuple[int, ...]]) -> int:
        pairs = ((p, q) for p in range(4) for q in range(4 - p))
        return sum(sum(x * y for x, y in zip(d[p], c[q], strict=True)) << 8 * (3 - p - q) for p, q in pairs)

    columns = [cut(row) for row in b]
    return [[total(d, c) for c in columns] for d in map(cut, a)]


def nearest(value: Fraction) -> float:
    """The float32 nearest to a rational number, ties to even."""
    if value == 0:
        return 0.0
    q = -126
    while q < 128 and abs(value) >= Fraction(2) ** (q + 1):
        q += 1
    rounded = float(abs(round(value / Fraction(2) ** (q - 23))) * Fraction(2) ** (q - 23))
    return math.copysign(rounded if rounded < 2.0**128 else math.inf, value)


def formula(a: Tensor, b: Tensor) -> Tensor:
    """The product of finite matrices."""
    rows, columns = a.tolist(), b.tolist()
    e, f = ([exponent(row) for row in side] for side in (rows, columns))
    sums = integer_sums(rows, columns)
    return torch.tensor(
        [
            [nearest(t * Fraction(2) ** (e[i] + f[j] - 38)) for j, t in enumerate(line)]
            for i, line in enumerate(sums)
        ]
    ).view(len(rows), len(columns))


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert torch.equal(bits(actual.cpu()), bits(expected.cpu()))


def random(*shape: int, device: str = "cpu", seed: int = 0) -> Tensor:
    return normal(*shape, dtype=torch.float32, device=device, seed=seed)


def wide(*shape: int, device: str = "cpu", seed: int = 0) -> Tensor:
    """Numbers whose magnitudes differ by factors up to 2⁴⁰ within a row."""
    return made_of_integers(*shape, seed=seed).to(device)


def float32(x: float) -> float:
    return torch.tensor(max(-LARGEST, min(LARGEST, x)), dtype=torch.float32).item()


@st.composite
def rows(draw: Callable[..., int], count: int, k: int, scale: int) -> list[list[float]]:
    """Rows of numbers near 2^scale, of some that are much smaller, of zeros, or of any floats at all."""
    near = st.builds(
        lambda mantissa, shift: float32(math.ldexp(mantissa, scale - 24 - shift)),
        st.integers(-(2**24), 2**24),
        st.sampled_from([0, 0, 1, 2, 9, 17, 31, 32]),
    )
    fixed = st.sampled_from([0.0, -0.0, LEAST, -LEAST, LARGEST, -LARGEST])
    anything = st.floats(width=32, allow_nan=False, allow_infinity=False)
    element = draw(st.sampled_from([near, near, near | fixed, anything]))
    return draw(st.lists(st.lists(element, min_size=k, max_size=k), min_size=count, max_size=count))


@given(st.data(), *[st.integers(1, 3)] * 2, st.integers(1, 6), st.integers(-149, 128), st.integers(-160, 132))
@property_test
def test_bits_are_the_formulas(device: str, data, m, n, k, scale, scale_of_products) -> None:
    a = torch.tensor(data.draw(rows(m, k, scale)), device=device)
    b = torch.tensor(data.draw(rows(n, k, min(max(scale_of_products - scale, -149), 128))), device=device)
    assert_same_bits(exact_matmul(a, b), formula(a, b))
    assert_same_bits(exact_matmul_t(a), formula(a, a))


@pytest.mark.parametrize(
    "scale, kind",
    [
        (2.0**-160, lambda c: c == 0),
        (2.0**-135, lambda c: (c != 0) & (c.abs() < 2.0**-126)),
        (1.0, lambda c: c.abs() > 2.0**-126),
        (2.0**125, lambda c: (c.abs() > 2.0**126) & c.isfinite()),
        (2.0**130, torch.isinf),
    ],
    ids=["zero", "subnormal", "normal", "large", "infinite"],
)
def test_bits_of_results_of_every_size(scale: float, kind: Callable[[Tensor], Tensor], device: str) -> None:
    a, b = random(5, 9, device=device), random(4, 9, device=device, seed=1)
    half = math.sqrt(scale) if math.frexp(scale)[1] % 2 else math.sqrt(scale / 2)
    a, b = a * half, b * (scale / half)
    found = exact_matmul(a, b)
    assert kind(found).sum() >= 4
    assert_same_bits(found, formula(a, b))


def test_ties_go_to_even(device: str) -> None:
    # Of X, whose unit is 2⁻³⁰ in a row whose largest is 1; of the sum, whose last bit is worth 2⁻²³.
    units = torch.tensor([[1.0, n * 2.0**-31] for n in range(-5, 6)], device=device)
    second = torch.tensor([[0.0, 1.0]], device=device)
    assert_same_bits(exact_matmul(units, second), formula(units, second))
    assert exact_matmul(units, second).view(-1).mul(2.0**30).tolist() == [-2, -2, -2, -1, 0, 0, 0, 1, 2, 2, 2]
    sums = torch.tensor([[1.0, n * 2.0**-24] for n in range(6)], device=device)
    ones = torch.ones(1, 2, device=device)
    assert exact_matmul(sums, ones).view(-1).sub(1).mul(2.0**23).tolist() == [0, 0, 1, 2, 2, 2]


def test_a_subnormal_result_is_rounded_once(device: str) -> None:
    # 2⁻¹⁵⁰ is half of the least float32; rounded to float32 before, the sum would lose what lies above it.
    a = torch.tensor([[2.0**-75, 2.0**-105]], device=device)
    b = torch.full((1, 2), 2.0**-75, device=device)
    assert exact_matmul(a, b).item() == LEAST
    assert exact_matmul(a[:, :1], b[:, :1]).item() == 0.0


def test_exponents_of_rows(device: str) -> None:
    edges = torch.tensor([1 - 2.0**-7, 1 - 2.0**-8, 0.5 - 2.0**-8, 1.0, 0.75])
    edges = torch.cat([edges, edges.nextafter(torch.tensor(2.0)), edges.nextafter(torch.tensor(0.0))])
    x = torch.cat([torch.ldexp(edges, torch.tensor(e)) for e in (-140, -126, -125, -1, 0, 1, 127)])
    x = torch.cat([x, torch.tensor([0.0, -0.0, LEAST, LARGEST])]).view(-1, 1).to(device)
    assert _exact.row_exponents(-x).view(-1).tolist() == [exponent(row) for row in x.tolist()]


def test_no_result_is_a_negative_zero(device: str) -> None:
    for m, k in ((1, 1), (40, 1), (600, 1), (3, 2), (40, 17)):  # an integer 0 has no sign
        zero, negative = torch.zeros(m, k, device=device), -torch.ones(m, k, device=device)
        assert not exact_matmul(zero, negative).signbit().any()
        assert not exact_matmul(negative, -zero).signbit().any()


# The error.


def worst(k: int) -> tuple[Tensor, Tensor]:
    """Rows whose product is 0, but whose digits but the first are −128 or −127: what is left out adds up."""
    x = -(65 * 2.0**24 - 2.0**23 - 2.0**15 - 2.0**7) / 2.0**31
    return torch.full((1, k), x), torch.full((1, k), x) * torch.tensor([1.0, -1.0]).repeat(k // 2)


def error_beyond_rounding(a: Tensor, b: Tensor) -> float:
    """The largest error less half an ulp, divided by k·2⁻²⁷·max|a_i|·max|b_j|."""
    found, largest = exact_matmul(a, b).tolist(), -math.inf
    for i, row in enumerate(a.tolist()):
        for j, other in enumerate(b.tolist()):
            products = [Fraction(x) * Fraction(y) for x, y in zip(row, other, strict=True)]
            exact = sum(products)
            half_ulp = Fraction(2) ** (
                max(math.frexp(max(abs(found[i][j]), float(abs(exact))))[1], -125) - 25
            )
            bound = (
                len(row) * Fraction(2) ** -27 * Fraction(max(map(abs, row))) * Fraction(max(map(abs, other)))
            )
            largest = max(largest, float((abs(Fraction(found[i][j]) - exact) - half_ulp) / bound))
    return largest


ADVERSARIAL = {
    "normal": (random(9, 64), random(8, 64, seed=1)),
    "wide": (wide(9, 64), wide(8, 64, seed=5000)),
    "one large element": (torch.cat([torch.ones(4, 1), random(4, 63) * 2.0**-12], 1), random(4, 64)),
    "powers of two": (2.0 ** -torch.arange(64).view(1, 64), 2.0 ** -torch.arange(64).flip(0).view(1, 64)),
    "small results": (random(9, 64) * 2.0**-70, random(8, 64, seed=1) * 2.0**-70),
    "subnormal": (random(9, 64) * 2.0**-140, random(8, 64, seed=1) * 2.0**100),
    "the least number": (torch.full((1, 1), LEAST), torch.full((1, 1), (0.5 + 2.0**-17) * 2.0**100)),
    "cancelling": worst(64),
    "the same": (worst(64)[0], worst(64)[0]),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_error_is_within_the_bound(name: str, device: str) -> None:
    a, b = (t.to(device) for t in ADVERSARIAL[name])
    assert error_beyond_rounding(a, b) <= 1


def test_the_bound_is_tight_within_a_factor_of_3() -> None:
    assert error_beyond_rounding(*worst(64)) > 1 / 3


def test_small_entries_of_a_row_keep_the_documented_bits(device: str) -> None:
    second = torch.tensor([[0.0, 1.0]], device=device)
    for largest in (1.0, 0.99, 0.5, 0.75, 1 - 2.0**-7, LARGEST, 2.0**-80):
        entry = random(1000, 1, device=device).abs().clamp(1, 2) * (largest / 2)
        a = torch.cat([torch.full_like(entry, largest), entry * 2.0**-19], 1)
        kept = exact_matmul(a, second).double() / a[:, 1:].double()
        assert ((kept - 1).abs() <= 2.0**-10).all()
        assert (kept != 1).any()
        a[:, 1] = largest * 2.0**-33
        assert not exact_matmul(a, second).any()


# The same bits, whatever the order.


def started(capability: str | None) -> subprocess.Popen[str]:
    """Prints the hashes under 1 and 2 threads, in a process where ATen uses the named instructions."""
    with patch.dict(os.environ):
        os.environ.pop("ATEN_CPU_CAPABILITY", None)
        if capability is not None:
            os.environ["ATEN_CPU_CAPABILITY"] = capability
        return start(sys.executable, str(ROOT / "tests" / "exact_bits.py"))


def test_bits_are_the_recorded_ones_under_any_instructions_and_threads() -> None:
    processes = [started(capability) for capability in ("default", "avx2", None)]
    found = [digests()]
    for process in processes:
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
        found += map(json.loads, out.splitlines())
    assert len(found) == 7
    for digest in found:
        assert {name: digest[name] for name in BITS} == BITS
    if platform.machine() in ("x86_64", "AMD64"):
        assert found[1][CONTROL] != found[3][CONTROL]  # the same comparison rejects a library's function


def test_bits_are_the_recorded_ones_on_this_device(device: str) -> None:
    found = digests(device)
    assert {name: found[name] for name in BITS} == BITS


def test_order_of_the_columns_does_not_matter(device: str) -> None:
    a, b = wide(65, 129, device=device), wide(33, 129, device=device, seed=9)
    expected, native = exact_matmul(a, b), a @ b.mT
    differ = 0
    for seed in range(3):
        order = torch.randperm(129, generator=torch.Generator().manual_seed(seed)).to(device)
        assert_same_bits(exact_matmul(a[:, order], b[:, order]), expected)
        differ += not torch.equal(a[:, order] @ b[:, order].mT, native)
    assert differ > 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_do_not_matter(layout: str, device: str) -> None:
    for shape in ((67, 35), (2, 5, 7)):
        a = LAYOUTS[layout](random(*shape, device=device))
        for other in ("contiguous", layout, "transposed"):
            b = LAYOUTS[other](random(*shape, device=device, seed=1))
            expected = exact_matmul(*(t.clone(memory_format=torch.contiguous_format) for t in (a, b)))
            assert_same_bits(exact_matmul(a, b), expected)
        assert_same_bits(exact_matmul_t(a), exact_matmul(a, a.clone()))


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "stepped"])
def test_int8_products_have_the_bits_of_float64_ones(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = LAYOUTS[layout](wide(9, 33)), wide(5, 33, seed=9)
    monkeypatch.setattr(_exact, "has_int8", lambda: False)
    expected = exact_matmul(a, b), exact_matmul_t(a)
    calls = by_int8(monkeypatch)
    assert_same_bits(exact_matmul(a, b), expected[0])
    assert_same_bits(exact_matmul_t(a), expected[1])
    assert calls == [33, 66, 99, 132] * 2


def by_int8(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have int8 products taken; returns the list of the lengths of their sums."""
    calls: list[int] = []
    plain = torch._int_mm

    def int_mm(a: Tensor, b: Tensor) -> Tensor:
        calls.append(a.shape[1])
        return plain(a, b)

    monkeypatch.setattr(_exact, "has_int8", lambda: True)
    monkeypatch.setattr(_exact, "_INT8_WORTH", 0)
    monkeypatch.setattr(torch, "_int_mm", int_mm)
    return calls


@pytest.mark.parametrize("block", [1, 7, 100])
def test_blocks_do_not_matter(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [(wide(67, 35), wide(12, 35, seed=9)), (wide(3, 5, 7), wide(3, 4, 7, seed=9))]
    pairs += [(a.mT.contiguous().mT, b.mT.contiguous().mT) for a, b in pairs]
    expected = [exact_matmul(a, b) for a, b in pairs]
    monkeypatch.setattr(_exact, "_BLOCK", block)
    for (a, b), product in zip(pairs, expected, strict=True):
        assert_same_bits(exact_matmul(a, b), product)
    by_int8(monkeypatch)
    assert_same_bits(exact_matmul(*pairs[0]), expected[0])


@pytest.mark.parametrize("chain, long_chain", [(8, 2**23), (1, 64), (8, 24), (34, 35)])
def test_chains_do_not_matter(chain: int, long_chain: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for shape in ((7, 35), (2, 3, 35)):
        a, b = wide(*shape), wide(*shape, seed=9)
        expected = exact_matmul(a, b), exact_matmul_t(a)
        with monkeypatch.context() as short:
            short.setattr(_exact, "CHAIN", chain)
            short.setattr(_exact, "LONG_CHAIN", long_chain)
            assert_same_bits(exact_matmul(a, b), expected[0])
            assert_same_bits(exact_matmul_t(a), expected[1])
            if len(shape) == 2:
                by_int8(short)
                assert_same_bits(exact_matmul(a, b), expected[0])


@pytest.mark.parametrize("k", [_exact.CHAIN, _exact.CHAIN + 1])
def test_the_longest_chains_of_the_least_digits(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.full((1, k), -(127 * 2.0**24 - 2.0**23 + 2.0**15 + 2.0**7) / 2.0**31)
    a, b = torch.cat([x, wide(1, k)]), x.clone()
    expected = formula(a, b)
    monkeypatch.setattr(_exact, "has_int8", lambda: False)
    assert_same_bits(exact_matmul(a, b), expected)
    by_int8(monkeypatch)
    assert_same_bits(exact_matmul(a, b), expected)


@pytest.mark.parametrize("shape", [(5, 3), (511, 9), (512, 9), (700, 9), (2, 600, 3)], ids=str)
def test_half_of_a_product_has_the_bits_of_all_of_it(shape: tuple[int, ...], device: str) -> None:
    x = wide(*shape, device=device)
    found = exact_matmul_t(x)
    assert_same_bits(found, exact_matmul(x, x.clone()))
    assert_symmetric(found)


def shared_parts(a: Tensor, b: Tensor, cuts: list[int]) -> Tensor:
    """The product of parts of k, whose sums are added as integers."""
    e, f = _exact.row_exponents(a), _exact.row_exponents(b)
    parts = [
        Operand(x, e).sums(Operand(y, f)) for x, y in zip(a.split(cuts, 1), b.split(cuts, 1), strict=True)
    ]
    assert all(part.dtype == torch.int64 for part in parts)
    return _exact.rounded(sum(parts), e, f)


@pytest.mark.parametrize("cuts", [[35], [17, 18], [1, 30, 4], [0, 35], [5] * 7], ids=str)
def test_sums_of_parts_are_those_of_the_whole(cuts: list[int], device: str) -> None:
    a, b = wide(7, 35, device=device), wide(5, 35, device=device, seed=9)
    assert_same_bits(shared_parts(a, b, cuts), exact_matmul(a, b))


def test_operands_of_several_rows_are_one(device: str) -> None:
    a, b = wide(7, 35, device=device), wide(5, 35, device=device, seed=9)
    other = Operand(b, _exact.row_exponents(b))
    pieces = [Operand(t, _exact.row_exponents(t)) for t in a.split([3, 4])]
    assert_same_bits(Operand.cat(pieces).product(other), exact_matmul(a, b))
    assert_same_bits(torch.cat([piece.product(other) for piece in pieces]), exact_matmul(a, b))


# Derivatives are exact products.


def test_gradients_are_exact_products(device: str) -> None:
    a, b, g, x, h = (
        wide(*shape, device=device, seed=seed)
        for seed, shape in enumerate([(6, 5), (4, 5), (6, 4), (7, 5), (7, 7)])
    )
    by_a, by_b = exact_matmul(g, b.mT), exact_matmul(g.mT, a.mT)
    by_x = exact_matmul(half_sum(h), x.mT) * 2
    leaves = [t.clone().requires_grad_() for t in (a, b, x)]
    found = torch.autograd.grad(exact_matmul(*leaves[:2]), leaves[:2], g)
    (found_x,) = torch.autograd.grad(exact_matmul_t(leaves[2]), leaves[2], h)
    value, pullback = vjp(exact_matmul, a, b)
    assert_same_bits(value, exact_matmul(a, b))
    for by_some in (found, pullback(g), grad(lambda a, b: (g * exact_matmul(a, b)).sum(), (0, 1))(a, b)):
        assert_same_bits(by_some[0], by_a)
        assert_same_bits(by_some[1], by_b)
    assert_same_bits(found_x, by_x)
    assert_same_bits(vjp(exact_matmul_t, x)[1](h)[0], by_x)
    assert not torch.equal(by_a, g @ b)


def test_tangents_are_exact_products(device: str) -> None:
    a, b, da, db = (random(*s, device=device, seed=i) for i, s in enumerate([(6, 5), (4, 5)] * 2))
    both = exact_matmul(da, b) + exact_matmul(a, db)
    assert_same_bits(jvp(exact_matmul, (a, b), (da, db))[1], both)
    assert_same_bits(jvp(lambda a: exact_matmul(a, b), (a,), (da,))[1], exact_matmul(da, b))
    assert_same_bits(jvp(lambda b: exact_matmul(a, b), (b,), (db,))[1], exact_matmul(a, db))
    one_side = exact_matmul(da, a)
    assert_same_bits(jvp(exact_matmul_t, (a,), (da,))[1], one_side + one_side.mT)


def test_batches_and_vmap_have_the_bits_of_samples(device: str) -> None:
    a, b = wide(3, 6, 5, device=device), wide(3, 4, 5, device=device, seed=9)
    samples = torch.stack([exact_matmul(*pair) for pair in zip(a, b, strict=True)])
    squares = torch.stack([exact_matmul_t(sample) for sample in a])
    assert_same_bits(exact_matmul(a, b), samples)
    assert_same_bits(vmap(exact_matmul)(a, b), samples)
    assert_same_bits(vmap(exact_matmul, (0, None))(a, b[0])[0], samples[0])
    assert_same_bits(exact_matmul_t(a), squares)
    assert_same_bits(vmap(exact_matmul_t, 2, 1)(a.movedim(0, 2)), squares.movedim(0, 1))


def test_hessian_is_of_exact_products(device: str) -> None:
    a, b = random(3, 5, device=device), random(4, 5, device=device, seed=1)
    found = hessian(lambda a: exact_matmul(a, b).square().sum())(a)
    units = torch.eye(a.numel(), device=device).view(-1, *a.shape)
    expected = torch.stack([exact_matmul(2 * exact_matmul(unit, b), b.mT) for unit in units])
    assert_close(found.movedim((2, 3), (0, 1)).flatten(0, 1), expected, rtol=0, atol=0)


# NaN, infinities and overflow.


def test_nan_and_infinities_are_torch_mms(device: str) -> None:
    nan, inf = math.nan, math.inf
    a, b = random(8, 6, device=device), random(7, 6, device=device, seed=1)
    a[0, 2], a[1, 3], a[2, 0], a[2, 1], a[3, 4], a[3, 5], a[4] = nan, inf, inf, -inf, -inf, inf, 0.0
    b[0, 3], b[1, 3], b[2, 5], b[3], b[4, 2:4] = 0.0, -inf, nan, 0.0, inf
    plain, found = a @ b.mT, exact_matmul(a, b)
    special = ~plain.isfinite()
    assert special.any()
    assert not special.all()
    assert_close(found[special], plain[special], rtol=0, atol=0, equal_nan=True)
    finite = exact_matmul(a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0))
    assert_same_bits(found[~special], finite[~special])
    assert_close(exact_matmul_t(a), exact_matmul(a, a.clone()), rtol=0, atol=0, equal_nan=True)
    assert_close(exact_matmul(a[None], b[None])[0], found, rtol=0, atol=0, equal_nan=True)


def test_a_sum_overflows_only_if_the_result_does(device: str) -> None:
    a = torch.tensor([[LARGEST, LARGEST, -LARGEST, -LARGEST], [LARGEST] * 4, [-LARGEST] * 4], device=device)
    b = torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, 0], [LARGEST] * 4], device=device)
    found = exact_matmul(a, b)
    assert found[0].tolist() == [0.0, LARGEST, 0.0]
    assert found[1:].tolist() == [[math.inf] * 3, [-math.inf] * 3]


# Negative controls: the comparison of bits rejects each of these.


def without_carry(x: Tensor, e: Tensor) -> Tensor:
    """The bytes of X as digits, of which those above 127 took nothing from the next."""
    integers = _exact.scaled(x, _exact.SCALE - e).round().to(torch.int32)
    return torch.stack([(integers >> 8 * (3 - p)).to(torch.int8) for p in range(4)], -2)


def without_the_last_order(a: Tensor, b: Tensor) -> list[Tensor]:
    pairs = ((p, q) for p in range(3) for q in range(3 - p))
    return [
        sum(a[:, p].double() @ b[:, q].double().mT * 2.0 ** (8 * (3 - p - q)) for p, q in pairs)  # type: ignore[list-item]
    ]


def own_exponents(a: Tensor, b: Tensor, cuts: list[int]) -> Tensor:
    """A product of parts of k, each of which has exponents of its own, added in float64."""
    total = torch.zeros(len(a), len(b), dtype=torch.float64)
    for x, y in zip(a.split(cuts, 1), b.split(cuts, 1), strict=True):
        e, f = _exact.row_exponents(x), _exact.row_exponents(y)
        total += torch.ldexp(Operand(x, e).sums(Operand(y, f)).double(), e + f.mT - 38)
    return total.float()


@pytest.mark.parametrize(
    "name, wrong", [("digits", without_carry), ("_orders", without_the_last_order)], ids=["carry", "order"]
)
def test_wrong_digits_are_rejected(
    name: str, wrong: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = random(5, 9), random(4, 9, seed=1)
    expected = formula(a, b)
    assert_same_bits(exact_matmul(a, b), expected)
    monkeypatch.setattr(_exact, name, wrong)
    assert_close(exact_matmul(a, b), expected, rtol=0.1, atol=2.0 if name == "digits" else 1e-5)
    with pytest.raises(AssertionError):
        assert_same_bits(exact_matmul(a, b), expected)


def test_int8_products_that_are_added_in_float32_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (random(4, 4096, seed=seed).abs().clamp(max=0.9) + 1 for seed in (0, 1))
    expected = exact_matmul(a, b)
    calls = by_int8(monkeypatch)
    assert_same_bits(exact_matmul(a, b), expected)
    exact = torch._int_mm

    def one_in_float32(left: Tensor, right: Tensor) -> Tensor:
        if left.shape[1] > 4096:
            return exact(left, right)
        total = torch.zeros(len(left), right.shape[1])
        for column, row in zip(left.T.float(), right.float(), strict=True):
            total += column[:, None] * row
        return total.int()

    monkeypatch.setattr(torch, "_int_mm", one_in_float32)
    assert_close(exact_matmul(a, b), expected, rtol=1e-5, atol=0)
    with pytest.raises(AssertionError):
        assert_same_bits(exact_matmul(a, b), expected)
    assert len(calls) == 4 + 2 * 3


def test_parts_with_exponents_of_their_own_are_rejected() -> None:
    a, b = wide(7, 35), wide(5, 35, seed=9)
    expected = exact_matmul(a, b)
    assert_same_bits(own_exponents(a, b, [35]), expected)
    assert_close(own_exponents(a, b, [17, 18]), expected, rtol=1e-3, atol=0.1)
    with pytest.raises(AssertionError):
        assert_same_bits(own_exponents(a, b, [17, 18]), expected)


def test_the_kernel_has_the_formulas_constants() -> None:
    pytest.importorskip("triton", reason="Triton compiles the kernels")
    from torchpar.kernels import exact_matmul as kernels

    assert (kernels.CHAIN, kernels.LONGEST) == (_exact.CHAIN, _exact.LONG_CHAIN)
    assert (kernels.LARGEST.value, kernels.WEIGHT.value) == (_exact.LARGEST, _exact.WEIGHT)
    assert kernels.HALVES.value == _exact.CARRY


def test_results_are_float32_whatever_the_default_is() -> None:
    a, b = random(3, 4), random(5, 4)
    expected = exact_matmul(a, b)
    torch.set_default_dtype(torch.float64)
    try:
        assert_same_bits(exact_matmul(a, b), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_sums_that_int64_may_not_hold_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    a = random(2, 9)
    operand = Operand(a, _exact.row_exponents(a))
    assert operand.sums(operand).shape == (2, 2)
    monkeypatch.setattr(operands, "LONG_CHAIN", 8)
    with pytest.raises(ConfigError, match="a sum has 9 terms, expected at most 8; take smaller"):
        operand.sums(operand)


def test_a_plain_product_has_the_same_bits() -> None:
    for a, b in (ADVERSARIAL[name] for name in ("normal", "wide", "small results", "subnormal")):
        assert_same_bits(exact_matmul(a, b), reference.exact_matmul(a, b))


def test_a_training_has_the_recorded_bits() -> None:
    assert exact_bits.trained() == exact_bits.TRAINED
