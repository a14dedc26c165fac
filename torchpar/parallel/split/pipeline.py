# SPDX-License-Identifier: MIT
"""Pipeline parallelism: each rank holds consecutive layers, and micro-batches pass through them.

With p stages and m micro-batches a stage is idle for (p − 1)/(m + p − 1) of a step. Neighboring
stages exchange activations in the forward pass and their gradients in the backward pass, and no
other messages. There are two schedules (`torchpar.parallel.split.schedules`): `gpipe` runs all
forward passes before the backward passes and keeps the activations of m micro-batches.
`one_forward_one_backward`, "1f1b", starts each backward pass as soon as possible and keeps the
activations of at most p micro-batches.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.profiler import record_function

from torchpar.errors import ConfigError, check_whole, whole_or_text
from torchpar.nn import MLP
from torchpar.parallel.launch.agreement import check_same_each_time, check_same_on_all_ranks
from torchpar.parallel.launch.world import World, check_mesh, check_module, check_world
from torchpar.parallel.split.reduction import all_reduce
from torchpar.parallel.split.scaler import skip_together
from torchpar.parallel.split.schedules import P2PCommunicator, gpipe, one_forward_one_backward

LossSum = Callable[[Tensor, Tensor], Tensor]  # outputs, labels → the loss summed over samples
PipelineSchedule = Literal["gpipe", "1f1b"]
_SCHEDULES = {"gpipe": gpipe, "1f1b": one_forward_one_backward}


def stage_mlp(mlp: MLP, mesh: DeviceMesh) -> MLP:
    """Return this rank's stage of ``mlp``. The numbers of layers per stage differ by at most one.

    Args:
        mlp: unsharded, or from `parallel_mlp`. The stage has the same layers, not copies, under the
            same names.
        mesh: a mesh of one dimension, such as ``world.mesh["pp"]``.

    Raises:
        ConfigError: another ``mesh``, or more stages than layers.
    """
    check_mesh("stage_mlp", mesh, "pp")
    if mesh.size() > len(mlp.layers):
        raise ConfigError(
            f"pp {mesh.size()} makes more stages than the model has layers, {len(mlp.layers)}; "
            "take fewer stages or more --hidden layers"
        )
    layers = torch.arange(len(mlp.layers), device="cpu")
    mine = layers.tensor_split(mesh.size())[mesh.get_local_rank()].tolist()
    stage = MLP(mlp.sizes, mlp.hidden, mlp.output, device="meta")
    stage.layers = torch.nn.Sequential(OrderedDict((str(i), mlp.layers[i]) for i in mine))
    return stage


def check_one_rank_per_gpu(world: World) -> None:
    """Raise ConfigError if ranks share a GPU: gloo, their backend, sends tensors of CPUs only."""
    if world.device.type == "cuda" and dist.get_backend(world.mesh.get_group("pp")) == "gloo":
        raise ConfigError(
            "a pipeline on GPUs needs one rank per GPU; start fewer ranks or take cpu"
        )


class Pipeline:
    """Forward and backward passes of an MLP whose layers are split over the mesh's "pp" dimension.

    The sums have the bits of one process that adds up the gradients of the micro-batches.

    Args:
        module: this rank's stage, from `stage_mlp`.
        world: its mesh's "pp" dimension holds the stages, and its "dp" dimension the replicas of
            each stage.
        schedule: "gpipe" or "1f1b".
        micro_batches: the number of micro-batches into which `torch.tensor_split` cuts this rank's
            share of a batch.

    Raises:
        ConfigError: an unknown schedule, no micro-batch, ranks that share a GPU, or stages whose
            arguments differ.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        world: World,
        schedule: PipelineSchedule = "1f1b",
        micro_batches: int = 4,
    ):
        check_world("Pipeline", world)
        check_module("Pipeline", module)
        check_one_rank_per_gpu(world)
        self._group, self._timeout = world.mesh.get_group("pp"), world.timeout
        arguments = {"schedule": schedule, "micro_batches": whole_or_text(micro_batches)}
        check_same_on_all_ranks(self._group, "the stages' pipelines", arguments)
        # All stages have the same arguments from here on, and so raise the same error.
        if schedule not in [*_SCHEDULES]:
            raise ConfigError(f"schedule is {schedule!r}, expected one of {sorted(_SCHEDULES)}")
        micro_batches = check_whole("micro_batches", micro_batches)
        weight = next(module.parameters())
        if self._group.size() > 1:
            skip_together(module)
        self.module = module
        self.width = weight.shape[1]  # of the activations that the previous stage sends
        self.micro_batches = micro_batches
        self.replicas = world.mesh["dp"]
        self._schedule = _SCHEDULES[schedule]
        self._p2p = P2PCommunicator(self._group, weight.device, weight.dtype)

    def step(self, x: Tensor, labels: Tensor, global_size: int, loss_sum: LossSum) -> Tensor:
        """Run the forward and backward passes of this rank's share of a global batch.

        Every ``p.grad`` must be None before the step. After it, ``p.grad`` is the gradient of the
        global batch's mean loss.

        Args:
            x: ``(b, in_features)``, this rank's share; only the first stage reads it.
            labels: ``(b)``; only the last stage reads them.
            global_size: samples of the global batch, a whole number from 1 on.
            loss_sum: outputs, labels → the loss summed over samples.

        Returns:
            The sum of the losses of this rank's samples on the last stage, 0 on the other stages.

        Raises:
            ConfigError: on every stage: numbers of samples or of labels that differ, also between
                stages, or another ``global_size``.
        """
        of = whole_or_text(global_size)
        self._check_same(f"{len(x)} samples and {len(labels)} labels of a global_size of {of}")
        global_size = check_whole("global_size", global_size)
        if len(x) != len(labels):
            raise ConfigError(f"{len(x)} samples and {len(labels)} labels, expected as many")
        inputs, targets = (
            x.tensor_split(self.micro_batches),
            labels.tensor_split(self.micro_batches),
        )
        losses: list[Tensor] = []

        def forward(i: int, activations: Tensor | None) -> Tensor:
            outputs: Tensor = self.module(inputs[i] if activations is None else activations)
            if not self._p2p.is_last:
                return outputs
            loss = loss_sum(outputs, targets[i])
            losses.append(loss.detach())
            # The average over the replicas divides by their number.
            return loss * (self.replicas.size() / global_size)

        with record_function("pipeline"):  # its name in a trace, and a phase of a step
            shapes = [(len(one), self.width) for one in inputs]
            self._schedule(forward, torch.Tensor.backward, shapes, self._p2p)
            self._average_gradients()
        return torch.stack(losses).sum() if losses else x.new_zeros(())

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor | None:
        """Return the model's outputs for ``x`` without gradient. None except on the last stage.

        Raises:
            ConfigError: as `step`.
        """
        self._check_same(f"{len(x)} samples")
        activations = self._p2p.recv_forward((len(x), self.width))
        outputs: Tensor = self.module(x if activations is None else activations)
        self._p2p.send_forward(outputs)
        self._p2p.flush()
        return outputs if self._p2p.is_last else None

    def _check_same(self, batch: str) -> None:
        if self._p2p.stages > 1:  # gloo would abort the processes if shapes differed
            what = "the stages of a pipeline have different samples, expected the same batch on all"
            check_same_each_time(batch, self._group, what, self._timeout)

    def _average_gradients(self) -> None:
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        if gradients and self.replicas.size() > 1:
            flat = parameters_to_vector(gradients).div_(self.replicas.size())
            vector_to_parameters(all_reduce(flat, self.replicas), gradients)
