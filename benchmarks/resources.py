# SPDX-License-Identifier: MIT
"""Compile kernels for GPUs that are not here: registers, spills, shared memory, blocks and waves.

They come from the machine code and the makers' documents. The estimate of a product is that of
`torchpar.ptx.estimate`; of others it is the time of the operands and the result at the memory's
peak.
"""

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from math import ceil
from multiprocessing import active_children, get_context
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import NamedTuple

import torch
import triton
from triton.compiler import CompiledKernel
from triton.runtime import Autotuner

from benchmarks import driver
from benchmarks.results import CORES, Result, Table, print_results, track
from benchmarks.timing import CPU
from torchpar.kernels.data_sheets import (
    DATA_SHEETS,
    PROGRAMS,
    REGISTERS,
    RESERVED,
    WARPS,
    DataSheet,
)
from torchpar.kernels.rule import KINDS
from torchpar.parallel.launch.processes import end_with_parent

TENSOR_COLUMNS = 512  # of a multiprocessor
PRINTED = [
    "contestant",
    "registers",
    "spilled_bytes",
    "shared_kb",
    "blocks_per_multiprocessor",
    "waves",
    "estimate_ms",
]


class Architecture(NamedTuple):
    """A GPU for which kernels are compiled: its name in `DATA_SHEETS`, and in tables."""

    gpu: str
    name: str

    @property
    def sheet(self) -> DataSheet:
        return DATA_SHEETS[self.gpu]


ARCHITECTURES = {
    80: Architecture("A100", "A100 SXM (sm_80)"),
    90: Architecture("H100", "H100 SXM (sm_90)"),
    100: Architecture("B200", "B200 (sm_100)"),
}


@dataclass(frozen=True)
class Operator:
    """An autotuned kernel, and the size for which it is compiled.

    Attributes:
        launch: ``launch(*operands, kernel=...)``.
        shapes: of the operands.
        blocks: the number of blocks, or of tiles of persistent ones, by configuration.
        numbers: how many numbers must pass through memory.
        estimate: µs of a configuration, for a kind of operands, on a GPU.
    """

    kernel: Autotuner
    launch: Callable[..., torch.Tensor]
    shapes: Sequence[tuple[int, ...]]
    blocks: Callable[[dict[str, int]], int]
    numbers: int
    estimate: Callable[[triton.Config, str, str], float] | None = None


class Job(NamedTuple):
    """One configuration (its index in the operator's list), compiled for one GPU."""

    operator: str
    config: int
    capability: int
    kind: str


def compile_all(names: Sequence[str], kind: str, quick: bool, path: Path | None) -> int:
    """Compile all configurations for all architectures (``quick``: one for sm_90); print what they
    take."""
    from benchmarks.autotune import OPERATORS

    print(
        "No GPU ran, for PyTorch finds none: kernels are compiled for GPUs that are not here, and "
        "not timed."
    )
    jobs = [
        Job(name, index, capability, kind)
        for name in names
        for capability in ([90] if quick else ARCHITECTURES)
        for index in possible(OPERATORS[name], capability, kind)[: 1 if quick else None]
    ]
    table = Table(path, CPU)
    with nullcontext(map(examine, jobs)) if quick else examine_in_pool(jobs) as found:
        for result in track(found, "compile", len(jobs)):
            table.add([result])
    for name in names:
        shapes = " ".join("x".join(map(str, shape)) for shape in OPERATORS[name].shapes)
        for gpu in ARCHITECTURES.values():
            own = [
                one
                for one in table.results
                if (one.case["operator"], one.case["GPU"]) == (name, gpu.name)
            ]
            print_results(f"{name} of {shapes} in {kind}, for {gpu.name}; no GPU ran", own, PRINTED)
    print(
        "w: warps. s: stages. KB: of shared memory. per SM: blocks of a multiprocessor at a time."
    )
    print("The estimate is of a model, and for other operators of the memory. Nothing was timed.")
    return table.status


def begin_process() -> None:
    """Let Ctrl-C reach neither this process nor ptxas, which ignores no signal."""
    os.setpgrp()
    end_with_parent()


@contextmanager
def examine_in_pool(jobs: Sequence[Job]) -> Iterator[Iterator[Result]]:
    """The results of `examine`, from processes that end with the block, also in a job."""
    others = set(active_children())
    with ProcessPoolExecutor(min(CORES, len(jobs)), get_context("spawn"), begin_process) as pool:
        # Ctrl-C would reach the processes while they start, too: each would print a traceback.
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            found = [pool.submit(examine, job) for job in jobs]
        finally:
            signal.signal(signal.SIGINT, interrupt)
        try:
            yield (one.result() for one in found)
        except BaseException:
            for process in set(active_children()) - others:
                process.terminate()
            raise


