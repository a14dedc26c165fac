# SPDX-License-Identifier: MIT
"""docs/ptx_instructions.md is true: each instruction that it calls known is executed once."""

from pathlib import Path

import isa
import pytest
import torch
import tutorials
from launch import Gpu
from test_instructions import multiply, print_percent, reduce_boxes
from triton.tools.tensor_descriptor import TensorDescriptor

from nogpu import emulate
from nogpu.machine.gpu import _decoded
from nogpu.machine.gpu_state import SCHEDULES
from nogpu.machine.instruction_counts import Column
from nogpu.machine.parse import PtxError

PAGE = Path(__file__).parents[2] / "docs" / "ptx_instructions.md"
HEAD = """.version 9.0
.target sm_90a
.visible .entry k(.param .u64 k_param_0)
.reqntid 32
{
.reg .b32 %lane, r<9>, f<9>, s, t, m, z; .reg .b64 d<9>; .reg .pred p, q;
mov.u32 %lane, %tid.x; mov.b32 z, 0; mov.u32 m, global_smem;
mad.lo.u32 s, %lane, 4, m; mad.lo.u32 t, %lane, 16, m; add.u32 m, m, 1024;
ld.param.b64 d1, [k_param_0]; mad.wide.u32 d1, %lane, 4, d1;
"""


def executed(counts: object, text: str) -> set[str]:
    """The names of the instructions of a launch that warps have executed."""
    table = counts.table[:, Column.EXECUTIONS]
    kernel = _decoded(text)
    return {isa.name_of(i.opcode) for i, n in zip(kernel.instructions, table, strict=False) if n}


def of_simple_ones() -> set[str]:
    gpu = Gpu(SCHEDULES[0])
    text = f"{HEAD}{isa.SIMPLE}}}"
    gpu.launch(text, [gpu.tensor(torch.zeros(32, dtype=torch.int32))], shared=2048)
    return executed(gpu.counts, text)


def of_threads() -> set[str]:
    """Of CUDA C++: a thread that ends, a barrier that counts, and tiles that a warp loads."""
    gpu, eight = Gpu(SCHEDULES[0]), {one: ", ".join(f"{one}{n}" for n in range(8)) for one in "wvu"}
    w, v, u = (f"{{{eight[one]}}}" for one in "wvu")
    tile = "sync.aligned.row.m16n16k16.global"
    text = f"""{HEAD}
.reg .b32 w<9>, v<9>, u<9>;
ld.param.b64 d2, [k_param_0];
wmma.load.a.{tile}.f16 {w}, [d2]; wmma.load.b.{tile}.f16 {v}, [d2];
wmma.mma.sync.aligned.row.row.m16n16k16.f32.f32 {u}, {w}, {v}, {u};
bar.warp.sync -1; wmma.store.d.{tile}.f32 [d2], {u};
bar.red.popc.u32 r1, 0, p;
exit;
}}"""
    block = 32, 1, 1
    memory = gpu.tensor(torch.zeros(256, dtype=torch.int32))
    gpu.launch(text, [memory], block=block)
    table = gpu.counts.table[:, Column.EXECUTIONS]
    instructions = _decoded(text, "", block).instructions
    return {isa.name_of(i.opcode) for i, n in zip(instructions, table, strict=False) if n}


def of_traps() -> set[str]:
    for name in isa.TRAPS:
        gpu = Gpu(SCHEDULES[0])
        with pytest.raises(PtxError, match="trap"):
            gpu.launch(f"{HEAD}{name}; ret; }}", [0])
    return set(isa.TRAPS)


def of_kernels() -> set[str]:
    """Of tensor cores of sm_90 and sm_100, and of boxes."""
    found = set()
    x = torch.zeros(64, 64)
    box = TensorDescriptor.from_tensor(torch.zeros(36, 64, dtype=torch.float16), [16, 16])
    for arch in ("sm_90", "sm_100"):
        with emulate(arch) as gpu:
            if arch == "sm_90":
                print_percent[(1,)](torch.arange(32.0), num_warps=1)
                values = torch.zeros(16, 16, dtype=torch.float16)
                reduce_boxes[(1,)](box, values, 16, 16, "add", num_warps=1)
                tutorials.TUTORIALS["09 persistent matmul by the program's descriptors"].run()
            else:
                half = x.half()
                multiply[(1,)](half, half, half, half.clone(), 64, 64, 64, tutorials.tl.float16)
        for launch in gpu.launches:
            found |= executed(launch.counts, launch.ptx)
    return found


KNOWN = {name for _, name, form in isa.entries() if isa.is_known(form)}


def test_known_instructions_are_executed():
    found = of_simple_ones() | of_traps() | of_threads()
    assert {name for name in KNOWN - found if not name.startswith(isa.BY_KERNELS)} == set()
    assert found - KNOWN - {""} == set()  # "" is what declares a table of branches


@pytest.mark.slow
def test_known_instructions_of_kernels_are_executed():
    found = of_simple_ones() | of_kernels() | of_threads()
    assert {name for name in KNOWN - found if name not in isa.TRAPS} == set()
    assert found - KNOWN - {""} == set()


@pytest.mark.parametrize("name", isa.REFUSED)
def test_unknown_instructions_are_refused(name):
    gpu = Gpu(SCHEDULES[0])
    given = [gpu.tensor(torch.zeros(32, dtype=torch.int32))]
    with pytest.raises(PtxError, match=f"does not know {name}"):
        gpu.launch(f"{HEAD} mov.u32 r1, 1; {isa.REFUSED[name]} ret; }}", given, shared=2048)


def test_the_page_has_the_table():
    assert "\n".join(isa.page()) in PAGE.read_text("utf-8")


def test_names():
    """Some that are not known are of the same family as known ones."""
    assert isa.name_of("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group") == (
        "cp.async.bulk.tensor"
    )
    unknown = ("vadd4", "mma.sp", "cp.async.bulk.shared::cta.global", "dp2a", "tex", "cnot")
    assert not any(map(isa.is_known, unknown))
    assert all(map(isa.is_known, ("add", "mul.lo.s32")))
