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
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map

from torchpar.ptx import captures, places
from torchpar.ptx.driver import EMPTY, Emulator, changed, is_plain
from torchpar.ptx.graph_memory import Line, Memory, Pool, Slot, memory_of
from torchpar.ptx.report import CapturedGraph, HostFault, Kind
from torchpar.ptx.steps import Step
from torchpar.ptx.streams import Stream, Streams

LIBRARIES = ("torch", "triton", "torchpar", "contextlib", "runpy", "copy")
MODES = ("global", "thread_local", "relaxed")
WITHIN = "capture within `with torch.cuda.graph(graph):`, which takes a stream of its own"
EMPTY_GRAPH = (
    "The CUDA Graph is empty. This usually means that the graph was attempted to be captured on "
    "wrong device or stream."
)
# Operators that take the shape of a tensor, and not its values.
SHAPES = {*EMPTY, *(getattr(torch.ops.aten, f"{one}_like") for one in ("zeros", "ones", "full"))}
SHAPES |= {getattr(torch.ops.aten, f"{one}_like") for one in ("rand", "randn", "randint")}
SHAPES |= {getattr(torch.ops.aten, f"new_{one}") for one in ("zeros", "ones", "full")}
REPLAYED = "torchpar_replayed"  # of a storage: the last replay that used it
WRITTEN = "torchpar_written"  # of a storage: the last work that wrote it


def user_line() -> Line:
    """Return the file and the line of the program that is executed, outside of the libraries."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.partition(".")[0] not in LIBRARIES:
            return frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back
    return None


class OperatorKind:
    """What an operator does, by its schema.

    Attributes:
        is_view: it returns parts of its operands, and changes none.
        reads_nothing: of its operands but the shapes.
    """

    def __init__(self, func: Any):
        schema, self.func = func._schema, func
        self.is_copy = func.overloadpacket is torch.ops.aten.copy_
        self.may_write = schema.is_mutable or func.namespace == "c10d"
        aliases = any(one.alias_info is not None for one in schema.returns)
        self.is_view = aliases and not schema.is_mutable
        self.reads_nothing = self.is_view or func.overloadpacket in SHAPES


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors of an operator's arguments or results, which hold no dictionaries."""
    found: list[Tensor] = []
    for one in values:
        if isinstance(one, Tensor):
            found.append(one)
        elif isinstance(one, (list, tuple)):
            found += tensors_in(one)
    return found


PLAIN = (Tensor, torch.nn.Parameter)


class Operation:
    """An operator of PyTorch, with the places of what it takes and returns."""

    def __init__(self, call: Callable[..., Any], args: Any, kwargs: Any, results: list[Any]):
        self.call, self.args, self.kwargs, self.results = call, args, kwargs, results

    is_launch = False

    def __str__(self) -> str:
        return str(self.call)

    def __call__(self) -> None:
        made = self.call(*_filled(self.args), **_filled(self.kwargs))
        leaves = tree_leaves(made)
        for slot, new in zip(self.results, leaves, strict=False):
            if slot is not None:
                slot.tensor().copy_(new)
        for one in leaves:
            if isinstance(one, torch.ScriptObject) and hasattr(one, "wait"):
                one.wait()  # for a collective


class LaunchOperation(Operation):
    """A launch of a Triton kernel."""

    is_launch = True

    def __init__(self, execute: Callable[..., None], arguments: Any):
        super().__init__(execute, arguments, {}, [])

    def __str__(self) -> str:
        return "a launch of a Triton kernel"

    def __call__(self) -> None:
        self.call(with_tensors(self.args, lambda one: one.tensor()))


def _filled(values: Any) -> Any:
    return tree_map(lambda one: one.tensor() if isinstance(one, Slot) else one, values)


