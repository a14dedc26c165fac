# SPDX-License-Identifier: MIT
"""Compile the kernels of the matrix operators on all cores:
``python -m benchmarks.compile_kernels CAPABILITY SECONDS``.

The first launch of a kernel compiles it, on one core, while the GPU waits. Here the configurations
of each operator and dtype are compiled at once for a GPU of this capability, such as 90, and Triton
keeps them on disk. Operands are on the meta device: no GPU is needed. Launches whose tensors have
the same alignment find what was compiled here.
"""

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.driver import compile_launches, target
from torchpar.kernels.linear_sigmoid import LINEAR_SIGMOID, linear_sigmoid
from torchpar.kernels.matmul_t import SYMMETRIC_MATMUL, symmetric_matmul
from torchpar.kernels.rule import KINDS, Product, Tiles, configurations
from torchpar.parallel.launch.processes import end_with_parent

SIZE = 4096


class Job(NamedTuple):
    """One configuration of a product in one kind of operands, for a capability."""

    product: Product
    kind: str
    tiles: Tiles
    capability: int


def jobs(capability: int) -> list[Job]:
    return [
        Job(product, kind, tiles, capability)
        for product in (SYMMETRIC_MATMUL, LINEAR_SIGMOID)
        for kind in KINDS
        for tiles in configurations(product, kind, capability)
    ]


def compile_job(job: Job) -> int:
    """Compile the kernels of a launch; the number of them."""
    dtype, precision = KINDS[job.kind].dtype, KINDS[job.kind].precision

    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, weight, bias = meta(SIZE, SIZE), meta(SIZE, SIZE), meta(SIZE)
    launch: Callable[[Any], object]
    if job.product.is_symmetric:

        def launch(wrap: Any) -> object:
            return symmetric_matmul(x, x, precision, wrap, tiles=job.tiles)
    else:

        def launch(wrap: Any) -> object:
            return linear_sigmoid(x, weight, bias, precision, wrap, tiles=job.tiles)

    with target(job.capability):
        return len(compile_launches(launch))


def main(capability: int, seconds: float) -> int:
    """Begin no kernel after so many seconds; print the failures, and the number of kernels."""
    found, failed = 0, 0
    deadline = time.monotonic() + seconds
    workers = max(1, len(os.sched_getaffinity(0)) - 1)
    with ProcessPoolExecutor(workers, get_context("spawn"), end_with_parent) as pool:
        futures = {pool.submit(compile_job, job): job for job in jobs(capability)}
        for future in as_completed(futures):
            job = futures[future]
            if future.cancelled():
                continue
            try:
                found += future.result()
            except Exception as e:
                failed += 1
                print(f"{job.product.name}, {job.kind}, {job.tiles}: {type(e).__name__}: {e}")
            if time.monotonic() > deadline:
                for other in futures:
                    other.cancel()
    left = sum(future.cancelled() for future in futures)
    print(f"{found} kernels compiled by {workers} processes, {left} left, {failed} failed")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2])))
