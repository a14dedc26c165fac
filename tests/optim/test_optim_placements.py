# SPDX-License-Identifier: MIT
"""Muon on several ranks: the number of messages, and what is refused; the kit compares the
values."""

import copy
from collections import OrderedDict
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from torchpar.nn import Linear
from torchpar.optim import Muon
from torchpar.parallel import join_world
from torchpar.parallel.split.layers import ColumnParallelLinear, RowParallelLinear
from torchpar.parallel.split.parts import part_of

# PyTorch's Muon fails on a sharded matrix of one row (vllm-project/speculators#821).
SHAPES = [(20, 30), (30, 20), (20, 30), (16, 80), (33, 33), (90, 17), (5, 72), (1, 40), (2, 3)]
ALL_TO_ALL = torch.ops.c10d.alltoall_base_


def check_messages(ours: Muon, messages: int) -> None:
    """Each step sends ``messages`` all-to-alls; the first one also compares the ranks."""
    for step in range(3):
        for p in [p for group in ours.param_groups for p in group["params"]]:
            p.grad = torch.ones_like(p)
        with CommDebugMode() as collectives:
            ours.step()
        assert collectives.get_comm_counts()[ALL_TO_ALL] == messages
        if step > 0:
            assert collectives.get_total_counts() == messages


def dtensors(mesh: tuple[int, ...], *placements: Any, messages: int) -> None:
    """Two parameter groups share the messages, and have the bits of whole parameters."""
    of_ranks = init_device_mesh("cpu", mesh)
    whole = [torch.ones(shape).requires_grad_() for shape in SHAPES]
    parts = [distribute_tensor(p.detach(), of_ranks, placements).requires_grad_() for p in whole]
    for params, expected in ((whole, 0), (parts, messages)):
        groups = [{"params": params[:4]}, {"params": params[4:], "lr": 0.2, "momentum": 0.5}]
        check_messages(Muon(groups, ns="standard"), expected)
    for part, p in zip(parts, whole, strict=True):
        assert torch.equal(part.full_tensor(), p)


def split_layers() -> None:
    """Layers split over "tp", with replicas on "dp" that share the work."""
    with join_world("cpu") as world:
        world = world.with_mesh(dp=2, tp=2)
        torch.manual_seed(
            0
        )  # the ranks may have run other tests, and split layers begin with the same weights
        linears = [Linear(*sizes, bias=False) for sizes in ((33, 20), (7, 9), (2, 1))]
        split = [RowParallelLinear.from_linear(linear, mesh=world.mesh["tp"]) for linear in linears]
        split[0] = copy.deepcopy(split[0])  # a copy has its own marks
        check_messages(
            Muon([layer.weight for layer in split], process_group=world.mesh["dp", "tp"]), 2
        )


def replicas() -> None:
    ours = Muon(
        [torch.ones(shape).requires_grad_() for shape in SHAPES], process_group=dist.group.WORLD
    )
    check_messages(ours, 1)
    (exchange,), _ = ours._exchanges()
    work = [None] * dist.get_world_size()
    costs = [info.cost for info in exchange.params]
    dist.all_gather_object(work, sum(info.cost for info in exchange.owned))
    assert sum(work) == sum(costs)
    assert max(work) - min(work) <= max(costs)  # the ranks share the work about evenly


def some_sharded() -> None:
    """Two meshes of the same ranks share the messages, and whole parameters need none."""
    mesh, named = (
        init_device_mesh("cpu", (3,)),
        init_device_mesh("cpu", (3,), mesh_dim_names=("x",)),
    )
    whole = [torch.ones(shape).requires_grad_() for shape in SHAPES]
    parts = [p.detach().clone().requires_grad_() for p in whole]
    for i, place in ((1, Shard(0)), (2, Shard(1)), (4, Replicate())):
        on = named if i == 2 else mesh
        parts[i] = distribute_tensor(whole[i].detach(), on, [place]).requires_grad_()
    for params, expected in ((whole, 0), (parts, 2)):
        check_messages(Muon(params, ns="standard"), expected)
    for part, p in zip(parts, whole, strict=True):
        assert torch.equal(part.full_tensor() if isinstance(part, DTensor) else part, p)


def in_a_circle() -> None:
    """Four pairs of ranks have a matrix each. Each rank begins with the pair with the next rank."""
    pairs = [(0, 1), (1, 2), (2, 3), (0, 3)]
    meshes = [DeviceMesh("cpu", list(pair)) for pair in pairs]
    torch.manual_seed(0)
    whole = [torch.randn(6, 4).requires_grad_() for _ in pairs]
    rank, given = dist.get_rank(), {}
    for i in (rank, rank - 1):
        part = distribute_tensor(whole[i].detach(), meshes[i], [Shard(0)], src_data_rank=None)
        given[f"of ranks {pairs[i]}"] = part.requires_grad_()
    check_messages(Muon(whole, ns="standard"), 0)
    check_messages(Muon(given.items(), ns="standard"), 4)
    for i, part in zip((rank, rank - 1), given.values(), strict=True):
        assert torch.equal(part.to_local(), part_of(part).narrow(whole[i]))


