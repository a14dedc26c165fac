# SPDX-License-Identifier: MIT
"""Matrices whose parts lie on several ranks: an owner gets each one whole, and sends every rank its part.

The ranks of a group share the work: each one owns some of the matrices. A step makes two all-to-alls in
bfloat16. The first brings the parts of each matrix to its owner, and the second brings parts of the owner's
result to all ranks. If every rank has the whole matrices, there is no first. Each message says which
gradients its sender has, so that a rank without one is found on every rank.
"""

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from torchpar.errors import ConfigError
from torchpar.ops._library import is_dtensor
from torchpar.parallel.wire import wire_device

# Flags of a rank: it has no gradient of a matrix, or one, or no element that could have a gradient.
_ABSENT, _PRESENT, _EMPTY = 0.0, 1.0, 2.0


class Part(NamedTuple):
    """The part of a tensor of shape ``whole`` that a rank has: its first index and its size on each axis."""

    whole: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.size)

    def of(self, t: Tensor) -> Tensor:
        """This part of ``t``, which is whole; a view."""
        for dim, (start, size) in enumerate(zip(self.start, self.size, strict=True)):
            t = t.narrow(dim, start, size)
        return t


def part_of(p: Tensor) -> tuple[Part, Any]:
    """The part of ``p`` on this rank, and the mesh whose ranks have all of it, or None if this one has.

    Raises:
        ConfigError: a DTensor of partial sums.
    """
    split = getattr(p, "split_of_whole", None)
    if split is not None:
        whole, begin, axis = list(p.shape), [0] * p.dim(), split.axis
        whole[axis], begin[axis] = split.partition.size, split.partition.offset()
        return Part(tuple(whole), tuple(begin), tuple(p.shape)), split.mesh
    if not is_dtensor(p):
        return Part(tuple(p.shape), (0,) * p.dim(), tuple(p.shape)), None
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
    if any(placement.is_partial() for placement in placements):
        raise ConfigError(f"its placements are {placements}, expected Shard or Replicate")
    size, start = compute_local_shape_and_global_offset(p.shape, mesh, placements)
    return Part(tuple(p.shape), tuple(start), tuple(size)), mesh


def local(t: Tensor) -> Tensor:
    """This rank's elements of ``t``."""
    return t.to_local() if is_dtensor(t) else t  # type: ignore[attr-defined]


class _Message(NamedTuple):
    """A part of ``matrix``, an index, on its way between two ranks of a group."""

    source: int
    target: int
    matrix: int
    part: Part


class _Route:
    """The messages of one all-to-all, which are the same list on every rank.

    Args:
        flags: the number of flags that every rank sends every other one, before its parts.
    """

    def __init__(self, messages: list[_Message], group: dist.ProcessGroup, flags: int):
        self.group, self.flags = group, flags
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.sends = [
            [m for m in messages if (m.source, m.target) == (self.rank, r)] for r in range(self.ranks)
        ]
        self.receives = [
            [m for m in messages if (m.source, m.target) == (r, self.rank)] for r in range(self.ranks)
        ]

    def run(
        self, take: Callable[[_Message], Tensor | None], flags: Tensor, device: torch.device
    ) -> tuple[list[tuple[_Message, Tensor]], list[Tensor]]:
        """Send ``take(message)``, or zeros for None; return what arrived, and the flags of each rank."""
        wire = wire_device(flags, self.group)
        flags = flags[: self.flags].to(wire)
        blocks = [
            torch.cat([flags, *(self._flat(take(m), m, wire) for m in messages)])
            if rank != self.rank
            else flags[:0]
            for rank, messages in enumerate(self.sends)
        ]
        lengths = [
            self.flags * (rank != self.rank) + sum(m.part.shape.numel() for m in messages)
            for rank, messages in enumerate(self.receives)
        ]
        arrived = flags.new_empty(sum(lengths))
        dist.all_to_all_single(arrived, torch.cat(blocks), lengths, list(map(len, blocks)), group=self.group)
        incoming, everyone = [], []
        for block, messages in zip(arrived.split(lengths), self.receives, strict=True):
            sizes = [m.part.shape.numel() for m in messages]
            first, *parts = block.split([len(block) - sum(sizes), *sizes])
            everyone.append(first if len(first) else flags)
            incoming += [(m, t.view(m.part.shape).to(device)) for m, t in zip(messages, parts, strict=True)]
        return incoming, everyone

    @staticmethod
    def _flat(t: Tensor | None, message: _Message, device: torch.device) -> Tensor:
        if t is None:
            return torch.zeros(message.part.shape.numel(), dtype=torch.bfloat16, device=device)
        return t.to(device, torch.bfloat16).flatten()


