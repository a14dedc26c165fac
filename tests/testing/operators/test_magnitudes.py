# SPDX-License-Identifier: MIT
"""The rows of large and small numbers find what overflows or vanishes, and nothing in what is
right."""

import math
from collections.abc import Callable
from typing import Any

import faulty_operators as faulty
import pytest
import torch
from samples import normal
from torch import Tensor
from torch.nn import functional

from benchmarks.records import OPERATORS
from torchpar.testing import check_operator

LARGE, SMALL = "large numbers", "small numbers"


class WithBackward(torch.autograd.Function):
    """A function of a tensor, with a backward that computes what it is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Any, backward: Any) -> Any:
        ctx.save_for_backward(x)
        ctx.backward_of = backward
        return f(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return ctx.backward_of(*ctx.saved_tensors, g), None, None


def with_backward(f: Any, backward: Any) -> Callable[[Tensor], Any]:
    return lambda x: WithBackward.apply(x, f, backward)


def in_float32(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """As kernels compute: 16-bit operands are cast, and so is the result."""

    def computed(*args: Tensor) -> Tensor:
        wide = torch.promote_types(args[0].dtype, torch.float32)
        return f(*(t.to(wide) for t in args)).to(args[0].dtype)

    return computed


def softcap(s: Tensor) -> Tensor:
    e, f = (s / 50).exp(), (-s / 50).exp()
    return 50 * (e - f) / (e + f)


def of_tanh(s: Tensor) -> Tensor:
    return 50 * torch.tanh(s / 50)


def softmax(x: Tensor) -> Tensor:
    return torch.softmax(x, -1)


def softmax_without_maximum(x: Tensor) -> Tensor:
    return x.exp() / x.exp().sum(-1, keepdim=True)


def logsumexp(x: Tensor) -> Tensor:
    return torch.logsumexp(x, -1)


def logsumexp_without_maximum(x: Tensor) -> Tensor:
    return x.exp().sum(-1).log()


def hypot(x: Tensor) -> Tensor:
    return torch.hypot(x[..., 0], x[..., 1])


def root_of_squares(x: Tensor) -> Tensor:
    return (x[..., 0].square() + x[..., 1].square()).sqrt()


def silu_backward(x: Tensor, g: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return g * s * (1 + x * (1 - s))


def overflowing_silu_backward(x: Tensor, g: Tensor) -> Tensor:
    """e^x·(1 + x + e^x)/(1 + e^x)², which is ∞/∞ for large x."""
    e = x.exp()
    return g * e * (1 + x + e) / (1 + e).square()


def flushed(t: Tensor, least: float) -> Tensor:
    return torch.where(t.abs() < least, 0, t)


def double_but_not_subnormal(x: Tensor) -> Tensor:
    """Numbers below 2⁻¹²⁶ become garbage, as their bits read as an exponent would be."""
    return torch.where((x != 0) & (x.abs() < 2.0**-126), torch.ones_like(x), 2 * x)


ROW = normal(5, 4)
FAULTS = {
    "softcap": (softcap, of_tanh, LARGE, "not finite"),
    "softcap of tiny numbers": (softcap, of_tanh, SMALL, "off by"),
    "softmax": (softmax_without_maximum, softmax, LARGE, "not finite"),
    "softmax in float32": (in_float32(softmax_without_maximum), softmax, LARGE, "not finite"),
    "logsumexp": (logsumexp_without_maximum, logsumexp, LARGE, "not finite"),
    "norm": (root_of_squares, hypot, LARGE, "not finite"),
    "norm of tiny numbers": (root_of_squares, hypot, SMALL, ""),
    "gradient": (
        with_backward(functional.silu, overflowing_silu_backward),
        functional.silu,
        LARGE,
        "gradients, all operands",
    ),
    "flushed gradients": (
        with_backward(functional.silu, lambda x, g: silu_backward(x, flushed(g, 1e-30))),
        functional.silu,
        SMALL,
        "torch.float32, gradients, incoming gradients: times 2**-96: off by",
    ),
    "flushed operands": (
        with_backward(lambda x: 2 * flushed(x, 1e-30), lambda x, g: 2 * g),
        lambda x: 2 * x,
        SMALL,
        "torch.float32, values, all operands: times 2**-96: off by",
    ),
    "subnormal numbers": (double_but_not_subnormal, lambda x: 2 * x, SMALL, "off by 1.0e+00"),
    "16 bits": (
        lambda x: x.float().to(torch.float16).to(x.dtype) if x.dtype == torch.bfloat16 else 1 * x,
        lambda x: 1 * x,
        LARGE,
        "torch.bfloat16, values, all operands: times 2**16: ",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_magnitude_is_found(name: str) -> None:
    op, reference, rule, detail = FAULTS[name]
    others = ["values", "layouts and sizes", "incoming gradients of any layout", "ties and zeros"]
    table = check_operator(op, [(ROW,)], reference=reference, rules=[*others, rule])
    assert (table[rule].outcome, detail in table[rule].detail) == ("wrong", True), str(table)
    assert all(table[other].outcome in ("works", "not run") for other in others), str(table)


def plain_softmax(x: Tensor) -> Tensor:
    e = (x - x.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


def plain_logsumexp(x: Tensor) -> Tensor:
    largest = x.amax(-1, keepdim=True).detach()
    return (x - largest).exp().sum(-1).log() + largest.squeeze(-1)


def layer_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], w, b)


def layer_norm_by_moments(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = (x * x).mean(-1, keepdim=True) - mean * mean
    return (x - mean) * torch.rsqrt(variance + 1e-5) * w + b


def product_in_a_loop(a: Tensor, b: Tensor) -> Tensor:
    total = a.new_zeros(len(a), b.shape[1])
    for i in range(a.shape[1]):
        total = total + a[:, i, None] * b[i]
    return total


def sum_in_a_loop(x: Tensor) -> Tensor:
    total = x.new_zeros(x.shape[:-1])
    for column in x.unbind(-1):
        total = total + column
    return total


def flushing(f: Callable[..., Tensor]) -> Callable[..., Any]:
    """As on a GPU that takes subnormal float32 numbers for 0, in operands, results and
    gradients."""

    def zero(t: Tensor) -> Tensor:
        is_wide = t.dtype in (torch.float64, torch.float16)
        return t if is_wide else flushed(t, torch.finfo(t.dtype).smallest_normal)

    flush = with_backward(zero, lambda _, g: zero(g))

    def forward(*args: Tensor) -> Any:
        return flush(f(*map(flush, args)))

    return forward


def tanh_gelu(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


VECTORS = (normal(5, 8), normal(8, seed=1), normal(8, seed=2))
MATRICES = (normal(5, 9), normal(9, 6, seed=1))
Right = tuple[Callable[..., Any], Callable[..., Any], tuple[Tensor, ...]]
RIGHT: dict[str, Right] = {
    "silu": (in_float32(lambda x: x * torch.sigmoid(x)), functional.silu, (ROW,)),
    "silu by its backward": (
        with_backward(functional.silu, silu_backward),
        functional.silu,
        (ROW,),
    ),
    "gelu": (
        functional.gelu,
        lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
        (ROW,),
    ),
    "tanh-gelu": (
        tanh_gelu,
        lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))),
        (ROW,),
    ),
    "tanh": (torch.tanh, torch.tanh, (ROW,)),
    "softmax": (softmax, plain_softmax, (ROW,)),
    "softmax in float32": (in_float32(plain_softmax), softmax, (ROW,)),
    "logsumexp": (plain_logsumexp, logsumexp, (ROW,)),
    "layer_norm": (in_float32(layer_norm_by_moments), layer_norm, VECTORS),
    "mm": (torch.mm, in_float32(product_in_a_loop), MATRICES),
    "loop": (in_float32(product_in_a_loop), torch.mm, MATRICES),
    "sum": (in_float32(sum_in_a_loop), lambda x: x.sum(-1), (normal(5, 40),)),
    "hypot": (hypot, hypot, (ROW,)),
    "exp": (torch.exp, torch.exp, (ROW,)),
    "flushing silu": (flushing(functional.silu), functional.silu, (ROW,)),
    "flushing hypot": (flushing(hypot), hypot, (ROW,)),
    "flushing mm": (flushing(torch.mm), torch.mm, MATRICES),
    "flushing log": (flushing(torch.log), torch.log, (ROW.abs() + 0.1,)),
    "complex": (torch.mul, torch.mul, (faulty.COMPLEX[0], faulty.COMPLEX[0].flip(0))),
}
FIRST = ("silu", "softmax in float32", "flushing hypot", "exp")


def rows(op: Any, reference: Any, sample: tuple[Tensor, ...]) -> Any:
    return check_operator(op, [sample], reference=reference, rules=[LARGE, SMALL])


@pytest.mark.parametrize("name", FIRST)
def test_nothing_is_found_in_a_right_operator(name: str) -> None:
    op, reference, sample = RIGHT[name]
    table = rows(op, reference, sample)
    assert {row.outcome for row in table.rows} <= {"works", "not run"}, str(table)


@pytest.mark.slow
@pytest.mark.parametrize("name", RIGHT)
def test_nothing_is_found_in_right_operators_of_other_samples(name: str) -> None:
    op, reference, sample = RIGHT[name]
    for seed in range(2):
        other = tuple(normal(*t.shape, seed=3 * seed + i) for i, t in enumerate(sample))
        if sample[0].is_complex():
            other = tuple(torch.complex(t, normal(*t.shape, seed=999 - seed)) for t in other)
        other = (other[0].abs() + 0.1,) if name == "flushing log" else other
        table = rows(op, reference, other)
        assert {row.outcome for row in table.rows} <= {"works", "not run"}, f"{seed}\n{table}"


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATORS)
def test_nothing_is_found_in_our_operators(name: str) -> None:
    operator = OPERATORS[name]
    for shapes in operator.small:
        sample = tuple(normal(*shape, seed=i) for i, shape in enumerate(shapes))
        table = rows(operator.op, operator.plain, sample)
        assert {row.outcome for row in table.rows} <= {"works", "not run"}, str(table)


def test_nothing_is_asked_where_the_reference_is_wrong() -> None:
    """exp overflows beyond 88, and so does this softmax."""
    nan = lambda x: torch.where(x.abs() > 30, math.nan, softmax_without_maximum(x))  # noqa: E731  # a function of one line
    table = rows(nan, softmax_without_maximum, (ROW,))
    assert table[LARGE].outcome in ("works", "not run"), str(table)
    table = rows(nan, softmax, (ROW,))
    assert table[LARGE].outcome == "wrong", str(table)
    assert check_operator(nan, [(ROW,)], rules=LARGE)[LARGE].detail == "no reference"
    zeros = check_operator(softmax, [(0 * ROW,)], reference=softmax, rules=LARGE)
    assert zeros[LARGE].outcome in ("works", "not run"), str(zeros)
