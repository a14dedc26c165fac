# SPDX-License-Identifier: MIT
"""Verdict on the updates of a situation, beside those of steps on unsharded matrices."""

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from torchpar.optim.newton_schulz import COEFFICIENTS
from torchpar.testing.optimizers.formulas import Formula
from torchpar.testing.optimizers.situations import SITUATIONS
from torchpar.testing.optimizers.trial import FAMILIES, Array, Failure, Record
from torchpar.testing.rows import Row

DRAWS = 8  # of rounded gradients
# An update rounds about 16 times in sequence: its input, and three products in each of five
# iterations. Random errors add as the square root. The errors of torch.optim.Muon, whose DTensors
# sum parts of products in bfloat16, were at most 1.7 times the yardstick, in seven situations with
# six seeds.
FACTOR = 4.0
# An update may itself be rounded to bfloat16, by any optimizer.
BFLOAT16 = float(torch.finfo(torch.bfloat16).eps)
FLOAT32 = float(torch.finfo(torch.float32).eps)
Key = tuple[str, ...]  # the family of gradients, and the names of matrices
Weights = dict[str, list[Array]]


class Steps(NamedTuple):
    """The weights of a record's steps on unsharded matrices, exact and with rounded gradients."""

    exact: Weights
    rounded: list[Weights]


class References(NamedTuple):
    """A situation's steps, repeated on unsharded matrices on one process, for each record.

    Attributes:
        own: the steps by the optimizer; with rounded gradients only if the bits differ.
        formula: the name of the formula that these steps are compared with, or "".
        mismatch: a message if these steps are wrong by the formula, or "".
        at_base_rates: weights by the optimizer without the situation's change of learning rates,
            or None.
        with_other_rates: the matrices whose learning rates change.
    """

    own: list[Steps]
    formula: str
    mismatch: str
    at_base_rates: list[Weights] | None
    with_other_rates: list[set[str]]


def judge(name: str, records: dict[Key, Record], references: References) -> Row:
    """Judge each matrix by its rounding. The row shows the worst matrix of full rank."""
    _check_moves(records, references)
    compared = "own step"
    if references.formula:
        compared += f", {references.formula} in float64"
    found: list[tuple[float, str, str, float, float, float, int]] = []
    for ((family, *_), record), (exact, rounded) in zip(
        records.items(), references.own, strict=True
    ):
        for matrix, weights in record.weights.items():
            drawn = [_relative_errors(draw[matrix], exact[matrix]).max(0) for draw in rounded]
            rounding = np.max([np.zeros(2), *drawn], axis=0)
            excess, step, errors = _excess(
                _relative_errors(weights, exact[matrix]), FACTOR * rounding + BFLOAT16
            )
            error, scale, expected = map(float, (*errors, rounding[0]))
            found.append((excess, family, matrix, error, scale, expected, step))
    full, low = (max(one for one in found if one[1] == family) for family in FAMILIES[:2])
    numbers = full[3], full[5], full[4]
    excess, family, matrix, error, scale, rounded_error, step = max(found)
    if excess > 1:
        detail = f"{matrix}, {family}: update off by {error:.1e} (rounding {rounded_error:.1e})"
        detail += f", its norm by {scale:.1e}, from step {step} on"
        return Row(name, "wrong", compared, *numbers, detail=detail)
    if references.mismatch:
        return Row(name, "wrong", compared, *numbers, references.mismatch)
    if not references.own[0].rounded:
        return Row(name, "same bits", compared, 0.0, None, 0.0)
    if SITUATIONS[name].same_bits:
        detail = f"{matrix}, {family}: update off by {error:.1e}, expected the same bits"
        return Row(name, "wrong", compared, *numbers, detail)
    low_rank = f"low rank: {low[3]:.1e} of {low[5]:.1e}"
    return Row(name, "equal up to rounding", compared, *numbers, low_rank)


