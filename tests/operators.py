# SPDX-License-Identifier: MIT
"""Record of the operators: kernels, shapes and contract of each. All tests iterate over it.

An entry has tensors of the shapes of an operator's arguments, with any values. `Operator.operands`
makes operands of them that the operator takes: for `symmetric_matmul`, operands whose product is
symmetric.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

import torchpar

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

Shapes = tuple[tuple[int, ...], ...]


class Refused(NamedTuple):
    """Arguments that an operator refuses, and its message."""

    args: tuple[Tensor, ...]
    message: str  # with {device} for the device's repr, {where} for its name
    kwargs: Mapping[str, float] = MappingProxyType({})


class Operator(NamedTuple):
    """An operator and its contract. Its arguments' shapes have a letter for each size."""

    name: str
    kernels: set[str]  # the Triton kernels that it launches
    native: Callable[..., Tensor]  # the same by PyTorch's own operators
    formula: Callable[..., Any]  # the same by NumPy's, for the oracle
    dtypes: tuple[torch.dtype, ...]  # those that it takes, of which the widest is the last
    shapes: tuple[str, ...]
    cases: list[Shapes]  # at awkward sizes
    small: list[Shapes]  # where every gradient has many terms, for tests that cost much per case
    local: int  # combinations of placements, of the first small case, that take no communication
    refused: list[Refused]
    operands: Callable[..., tuple[Tensor, ...]] = lambda *args: args  # of tensors with any values
    factors: Callable[[int], dict[str, float]] = lambda count: {}  # for a number of operands
    roundings: int = 1  # on the way to a result, once the sums are there; each factor adds one
    exact: bool = False  # whether the result and its strides are PyTorch's
    symmetric: bool = False  # whether the result equals its transpose, bit for bit

    @property
    def widest(self) -> torch.dtype:
        """The dtype in which most tests judge values."""
        return self.dtypes[-1]

    @property
    def overload(self) -> Any:
        return getattr(torch.ops.torchpar, self.name).default

    @property
    def function(self) -> Callable[..., Tensor]:
        return getattr(torchpar, self.name)

    def op(self, *args: Tensor) -> Tensor:
        """The operator, as a function of tensors with any values."""
        return self.function(*self.operands(*args), **self.factors(len(args)))

    def plain(self, *args: Tensor) -> Tensor:
        """The same by PyTorch's own operators."""
        return self.native(*self.operands(*args), **self.factors(len(args)))

    def sized(self, sizes: dict[str, Any]) -> tuple[tuple[Any, ...], ...]:
        """The arguments' shapes, for a size per letter."""
        return tuple(tuple(sizes.get(letter, 1) for letter in shape) for shape in self.shapes)


