# SPDX-License-Identifier: MIT
"""A warning that names a rank whose process is stopped within a step.

The collectives of the other ranks wait for it, and would say nothing until their timeout.
"""

import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from torchpar.parallel.launch.world import World

logger = logging.getLogger(__name__)
LOOK = 1.0  # seconds between two looks at the number of steps
STILL = 5.0  # seconds without a step after which a rank tells the others that its process runs
SILENT = 10.0  # seconds without such a message after which a rank is named


@contextmanager
def naming_silent_ranks(world: World, steps: Callable[[], int | None]) -> Iterator[None]:
    """Log a warning if another rank's process is stopped, or its machine hangs, in the block.

    Rank 0 names the others, and rank 1 names rank 0. A process that computes for long or waits for
    ever answers, and is not named.

    Args:
        steps: the number of this rank's complete steps, and nothing is sent while it changes; None
            where the other ranks may have left the block, and are not named.
    """
    if dist.group.WORLD is None or dist.get_backend() == "fake":
        yield
        return
    # A connection of its own, since a collective may hold the group's.
    store = dist.group.WORLD.get_group_store().clone()
    left = threading.Event()
    arguments = store, world, steps, left.wait
    thread = threading.Thread(None, _watch, "naming_silent_ranks", arguments, daemon=True)
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join(1.0)  # but a request to a host that was stopped does not return


def _watch(
    store: Store, world: World, steps: Callable[[], int | None], left: Callable[[float], bool]
) -> None:
    others = range(1, world.world_size) if world.rank == 0 else range(int(world.rank == 1))
    done, since, heard, counts = steps(), time.monotonic(), dict[int, float](), dict[int, int]()
    with suppress(RuntimeError):  # the store's host has ended
        store.set(f"process/{world.rank}", f"process {os.getpid()} on {socket.gethostname()}")
        while not left(LOOK):
            now, before, done = time.monotonic(), done, steps()
            if done != before:
                since, heard, counts = now, {}, {}
            elif now - since >= STILL:
                store.add(f"answers/{world.rank}", 1)
                for rank in others if done is not None else ():
                    count = store.add(f"answers/{rank}", 0)
                    if count != counts.get(rank):  # or it is the first look, as after `kill -CONT`
                        counts[rank], heard[rank] = count, now
                    if now - heard[rank] >= SILENT:
                        logger.warning(
                            "rank %d has not answered for %.0f s; continue or end its %s, or wait "
                            "until the timeout of %g s",
                            *(rank, now - heard[rank], store.get(f"process/{rank}").decode()),
                            world.timeout,
                        )
                        heard[rank] = math.inf  # say it once
