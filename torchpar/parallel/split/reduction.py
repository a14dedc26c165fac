# SPDX-License-Identifier: MIT
"""All-reduces over the ranks of a mesh dimension."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from torchpar.parallel.launch.agreement import check_shape


def all_reduce(t: Tensor, mesh: DeviceMesh, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """``t`` summed over the ranks of ``mesh``, or reduced by ``op``, in place; returns ``t``."""
    start_all_reduce(t, mesh, op)()
    return t


def start_all_reduce(t: Tensor, mesh: DeviceMesh, op: Any = dist.ReduceOp.SUM) -> Callable[[], object]:
    """Start an `all_reduce` and return a function that waits for its end.

    Raises:
        ConfigError: the ranks pass different shapes (`torchpar.parallel.launch.agreement.check_shape`).
    """
    if mesh.size() == 1:
        return lambda: None
    group = mesh.get_group()
    check_shape(t, group)
    return dist.all_reduce(t, op, group, async_op=True).wait
