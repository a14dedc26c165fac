# SPDX-License-Identifier: MIT
"""Names of Triton and of torch that `nogpu` replaces: the installed versions have them."""

import pytest

pytest.importorskip("triton", reason="the driver is Triton's")

import torch
import triton
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver as triton_driver

from nogpu.cuda import stand_in
from nogpu.cuda.watcher import Watcher
from nogpu.triton import driver, emulate


def version(of: str) -> tuple[int, int]:
    major, minor, *_ = of.split(".")
    return int(major), int(minor)


def test_torch_has_each_name_that_is_replaced():
    with emulate.emulate() as gpu:
        changes = stand_in.replacements(gpu, Watcher(gpu))
    names = [name for _, attributes in changes for name in attributes]
    assert {"is_available", "CUDAGraph", "do_bench", *stand_in.LACKING} <= {*names}
    assert stand_in.missing_names(changes) == []
    # One of them that torch has given another name is told.
    changes.append((torch.cuda, {"is_there": lambda: True}))
    assert stand_in.missing_names(changes) == ["torch.cuda.is_there"]


def test_an_optimizer_has_one_of_the_checks_that_are_replaced():
    checks = ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")
    assert any(hasattr(torch.optim.Optimizer, name) for name in checks)


def test_the_installed_torch_is_not_older_than_what_the_names_were_made_for():
    oldest, newest = map(version, stand_in.MADE_FOR)
    assert oldest <= newest
    assert oldest <= version(torch.__version__)


def test_triton_unloads_a_kernel_as_the_driver_expects():
    """By __del__, since a version, with the attributes that the driver's change reads."""
    has_one = version(triton.__version__) >= emulate.UNLOADS_SINCE
    assert hasattr(CompiledKernel, "__del__") == has_one
    attributes = CompiledKernel.__init__.__code__.co_names
    assert {"module", "function"} <= {*attributes}


@pytest.mark.skipif(
    version(triton.__version__) < emulate.UNLOADS_SINCE, reason="Triton unloads no kernel"
)
def test_a_kernel_of_an_emulator_ends_without_a_driver(monkeypatch):
    emulate._let_kernels_end()
    unloaded = []
    utils = type("Utils", (), {"unload_module": unloaded.append})
    active = type("Active", (), {"utils": utils})
    monkeypatch.setattr(triton_driver, "_active", active)
    for function, told in ((driver.Module(""), []), (7, ["loaded"])):
        kernel = object.__new__(CompiledKernel)
        kernel.module, kernel.function = "loaded", function
        kernel.name = kernel.metadata_group = kernel.hash = None
        kernel.__del__()
        assert (kernel.module, unloaded) == (None, told)
