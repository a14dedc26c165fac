# SPDX-License-Identifier: MIT
"""Launches on a real GPU, by the CUDA driver. PyTorch's wheel for CUDA brings `cuda.bindings`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any


def driver() -> Any:
    """Return the driver's Python module.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        from cuda.bindings import driver  # type: ignore[import-untyped]  # it has no types
    except ModuleNotFoundError:
        message = "a launch on a GPU needs cuda.bindings: pip install cuda-bindings"
        raise ModuleNotFoundError(message) from None
    return driver


def launch(
    module: tuple[str, str],
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    shared: int,
    parameters: Sequence[bytes],
    device: int,
    stream: int,
) -> None:
    """Launch a kernel.

    Args:
        module: its PTX, and the kernel's name in it.
        shared: bytes of dynamic shared memory.
        parameters: the bytes of each.
        stream: its address.

    Raises:
        RuntimeError: the driver refuses the module or the launch.
    """
    cuda = driver()
    _checked(cuda.cuCtxPushCurrent(_context(device)))
    try:
        function = _function(*module, device)
        limit = cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(cuda.cuFuncSetAttribute(function, limit, shared))
        held = [ctypes.create_string_buffer(one, len(one)) for one in parameters]
        addresses = (ctypes.c_void_p * len(held))(*map(ctypes.addressof, held))
        at = ctypes.addressof(addresses)
        _checked(cuda.cuLaunchKernel(function, *grid, *block, shared, stream, at, 0))
    finally:
        _checked(cuda.cuCtxPopCurrent())


@lru_cache
def _context(device: int) -> Any:
    """Return the context of a device that PyTorch uses."""
    cuda = driver()
    _checked(cuda.cuInit(0))
    return _checked(cuda.cuDevicePrimaryCtxRetain(_checked(cuda.cuDeviceGet(device))))


@lru_cache
def _function(text: str, entry: str, device: int) -> Any:
    """Return a kernel of a module that is loaded once for each device, whose context is current."""
    cuda = driver()
    return _checked(cuda.cuModuleGetFunction(_module(text, device), entry.encode()))


@lru_cache
def _module(text: str, device: int) -> Any:
    return _checked(driver().cuModuleLoadData(text.encode() + b"\0"))


def _checked(answer: tuple[Any, ...]) -> Any:
    """Return what a function of the driver returns behind its status."""
    status, *found = answer
    if status.value:
        raise RuntimeError(f"the CUDA driver ends with {status.name}")
    return found[0] if found else None
