# SPDX-License-Identifier: MIT
"""Launch plans: the kernel, grid and constants for tensors of one layout, cached for the next call.

Choosing tiles, and letting Triton specialize a kernel, takes longer than launching it. Both depend
on the layouts of the tensors alone: shapes, strides, dtype, device, and where their memory begins
within 16 bytes.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextvars import copy_context
from functools import partial
from typing import Any, Protocol

import torch
import triton
from torch import Tensor
from triton.knobs import runtime

from . import Wrap
from .device import device_index


class TritonKernel(Protocol):
    """A jitted Triton kernel: ``kernel[grid](*arguments, **options)`` launches it."""

    arg_names: Sequence[str]

    def __getitem__(self, grid: object, /) -> Callable[..., Any]: ...


_MAX_PLANS = 4096
_plans: dict[Hashable, "Plan | None"] = {}  # None where the library computes
# Plans, and what makes their results from the first argument.
_remembered: dict[Hashable, tuple["Plan", list[Callable[[Tensor], Tensor]]]] = {}


class Plan:
    """A kernel, its grid, and the arguments of its launch that come after tensors and factors.

    Args:
        programs: number of programs. All are on the first grid axis: the other axes are limited to
            65535.
        arguments: the integers that come after tensors and factors.
        constants: the constants, in the order of the kernel's signature.
        options: ``num_warps`` and ``num_stages``.
        descriptors: whether the kernel makes TMA descriptors, for which the host allocates memory.
    """

    def __init__(
        self,
        kernel: TritonKernel,
        programs: int | torch.SymInt,
        arguments: tuple[int, ...],
        constants: Mapping[str, Any],
        options: Mapping[str, int],
        descriptors: bool = False,
    ):
        self.kernel = kernel
        self.grid = (programs, 1, 1)
        self.constants = constants
        self.arguments = arguments
        self.options = options
        self.descriptors = descriptors
        self._is_compiled = False
        # Of Triton's functions, the kernel's alone; its interpreter and its autotuner have none.
        self._hooks = getattr(kernel, "pre_run_hooks", ())

    def launch(self, wrap: Wrap, *varying: Tensor | int) -> None:
        """Launch with the ``varying`` arguments: tensors of the plan's layouts, and factors.

        The first real launch compiles the kernel. Later launches skip Triton's inspection of the
        arguments, and changes of its knobs, until `forget_plans`. They call all hooks of Triton.
        """
        launch: Callable[..., None] = self._launch
        if wrap is not None or not self._is_compiled or self._hooks:
            launch = partial(self._compile, wrap)
        if self.descriptors:
            # Triton's allocator is a context variable: set in a copy of the context, it does not
            # replace the user's allocator.
            copy_context().run(_launch_with_scratch, launch, varying)
        else:
            launch(*varying)

    def _launch(self, *varying: Tensor | int) -> None:
        """Launch as Triton does, which would also look for the stream's device and for hooks."""
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        # A chain of hooks without calls does nothing; older hooks are functions, or None.
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
            self._compiled[self.grid](*varying, *self._rest)
        else:
            stream = triton.runtime.driver.active.get_current_stream(self._device)
            self._run(*self.grid, stream, *self._handles, *varying, *self._rest)

    def _compile(self, wrap: Wrap, *varying: Tensor | int) -> None:
        kernel = self.kernel if wrap is None else wrap(self.kernel)
        arguments = varying + self.arguments
        compiled = kernel[self.grid](*arguments, **self.constants, **self.options)
        if wrap is None and compiled is not None:  # Triton's interpreter compiles nothing
            self._keep(compiled)

    def _keep(self, compiled: Any) -> None:
        """Launch ``compiled`` from now on."""
        self._is_compiled, self._compiled, self._run = True, compiled, compiled.run
        # The function, the metadata for the launch, and no metadata nor functions for hooks.
        self._handles = compiled.function, compiled.packed_metadata, None, None, None
        self._rest = (*self.arguments, *self.constants.values())
        self._device = triton.runtime.driver.active.get_current_device()


def cached_plan(
    make: Callable[..., Plan | None],
    wrap: Wrap,
    tensors: tuple[Any, ...],
    *options: Hashable,
    out: Tensor | None = None,
) -> Plan | None:
    """``make(*tensors, *options)``, cached by the layouts of the tensors, except under a tracer.

    The tensors are on one device, and the first one is given; ``out`` is the tensor to write, if
    the caller gave it.
    """
    if wrap is not None:  # sizes may be symbols
        return make(*tensors, *options)
    given = tensors if out is None else (*tensors, out)
    # Of tensors on a CPU, the number tells which emulated GPU they stand for.
    device = device_index(tensors[0])
    key = (make, device, *options, *[t if t is None else layout(t) for t in given])
    try:
        return _plans[key]
    except KeyError:
        if len(_plans) >= _MAX_PLANS:
            _plans.clear()
        return _plans.setdefault(key, make(*tensors, *options))


def layout(t: Tensor) -> Hashable:
    """All that a check, or a rule, may look at in a tensor."""
    return t.shape, t.stride(), t.dtype, t.get_device(), t.data_ptr() & 15


def again(key: Hashable, *tensors: Tensor, factors: tuple[int, ...] = ()) -> Tensor | None:
    """Launch once more what was remembered under ``key``; return the new result, or None.

    `cached_plan` saves the rule. This also saves the checks, and all else that a call does before
    its launch, which takes as long as the launch.
    """
    found = _remembered.get(key)
    if found is None:
        return None
    plan, (empty,) = found
    out = empty(tensors[0])
    plan.launch(None, *tensors, out, *factors)
    return out


def again_pair(key: Hashable, *tensors: Tensor) -> tuple[Tensor, Tensor] | None:
    """`again` for a launch that has two results."""
    found = _remembered.get(key)
    if found is None:
        return None
    plan, (first, second) = found
    results = first(tensors[0]), second(tensors[0])
    plan.launch(None, *tensors, *results)
    return results


def remember(key: Hashable, plan: Plan, first: Tensor, *results: Tensor) -> None:
    """Let `again` launch ``plan``, which is all that a call with this key does.

    The key has the layouts of all arguments, of which ``first`` is the first one. New results are
    tensors like ``results``.
    """
    if len(_remembered) >= _MAX_PLANS:
        _remembered.clear()
    _remembered[key] = plan, [_maker(first, result) for result in results]


def _maker(first: Tensor, result: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that makes an uninitialised tensor like ``result`` from one like ``first``."""
    size, stride, dtype, device = result.shape, result.stride(), result.dtype, result.device
    if result.is_contiguous() and (dtype, device) == (first.dtype, first.device):
        if (size, stride) == (first.shape, first.stride()):
            return torch.empty_like
        return lambda t: t.new_empty(*size)  # numbers are converted in half the time of a shape
    return lambda t: torch.empty_strided(size, stride, dtype=dtype, device=device)


def forget_plans() -> None:
    """Discard the plans, so that the next launches choose and specialize anew."""
    _plans.clear()
    _remembered.clear()


def _launch_with_scratch(launch: Callable[..., None], varying: tuple[Tensor | int, ...]) -> None:
    triton.set_allocator(_scratch)
    launch(*varying)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    place = triton.runtime.driver.active.get_active_torch_device()
    return torch.empty(size, dtype=torch.int8, device=place)  # aligned to 512 bytes; TMA needs 128
