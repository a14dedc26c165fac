# SPDX-License-Identifier: MIT
"""Captures of CUDA graphs: operators and launches are executed, recorded, and undone at the end."""

import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._pytree import tree_leaves, tree_map

from nogpu.cuda import host_copies, places
from nogpu.cuda.accesses import Access, Accesses, Part, part_at, part_of
from nogpu.cuda.by_shapes import by_shapes, check_with_other_values
from nogpu.cuda.captured_gradients import Gradients, parameters_of
from nogpu.cuda.context import CaptureState, Context
from nogpu.cuda.graph_memory import GraphState, Line, Memory, Pool, Slot, memory_of
from nogpu.cuda.host_values import HostValues, results_on_host
from nogpu.cuda.operations import (
    LaunchOperation,
    Operation,
    tensors_of_launch,
    with_tensors,
    written_by,
)
from nogpu.cuda.stale_streams import StaleStreams
from nogpu.cuda.steps import Step, has_host_count, why_not_capturable
from nogpu.cuda.streams import Stream
from nogpu.cuda.types import Arguments, Keywords, Operator
from nogpu.cuda.uncaptured import Beside
from nogpu.record.source import program_line
from nogpu.triton.torch_operators import EMPTY, is_plain

T = TypeVar("T")
# An operator that the CPU lacks, and a decomposition whose outcome a GPU reads back.
NOT_OF_VALUES = (NotImplementedError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]


