# SPDX-License-Identifier: MIT
"""Attempts: train a network for a seed by the clock, then score it."""

import time
from collections.abc import Callable
from functools import cache

import torch
import torch.distributed as dist

from benchmarks.digits import DATA
from benchmarks.speedrun.entries import find
from benchmarks.speedrun.recipe import Trainer
from torchpar import data
from torchpar.data import Samples
from torchpar.errors import ConfigError
from torchpar.parallel.launch.local import Ranks, current_world
from torchpar.parallel.launch.world import World

VALIDATION = 50_000  # the training images from here on score what is being chosen
QUICK = 2_000  # images
Score = tuple[float, float]  # seconds, accuracy
Attempt = Callable[[int], Score]  # of a seed


@cache
def load(device: str, validate: bool, quick: bool) -> tuple[Samples, Samples]:
    """The images to train on and to score."""
    train, test = data.load("mnist", DATA, device)
    if validate:
        train, test = train[:VALIDATION], train[VALIDATION:]
    return (train[:QUICK], test[:QUICK]) if quick else (train, test)


def local(name: str, world: World, train: Samples, test: Samples) -> Attempt:
    """Attempts of the entry ``name`` by this process, as a rank of ``world``; the first one prepares it."""
    unlabelled = Samples(test.features, torch.zeros_like(test.labels), test.classes)

    @cache
    def prepared() -> Trainer:
        trainer = find(name).prepare(train, world)
        if world.device.type == "cuda":
            # A graph is captured at the second batch of its size, which may come in the second training.
            trainer.train(0)
        return trainer

    def attempt(seed: int) -> Score:
        trainer = prepared()
        if world.world_size > 1:
            dist.barrier()
        start = time.perf_counter()
        trainer.train(seed)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        with torch.no_grad():
            outputs = trainer.outputs(unlabelled).cpu()
        expected = (len(test), len(test.classes))
        if outputs.shape != expected:
            raise ConfigError(f"outputs are {tuple(outputs.shape)}, expected {expected}")
        if not outputs.isfinite().all():
            raise ConfigError("an output is not finite; take a smaller rate")
        return seconds, (outputs.argmax(1) == test.labels.cpu()).double().mean().item()

    return attempt


def on_ranks(name: str, ranks: Ranks, validate: bool, quick: bool) -> Attempt:
    """Attempts by several processes; the slowest one's seconds count."""

    def attempt(seed: int) -> Score:
        scores = ranks.run(_on_rank, name, validate, quick, seed)
        return max(seconds for seconds, _ in scores), scores[0][1]

    return attempt


def _on_rank(name: str, validate: bool, quick: bool, seed: int) -> Score:
    return _of_rank(name, validate, quick)(seed)


@cache
def _of_rank(name: str, validate: bool, quick: bool) -> Attempt:
    return local(name, current_world(), *load("cpu", validate, quick))


def forget() -> None:
    """Drop the trainers, before the ranks leave."""
    _of_rank.cache_clear()
