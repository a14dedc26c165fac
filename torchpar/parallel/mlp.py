# SPDX-License-Identifier: MIT
"""The tensor-split twin of an MLP, and its parameters from and to the unsplit model's."""

import copy
from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from torchpar import nn
from torchpar.parallel.agreement import check_alike, group_of
from torchpar.parallel.layers import ColumnParallelLinear, RowParallelLinear, split_parameters
from torchpar.parallel.reduction import Reduction
from torchpar.parallel.regions import gather


def parallel_mlp(mlp: nn.MLP, mesh: DeviceMesh, reduction: Reduction = "fast") -> nn.MLP:
    """The tensor-split twin of ``mlp``: the same function, each rank holding a part of the weights.

    Layers 0 and 1, 2 and 3, … become pairs of `ColumnParallelLinear` and `RowParallelLinear`; the last
    of an odd number stays whole on every rank. A forward pass makes one all-reduce per pair; so does a
    backward pass, but for the first pair if the input needs no gradient.

    Args:
        mlp: the same on every rank; it is left as it is.
        mesh: of one dimension, such as ``mesh["tp"]``.
        reduction: "fast" or "invariant" (`torchpar.parallel.reduction`).
    """
    settings = {"sizes": mlp.sizes, "hidden": mlp.hidden, "output": mlp.output, "reduction": reduction}
    check_alike(group_of(mesh), "the ranks' models", settings)
    twin = nn.MLP(mlp.sizes, mlp.hidden, mlp.output, device="meta")
    layers: list[torch.nn.Module] = []
    for i, layer in enumerate(mlp.layers):
        assert isinstance(layer, nn.Linear)
        if i % 2 == 0 and i == len(mlp.layers) - 1:
            layers.append(copy.deepcopy(layer))
        else:
            kind = RowParallelLinear if i % 2 else ColumnParallelLinear
            layers.append(kind.from_linear(layer, mesh=mesh, reduction=reduction))
    twin.layers = torch.nn.Sequential(*layers)
    return twin.train(mlp.training)


def whole_state_dict(model: torch.nn.Module) -> dict[str, Tensor]:
    """The unsplit model's state dict, on every rank. Each rank must call it."""
    state = OrderedDict((name, t.detach().clone()) for name, t in model.state_dict().items())
    for name, axis, layer in split_parameters(model):
        state[name] = gather(state[name], layer.mesh, layer.partition.widths(), axis)
    return state


def load_whole_state_dict(model: torch.nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load the unsplit model's state dict: each rank takes its slices.

    Raises:
        ValueError: a split axis of another size than the model's.
        RuntimeError: other parameters than the model's, as `torch.nn.Module.load_state_dict` says.
    """
    state = dict(state)
    for name, axis, layer in split_parameters(model):
        if name in state:
            size = layer.partition.size
            if state[name].shape[axis : axis + 1] != (size,):
                shape = tuple(state[name].shape)
                raise ValueError(f"{name} has shape {shape}, expected {size} on axis {axis}")
            state[name] = layer.partition.narrow(state[name], axis)
    model.load_state_dict(state)
