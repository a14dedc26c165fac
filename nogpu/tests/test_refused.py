# SPDX-License-Identifier: MIT
"""Kernels that a GPU would refuse or that rely on what is false, and ends of bulk copies."""

import contextvars

import pytest
import torch
import triton
import triton.language as tl
from test_core import in_python
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from nogpu import check_kernel, emulate
from nogpu.instructions.tma import Barrier
from nogpu.report import assembly
from nogpu.triton import stages

slow = pytest.mark.slow
ASSEMBLY = {
    "type": ("add.f32 $0, $1, %laneid;", "sm_90", "Special register argument not allowed"),
    "operands": ("add.s32 $0, $1;", "sm_90", "Arguments mismatch for instruction 'add'"),
    "undeclared": ("mov.b32 t, $1; mov.b32 $0, t;", "sm_90", "Unknown symbol 't'"),
    "arch": (
        "{ .reg .b16 a; .reg .f32 f; mov.b32 f, $1; "
        "cvt.rn.satfinite.e4m3x2.f32 a, f, f; cvt.u32.u16 $0, a; }",
        "sm_80",
        "requires .target sm_89",
    ),
}


@triton.jit
def assembly_kernel(x, out, N: tl.constexpr, CODE: tl.constexpr):
    i = tl.arange(0, N)
    y = tl.inline_asm_elementwise(CODE, "=r,r", [tl.load(x + i)], tl.int32, True, 1)
    tl.store(out + i, y)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "type" else slow) for name in ASSEMBLY]
)
def test_what_ptxas_refuses_is_said_in_its_words(name):
    code, arch, words = ASSEMBLY[name]
    x, out = torch.arange(128, dtype=torch.int32), torch.full((128,), -1, dtype=torch.int32)
    with emulate(arch) as gpu:
        assembly_kernel[(1,)](x, out, 128, code)
    (fault,) = gpu.faults
    assert (fault.kind, fault.name, words in fault.message) == ("error", "refused by ptxas", True)
    assert "inline_asm_elementwise" in str(fault)
    assert (out == -1).all()
    assert gpu.launches == []


def test_each_kernel_with_inline_assembly_is_assembled_once(monkeypatch):
    """Also by another process; a kernel without one is not assembled."""
    asked = []
    words_of = assembly.words_of
    monkeypatch.setattr(stages, "words_of", lambda *args: asked.append(1) or words_of(*args))
    x, out = torch.arange(128, dtype=torch.int32), torch.empty(128, dtype=torch.int32)
    for _ in range(2):
        assembly_kernel.device_caches.clear()
        with emulate() as gpu:
            assembly_kernel[(1,)](x, out, 128, "add.s32 $0, $1, 5;")
            first_kernel[(4,)](torch.empty(512), 0, 128)
        assert torch.equal(out, x + 5)
        assert gpu.faults == []
    assert len(asked) <= 1  # none, if an earlier process has asked


@triton.jit
def first_kernel(out, least, B: tl.constexpr):
    pid = tl.program_id(0)
    tl.assume(pid >= least)  # NAMED
    tl.store(out + pid * B + tl.arange(0, B), tl.where(pid >= least, 1.0, 0.0))


def test_a_false_assumption_is_named():
    out = torch.zeros(512)
    with emulate() as gpu:
        first_kernel[(4,)](out, 0, 128)
    assert (out.tolist(), gpu.faults) == ([1.0] * 512, [])
    with emulate() as gpu:
        first_kernel[(4,)](out, 2, 128)
    (fault,) = gpu.faults
    assert (fault.kind, fault.name, fault.program) == ("error", "false assumption", (0, 0, 0))
    assert "# NAMED" in str(fault)
    assert len(gpu.launches) == 1


@triton.jit
def counted_kernel(counter, out, most):
    old = tl.atomic_add(counter, 1)
    tl.assume(old < most)
    tl.store(out + tl.program_id(0), old)


@slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_assumptions_on_what_programs_change_leave_memory_as_it_was(arch):
    for most, program in ((4, []), (2, [(2, 0, 0)])):
        counter, out = torch.zeros(1, dtype=torch.int32), torch.empty(4, dtype=torch.int32)
        with emulate(arch, schedules="all") as gpu:
            counted_kernel[(4,)](counter, out, most)
        assert (counter.item(), sorted(out.tolist())) == (4, [0, 1, 2, 3])
        assert [fault.program for fault in gpu.faults] == program


