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
from dataclasses import dataclass, field
from typing import Literal
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from torchpar.errors import ConfigError

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


def check_shape(t: Tensor, group: dist.ProcessGroup) -> None:
    """Agree with the other ranks on the shape of what comes next, if it is one that was not sent before.

    Different shapes would abort the processes. The ranks tell each other through their store, so that no
    collective is added, and a shape costs its check once.

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


def wire_device(t: Tensor, group: dist.ProcessGroup) -> torch.device:
    """Where ``t`` must be to be sent: gloo takes CUDA tensors for all-reduces and broadcasts alone."""
    return torch.device("cpu") if t.is_cuda and dist.get_backend(group) == "gloo" else t.device


@dataclass(frozen=True)
class Partition:
    """How the ranks of a mesh dimension share an axis.

    The axis is cut into ``parts`` shards as `torch.tensor_split` cuts, so that any size goes; each rank
    takes ``parts / ranks`` consecutive ones.

    Attributes:
        size: of the whole axis.
        parts: shards: the ranks if the reduction is fast, `SHARDS` if it is invariant.
        ranks: how many share it.
        rank: this one.
    """

    size: int
    parts: int
    ranks: int
    rank: int

    @classmethod
    def of(cls, size: int, mesh: DeviceMesh, reduction: Reduction) -> "Partition":
        """
        Raises:
            ConfigError: a reduction that is unknown, or invariant over a number of ranks it does not know.
        """
        check_reduction(reduction, mesh.size())
        parts = mesh.size() if reduction == "fast" else SHARDS
        return cls(size, parts, mesh.size(), mesh.get_local_rank())

    def shards(self, rank: int | None = None) -> list[int]:
        """Sizes of the shards of a rank, by default this one."""
        each = self.parts // self.ranks
        first = (self.rank if rank is None else rank) * each
        return [self.size // self.parts + (i < self.size % self.parts) for i in range(first, first + each)]

    def widths(self) -> list[int]:
        """How much of the axis each rank has."""
        return [sum(self.shards(rank)) for rank in range(self.ranks)]

    def offset(self) -> int:
        """Where this rank's share begins."""
        return sum(self.widths()[: self.rank])

    def narrow(self, t: Tensor, dim: int) -> Tensor:
        """This rank's share of ``t``, whose axis ``dim`` is whole; a view."""
        return t.narrow(dim, self.offset(), sum(self.shards()))

    def split(self, t: Tensor, dim: int) -> list[Tensor]:
        """This rank's shards of ``t``, whose axis ``dim`` is this rank's share."""
        if self.parts == self.ranks:
            return [t]
        # A copy has the strides and the alignment that a rank with this shard alone would have, on
        # which a product's bits may depend.
        return [part.clone(memory_format=torch.contiguous_format) for part in t.split(self.shards(), dim)]


def check_reduction(reduction: str, ranks: int) -> None:
    """
    Raises:
        ConfigError: a reduction that is unknown, or invariant over a number of ranks it does not know.
    """
    if reduction not in ("fast", "invariant"):
        raise ConfigError(f"reduction is {reduction!r}, expected 'fast' or 'invariant'")
    if reduction == "invariant" and SHARDS % ranks:
        raise ConfigError(
            f"reduction 'invariant' takes 1, 2 or 4 ranks to a dimension of the mesh, not {ranks}"
        )
