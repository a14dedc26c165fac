# SPDX-License-Identifier: MIT
"""A stand-in for a GPU's driver: kernels are compiled for it, and not launched."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget


class Driver:
    """A GPU of a compute capability, such as 90 for sm_90."""

    def __init__(self, architecture: int):
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return 2000 + self.architecture  # Triton caches compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def target(architecture: int) -> Iterator[None]:
    """Compile the kernels of the block for ``architecture``."""
    with (
        patch.object(triton.runtime.driver, "_active", Driver(architecture)),
        patch.dict(os.environ, TRITON_DEFAULT_FP_FUSION="1"),
    ):
        yield
