# SPDX-License-Identifier: MIT
"""The Muon optimizer on products that are known to be symmetric.

Muon replaces the momentum M of a weight by a matrix near U·Vᵀ, where M = U·Σ·Vᵀ, which `orthogonalize` finds.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim._muon import _adjust_lr
from torch.optim.optimizer import _to_scalar

from torchpar.optim.newton_schulz import NewtonSchulz, check_ns, orthogonalize
from torchpar.parallel.reduction import wire_device

_BATCH_WORK = 2**31  # multiplications in X·Xᵀ: they take a GPU about as long as a launch


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
