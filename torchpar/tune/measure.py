# SPDX-License-Identifier: MIT
"""The timer, the check against float64, and the row of times of a measured problem."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROUNDS = 5

Call = Callable[[], object]


class Reference(NamedTuple):
    """A product in float64, and the largest error that a way to it may have."""

    product: Tensor
    bound: float


def reference(exact: Tensor, library: Tensor, k: int) -> Reference:
    """The float64 product ``exact`` of k terms; the bound is twice the error of PyTorch's ``library``."""
    error = (library.double() - exact).abs().max().item()
    # The reference has an error too: a rounding of random sign for each of k terms.
    own = exact.abs().max().item() * math.sqrt(k) * torch.finfo(torch.float64).eps / 2
    return Reference(exact, 2 * error + 3 * own)


def check(found: Tensor, expected: Reference, name: object, symmetric: bool = True) -> None:
    """Raise a ValueError if the error is over the bound, or if a product is not symmetric and should be."""
    error = (found.double() - expected.product).abs().max().item()
    if not error <= expected.bound:
        raise ValueError(f"{name} has an error of {error:.1e}, over {expected.bound:.1e}")
    if symmetric and not torch.equal(found, found.mT):
        raise ValueError(f"{name} is not symmetric")


def take_turns(calls: Mapping[Any, Call], time_call: Callable[[Call], float]) -> dict[Any, float]:
    """The lower quartile of the seconds of each call. They take turns, so that a disturbance slows all."""
    times: dict[Any, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(time_call(call))
    return {name: sorted(own)[len(own) // 4] for name, own in times.items()}


def print_times(problem: object, times: Mapping[Any, float], describe: Callable[[Any], str] = str) -> None:
    """Print a row: the problem, and the times of its calls, the fastest first."""
    ranked = sorted(times, key=times.__getitem__)
    print(f"{problem}: {', '.join(f'{describe(name)} {1e3 * times[name]:.4g} ms' for name in ranked)}")
