# SPDX-License-Identifier: MIT
"""The Muon optimizer on symmetric matrix products.

Muon replaces the momentum M = U·Σ·Vᵀ of a weight by a matrix near U·Vᵀ, which `orthogonalize` computes.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim._muon import _adjust_lr
from torch.optim.optimizer import ParamsT, _to_scalar

from torchpar.optim.newton_schulz import COEFFICIENTS, NewtonSchulz, check_ns, orthogonalize
from torchpar.parallel.wire import wire_device

_BATCH_MULTIPLICATIONS = 2**31  # in X·Xᵀ; they take a GPU about as long as a launch


@dataclass(frozen=True)
class _Batch:
    """Matrices of one parameter group, shape, dtype and device, orthogonalised in one call."""

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
        adjusted_lr: Any = _adjust_lr(lr, self.group["adjust_lr_fn"], params[0].shape)
        decay = lr * self.group["weight_decay"]
        if isinstance(adjusted_lr, Tensor):  # as `alpha` it would be read back from the device
            torch._foreach_mul_(params, (1 - decay).to(update.device))
            torch._foreach_sub_(params, (update.float() * adjusted_lr.to(update.device)).unbind())
        else:  # on a CPU `_foreach_mul_` would first round a number to the parameters' dtype
            torch._foreach_add_(params, params, alpha=-decay)
            torch._foreach_add_(params, update.to(params[0].dtype).unbind(), alpha=-adjusted_lr)


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` on symmetric matrix products, with the same arguments and state dict.

    ``B ← μ·B + (1−μ)·g``, ``W ← (1 − γ·λ)·W − γ'·orthogonalize(g + μ·(B − g))``, or ``orthogonalize(B)``
    without Nesterov. γ' is γ adjusted to the shape of W. With ``ns="standard"`` the updates are
    `torch.optim.Muon`'s up to bfloat16 rounding. The default "auto" is less accurate for matrices with one
    side at least twice the other, see `orthogonalize`.

    Matrices of one shape are orthogonalised together, until a batch fills a device. A step reads nothing
    back from the device.

    Give Muon the hidden weight matrices only. Embeddings, positional tables, the output head, biases and
    norms need AdamW or SGD, although some of them are matrices:

    >>> import torch
    >>> from torch import nn
    >>> from torchpar.optim import ChainedOptimizer, Muon
    >>> embedding, head = nn.Embedding(100, 32), nn.Linear(32, 100)
    >>> model = nn.Sequential(embedding, nn.TransformerEncoderLayer(32, nhead=4, dim_feedforward=64), head)
    >>> hidden = [p for p in model[1].parameters() if p.dim() == 2]
    >>> others = [p for p in model.parameters() if p not in set(hidden)]
    >>> optimizer = ChainedOptimizer(Muon(hidden, lr=0.02), torch.optim.AdamW(others, lr=3e-4))

    Args:
        params, lr, weight_decay, momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn: as in
            `torch.optim.Muon`.
        ns: the Newton–Schulz iteration, "auto", "standard" or "gram", see `orthogonalize`.
        process_group: ranks that hold the same parameters and gradients, as under
            `torch.nn.parallel.DistributedDataParallel`. Each rank orthogonalises some of the batches. One
            all-gather of bfloat16 a step brings every rank all of them. The batches do not depend on the
            number of ranks, so that on equal devices the parameters have the bits of one rank.

    Raises:
        ValueError: as `torch.optim.Muon`; an unknown ``ns``; ``ns`` or ``process_group`` in a parameter
            group; DTensors with a ``process_group``.
    """

    ns: NewtonSchulz = "auto"
    process_group: dist.ProcessGroup | None = None  # not pickled; a copy does all of the work on each rank

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        ns: NewtonSchulz = "auto",
        process_group: dist.ProcessGroup | None = None,
    ):
        check_ns(ns)
        self.ns = ns
        self.process_group = process_group
        super().__init__(
            params,
            lr,  # type: ignore[arg-type]  # torch takes a tensor too, and annotates a float
            weight_decay,
            momentum,
            nesterov,
            ns_coefficients,
            eps,
            ns_steps,
            adjust_lr_fn,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "ns": self.ns}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if own := {"ns", "process_group"} & param_group.keys():
            raise ValueError(f"Muon: {', '.join(sorted(own))} applies to the whole optimizer, not to a group")
        super().add_param_group(param_group)
        if self.process_group is not None:
            from torch.distributed.tensor import DTensor

            if any(isinstance(p, DTensor) for p in self.param_groups[-1]["params"]):
                raise ValueError("Muon: process_group needs replicated parameters, and these are DTensors")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; returns the loss of ``closure``, which computes the gradients, or None."""
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
            by_kind: dict[Any, list[tuple[Tensor, Tensor, Tensor]]] = {}
            for p, grad, momentum in zip(*lists, strict=True):
                layout = getattr(p, "device_mesh", None), getattr(p, "placements", None)  # of a DTensor
                by_kind.setdefault((p.shape, p.dtype, p.device, *layout), []).append((p, grad, momentum))
            for matrices in by_kind.values():
                size = max(_BATCH_MULTIPLICATIONS // max(_multiplications(matrices[0][0].shape), 1), 1)
                for first in range(0, len(matrices), size):
                    yield _Batch(group, *map(list, zip(*matrices[first : first + size], strict=True)))

    def _updates(self, batches: list[_Batch]) -> Iterable[Tensor]:
        """The update of each batch; with a process group, each rank computes some and gathers the others."""
        if self.process_group is None or not batches:
            return (batch.update(self.ns) for batch in batches)
        rank, world_size = dist.get_rank(self.process_group), dist.get_world_size(self.process_group)
        assigned = _assign_to_ranks([_multiplications(batch.shape) for batch in batches], world_size)
        numel = max(sum(batches[i].shape.numel() for i in indices) for indices in assigned)
        device = wire_device(batches[0].params[0], self.process_group)
        own = torch.empty(numel, dtype=torch.bfloat16, device=device)
        for i, view in _views(own, batches, assigned[rank]):
            view.copy_(batches[i].update(self.ns))
        gathered = own.new_empty(world_size, numel)
        dist.all_gather_into_tensor(gathered.view(-1), own, group=self.process_group)
        updates: dict[int, Tensor] = {}
        for row, indices in zip(gathered, assigned, strict=True):
            updates.update(_views(row, batches, indices))
        return (updates[i].to(batch.params[0].device) for i, batch in enumerate(batches))


def _stack(matrices: list[Tensor]) -> Tensor:
    # On a CPU a product of a batch of one takes up to twice the time of a product of matrices.
    return torch.stack(matrices) if len(matrices) > 1 else matrices[0]


def _multiplications(shape: torch.Size) -> int:
    """Multiplications in X·Xᵀ of each matrix, with the shorter side as rows."""
    return shape.numel() * min(shape[-2:])


def _assign_to_ranks(costs: list[int], world_size: int) -> list[list[int]]:
    """The indices of each rank's batches: the largest batch first, each to the least loaded rank."""
    assigned: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        rank = loads.index(min(loads))
        assigned[rank].append(i)
        loads[rank] += costs[i]
    return assigned


def _views(flat: Tensor, batches: list[_Batch], indices: list[int]) -> Iterator[tuple[int, Tensor]]:
    """Each index with the view of ``flat`` that holds its batch's update, one view after the other."""
    start = 0
    for i in indices:
        shape = batches[i].shape
        yield i, flat[start : start + shape.numel()].view(shape)
        start += shape.numel()
