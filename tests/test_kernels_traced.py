# SPDX-License-Identifier: MIT
"""Graphs of the CUDA path, without a GPU: the kernels in them, what those write, and metadata of results.

Tensors are fake ones on "cuda", and the driver is a stand-in. The autograd engine asks CUDA for a context
even where tensors are fake, so the operators that make up the backward are traced by themselves.
"""

import inspect
from collections.abc import Iterator
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from benchmarks.driver import target
from torchpar.kernels import linear_sigmoid, matmul_t

ops = torch.ops.torchpar


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    with target(90):
        yield


def fake(shape: str, sizes: dict[str, int | torch.SymInt]) -> Tensor:
    """A tensor on "cuda" with a dimension per letter; without letters, a scalar on the CPU."""
    return torch.empty([sizes[letter] for letter in shape], device="cuda" if shape else "cpu")


def trace(op, shapes: tuple[str, ...]) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    """The graph of ``op`` on fake tensors with symbolic sizes, and what its fake returns."""
    env = ShapeEnv()
    sizes: dict[str, int | torch.SymInt] = {"z": 0}
    for letter, hint in {"b": 3, "m": 80, "n": 48, "k": 33}.items():
        source = ConstantSource(letter)
        symbol = env.create_symbol(hint, source=source, dynamic_dim=DimDynamic.DYNAMIC)
        sizes[letter] = env.create_symintnode(symbol, hint=hint, source=source)

    def results(*args: Tensor) -> tuple[Tensor, ...]:
        result = op(*args)
        return result if isinstance(result, tuple) else (result,)

    with FakeTensorMode(shape_env=env):
        args = [fake(shape, sizes) for shape in shapes]
        return aot_export_joint_simple(results, args, trace_joint=False), results(*args)


def kernel_names(graph: fx.GraphModule) -> list[str]:
    indices = [node.kwargs["kernel_idx"] for node in graph.graph.nodes if "kernel_idx" in node.kwargs]
    kernels = [kernel_side_table.get_kernel(index).fn for index in indices]
    # Launch options make torch wrap a kernel in an Autotuner, whose `fn` is the kernel.
    return [getattr(kernel, "fn", kernel).__name__ for kernel in kernels]


def launches(graph: fx.GraphModule) -> dict[str, list[str]]:
    """The kernels in a graph, and the arguments that each is taken to write."""
    nodes = [node for node in graph.graph.nodes if "kernel_idx" in node.kwargs]
    for node in nodes:
        ((columns, *_),) = node.kwargs["grid"]
        assert isinstance(columns, fx.Node), "the grid is fixed at the sizes it was traced with"
    return dict(zip(kernel_names(graph), [node.kwargs["tensors_to_clone"] for node in nodes], strict=True))


@pytest.mark.parametrize(
    "op, shapes, kernel, written",
    [
        (ops.maximum, ("mk", ""), "maximum_flat_kernel", ["out_ptr"]),
        (ops.maximum, ("mk", "k"), "maximum_strided_kernel", ["out_ptr"]),
        (ops.maximum_backward, ("mk", "mk", ""), "maximum_backward_flat_kernel", ["da_ptr", "db_ptr"]),
        (ops.maximum_backward, ("bmk", "bmk", "k"), "maximum_backward_strided_kernel", ["da_ptr", "db_ptr"]),
        (ops.matmul_t, ("bmk",), "symmetric_product_kernel", ["out_ptr"]),
        (ops.matmul_t_backward, ("bmm", "bmk"), "symmetric_sum_kernel", ["out_ptr"]),
        (ops.linear_sigmoid, ("bmk", "nk", "n"), "linear_sigmoid_kernel", ["out_ptr"]),
        (ops.linear_sigmoid_backward, ("bmn", "bmn"), "sigmoid_backward_kernel", ["dz_ptr", "partial_ptr"]),
    ],
)
def test_tracers_see_the_kernel_and_what_it_writes(op, shapes, kernel, written):
    graph, fakes = trace(op, shapes)
    assert launches(graph) == {kernel: written}
    (outputs,) = graph.graph.find_nodes(op="output")[0].args
    for output, promised in zip(outputs, fakes, strict=True):
        result = output.meta["val"]
        assert result.size() == promised.size()
        assert result.stride() == promised.stride()
        assert (result.dtype, result.device) == (promised.dtype, promised.device)


