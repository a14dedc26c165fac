# SPDX-License-Identifier: MIT
"""Machine code of kernels that are compiled for a GPU that is not there: instructions and loops."""

import re
from collections import Counter
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from benchmarks.autotune import Compiled, Wrap, compile_launches, cuda_tool, resources

_LINE = re.compile(r"\s*(?:(\.L_\w+):|/\*[0-9a-f]{4,}\*/\s+(?:@(!?\w+)\s+)?(\w[\w.]*)\s*([^;]*?)\s*;)")


def machine_codes(launch: Callable[[Wrap], object], folder: Path) -> list["MachineCode"]:
    """The machine code of what ``launch(wrap)`` launches, inside `target`. The cubins go to ``folder``."""
    compiled = compile_launches(launch)
    return [MachineCode(one, folder / f"{i}.cubin") for i, one in enumerate(compiled)]


class MachineCode:
    """The machine code of a kernel, its resources, and the arguments of its launch.

    Attributes:
        resources: of a thread: REG, its registers; STACK and LOCAL, bytes that did not fit into them.
        shared_memory: bytes of a block.
        tensor_memory: its columns that a block uses; 0 on GPUs without tensor memory.
    """

    def __init__(self, compiled: Compiled, cubin: Path):
        self.grid, self.arguments, self.options = compiled.grid, compiled.arguments, compiled.options
        self.signature: dict[str, str] = compiled.kernel.src.signature
        self.shared_memory: int = compiled.kernel.metadata.shared
        self.tensor_memory: int = compiled.kernel.metadata.tmem_size
        self.cubin = cubin
        self.cubin.write_bytes(compiled.kernel.asm["cubin"])
        self.resources = resources(cubin)

    @cached_property
    def instructions(self) -> list["Instruction"]:
        return read(cuda_tool("nvdisasm", "-c", self.cubin))

    @cached_property
    def opcodes(self) -> Counter[str]:
        return Counter(instruction.opcode for instruction in self.instructions)

    def innermost_loops(self, opcode: str) -> list[list["Instruction"]]:
        return innermost_loops(self.instructions, opcode)

    def count(self, pattern: str) -> int:
        return sum(count for opcode, count in self.opcodes.items() if re.fullmatch(pattern, opcode))


class Instruction(NamedTuple):
    """An instruction, such as ``@!P0 BRA `(.L_x_1)``.

    Attributes:
        predicate: the condition, such as "!P0"; empty if there is none.
        target: the position of the instruction that it branches to.
    """

    predicate: str
    opcode: str
    operands: str
    target: int | None

    @property
    def goes_on(self) -> bool:
        """Whether the next instruction may follow."""
        ends = re.match(r"(BRA|BRX|JMP|EXIT|RET|KILL)\b", self.opcode)
        # A branch may have its condition as an operand: BRA.U !UP0, `(.L_x_1)
        return not ends or bool(self.predicate or re.match(r"!?U?P\d", self.operands))


def read(text: str) -> list[Instruction]:
    """The instructions of one kernel, in the order of their addresses."""
    labels: dict[str, int] = {}
    found: list[tuple[str, str, str]] = []
    for line in text.splitlines():
        if match := _LINE.match(line):
            label, predicate, opcode, operands = match.groups("")
            if label:
                labels[label] = len(found)
            else:
                found.append((predicate, opcode, operands))

    def target(opcode: str, operands: str) -> int | None:
        match = re.search(r"`\((\.L_\w+)\)", operands) if opcode.startswith("BRA") else None
        return labels[match[1]] if match else None

    return [Instruction(*fields, target(*fields[1:])) for fields in found]


def innermost_loops(instructions: list[Instruction], opcode: str) -> list[list[Instruction]]:
    """The loops in which an instruction matches ``opcode``, a pattern, without those around such a loop."""
    before: list[list[int]] = [[] for _ in instructions]
    for i, instruction in enumerate(instructions):
        if instruction.goes_on and i + 1 < len(instructions):
            before[i + 1].append(i)
        if instruction.target is not None:
            before[instruction.target].append(i)
    loops: dict[int, set[int]] = {}
    for head, sources in enumerate(before):
        for last in sources:
            if last >= head and (body := _loop(before, head, last)):
                loops[head] = loops.get(head, set()) | body
    found = [
        body for body in loops.values() if any(re.fullmatch(opcode, instructions[i].opcode) for i in body)
    ]
    return [
        [instructions[i] for i in sorted(body)] for body in found if not any(other < body for other in found)
    ]


def _loop(before: list[list[int]], head: int, last: int) -> set[int]:
    """The positions from which ``last`` is reached within the loop from ``head``; empty if it is no loop.

    A wait that is seldom long is put behind the end, and branches back from there. Its target is no head of
    a loop: the start reaches the branch without it.
    """
    body, todo = {head}, [last]
    while todo:
        if (i := todo.pop()) not in body:
            body.add(i)
            todo += before[i]
    return body if head == 0 or 0 not in body else set()
