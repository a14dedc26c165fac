# SPDX-License-Identifier: MIT
"""Data, tensor and pipeline parallelism at once: dp × tp × pp ranks form a mesh.

    torchrun --nproc_per_node=4 examples/train_parallel.py --dp 2 --tp 2

Tensor parallelism splits each layer. Pipeline parallelism cuts the layers into stages. Data
parallelism copies the result dp times. So each rank holds one slice of one stage of one replica.
Each message stays within one mesh dimension: sums of activations in tp, activations and their
gradients between stages in pp, gradients of parameters in dp.

With --memory a table shows the bytes of each rank. Data parallelism divides activations alone,
because each rank has the whole model. Tensor and pipeline parallelism divide weights, gradients and
the optimizer's state.
"""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from support import cli, learning_rate, lesson

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from torchpar.nn import MLP
from torchpar.parallel import join_world, parallel_mlp, register_shared_memory_hook
from torchpar.parallel.split.pipeline import Pipeline, PipelineSchedule, stage_mlp
from torchpar.training import Classification, Run


@dataclass(kw_only=True)
class Flags(lesson.TrainFlags):
    """Train a digit classifier on a mesh of ranks."""

    # Ranks that share each batch; by default all that --tp and --pp leave.
    dp: cli.Ranks | None = None
    tp: cli.Ranks = 1  # Ranks that share each layer.
    pp: cli.Ranks = 1  # Stages of a pipeline.
    # Order of a pipeline's forward and backward passes.
    pipeline: Annotated[PipelineSchedule, cli.Free()] = "1f1b"
    # Parts into which a pipeline cuts a replica's share of a batch.
    micro_batches: cli.MicroBatches = 4


def main(flags: Flags) -> None:
    with join_world(flags.device, flags.timeout, gloo_yields=True) as world:
        dp = flags.dp or max(world.world_size // (flags.tp * flags.pp), 1)
        world = world.with_mesh(dp=dp, tp=flags.tp, pp=flags.pp)
        train, test = flags.load(world)
        torch.manual_seed(flags.seed)
        # This rank's slice of its stage: the tp dimension splits each layer, the pp dimension the
        # layers.
        whole = MLP(flags.layer_sizes(train)).to(world.device)
        model = stage_mlp(parallel_mlp(whole, world.mesh["tp"]), world.mesh["pp"])
        loss_sum = partial(cross_entropy, reduction="sum")
        if flags.compile:
            model.compile()
        replica: torch.nn.Module = model
        pipeline = None
        if flags.pp > 1:
            pipeline = Pipeline(model, world, flags.pipeline, flags.micro_batches)
        elif world.dp_size > 1:
            group = world.mesh["dp"].get_group()
            replica = ddp = DistributedDataParallel(
                model, process_group=group, gradient_as_bucket_view=True
            )
            register_shared_memory_hook(ddp, world)  # on CPUs
        # Ranks of one stage share the work of Muon.
        optimizer = flags.make_optimizer(model, world.mesh["dp", "tp"])
        lr_scheduler = learning_rate.lr_scheduler(
            optimizer, flags.schedule, flags.total_steps(train)
        )

        def gradients(x: Tensor, labels: Tensor, global_size: int) -> Tensor:
            if pipeline is not None:
                # Forward and backward passes of all micro-batches, and the average over the
                # replicas.
                return pipeline.step(x, labels, global_size, loss_sum)
            loss = loss_sum(replica(x), labels)
            (loss * (world.dp_size / global_size)).backward()
            return loss.detach()

        predict = pipeline.predict if pipeline else model
        task = Classification(train, test, flags.batch_size, predict=predict, seed=flags.seed)
        run = Run(
            model=model,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            world=world,
            task=task,
            epochs=flags.epochs,
            checkpoint=flags.saving(),
            config=flags.config(),
        )
        with run, lesson.Log(flags, run) as log:
            run.resume()
            log.resumed()
            for epoch in run.epochs():
                for x, labels, global_size in run.batches(epoch):
                    loss = gradients(x, labels, global_size)
                    flags.adjust_gradients(model, world)  # --clip, --orthogonality
                    optimizer.step()
                    lr_scheduler.step()
                    optimizer.zero_grad()
                    run.end_step(loss_sum=loss)
                    log.step()
                log.epoch(run.end_epoch())


if __name__ == "__main__":
    cli.main(main, Flags)
