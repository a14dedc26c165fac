# SPDX-License-Identifier: MIT
"""Lightning: its Trainer takes the steps of the plain loop, resumes, validates and stops."""

import importlib
import re
import sys
from functools import partialmethod
from pathlib import Path
from typing import Any

import plain_loop
import pytest
import torch
from commands import ROOT, run
from fake_data import fashion_mnist
from torch.nn.parallel import DistributedDataParallel

from torchpar import linear_sigmoid, training
from torchpar.data import load
from torchpar.errors import ConfigError
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
LAST_LINE = r"(test accuracy [01]\.\d{4} \| loss \d+\.\d{4}) \| \d+\.\d s \| (\d) ranks? \| (cpu|cuda)"


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
            *(model, optimizer, world, *load("fashion-mnist", data)),
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


@pytest.mark.parametrize("loss", ["cross-entropy", "bce", "mse"])
def test_the_weights_are_the_plain_loops_to_the_bit(data, loss):
    plain, last = by_the_plain_loop(data, loss)
    mine, logged = by_lightning(data, lit(loss=loss))
    assert same(mine, plain)
    agrees(logged, last)


def test_the_comparison_rejects_another_order(data):
    its, model = trainer(), lit()
    its.fit(model, module(data, seed=1))
    assert not same(weights(model), by_the_plain_loop(data)[0])


def on_two_ranks(data: Path, checkpoint: Path) -> Any:
    from train_lightning import LitMLP

    class MeanOfMeans(LitMLP):
        """Each rank averages its own loss, and DistributedDataParallel averages these averages."""

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss * batch.global_size / (2 * max(len(batch.labels), 1))

    plain = by_the_plain_loop(data)  # first: Lightning takes WORLD_SIZE from the environment when it has run
    mine = by_lightning(data, strategy="ddp", devices=2)
    torch.manual_seed(0)
    wrong = MeanOfMeans(SIZES, lr=0.3, weight_decay=1e-4)
    goes_on = resumed(data, checkpoint, strategy="ddp", devices=2)
    return mine, plain, by_lightning(data, wrong, strategy="ddp", devices=2)[0], goes_on


def apart(a: list[Any], b: list[Any]) -> float:
    return max(abs(x - y).max() for x, y in zip(a, b, strict=True))


