# SPDX-License-Identifier: MIT
"""The same work at other levels: pure Python, Numba, NumPy and MPI.

Each module shows how such a program looks when it is written well. None is slow on purpose.
"""
