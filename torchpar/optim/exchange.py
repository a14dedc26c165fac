# SPDX-License-Identifier: MIT
"""Messages of Muon on several ranks: the owner of each matrix gets it whole, and sends back the update.

The ranks of a group share the work: each one owns some of the matrices. A step makes two all-to-alls in
bfloat16. The first sends the parts of each matrix to its owner, and the second sends each rank its part of
the owner's result. Where every rank has the whole matrices, only the second is needed. The first message of a
step also says which gradients its sender has, and a checksum of its sender's arguments. So every rank notices
a missing gradient, or a learning rate that differs.
"""

import zlib
from collections.abc import Sequence
from enum import IntEnum
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from torchpar.errors import ConfigError
from torchpar.parts import Part
from torchpar.wire import wire_device

CHECKSUM_BYTES = 4  # each sent as a bfloat16, which holds the integers up to 256


class GradientState(IntEnum):
    """State of a matrix's gradient on one rank in this step."""

    ABSENT = 0
    PRESENT = 1
    EMPTY = 2  # this rank holds no element of the matrix
    MISPLACED = 3  # a DTensor whose placements are not the matrix's
    SPARSE = 4


Matrix = tuple[str, Part, str]  # the name, this rank's part, and a text that must be the same on all ranks


class Message(NamedTuple):
    """A part of ``matrix``, an index, on its way between two ranks of a group."""

    source: int
    target: int
    matrix: int
    part: Part


_Route = tuple[list[list[Message]], list[list[Message]]]


class Exchange:
    """The owners of matrices, and the messages between them and the ranks that hold parts.

    All ranks of the group make it, and call its methods in the same order.

    Args:
        costs: of each matrix the work of its update.
        device: of the matrices.

    Attributes:
        owned: the indices of the matrices that this rank owns.

    Raises:
        ConfigError: the ranks have different matrices, or their parts do not make a whole; on every rank.
    """

    def __init__(
        self, group: dist.ProcessGroup, matrices: list[Matrix], costs: Sequence[int], device: torch.device
    ):
        self.group, self.device, self.rank = group, device, dist.get_rank(group)
        self.names, self.parts, _ = zip(*matrices, strict=True)
        by_rank = self._gather_objects(matrices)
        _check_same(by_rank)
        owners = assign_owners(costs, len(by_rank))
        self.owned = [i for i, owner in enumerate(owners) if owner == self.rank]
        parts_of_all = [[part for _, part, _ in of_ranks] for of_ranks in zip(*by_rank, strict=True)]
        to_owners, to_all = messages(self.names, parts_of_all, owners)
        self._to_owners = self._route(to_owners) if to_owners else None
        self._to_all = self._route(to_all)

    def _route(self, messages: list[Message]) -> _Route:
        """This rank's messages to each rank, and from each rank."""
        ranks = range(self.group.size())
        sends = [[m for m in messages if (m.source, m.target) == (self.rank, r)] for r in ranks]
        return sends, [[m for m in messages if (m.source, m.target) == (r, self.rank)] for r in ranks]

    def gather(
        self, parts: dict[int, Tensor], gradients: Sequence[GradientState], arguments: dict[str, Any]
    ) -> dict[int, Tensor]:
        """Return the matrices that this rank owns, by index.

        Args:
            parts: this rank's parts of the matrices that it has a gradient of, by index.
            gradients: the state of each gradient on this rank.
            arguments: the optimizer's in this step, which must be the same on all ranks.

        Raises:
            ConfigError: as `check_gradients`, or arguments that differ; on every rank.
        """
        self._arguments = arguments
        checksum = zlib.crc32(repr(arguments).encode()).to_bytes(CHECKSUM_BYTES, "little")
        self._flags = torch.tensor([*gradients, *checksum], dtype=torch.bfloat16, device=self.device)
        self._present = [gradient == GradientState.PRESENT for gradient in gradients]
        incoming = self._send(self._to_owners, parts) if self._to_owners else []
        whole = {}
        for i in self.owned:
            if self._present[i]:
                whole[i] = torch.empty(self.parts[i].whole, dtype=torch.bfloat16, device=self.device)
                if i in parts:
                    self.parts[i].narrow(whole[i]).copy_(parts[i])
        for message, t in incoming:
            if message.matrix in whole:
                message.part.narrow(whole[message.matrix]).copy_(t)
        return whole

    def scatter(self, results: dict[int, Tensor]) -> dict[int, Tensor]:
        """Return this rank's part of the result of each matrix that takes part, given those that it owns.

        Raises:
            ConfigError: as `gather`, if all ranks have the whole matrices.
        """
        incoming = self._send(self._to_all, results, narrow=True)
        parts = {message.matrix: t for message, t in incoming if self._present[message.matrix]}
        return parts | {i: self.parts[i].narrow(result) for i, result in results.items()}

    def _send(
        self, route: _Route, tensors: dict[int, Tensor], narrow: bool = False
    ) -> list[tuple[Message, Tensor]]:
        """Send parts, and once a step this rank's flags, by one all-to-all; return what arrives.

        The tensors are parts by matrix, or whole matrices to ``narrow``. Zeros are sent for missing ones.
        """
        wire = wire_device(self._flags, self.group)
        flags, self._flags = self._flags.to(wire), self._flags[:0]

        def flat(message: Message) -> Tensor:
            t = tensors.get(message.matrix)
            if t is None:
                return flags.new_zeros(message.part.numel)
            return (message.part.narrow(t) if narrow else t).to(wire, torch.bfloat16).flatten()

        sends, receives = route
        counts = [len(flags) * (r != self.rank) for r in range(len(sends))]
        blocks = [torch.cat([flags[:n], *map(flat, of)]) for n, of in zip(counts, sends, strict=True)]
        lengths = [n + sum(m.part.numel for m in of) for n, of in zip(counts, receives, strict=True)]
        received = flags.new_empty(sum(lengths))
        dist.all_to_all_single(received, torch.cat(blocks), lengths, list(map(len, blocks)), group=self.group)
        flags_by_rank, incoming = [], []
        for n, block, of_rank in zip(counts, received.split(lengths), receives, strict=True):
            first, *parts = block.split([n, *(m.part.numel for m in of_rank)])
            flags_by_rank.append(first if n else flags)
            incoming += [
                (m, t.view(m.part.size).to(self.device)) for m, t in zip(of_rank, parts, strict=True)
            ]
        if len(flags):
            self._check(torch.stack(flags_by_rank).tolist())
        return incoming

    def _check(self, by_rank: list[list[float]]) -> None:
        """Check the flags of all ranks, and find the matrices that take part in this step."""
        ranks = dist.get_process_group_ranks(self.group)
        checksums = [flags[len(self.names) :] for flags in by_rank]
        if any(checksum != checksums[0] for checksum in checksums):
            _check_arguments(self.names[0], self._gather_objects(self._arguments), ranks)
        self._present = check_gradients(self.names, by_rank, ranks)

    def _gather_objects(self, own: Any) -> list[Any]:
        by_rank: list[Any] = [None] * self.group.size()
        dist.all_gather_object(by_rank, own, self.group)
        return by_rank


