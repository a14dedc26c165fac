# SPDX-License-Identifier: MIT
"""SGD with the same bits on every processor."""

from typing import Any, ClassVar

from torch import Tensor

from torchpar.optim.sgd import SGD


class ExactSGD(SGD):
    """`torch.optim.SGD` with the same bits on any processor: each product and each sum is rounded once.

    `torch.optim.SGD` may fuse a product and a sum, which rounds once, or round each of them. Which it does
    depends on the processor and on an element's place in the tensor. The formulas and the state dict are
    those of `SGD`.

    Args:
        params: parameters or parameter groups.
        lr, momentum, weight_decay, nesterov: as for `torch.optim.SGD`.

    Raises:
        ValueError: a group with ``dampening`` or ``maximize``.
    """

    _unsupported: ClassVar[tuple[str, ...]] = ("dampening", "maximize")

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._step_supports_amp_scaling = False  # `torch.amp.GradScaler` unscales the gradients itself

    def _update_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for p in params:
            update = p.grad
            assert update is not None
            if group["weight_decay"]:
                update = update + p * group["weight_decay"]
            if group["momentum"]:
                momentum = self._momentum(p).mul_(group["momentum"]).add_(update)
                update = update + momentum * group["momentum"] if group["nesterov"] else momentum
            p.sub_(update * group["lr"])
