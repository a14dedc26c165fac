# SPDX-License-Identifier: MIT
"""Launches of each kernel, with operands whose results are known exactly.

Operands of products are small integers, so that all sums are exact in any order. Sigmoids are
compared within a bound.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any
from unittest.mock import patch

import torch
from launching import Gpu
from samples import LAYOUTS, bits, lower_twice
from torch import Tensor

from torchpar.kernels import exact_matmul, matmul_t, maximum, sigmoid_backward
from torchpar.kernels import linear_sigmoid as linear
from torchpar.kernels.device import Device
from torchpar.kernels.rule import Tiles
from torchpar.ops import exact_digits

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# The relative error of a sigmoid for |z| up to 32. Float32: of ex2 and of div 2⁻²² each, and of one
# rounding; the kernel corrects the product z·log2(e). 16 bits: of the result's rounding, and of
# that product. Float64: of exp and of div one ulp each, of a sum, and as much again for the
# executor's fma, which rounds twice.
SIGMOID = {BF16: 2**-8 + 2**-17, F16: 2**-11 + 2**-17, F32: 9 * 2**-24, F64: 8 * 2**-53}


@dataclass
class Case:
    """A launch: ``run(wrap, *operands)`` returns the tensors that should equal
    ``results(*operands)``.

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
    layout: str = ""  # of all operands: one of `LAYOUTS`

    def execute(self, gpu: Gpu) -> list[Tensor]:
        """The results on the executor."""
        operands = [gpu.tensor(t) for t in self.draw()]
        device = Device("executor", self.capability, self.multiprocessors)
        with ExitStack() as stack:
            for module in ("exact_matmul", "row_sums", "tiles"):
                stack.enter_context(patch(f"torchpar.kernels.{module}.device", lambda t: device))
            found = gpu.run(lambda wrap: self.launch(wrap, operands), self.capability)
        return [gpu.read(t) for t in found]

    def launch(self, wrap: Any, operands: Sequence[Tensor]) -> list[Tensor]:
        """The tensors that a launch on the operands' device writes."""
        return as_list(self.run(wrap, *operands))

    def draw(self) -> list[Tensor]:
        torch.manual_seed(0)
        return [LAYOUTS[self.layout](t) if self.layout else t for t in self.operands()]

    def expected(self) -> list[Tensor]:
        return as_list(self.results(*self.draw()))

    def agrees(self, found: list[Tensor], expected: list[Tensor]) -> bool:
        if not self.bound:
            return same_bits(found, expected)
        for a, b in zip(found, expected, strict=True):
            # A subnormal number.
            smallest = torch.finfo(a.dtype).smallest_normal * torch.finfo(a.dtype).eps
            if not ((a.double() - b).abs() <= self.bound * b.abs() + smallest / 2).all():
                return False
        return True


def as_list(results: Any) -> list[Tensor]:
    return list(results) if isinstance(results, tuple | list) else [results]


