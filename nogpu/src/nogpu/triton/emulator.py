# SPDX-License-Identifier: MIT
"""An emulated GPU: its launches, and their faults."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias
from weakref import WeakKeyDictionary

import torch

from nogpu.data_sheets import ARCHITECTURES, DATA_SHEETS
from nogpu.machine import dependents, gpu
from nogpu.machine.allocation import Allocation
from nogpu.machine.dependents import Access, EarlierGrid
from nogpu.machine.gpu_state import Schedule, TooLarge
from nogpu.machine.instruction_counts import Counts, Progress
from nogpu.machine.memory import Space
from nogpu.machine.parse import Kernel, PtxError, Source, own_error
from nogpu.machine.trace import Trace
from nogpu.native import core as native
from nogpu.record.faults import Fault, HostFault, Kind
from nogpu.record.launch import CapturedGraph, Launch, shown_grid
from nogpu.record.source import moved
from nogpu.report.limits import Limits
from nogpu.report.report import Report
from nogpu.triton import tuning
from nogpu.triton.account import Account
from nogpu.triton.assumptions import Assertions
from nogpu.triton.host_memory import HostMemory, free_memory

# By capability; shared memory of a program at most.
SHARED_BYTES = {sheet.capability: sheet.shared_of_program for sheet in DATA_SHEETS.values()}
MULTIPROCESSORS = {sheet.capability: sheet.multiprocessors for sheet in DATA_SHEETS.values()}
# A launch of CUDA C++ ends after so many errors: each one takes Python, and a missing barrier has
# one for each access. Those of one kind at one line are described so often. Others are only
# counted, and more of them may follow, so that they do not hide faults at other lines.
MOST_DESCRIBED, MOST_ERRORS, MOST_REPEATED = 100, 1000, 20_000
MANY_ERRORS = "many errors"
SECONDS = 0.1  # between two looks at the time and the memory that are left
LEAST_FREE = 2**28  # bytes of memory below which a launch ends, before the system ends the process
TOO_LARGE = "too large"
LEAST_DEPENDENT = 90  # the first capability with programmatic dependent launch
OF_WARP = r" of warp \d+( of CTA \d+)?$"  # in the name of an access
NUMBER = r"-?\b(0x[0-9a-f]+|\d+)\b"  # in a message
Operator: TypeAlias = "torch._ops.OpOverload[..., Any]"  # of PyTorch


class Watcher(Protocol):
    """Something that executes operators and launches in the place of the emulator."""

    def operator(
        self, func: Operator, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> object: ...

    def launch(self, execute: Callable[..., None], arguments: Sequence[object]) -> None: ...

    def has_device(self, tensors: Sequence[torch.Tensor]) -> bool | None:
        """Whether one of the tensors would be on a GPU; None if that is not known."""

    def program(self) -> AbstractContextManager[object]:
        """Return a block in which PyTorch takes the program's names of devices."""

    def tune(self, kernel: str) -> None:
        """An autotuner is about to time a kernel, for which it waits."""


class LastLaunch(NamedTuple):
    """The launch before, which may still run: its kernel, its stream, and grids that it found."""

    kernel: str
    stream: object
    earlier: list[EarlierGrid]


