# SPDX-License-Identifier: MIT
"""`torch.cuda.CUDAGraph` on a CPU: a replay executes what was captured, in the same memory."""

import sys
import warnings

import torch

from nogpu.cuda.capture import Capture
from nogpu.cuda.captured_gradients import Gradient
from nogpu.cuda.context import Context
from nogpu.cuda.graph_memory import REPLAYED, WRITTEN, GraphState, Line, Pool, memory_of
from nogpu.cuda.host_values import HostChange, HostValue
from nogpu.cuda.operations import Operation
from nogpu.cuda.steps import Change, Step
from nogpu.cuda.streams import Stream
from nogpu.cuda.types import PoolHandle
from nogpu.cuda.uncaptured import advice
from nogpu.record.faults import Kind
from nogpu.record.launch import CapturedGraph
from nogpu.record.source import program_line

Earlier = tuple[str, tuple[str, int]] | None  # as in `HostFault`
MOST_NAMES = 3  # of tensors in a message
MODES = ("global", "thread_local", "relaxed")
WITHIN = "capture within `with torch.cuda.graph(graph):`, which takes a stream of its own"
EMPTY_GRAPH = (
    "The CUDA Graph is empty. This usually means that the graph was attempted to be captured on "
    "wrong device or stream."
)

KEEP = "keep the tensor, and change it in place: x.copy_(new), not x = new"
KEEP_GRADIENT = (
    "keep it: call zero_grad(set_to_none=False), or zero_grad() within the capture, before "
    "backward()"
)


