# SPDX-License-Identifier: MIT
"""A sample of a launch's programs counts what all of them would, and its faults are real ones."""

import json
import math
import tracemalloc
from collections import Counter
from collections.abc import Callable
from itertools import product
from random import Random

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from right import chain_kernel, lock_kernel
from small_kernels import matmul_kernel

from nogpu import command, emulate
from nogpu.machine import program_sample
from nogpu.machine.allocation import Allocation
from nogpu.machine.instruction_counts import SECTOR, Counts
from nogpu.machine.parse import parse
from nogpu.record.launch import Launch
from nogpu.triton.emulator import Emulator


@triton.jit
def scale(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, 2 * tl.load(x + i, mask=i < n), mask=i < n)


@triton.jit
def grow(x, out, BLOCK: tl.constexpr):
    """A program's work grows with its number, as in causal attention."""
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for step in range(tl.program_id(0) + 1):
        total += tl.load(x + step * BLOCK + i)
    tl.store(out + tl.program_id(0) * BLOCK + i, total)


@triton.jit
def grouped(
    a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr
):
    """A matrix product whose tiles are numbered by groups of rows, masked at its edges."""
    pid, columns = tl.program_id(0), tl.cdiv(N, BN)
    first = pid // (GROUP * columns) * GROUP
    m = (first + pid % GROUP) * BM + tl.arange(0, BM)
    n = pid % (GROUP * columns) // GROUP * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        left = tl.load(a + m[:, None] * K + k[None, :], mask=m[:, None] < M, other=0)
        right = tl.load(b + k[:, None] * N + n[None, :], mask=n[None, :] < N, other=0)
        total = tl.dot(left, right, total)
    inside = (m[:, None] < M) & (n[None, :] < N)
    tl.store(c + m[:, None] * N + n[None, :], total.to(tl.float16), mask=inside)


def scaled(size: int, most: int | None, **options: str) -> tuple[Emulator, torch.Tensor]:
    with emulate(sample=most, **options) as gpu:
        out = torch.full((size,), -1.0)
        scale[(triton.cdiv(size, 128),)](torch.ones(size), out, size, BLOCK=128)
    return gpu, out


def launched(kernel, grid, arguments, most=None, **options) -> Launch:
    with emulate(sample=most) as gpu:
        kernel[grid](*arguments(), **options)
    assert not gpu.faults
    return gpu.launches[0]


def difference(one: Launch, other: Launch) -> float:
    """The largest relative difference of two launches' counts."""
    mine, others = (np.asarray(launch.counts.table, float) for launch in (one, other))
    return float((np.abs(mine - others) / np.maximum(others, 1)).max())


@pytest.mark.parametrize("schedules", ["one", "all"])
def test_counts_of_programs_that_repeat_are_those_of_all(schedules):
    """The last program of 257 has 100 of 128 elements."""
    whole, _ = scaled(256 * 128 + 100, None)
    part, out = scaled(256 * 128 + 100, 16, schedules=schedules)
    full, few = whole.launches[0], part.launches[0]
    assert (full.executed, few.executed) == (None, 16)
    assert few.counts.equals(full.counts)
    assert few.time == full.time
    # 15 whole programs and the last one have values; the others' memory is as it was.
    assert (out == 2).sum() == 15 * 128 + 100
    assert (out == -1).sum() == 241 * 128


def test_the_memory_of_a_sample_does_not_grow_with_the_grid():
    """Only the first program has elements; each other one stores none."""
    x, out = torch.ones(32), torch.zeros(32)
    few = launched(scale, (64,), lambda: (x, out, 32), 8, BLOCK=32)
    tracemalloc.start()
    try:
        many = launched(scale, (2**24,), lambda: (x, out, 32), 8, BLOCK=32)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**24  # less than a byte for each program
    assert (out == 2).all()
    found, expected = (one.counters.total.instructions["control"] for one in (many, few))
    assert found * 64 == expected * 2**24


def test_programs_of_a_grid_of_two_dimensions_are_scaled_by_kind():
    """Each program of the first, the last and the other rows and columns is one of a kind."""
    a, b = (torch.ones(256, 256).half() for _ in "ab")

    def few(most):
        return launched(
            matmul_kernel, (8, 8), lambda: (a, b, 0 * a, 256), most, BM=32, BN=32, BK=64
        )

    full = few(None)
    for most in (18, 40):  # two and more of each kind
        assert difference(few(most), full) == 0
        assert few(most).counts.distinct_written == full.counts.distinct_written == 4096
        # 18 of 64 tiles read each row and column of tiles.
        assert few(most).counts.distinct_read == full.counts.distinct_read == 8192
        assert few(most).time == full.time


