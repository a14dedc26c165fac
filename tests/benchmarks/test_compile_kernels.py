# SPDX-License-Identifier: MIT
"""The kernels that are compiled on all cores before a GPU's benchmarks."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are written in Triton")
from ptx.launch import idle_gpu

from benchmarks.compile_kernels import SIZE, Job, compile_job, jobs
from torchpar.kernels import launch
from torchpar.kernels.matmul_t import SYMMETRIC_MATMUL, symmetric_matmul
from torchpar.kernels.rule import Tiles


def test_all_configurations_are_compiled():
    found = jobs(90)
    assert len(found) == len({(job.product.name, *job[1:]) for job in found}) > 40
    assert Job(SYMMETRIC_MATMUL, "bfloat16", Tiles(128, 256, 64, 8, 4, "tma"), 90) in found
    assert not [job for job in jobs(80) if job.tiles.by_tma]


def test_a_launch_finds_what_was_compiled(tmp_path: Path):
    tiles = Tiles(128, 128, 64, 8, 3)
    with idle_gpu(tmp_path, lambda *args: None):
        assert compile_job(Job(SYMMETRIC_MATMUL, "bfloat16", tiles, 90)) == 1
        (one,) = tmp_path.rglob("*.cubin")
        for rows, count in ((2048, 1), (SIZE - 1, 2)):
            x = torch.empty(rows, SIZE, dtype=torch.bfloat16, device="meta")
            launch.forget_plans()
            symmetric_matmul(x, x, "ieee", None, tiles=tiles)
            assert len(list(tmp_path.rglob("*.cubin"))) == count
            assert one.exists()
    launch.forget_plans()
