# SPDX-License-Identifier: MIT
"""Compare an optimizer in many situations with its own step on whole matrices, and judge the differences."""

import dis
import math
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchpar.errors import ConfigError
from torchpar.testing.ranks import Ranks
from torchpar.testing.situations import SITUATIONS, Situation
from torchpar.testing.trial import FAMILIES, Layers, Make, NotApplicable, Record, Trial, named_weights

Verdict = Literal[
    "same bits", "equal up to rounding", "refuses", "wrong", "hangs", "crashes", "not applicable"
]
FAULTS = ("wrong", "hangs", "crashes")
GRACE = 5.0  # seconds for the other ranks, once one has failed
DRAWS = 8  # of perturbed gradients
# Products of an iteration that ranks sum in bfloat16 are rounded, too, where the yardstick rounds the gradient alone.
FACTOR = 4.0
BFLOAT16 = float(torch.finfo(torch.bfloat16).eps)
PRODUCTS = 3 * BFLOAT16 / 2  # the rounding of the three products of an iteration
JORDAN = (3.4445, -4.7750, 2.0315)
TINY = float(np.finfo(np.float64).tiny)

Key = tuple[str, ...]  # the family of gradients, and the names of matrices
Weights = dict[str, list[np.ndarray]]


class Distance(NamedTuple):
    """How far updates are from others: the relative error, and that of their norm."""

    error: float
    scale: float



@dataclass(frozen=True)
class Row:
    """The verdict on an optimizer in one situation.

    Attributes:
        update_error: ‖Δ − Δ_ref‖ / ‖Δ_ref‖ of the worst matrix, of gradients of full rank.
        rounding: the same for the reference, if its gradients are rounded to bfloat16.
        scale_error: the largest |‖Δ‖ / ‖Δ_ref‖ − 1|.
        detail: a message, or what is wrong.
    """

    situation: str
    verdict: Verdict
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

    def assert_conforms(self, allow_refusals: bool = True) -> None:
        """Raise an AssertionError that shows the faulty rows: wrong, hangs or crashes.

        Args:
            allow_refusals: whether an optimizer may refuse a situation.
        """
        faults = FAULTS if allow_refusals else (*FAULTS, "refuses")
        if faulty := Conformance(row for row in self if row.verdict in faults):
            raise AssertionError(f"{len(faulty)} of {len(self)} situations are faulty\n{faulty}")

    def __str__(self) -> str:
        table = [("situation", "verdict", "update error", "rounding", "scale error", "detail")]
        table += [
            (row.situation, row.verdict, *map(_number, (row.update_error, row.rounding, row.scale_error)), row.detail)
            for row in self
        ]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in table]
        return "\n".join(line.rstrip() for line in lines)


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:.1e}" if x else "0"


def check_optimizer(
    make: Make,
    situations: Iterable[str] | None = None,
    *,
    timeout: float = 60.0,
    seed: int = 0,
    orthogonal: bool = True,
) -> Conformance:
    """Try an optimizer in many situations, on gloo ranks on this machine's CPU.

    An update Δ of each situation is compared with that of the same optimizer's step on whole matrices, on one
    process, with the same gradients. It may differ by what rounding the gradients to bfloat16 changes.

    Args:
        make: returns the optimizer of a model, whose parameters are hidden matrices: a module-level function
            or class, or a `functools.partial` of one. A situation that is about ``views``, ``nesterov`` or
            ``process_group`` passes it, if ``make`` has such an argument.
        situations: names from `SITUATIONS`; by default all.
        timeout: seconds for each situation, after which its ranks hang.
        seed: of weights and gradients.
        orthogonal: whether to try what holds only for optimizers that orthogonalise.

    Raises:
        ConfigError: an unknown situation; ``make`` cannot be pickled.
    """
    names = list(SITUATIONS if situations is None else situations)
    if unknown := [name for name in names if name not in SITUATIONS]:
        raise ConfigError(f"situation {unknown[0]!r}, expected one of {', '.join(SITUATIONS)}")
    wrong = "make cannot be pickled for the ranks, which are processes; expected a module-level function or class, "
    wrong += "or a functools.partial of one"
    try:
        made = pickle.dumps(make)
    except (pickle.PicklingError, AttributeError, TypeError) as e:
        raise ConfigError(f"{wrong} ({e})") from e
    with Ranks() as ranks:
        try:
            ranks(1, _load, made)
        except Exception as e:
            raise ConfigError(f"{wrong} ({e})") from e
        return Conformance(
            _row(ranks, name, made, timeout, seed)
            for name in names
            if orthogonal or not SITUATIONS[name].orthogonal
        )


def _load(made: bytes) -> None:
    pickle.loads(made)


