# SPDX-License-Identifier: MIT
"""The core in C and the executor in Python do the same: values, faults and counters.

Each case runs twice, from the same memory.
"""

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from ptx import cases, mutants, tutorials
from ptx.faults import FAULTS
from ptx.launch import Gpu
from ptx.right import RIGHT
from torchpar.ptx import Report, driver, emulate, native
from torchpar.ptx.counters import Counts
from torchpar.ptx.machine import SCHEDULES, Block
from torchpar.ptx.parse import PtxError

pytestmark = pytest.mark.skipif(
    native.library() is None, reason="no C compiler, or TORCHPAR_PTX=python"
)
slow = pytest.mark.slow
# The core executes whole blocks under the first one, and under the others what warps do meanwhile.
TWO = (SCHEDULES[0], SCHEDULES[-1])
# Faults that take Python minutes.
ENDLESS = {"search that stays", "more programs than fit"}


def in_python():
    """Let Python execute all instructions."""
    return patch.object(native, "library", lambda: None)


def said(report: Report) -> list[tuple]:
    """What a report says but for addresses."""
    launches = [
        (one.kernel, one.grid, one.instructions, numbers(one.counts)) for one in report.launches
    ]
    faults = [(one.kind, one.name, one.line, one.source, one.program) for one in report.faults]
    return [*launches, *faults]


def numbers(counts: Counts) -> list:
    """What was counted."""
    both = counts.distinct_read, counts.distinct_written
    return [counts.table.tolist(), counts.distinct.tolist(), *both]


def outside(report: Report) -> set[int]:
    """The lines of accesses out of bounds, beside which any memory may lie."""
    return {one.line for one in report.faults if one.name == "out of bounds"}


def bits(t: Tensor) -> bytes:
    return t.contiguous().view(torch.uint8).numpy().tobytes() if t.numel() else b""


def executed(run: Callable[[], list[tuple[Tensor, ...]]], arch: str) -> tuple[list[Tensor], Report]:
    with patch.object(driver, "SCHEDULES", TWO), emulate(arch, schedules="all") as gpu:
        gpu.limit = 200_000
        results = [pair[0].clone() for pair in run()]
    return results, gpu.report()


def check(run: Callable[[], list[tuple[Tensor, ...]]], arch: str = "sm_90") -> None:
    values, report = executed(run, arch)
    with in_python():
        expected, expected_report = executed(run, arch)
    assert outside(report) == outside(expected_report)
    if not outside(report):
        assert said(report) == said(expected_report)
        assert list(map(bits, values)) == list(map(bits, expected))


@pytest.mark.parametrize(
    "name, arch",
    [
        pytest.param(name, arch, marks=[] if (name[:2], arch) == ("01", 90) else slow)
        for name, case in tutorials.TUTORIALS.items()
        for arch in case.architectures
    ],
)
def test_tutorials(name, arch):
    check(tutorials.TUTORIALS[name].run, f"sm_{arch}")


@pytest.mark.parametrize("name", [pytest.param(name, marks=slow) for name in RIGHT])
def test_right_kernels(name):
    check(RIGHT[name])


def blocks_of_python(run: Callable[[], object]) -> int:
    """How many blocks Python has driven."""
    driven, turns = [], Block.turns

    def noted(block: Block):
        driven.append(block.number)
        return turns(block)

    with patch.object(Block, "turns", noted), emulate("sm_90"):
        run()
    return len(driven)


@triton.jit
def atomics_kernel(x, out, old, n, KIND: tl.constexpr, SEM: tl.constexpr, BLOCK: tl.constexpr):
    """Programs change the same elements, and some threads of a warp the same one."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n)
    to, inside = out + i % 40, i < n
    if KIND == "add":
        before = tl.atomic_add(to, value, mask=inside, sem=SEM)
    elif KIND == "max":
        before = tl.atomic_max(to, value, mask=inside, sem=SEM)
    elif KIND == "min":
        before = tl.atomic_min(to, value, mask=inside, sem=SEM)
    elif KIND == "xchg":
        before = tl.atomic_xchg(to, value, mask=inside, sem=SEM)
    elif KIND == "cas":
        before = tl.atomic_cas(to, value, value + 1, sem=SEM)
    elif KIND == "and":
        before = tl.atomic_and(to, value, mask=inside, sem=SEM)
    elif KIND == "or":
        before = tl.atomic_or(to, value, mask=inside, sem=SEM)
    else:
        before = tl.atomic_xor(to, value, mask=inside, sem=SEM)
    tl.store(old + i, before, mask=inside)


@triton.jit
def reduce_kernel(x, out, n, SEM: tl.constexpr, BLOCK: tl.constexpr):
    """Nobody reads what was there, and a thread has several elements that lie side by side."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(out + i % 256, tl.load(x + i, mask=i < n), mask=i < n, sem=SEM)


