# SPDX-License-Identifier: MIT
"""Draw one tile of `matmul_t` as a timeline: ``PYTHONPATH=.:tests python docs/timeline.py``.

`nogpu.machine.trace` says what the time is.
"""

from pathlib import Path

import kernel_cases as cases
import matplotlib.pyplot as plt
from launching import Gpu

from nogpu.machine.gpu_state import SCHEDULES
from nogpu.machine.trace import Trace
from torchpar.kernels.rule import Tiles

PICTURE = Path(__file__).parent / "operators" / "timeline-matmul_t.png"
TILES = Tiles(128, 256, 64, 8, 4, "tma")
STEPS = 6
KINDS = {"a bulk load": "load", "a product": "multiply", "a bulk store": "store"}


def spans() -> dict[str, list[tuple[int, int, int]]]:
    """For each kind of operations of the first block: warp, begin and end."""
    case = cases.symmetric(2 * TILES.block_m, STEPS * TILES.block_k, tiles=TILES, multiprocessors=2)
    gpu = Gpu(SCHEDULES[0])
    gpu.trace = Trace()
    case.execute(gpu)
    found: dict[str, list[tuple[int, int, int]]] = {what: [] for what in KINDS.values()}
    for span in gpu.trace.spans:
        if span.what in KINDS and span.end is not None:
            found[KINDS[span.what]].append((span.warp, span.begin, span.end))
    return found


def draw(path: Path) -> None:
    found = spans()
    with plt.rc_context({"font.size": 9}):
        figure, axes = plt.subplots(figsize=(4.6, 3.0), layout="constrained")
        rows: list[str] = []

        def bar(row: str, begin: int, end: int, color: str, text: str) -> None:
            if row not in rows:
                rows.append(row)
            y = rows.index(row)
            axes.barh(y, end - begin, left=begin, height=0.8, color=color, edgecolor="white")
            axes.text((begin + end) / 2, y, text, ha="center", va="center", fontsize=8)

        # Two loads, of A and of B, make a step.
        for step, (_, begin, end) in enumerate(found["load"][::2]):
            bar(f"load, stage {step % TILES.num_stages}", begin, end, "tab:blue", str(step))
        # All warps multiply at the same time. The next products begin before the last ones have
        # ended.
        products = [(begin, end) for warp, begin, end in found["multiply"] if warp == 0]
        of_a_step = len(products) // STEPS
        for step in range(STEPS):
            (begin, _), (_, end) = products[step * of_a_step], products[(step + 1) * of_a_step - 1]
            bar(
                "wgmma, odd steps" if step % 2 else "wgmma, even steps",
                begin,
                end,
                "tab:orange",
                str(step),
            )
        # Two halves of the tile, and their transposes. Some are waited for at once.
        for number, (begin, end) in enumerate(sorted({span[1:] for span in found["store"]})):
            row = "store, mirror" if number % 2 else "store"
            bar(row, begin, max(end, begin + 25), "tab:green", str(number // 2))
        axes.set_yticks(range(len(rows)), rows)
        axes.invert_yaxis()
        axes.set_xlabel("instructions executed by a warp")
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=200)
        plt.close(figure)


if __name__ == "__main__":
    draw(PICTURE)
