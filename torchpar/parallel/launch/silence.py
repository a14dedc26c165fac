# SPDX-License-Identifier: MIT
"""Heartbeats of ranks, and a warning that names a rank whose process is stopped within a step.

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

from torchpar.parallel.launch.rendezvous import host_has_ended
from torchpar.parallel.launch.world import World

logger = logging.getLogger(__name__)
TICK = 1.0  # seconds between two looks at the number of steps
HEARTBEAT = 5.0  # seconds between two heartbeats, and without a step before others are looked at
SILENT = 10.0  # seconds without a message after which a rank is named


@contextmanager
def naming_silent_ranks(world: World, steps: Callable[[], int | None]) -> Iterator[None]:
    """Log a warning if another rank that is in this block, too, sends no heartbeat any more.

    Its process is stopped, its machine hangs, or compiled code holds Python's lock. A process that
    waits, or computes for long in PyTorch, sends heartbeats. Rank 0 names the others, and rank 1
    names rank 0. Under mpirun nobody names rank 0, which holds the store there.

    Args:
        steps: returns the number of this rank's complete steps, or None where the other ranks may
            have left the block. Nobody is named while the number changes, or where it is None.
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
    done, since, sent = steps(), time.monotonic(), -math.inf
    heard, counts = dict[int, float](), dict[int, int]()
    with suppress(RuntimeError):  # the store's host has ended
        store.set(f"process/{world.rank}", f"process {os.getpid()} on {socket.gethostname()}")
        while not left(TICK):
            now, before, done = time.monotonic(), done, steps()
            is_late = done == before and done is not None and now - since >= HEARTBEAT
            if (is_late or now - sent >= HEARTBEAT) and host_has_ended(store):
                return
            if now - sent >= HEARTBEAT:
                store.add(f"heartbeat/{world.rank}", 1)
                sent = now
            if done != before:
                since, heard, counts = now, {}, {}
            elif is_late:
                # A rank that is not here yet has no process, for which `get` would wait.
                for rank in (one for one in others if store.check([f"process/{one}"])):
                    count = store.add(f"heartbeat/{rank}", 0)
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
