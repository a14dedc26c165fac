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
        self._made: set[int] = set()  # addresses of storages
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        given = {address(t): t.untyped_storage() for t in tensors((args, kwargs))}
        for at in given.keys() - self._made - self._before.keys():
            self._before[at] = given[at], given[at].clone()
        result = func(*args, **kwargs)
        self._made |= {address(t) for t in tensors(result)} - given.keys()
        self._calls.append((func, args, kwargs, tensors(result)))
        return result

    def forget(self) -> None:
        """Undo what the recorded calls did, and spoil their results."""
        for storage, content in self._before.values():
            storage.copy_(content)
        for *_, results in self._calls:
            for t in results:
                if address(t) in self._made and t.is_floating_point():
                    t.fill_(torch.nan)

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, results in self._calls:
                for t, value in zip(results, tensors(func(*args, **kwargs)), strict=True):
                    if t.data_ptr() != value.data_ptr():
                        t.copy_(value)


def address(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def capture(_: Any, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Stands in for `torchpar.training.graph.GraphedStep._capture`."""
    with Recorder() as recorder:
        result = function()
    with torch.no_grad():
        recorder.forget()
    return recorder.replay, result
