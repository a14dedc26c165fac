# SPDX-License-Identifier: MIT
"""Launches of each kernel, with operands whose results are known exactly.

Operands are small integers, so that all sums are exact in any order. Sigmoids are compared within a bound.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from samples import LAYOUTS
from torch import Tensor

from torchpar.kernels import exact_matmul, matmul_t, maximum, sigmoid_backward
from torchpar.kernels import linear_sigmoid as linear
from torchpar.kernels.tiles import Device, Tiles

from .launch import Gpu

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# The relative error of a sigmoid for |z| up to 32. Float32: of ex2 and of div 2⁻²² each, and of one rounding;
# the kernel corrects the product z·log2(e). 16 bits: of the result's rounding, and of that product. Float64:
# of exp and of div one ulp each, of a sum, and as much again for the executor's fma, which rounds twice.
SIGMOID = {BF16: 2**-8 + 2**-17, F16: 2**-11 + 2**-17, F32: 9 * 2**-24, F64: 8 * 2**-53}


@dataclass
class Case:
    """A launch: ``run(wrap, *operands)`` returns the tensors that should equal ``results(*operands)``.

    Args:
        multiprocessors: of the GPU; persistent kernels begin as many programs, or twice as many.
        bound: of the relative error; 0 for equal bits.
    """

    operands: Callable[[], Sequence[Tensor]]
    run: Callable[..., Any]
    results: Callable[..., Any]
    multiprocessors: int = 132
    bound: float = 0.0
    capability: int = 90
    written: int = -1  # the number of an operand that is changed in place
    layout: str = ""  # of all operands: one of `LAYOUTS`

    def execute(self, gpu: Gpu) -> list[Tensor]:
        """The results on the executor."""
        operands = [gpu.tensor(t) for t in self.draw()]
        device = Device("executor", self.capability, self.multiprocessors)
        with ExitStack() as stack:
            for module in ("exact_matmul", "linear_sigmoid", "matmul_t", "tiles"):
                stack.enter_context(patch(f"torchpar.kernels.{module}.device", lambda t: device))
            found = gpu.run(lambda wrap: self.run(wrap, *operands), self.capability)
        if self.written >= 0:
            found = operands[self.written]
        return [gpu.read(t) for t in (found if isinstance(found, tuple | list) else (found,))]

    def draw(self) -> list[Tensor]:
        torch.manual_seed(0)
        return [LAYOUTS[self.layout](t) if self.layout else t for t in self.operands()]

    def expected(self) -> list[Tensor]:
        results = self.results(*self.draw())
        return list(results) if isinstance(results, tuple | list) else [results]

    def agrees(self, found: list[Tensor], expected: list[Tensor]) -> bool:
        if not self.bound:
            return same_bits(found, expected)
        for a, b in zip(found, expected, strict=True):
            smallest = torch.finfo(a.dtype).smallest_normal * torch.finfo(a.dtype).eps  # a subnormal number
            if not ((a.double() - b).abs() <= self.bound * b.abs() + smallest / 2).all():
                return False
        return True


def same_bits(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether two lists of tensors have the same bits; all NaN are alike."""

    def bits(t: Tensor) -> Tensor:
        if t.is_floating_point():
            t = torch.where(t.isnan(), torch.full_like(t, torch.nan), t)
        return t.contiguous().view(torch.uint8)

    return all(torch.equal(bits(a), bits(b)) for a, b in zip(found, expected, strict=True))


def integers(*shape: int, dtype: torch.dtype = BF16, largest: int = 3, transposed: bool = False) -> Tensor:
    if transposed:
        shape = (*shape[:-2], shape[-1], shape[-2])
    t = torch.randint(-largest, largest + 1, shape).to(dtype)
    return t.mT if transposed else t


