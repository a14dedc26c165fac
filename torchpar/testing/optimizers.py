# SPDX-License-Identifier: MIT
"""Compare an optimizer in many situations with its own step on whole matrices, and judge the differences."""

import dis
import logging
import math
import pickle
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from torchpar.errors import ConfigError
from torchpar.optim.assign import aligned
from torchpar.optim.newton_schulz import COEFFICIENTS
from torchpar.parallel.launch.local import Ranks
from torchpar.testing.situations import SITUATIONS
from torchpar.testing.trial import FAMILIES, Array, Failure, Layers, Make, Record, Trial

RIGHT = ("same bits", "equal up to rounding")
FAULTS = ("wrong", "hangs", "crashes")
GRACE = 5.0  # seconds for the other ranks, once one has failed
DRAWS = 8  # of rounded gradients
# An update rounds about 16 times in sequence: its input, and three products in each of five iterations.
# Random errors add as the square root. The errors of torch.optim.Muon, whose DTensors sum parts of products
# in bfloat16, were at most 1.7 times the yardstick, in seven situations with six seeds.
FACTOR = 4.0
# An update may itself be rounded to bfloat16, by any optimizer.
BFLOAT16 = float(torch.finfo(torch.bfloat16).eps)

Key = tuple[str, ...]  # the family of gradients, and the names of matrices
Weights = dict[str, list[Array]]


@dataclass(frozen=True)
class Row:
    """The verdict on an optimizer in one situation.

    Attributes:
        verdict: "same bits", "equal up to rounding", "refuses", "wrong", "hangs", "crashes" or "not
            applicable".
        update_error: ‖Δ − Δ_ref‖ / ‖Δ_ref‖ of the worst matrix, with gradients of full rank. For the polar
            factor, the sine of the angle.
        rounding: the change of Δ_ref that rounding the gradients makes. For the polar factor, the largest
            sine that is right.
        scale_error: |‖Δ‖ / ‖Δ_ref‖ − 1| of the same matrix.
        detail: a message, or what was found.
    """

    situation: str
    verdict: str
    update_error: float | None = None
    rounding: float | None = None
    scale_error: float | None = None
    detail: str = ""