def _row(ranks: Ranks, name: str, made: bytes, timeout: float, seed: int) -> Row:
    situation, merged = SITUATIONS[name], dict[Key, Record]()
    with TemporaryDirectory() as folder:
        for phase, world_size in enumerate(situation.ranks):
            outcomes = ranks.outcomes(
                world_size, _try, name, made, seed, folder, phase, timeout=timeout, grace=GRACE
            )
            if failed := _failure(outcomes, situation):
                return Row(name, failed[0], detail=failed[1])
            if apart := _merge(merged, outcomes):
                return Row(name, "wrong", detail=f"the ranks' values of the same matrix differ by {apart:.1e}")
    if situation.polar:
        return _judge_polar(name, merged)
    outcomes = ranks.outcomes(1, _follow, made, list(merged.values()), timeout=timeout)
    if failed := _failure(outcomes, situation):
        return Row(name, failed[0], detail=f"on whole matrices: {failed[1]}")
    return _judge(name, merged, outcomes[0])


# On the ranks


class Failure(Exception):
    """An error in a form that travels between processes: a verdict, and a message."""


@contextmanager
def _failures() -> Iterator[None]:
    try:
        yield
    except NotApplicable as e:
        raise Failure("not applicable", str(e)) from None
    except Exception as e:
        message = " ".join(f"{type(e).__name__}: {e}".split())[:300]
        lost = "gloo/transport" in message  # another rank has ended
        raise Failure("hangs" if lost else "refuses" if _refuses(e) else "crashes", message) from None


