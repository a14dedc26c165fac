# SPDX-License-Identifier: MIT
"""The situations in which an optimizer is tried: functions that run on every rank, and their table."""

import copy
import inspect
import io
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from torchpar.parallel.split.layers import ColumnParallelLinear, RowParallelLinear
from torchpar.testing.trial import STEPS, NotApplicable, Trial, named_weights

# One process


def whole(trial: Trial) -> None:
    trial.train(trial.model())


def polar(trial: Trial) -> None:
    model = trial.model()
    for _, p in named_weights(model):
        p.data.zero_()  # so that weight decay takes no part
    trial.train(model, steps=STEPS[:1])


def scaled(trial: Trial) -> None:
    """Gradients 2¹⁰ times those of the reference; the factor is exact in every dtype."""
    model = trial.model()
    trial.train(model, backward=lambda step: (1024 * model(trial.batch(step))).backward())
    trial.record.gradients = {name: [g / 1024 for g in of] for name, of in trial.record.gradients.items()}


def accumulated(trial: Trial) -> None:
    model = trial.model()
    trial.train(model, backward=lambda step: micro_batches(trial, model, step))


def micro_batches(
    trial: Trial, model: Any, step: int, part: int = 0, parts: int = 1, synchronize_last: bool = False
) -> None:
    """A backward pass of a part of the batch in 3 micro-batches."""
    for i in range(3):
        if synchronize_last:
            model.set_requires_gradient_sync(i == 2)
        model(trial.batch(step, 3 * part + i, 3 * parts)).backward()


def closure(trial: Trial) -> None:
    model = trial.model()
    optimizer: Any = trial.optimizer(model)
    if "closure" not in inspect.signature(optimizer.step).parameters:
        raise NotApplicable("step has no argument closure")

    def loss(step: int) -> Tensor:
        optimizer.zero_grad()
        value: Tensor = model(trial.batch(step))
        value.backward()
        return value

    trial.train(model, optimizer, take_step=lambda step: optimizer.step(partial(loss, step)))


def tied(trial: Trial) -> None:
    """One weight of two layers, each with an input of its own."""
    model: Any = trial.model()
    model.twin = copy.deepcopy(model.square)
    model.twin.weight = model.square.weight

    def backward(step: int) -> None:
        model({**trial.batch(step), "twin": trial.batch(step + 1)["square"]}).backward()

    trial.train(model, backward=backward)


def compiled(trial: Trial) -> None:
    trial.train(torch.compile(trial.model(), backend="eager"))  # type: ignore[arg-type]


def resumed(trial: Trial) -> None:
    """A state dict is saved after the first step, and loaded into a new optimizer of a new model."""
    model, file = trial.model(), io.BytesIO()
    optimizer = trial.optimizer(model)
    trial.train(model, optimizer, steps=STEPS[:1])
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=False)
    model = trial.model()
    model.load_state_dict(weights)
    optimizer = trial.optimizer(model)
    optimizer.load_state_dict(state)
    trial.train(model, optimizer, steps=STEPS[1:])


# Data parallelism


