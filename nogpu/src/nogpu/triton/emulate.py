# SPDX-License-Identifier: MIT
"""`emulate`: let Triton take the emulated GPU for its own."""

import os
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from functools import lru_cache
from unittest.mock import patch

from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import CompiledKernel, compiler
from triton.runtime import JITFunction
from triton.runtime.driver import driver as active_driver

from nogpu.data_sheets import ARCHITECTURES
from nogpu.decorating import context_manager
from nogpu.machine.gpu_state import SCHEDULES
from nogpu.machine.program_sample import LEAST
from nogpu.native.cache import cache_folder, writable
from nogpu.record.resources import machine_code
from nogpu.triton import autotuner
from nogpu.triton.driver import (
    NO_GSAN,
    Asked,
    Driver,
    Entered,
    Module,
    emulations,
    lock,
    patches,
    present,
)
from nogpu.triton.emulator import MULTIPROCESSORS, SHARED_BYTES, Emulator
from nogpu.triton.float32_operators import Float32Operators
from nogpu.triton.torch_operators import Host
from nogpu.triton.uncompiled import uncompiled
from nogpu.triton.wide_products import wide_products

# The first version of Triton whose CompiledKernel has a method __del__, which unloads `module`.
UNLOADS_SINCE = (3, 8)
OPERATORS = ("cpu", "float32")  # how they compute with reduced types
ELF = b"\x7fELF"  # how machine code begins


@lru_cache(1)
def _let_kernels_end() -> None:
    """Let Triton forget kernels of an emulator also when it has no driver, or that of a GPU.

    The change lasts as long as the process, because kernels live longer than an emulator. It was
    made for Triton 3.8, and reads the attributes ``function`` and ``module`` of a kernel.
    """
    unload = getattr(CompiledKernel, "__del__", None)
    if unload is None:  # before `UNLOADS_SINCE`
        return

    def forget(kernel: CompiledKernel) -> None:
        if isinstance(kernel.function, Module):
            kernel.module = None  # nothing was loaded
        unload(kernel)

    CompiledKernel.__del__ = forget


class AskedNumber:
    """An attribute of Triton's kernels, which for those of an emulator is an `Asked`."""

    def __init__(self, name: str):
        self.name = name

    def __get__(self, kernel: CompiledKernel | None, owner: type | None = None) -> object:
        if kernel is None:
            return self
        try:
            held = vars(kernel)[self.name]
        except KeyError:
            message = f"{type(kernel).__name__!r} object has no attribute {self.name!r}"
            raise AttributeError(message) from None
        if isinstance(held, Asked):
            held = vars(kernel)[self.name] = held.number()
        return held

    def __set__(self, kernel: CompiledKernel, value: object) -> None:
        vars(kernel)[self.name] = value


@lru_cache(1)
def _let_kernels_ask() -> None:
    """Let ``n_regs`` and ``n_spills`` of a kernel ask ptxas when a program reads them.

    A call of ptxas takes longer than most launches. The change lasts as long as the process.
    """
    for name in ("n_regs", "n_spills"):
        setattr(CompiledKernel, name, AskedNumber(name))


class CachesByGpu:
    """The attribute of Triton's functions that has their kernels by the number of a device.

    Each kind of emulated GPU has a dictionary of its own, because the number may be 0 of them all.
    """

    def __get__(self, function: JITFunction | None, owner: type | None = None) -> object:
        if function is None:
            return self
        held, driver = vars(function), active_driver.active if emulations else None
        if not isinstance(driver, Driver):
            return held["device_caches"]
        caches = held.setdefault("nogpu_caches", {})
        if driver.kind not in caches:
            caches[driver.kind] = defaultdict(function.create_binder)
        return caches[driver.kind]

    def __set__(self, function: JITFunction, value: object) -> None:
        vars(function)["device_caches"] = value


@lru_cache(1)
def _let_kernels_show_sass() -> None:
    """Let ``asm["sass"]`` of a kernel assemble its PTX, which has the place of the machine code.

    The change lasts as long as the process, because kernels live longer than an emulator.
    """
    disassemble = compiler.get_sass

    def get_sass(code: bytes, function: str | None = None) -> str:
        if not code.startswith(ELF):
            code = machine_code(code.decode())
        return str(disassemble(code, function))

    compiler.get_sass = get_sass


@lru_cache(1)
def _let_functions_keep() -> None:
    """Let Triton's functions keep kernels by the kind of the emulated GPU.

    The change lasts as long as the process, because functions live longer than an emulator.
    """
    JITFunction.device_caches = CachesByGpu()


