# SPDX-License-Identifier: MIT
"""Atomics, and fences of memory: 9.7.13 of the PTX ISA.

Atomics at one address do not race with each other. A release at an address, and an acquire there
afterwards, order what the two programs do before and after. A relaxed access orders nothing, but
with a fence: one before a relaxed write releases, and one after a relaxed read acquires.
"""

from collections.abc import Callable

import numpy as np

from nogpu.instructions.arithmetic import larger
from nogpu.machine.block import Warp
from nogpu.machine.decode import Run, action, instruction
from nogpu.machine.parse import Instruction, flat, qualifiers
from nogpu.machine.registers import (
    DTYPES,
    HALVES,
    PAIRS,
    DType,
    Values,
    decode,
    encode,
    reader,
    writer,
)

Function = Callable[[Values, Values], Values]  # of the old value and the operand

FUNCTIONS: dict[str, Function] = {
    "add": np.add,
    "exch": lambda old, new: new,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "min": np.minimum,
    "max": np.maximum,
    "inc": lambda old, limit: np.where(old >= limit, old.dtype.type(0), old + old.dtype.type(1)),
    "dec": lambda old, limit: np.where((old == 0) | (old > limit), limit, old - old.dtype.type(1)),
}
OF_FLOATS: dict[str, Function] = {
    "add": np.add,
    "exch": lambda old, new: new,
    "max": larger,
    "min": lambda a, b: -larger(-a, -b),
}


@instruction("atom")
def _atom(i: Instruction) -> Run:
    return _atomic(i, flat(i.operands[0]), i.operands[1:])


@instruction("red", results=0)
def _reduce(i: Instruction) -> Run:
    return _atomic(i, [], i.operands)


def _atomic(i: Instruction, to: list[object], operands: list[object]) -> Run:
    (name, *vector, kind), order, in_shared = qualifiers(i)
    raw = DTYPES[HALVES.get(kind, kind)]
    address = reader(operands[0])
    sources = [[reader(one, _bits(kind)) for one in flat(operand)] for operand in operands[1:]]
    count = len(sources[0])
    # Of the scope of a program, it is no atomic for other programs.
    is_atomic = in_shared or "cta" not in i.parts
    assert vector in ([], [f"v{count}"])
    puts = [writer(one, _bits(kind)) for one in to]
    combine = combination(name, kind)

    def run(warp: Warp) -> bool:
        space = warp.block.shared if in_shared else warp.block.space
        lanes = warp.lanes()
        addresses = address(warp)[lanes]
        values = [[read(warp)[lanes].view(raw) for read in source] for source in sources]
        if is_atomic and not in_shared:
            before_access(warp, addresses, order or "relaxed", writes=True)
        results = np.zeros((32, count), raw)
        width = raw.itemsize
        warp.count_access(space, addresses, width * count)
        for n in range(count):
            at = addresses + n * width
            event = warp.event(i.line, "an atomic", is_atomic)
            for place, rows, where in space.pieces(warp, at, width, i.line, "store"):
                space.change(warp, place, rows, width, event, i.line, is_atomic, name != "exch")
                warp.count_place(place, rows * width)
                memory = place.data.view(raw)
                chosen = np.arange(len(lanes))[where]
                # One thread after the other: several may have one address.
                for row, k in zip(rows.tolist(), chosen.tolist(), strict=True):
                    old = memory[row : row + 1].copy()
                    results[lanes[k], n] = old[0]
                    new = combine(old, *[source[n][k : k + 1] for source in values])
                    warp.block.gpu.changes += bool((new != old).any())
                    memory[row : row + 1] = new
        for n, put in enumerate(puts):
            put(warp, np.ascontiguousarray(results[:, n]))
        if is_atomic and not in_shared:
            after_access(warp, addresses, order or "relaxed", reads=True)
        found = addresses.tobytes() + results.tobytes()
        return not in_shared and warp.block.cluster.spins.look(warp, i.line, found)

    return run


def combination(name: str, kind: str) -> Callable[..., Values]:
    """Return the function of the old value and the operands, as bits, that gives the new value."""
    if name == "cas":

        def swap(old: Values, compared: Values, new: Values) -> Values:
            return np.where(old == compared, new, old)

        return swap
    if name == "exch":
        return lambda old, new: new
    function = (OF_FLOATS if _is_float(kind) else FUNCTIONS)[name]
    raw = DTYPES[HALVES.get(kind, kind)]

    def combine(old: Values, value: Values) -> Values:
        return _raw(kind, function(_numbers(kind, old), _numbers(kind, value)), raw)

    return combine


def _bits(kind: str) -> str:
    return HALVES.get(kind, kind)


def _is_float(kind: str) -> bool:
    return kind[0] == "f" or kind.startswith("bf")


def _numbers(kind: str, raw: Values) -> Values:
    return decode(kind, raw) if kind in HALVES else raw.view(DTYPES[kind])


def _raw(kind: str, numbers: Values, raw: DType) -> Values:
    if kind in PAIRS or kind in HALVES:
        return encode(kind, numbers)
    return np.asarray(numbers, DTYPES[kind]).view(raw)


def before_access(warp: Warp, addresses: Values, order: str, writes: bool) -> None:
    """Release what an atomic access at ``addresses`` releases."""
    if not writes:
        return
    known = None
    if order in ("release", "acq_rel"):
        known = warp.clocks.release(warp.index)
    elif warp.released is not None:  # a fence was before
        known = warp.released
    if known is not None:
        for address in set(addresses.tolist()):
            warp.publish(address, known)


def after_access(warp: Warp, addresses: Values, order: str, reads: bool) -> None:
    """Acquire what an atomic access at ``addresses`` acquires."""
    if not reads:
        return
    for address in set(addresses.tolist()):
        if order in ("acquire", "acq_rel"):
            warp.acquire(address)
        else:
            warp.relaxed.append(address)


@action("fence", "membar")
def _fence(warp: Warp, i: Instruction) -> None:
    """``fence.acq_rel``, ``fence.sc`` and ``membar``: relaxed accesses around it are ordered."""
    assert "proxy" not in i.opcode
    warp.fence_memory()


@action("fence.mbarrier_init")
def _fence_init(warp: Warp, i: Instruction) -> None:
    """It orders the initialization of mbarriers for other blocks of a cluster."""
    warp.released_mbarriers |= warp.own_mbarriers
