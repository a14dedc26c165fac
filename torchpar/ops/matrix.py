# SPDX-License-Identifier: MIT
"""Checks and products shared by the matrix operators."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from torchpar.library.private import count_dispatch_modes
from torchpar.library.sharding import is_dtensor
from torchpar.library.transforms import is_plain, is_transformed
from torchpar.ops._operator import check_strided
from torchpar.ops._operator import is_direct as is_direct  # others import these four names
from torchpar.ops._operator import is_exact as is_exact
from torchpar.ops._operator import ordinary as ordinary
from torchpar.ops._operator import runs_kernels as runs_kernels
from torchpar.ops.processor import has_amx
from torchpar.ops.sizes import check_alike

_TILE = 32  # 16-bit floats in a row of a tile of AMX
# To ask PyTorch by the attribute takes 0.5 µs longer, since it is looked up before.
_fp32_flag = torch.backends.cuda.matmul.__getattr__
DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))


def check_dtype(operator: str, name: str, x: Tensor) -> None:
    """Raise a RuntimeError unless ``x``, the argument ``name``, is strided, and has a dtype of the
    kernels."""
    if x.dtype not in DTYPES:
        raise RuntimeError(
            f"torchpar::{operator}: {name} has dtype {x.dtype}, expected float16, bfloat16, "
            "float32 or float64"
        )
    if x.layout is not torch.strided:  # else a call would take time
        check_strided(operator, name, x)


def check_like(
    operator: str,
    name: str,
    t: Tensor,
    shape: tuple[int, ...] | None,
    other: str,
    like: Tensor,
    symbolic: bool = False,
) -> None:
    """Raise a RuntimeError unless ``t`` has ``shape``, and the dtype and device of ``like``.

    ``like`` is the argument ``other``. ``symbolic``: whether sizes are symbols.
    """
    if t.layout is not torch.strided:
        check_strided(operator, name, t)
    if shape is not None and (symbolic or t.shape != shape):
        check_alike(
            t.shape,
            shape,
            lambda: (
                f"torchpar::{operator}: {name} has shape {tuple(t.shape)}, expected {tuple(shape)}"
            ),
        )
    if t.dtype != like.dtype:
        check_dtype(operator, name, t)
        what = (
            f"{name} has dtype {t.dtype} and {other} {like.dtype}, expected one dtype; cast one, "
            f"as by {other}.to({name}.dtype)"
        )
    elif t.device != like.device:
        what = f"{name} is on {t.device}, expected {other}'s device {like.device}"
    else:
        return
    raise RuntimeError(f"torchpar::{operator}: {what}")


def fp32_precision(x: Tensor, given: str | None = None) -> tuple[str, bool]:
    """The precision of products of ``x`` on CUDA, and whether PyTorch's library has this precision.

    The library's products follow PyTorch's flag. All products of float32 follow the flag unless
    `torchpar.fp32_products` has ``given`` a precision. The library's float32 on FMA units serves
    for "tf32x3", too. Other dtypes are "ieee".
    """
    if x.dtype != torch.float32:
        return "ieee", True
    flag = "tf32" if _fp32_flag("fp32_precision") == "tf32" else "ieee"
    if given is None:
        return flag, True
    return given, flag == ("ieee" if given == "tf32x3" else given)


def needs_fp32_kernel(x: Tensor, given: str | None) -> bool:
    """Whether a kernel computes products of ``x``, because PyTorch's library has not the precision
    that is ``given``, or is slow in it."""
    if given is None or x.dtype != torch.float32 or not runs_kernels(x):
        return False
    return given == "tf32x3" or not fp32_precision(x, given)[1]


def rows(t: Tensor) -> Tensor:
    """``(*, features)`` as a matrix; a view where the strides allow."""
    return t if t.dim() == 2 else t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def is_tiled(t: Tensor) -> bool:
    """Whether a product may read beyond the ends of the rows of ``t``: 16-bit floats on a CPU.

    AMX multiplies tiles of 32 numbers from each row of the left operand. Where a row does not fill
    its last tile, oneDNN fills the tile with the memory behind the row, and multiplies this memory
    by 0. If this memory holds an infinity or a NaN, all results of the row are NaN. A row of at
    most 32 numbers is completed to pairs only. https://github.com/uxlfoundation/oneDNN/issues/5717
    """
    return t.is_cpu and t.dtype.itemsize == 2


def missing(k: int) -> int:
    """The numbers that a row of ``k`` 16-bit floats lacks to whole tiles, or to whole pairs."""
    if isinstance(k, torch.SymInt):  # a comparison would specialize the graph, and so would 0
        whole = _TILE if has_amx() else 2
        return whole + -k % whole
    return -k % (_TILE if k > _TILE and has_amx() else 2)


def _with_zeros(t: Tensor, dim: int) -> Tensor:
    count = missing(t.shape[dim])
    if isinstance(count, int) and count == 0:
        return t
    shape = list(t.shape)
    shape[dim] = count
    return torch.cat((t, t.new_zeros(shape)), dim)


def pad_to_tiles(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Append `missing` columns of zeros to ``a (*, n, k)`` and ``b (*, m, k)``, if `is_tiled`.

    DTensors are left as they are.
    """
    if not is_tiled(a) or is_dtensor(a) or is_dtensor(b):
        return a, b
    padded = _with_zeros(a, -1)
    return padded, padded if b is a else _with_zeros(b, -1)


