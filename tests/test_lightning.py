# SPDX-License-Identifier: MIT
"""Lightning: its Trainer takes the steps of the plain loop, resumes, validates and stops."""

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import plain_loop
import pytest
import torch
from commands import LAST_LINE, ROOT, scalars
from fake_data import fashion_mnist
from torch.nn.parallel import DistributedDataParallel

from torchpar import training
from torchpar.data import load
from torchpar.nn import MLP
from torchpar.parallel.launch.world import join_world
from torchpar.training.losses import Loss

pytest.importorskip("torchvision", reason="torchvision reads the data sets")
pytest.importorskip("lightning", reason="the extra `lightning` is not installed")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec"),  # Lightning 2.6 on torch 2.15
    pytest.mark.filterwarnings("ignore:The `srun` command is available"),
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),  # no validation
    pytest.mark.filterwarnings("ignore:The number of training batches"),  # fewer than the logging interval
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
]
TRAIN, TEST, BATCH = 201, 101, 50  # the last of the 5 batches holds one sample, and rank 1 has none of it
SIZES = [784, 20, 10]
EXAMPLE = str(ROOT / "examples" / "train_lightning.py")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    fashion_mnist(root / "FashionMNIST" / "raw", TRAIN, TEST)
    return root


def lit(**options: Any) -> Any:
    from train_lightning import LitMLP

    torch.manual_seed(0)
    return LitMLP(**{"sizes": SIZES, "lr": 0.3, "weight_decay": 1e-4} | options)


def module(data: Path, **options: Any) -> Any:
    from torchpar.lightning import MNISTDataModule

    return MNISTDataModule(data, **{"dataset": "fashion-mnist", "batch_size": BATCH} | options)


def trainer(**options: Any) -> Any:
    from lightning.pytorch import Trainer

    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    where = {"accelerator": "cpu", "devices": 1, "max_epochs": 2, "enable_model_summary": False}
    return Trainer(**silent | where | options)


def weights(model: torch.nn.Module) -> list[Any]:
    return [p.detach().numpy() for p in model.parameters()]


def same(a: list[Any], b: list[Any]) -> bool:
    return all((x == y).all() for x, y in zip(a, b, strict=True))


def by_lightning(data: Path, model: Any = None, **options: Any) -> Any:
    """Weights, and the train, validation and test losses and accuracies of two epochs."""
    model = lit() if model is None else model
    its, fed = trainer(**options), module(data, validation="test")
    its.fit(model, fed)
    logged = {name: value.item() for name, value in its.callback_metrics.items()}
    (tested,) = its.test(model, fed, verbose=False)
    return weights(model), logged | tested


def by_the_plain_loop(data: Path, loss: Loss = "cross-entropy") -> Any:
    torch.manual_seed(0)
    model = MLP(SIZES, output="logits" if loss == "cross-entropy" else "sigmoid")
    with join_world("cpu") as world:
        optimizer = training.sgd(model, lr=0.3, momentum=0.9, weight_decay=1e-4)
        run = plain_loop.train(
            model,
            optimizer,
            world,
            *load("fashion-mnist", data),
            replica=DistributedDataParallel(model) if world.world_size > 1 else model,
            loss=loss,
            epochs=2,
            batch_size=BATCH,
        )
    return weights(model), run.results[-1]


def agrees(logged: dict[str, float], last: Any) -> None:
    # Sums in double precision; the accuracy is torchmetrics', in single.
    assert logged["train_loss"] == pytest.approx(last.train_loss, rel=1e-14)
    for stage in ("val", "test"):
        assert logged[f"{stage}_loss"] == pytest.approx(last.test_loss, rel=1e-7)
        assert logged[f"{stage}_accuracy"] == pytest.approx(last.test_accuracy, rel=1e-7)


@pytest.mark.parametrize("loss", ["cross-entropy", "mse"])
def test_the_weights_are_the_plain_loops_to_the_bit(data, loss):
    plain, last = by_the_plain_loop(data, loss)
    mine, logged = by_lightning(data, lit(loss=loss))
    assert same(mine, plain)
    agrees(logged, last)
    other = lit(loss=loss)
    trainer().fit(other, module(data, seed=1))
    assert not same(weights(other), plain)


def on_two_ranks(data: Path) -> Any:
    plain = by_the_plain_loop(data)  # first: Lightning takes WORLD_SIZE from the environment when it has run
    return by_lightning(data, strategy="ddp", devices=2), plain


def test_two_ranks_learn_what_two_ranks_of_the_plain_loop_do(data, ranks):
    for (mine, logged), (plain, last) in ranks(2, on_two_ranks, data):
        assert same(mine, plain)
        agrees(logged, last)


