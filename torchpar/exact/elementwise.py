# SPDX-License-Identifier: MIT
# mypy: disable-error-code="no-any-return"
"""Rules for elementwise operators that are not one function of float64."""

from typing import Any

import torch
from torch import Tensor

from torchpar.errors import ConfigError
from torchpar.exact.functions import exp64, in_pieces, log64, pow64
from torchpar.exact.registry import RULES, rule, times

# One operation at a time: a processor may fuse a product and a sum, which rounds once
RULES.update(
    add=lambda x, y, *, alpha=1: x + times(y, alpha),
    sub=lambda x, y, *, alpha=1: x - times(y, alpha),
    rsub=lambda x, y, alpha=1: y - times(x, alpha),
    addcmul=lambda x, a, b, *, value=1: x + times(a, value) * b,
    addcdiv=lambda x, a, b, *, value=1: x + times(a, value) / b,
    lerp=lambda x, y, weight: x + (y - x) * weight,
)


@rule("pow")
def _pow(x: Any, exponent: Any) -> Tensor:
    if not isinstance(exponent, Tensor):
        if not x.is_floating_point() and isinstance(exponent, int):
            return x**exponent
        return in_pieces(lambda t: pow64(t, float(exponent)), x.to(torch.result_type(x, exponent)))
    dtype = torch.result_type(x, exponent)
    base = x.double() if isinstance(x, Tensor) else torch.tensor(float(x), dtype=torch.float64)
    if (base < 0).any():
        raise ConfigError("exact arithmetic has powers of negative numbers to one number, not to a tensor")
    power = exp64(log64(base) * exponent.double())
    return torch.where(exponent == 0, 1.0, power).to(dtype)


@rule("arange")
def _arange(*bounds: Any, **options: Any) -> Tensor:
    numbers = [*bounds, 0]
    if any(float(number) != int(number) for number in numbers if not isinstance(number, torch.dtype)):
        raise ConfigError(f"arange{bounds} in exact arithmetic expects whole numbers; scale their range")
    return torch.arange(*bounds, **options)
