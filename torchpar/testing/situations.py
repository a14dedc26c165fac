# SPDX-License-Identifier: MIT
"""The situations in which an optimizer is tried: each is a function that runs on every rank."""

import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from torchpar.parallel.split.layers import ColumnParallelLinear, RowParallelLinear
from torchpar.testing.trial import STEPS, Trial, named_weights


class Situation(NamedTuple):
    """A function that trains in a situation.

    Attributes:
        ranks: the number of ranks; of a situation that starts ranks anew, of each phase.
        one_may_refuse: whether an error on one rank is right, which leaves the others waiting.
        polar: whether the update is compared with the polar factor, too.
    """

    run: Callable[[Trial], None]
    ranks: tuple[int, ...]
    one_may_refuse: bool = False
    orthogonal: bool = False
    polar: bool = False


SITUATIONS: dict[str, Situation] = {}


def situation(name: str, *ranks: int, **kind: bool) -> Callable[[Callable[[Trial], None]], Any]:
    def register(function: Callable[[Trial], None]) -> Callable[[Trial], None]:
        SITUATIONS[name] = Situation(function, ranks or (1,), **kind)
        return function

    return register


# One process


@situation("whole")
def whole(trial: Trial) -> None:
    model = trial.model()
    trial.train(model, trial.optimizer(model))


@situation("polar factor", orthogonal=True, polar=True)
def polar(trial: Trial) -> None:
    trial.decades = 1.5
    model = trial.model()
    for _, p in named_weights(model):
        p.data.zero_()  # so that weight decay takes no part
    trial.train(model, trial.optimizer(model), steps=[0])


def scaled(trial: Trial) -> None:
    """Gradients 2¹⁰ times those of the reference; the factor is exact in every dtype."""
    model = trial.model()

    def backward(step: int) -> None:
        (1024 * model(trial.batch(step))).backward()

    trial.train(model, trial.optimizer(model), backward)
    trial.record.gradients = {name: [g / 1024 for g in of] for name, of in trial.record.gradients.items()}


situation("scale of gradients", orthogonal=True)(scaled)


@situation("scale of gradients, bfloat16 without Nesterov", orthogonal=True)
def scaled_bfloat16(trial: Trial) -> None:
    trial.use(torch.bfloat16, nesterov=False)
    scaled(trial)


def micro_batches(trial: Trial, model: nn.Module, part: int = 0, parts: int = 1) -> Callable[[int], None]:
    """A backward pass in 3 micro-batches; under `fully_shard` only the last one synchronises gradients."""

    def backward(step: int) -> None:
        for i in range(3):
            model(trial.batch(step, 3 * part + i, 3 * parts)).backward()

    return backward


@situation("accumulation")
def accumulation(trial: Trial) -> None:
    model = trial.model()
    trial.train(model, trial.optimizer(model), micro_batches(trial, model))


@situation("closure")
def closure(trial: Trial) -> None:
    model = trial.model()
    optimizer = trial.optimizer(model)

    def loss(step: int) -> Tensor:
        optimizer.zero_grad()
        value: Tensor = model(trial.batch(step))
        value.backward()
        return value

    trial.train(model, optimizer, take_step=lambda step: optimizer.step(partial(loss, step)))


@situation("tied weights")
def tied(trial: Trial) -> None:
    model = trial.model()
    model.twin = nn.Linear(1, 1)
    model.twin.weight, model.twin.bias = model.square.weight, None  # type: ignore[assignment]

    def backward(step: int) -> None:
        model({**trial.batch(step), "twin": trial.batch(step + 1)["square"]}).backward()

    trial.train(model, trial.optimizer(model), backward)


@situation("torch.compile")
def compiled(trial: Trial) -> None:
    model: Any = torch.compile(trial.model(), backend="aot_eager")
    trial.train(model, trial.optimizer(model))


@situation("state dict")
def state_dict(trial: Trial) -> None:
    model = trial.model()
    optimizer = trial.optimizer(model)
    trial.train(model, optimizer, steps=STEPS[:1])
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    model = trial.model()
    model.load_state_dict(weights)
    optimizer = trial.optimizer(model)
    optimizer.load_state_dict(state)
    trial.train(model, optimizer, steps=STEPS[1:])


# Data parallelism


