# SPDX-License-Identifier: MIT
"""The work of PyTorch's operators: their arithmetic, the bytes that they move, and a time."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from nogpu.record.time import Work, estimate

VECTORS = ("mv", "dot", "vdot", "addmv")
# Operators that move or compare numbers, for which a kernel needs no floating-point instruction.
CHOICES = (
    *("abs", "amax", "amin", "argmax", "argmin", "clamp", "clamp_max", "clamp_min", "eq", "ge"),
    *("gt", "le", "lt", "max", "maximum", "min", "minimum", "ne", "neg", "relu", "sign", "sort"),
    *("threshold", "topk"),
)
# Operators that move numbers and compute none.
MOVES = (
    *("constant_pad_nd", "index_copy", "index_fill", "masked_fill", "masked_scatter", "roll"),
    *("select_scatter", "slice_scatter", "where", "uniform", "normal", "random", "bernoulli"),
    *("_to_copy", "arange", "cat", "clone", "contiguous", "copy", "embedding"),
    *("empty", "empty_like", "empty_strided", "expand_copy", "fill", "flip", "full"),
    *("full_like", "gather", "index", "index_put", "index_select", "masked_select"),
    *("new_empty", "new_empty_strided", "new_full", "new_ones", "new_zeros", "ones"),
    *("ones_like", "randint", "randn", "rand", "repeat", "scatter", "stack", "triu"),
    *("tril", "zero", "zeros", "zeros_like", "_local_scalar_dense"),
)
ELEMENTS_OF_PROGRAM = 1024  # of an elementwise operator


class Operation(NamedTuple):
    """An operator that was called.

    Attributes:
        name: such as "aten.mm".
        flops: a multiply-add counts as two; of other operators than products the numbers that it
            reads or writes, whichever are more.
        read: bytes of its operands.
        written: bytes of its results.
        is_product: whether tensor cores could compute it.
        bits: of its results' numbers.
    """

    name: str
    flops: float
    read: int
    written: int
    is_product: bool
    bits: int

    def microseconds(self, gpu: str) -> float:
        """Return an estimate of its time as one launch of PyTorch's own kernel."""
        programs = max(1, -(-8 * self.written // max(self.bits, 1) // ELEMENTS_OF_PROGRAM))
        tensor = {"f16": self.flops} if self.is_product and self.bits == 16 else {}
        kind = {64: "f64", 16: "f16"}.get(self.bits, "f32")
        work = Work(
            programs=programs,
            resident=8,
            tiles=programs,
            steps=1,
            buffers=8,
            tensor=tensor,
            has_wgmma=True,
            flops={} if tensor else {kind: self.flops},
            special=0,
            copies=0,
            instructions=0,
            loaded=self.read,
            stored=self.written,
            shared=0,
            memory=self.read + self.written,
        )
        return estimate(work, gpu).microseconds


class UncompiledMode(TorchDispatchMode):
    """A mode of programs that compile nothing.

    PyTorch keeps its compiler out of other modes by importing it: 2 seconds of a CPU.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class OperatorWork(UncompiledMode):
    """Notes what operators are called in a block, without views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    @property
    def flops(self) -> float:
        return sum(one.flops for one in self.operations)

    @property
    def floating(self) -> float:
        """Those of operators for which a kernel needs floating-point instructions."""
        return sum(
            one.flops
            for one in self.operations
            if one.name.partition(".")[2].removesuffix("_") not in CHOICES
        )

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        with suppress(NotImplementedError, RuntimeError):  # tensors without memory
            if (one := _operation(func, args, kwargs, result)) is not None:
                self.operations.append(one)
        return result


def is_view(operator: Any) -> bool:
    """Whether an operator returns the memory of an operand, and changes none."""
    schema = operator._schema
    return not schema.is_mutable and any(one.alias_info is not None for one in schema.returns)


def _operation(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
) -> Operation | None:
    given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    made = [one for one in tree_leaves(result) if isinstance(one, Tensor)]
    packet = func._overloadpacket
    name = str(packet)
    short = name.partition(".")[2].removesuffix("_")
    if is_view(func) or short == "_unsafe_view" or short.startswith(("empty", "new_empty")):
        return None
    read, written = (
        sum(one.numel() * one.element_size() for one in some) for some in (given, made)
    )
    bits = 8 * made[0].element_size() if made else 32
    if packet in flop_registry:
        counted = flop_registry[packet](*args, **kwargs, out_val=result)
        return Operation(name, float(counted), read, written, True, bits)
    if short in VECTORS:  # a product with a vector, or of two
        count = 2 * max((one.numel() for one in given), default=0)
        return Operation(name, float(count), read, written, True, bits)
    flops = 0 if short in MOVES else max((one.numel() for one in (*given, *made)), default=0)
    return Operation(name, float(flops), read, written, False, bits)
