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

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from nogpu.cuda import capture_rules, devices, host_copies, places
from nogpu.cuda.accesses import Access
from nogpu.cuda.capture import Capture
from nogpu.cuda.captured_gradients import Uses, clearing, parameters_of
from nogpu.cuda.devices import Devices
from nogpu.cuda.graph import CUDAGraph
from nogpu.cuda.graph_memory import REPLAYED, WRITTEN, Line, Memory, Pool, memory_of, shown
from nogpu.cuda.host_copies import CANNOT_COPY, NOT_PERMITTED, HostCopy
from nogpu.cuda.host_values import results_on_host, taken_by_function
from nogpu.cuda.operations import OperatorKind, tensors_in, tensors_of_launch, written_by
from nogpu.cuda.steps import has_host_count
from nogpu.cuda.streams import Stream, Streams
from nogpu.cuda.types import (
    Arguments,
    Attributes,
    Function,
    Keywords,
    Operator,
    PoolHandle,
)
from nogpu.cuda.uncaptured import advice
from nogpu.record.faults import HostFault, Kind
from nogpu.record.source import program_line
from nogpu.triton.emulator import Emulator
from nogpu.triton.torch_operators import is_plain

SET_GRADIENT: Function = Tensor.grad.__set__  # type: ignore[union-attr]
PLAIN = (Tensor, torch.nn.Parameter)
OF_BOTH = {False, True}  # operands of the host and of the device


