# SPDX-License-Identifier: MIT
"""SGD with the same bits on every processor."""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class ExactSGD(torch.optim.SGD):
    """`torch.optim.SGD` with the same bits on any processor: each product and each sum is rounded once.

    `torch.optim.SGD` may fuse a product and a sum, which rounds once, or round each of them. Which it does
    depends on the processor and on an element's place in the tensor. The state dict is the same. With g the
    gradient, λ the weight decay and μ the momentum:

        g ← g + λ·p        m ← μ·m + g        p ← p − lr·(g + μ·m)

    The last is ``p − lr·m`` without ``nesterov``.

    Args:
        params: parameters or parameter groups.
        lr, momentum, weight_decay, nesterov: as for `torch.optim.SGD`.

    Raises:
        ValueError: a group with ``dampening`` or ``maximize``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ):
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # called by load_state_dict, too
        self._refuse_unsupported()

    def _refuse_unsupported(self) -> None:
        for group in self.param_groups:
            for name in ("dampening", "maximize"):
                if group[name]:
                    raise ValueError(f"{name} is {group[name]}, expected 0; take torch.optim.SGD")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. An option that is not supported raises a ValueError."""
        super().add_param_group(param_group)
        self._refuse_unsupported()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient; returns the loss of ``closure``, or None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if (update := p.grad) is None:
                    continue
                if group["weight_decay"]:
                    update = update + p * group["weight_decay"]
                if group["momentum"]:
                    state = self.state[p]
                    if state.get("momentum_buffer") is None:
                        state["momentum_buffer"] = torch.zeros_like(p)
                    momentum = state["momentum_buffer"].mul_(group["momentum"]).add_(update)
                    update = update + momentum * group["momentum"] if group["nesterov"] else momentum
                p.sub_(update * group["lr"])
        return loss
