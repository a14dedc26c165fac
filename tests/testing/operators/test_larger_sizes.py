# SPDX-License-Identifier: MIT
"""More elements than the samples have: how sizes grow, and what is said where they are refused."""

from collections.abc import Callable
from typing import Any

import faulty_operators as faulty
import pytest
import torch
from samples import normal
from torch import Tensor

from torchpar.library import custom_op
from torchpar.testing import check_operator
from torchpar.testing.operators.case import Case, Sample
from torchpar.testing.operators.rules.larger_sizes import LIMITS, Growth

SAMPLES = [(normal(5, 4), normal(6, 4, seed=1))]
ROWS = ["larger sizes", "infinities", "ties and zeros", "layouts and sizes", "fake tensors"]


def test_nothing_is_found_in_a_right_operator() -> None:
    table = check_operator(faulty.make("right_beyond"), SAMPLES, rules=ROWS)
    assert {row.outcome for row in table} == {"works"}, str(table)
    assert table["larger sizes"].detail == "up to 65536 elements"


def test_sizes_grow_together_and_are_odd() -> None:
    """Equal sizes stay equal; the largest tensor is little larger than the limit."""
    x, indices = normal(4, 3), torch.tensor([2, 0, 1])
    case = Case(torch.mul, None, torch.mul, Sample((x, indices)))
    for limit in LIMITS:
        larger, others = Growth(case, "all sizes", [3, 4]).operands(limit)
        assert larger.shape[1] == len(others)
        assert limit < larger.numel() < 1.3 * limit
        assert all(size % 2 for size in larger.shape)
        assert set(others.tolist()) == {0, 1, 2}  # what indices may be
        # Neither equal numbers, nor a block that repeats.
        assert len(larger.unique()) > 0.99 * larger.numel()
        assert bool((larger.abs() < 1.01 * x.abs().max()).all())


@pytest.mark.parametrize(
    "shapes, elements, grown",
    [
        (((4, 3),), 1024, ((32, 32),)),
        (((4, 3),), 4096, ((64, 64),)),
        (((2, 3, 5),), 1024, ((8, 8, 16),)),
        (((5, 4), (6, 4)), 4096, ((64, 64), (64, 64))),  # the result is the largest
        (((7,),), 4096, ((4096,),)),
        (((3, 3),), 1024, ((32, 32),)),
        (((3, 3, 3),), 1024, ((8, 8, 8),)),  # 512: no cube has 1024
        (((5, 1), (5, 4)), 1024, ((32, 1), (32, 32))),  # a size of 1 is broadcast
    ],
)
def test_sizes_grow_to_powers_of_two(shapes: Any, elements: int, grown: Any) -> None:
    operands = tuple(normal(*shape) for shape in shapes)

    def function(a: Tensor, *others: Tensor) -> Tensor:
        return faulty.kernel(a, *others) if shapes[-1] == (6, 4) else a

    case = Case(function, None, function, Sample(operands))
    sizes = sorted({size for t in operands for size in t.shape if size > 1})
    found = Growth(case, "all sizes", sizes).powers_of_two(elements)
    assert tuple(tuple(t.shape) for t in found) == grown


def up_to(most: int) -> Callable[..., Tensor]:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        if max(a.numel(), b.numel(), len(a) * len(b)) > most:
            raise ValueError(f"more than {most} elements")
        return faulty.kernel(a, b)

    return kernel


@pytest.mark.parametrize(
    "most, outcome, detail",
    [
        (8000, "works", "up to 4096 elements; all sizes, past 65536: eager mode refuses: "),
        (100, "not run", "all sizes: past 1024 elements: eager mode refuses: more than 100 elem"),
    ],
)
def test_an_operator_that_refuses_larger_sizes_is_not_wrong(
    most: int, outcome: str, detail: str
) -> None:
    op = faulty.make(f"up_to_{most}", kernel=up_to(most))
    (row,) = check_operator(op, SAMPLES, reference=faulty.kernel, rules="larger sizes").rows
    assert (row.outcome, row.detail.startswith(detail)) == (outcome, True), row


def pairs(x: Tensor) -> Tensor:
    return (x[:, None] - x).square().sum().reshape(1)


def looped(x: Tensor) -> Tensor:
    total = x.new_zeros(1)
    for one in x:
        total = total * 0.5 + one
    return total


@pytest.mark.parametrize(
    "reference, detail",
    [(pairs, "need a tensor of 1.7e+07 elements"), (looped, "operators")],
)
def test_a_reference_that_needs_too_much_is_asked_for_less(reference: Any, detail: str) -> None:
    """Squares of a long dimension, and loops over it."""
    (row,) = check_operator(reference, [(normal(5),)], reference=reference, rules=ROWS[0]).rows
    assert row.outcome == "works", row
    assert detail in row.detail


def test_samples_that_are_large_are_taken_as_they_are() -> None:
    x = normal(300, 300)
    case = Case(torch.exp, None, torch.exp, Sample((x,)))
    (larger,) = Growth(case, "every size of 300", [300]).operands(65536)
    assert larger is case.operands[0]


def of_two_rows(x: Tensor) -> Tensor:
    assert len(x) == 2
    return x.exp()


def test_a_reference_that_asserts_a_size_is_asked_for_others() -> None:
    (row,) = check_operator(of_two_rows, [(normal(2, 3),)], reference=of_two_rows, rules=ROWS[0])
    assert row.outcome == "works", row
    assert "the reference refuses twice the size: AssertionError" in row.detail


def test_an_operator_without_a_backward_has_right_values() -> None:
    op = custom_op("torchpar_faulty::forward", faulty.kernel, mutates_args=(), schema=faulty.SCHEMA)
    (row,) = check_operator(op, SAMPLES, reference=faulty.kernel, rules=ROWS[0])
    assert (row.outcome, row.detail) == ("works", "up to 65536 elements"), row
