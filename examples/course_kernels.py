# SPDX-License-Identifier: MIT
"""The first kernels of GPU courses, counted and bounded without a GPU: maximum, X·Xᵀ and A·Bᵀ.

    python examples/course_kernels.py
    python examples/course_kernels.py --plots pictures     the roofline, too
    python examples/course_kernels.py --device cuda        times on a GPU, too

A course launches the maximum by 1000 blocks of 1000 threads, X·Xᵀ by one block of 1024 threads, and
A·Bᵀ by a thread for each number (naive) or by tiles. Beside each stands this library's kernel. All
are compiled for an H100 and executed on this CPU. Their results are compared with PyTorch's in
float64.

CME 213 writes CUDA C++. Its naive and its blocked product are in course_kernels.cu, which nogpu
compiles by NVRTC. A block of 16 × 16 threads loads its tiles into shared memory. There 32 banks
deliver a number each at once. If threads of a warp read several numbers of a bank, it delivers one
after the other; each time more is a bank conflict. "padded" has rows of 17 numbers in place of 16,
so that numbers below each other lie in different banks.

The parallel networks' course writes numba.cuda. Its two kernels are in course_kernels_numba.py,
which numba-cuda compiles.

Arithmetic intensity is the number of operations for each byte that is loaded. A b × b block of the
result needs b rows of A and b rows of B. For each column it loads 2b numbers for b² multiply-adds:

    2·b² operations / (2·b numbers of 4 bytes) = b/4 operations per byte of float32

With b = 1 that is the naive kernel's 1/4. The table has the counted intensity: operations by the
bytes of all sectors of 32 bytes that the loads take. It is less than b/4 where a thread takes a
sector for 4 of its bytes, and a product that is one launch of square tiles reaches b/4. Reuse is
the share of all sectors that a perfect cache would not fetch again from memory.

No time is measured without a GPU. "at least" is a bound by the data sheet: each unit works at its
peak, and memory delivers each sector once, as if the caches took no time. So the naive kernel,
whose loads the caches serve, has a low bound. The tiled one has a higher bound, by the shared
memory that it reads. A line below each table names the unit that needs the most time. "about" is
the emulator's estimate, whose model counts the caches and the latency.
"""

import runpy
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import permutations
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from support import checks, cli, console, plots
from support.measure import interleaved_ms

import torch
from torch import Tensor

import torchpar
from torchpar.baselines import triton_kernels
from torchpar.errors import ConfigError
from torchpar.parallel.launch.world import join_world
from torchpar.testing.operators.compare import farthest

try:
    import nogpu.cuda
    from nogpu import DATA_SHEETS, cuda_is_cpu, emulate
    from nogpu.cpp.nvrtc import CompileError
except ImportError as error:
    sys.exit(f"course_kernels.py executes kernels by nogpu ({error}); pip install ./nogpu")

from support.kernels import by_unit, check_faults, compiling

GPU, SECTOR = "H100", 32  # bytes
CUDA = Path(__file__).with_suffix(".cu")
NUMBA = Path(__file__).with_name("course_kernels_numba.py")
TILE = 16  # threads of a side of a block in CUDA C++
HALF = "in float16"  # of which the roofline of float32 has no point
# An error above these bounds has ended the lesson.
RIGHT = (
    "all results are right: integers are equal, and an error is at most the sum of twice "
    "PyTorch's and √n roundings of the largest number, for sums of n numbers in another order"
)
MEANING = (
    f"at least: a bound by the data sheet of an {GPU}, without caches and latency, which ranks no "
    "kernels; about: the emulator's estimate of the time"
)
Side = Annotated[int, cli.Bounds(1, 4097)]
Threads = Annotated[int, cli.Bounds(1, 1025)]
Product = Callable[..., Tensor]


@dataclass(kw_only=True)
class Flags(cli.ExampleFlags):
    """Count what the first kernels of GPU courses take of an H100."""

    size: Side = 256  # Rows and columns of A and B.
    # Rows of X, at most 1024, as one block has a thread for each.
    rows: Threads = 128
    columns: Side = 784  # Columns of X.
    # Rows and columns of the maximum's matrices, with a thread for each column.
    side: Threads = 1000
    plots: cli.Plots = None  # Folder for the picture of the roofline.


