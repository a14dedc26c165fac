# SPDX-License-Identifier: MIT
"""The operators under torch.compile, torch.export, autocast and the grad modes."""

import io
import logging
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from operators import OPERATORS, Shapes
from samples import (
    LAYOUTS,
    arguments,
    assert_accurate,
    assert_symmetric,
    halves,
    metadata,
    normal,
    oracle,
    widest_arguments,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.func import grad, jvp, vmap
from torch.testing import assert_close

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
    with torch._inductor.config.patch(compile_threads=1):  # no pool of processes for three small kernels
        yield
    torch._dynamo.reset()


def sized(name: str, n: int, m: int, k: int) -> Shapes:
    return OPERATORS[name].sized({"n": n, "m": m, "k": k, "o": n + 1})


def check(name: str, compiled: Callable[..., Tensor], args: tuple[Tensor, ...]) -> None:
    actual, expected = compiled(*args), OPERATORS[name].plain(*args)
    assert_close(actual, expected)
    assert actual.stride() == expected.stride()
    if OPERATORS[name].symmetric:
        assert_symmetric(actual)
    required = [arg for arg in args if arg.requires_grad]
    if required:
        g = normal(*actual.shape, device=actual.device.type, seed=9).to(actual)
        for incoming in (g, LAYOUTS["permuted"](g)):
            actual, expected = compiled(*args), OPERATORS[name].plain(*args)
            assert_close(
                torch.autograd.grad(actual, required, incoming),
                torch.autograd.grad(expected, required, incoming),
            )


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("matmul_t", "linear_sigmoid") else pytest.param(name, marks=pytest.mark.slow)
        for name in OPERATORS
    ],
)
def test_compiled_once_for_all_sizes(name: str, device: str) -> None:
    counter = CompileCounterWithBackend("inductor")
    operator = OPERATORS[name]
    compiled = torch.compile(operator.overload, fullgraph=True, dynamic=True, backend=counter)

    def op(*args: Tensor) -> Tensor:
        return compiled(*operator.operands(*args), **operator.factors(len(args)))

    for n, m, k in ((5, 2, 7), (4, 3, 9), (17, 6, 2), (40, 4, 129), (300, 4, 3), (600, 5, 9)):
        check(name, op, widest_arguments(name, sized(name, n, m, k), device, requires_grad=True))
    # PyTorch compiles again for a float constant, and for symmetric products in blocks, from 256 rows on.
    again = bool(operator.factors(3)) + (name in ("matmul_t", "symmetric_matmul"))
    assert counter.frame_count <= 1 + again


@pytest.mark.parametrize("name", OPERATORS)
def test_compiled_in_low_precision_without_gradient(name: str, device: str) -> None:
    operator = OPERATORS[name]
    compiled = torch.compile(operator.function, fullgraph=True)
    args = operator.operands(*arguments(sized(name, 33, 2, 16), operator.low, device))
    factors = operator.factors(len(args))
    strided = tuple(LAYOUTS["transposed"](arg) for arg in args)
    for some in (args, strided):
        actual, eager = compiled(*some, **factors), operator.function(*some, **factors)
        assert_accurate(actual, eager, oracle(name, some, **factors), operator.roundings + 2 * bool(factors))
        assert metadata(actual) == metadata(eager)


COMPILED_TRANSFORMS = {
    "vmap(grad)": lambda op: vmap(grad(lambda *args: op(*args).pow(3).sum())),
    "jvp": lambda op: lambda *args: jvp(op, args, args)[1],
}


@pytest.mark.parametrize("transform", COMPILED_TRANSFORMS)
@pytest.mark.parametrize("name", OPERATORS)
def test_compiled_transforms(name: str, transform: str, device: str) -> None:
    operator, transformed = OPERATORS[name], COMPILED_TRANSFORMS[transform]
    shapes = tuple((2, *shape) if transform == "vmap(grad)" else shape for shape in operator.small[0])
    args = widest_arguments(name, shapes, device)
    compiled = torch.compile(transformed(operator.op), fullgraph=True, backend="aot_eager")
    assert_close(compiled(*args), transformed(operator.plain)(*args))


class Module(torch.nn.Module):
    def __init__(self, name: str):
        super().__init__()
        self.operator = OPERATORS[name]

    def forward(self, *args: Tensor) -> Tensor:
        return self.operator.function(*args, **self.operator.factors(len(args)))


@pytest.mark.parametrize("name", OPERATORS)
def test_export(name: str, device: str) -> None:
    operator = OPERATORS[name]
    sizes = operator.sized({letter: Dim(letter, min=2) for letter in "nmko"})
    dims = tuple({i: size for i, size in enumerate(shape) if size != 1} for shape in sizes)

    def operands(n: int, m: int, k: int) -> tuple[Tensor, ...]:
        return operator.operands(*widest_arguments(name, sized(name, n, m, k), device))

    exported = torch.export.export(Module(name), operands(5, 3, 4), dynamic_shapes={"args": dims})
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file)
    for program in (exported, loaded, loaded.run_decompositions()):
        (node,) = [node for node in program.graph.nodes if node.op == "call_function"]
        assert (node.target, dict(node.kwargs)) == (operator.overload, operator.factors(len(dims)))
        for sizes in ((5, 3, 4), (600, 2, 3)):
            args = operands(*sizes)
            assert_close(program.module()(*args), operator.native(*args, **operator.factors(len(dims))))


def test_a_decomposed_program_takes_odd_and_even_sizes() -> None:
    # On a CPU rows of 16-bit floats are completed to an even length.
    program = torch.export.export(
        Module("matmul_t"),
        (torch.ones(6, 4, dtype=torch.bfloat16),),
        dynamic_shapes={"args": ({1: Dim("k", min=2)},)},
    ).run_decompositions(decompose_custom_triton_ops=True)
    for k in (4, 5, 7):
        assert program.module()(torch.ones(6, k, dtype=torch.bfloat16)).eq(k).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_autocast(name: str, dtype: torch.dtype, device: str) -> None:
    operator, shapes = OPERATORS[name], OPERATORS[name].small[0]
    args = [t.detach() for t in operator.operands(*arguments(shapes, torch.float32, device, make=halves))]
    args = [t.requires_grad_() for t in args]
    op, native = (partial(f, **operator.factors(len(args))) for f in (operator.function, operator.native))
    wide = [arg.detach().double().requires_grad_() for arg in args]
    exact = native(*wide).double()
    with torch.autocast(device, dtype):
        actual, theirs = op(*args), native(*args)
        assert actual.dtype == theirs.dtype
        if operator.widest == torch.float64:
            assert op(*wide).dtype == torch.float64
        # Operands of different dtypes are cast to one.
        assert op(args[0].to(dtype), *args[1:]).dtype == native(args[0].to(dtype), *args[1:]).dtype
        with torch.autocast(device, enabled=False):
            assert op(*args).dtype == torch.float32
        batched = vmap(op)(*(arg.unsqueeze(0) for arg in args))
    assert op(*args).dtype == torch.float32
    assert batched.dtype == actual.dtype
    rounding = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    assert_close(actual.double(), exact, **rounding)
    assert_close(batched[0].double(), exact, **rounding)
    found = torch.autograd.grad(actual.float().sum(), args)
    assert [g.dtype for g in found] == [torch.float32] * len(args)
    expected = torch.autograd.grad(exact.sum(), wide)
    # The sigmoid, its slope and the sum of at most four products of a factor of at most 1 are rounded.
    rounding = {"rtol": 1.5 * torch.finfo(dtype).eps, "atol": 1.5 * torch.finfo(dtype).eps}
    assert_close([g.double() for g in found], list(expected), **rounding)
