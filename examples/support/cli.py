# SPDX-License-Identifier: MIT
"""Command lines of the examples: flags by tyro, and errors in one line from rank 0.

It imports no torch, so that the examples in NumPy run where PyTorch is not installed.
"""

import gc
import importlib.util
import io
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, TypedDict, TypeVar

from torchpar import __version__
from torchpar.data.files import Dataset
from torchpar.errors import AllRanksError, ConfigError, TorchparError, first_line
from torchpar.parallel.launch.rank_info import find_rank_info
from torchpar.training.outcome import Stopped

if TYPE_CHECKING:
    from torchpar.data import Samples
    from torchpar.training import CheckpointConfig

try:
    import rich  # noqa: F401  # console.py needs it
    import tyro
except ImportError as error:
    sys.exit(f"the examples need rich and tyro ({error}); pip install rich tyro")

F = TypeVar("F", bound="ExampleFlags")
Check = Callable[[Mapping[str, object]], None]
GRACE = 2.0  # seconds in which a launcher ends the other ranks after rank 0 has failed
MAY_DIFFER_ON_RESUME = {
    # The data and the device
    "data",
    "device",
    # How long, and how fast
    "compile",
    "dry_run",
    "epochs",
    "fused",
    "graph",
    "timeout",
    # What is shown and saved
    "async_save",
    "checkpoint",
    "collectives",
    "draw",
    "keep",
    "log_dir",
    "memory",
    "metrics",
    "phases",
    "profile",
    "report",
    "save_every",
    # The mesh
    "dp",
    "micro_batches",
    "pipeline",
    "pp",
    "tp",
}

# Only rank 0 writes these. Of the data, the contents are compared.
MAY_DIFFER_ON_RANKS = {"data", "log_dir", "metrics", "plots", "report"}

_COUNT, _SIZE = (1, 2**63), (1, 2**31)
_SMALL_FLOAT = (0, 1e38)  # float32 ends at 3.4e38
# By a flag's name: its least value, and the first value that is too large.
BOUNDS: dict[str, tuple[float, float]] = {
    "adamw_lr": _SMALL_FLOAT,
    "batch_size": _COUNT,
    "clip": _SMALL_FLOAT,
    "crop": (0, 2**31),
    "depth": (1, 2**16),  # each is a layer
    "dp": _SIZE,
    "epochs": _COUNT,
    "hidden": _SIZE,
    "iterations": _COUNT,
    "keep": _COUNT,
    "label_smoothing": (0, 1),
    "lr": _SMALL_FLOAT,
    "micro_batches": (1, 2**16),  # each is a view and two messages, even one without samples
    "momentum": (0, 1),
    "orthogonality": _SMALL_FLOAT,
    "pool": _SIZE,
    "pp": _SIZE,
    "processes": (1, 65),  # each takes a quarter of a gigabyte
    "samples": _COUNT,
    "save_every": _COUNT,
    "seed": (0, 2**63),
    "sizes": _COUNT,
    "steps": _COUNT,
    "sweep_epochs": _COUNT,
    "timeout": (1, 1e6),
    "tp": _SIZE,
    "weight_decay": _SMALL_FLOAT,
}

# PyTorch's errors on CPU and GPU, and of sizes that no tensor can have.
_NO_MEMORY = (
    *("can't allocate memory", "CUDA out of memory", "Storage size calculation overflowed"),
    *("numel: integer multiplication overflow", "std::bad_alloc", "larger than max_size()"),
)
_TOO_LARGE = "the memory does not suffice; take a smaller model, smaller batches or fewer samples"