class Work(NamedTuple):
    """A function, its operands, and ways to compute it by kernels.

    Attributes:
        reference: of PyTorch.
        ways: by name.
        on_gpu: whether they run on a GPU, too.
        by_numba: whether they are of numba.cuda, which launches on arrays of the device.
    """

    name: str
    reference: Product
    operands: Sequence[Tensor]
    ways: dict[str, Product]
    on_gpu: bool = True
    by_numba: bool = False


def linear_sigmoid(a: Tensor, b: Tensor) -> Tensor:
    return torchpar.linear_sigmoid(a, b, None)


def product_by(kernel: Any) -> Product:
    """Return A·Bᵀ by a kernel of CUDA C++."""

    def product(a: Tensor, b: Tensor) -> Tensor:
        n = len(a)
        c, blocks = torch.empty_like(a), -(-n // TILE)
        kernel[(blocks, blocks), (TILE, TILE)](a, b, c, n)
        return c

    return product


def cuda_products(a: Tensor, b: Tensor) -> list[Work]:
    """Return the products of course_kernels.cu, or none with a line where NVRTC is missing.

    Raises:
        ConfigError: NVRTC refuses the file.
    """
    try:
        kernels = nogpu.cuda.load(CUDA)
    except ModuleNotFoundError as error:
        print(f"left out: {CUDA.name}. {error}")
        return []
    except CompileError as error:
        raise ConfigError(f"{str(error).splitlines()[0]}; mend it") from None
    names = {
        "naive": "naive",
        "blocked": f"blocked<{TILE}, 0>",
        "padded": f"blocked<{TILE}, 1>",
    }
    ways = {name: product_by(kernels[kernel]) for name, kernel in names.items()}
    name = f"A·Bᵀ, {len(a)}³, in CUDA C++"
    return [Work(name, lambda a, b: a @ b.T, [a, b], ways, on_gpu=False)]


def of_numba(works: Sequence[Work]) -> list[Work]:
    """Return the works of course_kernels_numba.py, or none with a line where numba-cuda is missing.

    Args:
        works: the same by other kernels, without their ways.
    """
    if find_spec("numba_cuda") is None:
        print(
            f"left out: {NUMBA.name}. numba-cuda compiles kernels of numba.cuda: "
            "pip install 'numba-cuda[cu13]'"
        )
        return []

    def by(name: str) -> Product:
        def way(*operands: Tensor) -> Tensor:
            function = runpy.run_path(str(NUMBA))[name]  # compiled for the emulator of this call
            with warnings.catch_warnings():
                # The table shows that one block is few.
                warnings.filterwarnings("ignore", ".*Grid size")
                return torch.from_numpy(function(*(one.numpy() for one in operands)))

        return way

    return [
        work._replace(
            name=f"{work.name}, in numba.cuda",
            ways={name: by(function)},
            on_gpu=False,
            by_numba=True,
        )
        for work, (name, function) in zip(
            works, {"by rows": "maximum", "one block": "matmul_t"}.items(), strict=True
        )
    ]


def works(flags: Flags) -> list[Work]:
    """Return what is counted. Add a way of your own here."""
    n = flags.size
    integers = [torch.randint(0, 256, (flags.side,) * 2, dtype=torch.int32) for _ in range(2)]
    x, a, b = torch.randn(flags.rows, flags.columns), torch.randn(n, n), torch.randn(n, n)
    maximum = Work(
        f"maximum, {flags.side} × {flags.side}",
        torch.maximum,
        integers,
        {"by rows": triton_kernels.maximum_by_rows, "torchpar": torchpar.maximum},
    )
    matmul_t = Work(
        f"X·Xᵀ, {flags.rows} × {flags.columns}",
        lambda x: x @ x.T,
        [x],
        {"one block": triton_kernels.matmul_t_by_one_program, "torchpar": torchpar.matmul_t},
    )
    return [
        maximum,
        matmul_t,
        *of_numba([maximum, matmul_t]),
        Work(
            f"A·Bᵀ, {n}³",
            lambda a, b: a @ b.T,
            [a, b],
            {"naive": triton_kernels.matmul_naive, "tiled": triton_kernels.matmul_tiled},
        ),
        *cuda_products(a, b),
        Work(
            f"σ(A·Bᵀ), {n}³",
            lambda a, b: (a @ b.T).sigmoid(),
            [a, b],
            {"torchpar": linear_sigmoid},
        ),
        Work(
            f"σ(A·Bᵀ), {n}³",
            lambda a, b: (a @ b.T).sigmoid(),
            [a.half(), b.half()],
            {HALF: linear_sigmoid},
        ),
    ]


def check(name: str, result: Tensor, work: Work) -> None:
    """Compare a result with PyTorch's in float64.

    Raises:
        ConfigError: another type; an error above rounding; another number.
    """
    if not isinstance(result, Tensor):
        found = type(result).__name__
        raise ConfigError(f"{name} is {found}, expected a tensor; return the kernel's result")
    if result.is_floating_point():
        terms = work.operands[0].shape[-1]
        checks.compare(name, result, work.reference, *work.operands, terms=terms)
    elif not torch.equal(result, expected := work.reference(*work.operands)):
        wrong = int((result != expected).sum())
        raise ConfigError(
            f"{name}: {wrong} numbers are wrong: {farthest(result, expected)}; mend the kernel"
        )


def count(work: Work) -> list[console.Row]:
    """Execute each way as compiled for an H100, check its result, and return what it takes.

    Raises:
        ConfigError: a fault, a wrong result, or a way without a kernel.
    """
    rows: list[console.Row] = []
    for name, way in work.ways.items():
        part = f"{work.name} by {name}"
        with (
            emulate("sm_90") as gpu,
            cuda_is_cpu(gpu) if work.by_numba else nullcontext(),
            compiling(part),
        ):
            result = way(*work.operands)
        check_faults(gpu, part)
        check(part, result, work)
        bounds = [launch.bounds[0] for launch in gpu.launches]
        loads = sectors = distinct = conflicts = 0
        operations = 0.0
        for launch in gpu.launches:
            counters, total = launch.counters, launch.counters.total
            operations += sum(total.flops.values()) + sum(total.tensor_flops.values())
            memory = counters.sums("global")
            sectors, distinct = sectors + memory.transactions, distinct + memory.distinct
            conflicts += sum(one.conflicts for one in counters.in_space("shared"))
            loads += sum(
                one.transactions
                for one in counters.in_space("global")
                if one.what in ("load", "copy", "TMA load")
            )
        if not loads:
            raise ConfigError(f"{part}: no kernel loads a number; compute it by a kernel of Triton")
        rows.append(
            {
                "work": work.name,
                "by": name,
                "programs": max(launch.programs for launch in gpu.launches),
                "sectors": sectors,
                "reuse": 1 - distinct / sectors,
                "intensity": operations / (SECTOR * loads),
                "conflicts": conflicts,
                "at_least_µs": sum(bound.least for bound in bounds),
                "unit": max(bounds, key=lambda bound: bound.least).unit,
                "about_µs": sum(launch.time[GPU].microseconds for launch in gpu.launches),
            }
        )
    return rows


def shown_row(row: console.Row) -> console.Row:
    """Return the cells of a row of the table."""
    intensity = f"{row['intensity']:.3g}" if row["intensity"] else ""
    return {
        "by": row["by"],
        "blocks": row["programs"],
        "sectors": f"{row['sectors']:,}",
        "reuse": f"{row['reuse']:.0%}",
        "intensity": intensity,
        "at_least": f"{row['at_least_µs']:.2f} µs",
        "about": f"{row['about_µs']:.0f} µs",
    }


def bank_conflicts(rows: Sequence[console.Row]) -> str:
    """Return a line of the bank conflicts of each way that reads shared memory, "" without any."""
    if not any(row["conflicts"] for row in rows):
        return ""
    counts = ", ".join(f"{row['by']} {row['conflicts']:,}" for row in rows)
    return f"bank conflicts in shared memory: {counts}"


def low_bounds(rows: Sequence[console.Row]) -> Iterator[str]:
    """Say why a way has a lower bound than another one, and a longer estimated time.

    The bound leaves out the caches, so that it is low where they serve most loads.
    """
    for slow, fast in permutations(rows, 2):
        low, high = (float(row["at_least_µs"]) for row in (slow, fast))  # type: ignore[arg-type]
        times = float(slow["about_µs"]) / float(fast["about_µs"])  # type: ignore[arg-type]
        if low >= high or times <= 1:
            continue
        instead = ", which it reads in place of the caches" * (fast["unit"] == "shared memory")
        yield (
            f"{slow['by']}: at least {low:.2f} µs is less than {fast['by']}'s {high:.2f} µs, "
            f"because the bound lets caches serve {slow['reuse']:.0%} of {slow['sectors']:,} "
            f"sectors in no time, and {slow['unit']} alone counts. The bound of {fast['by']}, "
            f"which takes {fast['sectors']:,} sectors, is by the {fast['unit']} of "
            f"{fast['programs']} block{'s' * (fast['programs'] != 1)}{instead}. By the estimate, "
            f"which counts caches and latency, {fast['by']} is {times:.3g} times as fast"
        )


def measure(work: Work, device: torch.device) -> list[console.Row]:
    """Return the measured milliseconds of each way on a GPU, and of PyTorch's operator."""
    operands = [t.to(device) for t in work.operands]
    ways = work.ways | {"PyTorch": work.reference}
    calls = {name: lambda way=way: way(*operands) for name, way in ways.items()}
    times = interleaved_ms(calls, device)
    return [{"work": work.name, "by": name, "ms": ms} for name, ms in times.items()]


def save_roofline(path: Path, rows: Sequence[console.Row]) -> None:
    """Draw the roof of the GPU's data sheet, and each product at its intensity below it."""
    sheet = DATA_SHEETS[GPU]
    peak, memory = sheet.flops["f32"], sheet.memory  # TFLOP/s and TB/s
    x = [0.01, peak / memory, 100]
    with plots.picture(path, (6.2, 3.7)) as (axes,):
        axes.loglog(x, [min(peak, one * memory) for one in x], "k-")
        for i, row in enumerate(rows):
            at = float(row["intensity"])  # type: ignore[arg-type]
            label = f"{row['work']}: {row['by']}"
            # Rings of several sizes show points that coincide.
            y, size = min(peak, at * memory), 5 + 4 * i
            axes.plot([at], [y], "o", fillstyle="none", markersize=size, label=label)
        axes.set(
            xlabel="operations per byte that is loaded",
            ylabel="TFLOP/s at most, if memory loads it",
            title=f"{GPU}, float32, by its data sheet",
        )
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)


