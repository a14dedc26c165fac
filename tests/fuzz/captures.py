# SPDX-License-Identifier: MIT
"""Random steps in captures on an emulated GPU: copies, indices, and operators that may read back.

A step draws its sizes, layouts, types and options, and says by a rule of its own whether a GPU
refuses it. A capture must refuse the first such step of a program, and no other one. A graph of
steps that are allowed must compute what the steps compute, also after their inputs have changed.
"""

import itertools
import random
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from driver import Found, run
from torch import Tensor
from torch.nn import functional as F

from nogpu import cuda_is_cpu, emulate
from nogpu.cuda import host_copies, places, reading_operators
from nogpu.cuda.reading_operators import READERS, Reader

DTYPES = (torch.float32, torch.float64, torch.int32)
LAYOUTS = ("plain", "transposed", "every other", "one row")
READ, COPY = "read-back in a capture", "host's copy in a capture"
ALLOWED = ""


class Step(NamedTuple):
    """A step of a program.

    Attributes:
        call: returns tensors, of which those of the host are written in place.
        refused: the name of the fault for which a capture refuses it.
        name: what it does, for a report.
    """

    call: Callable[[], Any]
    refused: str
    name: str


def laid_out(t: Tensor, layout: str) -> Tensor:
    """Return a tensor of two dimensions in a part of its memory, or in another order."""
    if layout == "transposed":
        return t.t()
    if layout == "every other":
        return t[:, ::2]
    return t[:1] if layout == "one row" else t


def addresses(t: Tensor) -> list[int]:
    """Return where the elements are, in the order of their indices."""
    pairs = (zip(index, t.stride(), strict=True) for index in np.ndindex(*t.shape))
    return [sum(i * stride for i, stride in pair) for pair in pairs]


def is_straight(to: Tensor, source: Tensor, *, to_device: bool, asynchronous: bool) -> bool:
    """Whether PyTorch copies without other memory of the host: its steps, by tensors of the CPU."""
    source = source.expand_as(to)
    one, other = addresses(to), addresses(source)
    if to.dtype == source.dtype and one == other and sorted(one) == [*range(len(one))]:
        return True
    host = source if to_device else to
    is_converted = to.dtype != source.dtype and not asynchronous
    return host.is_contiguous() and not is_converted


def copy(rng: random.Random) -> Step:
    """A copy between host and device by one of several calls."""
    draw, (rows, columns) = rng.choice, rng.sample((0, 1, 2, 3, 4, 5), 2)
    dtypes, layouts = rng.choices(DTYPES, k=2), rng.choices(LAYOUTS, k=2)
    asynchronous, is_pinned, to_device = rng.random() < 0.8, rng.random() < 0.8, rng.random() < 0.6
    memory = torch.arange(rows * columns, dtype=dtypes[0]).view(rows, columns)
    host = laid_out(memory.pin_memory() if is_pinned else memory, layouts[0])
    how = draw(("copy_", "to", "cuda", "slice") if to_device else ("copy_", "to", "cpu"))
    if how == "slice":  # which waits
        asynchronous = False
    name = f"{how} {[*host.shape]} {layouts} {dtypes} {asynchronous=} {is_pinned=} {to_device=}"
    there = torch.ones(host.shape, dtype=dtypes[1], device="cuda")
    device = laid_out(torch.ones(4, 6, dtype=dtypes[1], device="cuda"), layouts[1])
    fits = device.shape == host.shape or (to_device and layouts[0] == "one row" and rows)
    if how in ("copy_", "slice") and not (fits and device.shape[1] == host.shape[1]):
        device = there
    if how == "to":
        return copy_by_to(host if to_device else device, dtypes[1], asynchronous, name, is_pinned)
    if how == "cuda":
        refused = refusal(torch.empty_like(host), host, True, asynchronous, is_pinned)
        return Step(lambda: host.cuda(non_blocking=asynchronous), refused, name)
    if how == "cpu":
        return Step(lambda: device.cpu(), READ, name)
    to, source = (device, host) if to_device else (host, device)
    refused = refusal(to, source, to_device, asynchronous, is_pinned)
    if how == "slice":
        return Step(lambda: to.__setitem__(slice(None), source) or to, refused, name)
    return Step(lambda: to.copy_(source, non_blocking=asynchronous), refused, name)


