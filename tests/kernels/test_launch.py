# SPDX-License-Identifier: MIT
"""Launches without a GPU: plans, which are kept by layout, what they pass to the driver, and traced
graphs.

A stand-in for the driver takes the launches. Tensors are on "meta", and in graphs fake ones on
"cuda". The autograd engine asks CUDA for a context even where tensors are fake, so the operators of
the backward are traced by themselves.
"""

import inspect
import struct
from collections.abc import Iterator
from contextvars import copy_context
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import pytest
import torch
from samples import metadata
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

pytest.importorskip("triton", reason="the kernels are written in Triton")
from launching import idle_gpu

from torchpar.kernels import (
    exact_matmul,
    launch,
    linear_sigmoid,
    matmul_t,
    maximum,
    sigmoid_backward,
    tiles,
)
from torchpar.kernels.launch import Plan
from torchpar.kernels.rule import Tiles

ops = torch.ops.torchpar
N, K = 96, 64
TMA = Tiles(64, 128, 64, 4, 4, "tma")
SPLIT = Tiles(64, 64, 16, 4, 4, "split_k")
# And their bias.
PRODUCTS = ((matmul_t.symmetric_matmul, ()), (linear_sigmoid.linear_sigmoid, (None,)))
FIRST = 9  # of the launcher's arguments, the kernel's; before it are the grid, the stream and hooks


# The plans whose kernels Triton specialised; the grid and the arguments of each launch. Triton
# keeps a compiled kernel with the launcher that it had first: all tests share one.
LOG = SimpleNamespace(compiled=[], launched=[])


@pytest.fixture(autouse=True)
def log(tmp_path) -> Iterator[SimpleNamespace]:
    compile_kernel = Plan._compile

    def record(self: Plan, *args):
        LOG.compiled.append(self)
        return compile_kernel(self, *args)

    LOG.compiled.clear()
    LOG.launched.clear()
    launch.forget_launches()
    with (
        idle_gpu(tmp_path, lambda *args: LOG.launched.append((args[:3], args[FIRST:]))),
        patch.object(Plan, "_compile", record),
    ):
        yield LOG
    launch.forget_launches()


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("tiles", [None, TMA])
def test_a_kept_plan_passes_what_triton_passed(log, tiles):
    calls = [(meta(N, K), meta(N, N), alpha) for alpha in (1 / 3, 1 / 3, 2.0)]
    for x, c, alpha in calls:
        matmul_t.symmetric_matmul(x, x, "ieee", None, c, alpha, -2.0, out=c, tiles=tiles)
    assert len(log.compiled) == 1
    for (x, c, alpha), (grid, arguments) in zip(calls, log.launched, strict=True):
        assert list(map(id, arguments[:4])) == list(map(id, (x, x, c, c)))
        assert struct.pack("<4i", *arguments[4:8]) == struct.pack("<2d", alpha, -2.0)
        assert (grid, arguments[8:]) == (log.launched[0][0], log.launched[0][1][8:])


def test_another_layout_or_address_off_16_bytes_has_a_plan_of_its_own(log):
    """Triton assumes the alignment that the first call's tensors had, and the result that it was
    given."""
    room = torch.empty(N * N + 8, dtype=torch.bfloat16)
    aligned, off = room[: N * N].view(N, N), room[1 : 1 + N * N].view(N, N)
    assert aligned.data_ptr() % 16 == 0
    others = aligned[:32], aligned[:, :32], aligned.mT, aligned.half(), aligned[None], off
    for count, x in enumerate((aligned, *others), 1):
        for _ in range(2):
            matmul_t.symmetric_matmul(x, x, "ieee", None)
            assert len(log.compiled) == count
    for count, out in enumerate((aligned, off, torch.empty(N, N)), len(log.compiled) + 1):
        matmul_t.half_sum(aligned, None, out=out)
        assert len(log.compiled) == count


def test_operands_of_one_layout(log):
    """A plan for X·Xᵀ would not look at a copy of X. The stride of a batch of one does not matter
    to TMA."""
    x, context = meta(N, K), dict(copy_context())
    for a, b in ((x, x), (x, meta(N, K)), [meta(N, K).expand(3, N, K)[:1]] * 2):
        matmul_t.symmetric_matmul(a, b, "ieee", None, tiles=TMA)
    assert [plan.constants["SAME"] for plan in log.compiled] == [True, False, True]
    a_batch = 11  # after four tensors, two factors in two words each, batches, n and k
    assert [arguments[a_batch] for _, arguments in log.launched] == [N * K] * 3
    assert dict(copy_context()) == context, "the allocator that the user has set"


