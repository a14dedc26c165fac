# SPDX-License-Identifier: MIT
"""Instructions and loops of NVIDIA's machine code, as `nvdisasm -c` prints it."""

import re
from typing import NamedTuple

_LINE = re.compile(r"\s*(?:(\.L_\w+):|/\*[0-9a-f]{4,}\*/\s+(?:@(!?\w+)\s+)?(\w[\w.]*)\s*([^;]*?)\s*;)")


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
