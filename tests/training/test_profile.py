# SPDX-License-Identifier: MIT
"""Traces of the training lessons; phases, memory and records of a step."""

import gzip
import json
import re
from pathlib import Path

import pytest
import torch
from commands import lesson, rows_of
from fake_data import fashion_mnist

from torchpar.data import Samples, batches
from torchpar.parallel.split.shared_memory import TRACED_AS
from torchpar.training.profile.phases import Phases, phase
from torchpar.training.profile.record import Call, RankRecord, Span, Step, timeline
from torchpar.training.profile.recorder import Recorder
from torchpar.training.profile.step_memory import Memory

PRODUCT = r"aten::(add)?mm|mkldnn::_linear_pointwise"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    """Flags of two epochs of twelve steps; the tenth traced step is in the second epoch.

    With 64 units the products stay among the ten costliest operators on a busy machine too.
    """
    pytest.importorskip("tyro", reason="tyro reads the flags")
    root = fashion_mnist(tmp_path_factory.mktemp("data"), train=600, test=100)
    flags = (
        "--dataset fashion-mnist --hidden 64 --device cpu --epochs 2 --batch-size 50 --schedule "
        "constant"
    )
    return [*flags.split(), "--data", str(root)]


def names_in(path: Path) -> list[str]:
    with gzip.open(path, "rt") as file:
        return [event["name"] for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]


def test_a_profiled_run_has_the_same_bits(ranks, data, tmp_path):
    losses, profiles = [], tmp_path / "profiles"
    for added in ([], ["--profile", str(profiles)]):
        flags = [*data, "--phases", "--collectives", "--metrics", str(tmp_path / "metrics"), *added]
        (code, out, err), _ = ranks(2, lesson, "train_ddp", *flags)
        assert code == 0, err
        assert ("costliest operators of rank 0\n" in out) == bool(added)
        losses.append(
            [(row["train_loss"], row["test_loss"]) for row in rows_of(tmp_path / "metrics")]
        )
    assert losses[0] == losses[1]
    for rank in range(2):
        names = names_in(profiles / f"rank-{rank}.json.gz")
        assert TRACED_AS in names
        assert any(re.fullmatch(PRODUCT, one) for one in names)
        assert sum(name.startswith("ProfilerStep#") for name in names) == 10
    # Which operators cost the most depends on the machine and its load.
    table = out.partition("costliest operators of rank 0\n")[2]
    listed = re.findall(r"^ *(\S.*?)  +\d", table, re.MULTILINE)
    assert len(listed) == 10
    assert {*listed} & {*names_in(profiles / "rank-0.json.gz")}


