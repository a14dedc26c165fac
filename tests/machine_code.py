# SPDX-License-Identifier: MIT
"""Machine code of kernels that are compiled for a GPU that is not there: instructions and loops."""

import re
import subprocess
from collections import Counter
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import triton

from benchmarks.driver import Compiled, Wrap, compile_launches

_LINE = re.compile(r"\s*(?:(\.L_\w+):|/\*[0-9a-f]{4,}\*/\s+(?:@(!?\w+)\s+)?(\w[\w.]*)\s*([^;]*?)\s*;)")


class Instruction(NamedTuple):
    """An instruction, such as ``@!P0 BRA `(.L_x_1)``, and the position of the one that it branches to."""

    predicate: str
    opcode: str
    operands: str
    target: int | None


def read(text: str) -> list[Instruction]:
    """The instructions of one kernel, in the order of their addresses, as `nvdisasm -c` prints them."""
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


def cuda_tool(name: str, flag: str, cubin: Path) -> str:
    """What a tool that Triton brings, such as cuobjdump, prints of a compiled kernel."""
    tool = Path(str(triton.__file__)).parent / "backends/nvidia/bin" / name
    return subprocess.run([str(tool), flag, str(cubin)], check=True, capture_output=True, text=True).stdout


def resources(cubin: Path) -> dict[str, int]:
    """What a thread takes: REG, its registers; STACK and LOCAL, bytes that did not fit into them."""
    usage = re.findall(r"(REG|STACK|LOCAL):(\d+)", cuda_tool("cuobjdump", "-res-usage", cubin))
    return {name: int(count) for name, count in usage}


def machine_codes(launch: Callable[[Wrap], object], folder: Path) -> list["MachineCode"]:
    """The machine code of what ``launch(wrap)`` launches, inside `target`. The cubins go to ``folder``."""
    compiled = compile_launches(launch)
    return [MachineCode(one, folder / f"{i}.cubin") for i, one in enumerate(compiled)]


class MachineCode:
    """The machine code of a kernel, its resources, and the constants of its launch.

    Attributes:
        resources: of a thread: REG, its registers; STACK and LOCAL, bytes that did not fit into them.
        shared_memory: bytes of a block.
        tensor_memory: its columns that a block uses; 0 on GPUs without tensor memory.
    """

    def __init__(self, compiled: Compiled, cubin: Path):
        self.options = compiled.options
        self.shared_memory: int = compiled.kernel.metadata.shared
        self.tensor_memory: int = compiled.kernel.metadata.tmem_size
        cubin.write_bytes(compiled.kernel.asm["cubin"])
        self.resources = resources(cubin)
        self.instructions = read(cuda_tool("nvdisasm", "-c", cubin))

    @cached_property
    def opcodes(self) -> Counter[str]:
        return Counter(instruction.opcode for instruction in self.instructions)

    def count(self, pattern: str) -> int:
        return sum(count for opcode, count in self.opcodes.items() if re.fullmatch(pattern, opcode))

    def innermost_loops(self, opcode: str) -> list[list[Instruction]]:
        """The loops in which an instruction matches ``opcode``, a pattern, without those around such a loop.

        A wait that is seldom long is put behind the end, and branches back from there: no loop has an end.
        """
        found = []
        for last, branch in enumerate(self.instructions):
            if branch.target is not None and branch.target <= last:
                loop = self.instructions[branch.target : last + 1]
                ends = any(one.opcode == "EXIT" and not one.predicate for one in loop)
                if not ends and any(re.fullmatch(opcode, one.opcode) for one in loop):
                    found.append(range(branch.target, last + 1))
        inner = [loop for loop in found if not any(set(other) < set(loop) for other in found)]
        return [[self.instructions[i] for i in loop] for loop in inner]
