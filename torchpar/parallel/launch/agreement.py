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
from torchpar.library import is_dtensor

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
            sums.append(-1 if t is None else 0)
        else:
            sums.append(checksum(t))
    if not sums:
        return ""
    own = torch.tensor(sums, device=next(model.parameters()).device)
    extremes = torch.stack([own, ~own])
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
    differing = (extremes[0] != ~extremes[1]).nonzero().flatten().tolist()
    return [*parameters][differing[0]] if differing else ""


def checksum(t: Tensor) -> int:
    """Return the CRC-32 of the bits of ``t`` in their order. A GPU's tensor is copied to the host."""
    return zlib.crc32(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


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
