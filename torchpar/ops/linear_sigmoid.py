# SPDX-License-Identifier: MIT
"""Linear layer followed by a sigmoid.

    Y = σ(Z),  Z = X·Wᵀ + b,  σ(z) = 1/(1 + e⁻ᶻ)

With G = dL/dY, and since σ' = σ·(1 − σ) depends on the output alone:

    dL/dZ = G·Y·(1 − Y)        dL/db = Σ dL/dZ over the rows
    dL/dX = dL/dZ · W          dL/dW = (dL/dZ)ᵀ · X

A second operator computes dL/dZ and dL/db in one pass over G and Y on a GPU. It has no gradient:
second derivatives are derivatives of the plain formula.
"""

import math
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional as F
from torch.overrides import has_torch_function_variadic

from torchpar.kernels import Wrap
from torchpar.library import batch_first, sample
from torchpar.library.private import count_dispatch_modes, implementations, profiler_enabled
from torchpar.library.rules import Context, Sharding, Spec, VmapInfo
from torchpar.library.sharding import is_dtensor
from torchpar.library.transforms import needs_formula
from torchpar.ops import fp32
from torchpar.ops._operator import (
    is_emulating,
    is_exact,
    is_seen_whole,
    no_flops,
    operator,
    overloads,
    product_flops,
    runs_kernels,
    supports_tma,
)
from torchpar.ops.cpu import is_eager, linear, linear_forward
from torchpar.ops.matrix import (
    check_dtype,
    check_like,
    fp32_precision,
    is_tiled,
    missing,
    needs_fp32_kernel,
    product,
    rows,
)
from torchpar.ops.processor import has_bfloat16
from torchpar.ops.sizes import check_alike, has_symbols

if TYPE_CHECKING:  # DTensor takes long to import
    from torch.distributed.tensor import Placement

_KERNEL_OF_OTHERS = "torchpar/linear_sigmoid/AutogradCPU"
_WIDE = (torch.float32, torch.float64)


