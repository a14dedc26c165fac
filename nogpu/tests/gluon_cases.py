# SPDX-License-Identifier: MIT
"""The subjects of Triton's Gluon tutorials for Hopper and Blackwell, written anew, in small.

A case returns what it has found, what is right in float64, and the greatest error. `FAULTS` leave a
wait out. (Triton makes the fences, also where a kernel of Gluon has none.)
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.blackwell import (
    TensorMemoryLayout,
    allocate_tensor_memory,
    tcgen05_commit,
    tcgen05_mma,
)
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

Result = tuple[Tensor, Tensor, float]
Run = Callable[..., list[Result]]


@dataclass(frozen=True)
class Case:
    run: Run
    architectures: tuple[int, ...] = (90, 100)


CASES: dict[str, Case] = {}
FAULTS: dict[str, tuple[Run, int, str]] = {}  # with the architecture, and the fault's name


def case(name: str, *architectures: int) -> Callable[[Run], Run]:
    def register(run: Run) -> Run:
        CASES[name] = Case(run, architectures or (90, 100))
        return run

    return register


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# 01 and 02: a copy, by layouts


@gluon.jit
def copy_kernel(x, out, n, BLOCK: gl.constexpr, PER_THREAD: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([PER_THREAD], [32], [4], [0])
    i = gl.program_id(0) * BLOCK + gl.arange(0, BLOCK, layout)
    gl.store(out + i, gl.load(x + i, mask=i < n), mask=i < n)


@case("01 copy, and 02 layouts")
def copy() -> list[Result]:
    x, results = normal(500), []
    for per_thread in (1, 2):
        out = torch.empty(500)
        copy_kernel[(2,)](x, out, 500, 256, per_thread)
        results.append((out, x.double(), 0.0))
    return results


@gluon.jit
def transpose_kernel(x, out, M: gl.constexpr, N: gl.constexpr):
    by_rows: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    by_columns: gl.constexpr = gl.BlockedLayout([4, 1], [8, 4], [1, 4], [0, 1])
    m = gl.arange(0, M, gl.SliceLayout(1, by_rows))
    n = gl.arange(0, N, gl.SliceLayout(0, by_rows))
    values = gl.convert_layout(gl.load(x + m[:, None] * N + n[None, :]), by_columns)
    m = gl.arange(0, M, gl.SliceLayout(1, by_columns))
    n = gl.arange(0, N, gl.SliceLayout(0, by_columns))
    gl.store(out + n[None, :] * M + m[:, None], values)


@case("02 a change of layouts")
def transpose() -> list[Result]:
    x, out = normal(32, 64), torch.empty(64, 32)
    transpose_kernel[(1,)](x, out, 32, 64)
    return [(out, x.T.double(), 0.0)]


# 03: asynchronous copies


@gluon.jit
def double_kernel(x, out, N: gl.constexpr, STEPS: gl.constexpr, LEFT: gl.constexpr):
    """Two buffers: the copy of the next step begins before the present one is waited for."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    i = gl.arange(0, N, layout)
    shared: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    buffers = gl.allocate_shared_memory(gl.float32, [2, N], shared)
    async_copy.async_load(buffers.index(0), x + i)
    async_copy.commit_group()
    for step in gl.static_range(STEPS):
        if step + 1 < STEPS:
            async_copy.async_load(buffers.index((step + 1) % 2), x + (step + 1) * N + i)
        async_copy.commit_group()
        async_copy.wait_group(LEFT)
        gl.store(out + step * N + i, 2 * buffers.index(step % 2).load(layout))


def doubled(left: int) -> list[Result]:
    x, out = normal(384), torch.empty(384)
    double_kernel[(1,)](x, out, 128, 3, left)
    return [(out, 2 * x.double(), 0.0)]


@case("03 asynchronous copies")
def copies() -> list[Result]:
    return doubled(1)


