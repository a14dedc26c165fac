# SPDX-License-Identifier: MIT
"""The same work at other levels: pure Python, Numba, NumPy, MPI, and Triton kernels as in a first course.

Each module shows how such a program looks when it is written well. None is slow on purpose.
"""
