# SPDX-License-Identifier: MIT
"""A driver of Triton whose GPU is this CPU: launches on CPU tensors are compiled and executed.

    with torchpar.ptx.emulate("sm_90") as gpu:
        kernel[grid](x, y, n, BLOCK=1024)
    print(gpu.report())

Triton compiles a kernel as for the architecture, up to PTX, in a cache of its own. The executor
reads and writes the memory of the tensors themselves.
"""

import ctypes
import gc
import os
import re
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import fields
from functools import cached_property, lru_cache
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from unittest.mock import patch
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import CompiledKernel
from triton.runtime._allocation import NullAllocator, _allocator
from triton.runtime.driver import driver as active_driver
from triton.runtime.errors import PTXASError

from torchpar.kernels.data_sheets import DATA_SHEETS, PROGRAMS, REGISTERS, RESERVED, WARPS
from torchpar.ptx.instructions.tma import STRIDES_END, TF32
from torchpar.ptx.machine import gpu
from torchpar.ptx.machine.block import SCHEDULES, Schedule
from torchpar.ptx.machine.memory import (
    GIVEN,
    LARGEST_UNIT,
    UNWRITTEN,
    Allocation,
    Space,
    free_memory,
)
from torchpar.ptx.machine.pages import ALIGNED, Unwritten, page_count, zeros
from torchpar.ptx.machine.parse import Kernel, PtxError, own_error
from torchpar.ptx.machine.protocols import Warp
from torchpar.ptx.machine.sample import LEAST
from torchpar.ptx.machine.trace import Trace
from torchpar.ptx.native.cache import cache_folder, writable
from torchpar.ptx.native.encoding import FIELDS
from torchpar.ptx.native.layout import PAGE
from torchpar.ptx.report.assembly import refusals
from torchpar.ptx.report.faults import Fault, HostFault, Kind
from torchpar.ptx.report.launch import CapturedGraph, Launch
from torchpar.ptx.report.limits import Limits
from torchpar.ptx.report.report import Report
from torchpar.ptx.report.source import moved, program_line
from torchpar.ptx.triton import autotuner
from torchpar.ptx.triton.assumptions import Assertions, assertions_of
from torchpar.ptx.triton.conditions import Conditions, conditions_of
from torchpar.ptx.triton.stages import Stages

ARCHITECTURES = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
# By capability; shared memory of a program at most.
SHARED_BYTES = {sheet.capability: sheet.shared - RESERVED for sheet in DATA_SHEETS.values()}
MULTIPROCESSORS = {sheet.capability: sheet.multiprocessors for sheet in DATA_SHEETS.values()}
LARGEST_GRID_X, LARGEST_GRID_YZ = 2**31 - 1, 65_535  # of each NVIDIA GPU
LARGEST_SIZE = 2**32 - 1  # of a dimension of a tensormap
NUMBER = r"\b(0x[0-9a-f]+|\d+)\b"  # in a message
NO_GSAN = (
    "TRITON_INSTRUMENTATION_MODE is gsan, whose kernels need memory of a GPU; unset it: races "
    "between programs are found without it"
)


class Module(NamedTuple):
    """A compiled kernel."""

    text: str


class Storage(NamedTuple):
    """The memory of a tensor on the CPU."""

    address: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.address + self.nbytes


# What the memory of torch.empty holds, by the bytes of an element: no number, and hardly what a
# program would write everywhere.
PATTERNS = {
    1: b"\xa7",
    2: b"\xd5\xff",
    4: b"\xc7\xa3\xd5\xff",
    8: b"\x6e\xd3\x91\x5b\xc7\xa3\xf5\xff",
}


def storage_of(t: Tensor) -> Storage:
    storage = t.untyped_storage()
    return Storage(storage.data_ptr(), storage.nbytes())


class Watcher(Protocol):
    """Something that executes operators and launches in the place of the emulator."""

    def operator(self, func: Any, args: Any, kwargs: Any) -> Any: ...

    def launch(self, execute: Callable[..., None], arguments: Sequence[Any]) -> None: ...


