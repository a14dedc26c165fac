# SPDX-License-Identifier: MIT
"""Check that all ranks agree before a collective.

Without these checks a rank would wait for another rank until the timeout, or gloo would abort both.
"""

import zlib
from collections.abc import Mapping
from datetime import timedelta
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from torchpar.errors import ConfigError
from torchpar.library.sharding import is_dtensor
from torchpar.parallel.launch.rank_info import first_difference


def check_same_on_all_ranks(
    group: dist.ProcessGroup | None, what: str, values: Mapping[str, object]
) -> None:
    """Compare ``values``, by name, between the ranks of ``group``, None for all ranks.

    Args:
        what: a noun for the values, with which the error message begins.

    Raises:
        ConfigError: a value differs between ranks; on every rank.
    """
    if difference := first_difference(_of_all_ranks(group, values)):
        raise ConfigError(f"{what}: {difference[1]}, expected the same on all")


AVERAGE = (
    "start with the same weights on all, and average the gradients before optimizer.step(), for "
    "example by DistributedDataParallel (with find_unused_parameters=True if a parameter gets no "
    "gradient)"
)


def check_same_bits(
    group: dist.ProcessGroup | None, tensors: Mapping[str, Tensor | None], remedy: str = AVERAGE
) -> None:
    """Compare replicas, by name, between the ranks of ``group``.

    Replicas are dense tensors, except DTensors, or None.

    Args:
        group: None for all ranks.
        remedy: what to do about a difference, with which the error message ends.

    Raises:
        ConfigError: a tensor differs, or only some ranks have it; on every rank.
    """
    digests = {
        name: checksum(t)
        for name, t in tensors.items()
        if t is not None and t.layout == torch.strided and not is_dtensor(t)
    }
    if difference := first_difference(_of_all_ranks(group, digests)):
        raise ConfigError(f"{difference[0]} differs between ranks; {remedy}")


def checksum(t: Tensor) -> int:
    """Return the CRC-32 of the bits of ``t`` in order. A GPU's tensor is copied to the host."""
    return zlib.crc32(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def _of_all_ranks(
    group: dist.ProcessGroup | None, values: Mapping[str, object]
) -> list[Mapping[str, object]]:
    ranks = dist.get_world_size(group)
    if ranks == 1 or dist.get_backend(group) == "fake":  # the ranks of a fake group do not exist
        return [values]
    by_rank: list[Mapping[str, object]] = [{}] * ranks
    dist.all_gather_object(by_rank, values, group)
    return by_rank


def check_shape(t: Tensor, group: dist.ProcessGroup) -> None:
    """Compare shape and dtype of ``t`` between ranks, unless ``group`` has sent them before.

    gloo would abort processes that send different shapes. Two limits: different shapes that have
    both been sent before are not found, and a rank with a new shape waits for the group's timeout
    if another rank's shape is known.

    Raises:
        ConfigError: the ranks are about to send different shapes; on every rank.
    """
    if torch.compiler.is_compiling() or dist.get_backend(group) == "fake":
        return
    checked, mine = _checked.setdefault(group, []), f"{tuple(t.shape)} {t.dtype}"
    if mine in checked:
        return
    checked.append("")  # a shape that is refused is checked again, under another key
    _compare_in_store(
        mine, group, f"shape/{len(checked)}", "ranks of a group send different shapes"
    )
    checked[-1] = mine


def check_same_each_time(mine: str, group: dist.ProcessGroup, what: str, timeout: float) -> None:
    """Compare ``mine`` with the values of the other ranks, which make as many calls.

    The comparison is not a collective. Between two processes on one machine it takes about 50 µs.

    Args:
        what: the fault if the values differ, with which the error message begins.
        timeout: seconds after which a rank that waits for another rank gives up.

    Raises:
        ConfigError: the values differ; on every rank.
    """
    if dist.get_backend(group) == "fake":
        return
    number = _calls[group] = _calls.get(group, 0) + 1
    _compare_in_store(mine, group, f"call/{number}", what, timedelta(seconds=timeout))
    if number > 1:  # all ranks have read the values of the previous call
        group.get_group_store().delete_key(f"call/{number - 1}/{group.rank()}")


def _compare_in_store(
    mine: str, group: dist.ProcessGroup, key: str, what: str, timeout: timedelta | None = None
) -> None:
    """Compare values through the group's store, under a key that no earlier comparison had."""
    store, rank = group.get_group_store(), group.rank()
    keys = [f"{key}/{other}" for other in range(group.size())]
    store.set(keys[rank], mine)
    if timeout is not None:
        store.wait(keys, timeout)
    for other, value in enumerate(store.multi_get(keys)):
        if value.decode() != mine:
            raise ConfigError(f"{what}: {mine} on rank {rank}, {value.decode()} on rank {other}")


_checked: WeakKeyDictionary[dist.ProcessGroup, list[str]] = WeakKeyDictionary()
_calls: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()
