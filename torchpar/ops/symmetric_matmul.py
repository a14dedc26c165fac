# SPDX-License-Identifier: MIT
"""A matrix product that the caller knows to be symmetric.

    Y = α·A·Bᵀ + β·C

An example is a pair of polynomials in one symmetric matrix, A = p(S) and B = q(S): they are
symmetric, and they commute. With G = dL/dY:

    dL/dA = α·G·B        dL/dB = α·Gᵀ·A        dL/dC = β·G

These gradients are the derivatives of the plain formula. They are right in every direction in which
Y stays symmetric.

A second operator, without a gradient, adds the product to a matrix in place: H ← β·H + α·A·Bᵀ.
"""

from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from torchpar.kernels import Wrap
from torchpar.library import batch_first, sample
from torchpar.library.rules import Context, Sharding, Spec, VmapInfo
from torchpar.library.sharding import is_dtensor
from torchpar.library.transforms import is_transformed
from torchpar.ops import cpu, fp32
from torchpar.ops._operator import (
    is_emulating,
    operator,
    ordinary,
    overloads,
    runs_kernels,
    supports_tma,
)
from torchpar.ops.matrix import check_dtype, check_like, fp32_precision, product
from torchpar.ops.sizes import check_alike, has_symbols

if TYPE_CHECKING:  # DTensor takes long to import
    from torch.distributed.tensor import Placement


def symmetric_matmul(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float | None = None,
    check: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """A product known to be symmetric, at half the arithmetic: ``alpha * a @ b.mT + beta * c``.

    Only tiles on and below the diagonal are computed, and each is stored twice, so that the result
    equals its transpose bit for bit, whatever ``a @ b.mT`` is. `torchpar.matmul_t` is the case b =
    a. As in BLAS, a factor of 0 leaves its term out, whatever the operands hold.

    Args:
        a: ``(*, n, k)``; float16, bfloat16, float32 or float64. On CUDA, float32 follows
            `torch.backends.cuda.matmul.fp32_precision`, or `torchpar.fp32_products`.
        b: as ``a``, of its shape, dtype and device.
        c: ``(*, n, n)``, symmetric, of ``a``'s dtype and device, or None.
        alpha, beta: factors of the product and of ``c``.
            ``c`` needs ``beta``, and a ``beta`` other than 0 needs ``c``.
        check: compute all of the product in float64, and raise if the product or ``c`` is not
            symmetric up to the rounding of ``a``, ``b`` and ``c``. For debugging: it takes several
            times as long, and waits for the device. Ignored in compiled graphs and under torch.func
            transforms.
        out: where to put the result: ``(*, n, n)``, of ``a``'s dtype, or float32 for an ``a`` of
            float16 or bfloat16. It may be ``c``, to which the product is then added in place: from
            768 rows on no other matrix of this size is made. Without gradients, torch.func and
            DTensors.

    Returns:
        ``out``, or a new ``(*, n, n)``, contiguous, of ``a``'s dtype.

    Raises:
        RuntimeError: an unsupported dtype, shapes that do not fit, mixed dtypes or devices, ``c``
            without ``beta`` or a ``beta`` other than 0 without ``c``; with ``check``, a product or
            a ``c`` that is not symmetric; with ``out``, an argument that requires a gradient.
    """
    if check and not (torch.compiler.is_compiling() or is_transformed((a, b, c))):
        _check_operands(a, b, c, beta, out)
        # Unsharded, since a DTensor's shards need not be symmetric.
        with ordinary():  # products of float64, which torchpar.exact.mode refuses
            _check_symmetry(
                _unsharded(a), _unsharded(b), _unsharded(c) if c is not None and beta else None
            )
    precision = fp32.chosen
    if out is None and precision is not None:
        return _op_of_precision(  # type: ignore[no-any-return]
            a, b, c, alpha=alpha, beta=beta, precision=precision
        )
    if out is None and c is None and beta is None and alpha == 1:  # keywords take microseconds
        return _op(a, b)  # type: ignore[no-any-return]
    if out is None:
        return _op(a, b, c, alpha=alpha, beta=beta)  # type: ignore[no-any-return]
    _check_operands(a, b, c, beta, out)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (out, a, b, c)):
        raise RuntimeError(
            "symmetric_matmul(): functions with out=... arguments don't support automatic "
            "differentiation, but one of the arguments requires grad."
        )
    # PyTorch's products refuse such a tensor, for example the imaginary part of a conjugate.
    if not torch.compiler.is_compiling() and out.is_neg():
        resolved = out.resolve_neg()
        term = resolved if c is out else c
        symmetric_matmul(a, b, term, alpha=alpha, beta=beta, out=resolved)
        return out.copy_(resolved)
    if c is not None and c is not out and beta:
        out.copy_(c)
    _addmm_op(out, a, b, alpha=alpha, beta=beta or 0.0, precision=precision)
    return out


