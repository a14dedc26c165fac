# SPDX-License-Identifier: MIT
"""Effects of a training step that a replay of its CUDA graph does not repeat.

The step's operators are watched in one eager call: which tensors they use that the step has not
made, and what they do on the host.
"""

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import ref

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
LARGEST = 64  # elements of a tensor whose values are compared in each call; reading takes long
# Between a program's line and an operator: contextlib calls torchpar's contexts.
LIBRARIES = ("torch", "torchpar", "nogpu", "contextlib")
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


@dataclass
class OutsideTensor:
    """A tensor that a step uses, and that was there before the step.

    Attributes:
        tensor: a weak reference; the program may put another tensor in its place.
        version: at its first use.
        line: the line of the program that uses it first.
        is_on_host: whether the host, and not the GPU, holds it.
    """

    tensor: "ref[Tensor]"
    version: int
    line: str
    is_on_host: bool

    def contents(self) -> str | int | None:
        """Return the values of a tensor of the host, or its version if it is large."""
        t = self.tensor()
        if t is None or not self.is_on_host:
            return None
        return repr(t.tolist()) if t.numel() <= LARGEST else t._version


class StepEffects(TorchDispatchMode):
    """What operators use and do in a step.

    Copies from the host to the GPU do not count: a capture refuses those from pageable memory, and
    a replay repeats those from pinned memory. Tensors that only C++ knows do not count either.

    Args:
        ignored: tensors that do not count, such as parameters and an optimizer's state.
    """

    # The mode only looks on: operators launch their kernels, and compiled functions stay compiled.
    sees_launches = True
    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __init__(self, ignored: Iterable[Tensor] = ()):
        super().__init__()
        before = live_tensors()
        with torch._C.DisableTorchFunction():  # a mode would be asked for each attribute
            leaves = [t for t in before if t.is_leaf and t.grad is not None]
            self._gradients = {id(p.grad): (p, p.grad) for p in leaves}
        numbers = self._gradients.keys() | {id(t) for t in ignored}
        self._before = {id(t): t for t in before if id(t) not in numbers}
        self._used: dict[int, OutsideTensor] = {}
        self.leaves: dict[int, ref[Tensor]] = {}  # whose gradients of before the step it uses
        self._drawn_at = ""
        self._random = _random_states()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        operands = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        for p, _ in (self._gradients[id(t)] for t in operands if id(t) in self._gradients):
            self.leaves[id(p)] = ref(p)
        given = [t for t in operands if id(t) in self._before]
        versions = [t._version for t in given]
        result = func(*args, **(kwargs or {}))
        results = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        is_on_host = all(map(_is_on_host, results))
        is_copy = getattr(func, "overloadpacket", None) in _COPIES and not is_on_host
        for t, version in zip(given, versions, strict=True):
            if id(t) not in self._used and not (is_copy and _is_on_host(t)):
                self._used[id(t)] = OutsideTensor(ref(t), version, program_line(), _is_on_host(t))
        is_random = torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
        if is_random and results and is_on_host:
            self._drawn_at = self._drawn_at or program_line()
        return result

    def outside_tensors(self) -> list[OutsideTensor]:
        """Return what the step used that it had not made, and let go of all tensors.

        Raises:
            ConfigError: the step changed a tensor of the host, or drew random numbers there.
        """
        self._before.clear()
        self._gradients.clear()
        for one in self._used.values():
            t = one.tensor()
            if t is not None and one.is_on_host and t._version != one.version:
                dtype = str(t.dtype).removeprefix("torch.")
                raise ConfigError(
                    f"the step changes a tensor of the host ({dtype} {list(t.shape)}, {one.line}), "
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
        return list(self._used.values())


def _random_states() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002  # programs draw from it
    return random.getstate(), name, keys.tobytes(), *rest  # type: ignore[union-attr]


def _is_on_host(t: object) -> bool:
    return isinstance(t, Tensor) and t.device == HOST and t.layout == torch.strided


def program_line() -> str:
    """Return the line of the program that is executed, outside of the libraries."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in LIBRARIES:
            break
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
