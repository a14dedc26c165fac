# SPDX-License-Identifier: MIT
"""Gradients of units that are added as integers: any order, any ranks, and a GPT that is split over ranks."""

import math
from itertools import permutations
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from torchpar import exact
from torchpar.errors import ConfigError
from torchpar.exact import gpt, verify
from torchpar.exact.data_parallel import BinnedSum
from torchpar.nn import MLP
from torchpar.ops import _exact
from torchpar.parallel import join_world


def terms() -> list[Tensor]:
    """Tensors whose sizes lie in different bins, with cancellation."""
    torch.manual_seed(0)
    scales = [1e-12, 1.0, 1e-3, 3e8, 1e-30, 1e8]
    return [torch.randn(50) * scale * torch.logspace(0, -9, 50) for scale in scales]


def binned(parts: list[list[Tensor]]) -> Tensor:
    """The sum of sums, as ranks add them."""
    sums = []
    for part in parts:
        one = BinnedSum(torch.zeros(50))
        for x in part:
            one.add(x)
        sums.append(one)
    top = max(one.top for one in sums)
    for one in sums:
        one.raise_to(top)
    total = sums[0]
    total.bins = sum(one.bins for one in sums)
    return total.total()


def test_sums_do_not_depend_on_the_order_or_the_ranks():
    x = terms()
    expected = binned([x])
    for order in list(permutations(range(len(x))))[::37]:
        shuffled = [x[i] for i in order]
        for cut in (1, 3):
            assert torch.equal(binned([shuffled[:cut], shuffled[cut:]]), expected)
    sums = {tuple(sum(x[i] for i in order).tolist()) for order in permutations(range(len(x)))}
    assert len(sums) > 1  # those of float32 do
    ideal = torch.tensor([math.fsum(values) for values in zip(*(t.tolist() for t in x), strict=True)])
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


def gradients() -> dict[str, Tensor]:
    """Of 12 samples, which the ranks share and take in an order of their own."""
    with join_world("cpu") as world, exact.mode():
        torch.manual_seed(0)
        model = MLP([5, 7, 3], hidden="relu")
        x, labels = torch.rand(12, 5), torch.arange(12) % 3
        parallel = exact.DataParallel(model, world.mesh["dp"].get_group())
        for i in list(range(12))[world.rank :: world.world_size][:: -1 if world.rank else 1]:
            loss = torch.nn.functional.cross_entropy(model(x[i : i + 1]), labels[i : i + 1])
            parallel.backward(loss / 12)
        loss = parallel.all_reduce()
        found = {name: p.grad for name, p in model.named_parameters()} | {"loss": loss}
        with pytest.raises(ConfigError, match=r"a parameter has a gradient before the backward pass; call"):
            parallel.backward(model(x).sum())
        with pytest.raises(ConfigError, match="no rank has called backward since the last all_reduce"):
            parallel.all_reduce()
        return found


def test_ranks_change_no_bit(ranks):
    (expected,) = ranks(1, gradients)
    for world_size in (2, 3):
        for found in ranks(world_size, gradients):
            assert all(torch.equal(found[name], t) for name, t in expected.items())


def test_digits_of_changed_weights_are_cut_again():
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(6, 5, bias=False), torch.randn(2, 6)
    parallel = exact.DataParallel(layer)
    kept = parallel._kept.of[layer.weight.data_ptr()]
    with exact.mode():
        for factor in (1.0, 1.0, 3.0):
            layer.weight.data.mul_(factor)  # which no counter of changes sees
            copy = layer.weight.detach().clone()  # whose digits nobody keeps
            assert torch.equal(layer(x), torch.nn.functional.linear(x, copy))
            assert len(kept) == 1
        for n in range(1, 5):
            layer.weight[:n] @ x.T
            x @ layer.weight[:n].T
    assert 1 < len(kept) <= 2
    assert parallel._kept in _exact._keepers
    del parallel
    assert not _exact._keepers


def messages() -> None:
    with join_world("cpu") as world, exact.mode():
        x = torch.full((2,), float(world.rank))
        torch.distributed.broadcast(x, src=1)
        assert x.tolist() == [1, 1]
        torch.distributed.all_reduce(x.long())
        with pytest.raises(ConfigError, match=r"no exact version of c10d\.allreduce_"):
            torch.distributed.all_reduce(x)


def test_messages_pass_unless_they_add(ranks):
    ranks(2, messages)


def test_what_cannot_be_added_is_refused():
    model, x = torch.nn.Linear(3, 2), torch.ones(4, 3)
    parallel = exact.DataParallel(model)
    with exact.mode():
        with pytest.raises(ConfigError, match=r"the loss has shape \(4, 2\), expected one number"):
            parallel.backward(model(x))
        parallel.backward(model(x).sum().view(1))
        parallel.all_reduce()
        model.zero_grad()
        model.bias.requires_grad_(False)
        with pytest.raises(ConfigError, match="frozen or unfrozen after DataParallel was made"):
            parallel.backward(model(x).sum())
        with pytest.raises(ConfigError, match=r"weight is torch\.bfloat16, expected a parameter of float32"):
            exact.DataParallel(torch.nn.Linear(3, 2, dtype=torch.bfloat16))


def short_gpt(dp: int, tp: int) -> str:
    with (
        join_world("cpu") as world,
        patch.object(verify, "current_world", lambda: world),
        patch.multiple(gpt, STEPS=2, SEQUENCES=3),
    ):
        return verify.trained_gpt(dp, tp, 1, verify.DATA)


@pytest.mark.parametrize("meshes", [((2, 1), (1, 2)), pytest.param(((2, 2),), marks=pytest.mark.slow)])
def test_a_gpt_has_the_same_bits_on_any_mesh(ranks, meshes):
    (expected,) = ranks(1, short_gpt, 1, 1)
    for dp, tp in meshes:
        assert set(ranks(dp * tp, short_gpt, dp, tp)) == {expected}
