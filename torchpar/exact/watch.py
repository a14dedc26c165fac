# SPDX-License-Identifier: MIT
"""Warnings about tensors of the exact mode in arithmetic outside of it.

The mode marks the memory of each float tensor that an operator returns in it. When the mode ends, a
function mode stays below all others of the thread. It lets calls without marked operands pass. In a
call with marked operands, an operator that is computed in exact arithmetic within the mode, or
refused there, is warned of: at the first line of the call stack that is neither PyTorch's nor ours.
"""

import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _pop_mode,
    _push_mode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Operator = OpOverload[..., object]
Passes = Callable[[Operator, Sequence[object], object], bool]
"""Whether an operator with these operands and this result has the same bits everywhere."""
_LIBRARIES = str(Path(torch.__file__).parent), str(Path(__file__).parents[1])
_CONTAINERS = (list, tuple, dict)
_FEWEST = 1024  # marks, above which those of freed memory are removed


class _Marks:
    """Marked memories. A mark keeps the address of a memory from being used again."""

    def __init__(self) -> None:
        self._marks: dict[int, StorageWeakRef] = {}
        self._limit = _FEWEST

    def add(self, results: object) -> None:
        """Mark the memory of all float tensors in an operator's results."""
        for t in results if isinstance(results, tuple | list) else (results,):
            if isinstance(t, Tensor) and t.is_floating_point():
                mark = StorageWeakRef(t.untyped_storage())
                self._marks[mark.cdata] = mark
        if len(self._marks) > self._limit:
            self.are_left()

    def are_left(self) -> bool:
        """Remove the marks of freed memory, and return whether others are left."""
        living = {key: m for key, m in self._marks.copy().items() if not m.expired()}
        self._marks, self._limit = living, max(2 * len(living), _FEWEST)
        return bool(living)

    def holds_one_of(self, operands: Iterable[object]) -> bool:
        for one in operands:  # for most calls less work than `tree_leaves`
            if isinstance(one, Tensor):
                if torch._C._has_storage(one) and one.untyped_storage()._cdata in self._marks:
                    return True
            elif isinstance(one, _CONTAINERS) and self.holds_one_of(tree_leaves(one)):
                return True
        return False


marks = _Marks()


class Watch(TorchFunctionMode):
    """Warn of the calls with marked tensors of operators that do not pass."""

    def __init__(self, passes: Passes):
        super().__init__()
        self._passes = passes

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling() or not marks.holds_one_of([*args, *kwargs.values()]):
            return func(*args, **kwargs)
        with _Operators(self._passes):
            return func(*args, **kwargs)

    def begin(self) -> None:
        if marks.are_left():
            _change_stack(lambda stack: [self, *stack])

    def end(self) -> None:
        _change_stack(lambda stack: [mode for mode in stack if mode is not self])


def _change_stack(
    change: Callable[[list[TorchFunctionMode]], list[TorchFunctionMode]],
) -> None:
    stack = _get_current_function_mode_stack()
    for _ in stack:
        _pop_mode()
    for mode in change(stack):
        _push_mode(mode)


class _Operators(TorchDispatchMode):
    """Warn of the first operator in a call that does not pass."""

    def __init__(self, passes: Passes):
        super().__init__()
        self._passes = passes
        self._has_warned = False

    def __torch_dispatch__(
        self,
        func: Operator,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not (self._has_warned or self._passes(func, [*args, *kwargs.values()], result)):
            self._has_warned = True
            warnings.warn(
                f"{func} outside of torchpar.exact.mode() has an operand that was computed in it; "
                "the result depends on the processor. Move this line into the mode, or give it a "
                "clone of the operand, made after the mode",
                stacklevel=_depth(),
            )
        return result


def _depth() -> int:
    """The place in the caller's call stack, from 1, of the first frame outside of libraries."""
    frame, depth = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        frame, depth = frame.f_back, depth + 1
    return depth