INT32, INT64, FLOAT32, FLOAT64 = torch.int32, torch.int64, torch.float32, torch.float64
ATOMICS = [
    *(("add", dtype) for dtype in (INT32, INT64, FLOAT32, FLOAT64, torch.float16, torch.bfloat16)),
    *((kind, dtype) for kind in ("max", "min") for dtype in (INT32, INT64, FLOAT32)),
    *((kind, dtype) for kind in ("xchg", "cas") for dtype in (INT32, INT64)),
    *((kind, dtype) for kind in ("and", "or", "xor") for dtype in (INT32, INT64)),
]
OFTEN = [("add", FLOAT32), ("cas", INT64), ("min", FLOAT32)]


@pytest.mark.parametrize(
    "kind, dtype, sem",
    [
        pytest.param(kind, dtype, sem, marks=[] if (kind, dtype) in OFTEN[: 3 - 2 * n] else slow)
        for kind, dtype in ATOMICS
        for n, sem in enumerate(("relaxed", "acq_rel"))
    ],
)
def test_atomics(kind, dtype, sem):
    n = 3 * 64 + (0 if kind == "cas" else 9)  # an exchange by comparison has no mask
    x = (torch.arange(n) * 37 % 11 - 5).to(dtype)

    def run() -> list[tuple[Tensor, ...]]:
        out, old = torch.zeros(40, dtype=dtype), torch.zeros(n, dtype=dtype)
        atomics_kernel[(triton.cdiv(n, 64),)](x, out, old, n, kind, sem, 64, num_warps=2)
        return [(out,), (old,)]

    check(run)
    assert blocks_of_python(run) == 0


@pytest.mark.parametrize("sem", ["acq_rel", pytest.param("relaxed", marks=slow)])
@pytest.mark.parametrize("dtype", [FLOAT32, pytest.param(torch.float16, marks=slow)])
def test_reductions(dtype, sem):
    x = (torch.arange(1500) * 37 % 11 - 5).to(dtype)

    def run() -> list[tuple[Tensor, ...]]:
        out = torch.zeros(256, dtype=dtype)
        reduce_kernel[(6,)](x, out, 1500, sem, 256, num_warps=1)
        return [(out,)]

    check(run)
    assert blocks_of_python(run) == 0


@triton.jit
def last_sums_kernel(
    x, sums, arrived, out, SEM: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr
):
    """The program that arrives last loads what the others have stored."""
    pid, j, n = tl.program_id(0), tl.arange(0, SIZE), tl.num_programs(0)
    tl.store(sums + pid, tl.sum(tl.load(x + pid * BLOCK + tl.arange(0, BLOCK))))
    tl.debug_barrier()
    if tl.atomic_add(arrived, 1, sem=SEM) == n - 1:
        tl.store(out, tl.sum(tl.load(sums + j, mask=j < n, other=0.0)))


@pytest.mark.parametrize(
    "sem, programs, in_python",
    [
        ("acq_rel", 5, 0),
        ("relaxed", 5, 1),
        pytest.param("release", 5, 1, marks=slow),
        pytest.param("acq_rel", 700, 0, marks=slow),  # the core needs room for more events
    ],
)
def test_what_blocks_learn_of_each_other(sem, programs, in_python):
    """The core knows what an atomic has acquired, and leaves a race to Python."""
    x = torch.arange(programs * 64) % 7 + 1.0

    def run() -> list[tuple[Tensor, ...]]:
        sums, out, arrived = torch.zeros(programs), torch.zeros(1), torch.zeros(1, dtype=INT32)
        size = triton.next_power_of_2(programs)
        last_sums_kernel[(programs,)](x, sums, arrived, out, sem, 64, size, num_warps=2)
        return [(sums,), (out,)]

    check(run)
    assert blocks_of_python(run) == in_python


FEW = ("store without mask", "two programs on one element", "barrier left out")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in FEW else slow)
        for name in FAULTS
        if name not in ENDLESS
    ],
)
def test_faults(name):
    check(FAULTS[name].run)


def noted(run: Callable[[Gpu], object]) -> list[object]:
    """The results under each schedule, or the errors, and what was counted."""
    found: list[object] = []
    for schedule in TWO:
        gpu = Gpu(schedule)
        try:
            results = run(gpu)
            found.append([bits(t) for t in results])
        except PtxError as e:
            found.append((e.name, e.line))
        found += map(numbers, gpu.counted)
    return found


@pytest.mark.parametrize("name", [pytest.param(name, marks=slow) for name in mutants.CASES])
def test_kernels_of_this_package(name):
    run = mutants.CASES[name].execute
    found = noted(run)
    with in_python():
        assert found == noted(run)


@slow
def test_mutants():
    for mutant in mutants.draw():
        case = mutants.CASES[mutant.kernel]

        def run(gpu: Gpu, case: cases.Case = case, mutant: mutants.Mutant = mutant) -> object:
            gpu.change = mutant.change
            gpu.limit = 200_000
            return case.execute(gpu)

        found = noted(run)
        with in_python():
            assert found == noted(run), mutant.describe()
