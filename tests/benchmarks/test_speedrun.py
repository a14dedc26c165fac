# SPDX-License-Identifier: MIT
"""The speedrun: recipes train by the seed alone, and files can enter."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("rich", reason="rich prints the tables")
pytest.importorskip("tyro", reason="tyro reads the flags")

import train_ddp

from benchmarks import speedrun
from benchmarks.speedrun import RECORD_98_7
from torchpar import data
from torchpar.data import Samples
from torchpar.errors import ConfigError, DivergedError

SMALL_MUON = replace(RECORD_98_7, name="small", epochs=3, batch_size=64, hidden=(16,))


def test_the_lessons_recipe_has_the_defaults_of_train_ddp():
    """So that docs/training.md compares the network that README trains with others."""
    flags, recipe = train_ddp.Flags(), speedrun.LESSON
    names = (
        "epochs",
        "batch_size",
        "hidden",
        "activation",
        "optimizer",
        "crop",
        "pool",
        "label_smoothing",
    )
    assert {name: getattr(recipe, name) for name in names} == {
        name: getattr(flags, name) for name in names
    }
    rates = {"lr": recipe.lr, "momentum": recipe.momentum, "weight_decay": 0.0}
    tried = {one.activation: one.lr for one in speedrun.LESSON_TRIED if one.activation != "sigmoid"}
    others = {
        name: train_ddp.Flags(activation=name).completed() for name in ("relu", "tanh", "maxout")
    }
    assert {name: one.lr for name, one in others.items()} == tried
    assert rates == flags.MUON
    assert (flags.lr, flags.momentum, flags.weight_decay) == (None, None, None)
    assert (flags.schedule, recipe.decay, recipe.warmup) == ("linear", True, 0.0)
    assert (recipe.dtype, recipe.ns_steps) == (torch.float32, 5)


@pytest.fixture(scope="module")
def images() -> tuple[Samples, Samples]:
    train, test = speedrun.images("cpu", False, True)
    return train[:200], test[:100]


def test_a_training_depends_on_its_seed_alone(images, world):
    """Nothing is done with the images before the clock runs."""
    recipe = replace(SMALL_MUON, average=0.9, warmup=0.5)
    recipe.prepare(images[0], world)
    outputs = {}
    for seed in (0, 1, 2, 1):
        recipe.samples.features.fill_(torch.nan)
        recipe.train(seed)
        outputs.setdefault(seed, []).append(recipe.outputs(images[1]).detach())
    first, again = outputs[1]
    assert torch.equal(first, again)
    assert not torch.equal(first, outputs[2][0])


MINE = """
import torch
from benchmarks.speedrun import time

class Mine:
    name, change = "mine", "all digits are sevens"

    def prepare(self, samples, world):
        time.now += 10

    def train(self, seed):
        time.now += 2 * seed

    def outputs(self, samples):
        time.now += 10
        assert not samples.labels.any()
        return torch.eye(10)[7].expand(len(samples), 10)

recipe = Mine()
"""


def test_files_enter_and_the_clock_runs_while_a_network_is_trained(tmp_path, world, monkeypatch):
    monkeypatch.setattr(speedrun, "current_world", lambda: world)
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(speedrun, "time", clock)

    def score(outputs: str) -> tuple[float, float]:
        file = tmp_path / f"{len(outputs)}.py"
        file.write_text(MINE.replace("torch.eye(10)[7].expand(len(samples), 10)", outputs))
        return speedrun.score(str(file), validate=True, quick=True, seed=1)

    train, test = speedrun.images("cpu", True, False)
    assert (len(train), len(test)) == (50_000, 10_000)  # training images that were left out
    assert torch.equal(
        torch.cat([train.labels, test.labels]), data.load("mnist", speedrun.DATA)[0].labels
    )
    sevens = (test.labels[: speedrun.QUICK] == 7).double().mean()
    assert score("torch.eye(10)[7].expand(len(samples), 10)") == (2.0, sevens)
    with pytest.raises(ConfigError, match=r"outputs are \(3, 10\), expected \(2000, 10\)"):
        score("torch.zeros(3, 10)")
    with pytest.raises(
        DivergedError, match="an output is not finite; take a smaller learning rate"
    ):
        score("torch.full((2000, 10), torch.nan)")
