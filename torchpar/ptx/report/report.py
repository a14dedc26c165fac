# SPDX-License-Identifier: MIT
"""Faults of kernels, and the report of their launches: data first, and a text that prints well."""

import linecache
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torchpar.ptx.machine.counters import KINDS, Counters, Source, summarize
from torchpar.ptx.machine.trace import Trace
from torchpar.ptx.report.resources import Resources, programs_of, resources
from torchpar.ptx.report.roofline import GPU_OF, Bound, bounds
from torchpar.ptx.report.time import Estimate, estimates
from torchpar.tables import in_columns

Kind = Literal["error", "warning", "note"]
MARKS: dict[Kind, str] = {"error": "✗", "warning": "!", "note": "·"}


STARTED_IN = os.environ.get("PWD", "/")
with suppress(OSError):  # the folder may be gone
    STARTED_IN = os.getcwd()


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
        launched: the file and the line of the program that launched the kernel, in the first case.
        configuration: of an autotuned kernel, in the first case.
        launch: the number of that launch among all launches, from 1 on.
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
            f"    program {self.program}: {self.message}"
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


def shown_path(path: str) -> str:
    """Return the name of a file, without the folder that Python was started in."""
    with suppress(ValueError):
        return str(Path(path).relative_to(STARTED_IN))
    return path


def line_of(path: str, number: int, strip: bool = True) -> str:
    """Return a line of a file; "" if there is none."""
    linecache.checkcache(path)  # it may have changed
    line = linecache.getline(path, number)
    return line.strip() if strip else line.rstrip()


@dataclass
class Launch:
    """A launch of a kernel.

    Attributes:
        grid: programs in each dimension.
        warps: of a program, or of each CTA of its cluster.
        shared: bytes of shared memory of a CTA.
        seconds: that executing it took, under all schedules.
        instructions: of warps that were executed, under all schedules.
        configuration: that an autotuner has chosen: the first one that fits, or each of them.
        printed: by ``tl.device_print``.
        ptx: the text that was executed.
        counts: by instruction, under the first schedule.
        file: of the kernel's source.
        launched: the file and the line of the program that launched it.
        trace: of the first program, if the emulator records it.
        ctas: of the cluster that a program is.
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
    counts: Any = field(default=None, repr=False)
    file: str = field(default="", repr=False)
    launched: tuple[str, int] | None = field(default=None, repr=False)
    trace: Trace | None = field(default=None, repr=False)
    ctas: int = 1

    @property
    def key(self) -> tuple[str, str]:
        """What launches of one kind have in common: the kernel and the PTX."""
        return self.kernel, self.ptx

    @cached_property
    def counters(self) -> Counters:
        """What the launch does, by line of the source."""
        before = self.counts.kernel.file
        return summarize(self.counts, lambda source: moved(source, before, self.file))

    @cached_property
    def resources(self) -> Resources | None:
        """Registers and spills; None if there is no ptxas."""
        try:
            return resources(self.ptx, self.arch)
        except (OSError, RuntimeError):
            return None

    @property
    def programs(self) -> int:
        x, y, z = self.grid
        return x * y * z

    @property
    def programs_of_multiprocessor(self) -> int | None:
        """How many programs a multiprocessor has at once; None if there is no ptxas."""
        if self.resources is None:
            return None
        return programs_of(self.resources, self.warps, self.shared, self.arch)

    @cached_property
    def bounds(self) -> list[Bound]:
        """The least time on each GPU of the architecture."""
        return bounds(self.counters, self.programs * self.ctas, self.arch)

    @cached_property
    def time(self) -> dict[str, Estimate]:
        """The estimated time by GPU, first on those of the architecture."""
        return estimates(self)

    def __str__(self) -> str:
        grid = "×".join(map(str, self.grid))
        clusters = f"clusters of {self.ctas} CTAs, " if self.ctas > 1 else ""
        text = (
            f"{self.kernel}[{grid}] for {self.arch}: {clusters}{self.warps} warps, "
            f"{self.shared:,} bytes of shared memory, {self.instructions:,} instructions of warps, "
            f"{self.seconds:.2f} s"
        )
        return f"{text}; autotuned: {self.configuration}" if self.configuration else text

    def counted(self) -> str:
        """Return the launch's counters as text."""
        tables = in_columns(access_rows(self)), in_columns(work_rows(self))
        return "\n".join([*counted(self), *tables])


def moved(source: Source, before: str, file: str) -> Source:
    """Return a source in the kernel's present file; Triton's cache may have an earlier one.

    Args:
        before: the kernel's file when it was compiled.
    """
    if source is None or not file:
        return source
    is_moved = source[0] == before or Path(source[0]).name == Path(file).name
    return (file, source[1]) if is_moved else source


