# SPDX-License-Identifier: MIT
"""Record of `torchpar.exact_matmul`."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, ones

import torchpar
from torchpar.ops.exact_digits import product_of_exponents, row_exponents

from .linear_sigmoid import layer_text
from .matmul_t import gram, gram_shapes, gram_work
from .record import Operator, Refused, SmallCall, Workload

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _work(m: int, k: int, n: int) -> Sequence[tuple[int, int]]:
    return (m * k + n * k + m * n, 2 * m * n * k), (m * n + 2 * m * k + 2 * n * k, 4 * m * n * k)


def _native(a: Tensor, b: Tensor) -> Tensor:
    """PyTorch's product in float64, rounded once: to float32 under autocast, as ours is."""
    kind = a.device.type
    dtype = torch.float32 if torch.is_autocast_enabled(kind) else a.dtype
    return (a.double() @ b.double().mT).to(dtype)


def _by_digits(a: Tensor, b: Tensor) -> Tensor:
    """ATen has no exact product: the function that computes it."""
    return product_of_exponents(a, b, row_exponents(a), row_exponents(b))


EXACT_MATMUL = Operator(
    name="exact_matmul",
    kernels={"exact_product_kernel"},
    other_kernels={"fp32_matmul": {"fp32_matmul_kernel"}},
    native=_native,
    formula=lambda a, b: a @ np.swapaxes(b, -1, -2),
    dtypes=DTYPES,
    shapes=("mnk", "mok"),
    cases=[
        ((0, 3), (4, 3)),
        ((3, 0), (4, 0)),
        ((129, 127), (128, 127)),
        ((2, 3, 65, 4), (2, 3, 7, 4)),
        ((70000, 2, 3), (70000, 1, 3)),
    ],
    small=[((4, 3), (5, 3)), ((2, 3, 2), (2, 4, 2))],
    local=3,
    refused=[
        Refused(
            (ones(3, 2).double(), ones(3, 2)),
            "a has dtype torch.float64, expected float32, bfloat16 or float16",
        ),
        Refused(
            (ones(3, 2), ones(3, 2).half()),
            "b has dtype torch.float16 and a torch.float32, expected one dtype; cast one",
        ),
        Refused((ones(3), ones(3)), "a has shape (3,), expected (*, m, k)"),
        Refused((ones(3, 2), ones(2, 3)), "b is (2, 3) on {where}, expected (n, 2) on {where}"),
        Refused(
            (ones(4, 3, 2), ones(3, 2)), "b is (3, 2) on {where}, expected (4, n, 2) on {where}"
        ),
    ],
    workloads=[
        Workload(
            name="exact_matmul",
            native=lambda a, b: a @ b.mT,
            ours=torchpar.exact_matmul,
            drawn=lambda m, k, n: [(m, k), (n, k), (m, n)],
            work=_work,
            quick=[(65, 65, 65)],
            cpu=[(n, n, n) for n in (256, 1024, 2048)],
            gpu=[(n, n, n) for n in (1024, 2048, 4096, 8192)],
            text=layer_text,
            dtypes=DTYPES[::-1],
        ),
        Workload(
            name="exact_matmul_t",
            native=gram,
            ours=torchpar.exact_matmul_t,
            drawn=gram_shapes,
            work=gram_work,
            quick=[(65, 65)],
            cpu=[(n, n) for n in (256, 1024, 2048)],
            gpu=[(n, n) for n in (1024, 2048, 4096, 8192)],
            compiled=[(256, 256), (1024, 1024), (4096, 4096)],
            dtypes=DTYPES[::-1],
        ),
    ],
    call=SmallCall(_by_digits, lambda n: [(n, n), (n, n)], differentiable=False),
)