def operands(operator: Operator, kind: str) -> list[torch.Tensor]:
    return [torch.empty(shape, dtype=KINDS[kind].dtype, device="meta") for shape in operator.shapes]


def possible(operator: Operator, capability: int, kind: str) -> list[int]:
    """The places of the configurations that the kernel's autotuner would time."""
    kernel, given = operator.kernel, operands(operator, kind)
    if kernel.early_config_prune is None:
        return list(range(len(kernel.configs)))
    arguments = {
        **dict(zip(("x_ptr", "weight_ptr"), given, strict=False)),
        "n": len(given[-1]),
        "k": given[0].shape[-1],
    }
    with driver.target(capability):
        fitting = kernel.early_config_prune(
            kernel.configs, arguments, PRECISION=KINDS[kind].precision
        )
    return [kernel.configs.index(config) for config in fitting]


def examine(job: Job) -> Result:
    """Compile a configuration, in a process of its own."""
    operator = import_module("benchmarks.autotune").OPERATORS[job.operator]
    config, gpu = operator.kernel.configs[job.config], ARCHITECTURES[job.capability]
    case, contestant = {"operator": job.operator, "GPU": gpu.name}, describe(config)
    every, operator.kernel.configs = operator.kernel.configs, [config]
    try:
        with (
            driver.target(job.capability),
            torch.backends.flags(fp32_precision=KINDS[job.kind].precision),
        ):
            given = operands(operator, job.kind)
            (launched,) = driver.compile_launches(
                lambda wrap: operator.launch(*given, wrap(operator.kernel))
            )
        (compiled,) = launched.kernel  # one for each configuration
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        return Result(case=case, contestant=contestant, ok=False, reason=reason)
    finally:
        operator.kernel.configs = every
    used, shared = resources(compiled), compiled.metadata.shared
    at_a_time = resident_blocks(
        gpu, used["REG"], config.num_warps, shared, compiled.metadata.tmem_size or 0
    )
    blocks = operator.blocks(config.kwargs)
    waves = blocks / (at_a_time * gpu.sheet.multiprocessors) if at_a_time else None
    columns = {
        "registers": used["REG"],
        "spilled_bytes": used["STACK"] + used["LOCAL"],
        "shared_kb": shared / 1024,
        "blocks": blocks,
        "blocks_per_multiprocessor": at_a_time,
        "waves": waves,
    }
    if waves:
        if operator.estimate is None:
            moved = operator.numbers * KINDS[job.kind].dtype.itemsize
            columns["estimate_ms"] = moved / (gpu.sheet.memory * 1e9)
        else:
            columns["estimate_ms"] = operator.estimate(config, job.kind, gpu.gpu) / 1e3
    return Result(case=case, contestant=contestant, columns=columns)


def describe(config: triton.Config) -> str:
    """The block, warps, stages and variant: 128x256x64 w8 s4 tma; without a loop 512 w4."""
    sizes = "x".join(
        str(value) for name, value in config.kwargs.items() if name.startswith("BLOCK")
    )
    block = f"{sizes} w{config.num_warps}"
    if "VARIANT" not in config.kwargs:
        return block
    return f"{block} s{config.num_stages} {config.kwargs['VARIANT']}"


def resident_blocks(
    gpu: Architecture, registers: int, warps: int, shared: int, tensor_columns: int
) -> int:
    """The blocks that a multiprocessor runs at a time, by registers, warps, shared and tensor
    memory."""
    limits = [
        PROGRAMS,
        WARPS // warps,
        REGISTERS // (ceil(32 * registers / 256) * 256 * warps),  # a warp gets multiples of 256
        gpu.sheet.shared // (shared + RESERVED),
    ]
    return min([*limits, TENSOR_COLUMNS // tensor_columns] if tensor_columns else limits)


def resources(compiled: CompiledKernel) -> dict[str, int]:
    """Of a compiled kernel's thread REG, its registers; STACK and LOCAL, bytes that did not fit
    into them."""
    tool = Path(str(triton.__file__)).parent / "backends/nvidia/bin/cuobjdump"
    with NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(compiled.asm["cubin"])
        command = [str(tool), "-res-usage", cubin.name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return {
        name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout)
    }
