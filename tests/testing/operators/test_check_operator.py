# SPDX-License-Identifier: MIT
"""The table of an operator finds each fault of `faulty_operators`, and none in a right operator."""

import ctypes
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import faulty_operators as faulty
import pytest
import torch
import torch.distributed as dist
from commands import forked
from samples import normal
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard

from torchpar import console, library
from torchpar.errors import ConfigError
from torchpar.testing import OperatorTable, Row, Sample, check_operator
from torchpar.testing.operators import command_line
from torchpar.testing.operators.attempts import OutcomeException
from torchpar.testing.operators.compare import accurate, close
from torchpar.testing.operators.rules import OF_DERIVATIVES, RULES

# PyTorch's compiler reads it.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

GRADIENTS = faulty.GRADIENTS
SAMPLES = [(normal(5, 4), normal(6, 4, seed=1))]
NO_FORMULA = (
    "FlopCounterMode counts 0 operations for it; register_flops of torchpar.library, or "
    "triton_op(…, flops=…), takes a formula"
)


def outcomes(table: OperatorTable) -> dict[str, str]:
    return {row.rule: row.outcome for row in table.rows}


@pytest.fixture(scope="module")
def right() -> Any:
    return faulty.make("right")


@pytest.mark.parametrize("name", faulty.FAULTS)
def test_a_fault_is_found(name: str) -> None:
    parts, rule, detail = faulty.FAULTS[name]
    samples = [faulty.SAMPLES.get(name, SAMPLES[0])]
    reference = (
        parts.get("formula", faulty.kernel) if name in ("ties", "one_dtype") else faulty.kernel
    )
    table = check_operator(faulty.make(name, **parts), samples, reference=reference, rules=rule)
    assert (table[rule].outcome, detail in table[rule].detail) == ("wrong", True), str(table)


def fake_that_compares_shapes(a: Tensor, b: Tensor) -> Tensor:
    """As `torchpar.maximum` compared them up to version 0.5.0."""
    return torch.empty_like(a if a.shape == b.shape else torch.broadcast_tensors(a, b)[0])


def fake_of_any_shapes(a: Tensor, b: Tensor) -> Tensor:
    return torch.empty_like(torch.maximum(a, b))


OF_SIZES = ["torch.compile, each size dynamic", "torch.compile, data-dependent sizes"]
AGAIN = "it is compiled again for other sizes than: size 0 of operand 0 != 4 ("
FIXES = "it fixes a dynamic size: You marked size 0 of operand 0 as dynamic"
ASKS = "it asks for a size that depends on data: Could not guard on data-dependent expression"


@pytest.mark.parametrize(
    "shapes, fake, expected",
    [
        # The rows happen to be as many as the columns: in a later call, or in the first.
        pytest.param(
            ((5, 4), (4,)),
            fake_that_compares_shapes,
            (("wrong", AGAIN), ("refuses", ASKS)),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ((4, 4), (4,)),
            fake_that_compares_shapes,
            (("refuses", FIXES), ("refuses", ASKS)),
            marks=pytest.mark.slow,
        ),
        (((5, 4), (4,)), fake_of_any_shapes, (("works", "3 choices"), ("works", "5 choices"))),
    ],
)
def test_an_operator_that_compares_sizes_is_found(
    shapes: Any, fake: Any, expected: Any, request: pytest.FixtureRequest
) -> None:
    op = faulty.make(f"sizes_{abs(hash(request.node.name))}", **faulty.MAXIMUM | {"fake": fake})
    samples = [tuple(normal(*shape, seed=i) for i, shape in enumerate(shapes))]
    table = check_operator(op, samples, reference=torch.maximum, rules=OF_SIZES)
    for row, (outcome, detail) in zip(table.rows, expected, strict=True):
        assert (row.outcome, detail in row.detail) == (outcome, True), str(table)


