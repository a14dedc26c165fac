# SPDX-License-Identifier: MIT
"""Cost of a step's communication: each call and byte that is expected is counted, and no other.

`test_parallel_meshes.py` counts the collectives of float arithmetic on meshes.
"""

import math
from collections import Counter
from functools import partial
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest
import torch
from test_parallel_meshes import kind
from torch.nn.parallel import DistributedDataParallel

from torchpar import training
from torchpar.nn import MLP
from torchpar.parallel import join_world, parallel_mlp
from torchpar.parallel.split import shared_memory
from torchpar.parallel.split.pipeline import Pipeline, stage_mlp
from torchpar.parallel.split.shared_memory import register_shared_memory_hook
from torchpar.profile.collectives import StepRecorder
from torchpar.training import cost, loss_sum
from torchpar.training.fused import FusedGradients

SIZES = (11, 33, 7, 5, 3)
PARAMETERS = sum(n * m + m for n, m in pairwise(SIZES))


def expected_calls(
    axes: dict[str, int] | None,
    sizes: tuple[int, ...] = SIZES,
    batch_size: int = 13,
    *,
    fused: bool = False,
    shared: bool = False,
    muon: bool = False,
) -> Counter[Any]:
    """The calls of a step, which are those counted. Without ``axes`` the model is whole on every rank."""
    torch.manual_seed(0)
    loss = partial(loss_sum, "cross-entropy")
    with join_world("cpu") as world:
        model = replica = MLP(sizes)
        if axes is not None:
            world = world.with_mesh(**axes)
            model = replica = stage_mlp(parallel_mlp(model, world.mesh["tp"]), world.mesh["pp"])
        with patch.object(shared_memory, "SUPPORTED", shared_memory.SUPPORTED and shared):
            gradients = FusedGradients(model, world) if fused else None
        if world.mesh["pp"].size() > 1:
            gradients = partial(Pipeline(model, world).step, loss_sum=loss)
        elif world.dp_size > 1 and not fused:
            replica = ddp = DistributedDataParallel(model, process_group=world.mesh["dp"].get_group())
            if shared:
                register_shared_memory_hook(ddp, world)

        def backward(x: torch.Tensor, labels: torch.Tensor) -> None:
            if gradients is not None:
                gradients(x, labels, batch_size)
                return
            loss(replica(x), labels).backward()

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
        expected = cost.collectives(
            sizes,
            batch_size,
            world.mesh,
            tensor_split=axes is not None,
            fused=fused,
            muon=mesh,
        )
    counted = [Counter(map(kind, calls)) for calls in recorder.calls]
    assert counted == [Counter(map(kind, expected))] * 2
    return counted[0]


@pytest.mark.parametrize(
    "axes, sizes, batch_size, all_to_alls",
    [
        ({"dp": 3}, SIZES, 2, 1),  # a rank without a sample
        ({"tp": 2}, SIZES[:4], 13, 2),  # the last layer is whole
        ({"tp": 5}, SIZES[2:], 13, 2),  # ranks without some features
        ({"dp": 2, "tp": 2}, SIZES, 13, 2),
        ({"dp": 2, "pp": 2}, SIZES, 13, 1),
        ({"tp": 2, "pp": 2}, SIZES[:3], 13, 2),  # a border within a pair
    ],
)
def test_collectives_of_muon(ranks, axes, sizes, batch_size, all_to_alls):
    """Muon takes at most two all-to-alls a step."""
    world_size = math.prod(axes.values())
    of_muon = partial(expected_calls, axes, sizes, batch_size, muon=True)
    for calls in ranks(world_size, of_muon):
        assert sum(n for call, n in calls.items() if call[1] == "all_to_all") == all_to_alls


@pytest.mark.parametrize("shared", [True, False])
def test_messages_of_data_parallel_ranks(ranks, shared):
    """Fused gradients take one, of all."""
    for batch_size in (13, 2):  # a rank without a sample
        function = partial(expected_calls, None, batch_size=batch_size, fused=True, shared=shared)
        for calls in ranks(3, function):
            assert calls == Counter([("dp", "all_reduce", 3, 4 * PARAMETERS)])
    assert ranks(1, partial(expected_calls, None, fused=True, shared=shared)) == [Counter()]


@pytest.mark.parametrize(
    "sizes, batch_size, shared",
    [
        ((33, 512, 600, 7), 2, False),  # the first bucket closes in the middle of the model
        ((33, 512, 600, 7), 64, True),  # layers that oneDNN takes where it is used
        ((600, 512, 7), 64, False),  # the bucket closes with the last weight
        ((5, 600, 512), 2, True),
    ],
)
def test_buckets_of_a_larger_model(ranks, sizes, batch_size, shared):
    ranks(2, partial(expected_calls, None, sizes=sizes, batch_size=batch_size, shared=shared))


LINK = cost.Link(alpha=1e-4, beta=2e-9)


def test_seconds_of_a_link():
    for operation, ranks, expected in (
        ("all_reduce", 1, 0.0),
        ("all_reduce", 4, 6e-4 + 3e-3),
        ("all_to_all", 4, 3e-4 + 2e-3),
        ("all_gather", 4, 3e-4 + 6e-3),
        ("send", 2, 1e-4 + 2e-3),
        ("recv", 2, 0.0),
    ):
        assert LINK.seconds(operation, ranks, 10**6) == pytest.approx(expected, rel=1e-12, abs=0)
    with pytest.raises(ValueError, match="operation is 'broadcast', expected 'all_reduce'"):
        LINK.seconds("broadcast", 2, 1)


def test_fit_recovers_a_link_and_weighs_errors_by_what_they_are_errors_of():
    points = [(p, n, LINK.seconds("all_reduce", p, n)) for p in (2, 4) for n in (4, 2**10, 2**14, 2**22)]
    link = cost.Link.fit(points)
    assert (link.alpha, link.beta) == pytest.approx((LINK.alpha, LINK.beta), rel=1e-9)
    # 1% of a long message's time is hundreds of times a short one's, which must stay close all the same.
    points[-1] = (*points[-1][:2], points[-1][2] * 1.01)
    link = cost.Link.fit(points)
    for p, n, seconds in points:
        assert link.seconds("all_reduce", p, n) == pytest.approx(seconds, rel=0.02)
    link = cost.Link.fit([(2, 2**10, 2e-4), (2, 2**20, 1e-4)])  # longer messages, shorter times
    assert (link.alpha > 0, link.beta) == (True, 0.0)


def measured_link() -> tuple[float, float]:
    with join_world("cpu") as world:
        link = cost.measure_link(world, sizes=(2**10, 2**16, 2**20))
        return link.alpha, link.beta


def test_a_measured_link_is_the_same_on_every_rank(ranks):
    first, second = ranks(2, measured_link)
    assert first == pytest.approx(second, rel=1e-9, abs=0)  # of equal points, by a solver that may round
    assert min(first) >= 0
    assert sum(first) > 0
