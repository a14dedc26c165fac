# SPDX-License-Identifier: MIT
"""The same work at other levels: pure Python, Numba, NumPy, MPI, and a GPU course in Triton.

Each module is written as such a program is taught. The modules for Numba, MPI and Triton import
these packages; no other module of torchpar imports the modules.
"""
