# SPDX-License-Identifier: MIT
"""A candidate of a search on the device: prepared, checked against float64, timed beside the library."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from torchpar.ops._matrix import mirrored
from torchpar.search import Problem, Tiles

ROUNDS = 5  # in which candidate and library take turns
ROUND_MS = 10  # of each, in a round

LIBRARY: dict[str, Callable[..., Tensor]] = {
    "symmetric_product": lambda x: mirrored(x @ x.mT),
    "symmetrized_product": lambda g, x: (g + g.mT) @ x,
    "linear_sigmoid": lambda x, weight, bias: linear(x, weight, bias).sigmoid_(),
}


class Case(NamedTuple):
    """A problem with its matrices.

    Attributes:
        launch: ``launch(wrap, tiles=...)`` writes ``out``; ``wrap`` is as the launchers take it.
        library: the same by PyTorch's own product.
        oracle: the result in float64.
    """

    launch: Callable[..., None]
    library: Callable[[], Tensor]
    out: Tensor
    oracle: Tensor


def prepare(problem: Problem, device: torch.device) -> Case:
    from torchpar.kernels import linear_sigmoid, matmul_t

    # To compile alone, the meta device will do, which has no generator.
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(problem.n)
    shape = (problem.batch, problem.n, problem.n) if problem.batch > 1 else (problem.n, problem.n)
    x, y = (torch.randn(shape, device=device, generator=generator).to(problem.torch_dtype) for _ in range(2))
    out = torch.empty_like(x)
    inputs: tuple[Tensor, ...]
    launcher: Callable[..., None]
    if problem.kernel == "symmetric_product":
        inputs, launcher = (x,), partial(matmul_t.symmetric_product, x, x)
    elif problem.kernel == "symmetrized_product":
        inputs, launcher = (y, x), partial(matmul_t.symmetrized_product, y, x)
    else:
        inputs = (x, y / math.sqrt(problem.n), y[0])  # so scaled, the sigmoid does not saturate
        launcher = partial(linear_sigmoid.linear_sigmoid, *inputs)
    library = LIBRARY[problem.kernel]
    return Case(
        partial(launcher, out, problem.precision),
        partial(library, *inputs),
        out,
        library(*(t.double() for t in inputs)),
    )


def measure(problem: Problem, tiles: Tiles, device: torch.device) -> tuple[float, float]:
    """Median milliseconds of a candidate and of the library, in turn, with the L2 cache flushed.

    Raises:
        ValueError: the candidate's result is wrong. Triton raises what it does not compile or launch.
    """
    from triton.testing import do_bench

    with fp32_precision(problem.precision):
        case = prepare(problem, device)
        call = partial(case.launch, lambda kernel: kernel, tiles=tiles)
        check(case, call, problem)
        calls = (call, case.library)
        times = [[do_bench(f, 1, ROUND_MS, return_mode="median") for f in calls] for _ in range(ROUNDS)]
    ms, library_ms = (median(samples) for samples in zip(*times, strict=True))
    return ms, library_ms


def check(case: Case, call: Callable[[], object], problem: Problem) -> None:
    """Raise a ValueError if what ``call`` writes has over twice the library's error, or is not symmetric."""
    case.out.fill_(math.nan)
    call()
    error, allowed = ((t.double() - case.oracle).abs().max().item() for t in (case.out, case.library()))
    # The oracle is off as well: by a rounding of random sign for each of n terms.
    largest = case.oracle.abs().max().item()
    oracle_error = largest * math.sqrt(problem.n) * torch.finfo(torch.float64).eps / 2
    if not error <= 2 * (allowed + oracle_error) + oracle_error:
        raise ValueError(f"an error of {error:.1e}, where the library's is {allowed:.1e}")
    if problem.kernel == "symmetric_product" and not torch.equal(case.out, case.out.mT):
        raise ValueError("the result is not symmetric")


@contextmanager
def fp32_precision(precision: str) -> Iterator[None]:
    """Within, the library's float32 products round their operands so: "ieee" or "tf32"."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