def test_all_launchers_keep_plans_until_they_are_forgotten(log):
    x, bias, out, wide = meta(N, N), meta(N), meta(N, N), meta(N, 8 * K)
    tall = meta(1000, N)
    for calls in (1, 2, 3):
        matmul_t.half_sum(x, None)
        matmul_t.mirror(x, None)
        linear_sigmoid.linear_sigmoid(x, x, bias, "ieee", None)
        linear_sigmoid.linear_sigmoid(wide, wide, bias, "ieee", None, tiles=SPLIT)
        sigmoid_backward.sigmoid_backward(x, x, out, None)
        maximum.maximum(x, x, out, None)
        maximum.maximum(x, x[0].expand(N, N), out, None)
        maximum.maximum_backward(x, x, x, out, out, None)
        maximum.maximum_backward(x, x, x, out, None, None)
        # Their sums take two launches.
        sigmoid_backward.sigmoid_backward(tall, tall, tall, None)
        maximum.maximum_backward(tall, tall, bias.expand(tall.shape), tall, bias, None)
        assert len(log.launched) == 14 * calls
        assert len(log.compiled) == (14 if calls < 3 else 28)
        if calls == 2:
            launch.forget_launches()


def test_a_launch_holds_what_the_driver_takes(log):
    """A launcher in another language could be written from the data of a `PreparedLaunch` alone."""
    x, c, bias, wide, tall = meta(N, N), meta(N, N), meta(N), meta(N, 8 * K), meta(1000, N)
    calls = [
        (matmul_t.matmul_t, (x, None, None, None), (x, "ieee", None), {}, 4),
        (
            matmul_t.symmetric_matmul,
            (x, None, c, None),
            (x, x, "ieee", None, c, 2.0, -1.0),
            {"tiles": TMA},
            4,
        ),
        (linear_sigmoid.linear_sigmoid, (x, x, None, None), (x, x, None, "ieee", None), {}, 0),
        (
            linear_sigmoid.linear_sigmoid,
            (wide, wide, bias, None),
            (wide, wide, bias, "ieee", None),
            {"tiles": SPLIT},
            0,
        ),
        (sigmoid_backward.sigmoid_backward, (tall, tall, None), (tall, tall, None, None), {}, 0),
        (maximum.new_maximum, (x, c), (x, c, torch.maximum), {}, 0),
    ]
    for launcher, operands, arguments, options, factors in calls:
        log.launched.clear()
        results = launcher(*arguments, **options)
        kept = list(launch._launches.values())[-1]
        assert len(kept.steps) == len(log.launched)
        tensors = dict(enumerate(operands))
        results = results if isinstance(results, tuple) else (results,)
        tensors |= dict(zip(kept.results, results, strict=True))
        for place, empty in enumerate(kept.empties, len(operands)):
            if place in tensors:
                assert (tensors[place].shape, tensors[place].dtype) == empty[:2]
        for (plan, places), (grid, given) in zip(kept.steps, log.launched, strict=True):
            assert grid == plan.grid
            for place, t in zip(places, given, strict=False):
                assert t is tensors.setdefault(place, t)
            numbers = given[len(places) :]
            assert numbers[factors:] == (*plan.arguments, *plan.constants.values())
            kinds = list(plan.compiled.src.signature.values())
            assert all(kind.startswith("*") for kind in kinds[: len(places)])
            assert all(kind in ("i32", "i64", "constexpr") for kind in kinds[len(places) :])
            assert len(kinds) == len(given)
            metadata = plan.compiled.metadata
            assert metadata.num_warps > 0
            assert metadata.shared >= 0
            assert plan.compiled.function


def test_plans_are_bounded(log):
    with patch.object(launch, "_MAX_LAUNCHES", 3):
        for n in range(16, 16 * 6, 16):
            matmul_t.half_sum(meta(n, n), None)
            assert len(launch._launches) <= 3


