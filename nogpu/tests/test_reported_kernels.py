# SPDX-License-Identifier: MIT
"""Small programs after public reports of faults in Triton and vLLM.

Each fault is named at its line. Beside each stands the program without the fault.
"""

import inspect
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from test_core import in_python

from nogpu import emulate
from nogpu.machine.address_space import AddressSpace
from nogpu.machine.allocation import Allocation
from nogpu.machine.overflow import NOT_FOLLOWED, Lost

VERSION = tuple(map(int, triton.__version__.split(".")[:2]))


def line_of(kernel, text):
    """The number of the only line of a kernel with this text."""
    lines, first = inspect.getsourcelines(kernel.fn)
    (found,) = [n for n, line in enumerate(lines, first) if text in line]
    return found


@triton.jit
def two_products(a, b, c, d, out, K, M: tl.constexpr, N: tl.constexpr, SEPARATE: tl.constexpr):
    m, n = tl.arange(0, M)[:, None], tl.arange(0, N)
    first = tl.zeros((M, N), tl.float32)
    second = tl.zeros((M, N), tl.float32)
    for k in range(0, K, 32):
        i = k + tl.arange(0, 32)
        left, right = tl.load(c + m * K + i), tl.load(d + i[:, None] * N + n)
        first = tl.dot(tl.load(a + m * K + i), tl.load(b + i[:, None] * N + n), first)
        if SEPARATE:
            second = tl.dot(left, right, second)
        else:
            first = tl.dot(left, right, first)  # fault
    tl.store(out + m * N + n, first + second)


@pytest.mark.skipif(VERSION > (3, 8), reason="a fault of Triton up to 3.8")
@pytest.mark.parametrize(
    "arch, separate, stages",
    [
        ("sm_100", False, 3),
        pytest.param("sm_100", False, 1, marks=pytest.mark.slow),
        pytest.param("sm_100", True, 3, marks=pytest.mark.slow),
        pytest.param("sm_90", False, 3, marks=pytest.mark.slow),
    ],
)
def test_two_products_in_one_accumulator_of_sm_100(arch, separate, stages):
    """Up to 3.8 Triton does not let the second wait for the first (triton#10821)."""
    torch.manual_seed(0)
    a, c = torch.randint(-4, 5, (2, 64, 64)).to(torch.bfloat16)
    b, d = torch.randint(-4, 5, (2, 64, 32)).to(torch.bfloat16)
    out = torch.empty(64, 32)
    with emulate(arch) as gpu:
        two_products[(1,)](a, b, c, d, out, 64, 64, 32, separate, num_stages=stages)
    if (arch, separate, stages) == ("sm_100", False, 3):
        (fault,) = gpu.faults
        assert fault.name == "race"
        assert "tensor memory is written by a product" in fault.message
        assert fault.source == (__file__, line_of(two_products, "# fault"))
    else:
        assert gpu.faults == []
        assert torch.equal(out, a.float() @ b.float() + c.float() @ d.float())


@triton.jit
def claim(lock, count, out, BLOCK: tl.constexpr):
    before = tl.atomic_cas(lock, 0, 1)
    number = tl.atomic_add(count, 1)  # fault
    tl.store(out + tl.arange(0, BLOCK), 10 * before + number)


@pytest.mark.slow
@pytest.mark.skipif(VERSION != (3, 8), reason="other versions synchronise these CTAs otherwise")
def test_two_atomics_of_one_number_by_a_cluster():
    """The second overwrites what the other CTA may still read of the first, as only a barrier of
    one CTA lies between them (as in triton#10477)."""
    for ctas in (1, 2):
        lock, count, out = (torch.zeros(n, dtype=torch.int32) for n in (1, 1, 256))
        with emulate("sm_90") as gpu:
            claim[(1,)](lock, count, out, 256, num_ctas=ctas)
        assert (int(lock), int(count)) == (1, 1)
        if ctas == 1:
            assert gpu.faults == []
            assert out.eq(0).all()
        else:
            race = next(one for one in gpu.faults if one.name == "race")
            assert "of CTA 0" in race.message
            assert f"test_reported_kernels.py:{line_of(claim, '# fault')}" in race.message