def check_gradients(
    names: Sequence[str], by_rank: Sequence[Sequence[float]], ranks: Sequence[int]
) -> list[bool]:
    """Return which matrices take part in a step, by the states of their gradients on each of ``ranks``.

    Raises:
        ConfigError: a gradient that only some ranks have, or one that is sparse or misplaced.
    """
    present = []
    for name, *states in zip(names, *by_rank, strict=False):
        rank_of = dict(zip(reversed(states), reversed(ranks), strict=True))  # the first rank of each state
        if (rank := rank_of.get(GradientState.SPARSE)) is not None:
            raise ConfigError(f"Muon: {name} has a sparse gradient on rank {rank}, expected a dense one")
        if (rank := rank_of.get(GradientState.MISPLACED)) is not None:
            raise ConfigError(
                f"Muon: {name} has a gradient of other placements than its own on rank {rank}; before the "
                "step, redistribute p.grad to p.placements"
            )
        having, lacking = (rank_of.get(s) for s in (GradientState.PRESENT, GradientState.ABSENT))
        if having is not None and lacking is not None:
            raise ConfigError(
                f"Muon: {name} has a gradient on rank {having} and none on rank {lacking}, expected the same "
                "on all; let every rank's loss depend on it"
            )
        present.append(having is not None)
    return present


def assign_owners(costs: Sequence[int], ranks: int) -> list[int]:
    """The owner of each matrix: the most costly first, each to the least loaded rank."""
    owners = [0] * len(costs)
    loads = [0] * ranks
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += costs[i]
    return owners


def messages(
    names: Sequence[str], parts: Sequence[Sequence[Part]], owners: Sequence[int]
) -> tuple[list[Message], list[Message]]:
    """The messages to the owners of matrices, and those back.

    Args:
        parts: of each matrix the parts of all ranks.

    Raises:
        ConfigError: the parts of a matrix do not make a whole.
    """
    to_owners, to_all = [], []
    for i, (name, of_ranks, owner) in enumerate(zip(names, parts, owners, strict=True)):
        holders: dict[Part, list[int]] = {}  # the ranks that have each part
        for rank, part in enumerate(of_ranks):
            if part.numel:
                holders.setdefault(part, []).append(rank)
        elements = sum(part.numel for part in holders)
        if elements != torch.Size(of_ranks[0].whole).numel():
            raise ConfigError(
                f"Muon: the ranks have {elements} elements of {name}, which has shape {of_ranks[0].whole}; "
                "expected a process_group of all ranks that have parts of it"
            )
        for part, ranks in holders.items():
            if owner not in ranks:
                to_owners.append(Message(ranks[i % len(ranks)], owner, i, part))
        to_all += [Message(owner, r, i, part) for r, part in enumerate(of_ranks) if r != owner]
    return to_owners, to_all


def _check_same(by_rank: list[list[Matrix]]) -> None:
    texts = [[f"{name} {part.whole} ({text})" for name, part, text in own] for own in by_rank]
    for rank, own in enumerate(texts):
        for first, other in zip_longest(texts[0], own, fillvalue="none"):
            if first != other:
                raise ConfigError(
                    "Muon: the ranks of its process group have different parameters: "
                    f"{first} on its rank 0, and {other} on its rank {rank}, expected the same in the same "
                    "order"
                )


def _check_arguments(name: str, by_rank: list[dict[str, Any]], ranks: Sequence[int]) -> None:
    for rank, own in zip(ranks, by_rank, strict=True):
        for argument, first in by_rank[0].items():
            if repr(first) != repr(own[argument]):
                raise ConfigError(
                    f"Muon: the {argument} of {name} is {first} on rank {ranks[0]} and {own[argument]} on "
                    f"rank {rank}, expected the same on all ranks that share it"
                )
