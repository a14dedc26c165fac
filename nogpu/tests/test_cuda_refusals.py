# SPDX-License-Identifier: MIT
"""Check what a kernel in CUDA C++ is told that a GPU would refuse, or that is not executed here."""

import gc
from typing import Any

import numpy as np
import pytest
import torch

import nogpu
import nogpu.cuda
from nogpu.cpp.nvrtc import CompileError
from nogpu.cpp.summary import summary
from nogpu.cuda.stand_in import cuda_is_cpu

pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC is not installed")

HEAD = "__global__ void kernel(float* x) {"


def first_fault(source: str, size: Any = (1, 32), *arguments: Any) -> Any:
    """Return the first fault of a launch; without arguments the kernel gets 32 numbers."""
    kernels = nogpu.cuda.compile(source)
    with nogpu.emulate("sm_90") as gpu:
        kernels["kernel"][size](*(arguments or (np.ones(32, np.float32),)))
    assert gpu.faults, "no fault"
    return gpu.faults[0]


def test_block_beyond_its_launch_bounds():
    source = "__global__ void __launch_bounds__(64) kernel(float* x) { x[threadIdx.x] = 1; }"
    kernels = nogpu.cuda.compile(source)
    x = np.zeros(65, np.float32)
    with nogpu.emulate("sm_90"):
        kernels["kernel"][1, 64](x)
        with pytest.raises(
            ValueError, match=r"has 65 threads, and __launch_bounds__ promises .* 64"
        ):
            kernels["kernel"][1, 65](x)


def test_block_of_another_size_than_the_source_requires():
    body = "kernel(float* x) { x[threadIdx.x + 16 * threadIdx.y] = 1; }"
    kernels = nogpu.cuda.compile(f"__global__ void __block_size__((16, 2, 1)) {body}")
    x = np.zeros(64, np.float32)
    with nogpu.emulate("sm_90") as gpu:
        kernels["kernel"][1, (16, 2)](x)
        assert (gpu.faults, x.sum()) == ([], 32)
        for block in (16, 32, (2, 16), (16, 2, 2)):
            with pytest.raises(
                ValueError, match=r"is \(\d+, .*, and __block_size__ says \(16, 2, 1\)"
            ):
                kernels["kernel"][1, block](x)


def test_copy_that_nobody_waits_for():
    copy = "__pipeline_memcpy_async(&s[threadIdx.x], &x[threadIdx.x], 4); __pipeline_commit();"
    source = f"""#include <cuda_pipeline.h>
{HEAD} __shared__ float s[32]; {copy} WAIT x[threadIdx.x] = 2 * s[31 - threadIdx.x]; }}"""
    fault = first_fault(source.replace("WAIT", ""))
    assert fault.name == "race"
    assert "which a copy of warp 0 writes" in fault.message
    assert "without __pipeline_wait_prior(0)" in fault.message
    right = source.replace("WAIT", "__pipeline_wait_prior(0); __syncthreads();")
    kernels = nogpu.cuda.compile(right)
    with nogpu.emulate("sm_90") as gpu:
        kernels["kernel"][1, 32](np.ones(32, np.float32))
    assert gpu.faults == []


@pytest.mark.parametrize(
    "before, body, said",
    [
        (
            "__device__ __noinline__ int fib(int n){ return n < 2 ? n : fib(n - 1) + fib(n - 2); }",
            "x[0] = fib(9);",
            "the recursive function fib is not executed here; write it as a loop",
        ),
        (
            "namespace a { template <class T> __device__ __noinline__ T fib(T n)"
            "{ return n < 2 ? n : fib<T>(n - 1) + fib<T>(n - 2); } }",
            "x[0] = a::fib<int>(9);",
            "the recursive function a::fib is not executed here; write it as a loop",
        ),
        (
            "__device__ float a(float x) { return x; }"
            "__device__ float b(float x) { return 2 * x; }",
            "float (*f)(float) = threadIdx.x % 2 ? a : b; x[threadIdx.x] = f(x[threadIdx.x]);",
            "pointers to functions, and virtual functions, are not executed here",
        ),
        (
            "struct A { __device__ virtual float f() { return 1; } };"
            "struct B : A { __device__ float f() override { return 2; } };"
            "__device__ __noinline__ float call(A* a) { return a->f(); }",
            "A a; B b; x[0] = call(threadIdx.x % 2 ? &a : (A*)&b);",
            "pointers to functions, and virtual functions, are not executed here",
        ),
    ],
    ids=["recursion", "recursion in a namespace", "pointer to a function", "virtual function"],
)
def test_function_that_is_not_executed(before, body, said):
    fault = first_fault(f"{before}\n{HEAD} {body} }}")
    assert fault.name == "unknown instruction"
    assert said in fault.message


