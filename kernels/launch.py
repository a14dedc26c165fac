# SPDX-License-Identifier: MIT
"""Launch plans: the kernel, grid and constants for tensors of one layout, cached for the next call.

Choosing tiles, and letting Triton specialise a kernel, takes longer than launching it. Both depend
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


class Kernel(Protocol):
    """A jitted Triton kernel: ``kernel[grid](*arguments, **options)`` launches it."""

    arg_names: Sequence[str]

    def __getitem__(self, grid: object, /) -> Callable[..., Any]: ...


Wrap = Callable[[Any], Any] | None
"""A function that a tracer applies to a Triton kernel before its launch; None for a real launch."""

_MAX_PLANS = 4096
_plans: dict[Hashable, "Plan | None"] = {}


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
        kernel: Kernel,
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
        self._rest = (*arguments, *constants.values())
        self._launch_compiled: Callable[..., object] | None = None

    def launch(self, wrap: Wrap, *varying: Tensor | int) -> None:
        """Launch with the ``varying`` arguments: tensors of the plan's layouts, and factors.

        The first real launch compiles the kernel. Later launches skip Triton's inspection of the
        arguments, its hooks before a run, and changes of its knobs, until `forget_plans`.
        """
        launch = self._launch_compiled
        if wrap is not None or launch is None:
            launch = partial(self._compile, wrap)
        if self.descriptors:
            # Triton's allocator is a context variable: set in a copy of the context, it does not
            # replace the user's allocator.
            copy_context().run(_launch_with_scratch, launch, varying + self._rest)
        else:
            launch(*varying, *self._rest)

    def _compile(self, wrap: Wrap, *arguments: Tensor | int) -> None:
        kernel = self.kernel if wrap is None else wrap(self.kernel)
        arguments = arguments[: len(arguments) - len(self.constants)]
        compiled = kernel[self.grid](*arguments, **self.constants, **self.options)
        if wrap is None and compiled is not None:  # Triton's interpreter compiles nothing
            self._keep(compiled)

    def _keep(self, compiled: Any) -> None:
        """Launch ``compiled`` from now on."""
        self._rest = (*self.arguments, *self.constants.values())
        self._launch_compiled = compiled[self.grid]


def cached_plan(
    make: Callable[..., Plan | None],
    wrap: Wrap,
    tensors: tuple[Tensor | None, ...],
    *options: Hashable,
    out: Tensor | None = None,
) -> Plan | None:
    """``make(*tensors, *options)``, cached by the layouts of the tensors, except under a tracer.

    ``out`` is the tensor to write, if the caller gave it.
    """
    if wrap is not None or emulator() is not None:  # sizes may be symbols; emulators are other GPUs
        return make(*tensors, *options)
    layouts = [
        t if t is None else (t.shape, t.stride(), t.dtype, t.get_device(), t.data_ptr() % 16)
        for t in (tensors if out is None else (*tensors, out))
    ]
    key = (make, options, *layouts)
    try:
        return _plans[key]
    except KeyError:
        if len(_plans) >= _MAX_PLANS:
            _plans.clear()
        return _plans.setdefault(key, make(*tensors, *options))


def is_emulated() -> bool:
    """Whether launches on CPU tensors are executed by `torchpar.ptx`."""
    return emulator() is not None


def emulator() -> Any:
    """The emulator that executes launches on CPU tensors, or None."""
    return getattr(triton.runtime.driver._active, "emulator", None)


def forget_plans() -> None:
    """Discard the plans, so that the next launches choose and specialise anew."""
    _plans.clear()


def _launch_with_scratch(launch: Callable[..., object], arguments: tuple[object, ...]) -> None:
    triton.set_allocator(_scratch)
    launch(*arguments)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    place = "cpu" if is_emulated() else "cuda"  # aligned to 512 bytes; TMA needs 128
    return torch.empty(size, dtype=torch.int8, device=place)
