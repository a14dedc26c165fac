# SPDX-License-Identifier: MIT
"""Formulas of PyTorch's optimizers, to compare with: one step of one matrix in float64."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchpar.optim.muon import Muon
from torchpar.optim.newton_schulz import coefficients_per_step

State = dict[str, Any]
Settings = Mapping[str, Any]


class Formula(NamedTuple):
    """An optimizer's formula, which `check_optimizer` compares it with.

    Attributes:
        name: for the table.
        step: ``step(weight, gradient, state, settings)`` returns the next weight. Both tensors are
            float64, and are not changed; ``state`` is a dictionary of the matrix, empty at first;
            ``settings`` are those of its parameter group. ``settings["rounded"]`` is a function of
            a tensor. Apply it to numbers that the optimizer rounds within its step and whose errors
            grow, as in an iteration. It returns the tensor unchanged, or with random errors where
            the effect of rounding is measured.
        dtype: the coarsest dtype to which the optimizer rounds, if its parameters are float32.
    """

    name: str
    step: Callable[[Tensor, Tensor, State, Settings], Tensor]
    dtype: torch.dtype = torch.float32

    @property
    def precision(self) -> float:
        """The relative distance of neighboring numbers of ``dtype``."""
        return float(torch.finfo(self.dtype).eps)


def sgd(weight: Tensor, gradient: Tensor, state: State, settings: Settings) -> Tensor:
    """``g ← g + λ·W``, ``v ← μ·v + (1−τ)·g``, ``W ← W − γ·v``.

    With Nesterov, ``W ← W − γ·(g + μ·v)``. λ is the weight decay, μ the momentum, τ the dampening
    and γ the learning rate. The first v is g.
    """
    momentum = settings["momentum"]
    update = _decayed(weight, gradient, settings)
    if momentum:
        earlier = state.get("velocity")
        velocity = (
            update if earlier is None else momentum * earlier + (1 - settings["dampening"]) * update
        )
        state["velocity"] = velocity
        update = update + momentum * velocity if settings["nesterov"] else velocity
    following: Tensor = weight - float(settings["lr"]) * update
    return following


def adam(weight: Tensor, gradient: Tensor, state: State, settings: Settings) -> Tensor:
    """``m ← β₁·m + (1−β₁)·g``, ``v ← β₂·v + (1−β₂)·g²``, ``W ← W − γ·m̂ / (√v̂ + ε)``.

    In step t, ``m̂ = m / (1−β₁ᵗ)`` and ``v̂ = v / (1−β₂ᵗ)``; with AMSGrad v̂ has the largest v until
    now. The weight decay adds λ·W to g, or, if it is decoupled as in AdamW, first scales W by
    1 − γ·λ.
    """
    lr, (beta1, beta2) = float(settings["lr"]), map(float, settings["betas"])
    if settings["decoupled_weight_decay"]:
        g = -gradient if settings["maximize"] else gradient
        weight = weight - lr * settings["weight_decay"] * weight
    else:
        g = _decayed(weight, gradient, settings)
    steps = state["steps"] = state.get("steps", 0) + 1
    mean = state["mean"] = beta1 * state.get("mean", 0.0) + (1 - beta1) * g
    square = state["square"] = beta2 * state.get("square", torch.zeros_like(g)) + (1 - beta2) * g**2
    if settings["amsgrad"]:
        square = state["largest"] = torch.maximum(square, state.get("largest", square))
    root = (square / (1 - beta2**steps)).sqrt() + settings["eps"]
    following: Tensor = weight - lr * mean / (1 - beta1**steps) / root
    return following


def muon(weight: Tensor, gradient: Tensor, state: State, settings: Settings) -> Tensor:
    """``B ← μ·B + (1−μ)·g``, ``W ← (1 − γ·λ)·W − γ·r·NS(g + μ·(B − g))``.

    Without Nesterov, NS(B) replaces NS(g + μ·(B − g)). NS iterates
    ``X ← a·X + b·(X·Xᵀ)·X + c·(X·Xᵀ)²·X`` from ``X / max(‖X‖, ε)``, and r is the ratio of
    ``adjust_lr_fn``. Weights of more than two axes are flattened to matrices with the rows of the
    first axis.
    """
    lr, momentum = float(settings["lr"]), settings["momentum"]
    average = momentum * state.get("average", 0.0) + (1 - momentum) * gradient
    state["average"] = average
    x = gradient + momentum * (average - gradient) if settings["nesterov"] else average
    rounded = settings["rounded"]
    x = rounded(x.flatten(1) / max(float(x.norm()), settings["eps"]))
    n, m = x.shape
    for a, b, c in coefficients_per_step(settings["ns_coefficients"], settings["ns_steps"]):
        gram = rounded(x @ x.T if n <= m else x.T @ x)
        change = rounded(b * gram + c * gram @ gram)
        x = rounded(a * x + (change @ x if n <= m else x @ change))
    ratio = {
        "match_rms_adamw": 0.2 * math.sqrt(max(n, m)),
        "spectral_unclamped": math.sqrt(n / m),
    }.get(settings["adjust_lr_fn"], math.sqrt(max(1.0, n / m)))
    following: Tensor = (
        weight - lr * settings["weight_decay"] * weight - lr * ratio * x.view(weight.shape)
    )
    return following


def _decayed(weight: Tensor, gradient: Tensor, settings: Settings) -> Tensor:
    """The gradient of the loss with λ/2·‖W‖² added."""
    decay: Tensor = settings["weight_decay"] * weight
    return decay - gradient if settings["maximize"] else decay + gradient


FORMULAS: dict[type[torch.optim.Optimizer], Formula] = {
    torch.optim.SGD: Formula("SGD", sgd),
    torch.optim.Adam: Formula("Adam", adam),
    torch.optim.AdamW: Formula("AdamW", adam),
    torch.optim.Muon: Formula("Muon", muon, torch.bfloat16),
    Muon: Formula("Muon", muon, torch.bfloat16),
}


class ByFormula(torch.optim.Optimizer):
    """Take steps by a formula, with the parameter groups of other optimizers."""

    def __init__(
        self,
        groups: Iterable[Settings],
        formula: Formula,
        defaults: Settings,
        rounded: Callable[[Tensor], Tensor],
    ):
        self.formula, self.rounded = formula, rounded
        complete = [{**defaults, **group, "params": [*group["params"]]} for group in groups]
        super().__init__(
            [{key: x for key, x in group.items() if key != "param_names"} for group in complete], {}
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # noqa: ARG002  # PyTorch's signature
        for group in self.param_groups:
            settings = {**group, "rounded": self.rounded}
            for p in group["params"]:
                if p.grad is not None:
                    p.copy_(self.formula.step(p.clone(), p.grad.clone(), self.state[p], settings))


def defaults_of(kind: type[torch.optim.Optimizer]) -> Settings:
    """The settings that a parameter group may lack."""
    make: Any = kind  # whose arguments have defaults
    defaults: Settings = make([torch.zeros(1, 1, device="cpu")]).defaults
    return defaults
