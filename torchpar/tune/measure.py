# SPDX-License-Identifier: MIT
"""Check the configurations of a problem against float64, and time them beside PyTorch's own product."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from torchpar.errors import ConfigError

LIBRARY = "library"  # PyTorch's product, mirrored or with a sigmoid
ROUNDS = 5
ROUND_MS = 10  # of each configuration

Tiles = tuple[int | str, ...]  # `torchpar.kernels.tiles.Tiles`, which needs Triton, is such a tuple


class Problem(NamedTuple):
    """Products ``(m, k)·(k, n)`` by a kernel. `torchpar.kernels.tiles.KINDS` has the kinds."""

    kernel: str
    kind: str
    m: int
    n: int
    k: int
    batch: int = 1

    def __str__(self) -> str:
        batch = f"{self.batch} of " * (self.batch > 1)
        return f"{self.kernel} {self.kind} {batch}{self.m}x{self.n}x{self.k}"


class PreparedProblem(NamedTuple):
    """``launch(wrap, tiles=...)`` writes ``out``; ``library()`` returns it; ``reference`` is float64."""

    launch: Callable[..., object]
    library: Callable[[], Tensor]
    out: Tensor
    reference: Tensor


def prepare(problem: Problem, device: torch.device) -> PreparedProblem:
    """Random operands on ``device``."""
    from torchpar.kernels import linear_sigmoid, matmul_t
    from torchpar.kernels.tiles import KINDS

    kernel, kind, m, n, k, batch = problem
    dtype, precision = KINDS[kind][:2]
    random = partial(torch.randn, device=device, generator=torch.Generator(device).manual_seed(n))
    prefix = (batch,) * (batch > 1)
    x = random(*prefix, m, k).to(dtype)
    out, wide = x.new_empty(*prefix, m, n), x.double()
    if kernel == "symmetric_product":
        launch = partial(matmul_t.symmetric_product, x, x, precision, out=out)
        return PreparedProblem(launch, lambda: matmul_t.mirror(x @ x.mT, None), out, wide @ wide.mT)
    # The weight is scaled so that the sigmoid does not saturate.
    weight, bias = (random(n, k) / math.sqrt(k)).to(dtype), random(n).to(dtype)
    launch = partial(linear_sigmoid.linear_sigmoid, x, weight, bias, precision, out=out)
    reference = linear(wide, weight.double(), bias.double()).sigmoid_()
    return PreparedProblem(launch, lambda: linear(x, weight, bias).sigmoid_(), out, reference)


def measure(problem: Problem, configurations: Sequence[Tiles], device: torch.device) -> dict[Any, float]:
    """Milliseconds of each configuration that is right, and of `LIBRARY`; print the errors of the others.

    They take turns, so that a disturbance of the GPU slows all. The L2 cache is flushed before each call.

    Raises:
        ConfigError: the GPU fails.
    """
    from triton.testing import do_bench

    from torchpar.kernels.tiles import KINDS

    with use_fp32_precision(KINDS[problem.kind].precision):
        prepared = prepare(problem, device)
        calls: dict[Tiles | str, Callable[[], object]] = {LIBRARY: prepared.library}
        calls |= {tiles: partial(prepared.launch, None, tiles=tiles) for tiles in configurations}
        times: dict[Tiles | str, list[float]] = {name: [] for name in calls}
        for index in range(ROUNDS):
            for name, call in list(calls.items()):
                try:
                    if index == 0 and name != LIBRARY:
                        check_result(prepared, call, problem)
                    times[name].append(do_bench(call, 1, ROUND_MS, return_mode="median"))
                except Exception as e:
                    check_gpu(f"{problem}, {describe(name)}")
                    if name == LIBRARY:
                        raise
                    print(f"{problem}, {describe(name)}: {error_line(e)}")
                    del calls[name], times[name]
    return {name: median(own) for name, own in times.items()}


def check_result(prepared: PreparedProblem, call: Callable[[], object], problem: Problem) -> None:
    """Raise a ValueError if the error is over twice the library's, or if a product is not symmetric."""
    prepared.out.fill_(math.nan)
    call()
    results = prepared.out, prepared.library()
    error, allowed = ((t.double() - prepared.reference).abs().max().item() for t in results)
    # The reference has an error too: a rounding of random sign for each of k terms.
    largest = prepared.reference.abs().max().item()
    reference_error = largest * math.sqrt(problem.k) * torch.finfo(torch.float64).eps / 2
    if not error <= 2 * (allowed + reference_error) + reference_error:
        raise ValueError(f"an error of {error:.1e}, where the library's is {allowed:.1e}")
    if problem.kernel == "symmetric_product" and not torch.equal(prepared.out, prepared.out.mT):
        raise ValueError("the result is not symmetric")


def check_gpu(last: str) -> None:
    """Raise a ConfigError if the GPU has failed after ``last``."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError as e:
        raise ConfigError(f"the GPU fails after {last}, leave it out by --variants ({error_line(e)})") from e


def describe(tiles: Tiles | str) -> str:
    """The tile, warps, stages and variant, such as 128x256x64 w8 s3 tma; a name as it is."""
    return tiles if isinstance(tiles, str) else "{}x{}x{} w{} s{} {}".format(*tiles)


def error_line(e: BaseException) -> str:
    """The type and the first line of an exception's first cause, as "TypeError: message"."""
    while e.__cause__ is not None:  # Triton wraps the cause in the source that leads to it
        e = e.__cause__
    message = getattr(e, "error_message", None) or e
    return f"{type(e).__name__}: {message}".partition("\n")[0]


@contextmanager
def use_fp32_precision(precision: str) -> Iterator[None]:
    """Set the precision of the library's float32 products, "ieee" or "tf32", and restore it afterwards."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
