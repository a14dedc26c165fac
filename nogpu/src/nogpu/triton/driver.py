# SPDX-License-Identifier: MIT
"""A driver of Triton whose GPU is this CPU: launches on CPU tensors are compiled and executed.

    with nogpu.emulate("sm_90") as gpu:
        kernel[grid](x, y, n, BLOCK=1024)
    print(gpu.report())

Triton compiles a kernel as for the architecture, up to PTX, in a cache of its own. The executor
reads and writes the memory of the tensors themselves.
"""

import re
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from types import ModuleType
from typing import NamedTuple

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime._allocation import NullAllocator, _allocator
from triton.runtime.driver import driver as active_driver
from triton.runtime.errors import PTXASError

from nogpu.data_sheets import REGISTERS
from nogpu.record.faults import HostFault
from nogpu.record.launch import Launch
from nogpu.record.launch_size import MOST_OF_GRID, MOST_THREADS
from nogpu.record.resources import Resources, resources
from nogpu.record.source import program_line
from nogpu.report.assembly import refusals
from nogpu.triton import tuning
from nogpu.triton.assumptions import Assertions, assertions_of
from nogpu.triton.conditions import Conditions, conditions_of
from nogpu.triton.emulator import SHARED_BYTES, Emulator
from nogpu.triton.parameters import flatten
from nogpu.triton.stages import KernelSource, Metadata, Stages

LARGEST_GRID_X, LARGEST_GRID_YZ, _ = MOST_OF_GRID
THREADS = re.compile(r"^\s*\.(?:req|max)ntid\s+(\d+)", re.MULTILINE)  # that a kernel is made for
NO_GSAN = (
    "TRITON_INSTRUMENTATION_MODE is gsan, whose kernels need memory of a GPU; unset it: races "
    "between programs are found without it"
)


class Module(NamedTuple):
    """A compiled kernel."""

    text: str


class Asked(NamedTuple):
    """A number of a kernel for which ptxas is asked when somebody reads it, and not before.

    Attributes:
        text: the PTX.
        arch: such as "sm_90".
        find: a function that takes the number from what ptxas says.
    """

    text: str
    arch: str
    find: Callable[[Resources], int]

    def number(self) -> int:
        """Return the number.

        Raises:
            OSError: there is no ptxas.
            RuntimeError: ptxas refuses the text.
        """
        return self.find(resources(self.text, self.arch))


def _check_mode(metadata: Metadata) -> None:
    """Refuse the sanitizer of Triton whose kernels have another parameter."""
    if "gsan" in getattr(metadata, "instrumentation_mode", ""):
        raise NotImplementedError(NO_GSAN)


def _constants(source: KernelSource) -> dict[str, str]:
    """Return the arguments whose values a kernel was compiled for, as text."""
    found = {}
    for path, value in source.constants.items():
        name = source.fn.arg_names[path[0]] + "".join(f"[{i}]" for i in path[1:])
        found[name] = str(getattr(value, "__name__", value))
    return found


def _specialization(source: KernelSource, metadata: Metadata) -> dict[str, str]:
    """Return what else a kernel was compiled for: types, divisibility and options."""
    found = {}
    for position, (name, kind) in enumerate(source.signature.items()):
        if kind == "constexpr":
            continue
        attributes = dict(source.attrs.get((position,), ()))
        divisor = attributes.get("tt.divisibility")
        found[name] = f"{kind}, a multiple of {divisor}" if divisor else str(kind)
    options = ("num_stages", "maxnreg")
    values = {name: getattr(metadata, name, None) for name in options}
    return found | {name: str(value) for name, value in values.items() if value is not None}


def _check_grid(x: int, y: int, z: int) -> None:
    """Refuse what no GPU can launch."""
    if min(x, y, z) < 0:
        raise ValueError(
            f"the grid is {(x, y, z)}, expected no negative number; give the number of "
            "programs in each dimension"
        )
    if max(y, z) > LARGEST_GRID_YZ:
        raise ValueError(
            f"the grid is {(x, y, z)}, expected at most {LARGEST_GRID_YZ:,} programs in its "
            "second and third dimension; use the first one"
        )
    if x > LARGEST_GRID_X:
        raise ValueError(
            f"the grid is {(x, y, z)}, expected at most {LARGEST_GRID_X:,} programs in its "
            "first dimension; let a program take more elements"
        )


