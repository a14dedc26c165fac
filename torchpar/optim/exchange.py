# SPDX-License-Identifier: MIT
"""The exchange of sharded matrices: an owner gets each one whole, and sends all ranks parts of the result.

The ranks of a group share the work: each one owns some of the matrices. A step makes two all-to-alls in
bfloat16. The first brings the parts of each matrix to its owner, and the second brings parts of the owner's
result to all ranks. If every rank has the whole matrices, there is no first. The first message of a step also
says which gradients its sender has, so that every rank notices a missing one.
"""

from collections.abc import Callable, Sequence
from enum import IntEnum
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from torchpar.errors import ConfigError
from torchpar.optim.parts import Part, holders_of
from torchpar.wire import wire_device


class GradientState(IntEnum):
    """What a rank has of a matrix's gradient in this step."""

    ABSENT = 0
    PRESENT = 1
    EMPTY = 2  # no element of the matrix
    MISPLACED = 3  # of other placements than the matrix, and all ranks redistribute it first
    SPARSE = 4


PRESENT, MISPLACED, SPARSE = GradientState.PRESENT, GradientState.MISPLACED, GradientState.SPARSE


class Message(NamedTuple):
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

    def __init__(self, messages: list[Message], group: dist.ProcessGroup, flags: int):
        self.group, self.flags = group, flags
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.sends = [
            [m for m in messages if (m.source, m.target) == (self.rank, r)] for r in range(self.ranks)
        ]
        self.receives = [
            [m for m in messages if (m.source, m.target) == (r, self.rank)] for r in range(self.ranks)
        ]

    def run(
        self, take: Callable[[Message], Tensor | None], flags: Tensor, device: torch.device
    ) -> tuple[list[tuple[Message, Tensor]], list[Tensor]]:
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
    def _flat(t: Tensor | None, message: Message, device: torch.device) -> Tensor:
        if t is None:
            return torch.zeros(message.part.shape.numel(), dtype=torch.bfloat16, device=device)
        return t.to(device, torch.bfloat16).flatten()


class Exchange:
    """The owners of matrices, and the messages that bring them parts and take back results.

    All ranks of the group make it, and call its methods in turn.

    Args:
        names, parts, settings, costs: of each matrix its name, this rank's part of it, a text that must be
            the same on all ranks, and the work that it makes.
        misplaced: whether this rank has a gradient of other placements than its matrix.
        device: of the matrices.

    Attributes:
        owned: the indices of the matrices that this rank owns.
        redistributes: whether the ranks redistribute gradients before a step.
        present: whether each matrix takes part in this step; for a rank without elements, after `scatter`.

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
        misplaced: bool,
        device: torch.device,
    ):
        self.group, self.names, self.parts, self.device = group, names, parts, device
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        everyone: list[Any] = [None] * ranks
        own = (misplaced, list(zip(names, parts, settings, strict=True)))
        dist.all_gather_object(everyone, own, group)
        self.redistributes = any(misplaced for misplaced, _ in everyone)
        everyone = [of_rank for _, of_rank in everyone]
        _check_same(everyone)
        owners = assign_owners(costs, ranks)
        self.owned = [i for i, owner in enumerate(owners) if owner == rank]
        parts_of_all = [[of_rank[i][1] for of_rank in everyone] for i in range(len(names))]
        to_owners, to_all = messages(names, parts_of_all, owners)
        # The first all-to-all of a step has the flags.
        self._to_owners = _Route(to_owners, group, len(names)) if to_owners else None
        self._to_all = _Route(to_all, group, 0 if to_owners else len(names))

    def agree(self, gradients: Sequence[GradientState], placements: Sequence[str]) -> None:
        """If gradients are redistributed, first check that all ranks will do so; others would hang.

        Raises:
            ConfigError: as `gather`, or for gradients of different placements.
        """
        if self.redistributes:
            everyone: list[Any] = [None] * dist.get_world_size(self.group)
            dist.all_gather_object(everyone, (list(gradients), list(placements)), self.group)
            self._agreed([of_rank for of_rank, _ in everyone])
            for name, found in zip(
                self.names, zip(*(of_rank for _, of_rank in everyone), strict=True), strict=True
            ):
                if len(set(found)) > 1:
                    raise ConfigError(
                        f"Muon: {name} has gradients of the placements {' and '.join(sorted(set(found)))}, "
                        "expected the same on all ranks"
                    )

    def gather(self, parts: Sequence[Tensor | None], gradients: Sequence[GradientState]) -> dict[int, Tensor]:
        """Return the matrices that this rank owns, by index.

        Args:
            parts: this rank's part of each matrix; None for one that takes no part in this step.
            gradients: what this rank has of each gradient.

        Raises:
            ConfigError: a gradient that only some ranks have, or a sparse one; on every rank.
        """
        self._flags = torch.tensor(gradients, dtype=torch.bfloat16, device=self.device)
        self.present = [gradient in (PRESENT, MISPLACED) for gradient in gradients]
        incoming: list[tuple[Message, Tensor]] = []
        if self._to_owners is not None:
            incoming, everyone = self._to_owners.run(lambda m: parts[m.matrix], self._flags, self.device)
            self.present = self._agreed(torch.stack(everyone).tolist())
        whole = {}
        for i in self.owned:
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

        def take(message: Message) -> Tensor | None:
            return message.part.of(results[message.matrix]) if message.matrix in results else None

        incoming, everyone = self._to_all.run(take, self._flags, self.device)
        if self._to_owners is None:
            self.present = self._agreed(torch.stack(everyone).tolist())
        found = {message.matrix: t for message, t in incoming}
        found |= {i: self.parts[i].of(result) for i, result in results.items()}
        return [found[i] if present else None for i, present in enumerate(self.present)]

    def _agreed(self, by_rank: Sequence[Sequence[float]]) -> list[bool]:
        """Whether each matrix takes part, by the states of all ranks' gradients."""
        present = []
        for name, states in zip(self.names, zip(*by_rank, strict=True), strict=True):
            rank_of: dict[float, int] = {}  # the first rank of each state
            for rank, state in enumerate(states):
                rank_of.setdefault(state, dist.get_global_rank(self.group, rank))
            if SPARSE in rank_of:
                rank = rank_of[SPARSE]
                raise ConfigError(f"Muon: {name} has a sparse gradient on rank {rank}, expected a dense one")
            having = [rank_of[state] for state in (PRESENT, MISPLACED) if state in rank_of]
            if having and GradientState.ABSENT in rank_of:
                lacking = rank_of[GradientState.ABSENT]
                raise ConfigError(
                    f"Muon: {name} has a gradient on rank {having[0]} and none on rank {lacking}, expected "
                    "the same on all; let every rank's loss depend on it"
                )
            if MISPLACED in rank_of and (len(rank_of) > 1 or not self.redistributes):
                raise ConfigError(
                    f"Muon: {name} has a gradient of other placements than its own on rank {having[-1]}, "
                    "expected so on all ranks and in all steps, or never"
                )
            present.append(bool(having))
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
        for part, holders in holders_of(name, of_ranks).items():
            if owner not in holders:
                to_owners.append(Message(holders[i % len(holders)], owner, i, part))
        to_all += [Message(owner, r, i, part) for r, part in enumerate(of_ranks) if r != owner]
    return to_owners, to_all


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