def _refuses(error: Exception) -> bool:
    """Whether an error is a refusal: raised on purpose, and not within PyTorch if it is a RuntimeError."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    assert frame is not None
    module = frame.tb_frame.f_globals.get("__name__", "")
    own = not module.startswith("torch.") or module.startswith("torch.optim.")
    kinds = (ValueError, TypeError, NotImplementedError, *[RuntimeError] * own)
    opcode = frame.tb_frame.f_code.co_code[frame.tb_lasti]
    return isinstance(error, kinds) and opcode == dis.opmap["RAISE_VARARGS"]


def _try(name: str, made: bytes, seed: int, folder: str, phase: int) -> dict[str, Record]:
    """Train in a situation on this rank, with each family of gradients."""
    records = {}
    with _failures():
        for family in FAMILIES:
            trial = Trial(pickle.loads(made), family, seed, Path(folder) / family, phase)
            SITUATIONS[name].run(trial)
            records[family] = trial.record
    return records


def _follow(made: bytes, records: list[Record]) -> list[list[Weights]]:
    """The weights of the same steps on whole matrices, first with the same gradients, then with rounded ones."""
    with _failures():
        return [[_weights(pickle.loads(made), record, draw) for draw in range(DRAWS + 1)] for record in records]


def _weights(make: Make, record: Record, draw: int) -> Weights:
    torch.manual_seed(draw)
    model = Layers({name: torch.from_numpy(of[0]).to(record.dtype) for name, of in record.weights.items()})
    optimizer = make(model, **record.options)
    weights: Weights = {name: [of[0]] for name, of in record.weights.items()}
    for step in range(len(next(iter(record.gradients.values())))):
        optimizer.zero_grad()
        gradients = [torch.from_numpy(of[step]) for of in record.gradients.values()]
        gradients = [_rounded(g) if draw else g for g in gradients]
        params = [p for _, p in named_weights(model)]
        # A backward pass, because an optimizer may have hooks in it.
        torch.autograd.backward(params, [g.to(record.dtype) for g in gradients])
        optimizer.step()
        for name, p in named_weights(model):
            weights[name].append(p.detach().double().numpy().copy())
    return weights


def _rounded(g: Tensor) -> Tensor:
    """``g`` with an error of one rounding to bfloat16; g may be of bfloat16, which rounding alone leaves as it is."""
    return g * (1 + BFLOAT16 * (torch.rand_like(g) - 0.5))


# On the process that asks


def _failure(outcomes: list[Any], situation: Situation) -> tuple[Verdict, str] | None:
    """The verdict on errors and hanging ranks, and a message; None if no rank has failed."""
    by_verdict: dict[Any, dict[int, str]] = {}
    for rank, outcome in enumerate(outcomes):
        if isinstance(outcome, BaseException):
            verdict, message = "crashes", f"{type(outcome).__name__}: {outcome}"
            if isinstance(outcome, TimeoutError):
                verdict = "hangs"
            elif isinstance(outcome, Failure):
                verdict, message = outcome.args
            by_verdict.setdefault(verdict, {})[rank] = message
    for verdict in ("not applicable", "crashes", "refuses", "hangs"):
        if verdict in by_verdict:
            rank, message = next(iter(by_verdict[verdict].items()))
            alone = len(by_verdict[verdict]) < len(outcomes)
            if verdict == "refuses" and alone and not situation.one_may_refuse:
                others = "the others hang" if "hangs" in by_verdict else "not on all"
                return "hangs" if "hangs" in by_verdict else "wrong", f"refuses on rank {rank}, {others}: {message}"
            return verdict, f"on rank {rank}: {message}" if alone else message
    return None


def _merge(merged: dict[Key, Record], outcomes: list[dict[str, Record]]) -> float:
    """Add the records of a phase; returns by how much ranks differ that have the same matrices."""
    of_phase: dict[Key, Record] = {}
    apart = 0.0
    for of_rank in outcomes:
        for family, record in of_rank.items():
            first = of_phase.setdefault((family, *record.weights), record)
            for name, weights in record.weights.items():
                if not np.array_equal(first.weights[name], weights, equal_nan=True):
                    apart = max(apart, _distance(weights, first.weights[name]).error)
    for key, record in of_phase.items():
        if key in merged:
            for name, weights in record.weights.items():
                merged[key].weights[name] += weights[1:]
                merged[key].gradients[name] += record.gradients[name]
        else:
            merged[key] = record
    return apart


def _distance(weights: list[np.ndarray], reference: list[np.ndarray]) -> Distance:
    """The largest errors of the updates of all steps."""
    updates, expected = np.diff(weights, axis=0), np.diff(reference, axis=0)
    errors, scales = [0.0], [0.0]
    for update, right in zip(updates, expected, strict=True):
        size = np.linalg.norm(right)
        if not np.array_equal(update, right):
            errors.append(float(np.linalg.norm(update - right) / size) if size else math.inf)
            scales.append(float(abs(np.linalg.norm(update) / size - 1)) if size else math.inf)
    # NaN is no number to compare.
    return Distance(*(max(math.inf if math.isnan(x) else x for x in of) for of in (errors, scales)))


def _judge(name: str, merged: dict[Key, Record], references: list[list[Weights]]) -> Row:
    """Judge each matrix by its own yardstick; the row shows the worst of full rank."""
    worst: dict[str, tuple[float, Distance, Distance, str]] = {}
    same_bits = True
    for ((family, *_), record), (exact, *rounded) in zip(merged.items(), references, strict=True):
        for matrix, weights in record.weights.items():
            found = _distance(weights, exact[matrix])
            same_bits &= np.array_equal(weights, exact[matrix])
            draws = [_distance(draw[matrix], exact[matrix]) for draw in rounded]
            rounding = Distance(*map(max, zip(*draws, strict=True)))
            excess = max(
                found.error / max(FACTOR * rounding.error, TINY),
                found.scale / (FACTOR * rounding.scale + BFLOAT16),
            )
            worst[family] = max(worst.get(family, (-1.0,)), (excess, found, rounding, matrix))
    full, low = (worst[family] for family in FAMILIES)
    _, found, rounding, _ = full
    numbers = found.error, rounding.error, found.scale
    if same_bits:
        return Row(name, "same bits", *numbers)
    low_rank = f"low rank: {_number(low[1].error)}, rounding {_number(low[2].error)}"
    family, (excess, found, _, matrix) = max(worst.items(), key=lambda item: item[1][0])
    if excess <= 1:
        return Row(name, "equal up to rounding", *numbers, low_rank)
    wrong = f"{matrix}, {family}: the update is off by {found.error:.1e}, its norm by {found.scale:.1e}"
    return Row(name, "wrong", *numbers, f"{wrong}; {low_rank}")


def _judge_polar(name: str, merged: dict[Key, Record]) -> Row:
    """Compare the first update with U·Vᵀ of the gradient U·Σ·Vᵀ, in float64.

    The bound is what five Newton–Schulz iterations with Jordan's coefficients guarantee: they bring all
    singular values of the normalised gradient into an interval [a, b], and then the cosine of the angle to
    U·Vᵀ is at least 2·√(ab) / (a + b). Half of the smallest singular value is what rounding to bfloat16 leaves
    of it at least.
    """
    rows = []
    record = next(record for (family, *_), record in merged.items() if family == FAMILIES[0])
    for matrix, weights in record.weights.items():
        update, (u, sigma, vt) = np.diff(weights, axis=0)[0], np.linalg.svd(
            record.gradients[matrix][0], full_matrices=False
        )
        values = np.linalg.svd(update, compute_uv=False)
        cosine = float(-(update * (u @ vt)).sum() / (np.linalg.norm(values) * math.sqrt(len(sigma)) or 1))
        a, b = np.array([sigma[-1] / 2, sigma[0]]) / np.linalg.norm(sigma)
        for _ in range(5):
            x = np.geomspace(a * (1 - PRODUCTS), b * (1 + PRODUCTS), 1000)
            x = JORDAN[0] * x + JORDAN[1] * x**3 + JORDAN[2] * x**5
            a, b = x.min(), x.max()
        bound = 2 * math.sqrt(a * b) / (a + b)
        low, high = (float(of(values) / np.median(values)) for of in (np.min, np.max))
        detail = f"{matrix}: cosine {cosine:.3f}, expected {bound:.3f}; singular values {low:.2f} to {high:.2f} of the median"
        is_right = cosine >= bound and values[-1] >= a / b * values[0]
        errors = [math.sqrt(max(1 - cos**2, 0)) for cos in (cosine, bound)]
        rows.append(Row(name, "equal up to rounding" if is_right else "wrong", *errors, detail=detail))
    return max(rows, key=lambda row: (row.verdict == "wrong", row.update_error))
