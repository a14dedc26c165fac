# SPDX-License-Identifier: MIT
"""Executed kernels: the benchmark, its kernels, and the process that launches them."""
