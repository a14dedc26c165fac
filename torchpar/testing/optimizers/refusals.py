# SPDX-License-Identifier: MIT
"""Compare an optimizer in many situations with its plain step and its formula, and judge."""

import logging
import math
import pickle
import re
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchpar.errors import ConfigError, in_columns
from torchpar.optim.newton_schulz import COEFFICIENTS
from torchpar.parallel.launch.local import Ranks
from torchpar.testing.optimizers.formulas import FORMULAS, ByFormula, Formula, Settings, defaults_of
from torchpar.testing.optimizers.situations import SITUATIONS
from torchpar.testing.optimizers.trial import (
    FAMILIES,
    Array,
    Failure,
    Layers,
    Make,
    Record,
    Setup,
    Trial,
    halves,
    multiply_rates,
    other_settings,
)

RIGHT = ("same bits", "equal up to rounding")
FAULTS = ("wrong", "hangs", "crashes")
GRACE = 5.0  # seconds for the other ranks, once a rank has failed
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


@dataclass(frozen=True)
class Row:
    """The verdict on an optimizer in one situation.

    Attributes:
        verdict: "same bits", "equal up to rounding", "refuses", "wrong", "hangs", "crashes" or "not
            applicable".
        compared_with: the reference: the optimizer's own step on unsharded matrices, also a formula
            in float64, or the polar factor. Empty if nothing was compared.
        update_error: ‖Δ − Δ_ref‖ / ‖Δ_ref‖ of the worst matrix, with gradients of full rank. For
            the polar factor, the sine of the angle.
        rounding: the change of Δ_ref that rounding the gradients makes. For the polar factor, the
            largest sine that is right.
        scale_error: |‖Δ‖ / ‖Δ_ref‖ − 1| of the same matrix.
        detail: a message, or a remark.
    """

    situation: str
    verdict: str
    compared_with: str = ""
    update_error: float | None = None
    rounding: float | None = None
    scale_error: float | None = None
    detail: str = ""


class Conformance(list[Row]):
    """The rows of a table, which `str` prints."""

    @property
    def rows(self) -> list[dict[str, str | float | None]]:
        """The rows as dictionaries, for a CSV."""
        return [asdict(row) for row in self]

    def assert_conforms(self) -> None:
        """Raise an AssertionError that shows the faulty rows, or that no row is right."""
        if faulty := Conformance(row for row in self if row.verdict in FAULTS):
            raise AssertionError(f"{len(faulty)} of {len(self)} situations are faulty\n{faulty}")
        if not any(row.verdict in RIGHT for row in self):
            raise AssertionError(f"none of {len(self)} situations was compared\n{self}")

    def __str__(self) -> str:
        table = [
            [
                "situation",
                "verdict",
                "compared with",
                "update error",
                "rounding",
                "scale error",
                "detail",
            ]
        ]
        table += [[_cell(value) for value in row.values()] for row in self.rows]
        return in_columns(table)


def _cell(value: str | float | None) -> str:
    return (
        value
        if isinstance(value, str)
        else ""
        if value is None
        else f"{value:.1e}"
        if value
        else "0"
    )


