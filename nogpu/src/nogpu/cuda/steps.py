# SPDX-License-Identifier: MIT
"""Steps of optimizers in a capture: the numbers of Python that a CUDA graph has taken from them."""

import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from nogpu.cuda import places
from nogpu.cuda.graph_memory import Line

UNUSED = ("params", "initial_lr", "param_names")  # of a group: no step computes with them


class Change(NamedTuple):
    """A number of an optimizer that has changed since the capture.

    Attributes:
        is_kept: whether the graph reads a tensor that the optimizer does not have any more.
    """

    name: str
    before: str
    now: str
    is_kept: bool


class _Kept:
    """A number in a tensor on the device, which a graph reads from the memory of its capture."""

    def __init__(self, t: Tensor):
        self._tensor, self._address = weakref.ref(t), t.data_ptr()

    def tensor(self) -> Tensor | None:
        """Return the tensor; None if it has other memory now."""
        t = self._tensor()
        return t if t is not None and t.data_ptr() == self._address else None


Number: TypeAlias = int | float | Tensor


def _numbers_of_group(group: dict[str, Any]) -> dict[str, list[Number]]:
    """Return the numbers of a group, of which some are in tensors."""
    found: dict[str, list[Number]] = {}
    for key, value in group.items():
        leaves = tree_leaves(value) if key not in UNUSED else []
        if leaves and all(map(_is_number, leaves)):
            found[key] = leaves
    return found


def _is_number(value: object) -> TypeGuard[Number]:
    if isinstance(value, Tensor):
        return value.numel() == 1
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _captured(value: Number) -> int | float | _Kept:
    if not isinstance(value, Tensor):
        return value
    # A launch takes a number of the host by its value.
    return _Kept(value) if places.is_on_device(value) else float(value)


def _are_equal(one: Number, other: Number) -> bool:
    """Whether two numbers are equal, as a tensor holds them if one is in a tensor."""
    types = [t.dtype for t in (one, other) if isinstance(t, Tensor)]
    if one is other or not types:
        return one is other or bool(one == other)
    return any(_rounded(one, to) == _rounded(other, to) for to in types)


def _rounded(number: Number, to: torch.dtype) -> float:
    return float(torch.tensor(float(number), dtype=to))


def _as_text(numbers: list[Number]) -> str:
    texts = [
        f"{float(one):.6g}" if isinstance(one, (float, Tensor)) else str(one) for one in numbers
    ]
    return texts[0] if len(texts) == 1 else f"({', '.join(texts)})"


def has_host_count(optimizer: Optimizer) -> bool:
    """Whether an optimizer of PyTorch's counts the steps of a parameter on the host.

    Those of other libraries may count for themselves, and compute without the count.
    """
    if not any(
        one.__module__.startswith("torch.optim.") and one is not Optimizer
        for one in type(optimizer).__mro__
    ):
        return False
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            count = state.get("step") if places.is_on_device(p) and p.grad is not None else None
            if count is not None and not places.is_on_device(count):
                return True
    return False


class Step:
    """A step of an optimizer in a capture."""

    def __init__(self, optimizer: Optimizer, line: Line):
        self.optimizer, self.line = weakref.ref(optimizer), line
        self.name = type(optimizer).__name__
        self._numbers = [
            {
                key: list(map(_captured, numbers))
                for key, numbers in _numbers_of_group(group).items()
            }
            for group in optimizer.param_groups
        ]

    def changes(self) -> Iterator[Change]:
        """Yield numbers that are other ones now."""
        optimizer = self.optimizer()
        groups = () if optimizer is None else optimizer.param_groups
        for captured, group in zip(self._numbers, groups, strict=False):
            now = _numbers_of_group(group)
            for key, numbers in captured.items():
                before = [one.tensor() if isinstance(one, _Kept) else one for one in numbers]
                # Freed memory is another fault.
                known = [one for one in before if one is not None]
                if len(known) == len(now.get(key, ())) and not all(
                    map(_are_equal, known, now[key])
                ):
                    is_kept = any(isinstance(one, _Kept) for one in numbers)
                    yield Change(key, _as_text(known), _as_text(now[key]), is_kept)

    def tensors(self) -> Iterator[Tensor]:
        """Yield the tensors that hold numbers of the captured optimizer's groups."""
        optimizer = self.optimizer()
        for group in () if optimizer is None else optimizer.param_groups:
            for numbers in _numbers_of_group(group).values():
                yield from (one for one in numbers if isinstance(one, Tensor))

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


def why_not_capturable(optimizer: Optimizer) -> str:
    """Say why a graph does not take an optimizer's step, and what to do."""
    name = type(optimizer).__name__
    flags = [one for one in ("capturable", "fused") if one in optimizer.defaults]
    instead = (
        f"make it by {name}(…, {flags[0]}=True)"
        if flags
        else "take AdamW(…, capturable=True), or call step() after graph.replay()"
    )
    return f"{name} counts its steps on the host, and a replay does not; {instead}"
