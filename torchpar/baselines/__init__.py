# SPDX-License-Identifier: MIT
"""The same work at other levels: pure Python, Numba, NumPy, MPI, and a GPU course's first kernels
in Triton.

Each module shows how such a program looks when it is taught. The modules of Numba, MPI and Triton
import those packages; no other module of torchpar imports these modules.
"""
