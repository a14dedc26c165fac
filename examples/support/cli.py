# SPDX-License-Identifier: MIT
"""Command lines of the examples: flags by tyro, and errors in one line from rank 0.

The type of a flag says what it may be: its bounds, the packages that it needs, and the comparisons
that it is left out of. It imports no torch, so that the examples in NumPy run where PyTorch is not
installed.
"""

import gc
import importlib.util
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import (
    AbstractContextManager,
    ExitStack,
    nullcontext,
    redirect_stderr,
    redirect_stdout,
)
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, TypeVar, get_args, get_type_hints

from torchpar import __version__
from torchpar.data.files import Dataset
from torchpar.errors import AllRanksError, ConfigError, TorchparError, first_line
from torchpar.parallel.launch.rank_info import find_rank_info
from torchpar.training.outcome import Stopped

try:
    import rich  # noqa: F401  # console.py needs it
    import tyro
except ImportError as error:
    sys.exit(f"the examples need rich and tyro ({error}); pip install rich tyro")

F = TypeVar("F", bound="ExampleFlags")
Check = Callable[[Mapping[str, object]], None]
GRACE = 2.0  # seconds in which a launcher ends the other ranks after rank 0 has failed


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


class Above0(Bounds):
    """More than 0, and the first value that is too large."""

    def check(self, flag: str, value: Any) -> None:
        if not value > 0:
            raise ConfigError(f"{flag} is {value}, expected more than 0")
        super().check(flag, value)


class Needs(NamedTuple):
    """A package that a flag needs, once it is given."""

    package: str

    def check(self, flag: str, value: Any) -> None:
        if value and importlib.util.find_spec(self.package) is None:
            raise ConfigError(f"{flag} needs {self.package}; pip install {self.package}")


class Output(NamedTuple):
    """A place that is created, and tried, before the run."""

    is_folder: bool

    def check(self, flag: str, value: Path) -> None:  # noqa: ARG002  # as of the others
        try:
            if self.is_folder:
                value.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=value).close()
            else:
                value.parent.mkdir(parents=True, exist_ok=True)
                value.open("a").close()
        except OSError as e:
            raise ConfigError(
                f"a run's outputs cannot be written ({e}); name another folder"
            ) from e


class Free(NamedTuple):
    """A flag that may differ in a resumed run, and if ``on_ranks`` also between ranks."""

    on_ranks: bool = False

    def check(self, flag: str, value: object) -> None: ...


Count = Annotated[int, Bounds(1, 2**63)]
Size = Annotated[int, Bounds(1, 2**31)]
Number = Annotated[float, Bounds(0, 1e38)]  # float32 ends at 3.4e38
Share = Annotated[float, Bounds(0, 1)]
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
        for kind in (Bounds, Needs, Output):
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
    """Parse ``flags`` from the command line and call ``run`` with them.

    A `TorchparError`, a file that cannot be read or written, too little memory, or a model that
    cannot be compiled ends every rank with status 2. Rank 0 prints it as one line. Another rank
    waits `GRACE` seconds before it prints: if rank 0 has failed too, the launcher has ended this
    rank by then. It does not wait for a rank 0 that does not answer. SIGINT ends with status 130.

    Args:
        agreeing: yields a function that compares flags between ranks, such as `mpi.agreeing`; the
            flags are read in this context.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # terminals that have only ASCII print ? for λ
    try:
        with agreeing() as check:
            parsed = _parse(flags)
            parsed.check()
            check({"the version of torchpar": __version__, **parsed.shared()})
        gc.freeze()  # Python's collector would look through all imported modules again and again
        run(parsed)
    except _Usage as e:
        time.sleep(GRACE)
        print(e.said, end="", file=sys.stderr, flush=True)
        raise
    except AllRanksError as e:  # rank 0 has the same error
        sys.exit(2) if _rank() > 0 else _end(str(e))
    except (TorchparError, OSError) as e:
        _end(str(e), is_rank_0_lost=0 in getattr(e, "missing", ()))
    except (MemoryError, RuntimeError) as e:
        _end(_reason(e))
    except Stopped as e:
        if _rank() == 0:
            print(f"{e}; the state is saved, the same command resumes from it", flush=True)
        sys.exit(130 if e.signal == 2 else 0)
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell reports SIGINT


def _reason(error: MemoryError | RuntimeError) -> str:
    """What to print of an error of Python's, NumPy's or PyTorch's; it is raised again if it is a
    fault of the program."""
    kind = type(error)
    if isinstance(error, MemoryError) or kind.__name__ == "OutOfMemoryError":
        remedy = "take a smaller model, smaller batches or fewer samples"
        return f"the memory does not suffice; {remedy} ({first_line(error)})"
    if kind.__module__.startswith(("torch._dynamo", "torch._inductor")):
        reason = " ".join(str(error).partition("\n\n")[0].split())
        return f"the model cannot be compiled: {reason}; drop --compile"
    raise error


def _rank() -> int:
    """Return this process's rank. Where its variables are wrong, join_world has refused them."""
    try:
        info = find_rank_info()
    except ConfigError:
        return 0
    return info.rank if info else 0


def _end(error: str, is_rank_0_lost: bool = False) -> NoReturn:
    if _rank() > 0 and not is_rank_0_lost:
        time.sleep(GRACE)
    print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)


class _Usage(SystemExit):
    """A wrong flag on a rank that waits before it prints."""

    said = ""


def _parse(flags: type[F]) -> F:
    """Return the flags of the command line. Rank 0 alone prints the help and the wrong flags.

    Raises:
        SystemExit: --help; on rank 0 also a wrong flag.
        _Usage: a wrong flag on another rank.
    """
    with ExitStack() as stack:
        said = io.StringIO()
        if _rank() > 0:
            stack.enter_context(redirect_stdout(said))
            stack.enter_context(redirect_stderr(said))
        try:
            return tyro.cli(flags, config=(tyro.conf.FlagCreatePairsOff,))
        except SystemExit as e:
            if not e.code or _rank() == 0:
                raise
            usage = _Usage(e.code)
            usage.said = said.getvalue()
            raise usage from e
