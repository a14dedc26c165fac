# SPDX-License-Identifier: MIT
"""A matrix that holds memory of the host and of the device, between which copies are explicit."""

from collections import Counter

import torch
from torch import Tensor


class Matrix:
    """Numbers ``(rows, columns)`` twice. Kernels read and write `device`; Python `host`.

    Args:
        device: such as "cuda". Where the CPU executes the kernels, it is a second tensor there.
        copies: counts the bytes of copies, by their direction.
    """

    host: Tensor
    device: Tensor

    def __init__(self, rows: int, columns: int, device: torch.device, copies: Counter[str]):
        self.shape, self.place, self.copies = (rows, columns), device, copies

    def allocate_memory(self) -> None:
        """Allocate both; neither has numbers yet."""
        self.host = torch.empty(self.shape)
        self.device = torch.empty(self.shape, device=self.place)

    def copy_host_to_device(self) -> None:
        self.device.copy_(self.host)
        self.copies["host to device"] += self.host.nbytes

    def copy_device_to_host(self) -> None:
        self.host.copy_(self.device)
        self.copies["device to host"] += self.host.nbytes
