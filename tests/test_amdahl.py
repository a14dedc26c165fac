# SPDX-License-Identifier: MIT
"""Training that the report by Amdahl's law refuses; tests/test_examples.py runs the report."""

from functools import partial

import pytest
import torch
from ranks import fork_context

pytest.importorskip("rich", reason="the report prints with rich")

from support import amdahl as report

from torchpar.data import Samples
from torchpar.errors import ConfigError
from torchpar.parallel.launch.local import current_world


def build() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def build_another_on_each_rank() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model, optimizer = build()
    with torch.no_grad():
        model.weight[0] += current_world().world_size
    return model, optimizer


def draw() -> Samples:
    points = torch.rand(32, 2, generator=torch.Generator().manual_seed(0))
    return Samples(points, (points[:, 0] > points[:, 1]).long(), ("below", "above"))


def fail() -> Samples:
    raise RuntimeError("no memory\nfor this")


cross_entropy_sum = partial(torch.nn.functional.cross_entropy, reduction="sum")


@pytest.mark.parametrize(
    "job, error",
    [
        (report.Job(build, fail, cross_entropy_sum), "on 1 processes failed: RuntimeError: no memory$"),
        (report.Job(build_another_on_each_rank, draw, cross_entropy_sum), "differs from that on one"),
    ],
)
def test_training_that_fails_or_differs_is_refused(monkeypatch, job, error):
    fork_context()
    monkeypatch.setattr(report, "ROUNDS", 1)
    with pytest.raises(ConfigError, match=error):
        report.report(job, (1, 2), (8,))
