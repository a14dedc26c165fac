# SPDX-License-Identifier: MIT
"""Matrix products with ``out_dtype``, which PyTorch computes on a GPU alone.

torch.addmm(total, a, b, out_dtype=torch.float32, out=total)  # a and b are in bfloat16
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from nogpu.triton.emulator import Emulator

PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")
WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32}


@contextmanager
def wide_products(present: Callable[[], Emulator]) -> Iterator[None]:
    """Let the block's products of tensors of the device have an ``out_dtype``.

    Args:
        present: returns the emulator that knows which tensors those are.
    """
    library = torch.library.Library("aten", "IMPL", "CPU")
    try:
        for name in PRODUCTS:
            for overload in (f"{name}.dtype", f"{name}.dtype_out"):
                # A later PyTorch may have one.
                if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{overload}", "CPU"):
                    library.impl(overload, _product(name, present))
        yield
    finally:
        library._destroy()


def _product(name: str, present: Callable[[], Emulator]) -> Callable[..., Tensor]:
    multiply = getattr(torch, name)

    def product(*args: object, **options: object) -> Tensor:
        operands = [one for one in args if isinstance(one, Tensor)]
        factor, dtype = operands[-1].dtype, args[len(operands)]
        watcher = present().watcher
        if watcher is not None and watcher.has_device(operands) is False:
            raise NotImplementedError(f"torch.{name} takes no out_dtype for tensors on the host")
        if dtype not in (factor, WIDER.get(factor)):
            raise RuntimeError(
                f"torch.{name} has out_dtype {dtype}; on a GPU it is {factor}, the operands' type, "
                "or torch.float32 for those in bfloat16 and float16"
            )
        result: Tensor = multiply(*(t.to(dtype) for t in operands), **options)
        return result

    return product
