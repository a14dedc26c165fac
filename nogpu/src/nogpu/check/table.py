# SPDX-License-Identifier: MIT
"""The table of a kernel: an outcome for each row."""

from dataclasses import dataclass
from functools import partial
from textwrap import shorten

from nogpu.console import in_columns

LONGEST = 110  # characters of a message that is printed


@dataclass(frozen=True)
class Row:
    """A row of a kernel's table.

    Attributes:
        name: such as "values" or "races".
        outcome: "works"; "wrong"; "refuses", by an error with a message; "crashes", by any other
            error; or "not run".
        detail: a message, or a remark.
    """

    name: str
    outcome: str
    detail: str = ""


@dataclass(frozen=True)
class KernelTable:
    """The rows of a kernel's table, which `str` prints.

    ``table["values"].outcome`` is the outcome of the row "values".
    """

    name: str
    rows: list[Row]

    @property
    def ok(self) -> bool:
        """Whether no row is wrong or crashes."""
        return not any(row.outcome in ("wrong", "crashes") for row in self.rows)

    def __getitem__(self, name: str) -> Row:
        return {row.name: row for row in self.rows}[name]

    def __str__(self) -> str:
        cut = partial(shorten, width=LONGEST, placeholder="…")
        table = [["row", "outcome", "detail"]]
        table += [[row.name, row.outcome, cut(row.detail)] for row in self.rows]
        return "\n".join([self.name, in_columns(table)])