class Conformance(list[Row]):
    """The rows of a table, which `str` prints."""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows as dictionaries, for a CSV."""
        return [asdict(row) for row in self]

    def assert_conforms(self) -> None:
        """Raise an AssertionError that shows what is wrong, hangs or crashes; or if nothing is right."""
        if faulty := Conformance(row for row in self if row.verdict in FAULTS):
            raise AssertionError(f"{len(faulty)} of {len(self)} situations are faulty\n{faulty}")
        if not any(row.verdict in RIGHT for row in self):
            raise AssertionError(f"none of {len(self)} situations was compared\n{self}")

    def __str__(self) -> str:
        table = [["situation", "verdict", "update error", "rounding", "scale error", "detail"]]
        table += [[_cell(value) for value in row.values()] for row in self.rows]
        return aligned(table)


def _cell(value: str | float | None) -> str:
    return value if isinstance(value, str) else "" if value is None else f"{value:.1e}" if value else "0"


def check_optimizer(
    make: Make,
    situations: Iterable[str] | None = None,
    *,
    timeout: float = 60.0,
    orthogonal: bool = True,
    ranks: Ranks | None = None,
) -> Conformance:
    """Try an optimizer in many situations, on gloo ranks on this machine's CPU.

    An update Δ of each situation is compared with Δ_ref, that of the same optimizer's step on whole matrices
    on one process, with the same gradients. It may differ by four times what rounding the gradients changes.
    Ranks are processes that import the caller's main module: a script needs ``if __name__ == "__main__":``.

    Args:
        make: returns the optimizer of a model whose parameters are hidden matrices: a module-level function
            or class, or a `functools.partial` of one. A situation that is about ``views``, ``nesterov`` or
            ``process_group`` passes it, if ``make`` has such an argument.
        situations: names from `SITUATIONS`, or one; by default all.
        timeout: seconds for each situation, after which its ranks count as hanging.
        orthogonal: whether to try what can be asked only of optimizers that orthogonalise.
        ranks: an open pool, which other calls use, too. Otherwise the processes end with the call.

    Raises:
        ConfigError: no situation, or an unknown one; a ``make`` that the ranks cannot import or call.
    """
    if not callable(make):
        raise ConfigError(f"make is of type {type(make).__name__}, expected a function that gets a model")
    chosen = SITUATIONS if situations is None else situations
    names = [chosen] if isinstance(chosen, str) else list(chosen)
    if unknown := [name for name in names if name not in SITUATIONS]:
        raise ConfigError(f"situation {unknown[0]!r}, expected one of {', '.join(map(repr, SITUATIONS))}")
    names = [name for name in names if orthogonal or not SITUATIONS[name].orthogonal]
    if not names:
        raise ConfigError("no situation is left, expected names of testing.SITUATIONS, or None for all")
    with Ranks() if ranks is None else nullcontext(ranks) as pool:
        try:
            made = pickle.dumps(make)
            pool(1, pickle.loads, made)
        except Exception as e:
            raise ConfigError(
                f"the ranks cannot import make ({e}); expected a module-level function or class, or a "
                "functools.partial of one, and in a script `if __name__ == '__main__':` around the call"
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
        outcomes = ranks.outcomes(1, _follow, name, made, list(records.values()), **limits)
        _check(outcomes)
        return _judge(name, records, outcomes[0])
    except Failure as e:
        verdict, detail = e.args
        return Row(name, verdict, detail=detail)


# On the ranks


@contextmanager
def _failures() -> Iterator[None]:
    """Turn errors into failures, and leave out warnings, which every rank would print."""
    logging.disable()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except Failure:
        raise
    except Exception as e:
        message = " ".join(f"{type(e).__name__}: {e}".split())[:300]
        lost = "gloo/transport" in message  # because another rank has failed
        raise Failure("hangs" if lost else "refuses" if _refuses(e) else "crashes", message) from None
    finally:
        logging.disable(logging.NOTSET)


def _refuses(error: Exception) -> bool:
    """Whether an error is a refusal: raised on purpose, and not within PyTorch if it is a RuntimeError."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    assert last is not None
    module, code = last.tb_frame.f_globals.get("__name__", ""), last.tb_frame.f_code.co_code
    own = not module.startswith("torch.") or module.startswith("torch.optim.")
    kinds = (ValueError, TypeError, NotImplementedError, *[RuntimeError] * own)
    return isinstance(error, kinds) and code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _try(name: str, made: bytes, folder: str, earlier: dict[Key, Record]) -> dict[str, Record]:
    """Train in a situation on this rank, with each family of gradients."""
    situation, records = SITUATIONS[name], dict(zip(FAMILIES, earlier.values(), strict=False))
    with _failures():
        for family in FAMILIES:
            torch.manual_seed(0)
            record = records.setdefault(family, Record())
            trial = Trial(pickle.loads(made), record, family, Path(folder) / family, **situation.setup)
            situation.run(trial)
    return records


def _follow(name: str, made: bytes, records: list[Record]) -> list[tuple[Weights, ...]]:
    """The weights of the same steps on whole matrices: with the same gradients, then with rounded ones."""

    def draw(number: int) -> list[Weights]:
        return [_weights(pickle.loads(made), SITUATIONS[name].setup, record, number) for record in records]

    with _failures():
        exact = draw(0)
        pairs = zip(records, exact, strict=True)
        differ = any(not np.array_equal(one.weights[name], of[name]) for one, of in pairs for name in of)
        # Where all bits are the same, their rounding does not matter.
        return list(zip(exact, *map(draw, range(1, 1 + DRAWS * differ)), strict=True))


def _weights(make: Make, setup: Mapping[str, Any], record: Record, draw: int) -> Weights:
    trial = Trial(make, Record(), **{**setup, "views": {}})
    model = Layers({name: torch.from_numpy(of[0]).to(trial.dtype) for name, of in record.weights.items()})
    optimizer = trial.optimizer(model)
    generator = torch.Generator().manual_seed(draw)
    torch.manual_seed(0)
    for step in trial.steps(model, optimizer):
        for p, gradients in zip(model.parameters(), record.gradients.values(), strict=True):
            if gradients[step] is not None:
                g = torch.from_numpy(gradients[step]) / trial.factor
                if draw:  # an error of at most one rounding to bfloat16, also where the dtype is bfloat16
                    g = g * (1 + BFLOAT16 * (torch.rand(g.shape, generator=generator) - 0.5))
                # A backward pass, because an optimizer may have hooks in it.
                torch.autograd.backward(p, g.to(trial.dtype))
    return trial.record.weights


# On the process that asks


