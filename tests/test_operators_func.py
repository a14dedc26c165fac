# SPDX-License-Identifier: MIT
"""The operators under torch.func: every transform gives the same as with PyTorch's own operators."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from operators import BY_SMALL_CASE, FLOATS, OPERATORS, Shapes
from samples import assert_symmetric, normal, widest, widest_arguments
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.testing import assert_close

import torchpar

Function = Callable[..., Any]


def everything(args: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(range(len(args)))


def scalar(op: Function) -> Function:
    return lambda *args: op(*args).pow(3).sum()


def stacked(args: tuple[Tensor, ...], n: int = 2) -> tuple[Tensor, ...]:
    """A batch of n for every argument."""
    return tuple(torch.stack([arg + i / 4 for i in range(n)]) for arg in args)


def tangents(args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(normal(*arg.shape, seed=7).to(arg) for arg in args)


def _batch_of_cotangents(op: Function, args: tuple[Tensor, ...]) -> Any:
    y, pullback = vjp(op, *args)
    return vmap(pullback)(torch.stack([y, y.cos()]))


def _vmap_inside_autograd(op: Function, args: tuple[Tensor, ...]) -> Any:
    batch = tuple(arg.requires_grad_() for arg in stacked(args))
    return torch.autograd.grad(vmap(op)(*batch).pow(3).sum(), batch)


TRANSFORMS: dict[str, Callable[[Function, tuple[Tensor, ...]], Any]] = {
    "grad": lambda op, args: grad(scalar(op), everything(args))(*args),
    "jacrev": lambda op, args: jacrev(op, everything(args))(*args),
    "jacfwd": lambda op, args: jacfwd(op, everything(args))(*args),
    "hessian": lambda op, args: hessian(scalar(op), everything(args))(*args),
    "jacrev(jacfwd)": lambda op, args: jacrev(jacfwd(op, everything(args)), everything(args))(*args),
    "jvp": lambda op, args: jvp(op, args, tangents(args)),
    "jvp(jvp)": lambda op, args: jvp(lambda *a: jvp(op, a, tangents(args))[1], args, tangents(args)),
    "vmap(vjp)": _batch_of_cotangents,
    "vmap": lambda op, args: vmap(op)(*stacked(args)),
    "vmap(grad)": lambda op, args: vmap(grad(scalar(op), everything(args)))(*stacked(args)),
    "vmap(jvp)": lambda op, args: vmap(lambda *a: jvp(op, a, a))(*stacked(args)),
    "jacfwd(vmap)": lambda op, args: jacfwd(vmap(op), everything(args))(*stacked(args)),
    "hessian(vmap)": lambda op, args: hessian(scalar(vmap(op)))(*stacked(args)),
    "vmap(vmap(grad))": lambda op, args: vmap(vmap(grad(scalar(op))))(*stacked(stacked(args), 3)),
    "vmap, in autograd": _vmap_inside_autograd,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name, shapes", BY_SMALL_CASE, ids=str)
def test_transforms(name: str, shapes: Shapes, transform: str, device: str) -> None:
    args = widest_arguments(name, shapes, device)
    expected = TRANSFORMS[transform](OPERATORS[name].plain, args)
    assert_close(TRANSFORMS[transform](OPERATORS[name].op, args), expected)


BY_IN_DIMS = [(name, *case) for name, operator in OPERATORS.items() for case in operator.in_dims]


@pytest.mark.parametrize("name, in_dims, shapes", BY_IN_DIMS, ids=str)
def test_vmap_over_any_dimension_of_any_operand(
    name: str, in_dims: tuple[int | None, ...], shapes: Shapes, device: str
) -> None:
    args = widest_arguments(name, shapes, device, requires_grad=True)
    actual = vmap(OPERATORS[name].op, in_dims, out_dims=-1)(*args)
    expected = vmap(OPERATORS[name].plain, in_dims, out_dims=-1)(*args)
    assert_close(actual, expected)
    incoming = widest(name, *actual.shape, device=device, seed=9)
    assert_close(torch.autograd.grad(actual, args, incoming), torch.autograd.grad(expected, args, incoming))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_vmap_keeps_the_product_symmetric(dtype: torch.dtype, device: str) -> None:
    for shape in ((3, 129, 70), (2, 2, 600, 9)):
        x = normal(*shape, dtype=dtype, device=device)
        assert_symmetric(vmap(torchpar.matmul_t, in_dims=1)(x.movedim(0, 1)))


def test_vmap_of_maximum_promotes_as_each_sample_would(device: str) -> None:
    dtypes = (torch.bool, torch.int64, torch.bfloat16, torch.float64)
    for a_dtype, b_dtype in itertools.product(dtypes, dtypes):
        a, b = normal(5, 3, dtype=a_dtype, device=device), normal(5, dtype=b_dtype, device=device, seed=1)
        for args in ((a, b), (b, a)):
            samples = torch.stack([torch.maximum(*sample) for sample in zip(*args, strict=True)])
            assert_close(vmap(torchpar.maximum)(*args), samples, rtol=0, atol=0)


@pytest.mark.parametrize("in_dims", [(1, None, None), (0, 0, None), (None, None, 0)], ids=str)
def test_vmap_of_the_backward_of_maximum(in_dims: tuple[int | None, ...], device: str) -> None:
    args = [
        normal(*(shape if dim is None else (*shape[:dim], 5, *shape[dim:])), device=device)
        for dim, shape in zip(in_dims, ((3, 4), (3, 4), (4,)), strict=True)
    ]

    def gradients(g: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        share = torch.where(a == b, g / 2, g)
        return share.masked_fill(a < b, 0), share.masked_fill(b < a, 0)

    actual = vmap(torch.ops.torchpar.maximum_backward, in_dims)(*args)
    assert_close(actual, vmap(gradients, in_dims)(*args), rtol=0, atol=0)
