# SPDX-License-Identifier: MIT
"""Memory that an operator writes without saying so: operands, results, saved tensors, gradients."""

from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from torchpar.testing.operators.attempts import REFUSALS, Attempts, OutcomeException
from torchpar.testing.operators.case import Case
from torchpar.testing.operators.compare import close
from torchpar.testing.operators.gradients import gradients
from torchpar.testing.operators.layouts import layouts
from torchpar.testing.operators.tensors import (
    LOW,
    Layout,
    Memory,
    Tensors,
    cast,
    is_differentiable,
    normal_like,
)


def undeclared_writes(case: Case) -> Attempts:
    """The operator writes to nothing, in every dtype that it takes and in every layout.

    A kernel that the backward launches itself is no operator, so that no schema promises what it
    writes to.
    """
    contiguous: Layout = lambda t: t.clone(memory_format=torch.contiguous_format)  # noqa: E731  # one of a table
    of_case = {"contiguous": contiguous, **layouts(case.operands)}
    for name, layout in of_case.items():
        yield (
            f"{name} operands",
            partial(_check_no_writes, case, case.operands, layout, contiguous),
        )
        if name != "contiguous":
            yield (
                f"{name} gradients",
                partial(_check_no_writes, case, case.operands, contiguous, layout),
            )
            yield (
                f"{name} operands and gradients",
                partial(_check_no_writes, case, case.operands, layout, layout),
            )
    for dtype in _other_dtypes(case):
        operands = cast(case.operands, dtype)
        for name, layout in of_case.items():
            yield (
                f"{dtype}, {name}",
                partial(_check_no_writes, case, operands, layout, layout),
            )


def _other_dtypes(case: Case) -> Iterator[torch.dtype]:
    low = () if any(t.is_complex() for t in case.operands) else LOW
    for dtype in (torch.float64, torch.float32, *low):
        if [t.dtype for t in cast(case.operands, dtype)] != [t.dtype for t in case.operands]:
            yield dtype


def _check_no_writes(case: Case, operands: Tensors, layout: Layout, of_gradients: Layout) -> None:
    """Call the operator, and its backward three times; the last call may free what is saved."""
    leaves = iter(case.leaves(operands))
    chosen = [next(leaves) if is_differentiable(t) else t for t in operands]
    xs = tuple(map(layout, chosen))
    watched = _Watched()
    watched.add("operand", xs)
    ys = watched.call(case, xs)
    watched.expect("the forward")
    if not any(y.requires_grad for y in ys):
        return
    smooth = [y for y in ys if y.requires_grad]
    incoming = [of_gradients(normal_like(y)) for y in smooth]
    watched.add("incoming gradient", incoming)
    required = [t for t in chosen if is_differentiable(t)]
    try:
        first = gradients(smooth, required, incoming, retain_graph=True)
    except (*REFUSALS, TypeError):  # the rows of gradients say why
        watched.expect("the backward")
        return
    watched.expect("the backward")
    watched.add("gradient of an earlier call", first)
    # Other numbers show a buffer that holds the gradients of every call.
    gradients(smooth, required, [2 * g for g in incoming], retain_graph=True)
    watched.expect("the second backward")
    again = gradients(smooth, required, incoming)
    watched.expect("the last backward", freed="saved tensor")
    try:
        close(again, first, operands=operands)  # a sum may run in another order each time
    except OutcomeException as e:
        raise OutcomeException("wrong", f"backward() called again: {e.args[1]}") from e


class _Watched:
    """Tensors, with copies of all the memory that they view."""

    def __init__(self) -> None:
        self.memory: list[tuple[str, Memory]] = []

    def add(self, what: str, tensors: Iterable[Tensor]) -> None:
        self.memory.append((what, Memory(tensors)))

    def call(self, case: Case, xs: Tensors) -> Tensors:
        """The results of the operator. The results, and the tensors that the operator saves for the
        backward, are watched, too."""
        saved: list[Tensor] = []

        def pack(t: Tensor) -> Tensor:
            saved.append(t.detach())  # without a cycle of references through the graph
            return saved[-1]

        try:
            with saved_tensors_hooks(pack, lambda t: t):
                ys = case.takes(xs)
        except OutcomeException as e:
            if "hooks" not in e.args[1]:  # torch.func within the operator allows none
                raise
            saved.clear()
            ys = case.takes(xs)
        self.add("result", ys)
        self.add("saved tensor", saved)
        return ys

    def expect(self, who: str, freed: str = "") -> None:
        """Raise "wrong" if memory has changed, unless it is of a kind that is freed."""
        for what, memory in self.memory:
            if what != freed and memory.has_changed():
                raise OutcomeException("wrong", f"{who} writes to its {what}")
