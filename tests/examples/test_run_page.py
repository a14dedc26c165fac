# SPDX-License-Identifier: MIT
"""The page of a run: every training lesson writes it, and it is legible on a phone in the dark."""

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import lesson
from fake_data import fashion_mnist
from pages import COLORS, Page, check_in, chromium

pytest.importorskip("tyro", reason="tyro reads the flags")
pytest.importorskip("matplotlib", reason="matplotlib draws")
pytest.importorskip("jinja2", reason="jinja2 fills the page")

from support import report

from nogpu.report.drawing import INK
from torchpar.errors import ConfigError

IMAGES = "--dataset fashion-mnist --hidden 16 --device cpu --epochs 2 --batch-size 50"
# Flags, and ranks in this process's pool, of each lesson that has a page.
LESSONS = {
    "train_ddp": (IMAGES, 2),
    "train_fast": (IMAGES, 2),
    "train_tensor_parallel": (IMAGES, 2),
    "train_pipeline": (IMAGES, 2),
    "train_parallel": (f"{IMAGES} --dp 2 --tp 2", 4),
    "train_by_hand": ("--samples 500 --epochs 2", 1),
    "train_mpi": ("--dataset fashion-mnist --hidden 16 --epochs 2 --batch-size 50", 1),
}
# They record the steps and messages that train_ddp and train_pipeline do.
SLOW = ("train_fast", "train_tensor_parallel", "train_parallel")
# The pages of others have the same parts.
ON_A_PHONE = ("train_ddp", "train_by_hand")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return fashion_mnist(tmp_path_factory.mktemp("data"), train=600, test=100)


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in LESSONS],
)
def page(request, ranks, data, tmp_path_factory) -> tuple[str, int, Page]:
    """A lesson, its ranks, and its page."""
    name, (flags, world_size) = request.param, LESSONS[request.param]
    folder = tmp_path_factory.mktemp(name) / "new"
    given = [*flags.split(), "--report", str(folder), "--data", str(data)]
    (code, _, err), *_ = ranks(world_size, lesson, name, *given)
    assert code == 0, err
    return name, world_size, Page(folder / "run.html")


def test_every_lesson_writes_a_page_that_needs_nothing_else(page):
    name, world_size, found = page
    assert found.headings[:3] == [f"{name}.py", "Learning curves", "A step"]
    assert "Test samples by label and prediction" in found.headings
    is_of_points = name == "train_by_hand"
    assert found.images == (0 if is_of_points else report.WORST)
    assert ("Worst-classified test samples" in found.headings) != is_of_points
    # Of curves, the step and the confusion matrix; what they name is on the page.
    assert found.pictures == 3
    assert all(a.startswith(("#", "data:")) for a in found.addresses)
    assert INK not in found.text
    assert "<script" not in found.text
    times, *others, facts = found.tables
    assert times[0] == ["rank", "data", "forward", "backward", "messages", "optimizer", "idle"]
    assert [row[0] for row in times[1:]] == [str(rank) for rank in range(world_size)]
    assert all(float(ms) >= 0 for row in times[1:] for ms in row[1:])
    assert all(float(row[2]) > 0 and float(row[3]) > 0 for row in times[1:])  # forward, backward
    assert ["dimension" in table[0] for table in others] == [True] * (world_size > 1) + [False]
    memory = others[-1]
    assert memory[0][:2] == ["rank", "weights"]
    assert all(int(row[1].replace(",", "")) > 0 for row in memory[1:])
    rows = dict(facts)
    assert rows["command"].startswith(f"{name}.py")
    assert rows["ranks"] == ", ".join(map(str, range(world_size)))


@pytest.mark.parametrize("page", ["train_pipeline"], indirect=True)
def test_the_waits_of_a_pipeline_are_idle(page):
    _, _, found = page
    assert all(float(row[-1]) > 0 for row in found.tables[0][1:])
    assert {row[2] for row in found.tables[1][1:]} == {"send", "recv"}


def test_the_worst_samples_are_those_farthest_below_another_class():
    outputs = np.array([[5.0, 0.0], [0.0, 3.0], [1.0, 2.0], [9.0, 0.0]])
    labels = np.array([0, 0, 0, 1])
    images = np.zeros((4, 2, 2))
    found = report.worst(outputs, labels, images, ["a", "b"])
    assert [one[1:] for one in found] == [("b", "a"), ("a", "b"), ("a", "b"), ("a", "a")]
    assert report.worst(outputs, labels, images[:, 0], ["a", "b"]) == []


def test_text_of_a_command_is_no_markup(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["train.py", "--data", "<script>"])
    figures = [{"epoch": 1, "train_loss": 1.0, "test_loss": 2.0, "test_accuracy": None}]
    report.write(tmp_path / "a" / "b", {"": report.Run(figures, "the end", [])})
    found = Page(tmp_path / "a" / "b" / "run.html")
    assert found.headings == ["train.py", "Learning curves", "What was run, and where"]
    assert "&lt;script&gt;" in found.text


def test_a_full_disk_leaves_the_earlier_page(tmp_path, monkeypatch):
    figures = [{"epoch": 1, "train_loss": 1.0, "test_loss": 2.0, "test_accuracy": None}]
    runs = {"": report.Run(figures, "the end", [])}
    report.write(tmp_path, runs)
    before = (tmp_path / "run.html").read_text("utf-8")

    def fill(path: Path, text: str, *args: object) -> None:
        path.write_bytes(text.encode()[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fill)
    with pytest.raises(ConfigError, match="cannot be written"):
        report.write(tmp_path, runs)
    assert (tmp_path / "run.html").read_text("utf-8") == before
    assert [path.name for path in tmp_path.iterdir()] == ["run.html"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.mark.parametrize(
    "page, scheme",
    [
        pytest.param(
            *(name, scheme), marks=[pytest.mark.slow] * ((name in ON_A_PHONE) != (scheme == "dark"))
        )
        for name in LESSONS
        for scheme in COLORS
        # The parts have the same colors on each page.
        if scheme == "dark" or name in ON_A_PHONE
    ],
    indirect=["page"],
)
def test_the_page_is_legible_on_a_phone(browser, page, tmp_path, scheme):
    check_in(browser, page[2].text, tmp_path, scheme)
