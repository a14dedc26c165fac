# SPDX-License-Identifier: MIT
"""Hooks of a session of pytest whose kernels are executed: `nogpu.pytest` registers them."""

import argparse
import unittest
from collections.abc import Callable, Generator
from contextlib import ExitStack
from functools import wraps
from inspect import iscoroutinefunction
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import pytest
import torch

from nogpu.cuda.advice import advise, advise_numba, says_cuda
from nogpu.cuda.stand_in import cuda_is_cpu
from nogpu.machine.gpu_state import TooLarge
from nogpu.record.fault_names import NAMES
from nogpu.record.faults import Fault
from nogpu.record.source import repository
from nogpu.report.findings import findings_of
from nogpu.report.github import annotations
from nogpu.report.report import Report
from nogpu.report.sarif import as_sarif
from nogpu.report.suite import OfTest, Suite
from nogpu.triton.account import Account
from nogpu.triton.defined_kernels import defined_kernels
from nogpu.triton.emulate import emulate
from nogpu.triton.emulator import TOO_LARGE, Emulator

SKIPS = (pytest.skip.Exception, unittest.SkipTest)
NEEDS_FLAG = 'tests that launch kernels for device="cuda" need --cuda-is-cpu'
SAMPLED = "values are not judged, since only samples of programs were executed"
P = ParamSpec("P")
T = TypeVar("T")


class _Phase:
    """The setup, the call or the teardown of a test: what it launches, and the faults.

    Args:
        allowed: names of faults that do not let it fail.
    """

    def __init__(self, gpu: Emulator, allowed: set[str]):
        self.gpu, self.launches, self.faults = gpu, len(gpu.launches), len(gpu.faults)
        self.checked, self.allowed = self.faults, allowed

    def _fails(self, fault: Fault) -> bool:
        is_known = fault.name == TOO_LARGE or not fault.is_after_sample
        return fault.kind == "error" and is_known and fault.name not in self.allowed

    def rest(self) -> Report:
        """The report without the errors that a check has failed for."""
        said = [one for one in self.gpu.faults[self.faults : self.checked] if not self._fails(one)]
        return Report(self.gpu.launches[self.launches :], [*said, *self.gpu.faults[self.checked :]])

    def check(self) -> None:
        """Fail for each error that no earlier check has failed for."""
        if (failed := self._failed()) is not None:
            raise failed

    def _failed(self) -> BaseException | None:
        errors = [one for one in self.gpu.faults[self.checked :] if self._fails(one)]
        self.checked = len(self.gpu.faults)
        return pytest.fail.Exception("\n".join(map(str, errors)), pytrace=False) if errors else None

    def verdict(self, error: BaseException) -> BaseException | None:
        """Return what is said instead of an error of the test; None: the error stands.

        A test that skips itself fails by the faults that it had before.

        A launch that is too large fails in one line. Where a launch has executed a sample of its
        programs, the memory that the others would have written is as it was, so that an assertion
        of values fails also for a right kernel: the test is skipped, unless it has a fault.
        """
        sampled = self.gpu.account.sampled
        if isinstance(error, SKIPS):
            return self._failed()
        if isinstance(error, TooLarge):
            said = f"{TOO_LARGE}: {error}"
            if TOO_LARGE in self.allowed:
                return self._failed() or _skip(said)
            # An emulator within the test has its own faults.
            return self._failed() or pytest.fail.Exception(said, pytrace=False)
        if sampled:
            said = f"{SAMPLED}: {'; '.join(dict.fromkeys(sampled))}"
            if isinstance(error, AssertionError):
                return self._failed() or _skip(said)
            error.add_note(said)
        return None


def _skip(reason: str) -> BaseException:
    return pytest.skip.Exception(reason, _use_item_location=True)


