# SPDX-License-Identifier: MIT
"""Gradients of units that are added as integers, in any order, and models that are split over
ranks."""

import math
from collections.abc import Callable
from functools import cache
from itertools import permutations
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from torchpar import exact
from torchpar.errors import ConfigError
from torchpar.exact import tensor_parallel
from torchpar.exact.data_parallel import BinnedSum
from torchpar.exact.verify import models, verify
from torchpar.parallel import join_world


def binned(parts: list[list[Tensor]]) -> Tensor:
    """The sum of sums, as ranks add them."""
    sums = [BinnedSum(torch.zeros(50)) for _ in parts]
    for one, part in zip(sums, parts, strict=True):
        for x in part:
            one.add(x)
    for one in sums:
        one.raise_to(max(one.top for one in sums))
    sums[0].bins = sum(one.bins for one in sums)
    return sums[0].total()


def test_sums_do_not_depend_on_the_order_or_the_ranks():
    torch.manual_seed(0)
    scales = [1e-12, 1.0, 1e-3, 3e8, 1e-30, 1e8]  # in different bins, with cancellation
    x = [torch.randn(50) * scale * torch.logspace(0, -9, 50) for scale in scales]
    expected = binned([x])
    for order in list(permutations(range(len(x))))[::37]:
        shuffled = [x[i] for i in order]
        for cut in (1, 3):
            assert torch.equal(binned([shuffled[:cut], shuffled[cut:]]), expected)
    sums = {tuple(sum(x[i] for i in order).tolist()) for order in permutations(range(len(x)))}
    assert len(sums) > 1  # those of float32 do
    ideal = torch.tensor(
        [math.fsum(values) for values in zip(*(t.tolist() for t in x), strict=True)]
    )
    # The cut leaves out 2⁻³⁰ of the largest term for each term; the result is rounded once.
    bound = len(x) * 2.0**-30 * max(t.abs().max() for t in x) + 2.0**-24 * ideal.abs()
    assert ((expected.double() - ideal).abs() <= bound).all()


def test_sums_of_unusual_numbers():
    one = BinnedSum(torch.zeros(2))
    assert one.total() is None
    one.add(torch.zeros(2))
    assert one.total().tolist() == [0, 0]
    one.add(torch.tensor([1e-45, -3e38]))
    assert one.total().tolist() == [0, torch.tensor(-3e38).item()]
    one.add(torch.tensor([math.inf, 1]))
    assert one.total().isnan().all()


def messages() -> None:
    with join_world("cpu") as world, exact.mode():
        x = torch.full((2,), float(world.rank))
        torch.distributed.broadcast(x, src=1)
        assert x.tolist() == [1, 1]
        torch.distributed.all_reduce(x.long())
        with pytest.raises(
            ConfigError, match=r"no exact version of c10d\.allreduce_.*; add gradients by"
        ):
            torch.distributed.all_reduce(x)
        with pytest.raises(ConfigError, match="no group was given on 2 ranks"):
            exact.DataParallel(torch.nn.Linear(3, 2))
        torch.manual_seed(world.rank)
        parallel = exact.DataParallel(torch.nn.Linear(3, 2), torch.distributed.group.WORLD)
        parallel.backward(parallel.model(x.new_ones(1, 3)).sum())
        with pytest.raises(
            ConfigError, match=r"weight differs between .*; start with the same weights"
        ):
            parallel.all_reduce()


def test_messages_pass_unless_they_add(ranks):
    ranks(2, messages)


def test_what_cannot_be_added_is_refused():
    model, x = torch.nn.Linear(3, 2), torch.ones(4, 3)
    parallel = exact.DataParallel(model)
    with pytest.raises(
        ConfigError, match=r"called outside of torchpar\.exact\.mode\(\), expected within it"
    ):
        parallel.backward(model(x).sum())
    with exact.mode():
        with pytest.raises(ConfigError, match=r"the loss has shape \(4, 2\), expected one number"):
            parallel.backward(model(x))
        parallel.backward(model(x).sum().view(1))
        assert parallel.all_reduce() == model(x).sum()
        with pytest.raises(
            ConfigError,
            match=r"no rank has called DataParallel\.backward .* each unit, not loss\.backward\(\)",
        ):
            parallel.all_reduce()
        model.bias.grad = torch.ones(2)
        with pytest.raises(
            ConfigError, match=r"a parameter has a gradient before the backward pass; call"
        ):
            parallel.backward(model(x).sum())
        model.zero_grad()
        model.bias.requires_grad_(False)
        with pytest.raises(ConfigError, match="frozen or unfrozen after DataParallel was made"):
            parallel.backward(model(x).sum())
        with pytest.raises(
            ConfigError, match=r"weight is torch\.float64, expected a parameter of float32"
        ):
            exact.DataParallel(torch.nn.Linear(3, 2, dtype=torch.float64))


