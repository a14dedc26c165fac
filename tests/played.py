# SPDX-License-Identifier: MIT
"""A plugin, ``pytest -p played``: C++ plays the operators' calls on CPU tensors in all tests.

The keys of the CPU stand for CUDA's: the tapes hold the operators of PyTorch that are called on a
CPU, and the launches that an emulator executes.
"""

import pytest

from torchpar.library import build, player

MODULE = build.load()
if MODULE is None:
    raise pytest.UsageError("there is no C++ path of calls here; run python -m torchpar build")
player.core.module, player.core.devices, player.core.calls_python = MODULE, ("CPU",), True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    played, missed = MODULE.counts()
    terminalreporter.write_line(f"calls by C++: {played} tapes played, {missed} calls by Python")