def _check_operands(
    a: Tensor, b: Tensor, c: Tensor | None, beta: float | None, out: Tensor | None = None
) -> None:
    check_dtype("symmetric_matmul", "a", a)
    if a.dim() < 2:
        raise RuntimeError(
            f"torchpar::symmetric_matmul: a has shape {tuple(a.shape)}, expected (*, n, k)"
        )
    symbolic = has_symbols(a, b, c)
    check_like("symmetric_matmul", "b", b, a.shape, "a", a, symbolic)
    if c is None and out is None and not beta:  # the rest takes longer than a small product
        return
    shape = (*a.shape[:-1], a.shape[-2])
    if out is not None:
        _check_out(out, a, shape, has_symbols(out, a))
    if c is not None:
        other, like = ("a", a) if out is None else ("out", out)
        check_like("symmetric_matmul", "c", c, shape, other, like, symbolic)
        if beta is None:
            raise RuntimeError("torchpar::symmetric_matmul: c is given without beta, pass both")
    elif beta:
        raise RuntimeError(
            f"torchpar::symmetric_matmul: beta is {beta} and c is None, pass both or neither"
        )


def _check_for_kernel(a: Tensor, b: Tensor, c: Tensor | None) -> None:
    """Check operands where a ``c`` that is given has a factor other than 0."""
    _check_operands(a, b, c, None if c is None else 1.0)


def _check_out(out: Tensor, a: Tensor, shape: tuple[int, ...], symbolic: bool) -> None:
    dtypes = [a.dtype, torch.float32] if a.dtype.itemsize == 2 else [a.dtype]

    def message() -> str:
        actual = f"out is {tuple(out.shape)}, {out.dtype} on {out.device}"
        expected = f"{shape}, {' or '.join(map(str, dtypes))} on {a.device}"
        return f"torchpar::symmetric_matmul: {actual}, expected {expected}"

    if symbolic or tuple(out.shape) != shape:
        check_alike(out.shape, shape, message)
    if out.dtype not in dtypes or out.device != a.device:
        raise RuntimeError(message())


def _unsharded(t: Tensor) -> Tensor:
    return t.full_tensor() if is_dtensor(t) else t


def _check_symmetry(a: Tensor, b: Tensor, c: Tensor | None) -> None:
    """Raise a RuntimeError where a @ b.mT, or c, is further from symmetric than rounding explains.

    Operands that result from a few operations carry a few rounding errors each. Eight rounding
    errors are allowed, which are 4·eps of ``|a| @ |b|.mT``, on either side of the diagonal. An
    operand that is much smaller than the terms of its sum carries larger errors, and is refused.
    """
    wide_a, wide_b = a.double(), b.double()
    parts = {"a @ b.mT": (wide_a @ wide_b.mT, wide_a.abs() @ wide_b.abs().mT)}
    if c is not None:
        parts["c"] = (c.double(), c.double().abs())
    of_sums = a.shape[-1] * torch.finfo(torch.float64).eps  # the rounding of the sums here
    explained = 4 * torch.finfo(a.dtype).eps + of_sums
    for name, (value, size) in parts.items():
        excess = (value - value.mT).abs() / (explained * (size + size.mT))
        excess = excess.nan_to_num(nan=0.0)  # from 0/0, and from values that are not finite
        worst = excess.amax().item() if excess.numel() else 0.0
        if worst > 1:
            raise RuntimeError(
                f"torchpar::symmetric_matmul: {name} is not symmetric: it differs from its "
                f"transpose by up to {worst:.3g} times what the rounding of its operands explains"
            )


def _formula(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float | None = None,
    precision: str | None = None,
) -> Tensor:
    _check_operands(a, b, c, beta)
    return product(a, b, c, alpha, beta or 0.0, precision=precision)


def _kernels() -> ModuleType:
    from torchpar.kernels import matmul_t

    return matmul_t


def _compute(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float | None = None,
    precision: str | None = None,
    wrap: Wrap,
) -> Tensor:
    if not runs_kernels(a, b):
        _check_operands(a, b, c, beta)
        return cpu.symmetric_matmul(a, b, c, alpha, beta or 0.0)
    from torchpar.kernels import matmul_t as kernel

    precision, is_native = fp32_precision(a, precision)
    if not alpha or (c is None) != (not beta):
        _check_operands(a, b, c, beta)
    beta = beta or 0.0
    out = None
    if alpha != 0:  # the kernel would compute 0·NaN
        out = kernel.symmetric_matmul(
            a,
            b,
            precision,
            wrap,
            c,
            alpha,
            beta,
            tma=wrap is None or supports_tma(wrap),
            only_if_faster=is_native and not is_emulating(),
            check=_check_for_kernel,
        )
    return kernel.mirror(product(a, b, c, alpha, beta), wrap) if out is None else out


_op, _op_of_precision = overloads(
    "symmetric_matmul(Tensor a, Tensor b, Tensor? c=None, *, float alpha=1.0, float? beta=None) "
    "-> Tensor",
    kernels=_kernels,
    flops=lambda a_shape, *args, **kwargs: cpu.symmetric_flops(a_shape),
    opaque=lambda a, *args, **kwargs: cpu.is_halved(a),
)(_compute)