class Graphs:
    """The CUDA graphs of an emulator, and what watches its operators and launches for them."""

    def __init__(self, emulator: Emulator):
        self.emulator, self.streams = emulator, Streams()
        self.capture: Capture | None = None
        self.streams.is_capturing = self._captures
        self.streams.refuse = self._refuse_waiting
        emulator.stream = lambda: self.streams.current
        self.streams.forks = self._fork
        self.pools: dict[tuple[int, ...], Pool] = {}
        self.graphs: weakref.WeakSet[CUDAGraph] = weakref.WeakSet()
        self.replays = 0  # of all graphs
        self._noted: dict[object, int] = {}  # the replays before a fault was noted last
        self.has_default_type = False  # whether a script has set that of its tensors
        self.uses = Uses()
        self._kinds: dict[int, OperatorKind] = {}  # by the operators' numbers in Python
        self.CUDAGraph = type("CUDAGraph", (CUDAGraph,), {"_graphs": self})

    # Faults

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

    def _refuse_waiting(self, what: str) -> None:
        if self.capture is not None:
            message = f"{what} waits for the GPU, which computes nothing before a replay; call it "
            self.refuse("wait in a capture", message + "after graph.replay()")
        self.emulator.complete_launches()

    def _refuse_read(self, what: str) -> None:
        self.refuse(
            "read-back in a capture",
            f"{what} reads values, and nothing is computed before a replay; "
            f"{capture_rules.instead_of(what)}",
            CANNOT_COPY if what in capture_rules.COPIED_TO_READ else NOT_PERMITTED,
        )

    def _refuse_copy(self, copy: HostCopy) -> None:
        self.refuse(
            "host's copy in a capture",
            f"{copy.what} {copy.why}; {host_copies.instead_of_copy(copy.what)}",
            copy.words,
        )

    def note_race(self, before: Access, access: Access) -> None:
        """Note two accesses of captured work that have no order."""
        stream, current = self.streams.all[before.work[0]], self.streams.current
        origin = None if self.capture is None else self.capture.origin
        names = [
            one.name or ("torch.cuda.current_stream()" if one is origin else "stream")
            for one in (current, stream)
        ]
        if names[0] == names[1]:  # both were a loop's variable, or have none
            names = ["stream", "other"]
        other = "another stream" if str(stream) == str(current) else str(stream)
        is_assumed = access.part.is_assumed or before.part.is_assumed
        self.note(
            "warning" if is_assumed else "error",
            "missing wait",
            f"{current} {access} {access.part.memory.name}, and {other} {before} it, without an "
            f"order in a replay; call {names[0]}.wait_stream({names[1]}) between them, within the "
            "capture",
            access.line,
            None if before.line is None else ("captured", before.line),
            key=is_assumed,
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
            instead = "let it wait before the capture"
            if self.capture.beside.on(other):
                instead = f"call {advice(other)} before that work, within the capture"
            self.refuse(
                "wait in a capture",
                f"the captured stream waits for work that is not captured, on {other}; {instead}",
            )

    # What the program does

    def function(self, func: Function, args: Arguments, kwargs: Keywords) -> None:
        """Check a function of PyTorch before it is called."""
        if func == SET_GRADIENT:
            self._note_clear(tensors_in(args[:1]), is_none=args[1] is None)
        what = capture_rules.read_by_function(func, args, kwargs)
        if self.capture is not None and self.is_capturing:
            if what := what or capture_rules.read_by_index(func, args):
                self._refuse_read(what)
            self.capture.host.take(taken_by_function(func, args))
            if copied := host_copies.copied_by_function(func, args, kwargs):
                self._refuse_copy(copied)
        elif what:
            self._check_operands(tensors_in(args[:1]), [])

    def _note_clear(self, parameters: Iterable[Tensor], is_none: bool = True) -> None:
        """Note that the program clears gradients, or sets others."""
        if self.capture is not None and self.is_capturing:
            self.capture.gradients.clear(parameters)
        elif is_none:
            self.uses.note_clear(parameters)

    def _note_cleared(self, owner: Optimizer | Module) -> None:
        self._note_clear(parameters_of(owner))

    def note_step(self, optimizer: Optimizer, args: Arguments, kwargs: Keywords) -> None:
        """Note the step of an optimizer outside of captures."""
        if not self.is_capturing:
            self.uses.note_step(parameters_of(optimizer))

    def copy_between(
        self,
        t: Tensor,
        before: torch.device,
        after: torch.device,
        is_asynchronous: bool,
        dtype: torch.dtype,
        memory_format: object,
    ) -> None:
        """Check a copy between the host and the device, which may be to where the tensor is.

        PyTorch pins the result of an asynchronous copy to the host.

        Args:
            memory_format: that of the result; None for the tensor's own.
        """
        if before == after:
            return
        if before == places.DEVICE:
            self._check_operands([t], [])
        if not self.is_capturing:
            return
        if after != places.DEVICE and not is_asynchronous:
            self._refuse_read(capture_rules.TO_HOST)
        order = cast(torch.memory_format, memory_format or torch.preserve_format)
        with self.unwatched():
            result = torch.empty_like(t, dtype=dtype, memory_format=order)
        places.put(result, after == places.DEVICE)
        if after != places.DEVICE:
            places.pin(result)
        if copied := host_copies.copied(result, t, is_asynchronous):
            self._refuse_copy(copied)

    def on_host(self, result: Tensor, operands: list[Tensor]) -> Tensor:
        """Return a result that a function of PyTorch computes on the host, with its values now."""
        with self.unwatched():
            result = result.clone()
        places.put(result, False)
        if self.capture is not None and self.is_capturing:
            self.capture.host.derive(result, operands)
        return result

    def operator(self, func: Operator, args: Arguments, kwargs: Keywords) -> object:
        """Execute an operator of PyTorch."""
        given = tensors_in((*args, *kwargs.values()))
        if not all(type(t) in PLAIN for t in given) and any(
            map(is_traceable_wrapper_subclass, given)
        ):
            return NotImplemented
        if kwargs.get("pin_memory"):
            return self._pinned(func, args, kwargs)
        operands = [t for t in given if is_plain(t)]
        marks = set(map(places.mark_of, operands))
        place = places.of_results(marks, kwargs.get("device"))
        if not place:
            result = self._on_host(func, args, kwargs, operands)
            if place is False and not self.kind_of(func).is_view:
                places.put_results(tensors_in((result,)), False)
            return result
        kind = self.kind_of(func)
        written = written_by(func, args, kwargs) if kind.may_write else []
        if marks >= OF_BOTH and kind.devices is not Devices.ANY:
            devices.check_operator(func, args, kwargs, written)
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
            written += self._put_results(func, operands, written, result, place)
        self._note_written(written, func, args)
        return result

    def _put_results(
        self,
        func: Operator,
        operands: list[Tensor],
        written: list[Tensor],
        result: object,
        place: places.Mark,
    ) -> list[Tensor]:
        """Note where an operator's new results are; return them."""
        made = [t for t in tensors_in((result,)) if is_plain(t)]
        is_one = self.kind_of(func).devices is Devices.ONE
        if on_host := results_on_host(func, result):
            places.put_results(on_host, False)
            places.put_results(made, place)
        elif is_one or len(set(map(places.mark_of, operands))) < 2:
            places.put_results((*made, *written), place)
        elif isinstance(result, Tensor) and not written:
            places.put_results(made, places.mark_of(operands[0]))
        return made

    def _pinned(self, func: Operator, args: Arguments, kwargs: Keywords) -> object:
        """Execute a factory that a hook of autograd calls."""
        result = self.operator(func, args, {**kwargs, "pin_memory": False})
        places.pin(result)
        return result

    def _on_host(
        self, func: Operator, args: Arguments, kwargs: Keywords, operands: list[Tensor]
    ) -> object:
        if self.capture is None or not self.is_capturing:
            return func(*args, **kwargs)
        written = written_by(func, args, kwargs) if self.kind_of(func).may_write else []
        return self.capture.host.execute(lambda: func(*args, **kwargs), func, operands, written)

    def kind_of(self, func: Operator) -> "OperatorKind":
        found = self._kinds.get(id(func))
        if found is None:
            found = self._kinds[id(func)] = OperatorKind(func)
        return found

    def _check_captured(self, func: Operator, args: Arguments, kwargs: Keywords) -> None:
        if what := capture_rules.read_by_operator(func, args, kwargs):
            self._refuse_read(what)
        if copied := host_copies.copied_by_operator(func, args, kwargs):
            self._refuse_copy(copied)
        assert self.capture is not None
        registered: tuple[Any, ...] = (torch.default_generator, *self.capture.graph.generators)
        numbers = {one._cdata for one in registered}  # the operator has other objects of Python
        for generator in capture_rules.generators_of(args, kwargs):
            if generator._cdata not in numbers:
                self.refuse(
                    "unregistered generator",
                    "each replay would draw the same random numbers from this generator; call "
                    "graph.register_generator_state(generator) before the capture",
                )

    def _note_written(
        self, tensors: list[Tensor], func: Operator | None = None, args: Arguments = ()
    ) -> None:
        """Note the work of the current stream that writes tensors; a capture writes none.

        Args:
            func: the operator; None for a launch.
        """
        work = self.streams.work()
        if self.is_capturing:
            return
        for t in tensors:
            setattr(t.untyped_storage(), WRITTEN, work)
        if self.capture is not None:
            self.capture.beside.note(self.streams.current, work, func, args, tensors)

    def launch(self, execute: Callable[..., None], arguments: Sequence[object]) -> None:
        """Execute a launch of a Triton kernel."""
        operands = tensors_of_launch(arguments)
        devices.check_launch(arguments)
        if self.is_capturing:
            assert self.capture is not None
            self.capture.launch(execute, arguments)
        else:
            # Which of them it reads is not known.
            self._check_operands([], operands)
            execute(arguments)
        self._note_written(operands)

    def tune(self, kernel: str) -> None:
        if self.is_capturing:
            self.refuse(
                "wait in a capture",
                f"the autotuner of {kernel} times its configurations, and waits for the GPU; "
                "launch the kernel once before the capture, with the same values of its key",
            )

    def _check_operands(self, read: list[Tensor], written: list[Tensor]) -> None:
        """Check what is read and written outside of a capture, but for what graphs made of it."""
        if not self.pools:  # nothing has been captured
            return
        for t in read:
            memory = memory_of(t)
            if memory is not None:
                self._check_read(t, memory)
        for t in (*read, *written):
            work = getattr(t.untyped_storage(), REPLAYED, None)
            if work is not None and not self.streams.is_ordered(work[0]):
                use = "reads" if any(t is one for one in read) else "writes"
                stream = self.streams.all[work[0][0]]
                self.note(
                    "error",
                    "missing wait",
                    f"the current stream {use} {shown(t)} while the replay of the graph may still "
                    f"run on {stream}; call "
                    f"torch.cuda.current_stream().wait_stream({stream.name or 'stream'}) first",
                    program_line(),
                    ("replayed", work[1]) if work[1] else None,
                )

    def _check_read(self, t: Tensor, memory: Memory) -> None:
        graph = memory.graph
        assert graph is not None
        earlier = None if memory.made is None else ("captured", memory.made)
        if graph.is_reset:
            self.note(
                "warning",
                "result of a reset graph",
                f"{shown(t)} is in the pool of a graph that was reset, and no replay computes it "
                "any more; clone it before reset()",
                program_line(),
                earlier,
            )
        elif graph.waits and self.capture is None:
            self.note(
                "error",
                "result before a replay",
                f"{shown(t)} has no values yet: a capture computes nothing; call graph.replay() "
                "first",
                program_line(),
                earlier,
            )
        elif memory.overwritten is not None:
            self.note(
                "error",
                "overwritten result",
                f"another graph with the same pool has used the memory of {shown(t)} since its "
                "replay; read it before the other graph's replay, or give that another pool",
                program_line(),
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

    def pool(self, handle: PoolHandle | torch.cuda.MemPool | None = None) -> Pool:
        """Return the pool of a handle, or a new one."""
        made = Pool()
        if isinstance(handle, torch.cuda.MemPool):
            handle = handle.id
        return self.pools.setdefault(made.handle if handle is None else tuple(handle), made)

    def answers(self) -> Attributes:
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
            "manual_seed": self._seed,
            "manual_seed_all": self._seed,
        }

    def _seed(self, seed: int) -> None:
        """Seed the random numbers; in a capture a GPU refuses another seed, and ignores this one.

        `CUDAGeneratorImpl::set_current_seed` of PyTorch is the source.
        """
        capture = self.capture if self.is_capturing else None
        if capture is None:
            torch.default_generator.manual_seed(seed)
            return
        if int(seed) % 2**64 != torch.initial_seed():  # which is never negative
            self.refuse(
                "seed in a capture",
                f"manual_seed({seed}) in the capture is not the seed before it; call it before the "
                "capture",
            )
        self.note(
            "warning",
            "seed in a capture",
            f"manual_seed({seed}) in the capture does nothing in a replay, which draws new "
            "numbers; call it before graph.replay()",
            program_line(),
            None if capture.line is None else ("captured", capture.line),
        )

    def changes(self) -> list[tuple[object, Attributes]]:
        """Return what else of PyTorch is replaced, by its module."""
        cuda = self.answers()
        ours = ("is_current_stream_capturing", "graph_pool_handle", "CUDAGraph")
        return [
            (torch.cuda.graphs, {name: cuda[name] for name in ours}),
            (torch.cuda.graph, {"default_capture_stream": None}),
            (torch._C, {"_host_emptyCache": lambda: None}),
            *self._of_optimizers(),
            (Optimizer, {"zero_grad": clearing(Optimizer.zero_grad, self._note_cleared)}),
            (Module, {"zero_grad": clearing(Module.zero_grad, self._note_cleared)}),
        ]

    def _of_optimizers(self) -> Iterator[tuple[object, Attributes]]:
        """Yield what lets optimizers take the CPU for a device with graphs."""
        for name, module in list(sys.modules.items()):
            if name.startswith("torch.optim.") or name == "torch.utils._foreach_utils":
                lists = [one for one in DEVICES if hasattr(module, one)]
                yield module, {one: _and_cpu(getattr(module, one)) for one in lists}
        checks = ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")
        yield Optimizer, dict.fromkeys(checks, self._check_optimizer())

    def _check_optimizer(self) -> Callable[[Optimizer], None]:
        def check(optimizer: Optimizer) -> None:
            groups = optimizer.param_groups
            if self.is_capturing and not all(group.get("capturable") for group in groups):
                self._refuse_optimizer(optimizer)

        return check

    def check_step(self, optimizer: Optimizer) -> None:
        """Refuse the step of an optimizer of PyTorch's whose state has a count on the host.

        Some of them, such as Adagrad, have no check of their own.
        """
        if self.is_capturing and has_host_count(optimizer):
            self._refuse_optimizer(optimizer)

    def _refuse_optimizer(self, optimizer: Optimizer) -> None:
        name = type(optimizer).__name__
        flags = [one for one in ("capturable", "fused") if one in optimizer.defaults]
        instead = (
            f"make it by {name}(…, {flags[0]}=True)"
            if flags
            else "take AdamW(…, capturable=True), or call step() after graph.replay()"
        )
        self.refuse(
            "optimizer that is not capturable",
            f"{name} counts its steps on the host, and a replay does not; {instead}",
        )


DEVICES = ("_get_capturable_supported_devices", "_get_foreach_kernels_supported_devices")


def _and_cpu(devices: Callable[..., list[str]]) -> Callable[..., list[str]]:
    return lambda *args, **kwargs: [*devices(*args, **kwargs), "cpu"]
