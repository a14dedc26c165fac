# SPDX-License-Identifier: MIT
"""SGD in one call for each parameter group."""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import optimizer


class SGD(torch.optim.SGD):
    """`torch.optim.SGD` with ``fused=True`` and a short `step`: one call for all parameters of a group.

    With g the gradient, λ the weight decay and μ the momentum:

        g ← g + λ·p        m ← μ·m + g        p ← p − lr·(g + μ·m)

    The last is ``p − lr·m`` without ``nesterov``. The state dict is `torch.optim.SGD`'s. One flat tensor of
    all parameters would not be faster: the call takes a list.

    Args:
        params: parameters or parameter groups. Those of a group have one dtype and one device.
        lr, momentum, weight_decay, nesterov: as for `torch.optim.SGD`.
    """

    _unsupported: ClassVar[tuple[str, ...]] = ("dampening",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ):
        super().__init__(
            params, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, fused=True
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # called by load_state_dict, too
        self._refuse_unsupported()

    def _refuse_unsupported(self) -> None:
        for group in self.param_groups:
            for name in self._unsupported:
                if group[name]:
                    raise ValueError(f"{name} is {group[name]}, expected 0; take torch.optim.SGD")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. An option that is not supported raises a ValueError."""
        super().add_param_group(param_group)
        self._refuse_unsupported()

    def _update(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        was = torch.is_grad_enabled()
        torch.set_grad_enabled(False)  # half the time of a `with torch.no_grad()`
        try:
            for group in self.param_groups:
                params = [p for p in group["params"] if p.grad is not None]
                if params:
                    self._update_group(group, params)
        finally:
            torch.set_grad_enabled(was)
        return loss

    def _update_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Update the parameters of a group that have a gradient."""
        momenta = [self._momentum(p) for p in params] if group["momentum"] else []
        # The call takes the elements in memory order, whatever the strides.
        contiguous = [p.contiguous() for p in params]
        torch._fused_sgd_(
            contiguous,
            [p.grad.contiguous() for p in params if p.grad is not None],
            momenta,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            is_first_step=False,  # momenta begin at 0, which is the same without dampening
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
        )
        for p, updated in zip(params, contiguous, strict=True):
            if updated is not p:
                p.copy_(updated)

    _hooked_update = torch.optim.Optimizer.profile_hook_step(_update)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient; returns the loss of ``closure``, or None."""
        hooks = (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or optimizer._global_optimizer_pre_hooks
            or optimizer._global_optimizer_post_hooks
        )
        if hooks or torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
            return self._hooked_update(closure)
        return self._update(closure)

    # PyTorch would wrap `step` in hooks and a profiler's range, which take longer than a small step.
    step.hooked = True  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Remove the gradients, or set them to zero."""
        if not set_to_none:
            super().zero_grad(set_to_none=False)
            return
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def _momentum(self, p: Tensor) -> Tensor:
        state = self.state[p]
        momentum: Tensor | None = state.get("momentum_buffer")
        if momentum is None:
            momentum = torch.zeros_like(p)
        state["momentum_buffer"] = momentum = momentum.contiguous()
        return momentum