def _symmetric_matmul_fake(
    a: Tensor, b: Tensor, c: Tensor | None = None, *, beta: float | None = None, **_: object
) -> Tensor:
    _check_operands(a, b, c, beta)
    return a.new_empty(*a.shape[:-1], a.shape[-2])


class _Context(Context, Protocol):
    alpha: float
    beta: float  # None without a C, of which no gradient is asked then
    precision: str | None


def _setup_context(
    ctx: _Context, inputs: tuple[Tensor, ...], keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.alpha, ctx.beta = keyword_only_inputs["alpha"], keyword_only_inputs["beta"]
    ctx.precision = keyword_only_inputs.get("precision")


def _backward(ctx: _Context, g: Tensor) -> tuple[Tensor | None, ...]:
    a, b = ctx.saved_tensors
    need_a, need_b, *need_c = ctx.needs_input_grad  # without an entry for a C that is not given
    da = ctx.alpha * product(g, b.mT, precision=ctx.precision) if need_a else None
    db = ctx.alpha * product(g.mT, a.mT, precision=ctx.precision) if need_b else None
    return da, db, ctx.beta * g if any(need_c) else None


def _symmetric_matmul_vmap(
    info: VmapInfo,
    in_dims: tuple[int | None, ...],
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    **keywords: Any,
) -> tuple[Tensor, int]:
    operands = list(zip((a, b, c), (*in_dims, None)[:3], strict=True))
    a1, b1, c1 = (t if t is None else sample(t, dim) for t, dim in operands)
    _check_operands(a1, b1, c1, keywords.get("beta"))  # type: ignore[arg-type]
    batched = [t if t is None else batch_first(t, dim, info.batch_size) for t, dim in operands]
    op = _op_of_precision if "precision" in keywords else _op
    return op(*batched, **keywords), 0


def _symmetric_matmul_sharding(
    a: Spec, b: Spec, c: Spec | None = None, **_: object
) -> list[Sharding]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    def rule(result: "Placement", operand: "Placement") -> Sharding:
        return [result], [operand, operand, None if c is None else result]

    batch = [rule(Shard(dim), Shard(dim)) for dim in range(a.ndim - 2)]
    return [rule(Replicate(), Replicate()), rule(Partial(), Shard(a.ndim - 1)), *batch]


for _each in (_op, _op_of_precision):
    _each.register_fake(_symmetric_matmul_fake)
    _each.register_autograd(_backward, setup_context=_setup_context, formula=_formula)
    _each.register_vmap(_symmetric_matmul_vmap)
    _each.register_autocast()
    _each.register_sharding(_symmetric_matmul_sharding)


# In place. Compilers do not look into the operator, since it writes to an operand.


@operator(
    "symmetric_addmm_(Tensor(a!) h, Tensor a, Tensor b, *, float alpha, float beta, "
    "str? precision=None) -> ()",
    kernels=_kernels,
    flops=lambda h_shape, a_shape, *args, **kwargs: cpu.symmetric_flops(a_shape),
    opaque=lambda *args, **kwargs: True,
)
def _addmm_op(
    h: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    alpha: float,
    beta: float,
    precision: str | None = None,
    wrap: Wrap,
) -> None:
    _check_operands(a, b, None, None, h)
    if (
        any(t.untyped_storage().data_ptr() == h.untyped_storage().data_ptr() for t in (a, b))
        and h.numel()
    ):
        raise RuntimeError(
            "torchpar::symmetric_matmul: out shares its storage with a or b, expected other memory"
        )
    if torch._debug_has_internal_overlap(h) == 1:
        raise RuntimeError(
            "torchpar::symmetric_matmul: elements of out share memory, expected separate elements"
        )
    if alpha == 0 or a.shape[-1] == 0 or h.numel() == 0:
        if beta == 0:
            h.zero_()
        else:
            cpu.mirror_(h.mul_(beta))
    elif not runs_kernels(h):
        cpu.symmetric_matmul(a, b, h, alpha, beta, h)
    elif not h.is_contiguous():
        h.copy_(_addmm_by_kernel(h.contiguous(), a, b, alpha, beta, precision))
    else:
        _addmm_by_kernel(h, a, b, alpha, beta, precision)


def _addmm_by_kernel(
    h: Tensor, a: Tensor, b: Tensor, alpha: float, beta: float, precision: str | None = None
) -> Tensor:
    from torchpar.kernels import matmul_t as kernel

    precision, is_native = fp32_precision(a, precision)
    operands = a, b, precision, None, h, alpha, beta
    out = kernel.symmetric_matmul(
        *operands,
        out=h,
        # The kernel by TMA would store the operands' dtype. It might load tiles of H that another
        # program has already stored.
        tma=False,
        # PyTorch's products have one dtype.
        only_if_faster=is_native and h.dtype == a.dtype and not is_emulating(),
    )
    return kernel.mirror(h.copy_(product(a, b, h, alpha, beta)), None) if out is None else out


@_addmm_op.register_fake
def _symmetric_addmm_fake(h: Tensor, a: Tensor, b: Tensor, **_: object) -> None:
    _check_operands(a, b, None, None, h)


_addmm_op.register_autocast(cast=False)