def test_an_offset_that_overflows_32_bits_is_named_with_the_element_that_was_meant():
    """A page's number times its stride (vllm#47671, vllm#50427)."""
    stride, page = 276_480, 7_999
    wrapped = page * stride - 2**32
    assert wrapped < -(2**31) + 2**28

    def message(count, offset, overflow=NOT_FOLLOWED):
        space = AddressSpace("global memory")
        cache = Allocation(
            f"cache (float16 [{count}])", 2**40, 2 * count, 2, np.zeros(4096, np.uint8)
        )
        cache.index, cache.itemsize = (lambda at: f"cache[{at // 2}]"), 2
        space.add(cache)
        return space.outside(2**40 + 2 * offset, 2, None, overflow)

    meant = f"; cache[{page * stride}] is 2**32 elements further, as if an offset of 32 bits had"
    outside = f"cache[{wrapped}], which is outside of cache (float16 [{8000 * stride}])"
    assert message(8000 * stride, wrapped) == f"{outside}{meant} overflowed; compute it in int64"
    followed = f"; an offset of 32 bits has overflowed, and cache[{page * stride}] was meant"
    overflow = Lost(2 * 2**32, True)
    assert message(8000 * stride, wrapped, overflow) == f"{outside}{followed}; compute it in int64"
    # Negative controls: it is known that none has overflowed; nothing of these tensors lies there.
    assert message(8000 * stride, wrapped, Lost(0, True)) == outside
    assert "2**32" not in message(page * stride, wrapped)
    assert "2**32" not in message(8000 * stride, -1)
    assert "2**32" not in message(8000 * stride, 8000 * stride)


