# SPDX-License-Identifier: MIT
"""Stand-ins for a GPU's driver: kernels are compiled without a GPU, or launched by nothing."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple
from unittest.mock import patch

import torch

from torchpar.kernels import Tracer

if TYPE_CHECKING:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import CompiledKernel
    from triton.runtime.jit import KernelInterface

Grid = tuple[int, ...] | Callable[[dict[str, int]], tuple[int, ...]]


class Driver:
    """A stand-in for a GPU's driver. Kernels are compiled for its architecture and cannot be
    launched.

    Args:
        architecture: a compute capability, such as 90 for sm_90, or the name of one of AMD's.
    """

    def __init__(self, architecture: int | str):
        self.architecture = architecture
        # Triton caches compiled kernels by device.
        self.device = int(str(architecture).removeprefix("gfx"))

    def get_current_target(self) -> "GPUTarget":
        from triton.backends.compiler import GPUTarget

        nvidia = isinstance(self.architecture, int)
        return GPUTarget("cuda" if nvidia else "hip", self.architecture, 32 if nvidia else 64)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def target(architecture: int | str, driver: type[Driver] | None = None) -> Iterator[None]:
    """Compile the kernels of the block, whose tensors may be on "meta", for ``architecture``.

    Args:
        driver: the stand-in, by default `Driver`, which launches nothing.
    """
    import triton

    with (
        patch.object(triton.runtime.driver, "_active", (driver or Driver)(architecture)),
        # Triton 3.9 warns if this is unset, because the default changes in 3.10.
        patch.dict(os.environ, TRITON_DEFAULT_FP_FUSION="1"),
    ):
        yield


@contextmanager
def idle_driver(launched: Callable[..., object] = lambda *args: None) -> Iterator[None]:
    """Compile kernels for sm_90; ``launched`` takes what a launch passes to the driver."""

    class Idle(Driver):
        utils = SimpleNamespace(
            # Module, function, registers, spills, threads.
            load_binary=lambda *args: (1, 1, 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 232448},
            unload_module=lambda module: None,
        )

        def launcher_cls(self, source: object, metadata: object) -> Callable[..., object]:
            return launched

    with target(90, Idle):
        yield


@contextmanager
def emulating() -> Iterator[None]:
    """Answer for nogpu, which need not be here, that an emulator executes launches."""
    before = sys.modules.get("nogpu")
    sys.modules["nogpu"] = SimpleNamespace(is_emulating=lambda *_: True)  # type: ignore[assignment]
    try:
        yield
    finally:
        if before is None:
            del sys.modules["nogpu"]
        else:
            sys.modules["nogpu"] = before


@contextmanager
def gpu_of_cpu_tensors() -> Iterator[None]:
    """Let operators launch kernels for tensors on the CPU, and launchers keep plans for them.

    In TF32, for PyTorch computes `linear_sigmoid` of float32 without it.
    """
    from torchpar.kernels.launch import forget_launches

    with (
        idle_driver(),
        emulating(),
        torch.backends.flags(fp32_precision="tf32"),
    ):
        yield
        forget_launches()


class Launched(NamedTuple):
    """A launch that was captured, and not made."""

    kernel: "KernelInterface"
    grid: Grid
    arguments: tuple[object, ...]
    options: dict[str, object]


class Compiled(NamedTuple):
    """A kernel, and the launch for which it was compiled."""

    kernel: "CompiledKernel"
    grid: Grid
    arguments: tuple[object, ...]
    options: dict[str, object]


def capture_launches(launch: Callable[[Tracer], object]) -> list[Launched]:
    """Return what ``launch(wrap)`` launches; nothing is launched."""
    found: list[Launched] = []

    @dataclass
    class Capture:
        kernel: "KernelInterface"

        def __getitem__(self, grid: Grid) -> Callable[..., None]:
            return partial(self.note, grid)

        def note(self, grid: Grid, *args: object, **options: object) -> None:
            found.append(Launched(self.kernel, grid, args, options))

    launch(Capture)
    return found


def compile_launches(launch: Callable[[Tracer], object]) -> list[Compiled]:
    """Compile the kernels that ``launch(wrap)`` launches, inside `target`."""
    return [
        Compiled(kernel.warmup(*args, grid=grid, **options), grid, args, options)
        for kernel, grid, args, options in capture_launches(launch)
    ]
