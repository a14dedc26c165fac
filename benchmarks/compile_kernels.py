# SPDX-License-Identifier: MIT
"""Compile the configurations of the records' kernels on all cores, without a GPU.

The benchmark `autotune` shows registers, spills, shared memory, blocks and waves for GPUs that are
not here. They come from the machine code and the makers' documents. The estimate of a product is
that of `torchpar.testing.estimate`; of others it is the time of the operands and the result at the
memory's peak.

    python -m benchmarks.compile_kernels CAPABILITY SECONDS

fills Triton's cache on disk for a GPU of this capability, such as 90, and stops after so many
seconds. The first launch of a kernel would compile it on one core, while the GPU waits.
Launches whose tensors have the same alignment find what was compiled here.
"""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from multiprocessing import active_children, get_context
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from torchpar.errors import first_line
from torchpar.kernels.rule import KINDS, configurations
from torchpar.parallel.launch.processes import end_with_parent, putting_off_signals

from .compare import Work
from .driver import Compiled, compile_launches, target
from .records import OPERATORS
from .records.record import Sizes, Tuned
from .results import CORES, Result, Table, print_results, track
from .timing import CPU

if TYPE_CHECKING:
    from nogpu import DataSheet

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
    """A GPU for which kernels are compiled: its name in `nogpu.DATA_SHEETS`, and in tables."""

    gpu: str
    name: str

    @property
    def sheet(self) -> "DataSheet":
        from nogpu import DATA_SHEETS

        return DATA_SHEETS[self.gpu]


ARCHITECTURES = {
    80: Architecture("A100", "A100 SXM (sm_80)"),
    90: Architecture("H100", "H100 SXM (sm_90)"),
    100: Architecture("B200", "B200 (sm_100)"),
}


class Job(NamedTuple):
    """One configuration of an operator's kernel for a kind of operands, compiled for a GPU."""

    operator: str
    config: Any
    kind: str
    capability: int

    @property
    def tuned(self) -> Tuned:
        return tuned_of(self.operator)

    def compile(self) -> list[Compiled]:
        """Compile the kernels of a launch."""
        given = operands(self.operator, self.kind)
        precision = KINDS[self.kind].precision
        with target(self.capability):
            return compile_launches(
                lambda wrap: self.tuned.launch(self.config, given, precision, wrap)
            )


def tuned_of(operator: str) -> Tuned:
    tuned = OPERATORS[operator].tuned
    assert tuned is not None
    return tuned


def shapes_of(operator: str, sizes: Sizes) -> Sequence[tuple[int, ...]]:
    """The shapes of an operator's operands."""
    return OPERATORS[operator].workloads[0].drawn(*sizes)[:-1]


def work_of(operator: str, sizes: Sizes, dtype: torch.dtype) -> Work:
    """The bytes and the operations of an operator's forward pass."""
    moved, flops = OPERATORS[operator].workloads[0].work(*sizes)[0]
    return Work(moved * dtype.itemsize, flops if tuned_of(operator).estimate else 0)


def compiled_sizes(operator: str) -> Sizes:
    """The sizes for which kernels are compiled where no GPU is."""
    return tuned_of(operator).sizes(tuned_of(operator).compiled)


def operands(operator: str, kind: str) -> list[Tensor]:
    """The operands, without memory, for which kernels are compiled."""
    shapes, dtype = shapes_of(operator, compiled_sizes(operator)), KINDS[kind].dtype
    return [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]


def tuned_jobs(names: Sequence[str], kind: str, capabilities: Iterable[int]) -> Iterator[Job]:
    """The configurations that `autotune` would time."""
    for name in names:
        given = operands(name, kind)
        for capability in capabilities:
            with target(capability):
                found = tuned_of(name).candidates(given, KINDS[kind].precision)
            yield from (Job(name, config, kind, capability) for config in found)


def all_jobs(capability: int) -> list[Job]:
    """All configurations of the rule for all kinds of operands."""
    return [
        Job(name, tiles, kind, capability)
        for name, operator in OPERATORS.items()
        if operator.tuned is not None and operator.tuned.product is not None
        for kind in KINDS
        for tiles in configurations(operator.tuned.product(), kind, capability)
    ]


