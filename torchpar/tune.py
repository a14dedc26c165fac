# SPDX-License-Identifier: MIT
"""``python -m torchpar tune`` measures the matrix kernels on this GPU, for the table that launchers read.

A problem is measured as a whole, and the table is saved after each: the same command continues.
"""

import argparse
import hashlib
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from torchpar.errors import ConfigError, TorchparError

if TYPE_CHECKING:  # it imports Triton
    from torchpar.kernels.tiles import Device, Tiles

Call = Callable[[], object]

LIBRARY = "library"  # PyTorch's product, mirrored or with a sigmoid
ROUNDS, ROUND_MS = 5, 10  # of each configuration
# The problems of each kind of operands, the most important first: m, n, k and batch.
PROBLEMS = (
    *(("symmetric_product", n, n, n, 1) for n in (4096, 8192, 2048, 1024)),
    ("linear_sigmoid", 8192, 4096, 4096, 1),
    ("linear_sigmoid", 512, 12288, 3072, 1),
    ("linear_sigmoid", 128, 512, 784, 1),
    ("linear_sigmoid", 64, 1024, 8192, 1),
    ("linear_sigmoid", 8192, 512, 784, 1),
    ("linear_sigmoid", 2048, 2048, 2048, 1),
    ("linear_sigmoid", 8192, 8192, 8192, 1),
    *(("symmetric_product", n, n, n, batch) for n, batch in ((512, 1), (256, 1), (512, 64), (1024, 32))),
)


