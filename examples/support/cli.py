# SPDX-License-Identifier: MIT
"""Command lines of the examples: flags by tyro.

The type of a flag says what it may be: its bounds, the packages that it needs, and the comparisons
that it is left out of. It imports no torch, so that the examples in NumPy run where PyTorch is not
installed.
"""

import gc
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar, get_args, get_type_hints

from support.ending import WrongFlags, ending, line_of, parsing

from torchpar import __version__
from torchpar.data.files import Dataset
from torchpar.errors import AllRanksError, ConfigError, TorchparError, check_writable, writing
from torchpar.parallel.launch.rank_info import find_rank_info

try:
    import rich  # noqa: F401  # console.py needs it
    import tyro
except ImportError as error:
    with ending():
        info = find_rank_info()
        is_alike = info is None or info.local_world_size == info.world_size  # on one machine
        raise (AllRanksError if is_alike else ConfigError)(
            f"the examples need rich and tyro ({error}); pip install rich tyro"
        ) from error

F = TypeVar("F", bound="ExampleFlags")
Check = Callable[[Mapping[str, object]], None]


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
    """A place that is tried before the run. A folder is created."""

    is_folder: bool

    def check(self, flag: str, value: Path) -> None:
        if not self.is_folder:
            check_writable(value, flag)
            return
        with writing(value, flag):
            value.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=value).close()


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
# A page that plays recorded steps.
Replay = Annotated[Path | None, Output(is_folder=False), Free()]
MatFile = Annotated[Path | None, Needs("scipy")]  # of MATLAB
LogDir = Annotated[Folder, Needs("torch"), Needs("tensorboard")]
DataFolder = Annotated[Path, Free(on_ranks=True)]  # of which the contents are compared
DATA = Path(__file__).parent.parent / "data"
# Multiplications of float32 that take a core about a millisecond: it makes some 30 to 100 in a
# nanosecond.
OF_A_THREAD = 2**25


@dataclass(kw_only=True)
class ExampleFlags:
    """Flags of every example."""

    # Seed of the initial weights, the order of samples, and samples that are drawn.
    seed: Annotated[int, Bounds(0, 2**63)] = 0
    # Device; auto takes CUDA where there is any.
    device: Annotated[Literal["auto", "cpu", "cuda"], Free()] = "auto"
    # File for the run's figures, a JSON object per line; the last line is the final result.
    metrics: File = None

    def completed(self) -> Self:
        """Return the flags with those that others set, such as --dry-run; `main` calls it.

        Raises:
            ConfigError: a flag that is given, and that another sets otherwise.
        """
        return self

    def check(self) -> None:
        """Refuse flags that do not fit, and change nothing; `main` calls it.

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
            flag = f"--{name.strip('_').replace('_', '-')}"  # with_ is --with
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


def check_replay(page: Path, compiles: bool = False, beside: str = "") -> None:
    """Raise ConfigError if --replay cannot record beside other flags, or has no page's name."""
    from torchpar.training.profile.replay_trace import check_name

    check_name(page, "--replay")
    if compiles:
        raise ConfigError("--replay sees no layers of compiled code; drop --compile or --replay")
    if beside:
        raise ConfigError(
            f"{beside} waits within a step, and --replay shows what a step waits for; drop one"
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


def take_threads(device: str, multiplications: int) -> None:
    """Limit PyTorch's threads on a CPU to what the largest product of a step can use, and print the
    number if it is smaller.

    Threads meet at the end of each product. On a busy machine one of them waits some milliseconds
    for a core, and the others wait for it. So each gets work for a millisecond. A number that is
    given by OMP_NUM_THREADS stays, such as that of torchrun.
    """
    import torch

    there = torch.get_num_threads()
    threads = max(1, min(there, multiplications // OF_A_THREAD))
    if device != "cpu" or threads == there or "OMP_NUM_THREADS" in os.environ:
        return
    torch.set_num_threads(threads)
    print(
        f"{threads} thread{'s' * (threads > 1)}: the largest product of a step has "
        f"{multiplications:,} multiplications; OMP_NUM_THREADS={there} takes {there}"
    )


def largest_product(sizes: Sequence[int], samples: int) -> int:
    """Return the multiplications of the largest product of an MLP of these widths."""
    return samples * max(n * m for n, m in pairwise(sizes))


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
                parsed = parsed.completed()
                parsed.check()
                check({"the version of torchpar": __version__, **parsed.shared()})
        except AllRanksError:
            raise
        except TorchparError as e:
            raise WrongFlags(line_of(e)) from e
        gc.freeze()  # Python's collector would look through all imported modules again and again
        run(parsed)
