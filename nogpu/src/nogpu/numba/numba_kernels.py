# SPDX-License-Identifier: MIT
"""Modules, kernels and launches of numba.cuda, in the place of those of ``cuda.core``."""

import ast
import ctypes
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, Protocol

from nogpu.data_sheets import REGISTERS
from nogpu.machine.parse import most_threads
from nogpu.numba.device_memory import DeviceArray, DeviceMemory
from nogpu.record.faults import HostFault
from nogpu.record.launch import Launch
from nogpu.record.launch_size import (
    MOST_THREADS,
    WITHOUT_ASKING,
    Shared,
    why_out_of_bounds,
    why_refused,
)
from nogpu.record.resources import Resources, resources
from nogpu.record.source import program_line
from nogpu.triton.driver import present

STATIC_SHARED = re.compile(
    r"^\s*(?:\.\w+\s+)*\.shared\s+\.align\s+\d+\s+\.b8\s+\S+\[(\d+)\];", re.M
)
SHARED_ARRAY = re.compile(r"\b_cudapy_smem_(\d+)\b")
CONSTANT = re.compile(r"\.const\s+\.align\s+\d+\s+\.b8\s+\S+\[(\d+)\]")

# NVVM may be newer than the ptxas that comes with Triton, and uses nothing that is new.
VERSION = re.compile(r"\.version \d+\.\d+")
OLDEST = {"sm_80": "8.0", "sm_90": "8.0", "sm_100": "8.6"}


class Dispatched(Protocol):
    """A kernel of numba-cuda that has been compiled for the types of its arguments."""

    argument_types: Sequence[Any]
    py_func: Any


LAUNCHED: ContextVar[Dispatched | None] = ContextVar("launched", default=None)


class LaunchError(ValueError):
    """A launch that no GPU accepts."""


def refused(message: str) -> NotImplementedError:
    """Return the error for something that is not executed here, which the report names, too."""
    place = program_line()
    fault = HostFault("error", "not executed", message, source=place)
    present().note(fault, (message, place))
    return NotImplementedError(message)


