# SPDX-License-Identifier: MIT
"""Triton kernels and their launchers; installed as `torchpar.kernels`.

A launcher takes tensors on one GPU, the tensor to write, and ``wrap``, which it applies to the kernel
before launching it (`torch.library.wrap_triton` while a compiler is tracing). It checks nothing: its
caller has.
"""