def data_parallel(trial: Trial, model: nn.Module) -> Callable[[int], None]:
    """A backward pass of this rank's share of the batch."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    return lambda step: model(trial.batch(step, rank, ranks)).backward()


@situation("DDP", 2)
def ddp(trial: Trial) -> None:
    model = DistributedDataParallel(trial.model())
    trial.train(model, trial.optimizer(model), data_parallel(trial, model))


@situation("DDP, sharing the work", 2)
def ddp_shared(trial: Trial) -> None:
    model = DistributedDataParallel(trial.model())
    optimizer = trial.optimizer(model, process_group=dist.group.WORLD)
    trial.train(model, optimizer, data_parallel(trial, model))


def sharded(model: nn.Module, **options: Any) -> Any:
    for layer in (*model.children(), model):
        fully_shard(layer, **options)
    return model


def train_sharded(trial: Trial, **options: Any) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = sharded(trial.model(), mesh=mesh, **options)
    trial.train(model, trial.optimizer(model), data_parallel(trial, model))


situation("fully_shard on 2 ranks", 2)(train_sharded)
situation("fully_shard on 3 ranks", 3)(train_sharded)


@situation("fully_shard, padded rows", 4)
def padded(trial: Trial) -> None:
    """9 rows are padded to 12 and 5 to 8, which changes the ratio of rows and columns."""
    trial.shapes = {"nine": (9, 6), "five": (5, 4)}
    train_sharded(trial)


@situation("fully_shard, mixed precision", 2)
def mixed_precision(trial: Trial) -> None:
    train_sharded(trial, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))


@situation("fully_shard, CPU offload", 2)
def offload(trial: Trial) -> None:
    train_sharded(trial, offload_policy=CPUOffloadPolicy(pin_memory=False))


@situation("fully_shard, bfloat16", 2)
def bfloat16(trial: Trial) -> None:
    trial.use(torch.bfloat16)
    train_sharded(trial)


@situation("fully_shard, without Nesterov", 2)
def without_nesterov(trial: Trial) -> None:
    trial.use(nesterov=False)
    train_sharded(trial)


@situation("fully_shard, convolutions", 2)
def convolutions(trial: Trial) -> None:
    trial.shapes = {"conv": (16, 3, 2, 2), "uneven": (5, 4, 3, 1)}
    train_sharded(trial)


@situation("fully_shard, accumulation", 2)
def sharded_accumulation(trial: Trial) -> None:
    model = sharded(trial.model())
    trial.train(model, trial.optimizer(model), micro_batches(trial, model, dist.get_rank(), 2))


@situation("fully_shard, accumulation, one synchronisation", 2)
def accumulation_without_sync(trial: Trial) -> None:
    model = sharded(trial.model())

    def backward(step: int) -> None:
        for i in range(3):
            model.set_requires_gradient_sync(i == 2)
            model(trial.batch(step, 3 * dist.get_rank() + i, 6)).backward()

    trial.train(model, trial.optimizer(model), backward)


@situation("optimizer made before fully_shard", 2)
def made_before(trial: Trial) -> None:
    model = trial.model()
    optimizer = trial.optimizer(model)
    sharded(model)
    trial.train(model, optimizer, data_parallel(trial, model))


# Several matrices in one parameter


@situation("fused query, key and value")
def fused(trial: Trial) -> None:
    trial.shapes = {"qkv": (64, 32), "square": (32, 32)}
    trial.views = {"qkv.weight": lambda w: w.split([32, 16, 16])}
    model = trial.model()
    trial.train(model, trial.optimizer(model))


@situation("heads after fully_shard", 2)
def heads(trial: Trial) -> None:
    trial.shapes = {"qkv": (60, 20), "square": (20, 20)}
    trial.views = {"qkv.weight": lambda w: w.view(12, 5, 20)}
    train_sharded(trial)


# DTensors


def distributed(trial: Trial, mesh: Any, *placements: Any) -> Any:
    """The model with DTensors for weights, which its layers cannot compute with."""
    model = trial.model()
    for layer in model.children():
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, placements))  # type: ignore[arg-type]
    return model


def give_gradients(trial: Trial, model: nn.Module, partial_sums: bool = False) -> Callable[[int], None]:
    """A backward pass of given gradients, so that an optimizer's hooks see them."""

    def backward(step: int) -> None:
        weights: Any = dict(named_weights(model))
        if partial_sums:
            of_rank = trial.gradients(step, dist.get_rank(), dist.get_world_size())
            grads = [DTensor.from_local(g, weights[n].device_mesh, [Partial()]) for n, g in of_rank.items()]
        else:
            grads = [
                distribute_tensor(g, weights[n].device_mesh, weights[n].placements)
                for n, g in trial.gradients(step).items()
            ]
        torch.autograd.backward(list(weights.values()), grads)

    return backward


def train_distributed(shape: tuple[int, ...], *placements: Any, **options: Any) -> Callable[[Trial], None]:
    def train(trial: Trial) -> None:
        model = distributed(trial, init_device_mesh("cpu", shape), *placements)
        trial.train(model, trial.optimizer(model), give_gradients(trial, model, **options))

    return train


situation("DTensor, Shard(0)", 2)(train_distributed((2,), Shard(0)))
situation("DTensor, Shard(0) on 3 ranks", 3)(train_distributed((3,), Shard(0)))
situation("DTensor, Shard(1)", 2)(train_distributed((2,), Shard(1)))
situation("DTensor, Replicate", 2)(train_distributed((2,), Replicate()))
situation("DTensor, Shard(0), Shard(1)", 4)(train_distributed((2, 2), Shard(0), Shard(1)))
situation("DTensor, Replicate, Shard(1)", 4)(train_distributed((2, 2), Replicate(), Shard(1)))
situation("DTensor, partial gradients", 2)(train_distributed((2,), Shard(0), partial_sums=True))


