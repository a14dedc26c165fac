# SPDX-License-Identifier: MIT
"""The tables of our operators: nothing is wrong, crashes, or is refused without a known reason."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import widest_arguments
from torch import Tensor

from benchmarks.records import OPERATORS
from benchmarks.records.record import Shapes
from torchpar.testing import check_operator
from torchpar.testing.operators.rules import RULES

# PyTorch's compiler reads it.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

README = (Path(__file__).parents[2] / "README.md").read_text()
# test_operators_compile.py compiles them by Inductor.
CHOSEN = [name for name in RULES if name != "torch.compile by Inductor"]
NOT_RUN = {"gradcheck", "gradgradcheck"}  # in float32
if not torch.cuda.is_available():
    NOT_RUN.add("CUDA graph")
# Its result is a view, which may not be changed in place.
REFUSED = {("exact_matmul", "changes after the call")}


def of_symmetric(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of any A and C, because `symmetric_matmul` is one of operands with a symmetric
    product."""

    def product(a: Tensor, c: Tensor) -> Any:
        return function(a, a * 2, c + c.mT, alpha=-2.5, beta=1 / 3)

    return product


WITHOUT_RANKS = [rule for rule in CHOSEN if rule != "DTensor"]
RUNS = [
    pytest.param(slice(1), id="a sample"),
    pytest.param(slice(1, None), id="other samples", marks=pytest.mark.slow),
]


# The first sample of another operator tries the same by default.
LIKE_OTHERS = ("exact_matmul", "symmetric_matmul", "linear_sigmoid", "maximum")


@pytest.mark.parametrize("chosen", RUNS)
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in LIKE_OTHERS)) for name in OPERATORS],
)
def test_nothing_is_wrong(name: str, chosen: slice, device: str) -> None:
    operator = OPERATORS[name]
    op, reference = operator.overload, operator.native
    samples = [widest_arguments(name, shapes, device) for shapes in operator.small]
    if name == "symmetric_matmul":
        op, reference = of_symmetric(op), of_symmetric(reference)
        samples = [
            widest_arguments(name, shapes, device)
            for shapes in (((4, 3), (4, 4)), ((2, 3, 5), (2, 3, 3)))
        ]
    table = check_operator(op, samples[chosen], reference=reference, rules=WITHOUT_RANKS)
    assert table.ok, str(table)
    refused = {(name, row.rule) for row in table.rows if row.outcome == "refuses"}
    assert refused <= REFUSED, str(table)
    assert {row.rule for row in table.rows if row.outcome == "not run"} <= NOT_RUN, str(table)
    assert table["torch.export, save and load"].detail == "the graph holds the operator"
    printed = readme(name) if device == "cpu" else {}
    for row in table.rows:
        if row.rule in printed:
            assert printed[row.rule] == row.outcome


@pytest.mark.parametrize(
    "name, shapes",
    [
        pytest.param(
            name,
            shapes,
            # Placements of two and three operands take seconds.
            marks=[pytest.mark.slow] * (shapes != operator.small[0] or name != "matmul_t"),
        )
        for name, operator in OPERATORS.items()
        for shapes in operator.small
    ],
    ids=str,
)
def test_every_placement(name: str, shapes: Shapes) -> None:
    operator = OPERATORS[name]
    op, native = (
        partial(f, **operator.factors(len(shapes))) for f in (operator.overload, operator.native)
    )
    operands = operator.operands(*widest_arguments(name, shapes))
    (row,) = check_operator(op, [operands], reference=native, rules="DTensor").rows
    assert row.outcome == readme(name)["DTensor"] == "works", row
    if shapes == operator.small[0]:
        assert row.detail.startswith(f"{operator.local} of ")


def readme(name: str) -> dict[str, str]:
    """The outcomes of the rules in an operator's column of the README's table."""
    (table,) = re.findall(r"^\| \| `maximum`.*\n(?:\|.*\n)+", README, re.MULTILINE)
    rows = [[cell.strip(" `") for cell in line.split("|")] for line in table.splitlines()]
    column = rows[0].index(name)
    return {row[1]: row[column] for row in rows if row[1] in CHOSEN}
