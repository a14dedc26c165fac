# SPDX-License-Identifier: MIT
"""Training on meshes of data, tensor and pipeline parallelism, compared with one process."""

import copy
import hashlib
from collections.abc import Callable
from functools import partial
from itertools import product
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from torchpar.errors import ConfigError
from torchpar.nn import MLP
from torchpar.parallel import (
    World,
    clip_grad_norm_,
    full_state_dict,
    join_world,
    parallel_mlp,
)
from torchpar.parallel.split.layers import split_parameters
from torchpar.parallel.split.pipeline import Pipeline, stage_mlp
from torchpar.training.losses import add_orthogonality_gradient

SIZES = (25, 33, 7, 5, 10)
# Sums of at most 33 terms in two orders differ by 33·eps. In three steps at a rate of 0.3 and a momentum of
# 0.9 the difference grows less than 1000-fold.
TOLERANCE = {"rtol": 0.0, "atol": 3 * 33 * torch.finfo(torch.float64).eps * 1000}

sum_of_losses = partial(cross_entropy, reduction="sum")


def split(
    mlp: MLP, world: World, schedule: Any = "1f1b", micro_batches: int = 4
) -> tuple[MLP, Callable[..., Tensor]]:
    """This rank's part of ``mlp``, and its `Pipeline.step` or what stands for it on this mesh."""
    model = stage_mlp(parallel_mlp(mlp, world.mesh["tp"]), world.mesh["pp"])
    if world.mesh["pp"].size() > 1:
        return model, Pipeline(model, world, schedule, micro_batches).step
    replica: torch.nn.Module = model
    if world.dp_size > 1:
        replica = DistributedDataParallel(model, process_group=world.mesh["dp"].get_group())

    def step(x: Tensor, labels: Tensor, global_size: int, loss_sum: Callable[..., Tensor]) -> Tensor:
        loss = loss_sum(replica(x), labels)
        (loss * (world.dp_size / global_size)).backward()
        return loss.detach()

    return model, step


class Training(NamedTuple):
    """A few steps of training on a mesh.

    Attributes:
        batches: the size of each step's global batch.
        max_norm: the norm at which gradients are clipped.
    """

    dp: int
    tp: int
    pp: int
    schedule: str
    micro_batches: int
    sizes: tuple[int, ...]
    hidden: str
    batches: tuple[int, ...]
    max_norm: float

    @property
    def ranks(self) -> int:
        return self.dp * self.tp * self.pp

    def __str__(self) -> str:
        sizes, batches = ("-".join(map(str, values)) for values in (self.sizes, self.batches))
        pipeline = f" {self.schedule} micro {self.micro_batches}" if self.pp > 1 else ""
        return (
            f"dp {self.dp} tp {self.tp} pp {self.pp}{pipeline} sizes {sizes} {self.hidden} "
            f"batches {batches} norm {self.max_norm}"
        )


def draw(mesh: tuple[int, int, int], seed: int) -> Training:
    random = Random(f"{mesh} {seed}")
    stages = mesh[2]
    widths = random.choices((1, 2, 3, 5, 7, 12, 33), k=random.randint(stages, stages + 2))
    return Training(
        *mesh,
        schedule=random.choice(("gpipe", "1f1b")),
        micro_batches=random.randint(stages, stages + 3),
        sizes=(*widths, random.randint(2, 10)),
        hidden=random.choice(("sigmoid", "relu")),
        batches=tuple(random.choices(range(1, 24), k=3)),
        max_norm=random.choice((0.1, 1e3)),
    )


MESHES = [mesh for mesh in product((1, 2, 3, 4), repeat=3) if np.prod(mesh) <= 4]
TRAININGS = [
    # Replicas of stages with 2 micro-batches; with samples and layers that do not divide; of 8 ranks.
    Training(2, 1, 2, "1f1b", 2, SIZES, "relu", (13, 13, 13), 0.5),
    Training(1, 1, 2, "1f1b", 4, SIZES, "relu", (23, 3, 1), 0.5),
    Training(1, 2, 2, "gpipe", 3, (25, 1, 10), "sigmoid", (13, 8, 5), 0.5),
    Training(2, 2, 2, "1f1b", 4, SIZES, "relu", (13, 13, 3), 0.5),
    *(draw(mesh, 0) for mesh in MESHES),
    *(pytest.param(draw(mesh, seed), marks=pytest.mark.slow) for mesh in MESHES for seed in range(1, 9)),
]