def aten(graph: fx.GraphModule) -> list[str]:
    """The names of ATen's operators in a graph."""
    return [
        node.target.__name__.partition(".")[0] for node in graph.graph.nodes if "aten" in str(node.target)
    ]


@pytest.mark.parametrize("op, shapes", [(ops.matmul_t, ("mk",)), (ops.linear_sigmoid, ("mk", "nk"))])
def test_the_library_multiplies_where_the_table_says_so_and_without_columns(op, shapes, monkeypatch):
    """The kernels assume at least one column."""
    # The library's product need not be symmetric: one kernel mirrors it.
    mirrored = {"symmetric_sum_kernel": ["out_ptr"]} if op is ops.matmul_t else {}
    without_columns, _ = trace(op, tuple(shape.replace("k", "z") for shape in shapes))
    for module in (matmul_t, linear_sigmoid):
        monkeypatch.setattr(module, "choose_tiles", lambda *args, **kwargs: None)
    by_table, _ = trace(op, shapes)
    assert launches(by_table) == mirrored
    assert set(launches(without_columns)) <= set(mirrored)
    for graph in (by_table, without_columns):
        assert "mm" in aten(graph)


def backward(op: str, gradient: Tensor, saved: tuple[Tensor, ...]) -> tuple[list[str], list[str]]:
    """The kernels, and ATen's operators that launch one, in the graph of an operator's whole backward."""
    module = import_module(f"torchpar.ops.{op}")

    def run(g: Tensor, *saved: Tensor) -> tuple[Tensor, ...]:
        needed = tuple(True for _ in inspect.signature(module._formula).parameters)
        return module._backward(SimpleNamespace(saved_tensors=saved, needs_input_grad=needed), g)

    graph = aot_export_joint_simple(run, [gradient, *saved], trace_joint=False)
    views = ("view", "t", "transpose", "permute", "expand", "_assert_tensor_metadata", "detach")
    return kernel_names(graph), [name for name in aten(graph) if name not in views and "empty" not in name]


@pytest.mark.parametrize("rows, more", [(256, []), (257, ["_to_copy", "sum"])])
def test_the_backward_of_linear_sigmoid_takes_three_launches_for_few_rows(rows, more):
    with FakeTensorMode():
        shapes = (rows, 32), (48, 32), (rows, 48)
        x, weight, y = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes)
        kernels, others = backward("linear_sigmoid", torch.empty_like(y), (x, weight, y))
    assert kernels == ["sigmoid_backward_kernel"]
    assert sorted(others) == sorted(["mm", "mm", *more])


def test_the_backward_of_symbolic_rows_sums_any_number():
    """AOTInductor would not check that they are few."""
    graph, _ = trace(ops.linear_sigmoid_backward, ("mn", "mn"))
    assert "sum" in aten(graph)


@pytest.mark.parametrize("shape, more", [((64, 48), []), ((48,), ["sum"])])
def test_the_backward_of_maximum_is_one_launch(shape, more):
    with FakeTensorMode():
        a, b = (torch.empty(s, dtype=torch.bfloat16, device="cuda") for s in ((64, 48), shape))
        for g in (a, a[0, 0].expand(64, 48)):
            kernels, others = backward("maximum", g, (a, b))
            assert len(kernels) == 1
            assert kernels[0].startswith("maximum_backward")
            assert others == more


def test_float16_gradients_take_two_products():
    """Half of a small one would lose bits, and the sum of two large ones would overflow."""
    with FakeTensorMode():
        g, x = (torch.empty(64, 64, dtype=torch.float16, device="cuda") for _ in range(2))
        graph = aot_export_joint_simple(
            lambda g, x: (ops.matmul_t_backward(g, x),), [g, x], trace_joint=False
        )
    assert aten(graph).count("mm") == 2
    assert not launches(graph)


@pytest.mark.parametrize(
    "cpp_wrapper, expected",
    [(False, "symmetric_product_tma_kernel"), (True, "symmetric_product_kernel")],
    ids=str,
)
def test_inductor_takes_tma_where_its_wrapper_allocates_for_it(cpp_wrapper, expected):
    graphs = []

    def stop(graph: fx.GraphModule, *args, **kwargs) -> None:
        graphs.append(graph)
        raise InterruptedError

    with FakeTensorMode():
        x = torch.empty(4096, 4096, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(InterruptedError):
        compile_fx(fx.symbolic_trace(lambda x: (ops.matmul_t(x),)), [x], stop, {"cpp_wrapper": cpp_wrapper})
    assert kernel_names(graphs[0]) == [expected]
