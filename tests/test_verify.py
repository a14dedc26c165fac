# SPDX-License-Identifier: MIT
"""``python -m torchpar verify``: the same hash on any mesh, its status, and errors in one line."""

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_data import fashion_mnist
from ranks import fork_context

pytest.importorskip("torchvision", reason="torchvision reads the data sets")
from torchpar.exact import verify
from torchpar.parallel.launch.local import current_world


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """600 images in MNIST's files: four batches of 128 and one of 88."""
    root = tmp_path_factory.mktemp("data")
    fashion_mnist(root / "MNIST" / "raw", train=600)
    return root


def test_meshes_agree_and_the_status_says_if_the_hash_is_published(folder, monkeypatch, capsys):
    fork_context()
    assert verify.main(["--ranks", "2", "--pp", "2", "--data", str(folder)]) == 1
    first, second, third = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"dp 1 × tp 1 × pp 2 on cpu, .*, torch \S+: \d+ s", first)
    found = second.removeprefix("SHA-256 of the weights: ")
    assert re.fullmatch("[0-9a-f]{64}", found)
    assert third.startswith("The published hash is ")
    monkeypatch.setitem(verify.EXPECTED, "mlp", found)
    assert verify.main(["--ranks", "4", "--tp", "2", "--data", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [second, "This is the published hash."]


def check_error(capsys: Any, message: str, *arguments: str) -> None:
    """The command ends with status 2 and an error in one line."""
    fork_context()
    assert verify.main(arguments) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == ""
    assert line.startswith("python -m torchpar verify: error: ")
    assert message in line


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--ranks 3 --tp 2", "--ranks is 3, expected a multiple of --tp 2 times --pp 1"),
        ("--tp -2 --pp -2", "--tp is -2, expected at least 1"),
        ("--pp 4", "--pp is 4, expected at most 3, one stage for each layer"),
        ("--model gpt --pp 2", "--pp is 2, expected 1 for the GPT, which has no pipeline"),
        ("--model gpt --tp 3", "--tp is 3, expected a divisor of the GPT's 4 heads"),
        ("--model gpt --data /missing", "/missing/alice.txt does not exist, expected the book"),
        ("--ranks 2 --data /missing", "/missing"),
    ],
)
def test_wrong_flags_are_an_error_in_one_line(folder, capsys, flags, message):
    data = [] if "--data" in flags else ["--data", str(folder)]
    check_error(capsys, message, *flags.split(), *data)


def kill(*_: Any) -> str:
    """What stands for the training: rank 1 is killed, and the others wait for it."""
    world = current_world()
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    world.sum(torch.ones(1))
    return ""


def test_a_killed_rank_is_an_error_in_one_line(folder, capsys, monkeypatch):
    monkeypatch.setattr(verify, "trained", kill)
    message = "error: a rank was killed, or has ended in an error"
    check_error(capsys, message, "--ranks", "2", "--data", str(folder))


def interrupt(_model: str, _dp: int, _tp: int, _pp: int, folder: Path) -> str:
    """What stands for a long training, during which the user interrupts the process that ``folder`` names."""
    if current_world().rank == 0:
        os.kill(int(folder.name), signal.SIGINT)
    time.sleep(100)
    return ""


def test_ctrl_c_ends_the_ranks_at_once(tmp_path, capsys, monkeypatch):
    fork_context()
    monkeypatch.setattr(verify, "trained", interrupt)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    start = time.monotonic()
    try:
        assert verify.main(["--ranks", "2", "--data", str(tmp_path / str(os.getpid()))]) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    assert time.monotonic() - start < 90
    assert capsys.readouterr() == ("", "python -m torchpar verify: interrupted\n")