def train_beside_one_process(training: Training, change: float = 0.0) -> None:
    """Compare losses, gradients and weights of each step with those of the whole model.

    Args:
        change: how much larger a norm the whole model's gradients are clipped at.
    """
    torch.manual_seed(0)
    whole = MLP(training.sizes, training.hidden, dtype=torch.float64)
    with join_world("cpu") as world:
        world = world.with_mesh(dp=training.dp, tp=training.tp, pp=training.pp)
        model, step = split(whole, world, training.schedule, training.micro_batches)
        parts = {name: (axis, layer.partition) for name, axis, layer in split_parameters(model)}
        optimizers = [
            torch.optim.SGD(m.parameters(), lr=0.3, momentum=0.9, weight_decay=1e-3) for m in (model, whole)
        ]

        def own(name: str, t: Tensor) -> Tensor:
            return parts[name][1].narrow(t, parts[name][0]) if name in parts else t

        for n in training.batches:
            x = torch.randn(n, training.sizes[0], dtype=torch.float64)
            labels = torch.randint(training.sizes[-1], (n,))
            share = world.share(n)
            loss = step(share.narrow(x, 0), share.narrow(labels, 0), n, sum_of_losses)
            expected_loss = sum_of_losses(whole(x), labels)
            (expected_loss / n).backward()
            for m in (model, whole):
                add_orthogonality_gradient(m, 1e-3)
            norm = clip_grad_norm_(model, training.max_norm, world)
            expected_norm = torch.nn.utils.clip_grad_norm_(whole.parameters(), training.max_norm + change)
            found = {"loss": world.sum(loss * world.owns_outputs), "norm": norm}
            expected = {"loss": expected_loss.detach(), "norm": expected_norm}
            for optimizer in optimizers:
                optimizer.step()
            parameters = dict(whole.named_parameters())
            for name, p in model.named_parameters():
                found |= {name: p.detach(), f"{name}.grad": p.grad}
                expected[name] = own(name, parameters[name].detach())
                expected[f"{name}.grad"] = own(name, parameters[name].grad)
            torch.testing.assert_close(found, expected, **TOLERANCE)
            for optimizer in optimizers:
                optimizer.zero_grad()


@pytest.mark.parametrize("training", TRAININGS, ids=str)
def test_a_mesh_trains_as_one_process(ranks, training):
    ranks(training.ranks, train_beside_one_process, training)


def test_the_comparison_sees_a_small_change(ranks):
    training = Training(1, 2, 1, "1f1b", 1, SIZES, "relu", (13,), 0.5)
    ranks(2, train_beside_one_process, training)
    with pytest.raises(AssertionError, match=r"item \[.layers\.0"):
        ranks(2, train_beside_one_process, training, 1e-6)


def clip_nan() -> tuple[float, int]:
    """The norm of gradients with one NaN, on rank 1, and how many finite ones clipping leaves."""
    with join_world("cpu") as world:
        world = world.with_mesh(tp=2)
        model = parallel_mlp(MLP(SIZES[:3]), world.mesh["tp"])
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        if world.rank == 1:
            model.layers[0].weight.grad[0, 0] = torch.nan
        norm = clip_grad_norm_(model, 1.0, world)
        return norm.item(), sum(int(p.grad.isfinite().sum()) for p in model.parameters())


def test_a_nan_makes_every_ranks_gradients_nan(ranks):
    for norm, finite in ranks(2, clip_nan):
        assert np.isnan(norm)
        assert finite == 0


def accumulated(mlp: MLP, x: Tensor, labels: Tensor, rows: int) -> dict[str, np.ndarray]:
    """The gradient of the mean loss, accumulated by one process over micro-batches of ``rows`` samples."""
    mlp = copy.deepcopy(mlp)
    for x_i, labels_i in zip(x.split(rows), labels.split(rows), strict=True):
        (sum_of_losses(mlp(x_i), labels_i) / len(x)).backward()
    return {name: p.grad.numpy() for name, p in mlp.named_parameters()}


