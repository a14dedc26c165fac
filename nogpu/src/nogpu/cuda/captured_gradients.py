# SPDX-License-Identifier: MIT
"""Gradients of a captured backward pass.

Autograd decides in the capture what a graph does with a gradient. Where ``.grad`` is None, the
graph writes the gradient into memory of its pool, and each replay overwrites it. Where ``.grad`` is
a tensor, the graph adds to the memory of that tensor. A replay asks for ``.grad`` no more.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from nogpu.cuda import places
from nogpu.cuda.graph_memory import WRITTEN, GraphState, Line, Memory
from nogpu.cuda.types import Operator
from nogpu.record.source import program_line
from nogpu.triton.torch_operators import is_plain

STEPPED = "nogpu_stepped"  # of a gradient's storage: its last write before an optimizer's step
Owner = torch.nn.Module | torch.optim.Optimizer  # of parameters
ZEROING = {torch.ops.aten.zero_, torch.ops.aten._foreach_zero_}


def gradient_of(p: Tensor) -> Tensor | None:
    """Return a parameter's gradient, if it is a tensor with memory."""
    with torch._C.DisableTorchFunction():
        return p.grad if p.grad is not None and is_plain(p.grad) else None


class Uses:
    """What the program does with gradients outside of captures.

    Attributes:
        clears: how often it has cleared the gradient of a parameter.
        steps: how often an optimizer has taken it.
    """

    def __init__(self) -> None:
        self.clears: MutableMapping[Tensor, int] = WeakIdKeyDictionary()
        self.steps: MutableMapping[Tensor, int] = WeakIdKeyDictionary()

    def note_clear(self, parameters: Iterable[Tensor]) -> None:
        for p in parameters:
            self.clears[p] = self.clears.get(p, 0) + 1

    def note_step(self, parameters: Iterable[Tensor]) -> None:
        for p in parameters:
            gradient = gradient_of(p)
            if gradient is not None:
                self.steps[p] = self.steps.get(p, 0) + 1
                storage = gradient.untyped_storage()
                setattr(storage, STEPPED, getattr(storage, WRITTEN, None))

    def of(self, p: Tensor) -> tuple[int, int]:
        return self.clears.get(p, 0), self.steps.get(p, 0)


@dataclass
class Gradient:
    """The gradient of a parameter, as a capture has accumulated it.

    Attributes:
        memory: of the gradient after the backward pass.
        is_made: whether there was none before, so that the graph overwrites it.
        is_cleared: whether the capture itself has cleared it before.
        line: of the backward pass.
        is_taken: whether an optimizer's step in the capture takes it.
        is_kept: whether ``.grad`` has the memory at the end of the capture.
        is_mixed: whether the program has cleared it before some replays alone.
    """

    parameter: "weakref.ref[Tensor]"
    memory: Memory
    is_made: bool
    is_cleared: bool
    line: Line
    is_taken: bool = False
    is_kept: bool = False
    _before: tuple[int, int] | None = None
    _clears: set[bool] = field(default_factory=set)

    def __str__(self) -> str:
        p = self.parameter()
        return f"the gradient of a parameter {[] if p is None else list(p.shape)}"

    def end(self, taken: set[int]) -> None:
        """Note how the capture leaves the parameter."""
        p = self.parameter()
        self.is_taken, self.is_kept = id(p) in taken, self._is_there()

    def _is_there(self) -> bool:
        p = self.parameter()
        now = None if p is None else gradient_of(p)
        return now is not None and self.memory.is_memory_of(now.untyped_storage())

    def is_replaced(self) -> bool:
        """Whether the graph writes or reads a gradient that ``.grad`` does not have any more."""
        p = self.parameter()
        if p is None or self._is_there():
            return False
        if not self.is_made:  # freed memory is another fault
            return not self.is_cleared and self.memory.storage() is not None
        return self.is_kept and not self.is_taken

    def is_ignored(self) -> bool:
        """Whether there is a gradient that no step has taken, to which the graph does not add."""
        p = self.parameter()
        now = None if p is None else gradient_of(p)
        is_other = now is not None and not self._is_there()
        if not is_other or not self.is_made or self.is_cleared or not self.is_taken:
            return False
        assert now is not None
        storage = now.untyped_storage()
        is_stepped = hasattr(storage, STEPPED) and getattr(storage, STEPPED) == getattr(
            storage, WRITTEN, None
        )
        return not is_stepped and bool(now.any())

    def note_uses(self, uses: Uses) -> bool:
        """Note what came before a replay; return whether the gradient is cleared now and then.

        The first replay belongs to the call that captured. What came with an eager step does not
        count.
        """
        p = self.parameter()
        if p is None or not self.is_made or self.is_cleared or not (self.is_taken and self.is_kept):
            return False
        before, self._before = self._before, uses.of(p)
        if before is not None and before[1] == self._before[1]:
            self._clears.add(before[0] != self._before[0])
        return len(self._clears) == 2


