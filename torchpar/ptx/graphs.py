# SPDX-License-Identifier: MIT
"""CUDA graphs on a CPU: a capture records operators and launches, and a replay executes them again.

    with emulate() as gpu, cuda_is_cpu(gpu):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = x.exp()
        x.copy_(new)
        graph.replay()

On a GPU nothing is computed during a capture. Here operators are, because their results' shapes are
needed; at the end of the capture all memory is as before, and the results hold no numbers.
"""

import copy
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from torchpar.ptx.driver import EMPTY, Emulator, is_plain
from torchpar.ptx.graph_memory import Line, Memory, Pool, Slot, poison
from torchpar.ptx.streams import Stream, Streams

ADVICE = "capture within `with torch.cuda.graph(graph):`, which takes a stream of its own"


def user_line() -> Line:
    """Return the file and the line of the program that is executed, outside of the libraries."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.partition(".")[0] not in LIBRARIES:
            return frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back
    return None


LIBRARIES = ("torch", "triton", "torchpar", "contextlib", "runpy")


def _and_cpu(devices: Callable[..., list[str]]) -> Callable[..., list[str]]:
    return lambda *args, **kwargs: [*devices(*args, **kwargs), "cpu"]


DEVICES = "_get_capturable_supported_devices"


class Operation:
    """An operator of PyTorch, or a launch, with what it takes in its places."""

    def __init__(self, call: Callable[..., Any], args: Any, kwargs: Any, results: list[Any]):
        self.call, self.args, self.kwargs, self.results = call, args, kwargs, results

    def __call__(self) -> None:
        made = self.call(*_filled(self.args), **_filled(self.kwargs))
        leaves = tree_leaves(made)
        for slot, new in zip(self.results, leaves, strict=False):
            if slot is not None:
                slot.tensor().copy_(new)
        for one in leaves:
            if isinstance(one, torch.ScriptObject) and hasattr(one, "wait"):
                one.wait()  # for a collective


def _filled(values: Any) -> Any:
    return tree_map(lambda one: one.tensor() if isinstance(one, Slot) else one, values)


def with_tensors(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return an argument of a launch, with other tensors: it may be a tuple or a descriptor."""
    if isinstance(value, (tuple, list)) and not hasattr(value, "base"):
        return tuple(with_tensors(one, change) for one in value)
    if isinstance(value, (Tensor, Slot)):
        return change(value)
    if isinstance(getattr(value, "base", None), (Tensor, Slot)):
        changed = copy.copy(value)
        changed.base = change(value.base)
        return changed
    return value


