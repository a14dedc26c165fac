# SPDX-License-Identifier: MIT
"""Hooks of a session of pytest whose kernels are executed: `nogpu.pytest` registers them."""

import argparse
import unittest
from collections.abc import Callable, Generator
from contextlib import ExitStack
from functools import wraps
from inspect import iscoroutinefunction
from typing import ParamSpec, TypeVar

import pytest
import torch

from nogpu.cuda.advice import advise, advise_numba, says_cuda
from nogpu.cuda.stand_in import cuda_is_cpu
from nogpu.report.report import Report
from nogpu.triton.emulate import emulate
from nogpu.triton.emulator import Emulator

P = ParamSpec("P")
T = TypeVar("T")


class _Phase:
    """The setup, the call or the teardown of a test: what it launches, and the faults."""

    def __init__(self, gpu: Emulator):
        self.gpu, self.launches, self.faults = gpu, len(gpu.launches), len(gpu.faults)
        self.checked = self.faults

    def rest(self) -> Report:
        """The report without the errors that a check has failed for."""
        said = [one for one in self.gpu.faults[self.faults : self.checked] if one.kind != "error"]
        return Report(self.gpu.launches[self.launches :], [*said, *self.gpu.faults[self.checked :]])

    def check(self) -> None:
        """Fail for each error that no earlier check has failed for."""
        errors = Report([], self.gpu.faults[self.checked :]).errors
        self.checked = len(self.gpu.faults)
        if errors:
            pytest.fail("\n".join(map(str, errors)), pytrace=False)


class Hooks:
    """Hooks of a session whose kernels are executed.

    One emulator is active from the first test to the last one: a fixture of a module may enter a
    mode of PyTorch in one test and leave it in another, and modes are left in reverse order.
    """

    def __init__(self, options: argparse.Namespace):
        self.options, self.active = options, ExitStack()

    def enter(self) -> None:
        options = self.options
        emulator = emulate(
            options.nogpu_arch or "sm_90",
            options.nogpu_schedules or "one",
            configurations=options.nogpu_configurations or "first",
        )
        self.gpu = self.active.enter_context(emulator)
        if options.cuda_is_cpu:
            self.active.enter_context(cuda_is_cpu(self.gpu))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self) -> None:
        if not self.options.cuda_is_cpu:
            self.enter()

    @pytest.hookimpl(wrapper=True)
    def pytest_sessionfinish(self) -> Generator[None, object, object]:
        with self.active:  # the last fixtures are torn down here, if the session was stopped
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, object, object]:
        self.gpu.launches.clear()
        self.gpu.faults.clear()
        self.gpu._by_place.clear()  # or a fault of an earlier test would only be counted
        return (yield from self._run(item, "setup", _Phase(self.gpu)))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        phase = _Phase(self.gpu)
        test = getattr(item, "obj", None)
        is_of_unittest = isinstance(getattr(item, "instance", None), unittest.TestCase)
        if is_of_unittest and callable(test) and not iscoroutinefunction(test):
            item.obj = _checked(test, phase)  # type: ignore[attr-defined]
        return (yield from self._run(item, "call", phase))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, object, object]:
        return (yield from self._run(item, "teardown", _Phase(self.gpu)))

    def _run(self, item: pytest.Item, when: str, phase: _Phase) -> Generator[None, object, object]:
        try:
            result = yield
            phase.check()
            return result
        except Exception as e:
            is_cpu = self.options.cuda_is_cpu  # then `torch.cuda.is_available` says so
            has_advice = advise_numba(e, is_cpu) or (says_cuda(e) and not is_cpu)
            if has_advice and (is_cpu or not torch.cuda.is_available()):
                advise(e, is_cpu)
            raise
        finally:
            rest = phase.rest()
            if rest.faults:
                item.add_report_section(when, "kernels", str(rest))


def _checked(test: Callable[P, T], phase: _Phase) -> Callable[P, T]:
    """Let a method of unittest fail itself, because `unittest.expectedFailure` asks it alone."""

    @wraps(test)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        result = test(*args, **kwargs)
        phase.check()
        return result

    return checked
