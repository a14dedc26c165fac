# SPDX-License-Identifier: MIT
"""Command lines of the examples: flags by tyro, and errors in one line that is said once.

The type of a flag says what it may be: its bounds, the packages that it needs, and the comparisons
that it is left out of. It imports no torch, so that the examples in NumPy run where PyTorch is not
installed.
"""

import gc
import importlib.util
import io
import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import (
    AbstractContextManager,
    contextmanager,
    nullcontext,
    redirect_stderr,
    redirect_stdout,
    suppress,
)
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, TypeVar, get_args, get_type_hints

from torchpar import __version__
from torchpar.data.files import Dataset
from torchpar.errors import AllRanksError, ConfigError, RankLostError, TorchparError, first_line
from torchpar.parallel.launch.rank_info import RankInfo, find_rank_info
from torchpar.training.outcome import Stopped

try:
    import rich  # noqa: F401  # console.py needs it
    import tyro
except ImportError as error:
    sys.exit(f"the examples need rich and tyro ({error}); pip install rich tyro")

F = TypeVar("F", bound="ExampleFlags")
Check = Callable[[Mapping[str, object]], None]
GRACE = 10.0  # seconds in which a launcher ends the other ranks after rank 0 has failed


@contextmanager
def writing(path: Path, flag: str) -> Iterator[None]:
    """Name ``path`` and what to do in the error of a file that cannot be written, such as on a full
    disk.

    Raises:
        ConfigError: instead of an OSError.
    """
    try:
        yield
    except OSError as e:
        reason = e.strerror or e
        raise ConfigError(
            f"{path} cannot be written ({reason}); make room there, or name another place by {flag}"
        ) from e


class Bounds(NamedTuple):
    """The least value of a flag, and the first one that is too large."""

    least: float
    end: float

    def check(self, flag: str, value: Any) -> None:
        values = value if isinstance(value, tuple) else (value,)
        if not all(one >= self.least for one in values):
            raise ConfigError(f"{flag} is {value}, expected at least {self.least}")
        if not all(one < self.end for one in values):
            raise ConfigError(f"{flag} is {value}, expected less than {self.end}")


class Filled(NamedTuple):
    """A flag of several values takes one at least."""

    def check(self, flag: str, value: tuple[object, ...]) -> None:
        if not value:
            raise ConfigError(f"{flag} is empty, expected one value or more")


class Needs(NamedTuple):
    """A package that a flag needs, once it is given."""

    package: str

    def check(self, flag: str, value: Any) -> None:
        if value and importlib.util.find_spec(self.package) is None:
            raise ConfigError(f"{flag} needs {self.package}; pip install {self.package}")


class Output(NamedTuple):
    """A place that is created, and tried, before the run."""

    is_folder: bool

    def check(self, flag: str, value: Path) -> None:
        folder = value if self.is_folder else value.parent
        with writing(value, flag):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) if self.is_folder else value.open("a"):
                pass


class Free(NamedTuple):
    """A flag that may differ in a resumed run, and if ``on_ranks`` also between ranks."""

    on_ranks: bool = False


Count = Annotated[int, Bounds(1, 2**63)]
Size = Annotated[int, Bounds(1, 2**31)]
Number = Annotated[float, Bounds(0, 1e38)]  # float32 ends at 3.4e38
Share = Annotated[float, Bounds(0, 1)]
Sizes = Annotated[tuple[Size, ...], Filled()]
Counts = Annotated[tuple[Count, ...], Filled()]
Numbers = Annotated[tuple[Number, ...], Filled()]
Switch = Annotated[bool, Free()]  # of what is computed faster, or shown
# Of the mesh. Each micro-batch is a view and two messages, even one without samples.
Ranks = Annotated[Size, Free()]
MicroBatches = Annotated[int, Bounds(1, 2**16), Free()]
# Only rank 0 writes these.
File = Annotated[Path | None, Output(is_folder=False), Free(on_ranks=True)]
Folder = Annotated[Path | None, Output(is_folder=True), Free(on_ranks=True)]
Plots = Annotated[Folder, Needs("matplotlib")]
Report = Annotated[Folder, Needs("matplotlib"), Needs("jinja2")]
LogDir = Annotated[Folder, Needs("torch"), Needs("tensorboard")]
DataFolder = Annotated[Path, Free(on_ranks=True)]  # of which the contents are compared
DATA = Path(__file__).parent.parent / "data"


