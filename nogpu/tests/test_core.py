# SPDX-License-Identifier: MIT
"""The core in C and the executor in Python do the same: values, faults and counters.

Each case runs twice, from the same memory.
"""

import ctypes
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
import triton
import triton.language as tl
import tutorials
from faults import FAULTS, scratch_memory
from right import RIGHT
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nogpu import Report, emulate
from nogpu.instructions import tensor_cores
from nogpu.machine.block import Block
from nogpu.machine.gpu_state import SCHEDULES, Schedule
from nogpu.machine.instruction_counts import Counts
from nogpu.native import core as native
from nogpu.native import layout

pytestmark = pytest.mark.skipif(
    native.library() is None, reason="no C compiler, or NOGPU_EXECUTOR=python"
)
slow = pytest.mark.slow
# The core executes whole blocks under the first one, and under the others what warps do meanwhile.
TWO = (SCHEDULES[0], SCHEDULES[-1])
# Code for another GPU differs from that for sm_90 in instructions, not in schedules.
OF_ARCHITECTURE = {"sm_90": TWO, "sm_80": TWO[:1], "sm_100": TWO[1:]}
# Tutorials with instructions for another GPU than sm_90 that no other tutorial has. They have both
# schedules among the two.
ALSO_ON = {
    "02 fused softmax": 100,
    "03 matmul, float8 e4m3": 100,
    "03 matmul, float8 e5m2": 80,
    "03 matmul by clusters of two CTAs": 100,
    "05 layer norm, backward": 100,
    "06 attention": 100,
    "06 attention by specialized warps": 100,
    "06 attention, backward": 100,
    "09 persistent matmul by specialized warps": 80,
}
# Of the instructions of a warp; no kernel without an endless loop has 6,000. Python executes some
# 10,000 in a second.
LIMIT = 20_000
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


def outside(report: Report) -> set[tuple[str, int] | None]:
    """The lines of the source of accesses out of bounds, beside which any memory may lie.

    Such a fault is reported once for each of these lines, by its first case.
    """
    return {one.source for one in report.faults if one.name == "out of bounds"}


def bits(t: Tensor) -> bytes:
    return t.contiguous().view(torch.uint8).numpy().tobytes() if t.numel() else b""


def executed(
    run: Callable[[], list[tuple[Tensor, ...]]], arch: str, schedules: Sequence[Schedule]
) -> tuple[list[Tensor], Report]:
    with (
        patch("nogpu.triton.emulate.SCHEDULES", schedules),
        emulate(arch, schedules="all") as gpu,
    ):
        gpu.limit = LIMIT
        results = [pair[0].clone() for pair in run()]
    return results, gpu.report()


def check(
    run: Callable[[], list[tuple[Tensor, ...]]],
    arch: str = "sm_90",
    schedules: Sequence[Schedule] | None = None,
) -> None:
    chosen = schedules or OF_ARCHITECTURE[arch]
    values, report = executed(run, arch, chosen)
    with in_python():
        expected, expected_report = executed(run, arch, chosen)
    assert outside(report) == outside(expected_report)
    if not outside(report):
        assert said(report) == said(expected_report)
        assert list(map(bits, values)) == list(map(bits, expected))


@pytest.mark.parametrize(
    "name, arch",
    [
        pytest.param(name, arch, marks=[] if name.startswith("01") else slow)
        for name in tutorials.TUTORIALS
        for arch in (90, ALSO_ON.get(name))
        if arch
    ],
)
def test_tutorials(name, arch):
    other = {80: TWO[1:], 100: TWO[:1]}.get(ALSO_ON.get(name)) if arch == 90 else None
    check(tutorials.TUTORIALS[name].run, f"sm_{arch}", other)


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
def wrap_kernel(out, first, places, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + (first + i) % places, i)


