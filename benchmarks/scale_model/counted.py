# SPDX-License-Identifier: MIT
"""What one rank of many sends in a step, counted without the others.

In PyTorch's fake process group one process stands for any rank of any number: it builds the mesh, its part
of the model on the meta device, and runs steps of it, through DistributedDataParallel and the pipeline's
schedule as they are.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import ceil
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from torchpar.collectives import Call, Collectives
from torchpar.nn import MLP
from torchpar.parallel import cost
from torchpar.parallel.cost import Expected
from torchpar.parallel.mlp import parallel_mlp
from torchpar.parallel.pipeline import stage_mlp
from torchpar.parallel.step import ReplicaStep
from torchpar.parallel.world import World
from torchpar.phases import NoPhases
from torchpar.training import loss_sum

DTYPE = torch.bfloat16
_cross_entropy = partial(loss_sum, "cross-entropy")


class Mesh(NamedTuple):
    """A mesh, and the micro-batches of its pipeline."""

    dp: int
    tp: int
    pp: int = 1
    micro_batches: int = 1

    @property
    def ranks(self) -> int:
        return self.dp * self.tp * self.pp

    def rank(self, pp: int, dp: int = 0, tp: int = 0) -> int:
        """At these coordinates; "tp" varies fastest."""
        return (pp * self.dp + dp) * self.tp + tp

    def __str__(self) -> str:
        return f"{self.dp}×{self.tp}×{self.pp}"


MESHES = [Mesh(8, 8), Mesh(16, 8, 4, 16), Mesh(64, 8, 8, 32)]


class StageWork(NamedTuple):
    """A stage of a pipeline: its layers, and what a rank of it is predicted to send in a step."""

    layers: int
    expected: list[Expected]


class Counted(NamedTuple):
    """What a rank of each stage sends, and how that differs from what is predicted."""

    stages: list[StageWork]
    calls: list[Call]  # of the stage that sends most
    difference: str


def count(width: int, layers: int, batch: int, mesh: Mesh) -> Counted:
    """Run the first, the second and the last stage; those between are like the second."""
    runs = {}
    for stage in sorted({0, min(1, mesh.pp - 1), mesh.pp - 1}):
        # Not the first of its groups: with uneven shares others' differ.
        with fake_world(mesh, mesh.rank(stage, mesh.dp - 1, mesh.tp // 2)) as world:
            model = build(width, layers, world)
            expected = cost.collectives(
                model.sizes,
                batch,
                world.mesh,
                mesh.ranks,
                micro_batches=mesh.micro_batches,
                itemsize=DTYPE.itemsize,
            )
            runs[stage] = StageWork(len(model.layers), expected), _record(model, batch, world, mesh)
    found = [difference(calls, work.expected) for work, calls in runs.values()]
    stages = [runs.get(stage, runs[min(1, mesh.pp - 1)])[0] for stage in range(mesh.pp)]
    largest = max((calls for _, calls in runs.values()), key=lambda calls: sum(c.bytes for c in calls))
    return Counted(stages, largest, "; ".join(filter(None, found)))


def difference(calls: Sequence[Call], expected: Sequence[Expected]) -> str:
    """How the sizes of the calls of each dimension and operation differ from the prediction, else ""."""
    recorded = Counter((call.dimension, call.operation, call.bytes) for call in calls)
    predicted = Counter((e.dimension, e.operation, e.nbytes) for e in expected)
    return "; ".join(
        f"{kind[0]} {kind[1]} of {kind[2]:,} bytes: {recorded[kind]} recorded, {predicted[kind]} predicted"
        for kind in sorted(recorded | predicted)
        if recorded[kind] != predicted[kind]
    )


@contextmanager
def fake_world(mesh: Mesh, rank: int) -> Iterator[World]:
    """The world as ``rank`` of ``mesh`` would find it; its collectives return at once and move nothing."""
    capability, defaults = dist.Backend.backend_capability, dist.Backend.default_device_backend_map
    before = capability["fake"], defaults.get("meta")
    # Messages between neighbours look for a backend of their tensors' device.
    capability["fake"], defaults["meta"] = ["cpu", "meta"], "fake"
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=mesh.ranks)
    try:
        world = World(rank, rank % 8, mesh.ranks, torch.device("meta"))
        yield world.split(dp=mesh.dp, tp=mesh.tp, pp=mesh.pp)
    finally:
        dist.destroy_process_group()
        capability["fake"] = before[0]
        if before[1] is None:
            del defaults["meta"]


def build(width: int, layers: int, world: World) -> MLP:
    """This rank's part of an MLP of ``layers`` layers, all ``width × width``, without memory."""
    assert world.mesh is not None
    mlp = MLP([width] * (layers + 1), device="meta", dtype=DTYPE)
    return stage_mlp(parallel_mlp(mlp, world.mesh["tp"]), world.mesh["pp"])