class Capture(CaptureState):
    """A capture under way: what it records, and the memory that this uses.

    Attributes:
        memories: by the storages' addresses in C++.
        parameters: leaves of autograd that operators take.
        beside: the work of this thread that is not captured.
        host: what the capture takes from tensors of the host.
    """

    def __init__(self, context: "Context[Capture]", graph: GraphState, pool: Pool, line: Line):
        super().__init__(context.streams.current, line)
        self.context, self.graph, self.pool = context, graph, pool
        self.operations: list[Operation] = []
        self.memories: dict[int, Memory] = {}
        self.parameters: dict[int, weakref.ref[Tensor]] = {}
        self.steps: list[Step] = []
        self.beside = Beside()
        self.host = HostValues()
        self.gradients = Gradients(graph, self.memory)
        self.accesses = Accesses(context.streams)
        self._refused: set[Memory] = set()
        self._states: list[tuple[torch.Generator, Tensor]] = [
            (one, one.get_state()) for one in (torch.default_generator, *graph.generators)
        ]
        self._hooks = ExitStack()
        self._hooks.callback(register_optimizer_step_pre_hook(self._check_step).remove)
        self._hooks.callback(register_optimizer_step_post_hook(self._note_step).remove)
        self._hooks.callback(StaleStreams(context.streams, context.refuse).end)

    def _check_step(self, optimizer: Optimizer, args: Arguments, kwargs: Keywords) -> None:
        if not self.context.is_capturing:
            return
        if has_host_count(optimizer):  # some, such as Adagrad, have no check of their own
            self.context.refuse("optimizer that is not capturable", why_not_capturable(optimizer))
        self.gradients.note_step(parameters_of(optimizer))

    def _note_step(self, optimizer: Optimizer, args: Arguments, kwargs: Keywords) -> None:
        if self.context.is_capturing:
            self.steps.append(Step(optimizer, program_line()))

    # Memory

    def memory(self, t: Tensor) -> Memory:
        """Return the memory of a tensor that the graph reads or writes."""
        storage = t.untyped_storage()
        found = memory_of(t) or self.memories.get(storage._cdata)
        if found is None or not found.is_memory_of(storage):
            # PyTorch never gives out again what was pinned in a capture, and used there.
            keep = self.host.has_made(t) and places.is_pinned(t)
            found = Memory(t, program_line(), keep=keep)
        if (number := self.beside.use(storage)) is not None:
            found.uncaptured = number
        self.memories[storage._cdata] = found
        return found

    def _is_outside(self, memory: Memory) -> bool:
        """Whether the memory was there before, outside of the pools or in that of another graph."""
        return memory.graph is not self.graph

    def slot(self, value: object) -> object:
        """Return where a tensor lies in its memory; other values as they are."""
        return self._slot_of(value) or value

    def _slot_of(self, value: object) -> Slot | None:
        if not isinstance(value, Tensor) or not is_plain(value):
            return None
        if not value.untyped_storage().nbytes():
            return None
        if value.requires_grad and value.is_leaf and id(value) not in self.parameters:
            self.parameters[id(value)] = weakref.ref(value)
            self.gradients.watch(value)
        return Slot(value, self.memory(value))

    def adopted(self, result: T, given: set[int]) -> T:
        """Return results whose new memory belongs to the graph.

        Args:
            given: the storages of the operands, in C++.
        """
        made: dict[int, torch.UntypedStorage] = {}

        def adopt(value: object) -> object:
            if not isinstance(value, Tensor) or not is_plain(value):
                return value
            storage = value.untyped_storage()
            number = storage._cdata
            if number in given or memory_of(value) or not storage.nbytes():
                return value
            if number not in made:
                memory = Memory(value, program_line(), graph=self.graph)
                made[number] = memory.given_out()
                self.pool.place(memory)
                self.memories[made[number]._cdata] = memory
            place = value.storage_offset(), value.size(), value.stride()
            return torch.empty(0, dtype=value.dtype).set_(made[number], *place)

        found: T = tree_map(adopt, result)
        return found

    # What is recorded

    def operator(self, func: Operator, args: Arguments, kwargs: Keywords) -> object:
        """Execute an operator, and record it if it is more than a view."""
        operands: list[Tensor] = [t for t in tree_leaves((args, kwargs)) if is_plain(t)]
        given = {t.untyped_storage()._cdata for t in operands}
        written = written_by(func, args, kwargs)
        taken = self._taken(func, args, kwargs, operands, written)
        slots: tuple[Arguments, Keywords] = tree_map(
            lambda value: taken.get(id(value)) or self.slot(value), (args, kwargs)
        )
        for t in written:
            if t.untyped_storage().nbytes() and self._is_outside(self.memory(t)):
                self.memory(t).keep_before()
        self.gradients.zero(func, written)
        others = [t for t in operands if id(t) not in taken]
        result = self._results(func, args, kwargs, others)
        for t in results_on_host(func, result):
            self.host.derive(t, operands)
            given.add(t.untyped_storage()._cdata)
        result = self.adopted(result, given)
        results = [
            None if is_plain(t) and t.untyped_storage()._cdata in given else self._slot_of(t)
            for t in tree_leaves(result)
        ]
        computes = any(one is not None for one in results)
        if written or (computes and func.overloadpacket not in EMPTY):
            self.operations.append(Operation(func, *slots, results, program_line()))
            self._note_accesses(func, args, operands, written, results)
        return result

    def _note_accesses(
        self,
        func: Operator,
        args: Arguments,
        operands: list[Tensor],
        written: list[Tensor],
        results: list[Slot | None],
    ) -> None:
        numbers, kind = {id(t) for t in written}, self.context.kind_of(func)
        indexed = args[0] if kind.is_indexed and args else None

        def parts(tensors: list[Tensor]) -> list[Part]:
            slots = [(self._slot_of(t), t is indexed) for t in tensors]
            return [part_of(slot, is_assumed) for slot, is_assumed in slots if slot]

        reads = [] if kind.reads_nothing else operands
        read = [t for t in reads if id(t) not in numbers and places.is_on_device(t)]
        self._note_races(parts(read), parts(written) + [part_of(one) for one in results if one])

    def _note_races(self, reads: list[Part], writes: list[Part]) -> None:
        race = self.accesses.note(reads, writes)
        if race is not None:
            self._note_race(*race)

    def _note_race(self, before: Access, access: Access) -> None:
        """Note two accesses that have no order."""
        streams = self.context.streams
        stream, current = streams.all[before.work[0]], streams.current
        names = [
            one.name or ("torch.cuda.current_stream()" if one is self.origin else "stream")
            for one in (current, stream)
        ]
        if names[0] == names[1]:  # both were a loop's variable, or have none
            names = ["stream", "other"]
        other = "another stream" if str(stream) == str(current) else str(stream)
        is_assumed = access.part.is_assumed or before.part.is_assumed
        self.context.note(
            "warning" if is_assumed else "error",
            "missing wait",
            f"{current} {access} {access.part.memory.name}, and {other} {before} it, without an "
            f"order in a replay; call {names[0]}.wait_stream({names[1]}) between them, within the "
            "capture",
            access.line,
            None if before.line is None else ("captured", before.line),
            key=is_assumed,
        )

    def _note_accesses_of(self, launch: list[Tensor], before: dict[Memory, Tensor]) -> None:
        """Note what a launch has changed, as written; its other operands, as read."""
        with self.context.unwatched():
            changed = {memory: content != memory.content for memory, content in before.items()}
            writes = [part_at(*one) for one in changed.items() if one[1].any()]
            written = {one.memory for one in writes}
            slots = [one for one in map(self._slot_of, launch) if one]
            reads = [part_of(one, is_assumed=True) for one in slots if one.memory not in written]
            self._note_races(reads, writes)

    def _results(
        self, func: Operator, args: Arguments, kwargs: Keywords, operands: list[Tensor]
    ) -> object:
        """Execute an operator, or take results of its shapes if it refuses its operands' values.

        A GPU sees no values in a capture. Indices that one operator has refused are given to no
        other one: nll_loss_backward, for example, writes where they point.
        """
        indices = {self.memory(t) for t in operands if _may_be_index(t)}
        if indices & self._refused and not self.context.kind_of(func).is_view:
            if func.namespace == "aten":
                check_with_other_values(func, args, kwargs)
            return by_shapes(func, args, kwargs)
        try:
            return func(*args, **kwargs)
        except (IndexError, RuntimeError) as error:
            if func.namespace != "aten" or isinstance(error, NOT_OF_VALUES):
                raise
            try:
                check_with_other_values(func, args, kwargs)
                result = by_shapes(func, args, kwargs)
            except (IndexError, RuntimeError):  # not the values alone are wrong
                raise error from None
            self._refused |= indices
            return result

    def _taken(
        self,
        func: Operator,
        args: Arguments,
        kwargs: Keywords,
        operands: list[Tensor],
        written: list[Tensor],
    ) -> dict[int, Slot]:
        """Return slots for operands of the host, by their numbers in Python, with their values now.

        PyTorch reads them while it launches, but for copies from pinned memory. One whose place is
        not known is taken for a number of the host if it has no dimensions.
        """
        if host_copies.is_later(func, args, kwargs):
            self.host.take(filter(self.host.has_made, operands))
            return {}
        numbers = {id(t) for t in written}
        found = [
            t
            for t in operands
            if (places.mark_of(t) is False or (t.dim() == 0 and not places.is_on_device(t)))
            and id(t) not in numbers
            and memory_of(t) is None
            and t.untyped_storage().nbytes()
        ]
        self.host.take(found)
        return {id(t): Slot(t, Memory(t, program_line()).copied()) for t in found}

    def launch(self, execute: Callable[..., None], arguments: Sequence[object]) -> None:
        operands = tensors_of_launch(arguments)
        memories = {self.memory(t) for t in operands if t.untyped_storage().nbytes()}
        before = {one: one.content.clone() for one in memories}
        outside = [one for one in memories if self._is_outside(one) and one.before is None]
        for one in outside:
            one.keep_before()
        execute(arguments)
        self._note_accesses_of(operands, before)
        for one in outside:
            if one.before is not None and torch.equal(one.before, one.content):
                one.before = None
        slots = tuple(with_tensors(one, self.slot) for one in arguments)
        self.operations.append(LaunchOperation(execute, slots, program_line()))

    # The end

    def end(self) -> None:
        """Let all memory be as before the capture, and what it has computed be hidden."""
        self._hooks.close()
        self.gradients.end()
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


def _may_be_index(t: Tensor) -> bool:
    is_number = t.dtype.is_floating_point or t.dtype.is_complex or t.dtype is torch.bool
    return not is_number and bool(t.untyped_storage().nbytes())
