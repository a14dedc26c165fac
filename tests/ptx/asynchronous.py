# SPDX-License-Identifier: MIT
"""Asynchronous operations of a warp.

`cp.async`, bulk copies and `wgmma` are all of this form: they read their sources and later write their
targets, at times that a schedule chooses. A warp waits for an operation by its group or by an mbarrier.
"""

from collections.abc import Callable
from typing import Any

from .memory import Event


class Operation:
    """An operation, which others may know by two events.

    Who knows `read` may write its sources, and who knows `written` may read its targets.

    Args:
        generic: its accesses are not of the asynchronous proxy.
        after: an operation that completes before this one.
    """

    def __init__(self, warp: Any, line: int, what: str, generic: bool = False, after: Any = None):
        self.what, self.after = what, after
        name = f"{what} of warp {warp.index}"
        self.read, self.written = (
            warp.block.events.add(Event(line, name, own=False, generic=generic)) for _ in range(2)
        )
        self.steps: list[Callable[[], None]] = []
        warp.trace(self)

    def fetch(self) -> None:
        """Read the sources."""

    def store(self) -> None:
        """Write the targets."""

    def start(self, block: Any) -> None:
        """Issue it. Its two steps are done at once, or when something waits for them, or at random."""
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

    def wait(self, warp: Any, left: int = 0) -> None:
        """From now on the warp knows that the operation has read, or, with no step ``left``, is done."""
        self.advance(left)
        warp.seen[self.read.number] = True
        if left == 0:
            warp.seen[self.written.number] = True
        warp.trace(self)
