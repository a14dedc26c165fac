# SPDX-License-Identifier: MIT
"""Faults of kernels, and of the program around them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from nogpu.record.source import line_of, shown_path

Kind = Literal["error", "warning", "note"]
MARKS: dict[Kind, str] = {"error": "✗", "warning": "!", "note": "·"}


@dataclass
class Fault:
    """Something that a kernel does wrong, or may do wrong. docs/ptx.md says what each name means.

    Attributes:
        kind: an "error" is a fault of the kernel; a "warning" is one in most kernels; a "note" is
            harmless in most kernels.
        name: such as "out of bounds".
        message: what happened in the first case.
        kernel: its name.
        program: its number in each dimension of the grid, in the first case.
        line: the line of the PTX, from 1 on.
        source: the file and the line of the Python source; None if the compiler gave none.
        count: how often it happened.
        launched: the file and the line of the program that launched the kernel, in the first case.
        configuration: that of an autotuned kernel, in the first case.
        other_configurations: those of the other cases.
        launch: the number of that launch among all launches, from 1 on.
        what: "program" of Triton, or "block" of CUDA C++.
        is_after_sample: whether launches before it have executed only some of their programs to
            save time, so that it may come from memory that the others would have written.
    """

    kind: Kind
    name: str
    message: str
    kernel: str
    program: tuple[int, ...]
    line: int
    source: tuple[str, int] | None
    count: int = 1
    launched: tuple[str, int] | None = None
    configuration: str = ""
    launch: int = 1
    what: str = "program"
    other_configurations: list[str] = field(default_factory=list)
    is_after_sample: bool = False

    def count_again(self, case: "Fault") -> None:
        """Count another case of this fault."""
        self.count += 1
        if case.configuration not in ("", self.configuration, *self.other_configurations):
            self.other_configurations.append(case.configuration)

    def in_one_line(self) -> str:
        """Return the file and the line, the kernel, the name and the message as one line."""
        where = f"line {self.line} of the PTX"
        if self.source is not None:
            path, line = self.source
            where = f"{Path(path).name}:{line}"
        kind = "" if self.kind == "error" else f"{self.kind}: "
        where += f", {self.kernel}" if self.kernel else ""  # a fault around the kernels has none
        return f"{where}: {kind}{self.described}"

    @property
    def described(self) -> str:
        """The name and the message. Where the message has a second block, both are named."""
        is_between = self.program and self.name in ("race between blocks", "race between programs")
        own = f"{self.what} {self.program}: " if is_between else ""
        return f"{self.name}: {own}{self.message}"

    def __str__(self) -> str:
        where = f"line {self.line} of the PTX"
        code = ""
        if self.source is not None:
            path, number = self.source
            where = f"{shown_path(path)}:{number} ({where})"
            code = line_of(path, number)
        if self.launched is not None:
            path, number = self.launched
            where += f", launched at {shown_path(path)}:{number}"
            where += f" (launch {self.launch:,})" if self.launch > 1 else ""
        times = f", {self.count} times" if self.count > 1 else ""
        lines = [
            f"{MARKS[self.kind]} {self.kind}: {self.name} in {self.kernel}{times}",
            f"    {where}",
            *([f"        {code}"] if code else []),
            *([f"    configuration {self.configuration}"] if self.configuration else []),
            *(f"    and configuration {one}" for one in self.other_configurations),
            f"    {self.what} {self.program}: {self.message}"
            if self.program
            else f"    {self.message}",
        ]
        return "\n".join(lines)


@dataclass
class HostFault(Fault):
    """Something that the program around the kernels does wrong.

    Attributes:
        source: the line of the program.
        earlier: a word on an earlier line of the program, such as "captured", and that line.
    """

    kernel: str = ""
    program: tuple[int, ...] = ()
    line: int = 0
    source: tuple[str, int] | None = None
    earlier: tuple[str, tuple[str, int]] | None = None

    def __str__(self) -> str:
        times = f", {self.count} times" if self.count > 1 else ""
        lines = [f"{MARKS[self.kind]} {self.kind}: {self.name}{times}"]
        places = [("", self.source), self.earlier or ("", None)]
        for word, place in places:
            if place is not None:
                word = f"{word} at " if word else ""
                lines += [
                    f"    {word}{shown_path(place[0])}:{place[1]}",
                    f"        {line_of(*place)}",
                ]
        return "\n".join([*lines, f"    {self.message}"])


@dataclass
class ConfigurationNote(Fault):
    """A configuration that an autotuned kernel leaves out, and why."""

    def __str__(self) -> str:
        return f"{MARKS[self.kind]} {self.kind}: {self.name} in {self.kernel}: {self.message}"