FAULTS["a wait for a group too few"] = lambda: doubled(2), 90, "race"


# 04: boxes by TMA


@gluon.jit
def box_kernel(x, out, WAIT: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    shared = gl.allocate_shared_memory(x.dtype, x.block_type.shape, x.layout)
    barrier = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(barrier, count=1)
    mbarrier.expect(barrier, x.block_type.nbytes)
    tma.async_load(x, [16, 0], barrier, shared)
    if WAIT:
        mbarrier.wait(barrier, phase=0)
    values = shared.load(layout)
    shared.store(values + 1)
    fence_async_shared()
    tma.async_store(out, [0, 32], shared)
    tma.store_wait(pendings=0)


def boxes(wait: bool = True) -> list[Result]:
    x, out = normal(48, 32), torch.zeros(16, 64)
    layout = gl.NVMMASharedLayout.get_default_for([16, 32], gl.float32)
    given = [TensorDescriptor.from_tensor(one, [16, 32], layout) for one in (x, out)]
    box_kernel[(1,)](*given, wait)
    expected = torch.zeros(16, 64, dtype=torch.float64)
    expected[:, 32:] = (x[16:32] + 1).double()
    return [(out, expected, 0.0)]


@case("04 boxes by TMA")
def tma_boxes() -> list[Result]:
    return boxes()


FAULTS["a box that is not waited for"] = lambda: boxes(wait=False), 90, "race"


# 05: products of a warpgroup


@gluon.jit
def wgmma_kernel(a, b, c, N: gl.constexpr, WAIT: gl.constexpr):
    sums: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16]
    )
    left = gl.allocate_shared_memory(a.dtype, a.block_type.shape, a.layout)
    right = gl.allocate_shared_memory(b.dtype, b.block_type.shape, b.layout)
    barrier = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(barrier, count=1)
    mbarrier.expect(barrier, a.block_type.nbytes + b.block_type.nbytes)
    tma.async_load(a, [0, 0], barrier, left)
    tma.async_load(b, [0, 0], barrier, right)
    if WAIT:
        mbarrier.wait(barrier, phase=0)
    total = gl.zeros((64, N), gl.float32, sums)
    total = warpgroup_mma(left, right, total, is_async=True)
    total = warpgroup_mma_wait(num_outstanding=0, deps=(total,))
    m = gl.arange(0, 64, gl.SliceLayout(1, sums))
    n = gl.arange(0, N, gl.SliceLayout(0, sums))
    gl.store(c + m[:, None] * N + n[None, :], total)


def operands(rows: int) -> tuple[Tensor, Tensor, list[TensorDescriptor]]:
    a = normal(rows, 64, dtype=torch.float16)
    b = normal(64, 32, dtype=torch.float16, seed=1)
    descriptors = []
    for one in (a, b):
        layout = gl.NVMMASharedLayout.get_default_for(list(one.shape), gl.float16)
        descriptors.append(TensorDescriptor.from_tensor(one, list(one.shape), layout))
    return a, b, descriptors


def judged(a: Tensor, b: Tensor, c: Tensor) -> list[Result]:
    """A sum of 64 products in float32 is off by less than 64 times its unit of the sizes."""
    sizes = (a.double().abs() @ b.double().abs()).max().item()
    return [(c, a.double() @ b.double(), 64 * 2.0**-23 * sizes)]


def by_warpgroup(wait: bool = True) -> list[Result]:
    a, b, descriptors = operands(64)
    c = torch.empty(64, 32)
    wgmma_kernel[(1,)](*descriptors, c, 32, wait)
    return judged(a, b, c)


@case("05 products of a warpgroup", 90)
def warpgroup() -> list[Result]:
    return by_warpgroup()


FAULTS["a product of what was not waited for"] = lambda: by_warpgroup(False), 90, "race"


# 06: products of sm_100


