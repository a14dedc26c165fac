# SPDX-License-Identifier: MIT
"""Muon for the hidden matrices of a model, and another optimizer for its other parameters."""

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from torchpar.errors import ConfigError
from torchpar.ops._library import is_dtensor
from torchpar.optim.chained import ChainedOptimizer
from torchpar.optim.matrices import View

Choice = Literal["muon", "others"]

_CONVOLUTIONS = (nn.modules.conv._ConvNd,)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
_EMBEDDING_NAMES = ("emb", "pos", "token")  # in names of parameters that belong to no layer


class Assignment(NamedTuple):
    """A parameter, the optimizer that takes it, and why."""

    name: str
    p: Tensor
    choice: Choice
    reason: str
    view: View | None = None


class ModelOptimizer(ChainedOptimizer):
    """A chain of Muon and another optimizer, which prints the parameters of each.

    Attributes:
        assignments: of the model's parameters, in their order.
    """

    def __init__(self, assignments: list[Assignment], *optimizers: Optimizer):
        self.assignments = assignments
        super().__init__(*optimizers)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "assignments": self.assignments}

    def __repr__(self) -> str:
        names = {"muon": type(self.optimizers[0]).__name__, "others": type(self.optimizers[-1]).__name__}
        rows = [("parameter", "shape", "optimizer", "reason")]
        for one in self.assignments:
            shape = "×".join(map(str, one.p.shape))
            rows.append((one.name, shape, names[one.choice], one.reason))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        return "\n".join(lines)


def assign(model: nn.Module, overrides: Mapping[str, Choice], views: Mapping[str, View]) -> list[Assignment]:
    """Choose an optimizer for each parameter of ``model``.

    Args:
        overrides, views: keyed by names, or by patterns of `fnmatch`; of several that match, the last counts.

    Raises:
        ConfigError: a pattern that matches no parameter; an unknown choice.
    """
    owners: dict[Tensor, list[tuple[str, nn.Module]]] = {}
    for prefix, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            owners.setdefault(p, []).append((f"{prefix}.{name}".lstrip("."), module))
    head = _head(model)
    assignments = [_assign(used, p, head) for p, used in owners.items()]

    def has(one: Assignment, pattern: str) -> bool:
        return any(fnmatchcase(name, pattern) for name, _ in owners[one.p])  # a shared one has several names

    for pattern in (*overrides, *views):
        if not any(has(one, pattern) for one in assignments):
            raise ConfigError(f"Muon.for_model: no parameter is named {pattern}")
    for pattern, view in views.items():
        assignments = [
            one._replace(choice="muon", reason="has a view", view=view) if has(one, pattern) else one
            for one in assignments
        ]
    for pattern, choice in overrides.items():
        if choice not in ("muon", "others"):
            raise ConfigError(f"Muon.for_model: {pattern} goes to {choice!r}, expected 'muon' or 'others'")
        assignments = [
            one._replace(choice=choice, reason="override") if has(one, pattern) else one
            for one in assignments
        ]
    return assignments


def _assign(used: list[tuple[str, nn.Module]], p: Tensor, head: nn.Module | None) -> Assignment:
    name, module = used[0]
    modules = [module for _, module in used]
    if is_dtensor(p) and hasattr(module, "split_axes"):
        raise ConfigError(
            f"Muon.for_model: {name} is a DTensor of a ColumnParallelLinear or RowParallelLinear; under "
            "fully_shard, split the layer by parallelize_module instead"
        )

    def others(reason: str) -> Assignment:
        return Assignment(name, p, "others", reason)

    if any(isinstance(module, _EMBEDDINGS) for module in modules):
        return others("embedding" if len(used) == 1 else "embedding, shared with another layer")
    if isinstance(module, _NORMS):
        return others("normalization")
    if p.dim() < 2 or min(p.shape) <= 1 == p.dim() - 1:
        return others("not a matrix")
    if head in modules:
        return others("output head, the last linear layer")
    if isinstance(module, _CONVOLUTIONS):
        return Assignment(
            name, p, "muon", f"convolution, seen as {p.shape[0]}×{p[0].numel()}", _by_first_axis
        )
    if isinstance(module, nn.MultiheadAttention) and name.endswith("in_proj_weight"):
        return Assignment(name, p, "muon", "query, key and value, seen as 3 matrices", _in_thirds)
    if p.dim() > 2:
        return others("not a matrix; give a view")
    if not _is_linear(module) and _is_named_as_embedding(name):
        return others("named as an embedding")
    return Assignment(name, p, "muon", "hidden matrix")


def _is_named_as_embedding(name: str) -> bool:
    """Return True if a parameter that belongs to no layer is named as an embedding."""
    words = name.rpartition(".")[2].lower().split("_")
    return any(word.startswith(start) for word in words for start in _EMBEDDING_NAMES)


def _by_first_axis(p: Tensor) -> Tensor:
    """A convolution's kernels as a matrix; its first axis are the rows."""
    return p.flatten(1)


def _in_thirds(p: Tensor) -> Tensor:
    return p.view(3, -1, p.shape[1])


def _is_linear(module: nn.Module) -> bool:
    return hasattr(module, "in_features") and hasattr(module, "out_features") and hasattr(module, "weight")


def _head(model: nn.Module) -> nn.Module | None:
    """The last linear layer, unless it is in one of several blocks of a kind."""
    linear = [path for path, module in model.named_modules() if path and _is_linear(module)]
    if not linear:
        return None
    path = linear[-1]
    parts = path.split(".")
    for depth in range(1, len(parts)):
        parent, block = (model.get_submodule(".".join(parts[:end])) for end in (depth - 1, depth))
        if sum(_kinds(child) == _kinds(block) for child in parent.children()) > 1:
            return None
    return model.get_submodule(path)


def _kinds(module: nn.Module) -> list[tuple[str, type]]:
    return [(name, type(child)) for name, child in module.named_modules()]


def chain(
    make_muon: Callable[..., Optimizer],
    model: nn.Module,
    others: Callable[[Iterable[Any]], Optimizer],
    overrides: Mapping[str, Choice],
    views: Mapping[str, View],
) -> ModelOptimizer:
    """Make both optimizers of `Muon.for_model`, which documents the arguments."""
    assignments = assign(model, overrides, views)
    by_choice: dict[Choice, list[tuple[str, Tensor]]] = {"muon": [], "others": []}
    for one in assignments:
        by_choice[one.choice].append((one.name, one.p))
    if not by_choice["muon"]:
        raise ConfigError(
            "Muon.for_model: the model has no hidden matrix; take another optimizer, or overrides"
        )
    chosen = {one.name: one.view for one in assignments if one.view and one.choice == "muon"}
    optimizers = [make_muon(by_choice["muon"], views=chosen)]
    # Only matrices decay: a norm's scale that shrank would be scaled up again by the next layer.
    matrices = {"params": [(name, p) for name, p in by_choice["others"] if p.dim() > 1]}
    vectors = {"params": [(name, p) for name, p in by_choice["others"] if p.dim() <= 1], "weight_decay": 0.0}
    if groups := [group for group in (matrices, vectors) if group["params"]]:
        optimizers.append(others(groups))
    return ModelOptimizer(assignments, *optimizers)
