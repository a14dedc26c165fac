# SPDX-License-Identifier: MIT
"""Triton kernels and their launchers.

`maximum`, `matmul_t`, `matmul_t_tma`, `linear_sigmoid`, `sigmoid_backward`, `exact_matmul`,
`fp32_matmul`, `row_sums` and `muon` hold kernels, of which the matrix kernels share `gemm`.
`launch` prepares launches and keeps them. `rule` predicts the time of a configuration, `tiles`
chooses by it, `autotune` measures instead, and `device` holds facts of GPUs.

A launcher takes tensors on one GPU and ``wrap``: None for a launch, or the function that a tracing
compiler applies to the kernel to record it. Launchers do not check their arguments by themselves:
an operator checks its operands before, or hands its check to the launcher.
"""

from collections.abc import Callable
from typing import Any

Tracer = Callable[[Any], Any]
"""A function to apply to a Triton kernel before its launch."""

Wrap = Tracer | None
"""The argument ``wrap`` of a launcher; None for a real launch."""
