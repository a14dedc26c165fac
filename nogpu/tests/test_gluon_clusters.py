# SPDX-License-Identifier: MIT
"""Clusters in Gluon: multicast, mbarriers of two CTAs, stores to other CTAs, and their faults."""

import pytest
import torch
import triton

from nogpu import emulate

if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8):
    pytest.skip("layouts over CTAs need Triton 3.8", allow_module_level=True)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_store,
    cluster,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

slow = pytest.mark.slow


def normal(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def descriptor(t: torch.Tensor, block: list[int], cga: list[list[int]]) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.float16, cga_layout=cga)
    return TensorDescriptor.from_tensor(t, block, layout)


@gluon.jit
def matmul(
    a, b, c, K: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    EXTRA: gl.constexpr, BARRIER: gl.constexpr
):  # fmt: skip
    """Each CTA has half of the rows of A. Both have all of B, which one of them loads."""
    left = gl.allocate_shared_memory(a.dtype, a.block_shape, a.layout)
    right = gl.allocate_shared_memory(b.dtype, b.block_shape, b.layout)
    loaded = mbarrier.allocate_mbarrier()
    mbarrier.init(loaded, count=1)
    product: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, 1], [16, BN, 16], cga_layout=((1, 0),)
    )
    total = gl.zeros((BM, BN), gl.float32, product)
    phase = 0
    for k in range(0, K, BK):
        mbarrier.expect(loaded, a.nbytes_per_cta + b.nbytes_per_cta + EXTRA)
        tma.async_load(a, [0, k], loaded, left)
        tma.async_load(b, [k, 0], loaded, right, multicast=True)
        mbarrier.wait(loaded, phase)
        total = warpgroup_mma(left, right, total)
        phase ^= 1
        if BARRIER:
            cluster.barrier()
    out = gl.allocate_shared_memory(c.dtype, c.block_shape, c.layout, total.to(gl.float16))
    fence_async_shared()
    tma.async_store(c, [0, 0], out)
    tma.store_wait(pendings=0)
    mbarrier.invalidate(loaded)


def run_matmul(extra: int = 0, barrier: bool = True) -> None:
    a, b = normal(128, 128), normal(128, 64, seed=1)
    c = torch.empty(128, 64, dtype=torch.float16)
    matmul[(1,)](
        descriptor(a, [128, 64], [[1, 0]]), descriptor(b, [64, 64], [[0, 0]]),
        descriptor(c, [128, 64], [[1, 0]]), K=128, BM=128, BN=64, BK=64, EXTRA=extra,
        BARRIER=barrier, num_ctas=2,
    )  # fmt: skip
    exact, sizes = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    bound = 128 * 2.0**-24 * sizes + 2.0**-11 * exact.abs()  # 128 sums, and a rounding to float16
    if extra == 0 and barrier:
        assert ((c.double() - exact).abs() <= bound).all()


def test_a_multicast_product_has_right_values():
    with emulate(schedules="all") as gpu:
        run_matmul()
    assert gpu.faults == []


@pytest.mark.parametrize(
    "extra, barrier, name, code, message",
    [
        (0, False, "race", "multicast=True", "overwrites .* of CTA 1, which a product of warp"),
        pytest.param(
            8192, True, "deadlock", "mbarrier.wait", "its mbarrier expects 8,192 bytes", marks=slow
        ),
        pytest.param(
            -8192, True, "deadlock", "mbarrier.wait", "bytes that it did not expect", marks=slow
        ),
    ],
)
def test_fault_of_a_multicast_product_is_found(extra, barrier, name, code, message):
    with emulate() as gpu:
        run_matmul(extra, barrier)
    fault = next(fault for fault in gpu.faults if fault.name == name)
    assert code in str(fault)
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(fault.message)