class Launcher:
    """What Triton calls for a launch."""

    def __init__(self, source: KernelSource, metadata: Metadata):
        self.source, self.metadata = source, metadata
        self.name: str = getattr(source.fn, "__name__", "kernel")
        code = getattr(getattr(source.fn, "fn", None), "__code__", None)
        self.file: str = code.co_filename if code else ""
        self.ctas = int(getattr(metadata, "num_ctas", 1))
        self.constants = _constants(source)
        self.specialization = _specialization(source, metadata)
        self._refused: str | None = None

    @cached_property
    def stages(self) -> Stages:
        return Stages(self.source, self.metadata)

    @cached_property
    def conditions(self) -> Conditions | None:
        return conditions_of(self.stages.text, self.source.fn.arg_names)

    @cached_property
    def assertions(self) -> Assertions | None:
        return assertions_of(self.stages, self.metadata)

    def _assertions_for(self, arguments: Sequence[object]) -> Assertions | None:
        """Return the assertions unless it is plain that none fails; a second compile makes them."""
        known = self.conditions
        if known is not None and (not known.assumed or known.hold(arguments)):
            return None
        return self.assertions

    def __call__(
        self,
        x: int,
        y: int,
        z: int,
        stream: int,
        module: Module,
        packed: object,
        launch_metadata: object,
        enter: Callable[[object], object] | None,
        leave: Callable[[object], object] | None,
        *arguments: object,
    ) -> None:
        emulator: Emulator = active_driver.active.emulator
        _check_mode(self.metadata)
        _check_grid(x, y, z)
        self._try(module, emulator.arch)
        call = tuning.called.get()
        if call and call.is_trial:
            return
        self._check_cooperative(emulator, module, (x, y, z))
        if enter is not None:
            enter(launch_metadata)
        execute = partial(self.execute, emulator, module, (x, y, z))
        if not x * y * z:
            emulator.empty.append(f"the grid of {self.name} is {(x, y, z)}, without a program")
        elif emulator.watcher is not None:
            emulator.watcher.launch(execute, arguments)
        else:
            execute(arguments)
        if leave is not None:
            leave(launch_metadata)

    def execute(
        self,
        emulator: Emulator,
        module: Module,
        grid: tuple[int, int, int],
        arguments: Sequence[object],
    ) -> None:
        """Execute a launch on the emulator, unless ptxas refuses the kernel; so do replays."""
        launch = self._launch(emulator, module, grid)
        if self._refused:  # a GPU could not launch it, either
            for fault in refusals(self._refused, launch.ptx, launch.kernel, self.file):
                fault.launched = launch.launched
                fault.configuration = tuning.configuration()
                emulator.note(fault, (fault.kernel, fault.name, fault.source, fault.message))
            return
        self._check_allocator(emulator, launch)
        parameters = partial(self._parameters, emulator, launch.programs * launch.ctas, arguments)
        emulator.run(launch, parameters, self.file, self._assertions_for(arguments))

    def _launch(self, emulator: Emulator, module: Module, grid: tuple[int, int, int]) -> Launch:
        """Return the record of a launch at the present line of the program."""
        metadata = self.metadata
        return Launch(
            self.name,
            emulator.arch,
            grid,
            metadata.num_warps,
            metadata.shared,
            ptx=module.text,
            launched=program_line(),
            ctas=self.ctas,
            is_dependent=bool(getattr(metadata, "launch_pdl", False)),
            constants=self.constants,
            specialization=self.specialization,
        )

    def _parameters(
        self, emulator: Emulator, programs: int, arguments: Sequence[object]
    ) -> list[int]:
        """Return the bits of the kernel's parameters, having placed the tensors among them."""
        source, values = self.source, list[int]()
        maps = list(getattr(self.metadata, "tensordesc_meta", None) or []) or None
        kinds = source.signature.values()
        for name, kind, value in zip(source.fn.arg_names, kinds, arguments, strict=True):
            flatten(emulator, name, kind, value, maps, values)
        return values + self._scratch(emulator, programs)

    def _scratch(self, emulator: Emulator, programs: int) -> list[int]:
        """Return the addresses of memory that the compiler asks for; nobody has written it."""
        sizes = {
            "scratch memory": self.metadata.global_scratch_size * programs,
            "memory of profiles": self.metadata.profile_scratch_size * programs,
        }
        return [emulator.allocate(what, n).base if n else 0 for what, n in sizes.items()]

    def _try(self, module: Module, arch: str) -> None:
        """Ask ptxas, once, whether it refuses a kernel with inline assembly.

        Raises:
            PTXASError: it does, so that an autotuner takes another configuration.
        """
        if self._refused is None:
            self._refused = self.stages.refused(module.text, arch)
        call = tuning.called.get()
        if self._refused and call and call.is_trial:
            raise PTXASError(self._refused)

    def _check_cooperative(
        self, emulator: Emulator, module: Module, grid: tuple[int, int, int]
    ) -> None:
        """Refuse a cooperative launch whose blocks are not all resident at once, as CUDA does."""
        if not getattr(self.metadata, "launch_cooperative_grid", False):
            return
        launch, multiprocessors = self._launch(emulator, module, grid), emulator.multiprocessors
        blocks, most = launch.programs * launch.ctas, launch.most_resident(multiprocessors)
        most -= most % launch.ctas
        if blocks > most:
            what = "CTAs" if launch.ctas > 1 else "programs"
            raise RuntimeError(
                f"Triton Error [CUDA]: too many blocks in cooperative launch: {launch.kernel} has "
                f"{blocks:,} {what}, and the {multiprocessors} multiprocessors hold {most:,} at "
                "once; launch no more, and let each one take more elements"
            )

    def _check_allocator(self, emulator: Emulator, launch: Launch) -> None:
        """Note that nobody has given Triton an allocator, which this kernel's scratch memory needs.

        Descriptors that are made on the device lie there. Here the memory is the emulator's own.
        """
        if self.metadata.global_scratch_size and isinstance(_allocator.get(), NullAllocator):
            message = (
                f"for {launch.kernel} Triton would raise: Kernel requires a runtime memory "
                "allocation, but no allocator was set; call triton.set_allocator in this thread"
            )
            fault = HostFault("error", "no allocator", message, source=launch.launched)
            emulator.note(fault, (fault.name, launch.kernel, fault.source))