PLACEMENTS: dict[str, Any] = {
    "some sharded": (3, some_sharded),
    "in a circle": (4, in_a_circle),
    "copies": (3, partial(dtensors, (3,), Replicate(), messages=1)),
    "copies of columns": (4, partial(dtensors, (2, 2), Replicate(), Shard(1), messages=2)),
    "split layers and replicas": (4, split_layers),
    "replicas": (3, replicas),
}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_step_sends_few_messages(ranks, placement):
    ranks(*PLACEMENTS[placement])


def fused_weights() -> None:
    """Weights of several matrices, split by rows or columns: updates as of whole weights."""
    sizes = {"qkv": (8, 24), "c_attn": (8, 16), "gate_up_proj": (4, 10), "head": (8, 4)}
    torch.manual_seed(0)
    whole = torch.nn.Sequential(OrderedDict((name, Linear(*of)) for name, of in sizes.items()))
    model = copy.deepcopy(whole)
    with join_world("cpu") as world:
        mesh = world.with_mesh(tp=world.world_size).mesh["tp"]
        for name in list(sizes)[:-1]:
            kind = RowParallelLinear if name == "c_attn" else ColumnParallelLinear
            setattr(model, name, kind.from_linear(getattr(model, name), mesh=mesh))
        both = [Muon.for_model(one, lr=0.1, ns="standard") for one in (whole, model)]
    assert repr(both[0]) == repr(both[1])
    for p, q in zip(whole.parameters(), model.parameters(), strict=True):
        p.grad = torch.randn_like(p)
        q.grad = part_of(q).narrow(p.grad).clone()
    for optimizer in both:
        optimizer.step()
    matrices = [optimizer.param_groups[0]["params"] for optimizer in both]
    assert len(matrices[0]) == len(sizes) - 1
    for p, q in zip(*matrices, strict=True):
        assert torch.equal(part_of(q).narrow(p), q)


def test_a_split_layers_weight_is_seen_as_the_matrices_of_the_unsharded_one(ranks):
    """Three ranks have 8 of 24 rows each, which are no three matrices."""
    ranks(3, fused_weights)


def refused(message: str) -> Any:
    return pytest.raises(ValueError, match=f"^(Muon: )?{message}")


def refusals() -> None:
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
    alone = [dist.new_group([rank]) for rank in range(2)][rank]
    ones = torch.ones(4, 6)
    rows, columns, copies = (
        distribute_tensor(ones, mesh, [to]) for to in (Shard(0), Shard(1), Replicate())
    )
    sums = DTensor.from_local(ones, mesh, [Partial()])
    shared = {"process_group": dist.group.WORLD}

    def step(params: Any, *gradients: Any, **arguments: Any) -> Muon:
        """One step of copies of the parameters, by default with gradients of ones."""
        optimizer = Muon([(name, p.clone().requires_grad_()) for name, p in params], **arguments)
        own = optimizer.param_groups[0]["params"]
        for p, gradient in zip(own, gradients or map(torch.ones_like, own), strict=True):
            p.grad = gradient
        optimizer.step()
        return optimizer

    with refused(
        "gradient 1, of second, is torch.strided on rank 0 and None on rank 1, expected the same "
        "on all"
    ):
        step([("first", ones), ("second", ones)], ones, None if rank else ones, **shared)
    with refused(
        r"parameter 0 is p \(2, 6\) \(torch.float32, matrices \[\(2, 6\)\], group 0\) on rank 0 "
        r"and p \(3, 6\) \(torch.float64, .*\) on rank 1, expected the same on all"
    ):
        step([("p", ones[: 2 + rank].to([torch.float32, torch.float64][rank]))], **shared)
    with refused(
        r"the ranks have 12 elements of split, which has shape \(4, 6\); expected a process_group "
        "of all"
    ):
        step([("split", rows)], process_group=alone)
    with refused(r"partial: its placements are \(Partial\(sum\),\), expected Shard or Replicate"):
        Muon([("partial", sums)])
    with refused(
        r"the gradient of copies is torch.strided \(Partial\(sum\),\), expected torch.strided "
        r"\(Replicate\(\),\); before the step, .* redistribute it to p.placements"
    ):
        step([("copies", copies)], sums)
    optimizer = step([("rows", rows)])
    with refused(
        r"a group \(late, …\) is added after the first step of several ranks; make a new Muon"
    ):
        optimizer.add_param_group({"params": [("late", columns)]})
    optimizer.param_groups[0]["lr"] = 0.3 if rank else 0.001
    with refused(
        r"lr of group 0 \(rows, …\) is 0.001 on rank 0 and 0.3 on rank 1, expected the same"
    ):
        optimizer.step()
    for changed, message in (
        (
            {0},
            "the list of parameters is changed on rank 0 and as in the first step on rank 1",
        ),
        (
            {0, 1},
            "parameters were added, removed or replaced after the first step of several ranks; "
            "make a",
        ),
    ):
        for params, arguments in (([("rows", rows)], {}), ([("copies", ones)], shared)):
            optimizer = step(params, **arguments)
            own = optimizer.param_groups[0]["params"]
            if rank in changed:
                own.append(own[0].detach().clone().requires_grad_())
            with refused(message):
                optimizer.step()
    saved, optimizer = (step([("weight", t)]) for t in (columns, rows))
    optimizer.load_state_dict(saved.state_dict())
    with refused(
        r"weight is \(4, 6\) torch.strided \(Shard\(dim=0\),\), and its momentum \(4, 6\) "
        r".*dim=1\),\); "
        "load a state dict of other placements by torch.distributed.checkpoint"
    ):
        optimizer.step()
    with join_world("cpu") as world:
        linear, split = Linear(4, 6, bias=False), world.with_mesh(tp=2).mesh["tp"]
        layer = ColumnParallelLinear.from_linear(linear, mesh=split)
        with refused(
            "weight is of a split layer, and a copy of the optimizer would not know how it is split"
        ):
            copy.deepcopy(Muon(layer.named_parameters()))
        with refused(
            "Muon.for_model: weight is a DTensor of a ColumnParallelLinear or RowParallelLinear; "
            "under"
        ):
            Muon.for_model(fully_shard(layer, mesh=mesh))


