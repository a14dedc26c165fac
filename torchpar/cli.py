# SPDX-License-Identifier: MIT
"""Command lines of training scripts: flags by tyro, errors in one line from rank 0."""

import contextlib
import importlib.util
import io
import itertools
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from torchpar.data import Dataset
from torchpar.errors import ConfigError
from torchpar.training import Schedule

try:
    import rich  # noqa: F401
    import tyro
except ImportError as error:
    sys.exit(f"the examples need rich and tyro ({error}); pip install 'torchpar[examples]'")

F = TypeVar("F")
GRACE = 10.0  # seconds that other ranks leave rank 0 to speak before they end


@dataclass(kw_only=True)
class TrainFlags:
    """The flags every training example has."""

    data: Path
    """Folder of the data sets, as torchvision's root."""
    epochs: int = 10
    """Passes over the training samples."""
    batch_size: int = 128
    """Samples per step, over all ranks."""
    lr: float = 0.5
    """Learning rate at the start."""
    momentum: float = 0.9
    """Nesterov momentum."""
    schedule: Schedule = "linear"
    """Course of the learning rate over the run; linear and cosine end at 0."""
    weight_decay: float = 3e-5
    """L2 penalty λ of the weights: λ/2·‖W‖² in the loss."""
    orthogonality: float = 0.0
    """Factor of the penalty Σ‖W·Wᵀ − I‖² in the loss."""
    hidden: tuple[int, ...] = (128, 64)
    """Widths of the hidden layers."""
    seed: int = 0
    """Seed of the initial weights and of the order of samples."""
    dataset: Dataset = "mnist"
    """What to learn."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes CUDA where there is any."""
    compile: bool = False
    """Compile the model by torch.compile."""
    dry_run: bool = False
    """Train on ten batches and evaluate; write no metrics, plots or checkpoint."""
    phases: bool = False
    """Measure the time of each phase of a step (data, forward, backward, collectives, optimizer)."""
    metrics: Path | None = None
    """File for one JSON object per epoch."""
    plots: Path | None = None
    """Folder for pictures: learning curves, confusion matrix, worst-classified samples."""
    checkpoint: Path | None = None
    """Folder to save to after each epoch, and to resume from."""

    def identity(self) -> dict[str, Any]:
        """What makes a run another run: everything but where it computes, how long, and what it writes."""
        elsewhere = {
            "data",
            "epochs",
            "device",
            "compile",
            "dry_run",
            "phases",
            "metrics",
            "plots",
            "checkpoint",
        }
        return {name: value for name, value in asdict(self).items() if name not in elsewhere}

    def __post_init__(self) -> None:
        bounds: dict[str, tuple[float, float]] = {"epochs": (1, math.inf), "batch_size": (1, math.inf)}
        bounds |= {"lr": (0, math.inf), "momentum": (0, 1), "seed": (0, 2**63)}
        bounds |= {"weight_decay": (0, math.inf), "orthogonality": (0, math.inf)}
        for name, (least, end) in bounds.items():
            flag, value = f"--{name.replace('_', '-')}", getattr(self, name)
            if not value >= least:
                raise ConfigError(f"{flag} is {value}, expected at least {least}")
            if not value < end:
                raise ConfigError(f"{flag} is {value}, expected less than {end}")
        if any(width < 1 for width in self.hidden):
            raise ConfigError(f"--hidden is {self.hidden}, expected widths of at least 1")
        if self.plots is not None and importlib.util.find_spec("matplotlib") is None:
            raise ConfigError("--plots needs matplotlib; pip install 'torchpar[examples]'")


def main(run: Callable[[F], None], flags: type[F]) -> None:
    """Parse ``flags`` from the command line and call ``run`` with them.

    A `ConfigError`, or a file that cannot be read or written, ends every rank with status 2; rank 0
    prints it as one line.
    """
    try:
        run(_parse(flags))
    except (ConfigError, OSError) as e:
        _fail(str(e))
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
        # tyro frames its message: a title, the message, a rule, hints.
        framed = [line.strip("│ ") for line in said.getvalue().splitlines()[1:]]
        message = itertools.takewhile(lambda line: not line.startswith("─"), framed)
        said_once = " ".join(message).removeprefix(f"Error parsing {flags.__name__}: ")
        raise ConfigError(f"{said_once or 'bad flags'}; see --help") from None


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _fail(message: str) -> NoReturn:
    if _rank() != 0:
        # torchrun ends the other ranks as soon as one has ended, so let rank 0 be first.
        time.sleep(GRACE)
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
