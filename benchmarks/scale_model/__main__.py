# SPDX-License-Identifier: MIT
"""What training would cost on 64 to 4096 GPUs, which nobody here has: ``python -m benchmarks.scale_model``.

First it counts what a rank of so many sends, which must be what `torchpar.parallel.cost.collectives`
predicts, call by call and byte by byte, or this ends with status 1. Then it predicts what a step would
take, from published figures (`benchmarks.scale_model.predicted`).
"""

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.report import provenance, write_csv
from benchmarks.scale_model.counted import MESHES, count
from benchmarks.scale_model.predicted import INFINIBAND, NVLINK, PEAK, Row, rows

try:
    from rich.console import Console
    from rich.progress import track

    from benchmarks.scale_model import show
except ModuleNotFoundError as e:
    sys.exit(f"python -m benchmarks.scale_model needs rich and matplotlib, pip install them: {e}")

UTILISATION = 0.6  # of the peak by the products alone: an assumption
LAYERS = 16  # all width × width
WIDTHS = [4096, 8192, 16384, 32768, 65536]
WEAK_BATCH = 2**14  # samples a rank
STRONG_BATCH = 2**20  # samples, of all ranks
TITLES = {
    "weak": f"weak scaling, {WEAK_BATCH:,} samples a rank",
    "strong": f"strong scaling, {STRONG_BATCH:,} samples in all",
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.scale_model", description="Predict 64 to 4096 GPUs."
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="write scale_model_PREDICTED.csv and .png")
    parser.add_argument("--measured", type=Path, metavar="FILE", help="scaling.csv of benchmarks.scaling")
    parser.add_argument("--utilisation", type=float, default=UTILISATION, help="of the peak, by products")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    options = parser.parse_args()
    stages = max(mesh.pp for mesh in MESHES)
    if not 0 < options.utilisation <= 1:
        parser.error(f"--utilisation {options.utilisation}: expected more than 0 and at most 1")
    if options.layers < stages:
        parser.error(f"--layers {options.layers}: there are {stages} stages")
    if options.measured and not options.measured.is_file():
        parser.error(f"--measured {options.measured}: there is no such file")
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
    return options


def main() -> int:
    options = parse()
    measured = show.read_measured(options.measured) if options.measured else None
    terminal = Console(stderr=True)
    jobs = [(mesh, width) for mesh in MESHES for width in options.widths]
    found: list[Row] = []
    for mesh, width in track(jobs, "count", console=terminal, disable=not terminal.is_terminal):
        for scaling, batch in (("weak", WEAK_BATCH * mesh.ranks), ("strong", STRONG_BATCH)):
            counted = count(width, options.layers, batch, mesh)
            if counted.difference:
                where = f"{mesh} ranks, width {width}"
                terminal.print(f"{where}: {counted.difference}", style="red", soft_wrap=True)
            found += rows(scaling, counted, width, batch, mesh, options.utilisation)
    if options.output:
        path = options.output / "scale_model_PREDICTED.csv"
        path.unlink(missing_ok=True)
        write_csv(
            path,
            found,
            peak_flops=PEAK,
            assumed_utilisation=options.utilisation,
            nvlink_alpha_s=NVLINK.alpha,
            nvlink_beta_s_per_byte=NVLINK.beta,
            infiniband_alpha_s=INFINIBAND.alpha,
            infiniband_beta_s_per_byte=INFINIBAND.beta,
            **provenance(torch.device("cpu")),
        )
        show.plot(found, path.with_suffix(".png"), TITLES, options.utilisation, measured)
    console = Console(width=None if sys.stdout.isatty() else 170)
    for scaling, title in TITLES.items():
        console.print(show.table([r for r in found if r.scaling == scaling], title, options.utilisation))
    if measured:
        ratios = sorted(point.ratio for point in measured.points)
        spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f} over {len(ratios)} steps"
        print(f"measured / predicted on {measured.link}: {spread}")
    unequal = sum(not row.counted_equals_predicted for row in found)
    print(f"counted and predicted collectives: unequal in {unequal} of {len(found)} rows")
    return 1 if unequal else 0


if __name__ == "__main__":
    sys.exit(main())
