# SPDX-License-Identifier: MIT
"""Random numbers by a counter-based generator in integers, the same on every processor.

`torch.rand` has the same bits everywhere, too, but draws of normal numbers and of dropout masks use
a processor's vectors. Philox with ten rounds makes four words of 32 bits from a counter and a key.
The key is drawn from PyTorch's generator, so that `torch.manual_seed` and saved random states
determine the numbers.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torchpar.exact.functions import cos64, log64, sqrt64
from torchpar.exact.registry import rule

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_ROUNDS, _WORD = 10, 0xFFFFFFFF


def philox(counters: Tensor, key: tuple[int, int]) -> Tensor:
    """Four words ``(4, n)`` of 32 bits, int64, for int64 ``counters (n)``."""
    zero = torch.zeros_like(counters)
    c0, c1, c2, c3 = counters & _WORD, counters >> 32, zero, zero
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _wide_product(c0, _MULTIPLIERS[0])
        high1, low1 = _wide_product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return torch.stack([c0, c1, c2, c3])


def _wide_product(x: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The upper and the lower 32 bits of ``x·m``, for words x and m: x·m would overflow int64."""
    low, high = x * (m & 0xFFFF), x * (m >> 16)
    middle = low + ((high & 0xFFFF) << 16)
    return (high >> 16) + (middle >> 32), middle & _WORD


def _uniform64(
    shape: Sequence[int], generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """Numbers (i + ½)·2⁻³² in (0, 1), float64, of the given shape."""
    where = "cpu" if generator is None else generator.device
    words = torch.randint(0, 2**32, (2,), generator=generator, device=where)
    n = math.prod(shape)
    drawn = philox(torch.arange(-(-n // 4), device=device), (int(words[0]), int(words[1])))
    return ((drawn.flatten()[:n].double() + 0.5) * 2.0**-32).view(tuple(shape))


@rule("normal_", any_dtype=True)  # torch.normal has the mean first, and is refused
def _normal(
    x: Tensor, mean: float = 0.0, std: float = 1.0, *, generator: torch.Generator | None = None
) -> Tensor:
    radius, angle = _uniform64((2, *x.shape), generator, x.device)
    normal = sqrt64(log64(radius) * -2) * cos64(angle * (2 * math.pi))  # by Box and Muller
    return (normal * std + mean).to(x.dtype)


@rule(
    "uniform_", any_dtype=True, narrow=True
)  # PyTorch's kernel fuses product and sum on some processors
def _uniform(
    x: Tensor, low: float = 0.0, high: float = 1.0, *, generator: torch.Generator | None = None
) -> Tensor:
    drawn = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    return drawn * (high - low) + low


@rule("bernoulli_", any_dtype=True)
def _bernoulli(
    x: Tensor, p: Tensor | float = 0.5, *, generator: torch.Generator | None = None
) -> Tensor:
    if isinstance(p, Tensor) and not ((p >= 0) & (p <= 1)).all():
        least, most = p.min().item(), p.max().item()
        raise RuntimeError(f"bernoulli_: p is {least:g} to {most:g}, expected 0 to 1")
    return (_uniform64(x.shape, generator, x.device) < p).to(x.dtype)


@rule("native_dropout", any_dtype=True)  # called on GPUs
def _native_dropout(x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    p = 0.0 if train is False else p
    kept = _bernoulli(x, 1 - p)
    return x * (kept.div(1 - p) if p < 1 else kept), kept.bool()  # with p = 1 nothing is kept
