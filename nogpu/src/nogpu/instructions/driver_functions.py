# SPDX-License-Identifier: MIT
"""Calls of the functions that a GPU's driver has: printing, and failed assertions: 9.7.12.

Arguments are stored in parameters of the caller, ``st.param``. `vprintf` reads its numbers from the
stack of each thread.
"""

import re
from collections.abc import Iterator
from functools import partial

import numpy as np

from nogpu.machine.block import Warp
from nogpu.machine.decode import Run, action, instruction
from nogpu.machine.parse import (
    BY_POINTER,
    FUNCTION,
    UNKNOWN,
    Instruction,
    PtxError,
    Symbol,
    flat,
    source_name,
)
from nogpu.machine.registers import DTYPES, reader, writer
from nogpu.native.encoding import HINTS

# A conversion of a format: flags, width and precision, the length of an integer, and the letter.
# Other signs "%" are text. A width or a precision "*" is an argument of its own.
CONVERSION = re.compile(
    r"%([-+ 0#]*(?:\d+|\*)?(?:\.(?:\d+|\*)?)?)(ll|l|hh|h|z|t|j)?([diuoxXcspeEfFgGaA%])"
)
ALLOCATORS = {"malloc": "malloc (or new)", "free": "free (or delete)"}


@instruction(".param", ".branchtargets", results=0)
def _declare(i: Instruction) -> Run:
    return lambda warp: None


@instruction("st.param", results=0)
def _store_parameter(i: Instruction) -> Run:
    name, offset = i.operands[0].base.name, i.operands[0].offset
    kind = i.parts[-1]
    (source,) = flat(i.operands[1])
    read = reader(source, kind)

    def run(warp: Warp) -> None:
        warp.arguments[name, offset] = np.array(read(warp))  # fails for undefined bits

    return run


@instruction("call", results=0)
def _call(i: Instruction) -> Run:
    names = [one.name for operand in i.operands for one in flat(operand) if isinstance(one, Symbol)]
    if (allocator := next((one for one in ALLOCATORS if one in names), None)) is not None:
        return partial(_refuse_allocation, i=i, what=ALLOCATORS[allocator])
    known = [name for name in ("vprintf", "__assertfail") if name in names]
    if not known:
        return partial(_refuse_call, i=i)
    if known == ["vprintf"]:
        return lambda warp: _print(warp, i)
    return lambda warp: _fail(warp, i)


def _refuse_call(warp: Warp, i: Instruction) -> None:
    """Refuse a call that `parse.inline` has left: of a recursive function, or by a pointer."""
    functions = {one[2] for one in FUNCTION.finditer(warp.block.gpu.kernel.text)}
    names = [one.name for operand in i.operands for one in flat(operand) if isinstance(one, Symbol)]
    called = next((source_name(one) for one in names if one in functions), "")
    if called:
        reason = f"the recursive function {called} is not executed here; write it as a loop"
    else:
        reason = f"the executor does not know {i.opcode}: {BY_POINTER}"
    raise PtxError(i.line, reason, UNKNOWN)


def _refuse_allocation(warp: Warp, i: Instruction, what: str) -> None:
    reason = (
        f"{what} in a kernel is not executed here; allocate the memory before the launch, and "
        "pass it as an argument"
    )
    raise PtxError(i.line, reason, UNKNOWN)


def _text(warp: Warp, address: int, line: int) -> str:
    """Return the text at an address of global memory, which ends with a zero."""
    place, rows = warp.block.space.locate(np.array([address]), 1, line)
    raw = place.data[int(rows[0]) : place.size].tobytes()
    text: str = raw.partition(b"\0")[0].decode(errors="replace")
    return text


def _print(warp: Warp, i: Instruction) -> None:
    form = _text(warp, int(warp.arguments["param0", 0][warp.lanes()[0]]), i.line)
    for lane in warp.lanes():
        address = int(warp.arguments["param1", 0][lane])
        values: list[int | float] = []
        for length, letter in _arguments(form):
            is_wide = length in ("l", "ll", "z", "t", "j") or letter in "fFeEgGaAps"
            size = 8 if is_wide else 4
            address = -(-address // size) * size
            raw = warp.block.local.peek(np.array([address]), size)[0]
            kind = "f8" if letter in "fFeEgGaA" else f"i{size}" if letter in "di" else f"u{size}"
            values.append(raw.view(kind)[0].item())
            address += size
        given = iter(
            _text(warp, int(value), i.line) if letter == "s" else value
            for value, (_, letter) in zip(values, _arguments(form), strict=True)
        )
        text = CONVERSION.sub(lambda m: "%" if m[3] == "%" else _converted(m, given), form)  # noqa: B023  # used at once
        warp.block.gpu.printed.append(text.rstrip("\n"))
    warp.arguments["retval0", 0] = np.zeros(32, np.uint32)


def _arguments(form: str) -> list[tuple[str, str]]:
    """Return the length and the letter of each argument of a format."""
    found = []
    for flags, length, letter in CONVERSION.findall(form):
        if letter != "%":
            found += [("", "d")] * flags.count("*") + [(length, letter)]
    return found


def _converted(match: re.Match[str], given: Iterator[int | float | str]) -> str:
    """Return the text of a conversion, which takes its arguments from those that are left."""
    letter = match[3]
    flags = re.sub(r"\*", lambda _: str(next(given)), match[1])
    flags = re.sub(r"\.-\d+", "", flags)  # a negative precision is none
    value = next(given)
    if isinstance(value, str):
        return f"%{flags}s" % value
    if letter == "c":
        return chr(int(value) % 256)
    if letter in "aA":
        return float(value).hex()
    if letter == "p":
        return f"{value:#x}"
    return str(f"%{flags}{'d' if letter in 'ui' else letter}" % value)


def _fail(warp: Warp, i: Instruction) -> None:
    lane = warp.lanes()[0]
    message = _text(warp, int(warp.arguments["param0", 0][lane]), i.line)
    if warp.block.gpu.kernel.block is not None:  # which ends the kernel
        reason = f"{warp.thread(int(lane))}: {message}"
        raise PtxError(i.line, reason, "assertion")
    thread = f"thread {warp.first_thread + int(lane)}{warp.block.suffix}"
    warp.fault("error", "assertion", i.line, f"{thread}: {message}")


@action("trap", "brkpt")
def _trap(warp: Warp, i: Instruction) -> bool:
    """The program ends, as after an assertion that has failed."""
    raise PtxError(i.line, "the program was ended by a trap", "trap")


@instruction(*HINTS, results=0)
def _hint(i: Instruction) -> Run:
    """What changes no result."""
    return lambda warp: None


@instruction("createpolicy")
def _policy(i: Instruction) -> Run:
    put = writer(i.operands[0], "b64")
    return lambda warp: put(warp, np.zeros(32, DTYPES["b64"]))