class Capture:
    """A capture under way."""

    def __init__(self, graphs: "Graphs", graph: Any, pool: Pool, line: Line):
        self.graphs, self.graph, self.pool, self.line = graphs, graph, pool, line
        self.origin = graphs.streams.current
        self.streams = {self.origin}
        self.operations: list[Operation] = []
        self.memories: dict[int, Memory] = {}  # by the storages' addresses in C++
        self.states: list[tuple[torch.Generator, Tensor]] = [
            (one, one.get_state()) for one in (torch.default_generator, *graph.generators)
        ]

    # Memory

    def memory(self, t: Tensor) -> Memory:
        """Return the memory of a tensor that the graph reads or writes."""
        storage = t.untyped_storage()
        found = self.memories.get(storage._cdata)
        if found is None:
            known = self.graphs.of_graphs.get(storage._cdata)
            found = known or Memory(storage, self.graph, None, keep=True, is_in_pool=False)
            self.memories[storage._cdata] = found
        return found

    def slot(self, value: Any) -> Any:
        if not is_plain(value) or not value.untyped_storage().nbytes():
            return value
        return Slot(value, self.memory(value))

    def adopted(self, result: Any, given: set[int]) -> Any:
        """Return results whose new memory belongs to the graph.

        Args:
            given: the storages of the operands, in C++.
        """
        made: dict[int, Any] = {}

        def adopt(value: Any) -> Any:
            if not is_plain(value):
                return value
            storage = value.untyped_storage()
            number = storage._cdata
            if number in given or number in self.memories or not storage.nbytes():
                return value
            if number not in made:
                memory = Memory(storage, self.graph, user_line(), keep=True, is_in_pool=True)
                made[number] = memory.given_out()
                self.pool.place(memory)
                self.memories[made[number]._cdata] = memory
                self.graphs.of_graphs[made[number]._cdata] = memory
            place = value.storage_offset(), value.size(), value.stride()
            return torch.empty(0, dtype=value.dtype).set_(made[number], *place)

        return tree_map(adopt, result)

    # What is recorded

    def operator(self, func: Any, args: Any, kwargs: Any) -> Any:
        operands = [t for t in tree_leaves((args, kwargs)) if is_plain(t)]
        given = {t.untyped_storage()._cdata for t in operands}
        slots = tree_map(self.slot, (args, kwargs))
        if func._schema.is_mutable:
            for t in operands:
                if t.untyped_storage().nbytes():
                    self.memory(t).keep_before()
        result = self.adopted(func(*args, **kwargs), given)
        results = [
            None if not is_plain(t) or t.untyped_storage()._cdata in given else self.slot(t)
            for t in tree_leaves(result)
        ]
        computes = any(isinstance(one, Slot) for one in results)
        if func._schema.is_mutable or (computes and func.overloadpacket not in EMPTY):
            self.operations.append(Operation(func, *slots, results))
        return result

    def launch(self, execute: Callable[..., None], arguments: Sequence[Any]) -> None:
        operands: list[Tensor] = []
        with_tensors(tuple(arguments), operands.append)
        outside = [self.memory(t) for t in operands if t.untyped_storage().nbytes()]
        outside = [one for one in outside if not one.is_in_pool and one.before is None]
        for one in outside:
            one.keep_before()
        execute(arguments)
        for one in outside:
            if one.before is not None and torch.equal(one.before, one.content):
                one.before = None
        slots = with_tensors(tuple(arguments), self.slot)

        def again() -> None:
            execute(with_tensors(slots, lambda one: one.tensor()))

        self.operations.append(Operation(again, (), {}, []))

    def end(self) -> None:
        """Let all memory be as before the capture, and its results hold no numbers."""
        for memory in self.memories.values():
            if memory.is_in_pool and memory.graph is self.graph:
                memory.captured = memory.content.clone()
            elif memory.before is not None:
                memory.content.copy_(memory.before)
                memory.before = None
        for generator, state in self.states:
            generator.set_state(state)


