# SPDX-License-Identifier: MIT
"""Rules of `vmap`, alone and with derivatives."""

from collections.abc import Callable
from functools import partial

import torch
from torch.func import grad, jvp, vjp, vmap

from torchpar.testing.operators.attempts import Attempts, AttemptsAndRemark
from torchpar.testing.operators.case import Case
from torchpar.testing.operators.rules.torch_func import forward_jacobian, hessian_of_scalar, scalar
from torchpar.testing.operators.tensors import Function, Tensors, cast, rolled


def _looped(f: Function) -> Function:
    """The result of `vmap`, by a loop."""
    return lambda *batches: tuple(
        map(torch.stack, zip(*(f(*one) for one in zip(*batches, strict=True)), strict=True))
    )


def _vmap(case: Case, in_dims: tuple[int | None, ...], size: int = 3) -> None:
    with_dims = list(zip(case.operands, in_dims, strict=True))
    batches = [
        torch.stack([t if dim is None else rolled(t, k) for k in range(size)])
        for t, dim in with_dims
    ]
    expected = _looped(case.plain)(*batches)
    given = [
        t if dim is None else b.movedim(0, dim)
        for b, (t, dim) in zip(batches, with_dims, strict=True)
    ]

    def exact() -> Tensors:
        return _looped(case.plain)(*cast(tuple(batches), torch.float64))

    case.close(vmap(case.op, in_dims)(*given), expected, exact)
    last = [y.movedim(0, -1) for y in expected]
    case.close(
        vmap(case.op, in_dims, out_dims=-1)(*given),
        last,
        lambda: [y.movedim(0, -1) for y in exact()],
    )
    case.expect_call(lambda: vmap(case.op, in_dims)(*given))


def over_one_operand(case: Case) -> AttemptsAndRemark:
    for i, t in enumerate(case.operands):
        for dim in range(t.dim() + 1):
            in_dims = tuple(dim if i == j else None for j in range(len(case.operands)))
            yield f"in_dims {in_dims}", partial(_vmap, case, in_dims)
            if dim == 0:
                yield f"in_dims {in_dims}, a batch of 1", partial(_vmap, case, in_dims, 1)
    keys = ("FuncTorchBatched", "FuncTorchBatchedDecomposition", "CompositeImplicitAutograd")
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    if case.overload is not None and not any(has_kernel(case.overload.name(), key) for key in keys):
        return "a loop over the samples: no rule"
    return ""


def over_all_operands(case: Case) -> Attempts:
    count = len(case.operands)
    for in_dims in ((0,) * count, (-1,) * count, tuple(-(i % 2) for i in range(count))):
        yield f"in_dims {in_dims}", partial(_vmap, case, in_dims)
        yield f"in_dims {in_dims}, a batch of 1", partial(_vmap, case, in_dims, 1)


def of_vmap(case: Case) -> None:
    rows = [[[rolled(t, 2 * i + j) for j in range(2)] for i in range(3)] for t in case.operands]
    batches = [torch.stack([torch.stack(row) for row in of_operand]) for of_operand in rows]
    looped = _looped(_looped(case.plain))
    wide = cast(tuple(batches), torch.float64)
    case.close(vmap(vmap(case.op))(*batches), looped(*batches), lambda: looped(*wide))
    case.expect_call(lambda: vmap(vmap(case.op))(*batches))


OF_BATCHES: dict[str, Callable[[Function, Tensors], object]] = {
    "vmap of jvp": lambda f, xs: vmap(lambda *x: jvp(f, x, tuple(t.cos() for t in x)))(*xs),
    "vmap of vjp": lambda f, xs: vmap(lambda *x: vjp(f, *x)[1](f(*x)))(*xs),
    "jacfwd of vmap": lambda f, xs: forward_jacobian(vmap(f), xs),
    "hessian of vmap": lambda f, xs: hessian_of_scalar(vmap(f), xs),
    "vmap of vmap of grad": lambda f, xs: vmap(vmap(grad(scalar(f))))(
        *(torch.stack([x, x]) for x in xs)
    ),
    "vmap of grad": lambda f, xs: vmap(grad(scalar(f), tuple(range(len(xs)))))(*xs),
    "gradients of vmap": lambda f, xs: torch.autograd.grad(
        scalar(vmap(f))(*xs), xs, materialize_grads=True
    ),
}


def _of_batches(f: Function, case: Case, nested: Callable[[Function, Tensors], object]) -> object:
    rolls = [[rolled(t, k) for k in range(3)] for t in case.floating]
    return nested(f, tuple(torch.stack(of_operand).requires_grad_() for of_operand in rolls))


def and_gradients(case: Case) -> Attempts:
    for name, nested in OF_BATCHES.items():
        yield name, partial(case.transformed, _of_batches, nested=nested)
