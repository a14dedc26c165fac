# SPDX-License-Identifier: MIT
"""Faults of kernels, and the report of their launches: data first, and a text that prints well."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Kind = Literal["error", "warning", "note"]
TEMPLATE = Path(__file__).with_suffix(".html")
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
        line: of the PTX.
        source: the file and the line of the Python source; None if the compiler gave none.
        count: how often it happened.
    """

    kind: Kind
    name: str
    message: str
    kernel: str
    program: tuple[int, ...]
    line: int
    source: tuple[str, int] | None
    count: int = 1

    def __str__(self) -> str:
        where = f"line {self.line} of the PTX"
        code = ""
        if self.source is not None:
            path, number = self.source
            where = f"{path}:{number} ({where})"
            code = _line_of(path, number)
        times = f", {self.count} times" if self.count > 1 else ""
        lines = [
            f"{MARKS[self.kind]} {self.kind}: {self.name} in {self.kernel}{times}",
            f"    {where}",
            *([f"        {code}"] if code else []),
            f"    program {self.program}: {self.message}",
        ]
        return "\n".join(lines)


def _line_of(path: str, number: int) -> str:
    try:
        return Path(path).read_text("utf-8").splitlines()[number - 1].strip()
    except (OSError, IndexError):
        return ""


@dataclass
class Launch:
    """A launch of a kernel.

    Attributes:
        grid: programs in each dimension.
        warps: of a program.
        shared: bytes of shared memory of a program.
        seconds: that executing it took, under all schedules.
        instructions: of warps that were executed, under all schedules.
        configuration: that an autotuner has chosen, the first one it has.
        printed: by ``tl.device_print``.
        ptx: the text that was executed.
    """

    kernel: str
    arch: str
    grid: tuple[int, int, int]
    warps: int
    shared: int
    seconds: float = 0.0
    instructions: int = 0
    configuration: str = ""
    printed: list[str] = field(default_factory=list)
    ptx: str = field(default="", repr=False)

    def __str__(self) -> str:
        grid = "×".join(map(str, self.grid))
        text = (
            f"{self.kernel}[{grid}] for {self.arch}: {self.warps} warps, {self.shared:,} bytes of "
            f"shared memory, {self.instructions:,} instructions of warps, {self.seconds:.2f} s"
        )
        return f"{text}; autotuned: {self.configuration}" if self.configuration else text


@dataclass
class Report:
    """What was launched, and what is wrong with it."""

    launches: list[Launch]
    faults: list[Fault]

    @property
    def errors(self) -> list[Fault]:
        return [fault for fault in self.faults if fault.kind == "error"]

    def as_html(self, title: str) -> str:
        """Return a page that needs no other file."""
        from jinja2 import Template  # PyTorch needs it, too

        template = Template(TEMPLATE.read_text("utf-8"), autoescape=True)
        page: str = template.render(
            title=title,
            summary=summary(self.launches, self.faults),
            faults=self._in_order(),
            launches=self.launches,
            code=lambda source: _line_of(*source),
        )
        return page

    def _in_order(self) -> list[Fault]:
        return sorted(self.faults, key=lambda fault: list(MARKS).index(fault.kind))

    def __str__(self) -> str:
        lines = [str(launch) for launch in self.launches]
        lines += [f"  {line}" for launch in self.launches for line in launch.printed]
        lines += map(str, self._in_order())
        return "\n".join([*lines, summary(self.launches, self.faults)])


def summary(launches: Iterable[Launch], faults: Iterable[Fault]) -> str:
    """Return one line: the numbers of launches, errors, warnings and notes."""
    kinds = [fault.kind for fault in faults]
    numbers = {kind: kinds.count(kind) for kind in MARKS}
    counts = ", ".join(f"{n} {kind}{'s' * (n != 1)}" for kind, n in numbers.items())
    return f"launches: {len(list(launches))}; {counts}"
