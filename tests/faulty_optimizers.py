# SPDX-License-Identifier: MIT
"""A plain Muon that is right on every placement of PyTorch's, a plain AdamW, and faulty classes of
both.

Each faulty class changes one or two methods. Those of `PlainMuon` are known faults of published
libraries, and their docstrings name the public report. `make` and `make_adamw` are what
`torchpar.testing.check_optimizer` calls, with one of the classes.
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
    """Gathers each DTensor's momentum on every rank; it refuses nothing, and takes any tensor for
    whole."""

    def __init__(self, params: Any, views: Mapping[str, View] | None = None, **own: Any):
        self.views = views or {}
        super().__init__(
            params, {"lr": 0.02, "momentum": 0.95, "nesterov": True, "weight_decay": 0.0} | own
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for name, p in zip(group["param_names"], group["params"], strict=True):
                if p.grad is not None:
                    self.update(name, p, group)
        return loss

    def update(self, name: str, p: Tensor, group: dict[str, Any]) -> None:
        gradient = (
            p.grad.redistribute(placements=p.placements) if isinstance(p, DTensor) else p.grad
        )
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


def make(
    model: nn.Module, kind: Any = PlainMuon, nesterov: bool = True, views: Any = None
) -> PlainMuon:
    return kind(model.named_parameters(), nesterov=nesterov, views=views)


class OrthogonalisesShards(PlainMuon):
    """Each rank orthogonalises its rows, so updates depend on the number of ranks
    (Megatron-LM#6380)."""

    def direction(self, name: str, p: Tensor, ahead: Tensor) -> Tensor:
        if not isinstance(ahead, DTensor):
            return super().direction(name, p, ahead)
        update = ahead.clone()
        self.orthogonal(name, p, update.to_local())
        return update


class ScalesShardsByWhole(OrthogonalisesShards):
    """Each rank orthogonalises its rows, and scales them by the shape of the whole matrix."""

    def scale(self, matrix: Tensor, p: Tensor) -> float:
        return super().scale(p, p)


class LeavesOutSmall(PlainMuon):
    """A rank's part of less than five rows does not move."""

    def direction(self, name: str, p: Tensor, ahead: Tensor) -> Tensor:
        rows = len(p.to_local() if isinstance(p, DTensor) else p)
        update = super().direction(name, p, ahead)
        return update if rows >= 5 else torch.zeros_like(update)


class AppliesMomentumOfShards(PlainMuon):
    """Nothing orthogonalises a DTensor."""

    def direction(self, name: str, p: Tensor, ahead: Tensor) -> Tensor:
        return ahead if isinstance(ahead, DTensor) else super().direction(name, p, ahead)


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


class TakesSkippedSteps(PlainMuon):
    """The momentum takes the gradients of a step that the loss scaler skips (DeepSpeed#8432)."""

    _step_supports_amp_scaling = True  # the step itself asks whether it is skipped

    def update(self, name: str, p: Tensor, group: dict[str, Any]) -> None:
        weight = p.detach().clone()
        super().update(name, p, group)
        if getattr(self, "found_inf", 0):
            p.copy_(weight)


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


class KeepsFloat32(PlainMuon):
    """Momenta of float32 also in a bfloat16 model, which a state dict keeps."""

    def update(self, name: str, p: Tensor, group: dict[str, Any]) -> None:
        gradient, weight = p.grad.float(), p.detach()
        momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(gradient))
        momentum.lerp_(gradient, 1 - group["momentum"])
        weight.sub_(group["lr"] * self.direction(name, p, gradient.lerp(momentum, 0.95)))

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        for i, saved in state_dict["state"].items():
            self.state[params[i]]["momentum_buffer"] = saved["momentum_buffer"].clone()


class RoundsFloat32(KeepsFloat32):
    """`Optimizer.load_state_dict` casts momenta to the dtype of their parameters."""

    def load_state_dict(self, state_dict: Any) -> None:
        torch.optim.Optimizer.load_state_dict(self, state_dict)
        for state in self.state.values():
            state["momentum_buffer"] = state["momentum_buffer"].float()


class ShardsOfMixed(PlainMuon):
    """Orthogonalises DTensors by shards, if there are other matrices beside them."""

    def direction(self, name: str, p: Tensor, ahead: Tensor) -> Tensor:
        params = [q for group in self.param_groups for q in group["params"]]
        if not isinstance(ahead, DTensor) or all(isinstance(q, DTensor) for q in params):
            return super().direction(name, p, ahead)
        update = ahead.clone()
        self.orthogonal(name, p, update.to_local())
        return update


class NormalisesMomentum(PlainMuon):
    """Without Nesterov, a bfloat16 momentum is divided by its norm in place (pytorch#190597)."""

    def direction(self, name: str, p: Tensor, ahead: Tensor) -> Tensor:
        aliased = ahead.bfloat16()  # which is ``ahead`` itself, if that is bfloat16
        aliased.div_(whole(aliased).norm())
        return super().direction(name, p, ahead)


