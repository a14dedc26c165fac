# SPDX-License-Identifier: MIT
"""Pipeline parallelism: each rank holds some consecutive layers, and micro-batches pass through them.

With p stages and m micro-batches, a stage is idle for (p − 1)/(m + p − 1) of a step, which is the price;
what travels is activations forward and their gradients backward, between neighbours alone. "gpipe" runs
all forward passes before the backward ones and keeps m micro-batches' activations (Huang et al., 2019);
"1f1b" starts a backward pass as soon as it can, and keeps at most p (Narayanan et al., 2019). Both are
`torch.distributed.pipelining`'s.
"""

from collections import OrderedDict
from functools import cache
from math import ceil
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn.functional import pad

from torchpar.errors import ConfigError
from torchpar.nn import MLP
from torchpar.parallel.step import LossSum
from torchpar.parallel.world import World
from torchpar.phases import NoPhases, Phases

Schedule = Literal["gpipe", "1f1b"]
_SCHEDULES: dict[str, Any] = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}


def stage_mlp(mlp: MLP, mesh: DeviceMesh) -> MLP:
    """This rank's stage of ``mlp``: as many layers as another's, or one more; they keep their names.

    Args:
        mlp: whole or tensor-split; its layers are shared, not copied.
        mesh: of one dimension, such as ``mesh["pp"]``.

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


class PipelineStep:
    """Gradients of a model whose layers are spread over the ranks of the mesh's "pp" dimension.

    Args:
        forward: this rank's stage, or its DistributedDataParallel wrapper over the "dp" dimension.
        world: its mesh's "pp" dimension are the stages.
        schedule: "gpipe" or "1f1b".
        micro_batches: into how many parts this rank's share of a batch is cut. The parts are of one
            size; samples without a label fill them up and count for nothing.

    Raises:
        ConfigError: fewer micro-batches than stages, an unknown schedule, or ranks that share a GPU.
    """

    def __init__(
        self, forward: torch.nn.Module, world: World, schedule: Schedule = "1f1b", micro_batches: int = 4
    ):
        assert world.mesh is not None
        self.mesh = world.mesh["pp"]
        self.forward = forward
        self.data_ranks = world.data_ranks
        self.micro_batches = micro_batches
        if schedule not in _SCHEDULES:
            raise ConfigError(f"schedule is {schedule!r}, expected one of {sorted(_SCHEDULES)}")
        if micro_batches < self.mesh.size():
            raise ConfigError(
                f"{micro_batches} micro-batches are fewer than the {self.mesh.size()} stages, some of which "
                "would always idle; take more micro-batches"
            )
        if world.device.type == "cuda" and dist.get_backend(self.mesh.get_group()) == "gloo":
            raise ConfigError("a pipeline on GPUs needs one rank per GPU; start fewer ranks or take cpu")
        self._kind = _SCHEDULES[schedule]
        self._schedule = cache(self._build)  # what a schedule receives into has one size
        self._loss_sum: LossSum | None = None
        self._scale = 1.0

    def gradients(
        self, x: Tensor, labels: Tensor, global_size: int, loss_sum: LossSum, measure: Phases | NoPhases
    ) -> Tensor:
        self._loss_sum, self._scale = loss_sum, self.data_ranks / global_size
        rows = ceil(ceil(global_size / self.data_ranks) / self.micro_batches)
        schedule = self._schedule(rows, True)
        losses: list[Tensor] = []
        x, labels = self._fill(x, rows, 0), self._fill(labels, rows, -1)
        with measure("pipeline"):
            schedule.step(*self._inputs(x), target=labels if self._is_last else None, losses=losses)
        return torch.stack(losses).sum().detach() / self._scale if losses else x.new_zeros(())

    def outputs(self, x: Tensor) -> Tensor | None:
        rows = ceil(len(x) / self.micro_batches)
        schedule = self._schedule(rows, False)
        outputs: Tensor | None = schedule.eval(*self._inputs(self._fill(x, rows, 0)))
        return None if outputs is None else outputs[: len(x)]

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
            self.forward if training else getattr(self.forward, "module", self.forward),
            self.mesh.get_local_rank(),
            self.mesh.size(),
            next(self.forward.parameters()).device,
            group=self.mesh.get_group(),
        )
        if not training:
            # Or else it would scale the gradients that are there.
            return ScheduleGPipe(stage, self.micro_batches, scale_grads=False)
        return self._kind(stage, self.micro_batches, loss_fn=self._objective, scale_grads=False)

    def _objective(self, outputs: Tensor, labels: Tensor) -> Tensor:
        assert self._loss_sum is not None
        labelled = labels >= 0
        if not labelled.all():
            outputs, labels = outputs[labelled], labels[labelled]
        return self._loss_sum(outputs, labels) * self._scale
