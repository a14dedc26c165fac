# SPDX-License-Identifier: MIT
"""Find what a loop keeps beside its run, and what a resumed run would lose.

An average of the model is updated after each step, and a gradient scaler changes its scale. A
checkpoint holds neither, unless `Run` is given it. Before it saves, `Run` therefore searches the
task, the loop's variables and what these hold: for averages, scalers, other optimizers and
schedulers, and for modules and objects with a state dict whose state changes.
"""

import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from itertools import islice
from types import (
    CodeType,
    FrameType,
    FunctionType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from torchpar.errors import ConfigError
from torchpar.library.sharding import local
from torchpar.parallel.launch.agreement import checksum
from torchpar.training.stateful import pack
from torchpar.training.train_state import TrainState

_DEEPEST = 7  # objects within objects: a function within a dict of an attribute of a variable
_MOST = 10_000  # objects that are looked at
_LONGEST = 1_000  # items of a container
_FRAMES = 20  # functions between the loop and the end of its step


@runtime_checkable
class _Stateful(Protocol):
    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


# What a resumed run would lose of objects, by their kind, and a name for such an object.
_LOST: dict[type, tuple[str, str]] = {
    AveragedModel: ("the average of the weights", "average"),
    GradScaler: ("the scale of the gradients", "scaler"),
    Optimizer: ("the state of an optimizer", "optimizer"),
    LRScheduler: ("the state of a learning-rate scheduler", "scheduler"),
    nn.Module: ("the values of a module, which the loop changes", "module"),
    _Stateful: ("the state of an object, which the loop changes", "state"),
}
_KINDS = AveragedModel, GradScaler, Optimizer, LRScheduler, nn.Module
# Objects of these packages hold no averages or scalers of a program, but for these modules of
# Python's: their objects hold what a program puts into them.
_FOREIGN = {"torch", "numpy", "torchvision", *sys.stdlib_module_names}
_HOLDERS = {"types", "argparse", "collections"}
_OWN = {"torchpar.training.run", "torchpar.training.unsaved"}  # a run holds what it was given


class Unsaved:
    """What the loop of a run changes, and its checkpoints do not hold.

    Args:
        state: of the run.
        task: its task.
    """

    def __init__(self, state: TrainState, task: object):
        self._state, self._task = state, task
        self._loop: CodeType | None = None
        # The objects before the first step with their names and checksums, by their ids, which stay
        # theirs while the objects are held here.
        self._before: dict[int, tuple[str, Any, int]] = {}

    def begin(self, loop: FrameType) -> None:
        """Remember the function that has the loop, and its variables before the first step."""
        if self._loop is None:
            self._loop = loop.f_code
            found = self._beside(loop)
            self._before = {id(value): (name, value, _sum(value)) for name, value in found}

    def check(self, step: FrameType) -> None:
        """Look at the variables of the loop before a step is saved. Every rank must call this.

        Args:
            step: the frame that ends the step.

        Raises:
            ConfigError: on every rank: a resumed run would lose something.
        """
        self._state.world.gather_results(lambda: self._refuse(step))

    def _refuse(self, step: FrameType) -> None:
        found = {id(value): (name, value) for name, value in self._beside(step)}
        # Also what another function than that of the loop has.
        for key, (name, value, _) in self._before.items():
            found.setdefault(key, (name, value))
        for name, value in found.values():
            if self._is_used(value):
                lost, word = next(one for kind, one in _LOST.items() if isinstance(value, kind))
                path = name.split(".")
                if all(part.isidentifier() for part in path):
                    remedy = f'stateful={{"{path[-1]}": {name}}}'
                else:
                    remedy = f'stateful={{"{word}": …}}'
                raise ConfigError(
                    f"a resumed run would lose {lost}: {name}, of type {type(value).__name__}, is "
                    f"in no checkpoint; give Run(…, {remedy})"
                )

    def _is_used(self, value: Any) -> bool:
        """Whether the loop changes an object.

        An average that was never updated counts: the loop may update it later. Objects of an
        earlier run do not change, and do not count. A module made after the first step is ignored,
        since a loop may make one in each step. An average or a scaler is not.
        """
        _, _, before = self._before.get(id(value), ("", None, None))
        if isinstance(value, AveragedModel):
            return not int(value.n_averaged) or before != _sum(value)
        if isinstance(value, GradScaler):
            return value.is_enabled() and (before or 0) != _sum(value)
        return before is not None and before != _sum(value)

    def _beside(self, step: FrameType) -> Iterator[tuple[str, Any]]:
        """The objects with a state that the task or the loop has, and the run does not."""
        state = self._state
        parts = [("", one) for one in (state.model, state.optimizer, state.lr_scheduler)]
        # A function that the optimizer calls, such as a hook, may hold an average.
        kept = {id(value) for _, value in _reachable(parts, functions=False)}
        kept |= {id(value) for _, value in _reachable([*state.stateful.items()])}
        own = {id(p) for one in (state.model, *state.stateful.values()) for p in _parameters(one)}
        # Objects of a task know the place in the data, which a checkpoint holds.
        of_task = {id(value) for _, value in _reachable([("task", self._task)])}
        for name, value in _reachable([*self._variables(step), ("task", self._task), *parts]):
            if id(value) in kept:
                continue
            # What the run has in another module or optimizer is the run's, too.
            if isinstance(value, _KINDS):
                is_other = not any(id(p) in own for p in _parameters(value))
            else:
                is_other = id(value) not in of_task and _is_stateful(value)
            if is_other:
                yield name, value

    def _variables(self, step: FrameType) -> Iterator[tuple[str, Any]]:
        """The variables of the functions from the end of a step up to the loop, and of those of the
        loop's file that call it, such as where a generator has the loop."""
        frames, frame, is_before = [step], step.f_back, step.f_code is not self._loop
        for _ in range(_FRAMES):
            if frame is None:
                break
            in_file = self._loop is not None and frame.f_code.co_filename == self._loop.co_filename
            if is_before or in_file:
                frames.append(frame)
            is_before &= frame.f_code is not self._loop
            frame = frame.f_back
        if is_before:  # the loop has another function end its steps
            frames = frames[:1]
        for one in frames:
            yield from one.f_locals.items()
            yield from _globals(one.f_code, one.f_globals)


def _is_stateful(value: object) -> bool:
    package = str(type(value).__module__).partition(".")[0]
    methods = (getattr(type(value), name, None) for name in ("state_dict", "load_state_dict"))
    return package not in _FOREIGN and type(value).__module__ not in _OWN and all(methods)


def _parameters(value: object) -> list[Tensor]:
    if isinstance(value, Optimizer):
        return [p for group in value.param_groups for p in group["params"]]
    return [*value.parameters()] if isinstance(value, nn.Module) else []


def _globals(code: CodeType, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The global variables that a function names."""
    return ((name, values[name]) for name in code.co_names if name in values)


def _reachable(
    named: Iterable[tuple[str, Any]], functions: bool = True
) -> Iterator[tuple[str, Any]]:
    """Objects with their names: those given, and those within them, each once.

    Args:
        functions: whether to look into functions.
    """
    seen, level = set[int](), [*named]
    for _ in range(_DEEPEST):
        following: list[tuple[str, Any]] = []
        for name, value in level:
            if id(value) in seen or len(seen) > _MOST:
                continue
            seen.add(id(value))
            yield name, value
            if functions or not isinstance(value, FunctionType | MethodType | partial):
                with suppress(Exception):  # of any kind: a program's objects answer as they like
                    following.extend(islice(_within(name, value), _LONGEST))
        level = following


def _within(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The objects that another one holds, with their names as a program writes them."""
    if isinstance(value, FunctionType):
        yield from _of_function(name, value)
    elif isinstance(value, MethodType):
        yield from ((name, value.__func__), (f"{name}(…)", value.__self__))
    elif isinstance(value, partial):
        yield from ((f"{name}(…)", one) for one in (*value.args, *value.keywords.values()))
        yield name, value.func
    elif isinstance(value, dict):
        for key, one in value.items():
            yield f"{name}[{repr(key) if isinstance(key, str | int) else '…'}]", one
    elif isinstance(value, list | tuple | set | deque):
        yield from ((f"{name}[{i}]", one) for i, one in enumerate(value))
    elif not isinstance(value, type | Tensor | ModuleType):
        yield from _attributes(name, value)


def _of_function(name: str, function: FunctionType) -> Iterator[tuple[str, Any]]:
    for word, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if _is_full(cell):
            yield word, cell.cell_contents
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    yield from ((f"{name}(…)", one) for one in defaults)
    yield from _globals(function.__code__, function.__globals__)
    if (wrapped := getattr(function, "__wrapped__", None)) is not None:
        yield name, wrapped


def _attributes(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    kind = type(value)
    package = str(kind.__module__).partition(".")[0]
    if isinstance(value, nn.Module):
        yield from ((f"{name}.{path}", one) for path, one in value.named_modules() if path)
    elif kind.__module__ in _OWN or (
        package in _FOREIGN - _HOLDERS and not isinstance(value, LRScheduler | Optimizer)
    ):
        return
    for key, one in list(getattr(value, "__dict__", {}).items()):
        if not (isinstance(value, nn.Module) and key.startswith("_")):
            yield f"{name}.{key}", one
    for base in kind.__mro__ if package not in _FOREIGN else ():
        for key, one in vars(base).items():
            if isinstance(one, MemberDescriptorType):  # of __slots__
                with suppress(AttributeError):
                    yield f"{name}.{key}", getattr(value, key)
            elif isinstance(one, _KINDS):
                yield f"{name}.{key}", one


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
    if not isinstance(value, nn.Module | Optimizer):
        try:
            return checksum(pack("", value.state_dict(), is_known=True))
        except Exception:  # of any kind: the object is a program's own
            return 0
    tensors = _parameters(value)
    for module in value.modules() if isinstance(value, nn.Module) else ():
        cached: set[str] = getattr(module, "_non_persistent_buffers_set", set())
        tensors += [t for n, t in module.named_buffers(recurse=False) if n not in cached]
    dense = [
        local(t)
        for t in tensors
        if not is_lazy(t) and t.layout == torch.strided and t.device.type != "meta"
    ]
    return hash(tuple(checksum(t) for t in dense))