def with_tensors(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return an argument of a launch, with other tensors: it may be a tuple or a descriptor."""
    if isinstance(value, (Tensor, Slot)):
        return change(value)
    if isinstance(getattr(value, "base", None), (Tensor, Slot)):
        other = copy.copy(value)
        other.base = change(value.base)
        return other
    if isinstance(value, (tuple, list)):
        return tuple(with_tensors(one, change) for one in value)
    return value


class Capture:
    """A capture under way.

    Attributes:
        memories: by the storages' addresses in C++.
        parameters: leaves of autograd that operators take.
        has_failed: whether the program has done what a capture forbids.
    """

    def __init__(self, graphs: "Graphs", graph: "CUDAGraph", pool: Pool, line: Line):
        self.graphs, self.graph, self.pool, self.line = graphs, graph, pool, line
        self.origin = graphs.streams.current
        self.streams = {self.origin}
        self.operations: list[Operation] = []
        self.memories: dict[int, Memory] = {}
        self.parameters: dict[int, weakref.ref[Tensor]] = {}
        self.steps: list[Step] = []
        self.has_failed = False
        self._states: list[tuple[torch.Generator, Tensor]] = [
            (one, one.get_state()) for one in (torch.default_generator, *graph.generators)
        ]
        self._hooks = ExitStack()
        self._hooks.callback(register_optimizer_step_post_hook(self._note_step).remove)

    def _note_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self.graphs.is_capturing:
            self.steps.append(Step(optimizer, user_line()))

    # Memory

    def memory(self, t: Tensor) -> Memory:
        """Return the memory of a tensor that the graph reads or writes."""
        storage = t.untyped_storage()
        found = memory_of(t) or self.memories.get(storage._cdata)
        if found is None or not found.is_memory_of(storage):
            found = Memory(storage, user_line(), keep=False)
            found.name = _shown(t)
        self.memories[storage._cdata] = found
        return found

    def slot(self, value: Any) -> Any:
        if not is_plain(value) or not value.untyped_storage().nbytes():
            return value
        if value.requires_grad and value.is_leaf:
            self.parameters[id(value)] = weakref.ref(value)
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
            if number in given or memory_of(value) or not storage.nbytes():
                return value
            if number not in made:
                memory = Memory(storage, user_line(), graph=self.graph)
                made[number] = memory.given_out()
                self.pool.place(memory)
                self.memories[made[number]._cdata] = memory
            place = value.storage_offset(), value.size(), value.stride()
            return torch.empty(0, dtype=value.dtype).set_(made[number], *place)

        return tree_map(adopt, result)

    # What is recorded

    def operator(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Execute an operator, and record it if it is more than a view."""
        operands = [t for t in tree_leaves((args, kwargs)) if is_plain(t)]
        given = {t.untyped_storage()._cdata for t in operands}
        slots: Any = tree_map(self.slot, (args, kwargs))
        is_copy = func.overloadpacket is torch.ops.aten.copy_
        if not (is_copy and captures.is_asynchronous(args, kwargs)):
            self._keep_numbers(operands)
        written = _written(func, args, kwargs)
        for t in written:
            if t.untyped_storage().nbytes():
                self.memory(t).keep_before()
        result = self.adopted(func(*args, **kwargs), given)
        results = [
            None if not is_plain(t) or t.untyped_storage()._cdata in given else self.slot(t)
            for t in tree_leaves(result)
        ]
        computes = any(isinstance(one, Slot) for one in results)
        if written or (computes and func.overloadpacket not in EMPTY):
            self.operations.append(Operation(func, slots[0], slots[1], results))
        return result

    def _keep_numbers(self, operands: list[Tensor]) -> None:
        """Keep numbers of the host as they are: a launch takes their values."""
        for t in operands:
            if t.dim() == 0 and not places.is_on_device(t) and memory_of(t) is None:
                self.memory(t).keep_copy()

    def launch(self, execute: Callable[..., None], arguments: Sequence[Any]) -> None:
        operands: list[Tensor] = []
        with_tensors(tuple(arguments), operands.append)
        outside = [self.memory(t) for t in operands if t.untyped_storage().nbytes()]
        outside = [one for one in outside if one.graph is None and one.before is None]
        for one in outside:
            one.keep_before()
        execute(arguments)
        for one in outside:
            if one.before is not None and torch.equal(one.before, one.content):
                one.before = None
        slots = with_tensors(tuple(arguments), self.slot)
        self.operations.append(LaunchOperation(execute, slots))

    # The end

    def end(self) -> None:
        """Let all memory be as before the capture, and what it has computed be hidden."""
        self._hooks.close()
        for memory in self.memories.values():
            if memory.graph is self.graph:
                memory.hide()
            else:
                memory.restore()
        for generator, state in self._states:
            generator.set_state(state)

    def unjoined(self) -> list[Stream]:
        """Return streams whose work the stream of the capture does not wait for."""
        clock = self.origin.clock
        return [
            one
            for one in self.streams - {self.origin}
            if clock.get(one.stream_id, 0) < one.clock.get(one.stream_id, 0)
        ]


class Graphs:
    """The CUDA graphs of an emulator, and what watches its operators and launches for them."""

    def __init__(self, emulator: Emulator):
        self.emulator, self.streams = emulator, Streams()
        self.capture: Capture | None = None
        self.streams.is_capturing = self._captures
        self.streams.refuse = self._refuse_waiting
        self.streams.forks = self._fork
        self.pools: dict[Any, Pool] = {}
        self.graphs: weakref.WeakSet[CUDAGraph] = weakref.WeakSet()
        self._kinds: dict[int, OperatorKind] = {}  # by the operators' numbers in Python
        self.CUDAGraph = type("CUDAGraph", (CUDAGraph,), {"_graphs": self})

    # Faults

    def note(
        self, kind: Kind, name: str, message: str, line: Line, earlier: Any = None, key: Any = None
    ) -> None:
        """Note a fault of the program at a line of it."""
        fault = HostFault(kind, name, message, source=line, earlier=earlier)
        self.emulator.note(fault, (name, line, earlier, key))

    def refuse(self, name: str, message: str) -> None:
        """Note a fault, and raise an error, as a GPU does."""
        line = user_line()
        if self.capture is not None:
            self.capture.has_failed = True
        begun = None if self.capture is None else self.capture.line
        self.note("error", name, message, line, None if begun is None else ("captured", begun))
        raise RuntimeError(
            f"CUDA error: operation not permitted when stream is capturing: {message}"
        )

    def _refuse_waiting(self, what: str) -> None:
        if self.capture is not None:
            message = f"{what} waits for the GPU, which computes nothing before a replay; call it "
            self.refuse("wait in a capture", message + "after graph.replay()")

    def _refuse_read(self, what: str) -> None:
        self.refuse(
            "read-back in a capture",
            f"{what} reads values, and nothing is computed before a replay; keep the tensor, and "
            "read it after graph.replay()",
        )

    def _refuse_copy(self, what: str) -> None:
        self.refuse(
            "host's copy in a capture",
            f"{what} is one that the program waits for; copy before the capture, into a tensor "
            "that the graph reads",
        )

    # The current capture

    @property
    def is_capturing(self) -> bool:
        return self.capture is not None and self._captures(self.streams.current)

    def _captures(self, stream: Stream) -> bool:
        return self.capture is not None and stream in self.capture.streams

    def _fork(self, stream: Stream, other: Stream, is_captured: bool) -> None:
        """Let a stream take part in the capture of another one that it waits for."""
        if self.capture is None:
            return
        if is_captured and not self._captures(stream):
            self.capture.streams.add(stream)
            stream.clock[stream.stream_id] = stream.clock.get(stream.stream_id, 0) + 1
        elif self._captures(stream) and not is_captured:
            self.refuse(
                "wait in a capture",
                "the captured stream waits for work that is not captured; let it wait before the "
                "capture",
            )

    # What the program does

    def function(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Check a function of PyTorch before it is called."""
        what = captures.read_by_function(func, args)
        if self.capture is not None and self.is_capturing:
            if what:
                self._refuse_read(what)
            if captures.makes_from_host(func, args, kwargs):
                self._refuse_copy(captures.TO_DEVICE)
            if copied := captures.copied_by_function(func, args, kwargs):
                self._refuse_copy(copied)
        elif what:
            self._check_operands([args[0]], [])

    def copy_between(
        self, t: Tensor, before: torch.device, after: torch.device, is_asynchronous: bool
    ) -> None:
        """Check a copy between the host and the device, which may be to where the tensor is."""
        if before == after:
            return
        if before == places.DEVICE:
            self._check_operands([t], [])
        if self.is_capturing and not is_asynchronous:
            if after == places.DEVICE:
                self._refuse_copy(captures.TO_DEVICE)
            else:
                self._refuse_read("a copy to the host")

    def operator(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Execute an operator of PyTorch."""
        given = tensors_in((*args, *kwargs.values()))
        if not all(type(t) in PLAIN for t in given) and any(
            map(is_traceable_wrapper_subclass, given)
        ):
            return NotImplemented
        operands = [t for t in given if is_plain(t)]
        device = places.device_of_results(operands, kwargs.get("device"))
        is_of_device = device == places.DEVICE or any(map(places.is_on_device, operands))
        if not is_of_device:
            return func(*args, **kwargs)
        kind = self._kind_of(func)
        written = _written(func, args, kwargs) if kind.may_write else []
        capture = self.capture if self.is_capturing else None
        if capture is not None:
            self._check_captured(func, args, kwargs)
            result = capture.operator(func, args, kwargs)
        else:
            reads = [] if kind.reads_nothing else operands
            numbers = {id(t) for t in written}
            self._check_operands([t for t in reads if id(t) not in numbers], written)
            result = func(*args, **kwargs)
        if not kind.is_view:
            made = [t for t in tensors_in((result,)) if is_plain(t)]
            # Only a copy may be from the device to the host.
            for t in made if kind.is_copy else (*made, *written):
                places.put(t, device)
            written += made
        self._note_written(written)
        return result

    def _kind_of(self, func: Any) -> "OperatorKind":
        found = self._kinds.get(id(func))
        if found is None:
            found = self._kinds[id(func)] = OperatorKind(func)
        return found

    def _check_captured(self, func: Any, args: Any, kwargs: Any) -> None:
        if what := captures.read_by_operator(func, args, kwargs):
            self._refuse_read(what)
        if what := captures.copied_by_operator(func, args, kwargs):
            self._refuse_copy(what)
        assert self.capture is not None
        registered: tuple[Any, ...] = (torch.default_generator, *self.capture.graph.generators)
        numbers = {one._cdata for one in registered}  # the operator has other objects of Python
        for generator in captures.generators_of(args, kwargs):
            if generator._cdata not in numbers:
                self.refuse(
                    "unregistered generator",
                    "each replay would draw the same random numbers from this generator; call "
                    "graph.register_generator_state(generator) before the capture",
                )

    def _note_written(self, tensors: list[Tensor]) -> None:
        """Note the work of the current stream that writes tensors; a capture writes none."""
        work = self.streams.work()
        if not self.is_capturing:
            for t in tensors:
                setattr(t.untyped_storage(), WRITTEN, work)

    def launch(self, execute: Callable[..., None], arguments: Sequence[Any]) -> None:
        """Execute a launch of a Triton kernel."""
        operands: list[Tensor] = []
        with_tensors(tuple(arguments), operands.append)
        if self.is_capturing:
            assert self.capture is not None
            self.capture.launch(execute, arguments)
        else:
            # Which of them it reads is not known.
            self._check_operands([], operands)
            execute(arguments)
        self._note_written(operands)

    def _check_operands(self, read: list[Tensor], written: list[Tensor]) -> None:
        """Check what is read and written outside of a capture, but for what graphs made of it."""
        for t in read:
            memory = memory_of(t)
            if memory is not None:
                self._check_read(t, memory)
        for t in (*read, *written):
            work = getattr(t.untyped_storage(), REPLAYED, None)
            if work is not None and not self.streams.is_ordered(work[0]):
                use = "reads" if any(t is one for one in read) else "writes"
                self.note(
                    "error",
                    "missing wait",
                    f"the current stream {use} {_shown(t)} while the replay of the graph may still "
                    "run on another stream; call torch.cuda.current_stream().wait_stream(stream) "
                    "first",
                    user_line(),
                    ("replayed", work[1]) if work[1] else None,
                )

    def _check_read(self, t: Tensor, memory: Memory) -> None:
        graph: CUDAGraph = memory.graph
        earlier = None if memory.made is None else ("captured", memory.made)
        if graph.is_reset:
            self.note(
                "warning",
                "result of a reset graph",
                f"{_shown(t)} is in the pool of a graph that was reset, and no replay computes it "
                "any more; clone it before reset()",
                user_line(),
                earlier,
            )
        elif not graph.replays and self.capture is None:
            self.note(
                "error",
                "result before a replay",
                f"{_shown(t)} has no values yet: a capture computes nothing; call graph.replay() "
                "first",
                user_line(),
                earlier,
            )
        elif memory.overwritten is not None:
            self.note(
                "error",
                "overwritten result",
                f"another graph with the same pool has used the memory of {_shown(t)} since its "
                "replay; read it before the other graph's replay, or give that another pool",
                user_line(),
                ("overwritten by the replay", memory.overwritten),
            )

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

    # What PyTorch is told

    def pool(self, handle: Any = None) -> Pool:
        """Return the pool of a handle, or a new one."""
        handle = getattr(handle, "id", handle)  # of torch.cuda.MemPool
        made = Pool()
        return self.pools.setdefault(made.handle if handle is None else tuple(handle), made)

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
            "default_generators": (torch.default_generator,),
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
            if name.startswith("torch.optim.") or name == "torch.utils._foreach_utils":
                lists = [one for one in DEVICES if hasattr(module, one)]
                yield module, {one: _and_cpu(getattr(module, one)) for one in lists}
        checks = ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")
        yield torch.optim.Optimizer, dict.fromkeys(checks, self._check_optimizer())

    def _check_optimizer(self) -> Callable[[Any], None]:
        def check(optimizer: Any) -> None:
            groups = optimizer.param_groups
            if self.is_capturing and not all(group["capturable"] for group in groups):
                name = type(optimizer).__name__
                self.refuse(
                    "optimizer that is not capturable",
                    f"{name} counts its steps on the host, and a replay does not; make it by "
                    f"{name}(…, capturable=True)",
                )

        return check


DEVICES = ("_get_capturable_supported_devices", "_get_foreach_kernels_supported_devices")


def _and_cpu(devices: Callable[..., list[str]]) -> Callable[..., list[str]]:
    return lambda *args, **kwargs: [*devices(*args, **kwargs), "cpu"]


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the operands that an operator writes; those of collectives do not say so."""
    is_collective = func.namespace == "c10d"
    found = (args, kwargs) if is_collective else changed(func._schema, args, kwargs)
    return [t for t in tree_leaves(found) if is_plain(t)]


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _shown(t: Tensor) -> str:
    return f"a tensor of {str(t.dtype).removeprefix('torch.')} {list(t.shape)}"


class CUDAGraph:
    """A CUDA graph."""

    _graphs: Graphs  # of the emulator

    def __init__(self, keep_graph: bool = False):
        self.operations: list[Operation] = []
        self.memories: list[Memory] = []
        self.generators: list[torch.Generator] = []
        self.steps: list[Step] = []
        self.replays = 0
        self.is_reset = False
        self._gradients: list[tuple[weakref.ref[Tensor], Memory]] = []
        self._is_captured = False
        self._pool: Pool | None = None

    def capture_begin(
        self,
        pool: Any = None,
        capture_error_mode: str = "global",
        check_input_liveness: bool = False,
    ) -> None:
        """Begin to record what the current stream does."""
        graphs = self._graphs
        if capture_error_mode not in MODES:
            raise RuntimeError(
                f"capture_error_mode is {capture_error_mode!r}, expected one of {', '.join(MODES)}"
            )
        if graphs.capture is not None:
            raise RuntimeError("another capture is under way; end it before this one")
        if graphs.streams.current is graphs.streams.default:
            raise RuntimeError(
                "CUDA graphs must be captured on a non-default stream. (However, after capture, "
                f"it's ok to replay them on the default stream.) {WITHIN}"
            )
        if self._is_captured:
            raise RuntimeError(
                "This CUDAGraph instance already owns a captured graph. To capture a new graph, "
                "create a new instance, or call reset()"
            )
        with graphs.unwatched():
            graphs.show_captured(True)
        self._pool = graphs.pool(pool)
        graphs.capture = Capture(graphs, self, self._pool, user_line())

    def capture_end(self) -> None:
        """End the capture; a replay computes what it has recorded."""
        graphs, capture = self._graphs, self._graphs.capture
        if capture is None or capture.graph is not self:
            raise RuntimeError("no capture of this graph is under way; call capture_begin()")
        graphs.capture = None
        with graphs.unwatched():
            capture.end()
            graphs.show_captured(False)
        if sys.exc_info()[0] is not None:  # the program is leaving the capture by an error
            return
        if capture.has_failed:
            raise RuntimeError(
                "CUDA error: operation failed due to a previous error during capture; mend that one"
            )
        self._check_joined(capture)
        self.operations, self.steps = capture.operations, capture.steps
        self.memories = list({id(one): one for one in capture.memories.values()}.values())
        self._is_captured = True
        graphs.graphs.add(self)
        launches = sum(one.is_launch for one in self.operations)
        self.counted = CapturedGraph(capture.line, len(self.operations) - launches, launches)
        graphs.emulator.graphs.append(self.counted)
        if not self.operations:
            warnings.warn(EMPTY_GRAPH, stacklevel=2)
            graphs.note("warning", "empty graph", EMPTY_GRAPH, capture.line)
        self._check_steps()
        self._keep_gradients(capture)

    def _check_joined(self, capture: Capture) -> None:
        if capture.unjoined():
            message = (
                "the capture ends before the work that it began on another stream; call "
                "torch.cuda.current_stream().wait_stream(other) within the capture"
            )
            begun = None if capture.line is None else ("captured", capture.line)
            self._graphs.note("error", "unjoined work", message, user_line(), begun)
            raise RuntimeError(f"CUDA error: capturing stream has unjoined work: {message}")

    def _check_steps(self) -> None:
        """Check that optimizers had their state before the capture."""
        for step in self.steps:
            for key, t in step.state():
                memory = memory_of(t)
                if memory is not None and memory.graph is self:
                    self._graphs.note(
                        "error",
                        "state made in a capture",
                        f"{step.name} made {key} in the capture, so that each replay makes it "
                        "anew; call step() a few times before the capture, on another stream",
                        step.line,
                    )
                    break

    def _keep_gradients(self, capture: Capture) -> None:
        """Remember gradients that the graph computes, and no optimizer within it takes."""
        taken = {id(p) for step in self.steps for p in step.parameters()}
        for reference in capture.parameters.values():
            p = reference()
            if p is None or id(p) in taken or p.grad is None or not is_plain(p.grad):
                continue
            memory = memory_of(p.grad)
            if memory is not None and memory.graph is self:
                self._gradients.append((reference, memory))

    def instantiate(self) -> None: ...

    def replay(self) -> None:
        """Compute what the capture has recorded, in the same memory."""
        graphs, line = self._graphs, user_line()
        if not self._is_captured:
            raise RuntimeError(
                "Called CUDAGraph::replay without a preceding successful capture. Capture it first"
            )
        if graphs.capture is not None:
            raise RuntimeError("a replay within a capture is not emulated; replay it outside")
        self._check_inputs(line)
        self._check_gradients(line)
        for step in self.steps:
            for key, before, now in step.changes():
                graphs.note(
                    "warning",
                    "number in a graph",
                    f"the graph still computes with {key}={_number(before)}, and {step.name} has "
                    f"{key}={_number(now)}; make it a tensor on the device before the capture, "
                    "and change it in place",
                    line,
                    None if step.line is None else ("captured", step.line),
                    (key, step.name),
                )
        with graphs.unwatched():
            for operation in self.operations:
                operation()
        self.replays += 1
        self.counted.replays += 1
        self._note_replay(line)

    def _check_inputs(self, line: Line) -> None:
        """Check that what the graph uses outside of its pool is there, and written."""
        streams = self._graphs.streams
        for memory in self.memories:
            if memory.graph is not None or memory.is_kept:
                continue
            earlier = None if memory.read is None else ("captured", memory.read)
            storage = memory.storage()
            if storage is None:
                self._graphs.note(
                    "error",
                    "freed input",
                    f"the graph uses the memory of {memory.name}, which has been freed since the "
                    "capture; keep the tensor, and change it in place: x.copy_(new), not x = new",
                    line,
                    earlier,
                )
                memory.replace()
                continue
            work = getattr(storage, WRITTEN, None)
            if work is not None and not streams.is_ordered(work):
                self._graphs.note(
                    "error",
                    "missing wait",
                    f"the graph uses {memory.name}, which another stream may still write; call "
                    "torch.cuda.current_stream().wait_stream(stream) before the replay",
                    line,
                    earlier,
                )

    def _check_gradients(self, line: Line) -> None:
        for reference, memory in self._gradients:
            p = reference()
            if p is None:
                continue
            if p.grad is None or memory_of(p.grad) is not memory:
                self._graphs.note(
                    "error",
                    "replaced gradient",
                    f"the graph writes the gradient of a parameter {list(p.shape)} into memory "
                    "that its .grad does not have any more; call zero_grad(set_to_none=False), or "
                    "none: a replay overwrites gradients",
                    line,
                    None if memory.made is None else ("captured", memory.made),
                )

    def _note_replay(self, line: Line) -> None:
        work = self._graphs.streams.work()
        for memory in self.memories:
            storage = memory.storage()
            if storage is not None:
                setattr(storage, REPLAYED, (work, line))
                setattr(storage, WRITTEN, work)
        assert self._pool is not None
        self._pool.overwrite(self, line)

    def reset(self) -> None:
        """Forget what was captured."""
        self.is_reset, self._is_captured = self._is_captured, False
        self.operations, self.memories, self.steps, self._gradients = [], [], [], []

    def pool(self) -> Any:
        """Return a handle of the graph's pool, which other graphs may share."""
        if self._pool is None:
            raise RuntimeError("the graph has no pool before its capture; capture it first")
        return self._pool.handle

    def register_generator_state(self, generator: torch.Generator) -> None:
        """Let replays draw new numbers from a generator."""
        self.generators.append(generator)

    def enable_debug_mode(self) -> None: ...

    def debug_dump(self, debug_path: str) -> None:
        """Write the names of the recorded operators."""
        with open(debug_path, "w", encoding="utf-8") as file:
            file.writelines(f"{one}\n" for one in self.operations)
