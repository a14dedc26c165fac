# SPDX-License-Identifier: MIT
"""Pipeline parallelism: each rank holds consecutive layers, and micro-batches pass through them.

With p stages and m micro-batches a stage is idle for (p − 1)/(m + p − 1) of a step. Neighbouring stages
exchange activations in the forward pass and their gradients in the backward pass; nothing else travels.
"gpipe" runs all forward passes before the backward passes and keeps the activations of m micro-batches
(Huang et al., 2019). "1f1b" starts each backward pass as soon as it can and keeps those of at most p
(Narayanan et al., 2019). Both schedules are those of `torch.distributed.pipelining`.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from math import ceil
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn.functional import pad
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from torchpar.errors import ConfigError
from torchpar.nn import MLP
from torchpar.parallel.launch.world import World
from torchpar.parallel.split.reduction import all_reduce
from torchpar.profile.phases import phase

LossSum = Callable[[Tensor, Tensor], Tensor]  # outputs, labels → the loss summed over samples
PipelineSchedule = Literal["gpipe", "1f1b"]
_SCHEDULES: dict[str, Any] = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}


def stage_mlp(mlp: MLP, mesh: DeviceMesh) -> MLP:
    """Return this rank's stage of ``mlp``. The numbers of layers per stage differ by at most one.

    Args:
        mlp: whole or tensor-split. Its layers are shared, not copied, and keep their names.
        mesh: of one dimension, such as ``world.mesh["pp"]``.

    Raises:
        ConfigError: more stages than layers.
    """
    if mesh.size() > len(mlp.layers):
        raise ConfigError(
            f"pp {mesh.size()} makes more stages than the model has layers, {len(mlp.layers)}; "
            "take fewer stages or more --hidden layers"
        )
    mine = torch.arange(len(mlp.layers)).tensor_split(mesh.size())[mesh.get_local_rank()].tolist()
    stage = MLP(mlp.sizes, mlp.hidden, mlp.output, device="meta")
    stage.layers = torch.nn.Sequential(OrderedDict((str(i), mlp.layers[i]) for i in mine))
    return stage


def check_one_rank_per_gpu(world: World) -> None:
    """Raise ConfigError if ranks share a GPU: gloo, which connects such ranks, sends tensors of CPUs only."""
    if world.device.type == "cuda" and dist.get_backend(world.mesh.get_group("pp")) == "gloo":
        raise ConfigError("a pipeline on GPUs needs one rank per GPU; start fewer ranks or take cpu")


class Pipeline:
    """Forward and backward passes of a model whose layers are split over the mesh's "pp" dimension.

    Args:
        module: this rank's stage.
        world: its mesh's "pp" dimension holds the stages, and its "dp" dimension the replicas of each.
        schedule: "gpipe" or "1f1b".
        micro_batches: the number of equal parts of this rank's share of a batch. The last parts are
            padded with unlabelled samples, which do not contribute to the loss.

    Raises:
        ConfigError: fewer micro-batches than stages, an unknown schedule, or ranks that share a GPU.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        world: World,
        schedule: PipelineSchedule = "1f1b",
        micro_batches: int = 4,
    ):
        self.mesh = world.mesh["pp"]
        self.replicas = world.mesh["dp"]
        self.module = module
        self.micro_batches = micro_batches
        if schedule not in _SCHEDULES:
            raise ConfigError(f"schedule is {schedule!r}, expected one of {sorted(_SCHEDULES)}")
        if micro_batches < self.mesh.size():
            raise ConfigError(
                f"{micro_batches} micro-batches are fewer than the {self.mesh.size()} stages, some of which "
                "would always idle; take more micro-batches"
            )
        check_one_rank_per_gpu(world)
        self._kind = _SCHEDULES[schedule]
        self._schedule = cache(self._build)  # a schedule's receive buffers have one size
        self._loss_sum: LossSum | None = None
        self._scale = 1.0
        self._losses: list[Tensor] = []  # of the micro-batches of a step, unscaled

    def step(self, x: Tensor, labels: Tensor, global_size: int, loss_sum: LossSum) -> Tensor:
        """Run the forward and backward passes of this rank's share of a global batch.

        Every ``p.grad`` must be None before. It then holds the gradient of the global batch's mean loss.

        Args:
            x: ``(b, …)``, this rank's share; only the first stage reads it.
            labels: ``(b)`` int64, at least 0; only the last stage reads them. −1 marks padding.
            global_size: samples of the global batch.
            loss_sum: outputs, labels → the loss summed over samples.

        Returns:
            The sum of the losses of this rank's samples on the last stage, 0 on the others.
        """
        replicas = self.replicas.size()
        self._loss_sum, self._scale = loss_sum, replicas / global_size  # an average over the replicas follows
        rows = ceil(ceil(global_size / replicas) / self.micro_batches)
        schedule = self._schedule(rows, True)
        self._losses.clear()
        x, labels = self._fill(x, rows, 0), self._fill(labels, rows, -1)
        with phase("pipeline"):
            schedule.step(*self._inputs(x), target=labels if self._is_last else None)
            self._average_gradients()
        # A new schedule first runs a pass of arbitrary numbers, to learn their shapes.
        losses = self._losses[-self.micro_batches :]
        return torch.stack(losses).sum() if losses else x.new_zeros(())

    def predict(self, x: Tensor) -> Tensor | None:
        """Return the model's outputs for ``x`` without gradient. None except on the last stage."""
        rows = ceil(len(x) / self.micro_batches)
        schedule = self._schedule(rows, False)
        outputs: Tensor | None = schedule.eval(*self._inputs(self._fill(x, rows, 0)))
        return None if outputs is None else outputs[: len(x)]

    def _average_gradients(self) -> None:
        # DistributedDataParallel would overlap this with the last micro-batch's backward pass, but its
        # reducer fails an assertion under these schedules where a stage has as many micro-batches as stages.
        if self.replicas.size() == 1:
            return
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        flat = parameters_to_vector(gradients).div_(self.replicas.size())
        vector_to_parameters(all_reduce(flat, self.replicas), gradients)

    @property
    def _is_last(self) -> bool:
        return self.mesh.get_local_rank() == self.mesh.size() - 1

    def _inputs(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x,) if self.mesh.get_local_rank() == 0 else ()

    def _fill(self, t: Tensor, rows: int, value: int) -> Tensor:
        missing = rows * self.micro_batches - len(t)
        return pad(t, (*(0, 0) * (t.dim() - 1), 0, missing), value=value) if missing else t

    def _build(self, rows: int, training: bool) -> Any:
        stage = PipelineStage(
            self.module,
            self.mesh.get_local_rank(),
            self.mesh.size(),
            next(self.module.parameters()).device,
            group=self.mesh.get_group(),
        )
        if not training:
            # With scale_grads it would divide the gradients that the last step left.
            return ScheduleGPipe(stage, self.micro_batches, scale_grads=False)
        return self._kind(stage, self.micro_batches, loss_fn=self._objective, scale_grads=False)

    def _objective(self, outputs: Tensor, labels: Tensor) -> Tensor:
        assert self._loss_sum is not None
        labelled = labels >= 0
        if not labelled.all():
            outputs, labels = outputs[labelled], labels[labelled]
        loss = self._loss_sum(outputs, labels)
        self._losses.append(loss.detach())
        return loss * self._scale