def main(flags: Flags) -> None:
    torch.manual_seed(flags.seed)
    with join_world(flags.device, alone=True) as world:  # a GPU that is missing is refused first
        device = world.device
    found = works(flags)
    rows: list[console.Row] = []
    for work in console.progress(found, "kernels"):
        rows += count(work)
    print(RIGHT)
    for name in dict.fromkeys(row["work"] for row in rows):
        shown = [shown_row(row) for row in rows if row["work"] == name]
        console.print_rows(shown, str(name))
        units = by_unit((row["by"], row["unit"]) for row in rows if row["work"] == name)
        print(f"at least, {units}")
        if line := bank_conflicts([row for row in rows if row["work"] == name]):
            print(line)
        for line in low_bounds([row for row in rows if row["work"] == name]):
            print(line)
    print(MEANING)
    if flags.plots:
        save_roofline(
            flags.plots / "roofline.png",
            [row for row in rows if row.get("intensity") and row["by"] != HALF],
        )
    sheet = DATA_SHEETS[GPU]
    ridge = sheet.flops["f32"] / sheet.memory
    print(f"by its data sheet an {GPU} needs {ridge:.0f} operations per byte to reach its peak")
    if device.type == "cuda":
        times = [row for work in found if work.on_gpu for row in measure(work, device)]
        console.print_rows(times, "measured on this GPU")
        rows += times
    else:
        print("left out: times, as PyTorch finds no GPU or --device is cpu")
    console.write_metrics(flags.metrics, rows)


if __name__ == "__main__":
    cli.main(main, Flags)
