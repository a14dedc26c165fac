# SPDX-License-Identifier: MIT
"""Random Triton kernels, executed by `nogpu` for a random GPU.

A kernel computes a random expression elementwise, reduces or scans rows, multiplies matrices, or
fills a histogram by atomics. The core in C and the executor in Python must give the same bits,
faults and counters, PyTorch's operators the same values, and a right kernel no faults. Sums are of
whole numbers, so that their order does not matter, and other operations round once, as IEEE 754
says. Some kernels lack a mask, read memory that was not written, or store different values into one
element, and the report must name that.
"""

import importlib.util
import itertools
import random
import re
import shutil
import tempfile
from atexit import register
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton
from driver import Found, run
from torch import Tensor

from nogpu import Report, emulate
from nogpu.instructions import arithmetic
from nogpu.native import core as native
from nogpu.triton import emulator

FOLDER = Path(tempfile.mkdtemp(prefix="torchpar-fuzz-"))
register(shutil.rmtree, FOLDER, ignore_errors=True)
FLOATS = {torch.float32: "tl.float32", torch.float16: "tl.float16", torch.bfloat16: "tl.bfloat16"}
INTEGERS = {
    torch.int64: "tl.int64",
    torch.int32: "tl.int32",
    torch.int16: "tl.int16",
    torch.int8: "tl.int8",
}
NAMES = FLOATS | INTEGERS
SPECIAL = (0.0, -0.0, 1.0, float("inf"), -float("inf"), float("nan"), 6e-8, -1e-37)
MEGABYTE = 1 << 20
RACES = ("race", "race between programs", "different values")
Pair = tuple[str, Callable[[Tensor, Tensor], Tensor]]  # in Triton's language, and by PyTorch
numbers = itertools.count()
HEAD = """import triton
import triton.language as tl

NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def kernel("""


@dataclass
class Kernel:
    """A kernel, how it is launched, and what it must compute.

    Attributes:
        source: after "def kernel(". It has lines for ``mask_in``, of the first operand's load, and
            for ``mask_out``, of the store.
        out: the argument that is written.
        expected: computes it.
        is_ragged: whether the masks are false somewhere beyond the operands.
        names: of the faults of which the report must have one; empty for a right kernel.
    """

    source: str
    grid: tuple[int, ...]
    args: list[Any]
    out: int
    expected: Callable[[], Tensor]
    is_ragged: bool
    options: dict[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] = ()


def expression(rng: random.Random, dtype: torch.dtype, depth: int) -> Pair:
    """A random expression of x and y, which have this dtype, as it has."""
    if depth == 0 or rng.random() < 0.1:
        return rng.choice([("x", lambda x, y: x), ("y", lambda x, y: y)])
    a, b = expression(rng, dtype, depth - 1), expression(rng, dtype, depth - 1)
    name, text, function = rng.choice(choices(rng, dtype))

    def value(x: Tensor, y: Tensor) -> Tensor:
        return function(a[1](x, y), b[1](x, y)).to(dtype)

    return f"({text.format(a[0], b[0])}).to({name})", value


