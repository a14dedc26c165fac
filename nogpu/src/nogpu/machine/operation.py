# SPDX-License-Identifier: MIT
"""Asynchronous operations of a warp: `cp.async`, bulk copies and `wgmma`."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nogpu.machine.block import Block, Warp


class Operation:
    """An asynchronous operation of a warp: `cp.async`, a bulk copy or `wgmma`. It has two events.

    It reads its sources and later writes its targets, at times that a schedule chooses. Who knows
    `read` may write its sources, and who knows `written` may read its targets.

    Args:
        generic: its accesses are not of the asynchronous proxy.
        after: an operation that completes before this one.
        continues: an operation of the same kind and warp, which this one always follows, so that
            who knows this one's events knows those of ``continues``.
    """

    targets: frozenset[int] = frozenset()  # ranks of blocks of the cluster to which it writes
    last_access = "read its shared memory"  # before which its block must not end

    def __init__(
        self,
        warp: "Warp",
        line: int,
        what: str,
        generic: bool = False,
        after: "Operation | None" = None,
        continues: "Operation | None" = None,
    ):
        block: Block = warp.block
        self.what, self.after, self.line = what, after, line
        self.name = f"{what} of {warp.name}"
        if continues is None:
            self.agent, self.time = block.clocks.add_agent(generic), 0
            block.cluster.owners.append(block.rank)
        else:
            self.agent, self.time = continues.agent, continues.time + 2
        self.read, self.written = (
            block.gpu.events.add(block.number, self.agent, self.time + n, line, self.name)
            for n in (1, 2)
        )
        self.steps: list[Callable[[], None]] = []
        warp.trace(self)

    def fetch(self) -> None:
        """Read the sources."""

    def store(self) -> None:
        """Write the targets."""

    def start(self, block: "Block") -> None:
        """Issue it. Its two steps are done at once, or when something waits for them, or at
        random."""
        self.steps = [self.fetch, self.store]
        block.flying.append(self)
        if block.gpu.schedule.completion == "early":
            self.advance()

    def advance(self, left: int = 0) -> None:
        """Do its steps but for the last ``left`` ones."""
        if self.after is not None:
            self.after.advance()
            self.after = None
        while len(self.steps) > left:
            self.steps.pop(0)()

    def wait(self, warp: "Warp", left: int = 0) -> None:
        """From now on the warp knows that the operation has read, or, with no step ``left``, is
        done."""
        self.advance(left)
        times = warp.clocks.times[warp.index]
        times[self.agent] = max(times[self.agent], self.time + (1 if left else 2))
        warp.trace(self)
