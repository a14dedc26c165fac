# SPDX-License-Identifier: MIT
"""Muon on several ranks: the number of messages, and what is refused; the kit compares the values."""

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from torchpar.nn import Linear
from torchpar.optim import Muon
from torchpar.parallel import join_world
from torchpar.parallel.split.layers import ColumnParallelLinear, RowParallelLinear

SHAPES = [(20, 30), (30, 20), (20, 30), (16, 80), (33, 33), (90, 17), (5, 72), (1, 40), (2, 3)]
ALL_TO_ALL = torch.ops.c10d.alltoall_base_


def check_messages(ours: Muon, messages: int) -> None:
    """Each step sends ``messages`` all-to-alls; the first one also compares the ranks."""
    for step in range(3):
        for p in ours.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        with CommDebugMode() as collectives:
            ours.step()
        assert collectives.get_comm_counts()[ALL_TO_ALL] == messages
        if step > 0:
            assert collectives.get_total_counts() == messages


def dtensors(mesh: tuple[int, ...], *placements: Any, messages: int) -> None:
    of_ranks = init_device_mesh("cpu", mesh)
    parts = [distribute_tensor(torch.ones(shape), of_ranks, placements).requires_grad_() for shape in SHAPES]
    check_messages(Muon(parts), messages)


def layers(kind: Any, dp: int, tp: int) -> None:
    """Layers split over "tp", with replicas on "dp" that share the work."""
    with join_world("cpu") as world:
        world = world.with_mesh(dp=dp, tp=tp)
        linears = [Linear(*sizes, bias=False) for sizes in ((33, 20), (7, 9), (2, 1))]
        split = [kind.from_linear(linear, mesh=world.mesh["tp"]) for linear in linears]
        split = [copy.deepcopy(split[0]), *split[1:]]  # a copy has its own marks
        group = world.mesh["dp", "tp"] if dp > 1 else None
        check_messages(Muon([layer.weight for layer in split], process_group=group), 2)


def replicas() -> None:
    ours = Muon([torch.ones(shape).requires_grad_() for shape in SHAPES], process_group=dist.group.WORLD)
    check_messages(ours, 1)
    ((_, items, exchange),) = ours._plans()
    work = [None] * dist.get_world_size()
    dist.all_gather_object(work, sum(items[i].cost for i in exchange.owned))
    costs = [item.cost for item in items]
    assert sum(work) == sum(costs)
    assert max(work) - min(work) <= max(costs)  # the ranks share the work about evenly


PLACEMENTS: dict[str, Any] = {
    "rows": (3, partial(dtensors, (3,), Shard(0), messages=2)),
    "copies": (3, partial(dtensors, (3,), Replicate(), messages=1)),
    "rows of rows": (4, partial(dtensors, (2, 2), Shard(0), Shard(0), messages=2)),
    "copies of columns": (4, partial(dtensors, (2, 2), Replicate(), Shard(1), messages=2)),
    "layers split by columns": (3, partial(layers, ColumnParallelLinear, 1, 3)),
    "split layers and replicas": (4, partial(layers, RowParallelLinear, 2, 2)),
    "replicas": (3, replicas),
}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_step_sends_few_messages(ranks, placement):
    ranks(*PLACEMENTS[placement])


def message(function: Callable[[], object]) -> str:
    try:
        function()
    except ValueError as e:
        return str(e)
    return "taken"


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

    def further_group() -> None:
        params = [[(name, t.clone().requires_grad_())] for name, t in (("rows", rows), ("columns", rows))]
        optimizer = Muon([{"params": group} for group in params[: 2 - rank]])
        for (_, p), *_ in params:
            p.grad = torch.ones_like(p)
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
    others = "the ranks of its process group have different parameters: "
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: step(two, ones, None if rank else ones, **shared), f"second {lacking}"),
        (lambda: step([("split", rows)], None if rank else rows), f"split {lacking}"),
        (
            lambda: step([("table", ones)], ones.to_sparse() if rank else ones, **shared),
            "table has a sparse gradient on rank 1, expected a dense one",
        ),
        (lambda: step([("own", ones)], ones.to_sparse()), "own has a sparse gradient on rank [01], expect"),
        (
            lambda: step([("p", torch.ones(2 + rank, 3))], **shared),
            rf"{others}p \(2, 3\) \(torch.float32, matrices \[\(2, 3\)\], group 0 of 1\).* and p \(3, 3\)",
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
            (
                lambda name=name, value=value: step([("rows", rows)], **{name: value[rank]}),
                f"the {name} of rows is {value[0]} on rank 0 and {value[1]} on rank 1, expected the same",
            )
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
        (later_rate, "the lr of rows is 0.001 on rank 0 and 0.3 on rank 1, expected the same"),
        (
            further_group,
            rf"{others}rows .*group 0 of 2\) on its rank 0, and rows .*group 0 of 1\) on its rank 1",
        ),
        (
            lambda: Muon(two, process_group=dist.GroupMember.NON_GROUP_MEMBER),
            "process_group is -100, expected a group or mesh of this rank",
        ),
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