@dataclass(kw_only=True)
class ExampleFlags:
    """Flags of every example."""

    seed: int = 0  # Seed of the initial weights, the order of samples, and samples that are drawn.
    device: Literal["auto", "cpu", "cuda"] = "auto"  # Device; auto takes CUDA where there is any.
    # File for the run's figures, a JSON object per line; the last line is the final result.
    metrics: Path | None = None

    def shared(self) -> dict[str, object]:
        """Return the flags that must be equal on all ranks, by name: all but files and folders."""
        return {
            f"--{name.replace('_', '-')}": value
            for name, value in asdict(self).items()
            if name not in MAY_DIFFER_ON_RANKS
        }

    def __post_init__(self) -> None:
        self._check_bounds()
        for name, package in (
            ("plots", "matplotlib"),
            ("report", "matplotlib"),
            ("report", "jinja2"),
            ("log_dir", "torch"),
            ("log_dir", "tensorboard"),
        ):
            if getattr(self, name, None) and importlib.util.find_spec(package) is None:
                flag = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{flag} needs {package}; pip install {package}")
        self._make_folders()

    def _check_bounds(self) -> None:
        for name, (least, end) in BOUNDS.items():
            flag, value = f"--{name.replace('_', '-')}", getattr(self, name, None)
            if value is None:
                continue
            values = value if isinstance(value, tuple) else (value,)
            if name == "clip" and not value > 0:  # gradients of norm 0 teach nothing
                raise ConfigError(f"{flag} is {value}, expected more than 0")
            if not all(one >= least for one in values):
                raise ConfigError(f"{flag} is {value}, expected at least {least}")
            if not all(one < end for one in values):
                raise ConfigError(f"{flag} is {value}, expected less than {end}")

    def _make_folders(self) -> None:
        try:  # to create the folders of the outputs, and to write there
            for name in ("plots", "report", "log_dir", "profile", "checkpoint"):
                if folder := getattr(self, name, None):
                    folder.mkdir(parents=True, exist_ok=True)
                    tempfile.TemporaryFile(dir=folder).close()
            if self.metrics:
                self.metrics.parent.mkdir(parents=True, exist_ok=True)
                self.metrics.open("a").close()
        except OSError as e:
            raise ConfigError(
                f"a run's outputs cannot be written ({e}); name another folder"
            ) from e


@dataclass(kw_only=True)
class DataFlags(ExampleFlags):
    """Flags of every example that reads images."""

    # Folder of the data sets, as torchvision's root.
    data: Path = Path(__file__).parent.parent / "data"
    dataset: Dataset = "mnist"  # Data set.


class RunOptions(TypedDict):
    """Keyword arguments of `torchpar.training.Run`."""

    epochs: int
    checkpoint: "CheckpointConfig | None"
    config: dict[str, object]


@dataclass(kw_only=True)
class TrainFlags(DataFlags):
    """Flags of every training example."""

    # Each optimizer's defaults, for a deep sigmoid MLP.
    SGD: ClassVar = {"lr": 0.5, "momentum": 0.9, "weight_decay": 3e-5}
    MUON: ClassVar = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.01}

    epochs: int = 10  # Passes over the training samples.
    batch_size: int = 128  # Samples per step, over all ranks.
    samples: int | None = None  # Train on the first ones only.
    # Optimizer; muon updates the weight matrices, and SGD updates the biases.
    optimizer: Literal["sgd", "muon"] = "sgd"
    lr: float | None = None  # Learning rate at the start; the default depends on the optimizer.
    momentum: float | None = None  # Nesterov momentum; the default depends on the optimizer.
    # Learning-rate schedule over the run; linear and cosine end at 0.
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    # λ of the weights: for muon decoupled decay, for sgd an L2 penalty λ/2·‖W‖² in the loss.
    weight_decay: float | None = None
    # Count the biases in the L2 penalty of sgd, too. Muon's decay is no part of the loss, so it
    # refuses this.
    decay_biases: bool = False
    orthogonality: float = 0.0  # Factor of the penalty Σ‖W·Wᵀ − I‖² in the loss.
    hidden: tuple[int, ...] = (128, 64)  # Widths of the hidden layers.
    crop: int = 0  # Pixels to leave out on each side of an image.
    pool: int = 1  # Side of the squares of pixels that are averaged to one.
    compile: bool = False  # Compile the model by torch.compile.
    # Train on ten batches and evaluate; write no metrics, logs, report, profile or checkpoint.
    dry_run: bool = False
    # Measure the time of each phase of a step (data, forward, backward, collectives, optimizer).
    phases: bool = False
    collectives: bool = False  # Count and time the collectives of a step.
    # Measure the bytes of weights, gradients, optimizer state and activations on each rank.
    memory: bool = False
    report: Path | None = None  # Folder for a page of the run, run.html.
    log_dir: Path | None = None  # Folder for TensorBoard: losses, accuracy and speed.
    # Folder for torch.profiler's trace of some steps, one file per rank.
    profile: Path | None = None
    # Folder of checkpoints, to save to and to resume from, on a file system of all ranks.
    checkpoint: Path | None = None
    save_every: int | None = None  # Steps between two saves; by default one save per epoch.
    keep: int = 2  # Checkpoints to keep.
    async_save: bool = False  # Save while training continues.
    clip: float | None = None  # Norm to which larger gradients are scaled down.
    timeout: float = 600.0  # Seconds after which a rank that waits for another gives up.

    def __post_init__(self) -> None:
        if self.dry_run:
            self.epochs = 1
            self.metrics = self.log_dir = self.report = self.profile = self.checkpoint = None
        if self.decay_biases and self.optimizer == "muon":
            raise ConfigError(
                "--decay-biases changes sgd's L2 penalty, and the optimizer is muon; take "
                "--optimizer sgd"
            )
        if self.memory and self.compile:
            raise ConfigError(
                "--memory sees no activations of compiled code; drop --compile or --memory"
            )
        super().__post_init__()

    def optimizer_options(self, defaults: Mapping[str, float]) -> dict[str, Any]:
        """Return an optimizer's arguments: the flags that are given, and ``defaults`` for the
        others."""
        given = {name: getattr(self, name) for name in defaults}
        return {name: defaults[name] if value is None else value for name, value in given.items()}

    def run_options(self) -> RunOptions:
        """Return the keyword arguments of `torchpar.training.Run` that flags give.

        ``config`` holds the flags that a resumed run must share with the saved one.
        """
        from torchpar.training import CheckpointConfig

        saving = self.save_every, self.keep, self.async_save
        checkpoint = CheckpointConfig(self.checkpoint, *saving) if self.checkpoint else None
        config = {
            name: value for name, value in asdict(self).items() if name not in MAY_DIFFER_ON_RESUME
        }
        # Of the lessons that lack these flags
        config = {"activation": "sigmoid", "label_smoothing": 0.0} | config
        if self.schedule != "constant":
            config["epochs"] = self.epochs  # the schedule depends on them
        return {"epochs": self.epochs, "checkpoint": checkpoint, "config": config}

    def layer_sizes(self, train: "Samples") -> list[int]:
        """Return the widths of the MLP: of its input, its hidden layers and its output.

        Raises:
            ConfigError: the weights do not fit into this machine's memory.
        """
        sizes = [train.inputs(slice(0, 1)).shape[1], *self.hidden, len(train.classes)]
        check_memory(sizes)
        return sizes

    def total_steps(self, train: "Samples") -> int:
        """Return the number of steps of the run."""
        return self.epochs * math.ceil(len(train) / self.batch_size)


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


