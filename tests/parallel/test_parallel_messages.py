# SPDX-License-Identifier: MIT
"""Messages of a training step, counted: the tables of docs/parallel.md and docs/muon.md."""

import math
from collections import Counter
from functools import partial
from unittest.mock import patch

import pytest
import torch
from test_parallel_meshes import split, sum_of_losses

from torchpar import training
from torchpar.nn import MLP
from torchpar.parallel import join_world
from torchpar.parallel.split import shared_memory
from torchpar.training.profile.collectives import Collectives

SIZES = (6, 8, 4, 10, 2)  # 56 + 36 + 50 + 22 parameters
SQUARE = (8,) * 5
BATCH = 12


def count(
    axes: dict[str, int],
    sizes: tuple[int, ...] = SIZES,
    way: str = "",
    batch: int = BATCH,
    shared: bool = False,
    frozen: int = 0,
) -> Counter[tuple[str, str, int]]:
    """Dimension, operation and bytes of this rank's messages in a step.

    Args:
        way: "fused", "muon", or by autograd and without an optimizer.
        shared: whether gradients may be added through shared memory.
        frozen: of how many layers the weights are; if all, the input needs a gradient.
    """
    torch.manual_seed(0)
    supported = shared_memory.SUPPORTED and shared
    with join_world("cpu") as world, patch.object(shared_memory, "SUPPORTED", supported):
        world = world.with_mesh(**axes)
        model = MLP(sizes)
        model.layers[:frozen].requires_grad_(False)
        model, step, _ = split(model, world, "1f1b", 4, fused=way == "fused")
        mesh = world.mesh["dp", "tp"]
        optimizer = training.muon(model, 0.1, 0.9, 0.0, mesh=mesh) if way == "muon" else None
        x, labels = torch.randn(batch, sizes[0]), torch.arange(batch) % sizes[-1]
        x.requires_grad_(frozen == len(sizes) - 1)
        mine = world.share(x), world.share(labels)
        counted = []
        for _ in range(4):  # DistributedDataParallel sets itself up in two steps
            with Collectives(world) as collectives:
                step(*mine, batch, sum_of_losses)
                if optimizer is not None:
                    optimizer.step()
            model.zero_grad()
            counted.append(Counter((c.dimension, c.operation, c.bytes) for c in collectives.calls))
    assert counted[2] == counted[3]
    return counted[3]


def sums(dimension: str, *nbytes: int) -> Counter[tuple[str, str, int]]:
    return Counter((dimension, "all_reduce", n) for n in nbytes)


def neighbour(*nbytes: int) -> Counter[tuple[str, str, int]]:
    return Counter(("pp", operation, n) for n in nbytes for operation in ("send", "recv"))


# Forward, a pair sums its output; backward, the gradient of its input, if that is not the model's.
@pytest.mark.parametrize(
    "axes, sizes, expected",
    [
        ({"dp": 3}, SIZES, sums("dp", 656)),
        ({"tp": 2}, SIZES, sums("tp", 4 * 12 * 4, 4 * 12 * 2, 4 * 12 * 4)),
        ({"tp": 2}, SIZES[:4], sums("tp", 4 * 12 * 4)),  # the last layer is whole
        ({"dp": 2, "tp": 2}, SIZES, sums("tp", 96, 48, 96) + sums("dp", 4 * (28 + 20 + 25 + 12))),
        # Micro-batches of 2, 2, 1 and 1 samples.
        (
            {"dp": 2, "pp": 2},
            SIZES,
            [neighbour(32, 32, 16, 16) + sums("dp", 4 * n) for n in (92, 72)],
        ),
        # A border within a pair, of half its width.
        (
            {"tp": 2, "pp": 2},
            SIZES[:3],
            [neighbour(*[48] * 4) + sums("tp", *[48] * n) for n in (0, 4)],
        ),
    ],
)
def test_messages_of_a_mesh(ranks, axes, sizes, expected):
    expected = expected if isinstance(expected, list) else [expected]
    world_size = math.prod(axes.values())
    for rank, calls in enumerate(ranks(world_size, count, axes, sizes)):
        # The ranks of a stage are neighbours.
        assert calls == expected[rank * len(expected) // world_size]


@pytest.mark.parametrize("frozen, backward", [(2, []), (4, [4 * 12 * 6, 4 * 12 * 4])])
def test_frozen_layers_take_no_messages_but_those_of_their_input(ranks, frozen, backward):
    expected = sums("tp", 4 * 12 * 4, 4 * 12 * 2, *backward)
    assert ranks(2, partial(count, frozen=frozen), {"tp": 2}) == [expected] * 2


@pytest.mark.parametrize("shared", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_gradients_by_hand_take_one_message_through_memory_or_not(ranks, shared):
    for batch in (BATCH, 2):  # a rank without a sample
        assert ranks(3, count, {"dp": 3}, SIZES, "fused", batch, shared) == [sums("dp", 656)] * 3
    assert ranks(3, count, {"dp": 3}, SIZES, "", BATCH, shared) == [sums("dp", 656)] * 3
    assert ranks(1, count, {"dp": 1}, SIZES, "fused") == [Counter()]


# A checksum of each other rank, then numbers of four matrices of 64, in bfloat16.
CHECKSUM = 4


@pytest.mark.parametrize(
    "axes, received",
    [
        ({"dp": 2}, [CHECKSUM + 2 * 64]),
        ({"tp": 2}, [CHECKSUM + 2 * 32, 2 * 32]),
        ({"dp": 2, "tp": 2}, [3 * CHECKSUM + 32, 3 * 32]),
    ],
)
def test_muon_takes_at_most_two_all_to_alls(ranks, axes, received):
    for calls in ranks(math.prod(axes.values()), count, axes, SQUARE, "muon"):
        muons = sorted(
            nbytes for _, operation, nbytes in calls.elements() if operation == "all_to_all"
        )
        assert muons == sorted(2 * n for n in received)