def copy_by_to(
    t: Tensor, dtype: torch.dtype, asynchronous: bool, name: str, is_pinned: bool
) -> Step:
    """A copy whose result PyTorch allocates, in the order of the tensor, and pins on the host."""
    to_device = not places.is_on_device(t)
    device = "cuda" if to_device else "cpu"
    made = torch.empty_like(t, dtype=dtype)
    refused = refusal(made, t, to_device, asynchronous, is_pinned or not to_device)
    if not to_device and not asynchronous:
        refused = READ
    return Step(lambda: t.to(device, dtype, non_blocking=asynchronous), refused, name)


def refusal(
    to: Tensor, source: Tensor, to_device: bool, asynchronous: bool, is_pinned: bool
) -> str:
    if not to.numel():
        return ALLOWED
    straight = is_straight(to, source, to_device=to_device, asynchronous=asynchronous)
    return ALLOWED if is_pinned and asynchronous and straight else COPY


INDICES: dict[str, tuple[Callable[[], Any], str, str]] = {
    # How it is made; for what x[index] is refused; and for what x[index] = 1.0.
    "slice": (lambda: slice(0, 2), ALLOWED, ALLOWED),
    "position": (lambda: 1, ALLOWED, COPY),
    "tensor": (lambda: torch.arange(2, device="cuda"), ALLOWED, COPY),
    "mask": (lambda: torch.arange(4, device="cuda") > 1, READ, ALLOWED),
    "one number": (lambda: torch.arange(2, device="cuda")[1], READ, READ),
    "bound": (lambda: slice(0, torch.arange(3, device="cuda")[2]), READ, READ),
    "host's tensor": (lambda: torch.arange(2), COPY, COPY),
    "host's mask": (lambda: torch.arange(4) > 1, ALLOWED, COPY),
    "list": (lambda: [2, 0], COPY, COPY),
    "masks in a list": (lambda: [True, False, True, False], COPY, COPY),
    "range": (lambda: range(1, 3), COPY, COPY),
    "array": (lambda: np.array([1, 3]), COPY, COPY),
}


def index(rng: random.Random) -> Step:
    kind, puts = rng.choice(list(INDICES)), rng.random() < 0.4
    make, getting, putting = INDICES[kind]
    x, one = torch.ones(4, device="cuda"), make()
    if not puts:
        return Step(lambda: x[one] * 2, getting, f"x[{kind}]")
    return Step(lambda: x.__setitem__(one, 1.5) or x, putting, f"x[{kind}] = number")


def isin(rng: random.Random) -> Step:
    number, unique = rng.choice((1, 2, 8, 50)), rng.random() < 0.3
    least = int(10 * number**0.145)
    tests = rng.choice((1, least - 1, least, least + 1, 300))
    values, others = (torch.arange(n, device="cuda") for n in (number, tests))
    refused = READ if tests >= least and not unique else ALLOWED
    name = f"isin of {number} in {tests}, {unique=}"
    return Step(lambda: torch.isin(values, others, assume_unique=unique), refused, name)


def mode(rng: random.Random) -> Step:
    shape = rng.choice(((2048,), (2049,), (3, 2048), (2049, 2), (2, 2049)))
    dim = rng.randrange(len(shape))
    x = torch.arange(shape[0] * (shape[-1] if len(shape) > 1 else 1), device="cuda")
    x = (x % 7).view(shape)
    return Step(lambda: x.mode(dim), READ if shape[dim] > 2048 else ALLOWED, f"mode {shape} {dim}")


def histogram(rng: random.Random) -> Step:
    least, most = rng.choice(((0, 0), (-1, 1), (0, 4), (2, 2)))
    x = torch.arange(rng.choice((0, 1, 9)), dtype=torch.float32, device="cuda")
    refused = READ if least == most and x.numel() else ALLOWED
    return Step(lambda: x.histc(4, least, most), refused, f"histc {least} {most} {x.numel()}")


