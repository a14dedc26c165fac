# SPDX-License-Identifier: MIT
"""The launches that torch.compile writes for a GPU that is not there: kernels with constant sizes.

Inductor makes constants of the sizes that it knows, and of the factors of a symmetric product.
Operands are fake tensors on "cuda". Triton parses each kernel with the signature and the constants
that Inductor gives it. The graphs of symbolic sizes are in `test_launch.py`.
"""

from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import config
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.exc import InductorError
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="the kernels are written in Triton")
import triton
from launching import idle_gpu
from triton.compiler import ASTSource

from torchpar.kernels import tiles
from torchpar.ops._operator import INDUCTOR_NEEDS_INT32

ops = torch.ops.torchpar
# Of the GPU that is not there, as far as Inductor asks.
PROPERTIES = {
    "get_device_properties": SimpleNamespace(
        name="NVIDIA Test",
        major=9,
        minor=0,
        multi_processor_count=132,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
    ),
    "get_device_capability": (9, 0),
    "get_compute_capability": 90,
    "is_bf16_supported": True,
    "current_device": 0,
    "exchange_device": 0,
    "maybe_exchange_device": 0,
    "set_device": None,
    "synchronize": None,
}


class Launch(NamedTuple):
    """A kernel, what it is said to write, the arguments that Inductor passes, and their types."""

    name: str
    written: list[str]
    arguments: dict[str, Any]
    signature: dict[str, str]


