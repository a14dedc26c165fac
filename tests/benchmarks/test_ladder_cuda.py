# SPDX-License-Identifier: MIT
"""Kernels of a student's file in CUDA C++ and, by numba-cuda, in `numba.cuda`, in the ladder."""

import sys
from pathlib import Path

import pytest
import torch
from commands import ROOT, run

pytest.importorskip("rich", reason="rich prints the tables")
pytest.importorskip("nogpu", reason="nogpu executes the kernels")
pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC compiles the kernels")
from benchmarks.ladder import cuda_files, emulated, rungs
from benchmarks.ladder.cases import LADDERS, make_case
from benchmarks.timing import Rejected
from torchpar.baselines.grader import Wrong
from torchpar.errors import ConfigError

if torch.cuda.is_available():
    pytest.skip("CUDA C++ is executed without a GPU only", allow_module_level=True)

NAIVE = """extern "C" __global__
void gemm(const float* a, const float* b, float* c, int n, int m, int k) {
    int i = blockIdx.y * blockDim.y + threadIdx.y, j = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n || j >= m) return;
    float s = 0;
    for (int p = 0; p < k; ++p) s += a[i * k + p] * b[p * m + j];
    c[i * m + j] = s;
}
"""
TILED = """#define TILE 8
// launch: grid (m + TILE - 1) / TILE, (n + TILE - 1) / TILE; block TILE, TILE
__global__ void gemm(const float* a, const float* b, float* c, int n, int m, int k) {
    __shared__ float left[TILE][TILE], right[TILE][TILE];
    int x = threadIdx.x, y = threadIdx.y, i = blockIdx.y * TILE + y, j = blockIdx.x * TILE + x;
    float s = 0;
    for (int t = 0; t < k; t += TILE) {
        left[y][x] = i < n && t + x < k ? a[i * k + t + x] : 0;
        right[y][x] = j < m && t + y < k ? b[(t + y) * m + j] : 0;
        __syncthreads();
        for (int p = 0; p < TILE; p++) s += left[y][p] * right[p][x];
        __syncthreads();
    }
    if (i < n && j < m) c[i * m + j] = s;
}
"""
OTHERS = """
__global__ void maximum(const int* a, const int* b, int* c, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) c[i] = max(a[i], b[i]);
}

// launch: grid 1; block 1024
__global__ void matmul_transpose_gpu(const float* x, float* c, int n, int k) {
    for (int at = threadIdx.x; at < n * n; at += blockDim.x) {
        float s = 0;
        for (int p = 0; p < k; p++) s += x[at / n * k + p] * x[at % n * k + p];
        c[at] = s;
    }
}

__global__ void linear_sigmoid(const float* x, const float* weight, const float* bias, float* c,
                               int n, int m, int k) {
    int i = blockIdx.y * blockDim.y + threadIdx.y, j = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n || j >= m) return;
    float s = bias[j];
    for (int p = 0; p < k; ++p) s += x[i * k + p] * weight[j * k + p];
    c[i * m + j] = 1 / (1 + expf(-s));
}

int main() { return 0; }
"""


def rows(folder: Path, text: str, shapes: dict[str, tuple[int, ...]] | None = None) -> dict:
    """The rows of a file's kernels by name; of the small cases by default."""
    path = folder / "my.cu"
    path.write_text(text)
    functions, error = cuda_files.load(path)
    assert error == ""
    quick = {name: ladder.quick for name, ladder in LADDERS.items()}
    cases = {name: make_case(name, shape) for name, shape in (shapes or quick).items()}
    entries = rungs.students_entries(path, functions, cases)
    return {one.name.removeprefix("my.cu: "): one for many in entries.values() for one in many}


def reason(row: rungs.Rung) -> str:
    with pytest.raises(Rejected) as raised:
        row.turn(0)
    return str(raised.value)


def test_kernels_of_all_cases_are_right_with_their_launches(tmp_path, capsys):
    found = rows(tmp_path, OTHERS + NAIVE)
    assert set(found) == {"maximum", "matmul_transpose_gpu", "linear_sigmoid", "gemm"}
    said = capsys.readouterr().out
    for launch in (
        "maximum is right in nogpu at 20×30 (grid 20, block 30, n=600), at least ",
        "matmul_transpose_gpu is right in nogpu at 33×17 (grid 1, block 1024, n=33, k=17), ",
        "linear_sigmoid is right in nogpu at 7×33×5 (grid 1×1, block 16×16, n=7, m=5, k=33), ",
        "gemm is right in nogpu at 33×17×41 (A·B, grid 3×3, block 16×16, n=33, m=41, k=17), ",
    ):
        assert launch in said
    assert found["gemm"].note == "A·B"
    assert all(one.least_us > 0 and one.left_out == "no GPU" for one in found.values())
    assert not any(one.remarks for one in found.values())  # one block of 1024 threads is asked


