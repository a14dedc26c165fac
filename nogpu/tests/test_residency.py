# SPDX-License-Identifier: MIT
"""Programs that wait for each other: how many of them a GPU holds, and which waits never end.

A multiprocessor holds as many programs as its threads, registers and shared memory allow. A program
that waits for one that has no place waits for ever. One that gives up, or that waits for what comes
late, does not.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
import triton
import triton.language as tl
from test_core import in_python

from nogpu import emulate
from nogpu.machine.instruction_counts import Column
from nogpu.machine.vector_clocks import merged
from nogpu.native import core as native
from nogpu.record.launch import Launch
from nogpu.record.resources import Resources

EXECUTORS: dict[str, Callable[[], AbstractContextManager]] = {"python": in_python}
if native.library() is not None:
    EXECUTORS["core"] = nullcontext


@pytest.fixture(params=EXECUTORS)
def executor(request) -> Iterator[None]:
    with EXECUTORS[request.param]():
        yield


def flags(count: int = 1) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32)


def line_of(kernel, text: str) -> tuple[str, int]:
    lines = kernel.raw_src
    (number,) = (n for n, line in enumerate(lines) if text in line)
    return __file__, kernel.starting_line_number + number


@triton.jit
def all_wait(counter, out):
    tl.atomic_add(counter, 1)
    while tl.atomic_add(counter, 0) < tl.num_programs(0):  # NAMED
        pass
    tl.store(out + tl.program_id(0), 1)


@triton.jit
def all_load(counter, out):
    """Each warp waits on its own, and no barrier is in the loop."""
    tl.atomic_add(counter, 1)
    while tl.load(counter, volatile=True) < tl.num_programs(0):  # NAMED
        pass
    tl.store(out + tl.program_id(0), 1)


# Two programs of 1024 threads, or 16 of 128, on each of two multiprocessors; clusters of two CTAs
FITTING = {
    "large": (all_wait, 32, 1, 4),
    "small": (all_wait, 4, 1, 32),
    "loads": (all_load, 32, 1, 4),
    "clusters": (all_load, 32, 2, 2),
}


@pytest.mark.parametrize("schedules", ["one", pytest.param("all", marks=pytest.mark.slow)])
@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("name", FITTING)
def test_a_barrier_of_all_programs_needs_a_place_for_each(name, more, schedules, executor):
    kernel, warps, ctas, fitting = FITTING[name]
    counter, out = flags(), flags(fitting + more)
    with emulate("sm_90", schedules, multiprocessors=2) as gpu:
        kernel[(fitting + more,)](counter, out, num_warps=warps, num_ctas=ctas)
    if not more:
        assert gpu.faults == []
        assert out.tolist() == [1] * fitting
        return
    (fault,) = gpu.faults
    assert (fault.name, fault.source) == ("deadlock", line_of(kernel, "# NAMED"))
    assert fault.message.endswith("; 1 program waits for a place on the GPU")
    assert counter.tolist() == [fitting]
    assert not out.any()
    # Each program looks a few times: when it begins, and when all others have begun.
    counts = gpu.launches[0].counts
    kinds = zip(counts.kernel.instructions, counts.table[:, Column.EXECUTIONS], strict=True)
    looks = sum(int(count) for i, count in kinds if i.opcode.startswith(("atom.", "ld.volatile")))
    assert looks <= 8 * fitting * ctas * (warps if kernel is all_load else 1)


@triton.jit
def wait_in_turns(flags, tries, out, ends, LIMIT: tl.constexpr, COUNT: tl.constexpr):
    """Count until program 0 has raised all flags, and give up at the limit."""
    pid = tl.program_id(0)
    if pid == tl.num_programs(0) - 1:
        for n in range(ends):
            tl.atomic_xchg(flags + n, 1)
    raised, count = 0, 0
    while (raised < COUNT) & (count < LIMIT):
        raised = 0
        for n in range(COUNT):
            raised += tl.load(flags + n, volatile=True)
        count += 1
    tl.store(tries + pid, count)
    tl.store(out + pid, raised)


@pytest.mark.parametrize("ends", [3, 2])
@pytest.mark.parametrize("limit", [100, 2**30])
def test_a_wait_that_gives_up_or_looks_at_several_places_ends(limit, ends, executor):
    """Nothing changes meanwhile, and yet those that count give up; without a limit none does."""
    tries, out = flags(4), flags(4)
    with emulate("sm_90") as gpu:
        wait_in_turns[(4,)](flags(3), tries, out, ends, limit, 3, num_warps=1)
    if ends == 2 and limit > 100:  # each counts for ever
        assert [(one.name, one.source) for one in gpu.faults] == [
            ("deadlock", line_of(wait_in_turns, "volatile=True"))
        ]
        return
    assert gpu.faults == []
    assert out.tolist() == [ends] * 4
    assert (tries == limit).tolist() == [ends == 2] * 4


@triton.jit
def wait_for_each(flags, out, count):
    """Look at the flags in turns, so that no access finds what it found before."""
    pid = tl.program_id(0)
    if pid == tl.num_programs(0) - 1:
        for n in tl.range(count, loop_unroll_factor=1):
            tl.atomic_xchg(flags + n, 1)
    raised = 0
    while raised < count:
        raised = 0
        for n in tl.range(count, loop_unroll_factor=1):
            raised += tl.load(flags + n, volatile=True)  # NAMED
    tl.store(out + pid, raised)


@pytest.mark.parametrize("multiprocessors", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_a_loop_may_look_at_several_places(multiprocessors, executor):
    """The ninth program of 8 warps raises the flags; it has a place on the second one."""
    out = flags(9)
    with emulate("sm_90", multiprocessors=multiprocessors) as gpu:
        wait_for_each[(9,)](flags(3), out, 3, num_warps=8)
    if multiprocessors == 2:
        assert gpu.faults == []
        assert out.tolist() == [3] * 9
    else:
        (fault,) = gpu.faults
        assert (fault.name, fault.source) == ("deadlock", line_of(wait_for_each, "# NAMED"))


@triton.jit
def wait_for_the_next(flags, out, BLOCK: tl.constexpr):
    """Each warp looks at flags of its own, which the next program raises."""
    pid, i = tl.program_id(0), tl.arange(0, BLOCK)
    if pid < tl.num_programs(0) - 1:
        while tl.sum(tl.load(flags + (pid + 1) * BLOCK + i, volatile=True)) < BLOCK:
            pass
    tl.atomic_xchg(flags + pid * BLOCK + i, 1)
    tl.store(out + pid, 1)


def test_programs_may_wait_in_a_chain(executor):
    out = flags(3)
    with emulate("sm_90", "all", multiprocessors=3) as gpu:
        wait_for_the_next[(3,)](flags(3 * 256), out, 256, num_warps=8)
    assert gpu.faults == []
    assert out.tolist() == [1] * 3


@pytest.mark.parametrize("warps, ctas, fitting", [(32, 1, 4), (8, 1, 16), (32, 2, 2)])
def test_a_cooperative_launch_that_does_not_fit_is_refused(warps, ctas, fitting):
    options = {"num_warps": warps, "num_ctas": ctas, "launch_cooperative_grid": True}
    counter, out = flags(), flags(fitting + 1)
    with emulate("sm_90", multiprocessors=2) as gpu:
        all_load[(fitting,)](counter, out, **options)
        assert out.tolist() == [1] * fitting + [0]
        what = f"all_load has {ctas * (fitting + 1)} {'CTAs' if ctas > 1 else 'programs'}"
        with pytest.raises(RuntimeError) as caught:
            all_load[(fitting + 1,)](counter, out, **options)
        assert str(caught.value) == (
            f"Triton Error [CUDA]: too many blocks in cooperative launch: {what}, and the 2 "
            f"multiprocessors hold {ctas * fitting} at once; launch no more, and let each one take "
            "more elements"
        )
    assert gpu.faults == []
    assert (len(gpu.launches), counter.item()) == (1, fitting)


@triton.jit
def wait_with_registers(x, counter, out, SIZE: tl.constexpr):
    """A row of x is in registers while the program waits."""
    row = tl.load(x + tl.arange(0, SIZE))
    tl.atomic_add(counter, 1)
    while tl.atomic_add(counter, 0) < tl.num_programs(0):
        pass
    tl.store(out + tl.program_id(0), tl.sum(row))


def test_registers_decide_how_many_programs_have_a_place():
    x = torch.ones(8192)
    most = 0
    for more in (0, 1):
        with emulate("sm_90", multiprocessors=1) as gpu:
            if not most:
                wait_with_registers[(1,)](x, flags(), torch.zeros(1), 8192, num_warps=4)
                most = gpu.launches[0].programs_of_multiprocessor or 0
                assert 1 < most < 16  # which the threads allow
            out = torch.zeros(most + more)
            wait_with_registers[(most + more,)](x, flags(), out, 8192, num_warps=4)
        assert [fault.name for fault in gpu.faults] == ["deadlock"] * more
        assert bool(out.all()) != bool(more)


@pytest.mark.parametrize(
    "warps, shared, registers, most",
    [
        (4, 0, 32, 16),  # by its threads
        (1, 0, 32, 32),  # by its blocks
        (4, 100_000, 32, 2),
        (8, 0, 255, 1),
        (4, 0, 128, 4),
        (32, 0, 255, 1),  # one is launched, or none
    ],
)
def test_what_a_multiprocessor_holds(warps, shared, registers, most):
    launch = Launch("k", "sm_90", (1, 1, 1), warps, shared)
    launch.resources = Resources(registers, 0)
    assert launch.most_resident(3) == 3 * most
    assert [launch.fits(3 * most + more, 3) for more in (-1, 0, 1)] == [True, True, False]


def test_what_programs_know_is_shared():
    a, b, c = (torch.tensor(values).int().numpy() for values in ([3, 1], [2, 1], [1, 4, 0]))
    one, other = {1: a, 2: b}, {1: b, 2: c, 3: a}
    found = merged(one, other)
    assert {block: times.tolist() for block, times in found.items()} == {
        1: [3, 1],
        2: [2, 4, 0],
        3: [3, 1],
    }
    assert found[1] is found[3] is a  # which knows all of b
    assert (one, list(other)) == ({1: a, 2: b}, [1, 2, 3])
    assert merged({}, one) is merged(one, one) is one
