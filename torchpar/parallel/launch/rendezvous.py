# SPDX-License-Identifier: MIT
"""The store through which the ranks connect."""

import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import TypeVar

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from torchpar.errors import ConfigError, RankLostError
from torchpar.rank_info import RankInfo

T = TypeVar("T")
POLL = 0.02  # seconds between two requests to the store
KNOCK = 0.1  # seconds between two attempts to reach a host that does not listen yet
LATER = 1.0  # seconds that other ranks wait longer than rank 0, which tells them the missing ranks


def connect(info: RankInfo, timeout: timedelta) -> Store:
    """Connect to the other ranks and return the store for `init_process_group`.

    The store is empty at each start of the processes, also when torchrun starts them again.

    Args:
        timeout: the time to wait for the other ranks; also the store's timeout.

    Raises:
        ConfigError: no store at the address, or another program at the port.
        RankLostError: a rank did not join.
    """
    # torchrun's agent keeps its server over restarts (torch.distributed.elastic's
    # DynamicRendezvousHandler and StaticTCPRendezvous make it once), so a new rank can read the
    # address that a dead rank left under the same key. Nothing in the environment numbers the
    # starts: TORCHELASTIC_RESTART_COUNT counts each node's own failures. A count of the ranks that
    # joined is wrong once a rank died before it joined. So rank 0 draws the number of the start. It
    # tells each rank this number under a key of that rank's present process. Only a rank 0 that
    # runs at the same time as that process can have written the key: agents end all workers before
    # new workers start.
    hosts = info.rank == 0 and info.launcher != "torchrun"
    limit = timeout.total_seconds() + LATER
    try:
        if not hosts:
            _wait_for_host(info, timeout)
        # Where another program has the port and never answers, TCPStore would block for ever.
        tcp = run_in_daemon(
            lambda: TCPStore(info.address, info.port, None, hosts, timeout, wait_for_workers=False)
        ).result(limit)
        store = PrefixStore("torchpar", tcp)
        if info.rank == 0:
            start = _welcome(store, info.world_size, timeout)
        else:  # requests to a host that was stopped block whatever the timeout is
            start = run_in_daemon(lambda: _join(store, info.rank, timeout)).result(2 * limit)
    except (DistError, OSError) as e:  # TimeoutError is an OSError
        reason = (
            str(e).partition("\n")[0]
            or "the program at that port does not answer as rank 0's store"
        )
        raise ConfigError(
            f"rank {info.rank} did not meet the others at {info.address}:{info.port}: {reason}; "
            "MASTER_ADDR and MASTER_PORT must be the host of rank 0 and a port that is free there"
        ) from e
    return PrefixStore(f"start{start}", store)


def _wait_for_host(info: RankInfo, timeout: timedelta) -> None:
    """Wait until a program listens at the store's address.

    TCPStore would try for more than the timeout, print the frames of its error, and abort this
    process if the process ends meanwhile.

    Raises:
        OSError: the host cannot be found, or no program listens there within the timeout.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        left = max(deadline - time.monotonic(), KNOCK)
        try:
            socket.create_connection((info.address, info.port), left).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(KNOCK)


def missing_ranks(store: Store, rank: int, world_size: int, patience: float) -> list[int]:
    """Return the ranks that do not call this within ``patience`` seconds: they hang, or have ended.

    Every rank whose collective failed calls this once. The ranks' waits end as far apart as they
    began. So ``patience`` must be longer than the longest time between two collectives of a rank;
    otherwise healthy ranks are named too. If rank 0 hosts the store, rank 0 must be the last to
    end.

    Args:
        store: the store from `connect`.
        patience: seconds to wait for the other ranks; the call takes at most half a second more.

    Returns:
        The missing ranks, sorted. If the store does not answer: [0] if rank 0 hosts it, else [].
    """
    present = {rank}
    deadline = time.monotonic() + patience

    def ask() -> None:
        connection = store.clone()  # a collective may hold the connection
        connection.set(f"present/{rank}", "")
        while len(present) < world_size and time.monotonic() <= deadline:
            present.update(
                r for r in set(range(world_size)) - present if connection.check([f"present/{r}"])
            )
            time.sleep(POLL)

    # Requests to a host that was stopped block whatever the store's timeout is.
    try:
        run_in_daemon(ask).result(patience + 0.5)
    except (RuntimeError, TimeoutError):  # the store's host has ended, or was stopped
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return []
        if 0 not in present:
            return [0]
    return sorted(set(range(world_size)) - present)


def run_in_daemon(function: Callable[[], T]) -> "Future[T]":
    """Run ``function`` in a daemon thread: the interpreter exits without waiting for it."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as e:  # CheckpointException is no Exception
            future.set_exception(e)

    threading.Thread(target=run, daemon=True).start()
    return future


def _welcome(store: Store, world_size: int, timeout: timedelta) -> int:
    start: int = store.add("starts", 1)
    deadline = time.monotonic() + timeout.total_seconds()
    missing = list(range(1, world_size))
    while missing:
        for rank in missing:
            # The counter may belong to a dead process; retry until the live process answers.
            store.set(f"welcome/{rank}/{store.add(f'processes/{rank}', 0)}", str(start))
        time.sleep(POLL)
        missing = [rank for rank in missing if not store.check([f"joined/{rank}/{start}"])]
        if missing and time.monotonic() > deadline:
            ranks = ", ".join(map(str, missing))
            store.set(f"missing/{start}", ranks)
            # The other ranks read the key before this process, which may host the store, ends.
            time.sleep(LATER)
            raise _did_not_join(ranks, timeout)
    store.set(f"missing/{start}", "")
    return start


def _join(store: Store, rank: int, timeout: timedelta) -> int:
    """Return the number of the start, once rank 0 says that all ranks have joined."""
    process = store.add(f"processes/{rank}", 1)
    try:
        start = int(store.get(f"welcome/{rank}/{process}"))
        store.set(f"joined/{rank}/{start}", "")
        store.wait([f"missing/{start}"], timeout + timedelta(seconds=LATER))
        missing = store.get(f"missing/{start}").decode()
    except DistError as e:
        raise _did_not_join("0", timeout) from e
    if missing:
        raise _did_not_join(missing, timeout)
    return start


def _did_not_join(ranks: str, timeout: timedelta) -> RankLostError:
    return RankLostError(
        f"rank {ranks} did not join the others within {timeout.total_seconds():g} s"
    )
