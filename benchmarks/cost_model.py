# SPDX-License-Identifier: MIT
"""What a kernel would take on a GPU that is not there, by its vendor's figures.

    T = max(flops of the busiest multiprocessor / its share of the peak, bytes / bandwidth)

The busiest of S multiprocessors has ⌈tiles / S⌉ tiles, each computed in full. The bytes are those of operands
and result, once. The model knows the shape of tiles and nothing of warps, stages, TMA, the L2 cache or the
cost of a launch: it bounds a time from below, and what it ranks alike may differ twofold.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from torchpar.search import Problem


class Peak(NamedTuple):
    """Dense flop/s by dtype, bytes/s, and multiprocessors, as a vendor states them."""

    flops: Mapping[str, float]
    bandwidth: float
    multiprocessors: int


def _peak(
    half: float, tf32: float, float32: float, float64: float, tb_per_s: float, multiprocessors: int
) -> Peak:
    flops = {"bfloat16": half, "float16": half, "tf32": tf32, "float32": float32, "float64": float64}
    return Peak({dtype: 1e12 * rate for dtype, rate in flops.items()}, 1e12 * tb_per_s, multiprocessors)


# Without sparsity; products in float64 on tensor cores, in float32 not. Multiprocessors: hmc-tech.com/gpu.
PEAKS = {
    80: _peak(312, 156, 19.5, 19.5, 2.039, 108),  # NVIDIA's data sheet of the A100 80 GB SXM
    90: _peak(989.5, 494.5, 67, 67, 4.8, 132),  # NVIDIA's data sheet of the H200 SXM
    100: _peak(2250, 1100, 80, 40, 8.0, 148),  # NVIDIA's technical brief on Blackwell, HGX B200
}


def predict(problem: Problem, configuration: tuple[int, ...], peak: Peak) -> float:
    """Milliseconds by the model in this module's header."""
    kernel, dtype, n, _ = problem
    arrays = 2 if kernel == "symmetric_product" else 3
    seconds = arrays * n * n * problem.torch_dtype.itemsize / peak.bandwidth
    if kernel != "maximum":
        block_m, block_n = configuration[:2]
        rows, columns = math.ceil(n / block_m), math.ceil(n / block_n)
        tiles = rows * (rows + 1) // 2 if kernel == "symmetric_product" else rows * columns
        busiest = math.ceil(tiles / peak.multiprocessors) * 2 * block_m * block_n * n
        seconds = max(seconds, busiest / (peak.flops[dtype] / peak.multiprocessors))
    return 1e3 * seconds
