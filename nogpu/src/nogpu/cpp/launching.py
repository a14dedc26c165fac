# SPDX-License-Identifier: MIT
"""Kernels of a file of CUDA C++, launched from Python on this CPU, or on a GPU.

kernels = nogpu.cuda.load("gemm.cu")
with nogpu.emulate("sm_90") as gpu:
    kernels["gemm"][grid, block](x, y, n)
"""

from __future__ import annotations

import hashlib
import linecache
import math
import numbers
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from nogpu.console import plural
from nogpu.cpp import on_gpu
from nogpu.cpp.declarations import (
    Declaration,
    Declared,
    Structure,
    declarations,
    itemsize,
    kind_of_number,
    own_types,
    parameters_of,
    shared_arrays,
    structures,
    variable_types,
)
from nogpu.cpp.nvrtc import compiled
from nogpu.machine.parse import (
    Kernel,
    Parameter,
    entries,
    parse,
    source_name,
    variable_sizes,
)
from nogpu.machine.registers import Values
from nogpu.record.faults import Fault
from nogpu.record.launch import Launch
from nogpu.record.launch_size import Shared, why_out_of_bounds, why_refused
from nogpu.record.source import program_line
from nogpu.triton.driver import emulations, present
from nogpu.triton.emulator import SHARED_BYTES, Emulator
from nogpu.triton.host_memory import bytes_at, has_host_memory

MALLOC_ALIGNMENT = 256  # bytes, of cudaMalloc's memory
FLOATS: dict[str, Any] = {"f32": np.float32, "f64": np.float64, "f16": np.float16}
DEFAULT_ARCH = "sm_90"
# Variables in PTX that no program can name: texts of printf and assert, and variables of functions
OF_COMPILER = re.compile(r"\$|^__unnamed_|^_ZZ")


