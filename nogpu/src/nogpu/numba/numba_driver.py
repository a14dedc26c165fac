# SPDX-License-Identifier: MIT
"""The functions of CUDA's driver that numba-cuda calls, and the device that it asks."""

import itertools
from types import SimpleNamespace
from typing import Any, NoReturn

from nogpu.data_sheets import DATA_SHEETS, GPUS, MEMORY, REGISTERS, WARPS
from nogpu.numba.device_memory import DeviceMemory
from nogpu.numba.numba_kernels import refused
from nogpu.record.faults import HostFault
from nogpu.record.launch_size import MOST_OF_BLOCK, MOST_OF_GRID, MOST_THREADS, WITHOUT_ASKING
from nogpu.record.source import program_line
from nogpu.triton.emulator import SHARED_BYTES, Emulator

VERSION = 13_000  # of CUDA
# What a program calls, by the function of the driver that serves it.
REFUSED = {
    "cuIpcGetMemHandle": "get_ipc_handle(), for memory of another process",
    "cuIpcOpenMemHandle": "open_ipc_array(), for memory of another process",
    "cuStreamAddCallback": "add_callback() and async_done(); call the function after synchronize()",
    "cuCtxEnablePeerAccess": "enable_peer_access(), for there is one GPU",
    "cuLibraryGetGlobal": "a global symbol of a module",
    "cuMemHostRegister": "mapped(); take mapped_array()",
    "cuMemAllocManaged": "managed_array(); take mapped_array()",
}


def refuse(name: str, *arguments: object) -> NoReturn:
    """Refuse a function of the driver that is not replaced."""
    what = REFUSED.get(name, f"a call of the driver's {name}")
    raise refused(f"numba.cuda on this CPU does not execute {what}")


class EmulatedDevice:
    """The GPU, as ``cuda.core.Device`` is asked for it."""

    def __init__(self, emulator: Emulator, number: int, handle: object):
        if number:
            raise ValueError(f"the device is {number}, expected 0: one GPU is emulated")
        major, minor = divmod(emulator.capability, 10)
        self.device_id, self.compute_capability = 0, (major, minor)
        self.name, self.uuid = f"NVIDIA {GPUS[emulator.capability]}", "0" * 32
        self.context = SimpleNamespace(handle=handle, _handle=handle)

    def set_current(self) -> None: ...


def attributes(emulator: Emulator) -> dict[str, int]:
    """Return what the driver says of the GPU, by the names that follow CU_DEVICE_ATTRIBUTE_."""
    capability, sheet = emulator.capability, DATA_SHEETS[GPUS[emulator.capability]]
    sizes = {
        f"MAX_{what}_DIM_{axis}": most
        for what, limits in (("BLOCK", MOST_OF_BLOCK), ("GRID", MOST_OF_GRID))
        for axis, most in zip("XYZ", limits, strict=True)
    }
    yes = ("UNIFIED_ADDRESSING", "CAN_MAP_HOST_MEMORY", "CONCURRENT_KERNELS", "ECC_ENABLED")
    no = ("INTEGRATED", "KERNEL_EXEC_TIMEOUT", "TCC_DRIVER", "COMPUTE_MODE", "MANAGED_MEMORY")
    places = ("PCI_DOMAIN_ID", "PCI_BUS_ID", "PCI_DEVICE_ID")
    return {
        **sizes,
        **dict.fromkeys(yes, 1),
        **dict.fromkeys((*no, *places), 0),
        "MAX_THREADS_PER_BLOCK": MOST_THREADS,
        "MAX_THREADS_PER_MULTIPROCESSOR": 32 * WARPS,
        "MAX_BLOCKS_PER_MULTIPROCESSOR": 32,
        "MAX_SHARED_MEMORY_PER_BLOCK": WITHOUT_ASKING,
        "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN": SHARED_BYTES[capability],
        "MAX_SHARED_MEMORY_PER_MULTIPROCESSOR": sheet.shared,
        "MAX_REGISTERS_PER_BLOCK": REGISTERS,
        "MAX_REGISTERS_PER_MULTIPROCESSOR": REGISTERS,
        "TOTAL_CONSTANT_MEMORY": 65_536,
        "WARP_SIZE": 32,
        "MULTIPROCESSOR_COUNT": emulator.multiprocessors,
        "CLOCK_RATE": int(sheet.ghz * 1e6),  # kHz
        "L2_CACHE_SIZE": sheet.l2 * 2**20,
        "COMPUTE_CAPABILITY_MAJOR": capability // 10,
        "COMPUTE_CAPABILITY_MINOR": capability % 10,
        "SINGLE_TO_DOUBLE_PRECISION_PERF_RATIO": 2,
    }