def _check_moves(records: dict[Key, Record], references: References) -> None:
    """Raise a Failure if a weight does not move, or a change of its learning rate has no effect."""
    for record, (exact, _) in zip(records.values(), references.own, strict=True):
        still = [
            name
            for name, of in exact.items()
            if np.array_equal(of[0], of[-1])
            and any(g is not None and g.any() for g in record.gradients[name])
        ]
        if still:
            only_some = len(still) < len(exact)
            raise Failure("wrong", f"{still[0]} does not move" if only_some else "no weight moves")
    for base, changed, (exact, _) in zip(
        references.at_base_rates or (),
        references.with_other_rates,
        references.own,
        strict=False,
    ):
        for name in exact:
            if name in changed and np.array_equal(exact[name][-1], base[name][-1]):
                raise Failure("wrong", f"a change of group['lr'] changes nothing for {name}")


def of_full_rank(records: dict[Key, Record], references: References) -> tuple[Record, Weights]:
    """The first record with gradients of full rank, and its steps on unsharded matrices."""
    pairs = zip(records.items(), references.own, strict=True)
    return next(
        (record, own.exact) for ((family, *_), record), own in pairs if family == FAMILIES[0]
    )


def formula_mismatch(
    families: list[str], own: list[Steps], steps: list[Steps], formula: Formula
) -> str:
    """A message if the optimizer's own step is wrong by its formula, or "".

    Besides the formula's rounding, the weights are rounded to float32, about twice in a step.
    """
    worst, detail = 1.0, ""
    for family, (weights, _), (exact, rounded) in zip(families, own, steps, strict=True):
        for matrix, right in exact.items():
            drawn = np.max(
                [np.zeros(2), *(_relative_errors(draw[matrix], right).max(0) for draw in rounded)],
                axis=0,
            )
            moves = [
                float(np.linalg.norm(update)) for update in np.diff(right, axis=0) if update.any()
            ]
            norm = max(float(np.linalg.norm(weight)) for weight in right)
            stored = FLOAT32 * norm / min(moves, default=1.0)
            excess, step, errors = _excess(
                _relative_errors(weights[matrix], right),
                FACTOR * (drawn + stored) + formula.precision,
            )
            if excess > worst:
                worst = excess
                detail = (
                    f"{matrix}, {family}: own step off {formula.name}'s formula by {errors[0]:.1e}"
                )
                detail += f" (rounding {drawn[0]:.1e}), its norm by {errors[1]:.1e}"
                detail += f", from step {step} on"
    return detail


def _relative_errors(weights: list[Array], reference: list[Array]) -> Array:
    """For each step the relative errors of the update, and of its norm. They are infinite for
    NaN."""
    errors = np.zeros((len(reference) - 1, 2))
    steps = zip(np.diff(weights, axis=0), np.diff(reference, axis=0), strict=True)
    for i, (update, right) in enumerate(steps):
        if not np.array_equal(update, right):
            error, norm, expected = (
                float(np.linalg.norm(x)) for x in (update - right, update, right)
            )
            finite = expected > 0 and math.isfinite(error + norm + expected)
            errors[i] = [error / expected, abs(norm / expected - 1)] if finite else math.inf
    return errors


def _excess(errors: Array, bound: Array) -> tuple[float, int, Array]:
    """The largest ratio of an error and its bound, the first step above the bound, and the largest
    errors."""
    ratios = (errors / bound).max(1)
    return float(ratios.max()), int((ratios > 1).argmax()) + 1, errors.max(0)


