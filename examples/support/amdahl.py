# SPDX-License-Identifier: MIT
"""Amdahl's law, fitted to times by phase on several numbers of processes.

Of the time of one process a share p is divided among N, and 1 − p is not:

    T(N) = T(1)·((1 − p) + p/N)        S(N) = T(1)/T(N) = 1/((1 − p) + p/N)        S(∞) = 1/(1 − p)

(G. M. Amdahl, "Validity of the single processor approach to achieving large scale computing capabilities",
AFIPS 1967.) The law has no term for communication: a fitted p counts it as work that is not divided.
"""

import math
from collections.abc import Mapping
from typing import Any

PHASES = ("data", "forward", "backward", "collectives", "optimizer")
DIVIDED = ("forward", "backward")  # each rank draws the order of all samples, and updates all parameters


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


def findings(seconds: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
    """Return what the law says of measured times.

    Args:
        seconds: of each of the `PHASES`, for each number of processes, 1 among them.

    Returns:
        The fitted ``p``; ``p_of_profile``, the share of forward and backward in one process's time, which is
        p if these divide perfectly; ``limit``, the speed-up on any number of processes, None for p = 1; the
        speed-up ``achieved`` on most processes N; the ``limiting_phase``, which has most time there beyond
        its ideal share t(1)/N, and ``beyond_ms``, that time.
    """
    one, most = seconds[1], max(seconds)
    times = {n: sum(of_phases.values()) for n, of_phases in seconds.items()}
    speedups = {n: times[1] / time for n, time in times.items()}
    p = fit(speedups)
    beyond = {phase: 1000 * (t - one[phase] / most) for phase, t in seconds[most].items()}
    limiting = max(beyond, key=beyond.__getitem__)
    return {
        "p": p,
        "p_of_profile": sum(one[phase] for phase in DIVIDED) / times[1],
        "limit": speedup(p, math.inf) if p < 1 else None,  # JSON has no infinity
        "achieved": speedups[most],
        "limiting_phase": limiting,
        "beyond_ms": beyond[limiting],
    }
