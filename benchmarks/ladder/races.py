# SPDX-License-Identifier: MIT
"""Races of kernels in Numba's simulator: two threads at one element, without an order on a GPU.

The simulator executes blocks one after the other, so that a race seldom shows in the values. Here
each access of an array is recorded with its block, its thread, and how many barriers that thread
has passed. Threads of one block are ordered by a barrier between them; blocks are never ordered.
Two accesses race if nothing orders them, one of them changes the number, and not both are atomic.
Threads that write the same number do not race. Local arrays are a thread's own.
"""

import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Lock
from types import FrameType
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np

from torchpar.baselines.numpy_mlp import Array

Index = tuple[int, ...]

MOST = 2**17  # elements that are recorded, of some 300 bytes each
KEPT = 2  # accesses of one kind, block and phase: one of them is another thread's, for any thread
FENCES = ("threadfence", "threadfence_block", "threadfence_system")
ORDERS = "orders threads by cuda.{}"
LOCKS = ("cas", "compare_and_swap", "exch")  # atomics by which threads wait for others
# The kinds of accesses, and those of other threads that race with each. A thread "leaves" a number
# by writing the same one, and "updates" it by an atomic operation.
RACING = {
    "reads": ("writes", "updates"),
    "writes": ("reads", "writes", "leaves", "updates"),
    "leaves": ("updates",),
    "updates": ("reads", "writes", "leaves"),
}
WORDS = {
    "reads": "reads",
    "writes": "writes",
    "leaves": "writes",
    "updates": "changes, atomically,",
}
IN_BLOCK = (
    "put cuda.syncthreads() between them, change it by cuda.atomic, or let one thread alone have it"
)
BETWEEN_BLOCKS = (
    "change it by cuda.atomic, let one block alone have it, or launch another kernel for what "
    "comes later"
)


class Place:
    """The place of a thread, and what it does.

    Attributes:
        phase: how many barriers it has passed.
        is_atomic: whether it is in an atomic operation.
        wrote: the addresses to which it has written in this phase.
    """

    def __init__(self, block: Index, thread: Index) -> None:
        self.block, self.thread, self.phase = block, thread, 0
        self.is_atomic = False
        self.wrote = set[int]()

    def pass_barrier(self) -> None:
        self.phase += 1
        self.wrote.clear()


class Access(NamedTuple):
    """An access of an element, by a line of the kernel."""

    kind: str
    block: Index
    thread: Index
    phase: int
    line: int

    def is_ordered(self, other: "Access") -> bool:
        """Whether one of the two comes before the other on a GPU, too."""
        if self.block != other.block:
            return False
        return self.phase != other.phase or self.thread == other.thread

    def __str__(self) -> str:
        return f"thread {shown(self.thread)} of block {shown(self.block)} {WORDS[self.kind]}"


def shown(at: Index) -> str:
    """The index of a thread or a block, without the last dimensions in which it is 0."""
    *first, z = at
    if z:
        return str(at)
    return str(tuple(first)) if first[1] else str(first[0])


class Races:
    """The accesses of a launch, and the first race of all launches.

    Attributes:
        first: a line on the first race, or "".
        unseen: why races are not looked for in a kernel, or "".
        is_whole: whether all elements were recorded.
    """

    def __init__(self) -> None:
        self.first = self.unseen = ""
        self.is_whole = True
        self.elements: dict[int, list[Access]] = {}
        self.shared: dict[int, list[Access]] = {}
        self.block: Index | None = None
        self.lock = Lock()

    def verdict(self, size: str) -> str:
        """The words on races of a function that was executed at a size, and had none."""
        if self.unseen:
            return f"races are not looked for, since it {self.unseen}"
        part = "" if self.is_whole else f", among {MOST:,} elements"
        return f"no race of threads was seen at {size}{part}"

    def begin_launch(self) -> None:
        """Forget the launch before, which ends before this one begins."""
        self.elements.clear()
        self.block = None

    def note(self, place: Place, kind: str, wrapper: Any, index: object) -> None:
        """Record an access of an element, and compare it with earlier ones."""
        address = address_of(wrapper.__dict__["_item"], index)
        with self.lock:
            if self.first or self.unseen:
                return
            if place.block != self.block:  # whose shared arrays are others
                self.shared.clear()
                self.block = place.block
            is_shared = is_in_shared_memory(wrapper)
            seen = self.accesses(self.shared if is_shared else self.elements, address)
            if seen is None or (kind == "reads" and are_reads(seen, place)):
                return
            frame = caller()
            if kind == "leaves" and is_shared and all(one.kind == "reads" for one in seen):
                kind = "writes"  # what a shared array holds first is unknown
            access = Access(kind, place.block, place.thread, place.phase, frame.f_lineno)
            if kind in ("writes", "leaves"):
                place.wrote.add(address)
            if not seen:
                seen.append(access)
                return
            if other := racing_with(seen, access, address in place.wrote):
                self.first = told(other, access, wrapper, index, frame)
            keep(seen, access)

    def accesses(self, elements: dict[int, list[Access]], address: int) -> list[Access] | None:
        """The accesses of an element by now; None beyond those that are recorded."""
        if address not in elements and len(elements) >= MOST:
            self.is_whole = False
            return None
        return elements.setdefault(address, [])


