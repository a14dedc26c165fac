# SPDX-License-Identifier: MIT
"""Record of `torchpar.matmul_t`."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, ones

import torchpar
from torchpar.ops.cpu import mirror_

from .record import FLOATING, FLOATS, Bounded, Operator, Refused, Rival, Sizes, SmallCall, Workload
from .tuned_product import tuned_product

if TYPE_CHECKING:
    from torchpar.kernels.rule import Product

MIRRORED = "eager, mirrored"
ROWS = (64, 128, 256, 384, 512, 768, 1000, 1024, 2048)


def gram(x: Tensor) -> Tensor:
    """``x @ x.mT``; `torch.mm`, if x is a matrix."""
    return x @ x.mT


def gram_shapes(*sizes: int) -> Sequence[tuple[int, ...]]:
    *batch, n, _ = sizes
    return [sizes, (*batch, n, n)]


def gram_work(*sizes: int) -> Sequence[tuple[int, int]]:
    """Of the symmetric product one triangle: n(n + 1)k operations, so that a contestant which
    computes all of it reaches half of a processor's GFLOP/s at most."""
    *batch, n, k = sizes
    b = math.prod(batch)
    forward = b * (n * k + n * n), b * n * (n + 1) * k
    return forward, (b * (n * n + 2 * n * k), b * 2 * n * n * k)


def _by_numpy(x: Tensor) -> Tensor:
    array = x.detach().numpy()
    return torch.from_numpy(np.dot(array, array.T))


def _mirrored(x: Tensor) -> Tensor:
    return mirror_(x @ x.mT)


def _on_cpu(device: str, sizes: Sizes, dtype: torch.dtype) -> bool:
    return device == "cpu" and len(sizes) == 2


def _numpy_suits(device: str, sizes: Sizes, dtype: torch.dtype) -> bool:
    return _on_cpu(device, sizes, dtype) and dtype.itemsize >= 4


def _product() -> "Product":
    from torchpar.kernels.matmul_t import SYMMETRIC_MATMUL

    return SYMMETRIC_MATMUL


def _launch(x: Tensor, precision: str, wrap: Any, **options: Any) -> Tensor:
    from torchpar.kernels.matmul_t import matmul_t

    result = matmul_t(x, precision, wrap, **options)
    assert result is not None
    return result


def _mm(x: Tensor) -> Tensor:
    return torch.mm(x, x.T)


def _mm_mirrored(x: Tensor) -> Tensor:
    from torchpar.kernels.matmul_t import mirror

    return mirror(_mm(x), None)


MATMUL_T = Operator(
    name="matmul_t",
    kernels={"symmetric_matmul_kernel"},
    other_kernels={"matmul_t_backward": {"symmetric_sum_kernel"}},
    native=gram,
    formula=lambda x: x @ np.swapaxes(x, -1, -2),
    symmetric=True,
    dtypes=FLOATS,
    shapes=("mnk",),
    cases=[
        ((0, 3),),
        ((2, 400, 0),),
        ((1030, 17),),
        ((2, 3, 65, 4),),
        ((2, 600, 9),),
        ((70000, 2, 3),),  # more than a second or third grid axis of CUDA holds
    ],
    small=[((4, 3),), ((2, 3, 5),)],
    local=2,
    refused=[
        Refused((ones(3, 3).long(),), f"x has dtype torch.int64, {FLOATING}"),
        Refused((ones(3),), "x has shape (3,), expected (*, n, k)"),
    ],
    workloads=[
        Workload(
            name="matmul_t",
            native=gram,
            ours=torchpar.matmul_t,
            drawn=gram_shapes,
            work=gram_work,
            quick=[(65, 65)],
            cpu=[
                *((n, n) for n in (64, 128, 192, 256, 384, 512, 768, 1000, 1024, 1500, 2048, 4096)),
                *[(256, 4096), (300, 5000), (1024, 4096), (2048, 256), (2048, 64)],
                *[(64, 64, 256), (8, 512, 512)],
            ],
            gpu=[
                *((n, n) for n in (64, 128, 256, 512, 1000, 1024, 2048, 4096, 8192, 16384)),
                *[(64, 16384), (1024, 4096), (4096, 1024), (16384, 64)],
                *[(64, 128, 128), (256, 256, 256), (32, 1024, 1024)],
            ],
            compiled=[(256, 256), (1024, 1024), (4096, 4096)],
            rivals={
                "numpy": Rival(_by_numpy, _numpy_suits, is_library=True),
                MIRRORED: Rival(_mirrored, _on_cpu),
            },
            bounded=Bounded(
                plain=MIRRORED,
                sizes=[*((n, n) for n in ROWS), (300, 5000), (1024, 4096)],
                quick=[(384, 64)],
                dtypes=(torch.float32, torch.bfloat16, torch.float64),
                modes=("forward",),
                bounded_from=384,  # below, its call takes longer than it saves
            ),
        )
    ],
    call=SmallCall(_mirrored, lambda n: [(n, n)], rows=(64, 128)),
    host=SmallCall(gram, lambda n: [(n, n)], rows=(1024,)),
    tuned=tuned_product(
        product=_product,
        launch=_launch,
        sizes_of=lambda x: (len(x), len(x), x.shape[1]),
        axis="n",
        values=[256, 512, 1024, 2048, 4096, 8192],
        sizes=lambda n, k=None: (n, k or n),
        native={"torch.mm": _mm, "torch.mm, mirrored": _mm_mirrored},
        compiled_native=_mm,
        compiled=4096,
        symmetric=("torch.mm, mirrored", "torchpar", "autotuned"),
        # Where the rule changes, and the weights of networks that Muon trains.
        borders=[
            {"n": 768},
            {"n": 1536},
            {"n": 768, "k": 3072},
            {"n": 1024, "k": 4096},
            {"n": 2048, "k": 8192},
        ],
    ),
)
