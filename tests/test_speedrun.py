# SPDX-License-Identifier: MIT
"""The speedrun: recipes train as a plain loop does, runs do not depend on those before, files can enter."""

import csv
import re
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean, pstdev
from types import SimpleNamespace

import fake_graph
import pytest
import torch
from commands import run
from torch.nn.functional import cross_entropy

pytest.importorskip("rich", reason="rich prints the tables")
pytest.importorskip("torchvision", reason="torchvision reads the data sets")

from benchmarks.speedrun import __main__ as benchmark
from benchmarks.speedrun import attempts, entries, recipes
from benchmarks.speedrun.recipe import SHIFTS, Recipe, RecipeTrainer
from torchpar import data
from torchpar.data import Samples
from torchpar.errors import ConfigError
from torchpar.parallel.launch.local import start_ranks
from torchpar.parallel.launch.world import World, join_world_of_one
from torchpar.training.graph import GraphedStep, why_not_graphed

SMALL = Recipe(name="small", change="", epochs=2, batch_size=64, hidden=(16,), lr=0.01)
SMALL_MUON = replace(
    recipes.RECORD_98_7, name="small", epochs=3, batch_size=64, hidden=(16,), dtype=torch.float32
)


@pytest.fixture(scope="module")
def images() -> tuple[Samples, Samples]:
    train, test = attempts.load("cpu", validate=False, quick=True)
    return train[:200], test[:100]


@pytest.fixture(scope="module")
def world() -> World:
    with join_world_of_one("cpu") as world:
        yield world


def weights(trainer: RecipeTrainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]


def plain_training(samples: Samples, seed: int) -> list[torch.Tensor]:
    """What `SMALL` says, in PyTorch alone."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(784, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10))
    torch.manual_seed(seed)
    for layer in (model[0], model[2]):
        torch.nn.init.xavier_uniform_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for epoch in (1, 2):
        for x, labels, _ in data.batches(samples, 64, seed=seed, epoch=epoch):
            optimizer.zero_grad()
            cross_entropy(model(x), labels, label_smoothing=0.1).backward()
            optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("fused", [False, True])
def test_a_recipe_trains_as_a_plain_loop(images, world, fused):
    recipe = replace(SMALL, fused=fused, label_smoothing=0.1)
    trainer = recipe.prepare(images[0], world)
    trainer.train(3)
    plain = plain_training(images[0], 3)
    for a, b in zip(weights(trainer), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    trainer.train(4)
    assert not torch.allclose(trainer.model.layers[0].weight, plain[0], atol=1e-3)


@pytest.mark.parametrize(
    "recipe",
    [SMALL, SMALL_MUON, replace(SMALL_MUON, dtype=torch.bfloat16, average=0.9, warmup=0.5)],
    ids=["adam", "muon", "averaged"],
)
def test_a_training_depends_on_its_seed_alone(images, world, recipe):
    """Not on the trainings before, whose memory it takes."""
    trainer = recipe.prepare(images[0], world)
    outputs = []
    for seed in (1, 2, 1):
        trainer.samples.features.fill_(torch.nan)  # nothing that depends on the images was done before
        trainer.train(seed)
        outputs.append(trainer.outputs(images[1]).detach())
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_graph_of_the_step_has_the_bits_of_the_step(images, world, monkeypatch, dtype):
    """As on a GPU, where the images of an epoch are moved in the memory that the graph reads."""
    monkeypatch.setattr(GraphedStep, "_capture", fake_graph.capture)
    recipe = replace(SMALL_MUON, dtype=dtype)
    eager, graphed = recipe.prepare(images[0], world), recipe.prepare(images[0], world)
    for trainer in (eager, graphed):  # both read their rates from tensors
        trainer.graph = GraphedStep(trainer._step, trainer.samples, trainer.optimizer, pytest.fail)
        assert why_not_graphed(trainer.optimizer, replace(world, device=torch.device("cuda")), True) == ""
    eager.graph._failed = True
    for seed in (0, 1):
        eager.train(seed)
        graphed.train(seed)
        assert not any(eager.graph._graphs.values())
        assert graphed.graph._graphs.keys() == {(64, 64), (8, 8)}
        assert all(graphed.graph._graphs.values())
        assert all(torch.equal(a, b) for a, b in zip(weights(eager), weights(graphed), strict=True))


def test_the_rate_rises_and_falls():
    recipe = replace(SMALL, warmup=0.2, decay=True)
    assert max(replace(SMALL, warmup=0.2).lr_factor(step, 66) for step in range(66)) == 1
    factors = [recipe.lr_factor(step, 10) for step in range(10)]
    assert factors == pytest.approx([0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    assert [replace(SMALL, decay=True).lr_factor(step, 4) for step in range(4)] == [1, 0.75, 0.5, 0.25]
    assert {SMALL.lr_factor(step, 4) for step in range(4)} == {1.0}


def test_each_epoch_moves_the_images_and_the_last_does_not(images, world, monkeypatch):
    seen = []
    pooled = Recipe.pooled
    monkeypatch.setattr(Recipe, "pooled", lambda *args: seen.append(args[2:]) or pooled(*args))
    trainer = SMALL_MUON.prepare(images[0], world)
    seen.clear()
    trainer.train(0)
    assert seen == [((0, -1),), ((0, 1),), ((0, 0),)]
    assert torch.equal(trainer.samples.features, images[0].pooled(3, 2).features)
    assert len(set(SHIFTS)) == 9


def test_choices_are_scored_on_training_images_that_were_left_out():
    train, test = data.load("mnist", attempts.DATA)
    chosen = attempts.load("cpu", validate=True, quick=False)
    assert [len(part) for part in chosen] == [50_000, 10_000]
    assert torch.equal(torch.cat([part.features for part in chosen]), train.features)
    record = attempts.load("cpu", validate=False, quick=False)
    assert [len(part) for part in record] == [60_000, 10_000]
    assert torch.equal(record[1].labels, test.labels)


def test_recipes_have_names_of_their_own():
    every = [entry for group in (recipes.GROUPS["ladder"], recipes.TRIED) for entry in group]
    assert len({entry.name for entry in every}) == len(every)
    assert all(entries.find(entry.name) is entry for entry in every)
    assert entries.chosen(None) == ["record-98.0", "record-98.7"]
    assert entries.chosen(["ladder", "record-98.0"])[-2:] == ["record-98.0", "record-98.7"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_it_runs(tmp_path, capsys, ranks):
    pytest.importorskip("matplotlib", reason="matplotlib draws the picture")
    flags = ["--quick", "--seeds=3", f"--ranks={ranks}", f"--output={tmp_path}", "--recipe=records"]
    assert benchmark.main(flags) == 0
    out = capsys.readouterr().out
    written = tmp_path / ("speedrun-records" if ranks == 1 else "speedrun-records-2-ranks")
    rows = list(csv.DictReader(written.with_suffix(".csv").read_text().splitlines()))
    assert [(row["recipe"], row["seed"]) for row in rows] == [
        (name, seed) for name in ("record-98.0", "record-98.7") for seed in "123"
    ]
    accuracies = [100 * float(row["accuracy"]) for row in rows[3:]]
    assert min(accuracies) > 50  # of 2,000 images
    assert len({row["accuracy"] for row in rows}) > 2
    cells = f"{mean(accuracies):.2f} ± {pstdev(accuracies):.2f}"
    assert cells in out
    assert f"| {cells} | 3 |" in written.with_suffix(".md").read_text()
    assert "98.0%: reached by none of these recipes" in out
    assert written.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_two_ranks_learn_the_same(tmp_path):
    """Adam, because Muon's bfloat16 enlarges roundings."""
    file = tmp_path / "adam.py"
    recipe = 'Recipe(name="adam", change="", epochs=2, hidden=(32,), lr=0.01, fused=True)'
    file.write_text(f"from benchmarks.speedrun.recipe import Recipe\nentry = {recipe}")
    with start_ranks(2) as ranks, join_world_of_one("cpu") as alone:
        on_ranks = attempts.on_ranks(str(file), ranks, validate=False, quick=True)
        local = attempts.local(str(file), alone, *attempts.load("cpu", validate=False, quick=True))
        accuracies = [(on_ranks(seed)[1], local(seed)[1]) for seed in (1, 2)]
        ranks.run(attempts.forget)
    assert [together for together, _ in accuracies] == pytest.approx([one for _, one in accuracies], abs=2e-3)
    assert accuracies[0][0] != accuracies[1][0]