@gluon.jit
def tcgen05_kernel(a, b, c, N: gl.constexpr, WAIT: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, N], [32, 1], [4, 1], [0, 1])
    left = gl.allocate_shared_memory(a.dtype, a.block_type.shape, a.layout)
    right = gl.allocate_shared_memory(b.dtype, b.block_type.shape, b.layout)
    barriers = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(barriers.index(0), count=1)
    mbarrier.init(barriers.index(1), count=1)
    mbarrier.expect(barriers.index(0), a.block_type.nbytes + b.block_type.nbytes)
    tma.async_load(a, [0, 0], barriers.index(0), left)
    tma.async_load(b, [0, 0], barriers.index(0), right)
    mbarrier.wait(barriers.index(0), phase=0)
    memory: gl.constexpr = TensorMemoryLayout([128, N], col_stride=1)
    total = allocate_tensor_memory(gl.float32, [128, N], memory)
    tcgen05_mma(left, right, total, use_acc=False)
    tcgen05_commit(barriers.index(1))
    if WAIT:
        mbarrier.wait(barriers.index(1), phase=0)
    values = gl.convert_layout(total.load(), layout)
    m = gl.arange(0, 128, gl.SliceLayout(1, layout))
    n = gl.arange(0, N, gl.SliceLayout(0, layout))
    gl.store(c + m[:, None] * N + n[None, :], values)


def by_tensor_memory(wait: bool = True) -> list[Result]:
    a, b, descriptors = operands(128)
    c = torch.empty(128, 32)
    tcgen05_kernel[(1,)](*descriptors, c, 32, wait)
    return judged(a, b, c)


@case("06 products of sm_100", 100)
def tensor_memory() -> list[Result]:
    return by_tensor_memory()


FAULTS["a product of sm_100 that is not waited for"] = lambda: by_tensor_memory(False), 100, "race"


# 08: specialized warps


@gluon.jit
def load_partition(x, shared, full, empty, STEPS: gl.constexpr):
    for step in range(STEPS):
        mbarrier.wait(empty, phase=(step & 1) ^ 1)
        mbarrier.expect(full, x.block_type.nbytes)
        tma.async_load(x, [16 * step, 0], full, shared)


@gluon.jit
def use_partition(out, shared, full, empty, STEPS: gl.constexpr, WAIT: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    m = gl.arange(0, 16, gl.SliceLayout(1, layout))
    n = gl.arange(0, 32, gl.SliceLayout(0, layout))
    for step in range(STEPS):
        if WAIT:
            mbarrier.wait(full, phase=step & 1)
        values = shared.load(layout)
        mbarrier.arrive(empty, count=1)
        gl.store(out + (16 * step + m[:, None]) * 32 + n[None, :], 2 * values)


@gluon.jit
def specialized_kernel(x, out, STEPS: gl.constexpr, WAIT: gl.constexpr):
    shared = gl.allocate_shared_memory(x.dtype, x.block_type.shape, x.layout)
    barriers = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    full, empty = barriers.index(0), barriers.index(1)
    mbarrier.init(full, count=1)
    mbarrier.init(empty, count=1)
    gl.warp_specialize(
        [
            (use_partition, (out, shared, full, empty, STEPS, WAIT)),
            (load_partition, (x, shared, full, empty, STEPS)),
        ],
        [1],
        [24],
    )


def by_specialized_warps(wait: bool = True) -> list[Result]:
    x, out = normal(48, 32), torch.empty(48, 32)
    layout = gl.NVMMASharedLayout.get_default_for([16, 32], gl.float32)
    specialized_kernel[(1,)](TensorDescriptor.from_tensor(x, [16, 32], layout), out, 3, wait)
    return [(out, 2 * x.double(), 0.0)]


@case("08 specialized warps")
def specialized() -> list[Result]:
    return by_specialized_warps()


FAULTS["specialized warps that do not wait"] = (
    lambda: by_specialized_warps(False),
    90,
    "uninitialised memory",
)
