# SPDX-License-Identifier: MIT
"""Seconds of a training step by phase: data, forward, backward, pipeline, collectives, optimizer.

    with Phases(device) as phases:
        for x, labels in phases.steps(batches):
            cross_entropy(model(x), labels).backward()
            optimizer.step()
    print(phases.seconds)

A step is divided at its backward pass: what comes before it is "forward", what comes after it
"optimizer". A program without PyTorch names its phases itself:
``Phases(names=["forward", "gather"])``.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torchpar.decorating import context_manager
from torchpar.ops import environment
from torchpar.training.profile.record import (
    STEPS,
    WARM_UP,
    RankRecord,
    Span,
    Step,
    peak_resident_bytes,
)

if TYPE_CHECKING:
    import torch

B = TypeVar("B")
PHASES = ("data", "forward", "backward", "pipeline", "collectives", "optimizer")


@context_manager("phase")
def phase(name: str) -> Iterator[None]:
    """Count the seconds of the block as phase ``name``, if a `Phases` is active.

    As a decorator, count each call of the function.
    """
    if Phases.active is None:
        yield
    else:
        with Phases.active.measure(name):
            yield


class Phases:
    """Seconds of each phase on this rank, counted while the context is active.

    The device is synchronized at both ends of a phase, so the phases add up but no longer overlap.
    A phase inside another one (a collective in the backward pass) is counted once, as the inner
    phase. The backward pass is a call of `torch.Tensor.backward`; one by `torch.autograd.backward`
    is not noticed. A block of `torch.profiler.record_function` that is named as a phase is one.

    Attributes:
        seconds: of each phase.
        recorded: the latest steps, without the first ones (`record.STEPS`, `record.WARM_UP`).
        current: the current step; its ``calls`` are for others to fill.

    Args:
        device: the device that computes; None for a program without PyTorch, whose backward pass
            is a `measure`.
        names: the names of the phases; also the names of `steps` and `step`, if they are called.
    """

    active: ClassVar["Phases | None"] = None

    def __init__(self, device: "torch.device | None" = None, names: Iterable[str] = PHASES):
        self.device = device
        self.seconds = dict.fromkeys(names, 0.0)
        self.recorded: deque[Step] = deque(maxlen=STEPS)
        self.current = Step()
        self._taken = 0  # steps
        self._current = ""  # within a step, the phase of the time outside inner phases
        self._counted = 0.0  # the seconds of all phases when it began
        self._since = 0.0  # when it began

    def __enter__(self) -> "Phases":
        Phases.active = self
        if self.device is not None:
            self._mode = _watching_mode(self)
            self._mode.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self.device is not None:
            self._mode.__exit__(*error)
        Phases.active = None

    def steps(self, batches: Iterable[B]) -> Iterator[B]:
        """Yield ``batches``. Making one is "data"; what the loop does with it is a `step`."""
        remaining = iter(batches)
        while True:
            self.current = Step()
            with self.measure("data"):
                try:
                    batch = next(remaining)
                except StopIteration:
                    return
            with self.step():
                yield batch

    def begin_step(self, began: float) -> None:
        """Begin a step, whose batch was made since ``began``; end the step before it."""
        self.end_step()
        self.current = Step()  # without what was measured between the steps
        self._add("data", began, sum(self.seconds.values()))
        self._begin("forward")

    @contextmanager
    def step(self) -> Iterator[None]:
        """Count the block as "forward" until its backward pass or pipeline, and from there as
        "optimizer"."""
        self._begin("forward")
        try:
            yield
        finally:
            self.end_step()

    def end_step(self) -> None:
        """Count nothing more of the current step, whose block has not ended yet."""
        if not self._current:
            return
        self._end()
        self._taken += 1
        if self._taken > WARM_UP:
            self.recorded.append(self.current)
        self.current = Step()

    def record(
        self,
        rank: int,
        memory: Mapping[str, int],
        place: Mapping[str, int] | None = None,
    ) -> RankRecord:
        """Return what this rank's steps took.

        Args:
            memory: bytes by name; the peak of the process is added.
            place: the rank's number in each dimension of the mesh.
        """
        known = environment.describe(), dict(self.seconds), list(self.recorded)
        peak = {"process, peak": peak_resident_bytes()}
        return RankRecord(rank, *known, place or {}, {**memory, **peak})

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the seconds of the block to phase ``name``."""
        if name in ("backward", "pipeline") and self._current == "forward":
            self._end()
            self._begin("optimizer")
        start, counted = self._now(), sum(self.seconds.values())
        try:
            yield
        finally:
            self._add(name, start, counted)

    def _begin(self, name: str) -> None:
        self._current, self._since = name, self._now()
        self._counted = sum(self.seconds.values())

    def _end(self) -> None:
        self._add(self._current, self._since, self._counted)
        self._current = ""

    def _add(self, name: str, start: float, counted: float) -> None:
        """Count the time since ``start`` as ``name``, but for what inner phases have counted."""
        end = self._now()
        self.seconds[name] += end - start - (sum(self.seconds.values()) - counted)
        self.current.spans.append(Span(name, start, end))

    def _now(self) -> float:
        """Return the clock's seconds, once the device has done its work."""
        if self.device is not None and self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _watching_mode(phases: Phases) -> Any:
    """A context that counts calls of `torch.Tensor.backward` as phase "backward", and blocks of
    `torch.profiler.record_function` that are named as a phase.

    PyTorch has hooks around a forward pass and an optimizer's step, but none around a backward
    pass. A hook of the loss would need the loss, which only the loop has.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    recorded = torch.ops.profiler
    blocks: list[tuple[Any, AbstractContextManager[None]]] = []  # that are open, and their records

    class WatchingMode(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.Tensor.backward:
                with phases.measure("backward"):
                    return func(*args, **(kwargs or {}))
            is_exit = func is recorded._record_function_exit._RecordFunction
            if is_exit and blocks and args[0] is blocks[-1][0]:
                blocks.pop()[1].__exit__(None, None, None)
            result = func(*args, **(kwargs or {}))
            if func is recorded._record_function_enter_new and args[0] in phases.seconds:
                blocks.append((result, phases.measure(args[0])))
                blocks[-1][1].__enter__()
            return result

    return WatchingMode()