class Module:
    """The kernels of a source, by their names.

    Args:
        source: CUDA C++.
        path: of its file, which messages name.
        options: further ones of NVRTC, such as "-DN=16".

    Raises:
        CompileError: NVRTC refuses the source.
    """

    def __init__(self, source: str, path: str, options: Sequence[str] = ()):
        self.source, self.path, self.options = source, path, tuple(options)
        self._variables: dict[str, dict[str, Tensor]] = {}
        self._loaded: dict[tuple[str, int], on_gpu.LoadedModule] = {}
        self._contents: dict[str, bytes] = {}  # of variables, by their names in PTX
        self.ptx(DEFAULT_ARCH)

    def ptx(self, arch: str, names: tuple[str, ...] = ()) -> str:
        """Return the module's PTX for an architecture."""
        return compiled(self.source, self.path, arch, names, self.options)[0]

    @cached_property
    def declared(self) -> dict[str, Declaration]:
        """The kernels as the source declares them, by name."""
        return {one.name: one for one in declarations(self.source)}

    @cached_property
    def types(self) -> dict[str, str]:
        """What the source's own names of types stand for, except for macros of the options."""
        given = {one[2:].partition("=")[0].strip() for one in self.options if one[:2] == "-D"}
        return {name: of for name, of in own_types(self.source).items() if name not in given}

    @property
    def names(self) -> list[str]:
        """The names of the kernels; those of templates without their arguments."""
        return list(self.declared)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __getitem__(self, name: str) -> CppKernel:
        base = re.split(r"[<(]", name)[0].split("::")[-1].strip()
        declared = self.declared.get(base)
        if declared is None:
            known = ", ".join(self.names) or "none"
            raise KeyError(f"{Path(self.path).name} has no kernel {name!r}; its kernels: {known}")
        if declared.template and "<" not in name:
            raise KeyError(
                f"{base} is a template; give its arguments <{declared.template}>, such as "
                f"kernels[{declared.instance!r}]"
            )
        return CppKernel(self, name, declared)

    def entry(self, name: str, arch: str) -> tuple[str, str]:
        """Return the PTX that has a kernel, and the kernel's name in it."""
        text = self.ptx(arch)
        found = [
            one
            for one in entries(text)
            if one == name or re.match(rf"_Z{len(name)}{re.escape(name)}(?!\w*::)", one)
        ]
        if len(found) == 1:
            return text, found[0]
        text, lowered = compiled(self.source, self.path, arch, (name,), self.options)
        return text, lowered[name]

    def loaded(self, text: str, device: int) -> on_gpu.LoadedModule:
        """Return a PTX of the module on a GPU."""
        if (text, device) not in self._loaded:
            self._loaded[text, device] = on_gpu.LoadedModule(text, device)
            for name, content in self._contents.items():
                self._loaded[text, device].write(name, content)
        return self._loaded[text, device]

    def constants(self, arch: str) -> dict[str, tuple[str, int]]:
        """Return the type in NumPy and the bytes of variables in constant memory, by name.

        Those with an initial value are omitted, and those whose elements are no numbers of NumPy.
        """
        found, text = {}, self.ptx(arch)
        unset = variable_sizes(text, "const")
        for name, one in _by_name(text).items():
            dtype = self._declared(name).dtype
            if one in unset and dtype and dtype != "bfloat16":
                found[name] = dtype, unset[one]
        return found

    def _declared(self, name: str) -> Declared:
        """Return a variable as the source has it; without a type if that isn't one of numbers."""
        return Declared(name, variable_types(self.source).get(name.split("::")[-1], ""))

    def copy_to(self, name: str, value: Any) -> None:
        """Copy an array or a number to a variable of the source, as cudaMemcpyToSymbol does.

        Args:
            name: of a variable with __constant__ or __device__; one of a namespace is named as
                "space::name".
            value: an array or tensor of the variable's dtype, or a number; at most its bytes,
                from its beginning on. A structure may be its bytes, or a record of NumPy.

        Raises:
            KeyError: the source has no such variable, or no kernel uses it.
            TypeError: the variable has another type, or a number does not fit.
            ValueError: the variable has fewer bytes.
        """
        text = self.ptx(DEFAULT_ARCH)
        known = _by_name(text)
        if name not in known:
            raise KeyError(
                f"{Path(self.path).name} has no variable {name!r} that its kernels use; its "
                f"variables: {', '.join(known) or 'none'}"
            )
        size = variable_sizes(text)[known[name]]
        content = _content(self._declared(name), value)
        if len(content) > size:
            raise ValueError(f"{name} has {plural(size, 'byte')}, and got {len(content):,}")
        before = self._contents.get(known[name], b"")
        self._contents[known[name]] = content + before[len(content) :]
        for held in self._variables.values():
            if known[name] in held:
                _write(held[known[name]], content)
        for loaded in self._loaded.values():
            loaded.write(known[name], content)

    def shared_types(self, kernel: Kernel) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Return the bytes of an element, and the sizes, of a kernel's arrays in shared memory."""
        sizes = tuple((source_name(name), size) for name, (_, size) in kernel.shared.items())
        return shared_arrays(self.source, sizes)

    def variables(self, kernel: Kernel) -> dict[str, Tensor]:
        """Return the module's variables in global memory, which launches share."""
        held = self._variables.setdefault(kernel.text, {})
        for name, content in kernel.constants.items():
            if name not in held:
                held[name] = torch.frombuffer(bytearray(content or b"\0"), dtype=torch.uint8)
                _write(held[name], self._contents.get(name, b""))
        return held


def _write(variable: Tensor, content: bytes) -> None:
    """Copy bytes to the beginning of a variable's memory."""
    variable.numpy()[: len(content)] = np.frombuffer(content, np.uint8)


def _by_name(text: str) -> dict[str, str]:
    """Return the names in PTX of a module's variables, by those that a program can name."""
    names = {source_name(one): one for one in variable_sizes(text) if not OF_COMPILER.search(one)}
    return {name: one for name, one in names.items() if not name.startswith("_Z")}


def _content(variable: Declared, value: Any) -> bytes:
    """Return an array, or a number, as bytes of a variable.

    Raises:
        TypeError: it is of another type.
    """
    name, dtype = variable.name, variable.dtype
    if isinstance(value, bytes):
        return value
    if dtype and isinstance(value, (np.generic, np.ndarray, Tensor)) and not value.ndim:
        with _disable_current_modes():
            value = value.item()
    if dtype and isinstance(value, numbers.Real):
        parameter = Parameter(name, kind_of_number(dtype), itemsize(dtype))
        return _number(name, parameter, variable, value).to_bytes(parameter.size, "little")
    if isinstance(value, Tensor):
        with _disable_current_modes():
            raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        got = str(value.dtype).removeprefix("torch.")
    elif isinstance(value, (np.ndarray, np.generic)) and not value.dtype.hasobject:
        raw, got = np.asarray(value), str(value.dtype)
    elif dtype:
        raise TypeError(f"{name} is of {dtype}, and got {_kind(value)}; pass an array of {dtype}")
    else:
        raise TypeError(
            f"{name} is of a type that nogpu does not know, and got {_kind(value)}; pass its "
            "bytes, or a record of NumPy"
        )
    if not _is_same(dtype, got):
        raise TypeError(f"{name} is of {dtype}, and got {_kind(value)}")
    return bytes(raw.tobytes())