def share(trial: Trial, model: nn.Module) -> Callable[[int], None]:
    """A backward pass of this rank's share of the batch."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    return lambda step: model(trial.batch(step, rank, ranks)).backward()


def replicated(trial: Trial, shares_work: bool = False) -> None:
    model = DistributedDataParallel(trial.model())
    options = {"process_group": dist.group.WORLD} if shares_work else {}
    trial.train(model, trial.optimizer(model, **options), share(trial, model))


def shard(model: nn.Module, **options: Any) -> nn.Module:
    """`fully_shard` each layer, and the model."""
    for layer in (*model.children(), model):
        fully_shard(layer, **options)
    return model


def sharded(trial: Trial, **options: Any) -> None:
    model = shard(trial.model(), **options)
    trial.train(model, backward=share(trial, model))


def sharded_accumulated(trial: Trial, synchronize_last: bool) -> None:
    model = shard(trial.model())
    part = dist.get_rank(), dist.get_world_size(), synchronize_last
    trial.train(model, backward=lambda step: micro_batches(trial, model, step, *part))


def made_before(trial: Trial) -> None:
    """The optimizer has the parameters that `fully_shard` replaces."""
    model = trial.model()
    optimizer = trial.optimizer(model)
    trial.train(shard(model), optimizer, share(trial, model))


# DTensors


def distribute(trial: Trial, placements: Sequence[Any] = (Shard(0),)) -> Any:
    """The model with DTensors for weights, which its layers cannot compute with."""
    ranks = dist.get_world_size()
    model, mesh = (
        trial.model(),
        init_device_mesh("cpu", (ranks,) if len(placements) == 1 else (2, ranks // 2)),
    )
    for layer in model.children():
        weight: Any = layer.weight
        layer.weight = nn.Parameter(distribute_tensor(weight.detach(), mesh, placements, src_data_rank=None))
    return model


def give_gradients(trial: Trial, model: nn.Module, step: int, partial_sums: bool = False) -> None:
    """A backward pass that only accumulates given gradients; an optimizer's hooks see it."""
    params: Any = dict(named_weights(model))
    if partial_sums:
        of_rank = trial.gradients(step, dist.get_rank(), dist.get_world_size())
        grads = [DTensor.from_local(g, params[name].device_mesh, [Partial()]) for name, g in of_rank.items()]
    else:
        grads = [
            distribute_tensor(g, params[name].device_mesh, params[name].placements, src_data_rank=None)
            for name, g in trial.gradients(step).items()
        ]
    torch.autograd.backward(list(params.values()), grads)


def distributed(trial: Trial, partial_sums: bool = False, **options: Any) -> None:
    model = distribute(trial, **options)
    trial.train(model, backward=lambda step: give_gradients(trial, model, step, partial_sums))


def without_gradient(trial: Trial) -> None:
    """In the second step no rank has a gradient of one matrix, which keeps its value."""
    model = distribute(trial)

    def backward(step: int) -> None:
        give_gradients(trial, model, step)
        if step == 1:
            model.square.weight.grad = None

    trial.train(model, backward=backward)


def lacking_gradient(trial: Trial, **options: Any) -> None:
    """Rank 1 has no gradient of one matrix. The reference has the whole gradient."""
    model = distribute(trial, **options)
    optimizer: Any = trial.optimizer(model)

    def take_step(step: int) -> None:
        if dist.get_rank() == 1:
            model.square.weight.grad = None
        optimizer.step()

    trial.train(model, optimizer, lambda step: give_gradients(trial, model, step), take_step=take_step)


def other_rate(trial: Trial) -> None:
    """The learning rate of rank 1 is twice that of rank 0, which is the reference's."""
    model = distribute(trial)
    optimizer = trial.optimizer(model)
    for group in optimizer.param_groups:
        if "lr" in group:
            group["lr"] = group["lr"] * (1 + dist.get_rank())
    trial.train(model, optimizer, lambda step: give_gradients(trial, model, step))


def late_group(trial: Trial) -> None:
    """Rank 0 adds a group after a step; its parameter is not the model's."""
    model = distribute(trial)
    optimizer: Any = trial.optimizer(model)
    trial.train(model, optimizer, lambda step: give_gradients(trial, model, step), steps=STEPS[:1])
    late = copy.deepcopy(model.square.weight)
    if dist.get_rank() == 0:
        group = {
            key: x for key, x in optimizer.param_groups[0].items() if key not in ("params", "param_names")
        }
        named = "param_names" in optimizer.param_groups[0]
        optimizer.add_param_group({**group, "params": [("late", late) if named else late]})

    def backward(step: int) -> None:
        give_gradients(trial, model, step)
        late.grad = model.square.weight.grad.clone()

    trial.train(model, optimizer, backward, steps=STEPS[1:])


# Tensor parallelism, and pipelines