def refusals_of_parameters() -> None:
    """A group without parameters, an unsharded parameter of fully_shard, a DTensor that other ranks
    have, and another order of two groups of the same ranks, whose messages must meet before they
    are compared."""
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
    ones = torch.ones(4, 6)
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 2))
    fully_shard(model[1], mesh=mesh)
    fully_shard(model, mesh=mesh)
    with torch.no_grad():
        model(ones)
    of_forward = Muon([p for p in model.parameters() if p.dim() == 2])
    model(ones).sum().backward()
    with refused(r"parameter 0 of group 0 has no memory, .*; call model.reshard\(\), and then"):
        of_forward.step()
    rows = distribute_tensor(ones, mesh, [Shard(0)])
    unnamed = Muon([rows.clone().requires_grad_()])
    unnamed.param_groups[0]["params"][0].grad = rows
    unnamed.step()
    with refused(r"a group \(of no parameters\) is added after the first step"):
        unnamed.add_param_group({"params": []})
    first = distribute_tensor(ones, DeviceMesh("cpu", [0]), [Shard(0)], src_data_rank=None)
    with refused("first is a DTensor of other ranks, expected a mesh") if rank else nullcontext():
        Muon([("plain", ones), ("first", first)])
    meshes = [DeviceMesh.from_group(dist.new_group([0, 1]), "cpu") for _ in range(2)]
    assert len({mesh.get_group().group_name for mesh in meshes}) == 2
    named = [
        (name, distribute_tensor(ones, mesh, [Shard(0)]).requires_grad_())
        for name, mesh in zip("ab", meshes, strict=True)
    ]
    for _, p in named:
        p.grad = torch.ones_like(p)
    optimizer = Muon(named[::-1] if rank else named)
    with refused(r"parameter 0 is a .* on rank 0 and b .* on rank 1, expected the same on all"):
        optimizer.step()


@pytest.mark.parametrize("wrong", [refusals, refusals_of_parameters])
def test_every_rank_names_what_is_wrong(ranks, wrong):
    ranks(2, wrong)


def differ_later() -> None:
    p = torch.ones(4, 6).requires_grad_()
    p.grad = torch.ones(4, 6)
    optimizer = Muon([("p", p)], lr=0.1, process_group=dist.group.WORLD)
    (exchange,), _ = optimizer._exchanges()
    exchange.reads_later = True  # as between GPUs, for which a step does not wait
    optimizer.step()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1 + dist.get_rank()
    optimizer.step()
    with refused(r"lr of group 0 \(p, …\) is 0.1 on rank 0 and 1.1 on rank 1, expected the same"):
        optimizer.step()


def test_a_difference_between_gpus_is_named_in_the_next_step(ranks):
    ranks(2, differ_later)


def fails_alone(change: Any) -> None:
    p, q = (torch.ones(4, 6).requires_grad_() for _ in range(2))
    optimizer = Muon([("p", p), ("q", q)], lr=0.1, process_group=dist.group.WORLD)
    (exchange,), _ = optimizer._exchanges()
    exchange.reads_later = True
    p.grad, q.grad = torch.ones(4, 6), torch.ones(4, 6)
    optimizer.step()
    if dist.get_rank() == 1:
        change(optimizer, p)
    with refused(".*on rank 0 and .* on rank 1, expected the same"):
        for _ in range(2):  # the other rank learns of it in its next step
            optimizer.step()


def has_a_sparse_gradient(optimizer: Muon, p: torch.Tensor) -> None:
    p.grad = torch.ones(4, 6).to_sparse()


def has_fewer_parameters(optimizer: Muon, p: torch.Tensor) -> None:
    optimizer.param_groups[0]["params"].pop()


@pytest.mark.parametrize("change", [has_a_sparse_gradient, has_fewer_parameters])
def test_a_rank_that_fails_alone_waits_for_the_others_to_notice(ranks, change):
    ranks(2, partial(fails_alone, change))
