# SPDX-License-Identifier: MIT
"""Styles of `parallelize_module` that take the layers of `torchpar.nn`, too.

    plan = {"layers.0": ColwiseParallel(), "layers.1": RowwiseParallel()}
    parallelize_module(mlp, mesh, plan)

PyTorch's styles of these names take a `torch.nn.Linear` or a `torch.nn.Embedding`, and refuse
others. These styles do the same with them. They are in no `__init__`, since DTensor takes long to
import.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
    parallel,
)
from torch.nn import Module, Parameter

from torchpar.nn import LinearParameters


class ColwiseParallel(parallel.ColwiseParallel):
    """`torch.distributed.tensor.parallel.ColwiseParallel`, also of `torchpar.nn`'s layers.

    Each rank holds rows of the weight and of the bias, as if the layer were a `torch.nn.Linear`.
    The result is sharded by its last dimension. For a `LinearMaxout`, whose ranks hold rows of
    different pieces, the ranks gather the product before they take the maximum.

    Args:
        input_layouts, output_layouts, use_local_output: as in PyTorch's style.
    """

    def _apply(self, module: Module, device_mesh: DeviceMesh) -> Module:
        if not isinstance(module, LinearParameters):
            return super()._apply(module, device_mesh)
        placements = {"weight": Shard(0), "bias": Shard(0)}
        return _distributed(self, module, device_mesh, placements, Replicate())


class RowwiseParallel(parallel.RowwiseParallel):
    """`torch.distributed.tensor.parallel.RowwiseParallel`, also of `torchpar.nn`'s layers.

    Each rank holds columns of the weight. The activation follows the sum over the ranks.

    Args:
        input_layouts, output_layouts, use_local_output: as in PyTorch's style.
    """

    def _apply(self, module: Module, device_mesh: DeviceMesh) -> Module:
        if not isinstance(module, LinearParameters):
            return super()._apply(module, device_mesh)
        placements = {"weight": Shard(1), "bias": Replicate()}
        return _distributed(self, module, device_mesh, placements, Shard(-1))


def _distributed(
    style: Any,
    layer: LinearParameters,
    mesh: DeviceMesh,
    placements: Mapping[str, Placement],
    needed: Placement,
) -> Module:
    """Shard a layer's parameters, and convert its input and its result.

    Args:
        style: the style, which has the layouts of the input and of the result.
        placements: the placement of each parameter, by its name.
        needed: the placement of the input for which the layer's product needs no message.
    """

    def shard(_: str, module: Module, mesh: DeviceMesh) -> None:
        for name, p in list(module.named_parameters(recurse=False)):
            sharded = distribute_tensor(
                p, mesh, [placements[name]], src_data_rank=style.src_data_rank
            )
            module.register_parameter(name, Parameter(sharded, requires_grad=p.requires_grad))

    def take(_: Module, inputs: tuple[Tensor, ...], mesh: DeviceMesh) -> Any:
        x = inputs[0]
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, mesh, style.input_layouts, run_check=False)
        return x.redistribute(placements=[needed])

    def give(_: Module, y: DTensor, __: DeviceMesh) -> Any:
        y = y.redistribute(placements=style.output_layouts)
        return y.to_local() if style.use_local_output else y

    return distribute_module(layer, mesh, shard, take, give)
