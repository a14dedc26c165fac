# SPDX-License-Identifier: MIT
"""The machine in what no kernel's values show: numbers of programs, stacks, records and workers."""

import os
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from launch import Gpu
from test_consan import APART

from nogpu import emulate
from nogpu.machine import gpu, workers
from nogpu.machine.allocation import Allocation
from nogpu.machine.definedness import full
from nogpu.machine.gpu_state import SCHEDULES
from nogpu.machine.parse import PtxError, parse
from nogpu.machine.trace import Trace
from nogpu.native.blocks import Blocks

KERNEL = """.version 9.0
.target sm_90a
.visible .entry k(.param .u64 k_param_0)
.reqntid 32
{{
.reg .b32 %lane, %r, y; .reg .b64 %at; .reg .pred p;
mov.u32 %lane, %tid.x; mov.u32 %r, %ctaid.x; mad.lo.u32 %r, %r, 32, %lane;
ld.param.b64 %at, [k_param_0]; mad.wide.u32 %at, %r, 4, %at;
{}
st.global.b32 [%at], y;
ret;
}}
"""
EXCHANGE = tl.constexpr("{ .reg .pred p; shfl.sync.bfly.b32 $0|p, $1, 1, 31, -1; }")


def test_a_program_that_python_executes_races_with_the_one_before_it():
    """Program 8 asks for its multiprocessor, which Python answers, and may store where 7 has.

    The core in C has executed 7 and those before it. Each of them has another number.
    """
    code = """mov.u32 y, %r; setp.lt.u32 p, %r, 256; @p bra STORE;
        mov.u32 y, %smid; sub.u64 %at, %at, {}; STORE:"""
    out = (tried := Gpu(SCHEDULES[0])).tensor(torch.zeros(9, 32, dtype=torch.int32))
    with (
        patch.object(Blocks, "run", autospec=True, side_effect=Blocks.run) as run,
        patch.object(gpu, "least_seconds", lambda places: float("inf")),
    ):
        tried.launch(KERNEL.format(code.format(0)), [out], (9, 1, 1))
    assert [len(call.args[1]) for call in run.mock_calls] == [2, 7]
    assert tried.read(out)[7:, :2].tolist() == [[224, 225], [8, 8]]
    with pytest.raises(PtxError, match="two programs write byte 896"):
        tried.launch(KERNEL.format(code.format(128)), [out], (9, 1, 1))


def test_arrays_of_a_stack_begin_at_multiples_of_16():
    sizes = ".local .align 1 .b8 a[16]; .local .align 1 .b8 b[17]; .local .align 1 .b8 c[1];"
    kernel = parse(KERNEL.format(f"{sizes} mov.u32 y, 0;"))
    assert kernel.locals == {"a": 0, "b": 16, "c": 48}
    assert kernel.local_bytes == 64


@pytest.mark.parametrize("kind", ["b1", "i1", "i2", "u4", "f4", "u8"])
def test_a_mask_of_all_bits_has_each_bit(kind):
    mask = full(np.dtype("?" if kind == "b1" else kind))
    assert mask.shape == (32,)
    bits = np.unpackbits(mask.view(np.uint8)) if kind != "b1" else mask
    assert bits.all()


@triton.jit
def exchange(x, out, A: tl.constexpr):
    i = tl.arange(0, 32)
    y = tl.inline_asm_elementwise(A, "=r,r", [tl.load(x + i)], tl.int32, is_pure=True, pack=1)
    tl.store(out + i, y)


def test_an_exchange_of_undefined_values_is_a_fault_of_who_stores_them():
    """And not of the predicate, which the exchange only writes."""
    x = torch.arange(32, dtype=torch.int32)
    with emulate() as found:
        exchange[(1,)](x, out := torch.empty_like(x), EXCHANGE, num_warps=1)
        assert torch.equal(out, x ^ 1)
        exchange[(1,)](torch.empty_like(x), out, EXCHANGE, num_warps=1)
    (fault,) = found.faults
    assert (fault.name, fault.source[0]) == ("uninitialised memory", __file__)


@pytest.mark.parametrize("code", ["mov.u32 y, %smid;", APART.format("bfly.b32")])
def test_a_record_has_each_instruction_of_the_first_program(code):
    tried = Gpu(SCHEDULES[0])
    out = tried.tensor(torch.zeros(32, dtype=torch.int32))
    tried.trace = Trace()
    tried.launch(KERNEL.format(code), [out])
    (recorded,) = tried.trace.executed.values()
    counts = np.bincount([pc for _, pc in recorded], minlength=len(tried.counts.table))
    assert counts.sum() > 0
    assert counts.tolist() == tried.counts.table[:, 0].tolist()


def test_a_span_ends_when_a_warp_has_waited_first():
    trace, operation = Trace(), SimpleNamespace(read=7, written=8, what="a copy", line=5)
    for time in (3, 8, 20):
        trace.operate(SimpleNamespace(index=2, count=time - 1, waited=1), operation)
    (span,) = trace.spans
    assert (span.warp, span.what, span.begin, span.end) == (2, "a copy", 3, 8)


def test_cores_are_those_that_the_process_may_use(monkeypatch):
    if hasattr(os, "sched_getaffinity"):
        assert workers.worker_count() == len(os.sched_getaffinity(0))
        monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    for found, expected in ((5, 5), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda found=found: found)
        assert workers.worker_count() == expected


@pytest.mark.parametrize("count", [1, 2, 3, 16])
def test_all_cores_are_taken_where_they_save_the_time_of_their_copies(monkeypatch, count):
    """Each of n workers copies and compares the shadows of all elements, and the blocks take
    1 − 1/n less time than on one core: t (1 − 1/n) > n · copies, but for n = 1."""
    monkeypatch.setattr(workers, "worker_count", lambda: count)
    place = Allocation("x", 0, 16 * 1000)
    copies = workers.SECONDS_OF_ELEMENT * 1000
    saved = max(1 - 1 / count, 1) if count == 1 else 1 - 1 / count
    expected = workers.LEAST_SECONDS + count * copies / saved
    assert workers.least_seconds([place]) == pytest.approx(expected)
