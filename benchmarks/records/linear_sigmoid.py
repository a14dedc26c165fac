# SPDX-License-Identifier: MIT
"""Record of `torchpar.linear_sigmoid`. Its sizes are rows, in_features and out_features."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, ones
from torch.nn.functional import linear

import torchpar

from .record import (
    FLOATING,
    FLOATS,
    Bounded,
    Operator,
    Refused,
    Rival,
    Sizes,
    SmallCall,
    Workload,
)
from .tuned_product import tuned_product

if TYPE_CHECKING:
    from torchpar.kernels.rule import Product

IN, OUT = 1024, 4096  # features of the layer that `autotune` times


def _linear_sigmoid(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return linear(x, weight, bias).sigmoid()


def _numpy_linear_sigmoid(x: Any, weight: Any, bias: Any = 0) -> Any:
    with np.errstate(over="ignore"):  # 1/∞ is the limit
        return 1 / (1 + np.exp(-(x @ weight.T + bias)))


def layer_text(sizes: Sizes) -> str:
    m, k, n = sizes
    return f"{m}x{k}->{n}"


def _work(m: int, k: int, n: int) -> Sequence[tuple[int, int]]:
    """The derivative takes the result y."""
    forward = m * k + n * k + n + m * n, 2 * m * n * k
    return forward, (2 * m * n + 2 * m * k + 2 * n * k + n, 4 * m * n * k)


def _scaled(x: Tensor, weight: Tensor, *others: Tensor) -> Sequence[Tensor]:
    """So scaled, the sigmoid does not saturate."""
    return [x, weight / math.sqrt(weight.shape[1]), *others]


def _backward(g: Tensor, y: Tensor) -> Tensor:
    """dL/dZ; dL/db, its sum over rows, is computed and dropped."""
    dz: Tensor = torch.ops.aten.sigmoid_backward(g, y)
    dz.sum(0)
    return dz


def _our_backward(g: Tensor, y: Tensor) -> Tensor:
    return torch.ops.torchpar.linear_sigmoid_backward(g, y)[0]  # type: ignore[no-any-return]


def _layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return linear(x, weight, bias).sigmoid_()


def _product() -> "Product":
    from torchpar.kernels.linear_sigmoid import LINEAR_SIGMOID

    return LINEAR_SIGMOID


def _launch(*operands: Any, **options: Any) -> Tensor:
    from torchpar.kernels.linear_sigmoid import linear_sigmoid

    result = linear_sigmoid(*operands, **options)
    assert result is not None
    return result


LINEAR_SIGMOID = Operator(
    name="linear_sigmoid",
    kernels={"linear_sigmoid_kernel"},
    other_kernels={
        "linear_sigmoid_backward": {"sigmoid_backward_kernel", "add_partial_sums_kernel"}
    },
    native=_linear_sigmoid,
    formula=_numpy_linear_sigmoid,
    roundings=4,  # z + b, e⁻ᶻ, 1 + and 1/
    dtypes=FLOATS,
    shapes=("mnk", "ok", "o"),
    cases=[
        ((0, 3), (4, 3), (4,)),
        ((3, 0), (4, 0), (4,)),
        ((3, 4), (0, 4), (0,)),
        ((129,), (1, 129), (1,)),
        ((129, 128), (127, 128), (127,)),
        ((2, 3, 5, 16), (10, 16), (10,)),
        ((70000, 3), (2, 3), (2,)),
    ],
    small=[((3, 4), (5, 4), (5,)), ((4,), (3, 4)), ((2, 3, 4), (5, 4), (5,))],
    local=5,
    refused=[
        Refused((ones(()), ones(4, 3)), "x has shape (), expected (*, in_features)"),
        Refused((ones(3).int(), ones(4, 3).int()), f"x has dtype torch.int32, {FLOATING}"),
        Refused(
            (ones(2, 3), ones(1, 4, 3)), "weight has shape (1, 4, 3), expected (out_features, 3)"
        ),
        Refused((ones(2, 3), ones(4, 3), ones(2, 4)), "bias has shape (2, 4), expected (4,)"),
        Refused((ones(2, 3), ones(4, 3).int()), f"weight has dtype torch.int32, {FLOATING}"),
        Refused(
            (ones(2, 3), ones(4, 3).half()),
            "weight has dtype torch.float16 and x torch.float32, expected one dtype; cast one, as "
            "by x.to(weight.dtype)",
        ),
    ],
    workloads=[
        Workload(
            name="linear_sigmoid",
            native=_linear_sigmoid,
            ours=torchpar.linear_sigmoid,
            drawn=lambda m, k, n: [(m, k), (n, k), (n,), (m, n)],
            work=_work,
            quick=[(8, 33, 5)],
            cpu=[(64, 128, 10), (64, 784, 128), (256, 768, 1024)],
            gpu=[
                *((m, 784, n) for m in (64, 512) for n in (128, 512)),  # an MLP's first layer
                *[(128, 784, 1000), (256, 784, 1001), (256, 784, 2056), (512, 784, 4096)],
                *[(64, 8192, 1024), (512, 3072, 12288), (8192, 4096, 4096)],
            ],
            compiled=[(64, 784, 128), (256, 768, 1024), (512, 784, 512), (8192, 4096, 4096)],
            operands=_scaled,
            text=layer_text,
            dtypes=[torch.float32, torch.bfloat16],
            rivals={"addmm": Rival(linear, finish=torch.sigmoid)},  # the product and bias alone
            bounded=Bounded(
                plain="eager",
                sizes=[(64, 784, 128), (128, 784, 512), (1024, 1024, 1024), (4096, 2048, 2048)],
                quick=[(64, 784, 128)],
            ),
        ),
        Workload(
            name="linear_sigmoid_backward",
            native=_backward,
            ours=_our_backward,
            drawn=lambda m, n: [(m, n)] * 3,
            work=lambda m, n: [(3 * m * n + n, 5 * m * n)],
            quick=[(8, 5)],
            gpu=[(64, 4096), (512, 12288), (8192, 4096)],
            operands=lambda g, y, gradient: [g, y.sigmoid(), gradient],
        ),
    ],
    call=SmallCall(_linear_sigmoid, lambda n: [(n, n), (n, n), (n,)]),
    host=SmallCall(_linear_sigmoid, lambda n: [(n, n), (n, n), (n,)]),
    tuned=tuned_product(
        product=_product,
        launch=_launch,
        sizes_of=lambda x, weight, bias: (len(x), len(weight), x.shape[1]),
        axis="m",
        values=[64, 256, 1024, 4096, 16384],
        sizes=lambda m, k=IN, n=OUT: (m, k, n),
        native={"addmm, sigmoid": _layer, "addmm alone": linear},
        compiled_native=_layer,
        compiled=4096,
        unfinished=("addmm alone",),
        # Where the rule of docs/tuning.md changes: at the kernel's longest sums and beyond them,
        # and the lesson's hidden layer on two ranks and on one.
        borders=[
            {"m": 8192, "k": 2048, "n": 4096},
            {"m": 8192, "k": 4096, "n": 4096},
            {"m": 512, "k": 121, "n": 512},
            {"m": 1024, "k": 121, "n": 512},
        ],
        text=layer_text,
    ),
)