@pytest.fixture(autouse=True)
def _gpu(tmp_path, monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(tiles, "library_is_faster", lambda *args, **options: False)
    with idle_gpu(tmp_path, lambda *args: None):
        yield


def answer_with(value: Any, *args: Any, **options: Any) -> Any:
    return value


class Written(BaseException):
    """Inductor has written its code, which is not run."""


def inductor(op: Any, *shapes: tuple[int, ...], dtype: torch.dtype) -> list[Launch]:
    """The launches in the code that Inductor writes for an operator.

    Triton parses each kernel with the types and the constants that Inductor compiles it with.
    """
    written: list[list[str]] = []
    launches: list[Launch] = []
    define = PythonWrapperCodegen.define_user_defined_triton_kernel

    def define_and_parse(self: Any, kernel: Any, configs: Any, kwargs: Any, *others: Any) -> Any:
        defined = define(self, kernel, configs, kwargs, *others)
        meta = defined[1]
        triton.compile(ASTSource(kernel, meta["signature"], meta["constants"], meta["configs"][0]))
        write = written[len(launches)]
        launches.append(
            Launch(kernel.__name__.removesuffix("_kernel"), write, kwargs, meta["signature"])
        )
        return defined

    def compile_graph(graph: fx.GraphModule, *args: Any, **options: Any) -> Any:
        launched = [node.kwargs for node in graph.graph.nodes if "kernel_idx" in node.kwargs]
        written.extend(one["tensors_to_clone"] for one in launched)
        return compile_fx_inner(graph, *args, **options)

    def write_code(self: GraphLowering) -> None:
        self.codegen()
        raise Written

    with FakeTensorMode():
        args = [torch.empty(shape, dtype=dtype, device="cuda") for shape in shapes]
    with ExitStack() as stack:
        for name, value in PROPERTIES.items():
            answer = staticmethod(partial(answer_with, value))
            for interface in (torch.cuda, CudaInterface, CudaInterface.Worker):
                stack.enter_context(patch.object(interface, name, answer, create=True))
        stack.enter_context(patch("torch._inductor.scheduler.has_triton", lambda: True))
        stack.enter_context(patch.object(PythonWrapperCodegen, define.__name__, define_and_parse))
        stack.enter_context(patch.object(GraphLowering, "_compile_to_module", write_code))
        # What would compute on the GPU, start processes, or keep what is compiled.
        stack.enter_context(patch("torch._functorch.config.enable_autograd_cache", False))
        stack.enter_context(
            config.patch(
                compile_threads=1,
                fx_graph_cache=False,
                joint_graph_constant_folding=False,
                pattern_matcher=False,
            )
        )
        stack.enter_context(pytest.raises(Written))
        compile_fx(fx.symbolic_trace(op), args, compile_graph)
    assert len(launches) == len(written)
    return launches


def matmul_t(x: Tensor) -> list[Tensor]:
    return [ops.matmul_t(x)]


def product_and_sum(a: Tensor, b: Tensor, c: Tensor) -> list[Tensor]:
    return [ops.symmetric_matmul(a, b, c, alpha=-2.0, beta=3.0)]


def difference(a: Tensor, b: Tensor, c: Tensor) -> list[Tensor]:
    return [ops.symmetric_matmul(a, b, c, alpha=1 / 3, beta=-4.775)]


def layer(x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    return [ops.linear_sigmoid(x, weight, bias)]


def layer_backward(g: Tensor, y: Tensor) -> list[Tensor]:
    dz, db = ops.linear_sigmoid_backward(g, y)[:2]
    return [dz, db]


def maximum(a: Tensor, b: Tensor) -> list[Tensor]:
    return [ops.maximum(a, b)]


def maximum_backward(g: Tensor, a: Tensor, b: Tensor) -> list[Tensor]:
    da, db = ops.maximum_backward(g, a, b)[:2]
    return [da, db]


def half_sum(g: Tensor, x: Tensor) -> list[Tensor]:
    return [ops.matmul_t_backward(g, x)]


def exact(a: Tensor, b: Tensor) -> list[Tensor]:
    return [ops.exact_matmul(a, b)]


F16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
TMA, POINTERS = "symmetric_matmul_tma out", "symmetric_matmul out"
ADD = "add_partial_sums out"
SUMS = "sigmoid_backward dz sum"
# Operator, shapes, dtype, and the kernels with the tensors that they write.
LAUNCHES: list[tuple[Any, list[tuple[int, ...]], torch.dtype, list[str]]] = [
    (matmul_t, [(4096, 2048)], F16, [TMA]),
    (product_and_sum, [(4096, 2048), (4096, 2048), (4096, 4096)], F16, [TMA]),
    (difference, [(17, 33), (17, 33), (17, 17)], F32, [POINTERS]),
    (layer, [(4096, 1024), (4096, 1024), (4096,)], F16, ["linear_sigmoid_tma out"]),
    (layer, [(64, 8192), (64, 8192), (64,)], F64, ["linear_sigmoid out", "reduce_split_k out"]),
    (
        maximum_backward,
        [(1000, 40), (1000, 40), (40,)],
        F32,
        ["maximum_backward_sums d_full sum", ADD],
    ),
]
SLOW: list[tuple[Any, list[tuple[int, ...]], torch.dtype, list[str]]] = [
    *((matmul_t, [(*batch, 4096, 4096)], F16, [TMA]) for batch in [(1,), (3,), (1, 1)]),
    *((matmul_t, [(n, k)], F32, [POINTERS]) for n, k in [(1, 64), (64, 1), (1, 1), (16, 16)]),
    *((matmul_t, [(1, n, k)], F64, [POINTERS]) for n, k in [(1, 4096), (128, 1), (17, 33)]),
    (product_and_sum, [(1, 4096), (1, 4096), (1, 1)], F16, [POINTERS]),
    (difference, [(4096, 4096), (4096, 4096), (4096, 4096)], F16, [TMA]),
    *(
        (layer, [(m, k), (n, k), (n,)], dtype, ["linear_sigmoid out"])
        for m, n, k in [(1, 1, 1), (1, 64, 64), (64, 1, 64), (64, 64, 1), (512, 512, 121)]
        for dtype in (F16, F64)
    ),
    *(
        (layer_backward, [(m, n), (m, n)], F32, [SUMS] if m == 1 else [SUMS, ADD])
        for m, n in [(1, 1), (1, 1000), (1000, 1), (1000, 1000)]
    ),
    *((half_sum, [(n, n), (n, 64)], F32, ["symmetric_sum out"]) for n in (1, 17, 4096)),
    *(
        (maximum, [(m, n), other], F32, [f"maximum_{kind} out"])
        for m, n, other, kind in [
            (1000, 1000, (1000, 1000), "flat"),
            (1, 1000, (1,), "flat"),
            (1, 1, (1, 1), "flat"),
            (1000, 1000, (1000,), "strided"),
            (1000, 1000, (1000, 1), "strided"),
            (3, 2, (2,), "strided"),
        ]
    ),
    *(
        (maximum_backward, [(m, n), (m, n), other], F32, [f"maximum_backward_{kind}"])
        for m, n, other, kind in [
            (1000, 1000, (1000, 1000), "flat da db"),
            (1, 1, (1,), "flat da db"),
            (1, 1000, (1, 1), "sums d_full sum"),
            (1000, 1, (1,), "sums d_full sum"),
            (1000, 1000, (1000, 1), "sums d_full sum"),
        ]
    ),
    *(
        (exact, [(m, k), (n, k)], F32, ["exact_product out"])
        for m, n, k in [(64, 64, 64), (1, 64, 64), (64, 1, 1), (1, 1, 1)]
    ),
]


@pytest.mark.parametrize(
    "op, shapes, dtype, kernels",
    [*LAUNCHES, *(pytest.param(*launch, marks=pytest.mark.slow) for launch in SLOW)],
)
def test_inductor_launches_kernels_of_constant_sizes(op, shapes, dtype, kernels):
    launches = inductor(op, *shapes, dtype=dtype)
    found = [
        " ".join([one.name, *(name.removesuffix("_ptr") for name in one.written)])
        for one in launches
    ]
    assert found == kernels
    for one in launches:
        # A launcher would not take such a number for an int32, or would cut it.
        sizes = {name: one.arguments[name] for name, kind in one.signature.items() if kind == "i32"}
        assert all(-(2**31) <= size < 2**31 for size in sizes.values()), sizes


HUGE = pytest.mark.parametrize(
    "op, shapes", [(matmul_t, [(50000, 65536)]), (maximum, [(2**31,)] * 2)]
)


@HUGE
def test_inductor_of_old_versions_calls_an_operator_of_huge_tensors(op, shapes, monkeypatch):
    monkeypatch.setattr("torchpar.ops._operator.INDUCTOR_NEEDS_INT32", True)
    assert inductor(op, *shapes, dtype=F16) == []


@HUGE
def test_inductor_passes_integers_above_int32(op, shapes, monkeypatch):
    expected = nullcontext()
    if INDUCTOR_NEEDS_INT32:
        expected = pytest.raises(InductorError, match="no attribute 'xreplace'")
    monkeypatch.setattr("torchpar.ops._operator.INDUCTOR_NEEDS_INT32", False)
    with expected:
        (launch,) = inductor(op, *shapes, dtype=F16)
        assert max(filter(is_int, launch.arguments.values())) >= 2**31


def is_int(argument: Any) -> bool:
    return isinstance(argument, int)
