# SPDX-License-Identifier: MIT
"""Muon on several ranks: DTensors of any placement, split layers and replicas step as whole matrices do."""

import copy
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from torchpar.nn import Linear
from torchpar.optim import Muon
from torchpar.parallel import join_world
from torchpar.parallel.split.layers import ColumnParallelLinear, RowParallelLinear

SHAPES = [(20, 30), (30, 20), (20, 30), (16, 80), (33, 33), (90, 17), (5, 72), (1, 40), (2, 3)]
ALL_TO_ALL = torch.ops.c10d.alltoall_base_


def compare(
    whole: list[Tensor],
    parts: list[Tensor],
    split: Callable[[Tensor, int], Tensor],
    gather: Callable[[Tensor], Tensor],
    messages: int,
    **arguments: Any,
) -> None:
    """Three steps of both must have the same bits; those of ``parts`` send ``messages`` each."""
    ours, reference = Muon(parts, lr=0.1, ns="standard", **arguments), Muon(whole, lr=0.1, ns="standard")
    for step in range(3):
        torch.manual_seed(step)
        for i, (p, q) in enumerate(zip(parts, whole, strict=True)):
            q.grad = None if step == 1 and i == 3 else torch.randn_like(q)
            p.grad = None if q.grad is None else split(q.grad, i)
        reference.step()
        with CommDebugMode() as collectives:
            ours.step()
        assert collectives.get_comm_counts()[ALL_TO_ALL] == messages
        assert (
            step == 0 or collectives.get_total_counts() == messages
        )  # the first step also compares the ranks
        for p, q in zip(parts, whole, strict=True):
            torch.testing.assert_close(gather(p.detach()), q.detach(), rtol=0, atol=0)


def random_matrices() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape).requires_grad_() for shape in SHAPES]


def dtensors(shape: tuple[int, ...], placements: list[Any]) -> None:
    mesh = init_device_mesh("cpu", shape)
    whole = random_matrices()
    parts = [distribute_tensor(p.detach(), mesh, placements).requires_grad_() for p in whole]
    moved = any(placement != Replicate() for placement in placements)
    compare(
        *(whole, parts),
        lambda g, i: distribute_tensor(g, mesh, placements),
        lambda p: p.full_tensor(),  # type: ignore[attr-defined]
        messages=1 + moved,
    )


@pytest.mark.parametrize("world_size", [2, 3, pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate()], ids=str)
def test_dtensors_step_as_whole_matrices(ranks, world_size, placement):
    ranks(world_size, dtensors, (world_size,), [placement])


@pytest.mark.parametrize(
    "placements",
    [[Shard(0), Shard(1)], [Shard(0), Shard(0)], [Replicate(), Shard(1)], [Shard(1), Replicate()]],
    ids=str,
)
@pytest.mark.parametrize("shape", [(2, 2), pytest.param((2, 3), marks=pytest.mark.slow)], ids=str)
def test_dtensors_of_two_dimensions_step_as_whole_matrices(ranks, shape, placements):
    ranks(shape[0] * shape[1], dtensors, shape, placements)


def layers(kind: Any, dp: int, tp: int) -> None:
    """Layers split over "tp", with replicas on "dp" that share the work."""
    with join_world("cpu") as world:
        world = world.with_mesh(dp=dp, tp=tp)
        torch.manual_seed(0)
        linears = [Linear(*sizes, bias=False) for sizes in ((33, 20), (7, 9), (2, 1))]
        split = [kind.from_linear(linear, mesh=world.mesh["tp"]) for linear in linears]
        split = [copy.deepcopy(split[0]), *split[1:]]  # a copy has its own marks
        weights = [layer.weight for layer in split]

        def gather(p: Tensor) -> Tensor:
            (layer,) = (layer for layer in split if layer.weight.data_ptr() == p.data_ptr())
            return layer.full_weight().detach()

        compare(
            *([linear.weight for linear in linears], weights),
            lambda g, i: split[i].partition.narrow(g, kind.split_axes["weight"]).clone(),
            gather,
            messages=2,
            process_group=world.mesh["dp", "tp"] if dp > 1 else None,
        )


@pytest.mark.parametrize("kind", [ColumnParallelLinear, RowParallelLinear])
@pytest.mark.parametrize("dp, tp", [(1, 2), (1, 3), (2, 2)])
def test_split_layers_step_as_whole_ones(ranks, kind, dp, tp):
    ranks(dp * tp, layers, kind, dp, tp)