def check_optimizer(
    make: Make,
    situations: Iterable[str] | None = None,
    *,
    timeout: float = 60.0,
    orthogonal: bool = True,
    reference: Formula | type[torch.optim.Optimizer] | None = None,
    ranks: Ranks | None = None,
) -> Conformance:
    """Try an optimizer in many situations, on gloo ranks on this machine's CPU.

    An update Δ of each situation is compared with Δ_ref, the update by the same optimizer's step on
    unsharded matrices on one process, with the same gradients. Δ may differ from Δ_ref by four
    times the change that rounding the gradients makes. Where the weights are float32, Δ_ref is
    itself compared with the formula of ``reference`` in float64. A row that is wrong says so if
    the updates are those of each shard alone. Ranks are processes that import the caller's main
    module: a script needs ``if __name__ == "__main__":``.

    Args:
        make: returns the optimizer of a model whose parameters are hidden matrices: a module-level
            function or class, or a `functools.partial` of a function or class. A situation that is
            about ``views``, ``nesterov`` or ``process_group`` passes this argument, if ``make`` has
            it.
        situations: a name or names from `SITUATIONS`; by default all.
        timeout: seconds for each situation, after which its ranks count as hanging.
        orthogonal: whether to try the situations that are only for optimizers that orthogonalise.
        reference: a `Formula`, or the optimizer of PyTorch whose formula the optimizer shall
            follow: SGD, Adam, AdamW or Muon of `torch.optim`. By default the formula of the
            optimizer's own class, if this is exactly one of these classes or `torchpar.optim.Muon`.
            An optimizer of another class is not compared with a formula.
        ranks: an open pool, which other calls use, too. Otherwise the processes end with the call.

    Raises:
        ConfigError: no situation, or an unknown one; an unknown ``reference``; a ``make`` that the
            ranks cannot import or call.
    """
    if not callable(make):
        raise ConfigError(
            f"make is of type {type(make).__name__}, expected a function that gets a model"
        )
    chosen = SITUATIONS if situations is None else situations
    names = [chosen] if isinstance(chosen, str) else list(chosen)
    if unknown := [name for name in names if name not in SITUATIONS]:
        raise ConfigError(
            f"situation {unknown[0]!r}, expected one of {', '.join(map(repr, SITUATIONS))}"
        )
    names = [name for name in names if orthogonal or not SITUATIONS[name].orthogonal]
    if not names:
        raise ConfigError(
            "no situation is left, expected names of testing.SITUATIONS, or None for all"
        )
    if not isinstance(reference, Formula) and reference not in (None, *FORMULAS):
        known = ", ".join(f"{kind.__module__}.{kind.__qualname__}" for kind in FORMULAS)
        raise ConfigError(
            f"reference is {reference!r}, expected a testing.Formula, or one of {known}"
        )
    with Ranks() if ranks is None else nullcontext(ranks) as pool:
        try:
            made = pickle.dumps((make, reference))
            pool(1, pickle.loads, made)
        except Exception as e:
            raise ConfigError(
                f"the ranks cannot import make or reference ({e}); expected a module-level "
                "function or class, or a functools.partial of one, and in a script `if __name__ == "
                "'__main__':` around the call"
            ) from e
        return Conformance(_row(pool, name, made, timeout) for name in names)


def _row(ranks: Ranks, name: str, made: bytes, timeout: float) -> Row:
    situation, records = SITUATIONS[name], dict[Key, Record]()
    phases = [situation.ranks] if isinstance(situation.ranks, int) else situation.ranks
    limits = {"timeout": timeout, "grace": GRACE}
    try:
        with TemporaryDirectory() as folder:
            for world_size in phases:
                outcomes = ranks.outcomes(world_size, _try, name, made, folder, records, **limits)
                _check(outcomes, situation.one_may_refuse)
                records = _merge(outcomes)
        if name == "polar factor":
            return _judge_polar(name, records)
        outcomes = ranks.outcomes(1, _follow, name, made, records, **limits)
        _check(outcomes)
        row = _judge(name, records, outcomes[0])
        record, whole = _of_full_rank(records, outcomes[0])
        shards = record.shards()
        if row.verdict == "wrong" and shards.weights:
            (alone,) = ranks.outcomes(1, _follow_shards, name, made, shards, **limits)
            if isinstance(alone, Steps):  # an optimizer may fail with shards
                row = _judge_shards(row, shards.weights, record.split(whole), alone)
        return row
    except Failure as e:
        verdict, detail = e.args
        return Row(name, verdict, detail=detail)


# On the ranks


@contextmanager
def _failures() -> Iterator[None]:
    """Turn errors into failures, and hide warnings, which every rank would print."""
    logging.disable()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except Failure:
        raise
    except Exception as e:
        message = " ".join(f"{type(e).__name__}: {e}".split())[:300]
        lost = "gloo/transport" in message  # another rank has failed
        raise Failure(
            "hangs" if lost else "refuses" if _refuses(e) else "crashes", message
        ) from None
    finally:
        logging.disable(logging.NOTSET)


def _refuses(error: Exception) -> bool:
    """Whether an error is a refusal: raised on purpose, and if a RuntimeError, outside PyTorch."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    module = frame.f_globals.get("__name__", "")
    is_outside = not module.startswith("torch.") or module.startswith("torch.optim.")
    kinds = (ValueError, TypeError, NotImplementedError, *[RuntimeError] * is_outside)
    line = traceback.extract_tb(error.__traceback__)[-1].line or ""
    return isinstance(error, kinds) and re.search(r"\braise\b", line) is not None


def _try(name: str, made: bytes, folder: str, earlier: dict[Key, Record]) -> dict[str, Record]:
    """Train in a situation on this rank, with each family of gradients."""
    situation, records = SITUATIONS[name], dict(zip(FAMILIES, earlier.values(), strict=False))
    with _failures():
        for family in FAMILIES:
            torch.manual_seed(0)
            record = records.setdefault(family, Record())
            trial = Trial(
                pickle.loads(made)[0], record, family, Path(folder) / family, **situation.setup
            )
            situation.run(trial)
    return records


class Steps(NamedTuple):
    """The weights of a record's steps on unsharded matrices, exact and with rounded gradients."""

    exact: Weights
    rounded: list[Weights]


