# SPDX-License-Identifier: MIT
"""Newton–Schulz orthogonalization on symmetric matrix products.

For M = U·Σ·Vᵀ the iterations return a matrix near U·Vᵀ. They need matrix products only, no SVD.
`torchpar.reference.orthogonalize` is the plain version in ten lines; read it first.

**Standard iteration.** X is n×m with n ≤ m, and starts as M/‖M‖. Each iteration computes

    R = X·Xᵀ        Z = b·R + c·R²        X ← a·X + Z·X

With (a, b, c) = (3.4445, −4.7750, 2.0315) the singular values end between 0.7 and 1.2. The large a
raises small singular values quickly. The coefficients may differ between the iterations.

**Gram iteration.** An iteration multiplies X by a·I + Z, a polynomial in R. The product Q of k such
polynomials needs R alone, so X is multiplied once for k iterations:

    R = X·Xᵀ    k times: Z = b·R + c·R²,  Q ← Q·(a·I + Z),  R ← (a·I + Z)·R·(a·I + Z)    X ← Q·X

**Cost.** All products but Z·X and Q·X are symmetric, and half of each is computed. A standard
iteration takes 3n²m + n³ floating-point operations instead of 4n²m + 2n³. k Gram iterations take
3n²m + (4k − 3)·n³.

**Accuracy.** A rounding error of R grows by a² ≈ 12 in each later iteration on the same R. A
singular value near 0 is lost in that error. A new X·Xᵀ removes it. Five iterations therefore run as
2 + 3, as published. More iterations run as 2 + 1 + … + 1 + 2. Nearly square matrices take 2 + 1 + …
+ 1.

The singular values lie at most 1.5 times as far from 1 as after the standard iteration. The table
compares the distance to the result in float64 with the standard iteration's (measured with 200 to
512 rows):

    singular values within one decade       1.1 to 1.8 times as far
    within two or three decades             2 to 6
    every row repeated two or four times    3 to 11
    all rows equal                          up to 31
"""

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import chain, islice, repeat
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from torchpar.ops.matrix import is_exact, runs_kernels
from torchpar.ops.processor import has_bfloat16
from torchpar.optim.buffered_products import Products
from torchpar.optim.elementwise import normalized, on_device_of
from torchpar.optim.exact_products import ExactProducts