def test_the_file_of_the_page_is_right(tmp_path):
    page = (ROOT / "docs" / "ladder.md").read_text("utf-8")
    text = page.partition("```c++\n")[2].partition("```")[0]
    assert rows(tmp_path, text)["gemm"].executed.startswith("right in nogpu at 33×17×41 (A·B, gri")


def test_a_comment_above_a_kernel_chooses_its_launch_and_the_product_may_be_of_rows(tmp_path):
    row = rows(tmp_path, TILED.replace("b[(t + y) * m + j]", "b[j * k + t + y]"))["gemm"]
    assert row.executed.startswith("right in nogpu at 33×17×41 (grid 6×5, block 8×8, n=33, ")
    assert row.note == ""


@pytest.mark.parametrize(
    "text, expected",
    [
        pytest.param(
            NAIVE.replace("i >= n", "i >= n / 16 * 16"),
            "result[32, 0] is never written; 41 of 1,353 numbers are not (A·B, grid 3×3, block ",
            id="last rows left out",
        ),
        pytest.param(
            NAIVE.replace("p < k", "p < (i < 32 ? k : k - 1)"),
            "result[32, 0] is ",
            id="last rows wrong",
        ),
        pytest.param(
            NAIVE.replace("i >= n || ", ""), "my.cu, line 6: out of bounds: ", id="no bounds"
        ),
        pytest.param(
            NAIVE.replace(" || j >= m", "").replace("p < k", "j < m && p < k"),
            "my.cu, line 7: race between blocks: block (",
            id="a column of the next row",
        ),
        pytest.param(
            NAIVE.replace("s += ", "c[i * m + j] += "),
            "my.cu, line 6: uninitialised memory: ",
            id="sum that never began",
        ),
        pytest.param(
            TILED.replace("        __syncthreads();\n        for", "        for"),
            "my.cu, line 10: race",
            id="no barrier before reads",
        ),
        pytest.param(
            TILED.replace("__syncthreads();\n    }", "}"), "my.cu, line 8: race", id="none after"
        ),
        pytest.param(
            TILED.replace("block TILE, TILE", "block 64, 64"),
            "my.cu: ValueError: the block of gemm is (64, 64, 1), 4,096 threads; expected 1 to ",
            id="4,096 threads",
        ),
    ],
)
def test_a_mistake_is_named_at_its_line(tmp_path, text, expected):
    assert reason(rows(tmp_path, text)["gemm"]).startswith(expected)


def test_a_whole_case_is_sampled_and_a_fault_in_its_last_blocks_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(emulated, "BUDGET", 0.0)  # no larger size is executed whole
    monkeypatch.setattr(emulated, "SAMPLE", 9)

    def expected(entry: object, found: object, seconds: float) -> tuple[object, float]:
        return found, -1.0  # so that the sample is affordable

    monkeypatch.setattr(emulated, "grow", expected)
    shapes = {"matmul": (130, 24, 140)}
    row = rows(tmp_path, NAIVE, shapes)["gemm"]
    at = "right in nogpu at 32×24×32, and in 9 of 81 blocks at 130×24×140 (A·B, grid 9×9, "
    assert row.executed.startswith(at)
    assert row.note == "A·B"
    wrong = NAIVE.replace("s += a[i", "s += (i >= 128) + a[i")
    assert reason(rows(tmp_path, wrong, shapes)["gemm"]).startswith("result[128, ")