def replicas() -> list[int]:
    """Returns the work of this rank."""
    whole = random_matrices()
    parts = [p.detach().clone().requires_grad_() for p in whole]
    compare(whole, parts, lambda g, i: g.clone(), lambda p: p, messages=1, process_group=dist.group.WORLD)
    optimizer = Muon(parts, process_group=dist.group.WORLD)
    ((items, exchange),) = optimizer._plans()
    return [sum(items[i].p.numel() * min(items[i].p.shape) for i in exchange.owned)]


@pytest.mark.parametrize("world_size", [2, 3])
def test_replicas_share_the_work(ranks, world_size):
    work = [cost for (cost,) in ranks(world_size, replicas)]
    largest = max(p.numel() * min(p.shape) for p in random_matrices())
    assert sum(work) == sum(p.numel() * min(p.shape) for p in random_matrices())
    assert max(work) - min(work) <= largest


def without_messages(placement: Any) -> None:
    def of_ones(output: Tensor, *_: Any, **__: Any) -> None:
        output.fill_(1)  # which say, too, that gradients are there

    with patch.object(dist, "all_to_all_single", of_ones):
        dtensors((2,), [placement])


@pytest.mark.parametrize("placement", [Shard(0), Replicate()], ids=str)
def test_the_comparison_rejects_lost_messages(ranks, placement):
    with pytest.raises(AssertionError):
        ranks(2, without_messages, placement)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    sizes = (12, 34, 7, 3)
    return nn.Sequential(*(nn.Linear(m, n, bias=False) for m, n in pairwise(sizes)))


def fully_sharded(dp: int, tp: int) -> None:
    """`fully_shard`, also of a model that `parallelize_module` has split; with uneven and empty shards."""
    mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
    whole, model = make_model(), make_model()
    if tp > 1:
        parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    for layer in (*model, model):
        fully_shard(layer, mesh=mesh["dp"])
    ours = Muon(model.named_parameters(), lr=0.1, ns="standard")
    reference = Muon(whole.named_parameters(), lr=0.1, ns="standard")
    for step in range(3):
        torch.manual_seed(step)
        x = torch.randn(8, 12)
        for one in (whole, model):
            one.zero_grad()
            one(x).square().mean().backward()
        for p, q in zip(model.parameters(), whole.parameters(), strict=True):
            gradient = p.grad.full_tensor()
            torch.testing.assert_close(gradient, q.grad)
            q.grad = gradient  # whose rounding may differ
        ours.step()
        reference.step()
        for p, q in zip(model.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(p.full_tensor(), q, rtol=0, atol=0)
            momentum = ours.state[p]["momentum_buffer"]
            assert isinstance(momentum, DTensor)
            torch.testing.assert_close(momentum.full_tensor(), reference.state[q]["momentum_buffer"])


@pytest.mark.parametrize("dp, tp", [(2, 1), (4, 1), (2, 2)])
def test_fully_sharded_models_step_as_whole_ones(ranks, dp, tp):
    ranks(dp * tp, fully_sharded, dp, tp)


def message(function: Callable[[], object]) -> str:
    try:
        function()
    except ValueError as e:
        return str(e)
    return "taken"


def halves(t: Tensor) -> Tensor:
    return t.view(2, 2, 6)


def refusals() -> list[str]:
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
    group = dist.group.WORLD
    p, q = (torch.ones(4, 6).requires_grad_() for _ in range(2))
    named = [("first", p), ("second", q)]
    split = distribute_tensor(p.detach(), mesh, [Shard(0)]).requires_grad_()
    partial = DTensor.from_local(p.detach(), mesh, [Partial()]).requires_grad_()

    def missing(params: Any, process_group: Any) -> None:
        optimizer = Muon(params, process_group=process_group)
        for _, t in params:
            t.grad = torch.ones_like(t)
        if rank == 1:
            params[-1][1].grad = None
        optimizer.step()

    return [
        message(lambda: missing(named, group)),
        message(lambda: missing([("split", split)], None)),
        message(lambda: Muon([torch.ones(2 + rank, 3)], process_group=group).step()),
        message(lambda: Muon(named[: 1 + rank], process_group=group).step()),
        message(lambda: Muon(named, process_group=group, views={} if rank else {"first": halves}).step()),
        message(lambda: Muon([("partial", partial)])),
    ]


def test_every_rank_names_what_is_wrong(ranks):
    for messages in ranks(2, refusals):
        others = [messages.pop(2) for _ in range(3)]
        begin = "Muon: the ranks that share its work have other parameters: "
        assert others[0].startswith(
            f"{begin}parameter 0 of group 0 (2, 3) (matrices [(2, 3)], group 0, auto,"
        )
        assert "and parameter 0 of group 0 (3, 3)" in others[0]
        assert others[1].startswith(f"{begin}none on the first of them, and second (4, 6) (")
        assert "matrices [(2, 6), (2, 6)]" in others[2]
        assert "matrices [(4, 6)]" in others[2]
        assert messages == [
            "Muon: second has a gradient on rank 0 and none on rank 1, expected the same on all; let every "
            "rank's loss depend on it",
            "Muon: split has a gradient on rank 0 and none on rank 1, expected the same on all; let every "
            "rank's loss depend on it",
            "Muon: partial: its placements are (Partial(sum),), expected Shard or Replicate",
        ]


def sums_of_gradients(lacking: int | None) -> str:
    """Gradients that are partial sums, which ranks add before a step; on rank ``lacking`` there is none.

    Rank 2 has no row of ``rows``, and takes part in adding all the same.
    """
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (3,))
    whole = torch.arange(14.0).view(2, 7).sin()
    rows, copies = (
        distribute_tensor(whole, mesh, [place]).requires_grad_() for place in (Shard(0), Replicate())
    )
    # The order of the groups differs from that of the parameters.
    ours = Muon([{"params": [("rows", rows)]}, {"params": [("copies", copies)]}], lr=0.1, ns="standard")
    reference = whole.clone().requires_grad_()
    of_whole = Muon([reference], lr=0.1, ns="standard")
    for _ in range(2):
        for p in (rows, copies):
            p.grad = DTensor.from_local((rank + 1) * whole.cos(), mesh, [Partial()])
        reference.grad = 6 * whole.cos()
        if lacking == rank:
            copies.grad = None
        text = message(ours.step)
        if lacking is not None:
            return text
        of_whole.step()
    for p in (rows, copies):
        torch.testing.assert_close(p.full_tensor(), reference, rtol=0, atol=0)
    rows.grad = distribute_tensor(whole, mesh, [Shard(0)])  # not on all ranks as in the steps before
    if rank == 0:
        rows.grad = DTensor.from_local(whole, mesh, [Partial()])
    return message(ours.step)


