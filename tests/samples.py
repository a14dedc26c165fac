# SPDX-License-Identifier: MIT
"""What the operator tests share: PyTorch's operators beside ours, inputs, and the judges of a result."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import linear
from torch.testing import assert_close
from torch.testing._internal.common_methods_invocations import op_db

import torchpar

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

# What hypothesis draws is fixed, and takes as long as it takes.
property_test = settings(
    max_examples=100,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def _native_linear_sigmoid(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return linear(x, weight, bias).sigmoid()


def _numpy_linear_sigmoid(x: Any, weight: Any, bias: Any = 0) -> Any:
    with np.errstate(over="ignore"):  # 1/∞ is the limit
        return 1 / (1 + np.exp(-(x @ weight.T + bias)))


class Operator(NamedTuple):
    op: Callable[..., Tensor]
    native: Callable[..., Tensor]  # PyTorch's own
    formula: Callable[..., Any]  # NumPy's, which the oracle evaluates
    roundings: int  # on the way to a result, once the sums are there
    dtypes: tuple[torch.dtype, ...]
    opinfo: str
    cases: list[tuple[tuple[int, ...], ...]]  # the arguments' shapes


OPERATORS = {
    "maximum": Operator(
        torchpar.maximum,
        torch.maximum,
        np.maximum,
        1,
        INTEGERS + FLOATS,
        "maximum",
        [
            ((), ()),
            ((0,), (1,)),
            ((0, 3), ()),
            ((1,), (129,)),
            ((127,), (127,)),
            ((128, 129), (129,)),
            ((128, 1), (1, 127)),
            ((2, 1, 3, 1, 2), (1, 4, 1, 5, 2)),
            ((1, 2, 1, 3, 1, 2), (3, 1, 2, 1, 2, 1)),
            ((5000,), (5000,)),
        ],
    ),
    "matmul_t": Operator(
        torchpar.matmul_t,
        lambda x: x @ x.mT,
        lambda x: x @ np.swapaxes(x, -1, -2),
        1,
        FLOATS,
        "mm",
        [
            ((0, 3),),
            ((3, 0),),
            ((1, 1),),
            ((1, 129),),
            ((127, 128),),
            ((128, 127),),
            ((129, 129),),
            ((511, 33),),
            ((512, 32),),
            ((513, 1),),
            ((1000, 17),),
            ((0, 5, 3),),
            ((2, 0, 3),),
            ((3, 129, 5),),
            ((2, 3, 65, 4),),
            ((2, 600, 9),),
            ((0, 600, 9),),
            ((2, 600, 0),),
            ((70000, 2, 3),),  # more than a second or third grid axis of CUDA holds
        ],
    ),
    "linear_sigmoid": Operator(
        torchpar.linear_sigmoid,
        _native_linear_sigmoid,
        _numpy_linear_sigmoid,
        4,  # z + b, e⁻ᶻ, 1 + and 1/
        FLOATS,
        "nn.functional.linear",
        [
            ((0, 3), (4, 3), (4,)),
            ((3, 0), (4, 0)),
            ((3, 0), (4, 0), (4,)),
            ((3, 4), (0, 4), (0,)),
            ((1,), (1, 1), (1,)),
            ((127,), (128, 127)),
            ((129,), (1, 129), (1,)),
            ((129, 128), (127, 128), (127,)),
            ((128, 127), (129, 127)),
            ((1000, 5), (3, 5), (3,)),
            ((2, 0, 3), (4, 3), (4,)),
            ((0, 2, 3), (4, 3)),
            ((2, 3, 5, 16), (10, 16), (10,)),
            ((70000, 3), (2, 3), (2,)),
        ],
    ),
}
BY_DTYPE = [(name, dtype) for name, operator in OPERATORS.items() for dtype in operator.dtypes]
BY_CASE = [(name, shapes) for name, operator in OPERATORS.items() for shapes in operator.cases]

# A few small cases in which every gradient has many terms, for the tests that cost much per sample.
SMALL = {
    "maximum": [((3, 4), (3, 4)), ((3, 1), (2, 1, 4)), ((), (3,))],
    "matmul_t": [((4, 3),), ((2, 3, 5),)],
    "linear_sigmoid": [((3, 4), (5, 4), (5,)), ((4,), (3, 4)), ((2, 3, 4), (5, 4), (5,))],
}
BY_SMALL_CASE = [(name, shapes) for name, cases in SMALL.items() for shapes in cases]


def normal(*shape: int, dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0) -> Tensor:
    """Normally distributed, the same on every device; for integers and bool, numbers of all their range."""
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
    return torch.randint(-(2**40), 2**40, shape, generator=generator).to(dtype).to(device)


def halves(*shape: int, dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0) -> Tensor:
    """-1, -½, 0, ½ and 1: sums of products are exact, so that where results are few no error is chance."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-2, 3, shape, generator=generator) / 2).to(device, dtype)


def arguments(
    shapes: tuple[tuple[int, ...], ...],
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    *,
    make: Callable[..., Tensor] = normal,
    requires_grad: bool = False,
) -> tuple[Tensor, ...]:
    args = (make(*shape, dtype=dtype, device=device, seed=seed) for seed, shape in enumerate(shapes))
    return tuple(arg.requires_grad_(requires_grad) for arg in args)