def _linear_sigmoid(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return linear(x, weight, bias).sigmoid()


def _numpy_linear_sigmoid(x: Any, weight: Any, bias: Any = 0) -> Any:
    with np.errstate(over="ignore"):  # 1/∞ is the limit
        return 1 / (1 + np.exp(-(x @ weight.T + bias)))


def symmetric_operands(a: Tensor, b: Tensor, c: Tensor | None = None) -> tuple[Tensor, ...]:
    """Operands of a symmetric product: A, A·D for a diagonal D of powers of two, and a symmetric
    C."""
    a = a + b
    b = a * (2.0 ** torch.arange(a.shape[-1], device=a.device).remainder(3)).to(a.dtype)
    return (a, b) if c is None else (a, b, c.tril() + c.tril(-1).mT)


def _symmetric_matmul(
    a: Tensor, b: Tensor, c: Tensor | None = None, *, alpha: float = 1.0, beta: float = 0.0
) -> Tensor:
    a3, b3 = (t.reshape(-1 if t.numel() else t.shape[:-2].numel(), *t.shape[-2:]) for t in (a, b))
    if alpha == 0:  # PyTorch's bfloat16 result is then not initialised
        alpha, a3 = 1.0, 0 * a3
    c3 = a.new_zeros(()) if c is None else c.reshape(a3.shape[0], *c.shape[-2:])
    return torch.baddbmm(c3, a3, b3.mT, alpha=alpha, beta=beta).reshape(*a.shape[:-1], a.shape[-2])


def _numpy_symmetric_matmul(
    a: Any, b: Any, c: Any = 0, *, alpha: float = 1.0, beta: float = 0.0
) -> Any:
    product = alpha * (a @ np.swapaxes(b, -1, -2)) + (beta * c if beta else 0)
    return np.tril(product) + np.swapaxes(np.tril(product, -1), -1, -2)


ones = torch.ones
FLOATING = "expected float16, bfloat16, float32 or float64"


def _unlike(name: str, actual: Any, expected: Any, dtype: torch.dtype = torch.float32) -> str:
    return (
        f"{name} is ({actual}, {dtype}, {{device}}), expected ({expected}, torch.float32, "
        f"{{device}})"
    )


MAXIMUM = Operator(
    name="maximum",
    kernels={"maximum_flat_kernel", "maximum_strided_kernel"},
    native=torch.maximum,
    formula=np.maximum,
    exact=True,
    dtypes=INTEGERS + FLOATS,
    shapes=("nk", "m1k"),
    cases=[
        ((0, 3), ()),
        ((128, 129), (129,)),
        ((128, 1), (1, 127)),
        ((1, 2, 1, 3, 1, 2), (3, 1, 2, 1, 2, 1)),
    ],
    small=[((3, 4), (3, 4)), ((), (3,)), ((3, 1), (2, 1, 4))],
    local=7,
    refused=[
        Refused((ones(3) + 0j, ones(3)), "a has dtype torch.complex64, expected a real"),
        Refused((ones(3), ones(3).to(torch.uint16)), "b has dtype torch.uint16, expected a real"),
        Refused(
            (ones(2, 3), ones(2, 0)), "b has shape (2, 0), which does not broadcast with a's (2, 3)"
        ),
    ],
)

MATMUL_T = Operator(
    name="matmul_t",
    kernels={"symmetric_matmul_kernel"},
    native=lambda x: x @ x.mT,
    formula=lambda x: x @ np.swapaxes(x, -1, -2),
    symmetric=True,
    dtypes=FLOATS,
    shapes=("mnk",),
    cases=[
        ((0, 3),),
        ((2, 400, 0),),
        ((1030, 17),),
        ((2, 3, 65, 4),),
        ((2, 600, 9),),
        ((70000, 2, 3),),  # more than a second or third grid axis of CUDA holds
    ],
    small=[((4, 3),), ((2, 3, 5),)],
    local=2,
    refused=[
        Refused((ones(3, 3).long(),), f"x has dtype torch.int64, {FLOATING}"),
        Refused((ones(3),), "x has shape (3,), expected (*, n, k)"),
    ],
)

SYMMETRIC_MATMUL = Operator(
    name="symmetric_matmul",
    kernels={"symmetric_matmul_kernel"},
    native=_symmetric_matmul,
    formula=_numpy_symmetric_matmul,
    symmetric=True,
    operands=symmetric_operands,
    factors=lambda count: {"alpha": -2.5} | ({"beta": 1 / 3} if count == 3 else {}),
    dtypes=FLOATS,
    shapes=("mnk", "mnk", "mnn"),
    cases=[
        ((0, 3), (0, 3), (0, 0)),
        ((3, 0), (3, 0), (3, 3)),
        ((1, 1000), (1, 1000), (1, 1)),
        ((257, 255), (257, 255), (257, 257)),
        ((2, 3, 65, 4), (2, 3, 65, 4), (2, 3, 65, 65)),
        ((2, 1, 257, 3), (2, 1, 257, 3), (2, 1, 257, 257)),
    ],
    small=[((4, 3), (4, 3), (4, 4)), ((2, 3, 5), (2, 3, 5))],
    local=4,
    refused=[
        Refused((ones(3, 2).int(), ones(3, 2).int()), f"a has dtype torch.int32, {FLOATING}"),
        Refused((ones(3), ones(3)), "a has shape (3,), expected (*, n, k)"),
        Refused((ones(3, 2), ones(2, 3)), _unlike("b", (2, 3), (3, 2))),
        Refused((ones(3, 2), ones(3, 2).half()), _unlike("b", (3, 2), (3, 2), torch.float16)),
        Refused((ones(3, 2), ones(3, 2), ones(3, 2)), _unlike("c", (3, 2), (3, 3))),
        Refused((ones(3, 2), ones(3, 2), ones(3, 3)), "c is given without beta, pass both"),
        Refused(
            (ones(3, 2),) * 2, "beta is 1.0 and c is None, pass both or neither", {"beta": 1.0}
        ),
    ],
)

LINEAR_SIGMOID = Operator(
    name="linear_sigmoid",
    kernels={"linear_sigmoid_kernel"},
    native=_linear_sigmoid,
    formula=_numpy_linear_sigmoid,
    roundings=4,  # z + b, e⁻ᶻ, 1 + and 1/
    dtypes=FLOATS,
    shapes=("mnk", "ok", "o"),
    cases=[
        ((0, 3), (4, 3), (4,)),
        ((3, 0), (4, 0), (4,)),
        ((3, 4), (0, 4), (0,)),
        ((129,), (1, 129), (1,)),
        ((129, 128), (127, 128), (127,)),
        ((2, 3, 5, 16), (10, 16), (10,)),
        ((70000, 3), (2, 3), (2,)),
    ],
    small=[((3, 4), (5, 4), (5,)), ((4,), (3, 4)), ((2, 3, 4), (5, 4), (5,))],
    local=5,
    refused=[
        Refused((ones(()), ones(4, 3)), "x has shape (), expected (*, in_features)"),
        Refused((ones(3).int(), ones(4, 3).int()), f"x has dtype torch.int32, {FLOATING}"),
        Refused(
            (ones(2, 3), ones(1, 4, 3)), "weight has shape (1, 4, 3), expected (out_features, 3)"
        ),
        Refused((ones(2, 3), ones(4, 3), ones(2, 4)), _unlike("bias", (2, 4), (4,))),
        Refused((ones(2, 3), ones(4, 3).half()), _unlike("weight", (4, 3), (4, 3), torch.float16)),
    ],
)

EXACT_MATMUL = Operator(
    name="exact_matmul",
    kernels={"exact_product_kernel"},
    native=lambda a, b: (a.double() @ b.double().mT).float(),
    formula=lambda a, b: a @ np.swapaxes(b, -1, -2),
    dtypes=(torch.float32,),
    shapes=("mnk", "mok"),
    cases=[
        ((0, 3), (4, 3)),
        ((3, 0), (4, 0)),
        ((129, 127), (128, 127)),
        ((2, 3, 65, 4), (2, 3, 7, 4)),
        ((70000, 2, 3), (70000, 1, 3)),
    ],
    small=[((4, 3), (5, 3)), ((2, 3, 2), (2, 4, 2))],
    local=3,
    refused=[
        Refused(
            (ones(3, 2).double(), ones(3, 2)), "a has dtype torch.float64, expected torch.float32"
        ),
        Refused((ones(3), ones(3)), "a has shape (3,), expected (*, m, k)"),
        Refused((ones(3, 2), ones(2, 3)), "b is (2, 3) on {where}, expected (n, 2) on {where}"),
        Refused(
            (ones(4, 3, 2), ones(3, 2)), "b is (3, 2) on {where}, expected (4, n, 2) on {where}"
        ),
    ],
)

OPERATORS = {
    op.name: op for op in (MAXIMUM, MATMUL_T, SYMMETRIC_MATMUL, LINEAR_SIGMOID, EXACT_MATMUL)
}
# The Triton kernels of all operators, by name; some are of a backward pass.
KERNELS = {name: op.kernels for name, op in OPERATORS.items()} | {
    "maximum_backward": {
        "maximum_backward_flat_kernel",
        "maximum_backward_strided_kernel",
        "maximum_backward_sums_kernel",
        "add_partial_sums_kernel",
    },
    "matmul_t_backward": {"symmetric_sum_kernel"},
    "fp32_matmul": {"fp32_matmul_kernel"},
    "linear_sigmoid_backward": {"sigmoid_backward_kernel", "add_partial_sums_kernel"},
    "symmetric_addmm_": {"symmetric_matmul_kernel"},
}

BY_DTYPE = [(name, dtype) for name, op in OPERATORS.items() for dtype in op.dtypes]
BY_CASE = [(name, shapes) for name, op in OPERATORS.items() for shapes in op.cases]
