# SPDX-License-Identifier: MIT
"""Messages between ranks as they happen, without waiting for them."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from torchpar.parallel.split.shared_memory import SharedSum
from torchpar.training.profile.collectives import groups_of

if TYPE_CHECKING:
    from torchpar.parallel.launch.world import World

# Operators of PyTorch's process groups, by the names that `torch.distributed` gives them. The
# functional collectives of DTensors call them, too.
OPERATIONS = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "gather_": "gather",
    "scatter_": "scatter",
    "barrier": "barrier",
    "send": "send",
    "recv_": "recv",
}
# A key that every call passes on every device, and for which these operators have no kernel.
_KEY = "BackendSelect"
_BELOW = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.BackendSelect)


@dataclass(eq=False)
class Sent:
    """A message of this rank.

    Attributes:
        operation: such as "all_reduce", "send" or "recv".
        dimension: of the mesh, "" for a group that is none of its dimensions.
        ranks: that take part. Of a send or a receive: the sender and the receiver.
        number: among the messages of these ranks in this step, from 0.
        start, end: marks of the clock; ``end`` is None until the message is complete.
        nbytes: of this rank's tensors.
        tensors: while the message is new, for `about` to read.
        about, line: the tensor's name, and the line of the program.
    """

    operation: str
    dimension: str
    ranks: tuple[int, ...]
    number: int
    start: Any
    nbytes: int
    tensors: list[Tensor]
    end: Any = None
    about: str = ""
    line: str = ""


class MessageWatch:
    """Call back for each message, and for each wait, while the context is active.

    Args:
        now: returns a mark of the clock.
        began: is called with each message.
        waits: is called with a message and True before Python waits for it, and False afterwards.
        world: its mesh names the dimensions; without it all ranks are on "dp".
    """

    def __init__(
        self,
        now: Callable[[], Any],
        began: Callable[[Sent], None],
        waits: Callable[[Sent, bool], None],
        world: "World | None" = None,
    ):
        self._now, self._began, self._waits = now, began, waits
        self.is_on = False
        self._numbers: Counter[tuple[object, ...]] = Counter()
        self._pending: dict[int, tuple[dist.Work, Sent]] = {}  # by the Work's id
        self._results: dict[int, Sent] = {}  # by the address of the first tensor that it fills
        groups = [*groups_of(world)]
        self._dimensions = {group.group_name: name for name, group in groups}
        self._ranks: dict[str, tuple[int, ...]] = {}  # of each group
        self._ranks_of_dp: tuple[int, ...] = ()
        for name, group in groups:
            if name == "dp":
                self._ranks_of_dp = self._ranks_of(group)
        self._active = ExitStack()

    def new_step(self) -> None:
        """Number the messages from 0 again."""
        self._numbers.clear()
        self._pending.clear()
        self._results.clear()

    def __enter__(self) -> "MessageWatch":
        library = torch.library.Library("c10d", "IMPL")
        self._active.callback(library._destroy)
        for name in OPERATIONS:
            op = getattr(torch.ops.c10d, name).default
            library.impl(name, partial(self._message, op, name), _KEY, with_keyset=True)
        functional = torch.library.Library("_c10d_functional", "IMPL")
        self._active.callback(functional._destroy)
        waits = partial(self._functional_wait, torch.ops._c10d_functional.wait_tensor.default)
        functional.impl("wait_tensor", waits, _KEY, with_keyset=True)
        self._wait = dist.Work.wait
        self._active.callback(setattr, dist.Work, "wait", self._wait)
        watch = self

        def wait(work: dist.Work, *args: Any, **kwargs: Any) -> Any:
            return watch._watched_wait(work, *args, **kwargs)

        dist.Work.wait = wait  # type: ignore[method-assign, assignment]
        self._active.callback(setattr, SharedSum, "watch", SharedSum.watch)
        SharedSum.watch = self._shared_sum
        return self

    def __exit__(self, *error: object) -> None:
        self._active.close()

    def _new(
        self, operation: str, dimension: str, ranks: tuple[int, ...], tensors: list[Tensor]
    ) -> Sent:
        # A rank's sends to another and the other's receives have the same numbers.
        kind = "p2p" if operation in ("send", "recv") else operation
        number = self._numbers[kind, ranks]
        self._numbers[kind, ranks] += 1
        nbytes = sum(t.nbytes for t in tensors)
        sent = Sent(operation, dimension, ranks, number, self._now(), nbytes, tensors)
        self._began(sent)
        sent.tensors = []
        return sent

    def _message(
        self, op: Any, name: str, keyset: torch.DispatchKeySet, *args: Any, **kwargs: Any
    ) -> Any:
        if not self.is_on:
            return op.redispatch(keyset & _BELOW, *args, **kwargs)
        group = next(dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject))
        if group.size() == 1:  # DistributedDataParallel calls it on one rank, too
            return op.redispatch(keyset & _BELOW, *args, **kwargs)
        operation = OPERATIONS[name]
        ranks = self._ranks_of(group)
        if operation in ("send", "recv"):
            mine, other = ranks[group.rank()], ranks[args[2]]
            ranks = (mine, other) if operation == "send" else (other, mine)
        tensors = args[1] if name == "allgather_" else args[0]
        found = [t for t in tree_leaves(tensors) if isinstance(t, Tensor)]
        sent = self._new(operation, self._dimensions.get(group.group_name, ""), ranks, found)
        result = op.redispatch(keyset & _BELOW, *args, **kwargs)
        last = result[-1] if isinstance(result, tuple) else result
        work = dist.Work.unbox(last)
        self._pending[id(work)] = work, sent  # the Work lives on, and so its id is no other's
        if found:
            self._results[found[0].data_ptr()] = sent
        if operation in ("send", "recv") and group.name() == "gloo":
            return result  # it has no future; Python waits for it
        with suppress(RuntimeError):
            work.get_future().add_done_callback(lambda _: setattr(sent, "end", self._now()))
        return result

    def _ranks_of(self, group: dist.ProcessGroup) -> tuple[int, ...]:
        name = group.group_name
        if name not in self._ranks:
            self._ranks[name] = tuple(dist.get_process_group_ranks(group))
        return self._ranks[name]

    def _watched_wait(self, work: dist.Work, *args: Any, **kwargs: Any) -> Any:
        _, sent = self._pending.get(id(work), (None, None))
        if sent is None or not self.is_on:
            return self._wait(work, *args, **kwargs)
        self._waits(sent, True)
        try:
            return self._wait(work, *args, **kwargs)
        finally:
            sent.end = sent.end or self._now()
            self._waits(sent, False)

    def _functional_wait(self, op: Any, keyset: torch.DispatchKeySet, result: Tensor) -> Any:
        """Wait for the result of a functional collective, as DTensors do."""
        sent = self._results.get(result.data_ptr()) if self.is_on else None
        if sent is None:
            return op.redispatch(keyset & _BELOW, result)
        self._waits(sent, True)
        waited = op.redispatch(keyset & _BELOW, result)
        self._waits(sent, False)
        return waited

    @contextmanager
    def _shared_sum(self, nbytes: int) -> Iterator[None]:
        if not self.is_on:
            yield
            return
        sent = self._new("all_reduce", "dp", self._ranks_of_dp, [])
        sent.nbytes = nbytes
        self._waits(sent, True)
        try:
            yield
        finally:
            sent.end = self._now()
            self._waits(sent, False)
