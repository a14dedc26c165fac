# SPDX-License-Identifier: MIT
"""Let the idle threads of one library leave the cores to another one."""

import os


def shorten_spins() -> None:
    """Let idle threads of OpenMP and OpenBLAS sleep soon, unless the environment sets their times.

    Call it before NumPy and PyTorch are imported: they read the environment then. By default idle threads
    spin for milliseconds on the core that the next call needs; after a product in NumPy, PyTorch's took three
    times as long. Without any spinning a step of PyTorch takes four times as long.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "16")  # 2¹⁶ cycles
