# SPDX-License-Identifier: MIT
"""Places of tensors on the CPU: where they would be if there were a GPU, on the host or the device.

The device is "cpu:0" to PyTorch, which is another name of the CPU. Its tensors are on "cpu", so
that a mark on their storage says where they are. What an operator computes from a tensor on the
device is there, too.

Some marks are guesses, and some tensors have none. Such a tensor may have been made in C++, by
another thread or process, or on a computed name "cpu", which the type of the device has, too.
"""

import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from enum import Enum

import torch
from torch import Tensor

HOST, DEVICE = torch.device("cpu"), torch.device("cpu", 0)
MARK = "nogpu_is_on_device"
PINNED = "nogpu_is_pinned"


class _Function(threading.local):
    """Whether this thread is in a function of PyTorch that was given a tensor of the device.

    C++ that no function has called, such as that of DistributedDataParallel, works on the device.
    """

    has_device = True


_function = _Function()


class Guess(Enum):
    """A mark of a tensor that is probably on the device."""

    DEVICE = 1


GUESS = Guess.DEVICE
Mark = bool | Guess | None  # whether a tensor is on the device; None if nothing is known


def mark_of(t: object) -> Mark:
    if not isinstance(t, Tensor):
        return None
    try:
        found: Mark = getattr(t.untyped_storage(), MARK, None)
    except (RuntimeError, NotImplementedError):  # sparse tensors, for example, have no storage
        return None
    return found


def is_on_device(t: object) -> bool:
    """Whether a tensor would be on the GPU, as far as is known."""
    return bool(mark_of(t))


def put(t: object, mark: Mark) -> None:
    """Let a tensor be on the device or on the host, or at a place that is not known."""
    if isinstance(t, Tensor) and mark_of(t) is not mark:
        with suppress(RuntimeError, NotImplementedError):
            setattr(t.untyped_storage(), MARK, mark)


def put_results(tensors: Iterable[Tensor], mark: Mark) -> None:
    """Let what an operator has made or written be at a place, unless its place is known."""
    for t in tensors:
        try:
            storage = t.untyped_storage()
            if not isinstance(getattr(storage, MARK, None), bool):
                setattr(storage, MARK, mark)
        except (RuntimeError, NotImplementedError):
            continue


def pin(t: object) -> None:
    """Let a GPU access a tensor of the host."""
    if isinstance(t, Tensor):
        with suppress(RuntimeError, NotImplementedError):
            setattr(t.untyped_storage(), PINNED, True)


def is_pinned(t: Tensor) -> bool:
    with suppress(RuntimeError, NotImplementedError):
        return getattr(t.untyped_storage(), PINNED, False)
    return False


def device_of(t: Tensor) -> torch.device:
    """Return the device of a tensor; of one that is on the CPU to PyTorch, where it would be."""
    with torch._C.DisableTorchFunction():
        device = OF_PYTORCH(t)
        return DEVICE if device == HOST and is_on_device(t) else device


OF_PYTORCH: Callable[[Tensor], torch.device] = torch._C.TensorBase.device.__get__


def of_results(marks: set[Mark], device: object) -> Mark:
    """Return where the results of an operator are.

    Args:
        marks: of its operands.
        device: that the operator was given; None if there was none.
    """
    if True in marks or device == DEVICE:
        return True
    if GUESS in marks:
        return GUESS
    if marks == {False}:
        return False
    # A function in Python that makes a tensor on "the device of x" sees that of PyTorch.
    return GUESS if device is not None and _function.has_device else None


def enter_function(args: Iterable[object]) -> bool:
    """Begin a function of PyTorch with these arguments; return what `leave_function` needs."""
    before, _function.has_device = _function.has_device, any(map(is_on_device, args))
    return before


def leave_function(before: bool) -> None:
    _function.has_device = before
