# SPDX-License-Identifier: MIT
"""Launches on a real GPU, by the CUDA driver. PyTorch's wheel for CUDA brings `cuda.bindings`."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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


class LoadedModule:
    """A module on a device, in whose memory its variables are.

    Args:
        text: its PTX.

    Raises:
        RuntimeError: the driver refuses it.
    """

    def __init__(self, text: str, device: int):
        self.text, self.device = text, device
        with _current(device):
            self.module = _checked(driver().cuModuleLoadData(text.encode() + b"\0"))

    def launch(
        self,
        entry: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared: int,
        parameters: Sequence[bytes],
        stream: int,
    ) -> None:
        """Launch a kernel.

        Args:
            entry: its name in the PTX.
            shared: bytes of dynamic shared memory.
            parameters: the bytes of each.
            stream: its address.

        Raises:
            RuntimeError: the driver refuses the launch.
        """
        cuda = driver()
        with _current(self.device):
            function = _checked(cuda.cuModuleGetFunction(self.module, entry.encode()))
            limit = cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(cuda.cuFuncSetAttribute(function, limit, shared))
            held = [ctypes.create_string_buffer(one, len(one)) for one in parameters]
            addresses = (ctypes.c_void_p * len(held))(*map(ctypes.addressof, held))
            at = ctypes.addressof(addresses)
            _checked(cuda.cuLaunchKernel(function, *grid, *block, shared, stream, at, 0))

    def write(self, name: str, content: bytes) -> None:
        """Copy bytes to a variable, if the module has it; the host waits for the copy."""
        if not re.search(rf"(?<![\w$]){re.escape(name)}(?![\w$])", self.text):
            return
        cuda = driver()
        with _current(self.device):
            address, _ = _checked(cuda.cuModuleGetGlobal(self.module, name.encode()))
            _checked(cuda.cuMemcpyHtoD(address, content, len(content)))


@contextmanager
def _current(device: int) -> Iterator[None]:
    """Let the block's calls be for a device."""
    cuda = driver()
    _checked(cuda.cuCtxPushCurrent(_context(device)))
    try:
        yield
    finally:
        _checked(cuda.cuCtxPopCurrent())


@lru_cache
def _context(device: int) -> Any:
    """Return the context of a device that PyTorch uses."""
    cuda = driver()
    _checked(cuda.cuInit(0))
    return _checked(cuda.cuDevicePrimaryCtxRetain(_checked(cuda.cuDeviceGet(device))))


def _checked(answer: tuple[Any, ...]) -> Any:
    """Return what a function of the driver returns behind its status; of several values a list."""
    status, *found = answer
    if status.value:
        raise RuntimeError(f"the CUDA driver ends with {status.name}")
    return found if len(found) > 1 else found[0] if found else None
