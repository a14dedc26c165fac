# SPDX-License-Identifier: MIT
"""Pipeline parallelism: every rank holds consecutive layers.

    torchrun --nproc_per_node=2 examples/train_pipeline.py --draw

The batch is cut into micro-batches. While the second stage works on the first micro-batch, the first stage
works on the second one. Backward passes flow the other way. With p stages and m micro-batches each rank is
idle for a share (p − 1)/(m + p − 1) of a step, shown as dots:

    rank 0   F0 F1 F2 F3 ·  ·  B0 B1 B2 B3
    rank 1   ·  F0 F1 F2 F3 B0 B1 B2 B3 ·        gpipe: all forward passes, then all backward passes

    rank 0   F0 F1 ·  B0 F2 B1 F3 B2 ·  B3
    rank 1   ·  F0 B0 F1 B1 F2 B2 F3 B3 ·        1f1b: each backward pass as soon as possible

Both take the same time. 1f1b keeps the activations of at most p micro-batches, gpipe those of m. Only
neighbours communicate, twice for each micro-batch i:

    after F_i   rank r sends its outputs to rank r + 1, which needs them for F_i
    after B_i   rank r sends the gradient of its inputs to rank r − 1, which needs it for B_i

Both messages have the shape (rows of the micro-batch, width of the layer between the stages). The schedules
are `torchpar.reference.gpipe` and `one_forward_one_backward`, loops over these passes and messages. The
gradients equal, bit for bit, those of one process that adds up the gradients of the micro-batches.

``--draw`` prints the timeline as it was measured. With ``--library`` the same training is run by
torch.distributed.pipelining, which takes micro-batches of equal size: it pads the last ones.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from support import cli, session
from support.timeline import Timeline
from torch import Tensor
from torch.nn.functional import cross_entropy

from torchpar import training
from torchpar.errors import ConfigError
from torchpar.nn import MLP
from torchpar.parallel import World, join_world
from torchpar.parallel.split.pipeline import Pipeline, PipelineSchedule, check_one_rank_per_gpu, stage_mlp
from torchpar.profile.phases import timed
from torchpar.reference import P2PCommunicator, gpipe, one_forward_one_backward
from torchpar.training import Run

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(kw_only=True)
class Flags(cli.TrainFlags):
    """Train a digit classifier by pipeline parallelism."""

    pipeline: PipelineSchedule = "1f1b"  # Order of the forward and backward passes.
    micro_batches: int = 4  # Parts into which a batch is cut.
    draw: bool = False  # Print the measured timeline of a step, a line per rank; for ranks of one machine.
    library: bool = False  # Run the schedule of torch.distributed.pipelining.


class PlainPipeline:
    """A rank's stage, run by the schedules of the reference; with the methods of the library's `Pipeline`."""

    def __init__(self, stage: MLP, world: World, flags: Flags, timeline: Timeline | None):
        check_one_rank_per_gpu(world)
        self.stage, self.micro_batches, self.timeline = stage, flags.micro_batches, timeline
        # Phase "pipeline": messages, and the time in which this rank waits for them.
        self.run = timed("pipeline")(gpipe if flags.pipeline == "gpipe" else one_forward_one_backward)
        self.p2p = P2PCommunicator(world.mesh.get_group("pp"), world.device)
        self.width = next(stage.parameters()).shape[1]  # of the activations that the previous stage sends

    def step(self, x: Tensor, labels: Tensor, global_size: int, loss_sum: Loss) -> Tensor:
        # Every rank has the batch. Only the first stage reads x, and only the last one labels.
        parts, targets = x.tensor_split(self.micro_batches), labels.tensor_split(self.micro_batches)
        losses = []

        @timed("forward")
        def forward(i: int, activations: Tensor | None) -> Tensor:
            outputs: Tensor = self.stage(parts[i] if activations is None else activations)
            if not self.p2p.is_last:
                return outputs  # which the schedule sends to the next stage
            loss = loss_sum(outputs, targets[i])
            losses.append(loss.detach())
            return loss / global_size

        def backward(outputs: Tensor, gradient: Tensor | None) -> None:
            # Adds this micro-batch's part to the gradients of the parameters. The schedule sends the gradient
            # of the activations to the previous stage.
            outputs.backward(gradient)

        passes = self.timeline.step(forward, backward) if self.timeline else (forward, backward)
        # For each micro-batch: receive the input, forward, send the output; receive the gradient of the
        # output, backward, send the gradient of the input. No two ranks have the same layer, so that there
        # is nothing to average.
        self.run(*passes, [(len(part), self.width) for part in parts], self.p2p)
        return torch.stack(losses).sum() if losses else x.new_zeros(())

    def predict(self, x: Tensor) -> Tensor | None:
        activations = self.p2p.recv_forward((len(x), self.width))
        outputs: Tensor = self.stage(x if activations is None else activations)
        self.p2p.send_forward(outputs)
        return outputs if self.p2p.is_last else None


def main(flags: Flags) -> None:
    with join_world(flags.device, flags.timeout) as world:
        world = world.with_mesh(pp=world.world_size)
        if flags.draw and flags.library:
            raise ConfigError("--draw records the schedules by hand; leave out --library")
        train, test = session.load(flags, world)
        timeline = Timeline(world) if flags.draw else None
        torch.manual_seed(flags.seed)
        # Every rank draws all weights, the same on all, and keeps the layers of its stage.
        stage = stage_mlp(MLP(flags.layer_sizes(train)).to(world.device), world.mesh["pp"])
        if flags.compile:
            stage.compile()
        pipeline: Pipeline | PlainPipeline
        if flags.library:
            pipeline = Pipeline(stage, world, flags.pipeline, flags.micro_batches)
        else:
            pipeline = PlainPipeline(stage, world, flags, timeline)
        loss_sum = partial(cross_entropy, reduction="sum")
        optimizer = session.make_optimizer(flags, stage)
        lr_scheduler = training.lr_scheduler(optimizer, flags.schedule, flags.total_steps(train))

        parts = (stage, optimizer, lr_scheduler, world, train, test)
        log = session.Log(flags, world)
        with Run(*parts, predict=pipeline.predict, log=log, **flags.run_options()) as run:
            for epoch in run.epochs():
                for x, labels, global_size in run.batches(epoch):
                    loss = pipeline.step(x, labels, global_size, loss_sum)  # of all micro-batches
                    session.adjust_gradients(flags, stage, world)  # --clip and --orthogonality
                    optimizer.step()
                    lr_scheduler.step()
                    optimizer.zero_grad()
                    run.log(loss)
            if timeline:
                timeline.print()


if __name__ == "__main__":
    cli.main(main, Flags)
