# SPDX-License-Identifier: MIT
"""A stand-in for a GPU: it compiles what the launchers launch, and executes its PTX.

The launchers are given tensors on the meta device, so that they choose as for a GPU. What they
allocate has not been written yet.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import launch
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.nvidia.compiler import CUDABackend

from benchmarks.driver import Driver, compile_launches, idle_driver, target
from nogpu.native.cache import cache_folder, writable


class Copies(TorchDispatchMode):
    """Copy between tensors on the meta device in the memory of ``device``, before its kernels."""

    def __init__(self, device: "Gpu"):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default and result.is_meta:
            size = result.untyped_storage().nbytes() // result.element_size()
            copy = torch.zeros(size, dtype=result.dtype)
            of_target = copy.as_strided(result.shape, result.stride(), result.storage_offset())
            of_target.copy_(self.device.read(args[1]))
            self.device.write(result, copy.view(torch.uint8).numpy())
        return result


class Gpu(launch.Gpu):
    """A stand-in for a GPU that also compiles what is launched."""

    def run(self, launch: Callable[[Any], Any], capability: int = 90) -> Any:
        """What ``launch(wrap)`` returns, having executed the kernels that it launches.

        They are compiled to PTX and no further, as `nogpu.emulate` does, in its cache.
        """
        results: list[Any] = []
        folder = writable(cache_folder("ptx"))
        with (
            target(capability),
            patch.dict(os.environ, TRITON_CACHE_DIR=str(folder)),
            patch.object(Driver, "get_current_device", lambda driver: 1000 + driver.architecture),
            patch.object(CUDABackend, "make_cubin", lambda backend, ptx, *args: ptx.encode()),
            Copies(self),
        ):
            compiled = compile_launches(lambda wrap: results.append(launch(wrap)))
        for one in compiled:
            self.execute(one)
        return results[0]

    def execute(self, compiled: Any) -> None:
        """Execute a compiled kernel with the arguments of its launch."""
        metadata, source = compiled.kernel.metadata, compiled.kernel.src
        names = source.fn.arg_names
        given = dict(zip(names, compiled.arguments, strict=False)) | compiled.options
        values = [given[name] for name in names if source.signature[name] != "constexpr"]
        # Two hidden parameters: memory in which each program makes its tensormaps, and one for
        # profiles.
        size = metadata.global_scratch_size * int(np.prod(compiled.grid))
        scratch = self.allocate("scratch memory", size).base if size else 0
        self.launch(
            compiled.kernel.asm["ptx"], [*values, scratch, 0], compiled.grid, metadata.shared
        )


@contextmanager
def idle_gpu(folder: Path, launched: Callable[..., object]) -> Iterator[None]:
    """`idle_driver`, for tests that look at no machine code: Triton specialises and parses kernels,
    and compiles them no further.

    ``folder`` is their cache. In a process they have a number of a device of their own, too.
    """

    def add_stages(backend: Any, stages: dict[str, Any], options: Any, *others: Any) -> None:
        stages["ttir"] = lambda module, metadata: module
        stages["cubin"] = no_machine_code

    with (
        patch.dict(os.environ, TRITON_CACHE_DIR=str(folder)),
        patch.object(Driver, "get_current_device", lambda driver: 2000 + driver.architecture),
        patch.object(CUDABackend, "add_stages", add_stages),
        idle_driver(launched),
    ):
        yield


def no_machine_code(module: Any, metadata: dict[str, Any]) -> bytes:
    """What stands for a kernel's machine code; its metadata are those of one that takes nothing."""
    sizes = ("shared", "tmem_size", "global_scratch_size", "profile_scratch_size")
    alignments = ("global_scratch_align", "profile_scratch_align")
    metadata |= dict.fromkeys(sizes, 0) | dict.fromkeys(alignments, 1) | {"name": "kernel"}
    return b""
