# SPDX-License-Identifier: MIT
"""Recorded steps: what they hold, on one rank and on several, and what recording leaves behind."""

import copy
import io
import json
import re
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from commands import lesson
from fake_data import fashion_mnist
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from torchpar import exact
from torchpar.data import samples
from torchpar.errors import ConfigError
from torchpar.nn import MLP
from torchpar.parallel import join_world
from torchpar.parallel.split import shared_memory
from torchpar.training import FusedGradients, fused, profile
from torchpar.training.profile import replaying
from torchpar.training.profile.record import Call, RankRecord, Span, Step
from torchpar.training.profile.recorded_ranks import KINDS, Box, RankSteps, RecordedStep, innermost
from torchpar.training.profile.replay_trace import from_records, recording

Recorded = dict[str, Any]
SIZES = [20, 30, 30, 5]
STEPS = 10  # that `replay` needs for all of its records


def batch(size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(size, SIZES[0]), torch.arange(size) % SIZES[-1]


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int = STEPS) -> None:
    x, labels = batch()
    for _ in range(steps):
        cross_entropy(model(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()


def read(page: Path) -> Recorded:
    recorded: Recorded = json.loads(page.with_suffix(".json").read_text())
    return recorded


def boxes(found: Recorded, step: int = 0, rank: int = 0, tid: int = 0) -> list[Recorded]:
    """The boxes of a rank in a step, in the order of their beginnings."""
    start, end = found["otherData"]["steps"][step]
    kept = [
        e
        for e in found["traceEvents"]
        if e["ph"] == "X" and (e["pid"], e["tid"]) == (rank, tid) and start <= e["ts"] <= end
    ]
    return sorted(kept, key=lambda e: (e["ts"], -e["dur"]))


def table(found: Recorded, title: str) -> list[dict[str, str]]:
    (one,) = [t for t in found["otherData"]["tables"] if t["title"].startswith(title)]
    return [dict(zip(one["columns"], row, strict=True)) for row in one["rows"]]


def test_a_loop_of_ones_own_is_recorded_by_two_lines(tmp_path):
    torch.manual_seed(0)
    model = MLP(SIZES)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    page = tmp_path / "step.html"
    with profile.replay(page, model, optimizer):
        train(model, optimizer)
    assert "<svg" in page.read_text()
    found = read(page)
    assert len(found["otherData"]["steps"]) == 3
    for step in range(3):
        shown = boxes(found, step)
        assert [(e["cat"], e["name"]) for e in shown] == [
            *(("forward", f"layers.{i}") for i in range(3)),
            ("loss", "loss"),
            *(("backward", f"layers.{i}") for i in (2, 1, 0)),
            ("optimizer", "step"),
        ]
        for one, after in pairwise(shown):
            assert one["ts"] + one["dur"] <= after["ts"] + 0.11  # they are rounded to 0.1 µs
    first, last = shown[0]["args"], shown[5]["args"]
    assert first["text"].endswith(
        "On this rank: x (16, 20), W (30, 20), b (30,), y (16, 30). x needs no gradient."
    )
    assert "dL/dW = (dL/dz)ᵀ·x" in last["text"]
    assert ["dL/dx" in e["args"]["text"] for e in shown[4:7]] == [True, True, False]
    here = Path(__file__).read_text().splitlines()
    for args, call in ((first, "model(x)"), (last, ".backward()")):
        name, number = args["line"].rsplit(":", 1)
        assert name.endswith("test_replay.py")
        assert call in here[int(number) - 1]
        assert [int(number), here[int(number) - 1]] in found["otherData"]["sources"][name]
        assert f'<span id="{args["line"]}">' in page.read_text()


def test_memory_follows_the_passes(tmp_path):
    model = MLP(SIZES)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with profile.replay(tmp_path / "step.html", model, optimizer):
        train(model, optimizer)
    found = read(tmp_path / "step.html")
    start, end = found["otherData"]["steps"][0]
    counters = [
        e["args"] for e in found["traceEvents"] if e["ph"] == "C" and start <= e["ts"] <= end
    ]
    assert next(e for e in found["traceEvents"] if e["ph"] == "C")["ts"] == 0.0
    weights = 4 * sum(p.numel() for p in model.parameters())
    assert {c["weights"] for c in counters} == {c["optimizer"] for c in counters} == {weights}
    kept = [c["activations"] for c in counters]
    assert kept[0] == 0
    assert max(kept) >= 4 * 16 * (20 + 30 + 30)  # the inputs of three layers
    assert kept[-1] < max(kept)
    gradients = [c["gradients"] for c in counters]
    assert gradients[0] == 0
    assert gradients[-1] == weights
    (row,) = table(found, "Bytes")
    assert row["activations"] == f"{max(kept):,}"


def test_the_times_add_up(tmp_path):
    model = MLP(SIZES)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with profile.replay(tmp_path / "step.html", model, optimizer):
        train(model, optimizer)
    found = read(tmp_path / "step.html")
    (row,) = table(found, "Milliseconds")
    columns = {KINDS[kind][0]: kind for kind in KINDS}
    for name, kind in columns.items():
        if kind != "message":
            ms = sum(e["dur"] for e in boxes(found) if e["cat"] == kind) / 1e3
            assert float(row[name]) == pytest.approx(ms, abs=2e-3)
    parts = [float(row[name]) for name in row if name not in ("rank", "sum")]
    start, end = found["otherData"]["steps"][0]
    assert sum(parts) == pytest.approx(float(row["sum"]), abs=0.01)
    assert float(row["sum"]) == pytest.approx((end - start) / 1e3, abs=2e-3)


def test_recording_leaves_nothing_behind_and_the_same_weights(tmp_path):
    backward, watch = getattr(torch.autograd, replaying._ENGINE), fused.watch
    weights = []
    for records in (False, True):
        torch.manual_seed(0)
        model = MLP(SIZES)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        if records:
            with profile.replay(tmp_path / "step.html", model, optimizer):
                train(model, optimizer, STEPS + 3)
        else:
            train(model, optimizer, STEPS + 3)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)
    assert getattr(torch.autograd, replaying._ENGINE) is backward
    assert fused.watch is watch
    assert all("forward" not in vars(layer) for layer in model.modules())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_an_error_of_the_loop_is_the_users_and_ends_the_recording(tmp_path):
    model = MLP(SIZES)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def fails() -> None:
        with profile.replay(tmp_path / "step.html", model, optimizer):
            train(model, optimizer, 4)  # the next one would be recorded
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert all("forward" not in vars(layer) for layer in model.modules())
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("steps, recorded", [(4, 0), (5, 1), (7, 2), (9, 3), (20, 3)])
def test_a_short_loop_has_fewer_records(steps, recorded, tmp_path):
    model = MLP(SIZES)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    page = tmp_path / "new" / "step.html"
    if not recorded:
        with (
            pytest.raises(ConfigError, match=r"nothing was recorded, no more than 4 steps were"),
            profile.replay(page, model, optimizer),
        ):
            train(model, optimizer, steps)
        assert not page.exists()
        return
    with profile.replay(page, model, optimizer):
        train(model, optimizer, steps)
    assert len(read(page)["otherData"]["steps"]) == recorded


def test_a_page_has_a_pages_name(tmp_path):
    model = MLP(SIZES)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with (
        pytest.raises(ConfigError, match=r"step.json, expected a name that ends with .html"),
        profile.replay(tmp_path / "step.json", model, optimizer),
    ):
        pass


class Twice(torch.nn.Module):
    """A layer that is called twice, one without parameters, one that is frozen, and no call of a
    fourth."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(20, 20)
        self.relu = torch.nn.ReLU()
        self.frozen = torch.nn.Linear(20, 5).requires_grad_(False)
        self.unused = torch.nn.Linear(1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frozen(self.relu(self.inner(self.inner(x))))


def test_layers_of_any_kind(tmp_path):
    model = Twice()
    optimizer = torch.optim.AdamW(model.parameters())
    x, labels = batch()
    with profile.replay(tmp_path / "step.html", model, optimizer):
        for _ in range(STEPS):
            cross_entropy(model(x), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                model(x)  # an evaluation, which is not recorded
    shown = [(e["cat"], e["name"]) for e in boxes(read(tmp_path / "step.html"))]
    assert shown == [
        ("forward", "inner (0)"),
        ("forward", "inner (1)"),
        ("forward", "relu"),
        ("forward", "frozen"),
        ("loss", "loss"),
        ("backward", "inner (0)"),  # its gradient is there when both calls have added theirs
        ("optimizer", "step"),
    ]


def test_gradients_by_hand_have_layers_too(tmp_path):
    model = MLP(SIZES)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    gradients = FusedGradients(model)
    x, labels = batch()
    with profile.replay(tmp_path / "step.html", model, optimizer):
        for _ in range(STEPS):
            gradients(x, labels, len(x))
            optimizer.step()
            optimizer.zero_grad()
    shown = [(e["cat"], e["name"]) for e in boxes(read(tmp_path / "step.html"))]
    assert shown == [
        *(("forward", f"layers.{i}") for i in range(3)),
        ("loss", "loss"),
        *(("backward", f"layers.{i}") for i in (2, 1, 0)),
        ("optimizer", "step"),
    ]


def names_of(found: Recorded, kind: str) -> list[str]:
    return [e["name"] for e in boxes(found) if e["cat"] == kind]


def recorded(page: Path, model: torch.nn.Module, **kwargs: Any) -> Recorded:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with profile.replay(page, model, optimizer):
        train(model, optimizer, **kwargs)
    return read(page)


class Attends(torch.nn.Module):
    """Attention, whose weights are in part its own and in part a module's."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(20, 2)
        self.last = torch.nn.Linear(20, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.attention(x, x, x, need_weights=False)[0]
        z: torch.Tensor = self.last(y)
        return z


def test_modules_that_compute_with_weights_of_their_own_are_layers(tmp_path):
    found = recorded(tmp_path / "step.html", Attends())
    assert names_of(found, "forward") == ["attention", "last"]
    assert names_of(found, "backward") == ["last", "attention.out_proj", "attention"]


class Frozen(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = torch.nn.Linear(20, 20)
        self.head = torch.nn.Linear(20, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = self.features(x)
        y: torch.Tensor = self.head(x)
        return y


def test_a_part_without_gradients_has_its_own_box(tmp_path):
    found = recorded(tmp_path / "step.html", Frozen())
    assert names_of(found, "forward") == ["features", "head"]


def test_where_no_layer_is_seen_a_pass_is_one_box(tmp_path):
    model = MLP(SIZES)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x, labels = batch()
    with profile.replay(tmp_path / "step.html", compiled, optimizer):
        for _ in range(STEPS):
            loss = cross_entropy(compiled(x), labels)
            gradients = torch.autograd.grad(loss, [*model.parameters()])
            for p, gradient in zip(model.parameters(), gradients, strict=True):
                p.grad = gradient
            optimizer.step()
    found = read(tmp_path / "step.html")
    shown = [(e["cat"], e["name"]) for e in boxes(found)]
    assert shown == [
        ("forward", "the model"),
        ("loss", "loss"),
        ("backward", "the model"),
        ("optimizer", "step"),
    ]


def test_exact_arithmetic_is_recorded(tmp_path):
    """It replaces functions of autograd by copies, which are made when the mode is entered."""
    model = MLP(SIZES)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, labels = batch()
    with profile.replay(tmp_path / "step.html", model, optimizer):
        for _ in range(STEPS):
            with exact.mode():
                cross_entropy(model(x), labels).backward()
                optimizer.step()
                optimizer.zero_grad()
    found = read(tmp_path / "step.html")
    assert names_of(found, "backward") == ["layers.2", "layers.1", "layers.0"]


def test_all_batches_of_a_step_are_recorded(tmp_path):
    model = MLP(SIZES)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, labels = batch()
    with profile.replay(tmp_path / "step.html", model, optimizer):
        for _ in range(STEPS):
            for _ in range(2):
                began = time.perf_counter()
                if samples.watch is not None:  # as batches of torchpar.data do
                    samples.watch(began)
                cross_entropy(model(x), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    found = read(tmp_path / "step.html")
    assert names_of(found, "data") == ["batch", "batch"]
    assert names_of(found, "loss") == ["loss", "loss"]
    assert names_of(found, "forward") == [f"layers.{i} ({n})" for n in (0, 1) for i in range(3)]


def test_copies_of_a_recorded_model_are_models(tmp_path):
    model = MLP(SIZES)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, _ = batch()
    copies = []
    with profile.replay(tmp_path / "step.html", model, optimizer):
        for _ in range(STEPS):
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            pair = copy.deepcopy(model), torch.load(file, weights_only=False)
            copies.append((pair, model(x).detach()))
            train(model, optimizer, 1)
    for pair, expected in copies:
        for one in pair:
            assert torch.equal(one(x), expected)
    assert not torch.equal(copies[0][1], copies[-1][1])


def test_one_recording_at_a_time(tmp_path):
    backward = getattr(torch.autograd, replaying._ENGINE)
    model = MLP(SIZES)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with profile.replay(tmp_path / "step.html", model, optimizer):
        train(model, optimizer, 3)
        with (
            pytest.raises(ConfigError, match="another recording is active, expected one at a time"),
            profile.replay(tmp_path / "inner.html", model, optimizer),
        ):
            pass
        train(model, optimizer)
    assert getattr(torch.autograd, replaying._ENGINE) is backward
    assert names_of(read(tmp_path / "step.html"), "forward") == [f"layers.{i}" for i in range(3)]
    assert recorded(tmp_path / "after.html", model)


def test_sparse_gradients_have_bytes(tmp_path):
    model = torch.nn.Embedding(50, 8, sparse=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    page = tmp_path / "step.html"
    with profile.replay(page, model, optimizer):
        for _ in range(STEPS):
            model(torch.arange(4)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    (row,) = table(read(page), "Bytes")
    assert int(row["gradients"]) == 4 * (8 * 4 + 8)  # float32 values of rows, and int64 indices


def test_a_page_that_cannot_be_written_is_refused_before_training(tmp_path):
    model = MLP(SIZES)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match=r"cannot be written .* another place by replay's path"),
        profile.replay(tmp_path / "file" / "step.html", model, optimizer),
    ):
        pytest.fail("the block runs")


def test_the_same_steps_of_all_ranks_lie_side_by_side():
    def rank(n: int, steps: int) -> RankSteps:
        began = [float(i) for i in range(steps)]
        made = [RecordedStep(t, t + 0.5, [Box("forward", "a", t, t + 0.5)], []) for t in began]
        return RankSteps(n, {}, {}, (), made, {})

    found = recording([rank(0, 2), rank(1, 3)])
    lengths = [end - begin for begin, end in found["otherData"]["steps"]]
    assert lengths == [500_000, 500_000]


# Several ranks


def waits_patched(page: Path) -> tuple[bool, bool, bool]:
    """Whether PyTorch's wait is patched before, in the last step of a recording, and after it."""
    wait = dist.Work.wait
    with join_world("cpu") as world:
        model = MLP(SIZES)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with profile.replay(page, model, optimizer, world):
            train(model, optimizer, STEPS - 2)
            during = dist.Work.wait is not wait
            train(model, optimizer, 1)
            after = dist.Work.wait is not wait
        return during, after, dist.Work.wait is not wait


def test_nothing_is_watched_after_the_last_record(ranks, tmp_path):
    assert ranks(2, waits_patched, tmp_path / "step.html") == [(True, False, False)] * 2


def sharded(page: Path) -> None:
    torch.manual_seed(0)
    with join_world("cpu") as world:
        model = MLP(SIZES)
        for layer in model.layers:
            fully_shard(layer, mesh=world.mesh["dp"])
        fully_shard(model, mesh=world.mesh["dp"])
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with profile.replay(page, model, optimizer, world):
            train(model, optimizer)


def test_divided_weights_are_counted_and_named_as_such(ranks, tmp_path):
    page = tmp_path / "step.html"
    ranks(2, sharded, page)
    found = read(page)
    count = sum(p.numel() for p in MLP(SIZES).parameters())
    gradients = [int(row["gradients"].replace(",", "")) for row in table(found, "Bytes")]
    assert sum(gradients) == pytest.approx(4 * count, rel=0.01)  # rows of two ranks
    gathered = [e["args"] for e in boxes(found, tid=1) if e["args"]["operation"] == "all_gather"]
    assert gathered
    assert not any("gradient" in one["tensor"] for one in gathered)


def averaged(page: Path, late: float = 0.0, shares: bool = False) -> Counter[tuple[str, int]]:
    """Record DistributedDataParallel, and return this rank's messages in a step.

    Args:
        late: seconds that rank 1 sleeps before its backward pass.
        shares: whether gradients are added through shared memory.
    """
    torch.manual_seed(0)
    with join_world("cpu") as world:
        model = MLP([20, 600, 600, 5])  # the last layers' gradients fill a bucket
        replica = DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=1)
        if shares:
            shared_memory.register_shared_memory_hook(replica, world)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        x, labels = batch()
        with profile.replay(page, model, optimizer, world):
            for _ in range(STEPS):
                loss = cross_entropy(replica(x), labels)
                time.sleep(late * world.rank)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        found = read(page) if world.rank == 0 else None
        shown = [found]
        dist.broadcast_object_list(shown)
        mine = boxes(shown[0], rank=world.rank, tid=1)
        return Counter((e["args"]["operation"], e["args"]["bytes"]) for e in mine)


def test_buckets_and_who_waits_for_whom(ranks, tmp_path):
    page = tmp_path / "step.html"
    counted = ranks(2, averaged, page, 0.3)  # far above what a busy machine delays rank 0
    assert counted[0] == counted[1]
    gradients = 4 * (20 * 600 + 600 + 600 * 600 + 600 + 600 * 5 + 5)
    assert sum(n * count for (_, n), count in counted[0].items()) == gradients
    assert counted[0].total() == 2
    found = read(page)
    ids = [[e["args"]["id"] for e in boxes(found, rank=rank, tid=1)] for rank in range(2)]
    assert sorted(ids[0]) == sorted(ids[1])
    texts = [e["args"]["tensor"] for e in boxes(found, tid=1)]
    assert any("gradient of layers.2.weight" in text for text in texts)
    (wait,) = [e for e in boxes(found) if e["cat"] == "wait"]
    assert wait["dur"] >= 40_000
    text = wait["args"]["text"]
    assert re.match(r"Rank 0 waits in this all_reduce \(.*\) until rank 1 begins it, \d+", text)
    assert "Until then rank 1 is mostly in " in text
    rows = table(found, "Milliseconds")
    assert float(rows[0]["waiting for a message"]) > 40 > float(rows[1]["waiting for a message"])
    (bound,) = [r for r in found["otherData"]["remarks"] if "that bounds the step most" in r]
    assert "rank 0 waits" in bound
    assert re.search(r"Rank 1 begins it \d+\.\d+ ms after that wait began", bound)
    assert "All ranks run on one machine and read its one clock." in found["otherData"]["about"]


def test_sums_through_shared_memory_are_messages(ranks, tmp_path):
    if not shared_memory.SUPPORTED:
        pytest.skip("this processor's sums are not added through shared memory")
    page = tmp_path / "step.html"
    counted = ranks(2, averaged, page, 0.0, True)
    assert counted[0] == counted[1]
    assert {operation for operation, _ in counted[0]} == {"all_reduce"}
    waits = [e for e in boxes(read(page)) if e["cat"] == "wait"]
    assert len(waits) == counted[0].total()


def test_the_counts_are_those_of_collectives(ranks, tmp_path):
    pytest.importorskip("tyro", reason="tyro reads the flags")
    root = fashion_mnist(tmp_path, train=600, test=100)
    flags = "--dataset fashion-mnist --hidden 24 --epochs 1 --batch-size 48 --device cpu"
    common = [*flags.split(), "--data", str(root)]
    page = tmp_path / "step.html"
    for name in ("train_ddp", "train_tensor_parallel", "train_pipeline"):
        (code, out, err), _ = ranks(2, lesson, name, *common, "--replay", str(page))
        assert code == 0, err
        assert f"replay: {page}\n" in out
        (code, out, err), _ = ranks(2, lesson, name, *common, "--collectives")
        assert code == 0, err
        for row in table(read(page), "Messages"):
            if row["rank"] == "0":
                cells = [row[name] for name in ("dimension", "operation", "count", "bytes")]
                lines = [line.replace("│", "").split() for line in out.splitlines()]
                assert cells in [line[:4] for line in lines], out


def test_a_pipeline_keeps_what_its_schedule_says(ranks, tmp_path):
    """gpipe keeps the activations of all micro-batches, and 1f1b those of two, on rank 0 of 2."""
    pytest.importorskip("tyro", reason="tyro reads the flags")
    root = fashion_mnist(tmp_path, train=800, test=100)
    flags = "--dataset fashion-mnist --hidden 24 --epochs 1 --batch-size 80 --device cpu"
    most = {}
    for schedule in ("gpipe", "1f1b"):
        page = tmp_path / f"{schedule}.html"
        given = [*flags.split(), "--data", str(root), "--pipeline", schedule]
        (code, _, err), _ = ranks(2, lesson, "train_pipeline", *given, "--replay", str(page))
        assert code == 0, err
        found = read(page)
        most[schedule] = int(table(found, "Bytes")[0]["activations"].replace(",", ""))
        names = [e["name"] for e in boxes(found) if e["cat"] == "forward"]
        assert names == [f"layers.0 ({i})" for i in range(4)]
        received = [e["args"] for e in boxes(found, rank=1, tid=1) if e["args"]["role"] == "recv"]
        assert [one["tensor"] for one in received] == [
            f"the output of layers.0, (20, 24) of micro-batch {i}" for i in range(4)
        ]
        assert sum(e["cat"] == "loss" for e in boxes(found, rank=1)) == 4
        assert any("The bubble is" in remark for remark in found["otherData"]["remarks"])
        (kept,) = [one for one in found["otherData"]["remarks"] if one.startswith("Activations")]
        counts = [4, 4] if schedule == "gpipe" else [2, 1]
        assert re.findall(r"at most (\d) micro", kept) == [str(count) for count in counts]
    assert most["gpipe"] == 2 * most["1f1b"]


class Summed(torch.nn.Module):
    """A layer whose output is added over the ranks by a functional collective, after a while."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(20, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from torch.distributed._functional_collectives import all_reduce

        y = self.inner(x)
        time.sleep(0.02 * dist.get_rank())
        with torch.no_grad():
            total = all_reduce(y.detach(), "sum", dist.group.WORLD)
            return y + (total - y)


def functional(page: Path) -> None:
    with join_world("cpu") as world:
        model = Summed()
        with profile.replay(page, model, torch.optim.SGD(model.parameters(), 0.1), world) as one:
            x, labels = batch()
            for _ in range(STEPS):
                cross_entropy(model(x) + 0 * model.inner(x), labels).backward()
                one._optimizer.step()


def test_a_wait_for_a_functional_collective_is_seen(ranks, tmp_path):
    ranks(2, functional, tmp_path / "step.html")
    (wait,) = [e for e in boxes(read(tmp_path / "step.html")) if e["cat"] == "wait"]
    assert wait["dur"] > 10_000
    assert "until rank 1 begins it" in wait["args"]["text"]


# Clocks


def compared_clocks(ahead: float) -> tuple[float, float]:
    """The offset of this rank's clock, which is ``ahead`` by some seconds on rank 1."""
    with join_world("cpu") as world:
        clock = time.perf_counter
        moved = ahead * world.rank
        with patch.object(replaying.time, "perf_counter", lambda: clock() + moved):
            return replaying._clock_offset(f"machine {world.rank}")


def test_clocks_of_machines_are_compared(ranks):
    (first, second) = ranks(2, compared_clocks, 5.0)
    assert first == (0.0, 0.0)
    offset, error = second
    assert 0 < error < 1
    assert abs(offset + 5) <= error


# Programs without PyTorch


def record_of(rank: int, start: float) -> RankRecord:
    spans = [
        Span("data", 0.0, 0.1),
        Span("forward", 0.1, 0.3),
        Span("collectives", start, 0.6),
        Span("optimizer", 0.6, 1.0),
    ]
    step = Step(spans, [Call("dp", "Allreduce", 80, start, 0.6 - start)])
    return RankRecord(rank, {"host": "a", "processor": "P"}, {}, [step])


def test_the_innermost_box_counts():
    """Boxes within boxes, some of which begin or end together, or reach over the limits."""
    spans = {"a": (0, 10), "b": (2, 6), "c": (2, 4), "d": (5, 6), "e": (12, 20)}
    boxes = [Box("forward", name, *map(float, span)) for name, span in spans.items()]
    step = RecordedStep(0.0, 20.0, boxes[::-1], [])
    found = [
        (box.name if box else "", start, end) for box, start, end in innermost(step, (1.0, 15.0))
    ]
    assert found == [
        ("a", 1, 2),
        ("c", 2, 4),
        ("b", 4, 5),
        ("d", 5, 6),
        ("a", 6, 10),
        ("", 10, 12),
        ("e", 12, 15),
    ]


def test_records_of_phases_become_a_recording():
    found = recording(from_records([record_of(0, 0.3), record_of(1, 0.5)]))
    rows = table(found, "Milliseconds")
    assert [row["waiting for a message"] for row in rows] == ["300.000", "100.000"]
    assert [row["other code"] for row in rows] == ["0.000", "200.000"]
    assert [row["before and after its part"] for row in rows] == ["0.000", "0.000"]
    (wait,) = [e for e in boxes(found) if e["cat"] == "wait"]
    assert wait["args"]["text"] == (
        "Rank 0 waits in this Allreduce (80 bytes) until rank 1 begins it, 200.000 ms later. Until "
        "then rank 1 is mostly in other code (200.000 ms). From then on the message takes "
        "100.000 ms."
    )