class References(NamedTuple):
    """A situation's steps, repeated on unsharded matrices on one process, for each record.

    Attributes:
        own: the steps by the optimizer; with rounded gradients only if the bits differ.
        formula: the name of the formula that these steps are compared with, or "".
        off: a message if these steps are wrong by the formula, or "".
        unchanged: weights by the optimizer without the situation's change of learning rates, or
            None.
        changed: the matrices whose learning rates change.
    """

    own: list[Steps]
    formula: str
    off: str
    unchanged: list[Weights] | None
    changed: list[set[str]]


class Together:
    """Several optimizers of one model."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


def _follow(name: str, made: bytes, merged: dict[Key, Record]) -> References:
    """Repeat the steps on unsharded matrices: with the same gradients, then with rounded ones."""
    records, families = list(merged.values()), [family for family, *_ in merged]
    reference = pickle.loads(made)[1]
    setup = SITUATIONS[name].setup
    with _failures():
        follow = Follower(pickle.loads(made)[0], setup, reference)
        exact = [follow.weights(record) for record in records]
        pairs = zip(records, exact, strict=True)
        differ = any(
            not np.array_equal(one.weights[name], of[name]) for one, of in pairs for name in of
        )
        # Where all bits are the same, their rounding does not matter.
        own = [
            Steps(of, [follow.weights(record, draw) for draw in range(1, 1 + DRAWS * differ)])
            for record, of in zip(records, exact, strict=True)
        ]
        off = None
        if follow.formula and setup.get("dtype", torch.float32) == torch.float32:
            formula = [Steps(follow.weights(record, by_formula=True), []) for record in records]
            off = _off_formula(families, own, formula, follow)
            for draw in range(1, 1 + DRAWS):
                if not off:  # more draws could only widen the bound
                    break
                for record, steps in zip(records, formula, strict=True):
                    steps.rounded.append(follow.weights(record, draw, by_formula=True))
                off = _off_formula(families, own, formula, follow)
        changes = "rates" in setup or "groups" in setup
        unchanged = (
            [follow.weights(record, unchanged=True) for record in records] if changes else None
        )
        label = follow.formula.name if follow.formula and off is not None else ""
        return References(own, label, off or "", unchanged, [*map(follow.changed, records)])


def _follow_shards(name: str, made: bytes, shards: Record) -> Steps:
    """Repeat the steps on shards, each as if it were a whole matrix."""
    with _failures():
        follow = Follower(pickle.loads(made)[0], SITUATIONS[name].setup, None)
        rounded = [follow.weights(shards, draw) for draw in range(1, 1 + DRAWS)]
        return Steps(follow.weights(shards), rounded)


class Follower:
    """Take the steps of a situation on unsharded matrices, by an optimizer or by its formula."""

    def __init__(
        self,
        make: Make,
        setup: Setup,
        reference: Formula | type[torch.optim.Optimizer] | None,
    ):
        self.make, self.setup = make, setup
        self.formula: Formula | None
        self.defaults: Settings = {}
        if isinstance(reference, Formula):
            self.formula = reference
        elif reference is not None:
            self.formula, self.defaults = FORMULAS[reference], defaults_of(reference)
        else:
            trial = self._trial()
            self.formula = FORMULAS.get(type(trial.optimizer(trial.model())))
        self.precision = float(torch.finfo(self.formula.dtype).eps) if self.formula else 0.0

    def weights(
        self, record: Record, draw: int = 0, by_formula: bool = False, unchanged: bool = False
    ) -> Weights:
        """The weights, with the gradients of a record.

        Args:
            draw: the number of a draw of rounded gradients, or 0 for exact gradients.
            unchanged: whether to leave out the situation's change of learning rates.
        """
        trial = self._trial()
        weights = {name: torch.from_numpy(of[0]) for name, of in record.weights.items()}
        model = Layers({name: weight.to(trial.dtype) for name, weight in weights.items()})
        torch.manual_seed(0)
        optimizer: Any = self._make(model, unchanged)
        generator = torch.Generator().manual_seed(draw)
        rounding = self.precision if by_formula else BFLOAT16

        def rounded(t: Tensor) -> Tensor:
            """``t`` with random errors of at most one rounding.

            Source: Parker, "Monte Carlo Arithmetic", 1997.
            """
            errors = torch.rand(t.shape, generator=generator) - 0.5 if draw else 0.0
            return t * (1 + rounding * errors)

        if by_formula:
            assert self.formula is not None
            for parameter in model.parameters():
                parameter.data = parameter.data.double()
            optimizer = ByFormula(optimizer.param_groups, self.formula, self.defaults, rounded)
        torch.manual_seed(0)
        rate = 1.0
        for step in trial.steps(model, optimizer):
            if trial.rates and not unchanged:
                multiply_rates(optimizer, trial.rates[step] / rate)
                rate = trial.rates[step]
            for p, gradients in zip(model.parameters(), record.gradients.values(), strict=True):
                if gradients[step] is None:
                    p.grad = None  # zero_grad may have left zeros
                else:
                    # To bfloat16 also where the dtype is bfloat16.
                    g = rounded(torch.from_numpy(gradients[step]) / trial.factor)
                    # A backward pass, because an optimizer may have hooks in it.
                    torch.autograd.backward(p, g.to(p.dtype))
        return trial.record.weights

    def changed(self, record: Record) -> set[str]:
        """The matrices whose learning rates the situation changes."""
        model = Layers({name: torch.from_numpy(of[0]) for name, of in record.weights.items()})
        groups = self._make(model).param_groups
        if any("lr" not in group for group in groups):
            return set()
        layers = model if "rates" in self.setup else halves(model)[1]
        return {name for name, _ in layers.named_children()}

    def _trial(self) -> Trial:
        setup: Setup = {**self.setup, "views": {}, "groups": False}
        return Trial(self.make, Record(), **setup)

    def _make(self, model: Layers, unchanged: bool = False) -> torch.optim.Optimizer | Together:
        """The optimizer; of two groups an optimizer each, so that it cannot confuse the groups."""
        trial = self._trial()
        if not self.setup.get("groups"):
            return trial.optimizer(model)
        first, second = map(trial.optimizer, halves(model))
        for group in second.param_groups:
            group.update(other_settings(group) | ({"lr": group["lr"]} if unchanged else {}))
        return Together([first, second])


def _off_formula(
    families: list[str], own: list[Steps], formula: list[Steps], follow: Follower
) -> str:
    """A message if the optimizer's own step is wrong by its formula, or "".

    Besides the formula's rounding, the weights are rounded to float32, about twice in a step.
    """
    worst, detail = 1.0, ""
    assert follow.formula is not None
    for family, (weights, _), (exact, rounded) in zip(families, own, formula, strict=True):
        for matrix, right in exact.items():
            errors = _errors(weights[matrix], right)
            drawn = np.max(
                [np.zeros(2), *(_errors(draw[matrix], right) for draw in rounded)], axis=0
            )
            moves = [
                float(np.linalg.norm(update)) for update in np.diff(right, axis=0) if update.any()
            ]
            norm = max(float(np.linalg.norm(weight)) for weight in right)
            stored = FLOAT32 * norm / min(moves, default=1.0)
            excess = float(max(errors / (FACTOR * (drawn + stored) + follow.precision)))
            if excess > worst:
                worst = excess
                detail = (
                    f"{matrix}, {family}: own step off {follow.formula.name}'s formula by "
                    f"{errors[0]:.1e}"
                )
                detail += f" (rounding {drawn[0]:.1e}), its norm by {errors[1]:.1e}"
    return detail


# On the process of the caller


def _check(outcomes: Sequence[object], one_may_refuse: bool = False) -> None:
    """Raise the failure of ranks that have failed or hang."""
    ranks: dict[str, dict[int, str]] = {}  # by verdict
    for rank, outcome in enumerate(outcomes):
        if isinstance(outcome, Failure):
            verdict, message = outcome.args
        elif isinstance(outcome, TimeoutError):
            verdict, message = "hangs", "no answer in time"
        elif isinstance(outcome, BaseException):
            last = str(outcome).strip().rpartition("\n")[2]  # of a traceback
            verdict, message = "crashes", f"{type(outcome).__name__}: {last}"
        else:
            continue
        ranks.setdefault(verdict, {})[rank] = message
    for verdict in ("not applicable", "crashes", "wrong", "refuses", "hangs"):
        if verdict in ranks:
            rank, message = next(iter(ranks[verdict].items()))
            if len(ranks[verdict]) == len(outcomes):
                raise Failure(verdict, message)
            if verdict != "refuses" or one_may_refuse:
                raise Failure(verdict, f"rank {rank}: {message}")
            others = "hangs" if "hangs" in ranks else "wrong"
            raise Failure(others, f"refuses on rank {rank}, and not on all ranks: {message}")


def _merge(outcomes: list[dict[str, Record]]) -> dict[Key, Record]:
    """The records of all ranks. Ranks with the same matrices must have the same weights."""
    merged: dict[Key, Record] = {}
    for of_rank in outcomes:
        for family, record in of_rank.items():
            first = merged.setdefault((family, *record.weights), record)
            for name, weights in record.weights.items():
                if not np.array_equal(weights, first.weights[name], equal_nan=True):
                    raise Failure("wrong", f"the ranks differ in {name}")
            for name, parts in record.parts.items():
                first.parts.setdefault(name, set()).update(parts)
    return merged


def _errors(weights: list[Array], reference: list[Array]) -> Array:
    """The largest relative errors of the updates, and of their norms. Of NaN they are infinite."""
    errors = np.zeros(2)
    for update, right in zip(np.diff(weights, axis=0), np.diff(reference, axis=0), strict=True):
        if not np.array_equal(update, right):
            error, norm, expected = (
                float(np.linalg.norm(x)) for x in (update - right, update, right)
            )
            finite = expected > 0 and math.isfinite(error + norm + expected)
            both = [error / expected, abs(norm / expected - 1)] if finite else [math.inf, math.inf]
            errors = np.maximum(errors, both)
    return errors


def _judge(name: str, records: dict[Key, Record], references: References) -> Row:
    """Judge each matrix by its rounding. The row shows the worst matrix of full rank."""
    _check_moves(records, references)
    compared = "own step"
    if references.formula:
        compared += f", {references.formula} in float64"
    found: list[tuple[float, str, str, float, float, float]] = []
    for ((family, *_), record), (exact, rounded) in zip(
        records.items(), references.own, strict=True
    ):
        for matrix, weights in record.weights.items():
            errors = _errors(weights, exact[matrix])
            drawn = [_errors(draw[matrix], exact[matrix]) for draw in rounded]
            rounding = np.max([np.zeros(2), *drawn], axis=0)
            excess = float(max(errors / (FACTOR * rounding + BFLOAT16)))
            error, scale, expected = map(float, (*errors, rounding[0]))
            found.append((excess, family, matrix, error, scale, expected))
    full, low = (max(one for one in found if one[1] == family) for family in FAMILIES[:2])
    numbers = full[3], full[5], full[4]
    excess, family, matrix, error, scale, rounded_error = max(found)
    if excess > 1:
        detail = f"{matrix}, {family}: update off by {error:.1e} (rounding {rounded_error:.1e})"
        return Row(name, "wrong", compared, *numbers, f"{detail}, its norm by {scale:.1e}")
    if references.off:
        return Row(name, "wrong", compared, *numbers, references.off)
    if not references.own[0].rounded:
        return Row(name, "same bits", compared, 0.0, None, 0.0)
    if SITUATIONS[name].same_bits:
        detail = f"{matrix}, {family}: update off by {error:.1e}, expected the same bits"
        return Row(name, "wrong", compared, *numbers, detail)
    low_rank = f"low rank: {low[3]:.1e} of {low[5]:.1e}"
    return Row(name, "equal up to rounding", compared, *numbers, low_rank)


def _of_full_rank(records: dict[Key, Record], references: References) -> tuple[Record, Weights]:
    """The first record with gradients of full rank, and its steps on unsharded matrices."""
    pairs = zip(records.items(), references.own, strict=True)
    return next(
        (record, own.exact) for ((family, *_), record), own in pairs if family == FAMILIES[0]
    )


def _judge_shards(row: Row, shards: Weights, whole: Weights, alone: Steps) -> Row:
    """Say in a row that is wrong if each rank took its shard for a whole matrix.

    So it is if the updates of all shards have the directions of the optimizer's updates of each
    shard alone, up to rounding, and not those of the whole matrices' updates. Norms may differ: an
    optimizer may still scale by the shape of the whole matrix. The direction of a single row or
    column shows nothing, since to orthogonalise a vector is to scale it.

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


def _check_moves(records: dict[Key, Record], references: References) -> None:
    """Raise a Failure if a weight does not move, or a change of its learning rate has no effect."""
    for record, (exact, _) in zip(records.values(), references.own, strict=True):
        still = [
            name
            for name, of in exact.items()
            if np.array_equal(of[0], of[-1]) and any(g is not None for g in record.gradients[name])
        ]
        if still:
            only_some = len(still) < len(exact)
            raise Failure("wrong", f"{still[0]} does not move" if only_some else "no weight moves")
    for unchanged, changed, (exact, _) in zip(
        references.unchanged or (), references.changed, references.own, strict=False
    ):
        for name in exact:
            if name in changed and np.array_equal(exact[name][-1], unchanged[name][-1]):
                raise Failure("wrong", f"a change of group['lr'] changes nothing for {name}")


def _judge_polar(name: str, records: dict[Key, Record]) -> Row:
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
