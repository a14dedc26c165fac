# SPDX-License-Identifier: MIT
"""Places of tensors on the CPU: where they would be if there were a GPU, on the host or the device.

The device is "cpu:0" to PyTorch, which is another name of the CPU. Its tensors are on "cpu", so
that a mark on their storage says where they are. What an operator computes from a tensor on the
device is there, too.
"""

import threading
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

HOST, DEVICE = torch.device("cpu"), torch.device("cpu", 0)
MARK = "torchpar_is_on_device"


class _Function(threading.local):
    """Whether this thread is in a function of PyTorch that was given a tensor of the device.

    C++ that no function has called, such as that of DistributedDataParallel, works on the device.
    """

    has_device = True


_function = _Function()


def is_on_device(t: object) -> bool:
    """Whether a tensor would be on the GPU."""
    if not isinstance(t, Tensor):
        return False
    try:
        return getattr(t.untyped_storage(), MARK, False)
    except (RuntimeError, NotImplementedError):  # sparse tensors, for example, have no storage
        return False


def put(t: object, device: torch.device | None) -> None:
    """Let a tensor be on the host or the device."""
    if not isinstance(t, Tensor) or is_on_device(t) is (device == DEVICE):
        return
    try:
        setattr(t.untyped_storage(), MARK, device == DEVICE)
    except (RuntimeError, NotImplementedError):
        return


def device_of(t: Tensor) -> torch.device:
    """Return the device of a tensor; of one that is on the CPU to PyTorch, where it would be."""
    with torch._C.DisableTorchFunction():
        device = OF_PYTORCH(t)
        return DEVICE if device == HOST and is_on_device(t) else device


OF_PYTORCH: Callable[[Tensor], torch.device] = torch._C.TensorBase.device.__get__


def device_of_results(operands: list[Tensor], device: object) -> torch.device:
    """Return where the results of an operator are.

    Args:
        device: that the operator was given; None if there was none.
    """
    if device == DEVICE or any(map(is_on_device, operands)):
        return DEVICE
    # A function in Python that makes a tensor on "the device of x" sees that of PyTorch.
    return DEVICE if device is not None and _function.has_device else HOST


def enter_function(args: Iterable[object]) -> bool:
    """Begin a function of PyTorch with these arguments; return what `leave_function` needs."""
    before, _function.has_device = _function.has_device, any(map(is_on_device, args))
    return before


def leave_function(before: bool) -> None:
    _function.has_device = before
