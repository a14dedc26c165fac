# SPDX-License-Identifier: MIT
"""The store through which the ranks connect.

`init_process_group("env://")` makes such a store itself. It was tried, and lacks four things. It
waits for ever for a port that another program holds and does not answer. A rank that torchrun has
started again can read the address of a dead rank. Its errors do not say which ranks are missing.
And it does not read the environment of mpirun.
"""

import errno
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import TypeVar

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from torchpar.errors import ConfigError, RankLostError
from torchpar.parallel.launch.interface import (
    Address,
    gloo_address,
    is_of_this_machine,
    machine,
)
from torchpar.parallel.launch.rank_info import RankInfo
from torchpar.parallel.launch.settings import (
    Settings,
    find_fault,
    find_local_fault,
    find_unreachable,
    two_processes,
)

T = TypeVar("T")
logger = logging.getLogger(__name__)
POLL = 0.02  # seconds between two requests to the store
KNOCK = 0.1  # seconds between two attempts to reach a host that does not listen yet
LOOKUP = 10.0  # seconds for a name server that does not answer, or not now
REACH = 5.0  # seconds in which rank 0 reaches itself by an address that its machine does not have
SILENCE = 5.0  # seconds after which a rank says for whom it waits
STAY = 3.0  # seconds in which rank 0 hears ranks that come after one with other settings
RIVAL = 5.0  # seconds in which a rank 0 that has the port tells another one that it waits there
LATER = 1.0  # seconds that other ranks wait longer than rank 0, which tells them the missing ranks


def connect(info: RankInfo, timeout: timedelta, backend: str = "") -> Store:
    """Connect to the other ranks and return the store for `init_process_group`.

    Rank 0 compares the `Settings` of all ranks, and each rank raises the fault that it finds.

    The store is empty at each start of the processes, also when torchrun starts them again. After
    `SILENCE` seconds a rank logs a warning that says for which ranks it waits.

    Args:
        timeout: the time to wait for the other ranks; also the store's timeout.
        backend: the backend of the ranks' collectives, which is compared.

    Raises:
        ConfigError: settings that differ between ranks, or a RANK that two processes have; a name
            that cannot be resolved, an address that is not that of rank 0's machine, no store at
            the address, a port that is taken or privileged, or ranks on several machines of which
            one lets gloo listen at its loopback interface.
        RankLostError: a rank did not join.
    """
    # torchrun's agent keeps its server over restarts (torch.distributed.elastic's
    # DynamicRendezvousHandler and StaticTCPRendezvous make it once), so a new rank can read the
    # address that a dead rank left under the same key. Nothing in the environment numbers the
    # starts: TORCHELASTIC_RESTART_COUNT counts each node's own failures. A count of the ranks that
    # joined is wrong once a rank died before it joined. So rank 0 draws the number of the start. It
    # tells each process this number under a key of that process. Only a rank 0 that runs at the
    # same time as that process can have written the key: agents end all workers before new workers
    # start.
    hosts = info.rank == 0 and info.launcher != "torchrun"
    limit = timeout.total_seconds() + LATER
    mine = Settings.of(info, backend)
    if backend == "gloo" and info.local_world_size < info.world_size:
        mine = replace(mine, machine=machine(), gloo=gloo_address_within(timeout))
    addresses = _resolve(info, min(LOOKUP, timeout.total_seconds()))
    try:
        if hosts and not any(map(is_of_this_machine, addresses)):
            _check_reaches_itself(info)
        if not hosts:
            _wait_for_host(info, timeout)
        # Where another program has the port and never answers, TCPStore would block for ever.
        tcp = run_in_daemon(
            lambda: TCPStore(info.address, info.port, None, hosts, timeout, wait_for_workers=False)
        ).result(limit)
        store = PrefixStore("torchpar", tcp)
        if info.rank == 0:
            start = _welcome(store, mine, timeout, hosts)
        else:  # requests to a host that was stopped block whatever the timeout is
            joining = run_in_daemon(lambda: _join_start(store, info, mine, timeout))
            start = joining.result(2 * limit)
    except (DistError, OSError) as e:  # TimeoutError is an OSError
        if hosts and _is_taken(e) and (fault := _rival_fault(info, mine)):
            raise ConfigError(fault) from e
        raise ConfigError(
            f"rank {info.rank} did not meet the others at {info.address}:{info.port}: "
            f"{_why_not_connected(e)}; MASTER_ADDR and MASTER_PORT must be the host of rank 0 and "
            "a port that is free there"
        ) from e
    return PrefixStore(f"start{start}", store)


