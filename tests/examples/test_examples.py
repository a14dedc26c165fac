# SPDX-License-Identifier: MIT
"""All lessons by their command lines: each runs, learns, prints its last line, and refuses wrong
flags.

The Lightning lesson, and what is peculiar to an exercise, have files of their own.
"""

import errno
import importlib
import os
import re
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partialmethod
from hashlib import md5
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from commands import LAST_LINE, ROOT, lesson, rows_of, scalars
from fake_data import fashion_mnist

pytest.importorskip("tyro", reason="tyro reads the flags")
pytest.importorskip("matplotlib", reason="--plots and --report draw with it")

from support import cli

import quadrants
import train_transformer
from matplotlib.figure import Figure
from train_by_hand import draw

from torchpar.errors import ConfigError
from torchpar.parallel import join_world

TWO_EPOCHS = ["--epochs", "2", "--batch-size", "100"]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> list[str]:
    """Flags for a small data set that is learned quickly."""
    root = fashion_mnist(tmp_path_factory.mktemp("data"), train=600, test=100)
    return ["--dataset", "fashion-mnist", "--data", str(root)]


@pytest.fixture(scope="module")
def data(small) -> list[str]:
    """Flags of the lessons with a small network."""
    return [*small, "--device", "cpu", "--hidden", "16"]


# Exercises

RUNS = {  # lesson: flags, pictures
    "train_mpi": ("--epochs 3", ""),
    "fashion_pooled": ("--samples 50 --iterations 200 --library torch", "costs neurons"),
    "train_by_hand": ("--epochs 10", ""),
    "quadrants": ("--seed 1 --epochs 10 --processes 1 2 --sizes 2048", "quadrants-boundary"),
    "digits_report": ("--hidden 8 --batch-size 16 --lr 0.2 --epochs 3", "digits"),
    "matmul_regression": ("", "regression regression-path"),
    "matmul_convolution": ("--epochs 3 --batch-size 20", "kernels"),
    "matmul_attention": ("", "attention causal sparse"),
}
LAST_LINES = {
    # The report reaches 1 and 0.106.
    "train_by_hand": r"test accuracy 1\.0000 \| loss 0\.0\d\d\d .*",
    "quadrants": r"test accuracy 1\.0000 \| loss 0\.(0\d|10)\d\d .*",  # below 0.11
    "matmul_regression": r"batch 4, learning rate 0\.1: cost 0\.\d{4} after 256 steps",
    "matmul_attention": r"([5-9]\d|100)% of the weight that an image .*",  # by chance 10%
}


