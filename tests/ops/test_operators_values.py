# SPDX-License-Identifier: MIT
"""Results of the operators for every dtype, size and layout: values, dtype, strides and bits."""

import itertools
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from samples import (
    LAYOUTS,
    arguments,
    assert_accurate,
    assert_contract,
    assert_fakes_agree,
    assert_fresh,
    assert_symmetric,
    bits,
    halves,
    lower_twice,
    metadata,
    normal,
    oracle,
)
from torch import Tensor
from torch.func import vmap
from torch.testing import assert_close

import torchpar
from benchmarks.records import OPERATORS, by_case, by_dtype
from benchmarks.records.record import FLOATS, INTEGERS, Shapes


@pytest.mark.parametrize("name, shapes", by_case(), ids=str)
def test_awkward_sizes(name: str, shapes: Shapes, device: str) -> None:
    operator = OPERATORS[name]
    for dtype in operator.dtypes:
        args = operator.operands(*arguments(shapes, dtype, device, make=halves))
        assert_contract(name, args, **operator.factors(len(args)))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "name, shapes",
    [
        ("maximum", ((129, 257), (129, 1))),
        ("matmul_t", ((600, 100),)),
        ("matmul_t", ((3, 65, 300),)),
        ("symmetric_matmul", ((129, 1000),) * 2 + ((129, 129),)),
        ("symmetric_matmul", ((2, 300, 257),) * 2 + ((2, 300, 300),)),
        ("linear_sigmoid", ((3, 65, 300), (60, 300), (60,))),
    ],
    ids=str,
)
def test_rounding_errors(name: str, shapes: Shapes, dtype: torch.dtype, device: str) -> None:
    x, *others = arguments(shapes, dtype, device)
    args = OPERATORS[name].operands(x / x.shape[-1] ** 0.5, *others)  # σ is saturated nowhere
    for layout in ("contiguous", "transposed", "stepped"):
        assert_contract(
            name, tuple(map(LAYOUTS[layout], args)), **OPERATORS[name].factors(len(args))
        )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_both_tails_of_sigmoid_keep_their_precision(dtype: torch.dtype, device: str) -> None:
    # z comes from the bias alone, and exactly, so that no rounding of z hides an error of e⁻ᶻ.
    operator = OPERATORS["linear_sigmoid"]
    x, weight = (torch.zeros(shape, dtype=dtype, device=device) for shape in ((3, 4), (2, 4)))
    for z in (-85, -80, -20, -10, -5, 5, 10, 80):
        args = (x, weight, torch.full((2,), z, dtype=dtype, device=device))
        expected = oracle("linear_sigmoid", args)
        assert_accurate(operator.op(*args), operator.plain(*args), expected, operator.roundings)


@pytest.mark.parametrize(
    "name, dtype", [case for case in by_dtype() if case[0] != "maximum"], ids=str
)
def test_results_and_gradients_that_are_not_finite_are_those_of_float64(
    name: str, dtype: torch.dtype, device: str
) -> None:
    """All sizes are odd: the pairs that processors multiply in 16 bits have to be completed."""
    operator = OPERATORS[name]

    def results(
        op: Callable[..., Tensor], tensors: list[Tensor], dtype: torch.dtype
    ) -> list[Tensor]:
        *args, incoming = (t.detach().to(dtype) for t in tensors)
        args = [arg.requires_grad_() for arg in args]
        y = op(*args, **operator.factors(len(args)))
        return [y.detach(), *torch.autograd.grad(y, args, incoming)]

    for n in (5, 301):
        args = arguments(operator.sized({"n": n, "k": 3, "o": 7}), dtype, device, make=halves)
        tensors = [*operator.operands(*args)]
        tensors.append(operator.native(*tensors, **operator.factors(len(args))).abs() + 1)  # dL/dy
        for spoiled in range(len(tensors)):
            wrong = [t.clone() for t in tensors]
            flat, width = wrong[spoiled].view(-1), tensors[spoiled].shape[-1]
            flat[0] = flat[-1] = math.inf
            if len(flat) > width:
                flat[width + 1], flat[2 * width] = -math.inf, math.nan
            expected = results(operator.native, wrong, torch.float64)
            if operator.symmetric:
                expected[0] = lower_twice(expected[0])
            found = results(operator.function, wrong, dtype)
            batch = [t[None] for t in wrong[:-1]]
            found.append(
                vmap(partial(operator.function, **operator.factors(len(batch))))(*batch)[0]
            )
            for actual, wide in zip(found, [*expected, expected[0]], strict=True):
                for kind in (torch.isnan, torch.isposinf, torch.isneginf):
                    assert torch.equal(kind(actual), kind(wide)), (n, spoiled)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_maximum_propagates_nan_and_keeps_infinities(dtype: torch.dtype, device: str) -> None:
    values = torch.tensor(
        [math.nan, -math.nan, math.inf, -math.inf, 1.0], dtype=dtype, device=device
    )
    for a, b in ((values[:, None], values), (values, values.roll(1)), (values, values[0])):
        assert_contract("maximum", (a, b))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_maximum_of_signed_zeros_is_pytorchs(dtype: torch.dtype, device: str) -> None:
    for n in (1, 128, 1001):  # vectorised loops and their tails
        a = torch.tensor([0.0, -0.0, 0.0, -0.0], dtype=dtype, device=device).repeat(n)
        b = torch.tensor([0.0, 0.0, -0.0, -0.0], dtype=dtype, device=device).repeat(n)
        assert torch.equal(torchpar.maximum(a, b).signbit(), torch.maximum(a, b).signbit())


