# SPDX-License-Identifier: MIT
"""Messages of Muon on several ranks: shards of momenta to their owners, and results back.

The ranks of a group divide the work: each rank owns some of the parameters. A step makes two
all-to-alls in bfloat16, or in float32 in exact arithmetic. The first sends the shards of each
momentum to the parameter's owner, which orthogonalizes the unsharded momentum. The second sends
each rank its shard of the owner's result. Where the parameters are replicated, only the second is
needed. The first message of a step also has a checksum of the sender's arguments, and of the
gradients that the sender has. So every rank notices a missing gradient, or a learning rate that
differs.
"""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import permutations
from math import prod
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from torchpar.errors import ConfigError
from torchpar.optim.matrices import ParamInfo
from torchpar.optim.newton_schulz import dtype_of_updates
from torchpar.parallel.launch.agreement import check_same_on_all_ranks
from torchpar.parallel.split.parts import Part

# Four bytes, each a number of the messages' dtype: bfloat16 holds the integers up to 256.
_CHECKSUM_PART = Part((4,), (0,), (4,))


class Message(NamedTuple):
    """A shard of ``param`` on its way between two ranks; the checksum if ``param`` is None."""

    source: int
    target: int
    param: ParamInfo | None
    part: Part


# This rank's messages to each rank, and from each rank.
_Route = tuple[list[list[Message]], list[list[Message]]]


