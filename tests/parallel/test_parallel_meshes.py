# SPDX-License-Identifier: MIT
"""Training on meshes of data, tensor and pipeline parallelism, compared with one process."""

import copy
import math
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

from support.orthogonality import add_orthogonality_gradient

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from torchpar import exact
from torchpar.errors import ConfigError
from torchpar.library.sharding import local
from torchpar.nn import MLP
from torchpar.parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    World,
    clip_grad_norm_,
    join_world,
    parallel_mlp,
)
from torchpar.parallel.split import clip as clip_module
from torchpar.parallel.split import shared_memory
from torchpar.parallel.split.layers import meshes_of_shards
from torchpar.parallel.split.parts import part_of, slice_along
from torchpar.parallel.split.pipeline import Pipeline, check_one_rank_per_gpu, stage_mlp
from torchpar.parallel.split.shared_memory import register_shared_memory_hook
from torchpar.training.fused import FusedGradients
from torchpar.training.profile.collectives import Collectives

SIZES = (25, 33, 7, 5, 10)
# Sums of at most 33 terms in two orders differ by 33·eps. In five steps at a rate of 0.3 and a
# momentum of 0.9 the difference grows less than 1000-fold.
TOLERANCE = {"rtol": 0.0, "atol": 3 * 33 * torch.finfo(torch.float64).eps * 1000}
EQUAL = {"rtol": 0.0, "atol": 0.0}

sum_of_losses = partial(cross_entropy, reduction="sum")


def split(
    mlp: MLP, world: World, schedule: Any, micro_batches: int, fused: bool = False
) -> tuple[MLP, Callable[..., Tensor], Callable[[Tensor], Tensor | None]]:
    """This rank's part of ``mlp``, and its `Pipeline.step` and `predict` or what stands for them
    here."""
    if fused:
        model = copy.deepcopy(mlp)
        gradients = FusedGradients(model, world)
        return model, lambda x, labels, global_size, _: gradients(x, labels, global_size), model
    is_whole = mlp.hidden == "maxout"  # which tensor parallelism does not split
    mlp = copy.deepcopy(mlp) if is_whole else parallel_mlp(mlp, world.mesh["tp"])
    model = stage_mlp(mlp, world.mesh["pp"])
    if world.mesh["pp"].size() > 1:
        pipeline = Pipeline(model, world, schedule, micro_batches)
        return model, pipeline.step, pipeline.predict
    replica: torch.nn.Module = model
    if world.dp_size > 1:
        replica = ddp = DistributedDataParallel(model, process_group=world.mesh["dp"].get_group())
        register_shared_memory_hook(ddp, world)

    def step(
        x: Tensor, labels: Tensor, global_size: int, loss_sum: Callable[..., Tensor]
    ) -> Tensor:
        loss = loss_sum(replica(x), labels)
        (loss * (world.dp_size / global_size)).backward()
        return loss.detach()

    return model, step, model


class Training(NamedTuple):
    """A few steps of training on a mesh.

    Attributes:
        batches: the sizes of the global batches; of the last one there are three.
        max_norm: the norm at which gradients are clipped. At 1000 none are, and a pipeline has the
            bits of one process that adds up the gradients of the micro-batches.
        fused: whether gradients come from `FusedGradients`.
        shared: whether ranks may add them through shared memory.
    """

    dp: int
    tp: int
    pp: int
    schedule: str = "1f1b"
    micro_batches: int = 4
    sizes: tuple[int, ...] = SIZES
    hidden: str = "relu"
    batches: tuple[int, ...] = (13,)
    max_norm: float = 0.1
    fused: bool = False
    shared: bool = True

    @property
    def ranks(self) -> int:
        return self.dp * self.tp * self.pp

    @property
    def has_the_same_bits(self) -> bool:
        return self.pp == self.ranks > 1 and self.max_norm == 1e3