@dataclass(kw_only=True)
class ExampleFlags:
    """Flags of every example."""

    # Seed of the initial weights, the order of samples, and samples that are drawn.
    seed: Annotated[int, Bounds(0, 2**63)] = 0
    # Device; auto takes CUDA where there is any.
    device: Annotated[Literal["auto", "cpu", "cuda"], Free()] = "auto"
    # File for the run's figures, a JSON object per line; the last line is the final result.
    metrics: File = None

    def check(self) -> None:
        """Complete the flags, and refuse those that do not fit; `main` calls it.

        Raises:
            ConfigError: a flag out of its bounds, a package that is missing, or an output that
                cannot be written.
        """
        for kind in (Bounds, Filled, Needs, Output):
            for flag, value, marks in self.marked():
                for mark in marks:
                    if isinstance(mark, kind) and value is not None:
                        mark.check(flag, value)

    def marked(self) -> Iterator[tuple[str, Any, list[Any]]]:
        """Each flag, its value, and what its type is annotated with."""
        hints = get_type_hints(type(self), include_extras=True)
        for name in asdict(self):
            flag = f"--{name.replace('_', '-')}"
            yield flag, getattr(self, name), [*_annotations(hints[name])]

    def shared(self) -> dict[str, object]:
        """Return the flags that must be equal on all ranks: all but files and folders."""
        return {
            flag: value for flag, value, marks in self.marked() if Free(on_ranks=True) not in marks
        }


def _annotations(hint: Any) -> Iterator[Any]:
    """What a type, or a type within it, is annotated with."""
    yield from getattr(hint, "__metadata__", ())
    for inner in get_args(hint):
        yield from _annotations(inner)


@dataclass(kw_only=True)
class DataFlags(ExampleFlags):
    """Flags of every example that reads images."""

    data: DataFolder = DATA  # Folder of the data sets, as torchvision's root.
    dataset: Dataset = "mnist"  # Data set.


def check_samples(asked: int | None, there: int, kind: str = "training") -> None:
    """Raise ConfigError if --samples asks for more than there are."""
    if asked is not None and asked > there:
        raise ConfigError(
            f"--samples is {asked}, and the data set has {there} {kind} samples; take at most "
            f"{there}"
        )


def check_memory(sizes: Sequence[int], flags: str = "") -> None:
    """Raise ConfigError if the float32 weights of an MLP of these widths do not fit into the
    memory.

    Where the system promises more memory than there is, it would kill the process instead.

    Args:
        flags: that give the widths; by default --hidden with each width.
    """
    needed = 4 * sum((n + 1) * m for n, m in pairwise(sizes))
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > there:
            flags = flags or " ".join(map(str, ["--hidden", *sizes[1:-1]]))
            raise ConfigError(
                f"{flags} makes weights of {needed / 2**30:,.0f} GiB, and this machine "
                f"has {there / 2**30:,.0f} GiB of memory; take fewer units"
            )


def main(
    run: Callable[[F], None],
    flags: type[F],
    agreeing: Callable[[], AbstractContextManager[Check]] = lambda: nullcontext(lambda _: None),
) -> None:
    """Parse ``flags`` from the command line and call ``run`` with them; errors end as by `ending`.

    Args:
        agreeing: yields a function that compares flags between ranks, such as `mpi.agreeing`; the
            flags are read in this context.
    """
    with ending():
        try:
            with agreeing() as check:
                with parsing():
                    parsed = tyro.cli(flags, config=(tyro.conf.FlagCreatePairsOff,))
                parsed.check()
                check({"the version of torchpar": __version__, **parsed.shared()})
        except AllRanksError:
            raise
        except ConfigError as e:
            raise WrongFlags(_line(e)) from e
        gc.freeze()  # Python's collector would look through all imported modules again and again
        run(parsed)