def test_texture_is_refused_at_the_line_that_reads_it():
    source = """__global__ void kernel(cudaTextureObject_t t, float* x)
{
    x[threadIdx.x] = tex1Dfetch<float>(t, threadIdx.x);
}"""
    fault = first_fault(source, (1, 32), 0, np.ones(32, np.float32))
    assert fault.source[1] == 3
    assert "textures and surfaces are not executed here; pass the array itself" in fault.message


@pytest.mark.parametrize(
    "source, said",
    [
        (
            f"#include <cooperative_groups.h>\n{HEAD} "
            "cooperative_groups::this_thread_block().sync(); x[0] = 1; }",
            "in place of cooperative_groups take __syncthreads()",
        ),
        (
            f"__global__ void child(float* x) {{ x[0] = 1; }}\n{HEAD} child<<<1, 32>>>(x); }}",
            "nogpu executes no kernel that a kernel launches: launch it from Python",
        ),
    ],
    ids=["cooperative groups", "dynamic parallelism"],
)
def test_source_that_is_not_compiled(source, said):
    with pytest.raises(CompileError, match=said.replace("(", r"\(").replace(")", r"\)")):
        nogpu.cuda.compile(source)


def test_header_that_needs_another_library(tmp_path):
    (tmp_path / "draws.h").write_text("#include <nv/target>\n")
    file = tmp_path / "draws.cu"
    file.write_text(f'#include "draws.h"  // in place of cooperative_groups\n{HEAD} x[0] = 1; }}')
    with pytest.raises(CompileError, match=r"draws.h:1: .* which nogpu does not have$"):
        nogpu.cuda.load(file)


def test_index_beyond_an_array_in_shared_memory():
    source = f"""struct Pair {{ float a; }};
{HEAD} __shared__ Pair s[32]; s[threadIdx.x].a = 1; __syncthreads(); x[threadIdx.x] = s[AT].a; }}"""
    after = first_fault(source.replace("AT", "threadIdx.x + 1"))
    assert after.message.endswith(": 128 bytes after the beginning of s, which has 128 bytes")
    far = first_fault(source.replace("AT", "threadIdx.x - 2000"))
    assert far.message.endswith("an index of 32 bits has wrapped, 8,000 bytes before s")
    one = first_fault(
        source.replace("Pair s[32]", "Pair s[32]; char* c = (char*)s")
        .replace("AT", "0")
        .replace("x[threadIdx.x] =", "x[threadIdx.x] = c[(int)threadIdx.x - 1] +")
    )
    assert one.message.endswith(": 1 byte before s")
    before = first_fault(source.replace("AT", "30 - threadIdx.x"))
    assert before.message.endswith("an index of 32 bits has wrapped, 4 bytes before s")
    known = first_fault(
        source.replace("AT", "30 - threadIdx.x").replace("Pair s", "float s").replace(".a", "")
    )
    assert known.message.endswith("an index of 32 bits has wrapped, 4 bytes before s")


def test_fault_of_a_text_has_its_line():
    kernels = nogpu.cuda.compile(f"{HEAD}\n    x[threadIdx.x + 1] = 1;\n}}")
    with nogpu.emulate("sm_90") as gpu:
        kernels["kernel"][1, 32](np.ones(32, np.float32))
    assert "\n        x[threadIdx.x + 1] = 1;\n" in str(gpu.faults[0])


def test_misaligned_vector_names_its_thread():
    source = f"{HEAD} float4 v = *(float4*)(x + 1); x[0] = v.x + v.y + v.z + v.w; }}"
    message = first_fault(source, (1, 1)).message
    assert message == "thread (0, 0, 0) loads x[1], whose address is not a multiple of 16"


