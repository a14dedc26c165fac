# SPDX-License-Identifier: MIT
"""Tuning: `command` is ``python -m torchpar tune``; `gpu` tunes the matrix kernels, and `cpu` products."""