def _set_variable(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def why_not_compiled() -> str:
    """Return why Triton compiles no kernels, and what to do; "" if it does."""
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "TRITON_INTERPRET is set, so that kernels are not compiled; unset it"
    return NO_GSAN if "gsan" in os.environ.get("TRITON_INSTRUMENTATION_MODE", "") else ""


@context_manager("nogpu.emulate")
def emulate(
    arch: str = "sm_90",
    schedules: str = "one",
    multiprocessors: int | None = None,
    traces: int = 0,
    configurations: str = "first",
    sample: int | None = None,
    operators: str = "cpu",
) -> Iterator[Emulator]:
    """Execute the launches of Triton kernels in the block on this CPU, as compiled for a GPU.

    Several threads may be in blocks of their own. The launches of a thread that is in none belong
    to the block that was entered last.

    Args:
        arch: "sm_80" (A100), "sm_90" (H100) or "sm_100" (B200).
        schedules: "one", or "all": execute each launch three times, with asynchronous operations
            that complete early, late and at random, and warps in other orders.
        multiprocessors: their number on the GPU, which persistent kernels ask for, and which bounds
            the programs that run at once; None: 108 of an A100, 132 of an H100, 148 of a B200.
        traces: so many first programs of each kernel are recorded, and executed in Python: one for
            the pictures of the report's page, several for `Report.as_replay`.
        configurations: those of an autotuned kernel to execute: "first", the first one that
            compiles and fits; or "all": the others before it, and what they write is undone. One
            that raises an error, which would end the program on a GPU, is then a fault.
        sample: the most programs of a launch to execute, 6 or more. The counters are scaled to all
            programs, and the memory that the others would write stays as it is. None: execute all.
        operators: how PyTorch's operators compute with bfloat16 and float16: "cpu", as they do on a
            CPU, where some round each step; or "float32": in float32, and each result is rounded
            once. Within `cuda_is_cpu` those on the host compute as on a CPU.

    Raises:
        ValueError: another ``arch``, ``schedules``, ``configurations`` or ``operators``;
            ``multiprocessors`` below 1, ``traces`` below 0, or a ``sample`` below 6;
            TRITON_INTERPRET is set.
    """
    _check_names(arch, schedules, configurations, operators)
    if multiprocessors is None:
        multiprocessors = MULTIPROCESSORS[ARCHITECTURES[arch]]
    if type(multiprocessors) is not int or multiprocessors < 1:
        raise ValueError(f"multiprocessors is {multiprocessors!r}, expected an integer from 1 on")
    if not isinstance(traces, int) or traces < 0:
        raise ValueError(f"traces is {traces!r}, expected an integer from 0 on")
    if sample is not None and (type(sample) is not int or sample < LEAST):
        raise ValueError(f"sample is {sample!r}, expected an integer from {LEAST} on, or None")
    chosen = SCHEDULES if schedules == "all" else SCHEDULES[:1]
    emulator = Emulator(arch, chosen, multiprocessors, traces, configurations, sample)
    entered = Entered(threading.get_ident(), emulator)
    with lock:
        if emulations:
            present().has_inner = True
            emulator.account = present().account
        else:
            _install()
        emulations.append(entered)
    try:
        with ExitStack() as modes:
            if operators == "float32":
                modes.enter_context(Float32Operators(emulator))
            modes.enter_context(Host(emulator))
            yield emulator
    finally:
        _leave(entered)


def _check_names(arch: str, schedules: str, configurations: str, operators: str) -> None:
    if arch not in tuple(ARCHITECTURES):
        raise ValueError(f"arch is {arch!r}, expected one of {', '.join(ARCHITECTURES)}")
    if schedules not in ("one", "all"):
        raise ValueError(f"schedules is {schedules!r}, expected 'one' or 'all'")
    if configurations not in ("first", "all"):
        raise ValueError(f"configurations is {configurations!r}, expected 'first' or 'all'")
    if operators not in OPERATORS:
        raise ValueError(f"operators is {operators!r}, expected 'cpu' or 'float32'")
    if reason := why_not_compiled():
        raise ValueError(reason)


def _shared_bytes(device: int) -> int:
    """Return the most bytes of shared memory of a program on the emulated GPU."""
    return SHARED_BYTES[present().capability]


def _leave(entered: Entered) -> None:
    emulator = entered.emulator
    with lock:
        emulations.remove(entered)
        if emulations:
            present().inner_launches += len(emulator.launches) + emulator.inner_launches
        else:
            patches.close()


def _install() -> None:
    """Let Triton compile and launch for the emulators, until `patches` is closed."""
    folder = writable(cache_folder("ptx"))
    _let_kernels_end()
    _let_kernels_ask()
    _let_functions_keep()
    _let_kernels_show_sass()
    with ExitStack() as stack:
        for name, value in (("TRITON_CACHE_DIR", str(folder)), ("TRITON_DEFAULT_FP_FUSION", "1")):
            stack.callback(_set_variable, name, os.environ.get(name))
            os.environ[name] = value
        stack.enter_context(
            patch.object(
                CUDABackend,
                "make_cubin",
                lambda self, src, metadata, opt, capability: src.encode(),
            )
        )
        # Triton keeps this number by that of the device.
        stack.enter_context(patch.object(compiler, "max_shared_mem", _shared_bytes))
        stack.enter_context(autotuner.changes(present))
        stack.enter_context(uncompiled())
        stack.enter_context(wide_products(present))
        stack.callback(setattr, active_driver, "_active", active_driver._active)
        active_driver.set_active(Driver())
        patches.push(stack.pop_all())
