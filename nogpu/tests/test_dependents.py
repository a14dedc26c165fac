# SPDX-License-Identifier: MIT
"""Programmatic dependent launch: what a kernel does before it waits for the launches before it.

Each fault stands beside the right program. The core in C and Python say the same.
"""

import linecache
import re
from contextlib import nullcontext

import pytest
import torch
import triton
import triton.language as tl
from test_core import blocks_of_python, in_python
from triton.tools.tensor_descriptor import TensorDescriptor

from nogpu import emulate
from nogpu.cuda.stand_in import cuda_is_cpu
from nogpu.machine import workers
from nogpu.native import core as native

gdc_wait, gdc_trigger = tl.extra.cuda.gdc_wait, tl.extra.cuda.gdc_launch_dependents
of_core = pytest.mark.skipif(
    native.library() is None, reason="no C compiler, or NOGPU_EXECUTOR=python"
)
RACE = "race between launches"
N, BLOCK = 512, 128


@triton.jit
def move(
    x, out, other, factor,
    WAIT: tl.constexpr, TRIGGER: tl.constexpr, ATOMIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Multiply x by a factor. WAIT and TRIGGER say where the program controls grids."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if TRIGGER == "first":
        gdc_trigger()
    own = tl.load(other + i)
    if WAIT == "first":
        gdc_wait()
    if TRIGGER == "second":
        gdc_trigger()
    value = tl.load(x + i) * factor + own  # load
    if WAIT == "late":
        gdc_wait()
    if ATOMIC:
        tl.atomic_add(out + i, value)
    else:
        tl.store(out + i, value)  # store
    if TRIGGER == "last":
        gdc_trigger()


class Memory:
    """Tensors of a program, whose values are known before it begins."""

    def __init__(self, device: str = "cpu") -> None:
        self.b, self.c, self.d, self.zeros = (torch.zeros(N, device=device) for _ in range(4))
        self.a = torch.arange(1.0, N + 1, device=device)


def launch(x, out, other, wait="", trigger="", dependent=True, atomic=False, factor=2):
    grid = (N // BLOCK,)
    move[grid](x, out, other, factor, wait, trigger, atomic, BLOCK, launch_pdl=dependent)


def two(first: dict, second: dict, x="b", out="c"):
    """A producer from a to b, and a consumer."""

    def run(m: Memory) -> None:
        launch(m.a, m.b, m.zeros, **first)
        launch(getattr(m, x), getattr(m, out), m.zeros, **second)

    return run


def three(second: dict, third: dict):
    """From a to b, from b to c, and of b once more to d."""

    def run(m: Memory) -> None:
        launch(m.a, m.b, m.zeros, trigger="first")
        launch(m.b, m.c, m.zeros, **second)
        launch(m.b, m.d, m.zeros, **third)

    return run


WAITS, EARLY = {"wait": "first"}, {"trigger": "first"}
TUTORIAL = {"wait": "first", "trigger": "second"}  # as Triton's tutorial 11 has them
# A program, and the words of the faulty access of its last launch; "" for a right one.
PROGRAMS = {
    "reads without a wait": (two(EARLY, {}), "load"),
    "waits": (two(EARLY, WAITS), ""),
    "waits, and lets the next one begin": (two(TUTORIAL, TUTORIAL, "b", "b"), ""),
    "waits too late": (two(EARLY, {"wait": "late"}), "load"),
    "is launched without the attribute": (two(EARLY, {"dependent": False}), ""),
    "reads what was stored before the next grid could begin": (
        two({"trigger": "last"}, {}),
        "load",
    ),
    "reads what a grid has stored that lets none begin": (two({}, {}), "load"),
    "reads and writes other memory": (two(EARLY, {}, "zeros", "c"), ""),
    "overwrites what is read": (two(EARLY, {"factor": 3}, "zeros", "a"), "store"),
    "waits and overwrites what is read": (two(EARLY, {"wait": "late"}, "zeros", "a"), ""),
    "overwrites what ended blocks have read": (two({}, {}, "zeros", "a"), ""),
    "overwrites what is written": (two(EARLY, {"factor": 3}, "a", "b"), "store"),
    "adds to what is added to": (
        two(EARLY | {"atomic": True}, {"atomic": True}, "a", "b"),
        "",
    ),
    "adds to what is written": (two(EARLY, {"atomic": True}, "a", "b"), "atomic_add"),
    "third, reads what the first writes": (three(EARLY | WAITS, {}), "load"),
    "third, waits": (three(EARLY | WAITS, WAITS), ""),
    "third of grids that have waited first": (three(TUTORIAL, {}), ""),
    "third of grids that wait, and let none begin": (three(WAITS, {}), ""),
    "third, without the attribute": (three(EARLY | WAITS, {"dependent": False}), ""),
}


def faults(run, arch="sm_90", is_slow=False, schedules="one"):
    memory = Memory()
    with in_python() if is_slow else nullcontext(), emulate(arch, schedules) as gpu:
        run(memory)
    return memory, gpu


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_dependent_launch(name):
    """The fault is at the line of the access, and names that of the launch before."""
    run, access = PROGRAMS[name]
    for is_slow in (False, True):
        _, gpu = faults(run, is_slow=is_slow)
        expected = {("error", RACE, len(gpu.launches))} if access else set()
        assert {(one.kind, one.name, one.launch) for one in gpu.faults} == expected
        for fault in gpu.faults:
            assert access in linecache.getline(*fault.source)
            assert re.search(
                r" of move, launched before, .* \(test_dependents.py:\d+\)", fault.message
            )


def race_names(run, **options) -> list[str]:
    return [fault.name for fault in faults(run, **options)[1].faults]


def test_values_are_those_of_launches_one_after_the_other():
    memory, gpu = faults(three(EARLY | WAITS, WAITS), schedules="all")
    assert gpu.faults == []
    assert torch.equal(memory.c, 4 * memory.a)
    assert torch.equal(memory.d, 4 * memory.a)
    assert race_names(PROGRAMS["reads without a wait"][0], schedules="all") == [RACE]


@of_core
def test_the_core_executes_dependent_launches():
    assert blocks_of_python(lambda: three(EARLY | WAITS, WAITS)(Memory())) == 0


def test_the_same_value_is_a_warning():
    _, gpu = faults(two(EARLY, {}, "a", "b"))
    (fault,) = gpu.faults
    assert (fault.kind, fault.name) == ("warning", RACE)
    assert fault.message.startswith(
        "two launches write out[0] without order, and both the same value"
    )


def test_an_operator_between_two_launches_waits_for_the_first():
    """The second one may begin early beside the operator, of which nothing is known."""

    def between(call):
        def run(m: Memory) -> None:
            launch(m.a, m.b, m.zeros, **EARLY)
            call(m)
            launch(m.b, m.c, m.zeros)

        return run

    assert race_names(between(lambda m: m.d.add_(1))) == []
    assert race_names(between(lambda m: float(m.d[0]))) == []
    assert race_names(between(lambda m: torch.empty(3).view(3, 1))) == [RACE]


def test_a_gpu_without_this_launch_begins_none_early():
    def run(m: Memory) -> None:
        launch(m.a, m.b, m.zeros)
        launch(m.b, m.c, m.zeros)

    assert race_names(run, arch="sm_80") == []
    assert race_names(run, arch="sm_100") == [RACE]


@pytest.mark.parametrize("waits", [False, True])
def test_what_the_program_waits_for_and_other_streams_have_ended(waits):
    def run(m: Memory, between) -> list[str]:
        with emulate("sm_90") as gpu, cuda_is_cpu(gpu):
            launch(m.a, m.b, m.zeros, **EARLY)
            with between():
                launch(m.b, m.c, m.zeros, **(WAITS if waits else {}))
            return [fault.name for fault in gpu.faults]

    def synchronized():
        torch.cuda.synchronize()
        return nullcontext()

    assert run(Memory(), nullcontext) == ([] if waits else [RACE])
    assert run(Memory(), synchronized) == []
    assert run(Memory(), lambda: torch.cuda.stream(torch.cuda.Stream())) == []


@pytest.mark.parametrize("waits", [False, True])
def test_replays_of_a_graph(waits):
    """Each replay but the first follows the last launch of the one before."""
    with emulate("sm_90") as gpu, cuda_is_cpu(gpu):
        m = Memory("cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch(m.a, m.b, m.zeros, **EARLY, **WAITS)
            launch(m.b, m.c, m.zeros, **(WAITS if waits else {}))
        for _ in range(2):
            graph.replay()
    assert {fault.name for fault in gpu.faults} == (set() if waits else {RACE})


@of_core
def test_a_producer_whose_blocks_workers_divide(monkeypatch):
    """What they have accessed is known by line, as where one thread executes all blocks."""
    shared = []
    run_by_workers = workers.run_by_workers

    def noted(*args):
        shared.append(run_by_workers(*args))
        return shared[-1]

    monkeypatch.setattr(workers, "worker_count", lambda: 2)
    monkeypatch.setattr("nogpu.machine.gpu.least_seconds", lambda places: -1.0)
    monkeypatch.setattr("nogpu.machine.gpu.run_by_workers", noted)
    for trigger in ("first", ""):
        x, y, out, zeros = (torch.ones(64 * BLOCK) for _ in range(4))
        with emulate("sm_90") as gpu:
            move[(64,)](x, y, zeros, 2, "", trigger, False, BLOCK, launch_pdl=True)
            move[(64,)](y, out, zeros, 2, "", "", False, BLOCK, launch_pdl=True)
            move[(64,)](y, out, zeros, 2, "first", "", False, BLOCK, launch_pdl=True)
        lines = {
            (fault.name, linecache.getline(*fault.source).strip()[-6:]) for fault in gpu.faults
        }
        assert lines == {(RACE, "# load")}
    assert True in shared


@triton.jit
def store_and_raise_flag(x, out, flags, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    gdc_trigger()
    tl.store(out + i, tl.load(x + i) + 1)
    tl.debug_barrier()
    tl.atomic_xchg(flags + tl.program_id(0), 1, sem="release")


@triton.jit
def load_behind_flag(x, out, flags, SEM: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    while tl.atomic_add(flags + tl.program_id(0), 0, sem=SEM) == 0:
        pass
    tl.debug_barrier()
    tl.store(out + i, tl.load(x + i) * 2)


@pytest.mark.parametrize("sem", ["acquire", "relaxed"])
def test_a_flag_orders_launches_as_a_wait_does(sem):
    """The programming guide wants "other means" in the place of a wait; a relaxed read is none."""
    for is_slow in (False, True):
        m, flags = Memory(), torch.zeros(N // BLOCK, dtype=torch.int32)
        with in_python() if is_slow else nullcontext(), emulate("sm_90") as gpu:
            store_and_raise_flag[(N // BLOCK,)](m.a, m.b, flags, BLOCK, launch_pdl=True)
            load_behind_flag[(N // BLOCK,)](m.b, m.c, flags, sem, BLOCK, launch_pdl=True)
        names = [fault.name for fault in gpu.faults]
        assert names == ([] if sem == "acquire" else [RACE])
        assert torch.equal(m.c, 2 * (m.a + 1))


@triton.jit
def copy_box(x, out, WAIT: tl.constexpr, BLOCK: tl.constexpr):
    if WAIT:
        gdc_wait()
    out.store([tl.program_id(0) * BLOCK], x.load([tl.program_id(0) * BLOCK]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
@pytest.mark.parametrize("waits", [False, True])
def test_boxes_of_what_an_earlier_launch_writes(waits, dtype):
    """TMA reads and writes in other units than the threads of the launch before."""
    for is_slow in (False, True):
        m = Memory()
        x, y, out = (torch.full((N,), n, dtype=dtype) for n in range(3))
        with in_python() if is_slow else nullcontext(), emulate("sm_90") as gpu:
            launch(x, y, m.zeros, factor=1)
            boxes = (TensorDescriptor.from_tensor(one, [BLOCK]) for one in (y, out))
            copy_box[(N // BLOCK,)](*boxes, waits, BLOCK, launch_pdl=True)
        assert {fault.name for fault in gpu.faults} == (set() if waits else {RACE})
        assert torch.equal(out, x)