def linear_sigmoid(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The sigmoid of a linear layer: ``y = sigmoid(x @ weight.T + bias)``.

    For the backward pass, ``x``, ``weight`` and ``y`` are saved, and nothing else.

    Args:
        x: ``(*, in_features)``; float16, bfloat16, float32 or float64. On CUDA, float32 follows
            `torch.backends.cuda.matmul.fp32_precision`, or `torchpar.fp32_products`.
        weight: ``(out_features, in_features)``, of ``x``'s dtype and device.
        bias: ``(out_features)``, of ``x``'s dtype and device, or None.

    Returns:
        ``(*, out_features)``, contiguous, of ``x``'s dtype.

    Raises:
        RuntimeError: an unsupported dtype, shapes that do not fit, or mixed dtypes or devices.
    """
    precision = fp32.chosen
    if precision is None:
        # The dispatcher would call the same functions. Between other calls it takes the host 30 µs.
        if not is_compiling() and _needs_no_dispatcher(x, weight, bias):
            z = linear(x, weight, bias)
            return z.sigmoid() if x.dim() != 2 else z.sigmoid_()  # as in `_formula`
        return _op(x, weight, bias)  # type: ignore[no-any-return]
    return _op_of_precision(x, weight, bias, precision=precision)  # type: ignore[no-any-return]


def _check_operands(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_dtype("linear_sigmoid", "x", x)
    if x.dim() < 1:
        raise RuntimeError("torchpar::linear_sigmoid: x has shape (), expected (*, in_features)")
    symbolic = has_symbols(x, weight, bias)
    if weight.dim() != 2 or symbolic or weight.shape[1] != x.shape[-1]:
        check_alike(
            weight.shape[1:],
            x.shape[-1:],
            lambda: (
                f"torchpar::linear_sigmoid: weight has shape {tuple(weight.shape)}, expected "
                f"(out_features, {x.shape[-1]}) for x of shape {tuple(x.shape)}"
            ),
        )
    check_like("linear_sigmoid", "weight", weight, None, "x", x)
    if bias is not None:
        check_like("linear_sigmoid", "bias", bias, weight.shape[:1], "x", x, symbolic)


def _is_native(x: Tensor, weight: Tensor, bias: Tensor | None = None, **_: object) -> bool:
    """Whether to call PyTorch's operators, with their autograd, in place of this operator.

    On CPUs PyTorch's operators are faster; they are called if no mode is to see this operator. For
    16-bit floats they are right if all sizes are whole tiles (`is_tiled`): the gradients are
    products along the other sizes.
    """
    if is_exact():  # whose mode has no rule for this operator, on any device
        return True
    if not x.is_cpu or is_emulating(x) or not is_eager(x, weight, bias):
        return False
    if count_dispatch_modes() and is_seen_whole():  # the number alone takes less time
        return False
    if not is_tiled(x):
        return True
    is_whole = not any(map(missing, (*weight.shape, math.prod(x.shape[:-1]))))
    return is_whole and not _is_slow(x)


def _needs_no_dispatcher(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `linear` may compute a call without the dispatcher.

    It may if `_is_native` would hold, if the operands are right and have the dtype float32 or
    float64, and if no mode or profiler is to see the operator.
    """
    if not (isinstance(x, Tensor) and isinstance(weight, Tensor)):
        return False
    if profiler_enabled() or count_dispatch_modes():
        return False
    if _op._decompose is not _is_native or _KERNEL_OF_OTHERS in implementations:
        return False  # others have registered a derivative or a kernel
    if has_torch_function_variadic(x, weight, bias) or not is_eager(x, weight, bias):
        return False
    dtype, rank = x.dtype, x.dim()
    return (
        dtype in _WIDE
        and rank > 0
        and _is_like(x, dtype, rank)
        and _is_like(weight, dtype, 2)
        and x.size(-1) == weight.size(1)
        and (bias is None or (_is_like(bias, dtype, 1) and bias.size(0) == weight.size(0)))
        and not is_emulating()
    )


def _is_like(t: Tensor, dtype: torch.dtype, rank: int) -> bool:
    is_dense = t.layout is torch.strided and not t.is_nested
    return is_dense and t.dtype == dtype and t.dim() == rank and t.is_cpu


def _is_slow(t: Tensor) -> bool:
    """Whether products of ``t`` take 50 times as long as products of float32."""
    return t.dtype == torch.bfloat16 and t.is_cpu and not has_bfloat16()


def _formula(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, precision: str | None = None
) -> Tensor:
    _check_operands(x, weight, bias)
    if needs_fp32_kernel(x, precision):
        z = product(rows(x) if x.dim() == 1 else x, weight, precision=precision)
        z = z.view(weight.shape[:1]) if x.dim() == 1 else z
        return (z if bias is None else z + bias).sigmoid()
    if is_tiled(x) and not is_dtensor(x) and not _is_native(x, weight, bias):
        z = product(rows(x), weight, bias, beta=0.0 if bias is None else 1.0)
        return z.view(*x.shape[:-1], weight.shape[0]).sigmoid()
    z = linear(x, weight, bias)
    # A product of more dimensions may be a view, whose change in place costs autograd more time. A
    # mode may keep the product.
    return z.sigmoid() if x.dim() != 2 or count_dispatch_modes() else z.sigmoid_()


def _kernels() -> ModuleType:
    from torchpar.kernels import linear_sigmoid

    return linear_sigmoid


def _compute(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    precision: str | None = None,
    wrap: Wrap,
) -> Tensor:
    if not runs_kernels(x, weight):
        _check_operands(x, weight, bias)
        if not _is_slow(x):
            return linear_forward(x, weight, bias).sigmoid_()
        bias = None if bias is None else bias.float()
        return linear_forward(x.float(), weight.float(), bias).sigmoid_().bfloat16()
    from torchpar.kernels import linear_sigmoid as kernel

    precision, is_native = fp32_precision(x, precision)
    matrix = x
    if x.dim() != 2:
        _check_operands(x, weight, bias)
        matrix = rows(x)
    out = kernel.linear_sigmoid(
        matrix,
        weight,
        bias,
        precision,
        wrap,
        tma=wrap is None or supports_tma(wrap),
        only_if_faster=is_native and not is_emulating(),
        check=_check_operands,
    )
    if out is None:
        return F.linear(x, weight, bias).sigmoid_()
    return out if x.dim() == 2 else out.view(*x.shape[:-1], weight.shape[0])


_op, _op_of_precision = overloads(
    "linear_sigmoid(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
    kernels=_kernels,
    flops=product_flops,
)(_compute)
_sigmoid_gradient = torch.ops.aten.sigmoid_backward.default


def _linear_sigmoid_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, **_: object
) -> Tensor:
    _check_operands(x, weight, bias)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


class _Context(Context, Protocol):
    precision: str | None


def _setup_context(
    ctx: _Context,
    inputs: tuple[Tensor, ...],
    output: Tensor,
    keyword_only_inputs: Mapping[str, str | None] = {},
) -> None:
    x, weight = inputs[:2]
    ctx.save_for_backward(x, weight, output)
    ctx.precision = keyword_only_inputs.get("precision")


