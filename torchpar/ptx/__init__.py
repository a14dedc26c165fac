# SPDX-License-Identifier: MIT
"""Triton kernels without a GPU: an executor of NVIDIA's PTX on a CPU.

    with torchpar.ptx.emulate("sm_90") as gpu:
        kernel[grid](x, y, n, BLOCK=1024)
    print(gpu.report())

A launch passes these folders, one after the other:

- `triton`: `emulate`, which lets Triton take an emulated GPU for its own; `driver` (what Triton
  asks and launches), `parameters` (of a launch, from its arguments), `emulator` (the GPU, its
  launches and faults), `host_memory` (of tensors), `dispatch` (operators beside launches), and
  `autotuner`.
  `cuda` stands in for `torch.cuda`, CUDA graphs included, in scripts that say "cuda".
- `machine`: one launch, `gpu`. What is executed: `parse` (text to instructions), `decode`
  (instructions to functions), `registers` (kinds of numbers), `block` (warps, barriers and
  schedules), `cluster`, `execute` (steps of a warp), and `workers` (threads that divide a launch).
  What is watched: `allocation` (bytes, and who has accessed them), `address_space`, `memory` (the
  rules of accesses), `vector_clocks` (who knows of which access), `operation` (asynchronous ones),
  `definedness` (undefined bits), `counts`, their sums in `counters`, `sample` (of programs, for the
  counts of all), and `trace` (a record of one program). `protocols` has a GPU, a block and a warp
  for type checkers.
- `instructions`: what each instruction of PTX does, in Python.
- `native`: the common instructions, and whole blocks, in C: `layout` (what Python and C share),
  `core` (built once, and loaded), `encoding`, `warps`, `blocks`.
- `report`: `faults`, `launch` (the record of one), `groups` (of launches), `roofline` (bounds by
  data sheets), `limits`, `resources` (by ptxas); and `report`, as `text`, as a `page`, or as JSON
  (`data`).

`command` and `pytest` are the ways to run it. Imports go one way, which import-linter checks:
`cuda`, `triton` and `report` import those after them, and the modules of `triton`, `machine`,
`instructions` and `native` have the order of pyproject.toml. A launch of a common kernel enters at
most 14 files, which tests/ptx/test_files_of_a_launch.py holds.

Sections are those of NVIDIA's "PTX ISA", release 9.0.
"""

from importlib.util import find_spec

from torchpar.errors import needs_torch

if find_spec("torch"):
    from torchpar.ptx.machine.counters import Access, Counters, Line
    from torchpar.ptx.report.faults import Fault
    from torchpar.ptx.report.launch_record import Launch
    from torchpar.ptx.report.limits import Limits
    from torchpar.ptx.report.report import Report
    from torchpar.ptx.triton.emulate import emulate
    from torchpar.ptx.triton.emulator import Emulator

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

if not find_spec("torch"):
    __getattr__ = needs_torch(__name__, __all__)
