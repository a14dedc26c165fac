# SPDX-License-Identifier: MIT
"""Data parallelism: every rank holds the whole model and takes a share of each batch.

    torchrun --nproc_per_node=2 examples/train_ddp.py

The ranks start from the same weights, because each draws them from the same seed. In every step a rank
computes the gradient of its own samples; DistributedDataParallel averages the gradients over the ranks
while the backward pass is still running; and so all of them take the same step. Two ranks compute what
one would, in about half the time once the work of a step outweighs the exchange of gradients.

Without torchrun, ``python examples/train_ddp.py``, there is one process and nothing to exchange.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from torchpar import cli, data, report, training
from torchpar.nn import MLP
from torchpar.parallel.world import World, join_world
from torchpar.phases import Phases


@dataclass(kw_only=True)
class Flags(cli.TrainFlags):
    """Train a digit classifier by data parallelism."""

    data: Path = Path(__file__).parent / "data"
    """Folder of the data sets, as torchvision's root."""


def main(flags: Flags) -> None:
    with join_world(flags.device) as world:
        train(flags, world)


def train(flags: Flags, world: World) -> None:
    train_set, test_set = data.load(flags.dataset, flags.data, world)
    if flags.dry_run:
        train_set, flags.epochs = train_set[: 10 * flags.batch_size], 1
        flags.metrics = flags.plots = flags.checkpoint = None
    report.prepare_outputs(world, folders=[flags.plots, flags.checkpoint], files=[flags.metrics])

    # The same seed everywhere: the ranks start from the same weights.
    torch.manual_seed(flags.seed)
    model = MLP([train_set.inputs(slice(0, 1)).shape[1], *flags.hidden, len(train_set.classes)])
    model.to(world.device)
    optimizer = training.sgd(model, flags.lr, flags.momentum, flags.weight_decay)

    # The wrapper's forward computes what the model's does; its backward averages the gradients.
    phases = Phases(world.device) if flags.phases else None
    forward: torch.nn.Module = model
    if world.world_size > 1:
        forward = ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
        if phases:
            phases.watch(ddp)
    if flags.compile:
        forward.compile()

    with report.reporting(world, flags.epochs, len(train_set), flags.metrics) as shown:
        results = training.fit(
            model,
            optimizer,
            train_set,
            test_set,
            world,
            forward=forward,
            epochs=flags.epochs,
            batch_size=flags.batch_size,
            schedule=flags.schedule,
            orthogonality=flags.orthogonality,
            seed=flags.seed,
            checkpoint_folder=flags.checkpoint,
            run=flags.identity(),
            phases=phases,
            on_step=shown.step,
            on_epoch=shown.epoch,
        )

    if flags.plots:
        _, confusion = training.evaluate(model, test_set, world, "cross-entropy")
        if world.rank == 0:
            from torchpar import plots

            plots.save(flags.plots, results, confusion, model, test_set)
    if world.rank == 0:
        if phases:
            report.print_phases(phases)
        print(report.summary(results))


if __name__ == "__main__":
    cli.main(main, Flags)