def test_the_clock_runs_while_a_network_is_trained(tmp_path, images, world, monkeypatch):
    now = 0.0
    monkeypatch.setattr(attempts.time, "perf_counter", lambda: now)

    class Slow:
        def train(self, seed: int) -> None:
            nonlocal now
            now += seed

        def outputs(self, samples: Samples) -> torch.Tensor:
            nonlocal now
            now += 100
            assert not samples.labels.any()  # the labels are not told
            return torch.zeros(len(samples), 10)

    entry = SimpleNamespace(name="slow", change="", prepare=lambda samples, world: Slow())
    monkeypatch.setattr(attempts, "find", lambda name: entry)
    attempt = attempts.local("slow", world, *images)
    assert [attempt(seed)[0] for seed in (3, 5)] == [3, 5]


def test_without_numba_it_starts():
    """README's first command does not install it."""
    program = "import sys; sys.modules['numba'] = None; import benchmarks.speedrun.__main__"
    assert run(sys.executable, "-c", program)[0] == 0


@pytest.mark.slow
def test_every_recipe_runs(capsys):
    assert benchmark.main(["--quick", "--recipe=ladder", "--recipe=tried", "--validate"]) == 0
    out = capsys.readouterr().out
    for group in recipes.GROUPS.values():
        assert all(entry.name in out for entry in group)


def test_the_fastest_of_those_that_reach_an_accuracy_is_named():
    scores = [("slow", [2.0, 4.0], [0.981, 0.983]), ("fast", [1.0, 1.0], [0.979, 0.981])]
    found = [benchmark.Summary(name, "", seconds, accuracies) for name, seconds, accuracies in scores]
    assert benchmark.fastest(found, 0.98) == "98.0%: 1 s, by fast"
    assert benchmark.fastest(found, 0.981) == "98.1%: 3 s, by slow"
    assert benchmark.fastest(found, 0.987) == "98.7%: reached by none of these recipes"


