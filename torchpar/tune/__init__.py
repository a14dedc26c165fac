# SPDX-License-Identifier: MIT
"""Tuning of the matrix kernels: `command` is ``python -m torchpar tune``, `measure` checks and times."""
