# SPDX-License-Identifier: MIT
"""Settings that the ranks of one start share, and the fault if they do not."""

import json
import os
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Self

import torch

from torchpar.parallel.launch.interface import is_loopback
from torchpar.parallel.launch.rank_info import RankInfo, first_difference

# What every rank must have been given alike, by its name in messages, and what to do.
SHARED = {
    "WORLD_SIZE": "set it to the number of all ranks on each",
    "the backend": "give all ranks the same device, and each a GPU of its own or none",
    "the version of torchpar": "install one version for all ranks",
    "the version of PyTorch": "install one version for all ranks",
}


@dataclass(frozen=True)
class Settings:
    """What one process was started with.

    Attributes:
        rank: its RANK.
        local_world_size: its LOCAL_WORLD_SIZE.
        shared: the values of `SHARED`, as text.
        process: where it runs, for messages.
        number: tells processes apart that come to one store.
        machine: as `interface.machine`; "" where the ranks are on one machine, or nothing tells.
        gloo: the address at which gloo listens, likewise.
    """

    rank: int
    local_world_size: int
    shared: dict[str, str]
    process: str
    number: int = 0
    machine: str = ""
    gloo: str = ""

    @classmethod
    def of(cls, info: RankInfo, backend: str = "") -> Self:
        """This process's settings; ``backend`` is that of its collectives."""
        # Wheels of one version for CPUs and for GPUs differ behind the plus sign.
        of_torch = str(torch.__version__).partition("+")[0]
        values = str(info.world_size), backend, _installed_version(), of_torch
        process = f"process {os.getpid()} on {socket.gethostname()}"
        shared = dict(zip(SHARED, values, strict=True))
        return cls(info.rank, info.local_world_size, shared, process)

    @property
    def world_size(self) -> int:
        return int(self.shared["WORLD_SIZE"])

    def as_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        return cls(**json.loads(text))


def _installed_version() -> str:
    """The version of torchpar; "" of a checkout that is not installed."""
    try:
        return metadata.version("torchpar")
    except metadata.PackageNotFoundError:
        return ""


def find_fault(settings: Sequence[Settings]) -> str:
    """The line that names the first setting in which processes differ; "" if there is none."""
    by_rank: dict[int, Settings] = {}
    for one in sorted(settings, key=lambda one: one.rank):
        other = by_rank.setdefault(one.rank, one)
        if other is not one:
            return two_processes(one.rank, other.process, one.process)
    if difference := first_difference([one.shared for one in by_rank.values()], [*by_rank]):
        name, clause = difference
        return f"{clause}, expected the same on all; {SHARED[name]}"
    return ""


def two_processes(rank: int, one: str, other: str) -> str:
    """The line about two processes that have one RANK."""
    return (
        f"RANK is {rank} on {one} and on {other}, expected another on each; give each process a "
        "RANK of its own, and each job a MASTER_PORT of its own"
    )


def find_local_fault(by_rank: Sequence[Settings]) -> str:
    """The line about a LOCAL_WORLD_SIZE that cannot be; "" without one.

    Args:
        by_rank: the settings of all ranks. The ranks of a machine have
            the same LOCAL_WORLD_SIZE, which is their number.
    """
    counts = Counter(one.local_world_size for one in by_rank)
    if len(counts) == 1 or not any(count % size for size, count in counts.items()):
        return ""
    difference = first_difference([{"LOCAL_WORLD_SIZE": one.local_world_size} for one in by_rank])
    assert difference
    return f"{difference[1]}, expected the number of ranks on its machine; set it so on each rank"


def find_unreachable(settings: Sequence[Settings]) -> str:
    """The line about ranks that those on other machines do not reach by gloo; "" without any."""
    machines = {one.machine for one in settings}
    hidden = sorted((one for one in settings if is_loopback(one.gloo)), key=lambda one: one.rank)
    if len(machines) == 1 or "" in machines or not hidden:
        return ""
    first, ranks = hidden[0], ", ".join(str(one.rank) for one in hidden)
    return (
        f"gloo listens at {first.gloo} on rank{'s' * (len(hidden) > 1)} {ranks}, since the host's "
        f"name has no other address there ({first.process}), expected one that the other machines "
        "reach; export GLOO_SOCKET_IFNAME on each machine, with the name of the network interface "
        "that leads to the others, such as eth0"
    )
