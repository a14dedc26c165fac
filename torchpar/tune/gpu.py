# SPDX-License-Identifier: MIT
"""Measure the configurations of the matrix kernels on this GPU, for the table that the launchers read.

A problem is measured as a whole, and the table is saved after each: the same command continues.
"""

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from torchpar.errors import ConfigError
from torchpar.tune.measure import Call, check, print_times, reference, take_turns

if TYPE_CHECKING:  # it imports Triton
    from torchpar.kernels.tiles import Device, Tiles

LIBRARY = "library"  # PyTorch's product, mirrored or with a sigmoid
ROUND_MS = 10  # of each configuration
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
    print_times(problem, times, describe)
    fastest = min(times, key=times.__getitem__)
    return [*problem[2:], None if fastest == LIBRARY else fastest]


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