def time_a_short_epoch(*args: Any) -> quadrants.Epoch:
    """An epoch of the report of quadrants.py with few of its points, on a rank."""
    with patch.object(quadrants, "draw", lambda n, *seed, **on: draw(n // 32, *seed, **on)):
        return quadrants.time_epoch(*args)


def save_and_note(figure: Figure, *args: Any, cut: list[str], save: Callable[..., None]) -> None:
    """Save a picture; add to ``cut`` its titles and labels that reach beyond it."""
    save(figure, *args)
    for axes in figure.axes:
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
            box, page = text.get_window_extent(), figure.bbox
            if text.get_text() and not (
                page.x0 <= box.x0 <= box.x1 <= page.x1 and page.y0 <= box.y0 <= box.y1 <= page.y1
            ):
                cut.append(text.get_text())


@pytest.mark.parametrize(
    "name",
    # Tests of the exercises train these two, too.
    [
        pytest.param(
            name, marks=[pytest.mark.slow] if name in ("quadrants", "fashion_pooled") else []
        )
        for name in RUNS
    ],
)
def test_it_runs_learns_and_prints_its_last_line(ranks, small, monkeypatch, tmp_path, name):
    monkeypatch.setattr(quadrants, "ROUNDS", 1)
    monkeypatch.setattr(quadrants, "Ranks", lambda: nullcontext(ranks))
    monkeypatch.setattr(quadrants, "time_epoch", time_a_short_epoch)
    flags, pictures = RUNS[name]
    given = [] if name in ("train_by_hand", "quadrants", "matmul_regression") else small
    outputs = ["--metrics", str(tmp_path / "metrics")]
    outputs += ["--plots", str(tmp_path / "new" / "plots")] if pictures else []
    cut: list[str] = []
    monkeypatch.setattr(
        Figure, "savefig", partialmethod(save_and_note, cut=cut, save=Figure.savefig)
    )
    code, out, err = lesson(name, *given, "--device", "cpu", *flags.split(), *outputs)
    assert (code, err) == (0, "")
    assert cut == []
    assert re.fullmatch(LAST_LINES.get(name, LAST_LINE), out.splitlines()[-1])
    for picture in pictures.split():
        file = tmp_path / "new" / "plots" / f"{picture}.png"
        assert file.read_bytes().startswith(b"\x89PNG")
        assert f"picture: {file}\n" in out
    last = rows_of(tmp_path / "metrics")[-1]
    if "test_accuracy" in last:
        assert last["test_accuracy"] > 0.5
        figures = f"test accuracy {last['test_accuracy']:.4f} | loss {last['test_loss']:.4f}"
        assert out.splitlines()[-1].startswith(figures)


@pytest.mark.parametrize("name", [*RUNS, "train_ddp", "train_parallel"])
def test_the_help_of_each_flag_is_a_sentence(name):
    """tyro takes the comment beside a flag, also one that is meant for the type checker."""
    code, out, _ = lesson(name, "--help")
    assert code == 0
    assert "type: ignore" not in out


# The training lessons


def test_one_process_with_every_other_flag(data, tmp_path):
    flags = "--epochs 2 --batch-size 50 --lr 0.2 --momentum 0 --schedule cosine --weight-decay 1e-4"
    flags += " --orthogonality 1e-3 --hidden 8 8 --seed 3 --phases"
    files = [f"--{name}={tmp_path / name}" for name in ("metrics", "log-dir")]
    code, out, err = lesson("train_ddp", *data, *flags.split(), *files)
    assert code == 0, err
    assert re.fullmatch(LAST_LINE, out.splitlines()[-1]).groups() == ("1", "cpu")
    shares = dict(re.findall(r"│ (\w+) +│ +\d+\.\d\d +│ +(\d+\.\d)% +│", out))
    assert {"data", "forward", "backward", "optimizer"} <= shares.keys()
    assert sum(map(float, shares.values())) == pytest.approx(100, abs=0.05 * len(shares))
    rows = rows_of(tmp_path / "metrics")
    figures = ["train_loss", "test_loss", "test_accuracy", "samples_per_s"]
    assert [*rows[0]] == ["epoch", *figures, "seconds", "ranks", "device"]
    for name in figures:
        assert [(row["epoch"], row[name]) for row in rows] == scalars(tmp_path / "log-dir", name)


# The training of the other lessons, in train_ddp.
DATA = "--activation sigmoid --label-smoothing 0 --crop 0 --pool 1"
THEIRS = f"{DATA} --optimizer sgd --lr 0.5 --momentum 0.9 --weight-decay 3e-5"
MUON = "--optimizer muon --lr 0.01 --momentum 0.95 --weight-decay 0.01"
SPLITS = [
    ("train_ddp", 3, THEIRS, "dp"),
    ("train_fast", 2, THEIRS, "dp"),
    ("train_fast", 2, f"{THEIRS} --fused off", "dp"),
    ("train_tensor_parallel", 2, "", "tp"),
    ("train_pipeline", 2, "--draw", "pp"),
    ("train_pipeline", 2, "--pipeline gpipe --micro-batches 2 --draw", "pp"),
    pytest.param("train_parallel", 4, "--dp 2 --tp 2", "dp tp", marks=pytest.mark.slow),
    pytest.param("train_parallel", 4, f"{MUON} --dp 2 --tp 2", "dp tp", marks=pytest.mark.slow),
    # Rank 0 has one layer, which adds nothing over "tp".
    ("train_parallel", 4, "--tp 2 --pp 2 --micro-batches 3", "pp"),
    pytest.param(
        "train_parallel", 8, f"{MUON} --dp 2 --tp 2 --pp 2", "dp pp", marks=pytest.mark.slow
    ),
]


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory) -> Callable[[str], list[dict[str, Any]]]:
    """``alone(flags)``: the metrics of two epochs of one process."""

    @cache
    def train(flags: str) -> list[dict[str, Any]]:
        metrics = tmp_path_factory.mktemp("alone") / "metrics"
        code, _, err = lesson(
            "train_ddp", *data, *TWO_EPOCHS, *flags.split(), "--metrics", str(metrics)
        )
        assert code == 0, err
        return rows_of(metrics)

    return train


@pytest.mark.parametrize("name, world_size, flags, dimensions", SPLITS)
def test_every_split_learns_the_same(
    ranks, data, alone, tmp_path, name, world_size, flags, dimensions
):
    """The same flags, the same last line, the same losses but for rounding, and its dimensions'
    messages."""
    metrics = tmp_path / "metrics"
    shown = ["--metrics", str(metrics), "--collectives", "--phases"]
    shown += ["--memory"] * (name == "train_parallel")
    (code, out, err), *others = ranks(
        world_size, lesson, name, *data, *TWO_EPOCHS, *flags.split(), *shown
    )
    assert code == 0, err
    assert others == [(0, "", "")] * (world_size - 1)
    assert re.fullmatch(LAST_LINE, out.splitlines()[-1]).groups() == (str(world_size), "cpu")
    # Muon takes the roundings of other shares' sums to bfloat16.
    one, rel, off = (f"{DATA} {MUON}", 2**-8, 0.01) if MUON in flags else (THEIRS, 1e-5, 0)
    for a, b in zip(alone(one), rows_of(metrics), strict=True):
        assert a.keys() == b.keys()
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=rel)
        assert abs(b["test_accuracy"] - a["test_accuracy"]) <= off
    if name == "train_fast":
        way = "shared memory" if "--fused off" in flags else "gradients by hand"
        assert f"\ntraining with {way}\n" in out
        assert ("no gradients by hand: --fused is off\n" in out) == ("--fused off" in flags)
        assert re.search(
            rf"│ DistributedDataParallel +│ [\d.]+ +│ 1 +│\n.*│ {way} +│ [\d.]+ +│ [\d.]+",
            out,
            re.S,
        )
    counted = re.findall(r"│ ([a-z]+) +│ ([a-z]\w+) +│ [1-9]\d* +│ [1-9][\d,]* +│", out)
    of_dimension = {"dp": ["all_reduce"], "tp": ["all_reduce"], "pp": ["send", "recv"]}
    expected = {
        (name, operation) for name in dimensions.split() for operation in of_dimension[name]
    }
    assert {row for row in counted if row[1] != "all_to_all"} == expected, out
    assert ("all_to_all" in out) == (MUON in flags)
    if "--draw" in flags:
        lines = re.findall(r"^rank \d  (\S+)  +\d+% idle$", out, re.MULTILINE)
        orders = ["F0 F1 B0 F2 B1 F3 B2 B3", "F0 B0 F1 B1 F2 B2 F3 B3"]
        orders = ["F0 F1 B0 B1"] * 2 if "gpipe" in flags else orders
        assert [" ".join(re.findall(r"[FB]\d", line)) for line in lines] == orders
        assert "medians of 10 steps" in out  # of 12, the first two of which are not counted
    assert re.search(r"│ optimizer +│ +\d", out)
    if name == "train_parallel":
        whole = 4 * (784 * 16 + 16 + 16 * 10 + 10)  # bytes of the weights
        memory = re.findall(
            r"│ (\d): \d \d \d +│ ([\d,]+) +│ ([\d,]+) +│ ([\d,]+) +│ ([\d,]+) +│", out
        )
        assert [int(rank) for rank, *_ in memory] == list(range(world_size))
        weights, gradients, state, activations = zip(
            *([int(n.replace(",", "")) for n in row[1:]] for row in memory), strict=True
        )
        assert weights == gradients
        copies = 2 if "--dp 2" in flags else 1
        # Each bias of a row layer is on each rank.
        assert copies * whole <= sum(weights) <= copies * (whole + 2 * 4 * 10)
        assert all(0 < s <= w for s, w in zip(state, weights, strict=True))
        assert min(activations) > 0


