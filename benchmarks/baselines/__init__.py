# SPDX-License-Identifier: MIT
"""The same work without PyTorch: pure Python, Numba, NumPy, MPI; and kernels launched as beginners do.

Each module is what its kind of program looks like when it is written well, and none is slow on purpose.
"""
