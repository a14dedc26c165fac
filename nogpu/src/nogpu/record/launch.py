# SPDX-License-Identifier: MIT
"""Records of what a program has launched and captured, and a launch's counters as text."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from nogpu.console import in_columns, plural
from nogpu.machine.counters import Counters, summarize
from nogpu.machine.instruction_counts import Counts
from nogpu.machine.kinds import KINDS
from nogpu.machine.parse import Source
from nogpu.machine.trace import Trace
from nogpu.record.resources import MOST_REGISTERS, Resources, resources
from nogpu.record.roofline import GPU_OF, Bound, bounds
from nogpu.record.source import moved, shown_path
from nogpu.record.time import Estimate, estimates


@dataclass
class Launch:
    """A launch of a kernel.

    Attributes:
        kernel: its name.
        arch: the architecture that it was compiled for, such as "sm_90".
        grid: the number of programs in each dimension.
        warps: the number of warps of a program, or of each CTA of its cluster.
        shared: bytes of shared memory of a CTA.
        seconds: the time of executing it on this CPU, under all schedules.
        instructions: the number that warps have executed, under all schedules.
        configuration: an autotuner's choice: the first one that fits, or each of them.
        printed: lines of ``tl.device_print``.
        ptx: the text that was executed.
        counts: the counts of each instruction, under the first schedule.
        file: the file of the kernel's source.
        launched: the file and the line of the program that launched it.
        trace: that of the first program, and of others, if the emulator records them.
        ctas: the number of CTAs of the cluster that a program is.
        constants: the arguments that the kernel was compiled for, by name, as text.
        specialization: types of the other arguments, such as "*fp32, a multiple of 16", and stages.
        executed: programs of a sample, whose counts were scaled; None: all were executed.
        is_dependent: by programmatic dependent launch it may begin before the one before has ended.
        ended: the fault or the exception that has ended the launch, or a program of it, early.
        entry: the kernel's name in the PTX, if that has several kernels.
        block: of CUDA C++ the threads of a block in each dimension; None: Triton has compiled it.
        static_shared: bytes of shared memory for the kernel's own variables.
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
    counts: Counts = field(init=False, repr=False)  # since the launch has begun
    file: str = field(default="", repr=False)
    launched: tuple[str, int] | None = field(default=None, repr=False)
    trace: Trace | None = field(default=None, repr=False)
    ctas: int = 1
    constants: dict[str, str] = field(default_factory=dict)
    specialization: dict[str, str] = field(default_factory=dict, repr=False)
    executed: int | None = None
    is_dependent: bool = False
    ended: str = ""
    entry: str = ""
    block: tuple[int, int, int] | None = None
    static_shared: int = 0

    @property
    def key(self) -> tuple[str, str]:
        """What launches of one kind have in common: the kernel and the PTX."""
        return self.kernel, self.ptx if self.block is None else f"{self.block} {self.ptx}"

    @cached_property
    def counters(self) -> Counters:
        """What the launch does, by line of the source."""
        before = self.counts.kernel.file
        return summarize(self.counts, lambda source: moved(source, before, self.file))

    @cached_property
    def resources(self) -> Resources | None:
        """Registers and spills; None if there is no ptxas."""
        try:
            return resources(self.ptx, self.arch, self.entry)
        except (OSError, RuntimeError):
            return None

    @property
    def programs(self) -> int:
        """The number of programs of the grid."""
        x, y, z = self.grid
        return x * y * z

    @property
    def programs_of_multiprocessor(self) -> int | None:
        """How many programs, or CTAs, a multiprocessor has at once; None if there is no ptxas."""
        if self.resources is None:
            return None
        return self.resources.resident_programs(self.warps, self.shared, self.arch)

    def fits(self, programs: int, multiprocessors: int) -> bool:
        """Whether so many multiprocessors have so many programs, or CTAs, at once.

        ptxas is asked for the registers where they decide it.
        """
        if programs <= multiprocessors * self._programs_with(MOST_REGISTERS):
            return True
        if programs > multiprocessors * self._programs_with(0):
            return False
        return programs <= self.most_resident(multiprocessors)

    def most_resident(self, multiprocessors: int) -> int:
        """Return how many programs, or CTAs, so many multiprocessors have at once."""
        registers = 0 if self.resources is None else self.resources.registers
        return multiprocessors * self._programs_with(registers)

    def _programs_with(self, registers: int) -> int:
        used = Resources(registers, 0)
        return max(used.resident_programs(self.warps, self.shared, self.arch), 1)

    @cached_property
    def bounds(self) -> list[Bound]:
        """The least time on each GPU of the architecture."""
        return bounds(self.counters, self.programs * self.ctas, self.arch)

    @cached_property
    def time(self) -> dict[str, Estimate]:
        """The estimated time by GPU, first on those of the architecture; none if it has `ended`."""
        return {} if self.ended else estimates(self)

    def __str__(self) -> str:
        name = f"{self.kernel}[{shown_grid(self.grid)}]"
        clusters = f"clusters of {self.ctas} CTAs, " if self.ctas > 1 else ""
        text = (
            f"{name} for {self.arch}: {clusters}{plural(self.warps, 'warp')}, "
            f"{self.shared:,} bytes of shared memory, {self.instructions:,} instructions of warps, "
            f"{self.seconds:.2f} s"
        )
        return f"{text}; autotuned: {self.configuration}" if self.configuration else text

    def counted(self) -> str:
        """Return the launch's counters as text."""
        tables = access_rows(self), work_rows(self)
        return "\n".join([*counted(self), *(in_columns(rows) for rows in tables if len(rows) > 1)])