class Gradients:
    """The gradients that one capture accumulates.

    Args:
        graph: the graph that is captured.
        memory: return the memory of a tensor that the graph reads or writes.
    """

    def __init__(self, graph: GraphState, memory: Callable[[Tensor], Memory]):
        self.graph, self.memory = graph, memory
        self.found: dict[int, Gradient] = {}  # by the numbers of parameters in Python
        self._cleared: set[int] = set()
        self._zeroed: set[Memory] = set()
        self._hooks: list[RemovableHandle] = []

    def watch(self, p: Tensor) -> None:
        """Note when autograd has accumulated the gradient of a parameter."""
        with torch._C.DisableTorchFunction():
            self._hooks.append(p.register_post_accumulate_grad_hook(self._note))

    def _note(self, p: Tensor) -> None:
        gradient = gradient_of(p)
        if id(p) in self.found or gradient is None or not places.is_on_device(gradient):
            return
        memory = self.memory(gradient)
        is_made = memory.graph is self.graph
        is_cleared = id(p) in self._cleared or memory in self._zeroed
        line = memory.made if is_made else program_line()
        self.found[id(p)] = Gradient(weakref.ref(p), memory, is_made, is_cleared, line)
        self._name(memory, gradient)

    def note_step(self, parameters: Iterable[Tensor]) -> None:
        """Note that an optimizer takes gradients."""
        for p in parameters:
            gradient = gradient_of(p)
            if gradient is not None and places.is_on_device(gradient):
                self._name(self.memory(gradient), gradient)

    def _name(self, memory: Memory, gradient: Tensor) -> None:
        if memory.graph is None:
            memory.is_gradient = True
            kind = str(gradient.dtype).removeprefix("torch.")
            memory.name = f"a gradient of {kind} {list(gradient.shape)}"

    def clear(self, parameters: Iterable[Tensor]) -> None:
        """Note that the program clears gradients, or sets them."""
        self._cleared |= {id(p) for p in parameters}

    def zero(self, func: Operator, written: Iterable[Tensor]) -> None:
        """Note what an operator of the graph zeroes."""
        if func.overloadpacket in ZEROING:
            self._zeroed |= {self.memory(t) for t in written}

    def end(self) -> None:
        for hook in self._hooks:
            hook.remove()


def clearing(clear: Callable[..., None], note: Callable[[Owner], None]) -> Callable[..., None]:
    """Return a method ``zero_grad`` that notes whose gradients it clears."""

    def zero_grad(self: Owner, *args: object, **kwargs: object) -> None:
        note(self)
        clear(self, *args, **kwargs)

    return zero_grad


def parameters_of(owner: Owner) -> Iterator[Tensor]:
    if isinstance(owner, torch.nn.Module):
        yield from owner.parameters()
    else:
        for group in owner.param_groups:
            yield from group["params"]