class Hooks:
    """Hooks of a session whose kernels are executed.

    One emulator is active from the first test to the last one: a fixture of a module may enter a
    mode of PyTorch in one test and leave it in another, and modes are left in reverse order.

    The reports of a test's teardown carry what it has launched. pytest-xdist takes them from its
    workers to the process that controls them, where `suite` has the tests of all.
    """

    def __init__(self, config: pytest.Config, options: argparse.Namespace):
        self.config, self.options, self.active = config, options, ExitStack()
        self.suite, self.allowed, self.is_expected = Suite(), set[str](), False
        self.unwritten = ""
        self.sarif = options.nogpu_sarif and Path(options.nogpu_sarif).absolute()
        if self.sarif and (self.sarif.is_dir() or not self.sarif.parent.is_dir()):
            raise pytest.UsageError(
                f"--nogpu-sarif {options.nogpu_sarif} cannot be written; name a file in a folder"
            )

    def enter(self) -> None:
        options = self.options
        emulator = emulate(
            options.nogpu_arch or "sm_90",
            options.nogpu_schedules or "one",
            configurations=options.nogpu_configurations or "first",
            operators=options.nogpu_operators or "cpu",
        )
        self.gpu = self.active.enter_context(emulator)
        if options.cuda_is_cpu:
            self.active.enter_context(cuda_is_cpu(self.gpu))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self) -> None:
        if not self.options.cuda_is_cpu:
            self.enter()

    @pytest.hookimpl(wrapper=True, trylast=True)  # before the summary is printed
    def pytest_sessionfinish(
        self, session: pytest.Session, exitstatus: int
    ) -> Generator[None, object, object]:
        with self.active:  # the last fixtures are torn down here, if the session was stopped
            result = yield
        root = repository(self.config.rootpath) or self.config.rootpath
        kernels = [(*key, line) for key, line in defined_kernels(root).items()]
        output = getattr(self.config, "workeroutput", None)
        if output is None:
            self.suite.define(kernels)
            if self.sarif and (reason := self._write_sarif(exitstatus)):
                self.unwritten = f"{self.options.nogpu_sarif} is not written: {reason}"
                session.exitstatus = exitstatus or 1
        else:  # of a worker, for the process that controls it
            output["nogpu"] = kernels
        return result

    def _write_sarif(self, exitstatus: int) -> str:
        """Write the faults of a run that has ended; return why that was not possible.

        A file without those of tests that did not run would say that they are mended.
        """
        if exitstatus > 1 or self.config.option.collectonly:
            return "not all tests have run"
        try:
            self.sarif.write_text(as_sarif(self.suite.findings()), "utf-8")
        except OSError as e:
            return f"{e.strerror}; name another file"
        return ""

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """A worker of pytest-xdist has ended."""
        self.suite.define(getattr(node, "workeroutput", {}).get("nogpu", ()))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, object, object]:
        self.gpu.launches.clear()
        self.gpu.faults.clear()
        self.gpu._by_place.clear()  # or a fault of an earlier test would only be counted
        limit, budget = self.options.nogpu_limit, self.options.nogpu_budget
        self.gpu.account, self.is_expected = Account(limit, budget), False
        self.allowed = set()  # where the next line fails
        self.allowed = _allowed(item)
        return (yield from self._run(item, "setup"))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        return (yield from self._run(item, "call"))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, object, object]:
        return (yield from self._run(item, "teardown"))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        self.is_expected |= report.skipped and hasattr(report, "wasxfail")
        if call.when == "teardown":
            report.nogpu = self._of_test(item).as_plain()  # type: ignore[attr-defined]
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if hasattr(report, "nogpu"):
            self.suite.add(report.nogpu)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.config.option.collectonly:
            return
        terminalreporter.section("kernels, executed by nogpu")
        for line in self.suite.summary("" if self.options.cuda_is_cpu else NEEDS_FLAG):
            terminalreporter.write_line(line)
        if self.unwritten:
            terminalreporter.write_line(self.unwritten)
        if self.options.nogpu_annotate:
            for line in annotations(self.suite.findings()):
                terminalreporter.write_line(line)

    def _of_test(self, item: pytest.Item) -> OfTest:
        """Return what a test has launched, and its faults, when all of it has run."""
        account, findings = self.gpu.account, findings_of(self.gpu.faults)
        for one, fault in zip(findings, self.gpu.faults, strict=True):
            one.tests = [item.nodeid]
            if one.name in self.allowed:
                one.excused = "allowed"
            elif self.is_expected:
                one.excused = "expected to fail"
            elif fault.is_after_sample and one.name != TOO_LARGE:
                one.excused = "after a sampled launch"
        kernels = sorted(account.kernels)
        return OfTest(
            item.nodeid,
            account.launches,
            account.seconds,
            kernels,
            sorted(account.constants),
            len(account.sampled),
            findings,
        )

    def _run(self, item: pytest.Item, when: str) -> Generator[None, object, object]:
        phase = _Phase(self.gpu, self.allowed)
        test = getattr(item, "obj", None)
        is_of_unittest = isinstance(getattr(item, "instance", None), unittest.TestCase)
        if when == "call" and is_of_unittest and callable(test) and not iscoroutinefunction(test):
            item.obj = _checked(test, phase)  # type: ignore[attr-defined]
        try:
            result = yield
            phase.check()
            return result
        except (Exception, *SKIPS) as e:
            if (verdict := phase.verdict(e)) is not None:
                raise verdict from None
            is_cpu = self.options.cuda_is_cpu  # then `torch.cuda.is_available` says so
            has_advice = advise_numba(e, is_cpu) or (says_cuda(e) and not is_cpu)
            if has_advice and (is_cpu or not torch.cuda.is_available()):
                advise(e, is_cpu)
            raise
        finally:
            rest = phase.rest()
            if rest.faults:
                item.add_report_section(when, "kernels", str(rest))
                item.user_properties.append(("kernels", str(rest)))  # for JUnit


def _allowed(item: pytest.Item) -> set[str]:
    """Return the names of faults that the marks of a test allow."""
    marks = list(item.iter_markers("nogpu_allow"))
    names = [name for mark in marks for name in mark.args]
    unknown = [repr(name) for name in names if not (isinstance(name, str) and name in NAMES)]
    known = f"it knows {', '.join(sorted(NAMES))}"
    if unknown:
        pytest.fail(f"nogpu_allow does not know {', '.join(unknown)}; {known}", pytrace=False)
    if any(mark.kwargs or not mark.args for mark in marks):
        pytest.fail(f"nogpu_allow takes names of faults as its arguments; {known}", pytrace=False)
    return set(names)


def _checked(test: Callable[P, T], phase: _Phase) -> Callable[P, T]:
    """Let a method of unittest fail itself, because `unittest.expectedFailure` asks it alone."""

    @wraps(test)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            result = test(*args, **kwargs)
        except (Exception, *SKIPS) as e:
            if (verdict := phase.verdict(e)) is not None:
                raise verdict from None
            raise
        phase.check()
        return result

    return checked
