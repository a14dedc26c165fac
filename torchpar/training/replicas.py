# SPDX-License-Identifier: MIT
"""Compare the ranks' replicas of a model before the optimizer's first step.

Ranks that differ in "dp" alone have the same part of the model, and gradients that were averaged:
their bits are equal. Ranks that differ in "tp" alone also share what no layer splits. Each of them
computes the whole gradient of such a parameter by itself, so that its last digits may differ where
the processors do. If a rank has only its own term of the sum, even the first digits differ:

    y = row(column(x) * scale)    dL/dscale = Σ_r of the ranks of "tp"

A parameter of features that only this rank has is another one on each rank. If it begins as a
constant, only `mark_shard` tells it from one that the ranks share.

Stages of a pipeline hold other parameters, also where these have the same names.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from torchpar.errors import ConfigError
from torchpar.library.sharding import is_dtensor
from torchpar.parallel.launch.agreement import AVERAGE, checksum
from torchpar.parallel.launch.rank_info import first_difference
from torchpar.parallel.launch.world import World
from torchpar.parallel.split.parts import part_of

ADD_UP = (
    "if it is one parameter, add the parts of its gradient up before optimizer.step(), such as by "
    'torch.distributed.all_reduce(p.grad, group=world.mesh.get_group("tp")), or give the ranks the '
    "same samples and random numbers; if each rank has features of its own, mark it by "
    'torchpar.parallel.mark_shard(p, axis, size, world.mesh["tp"])'
)


class Replica(NamedTuple):
    """A rank's copy of a parameter, to be compared with those of other ranks.

    Attributes:
        value: shape and bits of the parameter. It is None for a shard and for a DTensor, and for
            every parameter of a mesh whose "tp" has one rank.
        gradient: bits of the gradient; None if there is none, or no dense one.
    """

    value: tuple[tuple[int, ...], int] | None
    gradient: int | None


def check_replicas(model: torch.nn.Module, world: World) -> None:
    """Refuse gradients that are not the whole gradients. Every rank must call this.

    The ranks exchange one object each. Only where gradients of the ranks of "tp" have other bits,
    these ranks also exchange the gradients.

    Raises:
        ConfigError: a gradient differs between the ranks of "dp", by a bit; or between those of
            "tp", by more than rounding. On every rank.
    """
    lines = {name: _lines(world, name) for name in ("dp", "tp")}
    if dist.get_backend() == "fake" or not any(lines.values()):  # other ranks do not exist
        return
    mine = dict(_replicas(model, bool(lines["tp"])))
    by_rank: list[Mapping[str, Replica]] = [{}] * world.world_size
    dist.all_gather_object(by_rank, mine)
    for line in lines["dp"]:
        gradients = [{name: one.gradient for name, one in by_rank[rank].items()} for rank in line]
        if difference := first_difference(gradients):
            name = f"the gradient of {difference[0]}"
            raise ConfigError(f"{name} differs between ranks; {AVERAGE}")
    differing = {line: _differing([by_rank[rank] for rank in line]) for line in lines["tp"]}
    if any(differing.values()):
        _check_rounding(model, world, differing)


def _lines(world: World, name: str) -> list[tuple[int, ...]]:
    """The ranks that differ in the dimension ``name`` alone; none if it has one rank."""
    dimension = world.mesh.mesh_dim_names.index(name)  # type: ignore[union-attr]  # ours has names
    ranks = world.mesh.mesh.movedim(dimension, -1)
    size = ranks.shape[-1]
    return [tuple(line) for line in ranks.reshape(-1, size).tolist()] if size > 1 else []


def _replicas(model: torch.nn.Module, has_tp: bool) -> Iterable[tuple[str, Replica]]:
    for name, p in model.named_parameters():
        is_whole = has_tp and not is_dtensor(p) and not part_of(p).is_slice
        value = (tuple(p.shape), checksum(p)) if is_whole else None
        yield name, Replica(value, checksum(p.grad) if _is_dense(p.grad) else None)  # type: ignore[arg-type]


def _is_dense(t: Tensor | None) -> bool:
    return t is not None and t.layout == torch.strided and not is_dtensor(t)


def _differing(replicas: Sequence[Mapping[str, Replica]]) -> list[str]:
    """The parameters that these ranks of "tp" share, and whose gradients have other bits.

    Ranks share a parameter if its bits are the same on all of them. A module is split by hand if a
    parameter of it has other bits on some rank. Then the gradients of all its own parameters may
    differ.
    """
    shared, by_hand = [], set[str]()
    for name in dict.fromkeys(name for of_rank in replicas for name in of_rank):
        ones = [of_rank.get(name, Replica(None, None)) for of_rank in replicas]
        values = {one.value for one in ones}
        if len(values) > 1:
            by_hand.add(name.rpartition(".")[0])
        elif values != {None} and len({one.gradient for one in ones}) > 1:
            shared.append(name)
    return [name for name in shared if name.rpartition(".")[0] not in by_hand]


def _check_rounding(
    model: torch.nn.Module, world: World, differing: Mapping[tuple[int, ...], list[str]]
) -> None:
    """Refuse gradients that differ by more than the last digits, on every rank.

    Args:
        differing: the parameters whose gradients have other bits, by the ranks of "tp".
    """
    (names,) = (names for line, names in differing.items() if world.rank in line)
    parameters, found = dict(model.named_parameters()), ""
    for name in names:
        gradient = parameters[name].grad
        terms: list[Tensor | None] = [None] * world.tp_size
        mine = gradient.detach().cpu() if _is_dense(gradient) else None  # type: ignore[union-attr]
        dist.all_gather_object(terms, mine, world.mesh.get_group("tp"))
        if not _are_close(terms):
            found = name
            break
    of_ranks = [""] * world.world_size
    dist.all_gather_object(of_ranks, found)
    if name := next(filter(None, of_ranks), ""):
        raise ConfigError(
            f'the gradient of {name} differs between the ranks of "tp", which begin with the same '
            f"values of it; {ADD_UP}"
        )


def _are_close(gradients: Sequence[Tensor | None]) -> bool:
    """Whether all ranks have the gradient, with the same first half of its digits."""
    first, *others = gradients
    for other in others:
        if first is None or other is None:
            return first is other
        scale = first.abs().max() if first.numel() else 0.0
        tolerance = math.sqrt(torch.finfo(first.dtype).eps) * scale
        if not torch.allclose(other, first, rtol=0.0, atol=float(tolerance), equal_nan=True):
            return False
    return True
