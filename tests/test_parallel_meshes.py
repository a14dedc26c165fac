# SPDX-License-Identifier: MIT
"""Training on meshes of data, tensor and pipeline parallelism against one process."""

import copy
import hashlib
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from torchpar import training
from torchpar.data import Samples
from torchpar.errors import ConfigError
from torchpar.nn import MLP
from torchpar.parallel import (
    ColumnParallelLinear,
    World,
    clip_grad_norm_,
    join_world,
    parallel_mlp,
    whole_state_dict,
)
from torchpar.parallel.pipeline import PipelineStep, stage_mlp
from torchpar.parallel.reduction import all_reduce, check_reduction, tree_sum
from torchpar.parallel.step import InvariantStep, ReplicaStep
from torchpar.phases import NoPhases

SIZES = (25, 33, 7, 5, 10)
# Ten float64 steps, in each of which sums of 33 terms and less differ by 33·eps; the rate and the momentum,
# 0.3/(1 − 0.9), do not make the difference 1000 times larger. Outputs are evaluated in float32.
TOLERANCE = 10 * 33 * torch.finfo(torch.float64).eps * 1000
TOLERANCE_32 = 8 * torch.finfo(torch.float32).eps
CROSS_ENTROPY = partial(training.loss_sum, "cross-entropy")


class DoubleSamples(Samples):
    def inputs(self, index: Any) -> Tensor:
        return super().inputs(index).double()


def samples(n: int, seed: int, kind: type[Samples] = Samples) -> Samples:
    """Small noisy images of ten patterns."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randint(0, 200, (10, 5, 5), generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 10, (n,), generator=generator)
    images = patterns[labels] + torch.randint(0, 56, (n, 5, 5), generator=generator)
    return kind(images.to(torch.uint8), labels, tuple("0123456789"))


def spread(mlp: MLP, world: World, schedule: Any = "1f1b") -> tuple[torch.nn.Module, Any]:
    """This rank's part of ``mlp`` and the step that trains it."""
    model = parallel_mlp(mlp, world.mesh["tp"], world.reduction)
    if world.reduction == "invariant":
        return model, InvariantStep(model, world)
    forward: torch.nn.Module = stage_mlp(model, world.mesh["pp"])
    model = forward
    if world.data_ranks > 1:
        forward = DistributedDataParallel(model, process_group=world.mesh["dp"].get_group())
    if world.mesh["pp"].size() > 1:
        return model, PipelineStep(forward, world, schedule)
    return model, ReplicaStep(forward, world.data_ranks)


def numbers(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """All weights of the whole model, on every rank."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, {name: t.numpy() for name, t in whole_state_dict(model).items()})
    return {name: t for part in parts for name, t in part.items()}


def train(
    axes: dict[str, int], sizes: tuple[int, ...] = SIZES, **options: Any
) -> tuple[list[float], list[float], dict[str, np.ndarray]]:
    """Training losses, test losses and weights of a float64 run, with every term a gradient may have.

    The last batch is of 3 samples: with two replicas and four micro-batches, some have none.
    """
    torch.manual_seed(0)
    mlp = MLP(sizes, "relu", dtype=torch.float64)
    with join_world("cpu") as world:
        world = world.split(**axes)
        model, step = spread(mlp, world)
        results = training.fit(
            model,
            training.sgd(model, lr=0.3, momentum=0.9, weight_decay=1e-3),
            samples(55, 1, DoubleSamples),
            samples(21, 2, DoubleSamples),
            world,
            step=step,
            epochs=2,
            batch_size=13,
            **{"clip": 0.5, "orthogonality": 1e-3} | options,
        )
        return [r.train_loss for r in results], [r.test_loss for r in results], numbers(model)


@pytest.fixture(scope="module")
def alone(ranks) -> Any:
    return ranks(1, train, {})[0]


@pytest.mark.parametrize(
    "world_size, axes",
    [
        (2, {"pp": 2}),
        (4, {"dp": 2, "tp": 2}),
        (4, {"dp": 2, "pp": 2}),
        (4, {"tp": 2, "pp": 2}),
        (4, {"tp": 4}),
    ],
)
def test_a_mesh_learns_what_one_process_learns(ranks, alone, world_size, axes):
    for train_losses, test_losses, weights in ranks(world_size, train, axes):
        assert train_losses == pytest.approx(alone[0], rel=0, abs=TOLERANCE)
        assert test_losses == pytest.approx(alone[1], rel=0, abs=TOLERANCE_32)
        assert list(weights) == list(alone[2])
        for name, weight in alone[2].items():
            assert abs(weights[name] - weight).max() <= TOLERANCE, name


def test_a_border_between_stages_within_a_pair_of_layers(ranks):
    """What passes it is each rank's share of the activations; with a width of 1, one has none."""
    for sizes in ((25, 33, 10), (25, 1, 10)):
        train_losses, _, weights = ranks(1, train, {}, sizes)[0]
        for found, _, others in ranks(4, train, {"tp": 2, "pp": 2}, sizes):
            assert found == pytest.approx(train_losses, rel=0, abs=TOLERANCE)
            for name, weight in weights.items():
                assert abs(others[name] - weight).max() <= TOLERANCE, name


def test_the_comparison_sees_what_little_changes(ranks, alone):
    """A clipping norm or a penalty that differs by a millionth."""
    for option in ({"clip": 0.5 + 1e-6}, {"orthogonality": 1e-3 + 1e-6}):
        _, _, weights = ranks(2, partial(train, **option), {"tp": 2})[0]
        assert max(abs(weights[name] - w).max() for name, w in alone[2].items()) > 1e-8


def eight_ranks(rank: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="8")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=8)
    train_losses, test_losses, weights = train({"dp": 2, "tp": 2, "pp": 2})
    if rank == 7:
        np.savez(f"{folder}/weights.npz", train=train_losses, test=test_losses, **weights)
    dist.destroy_process_group()


