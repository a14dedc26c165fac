# SPDX-License-Identifier: MIT
"""examples/digits_report.py: what it chooses, by what, and what it writes."""

import re
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ROOT, rows_of, run
from fake_data import fashion_mnist

from torchpar.errors import ConfigError

pytest.importorskip("torchvision", reason="torchvision reads the data sets")
pytest.importorskip("tyro", reason="tyro reads the flags")

SCRIPT = ROOT / "examples" / "digits_report.py"
TIMES = ("ms_per_step", "s_per_epoch")
CHOICE = ("hidden", "batch_size", "lr", "weight_decay")
SWEEP = {"hidden": (4, 8), "batch_size": (64, 16), "lr": (0.2, 0.002), "weight_decay": (0.0, 0.03)}


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import digits_report

    return digits_report


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    fashion_mnist(root / "FashionMNIST" / "raw", train=600, test=100)
    return root


def study(example: Any, data: Path, folder: Path, **flags: Any) -> list[dict[str, Any]]:
    """The metrics of a small study."""
    metrics = folder / "metrics.jsonl"
    small = {"sweep_epochs": 1, "epochs": 2, "dataset": "fashion-mnist", "device": "cpu", **SWEEP}
    example.main(example.Flags(data=data, metrics=metrics, **(small | flags)))
    return rows_of(metrics)


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def best(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return max(rows, key=lambda row: row["validation_accuracy"])


def test_the_choice_is_the_best_on_the_validation_set(example, data, tmp_path, capsys):
    rows = study(example, data, tmp_path)
    swept, epochs, final = rows[:8], rows[8:-1], rows[-1]
    assert {tuple(row[name] for name in CHOICE[:3]) for row in swept} == {
        (hidden, size, lr) for hidden in SWEEP["hidden"] for size in SWEEP["batch_size"] for lr in SWEEP["lr"]
    }
    assert {row["weight_decay"] for row in swept} == {0.0}
    assert [(row["weight_decay"], row["epoch"]) for row in epochs] == [(0, 1), (0, 2), (0.03, 1), (0.03, 2)]
    assert len({row["validation_accuracy"] for row in swept}) > 2  # there is something to choose
    assert {row["steps"] for row in swept if row["batch_size"] == 64} == {8}  # 500 samples: 7 and a rest
    for row in epochs:
        assert all(row[name] == best(swept)[name] for name in CHOICE[:3])
    chosen = best([row for row in epochs if row["epoch"] == 2])
    assert {key: final[key] for key in chosen} == chosen
    out = capsys.readouterr().out
    said = f"test accuracy {final['test_accuracy']:.4f} | loss {final['test_loss']:.4f} | "
    assert re.fullmatch(re.escape(said) + r"\d+\.\d s \| 1 rank \| cpu", out.splitlines()[-1])


def test_the_best_penalty_is_chosen_wherever_it_stands(example, data, tmp_path):
    single = {"hidden": (8,), "batch_size": (16,), "lr": (0.2,)}
    rows = study(example, data, tmp_path, weight_decay=(0.3, 0.0, 0.1), **single)
    lasts = [row for row in rows[1:-1] if row["epoch"] == 2]
    assert best(lasts)["weight_decay"] == rows[-1]["weight_decay"] == 0.0
    assert sorted(row["validation_accuracy"] for row in lasts)[-2] < best(lasts)["validation_accuracy"]


def test_figures_are_those_of_the_samples_said(example, data, tmp_path, monkeypatch):
    """The validation samples are the training file's last sixth, the test samples the test file's."""
    seen = {}
    fit = example.training.fit

    def spy(model, optimizer, train, test, *rest, **options):
        results = fit(model, optimizer, train, test, *rest, **options)
        seen.update(model=model, train=train, validation=test, seed=options["seed"])
        return results

    monkeypatch.setattr(example.training, "fit", spy)
    final = study(example, data, tmp_path, weight_decay=(0.0,), samples=300, seed=3)[-1]
    with example.alone("cpu") as world:
        file, test = example.load("fashion-mnist", data, world)
    assert seen["seed"] == 3
    assert torch.equal(seen["train"].images, file.images[:300])
    assert torch.equal(seen["validation"].images, file.images[500:])
    for samples, name in ((file[500:], "validation"), (test, "test")):
        outputs = seen["model"](samples.inputs(slice(None))).double()
        loss = torch.nn.functional.cross_entropy(outputs, samples.labels).item()
        assert final[f"{name}_loss"] == pytest.approx(loss, rel=1e-6)
        assert final[f"{name}_accuracy"] == pytest.approx(
            (outputs.argmax(1) == samples.labels).double().mean().item()
        )


def test_the_test_set_has_no_say(example, data, tmp_path):
    """With other test labels nothing changes but the test figures; with other validation labels all does."""
    rows = study(example, data, tmp_path)
    for files, first in (("t10k-labels-idx1-ubyte", 0), ("train-labels-idx1-ubyte", 500)):
        root = tmp_path / files
        fashion_mnist(root / "FashionMNIST" / "raw", train=600, test=100)
        path = root / "FashionMNIST" / "raw" / files
        labels = bytearray(path.read_bytes())
        labels[8 + first :] = bytes((label + 1) % 10 for label in labels[8 + first :])
        path.write_bytes(bytes(labels))
        others = study(example, root, tmp_path)
        if files.startswith("t10k"):
            assert timeless(others)[:-1] == timeless(rows)[:-1]
            assert {key for key in rows[-1] if others[-1][key] != rows[-1][key]} <= {
                *("test_accuracy", "test_loss", *TIMES)
            }
            assert others[-1]["test_loss"] > rows[-1]["test_loss"]
        else:
            assert all(
                a["validation_loss"] != b["validation_loss"] for a, b in zip(rows, others, strict=True)
            )


def test_two_runs_give_the_same_figures_and_another_seed_others(example, data, tmp_path):
    first, second, other = (study(example, data, tmp_path, seed=seed) for seed in (1, 1, 2))
    assert timeless(first) == timeless(second)
    assert timeless(first) != timeless(other)


def test_a_larger_penalty_makes_smaller_weights(example, data):
    choice = {"hidden": 8, "batch_size": 16, "lr": 0.2}
    norms = []
    with example.alone("cpu") as world:
        file, _ = example.load("fashion-mnist", data, world)
        for decay in (0.0, 1e-3, 1e-2):
            flags = example.Flags()
            model, _ = example.train(
                choice | {"weight_decay": decay}, 3, flags, (file[:500], file[500:]), world
            )
            norms.append(sum(p.norm() ** 2 for p in model.parameters() if p.dim() > 1).sqrt().item())
    assert norms[0] > 1.01 * norms[1] > 1.01**2 * norms[2]


def test_depth_is_the_number_of_hidden_layers(example, data):
    choice = {"hidden": 6, "batch_size": 16, "lr": 0.2, "weight_decay": 0.0}
    with example.alone("cpu") as world:
        file, _ = example.load("fashion-mnist", data, world)
        model, _ = example.train(choice, 1, example.Flags(depth=3), (file[:50], file[50:60]), world)
    assert model.sizes == (784, 6, 6, 6, 10)


@pytest.mark.parametrize("single", [False, True])
def test_pictures_and_tables(example, data, tmp_path, capsys, single):
    """Of several choices and of none."""
    choices = {"hidden": (8,), "batch_size": (16,), "lr": (0.2,), "weight_decay": (0.0,)} if single else {}
    rows = study(example, data, tmp_path, plots=tmp_path / "new" / "pictures", **choices)
    assert len(rows) == (1 + 2 + 1 if single else 8 + 4 + 1)
    (picture,) = (tmp_path / "new" / "pictures").iterdir()
    assert picture.read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    (ratio, gain) = re.search(r"(\d+\.\d\d)× the time of an epoch, accuracy ([+-][01]\.\d{4})", out).groups()
    if single:
        assert (ratio, gain) == ("1.00", "+0.0000")
    else:
        wide = [row for row in rows[:8] if row["hidden"] == best(rows[:8])["hidden"]]
        few, many = (best([row for row in wide if row["batch_size"] == size]) for size in (16, 64))
        assert ratio == f"{many['s_per_epoch'] / few['s_per_epoch']:.2f}"
        assert gain == f"{many['validation_accuracy'] - few['validation_accuracy']:+.4f}"


def test_what_the_losses_ask_for(example, data, tmp_path, monkeypatch):
    """A quarter of the validation loss or less is learnt by heart; above another's is too much λ."""
    losses = {0.0: (0.1, 0.5), 1e-3: (0.2, 0.4), 1e-2: (0.41, 0.45)}

    def train(choice, epochs, *, flags, sets, world):
        model, rows = real(choice, epochs, flags=flags, sets=sets, world=world)
        if epochs == 2:
            rows[-1]["train_loss"], rows[-1]["validation_loss"] = losses[choice["weight_decay"]]
        return model, rows

    real = example.train
    monkeypatch.setattr(example, "train", train)
    rows = study(example, data, tmp_path, weight_decay=tuple(losses))
    assert [row["asks_for"] for row in rows[8:-1] if row["epoch"] == 2] == ["more λ", "this λ", "less λ"]


EMPTY = "--hidden, --batch-size, --lr and --weight-decay take one value or more each"
ERRORS = [
    ("--hidden 8 0", r"--hidden is \(8, 0\), expected at least 1"),
    ("--hidden", EMPTY),
    ("--batch-size 32 0", r"--batch-size is \(32, 0\), expected at least 1"),
    ("--batch-size", EMPTY),
    ("--lr 0.1 nan", r"--lr is \(0\.1, nan\), expected at least 0"),
    ("--lr inf", r"--lr is \(inf,\), expected less than 1e\+38"),
    ("--lr", EMPTY),
    ("--weight-decay 0 -1", r"--weight-decay is \(0\.0, -1\.0\), expected at least 0"),
    ("--weight-decay", EMPTY),
    ("--sweep-epochs 0", "--sweep-epochs is 0, expected at least 1"),
    ("--epochs 0", "--epochs is 0, expected at least 1"),
    ("--depth 0", "--depth is 0, expected at least 1"),
    ("--samples 0", "--samples is 0, expected at least 1"),
    ("--momentum 3", "Unrecognized options: --momentum"),
    ("--data /nonexistent", "/nonexistent/MNIST/raw/train-images-idx3-ubyte.gz is missing"),
    ("--metrics /dev/null/m.jsonl", "cannot be written.*/dev/null"),
    ("--plots /dev/null/p", "cannot be written.*/dev/null"),
]


@pytest.mark.parametrize("flags, message", ERRORS)
def test_errors_are_one_line(example, monkeypatch, capsys, flags, message):
    from torchpar import cli

    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--device", "cpu", *flags.split()])
    with pytest.raises(SystemExit) as caught:
        cli.main(example.main, example.Flags)
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, "")
    assert re.fullmatch(rf"digits_report\.py: error: .*{message}.*\n", err)