def choices(rng: random.Random, dtype: torch.dtype) -> list[tuple[str, str, Any]]:
    shift = rng.randint(0, 7)
    both = {
        "{0} + {1}": lambda a, b: a + b,
        "{0} - {1}": lambda a, b: a - b,
        "{0} * {1}": lambda a, b: a * b,
        "-{0}": lambda a, b: -a,
        "tl.abs({0})": lambda a, b: a.abs(),
        "tl.where({0} < {1}, {0}, {1})": lambda a, b: torch.where(a < b, a, b),
        "tl.where(({0} >= {1}) & ({0} != 0), {1}, {0})": lambda a, b: torch.where(
            (a >= b) & (a != 0), b, a
        ),
    }
    of_floats = {
        "tl.maximum({0}, {1}, propagate_nan=NAN)": torch.maximum,
        "tl.minimum({0}, {1}, propagate_nan=NAN)": torch.minimum,
    }
    of_float32 = {
        "tl.div_rn({0}, tl.abs({1}) + 1.0)": lambda a, b: a / (b.abs() + 1),
        # MKL's root, which PyTorch takes, is not always the nearest number.
        "tl.sqrt_rn(tl.abs({0}))": lambda a, b: torch.from_numpy(np.sqrt(a.abs().numpy())),
        "tl.floor({0})": lambda a, b: a.floor(),
        "tl.ceil({0})": lambda a, b: a.ceil(),
        "({0}).to(tl.float16)": lambda a, b: a.half(),
        "({0}).to(tl.bfloat16)": lambda a, b: a.bfloat16(),
        "tl.where(tl.abs({0}) < 99.0, {0}, 99.0).to(tl.int32)": lambda a, b: torch.where(
            a.abs() < 99, a, 99.0
        ).int(),
    }
    of_integers = {
        "tl.maximum({0}, {1})": torch.maximum,
        "tl.minimum({0}, {1})": torch.minimum,
        "{0} & {1}": lambda a, b: a & b,
        "{0} | {1}": lambda a, b: a | b,
        "{0} ^ {1}": lambda a, b: a ^ b,
        "~{0}": lambda a, b: ~a,
        f"{{0}} << {shift}": lambda a, b: a << shift,
        f"{{0}} >> {shift}": lambda a, b: a >> shift,
        "{0} // (({1} & 7) + 1)": lambda a, b: torch.div(a, (b & 7) + 1, rounding_mode="trunc"),
        "{0} % (({1} & 7) + 1)": lambda a, b: torch.fmod(a, (b & 7) + 1),
        "({0}).to(tl.int8)": lambda a, b: a.to(torch.int8),
        "({0}).to(tl.uint8)": lambda a, b: a.to(torch.uint8),
    }
    found = both | (of_integers if dtype in INTEGERS else of_floats)
    if dtype == torch.float32:
        found |= of_float32
    return [(NAMES[dtype], text, function) for text, function in found.items()]


def operand(rng: random.Random, dtype: torch.dtype, *shape: int) -> Tensor:
    if dtype in INTEGERS:
        most = rng.choice([8, 128])
        return torch.randint(-most, most, shape).to(dtype)
    t = torch.randn(shape) * rng.choice([1, 1, 100])
    if rng.random() < 0.3:
        special = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), shape)]
        t = torch.where(torch.rand(shape) < 0.1, special, t)
    return t.to(dtype)


def whole(rng: random.Random, dtype: torch.dtype, *shape: int) -> Tensor:
    """Small whole numbers, whose sums are exact."""
    most = 4 if dtype in (torch.bfloat16, torch.int8) else 8
    return torch.randint(-most if rng.random() < 0.7 else 0, most, shape).to(dtype)


def laid_out(rng: random.Random, t: Tensor) -> Tensor:
    """``t`` with other strides, or at the end of a storage."""
    match rng.randrange(4):
        case 0:  # every second element of the last dimension
            wide = torch.zeros(*t.shape[:-1], 2 * t.shape[-1], dtype=t.dtype)
            return wide[..., 1::2].copy_(t)
        case 1:
            return t.mT.contiguous().mT if t.dim() > 1 else t
        case 2:
            return torch.zeros(t.numel() + 3, dtype=t.dtype)[3:].view(t.shape).copy_(t)
    return t