def programs_and_options(launcher, *args: Any, **options: Any) -> tuple[int, dict[str, Any]]:
    """The number of programs and the options of a launch that compiles nothing."""
    wrap = MagicMock()
    launcher(*args, wrap, **options)
    launched = wrap.return_value.__getitem__
    return launched.call_args.args[0][0], launched.return_value.call_args.kwargs


@pytest.mark.parametrize("launcher, bias", PRODUCTS)
def test_by_tma_as_many_programs_as_run_at_a_time(launcher, bias):
    """Two of 4 warps, or one of 8, on each of 132 multiprocessors. `ptx` rejects those that do
    nothing."""
    x = meta(4096, 64)
    for one, programs in ((TMA, 264), (Tiles(128, 128, 64, 8, 3, "tma"), 132)):
        assert programs_and_options(launcher, x, x, *bias, "ieee", tiles=one)[0] == programs


@pytest.mark.parametrize(
    "n, strides, symmetric, block",
    [
        (1152, (64, 1), False, (128, 64, 8)),
        (1024, (64, 1), False, (64, 32, 8)),  # 8 · 16 large tiles for 132 multiprocessors
        (1152, (1, 1152), False, (128, 64, 8)),
        (1088, (64, 1), True, (64, 64, 4)),
        (1088, (1, 1088), True, (64, 64, 8)),
        (1024, (64, 1), True, (32, 32, 4)),
        (1152, (66, 1), False, (64, 32, 8)),  # rows begin on 8 bytes
        (1152, (128, 2), False, (64, 32, 8)),  # neither rows nor columns are contiguous
    ],
)
def test_tiles_of_the_exact_product(n, strides, symmetric, block):
    a, b = (torch.empty_strided((n, 64), strides, device="meta") for _ in range(2))
    e, out = meta(n, dtype=torch.int32), meta(n, n, dtype=torch.float32)
    args = a, a if symmetric else b, e, e
    _, options = programs_and_options(exact_matmul.exact_product, *args, out=out)
    assert tuple(options[name] for name in ("BLOCK_M", "BLOCK_N", "num_warps")) == block


def test_launchers_refuse_what_their_kernels_cannot_take(log):
    x, e = meta(16, 5), meta(1, dtype=torch.int32)
    for launcher, bias in PRODUCTS:
        with pytest.raises(ValueError, match="expected the variant pointers"):
            launcher(x, x, *bias, "ieee", None, tiles=TMA)
    long = meta(1, 2**24, dtype=torch.float32)
    with pytest.raises(ValueError, match="at most 8388608 terms"):
        exact_matmul.exact_product(long, long, e, e, None, out=meta(1, 1, dtype=torch.float32))
    # Without terms nothing is launched. The other operators do not call their launchers.
    exact_matmul.exact_product(
        long[:, :0], long[:, :0], e, e, None, out=meta(1, 1, dtype=torch.float32)
    )
    assert not log.launched


# Graphs of the CUDA path: the kernels in them, what those write, and metadata of results


SIZES = {"b": 3, "m": 80, "n": 48, "k": 33, "l": 8192}


def trace(
    op,
    shapes: tuple[str, ...],
    dtype: torch.dtype = torch.float32,
    hints: dict[str, int] = SIZES,
    sizes: dict[str, Any] | None = None,
) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    """The graph of ``op`` on fake tensors with symbolic sizes, and what its fake returns.

    A tensor on "cuda" has a dimension for each letter of its shape; one without letters is on the
    CPU. ``sizes`` is filled with the symbolic sizes.
    """
    env = ShapeEnv()
    sizes = {} if sizes is None else sizes
    sizes["z"] = 0
    for letter, hint in hints.items():
        source = ConstantSource(letter)
        symbol = env.create_symbol(hint, source=source, dynamic_dim=DimDynamic.DYNAMIC)
        sizes[letter] = env.create_symintnode(symbol, hint=hint, source=source)

    def results(*args: Tensor) -> tuple[Tensor, ...]:
        result = op(*args)
        return result if isinstance(result, tuple) else (result,)

    with FakeTensorMode(shape_env=env):
        args = [
            torch.empty(
                [sizes[letter] for letter in shape], dtype=dtype, device="cuda" if shape else "cpu"
            )
            for shape in shapes
        ]
        return aot_export_joint_simple(results, args, trace_joint=False), results(*args)


