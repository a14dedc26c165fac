# SPDX-License-Identifier: MIT
"""Command lines of training scripts: flags by tyro, errors in one line from rank 0."""

import contextlib
import importlib.util
import io
import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from torchpar.data import Dataset
from torchpar.errors import ConfigError
from torchpar.parallel.rendezvous import Place, find_place
from torchpar.training import Schedule, Stopped

try:
    import rich  # noqa: F401
    import tyro
except ImportError as error:
    sys.exit(f"this needs rich and tyro ({error}); pip install 'torchpar[examples]'")

F = TypeVar("F")
GRACE = 10.0  # seconds that other ranks leave rank 0 to speak before they end
ELSEWHERE = {  # flags that leave the numbers of a run as they are, but for rounding
    *("data", "epochs", "device", "compile", "dry_run", "phases", "collectives", "metrics", "plots"),
    *("checkpoint", "save_every", "keep", "async_save", "timeout"),
    *("dp", "tp", "pp", "pipeline", "micro_batches"),
}

RATES: dict[str, dict[str, float]] = {  # what flags left out are, by optimizer
    "sgd": {"lr": 0.5, "momentum": 0.9, "weight_decay": 3e-5},
    "muon": {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.01},
}

BOUNDS: dict[str, tuple[float, float]] = {  # of any flag so called: the least value, and the first too large
    **dict.fromkeys(("epochs", "sweep_epochs", "iterations", "save_every", "keep"), (1, 2**63)),
    **dict.fromkeys(("samples", "batch_size", "micro_batches"), (1, 2**63)),
    **dict.fromkeys(("hidden", "depth", "dp", "tp", "pp"), (1, 2**31)),
    **dict.fromkeys(("lr", "clip", "weight_decay", "orthogonality"), (0, 1e38)),  # float32 ends at 3.4e38
    "momentum": (0, 1),
    "seed": (0, 2**63),
    "timeout": (1, 1e6),
}


@dataclass(kw_only=True)
class ExampleFlags:
    """The flags every example has."""

    seed: int = 0
    """Seed of all that is random: initial weights, the order of samples, samples that are drawn."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes CUDA where there is any."""
    metrics: Path | None = None
    """File for the run's figures, a JSON object per line; the last line is the final result."""
    plots: Path | None = None
    """Folder for pictures."""

    def __post_init__(self) -> None:
        for name, (least, end) in BOUNDS.items():
            flag, value = f"--{name.replace('_', '-')}", getattr(self, name, None)
            if value is None:
                continue
            values = value if isinstance(value, tuple) else (value,)
            if not all(one >= least for one in values):
                raise ConfigError(f"{flag} is {value}, expected at least {least}")
            if not all(one < end for one in values):
                raise ConfigError(f"{flag} is {value}, expected less than {end}")
        if self.plots is not None and importlib.util.find_spec("matplotlib") is None:
            raise ConfigError("--plots needs matplotlib; pip install 'torchpar[examples]'")