@triton.jit
def copy_rows_kernel(out, x, n, B: tl.constexpr):
    for i in range(0, n, B):
        out.store([0, i], x.load([0, i]))


@pytest.mark.parametrize(
    "dtype, size, made, kind",
    [
        (torch.float32, 466, lambda d: torch.full((8, 512), 7, dtype=d), "error"),
        (torch.float32, 468, lambda d: torch.full((8, 512), 7, dtype=d), None),
        (torch.float32, 466, lambda d: torch.full((8, 468), 7, dtype=d), "warning"),
        (torch.float32, 466, lambda d: torch.empty(8, 468, dtype=d), None),
        pytest.param(
            torch.int8, 466, lambda d: torch.full((8, 512), 7, dtype=d), "error", marks=slow
        ),
        pytest.param(
            torch.float16, 471, lambda d: torch.full((8, 512), 7, dtype=d), "error", marks=slow
        ),
    ],
)
def test_a_tma_store_writes_the_rest_of_16_bytes(dtype, size, made, kind):
    x = torch.ones(8, 512, dtype=dtype)
    for executor in (emulate, lambda: in_python_emulate()):
        with executor() as gpu:
            out = made(dtype)
            to = TensorDescriptor.from_tensor(out[:, :size], [8, 128])
            copy_rows_kernel[(1,)](to, TensorDescriptor.from_tensor(x, [8, 128]), size, 128)
        assert [(fault.kind, fault.name) for fault in gpu.faults] == (
            [] if kind is None else [(kind, "out of bounds")]
        )
        assert torch.equal(out[:, :size], x[:, :size])
        whole = -(-size * out.element_size() // 16) * 16 // out.element_size()
        if kind is not None:
            assert (out[:, size:whole] == 1).all()  # as on a GPU
            assert (out[:, whole:] == 7).all()


@triton.jit
def copy_boxes_kernel(out, x, L, M, N, S, R, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    to = tl.make_tensor_descriptor(out, [L, M, N], [S, R, 1], [A, B, C])
    first, second = tl.program_id(0) * A, tl.program_id(1) * B
    h = first + tl.arange(0, A)[:, None, None]
    i, j = second + tl.arange(0, B)[None, :, None], tl.arange(0, C)[None, None, :]
    box = tl.load(x + (h * M + i) * N + j, mask=(h < L) & (i < M) & (j < N))
    to.store([first, second, 0], box)


@pytest.mark.parametrize("executor", ["core", "Python"])
@pytest.mark.parametrize("boxes, kind", [((1, 8), None), ((8, 8), None), ((1, 8), "error")])
def test_the_rest_of_16_bytes_may_lie_in_a_page_without_another_access(executor, boxes, kind):
    """Rows of 85 numbers, whose rest is unwritten in many pages, or was written in all."""
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8))
    sizes = (10, 40, 85)
    x = torch.randn(*sizes)
    with emulate() if executor == "core" else in_python_emulate() as gpu:
        out = torch.empty(13, 40, 96) if kind is None else torch.zeros(13, 40, 96)
        grid = tuple(triton.cdiv(n, box) for n, box in zip(sizes[:2], boxes, strict=True))
        copy_boxes_kernel[grid](out, x, *sizes, *out.stride()[:2], *boxes, 128)
    assert torch.equal(out[:10, :, :85], x)
    assert [fault.kind for fault in gpu.faults] == ([] if kind is None else [kind])


class in_python_emulate:
    """An emulator whose instructions Python executes."""

    def __enter__(self):
        self.both = in_python(), emulate()
        self.both[0].__enter__()
        return self.both[1].__enter__()

    def __exit__(self, *error):
        self.both[1].__exit__(*error)
        self.both[0].__exit__(*error)


@gluon.jit
def fill_kernel(out, B: gl.constexpr, WAITS: gl.constexpr):
    i = gl.arange(0, B, layout=gl.BlockedLayout([1], [32], [4], [0]))
    buffer = gl.allocate_shared_memory(out.dtype, [B], out.layout)
    buffer.store(i.to(gl.float32))
    fence_async_shared()
    tma.async_copy_shared_to_global(out, [gl.program_id(0) * B], buffer)
    if WAITS:
        tma.store_wait(0)


