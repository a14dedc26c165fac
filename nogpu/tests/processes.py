# SPDX-License-Identifier: MIT
"""Commands in processes that need no time for imports, and the files that a call enters."""

import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import cache
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection
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


class ForkedPopen:
    """A `subprocess.Popen` of ``python -P FILE ARGUMENTS`` without the time of imports: its process
    is forked from the server of the fixture `fork_server`.

    The process has the session, the folder, the environment, the import path and the streams that
    it would have otherwise, and of the modules those of the server in addition.
    """

    def __init__(
        self, command: Sequence[str], *, cwd: Path, env: dict[str, str], **options: object
    ) -> None:
        assert command[:2] == [sys.executable, "-P"]
        assert options == {
            **dict.fromkeys(("stdin", "stdout"), subprocess.PIPE),
            **{"stderr": subprocess.STDOUT, "start_new_session": True},
        }
        context = get_context("forkserver")
        given, into = context.Pipe(duplex=False)
        out_of, printed = context.Pipe(duplex=False)
        self.process = context.Process(
            target=_python_without_its_folder,
            args=(command[2:], str(cwd), env, _import_path(), given, printed),
        )
        self.process.start()
        for end in (given, printed):  # they are the child's
            end.close()
        self.stdin = os.fdopen(os.dup(into.fileno()), "wb")
        self.stdout = os.fdopen(os.dup(out_of.fileno()), "rb")
        for end in (into, out_of):
            end.close()
        self.pid = self.process.pid

    @staticmethod
    def start_server() -> None:
        """Start the server, so that it is no child of those that are ended with a process."""
        forkserver.ensure_running()

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> int | None:
        self.process.join()
        return self.process.exitcode

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode


@cache
def _import_path() -> list[str]:
    """The import path of ``python -P``."""
    command = [sys.executable, "-P", "-c", "import sys; print(*sys.path, sep='\\n')"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def _python_without_its_folder(
    arguments: list[str],
    cwd: str,
    environment: dict[str, str],
    path: list[str],
    given: Connection,
    printed: Connection,
) -> None:
    """Do what ``python -P FILE ARGUMENTS`` does, in a forked process."""
    os.setsid()
    for number, end in ((0, given), (1, printed), (2, printed)):
        os.dup2(end.fileno(), number)
    given.close()
    printed.close()
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, closefd=False)  # noqa: SIM115
        for number, mode in ((0, "r"), (1, "w"), (2, "w"))
    )
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # the fork server blocks it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.path[:], sys.argv = path, arguments
    runpy.run_path(arguments[0], run_name="__main__")