class Exchange:
    """The owners of parameters, and the messages between owners and the ranks that hold shards.

    All ranks of the group make an exchange, and call its methods in the same order.

    Args:
        group: the ranks that hold the parameters.

    Attributes:
        owned: the parameters that this rank owns.
        reads_later: whether a step learns in the next step that the ranks' arguments differed.

    Raises:
        ConfigError: on every rank: the ranks have different parameters, or their parts of a
            parameter do not add up to its size.
    """

    def __init__(self, group: dist.ProcessGroup, params: list[ParamInfo]):
        self.group, self.params = group, params
        self._sent: tuple[object, Tensor] | None = None  # the last checksum
        # The last step on a GPU: a tensor that says whether the checksums differed, the event after
        # which it can be read, and the facts.
        self._unread: tuple[Tensor, torch.cuda.Event | None, Mapping[str, object]] | None = None
        shards = [info.part._replace(mesh=None) for info in params]
        # gloo sends CUDA tensors in all-reduces and broadcasts only.
        by_gloo = dist.get_backend(group) == "gloo"
        self._wire = torch.device("cpu") if by_gloo else params[0].p.device
        self.reads_later = self._wire.type == "cuda"
        same = {f"parameter {i}": info.description for i, info in enumerate(params)}
        same["dtype of a step's messages"] = str(dtype_of_updates())
        check_same_on_all_ranks(group, "Muon", same)
        self.rank, by_rank = dist.get_rank(group), [shards] * group.size()
        dist.all_gather_object(by_rank, shards, group)
        owners = assign_owners([info.cost for info in params], len(by_rank))
        self.owned = [
            info for info, owner in zip(params, owners, strict=True) if owner == self.rank
        ]
        to_owners, to_all = self._messages(list(zip(*by_rank, strict=True)), owners)
        pairs = permutations(range(len(by_rank)), 2)
        first = to_owners or to_all
        first += [Message(*pair, None, _CHECKSUM_PART) for pair in pairs]
        self._to_owners, self._to_all = self._route(to_owners), self._route(to_all)

    def _messages(
        self, parts: Sequence[Sequence[Part]], owners: Sequence[int]
    ) -> tuple[list[Message], list[Message]]:
        """The messages to the owners and back, by the part of each parameter that a rank has."""
        to_owners, to_all = [], []
        for i, (info, of_ranks, owner) in enumerate(zip(self.params, parts, owners, strict=True)):
            holders: dict[Part, list[int]] = {}  # the ranks that have each part
            for rank, part in enumerate(of_ranks):
                if prod(part.size):
                    holders.setdefault(part, []).append(rank)
            check_whole_matrix(info, holders)
            for part, ranks in holders.items():
                if owner not in ranks:
                    to_owners.append(Message(ranks[i % len(ranks)], owner, info, part))
            to_all += [
                Message(owner, r, info, part) for r, part in enumerate(of_ranks) if r != owner
            ]
        return to_owners, to_all

    def _route(self, messages: list[Message]) -> _Route | None:
        """This rank's messages; None if no rank sends any."""
        if not messages:
            return None
        ranks = range(dist.get_world_size(self.group))
        sends = [[m for m in messages if (m.source, m.target) == (self.rank, r)] for r in ranks]
        return sends, [
            [m for m in messages if (m.source, m.target) == (r, self.rank)] for r in ranks
        ]

    def gather(
        self, parts: Mapping[ParamInfo, Tensor], facts: Mapping[str, object]
    ) -> dict[ParamInfo, Tensor]:
        """Return the unsharded momenta of the parameters that this rank owns, as they are sent.

        Args:
            parts: this rank's parts of the momenta of this step.
            facts: the values that must be the same on all ranks in this step, by a description.

        Raises:
            ConfigError: facts that differ; on every rank.
        """
        self.read()
        self._facts, self._present = facts, set(parts)
        full: dict[ParamInfo, Tensor] = {}
        dtype = dtype_of_updates()
        for info in self.owned:
            if (t := parts.get(info)) is None:
                continue
            if t.shape == info.part.whole and t.is_contiguous():
                full[info] = t.to(dtype, copy=True)
            else:
                full[info] = t.new_empty(info.part.whole, dtype=dtype)
                info.part.narrow(full[info]).copy_(t)
        for message, t in self._send(self._to_owners, parts):
            if message.param is not None and message.param in full:
                message.part.narrow(full[message.param]).copy_(t)
        return full

    def scatter(self, results: Mapping[ParamInfo, Tensor]) -> dict[ParamInfo, Tensor]:
        """Return this rank's part of the result of each parameter of this exchange.

        Args:
            results: the unsharded results that this rank owns, also of other exchanges.

        Raises:
            ConfigError: as `gather`, if the parameters are replicated.
        """
        sent = self._send(self._to_all, results)
        parts = {message.param: t for message, t in sent if message.param is not None}
        parts |= {info: info.part.narrow(results[info]) for info in self.owned if info in results}
        return {info: t for info, t in parts.items() if info in self._present}

    def _send(
        self, route: _Route | None, tensors: Mapping[ParamInfo, Tensor]
    ) -> list[tuple[Message, Tensor]]:
        """Send parts, and once a step the checksum, by one all-to-all; return what arrives.

        The tensors are shards, or unsharded. Zeros are sent for missing tensors.
        """
        if route is None:
            return []
        sends, receives = route
        device = self.params[0].p.device
        wire = torch.empty(0, dtype=dtype_of_updates(), device=self._wire)
        checksum = self._checksum(wire)

        def flat(message: Message) -> Tensor:
            t = checksum if message.param is None else tensors.get(message.param)
            if t is None:
                return wire.new_zeros(prod(message.part.size))
            return (
                (message.part.narrow(t) if t.shape == message.part.whole else t).to(wire).flatten()
            )

        outgoing = torch.cat([wire, *(flat(m) for of_rank in sends for m in of_rank)])
        sent, lengths = (
            [sum(prod(m.part.size) for m in of_rank) for of_rank in side] for side in route
        )
        received = wire.new_empty(sum(lengths))
        dist.all_to_all_single(received, outgoing, lengths, sent, group=self.group)
        messages = [m for of_rank in receives for m in of_rank]
        parts = received.split([prod(m.part.size) for m in messages])
        incoming = [*zip(messages, parts, strict=True)]
        checksums = [t for m, t in incoming if m.param is None]
        if checksums:
            self._compare(checksum, torch.stack(checksums))
        return [(m, t.view(m.part.size).to(device)) for m, t in incoming if m.param is not None]

    def _checksum(self, wire: Tensor) -> Tensor:
        """The checksum of this step's facts; made again only where they have changed."""
        number = zlib.crc32(repr(self._facts).encode())
        if self._sent is None or self._sent[0] != (number, wire.dtype):
            values = torch.tensor([*number.to_bytes(4)], dtype=wire.dtype, device="cpu")
            self._sent = (number, wire.dtype), values.to(wire.device)
        return self._sent[1]

    def _compare(self, checksum: Tensor, received: Tensor) -> None:
        """Raise a ConfigError if a rank sent another checksum.

        A GPU's values are read in the next step, when they have arrived, so that a step does not
        wait for the GPU; and not at all while a CUDA graph is captured, which repeats one step.
        """
        differ = received.ne(checksum).any()
        if not self.reads_later:
            if differ:
                check_same_on_all_ranks(self.group, "Muon", self._facts)
        elif not _is_capturing():
            found = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=differ.is_cuda)
            found.copy_(differ, non_blocking=True)
            arrived = torch.cuda.current_stream().record_event() if differ.is_cuda else None
            self._unread = found, arrived, self._facts

    def read(self) -> None:
        """Raise a ConfigError if the facts of the last step between GPUs differed; on every rank.

        A rank that is about to raise an error by itself calls this first: the others will wait for
        it in their next step.
        """
        if self._unread is None or _is_capturing():
            return
        (differ, arrived, facts), self._unread = self._unread, None
        if arrived is not None:
            arrived.synchronize()
        if differ:
            check_same_on_all_ranks(self.group, "Muon", facts)


def check_whole_matrix(info: ParamInfo, parts: Iterable[Part]) -> None:
    """Raise a ConfigError unless the different parts of a parameter add up to its size."""
    elements = sum(prod(part.size) for part in parts)
    if elements != prod(info.part.whole):
        raise ConfigError(
            f"Muon: the ranks have {elements} elements of {info.name}, which has shape "
            f"{info.part.whole}; expected a process_group of all ranks that have parts of it"
        )


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def assign_owners(costs: Sequence[int], ranks: int) -> list[int]:
    """The owner of each parameter: the most costly first, always to the least loaded rank."""
    owners = [0] * len(costs)
    loads = [0] * ranks
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += costs[i]
    return owners
