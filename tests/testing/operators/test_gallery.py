# SPDX-License-Identifier: MIT
"""The operators of examples/operators: right where PyTorch's own decorators leave a gap."""

import pytest
import softmax
import torch
import triton.language as tl
from gallery import OPERATORS, PAGE, check, page

from nogpu import check_kernel
from torchpar.testing import Row, check_operator

# PyTorch's own: a fake tensor's .item() in make_fx, and the export of 2.11.
pytestmark = pytest.mark.filterwarnings("ignore")

RIGHT = ("works", "not run", "falls back")
GAPS = (
    "forward mode",
    "torch.func: vjp",
    "torch.func: jvp",
    "torch.func: hessian",
    "vmap and gradients",
)


@pytest.mark.parametrize("name", OPERATORS)
def test_what_pytorchs_decorators_lack_works(name):
    before, after = check(name, ["values", *GAPS])
    assert after["values"].outcome == "works"
    for rule in GAPS:
        assert (before[rule].outcome in ("wrong", "refuses"), after[rule].outcome) == (
            True,
            "works",
        )


@pytest.mark.slow
def test_every_rule_holds_or_has_an_explained_refusal_and_the_page_is_current():
    tables = {name: check(name) for name in OPERATORS}  # before and after, by all rules
    for name, (_, after) in tables.items():
        refused = {(name, row.rule) for row in after.rows if row.outcome not in RIGHT}
        assert refused == {(name, "DTensor")} & {("roi_align", "DTensor")}, str(after)
        assert all(after[rule].outcome == "refuses" for _, rule in refused)
    assert PAGE.read_text() == page(tables)


@pytest.mark.parametrize("wide", [tl.float64, tl.float32])
def test_the_kernel_computes_the_same(wide):
    x = torch.randn(5, 13, dtype=torch.float64 if wide == tl.float64 else torch.float32)
    found = check_kernel(
        softmax.softmax_kernel,
        (5,),
        (x, torch.empty_like(x), 13, wide, 16),
        lambda x_ptr, y_ptr, *_: {"y_ptr": softmax.reference(x_ptr)},
    )
    assert found.ok, found
    assert found["values"].outcome == "works"


def check_interpreted() -> list[Row]:
    from triton.runtime.interpreter import InterpretedFunction

    assert isinstance(softmax.softmax_kernel, InterpretedFunction)
    rules = ["values", "same bits twice", "layouts and sizes", "gradcheck", "torch.func: jvp"]
    return check_operator(
        softmax.after, softmax.samples(), reference=softmax.reference, rules=rules
    ).rows


@pytest.mark.slow
def test_the_operator_by_its_kernel_computes_the_same(interpreter):
    assert {row.outcome for row in interpreter(check_interpreted)} == {"works"}
