# SPDX-License-Identifier: MIT
"""The conformance kit: our Muon conforms in every situation, and faulty optimizers are found."""

import math
import os
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from textwrap import dedent
from typing import Any

import faulty_optimizers as faulty
import pytest
import shard_muon
import torch
import torch.distributed as dist
from commands import ROOT, run
from placed_muon import results_of_all
from torch import Tensor, nn

from torchpar.errors import ConfigError
from torchpar.optim import Muon
from torchpar.testing import SITUATIONS, Conformance, Formula, Row, check_optimizer
from torchpar.testing.optimizers import check_optimizer as check

COMPARED = ("same bits", "equal up to rounding")


def make_muon(
    model: nn.Module,
    nesterov: bool = True,
    views: Any = None,
    process_group: Any = None,
    **own: Any,
):
    convolutions = {
        name: lambda w: w.flatten(1) for name, p in model.named_parameters() if p.dim() == 4
    }
    own = {"lr": 0.05, "views": views or convolutions, "process_group": process_group} | own
    return Muon(model.named_parameters(), nesterov=nesterov, **own)


EXPECTED = dict.fromkeys(SITUATIONS, "same bits") | {
    "polar factor": "equal up to rounding",
    "fully_shard after the optimizer": "refuses",
    "Shard(0), no gradient on one rank": "refuses",
    "Replicate, no gradient on one rank": "refuses",
    "Shard(0), partial gradients": "refuses",
    "Shard(0), two learning rates": "refuses",
}

# A situation of most kinds. The tests of faulty optimizers have others.
SOME = [
    "whole",
    "fully_shard on 2 ranks",
    "ColumnParallelLinear",
    "parallelize_module, some matrices",
    "pipeline stages",
]
LOST = "Shard(0), a group on one rank"  # rank 0 waits for the other, and is ended
OTHERS = [name for name in SITUATIONS if name not in (*SOME, LOST)]
CHOSEN = [SOME, pytest.param(OTHERS, marks=pytest.mark.slow)]


@pytest.mark.parametrize("names", CHOSEN, ids=["some", "others"])
def test_muon_conforms(ranks, names):
    found = check_optimizer(partial(make_muon, ns="standard"), names, ranks=ranks)
    assert {row.situation: row.verdict for row in found} == {
        name: EXPECTED[name] for name in names
    }, found


@pytest.mark.slow
def test_muon_conforms_on_gram_matrices(ranks):
    names = ["polar factor", "scale of gradients", "fully_shard on 2 ranks"]
    rows = check_optimizer(partial(make_muon, ns="gram"), names, ranks=ranks)
    assert [row.verdict for row in rows] == ["equal up to rounding", "same bits", "same bits"], rows
    assert {row.compared_with for row in rows} == {"polar factor", "own step, Muon in float64"}


# Faulty optimizers


class Scaled(faulty.PlainMuon):
    """The updates of rank 1 are 1% larger."""

    def scale(self, matrix: Tensor, p: Tensor) -> float:
        return super().scale(matrix, p) * (1 + 0.01 * dist.get_rank())


class NotANumber(faulty.PlainMuon):
    """On two ranks the update is not a number."""

    def scale(self, matrix: Tensor, p: Tensor) -> float:
        return super().scale(matrix, p) if dist.get_world_size() == 1 else math.nan


class TakesAllResults(Muon):
    """The parameters of one rank alone get the results of all exchanges, also of shards."""

    _exchanges = results_of_all


def make_of_all_results(model: nn.Module, process_group: Any = None) -> Muon:
    return TakesAllResults(model.parameters(), lr=0.05, process_group=process_group)


def refuse(model: Any = None, kind: type[Exception] = RuntimeError) -> Any:
    raise kind("nothing is supported")


class Refuses(faulty.PlainAdamW):
    def __init__(self, params: Any, kind: type[Exception]):
        super().__init__(params)
        self.kind = kind

    def step(self, closure: Any = None) -> Any:
        refuse(kind=self.kind)


def of(kind: Any, **arguments: Any) -> Any:
    return partial(faulty.make, kind=partial(kind, **arguments) if arguments else kind)


