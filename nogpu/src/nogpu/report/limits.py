# SPDX-License-Identifier: MIT
"""Limits of a kernel's counters, which a test can hold without a GPU."""

from collections.abc import Iterator
from dataclasses import dataclass

from nogpu.machine.parse import Source
from nogpu.record.launch import Launch
from nogpu.record.source import line_of, shown_path


@dataclass
class Limits:
    """What `Emulator.assert_counters` holds; None: no limit.

    Attributes:
        max_sector_ratio: sectors of each access to global memory, over the least that its bytes
            need. 1 for accesses side by side.
        max_sectors_per_request: sectors of a request to global memory. 32 float32 side by side take
            4; with 16 bytes a thread they take 16, and a box of TMA takes more.
        max_sectors: sectors of all accesses to global memory together, each as often as it is
            accessed. A kernel that reads its input twice takes more, and its ratio stays 1.
        max_bank_conflicts: wavefronts of each access to shared memory, beyond the least.
        min_copies_in_flight: the most groups of asynchronous copies that are still in flight after
            a wait. With 0 the copies and the products of a loop take turns.
        max_registers: registers of a thread, by ptxas.
        max_spilled_bytes: spilled bytes of a thread, by ptxas.
        min_programs: programs on a multiprocessor at once, by ptxas.
        max_microseconds: the least time by the roofline, on the first GPU of the architecture.
    """

    max_sector_ratio: float | None = None
    max_sectors_per_request: float | None = None
    max_sectors: int | None = None
    max_bank_conflicts: int | None = None
    min_copies_in_flight: int | None = None
    max_registers: int | None = None
    max_spilled_bytes: int | None = None
    min_programs: int | None = None
    max_microseconds: float | None = None

    def broken(self, launch: Launch) -> Iterator[str]:
        """Yield a text for each limit that a launch does not keep."""
        for one in launch.counters.accesses:
            if one.space == "global":
                yield from _over(
                    one.source,
                    f"a {one.what} takes {one.per_request:.4g} sectors a request",
                    one.per_request,
                    self.max_sectors_per_request,
                )
                yield from _over(
                    one.source,
                    f"a {one.what} takes {one.ratio:.4g} times the least sectors",
                    one.ratio,
                    self.max_sector_ratio,
                )
            else:
                yield from _over(
                    one.source,
                    f"a {one.what} has {one.conflicts:,} bank conflicts",
                    one.conflicts,
                    self.max_bank_conflicts,
                )
        if self.min_copies_in_flight is not None:
            total = launch.counters.total
            text = f"after a wait, {total.most_in_flight} groups of copies are in flight at most"
            if not total.waits:
                text = "there is no wait for asynchronous copies"
            yield from _under(text, total.most_in_flight, self.min_copies_in_flight)
        yield from self._of_launch(launch)

    def _of_launch(self, launch: Launch) -> Iterator[str]:
        if self.max_sectors is not None:
            yield from _over(None, *_sectors(launch), self.max_sectors)
        least = launch.bounds[0]
        yield from _over(None, str(least), least.least, self.max_microseconds)
        by_ptxas = self.max_registers, self.max_spilled_bytes, self.min_programs
        if by_ptxas == (None, None, None):
            return
        used, programs = launch.resources, launch.programs_of_multiprocessor
        if used is None or programs is None:
            yield "there is no ptxas, which says how many registers the kernel takes"
            return
        yield from _over(None, str(used), used.registers, self.max_registers)
        yield from _over(None, str(used), used.spilled_bytes, self.max_spilled_bytes)
        if self.min_programs is not None:
            text = f"programs on a multiprocessor at once: {programs}"
            yield from _under(text, programs, self.min_programs)


def _sectors(launch: Launch) -> tuple[str, int]:
    """Return the sectors of a launch, in words with the lines that take them, and as a number."""
    counters = launch.counters
    parts = [
        f"{one.transactions:,} by a {one.what}{_at(one.source, ' in ')}"
        for one in counters.in_space("global")
    ]
    total = counters.sums("global").transactions
    return f"global memory takes {total:,} sectors ({', '.join(parts)})", total


def _at(source: Source, before: str) -> str:
    return f"{before}{shown_path(source[0])}:{source[1]}" if source is not None else ""


def _over(source: Source, text: str, value: float, limit: float | None) -> Iterator[str]:
    if limit is None or value <= limit:
        return
    where = f"{_at(source, '')}: " if source is not None else ""
    code = f"\n    {line_of(*source)}" if source is not None else ""
    most = f"{limit:,}" if isinstance(limit, int) else f"{limit:.4g}"
    yield f"{where}{text}, expected at most {most}{code}"


def _under(text: str, value: float, limit: float) -> Iterator[str]:
    if value < limit:
        yield f"{text}, expected at least {limit:.4g}"