def checked(rng: random.Random) -> Step:
    names = ("inv_ex", "cholesky_ex", "lu_factor_ex", "ldl_factor_ex", "solve_ex")
    name, checks = rng.choice(names), rng.random() < 0.5
    matrix = torch.eye(rng.choice((1, 2, 3)), device="cuda") * 2
    args = (matrix, matrix) if name == "solve_ex" else (matrix,)
    call = partial(getattr(torch.linalg, name), *args, check_errors=checks)
    return Step(call, READ if checks else ALLOWED, f"{name} {checks=}")


def search(rng: random.Random) -> Step:
    sequence = torch.arange(rng.choice((1, 5)), device="cuda")
    sorter = sequence.argsort() if rng.random() < 0.5 else None
    call = partial(torch.searchsorted, sequence, sequence + 1, sorter=sorter)
    return Step(call, ALLOWED if sorter is None else READ, f"searchsorted {sorter=}")


def segments(rng: random.Random) -> Step:
    lengths, unsafe = torch.full((2,), 3, device="cuda"), rng.random() < 0.5
    x = torch.ones(6, device="cuda")
    call = partial(torch.segment_reduce, x, "sum", lengths=lengths, unsafe=unsafe)
    return Step(call, ALLOWED if unsafe else READ, f"segment_reduce {unsafe=}")


def exponential(rng: random.Random) -> Step:
    size = rng.choice((1, 2, 3))
    x = torch.eye(size, device="cuda").expand(rng.choice((1, 3)), size, size)
    return Step(
        lambda: torch.linalg.matrix_exp(x), READ if size > 1 else ALLOWED, f"matrix_exp {size}"
    )


def entropy(rng: random.Random) -> Step:
    weight = torch.full((3,), 0.5, device="cuda") if rng.random() < 0.6 else None
    smoothing, reduction = rng.choice((0.0, 0.25)), rng.choice(("mean", "mean", "sum", "none"))
    x, has_classes = torch.ones(4, 3, device="cuda"), rng.random() < 0.7
    target = torch.arange(4, device="cuda") % 3 if has_classes else x / 3
    selects = weight is not None and smoothing and reduction == "mean" and has_classes
    options = {"reduction": reduction, "label_smoothing": smoothing}
    call = partial(F.cross_entropy, x, target, weight, **options)
    name = f"cross_entropy {options} {has_classes=} weight={weight is not None}"
    return Step(call, READ if selects else ALLOWED, name)


def gradient(rng: random.Random) -> Step:
    shape, kind = rng.choice(((4,), (2, 3), (1, 3), (1,), ())), rng.choice(("prod", "cumprod"))
    dim = rng.randrange(-len(shape), len(shape)) if shape else 0
    along = kind == "cumprod" or rng.random() < 0.5
    x = torch.full(shape, 1.5, device="cuda", requires_grad=True)

    def call() -> Tensor:
        product = getattr(x, kind)(dim) if along else x.prod()
        (found,) = torch.autograd.grad(product.sum(), x)
        return found

    is_alone = not shape or (kind == "cumprod" and shape[dim] == 1)
    return Step(call, ALLOWED if is_alone else READ, f"gradient of {kind} {shape} {dim} {along=}")


def repeats(rng: random.Random) -> Step:
    counts, size = torch.full((3,), 2, device="cuda"), rng.choice((None, 6))
    x = torch.arange(3, device="cuda")
    call = partial(x.repeat_interleave, counts, output_size=size)
    return Step(call, READ if size is None else ALLOWED, f"repeat_interleave {size=}")


def quantized(rng: random.Random) -> Step:
    x, dtype = torch.ones(2, 3, device="cuda"), rng.choice((torch.int32, torch.float32))
    scale, zero = torch.ones(2, device="cuda"), torch.zeros(2, dtype=dtype, device="cuda")
    call = partial(torch.fake_quantize_per_channel_affine, x, scale, zero, 0, 0, 255)
    return Step(call, READ if dtype == torch.int32 else ALLOWED, f"quantization {dtype}")