def gloo_address_within(timeout: timedelta) -> str:
    """Return `gloo_address`, or "" where the name server does not answer."""
    with suppress(TimeoutError):
        return run_in_daemon(gloo_address).result(min(LOOKUP, timeout.total_seconds()))
    return ""


def _code_of(error: Exception) -> str:
    return errno.errorcode.get(error.errno or 0, "") if isinstance(error, OSError) else ""


def _is_taken(error: Exception) -> bool:
    """Whether another program has the port."""
    return "EADDRINUSE" in str(error).partition("\n")[0] + _code_of(error)


def _why_not_connected(error: Exception) -> str:
    """Why a rank did not connect, from the first line of an error of TCPStore or of a socket."""
    line, code = str(error).partition("\n")[0], _code_of(error)
    if _is_taken(error):
        return "another program has that port (EADDRINUSE)"
    if "EACCES" in line + code:
        return "that port is privileged, as most below 1024 are (EACCES)"
    if not line or line.startswith("Ping failed"):
        return "the program at that port does not answer as rank 0's store"
    return line


def _resolve(info: RankInfo, patience: float) -> list[Address]:
    """Return the addresses of the store's host.

    PyTorch would try again until its timeout, and then not say that the name is the fault.

    Args:
        patience: seconds for a name server that does not answer.

    Raises:
        ConfigError: the name cannot be resolved.
    """
    deadline = time.monotonic() + patience

    def look_up() -> list[Address]:
        while True:
            try:
                return socket.getaddrinfo(info.address, info.port, type=socket.SOCK_STREAM)
            except socket.gaierror as e:
                if e.errno != socket.EAI_AGAIN or time.monotonic() > deadline:
                    raise
            time.sleep(KNOCK)

    try:
        return run_in_daemon(look_up).result(patience + KNOCK)
    except (OSError, UnicodeError) as e:  # UnicodeError: what no name may be, such as 64 letters
        reason = getattr(e, "strerror", None) or str(e) or f"no answer within {patience:g} s"
        how = "set MASTER_ADDR on each rank, to 127.0.0.1"
        if info.launcher == "torchrun":  # which takes the name of its machine
            how = "start torchrun with --local_addr and that address, 127.0.0.1"
        raise ConfigError(
            f"rank {info.rank} cannot resolve the MASTER_ADDR {info.address!r} ({reason}), "
            f"expected the name or the address of rank 0's machine; {how} for ranks on one machine"
        ) from e


def _check_reaches_itself(info: RankInfo) -> None:
    """Check that an address which this machine does not have leads here, as behind a router.

    Raises:
        ConfigError: it does not.
        OSError: this process cannot listen at the port.
    """
    token, deadline = os.urandom(16), time.monotonic() + REACH
    with socket.create_server(("", info.port)) as server, suppress(OSError):
        server.settimeout(REACH)
        with socket.create_connection((info.address, info.port), REACH) as sender:
            sender.sendall(token)
            while time.monotonic() < deadline:
                connection, _ = server.accept()  # or that of another rank, which sends nothing
                with connection:
                    connection.settimeout(REACH)
                    if connection.recv(len(token)) == token:
                        return
    raise ConfigError(
        f"the machine of rank 0 does not have the MASTER_ADDR {info.address!r}, and is not reached "
        "by it, expected the name or the address of this machine; set MASTER_ADDR on each rank, or "
        "start rank 0 on the machine that has the address"
    )


