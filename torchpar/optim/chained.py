# SPDX-License-Identifier: MIT
"""Several optimizers as one."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


class ChainedOptimizer(Optimizer):
    """Optimizers of different parameters as one: with their groups and their state, and stepping in turn.

    Groups and state are the chain's from then on: its state dict is the one to save.
    """

    def __init__(self, *optimizers: Optimizer):
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        for optimizer in optimizers:
            self.state.update(optimizer.state)
        self.optimizers = optimizers
        self._share()

    def _share(self) -> None:
        if sum(len(optimizer.param_groups) for optimizer in self.optimizers) != len(self.param_groups):
            raise RuntimeError("ChainedOptimizer: one of its optimizers has another group; chain anew")
        groups = iter(self.param_groups)
        for optimizer in self.optimizers:
            optimizer.state = self.state
            optimizer.param_groups = [next(groups) for _ in optimizer.param_groups]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "optimizers": self.optimizers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # of a copy, or by load_state_dict
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "optimizers"):
            raise NotImplementedError(
                "ChainedOptimizer: add a group to one of its optimizers, and chain anew"
            )
        super().add_param_group(param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step of each; returns what ``closure``, which computes the gradients anew, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss
