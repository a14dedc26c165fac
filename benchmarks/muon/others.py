# SPDX-License-Identifier: MIT
"""Muons of other packages that are installed, made to do what `torch.optim.Muon` does by default.

All have its learning rate, momentum, weight decay, coefficients and rates for each shape, so that
their weights must end where its weights end.
"""

import importlib
import math
from collections import defaultdict
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from torchpar.optim.newton_schulz import COEFFICIENTS

Params = list[torch.nn.Parameter]
Maker = Callable[[Params], torch.optim.Optimizer]
LR, MOMENTUM, WEIGHT_DECAY, STEPS = 1e-3, 0.95, 0.1, 5  # the defaults of torch.optim.Muon
SAME: dict[str, Any] = {"lr": LR, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}
SAME["nesterov"] = True


def rate(shape: tuple[int, ...]) -> float:
    """The factor of the learning rate by which the update of a matrix is multiplied."""
    return math.sqrt(max(1.0, shape[-2] / shape[-1]))


def gram_newton_schulz(params: Params) -> torch.optim.Optimizer:
    package = importlib.import_module("gram_newton_schulz")
    return package.Muon(  # type: ignore[no-any-return]
        params,
        **SAME,
        adjust_lr=lambda lr, shape: lr * rate(shape),
        ns_coefficients=[list(COEFFICIENTS)] * STEPS,
        ns_use_kernels=params[0].is_cuda,
    )


def emerging_optimizers(params: Params) -> torch.optim.Optimizer:
    package = importlib.import_module("emerging_optimizers.orthogonalized_optimizers")
    return package.Muon(  # type: ignore[no-any-return]
        params,
        **SAME,
        coefficient_type="simple",  # COEFFICIENTS
        num_ns_steps=STEPS,
        scale_mode="shape_scaling",  # `rate`
        use_syrk=params[0].is_cuda,  # its kernels
    )


def dion(params: Params) -> torch.optim.Optimizer:
    package = importlib.import_module("dion")
    # Its own rates for shapes differ for wide matrices. A group has a learning rate of its own, and
    # a weight decay with which the product of both is that of the others.
    groups = defaultdict(list)
    for param in params:
        groups[rate(param.shape)].append(param)
    return package.Muon(  # type: ignore[no-any-return]
        [
            {"params": group, "lr": LR * factor, "weight_decay": WEIGHT_DECAY / factor}
            for factor, group in groups.items()
        ],
        mu=MOMENTUM,
        nesterov=True,
        adjust_lr=None,
        newton_schulz_func=dion_newton_schulz(),
    )


def dion_newton_schulz() -> Callable[[Tensor, Tensor], Tensor]:
    """dion's iteration with the others' coefficients: it takes no coefficients, but a function.

    As its own, the function is compiled, and calls dion's kernels on a GPU.
    """
    kernels = importlib.import_module("dion.newton_schulz_triton")
    a, b, c = COEFFICIENTS

    @torch.compile
    def newton_schulz(update: Tensor, epsilon: Tensor) -> Tensor:
        x = update.bfloat16()
        tall = x.size(-2) > x.size(-1)
        x = x.mT if tall else x
        x = (x / (x.norm(dim=(-2, -1), keepdim=True) + epsilon)).contiguous()
        multiply_add = torch.baddbmm if x.ndim > 2 else torch.addmm
        for _ in range(STEPS):
            if x.is_cuda:
                square = x.new_empty((*x.shape[:-1], x.size(-2)))
                polynomial = torch.empty_like(square)
                kernels.ns_line_1(x, out=square)
                kernels.ns_line_2(square, alpha=c, beta=b, out=polynomial)
            else:
                square = x @ x.mT
                polynomial = b * square + c * (square @ square)
            x = multiply_add(x, polynomial, x, beta=a)
        return x.mT if tall else x

    return newton_schulz


# By module.
MAKERS: dict[str, tuple[str, Maker]] = {
    "gram_newton_schulz": ("gram-newton-schulz", gram_newton_schulz),
    "dion": ("dion", dion),
    "emerging_optimizers": ("emerging-optimizers", emerging_optimizers),
}
INSTALLED = {name: make for module, (name, make) in MAKERS.items() if find_spec(module)}
# Their first step of each shape is compiled, for seconds to minutes.
COMPILING = ("gram-newton-schulz", "dion")