def symmetric(
    n: int,
    k: int,
    dtype: torch.dtype = BF16,
    precision: str = "ieee",
    tiles: Tiles | None = None,
    *,
    batch: tuple[int, ...] = (),
    transposed: str = "",
    other: bool = False,
    c: bool = False,
    **options: Any,
) -> Case:
    """``A·Aᵀ``, with ``other`` ``A·Bᵀ``, and with ``c`` ``2·A·Aᵀ − C/2``.

    ``A·Bᵀ`` should be symmetric. Here it is not: the result must be its lower triangle, mirrored.
    """

    def operands() -> list[Tensor]:
        a = integers(*batch, n, k, dtype=dtype, transposed="a" in transposed)
        given = [a]
        if other:
            given.append(integers(*batch, n, k, dtype=dtype, transposed="b" in transposed))
        if c:
            added = integers(*batch, n, n, dtype=dtype, transposed="c" in transposed)
            upper = torch.ones(n, n, dtype=torch.bool).triu(1)
            given.append(added.masked_fill_(upper, torch.nan))  # only the lower triangle is read
        return given

    def run(wrap: Any, a: Tensor, *others: Tensor) -> Any:
        b = others[0] if other else a
        adding = (others[-1], 2.0, -0.5) if c else ()
        return matmul_t.symmetric_product(a, b, precision, wrap, *adding, tiles=tiles)

    def results(a: Tensor, *others: Tensor) -> Tensor:
        b = others[0] if other else a
        product = a.double() @ b.double().mT
        if c:
            product = 2 * product - 0.5 * others[-1].double()
        return (product.tril() + product.tril(-1).mT).to(dtype)

    return Case(operands, run, results, **options)


def half_sum(
    n: int, dtype: torch.dtype = BF16, batch: tuple[int, ...] = (2,), unit: float = 1.0, **options: Any
) -> Case:
    return Case(
        lambda: [integers(*batch, n, n, dtype=dtype) * unit],
        lambda wrap, g: matmul_t.half_sum(g, wrap),
        lambda g: ((g.double() + g.double().mT) / 2).to(dtype),
        **options,
    )


def mirror(n: int, dtype: torch.dtype = BF16, batch: tuple[int, ...] = (), **options: Any) -> Case:
    return Case(
        lambda: [integers(*batch, n, n, dtype=dtype)],
        lambda wrap, c: matmul_t.mirror(c, wrap),
        lambda c: c.tril() + c.tril(-1).mT,
        written=0,
        **options,
    )


def sigmoid(
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype = BF16,
    precision: str = "ieee",
    tiles: Tiles | None = None,
    *,
    bias: bool = True,
    transposed: str = "",
    **options: Any,
) -> Case:
    """linear_sigmoid, of |z| up to about 32."""

    def operands() -> list[Tensor]:
        x = integers(m, k, dtype=dtype, largest=1, transposed="x" in transposed) / 2
        weight = integers(n, k, dtype=dtype, transposed="w" in transposed) / 4
        return [x, weight, *([integers(n, dtype=dtype)] if bias else [])]

    def run(wrap: Any, x: Tensor, weight: Tensor, given: Tensor | None = None) -> Any:
        return linear.linear_sigmoid(x, weight, given, precision, wrap, tiles=tiles)

    def results(x: Tensor, weight: Tensor, given: Tensor | None = None) -> Tensor:
        z = x.double() @ weight.double().T
        return torch.sigmoid(z if given is None else z + given.double())

    return Case(operands, run, results, bound=SIGMOID[dtype], **options)


def sigmoid_gradient(m: int, n: int, dtype: torch.dtype = BF16, **options: Any) -> Case:
    """y is a multiple of 1/16, so that sums are exact. More than 256 rows, in float32, have partial sums."""

    def run(wrap: Any, g: Tensor, y: Tensor) -> Any:
        dz = torch.empty(m, n, dtype=dtype, device="meta")
        with patch.object(Tensor, "sum", lambda t, dim: t):
            sums = sigmoid_backward.sigmoid_backward(g, y, dz, wrap)
        return dz, sums

    def results(g: Tensor, y: Tensor) -> Any:
        dz = g.double() * y.double() * (1 - y.double())
        if m <= 256:
            return dz.to(dtype), dz.sum(0).to(dtype)
        return dz.to(dtype), torch.stack([rows.sum(0) for rows in dz.split(256)]).to(
            F64 if dtype == F64 else F32
        ).to(dtype)

    def operands() -> list[Tensor]:
        return [integers(n, m, dtype=dtype).mT, torch.randint(17, (m, n)).to(dtype) / 16]

    return Case(operands, run, results, **options)


