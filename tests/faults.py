# SPDX-License-Identifier: MIT
"""Training processes that a test starts, hurts and reads, and what they have saved."""

import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver, get_context
from multiprocessing.context import ForkServerProcess
from multiprocessing.forkserver import set_forkserver_preload
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

ROOT = Path(__file__).parent.parent
TRAIN = str(ROOT / "examples" / "train_parallel.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--monitor_interval=0.1"]


@dataclass
class Rank:
    """A process that runs a script, and its output."""

    process: ForkServerProcess
    out: Path
    err: Path

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid


def start(
    folder: Path,
    flags: Sequence[str],
    world_size: int = 1,
    differing: Sequence[Sequence[str]] = (),
    grace: float | None = None,
) -> list[Rank]:
    """Ranks of examples/train_parallel.py, without a launcher.

    They are forked from a process that has imported PyTorch: to import it takes longer than to train.

    Args:
        folder: for their output.
        differing: more flags, for each rank.
        grace: seconds that other ranks leave rank 0 to speak, in the place of `torchpar.cli.GRACE`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    _prepare_server()
    ranks = []
    for rank in range(world_size):
        env = {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        number, name = tempfile.mkstemp(dir=folder, suffix=f"-{rank}")
        os.close(number)
        own = [TRAIN, *flags, *(differing[rank] if differing else ())]
        process = get_context("forkserver").Process(
            target=_run, args=(own, env if world_size > 1 else {}, name, grace)
        )
        process.start()
        ranks.append(Rank(process, Path(name), Path(name + ".err")))
    return ranks


def finish(
    ranks: Sequence[Rank], timeout: float = 60.0, launched: bool = True
) -> tuple[list[int | None], str, str]:
    """Exit statuses, stdout and stderr of all.

    Args:
        launched: once one has failed the rest are ended, as launchers do.
    """
    deadline = time.monotonic() + timeout
    try:
        while any(rank.process.is_alive() for rank in ranks):
            assert time.monotonic() < deadline, [rank.err.read_text() for rank in ranks if rank.err.exists()]
            if launched and any(rank.process.exitcode for rank in ranks):
                for rank in ranks:
                    rank.process.terminate()
            time.sleep(0.01)
    finally:
        for rank in ranks:
            rank.process.kill()
            rank.process.join()
    out, err = ("".join(p.read_text() for p in paths if p.exists()) for paths in _outputs(ranks))
    return [rank.process.exitcode for rank in ranks], out, err


def run(folder: Path, flags: Sequence[str], world_size: int = 1, **options: Any) -> tuple[str, str]:
    """What ranks said that ended well."""
    codes, out, err = finish(start(folder, flags, world_size, **options))
    assert codes == [0] * world_size, err
    return out, err


def torchrun(*command: str, stderr: int | IO[str] = subprocess.PIPE) -> subprocess.Popen[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*TORCHRUN, *command],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env=env,
        cwd="/",
    )


def workers(launcher: int) -> dict[int, int]:
    """The process of each rank that a torchrun started."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            env = (folder / "environ").read_text().split("\0") if int(parent) == launcher else []
        except OSError:  # it has ended
            continue
        for variable in env:
            if variable.startswith("RANK="):
                found[int(variable[5:])] = int(folder.name)
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Callable[[], Any], timeout: float = 60.0) -> Any:
    deadline = time.monotonic() + timeout
    while not (result := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return result


def latest(folder: Path) -> str:
    """The name of the newest checkpoint, "" if there is none yet."""
    try:
        return (folder / "latest").read_text().strip()
    except OSError:
        return ""


def steps(folder: Path) -> list[str]:
    return sorted((p.name for p in folder.glob("step-*")), key=lambda name: (len(name), name))


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The whole tensors of a checkpoint, by PyTorch's own reader."""
    with tempfile.NamedTemporaryFile() as file:
        dcp_to_torch_save(checkpoint, file.name)
        return torch.load(file.name)  # type: ignore[no-any-return]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(metrics: Path) -> list[tuple[float, ...]]:
    """Of each epoch, as its line of the metrics file has them, bit for bit."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [(row["epoch"], row["train_loss"], row["test_loss"], row["test_accuracy"]) for row in rows]


def errors(err: str) -> list[str]:
    """The lines by which a script says why it ends."""
    return [line for line in err.splitlines() if line.startswith("train_parallel.py: error: ")]


def _outputs(ranks: Sequence[Rank]) -> Iterable[list[Path]]:
    return [rank.out for rank in ranks], [rank.err for rank in ranks]


def _prepare_server() -> None:
    set_forkserver_preload(["torchvision.datasets", "tyro", "rich.progress", "torchpar.script"])
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "OMP_NUM_THREADS")}
    os.environ.update(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _run(argv: list[str], env: dict[str, str], output: str, grace: float | None) -> None:
    for stream, name in ((1, output), (2, output + ".err")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ.update(env)
    sys.argv = argv
    if grace is not None:
        from torchpar import cli

        cli.GRACE = grace
    runpy.run_path(argv[0], run_name="__main__")
