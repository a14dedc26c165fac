# SPDX-License-Identifier: MIT
"""The emulator's counts beside those of Nsight Compute on an H200, which ran the same launches.

The launches were compiled by Triton 3.6. With it the counts are equal, but for wavefronts of shared
memory, whose differences have four causes. Each is computed, and must explain all of a difference.
"""

import csv
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import measured
import numpy as np
import pytest
import triton

from nogpu import emulate
from nogpu.machine import instruction_counts
from nogpu.machine.gpu import Gpu
from nogpu.machine.gpu_state import SCHEDULES
from nogpu.machine.instruction_counts import Column, Counts, sectors, wavefronts
from nogpu.native import core

slow = pytest.mark.slow
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "nvidia-h200"
IS_SAME_TRITON = triton.__version__.startswith("3.6.")
GLOBAL = [f"global_{op}_{what}" for op in ("load", "store") for what in ("requests", "sectors")]
SHARED = ["shared_load_wavefronts", "shared_store_wavefronts"]
# These compile in a moment. What they do to global memory is alike with each Triton, as the sizes
# of the tiles say it.
FAST = ["transpose_rows", "transpose_tiles", "strided33"]


def rows(contestant: str) -> dict[tuple[str, str], dict[str, int | str]]:
    """Return what was counted, by the case and the kernel."""
    with (RESULTS / "ptx-counters.csv").open() as file:
        found = [row for row in csv.DictReader(file) if row["contestant"] == contestant]
    columns = ["registers", *GLOBAL, *SHARED, "shared_load_conflicts", "shared_store_conflicts"]
    return {
        (row["case"], row["kernel"]): {"grid": row["grid"]}
        | {one: int(row[one]) for one in columns}
        for row in found
    }


# nogpu was torchpar.ptx when it was measured.
NSIGHT, EMULATED = rows("Nsight Compute"), rows("torchpar.ptx")
assert EMULATED.keys() == NSIGHT.keys()


def differences(found, expected, columns) -> dict[str, int]:
    """Return by how much more is expected, by column, where the counts are not equal."""
    assert found["grid"] == expected["grid"]
    every = {one: expected[one] - found[one] for one in columns}
    return {one: count for one, count in every.items() if count}


def instructions(launch):
    """Return each instruction of a launch, and its numbers."""
    return list(zip(launch.counts.kernel.instructions, launch.counts.table, strict=True))


# A warp of which four threads load.
LOADS_SOME = """
.version 8.7
.target sm_90a
.visible .entry k(.param .u64 k_param_0) .reqntid 32
{
.reg .b32 %lane, %x; .reg .b64 %at; .reg .pred %first;
mov.u32 %lane, %tid.x;
ld.param.b64 %at, [k_param_0];
mad.wide.u32 %at, %lane, 4, %at;
setp.lt.u32 %first, %lane, 4;
@%first ld.global.b32 %x, [%at];
@%first st.global.b32 [%at], %x;
ret;
}
"""


# The causes: each returns how many more wavefronts of loads and of stores the GPU takes.


def of_tensormaps(launch) -> tuple[int, int]:
    """A field of a tensormap in shared memory is replaced by loads and stores.

    The address and the sizes fill whole words, and need no load. A stride is stored in two parts.
    A copy of the tensormap to global memory loads it.
    """
    loads = stores = 0
    for i, row in instructions(launch):
        count = int(row[Column.EXECUTIONS])
        if i.opcode.startswith("tensormap.replace"):
            field = i.parts[3]
            loads += count * (field not in ("global_address", "global_dim"))
            stores += count * (2 if field == "global_stride" else 1)
        elif i.opcode.startswith("tensormap.cp_fenceproxy"):
            loads += count
    return loads, stores


def of_the_last_load(launch) -> tuple[int, int]:
    """A warp that stores nothing ends before it loads what the last store would take.

    ptxas moves a load behind the exit if nothing else takes what it loads.
    """
    every = instructions(launch)
    stores = [row for i, row in every if i.opcode.startswith("st.global")]
    loads = [
        row
        for i, row in every
        if i.parts[0] == "ld" and "shared" in i.parts and row[Column.EXECUTIONS]
    ]
    if not stores or not loads:
        return 0, 0
    ended = loads[-1][Column.EXECUTIONS] - stores[-1][Column.EXECUTIONS]
    each = loads[-1][Column.WAVEFRONTS] // loads[-1][Column.EXECUTIONS]
    return -int(ended * each), 0


