# SPDX-License-Identifier: MIT
"""Messages of Muon on several ranks: the owner of each matrix gets it whole, and sends back the update.

The ranks of a group share the work: each one owns some of the matrices. A step makes two all-to-alls in
bfloat16. The first sends the parts of each matrix to its owner, and the second sends each rank its part of
the owner's result. Where every rank has the whole matrices, only the second is needed. The first message of a
step also says which gradients its sender has, so that every rank notices a missing one.
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
    """State of a matrix's gradient on one rank in this step."""

    ABSENT = 0
    PRESENT = 1
    EMPTY = 2  # this rank holds no element of the matrix
    NEEDS_REDISTRIBUTE = 3  # a DTensor whose placements are not the matrix's
    SPARSE = 4


PRESENT, SPARSE = GradientState.PRESENT, GradientState.SPARSE
NEEDS_REDISTRIBUTE = GradientState.NEEDS_REDISTRIBUTE


class Message(NamedTuple):
    """A part of ``matrix``, an index, on its way between two ranks of a group."""

    source: int
    target: int
    matrix: int
    part: Part


class _Route:
    """The messages of one all-to-all; every rank makes it from the same list.

    Args:
        flags: the number of flags that each rank sends to each other rank, before its parts.
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
        """Send ``take(message)``, or zeros for None; return what was received, and the flags by rank."""
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
        received = flags.new_empty(sum(lengths))
        dist.all_to_all_single(received, torch.cat(blocks), lengths, list(map(len, blocks)), group=self.group)
        incoming, flags_by_rank = [], []
        for block, messages in zip(received.split(lengths), self.receives, strict=True):
            sizes = [m.part.shape.numel() for m in messages]
            first, *parts = block.split([len(block) - sum(sizes), *sizes])
            flags_by_rank.append(first if len(first) else flags)
            incoming += [(m, t.view(m.part.shape).to(device)) for m, t in zip(messages, parts, strict=True)]
        return incoming, flags_by_rank

    @staticmethod
    def _flat(t: Tensor | None, message: Message, device: torch.device) -> Tensor:
        if t is None:
            return torch.zeros(message.part.shape.numel(), dtype=torch.bfloat16, device=device)
        return t.to(device, torch.bfloat16).flatten()


class Exchange:
    """The owners of matrices, and the messages between them and the ranks that hold parts.

    All ranks of the group make it, and call its methods in the same order.

    Args:
        names, parts, settings, costs: of each matrix its name, this rank's part of it, a text that must be
            the same on all ranks, and the work of its update.
        needs_redistribute: whether a gradient on this rank has other placements than its matrix.
        device: of the matrices.

    Attributes:
        owned: the indices of the matrices that this rank owns.
        redistributes: whether the ranks redistribute gradients before a step.
        present: whether each matrix takes part in this step; for a rank without elements, after `scatter`.

    Raises:
        ConfigError: the ranks have different matrices, or their parts do not make a whole; on every rank.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        names: Sequence[str],
        parts: Sequence[Part],
        settings: Sequence[str],
        costs: Sequence[int],
        needs_redistribute: bool,
        device: torch.device,
    ):
        self.group, self.names, self.parts, self.device = group, names, parts, device
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        by_rank: list[Any] = [None] * ranks
        own = (needs_redistribute, list(zip(names, parts, settings, strict=True)))
        dist.all_gather_object(by_rank, own, group)
        self.redistributes = any(needs_redistribute for needs_redistribute, _ in by_rank)
        by_rank = [matrices for _, matrices in by_rank]
        _check_same(by_rank)
        owners = assign_owners(costs, ranks)
        self.owned = [i for i, owner in enumerate(owners) if owner == rank]
        parts_of_all = [[matrices[i][1] for matrices in by_rank] for i in range(len(names))]
        to_owners, to_all = messages(names, parts_of_all, owners)
        # The first all-to-all of a step carries the flags.
        self._to_owners = _Route(to_owners, group, len(names)) if to_owners else None
        self._to_all = _Route(to_all, group, 0 if to_owners else len(names))

    def check_placements(self, gradients: Sequence[GradientState], placements: Sequence[str]) -> None:
        """Check that all ranks redistribute the same gradients, if any do; otherwise they would hang.

        Raises:
            ConfigError: as `gather`, or for gradients of different placements.
        """
        if self.redistributes:
            by_rank: list[Any] = [None] * dist.get_world_size(self.group)
            dist.all_gather_object(by_rank, (list(gradients), list(placements)), self.group)
            self._check_gradients([states for states, _ in by_rank])
            for i, name in enumerate(self.names):
                different = sorted({of_rank[i] for _, of_rank in by_rank})
                if len(different) > 1:
                    raise ConfigError(
                        f"Muon: {name} has gradients of the placements {' and '.join(different)}, expected "
                        "the same on all ranks"
                    )

    def gather(self, parts: Sequence[Tensor | None], gradients: Sequence[GradientState]) -> dict[int, Tensor]:
        """Return the matrices that this rank owns, by index.

        Args:
            parts: this rank's part of each matrix; None for one that takes no part in this step.
            gradients: the state of each gradient on this rank.

        Raises:
            ConfigError: a gradient that only some ranks have, or a sparse one; on every rank.
        """
        self._flags = torch.tensor(gradients, dtype=torch.bfloat16, device=self.device)
        self.present = [gradient in (PRESENT, NEEDS_REDISTRIBUTE) for gradient in gradients]
        incoming: list[tuple[Message, Tensor]] = []
        if self._to_owners is not None:
            incoming, flags = self._to_owners.run(lambda m: parts[m.matrix], self._flags, self.device)
            self.present = self._check_gradients(torch.stack(flags).tolist())
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

        incoming, flags = self._to_all.run(take, self._flags, self.device)
        if self._to_owners is None:
            self.present = self._check_gradients(torch.stack(flags).tolist())
        parts = {message.matrix: t for message, t in incoming}
        parts |= {i: self.parts[i].of(result) for i, result in results.items()}
        return [parts[i] if present else None for i, present in enumerate(self.present)]

    def _check_gradients(self, by_rank: Sequence[Sequence[float]]) -> list[bool]:
        """Check the states of all ranks' gradients; return whether each matrix takes part in this step."""
        present = []
        for name, states in zip(self.names, zip(*by_rank, strict=True), strict=True):
            rank_of: dict[float, int] = {}  # the first rank of each state
            for rank, state in enumerate(states):
                rank_of.setdefault(state, dist.get_global_rank(self.group, rank))
            if SPARSE in rank_of:
                rank = rank_of[SPARSE]
                raise ConfigError(f"Muon: {name} has a sparse gradient on rank {rank}, expected a dense one")
            having = [rank_of[state] for state in (PRESENT, NEEDS_REDISTRIBUTE) if state in rank_of]
            if having and GradientState.ABSENT in rank_of:
                lacking = rank_of[GradientState.ABSENT]
                raise ConfigError(
                    f"Muon: {name} has a gradient on rank {having[0]} and none on rank {lacking}, expected "
                    "the same on all; let every rank's loss depend on it"
                )
            if NEEDS_REDISTRIBUTE in rank_of and (len(rank_of) > 1 or not self.redistributes):
                raise ConfigError(
                    f"Muon: the gradient of {name} on rank {having[-1]} has other placements than {name}, "
                    "expected that either on all ranks from the first step on, or on none"
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


def _check_same(by_rank: list[list[tuple[str, Part, str]]]) -> None:
    for rank, own in enumerate(by_rank):
        matrices = [[(name, part.whole, text) for name, part, text in one] for one in (by_rank[0], own)]
        if matrices[0] != matrices[1]:
            differing = next(pair for pair in zip_longest(*matrices) if pair[0] != pair[1])
            first, other = (f"{one[0]} {one[1]} ({one[2]})" if one else "none" for one in differing)
            raise ConfigError(
                f"Muon: the ranks of its process group have different parameters: {first} on its rank 0, and "
                f"{other} on its rank {rank}, expected the same in the same order"
            )
