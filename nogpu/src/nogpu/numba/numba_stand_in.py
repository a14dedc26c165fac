# SPDX-License-Identifier: MIT
"""`emulate_numba`: let numba-cuda take the emulated GPU for its own, when a program imports it."""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any
from unittest.mock import patch

from torch import Tensor

from nogpu.numba import numba_kernels
from nogpu.numba.device_memory import DeviceMemory
from nogpu.numba.numba_driver import DriverFunctions, EmulatedDevice, refuse
from nogpu.triton.emulator import Emulator

PACKAGE = "numba.cuda"
# Called by finalizers, some of which run when the program ends.
FINAL = (
    *("cuMemFree", "cuMemFreeHost", "cuMemHostUnregister"),
    *("cuEventDestroy", "cuStreamDestroy", "cuLibraryUnload"),
)
Changes = list[tuple[object, dict[str, Any]]]


def has_numba_cuda() -> bool:
    """Whether numba-cuda is installed, which compiles kernels without a driver."""
    return importlib.util.find_spec("numba_cuda") is not None


def has_compiler() -> bool:
    """Whether numba-cuda finds the library NVVM."""
    from numba.cuda.cudadrv import nvvm

    return bool(nvvm.is_available())


class _AfterImport(MetaPathFinder):
    """A finder that calls a function after a program has imported a module."""

    def __init__(self, name: str, call: Callable[[], None]):
        self.name, self.call = name, call

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)  # the others find it
        spec = importlib.util.find_spec(name)
        loader: Any = spec and spec.loader
        if loader is None:
            return spec
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.call()

        loader.exec_module = exec_module
        return spec


@contextmanager
def emulate_numba(emulator: Emulator) -> Iterator[None]:
    """Let launches of numba.cuda in the block be executed by an emulator.

    Nothing is replaced where numba-cuda is not installed, or a program asks for Numba's simulator.
    """
    if os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0") or not has_numba_cuda():
        yield
        return
    with ExitStack() as stack:
        install = partial(_install, emulator, stack)
        if PACKAGE in sys.modules:
            install()
        else:
            finder = _AfterImport(PACKAGE, install)
            sys.meta_path.insert(0, finder)
            stack.callback(_remove, finder)
        yield


def _remove(finder: _AfterImport) -> None:
    if finder in sys.meta_path:
        sys.meta_path.remove(finder)


def _install(emulator: Emulator, stack: ExitStack) -> None:
    from numba.cuda.core import config

    if config.ENABLE_CUDASIM:
        return
    from numba.cuda.cudadrv import driver as of_numba

    driver: Any = of_numba  # whose names are made when they are used
    if driver.driver.initialization_error is not None:  # there is no GPU
        driver._logger = driver.make_logger()
        for name in FINAL:
            setattr(driver.driver, name, lambda *args: None)
    # Asking the driver whether it has a function would keep that of a GPU, hence `create`.
    for place, changed in _changes(emulator):
        for name, value in changed.items():
            stack.enter_context(patch.object(place, name, value, create=True))