def test_counts_are_near_where_tiles_at_the_edges_are_anywhere_in_the_grid():
    """16 × 16 tiles, of which those of the last row and column are masked in part.

    The sample finds a share of them that differs by its standard deviation from their share p:
    sqrt(p (1 − p) / n). They count at most as much as others, so that this is also the relative
    deviation of what is counted; three of it are allowed. Each term of a time is at most
    proportional to what is counted.
    """
    a, b = torch.ones(500, 32).half(), torch.ones(32, 500).half()

    def few(most):
        sizes = {"BM": 32, "BN": 32, "BK": 32, "GROUP": 4}
        return launched(
            grouped,
            (256,),
            lambda: (a, b, torch.zeros(500, 500).half(), 500, 500, 32),
            most,
            **sizes,
        )

    full, edges = few(None), 31 / 256
    for most in (32, 64):
        bound = 3 * math.sqrt(edges * (1 - edges) / (most - 2))
        found = few(most)
        assert 0 < difference(found, full) <= bound
        assert found.time["H200"].microseconds == pytest.approx(
            full.time["H200"].microseconds, rel=bound
        )


def growing(most: int | None) -> Launch:
    x = torch.ones(64, 32)
    return launched(grow, (64,), lambda: (x, torch.empty(64, 32)), most, BLOCK=32, num_warps=1)


def test_counts_are_near_where_work_grows_along_the_grid(monkeypatch):
    """One program of each n-th part of the grid works at most 1/n of the most more or less than
    another one of its part, which is 2/n of the average."""
    most, full = 16, growing(None)
    bound = 2 / (most - 2)

    def off(few: Launch) -> float:
        instructions = full.counters.total.instruction_count
        return abs(few.counters.total.instruction_count / instructions - 1)

    few = growing(most)
    assert 0 < off(few) <= bound
    # The last program reads all that others do, and each program writes its own.
    assert few.counts.distinct_read == full.counts.distinct_read
    assert few.counts.distinct_written == full.counts.distinct_written
    # The check would notice programs that are not spread over the grid.
    monkeypatch.setattr(
        program_sample.Kind, "spread", lambda kind, count, random: map(kind.position, range(count))
    )
    assert off(growing(most)) > bound