@contextmanager
def ending() -> Iterator[None]:
    """End every rank with status 2 where the block raises an error that a person can mend.

    These are a `TorchparError`, a file that cannot be read or written, too little memory, a model
    that cannot be compiled, and wrong flags. One line says what is wrong, once: rank 0 prints it,
    or torchrun as the last line of its report. Another rank waits `GRACE` seconds before it speaks:
    if rank 0 has failed too, the launcher has ended this rank by then. mpirun may not; then wrong
    flags are of this rank alone where rank 0 waits for it. It does not wait with an error of its
    own, of which rank 0 would only say that this rank is lost. SIGINT ends with status 130.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # terminals that have only ASCII print ? for λ
    try:
        yield
    except WrongFlags as e:
        _end(e.said, is_of_flags=True)
    except AllRanksError as e:  # rank 0 has the same error
        sys.exit(2) if _rank() > 0 else _end(_line(e))
    except (TorchparError, OSError, MemoryError, RuntimeError) as e:
        _end(_line(_reason(e)), is_own=_is_own(e))
    except Stopped as e:
        if _rank() == 0:
            print(f"{e}; the state is saved, the same command resumes from it", flush=True)
        sys.exit(130 if e.signal == signal.SIGINT else 0)
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell reports SIGINT


class WrongFlags(SystemExit):
    """The flags of a rank are wrong; ``said`` is what to print of them."""

    def __init__(self, said: str):
        super().__init__(2)
        self.said = said


@contextmanager
def parsing() -> Iterator[None]:
    """Keep what a parser prints from being printed by every rank.

    Raises:
        SystemExit: after the help, which rank 0 prints; without a launcher also for wrong flags.
        WrongFlags: for wrong flags, on each rank.
    """
    if _launched() is None:
        yield
        return
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            yield
    except SystemExit as e:
        if e.code:
            raise WrongFlags(said.getvalue()) from e
        if _rank() == 0:
            print(said.getvalue(), end="")
        raise


def _reason(error: Exception) -> str:
    """What to print of an error; it is raised again if it is a fault of the program."""
    if isinstance(error, TorchparError | OSError):
        return str(error)
    if _is_of_memory(error):
        remedy = "take a smaller model, smaller batches or fewer samples"
        return f"the memory does not suffice; {remedy} ({first_line(error)})"
    compiler = sys.modules.get("torch._dynamo.exc")
    if compiler and isinstance(error, compiler.TorchDynamoException):
        reason = " ".join(str(error).partition("\n\n")[0].split())
        return f"the model cannot be compiled: {reason}; drop --compile"
    raise error


def _is_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")
    return isinstance(error, (MemoryError, *([torch.OutOfMemoryError] if torch else [])))


def _is_own(error: Exception) -> bool:
    """Whether rank 0 may not say the same."""
    if isinstance(error, RankLostError):
        return 0 in error.missing
    return isinstance(error, OSError) or _is_of_memory(error)


def _launched() -> RankInfo | None:
    """Return this process's rank, if a launcher started it and its variables are right."""
    with suppress(ConfigError):  # which join_world raises
        return find_rank_info()
    return None


def _rank() -> int:
    info = _launched()
    return info.rank if info else 0


def _line(error: object) -> str:
    return f"{Path(sys.argv[0]).name}: error: {error}\n"


def _end(said: str, is_own: bool = False, is_of_flags: bool = False) -> NoReturn:
    """End this rank with status 2, and let one rank say why."""
    failed, info = time.time(), _launched()
    if info and info.rank > 0 and not is_own:
        # torchrun ends this rank meanwhile; under mpirun a person waits for it.
        time.sleep(GRACE if info.launcher == "torchrun" else GRACE / 5)
        if is_of_flags and info.launcher in ("openmpi", "mpich") and not _is_awaited(info):
            sys.exit(2)
    if not _is_told_by_torchrun(said, failed):
        print(said, end="", file=sys.stderr, flush=True)
    sys.exit(2)


def _is_awaited(info: RankInfo) -> bool:
    """Whether rank 0 waits at the address of the store, which it hosts under mpirun."""
    with suppress(OSError):
        socket.create_connection((info.address, info.port), timeout=1).close()
        return True
    return False


def _is_told_by_torchrun(said: str, failed: float) -> bool:
    """Hand over to torchrun what it prints at the end, if it does not start the ranks again.

    After the ranks torchrun prints a traceback of its own, and a table of those that failed. The
    last lines of the table are the error file of the rank that was the first to fail. Ranks that
    torchrun ends count as failed, too, by whole seconds; so this one has failed a second before.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    starts, restarts = (
        int(os.environ.get(f"TORCHELASTIC_{name}", "0"))
        for name in ("RESTART_COUNT", "MAX_RESTARTS")
    )
    if not file or starts < restarts:
        return False
    more = {"py_callstack": f"\n{said.rstrip()}", "timestamp": str(int(failed) - 1)}
    try:
        Path(file).write_text(json.dumps({"message": {"message": said, "extraInfo": more}}))
    except OSError:
        return False
    return True
