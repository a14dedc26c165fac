# SPDX-License-Identifier: MIT
"""Check that all ranks agree before a collective.

Without these checks a rank would wait for another until the timeout, or gloo would abort both.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from torchpar.errors import ConfigError
from torchpar.ops._library import is_dtensor

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32, 16: torch.int32}
_CHUNK = 2**20  # words that `checksum` adds at once
_FACTOR = -7046029254386353131  # odd: 2⁶⁴ divided by the golden ratio, as int64
_AVERAGE = (
    "average the gradients before optimizer.step(), for example by DistributedDataParallel (with "
    "find_unused_parameters=True if a parameter gets no gradient)"
)


def group_of(mesh: DeviceMesh) -> dist.ProcessGroup:
    """The process group of ``mesh``.

    Raises:
        ConfigError: the mesh has several dimensions.
    """
    if mesh.ndim != 1:
        raise ConfigError(f"mesh has dimensions {mesh.mesh_dim_names}, expected one, such as mesh['tp']")
    return mesh.get_group()


def check_same_on_all_ranks(group: dist.ProcessGroup | None, what: str, values: dict[str, Any]) -> None:
    """Compare ``values``, by name, between the ranks of ``group``.

    Args:
        what: a noun for the values, which the error message begins with.

    Raises:
        ConfigError: a value differs between ranks; on every rank.
    """
    ranks = dist.get_world_size(group)
    if ranks == 1 or dist.get_backend(group) == "fake":  # the ranks of a fake group do not exist
        return
    by_rank: list[Any] = [None] * ranks
    dist.all_gather_object(by_rank, values, group)
    for rank, other in enumerate(by_rank):
        for name in by_rank[0] | other:
            first, value = by_rank[0].get(name), other.get(name)
            if value != first:
                raise ConfigError(
                    f"{what}: {name} is {first} on rank 0 and {value} on rank {rank}, "
                    "expected the same on all"
                )


def check_same_parameters(model: torch.nn.Module, group: dist.ProcessGroup) -> None:
    """Compare the bits of ``model``'s parameters, except DTensors, between the ranks of ``group``.

    Raises:
        ConfigError: a parameter differs; on every rank.
    """
    if name := _first_difference(model, group, lambda p: p):
        raise ConfigError(
            f"{name} differs between the ranks that share a batch; start with the same weights on all, "
            f"and {_AVERAGE}"
        )


def check_same_gradients(model: torch.nn.Module, group: dist.ProcessGroup) -> None:
    """Compare the bits of ``model``'s dense gradients, except DTensors, between the ranks of ``group``.

    Raises:
        ConfigError: a gradient differs, or only some ranks have it; on every rank.
    """
    if name := _first_difference(model, group, lambda p: p.grad):
        raise ConfigError(f"the gradient of {name} differs between the ranks that share a batch; {_AVERAGE}")


@torch.no_grad()
def _first_difference(
    model: torch.nn.Module, group: dist.ProcessGroup, of: Callable[[Tensor], Tensor | None]
) -> str:
    """Return the name of the first parameter p whose ``of(p)`` differs between ranks, "" if there is none."""
    # Each rank may have a part of its own of a DTensor.
    parameters = {name: p for name, p in model.named_parameters() if not is_dtensor(p)}
    sums = []
    for p in parameters.values():
        t = of(p)
        if t is None or t.layout != torch.strided:
            sums.append(torch.full((), -1 if t is None else 0, dtype=torch.int64, device=p.device))
        else:
            sums.append(checksum(t))
    if not sums:
        return ""
    own = torch.stack(sums)
    extremes = torch.stack([own, ~own])
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
    differing = (extremes[0] != ~extremes[1]).nonzero().flatten().tolist()
    return [*parameters][differing[0]] if differing else ""


def checksum(t: Tensor) -> Tensor:
    """Return a checksum ``()`` int64 of the bits of ``t`` in their order, computed on its device.

    On a CPU it is CRC-32. Elsewhere it is Σ wᵢ·bᵢ mod 2⁶⁴ of the bits bᵢ, as integers of at most 32 bits,
    with odd pseudo-random weights wᵢ.
    """
    flat = t.detach().contiguous().view(-1)
    if flat.is_cpu:
        return torch.tensor(zlib.crc32(flat.view(torch.uint8).numpy().data))
    return _weighted_sum(flat)


def _weighted_sum(flat: Tensor) -> Tensor:
    words = flat.view(_WORDS[flat.itemsize])
    weights = torch.arange(min(len(words), _CHUNK), device=words.device) * _FACTOR
    weights = (weights ^ (weights >> 32)) | 1
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for chunk in words.split(_CHUNK):
        total = total * _FACTOR + (chunk * weights[: len(chunk)]).sum()
    return total


def check_shape(t: Tensor, group: dist.ProcessGroup) -> None:
    """Compare the shape and dtype of ``t`` with the other ranks', unless ``group`` has sent them before.

    gloo would abort processes that send different shapes. The ranks exchange their shapes through the group's
    store, which adds no collective, and each shape is checked once. Two limits: different shapes that have
    both been sent before are not found, and a rank with a new shape waits for the group's timeout if another
    rank's shape is known.

    Raises:
        ConfigError: the ranks are about to send different shapes; on every rank.
    """
    if torch.compiler.is_compiling() or dist.get_backend(group) == "fake":
        return
    sent = _sent.setdefault(group, _SentShapes())
    sent.calls += 1
    mine = f"{tuple(t.shape)} {t.dtype}"
    if mine in sent.shapes:
        return
    store, rank = group.get_group_store(), group.rank()
    store.set(f"shape/{sent.calls}/{rank}", mine)
    for other in range(group.size()):
        theirs = store.get(f"shape/{sent.calls}/{other}").decode()
        if theirs != mine:
            raise ConfigError(
                f"ranks of a group send different shapes: {mine} on rank {rank}, {theirs} on rank {other}"
            )
    sent.shapes.add(mine)


@dataclass
class _SentShapes:
    """Number of checks of a group, and the shapes that all its ranks have sent."""

    calls: int = 0
    shapes: set[str] = field(default_factory=set)


_sent: WeakKeyDictionary[dist.ProcessGroup, _SentShapes] = WeakKeyDictionary()