@pytest.mark.parametrize("wrong", [{"lr": (0.2, 1e37)}, {"weight_decay": (0.0, 1e37)}], ids=str)
def test_a_run_that_diverges_is_refused(example, data, tmp_path, wrong):
    with pytest.raises(
        ConfigError, match=r"^the training loss of epoch \d is (nan|inf); take a smaller rate$"
    ):
        study(example, data, tmp_path, **wrong)
    assert (tmp_path / "metrics.jsonl").read_text() == ""  # and no NaN in it


def test_several_ranks_are_refused(example, monkeypatch):
    from torchpar.parallel import world

    two = world.World(0, 0, 2, torch.device("cpu"))
    monkeypatch.setattr(world, "join_world", lambda device: nullcontext(two))
    with pytest.raises(ConfigError, match=r"^2 processes were started"):
        example.main(example.Flags())


def test_as_a_user_runs_it(data, tmp_path):
    flags = "--dataset fashion-mnist --device cpu --hidden 8 --batch-size 16 --lr 0.2 --epochs 1"
    code, out, err = run(sys.executable, str(SCRIPT), *flags.split(), "--data", str(data))
    assert (code, err) == (0, "")
    ending = r"test accuracy [01]\.\d{4} \| loss \d+\.\d{4} \| \d+\.\d s \| 1 rank \| cpu"
    assert re.fullmatch(ending, out.splitlines()[-1])
    assert max(map(len, out.splitlines())) <= 80
