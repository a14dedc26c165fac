# SPDX-License-Identifier: MIT
"""Fixtures, and what tests share. A file's tests run on one worker of pytest-xdist."""

import gc
import math
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import pytest

# Before torch is imported: workers with two OpenMP threads each take several times as long on two
# cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Inductor would compile and run a program for each instruction set, which takes ten seconds.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Run all tests of a file on one worker of pytest-xdist. Let the warnings of other packages be
    no errors."""
    import foreign_warnings

    lines = config.getini("filterwarnings")
    added = foreign_warnings.filters(config.getini("pythonpath"))
    if not set(added) <= set(lines):  # another house's conftest.py has added them
        lines[1:1] = added
    if config.getoption("dist", "no") == "load":  # which -n alone chooses
        config.option.dist = "loadfile"
        config.option.loadscopereorder = False  # by the number of tests
    gc.disable()  # until the tests are imported: most of what imports allocate stays


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> Iterator[None]:
    """Let SIGINT interrupt the tests and their processes, also where a shell has started them in
    the background, which ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True, scope="session")
def unhurried() -> Iterator[None]:
    """Let no launch say how far it is, as it would on a busy machine; tests of that choose a
    time."""
    from nogpu import console

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console, "SILENCE", math.inf)
        yield


@pytest.fixture(scope="session")
def fork_server() -> None:
    """The server that processes of the tests are forked from: it has imported PyTorch."""
    get_context("forkserver").set_forkserver_preload(["nogpu.command"])


@contextmanager
def without_numba_cuda() -> Iterator[None]:
    """Let numba.cuda be imported anew. Numba takes what it registers only once."""
    registries = sys.modules["numba.core.target_extension"]
    target = registries.target_registry["cuda"]
    kept = (sys.modules, registries.jit_registry, registries.dispatcher_registry)

    def take() -> list[dict[Any, Any]]:
        vars(sys.modules["numba"]).pop("cuda", None)
        names = [name for name in sys.modules if f"{name}.".startswith("numba.cuda.")]
        return [{key: table.pop(key) for key in (*names, target) if key in table} for table in kept]

    before = take()
    yield
    take()
    for table, entries in zip(kept, before, strict=True):
        table.update(entries)
    if "numba.cuda" in sys.modules:
        vars(sys.modules["numba"])["cuda"] = sys.modules["numba.cuda"]


@pytest.fixture
def without_simulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let numba.cuda be that of a GPU, also where another test has imported its simulator, or has
    set the variable, which Numba reads again before it compiles."""
    monkeypatch.delenv("NUMBA_ENABLE_CUDASIM", raising=False)
    config = sys.modules.get("numba.core.config")
    if config is None:  # numba is not imported
        yield
        return
    monkeypatch.setattr(config, "ENABLE_CUDASIM", 0)
    with without_numba_cuda():
        yield


@pytest.fixture(scope="module")
def world() -> Iterator[None]:
    """A group of one process."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True, scope="session")
def registered() -> None:
    """Import what registers operators, which PyTorch refuses a second time: `pytester` forgets the
    modules that its tests import."""
    import torch._inductor.test_operators
    import torch.distributed._functional_collectives  # noqa: F401
