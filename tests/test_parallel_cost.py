# SPDX-License-Identifier: MIT
"""Cost of a step's communication: each call and byte that is expected is counted, and no other."""

import math
from collections import Counter
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from torchpar import training
from torchpar.nn import MLP
from torchpar.parallel import join_world, parallel_mlp
from torchpar.parallel.split import shared_memory
from torchpar.parallel.split.exact_gradients import ExactGradients
from torchpar.parallel.split.pipeline import Pipeline, stage_mlp
from torchpar.parallel.split.shared_memory import register_shared_memory_hook
from torchpar.profile.collectives import StepRecorder
from torchpar.training import cost, loss_sum
from torchpar.training.fused import FusedGradients

SIZES = (11, 33, 7, 5, 3)


def kind(dimension: str, operation: str, ranks: int, nbytes: int) -> tuple[str, str, int, int]:
    """The part of a call that is compared; a message has two ends, however many ranks the group has."""
    return dimension, operation, 2 if operation in ("send", "recv") else ranks, nbytes


def counted_and_expected(
    axes: dict[str, int] | None,
    arithmetic: Any,
    sizes: tuple[int, ...],
    batch_size: int,
    fused: bool = False,
    shared: bool = False,
    muon: bool = False,
) -> tuple[Any, Any, Any]:
    """Calls of two steps, those expected of one, and those of a step with twice the batch."""
    torch.manual_seed(0)
    loss = partial(loss_sum, "cross-entropy")
    with join_world("cpu") as world:
        model = replica = MLP(sizes)
        pipeline = exact = None
        if axes is not None:
            world = world.with_mesh(**axes)
            model = replica = stage_mlp(parallel_mlp(model, world.mesh["tp"], arithmetic), world.mesh["pp"])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shared_memory, "SUPPORTED", shared_memory.SUPPORTED and shared)
            exact = ExactGradients(model, world) if arithmetic == "exact" else None
            gradients = FusedGradients(model, world) if fused else None
        if world.mesh["pp"].size() > 1:
            pipeline = Pipeline(model, world, "1f1b", micro_batches=4, exact_gradients=exact)
        elif world.dp_size > 1 and arithmetic == "fast" and not fused:
            group = None if axes is None else world.mesh["dp"].get_group()
            replica = ddp = DistributedDataParallel(model, process_group=group)
            if shared:
                register_shared_memory_hook(ddp, world)

        def backward(x: torch.Tensor, labels: torch.Tensor) -> None:
            if gradients is not None:
                gradients(x, labels, batch_size)
            elif pipeline is not None:
                pipeline.step(x, labels, batch_size, loss)
            else:
                loss(replica(x), labels).backward()
                if exact is not None:
                    exact()

        mesh = world.mesh["dp", "tp"] if muon else None
        optimizer = training.muon(model, 0.1, 0.9, 0.0, mesh=mesh) if muon else None
        recorder, share = StepRecorder(world, steps=2), world.share(batch_size)
        x, labels = torch.randn(batch_size, sizes[0]), torch.arange(batch_size) % sizes[-1]
        for _ in range(5):
            with recorder.step():
                backward(share.narrow(x, 0), share.narrow(labels, 0))
                if optimizer is not None:
                    optimizer.step()
            model.zero_grad()
        counted = [
            Counter(kind(call.dimension, call.operation, call.ranks, call.bytes) for call in calls)
            for calls in recorder.calls
        ]
        expected = [
            Counter(
                kind(e.dimension, e.operation, e.ranks, e.nbytes)
                for e in cost.collectives(
                    *(sizes, n, world.mesh),
                    tensor_split=axes is not None,
                    arithmetic=arithmetic,
                    micro_batches=4,
                    fused=fused,
                    muon=mesh,
                )
            )
            for n in (batch_size, 2 * batch_size)
        ]
    return counted, *expected


FAST, EXACT = "fast", "exact"


