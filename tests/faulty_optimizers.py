# SPDX-License-Identifier: MIT
"""A plain Muon that is right on every placement of PyTorch's, and known faults of published libraries.

Each faulty class changes one or two methods of `PlainMuon`, and its docstring names the public report. `make`
is what `torchpar.testing.check_optimizer` calls, with one of the classes.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from torchpar.reference import orthogonalize

View = Callable[[Tensor], Any]


def whole(t: Tensor) -> Tensor:
    return t.full_tensor().clone() if isinstance(t, DTensor) else t.clone()


class PlainMuon(torch.optim.Optimizer):
    """Gathers each DTensor's momentum on every rank; it refuses nothing, and takes any tensor for whole."""

    def __init__(self, params: Any, views: Mapping[str, View] | None = None, **own: Any):
        self.views = views or {}
        super().__init__(params, {"lr": 0.02, "momentum": 0.95, "nesterov": True, "weight_decay": 0.0} | own)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for name, p in zip(group["param_names"], group["params"], strict=True):
                if p.grad is not None:
                    self.update(name, p, group)
        return loss

    def update(self, name: str, p: Tensor, group: dict[str, Any]) -> None:
        gradient = p.grad.redistribute(placements=p.placements) if isinstance(p, DTensor) else p.grad
        momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
        momentum.lerp_(gradient, 1 - group["momentum"])
        ahead = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(group["lr"] * self.direction(name, p, ahead))

    def direction(self, name: str, p: Tensor, ahead: Tensor) -> Tensor:
        update = self.orthogonal(name, p, whole(ahead))  # on every rank
        if not isinstance(p, DTensor):
            return update
        return distribute_tensor(update, p.device_mesh, p.placements, src_data_rank=None)

    def orthogonal(self, name: str, p: Tensor, t: Tensor) -> Tensor:
        """Each matrix of ``t``, which is overwritten."""
        for matrix in self.views.get(name, lambda t: [t.flatten(1)])(t):
            matrix.copy_(self.scale(matrix, p) * orthogonalize(matrix.float()))
        return t

    def scale(self, matrix: Tensor, p: Tensor) -> float:
        return max(matrix.shape[-2:]) ** 0.5


def make(model: nn.Module, kind: Any = PlainMuon, nesterov: bool = True, views: Any = None) -> PlainMuon:
    return kind(model.named_parameters(), nesterov=nesterov, views=views)


class OrthogonalisesShards(PlainMuon):
    """Each rank orthogonalises its rows, so updates depend on the number of ranks (Megatron-LM#6380)."""

    def direction(self, name: str, p: Tensor, ahead: Tensor) -> Tensor:
        if not isinstance(ahead, DTensor):
            return super().direction(name, p, ahead)
        update = ahead.clone()
        self.orthogonal(name, p, update.to_local())
        return update


class AppliesMomentum(PlainMuon):
    """Nothing orthogonalises: the default configuration was SGD with momentum (DeepSpeed#8441)."""

    def direction(self, name: str, p: Tensor, ahead: Tensor) -> Tensor:
        return ahead


class MomentumOfMicroBatches(PlainMuon):
    """Each micro-batch updates the momentum by itself (DeepSpeed#8443)."""

    def __init__(self, params: Any, **own: Any):
        super().__init__(params, **own)
        for p in (p for group in self.param_groups for p in group["params"]):
            p.register_post_accumulate_grad_hook(self.accumulate)

    @torch.no_grad()
    def accumulate(self, p: Tensor) -> None:
        self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)).lerp_(p.grad, 0.05)

    def update(self, name: str, p: Tensor, group: dict[str, Any]) -> None:
        p.sub_(group["lr"] * self.direction(name, p, self.state[p]["momentum_buffer"]))


class ViewsShards(PlainMuon):
    """The number of heads of the whole matrix is applied to the rows of a rank (DeepSpeed#8384)."""

    def orthogonal(self, name: str, p: Tensor, t: Tensor) -> Tensor:
        if name not in self.views or not isinstance(p, DTensor):
            return super().orthogonal(name, p, t)
        heads = len(self.views[name](t))
        for rows in t.chunk(p.device_mesh.size()):
            for head in rows.chunk(heads):
                head.copy_(self.scale(head, p) * orthogonalize(head))
        return t


class ScalesByPaddedShape(PlainMuon):
    """The rows that pad a matrix to equal shards count for its learning rate (Megatron-LM#6683)."""

    def scale(self, matrix: Tensor, p: Tensor) -> float:
        ranks = p.device_mesh.size() if isinstance(p, DTensor) else 1
        rows, columns = matrix.shape[-2:]
        return max(-(-rows // ranks) * ranks, columns) ** 0.5


class NormalisesMomentum(PlainMuon):
    """Without Nesterov, a bfloat16 momentum is divided by its norm in place (pytorch#190597)."""

    def direction(self, name: str, p: Tensor, ahead: Tensor) -> Tensor:
        aliased = ahead.bfloat16()  # which is ``ahead`` itself, if that is bfloat16
        aliased.div_(whole(aliased).norm())
        return super().direction(name, p, ahead)


def make_by_layer(model: nn.Module) -> PlainMuon:
    """A parameter of two layers is updated once for each of them."""
    return PlainMuon(model.named_parameters(remove_duplicate=False))