class DriverFunctions:
    """What replaces functions of the driver; each method has the name of one.

    Launches and copies are executed when they are called, in the order of the program, so that
    nobody waits for a stream or an event.
    """

    def __init__(self, emulator: Emulator, memory: DeviceMemory, binding: Any):
        self._emulator, self._memory, self._binding = emulator, memory, binding
        self._attributes = attributes(emulator)
        self._numbers = itertools.count(1)
        self.context = binding.CUcontext(1)
        self._stack: list[Any] = []

    def cuDriverGetVersion(self) -> int:
        return VERSION

    def cuDeviceGetCount(self) -> int:
        return 1

    def cuDeviceGetAttribute(self, code: Any, device: int) -> int:
        name = code.name.removeprefix("CU_DEVICE_ATTRIBUTE_")
        if name not in self._attributes:
            raise refused(f"the attribute {name} of the emulated GPU is not known")
        return self._attributes[name]

    # Contexts

    def cuCtxGetCurrent(self) -> Any:
        return self._stack[-1] if self._stack else self._binding.CUcontext(0)

    def cuCtxGetDevice(self) -> int:
        return 0

    def cuCtxPushCurrent(self, context: Any) -> None:
        self._stack.append(context)

    def cuCtxPopCurrent(self) -> Any:
        return self._stack.pop() if self._stack else self._binding.CUcontext(0)

    def cuCtxSynchronize(self) -> None:
        self._emulator.complete_launches()

    def cuDevicePrimaryCtxRelease(self, device: int) -> None: ...

    def cuDevicePrimaryCtxReset(self, device: int) -> None: ...

    # Memory

    def cuMemAlloc(self, size: int) -> Any:
        _, total = self.cuMemGetInfo()
        if size > total:
            raise MemoryError(
                f"an array of {size / 2**30:,.1f} GiB does not fit into the {total / 2**30:,.0f} "
                "GiB of the emulated GPU"
            )
        return self._binding.CUdeviceptr(self._memory.allocate(size))

    def cuMemFree(self, address: Any) -> None:
        self._memory.free(int(address))

    def cuMemGetInfo(self) -> tuple[int, int]:
        total = MEMORY[self._emulator.capability]
        return total - self._memory.size, total

    def cuMemGetAddressRange(self, address: int) -> tuple[int, int]:
        return self._memory.extents(int(address))

    def cuMemHostAlloc(self, size: int, flags: int) -> int:
        return self._memory.allocate(size, is_given=True)

    def cuMemFreeHost(self, address: int) -> None:
        self._memory.free(int(address))

    def cuMemHostRegister(self, address: int, size: int, flags: int) -> None:
        if int(flags) & int(self._binding.CU_MEMHOSTREGISTER_DEVICEMAP):
            refuse("cuMemHostRegister")

    def cuMemHostUnregister(self, address: int) -> None: ...

    def cuMemHostGetDevicePointer(self, address: int, flags: int) -> Any:
        return self._binding.CUdeviceptr(int(address))

    def cuMemcpyHtoD(self, to: Any, source: Any, size: int, stream: object = 0) -> None:
        self._memory.to_device(int(to), int(source), size)

    def cuMemcpyDtoH(self, to: Any, source: Any, size: int, stream: object = 0) -> None:
        self._emulator.complete_launches()
        if unwritten := self._memory.to_host(int(to), int(source), size):
            place = program_line()
            message = f"{unwritten} are copied to the host, and nobody has written them"
            fault = HostFault("warning", "uninitialised memory", message, source=place)
            self._emulator.note(fault, ("copied", place))

    def cuMemcpyDtoD(self, to: Any, source: Any, size: int, stream: object = 0) -> None:
        self._memory.between(int(to), int(source), size)

    def cuMemsetD8(self, to: Any, value: int, size: int, stream: object = 0) -> None:
        self._memory.fill(int(to), value, size)

    cuMemcpyHtoDAsync, cuMemcpyDtoHAsync = cuMemcpyHtoD, cuMemcpyDtoH
    cuMemcpyDtoDAsync, cuMemsetD8Async = cuMemcpyDtoD, cuMemsetD8

    # Streams and events

    def cuStreamCreate(self, flags: int) -> Any:
        return self._binding.CUstream(next(self._numbers) << 8)

    def cuStreamDestroy(self, stream: object) -> None: ...

    def cuStreamSynchronize(self, stream: object) -> None:
        self._emulator.complete_launches()

    def cuStreamWaitEvent(self, stream: object, event: object, flags: int) -> None: ...

    def cuEventCreate(self, flags: int) -> Any:
        return self._binding.CUevent(next(self._numbers) << 8)

    def cuEventDestroy(self, event: object) -> None: ...

    def cuEventRecord(self, event: object, stream: object) -> None: ...

    def cuEventQuery(self, event: object) -> None: ...

    def cuEventSynchronize(self, event: object) -> None:
        self._emulator.complete_launches()

    def cuEventElapsedTime(self, start: object, end: object) -> float:
        return 1e-3  # as events of torch.cuda: a time of this CPU says nothing of a GPU's

    # Modules

    def cuLibraryUnload(self, module: object) -> None: ...

    def cuKernelSetCacheConfig(self, kernel: object, config: object, device: int) -> None: ...

    def cuKernelSetAttribute(self, *attribute: object) -> None: ...

    def cuProfilerStart(self) -> None: ...

    def cuProfilerStop(self) -> None: ...

    def by_name(self) -> dict[str, Any]:
        """Return the functions by their names."""
        return {name: getattr(self, name) for name in dir(self) if name.startswith("cu")}
