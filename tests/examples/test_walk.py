# SPDX-License-Identifier: MIT
"""The files that a reader of `train_ddp.py` passes: those that its run enters, and those of a line.
And the generators that a batch passes.

One process computes by torchpar's operators and by Muon, whose files are most of them.
"""

import sys
from collections.abc import Iterator
from inspect import CO_GENERATOR
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from commands import ROOT, lesson
from fake_data import fashion_mnist

pytest.importorskip("tyro", reason="tyro reads the flags")

import train_ddp

from torchpar.data import Samples

ROOMS = tuple(str(ROOT / name) for name in ("examples", "torchpar"))
# By flags: all files, and those beside the operators and Muon: the lesson, its data and its run.
MOST_FILES = {"": (32, 16), "--plain": (22, 15)}
MOST_GENERATORS = 2
# From the lesson to the line: its loop, the log, the console.
LINE = ["console.py", "lesson.py", "train_ddp.py"]


class Walk:
    """A profile function that notes the calls within ``main``.

    Attributes:
        entered: the files of `ROOMS`.
        line: the files above the line of an epoch, from it to the lesson.
        generators: the generators above the reading of a batch's features.
    """

    def __init__(self) -> None:
        self.entered: set[Path] = set()
        self.line: list[str] = []
        self.generators: set[str] = set()

    def main(self, flags: train_ddp.Flags) -> None:
        before = sys.getprofile()
        sys.setprofile(self.note)
        try:
            MAIN(flags)
        finally:
            sys.setprofile(before)

    def note(self, frame: FrameType, event: str, argument: Any) -> None:
        file = frame.f_code.co_filename
        if event != "call" or not file.startswith(ROOMS):
            return
        self.entered.add(Path(file))
        above = [at.f_code for at in frames_above(frame)]
        if frame.f_code.co_name == "epoch_line":
            names = [code.co_filename for code in above if code.co_filename.startswith(ROOMS)]
            self.line = [Path(name).name for name in dict.fromkeys(names)]
        if frame.f_code is Samples.inputs.__code__:
            self.generators |= {one.co_qualname for one in above if one.co_flags & CO_GENERATOR}


MAIN = train_ddp.main


def frames_above(frame: FrameType) -> Iterator[FrameType]:
    at: FrameType | None = frame
    while at is not None and at.f_code is not Walk.main.__code__:
        yield at
        at = at.f_back


@pytest.mark.parametrize("flags", MOST_FILES)
def test_a_run_enters_few_files_and_its_line_is_near_its_loop(tmp_path, monkeypatch, flags):
    root = fashion_mnist(tmp_path, train=100, test=50)
    data = ["--dataset", "fashion-mnist", "--data", str(root), "--device", "cpu", *flags.split()]
    for _ in range(2):  # in the first run, files of what is done once a process are entered, too
        walk = Walk()
        monkeypatch.setattr(train_ddp, "main", walk.main)
        code, _, err = lesson("train_ddp", *data, "--dry-run", "--batch-size", "10")
        assert code == 0, err
    most, most_of_lesson = MOST_FILES[flags]
    assert len(walk.entered) <= most, sorted(path.name for path in walk.entered)
    computing = ("library", "ops", "optim")
    of_lesson = [path for path in walk.entered if path.parent.name not in computing]
    assert len(of_lesson) <= most_of_lesson, sorted(path.name for path in of_lesson)
    assert walk.line == LINE
    assert 1 <= len(walk.generators) <= MOST_GENERATORS, walk.generators