def same_bits(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether two lists of tensors have the same bits; all NaN are alike."""
    for a, b in zip(found, expected, strict=True):
        number = ~b.isnan()
        if not (torch.equal(~a.isnan(), number) and torch.equal(bits(a)[number], bits(b)[number])):
            return False
    return True


def integers(
    *shape: int, dtype: torch.dtype = BF16, largest: int = 3, transposed: bool = False
) -> Tensor:
    t = torch.randint(-largest, largest + 1, shape).to(dtype)
    return LAYOUTS["transposed"](t) if transposed else t


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
    factors: tuple[float, float] = (2.0, -0.5),
    in_place: bool = False,
    **options: Any,
) -> Case:
    """``A·Aᵀ``, with ``other`` ``A·Bᵀ``, and with ``c`` ``2·A·Aᵀ − C/2``, or that of other
    ``factors``.

    ``A·Bᵀ`` should be symmetric. Here it is not: the result must be its lower triangle, mirrored.
    ``in_place`` it is written to C, which is float32.
    """
    result = F32 if in_place else dtype
    alpha, beta = factors if c else (1.0, 0.0)

    def operands() -> list[Tensor]:
        a = integers(*batch, n, k, dtype=dtype, transposed="a" in transposed)
        given = [a]
        if other:
            given.append(integers(*batch, n, k, dtype=dtype, transposed="b" in transposed))
        if c:
            added = integers(*batch, n, n, dtype=result, transposed="c" in transposed)
            unread = torch.ones(n, n, dtype=torch.bool).triu(1 if beta else -n)
            given.append(added.masked_fill_(unread, torch.nan))  # only the lower triangle is read
        return given

    def run(wrap: Any, a: Tensor, *others: Tensor) -> Any:
        b = others[0] if other else a
        adding = (others[-1], alpha, beta) if c else ()
        out = others[-1] if in_place else None
        return matmul_t.symmetric_matmul(a, b, precision, wrap, *adding, out=out, tiles=tiles)

    def results(a: Tensor, *others: Tensor) -> Tensor:
        b = others[0] if other else a
        product = alpha * (a.double() @ b.double().mT)
        if beta:
            product += beta * others[-1].double()
        return lower_twice(product).to(result)

    return Case(operands, run, results, **options)


def half_sum(
    n: int,
    dtype: torch.dtype = BF16,
    batch: tuple[int, ...] = (2,),
    unit: float = 1.0,
    block: int = matmul_t.SUM_BLOCK,
    **options: Any,
) -> Case:
    """``(G + Gᵀ)/2`` by tiles of ``block`` rows."""

    def run(wrap: Any, g: Tensor) -> Tensor:
        with patch.object(matmul_t, "SUM_BLOCK", block):
            return matmul_t.half_sum(g, wrap)

    return Case(
        lambda: [integers(*batch, n, n, dtype=dtype) * unit],
        run,
        lambda g: ((g.double() + g.double().mT) / 2).to(dtype),
        **options,
    )


def mirror(n: int, dtype: torch.dtype = BF16, batch: tuple[int, ...] = (), **options: Any) -> Case:
    return Case(
        lambda: [integers(*batch, n, n, dtype=dtype)],
        lambda wrap, c: matmul_t.mirror(c, wrap),
        lower_twice,
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


def sigmoid_of(values: Tensor, bound: float = 0.0) -> Case:
    """The sigmoids of numbers, each a product with 1; without a bound they are PyTorch's own."""
    return Case(
        lambda: [values[:, None], torch.ones(1, 1, dtype=values.dtype)],
        lambda wrap, x, weight: linear.linear_sigmoid(x, weight, None, "ieee", wrap),
        lambda x, weight: x.double().sigmoid() if bound else x.sigmoid(),
        bound=bound,
    )


def sigmoid_gradient(m: int, n: int, dtype: torch.dtype = BF16, **options: Any) -> Case:
    """y is a multiple of 1/16, so that sums are exact."""

    def run(wrap: Any, g: Tensor, y: Tensor) -> Any:
        return sigmoid_backward.sigmoid_backward(g, y, torch.empty_like(y), wrap)

    def results(g: Tensor, y: Tensor) -> Any:
        dz = g.double() * y.double() * (1 - y.double())
        return dz.to(dtype), dz.sum(0).to(dtype)

    def operands() -> list[Tensor]:
        return [integers(n, m, dtype=dtype).mT, torch.randint(17, (m, n)).to(dtype) / 16]

    return Case(operands, run, results, **options)


def few_values(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """Few different values, so that ties are many; none is the least of its dtype; some are NaN."""
    if dtype == torch.bool:
        values = [False, True]
    elif dtype.is_floating_point:
        values = [-math.inf, -2.5, -1, 0, 0.5, 3, math.inf, math.nan]
    else:
        limits = torch.iinfo(dtype)
        values = [limits.min + 1, limits.max // 2, limits.max // 2 + 1, limits.max, *range(2, 9)]
    return torch.tensor(values, dtype=dtype)[torch.randint(len(values), shape)]


def incoming(g: Tensor) -> Iterator[Tensor]:
    """Gradients of the layouts that follow an operation, a sum, and a sum over rows; and of
    others."""
    yield g
    if g.numel() > 0:
        yield g.flatten()[:1].view(()).expand_as(g)
    if g.dim() > 0:
        yield g[:1].expand_as(g)
    yield g.contiguous()
    if g.dim() == 2:
        yield g.T.contiguous().T


def larger(
    draw: Callable[[Any], tuple[Tensor, Tensor]],
    *dtypes: torch.dtype,
    layouts: int | None = None,
    **options: Any,
) -> Case:
    """The maximum of two operands, and of floats its gradients.

    ``draw(d)`` draws the operands by ``d(*shape)``, of one dtype or of two. ``layouts``: how many
    of `incoming`, None for all.
    """

    def operands() -> list[Tensor]:
        drawn = cycle(dtypes)
        given = draw(lambda *shape: few_values(*shape, dtype=next(drawn)))
        y = torch.maximum(*given)
        operands = [t.expand(y.shape) for t in given]
        if y.is_floating_point():
            gradient = torch.empty_like(y).copy_(torch.randn(y.shape) * 1000)
            gradient.flatten()[:1] *= 2.0**-24  # the half of the least float16 is rounded
            operands += islice(incoming(gradient), layouts)
        return operands

    def run(wrap: Any, a: Tensor, b: Tensor, *gradients: Tensor) -> Any:
        results = [torch.empty_like(torch.maximum(a, b))]
        maximum.maximum(a, b, results[0], wrap)
        for g in gradients:
            both = [torch.empty_like(results[0]) for _ in range(2)]
            maximum.maximum_backward(g, a, b, *both, wrap)
            results += both
        return results

    def results(a: Tensor, b: Tensor, *gradients: Tensor) -> Any:
        y = torch.maximum(a, b)
        wide = [t.to(y.dtype).clone().requires_grad_() for t in (a, b)] if gradients else []
        pairs = [torch.autograd.grad(torch.maximum(*wide), wide, g) for g in gradients]
        return [y, *(t for pair in pairs for t in pair)]

    return Case(operands, run, results, **options)


def larger_sums(
    draw: Callable[[Any], tuple[Tensor, Tensor]],
    *dtypes: torch.dtype,
    needed: str = "ab",
    layouts: int | None = 1,
    **options: Any,
) -> Case:
    """The gradients of the maximum in the operands' shapes: sums where an operand is broadcast.

    dL/dy is of even numbers, so that sums are exact. ``draw``, ``dtypes`` and ``layouts`` are as
    for `larger`.
    """

    def operands() -> list[Tensor]:
        drawn = cycle(dtypes)
        given = draw(lambda *shape: few_values(*shape, dtype=next(drawn)))
        y = torch.maximum(*given)
        gradient = torch.empty_like(y).copy_(integers(*y.shape) * 2)
        return [*given, *islice(incoming(gradient), layouts)]

    def run(wrap: Any, a: Tensor, b: Tensor, *gradients: Tensor) -> Any:
        results = []
        for g in gradients:
            both = [
                torch.empty_like(t, dtype=g.dtype) if name in needed else None
                for name, t in zip("ab", (a, b), strict=True)
            ]
            maximum.maximum_backward(g, a.expand(g.shape), b.expand(g.shape), *both, wrap)
            results += [t for t in both if t is not None]
        return results

    def results(a: Tensor, b: Tensor, *gradients: Tensor) -> Any:
        wide = [t.to(gradients[0].dtype).double().requires_grad_() for t in (a, b)]
        chosen = [t for name, t in zip("ab", wide, strict=True) if name in needed]
        y = torch.maximum(*wide)
        pairs = [torch.autograd.grad(y, chosen, g.double(), True) for g in gradients]
        return [t.to(gradients[0].dtype) for pair in pairs for t in pair]

    return Case(operands, run, results, **options)


def random_rows(*shape: int, special: bool = False) -> Tensor:
    """Rows of different magnitudes; ``special``: the first ones have NaN, infinities or zeros."""
    x = torch.randn(shape) * torch.exp2(torch.randint(-50, 51, (*shape[:-1], 1)))
    if special:
        x[0, 3], x[1, 3], x[1, 5] = math.inf, math.inf, -math.inf
        x[2, -1], x[3, 0], x[4, 3] = math.nan, -math.inf, 0.0
        x[5:7] = 0.0
        x[6, 3] = math.inf
    return x


def rows_of_extreme_digits(k: int, odd: int) -> Tensor:
    """Rows of the digits with the largest sums. In the first column only digit ``odd`` is not 0."""
    extreme = torch.tensor([[-126, -128, -128, -128], [126, 127, 127, 0], [127, -128, -128, -128]])
    digits = extreme[:, :, None].repeat(1, 1, k)
    digits[:, :, 0] = 127 * (torch.arange(4) == odd)
    x = (digits * 256.0 ** -torch.arange(4)[:, None]).sum(1) / 128
    assert torch.equal(exact_digits.digits(x, exact_digits.row_exponents(x)), digits)
    return x


def exact(
    *matrices: tuple[int, ...] | Tensor,
    dtypes: Sequence[torch.dtype] = (F32,),
    operand_dtype: torch.dtype = F32,
    layouts: Sequence[str] = ("contiguous", "contiguous"),
    special: bool = False,
    floats: bool = False,
    terms: int = 0,
    tiles: Tiles | None = None,
    capability: int = 90,
    **options: Any,
) -> Case:
    """The exact product of two matrices, or of one with itself: the CPU's bits in floats, T in
    int64.

    Args:
        matrices: shapes of `random_rows`, or tensors.
        dtypes: of the results.
        operand_dtype: of the matrices. In float16 the rows' magnitudes differ less.
        layouts: of the matrices.
        floats: whether the digits are float16, as on a GPU that multiplies int8 slowly.
        terms: of a chain.
    """
    changed: dict[str, Any] = {"SLOW_INT8": capability} if floats else {}
    changed |= {"_tiles": lambda *of_operands: tiles} if tiles else {}
    changed |= {"FLOAT_CHAIN" if floats else "CHAIN": terms} if terms else {}

    def operands() -> list[Tensor]:
        drawn = [
            one if isinstance(one, Tensor) else random_rows(*one, special=special)
            for one in matrices
        ]
        if operand_dtype == torch.float16:
            drawn = [t.sign() * t.abs() ** 0.2 for t in drawn]
        drawn = [t.to(operand_dtype) for t in drawn]
        drawn = [LAYOUTS[layout](t) for layout, t in zip(layouts, drawn, strict=False)]
        return [*drawn, *(exact_digits.row_exponents(t)[..., 0] for t in drawn)]

    def four(given: Sequence[Tensor]) -> Sequence[Tensor]:
        return given if len(given) == 4 else (given[0], given[0], given[1], given[1])

    def run(wrap: Any, *given: Tensor) -> list[Tensor]:
        a, b, e, f = four(given)
        outs = [a.new_empty(*a.shape[:-1], b.shape[-2], dtype=dtype) for dtype in dtypes]
        with ExitStack() as stack:
            for name, value in changed.items():
                stack.enter_context(patch.object(exact_matmul, name, value))
            return [exact_matmul.exact_product(a, b, e, f, wrap, out=out) for out in outs]

    def results(*given: Tensor) -> list[Tensor]:
        a, b, e, f = four(given)
        return [one_result(dtype, a, b, e[..., None], f[..., None]) for dtype in dtypes]

    def one_result(dtype: torch.dtype, *given: Tensor) -> Tensor:
        if dtype == torch.int64:
            return exact_digits.sums(*given)
        return exact_digits.product_of_exponents(*given, dtype=dtype)

    return Case(operands, run, results, capability=capability, **options)
