# SPDX-License-Identifier: MIT
"""Loads, stores, asynchronous copies, and the groups of asynchronous operations: 9.7.9 of the PTX
ISA."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import triton

from nogpu.instructions.atomics import after_access, before_access
from nogpu.machine import definedness
from nogpu.machine.block import Warp
from nogpu.machine.decode import Run, action, instruction
from nogpu.machine.memory import Space
from nogpu.machine.operation import Operation
from nogpu.machine.parse import Instruction, PtxError, Register, flat, qualifiers
from nogpu.machine.registers import DTYPES, Values, reader, writer

# Triton 3.6 makes no proxy fence between cp.async and a wgmma that reads what was copied, where a
# tile has no mask. 9.7.15.4 demands it, and Triton 3.8 makes it (triton-lang/triton#9610, #10537).
COPIES_NEED_FENCE = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)


@instruction("ld.param")
def _load_parameter(i: Instruction) -> Run:
    to, source = i.operands
    assert len(i.parts) == 3
    put, read = writer(to, i.parts[-1]), reader(source.base, i.parts[-1])
    return lambda warp: put(warp, read(warp))


def _access(i: Instruction, count: int) -> tuple[Callable[[Warp, Values], Space], str, str]:
    """The address space, the kind and the order of a load or store of ``count`` elements."""
    (*rest, kind), order, in_shared = qualifiers(i)
    in_local = rest[:1] == ["local"]
    assert rest[in_local:] == [f"v{count}"] * (count > 1)
    if in_shared:
        return lambda warp, at: warp.block.shared, kind, ""
    if in_local:
        return lambda warp, at: warp.block.local, kind, ""
    order = "relaxed" if order == "volatile" else order
    if "global" not in i.parts:
        return _space_of, kind, order
    return lambda warp, at: warp.block.space, kind, order


def _space_of(warp: Warp, at: Values) -> Space:
    """The space of generic addresses. Limitation: that of the first one is that of all."""
    block = warp.block
    spaces: tuple[Space, ...] = (block.local, block.shared)
    found = (space for space in spaces if space.known(int(at[0])) is not None)
    return next(found, block.space)


@instruction("ld")
def _load(i: Instruction) -> Run:
    to, source = flat(i.operands[0]), i.operands[1]
    space, kind, order = _access(i, len(to))
    puts, addresses, dtype = [writer(one, kind) for one in to], reader(source), DTYPES[kind]

    def run(warp: Warp) -> bool:
        lanes, loaded = warp.lanes(), np.zeros((32, len(puts)), dtype)
        at = addresses(warp)[lanes]
        memory, width = space(warp, at), dtype.itemsize
        raw, undefined = memory.load(warp, at, loaded.strides[0], i.line, atomic=bool(order))
        loaded[lanes] = raw.view(dtype)
        for n, put in enumerate(puts):
            put(warp, loaded[:, n])
            if undefined is not None and isinstance(to[n], Register):
                part = undefined[:, n * width : (n + 1) * width]
                definedness.mark(warp, to[n].index, lanes, part, warp.cause)
        if not order:
            return False
        after_access(warp, at, order, reads=True)
        return warp.block.cluster.spins.look(warp, i.line, at.tobytes() + raw.tobytes())

    return run


@instruction("st", results=0)
def _store(i: Instruction) -> Run:
    to, source = i.operands[0], flat(i.operands[1])
    space, kind, order = _access(i, len(source))
    reads, addresses = [reader(one, kind) for one in source], reader(to)

    def run(warp: Warp) -> None:
        lanes = warp.lanes()
        values = np.stack([read(warp)[lanes] for read in reads], 1).view(np.uint8)
        at = addresses(warp)[lanes]
        if order:
            before_access(warp, at, order, writes=True)
        memory = space(warp, at)
        memory.store(warp, at, values, i.line, atomic=bool(order))

    return run


class Places(NamedTuple):
    """What a copy connects: elements of global memory and units of shared memory, both of so many
    bytes.

    Elements that are not ``inside`` become zeros in shared memory, and are not stored in global
    memory.
    """

    elements: Values
    inside: Values
    width: int
    units: Values
    unit: int


class Barrier(Protocol):
    """A `tma.Barrier`, as copies see it."""

    def update(self, arrivals: int = 0, transactions: int = 0) -> None: ...


class Copy(Operation):
    """A bulk copy. A ``barrier`` counts the bytes that have been copied."""

    def __init__(
        self,
        warp: Warp,
        line: int,
        what: str,
        places: Places,
        to_shared: bool = True,
        barrier: Barrier | None = None,
    ):
        super().__init__(warp, line, what)
        self.block, self.to_shared, self.barrier = warp.block, to_shared, barrier
        elements, self.inside, self.width, self.units, self.unit = places
        self.elements = elements[self.inside]
        if warp.block.trace is not None:
            warp.block.trace.follow(warp, self, (), line, self.width * len(self.elements))
        if to_shared:
            self.block.shared.write(warp, self.units, self.unit, self.written, line)
            self.block.space.read(warp, self.elements, self.width, self.read, line, fence=True)
        else:
            self.block.shared.read(warp, self.units, self.unit, self.read, line, fence=True)
            self.block.space.write(warp, self.elements, self.width, self.written, line)
        warp.count_copy(self.elements, self.width, self.units, self.unit)
        self.block.bulk.append((self.agent, line, "written" if to_shared else "read"))

    def fetch(self) -> None:
        if self.to_shared:
            self.values = np.zeros((len(self.inside), self.width), np.uint8)
            self.values[self.inside] = self.block.space.peek(self.elements, self.width)
        else:
            self.values = self.block.shared.peek(self.units, self.unit).reshape(-1, self.width)

    def store(self) -> None:
        if self.to_shared:
            self.block.shared.poke(self.units, self.values.reshape(-1, self.unit))
        else:
            self.block.space.poke(self.elements, self.values[self.inside])
            self.block.gpu.changes += 1
        if self.barrier is not None:
            self.barrier.update(transactions=-self.values.size)


class Copies(Operation):
    """The copies of a group of `cp.async`, which are waited for together.

    Attributes:
        parts: those that Python has added; the core has those that it has added itself.
        done: steps of those that were added so far.
    """

    last_access = "written its shared memory"

    def __init__(self, warp: Warp, line: int):
        super().__init__(warp, line, "a copy", generic=COPIES_NEED_FENCE)
        self.block, self.parts, self.done = warp.block, list[Places](), 0
        self.values: list[Values] = []
        self.native = warp.native.copies(self) if warp.native is not None else None

    def add(self, warp: Warp, line: int, places: Places) -> None:
        """Copy something more; as far as the other copies are done, at once."""
        elements, inside, width, units, unit = places
        events, number = self.block.gpu.events, self.block.number
        read, written = (
            events.add(number, self.agent, self.time + n, line, self.name) for n in (1, 2)
        )
        lanes = warp.lanes()
        self.block.shared.write(warp, units, unit, written, line)
        if warp.block.trace is not None:
            copied = width * int(inside.sum())
            warp.block.trace.follow(warp, self, (read, written), line, copied)
        self.block.space.read(warp, elements[inside], width, read, line, lanes=lanes[inside])
        warp.count_copy(elements[inside], width, units, unit)
        self.parts.append(places)
        for step in (self._fetch_parts, self._store_parts)[: self.done]:
            step()

    def fetch(self) -> None:
        self._fetch_parts()
        if self.native is not None:
            self.native.read()
        self.done = 1

    def store(self) -> None:
        self._store_parts()
        if self.native is not None:
            self.native.write()
        self.done = 2

    def _fetch_parts(self) -> None:
        self.values = []
        for elements, inside, width, _, _ in self.parts:
            values = np.zeros((len(inside), width), np.uint8)
            values[inside] = self.block.space.peek(elements[inside], width)
            self.values.append(values)

    def _store_parts(self) -> None:
        for (_, _, _, units, _), values in zip(self.parts, self.values, strict=True):
            self.block.shared.poke(units, values)
        self.parts.clear()


@instruction("cp.async.cg", "cp.async.ca", results=0)
def _copy(i: Instruction) -> Run:
    """Each thread copies ``size`` bytes: from global memory, or zeros."""
    assert [part.partition("::")[0] for part in i.parts[3:] if part[:2] != "L2"] == [
        "shared",
        "global",
    ]
    size = i.operands[2].bits
    to, source = map(reader, i.operands[:2])
    given = reader(i.operands[3] if len(i.operands) > 3 else i.operands[2], "u32")

    def run(warp: Warp) -> None:
        lanes = warp.lanes()
        counts = given(warp)[lanes]
        if not set(counts.tolist()) <= {0, size}:
            raise PtxError(i.line, "a copy of a part is not modeled")
        places = Places(source(warp)[lanes], counts > 0, size, to(warp)[lanes], size)
        group = warp.groups["cp.async"][-1]
        copies = group[0] if group else None
        if not isinstance(copies, Copies):
            copies = Copies(warp, i.line)
            group.append(copies)
            copies.start(warp.block)
            if warp.native is not None and warp.native.repeat(warp):
                return
        copies.add(warp, i.line, places)

    return run


# Groups: of cp.async and wgmma those of a warp, whose threads issue them together; of bulk copies a
# thread's


def groups_of(warp: Warp, i: Instruction) -> list[list[list[Operation]]]:
    family = i.opcode.partition(".commit_group")[0].partition(".wait_group")[0]
    bulk = family == "cp.async.bulk"
    return (
        [warp.groups[family, lane] for lane in warp.lanes().tolist()]
        if bulk
        else [warp.groups[family]]
    )


@action("cp.async.bulk.commit_group")
@action("cp.async.commit_group", "wgmma.commit_group.sync.aligned", whole=True)
def _commit(warp: Warp, i: Instruction) -> None:
    for groups in groups_of(warp, i):
        groups.append([])
    if warp.native is not None and i.parts[2] == "commit_group":
        warp.native.end_copies()


@action("cp.async.bulk.wait_group")
@action("cp.async.wait_group", "wgmma.wait_group.sync.aligned", whole=True)
def _wait(warp: Warp, i: Instruction, count: Values) -> None:
    """Wait for all groups but the last ``count``; with `read` only until shared memory has been
    read."""
    left = int("read" in i.parts)
    for groups in groups_of(warp, i):
        done = max(0, len(groups) - 1 - int(count[0]))
        if any(groups[:-1]):
            warp.block.gpu.counts.wait(warp.pc - 1, sum(map(bool, groups[done:-1])))
        for group in groups[:done]:
            for one in group:
                one.wait(warp, left)
        if left == 0:
            del groups[:done]
