# SPDX-License-Identifier: MIT
"""Triton kernels without a GPU: an executor of NVIDIA's PTX on a CPU.

    with nogpu.emulate("sm_90") as gpu:
        kernel[grid](x, y, n, BLOCK=1024)
    print(gpu.report())

A launch passes these folders, one after the other:

- `triton`: `emulate`, which lets Triton take an emulated GPU for its own; `driver` (what Triton
  asks and launches), `stages` (of its compiler), `parameters` (of a launch, from its arguments),
  `conditions` and `assumptions` (of the compiled code), `emulator` (the GPU, its launches and
  faults), its `account` (what launches have taken together), `host_memory` (of tensors),
  `torch_operators` (beside launches), `float32_operators` (which round once), `wide_products`
  (in another type than their operands), `uncompiled` (functions that PyTorch would compile),
  `autotuner`, whose state of a call is `tuning`, and `defined_kernels` (those of a project,
  launched or not).
- `machine`: one launch on a `gpu`, whose blocks share its `gpu_state`. What is executed: `parse`
  (text to instructions), `kinds` (of instructions), `decode` (instructions to functions),
  `registers` (kinds of numbers), `block` (warps and barriers), `cluster`, `execute` (steps of a
  warp), `simt` (of one whose threads diverge), and `workers` (threads that divide a launch). What
  is watched: `allocation` (bytes, and who has accessed them), `address_space`, with `origins` and
  `overflow` of addresses outside, `memory` (the rules of accesses), `vector_clocks` (who knows of
  which access), `operation` (asynchronous ones), `dependents` (grids that may still run), `spins`
  (blocks that wait for ever), `definedness` (undefined bits) and `packed_definedness` (of several
  numbers in a register). What is counted: `instruction_counts`, their sums in `counters`,
  `program_sample` (for the counts of all programs), and `trace` (a record of one program).
- `instructions`: what each instruction of PTX does, in Python.
- `native`: the common instructions, and whole blocks, in C: `layout` (what Python and C share),
  `core` (built once, and loaded, from a folder of `cache`), `encoding`, `warps`, `blocks`.
- `record`: what is kept of a launch: `launch`, whose `launch_size` has limits, its `faults` with
  their `source` and `fault_names`, `resources` (by ptxas), `roofline` (bounds by data sheets) and
  `time` (an estimate); `operator_work` is that of PyTorch's operators.
- `report`: `groups` of launches, and `report`, as `text`, as a `page` with each `drawing`, or as
  JSON (`data`); `findings` are its faults for others: for `github`, as `sarif`, and summed up for
  a `suite` of tests. A `replay_page` plays the `launch_recording` of a launch. `assembly` is what
  ptxas refuses, and `limits` are what a program asserts of counters.

`cpp` stands beside `triton` for kernels in CUDA C++, which `nogpu.cuda.load` returns: `nvrtc`
compiles, `declarations` reads parameters, `launching` launches, `on_gpu` does so where there is a
GPU, and `summary` says how.

`cuda` stands beside `triton` for scripts that say "cuda":

- `stand_in` answers for `torch.cuda`, with `libraries` of CUDA and `advice` for scripts without it.
- `watcher` sees operators and launches. A `graph` is captured by a `capture`. They share a
  `context`, its `streams`, and the `types` of PyTorch. `graph_memory` is the memory of a graph,
  and `operations` are what it executes.
- What a graph has of its program: `steps` of optimizers, `captured_gradients`, `host_values`,
  `accesses` (races between streams), and `uncaptured` work. `by_shapes` computes without values.
- What a GPU refuses: `places` of tensors and `devices` of operators, and in a capture
  `capture_rules`, `reading_operators`, `host_copies` and `stale_streams`.

`numba` stands beside `triton` for kernels of numba.cuda, which numba-cuda compiles. Below it
`numba_stand_in` replaces the driver: `numba_driver` has its functions, `device_memory` the memory,
and `numba_kernels` the launches.

`command`, `pytest` with `pytest_hooks`, `check` and `judge` are the ways to run it. `check`
compares a kernel with its reference: `kernels`, by `compare`, to a `table` of `rows`. `judge` does
so for kernels of unknown authors: `judging` takes a `problem`, makes `variants` of its inputs,
starts a `candidate_process` that is `confined` and notes `facts`, and has a `verdict`. All of them
may use `console`, `data_sheets`, `decorating`, `libraries` and `version`.

Imports go one way, which import-linter checks: `cuda`, `triton`, `report` and `record` import the
folders after them, and the modules of `cuda`, `triton`, `machine`, `instructions` and `native` have
the order of pyproject.toml. Public names are those of ``__all__``.

Sections are those of NVIDIA's "PTX ISA", release 9.0.
"""

