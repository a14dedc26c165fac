# SPDX-License-Identifier: MIT
"""Global memory of a stand-in for a GPU, and launches of PTX kernels on it."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from random import Random

import numpy as np

# Importing these registers their instructions.
from torchpar.ptx import arithmetic, copies, tensor_cores, tensors  # noqa: F401
from torchpar.ptx.machine import Block, Schedule, decode
from torchpar.ptx.memory import Allocation, Space
from torchpar.ptx.parse import Kernel, parse

FIRST_ADDRESS, GAP = 0x7F0000000000, 2**20


@lru_cache(8)
def _decoded(text: str) -> Kernel:
    return decode(parse(text))


class Gpu:
    """Global memory, and the launches on it: what the blocks of the present launch share.

    Args:
        change: of the PTX of each kernel, before it is executed.
    """

    def __init__(self, schedule: Schedule, change: Callable[[str], str] = lambda text: text):
        self.schedule, self.change = schedule, change
        self.space = Space("global memory")
        self.next = FIRST_ADDRESS
        # And the positions of instructions executed.
        self.launches: list[tuple[Kernel, set[int]]] = []

    def allocate(self, name: str, size: int) -> Allocation:
        """Return memory that nobody has written."""
        allocation = self.space.add(Allocation(name, self.next, size))
        self.next += -(-size // GAP) * GAP + GAP
        return allocation

    def launch(
        self,
        text: str,
        parameters: Sequence[int],
        grid: tuple[int, int, int] = (1, 1, 1),
        shared: int = 0,
    ) -> None:
        """Execute the kernel of ``text`` on ``grid`` blocks.

        Args:
            parameters: the bits of each one.
            shared: bytes of dynamic shared memory.
        """
        self.kernel, self.grid, self.shared_bytes = _decoded(self.change(text)), grid, shared
        self.parameters = dict(zip(self.kernel.parameters, parameters, strict=True))
        self.random, self.executed = Random(self.schedule.seed), set[int]()
        self.launches.append((self.kernel, self.executed))
        blocks = [index[::-1] for index in np.ndindex(grid[::-1])]
        if self.schedule.order == "reverse":
            blocks.reverse()
        elif self.schedule.order == "random":
            self.random.shuffle(blocks)
        with np.errstate(all="ignore"):
            for block in blocks:
                Block(self, block).run()
        for allocation in self.space.allocations:
            allocation.end_launch()
