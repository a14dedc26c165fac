# SPDX-License-Identifier: MIT
"""Triton kernels and their launchers.

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
