# SPDX-License-Identifier: MIT
"""Loads, stores, and the asynchronous copies of `cp.async`: 9.7.9 of the PTX ISA."""

from collections.abc import Callable
from typing import Any

import numpy as np
import triton

from .machine import Operation, Run, Warp, dtype_of, instruction, reader, unknown, write
from .memory import Event
from .parse import Address, Instruction, PtxError

# Triton 3.6 makes no proxy fence between cp.async and a wgmma that reads what was copied, where a tile has no
# mask. 9.7.15.4 demands it, and Triton 3.8 makes it (triton-lang/triton#9610, #10537).
COPIES_NEED_FENCE = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)
MODIFIERS = {"b8", "b16", "b32", "b64", "v2", "v4", "v8", "L1::evict_first", "L1::evict_last"}


def address_reader(address: Address) -> Callable[[Warp], Any]:
    read = reader(address.base, np.uint64 if getattr(address.base, "dtype", None) == np.uint64 else np.uint32)
    return lambda warp: read(warp).astype(np.int64) + address.offset


def space_of(warp: Warp, name: str) -> Any:
    return warp.block.space if name == "global" else warp.block.shared


@instruction("ld.param")
def _load_parameter(i: Instruction) -> Run:
    put, dtype = write(i.operands[0]), dtype_of(i.parts[-1])
    name = i.operands[1].base.name
    assert i.operands[1].offset == 0
    return lambda warp: put(warp, np.full(32, warp.block.launch.parameters[name], np.uint64).astype(dtype))


def _access(i: Instruction) -> tuple[str, Any, int]:
    """The space, the type and the number of elements of a load or store."""
    space, *modifiers, kind = (part.removesuffix("::cta") for part in i.parts[1:])
    if space not in ("global", "shared") or not {*modifiers, kind} <= MODIFIERS:
        raise unknown(i)
    count = next((int(one[1]) for one in modifiers if one in ("v2", "v4", "v8")), 1)
    return space, np.dtype(dtype_of(kind)), count


@instruction("ld")
def _load(i: Instruction) -> Run:
    space, dtype, count = _access(i)
    to, source = i.operands
    puts, addresses = [write(one) for one in (to if isinstance(to, tuple) else (to,))], address_reader(source)
    assert len(puts) == count

    def run(warp: Warp) -> None:
        at = addresses(warp)
        lanes = warp.lanes()
        found = space_of(warp, space).load(warp, at[lanes], count * dtype.itemsize, i.line)
        loaded = np.zeros((32, count), dtype)
        loaded[lanes] = found.view(dtype)
        for n, put in enumerate(puts):
            put(warp, loaded[:, n])

    return run


@instruction("st", results=0)
def _store(i: Instruction) -> Run:
    space, dtype, count = _access(i)
    to, source = i.operands
    reads = [reader(one, dtype) for one in (source if isinstance(source, tuple) else (source,))]
    addresses = address_reader(to)
    assert len(reads) == count

    def run(warp: Warp) -> None:
        lanes = warp.lanes()
        values = np.stack([read(warp)[lanes] for read in reads], 1).view(np.uint8)
        space_of(warp, space).store(warp, addresses(warp)[lanes], values, i.line)

    return run


# cp.async: each thread copies up to 16 bytes, and waits for groups of its copies


@instruction("cp.async.cg.shared.global", "cp.async.ca.shared.global", results=0)
def _copy(i: Instruction) -> Run:
    """Of ``size`` bytes the first ones come from global memory, and the others are zero."""
    to, source, size, *given = i.operands
    assert i.parts[5:] in ([], ["L2::128B"])
    to, source, size = address_reader(to), address_reader(source), size.bits
    given = reader(given[0], np.uint32) if given else None

    def run(warp: Warp) -> None:
        block, lanes = warp.block, warp.lanes()
        targets, sources = to(warp)[lanes], source(warp)[lanes]
        counts = np.full(32, size) if given is None else given(warp)[lanes]
        if not set(counts.tolist()) <= {0, size}:
            raise PtxError(i.line, "a copy of a part is not modelled")
        some = counts > 0 if given is not None else np.ones(len(lanes), np.bool_)
        event = Event(i.line, f"a copy of warp {warp.index}", generic=COPIES_NEED_FENCE)
        block.events.add(event)
        block.shared.begin_write(warp, targets, size, event)
        if some.any():
            block.space.begin_read(warp, sources[some], size, event)

        def complete() -> None:
            values = np.zeros((len(lanes), size), np.uint8)
            if some.any():
                values[some] = block.space.peek(sources[some], size, i.line)
            block.shared.poke(targets, values, i.line)

        operation = Operation(event, [complete])
        warp.copies.append(operation)
        block.start(operation)

    return run


def finish(warp: Warp, groups: list[list[Operation]], left: int, steps: int = 0) -> None:
    """Wait until at most ``left`` groups have not completed; with ``steps`` left of each operation."""
    for group in groups[: len(groups) - left]:
        for one in group:
            one.advance(steps)
            if one.read is not None:
                warp.knowledge.learn(one.read)
            if steps == 0:
                warp.knowledge.learn(one.event)
    if steps == 0:
        del groups[: len(groups) - left]


@instruction("cp.async.commit_group", results=0, whole=True)
def _commit(i: Instruction) -> Run:
    def run(warp: Warp) -> None:
        warp.copy_groups.append(warp.copies)
        warp.copies = []

    return run


@instruction("cp.async.wait_group", results=0, whole=True)
def _wait(i: Instruction) -> Run:
    left = i.operands[0].bits
    return lambda warp: finish(warp, warp.copy_groups, min(left, len(warp.copy_groups)))