def split_layers(trial: Trial, kind: Any, axis: int) -> None:
    """Layers of torchpar whose weights are slices; the record has the whole layers."""
    mesh, model = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), trial.model()
    for name, layer in list(model.named_children()):
        setattr(model, name, kind.from_linear(layer, mesh=mesh))

    def backward(step: int) -> None:
        """A column layer has a part of the outputs, and a row layer takes a part of the inputs."""

        def part(t: Tensor, of: int) -> Tensor:
            return t.tensor_split(2, -1)[dist.get_rank()] if axis == of else t

        model({name: (part(x, 1), part(y, 0)) for name, (x, y) in trial.batch(step).items()}).backward()

    def gather(t: Tensor) -> Tensor:
        if isinstance(t, DTensor):
            return t.full_tensor()
        slices: list[Any] = [None] * 2
        dist.all_gather_object(slices, t)
        return torch.cat(slices, axis)

    trial.gather = gather
    trial.train(model, backward=backward)


def parallelize(trial: Trial, mesh: Any) -> nn.Module:
    styles = ColwiseParallel(output_layouts=Replicate()), RowwiseParallel(input_layouts=Replicate())
    return parallelize_module(
        trial.model(), mesh, {name: styles[i % 2] for i, name in enumerate(trial.shapes)}
    )


def tensor_parallel(trial: Trial) -> None:
    trial.train(parallelize(trial, init_device_mesh("cpu", (2,))))


def sharded_tensor_parallel(trial: Trial) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = shard(parallelize(trial, mesh["tp"]), mesh=mesh["dp"])
    rank = mesh.get_local_rank("dp")
    trial.train(model, backward=lambda step: model(trial.batch(step, rank, 2)).backward())


def pipeline(trial: Trial) -> None:
    """Each rank has other parameters, and another number of them."""
    for name in list(trial.shapes)[2:] if dist.get_rank() else list(trial.shapes)[:2]:
        del trial.shapes[name]
    trial.train(trial.model())