def elementwise(rng: random.Random) -> Kernel:
    dtype = rng.choice(list(NAMES))
    n, block, repeats = rng.randint(1, 3000), 2 ** rng.randint(5, 10), rng.choice([1, 1, 2, 3])
    x, y = (laid_out(rng, operand(rng, dtype, n)) for _ in range(2))
    text, value = expression(rng, dtype, rng.randint(1, 4))
    loop = rng.choice(["range(REPEATS)", "tl.static_range(REPEATS)", "tl.range(0, REPEATS)"])
    source = f"""x_ptr, y_ptr, out_ptr, n, x_step, y_step, REPEATS: tl.constexpr,
           BLOCK: tl.constexpr):
    for r in {loop}:
        i = (tl.program_id(0) * REPEATS + r) * BLOCK + tl.arange(0, BLOCK)
        mask_in = i < n
        mask_out = i < n
        x = tl.load(x_ptr + i * x_step, mask_in, other=0)
        y = tl.load(y_ptr + i * y_step, i < n, other=0)
        tl.store(out_ptr + i, {text}, mask_out)
"""
    grid = -(-n // (block * repeats))
    args = [x, y, torch.zeros(n, dtype=dtype), n, x.stride(0), y.stride(0), repeats, block]
    ragged = n % (block * repeats) > 0
    return Kernel(source, (grid,), args, 2, lambda: value(x, y), ragged)


def first(x: Tensor, least: Tensor) -> Tensor:
    """The first column of each row that is ``least``."""
    return (x == least).int().argmax(1, keepdim=True)


def bitwise_xor(x: Tensor) -> Tensor:
    return torch.from_numpy(np.bitwise_xor.reduce(x.numpy(), axis=1))[:, None]


def rows(rng: random.Random) -> Kernel:
    dtype = rng.choice(list(NAMES))
    m, k = rng.randint(1, 70), rng.randint(1, 200)
    block_m, block_k = 2 ** rng.randint(0, 4), triton.next_power_of_2(k)
    x = whole(rng, dtype, m, k) if dtype not in (torch.float16, torch.bfloat16) else None
    x = torch.randint(-1, 2, (m, k)).to(dtype) if x is None else x  # sums of 200 are exact
    x = laid_out(rng, x)
    ways: list[tuple[str, int, Callable[[Tensor], Tensor]]] = [
        ("tl.sum(x, 1)[:, None] + x", 0, lambda x: x + x.sum(1, keepdim=True).to(dtype)),
        ("x - tl.max(x, 1)[:, None]", -9, lambda x: x - x.amax(1, keepdim=True)),
        ("x - tl.min(x, 1)[:, None]", 9, lambda x: x - x.amin(1, keepdim=True)),
        (
            "tl.argmax(x, 1)[:, None] + 0 * x",
            -9,
            lambda x: first(x, x.amax(1, keepdim=True)) + 0 * x,
        ),
        (
            "tl.argmin(x, 1)[:, None] + 0 * x",
            9,
            lambda x: first(x, x.amin(1, keepdim=True)) + 0 * x,
        ),
        ("tl.cumsum(x, 1)", 0, lambda x: x.cumsum(1)),
        ("tl.cumsum(x, 1, reverse=True)", 0, lambda x: x.flip(1).cumsum(1).flip(1)),
    ]
    if dtype in INTEGERS:
        ways.append(("tl.xor_sum(x, 1)[:, None] | x", 0, lambda x: bitwise_xor(x) | x))
    way, other, value = rng.choice(ways)
    is_turned = rng.random() < 0.3
    place = "j[None, :] * m + i[:, None]" if is_turned else "i[:, None] * k + j[None, :]"
    source = f"""x_ptr, out_ptr, m, k, row, column, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_K)
    mask_in = (i < m)[:, None] & (j < k)[None, :]
    mask_out = (i < m)[:, None] & (j < k)[None, :]
    x = tl.load(x_ptr + (i[:, None] * row + j[None, :] * column), mask_in, other={other})
    tl.store(out_ptr + ({place}), ({way}).to({NAMES[dtype]}), mask_out)
"""
    out = torch.zeros((k, m) if is_turned else (m, k), dtype=dtype)
    args = [x, out, m, k, *x.stride(), block_m, block_k]

    def expected() -> Tensor:
        result = value(x).to(dtype)
        return result.mT if is_turned else result

    ragged = m % block_m > 0 or block_k > k
    return Kernel(source, (-(-m // block_m),), args, 1, expected, ragged)


def product(rng: random.Random) -> Kernel:
    dtype = rng.choice([torch.float16, torch.bfloat16, torch.float32, torch.int8])
    m, n, k = (rng.randint(1, 100) for _ in range(3))
    block_m, block_n, block_k = (2 ** rng.randint(*ends) for ends in ((4, 6), (4, 6), (5, 6)))
    a, b = laid_out(rng, whole(rng, dtype, m, k)), laid_out(rng, whole(rng, dtype, k, n))
    total = torch.int32 if dtype == torch.int8 else torch.float32
    precision = rng.choice(["ieee", "tf32"])
    source = f"""a_ptr, b_ptr, out_ptr, m, n, k, a_row, a_column, b_row, b_column,
           BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
           STAGES: tl.constexpr):
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_out = (i < m)[:, None] & (j < n)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), {"tl.int32" if dtype == torch.int8 else "tl.float32"})
    for start in tl.range(0, k, BLOCK_K, num_stages=STAGES):
        l = start + tl.arange(0, BLOCK_K)
        mask_in = (i < m)[:, None] & (l < k)[None, :]
        a = tl.load(a_ptr + (i[:, None] * a_row + l[None, :] * a_column), mask_in, other=0)
        mask_b = (l < k)[:, None] & (j < n)[None, :]
        b = tl.load(b_ptr + (l[:, None] * b_row + j[None, :] * b_column), mask_b, other=0)
        total = tl.dot(a, b, total, input_precision="{precision}")
    tl.store(out_ptr + (i[:, None] * n + j[None, :]), total, mask_out)
"""
    blocks = block_m, block_n, block_k, rng.randint(1, 4)
    args = [a, b, torch.zeros(m, n, dtype=total), m, n, k, *a.stride(), *b.stride(), *blocks]
    grid = -(-m // block_m), -(-n // block_n)
    ragged = m % block_m > 0 and n % block_n > 0 and k % block_k > 0
    return Kernel(source, grid, args, 2, lambda: (a.double() @ b.double()).to(total), ragged)


def histogram(rng: random.Random) -> Kernel:
    n, bins, block = rng.randint(1, 3000), rng.randint(1, 40), 2 ** rng.randint(5, 9)
    dtype = rng.choice([torch.int32, torch.int64, torch.float32])
    x, keys = whole(rng, dtype, n), torch.randint(bins, (n,))
    zeros = torch.zeros(bins, dtype=dtype)
    name, value = rng.choice(
        [
            ("add", lambda: zeros.index_add(0, keys, x)),
            ("max", lambda: zeros.scatter_reduce(0, keys, x, "amax")),
            ("min", lambda: zeros.scatter_reduce(0, keys, x, "amin")),
        ]
    )
    source = f"""x_ptr, key_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask_in = i < n
    mask_out = i < n
    x = tl.load(x_ptr + i, mask_in, other=0)
    key = tl.load(key_ptr + i, i < n, other=0)
    tl.atomic_{name}(out_ptr + key, x, mask_out)
"""
    args = [x, keys, torch.zeros(bins, dtype=dtype), n, block]
    return Kernel(source, (-(-n // block),), args, 2, value, n % block > 0)


def scattered(rng: random.Random) -> Kernel:
    """Stores of different values, of which some have one place."""
    n, block = rng.randint(128, 3000), 2 ** rng.randint(5, 9)
    x = torch.arange(n, dtype=rng.choice([torch.int32, torch.int64, torch.float32]))
    # Fewer places than threads of a warp, so that one instruction has several values for a place;
    # the first thread's place may be any of them.
    bins = rng.randint(1, 31)
    source = """x_ptr, out_ptr, n, bins, start, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + (start + i) % bins, tl.load(x_ptr + i, i < n, other=0), i < n)
"""
    args = [x, torch.zeros(bins, dtype=x.dtype), n, bins, rng.randrange(bins), block]
    return Kernel(source, (-(-n // block),), args, 1, lambda: x, False, names=RACES)


def at_the_end(t: Tensor, kept: list[Any]) -> Tensor:
    """A copy of ``t`` at the end of a large storage, beyond which no tensor lies: the memory of
    ``kept``, which belongs to none, lies there."""
    kept.append(np.zeros(4 * MEGABYTE, np.uint8))
    size = sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True)) + 1
    storage = torch.zeros(MEGABYTE, dtype=t.dtype)
    kept.append(storage)
    return storage.as_strided(t.shape, t.stride(), MEGABYTE - size).copy_(t)


def plant(rng: random.Random, kernel: Kernel, kept: list[Any]) -> None:
    """Give a right kernel a fault, if it can have the one that is chosen."""
    place = rng.choice(["mask_in", "mask_out", "unwritten"])
    stores_by_key = place == "mask_out" and "key_ptr" in kernel.source
    if place != "unwritten" and (stores_by_key or not kernel.is_ragged):
        return
    if place != "mask_out":
        # An expression may not depend on x, such as x - x.
        kernel.source = re.sub(
            r"store\(out_ptr \+ i, .*, mask_out", "store(out_ptr + i, x, mask_out", kernel.source
        )
    if place == "unwritten":
        kernel.names = ("uninitialised memory",)
    else:
        number = 0 if place == "mask_in" else kernel.out
        kernel.args[number] = at_the_end(kernel.args[number], kept)
        kernel.source = re.sub(rf"{place} = .*", f"{place} = True", kernel.source)
        kernel.names = ("out of bounds",)


def made(kernel: Kernel) -> Any:
    """Import the kernel, as Triton reads its source from a file."""
    name = f"fuzz_kernel_{next(numbers)}"
    path = FOLDER / f"{name}.py"
    path.write_text(HEAD + kernel.source, "utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.kernel


def executed(function: Any, kernel: Kernel, arch: str) -> tuple[Tensor, Report]:
    """Launch the kernel with fresh memory for its result."""
    out = kernel.args[kernel.out]
    out.zero_()
    with emulate(arch, schedules="all") as gpu:
        gpu.limit = 200_000
        args = list(kernel.args)
        if "uninitialised memory" in kernel.names:  # memory from before counts as written
            args[0] = torch.empty_strided(args[0].shape, args[0].stride(), dtype=args[0].dtype)
        function[kernel.grid](*args, **kernel.options)
    return out.clone(), gpu.report()


def said(report: Report) -> list[Any]:
    launches = [(one.instructions, one.counts.table.tolist()) for one in report.launches]
    faults = [(one.kind, one.name, one.line, one.source, one.program) for one in report.faults]
    return [*launches, *faults]


def bits(t: Tensor) -> bytes:
    t = torch.where(t.isnan(), float("nan"), t) if t.is_floating_point() else t  # of any bits
    return t.contiguous().view(torch.uint8).numpy().tobytes()


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether the tensors are equal, and a NaN is only beside a NaN. Zeros may differ in sign."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a[~a.isnan()], b[~b.isnan()])


def trial(rng: random.Random) -> str:
    kept: list[Any] = []
    kind = rng.choice([elementwise, elementwise, rows, product, histogram, scattered])
    kernel = kind(rng)
    warps = [4, 8] if kind is product else [1, 2, 4, 8]
    kernel.options = {"num_warps": rng.choice(warps), "enable_fp_fusion": False}
    if not kernel.names and rng.random() < 0.3:
        plant(rng, kernel, kept)
    arch = rng.choice(list(emulator.ARCHITECTURES))
    function = made(kernel)
    out, report = executed(function, kernel, arch)
    names = {one.name for one in report.faults}
    about = f"{kind.__name__} for {arch}"
    if kernel.names:
        if not names & set(kernel.names):
            raise Found(f"{about}: the faults {names or 'none'}, expected {kernel.names}")
    elif names:
        raise Found(f"{about}: a right kernel has the faults {names}: {report.faults[0]}")
    else:
        if not same_values(out, kernel.expected()):
            raise Found(f"{about}: other values than PyTorch's")
    with patch.object(native, "library", lambda: None):
        again, other = executed(function, kernel, arch)
    if "out of bounds" not in names and (bits(out), said(report)) != (bits(again), said(other)):
        raise Found(f"{about}: the core and Python differ")
    return about


def wrong_minimum() -> None:
    """Python's minimum, beside the core's, is a maximum."""
    arithmetic.FUNCTIONS["min"] = np.maximum


def silent() -> None:
    """No fault is reported."""
    emulator.Emulator.fault = lambda *args: None  # type: ignore[method-assign]


if __name__ == "__main__":
    run(trial, {"minimum": wrong_minimum, "silent": silent}, limit=300)
