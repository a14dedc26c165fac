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

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from nogpu.cuda import capture_rules, devices, host_copies, places
from nogpu.cuda.capture import Capture
from nogpu.cuda.captured_gradients import clearing, parameters_of
from nogpu.cuda.context import Context
from nogpu.cuda.devices import Devices
from nogpu.cuda.graph import CUDAGraph
from nogpu.cuda.graph_memory import REPLAYED, WRITTEN, Memory, memory_of, shown
from nogpu.cuda.host_copies import CANNOT_COPY, NOT_PERMITTED, HostCopy
from nogpu.cuda.host_values import results_on_host, taken_by_function
from nogpu.cuda.operations import tensors_in, tensors_of_launch, written_by
from nogpu.cuda.steps import why_not_capturable
from nogpu.cuda.streams import Stream
from nogpu.cuda.types import (
    Arguments,
    Attributes,
    Function,
    Keywords,
    Operator,
)
from nogpu.cuda.uncaptured import advice
from nogpu.record.source import program_line
from nogpu.triton.emulator import Emulator
from nogpu.triton.torch_operators import is_plain

SET_GRADIENT: Function = Tensor.grad.__set__  # type: ignore[union-attr]
PLAIN = (Tensor, torch.nn.Parameter)
RAW_STREAM = "_cuda_getCurrentRawStream"  # which only a build for CUDA has
HEALTH_CHECKS = ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")
OF_BOTH = {False, True}  # operands of the host and of the device


