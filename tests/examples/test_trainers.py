# SPDX-License-Identifier: MIT
"""docs/trainers.md: its code runs, and trains like plain loops."""

import os
import shutil
from functools import partial
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from commands import blocks, execute

from torchpar.reference import average_gradients

pytestmark = [
    # Each worker of pytest-xdist imports this file, and the package takes a second.
    pytest.mark.skipif(
        find_spec("transformers") is None,
        reason="transformers, whose Trainer takes Muon, is not installed",
    ),
    pytest.mark.skipif(
        torch.cuda.is_available(),
        reason="the trainers would choose the GPU, with other bits than the plain loop",
    ),
]
SETUP, TRAINER, ACCELERATE, LIGHTNING = blocks("docs/trainers.md")


def train(rank: int = 0, world_size: int = 1) -> dict[str, Any]:
    """The weights after 8 steps of a plain loop over the page's tokens, which averages
    gradients."""
    names = execute(SETUP)
    model = names["make_model"]()
    adamw = partial(torch.optim.AdamW, lr=3e-4)
    optimizer = names["Muon"].for_model(model, lr=0.02, others=adamw)
    for batch in names["tokens"].split(4)[rank : 8 * world_size : world_size]:
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        if world_size > 1:
            average_gradients(model)
        optimizer.step()
    return model.state_dict()


def differing(weights: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    assert weights.keys() == expected.keys()
    return [name for name in expected if not torch.equal(weights[name], expected[name])]


@pytest.mark.slow  # by default Lightning's trainer resumes
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")  # without a GPU
def test_the_trainer_of_transformers_resumes_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = execute(SETUP, TRAINER)["model"].state_dict()
    shutil.rmtree("checkpoints/checkpoint-8")
    shutil.copytree("checkpoints", "without")
    os.remove("without/checkpoint-4/optimizer.pt")
    resume = TRAINER.replace("train()", "train(resume_from_checkpoint=True)")
    assert not differing(execute(SETUP, resume)["model"].state_dict(), expected)
    lacking = execute(SETUP, resume.replace('"checkpoints"', '"without"'))["model"].state_dict()
    assert differing(lacking, expected)  # the momenta are missing


def train_on_shards() -> None:
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType
    from torch.distributed.tensor import DTensor

    make_state = AcceleratorState.__init__

    def shard_on_cpus(self: Any, *args: Any, fsdp_plugin: Any = None, **arguments: Any) -> None:
        """accelerate looks at its plugin on GPUs only."""
        make_state(self, *args, fsdp_plugin=fsdp_plugin, **arguments)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    with (
        patch.dict(os.environ, ACCELERATE_USE_CPU="1", LOCAL_WORLD_SIZE="2"),
        patch.object(AcceleratorState, "__init__", shard_on_cpus),
    ):
        names = execute(SETUP, ACCELERATE)
    AcceleratorState._reset_state(reset_partial_state=True)
    weights = names["model"].state_dict()
    assert all(isinstance(weight, DTensor) for weight in weights.values())

    whole = {name: weight.full_tensor() for name, weight in weights.items()}
    assert not differing(whole, train(dist.get_rank(), 2))


@pytest.mark.slow  # the ranks import accelerate and transformers
def test_accelerate_shards_the_model_and_muon(ranks):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    ranks(2, train_on_shards)


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec")  # Lightning 2.6 on torch 2.15
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lightning_trains_like_a_plain_loop(tmp_path, monkeypatch):
    pytest.importorskip("lightning", reason="lightning is not installed")
    monkeypatch.chdir(tmp_path)
    assert not differing(execute(SETUP, LIGHTNING)["lit_model"].model.state_dict(), train())
