# SPDX-License-Identifier: MIT
"""Compile kernels for a GPU that is not there: registers, spills, shared memory, instructions.

A stand-in for Triton's driver names an architecture, so that a launcher chooses its configuration and Triton
specialises the kernel as in a launch. The tensors may be on the meta device.
"""

import os
import re
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget

from benchmarks import sass
from benchmarks.sass import Instruction

TOOLS = Path(str(triton.__file__)).parent / "backends/nvidia/bin"

Wrap = Callable[[Any], Any]


class Driver:
    """A stand-in for a GPU's driver. Kernels are compiled for its architecture and cannot be launched.

    Args:
        architecture: a compute capability, such as 90 for sm_90, or the name of one of AMD's.
    """

    def __init__(self, architecture: int | str):
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget | None:
        nvidia = isinstance(self.architecture, int)
        return GPUTarget("cuda" if nvidia else "hip", self.architecture, 32 if nvidia else 64)

    def get_current_device(self) -> int:
        return int(str(self.architecture).removeprefix("gfx"))  # Triton caches compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def target(architecture: int | str) -> Iterator[None]:
    """Compile the kernels of the block for ``architecture``, as `Driver` takes it."""
    with (
        patch.object(triton.runtime.driver, "_active", Driver(architecture)),
        # Triton 3.9 warns if this is unset, because the default changes in 3.10.
        patch.dict(os.environ, TRITON_DEFAULT_FP_FUSION="1"),
    ):
        yield


class MachineCode:
    """The machine code of a kernel, its resources, and the arguments of its launch.

    Attributes:
        resources: of a thread: REG, its registers; STACK and LOCAL, bytes that did not fit into them.
        shared_memory: bytes of a block.
        tensor_memory: its columns that a block uses; 0 on GPUs without tensor memory.
        seconds: compile time; if the kernel is in Triton's cache, the time to read it.
    """

    def __init__(
        self,
        kernel: Any,
        grid: Any,
        arguments: tuple[Any, ...],
        options: dict[str, Any],
        seconds: float,
        cubin: Path,
    ):
        self.grid = grid
        self.arguments = arguments
        self.options = options
        self.signature: dict[str, str] = kernel.src.signature
        self.seconds = seconds
        self.shared_memory: int = kernel.metadata.shared
        self.tensor_memory: int = kernel.metadata.tmem_size
        self.cubin = cubin
        self.cubin.write_bytes(kernel.asm["cubin"])
        usage = re.findall(r"(REG|STACK|LOCAL):(\d+)", self._run("cuobjdump", "-res-usage"))
        self.resources = {name: int(count) for name, count in usage}

    @property
    def spills(self) -> int:
        """Bytes of a thread that did not fit into its registers."""
        return self.resources["STACK"] + self.resources["LOCAL"]

    def _run(self, tool: str, option: str) -> str:
        command = [str(TOOLS / tool), option, str(self.cubin)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    @cached_property
    def instructions(self) -> list[Instruction]:
        return sass.read(self._run("nvdisasm", "-c"))

    @cached_property
    def opcodes(self) -> Counter[str]:
        return Counter(instruction.opcode for instruction in self.instructions)

    def innermost_loops(self, opcode: str) -> list[list[Instruction]]:
        return sass.innermost_loops(self.instructions, opcode)

    def count(self, pattern: str) -> int:
        return sum(count for opcode, count in self.opcodes.items() if re.fullmatch(pattern, opcode))


def machine_codes(launch: Callable[[Wrap], object], folder: Path) -> list[MachineCode]:
    """Compile the kernels that ``launch(wrap)`` launches, inside `target`.

    Args:
        launch: calls a launcher of `torchpar.kernels` with ``wrap``.
        folder: for the cubins.
    """
    compiled: list[MachineCode] = []

    class Compile:
        def __init__(self, kernel: Any):
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            def compile_it(*args: Any, **options: Any) -> None:
                start = time.perf_counter()
                kernel = self.kernel.warmup(*args, grid=grid, **options)
                seconds = time.perf_counter() - start
                cubin = folder / f"{len(compiled)}.cubin"
                compiled.append(MachineCode(kernel, grid, args, options, seconds, cubin))

            return compile_it

    launch(Compile)
    return compiled
