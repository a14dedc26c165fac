# SPDX-License-Identifier: MIT
"""Types of an operator's rules: what PyTorch hands to a rule, and what a rule returns."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:  # DTensor takes long to import
    from torch.distributed.tensor import Placement


Function = Callable[..., object]
"""A function of an operator's arguments, which may be anything that a schema allows."""


class Context(Protocol):
    """The ``ctx`` of `torch.autograd.Function`, through which a rule passes values to the next.

    Attributes:
        saved_tensors: the tensors that `save_for_backward` was given.
        needs_input_grad: whether each argument needs a gradient; for a list of tensors, whether
            each of its tensors does.
    """

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool | list[bool], ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


Gradient = Tensor | Sequence[Tensor | None] | None
"""The gradient of an argument: None for 0, and one gradient per tensor for a list of tensors."""


class VmapInfo(Protocol):
    """The first argument of a rule of vmap."""

    @property
    def batch_size(self) -> int: ...


class Spec(Protocol):
    """A tensor as a rule of sharding sees it: its unsharded shape, and no values."""

    @property
    def ndim(self) -> int: ...
    @property
    def shape(self) -> torch.Size: ...


Placements = Sequence["Placement | None"]
"""Placements on one dimension of a mesh; None for an argument that is no tensor."""

Sharding = tuple[Placements, Placements]
"""The placements of an operator's results, and the arguments' placements that lead to these."""
