# SPDX-License-Identifier: MIT
"""The same work at other levels: pure Python, Numba, NumPy, MPI, and a GPU course in Triton.

`pure_python`, `numba_njit`, `numpy_mlp`, `mpi` and `triton_kernels` are written as such programs
are taught. `exercises` checks a student's NumPy network, whose functions a `students_process` calls
by the `grader`, and which returns `plain_data`. `students_mpi` checks an mpi4py program, which
`mpi_watch` executes. The modules for Numba, MPI and Triton import these
packages; no other module of torchpar imports the modules.
"""
