# SPDX-License-Identifier: MIT
"""A training step as one launch: `graphed` captures it in a CUDA graph, and replays the graph.

    def step(x, labels):
        loss = cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    step = graphed(step, optimizer)
    for x, labels in batches:
        loss = step(x, labels)
        lr_scheduler.step()

A step of a small network is hundreds of short kernels. To launch one takes the host longer than the
GPU needs to run it. A replay launches all of them at once.
"""

import copy
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from torchpar.errors import ConfigError, first_line
from torchpar.library.sharding import local
from torchpar.parallel.launch.world import hold_communicators
from torchpar.training.leaf_gradients import LeafGradients
from torchpar.training.optimizer_state import optimizers_of
from torchpar.training.step_effects import HOST, OutsideTensor, StepEffects, stepped_optimizers

T = TypeVar("T")
# Eager calls before a capture. In its first ten steps, and in each hundredth,
# DistributedDataParallel records events to time them, which a capture must not do (PyTorch's notes
# on CUDA graphs).
WARMUP, WARMUP_DDP = 3, 11
PATIENCE = 10  # times the warm-up, without a capture, before a warning
GRAPHS = 16  # that are kept
REPLACED = 3  # times that tensors of the step are replaced, without a replay, before an error
_VALUES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_replays: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
# Contexts around each replay, for which no hook of PyTorch is called. They are given the
# optimizers, the step's inputs in the graph's memory, and its results.
around_replays: list[
    Callable[[Sequence[Optimizer], object, object], AbstractContextManager[object]]
] = []


def graphed(
    step: Callable[..., T],
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    warmup: int | None = None,
) -> Callable[..., T]:
    """Return ``step`` as a function that replays a CUDA graph of it; on a CPU, ``step`` itself.

    ``step`` computes a loss, its gradients and an update, all on the GPU. Its first calls run
    eagerly, on a stream of their own. After ``warmup`` calls with inputs of the same shapes, the
    step is captured in the next call that is like the one before it. From then on a call copies its
    inputs to where the graph reads them, and replays it. A call with inputs of other shapes, such
    as an epoch's last batch, runs eagerly; shapes that take turns have a graph each, and the 16
    graphs that were used last are kept. Each call is one step, and no step is repeated.

    A graph keeps the numbers of its capture. So:

    - Learning rates may change between calls, by a scheduler or by hand: within the step they are
      float32 tensors on the GPU, which get the value of each group's ``lr`` before a replay.
    - Other settings of a group, arguments that are no tensors, and tensors of the host that the
      step reads are compared at each call. When one has changed, calls warm up again, and the step
      is captured for the new value. So it is, too, when a parameter or a tensor of the optimizer's
      state is another one, as after ``load_state_dict``. While a momentum changes in each step, as
      by default under ``OneCycleLR``, no step is captured; a warning says so.
    - Gradients that exist when a call begins are added to, as in the eager step: those of a penalty
      whose ``backward()`` was called before, or of calls without ``zero_grad``, also in parameters
      of other optimizers. Where other parameters have gradients than at the capture, the step is
      captured for them, too.
    - Other tensors that the step uses, such as a teacher's weights, may change in place. Where the
      program puts another tensor in the place of one, calls warm up again.
    - All else that the step reads from Python is as it was in the capture: ``model.train()``,
      ``t.tolist()``, and numbers that it returns.

    ``capturable`` becomes True in the optimizers' groups that have it, and the groups of SGD become
    ``fused``: its other implementations read the rate back, and it takes no sparse gradients. With
    `torch.amp.GradScaler`, make the optimizer with ``fused=True``.

    DistributedDataParallel needs NCCL for this, and must be made within `side_stream`. Its ranks
    must call the step equally often; a call that runs eagerly on one must do so on all.

    Args:
        step: takes and returns tensors, numbers, strings and None, also in tuples, lists and dicts.
            It gets copies of the tensors, on the GPU; tensors in pinned memory are read after the
            call has returned. Hooks of the optimizer run when it is captured, and not when it is
            replayed. A loss of an earlier pass that is still alive would tie the gradients to that
            pass's stream: delete it.
        optimizer: each optimizer whose ``step`` the step calls. One that a wrapper calls need not
            be named if it has the wrapper's rate.
        warmup: eager calls before a capture; by default 3, and 11 where `torch.distributed` is
            initialized, for DistributedDataParallel.

    Returns:
        ``step``, whose tensors are copies that later calls do not change, without autograd's graph.

    Raises:
        ConfigError: ``optimizer`` is not an optimizer, or has no parameters; ``warmup`` is below 1.
            From a call: the step cannot be captured, changes a rate or a tensor of the host, counts
            steps on the host, draws random numbers there, calls an optimizer that was not passed,
            or does not call the same ones in each call; the program replaces a tensor that the step
            uses from call to call; a sparse gradient or input; an argument or a result of another
            kind.
    """
    optimizers: list[Any] = [*optimizer] if isinstance(optimizer, tuple | list) else [optimizer]
    wrong = [one for one in optimizers if not isinstance(one, Optimizer)]
    if wrong or not optimizers:
        kind = repr(optimizer) if optimizer in (None, []) else f"a {type(optimizer).__name__}"
        kind += f" with a {type(wrong[0]).__name__}" if wrong and wrong != [optimizer] else ""
        raise ConfigError(
            f"optimizer is {kind}, expected the optimizer that the step calls, or a list of "
            "several; call a scheduler after the step"
        )
    if warmup is None:
        warmup = WARMUP_DDP if dist.is_available() and dist.is_initialized() else WARMUP
    if type(warmup) is not int or warmup < 1:
        raise ConfigError(f"warmup is {warmup!r}, expected a whole number from 1 on")
    parameters = [p for one in optimizers for group in one.param_groups for p in group["params"]]
    if not parameters:
        raise ConfigError("the optimizer has no parameters, expected those that the step updates")
    if not parameters[0].is_cuda:
        return step
    return _GraphedStep(step, optimizers, warmup, parameters[0].device)


