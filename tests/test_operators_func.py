# SPDX-License-Identifier: MIT
"""The operators under torch.func: every transform gives the same as with PyTorch's own operators."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from operators import FLOATS, OPERATORS, Shapes
from samples import assert_symmetric, normal, widest, widest_arguments
from torch.func import vmap
from torch.testing import assert_close

import torchpar

Function = Callable[..., Any]


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