TRAININGS = [
    Training(1, 1, 1),
    Training(4, 1, 1, batches=(13, 2)),  # ranks without a sample
    *(Training(dp, 1, 1, hidden="sigmoid", batches=(13, 2), fused=True) for dp in (1, 3)),
    Training(3, 1, 1, batches=(13, 2), fused=True, shared=False),
    Training(3, 1, 1, hidden="maxout", batches=(13, 2)),
    Training(1, 2, 1, sizes=SIZES[:4], hidden="sigmoid", max_norm=1e3),  # the last layer is whole
    Training(1, 4, 1, sizes=(7, 3, 5, 1, 2), batches=(1, 13)),  # ranks without some features
    Training(1, 1, 2, batches=(23, 3, 1), max_norm=1e3),  # with an empty micro-batch
    Training(1, 1, 2, "gpipe", batches=(12, 7), max_norm=1e3),
    # As many micro-batches as stages.
    Training(1, 1, 2, micro_batches=2, batches=(8,), max_norm=1e3),
    Training(1, 1, 3, hidden="maxout", max_norm=1e3),
    Training(2, 1, 2, micro_batches=2, batches=(7, 13)),  # as many micro-batches as stages
    Training(2, 2, 1, batches=(5, 13)),
    Training(1, 2, 2, "gpipe", 3, (25, 1, 10), "sigmoid", (8, 5)),  # a border within a pair
    Training(2, 2, 2, batches=(13, 3)),
]
# Like some of these, on more ranks or with other micro-batches.
LARGER = [
    Training(4, 1, 1, hidden="sigmoid", batches=(13, 2), fused=True),
    Training(1, 1, 3, micro_batches=5, batches=(15,), max_norm=1e3),
    Training(1, 1, 3, micro_batches=2, batches=(5, 6), max_norm=1e3),
    Training(1, 1, 4, "gpipe", 5, hidden="sigmoid"),
]


def train_beside_one_process(training: Training, wrong: str = "") -> None:
    """Compare losses, gradients and weights of each step with those of the whole model.

    Unless this goes ``wrong``: "a mean of means", of the ranks' unequal shares; "another norm", 1%
    larger.
    """
    torch.manual_seed(0)
    whole = MLP(training.sizes, training.hidden, dtype=torch.float64)
    supported = shared_memory.SUPPORTED and training.shared
    with join_world("cpu") as world, patch.object(shared_memory, "SUPPORTED", supported):
        world = world.with_mesh(dp=training.dp, tp=training.tp, pp=training.pp)
        model, step, predict = split(
            whole, world, training.schedule, training.micro_batches, training.fused
        )
        optimizers = [
            torch.optim.SGD(m.parameters(), lr=0.3, momentum=0.9, weight_decay=1e-3)
            for m in (model, whole)
        ]

        *batches, last = training.batches
        # A pipeline is set up for each size, DistributedDataParallel in two steps.
        batches += [last] * 3
        for n in batches:
            x = torch.randn(n, training.sizes[0], dtype=torch.float64)
            labels = torch.randint(training.sizes[-1], (n,))
            mine = world.share(x)
            size = world.dp_size * len(mine) if wrong == "a mean of means" else n
            loss = step(mine, world.share(labels), size, sum_of_losses)
            outputs, expected_outputs = predict(mine), whole(x)
            cuts = training.micro_batches if training.has_the_same_bits else 1
            losses = list(
                map(sum_of_losses, map(whole, x.tensor_split(cuts)), labels.tensor_split(cuts))
            )
            for one in losses:
                (one / n).backward()
            for m in (model, whole):
                add_orthogonality_gradient(m, 1e-3)
            max_norm = 1.01 * training.max_norm if wrong == "another norm" else training.max_norm
            norm = clip_grad_norm_(model, max_norm, world)
            expected_norm = torch.nn.utils.clip_grad_norm_(whole.parameters(), training.max_norm)
            assert_close(norm, expected_norm, **TOLERANCE)
            found = {"loss": world.sum(loss * world.owns_outputs)}
            expected = {"loss": torch.stack(losses).sum().detach()}
            if outputs is not None:
                found["outputs"], expected["outputs"] = outputs, world.share(expected_outputs)
            for optimizer in optimizers:
                optimizer.step()
            parameters = dict(whole.named_parameters())
            for name, p in model.named_parameters():
                found |= {name: p.detach(), f"{name}.grad": p.grad}
                expected[name] = part_of(p).narrow(parameters[name].detach())
                expected[f"{name}.grad"] = part_of(p).narrow(parameters[name].grad)
            assert_close(found, expected, **(EQUAL if training.has_the_same_bits else TOLERANCE))
            for optimizer in optimizers:
                optimizer.zero_grad()