def _wait_for_host(info: RankInfo, timeout: timedelta) -> None:
    """Wait until a program listens at the store's address.

    TCPStore would try for more than the timeout, print the frames of its error, and abort this
    process if the process ends meanwhile.

    Raises:
        OSError: the host cannot be found, or no program listens there within the timeout.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    silent_until = time.monotonic() + SILENCE
    while True:
        left = max(deadline - time.monotonic(), KNOCK)
        try:
            socket.create_connection((info.address, info.port), left).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
        if time.monotonic() > silent_until:
            _say(info.rank, f"0, expected at {info.address}:{info.port}")
            silent_until = deadline
        time.sleep(KNOCK)


def host_has_ended(store: Store) -> bool:
    """Whether the machine of a TCPStore answers that no program listens at the store's port.

    Ask before a request: a request to a host that has ended prints the frames of PyTorch's error.
    """
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    if isinstance(store, TCPStore):
        try:
            socket.create_connection((store.host, store.port), REACH).close()
        except ConnectionRefusedError:
            return True
        except OSError:  # such as of a machine that does not answer now
            return False
    return False


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
        if host_has_ended(store):
            raise ConnectionRefusedError
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
    except (RuntimeError, OSError):  # the store's host has ended, or was stopped
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


class _RollCall:
    """Rank 0's list of the processes that have come to a start.

    torchrun's store also has the numbers of processes that have ended. All are welcomed, and those
    that live answer by their settings.
    """

    def __init__(self, store: Store, mine: Settings, hosts: bool):
        self.store = store
        self.hosts = hosts  # the store, in which there is no earlier start
        self.start: int = store.add("starts", 1)
        self.answers = [mine]
        self._welcomed = 0
        store.set(f"host/{self.start}", mine.process)

    def call(self) -> str:
        """Look who has come; return the fault of their settings, or ""."""
        count = self.store.add("processes", 0)
        for number in range(self._welcomed + 1, count + 1):
            self.store.set(f"welcome/{number}", str(self.start))
        self._welcomed = count
        while self.store.check([key := f"answer/{self.start}/{len(self.answers)}"]):
            self.answers.append(Settings.from_json(self.store.get(key)))
        return self._rival() or find_fault(self.answers)

    def _rival(self) -> str:
        """The fault of another rank 0 that lives at the same time; the earlier one tells it."""
        fault, mine = "", self.answers[0].process
        if self.store.check([f"outcome/{self.start}"]):
            fault = str(json.loads(self.store.get(f"outcome/{self.start}"))["fault"])
        starts = range(1 if self.hosts else self.start, self.store.add("starts", 0) + 1)
        for start in starts:
            if start != self.start and self.store.check([f"host/{start}"]):
                fault = two_processes(0, mine, self.store.get(f"host/{start}").decode())
                self.store.set(f"outcome/{start}", json.dumps({"fault": fault}))
        return fault

    def missing(self) -> list[int]:
        return sorted(set(range(self.answers[0].world_size)) - {one.rank for one in self.answers})

    def hear_late_ones(self) -> None:
        """Hear those who come a little later, so that the fault names them, and they hear of it."""
        until = time.monotonic() + STAY
        while len(self.answers) < max(one.world_size for one in self.answers):
            if time.monotonic() > until:
                return
            time.sleep(POLL)
            self.call()

    def close(self, *, missing: str = "", fault: str = "") -> None:
        """Tell all who have answered, and those who come later, how the start ended."""
        outcome = {"missing": missing, "fault": fault}
        answers = [one.as_json() for one in self.answers]
        self.store.set(f"outcome/{self.start}", json.dumps(outcome | {"answers": answers}))
        if missing or fault:
            # The other ranks read the key before this process, which may host the store, ends.
            time.sleep(LATER)


def _welcome(store: Store, mine: Settings, timeout: timedelta, hosts: bool) -> int:
    """Return the number of the start, once all ranks have come with the same settings."""
    roll = _RollCall(store, mine, hosts)
    deadline = time.monotonic() + timeout.total_seconds()
    silent_until = time.monotonic() + SILENCE
    while not (fault := roll.call()) and (missing := roll.missing()):
        ranks, now = ", ".join(map(str, missing)), time.monotonic()
        # For ranks that say for whom they wait.
        store.set(f"awaited/{roll.start}", ranks)
        if now > deadline:
            roll.close(missing=ranks)
            raise _did_not_join(ranks, timeout)
        if now > silent_until:
            _say(0, ranks)
            silent_until = deadline
        time.sleep(POLL)
    if fault:
        roll.hear_late_ones()
        fault = roll.call()
    fault = fault or find_local_fault(roll.answers) or find_unreachable(roll.answers)
    roll.close(fault=fault)
    if fault:
        raise ConfigError(fault)
    return roll.start


def _join_start(store: Store, info: RankInfo, mine: Settings, timeout: timedelta) -> int:
    """Return the number of the start, once rank 0 says that all ranks have joined."""
    mine = replace(mine, number=store.add("processes", 1))
    welcome = f"welcome/{mine.number}"
    # Where rank 0 hosts the store, there is one start, and this process may be one too many.
    ended = ["outcome/1"] if info.launcher != "torchrun" else []
    try:
        _wait(store, [welcome, *ended], timeout, lambda: _say(info.rank, "0"))
        start = int(store.get(welcome)) if store.check([welcome]) else 1
        number = store.add(f"answers/{start}", 1)
        store.set(f"answer/{start}/{number}", mine.as_json())

        def say() -> None:
            if info.local_rank == 0:  # one rank of each machine; rank 0 says it on its own
                _say(info.rank, store.get(f"awaited/{start}").decode())

        _wait(store, [f"outcome/{start}"], timeout + timedelta(seconds=LATER), say)
        outcome = json.loads(store.get(f"outcome/{start}"))
    except DistError as e:
        raise _did_not_join("0", timeout) from e
    if outcome["missing"]:
        raise _did_not_join(outcome["missing"], timeout)
    _check_member(
        mine, outcome["fault"], [Settings.from_json(one) for one in outcome.get("answers", ())]
    )
    return start


def _check_member(mine: Settings, fault: str, members: list[Settings]) -> None:
    """Refuse a start with a fault, or one of which this process is no member.

    It may have come too late, after rank 0 had heard as many as it expects.
    """
    is_member = any(one.number == mine.number for one in members)
    if fault := fault or ("" if is_member else find_fault([*members, mine])):
        raise ConfigError(fault)
    if not is_member:
        raise ConfigError(
            f"rank {mine.rank} came to a start that had ended without it; give each job a "
            "MASTER_PORT of its own"
        )


def _rival_fault(info: RankInfo, mine: Settings) -> str:
    """The fault that a rank 0 at the store's address answers, if it waits there for others; or "".

    It may also be another program, which does not answer.
    """
    patience = timedelta(seconds=RIVAL)
    with suppress(DistError, OSError):
        tcp = run_in_daemon(
            lambda: TCPStore(info.address, info.port, None, False, patience, wait_for_workers=False)
        ).result(RIVAL)
        store = PrefixStore("torchpar", tcp)
        start = store.add("starts", 1)
        store.set(f"host/{start}", mine.process)
        until = time.monotonic() + RIVAL
        while time.monotonic() < until:
            if store.check([f"outcome/{start}"]):
                return str(json.loads(store.get(f"outcome/{start}"))["fault"])
            time.sleep(POLL)
    return ""


def _wait(store: Store, keys: list[str], timeout: timedelta, say: Callable[[], None]) -> None:
    """Wait for one of ``keys``; call ``say`` after `SILENCE` seconds, and wait for the first one.

    Raises:
        DistError: the store's host has ended, or nobody sets a key within the timeout.
    """
    began = time.monotonic()
    patience = timeout.total_seconds()
    # A wait that times out would print the frames of PyTorch's error.
    while time.monotonic() < began + patience:
        if any(store.check([key]) for key in keys):
            return
        if time.monotonic() > began + SILENCE:
            say()
            break
        time.sleep(POLL)
    left = max(began + patience - time.monotonic(), POLL)
    store.wait(keys[:1], timedelta(seconds=left))


def _say(rank: int, awaited: str) -> None:
    logger.warning("rank %d waits for rank %s", rank, awaited)


def _did_not_join(ranks: str, timeout: timedelta) -> RankLostError:
    return RankLostError(
        f"rank {ranks} did not join the others within {timeout.total_seconds():g} s; look at the "
        f"output of rank {ranks}, or take a longer timeout"
    )
