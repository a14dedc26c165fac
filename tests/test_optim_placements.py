# SPDX-License-Identifier: MIT
"""Muon on several ranks: every placement of parameters has the bits of one process, and what is refused."""

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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from torchpar.nn import Linear
from torchpar.optim import Muon
from torchpar.optim.exchange import Exchange
from torchpar.parallel import join_world
from torchpar.parallel.split.layers import ColumnParallelLinear, RowParallelLinear

# The last one is seen as three matrices.
SHAPES = [(20, 30), (30, 20), (20, 30), (16, 80), (33, 33), (90, 17), (5, 72), (1, 40), (2, 3), (11, 6)]
VIEWS = {"9": lambda t: [t[:8].view(2, 4, 6), t[8:]]}
ALL_TO_ALL = torch.ops.c10d.alltoall_base_


def compare(
    whole: list[Tensor],
    parts: list[Tensor],
    split: Callable[[Tensor, int], Tensor],
    gather: Callable[[Tensor], Tensor],
    messages: int,
    **arguments: Any,
) -> Muon:
    """Three steps of both must have the same bits; those of ``parts`` send ``messages`` each."""
    views = VIEWS if len(whole) == len(SHAPES) else {}
    ours, reference = (
        Muon([(str(i), p) for i, p in enumerate(params)], lr=0.1, ns="standard", views=views, **options)
        for params, options in ((parts, arguments), (whole, {}))
    )
    for step in range(3):
        torch.manual_seed(step)
        for i, (p, q) in enumerate(zip(parts, whole, strict=True)):
            q.grad = None if step == 1 and i == 3 else torch.randn_like(q)
            p.grad = None if q.grad is None else split(q.grad, i)
        reference.step()
        with CommDebugMode() as collectives:
            ours.step()
        assert collectives.get_comm_counts()[ALL_TO_ALL] == messages
        if step > 0:  # the first step also compares the ranks
            assert collectives.get_total_counts() == messages
        for p, q in zip(parts, whole, strict=True):
            torch.testing.assert_close(gather(p.detach()), q.detach(), rtol=0, atol=0)
    return ours


def random_matrices() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape).requires_grad_() for shape in SHAPES]


def dtensors(shape: tuple[int, ...], *placements: Any) -> None:
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


def replicas() -> None:
    whole = random_matrices()
    parts = [p.detach().clone().requires_grad_() for p in whole]
    ours = compare(whole, parts, lambda g, i: g.clone(), lambda p: p, 1, process_group=dist.group.WORLD)
    ((_, items, exchange),) = ours._plans()
    work = [None] * dist.get_world_size()
    dist.all_gather_object(work, sum(items[i].cost for i in exchange.owned))
    costs = [item.cost for item in items]
    assert sum(work) == sum(costs)
    assert max(work) - min(work) <= max(costs)  # the ranks share the work about evenly


def fully_sharded(dp: int, tp: int) -> None:
    """`fully_shard`, also of a model that `parallelize_module` has split; with uneven and empty shards."""
    mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    whole = nn.Sequential(*(nn.Linear(m, n, bias=False) for m, n in pairwise((12, 34, 7, 3))))
    model = copy.deepcopy(whole)
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
            assert isinstance(ours.state[p]["momentum_buffer"], DTensor)


def message(function: Callable[[], object]) -> str:
    try:
        function()
    except ValueError as e:
        return str(e)
    return "taken"


PLACEMENTS: dict[str, Any] = {
    "rows": (3, dtensors, (3,), Shard(0)),
    "columns": (3, dtensors, (3,), Shard(1)),
    "copies": (3, dtensors, (3,), Replicate()),
    "rows and columns": (4, dtensors, (2, 2), Shard(0), Shard(1)),
    "rows of rows": (4, dtensors, (2, 2), Shard(0), Shard(0)),
    "copies of columns": (4, dtensors, (2, 2), Replicate(), Shard(1)),
    "layers split by columns": (3, layers, ColumnParallelLinear, 1, 3),
    "split layers and replicas": (4, layers, RowParallelLinear, 2, 2),
    "replicas": (3, replicas),
    "fully_shard": (4, fully_sharded, 4, 1),
    "fully_shard and parallelize_module": (4, fully_sharded, 2, 2),
}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_placement_has_the_bits_of_one_process(ranks, placement):
    world_size, step, *arguments = PLACEMENTS[placement]
    ranks(world_size, step, *arguments)


def without_messages() -> None:
    def lost(exchange: Exchange, *arguments: Any) -> dict[int, Tensor]:
        return {i: torch.zeros_like(whole) for i, whole in gather(exchange, *arguments).items()}

    gather = Exchange.gather
    with patch.object(Exchange, "gather", lost):
        dtensors((2,), Shard(0))


def test_the_comparison_rejects_lost_messages(ranks):
    with pytest.raises(AssertionError):
        ranks(2, without_messages)