@pytest.mark.parametrize("lacking", [None, 0, 2])
def test_gradients_that_are_partial_sums(ranks, lacking):
    for text in ranks(3, sums_of_gradients, lacking):
        if lacking is None:
            assert text == (
                "Muon: rows has a gradient of other placements than its own on rank 0, expected so on all "
                "ranks and in all steps, or never"
            )
        else:
            assert text == (
                f"Muon: copies has a gradient on rank {int(lacking == 0)} and none on rank {lacking}, "
                "expected the same on all; let every rank's loss depend on it"
            )


def placements_of_gradients(kind: str) -> str:
    """Gradients that ranks would redistribute in different ways."""
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
    whole = torch.ones(4, 6)
    p = distribute_tensor(whole, mesh, [Shard(0)]).requires_grad_()
    optimizer = Muon([("rows", p)])
    if kind == "later on one":
        p.grad = distribute_tensor(whole, mesh, [Shard(0)])
        optimizer.step()
        if rank == 1:
            p.grad = DTensor.from_local(whole, mesh, [Partial()])
    else:
        p.grad = DTensor.from_local(whole, mesh, [Replicate() if rank else Partial()])
    return message(optimizer.step)


@pytest.mark.parametrize(
    "kind, text",
    [
        ("later on one", "a gradient of other placements than its own on rank 1, expected so on all"),
        (
            "different",
            r"gradients of the placements \(Partial\(sum\),\) and \(Replicate\(\),\), expected the same",
        ),
    ],
)
def test_gradients_that_ranks_would_move_in_different_ways(ranks, kind, text):
    for found in ranks(2, placements_of_gradients, kind):
        assert re.match(f"Muon: rows has {text}", found), found


def momenta_of_other_placements() -> list[str]:
    mesh = init_device_mesh("cpu", (2,))
    texts = []
    for placement, saved in ((Shard(0), None), (Shard(1), Shard(0)), (None, Shard(0))):
        optimizers = []
        for place in (saved, placement):
            p = torch.ones(2, 8)
            p = (distribute_tensor(p, mesh, [place]) if place else p).requires_grad_()
            p.grad = torch.ones_like(p)
            optimizers.append(Muon([("weight", p)]))
        optimizers[0].step()
        optimizers[1].load_state_dict(optimizers[0].state_dict())
        texts.append(message(optimizers[1].step))
    return texts