def operators_of_each_step(*flags: str) -> list[Counter[str]]:
    """The outermost calls of torchpar's operators in each forward pass of train_ddp's replica."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        code, _, err = lesson("train_ddp", *flags)
    assert code == 0, err
    events = profiled.events()
    steps: dict[int, Counter[str]] = {
        id(event): Counter() for event in events if event.name == "DistributedDataParallel.forward"
    }
    for event in events:
        if event.name.startswith("torchpar::"):
            above = event.cpu_parent
            while above and id(above) not in steps and not above.name.startswith("torchpar::"):
                above = above.cpu_parent
            if above and id(above) in steps:
                steps[id(above)][event.name] += 1
    return list(steps.values())


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("", {"torchpar::linear_sigmoid": 2}),  # by default
        pytest.param(*("--activation maxout", {"torchpar::maximum": 2}), marks=pytest.mark.slow),
        pytest.param("--activation relu", {}, marks=pytest.mark.slow),
    ],
)
def test_the_hidden_layers_of_each_step_are_operators(ranks, small, flags, expected):
    """torch.profiler sees one for each hidden layer, on every rank."""
    given = [
        *small,
        "--device",
        "cpu",
        "--hidden",
        "16",
        "8",
        "--epochs",
        "1",
        "--batch-size",
        "100",
    ]
    assert ranks(2, operators_of_each_step, *given, *flags.split()) == [[expected] * 6] * 2


def test_maxout_learns_and_resumes_on_another_number_of_ranks(ranks, data, tmp_path):
    """As one process that is not stopped, but for rounding."""
    sgd = "--optimizer sgd --lr 0.05 --schedule constant --batch-size 50"
    flags = [*data, "--activation", "maxout", *sgd.split()]
    saved = ["--checkpoint", str(tmp_path / "saved")]
    runs: list[tuple[int, list[str]]] = [(1, []), (2, saved), (1, saved)]
    for number, (world_size, checkpoint) in enumerate(runs):
        epochs = "1" if number == 1 else "3"
        own = ["--epochs", epochs, "--metrics", str(tmp_path / f"{number}"), *checkpoint]
        (code, out, err), *_ = ranks(world_size, lesson, "train_ddp", *flags, *own)
        assert code == 0, err
    assert out.startswith("resumed from step 12\n")
    whole, resumed = (rows_of(tmp_path / name) for name in "02")
    for a, b in zip(whole, resumed, strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-4)
    assert whole[-1]["train_loss"] < whole[0]["train_loss"]
    assert whole[-1]["test_accuracy"] > 0.9


@pytest.mark.parametrize(
    "name, flags",
    [
        ("train_ddp", "--optimizer sgd"),
        pytest.param("digits_report", "--hidden 8", marks=pytest.mark.slow),
    ],
)
def test_lambda_counts_the_biases_if_asked(small, tmp_path, name, flags):
    """A λ of 0 leaves the losses as they are; another one changes them, and with the biases once
    more."""
    losses = []
    for λ, flag in (("0", ""), ("0", "--decay-biases"), ("0.1", ""), ("0.1", "--decay-biases")):
        metrics = tmp_path / f"{len(losses)}"
        given = [*small, "--device", "cpu", "--batch-size", "50", "--lr", "0.1", "--epochs", "1"]
        given += [*flags.split(), "--weight-decay", λ, *flag.split(), "--metrics", str(metrics)]
        code, _, err = lesson(name, *given)
        assert code == 0, err
        losses.append(rows_of(metrics)[-1]["train_loss"])
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3


@pytest.mark.parametrize("flag", ["--clip=0.01", "--label-smoothing=0.3"])
def test_a_flag_reaches_the_training(data, alone, tmp_path, flag):
    """Both enlarge the loss."""
    flags = [*data, *TWO_EPOCHS, *THEIRS.split(), flag, f"--metrics={tmp_path / 'metrics'}"]
    assert lesson("train_ddp", *flags)[0] == 0
    assert rows_of(tmp_path / "metrics")[-1]["train_loss"] > alone(THEIRS)[-1]["train_loss"] + 0.1


@pytest.mark.parametrize(
    "name",
    [
        "train_ddp",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("train_parallel", "train_tensor_parallel", "train_pipeline")
        ),
    ],
)
def test_compiling_reaches_what_runs(data, monkeypatch, name):
    """The backend is asked for graphs when the first batch comes, and runs them as they are.

    All batches have one size, as each other size would be compiled anew.
    """
    graphs, errors = [], []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        if errors:
            raise errors[0]
        return graph.forward

    monkeypatch.setattr(
        torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend=backend)
    )
    flags = [*data, "--batch-size", "100", "--dry-run"]
    flags += THEIRS.split() if name == "train_ddp" else []
    code, out, err = lesson(name, *flags)
    assert (code, graphs) == (0, []), err
    code, compiled, err = lesson(name, *flags, "--compile")
    assert code == 0, err
    assert graphs
    assert compiled.split(" | ")[1:4] == out.split(" | ")[1:4]  # losses and accuracy
    errors.append(RuntimeError("there is no compiler"))
    torch.compiler.reset()
    code, out, err = lesson(name, *flags, "--compile")
    assert (code, out) == (2, "")
    assert re.fullmatch(
        r"\S+: error: the model cannot be compiled: .*there is no compiler.*; drop --compile\n", err
    )


def test_dry_run_writes_nothing(data, tmp_path):
    outputs = ("metrics", "log-dir", "report", "profile", "checkpoint")
    code, out, _ = lesson(
        "train_ddp", *data, "--dry-run", *(f"--{name}={tmp_path / name}" for name in outputs)
    )
    assert code == 0
    assert re.fullmatch(LAST_LINE, out.splitlines()[-1])
    assert list(tmp_path.iterdir()) == []


def lesson_of_a_short_validation_text(*flags: str) -> tuple[int, str, str]:
    (text, validation), characters = train_transformer.load_book(torch.device("cpu"))
    short = (text, validation[:1000]), characters
    with patch.object(train_transformer, "load_book", lambda device: short):
        return lesson("train_transformer", *flags)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, rel, fall",
    [
        ("--steps=4", 2**-8, 0.5),  # roundings of other sums, which Muon takes to bfloat16
        ("--steps=2 --batch-size=10 --arithmetic=exact", 0, 0),  # units of 4, 4 and 2 windows
    ],
)
def test_two_ranks_train_a_transformer_as_one_does(ranks, tmp_path, flags, rel, fall):
    """The validation loss is not computed in exact arithmetic."""
    found = []
    for world_size in (1, 2):
        files = [
            f"--{name}={tmp_path / name}-{world_size}" for name in ("metrics", "log-dir", "report")
        ]
        (code, out, err), *_ = ranks(
            world_size, lesson_of_a_short_validation_text, *flags.split(), "--device=cpu", *files
        )
        assert code == 0, err
        found.append(rows_of(tmp_path / f"metrics-{world_size}"))
        last = (
            r"adamw: training loss \d\.\d{3}, validation loss (\d\.\d{3}) after \d+ steps, \d+\.\d "
            r"s"
        )
        printed = re.fullmatch(last, out.splitlines()[-1]).group(1)
        assert printed == f"{found[-1][-1]['validation_loss']:.3f}"
        page = (tmp_path / f"report-{world_size}" / "run.html").read_text("utf-8")
        assert page.count(">A step") == 2
        assert re.search(r"\nblocks\.0\.linear1\.weight +512x128 +Muon +hidden matrix", out)
    for name, group in groupby(found[0], itemgetter("optimizer")):
        rows = list(group)
        assert rows[0]["train_loss"] == found[0][0]["train_loss"]  # the same weights and windows
        for loss in ("train_loss", "validation_loss"):
            assert rows[-1][loss] < rows[0][loss] - fall
            assert [(row["step"], row[loss]) for row in rows] == scalars(
                tmp_path / "log-dir-1" / name, loss
            )
    for one, two in zip(*found, strict=True):
        assert two["train_loss"] == pytest.approx(one["train_loss"], rel=rel, abs=0)
        assert two["validation_loss"] == pytest.approx(one["validation_loss"], rel=2**-8)


def test_the_validation_text_is_the_last_tenth_of_the_book():
    """The documentation's figures are of this book."""
    content = train_transformer.BOOK.read_bytes()
    assert f"`{md5(content).hexdigest()}`" in (ROOT / "examples" / "data" / "README.md").read_text()
    (train, validation), _ = train_transformer.load_book(torch.device("cpu"))
    assert len(validation) == -(-len(content) // 10)
    assert len(train) + len(validation) == len(content)


@pytest.mark.parametrize(
    "content, message",
    [
        (
            "Alice\u2019s",
            r"alice.txt cannot be read as ASCII \('ascii' codec .*\); copy the book there again",
        ),
        ("", "alice.txt has 0 characters, expected at least 650; copy the book there again"),
        ("a" * 649, "alice.txt has 649 characters, expected at least 650"),
        (None, r"alice.txt cannot be read as ASCII \(.*Is a directory.*\)"),
    ],
)
def test_a_damaged_book_is_one_line(tmp_path, content, message):
    path = tmp_path / "alice.txt"
    if content is None:
        path.mkdir()
    else:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as error:
        train_transformer.read_text(path)
    assert "\n" not in str(error.value)
    if not content:
        return
    path.write_text("ab" * 325)
    assert train_transformer.read_text(path)[1] == 2


def test_the_validation_loss_is_that_of_each_character():
    """Against float64: windows of 64 characters, after which too few are left for another one."""
    text = torch.randint(70, (3 * 64 + 9,), generator=torch.Generator().manual_seed(0))
    model = train_transformer.Transformer(70)
    with join_world("cpu") as world:
        windows = train_transformer.Windows(train_transformer.Flags(), text, text)
        loss = windows.evaluate(model, world).loss
    log_p = model.double()(text[: 3 * 64].view(3, 64)).detach().log_softmax(-1).flatten(0, 1)
    expected = -sum(float(row[i]) for row, i in zip(log_p, text[1 : 3 * 64 + 1], strict=True)) / (
        3 * 64
    )
    assert loss == pytest.approx(expected, rel=1e-6)


# Errors

HAS = "and the data set has {0} {1} samples; take at most {0}$"
ERRORS = [
    ("train_ddp", "--epoch 3", "Unrecognized options: --epoch"),
    ("train_ddp", "--epochs 0", "--epochs is 0, expected at least 1"),
    ("train_ddp", "--clip 0", "--clip is 0.0, expected more than 0"),
    (
        "train_ddp",
        "--decay-biases",
        "--decay-biases changes sgd's L2 penalty, and the optimizer is muon; take --optimizer sgd",
    ),
    ("train_ddp", "--label-smoothing 1", r"--label-smoothing is 1\.0, expected less than 1"),
    (
        "train_ddp",
        "--arithmetic exact --clip 1",
        "--arithmetic exact has no version of --clip; drop one of the two",
    ),
    (
        "train_ddp",
        "--arithmetic exact --schedule cosine",
        "--arithmetic exact has no version of --schedule cosine",
    ),
    ("train_ddp", "--crop 14", "crop 14 and pool 2 leave nothing of images of 28 × 28"),
    ("train_ddp", "--data /nonexistent", "/FashionMNIST/raw/train-images-idx3-ubyte.gz is missing"),
    ("train_ddp", "--metrics /dev/null/m.jsonl", "/dev/null/m.jsonl cannot be written"),
    ("digits_report", "--depth 65536", "--depth is 65536, expected less than 65536"),
    ("digits_report", "--hidden 4 65536 --depth 999", r"--hidden 65536 --depth 999 makes weights"),
    ("quadrants", "--processes 1 65", r"--processes is \(1, 65\), expected less than 65"),
    ("train_mpi", "--device cuda", "--device cuda: NumPy computes on the CPU"),
    ("fashion_pooled", "--device cuda", "--device cuda: NumPy computes on the CPU"),
    (
        "train_mpi",
        "--split model --hidden 8 4",
        "--hidden 8 4 with --split model, expected one hidden layer",
    ),
    ("train_mpi", "--compare", "--compare needs several processes; mpirun -n 2"),
    ("fashion_pooled", "--exchange gather --library torch", "--exchange gather is NumPy's"),
    ("fashion_pooled", "--scatter each --library torch", "--scatter each is NumPy's"),
    ("own_layers", "--with layers.cu --device cuda", r"--with executes CUDA C\+\+ on the CPU"),
    (
        "train_ddp",
        "--plain --label-smoothing 0.1",
        "--plain sets --label-smoothing to 0.0; drop one of the two",
    ),
    ("train_ddp", "--samples 601", f"--samples is 601, {HAS.format(600, 'training')}"),
    ("train_mpi", "--samples 601", f"--samples is 601, {HAS.format(600, 'training')}"),
    ("digits_report", "--samples 501", f"--samples is 501, {HAS.format(500, 'training')}"),
    ("matmul_convolution", "--samples 601", f"--samples is 601, {HAS.format(600, 'training')}"),
    ("matmul_attention", "--samples 101", f"--samples is 101, {HAS.format(100, 'test')}"),
    ("quadrants", "--processes 2 4", "expected 1 and then multiples of the last"),
    ("quadrants", "--processes 1 2 4 --sizes 3 16", "expected at least 4, one sample a process"),
    (
        "train_by_hand",
        "--activation gelu",
        "'gelu', expected one of relu, sigmoid, tanh; take one, or add yours",
    ),
    (
        "train_by_hand",
        "--fused",
        "--fused has no sigmoid to fuse, expected --activation sigmoid; add it",
    ),
    (
        "train_parallel",
        "--memory --compile",
        "--memory sees no activations of compiled code; drop --compile",
    ),
    ("digits_report", "--hidden", "--hidden is empty, expected one value or more"),
    ("digits_report", "--lr 0.1 nan", r"--lr is \(0\.1, nan\), expected at least 0"),
    (
        "digits_report",
        "--lr 1e37 --hidden 8",
        "loss of epoch 1 is (nan|inf); take a smaller learning rate",
    ),
    (
        "fashion_pooled",
        "--library torch --lr 1e37 --iterations 9 --samples 60",
        "a cost at the rate 1e\\+37 is (nan|inf)",
    ),
]
if not torch.cuda.is_available():
    ERRORS.append(
        ("train_ddp", "--device cuda", "device is cuda, but PyTorch finds no GPU; take cpu")
    )


def line_of(err: str) -> str:
    """The message that tyro prints in a frame, or a script without one, as one line."""
    return " ".join(re.sub(r"[╭╮│╰╯─]", " ", err).split())


@pytest.mark.parametrize("name", ["train_ddp", "train_parallel", "digits_report", "train_mpi"])
def test_the_type_of_each_number_has_its_bounds(name):
    for flag, value, marks in importlib.import_module(name).Flags().marked():
        numbers = value if isinstance(value, tuple) else (value,)
        if any(type(number) in (int, float) for number in numbers):
            assert any(isinstance(mark, cli.Bounds) for mark in marks), flag


@pytest.mark.parametrize("name, flags, message", ERRORS)
def test_errors(small, monkeypatch, name, flags, message):
    """tyro frames what it finds, once; what a script finds is one line."""
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))  # some name a busy machine
    given = [] if name in ("quadrants", "own_layers") else small
    code, out, err = lesson(name, *given, "--device", "cpu", *flags.split())
    assert (code, out) == (2, "")
    assert re.search(message, line_of(err))
    assert "Traceback" not in err
    is_line = bool(re.fullmatch(rf"{name}\.py: error: .*\n", err))
    assert err.count("full helptext") == (not is_line)
    assert is_line == ("Error parsing" not in err and "Unrecognized" not in err)