@pytest.mark.parametrize(
    "training",
    [*TRAININGS, *(pytest.param(one, marks=pytest.mark.slow) for one in LARGER)],
    ids=str,
)
def test_a_mesh_trains_as_one_process(ranks, training):
    ranks(training.ranks, train_beside_one_process, training)


@pytest.mark.parametrize("wrong", ["a mean of means", "another norm"])
def test_the_comparison_rejects(ranks, wrong):
    with pytest.raises(AssertionError):
        ranks(2, train_beside_one_process, Training(2, 1, 1), wrong)


def pipeline_under_autocast(frozen: bool) -> None:
    """The stages send what autocast computes; a first stage that is frozen has no gradients."""
    torch.manual_seed(0)
    whole, x, labels = MLP(SIZES[:3]), torch.randn(8, SIZES[0]), torch.randint(SIZES[2], (8,))
    whole.layers[0].requires_grad_(not frozen)
    with join_world("cpu") as world, torch.autocast("cpu", torch.bfloat16):
        world = world.with_mesh(dp=2, pp=2)
        stage = stage_mlp(copy.deepcopy(whole), world.mesh["pp"])
        Pipeline(stage, world, micro_batches=1).step(
            world.share(x), world.share(labels), 8, sum_of_losses
        )
        for mine, targets in zip(x.chunk(2), labels.chunk(2), strict=True):
            (sum_of_losses(whole(mine), targets) / 8).backward()
    expected = {name: p.grad for name, p in whole.named_parameters()}
    for name, p in stage.named_parameters():
        assert p.grad is expected[name] or torch.equal(p.grad, expected[name])


@pytest.mark.parametrize("frozen", [False, True])
def test_a_pipeline_under_autocast_has_the_bits_of_one_process(ranks, frozen):
    ranks(4, pipeline_under_autocast, frozen)


def clip(axes: dict[str, int]) -> tuple[float, int, list[tuple[str, int]]]:
    """The norm of gradients with a NaN on rank 1, how many finite ones clipping leaves, and its
    messages."""
    with join_world("cpu") as world:
        world = world.with_mesh(**axes)
        model = parallel_mlp(MLP(SIZES[:3]), world.mesh["tp"])
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        if world.rank == 1:
            model.layers[0].weight.grad[0, 0] = torch.nan
        with Collectives(world) as watch:
            norm = clip_grad_norm_(model, 1.0, world)
        finite = sum(int(p.grad.isfinite().sum()) for p in model.parameters())
        return norm.item(), finite, [(call.operation, call.bytes) for call in watch.calls]


def test_clipping_sends_one_number_and_a_nan_makes_every_ranks_gradients_nan(ranks):
    for norm, finite, messages in ranks(2, clip, {"tp": 2}):
        assert norm != norm
        assert (finite, messages) == (0, [("all_reduce", torch.float64.itemsize)])
    for *_, messages in ranks(2, clip, {"dp": 2}):
        assert messages == []


WAYS = ("sharded", "sharded on 2-D", "split and sharded", "replicated", "partial", "mixed")


def divided(way: str, whole: torch.nn.Sequential, world: World) -> tuple[torch.nn.Module, World]:
    """A copy of ``whole`` on the ranks of a mesh, with the same gradients."""
    model, half = copy.deepcopy(whole), world.world_size // 2
    if way == "sharded":
        fully_shard(model, mesh=world.mesh["dp"])
    elif way == "sharded on 2-D":  # the first layer has two shards, the others have replicas, too
        names = "replicas", "shards"
        fully_shard(model[0], mesh=init_device_mesh("cpu", (half, 2), mesh_dim_names=names))
        fully_shard(model, mesh=init_device_mesh("cpu", (2, half), mesh_dim_names=names))
    elif way == "split and sharded":
        world = world.with_mesh(dp=half, tp=2)
        model = parallel_mlp(model, world.mesh["tp"])
        fully_shard(model, mesh=world.mesh["dp"])
    elif way in ("replicated", "partial"):
        world = world.with_mesh(dp=half, tp=2)
        distribute_module(model, world.mesh["tp"])
    else:  # split layers, plain ones, and DTensors
        world = world.with_mesh(dp=half, tp=2)
        model = torch.nn.Sequential(*parallel_mlp(model[:3], world.mesh["tp"]), *model[3:])
        parallelize_module(model[5], world.mesh["tp"], ColwiseParallel())
    layers = meshes_of_shards(model)
    for (name, q), p in zip(whole.named_parameters(), model.parameters(), strict=True):
        gradient = q.grad.clone()
        if p in layers:
            layer = model.get_submodule(name.split(".")[0])
            axis = layer.split_axes[name.split(".")[1]]
            gradient = slice_along(axis, gradient.shape, layers[p]).narrow(gradient)
        if way == "partial":
            terms = gradient * (1.5 if world.tp_rank else -0.5)
            gradient = DTensor.from_local(terms, world.mesh["tp"], [Partial()])
        elif isinstance(p, DTensor):
            gradient = distribute_tensor(gradient, p.device_mesh, p.placements, src_data_rank=None)
        p.grad = gradient
    return model, world


