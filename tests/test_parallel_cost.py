# SPDX-License-Identifier: MIT
"""What a step should send against what it sends, call by call and byte by byte."""

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from torchpar.collectives import WatchedStep
from torchpar.nn import MLP
from torchpar.parallel import cost, join_world, parallel_mlp
from torchpar.parallel.pipeline import PipelineStep, stage_mlp
from torchpar.parallel.step import InvariantStep, ReplicaStep
from torchpar.phases import NoPhases
from torchpar.training import loss_sum

SIZES = (11, 33, 7, 5, 3)


def kind(dimension: str, operation: str, ranks: int, nbytes: int) -> tuple[str, str, int, int]:
    """What is compared of a call; a message has two ends, however many ranks the group has."""
    return dimension, operation, 2 if operation in ("send", "recv") else ranks, nbytes


def measured_and_expected(
    axes: dict[str, int] | None, reduction: Any, sizes: tuple[int, ...], batch_size: int
) -> tuple[Any, Any, Any]:
    """Calls of two steps, what is expected of one, and what would be of another batch."""
    torch.manual_seed(0)
    with join_world("cpu") as world:
        model = forward = MLP(sizes)
        if axes is not None:
            world = world.split(**axes, reduction=reduction)
            model = forward = stage_mlp(parallel_mlp(model, world.mesh["tp"], reduction), world.mesh["pp"])
        if world.data_ranks > 1 and reduction == "fast":
            group = None if axes is None else world.mesh["dp"].get_group()
            forward = DistributedDataParallel(model, process_group=group)
        if reduction == "invariant":
            step = InvariantStep(model, world)
        elif axes and axes.get("pp", 1) > 1:
            step = PipelineStep(forward, world, "1f1b", micro_batches=4)
        else:
            step = ReplicaStep(forward, world.data_ranks)
        # DistributedDataParallel arranges its buckets anew in the second step.
        watched = WatchedStep(step, world, skip=2)
        share = world.share(batch_size)
        x, labels = torch.randn(batch_size, sizes[0]), torch.arange(batch_size) % sizes[-1]
        for _ in range(4):
            watched.gradients(
                share.narrow(x, 0),
                share.narrow(labels, 0),
                batch_size,
                partial(loss_sum, "cross-entropy"),
                NoPhases(),
            )
            for p in model.parameters():
                p.grad = None
        measured = [
            Counter(kind(call.dimension, call.operation, call.ranks, call.bytes) for call in calls)
            for calls in watched.calls
        ]
        expected = [
            Counter(
                kind(e.dimension, e.operation, e.ranks, e.nbytes)
                for e in cost.collectives(
                    sizes, n, world.mesh, world.world_size, reduction=reduction, micro_batches=4
                )
            )
            for n in (batch_size, 2 * batch_size)
        ]
    return measured, *expected


FAST, INVARIANT = "fast", "invariant"


@pytest.mark.parametrize(
    "world_size, axes, reduction, sizes, batch_size",
    [
        (1, None, FAST, SIZES, 13),
        (2, None, FAST, SIZES, 13),
        (2, {"tp": 2}, FAST, SIZES, 13),
        (2, {"tp": 2}, FAST, SIZES[:4], 13),  # the last layer is whole
        (4, {"tp": 4}, FAST, SIZES[2:], 13),  # a rank without some features
        (2, {"pp": 2}, FAST, SIZES, 13),
        (4, {"dp": 2, "pp": 2}, FAST, SIZES, 13),
        (4, {"pp": 4}, FAST, SIZES, 13),
        (4, {"dp": 2, "tp": 2}, FAST, SIZES, 13),
        (4, {"tp": 2, "pp": 2}, FAST, SIZES, 13),
        (4, {"tp": 2, "pp": 2}, FAST, SIZES[:3], 13),  # a border within a pair
        (2, {"dp": 2}, INVARIANT, SIZES, 13),
        (4, {"dp": 4}, INVARIANT, SIZES, 13),
        (2, {"tp": 2}, INVARIANT, SIZES, 13),
        (4, {"tp": 4}, INVARIANT, SIZES, 13),
        (4, {"dp": 2, "tp": 2}, INVARIANT, SIZES, 13),
    ],
)
def test_prediction_equals_measurement(ranks, world_size, axes, reduction, sizes, batch_size):
    for measured, expected, doubled in ranks(
        world_size, measured_and_expected, axes, reduction, sizes, batch_size
    ):
        assert measured == [expected] * 2
        pure_data = set(axes or {"dp": 1}) == {"dp"}
        assert (doubled == expected) == pure_data  # the comparison sees the bytes


@pytest.mark.parametrize(
    "sizes",
    [
        (33, 512, 600, 7),  # the first bucket closes in the middle of the model
        (600, 512, 7),  # with its last weight
        (5, 600, 512),
    ],
)
def test_buckets_of_a_larger_model(ranks, sizes):
    for measured, expected, _ in ranks(2, measured_and_expected, None, FAST, sizes, 2):
        assert measured == [expected] * 2


LINK = cost.Link(alpha=1e-4, beta=2e-9)


@pytest.mark.parametrize(
    "operation, ranks, expected",
    [
        ("all_reduce", 1, 0.0),
        ("all_reduce", 2, 2e-4 + 2e-3),
        ("all_reduce", 4, 6e-4 + 3e-3),
        ("all_gather", 1, 0.0),
        ("all_gather", 2, 1e-4 + 2e-3),
        ("all_gather", 4, 3e-4 + 6e-3),
        ("send", 2, 1e-4 + 2e-3),
        ("recv", 2, 0.0),
    ],
)
def test_seconds_of_a_link(operation, ranks, expected):
    assert LINK.seconds(operation, ranks, 10**6) == pytest.approx(expected, rel=1e-12, abs=0)


def test_seconds_of_an_unknown_operation():
    with pytest.raises(ValueError, match="operation is 'broadcast', expected 'all_reduce'"):
        LINK.seconds("broadcast", 2, 1)


@pytest.mark.parametrize("sizes", [(2**10, 2**14, 2**22), (4, 10**6)])
def test_fit_recovers_a_link(sizes):
    points = [(p, n, LINK.seconds("all_reduce", p, n)) for p in (2, 4) for n in sizes]
    link = cost.Link.fit(points)
    assert (link.alpha, link.beta) == pytest.approx((LINK.alpha, LINK.beta), rel=1e-9)


def test_fit_weighs_errors_by_what_they_are_errors_of():
    """1% of a long message's time is hundreds of times a short one's, which must stay close all the same."""
    points = [(2, n, LINK.seconds("all_reduce", 2, n)) for n in (2**10, 2**14, 2**18, 2**22)]
    points[-1] = (*points[-1][:2], points[-1][2] * 1.01)
    link = cost.Link.fit(points)
    for p, n, seconds in points:
        assert link.seconds("all_reduce", p, n) == pytest.approx(seconds, rel=0.02)
    assert link.alpha != LINK.alpha


def test_a_link_has_no_negative_costs():
    link = cost.Link.fit([(2, 2**10, 2e-4), (2, 2**20, 1e-4)])  # longer messages, shorter times
    assert (link.alpha > 0, link.beta) == (True, 0.0)


def measure() -> list[float]:
    with join_world("cpu") as world:
        link = cost.measure_link(world, sizes=(2**10, 2**16, 2**20))
        return [link.alpha, link.beta]


def test_a_measured_link_is_the_same_on_every_rank(ranks):
    first, second = ranks(2, measure)
    assert first == pytest.approx(second, rel=1e-9, abs=0)  # of equal points, by a solver that may round
    assert all(value >= 0 for value in first)
    assert sum(first) > 0