# Faults of published libraries, where they belong, and whether they are slow tests.
RECONSTRUCTED = [
    # Takes the slice for a matrix (DeepSpeed#8437).
    (faulty.make, "ColumnParallelLinear", "each shard is updated on its own: ", False),
    (of(faulty.OrthogonalisesShards), "Shard(0)", "each shard is updated on its own: ", True),
    (of(faulty.AppliesMomentum), "polar factor", "cosine 0.", False),
    (of(faulty.MomentumOfMicroBatches), "accumulation", "update off by", True),
    (of(faulty.TakesSkippedSteps), "skipped step", "skips makes momentum_buffer of square", False),
    (of(faulty.ViewsShards), "fully_shard, heads", "update off by", True),
    (of(faulty.ScalesByPaddedShape), "fully_shard, padded rows", "its norm by", True),
    (
        of(faulty.NormalisesMomentum),
        *("scale of gradients, bfloat16 without Nesterov", "update off by", False),
    ),
    # Does not compare the ranks.
    (faulty.make, "Shard(0), two learning rates", "update off by", True),
    (faulty.make_by_layer, "tied weights", "update off by", False),
    (of(faulty.RoundsFloat32), "state dict, bfloat16", "expected the same bits", False),
    # Takes the slice for a matrix, beside whole ones.
    (faulty.make, "split layers, some matrices", "each shard is updated on its own: ", True),
    (of(faulty.ShardsOfMixed), "Shard(1), some matrices", "each shard is updated on ", False),
]


@pytest.mark.parametrize(
    "make, situation, verdict, detail",
    [
        *(
            pytest.param(make, situation, "wrong", detail, marks=[pytest.mark.slow] * is_slow)
            for make, situation, detail, is_slow in RECONSTRUCTED
        ),
        (of(Scaled), "DDP", "wrong", "the ranks differ"),
        (of(NotANumber), "DDP", "wrong", "a step makes square infinite or NaN"),
        (partial(make_muon, lr=0.0), "whole", "wrong", "no weight moves"),
        (
            partial(faulty.make_adamw, kind=partial(Refuses, kind=RuntimeError)),
            "whole",
            "refuses",
            "RuntimeError: nothing is supported",
        ),
        (
            partial(faulty.make_adamw, kind=partial(Refuses, kind=AssertionError)),
            "whole",
            "crashes",
            "AssertionError: nothing is supported",
        ),
        (faulty.make_adamw, "fully_shard, heads", "not applicable", "make has no argument views"),
        (make_of_all_results, "Shard(0), some matrices", "crashes", "The size of tensor a"),
    ],
)
def test_faults_are_found(ranks, make, situation, verdict, detail):
    (row,) = check_optimizer(make, [situation], ranks=ranks)
    assert row.verdict == verdict, row
    assert detail in row.detail


@pytest.mark.slow
def test_results_of_all_exchanges_are_found_in_each_placement(ranks):
    names = [name for name in SITUATIONS if "some matrices" in name]
    rows = check_optimizer(make_of_all_results, names, ranks=ranks)
    crashes = [row.situation for row in rows if row.verdict == "crashes"]
    assert crashes == [name for name in names if "sharing the work" not in name], rows
    assert len(crashes) == 12


def test_momenta_of_float32_go_on_in_a_model_of_bfloat16(ranks):
    names = ["state dict", "state dict, bfloat16"]
    rows = check_optimizer(of(faulty.KeepsFloat32), names, ranks=ranks)
    assert [row.verdict for row in rows] == ["same bits", "same bits"], rows


PAGE = (ROOT / "docs" / "conformance.md").read_text()


@pytest.mark.slow
def test_the_page_has_a_muon_of_shards_and_the_rows_that_name_its_fault(ranks, capsys):
    """The same optimizer conforms if it gathers its matrices first."""
    script = Path(shard_muon.__file__).read_text().partition('"""\n\n')[2]
    assert f"```python\n{script}```" in PAGE
    # What the script does as a program, on ranks that are there.
    program = dedent(script.partition('if __name__ == "__main__":\n')[2])
    exec(program, vars(shard_muon) | {"check_optimizer": partial(check_optimizer, ranks=ranks)})
    out = capsys.readouterr().out
    verdicts = re.findall(r"^(\w+) +(?:whole|parallelize_module) +(same bits|wrong) ", out, re.M)
    expected = {"shard_muon": ["same bits", "wrong"], "whole_muon": ["same bits", "same bits"]}
    assert verdicts == [(make, one) for make, both in expected.items() for one in both]
    assert "".join(f"    {line.rstrip()}\n" for line in out.splitlines()) in PAGE


