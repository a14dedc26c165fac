# SPDX-License-Identifier: MIT
"""Layers by a reader's kernels of CUDA C++, and by matrices of host and device memory."""

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from commands import ROOT, lesson, rows_of

pytest.importorskip("tyro", reason="tyro reads the flags")
pytest.importorskip("triton", reason="the lesson's own kernels are Triton's")
pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC is not installed")

from support import checks, cuda_layers
from support.matrix import Matrix

import own_layers
from train_by_hand import draw

from nogpu import emulate
from torchpar.errors import ConfigError

RIGHT = (ROOT / "examples" / "layers.cu").read_text("utf-8")
PAGE = (ROOT / "docs" / "exercises.md").read_text("utf-8")


def kernels_of(folder: Path, source: str) -> own_layers.Kernels:
    (file := folder / "layers.cu").write_text(source, "utf-8")
    return own_layers.Kernels(cuda_layers.read(file))


def check(kernels: own_layers.Kernels) -> list[str]:
    """Check a reader's kernels alone, at both sizes, and return their names."""
    torch.manual_seed(0)
    names = []
    for case in (*own_layers.cases(37, 5, 20), *own_layers.cases(1, 17, 1)):
        if (own := kernels.find(case.kernel)) is not None:
            own_layers.check_own(own, case)
            names.append(own.__name__)
    return names


def test_the_file_of_the_examples_is_right(tmp_path):
    kernels = kernels_of(tmp_path, RIGHT)
    assert [*kernels.own] == [name for name in cuda_layers.FORMS if not name.startswith("bce")]
    assert Counter(check(kernels)) == dict.fromkeys(kernels.own, 2)


def test_kernels_of_the_loss_take_their_places_too(tmp_path):
    source = """
    extern "C" __global__ void bce(const float* p, const float* t, float* loss, int size) {
        int i = blockIdx.x * blockDim.x + threadIdx.x;
        if (i < size)
            atomicAdd(loss, -(t[i] * fmaxf(logf(p[i]), -100)
                              + (1 - t[i]) * fmaxf(logf(1 - p[i]), -100)) / size);
    }
    extern "C" __global__ void bce_backward(const float* p, const float* t, float* dp, size_t size)
    {
        int i = blockIdx.x * blockDim.x + threadIdx.x;
        if (i < size)
            dp[i] = (p[i] - t[i]) / fmaxf(p[i] * (1 - p[i]), 1e-12f) / size;
    }"""
    kernels = kernels_of(tmp_path, source)
    assert check(kernels) == ["bce", "bce_backward"] * 2
    with pytest.raises(ConfigError, match=r"^layers\.cu:8, bce_backward: dp is off by "):
        check(kernels_of(tmp_path, source.replace("fmaxf(p[i] * (1 - p[i]), 1e-12f)", "0.5f")))
    # A sigmoid in float32 can be exactly 1, and 0 / 0 makes all weights NaN.
    with pytest.raises(ConfigError, match=r"bce_backward: dp is NaN, .* where p is 0 or 1; as"):
        check(
            kernels_of(
                tmp_path, source.replace("fmaxf(p[i] * (1 - p[i]), 1e-12f)", "(p[i] * (1 - p[i]))")
            )
        )
    with pytest.raises(ConfigError, match="bce: loss is NaN, expected a number, also where p is"):
        check(kernels_of(tmp_path, source.replace("fmaxf(logf(1 - p[i]), -100)", "logf(1 - p[i])")))


def test_the_kernels_of_the_page_are_right(tmp_path):
    """The page has a file of two kernels, beside which the lesson's own compute the others."""
    (source,) = re.findall(r"```cuda\n(// layers\.cu.*?)```", PAGE, re.DOTALL)
    assert check(kernels_of(tmp_path, source)) == ["relu", "relu_backward"] * 2