def broken_guards(sizes: dict[str, Any], others: dict[str, int]) -> list[str]:
    """The guards of a trace with ``sizes`` that do not hold for others: PyTorch compiles again."""
    symbols = {sizes[letter].node.expr: size for letter, size in others.items()}
    guards = sizes["m"].node.shape_env.guards
    return [str(guard.expr) for guard in guards if not bool(guard.expr.subs(symbols))]


@pytest.mark.parametrize(
    "op, shapes",
    [
        (ops.maximum, ("mk", "k")),
        pytest.param(ops.maximum_backward, ("bmk", "bmk", "k"), marks=pytest.mark.slow),
        (ops.linear_sigmoid, ("bmk", "nk", "n")),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (ops.matmul_t, ("bmk",)),
                (ops.maximum_backward, ("mk", "mk", "m1")),
                (ops.maximum_backward, ("bmk", "bmk", "11k")),
                (ops.matmul_t_backward, ("bmm", "bmk")),
                (ops.linear_sigmoid_backward, ("bmn", "bmn")),
                (ops.exact_matmul, ("bmk", "bnk")),
            )
        ),
    ],
)
def test_a_graph_serves_all_sizes_whose_rows_are_aligned_alike(op, shapes, monkeypatch):
    monkeypatch.setattr(tiles, "library_is_faster", lambda *args, **options: False)
    # Products of float32 copy their operands, whose alignment depends on the number of rows.
    dtype = torch.float32 if op is ops.exact_matmul else torch.float64
    some = {"b": 2, "m": 5, "n": 7, "k": 3}
    for others in (
        {"b": 3, "m": 2, "n": 129, "k": 9},
        {"b": 40, "m": 6000, "n": 4095, "k": 513},
        # Sizes that happen to be equal.
        {"b": 9, "m": 9, "n": 9, "k": 9},
    ):
        for hints, later in ((some, others), (others, some)):
            sizes: dict[str, Any] = {"1": 1}
            trace(op, shapes, dtype, hints, sizes)
            assert broken_guards(sizes, later) == []
    if "k" in shapes[0] and op not in (ops.maximum, ops.maximum_backward, ops.matmul_t_backward):
        # Aligned rows have kernels of their own.
        trace(op, shapes, dtype, some, sizes)
        assert broken_guards(sizes, some | {"k": 512})


def launches(graph: fx.GraphModule) -> tuple[list[str], list[Any]]:
    """The names of the kernels in a graph, and the arguments of their launches."""
    launched = [node.kwargs for node in graph.graph.nodes if "kernel_idx" in node.kwargs]
    kernels = [kernel_side_table.get_kernel(one["kernel_idx"]).fn for one in launched]
    # Launch options make torch wrap a kernel in an Autotuner, whose `fn` is the kernel.
    return [getattr(kernel, "fn", kernel).__name__ for kernel in kernels], launched


ONE_GRADIENT = partial(ops.maximum_backward, need_b=False)


@pytest.mark.parametrize(
    "op, shapes, kernel, written",
    [
        (ops.maximum, ("mk", ""), "maximum_flat_kernel", ["out_ptr"]),
        (ops.maximum, ("mk", "k"), "maximum_strided_kernel", ["out_ptr"]),
        (
            ops.maximum_backward,
            ("mk", "mk", "mk"),
            "maximum_backward_flat_kernel",
            ["da_ptr", "db_ptr"],
        ),
        (ONE_GRADIENT, ("mk", "mk", "k"), "maximum_backward_strided_kernel", ["da_ptr"]),
        (
            ops.maximum_backward,
            ("bmk", "bmk", "k"),
            "maximum_backward_sums_kernel add_partial_sums_kernel",
            ["d_full_ptr", "sum_ptr"],
        ),
        (
            ops.maximum_backward,
            ("mk", "mk", ""),
            "maximum_backward_sums_kernel add_partial_sums_kernel",
            ["d_full_ptr", "sum_ptr"],
        ),
        (ops.matmul_t, ("bmk",), "symmetric_matmul_kernel", ["out_ptr"]),
        (ops.matmul_t_backward, ("bmm", "bmk"), "symmetric_sum_kernel", ["out_ptr"]),
        (ops.linear_sigmoid, ("bmk", "nk", "n"), "linear_sigmoid_kernel", ["out_ptr"]),
        (
            ops.linear_sigmoid_backward,
            ("bmn", "bmn"),
            "sigmoid_backward_kernel add_partial_sums_kernel",
            ["dz_ptr", "sum_ptr"],
        ),
    ],
)
def test_tracers_see_the_kernel_and_what_it_writes(op, shapes, kernel, written, monkeypatch):
    monkeypatch.setattr(tiles, "library_is_faster", lambda *args, **options: False)
    graph, fakes = trace(op, shapes)
    names, (arguments, *_) = launches(graph)
    assert (names, arguments["tensors_to_clone"]) == (kernel.split(), written)
    assert isinstance(arguments["grid"][0][0], fx.Node), (
        "the grid is fixed at the sizes it was traced with"
    )
    (outputs,) = graph.graph.find_nodes(op="output")[0].args
    for output, promised in zip(outputs, fakes, strict=True):
        assert metadata(output.meta["val"]) == metadata(promised)


