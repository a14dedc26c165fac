# SPDX-License-Identifier: MIT
"""Amdahl's law, fitted to times on several numbers of processes.

Of the time of one process a share p is divided among N, and 1 − p is not:

    T(N) = T(1)·((1 − p) + p/N)        S(N) = T(1)/T(N) = 1/((1 − p) + p/N)        S(∞) = 1/(1 − p)

(G. M. Amdahl, "Validity of the single processor approach to achieving large scale computing capabilities",
AFIPS 1967.) The law has no term for communication: a fitted p counts it as work that is not divided.
"""

import math
from collections.abc import Mapping


def speedup(p: float, processes: float) -> float:
    """Return ``S(N) = 1/((1 − p) + p/N)``.

    Args:
        p: the share of one process's time that is divided, in [0, 1].
        processes: N ≥ 1; `math.inf` gives the limit ``1/(1 − p)``, infinite for p = 1.
    """
    time = (1 - p) + p / processes
    return 1 / time if time else math.inf


def fit(speedups: Mapping[int, float]) -> float:
    """Return the p in [0, 1] that fits measured speed-ups best, by least squares.

    In ``1/S = 1 − p·(1 − 1/N)`` the law is linear, and the sum of squared residuals of 1/S = T(N)/T(1) is
    least at ``p = Σ (1 − 1/N)·(1 − 1/S) / Σ (1 − 1/N)²``; where that lies outside [0, 1], at the nearer end.

    Args:
        speedups: S for each N. N = 1 does not affect the fit. With a single N > 1 it is exact if 1 ≤ S ≤ N.
    """
    p = sum((1 - 1 / n) * (1 - 1 / s) for n, s in speedups.items())
    return min(max(p / sum((1 - 1 / n) ** 2 for n in speedups), 0.0), 1.0)
