# SPDX-License-Identifier: MIT
"""Launches of our kernels on the executor of PTX, and copies of the kernels with faults.

`launch` compiles what the launchers launch. `cases` are launches of all kernels. `mutants` breaks
the kernels, to see whether it is noticed. `docs/timeline.py` draws a tile of `matmul_t`.
"""
