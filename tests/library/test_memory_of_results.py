# SPDX-License-Identifier: MIT
"""A kernel's result may not have the memory of an argument or of another result."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import torchpar

NAMES = (f"memory_tests::op{i}" for i in itertools.count())
X = torch.linspace(1, 2, 4)
SPARSE = X.to_sparse()


def twice(x: Tensor) -> list[Tensor]:
    y = x.clone()
    return [y, y[1:]]


@pytest.mark.parametrize(
    "function, schema, args, shares",
    [
        (lambda x: 2 * x, "(Tensor x) -> Tensor", (X,), False),
        (lambda x: x[1:], "(Tensor x) -> Tensor", (X,), True),
        (lambda x: x.detach(), "(Tensor x) -> Tensor", (X,), True),
        (lambda x, y: y.view(2, 2), "(Tensor x, Tensor y) -> Tensor", (X, 2 * X), True),
        (lambda x, y: x + y[0], "(Tensor x, Tensor[] y) -> Tensor", (X, [X, 2 * X]), False),
        (lambda x, y: y[1][:2], "(Tensor x, Tensor[] y) -> Tensor", (X, [X, 2 * X]), True),
        (lambda x: (2 * x, 3 * x), "(Tensor x) -> (Tensor, Tensor)", (X,), False),
        (lambda x: tuple(twice(x)), "(Tensor x) -> (Tensor, Tensor)", (X,), True),
        (twice, "(Tensor x) -> Tensor[]", (X,), True),
        (lambda x: [2 * x, 3 * x], "(Tensor x) -> Tensor[]", (X,), False),
        (lambda x, y: y.to_dense(), "(Tensor x, Tensor y) -> Tensor", (X, SPARSE), False),
        (lambda x, y: x[:2], "(Tensor x, Tensor y) -> Tensor", (X, SPARSE), True),
        (lambda x: x.to_sparse(), "(Tensor x) -> Tensor", (X,), False),
    ],
)
def test_results_that_share_memory_are_refused(
    function: Callable[..., Any], schema: str, args: tuple[Any, ...], shares: bool
) -> None:
    op = torchpar.library.custom_op(next(NAMES), function, mutates_args=(), schema=schema)
    if shares:
        with pytest.raises(RuntimeError, match="may not alias any inputs or another result"):
            op(*args)
    else:
        found, expected = op(*args), function(*args)
        pairs = (
            zip(found, expected, strict=True)
            if isinstance(found, list | tuple)
            else [(found, expected)]
        )
        for one, other in pairs:
            assert torch.equal(one.to_dense(), other.to_dense())
