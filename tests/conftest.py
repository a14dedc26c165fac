# SPDX-License-Identifier: MIT
"""Fixtures: the devices there are, Triton's interpreter in a process of its own, and a set of ranks."""

import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from typing import Any

import pytest
import torch

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
MAX_RANKS = 4


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Callable[..., Any]]:
    """``interpreter(function, *args)`` runs a module-level function where Triton interprets its kernels.

    The variable must be set before Triton is imported, so ``function`` imports `torchpar.kernels` itself.
    """
    with _worker(initializer=_interpret) as worker:
        yield lambda function, *args: worker.submit(function, *args).result()


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., list[Any]]]:
    """``ranks(world_size, function, *args)``: the results of a module-level function on each gloo rank.

    The processes are started once per session; each call makes a new process group among them.
    """
    stores = tmp_path_factory.mktemp("stores")
    calls = itertools.count()
    with ExitStack() as stack:
        workers = [stack.enter_context(_worker()) for _ in range(MAX_RANKS)]

        def run(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
            store = f"file://{stores / str(next(calls))}"
            futures = [
                worker.submit(_on_rank, rank, world_size, store, function, args)
                for rank, worker in enumerate(workers[:world_size])
            ]
            return [future.result() for future in futures]

        yield run


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"


def _worker(**options: Any) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), **options)


def _on_rank(rank: int, world_size: int, store: str, function: Callable[..., Any], args: Any) -> Any:
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    try:
        return function(*args)
    finally:
        dist.destroy_process_group()
