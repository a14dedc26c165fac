# SPDX-License-Identifier: MIT
"""Inputs of the operator tests, and the judges of a result."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from benchmarks.records import OPERATORS
from benchmarks.records.record import Shapes
from torchpar.testing.operators.layouts import LAYOUTS as OF_LAYOUTS


def normal(
    *shape: int, dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0
) -> Tensor:
    """Normally distributed, the same on every device; for integers and bool, numbers of all their
    range."""
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
    return torch.randint(-(2**40), 2**40, shape, generator=generator).to(dtype).to(device)


def halves(
    *shape: int, dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0
) -> Tensor:
    """-1, -½, 0, ½ and 1: sums of products are exact, so that where results are few no error is
    chance."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-2, 3, shape, generator=generator) / 2).to(device, dtype)


def arguments(
    shapes: Shapes,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    *,
    make: Callable[..., Tensor] = normal,
    requires_grad: bool = False,
) -> tuple[Tensor, ...]:
    args = (
        make(*shape, dtype=dtype, device=device, seed=seed) for seed, shape in enumerate(shapes)
    )
    return tuple(arg.requires_grad_(requires_grad) for arg in args)


def widest_arguments(
    name: str, shapes: Shapes, device: str = "cpu", *, requires_grad: bool = False
) -> tuple[Tensor, ...]:
    """In the widest dtype that an operator takes: normally distributed, in float32 `halves`."""
    dtype = OPERATORS[name].widest
    make = normal if dtype == torch.float64 else halves
    return arguments(shapes, dtype, device, make=make, requires_grad=requires_grad)


LAYOUTS = {"contiguous": torch.Tensor.contiguous, **OF_LAYOUTS}


def to_numpy(t: Tensor) -> Any:
    return t.detach().cpu().double().resolve_neg().numpy()


def oracle(name: str, args: tuple[Tensor | None, ...], **factors: float) -> Any:
    """The operator in fp64; for fp64 itself in NumPy's long double, which has 11 bits more."""
    wide = np.longdouble if args[0].dtype == torch.float64 else np.float64
    return OPERATORS[name].formula(
        *(to_numpy(t).astype(wide) for t in args if t is not None), **factors
    )


def error(actual: Tensor, expected: Any) -> float:
    return float(np.abs(to_numpy(actual) - expected).max(initial=0))


def assert_accurate(
    actual: Tensor,
    native: Tensor,
    expected: Any,
    roundings: int = 1,
    of_operands: float = 0.0,
    terms: int = 0,
) -> None:
    """An error of at most twice PyTorch's own, both against the oracle, or that of one chain.

    PyTorch may be exact by accident (a single element, say). So half an ulp of the largest result
    is granted on top for each rounded step: the last one stores the result, those before it compute
    in at least fp32. ``of_operands`` is what the rounding of stored intermediate results changes.

    ``terms`` is the number of products in each sum, where the operator may add them in any order. A
    library that adds a sum in parts has shorter chains, and may have less than half of the error of
    a chain that adds k products one by one. Step i of the chain rounds a partial sum. Its error has
    any sign, and a variance of at most u²/3 of the partial sum's square, with u half an ulp of 1. A
    sum that grows evenly to S has partial sums S·i/k, so that the variance of its error is at most
    the sum of (S·i/k)²·u²/3, which is S²·k·u²/9. Three standard deviations are √k·u·S. With numbers
    of any size between powers of two the variance is 0.54 of that, and these are four of them.
    """
    stored = torch.finfo(actual.dtype).eps
    computed = torch.finfo(torch.promote_types(actual.dtype, torch.float32)).eps
    ulps = (stored + (roundings - 1) * computed) / 2
    of_sum = max(2 * error(native, expected), of_chain(terms, computed, expected))
    limit = of_sum + ulps * float(np.abs(expected).max(initial=0)) + of_operands
    assert error(actual, expected) <= limit


def of_chain(terms: int, eps: float, expected: Any) -> float:
    """The error of sums of ``terms`` products in one chain: see `assert_accurate`."""
    return float(terms**0.5 * eps / 2 * np.abs(expected).max(initial=0))


def metadata(t: Tensor) -> tuple[Any, ...]:
    return t.shape, t.dtype, t.stride(), t.device


def assert_fakes_agree(op: Callable[..., Tensor], args: tuple[Tensor, ...], actual: Tensor) -> None:
    with FakeTensorMode() as mode:
        assert metadata(op(*map(mode.from_tensor, args))) == metadata(actual)
    on_meta = (torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in args)
    assert metadata(op(*on_meta)) == (*metadata(actual)[:-1], torch.device("meta"))


def assert_fresh(actual: Tensor, args: tuple[Tensor, ...]) -> None:
    assert not any(torch._C._is_alias_of(actual, arg) for arg in args)


def bits(t: Tensor) -> Tensor:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return t.resolve_neg().contiguous().view(integers[t.element_size()])


def assert_symmetric(c: Tensor) -> None:
    assert torch.equal(bits(c), bits(c.mT))


def lower_twice(c: Tensor) -> Tensor:
    """The lower triangle and its transpose."""
    return torch.where(torch.ones_like(c, dtype=torch.bool).tril(), c, c.mT)


def assert_contract(name: str, args: tuple[Tensor | None, ...], **factors: float) -> None:
    """All that an operator promises about one call."""
    operator = OPERATORS[name]

    def op(*tensors: Tensor) -> Tensor:
        return operator.function(*tensors, **factors)

    args = tuple(arg for arg in args if arg is not None)
    before = [arg.clone() for arg in args]
    actual = op(*args)
    native = operator.native(*args, **factors)
    if operator.exact:
        assert_close(actual, native, rtol=0, atol=0, equal_nan=True)
        assert native.numel() == 0 or metadata(actual) == metadata(native)
    else:
        native = lower_twice(native) if operator.symmetric else native
        roundings = operator.roundings + 2 * bool(factors)
        # On CPUs libraries multiply, or we add in parts as they do.
        terms = args[0].shape[-1] if operator.symmetric and args[0].is_cuda else 0
        expected = oracle(name, args, **factors)
        assert_accurate(actual, native, expected, roundings, terms=terms)
        assert actual.is_contiguous()
    if operator.symmetric:
        assert_symmetric(actual)
    assert_fakes_agree(op, args, actual)
    assert_fresh(actual, args)
    assert torch.equal(bits(op(*args)), bits(actual))  # the same bits twice
    assert_close(args, tuple(before), rtol=0, atol=0, equal_nan=True)
