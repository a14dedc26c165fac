# SPDX-License-Identifier: MIT
# mypy: disable-error-code="no-any-return"
"""Rules for elementwise operators: single operations, functions, and random numbers."""

import math
from typing import Any

import torch
from torch import Tensor

from torchpar.errors import ConfigError
from torchpar.exact import random
from torchpar.exact.functions import erf64, exp64, function, in_pieces, log64, pow64, sigmoid64, tanh64
from torchpar.exact.registry import rule, times

# One operation at a time: a processor may fuse a product and a sum, which rounds once


@rule("add")
def _add(x: Any, y: Any, *, alpha: Any = 1) -> Tensor:
    return x + times(y, alpha) if isinstance(y, Tensor) else x + y * alpha


@rule("sub")
def _sub(x: Any, y: Any, *, alpha: Any = 1) -> Tensor:
    return x - times(y, alpha) if isinstance(y, Tensor) else x - y * alpha


@rule("rsub")
def _rsub(x: Any, y: Any, alpha: Any = 1) -> Tensor:
    return y - times(x, alpha)


@rule("addcmul")
def _addcmul(x: Tensor, a: Tensor, b: Tensor, *, value: Any = 1) -> Tensor:
    return x + times(a, value) * b


@rule("addcdiv")
def _addcdiv(x: Tensor, a: Tensor, b: Tensor, *, value: Any = 1) -> Tensor:
    return x + times(a, value) / b


@rule("lerp")
def _lerp(x: Tensor, y: Tensor, weight: Any) -> Tensor:
    return x + (y - x) * weight


# Functions


function("log2")(lambda x: log64(x) * (1 / math.log(2)))
function("rsqrt")(lambda x: 1 / x.sqrt())
function("silu")(lambda x: x * sigmoid64(x))
function("sigmoid_backward")(lambda g, y: g * (y * (1 - y)))
function("tanh_backward")(lambda g, y: g * (1 - y * y))


@function("log1p")
def _log1p(x: Tensor) -> Tensor:
    u = x + 1  # whose rounding error the quotient removes
    return torch.where(u == 1, x, log64(u) * (x / (u - 1)))


@function("silu_backward")
def _silu_backward(g: Tensor, x: Tensor) -> Tensor:
    s = sigmoid64(x)
    return g * (s * (x * (1 - s) + 1))


@rule("softplus")
def _softplus(x: Tensor, beta: float = 1, _: float = 20) -> Tensor:
    def formula(x: Tensor) -> Tensor:
        x = x * beta
        return (x.clamp(min=0) + _log1p(exp64(-x.abs()))) / beta

    return in_pieces(formula, x)


@rule("softplus_backward")
def _softplus_backward(g: Tensor, x: Tensor, beta: float, _: float) -> Tensor:
    return in_pieces(lambda g, x: g * sigmoid64(x * beta), g, x)


_TANH_SCALE, _TANH_CUBE = math.sqrt(2 / math.pi), 0.044715
_ROOT_HALF, _DENSITY = math.sqrt(0.5), 1 / math.sqrt(2 * math.pi)


@rule("gelu")
def _gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    def formula(x: Tensor) -> Tensor:
        if approximate == "tanh":
            return x * 0.5 * (tanh64((x + x * x * x * _TANH_CUBE) * _TANH_SCALE) + 1)
        return x * 0.5 * (erf64(x * _ROOT_HALF) + 1)

    return in_pieces(formula, x)


@rule("gelu_backward")
def _gelu_backward(g: Tensor, x: Tensor, *, approximate: str = "none") -> Tensor:
    def formula(g: Tensor, x: Tensor) -> Tensor:
        if approximate == "tanh":
            t = tanh64((x + x * x * x * _TANH_CUBE) * _TANH_SCALE)
            inner = (x * x * (3 * _TANH_CUBE) + 1) * _TANH_SCALE
            return g * ((t + 1) * 0.5 + x * 0.5 * (1 - t * t) * inner)
        return g * ((erf64(x * _ROOT_HALF) + 1) * 0.5 + x * exp64(x * x * -0.5) * _DENSITY)

    return in_pieces(formula, g, x)


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


# Random numbers


@rule("normal_", "normal_functional")  # torch.normal has the mean first, and is refused
def _normal(x: Tensor, mean: float = 0.0, std: float = 1.0, *, generator: Any = None) -> Tensor:
    return (random.normal(x.shape, generator, x.device) * std + mean).to(x.dtype)


@rule("randn")
def _randn(size: Any, *, generator: Any = None, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    return random.normal(size, generator, torch.device(device or "cpu")).to(dtype or torch.float32)


@rule("randn_like")
def _randn_like(x: Tensor, *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    return random.normal(x.shape, None, torch.device(device or x.device)).to(dtype or x.dtype)


@rule("uniform_", "uniform")  # whose kernel fuses this product and sum on some processors
def _uniform(x: Tensor, low: float = 0.0, high: float = 1.0, *, generator: Any = None) -> Tensor:
    drawn = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    return drawn * (high - low) + low


@rule("bernoulli")
def _bernoulli(x: Tensor, p: Any = None, *, generator: Any = None) -> Tensor:
    return random.bernoulli(x.shape, x.double() if p is None else p, generator, x.device).to(x.dtype)


@rule("bernoulli_")
def _bernoulli_in_place(x: Tensor, p: Any = 0.5, *, generator: Any = None) -> Tensor:
    return _bernoulli(x, p, generator=generator)


@rule("native_dropout")
def _native_dropout(x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    if not train:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    kept = random.bernoulli(x.shape, 1 - p, None, x.device)
    return x * kept / (1 - p) if p < 1 else torch.zeros_like(x), kept


@rule("arange")
def _arange(*bounds: Any, **options: Any) -> Tensor:
    numbers = [*bounds, 0]
    if any(float(number) != int(number) for number in numbers if not isinstance(number, torch.dtype)):
        raise ConfigError(f"arange{bounds} in exact arithmetic expects whole numbers; scale their range")
    return torch.arange(*bounds, **options)