def pipelined(schedule: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Gradients of this rank's stage, and those of one process with four micro-batches and with one."""
    torch.manual_seed(0)
    mlp = MLP(SIZES, "relu")
    x, labels = torch.randn(24, SIZES[0]), torch.randint(0, 10, (24,))
    with torch.no_grad():
        y = mlp(x)
    with join_world("cpu") as world:
        world = world.with_mesh(pp=world.world_size)
        stage = stage_mlp(mlp, world.mesh["pp"])
        pipeline = Pipeline(stage, world, schedule)
        micro_batched, at_once = accumulated(mlp, x, labels, 6), accumulated(mlp, x, labels, 24)
        loss = pipeline.step(x, labels, 24, sum_of_losses)
        found = {name: p.grad.numpy().copy() for name, p in stage.named_parameters()}
        outputs = pipeline.predict(x)
    if world.owns_outputs:
        torch.testing.assert_close(outputs, y)
        torch.testing.assert_close(loss, sum_of_losses(y, labels))
    else:
        assert outputs is None
        assert loss == 0
    # The forward pass of predict leaves the gradients.
    assert all(np.array_equal(p.grad, found[name]) for name, p in stage.named_parameters())
    return found, micro_batched, at_once


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("stages", [2, 4])
def test_a_pipelines_gradients_are_those_of_micro_batches(ranks, stages, schedule):
    stage = ranks(stages, pipelined, schedule)
    assert [name for found, *_ in stage for name in found] == list(MLP(SIZES).state_dict())
    for found, micro_batched, at_once in stage:
        assert all(np.array_equal(gradient, micro_batched[name]) for name, gradient in found.items())
        assert not all(np.array_equal(gradient, at_once[name]) for name, gradient in found.items())


def refused() -> list[str]:
    messages = []
    with join_world("cpu") as world:
        world = world.with_mesh(pp=2)
        for build in (
            lambda: stage_mlp(MLP([3, 2]), world.mesh["pp"]),
            lambda: Pipeline(MLP([3, 2]), world, micro_batches=1),
            lambda: Pipeline(MLP([3, 2]), world, schedule="zigzag"),
            lambda: Pipeline(MLP([3, 2]), world, micro_batches=2),
        ):
            try:
                build()
                messages.append("taken")
            except ConfigError as e:
                messages.append(str(e))
    return messages


def test_pipelines_that_are_refused(ranks):
    for layers, micro_batches, schedule, taken in ranks(2, refused):
        assert layers.startswith("pp 2 makes more stages than the model has layers, 1;")
        assert micro_batches.startswith("1 micro-batches are fewer than the 2 stages")
        assert schedule == "schedule is 'zigzag', expected one of ['1f1b', 'gpipe']"
        assert taken == "taken"


def hash_of_a_run(axes: dict[str, int]) -> str:
    """The bits of losses and weights in 10 float32 steps, hashed."""
    torch.manual_seed(0)
    mlp = MLP(SIZES, "relu")
    digest = hashlib.sha256()
    with join_world("cpu") as world:
        world = world.with_mesh(**axes)
        model, step = split(mlp, world)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for n in [13, 13, 13, 13, 3] * 2:
            x, labels, share = torch.rand(n, SIZES[0]), torch.randint(10, (n,)), world.share(n)
            # Shares are copied, since bits may depend on a view's alignment.
            loss = step(share.narrow(x, 0).clone(), share.narrow(labels, 0), n, sum_of_losses)
            digest.update(world.sum(loss * world.owns_outputs).numpy().tobytes())
            clip_grad_norm_(model, 0.5, world)
            optimizer.step()
            optimizer.zero_grad()
        for name, weight in full_state_dict(model).items():
            digest.update(name.encode() + weight.numpy().tobytes())
    return digest.hexdigest()


def test_a_fast_run_has_other_bits_on_other_meshes(ranks):
    """Which is why there is exact arithmetic (tests/test_exact_training.py)."""
    meshes = [(1, {}), (4, {"dp": 4}), (4, {"tp": 4})]
    fast = [one for world_size, axes in meshes for one in ranks(world_size, hash_of_a_run, axes)]
    assert len(set(fast[1:5])) == len(set(fast[5:])) == 1  # the ranks of one mesh agree
    assert len(set(fast)) == 3


def split_in_three() -> list[str]:
    messages = []
    with join_world("cpu") as world:
        for build in (
            lambda: world.with_mesh(dp=2),
            lambda: world.with_mesh(dp=3, tp=0),
            lambda: world.with_mesh(dp=3),
        ):
            try:
                build()
                messages.append("taken")
            except ConfigError as e:
                messages.append(str(e))
    return messages


def test_meshes_that_are_refused(ranks):
    for messages in ranks(3, split_in_three):
        assert messages == [
            "dp 2 × tp 1 × pp 1 is 2 ranks, but 3 were started; start as many, or choose other factors",
            "dp 3 × tp 0 × pp 1 is 0 ranks, but 3 were started; start as many, or choose other factors",
            "taken",
        ]


def fully_sharded() -> tuple[float, float, float]:
    """The largest errors of the weights after five steps, fully sharded and plain, and before the first."""
    torch.manual_seed(0)
    plain = MLP((129, 65, 33, 10))
    sharded, exact, start = copy.deepcopy(plain), copy.deepcopy(plain).double(), copy.deepcopy(plain)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in sharded.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    models = [sharded, plain, exact]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.5) for model in models]
    for _ in range(5):
        x, labels = torch.randn(64, 129), torch.randint(0, 10, (64,))
        for model, optimizer in zip(models, optimizers, strict=True):
            share = slice(dist.get_rank(), None, dist.get_world_size()) if model is sharded else slice(None)
            dtype = torch.float64 if model is exact else torch.float32
            torch.nn.functional.cross_entropy(model(x[share].to(dtype)), labels[share]).backward()
            optimizer.step()
            optimizer.zero_grad()

    def distance(model: Any) -> float:
        found = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
        return max((p - e).abs().max().item() for p, e in zip(found, exact.parameters(), strict=True))

    return distance(sharded), distance(plain), distance(start)


def test_an_mlp_trains_fully_sharded(ranks):
    for sharded, plain, start in ranks(2, fully_sharded):
        assert 0 < sharded <= 2 * plain
        assert start > 1e4 * plain
