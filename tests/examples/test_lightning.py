# SPDX-License-Identifier: MIT
"""The Lightning lesson takes the steps of the plain loop, on ranks too, resumes, validates, stops
and writes its page."""

import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import plain_loop
import pytest
import torch
from commands import LAST_LINE, ROOT, run
from fake_data import fashion_mnist
from pages import Page
from torch.nn.parallel import DistributedDataParallel

from torchpar import training
from torchpar.data import load
from torchpar.nn import MLP
from torchpar.parallel.launch.world import join_world

ADVICE = (
    "`isinstance.treespec, LeafSpec",  # Lightning 2.6 on torch 2.15
    "The `srun` command is available",
    "The number of training batches",  # fewer than the logging interval
    "Checkpoint directory .* exists and is not empty",
    "Be aware that when using `ckpt_path`, callbacks",
    "The dirpath has changed",  # a resumed run's is another version_N
)
pytestmark = [
    *(pytest.mark.filterwarnings(f"ignore:{text}") for text in ADVICE),
    # Not imported here: that takes seconds on each worker.
    pytest.mark.skipif(
        find_spec("lightning") is None, reason="the extra `lightning` is not installed"
    ),
]
# The last of the 5 batches holds one sample, and rank 1 has none of it.
TRAIN, TEST, BATCH = 201, 101, 50
SIZES = [784, 20, 10]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return fashion_mnist(tmp_path_factory.mktemp("data"), TRAIN, TEST)


def by_lightning(data: Path, seed: int = 0, **options: Any) -> Any:
    """Weights, and the training and test losses and accuracies of two epochs."""
    from lightning.pytorch import Trainer
    from train_lightning import MNIST, LitMLP

    torch.manual_seed(0)
    model = LitMLP(SIZES, lr=0.3, weight_decay=1e-4)
    fed = MNIST(data, "fashion-mnist", BATCH, seed)
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        **silent, accelerator="cpu", max_epochs=2, enable_model_summary=False, **options
    )
    trainer.fit(model, fed)
    logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
    (tested,) = trainer.test(model, fed, verbose=False)
    return [p.detach().numpy() for p in model.parameters()], logged | tested


def by_the_plain_loop(data: Path) -> Any:
    torch.manual_seed(0)
    model = MLP(SIZES)
    with join_world("cpu") as world:
        optimizer = training.sgd(model, lr=0.3, momentum=0.9, weight_decay=1e-4)
        replica = DistributedDataParallel(model) if world.world_size > 1 else model
        sets = load("fashion-mnist", data)
        run = plain_loop.train(
            model, optimizer, world, *sets, replica=replica, epochs=2, batch_size=BATCH
        )
    return [p.detach().numpy() for p in model.parameters()], run.results[-1]


def on_two_ranks(data: Path) -> Any:
    plain, ddp = by_the_plain_loop(data), {"strategy": "ddp", "devices": 2}
    return plain, by_lightning(data, **ddp), by_lightning(data, seed=1, **ddp)


@pytest.mark.slow  # importing Lightning takes each rank seconds
def test_two_ranks_learn_what_two_ranks_of_the_plain_loop_do(data, ranks):
    for (plain, last), (mine, logged), (other, _) in ranks(2, on_two_ranks, data):
        assert all((a == b).all() for a, b in zip(mine, plain, strict=True))
        assert not any((a == b).all() for a, b in zip(other, plain, strict=True))
        # Lightning adds 201 numbers of float32.
        for name in ("train_loss", "test_loss", "test_accuracy"):
            assert logged[name] == pytest.approx(getattr(last, name), rel=TRAIN * 2**-24)


@pytest.fixture
def example(data, monkeypatch, tmp_path, capsys):
    """``example(command, *flags)``: the last line that the example prints, run in an empty
    folder."""
    monkeypatch.chdir(tmp_path)
    # Lightning 2.6 on jsonargparse 4.53.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    import train_lightning

    def call(command: str, *flags: str) -> str:
        where = [
            f"--data.root={data}",
            "--data.dataset=fashion-mnist",
            f"--data.batch_size={BATCH}",
        ]
        own = [*where, "--model.sizes=[784,20,10]", "--trainer.accelerator=cpu", *flags]
        monkeypatch.setattr(sys, "argv", ["train_lightning.py", command, *own])
        train_lightning.main()
        assert list(tmp_path.iterdir()) == []
        return capsys.readouterr().out.splitlines()[-1]

    return call


def test_the_configuration_saves_the_best_and_a_resumed_run_ends_as_the_whole_one(
    example, tmp_path_factory
):
    root, config = tmp_path_factory.mktemp("root"), ROOT / "examples" / "lightning.yaml"
    (default,) = re.findall(r"default_root_dir: (\S+)", config.read_text())
    assert default == "runs"  # beside the user's other files; another user may own a folder in /tmp
    flags = (f"--config={config}", f"--trainer.default_root_dir={root}", "--data.validation=21")

    def fit(epochs: int, *more: str) -> tuple[str, Path]:
        last_line = example(
            "fit", *flags, f"--trainer.max_epochs={epochs}", "--model.schedule=constant", *more
        )
        return last_line, max((root / "lightning_logs").iterdir(), key=lambda path: path.name)

    fitted, whole = fit(3)
    assert re.fullmatch(LAST_LINE, fitted)
    (best,) = (whole / "checkpoints").glob("epoch=*.ckpt")
    tested = example("test", f"--ckpt_path={best}")
    assert tested.split(" | ")[:2] == fitted.split(" | ")[:2]
    _, part = fit(1)
    _, resumed = fit(3, f"--ckpt_path={part / 'checkpoints' / 'last.ckpt'}")
    weights = [
        torch.load(run / "checkpoints" / "last.ckpt")["state_dict"]
        for run in (whole, part, resumed)
    ]
    assert all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
    assert not any(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_an_error_of_the_example_is_one_line(example, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        example("fit", "--data.validation=201")
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error" in line)
    assert line == "train_lightning.py: error: validation is 201, expected 0 to 200 samples"


def test_the_page_of_a_run(example, tmp_path_factory):
    for package in ("matplotlib", "jinja2"):
        pytest.importorskip(package, reason=f"{package} makes the page")
    from support import report

    folder = tmp_path_factory.mktemp("page")
    flags = ("--data.validation=101", "--trainer.max_epochs=2", f"--report={folder}")
    assert re.fullmatch(LAST_LINE, example("fit", *flags))
    found = Page(folder / "run.html")
    assert found.headings[:3] == ["train_lightning.py", "Learning curves", "A step"]
    assert found.images == report.WORST
    times, memory, _ = found.tables
    assert all(float(ms) > 0 for ms in times[1][1:4])
    assert int(memory[1][4].replace(",", "")) > 0  # activations


@pytest.mark.slow
def test_the_script_is_a_command(data):
    """The other tests run it within their process."""
    script = str(ROOT / "examples" / "train_lightning.py")
    flags = f"fit --data.root {data} --data.dataset fashion-mnist --trainer.max_epochs 1"
    code, out, err = run(sys.executable, script, *flags.split(), "--trainer.accelerator=cpu")
    assert code == 0, err
    assert re.fullmatch(LAST_LINE, out.splitlines()[-1])