# Split models


def split_layers_have_the_bits_of_the_whole() -> None:
    with join_world("cpu") as world:
        mesh = world.with_mesh(tp=world.world_size).mesh["tp"]
        # Some ranks have no features.
        for inputs, hidden, outputs in ((12, 33, 5), (7, 3, 1), (1, 1, 3)):
            torch.manual_seed(0)
            sizes = (2, 9, inputs), (hidden, inputs), (outputs, hidden), (2, 9, outputs)
            x, up, down, g = (torch.randn(*size).requires_grad_() for size in sizes)
            with torch.no_grad():
                up[:1] *= 1000  # exponents of other ranks' columns are smaller
            with exact.mode():
                y = linear(linear(x, up), down)
                expected = y, *torch.autograd.grad(y, (x, up, down), g)
                spoiled = linear(x, up).detach()

            def cut(t: Tensor, dim: int) -> Tensor:
                return t.tensor_split(mesh.size(), dim)[mesh.get_local_rank()]

            own_up, own_down = cut(up, 0), cut(down, 1)
            y = exact.linear(exact.linear(x, own_up, inputs=mesh), own_down, outputs=mesh)
            found = y, *torch.autograd.grad(y, (x, own_up, own_down), g)
            slices = *expected[:2], cut(expected[2], 0), cut(expected[3], 1)
            assert all(map(torch.equal, found, slices))
            spoiled[0, 1, 0] = math.inf
            y = exact.linear(cut(spoiled, -1), own_down, outputs=mesh)
            assert y[0, 1].isnan().all()
            assert torch.equal(y[1], expected[0][1])


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_split_layer_has_the_bits_of_the_whole(ranks, world_size):
    ranks(world_size, split_layers_have_the_bits_of_the_whole)


Mesh = tuple[int, int, int]  # dp, tp and pp


def short(model: str, mesh: Mesh, threads: int = 1, rounded: bool = False) -> str:
    """The hash after few steps. If ``rounded``, the ranks of "tp" add float32 instead of
    integers."""
    add = tensor_parallel.all_reduce

    def add_rounded(t: Tensor, *args: Any) -> Tensor:
        return add(t.float() if t.dtype == torch.int64 else t, *args)

    torch.set_num_threads(threads)
    with (
        join_world("cpu") as world,
        # Units of 32, 32 and 8 samples
        patch.multiple(models, GPT_STEPS=2, SEQUENCES=3, MLP_STEPS=3, BATCH_SIZE=72),
        patch.object(tensor_parallel, "all_reduce", add_rounded if rounded else add),
    ):
        return verify.trained(world, verify.Plan(model, *mesh))


RECORDED = "65a787ab658864f495a1276584fa9b5d2871142c4f294e6ac18c58b651540074"  # of the MLP


@pytest.fixture(scope="module")
def of_one_rank(ranks) -> Callable[[str], str]:
    """``of_one_rank(model)``: the hash by one thread, which two threads have, too, and ranks that
    add float32 have not."""

    @cache
    def trained(model: str) -> str:
        (expected,) = ranks(1, short, model, (1, 1, 1))
        assert ranks(1, short, model, (1, 1, 1), 2) == [expected]
        assert expected not in ranks(2, short, model, (1, 2, 1), 1, True)
        return expected

    return trained


@pytest.mark.parametrize(
    "model, meshes",
    [
        ("mlp", [(1, 3, 1), (2, 1, 2)]),
        pytest.param("mlp", [(2, 1, 1), (1, 1, 3), (1, 2, 2)], marks=pytest.mark.slow),
        pytest.param("gpt", [(2, 1, 1), (1, 2, 1)], marks=pytest.mark.slow),
        # A rank without a unit.
        pytest.param("mlp", [(2, 2, 2), (4, 1, 1)], marks=pytest.mark.slow),
        pytest.param("gpt", [(2, 2, 1)], marks=pytest.mark.slow),
    ],
)
def test_a_training_has_the_same_bits_on_any_mesh(ranks, of_one_rank, model, meshes):
    expected = of_one_rank(model)
    assert model == "gpt" or expected == RECORDED
    for mesh in meshes:
        assert set(ranks(math.prod(mesh), short, model, mesh)) == {expected}
