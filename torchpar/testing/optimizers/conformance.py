# SPDX-License-Identifier: MIT
"""The table of an optimizer: a verdict for each situation."""

from dataclasses import asdict, dataclass

from torchpar.console import in_columns

RIGHT = ("same bits", "equal up to rounding")
FAULTS = ("wrong", "hangs", "crashes")


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
