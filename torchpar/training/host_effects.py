# SPDX-License-Identifier: MIT
"""Effects of a training step on the host, which a replay of its CUDA graph does not repeat."""

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchpar.errors import ConfigError
from torchpar.training.leaf_gradients import live_tensors

HOST = torch.device("cpu")
LARGEST = 64  # elements of a tensor whose values are compared, and not its version
LIBRARIES = ("torch", "torchpar", "contextlib")
_COPIES = (torch.ops.aten.copy_, torch.ops.aten._to_copy)


@contextmanager
def stepped_optimizers() -> Iterator[list[Optimizer]]:
    """List the optimizers that the block steps, in their order, with repetitions."""
    stepped: list[Optimizer] = []
    hook = register_optimizer_step_post_hook(lambda one, *_: stepped.append(one))
    try:
        yield stepped
    finally:
        hook.remove()


def contents(t: Tensor) -> str | int:
    """Return what tells whether a tensor of the host has changed."""
    return repr(t.tolist()) if t.numel() <= LARGEST else t._version


class HostEffects(TorchDispatchMode):
    """The tensors of the host that a step uses, and what a replay of it would not repeat.

    Tensors that the step makes do not count, nor do those that only C++ knows. Copies to the GPU do
    not count either: a capture refuses those from pageable memory, and a replay repeats those from
    pinned memory.

    Args:
        ignored: tensors that do not count, such as those of an optimizer's state.
    """

    # The mode only looks on: operators launch their kernels, and compiled functions stay compiled.
    sees_launches = True
    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __init__(self, ignored: Iterable[Tensor] = ()):
        super().__init__()
        numbers = {id(t) for t in ignored}
        before = (t for t in live_tensors() if _is_on_host(t) and id(t) not in numbers)
        self._before = {id(t): t for t in before}
        self._used: dict[int, tuple[Tensor, int, str]] = {}  # with its version, and the line
        self._drawn_at = ""
        self._random = _random_states()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [t for t in tree_leaves((args, kwargs)) if id(t) in self._before]
        versions = [t._version for t in given]
        result = func(*args, **(kwargs or {}))
        results = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        is_on_host = all(map(_is_on_host, results))
        if is_on_host or getattr(func, "overloadpacket", None) not in _COPIES:
            for t, version in zip(given, versions, strict=True):
                self._used.setdefault(id(t), (t, version, _program_line()))
        is_random = torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
        if is_random and results and is_on_host:
            self._drawn_at = self._drawn_at or _program_line()
        return result

    def tensors(self) -> list[Tensor]:
        """Return the tensors of the host that the step used, none of which it has changed.

        Raises:
            ConfigError: the step changed one, or drew random numbers on the host.
        """
        for t, version, line in self._used.values():
            if t._version != version:
                dtype = str(t.dtype).removeprefix("torch.")
                raise ConfigError(
                    f"the step changes a tensor of the host ({dtype} {list(t.shape)}, {line}), "
                    "which a replay does not do; change it after the step, or make it a tensor on "
                    "the GPU"
                )
        line = self._drawn_at
        if not line and self._random != _random_states():
            line = "by random or numpy.random"
        if line:
            raise ConfigError(
                f"the step draws random numbers on the host ({line}), and a replay repeats those "
                "of its capture; draw them on the GPU, or before the step"
            )
        return [t for t, _, _ in self._used.values()]


def _random_states() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002  # programs draw from it
    return random.getstate(), name, keys.tobytes(), *rest  # type: ignore[union-attr]


def _is_on_host(t: object) -> bool:
    return isinstance(t, Tensor) and t.device == HOST and t.layout == torch.strided


def _program_line() -> str:
    """Return the line of the program that is executed, outside of the libraries."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in LIBRARIES:
            break
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