@pytest.mark.parametrize("first, places", [(0, 31), (5, 13), (25, 30), (0, 32)])
def test_threads_of_a_warp_store_into_one_place(first, places):
    """Also where the first thread after the wrap has a place of its own."""

    def run() -> list[tuple[Tensor, ...]]:
        out = torch.zeros(places, dtype=torch.int32)
        wrap_kernel[(1,)](out, first, places, BLOCK=32, num_warps=1)
        return [(out,)]

    check(run)
    with emulate("sm_90") as gpu:
        run()
    assert [one.name for one in gpu.faults] == ["different values"] * (places < 32)


@triton.jit
def sum_rows_kernel(x, out, m, columns, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr):
    i, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK)
    mask = (i < m)[:, None] & (j < columns)[None, :]
    row = tl.load(x + i[:, None] * columns + j[None, :], mask, other=0)
    tl.store(out + i[:, None] * columns + j[None, :], row + tl.sum(row, 1)[:, None], mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_undefined_half_of_a_pair_does_not_matter_to_the_other(dtype):
    """A sum of 16-bit floats adds pairs, whose upper half nobody has written."""
    x = torch.ones(3, 100, dtype=dtype)

    def run() -> list[tuple[Tensor, ...]]:
        out = torch.zeros(3, 100, dtype=dtype)
        sum_rows_kernel[(1,)](x, out, 3, 100, BLOCK_M=16, BLOCK=128, num_warps=1)
        return [(out,)]

    check(run)
    with emulate("sm_90") as gpu:
        ((out,),) = run()
    assert not gpu.faults
    assert torch.equal(out, x + 100)


@triton.jit
def narrow_product_kernel(a, b, out, BLOCK_M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    i, j, k = tl.arange(0, BLOCK_M), tl.arange(0, N), tl.arange(0, K)
    left = tl.load(a + i[:, None] * K + k[None, :])
    right = tl.load(b + k[:, None] * N + j[None, :])
    tl.store(out + i[:, None] * N + j[None, :], tl.dot(left, right))


LEADING, STRIDE = 2048, 1024  # bytes; CUTLASS calls them LBO and SBO


def canonical_offset(row: int, column: int, mode: int, by_rows: bool, size: int) -> int:
    """The place of a number of ``size`` bytes by CUTLASS's canonical layouts
    (cute/arch/mma_sm90_desc.hpp and cute/atom/mma_traits_sm90_gmma.hpp)."""
    of_chunk, chunks = 16 // size, {0: 1, 1: 8, 2: 4, 3: 2}[mode]
    if by_rows and mode == 0:  # ((8, m), (T, 2)) : ((1T, SBO), (1, LBO))
        at = row % 8 * 16 + row // 8 * STRIDE + column % of_chunk * size
        at += column // of_chunk * LEADING
    elif by_rows:  # ((8, m), (T, 2)) : ((chunks · T, SBO), (1, T))
        at = row % 8 * 16 * chunks + row // 8 * STRIDE + column * size
    else:  # ((T, chunks, m), (8, k)) : ((1, T, LBO), (chunks · T, SBO)); SBO, LBO without swizzle
        along, across = (STRIDE, LEADING) if mode == 0 else (LEADING, STRIDE)
        at = row % of_chunk * size + row // of_chunk % chunks * 16
        at += row // of_chunk // chunks * along + column % 8 * 16 * chunks + column // 8 * across
    return at ^ (at >> 7 & (chunks - 1)) << 4


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("mode", range(4))
def test_operands_lie_as_in_the_canonical_layouts(mode, by_rows, size):
    bits = LEADING >> 4 << 16 | STRIDE >> 4 << 32 | mode << 62
    of_chunk = 16 // size
    found = tensor_cores._chunks(bits, range(64), 0 if by_rows else of_chunk, 1)
    row, column = (1, of_chunk) if by_rows else (of_chunk, 1)  # of a chunk
    expected = [
        [canonical_offset(i, j, mode, by_rows, size) for j in range(0, 32 // size, column)]
        for i in range(0, 64, row)
    ]
    assert found.tolist() == expected


def test_lines_of_16_bytes_are_not_swizzled():
    """B has 16 bytes a row, in the shared memory from which tensor cores of sm_100 read it."""
    a, b = (torch.randint(-4, 5, shape, dtype=torch.int8) for shape in ((64, 64), (64, 16)))

    def run() -> list[tuple[Tensor, ...]]:
        out = torch.zeros(64, 16, dtype=torch.int32)
        narrow_product_kernel[(1,)](a, b, out, 64, 16, 64, num_warps=8)
        return [(out,)]

    with emulate("sm_100") as gpu:
        ((out,),) = run()
    assert not gpu.faults
    assert torch.equal(out, (a.double() @ b.double()).int())


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
    # Between warps, older versions shuffle registers that no thread has written: Python's part.
    warps = 2 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8) else 1
    x = torch.arange(programs * 64) % 7 + 1.0

    def run() -> list[tuple[Tensor, ...]]:
        sums, out, arrived = torch.zeros(programs), torch.zeros(1), torch.zeros(1, dtype=INT32)
        size = triton.next_power_of_2(programs)
        last_sums_kernel[(programs,)](x, sums, arrived, out, sem, 64, size, num_warps=warps)
        return [(sums,), (out,)]

    check(run)
    assert blocks_of_python(run) == in_python


@triton.jit
def copy_boxes_kernel(x, y, RANK: tl.constexpr, STEP: tl.constexpr):
    """Boxes at both ends of the first dimension lie partly outside."""
    i = (tl.program_id(0) - 1) * STEP
    if RANK == 1:
        y.store([i], x.load([i]))
    elif RANK == 2:
        y.store([i, 8], x.load([i, 0]) + x.load([i, 16]))
    elif RANK == 3:
        y.store([i, 1, 0], x.load([i, 0, 0]))
    elif RANK == 4:
        y.store([i, 1, 0, 8], x.load([i, 0, 1, 8]))
    else:
        y.store([i, 1, 0, 0, 0], x.load([i, 0, 1, 0, 0]))


SHAPES = {1: [96], 2: [40, 24], 3: [9, 3, 32], 4: [9, 3, 2, 24], 5: [9, 2, 3, 2, 16]}
BOXES = {1: [32], 2: [8, 16], 3: [4, 2, 16], 4: [4, 2, 2, 16], 5: [4, 2, 2, 2, 8]}


@pytest.mark.parametrize(
    "rank, dtype",
    [
        pytest.param(rank, dtype, marks=[] if (rank, dtype) == (2, torch.bfloat16) else slow)
        for rank in SHAPES
        for dtype in (torch.bfloat16, FLOAT32, INT64)
    ],
)
def test_boxes_of_tensors(rank, dtype):
    shape, box = SHAPES[rank], BOXES[rank]

    def run() -> list[tuple[Tensor, ...]]:
        x = (torch.arange(torch.Size(shape).numel()) % 251).reshape(shape).to(dtype)
        y = torch.zeros_like(x)
        descriptors = [TensorDescriptor.from_tensor(one, box) for one in (x, y)]
        programs = triton.cdiv(shape[0], box[0]) + 2
        copy_boxes_kernel[(programs,)](*descriptors, rank, box[0], num_warps=2)
        return [(y,)]

    check(run)
    assert blocks_of_python(run) == 0


@triton.jit
def add_tiles_kernel(x, out, rows, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Each program makes its tensormaps, and loads boxes ahead."""
    tensor = tl.make_tensor_descriptor(x, [rows, COLUMNS], [COLUMNS, 1], [BLOCK, 32])
    total = tl.zeros([BLOCK, 32], tl.float32)
    for column in tl.range(0, COLUMNS, 32, num_stages=3):
        total += tensor.load([tl.program_id(0) * BLOCK, column])
    to = tl.make_tensor_descriptor(out, [rows, 32], [32, 1], [BLOCK, 32])
    to.store([tl.program_id(0) * BLOCK, 0], total)


@pytest.mark.parametrize("rows", [40, pytest.param(64, marks=slow)])
def test_tensormaps_of_programs(rows):
    def run() -> list[tuple[Tensor, ...]]:
        x, out = torch.arange(rows * 160.0).reshape(rows, 160), torch.zeros(rows, 32)
        triton.set_allocator(scratch_memory)
        add_tiles_kernel[(triton.cdiv(rows, 16),)](x, out, rows, 160, 16, num_warps=2)
        return [(out,)]

    check(run)
    assert blocks_of_python(run) == 0


@triton.jit
def multiply_kernel(a, b, c, K: tl.constexpr, N: tl.constexpr, FROM_REGISTERS: tl.constexpr):
    i, k, n = tl.arange(0, 64)[:, None], tl.arange(0, K), tl.arange(0, N)
    left, right = tl.load(a + i * K + k[None, :]), tl.load(b + n[None, :] * K + k[:, None])
    total = tl.zeros([64, N], c.dtype.element_ty)
    for _ in range(2):
        if FROM_REGISTERS:
            left += left
        total = tl.dot(left, right, total)
    tl.store(c + i * N + n[None, :], total)


FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize(
    "dtype, from_registers",
    [
        (FLOAT32, False),
        pytest.param(FLOAT32, True, marks=slow),
        *(pytest.param(torch.float16, is_held, marks=slow) for is_held in (False, True)),
        *(pytest.param(dtype, False, marks=slow) for dtype in (torch.int8, *FLOAT8)),
    ],
)
def test_products_of_warpgroups(dtype, from_registers):
    torch.manual_seed(1)
    a, b = ((8 * torch.randn(64, 64)).to(dtype) for _ in range(2))

    def run() -> list[tuple[Tensor, ...]]:
        c = torch.zeros(64, 64, dtype=INT32 if dtype == torch.int8 else FLOAT32)
        multiply_kernel[(1,)](a, b, c, 64, 64, from_registers)
        return [(c,)]

    check(run)
    assert blocks_of_python(run) == 0


@triton.jit
def short_sums_kernel(
    a, b, c, d,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
    MOST: tl.constexpr, STAGES: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """Sums of two products with one right operand, or of one: rounded to the type of ``c``."""
    i, j, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK)
    total, other = tl.zeros([M, N], c.dtype.element_ty), tl.zeros([M, N], c.dtype.element_ty)
    for start in tl.range(0, K, BLOCK, num_stages=STAGES):
        left = tl.load(a + i[:, None] * K + start + k[None, :])
        right = tl.load(b + j[None, :] * K + (start + k)[:, None])
        total = tl.dot(left, right, total, max_num_imprecise_acc=MOST, out_dtype=c.dtype.element_ty)
        if TWO:
            left = tl.load(d + i[:, None] * K + start + k[None, :])
            other = tl.dot(
                left, right, other, max_num_imprecise_acc=MOST, out_dtype=c.dtype.element_ty
            )
    tl.store(c + i[:, None] * N + j[None, :], total)
    if TWO:
        tl.store(c + (M + i[:, None]) * N + j[None, :], other)


F16, E4M3, E5M2 = torch.float16, *FLOAT8


def short_sums(
    kind: torch.dtype, most: int | None, m: int, n: int, warps: int, stages: int, is_two: bool
) -> Callable[[], list[tuple[Tensor, Tensor]]]:
    """Launch the kernel above on whole numbers, whose sums are exact in any order."""

    def run() -> list[tuple[Tensor, Tensor]]:
        torch.manual_seed(1)
        a, b, d = (torch.randint(-2, 3, (rows, 128)).float() for rows in (m, n, m))
        c = torch.full((m * (1 + is_two), n), torch.nan, dtype=F16 if kind == F16 else FLOAT32)
        short_sums_kernel[(1,)](
            a.to(kind), b.to(kind), c, d.to(kind), m, n, 128, 64, most, stages, is_two,
            num_warps=warps,
        )  # fmt: skip
        return [(c, torch.cat([a, d][: 1 + is_two]) @ b.T)]

    return run


@pytest.mark.parametrize(
    "kind, most, m, n, warps, stages, is_two",
    [
        (F16, 0, 64, 16, 4, 3, False),
        (E4M3, 32, 64, 16, 4, 3, False),
        pytest.param(F16, 0, 128, 64, 8, 2, True, marks=slow),
        pytest.param(F16, 0, 128, 32, 4, 4, False, marks=slow),
        pytest.param(F16, 0, 64, 16, 4, 1, True, marks=slow),
        pytest.param(E5M2, 32, 128, 32, 8, 2, True, marks=slow),
        pytest.param(E4M3, 32, 64, 32, 4, 4, True, marks=slow),
        pytest.param(E4M3, 64, 64, 16, 4, 1, False, marks=slow),
        pytest.param(E4M3, None, 64, 32, 4, 3, True, marks=slow),
        pytest.param(E5M2, 64, 128, 64, 4, 3, True, marks=slow),
    ],
)
def test_a_sum_that_is_read_before_the_wait_is_waited_for(
    kind, most, m, n, warps, stages, is_two
):  # fmt: skip
    run = short_sums(kind, most, m, n, warps, stages, is_two)
    with emulate("sm_90", schedules="all") as gpu:
        ((found, expected),) = run()
    assert gpu.faults == []
    assert re.search(r"wgmma\.mma_async", gpu.launches[0].ptx)
    assert torch.equal(found.float(), expected)
    check(run)
    if kind != F16:  # whose products the core leaves to Python
        assert blocks_of_python(run) == 0


WRITE = "mov.b32 {register}, 0;"
IN_SOME_THREADS = "setp.lt.u32 %pending, %tid_of_pending, 7; @%pending mov.b32 {register}, 0;"
WAITS = r"wgmma\.wait_group\.sync\.aligned\s+\d+;"


@pytest.mark.parametrize(
    "planted, message",
    [
        (WRITE, "takes a register of an asynchronous product"),  # the next product
        (IN_SOME_THREADS, "changes a register of an asynchronous product in some threads"),
    ],
)
def test_a_sum_that_is_written_before_the_wait_is_a_fault(planted, message):
    """The negative control of the test above, for a product whose sums nobody reads early."""
    run = short_sums(E4M3, None, 64, 16, 4, 3, False)

    def plant(text: str) -> str:
        register = re.search(r"wgmma\.mma_async[^{]*\{(%r\d+)", text)[1]
        at = text.index("wgmma.commit_group")
        head = ".reg .pred %pending; .reg .b32 %tid_of_pending; mov.u32 %tid_of_pending, %tid.x;"
        return f"{text[:at]}{{ {head} {planted.format(register=register)} }} {text[at:]}"

    for context in (nullcontext(), in_python()):
        with context, emulate("sm_90") as gpu:
            gpu.change = plant
            run()
        assert [fault.name for fault in gpu.faults] == ["invalid operation"]
        assert message in gpu.faults[0].message


def test_operands_that_are_overwritten_while_they_are_multiplied_are_a_fault():
    """A copy overwrites them where nothing reads the sums, and the program does not wait."""
    run = short_sums(E4M3, None, 64, 16, 4, 2, False)
    for context in (nullcontext(), in_python()):
        with context, emulate("sm_90") as gpu:
            gpu.change = lambda text: re.sub(WAITS, "", text)
            run()
        assert {fault.name for fault in gpu.faults if fault.kind != "note"} == {"race"}


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


def test_what_python_takes_for_the_layout_in_c_is_checked(monkeypatch):
    core = native.library()
    layout.check(core)

    class SpaceStruct(ctypes.Structure):
        _fields_ = (
            ("allocations", ctypes.c_void_p),
            ("count", ctypes.c_int32),
            ("last", ctypes.c_void_p),
            ("is_deferred", ctypes.c_int32),
        )

    others = [SpaceStruct if one is layout.SpaceStruct else one for one in layout.STRUCTURES]
    monkeypatch.setattr(layout, "STRUCTURES", others)
    with pytest.raises(
        RuntimeError, match=r"Space.count has offset and size \[8, 8\] in C, and \[8, 4\]"
    ):
        layout.check(core)
    monkeypatch.undo()
    monkeypatch.setattr(layout, "REDUCE", 7)
    with pytest.raises(RuntimeError, match=r"REDUCE is 13 in C, and 7 in native/layout\.py"):
        layout.check(core)