def plain(rng: random.Random) -> Step:
    """An operator that reads nothing, of which some read in other versions, or on a CPU."""
    x, i = torch.arange(4.0, device="cuda"), torch.arange(4, device="cuda") % 2
    calls: dict[str, Callable[[], Any]] = {
        "max_norm": lambda: F.embedding(i, x.view(2, 2).clone(), max_norm=0.5),
        "nanmedian": x.nanmedian,
        "quantile": lambda: x.quantile(i[:2] / 2),
        "combinations": lambda: torch.combinations(x),
        "nonzero_static": lambda: torch.nonzero_static(x, size=4),
        "accumulate": lambda: x.index_put((i,), x, accumulate=True),
        "one_hot": lambda: F.one_hot(i, 2),
        "masked_fill": lambda: x.masked_fill(i > 0, 2.0),
        "scalar_tensor": lambda: torch.scalar_tensor(2.0, device="cuda") * x,
        "host's number": lambda: x * torch.tensor(2.0),
    }
    name = rng.choice(list(calls))
    return Step(calls[name], ALLOWED, name)


READS = (isin, mode, histogram, checked, search, segments, exponential, entropy, gradient)
KINDS = (copy, copy, copy, copy, index, index, *READS, repeats, quantized, plain, plain)


def within(rng: random.Random, steps: list[Step]) -> Callable[[], list[Any]]:
    """Return a program of steps, perhaps on another stream that the capture's waits for."""
    is_forked = rng.random() < 0.2
    side = torch.cuda.Stream()

    def program() -> list[Any]:
        current = torch.cuda.current_stream()
        block: AbstractContextManager[Any] = nullcontext()
        if is_forked:
            side.wait_stream(current)
            block = torch.cuda.stream(side)
        with block:
            found = [one.call() for one in steps]
        if is_forked:
            current.wait_stream(side)
        return found

    return program


def tensors(found: object) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    return [*itertools.chain.from_iterable(map(tensors, found))]  # type: ignore[call-overload]


def trial(rng: random.Random) -> str:
    with emulate() as gpu, cuda_is_cpu(gpu), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        steps = [rng.choice(KINDS)(rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
        names, program = "; ".join(one.name for one in steps), within(rng, steps)
        program()
        expected = next((one.refused for one in steps if one.refused), ALLOWED)
        graph, error = torch.cuda.CUDAGraph(), ""
        try:
            with torch.cuda.graph(graph):
                out = program()
        except RuntimeError as refused:
            error = str(refused).partition("\n")[0]
        found = [fault.name for fault in gpu.faults if fault.kind == "error"]
        if found != [expected][: bool(expected)] or bool(error) != bool(expected):
            raise Found(f"{found} {error}, expected {expected or 'a graph'}: {names}")
        if not expected:
            graph.replay()
            torch.cuda.synchronize()
            replayed = [t.clone() for t in tensors(out)]
            same = zip(replayed, tensors(program()), strict=True)
            if any(not torch.equal(one.cpu(), other.cpu()) for one, other in same):
                raise Found(f"a replay differs: {names}")
        if errors := [str(one) for one in gpu.faults if one.kind == "error"][bool(expected) :]:
            raise Found(f"{errors[0]}: {names}")
    return expected or "equal"


def without_table() -> None:
    reading_operators._reader_of = lambda func: None  # type: ignore[assignment]


def without_bound() -> None:
    READERS["isin"] = Reader("isin")


def without_memory_on_the_way() -> None:
    host_copies._takes_memory_on_the_way = lambda *args: False


FAULTS: dict[str, Callable[[], None]] = {
    "table": without_table,
    "bound": without_bound,
    "nodes": reading_operators.BACKWARD.clear,
    "straight": without_memory_on_the_way,
    "pinned": partial(setattr, places, "is_pinned", lambda t: True),
    "pageable": partial(setattr, places, "is_pinned", lambda t: False),
    "lists": partial(setattr, host_copies, "SEQUENCES", (tuple,)),
}

if __name__ == "__main__":
    sys.exit(run(trial, FAULTS))
