# SPDX-License-Identifier: MIT
"""Training processes for tests of faults: start them, wait for them, read their checkpoints and metrics."""

import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from commands import ROOT, TORCHRUN, lesson, rows_of
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

TRAIN = str(ROOT / "examples" / "train_parallel.py")


def train_alone(rank: int, world_size: int, port: int, *flags: str) -> tuple[int, str, str]:
    """Train as a rank of train_parallel.py, without a launcher; return its exit status and its streams."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(address, RANK=str(rank), WORLD_SIZE=str(world_size))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background shells ignore it
    return lesson("train_parallel", *flags)


def train(*flags: str) -> str:
    """Run train_parallel.py in this process, one of the fixture's ranks; return its error, or ""."""
    status, _, err = lesson("train_parallel", *flags)
    return err if status else ""


def torchrun(*command: str, stderr: int | IO[str] = subprocess.PIPE) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*TORCHRUN, "--monitor_interval=0.1", *command],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        start_new_session=True,  # a terminal's Ctrl-C goes to a process group
    )


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def latest(folder: Path) -> str:
    """Return the name of the newest checkpoint, "" if there is none yet."""
    try:
        return (folder / "latest").read_text().strip()
    except OSError:
        return ""


def steps(folder: Path) -> list[str]:
    return sorted((p.name for p in folder.glob("step-*")), key=lambda name: (len(name), name))


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Read the full tensors of a checkpoint by PyTorch's own reader, but of random states rank 0's only."""
    with tempfile.NamedTemporaryFile() as file:
        dcp_to_torch_save(checkpoint, file.name)
        found = torch.load(file.name)
    return {name: t for name, t in found.items() if not re.fullmatch(r"random\.\w+\.\d+", name)}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether tensors have the same names, shapes and bits."""
    pairs = [(t, b[name]) for name, t in a.items() if name in b]
    return a.keys() == b.keys() and all(
        t.shape == u.shape and torch.equal(*(one.reshape(-1).view(torch.uint8) for one in (t, u)))
        for t, u in pairs
    )


def losses(metrics: Path) -> list[tuple[float, ...]]:
    """Return the losses and the accuracy of each epoch, bit for bit, from the metrics file."""
    rows = rows_of(metrics)
    return [(row["epoch"], row["train_loss"], row["test_loss"], row["test_accuracy"]) for row in rows]