@pytest.mark.parametrize("waits", [False, True])
def test_a_program_that_ends_while_tma_reads_is_named(waits):
    """Under each schedule, by both executors."""
    layout = gl.NVMMASharedLayout.get_default_for([128], gl.float32)
    for executor in (emulate, lambda: in_python_emulate(), lambda: emulate(schedules="all")):
        y = torch.zeros(512)
        with executor() as gpu:
            to = GluonDescriptor.from_tensor(y, [128], layout)
            fill_kernel[(4,)](to, 128, waits, num_warps=4)
        names = [fault.name for fault in gpu.faults]
        assert names == ([] if waits else ["unfinished copy"])
        assert torch.equal(y, torch.arange(128.0).repeat(4))


@gluon.jit
def copy_ahead_kernel(x, out, n, B: gl.constexpr, WAITS: gl.constexpr):
    i = gl.arange(0, B, layout=gl.BlockedLayout([1], [32], [4], [0]))
    shared = gl.allocate_shared_memory(gl.float32, [B], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    async_copy.async_load(shared, x + i, mask=i < n)
    async_copy.commit_group()
    if WAITS:
        async_copy.wait_group(0)
    gl.store(out + i, i.to(gl.float32))


@pytest.mark.parametrize("waits", [False, True])
def test_a_program_that_ends_while_a_masked_copy_writes_is_named(waits):
    x, out = torch.ones(100), torch.zeros(128)
    with emulate(schedules="all") as gpu:
        copy_ahead_kernel[(1,)](x, out, 100, 128, waits, num_warps=4)
    messages = {fault.message for fault in gpu.faults}
    said = {"the program may end before this copy has written its shared memory"}
    assert messages == (set() if waits else said)


@pytest.mark.parametrize(
    "arrivals, transactions, said",
    [
        (1, 0, "expects 2 arrivals"),
        (2, -1, "expects 1 arrival and 1 byte"),
        (5, 0, "got 2 arrivals that it did not expect"),
        (4, 2000, "got 1 arrival and 2,000 bytes that it did not expect"),
        (2, 8, "expects 1 arrival and got 8 bytes that it did not expect"),
    ],
)
def test_what_an_mbarrier_misses_is_said_in_words(arrivals, transactions, said):
    """A negative number of arrivals or bytes has come without being expected."""
    barrier = Barrier(1, 3)
    barrier.update(arrivals, -transactions)
    assert barrier.missing() == f" (its mbarrier {said})"


@triton.jit
def copy_by_own_kernel(x, out, B: tl.constexpr):
    a = tl.make_tensor_descriptor(x, [B], [1], [B])
    tl.make_tensor_descriptor(out, [B], [1], [B]).store([0], a.load([0]))


def test_descriptors_of_the_device_need_an_allocator():
    x, out = torch.randn(128), torch.empty(128)

    def launch(sets: bool) -> list[str]:
        if sets:
            triton.set_allocator(lambda size, alignment, stream: torch.empty(size))
        with emulate() as gpu:
            copy_by_own_kernel[(1,)](x, out, 128)
        assert torch.equal(x, out)
        return [f"{fault.name} {fault.message}" for fault in gpu.faults]

    assert contextvars.Context().run(launch, True) == []
    (said,) = contextvars.Context().run(launch, False)
    assert said.startswith("no allocator for copy_by_own_kernel Triton would raise")


@slow
def test_a_kernel_alone_has_an_allocator_and_shows_what_is_refused():
    def check(kernel, *args, **constants):
        return contextvars.Context().run(
            check_kernel, kernel, (1,), args, lambda x, out, *_: {"out": x}, **constants
        )

    assert check(copy_by_own_kernel, torch.randn(128), torch.empty(128), B=128).ok
    x = torch.arange(128, dtype=torch.int32)
    table = check(assembly_kernel, x, torch.empty_like(x), N=128, CODE=ASSEMBLY["operands"][0])
    assert "refused by ptxas" in table["execution"].detail


@triton.jit
def double_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, 2 * tl.load(x + i))


def test_more_threads_than_a_block_may_have():
    x, out = torch.ones(2048), torch.zeros(2048)
    with emulate():
        double_kernel[(1,)](x, out, 2048, num_warps=32)
        assert out.sum() == 4096
        with pytest.raises(OutOfResources, match="threads, Required: 2048, Hardware limit: 1024"):
            double_kernel[(1,)](x, out, 2048, num_warps=64)