class CUDAGraph(GraphState):
    """A CUDA graph."""

    _context: Context[Capture]  # of the emulator

    def __init__(self, keep_graph: bool = False):
        super().__init__()
        self.operations: list[Operation] = []
        self.steps: list[Step] = []
        self._gradients: list[Gradient] = []
        self._host_values: list[HostValue] = []
        self._host_changes: list[HostChange] = []
        self._pool: Pool | None = None

    def capture_begin(
        self,
        pool: PoolHandle | torch.cuda.MemPool | None = None,
        capture_error_mode: str = "global",
        check_input_liveness: bool = False,
    ) -> None:
        """Begin to record what the current stream does."""
        context = self._context
        if capture_error_mode not in MODES:
            raise RuntimeError(
                f"capture_error_mode is {capture_error_mode!r}, expected one of {', '.join(MODES)}"
            )
        if context.capture is not None:
            raise RuntimeError("another capture is under way; end it before this one")
        if context.streams.current is context.streams.default:
            raise RuntimeError(
                "CUDA graphs must be captured on a non-default stream. (However, after capture, "
                f"it's ok to replay them on the default stream.) {WITHIN}"
            )
        if self.is_captured:
            raise RuntimeError(
                "This CUDAGraph instance already owns a captured graph. To capture a new graph, "
                "create a new instance, or call reset()"
            )
        with context.unwatched():
            context.show_captured(True)
        self._pool = context.pool(pool)
        self._handled = sys.exc_info()[1]  # an error that the program is handling anyway
        context.capture = Capture(context, self, self._pool, program_line())

    def capture_end(self) -> None:
        """End the capture; a replay computes what it has recorded."""
        context, capture = self._context, self._context.capture
        if capture is None or capture.graph is not self:
            raise RuntimeError("no capture of this graph is under way; call capture_begin()")
        context.capture = None
        with context.unwatched():
            capture.end()
            context.show_captured(False)
        if sys.exc_info()[1] is not self._handled:  # the program leaves the capture by an error
            return
        if capture.has_failed:
            raise RuntimeError(
                "CUDA error: operation failed due to a previous error during capture; mend that one"
            )
        self._check_joined(capture)
        self._check_beside(capture)
        self.operations, self.steps = capture.operations, capture.steps
        self.memories = list({id(one): one for one in capture.memories.values()}.values())
        self.is_captured = True
        context.graphs.add(self)
        launches = sum(one.is_launch for one in self.operations)
        self.counted = CapturedGraph(capture.line, len(self.operations) - launches, launches)
        context.emulator.graphs.append(self.counted)
        if not self.operations:
            warnings.warn(EMPTY_GRAPH, stacklevel=2)
            context.note("warning", "empty graph", EMPTY_GRAPH, capture.line)
        self._check_steps()
        self._keep_gradients(capture)
        self._keep_host(capture)

    def _check_joined(self, capture: Capture) -> None:
        for other in capture.unjoined()[:1]:
            message = (
                f"the capture ends before the work that it began on {other}; call "
                f"torch.cuda.current_stream().wait_stream({other.name or 'other'}) within the "
                "capture"
            )
            begun = None if capture.line is None else ("captured", capture.line)
            self._context.note("error", "unjoined work", message, program_line(), begun)
            raise RuntimeError(f"CUDA error: capturing stream has unjoined work: {message}")

    def _check_beside(self, capture: Capture) -> None:
        """Check that the program has forgotten no stream that was to be captured."""
        begun = None if capture.line is None else ("captured", capture.line)
        for work in capture.beside.faults():
            self._context.note(
                "error" if work.is_used else "warning",
                "work that is not captured",
                f"{work.stream} is not captured, so that its work runs once, and no replay repeats "
                f"it; call {advice(work.stream)} before it, within the capture",
                work.line,
                ("used", work.used) if work.used else begun,
            )

    def _check_steps(self) -> None:
        """Check that optimizers had their state before the capture."""
        for step in self.steps:
            for key, t in step.state():
                memory = memory_of(t)
                if memory is not None and memory.graph is self:
                    self._context.note(
                        "error",
                        "state made in a capture",
                        f"{step.name} made {key} in the capture, so that each replay makes it "
                        "anew; call step() a few times before the capture, on another stream",
                        step.line,
                    )
                    break

    def _keep_gradients(self, capture: Capture) -> None:
        """Remember the gradients that the graph accumulates."""
        taken = {id(p) for step in self.steps for p in step.parameters()}
        self._gradients = list(capture.gradients.found.values())
        for gradient in self._gradients:
            gradient.end(taken)

    def _keep_host(self, capture: Capture) -> None:
        """Remember what the graph has of the host, but for what has a name of its own."""
        self._host_changes = list(capture.host.changes())
        named = {t.untyped_storage()._cdata for step in self.steps for t in step.tensors()}
        named |= {one.of.cdata for one in self._host_changes}
        self._host_values = [one for one in capture.host.taken if one.of.cdata not in named]

    def instantiate(self) -> None: ...

    def replay(self) -> None:
        """Compute what the capture has recorded, in the same memory."""
        context, line = self._context, program_line()
        if not self.is_captured:
            raise RuntimeError(
                "Called CUDAGraph::replay without a preceding successful capture. Capture it first"
            )
        if context.capture is not None:
            raise RuntimeError("a replay within a capture is not emulated; replay it outside")
        self._check_inputs(line)
        self._check_gradients(line)
        self._check_numbers(line)
        self._check_host(line)
        with context.unwatched():
            for operation in self.operations:
                self._execute(operation, line)
        self.replays += 1
        context.replays += 1
        self.counted.replays += 1
        self._note_replay(line)

    def _execute(self, operation: Operation, line: Line) -> None:
        try:
            operation()
        except (IndexError, RuntimeError) as error:
            if operation.is_launch:
                raise
            message = (
                f"{operation} cannot compute with the values that its operands have in this "
                f"replay: {str(error).splitlines()[0]}"
            )
            captured = None if operation.line is None else ("captured", operation.line)
            self._context.note("error", "invalid value in a replay", message, line, captured)
            raise RuntimeError(f"CUDA error: device-side assert triggered: {message}") from None

    def _check_inputs(self, line: Line) -> None:
        """Check that what the graph uses outside of its pool is there, and written."""
        streams = self._context.streams
        # Tensors of one line, such as a batch and its labels; gradients have other advice.
        freed: dict[tuple[Earlier, bool], list[str]] = {}
        unordered: dict[tuple[Earlier, Stream], list[str]] = {}
        for memory in self.memories:
            earlier = None if memory.read is None else ("captured", memory.read)
            if memory.graph is not None:
                self._check_graph(memory.graph, line, earlier)
            if memory.graph is not None or memory.is_kept:
                continue
            storage = memory.storage()
            if storage is None:
                if memory.uncaptured is None:  # for that the capture has named the fault
                    freed.setdefault((earlier, memory.is_gradient), []).append(memory.name)
                memory.replace()
                continue
            work = getattr(storage, WRITTEN, None)
            if work in (None, memory.uncaptured):
                continue
            if not streams.is_ordered(work):
                unordered.setdefault((earlier, streams.all[work[0]]), []).append(memory.name)
        for (earlier, is_gradient), names in freed.items():
            self._context.note(
                "error",
                "freed input",
                f"the graph uses the memory of {_listed(names, 'and of')}, which has been freed "
                f"since the capture; {KEEP_GRADIENT if is_gradient else KEEP}",
                line,
                earlier,
            )
        for (earlier, stream), names in unordered.items():
            self._context.note(
                "error",
                "missing wait",
                f"the graph uses {_listed(names, 'and')}, which {stream} may still write; call "
                f"torch.cuda.current_stream().wait_stream({stream.name or 'stream'}) before the "
                "replay",
                line,
                earlier,
            )

    def _check_graph(self, other: GraphState, line: Line, earlier: Earlier) -> None:
        """Check that a graph whose result this one uses has computed it."""
        if other is not self and other.waits:
            self._context.note(
                "error",
                "result before a replay",
                "the graph uses a result of another graph that has no values yet: a capture "
                "computes nothing; replay the other graph first",
                line,
                earlier,
            )

    def _check_gradients(self, line: Line) -> None:
        """Check that parameters have the gradients that the graph accumulates."""
        uses = self._context.uses
        with self._context.unwatched(), torch._C.DisableTorchFunction():
            replaced = [one for one in self._gradients if one.is_replaced()]
            ignored = [one for one in self._gradients if one.is_ignored()]
            mixed = [one for one in self._gradients if one.note_uses(uses)]
        for one in replaced:
            self._note_gradient("error", "replaced gradient", one, line, _replaced(one))
        for one in ignored:
            message = (
                f"{one} was None when the capture began, so that the replay overwrites it, and "
                "ignores the values that .grad has now; call zero_grad() before the replay, or add "
                "them up in the graph: capture while .grad is a tensor, and keep that one"
            )
            self._note_gradient("warning", "ignored gradient", one, line, message)
        for one in mixed:
            message = (
                f"{one} was None when the capture began, so that each replay overwrites it, and "
                "none adds to it; zero_grad() was called before some replays, and not before this "
                "or another one: call it within the capture, before backward(), or before each "
                "replay"
            )
            self._note_gradient("warning", "overwritten gradient", one, line, message)

    def _note_gradient(
        self, kind: Kind, name: str, gradient: Gradient, line: Line, message: str
    ) -> None:
        earlier = None if gradient.line is None else ("captured", gradient.line)
        self._context.note(kind, name, message, line, earlier)

    def _check_host(self, line: Line) -> None:
        """Check that tensors of the host are as in the capture, or as a replay leaves them."""
        changed: dict[Earlier, list[str]] = {}
        with self._context.unwatched(), torch._C.DisableTorchFunction():
            for value in self._host_values:
                if value.has_changed():
                    earlier = None if value.line is None else ("captured", value.line)
                    changed.setdefault(earlier, []).append(value.name)
        for earlier, names in changed.items():
            self._context.note(
                "warning",
                "host's values in a graph",
                f"the graph still computes with the values that {_listed(names, 'and')} of the "
                "host had in the capture, and they have changed; capture again, or read them from "
                "a tensor on the device, and change that in place",
                line,
                earlier,
            )
        # The first replay belongs to the call that captured, which has changed them once.
        for change in self._host_changes if self.replays else ():
            self._context.note(
                "warning",
                "host's work in a capture",
                f"the capture has changed {change.name} of the host, and no replay does so again; "
                "change it after graph.replay(), or take a tensor on the device",
                line,
                None if change.line is None else ("captured", change.line),
            )

    def _check_numbers(self, line: Line) -> None:
        """Check that optimizers have the numbers that the graph computes with."""
        for step in self.steps:
            with self._context.unwatched(), torch._C.DisableTorchFunction():
                changes = list(step.changes())
            for change in changes:
                how, instead = _explained(change)
                self._context.note(
                    "warning",
                    "number in a graph",
                    f"the graph still {how}, and {step.name} has {change.name}={change.now}; "
                    f"capture again, or{instead}",
                    line,
                    None if step.line is None else ("captured", step.line),
                    (change.name, step.name),
                )

    def _note_replay(self, line: Line) -> None:
        work = self._context.streams.work()
        for memory in self.memories:
            storage = memory.storage()
            if storage is not None:
                setattr(storage, REPLAYED, (work, line))
                setattr(storage, WRITTEN, work)
        assert self._pool is not None
        self._pool.overwrite(self, line)

    def reset(self) -> None:
        """Forget what was captured."""
        self.is_reset, self.is_captured = self.is_captured, False
        self.operations, self.memories, self.steps, self._gradients = [], [], [], []
        self._host_values, self._host_changes = [], []

    def pool(self) -> PoolHandle:
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


