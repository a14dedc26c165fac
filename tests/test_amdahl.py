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


def build_another_on_each_rank() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(current_world().world_size)
    model = torch.nn.Linear(2, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def draw() -> Samples:
    points = torch.rand(32, 2, generator=torch.Generator().manual_seed(0))
    return Samples(points, (points[:, 0] > points[:, 1]).long(), ("below", "above"))


@pytest.mark.slow
def test_training_that_differs_is_refused(monkeypatch):
    fork_context()
    monkeypatch.setattr(report, "ROUNDS", 1)
    cross_entropy_sum = partial(torch.nn.functional.cross_entropy, reduction="sum")
    with pytest.raises(ConfigError, match="differs from that on one"):
        report.report(report.Job(build_another_on_each_rank, draw, cross_entropy_sum), (1, 2), (8,))