class Size(NamedTuple):
    """The grid and the block of a launch, and the bytes of dynamic shared memory."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int


class CppKernel:
    """A kernel: ``kernel[grid, block, shared_bytes](*arguments)``.

    ``grid`` and ``block`` are an integer or up to three; ``shared_bytes`` are 0 by default.
    """

    def __init__(self, module: Module, name: str, declared: Declaration):
        self.module, self.name, self.declared = module, name, declared

    def __getitem__(self, size: Any) -> BoundKernel:
        is_right = isinstance(size, tuple) and len(size) in (2, 3)
        if not is_right or not isinstance((*size, 0, 0, 0)[2], numbers.Integral):
            raise TypeError(
                f"{self.name}[{size!r}]: expected [grid, block] or [grid, block, bytes]"
            )
        grid, block = (
            _three(one, what) for one, what in zip(size, ("grid", "block"), strict=False)
        )
        return BoundKernel(self, Size(grid, block, int(size[2]) if len(size) > 2 else 0))

    def __call__(self, *arguments: object) -> None:
        raise TypeError(f"say how to launch {self.name}: kernels[{self.name!r}][grid, block](…)")


def _three(given: Any, what: str) -> tuple[int, int, int]:
    sizes = tuple(given) if isinstance(given, (tuple, list)) else (given,)
    is_right = 1 <= len(sizes) <= 3
    if not is_right or not all(isinstance(n, numbers.Integral) for n in sizes):
        raise TypeError(f"the {what} is {given!r}, expected an integer or up to three")
    x, y, z = (*(int(n) for n in sizes), 1, 1, 1)[:3]
    return x, y, z


@lru_cache(64)
def _parsed(text: str, entry: str, block: tuple[int, int, int]) -> Kernel:
    return parse(text, entry, block)


class BoundKernel:
    """A kernel with the size of its launch."""

    def __init__(self, kernel: CppKernel, size: Size):
        self.kernel, self.size = kernel, size

    def __call__(self, *arguments: Any) -> None:
        """Execute the launch, or where nothing is emulated launch it on the GPU.

        Raises:
            RuntimeError: nothing is emulated, and there is no GPU.
            TypeError: an argument has another type than its parameter, or their number differs.
            ValueError: a GPU cannot launch that size.
            NotImplementedError: the kernel has clusters, and the launch is emulated.
        """
        if emulations:
            self._execute(present(), arguments)
        elif torch.cuda.is_available():
            self._launch(arguments)
        else:
            raise RuntimeError(
                f"{self.kernel.name} is executed within nogpu.emulate(), or by python -m nogpu "
                "SCRIPT; no emulator is there, and no GPU"
            )

    def _execute(self, emulator: Emulator, arguments: Sequence[Any]) -> None:
        module = self.kernel.module
        text, entry = module.entry(self.kernel.name, emulator.arch)
        kernel = _parsed(text, entry, self.size.block)
        if (count := math.prod(kernel.cluster)) > 1:
            raise NotImplementedError(
                f"{self.kernel.name} runs in clusters of {count} blocks (__cluster_dims__), which "
                "nogpu does not execute in CUDA C++; launch it without clusters, or on a GPU"
            )
        launch_kernel(
            emulator,
            PtxKernel(
                self.kernel.name,
                text,
                entry,
                kernel,
                module.variables(kernel),
                module.shared_types(kernel),
            ),
            self.size,
            self._converted(kernel, arguments, "cpu"),
        )

    def _launch(self, arguments: Sequence[Any]) -> None:
        """Launch on the GPU of the first tensor, on its present stream; it isn't waited for."""
        tensors = [one for one in _flat(arguments) if isinstance(one, Tensor) and one.is_cuda]
        index = tensors[0].device.index if tensors else torch.cuda.current_device()
        major, minor = torch.cuda.get_device_capability(index)
        text, entry = self.kernel.module.entry(self.kernel.name, f"sm_{major}{minor}")
        kernel = _parsed(text, entry, self.size.block)
        most = SHARED_BYTES.get(10 * major + minor, 2**31)  # of others the driver knows
        check_size(self.kernel.name, kernel, self.size, most, f"sm_{major}{minor}")
        given = self._converted(kernel, arguments, f"cuda:{index}")
        bits = [
            one.value.data_ptr() if isinstance(one.value, Tensor) else one.value for one in given
        ]
        parameters = packed(kernel, given, bits)
        self.kernel.module.loaded(text, index).launch(
            entry,
            *self.size,
            [
                n.to_bytes(one.size, "little")
                for n, one in zip(parameters, kernel.signature, strict=True)
            ],
            torch.cuda.current_stream(index).cuda_stream,
        )

    def _converted(self, kernel: Kernel, arguments: Sequence[Any], device: str) -> list[Argument]:
        module, declared = self.kernel.module, self.kernel.declared
        return convert(
            self.kernel.name,
            kernel.signature,
            parameters_of(declared, self.kernel.name, module.types),
            structures(module.source),
            arguments,
            device,
        )