class Watcher:
    """The watcher of an emulator's operators and launches, for CUDA graphs.

    Attributes:
        context: what captures and graphs share.
        CUDAGraph: the class of graphs in this context.
        program: it returns a block in which PyTorch takes the program's names of devices.
    """

    program: Callable[[], AbstractContextManager[object]]

    def __init__(self, emulator: Emulator):
        self.context: Context[Capture] = Context(emulator)
        self.context.streams.is_capturing = self.context.captures
        self.context.streams.refuse = self._refuse_waiting
        self.context.streams.forks = self._fork
        emulator.stream = lambda: self.context.streams.current
        self.has_default_type = False  # whether a script has set that of its tensors
        self.CUDAGraph = type("CUDAGraph", (CUDAGraph,), {"_context": self.context})

    # Refusals

    def _refuse_waiting(self, what: str) -> None:
        if self.context.capture is not None:
            message = f"{what} waits for the GPU, which computes nothing before a replay; call it "
            self.context.refuse("wait in a capture", message + "after graph.replay()")
        self.context.emulator.complete_launches()

    def _refuse_read(self, what: str) -> None:
        self.context.refuse(
            "read-back in a capture",
            f"{what} reads values, and nothing is computed before a replay; "
            f"{capture_rules.instead_of(what)}",
            CANNOT_COPY if what in capture_rules.COPIED_TO_READ else NOT_PERMITTED,
        )

    def _refuse_copy(self, copy: HostCopy) -> None:
        self.context.refuse(
            "host's copy in a capture",
            f"{copy.what} {copy.why}; {host_copies.instead_of_copy(copy.what)}",
            copy.words,
        )

    # The current capture

    @property
    def is_capturing(self) -> bool:
        return self.context.is_capturing

    def _fork(self, stream: Stream, other: Stream, is_captured: bool) -> None:
        """Let a stream take part in the capture of another one that it waits for."""
        if self.context.capture is None:
            return
        if is_captured and not self.context.captures(stream):
            self.context.capture.streams.add(stream)
            stream.clock[stream.stream_id] = stream.clock.get(stream.stream_id, 0) + 1
        elif self.context.captures(stream) and not is_captured:
            instead = "let it wait before the capture"
            if self.context.capture.beside.on(other):
                instead = f"call {advice(other)} before that work, within the capture"
            self.context.refuse(
                "wait in a capture",
                f"the captured stream waits for work that is not captured, on {other}; {instead}",
            )

    # What the program does

    def function(self, func: Function, args: Arguments, kwargs: Keywords) -> None:
        """Check a function of PyTorch before it is called."""
        if func == SET_GRADIENT:
            self._note_clear(tensors_in(args[:1]), is_none=args[1] is None)
        what = capture_rules.read_by_function(func, args, kwargs)
        if self.context.capture is not None and self.is_capturing:
            if what := what or capture_rules.read_by_index(func, args):
                self._refuse_read(what)
            self.context.capture.host.take(taken_by_function(func, args))
            if copied := host_copies.copied_by_function(func, args, kwargs):
                self._refuse_copy(copied)
        elif what:
            self._check_operands(tensors_in(args[:1]), [])

    def _note_clear(self, parameters: Iterable[Tensor], is_none: bool = True) -> None:
        """Note that the program clears gradients, or sets others."""
        if self.context.capture is not None and self.is_capturing:
            self.context.capture.gradients.clear(parameters)
        elif is_none:
            self.context.uses.note_clear(parameters)

    def _note_cleared(self, owner: Optimizer | Module) -> None:
        self._note_clear(parameters_of(owner))

    def note_step(self, optimizer: Optimizer, args: Arguments, kwargs: Keywords) -> None:
        """Note the step of an optimizer outside of captures."""
        if not self.is_capturing:
            self.context.uses.note_step(parameters_of(optimizer))

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
        with self.context.unwatched():
            result = torch.empty_like(t, dtype=dtype, memory_format=order)
        places.put(result, after == places.DEVICE)
        if after != places.DEVICE:
            places.pin(result)
        if copied := host_copies.copied(result, t, is_asynchronous):
            self._refuse_copy(copied)

    def on_host(self, result: Tensor, operands: list[Tensor]) -> Tensor:
        """Return a result that a function of PyTorch computes on the host, with its values now."""
        with self.context.unwatched():
            result = result.clone()
        places.put(result, False)
        if self.context.capture is not None and self.is_capturing:
            self.context.capture.host.derive(result, operands)
        return result

    def operator(self, func: Operator, args: Arguments, kwargs: Keywords) -> object:
        """Execute an operator of PyTorch."""
        device = kwargs.get("device")
        if isinstance(device, torch.device) and device.type == "cuda":
            kwargs = {**kwargs, "device": places.named(device)}
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
            if place is False and self._makes(func, result):
                places.put_results(tensors_in((result,)), False)
            return result
        kind = self.context.kind_of(func)
        written = written_by(func, args, kwargs) if kind.may_write else []
        if marks >= OF_BOTH and kind.devices is not Devices.ANY:
            devices.check_operator(func, args, kwargs, written)
        capture = self.context.capture if self.is_capturing else None
        if capture is not None:
            self._check_captured(func, args, kwargs)
            result = capture.operator(func, args, kwargs)
        else:
            reads = [] if kind.reads_nothing else operands
            numbers = {id(t) for t in written}
            self._check_operands([t for t in reads if id(t) not in numbers], written)
            result = func(*args, **kwargs)
        if self._makes(func, result):
            written += self._put_results(func, operands, written, result, place)
        self._note_written(written, func, args)
        return result

    def _makes(self, func: Operator, result: object) -> bool:
        """Whether an operator has made its results, rather than views of tensors with a mark.

        One that is composed of others, such as `aten.to`, may do either.
        """
        if not self.context.kind_of(func).is_view:
            return True
        return any(places.mark_of(one) is None for one in tensors_in((result,)))

    def _put_results(
        self,
        func: Operator,
        operands: list[Tensor],
        written: list[Tensor],
        result: object,
        place: places.Mark,
    ) -> list[Tensor]:
        """Note where an operator's new results are; return them."""
        made = [t for one in tensors_in((result,)) for t in _parts(one)]
        is_one = self.context.kind_of(func).devices is Devices.ONE
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
        if self.context.capture is None or not self.is_capturing:
            return func(*args, **kwargs)
        written = written_by(func, args, kwargs) if self.context.kind_of(func).may_write else []
        return self.context.capture.host.execute(
            lambda: func(*args, **kwargs), func, operands, written
        )

    def _check_captured(self, func: Operator, args: Arguments, kwargs: Keywords) -> None:
        if what := capture_rules.read_by_operator(func, args, kwargs):
            self._refuse_read(what)
        if copied := host_copies.copied_by_operator(func, args, kwargs):
            self._refuse_copy(copied)
        assert self.context.capture is not None
        registered: tuple[Any, ...] = (
            torch.default_generator,
            *self.context.capture.graph.generators,
        )
        numbers = {one._cdata for one in registered}  # the operator has other objects of Python
        for generator in capture_rules.generators_of(args, kwargs):
            if generator._cdata not in numbers:
                self.context.refuse(
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
        work = self.context.streams.work()
        if self.is_capturing:
            return
        for t in tensors:
            setattr(t.untyped_storage(), WRITTEN, work)
        if self.context.capture is not None:
            self.context.capture.beside.note(
                self.context.streams.current, work, func, args, tensors
            )

    def launch(self, execute: Callable[..., None], arguments: Sequence[object]) -> None:
        """Execute a launch of a Triton kernel."""
        operands = tensors_of_launch(arguments)
        devices.check_launch(arguments)
        if self.is_capturing:
            assert self.context.capture is not None
            self.context.capture.launch(execute, arguments)
        else:
            # Which of them it reads is not known.
            self._check_operands([], operands)
            execute(arguments)
        self._note_written(operands)

    def has_device(self, tensors: Sequence[Tensor]) -> bool | None:
        marks = set(map(places.mark_of, tensors))
        return any(marks) or (False if marks == {False} else None)

    def tune(self, kernel: str) -> None:
        if self.is_capturing:
            self.context.refuse(
                "wait in a capture",
                f"the autotuner of {kernel} times its configurations, and waits for the GPU; "
                "launch the kernel once before the capture, with the same values of its key",
            )

    def _check_operands(self, read: list[Tensor], written: list[Tensor]) -> None:
        """Check what is read and written outside of a capture, but for what graphs made of it."""
        if not self.context.pools:  # nothing has been captured
            return
        for t in read:
            memory = memory_of(t)
            if memory is not None:
                self._check_read(t, memory)
        for t in (*read, *written):
            work = getattr(t.untyped_storage(), REPLAYED, None)
            if work is not None and not self.context.streams.is_ordered(work[0]):
                use = "reads" if any(t is one for one in read) else "writes"
                stream = self.context.streams.all[work[0][0]]
                self.context.note(
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
            self.context.note(
                "warning",
                "result of a reset graph",
                f"{shown(t)} is in the pool of a graph that was reset, and no replay computes it "
                "any more; clone it before reset()",
                program_line(),
                earlier,
            )
        elif graph.waits and self.context.capture is None:
            self.context.note(
                "error",
                "result before a replay",
                f"{shown(t)} has no values yet: a capture computes nothing; call graph.replay() "
                "first",
                program_line(),
                earlier,
            )
        elif memory.overwritten is not None:
            self.context.note(
                "error",
                "overwritten result",
                f"another graph with the same pool has used the memory of {shown(t)} since its "
                "replay; read it before the other graph's replay, or give that another pool",
                program_line(),
                ("overwritten by the replay", memory.overwritten),
            )

    # What PyTorch is told

    def answers(self) -> Attributes:
        """Return what `torch.cuda` says of graphs and streams."""
        streams = self.context.streams
        return {
            "synchronize": streams.synchronize,
            "current_stream": lambda device=None: streams.current,
            "default_stream": lambda device=None: streams.default,
            "set_stream": streams.set,
            "stream": streams.entered,
            "Stream": streams.Stream,
            "Event": streams.Event,
            "is_current_stream_capturing": lambda: self.is_capturing,
            "graph_pool_handle": lambda: self.context.pool().handle,
            "CUDAGraph": self.CUDAGraph,
            "default_generators": (torch.default_generator,),
            "manual_seed": self._seed,
            "manual_seed_all": self._seed,
        }

    def _seed(self, seed: int) -> None:
        """Seed the random numbers; in a capture a GPU refuses another seed, and ignores this one.

        `CUDAGeneratorImpl::set_current_seed` of PyTorch is the source.
        """
        capture = self.context.capture if self.is_capturing else None
        if capture is None:
            torch.default_generator.manual_seed(seed)
            return
        if int(seed) % 2**64 != torch.initial_seed():  # which is never negative
            self.context.refuse(
                "seed in a capture",
                f"manual_seed({seed}) in the capture is not the seed before it; call it before the "
                "capture",
            )
        self.context.note(
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
            (torch._C, {RAW_STREAM: lambda device: self.context.streams.current.cuda_stream}),
            (Optimizer, dict.fromkeys(HEALTH_CHECKS, self._check_optimizer())),
            (Optimizer, {"zero_grad": clearing(Optimizer.zero_grad, self._note_cleared)}),
            (Module, {"zero_grad": clearing(Module.zero_grad, self._note_cleared)}),
        ]

    def _check_optimizer(self) -> Callable[[Optimizer], None]:
        def check(optimizer: Optimizer) -> None:
            groups = optimizer.param_groups
            if self.is_capturing and not all(group.get("capturable") for group in groups):
                self.context.refuse(
                    "optimizer that is not capturable", why_not_capturable(optimizer)
                )

        return check


def _parts(t: Tensor) -> list[Tensor]:
    """Return what has the memory of an operator's result: itself, or a sparse tensor's parts."""
    if t.layout is torch.sparse_coo and type(t) in PLAIN:
        return [t._indices(), t._values()]
    return [t] if is_plain(t) else []