def test_a_step_is_divided_at_its_backward_pass(monkeypatch):
    now = 1000.0

    def spend(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr("torchpar.training.profile.phases.time.perf_counter", lambda: now)
    x, backward = torch.ones(1, requires_grad=True), torch.Tensor.backward
    with Phases(torch.device("cpu")) as phases:
        (x * 2).backward()  # outside of a step
        for _ in phases.steps(map(spend, [5.0, 5.0])):
            spend(1.0)
            with phase("collectives"):
                spend(0.5)
            loss = x * 2
            loss.register_hook(lambda g: spend(3.0))
            loss.backward()
            phase("collectives")(spend)(0.25)
            named = torch.profiler.record_function
            with named("collectives"), named("Optimizer.step"):  # which is no phase
                spend(0.25)
            spend(2.0)
    expected = {"data": 10.0, "forward": 2.0, "backward": 6.0, "collectives": 2.0, "optimizer": 4.0}
    assert phases.seconds == {"pipeline": 0.0, **expected}
    assert not phases.recorded  # the first two steps set up
    assert torch.Tensor.backward is backward


def test_memory_counts_each_tensor_once_and_until_autograd_lets_go_of_it():
    """Sigmoids keep their outputs, linear layers their inputs; float64, and momentum of the
    weights' size."""
    layers = torch.nn.Linear(5, 4), torch.nn.Sigmoid(), torch.nn.Linear(4, 3)
    model = torch.nn.Sequential(*layers).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    memory = Memory(model, optimizer)
    weights = 8 * (5 * 4 + 4 + 4 * 3 + 3)
    assert memory.measured() == {
        "weights": weights,
        "gradients": 0,
        "optimizer": 0,
        "activations": 0,
    }
    batch = torch.randn(8, 5, dtype=torch.float64)
    for _ in range(3):  # the same in each step
        with memory.measure():
            for x in batch.split(4):  # parts of one memory
                model(x).sum().backward()
        optimizer.step()
    kept = 4 * (5 + 4) * 8
    expected = {"weights": weights, "gradients": weights, "optimizer": weights, "activations": kept}
    assert memory.measured() == expected
    with memory.measure():
        model(batch)  # a larger batch, of which no step is made
    assert memory.measured()["activations"] == 2 * kept
    with memory.measure():
        losses = [model(x).sum() for x in batch.split(2)]  # four at a time, as in gpipe
        sum(losses).backward()
    assert memory.measured()["activations"] == 2 * kept


HERE = {"host": "here"}


def record(rank: int, *steps: Step, machine: dict[str, str] = HERE) -> RankRecord:
    return RankRecord(rank, machine, {}, steps, {"dp": rank})


def test_a_timeline_has_each_moment_once_and_idle_where_a_rank_waits():
    """Rank 1 begins later, so that rank 0 waits in the all-reduce; then rank 1 in the pipeline."""
    first = Step(
        [Span("forward", 10, 12), Span("collectives", 13, 16), Span("backward", 12, 17)],
        [Call("dp", "all_reduce", 8, 13.0, 3.0)],
    )
    second = Step(
        [Span("forward", 11, 14), Span("collectives", 15, 16), Span("pipeline", 14, 18)],
        [Call("dp", "all_reduce", 8, 15.0, 1.0)],
    )
    found = timeline([record(0, first), record(1, second)])
    assert found is not None
    assert (found.number, found.steps, found.seconds) == (1, 1, 8)
    assert found.ranks == [
        [
            ("forward", 0, 2),
            ("backward", 2, 3),
            ("idle", 3, 5),
            ("collectives", 5, 6),
            ("backward", 6, 7),
            ("idle", 7, 8),
        ],
        [("idle", 0, 1), ("forward", 1, 4), ("idle", 4, 5), ("collectives", 5, 6), ("idle", 6, 8)],
    ]
    apart = timeline([record(0, first), record(1, second, machine={"host": "there"})])
    assert apart is not None
    assert apart.seconds == 7  # each rank by its clock
    assert [spans[0] for spans in apart.ranks] == [("forward", 0, 2), ("forward", 0, 3)]
    assert timeline([record(0, first), record(1)]) is None


def test_the_timeline_is_of_the_median_step():
    steps = [
        Step([Span("forward", start, start + long)]) for start, long in ((0, 5), (9, 1), (20, 3))
    ]
    found = timeline([record(0, *steps)])
    assert found is not None
    assert (found.number, found.seconds) == (3, 3)


def test_messages_of_a_step_are_medians_by_dimension_and_operation():
    def step(nbytes: int) -> Step:
        sums = [Call("dp", "all_reduce", nbytes, 0.0, 0.5)] * 2
        return Step([], [*sums, Call("tp", "all_gather", 1, 0.0, 0.1)])

    measured = record(0, step(4), step(6), step(1500))
    found = measured.messages()
    assert found == [("dp", "all_reduce", 2, 12, 1.0), ("tp", "all_gather", 1, 1, 0.1)]
    assert [list(row.values()) for row in measured.message_rows()] == [
        ["dp", "all_reduce", "2", "12", "1000.000"],
        ["tp", "all_gather", "1", "1", "100.000"],
    ]


def test_a_recorder_measures_memory_in_the_first_step_and_times_from_the_third_on():
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(3, 4)
    with Recorder(model, optimizer) as recorder:
        for _ in recorder.steps(range(5)):
            model(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            torch.ones(1, requires_grad=True).exp().backward()  # no part of a step
    (found,) = recorder.gather()
    weights = 4 * (4 * 2 + 2)
    peak = found.memory["process, peak"]
    assert found.memory == {
        "weights": weights,
        "gradients": weights,
        "optimizer": weights,
        "activations": x.nbytes,
        "process, peak": peak,
    }
    assert peak > 1e7
    names = [[span.name for span in step.spans] for step in found.steps]
    assert names == [["data", "forward", "backward", "optimizer"]] * 3
    assert found.machine["torch"] == torch.__version__.partition("+")[0]


def test_a_recorder_follows_the_batches_of_torchpar(monkeypatch):
    """Also small ones, several of which are read together; making the first takes the time."""
    now = 1000.0

    def spend(seconds: float) -> None:
        nonlocal now
        now += seconds

    def share(indices: torch.Tensor) -> torch.Tensor:
        spend(1.0)  # for each of the batches that are read together
        return indices

    for module in ("torchpar.data.samples", "torchpar.training.profile.phases"):
        monkeypatch.setattr(f"{module}.time.perf_counter", lambda: now)
    samples = Samples(torch.ones(20, 3), torch.zeros(20, dtype=torch.int64), ("a",))
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: spend(0.25))
    with Recorder(model, optimizer) as recorder:
        for x, _, _ in batches(samples, 4, seed=0, epoch=1, share=share):
            model(x).sum().backward()
            optimizer.step()
            spend(8.0)  # no part of a step
    assert next(iter(batches(samples, 4, seed=0, epoch=1))).global_size == 4  # nothing watches
    found = recorder.record()
    assert (found.seconds["data"], found.seconds["optimizer"]) == (5.0, 5 * 0.25)
    assert [[span.name for span in step.spans] for step in found.steps] == [
        ["data", "forward", "backward", "optimizer"]
    ] * 3


def test_a_recorder_does_not_count_the_batches_of_an_evaluation():
    samples = Samples(torch.ones(20, 3), torch.zeros(20, dtype=torch.int64), ("a",))
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(model, optimizer) as recorder:
        for epoch in (1, 2):
            with torch.no_grad():
                for x, _, _ in batches(samples, 10, seed=0, epoch=epoch):
                    model(x)
            for x, _, _ in batches(samples, 4, seed=0, epoch=epoch):
                model(x).sum().backward()
                optimizer.step()
    found = recorder.record()
    assert [[span.name for span in step.spans] for step in found.steps] == [
        ["data", "forward", "backward", "optimizer"]
    ] * 8  # without two that warm up
    assert found.memory["gradients"] == 16  # of the first step that has any: 4 numbers of 4 bytes


def test_a_loop_that_is_left_early_counts_its_last_step():
    model = torch.nn.Linear(2, 2)
    with Recorder(model, torch.optim.SGD(model.parameters(), 0.1)) as recorder:
        before = recorder.record()
        for number, x in enumerate(recorder.steps(torch.ones(9, 4, 2))):
            model(x).sum().backward()
            if number == 4:
                break
    assert {"gradients", "activations"}.isdisjoint(before.memory)  # of no step
    assert len(recorder.record().steps) == 3  # without the first two
    assert {"gradients", "activations"} <= set(recorder.record().memory)
