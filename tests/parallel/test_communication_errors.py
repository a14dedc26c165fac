# SPDX-License-Identifier: MIT
"""Errors of ranks that lost each other: their classes, and what has none.

gloo's errors are plain RuntimeErrors. When one of these tests finds a class, let
`is_communication_error` ask for it, and drop its regular expression.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroupGloo  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from torchpar.parallel.launch import rendezvous
from torchpar.parallel.launch.rank_info import RankInfo
from torchpar.parallel.launch.world import _explain, is_communication_error
from torchpar.testing.optimizers.refusals import failures
from torchpar.testing.optimizers.trial import Failure

SHORT = timedelta(seconds=0.3)


def error_of(call: Callable[[], object]) -> Exception:
    with pytest.raises(Exception) as found:  # noqa: PT011 - the tests judge its class
        call()
    return found.value


def lose_rank_1(how: str) -> Exception:
    """The error of rank 0 of two, if rank 1 has left, or does not answer in time."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    with ThreadPoolExecutor(2) as pool:  # each waits for the other one
        first, second = pool.map(lambda rank: ProcessGroupGloo(store, rank, 2, SHORT), range(2))
    if how == "leaves":
        del second
    return error_of(lambda: first.allreduce([torch.ones(1)]).wait())


@pytest.mark.parametrize(
    "how, message", [("leaves", "Connection closed by peer"), ("is late", "Timed out waiting")]
)
def test_errors_of_gloo_are_plain_and_name_its_file(how: str, message: str) -> None:
    error = lose_rank_1(how)
    assert type(error) is RuntimeError, "gloo's errors have a class now"
    assert message in str(error)
    assert is_communication_error(error)
    with pytest.raises(Failure) as found, failures():
        raise error
    assert found.value.args[0] == "hangs"


@pytest.mark.parametrize("how, remedy", [("leaves", ""), ("is late", ", or take a longer timeout")])
def test_a_lost_rank_comes_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, how: str, remedy: str
) -> None:
    error = lose_rank_1(how)
    assert isinstance(error, RuntimeError)
    store, info = dist.HashStore(), RankInfo(0, 0, 2, 2, "127.0.0.1", 1, "env")  # type: ignore[attr-defined]
    for missing, ranks in (([1], "rank 1"), ([], "the others")):
        monkeypatch.setattr(rendezvous, "missing_ranks", lambda *_, found=missing: found)
        said = str(_explain(error, store, info))
        assert said.endswith(f"); look at the output of {ranks}{remedy}")
        assert "\n" not in said


@pytest.mark.parametrize("local_world_size", [1, 2])
def test_machines_that_gloo_does_not_connect_are_told_of_its_address(
    monkeypatch: pytest.MonkeyPatch, local_world_size: int
) -> None:
    """On one machine the other rank has ended."""
    monkeypatch.setattr(rendezvous, "missing_ranks", lambda *_: [1])
    monkeypatch.setattr(rendezvous, "gloo_address", lambda: "10.7.0.1")
    error = RuntimeError(
        "Gloo connectFullMesh failed with [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:9] "
        "timed out connecting: SO_ERROR: Connection refused, remote=[172.17.0.1]:23462$1"
    )
    assert is_communication_error(error)
    info = RankInfo(0, 0, 2, local_world_size, "127.0.0.1", 1, "env")
    said = str(_explain(error, dist.HashStore(), info))  # type: ignore[attr-defined]
    if local_world_size == 2:
        assert said.startswith("rank 1 does not answer (Gloo connectFullMesh failed with ")
        assert said.endswith("); look at the output of rank 1")
    else:
        assert said == (
            "gloo did not connect rank 0 to rank 1 (timed out connecting: SO_ERROR: Connection "
            "refused, remote=[172.17.0.1]:23462$1); look at the output of rank 1; where it runs, "
            "let GLOO_SOCKET_IFNAME on each machine name the interface that leads to the others, "
            "such as eth0: gloo listens at 10.7.0.1 here"
        )


def test_an_interface_that_is_not_there_is_a_plain_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none")
    error = error_of(
        lambda: dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    )
    assert type(error) is RuntimeError, "gloo's errors have a class now"
    assert is_communication_error(error)


def wait_for_a_key() -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    store.set_timeout(SHORT)
    store.get("nothing")


def meet_a_store_that_is_not_there() -> None:
    dist.TCPStore("127.0.0.1", 1, 2, False, timeout=SHORT)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "call, kind",
    [(wait_for_a_key, "DistStoreError"), (meet_a_store_that_is_not_there, "DistNetworkError")],
)
def test_errors_of_stores_and_sockets_have_classes(call: Callable[[], None], kind: str) -> None:
    error = error_of(call)
    assert type(error) is getattr(dist, kind)
    assert is_communication_error(error)  # type: ignore[arg-type]


def train_with_a_hook_that_loses_a_rank() -> list[Exception]:
    def hook(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        raise dist.DistNetworkError("Connection closed by rank 1")  # type: ignore[attr-defined]

    model = DistributedDataParallel(torch.nn.Linear(2, 2))
    model.register_comm_hook(None, hook)
    return [error_of(model(torch.ones(1, 2)).sum().backward)]


def test_an_error_of_a_hook_keeps_its_class(ranks) -> None:
    """`SharedSum` raises it in a hook, which DistributedDataParallel calls in C++."""
    ((error,),) = ranks(1, train_with_a_hook_that_loses_a_rank)
    assert type(error) is dist.DistNetworkError  # type: ignore[attr-defined]
    assert is_communication_error(error)


@pytest.mark.parametrize(
    "message",
    ["the reader of the data has timed out", "Connection refused by the database", "see /gloo/"],
)
def test_errors_of_others_are_none_of_ranks(message: str) -> None:
    assert not is_communication_error(RuntimeError(message))
    with pytest.raises(Failure) as found, failures():
        raise RuntimeError(message)
    assert found.value.args[0] == "refuses"
