# SPDX-License-Identifier: MIT
"""Operators of Liger-Kernel, forward and backward, beside plain PyTorch in float64.

Liger-Kernel is not among the requirements: `missing` says how to install it. Its operators ask
`torch.cuda` about the machine. For CPU tensors, and without stand-ins for `torch.cuda`, most start
one program where they would start one for each multiprocessor. `Case.asks` says what others need.
"""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Result = tuple[Tensor, Tensor, float]  # found, expected in float64, greatest absolute error
U = 2.0**-24
COMMAND = "pip install --no-deps liger-kernel"


def missing() -> str | None:
    """Why the cases cannot run, or None."""
    if importlib.util.find_spec("liger_kernel") is None:
        return f"Liger-Kernel is not installed: {COMMAND}"
    return None


@dataclass(frozen=True)
class Case:
    """An operator with operands.

    Args:
        function: the name of its autograd function in `liger_kernel.ops`.
        reference: the same in plain PyTorch, of any dtype.
        operands: those that it is differentiated by.
        fixed: tensors that follow them, of integers or without gradients.
        options: the further arguments of the function, which the reference has in its formula.
        asks: what the operator must learn from `torch.cuda` to run at all.
    """

    function: str
    reference: Callable[..., Tensor | Sequence[Tensor]]
    operands: tuple[Tensor, ...]
    fixed: tuple[Tensor, ...] = ()
    options: tuple[Any, ...] = ()
    asks: str = ""

    def values(self, function: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
        """The results, and the gradients by the operands for seeded incoming gradients."""
        operands = [one.to(dtype, copy=True).requires_grad_() for one in self.operands]
        fixed = [one.to(dtype if one.is_floating_point() else one.dtype) for one in self.fixed]
        # An operator may change its operands in place, as none may change a leaf.
        outputs = function(*(one * 1 for one in operands), *fixed)
        outputs = [outputs] if isinstance(outputs, Tensor) else [*outputs]
        outputs = [one for one in outputs if isinstance(one, Tensor)]
        results = [one.detach().clone() for one in outputs]
        incoming = [normal(*one.shape, seed=50 + n).to(dtype) for n, one in enumerate(outputs)]
        return [*results, *torch.autograd.grad(outputs, operands, incoming)]

    def run(self) -> list[Result]:
        """What Liger-Kernel finds in float32. It may be wrong twice as much as plain PyTorch in
        float32, and by the errors of approximate functions, of which none exceeds 16 U."""
        operator = getattr(importlib.import_module("liger_kernel.ops"), self.function)
        found = self.values(lambda *args: operator.apply(*args, *self.options), torch.float32)
        exact = self.values(self.reference, torch.float64)
        plain = self.values(self.reference, torch.float32)
        results = []
        for one, right, single in zip(found, exact, plain, strict=True):
            error, size = (right - single).abs().max().item(), right.abs().max().item()
            results.append((one, right, 2 * error + 16 * U * size))
        return results


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(limit: int, *shape: int, seed: int = 9) -> Tensor:
    return torch.randint(limit, shape, generator=torch.Generator().manual_seed(seed))


EPSILON = 1e-5
ROWS, COLUMNS = 6, 77
X, Y = normal(ROWS, COLUMNS, seed=1), normal(ROWS, COLUMNS, seed=2)
W, B = 1 + normal(COLUMNS, seed=3) / 4, normal(COLUMNS, seed=4)
LABELS = integers(COLUMNS, ROWS)
SOME_LABELS = LABELS.index_fill(0, torch.tensor([2]), -100)
LOGS, OTHER_LOGS = X.log_softmax(1), Y.log_softmax(1)


def rms_norm(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], w, EPSILON)


def divergence(x: Tensor, y: Tensor) -> Tensor:
    """The Jensen-Shannon divergence of rows of logarithms."""
    middle = ((x.exp() + y.exp()) / 2).log()
    both = y.exp() * (y - middle) + x.exp() * (x - middle)
    return both.sum() / 2 / len(x)


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    return (p - q).abs().sum() / 2 / len(p)


def sparsemax(x: Tensor) -> Tensor:
    """The nearest point of the simplex (Martins and Astudillo 2016)."""
    ordered = x.sort(1, descending=True).values
    sums = ordered.cumsum(1) - 1
    k = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)
    size = (k * ordered > sums).sum(1, keepdim=True)
    return (x - sums.gather(1, size - 1) / size).clamp(0)


def power_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    powers = (F.rms_norm(x**p, x.shape[-1:], None, EPSILON) for p in (3, 2, 1))
    return sum(weight * power for weight, power in zip(w, powers, strict=True)) + b


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-right, left], -1) * sin[:, None]


def attention_over_depth(v: Tensor, query: Tensor, w: Tensor) -> Tensor:
    scores = rms_norm(v, w) @ query
    return (scores.softmax(0)[..., None] * v).sum(0)