def without_gradient(placement: Any) -> Callable[[Trial], None]:
    """Rank 1 has no gradient of one matrix, whose whole gradient the reference gets."""

    def train(trial: Trial) -> None:
        model = distributed(trial, init_device_mesh("cpu", (2,)), placement)
        optimizer = trial.optimizer(model)

        def take_step(step: int) -> None:
            if dist.get_rank() == 1:
                model.square.weight.grad = None
            optimizer.step()

        trial.train(model, optimizer, give_gradients(trial, model), take_step=take_step)

    return train


situation("no gradient on one rank, Shard(0)", 2)(without_gradient(Shard(0)))
situation("no gradient on one rank, Replicate", 2)(without_gradient(Replicate()))


@situation("another learning rate on one rank", 2)
def other_rate(trial: Trial) -> None:
    model = distributed(trial, init_device_mesh("cpu", (2,)), Shard(0))
    optimizer = trial.optimizer(model)
    for group in optimizer.param_groups:
        if "lr" in group:
            group["lr"] = group["lr"] * (1 + dist.get_rank())
    trial.train(model, optimizer, give_gradients(trial, model))


@situation("add_param_group on one rank", 2, one_may_refuse=True)
def late_group(trial: Trial) -> None:
    model = distributed(trial, init_device_mesh("cpu", (2,)), Shard(0))
    optimizer = trial.optimizer(model)
    backward = give_gradients(trial, model)
    trial.train(model, optimizer, backward, steps=STEPS[:1])
    if dist.get_rank() == 0:
        # Not a parameter of the model: the other rank has none that could correspond to it.
        late: Any = copy.deepcopy(model.square.weight)
        late.grad = copy.deepcopy(model.square.weight.grad)
        named = "param_names" in optimizer.param_groups[0]
        optimizer.add_param_group({"params": [("late", late) if named else late]})
    trial.train(model, optimizer, backward, steps=STEPS[1:])


# Tensor parallelism, and pipelines


def split_layers(kind: Any, axis: int, **arguments: Any) -> Callable[[Trial], None]:
    def train(trial: Trial) -> None:
        mesh, model = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), trial.model()
        for name, layer in list(model.named_children()):
            setattr(model, name, kind.from_linear(layer, mesh=mesh, **arguments))

        def whole(name: str, t: Tensor) -> Tensor:
            if isinstance(t, DTensor):
                return t.full_tensor()
            slices: list[Any] = [None] * 2
            dist.all_gather_object(slices, t)
            return torch.cat(slices, axis)

        trial.train(model, trial.optimizer(model), whole=whole)

    return train


situation("ColumnParallelLinear", 2)(split_layers(ColumnParallelLinear, 0, gather_output=True))
situation("RowParallelLinear", 2)(split_layers(RowParallelLinear, 1, input_is_parallel=False))


def parallelized(trial: Trial, mesh: Any) -> Any:
    styles = [ColwiseParallel(output_layouts=Replicate()), RowwiseParallel(input_layouts=Replicate())]
    plan: Any = {name: styles[i % 2] for i, name in enumerate(trial.shapes)}
    return parallelize_module(trial.model(), mesh, plan)


@situation("parallelize_module", 2)
def tensor_parallel(trial: Trial) -> None:
    model = parallelized(trial, init_device_mesh("cpu", (2,)))
    trial.train(model, trial.optimizer(model))


@situation("fully_shard over parallelize_module", 4)
def sharded_tensor_parallel(trial: Trial) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = sharded(parallelized(trial, mesh["tp"]), mesh=mesh["dp"])
    rank = mesh.get_local_rank("dp")
    trial.train(model, trial.optimizer(model), lambda step: model(trial.batch(step, rank, 2)).backward())


@situation("pipeline stages", 2)
def pipeline(trial: Trial) -> None:
    """Each rank has other parameters, and another number of them."""
    names = list(trial.shapes)
    for name in names[:2] if dist.get_rank() else names[2:]:
        del trial.shapes[name]
    model = trial.model()
    trial.train(model, trial.optimizer(model))


# Checkpoints


def checkpoint(trial: Trial) -> None:
    """Save the state of the ranks after a step, and load it in the next phase, on other ranks."""
    model: Any = trial.model() if dist.get_world_size() == 1 else sharded(trial.model())
    optimizer = trial.optimizer(model)
    if trial.phase == 0:
        trial.train(model, optimizer, data_parallel(trial, model), steps=STEPS[:1])
        dcp.save(_state(model, optimizer), checkpoint_id=trial.folder)
        return
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=trial.folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    trial.train(model, optimizer, data_parallel(trial, model), steps=STEPS[1:])


situation("DCP, 2 ranks onto 3", 2, 3)(checkpoint)
situation("DCP, 2 ranks onto 1", 2, 1)(checkpoint)


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    weights, state = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": state}
