# SPDX-License-Identifier: MIT
"""The conformance kit: our Muon conforms in every situation, and faulty optimizers are found."""

import math
import os
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from commands import ROOT, run
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from torchpar.errors import ConfigError
from torchpar.optim import Muon, orthogonalize
from torchpar.optim.exchange import Exchange
from torchpar.testing import SITUATIONS, Conformance, Row, check_optimizer, optimizers


def make_muon(
    model: nn.Module, nesterov: bool = True, views: Any = None, process_group: Any = None, **own: Any
):
    shapes = {name: p.dim() for name, p in model.named_parameters()}
    convolutions = {name: lambda w: w.flatten(1) for name, dims in shapes.items() if dims == 4}
    own.setdefault("lr", 0.05)
    return Muon(
        model.named_parameters(),
        nesterov=nesterov,
        views=views or convolutions,
        process_group=process_group,
        **own,
    )


EXPECTED = dict.fromkeys(SITUATIONS, "same bits") | {
    "polar factor": "equal up to rounding",
    "fully_shard after the optimizer": "refuses",
    "Shard(0), no gradient on one rank": "refuses",
    "Replicate, no gradient on one rank": "refuses",
    "Shard(0), partial gradients": "refuses",
    "Shard(0), two learning rates": "refuses",
    "Shard(0), a group on one rank": "refuses",
}


# Every fourth situation, and all among the slow tests.
CHOSEN = [[*SITUATIONS][::4], pytest.param([*SITUATIONS], marks=pytest.mark.slow)]


@pytest.mark.parametrize("names", CHOSEN, ids=["some", "all"])
def test_muon_conforms(ranks, names):
    found = check_optimizer(partial(make_muon, ns="standard"), names, ranks=ranks)
    assert {row.situation: row.verdict for row in found} == {name: EXPECTED[name] for name in names}, found


def test_muon_conforms_on_gram_matrices(ranks):
    names = ["polar factor", "scale of gradients", "fully_shard on 3 ranks"]
    rows = check_optimizer(partial(make_muon, ns="gram"), names, ranks=ranks)
    assert [row.verdict for row in rows] == ["equal up to rounding", "same bits", "same bits"], rows


# Faulty optimizers


class Gathering(torch.optim.Optimizer):
    """Muon that gathers each DTensor on every rank: right, and a base of faulty ones."""

    def __init__(self, model: nn.Module):
        super().__init__(model.parameters(), {"lr": 0.05})

    def direction(self, momentum: Tensor) -> Tensor:
        whole = momentum.full_tensor() if isinstance(momentum, DTensor) else momentum
        update = self.ratio(whole) * orthogonalize(whole).float()
        if isinstance(momentum, DTensor):
            return distribute_tensor(update, momentum.device_mesh, momentum.placements)
        return update

    def ratio(self, t: Tensor) -> float:
        return math.sqrt(max(1.0, t.shape[0] / t.shape[1]))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        if closure is not None:
            with torch.enable_grad():
                closure()
        for p in self.param_groups[0]["params"]:
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
            momentum.lerp_(p.grad, 0.1)
            p.sub_(0.05 * self.direction(momentum))


class LocalShard(Gathering):
    """Each rank orthogonalises its own shard."""

    def direction(self, momentum: Tensor) -> Tensor:
        if not isinstance(momentum, DTensor):
            return super().direction(momentum)
        update = super().direction(momentum.to_local())
        return DTensor.from_local(
            update, momentum.device_mesh, momentum.placements, shape=momentum.shape, stride=momentum.stride()
        )


class LocalShape(Gathering):
    """The update is scaled by the shape of this rank's shard."""

    def direction(self, momentum: Tensor) -> Tensor:
        local = momentum.to_local() if isinstance(momentum, DTensor) else momentum
        return super().direction(momentum) * (self.ratio(local) / self.ratio(momentum))


class Scaled(Gathering):
    """The updates of rank 1 are 1% larger."""

    def ratio(self, t: Tensor) -> float:
        return super().ratio(t) * (1 + 0.01 * dist.get_rank())


class NotANumber(Gathering):
    """On two ranks the update is not a number."""

    def ratio(self, t: Tensor) -> float:
        return super().ratio(t) if dist.get_world_size() == 1 else math.nan


class Normalised(Gathering):
    """The momentum is normalised, and not orthogonalised."""

    def direction(self, momentum: Tensor) -> Tensor:
        return momentum / momentum.norm()


class Deaf(Muon):
    """The parts of the other ranks arrive as ones."""

    def __init__(self, model: nn.Module):
        super().__init__(model.named_parameters(), lr=0.05)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        def gather(exchange: Exchange, *arguments: Any) -> dict[int, Tensor]:
            return {i: torch.ones_like(whole) for i, whole in received(exchange, *arguments).items()}

        received = Exchange.gather
        with patch.object(Exchange, "gather", gather):
            return super().step(closure)


