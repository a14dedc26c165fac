# SPDX-License-Identifier: MIT
"""Pipeline parallelism: every rank holds consecutive layers.

    torchrun --nproc_per_node=2 examples/train_pipeline.py --draw

The batch is cut into micro-batches. While the second stage works on the first micro-batch, the
first stage works on the second one. Backward passes flow the other way. With p stages and m
micro-batches each rank is idle for a share (p − 1)/(m + p − 1) of a step, shown as dots:

    rank 0   F0 F1 F2 F3 ·  ·  B0 B1 B2 B3
    rank 1   ·  F0 F1 F2 F3 B0 B1 B2 B3 ·        gpipe: all forward passes, then all backward passes

    rank 0   F0 F1 ·  B0 F2 B1 F3 B2 ·  B3
    rank 1   ·  F0 B0 F1 B1 F2 B2 F3 B3 ·        1f1b: each backward pass as soon as possible

Both take the same time. 1f1b keeps the activations of at most p micro-batches, gpipe those of m.
Only neighbours communicate, twice for each micro-batch i:

    after F_i   rank r sends its outputs to rank r + 1, which needs them for F_i
    after B_i   rank r sends the gradient of its inputs to rank r − 1, which needs it for B_i

Both messages have the shape (rows of the micro-batch, width of the layer between the stages). The
schedules are `torchpar.reference.gpipe` and `one_forward_one_backward`, loops over these passes and
messages. The gradients equal, bit for bit, those of one process that adds up the gradients of the
micro-batches.

``--draw`` prints the timeline as it was measured.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from support import cli, learning_rate, lesson

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.profiler import record_function

from torchpar.nn import MLP
from torchpar.parallel import World, join_world
from torchpar.parallel.split.pipeline import PipelineSchedule, check_one_rank_per_gpu, stage_mlp
from torchpar.parallel.split.schedules import P2PCommunicator, gpipe, one_forward_one_backward
from torchpar.training import Classification, Run

Gradients = Callable[[Tensor, Tensor, int], Tensor]
Predict = Callable[[Tensor], Tensor | None]


@dataclass(kw_only=True)
class Flags(lesson.TrainFlags):
    """Train a digit classifier by pipeline parallelism."""

    # Order of the forward and backward passes.
    pipeline: Annotated[PipelineSchedule, cli.Free()] = "1f1b"
    micro_batches: cli.MicroBatches = 4  # Parts into which a batch is cut.
    # Print the measured timeline of a step, a line per rank; for ranks of one machine.
    draw: cli.Switch = False


def by_hand(flags: Flags, world: World, stage: MLP) -> tuple[Gradients, Predict]:
    """Return the functions that compute the gradients of a batch, and the outputs of a batch."""
    check_one_rank_per_gpu(world)
    schedule = gpipe if flags.pipeline == "gpipe" else one_forward_one_backward
    p2p = P2PCommunicator(world.mesh.get_group("pp"), world.device)
    width = next(stage.parameters()).shape[1]  # of the activations that the previous stage sends

    def gradients(x: Tensor, labels: Tensor, global_size: int) -> Tensor:
        # Every rank has the batch. Only the first stage reads x, and only the last one labels.
        parts, targets = (
            x.tensor_split(flags.micro_batches),
            labels.tensor_split(flags.micro_batches),
        )
        losses = []

        @record_function("forward")  # its name in a trace, and a phase of a step
        def forward(i: int, activations: Tensor | None) -> Tensor:
            outputs: Tensor = stage(parts[i] if activations is None else activations)
            if not p2p.is_last:
                return outputs  # which the schedule sends to the next stage
            loss = cross_entropy(outputs, targets[i], reduction="sum")
            losses.append(loss.detach())
            return loss / global_size

        def backward(outputs: Tensor, gradient: Tensor | None) -> None:
            # Adds this micro-batch's part to the gradients of the parameters. The schedule sends
            # the gradient of the activations to the previous stage.
            outputs.backward(gradient)

        # For each micro-batch: receive the input, forward, send the output; receive the gradient of
        # the output, backward, send the gradient of the input. No two ranks have the same layer, so
        # that there is nothing to average.
        shapes = [(len(part), width) for part in parts]
        with record_function("pipeline"):  # messages, and the time in which this rank waits
            schedule(forward, backward, shapes, p2p)
        return torch.stack(losses).sum() if losses else x.new_zeros(())

    def predict(x: Tensor) -> Tensor | None:
        activations = p2p.recv_forward((len(x), width))
        outputs: Tensor = stage(x if activations is None else activations)
        p2p.send_forward(outputs)
        p2p.flush()
        return outputs if p2p.is_last else None

    return gradients, predict


def main(flags: Flags) -> None:
    with join_world(flags.device, flags.timeout, gloo_yields=True) as world:
        world = world.with_mesh(pp=world.world_size)
        train, test = flags.load(world)
        torch.manual_seed(flags.seed)
        # Every rank draws all weights, the same on all, and keeps the layers of its stage.
        stage = stage_mlp(MLP(flags.layer_sizes(train)).to(world.device), world.mesh["pp"])
        if flags.compile:
            stage.compile()
        gradients, predict = by_hand(flags, world, stage)
        optimizer = flags.make_optimizer(stage)
        lr_scheduler = learning_rate.lr_scheduler(
            optimizer, flags.schedule, flags.total_steps(train)
        )

        task = Classification(train, test, flags.batch_size, predict=predict, seed=flags.seed)
        run = Run(
            model=stage,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            world=world,
            task=task,
            epochs=flags.epochs,
            checkpoint=flags.saving(),
            config=flags.config(),
        )
        with run, lesson.Log(flags, run, flags.draw) as log:
            run.resume()
            log.resumed()
            for epoch in run.epochs():
                for x, labels, global_size in run.batches(epoch):
                    loss = gradients(x, labels, global_size)  # of all micro-batches
                    flags.adjust_gradients(stage, world)  # --clip and --orthogonality
                    optimizer.step()
                    lr_scheduler.step()
                    optimizer.zero_grad()
                    run.end_step(loss_sum=loss)
                    log.step()
                log.epoch(run.end_epoch())


if __name__ == "__main__":
    cli.main(main, Flags)
