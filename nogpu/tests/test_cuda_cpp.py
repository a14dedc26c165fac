# SPDX-License-Identifier: MIT
"""Kernels of CUDA C++: a corpus, right and wrong, and what a launch refuses."""

import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from cuda_programs import FOLDER, PROGRAMS, launched, said_of

import nogpu
import nogpu.cuda
from nogpu import command
from nogpu.cpp.declarations import declarations, shared_arrays, variable_types
from nogpu.cpp.nvrtc import CompileError
from nogpu.cpp.summary import summary
from nogpu.machine.gpu import Gpu
from nogpu.machine.gpu_state import SCHEDULES
from nogpu.machine.parse import source_name
from nogpu.native import core
from nogpu.triton import emulator

pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC is not installed")

SCALE = """
extern "C" __global__ void scale(const float* x, float* y, float factor, int n, unsigned char flag)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n)
        y[i] = flag ? factor * x[i] : 0;
}
"""


def check(name: str) -> None:
    """Launch a program of the corpus, and compare what is said with its first comment."""
    kind, fault, lines = said_of(name)
    gpu, pairs = launched(name)
    report = str(gpu.report())
    if kind == "right":
        assert gpu.faults == [], report
        for got, want in pairs:
            np.testing.assert_array_equal(np.asarray(got), np.asarray(want), report)
        return
    assert gpu.faults, f"{name} has no fault"
    first = gpu.faults[0]
    assert first.name == fault, report
    assert first.kind == ("warning" if kind == "warning" else "error"), report
    assert first.source is not None, report
    assert first.source[1] in lines, report


@pytest.mark.parametrize("name", PROGRAMS)
def test_program_of_the_corpus(name):
    check(name)


@pytest.mark.parametrize("name", PROGRAMS)
def test_program_without_the_core(name):
    with patch.object(core, "library", lambda: None):
        check(name)


