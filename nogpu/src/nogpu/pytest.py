# SPDX-License-Identifier: MIT
"""Plugin of pytest that executes the launches of each test, and of its fixtures.

    pytest --nogpu
    pytest --nogpu --nogpu-arch=sm_100 --cuda-is-cpu
    pytest --nogpu --nogpu-annotate=github --nogpu-sarif=nogpu.sarif

With ``--cuda-is-cpu`` the device "cuda" means the CPU, also where test modules are imported.

A test fails if one of its kernels has an error. The warnings and notes are in the test's report. A
fixture of a module or a session belongs to the test that sets it up, or that tears it down. The
fixture ``gpu`` is the emulator, whose ``launches`` and `assert_counters` are those of the test.

``@pytest.mark.nogpu_allow("uninitialised memory")`` lets a test have faults of that name. The last
lines of a run are a summary of the suite, which has the faults of all workers of pytest-xdist.

Without ``--nogpu`` the plugin imports neither PyTorch nor Triton, and changes nothing.
"""

import argparse
import math
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from nogpu.data_sheets import ARCHITECTURES

if TYPE_CHECKING:
    from nogpu.triton.emulator import Emulator

NEED = (
    "cuda_is_cpu",
    "nogpu_arch",
    "nogpu_schedules",
    "nogpu_configurations",
    "nogpu_operators",
    "nogpu_annotate",
    "nogpu_sarif",
    "nogpu_limit",
    "nogpu_budget",
)
HOOKS = "nogpu.hooks"
MARKER = "nogpu_allow(name, ...): faults with these names do not let the test fail"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("nogpu")
    group.addoption(
        "--nogpu", action="store_true", help="execute Triton kernels as compiled for a GPU"
    )
    group.addoption("--nogpu-arch", choices=ARCHITECTURES, help="that GPU, by default sm_90")
    group.addoption("--nogpu-schedules", choices=["one", "all"], help="orders of each launch")
    group.addoption(
        "--nogpu-configurations",
        choices=["first", "all"],
        help="those of autotuned kernels that are executed",
    )
    group.addoption(
        "--nogpu-operators",
        choices=["cpu", "float32"],
        help="float32: let PyTorch's operators on bfloat16 and float16 round once",
    )
    group.addoption(
        "--nogpu-annotate", choices=["github"], help="print each fault as an annotation of its line"
    )
    group.addoption("--nogpu-sarif", metavar="FILE", help="write the faults as SARIF")
    group.addoption(
        "--nogpu-limit",
        type=_seconds,
        metavar="S",
        help="let a test fail as too large whose launches take longer",
    )
    group.addoption(
        "--nogpu-budget",
        type=_seconds,
        metavar="S",
        help="execute only samples of large launches, so that those of a test take about so long",
    )
    group.addoption(
        "--cuda-is-cpu", action="store_true", help='let device="cuda" mean the CPU, with --nogpu'
    )


def _seconds(text: str) -> float:
    with suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"is {text}, expected a number of seconds above 0")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Begin before the first conftest.py is imported, which may ask `torch.cuda`."""
    _begin(early_config)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", MARKER)
    _begin(config)  # where a conftest.py names the plugin


def _begin(config: pytest.Config) -> None:
    options = config.known_args_namespace
    if config.pluginmanager.has_plugin(HOOKS) or not options.nogpu:
        alone = [name for name in NEED if getattr(options, name) and not options.nogpu]
        if alone:
            flag = f"--{alone[0].replace('_', '-')}"
            raise pytest.UsageError(f"{flag} needs --nogpu, which executes the kernels")
        return
    from nogpu.pytest_hooks import Hooks
    from nogpu.triton.emulate import why_not_compiled

    if reason := why_not_compiled():
        raise pytest.UsageError(f"--nogpu: {reason}")
    hooks = Hooks(config, options)
    config.pluginmanager.register(hooks, HOOKS)
    if options.cuda_is_cpu:  # modules ask `torch.cuda` when they are imported
        hooks.enter()
        config.add_cleanup(hooks.active.close)


@pytest.fixture
def gpu(request: pytest.FixtureRequest) -> "Emulator":
    """The emulated GPU of ``--nogpu``, with the launches and faults of this test."""
    hooks = request.config.pluginmanager.get_plugin(HOOKS)
    if hooks is None:
        pytest.skip("no kernels are executed; pytest --nogpu does it")
    found: Emulator = hooks.gpu
    return found