@pytest.mark.parametrize(
    "text, said",
    [
        (
            "__global__ void gemm(double* a, int n) {}",
            "line 1: gemm takes (double*, int); expected gemm(const float* a, const float* b, "
            "float* c, int n, int m, int k)",
        ),
        ("__global__ void sgemm(float* a) {}", "gemm, linear_sigmoid; its kernels are: sgemm"),
        ("template <int N>\n" + NAIVE.removeprefix('extern "C"'), "gemm is a template; "),
        ("__global__ void gemm(int n) { n = q; }", 'my.cu:1: identifier "q" is undefined'),
        (TILED.replace("grid (m", "grid (M"), "line 3: launch: M is not known; known are rows, "),
        (TILED.replace("; block", "; blocks"), "launch: 'blocks TILE, TILE' is not known; "),
        (TILED.replace("; block TILE, TILE", ""), "launch: it has no block; expected // launch: "),
        (TILED.replace("grid (m", "grid m)"), "cannot be read; expected // launch: "),
    ],
)
def test_a_file_that_cannot_be_launched_is_refused_in_one_line(tmp_path, text, said):
    (tmp_path / "my.cu").write_text(text)
    with pytest.raises(ConfigError) as raised:
        cuda_files.load(tmp_path / "my.cu")
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_one_kernel_with_other_parameters_leaves_the_others(tmp_path, capsys):
    (tmp_path / "my.cu").write_text("__global__ void maximum(int* a) {}\n" + NAIVE)
    functions, error = cuda_files.load(tmp_path / "my.cu")
    assert list(functions) == ["gemm"]
    assert error == capsys.readouterr().out.rstrip("\n")
    assert error.startswith("my.cu, line 1: maximum takes (int*); expected maximum(const int* a, ")


def test_sizes_of_a_launch_are_integers_of_c():
    known = {"n": 33, "TILE": 16}
    size = cuda_files.size_of("grid (n + TILE - 1) / TILE, 2 * n % 5; block TILE; shared 64", known)
    assert size == ((3, 1), (16,), (64,))
    with pytest.raises(Wrong, match="cannot be read"):
        cuda_files.size_of("grid n / (n - n); block 1", known)


@pytest.mark.slow
def test_the_command_takes_a_cu_file_in_a_students_folder(tmp_path):
    (tmp_path / "mlp.cu").write_text(NAIVE)
    command = [sys.executable, "-m", "torchpar", "ladder", "--quick", "--with", "mlp.cu"]
    status, out, err = run(*command, cwd=tmp_path)
    assert status == 0, err
    assert "mlp.cu: gemm is right in nogpu at 33×17×41 (A·B, grid 3×3, " in out
    assert "Without a GPU: mlp.cu: gemm is right in nogpu at " in out


def test_nogpu_executes_numba_cuda_unless_the_simulator_is_asked_for(monkeypatch):
    monkeypatch.delenv(emulated.SIMULATOR, raising=False)
    monkeypatch.setattr(emulated, "find_spec", lambda name: None)
    assert not emulated.executes_numba()
    monkeypatch.setattr(emulated, "find_spec", lambda name: name)
    assert emulated.executes_numba()
    monkeypatch.setenv(emulated.SIMULATOR, "1")
    assert not emulated.executes_numba()


NUMBA = """
import numpy as np
from numba import cuda

@cuda.jit("void(int32[:,::1], int32[:,::1], int32[:,::1])")
def max_kernel(A, B, C):
    i, j = cuda.blockIdx.x, cuda.threadIdx.x
    if i < A.shape[0] and j < A.shape[1]:
        C[i, j] = max(A[i, j], B[i, j])

def max_gpu(A, B):
    C = np.zeros_like(A)
    max_kernel[1000, 1000](A, B, C)
    return C

@cuda.jit
def product_kernel(A, C):
    for p in range(cuda.threadIdx.x, A.shape[1], 1024):
        for i in range(A.shape[0]):
            for j in range(A.shape[0]):
                C[i, j] += A[i, p] * A[j, p]

def matmul_transpose_gpu(X):
    C = np.zeros((len(X), len(X)), X.dtype)
    product_kernel[1, 1024](X, C)
    return C
"""


@pytest.mark.slow
def test_a_file_of_numba_cuda_has_counters_and_races_by_nogpu(tmp_path):
    pytest.importorskip("numba_cuda", reason="it compiles the kernels")
    (tmp_path / "cud.py").write_text(NUMBA)
    command = [sys.executable, "-m", "torchpar", "ladder", "--quick", "--with", "cud.py"]
    status, out, err = run(*command, cwd=tmp_path)
    assert status == 1, err
    assert "cud.py: max_gpu is right in nogpu at 20×30, at least " in out
    assert "cud.py: matmul_transpose_gpu is not right at 32×17: cud.py, line 21: race: " in out
    assert "simulator" not in out.partition("maximum of")[0]
    assert "Warning" not in err