def test_a_momentum_of_other_placements_is_refused(ranks):
    for texts in ranks(2, momenta_of_other_placements):
        for text in texts:
            assert re.match(r"Muon: weight is \(2, 8\) .*, and its momentum \(2, 8\) ", text), text
            assert text.endswith("torch.distributed.checkpoint loads a state dict of other placements")


def local_and_shared() -> str:
    """An error of a parameter of this rank alone comes after the messages, for which the other rank waits."""
    mesh = init_device_mesh("cpu", (2,))
    alone = torch.ones(4, 6).requires_grad_()
    shared = distribute_tensor(torch.ones(4, 6), mesh, [Shard(0)]).requires_grad_()
    optimizer = Muon([("alone", alone), ("shared", shared)])
    alone.grad, shared.grad = torch.ones(4, 6), torch.ones_like(shared)
    if dist.get_rank() == 0:
        alone.grad = alone.grad.to_sparse()
    return message(optimizer.step)


def test_an_error_of_one_rank_hangs_no_other(ranks):
    assert ranks(2, local_and_shared) == ["Muon: alone has a sparse gradient, expected a dense one", "taken"]


def group_without_elements() -> int:
    p, empty = torch.ones(4, 6).requires_grad_(), torch.ones(0, 8).requires_grad_()
    optimizer = Muon([{"params": [p]}, {"params": [empty]}], process_group=dist.group.WORLD)
    p.grad, empty.grad = torch.ones_like(p), torch.ones_like(empty)
    optimizer.step()
    return len(optimizer.state_dict()["state"])


def test_a_group_without_elements_is_not_left_out(ranks):
    assert ranks(2, group_without_elements) == [2, 2]


def sparse_on_one() -> str:
    p = torch.ones(4, 6).requires_grad_()
    p.grad = torch.ones(4, 6).to_sparse() if dist.get_rank() == 1 else torch.ones(4, 6)
    return message(Muon([("table", p)], process_group=dist.group.WORLD).step)


def test_a_sparse_gradient_on_one_rank_is_named_on_all(ranks):
    assert set(ranks(2, sparse_on_one)) == {
        "Muon: table has a sparse gradient on rank 1, expected a dense one"
    }


def copies_of_split_layers() -> list[str]:
    with join_world("cpu") as world:
        world = world.with_mesh(tp=2)
        layer = ColumnParallelLinear.from_linear(Linear(4, 6, bias=False), mesh=world.mesh["tp"])
        optimizer = Muon(layer.named_parameters())
        alone, (_, together) = copy.deepcopy(optimizer), copy.deepcopy((layer, optimizer))
        for one in (optimizer, alone, together):
            one.param_groups[0]["params"][0].grad = torch.ones_like(layer.weight)
        return [message(one.step) for one in (optimizer, alone, together)]


def test_a_copy_of_the_optimizer_alone_is_refused(ranks):
    for texts in ranks(2, copies_of_split_layers):
        assert texts == [
            "taken",
            "Muon: weight was split by hand, which this copy of the optimizer does not know; copy the "
            "layers, and make an optimizer for the copy",
            "taken",
        ]


def half_of_a_mesh() -> str:
    """A process group that lacks a rank with parts of the matrix."""
    mesh = init_device_mesh("cpu", (2,))
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    pairs = dist.new_group([0, 1])
    split = distribute_tensor(torch.ones(4, 6), mesh, [Shard(0)]).requires_grad_()
    split.grad = torch.ones_like(split)
    Muon([split], process_group=pairs).step()
    return message(lambda: Muon([split], process_group=alone).step())


def test_a_group_must_have_all_parts(ranks):
    for text in ranks(2, half_of_a_mesh):
        assert text == (
            "Muon: the ranks have 12 elements of parameter 0 of group 0, which has shape (4, 6); expected a "
            "process_group of all ranks that have parts of it"
        )


def heads(t: Tensor) -> list[Tensor]:
    return [t[:8].view(2, 4, 6), t[8:]]


def views(mesh: DeviceMesh, placement: Any) -> None:
    p = torch.randn(11, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    split = distribute_tensor(p.detach(), mesh, [placement]).requires_grad_()
    p.grad = torch.randn(11, 6, generator=torch.Generator().manual_seed(1))
    split.grad = distribute_tensor(p.grad, mesh, [placement])
    for t in (p, split):
        Muon([("qkv", t)], lr=0.1, views={"qkv": heads}).step()
    torch.testing.assert_close(split.full_tensor(), p, rtol=0, atol=0)


def views_of_shards() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for placement in (Shard(0), Shard(1), Replicate()):
        views(mesh, placement)


def test_views_of_shards(ranks):
    ranks(2, views_of_shards)
