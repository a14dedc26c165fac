# SPDX-License-Identifier: MIT
"""Count what a rank sends in a step on 64 to 4096 ranks: ``python -m benchmarks run scale_model``.

In PyTorch's fake process group one process stands for any rank of any number. It builds the mesh and its part
of the model on the meta device, and runs steps with DistributedDataParallel or a pipeline's schedule. If the
bytes of a dimension of the mesh are not those of `expected_bytes`, the status is 1.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import ceil
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.command import Command, run
from benchmarks.results import Result, Table, print_results, track
from benchmarks.timing import CPU
from torchpar.nn import MLP
from torchpar.parallel.launch.world import World
from torchpar.parallel.split.mlp import parallel_mlp
from torchpar.parallel.split.pipeline import stage_mlp
from torchpar.parallel.split.reduction import all_reduce
from torchpar.profile.collectives import Call, Collectives
from torchpar.training import loss_sum

DTYPE = torch.bfloat16
LAYERS = 16  # all width × width
WIDTHS = [4096, 8192, 16384, 32768, 65536]
WEAK_BATCH = 2**14  # samples a rank
STRONG_BATCH = 2**20  # samples, of all ranks
cross_entropy_sum = partial(loss_sum, "cross-entropy")


class MeshPlan(NamedTuple):
    """The shape of a mesh, and the micro-batches of its pipeline."""

    dp: int
    tp: int
    pp: int = 1
    micro_batches: int = 1

    @property
    def ranks(self) -> int:
        return self.dp * self.tp * self.pp

    def __str__(self) -> str:
        return f"{self.dp}×{self.tp}×{self.pp}"


MESHES = [MeshPlan(8, 8), MeshPlan(16, 8, 4, 16), MeshPlan(64, 8, 8, 32)]


def count(width: int, layers: int, batch: int, plan: MeshPlan) -> tuple[list[Call], str]:
    """The collectives of the rank that sends most in a step, and the bytes that are not those expected.

    The first, the second and the last stage run; those between are like the second.
    """
    largest: list[Call] = []
    differences = []
    for stage in sorted({0, min(1, plan.pp - 1), plan.pp - 1}):
        # Not the first of its groups: with uneven shares others' differ. "tp" varies fastest.
        rank = (stage * plan.dp + plan.dp - 1) * plan.tp + plan.tp // 2
        with fake_world(plan, rank) as world:
            mlp = MLP([width] * (layers + 1), device="meta", dtype=DTYPE)
            model = stage_mlp(parallel_mlp(mlp, world.mesh["tp"]), world.mesh["pp"])
            calls = record(model, batch, world, plan)
        differences.append(difference(calls, expected_bytes(width, layers, batch, plan, stage)))
        largest = max(largest, calls, key=lambda calls: sum(call.bytes for call in calls))
    return largest, "; ".join(filter(None, differences))


def expected_bytes(width: int, layers: int, batch: int, plan: MeshPlan, stage: int) -> dict[str, int]:
    """Bytes of a step's messages in each dimension, for numbers that their divisors divide.

    Each row layer sums an activation ``(rows, width)`` over "tp", and each column layer the gradient of one,
    but for the model's input. Stages exchange activations one way, and gradients the other way; within a pair
    of layers a rank has its part of them. Over "dp" go the gradients of a rank's parts of the weights and of
    the column layers' biases, and of the row layers' whole biases.
    """
    own, activation = layers // plan.pp, batch // plan.dp * width
    first, last = stage * own, stage * own + own - 1
    borders = [i for i in (first, last + 1) if 0 < i < layers]
    biases = sum(width if i % 2 else width // plan.tp for i in range(first, last + 1))
    numbers = {
        "tp": (own - (stage == 0)) * activation,
        "pp": sum(2 * activation // (plan.tp if i % 2 else 1) for i in borders),
        "dp": own * width**2 // plan.tp + biases,
    }
    return {dimension: n * DTYPE.itemsize for dimension, n in numbers.items()}


def difference(calls: Sequence[Call], expected: dict[str, int]) -> str:
    """Return how the bytes of each dimension differ from those expected, or ""."""
    counted = {dimension: 0 for dimension in expected}
    for call in calls:
        counted[call.dimension] += call.bytes
    return "" if counted == expected else f"counted {counted} bytes, expected {expected}"


@contextmanager
def fake_world(plan: MeshPlan, rank: int) -> Iterator[World]:
    """The world of ``rank``. Its collectives return at once and move nothing."""
    # Messages between neighbours look for a backend of their tensors' device.
    dist.Backend.backend_capability["fake"] = ["cpu", "meta"]
    dist.Backend.default_device_backend_map["meta"] = "fake"
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=plan.ranks)
    try:
        mesh = init_device_mesh("meta", (plan.pp, plan.dp, plan.tp), mesh_dim_names=("pp", "dp", "tp"))
        yield World(rank, rank % 8, plan.ranks, torch.device("meta"), mesh)
    finally:
        dist.destroy_process_group()


def record(model: MLP, batch: int, world: World, plan: MeshPlan) -> list[Call]:
    """The collectives of a step, forward and backward, as the examples run it."""
    share, stage = ceil(batch / plan.dp), world.mesh["pp"].get_local_rank()
    x = torch.empty(share, model.sizes[0], device="meta", dtype=DTYPE)
    labels = torch.empty(share, device="meta", dtype=torch.long)
    if plan.pp == 1:
        group = world.mesh["dp"].get_group()
        wrapped = DistributedDataParallel(
            model, process_group=group, gradient_as_bucket_view=True, init_sync=False
        )
        wrapped.register_comm_hook(group, _reduce_bucket)

        def step() -> None:
            cross_entropy_sum(wrapped(x), labels).backward()
    else:
        schedule = _schedule(model, ceil(share / plan.micro_batches), world, plan.micro_batches)
        inputs, target = [x] if stage == 0 else [], labels if stage == plan.pp - 1 else None

        def step() -> None:
            schedule.step(*inputs, target=target, losses=[])
            gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            all_reduce(torch.cat(gradients), world.mesh["dp"])

    # DistributedDataParallel has one bucket in the first step, and arranges them anew in the second.
    for _ in range(3):
        recorded = Collectives(world)
        with _OwnBuckets(), recorded:
            step()
        model.zero_grad()
    return recorded.calls


def _schedule(model: MLP, rows: int, world: World, micro_batches: int) -> Schedule1F1B:
    """As `Pipeline` builds it, with the shapes of activations given: absent neighbours cannot send them."""
    mesh, parts = world.mesh["pp"], world.mesh["tp"].size()
    layers = [int(name) for name in model.layers._modules]

    def border(i: int) -> Tensor:
        width = model.sizes[i] // parts if i % 2 else model.sizes[i]
        return torch.empty(rows, width, device="meta", dtype=DTYPE, requires_grad=i > 0)

    stage = PipelineStage(
        model,
        mesh.get_local_rank(),
        mesh.size(),
        torch.device("meta"),
        input_args=(border(layers[0]),),
        output_args=(border(layers[-1] + 1),),
        group=mesh.get_group(),
    )
    return Schedule1F1B(stage, micro_batches, loss_fn=cross_entropy_sum, scale_grads=False)


class _OwnBuckets(TorchDispatchMode):
    """Keep this rank's order of gradients.

    DistributedDataParallel broadcasts rank 0's order by way of the parameters' device. Nothing comes back
    from the meta device; this rank's own order is the one that rank 0 would have sent.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def _reduce_bucket(
    group: dist.ProcessGroup,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    # DistributedDataParallel's own hook asks the backend for a result, and the fake one has none.
    gradient = bucket.buffer()
    dist.all_reduce(gradient, group=group)
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(gradient)
    return done


