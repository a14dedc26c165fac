# SPDX-License-Identifier: MIT
"""The native operator's checks and the metadata of its results, for operators that a rule computes.

The native operator is called on zeros of the same shapes and strides, once for each combination of them. So
what PyTorch refuses, the exact mode refuses by PyTorch's error. On CPUs the zeros are real: meta tensors
take biases of any size, any range of `uniform_` and any dimension of a softmax.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

Metadata = tuple[torch.Size, torch.dtype]
_REMEMBERED = 4096  # calls, of which each takes about 2 KB


class _Layout(NamedTuple):
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


def check_native(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Metadata | None, ...]:
    """Raise the error of the native operator, or return shape and dtype of each of its results.

    A result that is no tensor has None. Checks of values, such as those of indices, are not made.
    """
    on_cpu = all(t.is_cpu for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
    described = _described(args), _described(tuple(kwargs.items()))
    return _metadata(func, "cpu" if on_cpu else "meta", torch.get_default_dtype(), *described)


def _described(value: Any) -> Any:
    """A hashable description of an argument: of tensors their layouts, of numbers their types, too."""
    if isinstance(value, Tensor):
        return _Layout(tuple(value.shape), value.stride(), value.dtype)
    if isinstance(value, list | tuple):
        return tuple([_described(one) for one in value])
    if isinstance(value, torch.Generator | torch.device):
        return None
    return type(value), value


def _zeros(described: Any, device: str) -> Any:
    """An argument of that description."""
    if isinstance(described, _Layout):
        return torch.empty_strided(
            described.shape, described.strides, dtype=described.dtype, device=device
        ).zero_()
    if isinstance(described, tuple) and len(described) == 2 and isinstance(described[0], type):
        return described[1]
    return None if described is None else tuple([_zeros(one, device) for one in described])


@lru_cache(_REMEMBERED)
def _metadata(
    func: Callable[..., Any], device: str, default_dtype: torch.dtype, args: Any, kwargs: Any
) -> tuple[Metadata | None, ...]:
    """The metadata; the default dtype is that of integers to which a number is added."""
    state = torch.get_rng_state()
    try:
        with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
            named = dict(_zeros(kwargs, device))
            if "device" in named:
                named["device"] = device
            results = func(*_zeros(args, device), **named)
    finally:
        torch.set_rng_state(state)
    results = results if isinstance(results, tuple | list) else (results,)
    return tuple((t.shape, t.dtype) if isinstance(t, Tensor) else None for t in results)