def side_stream() -> AbstractContextManager[None]:
    """Let a block run on the stream on which `graphed` warms up and captures; nothing on a CPU.

    Where DistributedDataParallel was made on the default stream, its gradients are added up there,
    which no capture on another stream may do (PyTorch's notes on CUDA graphs).
    """
    if not torch.cuda.is_available():
        return nullcontext()
    return _on(torch.device("cuda", torch.cuda.current_device()))


def count_replays(optimizer: Optimizer) -> int:
    """Return how often a replay has stepped ``optimizer``; its hooks have not seen those steps."""
    return max(_replays.get(one, 0) for one in optimizers_of(optimizer))


@dataclass
class _Graph:
    """A captured step.

    Attributes:
        inputs, outputs: what the step was given, and returned, in the graph's memory.
    """

    graph: torch.cuda.CUDAGraph
    inputs: Any
    outputs: Any
    gradients: LeafGradients
    used: int = 0  # how many replays there had been at its last one


class _GraphedStep:
    def __init__(
        self,
        step: Callable[..., Any],
        optimizers: list[Optimizer],
        warmup: int,
        device: torch.device,
    ):
        self._step, self._optimizers, self._warmup, self._device = step, optimizers, warmup, device
        self._parts = [part for one in optimizers for part in optimizers_of(one)]
        self._inner: list[Optimizer] = []  # that those call, such as the optimizer of a wrapper
        self._rates: list[_Rate] = []
        self._outside: dict[int, OutsideTensor] = {}  # that the step uses, beside `_tensors`
        self._leaves: dict[int, ref[Tensor]] = {}  # whose gradients of before the step it uses
        self._replaced = 0  # times that one of them was replaced, since the last replay
        self._steps: dict[Hashable, list[Optimizer]] = {}  # of a call, by its signature
        self._patterns: dict[Hashable, set[Hashable]] = {}  # gradients with which eager calls began
        self._last: Hashable = None  # the signature of the last call
        self._calls: Counter[Hashable] = Counter()  # eager ones, by their signature
        self._since_capture = 0  # eager calls
        self._replayed = self._evicted = 0
        self.release()
        hold_communicators(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_stale() or (self._graphs and not self._has_its_memory()):
            self.release()
            self._calls.clear()
        for part in (*self._parts, *self._inner):
            if not (self._graphs and _is_capturable(part)):
                _let_capture(part, self._device)
        signature = self._signature(args, kwargs)
        is_like_last, self._last = signature == self._last, signature
        for captured in self._graphs.get(signature, ()):
            if captured.gradients.fit():
                return self._replay(captured, args, kwargs)
        # The optimizer makes its state in an eager call with these gradients.
        is_known = self._pattern() in self._patterns.get(signature, ())
        if self._calls[signature] >= self._warmup and is_like_last and is_known:
            return self._replay(self._capture(signature, args, kwargs), args, kwargs)
        return self._run(signature, args, kwargs)

    def release(self) -> None:
        """Free the graphs and their memory. The next calls warm up for others."""
        # By the signature. Those of one signature begin with gradients for other leaves.
        self._graphs: dict[Hashable, list[_Graph]] = {}
        self._memory: list[tuple[Tensor, int]] = []  # what the graphs read, and where

    def _groups(self) -> list[dict[str, Any]]:
        groups = [group for one in self._optimizers for group in one.param_groups]
        return [*{id(group): group for group in groups}.values()]  # wrappers share some

    def _parameters(self) -> Iterator[Tensor]:
        for group in self._groups():
            yield from group["params"]

    def _count(self, signature: Hashable) -> None:
        if len(self._calls) > GRAPHS:  # of calls that are all different
            self._calls.clear()
            self._steps.clear()
            self._patterns.clear()
        self._calls[signature] += 1
        self._since_capture += 1
        if self._since_capture == PATIENCE * (self._warmup + 1) and not self._graphs:
            warnings.warn(
                f"{self._since_capture} calls of a step were not captured: from call to call its "
                "inputs had other shapes, or an argument that is no tensor changed, or a tensor of "
                "the host that it reads, or a setting of the optimizer, such as the momentum under "
                "OneCycleLR; take cycle_momentum=False, or the step without graphed",
                stacklevel=4,
            )

    def _signature(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
        """Return what must be equal for a replay."""
        settings = tuple(
            str(value) if not isinstance(value, float | int) else value
            for group in self._groups()
            for name, value in group.items()
            if name not in ("params", "param_names", "lr") and not isinstance(value, Tensor)
        )
        autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        modes = torch.is_grad_enabled(), autocast
        trained = tuple([p.requires_grad for p in self._parameters()])
        read = [one.contents() for one in self._outside.values() if one.is_on_host]
        return _describe(args), _describe(kwargs), settings, modes, trained, *read

    def _pattern(self) -> Hashable:
        """Return which parameters have a gradient."""
        return tuple([p.grad is None for p in self._parameters()])

    def _is_stale(self) -> bool:
        """Whether the program has replaced a tensor that the step used; forget them then.

        Raises:
            ConfigError: it does so again and again.
        """
        gone = [one for one in self._outside.values() if one.tensor() is None]
        if not gone:
            return False
        self._replaced += 1
        if self._replaced == REPLACED:
            raise ConfigError(
                f"the step uses a tensor that the program replaces from call to call "
                f"({gone[0].line}), and a replay uses the one of its capture; change it in place, "
                "as by copy_, or pass it to the step"
            )
        self._outside.clear()
        return True

    def _tensors(self) -> Iterator[Tensor]:
        """Yield the tensors that a step reads beside its inputs and gradients."""
        for one in (*self._optimizers, *self._inner):
            for group in one.param_groups:
                yield from group["params"]
                yield from (value for value in group.values() if isinstance(value, Tensor))
            yield from _state_tensors(one)

    def _has_its_memory(self) -> bool:
        """Whether the tensors that the graphs read are the same, in the same places."""
        before, now = self._memory, list(self._tensors())
        return len(before) == len(now) and all(
            t is mine and local(t).data_ptr() == place
            for t, (mine, place) in zip(now, before, strict=True)
        )

    def _run(self, signature: Hashable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._count(signature)
        self._patterns.setdefault(signature, set()).add(self._pattern())
        effects = None
        if self._calls[signature] == self._warmup:  # the last call before a capture
            rates = [rate.tensor for rate in self._rates]
            effects = StepEffects([*self._tensors(), *rates])
        with _on(self._device), self._with_rates(), _without_autocast_cache():
            given, named = _mapped(self._copy, (args, kwargs))
            with self._checking_steps(signature), effects or nullcontext():
                outputs = self._step(*given, **named)
            result = _mapped(_detached_copy, outputs)
        del given, named, outputs  # which the program may replace
        if effects is not None:
            self._leaves |= effects.leaves
            self._outside |= {id(one.tensor()): one for one in effects.outside_tensors()}
            # The same call has another signature now: that of the host's tensors, too.
            self._last = self._signature(args, kwargs)
            self._calls[self._last] = self._calls[signature]
            self._steps[self._last] = self._steps[signature]
            self._patterns[self._last] = self._patterns[signature]
        return result

    def _copy(self, t: Tensor) -> Tensor:
        if t.layout != torch.strided:
            raise ConfigError(f"an input of the step is {t.layout}, expected a dense tensor")
        if t.requires_grad:
            raise ConfigError(
                "an input of the step requires a gradient, and the step computes those of the "
                "optimizer's parameters; detach it"
            )
        return t.to(self._device, copy=True, non_blocking=True)

    @contextmanager
    def _checking_steps(self, signature: Hashable) -> Iterator[None]:
        """Check that the block calls optimizers which are known, as often as earlier calls did.

        Raises:
            ConfigError: it calls another one, or has not called them as the step did before.
        """
        with stepped_optimizers() as stepped:
            yield
        for one in stepped:
            self._check_is_known(one)
        self._check_steps(signature, stepped)

    def _check_steps(self, signature: Hashable, stepped: list[Optimizer]) -> None:
        before = self._steps.setdefault(signature, stepped)
        if before != stepped:
            now, then = (
                ", ".join(f"{type(one).__name__}.step" for one in steps) or "no optimizer"
                for steps in (stepped, before)
            )
            raise ConfigError(
                f"this call of the step called {now}, and an earlier call with inputs of the same "
                f"shapes {then}; a replay repeats what its capture called: let each call of the "
                "step accumulate and update"
            )

    def _check_is_known(self, optimizer: Optimizer) -> None:
        """Refuse an optimizer whose learning rate a replay would not follow."""
        if any(optimizer is one for one in (*self._optimizers, *self._parts, *self._inner)):
            return
        if not all(isinstance(group.get("lr"), Tensor) for group in optimizer.param_groups):
            name = type(optimizer).__name__
            raise ConfigError(
                f"the step calls {name}.step, and graphed was not given that optimizer, whose "
                "learning rate a replay would not follow; pass each optimizer that the step calls: "
                "graphed(step, [optimizer, other])"
            )
        self._inner.append(optimizer)  # its rate is that of an optimizer which was given

    def _capture(
        self, signature: Hashable, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _Graph:
        self._make_room()
        outside = sys.exc_info()[1]
        counts = self._host_counts()
        inputs = _mapped(self._copy, (args, kwargs))
        graph, stream = torch.cuda.CUDAGraph(), _stream(torch.cuda.Stream, self._device)
        # Threads of NCCL, and those that pin memory, go on meanwhile; the mode "global" would
        # forbid it. Each graph has a pool of its own: gradients stay in it, which the temporaries
        # of another graph would overwrite.
        on_graph = torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local")
        leaves = (one() for one in self._leaves.values())
        gradients = LeafGradients([*self._parameters(), *(p for p in leaves if p is not None)])
        try:
            with gradients.captured():
                with (
                    self._with_rates(),
                    _without_autocast_cache(),
                    _on_the_captured_stream(),
                    self._checking_steps(signature),
                    on_graph,
                ):
                    outputs = _mapped(Tensor.detach, self._step(*inputs[0], **inputs[1]))
                    gradients.close()
                self._check_captured(signature, counts)
        except BaseException as e:
            if isinstance(e, torch.OutOfMemoryError) or not isinstance(e, RuntimeError):
                raise
            first: BaseException = e  # the capture's end raises a second one
            while first.__context__ is not None and first.__context__ is not outside:
                first = first.__context__
            raise ConfigError(
                f"the step cannot be captured in a CUDA graph ({first_line(first)}); if it reads a "
                "value back, as .item(), print and some optimizers do, leave that out; python -m "
                "nogpu --cuda-is-cpu names the line (docs/graphs.md)"
            ) from e
        captured = _Graph(graph, inputs, outputs, gradients)
        self._graphs.setdefault(signature, []).append(captured)
        self._since_capture = 0
        self._memory = [(t, local(t).data_ptr()) for t in self._tensors()]
        return captured

    def _check_captured(self, signature: Hashable, counts: dict[tuple[int, str], float]) -> None:
        """Refuse a step that updates nothing, or that has changed ``counts`` of the host."""
        if not self._steps[signature]:
            raise ConfigError(
                "the step does not call optimizer.step(): gradients would not add up from call to "
                "call; let a call of the step accumulate and update"
            )
        if idle := [one for one in self._optimizers if one not in self._steps[signature]]:
            raise ConfigError(
                f"no call of the step has called {type(idle[0]).__name__}.step so far, and no "
                "replay would; let each call update by all optimizers that graphed is given"
            )
        for name, value in self._host_counts().items():
            if name in counts and counts[name] != value:
                raise ConfigError(
                    f"the optimizer counts its {name[1]} on the host, and a replay does not; take "
                    "one that is capturable, or the step without graphed"
                )

    def _make_room(self) -> None:
        """Free the graph that was not replayed for the longest time, if there are many."""
        kept = [(one.used, signature) for signature, all_ in self._graphs.items() for one in all_]
        if len(kept) < GRAPHS:
            return
        used, signature = min(kept, key=lambda one: one[0])
        graphs = [one for one in self._graphs.pop(signature) if one.used != used]
        if graphs:
            self._graphs[signature] = graphs
        self._evicted += 1
        if self._evicted == GRAPHS:
            warnings.warn(
                f"the step was captured {2 * GRAPHS} times, for inputs of other shapes or for "
                f"other arguments that are no tensors; at most {GRAPHS} of these graphs are kept: "
                "pad the inputs to fewer shapes, and pass numbers as tensors",
                stacklevel=4,
            )

    def _host_counts(self) -> dict[tuple[int, str], float]:
        """The numbers of the optimizers' state that are not on the GPU."""
        found = {}
        for one in self._parts:
            for p, of_parameter in one.state.items():
                for name, value in of_parameter.items():
                    is_count = isinstance(value, Tensor) and value.numel() == 1
                    if isinstance(value, int | float) or (is_count and value.device == HOST):
                        found[id(p), str(name)] = float(value)
        return found

    def _replay(self, captured: _Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with ExitStack() as around:
            for enter in around_replays:
                around.enter_context(enter(self._parts, captured.inputs, captured.outputs))
            self._replay_with(captured, args, kwargs)
        return _mapped(_detached_copy, captured.outputs)

    def _replay_with(self, captured: _Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for static, t in zip(_tensors(captured.inputs), _tensors((args, kwargs)), strict=True):
            static.detach().copy_(t, non_blocking=True)  # the step may ask for its gradient
        for group, rate in zip(self._groups(), self._rates, strict=True):
            rate.follow(group["lr"])
        captured.gradients.begin()
        captured.graph.replay()
        captured.gradients.end()
        self._replayed, self._replaced = self._replayed + 1, 0
        captured.used = self._replayed
        for part in self._parts:
            _replays[part] = _replays.get(part, 0) + 1

    @contextmanager
    def _with_rates(self) -> Iterator[None]:
        """Let the groups' rates be tensors."""
        groups = self._groups()
        self._rates += [_Rate(self._device) for _ in groups[len(self._rates) :]]
        del self._rates[len(groups) :]
        numbers = [group["lr"] for group in groups]
        tensors = [rate.follow(number) for rate, number in zip(self._rates, numbers, strict=True)]
        versions = [t._version for t in tensors]
        for group, t in zip(groups, tensors, strict=True):
            group["lr"] = t
        try:
            yield
            for group, t, version in zip(groups, tensors, versions, strict=True):
                if group["lr"] is not t or t._version != version:
                    raise ConfigError(
                        "the step changes a learning rate, which a replay does not do; call the "
                        "scheduler after the step"
                    )
        finally:
            for group, number in zip(groups, numbers, strict=True):
                group["lr"] = number


class _Rate:
    """A tensor that follows a number. A rate that is a tensor follows itself."""

    def __init__(self, device: torch.device):
        self.tensor = torch.zeros((), device=device)
        self._value = 0.0

    def follow(self, value: float | Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value
        if value != self._value:
            self._value = value
            self.tensor.fill_(value)
        return self.tensor


def _let_capture(optimizer: Optimizer, device: torch.device) -> None:
    """Change the settings with which ``optimizer`` would read its rate or its steps back."""
    for group in optimizer.param_groups:
        if "capturable" in group:
            group["capturable"] = True
            for p in group["params"]:
                state = optimizer.state.get(p, {})
                if isinstance(state.get("step"), Tensor):
                    state["step"] = state["step"].to(device)
        elif isinstance(optimizer, torch.optim.SGD):
            group["fused"], group["foreach"] = True, False


def _is_capturable(optimizer: Optimizer) -> bool:
    """Whether the settings are still those of `_let_capture`, and no others have been loaded."""
    is_sgd = isinstance(optimizer, torch.optim.SGD)
    return all(
        group["fused" if is_sgd else "capturable"]
        for group in optimizer.param_groups
        if is_sgd or "capturable" in group
    )


def _state_tensors(optimizer: Optimizer) -> Iterator[Tensor]:
    for of_parameter in optimizer.state.values():
        yield from (value for value in of_parameter.values() if isinstance(value, Tensor))


@cache
def _stream(make: type[torch.cuda.Stream], device: torch.device) -> torch.cuda.Stream:
    return make(device)


@contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """Let a block run on the side stream, after what the current one has, and before its next."""
    current, side = torch.cuda.current_stream(device), _stream(torch.cuda.Stream, device)
    side.wait_stream(current)
    try:
        with torch.cuda.stream(side):
            yield
    finally:
        current.wait_stream(side)


@contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """Let a context of `torch.autocast` around the step keep no casts, which it would free."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


@contextmanager
def _on_the_captured_stream() -> Iterator[None]:
    """Let autograd's nodes of the default stream run on the captured one, as PyTorch 2.14 can.

    A result of the model from before the capture, such as a penalty that is still there, keeps the
    nodes that accumulate its gradients, on the stream where it was computed.
    """
    read = getattr(torch._C, "_override_stale_capture_stream", None)
    if read is None:
        yield
        return
    before = read()
    torch.autograd.graph.set_override_stale_capture_stream(True)
    try:
        yield
    finally:
        torch.autograd.graph.set_override_stale_capture_stream(before)


def _describe(value: Any) -> Hashable:
    """Return what two values must have in common for a graph that was captured with one of them."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.requires_grad
    if isinstance(value, tuple | list):
        return type(value), *map(_describe, value)
    if isinstance(value, dict):
        return tuple((name, _describe(one)) for name, one in value.items())
    return type(_known(value)), value


def _known(value: Any) -> Any:
    if isinstance(value, _VALUES):
        return value
    raise ConfigError(
        f"the step takes or returns a {type(value).__name__}, expected tensors, numbers, strings "
        "and None, also in tuples, lists and dicts; pass and return its tensors"
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors within tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list | dict):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors(one)


def _mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return ``value`` with ``function`` applied to each tensor in tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        mapped = copy.copy(value)
        for name, one in value.items():
            mapped[name] = _mapped(function, one)
        return mapped
    if isinstance(value, tuple | list):
        parts = [_mapped(function, one) for one in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return _known(value)


def _detached_copy(t: Tensor) -> Tensor:
    return t.detach().clone()
