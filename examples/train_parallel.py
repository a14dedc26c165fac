# SPDX-License-Identifier: MIT
"""Data, tensor and pipeline parallelism at once: dp × tp × pp ranks form a mesh.

    torchrun --nproc_per_node=4 examples/train_parallel.py --dp 2 --tp 2

Tensor parallelism splits each layer. Pipeline parallelism cuts the layers into stages. Data parallelism
copies the result dp times. So each rank holds one slice of one stage of one replica. Each message stays
within one mesh dimension: sums of activations in tp, activations and their gradients between stages in pp,
gradients of parameters in dp.

With ``--arithmetic exact`` a run has the same bits on every mesh and processor.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from support import cli, session
from support.log import Log
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from torchpar import exact, training
from torchpar.errors import ConfigError
from torchpar.nn import MLP
from torchpar.ops import exact_matmul_t
from torchpar.parallel import join_world, parallel_mlp, register_shared_memory_hook
from torchpar.parallel.split.pipeline import Pipeline, PipelineSchedule, stage_mlp
from torchpar.training import Run


@dataclass(kw_only=True)
class Flags(cli.TrainFlags):
    """Train a digit classifier on a mesh of ranks."""

    optimizer: Literal["sgd", "muon"] = "sgd"
    dp: int | None = None
    """Ranks that share each batch; by default all that --tp and --pp leave."""
    tp: int = 1
    """Ranks that share each layer."""
    pp: int = 1
    """Stages of a pipeline."""
    pipeline: PipelineSchedule = "1f1b"
    """Order of a pipeline's forward and backward passes."""
    micro_batches: int = 4
    """Parts into which a pipeline cuts a replica's share of a batch."""
    arithmetic: Literal["fast", "exact"] = "fast"
    """Arithmetic: fast, or exact sums, which have the same bits on every mesh and processor."""


def make_optimizer(flags: Flags, model: MLP, mesh: DeviceMesh) -> Optimizer:
    if flags.optimizer == "sgd":
        options = flags.optimizer_options(lr=0.5, momentum=0.9, weight_decay=3e-5)
        kind = exact.ExactSGD if flags.arithmetic == "exact" else None
        return training.sgd(model, **options, kind=kind)
    # Ranks of one stage share the work of Muon.
    options = flags.optimizer_options(lr=0.02, momentum=0.95, weight_decay=0.01)
    return training.muon(model, **options, mesh=mesh)


def check_exact(flags: Flags) -> None:
    if flags.optimizer == "muon":
        raise ConfigError(
            "Muon has no exact arithmetic, which would take several times a step; take --optimizer sgd"
        )
    if flags.schedule == "cosine":
        raise ConfigError("a cosine differs between processors; take --schedule linear, or --arithmetic fast")
    if flags.compile:
        raise ConfigError(
            "a compiler may fuse products and sums, which exact arithmetic forbids; drop --compile"
        )


def main(flags: Flags) -> None:
    with join_world(flags.device, flags.timeout) as world:
        dp = flags.dp or max(world.world_size // (flags.tp * flags.pp), 1)
        world = world.with_mesh(dp=dp, tp=flags.tp, pp=flags.pp)
        if flags.arithmetic == "exact":
            check_exact(flags)
        train, test = session.load(flags, world)
        torch.manual_seed(flags.seed)
        # This rank's slice of its stage: the tp dimension splits each layer, the pp dimension the layers.
        whole = MLP(flags.layer_sizes(train)).to(world.device)
        is_exact = flags.arithmetic == "exact"
        split = exact.parallel_mlp if is_exact else parallel_mlp
        model = stage_mlp(split(whole, world.mesh["tp"]), world.mesh["pp"])
        # Exact arithmetic adds integers over ranks, whose sums depend on no order.
        add_gradients = exact.ExactGradients(model, world) if is_exact else None
        loss_sum = exact.cross_entropy_sum if is_exact else partial(cross_entropy, reduction="sum")
        if flags.compile:
            model.compile()
        replica: torch.nn.Module = model
        pipeline = None
        if flags.pp > 1:
            pipeline = Pipeline(model, world, flags.pipeline, flags.micro_batches, add_gradients)
        elif world.dp_size > 1 and not is_exact:
            group = world.mesh["dp"].get_group()
            replica = ddp = DistributedDataParallel(model, process_group=group, gradient_as_bucket_view=True)
            register_shared_memory_hook(ddp, world)  # on CPUs
        optimizer = make_optimizer(flags, model, world.mesh["dp", "tp"])
        lr_scheduler = training.lr_scheduler(optimizer, flags.schedule, flags.total_steps(train))

        def gradients(x: Tensor, labels: Tensor, global_size: int) -> Tensor:
            if pipeline is not None:
                # Forward and backward passes of all micro-batches, and the average over the replicas.
                return pipeline.step(x, labels, global_size, loss_sum)
            loss = loss_sum(replica(x), labels)
            if add_gradients:
                (loss / global_size).backward()
                add_gradients()  # over the replicas
            else:
                (loss * (world.dp_size / global_size)).backward()
            return loss.detach()

        adjust_gradients = session.adjust_gradients
        if is_exact:
            adjust_gradients = partial(
                session.adjust_gradients, clip=exact.clip_grad_norm_, gram=exact_matmul_t
            )
        parts = (model, optimizer, lr_scheduler, world, train, test)
        predict = pipeline.predict if pipeline else model
        with Run(*parts, predict=predict, log=Log(flags, world), **flags.run_options()) as run:
            for epoch in run.epochs():
                for x, labels, global_size in run.batches(epoch):
                    loss = gradients(x, labels, global_size)
                    adjust_gradients(flags, model, world)  # --clip, --orthogonality
                    optimizer.step()
                    lr_scheduler.step()
                    optimizer.zero_grad()
                    run.log(loss)


if __name__ == "__main__":
    cli.main(main, Flags)
