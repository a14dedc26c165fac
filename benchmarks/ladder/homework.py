# SPDX-License-Identifier: MIT
"""Sentences for a report on a student's own functions: their ratios, and what explains them."""

import csv
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from ..results import Result, number
from .cases import LadderCase
from .page import ASKED, beside_asked, label, seconds, span

# The functions of one homework, by operator: for a GPU, by Numba, and in pure Python.
KINDS = {
    "maximum": ("max_gpu", "max_numba", "max_cpu"),
    "matmul_t": ("matmul_transpose_gpu", "matmul_transpose_numba", "matmul_transpose_trivial"),
}
MEASURED = Path(__file__).parents[1] / "results" / "nvidia-h200" / "ladder.csv"
GAIN = 1.2  # below which more cores have gained nothing
SLOW = 0.5  # times the speed of the ladder's loops, below which a student's have a sentence
QUICK = "--quick: the calls are too short to compare. Leave it out for the ratios of a report."
WIDE = 2.0  # the 80% quantile over the 20% quantile, above which a ratio is rough


def lines(case: LadderCase, results: Sequence[Result], is_quick: bool = False) -> Iterator[str]:
    """The ratios of a student's functions of a case; an H200's times where there is no GPU.

    Args:
        is_quick: the case is a small one, whose times cannot be compared.
    """
    own = [one for one in results if ": " in one.contestant and one.ok]
    if is_quick and any(one.p50_ms for one in own):
        yield QUICK
    gpu, numba, loops = (
        [one for one in own if one.contestant.endswith(f": {name}")]
        for name in KINDS.get(case.operator, ("", "", ""))
    )
    yield from ratios(gpu, numba)
    yield from ratios(gpu, loops, asked=True)
    yield from without_time(gpu, loops)
    yield from ratios(numba, loops)
    yield from on_cores(numba)
    if case.operator == "matmul_t":  # of the two that have homework, the one with sums
        yield from adds_in_order(numba)
    yield from on_one_core(loops)
    yield from over_lists(loops)
    if case.operator in KINDS and not any(one.p50_ms for one in gpu):
        yield from elsewhere(case)


def ratios(fast: Sequence[Result], slow: Sequence[Result], asked: bool = False) -> Iterator[str]:
    """Say how many times as fast as the second function the first one is, on all cores.

    Args:
        asked: also say whether that is as many times as the exercise asks for, if it does.
    """
    second = next((one for one in slow if is_whole(one)), None)
    for one in fast:
        if second is None or not second.p50_ms or not one.p50_ms or not is_whole(one):
            continue
        times = second.p50_ms / one.p50_ms
        judged = beside_asked(times, one.case["workload"]) if asked else ""
        note = ", without copies" * str(one.columns["note"]).endswith("without copies")
        faster = f"{number(times)} times as fast as {name_of(second)}"
        yield f"{name_of(one)}{note}: {faster}{judged}.{rough(one, second)}"


def rough(*rows: Result) -> str:
    """Say which of the times that make a ratio spread too far for its digits."""
    wide = [
        f"{label(one).partition(': ')[2]} took {span(one.p20_ms, one.p80_ms)}"
        for one in rows
        if one.p20_ms and one.p80_ms and one.p80_ms > WIDE * one.p20_ms
    ]
    return f" This is rough: {', and '.join(wide)} (p20–p80)." * bool(wide)


def without_time(gpu: Sequence[Result], loops: Sequence[Result]) -> Iterator[str]:
    """Say that functions which were executed without a GPU have no ratio, only a bound."""
    for one in gpu:
        if not one.columns.get("executed"):
            continue
        over = "".join(f" over {name_of(second)}" for second in loops[:1])
        text = "no GPU, so no time"
        if beside_asked(0.0, one.case["workload"]):
            text += f", and whether it is at least {ASKED} is unknown"
        if least := one.columns.get("least_us"):
            text += f"; at least {seconds(least / 1e3)} is a bound on an H100, not a time"
        yield f"{name_of(one)}{over}: {text}."


def name_of(one: Result) -> str:
    """The name of a student's function, without its file."""
    return one.contestant.partition(": ")[2]


def cores_of(one: Result) -> str:
    """The end of a row's note, which names cores and threads if it has them."""
    return str(one.columns["note"]).rpartition(", ")[2]


def is_whole(one: Result) -> bool:
    """Whether the row is that of all cores."""
    note = cores_of(one)
    return note.startswith(("all ", "the only ")) or not note.endswith(("core", "cores"))