def main(arguments: Sequence[str] | None = None) -> int:
    command = Command("scale_model", "Count what a rank of 64 to 4096 sends in a step.")
    options = command.parse(arguments)
    widths = WIDTHS[:1] if options.quick else WIDTHS
    table = Table(command.csv(options), CPU)
    jobs = [(plan, width) for plan in MESHES for width in widths]
    for plan, width in track(jobs, "count"):
        for batch in dict.fromkeys((WEAK_BATCH * plan.ranks, STRONG_BATCH)):
            calls, different = count(width, LAYERS, batch, plan)
            case = {"ranks": plan.ranks, "dp × tp × pp": str(plan), "micro_batches": plan.micro_batches}
            case |= {"width": width, "batch": batch}
            columns = {f"{d} calls": sum(call.dimension == d for call in calls) for d in ("tp", "pp", "dp")}
            columns["bytes"] = sum(call.bytes for call in calls)
            ok = not different
            table.add([Result(case=case, contestant="counted", columns=columns, ok=ok, reason=different)])
    print_results("calls of the rank that sends most in a step, and their bytes", table.results)
    equal = sum(result.ok for result in table.results)
    print(f"counted and expected bytes: equal in {equal} of {len(table.results)} rows")
    return table.status


if __name__ == "__main__":
    run(main)