@pytest.mark.parametrize(
    "make, situation, detail",
    [
        (
            of(faulty.ScalesShardsByWhole),
            *("Shard(0)", r"each shard is updated on its own, times 1\.00 to 1\.41: "),
        ),
        pytest.param(
            of(faulty.LeavesOutSmall),
            *("fully_shard, padded rows", r"each shard is updated on its own: 100% off "),
            marks=pytest.mark.slow,
        ),
        # Neither the directions of the shards' updates alone, nor of the whole matrices'.
        (of(faulty.AppliesMomentumOfShards), "Shard(0)", r"\w+, .*: update off by "),
        # Both, because AdamW is elementwise.
        pytest.param(
            partial(faulty.make_adamw, kind=faulty.DoublesRate),
            *("Shard(0)", r"\w+, .*: update off by 1\.0e\+00"),
            marks=pytest.mark.slow,
        ),
        # Each shard is a row, and has the direction of its momentum.
        pytest.param(
            of(faulty.AppliesMomentumOfShards),
            *("fully_shard, fewer rows than ranks", r"\w+, .*: update off by "),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_shards_are_blamed_only_if_each_is_updated_on_its_own(ranks, make, situation, detail):
    (row,) = check_optimizer(make, situation, ranks=ranks)
    assert row.verdict == "wrong", row
    assert re.match(detail, row.detail), row


# Padded rows are among the faults above. The last one has shards of two dimensions.
SHARDED = [
    *("fully_shard on 3 ranks", "fully_shard, convolutions", "Shard(1)"),
    *("fully_shard, two groups and a schedule", "fully_shard over parallelize_module"),
]


@pytest.mark.slow
def test_shards_are_blamed_in_each_kind_of_situation(ranks):
    rows = check_optimizer(of(faulty.OrthogonalisesShards), SHARDED, ranks=ranks)
    assert all(row.detail.startswith("each shard is updated on its own: ") for row in rows), rows


# Faults that the first three steps of small weights, with one group and one learning rate, do not
# show.
SILENT = [
    (faulty.IgnoresClosure, "closure", "step(closure) does not call the closure"),
    (faulty.LosesLoss, "closure", "step(closure) does not return the loss"),
    (faulty.CallsClosureTwice, "closure", "step(closure) calls the closure 2 times"),
    (faulty.ReturnsOtherLoss, "closure", "step(closure) returns 0, expected the closure's loss"),
    (faulty.RoundsLoadedState, "state dict", "expected the same bits"),
    (
        faulty.ReadsRateOnce,
        "learning rate schedule",
        "a change of group['lr'] changes nothing for square",
    ),
    (faulty.MergesGroups, "two groups", "update off by"),
    (faulty.LeavesOutLast, "whole", "flat does not move"),
    (faulty.ClipsGradient, "whole", "the step changes the gradient of square"),
    (faulty.WritesData, "version counters", "autograd does not notice that square changes"),
    (faulty.TakesNoneForZero, "no gradient in a step", "square moves without a gradient"),
    (faulty.LeavesGradients, "whole", "zero_grad leaves the gradient of square"),
    (faulty.DividesByNorm, "zero gradients", "a step makes square infinite or NaN"),
]
# Faults like some of these, of another class or in other situations.
ALIKE = [
    (faulty.DoublesDecay, "Shard(1)", "large weights: update off by"),
    (faulty.LateClosure, "closure", "update off by"),
    (faulty.KeepsRate, "state dict", "update off by"),
    (faulty.ReadsRateOnce, "two groups", "a change of group['lr'] changes nothing for"),
    (faulty.MergesSetting, "two groups", "update off by"),
    (faulty.MergesDecay, "two groups", "update off by"),
    (faulty.LeavesOutGroup, "two groups", "update off by"),
    (faulty.DropsGradient, "whole", "the step changes the gradient of square"),
    (faulty.WritesLocalData, "Shard(0)", "autograd does not notice that square changes"),
    (faulty.MuonWithoutDecay, "Shard(0)", "large weights: update off by"),
    (faulty.DropsDecay, "fully_shard on 2 ranks", "large weights: update off by"),
    (faulty.DividesByNorm, "Shard(0), zero gradients", "a step makes square infinite or NaN"),
    (faulty.ReadsRateOnceOnDTensors, "fully_shard, two groups and a schedule", "update off by"),
]


@pytest.mark.parametrize(
    "kind, situation, detail",
    [*SILENT, *(pytest.param(*one, marks=pytest.mark.slow) for one in ALIKE)],
)
def test_silent_faults_are_found(ranks, kind, situation, detail):
    (row,) = check_optimizer(partial(faulty.make_adamw, kind=kind), situation, ranks=ranks)
    assert (row.verdict, detail in row.detail) == ("wrong", True), row


@pytest.mark.parametrize(
    "make, situation, expected",
    [
        (partial(faulty.make_adamw, kind=faulty.WithoutCorrection), "whole", torch.optim.AdamW),
        *(
            pytest.param(
                *(partial(faulty.make_adamw, kind=kind), "whole", torch.optim.AdamW),
                marks=pytest.mark.slow,
            )
            for kind in (faulty.OtherBeta, faulty.SharesMoments)
        ),
        (partial(faulty.make_adamw, kind=faulty.EpsInRoot), "tiny gradients", torch.optim.AdamW),
        # The classes of PyTorch have a formula of their own.
        pytest.param(faulty.make_early_adamw, "whole", None, marks=pytest.mark.slow),
        (faulty.make_sgd_of_halved_momentum, "whole", None),
        pytest.param(faulty.make_muon_of_doubled_rate, "whole", None, marks=pytest.mark.slow),
    ],
)
def test_an_own_step_is_compared_with_its_formula(ranks, make, situation, expected):
    (row,) = check_optimizer(make, situation, reference=expected, ranks=ranks)
    assert row.verdict == "wrong", row
    assert "own step off" in row.detail


@pytest.mark.parametrize(
    "kind, early, late, detail",
    [
        (faulty.LateRate, "whole", "sixty steps", "own step off AdamW's formula by 3.0e-01"),
        pytest.param(
            *(faulty.SwitchesCorrection, "whole", "sixty steps", "from step 41 on"),
            marks=pytest.mark.slow,
        ),
        (faulty.CountsItself, "state dict", "sixty steps, resumed", "from step 40 on"),
        pytest.param(
            *(faulty.RefreshesShards, "fully_shard on 2 ranks", "fully_shard, twenty steps"),
            "from step 10 on",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_fault_that_begins_later_is_found_in_many_steps(ranks, kind, early, late, detail):
    """The situation of three steps says nothing of it."""
    of_adamw = issubclass(kind, faulty.PlainAdamW)
    make = partial(faulty.make_adamw if of_adamw else faulty.make, kind=kind)
    reference = torch.optim.AdamW if kind in (faulty.LateRate, faulty.SwitchesCorrection) else None
    rows = check_optimizer(make, [early, late], reference=reference, ranks=ranks)
    assert [row.verdict for row in rows] == ["same bits", "wrong"], rows
    assert detail in rows[1].detail


def of_torch(model: nn.Module, kind: Any, **own: Any) -> torch.optim.Optimizer:
    return kind(model.parameters(), **own)


RIGHT = [
    partial(
        of_torch, kind=torch.optim.SGD, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.01
    ),
    partial(of_torch, kind=torch.optim.SGD, lr=0.01, momentum=0.9, dampening=0.1, maximize=True),
    partial(of_torch, kind=torch.optim.Adam, weight_decay=0.01, amsgrad=True),
    partial(of_torch, kind=torch.optim.AdamW, foreach=True, maximize=True),
    partial(of_torch, kind=torch.optim.AdamW, lr=torch.tensor(0.01)),
    partial(of_torch, kind=torch.optim.AdamW, fused=True),
    partial(of_torch, kind=torch.optim.Muon, lr=0.05, adjust_lr_fn="match_rms_adamw"),
]
OF_VIEWS = ["fused query, key and value"]  # which make has no argument for
ONE_PROCESS = [
    name
    for name, one in SITUATIONS.items()
    if one.ranks == 1 and not one.orthogonal and name not in OF_VIEWS
]


# By default one of each class, in some situations.
BY_DEFAULT = ["whole", "two groups"]
CHOSEN_OF_PYTORCH = [
    pytest.param(
        make,
        BY_DEFAULT if which == "some" else [one for one in ONE_PROCESS if one not in BY_DEFAULT],
        marks=[pytest.mark.slow] * (which == "others" or n in (1, 3, 4)),
        id="-".join([which, *map(str, make.keywords.values())]),
    )
    for n, make in enumerate(RIGHT)
    for which in ("some", "others")
]


@pytest.mark.parametrize("make, names", CHOSEN_OF_PYTORCH)
def test_the_optimizers_of_pytorch_follow_their_formulas(ranks, make, names):
    rows = check_optimizer(make, names, ranks=ranks)
    # PyTorch's fused steps do not count versions: a later backward pass takes the new weights for
    # the old.
    wrong = ["version counters"] if "fused" in make.keywords and "version counters" in names else []
    assert [row.situation for row in rows if row.verdict not in COMPARED] == wrong, rows
    assert rows[0].compared_with == f"own step, {make.keywords['kind'].__name__} in float64"


@pytest.mark.slow
@pytest.mark.parametrize("expected", [torch.optim.AdamW, None])
def test_a_plain_adamw_conforms(ranks, expected):
    """Beside a formula the rows are compared with the own step, too."""
    names = dict.fromkeys(name for _, name, _ in (*SILENT, *ALIKE) if expected or name == "whole")
    if expected:
        names["tiny gradients"] = None
    rows = check_optimizer(faulty.make_adamw, names, reference=expected, ranks=ranks)
    rows.assert_conforms()
    compared = "own step" if expected is None else "own step, AdamW in float64"
    assert {row.compared_with for row in rows} == {compared}


def test_a_formula_of_ones_own(ranks):
    for step, verdict in (sign_step, "same bits"), (half_sign_step, "wrong"):
        (row,) = check_optimizer(make_sign, "whole", reference=Formula("sign", step), ranks=ranks)
        assert (row.verdict, row.compared_with) == (verdict, "own step, sign in float64"), row


class Sign(faulty.PlainAdamW):
    def update(self, p: Tensor, gradient: Tensor, group: Any) -> None:
        p.sub_(group["lr"] * gradient.sign())


def make_sign(model: nn.Module) -> torch.optim.Optimizer:
    return Sign(model.parameters())


def sign_step(weight: Tensor, gradient: Tensor, state: Any, settings: Any) -> Tensor:
    return weight - settings["lr"] * gradient.sign()


def half_sign_step(weight: Tensor, gradient: Tensor, state: Any, settings: Any) -> Tensor:
    return weight - settings["lr"] / 2 * gradient.sign()


@pytest.mark.slow
@pytest.mark.parametrize("make", [make for make, *_ in RECONSTRUCTED if make is not faulty.make])
def test_no_fault_is_found_on_whole_matrices(ranks, make):
    (row,) = check_optimizer(make, ["whole"], ranks=ranks)
    assert row.verdict == "same bits", row


@pytest.mark.slow
def test_a_plain_muon_conforms(ranks):
    """It gathers whole matrices, so that updates have the same bits wherever gradients have.

    Of a fifth of the situations; our Muon is tried in all.
    """
    own = {
        *(n for n in SITUATIONS if n.startswith(("Column", "RowParallel", "split layers"))),
        LOST,
        *(n for n in EXPECTED if EXPECTED[n] == "refuses"),
    }
    chosen = dict.fromkeys([*[*SITUATIONS][::5], "DDP, sharing the work"])
    table = check_optimizer(faulty.make, [name for name in chosen if name not in own], ranks=ranks)
    table.assert_conforms()
    others = {row.situation for row in table if row.verdict not in COMPARED}
    # make has no process_group.
    assert others == {n for n in chosen if n.endswith("sharing the work")} - own


def test_the_table():
    table = Conformance(
        [Row("whole", "same bits", "own step", 0.0, 0.02, 0.0), Row("DDP", "refuses", detail="no")]
    )
    assert str(table).splitlines() == [
        "situation  verdict    compared with  update error  rounding  scale error  detail",
        "whole      same bits  own step       0             2.0e-02   0",
        "DDP        refuses                                                        no",
    ]
    assert table.rows[1]["verdict"] == "refuses"
    table.assert_conforms()
    faulty = Conformance([*table, Row("Replicate", "hangs")])
    with pytest.raises(
        AssertionError, match=r"1 of 3 situations are faulty\nsituation .*\nReplicate +hangs"
    ):
        faulty.assert_conforms()
    message = r"none of 1 situations was compared\nsituation .*\nDDP +refuses"
    with pytest.raises(AssertionError, match=message):
        Conformance(table[1:]).assert_conforms()


def test_what_cannot_be_run_is_refused():
    with pytest.raises(
        ConfigError, match="situation 'none', expected one of 'whole', 'polar factor', "
    ):
        check_optimizer(make_muon, ["none"])
    with pytest.raises(
        ConfigError, match=r"cannot import make .*expected a module-level function or class"
    ):
        check_optimizer(lambda model: make_muon(model), "whole")
    with pytest.raises(
        ConfigError, match=r"reference is <class 'int'>, expected .* torch.optim.sgd.SGD, "
    ):
        check_optimizer(make_muon, "whole", reference=int)
    for make, message in (
        (make_muon, "no situation"),
        (torch.optim.SGD([torch.zeros(1)]), "is of type SGD"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_optimizer(make, ["polar factor"], orthogonal=False)


def test_a_make_that_is_wrong_is_named_once(ranks):
    """In place of a table in which each row has the same error."""
    for make, message in (
        (refuse, "make fails on a plain model, on one process: RuntimeError: nothing is supported"),
        (partial(torch.optim.AdamW, lr=0.1), "make gets a model; give its optimizer model.param"),
        (partial(make_adamw, lr=0.1), "make fails on .*: TypeError: .* keyword argument 'lr'"),
        (make_nothing, "make returns None, expected the optimizer of the model$"),
        (nn.Module.parameters, "make returns a generator, expected the optimizer"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_optimizer(make, ranks=ranks)


def make_nothing(model: nn.Module) -> None:
    torch.optim.AdamW(model.parameters())


@pytest.mark.slow
def test_the_first_script_of_the_page_prints_its_table(tmp_path):
    first, _ = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "first.py").write_text(first)
    status, out, err = run(sys.executable, str(tmp_path / "first.py"), cwd=tmp_path)
    assert status == 1
    assert "1 of 3 situations are faulty" in err
    table = PAGE.partition("\n    situation ")[2].partition("\n\n")[0]
    verdicts = [
        re.findall(r"^ *(.+?)  +(same bits|equal up to rounding|wrong) ", t, re.MULTILINE)
        for t in (out, table)
    ]
    assert verdicts[0] == verdicts[1]
    assert len(verdicts[0]) == 3


def make_adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def test_an_elementwise_optimizer_conforms_in_the_general_part(ranks):
    names = ["polar factor", "DDP", "Shard(0), two learning rates"]
    (row,) = rows = check_optimizer(make_adamw, names, orthogonal=False, ranks=ranks)
    assert (row.situation, row.verdict) == ("DDP", "same bits")
    rows.assert_conforms()


# Ranks that end or are ended: the last tests, because new ranks must replace them


def test_muon_refuses_a_group_that_one_rank_adds(ranks, monkeypatch):
    monkeypatch.setattr(check, "GRACE", 0.5)
    (row,) = check_optimizer(partial(make_muon, ns="standard"), LOST, ranks=ranks)
    assert row.verdict == "refuses", row


class Failing(faulty.PlainMuon):
    """Rank 1 does something else than a step, while rank 0 waits for it."""

    def __init__(self, params: Any, instead: Callable[[], Any], **own: Any):
        super().__init__(params, **own)
        self.instead = instead

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        if dist.get_rank() == 1:
            self.instead()
        dist.barrier()


@pytest.mark.parametrize(
    "instead, verdict, detail",
    [
        (partial(time.sleep, 1000), "hangs", "no answer in time"),
        (partial(os._exit, 1), "crashes", "rank 1: BrokenProcessPool"),
        (refuse, "hangs", "refuses on rank 1, and not on all ranks: Runtime"),
        pytest.param(
            partial(torch.ones, -1), "crashes", "rank 1: RuntimeError: ", marks=pytest.mark.slow
        ),
    ],
)
def test_ranks_that_are_lost_are_found(ranks, monkeypatch, instead, verdict, detail):
    monkeypatch.setattr(check, "GRACE", 0.5)
    (row,) = check_optimizer(
        of(Failing, instead=instead),
        "Replicate",
        timeout=0.5 if "no answer" in detail else 60,
        ranks=ranks,
    )
    assert row.verdict == verdict, row
    assert detail in row.detail
