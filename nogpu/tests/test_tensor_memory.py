# SPDX-License-Identifier: MIT
"""Sums in the tensor memory of sm_100: a product may add to cells that were written and waited for.

Others must be named at the product. The cells of a sum have one writer, or a few.
"""

import pytest
import torch
import triton

from nogpu import emulate
from nogpu.machine.vector_clocks import Events

if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8):
    pytest.skip("the kernels take Gluon of Triton 3.8 or later", allow_module_level=True)

import gluon_cases
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.blackwell import (
    TensorMemoryLayout,
    allocate_tensor_memory,
    tcgen05_commit,
    tcgen05_mma,
)
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma


@gluon.jit
def add_products(a, b, c, N: gl.constexpr, STORED: gl.constexpr, PRODUCTS: gl.constexpr):
    """Add to the first ``STORED`` columns of zeros, or where that is 0, to a first product."""
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
    if STORED:
        part = total.slice(0, STORED)
        part.store(gl.full([128, STORED], 0.0, gl.float32, part.get_reg_layout()))
    else:
        tcgen05_mma(left, right, total, use_acc=False)
    for _ in gl.static_range(PRODUCTS):
        tcgen05_mma(left, right, total, use_acc=True)  # NAMED
    tcgen05_commit(barriers.index(1))
    mbarrier.wait(barriers.index(1), phase=0)
    values = gl.convert_layout(total.load(), layout)
    m = gl.arange(0, 128, gl.SliceLayout(1, layout))
    n = gl.arange(0, N, gl.SliceLayout(0, layout))
    gl.store(c + m[:, None] * N + n[None, :], values)


@pytest.mark.parametrize("stored, products", [(32, 1), (0, 1), (0, 5), (16, 1)])
def test_a_product_adds_to_cells_that_were_written(stored, products, monkeypatch):
    asked, who = [], Events.who

    def counted(self: Events, number: int) -> str:
        asked.append(number)
        return who(self, number)

    monkeypatch.setattr(Events, "who", counted)
    a, b, descriptors = gluon_cases.operands(128)
    c = torch.empty(128, 32)
    with emulate("sm_100") as gpu:
        add_products[(1,)](*descriptors, c, 32, stored, products)
    errors = [fault for fault in gpu.faults if fault.kind == "error"]
    if stored == 16:  # of 32 columns
        (fault,) = errors
        assert (fault.name, fault.source[0]) == ("race", __file__)
        assert "takes tensor memory that was not written" in fault.message
        return
    assert errors == []
    times = products + (stored == 0)
    # A sum of 64·times products in float32 is off by less than so many units of their sizes.
    size = times * (a.double().abs() @ b.double().abs())
    assert ((c - times * (a.double() @ b.double())).abs() <= 64 * times * 2.0**-23 * size).all()
    # Each of four warps has stored its own cells; a product has one event.
    assert len(asked) <= 4 * gpu.launches[0].ptx.count("tcgen05.mma.")
