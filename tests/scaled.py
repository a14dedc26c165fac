# SPDX-License-Identifier: MIT
"""A divided MLP that trains with loss scaling, and whose gradients overflow on single ranks."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW

from torchpar.nn import MLP
from torchpar.optim import Muon
from torchpar.parallel import GradScaler, Pipeline, World, join_world, parallel_mlp, stage_mlp
from torchpar.parallel.split import scaler as scaler_module

# By name, of a model and the mesh of the ranks that have it or shards of its layers.
OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda model, replicas: SGD(model.parameters(), lr=0.1, momentum=0.9),
    "adamw": lambda model, replicas: AdamW(model.parameters(), lr=0.01),
    "fused": lambda model, replicas: AdamW(model.parameters(), lr=0.01, fused=True),
    "muon": lambda model, replicas: Muon.for_model(
        model, lr=0.02, others=partial(AdamW, lr=0.01), process_group=replicas
    ),
}
SIZES = (12, 34, 18, 6, 6, 6, 3)
BATCH = 8
OPTIONS = {"init_scale": 1024.0, "growth_interval": 2}


class Step(NamedTuple):
    """Whether a step has changed the weights, the scale after it, and the loss if a rank has it."""

    changed: bool
    scale: float
    loss: float | None


def split(world: World, sizes: Sequence[int], seed: int) -> tuple[torch.nn.Module, Pipeline | None]:
    torch.manual_seed(seed)
    model = MLP(list(sizes))
    if world.mesh["tp"].size() > 1:
        model = parallel_mlp(model, world.mesh["tp"])
    if world.mesh["pp"].size() == 1:
        return model, None
    stage = stage_mlp(model, world.mesh["pp"])
    return stage, Pipeline(stage, world, micro_batches=2)


def train_scaled(
    mesh: Mapping[str, int],
    name: str,
    overflows: Mapping[int, int],
    kind: Literal["ours", "plain", "alone"] = "ours",
    clips: bool = False,
    sizes: Sequence[int] = SIZES,
    steps: int = 5,
    seed: int = 0,
) -> list[Step]:
    """Train on this rank, by a scaler that shares what it finds, PyTorch's, or one that does not.

    Args:
        overflows: by step, the rank whose first gradient then holds an infinity.
        clips: call `unscale_` before the step, as clipping needs it.
    """
    with join_world("cpu", timeout=20) as alone:
        world = alone.with_mesh(**mesh)
        model, pipeline = split(world, sizes, seed)
        optimizer = OPTIMIZERS[name](model, world.mesh["dp", "tp"])
        scaler: Any = GradScaler(world, **OPTIONS)
        if kind == "plain":
            scaler = torch.amp.GradScaler("cpu", **OPTIONS)
        shares_nothing = patch.object(scaler_module.dist, "all_reduce", lambda *_: None)
        generator = torch.Generator().manual_seed(seed)
        log = []
        for step in range(steps):
            x = torch.randn(BATCH, sizes[0], generator=generator)
            labels = torch.randint(sizes[-1], (BATCH,), generator=generator)
            optimizer.zero_grad()
            if pipeline is None:
                loss = cross_entropy(model(x), labels)
                scaler.scale(loss).backward()
            else:

                def loss_sum(y: Tensor, t: Tensor) -> Tensor:
                    return scaler.scale(cross_entropy(y, t, reduction="sum"))

                loss = pipeline.step(x, labels, BATCH, loss_sum) / BATCH / scaler.get_scale()
            if overflows.get(step) == world.rank:
                next(model.parameters()).grad[0, 0] = torch.inf
            before = copy.deepcopy(model.state_dict())
            with shares_nothing if kind == "alone" else nullcontext():
                if clips:
                    scaler.unscale_(optimizer)
                scaler.step(optimizer)
            scaler.update()
            after = model.state_dict()
            changed = {not torch.equal(t, before[key]) for key, t in after.items()}
            assert len(changed) == 1, step  # all of them, or none
            shown = loss.item() if world.owns_outputs else None
            log.append(Step(changed.pop(), scaler.get_scale(), shown))
        return log
