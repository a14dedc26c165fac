# SPDX-License-Identifier: MIT
"""A decorator for functions that are exact by themselves, and that the mode leaves alone."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

T = TypeVar("T")
P = ParamSpec("P")


def ordinary(function: Callable[P, T]) -> Callable[P, T]:
    """Call ``function`` outside of `torchpar.exact.mode`."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> T:
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            return function(*args, **kwargs)

    return call
