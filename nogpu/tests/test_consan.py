# SPDX-License-Identifier: MIT
"""Kernels of ConSan: its checks are assertions of the kernel, and its tables are constants."""

from unittest.mock import patch

import numpy as np
import pytest
import triton
from launch import Gpu
from test_instructions import EXECUTORS, as_tensor, by, executed

from nogpu import emulate
from nogpu.machine.gpu_state import SCHEDULES
from nogpu.machine.parse import PtxError

APART = """
    .reg .b32 v, w; setp.gt.u32 p, %lane, 20; mul.lo.u32 v, %lane, 3;
    @p bra ABOVE;
    add.u32 w, v, 1000; shfl.sync.bfly.b32 y, w, 1, 31, -1; bra JOINED;
ABOVE:
    mov.u32 w, 1; shfl.sync.{} y, v, w, 31, -1; add.u32 y, y, 5;
JOINED:
"""


def test_threads_shuffle_at_several_places():
    """Threads 20 and 21 take numbers of the other side of the branch."""
    lane = np.arange(32, dtype=np.uint32)
    found = executed(APART.format("bfly.b32"), lane, out=np.uint32)
    given = lane * 3 + np.where(lane > 20, 0, 1000)
    assert np.array_equal(found, given[lane ^ 1] + np.where(lane > 20, 5, 0))


def test_other_instructions_at_several_places_are_a_fault():
    with pytest.raises(PtxError, match="a part of"):
        executed(APART.format("up.b32"), np.arange(32, dtype=np.uint32), out=np.uint32)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_the_end_of_a_constant_is_zeros(executor):
    text = """.version 9.0
.target sm_90a
.global .align 8 .b8 table[16] = {1, 0, 0, 0, 0, 0, 0, 0, 2};
.visible .entry k(.param .u64 k_param_0)
.reqntid 32
{
.reg .b32 %lane, %r; .reg .b64 %at, %d;
mov.u32 %lane, %tid.x; and.b32 %r, %lane, 1;
mov.b64 %at, table; mad.wide.u32 %at, %r, 8, %at; ld.global.b64 %d, [%at];
ld.param.b64 %at, [k_param_0]; mad.wide.u32 %at, %lane, 8, %at; st.global.b64 [%at], %d;
ret;
}
"""
    gpu = Gpu(SCHEDULES[0])
    out = gpu.tensor(as_tensor(np.zeros(32, np.int64)))
    with by(executor):
        gpu.launch(text, [out])
    assert gpu.read(out).tolist() == [1, 2] * 16


@pytest.mark.slow
@pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8), reason="Gluon of Triton 3.8"
)
@pytest.mark.parametrize(
    "name, arch, is_right",
    [
        ("03 asynchronous copies", 90, True),
        ("04 boxes by TMA", 90, True),
        ("05 products of a warpgroup", 90, True),
        ("06 products of sm_100", 100, True),
        ("08 specialized warps", 90, True),
        ("a wait for a group too few", 90, False),
    ],
)
def test_consan_fails_an_assertion_where_a_wait_is_missing(name, arch, is_right):
    import gluon_cases  # of Triton 3.8

    case = gluon_cases.CASES[name].run if is_right else gluon_cases.FAULTS[name][0]
    with (
        patch.object(triton.knobs.compilation, "instrumentation_mode", "consan"),
        emulate(f"sm_{arch}") as gpu,
    ):
        results = case()
    errors = [f"{one.name}: {one.message}" for one in gpu.faults if one.kind == "error"]
    if is_right:
        assert errors == []
        assert all(((y.double() - expected).abs() <= bound).all() for y, expected, bound in results)
    else:
        assert errors[0].startswith("assertion: ")
        assert "Accessing buffer with pending access" in errors[0]
