# SPDX-License-Identifier: MIT
"""Operations of a CUDA graph: operators of PyTorch and launches, with the memory that they use."""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeGuard, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from nogpu.cuda.devices import Devices, devices_of
from nogpu.cuda.graph_memory import Line, Slot
from nogpu.cuda.types import Arguments, Function, Keywords, Operator
from nogpu.triton.torch_operators import EMPTY, changed, is_plain

T = TypeVar("T")

# Operators that take the shape of a tensor, and not its values.
SHAPES = {*EMPTY, *(getattr(torch.ops.aten, f"{one}_like") for one in ("zeros", "ones", "full"))}
SHAPES |= {getattr(torch.ops.aten, f"{one}_like") for one in ("rand", "randn", "randint")}
SHAPES |= {getattr(torch.ops.aten, f"new_{one}") for one in ("zeros", "ones", "full")}

# Operators that read their first operand where indices point.
GATHERS = {getattr(torch.ops.aten, one) for one in ("index", "index_select", "gather", "take")}
GATHERS |= {torch.ops.aten.embedding}

BATCH_NORMS = {torch.ops.aten.native_batch_norm, torch.ops.aten.cudnn_batch_norm}


class OperatorKind:
    """What an operator does, by its schema.

    Attributes:
        is_view: it returns parts of its operands, and changes none.
        reads_nothing: of its operands but the shapes.
        is_indexed: it uses its first operand only where indices point.
        devices: that its operands may be on.
    """

    def __init__(self, func: Operator):
        schema, self.func = func._schema, func
        self.may_write = schema.is_mutable or _writes_secretly(func)
        aliases = any(one.alias_info is not None for one in schema.returns)
        self.is_view = aliases and not schema.is_mutable
        has_indices = any(one.name in ("index", "indices") for one in schema.arguments)
        # Others that return new memory copy the operand.
        self.is_indexed = func.overloadpacket in GATHERS or (has_indices and schema.is_mutable)
        self.reads_nothing = self.is_view or func.overloadpacket in SHAPES
        self.devices = Devices.ANY if self.reads_nothing else devices_of(func)


def tensors_in(values: Iterable[object]) -> list[Tensor]:
    """Return the tensors of an operator's arguments or results, which hold no dictionaries."""
    found: list[Tensor] = []
    for one in values:
        if isinstance(one, Tensor):
            found.append(one)
        elif isinstance(one, (list, tuple)):
            found += tensors_in(one)
    return found


def written_by(func: Operator, args: Arguments, kwargs: Keywords) -> list[Tensor]:
    """Return the operands that an operator writes, also where its schema does not say so."""
    found: Sequence[object]
    if func.overloadpacket in BATCH_NORMS:
        found = args[3:5]  # the running mean and variance
    elif func.namespace == "c10d":
        found = (args, kwargs)
    else:
        found = changed(func._schema, args, kwargs)
    return [t for t in tree_leaves(found) if is_plain(t)]


def _writes_secretly(func: Operator) -> bool:
    return func.namespace == "c10d" or func.overloadpacket in BATCH_NORMS


class Operation:
    """An operator of PyTorch, with the places of what it takes and returns.

    Args:
        results: None for one without memory, and for one in the memory of an operand.
        line: of the program, that was captured.
    """

    def __init__(
        self,
        call: Function,
        args: Arguments,
        kwargs: Keywords,
        results: list[Slot | None],
        line: Line,
    ):
        self.call, self.args, self.kwargs, self.results = call, args, kwargs, results
        self.line = line

    is_launch = False

    def __str__(self) -> str:
        return str(self.call)

    def __call__(self) -> None:
        made = self.call(*_filled(self.args), **_filled(self.kwargs))
        leaves = tree_leaves(made)
        for slot, new in zip(self.results, leaves, strict=False):
            if slot is not None:
                slot.tensor().copy_(new)
        for one in leaves:
            if isinstance(one, torch.ScriptObject) and hasattr(one, "wait"):
                one.wait()  # for a collective


class LaunchOperation(Operation):
    """A launch of a Triton kernel."""

    is_launch = True

    def __init__(self, execute: Function, arguments: Arguments, line: Line):
        super().__init__(execute, arguments, {}, [], line)

    def __str__(self) -> str:
        return "a launch of a Triton kernel"

    def __call__(self) -> None:
        self.call(with_tensors(self.args, _filled_in))


def _filled(values: T) -> T:
    filled: T = tree_map(_filled_in, values)
    return filled


def _filled_in(one: object) -> object:
    return one.tensor() if isinstance(one, Slot) else one


class _Descriptor(Protocol):
    """A tensor's descriptor, or the tensor with another type."""

    base: object


def _is_descriptor(value: object) -> TypeGuard[_Descriptor]:
    return isinstance(getattr(value, "base", None), (Tensor, Slot))


def with_tensors(value: object, change: Callable[[object], object]) -> object:
    """Return an argument of a launch, with other tensors: it may be a tuple or a descriptor."""
    if isinstance(value, (Tensor, Slot)):
        return change(value)
    if _is_descriptor(value):
        other = copy.copy(value)
        other.base = change(value.base)
        return other
    if isinstance(value, (tuple, list)):
        return tuple(with_tensors(one, change) for one in value)
    return value


def tensors_of_launch(arguments: Iterable[object]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in arguments:
        if isinstance(value, Tensor):
            found.append(value)
        elif _is_descriptor(value):
            found += tensors_of_launch((value.base,))
        elif isinstance(value, (tuple, list)):
            found += tensors_of_launch(value)
    return found
