# SPDX-License-Identifier: MIT
"""Check that all ranks agree before a collective.

Without these checks a rank would wait for another until the timeout, or gloo would abort both.
"""

import zlib
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
    if difference := _first_difference(group, values):
        name, first, rank, value = difference
        raise ConfigError(
            f"{what}: {name} is {first} on rank 0 and {value} on rank {rank}, expected the same on all"
        )


def check_same_parameters(model: torch.nn.Module, group: dist.ProcessGroup) -> None:
    """Compare the bits of ``model``'s parameters, except DTensors, between the ranks of ``group``.

    Raises:
        ConfigError: a parameter differs; on every rank.
    """
    if difference := _first_difference(group, {name: _bits(p) for name, p in model.named_parameters()}):
        raise ConfigError(
            f"{difference[0]} differs between the ranks that share a batch; start with the same weights on "
            f"all, and {_AVERAGE}"
        )


def check_same_gradients(model: torch.nn.Module, group: dist.ProcessGroup) -> None:
    """Compare the bits of ``model``'s dense gradients, except DTensors, between the ranks of ``group``.

    Raises:
        ConfigError: a gradient differs, or only some ranks have it; on every rank.
    """
    if difference := _first_difference(group, {name: _bits(p.grad) for name, p in model.named_parameters()}):
        raise ConfigError(
            f"the gradient of {difference[0]} differs between the ranks that share a batch; {_AVERAGE}"
        )


def _first_difference(
    group: dist.ProcessGroup | None, values: dict[str, Any]
) -> tuple[str, Any, int, Any] | None:
    """The first name whose value is not that of rank 0; rank 0's value, the other rank, and its value."""
    ranks = dist.get_world_size(group)
    if ranks == 1 or dist.get_backend(group) == "fake":  # the ranks of a fake group do not exist
        return None
    by_rank: list[Any] = [None] * ranks
    dist.all_gather_object(by_rank, values, group)
    for rank, other in enumerate(by_rank):
        for name in by_rank[0] | other:
            first, value = by_rank[0].get(name), other.get(name)
            if value != first:
                return name, first, rank, value
    return None


def _bits(t: Tensor | None) -> int | None:
    """The checksum of ``t``, 0 for a sparse tensor, and for a DTensor, of which each rank may have a part."""
    if t is None:
        return None
    return checksum(t) if t.layout == torch.strided and not is_dtensor(t) else 0


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
    checked = _checked.setdefault(group, [])
    mine = f"{tuple(t.shape)} {t.dtype}"
    if mine in checked:
        return
    store, rank, key = group.get_group_store(), group.rank(), f"shape/{len(checked)}"
    checked.append("")  # what is refused is checked again, under another key
    store.set(f"{key}/{rank}", mine)
    for other in range(group.size()):
        theirs = store.get(f"{key}/{other}").decode()
        if theirs != mine:
            raise ConfigError(
                f"ranks of a group send different shapes: {mine} on rank {rank}, {theirs} on rank {other}"
            )
    checked[-1] = mine


_checked: WeakKeyDictionary[dist.ProcessGroup, list[str]] = WeakKeyDictionary()
