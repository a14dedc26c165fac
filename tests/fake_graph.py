# SPDX-License-Identifier: MIT
"""A CUDA graph's stand-in on a CPU: record the calls of operators, and repeat them on the same memory."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recorder(TorchDispatchMode):
    """Record operators. As during a capture, nothing may be read back, and no result is there afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Sequence[Any], dict[str, Any], list[Tensor]]] = []
        self._made: set[int] = set()  # storages
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        values = [*args, *(kwargs.get(a.name) for a in func._schema.arguments[len(args) :])]
        for value, argument in zip(values, func._schema.arguments, strict=True):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for t in tensors(value):
                    storage = t.untyped_storage().data_ptr()
                    if storage not in self._made:
                        self._before.setdefault(storage, (t, t.clone()))
        result = func(*args, **kwargs)
        for t in tensors(result):
            if not any(
                t.untyped_storage().data_ptr() == a.untyped_storage().data_ptr() for a in tensors(values)
            ):
                self._made.add(t.untyped_storage().data_ptr())
        self._calls.append((func, args, kwargs, tensors(result)))
        return result

    def forget(self) -> None:
        """Undo what the recorded calls did, and spoil their results."""
        for t, value in self._before.values():
            t.copy_(value)
        for *_, results in self._calls:
            for t in results:
                if t.untyped_storage().data_ptr() in self._made and t.is_floating_point():
                    t.fill_(torch.nan)

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, results in self._calls:
                for t, value in zip(results, tensors(func(*args, **kwargs)), strict=True):
                    if t.data_ptr() != value.data_ptr():
                        t.copy_(value)


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def capture(_: Any, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Stands in for `torchpar.training.graph.GraphedStep._capture`."""
    with Recorder() as recorder:
        result = function()
    with torch.no_grad():
        recorder.forget()
    return recorder.replay, result
