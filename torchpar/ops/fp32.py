# SPDX-License-Identifier: MIT
"""The precision of float32 products on CUDA, set apart from PyTorch's flag."""

from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

from torchpar.decorating import decorated

_P = ParamSpec("_P")
_R = TypeVar("_R")

MODES = ("ieee", "tf32", "tf32x3")

# The mode. It is a global name, as PyTorch's flags are: torch.compile guards on it, and threads
# share it, such as autograd's, in which a checkpoint computes again. The operators' functions read
# the name at each call; to call a function would take longer.
chosen: str | None = None


class fp32_products:
    """Set the precision of float32 products on CUDA, within a block or from now on.

    `matmul_t`, `symmetric_matmul` and `linear_sigmoid` follow it::

        with torchpar.fp32_products("tf32x3"):
            gram = torchpar.matmul_t(x)

        torchpar.fp32_products("tf32x3")  # from now on, as torch.set_grad_enabled

    It also decorates a function. The derivatives of a call, of any order, have the mode of the
    call, whatever the mode is when they are computed. PyTorch's own operators have the precision of
    PyTorch's flag in any mode. Other dtypes have no mode, and neither has float32 on a CPU.

    `torch.compile` compiles a function again for another mode. An exported program keeps the mode
    in which it was exported. The operators themselves take the mode as an argument, which the
    functions pass: ``torch.ops.torchpar.matmul_t(x, precision="tf32x3")``. Without it they follow
    PyTorch's flag.

    All threads of the process share one mode, as they share PyTorch's flag. So the mode holds in
    autograd's threads, where a checkpoint computes again. Threads that need different modes at
    the same time call the operators with the argument.

    Args:
        mode: "tf32x3" for the sum of three products of TF32, which is about as exact as float32
            (docs/numerics.md); "ieee" for float32; "tf32" for one product of TF32; None, the
            default, for `torch.backends.cuda.matmul.fp32_precision`.

    Raises:
        ValueError: another mode; a generator or a coroutine function to decorate, whose body would
            run after the block.
    """

    def __init__(self, mode: str | None):
        global chosen
        if mode is not None and mode not in MODES:
            raise ValueError(f"fp32_products: mode is {mode!r}, expected one of {MODES} or None")
        self.mode, self.before = mode, chosen
        chosen = mode

    def __enter__(self) -> None:
        global chosen
        chosen = self.mode

    def __exit__(self, *error: object) -> None:
        global chosen
        chosen = self.before

    def __call__(self, function: Callable[_P, _R]) -> Callable[_P, _R]:
        self.__exit__()  # a decorator sets nothing before the function is called
        return decorated("fp32_products", partial(fp32_products, self.mode), function)

    @staticmethod
    def get() -> str | None:
        """The mode; None if products follow PyTorch's flag."""
        return chosen
