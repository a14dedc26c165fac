# SPDX-License-Identifier: MIT
"""``python -m torchpar verify``: its status, and errors in one line."""

import hashlib
import os
import re
import signal
from concurrent.futures.process import BrokenProcessPool
from itertools import pairwise
from unittest.mock import MagicMock, Mock, patch

import pytest
import torch
from torch.distributed.elastic.utils.distributed import get_free_port

from torchpar import console
from torchpar.exact.verify import drawn, models, verify
from torchpar.parallel.launch.processes import ENDING

DRAWN = "b00ea11d8ef0502d459f757a0642a9cacfcf5d62f74946764dd4d3d7116819ee"  # of what is drawn


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
        f"The published hash is {published}. The bits differ here; please report this output, "
        "with that of: python -m torchpar doctor"
        if status
        else "This is the published hash."
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
        ("--model lesson --tp 2", "--tp is 2, expected 1 for the lesson, whose ranks have the"),
        ("--model lesson --pp 2", "--pp is 2, expected 1 for the lesson, whose ranks have the"),
        ("--model lesson --data /tests", "--data is /tests, expected the folder that has MNIST"),
        ("--model gpt --tp 3", "--tp is 3, expected a divisor of the GPT's 4 heads"),
    ],
)
def test_wrong_flags_are_an_error_in_one_line(fork_server, capsys, flags, message):
    assert verify.main(flags.split()) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == ""
    assert line.startswith("python -m torchpar verify: error: ")
    assert message in line


def test_what_is_drawn_is_the_same_everywhere():
    pictures, text = drawn.draw_pictures(1000), drawn.draw_text(1000)
    digest = hashlib.sha256(pictures.features.numpy().tobytes() + text.numpy().tobytes())
    assert digest.hexdigest() == DRAWN
    x = pictures.features.float().flatten(1)
    means = torch.stack([x[pictures.labels == c].mean(0) for c in range(drawn.CLASSES)])
    nearest = torch.cdist(x, means).argmin(1)
    assert torch.equal(nearest, pictures.labels)
    assert len({(a, b) for a, b in pairwise(text.tolist())}) <= 4 * drawn.CHARACTERS


@pytest.mark.parametrize(
    "error, status, message",
    [
        (
            BrokenProcessPool(),
            2,
            "error: a rank was killed, or has ended in an error; run it again",
        ),
        (
            RuntimeError("[/gloo/transport/tcp/pair.cc:534] Connection closed by peer"),
            2,
            "error: a rank was killed, or has ended in an error",
        ),
        (
            FileNotFoundError(2, "No usable temporary directory found"),
            2,
            "error: the ranks cannot be started ([Errno 2] No usable temporary directory found); ",
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


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_is_one_line(capsys, ending_signals, number):
    """So the ranks end before their semaphores, which Python would otherwise complain of."""
    with patch.object(verify, "Ranks", lambda **_: signal.raise_signal(number)):
        assert verify.main([]) == 128 + number
    assert capsys.readouterr().err == f"python -m torchpar verify: ended by {number.name}\n"


def test_variables_of_another_launcher_do_not_matter():
    """A job of torchrun may start the command."""
    of_torchrun = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "host", "RANK": "5"}
    of_torchrun |= {"LOCAL_RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}
    plan = verify.Plan("mlp", port=get_free_port())
    with (
        patch.dict(os.environ, of_torchrun),
        patch.object(signal, "signal"),
        patch.object(verify, "trained", lambda world, plan: (world.rank, world.world_size)),
    ):
        assert verify._trained_on_rank(0, plan) == (0, 1)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_slow_rank_0_says_how_far_it_is(capsys, rank):
    steps = [[(torch.ones(2, 3), torch.zeros(2, dtype=torch.int64))]] * 2
    model = torch.nn.Linear(3, 2)
    world = MagicMock(rank=rank, dp_rank=0, dp_size=1)
    with (
        patch.object(console, "SILENCE", 0.0),
        patch.object(models, "DataParallel"),
        patch.object(models, "P2PCommunicator"),
        patch.object(models, "gpipe") as step,
    ):
        models._train(model, Mock(), Mock(), steps, 2, world)
    assert step.call_count == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" after ")[0] for line in lines] == (
        [] if rank else ["0 of 2 steps", "1 of 2 steps"]
    )