NewtonSchulz = Literal["auto", "standard", "gram"]
Triple = tuple[float, float, float]
Coefficients = Triple | Sequence[Triple] | Literal["polar_express"]
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan, 2024, https://kellerjordan.github.io/posts/muon
# Amsel, Persson, Musco and Gower, "The Polar Express", 2025, https://arxiv.org/abs/2505.16932,
# algorithm 1. Scaled for singular values up to 1.01, as rounding can raise them above 1; the last
# triple needs no margin.
_POLAR_EXPRESS = (
    *(
        (a / 1.01, b / 1.01**3, c / 1.01**5)
        for a, b, c in (
            (8.28721201814563, -23.595886519098837, 17.300387312530933),
            (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
            (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
            (3.3184196573706015, -2.488488024314874, 0.51004894012372),
            (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
            (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
            (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
        )
    ),
    (1.875, -1.25, 0.375),
)

_GRAM_ROWS, _GRAM_ASPECT = 256, 2  # below, the standard iteration is as fast
# In X·Xᵀ of a batch. On an H200 Gram iterations take the GPU less time in any such batch, and the
# host more, for they are more calls. In steps from Python they were faster from here on.
_GRAM_MULTIPLICATIONS = 15 * 10**9


@torch.no_grad()
def orthogonalize(
    x: Tensor,
    coefficients: Coefficients = COEFFICIENTS,
    steps: int = 5,
    eps: float = 1e-7,
    ns: NewtonSchulz = "auto",
) -> Tensor:
    """The matrix of ``x``'s singular vectors with singular values near 1, by Newton–Schulz.

    ``f(f(…f(x / max(‖x‖, eps))))`` with ``f(x) = a·x + b·(x·xᵀ)·x + c·(x·xᵀ)²·x``. The products are
    of bfloat16, and the result has no gradient. On a CPU without fast products of bfloat16 the
    products are of float32, and x and the result are rounded to bfloat16. In `torchpar.exact.mode`
    the products are exact products, and x and the result are float32.

    Args:
        x: ``(*, n, m)``, floating; each matrix of a batch is orthogonalized.
        coefficients: ``(a, b, c)``; one such triple for each iteration, the last of which is
            repeated; or "polar_express", which ends nearest to singular values of 1.
        steps: the number of iterations, 0 to 99.
        eps: the least norm to divide by, so that 0 stays 0.
        ns: the iteration. "standard" is as accurate as `torch.optim.Muon`. "gram" iterates on the
            Gram matrix: it is less accurate, and faster where one side is at least twice the other.
            "auto" is "gram" for such matrices if both sides are at least 256, else "standard". On a
            GPU it is "gram" only if x·xᵀ of the batch has at least 15·10⁹ multiplications. In
            `torchpar.exact.mode` it is always "standard".

    Returns:
        ``(*, n, m)``, bfloat16; float32 in `torchpar.exact.mode`.

    Raises:
        ValueError: an argument is out of the bounds above.

    Source: Jordan, Muon, 2024; Zhang, Amsel, Chen and Dao, Gram Newton–Schulz, 2026,
    https://dao-ailab.github.io/blog/2026/gram-newton-schulz/.
    """
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(
            f"orthogonalize: x is {tuple(x.shape)} {x.dtype}, expected floating (*, n, m)"
        )
    if ns not in get_args(NewtonSchulz):
        raise ValueError(f"orthogonalize: ns is {ns!r}, expected 'auto', 'standard' or 'gram'")
    triples = coefficients_per_step(coefficients, steps)
    if x.dim() > 3:
        return orthogonalize(x.flatten(0, -3), coefficients, steps, eps, ns).view(x.shape)
    if x.shape[-2] > x.shape[-1]:
        return orthogonalize(x.mT, coefficients, steps, eps, ns).mT
    dtype = dtype_of_updates()
    if runs_kernels(x):
        x = normalized(x, eps, dtype)
    else:
        # Products of float32 take a tenth of the time on a CPU without those of bfloat16.
        wide = x.is_cpu and not has_bfloat16()
        x = x.to(dtype).to(torch.float32 if wide else dtype)
        x = x.div(torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=eps))
    return iterate(x, triples, ns).to(dtype)


def dtype_of_updates() -> torch.dtype:
    """The dtype in which a momentum is orthogonalized and sent."""
    return torch.float32 if is_exact() else torch.bfloat16


def coefficients_per_step(coefficients: Coefficients, steps: int) -> list[Triple]:
    """The triple of each of ``steps`` iterations."""
    if not isinstance(steps, int) or not 0 <= steps < 100:
        raise ValueError(f"orthogonalize: steps is {steps!r}, expected a whole number from 0 to 99")
    triples: Any = _POLAR_EXPRESS if coefficients == "polar_express" else coefficients
    if triples and not isinstance(triples[0], Sequence):
        triples = [triples]
    if not triples or any(len(triple) != 3 for triple in triples):
        raise ValueError(
            f"orthogonalize: coefficients is {coefficients!r}, expected 3: (a, b, c), a list of "
            "such triples, or 'polar_express'"
        )
    return list(islice(chain(triples, repeat(triples[-1])), steps))


def iterate(x: Tensor, triples: Sequence[Triple], ns: NewtonSchulz) -> Tensor:
    """The iterations of ``x (n, m)``, or a batch, with n ≤ m and norms of 1; overwrites ``x``."""
    parts = _iterations_per_gram(x, len(triples), ns)
    squares = 2 if max(parts, default=1) == 1 else 5
    products = ExactProducts() if is_exact() else Products(x, squares)
    rest = iter(triples)
    with on_device_of(x) if products.launches_kernels else nullcontext():
        for i, k in enumerate(parts):
            x = _iterate(products, x, list(islice(rest, k)), shifted=i == 0 or k == 1)
    return x


def _iterations_per_gram(x: Tensor, steps: int, ns: NewtonSchulz) -> list[int]:
    """The number of iterations on each Gram matrix; their sum is ``steps``."""
    n, m = x.shape[-2:]
    if ns == "standard" or (ns == "auto" and (is_exact() or not _gram_is_faster(x))):
        return [1] * steps
    # Three iterations on one Gram matrix leave singular values up to 1.45, and a further iteration
    # diverges from there. After more than five iterations the standard one ends nearer to 1, so
    # that the last part is two. Square matrices lose more.
    longest = 1 if m < _GRAM_ASPECT * n else 3 if steps <= 5 else 2
    last = min(steps - 2, longest)
    return [k for k in (min(steps, 2), *[1] * (steps - 2 - last), last) if k > 0]


def _gram_is_faster(x: Tensor) -> bool:
    n, m = x.shape[-2:]
    if n < _GRAM_ROWS or m < _GRAM_ASPECT * n:
        return False
    return not runs_kernels(x) or x.numel() * n >= _GRAM_MULTIPLICATIONS


def _iterate(
    products: Products | ExactProducts, x: Tensor, triples: list[Triple], shifted: bool
) -> Tensor:
    """``Q·x`` after an iteration for each triple on one Gram matrix, with ``Q = shift·I + p``.

    While singular values are small, shift is much larger than p: in their sum the last bits of p
    would be rounded away, so the two are kept apart (``shifted``). Later both are about as large,
    with opposite signs, and apart they would cancel: then the shift is 0, and p is Q. A single
    shifted iteration is the standard iteration.
    """
    r = products.gram(x)
    p, shift = r, 0.0
    for step, (a, b, c) in enumerate(triples):
        z = products.symmetric(r, r, r, alpha=c, beta=b, kept=(p,))
        if step > 0:
            # p·z + a·(p + shift/a·z)
            sum_ = products.add(p, z, shift / a, kept=(r,)) if shifted else p
            p = products.symmetric(p, z, sum_, beta=a, kept=(r,))
            shift *= a
        elif shifted:
            p, shift = z, a
        else:
            p = products.add_diagonal(z, a, kept=(r,))
        if step < len(triples) - 1:
            rz = products.symmetric(r, z, r, beta=a, kept=(p,))
            r = products.symmetric(rz, z, rz, beta=a, kept=(p,))
    return products.apply(p, x, shift if shifted else None)
