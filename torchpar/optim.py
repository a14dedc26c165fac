# SPDX-License-Identifier: MIT
"""The Muon optimizer on products that are known to be symmetric.

Muon replaces the momentum M of a weight by a matrix near U·Vᵀ, where M = U·Σ·Vᵀ: every direction that M
holds is given about the same length. Newton–Schulz finds it by products alone. X = M/‖M‖, with n rows and
m ≥ n columns, and then a few times the standard iteration

    R = X·Xᵀ        Z = b·R + c·R²        X ← a·X + Z·X

R and Z are symmetric, so half of each is enough: 3n²m + n³ multiplications in the place of 4n²m + 2n³. With
(a, b, c) = (3.4445, −4.7750, 2.0315) the singular values end between 0.7 and 1.2, for a steep start.

Gram Newton–Schulz leaves X alone for k iterations, which multiply it by polynomials in R: their product is Q,
and R follows without X.

    R = X·Xᵀ    k times: Z = b·R + c·R²,  Q ← Q·(a·I + Z),  R ← (a·I + Z)·R·(a·I + Z)    X ← Q·X

All of this is symmetric and n×n, but for X·Xᵀ and Q·X. The price is accuracy: a rounding error of R is
multiplied by a² ≈ 12 in each iteration that follows, and a singular value near 0 is lost in it. A new X·Xᵀ
has none of it; k is 2 at first, as published, and then 3.

The singular values lie at most 1.5 times as far from 1 as by the standard iteration. Beside the same in
float64 the result is 1.1 to 1.7 times as far off as the standard iteration's where the singular values lie
within a decade, 2 to 6 times where they range over two or three, 4 to 11 times where each row stands there
two or four times, and up to 30 times where there is but one.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim._muon import _adjust_lr
from torch.optim.optimizer import _to_scalar

from torchpar.ops import matmul_t, symmetric_matmul
from torchpar.parallel.reduction import wire_device

NewtonSchulz = Literal["auto", "standard", "gram"]
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan, 2024, https://kellerjordan.github.io/posts/muon

_SYMMETRIC_ROWS = 768  # below, a whole product takes less time on CPUs than half of one
_GRAM_ROWS, _GRAM_ASPECT = 256, 2  # below, the standard iteration is as fast
_BATCH_WORK = 2**31  # multiplications in X·Xᵀ: they take a GPU about as long as a launch


@torch.no_grad()
def orthogonalize(
    x: Tensor,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    steps: int = 5,
    eps: float = 1e-7,
    ns: NewtonSchulz = "auto",
) -> Tensor:
    """The matrix of ``x``'s singular vectors with singular values near 1, by Newton–Schulz in bfloat16.

    ``f(f(…f(x / max(‖x‖, eps))))`` with ``f(x) = a·x + b·(x·xᵀ)·x + c·(x·xᵀ)²·x``. It has no gradient.

    Args:
        x: ``(*, n, m)``, floating; a batch is a batch of matrices.
        coefficients: ``(a, b, c)``.
        steps: how often f is applied, 0 to 99.
        eps: the least norm to divide by, so that 0 stays 0.
        ns: "standard" multiplies x in each step, and is as accurate as `torch.optim.Muon`. "gram" iterates on
            the Gram matrix, which is less accurate, and faster where one side is at least twice the other.
            "auto" takes it there, if both are at least 256.

    Returns:
        ``(*, n, m)``, bfloat16.

    Raises:
        ValueError: an argument outside these bounds.

    Source: Jordan, Muon, 2024; Zhang, Amsel, Chen and Dao, Gram Newton–Schulz, 2026,
    https://dao-ailab.github.io/blog/2026/gram-newton-schulz/.
    """
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(f"orthogonalize: x is {tuple(x.shape)} {x.dtype}, expected floating (*, n, m)")
    if len(coefficients) != 3:
        raise ValueError(f"orthogonalize: {len(coefficients)} coefficients, expected 3: (a, b, c)")
    if not 0 <= steps < 100:
        raise ValueError(f"orthogonalize: steps is {steps}, expected 0 to 99")
    check_ns(ns)
    if x.dim() > 3:
        return orthogonalize(x.flatten(0, -3), coefficients, steps, eps, ns).view(x.shape)
    if x.shape[-2] > x.shape[-1]:
        return orthogonalize(x.mT, coefficients, steps, eps, ns).mT
    x = x.to(torch.bfloat16, copy=True)
    x.div_(x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps))
    for i, length in enumerate(_segments(x.shape[-2], x.shape[-1], steps, ns)):
        x = _advance(x, coefficients, length, apart=i == 0 or length == 1)
    return x


def check_ns(ns: str) -> None:
    """Raise a ValueError unless ``ns`` names an iteration."""
    if ns not in get_args(NewtonSchulz):
        raise ValueError(f"ns is {ns!r}, expected 'auto', 'standard' or 'gram'")


def _segments(n: int, m: int, steps: int, ns: NewtonSchulz) -> list[int]:
    """How many iterations are done on one Gram matrix, before x is multiplied and the next is computed."""
    if ns == "standard" or (ns == "auto" and (n < _GRAM_ROWS or m < _GRAM_ASPECT * n)):
        return [1] * steps
    first, others = min(steps, 2), max(steps - 2, 0)
    return [first] * (first > 0) + [3] * (others // 3) + [others % 3] * (others % 3 > 0)


def _advance(x: Tensor, coefficients: tuple[float, float, float], steps: int, apart: bool) -> Tensor:
    """``Q·x`` for the product Q of so many iterations' polynomials, held as ``Q = shift·I + p``.

    While singular values are small, Q is near aᵏ·I, which costs p no bits if it is kept ``apart``. Later
    Q is of order 1, aᵏ·I and p would cancel, and the shift is 0. One iteration apart is the standard one.
    """
    a, b, c = coefficients
    r = matmul_t(x) if _halves(x) else x @ x.mT
    p, shift = r, 0.0
    for step in range(steps):
        z = _symmetric(r, r, r, alpha=c, beta=b)
        if step > 0:
            p = _symmetric(p, z, torch.add(p, z, alpha=shift / a) if apart else p, beta=a)
            shift *= a
        elif apart:
            p, shift = z, a
        else:
            p = z.clone()
            p.diagonal(dim1=-2, dim2=-1).add_(a)
        if step < steps - 1:
            rz = _symmetric(r, z, r, beta=a)
            r = _symmetric(rz, z, rz, beta=a)
    if x.is_contiguous():
        return _add_product(x, p, x, beta=shift) if apart else p @ x
    tall = x.mT  # and so is the result, for a gradient that is
    return (_add_product(tall, tall, p, beta=shift) if apart else tall @ p).mT


def _halves(x: Tensor) -> bool:
    # On a GPU the operators themselves know from where on.
    return x.is_cuda or x.shape[-2] >= _SYMMETRIC_ROWS


def _symmetric(a: Tensor, b: Tensor, c: Tensor, *, alpha: float = 1.0, beta: float) -> Tensor:
    """``alpha·a·b + beta·c`` of polynomials in one symmetric matrix."""
    if _halves(a):
        return symmetric_matmul(a, b, c, alpha=alpha, beta=beta)
    return _add_product(c, a, b, alpha=alpha, beta=beta)


def _add_product(c: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, beta: float) -> Tensor:
    return (torch.addmm if a.dim() == 2 else torch.baddbmm)(c, a, b, alpha=alpha, beta=beta)


@dataclass(frozen=True)
class _Batch:
    """Matrices of one parameter group, shape, dtype and device, which are orthogonalised by one call."""

    group: dict[str, Any]
    params: list[Tensor]
    grads: list[Tensor]
    momenta: list[Tensor]

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.params), *self.params[0].shape))

    def update(self, ns: NewtonSchulz) -> Tensor:
        """The orthogonalised directions, ``shape``, bfloat16."""
        group, x = self.group, _stack(self.momenta)
        if group["nesterov"]:
            x = _stack(self.grads).lerp(x, group["momentum"])
        x = orthogonalize(x, group["ns_coefficients"], group["ns_steps"], group["eps"], ns)
        return x.contiguous().view(self.shape)

    def apply(self, update: Tensor) -> None:
        """Decay the parameters and move them against ``update``."""
        params, lr = self.params, _to_scalar(self.group["lr"])
        rate: Any = _adjust_lr(lr, self.group["adjust_lr_fn"], params[0].shape)
        decay = lr * self.group["weight_decay"]
        if isinstance(rate, Tensor):  # `alpha` would be read back from the device
            torch._foreach_mul_(params, (1 - decay).to(update.device))
            torch._foreach_sub_(params, (update.float() * rate.to(update.device)).unbind())
        else:  # `_foreach_mul_` by a number rounds it to the dtype of CPU parameters first
            torch._foreach_add_(params, params, alpha=-decay)
            torch._foreach_add_(params, update.to(params[0].dtype).unbind(), alpha=-rate)


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` on symmetric products: the same arguments, the same update, the same state dict.

    ``B ← μ·B + (1−μ)·g``, ``W ← (1 − γ·λ)·W − γ'·orthogonalize(g + μ·(B − g))``, or ``orthogonalize(B)``
    without Nesterov, where γ' is γ adjusted to W's shape. Matrices of one shape go through `orthogonalize`
    together, until a batch fills a device. A step reads nothing back from the device.

    Args:
        params, lr, weight_decay, momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn: as
            `torch.optim.Muon`'s, positions and defaults included.
        ns: which Newton–Schulz iteration, see `orthogonalize`.
        process_group: of ranks that hold the same parameters and gradients, as under
            `torch.nn.parallel.DistributedDataParallel`. Each rank orthogonalises its share of the batches,
            and one all-gather of bfloat16 in each step brings every rank all of them. The batches do not
            depend on the number of ranks: on equal devices the parameters have an unshared step's bits.

    Raises:
        ValueError: as `torch.optim.Muon`, and for an unknown ``ns``, one in a parameter group, or DTensors
            with a ``process_group``.
    """

    ns: NewtonSchulz = "auto"
    process_group: dist.ProcessGroup | None = None  # not pickled: a copy computes the same, unshared

    def __init__(
        self,
        params: Any,
        *args: Any,
        ns: NewtonSchulz = "auto",
        process_group: dist.ProcessGroup | None = None,
        **kwargs: Any,
    ):
        check_ns(ns)
        self.ns = ns
        self.process_group = process_group
        super().__init__(params, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "ns": self.ns}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if own := {"ns", "process_group"} & param_group.keys():
            raise ValueError(f"Muon: {', '.join(sorted(own))} is of the whole optimizer, not of a group")
        super().add_param_group(param_group)
        if self.process_group is not None:
            from torch.distributed.tensor import DTensor

            if any(isinstance(p, DTensor) for p in self.param_groups[-1]["params"]):
                raise ValueError("Muon: process_group is for replicated parameters, and these are DTensors")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; returns what ``closure``, which computes the gradients anew, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        batches = list(self._batches())
        for batch in batches:
            torch._foreach_lerp_(batch.momenta, batch.grads, 1 - batch.group["momentum"])
        for batch, update in zip(batches, self._updates(batches), strict=True):
            batch.apply(update)
        return loss

    def _batches(self) -> Iterator[_Batch]:
        for group in self.param_groups:
            lists: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
            self._init_group(group, *lists)
            alike: dict[Any, list[tuple[Tensor, Tensor, Tensor]]] = {}
            for p, grad, momentum in zip(*lists, strict=True):
                spread = getattr(p, "device_mesh", None), getattr(p, "placements", None)  # a DTensor's
                alike.setdefault((p.shape, p.dtype, p.device, *spread), []).append((p, grad, momentum))
            for matrices in alike.values():
                size = max(_BATCH_WORK // max(_work(matrices[0][0].shape), 1), 1)
                for first in range(0, len(matrices), size):
                    yield _Batch(group, *map(list, zip(*matrices[first : first + size], strict=True)))

    def _updates(self, batches: list[_Batch]) -> Iterable[Tensor]:
        if self.process_group is None or not batches:
            return (batch.update(self.ns) for batch in batches)
        rank, world_size = dist.get_rank(self.process_group), dist.get_world_size(self.process_group)
        shares = _shares([_work(batch.shape) for batch in batches], world_size)
        numel = max(sum(batches[i].shape.numel() for i in share) for share in shares)
        device = wire_device(batches[0].params[0], self.process_group)
        mine = torch.empty(numel, dtype=torch.bfloat16, device=device)
        for i, place in _places(mine, batches, shares[rank]):
            place.copy_(batches[i].update(self.ns))
        everyone = mine.new_empty(world_size, numel)
        dist.all_gather_into_tensor(everyone.view(-1), mine, group=self.process_group)
        updates: dict[int, Tensor] = {}
        for row, share in zip(everyone, shares, strict=True):
            updates.update(_places(row, batches, share))
        return (updates[i].to(batch.params[0].device) for i, batch in enumerate(batches))


def _stack(matrices: list[Tensor]) -> Tensor:
    # On a CPU a product of a batch of one takes up to twice the time of a product of matrices.
    return torch.stack(matrices) if len(matrices) > 1 else matrices[0]


def _work(shape: torch.Size) -> int:
    """Multiplications in the products of matrices and their transposes, on the shorter side."""
    return shape.numel() * min(shape[-2:])


def _shares(work: list[int], ranks: int) -> list[list[int]]:
    """Which batches each rank takes: the largest first, each to the rank that has least to do."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for i in sorted(range(len(work)), key=lambda i: -work[i]):
        rank = loads.index(min(loads))
        shares[rank].append(i)
        loads[rank] += work[i]
    return shares


def _places(flat: Tensor, batches: list[_Batch], share: list[int]) -> Iterator[tuple[int, Tensor]]:
    """The part of ``flat`` that holds the update of each batch of a share."""
    start = 0
    for i in share:
        shape = batches[i].shape
        yield i, flat[start : start + shape.numel()].view(shape)
        start += shape.numel()