@pytest.mark.parametrize(
    "when",
    [{"every_n_train_steps": 2}, {"every_n_epochs": 1, "save_on_train_epoch_end": False}],
    ids=["steps", "validations"],
)
def test_a_resumed_run_ends_as_the_whole_one_to_the_bit(data, tmp_path, when):
    from lightning.pytorch.callbacks import ModelCheckpoint

    def fit(model: Any, checkpoint: Path | None = None, **options: Any) -> list[Any]:
        trainer(max_epochs=3, **options).fit(model, module(data, validation="test"), ckpt_path=checkpoint)
        return weights(model)

    saver = ModelCheckpoint(tmp_path, "{step:02d}", save_top_k=-1, **when)
    whole = fit(lit(), enable_checkpointing=True, callbacks=[saver])
    for step in (4, 10) if "every_n_train_steps" in when else (10,):
        model = lit()
        torch.nn.init.zeros_(model.mlp.layers[0].weight)  # what is not restored would show
        assert same(fit(model, tmp_path / f"step={step:02d}.ckpt"), whole)


def test_validation_samples_are_the_last_ones_and_no_others_are_trained_on(data):
    fed, model = module(data, validation=21), lit()
    its = trainer()
    its.fit(model, fed)
    train, _ = load("fashion-mnist", data)
    assert torch.equal(fed.train.features, train.features[:180])
    outputs = model(train[180:].inputs(slice(None)))
    mean = torch.nn.functional.cross_entropy(outputs.double(), train.labels[180:])
    assert its.callback_metrics["val_loss"].item() == pytest.approx(mean.item(), rel=1e-7)
    right = (outputs.argmax(1) == train.labels[180:]).double().mean()
    assert its.callback_metrics["val_accuracy"].item() == pytest.approx(right.item(), rel=1e-7)


def test_bfloat16_is_mixed_with_every_loss(data):
    """The binary cross-entropy refuses to run under autocast."""
    _, single = by_lightning(data, lit(loss="bce"))
    _, mixed = by_lightning(data, lit(loss="bce"), precision="bf16-mixed")
    assert mixed["test_loss"] != single["test_loss"]
    assert mixed["test_loss"] == pytest.approx(single["test_loss"], rel=0.02)


def test_a_missing_lightning_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "torchpar.lightning", raising=False)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(ImportError, match=r"needs Lightning \(.*\); pip install 'torchpar\[lightning\]'$"):
        importlib.import_module("torchpar.lightning")


def flags(data: Path) -> list[str]:
    where = [f"--data.root={data}", "--data.dataset=fashion-mnist", f"--data.batch_size={BATCH}"]
    return [*where, "--model.sizes=[784,20,10]", "--trainer.accelerator=cpu", "--trainer.max_epochs=2"]


@pytest.fixture
def example(monkeypatch, tmp_path, capsys):
    """``example(*flags)``: what the example prints, run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning 2.6 on jsonargparse 4.53
    import train_lightning

    def call(*flags: str) -> str:
        monkeypatch.setattr(sys, "argv", [EXAMPLE, *flags])
        train_lightning.main()
        return capsys.readouterr().out

    return call


def test_the_example_with_its_configuration(data, example, tmp_path, tmp_path_factory):
    config, root = ROOT / "examples" / "lightning.yaml", tmp_path_factory.mktemp("root")
    (default,) = re.findall(r"default_root_dir: (\S+)", config.read_text())
    assert Path(default).is_absolute()
    where = (f"--config={config}", f"--trainer.default_root_dir={root}")
    out = example("fit", *where, *flags(data), "--data.validation=21", "--trainer.max_epochs=3")
    fitted = out.splitlines()[-1]
    assert re.fullmatch(LAST_LINE, fitted)
    (version,) = (root / "lightning_logs").iterdir()
    losses = [loss.expected for _, loss in scalars(version, "val_loss")]
    assert len(losses) == 3
    (best,) = (version / "checkpoints").glob("epoch=*.ckpt")
    assert best.name.startswith(f"epoch={losses.index(min(losses))}-")
    assert (version / "checkpoints" / "last.ckpt").exists()
    out = example("test", *flags(data), f"--ckpt_path={best}")
    assert out.splitlines()[-1].split(" | ")[:2] == fitted.split(" | ")[:2]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("--data.root=/nonexistent", "/nonexistent/FashionMNIST/raw/.* is missing"),
        ("--data.validation=201", "validation is 201, expected 'test' or 0 to 200 samples"),
        ("--data.batch_size=0", "batch_size is 0, expected at least the number of ranks that share it, 1"),
        ("--data.bach_size=1", "unrecognized arguments: --data.bach_size=1"),
        ("--model.lr=nan", "nan does not conform to restriction v>=0"),
    ],
)
def test_errors_of_the_example_are_one_line(data, example, capsys, wrong, message):
    with pytest.raises(SystemExit) as caught:
        example("fit", *flags(data), wrong)
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, "")
    ours = [line for line in err.splitlines() if line.startswith("train_lightning.py: error: ")]
    assert len(ours) == 1
    assert re.search(message, ours[0])
