# SPDX-License-Identifier: MIT
"""Fixtures, and what tests share.

- A file's tests run on one worker of pytest-xdist, and share its processes and models.
- `ranks` are processes of gloo that live as long as the worker. They are forked from one server
  that has imported PyTorch and the examples' modules. Each call makes a new process group.
- `world` is a world of one rank, for all tests of a file.
- `interpreter` is one process in which Triton interprets its kernels.
- Compiled kernels lie in Triton's cache in the home folder, which all workers share.
"""

import gc
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest

# Before torch is imported: workers with two OpenMP threads each take several times as long on two
# cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Inductor would compile and run a program for each instruction set, which takes ten seconds.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
# Its processes that compile would import torch for a few kernels.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
if TYPE_CHECKING:  # the process that starts pytest-xdist's workers needs no torch
    from torchpar.parallel.launch.local import Ranks

LONGEST = """
    check_operator check_optimizer docs emulated_corpus examples exercises fp32_products graphed
    launch library magnitudes parallel_meshes ptx rendezvous residency run_page symmetric_matmul
    training
"""


def pytest_configure(config: pytest.Config) -> None:
    """Run all tests of a file on one worker of pytest-xdist, because they share processes and
    models. Let the warnings of other packages be no errors."""
    import foreign_warnings

    lines = config.getini("filterwarnings")
    # Behind "error", and before what is ignored
    lines[1:1] = foreign_warnings.filters(config.getini("pythonpath"))
    if config.getoption("dist", "no") == "load":  # which -n alone chooses
        config.option.dist = "loadfile"
        config.option.loadscopereorder = False  # by the number of tests
    gc.disable()  # until the tests are imported: most of what imports allocate stays


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return the workers of -n auto: one more than there are cores, since many tests wait for
    processes that they have started."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (cores or 1) + 1


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that no worker is left with one at the end."""
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONGEST.split())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests of the fixture `device` on the CPU, and on a GPU if there is one."""
    import torch

    if "device" in metafunc.fixturenames:
        devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
        metafunc.parametrize("device", devices, indirect=True)


@pytest.fixture(scope="session")
def usual_threads() -> int:
    import torch

    return torch.get_num_threads()


@pytest.fixture(autouse=True)
def threads(usual_threads: int) -> Iterator[None]:
    """Restore PyTorch's number of threads after each test, because Numba's first parallel loop
    changes it."""
    import torch

    yield
    torch.set_num_threads(usual_threads)


@pytest.fixture(autouse=True)
def unwatched() -> Iterator[None]:
    """End the watch that the exact mode leaves behind, for as long as its tensors live."""
    yield
    if dispatch := sys.modules.get("torchpar.exact.dispatch"):
        dispatch._watch.end()


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> Iterator[None]:
    """Let SIGINT interrupt the tests and their processes, also where a shell has started them in
    the background, which ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True, scope="session")
def unhurried() -> Iterator[None]:
    """Let no loop say how far it is, as it would on a busy machine; tests of that choose a time."""
    from torchpar import console

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console, "SILENCE", math.inf)
        yield


@pytest.fixture
def ending_signals(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let `terminable` handle each signal, also where nohup has this process ignore SIGHUP."""
    from torchpar.parallel.launch.processes import ENDING

    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # which the signal sets
    before = {one: signal.signal(one, signal.SIG_DFL) for one in ENDING}
    yield
    for one, handler in before.items():
        signal.signal(one, handler)


@pytest.fixture(autouse=True, scope="session")
def kernels_always() -> Iterator[None]:
    """Launch the kernels on a GPU, at any size: tests have small ones, of which the library
    computes most."""
    import torch

    if not (torch.cuda.is_available() and find_spec("triton")):
        yield
        return
    with patch("torchpar.kernels.tiles.library_is_faster", lambda *args, **options: False):
        yield


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Callable[..., Any]]:
    """``interpreter(function, *args)`` runs a module-level function where Triton interprets its
    kernels.

    The variable must be set before Triton is imported, so ``function`` imports `torchpar.kernels`
    itself.
    """
    from commands import interpret  # a module of its own name, unlike the two conftest.py

    with ProcessPoolExecutor(1, get_context("spawn"), initializer=interpret) as worker:
        yield lambda function, *args: worker.submit(function, *args).result()


@pytest.fixture(scope="module")
def world() -> Iterator[Any]:
    """A world of one rank, which every `join_world` of this process finds."""
    from torchpar.parallel import join_world

    with join_world("cpu") as world:
        yield world


@pytest.fixture(scope="session")
def fork_server() -> None:
    """The server that processes of the tests are forked from: it has imported the examples'
    modules, too."""
    from commands import ROOT, import_path

    from torchpar.parallel.launch.local import PRELOAD, fork_context

    modules = ["torchpar.parallel.split.pipeline", "torchpar.training", "torchvision.datasets"]
    # Without its own packages, ``support`` would end the server.
    if find_spec("rich") and find_spec("tyro"):
        modules += ["rich.progress", "tyro", "support.lesson"]
    # Until Python 3.14 the server ignores the parent's sys.path.
    paths = import_path(*(ROOT / folder for folder in (".", "examples", "tests", "nogpu/tests")))
    with patch.dict(os.environ, PYTHONPATH=paths):
        fork_context([*PRELOAD, *modules])


@pytest.fixture(scope="session")
def ranks(fork_server: None) -> Iterator["Ranks"]:
    """``ranks(world_size, function, *args)``: the results of a module-level function on each gloo
    rank."""
    from torchpar.parallel.launch.local import Ranks

    with Ranks() as started:
        yield started