class Graphs:
    """The CUDA graphs of an emulator, and what watches its operators and launches for them.

    Attributes:
        of_graphs: memory in pools, by the storages' addresses in C++.
    """

    def __init__(self, emulator: Emulator):
        self.emulator, self.streams = emulator, Streams()
        self.capture: Capture | None = None
        self.streams.is_capturing = self._captures
        self.of_graphs: dict[int, Memory] = {}
        self.pools: dict[Any, Pool] = {}
        self.CUDAGraph = type("CUDAGraph", (CUDAGraph,), {"_graphs": self})

    @property
    def is_capturing(self) -> bool:
        return self._captures(self.streams.current)

    def _captures(self, stream: Stream) -> bool:
        return self.capture is not None and stream in self.capture.streams

    def pool(self, handle: Any = None) -> Pool:
        """Return the pool of a handle, or a new one."""
        handle = getattr(handle, "id", handle)  # of torch.cuda.MemPool
        if handle is None:
            made = Pool()
            return self.pools.setdefault(made.handle, made)
        return self.pools.setdefault(tuple(handle), Pool())

    def operator(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Execute an operator of PyTorch."""
        if self.is_capturing:
            assert self.capture is not None
            return self.capture.operator(func, args, kwargs)
        return func(*args, **kwargs)

    def launch(self, execute: Callable[..., None], arguments: Sequence[Any]) -> None:
        """Execute a launch of a Triton kernel."""
        if self.is_capturing:
            assert self.capture is not None
            self.capture.launch(execute, arguments)
        else:
            execute(arguments)

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

    def answers(self) -> dict[str, Any]:
        """Return what `torch.cuda` says of graphs and streams."""
        streams = self.streams
        return {
            "synchronize": streams.synchronize,
            "current_stream": lambda device=None: streams.current,
            "default_stream": lambda device=None: streams.default,
            "set_stream": streams.set,
            "stream": streams.entered,
            "Stream": streams.Stream,
            "Event": streams.Event,
            "is_current_stream_capturing": lambda: self.is_capturing,
            "graph_pool_handle": lambda: self.pool().handle,
            "CUDAGraph": self.CUDAGraph,
        }

    def changes(self) -> list[tuple[Any, dict[str, Any]]]:
        """Return what else of PyTorch is replaced, by its module."""
        cuda = self.answers()
        ours = ("is_current_stream_capturing", "graph_pool_handle", "CUDAGraph")
        return [
            (torch.cuda.graphs, {name: cuda[name] for name in ours}),
            (torch.cuda.graph, {"default_capture_stream": None}),
            (torch._C, {"_host_emptyCache": lambda: None}),
            *self._of_optimizers(),
        ]

    def _of_optimizers(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Yield what lets optimizers take the CPU for a device with graphs."""
        for name, module in list(sys.modules.items()):
            if name.startswith("torch.optim.") and hasattr(module, DEVICES):
                yield module, {DEVICES: _and_cpu(getattr(module, DEVICES))}
        checks = ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")
        yield torch.optim.Optimizer, dict.fromkeys(checks, self._check_optimizer())

    def _check_optimizer(self) -> Callable[[Any], None]:
        def check(optimizer: Any) -> None:
            groups = optimizer.param_groups
            if self.is_capturing and not all(group["capturable"] for group in groups):
                name = type(optimizer).__name__
                raise RuntimeError(
                    f"Attempting CUDA graph capture of step() for an instance of {name} but "
                    f"param_groups' capturable is False. Make it by {name}(…, capturable=True)"
                )

        return check


class CUDAGraph:
    """A CUDA graph."""

    _graphs: "Graphs"  # of the emulator

    def __init__(self, keep_graph: bool = False):
        self.operations: list[Operation] = []
        self.memories: list[Memory] = []
        self.generators: list[torch.Generator] = []
        self.replays = 0
        self._pool: Pool | None = None

    def capture_begin(
        self,
        pool: Any = None,
        capture_error_mode: str = "global",
        check_input_liveness: bool = False,
    ) -> None:
        if capture_error_mode not in ("global", "thread_local", "relaxed"):
            raise RuntimeError(
                f"capture_error_mode is {capture_error_mode!r}, expected 'global', "
                "'thread_local' or 'relaxed'"
            )
        if self._graphs.capture is not None:
            raise RuntimeError("another capture is under way; end it before this one")
        if self._graphs.streams.current is self._graphs.streams.default:
            raise RuntimeError(
                "CUDA graphs must be captured on a non-default stream. (However, after "
                f"capture, it's ok to replay them on the default stream.) {ADVICE}"
            )
        if self.operations:
            raise RuntimeError(
                "This CUDAGraph instance already owns a captured graph. To capture a new "
                "graph, create a new instance, or call reset()"
            )
        self._pool = self._graphs.pool(pool)
        self._graphs.capture = Capture(self._graphs, self, self._pool, user_line())

    def capture_end(self) -> None:
        capture = self._graphs.capture
        if capture is None or capture.graph is not self:
            raise RuntimeError("no capture of this graph is under way; call capture_begin()")
        self._graphs.capture = None
        with self._graphs.unwatched():
            capture.end()
        self.operations = capture.operations
        self.memories = list(capture.memories.values())
        if not self.operations:
            warnings.warn(
                "The CUDA Graph is empty. This usually means that the graph was attempted to "
                "be captured on wrong device or stream.",
                stacklevel=2,
            )
        for memory in self.memories:
            if memory.captured is not None:
                poison(memory.content)

    def instantiate(self) -> None: ...

    def replay(self) -> None:
        with self._graphs.unwatched():
            for operation in self.operations:
                operation()
        self.replays += 1

    def reset(self) -> None:
        self.operations, self.memories = [], []

    def pool(self) -> Any:
        if self._pool is None:
            raise RuntimeError("the graph has no pool before its capture")
        return self._pool.handle

    def register_generator_state(self, generator: torch.Generator) -> None:
        self.generators.append(generator)

    def enable_debug_mode(self) -> None: ...

    def debug_dump(self, debug_path: str) -> None:
        with open(debug_path, "w", encoding="utf-8") as file:
            file.writelines(f"{one.call}\n" for one in self.operations)