def are_reads(seen: list[Access], place: Place) -> bool:
    """Whether one more read changes nothing: an element is only read, and by others here, too."""
    here = 0
    for kind, block, thread, phase, _ in seen:
        if kind != "reads":
            return False
        if phase == place.phase and block == place.block:
            here += KEPT if thread == place.thread else 1
    return here >= KEPT


def racing_with(seen: list[Access], access: Access, has_written: bool) -> Access | None:
    """The first of the accesses of an element that races with another one.

    A thread that has written the number, or whose block has before a barrier, reads its own:
    others that wrote the same one have not changed it.
    """
    if access.kind == "reads" and (
        has_written
        or any(one.kind in ("writes", "leaves") and one.is_ordered(access) for one in seen)
    ):
        return None
    racing = RACING[access.kind]
    return next((one for one in seen if one.kind in racing and not one.is_ordered(access)), None)


def keep(seen: list[Access], access: Access) -> None:
    """Add an access to those of an element, unless these already stand for it."""
    now: list[Access] = []
    before: dict[tuple[str, bool], Access] = {}  # one stands for all of other blocks, or phases
    for one in seen:
        if (one.block, one.phase) == (access.block, access.phase):
            now.append(one)
        else:
            before[one.kind, one.block == access.block] = one
    alike = [one for one in now if one.kind == access.kind]
    if len(alike) < KEPT and all(one.thread != access.thread for one in alike):
        seen[:] = [*before.values(), *now, access]


def told(one: Access, other: Access, wrapper: Any, index: object, frame: FrameType) -> str:
    """A line on a race of two accesses, of which the second is made in ``frame``."""
    names = (name for name, value in frame.f_locals.items() if value is wrapper)
    at = index if isinstance(index, tuple) else (index,)
    element = f"{next(names, 'an array')}[{', '.join(map(str, at))}]"
    file = Path(frame.f_code.co_filename).name
    remedy = IN_BLOCK if one.block == other.block else BETWEEN_BLOCKS
    return (
        f"{file}, line {other.line}: a race: {other} {element}, which {one} in line {one.line}, "
        f"and on a GPU nothing orders the two; {remedy}"
    )


# What is patched of Numba's simulator


def is_in_shared_memory(wrapper: Any) -> bool:
    return "is_shared" in wrapper.__dict__["_item"].__dict__


def address_of(item: Any, index: object) -> int:
    """The address of an element of one of the simulator's arrays."""
    array: Array = item._ary
    if "start" not in item.__dict__:
        item.start = array.__array_interface__["data"][0]
    at = index if isinstance(index, tuple) else (index,)
    address: int = item.start
    for one, stride, size in zip(at, array.strides, array.shape, strict=True):
        i = operator.index(one)  # NumPy's int32 would overflow
        address += (i if i >= 0 else i + size) * stride
    return address


def caller() -> FrameType:
    """The frame of the kernel, above those of this file and of the simulator."""
    frame = sys._getframe(1)
    while frame.f_globals["__name__"].startswith((__name__, "numba.cuda.simulator")):
        assert frame.f_back is not None
        frame = frame.f_back
    return frame


def is_same(before: Any, after: Any) -> bool:
    """Whether two numbers are equal, or both are NaN."""
    return bool(before == after or (before != before and after != after))


