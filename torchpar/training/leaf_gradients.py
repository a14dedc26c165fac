# SPDX-License-Identifier: MIT
"""Gradients with which a CUDA graph of a training step begins and ends.

A backward pass adds to the gradients that exist, and makes those that do not. A graph does the one
or the other for each leaf, as its capture did, and it knows memory, not ``p.grad``. So each replay
begins with gradients for the same leaves, copied to the memory that the graph reads, and ends with
those of the graph.
"""

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.parameter import Parameter, is_lazy
from torch.utils.hooks import RemovableHandle

from torchpar.errors import ConfigError
from torchpar.library.sharding import local


class LeafGradients:
    """The gradients of the leaves whose gradients a captured step uses or changes.

    These are the parameters that it updates, and others: a generator's loss leaves gradients in the
    discriminator, too.

    Args:
        parameters: that the step updates, and others whose gradients it reads or scales.
    """

    def __init__(self, parameters: Iterable[Tensor]):
        updated = {id(p): p for p in parameters}
        leaves = updated | {id(p): p for p in _leaves()}
        with torch._C.DisableTorchFunction():
            self._before = [(p, p.grad) for p in leaves.values()]
        self._written = {*updated}
        self._begin: list[tuple[Tensor, Tensor | None]] = []
        self._end: list[Tensor | None] = []

    @contextmanager
    def captured(self) -> Iterator[None]:
        """Note the gradients of a capture; after an error, all are as before."""
        hooks: list[RemovableHandle] = []
        try:
            for p, _ in self._before:
                if p.requires_grad:
                    note = p.register_post_accumulate_grad_hook
                    hooks.append(note(lambda p: self._written.add(id(p))))
            yield
        except BaseException:
            for p, gradient in self._before:  # those of the capture have never been computed
                p.grad = gradient
            raise
        finally:
            for hook in hooks:
                hook.remove()

    def close(self) -> None:
        """End the step, within its capture.

        Gradients that the step replaced are copied to the memory with which the graph began.

        Raises:
            ConfigError: a gradient is sparse.
        """
        self._begin = [
            (p, gradient)
            for p, gradient in self._before
            if id(p) in self._written or p.grad is not gradient
        ]
        for p, gradient in self._begin:
            for t in (gradient, p.grad):
                if t is not None and t.layout != torch.strided:
                    raise ConfigError(
                        f"the gradient of a parameter of shape {list(p.shape)} is {t.layout}, "
                        "expected a dense one in a CUDA graph; take sparse=False, or the step "
                        "without graphed"
                    )
        self._put()
        self._end = [p.grad for p, _ in self._begin]
        self._before = []

    def fit(self) -> bool:
        """Whether a replay can begin with the present gradients."""
        return all(
            (p.grad is None) == (gradient is None)
            and (p.grad is gradient or p.grad.layout == torch.strided)  # type: ignore[union-attr]
            for p, gradient in self._begin
        )

    def begin(self) -> None:
        """Let each leaf have the gradient that the graph adds to, or else the one that it makes."""
        self._put()
        for (p, gradient), last in zip(self._begin, self._end, strict=True):
            p.grad = last if gradient is None else gradient

    def end(self) -> None:
        """Let the leaves have the gradients with which the step ends."""
        for (p, _), last in zip(self._begin, self._end, strict=True):
            p.grad = last

    def _put(self) -> None:
        """Copy gradients to the memory that the graph begins with, where there is some."""
        moved = [
            (p, gradient, p.grad)
            for p, gradient in self._begin
            if gradient is not None and p.grad is not None and p.grad is not gradient
        ]
        if moved:
            places = {id(gradient): local(gradient) for _, gradient, _ in moved}
            # A gradient that is another leaf's place would change while it is copied.
            sources = [local(new).clone() if id(new) in places else local(new) for *_, new in moved]
            with torch.no_grad():
                torch._foreach_copy_([*places.values()], sources)
        for p, gradient, _ in moved:
            p.grad = gradient


def live_tensors() -> list[Tensor]:
    """List the tensors of the program, except those of lazy modules, which have no memory."""
    if is_frozen := gc.get_freeze_count() > 0:  # else the objects are not listed
        gc.unfreeze()
    objects = gc.get_objects()
    if is_frozen:
        gc.freeze()
    # The type is asked first: an attribute of another object may compute.
    kinds = {kind for kind in set(map(type, objects)) if issubclass(kind, Tensor)}
    return [one for one in objects if type(one) in kinds and not is_lazy(one)]


def _leaves() -> list[Tensor]:
    """List the tensors to which the step's backward passes may add gradients."""
    found = live_tensors()
    with torch._C.DisableTorchFunction():  # a mode would be asked for each attribute
        # The step may unfreeze parameters.
        return [t for t in found if t.is_leaf and (t.requires_grad or isinstance(t, Parameter))]