def checkpointed(trial: Trial) -> None:
    """One phase saves a checkpoint after a step, and the next one loads it on other ranks."""
    model = trial.model()
    if dist.get_world_size() > 1:
        shard(model)
    optimizer = trial.optimizer(model)
    if trial.phase == 0:
        trial.train(model, optimizer, share(trial, model), steps=STEPS[:1])
    weights, state = get_state_dict(model, optimizer)
    if trial.phase == 0:
        save({"model": weights, "optimizer": state}, checkpoint_id=trial.folder)
        return
    load({"model": weights, "optimizer": state}, checkpoint_id=trial.folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    trial.train(model, optimizer, share(trial, model), steps=STEPS[1:])


class Situation(NamedTuple):
    """A function that trains in a situation.

    Attributes:
        ranks: their number; a tuple of two has two phases, of which the second starts anew.
        setup: arguments of `Trial`.
        orthogonal: whether it is about optimizers that orthogonalise, and no others. Others send no
            messages, and so cannot notice the mistake of another rank.
        one_may_refuse: whether an error on one rank is right, which leaves the others waiting.
        timeout: seconds, fewer where ranks that hang are a usual fault.
    """

    run: Callable[[Trial], None]
    ranks: int | tuple[int, ...] = 1
    setup: Mapping[str, Any] = MappingProxyType({})
    orthogonal: bool = False
    one_may_refuse: bool = False
    timeout: float = math.inf


BFLOAT16: dict[str, Any] = {"dtype": torch.bfloat16}
NO_NESTEROV: dict[str, Any] = {"options": {"nesterov": False}}
MIXED = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
# fully_shard pads 9 rows to 12 and 5 to 8, and an update's norm may depend on the ratio of rows and columns.
PADDED = {"shapes": {"nine": (9, 6), "five": (5, 4)}}
# Two singular values that differ could make rounding look larger than its yardstick.
FEW_ROWS: dict[str, Any] = {"shapes": {"two": (2, 32), "one": (1, 20)}, "decades": 0.0}
CONVOLUTIONS = {"shapes": {"square": (16, 3, 2, 2), "uneven": (5, 4, 3, 1)}}
FUSED = {"shapes": {"qkv": (64, 32)}, "views": {"qkv.weight": lambda w: w.split([32, 16, 16])}}
HEADS = {"shapes": {"qkv": (60, 20)}, "views": {"qkv.weight": lambda w: w.view(12, 5, 20)}}

SITUATIONS = {
    "whole": Situation(whole),
    "polar factor": Situation(polar, setup={"decades": 1.5}, orthogonal=True),
    "scale of gradients": Situation(scaled, orthogonal=True),
    "scale of gradients, bfloat16 without Nesterov": Situation(
        scaled, setup=BFLOAT16 | NO_NESTEROV, orthogonal=True
    ),
    "accumulation": Situation(accumulated),
    "closure": Situation(closure),
    "tied weights": Situation(tied),
    "torch.compile": Situation(compiled),
    "state dict": Situation(resumed),
    "fused query, key and value": Situation(whole, setup=FUSED),
    "DDP": Situation(replicated, 2),
    "DDP, sharing the work": Situation(partial(replicated, shares_work=True), 2),
    "fully_shard on 2 ranks": Situation(sharded, 2),
    "fully_shard on 3 ranks": Situation(sharded, 3),
    "fully_shard, fewer rows than ranks": Situation(sharded, 3, FEW_ROWS),
    "fully_shard, padded rows": Situation(sharded, 4, PADDED),
    "fully_shard, mixed precision": Situation(partial(sharded, mp_policy=MIXED), 2),
    "fully_shard, CPU offload": Situation(partial(sharded, offload_policy=CPUOffloadPolicy(False)), 2),
    "fully_shard, bfloat16": Situation(sharded, 2, BFLOAT16),
    "fully_shard, without Nesterov": Situation(sharded, 2, NO_NESTEROV),
    "fully_shard, convolutions": Situation(sharded, 2, CONVOLUTIONS),
    "fully_shard, heads": Situation(sharded, 2, HEADS),
    "fully_shard, accumulation": Situation(partial(sharded_accumulated, synchronize_last=False), 2),
    "fully_shard, accumulation, one sync": Situation(partial(sharded_accumulated, synchronize_last=True), 2),
    "fully_shard after the optimizer": Situation(made_before, 2, orthogonal=True),
    "Shard(0)": Situation(distributed, 2),
    "Shard(0) on 3 ranks": Situation(distributed, 3),
    "Shard(1)": Situation(partial(distributed, placements=[Shard(1)]), 2),
    "Replicate": Situation(partial(distributed, placements=[Replicate()]), 2),
    "Shard(0), Shard(0)": Situation(partial(distributed, placements=[Shard(0), Shard(0)]), 4),
    "Shard(0), Shard(1)": Situation(partial(distributed, placements=[Shard(0), Shard(1)]), 4),
    "Replicate, Shard(1)": Situation(partial(distributed, placements=[Replicate(), Shard(1)]), 4),
    "Shard(0), partial gradients": Situation(partial(distributed, partial_sums=True), 2),
    "Shard(0), no gradient in a step": Situation(without_gradient, 2),
    "Shard(0), no gradient on one rank": Situation(lacking_gradient, 2, orthogonal=True, timeout=20.0),
    "Replicate, no gradient on one rank": Situation(
        partial(lacking_gradient, placements=[Replicate()]), 2, orthogonal=True
    ),
    "Shard(0), two learning rates": Situation(other_rate, 2, orthogonal=True),
    "Shard(0), a group on one rank": Situation(
        late_group, 2, orthogonal=True, one_may_refuse=True, timeout=10.0
    ),
    "ColumnParallelLinear": Situation(partial(split_layers, kind=ColumnParallelLinear, axis=0), 2),
    "RowParallelLinear": Situation(partial(split_layers, kind=RowParallelLinear, axis=1), 2),
    "parallelize_module": Situation(tensor_parallel, 2),
    "fully_shard over parallelize_module": Situation(sharded_tensor_parallel, 4),
    "pipeline stages": Situation(pipeline, 2),
    "DCP, 2 ranks onto 3": Situation(checkpointed, (2, 3)),
    "DCP, 2 ranks onto 1": Situation(checkpointed, (2, 1)),
}
