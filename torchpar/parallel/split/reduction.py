# SPDX-License-Identifier: MIT
"""Sums over the ranks of a mesh dimension: fast, or with the same bits for every number of ranks.

Floating-point addition is commutative but not associative: the bits of a sum depend on the order of its
additions. With "fast" the backend chooses the order by the number of ranks. "invariant" fixes it:

- Every split axis (samples, features) is cut into `SHARDS` shards for any number of ranks. A rank computes
  its shards one by one, so that every product has the same shape on any number of ranks.
- A balanced binary tree adds the shards' results, ((0 + 1) + (2 + 3)). Its lower levels lie within a rank.
  Its upper levels are a butterfly between ranks: at distance 1, 2, … two ranks exchange their sums, and both
  add them.

A mesh dimension therefore has 1, 2 or 4 ranks. The bits are equal for float32 on CPUs of one kind with the
same number of threads. The cost: smaller products, copies of the shards, and log₂p exchanges of the whole
tensor instead of one all-reduce.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from torchpar.errors import ConfigError
from torchpar.parallel.launch.agreement import check_shape
from torchpar.parallel.wire import wire_device

Reduction = Literal["fast", "invariant"]
SHARDS = 4  # shards of every split axis if the reduction is invariant, and the largest number of ranks


def tree_sum(terms: Sequence[Tensor]) -> Tensor:
    """The sum of 1, 2, 4, … terms, added in pairs of neighbours."""
    while len(terms) > 1:
        terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=True)]
    return terms[0]


def all_reduce(t: Tensor, mesh: DeviceMesh, reduction: Reduction = "fast") -> Tensor:
    """``t`` summed over the ranks of ``mesh``, in place; returns ``t``."""
    start_all_reduce(t, mesh, reduction)()
    return t


def start_all_reduce(t: Tensor, mesh: DeviceMesh, reduction: Reduction = "fast") -> Callable[[], object]:
    """Start an `all_reduce` and return a function that waits for its end.

    An invariant reduction is complete when this function returns.

    Raises:
        ConfigError: the ranks pass different shapes (`torchpar.parallel.launch.agreement.check_shape`).
    """
    if mesh.size() == 1:
        return lambda: None
    group, rank = mesh.get_group(), mesh.get_local_rank()
    check_shape(t, group)
    if reduction == "fast":
        return dist.all_reduce(t, group=group, async_op=True).wait
    mine = t.to(wire_device(t, group))
    theirs = torch.empty_like(mine)
    for level in range(mesh.size().bit_length() - 1):
        peer = rank ^ (1 << level)
        exchange = [
            dist.P2POp(dist.isend, mine, group=group, group_peer=peer),
            dist.P2POp(dist.irecv, theirs, group=group, group_peer=peer),
        ]
        for work in dist.batch_isend_irecv(exchange):
            work.wait()
        mine += theirs
    t.copy_(mine)
    return lambda: None


def check_reduction(reduction: str, ranks: int) -> None:
    """Refuse a reduction that a mesh dimension of ``ranks`` ranks does not support.

    Raises:
        ConfigError: the reduction is unknown, or it is invariant and ``ranks`` does not divide `SHARDS`.
    """
    if reduction not in ("fast", "invariant"):
        raise ConfigError(f"reduction is {reduction!r}, expected 'fast' or 'invariant'")
    if reduction == "invariant" and SHARDS % ranks:
        raise ConfigError(
            f"reduction 'invariant' takes 1, 2 or 4 ranks to a dimension of the mesh, not {ranks}"
        )