def _flat(arguments: Sequence[Any]) -> Iterator[Any]:
    """Yield arguments, and in their places the fields of structures."""
    for one in arguments:
        yield from one if isinstance(one, tuple) else (one,)


class PtxKernel(NamedTuple):
    """A kernel that a compiler of threads has made.

    Attributes:
        name: for messages.
        text: the module's PTX.
        entry: the kernel's name in it.
        parsed: for the launch's block.
        variables: the memory of the module's variables, by their names in PTX.
        shared_types: of arrays in shared memory the bytes of an element, and the sizes.
    """

    name: str
    text: str
    entry: str
    parsed: Kernel
    variables: dict[str, Tensor]
    shared_types: Mapping[str, tuple[int, tuple[int, ...]]] = MappingProxyType({})


class Argument(NamedTuple):
    """A number or an array that a kernel is given, as a parameter or within one.

    Attributes:
        name: for messages.
        value: a number's bits, or an array, whose address is passed.
        parameter: the number of the parameter.
        offset: in bytes, of a field of a structure.
        owner: of an array's memory, if that is NumPy's.
    """

    name: str
    value: int | Tensor
    parameter: int
    offset: int = 0
    owner: np.ndarray[Any, Any] | None = None


def check_size(name: str, kernel: Kernel, size: Size, most: int, giver: str) -> int:
    """Return the bytes of shared memory that a kernel's own variables take.

    Args:
        most: bytes of shared memory that a block may have.
        giver: who gives no more, such as "sm_90".

    Raises:
        ValueError: a GPU cannot launch that size.
    """
    static = sum(size for _, size in kernel.shared.values())
    shared = Shared(static, size.shared, most, giver)
    if fault := why_refused(name, size.grid, size.block, shared):
        raise ValueError(fault)
    if kernel.required_block not in (None, size.block):
        raise ValueError(
            f"the block of {name} is {size.block}, and __block_size__ says "
            f"{kernel.required_block}; launch blocks of that size"
        )
    if fault := why_out_of_bounds(name, size.block, kernel.most_threads, "__launch_bounds__"):
        raise ValueError(fault)
    return static


def packed(kernel: Kernel, arguments: Sequence[Argument], bits: Sequence[int]) -> list[int]:
    """Return the bits of a kernel's parameters, of which structures have several arguments."""
    parameters = [0] * len(kernel.signature)
    for one, value in zip(arguments, bits, strict=True):
        parameters[one.parameter] |= int(value) << 8 * one.offset
    return parameters


