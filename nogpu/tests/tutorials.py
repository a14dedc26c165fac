# SPDX-License-Identifier: MIT
"""The subjects of Triton's tutorials 01 to 09, as launches on CPU tensors with derived bounds.

The kernels are written from what the tutorials teach. A case makes its tensors, launches, and
returns what it found beside what is right:

    Result = (found, expected in float64, greatest absolute error)

Each bound follows from the roundings of its kernel: U is the unit roundoff of float32, and a sum
of n terms in any order is within n·U·Σ|terms| of the exact one.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice
from triton.tools.tensor_descriptor import TensorDescriptor

Result = tuple[Tensor, Tensor, Tensor | float]
U = 2.0**-24
HALF = 2.0**-11  # the unit roundoff of float16
EX2 = 2.0**-22  # the documented relative error of ex2.approx
PROGRAMS = 4  # of a persistent kernel: fewer than its tiles
ALL = (80, 90, 100)


class Tutorial(NamedTuple):
    """A case of a tutorial.

    Args:
        run: makes tensors, launches, and returns the results.
        architectures: for which Triton compiles its kernels.
        finding: the class of the fault that the tutorial itself has, at a line marked FINDING.
    """

    run: Callable[[], list[Result]]
    architectures: tuple[int, ...]
    finding: str = ""


TUTORIALS: dict[str, Tutorial] = {}


def tutorial(name: str, architectures: tuple[int, ...] = ALL, finding: str = ""):
    """Register a case."""

    def register(run):
        TUTORIALS[name] = Tutorial(run, architectures, finding)
        return run

    return register


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# 01: a vector is added to another.


@triton.jit
def add_kernel(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    a = tl.load(x + i, mask=inside)
    b = tl.load(y + i, mask=inside)
    tl.store(out + i, a + b, mask=inside)


@tutorial("01 vector add")
def vector_add() -> list[Result]:
    x, y = normal(1000), normal(1000, seed=1)
    out = torch.empty_like(x)
    add_kernel[(triton.cdiv(1000, 256),)](x, y, out, 1000, BLOCK=256)
    expected = x.double() + y.double()
    return [(out, expected, U * expected.abs())]


# 02: the softmax of rows, each of which a program holds in its registers.


@triton.jit
def softmax_kernel(
    x, out, x_stride, out_stride, rows, columns, BLOCK: tl.constexpr, STAGES: tl.constexpr
):
    j = tl.arange(0, BLOCK)
    inside = j < columns
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=STAGES):
        line = tl.load(x + row * x_stride + j, mask=inside, other=-float("inf"))
        powers = tl.exp(line - tl.max(line, axis=0))
        tl.store(out + row * out_stride + j, powers / tl.sum(powers, axis=0), mask=inside)


@tutorial("02 fused softmax")
def softmax() -> list[Result]:
    rows, columns = 13, 197
    x = normal(rows, columns + 3)[:, :columns]
    out = torch.empty(rows, columns)
    softmax_kernel[(PROGRAMS,)](
        x, out, x.stride(0), out.stride(0), rows, columns, BLOCK=256, STAGES=2, num_warps=8
    )
    exact = x.double().softmax(1)
    # d = x − max and d·log2(e) are rounded, which changes 2ᵈ by 3·|d|·U.
    d = (x - x.amax(1, keepdim=True)).abs().amax().item()
    return [(out, exact, (3 * d * U + EX2 + columns * U + 4 * U) * 2 * exact)]


# 03: a product of matrices, whose tiles are taken in groups of rows.


@triton.jit
def tile_of(tile, rows, columns, GROUP: tl.constexpr):
    """Row and column of a tile, column by column in groups of GROUP rows."""
    group = tile // (GROUP * columns)
    height = min(rows - group * GROUP, GROUP)
    within = tile % (GROUP * columns)
    return group * GROUP + within % height, within // height


@triton.jit
def leaky_relu(x):
    return tl.where(x >= 0, x, 0.01 * x)


CONFIGURATIONS = [
    triton.Config({"BM": 64, "BN": 64, "BK": 32, "GROUP": 2}, num_warps=4, num_stages=3),
    triton.Config({"BM": 64, "BN": 32, "BK": 64, "GROUP": 2}, num_warps=4, num_stages=2),
]


@triton.jit
def matmul_kernel(
    a, b, c, M, N, K, a_m, a_k, b_k, b_n, c_m, c_n,
    ACTIVATION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    tl.assume(a_m > 0)
    tl.assume(b_n > 0)
    row, column = tile_of(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    # Rows beyond the last are read from the first, and not stored.
    i, j = (row * BM + tl.arange(0, BM)) % M, (column * BN + tl.arange(0, BN)) % N
    k = tl.arange(0, BK)
    a_tile = a + i[:, None] * a_m + k[None, :] * a_k
    b_tile = b + k[:, None] * b_k + j[None, :] * b_n
    sums = tl.zeros((BM, BN), tl.float32)
    for step in range(tl.cdiv(K, BK)):
        rest = K - step * BK
        left = tl.load(a_tile, mask=k[None, :] < rest, other=0.0)
        right = tl.load(b_tile, mask=k[:, None] < rest, other=0.0)
        sums = tl.dot(left, right, sums)
        a_tile += BK * a_k
        b_tile += BK * b_k
    if ACTIVATION == "leaky_relu":
        sums = leaky_relu(sums)
    m, n = row * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN)
    place = c + m[:, None] * c_m + n[None, :] * c_n
    tl.store(place, sums.to(c.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


tuned_matmul = triton.autotune(CONFIGURATIONS, key=["M", "N", "K"])(matmul_kernel)


def product_bound(a: Tensor, b: Tensor, accumulator: float = 2 * U) -> Tensor:
    """The greatest error of a·b that is summed in float32 and rounded to float16.

    The products of 16 bits are exact. Tensor cores may truncate, where others round: 2U for a term.
    """
    exact = a.double() @ b.double()
    sums = a.shape[1] * accumulator * (a.double().abs() @ b.double().abs())
    return sums + HALF * (exact.abs() + sums) + 2.0**-25


def matmul(a: Tensor, b: Tensor, activation: str = "") -> Tensor:
    (M, K), N = a.shape, b.shape[1]
    c = torch.empty(M, N, dtype=torch.float16)

    def grid(meta):
        return (triton.cdiv(M, meta["BM"]) * triton.cdiv(N, meta["BN"]),)

    tuned_matmul[grid](
        a, b, c, M, N, K, *a.stride(), *b.stride(), *c.stride(), ACTIVATION=activation
    )
    return c


@tutorial("03 matmul, float16")
def matmul_fp16() -> list[Result]:
    a, b = normal(136, 72, dtype=torch.float16), normal(72, 104, dtype=torch.float16, seed=1)
    exact, bound, short = a.double() @ b.double(), product_bound(a, b), a[:, :64]
    positive = torch.nn.functional.leaky_relu(exact, 0.01)
    return [
        (matmul(a, b), exact, bound),
        # One more rounding: of the product by 0.01, itself a rounded number.
        (matmul(a, b, "leaky_relu"), positive, bound + 2 * U * positive.abs()),
        (matmul(short, b[:64]), short.double() @ b[:64].double(), product_bound(short, b[:64])),
    ]


def matmul_fp8(dtype: torch.dtype) -> list[Result]:
    a, b = normal(72, 96).to(dtype), normal(40, 96, seed=1).to(dtype).T
    wide = a.half(), b.half()
    # Hopper's tensor cores keep 13 bits of sums of products of 8 bits.
    return [(matmul(a, b), wide[0].double() @ wide[1].double(), product_bound(*wide, 2.0**-13))]


@tutorial("03 matmul, float8 e5m2")
def matmul_e5m2() -> list[Result]:
    return matmul_fp8(torch.float8_e5m2)


@tutorial("03 matmul, float8 e4m3", (90, 100))
def matmul_e4m3() -> list[Result]:
    return matmul_fp8(torch.float8_e4m3fn)


# 04: dropout by a given mask, and by one that a seed determines.


@triton.jit
def dropout_kernel(x, kept, out, n, p, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    value = tl.load(x + i, mask=inside)
    keep = tl.load(kept + i, mask=inside)
    tl.store(out + i, tl.where(keep != 0, value / (1 - p), 0.0), mask=inside)


@triton.jit
def seeded_dropout_kernel(x, out, n, p, seed, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    value = tl.load(x + i, mask=inside)
    keep = tl.rand(seed, i) > p
    tl.store(out + i, tl.where(keep, value / (1 - p), 0.0), mask=inside)


def philox_uniform(seed: int, counters: int) -> Tensor:
    """``tl.rand(seed, i)`` for i < ``counters``: the first word of Philox4x32-10 (Salmon et al.
    2011), folded to 31 bits and scaled to [0, 1)."""
    c = [np.arange(counters, dtype=np.uint64), *(np.zeros(counters, np.uint64) for _ in range(3))]
    k0, k1, low = seed % 2**32, seed >> 32, np.uint64(2**32 - 1)
    for _ in range(10):
        first, second = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        shift = np.uint64(32)
        c = [
            second >> shift ^ c[1] ^ np.uint64(k0), second & low,
            first >> shift ^ c[3] ^ np.uint64(k1), first & low,
        ]  # fmt: skip
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    signed = c[0].astype(np.uint32).view(np.int32)
    folded = np.where(signed < 0, -signed - 1, signed)
    return torch.from_numpy(folded.astype(np.float32) * np.float32(4.6566127342e-10))


@tutorial("04 dropout")
def dropout() -> list[Result]:
    n, p = 700, 0.25  # 1 − p is exact
    x = normal(n)
    kept = (torch.rand(n, generator=torch.Generator().manual_seed(1)) > p).to(torch.int32)
    out = torch.empty_like(x)
    dropout_kernel[(triton.cdiv(n, 256),)](x, kept, out, n, p, BLOCK=256)
    results = [(out, x.double() / (1 - p) * kept, 2 * 2 * U * (x.double() / (1 - p)).abs())]
    for seed in (123, 2**33 + 5):
        out = torch.empty_like(x)
        seeded_dropout_kernel[(triton.cdiv(n, 256),)](x, out, n, p, seed, BLOCK=256)
        expected = x.double() / (1 - p) * (philox_uniform(seed, n) > p)
        results.append((out, expected, 2 * 2 * U * expected.abs()))  # division by 2 ulps
    return results


# 05: layer normalisation and its derivatives, in which programs share partial sums by locks.


@triton.jit
def layer_norm_kernel(
    x, y, weight, bias, means, factors, stride, columns, epsilon, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    x += row * stride
    y += row * stride
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        j = start + tl.arange(0, BLOCK)
        total += tl.load(x + j, mask=j < columns, other=0.0).to(tl.float32)
    mean = tl.sum(total, axis=0) / columns
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        j = start + tl.arange(0, BLOCK)
        value = tl.load(x + j, mask=j < columns, other=0.0).to(tl.float32)
        centred = tl.where(j < columns, value - mean, 0.0)
        squares += centred * centred
    factor = 1 / tl.sqrt(tl.sum(squares, axis=0) / columns + epsilon)
    tl.store(means + row, mean)
    tl.store(factors + row, factor)
    for start in range(0, columns, BLOCK):
        j = start + tl.arange(0, BLOCK)
        inside = j < columns
        w = tl.load(weight + j, mask=inside)
        b = tl.load(bias + j, mask=inside)
        value = tl.load(x + j, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + j, (value - mean) * factor * w + b, mask=inside)


@triton.jit
def layer_norm_backward_kernel(
    dx, dy, partial_dw, partial_db, x, weight, means, factors, locks, stride, columns,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    j = tl.arange(0, BLOCK)
    inside = j < columns
    value = tl.load(x + row * stride + j, mask=inside, other=0).to(tl.float32)
    gradient = tl.load(dy + row * stride + j, mask=inside, other=0).to(tl.float32)
    w = tl.load(weight + j, mask=inside).to(tl.float32)
    mean = tl.load(means + row)
    factor = tl.load(factors + row)

    normalised = tl.where(inside, (value - mean) * factor, 0.0)
    weighted = tl.where(inside, w * gradient, 0.0)
    along = tl.sum(normalised * weighted, axis=0) / columns
    average = tl.sum(weighted, axis=0) / columns
    result = (weighted - (normalised * along + average)) * factor
    tl.store(dx + row * stride + j, result, mask=inside)

    group = row % GROUPS
    lock = locks + group
    count = locks + GROUPS + group
    dw_place = partial_dw + group * columns + j
    db_place = partial_db + group * columns + j
    dw = (gradient * normalised).to(w.dtype)
    db = gradient.to(w.dtype)
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    first = tl.load(count)  # FINDING
    if first == 0:
        tl.atomic_xchg(count, 1)  # FINDING
    else:
        dw += tl.load(dw_place, mask=inside)
        db += tl.load(db_place, mask=inside)
    tl.store(dw_place, dw, mask=inside)
    tl.store(db_place, db, mask=inside)
    tl.debug_barrier()
    tl.atomic_xchg(lock, 0)


@triton.jit
def sum_groups_kernel(
    partial_dw, partial_db, dw, db, groups, columns, BM: tl.constexpr, BN: tl.constexpr
):
    j = tl.program_id(0) * BN + tl.arange(0, BN)
    dw_sum = tl.zeros((BM, BN), tl.float32)
    db_sum = tl.zeros((BM, BN), tl.float32)
    for start in range(0, groups, BM):
        i = start + tl.arange(0, BM)
        inside = (i[:, None] < groups) & (j[None, :] < columns)
        place = i[:, None] * columns + j[None, :]
        dw_sum += tl.load(partial_dw + place, mask=inside, other=0.0)
        db_sum += tl.load(partial_db + place, mask=inside, other=0.0)
    tl.store(dw + j, tl.sum(dw_sum, axis=0), mask=j < columns)
    tl.store(db + j, tl.sum(db_sum, axis=0), mask=j < columns)


EPSILON = 1e-5


def layer_norm_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, columns = 10, 151
    return (
        normal(rows, columns) * 2 - 1, normal(columns, seed=1), normal(columns, seed=2),
        normal(rows, columns, seed=3),
    )  # fmt: skip


def layer_norm_forward(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = x.shape
    y, means, factors = torch.empty_like(x), torch.empty(rows), torch.empty(rows)
    layer_norm_kernel[(rows,)](
        x, y, weight, bias, means, factors, x.stride(0), columns, EPSILON, BLOCK=64, num_warps=2
    )
    return y, means, factors


def normalised_bound(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(x − mean)·factor in float64, factor, and the error of the first in float32 (to first order).

    With n columns the mean is wrong by (n + 1)·U·mean|x|, and the factor by (n/2 + 4)·U of itself.
    What the wrong mean changes in the squares is of second order.
    """
    n, exact = x.shape[1], x.double()
    centred = exact - exact.mean(1, keepdim=True)
    factor = (centred.square().mean(1, keepdim=True) + EPSILON).rsqrt()
    mean_error = (n + 1) * U * exact.abs().mean(1, keepdim=True)
    normalised = centred * factor
    return normalised, factor, mean_error * factor + (n + 8) * U * normalised.abs()