def test_a_sample_is_of_the_edges_and_spread_over_the_others():
    for programs in product((1, 2, 3, 8), repeat=3):
        count = math.prod(programs)
        for most in (6, 18, 60, count - 1):
            if not program_sample.LEAST <= most < count:
                continue
            found = program_sample.kinds(programs, most)
            shares = program_sample.shares([one.size for one in found], most)
            assert sum(one.size for one in found) == count
            assert sum(shares) == most
            assert all(1 <= n <= kind.size for n, kind in zip(shares, found, strict=True))
            every = {one for kind in found for one in kind.spread(kind.size, Random(0))}
            assert every == set(np.ndindex(programs))
    corners = [one.position(0) for one in program_sample.kinds((40, 40, 1), 18) if one.size == 1]
    assert corners == [(0, 0, 0), (0, 39, 0), (39, 0, 0), (39, 39, 0)]
    (others,) = (one for one in program_sample.kinds((42, 1, 1), 18) if one.size == 40)
    parts = [position[0] - 1 for position in others.spread(10, Random(0))]
    assert [n // 4 for n in parts] == list(range(10))


LOADS = """.version 9.0
.target sm_90a
.visible .entry k(.param .u64 k_param_0)
.reqntid 32
{
.reg .b32 x; .reg .b64 at;
ld.global.b32 x, [at];
ret;
}
"""


def estimated(
    sector_of: Callable[[int], int], most: int = 402, count: int = 10_002, size: int = 2000
) -> list[int]:
    """How many sectors the programs of a sample touch, and how many those of all are said to."""
    counts, place = Counts(parse(LOADS)), Allocation("x", 0, size * SECTOR)
    counts.watch(place)
    few = program_sample.ProgramSample((count, 1, 1), most, counts)
    for position in few.positions:
        counts.execute(0, 32)
        place.touched[0, sector_of(position[0])] = 1
        few.end(position, [place])
    counts.end([place])
    few.scale()
    assert counts.table[0].tolist()[:2] == [count, 32 * count]
    assert (counts.distinct.tolist(), counts.distinct_written) == ([counts.distinct_read], 0)
    return [len({sector_of(n) for n, _, _ in few.positions}), counts.distinct_read]


def test_distinct_sectors_that_programs_share_are_estimated():
    """1,000 sectors, each of which ten programs share, and two at the ends of the grid.

    The sample's own sectors are too few, and as many in proportion are too many.
    """
    of_program = {0: 1000, 10_001: 1001}
    found, all_of_them = estimated(lambda n: of_program.get(n, n % 1000))
    assert abs(all_of_them - 1002) < min(1002 - found, found * 10_002 / 402 - 1002) / 4
    # The formula, with 400 of 10,000 programs between the ends.
    few = program_sample.ProgramSample((10_002, 1, 1), 402, Counts(parse(LOADS)))
    times = Counter(Counter(n % 1000 for n, _, _ in few.positions[1:-1]).values())
    unseen = times[1] ** 2 / (400 / 399 * 2 * times[2] + 0.04 / 0.96 * times[1])
    assert all_of_them == round(found + unseen)
    assert times[1] > 0
    assert times[2] > 0
    # One for all, and one for each.
    assert estimated(lambda n: 0) == [1, 1]
    assert estimated(lambda n: n, most=42, count=1002) == [42, 1002]
    # There are no more than the allocation has.
    assert estimated(lambda n: n, most=42, count=1002, size=1000) == [42, 1000]


def test_programs_that_wait_for_others_are_all_executed():
    x, totals = torch.ones(40, 128), torch.empty(40)
    flags = torch.zeros(40, dtype=torch.int32)
    with emulate(sample=8) as gpu:
        chain_kernel[(40,)](x, totals, flags, BLOCK=128)
    assert not gpu.faults
    assert gpu.launches[0].executed is None
    assert torch.equal(totals, 128.0 * torch.arange(1, 41))
    # Sectors of 40 sums and 40 flags of 4 bytes, and of 40 rows of 128 numbers.
    assert gpu.launches[0].counts.distinct_written == 5 + 5
    assert gpu.launches[0].counts.distinct_read == 5 + 5 + 40 * 16
    # A lock is free when its program has ended, so that nobody waits.
    with emulate(sample=8) as gpu:
        lock_kernel[(40,)](x, sums := torch.zeros(128), flags[:1].zero_(), BLOCK=128)
    assert gpu.launches[0].executed == 8
    assert torch.equal(sums, torch.full((128,), 8.0))


def test_a_fault_of_the_last_program_is_found():
    with emulate(sample=6) as gpu:
        scale[(40,)](torch.ones(39 * 128 + 1), torch.empty(39 * 128), 39 * 128 + 1, BLOCK=128)
    (fault,) = gpu.faults
    assert (fault.name, fault.program) == ("out of bounds", (39, 0, 0))


def test_what_others_would_have_written_is_no_fault_of_a_later_launch():
    x, size = torch.ones(40 * 128), 40 * 128
    with emulate(sample=6) as gpu:
        middle, never, out = (torch.empty(size) for _ in range(3))
        scale[(40,)](x, middle, size, BLOCK=128)
        scale[(40,)](middle, out, size, BLOCK=128)
        assert not gpu.faults
        scale[(40,)](never, out, size, BLOCK=128)
    assert [fault.name for fault in gpu.faults] == ["uninitialised memory"]


def test_reports_say_what_was_executed():
    gpu, _ = scaled(257 * 128, 16)
    said = "16 of 257 programs were executed: counts are scaled, and the memory of the others"
    report = gpu.report()
    assert said in str(report)
    assert said in report.counted()
    assert [one["sampled_programs"] for one in json.loads(report.as_json())["launches"]] == [16]
    for most in (None, 257):  # all
        gpu, out = scaled(257 * 128, most)
        assert (out == 2).all()
        assert "programs were executed" not in f"{gpu.report()} {gpu.report().counted()}"
        assert json.loads(gpu.report().as_json())["groups"][0]["sampled_programs"] is None


def test_a_sample_that_is_too_small_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="sample is 5, expected an integer from 6 on"):
        emulate(sample=5).__enter__()
    script = tmp_path / "script.py"
    script.write_text("")
    for size in ("5", "-6", "many"):
        with pytest.raises(SystemExit):
            command.main(["--sample", size, str(script)])
        assert f"--sample: is {size}, expected an integer from 6 on" in capsys.readouterr().err
    assert command.main(["--sample", "6", str(script)]) == 0
