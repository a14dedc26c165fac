# SPDX-License-Identifier: MIT
"""Optimizers of the examples and benchmarks: SGD, and Muon with SGD."""

from functools import partial
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from torchpar.optim import ChainedOptimizer, Muon


def sgd(
    model: torch.nn.Module,
    lr: float,
    momentum: float,
    weight_decay: float,
    decay_biases: bool = False,
    fused: bool | None = None,
    foreach: bool | None = None,
) -> torch.optim.SGD:
    """Return SGD with Nesterov momentum and an L2 penalty ``λ/2·‖p‖²`` of the weights.

    Args:
        weight_decay: λ.
        decay_biases: count the biases in the penalty, too.
        fused: as for `torch.optim.SGD`; with True an update is one pass over a parameter's memory.
        foreach: as for `torch.optim.SGD`; False for `torchpar.exact.mode`.
    """
    groups = [{"params": list(model.parameters()), "weight_decay": weight_decay}]
    if weight_decay and not decay_biases:
        weights = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() <= 1]
        groups = [
            {"params": weights, "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
    options: dict[str, Any] = {"fused": fused, "foreach": foreach}
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0, **options)


def muon(
    model: torch.nn.Module,
    lr: float,
    momentum: float,
    weight_decay: float,
    ns_steps: int = 5,
    mesh: DeviceMesh | None = None,
    foreach: bool | None = None,
) -> ChainedOptimizer:
    """Return `torchpar.optim.Muon` for all weight matrices of an MLP and SGD for its biases.

    Muon also gets the output layer, which trains an MLP as well; see
    `torchpar.optim.Muon.for_model`.

    Args:
        weight_decay: λ of the weights, decoupled: ``W ← (1 − lr·λ)·W``.
        ns_steps: iterations of Newton–Schulz.
        mesh: the ranks that have the model, or shards of its layers, and divide Muon's work.
        foreach: as for `torch.optim.SGD`; False for `torchpar.exact.mode`.
    """
    of_biases: dict[str, Any] = {"lr": lr, "momentum": momentum, "nesterov": momentum > 0}
    return Muon.for_model(
        model,
        lr,
        momentum=momentum,
        weight_decay=weight_decay,
        ns_steps=ns_steps,
        process_group=mesh,
        others=partial(torch.optim.SGD, **of_biases, foreach=foreach),
        overrides={name: "muon" for name, p in model.named_parameters() if p.dim() == 2},
    )