def aten(graph: fx.GraphModule) -> list[str]:
    """The names of ATen's operators in a graph."""
    return [
        node.target.__name__.partition(".")[0]
        for node in graph.graph.nodes
        if "aten" in str(node.target)
    ]


@pytest.mark.parametrize(
    "op, shapes, small, without_columns",
    [
        # The library's product need not be symmetric: one kernel mirrors it.
        (ops.matmul_t, ("ml",), ["symmetric_sum_kernel"], {"symmetric_sum_kernel"}),
        (ops.linear_sigmoid, ("mk", "nk"), [], set()),
    ],
)
def test_launches_of_few_rows_of_float32_and_without_columns(op, shapes, small, without_columns):
    """The library multiplies what has no columns, for the kernels assume one, and few rows of
    float32."""
    graph, _ = trace(op, shapes)
    assert launches(graph)[0] == small
    assert "mm" in aten(graph)
    graph, _ = trace(op, tuple(shape[0] + "z" for shape in shapes))
    assert set(launches(graph)[0]) <= without_columns
    assert "mm" in aten(graph)


def test_a_large_float32_layer_is_the_librarys():
    graph, _ = trace(ops.linear_sigmoid, ("ll", "ll"))
    assert launches(graph)[0] == []
    assert {"mm", "sigmoid"} <= set(aten(graph))


def test_in_place_the_library_adds_and_mirrors(log, monkeypatch):
    """A float32 result of 16-bit operands is the kernel's at any size: PyTorch's products have one
    dtype."""
    from torchpar.ops.symmetric_matmul import _addmm_by_kernel

    for dtype in (torch.bfloat16, torch.float32):
        x, h = meta(N, K, dtype=dtype), meta(N, N, dtype=torch.float32)
        assert _addmm_by_kernel(h, x, x, 1.0, 2.0) is h
    names = [plan.kernel.fn.__name__ for plan in log.compiled]
    assert names == ["symmetric_matmul_kernel", "symmetric_sum_kernel"]


