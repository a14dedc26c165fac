# SPDX-License-Identifier: MIT
"""Gradient clipping for a model that is split over a mesh."""

import math
from collections.abc import Iterator
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from torchpar.errors import ConfigError, check_number
from torchpar.library.sharding import is_dtensor, local
from torchpar.ops.exact_squares import SumOfSquares
from torchpar.ops.matrix import is_exact, ordinary
from torchpar.parallel.launch.world import World, check_module, check_world
from torchpar.parallel.split.layers import meshes_of_shards
from torchpar.parallel.split.parts import part_of


@torch.no_grad()
def clip_grad_norm_(model: torch.nn.Module, max_norm: float, world: World) -> Tensor:
    """Scale the gradient of the unsharded model to a norm of at most ``max_norm``, in place.

    ``‖g‖ = √Σ‖g_i‖²`` over all parameters of the model. Every shard of a parameter counts, and a
    parameter that is replicated on several ranks counts once. This costs one all-reduce of one
    number, and nothing if the model is replicated on every rank.

    Parameters may be plain tensors, shards of split layers, and DTensors on any mesh, as from
    `fully_shard` and `parallelize_module`, also in one model, and split layers in `fully_shard`. A
    gradient of partial sums is added up for its norm, which takes one all-reduce for each.

    In `torchpar.exact.mode` the norm has the same bits on any number of ranks, because it adds
    integers. There it costs one all-reduce more. Of n numbers it is off by at most n·2⁻⁵³ of itself
    (`torchpar.ops.exact_squares`).

    Args:
        model: this rank's part of the model, with gradients that are averaged over the
            data-parallel ranks.
        max_norm: the largest norm that is not scaled, from 0 on; infinity scales none.
        world: the ranks and their mesh. The ranks of a pipeline stage have the same parameters, or
            shards of them.

    Returns:
        The norm before clipping, a float64 scalar, the same on every rank. As with
        `torch.nn.utils.clip_grad_norm_`, a NaN makes every gradient NaN, and an infinity makes
        itself NaN and the finite gradients 0.

    Raises:
        ConfigError: ``model`` is no module, ``world`` no `World`, or ``max_norm`` no number from 0
            on; this rank sees that a parameter is only on some ranks of a pipeline stage, that it
            is sharded twice over the same ranks, or that a gradient has a layout other than strided
            and `torch.sparse_coo`.
    """
    check_world("clip_grad_norm_", world)
    check_module("clip_grad_norm_", model)
    max_norm = check_number("max_norm", max_norm)
    named = list(model.named_parameters())
    of_layers = meshes_of_shards(model)
    layers = [of_layers.get(p) if is_dtensor(p) else part_of(p).mesh for _, p in named]
    meshes = [*layers, *(p.device_mesh for _, p in named if is_dtensor(p))]
    is_replicated = world.dp_size == world.world_size and not any(
        mesh and mesh.size() > 1 for mesh in meshes
    )
    stage = world.mesh.mesh[world.mesh.get_local_rank("pp")].flatten().tolist()

    def terms() -> Iterator[tuple[Tensor, float]]:
        # Each rank adds its share of the copies, so that a NaN of any rank reaches all.
        for (name, p), layer in zip(named, layers, strict=True):
            if p.grad is not None:
                whole = _with_whole_sums(p.grad)
                share = 1.0 if is_replicated else _share(name, whole, layer, stage, world)
                yield _elements(name, local(whole)), share

    ranks = None if is_replicated else world
    if is_exact():
        norm = _exact_norm(list(terms()), ranks, world.device)
    else:
        total = torch.zeros((), dtype=torch.float64, device=world.device)
        for elements, share in terms():
            total += torch.linalg.vector_norm(elements, dtype=torch.float64).square() * share
        norm = (ranks.sum(total) if ranks else total).sqrt()
    # PyTorch reads only `grad`. It cannot multiply a DTensor by a plain norm.
    gradients = [SimpleNamespace(grad=local(p.grad)) for _, p in named if p.grad is not None]
    torch.nn.utils.clip_grads_with_norm_(
        gradients,  # type: ignore[arg-type]
        max_norm,
        norm,
        foreach=False if is_exact() else None,  # the mode has no operators on lists
    )
    return norm


def _exact_norm(
    terms: list[tuple[Tensor, float]], world: World | None, device: torch.device
) -> Tensor:
    """The norm of elements, each with this rank's share of it, by a sum of integers.

    Each of the W ranks adds W · share copies of its squares, a whole number, and the total is
    divided by W.
    """
    with ordinary():
        largest = torch.zeros((), dtype=torch.float64, device=device)
        for elements, _ in terms:
            if elements.numel():
                # NaN counts as infinity here, since a maximum over ranks may lose a NaN.
                top = elements.abs().amax().double().nan_to_num(math.inf, math.inf)
                largest = torch.maximum(largest, top)
        if world and world.world_size > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        parts = world.world_size if world else 1
        squares = SumOfSquares(largest)
        for elements, share in terms:
            squares.add(elements, round(parts * share))
        if world:
            world.sum(squares.words)
        return squares.total(parts).sqrt()


def _with_whole_sums(gradient: Tensor) -> Tensor:
    """``gradient``, where the terms of a DTensor's partial sums are added up over the ranks."""
    if not is_dtensor(gradient) or not any(one.is_partial() for one in gradient.placements):
        return gradient
    from torch.distributed.tensor import Replicate

    placements = [Replicate() if one.is_partial() else one for one in gradient.placements]
    whole: Tensor = gradient.redistribute(placements=placements)
    return whole


def _elements(name: str, gradient: Tensor) -> Tensor:
    """The elements of a dense gradient, or those that a sparse one holds, each once."""
    if gradient.layout == torch.sparse_coo:  # such as of an embedding with sparse=True
        return gradient.coalesce().values()
    if gradient.layout != torch.strided:
        raise ConfigError(
            f"the gradient of {name} is {gradient.layout}, expected torch.strided or "
            "torch.sparse_coo; convert it, such as by p.grad = p.grad.to_sparse_coo()"
        )
    return gradient


def _share(
    name: str, gradient: Tensor, layer: DeviceMesh | None, stage: list[int], world: World
) -> float:
    """One divided by the number of ranks that have the same elements of ``gradient``.

    Args:
        layer: the ranks over which a split layer shards the parameter.
        stage: the ranks of this rank's pipeline stage.
    """
    ranks, of_layer = len(stage), layer.size() if layer else 1
    shards = of_layer
    if is_dtensor(gradient):
        mesh = gradient.device_mesh
        others = set(mesh.mesh.flatten().tolist()) - {world.rank}
        if layer and others & set(layer.mesh.flatten().tolist()):
            raise ConfigError(
                f"{name} is a DTensor over the ranks of its split layer, expected other ranks; "
                'give fully_shard another dimension of the mesh, such as world.mesh["dp"]'
            )
        if not others <= set(stage):  # all stages have it
            ranks = world.world_size
        if mesh.get_coordinate() is None or ranks % (mesh.size() * of_layer):
            raise ConfigError(
                f"{name} is a DTensor on ranks {sorted(mesh.mesh.flatten().tolist())} of "
                f"{world.world_size}, expected it on all, or copies of it on the others; take a "
                "mesh of all, or clip by torch.nn.utils.clip_grad_norm_, which takes one mesh"
            )
        for size, placement in zip(mesh.shape, gradient.placements, strict=True):
            shards *= 1 if placement.is_replicate() else size
    return shards / ranks
