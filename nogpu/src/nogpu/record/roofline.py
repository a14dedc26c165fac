# SPDX-License-Identifier: MIT
"""The least time of a launch on several GPUs, by their data sheets: a bound, and not a time.

Each unit of a GPU needs a time for what was counted, as if it worked at its peak from the first to
the last clock, and alone. The launch takes at least the longest of these times (Williams, Waterman
and Patterson, "Roofline", Communications of the ACM 52, 2009).
"""

from typing import NamedTuple

from nogpu.data_sheets import DATA_SHEETS
from nogpu.machine.counters import Counters
from nogpu.machine.instruction_counts import SECTOR

SPECIAL = 16  # results of special functions in a clock and multiprocessor


GPU_OF: dict[str, tuple[str, ...]] = {}  # by architecture
for _name, _sheet in DATA_SHEETS.items():
    _arch = f"sm_{_sheet.capability}"
    GPU_OF[_arch] = (*GPU_OF.get(_arch, ()), _name)


class Bound(NamedTuple):
    """The least time of a launch on a GPU.

    Attributes:
        microseconds: that each unit needs, the longest first.
    """

    gpu: str
    microseconds: dict[str, float]

    @property
    def unit(self) -> str:
        """The unit that needs most."""
        return next(iter(self.microseconds))

    @property
    def least(self) -> float:
        """Microseconds of the launch, at least."""
        return self.microseconds[self.unit]

    def __str__(self) -> str:
        article = "a" if self.gpu[0] == "B" else "an"
        text = f"at least {_time(self.least)} on {article} {self.gpu}, by {self.unit}"
        if self.unit != "memory":
            text += f"; memory alone {_time(self.microseconds['memory'])}"
        return text


def _time(microseconds: float) -> str:
    if microseconds < 1:
        return f"{1000 * microseconds:.3g} ns"
    if microseconds < 1000:
        return f"{microseconds:.3g} µs"
    return f"{microseconds / 1000:.3g} ms"


def bounds(counters: Counters, programs: int, arch: str) -> list[Bound]:
    """Return the bound on each GPU; first on those for which the kernel was compiled.

    Of the others, which would have other instructions, only memory and FLOPs count.
    """
    mine = GPU_OF[arch]
    others = [name for name in DATA_SHEETS if name not in mine]
    return [
        *(bound(counters, programs, name) for name in mine),
        *(bound(counters, programs, name, has_same_code=False) for name in others),
    ]


def bound(counters: Counters, programs: int, gpu: str, has_same_code: bool = True) -> Bound:
    """Return the least time of a launch.

    Memory is read and written once, and no cache holds it before. ptxas may leave out instructions,
    so that their number is no bound. Fewer programs than multiprocessors leave some of these idle.
    """
    sheet, total = DATA_SHEETS[gpu], counters.total
    busy = min(programs, sheet.multiprocessors)
    share, clocks = busy / sheet.multiprocessors, busy * sheet.ghz * 1e3  # in a microsecond
    needed = {
        "memory": (counters.distinct_read + counters.distinct_written)
        * SECTOR
        / (sheet.memory * 1e6),
        "tensor cores": sum(
            count / (sheet.tensor.get(kind, sheet.tensor["f16"]) * share * 1e6)
            for kind, count in total.tensor_flops.items()
        ),
        "floating point": sum(
            count / (sheet.flops[kind] * share * 1e6) for kind, count in total.flops.items()
        ),
    }
    if has_same_code:
        needed |= {
            "special functions": total.special / (SPECIAL * clocks),
            "shared memory": counters.sums("shared").transactions / clocks,
        }
    return Bound(gpu, dict(sorted(needed.items(), key=lambda one: -one[1])))