class Failing(Gathering):
    """Rank 1 does something else than a step."""

    def __init__(self, model: nn.Module, what: str):
        super().__init__(model)
        self.what = what

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        if dist.get_rank() == 1:
            match self.what:
                case "hangs":
                    time.sleep(1000)
                case "dies":
                    os._exit(1)
                case "refuses":
                    raise ValueError("rank 1 refuses")
                case "fails":
                    torch.ones(2) @ torch.ones(3)
        if self.what == "refuses":
            dist.barrier()


def refuse(model: nn.Module, kind: type[Exception] = RuntimeError) -> Any:
    raise kind("nothing is supported")


ROWS = "fully_shard on 2 ranks"


@pytest.mark.parametrize(
    "make, situation, verdict, detail",
    [
        (Gathering, ROWS, "same bits", ""),
        (Gathering, "Shard(0), Shard(1)", "same bits", ""),
        (LocalShard, ROWS, "wrong", "update off by"),
        (LocalShard, "Shard(1)", "wrong", "update off by"),
        (LocalShape, "fully_shard, padded rows", "wrong", "its norm by"),
        (Scaled, "DDP", "wrong", "the ranks differ"),
        (NotANumber, "DDP", "wrong", "update off by inf"),
        (Normalised, "polar factor", "wrong", "cosine 0.687"),
        (Deaf, "Shard(0)", "wrong", "update off by"),
        (partial(make_muon, lr=0.0), "whole", "wrong", "no weight moves"),
        (partial(Failing, what="hangs"), "Replicate", "hangs", "no answer in time"),
        (partial(Failing, what="dies"), "Replicate", "crashes", "rank 1: BrokenProcessPool"),
        (
            partial(Failing, what="refuses"),
            "Replicate",
            "hangs",
            "refuses on rank 1, others hang: ValueError: r",
        ),
        (partial(Failing, what="fails"), "Replicate", "crashes", "rank 1: RuntimeError: "),
        (refuse, "whole", "refuses", "RuntimeError: nothing is supported"),
        (partial(refuse, kind=AssertionError), "whole", "crashes", "AssertionError: nothing is supported"),
        (Gathering, "fully_shard, heads", "not applicable", "make has no argument views"),
    ],
)
def test_faults_are_found(ranks, monkeypatch, make, situation, verdict, detail):
    monkeypatch.setattr(optimizers, "GRACE", 0.5)
    (row,) = check_optimizer(make, [situation], timeout=1 if "no answer" in detail else 60, ranks=ranks)
    assert row.verdict == verdict, row
    assert detail in row.detail


def test_the_pool_is_replaced_after_a_hang(monkeypatch):
    monkeypatch.setattr(optimizers, "GRACE", 0.5)
    rows = check_optimizer(partial(Failing, what="dies"), ["DDP", "whole"], timeout=5)
    assert [(row.verdict, row.detail) for row in rows][1] == ("wrong", "no weight moves")
    with pytest.raises(AssertionError, match=r"2 of 2 situations are faulty\nsituation .*\nDDP +crashes"):
        rows.assert_conforms()


def test_the_table():
    table = Conformance([Row("whole", "same bits", 0.0, 0.02, 0.0), Row("DDP", "refuses", detail="no")])
    assert str(table).splitlines() == [
        "situation  verdict    update error  rounding  scale error  detail",
        "whole      same bits  0             2.0e-02   0",
        "DDP        refuses                                         no",
    ]
    assert table.rows[1]["verdict"] == "refuses"
    table.assert_conforms()
    with pytest.raises(AssertionError, match="DDP"):
        table.assert_conforms(allow_refusals=False)
    with pytest.raises(
        AssertionError, match=r"none of 1 situations was compared\nsituation .*\nDDP +refuses"
    ):
        Conformance(table[1:]).assert_conforms()


def test_what_cannot_be_run_is_refused():
    with pytest.raises(ConfigError, match="situation 'none', expected one of 'whole', 'polar factor', "):
        check_optimizer(Gathering, "none")
    with pytest.raises(ConfigError, match="cannot import make; expected a module-level function or class"):
        check_optimizer(lambda model: Gathering(model), ["whole"])


@pytest.mark.slow
def test_the_script_of_the_page_prints_its_table(tmp_path):
    page = (ROOT / "docs" / "conformance.md").read_text()
    (script,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "script.py").write_text(script)
    status, out, err = run(sys.executable, str(tmp_path / "script.py"), cwd=tmp_path)
    assert status == 1
    assert "1 of 3 situations are faulty" in err
    verdicts = [
        re.findall(r"^ *(.+?)  +(same bits|equal up to rounding|wrong) ", t, re.MULTILINE)
        for t in (out, page)
    ]
    assert verdicts[0] == verdicts[1]
    assert len(verdicts[0]) == 3


def make_adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def test_an_elementwise_optimizer_conforms_in_the_general_part(ranks):
    names = ["polar factor", "fully_shard on 3 ranks", "Shard(0), two learning rates"]
    (row,) = rows = check_optimizer(make_adamw, names, orthogonal=False, ranks=ranks)
    assert (row.situation, row.verdict) == ("fully_shard on 3 ranks", "same bits")
    rows.assert_conforms(allow_refusals=False)
