# SPDX-License-Identifier: MIT
"""Decode instructions: opcodes are registered with functions that make them executable."""

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

from nogpu.machine.parse import (
    Instruction,
    Kernel,
    PtxError,
    Register,
    Symbol,
    flat,
)
from nogpu.machine.registers import (
    ALL,
    Values,
    reader,
    writer,
)

if TYPE_CHECKING:
    from nogpu.machine.block import Warp

Run = Callable[["Warp"], object]  # It returns True where another warp may run first.
Results = int | Callable[[Instruction], int]
Build = Callable[[Instruction], Run]
Action = TypeVar("Action", bound=Callable[..., object])
BUILDERS: dict[str, tuple[Callable[[Instruction], Run], Results, bool]] = {}


def instruction(
    *opcodes: str, results: Results = 1, whole: bool = False
) -> Callable[[Build], Build]:
    """Register a function that makes an instruction of one of the ``opcodes`` executable.

    It raises an error for a form of it that is not known.

    Args:
        results: how many operands, the first ones, are written; or a function that says it.
        whole: all threads of a warp must execute it together (".aligned").
    """

    def register(build: Build) -> Build:
        for opcode in opcodes:
            BUILDERS[opcode] = build, results, whole
        return build

    return register


def elementwise(i: Instruction, function: Callable[..., Values], result: str, *sources: str) -> Run:
    """Apply ``function`` to the operands but the first, which it gives its result; by their
    kinds."""
    put = writer(i.operands[0], result)
    reads = [reader(operand, kind) for operand, kind in zip(i.operands[1:], sources, strict=True)]
    return lambda warp: put(warp, function(*[read(warp) for read in reads]))


def action(*opcodes: str, whole: bool = False, single: bool = False) -> Callable[[Action], Action]:
    """Register a function of a warp, an instruction, and its operands' values in the threads that
    execute it.

    An address is followed by its coordinates. ``single``: one thread alone may execute the
    instruction.
    """

    def register(function: Action) -> Action:
        @instruction(*opcodes, results=0, whole=whole)
        def build(i: Instruction) -> Run:
            reads = []
            for operand in i.operands:
                if operand != Symbol("_"):
                    reads += [
                        reader(operand),
                        *(reader(one) for one in getattr(operand, "coordinates", [])),
                    ]

            def run(warp: "Warp") -> object:
                if warp.mask is ALL and not single:
                    return function(warp, i, *[read(warp) for read in reads])
                lanes = warp.lanes()
                if single and len(lanes) != 1:
                    raise PtxError(
                        i.line, f"{len(lanes)} threads of {warp.name} execute {i.opcode}"
                    )
                return function(warp, i, *[read(warp)[lanes] for read in reads])

            return run

        return function

    return register


@lru_cache(None)
def builder_of(opcode: str) -> tuple[Callable[[Instruction], Run], Results, bool]:
    """Return what was registered for an opcode, or for the longest beginning of it."""
    parts = opcode.split(".")
    prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    found = (BUILDERS[prefix] for prefix in prefixes if prefix in BUILDERS)
    return next(found, (unknown, 1, False))


def decode(kernel: Kernel) -> Kernel:
    """Note which instructions of a kernel whole warps execute, and whether it controls grids."""
    for i in kernel.instructions:
        _, _, i.whole = builder_of(i.opcode)
        if kernel.block is not None and i.parts[0] in ("ret", "exit"):  # a thread ends by itself
            i.whole = False
        kernel.swaps |= (
            kernel.block is not None and i.opcode.startswith("atom") and "cas" in i.parts
        )
        kernel.controls_grids |= i.opcode.startswith("griddepcontrol")
    return kernel


def prepare(i: Instruction) -> Run:
    """Make an instruction executable, when Python executes it first: the core in C does most."""
    try:
        build, results, _ = builder_of(i.opcode)
        run = build(i)
        count = results if isinstance(results, int) else results(i)
    except (LookupError, ValueError, AssertionError, TypeError):
        count, run = 1, unknown(i)
    written = [one for operand in i.operands[:count] for one in flat(operand)]
    i.run, i.writes = run, [one.index for one in written if isinstance(one, Register)]
    return run


OF_TEXTURES = ("tex", "tld4", "txq", "suld", "sust", "sured", "suq")


def unknown(i: Instruction) -> Run:
    """An instruction that is not modeled is an error only where it is executed."""

    def run(warp: "Warp") -> None:
        message = f"the executor does not know {i.opcode}"
        if i.parts[0] in OF_TEXTURES:
            message += ": textures and surfaces are not executed here; pass the array itself"
        raise PtxError(i.line, message, "unknown instruction")

    return run