def on_cores(rows: Sequence[Result]) -> Iterator[str]:
    """Say what the most cores gain over one, and why more threads than cores gain nothing."""
    for contestant in dict.fromkeys(one.contestant for one in rows):
        timed = [one for one in rows if one.p50_ms and one.contestant == contestant]
        shared = [one for one in timed if "thread" in cores_of(one)]
        counted = [one for one in timed if one not in shared]
        if len(counted) > 1 and cores_of(counted[0]) == "1 core":
            yield gain(counted[0], counted[-1])
        if not shared:
            continue
        *counts, last = (cores_of(one).partition(" ")[0] for one in shared)
        numbers = " and ".join(filter(None, (", ".join(counts), last)))
        yield (
            f"{name_of(shared[0])}: {numbers} {cores_of(shared[0]).partition(' ')[2]} share "
            "them: a core computes for one thread at a time, so that they add no arithmetic, and "
            "each switch between threads costs some microseconds."
        )


def gain(first: Result, last: Result) -> str:
    """The gain of the second row's cores over the first row's one core."""
    assert first.p50_ms
    assert last.p50_ms
    times = first.p50_ms / last.p50_ms
    advice = (
        " Only loops over prange, by njit(parallel=True), take several; the memory, or other "
        "programs, may bound those."
    ) * (times < GAIN)
    faster = f"{number(times)} times as fast as on 1 core"
    return f"{name_of(last)}: on {cores_of(last)} {faster}.{rough(last, first)}{advice}"


def adds_in_order(rows: Sequence[Result]) -> Iterator[str]:
    """Say why a product by Numba is slower than the ladder's, which may reorder its sums."""
    for one in rows:
        times = one.columns.get("faster")
        if one.columns.get("than") == "njit" and times and times < SLOW:
            yield (
                f"{label(one).partition(': ')[2]}: {number(times)} times as fast as njit, which "
                "here may add in any order, by njit(fastmath={'reassoc', 'contract'}), so that the "
                "processor adds several numbers of a sum at once. If yours has no fastmath, it "
                "adds one at a time."
            )


def on_one_core(rows: Sequence[Result]) -> Iterator[str]:
    """Say why functions in pure Python have no rows by cores."""
    for one in rows:
        if one.p50_ms:
            reason = "it is one thread of Python"
            yield f"{name_of(one)} takes one core, however many there are: {reason}."


def over_lists(rows: Sequence[Result]) -> Iterator[str]:
    """Say why loops over arrays are slower than the ladder's, which are over lists."""
    for one in rows:
        times = one.columns.get("faster")
        if one.columns.get("than") == "pure Python" and times and times < SLOW:
            yield (
                f"{name_of(one)} is {number(times)} times as fast as pure Python, whose loops are "
                "over lists. If yours read A[i, j] of an array, each makes a new object, and a "
                "list has it already: loops over A.tolist(), or njit, do without."
            )


@cache
def measured_on_gpu() -> dict[tuple[str, str], dict[str, str]]:
    """The rows of an H200 by workload and contestant; none where the file is not."""
    if not MEASURED.is_file():
        return {}
    with MEASURED.open(encoding="utf-8", newline="") as file:
        return {(row["workload"], row["contestant"]): row for row in csv.DictReader(file)}


def elsewhere(case: LadderCase) -> Iterator[str]:
    """Say what an H200 took for the case, and why copies cost so much."""
    rows = measured_on_gpu()
    alone = rows.get((case.label, "torchpar GPU"))
    copied = rows.get((case.label, "torchpar GPU, with copies"))
    if alone is None or copied is None:
        return
    times, with_copies = float(alone["over_pure_python"]), float(copied["over_pure_python"])
    took, whole = float(alone["p50_ms"]), float(copied["p50_ms"])
    moved = sum(one.nbytes for one in case.arguments) + 4 * case.expected.size
    yield (
        f"Measured on an H200: torchpar GPU {seconds(took)}, {number(times)} times as fast as pure "
        f"Python on its host{beside_asked(times, case.label)}; with copies {seconds(whole)}, "
        f"{number(with_copies)} times{beside_asked(with_copies, case.label)}."
    )
    yield (
        f"Copies take {100 * (1 - took / whole):.1f}% of that: {moved / 1e6:.0f} MB pass from the "
        f"computer's memory to the GPU and back at {moved / whole / 1e6:.2g} GB/s. Keep arrays on "
        "the GPU between operators."
    )
