# SPDX-License-Identifier: MIT
"""``python -m torchpar verify``: the same hash on any mesh, its status, and errors in one line."""

import re
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from unittest.mock import patch

import pytest
from fake_data import fashion_mnist
from ranks import fork_context

pytest.importorskip("torchvision", reason="torchvision reads the data sets")
from torchpar.exact import verify


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
    fork_context()
    assert verify.main([*flags.split(), *data]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == ""
    assert line.startswith("python -m torchpar verify: error: ")
    assert message in line


@pytest.mark.parametrize(
    "error, status, message",
    [
        (BrokenProcessPool(), 2, "error: a rank was killed, or has ended in an error; run it again"),
        (RuntimeError("Connection closed by peer"), 2, "error: a rank was killed, or has ended in an error"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_lost_ranks_and_ctrl_c_are_one_line(capsys, error, status, message):
    with patch.object(verify, "start_ranks", side_effect=error):
        assert verify.main([]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"python -m torchpar verify: {message}")
    assert err.count("\n") == 1
    with patch.object(verify, "start_ranks", side_effect=RuntimeError("a bug")), pytest.raises(RuntimeError):
        verify.main([])
