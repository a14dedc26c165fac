# SPDX-License-Identifier: MIT
"""A stand-in for a GPU: it executes PTX whose arguments are tensors on the meta device.

For each of them there is memory with the content of a CPU tensor.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nogpu.machine import gpu
from nogpu.machine.allocation import Allocation
from nogpu.machine.gpu_state import Schedule


class Gpu(gpu.Gpu):
    """A stand-in for a GPU whose memory belongs to tensors on the meta device.

    Args:
        change: of the PTX of each kernel, before it is executed; None: there is none.
    """

    def __init__(self, schedule: Schedule, change: Callable[[str], str] | None = None):
        super().__init__(schedule, change)
        self.places: dict[int, Allocation] = {}  # by the storage of the meta tensor
        self.kept: list[Tensor] = []

    def tensor(self, t: Tensor) -> Tensor:
        """A tensor on the meta device with the strides and offset of ``t``, and its content in
        memory."""
        storage = t.untyped_storage()
        meta = torch.empty(storage.nbytes() // t.element_size(), dtype=t.dtype, device="meta")
        meta = meta.as_strided(t.shape, t.stride(), t.storage_offset())
        raw = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        self.write(meta, raw)
        return meta

    def write(self, meta: Tensor, raw: np.ndarray) -> None:
        """Write the elements of ``meta`` from ``raw``, the bytes of a storage like its own."""
        place, size = self.place(meta), meta.element_size()
        used = torch.zeros(meta.untyped_storage().nbytes() // size, dtype=torch.bool)
        used.as_strided(meta.shape, meta.stride(), meta.storage_offset()).fill_(True)
        written = np.repeat(used.numpy(), size)
        place.data[: len(raw)][written] = raw[written]
        place.give(written)

    def place(self, meta: Tensor) -> Allocation:
        storage = meta.untyped_storage()
        if storage._cdata not in self.places:
            self.kept.append(meta)  # so that no other storage takes its identity
            self.places[storage._cdata] = self.allocate(
                f"{meta.dtype} {tuple(meta.shape)}", storage.nbytes()
            )
        return self.places[storage._cdata]

    def read(self, meta: Tensor) -> Tensor:
        """The content of a tensor on the meta device."""
        place = self.place(meta)
        if not meta.numel():
            return torch.empty(meta.shape, dtype=meta.dtype)
        content = torch.from_numpy(place.data[: place.size].copy()).view(meta.dtype)
        return content.as_strided(meta.shape, meta.stride(), meta.storage_offset())

    def launch(
        self,
        text: str,
        parameters: Sequence[Any],
        grid: tuple[int, int, int] = (1, 1, 1),
        shared: int = 0,
        entry: str = "",
        block: tuple[int, int, int] | None = None,
    ) -> None:
        """Execute the kernel of ``text`` with a number, or a tensor on the meta device, for each
        parameter."""
        super().launch(text, list(map(self.value, parameters)), grid, shared, entry, block)

    def value(self, argument: Any) -> int:
        if isinstance(argument, Tensor):
            return self.place(argument).base + argument.storage_offset() * argument.element_size()
        return int(argument) % 2**64