def _check(outcomes: list[Any], one_may_refuse: bool = False) -> None:
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
    for verdict in ("not applicable", "crashes", "refuses", "hangs"):
        if verdict in ranks:
            rank, message = next(iter(ranks[verdict].items()))
            if len(ranks[verdict]) == len(outcomes):
                raise Failure(verdict, message)
            if verdict != "refuses" or one_may_refuse:
                raise Failure(verdict, f"rank {rank}: {message}")
            others = "hangs" if "hangs" in ranks else "wrong"
            raise Failure(others, f"refuses on rank {rank}, and not on all: {message}")


def _merge(outcomes: list[dict[str, Record]]) -> dict[Key, Record]:
    """The records of all ranks; those that have the same matrices have the same weights."""
    merged: dict[Key, Record] = {}
    for of_rank in outcomes:
        for family, record in of_rank.items():
            first = merged.setdefault((family, *record.weights), record)
            for name, weights in record.weights.items():
                if not np.array_equal(weights, first.weights[name], equal_nan=True):
                    raise Failure("wrong", f"the ranks differ in {name}")
    return merged


def _errors(weights: list[Array], reference: list[Array]) -> Array:
    """The largest relative errors of the updates, and of their norms; those of NaN are infinite."""
    errors = np.zeros(2)
    for update, right in zip(np.diff(weights, axis=0), np.diff(reference, axis=0), strict=True):
        if not np.array_equal(update, right):
            error, norm, expected = (float(np.linalg.norm(x)) for x in (update - right, update, right))
            finite = expected > 0 and math.isfinite(error + norm + expected)
            both = [error / expected, abs(norm / expected - 1)] if finite else [math.inf, math.inf]
            errors = np.maximum(errors, both)
    return errors


def _judge(name: str, records: dict[Key, Record], references: list[tuple[Weights, ...]]) -> Row:
    """Judge each matrix by its own rounding; the row shows the worst one of full rank."""
    wholes = [weights for exact, *_ in references for weights in exact.values()]
    if all(np.array_equal(weights[0], weights[-1]) for weights in wholes):
        raise Failure("wrong", "no weight moves")
    found: list[Any] = []
    for ((family, *_), record), (exact, *rounded) in zip(records.items(), references, strict=True):
        if not rounded:
            return Row(name, "same bits", 0.0, None, 0.0)
        for matrix, weights in record.weights.items():
            errors = _errors(weights, exact[matrix])
            rounding = np.max([_errors(draw[matrix], exact[matrix]) for draw in rounded], axis=0)
            excess = float(max(errors / (FACTOR * rounding + BFLOAT16)))
            found.append((excess, family, matrix, *map(float, (*errors, rounding[0]))))
    full, low = (max(one for one in found if one[1] == family) for family in FAMILIES)
    numbers = full[3], full[5], full[4]
    excess, family, matrix, error, scale, rounded_error = max(found)
    if excess <= 1:
        return Row(name, "equal up to rounding", *numbers, f"low rank: {low[3]:.1e} of {low[5]:.1e}")
    detail = f"{matrix}, {family}: update off by {error:.1e} (rounding {rounded_error:.1e})"
    return Row(name, "wrong", *numbers, f"{detail}, its norm by {scale:.1e}")


def _judge_polar(name: str, records: dict[Key, Record]) -> Row:
    """Compare the first update with the polar factor U·Vᵀ of the gradient U·Σ·Vᵀ, in float64.

    Five Newton–Schulz iterations with Jordan's coefficients bring all singular values of the normalised
    gradient into an interval [a, b]. Then the cosine of the angle to U·Vᵀ is at least 2·√(ab) / (a + b). The
    interval is widened by the rounding to bfloat16 of each iteration's three products, and begins at half of
    the smallest singular value. No singular value is further from the median than a from b.
    """
    rows = []
    record = next(record for (family, *_), record in records.items() if family == FAMILIES[0])
    for matrix, weights in record.weights.items():
        u, sigma, vt = np.linalg.svd(record.gradients[matrix][0], full_matrices=False)
        update = weights[1] - weights[0]
        values = np.linalg.svd(update, compute_uv=False)
        cosine = -(update * (u @ vt)).sum() / max(np.linalg.norm(values) * math.sqrt(len(sigma)), 1e-300)
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
        rows.append(Row(name, verdict, sine, largest, detail=detail))
    return max(rows, key=lambda row: (row.verdict == "wrong", row.update_error))