def product(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    out: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    """``alpha * a @ b.mT + beta * c`` by PyTorch's libraries, for ``a (*, n, k)``, ``b (*, m, k)``.

    On CUDA, float32 has the ``precision`` that is given, if necessary by a kernel.

    As in BLAS, a factor of 0 leaves its term out, whatever the operands hold. The memory behind the
    rows (`is_tiled`) does not matter for the result and its derivatives, unless the operands are
    DTensors. A result in ``out`` has no derivatives.
    """
    if c is not None and beta == 0:
        c = None
    if alpha != 0 and needs_fp32_kernel(a, precision):
        assert precision is not None
        from torchpar.ops.fp32_matmul import fp32_matmul  # which imports this module

        result = fp32_matmul(a, b, precision)
        result = result if alpha == 1 else alpha * result
        return result if c is None else result + beta * c
    if not is_tiled(a) or is_dtensor(a) or is_dtensor(b):
        return _product(a, b, c, alpha, beta, out)
    if out is not None:  # which may be C: to compute twice would add the product twice
        return _product(*pad_to_tiles(a, b), c, alpha, beta, out)
    if _may_be_differentiated(a, b, c):
        return _whole_product(a, b, c, alpha, beta)
    return of_rows_alone(lambda a, b: _product(a, b, c, alpha, beta), a, b)


def of_rows_alone(compute: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """``compute(a, b)``, a product of the rows ``a (*, n, k)`` and ``b (*, m, k)``, if `is_tiled`.

    The memory behind the rows can only turn results into NaN. So where the result can be read, and
    is not much larger than the operands, the rows are padded only if the result holds a NaN. To
    look for a NaN is a sum, which reads each number once. Padding would read and write each number
    of the operands.
    """
    if not is_tiled(a) or not missing(a.shape[-1]):
        return compute(a, b)
    if is_plain(a, b) and _has_numbers(a) and _has_numbers(b) and not count_dispatch_modes():
        size = a.numel() // a.shape[-1] * b.shape[-2]
        if size <= 2 * (a.numel() + b.numel()):
            result = compute(a, b)
            if not math.isnan(result.sum().item()):
                return result
    return compute(*pad_to_tiles(a, b))


def _has_numbers(t: Tensor) -> bool:
    """Whether ``t`` has memory; a batch of gradients, by ``is_grads_batched``, has none."""
    try:
        t.data_ptr()
    except RuntimeError:
        return False
    return True


def _may_be_differentiated(*tensors: Tensor | None) -> bool:
    return is_transformed(tensors) or (
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    )


def _whole_product(a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float) -> Tensor:
    """`product`, with zeros to whole tiles in all sizes.

    The derivatives are products along the other sizes. Their operands are whole, too, because the
    gradient of a slice is zero outside of it.
    """
    n, m = a.shape[-2], b.shape[-2]
    a, b = (_with_zeros(t, -2) for t in pad_to_tiles(a, b))
    for dim in (-1, -2):
        if c is not None and c.dim() >= -dim and c.shape[dim] != 1:  # 1 is broadcast
            c = _with_zeros(c, dim)
    return _product(a, b, c, alpha, beta)[..., :n, :m].contiguous()


def _product(
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    alpha: float,
    beta: float,
    out: Tensor | None = None,
) -> Tensor:
    if c is None and alpha == 1:
        # `matmul` takes a microsecond longer.
        return (
            torch.mm(a, b.mT, out=out)
            if a.dim() == b.dim() == 2
            else torch.matmul(a, b.mT, out=out)
        )
    if alpha == 0 or not abs(alpha) < math.inf:
        # At some sizes PyTorch's libraries return NaN for alpha 0, and finite numbers for an
        # infinite alpha.
        result = alpha * (a @ b.mT) if alpha else a.new_zeros(*a.shape[:-1], b.shape[-2])
        result = result if c is None else result + beta * c
        return result.contiguous() if out is None else out.copy_(result)
    beta = 0.0 if c is None else beta
    if a.dim() == 2:
        c = a.new_zeros(()) if c is None else c  # vmap reads it: 0·NaN is NaN
        return torch.addmm(c, a, b.mT, alpha=alpha, beta=beta, out=out)
    a3, b3 = (t.reshape(math.prod(t.shape[:-2]), *t.shape[-2:]) for t in (a, b))
    c3 = a.new_zeros(()) if c is None else c.reshape(a3.shape[0], *c.shape[-2:])
    return torch.baddbmm(c3, a3, b3.mT, alpha=alpha, beta=beta).view(*a.shape[:-1], b.shape[-2])


def mean_with_transpose(g: Tensor) -> Tensor:
    """``(g + g.mT) / 2`` for ``g (*, n, n)``; unlike ``g + g.mT``, it cannot overflow."""
    half = g * 0.5
    return half + half.mT