CONSTANT = """
__constant__ float weights[3];
__device__ int offset = 2;
template <int N> __global__ void kernel(float* x)
{
    x[threadIdx.x] = weights[threadIdx.x % 3] + offset + N;
}
__global__ void plain(float* x) { x[threadIdx.x] = weights[1] + offset; }
"""


def test_constant_memory_is_filled_before_and_between_launches():
    kernels = nogpu.cuda.compile(CONSTANT)
    x = np.zeros(3, np.float32)
    with nogpu.emulate("sm_90") as gpu:
        kernels.copy_to("weights", np.array([1, 2, 3], np.float32))
        kernels["kernel<4>"][1, 3](x)
        np.testing.assert_array_equal(x, [7, 8, 9])
        kernels.copy_to("weights", torch.tensor([10.0]))
        kernels.copy_to("offset", 0)
        kernels["kernel<4>"][1, 3](x)
        np.testing.assert_array_equal(x, [14, 6, 7])
        kernels["plain"][1, 3](x)
        np.testing.assert_array_equal(x, [2, 2, 2])
    assert gpu.faults == []


ELEMENT_TYPES = {  # by how the source names float: what stands before the kernel, and the instance
    "typedef": ("typedef float REAL;", "copy"),
    "using": ("using real = float; using REAL = real;", "copy"),
    "macro": ("#define REAL float  // of all arrays", "copy"),
    "template": ("template <typename REAL, int N>", "copy<float, 3>"),
    "default": ("template <class REAL = float>", "copy<>"),
}


@pytest.mark.parametrize("way", ELEMENT_TYPES)
def test_an_array_of_another_type_than_the_named_one_is_refused(way):
    before, name = ELEMENT_TYPES[way]
    code = "__global__ void copy(const REAL* x, REAL* out) { out[threadIdx.x] = x[threadIdx.x]; }"
    kernels = nogpu.cuda.compile(f"{before}\n{code}")
    x, out = np.arange(4, dtype=np.float32), np.zeros(4, np.float32)
    with nogpu.emulate():
        kernels[name][1, 4](x, out)
    np.testing.assert_array_equal(out, x)
    with (
        nogpu.emulate(),
        pytest.raises(TypeError, match=r"x of .* is float\*, and got an array of float64; expect"),
    ):
        kernels[name][1, 4](x.astype(np.float64), out)


def test_an_element_type_of_two_meanings_is_not_checked():
    """Which one is meant is the compiler's to know, as of a macro that the options set."""
    code = "__global__ void copy(const REAL* x, REAL* out) { out[threadIdx.x] = x[threadIdx.x]; }"
    either = "#ifdef DOUBLE\n#define REAL double\n#else\n#define REAL float\n#endif\n"
    x, out = np.arange(4.0), np.zeros(4)
    default = "#ifndef REAL\n#define REAL float\n#endif\n"
    for source, option in ((either, "-DDOUBLE"), (default, "-DREAL=double")):
        out.fill(0)
        with nogpu.emulate():
            nogpu.cuda.compile(source + code, options=[option])["copy"][1, 4](x, out)
        np.testing.assert_array_equal(out, x)


