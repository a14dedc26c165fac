# SPDX-License-Identifier: MIT
"""Bytes of a training step on this rank: weights, gradients, optimizer state and activations."""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

Key = tuple[int, int]  # the address of a tensor's first element, and its bytes


class _Saved:
    """A tensor that autograd keeps; it is deleted when autograd lets go of it."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


class Memory:
    """Bytes that a rank's part of a model takes in training.

    A tensor that several operators keep is counted once.

    Args:
        model: this rank's part of the model.
        optimizer: over its parameters.
    """

    def __init__(self, model: torch.nn.Module, optimizer: Optimizer):
        self._model = model
        self._optimizer = optimizer
        self._gradients = self._activations = 0
        self._saved: Counter[Key] = Counter()  # how many operators keep each tensor
        self._bytes = 0  # of the tensors that are kept now

    def measured(self) -> dict[str, int]:
        """Return the bytes by name.

        Returns:
            ``weights``: of parameters and buffers. ``gradients``: after the last measured backward
                pass.
            ``optimizer``: of its tensors, such as momentum, which it makes in its first step.
            ``activations``: the most at a time that autograd has kept for backward passes, without
            weights. The first layer keeps the batch itself.
        """
        return {
            "weights": _nbytes(self._weights()),
            "gradients": self._gradients,
            "optimizer": _nbytes(self._state()),
            "activations": self._activations,
        }

    def current(self) -> dict[str, int]:
        """Return the bytes that are there now, by name; activations only within `measure`."""
        gradients = [p.grad for p in self._model.parameters() if p.grad is not None]
        return {
            "weights": _nbytes([*self._model.parameters()]),
            "buffers": _nbytes([*self._model.buffers()]),
            "gradients": _nbytes(gradients),
            "optimizer": _nbytes(self._state()),
            "activations": self._bytes,
        }

    def _state(self) -> list[Tensor]:
        return [t for t in tree_leaves([*self._optimizer.state.values()]) if isinstance(t, Tensor)]

    def _weights(self) -> list[Tensor]:
        return [*self._model.parameters(), *self._model.buffers()]

    @contextmanager
    def measure(self, activations: bool = True) -> Iterator[None]:
        """Measure the forward and backward passes within the block."""
        weights = {_address(part) for t in self._weights() for part in dense_parts(t)}

        def pack(tensor: Tensor) -> _Saved | Tensor:
            parts = dense_parts(tensor)
            if any(_address(part) in weights for part in parts):
                return tensor
            saved = _Saved(tensor.detach())  # an output would keep the operator that keeps it
            for part in parts:
                key = part.data_ptr(), part.nbytes  # a transposed tensor has the same
                weakref.finalize(saved, self._release, key)
                self._bytes += part.nbytes * (not self._saved[key])
                self._saved[key] += 1
            self._activations = max(self._activations, self._bytes)
            return saved

        def unpack(saved: _Saved | Tensor) -> Tensor:
            return saved.tensor if isinstance(saved, _Saved) else saved

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, unpack)
        with hooks if activations else nullcontext():
            yield
        self._gradients = _nbytes([p.grad for p in self._model.parameters() if p.grad is not None])

    def _release(self, key: Key) -> None:
        self._saved[key] -= 1
        if not self._saved[key]:
            del self._saved[key]
            self._bytes -= key[1]


def dense_parts(t: Tensor) -> list[Tensor]:
    """The tensors in memory of which a tensor consists: itself, if it is dense.

    Of a `DTensor` it is this rank's part, of a sparse one its indices and values. A tensor without
    elements or without memory, as on the device "meta", has no parts.
    """
    if is_traceable_wrapper_subclass(t):
        names, _ = t.__tensor_flatten__()
        inner = [getattr(t, name) for name in names]  # a mesh may be among them
        return [part for one in inner if isinstance(one, Tensor) for part in dense_parts(one)]
    if t.layout is torch.sparse_coo:
        return [*dense_parts(t._indices()), *dense_parts(t._values())]
    with suppress(RuntimeError):  # other layouts, and tensors of a transform such as vmap
        return [t] if t.data_ptr() else []
    return []


def _address(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _nbytes(tensors: list[Tensor]) -> int:
    """Return the bytes of the elements of tensors; those that share them are counted once."""
    parts = [part for t in tensors for part in dense_parts(t)]
    return sum(nbytes for _, nbytes in {(part.data_ptr(), part.nbytes) for part in parts})
