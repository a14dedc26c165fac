# SPDX-License-Identifier: MIT
"""Scripts and code of pages, run as a user runs them or within a process, and their metrics."""

import importlib
import json
import linecache
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any
from unittest.mock import patch

import pytest

from torchpar.baselines.mpi import find_mpirun
from torchpar.parallel.launch.local import fork_context

ROOT = Path(__file__).parent.parent
LAST_LINE = (
    r"test accuracy [01]\.\d{4} \| loss \d+\.\d{4} \| \d+\.\d s \| (\d) ranks? \| (cpu|cuda)"
)
MPIRUN = find_mpirun()
needs_mpirun = pytest.mark.skipif(MPIRUN is None, reason="no mpirun; pip install mpich")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]


def import_path(*folders: Path) -> str:
    """A PYTHONPATH of ``folders`` and of what it has already: some machines carry their packages
    there."""
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])


def entered_files(call: Callable[[], object], *rooms: str) -> list[str]:
    """The files of these folders whose functions ``call`` enters, in the order of their entry."""
    entered: dict[str, None] = {}
    folders = tuple(str(ROOT / room) for room in rooms)

    def note(frame: FrameType, event: str, argument: object) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(folders):
            entered[str(Path(file).resolve().relative_to(ROOT))] = None

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return [*entered]


def run(*command: str, cwd: Path | str = "/") -> tuple[int, str, str]:
    """The exit status of a command, and its two streams."""
    environment = os.environ | {"PYTHONPATH": import_path(ROOT), "COLUMNS": "80"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=240
    )
    return done.returncode, done.stdout, done.stderr


def forked(*arguments: str, cwd: Path | str = "/", **variables: str) -> tuple[int, str, str]:
    """The exit status of ``python ARGUMENTS``, and its two streams, without the time of imports.

    The process is forked from the server of the fixture `fork_server`, which has imported PyTorch.
    So what is tested must not depend on what is imported, or on variables that are read at import.
    ``variables`` are set before the command runs.
    """
    with TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("out", "err")]
        process = fork_context().Process(
            target=_python, args=(arguments, str(cwd), variables, *map(str, streams))
        )
        process.start()
        process.join(240)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"{arguments} takes more than 240 s")
        out, err = (stream.read_text(errors="replace") for stream in streams)
    return process.exitcode, out, err


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


def _python(
    arguments: tuple[str, ...], cwd: str, variables: dict[str, str], out: str, err: str
) -> None:
    """Do what ``python ARGUMENTS`` does, in a forked process."""
    for number, name in enumerate((out, err), start=1):
        with open(name, "wb") as stream:
            os.dup2(stream.fileno(), number)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # the fork server blocks it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.update({"COLUMNS": "80", "PYTHONPATH": import_path(ROOT)} | variables)
    os.chdir(cwd)
    kind, *rest = arguments
    folder = cwd if kind in ("-c", "-m") else str(Path(kind).parent.absolute())
    sys.path[:0] = [folder, str(ROOT)]
    sys.argv = ["-c", *rest[1:]] if kind == "-c" else rest if kind == "-m" else [kind, *rest]
    try:
        if kind == "-m":
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_path(kind, run_name="__main__")
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.exit(1)


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
