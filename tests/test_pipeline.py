# SPDX-License-Identifier: MIT
"""The schedules of a pipeline, compared with one process, and their timelines."""

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from support.timeline import Pass, Timeline, draw
from test_parallel_meshes import sum_of_losses
from torch import Tensor
from torch.testing import assert_close

from torchpar.errors import ConfigError
from torchpar.nn import MLP
from torchpar.parallel import join_world
from torchpar.parallel.split.pipeline import Pipeline, stage_mlp
from torchpar.reference import P2PCommunicator, gpipe, one_forward_one_backward

SCHEDULES = {"gpipe": gpipe, "1f1b": one_forward_one_backward}
LARGE = (2048, 2048)  # 16 MiB
SIZES = (25, 33, 7, 5, 10)
EQUAL = {"rtol": 0.0, "atol": 0.0}


TRAININGS = [  # stages, micro-batches, sizes of batches
    (1, 3, (6, 6)),
    (2, 4, (12, 12, 12)),
    (2, 2, (8, 8)),  # as many micro-batches as stages
    (3, 5, (15, 15)),
    (3, 2, (5, 6)),
    (2, 4, (13, 7, 3)),  # the last one has an empty micro-batch
]


def train(schedule: str, pp: int, micro_batches: int, batches: tuple[int, ...]) -> None:
    """Compare the losses and weights of each step with the whole model's."""
    torch.manual_seed(0)
    whole = MLP(SIZES, "relu")
    with join_world("cpu") as world:
        world = world.with_mesh(pp=pp)
        stage = stage_mlp(copy.deepcopy(whole), world.mesh["pp"])
        pipeline = Pipeline(stage, world, schedule, micro_batches)
        optimizers = [
            torch.optim.SGD(m.parameters(), lr=0.3, momentum=0.9, foreach=False) for m in (whole, stage)
        ]
        for n in batches:
            x, labels = torch.randn(n, SIZES[0]), torch.randint(SIZES[-1], (n,))
            parts, targets = (t.tensor_split(micro_batches) for t in (x, labels))
            losses = [sum_of_losses(whole(p), t) for p, t in zip(parts, targets, strict=True)]
            for one in losses:
                (one / n).backward()
            loss = pipeline.step(x, labels, n, sum_of_losses)
            assert_close(loss, torch.stack(losses).sum().detach() * world.owns_outputs, **EQUAL)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            weights, parameters = stage.state_dict(), whole.state_dict()
            assert_close(weights, {name: parameters[name] for name in weights}, **EQUAL)


@pytest.mark.parametrize(
    "training, schedule",
    [*((training, "1f1b") for training in TRAININGS), *((training, "gpipe") for training in TRAININGS[1:3])],
    ids=str,
)
def test_a_schedule_trains_as_one_process(ranks, training, schedule):
    """With the bits of one process that adds up the gradients of the same micro-batches."""
    ranks(training[0], train, schedule, *training)


def order(schedule: str, micro_batches: int) -> tuple[list[Pass], Tensor | None]:
    """The passes of this rank, and the gradient of its only weight.

    Activations are not contiguous, and so large that a send does not end before they are received.
    """
    weight = torch.ones((), requires_grad=True)
    with join_world("cpu") as world:
        timeline, p2p = Timeline(world), P2PCommunicator()

    def forward(i: int, activations: Tensor | None) -> Tensor:
        x = torch.full(LARGE, float(i)) if activations is None else activations
        return (x * weight).sum() if p2p.is_last else (x * weight).mT

    passes = timeline.step(forward, Tensor.backward)
    SCHEDULES[schedule](*passes, [LARGE] * micro_batches, p2p)
    return timeline.steps[0], weight.grad


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
    assert [" ".join(one.name for one in passes) for passes, _ in found] == expected
    assert [weight.item() for _, weight in found] == [2**22 * sum(range(micro_batches))] * len(expected)
    stages = [{one.name: one for one in passes} for passes, _ in found]
    for first, second in pairwise(stages):  # activations go to the next stage, and gradients back
        for name in first:
            earlier, later = (first, second) if name[0] == "F" else (second, first)
            assert earlier[name].start < earlier[name].end <= later[name].start


# Timelines


def step(*times: float, zero: float = 0.0) -> list[Pass]:
    """F0, F1, B0 and B1 at these starts and ends."""
    pairs = zip(times[::2], times[1::2], strict=True)
    names = ["F0", "F1", "B0", "B1"]
    return [Pass(n, zero + a, zero + b) for n, (a, b) in zip(names, pairs, strict=True)]


def test_a_timeline_draws_each_pass_from_its_median_start_to_its_median_end():
    """Times count from rank 0's first pass. One of three steps was disturbed on one rank."""
    first = [step(0, 1, 1, 2, 4, 6, 6, 8, zero=10 * k) for k in range(3)]
    second = [step(1, 2, 2, 3, 3, 4, 4, 6, zero=10 * k) for k in range(2)]
    second.append(step(1, 9, 9, 9.5, 9.5, 9.6, 9.6, 9.9, zero=20))
    assert draw([first, second]) == [
        "a step of 8000.00 ms, 133.333 ms a column, medians of 3 steps",
        "rank 0  F0-----F1------...............B0-------------B1-------------  25% idle",
        "rank 1  .......F0------F1-----B0------B1-------------...............  38% idle",
    ]


def test_a_timeline_is_as_wide_as_its_shortest_pass_needs():
    """But not wider than 140 columns."""
    for shortest, columns, begin in ((0.025, 120, "F0-F1---"), (0.001, 140, "F0F1---")):
        times = (0, shortest, shortest, 0.5, 0.5, 0.5 + shortest, 0.5 + shortest, 1)
        title, line = draw([[step(*times)]])
        assert title.startswith(f"a step of 1000.00 ms, {1000 / columns:.3f} ms a column")
        assert line.startswith(f"rank 0  {begin}")
        assert all(name in line for name in ("F0", "F1", "B0", "B1"))
    assert "no step was trained" in draw([[], []])[0]


def two_machines() -> None:
    with join_world("cpu") as world, pytest.raises(ConfigError, match="start all ranks on one"):
        Timeline(replace(world, local_rank=0))


def test_ranks_of_two_machines_have_no_timeline(ranks):
    ranks(2, two_machines)