@pytest.mark.parametrize(
    "world_size, axes, arithmetic, sizes, batch_size",
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
        (2, {"dp": 2}, EXACT, SIZES, 13),
        (3, {"dp": 3}, EXACT, SIZES, 2),  # a rank without a sample
        (2, {"tp": 2}, EXACT, SIZES[:4], 13),
        (5, {"tp": 5}, EXACT, SIZES[2:], 13),
        (2, {"pp": 2}, EXACT, SIZES, 13),
        (4, {"dp": 2, "tp": 2}, EXACT, SIZES, 13),
        (4, {"dp": 2, "pp": 2}, EXACT, SIZES, 13),
        (4, {"tp": 2, "pp": 2}, EXACT, SIZES[:3], 13),
    ],
)
def test_the_collectives_counted_are_those_expected(ranks, world_size, axes, arithmetic, sizes, batch_size):
    for counted, expected, doubled in ranks(
        world_size, counted_and_expected, axes, arithmetic, sizes, batch_size
    ):
        assert counted == [expected] * 2
        pure_data = set(axes or {"dp": 1}) == {"dp"}
        assert (doubled == expected) == pure_data  # the comparison sees the bytes


@pytest.mark.parametrize(
    "axes, sizes, all_to_alls",
    [
        ({"dp": 1}, SIZES, 0),
        ({"dp": 3}, SIZES, 1),
        ({"tp": 2}, SIZES, 2),
        ({"tp": 2}, SIZES[:4], 2),  # the last layer is whole
        ({"dp": 2, "tp": 2}, SIZES, 2),
        ({"dp": 2, "pp": 2}, SIZES, 1),
        ({"tp": 2, "pp": 2}, SIZES, 2),
        ({"pp": 2}, SIZES, 0),
    ],
)
def test_muon_takes_at_most_two_all_to_alls(ranks, axes, sizes, all_to_alls):
    world_size = math.prod(axes.values())
    arguments = (axes, FAST, sizes, 13, False, False, True)
    for counted, expected, _ in ranks(world_size, counted_and_expected, *arguments):
        assert counted == [expected] * 2
        assert sum(n for call, n in expected.items() if call[1] == "all_to_all") == all_to_alls


@pytest.mark.parametrize("shared", [True, False])
def test_exact_gradients_take_two_messages(ranks, shared):
    """The exponents of the rows of weights and of biases, and the sums."""
    parameters, rows = sum(n * m + m for n, m in pairwise(SIZES)), sum(SIZES[1:])
    messages = [("dp", "all_reduce", 3, nbytes) for nbytes in (4 * 2 * rows, 8 * parameters)]
    for counted, expected, _ in ranks(3, counted_and_expected, {"dp": 3}, EXACT, SIZES, 13, False, shared):
        assert counted == [expected] * 2
        assert expected == Counter(messages)


@pytest.mark.parametrize("batch_size", [13, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("shared", [True, False])
def test_fused_gradients_take_one_message(ranks, world_size, batch_size, shared):
    """Also where a rank has no sample. Ranks without shared memory send their gradients by gloo."""
    nbytes = 4 * sum(n * m + m for n, m in pairwise(SIZES))
    arguments = (None, FAST, SIZES, batch_size, True, shared)
    for counted, expected, _ in ranks(world_size, counted_and_expected, *arguments):
        assert counted == [expected] * 2
        assert expected == Counter([("dp", "all_reduce", world_size, nbytes)] * (world_size > 1))


@pytest.mark.parametrize("batch_size", [2, 64])  # small layers; layers that oneDNN takes where it is used
@pytest.mark.parametrize(
    "sizes",
    [
        (33, 512, 600, 7),  # the first bucket closes in the middle of the model
        (600, 512, 7),  # with its last weight
        (5, 600, 512),
    ],
)
@pytest.mark.parametrize("shared", [True, False])
def test_buckets_of_a_larger_model(ranks, sizes, batch_size, shared):
    arguments = (None, FAST, sizes, batch_size, False, shared)
    for counted, expected, _ in ranks(2, counted_and_expected, *arguments):
        assert counted == [expected] * 2


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


def measure_link() -> list[float]:
    with join_world("cpu") as world:
        link = cost.measure_link(world, sizes=(2**10, 2**16, 2**20))
        return [link.alpha, link.beta]


def test_a_measured_link_is_the_same_on_every_rank(ranks):
    first, second = ranks(2, measure_link)
    assert first == pytest.approx(second, rel=1e-9, abs=0)  # of equal points, by a solver that may round
    assert all(value >= 0 for value in first)
    assert sum(first) > 0