class Emulator(gpu.Gpu):
    """A GPU that `emulate` stands in for: its launches, and the faults that were found in them.

    Attributes:
        launches: the launches, in their order.
        empty: for each launch whose grid has no program, a clause that names both.
        faults: each of them once, by its name, its line of the source, and what was accessed.
        graphs: the CUDA graphs that were captured, in their order.
        watcher: an object that records operators and launches for CUDA graphs, or None.
        has_inner: whether another one was entered within this one, and took its launches.
        inner_launches: the number of those that it and others within it have executed.
        account: what the launches have taken together, and those of an emulator within this one.
    """

    keeps_allocations = False  # `_reset` begins each launch

    def __init__(
        self,
        arch: str,
        schedules: Sequence[Schedule],
        multiprocessors: int,
        traces: int = 0,
        configurations: str = "first",
        sample: int | None = None,
    ):
        super().__init__(schedules[0])
        self.most_programs = sample
        self.configurations = configurations
        self.traces = traces
        self._lock = threading.Lock()
        # Of the first launch of each kernel, by its name and its PTX.
        self._counted_before: dict[tuple[str, str], Counts] = {}
        # The present launch's lines of the PTX and what they come from; None until that is asked.
        self._sources: dict[int, Source] | None = {}
        self.arch, self.capability = arch, ARCHITECTURES[arch]
        self.schedules, self.multiprocessors = schedules, multiprocessors
        self.launches: list[Launch] = []
        self.empty: list[str] = []
        self.faults: list[Fault] = []
        self.printed: list[str] = []
        self.host_memory = HostMemory()
        # Autotuners' caches.
        self.tuned: WeakKeyDictionary[object, dict[object, object]] = WeakKeyDictionary()
        self._by_place: dict[tuple[object, ...], Fault] = {}
        self.graphs: list[CapturedGraph] = []
        self.watcher: Watcher | None = None
        self.has_inner = False
        self.inner_launches = 0
        self.account = Account()
        self._name = self._file = ""
        self._launched: tuple[str, int] | None = None
        self._present: Launch | None = None
        # Of the present launch, under its schedule: errors that were described and others, and by
        # kind, name and line how many faults there are, with the last one that was described.
        self._errors = self._repeated = 0
        self._at_line: dict[tuple[str, str, Source | int], tuple[int, Fault]] = {}
        self._ended = ""  # the fault that has ended a program or the present launch
        self._begun = self._looked = 0.0  # when the launch has begun, and its limits were looked at
        self._asserts = False  # what a kernel assumes is executed, and not the kernel
        self._last: LastLaunch | None = None
        self.stream: Callable[[], object] = lambda: None  # the current one, if there are several

    def report(self) -> Report:
        """Return the report on all launches until now."""
        return Report(self.launches, self.faults, self.graphs)

    def present_launch(self) -> str:
        """Say how far the launch is that is executed; "" between launches.

        Another thread may ask.
        """
        now = self.progress
        is_known = self._lock.locked() and now.count
        return f"{now.done:,} of {now.count:,} programs of {self._name}" if is_known else ""

    def assert_counters(self, kernel: object = None, **limits: float | None) -> None:
        """Check that launches keep limits, so that a test holds how efficient a kernel is.

            gpu.assert_counters(max_sector_ratio=1, max_bank_conflicts=0)

        Args:
            kernel: a kernel, or its name; None: each one.
            limits: `Limits` has them.

        Raises:
            AssertionError: a launch does not keep a limit; the lines of the source are named. Or
                there is no launch.
            TypeError: a limit is not known, or there is none.
        """
        __tracebackhide__ = True  # pytest then shows the line of the test alone
        known = [one.name for one in fields(Limits)]
        given = {key: limit for key, limit in limits.items() if limit is not None}
        if not given or not set(given) <= set(known):
            unknown = sorted(set(given) - set(known))
            what = f"{', '.join(unknown)} is no limit" if unknown else "there is no limit"
            raise TypeError(f"{what}, expected some of {', '.join(known)}")
        held = Limits(**given)  # type: ignore[arg-type]  # which counts are integers
        kernel = getattr(kernel, "__name__", kernel)
        launches = [one for one in self.launches if kernel in (None, one.kernel)]
        if not launches:
            names = sorted({one.kernel for one in self.launches})
            raise AssertionError(
                f"no launch of {kernel or 'a kernel'}; launched: {', '.join(names) or 'nothing'}"
            )
        broken = [f"{launch.kernel}: {text}" for launch in launches for text in held.broken(launch)]
        if broken:
            raise AssertionError("\n".join(dict.fromkeys(broken)))

    def undone(self) -> AbstractContextManager[list[Allocation]]:
        """Undo in memory what launches within the block write; their faults stay.

        The block gets a list of the memory that its launches have accessed.
        """
        return self.host_memory.undone()

    def _reset(self) -> None:
        self.space = Space("global memory")
        self.space.is_deferred = True
        self.progress = Progress()
        self.host_memory.begin(self.space)
        self.counted.clear()
        self._sources = {}
        self._errors, self._repeated, self._at_line = 0, 0, {}

    def _source_of(self, line: int) -> Source:
        """Return the file and the line of the source from which a line of the PTX was compiled."""
        if self._sources is None:
            self._sources = {
                i.line: moved(i.source, self.kernel.file, self._file)
                for i in self.kernel.instructions
            }
        return self._sources.get(line)

    def place_of(self, line: int) -> str:
        """Name a line of the PTX in a message, by that of the source if there is one."""
        source = self._source_of(line)
        return super().place_of(line) if source is None else f"{Path(source[0]).name}:{source[1]}"

    def fault(
        self, kind: str, name: str, line: int, message: str, program: tuple[int, ...]
    ) -> None:
        """Note a fault of a program; the launch goes on."""
        if self._asserts and name == "assertion":
            name, message = "false assumption", "this is false, and the compiler relies on it"
        elif self._asserts:  # the launch itself finds it
            return
        if name == "deadlock":  # its program has not ended
            self._ended = name
        if self.is_counted_only(kind, name, line):
            key = kind, name, self._source_of(line) or line
            count, fault = self._at_line[key]
            self._at_line[key] = count + 1, fault
            fault.count += 1
            self._repeated += kind == "error"
        else:
            self._note(kind, name, line, message, program)
            self._errors += kind == "error"
        is_over = self._errors >= MOST_ERRORS or self._repeated >= MOST_REPEATED
        if is_over and kind == "error" and self._present is not None and self._present.block:
            reason = (
                f"the launch has {self._errors + self._repeated:,} errors so far, and ends here: "
                "what other threads would write stays as it was, and other faults may be hidden; "
                "mend these first"
            )
            error = PtxError(line, reason, MANY_ERRORS)
            error.program = program
            raise error

    def is_counted_only(self, kind: str, name: str, line: int) -> bool:
        if self._present is None or self._present.block is None:
            return False
        key = kind, name, self._source_of(line) or line
        return self._at_line.get(key, (0, None))[0] >= MOST_DESCRIBED

    def _note(
        self, kind: str, name: str, line: int, message: str, program: tuple[int, ...]
    ) -> None:
        # A line of the source becomes several of the PTX, one for each element of a thread, whose
        # messages differ in their numbers alone. Names such as x1 keep their digits.
        source = self._source_of(line)
        key = self._name, kind, name, source or line, re.sub(NUMBER, "", message)
        fault = Fault(
            _kind(kind),
            name,
            message,
            self._name,
            program,
            line,
            source,
            launched=self._launched,
            configuration=tuning.configuration(),
            launch=len(self.launches) + 1,
            what="program" if self._present is None or self._present.block is None else "block",
        )
        self.note(fault, key)
        if key in self._by_place:  # or it is a repeat's
            at = kind, name, source or line
            count = self._at_line.get(at, (0, None))[0]
            self._at_line[at] = count + 1, self._by_place[key]

    def _repeats(self) -> bool:
        """Whether this thread repeats an autotuned kernel's launch, of which nothing is noted."""
        call = tuning.called.get()
        return call is not None and call.is_repeat

    def note(self, fault: Fault, key: tuple[object, ...]) -> None:
        """Note a fault, or count it if there is one with the key."""
        if self._repeats():
            return
        if key in self._by_place:
            self._by_place[key].count_again(fault)
            return
        fault.is_after_sample = bool(self.account.sampled)
        self._by_place[key] = fault
        self.faults.append(fault)

    def is_noted(self, key: tuple[object, ...]) -> bool:
        """Whether there is a fault with the key."""
        return key in self._by_place

    def run(
        self,
        launch: Launch,
        parameters: Callable[[], list[int]],
        file: str,
        assertions: Assertions | None = None,
    ) -> None:
        """Execute a launch under each schedule, from the same memory.

        Args:
            file: of the kernel's source.
            assertions: a kernel that asserts what this one assumes.
        """
        with self._lock:  # threads may launch at the same time
            earlier, self.earlier = self._grids_before(launch), []
            if assertions is not None and not self._repeats():
                self._check_assumptions(launch, assertions, parameters, file)
            self.earlier = earlier
            self._run_schedules(launch, parameters, file)
            if not self._repeats():
                self._last = LastLaunch(launch.kernel, self.stream(), self.earlier)
            self.earlier = []

    def complete_launches(self) -> None:
        """The program, or an operator that is executed now, waits for all launches."""
        self._last = None

    def _grids_before(self, launch: Launch) -> list[EarlierGrid]:
        """Return the grids that may still run when a launch begins, the last one first."""
        last, self._last = self._last, None
        is_dependent = launch.is_dependent and self.capability >= LEAST_DEPENDENT
        if not is_dependent or last is None or last.stream is not self.stream() or self._repeats():
            return []
        names = self.events.names

        def describe(event: int) -> Access:
            what = re.sub(OF_WARP, "", names[int(self.events.what[event])])
            place = self.place_of(int(self.events.lines[event]))
            return Access(f"{what} of {last.kernel}", place, bool(self.events.atomic[event]))

        released = self.released_addresses()
        places = self.space.allocations
        grid = dependents.grid_of(self.events, places, self.controls, released, describe)
        others = [] if dependents.has_waited_first(self.controls) else last.earlier
        return [grid, *others][: dependents.MOST_GRIDS]

    def _check_assumptions(
        self,
        launch: Launch,
        assertions: Assertions,
        parameters: Callable[[], list[int]],
        file: str,
    ) -> None:
        """Execute the assertions, and nothing else: memory is afterwards as before."""
        self._name, self._file, self._launched = launch.kernel, file, launch.launched
        self._present = launch
        self.schedule, self.printed, self.trace = self.schedules[0], [], None
        self.host_memory.saves, self._asserts = assertions.writes, True
        try:
            self._reset()
            with suppress(PtxError):  # such as the trap behind an assertion
                self.launch(assertions.ptx, parameters(), launch.grid, assertions.shared)
        finally:
            self._asserts = False
            self.host_memory.restore()

    def _run_schedules(
        self, launch: Launch, parameters: Callable[[], list[int]], file: str
    ) -> None:
        native.library()  # compiled here, or the first launch would seem to take its seconds
        self._name, self._file, started = launch.kernel, file, time.perf_counter()
        self._present, self._begun = launch, started
        self._launched, self._ended = launch.launched, ""
        last = self.counts
        try:
            # What a repeat is compared with was computed under the last schedule.
            schedules = self.schedules[-1:] if self._repeats() else self.schedules
            seconds = self.account.of_next_launch
            self.most_seconds = None if seconds is None else seconds / len(schedules)
            for number, schedule in enumerate(schedules):
                self.host_memory.saves = number + 1 < len(schedules)
                self._run_schedule(launch, parameters, schedule, is_first=number == 0)
        except BaseException as e:  # such as KeyboardInterrupt: this launch is shown, too
            if isinstance(e, TooLarge):
                name = f"{launch.kernel}[{shown_grid(launch.grid)}]"
                self.note_too_large(f"{name}: {e}", launch.launched, launch.kernel)
            if self.counts is not last:
                launch.ended = TOO_LARGE if isinstance(e, TooLarge) else type(e).__name__
                self._end(launch, started)
            raise
        finally:
            self.host_memory.forget_saved()
        if self.sample is None:
            self.host_memory.keep_unwritten()
        else:  # the others might have written it
            self.host_memory.forget_unwritten()
        self._end(launch, started)

    def _run_schedule(
        self,
        launch: Launch,
        parameters: Callable[[], list[int]],
        schedule: Schedule,
        is_first: bool,
    ) -> None:
        self.schedule, self.printed = schedule, []
        is_new = launch.key not in self._counted_before
        records = is_first and self.traces and is_new
        self.trace = Trace.of_programs(self.traces) if records else None
        launch.trace = launch.trace or self.trace
        self.host_memory.restore()
        self._reset()
        values = parameters()
        try:
            x, y, z = launch.grid
            grid, dynamic = (x * launch.ctas, y, z), launch.shared - launch.static_shared
            self.launch(launch.ptx, values, grid, dynamic, launch.entry, launch.block)
        except PtxError as e:
            self._ended = e.name
            kind = "note" if e.name == MANY_ERRORS else "error"
            self._note(kind, e.name, e.line, e.reason, e.program)
        except MemoryError:
            raise
        except Exception as e:
            own = own_error(e)
            self._ended = own.name
            self._note("error", own.name, own.line, own.reason, own.program)
        finally:
            if is_first:
                launch.counts, launch.file = self.counts, self._file
                launch.executed = None if self.sample is None else self.sample.executed
            launch.ended = self._ended
            launch.instructions += self.executed_instructions
            launch.printed = self.printed

    def check_limits(self) -> None:
        now = time.perf_counter()
        if now - self._looked < SECONDS:
            return
        self._looked, taken, left = now, now - self._begun, self.account.left
        if left is not None and taken > left:
            earlier, done = self.account.seconds, self.progress
            before = f", and earlier launches of the test {earlier:.1f} s" if earlier > 0.05 else ""
            raise TooLarge(
                f"{done.done:,} of {done.count:,} programs took {taken:.1f} s{before}, and the "
                f"limit is {self.account.limit:g} s; take smaller parameters, or sample the "
                "programs"
            )
        there = free_memory()
        if there is not None and there < LEAST_FREE:
            raise TooLarge(
                f"{there / 2**20:,.0f} MiB of memory are free, and the launch would take more; "
                "take smaller parameters"
            )

    def note_too_large(self, message: str, place: tuple[str, int] | None, kernel: str = "") -> None:
        """Note that a line of the program takes more time or memory than it may take."""
        fault = HostFault("error", TOO_LARGE, message, kernel, source=place)
        self.note(fault, (TOO_LARGE, kernel, place))

    def _end(self, launch: Launch, started: float) -> None:
        seconds = time.perf_counter() - started
        self.account.seconds += seconds
        if self._repeats():
            return
        launch.seconds = seconds
        self.account.note(launch)
        # Launches that do the same share what was counted, so that many need little memory.
        kind = launch.key
        before = self._counted_before.setdefault(kind, launch.counts)
        if before is not launch.counts and before.equals(launch.counts):
            launch.counts = before
        self.launches.append(launch)

    def prepare(self, kernel: Kernel) -> None:
        self._sources = None

    def holds(self, blocks: int) -> bool:
        launch = self._present
        return launch is None or launch.fits(blocks, self.multiprocessors)


def _kind(text: str) -> Kind:
    assert text in ("error", "warning", "note")
    return text  # type: ignore[return-value]
