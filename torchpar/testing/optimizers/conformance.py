# SPDX-License-Identifier: MIT
"""The table of an optimizer: a verdict for each situation."""

from collections.abc import Mapping
from typing import ClassVar

from torchpar.testing.rows import Table


class Conformance(Table):
    """The rows of an optimizer's table, which `str` prints."""

    COLUMNS: ClassVar[Mapping[str, str]] = {
        "situation": "name",
        "verdict": "outcome",
        "compared with": "compared_with",
        "update error": "update_error",
        "rounding": "rounding",
        "scale error": "scale_error",
        "detail": "detail",
    }

    @property
    def rows(self) -> list[dict[str, str | float | None]]:
        """The rows as dictionaries, for a CSV."""
        keys = [title.replace(" ", "_") for title in self.COLUMNS]
        return [{key: getattr(row, key) for key in keys} for row in self]

    @property
    def missing(self) -> str:
        return super().missing and f"none of {len(self)} situations was compared"

    def assert_conforms(self) -> None:
        """Raise an AssertionError that shows the faulty rows, or that no row is right."""
        if faulty := Conformance(self.faulty):
            raise AssertionError(f"{len(faulty)} of {len(self)} situations are faulty\n{faulty}")
        if self.missing:
            raise AssertionError(f"{self.missing}\n{self}")