@pytest.mark.parametrize("flag", ["--metrics", "--report", "--log-dir", "--profile"])
def test_a_full_disk_is_named_in_one_line(small, tmp_path, monkeypatch, flag):
    """As /dev/full is: it can be opened, and takes no byte."""
    target = tmp_path / "outputs"
    if flag == "--metrics":
        target = Path("/dev/full")
    else:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if flag == "--report":
            monkeypatch.setattr(Path, "write_text", Mock(side_effect=full))
        elif flag == "--profile":
            profile = torch.profiler.profile
            monkeypatch.setattr(profile, "export_chrome_trace", Mock(side_effect=full))
        else:
            writer = pytest.importorskip(
                "tensorboard.summary.writer.record_writer", reason="it writes the log"
            )
            monkeypatch.setattr(writer.RecordWriter, "write", Mock(side_effect=full))
    short = ["--device", "cpu", "--epochs", "1", "--batch-size", "100"]
    code, _, err = lesson("train_ddp", *small, *short, flag, str(target))
    assert code == 2
    line = (
        rf"train_ddp\.py: error: {target}.* cannot be written \(No space left on device\); make "
        rf"room there, "
    )
    assert re.fullmatch(rf"{line}or name another place by {flag}\n", err), err


@pytest.mark.parametrize(
    "name, flags, message",
    [
        ("train_ddp", "--no-such-flag", "Unrecognized options: --no-such-flag"),
        (
            "train_transformer",
            "--batch-size 33",
            "--batch-size is 33, expected a multiple of the ranks",
        ),
        ("quadrants", "", "2 processes were started, expected 1"),
    ],
)
def test_an_error_ends_every_rank(ranks, name, flags, message):
    """Both ranks print the error here. A launcher ends rank 1 before it prints."""
    for code, out, err in ranks(2, lesson, name, "--device", "cpu", *flags.split()):
        assert (code, out) == (2, "")
        assert message in line_of(err)