def make_by_layer(model: nn.Module) -> PlainMuon:
    """A parameter of two layers is updated once for each of them."""
    return PlainMuon(model.named_parameters(remove_duplicate=False))


# Faults that need other weights, settings or gradients than those of the first three steps


class PlainAdamW(torch.optim.Optimizer):
    """AdamW with its settings as `torch.optim.AdamW` names them. Faulty classes change one
    method."""

    def __init__(self, params: Any, **own: Any):
        defaults = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
        super().__init__(params, defaults | own)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad, group)
        return loss

    def update(self, p: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        state, (beta1, beta2) = self.state[p], group["betas"]
        steps = state["step"] = state.get("step", 0) + 1
        mean = state.setdefault("mean", torch.zeros_like(p)).lerp_(gradient, 1 - beta1)
        square = state.setdefault("square", torch.zeros_like(p)).lerp_(gradient**2, 1 - beta2)
        p.mul_(self.kept(p, group))
        update = self.divide(mean, square, group["eps"], 1 - beta1**steps, 1 - beta2**steps)
        p.sub_(group["lr"] * update)

    def kept(self, p: Tensor, group: Mapping[str, Any]) -> float:
        """The factor of the weight that its decay leaves."""
        return 1 - group["lr"] * group["weight_decay"]

    def divide(
        self, mean: Tensor, square: Tensor, eps: float, first: float, second: float
    ) -> Tensor:
        return mean / first / ((square / second).sqrt() + eps)


def make_adamw(model: nn.Module, kind: Any = PlainAdamW) -> torch.optim.Optimizer:
    return kind(model.parameters())


class DividesByNorm(PlainAdamW):
    """Zeros are divided by their norm (microsoft/dion#24, optax#1784)."""

    def update(self, p: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        p.sub_(group["lr"] * gradient / gradient.norm())


class DropsDecay(PlainAdamW):
    """DTensors have no weight decay."""

    def kept(self, p: Tensor, group: Mapping[str, Any]) -> float:
        return 1.0 if isinstance(p, DTensor) else super().kept(p, group)


class DoublesDecay(PlainAdamW):
    """DTensors have twice the weight decay."""

    def kept(self, p: Tensor, group: Mapping[str, Any]) -> float:
        return super().kept(p, group) ** (2 if isinstance(p, DTensor) else 1)


class DoublesRate(PlainAdamW):
    """DTensors have twice the learning rate."""

    def update(self, p: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        rate = group["lr"] * (2 if isinstance(p, DTensor) else 1)
        super().update(p, gradient, {**group, "lr": rate})


class MuonWithoutDecay(torch.optim.Muon):
    """DTensors have no weight decay."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            if isinstance(group["params"][0], DTensor):
                group["weight_decay"] = 0.0
        return super().step(closure)


class IgnoresClosure(PlainAdamW):
    def step(self, closure: Any = None) -> None:
        super().step()


class LateClosure(PlainAdamW):
    """Calls the closure after the update, for the loss alone."""

    def step(self, closure: Any = None) -> Any:
        super().step()
        return None if closure is None else closure()


class LosesLoss(PlainAdamW):
    def step(self, closure: Any = None) -> None:
        super().step(closure)


class CallsClosureTwice(PlainAdamW):
    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        return closure()


class ReturnsOtherLoss(PlainAdamW):
    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        return 0.0


class KeepsRate(PlainAdamW):
    """A state dict does not bring its learning rate."""

    def load_state_dict(self, state_dict: Any) -> None:
        rates = [group["lr"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate


class ReadsRateOnce(PlainAdamW):
    """The learning rate of the constructor is used, also in groups that have another."""

    def update(self, p: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        super().update(p, gradient, {**group, "lr": self.defaults["lr"]})


class ReadsRateOnceOnDTensors(PlainAdamW):
    def update(self, p: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        rate = self.defaults["lr"] if isinstance(p, DTensor) else group["lr"]
        super().update(p, gradient, {**group, "lr": rate})


class MergesGroups(PlainAdamW):
    """All groups have the settings of the first one."""

    def update(self, p: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        super().update(p, gradient, self.param_groups[0])


class MergesSetting(PlainAdamW):
    """All groups have one setting of the first one."""

    def update(self, p: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        super().update(p, gradient, {**group, self.setting: self.param_groups[0][self.setting]})

    setting = "betas"


class MergesDecay(MergesSetting):
    """Which is 0 in the first one."""

    setting = "weight_decay"

    def __init__(self, params: Any):
        super().__init__(params, weight_decay=0.0)


class LeavesOutGroup(PlainAdamW):
    """Only the first group moves."""

    def update(self, p: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        if group is self.param_groups[0]:
            super().update(p, gradient, group)


class LeavesOutLast(PlainAdamW):
    """The last matrix of a group does not move."""

    def update(self, p: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        if p is not group["params"][-1]:
            super().update(p, gradient, group)


class ClipsGradient(PlainAdamW):
    """The gradient is halved in place."""

    def update(self, p: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        super().update(p, gradient.mul_(0.5), group)


class DropsGradient(PlainAdamW):
    def update(self, p: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        super().update(p, gradient, group)
        p.grad = None


class WritesLocalData(PlainAdamW):
    """A DTensor changes through the data of its local part."""

    def update(self, p: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        if not isinstance(p, DTensor):
            super().update(p, gradient, group)
            return
        after = nn.Parameter(p.detach().clone())
        self.state[after] = self.state[p]
        super().update(after, gradient, group)
        del self.state[after]
        p._local_tensor.data.copy_(after._local_tensor)


class RoundsLoadedState(PlainAdamW):
    """A state dict is loaded in bfloat16."""

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["mean"] = state["mean"].bfloat16().float()


class SharesMoments(PlainAdamW):
    """Matrices of one shape share their first moment."""

    def update(self, p: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        first = next(q for q in group["params"] if q.shape == p.shape)
        if "mean" in self.state[first]:
            self.state[p]["mean"] = self.state[first]["mean"]
        super().update(p, gradient, group)


class WritesData(PlainAdamW):
    """Weights change through p.data, which autograd does not notice."""

    def update(self, p: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        after = nn.Parameter(p.detach().clone())
        self.state[after] = self.state[p]
        super().update(after, gradient, group)
        del self.state[after]
        p.data.copy_(after)


class TakesNoneForZero(PlainAdamW):
    """A parameter without a gradient moves on with its momentum."""

    def step(self, closure: Any = None) -> Any:
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is None):
            p.grad = torch.zeros_like(p)
        return super().step(closure)


class LeavesGradients(PlainAdamW):
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Leave the gradients, to which the next backward pass adds."""


class WithoutCorrection(PlainAdamW):
    """The second moment has no bias correction."""

    def divide(
        self, mean: Tensor, square: Tensor, eps: float, first: float, second: float
    ) -> Tensor:
        return super().divide(mean, square, eps, first, 1.0)


class EpsInRoot(PlainAdamW):
    """ε is added within the root."""

    def divide(
        self, mean: Tensor, square: Tensor, eps: float, first: float, second: float
    ) -> Tensor:
        return mean / first / (square / second + eps).sqrt()


class OtherBeta(PlainAdamW):
    """β₂ is 0.99, whatever its group has."""

    def update(self, p: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        super().update(p, gradient, {**group, "betas": (group["betas"][0], 0.99)})


def make_early_adamw(model: nn.Module) -> torch.optim.AdamW:
    """PyTorch's own class, whose steps are counted from 0 again each time: a wrong bias
    correction."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    optimizer.register_step_pre_hook(_count_from_zero)
    return optimizer


def _count_from_zero(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for state in optimizer.state.values():
        state["step"].zero_()


def make_sgd_of_halved_momentum(model: nn.Module) -> torch.optim.SGD:
    """PyTorch's own class, whose momenta are halved after each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    optimizer.register_step_post_hook(_halve_momenta)
    return optimizer


def _halve_momenta(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for state in optimizer.state.values():
        state["momentum_buffer"].mul_(0.5)


def make_muon_of_doubled_rate(model: nn.Module) -> torch.optim.Muon:
    """PyTorch's own class, with twice its learning rate in each step."""
    optimizer = torch.optim.Muon(model.parameters(), lr=0.05)
    optimizer.register_step_pre_hook(_double_rate)
    optimizer.register_step_post_hook(_halve_rate)
    return optimizer


def _double_rate(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        group["lr"] *= 2


def _halve_rate(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        group["lr"] /= 2


# Faults that begin later than in the third step


class LateRate(PlainAdamW):
    """The fourth step and all later ones are 30% too large."""

    def update(self, p: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        late = self.state[p].get("step", 0) >= 3
        super().update(p, gradient, {**group, "lr": group["lr"] * (1.3 if late else 1.0)})


class SwitchesCorrection(PlainAdamW):
    """The bias correction is switched off after forty steps, as if it were 1 by then."""

    def divide(
        self, mean: Tensor, square: Tensor, eps: float, first: float, second: float
    ) -> Tensor:
        is_late = second > 1 - 0.999**40
        return super().divide(mean, square, eps, first, 1.0 if is_late else second)


class CountsItself(PlainAdamW):
    """Every tenth step decays the weights, by a counter that no state dict has."""

    def __init__(self, params: Any, **own: Any):
        super().__init__(params, **own)
        self.steps = 0

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        self.steps += 1
        return super().step(closure)

    def kept(self, p: Tensor, group: Mapping[str, Any]) -> float:
        return 1 - 10 * group["lr"] * group["weight_decay"] if self.steps % 10 == 0 else 1.0


class RefreshesShards(PlainMuon):
    """Every tenth update is that of the shard alone."""

    def direction(self, name: str, p: Tensor, ahead: Tensor) -> Tensor:
        steps = self.state[p]["steps"] = self.state[p].get("steps", 0) + 1
        if steps % 10 or not isinstance(p, DTensor):
            return super().direction(name, p, ahead)
        shard = self.orthogonal(name, p, ahead.to_local().clone())
        return DTensor.from_local(
            shard, p.device_mesh, p.placements, shape=p.shape, stride=p.stride()
        )
