# SPDX-License-Identifier: MIT
"""The compiled operators: one graph for all sizes, transforms, and decomposed programs.

`test_our_operators.py` compiles and exports each at one size.
"""

import logging
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from samples import LAYOUTS, assert_symmetric, normal, widest_arguments
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.func import grad, jvp, vmap
from torch.testing import assert_close

import torchpar
from benchmarks.records import OPERATORS, by_dtype
from benchmarks.records.record import FLOATS

# Of PyTorch's own compiler, and of its own export (2.11).
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # pytest would keep all log records of the compiler, which takes as long as compiling.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
    torch._dynamo.reset()
    # No pool of processes for three small kernels.
    with torch._inductor.config.patch(compile_threads=1):
        yield
    torch._dynamo.reset()


# Inductor compiles C++ for ten seconds. By default only
# tests/testing/operators/test_check_operator.py compiles an operator by it.
BACKENDS = [
    pytest.param("aot_eager", "matmul_t", marks=pytest.mark.slow),
    ("aot_eager", "linear_sigmoid"),
    *(pytest.param("inductor", name, marks=pytest.mark.slow) for name in OPERATORS),
]


@pytest.mark.parametrize("backend, name", BACKENDS)
def test_compiled_once_for_all_sizes(backend: str, name: str, device: str) -> None:
    counter = CompileCounterWithBackend(backend)
    operator = OPERATORS[name]
    compiled = torch.compile(operator.overload, fullgraph=True, dynamic=True, backend=counter)

    def op(*args: Tensor) -> Tensor:
        return compiled(*operator.operands(*args), **operator.factors(len(args)))

    for n, m, k in ((5, 2, 7), (4, 3, 9), (17, 6, 2), (40, 4, 129), (300, 4, 3), (600, 5, 9)):
        shapes = operator.sized({"n": n, "m": m, "k": k, "o": n + 1})
        args = widest_arguments(name, shapes, device, requires_grad=True)
        actual, expected = op(*args), operator.plain(*args)
        assert_close(actual, expected)
        assert actual.stride() == expected.stride()
        if operator.symmetric:
            assert_symmetric(actual)
        incoming = LAYOUTS["permuted"](normal(*actual.shape, device=device, seed=9).to(actual))
        assert_close(*(torch.autograd.grad(y, args, incoming) for y in (actual, expected)))
    # PyTorch compiles again for a float constant; on a CPU for symmetric products in blocks, from
    # 384 rows on; on a GPU for k = 2, since aligned rows have kernels of their own.
    products = ["matmul_t", "symmetric_matmul"] + ["linear_sigmoid"] * (device == "cuda")
    again = bool(operator.factors(3)) + (name in products)
    assert counter.frame_count <= 1 + again


COMPILED_TRANSFORMS = {
    "vmap(grad)": lambda op: vmap(grad(lambda *args: op(*args).pow(3).sum())),
    "jvp": lambda op: lambda *args: jvp(op, args, args)[1],
}


@pytest.mark.parametrize("transform", COMPILED_TRANSFORMS)
@pytest.mark.parametrize(
    "name",
    [
        # They are like `matmul_t` and `linear_sigmoid`.
        pytest.param(name, marks=[pytest.mark.slow] * name.startswith(("exact", "symmetric")))
        for name in OPERATORS
    ],
)
def test_compiled_transforms(name: str, transform: str, device: str) -> None:
    operator, transformed = OPERATORS[name], COMPILED_TRANSFORMS[transform]
    shapes = tuple(
        (2, *shape) if transform == "vmap(grad)" else shape for shape in operator.small[0]
    )
    args = widest_arguments(name, shapes, device)
    compiled = torch.compile(transformed(operator.op), fullgraph=True, backend="aot_eager")
    assert_close(compiled(*args), transformed(operator.plain)(*args))


def graph_as_it_is(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    return graph


def weighted(name: str, *args: Tensor) -> Tensor:
    y = OPERATORS[name].op(*args)
    return (y * torch.arange(1, y.numel() + 1, device=y.device).view(y.shape)).sum()


@pytest.mark.parametrize(
    "name, dtype",
    [
        pytest.param(name, dtype, marks=[pytest.mark.slow] * (dtype != torch.float32))
        for name, dtype in by_dtype()
        if dtype in FLOATS
    ],
)
def test_compiled_autograd_has_the_bits_of_eager(
    name: str, dtype: torch.dtype, device: str
) -> None:
    for shapes in OPERATORS[name].small:
        args = [t.to(dtype).requires_grad_() for t in widest_arguments(name, shapes, device)]
        expected = torch.autograd.grad(weighted(name, *args), args)
        loss = weighted(name, *args)
        with torch._dynamo.compiled_autograd._enable(graph_as_it_is):
            loss.backward()
        for arg, gradient in zip(args, expected, strict=True):
            assert_close(arg.grad, gradient, rtol=0, atol=0)


LONG = [("aot_eager", False), ("aot_eager", True), ("inductor", True)]


@pytest.mark.parametrize(
    "backend, compiles_forward, name",
    [
        ("aot_eager", False, "matmul_t"),
        pytest.param("eager", False, "linear_sigmoid", marks=pytest.mark.slow),
        *(
            pytest.param(backend, compiles_forward, name, marks=pytest.mark.slow)
            for backend, compiles_forward in LONG
            for name in OPERATORS
            if (backend, compiles_forward, name) != ("aot_eager", False, "matmul_t")
        ),
    ],
)
def test_compiled_autograd_of_a_compiler(
    backend: str, compiles_forward: bool, name: str, device: str
) -> None:
    args = widest_arguments(name, OPERATORS[name].small[0], device, requires_grad=True)
    expected = torch.autograd.grad(weighted(name, *args), args)
    function = partial(weighted, name)
    compiled = partial(torch.compile, backend=backend, fullgraph=True)
    with torch._dynamo.compiled_autograd._enable(compiled):
        (compiled(function) if compiles_forward else function)(*args).backward()
    for arg, gradient in zip(args, expected, strict=True):
        assert_close(arg.grad, gradient)


class Module(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torchpar.matmul_t(x)


def test_a_decomposed_program_takes_odd_and_even_sizes() -> None:
    # On a CPU rows of 16-bit floats are completed to an even length.
    program = torch.export.export(
        Module(), (torch.ones(6, 4, dtype=torch.bfloat16),), dynamic_shapes=({1: Dim("k", min=2)},)
    ).run_decompositions(decompose_custom_triton_ops=True)
    for k in (4, 5, 7):
        assert program.module()(torch.ones(6, k, dtype=torch.bfloat16)).eq(k).all()