def entropy_and_variation(x: Tensor, y: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    variation = (x.softmax(1) - y.softmax(1)).abs().sum(1) / 2
    entropy = F.cross_entropy(x, labels, reduction="none")
    return entropy, variation.where(labels != -100, 0.0)


def modulated(x: Tensor, w: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return rms_norm(x, w) * (1 + scale) + shift


def smoothed_entropy(x: Tensor, labels: Tensor) -> Tensor:
    capped = 10 * (x / 10).tanh()
    return F.cross_entropy(capped, labels, label_smoothing=0.1, reduction="sum")


ANGLES = torch.arange(5.0)[None, :, None] / 3 ** torch.arange(8.0)
COS, SIN = (function(torch.cat([ANGLES, ANGLES], -1)) for function in (torch.cos, torch.sin))

CASES: dict[str, Case] = {
    "rms_norm": Case(
        "LigerRMSNormFunction", rms_norm, (X, W), options=(EPSILON, 0.0, "llama", False)
    ),
    "rms_norm, in place": Case(
        "LigerRMSNormFunction", rms_norm, (X, W), options=(EPSILON, 0.0, "gemma", True)
    ),
    "layer_norm": Case(
        "LigerLayerNormFunction",
        lambda x, w, b: F.layer_norm(x, (COLUMNS,), w, b, EPSILON),
        (X, W, B),
        options=(EPSILON,),
    ),
    "fused_add_rms_norm": Case(
        "LigerFusedAddRMSNormFunction",
        lambda x, r, w: (rms_norm(x + r, w), x + r),
        (X, Y, W),
        options=(EPSILON, 0.0, "llama", False),
    ),
    "modulated_rms_norm": Case(
        "LigerModulatedRMSNormFunction",
        modulated,
        (X, W, normal(COLUMNS, seed=5), normal(COLUMNS, seed=6)),
        options=(EPSILON, 0.0, "llama", False),
    ),
    "group_norm": Case(
        "LigerGroupNormFunction",
        lambda x, w, b: F.group_norm(x, 3, w, b, EPSILON),
        (normal(2, 6, 40, seed=1), 1 + normal(6, seed=2) / 4, normal(6, seed=3)),
        options=(6, 3, EPSILON),
    ),
    "poly_norm": Case(
        "LigerPolyNormFunction",
        power_norm,
        (X, normal(3, seed=5), normal(seed=6)),
        options=(EPSILON, False),
    ),
    "dyt": Case(
        "LigerDyTFunction",
        lambda x, alpha, gamma, beta: gamma * (alpha * x).tanh() + beta,
        (X, torch.tensor([0.7]), W, B),
        asks="is_available, get_device_properties(device).multi_processor_count",
    ),
    "swiglu": Case("LigerSiLUMulFunction", lambda a, b: F.silu(a) * b, (X, Y)),
    "geglu": Case("LigerGELUMulFunction", lambda a, b: F.gelu(a, approximate="tanh") * b, (X, Y)),
    "relu_squared": Case("LigerReLUSquaredFunction", lambda x: x.relu().square(), (X,)),
    "softmax": Case("LigerSoftmaxFunction", lambda x: x.softmax(1), (X,)),
    "sparsemax": Case("LigerSparsemaxFunction", sparsemax, (X,), options=(1,)),
    "rope": Case(
        "LigerRopeFunction",
        lambda q, k, cos, sin: (rotate(q, cos, sin), rotate(k, cos, sin)),
        (normal(2, 4, 5, 16, seed=1), normal(2, 2, 5, 16, seed=2)),
        (COS, SIN),
    ),
    "cross_entropy": Case(
        "LigerCrossEntropyFunction", F.cross_entropy, (X,), (SOME_LABELS,), (None,)
    ),
    "cross_entropy, smoothed and capped": Case(
        "LigerCrossEntropyFunction",
        smoothed_entropy,
        (X,),
        (SOME_LABELS,),
        (None, -100, 0.0, 0.1, "sum", 10.0),
    ),
    "fused_linear_cross_entropy": Case(
        "LigerFusedLinearCrossEntropyFunction",
        lambda x, w, labels: F.cross_entropy(x @ w.T, labels),
        (normal(ROWS, 24, seed=1), normal(COLUMNS, 24, seed=2) / 4),
        (SOME_LABELS,),
    ),
    "kl_div": Case(
        "LigerKLDivLossFunction",
        lambda x, y: F.kl_div(x, y, reduction="batchmean"),
        (LOGS,),
        (OTHER_LOGS.exp(),),
    ),
    "jsd": Case("LigerJSDFunction", divergence, (LOGS,), (OTHER_LOGS,)),
    "tvd": Case("LigerTVDLossFunction", total_variation, (LOGS.exp(),), (OTHER_LOGS.exp(),)),
    "fused_linear_jsd": Case(
        "LigerFusedLinearJSDFunction",
        lambda x, w, y, v: divergence((x @ w.T).log_softmax(1), (y @ v.T).log_softmax(1)),
        (normal(ROWS, 24, seed=1), normal(COLUMNS, 24, seed=2) / 4),
        (normal(ROWS, 32, seed=3), normal(COLUMNS, 32, seed=4) / 4),
    ),
    "fused_ce_tvd": Case("LigerFusedCETVDFunction", entropy_and_variation, (X,), (Y, SOME_LABELS)),
    "attn_res": Case(
        "LigerAttnResFunction",
        attention_over_depth,
        (normal(3, ROWS, 24, seed=1), normal(24, seed=2), 1 + normal(24, seed=3) / 4),
        options=(EPSILON,),
    ),
    "embedding": Case(
        "LigerEmbeddingFunction",
        lambda table, places: table[places],
        (normal(20, 24, seed=1),),
        (integers(20, 3, 11),),
    ),
}