def launch_kernel(
    emulator: Emulator, kernel: PtxKernel, size: Size, arguments: Sequence[Argument]
) -> None:
    """Execute a launch of a kernel whose block has the size of the launch.

    Raises:
        ValueError: a GPU cannot launch that size.
    """
    most = SHARED_BYTES[emulator.capability]
    static = check_size(kernel.name, kernel.parsed, size, most, emulator.arch)
    launch = Launch(
        kernel.name,
        emulator.arch,
        size.grid,
        kernel.parsed.threads // 32,
        static + size.shared,
        ptx=kernel.text,
        launched=program_line(),
        entry=kernel.entry,
        block=size.block,
        static_shared=static,
    )

    # A graph keeps `execute`, and must not keep the arrays.
    places = [
        one._replace(value=0, owner=None) if isinstance(one.value, Tensor) else one
        for one in arguments
    ]

    def execute(values: Sequence[object]) -> None:
        def parameters() -> list[int]:
            emulator.variables = {
                name: _placed(emulator, source_name(name), one)
                for name, one in kernel.variables.items()
            }
            emulator.shared_types = kernel.shared_types
            bits = [
                _placed(emulator, one.name, value) if isinstance(value, Tensor) else one.value
                for one, value in zip(places, values, strict=True)
            ]
            return packed(kernel.parsed, places, bits)  # type: ignore[arg-type]  # no tensors

        before = len(emulator.faults)
        try:
            emulator.run(launch, parameters, "")
        finally:
            emulator.variables, emulator.shared_types = {}, {}
            emulator.faults[before:] = condensed(emulator.faults[before:])

    given = [one.value for one in arguments]
    if emulator.watcher is None:
        with _aligned(arguments) as values:
            execute(values)
        return
    try:  # it refuses arrays of the host
        emulator.watcher.launch(execute, given)
    except ValueError as e:
        if (found := re.search(r"Pointer argument \(at (\d+)\)", str(e))) is None:
            raise
        name = arguments[int(found[1])].name
        raise ValueError(
            f"{name} of {kernel.name} is an array of the host, and the kernel runs on the device; "
            "pass a tensor on cuda, such as torch.as_tensor(array).cuda()"
        ) from None


ACCESSED = re.compile(r"(?:reads|overwrites) (?:byte \d+ of )?(\w+(?:::\w+)*)")
AT = re.compile(r"\(([^()]+:\d+)\)")
BY_RACES = ("race within a warp", "uninitialised memory")  # what a missing barrier also shows as


def condensed(faults: Sequence[Fault]) -> list[Fault]:
    """Return the faults of a launch, one for each pair of lines between which a barrier is missing.

    Such a barrier also lets threads of one warp race, and threads read what nobody has written yet.
    """
    kept, pairs = [], set()
    raced = {_array_of(one) for one in faults if one.name == "race"} - {""}
    for one in faults:
        if one.name in BY_RACES and _array_of(one) in raced:
            continue
        if one.name == "race" and one.source is not None:
            here = f"{Path(one.source[0]).name}:{one.source[1]}"
            pair = _array_of(one), frozenset({here, *AT.findall(one.message)})
            if pair in pairs:
                continue
            pairs.add(pair)
        kept.append(one)
    return kept


def _array_of(fault: Fault) -> str:
    """Return the array that a fault's message names; "" if there is none."""
    found = ACCESSED.search(fault.message)
    return found[1] if found else ""


def _placed(emulator: Emulator, name: str, t: Tensor) -> int:
    if t.untyped_storage().nbytes():
        emulator.host_memory.place(t, name)
    return int(t.data_ptr()) % 2**64


@contextmanager
def _aligned(arguments: Sequence[Argument]) -> Iterator[list[int | Tensor]]:
    """Let the memory of NumPy's arrays begin as cudaMalloc's does, in copies that are copied back.

    Where malloc has placed it, the loads of a warp could take a sector more than on a GPU. Arrays
    that share memory share the copy.
    """
    copies: dict[int, tuple[Values, Values]] = {}
    found: list[int | Tensor] = []
    for one in arguments:
        owner, t = one.owner, one.value
        if owner is None or not isinstance(t, Tensor) or owner.ctypes.data % MALLOC_ALIGNMENT == 0:
            found.append(t)
            continue
        start, nbytes = owner.ctypes.data, owner.nbytes
        if start not in copies:
            memory = np.empty(nbytes + MALLOC_ALIGNMENT, np.uint8)
            copy = memory[-memory.ctypes.data % MALLOC_ALIGNMENT :][:nbytes]
            whole = bytes_at(start, nbytes)
            copy[:] = whole
            copies[start] = copy, whole
        part = copies[start][0][t.data_ptr() - start :][: t.nbytes]
        with _disable_current_modes():
            found.append(torch.from_numpy(part).view(t.dtype).view(t.shape))
    try:
        yield found
    finally:
        for copy, whole in copies.values():
            whole[:] = copy


# Arguments