def test_eight_ranks_of_all_three(alone, tmp_path):
    tests = Path(__file__).parent
    subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])},
        check=True,
        timeout=60,
    )
    found = np.load(tmp_path / "weights.npz")
    np.testing.assert_allclose(found["train"], alone[0], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(found["test"], alone[1], rtol=0, atol=TOLERANCE_32)
    for name, weight in alone[2].items():
        np.testing.assert_allclose(found[name], weight, rtol=0, atol=TOLERANCE)


def own_share(t: Tensor, like: Tensor, world: World) -> Tensor:
    """What of a whole ``t`` belongs to a parameter of this rank."""
    for axis in range(t.dim()):
        if t.shape[axis] != like.shape[axis]:
            return t.tensor_split(world.mesh["tp"].size(), axis)[world.tensor_rank]
    return t


def clip(axes: dict[str, int], max_norm: float) -> tuple[float, float, float]:
    """Norms of the whole gradient, as the unsplit model's and as ours, and of this rank's alone."""
    torch.manual_seed(0)
    mlp = MLP(SIZES[:4], dtype=torch.float64)
    mlp(torch.randn(6, 25, dtype=torch.float64)).square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in mlp.named_parameters()}
    expected = torch.nn.utils.clip_grad_norm_(mlp.parameters(), max_norm)
    with join_world("cpu") as world:
        world = world.split(**axes)
        model = stage_mlp(parallel_mlp(mlp, world.mesh["tp"]), world.mesh["pp"])
        for name, p in model.named_parameters():
            p.grad = own_share(gradients[name], p, world).clone()
        own = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        norm = clip_grad_norm_(model, max_norm, world)
        clipped = dict(mlp.named_parameters())
        for name, p in model.named_parameters():
            torch.testing.assert_close(
                p.grad, own_share(clipped[name].grad, p, world), rtol=1e-13, atol=0, msg=name
            )
    return expected.item(), norm.item(), own.item()


MESHES = [(2, {"dp": 2}), (2, {"tp": 2}), (2, {"pp": 2}), (4, {"dp": 2, "tp": 2}), (4, {"tp": 2, "pp": 2})]


@pytest.mark.parametrize("world_size, axes", MESHES)
def test_clipping_takes_the_norm_of_the_whole_gradient(ranks, world_size, axes):
    for max_norm in (0.1, 1e3):  # below and above the norm
        for expected, norm, own in ranks(world_size, clip, axes, max_norm):
            assert norm == pytest.approx(expected, rel=1e-13)
            assert (own == pytest.approx(expected, rel=1e-3)) == ("dp" in axes and "tp" not in axes)


def clip_what_is_not_finite(axes: dict[str, int]) -> tuple[float, int]:
    with join_world("cpu") as world:
        world = world.split(**axes)
        model = parallel_mlp(MLP(SIZES[:3]), world.mesh["tp"])
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        if world.rank == 1:
            model.layers[0].weight.grad[0, 0] = torch.nan
        norm = clip_grad_norm_(model, 1.0, world)
        return norm.item(), sum(int(p.grad.isfinite().sum()) for p in model.parameters())


def test_a_norm_that_is_not_finite_is_so_on_every_rank(ranks):
    for norm, finite in ranks(2, clip_what_is_not_finite, {"tp": 2}):
        assert np.isnan(norm)
        assert finite == 0


