# SPDX-License-Identifier: MIT
"""The files between a call of X·Xᵀ and its launch, or its library's product: a reader opens few."""

from collections.abc import Callable

import pytest
import torch
from commands import ROOT
from processes import entered_files

MOST_FILES = {"cuda": 9, "cpu": 8}
X = torch.ones(48, 32)


def files(call: Callable[[], object]) -> list[str]:
    return entered_files(call, "torchpar/library", "torchpar/ops", "torchpar/kernels", root=ROOT)


def test_few_files_lead_to_a_product_on_a_cpu() -> None:
    for x in (X, X.bfloat16(), torch.ones(800, 800)):
        entered = files(lambda x=x: torch.ops.torchpar.matmul_t(x))
        assert "torchpar/ops/matmul_t.py" in entered
        assert len(entered) <= MOST_FILES["cpu"], entered


def test_few_files_lead_to_a_launch_on_a_gpu() -> None:
    """For the first time, when tiles are chosen, and again."""
    pytest.importorskip(
        "rich", reason="the benchmark that has the stand-in for a GPU prints tables"
    )
    pytest.importorskip("triton", reason="the kernels are written in Triton")
    import torchpar.kernels.matmul_t
    from benchmarks.driver import gpu_of_cpu_tensors

    torchpar.kernels.launch.forget_plans()
    with gpu_of_cpu_tensors():
        for x in (X, X, X.bfloat16()):
            entered = files(lambda x=x: torch.ops.torchpar.matmul_t(x))
            assert {"torchpar/ops/matmul_t.py", "kernels/matmul_t.py"} <= {*entered}
            assert len(entered) <= MOST_FILES["cuda"], entered
