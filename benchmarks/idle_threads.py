# SPDX-License-Identifier: MIT
"""What keeps one library's idle threads from another's way, to be called before either is imported."""

import os


def shorten_spins() -> None:
    """Have idle threads of OpenMP and OpenBLAS sleep soon, unless the environment says otherwise.

    They spin, for milliseconds, on the core that the next call needs: after a product in NumPy, torch's took
    three times as long. Without any spinning a step of torch takes four times as long.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "16")  # 2¹⁶ cycles
