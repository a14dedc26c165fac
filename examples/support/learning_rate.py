# SPDX-License-Identifier: MIT
"""Learning rates over a training: linear, cosine, constant."""

import math
from collections.abc import Callable
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from torchpar.errors import ConfigError

LRSchedule = Literal["linear", "cosine", "constant"]
"""The names of the schedules of `lr_scheduler`."""


def lr_scheduler(optimizer: Optimizer, schedule: LRSchedule, steps: int) -> LambdaLR:
    """Return a scheduler whose learning rate falls to 0 over ``steps``, linearly or by a cosine.

    The cosine is half a period. After ``steps`` the learning rate stays 0. With "constant" it does
    not change.

    Raises:
        ConfigError: another schedule.
    """
    factors: dict[LRSchedule, Callable[[int], float]] = {
        "linear": lambda step: 1 - min(step / steps, 1),
        "cosine": lambda step: (1 + math.cos(math.pi * min(step / steps, 1))) / 2,
        "constant": lambda step: 1.0,
    }
    if schedule not in factors:
        raise ConfigError(f"schedule is {schedule!r}, expected one of {sorted(factors)}")
    return LambdaLR(optimizer, factors[schedule])
