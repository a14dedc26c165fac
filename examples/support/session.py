# SPDX-License-Identifier: MIT
"""Load the data of the training lessons, and adjust their gradients."""

from collections.abc import Iterator
from dataclasses import asdict

import torch

from support.cli import TrainFlags
from torchpar import data, training
from torchpar.data import Samples
from torchpar.parallel.launch.world import World
from torchpar.parallel.split.clip import clip_grad_norm_


def load(flags: TrainFlags, world: World) -> tuple[Samples, Samples]:
    """Return the training and test samples on the device of this rank.

    First compare the flags of all ranks: all but the data folder and the device.

    Raises:
        ConfigError: different flags, or no data; on every rank.
    """
    shared = {name: value for name, value in asdict(flags).items() if name not in ("data", "device")}
    world.check_same_on_all_ranks("the ranks' flags", shared)
    loaded: list[Samples] = []
    world.gather_results(lambda: loaded.extend(_load(flags, world)))
    train, test = loaded
    train = train[: flags.samples]
    return train[: 10 * flags.batch_size] if flags.dry_run else train, test


def _load(flags: TrainFlags, world: World) -> Iterator[Samples]:
    for samples in data.load(flags.dataset, flags.data, world.device):
        fewer = flags.crop or flags.pool > 1
        yield samples.pooled(flags.crop, flags.pool) if fewer else samples


def adjust_gradients(flags: TrainFlags, model: torch.nn.Module, world: World) -> None:
    """Add the orthogonality penalty's gradient and clip the gradient's norm, if ``flags`` ask for it."""
    if flags.orthogonality:
        training.add_orthogonality_gradient(model, flags.orthogonality)
    if flags.clip is not None:
        clip_grad_norm_(model, flags.clip, world)
