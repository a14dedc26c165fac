# SPDX-License-Identifier: MIT
"""Tensor parallelism for an MLP: split the model, convert its state dict."""

import copy
from collections import OrderedDict
from collections.abc import Mapping
from itertools import cycle
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from torchpar import nn
from torchpar.errors import ConfigError
from torchpar.library.sharding import is_dtensor
from torchpar.parallel.launch.agreement import check_same_bits, check_same_on_all_ranks
from torchpar.parallel.launch.world import check_mesh
from torchpar.parallel.split.layers import (
    LINEAR_LAYERS,
    SAME_WEIGHTS,
    ColumnParallelLinear,
    RowParallelLinear,
)
from torchpar.parallel.split.parts import part_of
from torchpar.parallel.split.reduction import all_gather

M = TypeVar("M", nn.MLP, torch.nn.Sequential)
_KINDS = (*LINEAR_LAYERS, torch.nn.Sigmoid, torch.nn.ReLU, torch.nn.Tanh)


def parallel_mlp(mlp: M, mesh: DeviceMesh) -> M:
    """Return a copy of ``mlp`` that computes the same function with weights sharded over the ranks.

    Linear layers 0 and 1, 2 and 3, … become pairs of `ColumnParallelLinear` and
    `RowParallelLinear`. The last of an odd number of layers is replicated. A forward pass makes one
    all-reduce per pair. A backward pass makes one all-reduce per pair, except for the first pair if
    the input needs no gradient.

    Args:
        mlp: a `torchpar.nn.MLP`, or a `torch.nn.Sequential` of linear layers (`torch.nn.Linear` or
            `torchpar.nn`'s except `LinearMaxout`), `torch.nn.Sigmoid`, `torch.nn.ReLU` and
            `torch.nn.Tanh`. The model is the same on every rank, and is not changed.
        mesh: a mesh of one dimension, such as ``mesh["tp"]``.

    Returns:
        A model of the same type, whose parameters have the same names.

    Raises:
        ValueError: another ``mesh``, another kind of model or layer, layers that share parameters,
            or different models or weights on different ranks.
    """
    check_mesh("parallel_mlp", mesh)
    layers = mlp.layers if isinstance(mlp, nn.MLP) else mlp
    is_sequential = type(layers) is torch.nn.Sequential
    # An activation may occur twice; named_children would skip the second.
    modules = layers.named_modules(remove_duplicate=False) if is_sequential else ()
    named = [(name, layer) for name, layer in modules if name]
    description = {"type": type(layers).__name__, "layers": [str(layer) for _, layer in named]}
    # So a model that is wrong on one rank alone is refused on all ranks.
    check_same_on_all_ranks(mesh.get_group(), "the ranks' models", description)
    if not is_sequential:
        raise ConfigError(
            f"cannot split a {type(mlp).__name__}, expected torchpar.nn.MLP or torch.nn.Sequential"
        )
    for name, layer in named:
        if type(layer) not in _KINDS:
            expected = ", ".join(kind.__name__ for kind in _KINDS)
            raise ConfigError(
                f"cannot split layer {name}, a {type(layer).__name__}; expected {expected}, "
                "or take data or pipeline parallelism, which do not split layers"
            )
    parameters = [p for _, layer in named for p in layer.parameters()]
    if len(set(parameters)) < len(parameters):
        raise ConfigError(
            "cannot split layers that share parameters, expected each layer to have its own"
        )
    linears = [name for name, layer in named if type(layer) in LINEAR_LAYERS]
    pairs = linears[: len(linears) // 2 * 2]
    replicated = {
        f"{name}.{key}": p
        for name, layer in named
        if name not in pairs
        for key, p in layer.named_parameters()
    }
    check_same_bits(mesh.get_group(), replicated, SAME_WEIGHTS)  # the pairs check their weights
    kinds = dict(zip(pairs, cycle((ColumnParallelLinear, RowParallelLinear)), strict=False))
    split = torch.nn.Sequential(
        OrderedDict(
            (
                name,
                kinds[name].from_linear(layer, mesh=mesh)
                if name in kinds
                else copy.deepcopy(layer),
            )
            for name, layer in named
        )
    )
    if not isinstance(mlp, nn.MLP):
        return split.train(mlp.training)
    result = nn.MLP(mlp.sizes, mlp.hidden, mlp.output, device="meta")
    result.layers = split
    return result.train(mlp.training)  # type: ignore[return-value]


def full_state_dict(model: torch.nn.Module) -> dict[str, Tensor]:
    """The unsharded model's state dict, on every rank. All ranks must call this."""
    state = OrderedDict(
        (name, (t.full_tensor() if is_dtensor(t) else t).detach().clone())
        for name, t in model.state_dict().items()
    )
    for name, p in model.named_parameters():
        part = part_of(p)
        if part.is_slice:
            state[name] = all_gather(state[name], part)
    return state


def load_full_state_dict(model: torch.nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load the unsharded model's state dict; each rank keeps its shards.

    Raises:
        ValueError: a parameter has another shape than in the model.
        RuntimeError: other parameters than in the model, as from
            `torch.nn.Module.load_state_dict`.
    """
    state = dict(state)
    for name, p in model.named_parameters():
        part = part_of(p)
        if part.is_slice and name in state:
            shape = tuple(state[name].shape)
            if shape != part.whole:
                raise ValueError(f"{name} has shape {shape}, expected {part.whole}")
            state[name] = part.narrow(state[name])
    model.load_state_dict(state)