BY_FORMULA = [
    "forward mode",
    "vmap and gradients",
    *(one for one in RULES if one.startswith("torch.func")),
]
EVERYWHERE = {  # the rules that one fault concerns
    "missing_gradient": [
        *("any of the gradients", "changes after the call", "batched gradients", "checkpoint"),
        *(
            "tensor subclass",
            "torch.compile",
            "torch.compile, dynamic",
            "torch.compile by Inductor",
        ),
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


@pytest.mark.slow  # by default nothing is found in ours: tests/ops/test_our_operators.py
def test_nothing_is_found_in_a_right_operator(right: Any) -> None:
    expected = dict.fromkeys(RULES, "works") | dict.fromkeys(BY_FORMULA, "falls back")
    if not torch.cuda.is_available():
        expected["CUDA graph"] = "not run"
    table = check_operator(right, SAMPLES, reference=faulty.kernel)
    assert outcomes(table) == expected, str(table)
    assert table.ok
    assert "5 of 16 placements" in table["DTensor"].detail
    assert table["torch.export, save and load"].detail == "the graph holds the operator"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["complex_gradient", "channels_last"])
def test_nothing_is_found_in_a_right_operator_of(name: str, right: Any) -> None:
    """Complex operands, and those of four dimensions."""
    rules = [
        one for one in RULES if one not in ("torch.compile by Inductor", "CUDA graph", "DTensor")
    ]
    table = check_operator(right, [faulty.SAMPLES[name]], reference=faulty.kernel, rules=rules)
    assert set(outcomes(table).values()) <= {"works", "falls back", "not run"}, str(table)
    skipped = {row.rule for row in table.rows if row.outcome == "not run"}
    of_real = {"torch.func: jacrev", "torch.func: jacfwd", "torch.func: hessian"}
    assert skipped == (of_real if name == "complex_gradient" else set()), str(table)


DERIVATIVES = [
    *(
        "values",
        "layouts and sizes",
        GRADIENTS,
        "forward mode",
        "torch.func: vjp",
        "torch.func: jvp",
    ),
    *("torch.func: jvp of jvp", "vmap over all operands", "vmap of vmap"),
]


def test_float64_is_compared_with_the_reference() -> None:
    """No result is more exact, against which both could be judged."""
    one = torch.ones(2, dtype=torch.float64)
    accurate([one], [one], [one])
    with pytest.raises(OutcomeException):
        accurate([one + 1e-4], [one], [one + 1e-4])


def test_a_tolerance_follows_the_length_of_sums() -> None:
    """float32 sums of 2,000 terms, in another order; a relative error of 1e-4 is found."""
    operands = (normal(4, 2000).float(), normal(3, 2000, seed=1).float())
    exact = torch.ops.torchpar.exact_matmul.default
    table = check_operator(exact, [operands], reference=faulty.kernel, rules=DERIVATIVES)
    assert set(outcomes(table).values()) == {"works"}, str(table)
    (row,) = check_operator(
        exact, [operands], reference=faulty.kernel, rules="torch.func: hessian"
    ).rows
    assert row.detail == "14000² derivatives, expected at most 2²⁴ numbers; take a smaller sample"

    def inexact(a: Tensor, b: Tensor) -> Any:
        return exact(a, b) * (1 + 1e-4)

    table = check_operator(inexact, [operands], reference=faulty.kernel, rules=DERIVATIVES)
    assert set(outcomes(table).values()) == {"wrong"}, str(table)


def in_one_chain(a: Tensor, b: Tensor) -> Tensor:
    """a·bᵀ as a plain loop computes it: term after term."""
    total = a.new_zeros(len(a), len(b))
    for x, y in zip(a.mT, b.mT, strict=True):
        total = torch.addcmul(total, x[:, None], y)
    return total


def in_blocks(a: Tensor, b: Tensor) -> Any:
    pairs = zip(a.split(500, -1), b.split(500, -1), strict=True)
    return sum(x @ y.mT for x, y in pairs)


def in_pairs(a: Tensor, b: Tensor) -> Tensor:
    terms = a[:, None] * b
    while terms.shape[-1] > 1:
        terms = nn.functional.pad(terms, (0, terms.shape[-1] % 2))
        terms = terms[..., ::2] + terms[..., 1::2]
    return terms.sum(-1)


@pytest.mark.parametrize("op, terms", [(in_one_chain, 500), (in_blocks, 2000), (in_pairs, 2000)])
def test_a_sum_in_another_order_is_right(op: Any, terms: int) -> None:
    """Where all terms are equal, PyTorch's own sum has no error in some layouts."""
    operands = (normal(4, terms).float(), normal(3, terms, seed=1).float())
    table = check_operator(
        op, [operands], reference=faulty.kernel, rules=["values", "layouts and sizes"]
    )
    assert table.ok, str(table)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sum_in_16_bits_is_wrong(dtype: torch.dtype) -> None:
    def in_float32(a: Tensor, b: Tensor) -> Tensor:
        return in_one_chain(a.float(), b.float()).to(dtype)

    operands = (normal(4, 2000).to(dtype), normal(3, 2000, seed=1).to(dtype))
    for op, outcome in ((in_one_chain, "wrong"), (in_float32, "works")):
        (row,) = check_operator(op, [operands], reference=faulty.kernel, rules="values").rows
        assert row.outcome == outcome, row


@pytest.mark.parametrize(
    "op, operands",
    [
        # Sums of 16 terms, of a large batch, beside a bias of zeros.
        (
            lambda x, w, b: nn.functional.linear(x, w, b),
            (normal(50000, 16), normal(8, 16, seed=1), torch.zeros(8)),
        ),
        (torch.exp, (torch.ones(20000),)),
        (torch.mul, (torch.ones(300000), normal(300000))),
    ],
)
def test_an_error_of_1e_4_is_wrong(op: Any, operands: tuple[Tensor, ...]) -> None:
    operands = tuple(t.float() for t in operands)
    (row,) = check_operator(
        lambda *args: op(*args) * (1 + 1e-4), [operands], reference=op, rules="values"
    ).rows
    assert row.outcome == "wrong", row


def test_wrong_integers_and_sums_of_sparse_operands_are_wrong() -> None:
    x = normal(3, 4)
    for op, wrong in (
        (lambda x: x.argmax(-1), lambda x: x.argmax(-1) + 1),
        (lambda x: x.to_sparse().sum().float(), lambda x: x.to_sparse().sum().float() * 1.01),
    ):
        (row,) = check_operator(wrong, [(x,)], reference=op, rules="values").rows
        assert row.outcome == "wrong", row


def test_there_is_nothing_wider_than_float64() -> None:
    wide = (normal(4, 2000), normal(3, 2000, seed=1))
    table = check_operator(in_blocks, [wide], reference=faulty.kernel, rules="autocast")
    assert table.ok, str(table)


@pytest.mark.parametrize("name", ["default_dtype", "deterministic_mode", "threads"])
def test_settings_are_seen_without_a_reference(name: str) -> None:
    """The operator itself is then no excuse for other results."""
    alone: Any = {"formula": None}
    op = faulty.make(f"{name}_alone", **faulty.FAULTS[name][0] | alone)
    (row,) = check_operator(op, SAMPLES, rules="global settings").rows
    assert row.outcome == "wrong", row
    right = faulty.make("right_alone", **alone)
    (row,) = check_operator(right, SAMPLES, rules="global settings").rows
    assert row.outcome == "works", row


def test_a_gradient_that_differs_in_one_call_of_ten_is_wrong() -> None:
    calls = itertools.count()

    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        da, db = faulty.backward(ctx, g)
        return da * (1 + 1e-12 * (next(calls) % 10 == 9)), db

    op = faulty.make("gradient_of_one_call", backward=backward)
    (row,) = check_operator(op, SAMPLES, reference=faulty.kernel, rules="same bits twice").rows
    assert (row.outcome, "gradients" in row.detail) == ("wrong", True), row


def test_a_fake_may_ask_for_a_size() -> None:
    def fake(a: Tensor, b: Tensor) -> Tensor:
        return faulty.fake(a, b).contiguous() if b.shape[-2] == 6 else faulty.fake(a, b)

    table = check_operator(faulty.make("asking", fake=fake), SAMPLES, rules="fake tensors")
    assert table.ok, str(table)


def test_complex_products_are_right_in_a_subclass() -> None:
    """PyTorch's subclass of two tensors forgets that a tensor is conjugated."""
    operands = tuple(t.conj() for t in faulty.COMPLEX[:1] * 2)
    (row,) = check_operator(
        torch.mul, [operands], reference=torch.mul, rules="tensor subclass"
    ).rows
    assert row.outcome in ("works", "not run"), row
    wrong = lambda a, b: 2 * getattr(a, "a", a) * b  # noqa: E731  # a reference is a lambda
    (row,) = check_operator(
        wrong, SAMPLES_OF_ONE_SHAPE, reference=torch.mul, rules="tensor subclass"
    ).rows
    assert row.outcome != "works", row


SAMPLES_OF_ONE_SHAPE = [(normal(3), normal(3, seed=1))]


def test_a_missing_rule_of_sharding_is_named() -> None:
    @torch.library.custom_op("torchpar_faulty::unsharded", mutates_args=())
    def unsharded(x: Tensor) -> Tensor:
        return x.clone()

    unsharded.register_fake(torch.empty_like)
    sharded = library.custom_op(
        "torchpar_faulty::sharded", torch.clone, mutates_args=(), schema="(Tensor x) -> Tensor"
    )
    sharded.register_fake(torch.empty_like)
    sharded.register_autograd(lambda ctx, g: unsharded(g))
    sharded.register_sharding(lambda x: [([Replicate()], [Replicate()])])
    for op in (unsharded, sharded):  # forward, and in a backward
        row = check_operator(op, [(normal(3),)], rules="DTensor")["DTensor"]
        assert row.outcome == "refuses"
        way = "unsharded.default does not have a sharding strategy registered; register one by "
        assert f"{way}op.register_sharding of torchpar.library" in row.detail


def test_a_failed_process_group_is_not_taken_for_that_of_the_simulated_ranks() -> None:
    """PyTorch counts the group, and names the next group after the number."""
    for _ in range(2):
        table = check_operator(torch.abs, [(normal(3),)], reference=torch.abs, rules="DTensor")
        assert table["DTensor"].outcome == "works", str(table)
        with pytest.raises(dist.DistStoreError):  # the other rank does not come
            dist.init_process_group(
                "gloo",
                store=dist.HashStore(),
                rank=1,
                world_size=2,
                timeout=timedelta(milliseconds=10),
            )


def test_gaps_of_pytorch_are_no_faults_of_an_operator() -> None:
    """Its hessian of no numbers."""
    table = check_operator(
        torch.add, [(normal(0, 3), normal(0, 3))], reference=torch.add, rules=BY_FORMULA
    )
    assert set(outcomes(table).values()) <= {"works", "not run"}, str(table)


class DoublingSquare(torch.autograd.Function):
    """x², with twice the right derivative in forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 4 * ctx.saved_tensors[0] * tangent


def test_finite_differences_judge_where_the_derivative_of_the_reference_is_wrong() -> None:
    reference = DoublingSquare.apply
    (row,) = check_operator(
        torch.square, [(normal(3),)], reference=reference, rules="torch.func: jvp"
    ).rows
    assert row.outcome == "works", row
    wrong = lambda x: x * x.detach()  # noqa: E731  # likewise
    for x in (normal(3), normal(3).float()):
        (row,) = check_operator(
            torch.square, [(x,)], reference=reference, rules="torch.func: jvp"
        ).rows
        assert row.outcome == "works", row
        (row,) = check_operator(wrong, [(x,)], reference=reference, rules="torch.func: jvp").rows
        assert row.outcome == "wrong", row


def samples() -> list[tuple[Tensor, ...]]:
    return SAMPLES


def leave() -> None:
    sys.exit(0)


def fail() -> None:
    raise OSError("no data\nin sight")


def _command_in_process(*arguments: str, cwd: Path | str = "/") -> tuple[int, str, str]:
    """The status and the streams of the command, which runs the operator in a child process."""
    return forked("-m", "torchpar", "check", *arguments, cwd=cwd)


ALMOST = faulty.make("almost", fake=faulty.fake_of_numbers, backward=faulty.backward_without_b)


def test_the_command(capsys: Any) -> None:
    """The table, or JSON, and exit status 1 if a row is wrong."""
    here = f"{__name__}:"
    given = ["--samples", f"{here}samples", "--reference", "faulty_operators:kernel"]
    assert command_line.main([f"{here}ALMOST", *given, "--rules", "values", "schema"]) == 0
    expected = check_operator(ALMOST, SAMPLES, reference=faulty.kernel, rules=["values", "schema"])
    assert capsys.readouterr().out == f"{expected}\n"
    assert (
        command_line.main([f"{here}ALMOST", *given, "--rules", "values", "gradcheck", "--json"])
        == 1
    )
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["notes"]) == (False, [NO_FORMULA])
    assert [row["outcome"] for row in found["rows"]] == ["works", "wrong"]
    assert _command_in_process("torchpar", "--samples", f"{here}SAMPLES")[0] == 2


def tripled(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
    ga, gb = faulty.backward(ctx, g)
    return 3 * ga, gb


# Not contiguous, so that the row of values compares two layouts.
IN_FLOAT32 = [(normal(4, 5).float().mT, normal(4, 6, seed=1).float().mT)]
TRIPLED = faulty.make("tripled", backward=tripled, formula=None)
TRIPLED_WITH_A_FORMULA = faulty.make("tripled_with_a_formula", backward=tripled)
RIGHT_IN_FLOAT32 = faulty.make("right_in_float32", formula=None)


def to_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    def converted(*tensors: Tensor) -> Any:
        return function(*(t.float() for t in tensors)).to(tensors[0].dtype)

    return converted


# Right, but computed in float32, so that no difference is finite enough.
ROUNDED = faulty.make("rounded", kernel=to_float32(faulty.kernel), formula=None)
WITHOUT_BACKWARD = library.custom_op(
    "torchpar_faulty::no_backward",
    faulty.kernel,
    mutates_args=(),
    schema=faulty.SCHEMA,
)
FORWARD_ONLY = library.custom_op(
    "torchpar_faulty::forward_only",
    faulty.kernel,
    mutates_args=(),
    schema=faulty.SCHEMA,
)
FORWARD_ONLY.register_fake(faulty.fake)
FORWARD_ONLY.register_autocast()
MISSING = '; {}, or choose the rules "without gradients"'


@pytest.mark.parametrize(
    "operator, status, rows, last",
    [
        ("TRIPLED", 1, {"gradcheck": "wrong", GRADIENTS: "not run"}, ""),
        ("TRIPLED_WITH_A_FORMULA", 1, {"gradcheck": "wrong", GRADIENTS: "wrong"}, ""),
        ("RIGHT_IN_FLOAT32", 0, {"gradcheck": "works", GRADIENTS: "not run"}, ""),
        (
            "ROUNDED",
            1,
            {"values": "works", "gradcheck": "not run", GRADIENTS: "not run"},
            "no row compared a gradient (gradcheck: not run, the values of float64 are computed in "
            "a lower precision)" + MISSING.format("give a reference"),
        ),
        (
            "WITHOUT_BACKWARD",
            1,
            {"values": "works", "gradcheck": "refuses"},
            "no row compared a gradient (gradcheck: refuses, Trying to backward through "
            "torchpar_faulty::no_backward, but it has no backward)"
            + MISSING.format("register a backward"),
        ),
    ],
)
def test_samples_of_float32_do_not_hide_a_wrong_gradient(
    operator: str, status: int, rows: dict[str, str], last: str, capsys: Any
) -> None:
    """They are cast to float64, and the formula is the reference. What is not compared is said."""
    given = ["--samples", f"{__name__}:IN_FLOAT32", "--rules", "values", "gradcheck", GRADIENTS]
    assert command_line.main([f"{__name__}:{operator}", *given]) == status
    out = capsys.readouterr().out
    for row, outcome in rows.items():
        assert re.search(rf"^{row} +{outcome} ", out, re.MULTILINE), out
    if status == 0:
        assert "the samples are cast to float64" in out
    if last:
        assert out.splitlines()[-1] == last
    note = "the reference is the formula that the operator registers"
    assert (note in out) == (operator == "TRIPLED_WITH_A_FORMULA")


def test_an_operator_without_a_backward_is_ok_without_gradients(capsys: Any) -> None:
    """By one name, which the last line of a table with rows of gradients gives."""
    tried = ("values", "schema", "NaN", "gradcheck")  # the others take long
    with patch.dict(RULES, {name: lambda case: "" for name in RULES if name not in tried}):
        given = ["--samples", f"{__name__}:samples", "--reference", "faulty_operators:kernel"]
        given = [f"{__name__}:FORWARD_ONLY", *given, "--rules"]
        assert command_line.main([*given, "values", "gradcheck"]) == 1
        assert capsys.readouterr().out.endswith(MISSING.format("register a backward") + "\n")
        assert command_line.main([*given, "without gradients", "values", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        names = [row["rule"] for row in found["rows"]]
        assert names == [name for name in RULES if name not in OF_DERIVATIVES]
        assert {"gradcheck", "torch.func: jvp", "vmap and gradients"} <= {*OF_DERIVATIVES}
        # A wrong result is found there.
        wrong = faulty.make("wrong_forward", kernel=lambda a, b: 2 * faulty.kernel(a, b))
        rules = "without gradients"
        table = check_operator(wrong, SAMPLES, reference=faulty.kernel, rules=rules)
        assert table["values"].outcome == "wrong"


def test_samples_of_float32_may_lie_at_a_kink() -> None:
    """Where finite differences are half of what the reference has, too."""
    samples = [(torch.tensor([0.0, 1.0]),)]
    for op, outcome in ((torch.relu, "not run"), (lambda x: 2 * x - torch.relu(x), "wrong")):
        row = check_operator(op, samples, reference=torch.relu, rules="gradcheck")["gradcheck"]
        assert row.outcome == outcome, row
    table = check_operator(
        torch.relu, samples, reference=torch.relu, rules=["gradcheck", GRADIENTS]
    )
    assert table.ok, str(table)  # the other row has compared gradients


def test_a_table_that_compared_nothing_is_not_ok(capsys: Any) -> None:
    given = ["--samples", f"{__name__}:IN_FLOAT32", "--rules", "torch.func: jvp"]
    assert command_line.main([f"{__name__}:ROUNDED", *given, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["missing"]) == (False, "none of 1 rows compared a result")
    # An operator without gradients lacks none.
    rules = ["values", "gradcheck"]
    assert check_operator(torch.argmax, [(normal(3),)], reference=torch.argmax, rules=rules).ok


def test_an_operator_that_is_compared_with_itself_has_compared_nothing() -> None:
    """Without a reference other layouts alone differ from the call that they are compared with."""
    op = faulty.make("alone_beyond", kernel=faulty.kernel_with_a_limit(1024), formula=None)
    table = check_operator(op, SAMPLES, rules=["values", "larger sizes"])
    assert not table.ok
    assert table.missing.startswith("none of 2 rows compared a result")
    message = "no reference, and contiguous operands: the operator was compared with itself"
    assert [(row.outcome, row.detail) for row in table] == [
        ("not run", message),
        ("not run", "no reference"),
    ]
    strided = [tuple(t.mT.contiguous().mT for t in SAMPLES[0])]
    assert check_operator(op, strided, rules="values").ok
    table = check_operator(op, SAMPLES, reference=faulty.kernel, rules=["values", "larger sizes"])
    assert [row.outcome for row in table] == ["works", "wrong"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["none.ops:op", "--samples", "{here}:samples"],
            "none.ops:op: ModuleNotFoundError: No module named 'none'; run the command in the "
            "folder that has none, or let PYTHONPATH name the folder",
        ),
        (
            ["faulty_operators.py:kernel", "--samples", "{here}:samples"],
            "name the module faulty_operators, without .py",
        ),
        (
            ["torch:mathmul", "--samples", "{here}:samples"],
            "has no attribute 'mathmul'; name an object that torch defines, such as matmul",
        ),
        (["broken:op", "--samples", "{here}:samples"], "'missing'; install what broken imports"),
        (
            ["ended:op", "--samples", "{here}:samples"],
            "sys.exit(3); mend ended, which has to be imported without an error",
        ),
        (
            ["torch:none", "--samples", "{here}:samples"],
            "torch:none: AttributeError: module 'torch' has no",
        ),
        (
            ["torch", "--samples", "{here}:samples"],
            "'torch', expected MODULE:ATTRIBUTE, such as mylib.ops:op",
        ),
        (
            ["mylib::op", "--samples", "{here}:samples"],
            "'mylib::op', expected MODULE:ATTRIBUTE, such as mylib.ops:op",
        ),
        (["torch:add"], "the following arguments are required: --samples"),
        (
            ["torch:add", "--samples", "builtins:list"],
            "expected samples: objects of torchpar.testing.Sample",
        ),
        (
            ["torch:add", "--samples", "math:pi"],
            "the samples are an object of type float, expected a list",
        ),
        (["torch:add", "--samples", "{here}:fail"], "fail: OSError: no data"),
        (["torch:add", "--samples", "{here}:leave"], "leave: it calls sys.exit(0)"),
        (["torch:pi", "--samples", "{here}:samples"], "the operator is an object of type float"),
        (
            ["json:dumps", "--samples", "{here}:samples"],
            "dumps calls no operator on the first sample and raises TypeError: ",
        ),
        (
            ["torch:add", "--samples", "{here}:samples", "--reference", "torch:pi"],
            "the reference is an object of type float, expected a callable",
        ),
        (
            ["torch:add", "--samples", "{here}:samples", "--rules", "value"],
            "rule 'value', expected one of",
        ),
    ],
)
def test_an_error_of_the_command_is_one_line(
    arguments: list[str], message: str, capsys: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    (tmp_path / "broken.py").write_text("import missing")
    (tmp_path / "ended.py").write_text("raise SystemExit(3)")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit) as ended:
        command_line.main([argument.format(here=__name__) for argument in arguments])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m torchpar check: error: ")
    assert message in line


def _twice(name: str, body: Callable[[Tensor], object]) -> Any:
    def twice(x: Tensor) -> Tensor:
        body(x)
        return 2 * x

    return library.custom_op(f"ends::{name}", twice, mutates_args=())


SLOW = _twice("slow", lambda x: time.sleep(0.2))
BYE = _twice("bye", lambda x: sys.exit(3))
RIGHT, FORK = _twice("right", lambda x: None), _twice("fork", lambda x: os.fork())
STOP = _twice("stop", lambda x: _stop("interrupted by itself"))
EXIT = _twice("exit", lambda x: os._exit(0))
SPIN = _twice("spin", lambda x: ctypes.PyDLL(None).pause())  # which holds the interpreter's lock
MATRIX = [(normal(3, 4).mT,)]  # not contiguous, so that the row of values compares two layouts


def _stop(text: str = "") -> None:
    raise KeyboardInterrupt(text)


@pytest.mark.skipif(sys.platform != "linux", reason="a child process is watched on Linux alone")
def test_an_operators_own_interrupt_crashes_in_a_watched_process() -> None:
    given = ("--samples", f"{__name__}:MATRIX", "--rules", "values")
    status, out, err = _command_in_process(f"{__name__}:STOP", *given, cwd=Path(__file__).parent)
    assert (status, err) == (1, "")
    assert re.search(r"values +crashes +0 +KeyboardInterrupt: interrupted by itself", out)
    given = ("torch:add", "--samples", f"{__name__}:_stop")
    status, out, err = _command_in_process(*given, cwd=Path(__file__).parent)
    line = f"python -m torchpar check: error: {__name__}:_stop: KeyboardInterrupt"
    assert (status, out, err) == (2, "", f"{line}\n")
    with pytest.raises(KeyboardInterrupt):  # which may be somebody's who waits
        check_operator(STOP, MATRIX, rules="values")


def exit_at_once() -> None:
    os._exit(0)


def test_an_operator_that_calls_exit_crashes(capsys: Any) -> None:
    given = [f"{__name__}:BYE", "--samples", f"{__name__}:MATRIX", "--rules", "values", "schema"]
    assert command_line.main(given) == 1
    out, err = capsys.readouterr()
    assert re.findall(r"(values|schema) +crashes +0 +SystemExit: 3\n", f"{out}\n") == [
        "values",
        "schema",
    ]
    assert err == ""

    def leave(x: Tensor) -> None:
        sys.exit(3)

    with pytest.raises(ConfigError, match=r"leave calls no operator .* and raises SystemExit: 3;"):
        check_operator(leave, MATRIX)


def test_a_command_that_takes_long_says_how_many_rows_are_done(capsys: Any) -> None:
    given = ["--samples", f"{__name__}:MATRIX", "--rules", "schema", "values"]
    with patch.object(console, "SILENCE", 0.05):
        command_line.main([f"{__name__}:SLOW", *given])
    err = capsys.readouterr().err
    line = (
        r"{} of 2 rows are done; ends.slow.default: {} on sample 0 of float64 \(4, 3\) after \d s\n"
    )
    assert re.search(line.format(0, "schema"), err)
    assert re.search(line.format(1, "values"), err)
    command_line.main([f"{__name__}:SLOW", *given])
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(sys.platform != "linux", reason="the command forks on Linux alone")
@pytest.mark.parametrize(
    "operator, samples, line",
    [
        ("RIGHT", "MATRIX", ""),
        ("FORK", "MATRIX", ""),
        (
            "EXIT",
            "MATRIX",
            "ends.exit.default: values on sample 0 of float64 (4, 3) ends the process with status "
            "0, as os._exit does; raise an error instead",
        ),
        (
            "SPIN",
            "MATRIX",
            "ends.spin.default: values on sample 0 of float64 (4, 3) does not end within 6 s "
            f"({Path(__file__).name}, line LINE); take smaller samples, or a longer --limit",
        ),
        (
            "RIGHT",
            "exit_at_once",
            f"{__name__}:exit_at_once: its call ends the process with status 0, as os._exit does; "
            "raise an error instead",
        ),
    ],
)
def test_an_operator_that_ends_the_process_or_never_returns_is_named(
    operator: str, samples: str, line: str
) -> None:
    # The import, too, must end within it, also beside other tests.
    limit = "6" if operator == "SPIN" else "60"
    status, out, err = _command_in_process(
        f"{__name__}:{operator}",
        *("--samples", f"{__name__}:{samples}", "--rules", "values", "--limit", limit),
        cwd=Path(__file__).parent,
    )
    if not line:
        assert (status, err) == (0, "")
        assert out.count("values  works") == 1
        return
    lines = Path(__file__).read_text().splitlines()
    place = next(n for n, text in enumerate(lines, 1) if text.startswith("SPIN = "))
    line = line.replace("LINE", str(place))
    assert (status, out, err) == (1, "", f"python -m torchpar check: error: {line}\n")


@pytest.mark.parametrize("limit", ["0", "-1", "nan", "x"])
def test_a_limit_is_a_positive_number_of_seconds(limit: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        command_line.main(["torch:add", "--samples", "math:pi", f"--limit={limit}"])
    assert f"--limit: '{limit}', expected a positive number of seconds\n" in capsys.readouterr().err


def test_a_table_says_that_an_operator_has_no_formula_of_its_operations() -> None:
    op = faulty.make("counted")
    assert NO_FORMULA in check_operator(op, SAMPLES, rules="values").notes
    of_pytorch = check_operator(torch.add, SAMPLES_OF_ONE_SHAPE, rules="values")
    assert NO_FORMULA not in of_pytorch.notes
    op.register_flops(lambda *shapes, **_: 0)
    assert NO_FORMULA not in check_operator(op, SAMPLES, rules="values").notes


@pytest.mark.skipif(torch.cuda.is_available(), reason="the note is another where there is a GPU")
def test_a_table_says_that_no_kernel_for_a_gpu_has_run() -> None:
    table = check_operator(torch.ops.torchpar.matmul_t.default, [(normal(4, 3),)], rules="values")
    assert table.notes == (
        "the reference is the formula that the operator registers",
        "no GPU: the operator's Triton kernels were not run; "
        'emulate="sm_90", or --emulate sm_90, executes Triton kernels on this CPU',
    )
    assert str(table).splitlines()[-1] == table.notes[1]
    assert table.played in str(table)
    assert table.played.endswith("has run if a tape can hold them, which --emulate sm_90 tries")
    assert table.as_dict()["notes"] == list(table.notes)
    op = faulty.make("of_cuda", formula=None)
    assert check_operator(op, SAMPLES, rules="values").notes == (NO_FORMULA,)
    op.register_kernel("cuda", faulty.kernel)
    table = check_operator(op, SAMPLES, rules="values")
    assert table.notes == (
        NO_FORMULA,
        "no GPU: the operator's CUDA kernels were not run; "
        'emulate="sm_90", or --emulate sm_90, executes Triton kernels on this CPU',
    )


def test_an_internal_error_of_pytorch_is_a_crash() -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError(
            'false INTERNAL ASSERT FAILED at "a.cpp":1, please report a bug to PyTorch.'
        )

    table = check_operator(faulty.make("internal", batch=fail), SAMPLES, rules="vmap of vmap")
    assert (table["vmap of vmap"].outcome, table.ok) == ("crashes", False), str(table)


A, B = normal(3, 3), normal(4, 3)


@pytest.mark.parametrize(
    "actual, expected, detail",
    [
        (2 * A, A, "; a factor of 2"),
        (A / 3, A, "; a factor of 0.3333"),
        (-A, A, "; the sign is flipped"),
        (A.mT.contiguous(), A, "; transposed"),
        (B.mT, B, "; transposed"),
        (B, B.sum(0), "; the sum over a broadcast dimension is missing"),
        (A.where(A > 0, math.nan), A, f"NaN at {int((A <= 0).sum())} of 9 places, expected at 0"),
        (0 * A, A, "0, of "),
        (A + B[1:], A, ""),
        (torch.tensor(5.0), torch.tensor(1.3), ""),
        (torch.tensor([1 - 2j]), torch.tensor([1 + 2j]), "; conjugated"),
        ((A + 1e-6).float().double(), A, "; float64 is computed in a lower precision"),
        (A + 1e-6, A, ""),
    ],
)
def test_a_likely_cause_is_named(actual: Tensor, expected: Tensor, detail: str) -> None:
    with pytest.raises(OutcomeException) as found:
        close(actual, expected)
    outcome, message = found.value.args
    assert outcome == "wrong"
    assert detail in message
    assert detail or ";" not in message


def test_the_numbers_of_a_wrong_jacobian_are_shown() -> None:
    def doubled(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        ga, gb = faulty.backward(ctx, g)
        return ga, 2 * gb

    table = check_operator(faulty.make("doubled", backward=doubled), SAMPLES, rules="gradcheck")
    detail = table["gradcheck"].detail
    assert re.fullmatch(
        r"Jacobian mismatch for output 0 with respect to input 1: (-?[\d.]+), "
        r"expected (-?[\d.]+) by finite differences; a factor of 2",
        detail,
    ), detail


def test_a_wrong_gradient_that_repeats_the_incoming_one_is_not_called_imprecise() -> None:
    """It has the incoming gradient's bits, as 2 g has, and integers have few."""

    def repeat(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        return -g.mT[:, :1] @ torch.ones(1, 3).double(), g[:1].mT * torch.ones(3).double()

    wrong = faulty.make("repeat", backward=repeat)
    steps = faulty.make("steps", kernel=lambda a, b: faulty.kernel(a, b).round())
    for op in (wrong, steps):
        samples = [(normal(4, 3), normal(4, 3))]
        detail = check_operator(op, samples, rules="gradcheck")["gradcheck"].detail
        assert "Jacobian mismatch" in detail
        assert "precision" not in detail, detail


def test_a_jacobian_of_float32_is_named_without_a_reference() -> None:
    parts, rule, detail = faulty.FAULTS["values_of_float32"]
    table = check_operator(faulty.make("of_float32", **parts), SAMPLES, rules=rule)
    assert table[rule].detail.endswith(detail)
    printed = str(table).splitlines()[2]  # a long detail is cut before its cause
    assert "…" in printed
    assert printed.endswith(f"; {detail}")


def test_a_cut_detail_keeps_what_it_is_about():
    # PyTorch's second sentence is longer than the room for a cause.
    detail = (
        "Batching rule not implemented for aten::flatten.using_ints; the fallback path doesn't "
    )
    row = Row("batched gradients", "refuses", detail=f"{detail}work on out= or view ops.")
    assert "aten::flatten.using_ints" in str(OperatorTable("mylib.op", [row]))

    @library.custom_op("tests::same", mutates_args=())
    def same(x: Tensor) -> Tensor:
        return x

    table = check_operator(same, [(torch.ones(2),)], rules=["values"])
    (line,) = (one for one in str(table).splitlines() if one.startswith("values"))
    assert "a result may not alias" in line
    assert line.endswith("; return a clone")


def test_an_operator_that_errs_without_elements_says_which_size_is_0() -> None:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return faulty.kernel(a, b) if a.shape[1] else a.new_ones(len(a), len(b))

    op = faulty.make("without_columns", kernel=kernel)
    table = check_operator(op, SAMPLES, reference=faulty.kernel, rules="layouts and sizes")
    size = SAMPLES[0][0].shape[1]
    detail = table["layouts and sizes"].detail
    assert detail.startswith(f"0 in place of every size of {size}: off by 1.0e+00"), detail


def test_the_wrong_one_of_several_fake_results_is_named() -> None:
    def values(x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, x.sum(0)

    op = library.custom_op("torchpar_faulty::two_results", values, mutates_args=())
    op.register_fake(lambda x: (torch.empty_like(x), x.new_empty(x.shape[1:], dtype=torch.float32)))
    table = check_operator(op, [(normal(3, 4),)], reference=values, rules="fake tensors")
    message = "[1] dtype torch.float32, expected torch.float64"
    assert message in table["fake tensors"].detail


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
def test_lists_integers_keywords_and_several_results(
    op: Any, sample: Sample, reference: Any
) -> None:
    rules = [
        "values",
        "schema",
        "fake tensors",
        "gradcheck",
        "gradgradcheck",
        "any of the gradients",
    ]
    table = check_operator(op, [sample], reference=reference, rules=rules)
    assert table.name == str(op)
    assert outcomes(table) == dict.fromkeys(rules, "works"), str(table)


def test_two_results() -> None:
    """Fakes that share memory are found. One result of DTensors may be unused (refused:
    pytorch#173123)."""
    schema = "(Tensor x) -> (Tensor, Tensor)"
    reference = lambda x: (2 * x, x + 1)  # noqa: E731  # likewise
    op = library.custom_op("torchpar_tests::two", reference, mutates_args=(), schema=schema)
    op.register_fake(lambda x: (x.new_empty(x.shape),) * 2)
    op.register_autograd(lambda ctx, g, h: 2 * g + h)
    op.register_sharding(lambda x: [([Replicate()] * 2, [Replicate()])])
    table = check_operator(
        op, [(normal(3),)], reference=reference, rules=["fake tensors", "DTensor"]
    )
    assert outcomes(table) == {"fake tensors": "wrong", "DTensor": "works"}, str(table)
    assert "share memory" in str(table)
    wrong = library.custom_op(
        "torchpar_tests::misplaced", reference, mutates_args=(), schema=schema
    )
    for placements, expected in (
        ([Replicate()] * 2, "expected two lists, the placements of 2 results and of 1 tensors"),
        ([Shard(1)], "for a tensor of 1 dimensions, expected placements on its dimensions"),
    ):
        wrong.register_sharding(lambda x, given=placements: [([Replicate()] * 2, given)])
        row = check_operator(wrong, [(normal(3),)], reference=reference, rules="DTensor")["DTensor"]
        assert expected in row.detail, str(row)


def test_a_rule_of_sharding_may_name_a_dimension_that_a_smaller_tensor_lacks() -> None:
    op = library.custom_op(
        "torchpar_faulty::copied", torch.clone, mutates_args=(), schema="(Tensor x) -> Tensor"
    )
    op.register_fake(torch.empty_like)
    op.register_autograd(lambda ctx, g: g)
    op.register_sharding(lambda x: [([p], [p]) for p in (Replicate(), Shard(0), Shard(1))])
    for x in (normal(2, 4), normal(2), normal()):
        assert check_operator(op, [(x,)], rules="DTensor")["DTensor"].outcome == "works"


def test_a_reference_without_a_gradient_hides_no_wrong_gradient() -> None:
    op = library.custom_op(
        "torchpar_faulty::square", torch.square, mutates_args=(), schema="(Tensor x) -> Tensor"
    )
    op.register_fake(torch.empty_like)
    op.register_autograd(lambda ctx, g: 3 * g)
    x = normal(3).double()
    for reference in (torch.square, lambda x: x.detach().square()):
        row = check_operator(op, [(x,)], reference=reference, rules="gradcheck")["gradcheck"]
        assert (row.outcome, "Jacobian mismatch" in row.detail) == ("wrong", True)


def test_reasons_for_which_a_rule_is_not_run() -> None:
    right = faulty.make("without_a_formula", formula=None)

    def reason(op: Any, sample: tuple[Tensor, ...], rule: str) -> str:
        (row,) = check_operator(op, [sample], rules=[rule]).rows
        assert row.outcome == "not run"
        return row.detail

    integers = (torch.ones(3, 2).long(), torch.ones(3, 2).long())
    assert reason(right, integers, "low precision") == "no floating operand"
    single = (normal(3, 2).float(), normal(3, 2).float())
    exact = torch.ops.torchpar.exact_matmul.default
    assert reason(exact, single, "gradcheck").startswith(
        "eager mode refuses: torchpar::exact_matmul: "
    )
    assert reason(right, single, "torch.func: jvp") == "no reference"
    assert reason(torch.add, (normal(3), normal(3)), "schema") == "no operator was called"
    assert reason(torch.argmax, (normal(3),), "gradgradcheck") == "no differentiable result"


def test_the_worst_sample_is_shown(right: Any) -> None:
    samples = [*SAMPLES, (normal(5, 4), normal(6, 3)), (normal(5, 4), None)]
    table = check_operator(right, samples, rules="values")
    assert (table["values"].outcome, table["values"].sample) == ("crashes", 1)
    assert not table.ok  # a sample is what the operator takes
    assert "mat1 and mat2 shapes cannot be multiplied" in str(table)
    table = check_operator(right, SAMPLES, reference=lambda a: a, rules="values")
    assert table["values"].outcome == "crashes"
    assert "the reference raises TypeError" in table["values"].detail


@pytest.mark.parametrize(
    "op, samples, rules, message",
    [
        (torch.add, SAMPLES, ["value"], "rule 'value', expected one of 'values', "),
        (torch.add, [normal(3)], None, "expected samples"),
        (torch.ops.aten.add_.Tensor, SAMPLES, None, "does not; torch.library.opcheck takes it"),
        ("add", SAMPLES, None, "the operator is an object of type str"),
    ],
)
def test_errors(op: Any, samples: Any, rules: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_operator(op, samples, rules=rules)


LOOPED = """
import torch
from torch import Tensor
from torchpar import errors, library
from torchpar.testing import check_operator

@library.custom_op("test_check::two", mutates_args=())
def two(x: Tensor, y: Tensor, scale: float = 1) -> tuple[Tensor, Tensor]:
    return x + y, scale * x * y

samples = [(torch.randn(3, 2, dtype=torch.float64), torch.randn(2, dtype=torch.float64))]
rule = "vmap over one operand"
print(check_operator(two, samples, reference=lambda x, y: (x + y, x * y), rules=rule))
"""


@pytest.mark.slow
def test_a_loop_of_vmap_is_said_in_the_table_only():
    """PyTorch's warning, once for each loop, does not come by Python's warnings."""
    done = subprocess.run([sys.executable, "-c", LOOPED], capture_output=True, text=True)
    assert "a loop over the samples: no rule" in done.stdout
    assert "performance drop" not in done.stderr


def test_the_result_that_is_wrong_is_named():
    table = check_operator(
        lambda x: (x.abs(), x.square()),
        [(torch.ones(3, dtype=torch.float64),)],
        reference=lambda x: (x.abs(), 2 * x.square()),
        rules="values",
    )
    assert table.rows[0].detail.startswith("[1] off by 1.0e+00")


STATE, NUMBERS = {"calls": 0}, itertools.count()


def counted(x: Tensor) -> Tensor:
    STATE["calls"] += 1
    return x * STATE["calls"]


@pytest.mark.parametrize(
    "function, options, sentence",
    [
        (lambda x: x * 2, {}, "plays its calls on a GPU, where python -m torchpar build has run"),
        (lambda x: x * 2, {"played": False}, "does not play its calls on a GPU: played=False"),
        (lambda x: x * x.sum().item(), {}, "on a GPU: aten._local_scalar_dense.default reads"),
        (counted, {}, "on a GPU: two calls with the same layouts and numbers do not do the same"),
        (None, {}, "does not play its calls on a GPU: it is not made by triton_op"),
    ],
)
def test_a_table_says_whether_cpp_plays_the_calls(
    function: Any, options: dict[str, bool], sentence: str
) -> None:
    pytest.importorskip("nogpu", reason="nogpu executes the kernels")
    schema, name = "(Tensor x) -> Tensor", f"played_tests::op{next(NUMBERS)}"
    if function is None:
        op = library.custom_op(name, lambda x: x * 2, mutates_args=(), schema=schema)
    else:
        op = library.triton_op(name, function, mutates_args=(), schema=schema, **options)
    table = check_operator(
        op,
        [(normal(4, 3),)],
        reference=function or (lambda x: x * 2),
        rules="values",
        emulate="sm_90",
    )
    assert table.played == str(table).splitlines()[-1]
    assert sentence in table.played
    assert check_operator(torch.mul, SAMPLES_OF_ONE_SHAPE, rules="values").played == ""