# Checkpoints


def test_a_run_says_where_it_resumes_and_that_it_is_complete(data, tmp_path):
    """Epochs trained before are not printed again; the metrics file has all."""
    metrics = tmp_path / "metrics"
    flags = [
        *data,
        "--batch-size",
        "50",
        "--checkpoint",
        str(tmp_path / "saved"),
        "--metrics",
        str(metrics),
    ]
    found = []
    for epochs in (1, 3, 3):
        metrics.unlink(missing_ok=True)
        code, out, err = lesson(
            "train_ddp", *flags, "--schedule", "constant", "--epochs", str(epochs)
        )
        assert code == 0, err
        found.append(out)
        assert [row["epoch"] for row in rows_of(metrics)] == [*range(1, epochs + 1)]
    first, resumed, again = found
    assert re.findall(r"^epoch \d", first, re.MULTILINE) == ["epoch 1"]
    assert resumed.startswith("resumed from step 12\nepoch 2/3 |")
    assert re.findall(r"^epoch \d", resumed, re.MULTILINE) == ["epoch 2", "epoch 3"]
    assert re.fullmatch(rf"complete already, at step 36\n{LAST_LINE}\n", again)
    assert again.splitlines()[-1] == resumed.splitlines()[-1]


def test_a_lesson_without_a_flag_refuses_the_checkpoint_of_one_that_used_it(data, tmp_path):
    """The weights of a network of tanh have the same shapes as those of the sigmoid's."""
    of_both = [*data, "--checkpoint", str(tmp_path), "--optimizer", "sgd", "--crop", "3"]
    of_both += ["--lr", "0.1", "--batch-size", "200", "--epochs", "1"]
    assert lesson("train_ddp", *of_both, "--pool", "1", "--activation", "tanh")[0] == 0
    status, _, err = lesson("train_parallel", *of_both)
    assert status == 2
    assert "holds a run with activation tanh, label_smoothing 0.05, this one has activation" in err


def test_a_falling_rate_is_resumed_with_as_many_epochs_alone(data, tmp_path):
    """With a schedule that depends on the number of epochs, another number is another run."""
    flags = [*data, "--checkpoint", str(tmp_path), "--epochs"]
    assert lesson("train_ddp", *flags, "1")[0] == 0
    code, _, err = lesson("train_ddp", *flags, "2")
    assert code == 2
    assert "holds a run with epochs 1, this one has epochs 2" in err
