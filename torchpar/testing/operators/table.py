# SPDX-License-Identifier: MIT
"""The table of an operator: an outcome for each rule."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from textwrap import shorten

from torchpar.console import in_columns
from torchpar.testing.operators.attempts import OUTCOMES

LONGEST = 120  # characters of a message that is printed


@dataclass(frozen=True)
class RuleResult:
    """The outcome of a rule.

    Attributes:
        outcome: the worst outcome over all samples; export and Inductor try the first sample only.
            "works"; "falls back", if the result is right, but was computed without the operator;
            "refuses", by an error with a message; "wrong"; "crashes", by any other error; or "not
            run".
        detail: a message, or a remark.
        sample: the index of the first sample with this outcome.
    """

    rule: str
    outcome: str
    detail: str = ""
    sample: int = 0


@dataclass(frozen=True)
class OperatorTable:
    """The rows of an operator's table, which `str` prints.

    ``table["values"].outcome`` is the outcome of the row "values".

    Attributes:
        played: whether C++ plays the operator's calls on a GPU, and why not; "" for an operator
            that `torchpar.library` did not make.
        notes: sentences on what no row has tried, such as kernels for a GPU on a machine without.
    """

    name: str
    rows: list[RuleResult]
    notes: tuple[str, ...] = ()
    played: str = ""

    @property
    def ok(self) -> bool:
        """Whether no row is wrong or crashes."""
        return not any(row.outcome in ("wrong", "crashes") for row in self.rows)

    def __getitem__(self, rule: str) -> RuleResult:
        return {row.rule: row for row in self.rows}[rule]

    def __str__(self) -> str:
        table = [["rule", "outcome", "sample", "detail"]]
        table += [[row.rule, row.outcome, str(row.sample), _cut(row.detail)] for row in self.rows]
        played = [self.played] if self.played else []
        return "\n".join([self.name, in_columns(table), *played, *self.notes])

    def as_dict(self) -> dict[str, object]:
        """The table as JSON objects: ``name``, ``ok``, ``rows``, ``played`` and ``notes``."""
        found = asdict(self)
        return {
            "name": found["name"],
            "ok": self.ok,
            "rows": found["rows"],
            "played": self.played,
            "notes": list(self.notes),
        }


def worst_of(rows: Sequence[RuleResult]) -> RuleResult:
    return max(rows, key=lambda row: (OUTCOMES.index(row.outcome), -row.sample))


def _cut(detail: str) -> str:
    """A message of one line, cut where it is long. A short cause, or remedy, at its end stays."""
    message, mark, cause = detail.rpartition("; ")
    room = LONGEST - len(mark + cause)
    if len(detail) > LONGEST and mark and room > LONGEST // 3:
        return shorten(message, room, placeholder="…") + mark + " ".join(cause.split())
    return shorten(detail, LONGEST, placeholder="…")
