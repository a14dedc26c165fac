# SPDX-License-Identifier: MIT
"""The clusters that a GPU holds at once, which have their turns one after the other."""

from collections import deque
from collections.abc import Iterator

from torchpar.ptx.machine.block import Block
from torchpar.ptx.machine.spins import PATIENCE

Turns = Iterator[bool]  # of `block.Block.turns`


class Residents:
    """The clusters that the GPU holds, each by its first block, in turns.

    Attributes:
        idle: turns, one after the other, in which nothing has changed.
    """

    def __init__(self) -> None:
        self._queue: deque[tuple[Block, Turns]] = deque()
        self.idle = self._stuck = 0

    def __len__(self) -> int:
        return len(self._queue)

    def begin(self, block: Block) -> None:
        """Add a cluster, which has the next turn."""
        self._queue.appendleft((block, block.turns()))

    def take(self) -> tuple[Block, Turns]:
        """Return the cluster that has the next turn; it is no longer among these."""
        block, turns = self._queue.popleft()
        block.cluster.spins.begin_turn(self.idle // (len(self) + 1))
        return block, turns

    def put(self, block: Block, turns: Turns) -> None:
        """Take back a cluster that waits for others."""
        self._queue.append((block, turns))

    def is_deadlock(self, block: Block, is_idle: bool) -> bool:
        """Whether all clusters wait for ever, now that the one of ``block`` had a turn.

        Args:
            is_idle: it waits, and nothing has changed in its turn.
        """
        spins = block.cluster.spins
        self.idle = self.idle + 1 if is_idle else 0
        self._stuck = self._stuck + 1 if is_idle and spins.is_stuck else 0
        has_given_up = is_idle and spins.patience == PATIENCE and not spins.is_stuck
        return has_given_up or (is_idle and self._stuck >= len(self))
