# SPDX-License-Identifier: MIT
"""Versions of PyTorch's functions that keep a function mode while they call others.

PyTorch leaves a `TorchFunctionMode` while one of its functions runs. Most of these functions call
operators. Autograd's, and multi-head attention, also call functions that the mode must see: a
checkpoint's forward pass, and hooks.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


def within(mode: TorchFunctionMode) -> dict[object, Callable[..., Any]]:
    """Versions of PyTorch's functions in which ``mode`` sees the functions that they call."""

    def run_engine(*args: Any, **kwargs: Any) -> object:
        with mode:
            # Looked up here, since the emulator of GPUs replaces it.
            return getattr(torch.autograd, "_engine_run_backward")(*args, **kwargs)  # noqa: B009  # private

    backward = _with_names(torch.autograd.backward, _engine_run_backward=run_engine)
    grad = _with_names(torch.autograd.grad, _engine_run_backward=run_engine)

    def of_tensor(
        tensor: Tensor,
        gradient: Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> object:
        return backward(tensor, gradient, retain_graph, create_graph, inputs=inputs)

    # Otherwise the mode would replace the function again, without end.
    attend = _with_names(F.multi_head_attention_forward, has_torch_function=lambda _: False)
    return {
        torch.autograd.backward: backward,
        torch.autograd.grad: grad,
        Tensor.backward: of_tensor,
        F.multi_head_attention_forward: _called_in(mode, attend),
    }


def _with_names(function: Callable[..., Any], **names: object) -> Callable[..., Any]:
    """A copy of a function, in whose module some names mean something else.

    The function's own name means the copy, which other modes then get.
    """
    assert isinstance(function, FunctionType)
    assert function.__globals__.keys() >= names.keys(), "PyTorch has renamed what is replaced"
    known = {**function.__globals__, **names}
    copy = FunctionType(
        function.__code__, known, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__module__ = function.__module__
    known[function.__name__] = copy
    return copy


def _called_in(
    context: AbstractContextManager[object], function: Callable[..., Any]
) -> Callable[..., Any]:
    def call(*args: object, **kwargs: object) -> object:
        with context:
            return function(*args, **kwargs)

    return call
