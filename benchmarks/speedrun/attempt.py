# SPDX-License-Identifier: MIT
"""An attempt at the record: train a network for a seed by the clock, then score it."""

import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.speedrun import recipes
from torchpar import data
from torchpar.data import Samples
from torchpar.errors import ConfigError
from torchpar.parallel.launch.local import Ranks, current_world
from torchpar.parallel.launch.world import World

DATA = Path(__file__).parents[2] / "examples" / "data"
VALIDATION = 50_000  # the training images from here on score what is being chosen
QUICK = 2_000  # images
Score = tuple[float, float]  # seconds, accuracy
Attempt = Callable[[int], Score]  # of a seed


def images(device: str, validate: bool, quick: bool) -> tuple[Samples, Samples]:
    """The images to train on and to score."""
    train, test = data.load("mnist", DATA, device)
    if validate:
        train, test = train[:VALIDATION], train[VALIDATION:]
    return (train[:QUICK], test[:QUICK]) if quick else (train, test)


def local(spec: str, world: World, train: Samples, test: Samples) -> Attempt:
    """Attempts by this process, as a rank of ``world``."""
    entry = recipes.find(spec)
    trainer = entry.prepare(train, world)

    def attempt(seed: int) -> Score:
        if world.world_size > 1:
            dist.barrier()
        start = time.perf_counter()
        trainer.train(seed)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        outputs = trainer.outputs(test)
        if outputs.shape != (len(test), len(test.classes)):
            raise ConfigError(f"outputs are {tuple(outputs.shape)}, expected {len(test), len(test.classes)}")
        return seconds, (outputs.argmax(1) == test.labels).double().mean().item()

    return attempt


def on_ranks(spec: str, ranks: Ranks, validate: bool, quick: bool) -> Attempt:
    """Attempts by several processes; the slowest one's seconds count."""

    def attempt(seed: int) -> Score:
        scores = ranks.run(_on_rank, spec, validate, quick, seed)
        return max(seconds for seconds, _ in scores), scores[0][1]

    return attempt


def _on_rank(spec: str, validate: bool, quick: bool, seed: int) -> Score:
    return _of_rank(spec, validate, quick)(seed)


@cache
def _of_rank(spec: str, validate: bool, quick: bool) -> Attempt:
    return local(spec, current_world(), *images("cpu", validate, quick))


def forget() -> None:
    """Drop the trainers, before the ranks leave."""
    _of_rank.cache_clear()
