# SPDX-License-Identifier: MIT
"""An executor of NVIDIA's PTX on a CPU: it runs the kernels that the launchers would give to a GPU.

Read in this order: `parse` (text to instructions), `registers` (kinds of numbers), `machine`
(warps, masks, schedules and asynchronous operations), `arithmetic`, `memory` (who may read and
write which byte), `copies` (loads, stores and copies), `tensors` (TMA), `tensor_cores`, and
`launch`, which stands in for a GPU. `cases` are launches of all kernels. `mutants` breaks the
kernels, to see whether it is noticed. `docs/timeline.py` draws a tile of `matmul_t`.

Sections are those of NVIDIA's "PTX ISA", release 9.0.
"""
