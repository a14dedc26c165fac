# SPDX-License-Identifier: MIT
"""The files that a reader of `train_ddp.py` passes: those that its run enters, and those of a line.

One process computes by torchpar's operators and by Muon, whose files are most of them.
"""

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from commands import ROOT, lesson
from fake_data import fashion_mnist

pytest.importorskip("tyro", reason="tyro reads the flags")

import train_ddp

ROOMS = tuple(str(ROOT / name) for name in ("examples", "torchpar"))
MOST_FILES = 32
# From the lesson to the line: its loop, the run, the log, the console.
LINE = ["console.py", "session.py", "run.py", "train_ddp.py"]


def test_a_run_enters_few_files_and_its_line_is_near_its_loop(tmp_path, monkeypatch):
    entered: set[Path] = set()
    above_line: list[Path] = []

    def path_of(frame: FrameType) -> Path | None:
        file = frame.f_code.co_filename
        return Path(file) if file.startswith(ROOMS) else None

    def note(frame: FrameType, event: str, argument: Any) -> None:
        path = path_of(frame)
        if event != "call" or path is None:
            return
        entered.add(path)
        if frame.f_code.co_name == "epoch_line":
            at: FrameType | None = frame
            while at is not None and at.f_code is not main.__code__:
                if (found := path_of(at)) and found not in above_line:
                    above_line.append(found)
                at = at.f_back

    def main(flags: train_ddp.Flags) -> None:
        before = sys.getprofile()
        sys.setprofile(note)
        try:
            run(flags)
        finally:
            sys.setprofile(before)

    run = train_ddp.main
    monkeypatch.setattr(train_ddp, "main", main)
    root = fashion_mnist(tmp_path, train=100, test=50)
    data = ["--dataset", "fashion-mnist", "--data", str(root), "--device", "cpu"]
    for _ in range(2):  # in the first run, files of what is done once a process are entered, too
        entered.clear()
        above_line.clear()
        code, _, err = lesson("train_ddp", *data, "--dry-run", "--batch-size", "10")
        assert code == 0, err
    assert len(entered) <= MOST_FILES, sorted(path.name for path in entered)
    assert [path.name for path in above_line] == LINE
