# SPDX-License-Identifier: MIT
"""The order of a pipeline's passes, and their timelines; test_parallel_meshes.py has the values."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

from support.timeline import Passes, check_one_machine, draw, passes

import pytest
import torch
from torch import Tensor

from torchpar import reference
from torchpar.errors import ConfigError
from torchpar.parallel import join_world
from torchpar.parallel.split.schedules import P2PCommunicator, gpipe, one_forward_one_backward
from torchpar.training.profile.phases import Phases, phase
from torchpar.training.profile.record import RankRecord, Span, Step

SCHEDULES = {"gpipe": gpipe, "1f1b": one_forward_one_backward}
LARGE = (2048, 2048)  # 16 MiB


def order(schedule: str, micro_batches: int) -> tuple[Passes, Tensor | None]:
    """The passes of this rank, and the gradient of its only weight.

    Activations are not contiguous, and so large that a send does not end before they are received.
    """
    weight = torch.ones((), requires_grad=True)
    with join_world("cpu"):
        p2p = P2PCommunicator()

    @phase("forward")
    def forward(i: int, activations: Tensor | None) -> Tensor:
        x = torch.full(LARGE, float(i)) if activations is None else activations
        return (x * weight).sum() if p2p.is_last else (x * weight).mT

    with Phases(torch.device("cpu")) as phases, phases.step():
        recorded = phases.current
        phase("pipeline")(SCHEDULES[schedule])(
            forward, Tensor.backward, [LARGE] * micro_batches, p2p
        )
    return passes(recorded), weight.grad


ORDERS = [
    ("gpipe", 4, ["F0 F1 F2 F3 B0 B1 B2 B3"] * 2),
    ("1f1b", 4, ["F0 F1 B0 F2 B1 F3 B2 B3", "F0 B0 F1 B1 F2 B2 F3 B3"]),
    ("1f1b", 4, ["F0 F1 F2 B0 F3 B1 B2 B3", "F0 F1 B0 F2 B1 F3 B2 B3", "F0 B0 F1 B1 F2 B2 F3 B3"]),
    ("1f1b", 1, ["F0 B0"] * 3),
]


@pytest.mark.parametrize("schedule, micro_batches, expected", ORDERS)
def test_the_order_and_the_times_of_the_passes(ranks, schedule, micro_batches, expected):
    """1F1B keeps the activations of at most p − s micro-batches on stage s."""
    found = ranks(len(expected), order, schedule, micro_batches)
    assert [" ".join(passes) for passes, _ in found] == expected
    assert [weight.item() for _, weight in found] == [2**22 * sum(range(micro_batches))] * len(
        expected
    )
    # Activations go to the next stage, and gradients back.
    for (first, _), (second, _) in pairwise(found):
        for name in first:
            earlier, later = (first, second) if name[0] == "F" else (second, first)
            assert earlier[name][0] < earlier[name][1] <= later[name][0]


def by_each_schedule() -> list[Tensor]:
    """The gradients of this stage's layer, by the plain schedule first."""
    parts = torch.arange(12.0).view(4, 3).split([2, 1, 1])
    shapes = [part.shape for part in parts]
    found = []
    with join_world("cpu") as world:
        p2p = P2PCommunicator()
        for schedule in (None, *SCHEDULES.values()):
            torch.manual_seed(world.rank)
            layer = torch.nn.Linear(3, 3)

            def forward(i: int, activations: Tensor | None, layer: Any = layer) -> Tensor:
                y = layer(parts[i] if activations is None else activations).sigmoid()
                return y.sum() if p2p.is_last else y

            if schedule is None:
                reference.gpipe(forward, Tensor.backward, shapes)
            else:
                schedule(forward, Tensor.backward, shapes, p2p)
            found.append(layer.weight.grad)
    return found


@pytest.mark.parametrize("stages", [1, 3])
def test_the_schedules_have_the_gradients_of_the_plain_one(ranks, stages):
    for plain, *others in ranks(stages, by_each_schedule):
        assert plain.abs().sum() > 0
        assert all(torch.equal(plain, other) for other in others)


# Timelines


def step(*times: float, zero: float = 0.0) -> Step:
    """F0, F1, B0 and B1 at these starts and ends; what is before and after is no pass."""
    names = ("forward", "forward", "backward", "backward")
    pairs = zip(times[::2], times[1::2], strict=True)
    spans = [Span(n, zero + a, zero + b) for n, (a, b) in zip(names, pairs, strict=True)]
    before = Span("forward", zero - 1, zero + times[0])
    around = Span("pipeline", zero + times[0], zero + times[-1])
    return Step([before, *spans, around, Span("optimizer", zero + times[-1], zero + 20)])


def record(*steps: Step) -> RankRecord:
    return RankRecord(0, {"host": "a"}, {}, steps)


def test_a_timeline_draws_each_pass_from_its_median_start_to_its_median_end(monkeypatch):
    """Times count from rank 0's first pass. One of three steps was disturbed on one rank."""
    first = [step(0, 1, 1, 2, 4, 6, 6, 8, zero=10 * k) for k in range(3)]
    second = [step(1, 2, 2, 3, 3, 4, 4, 6, zero=10 * k) for k in range(2)]
    second.append(step(1, 9, 9, 9.5, 9.5, 9.6, 9.6, 9.9, zero=20))
    monkeypatch.setenv("COLUMNS", "40")  # less than the least
    assert draw([record(*first), record(*second)]) == [
        "a step of 8000.00 ms, 133.333 ms a column, medians of 3 steps",
        "rank 0  F0-----F1------...............B0-------------B1-------------  25% idle",
        "rank 1  .......F0------F1-----B0------B1-------------...............  38% idle",
        "F, B: forward and backward pass of a micro-batch; -: it goes on; .: idle",
    ]
    monkeypatch.setenv("COLUMNS", "140")
    title, line, _ = draw(
        [record(step(0, 0.001, 0.001, 0.5, 0.5, 0.501, 0.501, 1))]
    )  # passes shorter than their names
    assert title.startswith("a step of 1000.00 ms, 8.333 ms a column")
    assert line.startswith("rank 0  F0F1---")
    assert "no more than two steps were trained" in draw([record(), record()])[0]


def two_machines() -> None:
    with join_world("cpu") as world, pytest.raises(ConfigError, match="start all ranks on one"):
        check_one_machine(replace(world, local_rank=0))


def test_ranks_of_two_machines_have_no_timeline(ranks):
    ranks(2, two_machines)
