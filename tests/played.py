# SPDX-License-Identifier: MIT
"""A plugin, ``pytest -p played``: C++ plays the operators' calls in all tests.

Without a GPU it plays those on CPU tensors, and the keys of the CPU stand for CUDA's: the tapes
hold the operators of PyTorch that are called on a CPU, and the launches that an emulator executes.
"""

import pytest
import torch

from torchpar.library import build, player

MODULE = build.load()
if MODULE is None:
    raise pytest.UsageError("there is no C++ path of calls here; run python -m torchpar build")
if not torch.cuda.is_available():
    player.core.module, player.core.devices, player.core.calls_python = MODULE, ("CPU",), True


def pytest_runtest_setup() -> None:
    if player.core.module is None:
        pytest.exit("the driver has no cuLaunchKernelEx, by which C++ launches kernels", 1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    played, missed = (player.core.module or MODULE).counts()
    terminalreporter.write_line(f"calls by C++: {played} tapes played, {missed} calls by Python")
