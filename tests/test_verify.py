# SPDX-License-Identifier: MIT
"""``python -m torchpar verify``: its status, and errors in one line."""

import re
from concurrent.futures.process import BrokenProcessPool
from unittest.mock import Mock, patch

import pytest

from torchpar.errors import ConfigError
from torchpar.exact import models, verify


@pytest.mark.parametrize("status", [0, 1])
def test_the_status_says_if_the_hash_is_published(capsys, status):
    published = verify.EXPECTED["mlp"]
    found = "ab" * 32 if status else published
    with patch.object(verify, "Ranks") as start:
        rank = Mock(submit=lambda *args: Mock(result=lambda: found))
        start.return_value.__enter__.return_value.workers = [rank] * 4
        assert verify.main(["--ranks", "4", "--tp", "2"]) == status
    first, second, third = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"dp 2 × tp 2 × pp 1 on cpu, .*, torch \S+: \d+ s", first)
    assert second == f"SHA-256 of the weights: {found}"
    assert third == (
        f"The published hash is {published}." if status else "This is the published hash."
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--ranks 3 --tp 2", "--ranks is 3, expected a multiple of --tp 2 times --pp 1"),
        ("--tp -2 --pp -2", "--tp is -2, expected at least 1"),
        ("--tp 0", "--tp is 0, expected at least 1"),
        ("--ranks 100000", "--ranks is 100000, expected at most 64, on this one machine"),
        (
            "--threads 9223372036854775808",
            "--threads is 9223372036854775808, expected at most 64, on",
        ),
        ("--pp 4", "--pp is 4, expected at most 3, one stage for each layer"),
        ("--model gpt --pp 2", "--pp is 2, expected 1 for the GPT, which has no pipeline"),
        ("--model gpt --tp 3", "--tp is 3, expected a divisor of the GPT's 4 heads"),
        (
            "--model gpt --tp 2 --data /missing",
            "/missing/alice.txt does not exist, expected the book",
        ),
    ],
)
def test_wrong_flags_are_an_error_in_one_line(fork_server, capsys, flags, message):
    assert verify.main(flags.split()) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == ""
    assert line.startswith("python -m torchpar verify: error: ")
    assert message in line


@pytest.mark.parametrize(
    "content, message",
    [
        (
            "Alice\u2019s",
            r"alice.txt cannot be read as ASCII \('ascii' codec .*\); copy the book there again",
        ),
        ("", "alice.txt has 0 characters, expected at least 65; copy the book there again"),
        ("a" * 64, "alice.txt has 64 characters, expected at least 65"),
        (None, r"alice.txt cannot be read as ASCII \(.*Is a directory.*\)"),
    ],
)
def test_a_damaged_book_is_one_line(tmp_path, content, message):
    path = tmp_path / "alice.txt"
    if content is None:
        path.mkdir()
    else:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as error:
        models.read_text(path)
    assert "\n" not in str(error.value)
    if not content:
        return
    path.write_text("ab" * 33)
    assert models.read_text(path)[1] == 2


@pytest.mark.parametrize(
    "error, status, message",
    [
        (
            BrokenProcessPool(),
            2,
            "error: a rank was killed, or has ended in an error; run it again",
        ),
        (
            RuntimeError("Connection closed by peer"),
            2,
            "error: a rank was killed, or has ended in an error",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_lost_ranks_and_ctrl_c_are_one_line(capsys, error, status, message):
    with patch.object(verify, "Ranks", side_effect=error):
        assert verify.main([]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"python -m torchpar verify: {message}")
    assert err.count("\n") == 1
    with (
        patch.object(verify, "Ranks", side_effect=RuntimeError("a bug")),
        pytest.raises(RuntimeError),
    ):
        verify.main([])
