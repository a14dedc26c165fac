# SPDX-License-Identifier: MIT
"""Launches that Nsight Compute has counted on an H200, to be executed by the emulator.

`benchmarks/results/nvidia-h200/ptx-counters.csv` has what was counted. On a GPU's machine

    ncu --csv --profile-from-start off --metrics METRICS python tests/measured.py real
    python tests/measured.py emulated

count them anew; `benchmarks/validate_gpu.sh OUTDIR counters` does both. The second command prints a
line of JSON for each launch, with the estimates of its time. No GPU has counted `OTHERS` yet: the
kernels of CUDA C++, and those of numba.cuda, which are left out where numba-cuda is not installed.
"""

import json
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

import torchpar
from nogpu import Launch, cuda_is_cpu, emulate
from nogpu.cuda import load
from nogpu.numba.numba_stand_in import has_numba_cuda
from torchpar.kernels import linear_sigmoid, matmul_t
from torchpar.kernels.rule import Tiles

# numba-cuda takes the place of numba.cuda by a .pth, which is read in site-packages alone.
if find_spec("_numba_cuda_redirector"):
    import_module("_numba_cuda_redirector")


@triton.jit
def transpose_rows(x, out, n, BLOCK: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    tl.store(out + column * n + row, tl.load(x + row * n + column))


@triton.jit
def transpose_tiles(x, out, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(out + column * n + row, tl.load(x + row * n + column))


@triton.jit
def strided(x, out, n, S: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i * S))


@triton.jit
def softmax_k(x, out, n, BLOCK: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    mask = column < n
    values = tl.load(x + row * n + column, mask=mask, other=-float("inf"))
    values = values - tl.max(values, 0)
    exponentials = tl.exp(values)
    tl.store(out + row * n + column, exponentials / tl.sum(exponentials, 0), mask=mask)


@triton.jit
def naive_mm(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        of_a = tl.load(a + i[:, None] * K + (start + k)[None, :])
        of_b = tl.load(b + (start + k)[:, None] * N + j[None, :])
        acc += tl.dot(of_a, of_b, input_precision="ieee")
    tl.store(c + i[:, None] * N + j[None, :], acc)


device = "cpu"  # within `emulate`


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return numbers.to(device, dtype)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, device=device)


def transposed(kernel, grid: tuple[int, ...], **blocks: int) -> Callable[[], object]:
    return lambda: kernel[grid](normal(512, 512), zeros(512, 512), 512, **blocks)


def by_33() -> None:
    strided[(4,)](normal(4096 * 33), zeros(4096), 4096, S=33, BLOCK=1024)


def softmax() -> None:
    softmax_k[(300,)](normal(300, 1000), zeros(300, 1000), 1000, BLOCK=1024)


def product() -> None:
    a, c = normal(128, 128), zeros(128, 128)
    naive_mm[(2, 2)](a, a, c, 128, 128, 128, BM=64, BN=64, BK=32)


def symmetric(n: int, dtype: torch.dtype, *tiles: int | str) -> Callable[[], object]:
    def call() -> object:
        x = normal(n, n, dtype=dtype)
        return matmul_t.symmetric_matmul(x, x, "ieee", None, tiles=Tiles(*tiles))

    return call


def layer(*tiles: int | str) -> Callable[[], object]:
    def call() -> object:
        x, bias = normal(512, 512, dtype=torch.bfloat16), normal(512, dtype=torch.bfloat16)
        return linear_sigmoid.linear_sigmoid(x, x, bias, "ieee", None, tiles=Tiles(*tiles))

    return call


def sigmoid_backward() -> None:
    g = normal(512, 1024, dtype=torch.bfloat16)
    torch.ops.torchpar.linear_sigmoid_backward(g, g.sigmoid())


BF16, F32 = torch.bfloat16, torch.float32
CALLS: dict[str, Callable[[], object]] = {
    "transpose_rows": transposed(transpose_rows, (512,), BLOCK=512),
    "transpose_tiles": transposed(transpose_tiles, (16, 16), ROWS=32, COLUMNS=32),
    "strided33": by_33,
    "softmax 1000": softmax,
    "naive_mm float32": product,
    "maximum flat": lambda: torchpar.maximum(normal(1024, 1000), normal(1024, 1000)),
    "matmul_t 64x64x64 w4 s3 pointers": symmetric(512, BF16, 64, 64, 64, 4, 3),
    "matmul_t 64x128x64 w4 s4 tma": symmetric(512, BF16, 64, 128, 64, 4, 4, "tma"),
    "matmul_t 128x256x64 w8 s4 tma": symmetric(512, BF16, 128, 256, 64, 8, 4, "tma"),
    "matmul_t 128x256x64 w8 s3 flat": symmetric(512, BF16, 128, 256, 64, 8, 3, "flat"),
    "matmul_t float32 64x64x16 w4 s3 pointers": symmetric(256, F32, 64, 64, 16, 4, 3),
    "linear_sigmoid 128x256x64 w8 s4 tma": layer(128, 256, 64, 8, 4, "tma"),
    "sigmoid_backward": sigmoid_backward,
    "exact": lambda: torchpar.exact_matmul(normal(256, 256), normal(256, 256)),
}

CORPUS = Path(__file__).parents[1] / "nogpu" / "tests" / "cuda_programs"
load_once = cache(load)  # a module of a GPU, which is compiled and loaded once


def of_cpp(file: str, kernel: str, *size: object) -> Callable[[], object]:
    """The product of two matrices of 96 × 96 by a kernel of CUDA C++."""

    def call() -> None:
        launch: Any = load_once(CORPUS / f"{file}.cu")[kernel][size]
        launch(normal(96, 96), normal(96, 96), zeros(96, 96), 96)

    return call


def of_numba(name: str, *size: object) -> Callable[[], object]:
    """A kernel of the course, by numba.cuda."""

    def call() -> None:
        from numba import cuda

        course = course_of_numba()
        shape = (64, 128)
        if name == "max_kernel":
            operands = [np.arange(64 * 128, dtype=np.float32).reshape(shape)] * 2
            out = cuda.device_array(shape, np.float32)
        else:
            operands = [np.ones((48, 32), np.float32)]
            out = cuda.device_array((48, 48), np.float32)
        getattr(course, name)[size](*map(cuda.to_device, operands), out)

    return call


@cache
def course_of_numba() -> Any:
    sys.path.append(str(Path(__file__).parents[1] / "examples"))
    return import_module("course_kernels_numba")


OTHERS: dict[str, Callable[[], object]] = {
    "cuda_cpp product_naive": of_cpp("product_naive", "product", (6, 6), (16, 16)),
    "cuda_cpp product_tiled": of_cpp("product_tiled", "product<float, 16>", (6, 6), (16, 16)),
}
if has_numba_cuda():
    OTHERS |= {
        "numba maximum": of_numba("max_kernel", 64, 128),
        "numba matmul_t": of_numba("matmul_kernel", 1, 1024),
    }
EVERY = CALLS | OTHERS


def launches(case: str) -> list[Launch]:
    with ExitStack() as stack:
        gpu = stack.enter_context(emulate("sm_90"))
        if case.startswith("numba"):
            stack.enter_context(cuda_is_cpu(gpu))
        EVERY[case]()
    return gpu.launches


def counted(launch: Launch) -> dict[str, int | str]:
    """Return what the emulator counts, by the columns of the table.

    For Nsight a copy by `cp.async` is a load of global memory. It does not count what a copy writes
    to shared memory.
    """

    def sums(space: str, *whats: str) -> tuple[int, int, int]:
        of = [one for one in launch.counters.in_space(space) if one.what in whats]
        requests, transactions = (
            sum(one.requests for one in of),
            sum(one.transactions for one in of),
        )
        return requests, transactions, sum(one.conflicts for one in of)

    loads, load_sectors, _ = sums("global", "load", "copy")
    stores, store_sectors, _ = sums("global", "store")
    _, load_wavefronts, load_conflicts = sums("shared", "load", "ldmatrix")
    _, store_wavefronts, store_conflicts = sums("shared", "store", "stmatrix")
    assert launch.resources is not None
    return {
        "grid": "x".join(map(str, launch.grid)),
        "registers": launch.resources.registers,
        "global_load_requests": loads,
        "global_load_sectors": load_sectors,
        "global_store_requests": stores,
        "global_store_sectors": store_sectors,
        "shared_load_wavefronts": load_wavefronts,
        "shared_store_wavefronts": store_wavefronts,
        "shared_load_conflicts": load_conflicts,
        "shared_store_conflicts": store_conflicts,
    }


def run_on_gpu(cases: Iterable[str]) -> None:
    """Compile all, then launch all once, which the profiler watches."""
    global device
    device = "cuda"
    for case in cases:
        EVERY[case]()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for case in cases:
        with torch.cuda.nvtx.range(case):
            EVERY[case]()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    mode, *chosen = sys.argv[1:]
    if not has_numba_cuda():
        print("numba-cuda is not installed, so that its kernels are not counted", file=sys.stderr)
    if mode == "real":
        run_on_gpu(chosen or EVERY)
    else:
        for case in chosen or EVERY:
            for launch in launches(case):
                row = {"case": case, "kernel": launch.kernel} | counted(launch)
                times = {gpu: round(one.microseconds, 2) for gpu, one in launch.time.items()}
                print(json.dumps(row | {"estimates_us": times}), flush=True)
