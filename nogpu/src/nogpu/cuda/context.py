# SPDX-License-Identifier: MIT
"""A context of CUDA on a CPU: streams, pools and faults, as captures and graphs share them."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch

from nogpu.cuda.captured_gradients import Uses
from nogpu.cuda.graph_memory import GraphState, Line, Pool
from nogpu.cuda.host_copies import NOT_PERMITTED
from nogpu.cuda.operations import OperatorKind
from nogpu.cuda.streams import Stream, Streams
from nogpu.cuda.types import Operator, PoolHandle
from nogpu.record.faults import HostFault, Kind
from nogpu.record.source import program_line
from nogpu.triton.emulator import Emulator


class CaptureState:
    """State of a capture under way, for the work on streams.

    Attributes:
        line: of the program, that began it.
        origin: the stream on which it began.
        streams: whose work is captured.
        has_failed: whether the program has done what a capture forbids.
    """

    def __init__(self, origin: Stream, line: Line):
        self.origin, self.line = origin, line
        self.streams = {origin}
        self.has_failed = False


C = TypeVar("C", bound=CaptureState)


class Context(Generic[C]):
    """Streams, pools, graphs and faults of one emulated GPU.

    Attributes:
        capture: the one under way.
        pools: by their handles.
        graphs: the captured ones.
        replays: the number of all graphs' replays.
        uses: what the program does with gradients outside of captures.
    """

    def __init__(self, emulator: Emulator):
        self.emulator, self.streams = emulator, Streams()
        self.capture: C | None = None
        self.pools: dict[tuple[int, ...], Pool] = {}
        self.graphs: weakref.WeakSet[GraphState] = weakref.WeakSet()
        self.replays = 0
        self.uses = Uses()
        self._noted: dict[object, int] = {}  # the replays before a fault was noted last
        self._kinds: dict[int, OperatorKind] = {}  # by the operators' numbers in Python

    def note(
        self,
        kind: Kind,
        name: str,
        message: str,
        line: Line,
        earlier: tuple[str, tuple[str, int]] | None = None,
        key: object = None,
    ) -> None:
        """Note a fault of the program at a line of it."""
        fault = HostFault(kind, name, message, source=line, earlier=earlier)
        place = (name, line, earlier, key)
        # A call such as .item() or print(t) reads several times: replays are counted.
        if not (self.emulator.is_noted(place) and self._noted.get(place) == self.replays):
            self.emulator.note(fault, place)
        self._noted[place] = self.replays

    def refuse(self, name: str, message: str, words: str = NOT_PERMITTED) -> None:
        """Note a fault, and raise an error, as a GPU does, with the words of PyTorch or CUDA."""
        line = program_line()
        if self.capture is not None:
            self.capture.has_failed = True
        begun = None if self.capture is None else self.capture.line
        self.note("error", name, message, line, None if begun is None else ("captured", begun))
        raise RuntimeError(f"{words}: {message}")

    @property
    def is_capturing(self) -> bool:
        """Whether the current stream's work is captured."""
        return self.captures(self.streams.current)

    def captures(self, stream: Stream) -> bool:
        return self.capture is not None and stream in self.capture.streams

    def kind_of(self, func: Operator) -> OperatorKind:
        found = self._kinds.get(id(func))
        if found is None:
            found = self._kinds[id(func)] = OperatorKind(func)
        return found

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """Let the block's operators change memory alone, without autograd and versions."""
        watcher, self.emulator.watcher = self.emulator.watcher, None
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
        try:
            with torch._C._AutoDispatchBelowAutograd(), torch._C._ExcludeDispatchKeyGuard(keys):
                yield
        finally:
            self.emulator.watcher = watcher

    def show_captured(self, is_shown: bool) -> None:
        """Show or hide what captures without a replay have computed, for another capture.

        That of a backward pass depends on what the capture of the forward pass has computed.
        """
        for graph in self.graphs:
            if graph.replays == 0:
                for memory in graph.memories:
                    if memory.graph is graph:
                        memory.show() if is_shown else memory.hide()

    def pool(self, handle: PoolHandle | torch.cuda.MemPool | None = None) -> Pool:
        """Return the pool of a handle, or a new one."""
        made = Pool()
        if isinstance(handle, torch.cuda.MemPool):
            handle = handle.id
        return self.pools.setdefault(made.handle if handle is None else tuple(handle), made)