def refusals() -> None:
    rank, mesh, group = dist.get_rank(), init_device_mesh("cpu", (2,)), dist.group.WORLD
    alone = [dist.new_group([rank]) for rank in range(2)][rank]
    ones = torch.ones(4, 6)
    rows, columns, copies = (distribute_tensor(ones, mesh, [to]) for to in (Shard(0), Shard(1), Replicate()))
    sums = DTensor.from_local(ones, mesh, [Partial()])
    two = [("first", ones), ("second", ones)]
    shared = {"process_group": group}

    def step(params: Any, *gradients: Any, **arguments: Any) -> Muon:
        """One step of copies of the parameters, by default with gradients of ones."""
        optimizer = Muon([(name, p.clone().requires_grad_()) for name, p in params], **arguments)
        own = optimizer.param_groups[0]["params"]
        for p, gradient in zip(own, gradients or map(torch.ones_like, own), strict=True):
            p.grad = gradient
        optimizer.step()
        return optimizer

    def later_rate() -> None:
        optimizer = step([("rows", rows)])
        optimizer.param_groups[0]["lr"] = 0.3 if rank else 0.001
        optimizer.step()

    def late_group() -> None:
        step([("rows", rows)]).add_param_group({"params": [("late", columns)]})

    def momentum_of_other_placements() -> None:
        saved, optimizer = (step([("weight", t)]) for t in (columns, rows))
        optimizer.load_state_dict(saved.state_dict())
        optimizer.step()

    def split_layer(copied: Callable[[Any, Muon], Any]) -> None:
        with join_world("cpu") as world:
            linear, mesh = Linear(4, 6, bias=False), world.with_mesh(tp=2).mesh["tp"]
            layer = ColumnParallelLinear.from_linear(linear, mesh=mesh)
            optimizer = copied(layer, Muon(layer.named_parameters()))
            optimizer.param_groups[0]["params"][0].grad = torch.ones_like(layer.weight)
            optimizer.step()

    lacking = "has a gradient on rank 0 and none on rank 1, expected the same on all; let every rank's loss"
    misplaced = "has a gradient of other placements than its own on rank"
    differ = "the ranks of its process group have different arguments: .*"
    others = "the ranks of its process group have different parameters: "
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: step(two, ones, None if rank else ones, **shared), f"second {lacking}"),
        (lambda: step([("split", rows)], None if rank else rows), f"split {lacking}"),
        (
            lambda: step([("table", ones)], ones.to_sparse() if rank else ones, **shared),
            "table has a sparse gradient on rank 1, expected a dense one",
        ),
        (
            lambda: step([("own", ones)], ones.to_sparse()),
            "own has a sparse gradient on rank [01], expected a dense one",
        ),
        (
            lambda: step([("p", torch.ones(2 + rank, 3))], **shared),
            rf"{others}p \(2, 3\) \(torch.float32, matrices \[\(2, 3\)\], group 0\).* and p \(3, 3\)",
        ),
        (
            lambda: step(two, views={} if rank else {"first": lambda t: t.view(2, 2, 6)}, **shared),
            rf"{others}.*matrices \[\(2, 6\), \(2, 6\)\].*matrices \[\(4, 6\)\]",
        ),
        (
            lambda: step([("split", rows)], process_group=alone),
            r"the ranks have 12 elements of split, which has shape \(4, 6\); expected a process_group of all",
        ),
        (
            lambda: Muon([("partial", sums)]),
            r"partial: its placements are \(Partial\(sum\),\), expected Shard or Replicate",
        ),
        (lambda: step([("copies", copies)], sums), f"copies {misplaced} 0; before the step, redistribute"),
        (lambda: step([("rows", rows)], sums if rank else None), f"rows {misplaced} 1; before the step"),
        *(
            (lambda name=name, value=value: step([("rows", rows)], **{name: value[rank]}), differ + name)
            for name, value in {
                "lr": (0.1, 0.2),
                "weight_decay": (0.1, 0.2),
                "momentum": (0.9, 0.8),
                "nesterov": (True, False),
                "adjust_lr_fn": (None, "match_rms_adamw"),
                "ns": ("standard", "gram"),
                "ns_steps": (5, 4),
            }.items()
        ),
        (later_rate, f"{differ}lr 0.001.*lr 0.3"),
        (
            lambda: step([("p", ones.to([torch.float32, torch.float64][rank]))], **shared),
            rf"{others}p .*torch.float32.*torch.float64",
        ),
        (late_group, r"a group \(late, …\) is added after the first step of several ranks; make a new Muon"),
        (lambda: step(two, None, None), r"no parameter has a gradient in the first step \(first, …\)"),
        (
            momentum_of_other_placements,
            r"weight is \(4, 6\) \(Shard\(dim=0\),\), and its momentum \(4, 6\) \(Shard\(dim=1\),\); "
            "load a state dict of other placements by torch.distributed.checkpoint",
        ),
        (
            lambda: split_layer(lambda *both: copy.deepcopy(both)[1]),
            "weight is of a split layer, and a copy of the optimizer would not know how it is split",
        ),
        (
            lambda: split_layer(lambda layer, _: Muon.for_model(fully_shard(layer, mesh=mesh))),
            "Muon.for_model: weight is a DTensor of a ColumnParallelLinear or RowParallelLinear; under",
        ),
    ]
    for case, expected in cases:
        found = message(case)
        assert re.match(expected, found.removeprefix("Muon: ")), (found, expected)


def test_every_rank_names_what_is_wrong(ranks):
    ranks(2, refusals)
