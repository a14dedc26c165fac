# SPDX-License-Identifier: MIT
"""Places of tensors on the CPU: where they would be if there were a GPU, on the host or the device.

The program sees "cuda:0". PyTorch's C++ is given "cpu:0", which is another name of the CPU, and its
tensors are on "cpu", so that a mark on their storage says where they are. What an operator computes
from a tensor on the device is there, too.

Some marks are guesses, and some tensors have none. Such a tensor may have been made in C++, or by
another process. The program sees it on "cpu", and what is made on its device has no mark, either.
"""

import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from enum import Enum

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

HOST, CUDA = torch.device("cpu"), torch.device("cuda", 0)  # what the program sees
UNKNOWN = torch.device("cpu")  # what it sees of a tensor without a mark, for which it says "cpu"
DEVICE = torch.device("cpu", 0)  # what PyTorch's C++ is given for the emulated device
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
        if device != HOST:
            return device
        mark = mark_of(t)
        if mark is None:
            mark = _mark_within(t)
        return CUDA if mark else HOST if mark is False else UNKNOWN


def is_cuda(t: Tensor) -> bool:
    """Tell a program whether a tensor is on the device, as `torch.Tensor.is_cuda` does."""
    return device_of(t).type == "cuda"


def is_cpu(t: Tensor) -> bool:
    """Tell a program whether a tensor is on the host, as `torch.Tensor.is_cpu` does."""
    return device_of(t).type == "cpu"


def index_of(t: Tensor) -> int:
    """Return the number of a tensor's device, and -1 on the host, as PyTorch does."""
    return -1 if is_cpu(t) else device_of(t).index


OF_PYTORCH: Callable[[Tensor], torch.device] = torch._C.TensorBase.device.__get__


def _mark_within(t: Tensor) -> Mark:
    """Return where a tensor is whose own memory has no mark: it may consist of other tensors."""
    if is_functorch_wrapped_tensor(t):
        within = get_unwrapped(t)
        return _mark_within(within) if is_functorch_wrapped_tensor(within) else mark_of(within)
    if is_traceable_wrapper_subclass(t):
        names, _ = t.__tensor_flatten__()
        marks = {mark_of(getattr(t, name)) for name in names}
        return True if True in marks else GUESS if GUESS in marks else None
    if t.layout is torch.sparse_coo:
        with torch._C._DisableTorchDispatch():
            return mark_of(t._values())
    return None


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
    # A function in C++ that makes a tensor on the device of another one sees that of PyTorch.
    return GUESS if device is not None and _function.has_device else None


def named(device: torch.device) -> torch.device:
    """Return what PyTorch's C++ is given for a device of CUDA that a program names.

    Raises:
        RuntimeError: another GPU than the first.
    """
    check_index(device.index)
    return DEVICE


def check_index(index: int | None) -> None:
    if index not in (None, 0):
        raise RuntimeError(
            f"the device is cuda:{index}, expected cuda:0: one GPU is emulated; "
            "ask torch.cuda.device_count()"
        )


def enter_function(args: Iterable[object]) -> bool:
    """Begin a function of PyTorch with these arguments; return what `leave_function` needs."""
    before, _function.has_device = _function.has_device, any(map(is_on_device, args))
    return before


def leave_function(before: bool) -> None:
    _function.has_device = before
