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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

if TYPE_CHECKING:
    import torch

B = TypeVar("B")
PHASES = ("data", "forward", "backward", "pipeline", "collectives", "optimizer")


@contextmanager
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

    The device is synchronised at both ends of a phase, so the phases add up but no longer overlap.
    A phase inside another one (a collective in the backward pass) is counted once, as the inner
    phase. The backward pass is a call of `torch.Tensor.backward`; one by `torch.autograd.backward`
    is not noticed.

    Attributes:
        seconds: of each phase.

    Args:
        device: that computes; None for a program without PyTorch, whose backward pass is a
            `measure`.
        names: of the phases; those of `steps` and `step` are among them, if these are called.
    """

    active: ClassVar["Phases | None"] = None

    def __init__(self, device: "torch.device | None" = None, names: Iterable[str] = PHASES):
        self.device = device
        self.seconds = dict.fromkeys(names, 0.0)
        self._current = ""  # within a step, the phase of the time outside inner phases
        self._since = 0.0  # when it began

    def __enter__(self) -> "Phases":
        Phases.active = self
        if self.device is not None:
            self._mode = _backward_mode(self)
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
            with self.measure("data"):
                try:
                    batch = next(remaining)
                except StopIteration:
                    return
            with self.step():
                yield batch

    @contextmanager
    def step(self) -> Iterator[None]:
        """Count the block as "forward" until its backward pass or pipeline, and from there as
        "optimizer"."""
        self._current, self._since = "forward", self._now()
        yield
        self.end_step()

    def end_step(self) -> None:
        """Count nothing more of the current step, whose block has not ended yet."""
        if self._current:
            self._change("")

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the seconds of the block to phase ``name``."""
        if name in ("backward", "pipeline") and self._current == "forward":
            self._change("optimizer")
        since = self._now()
        yield
        self.seconds[name] += self._now() - since

    def _change(self, current: str) -> None:
        self.seconds[self._current] += self._now() - self._since
        self._current, self._since = current, self._now()

    def _now(self) -> float:
        """Return the seconds that no phase has counted: an outer phase lacks those of an inner
        one."""
        if self.device is not None and self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)
        return time.perf_counter() - sum(self.seconds.values())


def _backward_mode(phases: Phases) -> Any:
    """A context that counts calls of `torch.Tensor.backward` as phase "backward".

    PyTorch has hooks around a forward pass and an optimizer's step, but none around a backward
    pass. A hook of the loss would need the loss, which only the loop has.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class BackwardMode(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is not torch.Tensor.backward:
                return func(*args, **(kwargs or {}))
            with phases.measure("backward"):
                return func(*args, **(kwargs or {}))

    return BackwardMode()
