# SPDX-License-Identifier: MIT
"""torchpar.exact.record and ``python -m torchpar compare``: planted differences are named."""

import inspect
import json
import runpy
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from nogpu import cuda_is_cpu, emulate
from torchpar import exact
from torchpar.errors import ConfigError
from torchpar.exact.divergence import checksums as of_tensors
from torchpar.exact.divergence import recording
from torchpar.exact.divergence.checksums import (
    COLUMNS,
    WHOLE,
    WORD,
    DeviceRows,
    HostRows,
    share,
)
from torchpar.exact.divergence.compare_runs import main
from torchpar.exact.divergence.recorded_files import read_ranks
from torchpar.parallel import join_world
from torchpar.training import graphed
from torchpar.training.graphed import count_replays

STEPS = 5

# Checksums


def device_sums(tensors: list[Tensor], step: int | None = None) -> list[int]:
    """The checksums that a device computes, on the CPU."""
    rows = DeviceRows(torch.device("cpu"))
    for t in tensors:
        rows.add(t, WHOLE if step is None else share(t.nbytes, step))
    return rows.end_step().checksums().tolist()


def host_sums(tensors: list[Tensor], step: int | None = None) -> list[int]:
    rows = HostRows()
    for t in tensors:
        rows.add(t.data_ptr(), t.nbytes, WHOLE if step is None else share(t.nbytes, step))
    return rows.take().tolist()


