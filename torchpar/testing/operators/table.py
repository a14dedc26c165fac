# SPDX-License-Identifier: MIT
"""The table of an operator: an outcome for each rule."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torchpar.testing.operators.attempts import OUTCOMES
from torchpar.testing.rows import Row, Table


class OperatorTable(Table):
    """The rows of an operator's table, which `str` prints.

    ``table["values"].outcome`` is the outcome of the row "values".

    Attributes:
        name: the operator's name.
        notes: sentences on the reference that was taken, and on what no row has tried, such as
            kernels for a GPU on a machine without.
        played: whether C++ plays the operator's calls on a GPU, and why not; "" for an operator
            that `torchpar.library` did not make.
    """

    COLUMNS: ClassVar[Mapping[str, str]] = {
        "rule": "name",
        "outcome": "outcome",
        "sample": "sample",
        "detail": "detail",
    }
    LONGEST: ClassVar[float] = 120

    def __init__(
        self,
        name: str,
        rows: Sequence[Row],
        notes: Sequence[str] = (),
        played: str = "",
        missing: str = "",
    ) -> None:
        super().__init__(rows)
        self.name, self.notes, self.played = name, tuple(notes), played
        self._missing = missing

    @property
    def rows(self) -> list[Row]:
        return list(self)

    @property
    def missing(self) -> str:
        """A sentence on what no row has compared, a result or a gradient; or ""."""
        return super().missing or self._missing

    def __str__(self) -> str:
        others = [*filter(None, [self.played]), *self.notes, *filter(None, [self.missing])]
        return "\n".join([self.name, super().__str__(), *others])

    def as_dict(self) -> dict[str, object]:
        """The table as JSON objects: ``name``, ``ok``, ``rows``, ``played``, ``notes`` and
        ``missing``."""
        keys = ("rule", "outcome", "detail", "sample")
        return {
            "name": self.name,
            "ok": self.ok,
            "rows": [{key: getattr(row, key) for key in keys} for row in self],
            "played": self.played,
            "notes": list(self.notes),
            "missing": self.missing,
        }


def worst_of(rows: Sequence[Row]) -> Row:
    return max(rows, key=lambda row: (OUTCOMES.index(row.outcome), -row.sample))