def of_merged_loads(launch) -> tuple[int, int]:
    """ptxas loads 16 bytes at once for the loads of neighbouring words between two barriers.

    They have one base. Python executes the kernel again, so that the addresses are known.
    """
    merged: dict[tuple[object, ...], list[int]] = {}
    first: dict[tuple[object, ...], int] = {}
    access_shared = Counts.access_shared

    def note(counts, pc, addresses, lanes, width):
        access_shared(counts, pc, addresses, lanes, width)
        i = counts.kernel.instructions[pc]
        if i.parts[0] == "ld":
            before = counts.kernel.instructions[:pc]
            barriers = sum(one.parts[0] == "bar" for one in before)
            address = i.operands[1]
            key = barriers, address.base.index, address.offset // 16
            if first.setdefault(key, pc) == pc:
                found, _ = wavefronts(addresses & -16, lanes, 16)
                merged.setdefault(key, []).append(found)

    with patch.object(Counts, "access_shared", note), patch.object(core, "library", lambda: None):
        measured.launches("naive_mm float32")
    total = sum(sum(found) for found in merged.values())
    return total - measured.counted(launch)["shared_load_wavefronts"], 0


def of_other_conflicts(found, expected) -> tuple[int, int]:
    """Nsight counts bank conflicts that no address makes, such as 513 of 512 programs.

    Its wavefronts are as many more.
    """
    load, store = (
        expected[f"shared_{op}_conflicts"] - found[f"shared_{op}_conflicts"]
        for op in ("load", "store")
    )
    return load, store


def explained(case: str, launch, found, expected) -> dict[str, int]:
    """Return how many more wavefronts all causes give, by column."""
    if case == "naive_mm float32":
        causes = [of_merged_loads(launch)]  # and so without its bank conflicts
    else:
        conflicts = of_other_conflicts(found, expected)
        causes = [of_tensormaps(launch), of_the_last_load(launch), conflicts]
    sums = np.sum(causes, 0).tolist()
    return {name: count for name, count in zip(SHARED, sums, strict=True) if count}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in FAST else slow) for case in measured.CALLS]
)
def test_the_emulator_counts_what_nsight_counted(case):
    launches = measured.launches(case)
    for launch in launches:
        key = case, launch.kernel
        found, expected = measured.counted(launch), NSIGHT[key]
        assert differences(found, expected, GLOBAL) == {}
        if IS_SAME_TRITON:
            assert found == EMULATED[key]  # the pages show these
            assert differences(found, expected, ["registers"]) == {}
            assert differences(found, expected, SHARED) == explained(case, launch, found, expected)
    assert [launch.kernel for launch in launches] == [
        kernel for one, kernel in NSIGHT if one == case
    ]


def test_a_count_that_is_off_by_one_is_noticed():
    for key, expected in NSIGHT.items():
        for column in (*GLOBAL, "registers", *SHARED):
            off = expected | {column: int(expected[column]) + 1}
            assert differences(off, expected, [*GLOBAL, "registers", *SHARED]) == {column: -1}, key


def test_a_fault_of_counting_is_noticed():
    """Each request takes a sector more, as a planted fault."""
    with (
        patch.object(instruction_counts, "sectors", lambda *given: sectors(*given) + 1),
        patch.object(core, "library", lambda: None),
    ):
        (launch,) = measured.launches("strided33")
    found, expected = measured.counted(launch), NSIGHT["strided33", "strided"]
    assert differences(found, expected, GLOBAL) == {
        "global_load_sectors": -128,
        "global_store_sectors": -32,
    }


@pytest.mark.parametrize("executor", ["core", "python"])
def test_a_load_of_some_threads_counts_once(executor):
    """Its register was not written before, so that the other threads have undefined bits."""
    gpu = Gpu(SCHEDULES[0])
    place = gpu.allocate("x", 128)
    place.give()
    with patch.object(core, "library", lambda: None) if executor == "python" else nullcontext():
        gpu.launch(LOADS_SOME, [place.base])
    (load,) = (
        row
        for i, row in zip(gpu.kernel.instructions, gpu.counts.table, strict=True)
        if i.opcode == "ld.global.b32"
    )
    numbers = load[[Column.EXECUTIONS, Column.REQUESTS, Column.BYTES, Column.SECTORS]]
    assert numbers.tolist() == [1, 1, 16, 1]


def test_the_second_half_of_a_store_takes_a_turn():
    """A half that reads what the first one has read does not."""
    addresses, lanes = np.arange(32) % 16 * 8, np.arange(32)
    assert wavefronts(addresses, lanes, 8) == (1, 1)
    assert wavefronts(addresses, lanes, 8, is_store=True) == (2, 2)


@pytest.mark.parametrize("arch, count", [("sm_80", 108), ("sm_90", 132), ("sm_100", 148)])
def test_the_emulated_gpu_has_the_multiprocessors_of_the_real_one(arch, count):
    with emulate(arch) as gpu:
        assert gpu.multiprocessors == count
        properties = triton.runtime.driver.active.utils.get_device_properties(0)
    assert properties["multiprocessor_count"] == count