def test_constant_memory_refuses_what_does_not_fit():
    kernels = nogpu.cuda.compile(CONSTANT)
    with pytest.raises(KeyError, match=r"no variable 'weight' .* its variables: .*weights"):
        kernels.copy_to("weight", np.zeros(3, np.float32))
    with pytest.raises(TypeError, match="weights is of float32, and got an array of float64"):
        kernels.copy_to("weights", np.zeros(3))
    with pytest.raises(TypeError, match="weights is of float32, and got list"):
        kernels.copy_to("weights", [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="weights has 12 bytes, and got 16"):
        kernels.copy_to("weights", np.zeros(4, np.float32))


OF_ALL_KINDS = """
#include <cassert>
#include <cstdio>
namespace N { __constant__ int q[2]; namespace { __constant__ float h; } }
__constant__ float a = 1, b = 2;
__device__ signed char c;
__device__ bool flag;
struct Pair { float x; int y; };
__constant__ Pair pair;
__global__ void kernel(float* x)
{
    static const float table[3] = {1, 2, 3};
    assert(x != 0);
    if (threadIdx.x > 40) printf("never");
    x[0] = N::q[0] + N::q[1] + N::h; x[1] = a; x[2] = b; x[3] = c; x[4] = flag;
    x[5] = pair.x + pair.y + table[threadIdx.x % 3];
}
"""


def test_variable_is_filled_by_the_conversions_of_a_launch():
    kernels = nogpu.cuda.compile(OF_ALL_KINDS)
    x = np.zeros(6, np.float32)
    kernels.copy_to("N::q", np.array([4, 5], np.uint32))
    kernels.copy_to("N::h", 0.5)
    kernels.copy_to("b", np.float64(7))
    kernels.copy_to("c", -3)
    kernels.copy_to("flag", 2)
    kernels.copy_to("pair", np.array((1, 2), "f4, i4"))
    with nogpu.emulate("sm_90") as gpu:
        kernels["kernel"][1, 1](x)
        np.testing.assert_array_equal(x, [9.5, 1, 7, -3, 1, 4])
        kernels.copy_to("pair", bytes(8))
        kernels.copy_to("a", torch.tensor(4.0, dtype=torch.float64))
        kernels["kernel"][1, 1](x)
        np.testing.assert_array_equal(x, [9.5, 4, 7, -3, 1, 1])
    assert gpu.faults == []


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("N::q", 3.7, "N::q is int, and got 3.7; pass an integer"),
        ("c", 300, "c is signed char, and 300 does not fit into 8 bits"),
        ("b", True, "b is float, and got True; pass a number"),
        (
            "b",
            np.array([1, 2], object),
            "b is of float32, and got an array of object; pass an array of float32",
        ),
        ("pair", np.array([1, 2], object), "pair is of a type that nogpu does not know, and got"),
        ("pair", 1, "nogpu does not know, and got 1; pass its bytes, or a record of NumPy"),
    ],
)
def test_variable_refuses_what_a_launch_refuses(name, value, said):
    with pytest.raises(TypeError, match=said):
        nogpu.cuda.compile(OF_ALL_KINDS).copy_to(name, value)


def test_variables_are_listed_as_the_source_names_them():
    with pytest.raises(KeyError) as e:
        nogpu.cuda.compile(OF_ALL_KINDS).copy_to("$str", b"text")
    names = str(e.value).rpartition("its variables: ")[2].strip('"').split(", ")
    assert sorted(names) == ["N::h", "N::q", "a", "b", "c", "flag", "pair"]


def test_access_beyond_a_variable_of_a_namespace_names_it():
    source = f"namespace N {{ __device__ int q[2]; }} {HEAD} x[0] = N::q[threadIdx.x + 2]; }}"
    message = first_fault(source).message
    assert "outside of N::q" in message
    assert "_ZN" not in message


def test_summary_fills_constant_memory(tmp_path):
    file = tmp_path / "weights.cu"
    file.write_text(CONSTANT)
    said = summary(file)
    assert 'kernels.copy_to("weights", np.zeros(3, np.float32))' in said
    assert '"offset"' not in said  # it has a value
    file.write_text(OF_ALL_KINDS)
    assert 'kernels.copy_to("N::q", np.zeros(2, np.int32))' in summary(file)


def test_graph_names_what_a_function_has_freed():
    def capture(gpu):
        x = torch.zeros(32, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            2 * x
        x = torch.zeros(32, device="cuda")
        graph.replay()
        return [one.name for one in gpu.faults]

    with nogpu.emulate("sm_90") as gpu, cuda_is_cpu(gpu):
        assert capture(gpu) == ["freed input"]


def test_graph_does_not_keep_the_arrays_of_a_launch():
    kernels = nogpu.cuda.compile(f"{HEAD} x[threadIdx.x] += 1; }}")
    with nogpu.emulate("sm_90") as gpu, cuda_is_cpu(gpu):
        x = torch.zeros(32, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kernels["kernel"][1, 32](x)
        graph.replay()
        x = torch.zeros(32, device="cuda")
        gc.collect()
        graph.replay()
    assert [one.name for one in gpu.faults] == ["freed input"]