def counted(launch: Launch) -> list[str]:
    """Return sentences on what a launch takes of a GPU."""
    counters, total = launch.counters, launch.counters.total
    lines = []
    if launch.resources is not None:
        each = launch.programs_of_multiprocessor
        lines.append(f"{launch.resources}; programs on a multiprocessor at once: {each}")
    lines += map(str, launch.bounds[: len(GPU_OF[launch.arch])])
    of_tensor, others = sum(total.tensor_flops.values()), sum(total.flops.values())
    if of_tensor or others:
        share = of_tensor / (of_tensor + others)
        lines.append(
            f"{of_tensor:,.0f} FLOPs by tensor cores, {others:,.0f} by others; a share of "
            f"{share:.0%} by tensor cores"
        )
    memory = counters.sums("global")
    if memory.transactions:
        lines.append(
            f"global memory: {memory.transactions:,} sectors, {memory.distinct:,} of them distinct"
        )
    if total.barriers:
        of_warp = total.barriers / (launch.programs * launch.warps)
        lines.append(f"barriers: each warp arrives at {of_warp:.4g}")
    if total.waits:
        average = total.in_flight / total.waits
        lines.append(
            f"asynchronous copies: after a wait {average:.1f} groups are in flight, at most "
            f"{total.most_in_flight}"
        )
    return lines


def access_rows(launch: Launch) -> list[list[str]]:
    """Return a table of the accesses to memory by line, its head first."""
    rows = [
        ["line", "memory", "access", "requests", "bytes", "taken", "least", "per request", "reuse"]
    ]
    for one in launch.counters.accesses:
        reuse = f"{1 - one.distinct / one.transactions:.0%}" if one.distinct else ""
        rows.append(
            [
                _place(one.source),
                one.space,
                one.what,
                f"{one.requests:,}",
                f"{one.bytes:,}",
                f"{one.transactions:,} {one.unit}",
                f"{one.least:,}",
                f"{one.per_request:.4g}",
                reuse,
            ]
        )
    return rows


def work_rows(launch: Launch) -> list[list[str]]:
    """Return a table of the instructions by line and kind, its head first."""
    lines = launch.counters.lines
    kinds = [kind for kind in KINDS if any(kind in line.instructions for line in lines)]
    rows = [["line", "threads", *kinds]]
    for line in lines:
        threads = f"{line.threads / max(line.instruction_count, 1):.1f}"
        counts = (line.instructions.get(kind, 0) for kind in kinds)
        cells = (f"{count:,}" if count else "" for count in counts)
        rows.append([_place(line.source), threads, *cells])
    return rows


def _place(source: Source) -> str:
    return f"{Path(source[0]).name}:{source[1]}" if source is not None else ""


@dataclass
class CapturedGraph:
    """A CUDA graph that the program has captured.

    Attributes:
        captured: the file and the line where the capture began.
        operators: of PyTorch, in a replay.
        launches: of Triton kernels, in a replay.
    """

    captured: tuple[str, int] | None
    operators: int
    launches: int
    replays: int = 0

    def __str__(self) -> str:
        numbers = (self.operators, "operator"), (self.launches, "launch"), (self.replays, "replay")
        endings = {"launch": "es"}
        words = [f"{n} {word}{endings.get(word, 's') * (n != 1)}" for n, word in numbers]
        where = ""
        if self.captured is not None:
            where = f" captured at {shown_path(self.captured[0])}:{self.captured[1]}"
        return f"CUDA graph{where}: {', '.join(words)}"


@dataclass
class Report:
    """What was launched and captured, and what is wrong with it."""

    launches: list[Launch]
    faults: list[Fault]
    graphs: list[CapturedGraph] = field(default_factory=list)

    @property
    def errors(self) -> list[Fault]:
        return [fault for fault in self.faults if fault.kind == "error"]

    def distinct(self) -> list[tuple[Launch, int]]:
        """Return the first one of the launches of each kernel and PTX, and their number."""
        found: dict[tuple[str, str], list[Launch]] = {}
        for launch in self.launches:
            found.setdefault(launch.key, []).append(launch)
        return [(launches[0], len(launches)) for launches in found.values()]

    def counted(self) -> str:
        """Return the counters of the launches as text."""
        blocks = []
        for launch, count in self.distinct():
            title = str(launch) if count == 1 else f"{launch}; the first of {count} launches"
            blocks.append(f"{title}\n{launch.counted()}")
        return "\n\n".join(blocks)

    def as_html(self, title: str) -> str:
        """Return a page that needs no other file."""
        from torchpar.ptx.report.page import as_html

        return as_html(self, title)

    @property
    def summary(self) -> str:
        return summary(self.launches, self.faults)

    def in_order(self) -> list[Fault]:
        """Return the faults, errors first."""
        return sorted(self.faults, key=lambda fault: list(MARKS).index(fault.kind))

    def __str__(self) -> str:
        lines = [str(launch) for launch in self.launches]
        lines += [f"  {line}" for launch in self.launches for line in launch.printed]
        lines += map(str, self.graphs)
        lines += map(str, self.in_order())
        return "\n".join([*lines, self.summary])


def summary(launches: Iterable[Launch], faults: Iterable[Fault]) -> str:
    """Return one line: the numbers of launches, errors, warnings and notes."""
    kinds = [fault.kind for fault in faults]
    numbers = {kind: kinds.count(kind) for kind in MARKS}
    counts = ", ".join(f"{n} {kind}{'s' * (n != 1)}" for kind, n in numbers.items())
    return f"launches: {len(list(launches))}; {counts}"
