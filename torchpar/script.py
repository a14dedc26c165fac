# SPDX-License-Identifier: MIT
"""What the training examples share: everything but how the model is spread over ranks."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from torchpar import cli, data, report, training
from torchpar.collectives import WatchedStep
from torchpar.nn import MLP
from torchpar.parallel import cost
from torchpar.parallel.step import Step
from torchpar.parallel.world import World
from torchpar.phases import Phases


@dataclass(frozen=True)
class Spread:
    """How an example trains.

    Attributes:
        model: this rank's part of the model.
        step: how it comes to its gradients.
        micro_batches: of each rank's share of a batch, in a pipeline.
    """

    model: torch.nn.Module
    step: Step
    micro_batches: int = 1


def train(flags: cli.TrainFlags, world: World, spread: Callable[[MLP], Spread]) -> None:
    """Train a digit classifier as ``flags`` say, and print what became of it.

    Args:
        spread: makes this rank's part of the whole model, which is the same on every rank.
    """
    world.check_alike("the ranks' flags", flags.of_all_ranks())
    train_set, test_set = data.load(flags.dataset, flags.data, world)
    if flags.dry_run:
        train_set, flags.epochs = train_set[: 10 * flags.batch_size], 1
        flags.metrics = flags.plots = flags.checkpoint = None
    report.prepare_outputs(world, folders=[flags.plots, flags.checkpoint], files=[flags.metrics])

    # The same seed everywhere: the ranks draw the same weights.
    torch.manual_seed(flags.seed)
    mlp = MLP([train_set.inputs(slice(0, 1)).shape[1], *flags.hidden, len(train_set.classes)])
    own = spread(mlp.to(world.device))
    model, step = own.model, own.step
    make = training.muon if flags.optimizer == "muon" else training.sgd
    optimizer = make(model, **{name: getattr(flags, name) for name in cli.RATES[flags.optimizer]})
    phases = Phases(world.device) if flags.phases else None
    watched = None
    if flags.phases or flags.collectives:
        step = watched = WatchedStep(step, world)

    saving = None
    if flags.checkpoint:
        saving = training.Saving(flags.checkpoint, flags.save_every, flags.keep, flags.async_save)
    with report.reporting(world, flags.epochs, len(train_set), flags.metrics) as shown:
        results = training.fit(
            model,
            optimizer,
            train_set,
            test_set,
            world,
            step=step,
            epochs=flags.epochs,
            batch_size=flags.batch_size,
            schedule=flags.schedule,
            orthogonality=flags.orthogonality,
            clip=flags.clip,
            seed=flags.seed,
            saving=saving,
            run=flags.identity(),
            phases=phases,
            on_step=shown.step,
            on_epoch=shown.epoch,
        )

    if flags.plots:
        _, outputs = training.evaluate(step, test_set, world, "cross-entropy")
        if world.rank == 0:
            from torchpar import plots

            plots.save(flags.plots, results, outputs, test_set)
    if watched and flags.collectives:
        link = cost.measure_link(world) if world.world_size > 1 else None
        expected = cost.collectives(
            mlp.sizes,
            flags.batch_size,
            world.mesh,
            world.world_size,
            reduction=world.reduction,
            micro_batches=own.micro_batches,
        )
        if world.rank == 0:
            report.print_collectives(watched.calls, expected, link)
    if world.rank == 0:
        if phases:
            report.print_phases(phases)
        print(report.summary(results))
