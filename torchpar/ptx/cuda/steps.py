# SPDX-License-Identifier: MIT
"""Steps of optimizers in a capture: the numbers of Python that a CUDA graph has taken from them."""

import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from torchpar.ptx.cuda import places
from torchpar.ptx.cuda.graph_memory import Line

UNUSED = ("params", "initial_lr", "param_names")  # of a group: no step computes with them


def _numbers_of_group(group: dict[str, Any]) -> dict[str, object]:
    """Return the numbers of a group that a graph would take as they are."""
    found: dict[str, object] = {}
    for key, value in group.items():
        leaves = [_number(one) for one in tree_leaves(value)] if key not in UNUSED else []
        if leaves and None not in leaves:
            found[key] = leaves[0] if len(leaves) == 1 else tuple(leaves)
    return found


def _number(value: object) -> int | float | None:
    if isinstance(value, Tensor) and value.numel() == 1 and not places.is_on_device(value):
        return float(value)  # a number of the host, which a launch takes by its value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    return None


class Step:
    """A step of an optimizer in a capture."""

    def __init__(self, optimizer: Optimizer, line: Line):
        self.optimizer, self.line = weakref.ref(optimizer), line
        self.name = type(optimizer).__name__
        self.numbers = [_numbers_of_group(group) for group in optimizer.param_groups]

    def changes(self) -> Iterator[tuple[str, object, object]]:
        """Yield numbers that are other ones now: their names, and both values."""
        optimizer = self.optimizer()
        groups = () if optimizer is None else optimizer.param_groups
        for before, group in zip(self.numbers, groups, strict=False):
            now = _numbers_of_group(group)
            for key, value in before.items():
                if key in now and now[key] != value:
                    yield key, value, now[key]

    def parameters(self) -> list[Tensor]:
        optimizer = self.optimizer()
        groups = () if optimizer is None else optimizer.param_groups
        return [p for group in groups for p in group["params"]]

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of the optimizer's state, with their names."""
        optimizer = self.optimizer()
        for of_parameter in () if optimizer is None else list(optimizer.state.values()):
            for key, value in of_parameter.items() if isinstance(of_parameter, dict) else ():
                for t in tree_leaves(value):
                    if isinstance(t, Tensor):
                        yield str(key), t
