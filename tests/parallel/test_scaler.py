# SPDX-License-Identifier: MIT
"""Loss scaling of divided models: an infinity on one rank lets all ranks skip the step."""

import pytest
import torch
from scaled import OPTIMIZERS, train_scaled
from torch.optim import SGD

from torchpar.errors import ConfigError
from torchpar.library.sharding import local
from torchpar.nn import MLP
from torchpar.parallel import GradScaler, clip_grad_norm_, join_world, parallel_mlp

MESHES = {
    "tp": (2, {"tp": 2}),
    "pp": (2, {"pp": 2}),
    "tp of 3": (3, {"tp": 3}),
    "pp of 3": (3, {"pp": 3}),
    "dp × tp": (4, {"dp": 2, "tp": 2}),
}
# The scale doubles after two steps, and the third step, whose gradient overflows, halves it.
EXPECTED = [(True, 1024.0), (True, 2048.0), (False, 1024.0), (True, 1024.0), (True, 2048.0)]


def logs(ranks, mesh, *arguments):
    world_size, sizes = MESHES[mesh]
    found = ranks(
        world_size, train_scaled, sizes, arguments[0], {2: world_size - 1}, *arguments[1:]
    )
    return [[step[:2] for step in log] for log in found]


BY_DEFAULT = {
    ("tp", "fused"),
    ("tp", "adamw"),
    ("pp of 3", "muon"),
    ("pp of 3", "sgd"),
    ("tp of 3", "sgd"),
    ("dp × tp", "muon"),
}


@pytest.mark.parametrize(
    "mesh, name",
    [
        pytest.param(mesh, name, marks=[] if (mesh, name) in BY_DEFAULT else pytest.mark.slow)
        for mesh in MESHES
        for name in OPTIMIZERS
    ],
)
def test_all_ranks_skip_a_step_together(ranks, mesh, name):
    assert logs(ranks, mesh, name) == [EXPECTED] * MESHES[mesh][0]


@pytest.mark.parametrize("mesh", ["tp", "pp"])
def test_all_ranks_skip_a_step_whose_gradients_are_clipped(ranks, mesh):
    assert logs(ranks, mesh, "sgd", "ours", True) == [EXPECTED] * 2


def test_ranks_that_skip_alone_are_noticed(ranks):
    steps, skips = logs(ranks, "tp", "sgd", "alone")
    assert skips == EXPECTED
    assert steps[2] == (True, 2048.0)


@pytest.mark.parametrize("name", ["fused", "muon"])
def test_the_scaler_of_pytorch_is_refused(ranks, name):
    with pytest.raises(ConfigError, match=r"divided over ranks; take torchpar\.parallel\.Grad"):
        logs(ranks, "tp", name, "plain")


def sharded_too() -> None:
    """By `fully_shard`, which replaces the parameters of split layers."""
    from torch.distributed.fsdp import fully_shard

    with join_world("cpu", timeout=20) as alone:
        world = alone.with_mesh(tp=2)
        model = parallel_mlp(MLP([4, 6, 2]), world.mesh["tp"])
        fully_shard(model, mesh=world.mesh["dp"])
        scaler, optimizer = torch.amp.GradScaler("cpu"), SGD(model.parameters(), lr=0.1)
        scaler.scale(model(torch.ones(2, 4)).sum()).backward()
        scaler.step(optimizer)


def test_the_scaler_of_pytorch_is_refused_under_fully_shard(ranks):
    with pytest.raises(ConfigError, match=r"divided over ranks; take torchpar\.parallel\.Grad"):
        ranks(2, sharded_too)


def partly_sharded() -> None:
    """Beside parameters that are whole on each rank, as where only some layers are sharded."""
    from torch.distributed.fsdp import fully_shard

    with join_world("cpu", timeout=20) as world:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 2))
        fully_shard(model[0], mesh=world.mesh["dp"])
        scaler = GradScaler(world, init_scale=4.0)
        optimizer = SGD(model.parameters(), lr=0.1)
        for step in range(2):
            before = [local(p).detach().clone() for p in model.parameters()]
            model(torch.ones(2, 4)).sum().backward()
            gradients = [local(p.grad).clone() for p in model.parameters()]
            optimizer.zero_grad()
            scaler.scale(model(torch.ones(2, 4)).sum()).backward()
            if step == 1 and world.rank == 1:
                local(model[0].bias.grad)[0] = torch.inf
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            after = [local(p) for p in model.parameters()]
            if step == 0:
                expected = [p - 0.1 * g for p, g in zip(before, gradients, strict=True)]
                torch.testing.assert_close(after, expected)
            else:
                assert all(map(torch.equal, after, before))
                assert scaler.get_scale() == 2.0
            optimizer.zero_grad()


def test_a_model_that_is_sharded_in_part_is_scaled(ranks):
    ranks(2, partly_sharded)


def test_arguments_of_pytorchs_functions_are_refused():
    with pytest.raises(ConfigError, match="GradScaler: world is of type str, expected the World"):
        GradScaler("cpu")
    model = torch.nn.Linear(2, 2)
    with pytest.raises(
        ConfigError, match="clip_grad_norm_: world is of type float, expected the W"
    ):
        clip_grad_norm_(model, 1.0, 2.0)
    with join_world("cpu") as world, pytest.raises(ConfigError, match="model is of type generator"):
        clip_grad_norm_(model.parameters(), 1.0, world)


def with_options(options_of_ranks: list[dict[str, float]]) -> None:
    with join_world("cpu", timeout=20) as world:
        GradScaler(world, **options_of_ranks[world.rank])


def test_other_options_are_refused(ranks):
    with pytest.raises(ConfigError, match=r"scalers: init_scale is 2\.0 on rank 0 and 4\.0 on"):
        ranks(2, with_options, [{"init_scale": 2.0}, {"init_scale": 4.0}])


def test_a_whole_model_takes_any_scaler(world):
    model = torch.nn.Linear(2, 2)
    for scaler in (
        torch.amp.GradScaler("cpu"),
        GradScaler(world),
        GradScaler(world, enabled=False),
    ):
        optimizer = SGD(model.parameters(), lr=0.1)
        before = model.weight.detach().clone()
        scaler.scale(model(torch.ones(1, 2)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert not torch.equal(model.weight, before)