class Recorder:
    """The functions that stand in for those of Numba's simulator, and record accesses.

    Args:
        kernel, kernelapi, arrays: modules of the simulator; the last is `cudadrv.devicearray`.
    """

    def __init__(self, races: Races, kernel: Any, kernelapi: Any, arrays: Any) -> None:
        self.races, self.kernel, self.kernelapi, self.arrays = races, kernel, kernelapi, arrays
        self.dynamic = kernelapi.FakeCUDAShared.array
        self.barrier = kernel.BlockThread.syncthreads
        self.grid_barrier = kernelapi.GridGroup.sync
        array = arrays.FakeWithinKernelCUDAArray
        self.get, self.set = array.__getitem__, array.__setitem__

    def here(self) -> Place:
        """The place of the thread that is executed."""
        thread = self.kernelapi.threading.current_thread()
        place: Place | None = getattr(thread, "place", None)
        if place is None:
            place = Place(tuple(thread.blockIdx), tuple(thread.threadIdx))
            thread.place = place
        return place

    def wrapped(self, array: Any, is_shared: bool) -> Any:
        """An array as a kernel sees it, whose accesses are recorded."""
        item = self.arrays.FakeCUDAArray(array)
        if is_shared:
            item.is_shared = True
        return self.arrays.FakeWithinKernelCUDAArray(item)

    def has_records(self, wrapper: Any) -> bool:
        """Whether an array has records of several numbers, which are not followed."""
        if wrapper.__dict__["_item"]._ary.dtype.fields is None:
            return False
        self.races.unseen = "has an array of records"
        return True

    def read(self, wrapper: Any, index: object) -> object:
        if self.has_records(wrapper):
            return self.get(wrapper, index)
        found = wrapper.__dict__["_item"]._ary[index]
        if isinstance(found, np.ndarray | np.void):  # a part, whose elements are read later
            return self.wrapped(found, is_in_shared_memory(wrapper))
        if not (place := self.here()).is_atomic:
            self.races.note(place, "reads", wrapper, index)
        return found

    def write(self, wrapper: Any, index: object, value: object) -> None:
        if self.has_records(wrapper):
            self.set(wrapper, index, value)
            return
        array, place = wrapper.__dict__["_item"]._ary, self.here()
        before = array[index]
        if isinstance(before, np.ndarray):
            part = self.wrapped(before, is_in_shared_memory(wrapper))
            values = np.broadcast_to(np.asarray(value), before.shape)
            for at in np.ndindex(before.shape):
                self.write(part, at, values[at])
            return
        array[index] = value
        changes = not is_same(before, array[index])
        if place.is_atomic:
            kind = "updates" if changes else ""
        else:
            kind = "writes" if changes else "leaves"
        if kind:
            self.races.note(place, kind, wrapper, index)

    def allocate(self, shared: Any, shape: Any, dtype: Any) -> object:
        """A shared array. As in the simulator, a block knows it by the line that asks for it."""
        if shape == 0:
            return self.wrapped(self.dynamic(shared, shape, dtype), True)
        frame = sys._getframe(2)  # that of the kernel, above the patch
        key = frame.f_code.co_filename, frame.f_lineno
        if key not in shared._allocations:
            if isinstance(dtype, self.kernelapi.types.Type):
                dtype = self.kernelapi.numpy_support.as_dtype(dtype)
            shared._allocations[key] = np.empty(shape, dtype)
        return self.wrapped(shared._allocations[key], True)

    def pass_barrier(self, thread: Any) -> None:
        place = self.here()
        self.barrier(thread)
        place.pass_barrier()

    def atomic(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        """An atomic operation, whose reads are not recorded."""

        def called(*arguments: Any, **named: Any) -> Any:
            if name in LOCKS:
                self.races.unseen = ORDERS.format(f"atomic.{name}")
            place = self.here()
            place.is_atomic = True
            try:
                return operation(*arguments, **named)
            finally:
                place.is_atomic = False

        return called

    def fence(self, name: str) -> Callable[[Any], None]:
        def called(module: Any) -> None:
            self.races.unseen = ORDERS.format(name)

        return called

    def sync_grid(self, group: Any) -> None:
        self.races.unseen = ORDERS.format("cg.this_grid().sync")
        self.grid_barrier(group)

    def patches(self) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
        """Classes of the simulator, and the methods that are replaced."""
        array, api = self.arrays.FakeWithinKernelCUDAArray, self.kernelapi
        yield array, "__getitem__", lambda *arguments: self.read(*arguments)
        yield array, "__setitem__", lambda *arguments: self.write(*arguments)
        yield (
            api.FakeCUDAShared,
            "array",
            lambda shared, shape, dtype: self.allocate(shared, shape, dtype),
        )
        yield self.kernel.BlockThread, "syncthreads", lambda thread: self.pass_barrier(thread)
        yield api.GridGroup, "sync", lambda group: self.sync_grid(group)
        for name in FENCES:
            yield api.FakeCUDAModule, name, self.fence(name)
        for name, operation in list(vars(api.FakeCUDAAtomic).items()):
            if not name.startswith("_"):
                yield api.FakeCUDAAtomic, name, self.atomic(name, operation)


@contextmanager
def recorded() -> Iterator[Races]:
    """Record the accesses of the kernels that Numba's simulator executes in the block."""
    from numba.cuda.simulator import kernel, kernelapi
    from numba.cuda.simulator.cudadrv import devicearray

    races = Races()
    with ExitStack() as stack:
        for owner, name, function in Recorder(races, kernel, kernelapi, devicearray).patches():
            stack.enter_context(patch.object(owner, name, function))
        yield races
