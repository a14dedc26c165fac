# SPDX-License-Identifier: MIT
"""Repeated calls by C++ on a stub of the driver: no Python, and a known number of launches."""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from playing import MODULE, entered, needs_cpp, played, playing

from torchpar.library import player

pytest.importorskip("triton", reason="the kernels are written in Triton")
from benchmarks.driver import gpu_of_cpu_tensors
from benchmarks.host.calls import FORWARD, FULL, NO_GRADIENT, Calls, operators_calls
from benchmarks.host.stub import Stub, build_stub, find_compiler

pytestmark = [
    needs_cpp,
    pytest.mark.skipif(not find_compiler(), reason="the stub of libcuda needs a C compiler"),
]
# Launches and new tensors of a call. ATen computes a product in the backward passes.
EXPECTED = {
    ("maximum", NO_GRADIENT): (1, 1),
    ("maximum", FORWARD): (1, 1),
    ("maximum", FULL): (2, 3),
    ("linear_sigmoid", NO_GRADIENT): (1, 1),
    ("linear_sigmoid", FORWARD): (1, 1),
    ("linear_sigmoid", FULL): (2, 5),
    ("matmul_t", NO_GRADIENT): (1, 1),
    ("matmul_t", FORWARD): (1, 1),
    ("symmetric_matmul", NO_GRADIENT): (1, 1),
    ("symmetric_matmul", FORWARD): (1, 1),
}


@pytest.fixture(scope="module")
def stub(tmp_path_factory) -> Stub:
    """Under a name of its own, so that nothing takes it for the driver."""
    return Stub(build_stub(tmp_path_factory.mktemp("stub"), "libnotes.so"))


@pytest.fixture
def calls(stub) -> Iterator[Calls]:
    MODULE.set_launch(stub.launch)
    with gpu_of_cpu_tensors():
        yield operators_calls("cpu")


def allocations(call: Callable[[], object]) -> int:
    """The tensors whose memory a call allocates."""
    with torch.autograd.profiler.profile(use_device=None, profile_memory=True) as seen:
        call()
    events: Any = seen.kineto_results
    return sum(one.name() == "[memory]" and one.nbytes() > 0 for one in events.events())


@pytest.mark.parametrize("operator, mode", EXPECTED)
def test_a_repeated_call_enters_no_python_and_launches_what_is_expected(
    calls, stub, operator, mode
):
    call = calls[f"{operator}, {mode}, torch.ops.torchpar"]
    launches, tensors = EXPECTED[operator, mode]
    with playing(calls_python=False):
        for _ in range(3):
            call()
        _, tapes, missed = played(call)
        assert (tapes, missed) == (2 if mode == FULL else 1, 0)
        assert entered(call) == []
        assert len(stub.launches(call)) == launches
        assert allocations(call) == tensors
    assert any(name.startswith("torchpar.kernels") for name in entered(call)), "by Python it does"
    assert stub.launches(call) == [], "the stand-in for Triton's launcher is Python's"


def test_a_call_that_allocates_or_launches_more_is_noticed(calls, stub):
    assert allocations(partial(torch.zeros, 3)) == 1
    assert allocations(lambda: torch.zeros(3).neg()) == 2
    call = calls[f"maximum, {NO_GRADIENT}, torch.ops.torchpar"]
    with playing(calls_python=False):
        for _ in range(3):
            call()
        once = stub.launches(call)
        assert stub.launches(lambda: (call(), call())) == once * 2
        other = calls[f"linear_sigmoid, {NO_GRADIENT}, torch.ops.torchpar"]
        for _ in range(3):
            other()
        assert stub.launches(other) != once


def test_the_way_to_a_launch_leads_through_six_files(calls):
    """Count the files of a call by Python. With C++ there is one more."""
    call = calls[f"matmul_t, {NO_GRADIENT}, torch.ops.torchpar"]
    call()
    with patch.object(player.core, "module", None):
        names = [name for name in entered(call) if name.startswith("torchpar.")]
    modules = {max((m for m in sys.modules if n.startswith(f"{m}.")), key=len) for n in names}
    assert {"torchpar.library.call_path", "torchpar.kernels.launch"} <= modules
    assert len(modules) <= 6, sorted(modules)
