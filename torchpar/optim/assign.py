# SPDX-License-Identifier: MIT
"""Muon for the hidden matrices of a model, and another optimizer for its other parameters."""

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchpar.errors import ConfigError
from torchpar.optim.chained import ChainedOptimizer
from torchpar.optim.matrices import View
from torchpar.optim.rules import Choice as Choice  # Muon's docstring and arguments name it
from torchpar.optim.rules import decide, uses_of


class Assignment(NamedTuple):
    """The optimizer that takes a parameter, and why; without the parameter, which sharding may replace."""

    name: str
    shape: torch.Size
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
            shape = "×".join(map(str, one.shape))
            rows.append((one.name, shape, names[one.choice], one.reason))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        return "\n".join(lines)


def assign(
    model: nn.Module, overrides: Mapping[str, Choice], views: Mapping[str, View]
) -> dict[Tensor, Assignment]:
    """Choose an optimizer for each parameter of ``model``.

    Args:
        overrides, views: keyed by names, or by patterns of `fnmatch`; of several that match, the last counts.

    Raises:
        ConfigError: a pattern that matches no parameter; an unknown choice.
    """
    uses = uses_of(model)
    assignments = {p: Assignment(used[0].name, p.shape, *decide(used)) for p, used in uses.items()}

    def change(pattern: str, **changes: Any) -> None:
        named = [p for p, used in uses.items() if any(fnmatchcase(use.name, pattern) for use in used)]
        if not named:
            raise ConfigError(f"Muon.for_model: no parameter is named {pattern}")
        assignments.update((p, assignments[p]._replace(**changes)) for p in named)

    for pattern, view in views.items():
        change(pattern, choice="muon", reason="has a view", view=view)
    for pattern, choice in overrides.items():
        if choice not in ("muon", "others"):
            raise ConfigError(f"Muon.for_model: {pattern} goes to {choice!r}, expected 'muon' or 'others'")
        change(pattern, choice=choice, reason="override")
    return assignments


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
    for p, one in assignments.items():
        by_choice[one.choice].append((one.name, p))
    if not by_choice["muon"]:
        raise ConfigError(
            "Muon.for_model: the model has no hidden matrix; take another optimizer, or overrides"
        )
    chosen = {one.name: one.view for one in assignments.values() if one.view and one.choice == "muon"}
    optimizers = [make_muon(by_choice["muon"], views=chosen)]
    # Only matrices decay: a norm's scale that shrank would be scaled up again by the next layer.
    matrices = {"params": [(name, p) for name, p in by_choice["others"] if p.dim() > 1]}
    vectors = {"params": [(name, p) for name, p in by_choice["others"] if p.dim() <= 1], "weight_decay": 0.0}
    if groups := [group for group in (matrices, vectors) if group["params"]]:
        optimizers.append(others(groups))
    return ModelOptimizer(list(assignments.values()), *optimizers)