class Problem(NamedTuple):
    """Products ``(m, k)·(k, n)`` by a kernel. `torchpar.kernels.tiles.KINDS` has the kinds."""

    kind: str
    kernel: str
    m: int
    n: int
    k: int
    batch: int = 1

    def __str__(self) -> str:
        batch = f"{self.batch} of " * (self.batch > 1)
        return f"{self.kernel} {self.kind} {batch}{self.m}x{self.n}x{self.k}"


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        "python -m torchpar tune",
        description="Measure the fastest configurations of the kernels on this GPU. The same command "
        "continues a run that was interrupted. If you remove the table, all is measured anew.",
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="begin no problem later; by default 10")
    parser.add_argument("--sizes", nargs="+", type=int, default=(), help="square problems alone")
    options = parser.parse_args(arguments)
    try:
        return tune(options.sizes, options.minutes)
    except (TorchparError, OSError) as e:
        print(f"python -m torchpar tune: error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130  # the status a shell reports for SIGINT


def tune(sizes: Sequence[int] = (), minutes: float = 10.0) -> int:
    """Measure the problems that the device's table lacks, and save the table after each.

    ``sizes``, of square problems, take the place of `PROBLEMS`. No problem begins after ``minutes``. Returns
    the exit status: 1 if a problem could not be measured. Without a GPU it raises a ConfigError.
    """
    if not all(n > 0 and n % 16 == 0 for n in sizes):  # tables are for aligned operands
        raise ConfigError(f"--sizes is {sizes}, expected positive multiples of 16")
    if not torch.cuda.is_available():
        raise ConfigError("PyTorch finds no GPU, expected one to tune the kernels on")
    import triton

    from torchpar import kernels
    from torchpar.kernels import tiles

    end = time.monotonic() + 60 * minutes
    present = tiles.device(torch.empty(0, device="meta"))
    sources = sorted(Path(kernels.__path__[0]).glob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    header = {"device": present.name, "triton": triton.__version__, "torch": torch.__version__}
    header["kernels"] = digest[:16]  # if one of these has changed, all is measured again
    table: dict[str, Any] = tiles.load_table(present) or {}
    if table | header != table:
        table = header | {"tiles": {}}
    problems = [(kernel, n, n, n, 1) for n in sizes for kernel in tiles.KERNELS] or PROBLEMS
    left, left_out = [], 0
    for problem in (Problem(kind, *one) for kind in tiles.KINDS for one in problems):
        entries = table["tiles"].setdefault(problem.kernel, {}).setdefault(problem.kind, [])
        if tuple(problem[2:]) not in [tuple(entry[:4]) for entry in entries]:
            left.append((problem, entries))
    print(f"{present.name}: {len(left)} problems that are not in the table")
    try:
        while left and time.monotonic() < end:
            problem, entries = left[0]
            if entry := tune_problem(problem, present):
                entries.append(entry)
                dated = table | {"date": datetime.now(UTC).date().isoformat()}
                print(tiles.save_table(present, dated))
            left_out += entry is None
            del left[0]
    finally:  # after Ctrl-C too
        print(f"left to measure: {len(left)}; the same command continues" if left else "complete")
    return 1 if left_out else 0


def tune_problem(problem: Problem, present: "Device", device: str = "cuda") -> list[Any] | None:
    """Measure a problem and print the result; return its entry, or None if it cannot be measured."""
    from triton.testing import do_bench

    from torchpar.kernels.tiles import KINDS, configurations, split_k

    def time_call(call: Call) -> float:
        """The L2 cache is flushed before each call."""
        return float(do_bench(call, 1, ROUND_MS, return_mode="median")) / 1e3

    calls: dict[Tiles | str, Call] = {}
    dtype, precision = KINDS[problem.kind][:2]
    with torch.backends.flags(fp32_precision=precision):  # of the library's products
        try:
            launch, library, out, exact = prepare(problem, torch.device(device))
            expected = reference(exact, library(), problem.k)
        except torch.OutOfMemoryError as e:
            print(f"{problem}: left out, {type(e).__name__}: {e}")
            return None
        for tiles in configurations(problem.kernel, dtype, precision, present.capability):
            # Where split-K splits nothing, it is the kernel by pointers.
            if tiles.variant == "split_k" and split_k(tiles, present, *problem[2:5])[0] == 1:
                continue
            call = partial(launch, None, tiles=tiles)
            try:
                out.fill_(math.nan)
                call()
                check(out, expected, describe(tiles), problem.kernel == "symmetric_product")
                calls[tiles] = call
            except Exception as e:
                torch.cuda.synchronize()  # raises an error if the GPU itself has failed
                print(f"{problem}, {describe(tiles)}: {type(e).__name__}: {e}")
        if not calls:
            print(f"{problem}: left out, no configuration could be used")
            return None
        times = take_turns({LIBRARY: library, **calls}, time_call)
    ranked = sorted(times, key=times.__getitem__)
    row = (f"{describe(name)} {1e3 * times[name]:.4g} ms" for name in ranked)
    print(f"{problem}: {', '.join(row)}")
    return [*problem[2:], None if ranked[0] == LIBRARY else ranked[0]]


def prepare(problem: Problem, device: torch.device) -> tuple[Any, Callable[[], Tensor], Tensor, Tensor]:
    """The ``launch(wrap, tiles=...)`` that writes ``out``, ``library()``, ``out``, and float64."""
    from torchpar.kernels import linear_sigmoid, matmul_t
    from torchpar.kernels.tiles import KINDS

    kind, kernel, m, n, k, batch = problem
    dtype, precision = KINDS[kind][:2]
    random = partial(torch.randn, device=device, generator=torch.Generator(device).manual_seed(n))
    prefix = (batch,) * (batch > 1)
    x = random(*prefix, m, k).to(dtype)
    out, wide = x.new_empty(*prefix, m, n), x.double()
    if kernel == "symmetric_product":
        launch = partial(matmul_t.symmetric_product, x, x, precision, out=out)
        return launch, lambda: matmul_t.mirror(x @ x.mT, None), out, wide @ wide.mT
    # The weight is scaled so that the sigmoid does not saturate.
    weight, bias = (random(n, k) / math.sqrt(k)).to(dtype), random(n).to(dtype)
    launch = partial(linear_sigmoid.linear_sigmoid, x, weight, bias, precision, out=out)
    exact = linear(wide, weight.double(), bias.double()).sigmoid_()
    return launch, lambda: linear(x, weight, bias).sigmoid_(), out, exact


def describe(tiles: "Tiles | str") -> str:
    """The tile, warps, stages and variant, such as 128x256x64 w8 s3 tma; a name as it is."""
    return tiles if isinstance(tiles, str) else "{}x{}x{} w{} s{} {}".format(*tiles)


class Reference(NamedTuple):
    """A product in float64, and the largest error that a way to it may have."""

    product: Tensor
    bound: float


def reference(exact: Tensor, library: Tensor, k: int) -> Reference:
    """The float64 product ``exact`` of k terms; the bound is twice the error of PyTorch's ``library``."""
    error = (library.double() - exact).abs().max().item()
    # The reference has an error too: a rounding of random sign for each of k terms.
    own = exact.abs().max().item() * math.sqrt(k) * torch.finfo(torch.float64).eps / 2
    return Reference(exact, 2 * error + 3 * own)


def check(found: Tensor, expected: Reference, name: object, symmetric: bool = True) -> None:
    """Raise a ValueError if the error is over the bound, or if a product is not symmetric and should be."""
    error = (found.double() - expected.product).abs().max().item()
    if not error <= expected.bound:
        raise ValueError(f"{name} has an error of {error:.1e}, over {expected.bound:.1e}")
    if symmetric and not torch.equal(found, found.mT):
        raise ValueError(f"{name} is not symmetric")


def take_turns(calls: Mapping[Any, Call], time_call: Callable[[Call], float]) -> dict[Any, float]:
    """The lower quartile of the seconds of each call. They take turns, so that a disturbance slows all."""
    times: dict[Any, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(time_call(call))
    return {name: sorted(own)[len(own) // 4] for name, own in times.items()}