def _replaced(gradient: Gradient) -> str:
    """Say what a replay does with a gradient that is not that of the capture, and what to do."""
    if gradient.is_made:
        return (
            f"the graph writes {gradient} into memory that its .grad does not have any more; call "
            "zero_grad(set_to_none=False), or none: a replay overwrites gradients"
        )
    return (
        f"the graph adds to {gradient} that there was in the capture, and .grad is not that tensor "
        "any more; call zero_grad(set_to_none=False), or zero_grad() within the capture, before "
        "backward()"
    )


def _listed(names: list[str], word: str) -> str:
    """Name tensors in a message: the first ones, and how many more there are."""
    shown = names[:MOST_NAMES]
    if more := len(names) - len(shown):
        shown.append(f"{more} more")
    return f" {word} ".join(shown)


def _explained(change: Change) -> tuple[str, str]:
    """Say where a graph has a number from, and what lets it change."""
    number = f"{change.name}={change.before}"
    if change.is_kept:
        in_place = f"change it in place: group['{change.name}'].fill_(number)"
        return (
            f"reads {number} from a tensor that was replaced",
            f" keep that tensor, and {in_place}",
        )
    return (
        f"computes with {number}",
        ", if the optimizer takes a tensor, make it one on the device before the capture, and "
        "change it in place",
    )
