# SPDX-License-Identifier: MIT
"""Rows and tables of the kits: an outcome for each rule of an operator, or for each situation."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from textwrap import shorten
from typing import ClassVar, SupportsIndex, overload

from torchpar.console import in_columns

FAULTS = ("wrong", "hangs", "crashes")
# Outcomes of rows that compared something.
COMPARED = ("works", "falls back", "same bits", "equal up to rounding", "wrong")


@dataclass(frozen=True)
class Row:
    """The outcome of an operator by one rule, or of an optimizer in one situation.

    Attributes:
        name: the rule or the situation. The properties `rule` and `situation` are the same.
        outcome: of a rule the worst outcome over all samples; export and Inductor try the first
            sample only. "works"; "falls back", if the result is right, but was computed without
            the operator; "refuses", by an error with a message; "wrong"; "crashes", by any other
            error; or "not run". Of a situation "same bits", "equal up to rounding", "refuses",
            "wrong", "hangs", "crashes" or "not applicable"; `verdict` is the same.
        compared_with: the reference of an optimizer: its own step on unsharded matrices, also a
            formula in float64, or the polar factor. Empty if nothing was compared.
        update_error: ‖Δ − Δ_ref‖ / ‖Δ_ref‖ of the worst matrix, with gradients of full rank. For
            the polar factor, the sine of the angle.
        rounding: the change of Δ_ref that rounding the gradients makes. For the polar factor, the
            largest sine that is right.
        scale_error: |‖Δ‖ / ‖Δ_ref‖ − 1| of the same matrix.
        detail: a message, or a remark.
        sample: the index of the first sample with this outcome.
    """

    name: str
    outcome: str
    compared_with: str = ""
    update_error: float | None = None
    rounding: float | None = None
    scale_error: float | None = None
    detail: str = ""
    sample: int = 0

    @property
    def rule(self) -> str:
        return self.name

    @property
    def situation(self) -> str:
        return self.name

    @property
    def verdict(self) -> str:
        return self.outcome


class Table(list[Row]):
    """The rows of a kit's table, which `str` prints.

    ``table["whole"].outcome`` is the outcome of the row "whole".
    """

    # The columns that are printed, and the attributes of a row that they show.
    COLUMNS: ClassVar[Mapping[str, str]]
    LONGEST: ClassVar[float] = math.inf  # characters of a detail that is printed

    @property
    def faulty(self) -> list[Row]:
        """The rows that are wrong, hang or crash."""
        return [row for row in self if row.outcome in FAULTS]

    @property
    def missing(self) -> str:
        """A sentence on what no row has compared; "" if nothing is missing."""
        if any(row.outcome in COMPARED for row in self):
            return ""
        return f"none of {len(self)} rows compared a result"

    @property
    def ok(self) -> bool:
        """Whether no row is wrong, hangs or crashes, and no comparison is `missing`."""
        return not self.faulty and not self.missing

    @overload
    def __getitem__(self, key: SupportsIndex, /) -> Row: ...

    @overload
    def __getitem__(self, key: slice, /) -> list[Row]: ...

    @overload
    def __getitem__(self, key: str, /) -> Row: ...

    def __getitem__(self, key: SupportsIndex | slice | str, /) -> Row | list[Row]:
        if isinstance(key, str):
            return {row.name: row for row in self}[key]
        return super().__getitem__(key)

    def __str__(self) -> str:
        cells = [[self._cell(getattr(row, of)) for of in self.COLUMNS.values()] for row in self]
        return in_columns([list(self.COLUMNS), *cells])

    def _cell(self, value: object) -> str:
        if isinstance(value, float):
            return f"{value:.1e}" if value else "0"
        text = "" if value is None else str(value)
        return text if len(text) <= self.LONGEST else _cut(text, int(self.LONGEST))


def _cut(detail: str, longest: int) -> str:
    """A message, cut to one line. A short cause, or remedy, at its end stays."""
    message, mark, cause = detail.rpartition("; ")
    room = longest - len(mark + cause)
    if mark and room > longest // 3:
        return shorten(message, room, placeholder="…") + mark + " ".join(cause.split())
    return shorten(detail, longest, placeholder="…")