def main(  # noqa: C901  # one handler for each kind of error
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
        try:
            with agreeing() as check:
                parsed = _parse(flags)
                check({"the version of torchpar": __version__, **parsed.shared()})
        except SystemExit as e:
            _print_usage(flags, e)
        gc.freeze()  # Python's collector would look through all imported modules again and again
        run(parsed)
    except (TorchparError, OSError) as e:
        if isinstance(e, AllRanksError) and _rank() > 0:  # rank 0 has the same error
            sys.exit(2)
        _end(str(e), is_rank_0_lost=0 in getattr(e, "missing", ()))
    except MemoryError as e:  # of Python and of NumPy
        _end(f"{_TOO_LARGE} ({first_line(e)})")
    except RuntimeError as e:
        if any(sign in str(e) for sign in _NO_MEMORY):
            _end(f"{_TOO_LARGE} ({first_line(e)})")
        if not type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason = " ".join(str(e).partition("\n\n")[0].split())
        _end(f"the model cannot be compiled: {reason}; drop --compile")
    except Stopped as e:
        if _rank() == 0:
            print(f"{e}; the state is saved, the same command resumes from it", flush=True)
        sys.exit(130 if e.signal == 2 else 0)
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell reports SIGINT


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


def _parser(flags: type[F]) -> Callable[..., F]:
    return partial(tyro.cli, flags, config=(tyro.conf.FlagCreatePairsOff,))


def _parse(flags: type[F]) -> F:
    """Return the flags of the command line.

    Raises:
        ConfigError: of ``flags.__post_init__``.
        SystemExit: --help, or a wrong flag, of which nothing is printed yet.
    """
    try:
        with redirect_stderr(io.StringIO()):  # tyro prints errors of __post_init__ nevertheless
            return _parser(flags)(console_outputs=False)
    except SystemExit as e:
        error: BaseException | None = e
        while error is not None:
            if isinstance(error, ConfigError):
                raise error from None
            error = error.__context__
        raise


def _print_usage(flags: type[F], end: SystemExit) -> NoReturn:
    """Parse again, so that tyro says why it has ended."""
    if end.code and _rank() > 0:
        time.sleep(GRACE)
    _parser(flags)(console_outputs=bool(end.code) or _rank() == 0)
    raise end
