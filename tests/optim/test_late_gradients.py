# SPDX-License-Identifier: MIT
"""A checkpoint of Muon from before some matrix has had a gradient (microsoft/dion#89)."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from torchpar.optim import Muon

# The rows are no multiple of the ranks.
SHAPES = {"early": (5, 7), "late": (3, 4)}


def make(mesh: Any = None) -> tuple[nn.ModuleDict, Muon]:
    torch.manual_seed(0)
    layers = {name: nn.Linear(*shape, bias=False) for name, shape in SHAPES.items()}
    model = nn.ModuleDict(layers)
    if mesh is not None:
        for layer in layers.values():
            fully_shard(layer, mesh=mesh)
    return model, Muon(model.parameters(), lr=0.1)


def step(model: nn.ModuleDict, optimizer: Muon, number: int, *names: str) -> None:
    optimizer.zero_grad()
    for name in names:
        width = SHAPES[name][0]
        x = torch.randn(6, width, generator=torch.Generator().manual_seed(number))
        model[name](x).square().sum().backward()
    optimizer.step()


def resume(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    model, optimizer = make(mesh)
    step(model, optimizer, 1, "early")
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    step(model, optimizer, 2, "early", "late")

    again, other = make(mesh)
    with torch.no_grad():
        for p in again.parameters():
            p.zero_()
    weights, state = get_state_dict(again, other)
    content = {"model": weights, "optimizer": state}
    with pytest.raises(CheckpointException, match=r"late\.weight\.momentum_buffer"):
        dcp.load(content, checkpoint_id=folder)
    planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
    dcp.load(content, checkpoint_id=folder, planner=planner)
    set_state_dict(again, other, model_state_dict=weights, optim_state_dict=state)
    control, third = make(mesh)
    set_model_state_dict(control, weights)
    step(control, third, 2, "early", "late")
    step(again, other, 2, "early", "late")
    for name, layer in model.items():
        expected = layer.weight.full_tensor()
        assert torch.equal(again[name].weight.full_tensor(), expected), name
        # Without the momentum the matrix that had one differs.
        without = control[name].weight.full_tensor()
        assert torch.equal(without, expected) == (name == "late")


@pytest.mark.slow  # the ranks import torch.distributed.checkpoint
def test_a_checkpoint_goes_on_with_the_same_bits(ranks, tmp_path):
    ranks(2, partial(resume, tmp_path))
