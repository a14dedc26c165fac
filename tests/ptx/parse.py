# SPDX-License-Identifier: MIT
"""Parse the text of a PTX kernel into instructions whose operands are numbered registers."""

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

REGISTERS = {"pred": np.bool_, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64}
_IGNORED = re.compile(r"^\s*\.(loc|file|pragma|section)\b.*$", re.MULTILINE)
_COMMENT = re.compile(r"//.*$", re.MULTILINE)
_STATEMENT = re.compile(r"\s*(?:([{}])|([\w$]+):(?!:)|([^;{}]*(?:\{[^}]*\}[^;{}]*)*);)")
_TOKEN = re.compile(r"\[[^\]]*\]|\{[^}]*\}|[^,\s|]+(?:\s*\+\s*\d+)?")


@dataclass(frozen=True)
class Register:
    index: int
    dtype: type


@dataclass(frozen=True)
class Constant:
    bits: int


@dataclass(frozen=True)
class Symbol:
    """A special register such as %tid.x, the shared memory `global_smem`, or a label."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Address:
    """``[base + offset]``, or of a tensor ``[base, {coordinates}]``."""

    base: Any
    offset: int = 0
    coordinates: tuple[Any, ...] = ()


@dataclass
class Instruction:
    """``@guard opcode operands``; a guard that must be false has ``negated``."""

    line: int
    opcode: str
    operands: list[Any]
    guard: Register | None = None
    negated: bool = False
    target: int = -1  # of a branch

    @property
    def parts(self) -> list[str]:
        return self.opcode.split(".")


@dataclass
class Kernel:
    """A kernel's instructions; ``parameters`` are the names and dtypes of its arguments."""

    name: str
    threads: int
    parameters: list[tuple[str, str]]
    instructions: list[Instruction] = field(default_factory=list)
    dtypes: list[type] = field(default_factory=list)  # of registers


class PtxError(Exception):
    """A fault of the program that is executed, with its line."""

    def __init__(self, line: int, message: str):
        super().__init__(f"line {line}: {message}")


def parse(text: str) -> Kernel:
    """The one kernel of ``text``. Its lines keep their numbers."""
    start = text.index(".entry")
    head = re.compile(r"\.entry\s+(\w+)\(([^)]*)\)\s*((?:\.\w+\s+[\d, ]+\s*)*)").match(text, start)
    assert head is not None
    threads = re.search(r"\.reqntid\s+(\d+)", head[3])
    parameters = re.findall(r"\.param\s+\.(\w+)\s[^,]*?(\w+)\s*(?:,|$)", head[2])
    kernel = Kernel(head[1], int(threads[1]) if threads else 0, [(name, dtype) for dtype, name in parameters])
    body = _COMMENT.sub("", _IGNORED.sub("", text[head.end() :]))
    return _Parser(kernel, body, text.count("\n", 0, head.end()) + 1).parse()


class _Parser:
    """Registers and labels of inner blocks ``{ … }``, which inline assembly has, hide those of outer ones."""

    def __init__(self, kernel: Kernel, body: str, line: int):
        self.kernel, self.body, self.line = kernel, body, line
        self.scopes: list[dict[str, Any]] = []
        self.branches: list[tuple[Instruction, list[dict[str, Any]]]] = []

    def parse(self) -> Kernel:
        position = 0
        while True:
            match = _STATEMENT.match(self.body, position)
            assert match is not None, (
                f"line {self.line}: cannot parse {self.body[position : position + 60]!r}"
            )
            brace, label, statement = match.groups()
            first = match.start(match.lastindex or 0)
            self.line += self.body.count("\n", position, first)
            line = self.line
            if brace == "{":
                self.scopes.append({})
            elif brace == "}":
                self.scopes.pop()
                if not self.scopes:
                    break
            elif label:
                self.scopes[-1][label] = len(self.kernel.instructions)
            elif statement.strip():
                self.statement(line, statement.strip())
            self.line += self.body.count("\n", first, match.end())
            position = match.end()
        for branch, scopes in self.branches:
            (name,) = (one.name for one in branch.operands)
            branch.target = next(scope[name] for scope in reversed(scopes) if name in scope)
        return self.kernel

    def statement(self, line: int, text: str) -> None:
        if text.startswith(".reg"):
            _, kind, *names = text.replace(",", " ").split()
            for name in names:
                stem, _, count = name.partition("<")
                many = [f"{stem}{i}" for i in range(int(count[:-1]))] if count else [stem]
                for one in many:
                    self.scopes[-1][one] = Register(len(self.kernel.dtypes), REGISTERS[kind[1:]])
                    self.kernel.dtypes.append(REGISTERS[kind[1:]])
            return
        match = re.match(r"(?:@(!?)([\w%]+)\s+)?([\w.:]+)\s*(.*)", text, re.DOTALL)
        assert match is not None, f"line {line}: cannot parse {text!r}"
        negated, guard, opcode, operands = match.groups()
        tokens = _TOKEN.findall(operands)
        instruction = Instruction(line, opcode, [self.operand(one) for one in tokens])
        if guard:
            instruction.guard, instruction.negated = self.operand(guard), negated == "!"
        if instruction.parts[0] == "bra":
            self.branches.append((instruction, list(self.scopes)))
        self.kernel.instructions.append(instruction)

    def operand(self, text: str) -> Any:
        text = text.strip()
        if text.startswith("{"):
            return tuple(self.operand(one) for one in text[1:-1].split(",") if one)
        if text.startswith("["):
            base, _, coordinates = text[1:-1].partition(",")
            base, _, offset = base.partition("+")
            return Address(self.operand(base), int(offset or 0), self.operand(coordinates or "{}"))
        for scope in reversed(self.scopes):
            if isinstance(scope.get(text), Register):
                return scope[text]
        if re.match(r"0[fd][0-9A-Fa-f]+$", text):
            return Constant(int(text[2:], 16))
        if re.match(r"-?(0x[0-9A-Fa-f]+|\d+)U?$", text):
            return Constant(int(text.rstrip("U"), 0))
        name, _, offset = text.partition("+")
        return Symbol(name.strip(), int(offset or 0))
