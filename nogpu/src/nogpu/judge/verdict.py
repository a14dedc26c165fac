# SPDX-License-Identifier: MIT
"""The verdict on a candidate: a table of what was asked, figures, and one word."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nogpu.check.compare import chain_error, difference, farthest
from nogpu.check.table import Row
from nogpu.console import in_columns
from nogpu.judge.problem import Right, same

WORDS = ("right", "wrong", "cheats", "does not run", "stopped")


@dataclass
class Verdict:
    """The verdict on a candidate.

    Attributes:
        word: one of `WORDS`.
        rows: what was asked. Outcomes are "works", "wrong", "cheats", "refuses" and "not run".
        figures: counters, the least that the problem takes, and estimated times, by their names.
    """

    candidate: str
    word: str = "right"
    rows: list[Row] = field(default_factory=list)
    figures: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return self.word == "right"

    def add(self, name: str, outcome: str, detail: str = "") -> None:
        """Add a row; the first one that is no "works" decides the word, and a cheat always does."""
        self.rows.append(Row(name, outcome, detail))
        if outcome == "cheats" or (outcome == "wrong" and self.word == "right"):
            self.word = outcome

    def end(self, word: str, why: str) -> "Verdict":
        """Return the verdict on a candidate that has no results."""
        self.rows.append(Row("runs", "wrong", why))
        self.word = word
        return self

    @property
    def reason(self) -> str:
        """The first row that is not right, as a line; "" if all are."""
        wanted = self.word if self.word in ("wrong", "cheats") else "wrong"
        return next((f"{row.name}: {row.detail}" for row in self.rows if row.outcome == wanted), "")

    def __str__(self) -> str:
        head = f"{self.candidate}: {self.word}{f': {self.reason}' if self.reason else ''}"
        table = [["asked", "outcome", "detail"]]
        table += [[row.name, row.outcome, row.detail] for row in self.rows]
        figures = [[name, text] for name, text in self.figures.items()]
        return "\n".join([head, in_columns(table), *([in_columns(figures)] if figures else [])])

    def as_json(self) -> dict[str, Any]:
        rows = [{"asked": r.name, "outcome": r.outcome, "detail": r.detail} for r in self.rows]
        return {
            "candidate": self.candidate,
            "verdict": self.word,
            "reason": self.reason,
            "rows": rows,
            "figures": self.figures,
        }


def wrong(
    outputs: Sequence[Any],
    native: Right,
    exact: Right | None,
    near: Right | None,
    given: Sequence[Any],
) -> str:
    """Return how results differ from the right ones; "" if they do not.

    An error against float64 may be twice that of the reference in the candidate's own precision,
    and four roundings of the largest number: by the PTX ISA `ex2.approx` and `div.full`, which
    Triton's exp and division become, may each be off by two. Where sums of float32 are long, an
    error may also be that of a plain loop: see `nogpu.check.compare.chain_error`. It may be twice
    what such a rounding of the inputs changes, too, as where a mean is subtracted from equal
    numbers.

    Args:
        exact: by float64; None: the reference has no such result, and its own counts as exact.
        near: the same for inputs that differ by a rounding.
        given: the leaves of the inputs.
    """
    if len(outputs) != len(native.outputs):
        return f"it returns {len(outputs)} results, expected {len(native.outputs)}"
    operands = [one for one in given if isinstance(one, Tensor)]
    best = native if exact is None else exact
    also = best if near is None else near
    results = outputs, native.outputs, best.outputs, also.outputs
    for n, of_one in enumerate(zip(*results, strict=True)):
        if found := _unlike(*of_one, operands):
            return f"result {n + 1}: {found}" if len(outputs) > 1 else found
    return ""


def _unlike(mine: Any, right: Any, exact: Any, near: Any, operands: Sequence[Tensor]) -> str:
    if not isinstance(right, Tensor):
        return "" if mine == right else f"is {mine!r}, expected {right!r}"
    if not isinstance(mine, Tensor):  # of another type its name has travelled
        return f"is {mine if isinstance(mine, str) else type(mine).__name__}, expected a tensor"
    if mine.shape != right.shape:
        return f"has the shape {tuple(mine.shape)}, expected {tuple(right.shape)}"
    if mine.dtype != right.dtype:
        return f"is {mine.dtype}, expected {right.dtype}"
    return _off(mine, right, exact, near, operands)


def _off(
    mine: Tensor, right: Tensor, exact: Tensor, near: Tensor, operands: Sequence[Tensor]
) -> str:
    if not (mine.is_floating_point() or mine.is_complex()):
        return "" if torch.equal(mine, right) else farthest(mine, right)
    if not mine.numel():
        return ""
    kind = torch.complex128 if mine.is_complex() else torch.float64
    a, b, e = (t.to(kind) for t in (mine, right, exact))
    finite = b.isfinite() & e.isfinite()
    # Where the reference is not finite: NaN and infinities as it has them, or as float64 has.
    alike = [(a == one) | (a.isnan() & one.isnan()) for one in (b, e)]
    odd = ~finite & ~(alike[0] | alike[1] | (e.isfinite() & a.isfinite()))
    if bool((odd | (finite & ~a.isfinite())).any()):
        return difference(mine, right)
    if not finite.any():
        return ""
    error, theirs = ((t - e)[finite].abs().max().item() for t in (a, b))
    size, eps = e[finite].abs().max().item(), torch.finfo(mine.dtype).eps
    if mine.dtype.itemsize == 2:
        limit = 2 * max(theirs, eps / 2 * size)
    else:
        limit = 2 * theirs + 4 * eps * size
        if theirs > eps / 2 * size and mine.dtype != torch.float64:  # sums, by their rounding
            limit = max(limit, chain_error(operands) * size)
    limit = max(limit, 2 * (near.to(kind) - e)[finite].abs().nan_to_num(0).max().item())
    if error <= limit:
        return ""
    return (
        f"an error of {error:.1e}, at most {limit:.1e} by twice that of the reference: "
        f"{farthest(a, e)}"
    )


def unwritten_inputs(before: Sequence[Any], after: Sequence[Any], changed: Sequence[int]) -> str:
    """Return which inputs were written that the reference leaves alone; "" if none were."""
    for n, (one, other) in enumerate(zip(before, after, strict=True)):
        if isinstance(one, Tensor) and n not in changed and not same(one, other):
            return f"input {n + 1} was written: {farthest(other, one)}"
    return ""