@tutorial("05 layer norm, forward")
def layer_norm() -> list[Result]:
    x, weight, bias, _ = layer_norm_inputs()
    y, means, factors = layer_norm_forward(x, weight, bias)
    n = x.shape[1]
    normalised, factor, error = normalised_bound(x)
    w, expected = weight.double(), normalised * weight.double() + bias.double()
    return [
        (y, expected, error * w.abs() + 2 * U * ((normalised * w).abs() + expected.abs())),
        (means, x.double().mean(1), (n + 1) * U * x.double().abs().mean(1)),
        (factors, factor[:, 0], (n + 4) * U * factor[:, 0]),
    ]


@tutorial("05 layer norm, backward", finding="race")
def layer_norm_backward() -> list[Result]:
    """No barrier stands between a warp's load of the count and another warp's atomic_xchg."""
    x, weight, bias, dy = layer_norm_inputs()
    (rows, columns), groups = x.shape, 4
    _, means, factors = layer_norm_forward(x, weight, bias)
    dx, dw, db = torch.empty_like(x), torch.empty(columns), torch.empty(columns)
    partial_dw, partial_db = torch.zeros(groups, columns), torch.zeros(groups, columns)
    locks = torch.zeros(2 * groups, dtype=torch.int32)
    layer_norm_backward_kernel[(rows,)](
        dx, dy, partial_dw, partial_db, x, weight, means, factors, locks, x.stride(0), columns,
        GROUPS=groups, BLOCK=256, num_warps=2,
    )  # fmt: skip
    sum_groups_kernel[(triton.cdiv(columns, 64),)](
        partial_dw, partial_db, dw, db, groups, columns, BM=16, BN=64
    )
    normalised, factor, error = normalised_bound(x)
    g, weighted = dy.double(), dy.double() * weight.double()
    along = (normalised * weighted).mean(1, keepdim=True)
    average = weighted.mean(1, keepdim=True)
    expected = (weighted - normalised * along - average) * factor
    terms = (normalised * weighted).abs().mean(1, keepdim=True)
    along_error = (error * weighted.abs()).mean(1, keepdim=True) + (columns + 2) * U * terms
    average_error = (columns + 2) * U * weighted.abs().mean(1, keepdim=True)
    inner = (normalised.abs() * along_error + error * along.abs() + average_error) * factor
    rounded = (weighted.abs() + (normalised * along).abs() + average.abs()) * factor
    return [
        (dx, expected, inner + 4 * U * rounded + (columns + 4) * U * expected.abs()),
        (
            dw,
            (g * normalised).sum(0),
            (g.abs() * (error + (rows + 1) * U * normalised.abs())).sum(0),
        ),
        (db, g.sum(0), (rows + 1) * U * g.abs().sum(0)),
    ]