@pytest.mark.parametrize(
    "op, shapes, kernels, others",
    [
        ("linear_sigmoid", ((256, 32), (48, 32), (256, 48)), "sigmoid_backward", "mm mm"),
        (
            "linear_sigmoid",
            ((257, 32), (48, 32), (257, 48)),
            "sigmoid_backward add_partial_sums",
            "mm mm",
        ),
        ("maximum", ((64, 48), (64, 48)), "maximum_backward_flat", ""),
        ("maximum", ((48,), (64, 48)), "maximum_backward_sums", ""),
        ("maximum", ((64, 1), (64, 48)), "maximum_backward_sums", ""),
        pytest.param(
            *("maximum", ((1, 64, 48), (64, 48)), "maximum_backward_flat", ""),
            marks=pytest.mark.slow,
        ),
        ("maximum", ((1, 64, 1), (64, 48)), "maximum_backward_sums", ""),
        pytest.param(
            *("maximum", ((3, 1, 48), (3, 64, 48)), "maximum_backward_strided", "sum"),
            marks=pytest.mark.slow,
        ),
        ("maximum", ((3, 1, 8, 1), (1, 4, 1, 5)), "maximum_backward_strided", "sum sum"),
    ],
)
def test_the_whole_backward_launches_few_kernels(op, shapes, kernels, others):
    """Views and new tensors of ATen launch nothing."""
    module = import_module(f"torchpar.ops.{op}")

    def run(g: Tensor, *saved: Tensor) -> tuple[Tensor, ...]:
        needed = tuple(True for _ in inspect.signature(module._formula).parameters)
        ctx = SimpleNamespace(saved_tensors=saved, needs_input_grad=needed, precision=None)
        return module._backward(ctx, g)

    views = ("view", "t", "transpose", "permute", "expand", "_assert_tensor_metadata", "detach")
    with FakeTensorMode():
        saved = [torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes]
        g = saved[-1] if op == "linear_sigmoid" else torch.maximum(*saved)
        for gradient in (g, g.flatten()[0].expand_as(g)):
            graph = aot_export_joint_simple(run, [gradient, *saved], trace_joint=False)
            assert launches(graph)[0] == [f"{kernel}_kernel" for kernel in kernels.split()]
            launching = [name for name in aten(graph) if name not in views and "empty" not in name]
            assert sorted(launching) == others.split()


def test_the_backward_of_symbolic_rows_sums_any_number():
    """AOTInductor would not check that they are few."""
    for op, shapes in (
        (ops.linear_sigmoid_backward, ("mn", "mn")),
        (ops.maximum_backward, ("mn", "mn", "n")),
    ):
        graph, _ = trace(op, shapes)
        assert "add_partial_sums_kernel" in launches(graph)[0]


@pytest.mark.parametrize(
    "m, n, dtype, programs",
    [
        (64, 4096, torch.float32, 512),
        (128, 128, torch.float32, 16),  # of the columns of a sector
        (129, 127, torch.bfloat16, 8),
        (8192, 128, torch.bfloat16, 342),
        (8192, 4096, torch.bfloat16, 1088),
        (300, 20000, torch.float32, 1252),
        (1, 1, torch.float64, 1),
    ],
)
def test_programs_that_sum_rows(m, n, dtype, programs):
    """At least two for each of 132 multiprocessors, where each thread then has an access."""
    x, row = meta(m, n, dtype=dtype), meta(n, dtype=dtype)
    for launcher, *args in (
        (sigmoid_backward.sigmoid_backward, x, x, x),
        (maximum.maximum_backward, x, x, row.expand(m, n), x, row),
    ):
        wrap = MagicMock()
        launcher(*args, wrap)
        grids = [call.args[0] for call in wrap.return_value.__getitem__.call_args_list]
        assert grids[0][0] == programs
        assert len(grids) == (1 if m <= 256 else 2)


@pytest.mark.parametrize(
    "m, n, programs, launched",
    [
        (64, 4096, 64, 1),
        (64, 4097, 576, 2),
        (8192, 16, 256, 1),
        (1, 2**18, 512, 2),
        (4096, 4096, 4096, 1),
    ],
)
def test_programs_that_sum_columns(m, n, programs, launched):
    x, column = (meta(*shape, dtype=torch.float32) for shape in ((m, n), (m, 1)))
    wrap = MagicMock()
    maximum.maximum_backward(x, x, column.expand(m, n), x, column, wrap)
    grids = [call.args[0] for call in wrap.return_value.__getitem__.call_args_list]
    assert (grids[0][0], len(grids)) == (programs, launched)


def test_float16_gradients_take_two_products():
    """Half of a small one would lose bits, and the sum of two large ones would overflow."""
    graph, _ = trace(ops.matmul_t_backward, ("mm", "mk"), torch.float16)
    assert aten(graph).count("mm") == 2
    assert launches(graph) == ([], [])


@pytest.mark.parametrize(
    "cpp_wrapper, expected",
    [
        pytest.param(False, "symmetric_matmul_tma_kernel", marks=pytest.mark.slow),
        (True, "symmetric_matmul_kernel"),
    ],
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
        compile_fx(
            fx.symbolic_trace(lambda x: (ops.matmul_t(x),)), [x], stop, {"cpp_wrapper": cpp_wrapper}
        )
    assert launches(graphs[0])[0] == [expected]
