# SPDX-License-Identifier: MIT
"""Scaled dot-product attention in exact arithmetic, whose rows depend on nothing but what they attend to.

    S = scale·Q·Kᵀ + mask        P = softmax(S)        O = P·V

Each key has an exponent of its own in both products. So a query has the same bits whether the keys that it
does not attend to are masked, come later, or are not there: decoding with a cache of keys and values equals
one pass over the whole sequence. With dO = dL/dO, and dropout D (0 or 1/(1 − p)) of P,

    dV = (D ⊙ P)ᵀ·dO        dP = D ⊙ (dO·Vᵀ)        dS = P ⊙ (dP − Σ_k dP ⊙ P)
    dQ = scale·dS·K         dK = scale·dSᵀ·Q
"""

import math
from typing import Any

import torch
from torch import Tensor

from torchpar.errors import ConfigError
from torchpar.exact.ordinary import ordinary
from torchpar.exact.random import bernoulli
from torchpar.exact.softmax import safe_softmax
from torchpar.exact.sums import exact_sum
from torchpar.ops import exact_matmul
from torchpar.ops._exact import MAX_EXPONENT, product_of_exponents, row_exponents, scaled

_SPARE = 4  # octaves that weights with dropout may take above 2¹²⁵, the largest power of two that they get


def product_by_keys(p: Tensor, v: Tensor) -> Tensor:
    """``p @ v`` for ``p (*, m, k)`` and ``v (*, k, n)``, whose rows are scaled one by one.

    A row of the result depends on the rows of ``v`` that it gives a weight other than 0, and on no others.
    """
    e = row_exponents(v)
    unusual = e > MAX_EXPONENT
    e = torch.where(unusual, 0, e) - _SPARE
    half = e >> 1  # two factors, since 2^e may be no normal number
    weights = scaled(scaled(p, half.mT), (e - half).mT)
    # A key that is not finite makes the rows that attend to it NaN, and no others.
    weights = torch.where(unusual.mT & (p != 0), math.nan, weights)
    small = torch.where(unusual, 0.0, scaled(v, -e))
    f = torch.full_like(small.mT[..., :1], _SPARE, dtype=torch.int32)  # whatever the other keys are
    return product_of_exponents(weights, small.mT, row_exponents(weights), f)


def weights_of(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """P, for ``q (*, m, d)``, ``k (*, n, d)``, and a ``mask`` of booleans or of numbers that are added."""
    scores = exact_matmul(q, k) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return safe_softmax(scores, -1)


def gradients(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, p: Tensor, scale: float, dropout: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK and dV."""
    dropped = p if dropout is None else p * dropout
    dp = exact_matmul(g, v)
    if dropout is not None:
        dp = dp * dropout
    ds = p * (dp - exact_sum(dp.double() * p.double(), [-1], keepdim=True).float()) * scale
    return exact_matmul(ds, k.mT), exact_matmul(ds.mT, q.mT), exact_matmul(dropped.mT, g.mT)


class _Attention(torch.autograd.Function):
    @staticmethod
    @ordinary
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout: Tensor | None
    ) -> Tensor:
        p = weights_of(q, k, mask, scale)
        ctx.save_for_backward(q, k, v, p, dropout)
        ctx.scale = scale
        return product_by_keys(p if dropout is None else p * dropout, v)

    @staticmethod
    @ordinary
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q, k, v, p, dropout = ctx.saved_tensors
        return *gradients(g, q, k, v, p, ctx.scale, dropout), None, None, None


def causal_mask(q: Tensor, k: Tensor) -> Tensor:
    """True where a query attends to a key: to its own position, and those before."""
    return torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` in exact arithmetic, with its arguments.

    A row that attends to nothing is 0.

    Raises:
        ConfigError: a mask that needs a gradient.
    """
    if attn_mask is not None and attn_mask.requires_grad:
        raise ConfigError("attention in exact arithmetic has no gradient of its mask; add it to the scores")
    if enable_gqa:
        times = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(times, -3) for t in (key, value))
    if is_causal:
        attn_mask = causal_mask(query, key)
    batch = torch.broadcast_shapes(*(t.shape[:-2] for t in (query, key, value)))
    query, key, value = (t.expand(*batch, *t.shape[-2:]) for t in (query, key, value))
    dropout = None
    if dropout_p:
        shape = (*batch, query.shape[-2], key.shape[-2])
        dropout = bernoulli(shape, 1 - dropout_p, None, query.device).float().div_(1 - dropout_p)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return _Attention.apply(query, key, value, attn_mask, scale, dropout)  # type: ignore[no-any-return]