def compile_all(names: Sequence[str], kind: str, quick: bool, path: Path | None) -> int:
    """Compile all configurations for all architectures (``quick``: one for sm_90); print what they
    take."""
    print(
        "No GPU ran, for PyTorch finds none: kernels are compiled for GPUs that are not here, and "
        "not timed."
    )
    if quick:
        jobs = [next(tuned_jobs([name], kind, [90])) for name in names]
    else:
        jobs = list(tuned_jobs(names, kind, ARCHITECTURES))
    table = Table(path, CPU)
    with nullcontext(map(examine, jobs)) if quick else examine_in_pool(jobs) as found:
        for result in track(found, "kernels", len(jobs)):
            table.add([result])
    for name in names:
        given = shapes_of(name, compiled_sizes(name))
        shapes = " ".join("x".join(map(str, shape)) for shape in given)
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
        try:
            with putting_off_signals():
                # Ctrl-C reaches the processes while they start, too: each would print a traceback.
                interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
                try:
                    found = [pool.submit(examine, job) for job in jobs]
                finally:
                    signal.signal(signal.SIGINT, interrupt)
            yield (one.result() for one in found)
        except BaseException:
            for process in set(active_children()) - others:
                process.terminate()
            raise


def examine(job: Job) -> Result:
    """Compile a configuration; what it takes."""
    gpu, tuned = ARCHITECTURES[job.capability], job.tuned
    case, contestant = {"operator": job.operator, "GPU": gpu.name}, str(job.config)
    try:
        (launched,) = job.compile()
    except Exception as error:
        return Result(case=case, contestant=contestant, ok=False, reason=first_line(error))
    compiled, given = launched.kernel, operands(job.operator, job.kind)
    used, shared = resources(compiled), compiled.metadata.shared
    at_a_time = resident_blocks(
        job.capability, used["REG"], job.config.num_warps, shared, compiled.metadata.tmem_size or 0
    )
    blocks = tuned.blocks(job.config, given)
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
        if tuned.estimate is None:
            work = work_of(job.operator, compiled_sizes(job.operator), KINDS[job.kind].dtype)
            columns["estimate_ms"] = work.bytes / (gpu.sheet.memory * 1e9)
        else:
            columns["estimate_ms"] = tuned.estimate(job.config, given, job.kind, gpu.gpu) / 1e3
    return Result(case=case, contestant=contestant, columns=columns)


def resident_blocks(
    capability: int, registers: int, warps: int, shared: int, tensor_columns: int
) -> int:
    """The blocks that a multiprocessor runs at a time, by registers, warps, shared and tensor
    memory."""
    from nogpu import Resources

    blocks = Resources(registers, 0).resident_programs(warps, shared, f"sm_{capability}")
    return min(blocks, TENSOR_COLUMNS // tensor_columns) if tensor_columns else blocks


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


def count_kernels(job: Job) -> int | str:
    """Compile a configuration; how many kernels it has, or why not."""
    try:
        return len(job.compile())
    except Exception as error:
        return f"{job.operator}, {job.kind}, {job.config}: {first_line(error)}"


def main(capability: int, seconds: float) -> int:
    """Compile for so many seconds; print the failures, and the number of kernels."""
    deadline = time.monotonic() + seconds
    workers = max(1, len(os.sched_getaffinity(0)) - 1)
    jobs = list(all_jobs(capability))
    compiled: list[int | str] = []
    with get_context("spawn").Pool(workers, begin_process) as pool:  # its end stops what runs
        found = pool.imap_unordered(count_kernels, jobs)
        with suppress(StopIteration, multiprocessing.TimeoutError):
            while True:
                compiled.append(found.next(deadline - time.monotonic()))
    failures = [one for one in compiled if isinstance(one, str)]
    kernels = sum(one for one in compiled if not isinstance(one, str))
    left = len(jobs) - len(compiled)
    print(*failures, sep="\n", end="\n" * bool(failures))
    print(f"{kernels} kernels compiled by {workers} processes, {left} left, {len(failures)} failed")
    return min(len(failures), 1)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2])))