def clip_divided(ways: Sequence[str], wrong: bool = False) -> None:
    """Compare norms and clipped gradients with those of the whole model."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(n, m) for n, m in ((6, 9), (9, 3), (3, 5), (5, 7))]
    whole = torch.nn.Sequential(
        *layers[:1], torch.nn.Tanh(), layers[1], torch.nn.Tanh(), *layers[2:]
    )
    whole.double()(torch.randn(4, 6, dtype=torch.float64)).square().sum().backward()
    with join_world("cpu") as world, pytest.MonkeyPatch.context() as patch:
        if wrong:
            patch.setattr(clip_module, "_share", lambda *_: 1 / world.world_size)
        for way in ways:
            for max_norm in (1e3, 0.1):
                expected = copy.deepcopy(whole)
                for p, q in zip(expected.parameters(), whole.parameters(), strict=True):
                    p.grad = q.grad.clone()
                model, mesh = divided(way, whole, world)
                norm = clip_grad_norm_(model, max_norm, mesh)
                expected_norm = torch.nn.utils.clip_grad_norm_(expected.parameters(), max_norm)
                assert_close(norm, expected_norm)
                clipped, _ = divided(way, expected, world)
                for p, q in zip(model.parameters(), clipped.parameters(), strict=True):
                    assert_close(local(p.grad), local(q.grad))


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_clipping_dtensors_is_that_of_one_process(ranks, count):
    ranks(count, clip_divided, WAYS)


@pytest.mark.parametrize("way", ["sharded", "split and sharded", "mixed"])
def test_the_comparison_rejects_shards_that_count_as_replicas(ranks, way):
    with pytest.raises(AssertionError, match="not close"):
        ranks(2, clip_divided, [way], True)


def clip_sparse(dtype: torch.dtype) -> None:
    """Beside a sparse gradient, a split layer's; rows that occur twice are added up."""
    torch.manual_seed(0)
    with join_world("cpu") as alone:
        world = alone.with_mesh(tp=2)
        model = torch.nn.Sequential(torch.nn.Embedding(9, 6, sparse=True), torch.nn.Linear(6, 4))
        model.to(dtype)
        split = torch.nn.Sequential(model[0], *parallel_mlp(model[1:], world.mesh["tp"]))
        for max_norm in (0.1, 1e3, math.inf, 0):
            whole = copy.deepcopy(model)
            whole[0].sparse = False
            for one in (whole, split):
                one.zero_grad()
                one(torch.tensor([[1, 5], [1, 1]])).square().sum().backward()
            assert split[0].weight.grad.is_sparse
            norm = clip_grad_norm_(split, max_norm, world)
            expected = torch.nn.utils.clip_grad_norm_(whole.parameters(), float(max_norm))
            assert_close(norm, expected.double(), rtol=4 * torch.finfo(dtype).eps, atol=0)
            assert_close(split[0].weight.grad.to_dense(), whole[0].weight.grad)
        split[0].weight.grad = None
        with pytest.raises(
            ConfigError, match=r"^the gradient of 0\.weight is torch\.sparse_csr, expected"
        ):
            clip_module._elements("0.weight", SimpleNamespace(layout=torch.sparse_csr))
        for given in (-1.0, math.nan, "1", None, True, torch.ones(2)):
            message = re.escape(f"max_norm is {given!r}, expected a number from 0 on")
            with pytest.raises(ConfigError, match=f"^{message}"):
                clip_grad_norm_(split, given, world)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse_gradients_are_clipped_as_dense_ones(ranks, dtype):
    ranks(2, clip_sparse, dtype)


