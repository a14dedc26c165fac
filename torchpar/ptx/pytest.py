# SPDX-License-Identifier: MIT
"""Plugin of pytest that executes the launches of each test.

    pytest -p torchpar.ptx.pytest --ptx=sm_90

A test fails if one of its kernels has an error. The warnings and notes are in the test's report.
"""

from collections.abc import Generator

import pytest

from torchpar.ptx.driver import ARCHITECTURES, emulate


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("torchpar.ptx")
    group.addoption(
        "--ptx", choices=list(ARCHITECTURES), help="execute Triton kernels as compiled for a GPU"
    )
    group.addoption(
        "--ptx-schedules", choices=["one", "all"], default="one", help="orders of each launch"
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Run a test with an emulator."""
    arch = item.config.getoption("--ptx")
    if not arch:
        return (yield)
    with emulate(arch, item.config.getoption("--ptx-schedules")) as gpu:
        try:
            result = yield
        finally:
            report = gpu.report()
            if report.faults:
                item.add_report_section("call", "kernels", str(report))
    if report.errors:
        pytest.fail("\n".join(map(str, report.errors)), pytrace=False)
    return result
