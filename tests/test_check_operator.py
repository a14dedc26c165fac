# SPDX-License-Identifier: MIT
"""The table of an operator finds each fault of `faulty_operators`, and none in a right operator."""

from typing import Any

import faulty_operators as faulty
import pytest
import torch
from samples import normal
from torch import Tensor
from torch.distributed.tensor import Replicate

from torchpar import library
from torchpar.errors import ConfigError
from torchpar.testing import OperatorTable, Sample, check_operator
from torchpar.testing.rules import RULES

# PyTorch's compiler reads it.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

SAMPLES = [(normal(5, 4), normal(6, 4, seed=1))]


def outcomes(table: OperatorTable) -> dict[str, str]:
    return {row.rule: row.outcome for row in table.rows}


@pytest.fixture(scope="module")
def right() -> Any:
    return faulty.make("right")


@pytest.mark.parametrize("name", faulty.FAULTS)
def test_a_fault_is_found(name: str) -> None:
    parts, rule, detail = faulty.FAULTS[name]
    table = check_operator(faulty.make(name, **parts), SAMPLES, reference=faulty.kernel, rules=rule)
    assert (table[rule].outcome, detail in table[rule].detail) == ("wrong", True), str(table)


BY_FORMULA = ["forward mode", "vmap and gradients", *(one for one in RULES if one.startswith("torch.func"))]
EVERYWHERE = {  # the rules that one fault concerns
    "missing_gradient": [
        *("any of the gradients", "changes after the call", "batched gradients", "checkpoint"),
        *("tensor subclass", "torch.compile", "torch.compile, dynamic", "torch.compile by Inductor"),
    ],
    "formula": BY_FORMULA,
    "doubling_vmap": ["vmap over all operands", "vmap of vmap", "autocast"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERYWHERE)
def test_a_fault_is_found_by_every_rule_that_it_concerns(name: str) -> None:
    op = faulty.make(f"{name}_everywhere", **faulty.FAULTS[name][0])
    table = check_operator(op, SAMPLES, reference=faulty.kernel, rules=EVERYWHERE[name])
    assert set(outcomes(table).values()) == {"wrong"}, str(table)
    mended = faulty.make(f"{name}_everywhere")  # caches of compilers know the name
    table = check_operator(mended, SAMPLES, reference=faulty.kernel, rules=EVERYWHERE[name])
    assert set(outcomes(table).values()) <= {"works", "falls back"}, str(table)


def test_a_function_that_forgets_the_subclass_or_the_mode_is_wrong() -> None:
    def add(a: Tensor, b: Tensor) -> Tensor:
        return torch.add(*(getattr(t, "a", t) for t in (a, b))).requires_grad_()

    table = check_operator(add, [(normal(3), normal(3))], rules=["tensor subclass", "grad modes"])
    assert set(outcomes(table).values()) == {"wrong"}, str(table)


def test_nothing_is_found_in_a_right_operator(right: Any) -> None:
    expected = dict.fromkeys(RULES, "works") | dict.fromkeys(BY_FORMULA, "falls back")
    if not torch.cuda.is_available():
        expected["CUDA graph"] = "not run"
    table = check_operator(right, SAMPLES, reference=faulty.kernel)
    assert outcomes(table) == expected, str(table)
    assert table.ok
    assert "5 of 16 placements" in table["DTensor"].detail
    assert table["torch.export, save and load"].detail == "the graph holds the operator"


LIST = Sample([[normal(3, 4), normal(2, 4, seed=1)]])
KEYWORD = Sample([normal(3, 4), torch.arange(4)], {"alpha": 2})


@pytest.mark.parametrize(
    "op, sample, reference",
    [
        (torch.ops.aten.cat.default, LIST, torch.vstack),
        (torch.ops.aten.add.Tensor, KEYWORD, lambda x, y, alpha: x + alpha * y),
        (
            torch.ops.aten.linalg_slogdet.default,
            Sample([normal(3, 3)]),
            lambda x: (x.det().sign(), x.det().abs().log()),
        ),
    ],
)
def test_lists_integers_keywords_and_several_results(op: Any, sample: Sample, reference: Any) -> None:
    rules = ["values", "schema", "fake tensors", "gradcheck", "gradgradcheck", "any of the gradients"]
    table = check_operator(op, [sample], reference=reference, rules=rules)
    assert table.name == str(op)
    assert outcomes(table) == dict.fromkeys(rules, "works"), str(table)


def test_two_results() -> None:
    """Fakes that share memory are found. One result of DTensors may be unused (refused: pytorch#173123)."""
    schema = "(Tensor x) -> (Tensor, Tensor)"
    reference = lambda x: (2 * x, x + 1)  # noqa: E731
    op = library.custom_op("torchpar_tests::two", reference, mutates_args=(), schema=schema)
    op.register_fake(lambda x: (x.new_empty(x.shape),) * 2)
    op.register_autograd(lambda ctx, g, h: 2 * g + h)
    op.register_sharding(lambda x: [([Replicate()] * 2, [Replicate()])])
    table = check_operator(op, [(normal(3),)], reference=reference, rules=["fake tensors", "DTensor"])
    assert outcomes(table) == {"fake tensors": "wrong", "DTensor": "works"}, str(table)
    assert "share memory" in str(table)
    wrong = library.custom_op("torchpar_tests::misplaced", reference, mutates_args=(), schema=schema)
    wrong.register_sharding(lambda x: [([Replicate()] * 2, [Replicate()] * 2)])
    row = check_operator(wrong, [(normal(3),)], reference=reference, rules="DTensor")["DTensor"]
    assert "expected two lists, the placements of 2 results and of 1 tensors" in row.detail, str(row)


def test_reasons_for_which_a_rule_is_not_run(right: Any) -> None:
    def reason(op: Any, sample: tuple[Tensor, ...], rule: str) -> str:
        (row,) = check_operator(op, [sample], rules=[rule]).rows
        assert row.outcome == "not run"
        return row.detail

    integers = (torch.ones(3, 2).long(), torch.ones(3, 2).long())
    assert reason(right, integers, "low precision") == "no floating operand"
    single = (normal(3, 2).float(), normal(3, 2).float())
    assert reason(right, single, "gradcheck") == "operands have to be float64"
    assert reason(right, single, "torch.func: jvp") == "no reference"
    assert reason(torch.add, (normal(3), normal(3)), "schema") == "no operator was called"
    assert reason(torch.argmax, (normal(3),), "gradgradcheck") == "no differentiable result"


def test_the_worst_sample_is_shown(right: Any) -> None:
    samples = [*SAMPLES, (normal(5, 4), normal(6, 3)), (normal(5, 4), None)]
    table = check_operator(right, samples, rules="values")
    assert (table["values"].outcome, table["values"].sample) == ("crashes", 1)
    assert not table.ok  # a sample is what the operator takes
    assert "mat1 and mat2 shapes cannot be multiplied" in str(table)


@pytest.mark.parametrize(
    "op, samples, rules, message",
    [
        (torch.add, SAMPLES, ["value"], "rule 'value', expected one of 'values', "),
        (torch.add, [normal(3)], None, "expected samples"),
        (torch.ops.aten.add_.Tensor, SAMPLES, None, "aten.add_.Tensor writes to its operands"),
        ("add", SAMPLES, None, "the operator is an object of type str"),
    ],
)
def test_errors(op: Any, samples: Any, rules: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_operator(op, samples, rules=rules)