def clip_exactly(way: str) -> list[str]:
    """The bits of the norm, and of the whole clipped gradients, in the exact mode."""
    with join_world("cpu") as world:
        found = []
        # A square root hides a difference of the last bit, but seldom in each of eight norms.
        for seed, largest in enumerate((*[1.0] * 8, math.inf, math.nan)):
            torch.manual_seed(seed)
            whole = torch.nn.Sequential(torch.nn.Linear(30, 49), torch.nn.Linear(49, 3))
            for p in whole.parameters():
                p.grad = torch.randn(p.shape) * 10 ** torch.randn(p.shape)
            whole[0].weight.grad[0, 0] = largest
            model = copy.deepcopy(whole)
            if way == "sharded in part":
                fully_shard(model[0], mesh=world.mesh["dp"])
            for p, q in zip(model.parameters(), whole.parameters(), strict=True):
                p.grad = q.grad.clone()
                if isinstance(p, DTensor):
                    p.grad = distribute_tensor(p.grad, p.device_mesh, p.placements)
            with exact.mode():
                norm = clip_grad_norm_(model, 0.1, world)
            expected = torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.1)
            assert_close(norm.float(), expected, rtol=1e-6, atol=0, equal_nan=True)
            gradients = [
                p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
                for p in model.parameters()
            ]
            for g, q in zip(gradients, whole.parameters(), strict=True):
                assert_close(g, q.grad, equal_nan=True)
            found += [t.numpy().tobytes().hex() for t in (norm, *gradients)]
        return found


def test_an_exact_norm_has_the_same_bits_on_any_number_of_ranks(ranks):
    cases = (1, "replicated"), (2, "replicated"), (2, "sharded in part"), (3, "sharded in part")
    bits = [one for count, way in cases for one in ranks(count, clip_exactly, way)]
    assert bits == bits[:1] * len(bits)


def refused_dtensors() -> None:
    torch.manual_seed(0)
    with join_world("cpu") as world:
        some = distribute_module(torch.nn.Linear(2, 2), DeviceMesh("cpu", [0, 1]))
        for p in some.parameters():
            p.grad = p.detach()
        message = r"^weight is a DTensor on ranks \[0, 1\] of 3, expected it on all, or copies"
        with pytest.raises(ConfigError, match=message):
            clip_grad_norm_(some, 1.0, world)
        world = world.with_mesh(tp=3)
        split = parallel_mlp(MLP(SIZES[:3]), world.mesh["tp"])
        fully_shard(split, mesh=world.mesh["tp"])
        for p in split.parameters():
            p.grad = p.detach()
        message = (
            r"^layers\.0\.weight is a DTensor over the ranks of its split layer, expected other"
        )
        with pytest.raises(ConfigError, match=message):
            clip_grad_norm_(split, 1.0, world)


def test_dtensors_that_cannot_be_clipped_are_named(ranks):
    ranks(3, refused_dtensors)


