# SPDX-License-Identifier: MIT
"""The namespace of the operators, and their registration by `torchpar.library`."""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack

from torchpar.kernels import Wrap
from torchpar.library import CustomOpDef, triton_op
from torchpar.library.flops import Formula
from torchpar.library.private import count_dispatch_modes, dispatch_modes
from torchpar.library.rules import Context, Function
from torchpar.library.transforms import is_plain

NAMESPACE = "torchpar"
Shape = tuple[int, ...]


def operator(
    schema: str,
    *,
    kernels: Callable[[], ModuleType],
    flops: Formula,
    opaque: Callable[..., bool] = lambda *args, **kwargs: False,
) -> Callable[[Function], CustomOpDef]:
    """`torchpar.library.triton_op` in this namespace.

    Args:
        schema: as in `torch.library.define`, without the namespace.
        kernels: imports the module that has the operator's kernels, for compilers' cache keys. It
            needs Triton.
        flops: what `FlopCounterMode` counts for a call.
        opaque: a function of the arguments; where it returns True, compilers do not look into the
            operator.
    """
    name, bracket, rest = schema.partition("(")
    mutated = {one.name for one in torch.parse_schema(schema).arguments if one.alias_info}

    def is_opaque(*args: Any, **kwargs: Any) -> bool:
        return opaque(*args, **kwargs) or (INDUCTOR_NEEDS_INT32 and any(map(_is_huge, args)))

    return triton_op(
        f"{NAMESPACE}::{name}",
        mutates_args=mutated,
        schema=bracket + rest,
        kernels=partial(_kernels, kernels),
        opaque=is_opaque,
        trusted=True,
        flops=flops,
    )


def overloads(schema: str, **options: Any) -> Callable[[Function], list[CustomOpDef]]:
    """Two operators of one function: `operator`, and one that also takes a keyword ``precision``.

    Each keyword slows a call down. Calls without a precision therefore use the first operator.
    """
    arguments, arrow, result = schema.replace("(", ".precision(", 1).partition(") ->")
    star = "" if "*" in arguments else "*, "
    schemas = schema, f"{arguments}, {star}str? precision{arrow}{result}"
    return lambda function: [operator(one, **options)(function) for one in schemas]


def no_flops(*args: object, **kwargs: object) -> int:
    """The floating-point operations of an elementwise operator, which PyTorch counts as 0, too."""
    return 0


def product_flops(a_shape: Shape, b_shape: Shape, *args: object, **kwargs: object) -> int:
    """The floating-point operations of ``a @ b.mT``: 2·m·n·k for ``a (*, m, k)``, ``b (*, n, k)``.

    What an operator adds to the product, or applies to it, is not counted, as by PyTorch.
    """
    return 2 * math.prod(a_shape) * b_shape[-2]


# Inductor of torch 2.11 fails for an integer above int32 among the arguments of a kernel; Inductor
# of torch 2.14 does not.
INDUCTOR_NEEDS_INT32 = torch.__version__ < "2.14"


def _is_huge(arg: Any) -> bool:
    """Whether ``arg`` has so many elements that their number, or a stride, may exceed int32."""
    if not isinstance(arg, Tensor):
        return False
    count = arg.numel()  # a symbol is no constant of a kernel
    return isinstance(count, int) and count >= 2**31


def runs_kernels(t: Tensor, *others: Tensor) -> bool:
    """Whether the operators' Triton kernels run: on a GPU, or on a CPU within `nogpu.emulate`.

    nogpu does not know the place of each tensor, so that it is asked for all operands.
    """
    return t.is_cuda or (t.is_cpu and is_emulating(t, *others))


def check_strided(operator: str, name: str, t: Tensor) -> None:
    """Raise a RuntimeError if ``t``, the argument ``name``, is sparse, or of oneDNN's layout."""
    if t.layout is not torch.strided:
        raise RuntimeError(
            f"torchpar::{operator}: {name} has layout {t.layout}, expected torch.strided; pass "
            f"{name}.to_dense()"
        )


def is_emulating(*tensors: Tensor) -> bool:
    """Whether Triton's launches on CPU tensors, those given, are executed by an emulator."""
    nogpu = sys.modules.get("nogpu")  # where nobody has imported it, nothing is emulated
    # A folder of its name, in a checkout, can be imported too, and is empty.
    ask = getattr(nogpu, "is_emulating", None)
    return ask is not None and ask(*tensors)


def is_intercepted() -> bool:
    """Whether a mode intercepts PyTorch's calls, and would miss Triton's launches.

    The mode of an emulator does not count: its emulator executes the launches.
    """
    if not count_dispatch_modes():
        return False
    return not all([getattr(mode, "sees_launches", False) for mode in dispatch_modes()])


def is_direct(*tensors: Tensor) -> bool:
    """Whether no compiler, mode or subclass intercepts calls with these tensors."""
    return is_plain(*tensors) and not is_intercepted()


def is_seen_whole() -> bool:
    """Whether the active modes are to see an operator, and not PyTorch's operators in its place.

    Selective checkpoints choose by the operator what they save. The attribute ``knows_aten_alone``
    marks a mode that has rules for PyTorch's operators alone.
    """
    return not any([getattr(mode, "knows_aten_alone", False) for mode in dispatch_modes()])


def is_exact() -> bool:
    """Whether a mode computes in exact arithmetic, with the same bits on every processor.

    The attribute ``is_exact`` marks such a mode, `torchpar.exact.mode`.
    """
    return count_dispatch_modes() > 0 and any(
        [getattr(mode, "is_exact", False) for mode in dispatch_modes()]
    )


@contextmanager
def ordinary() -> Iterator[None]:
    """Leave the exact mode, for code that is exact without it. Other modes stay: nogpu's."""
    modes = *dispatch_modes(), *_get_current_function_mode_stack()
    left = [mode for mode in modes if getattr(mode, "is_exact", False)]
    try:
        for mode in left:
            mode.is_exact = False
        yield
    finally:
        for mode in left:
            mode.is_exact = True


def save_operands(ctx: Context, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """The ``setup_context`` of an operator whose derivatives take all its operands."""
    ctx.save_for_backward(*inputs)


def _kernels(module: Callable[[], ModuleType]) -> Iterator[object]:
    from triton import JITFunction

    return (value for value in vars(module()).values() if isinstance(value, JITFunction))


def supports_tma(wrap: Wrap) -> bool:
    """Whether a kernel that ``wrap`` launches may make TMA descriptors.

    The descriptors need memory at the launch. Inductor's Python wrapper allocates this memory. Its
    C++ wrapper, and so AOTInductor, allocates enough for one program in torch 2.11. Other
    compilers, and uncompiled graphs, allocate nothing.
    """
    if wrap is None:
        return True
    from torch._inductor import config
    from torch._inductor.virtualized import V

    is_inductor = hasattr(V.fake_mode, "from_tensor")  # else no mode stands there
    return is_inductor and not (config.fx_wrapper or config.cpp_wrapper)
