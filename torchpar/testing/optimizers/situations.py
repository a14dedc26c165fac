# SPDX-License-Identifier: MIT
"""Situations in which an optimizer is tried: functions that run on every rank, and their table."""

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from torchpar.parallel.split.layers import ColumnParallelLinear, RowParallelLinear
from torchpar.parallel.split.parts import slice_along
from torchpar.testing.optimizers.trial import (
    SHAPES,
    STEPS,
    Failure,
    Setup,
    Trial,
    multiply_rates,
    named_layers,
)


def trained(
    trial: Trial,
    wrap: Callable[[nn.Module], Any] = lambda model: model,
    micro_batches: int = 1,
    replica: int | None = 1,
    optimizer_first: bool = False,
    without: Sequence[int] = (),
    **options: object,
) -> None:
    """Train a model that ``wrap`` changes.

    Args:
        micro_batches: the number of micro-batches of each rank's share, whose gradients are added.
        replica: the number of ranks that split a model, and get the same samples; None for all.
        without: the steps in which a matrix has no gradient.
        options: arguments of the optimizer.
    """
    model: nn.Module = trial.model()
    early = trial.optimizer(model, **options) if optimizer_first else None
    model = wrap(model)
    replica = replica or dist.get_world_size()
    rank, ranks = dist.get_rank() // replica, dist.get_world_size() // replica
    optimizer = early or trial.optimizer(model, **options)
    scheduler = scheduled(trial, optimizer) if trial.rates else None
    for step in trial.steps(model, optimizer):
        if scheduler and step:
            scheduler.step()
        for i in range(micro_batches):
            batch = trial.batch(step, micro_batches * rank + i, micro_batches * ranks)
            (trial.factor * model(batch)).backward()
        if step in without:
            lose_gradient(model)


def scheduled(trial: Trial, optimizer: torch.optim.Optimizer) -> LambdaLR:
    if any("lr" not in group for group in optimizer.param_groups):
        raise Failure("not applicable", "the groups of the optimizer have no lr")
    return LambdaLR(optimizer, lambda step: trial.rates[step])


def sharing_work(trial: Trial, run: Callable[..., None]) -> None:
    """Train with an optimizer that gets the group of all ranks."""
    run(trial, process_group=dist.group.WORLD)


def pipeline(trial: Trial) -> None:
    """Train with different parameters, and different numbers of parameters, on the ranks."""
    names = list(SHAPES)[2:] if dist.get_rank() else list(SHAPES)[:2]
    trial.shapes = {name: SHAPES[name] for name in names}
    trained(trial, replica=2)


Split = type[ColumnParallelLinear] | type[RowParallelLinear]


def split_layers(trial: Trial, kinds: Sequence[Split | None], **options: object) -> None:
    """Train column layers, whose outputs are sharded, and row layers, whose inputs are sharded.

    Args:
        kinds: the layers take these in turn; None leaves a layer whole.
        options: arguments of the optimizer.
    """
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    model, by_name = trial.model(), dict(zip(trial.shapes, cycle(kinds), strict=False))
    for name, layer in list(model.named_children()):
        if kind := by_name[name]:
            setattr(model, name, kind.from_linear(layer, mesh=mesh))

    def shard_if(is_sharded: bool, t: Tensor) -> Tensor:
        return slice_along(1, t.shape, mesh).narrow(t) if is_sharded else t

    for step in trial.steps(model, trial.optimizer(model, **options)):
        shards = {}
        for name, (x, y) in trial.batch(step).items():
            kind = by_name[name]
            shards[name] = (
                shard_if(kind is RowParallelLinear, x),
                shard_if(kind is ColumnParallelLinear, y),
            )
        model(shards).backward()


# Changes of a model


def shard(model: nn.Module, **options: Any) -> nn.Module:
    """`fully_shard` each layer, and the model."""
    for layer in (*model.children(), model):
        fully_shard(layer, **options)
    return model


def shard_some(model: nn.Module) -> nn.Module:
    """`fully_shard` every second layer."""
    for layer in [*model.children()][SECOND]:
        fully_shard(layer)
    return model


def parallelize(
    model: nn.Module, mesh: DeviceMesh | None = None, which: slice = slice(None)
) -> nn.Module:
    """Parallelize the layers ``which`` by columns and by rows in turn."""
    styles = ColwiseParallel(output_layouts=Replicate()), RowwiseParallel(input_layouts=Replicate())
    plan: dict[str, ParallelStyle] = {
        name: styles[i % 2] for i, (name, _) in enumerate([*model.named_children()][which])
    }
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    return parallelize_module(model, mesh, plan)