def convert(
    kernel: str,
    signature: Sequence[Parameter],
    declared: Sequence[Declared],
    structures: Mapping[str, Structure],
    arguments: Sequence[Any],
    device: str,
) -> list[Argument]:
    """Return arguments as a kernel's parameters.

    Args:
        declared: the parameters as the source has them; fewer or none if they are not known.
        structures: of the source, by their names.
        device: of arrays; "cpu" also takes NumPy's.

    Raises:
        TypeError: the number of arguments, or the type of one, is not that of the parameters.
    """
    known = list(declared) if len(declared) == len(signature) else []
    names = [(known[n].name if known else "") or f"argument {n + 1}" for n in range(len(signature))]
    if len(arguments) != len(signature):
        raise TypeError(
            f"{kernel} takes {plural(len(signature), 'argument')} ({', '.join(names)}), and got "
            f"{len(arguments)}"
        )
    found: list[Argument] = []
    for n, (parameter, value) in enumerate(zip(signature, arguments, strict=True)):
        one = known[n] if known else None
        fields = structures.get(one.type.split("::")[-1]) if one is not None else None
        if fields is not None and isinstance(value, tuple):
            found += _fields(kernel, names[n], n, parameter, fields, value, device)
        else:
            found.append(_converted(kernel, names[n], n, parameter, one, value, device))
    return found


def _fields(
    kernel: str,
    name: str,
    number: int,
    parameter: Parameter,
    fields: Structure,
    values: tuple[Any, ...],
    device: str,
) -> list[Argument]:
    """Return the fields of a structure, which are given as a tuple."""
    names = ", ".join(one.declared.name for one in fields)
    if len(values) != len(fields):
        raise TypeError(
            f"{name} of {kernel} has the fields {names}; expected a tuple of {len(fields)}, and "
            f"got {len(values)}"
        )
    if fields.size != parameter.size:
        raise TypeError(
            f"{name} of {kernel} is a structure of {parameter.size} bytes, and its fields {names} "
            f"take {fields.size}; pass its bytes"
        )
    found = []
    for field, value in zip(fields, values, strict=True):
        inner = Parameter(parameter.name, field.kind, field.size)
        one = _converted(
            kernel, f"{name}.{field.declared.name}", number, inner, field.declared, value, device
        )
        found.append(one._replace(offset=field.offset))
    return found


def _converted(
    kernel: str,
    name: str,
    number: int,
    parameter: Parameter,
    declared: Declared | None,
    value: Any,
    device: str,
) -> Argument:
    what = f"{name} of {kernel}"
    if isinstance(value, np.ndarray) and not value.ndim and value.dtype.fields:
        value = value[()]  # a structure
    if isinstance(value, (np.ndarray, Tensor)) and (value.ndim or declared_pointer(declared)):
        t = _array(what, parameter, declared, value, device)
        return Argument(name, t, number, owner=_owner(value))
    return Argument(name, _bits(what, parameter, declared, value), number)


def _owner(value: np.ndarray[Any, Any] | Tensor) -> np.ndarray[Any, Any] | None:
    """Return the array that has an array's memory; None if that is not one of NumPy's."""
    while isinstance(value, np.ndarray) and value.base is not None:
        value = value.base
    return value if isinstance(value, np.ndarray) else None


def _bits(what: str, parameter: Parameter, declared: Declared | None, value: Any) -> int:
    if value is None and parameter.size == 8:
        return 0
    if isinstance(value, (bytes, np.void)):
        raw = bytes(value) if isinstance(value, bytes) else value.tobytes()
        if len(raw) != parameter.size:
            raise TypeError(f"{what} has {parameter.size} bytes, and got {len(raw)}")
        return int.from_bytes(raw, "little")
    if declared_pointer(declared):
        raise TypeError(f"{what} is {declared.type}, and got {_kind(value)}; pass an array")  # type: ignore[union-attr]
    value = value.item() if isinstance(value, (np.generic, np.ndarray, Tensor)) else value
    return _number(what, parameter, declared, value)


def declared_pointer(declared: Declared | None) -> bool:
    return declared is not None and declared.is_pointer


def _kind(value: object) -> str:
    if isinstance(value, (np.ndarray, Tensor)):
        return f"an array of {str(value.dtype).removeprefix('torch.')}"
    return f"{value!r}" if isinstance(value, (int, float, bool)) else type(value).__name__


