# SPDX-License-Identifier: MIT
"""The number of threads that a lesson takes, and how they wait."""

import subprocess
import sys
from pathlib import Path

from support import cli

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    "there, multiplications, taken",
    [(8, 0, 1), (8, cli.OF_A_THREAD, 1), (8, 3 * cli.OF_A_THREAD, 3), (8, 2**40, 8), (1, 0, 1)],
)
def test_each_thread_has_its_share_of_a_product(monkeypatch, capsys, there, multiplications, taken):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(there)
    cli.take_threads("cpu", multiplications)
    assert torch.get_num_threads() == taken
    said = capsys.readouterr().out
    assert said.startswith(f"{taken} thread") == (taken < there)
    assert ("OMP_NUM_THREADS=8 takes 8" in said) == (taken < there)


def test_a_given_number_of_threads_stays(monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    torch.set_num_threads(2)
    cli.take_threads("cpu", 0)
    assert (torch.get_num_threads(), capsys.readouterr().out) == (2, "")


def test_the_largest_product_of_layers():
    assert cli.largest_product([784, 128, 500, 10], 3) == 3 * 784 * 128


@pytest.mark.parametrize("given", [None, "ACTIVE"])
def test_threads_wait_passively_unless_the_user_says_otherwise(monkeypatch, given):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    script = "import support, os; print(os.environ['OMP_WAIT_POLICY'])"
    run = subprocess.run(
        [sys.executable, "-c", script], cwd="examples", capture_output=True, text=True
    )
    assert run.stdout.strip() == (given or "PASSIVE"), run.stderr