def plain_sum(t: Tensor) -> int:
    """The checksum by its definition, in Python's integers."""
    data = t.numpy().tobytes()
    data += b"\0" * (-len(data) % WORD)
    columns = [0] * COLUMNS
    for i in range(len(data) // WORD):
        word = int.from_bytes(data[i * WORD : (i + 1) * WORD], "little")
        columns[i % COLUMNS] = (columns[i % COLUMNS] + word) % 2**64
    if t.nbytes <= WORD:
        return columns[0]
    weights = of_tensors._WEIGHTS.tolist()
    return sum(w * (s ^ (s >> 32)) for w, s in zip(weights, columns, strict=True)) % 2**64


def test_checksums_are_the_same_on_the_host_and_on_a_device():
    torch.manual_seed(0)
    row = COLUMNS * WORD // 4
    sizes = (0, 1, 2, 3, 127, 129, row - 1, row, row + 1, 2 * row, 7 * row + 5)
    tensors = [torch.randn(n) for n in sizes] * 6  # more than the rows that there are at first
    tensors += [torch.randn(5 * row).bfloat16(), torch.rand(3 * row + 1) < 0.5]
    tensors += [torch.randn(3 * row + 1)[1:], torch.randn(row, dtype=torch.complex64)]
    assert host_sums(tensors) == device_sums(tensors)
    for t in [*tensors[: len(sizes)], *tensors[-3:]]:
        assert host_sums([t]) == [plain_sum(t)]


def test_each_bit_counts_and_so_do_places():
    torch.manual_seed(0)
    x = torch.randn(6, 1024)
    flipped = []
    for place in (0, 1, 3000, x.numel() - 1):
        for bit in range(32):
            y = x.clone()
            y.view(torch.int32).view(-1)[place] ^= 1 << bit if bit < 31 else -(2**31)
            flipped.append(y)
    signs = x.clone()
    signs[0, :64:2] *= -1  # an even number of highest bits
    moved = [x.flip(0), x.flip(1), x[torch.tensor([1, 0, 2, 3, 4, 5])]]
    others = [x, -x, signs, *flipped, *moved]
    assert len(set(host_sums(others))) == len(others)
    assert host_sums([x, x.clone()])[0] == host_sums([x])[0]


def test_two_opposite_changes_in_a_column_are_missed():
    """As the module says: a checksum is no proof."""
    words = torch.arange(3 * COLUMNS)
    other = words.clone()
    other[5] += 1
    other[5 + COLUMNS] -= 1
    near = words.clone()
    near[5] += 1
    near[6] -= 1
    first, missed, found = host_sums([words, other, near])
    assert first == missed != found


def test_small_tensors_have_one_share():
    assert share(16 * COLUMNS * WORD, 3) == WHOLE != share(16 * COLUMNS * WORD + 1, 3)


def test_shares_of_a_large_tensor_are_all_of_it():
    shares = 3  # of 16 rows at most
    x = torch.arange(40 * COLUMNS + 3)
    y = x.clone()
    y[[5 * COLUMNS + 7, 30 * COLUMNS]] += 1
    found = [host_sums([y], step) != host_sums([x], step) for step in range(shares)]
    assert [i for i, one in enumerate(found) if one] == [30 % shares, 5 % shares]
    assert all(host_sums([y], step) == device_sums([y], step) for step in range(shares))
    y = x.clone()
    y[-1] += 1  # what is left is always added
    assert all(host_sums([y], step) != host_sums([x], step) for step in range(shares))


# Planted differences


def without_gradient(model: nn.Module) -> None:
    """Let the next backward pass leave a bias without a gradient."""

    def forget(p: Tensor) -> None:
        p.grad = None
        handle.remove()

    handle = model[5].bias.register_post_accumulate_grad_hook(forget)


class Unsure(nn.Module):
    """An operator whose result differs by a bit from run to run, in one step."""

    def __init__(self, at: int | None, backward: bool = False):
        super().__init__()
        self.at, self.backward, self.calls = at, backward, 0

    def forward(self, x: Tensor) -> Tensor:
        y = x.sigmoid()
        differs = self.calls == self.at
        self.calls += 1
        if differs and self.backward:
            y.register_hook(lambda g: g.nextafter(torch.full_like(g, torch.inf)))
        return y + (2**-24 if differs and not self.backward else 0)


def train(
    path: Path,
    *,
    seed: int = 0,
    steps: int = STEPS,
    width: int = 16,
    dropout: float = 0.1,
    unsure: Callable[[int | None], nn.Module] = Unsure,
    at: int | None = None,  # the step in which ``plant`` is called
    plant: Callable[[Any], object] = lambda _: None,
    device: str = "cpu",
    prepare: Callable[[nn.Module], nn.Module] = lambda model: model,
    as_graph: bool = False,
    **options: bool,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Train a small model, and record it."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Linear(8, width), nn.ReLU(inplace=True), nn.BatchNorm1d(width)),
        *(nn.Dropout(dropout), unsure(None), nn.Linear(width, 3)),
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False, capturable=as_graph)
    called = prepare(model)

    def step(x: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(called(x), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    compute = graphed(step, optimizer) if as_graph else step
    with exact.record(path, **options):
        for i in range(steps):
            torch.manual_seed(i)
            batch = {"x": torch.rand(6, 8), "labels": torch.arange(6) % 3}
            if i == at:
                plant((model, optimizer, batch))
            compute(*(t.to(device) for t in batch.values()))
    return model, optimizer


def flip_a_bit(model: nn.Module) -> None:
    with torch.no_grad():
        next(model[5].parameters()).view(torch.int32)[1, 2] ^= 1


PLANTED: dict[str, tuple[dict[str, Any], str]] = {
    "another seed": ({"seed": 1}, "parted in step 0: weight 0.weight"),
    "a bit of a weight": (
        {"at": 3, "plant": lambda run: flip_a_bit(run[0])},
        "parted in step 3: weight 5.weight",
    ),
    "a buffer": (
        {"at": 2, "plant": lambda run: run[0][2].running_var.mul_(1.5)},
        "parted in step 2: weight 2.running_var",
    ),
    "dropout": ({"dropout": 0.2}, "parted in step 0: activation 3 (by Dropout, Mul)"),
    "an operator": (
        {"unsure": lambda _: Unsure(2)},
        "parted in step 2: activation 4 (by Unsure, Add)",
    ),
    "an operator's gradient": (
        {"unsure": lambda _: Unsure(2, backward=True)},
        "parted in step 2: activation's gradient 3",  # of what it uses
    ),
    "the order of a batch": (
        {"at": 1, "plant": lambda run: run[2].update(x=run[2]["x"].flip(0))},
        "parted in step 1: input 0 of Sequential",
    ),
    "labels": (
        {"at": 1, "plant": lambda run: run[2].update(labels=run[2]["labels"].flip(0))},
        "parted in step 1: loss 0 (by NllLoss)",
    ),
    "a schedule": (
        {"at": 4, "plant": lambda run: run[1].param_groups[0].update(lr=2e-3)},
        "parted in step 4: setting lr of group 0 of AdamW",
    ),
    "a gradient is missing": (
        {"at": 3, "plant": lambda run: without_gradient(run[0])},
        "parted in step 3: gradient 5.bias, which the first run alone has",
    ),
    "a module is called once more": (
        {"at": 2, "plant": lambda run: run[0][4](torch.ones(1))},
        "parted in step 2: input 0 of 4, which the second run alone has",
    ),
    "a state of one run": (
        {"at": 1, "plant": lambda run: run[1].state[run[0][0].bias].update(own=torch.ones(2))},
        "parted in step 1: state own of 0.bias, which the second run alone has",
    ),
    "an optimizer's state": (
        {"at": 1, "plant": lambda run: spoil_state(*run[:2])},
        "parted in step 1: state exp_avg of 0.bias",
    ),
}


def spoil_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.state[model[0].bias]["exp_avg"] += 1.0


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("expected")
    train(path)
    return path


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_difference_is_named(expected, tmp_path, capsys, name):
    flags, message = PLANTED[name]
    train(tmp_path, **flags)
    assert main([str(expected), str(tmp_path)]) == 1
    assert message in capsys.readouterr().out.splitlines()


def test_the_same_training_is_the_same_and_records_change_no_bit(expected, tmp_path, capsys):
    model, _ = train(tmp_path)
    assert main([str(expected), str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith(f"the same in {STEPS} steps, by ")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "record", lambda path: nullcontext())
        plain, _ = train(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    state = model.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in plain.state_dict().items())


def test_the_table_says_by_kinds_what_differs(expected, tmp_path, capsys):
    train(tmp_path, at=4, plant=PLANTED["a schedule"][0]["plant"])
    main([str(expected), str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert "look at the arguments of the optimizer, and at the schedule" in lines
    table = {line.split("  ")[0]: line.split()[-2:] for line in lines if "  " in line}
    assert table["setting"] == ["0.001", "0.002"]
    assert table["loss"] == ["1", "0"]  # compared, and parted


def test_what_one_run_alone_has_is_in_the_table(expected, tmp_path, capsys):
    train(tmp_path, **PLANTED["a gradient is missing"][0])
    assert main([str(tmp_path), str(expected)]) == 1  # in the other order
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "parted in step 3: gradient 5.bias, which the second run alone has"
    assert lines[1].startswith("look at what is called, computed or left out in one run")
    table = {line.split("  ")[0]: line.split() for line in lines if "  " in line}
    assert table["gradient"][1:3] == ["6", "1"]
    assert table["gradient"][3:] == ["5.bias", "missing", "float32", "[3]"]


def evaluated(path: Path, steps: int, calls: int, scale: float = 1.0) -> None:
    """Record a training that ends with calls of the model."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with exact.record(path):
        for _ in range(steps):
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        for _ in range(calls):
            model(torch.full((1, 3), scale))


def test_an_evaluation_after_the_last_step_is_no_step(tmp_path, capsys):
    note = "the {} run calls modules after its last step, as an evaluation does; these calls are "
    note += "not compared"
    evaluated(tmp_path / "a", 3, 0)
    evaluated(tmp_path / "b", 3, 1)
    evaluated(tmp_path / "c", 3, 1, 2.0)
    for first, second, of in (("a", "b", "second"), ("b", "a", "first")):
        assert main([str(tmp_path / first), str(tmp_path / second)]) == 0
        said, last = capsys.readouterr().out.splitlines()
        assert said == note.format(of)
        assert last.startswith("the same in 3 steps, by ")
    evaluated(tmp_path / "longer", 5, 0)
    evaluated(tmp_path / "longer too", 5, 1)
    for first, second, who in (
        ("longer", "b", "the second run calls"),
        ("b", "longer", "the first run calls"),
        ("longer too", "a", "the first run calls"),
        ("b", "longer too", "each run calls"),
        ("a", "longer", None),
    ):
        assert main([str(tmp_path / first), str(tmp_path / second)]) == 0
        lengths, *said, last = capsys.readouterr().out.splitlines()
        assert lengths.endswith(" steps: the first 3 are compared")
        assert said == [note.replace("the {} run calls", str(who))] * (who is not None)
        assert last.startswith("the same in 3 steps, by ")
    assert main([str(tmp_path / "b"), str(tmp_path / "b")]) == 0
    assert capsys.readouterr().out.startswith("the same in 3 steps and the calls after them, by ")
    assert main([str(tmp_path / "b"), str(tmp_path / "c")]) == 1
    assert capsys.readouterr().out.startswith("parted in step 3: input 0 of Linear\n")


def test_calls_without_a_step_are_compared_and_weights_alone_are_not_enough(tmp_path, capsys):
    evaluated(tmp_path / "a", 0, 2)
    evaluated(tmp_path / "b", 0, 3)
    assert main([str(tmp_path / "a"), str(tmp_path / "a")]) == 0
    assert capsys.readouterr().out.startswith("the same in the calls of modules, by ")
    assert main([str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    said = "parted in step 0: input 0 of Linear, which the second run alone has"
    assert capsys.readouterr().out.splitlines()[0] == said
    evaluated(tmp_path / "c", 2, 0)
    lines = (tmp_path / "c" / "rank0.jsonl").read_text().splitlines()
    last = json.loads(lines[-1]) | {"step": 0}  # the weights with which a recording ends
    kept = [line for line in lines if not line.startswith('{"step"')]
    (tmp_path / "c" / "rank0.jsonl").write_text("\n".join([*kept, json.dumps(last), ""]))
    assert main([str(tmp_path / "c"), str(tmp_path / "c")]) == 2
    assert capsys.readouterr().out.startswith("no step is complete in both; the 2 checksums")


def test_operators_are_named_by_their_line(tmp_path, capsys):
    for name, at in {"a": None, "b": 2}.items():
        train(tmp_path / name, unsure=partial(lambda at, _: Unsure(at), at), operators=True)
    assert main([str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    out = capsys.readouterr().out
    line = inspect.getsourcelines(Unsure.forward)[1] + 6
    assert f"parted in step 2: operator aten.add.Tensor in 4 (by {__file__}:{line})" in out


@pytest.mark.parametrize("operators", [False, True])
def test_runs_in_the_exact_mode(tmp_path, capsys, operators):
    for name in ("a", "b"):
        torch.manual_seed(0)
        with exact.mode(), exact.record(tmp_path / name, operators=operators):
            model = nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 2))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.5, foreach=False)
            parallel = exact.DataParallel(model)
            for i in range(3):
                for unit in range(2):
                    x = torch.arange(8.0).view(2, 4) + unit + (i == 2 and name == "b")
                    parallel.backward(model(x).sum() / 2)
                parallel.all_reduce()
                optimizer.step()
                optimizer.zero_grad()
    assert main([str(tmp_path / "a"), str(tmp_path / "a")]) == 0
    assert main([str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    out = capsys.readouterr().out
    # Operators between two steps are of the first.
    sums = "step 1: operator aten.add.Tensor in the program (by "
    assert (f"parted in {sums}" if operators else "parted in step 2: input 0 of") in out


# What the runs have


def test_runs_of_unlike_lengths(expected, tmp_path, capsys):
    train(tmp_path, steps=STEPS + 2)
    assert main([str(expected), str(tmp_path)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{STEPS} and {STEPS + 2} steps: the first {STEPS} are compared"
    assert second.startswith(f"the same in {STEPS} steps, by ")


def test_the_same_in_one_step(expected, tmp_path, capsys):
    train(tmp_path, steps=1)
    assert main([str(expected), str(tmp_path)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{STEPS} and 1 steps: the first is compared"
    assert second.startswith("the same in 1 step, by ")


def test_a_line_says_what_is_the_same_before_only_if_there_is_anything(expected, tmp_path, capsys):
    train(tmp_path, seed=1)
    assert main([str(expected), str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert out.startswith("parted in step 0: weight 0.weight\n")
    assert "before it" not in out


def test_runs_on_unlike_machines(expected, tmp_path, monkeypatch, capsys):
    here = recording.machine()
    monkeypatch.setattr(recording, "machine", lambda: here | {"processor": "OTHER", "threads": 99})
    said = f"the runs differ in processor ({here['processor']} and OTHER), threads "
    said += f"({here['threads']} and 99)"
    train(tmp_path / "same")
    assert main([str(expected), str(tmp_path / "same")]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == said
    assert second.startswith("the same in ")
    train(tmp_path / "parted", **PLANTED["a schedule"][0])
    assert main([str(expected), str(tmp_path / "parted")]) == 1
    lines = capsys.readouterr().out.splitlines()[:2]
    assert lines == [
        said,
        "outside of torchpar.exact.mode() other machines or threads alone can change bits: record "
        "both in the mode, or with the same of these; if they still part:",
    ]


def test_one_rank_on_an_unlike_machine(ranks, tmp_path, capsys):
    ranks(2, trained_on_a_rank, tmp_path / "a", None)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    file = tmp_path / "b" / "rank1.jsonl"
    head, rest = file.read_text().split("\n", 1)
    file.write_text(json.dumps(json.loads(head) | {"processor": "OTHER"}) + "\n" + rest)
    assert main([str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    here = recording.machine()["processor"]
    first, _ = capsys.readouterr().out.splitlines()
    assert first == f"the runs differ in processor ({here} and OTHER) on rank 1"


def test_a_recording_of_an_older_version_has_no_machine(expected, tmp_path, capsys):
    head, rest = (expected / "rank0.jsonl").read_text().split("\n", 1)
    kept = {k: v for k, v in json.loads(head).items() if k not in ("processor", "threads")}
    (tmp_path / "rank0.jsonl").write_text(f"{json.dumps(kept)}\n{rest}")
    assert main([str(expected), str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith(f"the same in {STEPS} steps")


def test_a_killed_run_leaves_its_steps(expected, tmp_path, capsys):
    text = (expected / "rank0.jsonl").read_text()
    (tmp_path / "rank0.jsonl").write_text(text[: text.index('{"step":3') + 40])
    assert main([str(expected), str(tmp_path)]) == 0
    assert f"{STEPS} and 3 steps: the first 3 are compared" in capsys.readouterr().out


@pytest.mark.parametrize("steps, rows", [(1, 10**6), (100, 1), (100, 10**6)])
def test_steps_are_the_same_however_many_are_written_at_once(tmp_path, monkeypatch, steps, rows):
    for name in ("a", "b"):
        train(tmp_path / name, steps=20)
        monkeypatch.setattr(recording, "_STEPS_AT_ONCE", steps)
        monkeypatch.setattr(recording, "_ROWS_AT_ONCE", rows)
    (a,), (b,) = (read_ranks(tmp_path / name) for name in ("a", "b"))
    assert [*a.steps] == [*range(21)]
    assert a.steps == b.steps


def test_an_error_ends_the_recording_with_its_step(tmp_path, capsys):
    def fail(run: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(tmp_path, at=2, plant=fail)
    (rank,) = read_ranks(tmp_path)
    assert [*rank.steps] == [0, 1, 2]
    assert not rank.steps[2].is_complete
    for name, x in (("b", 1.0), ("c", 2.0)):
        torch.manual_seed(0)
        with pytest.raises(ZeroDivisionError), exact.record(tmp_path / name):
            fail(nn.Linear(2, 1)(torch.full((1, 2), x)))  # before an optimizer's step
    (rank,) = read_ranks(tmp_path / "b")
    assert [(one.is_broken, one.is_complete) for one in rank.steps.values()] == [(True, False)]
    said = "an error ended the second run in step 0; the tensors that both runs have in it are "
    said += "compared"
    for name, status, last in (
        ("b", 2, "no step is complete in both; the 4 checksums of both are the same"),
        ("c", 1, "parted in step 0: input 0 of Linear"),
    ):
        assert main([str(tmp_path / "b"), str(tmp_path / name)]) == status
        lines = capsys.readouterr().out.splitlines()
        assert lines[1] == said
        assert lines[2].startswith(last)
    hooks = nn.modules.module
    assert not hooks._global_forward_hooks
    assert not hooks._global_forward_pre_hooks


REFUSED = {
    "operators in one": (
        lambda path: train(path, steps=1, operators=True),
        "one was recorded with operators=True, expected both or none",
    ),
    "another model": (
        lambda path: train(path, width=17),
        r"the models differ: weight 0\.weight is float32 \[16, 8\] in .* and float32 \[17, 8\] in",
    ),
    "no folder": (lambda path: None, "rank0.jsonl cannot be read|cannot be read"),
    "no recording": (
        lambda path: (path / "rank0.jsonl").write_text('{"a": 1}\n'),
        "is no recording: its first line",
    ),
    "a damaged recording": (
        lambda path: (path / "rank0.jsonl").write_text(
            '{"format":"torchpar.exact.record 1","rank":0,"ranks":1,"operators":false}\n'
            '{"step":0,"tensors":[1],"checksums":"00"}\n'
        ),
        "is damaged",
    ),
    "no step": (
        lambda path: (path / "rank0.jsonl").write_text(
            '{"format":"torchpar.exact.record 1","rank":0,"ranks":1,"operators":false}\n'
        ),
        "have no step in common",
    ),
    "a rank is missing": (
        lambda path: (path / "rank0.jsonl").write_text(
            '{"format":"torchpar.exact.record 1","rank":0,"ranks":2,"operators":false}\n'
        ),
        r"rank1\.jsonl cannot be read",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_compared_is_refused_in_one_line(expected, tmp_path, capsys, name):
    prepare, message = REFUSED[name]
    prepare(tmp_path)
    assert main([str(expected), str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("python -m torchpar compare: error: ")
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(err)


def changed(place: int, **keys: object) -> Callable[[list[str]], str]:
    """Change the line of a step, or with -1 the first line."""

    def change(lines: list[str]) -> str:
        at = 0 if place < 0 else at_step(lines, place)
        line = json.dumps(json.loads(lines[at]) | keys)
        return "".join([*lines[:at], f"{line}\n", *lines[at + 1 :]])

    return change


def at_step(lines: list[str], step: int) -> int:
    return next(i for i, line in enumerate(lines) if line.startswith(f'{{"step":{step},'))


def replaced(step: int, text: str, count: int = 1) -> Callable[[list[str]], str]:
    """Put a text in the place of the line of a step, or with 0 before it."""

    def change(lines: list[str]) -> str:
        at = at_step(lines, step)
        return "".join([*lines[:at], text, *lines[at + count :]])

    return change


def tensor_line(**keys: object) -> str:
    described = {"tensor": 999, "kind": "weight", "name": "w", "shape": [2], "dtype": "int8"}
    return json.dumps(described | {"by": ""} | keys) + "\n"


# How the file of a recording is changed, and what is said of it.
DAMAGED: dict[str, tuple[Callable[[list[str]], str], str]] = {
    "no JSON": (replaced(2, "{broken\n"), "it is no JSON"),
    "an empty line": (replaced(2, "\n"), "it is no JSON"),
    "NUL bytes": (replaced(2, "\0" * 50 + "\n"), "it is no JSON"),
    "a list": (replaced(2, "[1]\n"), "the line is no JSON object"),
    "nested": (replaced(2, "[" * 99999 + "\n"), "it is no JSON"),
    "another object": (replaced(2, "{}\n", 0), "has no 'step'"),
    "a step is missing": (replaced(2, ""), "step 3 stands in the place of step 2"),
    "a step twice": (changed(3, step=2), "step 2 stands in the place of step 3"),
    "a step of text": (changed(2, step="2"), "step '2' stands in the place of step 2"),
    "a step after the error": (changed(2, broken=True), "a step follows the error"),
    "an odd flag": (changed(2, replayed=1), "broken or replayed is neither true nor false"),
    "checksums too few": (changed(2, tensors=[0, 1], checksums="0" * 16), "16 digits, expected 16"),
    "checksums too many": (changed(2, tensors=[0], checksums="0" * 32), "for each of 1 tensors"),
    "no checksums": (changed(2, checksums=""), "the checksums have 0 digits"),
    "checksums of NaN": (changed(2, checksums=float("nan")), "the checksums have 0 digits"),
    "checksums of spaces": (changed(2, tensors=[0], checksums=" " * 16), "no hexadecimal digits"),
    "unknown tensors": (changed(2, tensors=[999], checksums="0" * 16), "[999] was not described"),
    "tensors of text": (changed(2, tensors="0", checksums="0" * 16), "tensors are no numbers"),
    "no tensors": (replaced(2, '{"step":2}\n'), "has no 'tensors'"),
    "a tensor twice": (replaced(2, tensor_line(tensor=0), 0), "tensor 0 is described twice"),
    "an unknown kind": (replaced(2, tensor_line(kind="x"), 0), "the tensor's kind is 'x'"),
    "an odd shape": (replaced(2, tensor_line(shape=[-1]), 0), "the shape is [-1]"),
    "an odd dtype": (replaced(2, tensor_line(dtype=None), 0), "name or dtype is no text"),
    "an odd number": (replaced(2, tensor_line(tensor=True), 0), "the tensor's number is True"),
    "no ranks": (changed(-1, ranks=0), "the number of ranks is 0"),
    "another rank's file": (
        changed(-1, rank=1, ranks=2),
        "is of rank 1 of 2, expected rank 0 of 2",
    ),
    "no such rank": (changed(-1, rank=7), "it is of rank 7 of 1"),
    "operators of text": (changed(-1, operators="no"), "operators is 'no'"),
    "another format": (changed(-1, format="x"), "is no recording"),
    "no first line": (lambda lines: "".join(lines[1:]), "is no recording"),
    "empty": (lambda lines: "", "is no recording"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_recording_is_refused_with_its_line(expected, tmp_path, capsys, name):
    damage, message = DAMAGED[name]
    lines = (expected / "rank0.jsonl").read_text().splitlines(keepends=True)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    (tmp_path / "a" / "rank0.jsonl").write_text("".join(lines))
    (tmp_path / "b" / "rank0.jsonl").write_text(damage(lines))
    if "rank 1 of 2" in message:
        shutil.copy(tmp_path / "b" / "rank0.jsonl", tmp_path / "b" / "rank1.jsonl")
    for first, second in (("a", "b"), ("b", "a"), ("b", "b")):
        assert main([str(tmp_path / first), str(tmp_path / second)]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert message in err
        assert f"{tmp_path / 'b' / 'rank0.jsonl'} " in err
    assert main([str(tmp_path / "a"), str(expected)]) == 0


def test_ranks_that_ended_at_different_steps_or_are_of_two_runs(expected, tmp_path, capsys):
    text = (expected / "rank0.jsonl").read_text()
    of_two = text.replace('"rank":0,"ranks":1', '"rank":0,"ranks":2')
    (tmp_path / "rank0.jsonl").write_text(of_two)
    file = tmp_path / "rank1.jsonl"
    whole = of_two.replace('"rank":0,"ranks":2', '"rank":1,"ranks":2')
    assert len({text, of_two, whole}) == 3
    file.write_text(whole[: whole.index('{"step":2')])
    assert main([str(tmp_path), str(tmp_path)]) == 0
    first, second, last = capsys.readouterr().out.splitlines()
    said = f"the ranks of the {{}} run have {STEPS} and 2 steps; those of all are compared"
    assert [first, second] == [said.format("first"), said.format("second")]
    assert last.startswith("the same in 2 steps")
    for old, new, message in (
        ('"ranks":2', '"ranks":3', "is of rank 1 of 3, expected rank 1 of 2"),
        ('"rank":1', '"rank":0', "is of rank 0 of 2, expected rank 1 of 2"),
        ('"operators":false', '"operators":true', "expected all ranks or none"),
    ):
        file.write_text(whole.replace(old, new))
        assert main([str(tmp_path), str(tmp_path)]) == 2
        assert message in capsys.readouterr().err


def test_a_tensor_of_another_name_is_a_difference(expected, tmp_path, capsys):
    text = (expected / "rank0.jsonl").read_text()
    renamed = text.replace('"kind":"activation","name":"3"', '"kind":"activation","name":"x"')
    assert renamed != text
    (tmp_path / "rank0.jsonl").write_text(renamed)
    assert main([str(expected), str(tmp_path)]) == 1
    said = "parted in step 0: activation x (by Dropout, Mul), which the second run alone has"
    assert capsys.readouterr().out.splitlines()[0] == said


def test_the_command(expected, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["torchpar", "compare", str(expected), str(expected)])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("torchpar", run_name="__main__")
    assert capsys.readouterr().out.startswith("the same in ")


def test_a_file_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match=r"rank0\.jsonl cannot be written .* the path of torchpar"),
        exact.record(tmp_path / "file"),
    ):
        pass


class Between(nn.Module):
    """It returns the result of a module, after operators on other tensors."""

    def __init__(self, scale: float):
        super().__init__()
        self.inner, self.scale = nn.Linear(3, 2), scale

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        x.sum() * self.scale
        return y


def test_a_result_that_is_returned_again_keeps_its_checksum(tmp_path):
    for name, scale in (("a", 1.0), ("b", 2.0)):
        torch.manual_seed(0)
        model = Between(scale)
        optimizer = torch.optim.SGD(model.parameters())
        with exact.record(tmp_path / name, operators=True):
            for x in torch.ones(2, 1, 3):
                model(x).sum().backward()
                optimizer.step()
    a, b = (read_ranks(tmp_path / name)[0].steps[1] for name in ("a", "b"))
    pairs = zip(a.tensors, a.checksums, b.checksums, strict=True)
    parted = {one.kind for one, sum_a, sum_b in pairs if sum_a != sum_b}
    assert parted == {"operator"}


def test_a_folder_has_one_recording_at_a_time(tmp_path):
    with exact.record(tmp_path / "a"):
        with pytest.raises(ConfigError, match="a is being recorded already"):
            exact.record(tmp_path / "b" / ".." / "a").__enter__()
        with exact.record(tmp_path / "b"):
            pass
    with exact.record(tmp_path / "a"):
        pass


# Compiled modules, graphs and GPUs


def sigmoid(_: int | None) -> nn.Module:
    """What `Unsure` computes, without the count, for which a compiler would compile again."""
    return nn.Sigmoid()


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize(
    "prepare",
    [
        pytest.param(partial(torch.compile, backend="eager"), id="call"),
        pytest.param(compiled_in_place, id="method", marks=pytest.mark.slow),
    ],
)
def test_compiled_modules_show_their_weights(tmp_path, capsys, prepare):
    torch._dynamo.reset()
    for name, at in {"a": None, "b": 3}.items():
        plant: Any = {"at": at, "plant": lambda run: flip_a_bit(run[0])}
        train(tmp_path / name, prepare=prepare, unsure=sigmoid, **plant)
    assert main([str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert "parted in step 3: weight 5.weight" in capsys.readouterr().out


def test_a_compiled_run_is_compared_with_an_eager_one(expected, tmp_path, capsys):
    torch._dynamo.reset()
    train(tmp_path, prepare=partial(torch.compile, backend="eager"), unsure=sigmoid)
    assert main([str(expected), str(tmp_path)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    said = "not compared, because only one run has them: activation 0, 1, 2, 3 and 2 others; "
    assert first.startswith(f"{said}activation's gradient ")
    assert second.startswith(f"the same in {STEPS} steps, by ")


@pytest.fixture
def gpu():
    """The GPU if there is one, else an emulated one, which must have seen no fault."""
    if torch.cuda.is_available():
        yield
        return
    with emulate() as gpu, cuda_is_cpu(gpu):
        yield
    assert gpu.faults == []


def test_a_gpu_is_read_once_in_a_step(gpu, tmp_path, capsys):
    readings = []

    class Counted(of_tensors.Reading):
        def __init__(self, rows: Tensor, sizes: list[int]):
            readings.append(len(rows))
            super().__init__(rows, sizes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(of_tensors, "Reading", Counted)
        train(tmp_path / "a", device="cuda")
    assert len(readings) == STEPS + 1  # the weights at the end are the last
    assert min(readings[:-1]) > 20
    train(tmp_path / "b", device="cuda", at=3, plant=lambda run: flip_a_bit(run[0]))
    assert main([str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert "parted in step 3: weight 5.weight" in capsys.readouterr().out


@pytest.mark.slow
def test_replays_of_a_graph_are_steps(gpu, tmp_path, capsys):
    steps = 6
    for name, at in {"a": None, "b": 4}.items():
        _, optimizer = train(
            tmp_path / name,
            device="cuda",
            as_graph=True,
            steps=steps,
            dropout=0.0,
            at=at,
            plant=lambda run: flip_a_bit(run[0]),
        )
        assert count_replays(optimizer) == steps - 3
    (rank,) = read_ranks(tmp_path / "a")
    assert len(rank.steps) == steps + 1
    kinds = {one.kind for one in rank.steps[4].tensors}
    assert {"weight", "input", "loss", "setting"} <= kinds
    assert "activation" not in kinds
    assert main([str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert "parted in step 4: weight 5.weight" in capsys.readouterr().out


# Ranks


def trained_on_a_rank(path: Path, flipped: int | None) -> None:
    with join_world("cpu") as world:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        parallel = DistributedDataParallel(model) if world.world_size > 1 else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        with exact.record(path):
            for i in range(3):
                if i == 1 and world.rank == flipped:
                    with torch.no_grad():
                        model[2].bias += 1
                # Powers of two, so that the mean of the ranks' gradients is that of one rank.
                parallel(torch.full((2, 4), 2.0**i)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()


def test_the_rank_is_named(ranks, tmp_path, capsys):
    ranks(2, trained_on_a_rank, tmp_path / "a", None)
    ranks(2, trained_on_a_rank, tmp_path / "b", 1)
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [
        "rank0.jsonl",
        "rank1.jsonl",
    ]
    assert main([str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert "parted in step 1 on rank 1: weight 2.bias" in capsys.readouterr().out
    one, other = (str(tmp_path / name / "rank0.jsonl") for name in "ab")
    assert main([one, other]) == 0  # whose gradients do not depend on the bias


def test_unlike_numbers_of_ranks(ranks, tmp_path, capsys):
    ranks(1, trained_on_a_rank, tmp_path / "a", None)
    for name, flipped in {"b": None, "c": 1}.items():
        ranks(2, trained_on_a_rank, tmp_path / name, flipped)
    assert main([str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    first, _ = capsys.readouterr().out.splitlines()
    assert first == ("1 and 2 ranks: only weights, gradients, settings, states are compared")
    assert main([str(tmp_path / "a"), str(tmp_path / "c")]) == 1
    out = capsys.readouterr().out
    assert "parted in step 1 on ranks 0 and 1: weight 2.bias" in out
    assert "record both on the same number of ranks to compare inputs and activations, too" in out