def larger(shape: tuple[int, ...], other: tuple[int, ...], dtype: torch.dtype = BF16, **options: Any) -> Case:
    """The maximum of two operands, one of which may be broadcast; with NaN."""

    def operands() -> list[Tensor]:
        a, b = integers(*shape, dtype=dtype), integers(*other, dtype=dtype).expand(shape)
        if dtype.is_floating_point:
            a.view(-1)[3] = torch.nan
        return [a, b]

    def run(wrap: Any, a: Tensor, b: Tensor) -> Tensor:
        out = torch.empty(shape, dtype=dtype, device="meta")
        maximum.maximum(a, b, out, wrap)
        return out

    return Case(operands, run, lambda a, b: torch.maximum(a, b), **options)


def larger_gradient(
    shape: tuple[int, ...], other: tuple[int, ...], dtype: torch.dtype = BF16, **options: Any
) -> Case:
    """The gradients of the maximum; where both are equal each has half, and with NaN all of it."""

    def operands() -> list[Tensor]:
        a, b = integers(*shape, dtype=dtype), integers(*other, dtype=dtype).expand(shape)
        a.view(-1)[3] = torch.nan
        return [integers(*shape, dtype=dtype), a, b]

    def run(wrap: Any, g: Tensor, a: Tensor, b: Tensor) -> Any:
        da, db = (torch.empty(shape, dtype=dtype, device="meta") for _ in range(2))
        maximum.maximum_backward(g, a, b, da, db, wrap)
        return da, db

    def results(g: Tensor, a: Tensor, b: Tensor) -> Any:
        share = torch.where(a == b, g / 2, g)
        return torch.where(a < b, 0, share), torch.where(b < a, 0, share)

    return Case(operands, run, results, **options)


def digits(x: Tensor, exponents: Tensor) -> list[Tensor]:
    """The four signed digits, int64, of the rows of ``x`` as integers: the formulas in `exact_matmul`."""
    whole = (x.double() * torch.exp2(31.0 - exponents.double())[:, None]).round().long()
    found: list[Tensor] = []
    for _ in range(3):
        found.insert(0, (whole + 128) % 256 - 128)
        whole = (whole - found[0]) // 256
    return [whole, *found]


def exact(
    m: int,
    n: int,
    k: int,
    *,
    same: bool = False,
    dtype: torch.dtype = F32,
    transposed: bool = False,
    special: bool = False,
    terms: int = exact_matmul.CHAIN,
    tiles: Tiles | None = None,
    **options: Any,
) -> Case:
    """The exact product, in chains of ``terms``; ``special``: with a row of NaN and one of ∞."""

    def operands() -> list[Tensor]:
        shapes = [(rows, k) for rows in (m, n)]
        a, b = (torch.randn(*s[::-1]).mT if transposed else torch.randn(s) for s in shapes)
        given = []
        for t in (a,) if same else (a, b):
            t *= torch.exp2(torch.randint(-3, 4, (len(t), 1)))
            given += [t, torch.frexp(t.abs().amax(1) / (1 - 2**-7))[1].int()]
        if special:
            a[1, 0], a[2, 1], given[1][1:3] = torch.nan, torch.inf, 130
        return given

    def run(wrap: Any, a: Tensor, e: Tensor, b: Tensor | None = None, f: Tensor | None = None) -> Tensor:
        out = torch.empty(m, n, dtype=dtype, device="meta")
        choose = exact_matmul._tiles if tiles is None else lambda *of_operands: tiles
        b, f = (a, e) if b is None or f is None else (b, f)
        with patch.object(exact_matmul, "CHAIN", terms), patch.object(exact_matmul, "_tiles", choose):
            return exact_matmul.exact_product(a, b, e, f, wrap, out=out)

    def results(a: Tensor, e: Tensor, b: Tensor | None = None, f: Tensor | None = None) -> Tensor:
        b, f = (a, e) if b is None or f is None else (b, f)
        total = torch.zeros(m, n, dtype=torch.int64)
        a_digits, b_digits = digits(a.nan_to_num(0, 0, 0), e), digits(b.nan_to_num(0, 0, 0), f)
        for p in range(4):
            for q in range(4 - p):
                total += (a_digits[p] @ b_digits[q].mT) << 8 * (3 - p - q)
        if dtype == torch.int64:
            return total
        product = (total.double() * torch.exp2(e[:, None] + f[None, :] - 38.0)).to(dtype)
        signs = [torch.where(t.isfinite(), t.sign(), t) for t in (a, b)]
        return torch.where((e > 129)[:, None] | (f > 129)[None, :], signs[0] @ signs[1].mT, product)

    return Case(operands, run, results, **options)
