# SPDX-License-Identifier: MIT
"""Work beside a capture: the thread that captures works on a stream that is not captured.

On a GPU such work runs at once, and no replay repeats it. It is right for a loader's copies, and
wrong where the program has forgotten to let the stream wait for the captured one.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nogpu.cuda import places
from nogpu.cuda.graph_memory import UNCAPTURED, Line
from nogpu.cuda.operations import tensors_in
from nogpu.cuda.streams import Stream
from nogpu.cuda.types import Operator
from nogpu.record.source import program_line
from nogpu.triton.torch_operators import EMPTY

COPIES = {torch.ops.aten.copy_, torch.ops.aten._to_copy, torch.ops.aten.clone}


@dataclass(eq=False)
class Work:
    """One operator or launch beside a capture.

    Attributes:
        number: its stream's number, and its own, which are those of its results.
        is_copy: whether it moves data alone, as a loader does.
        is_used: whether captured work takes its result, at ``used``.
    """

    stream: Stream
    number: tuple[int, int]
    line: Line
    is_copy: bool
    is_used: bool = False
    used: Line = None


@dataclass
class Beside:
    """The work beside one capture, in the thread that began it."""

    thread: int = field(default_factory=threading.get_ident)
    works: list[Work] = field(default_factory=list)

    def note(
        self,
        stream: Stream,
        number: tuple[int, int],
        func: Operator | None,
        args: Sequence[object],
        written: list[Tensor],
    ) -> None:
        """Note an operator or a launch, unless it only allocates, or fills an input from the host.

        Args:
            func: None for a launch.
        """
        is_on_device = any(places.mark_of(t) is True for t in written)
        if threading.get_ident() != self.thread or not is_on_device:
            return
        kind = None if func is None else func.overloadpacket
        is_fill = kind is torch.ops.aten.copy_
        if is_fill and not all(map(places.is_on_device, tensors_in(args[:2]))):
            return
        if kind in EMPTY:
            return
        work = Work(stream, number, program_line(), kind in COPIES)
        self.works.append(work)
        for t in written:
            setattr(t.untyped_storage(), UNCAPTURED, work)

    def use(self, storage: torch.UntypedStorage) -> tuple[int, int] | None:
        """Note that captured work takes memory; return the number of work beside that wrote it."""
        work: Work | None = getattr(storage, UNCAPTURED, None)
        if work is None or work not in self.works:
            return None
        if not work.is_used:
            work.is_used, work.used = True, program_line()
        return work.number

    def on(self, stream: Stream) -> list[Work]:
        return [one for one in self.works if one.stream is stream]

    def faults(self) -> list[Work]:
        """Return one work for each stream: one that captured work needs, or that computes."""
        found: dict[Stream, Work] = {}
        for one in sorted(self.works, key=lambda one: not one.is_used):
            if one.is_used or not one.is_copy:
                found.setdefault(one.stream, one)
        return list(found.values())


def advice(stream: Stream) -> str:
    return f"{stream.name or 'other'}.wait_stream(torch.cuda.current_stream())"
