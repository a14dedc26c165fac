# SPDX-License-Identifier: MIT
"""Record of `torchpar.maximum`."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, ones

import torchpar

from .record import FLOATS, INTEGERS, Operator, Refused, SmallCall, Tuned, Workload

Shape = tuple[int, ...]


def _text(sizes: tuple[Shape, Shape]) -> str:
    return " ".join("x".join(map(str, one)) for one in sizes)


def _work(a: Shape, b: Shape) -> Sequence[tuple[int, int]]:
    m, n = math.prod(a), math.prod(b)
    return (2 * m + n, m), (3 * m + 2 * n, m)


class Block(NamedTuple):
    """A configuration: numbers of a program, and its warps."""

    numel: int
    num_warps: int

    def __str__(self) -> str:
        return f"{self.numel} w{self.num_warps}"


def _candidates(operands: Sequence[Tensor], precision: str) -> list[Block]:
    from torchpar.kernels.maximum import FLAT_CANDIDATES

    return [Block(*one) for one in FLAT_CANDIDATES]


def _blocks(config: Block, operands: Sequence[Tensor]) -> int:
    return -(-operands[0].numel() // config.numel)


def _launch(config: Block, operands: Sequence[Tensor], precision: str, wrap: Any) -> Tensor:
    """Launch the kernel with a configuration; the launcher takes one of its own."""
    from torchpar.kernels.maximum import maximum_flat_kernel

    a, b = operands
    out = torch.empty_like(a)
    kernel = maximum_flat_kernel if wrap is None else wrap(maximum_flat_kernel)
    constants = {"A_REPEATS": False, "B_REPEATS": False, "BLOCK": config.numel}
    grid = _blocks(config, operands), 1, 1
    kernel[grid](a, b, out, a.numel(), **constants, num_warps=config.num_warps)
    return out


MAXIMUM = Operator(
    name="maximum",
    kernels={"maximum_flat_kernel", "maximum_strided_kernel"},
    other_kernels={
        "maximum_backward": {
            "maximum_backward_flat_kernel",
            "maximum_backward_strided_kernel",
            "maximum_backward_sums_kernel",
            "add_partial_sums_kernel",
        },
    },
    native=torch.maximum,
    formula=np.maximum,
    exact=True,
    dtypes=INTEGERS + FLOATS,
    shapes=("nk", "m1k"),
    cases=[
        ((0, 3), ()),
        ((128, 129), (129,)),
        ((128, 1), (1, 127)),
        ((1, 2, 1, 3, 1, 2), (3, 1, 2, 1, 2, 1)),
    ],
    small=[((3, 4), (3, 4)), ((), (3,)), ((3, 1), (2, 1, 4))],
    local=7,
    refused=[
        Refused((ones(3) + 0j, ones(3)), "a has dtype torch.complex64, expected a real"),
        Refused((ones(3), ones(3).to(torch.uint16)), "b has dtype torch.uint16, expected a real"),
        Refused(
            (ones(2, 3), ones(2, 0)), "b has shape (2, 0), which does not broadcast with a's (2, 3)"
        ),
    ],
    workloads=[
        Workload(
            name="maximum",
            native=torch.maximum,
            ours=torchpar.maximum,
            drawn=lambda a, b: [a, b, a],
            work=_work,
            quick=[((16, 256), (256,))],
            cpu=[((2**21,), (2**21,)), ((1024, 2048), (2048,)), ((1024, 2048), (1024, 1))],
            gpu=[((n,), (n,)) for n in (2**20, 2**26, 2**28)]
            + [((16384, 16384), (16384,)), ((16384, 16384), (16384, 1))],
            compiled=[
                ((2**21,), (2**21,)),
                ((1024, 2048), (2048,)),
                ((1024, 2048), (1024, 1)),
                ((2**28,), (2**28,)),
            ],
            text=_text,
            gpu_dtypes=[torch.int8],
            element_bytes=160,
        )
    ],
    call=SmallCall(torch.maximum, lambda n: [(n, n), (n, n)]),
    host=SmallCall(torch.maximum, lambda n: [(n, n), (n, n)], dtype=torch.float32),
    tuned=Tuned(
        candidates=_candidates,
        launch=_launch,
        axis="numel",
        values=[2**20, 2**22, 2**24, 2**26, 2**28],
        sizes=lambda numel: ((numel,), (numel,)),
        native={"torch.maximum": torch.maximum},
        compiled_native=torch.maximum,
        compiled=2**26,
        blocks=_blocks,
        text=lambda sizes: str(*sizes[0]),
    ),
)
