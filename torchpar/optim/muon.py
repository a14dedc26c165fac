# SPDX-License-Identifier: MIT
"""The Muon optimizer, computed by symmetric matrix products, for whole and for sharded parameters.

Muon replaces the momentum M = U·Σ·Vᵀ of a weight by a matrix near U·Vᵀ, which `orthogonalize` computes.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.optimizer import Optimizer, ParamsT

from torchpar.errors import ConfigError
from torchpar.library import is_dtensor
from torchpar.optim.assign import Choice, ModelOptimizer, chain
from torchpar.optim.exchange import Exchange, GradientState, check_gradients, messages
from torchpar.optim.matrices import ParamInfo, View, orthogonalize_batched
from torchpar.optim.newton_schulz import (
    COEFFICIENTS,
    Coefficients,
    NewtonSchulz,
    check_ns,
    coefficients_per_step,
)
from torchpar.parts import is_marked, local, part_of

# The factor of the learning rate of a matrix (n, m), by the names of `torch.optim.Muon`.
_RATIOS: dict[str | None, Callable[[int, int], float]] = {
    None: lambda n, m: math.sqrt(max(1.0, n / m)),
    "original": lambda n, m: math.sqrt(max(1.0, n / m)),
    "match_rms_adamw": lambda n, m: 0.2 * math.sqrt(max(n, m)),
    "spectral_unclamped": lambda n, m: math.sqrt(n / m),
}

_Plan = tuple[int, list[ParamInfo], Exchange | None]  # the parameters of a group, and their messages


class Muon(Optimizer):
    """`torch.optim.Muon` on symmetric matrix products, with the same arguments and state dict.

    ``B ← μ·B + (1−μ)·g``, ``W ← (1 − γ·λ)·W − γ'·orthogonalize(g + μ·(B − g))``, or ``orthogonalize(B)``
    without Nesterov. γ is ``lr``, λ ``weight_decay``, μ ``momentum``, and γ' is γ adjusted to the shape of
    W. With ``ns="standard"`` the updates are `torch.optim.Muon`'s up to bfloat16 rounding. The default "auto"
    is less accurate for matrices with one side at least twice the other, see `orthogonalize`.

    Matrices of equal shapes are orthogonalised in batches that keep the device busy. On one rank a step never
    waits for the device.

    **Several ranks.** A parameter may be whole, a DTensor of any placement, such as one of `fully_shard`, or
    of one of torchpar's split layers. Each matrix is orthogonalised by one of the ranks that have it, and the
    work is shared about evenly. A step makes two all-to-alls in bfloat16 for each parameter group and mesh,
    and holds no more than its share of the whole matrices (`torchpar.optim.exchange`). With ``ns="standard"``
    parameters of float32 have the bits of unsplit ones, on a CPU. Save and load the state as any optimizer's:
    a momentum is sharded as its parameter is.

    Give Muon the hidden weight matrices only. `for_model` finds them, and gives another optimizer the
    embeddings, the output head, biases and norms.

    Args:
        params, lr, weight_decay, momentum, nesterov, eps, ns_steps, adjust_lr_fn: as in `torch.optim.Muon`.
        ns_coefficients: as in `orthogonalize`: one triple, one for each iteration, or "polar_express".
        ns: the Newton–Schulz iteration, "auto", "standard" or "gram", see `orthogonalize`.
        views: by the name of a parameter, a function that returns its matrices. For parameters that are not
            one matrix. They need names: give ``model.named_parameters()``.
        process_group: a group, or a mesh, of the ranks that share the work; together they hold every part of
            each parameter. The default is a parameter's own mesh; whole parameters are not shared. Under
            `torch.nn.parallel.DistributedDataParallel` name the ranks that hold the same parameters. A copy
            of the optimizer has none.

    Raises:
        ConfigError: a parameter that is not a matrix and has no view; an invalid view; ``ns``, ``views`` or
            ``process_group`` in a parameter group; an argument that `torch.optim.Muon` refuses; ranks
            whose parameters differ. It is a ValueError, and names the parameter.
    """

    ns: NewtonSchulz = "auto"
    views: Mapping[str, View]
    process_group: dist.ProcessGroup | DeviceMesh | None = None  # not copied
    _plan: list[_Plan] | None = None  # from the first step on
    _has_updated = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Coefficients = COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        ns: NewtonSchulz = "auto",
        views: Mapping[str, View] | None = None,
        process_group: dist.ProcessGroup | DeviceMesh | None = None,
    ):
        check_ns(ns)
        if not isinstance(process_group, dist.ProcessGroup | DeviceMesh | None):
            raise ConfigError(
                f"Muon: process_group is {process_group!r}, expected a group or mesh of this rank"
            )
        self.ns = ns
        self.views = views or {}
        self.process_group = process_group
        self._view_at: dict[tuple[int, int], View | None] = {}  # by group, and index in it
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
        }
        super().__init__(params, defaults)
        names = {info.name for info in self._param_infos()}
        if unknown := set(self.views) - names:
            raise ConfigError(f"Muon: views has {sorted(unknown)[0]}, expected names of parameters")

    @classmethod
    def for_model(
        cls,
        model: torch.nn.Module,
        lr: float | Tensor = 1e-3,
        *,
        others: Callable[[Iterable[Any]], Optimizer] = torch.optim.AdamW,
        overrides: Mapping[str, Choice] | None = None,
        views: Mapping[str, View] | None = None,
        **arguments: Any,
    ) -> ModelOptimizer:
        """Muon for the hidden matrices of ``model``, and another optimizer for its other parameters.

        >>> from functools import partial
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Embedding(100, 32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 100))
        >>> optimizer = Muon.for_model(model, lr=0.02, others=partial(torch.optim.AdamW, lr=3e-4))
        >>> print(optimizer)
        parameter  shape   optimizer  reason
        0.weight   100×32  AdamW      embedding
        1.weight   64×32   Muon       hidden matrix
        1.bias     64      AdamW      not a matrix
        3.weight   100×64  AdamW      output head, the last linear layer
        3.bias     100     AdamW      not a matrix

        Muon takes the weights of linear layers, of convolutions (their first axis as rows), and of
        `torch.nn.MultiheadAttention` (query, key and value apart). The output head is the last linear layer
        that is not in one of several equal blocks.

        Args:
            others: makes the other optimizer from parameter groups. Vectors are in a group of their own,
                whose weight decay is 0.
            overrides: "muon" or "others" by the name of a parameter, or by a pattern such as ``"blocks.*"``.
            views: as for `Muon`, by names or patterns. These parameters go to Muon.
            arguments: the other ones of `Muon`.

        Returns:
            One optimizer, a `ChainedOptimizer`, which prints the table above.

        Raises:
            ConfigError: a pattern that no parameter has, or no parameter for Muon.
        """
        make = partial(cls, lr=lr, **arguments)
        return chain(make, model, others, overrides or {}, views or {})

    def __getstate__(self) -> dict[str, Any]:
        for info in self._param_infos():
            if is_marked(info.p):
                raise ConfigError(
                    f"Muon: {info.name} is of a split layer, and a copy of the optimizer would not know how "
                    "it is split; copy the model, and make an optimizer for the copy"
                )
        own = {"ns": self.ns, "views": self.views, "_view_at": self._view_at}
        return {**super().__getstate__(), **own}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters. On several ranks that share parameters, do so before the first step."""
        if own := {"ns", "views", "process_group"} & param_group.keys():
            raise ConfigError(f"Muon: {sorted(own)[0]} applies to the whole optimizer, not to a group")
        super().add_param_group(param_group)
        index, group = len(self.param_groups) - 1, self.param_groups[-1]
        # By place, because a state dict that is loaded may bring other names.
        for i, name in enumerate(group.get("param_names", ())):
            self._view_at[index, i] = self.views.get(name)
        try:
            _check_group(group)
            infos = list(self._param_infos(index))
            for info in infos:
                info.check()
            if any(exchange for *_, exchange in self._plan or ()):
                # A rank that added it alone would wait for the others in the next step.
                raise ConfigError(
                    f"Muon: a group ({infos[0].name}, …) is added after the first step of several ranks; "
                    "make a new Muon of all groups on every rank"
                )
        except Exception:
            self.param_groups.pop()
            raise
        self._plan = None

    def _param_infos(self, first: int = 0) -> Iterator[ParamInfo]:
        """The parameters of the groups from ``first`` on."""
        for index, group in enumerate(self.param_groups[first:], first):
            names = group.get("param_names")
            for i, p in enumerate(group["params"]):
                name = names[i] if names else f"parameter {i} of group {index}"
                try:
                    part = part_of(p)
                except ConfigError as e:
                    raise ConfigError(f"Muon: {name}: {e}") from e
                yield ParamInfo(name, index, p, part, self._view_at.get((index, i)))

    def _plans(self) -> list[_Plan]:
        """The parameters that are computed together; last those that need no messages."""
        if self._plan is None:
            together: dict[Any, list[ParamInfo]] = {}
            for info in self._param_infos():
                together.setdefault((info.group_index, self.process_group or info.part.mesh), []).append(info)
            counts = Counter(ranks for _, ranks in together)
            plan = [
                (index, infos, _exchange(ranks, infos, counts[ranks]))
                for (index, ranks), infos in together.items()
            ]
            self._plan = sorted(plan, key=lambda one: one[2] is None)
        return self._plan

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; returns the loss of ``closure``, which computes the gradients, or None.

        Raises:
            ConfigError: a gradient that is sparse, that only some ranks have, or that has other placements
                than its parameter, and arguments that differ, on every rank that shares the work; a group
                without any gradient while another has some; a first step without any gradient; a momentum
                that was loaded from other placements.
        """
        loss = None if closure is None else torch.enable_grad()(closure)()
        plans = self._plans()
        # All groups in turn, so that ranks which own matrices of different groups work at the same time.
        wholes = [self._gathered(*plan) for plan in plans]
        results = [
            self._orthogonalized(self.param_groups[index], infos, whole)
            for (index, infos, _), whole in zip(plans, wholes, strict=True)
        ]
        updates = [
            (index, [(infos[i], t) for i, t in (exchange.scatter(own) if exchange else own).items()])
            for (index, infos, exchange), own in zip(plans, results, strict=True)
        ]
        self._check_gradients({index for index, of_plan in updates if of_plan})
        for index, of_plan in updates:
            self._apply(self.param_groups[index], of_plan)
        return loss

    def _gathered(self, index: int, infos: list[ParamInfo], exchange: Exchange | None) -> dict[int, Tensor]:
        """Update the momenta; return the whole ones that this rank orthogonalises, by index in ``infos``."""
        group = self.param_groups[index]
        gradients = [_gradient_state(info) for info in infos]
        chosen = [i for i, state in enumerate(gradients) if state == GradientState.PRESENT]
        grads = [local(infos[i].p.grad).to(infos[i].p.dtype) for i in chosen]
        directions = momenta = [self._momentum(infos[i]) for i in chosen]
        if chosen:
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            if group["nesterov"]:
                directions = torch._foreach_lerp(grads, momenta, group["momentum"])  # type: ignore[assignment]
        parts = dict(zip(chosen, directions, strict=True))
        if exchange is not None:
            return exchange.gather(parts, gradients, self._arguments(group))
        rank = dist.get_rank() if dist.is_initialized() else 0
        check_gradients([info.name for info in infos], [gradients], [rank])
        return parts

    def _arguments(self, group: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a group, which must be the same on all ranks."""
        arguments = {"ns": self.ns}
        for name in sorted(self.defaults.keys() & group.keys()):
            value = group[name]
            if isinstance(value, Tensor):  # one on a GPU is not read back
                value = "on a GPU" if value.is_cuda else value.item()
            arguments[name] = value
        return arguments

    def _momentum(self, info: ParamInfo) -> Tensor:
        p, state = info.p, self.state[info.p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        momentum = state["momentum_buffer"]
        if momentum.shape != p.shape or _placements(momentum) != _placements(p):
            raise ConfigError(
                f"Muon: {info.name} is {tuple(p.shape)} {_placements(p) or 'whole'}, and its momentum "
                f"{tuple(momentum.shape)} {_placements(momentum) or 'whole'}; "
                "load a state dict of other placements by torch.distributed.checkpoint"
            )
        return local(momentum)

    def _orthogonalized(
        self, group: dict[str, Any], infos: list[ParamInfo], whole: dict[int, Tensor]
    ) -> dict[int, Tensor]:
        """Orthogonalise the ``whole`` momenta, keyed by their indices in ``infos``; bfloat16."""
        results: dict[int, Tensor] = {}
        matrices: list[tuple[int, Tensor]] = []
        for i, t in whole.items():
            if infos[i].view is not None:
                # For a tensor with other strides than the parameter's, a view function could return copies.
                results[i] = t = t.to(torch.bfloat16, copy=True, memory_format=torch.contiguous_format)
            matrices += [(i, matrix) for matrix in infos[i].matrices(t)]
        coefficients, steps, eps = (group[name] for name in ("ns_coefficients", "ns_steps", "eps"))
        updates = orthogonalize_batched([matrix for _, matrix in matrices], coefficients, steps, eps, self.ns)
        for (i, matrix), update in zip(matrices, updates, strict=True):
            if infos[i].view is None:
                results[i] = update
            else:
                ratio = _ratio(group, matrix.shape) / _ratio(group, infos[i].shapes[0])
                matrix.copy_(update if ratio == 1 else update * ratio)
        return results

    def _check_gradients(self, updated: set[int]) -> None:
        """Raise a ConfigError if a group has no gradient while another has, or if none ever had one."""
        for index, group in enumerate(self.param_groups):
            if index in updated or not any(p.requires_grad for p in group["params"]):
                continue
            name = next(info.name for info in self._param_infos(index))
            if updated:
                raise ConfigError(
                    f"Muon: no parameter of group {index} has a gradient ({name}, …), while other groups "
                    "have; let the loss depend on it, or freeze it by requires_grad_(False)"
                )
            if not self._has_updated:
                raise ConfigError(
                    f"Muon: no parameter has a gradient in the first step ({name}, …); call backward before "
                    "it, and make the optimizer after fully_shard, which replaces the parameters"
                )
        self._has_updated |= bool(updated)

    def _apply(self, group: dict[str, Any], updates: list[tuple[ParamInfo, Tensor]]) -> None:
        """Apply the weight decay, and subtract the updates."""
        lr, decay = group["lr"], group["weight_decay"]
        params, rated = [], []
        for info, update in updates:
            if update.numel():
                if isinstance(lr, Tensor):  # which is not read back from the device
                    lr = lr.reshape(()).to(update.device)
                params.append(local(info.p))
                rated.append((update, lr * _ratio(group, info.shapes[0])))
            else:  # make the momentum all the same: a checkpoint saves it on every rank
                self._momentum(info)
        if params:
            # Two roundings, as torch's. A factor of 1 − γ·λ would be rounded to a parameter's bfloat16.
            torch._foreach_sub_(params, torch._foreach_mul(params, lr * decay))
            torch._foreach_sub_(params, [update.float() * rate for update, rate in rated])


def _ratio(group: dict[str, Any], shape: torch.Size) -> float:
    """The ratio of the learning rate of a matrix of this shape to the group's."""
    n, m = shape
    return _RATIOS[group["adjust_lr_fn"]](max(n, 1), max(m, 1))


def _exchange(ranks: Any, infos: list[ParamInfo], groups: int) -> Exchange | None:
    """The messages among ``ranks``, a group or a mesh; None if there are none.

    Args:
        groups: the number of parameter groups that ``ranks`` share. A rank with more groups than the others
            would wait for them, so the ranks compare it.
    """
    if ranks is None or ranks.size() == 1:
        messages([info.name for info in infos], [[info.part] for info in infos], [0] * len(infos))  # checks
        return None
    group = ranks if isinstance(ranks, dist.ProcessGroup) else _group_of(ranks)
    matrices = [
        (info.name, info.part._replace(mesh=None), f"{info.description} of {groups}") for info in infos
    ]
    return Exchange(group, matrices, [info.cost for info in infos], infos[0].p.device)


def _check_group(group: dict[str, Any]) -> None:
    """Raise a ConfigError if an argument of a parameter group is invalid."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ConfigError(f"Muon: lr is a tensor of {lr.numel()} elements, expected 1")
    for name in ("lr", "momentum", "weight_decay"):
        if not group[name] >= 0:
            raise ConfigError(f"Muon: {name} is {group[name]}, expected at least 0")
    if group["adjust_lr_fn"] not in _RATIOS:
        expected = ", ".join(map(repr, filter(None, _RATIOS)))
        raise ConfigError(f"Muon: adjust_lr_fn is {group['adjust_lr_fn']!r}, expected None, {expected}")
    coefficients_per_step(group["ns_coefficients"], group["ns_steps"])


def _gradient_state(info: ParamInfo) -> GradientState:
    grad = info.p.grad
    if grad is not None and grad.layout != torch.strided:
        return GradientState.SPARSE
    if grad is not None and _placements(grad) != _placements(info.p):
        return GradientState.MISPLACED
    if not info.part.numel and 0 not in info.part.whole:
        return GradientState.EMPTY
    return GradientState.ABSENT if grad is None else GradientState.PRESENT


def _placements(t: Tensor) -> str:
    """The placements of a DTensor, "" of another tensor."""
    return str(t.placements) if is_dtensor(t) else ""  # type: ignore[attr-defined]


def _group_of(mesh: Any) -> dist.ProcessGroup:
    """The group of all ranks of a mesh."""
    dims = [dim for dim in range(mesh.ndim) if mesh.size(dim) > 1]
    if len(dims) == 1:
        return mesh.get_group(dims[0])  # type: ignore[no-any-return]
    ranks = sorted(mesh.mesh.flatten().tolist())
    if len(ranks) == dist.get_world_size():
        return dist.group.WORLD  # type: ignore[return-value]
    return dist.new_group(ranks, use_local_synchronization=True)  # type: ignore[return-value]
