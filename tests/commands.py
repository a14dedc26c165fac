# SPDX-License-Identifier: MIT
"""Scripts and code of pages, run as a user runs them or within a process, and their metrics."""

import importlib
import json
import linecache
import os
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import processes
import pytest
from processes import forked, import_path

from torchpar.baselines.mpi import find_mpirun

ROOT = Path(__file__).parent.parent
processes.IMPORTED[:] = [ROOT]
LAST_LINE = (
    r"test accuracy [01]\.\d{4} \| loss \d+\.\d{4} \| \d+\.\d s \| (\d) ranks? \| (cpu|cuda)"
)
MPIRUN = find_mpirun()
needs_mpirun = pytest.mark.skipif(MPIRUN is None, reason="no mpirun; pip install mpich")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]


def interpret() -> None:
    """Let Triton interpret the kernels of this process, which has not imported it yet."""
    os.environ["TRITON_INTERPRET"] = "1"


def run(*command: str, cwd: Path | str = "/") -> tuple[int, str, str]:
    """The exit status of a command, and its two streams."""
    environment = os.environ | {"PYTHONPATH": import_path(ROOT), "COLUMNS": "80"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=240
    )
    return done.returncode, done.stdout, done.stderr


def forget_modules(folder: Path) -> None:
    """Let the modules of a test's files be no others' afterwards."""
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(folder)):
            del sys.modules[name]


def forked_ranks(
    world_size: int, *arguments: str, cwd: Path | str = "/"
) -> list[tuple[int, str, str]]:
    """The exit status and the streams of each rank of ``torchrun ARGUMENTS``, without the time of
    imports."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world_size)}
    with ThreadPoolExecutor(world_size) as pool:
        ranks = [
            pool.submit(forked, *arguments, cwd=cwd, **address, RANK=rank, LOCAL_RANK=rank)
            for rank in map(str, range(world_size))
        ]
        return [rank.result() for rank in ranks]


def lesson(name: str, *flags: str) -> tuple[int, str, str]:
    """The exit status of a lesson such as "train_ddp", and its two streams, run within this
    process.

    On the ranks of a pool it trains on all of them. A rank does not wait for rank 0 to print an
    error first.
    """
    from support import cli, ending

    module, out, err = importlib.import_module(name), StringIO(), StringIO()
    status: Any = 0
    with (
        patch.object(sys, "argv", [f"{name}.py", *flags]),
        patch.object(ending, "GRACE", 0.0),
        patch.dict(os.environ, COLUMNS="80"),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            cli.main(module.main, module.Flags)
        except SystemExit as e:
            status = e.code
    return status, out.getvalue(), err.getvalue()


def blocks(page: str) -> list[str]:
    """The Python code of a page such as docs/tour.md."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def execute(*blocks: str) -> dict[str, Any]:
    """Run blocks of a page's code one after the other, and return what they define.

    Triton looks a kernel's source up.
    """
    names: dict[str, Any] = {"__name__": "page"}
    for number, block in enumerate(blocks):
        path = f"block-{number}-{hash(block)}.py"
        linecache.cache[path] = len(block), None, block.splitlines(keepends=True), path
        exec(compile(block, path, "exec"), names)
    return names


def scalars(log_dir: Path, name: str) -> list[tuple[int, float]]:
    """The steps and values of a figure that was logged for TensorBoard."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard reads the log"
    )
    events = accumulator.EventAccumulator(str(log_dir)).Reload().Scalars(name)
    return [(event.step, pytest.approx(event.value)) for event in events]


def rows_of(metrics: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in metrics.read_text().splitlines()]
