# SPDX-License-Identifier: MIT
"""The fastest configuration of each matrix kernel on the present GPU: ``python -m torchpar tune``.

A problem is a kernel, a dtype and a size; its candidates come from `torchpar.kernels.tuning`. A candidate's
result is checked against float64 before it is timed, in turn with the library's product, so that what
disturbs the GPU disturbs both. What wins by their ratio goes into the table that the launchers read; where
nothing beats the library, the table says so. Sizes without a trial keep what they have.

The same command goes on where an earlier one ended, whatever ended it (`torchpar.search`).
"""

import hashlib
import math
import signal
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from torchpar.errors import ConfigError
from torchpar.measure import measure
from torchpar.search import (
    BATCH,
    BATCHED_UP_TO,
    SIZES,
    Journal,
    Problem,
    Problems,
    Tiles,
    Trial,
    describe,
    search,
    tabulate,
    tiles_of,
)

Kernel = Literal["symmetric_product", "symmetrized_product", "linear_sigmoid"]
Dtype = Literal["bfloat16", "float16", "tf32", "float32", "float64"]


@dataclass(kw_only=True)
class TuneFlags:
    """Search for the fastest configurations of the kernels on this GPU; the same command goes on later."""

    minutes: float = 10.0
    """Begin no measurement after so long."""
    kernels: tuple[Kernel, ...] = get_args(Kernel)
    """What to tune."""
    dtypes: tuple[Dtype, ...] = get_args(Dtype)
    """float32 is IEEE's, tf32 is float32 with operands rounded for the tensor cores."""
    sizes: tuple[int, ...] = SIZES
    """Rows and columns of the matrices, in the order to go by."""
    output: Path | None = None
    """Folder for the table and its journal; by default the table goes where the kernels look for it."""

    def __post_init__(self) -> None:
        if not 0 < self.minutes < math.inf:
            raise ConfigError(f"--minutes is {self.minutes}, expected a finite number above 0")
        for name in ("kernels", "dtypes", "sizes"):
            if not getattr(self, name):
                raise ConfigError(f"--{name} is empty, expected at least one")
        if not all(n > 0 and n % 16 == 0 for n in self.sizes):  # tables are for aligned operands
            raise ConfigError(f"--sizes is {self.sizes}, expected positive multiples of 16")


def run(flags: TuneFlags) -> None:
    if not torch.cuda.is_available():
        raise ConfigError("PyTorch finds no GPU, expected one to tune the kernels on")
    from torchpar.kernels import tuning

    device = torch.device("cuda", torch.cuda.current_device())
    present = tuning.device(torch.empty(0, device="meta"))
    old = tuning.load(present.name, present.capability, flags.output)
    problems = make_problems(flags, present.capability, old)
    folder = flags.output or tuning.user_folder()
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal((folder / tuning.file_name(present.name)).with_suffix(".jsonl"), where(present.name))
    if journal.unreadable:
        print(f"{journal.path}: {journal.unreadable} unreadable lines, expected trials; they are left out")
    total, left = sum(map(len, problems.values())), len(journal.missing(problems))
    print(f"{present.name}: {total} candidates, {total - left} of them are in {journal.path}")
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as a shell reports it
    try:
        go_on(flags, problems, journal, device)
    finally:  # Ctrl-C too
        save(problems, journal, present, flags.output)
        signal.signal(signal.SIGTERM, before)


def make_problems(
    flags: TuneFlags, capability: int, old: dict[str, Any] | None
) -> dict[Problem, list[Tiles]]:
    """The candidates of each problem: what the table has now, the default, and then the others."""
    from torchpar.kernels import tuning

    problems: dict[Problem, list[Tiles]] = {}
    for n in flags.sizes:
        for batch in (1, BATCH) if n <= BATCHED_UP_TO else (1,):
            for dtype in flags.dtypes:
                for kernel in flags.kernels:
                    problem = Problem(kernel, dtype, n, batch)
                    kind = (problem.torch_dtype, problem.precision)
                    first = [tiles_of(old, problem), tuning.default_tiles(*kind, n, n)]
                    others = tuning.candidates(kernel, *kind, capability)
                    if batch == 1 or kernel != "linear_sigmoid":  # whose rows are the batch
                        problems[problem] = list(dict.fromkeys(t for t in (*first, *others) if t is not None))
    return problems


def where(device_name: str) -> dict[str, str]:
    """What trials hold for: the device, the versions, and the kernels' source."""
    import triton

    from torchpar.kernels import gemm, linear_sigmoid, matmul_t

    source = b"".join(Path(str(module.__file__)).read_bytes() for module in (gemm, linear_sigmoid, matmul_t))
    return {
        "device": device_name,
        "triton": triton.__version__,
        "torch": torch.__version__,
        "kernels": hashlib.sha256(source).hexdigest()[:16],
    }


def go_on(flags: TuneFlags, problems: Problems, journal: Journal, device: torch.device) -> None:
    """Search, with a progress bar on a terminal, and a line for each problem that is done."""
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    trials = search(problems, partial(measure, device=device), journal, 60 * flags.minutes)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(journal.missing(problems)))
        for trial in trials:
            progress.update(task, advance=1, description=str(trial.problem))
            if trial.error:
                print(f"{trial.problem}, {trial}")
                check_device(trial)
            candidates = problems[trial.problem]
            if not journal.missing({trial.problem: candidates}):
                best = journal.best(trial.problem, candidates)
                print(f"{trial.problem}: {best or 'none of its candidates can be used'}")


def check_device(trial: Trial) -> None:
    try:
        torch.cuda.synchronize()
    except RuntimeError as e:
        raise ConfigError(
            f"the GPU fails since {describe(trial.tiles)} of {trial.problem}, which will be left out; "
            "run the same command again to go on"
        ) from e


def save(problems: Problems, journal: Journal, present: Any, output: Path | None) -> None:
    """Write the table of what is best so far, and print it."""
    from torchpar.kernels import tuning

    old = tuning.load(present.name, present.capability, output)
    found = tabulate(problems, journal, partial(tiles_of, old))
    if not found:
        print("nothing was measured, no table is written")
        return
    tiles = old["tiles"] if old else {}
    for kernel, kinds in found.items():
        tiles[kernel] = tiles.get(kernel, {}) | kinds
    header = {key: value for key, value in journal.where.items() if key != "kernels"}
    date = datetime.now(UTC).date().isoformat()
    path = tuning.save(present.name, {**header, "date": date, "tiles": tiles}, output)
    show(problems, journal)
    left = len(journal.missing(problems))
    print(f"{left} candidates are missing; the same command goes on" if left else "nothing is missing")
    print(path)


def show(problems: Problems, journal: Journal) -> None:
    """A table for each kernel: sizes × dtypes."""
    for kernel in dict.fromkeys(problem.kernel for problem in problems):
        own = {p: candidates for p, candidates in problems.items() if p.kernel == kernel}
        dtypes = list(dict.fromkeys(p.dtype for p in own))
        table = Table("size", *dtypes, title=f"{kernel}: configuration, ms, speedup over PyTorch")
        for n, batch in sorted({(p.n, p.batch) for p in own}, key=lambda size: size[::-1]):
            row = [Problem(kernel, dtype, n, batch) for dtype in dtypes]
            cells = [str(journal.best(p, own[p]) or "-").replace(", ", "\n") for p in row]
            table.add_row(str(n) if batch == 1 else f"{batch} of {n}", *cells)
        Console().print(table)


def main() -> None:
    from torchpar import cli  # which ends the process where tyro is not installed

    cli.main(run, TuneFlags)