# 06: attention whose scores are never stored, and its derivatives.


@triton.jit
def attention_kernel(
    q, k, v, out, logs, scale, stride, LENGTH: tl.constexpr, D: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One block of rows of one head. ``logs`` is log2 of the sum of 2 to the scores."""
    head, block = tl.program_id(1), tl.program_id(0)
    d, m, n = tl.arange(0, D), block * BM + tl.arange(0, BM), tl.arange(0, BN)
    start = head.to(tl.int64) * stride
    queries = tl.load(q + start + m[:, None] * D + d[None, :])
    best = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    sums = tl.zeros([BM, D], tl.float32)
    end = (block + 1) * BM if CAUSAL else LENGTH
    for first in tl.range(0, end, BN, num_stages=STAGES):
        keys = tl.load(k + start + (first + n)[None, :] * D + d[:, None])
        scores = tl.dot(queries, keys) * (scale * 1.44269504)
        if CAUSAL:
            scores = tl.where(m[:, None] >= (first + n)[None, :], scores, -float("inf"))
        new = tl.maximum(best, tl.max(scores, 1))
        powers = tl.math.exp2(scores - new[:, None])
        shrink = tl.math.exp2(best - new)
        total = total * shrink + tl.sum(powers, 1)
        values = tl.load(v + start + (first + n)[:, None] * D + d[None, :])
        sums = tl.dot(powers.to(values.dtype), values, sums * shrink[:, None])
        best = new
    tl.store(logs + head * LENGTH + m, best + tl.math.log2(total))
    result = (sums / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + start + m[:, None] * D + d[None, :], result)


@triton.jit
def attention_descriptor_kernel(
    q, k, v, out, scale, LENGTH: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """The same by tensor descriptors, whose rows are those of all heads."""
    head, block = tl.program_id(1), tl.program_id(0)
    row = head * LENGTH + block * BM
    queries = q.load([row, 0])
    best = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    sums = tl.zeros([BM, D], tl.float32)
    for first in tl.range(0, LENGTH, BN, warp_specialize=SPECIALIZE):
        keys = k.load([head * LENGTH + first, 0])
        scores = tl.dot(queries, keys.T) * (scale * 1.44269504)
        new = tl.maximum(best, tl.max(scores, 1))
        powers = tl.math.exp2(scores - new[:, None])
        shrink = tl.math.exp2(best - new)
        total = total * shrink + tl.sum(powers, 1)
        values = v.load([head * LENGTH + first, 0])
        sums = tl.dot(powers.to(values.dtype), values, sums * shrink[:, None])
        best = new
    out.store([row, 0], (sums / total[:, None]).to(tl.float16))


@triton.jit
def attention_delta_kernel(out, gradient, delta, BM: tl.constexpr, D: tl.constexpr):
    m, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, D)
    o = tl.load(out + m[:, None] * D + d[None, :]).to(tl.float32)
    g = tl.load(gradient + m[:, None] * D + d[None, :]).to(tl.float32)
    tl.store(delta + m, tl.sum(o * g, axis=1))


@triton.jit
def attention_keys_kernel(
    q, k, v, gradient, dk, dv, logs, delta, scale, stride, LENGTH: tl.constexpr, D: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """The derivatives of a block of keys and values: a loop over blocks of queries."""
    head, block = tl.program_id(1), tl.program_id(0)
    start = head.to(tl.int64) * stride
    d, n = tl.arange(0, D), block * BN + tl.arange(0, BN)
    own = start + n[:, None] * D + d[None, :]
    keys = tl.load(k + own)
    values = tl.load(v + own)
    dk_sum = tl.zeros([BN, D], tl.float32)
    dv_sum = tl.zeros([BN, D], tl.float32)
    for first in range((block * BN) // BM * BM if CAUSAL else 0, LENGTH, BM):
        m = first + tl.arange(0, BM)
        queries = tl.load(q + start + m[:, None] * D + d[None, :])
        g = tl.load(gradient + start + m[:, None] * D + d[None, :])
        log = tl.load(logs + head * LENGTH + m)
        powers = tl.math.exp2(tl.dot(keys, queries.T) * (scale * 1.44269504) - log[None, :])
        if CAUSAL:
            powers = tl.where(m[None, :] >= n[:, None], powers, 0.0)
        dv_sum = tl.dot(powers.to(g.dtype), g, dv_sum)
        change = tl.dot(values, g.T) - tl.load(delta + head * LENGTH + m)[None, :]
        dk_sum = tl.dot((powers * change).to(queries.dtype), queries, dk_sum)
    tl.store(dv + own, dv_sum.to(dv.dtype.element_ty))
    tl.store(dk + own, (dk_sum * scale).to(dk.dtype.element_ty))


@triton.jit
def attention_queries_kernel(
    q, k, v, gradient, dq, logs, delta, scale, stride, LENGTH: tl.constexpr, D: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """The derivative of a block of queries: a loop over blocks of keys."""
    head, block = tl.program_id(1), tl.program_id(0)
    start = head.to(tl.int64) * stride
    d, m = tl.arange(0, D), block * BM + tl.arange(0, BM)
    own = start + m[:, None] * D + d[None, :]
    queries = tl.load(q + own)
    g = tl.load(gradient + own)
    log = tl.load(logs + head * LENGTH + m)
    shift = tl.load(delta + head * LENGTH + m)
    dq_sum = tl.zeros([BM, D], tl.float32)
    for first in range(0, (block + 1) * BM if CAUSAL else LENGTH, BN):
        n = first + tl.arange(0, BN)
        keys = tl.load(k + start + n[:, None] * D + d[None, :])
        values = tl.load(v + start + n[:, None] * D + d[None, :])
        powers = tl.math.exp2(tl.dot(queries, keys.T) * (scale * 1.44269504) - log[:, None])
        if CAUSAL:
            powers = tl.where(m[:, None] >= n[None, :], powers, 0.0)
        change = powers * (tl.dot(g, values.T) - shift[:, None])
        dq_sum = tl.dot(change.to(keys.dtype), keys, dq_sum)
    tl.store(dq + own, (dq_sum * scale).to(dq.dtype.element_ty))


HEADS, LENGTH, D = 2, 128, 32


def attention_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    parts = [normal(HEADS, LENGTH, D, dtype=torch.float16, seed=n) / 2 for n in range(4)]
    return *parts, D**-0.5


def probabilities(q: Tensor, k: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """The softmax of the scores in float64, and the relative error of each power in float32.

    A score s·scale·log2(e), |s| ≤ Σ|q·k|, is wrong by (2D + 4)·U of Σ|q·k|·scale·log2(e), and so is
    the greatest one that is subtracted.
    """
    scores = q.double() @ k.double().mT * scale
    if causal:
        scores = scores.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -torch.inf)
    sizes = (q.double().abs() @ k.double().abs().mT * scale).amax(2, keepdim=True)
    return scores.softmax(2), 2 * (2 * D + 4) * U * sizes + 4 * EX2


def attention_bound(p: Tensor, v: Tensor, relative: Tensor) -> Tensor:
    """Powers are rounded to float16, which loses 2⁻²⁵ at most of small ones; then sums and out.

    The greatest power of a row is 1 when it is last updated, and the sum of its powers at least 1.
    """
    values = v.double().abs()
    one = (HALF + 2 * relative + 2 * (2 * LENGTH + 16) * U) * (p @ values)
    tiny = 2.0**-25 * values.sum(1, keepdim=True)
    return one + tiny + HALF * (p @ values + one) + 2.0**-25


def attention_forward(causal: bool) -> list[Result]:
    q, k, v, _, scale = attention_inputs()
    out, logs = torch.empty_like(q), torch.empty(HEADS, LENGTH)
    attention_kernel[(LENGTH // 64, HEADS)](
        q, k, v, out, logs, scale, q.stride(0), LENGTH, D, BM=64, BN=32, CAUSAL=causal, STAGES=2
    )
    p, relative = probabilities(q, k, scale, causal)
    return [(out, p @ v.double(), attention_bound(p, v, relative))]


@tutorial("06 attention")
def attention() -> list[Result]:
    return attention_forward(causal=False)


@tutorial("06 attention, causal")
def attention_causal() -> list[Result]:
    return attention_forward(causal=True)


def attention_by_descriptors(specialize: bool) -> list[Result]:
    q, k, v, _, scale = attention_inputs()
    out, (BM, BN) = torch.empty_like(q), (64, 32)
    # Hopper's specialized warps take 8 for a product.
    rows = [TensorDescriptor.from_tensor(one.view(-1, D), [BM, D]) for one in (q, out)]
    others = [TensorDescriptor.from_tensor(one.view(-1, D), [BN, D]) for one in (k, v)]
    attention_descriptor_kernel[(LENGTH // BM, HEADS)](
        rows[0], *others, rows[1], scale, LENGTH, D, BM, BN, specialize,
        num_warps=8 if specialize else 4,
    )  # fmt: skip
    p, relative = probabilities(q, k, scale, False)
    return [(out, p @ v.double(), attention_bound(p, v, relative))]


@tutorial("06 attention by tensor descriptors")
def attention_descriptors() -> list[Result]:
    return attention_by_descriptors(specialize=False)


@tutorial("06 attention by specialized warps")
def attention_specialized() -> list[Result]:
    return attention_by_descriptors(specialize=True)


@tutorial("06 attention, backward")
def attention_backward() -> list[Result]:
    q, k, v, gradient, scale = attention_inputs()
    out, logs, delta = torch.empty_like(q), torch.empty(HEADS, LENGTH), torch.empty(HEADS, LENGTH)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    shape = (scale, q.stride(0), LENGTH, D)
    attention_kernel[(LENGTH // 64, HEADS)](
        q, k, v, out, logs, *shape, BM=64, BN=32, CAUSAL=True, STAGES=2
    )
    attention_delta_kernel[(HEADS * LENGTH // 64,)](out, gradient, delta, BM=64, D=D)
    attention_keys_kernel[(LENGTH // 64, HEADS)](
        q, k, v, gradient, dk, dv, logs, delta, *shape, BM=32, BN=64, CAUSAL=True
    )
    attention_queries_kernel[(LENGTH // 64, HEADS)](
        q, k, v, gradient, dq, logs, delta, *shape, BM=64, BN=32, CAUSAL=True
    )
    p, relative = probabilities(q, k, scale, True)
    Q, K, V, G = (one.double() for one in (q, k, v, gradient))
    # ds = p·(dp − δ), where δ = Σ out·gradient, of the out that was rounded to float16.
    dp = G @ V.mT
    o = p @ V
    ds = p * (dp - (o * G).sum(2, keepdim=True))
    sizes = G.abs() @ V.abs().mT
    delta_error = (attention_bound(p, v, relative) * G.abs()).sum(2, keepdim=True)
    delta_error = delta_error + 2 * D * U * (o * G).abs().sum(2, keepdim=True)
    p_error = (HALF + 2 * relative + 4 * LENGTH * U) * p + 2.0**-25
    ds_error = ds.abs() * (HALF + 2 * relative + 4 * LENGTH * U)
    ds_error = ds_error + p * (2 * D * U * sizes + delta_error) + 2.0**-25

    def bound(error: Tensor, weight: Tensor, other: Tensor, factor: float) -> Tensor:
        sums = (error + 2 * LENGTH * U * weight.abs()) @ other.abs() * factor
        return sums + HALF * ((weight @ other).abs() * factor + sums) + 2.0**-25

    return [
        (dv, p.mT @ G, bound(p_error.mT, p.mT, G, 1)),
        (dk, ds.mT @ Q * scale, bound(ds_error.mT, ds.mT, Q, scale)),
        (dq, ds @ K * scale, bound(ds_error, ds, K, scale)),
    ]


# 07: functions of libdevice.


@triton.jit
def asin_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n, other=0.0)
    tl.store(out + i, libdevice.asin(value), mask=i < n)


@tutorial("07 libdevice")
def asin() -> list[Result]:
    results: list[Result] = []
    for dtype, unit in ((torch.float32, U), (torch.float64, 2.0**-53)):
        x = torch.linspace(-1, 1, 333, dtype=dtype)
        out = torch.empty_like(x)
        asin_kernel[(triton.cdiv(333, 128),)](x, out, 333, BLOCK=128)
        # CUDA's documented error is 2 ulps, of which one is 2U of a value. The reference adds one.
        results.append((out, x.double().asin(), 3 * 2 * unit * x.double().asin().abs()))
    return results


# 08: products of several sizes in one launch, by pointers that lie in memory.


@triton.jit
def grouped_matmul_kernel(
    a_pointers, b_pointers, c_pointers, sizes, strides, groups, PROGRAMS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    before = 0
    for group in range(groups):
        M = tl.load(sizes + 3 * group)
        N = tl.load(sizes + 3 * group + 1)
        K = tl.load(sizes + 3 * group + 2)
        columns = tl.cdiv(N, BN)
        tiles = tl.cdiv(M, BM) * columns
        a = tl.load(a_pointers + group).to(tl.pointer_type(tl.float16))
        b = tl.load(b_pointers + group).to(tl.pointer_type(tl.float16))
        c = tl.load(c_pointers + group).to(tl.pointer_type(tl.float16))
        lda = tl.load(strides + 3 * group)
        ldb = tl.load(strides + 3 * group + 1)
        ldc = tl.load(strides + 3 * group + 2)
        while tile >= before and tile < before + tiles:
            own = tile - before
            i = own // columns * BM + tl.arange(0, BM)
            j = own % columns * BN + tl.arange(0, BN)
            sums = tl.zeros((BM, BN), tl.float32)
            for start in range(0, K, BK):
                k = start + tl.arange(0, BK)
                left = (i[:, None] < M) & (k[None, :] < K)
                right = (k[:, None] < K) & (j[None, :] < N)
                x = tl.load(a + i[:, None] * lda + k[None, :], mask=left, other=0.0)
                y = tl.load(b + k[:, None] * ldb + j[None, :], mask=right, other=0.0)
                sums = tl.dot(x, y, sums)
            inside = (i[:, None] < M) & (j[None, :] < N)
            tl.store(c + i[:, None] * ldc + j[None, :], sums.to(tl.float16), mask=inside)
            tile += PROGRAMS
        before += tiles


@triton.jit
def grouped_descriptor_kernel(
    a_pointers, b_pointers, c_pointers, sizes, groups, PROGRAMS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The same by tensor descriptors, which the program makes; b is (N, K)."""
    tile = tl.program_id(0)
    before = 0
    for group in range(groups):
        M = tl.load(sizes + 3 * group)
        N = tl.load(sizes + 3 * group + 1)
        K = tl.load(sizes + 3 * group + 2)
        columns = tl.cdiv(N, BN)
        tiles = tl.cdiv(M, BM) * columns
        if tile >= before and tile < before + tiles:
            a_base = tl.load(a_pointers + group).to(tl.pointer_type(tl.float16))
            b_base = tl.load(b_pointers + group).to(tl.pointer_type(tl.float16))
            c_base = tl.load(c_pointers + group).to(tl.pointer_type(tl.float16))
            a = tl.make_tensor_descriptor(
                a_base, shape=[M, K], strides=[K, 1], block_shape=[BM, BK]
            )
            b = tl.make_tensor_descriptor(
                b_base, shape=[N, K], strides=[K, 1], block_shape=[BN, BK]
            )
            c = tl.make_tensor_descriptor(
                c_base, shape=[M, N], strides=[N, 1], block_shape=[BM, BN]
            )
            while tile >= before and tile < before + tiles:
                own = tile - before
                row, column = own // columns * BM, own % columns * BN
                sums = tl.zeros((BM, BN), tl.float32)
                for start in range(0, K, BK):
                    sums = tl.dot(a.load([row, start]), b.load([column, start]).T, sums)
                c.store([row, column], sums.to(tl.float16))
                tile += PROGRAMS
        before += tiles


def pointers(tensors: list[Tensor]) -> Tensor:
    return torch.tensor([one.data_ptr() for one in tensors], dtype=torch.int64)


GROUPS = ((72, 40, 48), (24, 104, 64), (64, 64, 32))


def group_results(a: list[Tensor], b: list[Tensor], c: list[Tensor]) -> list[Result]:
    return [
        (out, x.double() @ y.double(), product_bound(x, y))
        for x, y, out in zip(a, b, c, strict=True)
    ]


@tutorial("08 grouped matmul")
def grouped_matmul() -> list[Result]:
    a = [normal(M, K, dtype=torch.float16, seed=M) for M, N, K in GROUPS]
    b = [normal(K, N, dtype=torch.float16, seed=N) for M, N, K in GROUPS]
    c = [torch.empty(M, N, dtype=torch.float16) for M, N, K in GROUPS]
    strides = torch.tensor([(K, N, N) for M, N, K in GROUPS], dtype=torch.int32)
    grouped_matmul_kernel[(PROGRAMS,)](
        pointers(a), pointers(b), pointers(c), torch.tensor(GROUPS, dtype=torch.int32), strides,
        len(GROUPS), PROGRAMS=PROGRAMS, BM=32, BN=32, BK=32,
    )  # fmt: skip
    return group_results(a, b, c)


@tutorial("08 grouped matmul by tensor descriptors")
def grouped_matmul_descriptors() -> list[Result]:
    a = [normal(M, K, dtype=torch.float16, seed=M) for M, N, K in GROUPS]
    b = [normal(N, K, dtype=torch.float16, seed=N) for M, N, K in GROUPS]
    c = [torch.empty(M, N, dtype=torch.float16) for M, N, K in GROUPS]
    triton.set_allocator(scratch_memory)
    grouped_descriptor_kernel[(PROGRAMS,)](
        pointers(a), pointers(b), pointers(c), torch.tensor(GROUPS, dtype=torch.int32), len(GROUPS),
        PROGRAMS=PROGRAMS, BM=64, BN=32, BK=32,
    )  # fmt: skip
    return group_results(a, [one.T for one in b], c)


def scratch_memory(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for tensor descriptors that programs make, as Triton asks its users for."""
    return torch.empty(size, dtype=torch.int8)


# 09: a product whose programs stay for several tiles, by pointers and by tensor descriptors.


@triton.jit
def persistent_matmul_kernel(
    a, b, c, M, N, K, PROGRAMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """By pointers: contiguous a (M, K), b (K, N) and c (M, N)."""
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    k = tl.arange(0, BK)
    for tile in tl.range(tl.program_id(0), rows * columns, PROGRAMS, flatten=True):
        row, column = tile_of(tile, rows, columns, GROUP)
        i, j = row * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN)
        i = tl.max_contiguous(tl.multiple_of(tl.where(i < M, i, 0), BM), BM)
        j = tl.max_contiguous(tl.multiple_of(tl.where(j < N, j, 0), BN), BN)
        sums = tl.zeros((BM, BN), tl.float32)
        for start in range(0, K, BK):
            inside = start + k < K
            x = tl.load(a + i[:, None] * K + (start + k)[None, :], mask=inside[None, :], other=0.0)
            y = tl.load(b + (start + k)[:, None] * N + j[None, :], mask=inside[:, None], other=0.0)
            sums = tl.dot(x, y, sums)
        m, n = row * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN)
        inside = (m[:, None] < M) & (n[None, :] < N)
        tl.store(c + m[:, None] * N + n[None, :], sums.to(tl.float16), mask=inside)


@triton.jit
def descriptor_matmul_kernel(
    a, b, c, M, N, K, PROGRAMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, SPECIALIZE: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """By descriptors of a (M, K), b (N, K) and c (M, N), of which the last may have half a box."""
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    for tile in tl.range(
        tl.program_id(0), rows * columns, PROGRAMS, flatten=False, warp_specialize=SPECIALIZE
    ):
        row, column = tile_of(tile, rows, columns, GROUP)
        sums = tl.zeros((BM, BN), tl.float32)
        for start in range(0, K, BK):
            sums = tl.dot(a.load([row * BM, start]), b.load([column * BN, start]).T, sums)
        if HALVES:
            parts = tl.permute(tl.reshape(sums, (BM, 2, BN // 2)), (0, 2, 1))
            left, right = tl.split(parts)
            c.store([row * BM, column * BN], left.to(tl.float16))
            c.store([row * BM, column * BN + BN // 2], right.to(tl.float16))
        else:
            c.store([row * BM, column * BN], sums.to(tl.float16))


@triton.jit
def own_descriptor_matmul_kernel(
    a, b, c, M, N, K, PROGRAMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, SPECIALIZE: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """By descriptors that the program makes."""
    width: tl.constexpr = BN // 2 if HALVES else BN
    a_box = tl.make_tensor_descriptor(a, shape=[M, K], strides=[K, 1], block_shape=[BM, BK])
    b_box = tl.make_tensor_descriptor(b, shape=[N, K], strides=[K, 1], block_shape=[BN, BK])
    c_box = tl.make_tensor_descriptor(c, shape=[M, N], strides=[N, 1], block_shape=[BM, width])
    descriptor_matmul_kernel(
        a_box, b_box, c_box, M, N, K, PROGRAMS, BM, BN, BK, GROUP, SPECIALIZE, HALVES
    )


SIZES = (136, 104, 72)
TILES = dict(PROGRAMS=2, BM=64, BN=64, BK=32, GROUP=2)


def matrices() -> tuple[Tensor, Tensor, Tensor]:
    M, N, K = SIZES
    a, b = normal(M, K, dtype=torch.float16), normal(N, K, dtype=torch.float16, seed=1)
    return a, b, torch.empty(M, N, dtype=torch.float16)


@tutorial("09 persistent matmul by pointers")
def persistent_pointers() -> list[Result]:
    a, b, c = matrices()
    right = b.T.contiguous()
    persistent_matmul_kernel[(2,)](a, right, c, *SIZES, **TILES, num_stages=2)
    return [(c, a.double() @ b.T.double(), product_bound(a, b.T))]


def persistent_descriptors(specialize: bool = False, halves: bool = False) -> list[Result]:
    a, b, c = matrices()
    boxes = [(64, 32), (64, 32), (64, 32 if halves else 64)]
    descriptors = [
        TensorDescriptor.from_tensor(one, list(box))
        for one, box in zip((a, b, c), boxes, strict=True)
    ]
    descriptor_matmul_kernel[(2,)](
        *descriptors, *SIZES, **TILES, SPECIALIZE=specialize, HALVES=halves, num_stages=2,
        num_warps=8 if specialize else 4,
    )  # fmt: skip
    return [(c, a.double() @ b.T.double(), product_bound(a, b.T))]


@tutorial("09 persistent matmul by the host's descriptors")
def persistent_host() -> list[Result]:
    return persistent_descriptors() + persistent_descriptors(halves=True)


@tutorial("09 persistent matmul by specialized warps")
def persistent_specialized() -> list[Result]:
    return persistent_descriptors(specialize=True)


@tutorial("09 persistent matmul by the program's descriptors")
def persistent_device() -> list[Result]:
    results: list[Result] = []
    for halves in (False, True):
        a, b, c = matrices()
        triton.set_allocator(scratch_memory)
        own_descriptor_matmul_kernel[(2,)](
            a, b, c, *SIZES, **TILES, SPECIALIZE=False, HALVES=halves, num_stages=2
        )
        results.append((c, a.double() @ b.T.double(), product_bound(a, b.T)))
    return results


@tutorial("03 matmul by clusters of two CTAs", (90, 100))
def clusters() -> list[Result]:
    a, b = normal(128, 64, dtype=torch.float16), normal(64, 128, dtype=torch.float16, seed=1)
    c = torch.empty(128, 128, dtype=torch.float16)
    matmul_kernel[(1,)](
        a, b, c, 128, 128, 64, *a.stride(), *b.stride(), *c.stride(), ACTIVATION="",
        BM=128, BN=128, BK=64, GROUP=1, num_ctas=2,
    )  # fmt: skip
    return [(c, a.double() @ b.double(), product_bound(a, b))]
