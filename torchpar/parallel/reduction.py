# SPDX-License-Identifier: MIT
"""Sums over the ranks of a mesh dimension: fast, or with the same bits for every number of ranks.

Floating-point addition is commutative, but not associative: a sum's bits depend on the order in which
its terms meet. "fast" leaves that order to the backend, which chooses it by the number of ranks.
"invariant" fixes it:

- every split axis (samples, features) is cut into `SHARDS` shards, whatever the number of ranks, and a
  rank computes its shards one by one, so that every product has the same shape everywhere;
- the shards' results meet in a balanced binary tree, ((0 + 1) + (2 + 3)), whose lower levels lie within
  a rank and whose upper ones are a butterfly between ranks: at distance 1, 2, … two ranks exchange
  their sums and both add them.

The ranks of each dimension are therefore 1, 2 or 4. The bits are equal for float32 on CPUs of one kind
with one number of threads. The price is smaller products, copies of the shards, and log₂p exchanges of
the whole tensor in the place of one all-reduce.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from torchpar.errors import ConfigError
from torchpar.parallel.agreement import check_shape

Reduction = Literal["fast", "invariant"]
SHARDS = 4  # of every split axis under "invariant"; as many ranks can share it


def tree_sum(terms: Sequence[Tensor]) -> Tensor:
    """The sum of a power-of-two number of terms, neighbours first."""
    while len(terms) > 1:
        terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=True)]
    return terms[0]


def all_reduce(t: Tensor, mesh: DeviceMesh, reduction: Reduction = "fast") -> Tensor:
    """``t`` summed over the ranks of ``mesh``, in place; returns ``t``."""
    start_all_reduce(t, mesh, reduction)()
    return t


def start_all_reduce(t: Tensor, mesh: DeviceMesh, reduction: Reduction = "fast") -> Callable[[], object]:
    """Begin `all_reduce`; what is returned waits for its end. An invariant one ends before it returns."""
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


def wire_device(t: Tensor, group: dist.ProcessGroup) -> torch.device:
    """Where ``t`` must be to be sent: gloo takes CUDA tensors for all-reduces and broadcasts alone."""
    return torch.device("cpu") if t.is_cuda and dist.get_backend(group) == "gloo" else t.device


def check_reduction(reduction: str, ranks: int) -> None:
    """Refuse a reduction for a dimension of so many ranks.

    Raises:
        ConfigError: it is unknown, or invariant and the ranks do not divide `SHARDS`.
    """
    if reduction not in ("fast", "invariant"):
        raise ConfigError(f"reduction is {reduction!r}, expected 'fast' or 'invariant'")
    if reduction == "invariant" and SHARDS % ranks:
        raise ConfigError(
            f"reduction 'invariant' takes 1, 2 or 4 ranks to a dimension of the mesh, not {ranks}"
        )
