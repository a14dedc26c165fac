# SPDX-License-Identifier: MIT
"""Triton kernels and their launchers.

A launcher takes tensors on one GPU, the tensor to write, and ``wrap``, which it applies to the kernel
before launching it: a compiler that is tracing puts itself between the two there. It checks nothing:
its caller has.
"""
