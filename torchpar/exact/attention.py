# SPDX-License-Identifier: MIT
"""Scaled dot-product attention in exact arithmetic.

Each output depends only on the keys that its query attends to.

    S = scale·Q·Kᵀ + mask        P = softmax(S)        O = P·V

In both products each key has its own exponent. So a query has the same bits whether the keys that
it does not attend to are masked, come later, or do not exist: decoding with a cache of keys and
values equals one pass over the sequence. With dO = dL/dO,

    dV = Pᵀ·dO        dP = dO·Vᵀ        dS = P ⊙ (dP − Σ_k dP ⊙ P)
    dQ = scale·dS·K         dK = scale·dSᵀ·Q
"""

import math
from typing import Any

import torch
from torch import Tensor

from torchpar.exact.products import wide_product
from torchpar.exact.reductions import softmax
from torchpar.exact.registry import rule, wide
from torchpar.exact.sums import exact_sum
from torchpar.ops import exact_matmul
from torchpar.ops.exact_digits import (
    DIGITS,
    MAX_EXPONENT,
    product_of_exponents,
    row_exponents,
    scaled,
)

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
# Octaves below the power of two above a key, so that its product with a weight is finite.
_SPARE = 4


def product_by_keys(p: Tensor, v: Tensor) -> Tensor:
    """``p @ v`` for ``p (*, m, k)`` and ``v (*, k, n)``, whose rows are scaled one by one.

    A row of the result depends only on the rows of ``v`` whose weight in it is not 0.
    """
    e = row_exponents(v)
    unusual = e > MAX_EXPONENT
    e = torch.where(unusual, 0, e) - _SPARE
    half = e >> 1  # two factors, since 2^e may not be a normal number
    weights = scaled(scaled(p, half.mT), (e - half).mT)
    # A key that is not finite makes NaN of only the rows that attend to it.
    weights = torch.where(unusual.mT & (p != 0), math.nan, weights)
    small = torch.where(unusual, 0.0, scaled(v, -e))
    f = torch.full_like(small.mT[..., :1], _SPARE, dtype=torch.int32)  # independent of the keys
    return product_of_exponents(weights, small.mT, row_exponents(weights), f)


# PyTorch calls this operator on a CPU, without dropout. Its backward pass gets O and P.


@rule("_scaled_dot_product_flash_attention_for_cpu", narrow=True, private=True)
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """O, and P in float32, for ``q (*, m, d)`` and ``k (*, n, d)``.

    The mask is of booleans, or of numbers that are added to the scores.
    """
    scores = wide_product(q, k) * _scale(q, scale)
    if not k.shape[-2]:
        return q.new_zeros(*q.shape[:-1], v.shape[-1]), scores
    if causal:  # a query attends to its own position and to earlier ones
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None:
        is_added = attn_mask.dtype != torch.bool
        scores = scores + wide(attn_mask) if is_added else scores.masked_fill(~attn_mask, -math.inf)
    p = torch.where((scores == -math.inf).all(-1, True), 0.0, softmax(scores, -1))
    p = p.tril() if causal else p  # 0 also where the row is NaN
    return product_by_keys(p, wide(v)).to(q.dtype), p


def _scale(q: Tensor, scale: float | None) -> float:
    return 1 / math.sqrt(max(q.shape[-1], 1)) if scale is None else scale


@rule("_scaled_dot_product_flash_attention_for_cpu_backward", narrow=True, private=True)
def _attention_backward(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    p: Tensor,
    dropout: float,
    causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    dp, dtype = wide_product(g, v), q.dtype
    ds = (
        p
        * (dp - exact_sum(dp.double() * p.double(), [-1], keepdim=True).float())
        * _scale(q, scale)
    )
    g, q, k = map(wide, (g, q, k))
    dq, dk, dv = exact_matmul(ds, k.mT), exact_matmul(ds.mT, q.mT), exact_matmul(p.mT, g.mT)
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


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
    """`torch.nn.functional.scaled_dot_product_attention` by the rules above, on any device.

    It takes any shapes. A row that attends to nothing is 0. With dropout PyTorch's function
    computes, by products and a softmax.
    """
    if enable_gqa:
        times = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(times, -3) for t in (key, value))
    kind = query.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = (t.to(dtype) for t in (query, key, value))
    if dropout_p or query.dtype not in DIGITS:
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
    batch = torch.broadcast_shapes(*(t.shape[:-2] for t in (query, key, value)))
    query, key, value = (t.expand(*batch, *t.shape[-2:]) for t in (query, key, value))
    if attn_mask is not None and attn_mask.requires_grad:
        of_mask: Tensor = _OfMask.apply(query, key, value, attn_mask, is_causal, scale)[0]
        return of_mask
    out: Tensor = _attend(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return out


class _OfMask(torch.autograd.Function):
    """Attention with a gradient of its mask, dS, which PyTorch's operator does not compute.

    Second derivatives are those of PyTorch's products and softmax.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor, causal: bool, scale: float | None
    ) -> tuple[Tensor, Tensor]:
        out, p = _attend(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)[:2]
        return out, p

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:4], *output)
        ctx.mark_non_differentiable(output[1])
        ctx.causal, ctx.scale = inputs[4:]

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, out, p = ctx.saved_tensors
        if torch.is_grad_enabled():
            needed = [
                t for t, needs in zip((q, k, v, mask), ctx.needs_input_grad, strict=False) if needs
            ]
            with torch._C.DisableTorchFunction():
                attend = torch.nn.functional.scaled_dot_product_attention
                y = attend(q, k, v, mask, 0.0, ctx.causal, scale=ctx.scale)
                found = iter(torch.autograd.grad(y, needed, g, create_graph=True))
            return (
                *(next(found) if needs else None for needs in ctx.needs_input_grad[:4]),
                None,
                None,
            )
        of_products = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            g, q, k, v, out, p, 0.0, ctx.causal, attn_mask=mask, scale=ctx.scale
        )
        # Here, unlike in a rule, the mode computes, which sums no float64.
        dp = exact_matmul(wide(g), wide(v))
        ds = p * (dp - (dp * p).sum(-1, keepdim=True))
        return *of_products, ds.sum_to_size(mask.shape).to(mask.dtype), None, None
