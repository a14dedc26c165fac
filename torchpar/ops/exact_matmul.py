# SPDX-License-Identifier: MIT
"""The product of two matrices of float32, bfloat16 or float16 by exact sums of integers.

    C = A·Bᵀ, by the formula of `torchpar.ops.exact_digits`

With G = dL/dC, the gradients are exact products too:

    dL/dA = G·B        dL/dB = Gᵀ·A

If both operands are one tensor, half of the product is computed.
"""

from types import ModuleType

import torch
from torch import Tensor

from torchpar.kernels import Wrap
from torchpar.library import batch_first, sample
from torchpar.library.rules import Context, Sharding, Spec, VmapInfo
from torchpar.ops import exact_digits
from torchpar.ops._operator import check_strided, operator, product_flops, save_operands
from torchpar.ops.sizes import check_alike, has_symbols


def exact_matmul(a: Tensor, b: Tensor) -> Tensor:
    """The product ``a @ b.mT``, with the same bits on every processor.

    The bits do not depend on the device or on the number of threads. The rows of both operands are
    scaled by powers of two and rounded to integers of 32 bits, or of 24 bits for bfloat16 and
    float16; `torchpar.ops.exact_digits` has the formula. The sums are exact, and are rounded once.
    For rows a_i and b_j the error is at most

        k · 2⁻²⁷ · max|a_i| · max|b_j| + half an ulp      float32
        k · 2⁻²⁰ · max|a_i| · max|b_j| + half an ulp      bfloat16, float16

    A float32 that is 2²⁰ times smaller than the largest of its row keeps at least 10 bits, and one
    that is 2³³ times smaller counts as 0. A bfloat16 that is 2¹⁴ times smaller, or a float16 that
    is 2¹¹ times smaller, keeps all its bits, and one that is 2²⁵ times smaller counts as 0. NaN and
    infinities propagate as in `torch.mm`, but a sum overflows only if the result does. The
    gradients are exact products, too. `torch.autocast` makes operands of 16 bits float32.

    Args:
        a: ``(*, m, k)`` float32, bfloat16 or float16.
        b: ``(*, n, k)`` of the same dtype, with the same first dimensions.

    Returns:
        ``(*, m, n)``, contiguous.

    Raises:
        RuntimeError: another dtype, fewer than two dimensions, or shapes that do not fit.
    """
    return _op(a, b)  # type: ignore[no-any-return]


def exact_matmul_t(x: Tensor) -> Tensor:
    """The product ``x @ x.mT``, ``exact_matmul(x, x)``, of which half is computed.

    The result equals its transpose bit for bit.

    Args:
        x: ``(*, n, k)`` float32, bfloat16 or float16.

    Returns:
        ``(*, n, n)``, contiguous.

    Raises:
        RuntimeError: another dtype, or fewer than two dimensions.
    """
    return exact_matmul(x, x)


def _check_operands(a: Tensor, b: Tensor) -> None:
    for name, t, shape in (("a", a, "(*, m, k)"), ("b", b, "(*, n, k)")):
        if t.dtype not in exact_digits.DIGITS:
            raise RuntimeError(
                f"torchpar::exact_matmul: {name} has dtype {t.dtype}, expected float32, bfloat16 "
                "or float16"
            )
        if t.dtype != a.dtype:
            raise RuntimeError(
                f"torchpar::exact_matmul: b has dtype {b.dtype} and a {a.dtype}, expected one "
                "dtype; cast one"
            )
        check_strided("exact_matmul", name, t)
        if t.dim() < 2:
            raise RuntimeError(
                f"torchpar::exact_matmul: {name} has shape {tuple(t.shape)}, expected {shape}"
            )
    if (
        has_symbols(a, b)
        or b.shape[:-2] != a.shape[:-2]
        or b.shape[-1] != a.shape[-1]
        or b.device != a.device
    ):

        def message() -> str:
            expected = ", ".join([*map(str, a.shape[:-2]), "n", str(a.shape[-1])])
            actual = f"b is {tuple(b.shape)} on {b.device}"
            return f"torchpar::exact_matmul: {actual}, expected ({expected}) on {a.device}"

        first, second = ((*t.shape[:-2], t.shape[-1]) for t in (a, b))
        check_alike(first, second, message)
        if b.device != a.device:
            raise RuntimeError(message())


def _kernels() -> ModuleType:
    from torchpar.kernels import exact_matmul

    return exact_matmul


# The CPU path looks at the values, so compilers do not look into it.
@operator(
    "exact_matmul(Tensor a, Tensor b) -> Tensor",
    kernels=_kernels,
    flops=product_flops,  # of the plain product, for any number of products of digits
    opaque=lambda a, b: not a.is_cuda,
)
def _op(a: Tensor, b: Tensor, *, wrap: Wrap) -> Tensor:
    _check_operands(a, b)
    e, f = exact_digits.exponents_of_both(a, b)
    return exact_digits.product_of_exponents(a, b, e, f, wrap)


@_op.register_fake
def _exact_matmul_fake(a: Tensor, b: Tensor) -> Tensor:
    _check_operands(a, b)
    return a.new_empty(*a.shape[:-1], b.shape[-2])


def _backward(ctx: Context, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
    a, b = ctx.saved_tensors
    need_a, need_b = ctx.needs_input_grad
    return exact_matmul(g, b.mT) if need_a else None, exact_matmul(g.mT, a.mT) if need_b else None


def _jvp(ctx: Context, da: Tensor | None, db: Tensor | None) -> Tensor:
    a, b = ctx.saved_tensors
    if da is None or db is None:
        return exact_matmul(a, db) if da is None else exact_matmul(da, b)  # type: ignore[arg-type]
    return exact_matmul(da, b) + exact_matmul(a, db)


_op.register_autograd(_backward, setup_context=save_operands, jvp=_jvp)


@_op.register_vmap
def _exact_matmul_vmap(
    info: VmapInfo, in_dims: tuple[int | None, int | None], a: Tensor, b: Tensor
) -> tuple[Tensor, int]:
    _check_operands(sample(a, in_dims[0]), sample(b, in_dims[1]))
    first = batch_first(a, in_dims[0], info.batch_size)
    is_same = b is a and in_dims[0] == in_dims[1]  # other slices of one tensor are other matrices
    return exact_matmul(first, first if is_same else batch_first(b, in_dims[1], info.batch_size)), 0


for _device in ("cpu", "cuda"):
    _op.register_autocast(_device, torch.float32)


@_op.register_sharding
def _exact_matmul_sharding(a: Spec, b: Spec) -> list[Sharding]:
    from torch.distributed.tensor import Replicate, Shard

    # A sum of rounded partial sums would not be exact: operands sharded along k are gathered.
    batch = [([Shard(dim)], [Shard(dim), Shard(dim)]) for dim in range(a.ndim - 2)]
    rows, columns = Shard(a.ndim - 2), Shard(a.ndim - 1)
    full = Replicate()
    return [([full], [full, full]), ([rows], [rows, full]), ([columns], [full, rows]), *batch]