def test_the_core_rounds_down_and_saturates_as_python_does():
    """Of sums that cancel, zeros, overflow, underflow and infinities, in all bits; NaN is NaN."""
    code = """
extern "C" __global__ void f(const float* a, const float* b, const float* c, float* y, float* z)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = __fmaf_rd(a[i], b[i], c[i]);
    z[i] = __saturatef(a[i]);
}"""
    special = [0.0, -0.0, 1.0, -1.0, 1e-38, -1e-38, 3e38, -3e38, 1e-45, np.inf, -np.inf, np.nan]
    a, b, c = (one.ravel() for one in np.meshgrid(*3 * [np.array(special, np.float32)]))
    rng = np.random.default_rng(0)
    a, b, c = (np.concatenate([one, rng.normal(size=2368).astype(np.float32)]) for one in (a, b, c))
    c[-64:] = -(a[-64:].astype(np.float64) * b[-64:]).astype(np.float32)
    bits = []
    for library in (core.library, lambda: None):
        y, z = np.zeros_like(a), np.zeros_like(a)
        with patch.object(core, "library", library), nogpu.emulate():
            nogpu.cuda.compile(code)["f"][len(a) // 32, 32](a, b, c, y, z)
        bits.append((y.view(np.uint32), z.view(np.uint32)))
    for by_core, by_python in zip(*bits, strict=True):
        are_nan = [np.isnan(one.view(np.float32)) for one in (by_core, by_python)]
        assert np.array_equal(*are_nan)
        assert np.array_equal(by_core[~are_nan[0]], by_python[~are_nan[0]])
    with np.errstate(all="ignore"):
        nearest = (a.astype(np.float64) * b + c).astype(np.float32)
    assert (y < nearest).sum() > 500, "nearest is above"


def test_a_right_program_that_is_made_wrong_has_a_fault():
    source = (FOLDER / "product_tiled.cu").read_text("utf-8")
    a, c = np.ones((32, 32), np.float32), np.zeros((32, 32), np.float32)
    before, after = (
        "        __syncthreads();\n        for",
        "[threadIdx.x];\n        __syncthreads();\n",
    )
    for barrier, rest in ((before, "        for"), (after, "[threadIdx.x];\n")):
        assert source.count(barrier) == 1
        with nogpu.emulate() as gpu:
            kernels = nogpu.cuda.compile(source.replace(barrier, rest))
            kernels["product<float, 16>"][(2, 2), (16, 16)](a, a, c, 32)
        assert {"race", "race within a warp"} <= {one.name for one in gpu.faults}


def refused(*arguments: object, size: object = (1, 32)) -> str:
    """Return what a launch of `SCALE` raises."""
    with nogpu.emulate() as gpu, pytest.raises((TypeError, ValueError)) as caught:
        nogpu.cuda.compile(SCALE)["scale"][size](*arguments)
    assert not gpu.launches
    return str(caught.value)


def test_arguments_are_those_of_the_declaration():
    x, y = np.ones(8, np.float32), torch.zeros(8)
    assert "scale takes 5 arguments (x, y, factor, n, flag), and got 3" in refused(x, y, 1.0)
    with nogpu.emulate(), pytest.raises(TypeError, match=r"f takes 1 argument \(x\), and got 0"):
        nogpu.cuda.compile("__global__ void f(int x) { }")["f"][1, 1]()
    assert "n of scale is int, and got 8.5; pass an integer" in refused(x, y, 1.0, 8.5, 1)
    assert "x of scale is float*, and got 3; pass an array" in refused(3, y, 1.0, 8, 1)
    assert "factor of scale is float, and got an array" in refused(x, y, x, 8, 1)
    assert "got an array of float64; expected float32" in refused(x.astype(float), y, 1.0, 8, 1)
    assert "300 does not fit into 8 bits" in refused(x, y, 1.0, 8, 300)
    assert "that cannot be shared" in refused(x[::-1], y, 1.0, 8, 1)


def test_sizes_are_those_of_a_gpu():
    x, y = np.ones(8, np.float32), torch.zeros(8)
    given = x, y, 1.0, 8, 1
    assert "2,048 threads; expected 1 to 1,024" in refused(*given, size=(1, (64, 32)))
    assert "expected an integer or up to three" in refused(*given, size=(1, (1, 1, 1, 1)))
    assert "is (0, 1, 1), 0 threads; expected 1 to 1,024" in refused(*given, size=(1, 0))
    assert "is (1, 1, 65), expected 1 to" in refused(*given, size=(1, (1, 1, 65)))
    assert "the grid is 1.5" in refused(*given, size=(1.5, 1))
    assert "takes 300,000 bytes of shared memory" in refused(*given, size=(1, 1, 300_000))
    with pytest.raises(RuntimeError, match=r"is executed within nogpu.emulate\(\)"):
        nogpu.cuda.compile(SCALE)["scale"][1, 8](*given)


def test_a_launch_in_a_capture_is_on_the_captured_stream():
    """On the default stream it would run once, and no replay repeat it (SageAttention#371)."""
    kernel = nogpu.cuda.compile(SCALE)["scale"]
    with nogpu.emulate() as gpu, nogpu.cuda_is_cpu(gpu):
        x, y = torch.ones(8, device="cuda"), torch.zeros(8, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kernel[1, 8](x * 3, y, 2.0, 8, 1)
            z = y + 1
        x.fill_(5)
        graph.replay()
        assert torch.equal(z, torch.full((8,), 31.0, device="cuda"))
    assert gpu.faults == []


def test_numbers_are_those_of_the_parameters():
    x, y = np.arange(8, dtype=np.float32), torch.zeros(8)
    with nogpu.emulate("sm_80") as gpu:
        nogpu.cuda.compile(SCALE)["scale"][(1,), (4, 2, 1)](
            x, y, np.float64(2.5), np.int64(8), True
        )
        with pytest.raises(ValueError, match=r"grid of scale is \(0, 1, 1\), expected 1 to"):
            nogpu.cuda.compile(SCALE)["scale"][0, 4](x, y, 2, 8, True)
    assert torch.equal(y[:4], torch.arange(4) * 2.5)
    assert not gpu.faults
    assert len(gpu.launches) == 1


def test_errors_of_the_compiler_have_lines(tmp_path):
    file = tmp_path / "wrong.cu"
    file.write_text("__global__ void f(int* x)\n{\n    x[0] = y;\n    g(3)\n}\n")
    with pytest.raises(CompileError) as caught:
        nogpu.cuda.load(file)
    assert str(caught.value).splitlines()[0] == 'wrong.cu:3: identifier "y" is undefined'
    with pytest.raises(KeyError, match="has no kernel 'h'; its kernels: scale"):
        nogpu.cuda.compile(SCALE)["h"]
    source = "template <typename T>\n__global__ void f(T* x) { *x = 1; }"
    with pytest.raises(KeyError, match=r"f is a template.*<typename T>.*f<float>"):
        nogpu.cuda.compile(source)["f"]


def test_functions_of_the_host_are_left_out():
    source = f"""#include <iostream>
#include <vector>
{SCALE}
int main()
{{
    std::vector<float> x(8);
    scale<<<1, 8>>>(x.data(), x.data(), 1, 8, 1);
}}
"""
    assert nogpu.cuda.compile(source).names == ["scale"]


def test_declarations():
    source = """
    template <typename T, int N = 3> __global__ void /* a comment, with ( */ f(
        const T *__restrict__ x, unsigned long long n, float y[4], struct P p, int);
    extern "C" __global__ __launch_bounds__(256, 2) void g() {}
    __shared__ volatile unsigned int a[4][3], b; extern __shared__ float c[]; __shared__ T d[N];
    """
    first, second = declarations(source)
    assert [(one.name, one.type) for one in first.parameters] == [
        ("x", "T*"),
        ("n", "unsigned long long"),
        ("y", "float*"),
        ("p", "P"),
        ("", "int"),
    ]
    assert (first.template, second.name, second.parameters) == ("typename T, int N = 3", "g", [])
    sizes = (("a", 48), ("b", 4), ("d", 12))
    assert shared_arrays(source, sizes) == {"a": (4, (4, 3)), "b": (4, ())}


def test_arrays_in_shared_memory_are_those_of_the_kernel_by_their_bytes():
    source = """
    #define TILE 32
    constexpr int ROWS = 4;
    __global__ void f() { __shared__ float s[TILE][TILE + 1]; __shared__ int t[8]; }
    __global__ void g() { __shared__ double s[2 * ROWS]; __shared__ double t[4]; }
    """
    assert shared_arrays(source, (("s", 4224), ("t", 32))) == {"s": (4, (32, 33))}
    assert shared_arrays(source, (("s", 64),)) == {"s": (8, (8,))}
    assert shared_arrays(source, (("s", 65),)) == {}


@pytest.mark.parametrize(
    "given",
    [
        "#define N 32 // of a side",
        "# define N (32u) /* of a side */",
        "const unsigned int N = 32;",
        "static constexpr unsigned long long N = 32ull;",
        "int const M = 3, N = 32;",
        "// #define N 3\n#define N 32",
    ],
)
def test_sizes_are_found_however_the_source_writes_them(given):
    source = f"{given}\n__global__ void f() {{ __shared__ __align__(16) float s[4][N], t [N]; }}"
    assert shared_arrays(source, (("s", 512), ("t", 128))) == {"s": (4, (4, 32)), "t": (4, (32,))}


def test_types_of_variables_are_those_of_their_declarations():
    source = """
    __device__ float f(float x) { return x; } __constant__ float a = g(1, 2), b[] = {3, 4}, c{5};
    static __device__ unsigned int d[2 * N], *e; __constant__ float* p; __device__ Pair q;
    namespace M { __constant__ int r; } namespace N { __constant__ float r; }
    alignas(8) __device__ short s;
    """
    assert variable_types(source) == {
        **dict.fromkeys("abc", "float"),
        "d": "unsigned int",
        "s": "short",
    }


@pytest.mark.parametrize(
    "mangled, name",
    [
        ("_Z4blurPf", "blur"),
        ("_ZL1q", "q"),
        ("_ZN1NL1qE", "N::q"),
        ("_ZN1a1b4fibtIiEET_S2_", "a::b::fibt"),
        ("_ZNK3BoxIfLi4EE2goEi", "Box::go"),
        ("_ZN1a3fibE3foo", "a::fib"),
        ("_ZN12_GLOBAL__N_11xE", "x"),
        ("_ZZN1N6kernelE3fooE1s_0", "s"),
        ("_ZN3BoxISt4pairIifEN1a3FooELin4EA16_iS0_T_E2goEi", "Box::go"),
        ("_ZN3BoxISt4pairIifE2goEi", "_ZN3BoxISt4pairIifE2goEi"),
        ("_ZTV1A", "_ZTV1A"),
        ("extern_c", "extern_c"),
    ],
)
def test_names_are_those_of_the_source(mangled, name):
    assert source_name(mangled) == name


def test_a_file_says_how_it_is_launched(tmp_path):
    file = tmp_path / "scale.cu"
    file.write_text(SCALE)
    text = summary(file)
    assert 'kernels["scale"][1, 32](x, y, factor, n, flag)' in text
    assert "x = np.zeros(1024, np.float32)  # float*" in text
    assert "Code for the CPU" not in text
    done = subprocess.run(
        [sys.executable, "-m", "nogpu", str(file)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"{text}\n")
    file.write_text("__global__ void f() { y; }")
    done = subprocess.run(
        [sys.executable, "-m", "nogpu", str(file)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "scale.cu:1: identifier" in done.stderr


MANY = """
#include <cuda_fp16.h>
#include <cuda_bf16.h>
struct Line { float slope; double offset; };
typedef float real;
extern "C" __global__ void mixed(const float* x, real* y, float factor, real more, int n,
                                 unsigned char flag, bool on, half h, Line line)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n)
        y[i] = factor * x[i] + more + (float)h + line.slope + flag + on;
}
template <typename T, int N> __global__ void transpose(const T* a, T* b, T alpha, int n)
{
    int i = blockIdx.y * N + threadIdx.y, j = blockIdx.x * N + threadIdx.x;
    if (i < n && j < n)
        b[i * n + j] = alpha * a[j * n + i];
}
__global__ void halved(__nv_bfloat16* in, unsigned long long lambda)
{
    extern __shared__ float s[];
    s[threadIdx.x] = __bfloat162float(in[threadIdx.x]);
    in[threadIdx.x] = s[threadIdx.x] / 2;
}
"""


def test_the_printed_example_runs_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "many.cu").write_text(MANY)
    monkeypatch.chdir(tmp_path)
    text = summary("many.cu")
    example = text.partition("\n\n")[2].partition("\n\nIts sizes")[0]
    with nogpu.emulate() as gpu:
        exec(example, {})
    assert "line = (1.0, 1.0)  # Line" in example
    assert [(one.kernel, one.grid, one.block, one.shared) for one in gpu.launches] == [
        ("mixed", (1, 1, 1), (32, 1, 1), 0),
        ("transpose<float, 16>", (2, 2, 1), (16, 16, 1), 0),
        ("halved", (1, 1, 1), (32, 1, 1), 4096),
    ]
    assert gpu.faults == []


def test_a_refused_kernel_has_a_row_as_others_have(tmp_path):
    refused = """
__global__ void big(float* x, int n)
{
    __shared__ float t[20000];
    t[threadIdx.x] = x[0];
    __syncthreads();
    x[1] = t[n];
}
__global__ void odd(float* x) { asm volatile("nonsense.f32 %0, %0;" : "+f"(x[0])); }
int main() { float* d; cudaMalloc(&d, 4); odd<<<1, 1>>>(d); }
"""
    (tmp_path / "scale.cu").write_text(SCALE + refused)
    text = summary(tmp_path / "scale.cu")
    assert re.search(r"^scale +2 +\d+ +0 B +0 B +0 B +100%", text, re.MULTILINE)
    assert re.search(r"^big +9 +ptxas refuses the kernel: .*too much shared data", text, re.M)
    assert re.search(r"^odd +16 +ptxas refuses the kernel: .*'nonsense'", text, re.MULTILINE)
    assert "Code for the CPU is left out (main, cudaMalloc, <<<…>>>)" in text


def test_what_is_printed_is_in_the_order_of_threads():
    gpu, _ = launched("greeting")
    assert [line.split(":")[0] for line in gpu.launches[0].printed] == [
        f"block {block}, thread {thread}" for block in (0, 1) for thread in (0, 1)
    ]


MATRICES = """#include <cuda_fp16.h>
typedef struct {
    int width, height;  // in elements
    float* elements;
} Matrix;
struct Factors { unsigned char is_on; double of_a; short shift; half of_b; const int *places; };
extern "C" __global__ void add(Matrix a, const Matrix b, Factors f)
{
    int i = threadIdx.x;
    if (i < a.width * a.height && f.is_on)
        a.elements[i] = f.of_a * a.elements[i] + (float)f.of_b * b.elements[f.places[i] + f.shift];
}
"""


def test_fields_of_a_structure_are_given_as_a_tuple():
    a, b = np.arange(6, dtype=np.float32), np.arange(6, 12, dtype=np.float32)
    places, before = np.arange(6, dtype=np.int32)[::-1].copy(), a.copy()
    kernel = nogpu.cuda.compile(MATRICES)["add"][1, 32]
    factors = (1, 2.0, -1, 0.5, places)
    with nogpu.emulate() as gpu:
        kernel((3, 2, a), (3, 2, b), (*factors[:2], 0, *factors[3:]))
    assert gpu.faults == []
    np.testing.assert_array_equal(a, 2 * before + b[::-1] / 2)
    with nogpu.emulate() as gpu:
        kernel((3, 2, a), (3, 2, b), factors)
    (fault,) = gpu.faults
    assert (fault.name, fault.source[1]) == ("out of bounds", 11)
    assert "b.elements" in fault.message


def test_a_structure_that_does_not_fit_is_refused():
    a, places = np.zeros(6, np.float32), np.zeros(6, np.int32)
    kernel = nogpu.cuda.compile(MATRICES)["add"][1, 32]
    right = [(3, 2, a), (3, 2, a), (1, 2.0, 0, 0.5, places)]
    for wrong, said in (
        (
            (3, a),
            "a of add has the fields width, height, elements; expected a tuple of 3, and got 2",
        ),
        ((3, 2, places), "a.elements of add is float*, and got an array of int32"),
        ((3.5, 2, a), "a.width of add is int, and got 3.5; pass an integer"),
        (3, "a of add is a structure of 16 bytes, and got 3; pass a tuple of its fields, or its"),
    ):
        with nogpu.emulate(), pytest.raises(TypeError, match=re.escape(said)):
            kernel(wrong, *right[1:])
    twice = MATRICES.replace("typedef", "namespace b { struct Matrix { float x; }; }\ntypedef")
    with nogpu.emulate(), pytest.raises(TypeError, match="and got tuple; pass its bytes, or a rec"):
        nogpu.cuda.compile(twice)["add"][1, 32](*right)
    packed = MATRICES.replace("int width, height;", "alignas(16) int width, height;")
    with nogpu.emulate(), pytest.raises(TypeError, match="a of add is a structure of 32 bytes"):
        nogpu.cuda.compile(packed)["add"][1, 32](*right)


def test_constant_memory_takes_no_sectors():
    """A GPU serves `__constant__` memory from a cache of its own: counted are the sectors of x and
    y alone, and no access of the line that loads constants."""
    code = """
__constant__ float taps[3];
extern "C" __global__ void filter(const float* x, float* y)
{
    float sum = 0;
    for (int k = 0; k < 3; k++)
        sum += taps[k] *
               x[threadIdx.x + k];
    y[threadIdx.x] = sum;
}"""
    kernels = nogpu.cuda.compile(code)
    kernels.copy_to("taps", np.array([1, 2, 3], np.float32))
    x, y = np.arange(34, dtype=np.float32), np.zeros(32, np.float32)
    with nogpu.emulate() as gpu:
        kernels["filter"][1, 32](x, y)
    np.testing.assert_array_equal(y, x[:32] + 2 * x[1:33] + 3 * x[2:])
    counters = gpu.launches[0].counters
    loads = [one for one in counters.accesses if one.what == "load"]
    assert [(one.requests, one.transactions) for one in loads] == [(3, 4 + 5 + 5)]
    assert (counters.distinct_read, counters.distinct_written) == (5, 4)


def test_memory_of_numpy_begins_where_that_of_a_gpu_does():
    """32 threads move 128 bytes each way: four sectors, and not five as where malloc placed it."""
    arrays = [np.zeros((3, 32), np.float32) for _ in range(100)]
    (whole, *_) = (one for one in arrays if one.ctypes.data % 32)
    whole[:] = np.arange(96).reshape(3, 32)
    before = whole.copy()
    code = """
extern "C" __global__ void add(const float* x, float* y) { y[threadIdx.x] += x[threadIdx.x]; }"""
    kernel = nogpu.cuda.compile(code)["add"]
    with nogpu.emulate() as gpu:
        kernel[1, 32](whole[0], whole[2])
        kernel[1, 32](whole[1], whole.reshape(-1)[33:65])  # they share memory, four bytes apart
    assert gpu.faults == []
    first, second = gpu.launches
    assert first.counters.sums("global").transactions == 3 * 4
    assert second.counters.sums("global").transactions == 4 + 2 * 5
    np.testing.assert_array_equal(whole[2], before[0] + before[2] + [before[1, -1], *[0] * 31])


HOST_CODE = """
#include <iostream>
#include <vector>
#include <algorithm>
#include <math.h>
#include <unistd.h>
using std::cout;
namespace layers {
struct Shape { int rows, columns; };
class Layer {
    float* weight;
    std::string name;
  public:
    Layer(const char* name, int n);
    float* forward(std::vector<float>& x);
};
}
layers::Layer::Layer(const char* name, int n) { cudaMalloc(&weight, n * 4); }
__device__ float bounded(float x) { return std::min(std::max(x, -INFINITY), 2.0f); }
int sizes[] = {1, 2};
void show(std::vector<float>& v) { printf("{ %d\\n", (int)v.size()); }
__global__ void first(float* x, layers::Shape shape) { x[threadIdx.x] = shape.rows; }
int main() {
    layers::Layer layer("}", 3);
    auto begun = std::chrono::high_resolution_clock::now();
    first<<<1, 32>>>(nullptr, {});
}
__global__ void last(float* x) { x[threadIdx.x] = bounded(x[threadIdx.x]); }
"""


def test_a_whole_program_may_stand_in_the_file():
    kernels = nogpu.cuda.compile(HOST_CODE)
    x = np.zeros(32, np.float32)
    with nogpu.emulate() as gpu:
        shape = np.array((7, 8), np.dtype([("rows", "i4"), ("columns", "i4")]))
        kernels["first"][1, 32](x, shape)
        assert (x == 7).all()
        kernels["last"][1, 32](x)
        assert (x == 2).all()
    assert gpu.faults == []


def test_an_error_outside_of_the_hosts_code_keeps_its_line():
    broken = HOST_CODE.replace("x[threadIdx.x] = shape.rows", "x[threadIdx.x] = shape.row")
    line = 1 + broken[: broken.index("shape.row;")].count("\n")
    with pytest.raises(CompileError, match=f'cu:{line}: .*has no member "row"') as e:
        nogpu.cuda.compile(broken)
    assert "\n" not in str(e.value)
    with pytest.raises(CompileError, match="cannot open source file"):
        nogpu.cuda.compile('#include "own.h"\n' + HOST_CODE)


def test_a_mask_of_threads_that_wait_at_a_barrier_is_wrong():
    code = """
extern "C" __global__ void sum(int* x, int n)
{
    int v = x[threadIdx.x];
    if (threadIdx.x < n)
        v += __shfl_down_sync(0xffffffff, v, 1);
    __syncthreads();
    x[threadIdx.x] = v;
}"""
    with nogpu.emulate() as gpu:
        nogpu.cuda.compile(code)["sum"][1, 32](np.zeros(32, np.int32), 20)
    (fault,) = gpu.faults
    assert (fault.name, fault.source[1]) == ("wrong mask", 6)


def test_a_size_is_printed_with_its_own_width():
    code = """
#include <stdio.h>
extern "C" __global__ void show(size_t n) { printf("%zu of %d %s", n, 3, "parts"); }"""
    with nogpu.emulate() as gpu:
        nogpu.cuda.compile(code)["show"][1, 1](2**33)
    assert gpu.launches[0].printed == ["8589934592 of 3 parts"]


def test_a_transpose_is_refused():
    x, y = np.zeros((4, 8), np.float32), np.zeros((8, 4), np.float32)
    with nogpu.emulate(), pytest.raises(TypeError, match="x of scale is not contiguous"):
        nogpu.cuda.compile(SCALE)["scale"][1, 32](x.T, y, 2, 32, True)


def test_importing_nogpu_needs_no_compiler():
    code = (
        "import sys, nogpu.cuda; sys.exit('cuda.bindings' in sys.modules or 'torch' in sys.modules)"
    )
    folder = Path(nogpu.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, check=False)
    assert done.returncode == 0


def test_the_example_of_the_page(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "nogpu.md").read_text("utf-8")
    section = page.partition("\n## CUDA C++\n")[2].partition("\n## ")[0]
    for name, kind in (("product.cu", "cpp"), ("launch.py", "py")):
        (code,) = re.findall(rf"^```{kind}\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
        (tmp_path / name).write_text(code)
    done = subprocess.run(
        [sys.executable, "-m", "nogpu", "launch.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    (shown,) = re.findall(r"^(✗ error: race in product.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert done.returncode == 1, done.stderr
    assert shown in done.stdout


def test_an_array_of_the_host_is_refused(gpu_script):
    code = """
import nogpu.cuda, numpy as np, torch
k = nogpu.cuda.compile('extern "C" __global__ void f(float* x) { x[threadIdx.x] = 1; }')
k["f"][1, 8](torch.zeros(8, device="cuda"))
k["f"][1, 8](np.zeros(8, np.float32))
"""
    assert "x of f is an array of the host, and the kernel runs on the device" in gpu_script(code)


@pytest.fixture
def gpu_script(tmp_path):
    """Return a function that runs a script with --cuda-is-cpu, and returns what it says."""

    def run(code: str) -> str:
        (tmp_path / "script.py").write_text(code)
        command = [sys.executable, "-m", "nogpu", "--cuda-is-cpu", "script.py"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        return done.stderr

    return run


def test_a_fault_that_is_repeated_hides_no_other():
    """The launch goes on behind 1,500 errors at one line, and all of them are counted."""
    source = """
    extern "C" __global__ void f(float* x)
    {
        float sum = 0;
        for (int i = 0; i < 1500; i++)
            sum += x[32 + i];
        x[threadIdx.x] = sum;
        x[64] = sum;
    }
    """
    with nogpu.emulate() as gpu:
        nogpu.cuda.compile(source)["f"][1, 1](np.zeros(32, np.float32))
    assert [(one.name, one.source[1], one.count) for one in gpu.faults] == [
        ("out of bounds", 6, 1500),
        ("out of bounds", 8, 1),
    ]
    assert not gpu.launches[0].ended


def messages(source: str, size: object, *arguments: object) -> list[str]:
    """Return what the faults of the kernel "f" say."""
    with nogpu.emulate() as gpu:
        nogpu.cuda.compile(source)["f"][size](*arguments)
    return [one.message for one in gpu.faults]


@pytest.mark.parametrize(
    "code, what",
    [
        ("x[0] = *(float*)malloc(4);", "malloc (or new)"),
        ("float* p = new float[8]; x[0] = p[threadIdx.x];", "malloc (or new)"),
        ("free(x);", "free (or delete)"),
    ],
)
def test_memory_is_allocated_before_the_launch(code, what):
    source = f'extern "C" __global__ void f(float* x) {{ {code} }}'
    (message,) = messages(source, (1, 1), np.zeros(8, np.float32))
    assert message == (
        f"{what} in a kernel is not executed here; allocate the memory before the launch, and "
        "pass it as an argument"
    )


def test_a_null_pointer_is_named():
    source = """
    struct Node { float* next; };
    extern "C" __global__ void f(float* x, float* y, Node* node, int way, int n)
    {
        if (way == 0)
            y[threadIdx.x + n] = x[threadIdx.x + 1];
        if (way == 1)
            atomicAdd(y + n, 1.0f);
        if (way == 2)
            *x = node->next[threadIdx.x + 1];
    }
    """
    x, node = np.zeros(64, np.float32), np.zeros(1, np.uint64)
    (of_x,) = messages(source, (1, 32), None, x, node, 0, 0)
    assert of_x == (
        "thread (0, 0, 0) loads through a null pointer: argument 1 is None or 0; pass an array"
    )
    (of_y,) = messages(source, (1, 32), x, None, node, 0, 10**6)
    assert "stores through a null pointer: argument 2 is None" in of_y
    (of_y,) = messages(source, (1, 1), x, None, node, 1, 10**6)
    assert "stores through a null pointer: argument 2 is None" in of_y
    (of_node,) = messages(source, (1, 1), x, x, node, 2, 0)
    assert "loads through a null pointer, at the address 0x4; let the pointer have" in of_node
    (far,) = messages(source, (1, 32), x, x, node, 0, 10**6)
    assert "null" not in far


def test_dynamic_shared_memory_has_the_bytes_of_the_launch():
    source = """
    extern "C" __global__ void f(float* x)
    {
        extern __shared__ float buffer[];
        __shared__ float own[32];
        buffer[threadIdx.x] = x[threadIdx.x];
        own[threadIdx.x + (x[0] > 0)] = 1;
        __syncthreads();
        x[threadIdx.x] = own[threadIdx.x];
    }
    """
    assert messages(source, (1, 32, 128), np.zeros(32, np.float32)) == []
    for size, thread in (((1, 32), 0), ((1, 32, 64), 16)):
        (message,) = messages(source, size, np.zeros(32, np.float32))
        given = 4 * thread
        assert message == (
            f"thread ({thread}, 0, 0) stores byte {given} of extern __shared__ memory, and the "
            f"launch gives it {given} bytes; pass enough bytes as the third of [grid, block, "
            "bytes], or a smaller index"
        )
    said = messages(source, (1, 32, 128), np.ones(32, np.float32))
    assert any("outside of own" in one for one in said), said
    assert not any("extern" in one for one in said)
    wide = source.replace("buffer[threadIdx.x] =", "*(double*)(buffer + 1) =")
    (message,) = messages(wide, (1, 1, 128), np.zeros(32, np.float32))
    assert message == (
        "thread (0, 0, 0) stores byte 4 of shared memory, whose address is not a multiple of 8"
    )


def test_one_thread_that_has_ended_is_no_plural():
    source = """
    extern "C" __global__ void f(float* x)
    {
        if (threadIdx.x == 5)
            return;
        __syncthreads();
        x[threadIdx.x] = 1;
    }
    """
    (message,) = messages(source, (1, 64), np.zeros(64, np.float32))
    assert message.startswith("thread (5, 0, 0) has ended without this __syncthreads")


LAST_BLOCK = """
__device__ unsigned int count = 0;
extern "C" __global__ void f(const float* x, float* parts, float* sum)
{
    parts[blockIdx.x] = x[blockIdx.x];
    FIRST
    unsigned int done = atomicAdd(&count, 1);
    SECOND
    if (done < gridDim.x - 1)
        return;
    float all = 0;
    for (int i = 0; i < gridDim.x; i++)
        all += parts[i];
    *sum = all;
}
"""


def test_the_last_block_needs_two_fences():
    def said(first: str, second: str, source: str = LAST_BLOCK) -> list[str]:
        code = source.replace("FIRST", first).replace("SECOND", second)
        arrays = np.ones(4, np.float32), np.zeros(4, np.float32), np.zeros(1, np.float32)
        return messages(code, (4, 1), *arrays)

    fence = "__threadfence();"
    assert said(fence, fence) == []
    for fences in (("", ""), (fence, ""), ("", fence)):
        (message,) = said(*fences)
        assert "without __threadfence() between that store and its block's atomic, and" in message
    (message,) = said("", "", LAST_BLOCK.replace("atomicAdd(&count, 1)", "blockIdx.x"))
    assert "without an atomic or another launch between them" in message


def test_an_error_of_a_cpp_file_advises_no_flag(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def advice(code: str) -> str:
        (tmp_path / "script.py").write_text(f"import nogpu.cuda\n{code}\n")
        with pytest.raises((CompileError, KeyError, RuntimeError, ValueError)) as caught:
            command.main([str(tmp_path / "script.py")])
        return "".join(getattr(caught.value, "__notes__", ())) + capsys.readouterr().out

    for code in (
        'nogpu.cuda.compile("__global__ void f() { y; }")',
        'nogpu.cuda.compile("__global__ void f() { }")["g"]',
        'raise ValueError("of the script")',
    ):
        assert "--cuda-is-cpu" not in advice(code), code
    assert "--cuda-is-cpu" in advice('raise RuntimeError("CUDA is not there")')


def test_a_width_of_printf_may_be_an_argument():
    code = r"""
#include <stdio.h>
extern "C" __global__ void show()
{
    printf("%*d|%-*d|%.*f|%*.*f|%*s|%.f|%d%%", 5, 42, 6, 7, 2, 3.14159, 8, 3, 2.5, 4, "ab", 2.0, 1);
}"""
    with nogpu.emulate() as gpu:
        nogpu.cuda.compile(code)["show"][1, 1]()
    assert gpu.launches[0].printed == ["   42|7     |3.14|   2.500|  ab|2|1%"]


@pytest.mark.parametrize(
    "name, said",
    [
        ("f<float>", "f < float >: cannot determine which instance of .*; give an argument for ea"),
        ("f<flot, 3>", 'f < flot, 3 >: identifier "flot" is undefined; give an argument for each '),
    ],
)
def test_an_instance_that_a_template_does_not_have_is_named(name, said):
    source = "template <typename T, int W> __global__ void f(T* x) { x[0] = W; }"
    with nogpu.emulate(), pytest.raises(CompileError, match=rf"\.cu has no instance {said}"):
        nogpu.cuda.compile(source)[name][1, 1](np.zeros(1, np.float32))


def test_a_launch_with_many_errors_ends():
    source = """
    extern "C" __global__ void f(float* x) { for (int i = 0; i < 100; i++) x[i] += 1; }
    """
    with nogpu.emulate() as gpu, patch.object(emulator, "MOST_REPEATED", 1000):
        nogpu.cuda.compile(source)["f"][64, 1](np.zeros(100, np.float32))
    assert gpu.launches[0].ended == "many errors"
    assert [(one.kind, one.name) for one in gpu.faults] == [
        ("error", "race between blocks"),
        ("error", "race between blocks"),
        ("note", "many errors"),
    ]
    (first,) = {one.program for one in gpu.faults[:2]}
    assert f": race between blocks: block {first}: thread (0, 0, 0) " in gpu.faults[0].in_one_line()


def test_loops_of_a_swap_may_begin_with_a_plain_load():
    source = """
    extern "C" __global__ void most(const float* x, int* most)
    {
        int old = *most, seen;
        do {
            seen = old;
            if (__int_as_float(seen) >= x[blockIdx.x * 32 + threadIdx.x])
                break;
            old = atomicCAS(most, seen, __float_as_int(x[blockIdx.x * 32 + threadIdx.x]));
        } while (old != seen);
    }
    extern "C" __global__ void sum(int* sum, int* out)
    {
        atomicAdd(sum, 1);
        out[threadIdx.x] = *sum;
    }
    """
    x, found = np.random.default_rng(0).random(128, np.float32), np.zeros(1, np.int32)
    kernels = nogpu.cuda.compile(source)
    with nogpu.emulate(schedules="all") as gpu:
        kernels["most"][4, 32](x, found)
    assert (gpu.faults, found.view(np.float32)[0]) == ([], x.max())
    with nogpu.emulate() as gpu:
        kernels["sum"][1, 64](found, np.zeros(64, np.int32))
    assert gpu.faults[0].name == "race"


def test_products_of_tiles():
    source = """
    #include <mma.h>
    using namespace nvcuda;
    extern "C" __global__ void product(const half* a, const half* b, float* c)
    {
        wmma::fragment<wmma::matrix_a, 16, 16, 16, half, wmma::row_major> left;
        wmma::fragment<wmma::matrix_b, 16, 16, 16, half, wmma::col_major> right;
        wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum;
        wmma::fill_fragment(sum, 1.0f);
        wmma::load_matrix_sync(left, a, 16);
        wmma::load_matrix_sync(right, b, 16);
        wmma::mma_sync(sum, left, right, sum);
        wmma::store_matrix_sync(c, sum, 16, wmma::mem_row_major);
    }
    """
    a, b = torch.randint(-4, 5, (2, 16, 16)).half()
    c = torch.empty(16, 16)
    with nogpu.emulate() as gpu:
        nogpu.cuda.compile(source)["product"][1, 32](a, b, c)
    assert not gpu.faults
    assert torch.equal(c, a.float() @ b.float().T + 1)
    assert "tensor cores" in gpu.launches[0].counted()


BRANCHES = """.version 8.0
.target sm_90
.visible .entry k(.param .u64 k_param_0)
{
.reg .b32 r<9>; .reg .b64 d<9>; .reg .pred p;
ld.param.u64 d1, [k_param_0];
mov.u32 r1, %tid.x; mul.wide.u32 d2, r1, 4; add.u64 d1, d1, d2;
and.b32 r2, r1, 3;
$L_t: .branchtargets $L0, $L1, $L2, $L0;
setp.lt.u32 p, r1, 30;
@p brx.idx r2, $L_t;
mov.u32 r3, 7; bra.uni $L_end;
$L0: mov.u32 r3, 10; bra.uni $L_end;
$L1: mov.u32 r3, 11; bra.uni $L_end;
$L2: mov.u32 r3, 12;
$L_end: st.global.u32 [d1], r3; ret;
}
"""


@pytest.mark.parametrize("library", [core.library, lambda: None], ids=["core", "python"])
def test_threads_branch_by_an_index(library):
    gpu = Gpu(SCHEDULES[0])
    y = gpu.allocate("y", 40 * 4)
    with patch.object(core, "library", library):
        gpu.launch(BRANCHES, [y.base], entry="k", block=(40, 1, 1))
    t = np.arange(40)
    want = np.where(t < 30, np.array([10, 11, 12, 10])[t % 4], 7)
    np.testing.assert_array_equal(y.content().view(np.int32), want)


PARTS_OF_WARPS = """
#include <mma.h>
using namespace nvcuda;
extern "C" __global__ void rows(unsigned* x, unsigned n)
{
    __shared__ __align__(16) unsigned held[32];
    held[threadIdx.x] = x[threadIdx.x];
    __syncwarp();
    unsigned at = (unsigned)__cvta_generic_to_shared(held + 4 * (threadIdx.x % 8)), row = 0;
    if (x[threadIdx.x] < n)
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(row) : "r"(at));
    x[threadIdx.x] = row;
}
extern "C" __global__ void product(unsigned* x, unsigned n)
{
    __shared__ __align__(32) half one[256];
    for (int i = threadIdx.x; i < 256; i += 32)
        one[i] = 1;
    __syncwarp();
    wmma::fragment<wmma::matrix_a, 16, 16, 16, half, wmma::row_major> a;
    wmma::fragment<wmma::matrix_b, 16, 16, 16, half, wmma::col_major> b;
    wmma::fragment<wmma::accumulator, 16, 16, 16, float> c;
    wmma::load_matrix_sync(a, one, 16);
    wmma::load_matrix_sync(b, one, 16);
    wmma::fill_fragment(c, 0.0f);
    if (x[threadIdx.x] >= n)
        return;
    wmma::mma_sync(c, a, b, c);
    x[threadIdx.x] = c.x[0];
}
"""


@pytest.mark.parametrize("library", [core.library, lambda: None], ids=["core", "python"])
@pytest.mark.parametrize("kernel", ["rows", "product"])
def test_a_part_of_a_warp_does_not_execute_what_the_whole_warp_must(library, kernel):
    launch = nogpu.cuda.compile(PARTS_OF_WARPS)[kernel]
    with patch.object(core, "library", library):
        with nogpu.emulate() as gpu:
            launch[1, 32](np.arange(32, dtype=np.uint32), 32)
        assert not gpu.faults, gpu.report()
        with nogpu.emulate() as gpu:
            launch[1, 32](np.arange(32, dtype=np.uint32), 20)
    (fault,) = gpu.faults
    assert fault.name == "diverged warp"
    assert kernel != "rows" or fault.source[1] == 11
    assert "20 threads from (0, 0, 0) to (19, 0, 0) execute " in fault.message
    assert "which all 32 threads of a warp must execute together" in fault.message


def test_clusters_are_refused_by_name():
    source = """
#define MOST(a, b) ((a) > (b) ? (a) : (b))
extern "C" __global__ void __launch_bounds__(MOST(32, 64)) __cluster_dims__(2, 1, 1) both(int* x)
{
    __shared__ int held;
    held = 1;
    x[blockIdx.x] = held;
}"""
    kernels = nogpu.cuda.compile(source)
    assert kernels.names == ["both"]
    with nogpu.emulate(), pytest.raises(NotImplementedError, match="in clusters of 2 blocks"):
        kernels["both"][2, 1](np.zeros(2, np.int32))
