# SPDX-License-Identifier: MIT
"""Commands in processes that need no time for imports, and the files that a call enters."""

import os
import runpy
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

ROOT = Path(__file__).parents[1]
# Folders from which a process of `forked` imports beside what is installed.
IMPORTED: list[Path] = []


def import_path(*folders: Path) -> str:
    """A PYTHONPATH of ``folders`` and of what it has already: some machines carry their packages
    there."""
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])


def entered_files(call: Callable[[], object], *rooms: str, root: Path = ROOT) -> list[str]:
    """The files of these folders whose functions ``call`` enters, in the order of their entry."""
    entered: dict[str, None] = {}
    folders = tuple(str(root / room) for room in rooms)

    def note(frame: FrameType, event: str, argument: object) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(folders):
            entered[str(Path(file).resolve().relative_to(root))] = None

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return [*entered]


def forked(*arguments: str, cwd: Path | str = "/", **variables: str) -> tuple[int, str, str]:
    """The exit status of ``python ARGUMENTS``, and its two streams, without the time of imports.

    The process is forked from the server of the fixture `fork_server`, which has imported PyTorch.
    So what is tested must not depend on what is imported, or on variables that are read at import.
    ``variables`` are set before the command runs.
    """
    with TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("out", "err")]
        process = get_context("forkserver").Process(
            target=_python,
            args=(arguments, str(cwd), variables, [*map(str, IMPORTED)], *map(str, streams)),
        )
        process.start()
        process.join(240)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"{arguments} takes more than 240 s")
        out, err = (stream.read_text(errors="replace") for stream in streams)
    return process.exitcode, out, err


def _python(
    arguments: tuple[str, ...],
    cwd: str,
    variables: dict[str, str],
    imported: list[str],
    out: str,
    err: str,
) -> None:
    """Do what ``python ARGUMENTS`` does, in a forked process."""
    for number, name in enumerate((out, err), start=1):
        with open(name, "wb") as stream:
            os.dup2(stream.fileno(), number)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # the fork server blocks it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.update(
        {"COLUMNS": "80", "PYTHONPATH": import_path(*map(Path, imported))} | variables
    )
    os.chdir(cwd)
    kind, *rest = arguments
    folder = cwd if kind in ("-c", "-m") else str(Path(kind).parent.absolute())
    sys.path[:0] = [folder, *imported]
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
