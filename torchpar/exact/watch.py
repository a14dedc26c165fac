# SPDX-License-Identifier: MIT
"""Warnings about tensors of the exact mode in arithmetic outside of it.

The mode marks the memory of each float tensor that an operator returns in it. When the mode ends, a
function mode stays below the others of the thread. It lets calls without marked operands pass. In a
call with marked operands, the watch warns of an operator that the mode would compute exactly, or
refuse. The warning names the first line of the call stack that is neither PyTorch's nor ours.
"""

import os
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
"""A test of an operator, its operands and its result: the same bits on every processor."""
_LIBRARIES = tuple(
    f"{path}{os.sep}" for path in (Path(torch.__file__).parent, Path(__file__).parents[1])
)
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
            self.prune()

    def prune(self) -> None:
        """Remove the marks of freed memory."""
        living = {key: m for key, m in self._marks.copy().items() if not m.expired()}
        self._marks, self._limit = living, max(2 * len(living), _FEWEST)

    def __bool__(self) -> bool:
        return bool(self._marks)

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
        if torch.compiler.is_compiling() or not marks.holds_one_of(_inputs(args, kwargs)):
            return func(*args, **kwargs)
        with _Arithmetic(self._passes):
            return func(*args, **kwargs)

    def begin(self) -> None:
        """Stay below all modes but that of `torch.set_default_device`, which must be the lowest."""
        marks.prune()
        if marks:
            default = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
            _change_stack(
                lambda stack: [
                    *(mode for mode in stack if mode is default),
                    self,
                    *(mode for mode in stack if mode is not default),
                ]
            )

    def end(self) -> None:
        _change_stack(lambda stack: [mode for mode in stack if mode is not self])


def _inputs(args: Sequence[object], kwargs: Mapping[str, object]) -> list[object]:
    """The operands that an operator reads."""
    return [*args, *(value for name, value in kwargs.items() if name != "out")]


def _change_stack(
    change: Callable[[list[TorchFunctionMode]], list[TorchFunctionMode]],
) -> None:
    stack = _get_current_function_mode_stack()
    for _ in stack:
        _pop_mode()
    for mode in change(stack):
        _push_mode(mode)


class _Arithmetic(TorchDispatchMode):
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
        if not (self._has_warned or self._passes(func, _inputs(args, kwargs), result)):
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
