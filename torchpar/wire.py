# SPDX-License-Identifier: MIT
"""Choice of the device from which a process group sends a tensor."""

import torch
import torch.distributed as dist
from torch import Tensor


def wire_device(t: Tensor, group: dist.ProcessGroup) -> torch.device:
    """The device to copy ``t`` to before ``group`` sends it.

    gloo sends CUDA tensors in all-reduces and broadcasts only, so the CPU is returned for them.
    """
    return torch.device("cpu") if t.is_cuda and dist.get_backend(group) == "gloo" else t.device
