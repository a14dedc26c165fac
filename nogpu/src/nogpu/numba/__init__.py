# SPDX-License-Identifier: MIT
"""Kernels of ``numba.cuda`` without a GPU: numba-cuda compiles them, and an emulator executes them.

numba-cuda's own dispatcher, types, device arrays and reductions run unchanged. Below them
`numba_stand_in` replaces the driver, when a program imports ``numba.cuda``: `numba_driver` has its
functions, `device_memory` the memory that they give, and `numba_kernels` modules and launches.
Without numba-cuda nothing is replaced.
"""
