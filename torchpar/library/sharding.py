# SPDX-License-Identifier: MIT
"""Sharding rules, which wait until DTensor is imported."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import Tensor
from torch.nn import Parameter

if TYPE_CHECKING:
    from torch._ops import OpOverload
    from torch.distributed.tensor import DTensor


def is_dtensor(t: object) -> "TypeGuard[DTensor]":
    """Whether ``t`` is a DTensor; this does not import DTensor's module."""
    kind = type(t)  # nearly always decides, in a third of the time
    if kind is Tensor or kind is Parameter:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def local(t: Tensor) -> Tensor:
    """This rank's elements of ``t``."""
    return t.to_local() if is_dtensor(t) else t


def any_dtensor(tensors: tuple[object, ...]) -> bool:
    """Whether one of ``tensors`` is a DTensor; this does not import DTensor's module."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any([isinstance(t, module.DTensor) for t in tensors])


sharding_rules: dict["OpOverload[..., Any]", Callable[..., object]] = {}


def register_sharding_rules() -> None:
    if not sharding_rules or "torch.distributed.tensor" not in sys.modules:
        return
    from torch.distributed.tensor.experimental import register_sharding

    for overload, rule in list(sharding_rules.items()):
        register_sharding(overload)(rule)
        sharding_rules.pop(overload, None)  # another thread may have registered it, too


# The mark keeps `torch.compile` from tracing into PyTorch's registration, at which it would fail.
# `torch.compiler.assume_constant_result` sets the same mark, but imports the compiler, which takes
# a second.
register_sharding_rules._dynamo_marked_constant = True  # type: ignore[attr-defined]
