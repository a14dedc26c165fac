# SPDX-License-Identifier: MIT
"""The kernels' own PTX, executed on a CPU under three schedules, and faults that the executor must notice."""

import pytest
import torch
from ptx import cases
from ptx.cases import BF16, F16, F32, F64, Case
from ptx.machine import SCHEDULES

from torchpar.kernels.candidates import Tiles

slow = pytest.mark.slow
LARGE, LARGE_TF32 = Tiles(128, 256, 64, 8, 4, "tma"), Tiles(128, 256, 32, 8, 3, "tma")
SPLIT = Tiles(64, 64, 64, 4, 4, "split_k")

DEFAULTS = {
    "matmul_t, large": cases.symmetric(264, 200, tiles=LARGE, multiprocessors=2),
    "matmul_t, transposed, with C": cases.symmetric(
        136, 72, tiles=LARGE, transposed="ac", other=True, c=True
    ),
    "matmul_t, small": cases.symmetric(72, 40),
    "matmul_t, unaligned": cases.symmetric(71, 35),
    "matmul_t, by pointers, with C": cases.symmetric(72, 104, tiles=Tiles(64, 64, 64, 4, 3), c=True),
    "matmul_t, batches": cases.symmetric(40, 72, F16, batch=(2,)),
    "matmul_t, TF32": cases.symmetric(136, 72, F32, "tf32", LARGE_TF32),
    "matmul_t, TF32, small": cases.symmetric(40, 40, F32, "tf32"),
    "matmul_t, float32": cases.symmetric(68, 20, F32),
    "matmul_t, float64": cases.symmetric(66, 20, F64, c=True),
    "half_sum": cases.half_sum(65),
    "mirror": cases.mirror(70),
    "linear_sigmoid, large": cases.sigmoid(136, 264, 136, tiles=LARGE, multiprocessors=2),
    "linear_sigmoid, large, unaligned rows": cases.sigmoid(72, 71, 40, tiles=Tiles(64, 128, 64, 4, 4, "tma")),
    "linear_sigmoid, small": cases.sigmoid(40, 72, 72, bias=False, transposed="w"),
    "linear_sigmoid, split": cases.sigmoid(24, 40, 584, tiles=SPLIT, multiprocessors=2),
    "linear_sigmoid, float32": cases.sigmoid(30, 40, 20, F32),
    "linear_sigmoid, float64": cases.sigmoid(30, 40, 20, F64),
    "sigmoid_backward": cases.sigmoid_gradient(70, 72),
    "sigmoid_backward, many rows": cases.sigmoid_gradient(300, 10, F32),
    "maximum": cases.larger((40, 35), (40, 35)),
    "maximum of bool": cases.larger((1111,), (1111,), torch.bool),
    "maximum, a row": cases.larger((5, 70), (1, 70)),
    "maximum, a column": cases.larger((5, 70), (5, 1), F32),
    "maximum, gradient": cases.larger_gradient((40, 35), (40, 35)),
    "maximum, gradient, a row": cases.larger_gradient((5, 70), (1, 70), F32),
    "exact_matmul": cases.exact(40, 24, 64),
    "exact_matmul, symmetric": cases.exact(40, 40, 33, same=True),
    "exact_matmul, special values": cases.exact(20, 20, 40, special=True),
}


def check(case: Case) -> None:
    """All schedules give the expected results, and the same bits."""
    expected, first = case.expected(), None
    for schedule in SCHEDULES:
        found = case.execute(schedule)
        assert case.agrees(found, expected), schedule
        first = first or found
        assert all(torch.equal(cases._bits(a), cases._bits(b)) for a, b in zip(found, first, strict=True)), (
            schedule
        )


@pytest.mark.parametrize("name", DEFAULTS)
def test_default_tiles(name):
    check(DEFAULTS[name])