def _changes(emulator: Emulator) -> Changes:
    """Return what is replaced: modules, classes and objects, and their attributes by name."""
    from numba.cuda import api, dispatcher
    from numba.cuda.cudadrv import devicearray, devices
    from numba.cuda.cudadrv import driver as of_numba
    from numba.cuda.utils import UniqueDict

    driver: Any = of_numba
    memory = DeviceMemory(emulator.host_memory)
    functions = DriverFunctions(emulator, memory, driver.binding)
    runtime = devices._Runtime()
    state = {
        "is_initialized": True,
        "initialization_error": None,
        "devices": UniqueDict(),
        **functions.by_name(),
    }
    return [
        (driver.driver, state),
        (driver.Driver, {"_cuda_python_wrap_fn": lambda self, name: partial(refuse, name)}),
        (
            driver,
            {
                "ExperimentalDevice": lambda n: EmulatedDevice(emulator, n, functions.context),
                "_Linker": numba_kernels.Linker,
                "_to_core_stream": partial(_stream, driver),
            },
        ),
        (driver.Context, {"get_active_blocks_per_multiprocessor": _active_blocks}),
        (driver.Stream, {"add_callback": lambda *args: refuse("cuStreamAddCallback")}),
        (devices, {"_runtime": runtime, "gpus": runtime.gpus}),
        *((place, {"gpus": runtime.gpus}) for place in (api, sys.modules[PACKAGE])),
        (
            devicearray,
            {
                "_to_strided_memory_view": partial(_device_view, devicearray, memory),
                "_make_strided_memory_view": _host_view,
            },
        ),
        (
            dispatcher,
            {
                "LaunchConfig": numba_kernels.LaunchConfig,
                "launch": partial(numba_kernels.launch, memory),
            },
        ),
        (dispatcher._Kernel, {"launch": _noting(dispatcher._Kernel.launch)}),
        (
            dispatcher.CUDADispatcher,
            {
                "__init__": _with_lines(dispatcher.CUDADispatcher.__init__),
                # Another process may have a GPU, for which it would find what is kept here.
                "enable_caching": lambda self: None,
            },
        ),
    ]


def _stream(driver: Any, stream: Any) -> Any:
    """Return a stream of numba-cuda for one of a launch, which may be 0."""
    if isinstance(stream, driver.Stream):
        return stream
    return driver.Stream(driver.binding.CUstream(0))


def _active_blocks(
    context: object, kernel: Any, threads: int, shared: int, flags: object = None
) -> int:
    """Return how many blocks of a kernel a multiprocessor has at once."""
    held = kernel.kernel.attributes
    of_block = held.shared_size_bytes + shared
    return int(held.used.resident_programs(-(-threads // 32), of_block, held.arch))


def _noting(launch: Callable[..., None]) -> Callable[..., None]:
    """Let it be known, while a kernel is launched, which one that is."""

    def launch_noted(kernel: Any, *args: Any, **kwargs: Any) -> None:
        token = numba_kernels.LAUNCHED.set(kernel)
        try:
            launch(kernel, *args, **kwargs)
        finally:
            numba_kernels.LAUNCHED.reset(token)

    return launch_noted


def _with_lines(init: Callable[..., None]) -> Callable[..., None]:
    """Let each kernel be compiled to PTX that names the lines of its source.

    A link of modules while they are optimized would make a cubin, and debug information would take
    optimizations away: what the checks of ``debug=True`` find, an emulator finds as well.
    """

    def init_with_lines(
        self: Any, py_func: Any, targetoptions: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        options = {**targetoptions, "lineinfo": True, "debug": False, "lto": False}
        init(self, py_func, options, *args, **kwargs)

    return init_with_lines


class _View:
    """An array as a launch takes it, with the object that holds its memory."""

    def __init__(self, holder: object, ptr: int, array: Any, layout: Any):
        self.holder, self.ptr, self._layout = holder, ptr, layout
        self.shape, self.dtype, self.size = array.shape, array.dtype, array.size


def _host_view(array: Any, stream_ptr: object = None) -> _View:
    return _View(array, array.ctypes.data, array, None)


def _device_view(
    devicearray: Any,
    memory: DeviceMemory,
    array: Any,
    stream: Any = 0,
    copy: bool = True,
    user_explicit: bool = False,
) -> tuple[_View, bool]:
    """Return an array on the device, and whether it was copied there.

    Raises:
        TypeError: it is a tensor of the host, whose memory a kernel cannot access.
    """
    if isinstance(array, Tensor):
        if not hasattr(array, "__cuda_array_interface__"):
            raise TypeError("a kernel of numba.cuda is given a tensor of the host; pass its cuda()")
        memory.tensors[array.data_ptr()] = array
    on_device, is_copy = devicearray.auto_device(array, stream, copy, user_explicit)
    view = on_device._strided_memory_view_shim
    return _View(on_device, view.ptr or 0, view, view._layout), is_copy
