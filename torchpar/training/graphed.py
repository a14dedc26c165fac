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

A step of a small network is hundreds of short kernels, each of which the host launches in more time
than it runs. A replay launches all of them at once.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from torchpar.errors import ConfigError, first_line
from torchpar.optim import ChainedOptimizer

T = TypeVar("T")
# The calls before a capture. Until the 11th, DistributedDataParallel times its steps by events,
# which no capture may hold (PyTorch's notes on CUDA graphs).
WARMUP, WARMUP_DDP = 3, 11
_replays: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()


def graphed(
    step: Callable[..., T],
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    warmup: int | None = None,
) -> Callable[..., T]:
    """Return ``step`` as a function that replays a CUDA graph of it; on a CPU, ``step`` itself.

    ``step`` computes a loss, its gradients and an update, all on the GPU. Its first calls run
    eagerly, on a stream of their own. After ``warmup`` calls with inputs of the same shapes, the
    next one that follows such a call captures the step. From then on a call copies its inputs to
    where the graph reads them, and replays it. A call with inputs of other shapes, such as an
    epoch's last batch, runs eagerly. Each call is one step, and no step is repeated.

    Numbers that the graph has captured do not change any more. So:

    - Learning rates may change between calls, by a scheduler or by hand: within the step they are
      float32 tensors on the GPU, which get the value of each group's ``lr`` before a replay.
    - Other settings of a group, and arguments that are no tensors, are compared at each call. When
      one has changed, calls warm up again, and the step is captured anew.
    - Whatever else the step reads from Python is that of the capture.

    ``capturable`` becomes True in the optimizers' groups that have it, and the groups of SGD become
    ``fused``: its other implementations read the rate back.

    DistributedDataParallel needs NCCL for this, and must be made within `side_stream`. Its ranks
    must call the step equally often; a call that runs eagerly on one must do so on all.

    Args:
        step: takes and returns tensors and other values, also in tuples, lists and dicts. Tensors
            that it is given may be on any device, and are moved to the GPU. Hooks of the optimizer
            run when it is captured, and not when it is replayed.
        optimizer: all that ``step`` steps.
        warmup: eager calls before a capture; by default 3, and 11 where there are several ranks or
            `torch.distributed` is initialized, for DistributedDataParallel.

    Returns:
        ``step``, whose tensors are copies that later calls do not change, without autograd's graph.

    Raises:
        ConfigError: an ``optimizer`` that is none; ``warmup`` below 1. From a call: a step that
            cannot be captured.
    """
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer or ())
    if not optimizers or not all(isinstance(one, Optimizer) for one in optimizers):
        raise ConfigError(
            f"optimizer is {optimizer!r}, expected the optimizer that the step steps, or a list"
        )
    if warmup is None:
        warmup = WARMUP_DDP if dist.is_available() and dist.is_initialized() else WARMUP
    if type(warmup) is not int or warmup < 1:
        raise ConfigError(f"warmup is {warmup!r}, expected a whole number from 1 on")
    parameters = [p for one in optimizers for group in one.param_groups for p in group["params"]]
    if not parameters[0].is_cuda:
        return step
    return _GraphedStep(step, optimizers, warmup, parameters[0].device)


def side_stream(wanted: bool = True) -> AbstractContextManager[None]:
    """Let a block run on a stream of its own if it is ``wanted``, and if there is a GPU.

    Where DistributedDataParallel was made on the default stream, its gradients are added up there,
    which no capture on another stream may do (PyTorch's notes on CUDA graphs).
    """
    return _side_stream() if wanted and torch.cuda.is_available() else nullcontext()


@contextmanager
def _side_stream() -> Iterator[None]:
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        yield
    current.wait_stream(side)


def count_replays(optimizer: Optimizer) -> int:
    """Return how often a replay has stepped ``optimizer``; its hooks have not seen those steps."""
    return _replays.get(optimizer, 0)


