# SPDX-License-Identifier: MIT
"""Draw which thread of `maximum` loads which numbers: ``PYTHONPATH=. python docs/threads.py``.

The loads are those of the compiled PTX, as they are executed.
"""

from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

import torchpar
from nogpu import emulate
from nogpu.machine.memory import Space
from nogpu.native import core as native

PICTURE = Path(__file__).parent / "operators" / "threads-maximum.png"
COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red")  # of warp 0, 1, …


class Load(NamedTuple):
    """A load of a thread: ``count`` numbers from the ``first`` one on."""

    program: int
    thread: int
    first: int
    count: int


def loads(numbers: int) -> list[Load]:
    """The loads of operand a by `maximum` of two vectors of ``numbers`` float32, in their order."""
    a, b = torch.randn(numbers), torch.randn(numbers)
    found: list[Load] = []
    load = Space.load

    def note(space: Space, warp: Any, addresses: Any, width: int, *rest: Any, **how: Any) -> Any:
        first = (addresses.astype("int64") - a.data_ptr()) // a.element_size()
        for lane, position in zip(warp.lanes().tolist(), first.tolist(), strict=True):
            if 0 <= position < numbers:
                thread = 32 * warp.index + lane
                program = warp.block.position[0]
                found.append(Load(program, thread, position, width // a.element_size()))
        return load(space, warp, addresses, width, *rest, **how)

    # Python executes all loads: the core in C tells nobody of them.
    in_python = patch.object(native, "library", lambda: None)
    with emulate("sm_90"), in_python, patch.object(Space, "load", note):
        torchpar.maximum(a, b)
    return found


def draw(path: Path) -> None:
    found = loads(4096)
    last = max(one.first + one.count for one in found)
    with plt.rc_context({"font.size": 9}):
        figure, (whole, near) = plt.subplots(2, figsize=(6.4, 3.6), layout="constrained")
        _draw_rows(whole, found, last)
        whole.set_title("Programs and warps: who loads which numbers of a")
        whole.set_xlabel("number of the vector")
        nearest = [one for one in found if one.first < 32]
        _draw_rows(near, nearest, 32)
        for one in nearest:
            middle = one.first + one.count / 2
            near.text(middle, 0, f"thread {one.thread}", ha="center", va="center", fontsize=8)
        near.set_title("The first 32 of them: a thread loads 4 side by side, 16 bytes at a time")
        near.set_xlabel("number of the vector")
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _draw_rows(axes: Axes, found: list[Load], last: int) -> None:
    """Draw a row for each program: which numbers it loads, in the color of the warp."""
    programs = sorted({one.program for one in found})
    for one in found:
        place = one.first, one.program - 0.4
        color = COLORS[one.thread // 32 % len(COLORS)]
        is_few = last <= 64
        edge = "white" if is_few else color
        axes.add_patch(Rectangle(place, one.count, 0.8, facecolor=color, edgecolor=edge, alpha=0.8))
    axes.set(xlim=(0, last), ylim=(programs[-1] + 0.6, programs[0] - 0.6))
    axes.set_yticks(programs, [f"program {program}" for program in programs])
    warps = sorted({one.thread // 32 for one in found})
    for warp in warps:
        axes.plot([], [], "s", color=COLORS[warp % len(COLORS)], label=f"warp {warp}")
    if len(warps) > 1:
        axes.legend(ncols=len(warps), fontsize=7, loc="upper right", framealpha=0.9)


if __name__ == "__main__":
    draw(PICTURE)