def dz_and_db(g: Tensor, y: Tensor, need_bias: bool = True) -> tuple[Tensor, Any]:
    """dL/dZ ``(*, out)`` from g = dL/dY and y ``(*, out)``; with ``need_bias`` also dL/db."""
    if not need_bias:
        return _sigmoid_gradient(g, y), None
    # On a CPU nothing is fused, and two calls of ATen cost less than dispatching one operator.
    is_fused = runs_kernels(y) and not needs_formula(g, y)
    return _backward_op(g, y) if is_fused else _backward_formula(g, y)


def _backward(ctx: _Context, g: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, y = ctx.saved_tensors
    # There is no entry for a bias that is not given.
    need_x, need_weight, *need_bias = ctx.needs_input_grad
    dz, db = dz_and_db(g, y, any(need_bias))
    dtype = x.dtype
    if _is_slow(x):
        dz, x, weight = dz.float(), x.float(), weight.float()
    # PyTorch's product of a one-dimensional DTensor and a matrix has a wrong shape (2.15).
    dx = dw = None
    if need_x:
        g = rows(dz) if dz.dim() == 1 else dz
        dx = product(g, weight.mT, precision=ctx.precision).to(dtype)
        dx = dx.view(x.shape) if x.dim() == 1 else dx
    if need_weight:
        dw = product(rows(dz).mT, rows(x).mT, precision=ctx.precision).to(dtype)
    return dx, dw, db


def _linear_sigmoid_vmap(
    info: VmapInfo,
    in_dims: tuple[int | None, ...],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    **precision: Any,
) -> tuple[Tensor, int]:
    x_dim, weight_dim, bias_dim = (*in_dims, None)[:3]
    _check_operands(
        sample(x, x_dim),
        sample(weight, weight_dim),
        None if bias is None else sample(bias, bias_dim),
    )
    x = batch_first(x, x_dim, info.batch_size)
    if weight_dim is None and bias_dim is None:
        op = _op_of_precision if precision else _op
        return op(x, weight, bias, **precision), 0
    # A weight or a bias per sample is a batched product, which the kernel does not compute.
    weight = batch_first(weight, weight_dim, info.batch_size)
    x2 = x.reshape(info.batch_size, math.prod(x.shape[1:-1]), x.shape[-1])
    if bias is None:
        z = product(x2, weight, **precision)
    else:
        c = batch_first(bias, bias_dim, info.batch_size).unsqueeze(1)
        z = product(x2, weight, c, beta=1.0, **precision)
    y = z.sigmoid() if count_dispatch_modes() else z.sigmoid_()  # a mode may keep the product
    return y.reshape(*x.shape[:-1], weight.shape[1]), 0


def _linear_sigmoid_sharding(
    x: Spec, weight: Spec, bias: Spec | None = None, **_: object
) -> list[Sharding]:
    from torch.distributed.tensor import Replicate, Shard

    def parameters(placement: "Placement") -> "list[Placement | None]":
        return [placement, None if bias is None else placement]

    rows = [([Shard(dim)], [Shard(dim), *parameters(Replicate())]) for dim in range(x.ndim - 1)]
    columns = ([Shard(x.ndim - 1)], [Replicate(), *parameters(Shard(0))])
    return [([Replicate()], [Replicate(), *parameters(Replicate())]), columns, *rows]


for _each in (_op, _op_of_precision):
    _each.register_fake(_linear_sigmoid_fake)
    _each.register_autograd(
        _backward, setup_context=_setup_context, formula=_formula, decompose=_is_native
    )
    _each.register_vmap(_linear_sigmoid_vmap)
    _each.register_autocast()
    _each.register_sharding(_linear_sigmoid_sharding)


# The backward's first pass: dL/dZ (*, out) and dL/db (out) from g and y (*, out).


def _backward_formula(g: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    dz = _sigmoid_gradient(g, y)
    return dz, rows(dz).sum(0)


def _backward_kernels() -> ModuleType:
    from torchpar.kernels import sigmoid_backward

    return sigmoid_backward


@operator(
    "linear_sigmoid_backward(Tensor g, Tensor y) -> (Tensor, Tensor)",
    kernels=_backward_kernels,
    flops=no_flops,
)
def _backward_op(g: Tensor, y: Tensor, *, wrap: Wrap) -> tuple[Tensor, Tensor]:
    if not runs_kernels(y):
        dz, db = _backward_formula(g, y)
        return dz.contiguous(), db
    from torchpar.kernels import sigmoid_backward as kernel

    if y.dim() == 2:
        return kernel.sigmoid_backward(g, y, None, wrap)
    dz = torch.empty_like(y, memory_format=torch.contiguous_format)
    _, db = kernel.sigmoid_backward(rows(g), rows(y), rows(dz), wrap)
    return dz, db


@_backward_op.register_fake
def _linear_sigmoid_backward_fake(g: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), y.new_empty(y.shape[-1])


_backward_op.register_autocast(cast=False)