def opinfo_samples(name: str, dtype: torch.dtype, device: str) -> list[tuple[Tensor, ...]]:
    """The arguments of PyTorch's own samples for the operator that ours stands for."""
    torch.manual_seed(0)
    (info,) = (info for info in op_db if info.name == OPERATORS[name].opinfo)
    samples = [(sample.input, *sample.args) for sample in info.sample_inputs(device, dtype)]
    if name == "matmul_t":
        return [(operand,) for sample in samples for operand in sample]
    if name == "linear_sigmoid":
        return [sample for sample in samples if sample[1].dim() == 2]
    return samples


def _memory_order(t: Tensor, dims: list[int]) -> Tensor:
    inverse = [dims.index(dim) for dim in range(t.dim())]
    return t.permute(dims).contiguous().permute(inverse)


def _stepped(t: Tensor) -> Tensor:
    poison = math.nan if t.is_floating_point() else 1
    every_second = (slice(None, None, 2),) * t.dim()
    buffer = t.new_full([2 * size for size in t.shape], poison)
    buffer[every_second] = t
    return buffer[every_second]


def _offset(t: Tensor) -> Tensor:
    return torch.cat([t.new_zeros(3), t.flatten()])[3:].view(t.shape)


def _negated(t: Tensor) -> Tensor:
    return torch._neg_view(-t) if t.is_floating_point() else t  # as z.conj().imag, whose sign is pending


# Functions of a tensor to a tensor of the same shape, and (but for "expanded") of the same values.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.Tensor.contiguous,
    "transposed": lambda t: _memory_order(t, [*range(t.dim())][:-2] + [*range(t.dim())][:-3:-1]),
    "permuted": lambda t: _memory_order(t, [*range(t.dim())][::-1]),
    "rotated": lambda t: _memory_order(t, [*range(t.dim())][1:] + [*range(t.dim())][:1]),
    "stepped": _stepped,
    "offset": _offset,
    "expanded": lambda t: t[:1].expand_as(t) if t.dim() and t.numel() else t,
    "expanded last": lambda t: t[..., :1].expand_as(t) if t.dim() and t.numel() else t,
    "negated": _negated,
}


def to_numpy(t: Tensor) -> Any:
    return t.detach().cpu().double().resolve_neg().numpy()


def oracle(name: str, args: tuple[Tensor, ...]) -> Any:
    """The operator in fp64; for fp64 itself in NumPy's long double, which has 11 bits more."""
    wide = np.longdouble if args[0].dtype == torch.float64 else np.float64
    return OPERATORS[name].formula(*(to_numpy(arg).astype(wide) for arg in args))


def error(actual: Tensor, expected: Any) -> float:
    return float(np.abs(to_numpy(actual) - expected).max(initial=0))


def assert_accurate(actual: Tensor, native: Tensor, expected: Any, roundings: int = 1) -> None:
    """An error of at most twice PyTorch's own, both against the oracle.

    PyTorch may be exact by accident (a single element, say). So half an ulp of the largest result is granted
    on top for each rounded step: the last one stores the result, those before it compute in at least fp32.
    """
    stored = torch.finfo(actual.dtype).eps
    computed = torch.finfo(torch.promote_types(actual.dtype, torch.float32)).eps
    ulps = (stored + (roundings - 1) * computed) / 2
    limit = 2 * error(native, expected) + ulps * float(np.abs(expected).max(initial=0))
    assert error(actual, expected) <= limit


def metadata(t: Tensor) -> tuple[Any, ...]:
    # The strides of an empty tensor step nowhere; there PyTorch's fakes differ from its own operators.
    return t.shape, t.dtype, t.stride() if t.numel() else None, t.device


def assert_fakes_agree(op: Callable[..., Tensor], args: tuple[Tensor, ...], actual: Tensor) -> None:
    with FakeTensorMode() as mode:
        assert metadata(op(*map(mode.from_tensor, args))) == metadata(actual)
    on_meta = (torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in args)
    assert metadata(op(*on_meta)) == (*metadata(actual)[:-1], torch.device("meta"))


def assert_fresh(actual: Tensor, args: tuple[Tensor, ...]) -> None:
    assert not any(torch._C._is_alias_of(actual, arg) for arg in args)


def assert_symmetric(c: Tensor) -> None:
    assert torch.equal(c, c.mT)


def assert_contract(name: str, args: tuple[Tensor, ...]) -> None:
    """All that an operator promises about one call."""
    op, native = OPERATORS[name].op, OPERATORS[name].native
    before = [arg.clone() for arg in args]
    actual = op(*args)
    expected = native(*args)
    if name == "maximum":
        assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
        assert metadata(actual) == metadata(expected)
    else:
        assert_accurate(actual, expected, oracle(name, args), OPERATORS[name].roundings)
        assert actual.is_contiguous()
    if name == "matmul_t":
        assert_symmetric(actual)
    assert_fakes_agree(op, args, actual)
    assert_fresh(actual, args)
    assert_close(op(*args), actual, rtol=0, atol=0, equal_nan=True)  # the same bits twice
    assert_close(args, tuple(before), rtol=0, atol=0, equal_nan=True)
