# SPDX-License-Identifier: MIT
"""PyTorch's operators beside launches: which memory they write."""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.utils._pytree import tree_leaves

from nogpu.machine.gpu_state import TooLarge
from nogpu.record.operator_work import UncompiledMode
from nogpu.record.source import program_line
from nogpu.triton.emulator import Emulator, Operator
from nogpu.triton.host_memory import SMALL, check_memory, has_host_memory


class Host(UncompiledMode):
    """What PyTorch's operators do while an emulator is active.

    Operators of others that have a kernel for CUDA, written in Python, run it on CPU tensors; if
    the program says which tensors are on the host, they run the kernel for CPUs on those.

    The memory of torch.empty is unwritten, until an operator writes to it.
    """

    sees_launches = True  # as the emulator executes them
    supports_higher_order_operators = True

    def __init__(self, emulator: Emulator):
        super().__init__()
        self.emulator = emulator

    def __torch_dispatch__(
        self,
        func: "Operator | HigherOrderOperator",
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        if isinstance(func, HigherOrderOperator):  # it calls functions, or launches a kernel
            with self, self._program():
                return _call_higher(func, *args, **(kwargs or {}))
        self._check_size(func, args, kwargs or {})
        if not _launches_nothing(func):
            self.emulator.complete_launches()
        kernel = None if func.namespace in BUILT_IN else self._kernel(func, args, kwargs or {})
        if kernel is not None:
            with self, self._program():  # also in what the kernel's function does
                result = func.redispatch(kernel, *args, **(kwargs or {}))
        elif self.emulator.watcher is not None:
            with torch._C.DisableTorchFunction():  # autograd calls operators within its modes
                result = self.emulator.watcher.operator(func, args, kwargs or {})
            if result is NotImplemented:  # a subclass of tensors does it, with other operators
                return result
        else:
            result = func(*args, **(kwargs or {}))
        memory = self.emulator.host_memory
        if memory.unwritten:
            for t in _written_tensors(func._schema, args, kwargs or {}, result):
                memory.note_written(t)
        if func.overloadpacket in EMPTY and is_plain(result):
            memory.note_empty(result)
        return result

    def _check_size(
        self, func: Operator, args: Sequence[object], kwargs: dict[str, object]
    ) -> None:
        """Refuse to make a tensor, of zeros or random numbers, for which there is no memory."""
        position = _position_of_size(func)
        if not 0 <= position < len(args):
            return
        dtype, size = kwargs.get("dtype") or torch.get_default_dtype(), args[position]
        if not isinstance(dtype, torch.dtype) or not isinstance(size, (list, tuple)):
            return
        if not all(type(n) is int for n in size):  # symbols, whose tensor has no memory
            return
        count = math.prod(size) * dtype.itemsize
        device = kwargs.get("device")
        if self.emulator.watcher is not None and str(device).partition(":")[0] == "cuda":
            device = None  # which the CPU stands for
        if count < SMALL or not _has_memory(device, args[0] if position else None):
            return
        try:
            check_memory(
                f"a tensor of {str(dtype).removeprefix('torch.')} {list(size)} takes", count
            )
        except TooLarge as e:
            self.emulator.note_too_large(str(e), program_line())
            raise

    def _program(self) -> AbstractContextManager[object]:
        """Return a block in which PyTorch does what it does for the program."""
        watcher = self.emulator.watcher
        return nullcontext() if watcher is None else watcher.program()

    def _kernel(
        self, func: Operator, args: Sequence[object], kwargs: dict[str, object]
    ) -> torch._C.DispatchKeySet | None:
        """Return the key of an operator's kernel in Python, for its operands; None if it has none.

        One in C++ would take the addresses for those of a GPU. Of an operator that has a kernel in
        Python for CPUs alone, the key of CUDA is returned, by which PyTorch refuses it.
        """
        operands = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if not operands or not all(map(is_plain, operands)):
            return None
        lines = torch._C._dispatch_dump(func.name()).splitlines()
        kernels = dict(line.split(": ", 1) for line in lines if ": " in line)
        composite = kernels.get("CompositeExplicitAutograd[alias]", "")
        watcher = self.emulator.watcher
        if watcher is not None and watcher.has_device(operands) is False:
            return ON_CPU if ".py:" in kernels.get("CPU", composite) else None
        is_for_cpus = watcher is not None and ".py:" in kernels.get("CPU", "")
        found = kernels.get("CUDA", composite or (".py:" if is_for_cpus else ""))
        return ON_CUDA if ".py:" in found else None


def _call_higher(func: HigherOrderOperator, *args: Any, **kwargs: Any) -> object:
    """Call the functions that an operator is given, or launch its kernel, within modes."""
    if func.name() == "cond":  # for which PyTorch's own function refuses modes
        predicate, if_true, if_false, operands = args
        return (if_true if predicate else if_false)(*operands)
    return func.dispatch(torch._C.DispatchKey.CPU, *args, **kwargs)


ON_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
ON_CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
BUILT_IN = ("aten", "prim", "prims", "profiler")  # namespaces of PyTorch's operators


def is_plain(t: object) -> TypeGuard[Tensor]:
    """Whether ``t`` is a tensor with memory on the CPU: not sparse, fake, or autograd's zero."""
    if not isinstance(t, Tensor) or type(t) not in (Tensor, torch.nn.Parameter):
        return False
    return t.layout == torch.strided and has_host_memory(t) and not t._is_zerotensor()


def _has_memory(device: object, like: object) -> bool:
    """Whether a new tensor has memory on the CPU: it is not on the meta device, and not fake.

    Args:
        like: the tensor that it is made for; None: there is none.
    """
    if device is not None and torch.device(str(device)).type != "cpu":
        return False
    # A mode that is below `Host`.
    is_fake = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
    return not is_fake and (like is None or is_plain(like))


def changed(
    schema: torch.FunctionSchema, args: Sequence[object], kwargs: dict[str, object]
) -> list[object]:
    """Return the arguments of an operator that it changes in place."""
    given = dict(zip((argument.name for argument in schema.arguments), args, strict=False))
    given |= kwargs
    return [
        given.get(argument.name)
        for argument in schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def _written_tensors(
    schema: torch.FunctionSchema, args: Sequence[object], kwargs: dict[str, object], result: object
) -> Iterator[Tensor]:
    """Yield the tensors that an operator has written: its new ones, and those that it changes."""
    values = changed(schema, args, kwargs)
    if all(one.alias_info is None for one in schema.returns):
        values.append(result)
    for t in tree_leaves(values):
        if is_plain(t):
            yield t


@lru_cache(None)
def _position_of_size(func: Operator) -> int:
    """Return which argument is the size of a new tensor; -1 if there is none."""
    schema = func._schema
    if any(one.alias_info is not None for one in schema.returns):  # a view
        return -1
    return next((n for n, one in enumerate(schema.arguments) if one.name == "size"), -1)


@lru_cache(None)
def _launches_nothing(func: Operator) -> bool:
    """Whether an operator returns a view, or memory that it does not write."""
    schema = func._schema
    given = [one.alias_info for one in schema.arguments]
    returned = [one.alias_info for one in schema.returns]
    is_view = bool(returned) and None not in returned
    writes = any(one is not None and one.is_write for one in given)
    return func.overloadpacket in EMPTY or (is_view and not writes)


EMPTY = {
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.empty_strided,
    torch.ops.aten.new_empty,
    torch.ops.aten.new_empty_strided,
}