@dataclass(kw_only=True)
class TrainFlags(ExampleFlags):
    """The flags every training example has."""

    data: Path
    """Folder of the data sets, as torchvision's root."""
    epochs: int = 10
    """Passes over the training samples."""
    batch_size: int = 128
    """Samples per step, over all ranks."""
    optimizer: Literal["sgd", "muon"] = "sgd"
    """What takes the steps; muon takes those of the weights, and leaves the biases to SGD."""
    lr: float | None = None
    """Learning rate at the start; by default 0.5, for Muon 0.02."""
    momentum: float | None = None
    """Nesterov momentum; by default 0.9, for Muon 0.95."""
    schedule: Schedule = "linear"
    """Course of the learning rate over the run; linear and cosine end at 0."""
    weight_decay: float | None = None
    """L2 penalty λ of the weights, λ/2·‖W‖² in the loss, by default 3e-5; for Muon decoupled decay, 0.01."""
    orthogonality: float = 0.0
    """Factor of the penalty Σ‖W·Wᵀ − I‖² in the loss."""
    hidden: tuple[int, ...] = (128, 64)
    """Widths of the hidden layers."""
    dataset: Dataset = "mnist"
    """What to learn."""
    compile: bool = False
    """Compile the model by torch.compile."""
    dry_run: bool = False
    """Train on ten batches and evaluate; write no metrics, plots or checkpoint."""
    phases: bool = False
    """Measure the time of each phase of a step (data, forward, backward, collectives, optimizer)."""
    collectives: bool = False
    """Count what travels between ranks for a step's gradient, and time it, beside what is predicted."""
    plots: Path | None = None
    """Folder for pictures: learning curves, confusion matrix, worst-classified samples."""
    checkpoint: Path | None = None
    """Folder to save to, and to resume from; all ranks must see it."""
    save_every: int | None = None
    """Steps between two saves; by default a run is saved after each epoch."""
    keep: int = 2
    """Checkpoints to keep."""
    async_save: bool = False
    """Save while training goes on."""
    clip: float | None = None
    """Norm to which a larger gradient is scaled down."""
    timeout: float = 600.0
    """Seconds after which a rank that waits for another gives up."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in RATES[self.optimizer].items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    def of_all_ranks(self) -> dict[str, Any]:
        """What must be the same on every rank: all but where things lie and where it computes."""
        return {name: value for name, value in asdict(self).items() if name not in ("data", "device")}

    def identity(self) -> dict[str, Any]:
        """What makes a run another run: everything but where it computes, how long, and what it writes."""
        return {name: value for name, value in asdict(self).items() if name not in ELSEWHERE}


def main(run: Callable[[F], None], flags: type[F]) -> None:
    """Parse ``flags`` from the command line and call ``run`` with them.

    A `ConfigError`, or a file that cannot be read or written, ends every rank with status 2; rank 0
    prints it as one line.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a λ is no reason to end where there is only ASCII
    try:
        run(_parse(flags))
    except (ConfigError, OSError) as e:
        _fail(str(e), getattr(e, "told", None))
    except Stopped:
        if _rank() == 0:
            print("stopped by SIGTERM; the state is saved, the same command goes on from it", flush=True)
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell reports SIGINT


def _parse(flags: type[F]) -> F:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(flags, config=(tyro.conf.FlagCreatePairsOff,), console_outputs=_rank() == 0)
    except SystemExit as e:
        if not e.code:  # --help
            raise
        # tyro frames its message: a title, the message, a rule, hints; where stdout's encoding is not called
        # "utf-8" there is a rule below the title too.
        framed = [line.strip("│| ") for line in said.getvalue().splitlines()[1:]]
        message = itertools.takewhile(_is_no_rule, itertools.dropwhile(_is_rule, framed))
        said_once = " ".join(message).removeprefix(f"Error parsing {flags.__name__}: ")
        error = ConfigError(f"{said_once or 'bad flags'}; see --help")
        place = _place()
        if place and place.rank and place.launcher in ("mpich", "openmpi"):
            error.told = True  # mpirun gives all ranks the same flags, and ends none that have not met
        raise error from None


def _is_rule(line: str) -> bool:
    return line != "" and set(line) <= set("─-")


def _is_no_rule(line: str) -> bool:
    return not _is_rule(line)


def _place() -> Place | None:
    try:
        return find_place()
    except ConfigError:  # which `main` tells
        return None


def _rank() -> int:
    place = _place()
    return place.rank if place else 0


def _fail(message: str, told: bool | None) -> NoReturn:
    """Tell the error and end, unless another rank tells it; launchers end all ranks when one has ended."""
    if told is None and _rank() != 0:
        time.sleep(GRACE)  # for rank 0, if it is about to fail too
    if told:
        time.sleep(2)  # for the one that tells
    else:
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
