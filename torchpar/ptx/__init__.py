# SPDX-License-Identifier: MIT
"""Triton kernels without a GPU: an executor of NVIDIA's PTX on a CPU.

    with torchpar.ptx.emulate("sm_90") as gpu:
        kernel[grid](x, y, n, BLOCK=1024)
    print(gpu.report())

Read in this order: `parse` (text to instructions), `registers` (kinds of numbers), `machine`
(warps, barriers, masks, schedules and asynchronous operations), `arithmetic`, `rounding`,
`conversions`, `bits`, `memory` (who may read and write which byte), `taint` (undefined bits),
`copies` (loads, stores and copies), `atomics`, `tensors` (TMA), `tensor_cores`, `tensor_memory` (of
sm_100), and `gpu`, which launches kernels. `native` and core.c execute the common instructions in
C. `blocks` and blocks.c execute whole blocks, with knowledge.c, atomics.c and tensors.c, and
`cores` executes blocks on all cores of the CPU. `driver` lets Triton launch kernels, `report` says
what is wrong with them, and `cuda` lets scripts run that say "cuda".
`counters` counts what a launch takes, `resources` asks ptxas, `roofline` has the bounds by data
sheets, and `limits` holds them. `trace` records a program, and `page` draws it. `command` and
`pytest` are the ways to run it.

Sections are those of NVIDIA's "PTX ISA", release 9.0.
"""

from torchpar.ptx.counters import Access, Counters, Line
from torchpar.ptx.driver import Emulator, emulate
from torchpar.ptx.limits import Limits
from torchpar.ptx.report import Fault, Launch, Report

__all__ = [
    "Access",
    "Counters",
    "Emulator",
    "Fault",
    "Launch",
    "Limits",
    "Line",
    "Report",
    "emulate",
]
