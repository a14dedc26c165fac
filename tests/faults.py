# SPDX-License-Identifier: MIT
"""Training processes for tests of faults: start them, wait for them, read their output and checkpoints."""

import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import IO, Any

import torch
from commands import ROOT
from ranks import fork_context
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from torchpar.errors import ConfigError

TRAIN = str(ROOT / "examples" / "train_parallel.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@dataclass
class Rank:
    """A process that runs a script, and the files of its output."""

    process: ForkServerProcess
    out: Path
    err: Path


def start(folder: Path, flags: Sequence[str], world_size: int) -> list[Rank]:
    """Start ranks of examples/train_parallel.py, without a launcher; ``folder`` is for their output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    ranks = []
    for rank in range(world_size):
        files = [folder / f"out-{rank}", folder / f"err-{rank}"]
        of_rank = env | {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
        process = fork_context().Process(target=_run, args=(flags, of_rank, files))
        process.start()
        ranks.append(Rank(process, *files))
    return ranks


def finish(ranks: Sequence[Rank], timeout: float = 60.0) -> tuple[list[int | None], str, str]:
    """Wait for all ranks; return their exit statuses, and the stdout and the stderr of all."""
    deadline = time.monotonic() + timeout
    for rank in ranks:
        rank.process.join(deadline - time.monotonic())
    out = "".join(rank.out.read_text() for rank in ranks)
    err = "".join(rank.err.read_text() for rank in ranks)
    assert not any(rank.process.is_alive() for rank in ranks), err
    return [rank.process.exitcode for rank in ranks], out, err


def train(*flags: str) -> str:
    """Run train_parallel.py in this process, one of the fixture's ranks; return its error, or ""."""
    import train_parallel
    import tyro

    try:
        parsed = tyro.cli(train_parallel.Flags, args=flags, config=(tyro.conf.FlagCreatePairsOff,))
        train_parallel.main(parsed)
    except ConfigError as e:
        return str(e)
    return ""


def torchrun(*command: str, stderr: int | IO[str] = subprocess.PIPE) -> subprocess.Popen[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*TORCHRUN, "--monitor_interval=0.1", *command],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env=env,
        cwd="/",
        start_new_session=True,  # a terminal's Ctrl-C goes to a process group
    )


def workers(launcher: int) -> list[int]:
    """Return the processes of the living ranks that a torchrun started."""

    def is_rank(child: str) -> bool:
        with suppress(OSError):  # it has ended
            return "\0RANK=" in Path(f"/proc/{child}/environ").read_text()
        return False

    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text()
    return [int(child) for child in children.split() if is_rank(child)]


def wait_for(condition: Callable[[], Any], timeout: float = 60.0) -> Any:
    deadline = time.monotonic() + timeout
    while not (result := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return result


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
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(metrics: Path) -> list[tuple[float, ...]]:
    """Return the losses and the accuracy of each epoch, bit for bit, from the metrics file."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [(row["epoch"], row["train_loss"], row["test_loss"], row["test_accuracy"]) for row in rows]


def _run(flags: Sequence[str], env: dict[str, str], files: Sequence[Path]) -> None:
    for stream, path in enumerate(files, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background shells ignore it
    sys.argv = [TRAIN, *flags]
    from support import cli

    cli.GRACE = 0.1  # no launcher ends these ranks before they print an error
    runpy.run_path(TRAIN, run_name="__main__")
