# SPDX-License-Identifier: MIT
"""The classes of a record: the contract of an operator, and what the benchmarks time of it.

A new operator has one file beside this one. The tests of the operators read its contract. Of the
benchmarks `operators` and `products` read its workloads, `calls` and `host` its small calls, and
`autotune` its configurations.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

import torchpar

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
FLOATING = "expected float16, bfloat16, float32 or float64"

Shapes = tuple[tuple[int, ...], ...]
Sizes = tuple[Any, ...]  # of a workload: numbers; of maximum, the two shapes
Implementation = Callable[..., Tensor]


class Refused(NamedTuple):
    """Arguments that an operator refuses, and its message."""

    args: tuple[Tensor, ...]
    message: str  # with {where} for the device
    kwargs: Mapping[str, float] = MappingProxyType({})


class Rival(NamedTuple):
    """A further contestant of a workload, of its forward pass alone.

    Attributes:
        suits: whether it computes a case, of a type of device, sizes and a dtype.
        finish: the rest of the operator, done before the result is checked and outside of the time.
        is_library: whether its error is as it is, and not held to eager PyTorch's.
    """

    function: Implementation
    suits: Callable[[str, Sizes, torch.dtype], bool] = lambda device, sizes, dtype: True
    finish: Callable[[Tensor], Tensor] | None = None
    is_library: bool = False


class Bounded(NamedTuple):
    """What `products` times on a CPU, with a bound.

    Attributes:
        plain: the contestant that is compared with ours.
        bounded_from: the rows from which on the bound holds.
    """

    plain: str
    sizes: Sequence[Sizes]
    quick: Sequence[Sizes]
    dtypes: Sequence[torch.dtype] = (torch.float32,)
    modes: Sequence[Any] = ("forward", "full")
    bounded_from: int = 0


class Workload(NamedTuple):
    """What the benchmarks time under one name.

    Attributes:
        native: PyTorch's own calls, as one writes them.
        ours: torchpar's.
        drawn: the shapes of the tensors that are drawn for sizes: of arguments, and of the result's
            gradient.
        work: the numbers through memory and the operations that the operator needs for sizes,
            whoever computes it: of the forward pass, and of the backward pass if that is timed.
        quick, cpu, gpu: the sizes that are timed.
        compiled: those at which both are also timed under torch.compile, which takes seconds.
        operands: makes arguments and gradient of what is drawn.
        text: of sizes, in tables.
        dtypes: of operands; ``quick`` takes the first.
        gpu_dtypes: further ones on a GPU.
        element_bytes: of a GPU's memory for each element of the first operand in float64, oracle
            included; 0 is any.
        rivals: further contestants, by name.
    """

    name: str
    native: Implementation
    ours: Implementation
    drawn: Callable[..., Sequence[tuple[int, ...]]]
    work: Callable[..., Sequence[tuple[int, int]]]
    quick: Sequence[Sizes]
    cpu: Sequence[Sizes] = ()
    gpu: Sequence[Sizes] = ()
    compiled: Collection[Sizes] = ()
    operands: Callable[..., Sequence[Tensor]] = lambda *drawn: drawn
    text: Callable[[Sizes], str] = lambda sizes: "x".join(map(str, sizes))
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16, torch.float64)
    gpu_dtypes: Sequence[torch.dtype] = ()
    element_bytes: int = 0
    rivals: Mapping[str, Rival] = MappingProxyType({})
    bounded: Bounded | None = None


class SmallCall(NamedTuple):
    """A call of small operands, beside the calls of ATen that compute the same.

    Attributes:
        aten: ATen's calls.
        shapes: of the operands, for a number of rows. The result has that of the first one.
        rows: the numbers of rows, of `host` on a GPU.
        options: keyword arguments of the operator.
        operands: makes operands of those that are drawn.
        differentiable: whether ATen's calls have a gradient.
        dtype: of the operands on a GPU.
    """

    aten: Implementation
    shapes: Callable[[int], Sequence[tuple[int, ...]]]
    rows: Sequence[int] = (64,)
    options: Mapping[str, float] = MappingProxyType({})
    operands: Callable[..., Sequence[Tensor]] = lambda *drawn: drawn
    differentiable: bool = True
    dtype: torch.dtype = torch.bfloat16


class Tuned(NamedTuple):
    """A kernel of several configurations, which `autotune` times, and compiles where no GPU is.

    Attributes:
        candidates: the configurations for the operands of a launch in a precision. Their texts
            are their names in tables.
        launch: ``launch(config, operands, precision, wrap)`` returns the result.
        axis: the name of the size that varies.
        values: of ``axis``, on a GPU.
        sizes: those of the operator's first workload, for a value of ``axis``, and for ``borders``.
        native: what is timed beside it, by name: the first is the reference.
        compiled_native: PyTorch's calls as Inductor compiles them, and as the oracle in float64.
        compiled: the value of ``axis`` for which kernels are compiled where no GPU is.
        blocks: the number of blocks, or of tiles of persistent ones, of a configuration.
        estimate: µs of a configuration, for operands, a kind of them and a GPU; by default those of
            the memory, whose GB/s are then plotted.
        unfinished: those of ``native`` that do not take the sigmoid, which is taken outside of the
            time.
        borders: further sizes that are timed, and are not in the plot.
        symmetric: those whose result must equal its transpose, bit for bit.
        product: returns the `torchpar.kernels.rule.Product`, if it is one.
        text: of sizes, in tables.
    """

    candidates: Callable[[Sequence[Tensor], str], Sequence[Any]]
    launch: Callable[..., Tensor]
    axis: str
    values: Sequence[int]
    sizes: Callable[..., Sizes]
    native: Mapping[str, Implementation]
    compiled_native: Implementation
    compiled: int
    blocks: Callable[[Any, Sequence[Tensor]], int]
    estimate: Callable[[Any, Sequence[Tensor], str, str], float] | None = None
    unfinished: Collection[str] = ()
    borders: Sequence[Mapping[str, int]] = ()
    symmetric: Collection[str] = ()
    product: Callable[[], Any] | None = None
    text: Callable[[Sizes], str] = lambda sizes: "x".join(map(str, sizes))


class Operator(NamedTuple):
    """An operator and its contract. Its arguments' shapes have a letter for each size.

    An entry has tensors of the shapes of an operator's arguments, with any values. `operands` makes
    operands of them that the operator takes: for `symmetric_matmul`, operands whose product is
    symmetric.
    """

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
    other_kernels: Mapping[str, set[str]] = MappingProxyType({})  # of its further operators
    workloads: Sequence[Workload] = ()  # what `operators` times, first the operator itself
    call: SmallCall | None = None  # what `calls` times on a CPU
    host: SmallCall | None = None  # what `host` times
    tuned: Tuned | None = None  # what `autotune` times

    @property
    def widest(self) -> torch.dtype:
        """The dtype in which most tests judge values."""
        return self.dtypes[-1]

    @property
    def overload(self) -> Any:
        return getattr(torch.ops.torchpar, self.name).default

    @property
    def function(self) -> Callable[..., Tensor]:
        return getattr(torchpar, self.name)  # type: ignore[no-any-return]

    def op(self, *args: Tensor) -> Tensor:
        """The operator, as a function of tensors with any values."""
        return self.function(*self.operands(*args), **self.factors(len(args)))

    def plain(self, *args: Tensor) -> Tensor:
        """The same by PyTorch's own operators."""
        return self.native(*self.operands(*args), **self.factors(len(args)))

    def sized(self, sizes: dict[str, Any]) -> tuple[tuple[Any, ...], ...]:
        """The arguments' shapes, for a size per letter."""
        return tuple(tuple(sizes.get(letter, 1) for letter in shape) for shape in self.shapes)