WRONG = {  # a fault: what is replaced by what, and what is said
    "name": ("void relu_backward(", "void relu_backwards(", r":\d+: relu_backwards is no kernel of "
             r"a layer, perhaps relu_backward; name it one of: linear, "),
    "parameters": ("void relu(const float* x, float* y, int size)",
                   "void relu(const float* x, int size, float* y)",
                   r":\d+: relu\(float\* x, int size, float\* y\), expected "
                   r"relu\(const float\* x, float\* y, int size\); mend"),
    "type": ("void relu(const float* x, float*", "void relu(const double* x, float*",
             r":\d+: relu\(double\* x, "),
    "template": ('extern "C" __global__ void relu(', "template <int N> __global__ void relu(",
                 r":\d+: template <int N> relu\("),
    "syntax": ("float total = b[column]", "float total = b[colum]", r':\d+: identifier "colum" is'),
    "bound": ("if (row < n && column < inputs)", "if (row <= n)",
              r":\d+, linear_input: out of bounds: .*outside of w"),
    "race": ("atomicAdd(&db[column], g[row * outputs + column]);",
             "db[column] += g[row * outputs + column];", r":\d+, bias_by_atomics: race: .*db"),
    "zeros": ("    if (row < n && column < outputs)\n        atomicAdd(&db[column], "
              "g[row * outputs + column]);",
              "    __shared__ float sums[16];\n"
              "    if (threadIdx.y == 0) sums[threadIdx.x] = 0;\n"
              "    if (row < n && column < outputs)\n"
              "        atomicAdd(&sums[threadIdx.x], g[row * outputs + column]);\n"
              "    __syncthreads();\n"
              "    if (threadIdx.y == 0 && column < outputs)\n"
              "        atomicAdd(&db[column], sums[threadIdx.x]);",
              r":\d+, bias_by_atomics: race: .*sums.*without __syncthreads"),
    "sums": ("dw[row * inputs + column] = total", "atomicAdd(&dw[row * inputs + column], total)",
             r":\d+, linear_weight: 100 of 100 numbers of dw are NaN, .*; only db of"),
    "fma": ("float total = b[column];", "float& total = y[row * outputs + column];",
            r":\d+, linear: 740 of 740 numbers of y are NaN, as all are before the launch; .*"),
    "formula": ("y[i] > 0 ? g[i] : 0.0f", "g[i]",
                r":\d+, relu_backward: dx is off by \S+, expected \S+ at most: .*; mend the k"),
    "memory": ("float total = b[column];", "__shared__ float much[13000]; much[n] = 0;"
               " float total = b[column] + much[inputs];", r"linear: .*shared memory .*; mend the"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel_is_one_line_with_its_place(tmp_path, name):
    right, wrong, says = WRONG[name]
    assert right in RIGHT
    with pytest.raises(ConfigError, match=says) as caught:
        check(kernels_of(tmp_path, RIGHT.replace(right, wrong)))
    assert "\n" not in str(caught.value)
    if name != "memory":
        assert str(caught.value).startswith("layers.cu:")


def test_a_file_without_kernels_and_no_file_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^layers\.cu has no kernel, .*; write one of: linear, "):
        kernels_of(tmp_path, "int main() { return 0; }")
    code, _, err = lesson("own_layers", "--with", str(tmp_path / "none.cu"))
    assert (code, err.count("\n")) == (2, 1)
    assert "none.cu: No such file or directory; name a readable file of CUDA C++" in err


def test_the_bias_takes_the_reader_s_kernel(tmp_path):
    """One thread sums a column where the file has no atomics."""
    start, end = RIGHT.index("// The same: each thread"), RIGHT.index("// Y = max")
    g = torch.arange(12.0).view(4, 3)
    for source, launched in (
        (RIGHT, "bias_by_atomics"),
        (RIGHT[:start] + RIGHT[end:], "bias_by_one_thread"),
        (RIGHT[end:], "bias_by_atomics_kernel"),
    ):
        with emulate("sm_90") as gpu:
            db = own_layers.bias_gradient(g, kernels_of(tmp_path, source))
        assert [one.kernel for one in gpu.launches] == [launched]
        assert db.tolist() == g.sum(0).tolist()


def test_a_matrix_has_what_was_copied_alone():
    copies = Counter[str]()
    matrix = Matrix(2, 3, torch.device("cpu"), copies)
    matrix.allocate_memory()
    matrix.host.fill_(1)
    matrix.copy_host_to_device()
    matrix.host.fill_(2)
    assert matrix.device.eq(1).all()
    matrix.copy_device_to_host()
    assert matrix.host.eq(1).all()
    assert copies == {"host to device": 24, "device to host": 24}


@pytest.mark.parametrize("copies", [True, False])
def test_a_copy_that_is_missing_is_named(monkeypatch, copies):
    if not copies:
        monkeypatch.setattr(Matrix, "copy_host_to_device", lambda _: None)
    torch.manual_seed(0)
    network = own_layers.build_network(3, torch.device("cpu"))

    def place(t: torch.Tensor) -> torch.Tensor:
        return own_layers.copy_to_device(t, torch.device("cpu"), Counter())

    def run() -> None:
        with emulate() as gpu:
            own_layers.check_network(
                network, own_layers.BinaryCrossEntropy(), draw(5, 0), gpu, place
            )

    if copies:
        run()
    else:
        with pytest.raises(
            ConfigError, match=r"linear_kernel: uninitialised memory: x\[0, 0\] was"
        ):
            run()


def test_a_sum_whose_terms_cancel_may_have_the_roundings_of_the_terms():
    t = torch.tensor([1.0, -1.0, 1e-4])
    rounded, wrong = torch.tensor(1e-4 + 1e-7), torch.tensor(1.01e-4)
    checks.compare("sum", rounded, torch.sum, t, terms=3, size=2)
    for result, size in ((rounded, 0), (wrong, 2)):
        with pytest.raises(ConfigError, match=r"^sum is off by "):
            checks.compare("sum", result, torch.sum, t, terms=3, size=size)


@pytest.mark.slow
def test_matrices_and_kernels_of_cuda_learn_as_the_lesson_s(tmp_path):
    (tmp_path / "layers.cu").write_text(RIGHT, "utf-8")
    flags = "--device", "cpu", "--epochs", "2", "--samples", "500"
    losses = []
    for more in ((), ("--with", str(tmp_path / "layers.cu"), "--matrix")):
        code, out, err = lesson("own_layers", *flags, *more, "--metrics", str(tmp_path / "metrics"))
        assert (code, err) == (0, "")
        losses.append(rows_of(tmp_path / "metrics")[-1]["test_loss"])
    # Pairs of the points of the check, of both epochs and of the test, and 121 parameters
    copied = 4 * (2 * (500 + 2 * 500 + 2500) + 121)
    assert f"matrices: {copied:,} bytes from host to device" in out
    assert f"matrices: {4 * 2500:,} bytes from device to host" in out
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