def shown_grid(grid: tuple[int, int, int]) -> str:
    """Return the programs in each dimension, such as "4×1×1"."""
    return "×".join(map(str, grid))


def counted(launch: Launch) -> list[str]:
    """Return sentences on what a launch takes of a GPU."""
    counters, total = launch.counters, launch.counters.total
    lines = list(filter(None, [of_sample([launch]), of_ended([launch])]))
    if launch.resources is not None:
        each = launch.programs_of_multiprocessor
        what = "CTAs" if launch.ctas > 1 else "programs"
        lines.append(f"{launch.resources}; {what} on a multiprocessor at once: {each}")
    mine = launch.bounds[: len(GPU_OF[launch.arch])]
    lines += [str(one) for one in mine if one.least]  # not of a kernel that only prints
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
        of_warp = total.barriers / (launch.programs * launch.ctas * launch.warps)
        lines.append(f"barriers: each warp arrives at {of_warp:.4g}")
    if total.waits:
        average = total.in_flight / total.waits
        lines.append(
            f"asynchronous copies: after a wait {average:.1f} groups are in flight, at most "
            f"{total.most_in_flight}"
        )
    return lines


def of_sample(launches: Sequence[Launch]) -> str:
    """Return a sentence on programs that were not executed; "" if all were."""
    sampled = [one for one in launches if one.executed is not None and not one.ended]
    if not sampled:
        return ""
    executed = sum(one.executed or 0 for one in sampled)
    programs = sum(one.programs for one in sampled)
    return (
        f"{executed:,} of {programs:,} programs were executed: counts are scaled, and the memory "
        "of the others is as it was"
    )


def of_ended(launches: Sequence[Launch]) -> str:
    """Return a sentence on launches that ended early, by a fault or an exception; or ""."""
    names = [one.ended for one in launches if one.ended]
    if not names:
        return ""
    count = f"{len(names):,} launches" if len(names) > 1 else "the launch"
    return f"{' and '.join(dict.fromkeys(names))} has ended {count} early: counts are incomplete"


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
    return f"{Path(source[0]).name}:{source[1]}" if source is not None else "no line"


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
