# SPDX-License-Identifier: MIT
"""Record of `torchpar.symmetric_matmul`."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, ones

import torchpar
from torchpar.ops.cpu import mirror_

from .record import FLOATING, FLOATS, Operator, Refused, SmallCall, Workload

ALPHA, BETA = 0.5, 2.0  # in the benchmarks


def symmetric_operands(a: Tensor, b: Tensor, c: Tensor | None = None) -> tuple[Tensor, ...]:
    """Operands of a symmetric product: A, A·D for a diagonal D of powers of two, and a symmetric
    C."""
    a = a + b
    b = a * (2.0 ** torch.arange(a.shape[-1], device=a.device).remainder(3)).to(a.dtype)
    return (a, b) if c is None else (a, b, c.tril() + c.tril(-1).mT)


def _symmetric_matmul(
    a: Tensor, b: Tensor, c: Tensor | None = None, *, alpha: float = 1.0, beta: float = 0.0
) -> Tensor:
    a3, b3 = (t.reshape(-1 if t.numel() else t.shape[:-2].numel(), *t.shape[-2:]) for t in (a, b))
    if alpha == 0:  # PyTorch's bfloat16 result is then not initialised
        alpha, a3 = 1.0, 0 * a3
    c3 = a.new_zeros(()) if c is None else c.reshape(a3.shape[0], *c.shape[-2:])
    return torch.baddbmm(c3, a3, b3.mT, alpha=alpha, beta=beta).reshape(*a.shape[:-1], a.shape[-2])


def _numpy_symmetric_matmul(
    a: Any, b: Any, c: Any = 0, *, alpha: float = 1.0, beta: float = 0.0
) -> Any:
    product = alpha * (a @ np.swapaxes(b, -1, -2)) + (beta * c if beta else 0)
    return np.tril(product) + np.swapaxes(np.tril(product, -1), -1, -2)


def _eager(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return ALPHA * (a @ b.mT) + BETA * c


def _addmm(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return torch.addmm(c, a, b.mT, alpha=ALPHA, beta=BETA)


def _work(n: int, k: int) -> Sequence[tuple[int, int]]:
    forward = 2 * n * k + 2 * n * n, n * (n + 1) * k
    return forward, (2 * n * n + 4 * n * k, 4 * n * n * k)


def _twice(a: Tensor, c: Tensor, gradient: Tensor) -> Sequence[Tensor]:
    """B is equal to A, which the operator is not told."""
    return [a, a.clone(), (c + c.mT) / 2, gradient]


SYMMETRIC_MATMUL = Operator(
    name="symmetric_matmul",
    kernels={"symmetric_matmul_kernel"},
    other_kernels={"symmetric_addmm_": {"symmetric_matmul_kernel"}},
    native=_symmetric_matmul,
    formula=_numpy_symmetric_matmul,
    symmetric=True,
    operands=symmetric_operands,
    factors=lambda count: {"alpha": -2.5} | ({"beta": 1 / 3} if count == 3 else {}),
    dtypes=FLOATS,
    shapes=("mnk", "mnk", "mnn"),
    cases=[
        ((0, 3), (0, 3), (0, 0)),
        ((3, 0), (3, 0), (3, 3)),
        ((1, 1000), (1, 1000), (1, 1)),
        ((257, 255), (257, 255), (257, 257)),
        ((2, 3, 65, 4), (2, 3, 65, 4), (2, 3, 65, 65)),
        ((2, 1, 257, 3), (2, 1, 257, 3), (2, 1, 257, 257)),
    ],
    small=[((4, 3), (4, 3), (4, 4)), ((2, 3, 5), (2, 3, 5))],
    local=4,
    refused=[
        Refused((ones(3, 2).int(), ones(3, 2).int()), f"a has dtype torch.int32, {FLOATING}"),
        Refused((ones(3), ones(3)), "a has shape (3,), expected (*, n, k)"),
        Refused((ones(3, 2), ones(2, 3)), "b has shape (2, 3), expected (3, 2)"),
        Refused(
            (ones(3, 2), ones(3, 2).half()),
            "b has dtype torch.float16 and a torch.float32, expected one dtype; cast one, as by "
            "a.to(b.dtype)",
        ),
        Refused((ones(3, 2), ones(3, 2), ones(3, 2)), "c has shape (3, 2), expected (3, 3)"),
        Refused((ones(3, 2), ones(3, 2), ones(3, 3)), "c is given without beta, pass both"),
        Refused(
            (ones(3, 2),) * 2, "beta is 1.0 and c is None, pass both or neither", {"beta": 1.0}
        ),
    ],
    workloads=[
        Workload(
            name="symmetric_matmul",
            native=_eager,
            ours=partial(torchpar.symmetric_matmul, alpha=ALPHA, beta=BETA),
            drawn=lambda n, k: [(n, k), (n, n), (n, n)],
            work=_work,
            quick=[(65, 65)],
            cpu=[(256, 256), (1024, 1024)],
            gpu=[(n, n) for n in (256, 512, 1024, 2048, 4096, 8192)],
            compiled=[(256, 256), (1024, 1024), (4096, 4096)],
            operands=_twice,
        )
    ],
    call=SmallCall(
        lambda a, b: mirror_(a @ b.mT),
        lambda n: [(n, n), (n, n)],
        operands=lambda a, b: (a, a.clone()),
    ),
    host=SmallCall(
        _addmm,
        lambda n: [(n, n)] * 3,
        rows=(1024,),
        options={"alpha": ALPHA, "beta": BETA},
    ),
)
