# SPDX-License-Identifier: MIT
"""The least time of a launch on several GPUs, by their data sheets: a bound, and not a time.

Each unit of a GPU needs a time for what was counted, as if it worked at its peak from the first to
the last clock, and alone. The launch takes at least the longest of these times (Williams, Waterman
and Patterson, "Roofline", Communications of the ACM 52, 2009).
"""

from collections.abc import Mapping
from typing import NamedTuple

from torchpar.ptx.machine.counters import SECTOR, Counters

SPECIAL = 16  # results of special functions in a clock and multiprocessor


class DataSheet(NamedTuple):
    """What NVIDIA says of a GPU.

    Attributes:
        ghz: the highest clock.
        memory: bandwidth in TB/s.
        tensor: TFLOP/s of tensor cores by format, without sparsity.
        flops: TFLOP/s of the other units, by format.
    """

    multiprocessors: int
    ghz: float
    memory: float
    tensor: Mapping[str, float]
    flops: Mapping[str, float]


_HOPPER = {"f16": 989.4, "tf32": 494.7, "int8": 1978.9, "fp8": 1978.9, "f64": 66.9}
_HOPPER_FLOPS = {"f32": 66.9, "f16": 133.8, "f64": 33.5}
# "NVIDIA A100 Tensor Core GPU Architecture" (SXM, 80 GB), "NVIDIA H100 Tensor Core GPU
# Architecture" (SXM), and the data sheets of H200 (SXM) and HGX B200.
DATA_SHEETS = {
    "A100": DataSheet(
        108,
        1.41,
        2.039,
        {"f16": 312.0, "tf32": 156.0, "int8": 624.0, "f64": 19.5},
        {"f32": 19.5, "f16": 78.0, "f64": 9.7},
    ),
    "H100": DataSheet(132, 1.98, 3.35, _HOPPER, _HOPPER_FLOPS),
    "H200": DataSheet(132, 1.98, 4.8, _HOPPER, _HOPPER_FLOPS),
    "B200": DataSheet(
        148,
        1.98,
        8.0,
        {"f16": 2250.0, "tf32": 1125.0, "int8": 4500.0, "fp8": 4500.0, "f64": 40.0},
        {"f32": 80.0, "f16": 160.0, "f64": 40.0},
    ),
}
GPU_OF = {"sm_80": ("A100",), "sm_90": ("H100", "H200"), "sm_100": ("B200",)}


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