def refusals() -> None:
    with join_world("cpu") as world:
        one, pp = MLP([3, 2]), world.with_mesh(pp=np.int64(2))

        def with_tp(given: Any) -> World:
            return world.with_mesh(dp=2, tp=given)

        assert RowParallelLinear(np.int16(2), 3, mesh=pp.mesh["dp"]).in_features == 2
        shared = replace(pp, device=torch.device("cuda"))  # gloo connects ranks that share a GPU
        advice = "2 were started; start as many, or choose other factors"
        for message, build in (
            (f"dp 2 × tp 3 × pp 1 is 6 ranks, but {advice}", partial(world.with_mesh, dp=2, tp=3)),
            *(
                (f"tp is {given!r}, expected a whole number from 1 on", partial(with_tp, given))
                for given in (0, -1, 1.0, True, "1", None, math.nan, np.float64(1), np.bool_(True))
            ),
            (
                f"mesh: dp is {'2 on rank 0 and 2.0 on rank 1'}, expected the same on all",
                partial(world.with_mesh, dp=[2, 2.0][world.rank]),
            ),
            (
                "stage_mlp: mesh has 3 dimensions, expected a mesh of one dimension, such as world."
                'mesh["pp"]',
                partial(stage_mlp, one, pp.mesh),
            ),
            ("parallel_mlp: mesh is 2, expected a mesh of one", partial(parallel_mlp, one, 2)),
            (
                "ColumnParallelLinear: mesh is None, expected a mesh of one",
                partial(ColumnParallelLinear, 2, 3, mesh=None),
            ),
            (
                "out_features is 3.0, expected a whole number from 0 on",
                partial(RowParallelLinear, 2, 3.0, mesh=pp.mesh["dp"]),
            ),
            ("Pipeline: world is of type int, expected the World", partial(Pipeline, one, 2)),
            ("Pipeline: model is of type generator", partial(Pipeline, one.parameters(), pp)),
            (
                "pp 2 makes more stages than the model has layers, 1",
                partial(stage_mlp, one, pp.mesh["pp"]),
            ),
            ("a pipeline on GPUs needs one rank per GPU", partial(check_one_rank_per_gpu, shared)),
            (
                "schedule is 'zigzag', expected one of ['1f1b', 'gpipe']",
                partial(Pipeline, one, pp, "zigzag"),
            ),
        ):
            with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
                build()


def test_meshes_and_pipelines_that_are_refused(ranks):
    ranks(2, refusals)


def stages_that_differ() -> None:
    with join_world("cpu") as world:
        world = world.with_mesh(pp=2)
        torch.manual_seed(0)
        stage = stage_mlp(MLP([5, 4, 3]), world.mesh["pp"])
        for schedule, parts, message in (
            (
                ("gpipe", "1f1b")[world.rank],
                2,
                "the stages' pipelines: schedule is gpipe on rank 0",
            ),
            (
                "1f1b",
                2 + world.rank,
                "the stages' pipelines: micro_batches is 2 on rank 0 and 3 on rank 1",
            ),
            *(
                ("1f1b", given, f"micro_batches is {given!r}, expected a whole number from 1 on")
                for given in (0, -1, 2.0, True, "2")
            ),
            # Of one stage alone, too, before the other one waits.
            (
                ("1f1b", "zigzag")[world.rank],
                2,
                "the stages' pipelines: schedule is 1f1b on rank 0 and zigzag on rank 1",
            ),
            (
                "1f1b",
                (2, True)[world.rank],
                "the stages' pipelines: micro_batches is 2 on rank 0 and True on rank 1",
            ),
        ):
            with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
                Pipeline(stage, world, schedule, parts)
        pipeline = Pipeline(stage, world, "1f1b", np.int64(2))
        loss = partial(torch.nn.functional.cross_entropy, reduction="sum")
        samples, labels = torch.ones(9, 5), torch.zeros(9).long()
        what = "the stages of a pipeline have different samples, expected the same batch on all: "
        # Also numbers that both have had.
        for both in ((8, 6), (6, 5), (8, 8), (6, 6), (8, 6), (8, 5)):
            n = both[world.rank]
            message = (
                f"^{what}{n} samples.* on rank {world.rank}, {both[1 - world.rank]} samples.* on"
            )
            for call in (pipeline.predict, lambda x: pipeline.step(x, labels[: len(x)], 9, loss)):
                with (
                    nullcontext()
                    if both[0] == both[1]
                    else pytest.raises(ConfigError, match=message)
                ):
                    call(samples[:n])
        pipeline.step(samples, labels, np.int64(9), loss)
        for size in (0, -9, 9.0, True, "9", None):
            of_size = f"global_size is {size!r}, expected a whole number from 1 on"
            for given, message in (
                (size, of_size),
                ((9, size)[world.rank], f"{what}9 samples and"),
            ):
                with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
                    pipeline.step(samples, labels, given, loss)
        for there, message in (
            (8, "9 samples and 8 labels, expected as many"),
            (9 - world.rank, what),
        ):
            with pytest.raises(ConfigError, match=f"^{message}"):
                pipeline.step(samples, labels[:there], 9, loss)


def test_stages_that_differ_are_refused_before_they_send(ranks):
    """gloo would abort the processes."""
    ranks(2, stages_that_differ)
