# SPDX-License-Identifier: MIT
"""Amdahl's law, fitted to times by phase on several numbers of processes.

Of the time of one process a share p is divided among N, and 1 − p is not:

    T(N) = T(1)·((1 − p) + p/N)        S(N) = T(1)/T(N) = 1/((1 − p) + p/N)        S(∞) = 1/(1 − p)

(G. M. Amdahl, "Validity of the single processor approach to achieving large scale computing capabilities",
AFIPS 1967.) The law has no term for communication: a fitted p counts it as work that is not divided.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Scaling:
    """Times of training in batches of one size, on several numbers of processes.

    Attributes:
        batch_size: samples of a step, over all processes.
        seconds: of each of the `PHASES` in an epoch, for each number of processes, 1 among them.
        losses: after the last epoch, for each number of processes.
    """

    batch_size: int
    seconds: Mapping[int, Mapping[str, float]]
    losses: Mapping[int, float]

    @property
    def speedups(self) -> dict[int, float]:
        """``S(N) = T(1)/T(N)`` as measured, T the sum of the phases."""
        return {n: sum(self.seconds[1].values()) / sum(t.values()) for n, t in self.seconds.items()}

    @property
    def p(self) -> float:
        """The p that `fit` finds for the speed-ups."""
        return fit(self.speedups)

    @property
    def p_of_profile(self) -> float:
        """The share of forward and backward in one process's time: p if these divide perfectly."""
        return sum(self.seconds[1][phase] for phase in DIVIDED) / sum(self.seconds[1].values())

    @property
    def limit(self) -> float:
        """The speed-up on any number of processes, ``1/(1 − p)``."""
        return speedup(self.p, math.inf)

    @property
    def limiting(self) -> tuple[str, float]:
        """The phase with most seconds beyond its ideal share, ``t(N) − t(1)/N``, on most processes N."""
        most = max(self.seconds)
        excess = {phase: t - self.seconds[1][phase] / most for phase, t in self.seconds[most].items()}
        return max(excess.items(), key=lambda item: item[1])

    def __str__(self) -> str:
        """p, its limit, the speed-up achieved, and the phase that limits it."""
        most, (phase, seconds) = max(self.seconds), self.limiting
        return (
            f"batch {self.batch_size}: p {self.p:.3f} ({self.p_of_profile:.3f} by the profile), limit "
            f"{self.limit:.2f}×, achieved {self.speedups[most]:.2f}× on {most}; "
            f"{phase} limits, {1000 * seconds:.1f} ms beyond its share"
        )

    def rows(self) -> list[dict[str, Any]]:
        """Return the figures of each number of processes; times in milliseconds."""
        return [
            {"batch_size": self.batch_size, "processes": n}
            | {f"{phase}_ms": 1000 * t for phase, t in self.seconds[n].items()}
            | {"epoch_ms": 1000 * sum(self.seconds[n].values()), "speedup": s}
            | {"p": self.p, "p_of_profile": self.p_of_profile, "limiting_phase": self.limiting[0]}
            | {"limit": self.limit if self.p < 1 else None, "loss": self.losses[n]}
            for n, s in self.speedups.items()
        ]