class Exchange:
    """The owners of matrices, and the messages that bring them parts and take back results.

    All ranks of the group make it, and call its methods in turn.

    Args:
        names, parts, settings, costs: of each matrix its name, this rank's part of it, a text that must be
            the same on all ranks, and the work that it makes.
        device: of the matrices.

    Attributes:
        mine: the indices of the matrices that this rank owns.
        present: whether each matrix takes part in this step; of a rank without elements, after `scatter`.

    Raises:
        ConfigError: the ranks have other matrices, or their parts do not make a whole; on every rank.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        names: Sequence[str],
        parts: Sequence[Part],
        settings: Sequence[str],
        costs: Sequence[int],
        device: torch.device,
    ):
        self.group, self.names, self.parts, self.device = group, names, parts, device
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        everyone: list[Any] = [None] * ranks
        dist.all_gather_object(everyone, list(zip(names, parts, settings, strict=True)), group)
        _check_same(everyone)
        owners = assign(costs, ranks)
        self.mine = [i for i, owner in enumerate(owners) if owner == rank]
        to_owners, to_all = [], []
        for i, owner in enumerate(owners):
            of_ranks = [of_all[i][1] for of_all in everyone]
            for part, holders in holders_of(names[i], of_ranks).items():
                if owner not in holders:
                    to_owners.append(_Message(holders[i % len(holders)], owner, i, part))
            to_all += [_Message(owner, r, i, part) for r, part in enumerate(of_ranks) if r != owner]
        # The first message of a step has the flags.
        self._to_owners = _Route(to_owners, group, len(names)) if to_owners else None
        self._to_all = _Route(to_all, group, 0 if to_owners else len(names))

    def gather(self, parts: Sequence[Tensor | None]) -> dict[int, Tensor]:
        """Return the matrices that this rank owns, by index.

        Args:
            parts: this rank's part of each matrix; None for one that takes no part in this step.

        Raises:
            ConfigError: a part is None on some ranks only; on every rank.
        """
        flags = [
            _EMPTY if not part.shape.numel() else _ABSENT if t is None else _PRESENT
            for t, part in zip(parts, self.parts, strict=True)
        ]
        self._flags = torch.tensor(flags, dtype=torch.bfloat16, device=self.device)
        self.present = [flag == _PRESENT for flag in flags]
        incoming: list[tuple[_Message, Tensor]] = []
        if self._to_owners is not None:
            incoming, everyone = self._to_owners.run(lambda m: parts[m.matrix], self._flags, self.device)
            self.present = self._agreed(everyone)
        whole = {}
        for i in self.mine:
            own = parts[i]
            if self.present[i]:
                whole[i] = torch.empty(self.parts[i].whole, dtype=torch.bfloat16, device=self.device)
                if own is not None:
                    self.parts[i].of(whole[i]).copy_(own)
        for message, t in incoming:
            if message.matrix in whole:
                message.part.of(whole[message.matrix]).copy_(t)
        return whole

    def scatter(self, results: dict[int, Tensor]) -> list[Tensor | None]:
        """Return this rank's part of each matrix's result; None for a matrix that took no part.

        Args:
            results: of the matrices that this rank owns, by index.

        Raises:
            ConfigError: as `gather`, if all ranks have the whole matrices.
        """

        def take(message: _Message) -> Tensor | None:
            return message.part.of(results[message.matrix]) if message.matrix in results else None

        incoming, everyone = self._to_all.run(take, self._flags, self.device)
        if self._to_owners is None:
            self.present = self._agreed(everyone)
        found = {message.matrix: t for message, t in incoming}
        found |= {i: self.parts[i].of(result) for i, result in results.items()}
        return [found[i] if present else None for i, present in enumerate(self.present)]

    def _agreed(self, everyone: list[Tensor]) -> list[bool]:
        """Whether each matrix takes part, by the flags of all ranks."""
        by_rank = torch.stack(everyone).tolist()
        present = []
        for name, flags in zip(self.names, zip(*by_rank, strict=True), strict=True):
            if _PRESENT in flags and _ABSENT in flags:
                has, lacks = (self._global_rank(flags.index(flag)) for flag in (_PRESENT, _ABSENT))
                raise ConfigError(
                    f"Muon: {name} has a gradient on rank {has} and none on rank {lacks}, expected the same "
                    "on all; let every rank's loss depend on it"
                )
            present.append(_PRESENT in flags)
        return present

    def _global_rank(self, rank: int) -> int:
        return dist.get_global_rank(self.group, rank)


def assign(costs: Sequence[int], ranks: int) -> list[int]:
    """The owner of each matrix: the most costly first, each to the least loaded rank."""
    owners = [0] * len(costs)
    loads = [0] * ranks
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += costs[i]
    return owners


def _check_same(everyone: list[list[tuple[str, Part, str]]]) -> None:
    for rank, of_rank in enumerate(everyone):
        matrices = [[(name, part.whole, text) for name, part, text in one] for one in (everyone[0], of_rank)]
        if matrices[0] != matrices[1]:
            differing = next(pair for pair in zip_longest(*matrices) if pair[0] != pair[1])
            first, other = (f"{one[0]} {one[1]} ({one[2]})" if one else "none" for one in differing)
            raise ConfigError(
                f"Muon: the ranks that share its work have other parameters: {first} on the first of them, "
                f"and {other} on number {rank}, expected the same in the same order"
            )


def holders_of(name: str, parts: Sequence[Part]) -> dict[Part, list[int]]:
    """The ranks that have each part of a matrix, for the ``parts`` of all ranks.

    Raises:
        ConfigError: the parts do not make a whole.
    """
    holders: dict[Part, list[int]] = {}
    for rank, part in enumerate(parts):
        if part.shape.numel():
            holders.setdefault(part, []).append(rank)
    found = sum(part.shape.numel() for part in holders)
    if found != torch.Size(parts[0].whole).numel():
        raise ConfigError(
            f"Muon: the ranks have {found} elements of {name}, which has shape {parts[0].whole}; expected a "
            "process_group of all ranks that have parts of it"
        )
    return holders
