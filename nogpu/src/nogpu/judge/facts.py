# SPDX-License-Identifier: MIT
"""The notes of a candidate's process on its calls, as JSON has them."""

from typing import TypedDict

from nogpu.record.operator_work import Operation


class Launched(TypedDict):
    """A launch of a kernel of the candidate's.

    Attributes:
        flops: floating-point operations, and those of tensor cores.
        bytes: of sectors that it read and wrote, each counted once.
        microseconds: estimates, by the names of GPUs.
        executed: how many programs were executed, if not all were.
        tf32: whether tensor cores multiplied in TF32.
    """

    kernel: str
    flops: float
    bytes: int
    sectors: int
    resources: str
    microseconds: dict[str, float]
    executed: int | None
    tf32: bool


class Facts(TypedDict, total=False):
    """What a call, or the import, did.

    Attributes:
        error: the type and the first line of the exception that ended it.
        faults: kind, name and line of each.
        operations: those of PyTorch; JSON makes each a list of its fields.
        operator_microseconds: their estimate.
        unordered: kernels on streams that nothing waits for.
        threads, children: how many it has left.
        changed: functions that it has replaced.
        made: what its constructor did.
        weights: whether it has taken the reference's.
        types: the classes of its results.
        unwritten: bytes of its results that nobody has written.
        is_compared: whether results of executed programs can be compared, where some are not.
    """

    error: list[str]
    launches: list[Launched]
    faults: list[list[str]]
    operations: list[Operation]
    operator_microseconds: float
    unordered: list[str]
    threads: int
    children: int
    changed: list[str]
    made: "Facts"
    weights: bool
    types: list[str]
    unwritten: int
    is_compared: bool
