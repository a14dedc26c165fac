# SPDX-License-Identifier: MIT
"""Loss scaling for a model that is divided over ranks: all ranks skip a step together.

`torch.amp.GradScaler` skips the step of a rank whose own gradients are not finite. If a layer or
the layers are divided over ranks, the other ranks would step: the weights of one model would be
those of different steps, and an optimizer that exchanges messages would hang.
"""

import sys
from types import FrameType, SimpleNamespace
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from torchpar.errors import ConfigError
from torchpar.library.sharding import is_dtensor, local
from torchpar.parallel.launch.agreement import check_same_on_all_ranks
from torchpar.parallel.launch.world import World, check_world

_PLAIN = torch.amp.GradScaler
_DEEPEST = 8  # calls between a scaler's step and the optimizer's: schedulers and profilers wrap it
_divided: "WeakSet[torch.nn.Module]" = WeakSet()
_is_hooked = False


class GradScaler(torch.amp.GradScaler):
    """`torch.amp.GradScaler` whose ranks all skip a step if one of them found an infinity or NaN.

        found_inf = max over all ranks

    This costs one all-reduce of one number for each optimizer and step. Take it for any model that
    is divided over ranks: by `parallel_mlp`, by the parallel layers, by `fully_shard`, also of some
    of its layers, or in a pipeline. In a pipeline the last stage scales the loss, and all stages
    call `step` and `update`.

    Args:
        world: the ranks.
        options: those of `torch.amp.GradScaler`, the same on all ranks.

    Raises:
        ConfigError: ``world`` is no `World`; on every rank: options that differ.
    """

    def __init__(self, world: World, **options: Any):
        check_world("GradScaler", world)
        check_same_on_all_ranks(None, "the ranks' gradient scalers", options)
        super().__init__(world.device.type, **options)
        self._world = world
        if self._enabled:  # also on the stages of a pipeline that scale no loss
            self._lazy_init_scale_growth_tracker(world.device)

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, *args: Any, **options: Any
    ) -> dict[torch.device, Tensor]:
        # PyTorch takes either DTensors or plain tensors: give it this rank's shards.
        parameters = [_with_local_grad(p) for g in optimizer.param_groups for p in g["params"]]
        shards: Any = SimpleNamespace(param_groups=[{"params": parameters}])
        found = super()._unscale_grads_(shards, *args, **options)
        device = self._world.device
        shared = torch.zeros((), device=device)  # of a rank without gradients, too
        for one in found.values():
            shared = torch.maximum(shared, one.to(device))
        if self._world.world_size > 1:
            dist.all_reduce(shared, dist.ReduceOp.MAX)
        return {device: shared}


def _with_local_grad(p: Tensor) -> Tensor:
    """``p``, or for a DTensor a plain tensor that has this rank's shard of the gradient."""
    if p.grad is None or not is_dtensor(p.grad):
        return p
    gradient = local(p.grad)
    holder = gradient.detach()
    holder.grad = gradient
    return holder


def skip_together(module: torch.nn.Module) -> None:
    """Record that all ranks must skip a step of the module's parameters together.

    From the first call on, an optimizer that steps such parameters refuses PyTorch's scaler.
    """
    global _is_hooked
    _divided.add(module)
    if not _is_hooked:
        register_optimizer_step_pre_hook(_refuse_plain_scaler)
        _is_hooked = True


def _refuse_plain_scaler(optimizer: torch.optim.Optimizer, *_: object) -> None:
    if torch.compiler.is_compiling():
        return
    scaler = _calling_scaler()
    # FSDP's scaler and ours override what looks for infinities.
    if (
        scaler is None
        or not scaler.is_enabled()
        or type(scaler)._unscale_grads_ is not _PLAIN._unscale_grads_
    ):
        return
    # Asked now, since `fully_shard` replaces parameters.
    divided = {p for module in _divided for p in module.parameters()}
    if any(p in divided for group in optimizer.param_groups for p in group["params"]):
        raise ConfigError(
            "torch.amp.GradScaler skips a step only on the ranks that found an infinity, but the "
            "model is divided over ranks; take torchpar.parallel.GradScaler(world)"
        )


def _calling_scaler() -> torch.amp.GradScaler | None:
    """The scaler whose `step` has called an optimizer's; PyTorch does not tell the hooks of it."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_DEEPEST):
        if frame is None:
            return None
        if frame.f_code is _PLAIN.step.__code__:
            scaler: torch.amp.GradScaler = frame.f_locals["self"]
            return scaler
        frame = frame.f_back
    return None