class Attributes:
    """What CUDA says of a kernel: ptxas is asked for registers where somebody asks for them."""

    def __init__(self, text: str, arch: str):
        self.text, self.arch = text, arch

    @cached_property
    def used(self) -> Resources:
        return resources(self.text, self.arch)

    @property
    def num_regs(self) -> int:
        return self.used.registers

    @property
    def local_size_bytes(self) -> int:
        return self.used.stack_bytes

    @property
    def const_size_bytes(self) -> int:
        return sum(map(int, CONSTANT.findall(self.text)))

    @property
    def shared_size_bytes(self) -> int:
        return sum(map(int, STATIC_SHARED.findall(self.text)))

    @property
    def max_threads_per_block(self) -> int:
        of_warp = -(-self.used.registers * 32 // 256) * 256
        return min(MOST_THREADS, 32 * (REGISTERS // max(of_warp, 1)))


class Kernel:
    """A kernel of a module."""

    def __init__(self, module: "ModuleImage", name: str):
        self.handle, self.name, self.text = module.handle, name, module.text
        self.attributes = Attributes(module.text, present().arch)


class ModuleImage:
    """A compiled module, in the place of a cubin.

    Attributes:
        handle: a number that no other module has.
    """

    _count = 0

    def __init__(self, text: str):
        ModuleImage._count += 1
        version = OLDEST[present().arch]
        self.handle, self.text = ModuleImage._count, VERSION.sub(f".version {version}", text)

    def get_kernel(self, name: str) -> Kernel:
        return Kernel(self, name)


class Linker:
    """The linker of numba-cuda, which takes the PTX of one module."""

    lto = False
    info_log = error_log = ""

    def __init__(self, *args: object, **kwargs: object):
        self._texts: list[str] = []

    def add_ptx(self, ptx: bytes, name: str = "") -> None:
        self._texts.append(ptx.decode())

    def add_file_guess_ext(self, path_or_code: object, ignore_nonlto: bool = False) -> None:
        name = getattr(path_or_code, "name", path_or_code)
        if "cudadevrt" in str(name):
            raise refused(
                "the kernel's blocks wait for the whole grid (cooperative groups), which is not "
                "executed here; launch a second kernel instead"
            )
        raise refused(
            f"the kernel links CUDA C++ or a library ({name}), as link= and float16 do, and only "
            "Python is compiled here"
        )

    def complete(self) -> ModuleImage:
        text, *others = self._texts
        if others:
            raise refused("a kernel of several modules is not executed here")
        return ModuleImage(text)


class LaunchConfig(NamedTuple):
    """Grid, block and bytes of dynamic shared memory."""

    grid: tuple[int, ...]
    block: tuple[int, ...]
    shmem_size: int = 0
    is_cooperative: bool = False
    cooperative_launch: bool = False


def _three(sizes: int | Sequence[int]) -> tuple[int, int, int]:
    given = [sizes] if isinstance(sizes, int) else list(sizes)
    x, y, z = [*map(int, given), 1, 1, 1][:3]
    return x, y, z


def launch(
    memory: DeviceMemory, stream: object, config: LaunchConfig, kernel: Kernel, *arguments: object
) -> None:
    """Execute a launch on the present emulator.

    Raises:
        LaunchError: no GPU can launch it.
        NotImplementedError: a CUDA graph is captured.
    """
    emulator, dispatched = present(), LAUNCHED.get()
    if getattr(emulator.watcher, "is_capturing", False):
        raise refused("a launch of numba.cuda is not captured in a CUDA graph")
    function = getattr(dispatched, "py_func", None)
    name = getattr(function, "__name__", kernel.name)
    grid, block = _three(config.grid), _three(config.block)
    static, place = kernel.attributes.shared_size_bytes, program_line()
    # numba-cuda does not ask for more.
    shared = Shared(static, config.shmem_size, WITHOUT_ASKING, "numba.cuda")
    most = most_threads(kernel.text, kernel.name)
    fault = why_refused(name, grid, block, shared)
    if fault := fault or why_out_of_bounds(name, block, most, "launch_bounds"):
        emulator.note(HostFault("error", "launch failure", fault, source=place), (fault, place))
        raise LaunchError(fault)
    code = getattr(function, "__code__", None)
    text = kernel.text if function is None else with_names(kernel.text, function)
    x, y, z = block
    record = Launch(
        name,
        emulator.arch,
        grid,
        -(-x * y * z // 32),
        static + config.shmem_size,
        ptx=text,
        launched=place,
        entry=kernel.name,
        block=block,
        static_shared=static,
    )
    arrays = list(_arrays(dispatched, arguments))

    def parameters() -> list[int]:
        for parameter, array in arrays:
            memory.place(array, parameter)
        return [_bits(one) for one in arguments]

    emulator.run(record, parameters, code.co_filename if code else "")


@lru_cache(256)
def with_names(text: str, function: Callable[..., object]) -> str:
    """Return PTX in which arrays in shared memory have the names that a function gives them.

    Numba numbers them. Where the function assigns another number of arrays, as where it calls
    functions that have some, they keep their numbers.
    """
    numbers = sorted(set(SHARED_ARRAY.findall(text)), key=int)
    names = _shared_names(function)
    if len(numbers) != len(names):
        return text
    found = dict(zip(numbers, names, strict=True))
    # As a compiler of C++ writes them: others may be words of PTX.
    return SHARED_ARRAY.sub(lambda m: f"_ZN5numbaE{len(found[m[1]])}{found[m[1]]}", text)


def _shared_names(function: Callable[..., object]) -> list[str]:
    """Return the variables to which a function assigns arrays in shared memory, by their lines."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError, TypeError):  # typed into a console, for example
        return []
    found = [
        (one.lineno, one.targets[0].id)
        for one in ast.walk(tree)
        if isinstance(one, ast.Assign)
        and isinstance(one.targets[0], ast.Name)
        and isinstance(one.value, ast.Call)
        and ast.unparse(one.value.func).endswith("shared.array")
    ]
    return [name for _, name in sorted(found)]


def _bits(value: Any) -> int:
    """Return the bits of a parameter."""
    if isinstance(value, ctypes._SimpleCData):
        return int.from_bytes(bytes(value), "little")
    return int(value) % 2**64


def _arrays(
    dispatched: Dispatched | None, arguments: Sequence[object]
) -> Iterator[tuple[str, DeviceArray]]:
    """Yield the arrays among a kernel's parameters, each with the name of its argument."""
    if dispatched is None:
        return
    code = getattr(dispatched.py_func, "__code__", None)
    types = dispatched.argument_types
    names = code.co_varnames if code else [f"argument {n}" for n in range(len(types))]
    left = list(arguments)
    for name, kind in zip(names, types, strict=False):
        yield from _arrays_of(name, kind, left)


def _arrays_of(name: str, kind: Any, left: list[Any]) -> Iterator[tuple[str, DeviceArray]]:
    """Yield the arrays of an argument, and drop its parameters from those that are ``left``.

    numba-cuda gives an array as two objects of Python's that are null, its size, the bytes of an
    element, its address, its shape and its strides.
    """
    from numba.cuda import types as of_numba
    from numba.cuda.np.numpy_support import as_dtype

    types: Any = of_numba  # whose names are made when it is imported

    if isinstance(kind, types.Array):
        count = 5 + 2 * kind.ndim
        _, _, _, _, address, *layout = left[:count]
        del left[:count]
        yield (
            name,
            DeviceArray(
                int(address or 0), as_dtype(kind.dtype), layout[: kind.ndim], layout[kind.ndim :]
            ),
        )
    elif isinstance(kind, types.BaseTuple):
        for n, one in enumerate(kind):
            yield from _arrays_of(f"{name}[{n}]", one, left)
    elif isinstance(kind, types.Record):
        yield name, DeviceArray(int(left.pop(0)), as_dtype(kind), [1], [kind.size])
    else:
        del left[: 2 if isinstance(kind, types.Complex) else 1]
