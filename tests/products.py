# SPDX-License-Identifier: MIT
"""The products whose tiles the rule chooses, by the names of their launch functions, and their
times on an H100."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from torchpar.kernels.linear_sigmoid import LINEAR_SIGMOID
from torchpar.kernels.matmul_t import SYMMETRIC_MATMUL

PRODUCTS = {one.name: one for one in (SYMMETRIC_MATMUL, LINEAR_SIGMOID)}
MEASURED = Path(__file__).parents[1] / "benchmarks" / "results"
Sizes = tuple[int, int, int, int]  # m, n, k and batch


def timed_on_h100() -> Iterator[tuple[str, str, Sizes, dict[str, str]]]:
    """The rows that `autotune --configurations` found right: product, dtype, sizes, and the row."""
    for path in sorted((MEASURED / "nvidia-h100").glob("autotune*.csv")):
        with path.open() as file:
            for row in csv.DictReader(file):
                if row["ok"] == "True":
                    m, k, *n = map(int, re.findall(r"\d+", row["shape"]))
                    product = row["operator"].replace("matmul_t", "symmetric_matmul")
                    yield product, row["dtype"], (m, n[0] if n else m, k, 1), row