import importlib
import sys
from typing import TYPE_CHECKING

from nogpu.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

    from nogpu.check.kernels import check_kernel
    from nogpu.check.rows import fault_rows, resource_row
    from nogpu.check.table import KernelTable
    from nogpu.cuda.stand_in import cuda_is_cpu
    from nogpu.data_sheets import ARCHITECTURES, DATA_SHEETS, DataSheet
    from nogpu.machine.counters import Access, Counters, Line
    from nogpu.native.core import has_core
    from nogpu.record.faults import Fault
    from nogpu.record.launch import Launch
    from nogpu.record.resources import Resources
    from nogpu.record.time import ESTIMATE_ACCURACY, Estimate, Fitted, Work, estimate
    from nogpu.report.limits import Limits
    from nogpu.report.report import Report
    from nogpu.triton.emulate import emulate, why_not_compiled
    from nogpu.triton.emulator import Emulator

# Where the public names are. They are imported on first use: pytest loads its plugin in every run,
# which then needs neither PyTorch nor Triton.
_MODULES = {
    "ARCHITECTURES": "data_sheets",
    "Access": "machine.counters",
    "Counters": "machine.counters",
    "DATA_SHEETS": "data_sheets",
    "DataSheet": "data_sheets",
    "ESTIMATE_ACCURACY": "record.time",
    "Emulator": "triton.emulator",
    "Estimate": "record.time",
    "Fault": "record.faults",
    "Fitted": "record.time",
    "KernelTable": "check.table",
    "Launch": "record.launch",
    "Limits": "report.limits",
    "Line": "machine.counters",
    "Report": "report.report",
    "Resources": "record.resources",
    "Work": "record.time",
    "check_kernel": "check.kernels",
    "cuda_is_cpu": "cuda.stand_in",
    "emulate": "triton.emulate",
    "estimate": "record.time",
    "fault_rows": "check.rows",
    "has_core": "native.core",
    "resource_row": "check.rows",
    "why_not_compiled": "triton.emulate",
}
__all__ = [
    "ARCHITECTURES",
    "DATA_SHEETS",
    "ESTIMATE_ACCURACY",
    "Access",
    "Counters",
    "DataSheet",
    "Emulator",
    "Estimate",
    "Fault",
    "Fitted",
    "KernelTable",
    "Launch",
    "Limits",
    "Line",
    "Report",
    "Resources",
    "Work",
    "__version__",
    "check_kernel",
    "cuda_is_cpu",
    "emulate",
    "estimate",
    "fault_rows",
    "has_core",
    "is_emulating",
    "resource_row",
    "why_not_compiled",
]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'nogpu' has no attribute {name!r}")
    found = getattr(importlib.import_module(f"nogpu.{_MODULES[name]}"), name)
    globals()[name] = found
    return found


def is_emulating(*tensors: "Tensor") -> bool:
    """Return whether Triton's launches on CPU tensors are executed by an emulator of a GPU.

    A library asks this to choose its kernels for CPU tensors, and need not import nogpu for it:
    where `sys.modules` lacks "nogpu", nothing is emulated.

    Args:
        tensors: those of the launch. With `cuda_is_cpu` a launch with a tensor of the host is
            refused, as on a GPU, and the answer is False if one of them is there.
    """
    module = sys.modules.get("triton.runtime.driver")  # importing it would take long
    emulator = None if module is None else getattr(module.driver._active, "emulator", None)
    if emulator is None:
        return False
    watcher = emulator.watcher if tensors else None
    return watcher is None or all(watcher.has_device([t]) is not False for t in tensors)
