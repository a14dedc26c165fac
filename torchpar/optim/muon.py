# SPDX-License-Identifier: MIT
"""The Muon optimizer on symmetric matrix products, for parameters that one rank has, or many.

Muon replaces the momentum M = U·Σ·Vᵀ of a weight by a matrix near U·Vᵀ, which `orthogonalize` computes.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.optimizer import Optimizer, ParamsT

from torchpar.errors import ConfigError
from torchpar.optim.assign import Choice, ModelOptimizer, View, chain
from torchpar.optim.exchange import Exchange, Part, holders_of, local, part_of
from torchpar.optim.newton_schulz import (
    COEFFICIENTS,
    Coefficients,
    NewtonSchulz,
    check_ns,
    orthogonalize,
    per_step,
)

_BATCH_MULTIPLICATIONS = 2**31  # in X·Xᵀ; they take a GPU about as long as a launch
# On a GPU the launches of a small matrix take longer than its products. With zeros around it, which change no
# singular value, it shares the launches of other small ones. On a CPU the zeros cost more than they save.
_PADDED_ON = "cuda"
_PADDED = 64  # rows and columns: padded to a multiple
_SMALL = 2**24  # multiplications in X·Xᵀ

# The factor of the learning rate of a matrix (n, m), by the names of `torch.optim.Muon`.
_RATIOS: dict[str | None, Callable[[int, int], float]] = {
    None: lambda n, m: math.sqrt(max(1.0, n / m)),
    "original": lambda n, m: math.sqrt(max(1.0, n / m)),
    "match_rms_adamw": lambda n, m: 0.2 * math.sqrt(max(n, m)),
    "spectral_unclamped": lambda n, m: math.sqrt(n / m),
}


@dataclass(frozen=True)
class _Item:
    """A parameter, of the group with index ``group``, and what this rank has of it."""

    name: str
    group: int
    p: Tensor
    part: Part
    view: View | None

    def matrices(self, t: Tensor) -> list[Tensor]:
        """The matrices of ``t``, which has the shape of the whole parameter; views of it."""
        found = t if self.view is None else self.view(t)
        found = [found] if isinstance(found, Tensor) else list(found)
        return [matrix for one in found for matrix in _two_dims(one)]

    @cached_property
    def shapes(self) -> list[torch.Size]:
        return [t.shape for t in self.matrices(torch.empty(self.part.whole, device="meta"))]


class Muon(Optimizer):
    """`torch.optim.Muon` on symmetric matrix products, with the same arguments and state dict.

    ``B ← μ·B + (1−μ)·g``, ``W ← (1 − γ·λ)·W − γ'·orthogonalize(g + μ·(B − g))``, or ``orthogonalize(B)``
    without Nesterov. γ' is γ adjusted to the shape of W. With ``ns="standard"`` the updates are
    `torch.optim.Muon`'s up to bfloat16 rounding. The default "auto" is less accurate for matrices with one
    side at least twice the other, see `orthogonalize`.

    Matrices of one shape are orthogonalised together, until a batch fills a device. On one rank a step reads
    nothing back from the device.

    **Several ranks.** A parameter may be whole, a DTensor of any placement, such as one of `fully_shard`, or
    of one of torchpar's split layers. Each matrix is orthogonalised by one of the ranks that have it, and the
    work is shared out evenly. A step makes two all-to-alls in bfloat16 for each mesh, and holds no more than
    its share of the whole matrices (`torchpar.optim.exchange`). With ``ns="standard"`` the parameters have
    the bits of unsplit ones, on a CPU. State is saved and loaded as of any optimizer: a momentum lies where
    its parameter does.

    Give Muon the hidden weight matrices only. `for_model` finds them, and gives another optimizer the
    embeddings, the output head, biases and norms.

    Args:
        params, lr, weight_decay, momentum, nesterov, eps, ns_steps, adjust_lr_fn: as in `torch.optim.Muon`.
        ns_coefficients: as in `orthogonalize`: one triple, one for each iteration, or "polar_express".
        ns: the Newton–Schulz iteration, "auto", "standard" or "gram", see `orthogonalize`.
        views: for parameters that are no matrix, or several, how each is seen as matrices, by name. The
            parameters need names: give ``model.named_parameters()``.
        process_group: a group, or a mesh, of ranks that share the work and have all parts of each parameter.
            By default a parameter's own mesh, and no other rank for a whole one. Under
            `torch.nn.parallel.DistributedDataParallel` name the ranks that hold the same parameters.

    Raises:
        ConfigError: a parameter that is no matrix and has no view; a view that is none; ``ns``, ``views`` or
            ``process_group`` in a parameter group; an argument that `torch.optim.Muon` refuses; ranks that
            have other parameters. It is a ValueError, and names the parameter.
    """

    ns: NewtonSchulz = "auto"
    views: Mapping[str, View]
    process_group: dist.ProcessGroup | DeviceMesh | None = None  # of a copy it is None

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
        self.ns = ns
        self.views = views or {}
        self.process_group = process_group
        self._plan: list[tuple[list[_Item], Exchange | None]] | None = None
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
        names = {item.name for item in self._items()}
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
        1.bias     64      AdamW      no matrix
        3.weight   100×64  AdamW      output head, the last linear layer
        3.bias     100     AdamW      no matrix

        Muon takes the weights of linear layers, of convolutions (each kernel as a row), and of
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
        return {**super().__getstate__(), "ns": self.ns, "views": self.views}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # called for a copy, and by load_state_dict, which keeps the parameters
        planned = {id(item.p) for items, _ in self.__dict__.get("_plan") or () for item in items}
        if planned != {id(p) for group in self.param_groups for p in group["params"]}:
            self._plan = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters. Every rank must do so."""
        if own := {"ns", "views", "process_group"} & param_group.keys():
            raise ConfigError(f"Muon: {sorted(own)[0]} applies to the whole optimizer, not to a group")
        super().add_param_group(param_group)
        self._plan = None
        try:
            _check_group(self.param_groups[-1])
            for item in self._items(len(self.param_groups) - 1):
                _check_item(item)
        except ValueError:
            self.param_groups.pop()
            raise

    def _items(self, first: int = 0) -> Iterator[_Item]:
        """The parameters of the groups from ``first`` on."""
        for index, group in enumerate(self.param_groups[first:], first):
            names = group.get("param_names")
            for i, p in enumerate(group["params"]):
                name = names[i] if names else f"parameter {i} of group {index}"
                try:
                    part, _ = part_of(p)
                except ConfigError as e:
                    raise ConfigError(f"Muon: {name}: {e}") from e
                yield _Item(name, index, p, part, self.views.get(name))

    def _plans(self) -> list[tuple[list[_Item], Exchange | None]]:
        """The parameters that are exchanged together, with their exchange; None for those that need none."""
        if self._plan is None:
            by_ranks: dict[Any, list[_Item]] = {}
            for item in self._items():
                by_ranks.setdefault(self.process_group or part_of(item.p)[1], []).append(item)
            self._plan = [(items, self._exchange(ranks, items)) for ranks, items in by_ranks.items()]
        return self._plan

    def _exchange(self, ranks: Any, items: list[_Item]) -> Exchange | None:
        if ranks is None or ranks.size() == 1:
            for item in items:
                holders_of(item.name, [item.part])
            return None
        group = ranks if isinstance(ranks, dist.ProcessGroup) else _group_of(ranks)
        costs = [sum(map(_multiplications, item.shapes)) for item in items]
        names, parts = [item.name for item in items], [item.part for item in items]
        settings = [self._settings(item) for item in items]
        return Exchange(group, names, parts, settings, costs, items[0].p.device)

    def _settings(self, item: _Item) -> str:
        """The matrices of a parameter, and how they are orthogonalised: the same on all ranks."""
        group = self.param_groups[item.group]
        iteration = ", ".join(f"{name} {group[name]}" for name in ("ns_steps", "eps", "ns_coefficients"))
        shapes = [tuple(shape) for shape in item.shapes]
        return f"matrices {shapes}, group {item.group}, {self.ns}, {iteration}"

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; returns the loss of ``closure``, which computes the gradients, or None.

        Raises:
            ConfigError: a gradient that only some ranks have, or a group without any gradient while another
                has some, on every rank. A sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        updates: list[tuple[_Item, Tensor]] = []
        for items, exchange in self._plans():
            directions = self._directions(items)
            if exchange is None:
                found = self._orthogonalized(items, {i: t for i, t in enumerate(directions) if t is not None})
                updates += [(items[i], t) for i, t in found.items()]
                empty = [item for item in items if item.p.grad is not None and not item.p.numel()]
                updates += [(item, item.p) for item in empty]
            else:
                found = self._orthogonalized(items, exchange.gather(directions))
                parts = exchange.scatter(found)
                updates += [(item, t) for item, t in zip(items, parts, strict=True) if t is not None]
        self._check_no_group_is_left_out(updates)
        self._apply(updates)
        return loss

    def _directions(self, items: list[_Item]) -> list[Tensor | None]:
        """The momentum of each parameter, after its update, and with Nesterov's correction; on this rank."""
        directions: list[Tensor | None] = [None] * len(items)
        by_group: dict[int, list[int]] = {}
        for i, item in enumerate(items):
            if item.p.grad is not None and item.part.shape.numel():
                by_group.setdefault(item.group, []).append(i)
        for index, chosen in by_group.items():
            group = self.param_groups[index]
            grads = [self._gradient(items[i]) for i in chosen]
            momenta = [self._momentum(items[i].p) for i in chosen]
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            if group["nesterov"]:
                momenta = torch._foreach_lerp(grads, momenta, group["momentum"])  # type: ignore[assignment]
            for i, t in zip(chosen, momenta, strict=True):
                directions[i] = t
        return directions

    def _gradient(self, item: _Item) -> Tensor:
        grad, p = item.p.grad, item.p
        assert grad is not None
        if grad.is_sparse:
            raise ConfigError(f"Muon: {item.name} has a sparse gradient, expected a dense one")
        if getattr(grad, "placements", None) != getattr(p, "placements", None):  # such as partial sums
            grad = grad.redistribute(placements=p.placements)  # type: ignore[attr-defined]
        return local(grad).to(p.dtype)

    def _momentum(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return local(state["momentum_buffer"])

    def _orthogonalized(self, items: list[_Item], whole: dict[int, Tensor]) -> dict[int, Tensor]:
        """The orthogonalised ``whole`` parameters, bfloat16, by their indices in ``items``."""
        by_kind: dict[Any, list[tuple[int, Tensor]]] = {}
        results: dict[int, Tensor] = {}
        for i, t in whole.items():
            if items[i].view is not None:
                # A view of other strides than the parameter's usual ones could be a copy.
                results[i] = t = t.to(torch.bfloat16, copy=True, memory_format=torch.contiguous_format)
            for matrix in items[i].matrices(t):
                kind = items[i].group, _batch_shape(matrix), t.dtype, t.device
                by_kind.setdefault(kind, []).append((i, matrix))
        for (index, shape, *_), matrices in by_kind.items():
            group = self.param_groups[index]
            size = max(_BATCH_MULTIPLICATIONS // max(_multiplications(shape), 1), 1)
            for first in range(0, len(matrices), size):
                batch = matrices[first : first + size]
                x = _stack([matrix for _, matrix in batch], shape)
                x = orthogonalize(x, group["ns_coefficients"], group["ns_steps"], group["eps"], self.ns)
                for (i, matrix), padded in zip(batch, x.view(len(batch), *shape), strict=True):
                    update = padded[: matrix.shape[0], : matrix.shape[1]]
                    if items[i].view is None:
                        results[i] = update
                    else:
                        ratio = self._ratio(items[i], matrix.shape) / self._ratio(items[i])
                        matrix.copy_(update if ratio == 1 else update * ratio)
        return results

    def _ratio(self, item: _Item, shape: torch.Size | None = None) -> float:
        """The ratio of a matrix's learning rate to the group's, by default for the first of its parameter."""
        n, m = item.shapes[0] if shape is None else shape
        return _RATIOS[self.param_groups[item.group]["adjust_lr_fn"]](max(n, 1), max(m, 1))

    def _check_no_group_is_left_out(self, updates: list[tuple[_Item, Tensor]]) -> None:
        updated = {item.group for item, _ in updates}
        for index, group in enumerate(self.param_groups):
            if updated and index not in updated and any(p.requires_grad for p in group["params"]):
                name = next(item.name for item in self._items(index))
                raise ConfigError(
                    f"Muon: no parameter of group {index} has a gradient ({name}, …), while other groups "
                    "have; let the loss depend on it, or freeze it by requires_grad_(False)"
                )

    def _apply(self, updates: list[tuple[_Item, Tensor]]) -> None:
        """Decay the parameters and move them against their updates."""
        by_rate: dict[tuple[int, float], list[tuple[Tensor, Tensor]]] = {}
        for item, update in updates:
            if update.numel():
                pair = local(item.p), update
                by_rate.setdefault((item.group, self._ratio(item)), []).append(pair)
            else:  # a checkpoint saves the momentum on every rank
                self._momentum(item.p)
        for (index, ratio), pairs in by_rate.items():
            lr, decay = self.param_groups[index]["lr"], self.param_groups[index]["weight_decay"]
            params, moves = [list(column) for column in zip(*pairs, strict=True)]
            if isinstance(lr, Tensor):  # as `alpha` it would be read back from the device
                lr = lr.reshape(()).to(params[0].device)
                torch._foreach_mul_(params, 1 - lr * decay)
                torch._foreach_sub_(params, [move.float() * (lr * ratio) for move in moves])
            else:  # on a CPU `_foreach_mul_` would first round a number to the parameters' dtype
                torch._foreach_add_(params, params, alpha=-lr * decay)
                moves = [move.to(p.dtype) for p, move in pairs]
                torch._foreach_add_(params, moves, alpha=-lr * ratio)


def _check_group(group: dict[str, Any]) -> None:
    """Raise a ConfigError for an argument that Muon cannot have."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ConfigError(f"Muon: lr is a tensor of {lr.numel()} elements, expected 1")
    for name in ("lr", "momentum", "weight_decay"):
        if not group[name] >= 0:
            raise ConfigError(f"Muon: {name} is {group[name]}, expected at least 0")
    if group["adjust_lr_fn"] not in _RATIOS:
        expected = ", ".join(map(repr, filter(None, _RATIOS)))
        raise ConfigError(f"Muon: adjust_lr_fn is {group['adjust_lr_fn']!r}, expected None, {expected}")
    per_step(group["ns_coefficients"], group["ns_steps"])


def _check_item(item: _Item) -> None:
    """Raise a ConfigError unless the parameter is a matrix, or has a view."""
    shape = item.part.whole
    if not item.p.is_floating_point():
        raise ConfigError(f"Muon: {item.name} is {item.p.dtype}, expected floating")
    if item.view is None:
        if len(shape) != 2:
            raise ConfigError(
                f"Muon: {item.name} has shape {shape}, expected 2D, a matrix; name a view of it in views, or "
                "give it to another optimizer, as Muon.for_model does"
            )
        return
    counted = torch.zeros(shape, dtype=torch.int8)
    matrices = item.matrices(counted)
    for matrix in matrices:
        matrix.add_(1)
    if not counted.eq(1).all() or any(matrix.dim() != 2 for matrix in matrices):
        raise ConfigError(
            f"Muon: the view of {item.name} returns {[tuple(m.shape) for m in matrices]}, expected views "
            f"(*, n, m) that have each element of {shape} once"
        )


def _group_of(mesh: Any) -> dist.ProcessGroup:
    """The group of all ranks of a mesh."""
    if mesh.ndim == 1:
        return mesh.get_group()  # type: ignore[no-any-return]
    ranks = sorted(mesh.mesh.flatten().tolist())
    if len(ranks) == dist.get_world_size():
        return dist.group.WORLD  # type: ignore[return-value]
    return dist.new_group(ranks, use_local_synchronization=True)  # type: ignore[return-value]


def _two_dims(t: Tensor) -> Sequence[Tensor]:
    return [t] if t.dim() <= 2 else t.flatten(0, -3).unbind()


def _batch_shape(matrix: Tensor) -> torch.Size:
    """The shape to which a matrix is padded to share a batch."""
    padded = torch.Size(-(-size // _PADDED) * _PADDED for size in matrix.shape)
    pads = matrix.device.type == _PADDED_ON and _multiplications(padded) <= _SMALL
    return padded if pads else matrix.shape


def _stack(matrices: list[Tensor], shape: torch.Size) -> Tensor:
    if any(matrix.shape != shape for matrix in matrices):
        x = matrices[0].new_zeros(len(matrices), *shape)
        for padded, matrix in zip(x, matrices, strict=True):
            padded[: matrix.shape[0], : matrix.shape[1]] = matrix
        return x
    # On a CPU a product of a batch of one takes up to twice the time of a product of matrices.
    return torch.stack(matrices) if len(matrices) > 1 else matrices[0]


def _multiplications(shape: torch.Size) -> int:
    """Multiplications in X·Xᵀ of each matrix, with the shorter side as rows."""
    return shape.numel() * min(shape[-2:])