def shard_parallelized(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    return shard(parallelize(model, mesh["tp"]), mesh=mesh["dp"])


# Other steps, on one process


def closure(trial: Trial) -> None:
    model = trial.model()
    optimizer = trial.optimizer(model)
    if "closure" not in inspect.signature(optimizer.step).parameters:
        raise Failure("not applicable", "step has no argument closure")

    losses: dict[int, list[float]] = {step: [] for step in STEPS}  # of the calls in each step

    def loss() -> Tensor:
        optimizer.zero_grad()
        value: Tensor = model(trial.batch(step))
        value.backward()
        losses[step].append(value.item())
        return value

    def leave_others() -> None:
        optimizer.zero_grad()
        model(trial.batch(step + 1)).backward()

    # The gradients of the closure are recorded. Right before the step, the parameters have the
    # gradients of another batch.
    for step in trial.steps(model, optimizer, loss, stale=leave_others):
        model(trial.batch(step)).backward()
    for (step, called), returned in zip(losses.items(), trial.returned, strict=True):
        if len(called) != 1:
            times = (
                f"calls the closure {len(called)} times" if called else "does not call the closure"
            )
            raise Failure("wrong", f"step(closure) {times}")
        if returned is None:
            raise Failure("wrong", "step(closure) does not return the loss")
        if float(returned) != called[0]:
            expected = f"{float(returned):g}, expected the closure's loss {called[0]:g}"
            raise Failure("wrong", f"step(closure) returns {expected}, in step {step + 1}")


def tied(trial: Trial) -> None:
    """Train one weight of two layers with different inputs."""
    model: Any = trial.model()
    model.twin = copy.deepcopy(model.square)
    model.twin.weight = model.square.weight
    for step in trial.steps(model, trial.optimizer(model)):
        model({**trial.batch(step), "twin": trial.batch(step + 1)["square"]}).backward()


def skipped(trial: Trial) -> None:
    """Let a loss scaler find infinities, and skip a step, before each step."""
    model = trial.model()
    optimizer, scaler = trial.optimizer(model), torch.amp.GradScaler("cpu")
    for step in trial.steps(model, optimizer):
        scaler.scale(math.inf * model(trial.batch(step + 1))).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        for name, p in named_layers(model):
            for key, t in {"the weight": p, **optimizer.state.get(p, {})}.items():
                if isinstance(t, Tensor) and not t.isfinite().all():
                    what = f"makes {key} of {name} infinite or NaN"
                    raise Failure("wrong", f"a step that the loss scaler skips {what}")
        model(trial.batch(step)).backward()


# Checkpoints, by default after the first step


def resumed(trial: Trial, after: int = 1) -> None:
    """Load a state dict, with a changed learning rate, into a new optimizer of a new model."""
    first, model = trial.model(), trial.model()
    saved = trial.optimizer(first)
    for step in trial.steps(first, saved, among=range(after)):
        first(trial.batch(step)).backward()
    multiply_rates(saved, trial.rates[after])
    model.load_state_dict(first.state_dict())
    optimizer = trial.optimizer(model)
    optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
    for step in trial.steps(model, optimizer, among=range(after, trial.length)):
        model(trial.batch(step)).backward()


def checkpointed(
    trial: Trial, wrap: Callable[[nn.Module], nn.Module] = shard, same_samples: bool = False
) -> None:
    """Save a checkpoint, with a changed rate. In the second phase load it on other ranks.

    Args:
        wrap: shards the model, if there are several ranks.
        same_samples: whether all ranks get the same samples, as a model with whole matrices needs.
    """
    model = trial.model()
    share = dist.get_rank(), dist.get_world_size()
    if share[1] > 1:
        wrap(model)
    if same_samples:
        share = 0, 1
    optimizer = trial.optimizer(model)
    is_first = not trial.record.weights
    if not is_first:
        weights, state = get_state_dict(model, optimizer)
        load({"model": weights, "optimizer": state}, checkpoint_id=trial.folder)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    for step in trial.steps(model, optimizer, among=STEPS[:1] if is_first else STEPS[1:]):
        model(trial.batch(step, *share)).backward()
    if is_first:
        multiply_rates(optimizer, trial.rates[1])
        weights, state = get_state_dict(model, optimizer)
        save({"model": weights, "optimizer": state}, checkpoint_id=trial.folder)


# DTensors


def distributed(
    trial: Trial,
    placements: Sequence[Placement] = (Shard(0),),
    which: slice = slice(None),
    on_meshes: bool = False,
    partial_sums: bool = False,
    without: Sequence[int] = (),
    alone: Callable[[nn.Module, torch.optim.Optimizer, int], None] | None = None,
    **options: object,
) -> None:
    """Train weights that are DTensors.

    Their layers cannot compute with DTensors, so a backward pass only accumulates given gradients.

    Args:
        which: the matrices that are DTensors; the others are whole.
        on_meshes: whether the first of these matrices lie on one dimension of the mesh each, in
            turn, and only the last one on all dimensions.
        partial_sums: whether the gradients are partial sums.
        without: the steps in which a matrix has no gradient.
        alone: a change by rank 1 alone, right before a step. The reference steps leave it out.
        options: arguments of the optimizer.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    sizes = (ranks,) if len(placements) == 1 else (2, ranks // 2)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("dp", "tp")[: len(sizes)])
    names = [*trial.shapes][which]
    places = dict.fromkeys(names, (mesh, placements))
    for i, name in enumerate(names[:-1] if on_meshes else ()):
        dim = i % len(placements)
        places[name] = mesh[("dp", "tp")[dim]], [placements[dim]]

    def place(name: str, t: Tensor) -> Tensor:
        return distribute_tensor(t, *places[name], src_data_rank=None) if name in places else t

    model = trial.model()
    for name, layer in model.named_children():
        layer.weight = nn.Parameter(place(name, layer.weight.detach()))  # type: ignore[operator]
    optimizer = trial.optimizer(model, **options)
    if alone and rank == 1:
        optimizer.register_step_pre_hook(lambda *_: alone(model, optimizer, step))
    for step in trial.steps(model, optimizer):
        batch = trial.batch(step, rank, ranks) if partial_sums else trial.batch(step)
        grads = {name: y.T @ x for name, (x, y) in batch.items()}
        placed = [
            DTensor.from_local(g, mesh, [Partial()]) if partial_sums else place(name, g)
            for name, g in grads.items()
        ]
        torch.autograd.backward(list(model.parameters()), placed)
        if step in without:
            lose_gradient(model)


def lose_gradient(model: Any, *_: object) -> None:
    model.square.weight.grad = None


def double_rate(_model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    for group in optimizer.param_groups if step == 0 else ():
        if "lr" in group:
            group["lr"] = group["lr"] * 2


def add_group(model: Any, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Add a group before the second step. Its parameter does not belong to the model."""
    first = optimizer.param_groups[0]
    if step == 1:
        late = copy.deepcopy(model.square.weight)
        late.grad = model.square.weight.grad.clone()
        group = {key: x for key, x in first.items() if key not in ("params", "param_names")}
        optimizer.add_param_group(
            {**group, "params": [("late", late) if "param_names" in first else late]}
        )


class Situation(NamedTuple):
    """A function that trains in a situation.

    Attributes:
        ranks: the number of ranks. A tuple of two numbers means two phases, of which the second
            starts anew.
        setup: arguments of `Trial`.
        orthogonal: whether the situation is only for optimizers that orthogonalize. Other
            optimizers send no messages, and so cannot notice the mistake of another rank.
        one_may_refuse: whether an error on one rank is right, which leaves the other ranks waiting.
        same_bits: whether the updates must have the bits of the optimizer's own step.
    """

    run: Callable[[Trial], None]
    ranks: int | tuple[int, ...] = 1
    setup: Setup = Setup()
    orthogonal: bool = False
    one_may_refuse: bool = False
    same_bits: bool = False


SECOND = slice(1, None, 2)  # every second layer


def some_sharded() -> dict[str, Situation]:
    """Every second matrix sharded, in each placement, on 2 and 3 ranks, with and without a
    group."""
    kinds: dict[str, Callable[..., None]] = {
        "fully_shard": partial(trained, wrap=shard_some, replica=None),
        "Shard(0)": partial(distributed, which=SECOND),
        "Shard(1)": partial(distributed, placements=[Shard(1)], which=SECOND),
        "parallelize_module": partial(
            trained, wrap=partial(parallelize, which=SECOND), replica=None
        ),
        "split layers": partial(
            split_layers, kinds=[None, ColumnParallelLinear, None, RowParallelLinear]
        ),
    }
    return {
        f"{kind}, some matrices{on_ranks}{sharing}": Situation(
            partial(sharing_work, run=run) if sharing else run, ranks
        )
        for kind, run in kinds.items()
        for ranks, on_ranks in ((2, ""), (3, " on 3 ranks"))
        for sharing in ("", ", sharing the work")
    }


sharded = partial(trained, wrap=shard)
on_meshes = partial(
    distributed, placements=[Shard(0), Shard(1)], which=slice(1, None), on_meshes=True
)
SCALED: Setup = {"factor": 1024.0}  # exact in every dtype
BFLOAT16: Setup = {"dtype": torch.bfloat16}
# In the first step, as behind a projection that begins with zeros; in a later one; in all.
ZEROS: Setup = {"zeros": {"square": [0], "wide": [1], "uneven": STEPS}}
NO_NESTEROV: Setup = {"options": {"nesterov": False}}
MIXED, OFFLOAD = MixedPrecisionPolicy(torch.bfloat16, torch.float32), CPUOffloadPolicy(False)
# fully_shard pads 9 rows to 12 and 5 to 8, and an update's norm may depend on the ratio of rows and
# columns.
PADDED: Setup = {"shapes": {"nine": (9, 6), "five": (5, 4)}}
# Two singular values that differ could make rounding look larger than its yardstick.
FEW_ROWS: Setup = {"shapes": {"two": (2, 32), "one": (1, 20)}, "decades": 0.0}
CONVOLUTIONS: Setup = {"shapes": {"square": (16, 3, 2, 2), "uneven": (5, 4, 3, 1)}}
FUSED: Setup = {
    "shapes": {"qkv": (64, 32)},
    "views": {"qkv.weight": lambda w: w.split([32, 16, 16])},
}
RESUMED: Setup = {"rates": (1.0, 0.5, 0.5)}  # the rate is halved before the state is saved
SCHEDULE: Setup = {"rates": (1.0, 0.5, 2.0)}
TWO_GROUPS: Setup = {"groups": True}
# Elements near 1e-8, as large as the usual ε. Such updates move only weights of 0.
TINY: Setup = {"size": 1e-7, "scale": 0.0}
# For what begins later than in the third step: a refresh every n steps, a warm-up, a switch.
LONG: Setup = {"length": 60, "shapes": {"square": (12, 12), "tall": (16, 6), "uneven": (5, 7)}}
TWENTY: Setup = {"length": 20}  # on several ranks sixty take too long
HALFWAY = 31  # no multiple of a number of steps after which something may be refreshed
LONG_RESUMED: Setup = {
    **LONG,
    "rates": (1.0,) * HALFWAY + (0.5,) * (LONG["length"] - HALFWAY),
}
HEADS: Setup = {"shapes": {"qkv": (60, 20)}, "views": {"qkv.weight": lambda w: w.view(12, 5, 20)}}
SITUATIONS = {
    "whole": Situation(trained),
    "polar factor": Situation(trained, setup={"decades": 1.5, "scale": 0.0}, orthogonal=True),
    "scale of gradients": Situation(trained, setup=SCALED, orthogonal=True),
    "scale of gradients, bfloat16 without Nesterov": Situation(
        trained, setup=SCALED | BFLOAT16 | NO_NESTEROV, orthogonal=True
    ),
    "accumulation": Situation(partial(trained, micro_batches=3)),
    "closure": Situation(closure),
    "tied weights": Situation(tied),
    "torch.compile": Situation(partial(trained, wrap=partial(torch.compile, backend="eager"))),
    "state dict": Situation(resumed, setup=RESUMED, same_bits=True),
    "state dict, bfloat16": Situation(resumed, setup=RESUMED | BFLOAT16, same_bits=True),
    "sixty steps": Situation(trained, setup=LONG),
    "sixty steps, resumed": Situation(
        partial(resumed, after=HALFWAY), setup=LONG_RESUMED, same_bits=True
    ),
    "learning rate schedule": Situation(trained, setup=SCHEDULE),
    "two groups": Situation(trained, setup=TWO_GROUPS),
    "no gradient in a step": Situation(partial(trained, without=[1])),
    "zero gradients": Situation(trained, setup=ZEROS),
    "skipped step": Situation(skipped),
    "tiny gradients": Situation(trained, setup=TINY),
    "version counters": Situation(trained, setup={"versions": True}),
    "fused query, key and value": Situation(trained, setup=FUSED),
    "DDP": Situation(partial(trained, wrap=DistributedDataParallel), 2),
    "DDP, sharing the work": Situation(
        partial(sharing_work, run=partial(trained, wrap=DistributedDataParallel)), 2
    ),
    "fully_shard on 2 ranks": Situation(sharded, 2),
    "fully_shard on 3 ranks": Situation(sharded, 3),
    "fully_shard, fewer rows than ranks": Situation(sharded, 3, FEW_ROWS),
    "fully_shard, padded rows": Situation(sharded, 4, PADDED),
    "fully_shard, mixed precision": Situation(
        partial(trained, wrap=partial(shard, mp_policy=MIXED)), 2
    ),
    "fully_shard, CPU offload": Situation(
        partial(trained, wrap=partial(shard, offload_policy=OFFLOAD)), 2
    ),
    "fully_shard, bfloat16": Situation(sharded, 2, BFLOAT16),
    "fully_shard, without Nesterov": Situation(sharded, 2, NO_NESTEROV),
    "fully_shard, convolutions": Situation(sharded, 2, CONVOLUTIONS),
    "fully_shard, heads": Situation(sharded, 2, HEADS),
    "fully_shard, accumulation": Situation(partial(sharded, micro_batches=3), 2),
    "fully_shard, two groups and a schedule": Situation(sharded, 2, TWO_GROUPS | SCHEDULE),
    "fully_shard, twenty steps": Situation(sharded, 2, LONG | TWENTY),
    "fully_shard after the optimizer": Situation(
        partial(sharded, optimizer_first=True), 2, orthogonal=True
    ),
    "Shard(0)": Situation(distributed, 2, {"versions": True}),
    "Shard(0) on 3 ranks": Situation(distributed, 3),
    "Shard(1)": Situation(partial(distributed, placements=[Shard(1)]), 2),
    "Replicate": Situation(partial(distributed, placements=[Replicate()]), 2),
    "Shard(0), Shard(0)": Situation(partial(distributed, placements=[Shard(0), Shard(0)]), 4),
    "Shard(0), Shard(1)": Situation(partial(distributed, placements=[Shard(0), Shard(1)]), 4),
    "Replicate, Shard(1)": Situation(partial(distributed, placements=[Replicate(), Shard(1)]), 4),
    "Shard(0), partial gradients": Situation(partial(distributed, partial_sums=True), 2),
    "Shard(0), no gradient in a step": Situation(partial(distributed, without=[1]), 2),
    "Shard(0), zero gradients": Situation(distributed, 2, ZEROS),
    "Shard(0), no gradient on one rank": Situation(
        partial(distributed, alone=lose_gradient), 2, orthogonal=True
    ),
    "Replicate, no gradient on one rank": Situation(
        partial(distributed, placements=[Replicate()], alone=lose_gradient), 2, orthogonal=True
    ),
    "Shard(0), two learning rates": Situation(
        partial(distributed, alone=double_rate), 2, orthogonal=True
    ),
    "Shard(0), a group on one rank": Situation(
        partial(distributed, alone=add_group), 2, orthogonal=True, one_may_refuse=True
    ),
    "ColumnParallelLinear": Situation(partial(split_layers, kinds=[ColumnParallelLinear]), 2),
    "RowParallelLinear": Situation(partial(split_layers, kinds=[RowParallelLinear]), 2),
    "parallelize_module": Situation(partial(trained, wrap=parallelize, replica=2), 2),
    "fully_shard over parallelize_module": Situation(
        partial(trained, wrap=shard_parallelized, replica=2), 4
    ),
    **some_sharded(),
    "some matrices on each of several meshes": Situation(on_meshes, 4),
    "some matrices on each of several meshes, sharing the work": Situation(
        partial(sharing_work, run=on_meshes), 4
    ),
    "pipeline stages": Situation(pipeline, 2),
    "DCP, 2 ranks onto 3": Situation(checkpointed, (2, 3), RESUMED),
    "DCP, 2 ranks onto 1": Situation(checkpointed, (2, 1), RESUMED),
    "DCP, some matrices, 2 ranks onto 3": Situation(
        partial(checkpointed, wrap=shard_some, same_samples=True), (2, 3), RESUMED
    ),
}
"""The situations that `check_optimizer` tries, by name."""
