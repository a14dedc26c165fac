# SPDX-License-Identifier: MIT
"""A launch begins, scans and copies the pages that it touches, and no others."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from test_core import in_python

from nogpu import emulate
from nogpu.machine.allocation import ALIGNED, Allocation, Unwritten
from nogpu.machine.vector_clocks import GIVEN, UNWRITTEN
from nogpu.machine.workers import _mirror
from nogpu.native.layout import PAGE

PATTERN = b"\xc7\xa3\xd5\xff"
WAYS = {"core": nullcontext, "python": in_python}
FAR = 5000  # elements, so that each one is in another page


@triton.jit
def far_kernel(x, out, stride, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(out + i * stride, tl.load(x + i * stride) + 1)


def pages_of(t: torch.Tensor, stride: int, count: int) -> list[int]:
    """The pages of the elements, from the aligned address below the tensor."""
    first = t.data_ptr() % ALIGNED
    return sorted({(first + 4 * stride * n) // PAGE for n in range(count)})


@pytest.mark.parametrize("way", ["core", "python"])
def test_a_launch_begins_the_pages_that_it_touches(way, monkeypatch):
    begun, scanned = {}, []
    touched_sectors, note = Allocation.touched_sectors, Unwritten.note

    def sectors(place):
        found = touched_sectors(place)
        begun[place.name[:1]] = np.flatnonzero(place.pages).tolist()
        scanned.append(found.shape[1])
        return found

    def noted(one, pages, written, unit):
        scanned.append(len(pages))
        note(one, pages, written, unit)

    monkeypatch.setattr(Allocation, "touched_sectors", sectors)
    monkeypatch.setattr(Unwritten, "note", noted)
    with WAYS[way](), emulate() as gpu:
        x, out = torch.arange(32.0 * FAR), torch.empty(32 * FAR)
        far_kernel[(1,)](x, out, FAR, B=32)
        far_kernel[(1,)](out, torch.empty(32 * FAR), FAR, B=32)  # which was written there
        assert gpu.faults == []
        far_kernel[(1,)](out, torch.empty(32 * FAR), FAR + 1, B=16)
    assert begun == {"x": pages_of(out, FAR + 1, 16), "o": begun["o"]}
    assert all(0 < n <= 32 for n in scanned)
    assert len(scanned) >= 9  # both tensors of each launch, and what torch.empty gave
    assert torch.equal(out[::FAR], x[::FAR] + 1)
    (fault,) = gpu.faults
    assert "x[5001] was not written before" in fault.message


@pytest.mark.parametrize("schedules", ["one", "all"])
@pytest.mark.parametrize("way", ["core", "python"])
def test_a_page_that_numpy_has_written_is_written(way, schedules):
    """And no other one: its neighbour is found."""
    with WAYS[way](), emulate(schedules=schedules) as gpu:
        x = torch.empty(8 * PAGE)
        x.numpy()[: 2 * PAGE] = 5
        out = torch.zeros(8 * PAGE)
        far_kernel[(1,)](x, out, PAGE // 4, B=4)
        assert gpu.faults == []
        assert out[: PAGE : PAGE // 4].eq(6).all()
        far_kernel[(1,)](x, out, PAGE, B=4)
    assert [fault.name for fault in gpu.faults] == ["uninitialised memory"]
    assert gpu.faults[0].message.startswith((f"x[{2 * PAGE}]", f"x[{3 * PAGE}]"))


@triton.jit
def add_one_kernel(x, stride, B: tl.constexpr):
    i = tl.program_id(0) + tl.arange(0, B) * stride
    tl.store(x + i, tl.load(x + i) + 1)


@pytest.mark.parametrize("way", ["core", "python"])
def test_schedules_restore_the_pages_that_were_touched(way, monkeypatch):
    restored = []
    restore = Allocation.restore

    def count(place):
        restored.append(place.touched_pages().tolist())
        restore(place)

    monkeypatch.setattr(Allocation, "restore", count)
    x = torch.zeros(16 * FAR)
    with WAYS[way](), emulate(schedules="all") as gpu:
        add_one_kernel[(2,)](x, FAR, B=16, num_warps=1)
    assert x[::FAR].eq(1).all()  # three schedules would be 3
    assert x[1::FAR].eq(1).all()  # of the second program, in the same pages
    assert float(x.sum()) == 32
    assert restored == [pages_of(x, FAR, 16)] * 2
    assert gpu.faults == []


def place_of(pages: int) -> Allocation:
    data = np.frombuffer(bytearray(PATTERN * (pages * PAGE // 4)), np.uint8)
    place = Allocation("x", 2**40, len(data), 4, data)
    place.unwritten = Unwritten(2**40, len(data), PATTERN)
    return place


def test_what_is_kept_of_pages_is_what_is_kept_of_all():
    place = place_of(8)
    place.touch(np.array([0, 3 * PAGE, 3 * PAGE + 64]), 4)
    assert place.touched_pages().tolist() == [0, 3]
    writes = place.by_page(place.writes)
    assert (writes[[0, 3]] == UNWRITTEN).all()
    assert (writes[[1, 2, 4, 5, 6, 7]] == GIVEN).all()  # nobody has looked yet
    place.writes[:8] = 7
    place.refine(2)
    assert (place.writes[:16] == 7).all()
    assert (place.by_page(place.writes)[[0, 3]] == UNWRITTEN).sum() == 2 * PAGE - 16 - PAGE
    mirrored = place.copy_of(place.writes)
    assert np.array_equal(mirrored, place.writes)
    place.end_launch()
    assert place.writes[:17].tolist() == [GIVEN] * 16 + [UNWRITTEN]


@pytest.mark.parametrize("offset", [0, 4, 64])
def test_of_unwritten_memory_is_left_what_nobody_has_written(offset):
    one = Unwritten(2**40 + offset, 3 * PAGE, PATTERN)
    data = np.frombuffer(PATTERN * PAGE, np.uint8)[:PAGE]
    assert int(one.of_page(0, data).sum()) == PAGE - offset
    changed = data.copy()
    changed[offset + 1] ^= 1
    assert not one.of_page(0, changed).any()
    written = np.zeros((1, PAGE), np.bool_)
    written[0, 100:132] = True
    one.note(np.array([1]), written, 4)
    one.note(np.array([1]), written, 4)  # once more changes nothing
    assert one.left == 3 * PAGE - 32
    assert one.unit == 4
    assert int(one.of_page(1, data).sum()) == PAGE - 32
    one.note(np.arange(one.pages), np.ones((one.pages, PAGE), np.bool_), 4)
    assert one.left == 0


def test_cores_mirror_the_pages_that_were_touched():
    place = place_of(8)
    place.touch(np.array([5 * PAGE]), 4)
    place.touched = np.zeros((2, 8 * PAGE // 32), np.uint8)
    mine = _mirror(place)
    assert np.array_equal(mine.writes, place.writes)
    mine.touch(np.array([PAGE]), 4)
    mine.touched[1, PAGE // 32] = 1
    assert place.touched_pages().tolist() == [5]
    place.touch_also(mine)
    assert place.touched_pages().tolist() == [1, 5]
    assert place.touched_sectors().sum() == 1


def test_a_block_that_is_undone_leaves_memory_unwritten():
    """Also where its launches have written a part."""
    with emulate() as gpu:
        x, out = torch.ones(32 * FAR), torch.empty(32 * FAR)
        with gpu.undone():
            far_kernel[(1,)](x, out, FAR, B=32)
        far_kernel[(1,)](out, torch.empty(32 * FAR), FAR, B=32)
    assert [fault.name for fault in gpu.faults] == ["uninitialised memory"]
