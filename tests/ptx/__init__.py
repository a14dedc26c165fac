# SPDX-License-Identifier: MIT
"""Launches of our kernels on the executor of PTX, and a corpus of others' kernels.

`launch` compiles what the launchers launch. `cases` are launches of all kernels. `mutants` breaks
the kernels, to see whether it is noticed. `docs/timeline.py` draws a tile of `matmul_t`.

The corpus launches on CPU tensors. `tutorials` holds the subjects of Triton's tutorials, `packages`
operators of Liger-Kernel, `faults` kernels with one fault each, and `right` kernels that look
faulty. `interpreted` prints what Triton's interpreter says of the faults.
"""