def test_two_ranks_learn_what_two_ranks_of_the_plain_loop_do(data, ranks, tmp_path):
    """To the bit; that is one rank's run but for rounding, as test_training judges."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    alone, _ = by_lightning(data)
    whole, (path,) = saved_by(data, tmp_path, ModelCheckpoint(tmp_path, every_n_train_steps=8))
    for (mine, logged), (plain, last), wrong, goes_on in ranks(2, on_two_ranks, data, path):
        assert same(mine, plain)
        agrees(logged, last)
        assert apart(mine, alone) < 1e-5
        assert apart(wrong, alone) > 1e-3
        assert apart(goes_on, whole) < 1e-5  # begun by one rank, within an epoch


def saved_by(data: Path, folder: Path, saver: Any, **options: Any) -> tuple[list[Any], list[Path]]:
    """The weights after three epochs, and the checkpoints of all that ``saver`` saved."""
    model = lit()
    options = {"max_epochs": 3, "enable_checkpointing": True, "callbacks": [saver]} | options
    trainer(**options).fit(model, module(data, validation="test"))
    return weights(model), sorted(folder.glob("*.ckpt"))


def resumed(data: Path, checkpoint: Path, **options: Any) -> list[Any]:
    model = lit()
    torch.nn.init.zeros_(model.mlp.layers[0].weight)  # what is not restored would show
    trainer(**{"max_epochs": 3} | options).fit(
        model, module(data, validation="test"), ckpt_path=str(checkpoint)
    )
    return weights(model)


@pytest.mark.parametrize(
    "when, checkpoints",
    [
        ({"every_n_train_steps": 2}, 7),  # of 15 steps; after batches 2, 4, 1, 3, 5, 2 and 4 of 5
        ({"every_n_epochs": 1, "save_on_train_epoch_end": True}, 3),
        ({"every_n_epochs": 1, "save_on_train_epoch_end": False}, 3),  # after the validation, before its end
    ],
    ids=["steps", "epochs", "validations"],
)
@pytest.mark.parametrize("until", ["epochs", "steps"])
def test_a_resumed_run_ends_as_the_whole_one_to_the_bit(data, tmp_path, when, checkpoints, until):
    from lightning.pytorch.callbacks import ModelCheckpoint

    length = {"max_steps": 15, "max_epochs": None} if until == "steps" else {}
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, **when)
    whole, paths = saved_by(data, tmp_path, saver, **length)
    assert len(paths) == checkpoints
    for path in paths:
        assert same(resumed(data, path, **length), whole), path.name


def test_resuming_at_an_epochs_first_batch_would_show(data, tmp_path, monkeypatch):
    from lightning.pytorch.callbacks import ModelCheckpoint

    from torchpar import lightning

    saver = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=7)
    whole, (path, _) = saved_by(data, tmp_path, saver)
    batches = lightning.batches
    monkeypatch.setattr(lightning, "batches", lambda *args, start, **kwargs: batches(*args, **kwargs))
    assert not same(resumed(data, path), whole)


def test_a_run_with_other_batches_is_not_resumed(data, tmp_path):
    its, model = trainer(max_epochs=1), lit()
    its.fit(model, module(data))
    its.save_checkpoint(tmp_path / "c.ckpt")
    other = module(data, seed=1, batch_size=40)
    with pytest.raises(
        ConfigError, match="run has batch_size 50, seed 0, this one has batch_size 40, seed 1"
    ):
        trainer().fit(lit(), other, ckpt_path=tmp_path / "c.ckpt")
    (tested,) = trainer().test(lit(lr=0.1), other, ckpt_path=tmp_path / "c.ckpt", verbose=False)
    assert (tested,) == tuple(its.test(model, module(data), verbose=False))


def test_early_stopping_stops(data):
    from lightning.pytorch.callbacks import EarlyStopping

    epochs = []
    for lr in (0.0, 0.3):
        its = trainer(max_epochs=6, callbacks=[EarlyStopping("val_loss", patience=2)])
        its.fit(lit(lr=lr), module(data, validation=21))
        epochs.append(its.current_epoch)
    assert epochs == [3, 6]  # what learns nothing has its best epoch first


def test_validation_samples_are_the_last_ones_and_no_others_are_trained_on(data):
    fed, model = module(data, validation=21), lit()
    its = trainer()
    its.fit(model, fed)
    train, _ = load("fashion-mnist", data)
    assert torch.equal(fed.train.features, train.features[:180])
    assert "'validation': 21" in str(fed)
    outputs = model(train[180:].inputs(slice(None)))
    mean = torch.nn.functional.cross_entropy(outputs.double(), train.labels[180:])
    assert its.callback_metrics["val_loss"].item() == pytest.approx(mean.item(), rel=1e-7)
    right = (outputs.argmax(1) == train.labels[180:]).double().mean()
    assert its.callback_metrics["val_accuracy"].item() == pytest.approx(right.item(), rel=1e-7)


def test_without_validation_there_is_nothing_to_stop_by(data):
    from lightning.pytorch.callbacks import EarlyStopping

    its = trainer()
    its.fit(lit(), module(data))
    assert set(its.callback_metrics) == {"train_loss"}
    with pytest.raises(RuntimeError, match="Early stopping conditioned on metric `val_loss`"):
        trainer(callbacks=[EarlyStopping("val_loss")]).fit(lit(), module(data))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"validation": TRAIN}, "validation is 201, expected 'test' or 0 to 200 samples"),
        ({"validation": -1}, "validation is -1, expected 'test' or 0 to 200 samples"),
        ({"batch_size": 0}, "batch_size is 0, expected at least the number of ranks that share it, 1"),
        ({"dataset": "mnist"}, "train-images-idx3-ubyte.gz is missing"),
    ],
)
def test_errors_of_the_data(data, options, message):
    with pytest.raises(ConfigError, match=message):
        trainer().fit(lit(), module(data, **options))


@pytest.mark.parametrize("loss", ["cross-entropy", "bce"])
def test_bf16_mixed_runs_our_operators_in_bf16(data, loss):
    model, compared = lit(loss=loss), []
    first = model.mlp.layers[0]

    def compare(_: Any, args: Any, output: torch.Tensor) -> None:
        x, weight, bias = (t.detach().bfloat16() for t in (*args, first.weight, first.bias))
        compared.append(
            output.dtype == torch.bfloat16 and torch.equal(output, linear_sigmoid(x, weight, bias))
        )

    first.register_forward_hook(compare)
    mine, logged = by_lightning(data, model, precision="bf16-mixed")
    assert compared
    assert all(compared)
    assert {w.dtype.name for w in mine} == {"float32"}
    single, expected = by_lightning(data, lit(loss=loss))
    assert not same(mine, single)
    assert logged["test_loss"] == pytest.approx(expected["test_loss"], rel=0.02)


def test_double_precision(data):
    mine, _ = by_lightning(data, precision="64-true")
    assert {w.dtype.name for w in mine} == {"float64"}
    assert 0 < apart(mine, by_lightning(data)[0]) < 1e-5


@pytest.mark.slow
def test_compiled(data, monkeypatch):
    """The model by the flag, or whole steps by torch.compile; aot_eager runs the same kernels as eager."""
    monkeypatch.setattr(MLP, "compile", partialmethod(MLP.compile, backend="aot_eager"))
    eager, _ = by_lightning(data)
    assert same(by_lightning(data, torch.compile(lit(), backend="aot_eager"))[0], eager)
    model = lit(compile=True)
    assert model.mlp._compiled_call_impl is not None
    assert same(by_lightning(data, model)[0], eager)
    assert model.state_dict().keys() == lit().state_dict().keys()


def test_overfit_batches_are_the_same_in_each_epoch(data):
    seen: list[torch.Tensor] = []
    model = lit()
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    trainer(overfit_batches=2).fit(model, module(data))
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[0], seen[1])


def test_predictions_are_of_the_test_set_in_order(data):
    its, model, fed = trainer(), lit(), module(data)
    its.fit(model, fed)
    (classes,) = its.predict(model, fed)
    (tested,) = its.test(model, fed, verbose=False)
    assert (classes == fed.test.labels).double().mean().item() == pytest.approx(tested["test_accuracy"])


def test_lightning_is_imported_only_when_asked_for(monkeypatch):
    asked = "import torchpar, torchpar.training, sys; print('lightning' in sys.modules)"
    assert run(sys.executable, "-c", asked) == (0, "False\n", "")
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
    from support import lightning_cli

    def call(*flags: str) -> str:
        monkeypatch.setattr(sys, "argv", [EXAMPLE, *flags])
        lightning_cli.main(train_lightning.LitMLP, train_lightning.MNISTDataModule)
        return capsys.readouterr().out

    return call


@pytest.mark.slow
def test_the_example_on_two_ranks_as_on_one(data, example, tmp_path):
    alone = re.fullmatch(LAST_LINE + "\n", example("fit", *flags(data))).groups()
    assert alone[1:] == ("1", "cpu")
    assert list(tmp_path.iterdir()) == []
    ddp = ("--trainer.strategy=ddp", "--trainer.devices=2")
    code, out, err = run(sys.executable, EXAMPLE, "fit", *flags(data), *ddp)
    assert code == 0, err
    assert re.fullmatch(LAST_LINE + "\n", out).groups() == (alone[0], "2", "cpu")


def test_the_example_with_its_configuration(data, example, tmp_path, tmp_path_factory):
    """A log, checkpoints and early stopping outside of the working directory; a test of the best."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config, root = ROOT / "examples" / "lightning.yaml", tmp_path_factory.mktemp("root")
    (default,) = re.findall(r"default_root_dir: (\S+)", config.read_text())
    assert Path(default).is_absolute()
    where = (f"--config={config}", f"--trainer.default_root_dir={root}")
    out = example("fit", *where, *flags(data), "--data.validation=21", "--trainer.max_epochs=3")
    fitted = re.fullmatch(LAST_LINE, out.splitlines()[-1]).group(1)
    (version,) = (root / "lightning_logs").iterdir()
    losses = [event.value for event in EventAccumulator(str(version)).Reload().Scalars("val_loss")]
    assert len(losses) == 3
    (best,) = (version / "checkpoints").glob("epoch=*.ckpt")
    assert best.name.startswith(f"epoch={losses.index(min(losses))}-")
    assert (version / "checkpoints" / "last.ckpt").exists()
    out = example("test", *flags(data), f"--ckpt_path={best}")
    assert re.fullmatch(LAST_LINE, out.splitlines()[-1]).group(1) == fitted
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("--data.root=/nonexistent", "/nonexistent/FashionMNIST/raw/.* is missing"),
        ("--data.bach_size=1", "unrecognized arguments: --data.bach_size=1"),
        ("--model.sizes=[784]", "sizes is \\[784\\], expected at least an input and an output size"),
        ("--model.sizes=[784,5]", "784 inputs and 5 outputs, expected the data.s 784 features"),
        ("--model.lr=-1", "-1 does not conform to restriction v>=0"),
        ("--model.lr=nan", "nan does not conform to restriction v>=0"),
        ("--trainer.devices=0", "`Trainer.devices='0'.` value is not a valid input"),
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
