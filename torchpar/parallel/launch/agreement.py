# SPDX-License-Identifier: MIT
"""Check that all ranks agree before a collective.

Without these checks a rank would wait for another until the timeout, or gloo would abort both.
"""

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from torchpar.errors import ConfigError


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


@torch.no_grad()
def check_same_parameters(model: torch.nn.Module, group: dist.ProcessGroup) -> None:
    """Compare the bits of ``model``'s parameters between the ranks of ``group``, by a sum of their bytes.

    Raises:
        ConfigError: a parameter differs; on every rank.
    """
    names = [name for name, _ in model.named_parameters()]
    if not names:
        return
    bits = [p.flatten().view(torch.uint8).sum(dtype=torch.int64) for p in model.parameters()]
    sums = torch.stack(bits)
    extremes = torch.stack([sums, -sums])
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
    if differing := (extremes[0] != -extremes[1]).nonzero().flatten().tolist():
        raise ConfigError(
            f"{names[differing[0]]} differs between the ranks that share a batch; start with the same "
            "weights on all, and average their gradients before optimizer.step(), for example by "
            "DistributedDataParallel (with find_unused_parameters=True if a parameter gets no gradient)"
        )


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