def accumulated(mlp: MLP, x: Tensor, labels: Tensor, rows: int) -> dict[str, np.ndarray]:
    """The mean loss's gradient by one process, over micro-batches of ``rows`` samples."""
    mlp = copy.deepcopy(mlp)
    for x_i, labels_i in zip(x.split(rows), labels.split(rows), strict=True):
        (CROSS_ENTROPY(mlp(x_i), labels_i) / len(x)).backward()
    return {name: p.grad.numpy() for name, p in mlp.named_parameters()}


def pipelined(schedule: Any, n: int, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, Any, bool]:
    """Gradients of this rank's stage, of four micro-batches and of one; whether the first are still the
    same after a forward pass."""
    torch.manual_seed(0)
    mlp = MLP(SIZES, "relu", dtype=dtype)
    x, labels = torch.randn(n, SIZES[0], dtype=dtype), torch.randint(0, 10, (n,))
    micro_batched, at_once = accumulated(mlp, x, labels, -(-n // 4)), accumulated(mlp, x, labels, n)
    with torch.no_grad():
        y = mlp(x)
    with join_world("cpu") as world:
        world = world.split(pp=world.world_size)
        stage, step = spread(mlp, world, schedule)
        loss = step.gradients(x, labels, n, CROSS_ENTROPY, NoPhases())
        found = {name: p.grad.numpy().copy() for name, p in stage.named_parameters()}
        outputs = step.outputs(x)
        is_last = world.rank == world.world_size - 1
    torch.testing.assert_close(loss, CROSS_ENTROPY(y, labels) if is_last else torch.zeros_like(loss))
    assert (outputs is not None) == is_last
    if is_last:
        torch.testing.assert_close(outputs, y)
    still = all(np.array_equal(p.grad, found[name]) for name, p in stage.named_parameters())
    return found, micro_batched, at_once, still


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("stages", [2, 4])
def test_a_pipelines_gradients_are_those_of_micro_batches(ranks, stages, schedule):
    stage = ranks(stages, pipelined, schedule, 24)
    assert [name for found, *_ in stage for name in found] == list(MLP(SIZES).state_dict())
    for found, micro_batched, at_once, _ in stage:
        assert all(np.array_equal(gradient, micro_batched[name]) for name, gradient in found.items())
        assert not all(np.array_equal(gradient, at_once[name]) for name, gradient in found.items())


def test_a_pipelines_forward_pass_leaves_the_gradients(ranks):
    assert all(still for *_, still in ranks(2, pipelined, "1f1b", 24))


@pytest.mark.parametrize("n", [23, 13, 3, 1])
def test_a_pipeline_takes_batches_that_do_not_divide(ranks, n):
    """Samples that fill micro-batches up count for nothing: float64 sums of 33 terms and less agree."""
    for found, micro_batched, *_ in ranks(2, pipelined, "1f1b", n, torch.float64):
        for name, gradient in found.items():
            np.testing.assert_allclose(gradient, micro_batched[name], rtol=0, atol=1e-13)


def refused() -> list[str]:
    messages = []
    with join_world("cpu") as world:
        world = world.split(pp=2)
        for build in (
            lambda: stage_mlp(MLP([3, 2]), world.mesh["pp"]),
            lambda: PipelineStep(MLP([3, 2]), world, micro_batches=1),
            lambda: PipelineStep(MLP([3, 2]), world, schedule="zigzag"),
            lambda: PipelineStep(MLP([3, 2]), world, micro_batches=2),
        ):
            try:
                build()
                messages.append("taken")
            except ConfigError as e:
                messages.append(str(e))
    return messages


def test_pipelines_that_cannot_be(ranks):
    for layers, micro_batches, schedule, taken in ranks(2, refused):
        assert layers.startswith("pp 2 makes more stages than the model has layers, 1;")
        assert micro_batches.startswith("1 micro-batches are fewer than the 2 stages")
        assert schedule == "schedule is 'zigzag', expected one of ['1f1b', 'gpipe']"
        assert taken == "taken"


def hash_of_a_run(axes: dict[str, int], reduction: Any, hidden: Any, adamw: bool) -> str:
    """Losses and weights, by their bits, of 10 float32 steps."""
    torch.manual_seed(0)
    mlp = MLP(SIZES, hidden)
    with join_world("cpu") as world:
        world = world.split(**axes, reduction=reduction)
        model, step = spread(mlp, world)
        optimizer = (
            torch.optim.AdamW(model.parameters(), lr=0.01)
            if adamw
            else training.sgd(model, lr=0.1, momentum=0.9, weight_decay=1e-3)
        )
        results = training.fit(
            model,
            optimizer,
            samples(55, 1),
            samples(21, 2),
            world,
            step=step,
            epochs=2,
            batch_size=13,
            clip=0.5,
        )
        digest = hashlib.sha256(repr([(r.train_loss, r.test_loss) for r in results]).encode())
        for name, weight in numbers(model).items():
            digest.update(name.encode() + weight.tobytes())
    return digest.hexdigest()


def hashes(ranks: Any, *args: Any, meshes: Any) -> list[str]:
    return [h for world_size, axes in meshes for h in ranks(world_size, hash_of_a_run, axes, *args)]


INVARIANT_MESHES = [
    (1, {}),
    (2, {"dp": 2}),
    (2, {"tp": 2}),
    (4, {"dp": 4}),
    (4, {"tp": 4}),
    (4, {"dp": 2, "tp": 2}),
]


@pytest.mark.parametrize("hidden, adamw", [("sigmoid", False), ("relu", False), ("relu", True)])
def test_an_invariant_run_has_the_same_bits_on_every_mesh(ranks, hidden, adamw):
    assert len(set(hashes(ranks, "invariant", hidden, adamw, meshes=INVARIANT_MESHES))) == 1


def test_a_fast_run_has_not(ranks):
    fast = hashes(ranks, "fast", "relu", False, meshes=[(1, {}), (4, {"dp": 4}), (4, {"tp": 4})])
    assert len(set(fast[1:5])) == len(set(fast[5:])) == 1  # the ranks of one mesh agree
    assert len(set(fast)) == 3


TERMS = [1e8, 1.0, -1e8, 1.0]  # in float32 (1e8 + 1) + (−1e8 + 1) is 0, ((1e8 + 1) − 1e8) + 1 is 1


def summed(reduction: Any) -> list[list[float]]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    terms = torch.cat([torch.tensor(TERMS).view(4, 1), torch.randn(4, 1000)], 1)
    own = terms.clone().view(mesh.size(), -1, 1001)[dist.get_rank()]
    total = all_reduce(tree_sum(list(own)), mesh, reduction)
    return [total.tolist(), tree_sum(list(terms)).tolist(), sum(terms[1:], terms[0]).tolist()]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_sum_over_ranks_is_the_trees(ranks, world_size):
    for total, tree, sequential in ranks(world_size, summed, "invariant"):
        assert total == tree
        assert total != sequential
        assert (tree[0], sequential[0]) == (0.0, 1.0)


def split_in_three() -> list[str]:
    messages = []
    with join_world("cpu") as world:
        mesh = init_device_mesh("cpu", (3,))
        for build in (
            lambda: world.split(dp=3, reduction="invariant"),
            lambda: world.split(tp=3, reduction="invariant"),
            lambda: ColumnParallelLinear(3, 3, mesh=mesh, reduction="invariant"),
            lambda: world.split(pp=3, reduction="invariant"),
            lambda: world.split(dp=3, reduction="tree"),
            lambda: world.split(dp=2),
            lambda: world.split(dp=3),
        ):
            try:
                build()
                messages.append("taken")
            except ConfigError as e:
                messages.append(str(e))
    return messages


def test_meshes_that_are_refused(ranks):
    ranks_of_a_dimension = "reduction 'invariant' takes 1, 2 or 4 ranks to a dimension of the mesh, not "
    for messages in ranks(3, split_in_three):
        assert messages == [
            *[ranks_of_a_dimension + "3"] * 3,
            "reduction 'invariant' takes meshes of dp and tp alone, not pp 3",
            "reduction is 'tree', expected 'fast' or 'invariant'",
            "dp 2 × tp 1 × pp 1 is 2 ranks, but 3 were started; start as many, or choose other factors",
            "taken",
        ]
    with pytest.raises(ConfigError, match=ranks_of_a_dimension + "8"):
        check_reduction("invariant", 8)
    check_reduction("fast", 3)


def fully_sharded() -> tuple[float, float, float]:
    """Greatest errors of the weights after five steps, fully sharded and plain; how far they went."""
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


def test_fully_sharded_data_parallelism_takes_the_mlp(ranks):
    for sharded, plain, start in ranks(2, fully_sharded):
        assert 0 < sharded <= 2 * plain
        assert start > 1e4 * plain


if __name__ == "__main__":
    # Forked, so that eight ranks import PyTorch once.
    mp.start_processes(eight_ranks, (sys.argv[1],), nprocs=8, start_method="fork")
