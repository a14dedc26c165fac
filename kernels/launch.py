# SPDX-License-Identifier: MIT
"""Launches for tensors of one layout, which are prepared once and kept for the next call.

It takes longer to check operands, to choose tiles, and to let Triton specialize a kernel than to
launch the kernel. All of this depends on the layouts of the tensors alone: shapes, strides, dtype,
device, and where their memory begins within 16 bytes. So `prepared` looks a launch up by the
layouts, or builds it.
"""

import threading
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextvars import copy_context
from sys import modules
from typing import Any, NamedTuple, Protocol

import torch
import triton
from torch import Tensor
from triton.knobs import runtime

from . import Wrap


class TritonKernel(Protocol):
    """A jitted Triton kernel: ``kernel[grid](*arguments, **options)`` launches it."""

    arg_names: Sequence[str]

    def __getitem__(self, grid: object, /) -> Callable[..., Any]: ...


class _Records(threading.local):
    active = False  # whether this thread's launches are recorded, and go through Triton's own way


records = _Records()
forgetters: list[Callable[[], None]] = []  # for others, who keep launches, too
_MAX_LAUNCHES = 4096
_launches: dict[Hashable, "PreparedLaunch | None"] = {}  # None where the library computes


class Plan:
    """A kernel, its grid, and the arguments of its launch that come after tensors and factors.

    After the first real launch, ``compiled`` is Triton's compiled kernel. It holds the handle of
    the function, the number of warps, the shared memory, and the type of each parameter.

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
        self.compiled: Any = None
        # Of Triton's functions, the kernel's alone; its interpreter and its autotuner have none.
        self._hooks = getattr(kernel, "pre_run_hooks", ())

    def launch(self, wrap: Wrap, *varying: Tensor | int, has_scratch: bool = False) -> None:
        """Launch with the ``varying`` arguments: tensors of the plan's layouts, and factors.

        The first real launch compiles the kernel. Later launches skip Triton's inspection of the
        arguments, and changes of its knobs, until `forget_launches`. They call all hooks of Triton.
        """
        if self.descriptors and not has_scratch:
            # Triton's allocator is a context variable: set in a copy of the context, it does not
            # replace the user's allocator.
            copy_context().run(_launch_with_scratch, self, wrap, varying)
        elif wrap is not None or self.compiled is None or self._hooks or records.active:
            self._compile(wrap, *varying)
        else:
            # As Triton does, which would also look for the stream's device and for hooks. A chain
            # of hooks without calls does nothing; older hooks are functions, or None.
            enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
            if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
                self.compiled[self.grid](*varying, *self._rest)
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
        self.compiled, self._run = compiled, compiled.run
        # The function, the metadata for the launch, and no metadata nor functions for hooks.
        self._handles = compiled.function, compiled.packed_metadata, None, None, None
        self._rest = (*self.arguments, *self.constants.values())
        self._device = triton.runtime.driver.active.get_current_device()


class Step(NamedTuple):
    """A kernel of a launch, and the kernel's tensors by their places in `PreparedLaunch`."""

    plan: Plan
    tensors: tuple[int, ...]


class Empty(NamedTuple):
    """A tensor to allocate on the device of the first operand; without strides it is contiguous."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    strides: tuple[int, ...] | None = None


class PreparedLaunch:
    """The launch of an operator's kernels for operands of given layouts, as plain data.

    Tensors are named by their places: first the operands, then what the launch allocates.

    Args:
        operands: the operands, of which some may be None. They are not kept.
        steps: the kernels, in their order.
        empties: the tensors to allocate.
        results: the places of the results.
        convert: a function of the operands that returns what the kernels take in their places, such
            as copies by columns; None where the kernels take the operands.
    """

    def __init__(
        self,
        operands: Sequence[Tensor | None],
        steps: Iterable[Step],
        empties: Sequence[Empty],
        results: tuple[int, ...],
        convert: Callable[..., Sequence[Tensor | None]] | None = None,
    ):
        self.steps, self.empties, self.results = tuple(steps), tuple(empties), results
        self.convert = convert
        self._makers = [_maker(operands[0], one) for one in empties]

    def run(self, wrap: Wrap, operands: Sequence[Any], factors: tuple[int, ...] = ()) -> Any:
        """Launch for operands of these layouts; return the result, or a tuple of several results.

        Args:
            factors: numbers that may differ in each call, for kernels that take them after the
                tensors.
        """
        first = operands[0]
        tensors = [*(operands if self.convert is None else self.convert(*operands))]
        tensors += [make(first) for make in self._makers]
        for plan, places in self.steps:
            plan.launch(wrap, *[tensors[place] for place in places], *factors)
        results = self.results
        if len(results) == 1:
            return tensors[results[0]]
        return tuple([tensors[place] for place in results])


def _maker(first: Tensor | None, empty: Empty) -> Callable[[Any], Tensor]:
    """A function that makes the tensor for a first operand, which is of the layout of ``first``."""
    assert first is not None
    shape, dtype, strides = empty
    if strides is not None:
        device = first.device
        return lambda t: torch.empty_strided(shape, strides, dtype=dtype, device=device)
    if dtype != first.dtype:
        return lambda t: t.new_empty(shape, dtype=dtype)
    # The function that takes the least time; a tracer would guard that the layouts are equal.
    if (
        type(first) in (Tensor, torch.nn.Parameter)
        and first.shape == shape
        and first.stride() == torch.empty(shape, device="meta").stride()
    ):
        return torch.empty_like
    if not shape:
        return lambda t: t.new_empty(())
    return lambda t: t.new_empty(*shape)  # numbers are converted in half the time of a shape


def emulated_kind() -> int:
    """The number of the kind of GPU that Triton's driver emulates; -1 if it emulates none."""
    return getattr(triton.runtime.driver._active, "kind", -1)


def prepared(
    make: Callable[..., PreparedLaunch | None],
    wrap: Wrap,
    operands: tuple[Any, ...],
    options: tuple[Hashable, ...] = (),
) -> PreparedLaunch | None:
    """``make(*operands, *options)``, kept by the layouts of the operands, except under a tracer.

    None means that PyTorch's library computes. The first operand is given. All operands are on one
    device, or the launch does not depend on theirs.
    """
    if wrap is not None:  # sizes may be symbols
        return make(*operands, *options)
    # All that a check, or a rule, may look at. One flat tuple takes less time than a function.
    key: tuple[Any, ...] = (make, options)
    for t in operands:
        if t is None:
            key += (None,)
        else:
            key += (t.shape, t.stride(), t.dtype, t.get_device(), t.data_ptr() & 15)
    if key[5] < 0 or "nogpu" in modules:  # the kind of the GPU that may be emulated
        key += (emulated_kind(),)
    try:
        return _launches[key]
    except KeyError:
        if len(_launches) >= _MAX_LAUNCHES:
            _launches.clear()
        return _launches.setdefault(key, make(*operands, *options))


def forget_launches() -> None:
    """Discard the launches, so that the next calls choose and specialize anew."""
    _launches.clear()
    for forget in forgetters:
        forget()


def _launch_with_scratch(plan: Plan, wrap: Wrap, varying: tuple[Tensor | int, ...]) -> None:
    triton.set_allocator(_scratch)
    plan.launch(wrap, *varying, has_scratch=True)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    place = triton.runtime.driver.active.get_active_torch_device()
    return torch.empty(size, dtype=torch.int8, device=place)  # aligned to 512 bytes; TMA needs 128