def _array(
    what: str,
    parameter: Parameter,
    declared: Declared | None,
    value: np.ndarray[Any, Any] | Tensor,
    device: str,
) -> Tensor:
    if parameter.size != 8 or (declared is not None and not declared.is_pointer and declared.dtype):
        kind = declared.type if declared is not None else parameter.kind
        raise TypeError(f"{what} is {kind}, and got {_kind(value)}; pass a number")
    if isinstance(value, Tensor):
        if not has_host_memory(value) if device == "cpu" else str(value.device) != device:
            raise TypeError(f"{what} is on {value.device}, expected a tensor on {device}")
        t = value
    elif device != "cpu":
        raise TypeError(
            f"{what} is an array of the host, and the kernel runs on the device; pass a tensor on "
            "cuda, such as torch.as_tensor(array).cuda()"
        )
    else:
        if not value.flags.writeable or any(n < 0 for n in value.strides):
            raise TypeError(f"{what} is a NumPy array that cannot be shared; pass its copy()")
        # An emulator's mode would make PyTorch import its compiler, for seconds, and see nothing.
        has_watcher = bool(emulations) and present().watcher is not None
        with nullcontext() if has_watcher else _disable_current_modes():
            t = torch.from_numpy(value)
    if not t.is_contiguous():
        raise TypeError(
            f"{what} is not contiguous, such as a transpose, and a kernel sees its memory alone; "
            "pass a contiguous copy"
        )
    expected, got = declared.dtype if declared else "", str(t.dtype).removeprefix("torch.")
    is_of_pointers = declared is not None and declared.type.endswith("**")
    if not is_of_pointers and not _is_same(expected, got):
        raise TypeError(
            f"{what} is {declared.type if declared else ''}, and got an array of {got}; expected "
            f"{expected}"
        )
    return t


def _is_same(expected: str, got: str) -> bool:
    """Return whether an array of ``got`` is one of ``expected``, which is "" if it is not known.

    Integers may have a sign or not, as in C++.
    """
    is_same = expected in ("", got) or (
        expected[:1] in "ui" and expected.lstrip("u") == got.lstrip("u")
    )
    return is_same or {expected, got} <= {"int8", "uint8", "bool"}


def _number(what: str, parameter: Parameter, declared: Declared | None, value: Any) -> int:
    kind = parameter.kind
    shown = declared.type if declared is not None and declared.type else kind
    if kind in FLOATS:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{what} is {shown}, and got {_kind(value)}; pass a number")
        with np.errstate(over="ignore"):
            raw = bytes(FLOATS[kind](value).tobytes())
        return int.from_bytes(raw, "little")
    if kind == "b8" or parameter.size not in (1, 2, 4, 8):
        return _structure(what, parameter, declared, value)
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):
        raise TypeError(f"{what} is {shown}, and got {_kind(value)}; pass an integer")
    if not isinstance(value, numbers.Integral):
        raise TypeError(f"{what} is {shown}, and got {_kind(value)}")
    bits, number = 8 * parameter.size, int(value)
    if declared is not None and declared.dtype == "bool":
        return int(number != 0)
    if not -(2 ** (bits - 1)) <= number < 2**bits:
        raise TypeError(f"{what} is {shown}, and {number} does not fit into {bits} bits")
    return int(number % 2**bits)


def _structure(what: str, parameter: Parameter, declared: Declared | None, value: Any) -> int:
    """Return the bits of a half, which PTX takes for a structure of two bytes."""
    dtype = declared.dtype if declared is not None else ""
    if dtype in ("float16", "bfloat16") and isinstance(value, numbers.Real):
        one = torch.tensor(float(value), dtype=getattr(torch, dtype)).view(torch.int16)
        return int(one) % 2**16
    expected = "a tuple of its fields, or its bytes"
    if isinstance(value, tuple):  # see nogpu.cpp.declarations.structures
        expected = "its bytes, or a record of NumPy; fields are known if they are numbers, pointers"
    raise TypeError(
        f"{what} is a structure of {parameter.size} bytes, and got {_kind(value)}; pass {expected}"
    )


def compile_source(source: str, path: str = "", options: Sequence[str] = ()) -> Module:
    """Return the kernels of CUDA C++; ``path`` is the file that messages name."""
    if not path:
        digest = hashlib.sha256(source.encode()).hexdigest()
        path = str(Path.cwd() / f"cuda_source_{digest[:6]}.cu")  # as the PTX has it
        lines = source.splitlines(keepends=True)
        linecache.cache[path] = len(source), None, lines, path
    return Module(source, path, options)