ENTRY = """
import torch
from torchpar.data import Samples

class Nearest:
    name, change = "nearest", "the mean image of each class"

    def prepare(self, samples, world):
        self.samples = samples
        return self

    def train(self, seed):
        x = self.samples.inputs(slice(None))
        self.means = torch.stack([x[self.samples.labels == label].mean(0) for label in range(10)])

    def outputs(self, samples):
        return OUTPUTS

entry = Nearest()
"""


def enter(folder: Path, text: str) -> str:
    file = folder / "mine.py"
    file.write_text(text)
    return f"--recipe={file}"


def test_a_file_can_enter(tmp_path, capsys):
    text = ENTRY.replace("OUTPUTS", "-torch.cdist(samples.inputs(slice(None)), self.means)")
    assert benchmark.main(["--quick", "--recipe=record-98.0", enter(tmp_path, text)]) == 0
    out = capsys.readouterr().out
    (accuracy,) = re.findall(r"│ nearest +│ the mean image of each class +│ .* │ +(\d+\.\d+) ± 0.00 │", out)
    assert 70 < float(accuracy) < 85


def test_a_file_with_another_recipe_can_enter(tmp_path, capsys):
    text = "from dataclasses import replace\nfrom benchmarks.speedrun.recipes import RECORD_98\n"
    text += 'entry = replace(RECORD_98, name="mine", change="fewer units", hidden=(64,))'
    assert benchmark.main(["--quick", enter(tmp_path, text), "--ranks=2"]) == 0
    assert "mine" in capsys.readouterr().out


@pytest.mark.parametrize(
    "outputs, reason",
    [
        ("torch.zeros(3, 10)", r"ConfigError: outputs are (3, 10), expected (2000, 10)"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("torch.full((2000, 10), torch.nan)", "ConfigError: an output is not finite; take a smaller rate"),
    ],
)
def test_an_entry_that_fails_is_reported(tmp_path, capsys, outputs, reason):
    flags = ["--quick", "--recipe=record-98.0", enter(tmp_path, ENTRY.replace("OUTPUTS", outputs))]
    assert benchmark.main(flags) == 1
    out = capsys.readouterr().out
    assert f"not ok: {tmp_path / 'mine.py'} {reason}" in out
    assert "│ record-98.0" in out


def test_a_recipe_by_autograd_takes_one_rank(capsys):
    for name, reason in {
        "in-memory": "in-memory computes gradients by autograd",
        "customary": "is one process",
    }.items():
        assert benchmark.main(["--quick", f"--recipe={name}", "--ranks=2"]) == 1
        assert reason in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, message",
    [
        ("x = 1", "mine.py defines no entry; see docs/speedrun.md"),
        ("entry = 1", "has no name and no change and no prepare; see docs/speedrun.md"),
        ("entry =", "mine.py cannot be read (SyntaxError: "),
        ("raise KeyError('x')", "mine.py cannot be read (KeyError: 'x')"),
        ("raise SystemExit(0)", "mine.py cannot be read (SystemExit: 0)"),
    ],
)
def test_a_file_without_an_entry_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        benchmark.main(["--quick", enter(tmp_path, text)])


def test_an_entry_that_cannot_be_prepared_leaves_the_others(tmp_path, capsys):
    text = "from dataclasses import replace\nfrom benchmarks.speedrun.recipes import RECORD_98\n"
    text += 'entry = replace(RECORD_98, name="mine", change="", activation="tanh")'
    assert benchmark.main(["--quick", enter(tmp_path, text), "--recipe=record-98.0"]) == 1
    out = capsys.readouterr().out
    assert "mine.py ValueError: hidden is 'tanh', expected one of" in out
    assert "│ record-98.0" in out


def test_two_entries_of_one_name_are_refused(tmp_path):
    text = "from benchmarks.speedrun.recipes import RECORD_98 as entry"
    with pytest.raises(ConfigError, match=r"two entries are called record-98\.0; give them other names"):
        benchmark.main(["--recipe=records", enter(tmp_path, text)])


def test_unknown_recipes_and_files_are_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"no recipe is called 'record', expected a \.py file or one of rec"
    ):
        benchmark.main(["--recipe=record"])
    with pytest.raises(ConfigError, match=r"none.py cannot be read \(FileNotFoundError"):
        benchmark.main([f"--recipe={tmp_path / 'none.py'}"])
    with pytest.raises(ConfigError, match="--seeds is 0, expected at least 1"):
        benchmark.main(["--seeds=0"])


@pytest.mark.parametrize("change", [{"fused": False}, {"optimizer": "sgd"}, {"activation": "tanh"}])
def test_settings_that_do_not_fit_are_refused(images, world, change):
    with pytest.raises((ConfigError, ValueError), match=r"by autograd|optimizer is 'sgd'|hidden is 'tanh'"):
        replace(recipes.RECORD_98, **change).prepare(images[0], world)
