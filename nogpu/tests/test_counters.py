# SPDX-License-Identifier: MIT
"""The counters of a launch are those that a profiler would have, for kernels that one can count."""

import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from launch import Gpu
from small_kernels import matmul_kernel
from test_core import in_python
from triton.tools.tensor_descriptor import TensorDescriptor

from nogpu import emulate
from nogpu.machine.counters import Access, summarize
from nogpu.machine.gpu_state import SCHEDULES
from nogpu.record.resources import Resources
from nogpu.record.source import moved, shown_path

slow = pytest.mark.slow
ARCHITECTURES = ["sm_90", *(pytest.param(arch, marks=slow) for arch in ("sm_80", "sm_100"))]


@triton.jit
def strided_kernel(x, out, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i * STRIDE))


@triton.jit
def sum_kernel(x, out, BLOCK: tl.constexpr):
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, BLOCK)), 0))


@triton.jit
def count_kernel(out, SAME: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.atomic_add(out + (i * 0 if SAME else i), 1.0)


@triton.jit
def load_box_kernel(x, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    i = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(out + i, x.load([tl.program_id(0) * ROWS, 0]))


def only(accesses: list[Access], what: str, space: str = "global") -> Access:
    """The one access of a kind."""
    (found,) = (one for one in accesses if (one.what, one.space) == (what, space))
    return found


@pytest.mark.parametrize("stride, sectors", [(1, 4), (2, 8), (3, 12), (8, 32), (100, 32)])
def test_a_warp_takes_sectors_by_its_stride(stride, sectors):
    with emulate() as gpu:
        strided_kernel[(1,)](torch.ones(3200), torch.empty(32), stride, 32, num_warps=1)
    load = only(gpu.launches[0].counters.accesses, "load")
    assert (load.requests, load.bytes, load.per_request, load.least) == (1, 128, sectors, 4)
    assert load.distinct == sectors


def test_a_thread_that_loads_16_bytes_takes_half_a_sector():
    with emulate() as gpu:
        strided_kernel[(1,)](torch.ones(128), torch.empty(128), 1, 128, num_warps=1)
    load = only(gpu.launches[0].counters.accesses, "load")
    assert (load.requests, load.per_request, load.least) == (1, 16, 16)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("same, sectors", [(False, 4), (True, 1)])
def test_atomics_take_the_sectors_of_their_addresses(arch, same, sectors):
    with emulate(arch) as gpu:
        count_kernel[(2,)](out := torch.zeros(32), same, 32, num_warps=1)
    assert out.sum() == 64
    atomic = only(gpu.launches[0].counters.accesses, "atomic")
    assert (atomic.requests, atomic.per_request, atomic.distinct) == (2, sectors, sectors)


@pytest.mark.parametrize("arch", ["sm_90", pytest.param("sm_100", marks=slow)])
def test_a_box_takes_the_sectors_of_its_elements_inside(arch):
    x = torch.randn(40, 16)
    out = torch.empty(2 * 32, 16)
    with emulate(arch) as gpu:
        descriptor = TensorDescriptor.from_tensor(x, [32, 16])
        for start in range(2):
            load_box_kernel[(1,)](descriptor, out[32 * start :], 32, 16)
    load = only(gpu.launches[0].counters.accesses, "TMA load")
    assert (load.requests, load.bytes, load.transactions) == (1, 32 * 64, 64)
    with emulate(arch) as gpu:
        load_box_kernel[(2,)](TensorDescriptor.from_tensor(x, [32, 16]), out, 32, 16)
    load = only(gpu.launches[0].counters.accesses, "TMA load")
    # 8 rows of the second box are inside.
    assert (load.requests, load.bytes, load.transactions) == (2, 40 * 64, 80)
    assert only(gpu.launches[0].counters.accesses, "TMA load", "shared").conflicts == 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_product_has_two_flops_for_each_pair(arch):
    a, b, c = (torch.randn(128, 128, dtype=torch.float16) for _ in range(3))
    with emulate(arch) as gpu:
        matmul_kernel[(2, 2)](a, b, c, 128, BM=64, BN=64, BK=32)
    total = gpu.launches[0].counters.total
    assert (total.tensor_flops, total.flops) == ({"f16": 2 * 128**3}, {})


@pytest.mark.parametrize("stages", [2, 4])
def test_copies_in_flight_are_those_of_the_stages(stages):
    """A stage has a group for each operand."""
    a, b, c = (torch.randn(128, 128, dtype=torch.float16) for _ in range(3))
    with emulate("sm_80") as gpu:
        matmul_kernel[(2, 2)](a, b, c, 128, BM=64, BN=64, BK=32, num_stages=stages)
    total = gpu.launches[0].counters.total
    assert total.waits > 0
    assert total.most_in_flight == 2 * (stages - 2)
    gpu.assert_counters(matmul_kernel, min_copies_in_flight=2 * (stages - 2))
    with pytest.raises(AssertionError, match=f"{total.most_in_flight} groups .* at least 5"):
        gpu.assert_counters(min_copies_in_flight=5)


TRANSPOSED = """
.version 8.0
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry transpose(.param .u64 unused)
.reqntid 32
{
    .reg .b32 %r<4>;
    .reg .b16 %h<1>;
    .reg .b64 %d<2>;
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, global_smem;
    mad.lo.s32 %r2, %r0, STRIDE, %r1;
    mov.b16 %h0, 1;
    mov.b64 %d0, 1;
    st.shared.KIND [%r2], VALUE;
    ld.shared.KIND RESULT, [%r2];
    ret;
}
"""


def launched(stride: int, kind: str, by_core: bool) -> list[Access]:
    """The accesses of 32 threads that are so many bytes apart."""
    value, result = {
        "b16": ("%h0", "%h0"),
        "b32": ("1", "%r3"),
        "b64": ("%d0", "%d1"),
        "v2.b64": ("{%d0, %d0}", "{%d0, %d1}"),
    }[kind]
    text = TRANSPOSED.replace("STRIDE", str(stride)).replace("KIND", kind)
    text = text.replace("VALUE", value).replace("RESULT", result)
    gpu = Gpu(SCHEDULES[0])
    with nullcontext() if by_core else in_python():
        gpu.launch(text, [0], shared=132 * 32)
    return summarize(gpu.counts, lambda source: source).accesses


@pytest.mark.parametrize("by_core", [True, False])
@pytest.mark.parametrize(
    "stride, kind, wavefronts, least",
    [
        (4, "b32", 1, 1),
        (8, "b32", 2, 1),
        (128, "b32", 32, 1),  # a column of an array of 32 × 32 words
        (132, "b32", 1, 1),  # and of one that is padded by a word
        (0, "b32", 1, 1),
        (2, "b16", 1, 1),
        (8, "b64", 2, 2),
        (128, "b64", 32, 2),
        (0, "b64", 1, 1),  # the second half reads the same
        (16, "v2.b64", 4, 4),
        (32, "v2.b64", 8, 4),
        (0, "v2.b64", 1, 1),
    ],
)
def test_threads_that_share_a_bank_take_turns(stride, kind, wavefronts, least, by_core):
    accesses = launched(stride, kind, by_core)
    turns = {"b64": 2, "v2.b64": 4}.get(kind, 1)  # each part of a warp that stores takes one
    for what, at_least in (("store", turns), ("load", 1)):
        one = only(accesses, what, "shared")
        expected = max(wavefronts, at_least), max(least, at_least)
        assert (one.requests, one.transactions, one.least) == (1, *expected)


def test_a_limit_that_is_not_kept_names_the_line():
    x, out = torch.ones(256), torch.empty(32)
    with emulate() as gpu:
        strided_kernel[(1,)](x, out, 1, 32, num_warps=1)
        gpu.assert_counters(
            max_sectors_per_request=4,
            max_sector_ratio=1,
            max_bank_conflicts=0,
            max_spilled_bytes=0,
            max_registers=32,
            min_programs=32,
            max_microseconds=0.1,
        )
        strided_kernel[(1,)](x, out, 8, 32, num_warps=1)
    with pytest.raises(AssertionError) as failure:
        gpu.assert_counters("strided_kernel", max_sectors_per_request=4, max_sector_ratio=1)
    lines = str(failure.value).splitlines()
    assert [line.partition("strided_kernel: ")[2].rpartition(": ")[2] for line in lines[::2]] == [
        "a load takes 32 sectors a request, expected at most 4",
        "a load takes 8 times the least sectors, expected at most 1",
    ]
    assert {line.strip() for line in lines[1::2]} == {"tl.store(out + i, tl.load(x + i * STRIDE))"}


@pytest.mark.parametrize(
    "limits, message",
    [
        ({"max_registers": 1}, "registers, no spills, expected at most 1"),
        (
            {"min_programs": 1000},
            "programs on a multiprocessor at once: 32, expected at least 1000",
        ),
        ({"max_microseconds": 1e-6}, "at least .* on an H100, by .*, expected at most 1e-06"),
    ],
)
def test_limits_of_a_launch(limits, message):
    with emulate() as gpu:
        strided_kernel[(1,)](torch.ones(32), torch.empty(32), 1, 32, num_warps=1)
    with pytest.raises(AssertionError, match=message):
        gpu.assert_counters(**limits)


def test_limit_names_the_line_from_the_folder_of_the_start_on():
    with emulate() as gpu:
        strided_kernel[(1,)](torch.ones(1024), torch.empty(1024), 8, 32, num_warps=1)
    with pytest.raises(AssertionError) as caught:
        gpu.assert_counters(max_sector_ratio=1)
    said = str(caught.value)
    assert re.match(rf"strided_kernel: {re.escape(shown_path(__file__))}:\d+: a load takes", said)
    # pytest shows the line of the test, and not those of nogpu
    hidden = caught.traceback.filter(caught)
    assert {Path(one.path).name for one in hidden} == {"test_counters.py"}


@triton.jit
def sum_twice_kernel(x, out, BLOCK: tl.constexpr):
    first = tl.load(x + tl.arange(0, BLOCK))
    tl.debug_barrier()  # or the compiler would load once
    second = tl.load(x + tl.arange(0, BLOCK), volatile=True)
    tl.store(out + tl.arange(0, BLOCK), first + second)


def test_limit_of_all_sectors_finds_an_input_that_is_read_twice():
    with emulate() as gpu:
        strided_kernel[(1,)](torch.ones(16384), torch.empty(16384), 1, 16384)
        gpu.assert_counters("strided_kernel", max_sector_ratio=1, max_sectors=4096)
        sum_twice_kernel[(1,)](torch.ones(16384), torch.empty(16384), 16384)
        gpu.assert_counters("sum_twice_kernel", max_sector_ratio=1)
    with pytest.raises(AssertionError) as failure:
        gpu.assert_counters("sum_twice_kernel", max_sectors=4096)
    said = re.sub(r"[^ ]*test_counters.py:\d+", "LINE", str(failure.value))
    assert said == (
        "sum_twice_kernel: global memory takes 6,144 sectors (2,048 by a load in LINE, 2,048 by a "
        "load in LINE, 2,048 by a store in LINE), expected at most 4,096"
    )


def test_limits_that_hold_nothing_are_refused():
    with emulate() as gpu:
        with pytest.raises(AssertionError, match="no launch of a kernel; launched: nothing"):
            gpu.assert_counters(max_bank_conflicts=0)
        strided_kernel[(1,)](torch.ones(32), torch.empty(32), 1, 32, num_warps=1)
    with pytest.raises(AssertionError, match="no launch of other; launched: strided_kernel"):
        gpu.assert_counters("other", max_bank_conflicts=0)
    with pytest.raises(AssertionError, match="no wait for asynchronous copies, expected at least"):
        gpu.assert_counters(min_copies_in_flight=1)
    for limits, said in (
        ({}, "there is no limit"),
        ({"max_conflicts": 0, "max_bank_conflicts": 0}, "max_conflicts is no limit"),
        ({"max_registers": None}, "there is no limit"),
    ):
        with pytest.raises(TypeError, match=f"^{said}, expected some of max_sector_ratio, "):
            gpu.assert_counters(**limits)


def test_barriers_are_counted_by_warps():
    """A sum over four warps needs one or more."""
    with emulate() as gpu:
        sum_kernel[(3,)](torch.ones(512), torch.empty(1), 512)
    count, rest = divmod(gpu.launches[0].counters.total.barriers, 3 * 4)
    assert (count > 0, rest) == (True, 0)
    assert f"barriers: each warp arrives at {count}" in gpu.launches[0].counted()


def test_the_bound_of_a_launch_is_that_of_its_slowest_unit():
    """The bound of a launch names the unit that needs most, and memory beside it."""
    x = torch.ones(2**20)
    with emulate() as gpu:
        strided_kernel[(1,)](x, x.clone(), 1, 2**10)
    h100, *others = gpu.launches[0].bounds
    assert [h100.gpu, *(one.gpu for one in others)] == ["H100", "H200", "A100", "B200"]
    assert h100.microseconds["memory"] == pytest.approx(2 * 4096 / 3.35e6)
    assert str(h100).startswith("at least ")


@pytest.mark.parametrize(
    "registers, warps, shared, arch, programs",
    [
        (32, 4, 0, "sm_90", 16),  # as many warps as there may be
        (16, 1, 0, "sm_90", 32),  # as many programs
        (88, 2, 0, "sm_90", 10),  # by a quarter of the registers
        (88, 1, 0, "sm_90", 20),
        (80, 1, 0, "sm_90", 24),
        (255, 8, 0, "sm_90", 1),
        (64, 4, 49_152, "sm_90", 4),
        (64, 4, 49_152, "sm_80", 3),
    ],
)
def test_programs_of_a_multiprocessor(registers, warps, shared, arch, programs):
    """Of cuda_occupancy.h's rules, and NVIDIA's table of compute capabilities."""
    assert Resources(registers, 0).resident_programs(warps, shared, arch) == programs


def test_a_source_that_was_renamed_is_named_by_its_file():
    assert moved(("/a/first.py", 9), "/a/first.py", "/a/second.py") == ("/a/second.py", 9)
    assert moved(("/a/first.py", 9), "/a/kernel.py", "/b/first.py") == ("/b/first.py", 9)
    assert moved(("/a/helper.py", 9), "/a/first.py", "/a/second.py") == ("/a/helper.py", 9)
    assert moved(None, "/a/first.py", "/a/second.py") is None
