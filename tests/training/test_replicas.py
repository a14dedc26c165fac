# SPDX-License-Identifier: MIT
"""Gradients of ranks that share parameters: whole ones are trained with, and parts are refused."""

import re
from collections.abc import Callable
from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy

from torchpar import exact
from torchpar.data import Samples
from torchpar.errors import ConfigError
from torchpar.exact.tensor_parallel import Linear as ExactLinear
from torchpar.nn import MLP
from torchpar.parallel import (
    ColumnParallelLinear,
    Pipeline,
    RowParallelLinear,
    World,
    full_state_dict,
    join_world,
    mark_shard,
    parallel_mlp,
    stage_mlp,
)
from torchpar.parallel.split.reduction import reduce_from_region
from torchpar.training import Classification, Run, replicas
from torchpar.training.classification import cross_entropy_sum

PARTS = (
    r'^the gradient of {} differs between the ranks of "tp", which begin with the same values of '
    r"it; if it is one parameter, add .*; if each rank has features of its own, mark it by torchpar"
)


class Model(torch.nn.Module):
    """An embedding, a norm, a pair of layers of uneven shards, and a whole layer.

    Args:
        way: "right"; "between", with a scale between the layers of the pair; "added up", whose
            parts of its gradient are added up; "frozen"; "rounded", where the last rank of "tp" has
            other last digits, or "changed" or "missing", where its gradient is another one or none;
            "by hand", with shards that no layer marks; "exact", in exact arithmetic; "batch norm"
            and "PReLU", which each rank has of its own features, and marks; "unmarked", such a norm
            without marks.
    """

    def __init__(self, world: World, way: str):
        super().__init__()
        mesh, self.way, self.group = world.mesh["tp"], way, world.mesh.get_group("tp")
        self.embedding, self.norm = torch.nn.Embedding(9, 5), torch.nn.LayerNorm(5)
        self.column = ColumnParallelLinear(5, 7, mesh=mesh, activation="tanh")
        self.row = RowParallelLinear(7, 4, mesh=mesh)
        if way == "exact":
            self.column, self.row = ExactLinear(5, 7, mesh, 0), ExactLinear(7, 4, mesh, 1)
        self.last = torch.nn.Linear(4, 3)
        self.scale = torch.nn.Parameter(torch.ones(()), requires_grad=way != "frozen")
        self.middle: torch.nn.Module = torch.nn.Identity()
        if way in ("batch norm", "PReLU", "unmarked"):
            self.column = ColumnParallelLinear(5, 6, mesh=mesh)
            self.row = RowParallelLinear(6, 4, mesh=mesh)
            kind = torch.nn.PReLU if way == "PReLU" else torch.nn.BatchNorm1d
            self.middle = kind(6 // world.tp_size)
            for p in self.middle.parameters() if way != "unmarked" else ():
                mark_shard(p, 0, 6, mesh)
        if way == "by hand":
            torch.manual_seed(world.tp_rank)
            self.shard = torch.nn.Linear(6, 4)
        last = world.tp_rank == world.tp_size - 1
        changes: dict[str, Callable[[Tensor], Tensor]] = {
            "rounded": lambda g: g * (1 + 2 * torch.finfo(g.dtype).eps),
            "changed": lambda g: g * 1.001,
        }
        if way in changes and last:
            self.last.weight.register_hook(changes[way])

    def forward(self, x: Tensor) -> Tensor:
        features = self.norm(self.embedding(x.long()).sum(1))
        hidden = self.middle(self.column(features))
        is_between = self.way in ("between", "added up", "frozen")
        outputs = self.row(hidden * self.scale if is_between else hidden)
        if self.way == "by hand":
            outputs = outputs + reduce_from_region(self.shard(x).tanh(), self.row.mesh)
        return self.last(outputs)

    def add_up(self, world: World) -> None:
        for p in self.parameters():
            if p.grad is not None and world.dp_size > 1:
                dist.all_reduce(p.grad, group=world.mesh.get_group("dp"))
        if self.way == "added up":
            dist.all_reduce(self.scale.grad, group=self.group)
        if self.way == "missing" and self.group.rank() == self.group.size() - 1:
            self.last.weight.grad = None


def samples(n: int) -> Samples:
    generator = torch.Generator().manual_seed(n)
    x = torch.randint(0, 9, (n, 6), generator=generator).float()
    return Samples(x, x[:, 0].long() % 3, classes=("a", "b", "c"))


def train(axes: dict[str, int], ways: list[str]) -> list[tuple[str, int]]:
    """For each way, the error, and how often gradients were exchanged to look at their digits."""
    found = []
    with join_world("cpu") as alone:
        world = alone.with_mesh(**axes)
        for way in ways:
            torch.manual_seed(0)
            model = Model(world, way)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            task = Classification(samples(26), samples(8), 13)
            error = ""
            with patch.object(
                replicas, "_check_rounding", wraps=replicas._check_rounding
            ) as looked:
                try:
                    with Run(model, optimizer, None, world, task, epochs=1) as run:
                        for x, labels, size in run.batches(1):
                            with exact.mode() if way == "exact" else nullcontext():
                                loss = cross_entropy(model(x), labels, reduction="sum")
                                (loss / size).backward()
                            model.add_up(world)
                            optimizer.step()
                            optimizer.zero_grad()
                            run.end_step(loss_sum=loss)
                        run.end_epoch()
                except ConfigError as e:
                    error = str(e)
            found.append((error, looked.call_count))
    return found


RIGHT = ["right", "added up", "frozen", "by hand", "exact", "batch norm", "PReLU"]
WRONG = {
    "between": "scale",
    "changed": "last.weight",
    "missing": "last.weight",
    "unmarked": "middle.weight",
}


def mark_wrongly(size: int) -> list[str]:
    """The errors of marks that do not fit, and the part and the whole of one that fits."""
    found = []
    with join_world("cpu") as alone:
        mesh = alone.with_mesh(tp=2).mesh
        p = torch.nn.Parameter(torch.ones(size - size // 2 if alone.rank == 0 else size // 2, 2))
        for axis, of, ranks_ in ((0, size + 2, "tp"), (2, size, "tp"), (0, 0, "tp"), (0, size, "")):
            with pytest.raises(ConfigError) as caught:
                mark_shard(p, axis, of, mesh[ranks_] if ranks_ else mesh)
            found.append(str(caught.value))
        mark_shard(p, 0, size, mesh["tp"])
        model = torch.nn.ParameterDict({"p": p})
        p.data.fill_(alone.rank)
        found.append(str(full_state_dict(model)["p"][:, 0].tolist()))
    return found


def test_a_mark_that_does_not_fit_is_refused(ranks):
    for rank, (cut, axis, size, dims, whole) in enumerate(ranks(2, mark_wrongly, 5)):
        assert cut == (
            f"the shard has {3 - rank} of 7 along axis 0, expected {4 - rank} on rank {rank} of 2; "
            "cut as torch.chunk does"
        )
        assert axis == f"axis is 2 of shape ({3 - rank}, 2), expected from 0 to 1"
        assert size == "size is 0, expected a whole number from 1 on"
        assert dims == 'the mesh has 3 dimensions; give one of them, as mesh["tp"]'
        assert whole == "[0.0, 0.0, 0.0, 1.0, 1.0]"


@pytest.mark.parametrize(
    "axes", [pytest.param({"tp": 3}, marks=pytest.mark.slow), {"dp": 2, "tp": 2}]
)
def test_whole_gradients_are_the_same_to_the_bit(ranks, axes):
    """Of biases of row layers, of embeddings and norms, beside uneven shards; none is looked at."""
    count = axes.get("dp", 1) * axes["tp"]
    for found in ranks(count, train, axes, [*RIGHT, "rounded"]):
        assert found == [("", 0)] * len(RIGHT) + [("", 1)]


@pytest.mark.parametrize("axes", [{"tp": 2}, {"dp": 2, "tp": 2}])
def test_parts_of_gradients_are_refused_on_every_rank(ranks, axes):
    count = axes.get("dp", 1) * axes["tp"]
    first, *others = ranks(count, train, axes, [*WRONG])
    assert others == [first] * (count - 1)
    for (error, looked), name in zip(first, WRONG.values(), strict=True):
        assert re.match(PARTS.format(re.escape(name)), error), error
        assert "\n" not in error
        assert looked == 1


def train_stages() -> tuple[float, int]:
    """The loss of stages whose parameters have the same names, and how often gradients were
    exchanged."""
    with (
        join_world("cpu") as alone,
        patch.object(replicas, "_check_rounding", wraps=replicas._check_rounding) as looked,
    ):
        world = alone.with_mesh(tp=2, pp=2)
        torch.manual_seed(0)
        whole = parallel_mlp(MLP([6, 5, 7, 4, 3]), world.mesh["tp"])
        model = torch.nn.Sequential(*stage_mlp(whole, world.mesh["pp"]).layers)
        pipeline = Pipeline(model, world, micro_batches=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        task = Classification(samples(26), samples(8), 13, predict=pipeline.predict)
        with Run(model, optimizer, None, world, task, epochs=1) as run:
            for x, labels, size in run.batches(1):
                loss = pipeline.step(x, labels, size, cross_entropy_sum)
                optimizer.step()
                optimizer.zero_grad()
                run.end_step(loss_sum=loss)
            loss_of_epoch = run.end_epoch().train_loss
        assert [*model.state_dict()] == ["0.weight", "0.bias", "1.weight", "1.bias"]
        return loss_of_epoch, looked.call_count


def test_stages_are_not_compared(ranks):
    for loss, looked in ranks(4, train_stages):
        assert loss > 0
        assert looked == 0
