# SPDX-License-Identifier: MIT
"""A launch that a fault has ended has no estimated time, and its reports say why."""

import json

import pytest
import torch
import triton
import triton.language as tl
from faults import next_program_first_kernel
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from nogpu import emulate
from nogpu.machine.gpu import Gpu
from nogpu.report.report import Report

NO_TIME = "no estimate: {} has ended the launch early"


@triton.jit
def check(x, out, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i)
    tl.device_assert(value < 40.0, "too large")
    tl.store(out + i, 2 * value)


@gluon.jit
def wait_for_nobody(out):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    barrier = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(barrier, count=1)
    mbarrier.wait(barrier, 0)
    gl.store(out + gl.arange(0, 128, layout), gl.full([128], 1.0, gl.float32, layout))


def shown(report: Report, ended: str) -> tuple[bool, list[bool]]:
    """Whether the table of times says why there is none, and whether JSON has a time by launch."""
    groups = json.loads(report.as_json())["groups"]
    assert [one["ended"] for one in groups] == [ended or None]
    texts = report.as_text(), report.counted()
    assert ["counts are incomplete" in text for text in texts] == 2 * [bool(ended)]
    return NO_TIME.format(ended) in report.timed(), [bool(one["time"]) for one in groups]


@pytest.mark.parametrize("most, ended", [(1.0, ""), (50.0, "trap")])
def test_an_assertion_ends_a_launch_and_its_time(most, ended):
    x = torch.linspace(0, most, 512)
    with emulate() as gpu:
        check[(4,)](x, torch.empty(512), BLOCK=128, debug=True)
    assert bool(gpu.faults) == bool(ended)
    assert gpu.launches[0].ended == ended
    assert bool(gpu.launches[0].time) != bool(ended)
    assert shown(gpu.report(), ended) == (bool(ended), [not ended])


def test_programs_that_wait_in_a_circle_have_no_time():
    x, flags = torch.ones(4, 64), torch.zeros(4, dtype=torch.int32)
    with emulate() as gpu:
        next_program_first_kernel[(4,)](x, flags, torch.zeros(4, 64), BLOCK=64, num_warps=1)
    assert [fault.name for fault in gpu.faults] == ["deadlock"]
    assert not gpu.launches[0].time
    assert shown(gpu.report(), "deadlock") == (True, [False])


def test_warps_that_wait_for_nobody_have_no_time():
    with emulate() as gpu:
        wait_for_nobody[(2,)](torch.zeros(128))
    assert [fault.name for fault in gpu.faults] == ["deadlock"]
    assert shown(gpu.report(), "deadlock") == (True, [False])


def test_an_interrupted_launch_has_no_time(monkeypatch):
    def interrupt(gpu, positions):
        raise KeyboardInterrupt

    with emulate() as gpu:
        monkeypatch.setattr(Gpu, "_run", interrupt)
        with pytest.raises(KeyboardInterrupt):
            check[(4,)](torch.ones(512), torch.empty(512), BLOCK=128, debug=True)
    assert shown(gpu.report(), "KeyboardInterrupt") == (True, [False])


@triton.jit
def pipelined_sum(x, out, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(STEPS):
        block = tl.load(x + k * BLOCK * BLOCK + i[:, None] * BLOCK + i[None, :])
        a = tl.dot(block, block, a)
    tl.store(out + i[:, None] * BLOCK + i[None, :], a)


def test_a_copy_outside_of_its_tensor_is_named_as_a_load_and_ends_no_launch():
    x, out = torch.zeros(3 * 256, dtype=torch.float16), torch.zeros(256)
    with emulate() as gpu:
        pipelined_sum[(1,)](x, out, BLOCK=16, STEPS=4)
    (fault,) = [one for one in gpu.faults if one.name == "out of bounds"]
    where = "loads element 768 of the storage of x, which is outside of x (float16 [768])"
    assert fault.message == f"thread 0 {where}"
    assert shown(gpu.report(), "") == (False, [True])


@gluon.jit
def copy_of_two(x, y, out, first, n):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    i = gl.arange(0, 128, layout)
    shared = gl.allocate_shared_memory(gl.float32, [128], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    async_copy.async_load(shared, gl.where(i < first, x + i, y + i), mask=i < n)
    async_copy.commit_group()
    async_copy.wait_group(0)
    gl.store(out + i, shared.load(layout))


@pytest.mark.skipif(not hasattr(async_copy, "async_load"), reason="Gluon of Triton 3.8")
@pytest.mark.parametrize("n, thread", [(128, None), (97, None), (112, 100)])
def test_a_copy_names_the_thread_that_is_outside(n, thread):
    """Its warp may copy from two tensors, and some of its threads from none."""
    x, y, out = torch.randn(128), torch.randn(128), torch.zeros(128)
    given = y if thread is None else y[:thread].clone()
    with emulate() as gpu:
        copy_of_two[(1,)](x, given, out, 50, n)
    right = torch.where(torch.arange(128) < 50, x, y)
    right[n:] = 0
    if thread is not None:
        (fault,) = gpu.faults
        where = f"element {thread} of the storage of y, which is outside of y (float32 [{thread}])"
        assert fault.message == f"thread {thread} loads {where}"
        assert out[thread:n].isnan().all()  # what has no value is none
        right[thread:n] = out[thread:n] = 0
    assert bool(gpu.faults) == (thread is not None)
    assert torch.equal(out, right)