# Each is promoted with all others.
PROMOTED = [
    pytest.param(dtype, marks=[] if dtype in (torch.bool, torch.bfloat16) else pytest.mark.slow)
    for dtype in INTEGERS + FLOATS
]


@pytest.mark.parametrize("a_dtype", PROMOTED, ids=str)
def test_maximum_and_its_gradients_promote_as_pytorchs(a_dtype: torch.dtype, device: str) -> None:
    shapes_of_case = (((3, 4), (3, 4)), ((3, 4), (4,)), ((3, 4), ()), ((), (4,)))
    for b_dtype, shapes in itertools.product(INTEGERS + FLOATS, shapes_of_case):
        a, b = (
            normal(*s, dtype=t, device=device)
            for s, t in zip(shapes, (a_dtype, b_dtype), strict=True)
        )
        actual, expected = torchpar.maximum(a, b), torch.maximum(a, b)
        assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
        assert metadata(actual) == metadata(expected)
        assert_fakes_agree(torchpar.maximum, (a, b), actual)
        leaves = [t.requires_grad_() for t in (a, b) if t.is_floating_point()]
        if leaves:
            g = halves(*expected.shape, dtype=expected.dtype, device=device)
            found = (
                torch.autograd.grad(op(a, b), leaves, g) for op in (torchpar.maximum, torch.maximum)
            )
            assert_close(*found)
        else:
            assert not torchpar.maximum(a, b).requires_grad


def test_maximum_takes_a_cpu_scalar_with_any_device(device: str) -> None:
    for dtype, scalar_dtype in ((torch.float16, torch.float64), (torch.int64, torch.float32)):
        t, scalar = normal(3, 4, dtype=dtype, device=device), normal(dtype=scalar_dtype)
        for args in ((t, scalar), (scalar, t), (t[0, 0], scalar), (scalar, t[0, 0])):
            actual, expected = torchpar.maximum(*args), torch.maximum(*args)
            assert_close(actual, expected, rtol=0, atol=0)
            assert metadata(actual) == metadata(expected)


def test_vmap_of_maximum_promotes_as_each_sample_would(device: str) -> None:
    dtypes = (torch.bool, torch.int64, torch.bfloat16, torch.float64)
    for a_dtype, b_dtype in itertools.product(dtypes, dtypes):
        a, b = (
            normal(5, 3, dtype=a_dtype, device=device),
            normal(5, dtype=b_dtype, device=device, seed=1),
        )
        for args in ((a, b), (b, a)):
            samples = torch.stack([torch.maximum(*sample) for sample in zip(*args, strict=True)])
            assert_close(vmap(torchpar.maximum)(*args), samples, rtol=0, atol=0)


def one_chain(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x·xᵀ, each product added by itself, and each sum rounded to ``dtype``."""
    chain = x.new_zeros(x.shape[0], x.shape[0], dtype=torch.float64)
    for column in x.double().mT:  # the product of two float32 is exact in float64
        chain = (chain + column[:, None] * column[None, :]).to(dtype).double()
    return chain.float()


@pytest.mark.parametrize("k", [40, 1000])
def test_the_bound_of_one_chain_rejects_larger_errors(k: int) -> None:
    """PyTorch's own error counts as 0 here, so that the bound of a chain decides."""
    (x,) = args = (normal(129, k, dtype=torch.float32),)
    expected = oracle("matmul_t", args)
    check = partial(assert_accurate, native=torch.from_numpy(expected), expected=expected, terms=k)
    check(one_chain(x, torch.float32))
    tf32 = (bits(x) + 2**12).bitwise_and(-(2**13)).view(torch.float32)
    without_a_term, of_tf32 = (one_chain(t, torch.float32) for t in (x[:, 1:], tf32))
    for wrong in (without_a_term, of_tf32, one_chain(x, torch.bfloat16)):
        with pytest.raises(AssertionError):
            check(wrong)


def test_each_judge_rejects_a_wrong_result() -> None:
    (x,) = args = (normal(129, 128, dtype=torch.float32),)
    c, expected = torchpar.matmul_t(x), oracle("matmul_t", args)
    unsymmetric = c.clone()
    unsymmetric[1, 0] = c[1, 0].nextafter(c[1, 0] + 1)
    wrongs = (c.bfloat16().float(), c.mul(math.nan), c.triu())
    checks = [partial(assert_accurate, wrong, x @ x.mT, expected) for wrong in wrongs]
    checks += [partial(assert_symmetric, unsymmetric), partial(assert_fresh, x.mT, args)]
    checks += [
        partial(assert_fakes_agree, torchpar.matmul_t, args, w) for w in (c.mT, c.double(), c[1:])
    ]
    for check in checks:
        with pytest.raises(AssertionError):
            check()
