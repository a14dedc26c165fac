# SPDX-License-Identifier: MIT
"""Verdicts on a homework in the ladder: launches for one size, syntax errors, estimated times."""

import logging
import os
import platform
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from commands import run

from benchmarks.ladder import emulated, rungs, student
from benchmarks.ladder.cases import make_case
from benchmarks.timing import Rejected
from torchpar.baselines import grader, numpy_mlp
from torchpar.errors import ConfigError
from torchpar.parallel.launch.guard import WATCHED, TooSlow


@pytest.fixture(autouse=True)
def by_the_simulator(monkeypatch) -> None:
    """Numba's, which numba-cuda would otherwise take the place of."""
    monkeypatch.setenv(emulated.SIMULATOR, "1")


def entry(shape: tuple[int, ...]) -> student.Entry:
    case = make_case("maximum", shape)
    return student.Entry("my.py", "max_gpu", numpy_mlp.maximum, case, case)


def nothing(a: np.ndarray, b: np.ndarray) -> None:
    """A function that these tests do not call."""


def launch(grid: int, block: int, most: float) -> int:
    """The number of launches that pass on to Numba's simulator, which this test leaves out."""
    kernel = pytest.importorskip("numba.cuda.simulator.kernel", reason="numba has it")
    passed: list[object] = []
    with (
        patch.object(kernel.FakeCUDAKernel, "__call__", lambda self, *_: passed.append(self)),
        emulated.simulated([], most),
    ):
        kernel.FakeCUDAKernel(print, device=False)[grid, block](np.zeros(1))
    return len(passed)


def test_a_launch_with_more_threads_than_a_part_needs_is_for_the_whole():
    assert launch(3, 4, most=12) == 1
    with pytest.raises(emulated.WrittenForTheWhole) as raised:
        launch(3, 5, most=12)
    assert raised.value.threads == 15
    with (  # nor is it an error of the function in the process of a command
        open(os.devnull, "w") as pipe,
        patch.object(WATCHED, "pipe", pipe.fileno()),
        pytest.raises(emulated.WrittenForTheWhole),
        grader.calling("my.py", "max_gpu", 1.0),
    ):
        raise raised.value


def test_a_block_of_more_threads_than_a_gpu_takes_is_refused():
    assert launch(1, 1024, most=2000) == 1
    with pytest.raises(ValueError, match="a block of 1025 threads; a GPU takes at most 1024"):
        launch(1, 1025, most=2000)


def test_a_function_for_the_whole_is_executed_there_alone(capsys):
    sizes: list[tuple[int, ...]] = []

    def execute_once(
        one: student.Entry, limit: float = 1.0, records: bool = False
    ) -> tuple[emulated.Executed, float]:
        sizes.append(one.tried.shape)
        if one.tried.shape != (300, 300):
            raise emulated.WrittenForTheWhole(90_000)
        raise error

    error: BaseException = Rejected("result[0, 128] is 0")
    with patch.object(emulated, "execute_once", execute_once):
        with pytest.raises(Rejected, match=r"^result\[0, 128\] is 0$"):
            emulated.execute(entry((300, 300)))
        error = TooSlow("it takes more than 300 s")
        with pytest.raises(student.SlowCall, match=r"^it takes more than 300 s without a GPU$"):
            emulated.execute(entry((300, 300)))
    assert sizes == [(32, 32), (300, 300)] * 2
    assert capsys.readouterr().out.startswith("my.py: max_gpu launches 90,000 threads; ")


def test_threads_are_limited_for_a_part_of_a_case_alone():
    limits: list[float] = []

    def simulated(launched: list[object], most: float, records: bool) -> object:
        limits.append(most)
        raise Rejected("stop")

    one = entry((1000, 1000))
    with patch.object(emulated, "simulated", simulated):
        for tried in (one.small(), one.case):
            one.tried = tried
            with pytest.raises(Rejected, match="stop"):
                emulated.execute_once(one)
    assert limits == [64 * 32 * 32, float("inf")]


def test_a_function_that_takes_too_long_without_a_gpu_is_slow_and_not_wrong(capsys):
    case = make_case("maximum", (1000, 1000))

    def execute(one: student.Entry) -> None:
        raise TooSlow("it takes more than 90 s")

    with (
        patch.object(emulated, "execute", execute),
        patch.object(torch.cuda, "is_available", lambda: False),
    ):
        rungs.student_without_gpu(Path("my.py"), "max_gpu", nothing, case)
    assert capsys.readouterr().out == (
        "my.py: max_gpu is too slow: it takes more than 90 s without a GPU\n"
    )


def test_an_extrapolated_time_is_not_called_that_of_the_first_call(capsys):
    case = make_case("maximum", (40, 30))

    def begin(one: student.Entry) -> float:
        one.tried = one.small()
        return 999.0

    with patch.object(student.Entry, "begin", begin):
        student.enter(Path("my.py"), "max_cpu", nothing, case)
    assert capsys.readouterr().out == (
        "my.py: max_cpu is right (at 32×30; a call of the whole would take 999 s)\n"
    )
    with patch.object(student.Entry, "begin", lambda one: 0.5):
        student.enter(Path("my.py"), "max_cpu", nothing, case)
    assert capsys.readouterr().out == "my.py: max_cpu is right (first call 500 ms)\n"


def test_a_missing_matplotlib_is_told_before_the_measurement(tmp_path, capsys):
    with (
        patch.object(rungs, "find_spec", lambda name: None),
        patch.object(rungs, "silence_search_for_cuda"),
        patch.object(rungs, "keep_freed_memory"),
        patch.dict(os.environ),
        pytest.raises(ConfigError, match="is no file"),
    ):
        rungs.main([f"--output={tmp_path}", "--with", "missing.py"])
    told = "No picture will be drawn: matplotlib is not installed; pip install matplotlib\n"
    assert told in capsys.readouterr().out


@pytest.mark.parametrize("gpu", [False, True])
def test_without_a_gpu_the_compiler_does_not_warn_of_cuda(gpu):
    """The logger is that which `torch.utils.cpp_extension` has; with a GPU it stays as it is."""
    cpp_extension = pytest.importorskip("torch.utils.cpp_extension", reason="it needs setuptools")
    logger = cpp_extension.logger
    before = logger.level
    try:
        with patch.object(torch.cuda, "is_available", lambda: gpu):
            logger.setLevel(logging.WARNING)
            rungs.silence_search_for_cuda()
        assert logger.isEnabledFor(logging.WARNING) == gpu
        assert logger.isEnabledFor(logging.ERROR)
    finally:
        logger.setLevel(before)


FAULTS = """
import resource
import numpy as np
from benchmarks.ladder import rungs

def faults():
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        arrays = [np.ones(30_000_000, np.int8) for _ in range(3)]
        del arrays
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = faults()
rungs.keep_freed_memory()
print(given_back, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc has the options")
def test_freed_memory_is_kept():
    """The pages of 90 MB come once, and not in each turn."""
    status, out, err = run(sys.executable, "-c", FAULTS)
    assert status == 0, err
    given_back, kept = map(int, out.split())
    assert kept < given_back / 4