class Entered(NamedTuple):
    """An emulator in whose block a thread is."""

    thread: int
    emulator: Emulator


emulations: list[Entered] = []  # in their order
patches = ExitStack()  # what they change of Triton
lock = threading.Lock()


def present() -> Emulator:
    """Return the emulator in whose block this thread is, or that was entered last."""
    entered, me = list(emulations), threading.get_ident()
    mine = [one for one in entered if one.thread == me]
    return (mine or entered)[-1].emulator


def how_far() -> str:
    """Return the number of launches until now, and how far the present one is; any thread may ask.

    Those of an inner emulator count, too.
    """
    entered = [one.emulator for one in list(emulations)]
    count = sum(len(one.launches) + one.inner_launches for one in entered)
    present_launches = [text for one in reversed(entered) if (text := one.present_launch())]
    return ", and ".join(
        [f"{count:,} launch{'' if count == 1 else 'es'} executed", *present_launches[:1]]
    )


class Utils:
    """What Triton asks a driver for."""

    @property
    def emulator(self) -> Emulator:
        return present()

    def load_binary(
        self, name: str, kernel: bytes, shared: int, device: int
    ) -> tuple[int, Module, Asked, Asked, int]:
        """Return a module, a function, and what CUDA says of it.

        That are a thread's registers, the words of 4 bytes of its stack, and the most threads.
        """
        text, arch = kernel.decode(), self.emulator.arch
        threads = THREADS.search(text)
        return (
            1,
            Module(text),
            Asked(text, arch, lambda used: used.registers),
            Asked(text, arch, lambda used: used.stack_bytes // 4),
            min(int(threads[1]), MOST_THREADS) if threads else MOST_THREADS,
        )

    def unload_module(self, module: int) -> None: ...

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": SHARED_BYTES[self.emulator.capability],
            "multiprocessor_count": self.emulator.multiprocessors,
            "warpSize": 32,
            "max_num_regs": REGISTERS,
            "sm_clock_rate": 1,
            "mem_clock_rate": 1,
            "mem_bus_width": 1,
        }

    def set_printf_fifo_size(self, size: int) -> None: ...


class Driver(DriverBase):  # type: ignore[misc]  # Triton has no types
    """A driver of Triton whose device is this CPU, acting as a GPU."""

    launcher_cls = Launcher

    def __init__(self) -> None:
        self.utils = Utils()

    @property
    def emulator(self) -> Emulator:
        return present()

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.emulator.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> ModuleType:
        return torch.cpu

    @property
    def kind(self) -> int:
        """A number for each kind of GPU, and no other driver's: libraries keep kernels by it."""
        return 1000 * self.emulator.multiprocessors + self.emulator.capability

    def get_current_device(self) -> int:
        """The number of the device, which is 0 where the stand-in answers for `torch.cuda`."""
        return self.kind

    def set_current_device(self, device: int) -> None: ...

    def get_current_stream(self, device: int | None = None) -> int:
        return int(getattr(self.emulator.stream(), "cuda_stream", 0))

    def get_device_capability(self, device: int | None = None) -> tuple[int, int]:
        return divmod(self.emulator.capability, 10)

    def get_benchmarker(self) -> Callable[..., list[float]]:
        """An autotuner takes the first configuration."""
        return lambda call, quantiles=None, **options: [1.0] * len(quantiles or [1])

    def get_empty_cache_for_benchmark(self) -> None: ...

    def clear_cache(self, cache: object) -> None: ...