@gluon.jit
def broadcast(x, out):
    to = gl.allocate_shared_memory(x.dtype, x.block_shape, x.layout)
    loaded = mbarrier.allocate_mbarrier()
    mbarrier.init(loaded, count=1)
    mbarrier.expect(loaded, x.nbytes_per_cta)
    tma.async_load(x, [0, 0], loaded, to, multicast=True)
    mbarrier.wait(loaded, phase=0)
    mbarrier.invalidate(loaded)
    tma.async_store(out, [0, 0], to)
    tma.store_wait(pendings=0)


@slow
@pytest.mark.parametrize("cga", [[[0, 0]], [[0, 0], [1, 0]], [[1, 0], [0, 0]]])
def test_some_ctas_of_a_cluster_load_together(cga):
    x, out = normal(64, 64), torch.empty(64, 64, dtype=torch.float16)
    with emulate(schedules="all") as gpu:
        given = [descriptor(t, [64, 64], cga) for t in (x, out)]
        broadcast[(1,)](*given, num_ctas=2 ** len(cga))
    assert gpu.faults == []
    assert torch.equal(x, out)


@gluon.jit
def meet(WAIT: gl.constexpr):
    both = mbarrier.allocate_mbarrier(two_ctas=True)
    mbarrier.init(both, count=1)
    mbarrier.arrive(both, count=1)
    if WAIT:
        mbarrier.wait(both, phase=0)


@slow
def test_an_mbarrier_of_two_ctas():
    with emulate(schedules="all") as gpu:
        meet[(1,)](WAIT=True, num_ctas=2)
        assert gpu.faults == []
        meet[(1,)](WAIT=False, num_ctas=2)
    assert {fault.name for fault in gpu.faults} == {"ended CTA"}
    assert "mbarrier.arrive(both" in str(gpu.faults[0])


@gluon.jit
def send(x, out, SIZE: gl.constexpr, WAIT: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0], cga_layout=((1,),))
    shared: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0], cga_layout=((1,),))
    to = gl.allocate_shared_memory(gl.float32, [SIZE], shared)
    sent = mbarrier.allocate_mbarrier()
    mbarrier.init(sent, count=1)
    mbarrier.expect(sent, SIZE * 2)  # half of the numbers, of 4 bytes
    i = gl.arange(0, SIZE, layout)
    async_store(to, gl.load(x + i), sent)
    if WAIT:
        mbarrier.wait(sent, phase=0)
    gl.store(out + i, to.load(layout))


@slow
def test_an_asynchronous_store_is_waited_for():
    x, out = normal(256, dtype=torch.float32), torch.empty(256)
    with emulate(schedules="all") as gpu:
        send[(1,)](x, out, SIZE=256, WAIT=True, num_ctas=2)
        assert gpu.faults == []
        assert torch.equal(x, out)
        send[(1,)](x, out, SIZE=256, WAIT=False, num_ctas=2)
    assert {"race"} <= {fault.name for fault in gpu.faults}


@gluon.jit
def convert(x, out, SIZE: gl.constexpr, before: gl.constexpr, after: gl.constexpr):
    i = gl.expand_dims(gl.arange(0, SIZE, gl.SliceLayout(1, before)), 1)
    j = gl.expand_dims(gl.arange(0, SIZE, gl.SliceLayout(0, before)), 0)
    value = gl.convert_layout(gl.load(x + i * SIZE + j), after)
    i = gl.expand_dims(gl.arange(0, SIZE, gl.SliceLayout(1, after)), 1)
    j = gl.expand_dims(gl.arange(0, SIZE, gl.SliceLayout(0, after)), 0)
    gl.store(out + i * SIZE + j, 2 * value)


@slow
def test_a_layout_is_converted_over_ctas():
    x, out = normal(64, 64, dtype=torch.float32), torch.empty(64, 64)
    rows, columns = (
        gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0], cga_layout=[cga])
        for cga in ([1, 0], [0, 1])
    )
    with emulate(schedules="all") as gpu:
        convert[(1,)](x, out, SIZE=64, before=rows, after=columns, num_ctas=2)
    assert gpu.faults == []
    assert torch.equal(out, 2 * x)