class _GraphedStep:
    def __init__(
        self,
        step: Callable[..., Any],
        optimizers: list[Optimizer],
        warmup: int,
        device: torch.device,
    ):
        self._step, self._optimizers, self._warmup, self._device = step, optimizers, warmup, device
        self._groups = [group for one in optimizers for group in one.param_groups]
        self._rates = [_Rate(device) for _ in self._groups]
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream = torch.cuda.Stream(device)
        self._captured: Hashable = None  # the signature of the graph
        self._last: Hashable = None  # that of the last eager call
        self._calls: Counter[Hashable] = Counter()  # eager ones, by their signature
        for one in optimizers:
            _let_capture(one, device)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        signature = self._signature(args, kwargs)
        if self._graph is not None and signature == self._captured:
            return self._replay(args, kwargs)
        if self._calls[signature] < self._warmup or signature != self._last:
            self._calls[signature] += 1
            self._last = signature
            return self._run(args, kwargs)
        self._capture(args, kwargs)
        self._captured = signature
        return self._replay(args, kwargs)

    def _signature(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
        """Return what a graph holds for ever."""
        settings = tuple(
            # The graph reads a tensor's memory.
            id(value) if isinstance(value, Tensor) else _describe(value)
            for group in self._groups
            for name, value in group.items()
            if name != "params" and (name != "lr" or isinstance(value, Tensor))
        )
        modes = torch.is_grad_enabled(), torch.is_autocast_enabled("cuda")
        return _describe(args), _describe(kwargs), settings, modes

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), self._with_rates():
            moved = _mapped(lambda t: t.to(self._device, non_blocking=True), (args, kwargs))
            outputs = _mapped(_detached_copy, self._step(*moved[0], **moved[1]))
        current.wait_stream(self._stream)
        return outputs

    def _capture(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._graph = None  # its memory first
        graph = torch.cuda.CUDAGraph()
        self._inputs = _mapped(lambda t: t.detach().to(self._device, copy=True), (args, kwargs))
        given, named = self._inputs
        # NCCL's own thread asks for events meanwhile, which the mode "global" forbids to all.
        mode = "thread_local" if dist.is_available() and dist.is_initialized() else "global"
        with self._with_rates():
            try:
                with torch.cuda.graph(graph, stream=self._stream, capture_error_mode=mode):
                    self._outputs = _mapped(Tensor.detach, self._step(*given, **named))
            except RuntimeError as e:
                first: BaseException = e  # the capture's end raises a second one
                while first.__context__ is not None:
                    first = first.__context__
                raise ConfigError(
                    f"the step cannot be captured in a CUDA graph ({first_line(first)}); leave out "
                    "what reads a value back, such as .item(), print and a branch on a tensor, and "
                    "an optimizer that does so; docs/graphs.md finds the line without a GPU"
                ) from e
        self._graph = graph

    def _replay(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self._graph is not None
        for static, t in zip(_tensors(self._inputs), _tensors((args, kwargs)), strict=True):
            static.copy_(t.detach(), non_blocking=True)
        for group, rate in zip(self._groups, self._rates, strict=True):
            rate.follow(group["lr"])
        self._graph.replay()
        for one in self._optimizers:
            _replays[one] = _replays.get(one, 0) + 1
        return _mapped(_detached_copy, self._outputs)

    @contextmanager
    def _with_rates(self) -> Iterator[None]:
        """Let the groups' rates be tensors."""
        numbers = [group["lr"] for group in self._groups]
        for group, rate in zip(self._groups, self._rates, strict=True):
            group["lr"] = rate.follow(group["lr"])
        try:
            yield
        finally:
            for group, number in zip(self._groups, numbers, strict=True):
                group["lr"] = number


class _Rate:
    """A tensor that follows a number. A rate that is a tensor follows itself."""

    def __init__(self, device: torch.device):
        self._tensor = torch.zeros((), device=device)
        self._value = 0.0

    def follow(self, value: float | Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value
        if value != self._value:
            self._value = value
            self._tensor.fill_(value)
        return self._tensor


def _let_capture(optimizer: Optimizer, device: torch.device) -> None:
    """Change the settings with which ``optimizer`` would read its rate or its steps back."""
    if isinstance(optimizer, ChainedOptimizer):
        for one in optimizer.optimizers:
            _let_capture(one, device)
        return
    for group in optimizer.param_groups:
        if "capturable" in group:
            group["capturable"] = True
            for p in group["params"]:
                state = optimizer.state.get(p, {})
                if isinstance(state.get("step"), Tensor):
                    state["step"] = state["step"].to(device)
        elif isinstance(optimizer, torch.optim.SGD):
            group["fused"], group["foreach"] = True, False


def _describe(value: Any) -> Hashable:
    """Return what two values must have in common for a graph that was captured with one of them."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    if isinstance(value, tuple | list):
        return type(value), *map(_describe, value)
    if isinstance(value, dict):
        return tuple((name, _describe(one)) for name, one in value.items())
    try:
        hash(value)
    except TypeError as e:
        raise ConfigError(
            f"an argument of the step or a setting of its optimizer is a {type(value).__name__}, "
            "expected a tensor or a hashable value"
        ) from e
    return type(value), value


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
        return {name: _mapped(function, one) for name, one in value.items()}
    if isinstance(value, tuple | list):
        mapped = [_mapped(function, one) for one in value]
        return type(value)(*mapped) if hasattr(value, "_fields") else type(value)(mapped)
    return value


def _detached_copy(t: Tensor) -> Tensor:
    return t.detach().clone()
