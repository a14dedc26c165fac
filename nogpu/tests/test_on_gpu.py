# SPDX-License-Identifier: MIT
"""Kernels of CUDA C++ on a real GPU, and the bytes that its driver is given."""

import ctypes
import re
import struct
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cuda_programs import PROGRAMS, loaded, said_of

import nogpu
import nogpu.cuda
from nogpu.cpp import on_gpu

pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC is not installed")

RIGHT = [name for name in PROGRAMS if said_of(name)[0] == "right"]
CODE = """
struct Part { int first; const float* x; };
extern "C" __global__ void scale(
    float* y, Part part, float factor, unsigned char flag, double other, long long n)
{
    extern __shared__ float row[];
    row[threadIdx.x] = part.x[part.first + threadIdx.x];
    __syncthreads();
    if (flag && threadIdx.x < n)
        y[threadIdx.x] = factor * row[threadIdx.x] + other;
}
"""


class OnDevice:
    """The kernels of a module, whose arrays are copied to "cuda" before a launch and back after."""

    def __init__(self, kernel: Any):
        self.kernel = kernel

    def __getitem__(self, index: Any) -> "OnDevice":
        return OnDevice(self.kernel[index])

    def __call__(self, *arguments: Any) -> None:
        copies = {
            n: torch.as_tensor(one).cuda()
            for n, one in enumerate(arguments)
            if isinstance(one, (np.ndarray, torch.Tensor)) and one.ndim
        }
        self.kernel(*[copies.get(n, one) for n, one in enumerate(arguments)])
        for n, copy in copies.items():
            torch.as_tensor(arguments[n]).copy_(copy)


def check(name: str) -> None:
    for got, want in PROGRAMS[name](OnDevice(loaded(name))):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("name", RIGHT)
def test_right_program_on_a_gpu(name):
    check(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", RIGHT)
def test_right_program_where_cuda_is_the_cpu(name):
    """The test above, rehearsed."""
    with nogpu.emulate() as gpu, nogpu.cuda_is_cpu(gpu):
        check(name)
    assert gpu.faults == []


class Driver:
    """Answers as the CUDA driver does, and notes what a launch is given; memory is read as it
    reads it, by the sizes of the parameters."""

    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)

    def __init__(self, *sizes: int, refused: str = ""):
        self.sizes, self.refused = sizes, refused
        self.calls: list[tuple[Any, ...]] = []
        self.parameters: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            if name == self.refused:
                return SimpleNamespace(value=1, name="CUDA_ERROR_INVALID_VALUE"), None
            if name == "cuLaunchKernel":
                pointers = (ctypes.c_void_p * len(self.sizes)).from_address(arguments[-2])
                self.parameters = [
                    ctypes.string_at(at, size)
                    for at, size in zip(pointers, self.sizes, strict=True)
                ]
            return SimpleNamespace(value=0, name="CUDA_SUCCESS"), f"{name}'s"

        return call


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    one = Driver(8, 16, 4, 1, 8, 8)
    monkeypatch.setattr(on_gpu, "driver", lambda: one)
    on_gpu._context.cache_clear()
    for name, answer in {
        "is_available": True,
        "current_device": 1,
        "get_device_capability": (9, 0),
        "current_stream": SimpleNamespace(cuda_stream=77),
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    return one


def test_a_driver_reads_the_arguments_as_they_were_given(driver):
    module = nogpu.cuda.compile(CODE)
    kernel = module["scale"][(3, 2), 64, 256]
    kernel(None, (-5, None), 0.5, True, 0.1, 2**40)
    assert driver.parameters[:2] == [bytes(8), struct.pack("<i4xQ", -5, 0)]
    numbers = (("f", 0.5), ("B", 1), ("d", 0.1), ("q", 2**40))
    assert driver.parameters[2:] == [struct.pack(f"<{kind}", one) for kind, one in numbers]
    of = {name: arguments for name, *arguments in driver.calls}
    assert of["cuDeviceGet"] == [1]
    assert of["cuFuncSetAttribute"][1:] == [8, 256]
    assert of["cuLaunchKernel"][1:9] == [3, 2, 1, 64, 1, 1, 256, 77]
    assert b".entry scale(" in of["cuModuleLoadData"][0]
    assert driver.calls[-1][0] == "cuCtxPopCurrent"
    kernel(None, (-5, None), 0.5, True, 0.1, 2**40)
    names = [name for name, *_ in driver.calls]
    assert (names.count("cuModuleLoadData"), names.count("cuLaunchKernel")) == (1, 2)
    assert names.count("cuCtxPushCurrent") == names.count("cuCtxPopCurrent")
    # Another module has variables of its own, also if its text is the same.
    nogpu.cuda.compile(CODE)["scale"][1, 64, 256](None, (-5, None), 0.5, True, 0.1, 2**40)
    assert [name for name, *_ in driver.calls].count("cuModuleLoadData") == 2


def test_a_driver_that_refuses_a_launch_is_named(driver):
    driver.refused = "cuLaunchKernel"
    with pytest.raises(RuntimeError, match=r"driver ends with CUDA_ERROR_INVALID_VALUE"):
        nogpu.cuda.compile(CODE)["scale"][1, 64, 256](None, bytes(16), 0.5, True, 0.1, 2)
    assert driver.calls[-1][0] == "cuCtxPopCurrent"


def test_a_size_that_no_gpu_launches_does_not_reach_the_driver(driver):
    kernel = nogpu.cuda.compile(CODE)["scale"]
    arguments = (None, (0, None), 0.5, True, 0.1, 2)
    with pytest.raises(ValueError, match="2,048 threads; expected 1 to 1,024"):
        kernel[1, 2048](*arguments)
    with pytest.raises(ValueError, match="a block of sm_90 has at most 232,448"):
        kernel[1, 64, 2**20](*arguments)
    for size in ((1, 64, 0, None), (1, 64, 2.5), (1, 64, "256"), 1):
        with pytest.raises(TypeError, match=r"expected \[grid, block\] or \[grid, block, bytes\]"):
            kernel[size]
    assert driver.calls == []


def test_a_gpu_takes_no_array_of_the_host(driver):
    kernel = nogpu.cuda.compile(CODE)["scale"][1, 64, 256]
    rest = ((0, None), 0.5, True, 0.1, 2)
    said = "y of scale is an array of the host, and the kernel runs on the device; pass a tensor on"
    with pytest.raises(TypeError, match=re.escape(said)):
        kernel(np.zeros(64, np.float32), *rest)
    with pytest.raises(TypeError, match="y of scale is on cpu, expected a tensor on cuda:1"):
        kernel(torch.zeros(64), *rest)
    assert driver.calls == []
