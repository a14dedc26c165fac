# SPDX-License-Identifier: MIT
"""Pictures of matplotlib's within pages, legible in light and in the dark."""

import io
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#010203"  # stands for the page's color of text, which is another one in the dark


class Drawing:
    """A picture of matplotlib's as an SVG, whose text has the color of the page's.

    Attributes:
        axes: to draw on, while the context is active.
        svg: the picture, afterwards.
    """

    number = 0  # of the drawings; an SVG's names differ from those of the others on the page

    def __init__(self, width: float, height: float, rows: int = 1):
        self.size, self.rows = (width, height), rows
        self.axes: list[Axes] = []
        self.svg = ""

    def __enter__(self) -> "Drawing":
        import matplotlib
        from matplotlib.figure import Figure

        Drawing.number += 1
        self._style = matplotlib.rc_context(
            {
                "text.color": INK,
                "axes.edgecolor": INK,
                "axes.labelcolor": INK,
                "xtick.color": INK,
                "ytick.color": INK,
                "axes.facecolor": "none",
                "font.size": 9,
                "legend.facecolor": "none",
                "svg.fonttype": "none",
                "svg.hashsalt": f"nogpu {Drawing.number}",
            }
        )
        self._style.__enter__()
        self.figure = Figure(figsize=self.size, layout="constrained")
        self.axes = list(self.figure.subplots(self.rows, 1, squeeze=False).flat)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            file = io.StringIO()
            metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            self.figure.savefig(file, format="svg", transparent=True, metadata=metadata)
            text = file.getvalue()
            self.svg = text[text.index("<svg") :].replace(INK, "currentColor")
        self._style.__exit__(kind, error, trace)