class Emulator(gpu.Gpu):
    """A GPU that `emulate` stands in for: its launches, and the faults that were found in them.

    Attributes:
        launches: in their order.
        faults: each of them once, by its name, its line of the source, and what was accessed.
        graphs: CUDA graphs that were captured, in their order.
        watcher: that records operators and launches for CUDA graphs.
    """

    keeps_allocations = False  # `_reset` begins each launch

    def __init__(
        self,
        arch: str,
        schedules: Sequence[Schedule],
        multiprocessors: int,
        traces: bool = False,
        configurations: str = "first",
        sample: int | None = None,
    ):
        super().__init__(schedules[0])
        self.most_programs = sample
        self.configurations = configurations
        self.traces = traces
        self._lock = threading.Lock()
        self._counted_before: dict[Any, Any] = {}  # of the first launch by its key
        self.arch, self.capability = arch, ARCHITECTURES[arch]
        self.schedules, self.multiprocessors = schedules, multiprocessors
        self.launches: list[Launch] = []
        self.faults: list[Fault] = []
        self.printed: list[str] = []
        self.unwritten: dict[Storage, Unwritten] = {}
        self.tuned: WeakKeyDictionary[Any, dict[Any, Any]] = (
            WeakKeyDictionary()
        )  # autotuners' caches
        self._by_place: dict[tuple[object, ...], Fault] = {}
        self.graphs: list[CapturedGraph] = []
        self.watcher: Watcher | None = None
        self._name = self._file = ""
        self._launched: tuple[str, int] | None = None
        self._before: list[Allocation] = []  # whose bytes are saved, for the next schedule
        self._saves = False
        self._ended = ""  # the fault that has ended a program or the present launch
        self._asserts = False  # what a kernel assumes is executed, and not the kernel
        # The memory of each launch of a block that is undone; None outside of one.
        self._undo: list[Allocation] | None = None

    def report(self) -> Report:
        return Report(self.launches, self.faults, self.graphs)

    def assert_counters(self, kernel: Any = None, **limits: float | None) -> None:
        """Check that launches keep limits, so that a test holds how efficient a kernel is.

            gpu.assert_counters(max_sector_ratio=1, max_bank_conflicts=0)

        Args:
            kernel: a kernel, or its name; None: each one.
            limits: `Limits` has them.

        Raises:
            AssertionError: a launch does not keep a limit; the lines of the source are named. Or
                there is no launch.
            TypeError: a limit is not known, or there is none.
        """
        known = [one.name for one in fields(Limits)]
        given = {key: limit for key, limit in limits.items() if limit is not None}
        if not given or not set(given) <= set(known):
            unknown = sorted(set(given) - set(known))
            what = f"{', '.join(unknown)} is no limit" if unknown else "there is no limit"
            raise TypeError(f"{what}, expected some of {', '.join(known)}")
        held = Limits(**given)  # type: ignore[arg-type]  # which counts are integers
        kernel = getattr(kernel, "__name__", kernel)
        launches = [one for one in self.launches if kernel in (None, one.kernel)]
        if not launches:
            names = sorted({one.kernel for one in self.launches})
            raise AssertionError(
                f"no launch of {kernel or 'a kernel'}; launched: {', '.join(names) or 'nothing'}"
            )
        broken = [f"{launch.kernel}: {text}" for launch in launches for text in held.broken(launch)]
        if broken:
            raise AssertionError("\n".join(dict.fromkeys(broken)))

    # Memory

    def _reset(self) -> None:
        self.space = Space("global memory")
        self.space.is_deferred = True
        self.space.find = self._find
        self.counted.clear()
        self._sources: dict[int, tuple[str, int] | None] = {}  # by lines of the PTX
        self._places: dict[Storage, Allocation] = {}
        self._live: list[tuple[int, int, Tensor]] | None = None
        self._is_tidy = False  # without tensors that nothing refers to

    def place(self, t: Tensor, name: str) -> Allocation:
        """Return the memory of a tensor on the CPU, at its own address."""
        storage = storage_of(t)
        if storage not in self._places:
            self._places[storage] = self._placed(t, storage, name)
        return self._places[storage]

    def _placed(self, t: Tensor, storage: Storage, name: str) -> Allocation:
        start, end = storage.address, storage.end
        overlapping = self.space.overlapping(start, end)  # storages share memory, by NumPy perhaps
        for one in overlapping:
            if one.start <= start and end <= one.end:
                return one
            start, end = min(start, one.start), max(end, one.end)
            self.space.allocations.remove(one)
        base = start & -ALIGNED
        padded = -(-(end - base) // ALIGNED) * ALIGNED
        raw: Any = (ctypes.c_uint8 * padded).from_address(base)
        data = np.frombuffer(raw, np.uint8)
        unit = min(t.element_size(), LARGEST_UNIT)
        dtype = str(t.dtype).removeprefix("torch.")
        full_name = f"{name} ({dtype} {list(t.shape)})"
        _check_memory(full_name, padded // unit)
        made = Allocation(full_name, base, end - base, unit, data, start)
        if (start, end) == (storage.address, storage.end):
            made.index = _index_of(t, name)
        merged = [other for other, place in self._places.items() if place in overlapping]
        for member in (storage, *merged):
            self._places[member] = made
        if self._saves:
            made.saved = zeros(page_count(len(data)) * PAGE, np.uint8)
            self._before.append(made)
        self._mark_unwritten([storage, *merged], made)
        return self.space.add(made)

    def _mark_unwritten(self, storages: Sequence[Storage], place: Allocation) -> None:
        """Let nobody have written those bytes that hold what `_Host` put there."""
        found = [self.unwritten[one] for one in storages if one in self.unwritten]
        if len(found) == 1 and found[0].base == place.base:
            place.unwritten = found[0]
            place.refine(min(place.unit, found[0].unit))
        elif found:  # storages that share memory
            place.refine(1)
            place.begin_all()
            for one in found:
                start = one.base - place.base
                for n in range(one.pages):
                    held = place.data[start : start + one.end][n * PAGE : (n + 1) * PAGE]
                    of_page = one.of_page(n, held)
                    place.writes[start + n * PAGE :][: len(held)][of_page] = UNWRITTEN

    def _find(self, address: int) -> Allocation | None:
        """Return the memory of a live tensor that has the address, which a kernel has loaded."""
        if self._live is None:
            self._live, self._is_tidy = _live_tensors(), False
        found = _at(address, self._live)
        if found is not None and not self._is_tidy:  # nothing may refer to what was found
            del found
            self._live = None
            gc.collect()
            self._live, self._is_tidy = _live_tensors(), True
            found = _at(address, self._live)
        return None if found is None else self.place(found, "a tensor")

    def _keep_unwritten(self) -> None:
        """Remember what is still unwritten after the launch."""
        for storage, place in self._places.items():
            if storage not in self.unwritten:
                continue
            if self.sample is not None:  # the others might have written it
                del self.unwritten[storage]
                continue
            one, unit = self.unwritten[storage], place.unit
            if one is place.unwritten:
                pages = place.touched_pages()
                pages = pages[pages < one.pages]
                rows = place.by_page(place.writes)
                rows = rows[pages] if len(pages) < len(rows) else rows
            else:  # it shares memory with others
                pages, first = np.arange(one.pages), (one.base - place.base) // unit
                elements = np.arange(first, first + one.pages * PAGE // unit)
                rows = one.by_page(place.writes[np.minimum(elements, len(place.writes) - 1)])
            written = rows != UNWRITTEN
            is_whole = len(pages) == one.pages and written.all()
            if not is_whole:
                one = self._own(storage)
                one.note(pages, np.repeat(written, unit, 1), unit)
            if is_whole or not one.left:
                del self.unwritten[storage]

    def _own(self, storage: Storage) -> Unwritten:
        """Return what is unwritten of a storage, to be changed: `undone` keeps what it was."""
        if self._undo is not None:
            self.unwritten[storage] = self.unwritten[storage].copy()
        return self.unwritten[storage]

    def note_written(self, t: Tensor) -> None:
        """An operator has written a tensor, which may be a part of its storage."""
        storage, size = storage_of(t), t.element_size()
        entry = self.unwritten.get(storage)
        if entry is None:
            return
        if storage.nbytes % size or (t.is_contiguous() and t.numel() * size == storage.nbytes):
            del self.unwritten[storage]
            return
        entry = self._own(storage)
        strides = (*(size * stride for stride in t.stride()), 1)
        of_t = torch.from_numpy(entry.written).as_strided(
            (*t.shape, size), strides, entry.first + size * t.storage_offset()
        )
        written = int((~of_t).sum())
        of_t.fill_(True)
        if entry.note_count(written, size) == 0:
            del self.unwritten[storage]

    # Launches

    def place_of(self, line: int) -> str:
        """Name a line of the PTX in a message, by that of the source if there is one."""
        source = self._sources.get(line)
        return super().place_of(line) if source is None else f"{Path(source[0]).name}:{source[1]}"

    def fault(self, kind: str, name: str, line: int, message: str, warp: Warp) -> None:
        """Note a fault of a warp; the launch goes on."""
        if self._asserts and name == "assertion":
            name, message = "false assumption", "this is false, and the compiler relies on it"
        elif self._asserts:  # the launch itself finds it
            return
        if name == "deadlock":  # its program has not ended
            self._ended = name
        self._note(kind, name, line, message, warp.block.program)

    def _note(
        self, kind: str, name: str, line: int, message: str, program: tuple[int, ...]
    ) -> None:
        # A line of the source becomes several of the PTX, one for each element of a thread, whose
        # messages differ in their numbers alone. Names such as x1 keep their digits.
        source = self._sources.get(line)
        key = self._name, kind, name, source or line, re.sub(NUMBER, "", message)
        fault = Fault(
            _kind(kind),
            name,
            message,
            self._name,
            program,
            line,
            source,
            launched=self._launched,
            configuration=autotuner.configuration(),
            launch=len(self.launches) + 1,
        )
        self.note(fault, key)

    def note(self, fault: Fault, key: tuple[object, ...]) -> None:
        """Note a fault, or count it if there is one with the key."""
        if key in self._by_place:
            self._by_place[key].count += 1
            return
        self._by_place[key] = fault
        self.faults.append(fault)

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Let memory be after the block as it was before, but for what is written without launches.

        The faults and the launches stay.
        """
        unwritten, self._undo = dict(self.unwritten), []
        try:
            yield
        finally:
            before, self._undo = self._undo, None
            _restore(before)
            self.unwritten = unwritten

    def run(
        self,
        launch: Launch,
        parameters: Callable[[], list[int]],
        file: str,
        assertions: Assertions | None = None,
    ) -> None:
        """Execute a launch under each schedule, from the same memory.

        Args:
            file: of the kernel's source.
            assertions: a kernel that asserts what this one assumes.
        """
        with self._lock:  # threads may launch at the same time
            if assertions is not None:
                self._check_assumptions(launch, assertions, parameters, file)
            self._run_schedules(launch, parameters, file)

    def _check_assumptions(
        self,
        launch: Launch,
        assertions: Assertions,
        parameters: Callable[[], list[int]],
        file: str,
    ) -> None:
        """Execute the assertions, and nothing else: memory is afterwards as before."""
        self._name, self._file, self._launched = launch.kernel, file, launch.launched
        self.schedule, self.printed, self.trace = self.schedules[0], [], None
        self._before.clear()
        self._saves, self._asserts = assertions.writes, True
        try:
            self._reset()
            with suppress(PtxError):  # such as the trap behind an assertion
                self.launch(assertions.ptx, parameters(), launch.grid, assertions.shared)
        finally:
            self._asserts = False
            _restore(self._before)

    def _run_schedules(
        self, launch: Launch, parameters: Callable[[], list[int]], file: str
    ) -> None:
        self._name, self._file, started = launch.kernel, file, time.perf_counter()
        self._launched, self._ended = launch.launched, ""
        self._before.clear()
        last = self.counts
        try:
            self._execute(launch, parameters)
        except BaseException as e:  # such as KeyboardInterrupt: this launch is shown, too
            if self.counts is not last:
                launch.ended = type(e).__name__
                self._end(launch, started)
            raise
        finally:
            if self._undo is not None:
                self._undo += self._before
        self._keep_unwritten()
        self._end(launch, started)

    def _execute(self, launch: Launch, parameters: Callable[[], list[int]]) -> None:
        for number, schedule in enumerate(self.schedules):
            self.schedule, self.printed = schedule, []
            self._saves = number + 1 < len(self.schedules) or self._undo is not None
            is_new = launch.key not in self._counted_before
            self.trace = Trace() if number == 0 and self.traces and is_new else None
            launch.trace = launch.trace or self.trace
            _restore(self._before)
            self._reset()
            values = parameters()
            try:
                x, y, z = launch.grid
                self.launch(launch.ptx, values, (x * launch.ctas, y, z), launch.shared)
            except PtxError as e:
                self._ended = e.name
                self._note("error", e.name, e.line, e.reason, e.program)
            except MemoryError:
                raise
            except Exception as e:
                own = own_error(e)
                self._ended = own.name
                self._note("error", own.name, own.line, own.reason, own.program)
            finally:
                if number == 0:
                    launch.counts, launch.file = self.counts, self._file
                    launch.executed = None if self.sample is None else self.sample.executed
                launch.ended = self._ended
                launch.instructions += self.executed_instructions
                launch.printed = self.printed

    def _end(self, launch: Launch, started: float) -> None:
        launch.seconds = time.perf_counter() - started
        # Launches that do the same share what was counted, so that many need little memory.
        before = self._counted_before.setdefault(launch.key, launch.counts)
        if before is not launch.counts and before.equals(launch.counts):
            launch.counts = before
        self.launches.append(launch)

    def prepare(self, kernel: Kernel) -> None:
        threads, shared = kernel.threads, self.shared_bytes
        held = min(
            PROGRAMS, 32 * WARPS // max(threads, 1), SHARED_BYTES[self.capability] // max(shared, 1)
        )
        self.resident_blocks = MULTIPROCESSORS[self.capability] * max(held, 1)
        self._sources = {
            i.line: moved(i.source, kernel.file, self._file) for i in kernel.instructions
        }


def _restore(before: list[Allocation]) -> None:
    """Give memory the content that it had before, the last one first."""
    while before:
        before.pop().restore()


def _at(address: int, live: list[tuple[int, int, Tensor]]) -> Tensor | None:
    """Return the tensor that has an address."""
    after = bisect_right(live, address, key=lambda one: one[0])
    return live[after - 1][2] if after and address < live[after - 1][1] else None


def _live_tensors() -> list[tuple[int, int, Tensor]]:
    """Return the tensors on the CPU that live now, in the order of their addresses.

    Each has its first address, and the one behind its last one. Tensors within others are left out.
    """
    found = []
    objects = gc.get_objects()
    are_tensors = map((Tensor, torch.nn.Parameter).__contains__, map(type, objects))
    for one in compress(objects, are_tensors):
        if not one.is_cpu:
            continue
        try:
            start, nbytes = storage_of(one)
        except (RuntimeError, NotImplementedError):  # sparse tensors, for example
            continue
        if nbytes:
            found.append((start, start + nbytes, one))
    found.sort(key=lambda one: (one[0], -one[1]))
    kept, end = [], 0
    for one in found:
        if one[1] > end:
            kept.append(one)
            end = one[1]
    return kept


def _kind(text: str) -> Kind:
    assert text in ("error", "warning", "note")
    return text  # type: ignore[return-value]


def _index_of(t: Tensor, name: str) -> Callable[[int], str]:
    """Return a function that names the element at an offset in the storage of ``t``."""
    shape, strides = [int(n) for n in t.shape], [int(n) for n in t.stride()]
    width, first = t.element_size(), int(t.storage_offset())

    def index(offset: int) -> str:
        position = offset // width - first
        order = sorted(range(len(shape)), key=lambda d: -strides[d])
        found, rest = [0] * len(shape), position
        for d in order:
            if strides[d] > 0:
                found[d], rest = divmod(rest, strides[d])
        if (
            rest == 0
            and position >= 0
            and all(0 <= i < n for i, n in zip(found, shape, strict=True))
        ):
            return f"{name}[{', '.join(map(str, found))}]"
        return f"element {offset // width} of the storage of {name}"

    return index


def _check_mode(metadata: Any) -> None:
    """Refuse the sanitizer of Triton whose kernels have another parameter."""
    if "gsan" in getattr(metadata, "instrumentation_mode", ""):
        raise NotImplementedError(NO_GSAN)


def _constants(source: Any) -> dict[str, str]:
    """Return the arguments whose values a kernel was compiled for, as text."""
    found = {}
    for path, value in source.constants.items():
        name = source.fn.arg_names[path[0]] + "".join(f"[{i}]" for i in path[1:])
        found[name] = str(getattr(value, "__name__", value))
    return found


def _specialization(source: Any, metadata: Any) -> dict[str, str]:
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

    def __init__(self, source: Any, metadata: Any):
        self.source, self.metadata = source, metadata
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

    def _assertions_for(self, arguments: Sequence[Any]) -> Assertions | None:
        """Return the assertions unless it is plain that none fails; a second compile makes them."""
        if self.conditions is not None and self.conditions.hold(arguments):
            return None
        return self.assertions

    def __call__(
        self,
        x: int,
        y: int,
        z: int,
        stream: int,
        module: Module,
        packed: Any,
        launch_metadata: Any,
        enter: Any,
        leave: Any,
        *arguments: Any,
    ) -> None:
        emulator: Emulator = active_driver.active.emulator
        metadata = self.metadata
        ctas = int(getattr(metadata, "num_ctas", 1))
        _check_mode(metadata)
        _check_grid(x, y, z)
        self._try(module, emulator.arch)
        tuning = autotuner.called.get()
        if tuning and tuning.is_trial:
            return
        name = getattr(self.source.fn, "__name__", "kernel")
        names = list(self.source.fn.arg_names)
        programs = x * y * z * ctas

        def parameters(arguments: Sequence[Any]) -> list[int]:
            values: list[int] = []
            maps = list(getattr(metadata, "tensordesc_meta", None) or [])
            has_maps = bool(maps)
            signature = self.source.signature.values()
            for name, kind, value in zip(names, signature, arguments, strict=True):
                _flatten(emulator, name, kind, value, maps if has_maps else None, values)
            values += self._scratch(emulator, programs)
            return values

        def execute(arguments: Sequence[Any]) -> None:
            launch = Launch(
                name,
                emulator.arch,
                (x, y, z),
                metadata.num_warps,
                metadata.shared,
                ptx=module.text,
                launched=program_line(),
                ctas=ctas,
                constants=self.constants,
                specialization=self.specialization,
            )
            self._execute(
                emulator,
                launch,
                lambda: parameters(arguments),
                lambda: self._assertions_for(arguments),
            )

        if enter is not None:
            enter(launch_metadata)
        if x * y * z and emulator.watcher is not None:
            emulator.watcher.launch(execute, arguments)
        elif x * y * z:
            execute(arguments)
        if leave is not None:
            leave(launch_metadata)

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
        tuning = autotuner.called.get()
        if self._refused and tuning and tuning.is_trial:
            raise PTXASError(self._refused)

    def _execute(
        self,
        emulator: Emulator,
        launch: Launch,
        parameters: Callable[[], list[int]],
        assertions: Callable[[], Assertions | None],
    ) -> None:
        code = getattr(getattr(self.source.fn, "fn", None), "__code__", None)
        file = code.co_filename if code else ""
        if self._refused:  # a GPU could not launch it, either
            for fault in refusals(self._refused, launch.ptx, launch.kernel, file):
                fault.launched = launch.launched
                fault.configuration = autotuner.configuration()
                emulator.note(fault, (fault.kernel, fault.name, fault.source, fault.message))
            return
        self._check_allocator(emulator, launch)
        emulator.run(launch, parameters, file, assertions())

    def _check_allocator(self, emulator: Emulator, launch: Launch) -> None:
        """Note that nobody has given Triton an allocator, which this kernel's scratch memory needs.

        Descriptors that are made on the device lie there. Here the memory is the emulator's own.
        """
        if self.metadata.global_scratch_size and isinstance(_allocator.get(), NullAllocator):
            message = (
                "Triton would raise: Kernel requires a runtime memory allocation, but no allocator "
                "was set; call triton.set_allocator in this thread"
            )
            name, place = f"no allocator for {launch.kernel}", launch.launched
            emulator.note(HostFault("error", name, message, source=place), (name, place))


def _check_memory(name: str, elements: int) -> None:
    """Raise MemoryError if who has read and written each element cannot be kept.

    Where the system promises more memory than there is, it would kill the process instead.
    """
    needed = 8 * elements
    if needed < 2**26:  # small ones are launched often
        return
    there = free_memory()
    if there is not None and needed > there:
        raise MemoryError(
            f"{name} takes {needed / 2**30:,.1f} GiB to be emulated, 8 bytes for each element, and "
            f"{there / 2**30:,.1f} GiB are free; take a smaller tensor"
        )


def _flatten(
    emulator: Emulator, name: str, kind: Any, value: Any, maps: list[Any] | None, to: list[int]
) -> None:
    """Append the bits of the parameters that an argument of ``kind`` becomes."""
    if isinstance(kind, tuple):
        for i, (one, part) in enumerate(zip(kind, value, strict=True)):
            _flatten(emulator, f"{name}[{i}]", one, part, maps, to)
    elif kind == "constexpr":
        return
    elif not kind.startswith("tensordesc"):
        to.append(bits(emulator, name, kind, value))
    elif maps is None:  # a descriptor without TMA
        to.append(bits(emulator, name, "*", value.base))
        layout = [int(n) % 2**64 for n in (*value.shape, *value.strides)]
        to += [*layout, int(value.padding == "nan")]
        if hasattr(value, "round_f32_to_tf32"):
            to.append(int(value.round_f32_to_tf32))
        to += layout
    else:
        to.append(_tensormap(emulator, name, value, maps.pop(0)))
        to += [*map(int, value.shape), *map(int, value.strides)]


FORMATS = {"fp32": ("f4", "u4"), "f32": ("f4", "u4"), "fp64": ("f8", "u8"), "fp16": ("f2", "u2")}


def bits(emulator: Emulator, name: str, kind: str, value: Any) -> int:
    """Return the bits of a parameter."""
    if hasattr(value, "data_ptr"):
        base = getattr(value, "base", value)  # of triton.reinterpret
        if isinstance(base, Tensor) and base.untyped_storage().nbytes():
            if base.device.type != "cpu":
                raise ValueError(f"{name} is on {base.device}, expected a tensor on the CPU")
            emulator.place(base, name)
        return int(value.data_ptr()) % 2**64
    if value is None:
        return 0
    if kind in FORMATS:
        dtype, integer = FORMATS[kind]
        with np.errstate(over="ignore"):  # a GPU gets an infinity, too
            return int(np.array(value, dtype).view(integer)[()])
    if kind == "bf16":
        return int(torch.tensor(value, dtype=torch.bfloat16).view(torch.int16)) % 2**16
    return int(value) % 2**64


def _tensormap(emulator: Emulator, name: str, descriptor: Any, meta: Any) -> int:
    """Return the address of a tensormap, as the host makes it from a descriptor.

    Raises:
        ValueError: a tensormap cannot hold the shape or the strides.
    """
    shape, strides = [list(map(int, given)) for given in (descriptor.shape, descriptor.strides)]
    if not all(0 < n <= LARGEST_SIZE for n in shape):
        raise ValueError(
            f"the descriptor {name} has shape {shape}, expected sizes from 1 to "
            f"{LARGEST_SIZE:,}; give those of its tensor"
        )
    largest = (STRIDES_END - 16) // meta["elem_size"]
    if not all(0 <= n <= largest for n in strides):
        raise ValueError(
            f"the descriptor {name} has strides {strides}, expected from 0 to "
            f"{largest:,}; give those of its tensor"
        )
    bits(emulator, name, "*", descriptor.base)
    raw = bytearray(128)

    def put(field: str, values: Sequence[int]) -> None:
        start, kind = FIELDS[field]
        size = int(kind[1:]) // 8
        for n, value in enumerate(values):
            raw[start + n * size : start + (n + 1) * size] = int(value).to_bytes(size, "little")

    rank = len(shape)
    put("global_address", [descriptor.base.data_ptr()])
    put("rank", [rank - 1])
    put("box_dim", meta["block_size"][::-1])
    put("global_dim", shape[::-1])
    put("element_stride", [1] * rank)
    put("global_stride", [s * meta["elem_size"] for s in strides[:-1][::-1]])
    rounds = getattr(descriptor, "round_f32_to_tf32", False)  # Triton 3.6 has none
    put("elemtype", [TF32 if rounds else meta["elem_type"]])
    put("interleave_layout", [0])
    put("swizzle_mode", [meta["swizzle"]])
    put("fill_mode", [int(descriptor.padding == "nan")])
    place = emulator.allocate("a tensormap", 128)
    place.data[:128] = np.frombuffer(bytes(raw), np.uint8)
    place.writes[:] = GIVEN
    place.published.add(0)
    place.acquired[0] = GIVEN
    return place.base


class Entered(NamedTuple):
    """An emulator in whose block a thread is."""

    thread: int
    emulator: Emulator


_entered: list[Entered] = []  # in their order
_installed = ExitStack()  # what they change of Triton
_entering = threading.Lock()


def _present() -> Emulator:
    """Return the emulator in whose block this thread is, or that was entered last."""
    entered, me = list(_entered), threading.get_ident()
    mine = [one for one in entered if one.thread == me]
    return (mine or entered)[-1].emulator


class Utils:
    """What Triton asks a driver for."""

    @property
    def emulator(self) -> Emulator:
        return _present()

    def load_binary(
        self, name: str, kernel: bytes, shared: int, device: int
    ) -> tuple[int, Module, int, int, int]:
        return 1, Module(kernel.decode()), 0, 0, 1024

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
        return _present()

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.emulator.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_current_device(self) -> int:
        """A number for each kind of GPU, and no other driver's: Triton keeps kernels by it."""
        return 1000 * self.emulator.multiprocessors + self.emulator.capability

    def set_current_device(self, device: int) -> None: ...

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int | None = None) -> tuple[int, int]:
        return divmod(self.emulator.capability, 10)

    def get_benchmarker(self) -> Callable[..., Any]:
        """An autotuner takes the first configuration."""
        return lambda call, quantiles=None, **options: [1.0] * len(quantiles or [1])

    def get_empty_cache_for_benchmark(self) -> Any:
        return None

    def clear_cache(self, cache: Any) -> None: ...


class _Host(TorchDispatchMode):
    """What PyTorch's operators do while an emulator is active.

    Operators of others that have a kernel for CUDA, written in Python, run it on CPU tensors.

    The memory of torch.empty is unwritten, until an operator writes to it.
    """

    sees_launches = True  # as the emulator executes them

    def __init__(self, emulator: Emulator):
        super().__init__()
        self.emulator = emulator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace not in BUILT_IN and _has_kernel_in_python(func, args, kwargs or {}):
            with self:  # also in what the kernel's function does
                result = func.redispatch(ON_CUDA, *args, **(kwargs or {}))
        elif self.emulator.watcher is not None:
            with torch._C.DisableTorchFunction():  # autograd calls operators within its modes
                result = self.emulator.watcher.operator(func, args, kwargs or {})
            if result is NotImplemented:  # a subclass of tensors does it, with other operators
                return result
        else:
            result = func(*args, **(kwargs or {}))
        if self.emulator.unwritten:
            for t in _written(func._schema, args, kwargs or {}, result):
                self.emulator.note_written(t)
        if func.overloadpacket in EMPTY and is_plain(result):
            storage = storage_of(result)
            if storage.nbytes:
                pattern = PATTERNS[min(result.element_size(), 8)]
                raw: Any = (ctypes.c_uint8 * storage.nbytes).from_address(storage.address)
                elements = np.frombuffer(raw, f"u{len(pattern)}", storage.nbytes // len(pattern))
                elements[:] = np.frombuffer(pattern, elements.dtype)
                self.emulator.unwritten[storage] = Unwritten(*storage, pattern)
        return result


ON_CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
BUILT_IN = ("aten", "prim", "prims", "profiler")  # namespaces of PyTorch's operators


def _has_kernel_in_python(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether an operator on plain CPU tensors has a function in Python for CUDA or all devices.

    One in C++ would take the addresses for those of a GPU.
    """
    operands = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if not operands or not all(map(is_plain, operands)):
        return False
    lines = torch._C._dispatch_dump(func.name()).splitlines()
    kernels = dict(line.split(": ", 1) for line in lines if ": " in line)
    composite = kernels.get("CompositeExplicitAutograd[alias]", "")
    return ".py:" in kernels.get("CUDA", composite)


def is_plain(t: Any) -> bool:
    """Whether ``t`` is a tensor with memory on the CPU: not sparse, fake, or autograd's zero."""
    is_tensor = type(t) in (Tensor, torch.nn.Parameter)
    is_strided = is_tensor and t.layout == torch.strided and t.is_cpu
    return is_strided and not t._is_zerotensor()


def changed(schema: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """Return the arguments of an operator that it changes in place."""
    given = dict(zip((argument.name for argument in schema.arguments), args, strict=False))
    given |= kwargs
    return [
        given.get(argument.name)
        for argument in schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def _written(
    schema: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any
) -> Iterator[Tensor]:
    """Yield the tensors that an operator has written: its new ones, and those that it changes."""
    values = changed(schema, args, kwargs)
    if all(one.alias_info is None for one in schema.returns):
        values.append(result)
    for t in tree_leaves(values):
        if is_plain(t):
            yield t


EMPTY = {
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.empty_strided,
    torch.ops.aten.new_empty,
    torch.ops.aten.new_empty_strided,
}


# The first version of Triton whose CompiledKernel has a method __del__, which unloads `module`.
UNLOADS_SINCE = (3, 8)


@lru_cache(1)
def _let_kernels_end() -> None:
    """Let Triton forget kernels of an emulator also when it has no driver, or that of a GPU.

    The change lasts as long as the process, because kernels live longer than an emulator. It was
    made for Triton 3.8, and reads the attributes ``function`` and ``module`` of a kernel.
    """
    unload = getattr(CompiledKernel, "__del__", None)
    if unload is None:  # before `UNLOADS_SINCE`
        return

    def forget(kernel: Any) -> None:
        if isinstance(kernel.function, Module):
            kernel.module = None  # nothing was loaded
        unload(kernel)

    CompiledKernel.__del__ = forget


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


@contextmanager
def emulate(
    arch: str = "sm_90",
    schedules: str = "one",
    multiprocessors: int | None = None,
    traces: bool = False,
    configurations: str = "first",
    sample: int | None = None,
) -> Iterator[Emulator]:
    """Execute the launches of Triton kernels in the block on this CPU, as compiled for a GPU.

    A thread within a block of its own launches there; another thread, in the block entered last.

    Args:
        arch: "sm_80" (A100), "sm_90" (H100) or "sm_100" (B200).
        schedules: "one", or "all": execute each launch three times, with asynchronous operations
            that complete early, late and at random, and warps in other orders.
        multiprocessors: of the GPU, which persistent kernels and torchpar's rules ask for; None:
            108 of an A100, 132 of an H100, 148 of a B200.
        traces: record the first program of each kernel, for the pictures of the report's page.
        configurations: of an autotuned kernel: "first", the first one that compiles and fits; or
            "all": the others are executed before it, and what they write is undone.
        sample: execute at most so many programs of a launch, at least 6, and scale the counters to
            all of them. The memory that the others would write stays as it is. None: execute all.

    Raises:
        ValueError: another architecture, schedule or word for configurations, no multiprocessors,
            or a sample that is too small; TRITON_INTERPRET is set.
    """
    if arch not in tuple(ARCHITECTURES):
        raise ValueError(f"arch is {arch!r}, expected one of {', '.join(ARCHITECTURES)}")
    if schedules not in ("one", "all"):
        raise ValueError(f"schedules is {schedules!r}, expected 'one' or 'all'")
    if configurations not in ("first", "all"):
        raise ValueError(f"configurations is {configurations!r}, expected 'first' or 'all'")
    if reason := why_not_compiled():
        raise ValueError(reason)
    if multiprocessors is None:
        multiprocessors = MULTIPROCESSORS[ARCHITECTURES[arch]]
    if type(multiprocessors) is not int or multiprocessors < 1:
        raise ValueError(f"multiprocessors is {multiprocessors!r}, expected an integer from 1 on")
    if sample is not None and (type(sample) is not int or sample < LEAST):
        raise ValueError(f"sample is {sample!r}, expected an integer from {LEAST} on, or None")
    chosen = SCHEDULES if schedules == "all" else SCHEDULES[:1]
    emulator = Emulator(arch, chosen, multiprocessors, traces, configurations, sample)
    entered = Entered(threading.get_ident(), emulator)
    with _entering:
        if not _entered:
            _install()
        _entered.append(entered)
    try:
        with _Host(emulator):
            yield emulator
    finally:
        with _entering:
            _entered.remove(entered)
            if not _entered:
                _installed.close()


def _install() -> None:
    """Let Triton compile and launch for the emulators, until `_installed` is closed."""
    folder = writable(cache_folder("ptx"))
    _let_kernels_end()
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
        stack.enter_context(autotuner.changes(_present))
        stack.callback(setattr, active_driver, "_active", active_driver._active)
        active_driver.set_active(Driver())
        _installed.push(stack.pop_all())