def _record(model: MLP, batch: int, world: World, mesh: Mesh) -> list[Call]:
    """What this rank sends in a step once `DistributedDataParallel` has settled on its buckets."""
    assert world.mesh is not None
    group, stage = world.mesh["dp"].get_group(), world.mesh["pp"].get_local_rank()
    forward = DistributedDataParallel(
        model, process_group=group, gradient_as_bucket_view=True, init_sync=False
    )
    forward.register_comm_hook(group, _reduce_bucket)
    share = ceil(batch / mesh.dp)
    x = torch.empty(share, model.sizes[0], device="meta", dtype=DTYPE)
    labels = torch.empty(share, device="meta", dtype=torch.long)
    if mesh.pp == 1:
        replica = ReplicaStep(forward, mesh.dp)
        step: Any = partial(replica.gradients, x, labels, batch, _cross_entropy, NoPhases())
    else:
        schedule = _schedule(forward, model, ceil(share / mesh.micro_batches), world, mesh.micro_batches)
        inputs, target = [x] if stage == 0 else [], labels if stage == mesh.pp - 1 else None
        step = partial(schedule.step, *inputs, target=target, losses=[])
    # The first step has one bucket, the second exchanges the order in which gradients came.
    for _ in range(3):
        recorded = Collectives(world)
        with _OwnBuckets(), recorded:
            step()
        model.zero_grad()
    return recorded.calls


def _schedule(
    forward: torch.nn.Module, model: MLP, rows: int, world: World, micro_batches: int
) -> Schedule1F1B:
    """As `torchpar.parallel.pipeline.PipelineStep` builds it, but for the shapes of what crosses borders:
    neighbours that are not there cannot tell them."""
    assert world.mesh is not None
    mesh, parts = world.mesh["pp"], world.mesh["tp"].size()
    layers = [int(name) for name in model.layers._modules]

    def border(i: int) -> Tensor:
        width = model.sizes[i] // parts if i % 2 else model.sizes[i]
        return torch.empty(rows, width, device="meta", dtype=DTYPE, requires_grad=i > 0)

    stage = PipelineStage(
        forward,
        mesh.get_local_rank(),
        mesh.size(),
        torch.device("meta"),
        input_args=(border(layers[0]),),
        output_args=(border(layers[-1] + 1),),
        group=mesh.get_group(),
    )
    return Schedule1F1B(stage, micro_batches, loss_fn=_cross_entropy, scale_grads=False)


class _OwnBuckets(TorchDispatchMode):
    """DistributedDataParallel sends rank 0's order of gradients to all, by way of the parameters' device.

    From the meta device nothing comes back; what this rank sent there is what rank 0 would have sent.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def _reduce_bucket(
    group: dist.ProcessGroup,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    # DistributedDataParallel's own asks the backend for a result, and the fake one has none.
    gradient = bucket.buffer()
    dist.all_reduce(gradient, group=group)
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(gradient)
    return done
