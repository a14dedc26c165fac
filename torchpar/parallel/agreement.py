# SPDX-License-Identifier: MIT
"""That ranks are about to do the same, before one waits for another or gloo aborts both."""

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from torchpar.errors import ConfigError


def group_of(mesh: DeviceMesh) -> dist.ProcessGroup:
    """The ranks of a mesh of one dimension.

    Raises:
        ConfigError: it has several.
    """
    if mesh.ndim != 1:
        raise ConfigError(f"mesh has dimensions {mesh.mesh_dim_names}, expected one, such as mesh['tp']")
    return mesh.get_group()


def check_alike(group: dist.ProcessGroup | None, what: str, values: dict[str, Any]) -> None:
    """Compare ``values``, by name, between the ranks of ``group``; ``what`` they are begins the message.

    Raises:
        ConfigError: a value is not the same on all ranks; on every one.
    """
    ranks = dist.get_world_size(group)
    if ranks == 1 or dist.get_backend(group) == "fake":  # the ranks of a fake group do not exist
        return
    of_ranks: list[Any] = [None] * ranks
    dist.all_gather_object(of_ranks, values, group)
    for rank, other in enumerate(of_ranks):
        for name in of_ranks[0] | other:
            first, value = of_ranks[0].get(name), other.get(name)
            if value != first:
                raise ConfigError(
                    f"{what}: {name} is {first} on rank 0 and {value} on rank {rank}, "
                    "expected the same on all"
                )


def check_shape(t: Tensor, group: dist.ProcessGroup) -> None:
    """Agree with the other ranks on the shape of what comes next, if it is one that was not sent before.

    Different shapes would abort the processes. The ranks tell each other through their store, so that no
    collective is added, and a shape costs its check once. Not caught are two shapes that were sent before;
    and a rank with a new shape waits, until the group's timeout, for one that takes its own for known.

    Raises:
        ConfigError: the ranks are about to send different shapes; on every rank.
    """
    if torch.compiler.is_compiling() or dist.get_backend(group) == "fake":
        return
    sent = _sent.setdefault(group, _Sent())
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
class _Sent:
    calls: int = 0
    shapes: set[str] = field(default_factory=set)


_sent: WeakKeyDictionary[dist.ProcessGroup, _Sent] = WeakKeyDictionary()
