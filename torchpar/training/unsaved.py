# SPDX-License-Identifier: MIT
"""Find what a loop keeps beside its run, and what a resumed run would lose.

An average of the model is updated after each step, and a gradient scaler changes its scale. `Run`
sees neither, unless it is given them. So it looks at the task and at the variables of the loop: for
averages, scalers, other optimizers and schedulers, and for modules whose values change.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from types import CodeType, FrameType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from torchpar.errors import ConfigError
from torchpar.library.sharding import local
from torchpar.parallel.launch.agreement import checksum
from torchpar.training.train_state import TrainState

_DEEPEST = 4  # objects within objects: a function within a dict of an attribute of a variable
_MOST = 10_000  # objects that are looked at
_FRAMES = 20  # functions between the loop and the end of its step
# What a resumed run would lose of objects, by their kind.
_LOST: dict[type, str] = {
    AveragedModel: "the average of the weights",
    GradScaler: "the scale of the gradients",
    Optimizer: "the state of an optimizer",
    LRScheduler: "the state of a learning-rate scheduler",
    nn.Module: "the values of a module, which the loop changes",
}
# Objects of these packages hold no averages or scalers of a program.
_FOREIGN = {"torch", "numpy", "torchvision", *sys.stdlib_module_names}


class Unsaved:
    """What the loop of a run changes, and its checkpoints do not hold.

    Args:
        state: of the run.
        task: its task.
    """

    def __init__(self, state: TrainState, task: object):
        self._state, self._task = state, task
        self._loop: CodeType | None = None
        self._sums: dict[int, int] = {}  # of objects before the first step, by their ids
        self._held: list[Any] = []  # these objects, so that no other one gets the id of one

    def begin(self, loop: FrameType) -> None:
        """Remember the function that has the loop, and its variables before the first step."""
        if self._loop is None:
            self._loop = loop.f_code
            self._held = [value for _, value in self._beside(loop)]
            self._sums = {id(value): _sum(value) for value in self._held}

    def check(self, step: FrameType) -> None:
        """Look at the variables of the loop before a step is saved. Every rank must call this.

        Args:
            step: the frame that ends the step.

        Raises:
            ConfigError: on every rank: a resumed run would lose something.
        """
        self._state.world.gather_results(lambda: self._refuse(step))

    def _refuse(self, step: FrameType) -> None:
        for name, value in self._beside(step):
            lost = next(words for kind, words in _LOST.items() if isinstance(value, kind))
            if not self._is_used(value):
                continue
            kind = type(value).__name__
            raise ConfigError(
                f"a resumed run would lose {lost}: {name}, of type {kind}, is in no checkpoint; "
                f'give Run(…, stateful={{"{name}": {name}}})'
            )

    def _is_used(self, value: Any) -> bool:
        """Whether the loop changes an object, or will: what is left of another run stays as it is.

        An object that is newer than the first step may be made in each step, except for an average
        and a scaler.
        """
        before = self._sums.get(id(value))
        if isinstance(value, AveragedModel):
            return not int(value.n_averaged) or before != _sum(value)
        if isinstance(value, GradScaler):
            return value.is_enabled() and (before or 0) != _sum(value)
        return before is not None and before != _sum(value)

    def _beside(self, step: FrameType) -> Iterator[tuple[str, Any]]:
        """The objects with a state that the task or the loop has, and the run does not."""
        state = self._state
        parts = (state.model, state.optimizer, state.lr_scheduler)
        kept = {id(value) for _, value in _reachable([("", one) for one in parts])}
        kept |= {id(value) for _, value in _reachable([*state.stateful.items()])}
        own = {id(p) for p in state.model.parameters()}
        for name, value in _reachable([*self._variables(step), ("task", self._task)]):
            # The model in another module, or the optimizer in another one, is the run's.
            if (
                isinstance(value, tuple(_LOST))
                and id(value) not in kept
                and not any(id(p) in own for p in _parameters(value))
            ):
                yield name, value

    def _variables(self, step: FrameType) -> Iterator[tuple[str, Any]]:
        """The variables of the functions from the end of a step up to the loop."""
        frames, frame = [step], step.f_back
        for _ in range(_FRAMES):
            if frames[-1].f_code is self._loop or frame is None:
                break
            frames.append(frame)
            frame = frame.f_back
        for one in frames if frames[-1].f_code is self._loop else frames[:1]:
            yield from one.f_locals.items()
            yield from _globals(one.f_code, one.f_globals)


def _parameters(value: object) -> list[Tensor]:
    if isinstance(value, Optimizer):
        return [p for group in value.param_groups for p in group["params"]]
    return [*value.parameters()] if isinstance(value, nn.Module) else []


def _globals(code: CodeType, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The global variables that a function names."""
    return ((name, values[name]) for name in code.co_names if name in values)


def _reachable(named: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Objects with their names: those given, and those within them, each once."""
    seen, level = set[int](), [*named]
    for _ in range(_DEEPEST):
        following: list[tuple[str, Any]] = []
        for name, value in level:
            if id(value) in seen or len(seen) > _MOST:
                continue
            seen.add(id(value))
            yield name, value
            following += _within(name, value)
        level = following


def _within(name: str, value: Any) -> Iterable[tuple[str, Any]]:
    """The objects that another one holds, with their names; those without a name have its name."""
    package = type(value).__module__.partition(".")[0]
    if isinstance(value, FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        held = [(word, cell.cell_contents) for word, cell in cells if _is_full(cell)]
        held += [(name, one) for one in value.__defaults__ or ()]
        held += [
            *(value.__kwdefaults__ or {}).items(),
            *_globals(value.__code__, value.__globals__),
        ]
    elif isinstance(value, MethodType):
        held = [(name, value.__self__), (name, value.__func__)]
    elif isinstance(value, partial):
        held = [(name, one) for one in (value.func, *value.args)] + [*value.keywords.items()]
    elif isinstance(value, dict):
        held = [(key if isinstance(key, str) else name, one) for key, one in value.items()]
    elif isinstance(value, list | tuple | set):
        held = [(name, one) for one in value]
    elif isinstance(value, nn.Module):
        held = [(name, module) for module in value.modules() if module is not value]
    elif isinstance(value, type) or (package in _FOREIGN and not isinstance(value, LRScheduler)):
        held = []
    else:
        held = [*getattr(value, "__dict__", {}).items()]
    return held


def _is_full(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018  # of a variable without a value it raises
    except ValueError:
        return False
    return True


def _sum(value: Any) -> int:
    """A checksum of the state of an object; 0 of a scaler that has not scaled yet."""
    if isinstance(value, LRScheduler):
        return hash(value.last_epoch)
    if isinstance(value, GradScaler):
        # PyTorch's scaler makes its scale when it is first used.
        is_new = getattr(value, "_scale", value) is None
        return 0 if is_new else hash(tuple(value.state_dict().values()))
    buffers = [*value.buffers()] if isinstance(value, nn.Module) else []
    dense = [
        local(t)
        for t in (*_parameters(value), *buffers)
        if t.layout == torch.strided and t.device.type != "meta"
    ]
    return hash(tuple(checksum(t) for t in dense))
