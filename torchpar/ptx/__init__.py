# SPDX-License-Identifier: MIT
"""Triton kernels without a GPU: an executor of NVIDIA's PTX on a CPU.

Read in this order: `parse` (text to instructions), `registers` (kinds of numbers), `machine`
(warps, masks, schedules and asynchronous operations), `arithmetic`, `memory` (who may read and
write which byte), `copies` (loads, stores and copies), `tensors` (TMA), `tensor_cores`, and `gpu`,
which launches kernels.

Sections are those of NVIDIA's "PTX ISA", release 9.0.
"""
