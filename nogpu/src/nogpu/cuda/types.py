# SPDX-License-Identifier: MIT
"""Types of what PyTorch hands to those that watch its operators, or stand in for its functions."""

from collections.abc import Callable

import torch

Device = torch.device | str | int | None  # as functions of `torch.cuda` take it
Operator = torch._ops.OpOverload[..., object]
PoolHandle = tuple[int, int]
Function = Callable[..., object]  # of PyTorch in Python, or a method of its tensors
Arguments = tuple[object, ...]
Keywords = dict[str, object]
Attributes = dict[str, object]  # of a module or a class: what replaces them