@triton.jit
def copy_pages(cache, pages, out, stride, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """The steps of a loop move an offset of 32 bits."""
    page = tl.load(pages)
    i = tl.arange(0, BLOCK)
    for step in range(STEPS):
        tl.store(out + step * BLOCK + i, tl.load(cache + (page * stride + step * BLOCK + i)))


@triton.jit
def advance_pages(cache, pages, out, stride, STEPS, BLOCK: tl.constexpr):
    """The steps of a loop move a pointer; another factor is a constant, and a shift."""
    i = tl.arange(0, BLOCK)
    at = cache + tl.load(pages) * stride * 4 + i
    for step in range(STEPS):
        tl.store(out + step * BLOCK + i, tl.load(at))
        at += BLOCK


@pytest.mark.parametrize("is_slow", [False, True])
@pytest.mark.parametrize(
    "kernel, factor, page",
    [
        (copy_pages, 1, 131_077),
        (copy_pages, 1, -131_071),  # a negative page
        (copy_pages, 1, 80),  # a page behind the last one
        (advance_pages, 4, 2**31 - 1),
        (advance_pages, 4, -40_000),
        (advance_pages, 4, -5),
        (advance_pages, 4, 2_000),
    ],
)
def test_an_offset_of_a_small_tensor_that_overflows_is_followed_back(kernel, factor, page, is_slow):
    """The message names what was meant; and nothing is said of an offset that is simply wrong."""
    cache, stride = torch.zeros(2**16 + 5), 16_384
    exact = page * stride * factor
    found = (exact + 2**31) % 2**32 - 2**31
    # The kernel's load would be of `out`, if that were where it goes by mistake.
    wrong, tried = cache.data_ptr() + 4 * found, [torch.empty(3, 128)]
    while wrong - tried[-1].nbytes < tried[-1].data_ptr() < wrong + 3 * 512:
        tried.append(torch.empty(3, 128))
    pages, out = torch.tensor([page], dtype=torch.int32), tried[-1]
    with in_python() if is_slow else nullcontext(), emulate("sm_90") as gpu:
        kernel[(1,)](cache, pages, out, stride, 3, 128)
    messages = [fault.message for fault in gpu.faults if fault.name == "out of bounds"]
    said = f"element {found} of the storage of cache, which is outside of cache (float32 [65541])"
    overflow = (
        f"; an offset of 32 bits has overflowed, and element {exact} of the storage of cache was "
        "meant, which is outside, too; compute it in int64"
    )
    assert messages == [f"thread 0 loads {said}{overflow if found != exact else ''}"]


@triton.jit
def gather_far(x, first, second, out, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offset = tl.load(first) + tl.load(second)
    tl.store(out + i, tl.load(x + offset + i))


@pytest.mark.parametrize(
    "first, second, said",
    [
        (2**31 - 1, 2**31 - 1, "element 4294967294 of the storage of x was meant"),
        # The wrapped sum, 2**28, leads so far from x that no other tensor lies there.
        (-(2**31), -(2**31) + 2**28, "element -4026531840 of the storage of x was meant"),
        (-(2**31), 5, ""),
        (2**31 - 1, 0, ""),
    ],
)
def test_a_sum_that_overflows_in_both_directions(first, second, said):
    x, out = torch.zeros(20), torch.empty(32)
    with emulate("sm_80") as gpu:
        terms = (torch.tensor([one], dtype=torch.int32) for one in (first, second))
        gather_far[(1,)](x, *terms, out, 32, num_warps=1)
    (fault,) = (one for one in gpu.faults if one.name == "out of bounds")
    assert said in fault.message
    assert ("overflowed" in fault.message) == bool(said)


@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
@pytest.mark.parametrize("address", [-4, -(2**63), 2**63 - 4])
def test_addresses_below_and_above_all_memory_are_in_none(dtype, address):
    """Registers of 64 bits hold them, with a sign or without one."""
    space = AddressSpace("global memory")
    x = space.add(Allocation("x", 2**20, 64, 4, np.zeros(64, np.uint8)))
    addresses = np.array([address, 2**20 + 4, address], np.int64).astype(dtype)
    ((place, rows, of),), wrong = space.split(addresses, 4)
    assert (place, rows.tolist(), of.tolist()) == (x, [1], [1])
    assert wrong.tolist() == [True, False, True]


@triton.jit
def store_far(tiles, c, table, out, offset, STEPS: tl.constexpr):
    i = tl.arange(0, 32)
    at = c + offset
    for _ in range(STEPS):
        tl.store(at + i, 1.0)
        at += 32
    loaded = tl.load(table).to(tl.pointer_type(tl.float32))
    tl.store(out + i, tl.load(loaded + i + offset, mask=tl.load(tiles) > 0))


@pytest.mark.parametrize("offset, steps", [(-517_295_552, 1), (2**28, 3), (-(2**46), 1)])
def test_a_far_access_names_the_tensor_that_its_line_uses(offset, steps):
    """And not the nearest one; where the address was loaded, none that is far.

    The last offset leads below address 0, as smaller ones do where tensors lie at low addresses.
    """
    tiles, c, out = torch.ones(1, dtype=torch.int32), torch.zeros(100), torch.zeros(32)
    table = torch.tensor([2**40])
    with emulate() as gpu:
        store_far[(1,)](tiles, c, table, out, offset, STEPS=steps, num_warps=1)
    stored, loaded = (one for one in gpu.faults if one.name == "out of bounds")
    where = f"element {offset} of the storage of c, which is outside of c (float32 [100])"
    assert stored.message == f"thread 0 stores {where}"
    far = f"address {(2**40 + 4 * offset) % 2**64:#x}, which is far from every tensor of the launch"
    assert loaded.message == f"thread 0 loads {far}"


@triton.jit
def scaled_sum(x, scales, out, K, MASKED: tl.constexpr):
    total = tl.zeros((1,), tl.float32)
    for k in range(0, K, 128):
        i, group = k + tl.arange(0, 128), k // 32 + tl.arange(0, 4)
        if MASKED:
            exponent = tl.load(scales + group, mask=group * 32 < K, other=0)
        else:
            exponent = tl.load(scales + group)  # fault
        values = tl.reshape(tl.load(x + i, mask=i < K, other=0.0), (4, 32))
        scale = tl.where(exponent == 255, float("nan"), tl.exp2(exponent.to(tl.float32) - 127))
        total += tl.sum(values * scale[:, None])
    tl.store(out + tl.arange(0, 1), total)


@pytest.mark.parametrize("padding, fault", [(0, "out of bounds"), (3, "uninitialised memory")])
def test_scales_behind_the_last_one_are_not_multiplied_by_zero_alone(padding, fault):
    """A byte of 255 is a NaN, and 0 times it is, too (vllm#47303, triton#10772)."""
    for masked in (False, True):
        with emulate("sm_90") as gpu:
            scales = torch.empty(5 + padding, dtype=torch.uint8)
            scales[:5] = 127
            out = torch.empty(1)
            scaled_sum[(1,)](torch.ones(160), scales, out, 160, masked)
        if masked:
            assert (gpu.faults, out.item()) == ([], 160)
        else:
            (found,) = gpu.faults
            assert found.name == fault
            assert f"test_reported_kernels.py:{line_of(scaled_sum, '# fault')}" in str(found)


@triton.jit
def shifted(state, x, out, WAITS: tl.constexpr):
    n, w = tl.arange(0, 64), tl.arange(0, 4)
    new = tl.load(x + n)
    tl.store(out + n, tl.load(state + n * 4 + 1) + tl.load(state + n * 4 + 2) + new)
    if WAITS:
        tl.debug_barrier()
    cells = state + n[:, None] * 4 + w
    later = tl.load(cells + 1, mask=(w < 3)[None, :] & (n < 64)[:, None])
    if WAITS:
        tl.debug_barrier()
    tl.store(cells, tl.where(w[None, :] == 3, new[:, None], later))  # fault


@pytest.mark.parametrize("waits", [False, True])
def test_a_state_that_is_read_in_one_layout_and_overwritten_in_another(waits):
    """No thread waits for the warp that has read its cells (TensorRT-LLM#17522)."""
    with emulate("sm_90") as gpu:
        state, x, out = torch.arange(256.0).view(64, 4), torch.ones(64), torch.empty(64)
        shifted[(1,)](state, x, out, waits)
    assert torch.equal(state, torch.arange(1.0, 257).view(64, 4).index_fill(1, torch.tensor(3), 1))
    assert {fault.name for fault in gpu.faults} == (set() if waits else {"race"})
    if not waits:
        assert f"test_reported_kernels.py:{line_of(shifted, '# fault')}" in str(gpu.faults[0])


@triton.jit
def times_of_rows(x, gradient, stride, out, N: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, N)
    factor = tl.load(gradient + row * stride)  # fault
    tl.store(out + row * N + i, tl.load(x + row * N + i) * factor)


def test_a_gradient_that_is_one_number_for_all_rows():
    """It has many elements, and the memory of one (ROCm/TransformerEngine#623)."""
    x, gradient, out = torch.ones(8, 16), torch.tensor(3.0).expand(8, 2), torch.empty(8, 16)
    for stride in (0, 1):
        with emulate("sm_90") as gpu:
            times_of_rows[(8,)](x, gradient, stride, out, 16)
        if stride == 0:
            assert gpu.faults == []
            assert torch.equal(out, 3 * x)
    (fault,) = gpu.faults
    assert fault.name == "out of bounds"
    assert fault.source == (__file__, line_of(times_of_rows, "# fault"))


@triton.jit
def add_to_tiles(x, bias, out, M, N, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (m < M) & (n < N)
    y = tl.load(x + m * N + n, mask=mask, other=0.0) + tl.load(bias + n, mask=n < N, other=0.0)
    if MASKED:
        tl.store(out + m * N + n, y, mask=mask)
    else:
        tl.store(out + m * N + n, y)  # fault


@pytest.mark.parametrize("m, n", [(32, 32), (17, 40)])
def test_tiles_of_the_edge_that_are_stored_as_a_whole(m, n):
    """They go beyond the end, and into the next rows, too (Dao-AILab/flash-attention#2790)."""
    x, bias = torch.ones(m, n), torch.arange(float(n))
    grid = (triton.cdiv(m, 16), triton.cdiv(n, 16))
    for masked in (True, False):
        out = torch.zeros(m, n)
        with emulate("sm_90") as gpu:
            add_to_tiles[grid](x, bias, out, m, n, masked, 16)
        is_right = masked or (m, n) == (32, 32)
        assert torch.equal(out, x + bias) == is_right
        names = set() if is_right else {"out of bounds", "race between programs"}
        assert {fault.name for fault in gpu.faults} == names
        here = line_of(add_to_tiles, "# fault")
        assert all(fault.source == (__file__, here) for fault in gpu.faults)


@triton.jit
def sums_of_rows(a, x, y, beside, N, some, BLOCK: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    if some > 0:
        tl.store(beside + i, 1.0, mask=(i < 1) & (row == 0))
    total = tl.sum(tl.load(a + row * N + i, mask=i < N) * tl.load(x + i, mask=i < N), 0)
    if some > 1:
        tl.store(beside, 2.0)
        return
    if some > 0:
        tl.store(beside + 1 + i, 3.0, mask=(i < 1) & (row == 0))
    tl.store(y + row, total)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_stores_beside_a_sum_leave_the_sum_as_it_is(arch):
    """A GPU of sm_86 had half of the first program's sum, compiled by Triton 3.7 (triton#11153)."""
    for block, warps in ((4, 1), (4, 4), (512, 4), (1024, 1)):
        y, beside = torch.zeros(4), torch.zeros(2)
        with emulate(arch) as gpu:
            ones = torch.ones(4, 4), torch.ones(4)
            sums_of_rows[(4,)](*ones, y, beside, 4, 1, block, num_warps=warps)
        assert gpu.faults == []
        assert (y.tolist(), beside.tolist()) == ([4.0] * 4, [1.0, 3.0])