def judge_shards(row: Row, shards: Weights, whole: Weights, alone: Steps) -> Row:
    """Say in a row that is wrong if each rank took its shard for a whole matrix.

    This is the cause if the updates of all shards have, up to rounding, the directions of the
    optimizer's updates of each shard alone, and not the directions of the whole matrices' updates.
    Norms may differ: an optimizer may still scale by the shape of the whole matrix. The direction
    of a single row or column shows nothing, since to orthogonalize a vector is to scale it.

    Args:
        shards: the shards' weights in the situation.
        whole: the shards of the weights by steps on whole matrices.
        alone: the weights by steps on the shards alone.
    """
    of_shard, of_whole, ratios = list[bool](), list[bool](), list[float]()
    for name, weights in shards.items():
        n, *others = weights[0].shape
        if min(n, math.prod(others)) > 1:
            norms, directions = _polar(weights)
            own_norms, own = _polar(alone.exact[name])
            drawn = max(_distance(_polar(draw[name])[1], own) for draw in alone.rounded)
            bound = FACTOR * drawn + BFLOAT16
            of_shard.append(_distance(directions, own) <= bound)
            of_whole.append(_distance(directions, _polar(whole[name])[1]) <= bound)
            ratios.extend(norms[own_norms > 0] / own_norms[own_norms > 0])
    if not all(of_shard) or all(of_whole):
        return row
    low, high = (f"{of(ratios, default=1.0):.2f}" for of in (min, max))
    scaled = "" if low == high == "1.00" else f", times {low} to {high}"
    off = f"{row.update_error:.0%} off the update of the whole matrix"
    return replace(row, detail=f"each shard is updated on its own{scaled}: {off}")


def _polar(weights: list[Array]) -> tuple[Array, Array]:
    """The norm of each step's update, and its direction, which is 0 if the weight does not move."""
    updates = np.diff(weights, axis=0).reshape(len(weights) - 1, -1)
    norms = np.linalg.norm(updates, axis=1)
    return norms, updates / np.where(norms > 0, norms, 1.0)[:, None]


def _distance(directions: Array, others: Array) -> float:
    return float(np.linalg.norm(directions - others, axis=1).max())


def judge_polar(name: str, records: dict[Key, Record]) -> Row:
    """Compare the first update with the polar factor U·Vᵀ of the gradient U·Σ·Vᵀ, in float64.

    Five Newton–Schulz iterations with Jordan's coefficients bring all singular values of the
    normalised gradient into an interval [a, b]. Then the cosine of the angle to U·Vᵀ is at least
    2·√(ab) / (a + b). The interval is widened by the rounding to bfloat16 of each iteration's three
    products, and begins at half of the smallest singular value. The ratio of a singular value and
    the median is between a/b and b/a.
    """
    rows = []
    record = next(record for (family, *_), record in records.items() if family == FAMILIES[0])
    for matrix, weights in record.weights.items():
        gradient = record.gradients[matrix][0]
        assert gradient is not None
        u, sigma, vt = np.linalg.svd(gradient, full_matrices=False)
        update = weights[1] - weights[0]
        values = np.linalg.svd(update, compute_uv=False)
        cosine = -(update * (u @ vt)).sum() / max(
            np.linalg.norm(values) * math.sqrt(len(sigma)), 1e-300
        )
        a, b = np.array([sigma[-1] / 2, sigma[0]]) / np.linalg.norm(sigma)
        for _ in range(5):
            x = np.geomspace(a * (1 - 1.5 * BFLOAT16), b * (1 + 1.5 * BFLOAT16), 1000)
            x = COEFFICIENTS[0] * x + COEFFICIENTS[1] * x**3 + COEFFICIENTS[2] * x**5
            a, b = x.min(), x.max()
        bound = 2 * math.sqrt(a * b) / (a + b)
        median = max(float(np.median(values)), 1e-300)
        is_right = cosine >= bound and values[-1] >= a / b * median and values[0] <= b / a * median
        sine, largest = (math.sqrt(max(1 - cos**2, 0.0)) for cos in (cosine, bound))
        detail = f"{matrix}: cosine {cosine:.3f}, expected at least {bound:.3f}; singular values "
        detail += f"{values[-1] / median:.2f} to {values[0] / median:.2f} of their median"
        verdict = "equal up to rounding" if is_right else "wrong"
        rows.append(Row(name, verdict, "polar factor", sine, largest, detail=detail))
    return max(rows, key=lambda row: (row.verdict == "wrong", row.update_error))
