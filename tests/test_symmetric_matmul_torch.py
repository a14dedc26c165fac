# SPDX-License-Identifier: MIT
"""symmetric_matmul under autograd, torch.func, torch.compile, torch.export and autocast."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from samples import LAYOUTS, assert_symmetric, metadata, normal
from test_operators_func import TRANSFORMS
from test_symmetric_matmul import formula, op, operands
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck
from torch.export import Dim
from torch.func import vmap
from torch.library import opcheck
from torch.testing import assert_close

import torchpar

# Of PyTorch's own compiler, and of its own export (2.11).
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec"),
]

scaled = {"alpha": -2.5, "beta": 1 / 3}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def leaves(*shape: int, **kwargs: Any) -> tuple[Tensor, ...]:
    return tuple(t.requires_grad_() for t in operands(*shape, make=normal, **kwargs))


def plain(a: Tensor, b: Tensor, c: Tensor | None = None, *, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    return alpha * a @ b.mT if c is None else alpha * a @ b.mT + beta * c


def of_one_matrix(product: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    """A function of any matrix in whose every direction the promise is kept."""

    def function(s: Tensor) -> Tensor:
        s = s + s.mT
        return product(s @ s - s, s, s / 4, **scaled)

    return function


@pytest.mark.parametrize("shape", [(3, 3), (2, 3, 3)], ids=str)
def test_gradcheck_along_a_kept_promise(shape: tuple[int, ...], device: str) -> None:
    args = (normal(*shape, device=device).requires_grad_(),)
    function = of_one_matrix(op)
    assert gradcheck(function, args, check_batched_grad=True, check_forward_ad=True)
    assert gradgradcheck(function, args, gen_non_contig_grad_outputs=True, check_batched_grad=True)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("shape", [(3, 3), (2, 3, 3)], ids=str)
def test_transforms(shape: tuple[int, ...], transform: str, device: str) -> None:
    args = (normal(*shape, device=device),)
    expected = TRANSFORMS[transform](of_one_matrix(plain), args)
    assert_close(TRANSFORMS[transform](of_one_matrix(op), args), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(4, 3), (2, 4, 3), (300, 3)], ids=str)
def test_any_layout_of_the_incoming_gradient(shape: tuple[int, ...], layout: str, device: str) -> None:
    args = leaves(*shape, device=device)
    incoming = LAYOUTS[layout](normal(*shape[:-1], shape[-2], device=device, seed=9))
    for factors in (scaled, {"beta": 0.0}, {}):
        actual = torch.autograd.grad(op(*args, **factors), args, incoming)
        assert_close(actual, torch.autograd.grad(formula(*args, **factors), args, incoming.clone()))


@pytest.mark.parametrize("required", [*itertools.product([False, True], repeat=3)], ids=str)
def test_any_subset_of_arguments_requires_grad(required: tuple[bool, ...], device: str) -> None:
    args = [t.detach().requires_grad_(r) for t, r in zip(leaves(4, 3, device=device), required, strict=True)]
    some = [t for t in args if t.requires_grad]
    for count in (2, 3):
        y = op(*args[:count], **scaled)
        assert y.requires_grad == any(required[:count])
        needed = [t for t in args[:count] if t.requires_grad]
        if needed:
            incoming = normal(4, 4, device=device, seed=9)
            expected = torch.autograd.grad(plain(*args[:count], **scaled), needed, incoming)
            assert_close(torch.autograd.grad(y, needed, incoming), expected)
    y = torchpar.symmetric_matmul(a=args[0], b=args[1], c=args[2], alpha=3)  # by name
    if some:
        y.sum().backward()
    assert [t.grad is not None for t in args] == list(required)


IN_DIMS = [(0, 0), (1, 2), (0, None), (None, -1), (0, 0, 0), (1, -1, 2), (0, None, None), (None, 0, 1)]
IN_DIMS += [(None, None, -3), (2, 2, None), (1, 0, 1)]


@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
@pytest.mark.parametrize("shape", [(4, 3), (2, 4, 3), (260, 3)], ids=str)
def test_vmap(shape: tuple[int, ...], in_dims: tuple[int | None, ...], device: str) -> None:
    # Each sample of a batch is a multiple of one, so that the promise is kept whatever meets whatever.
    args = tuple(
        t if dim is None else torch.stack([t, -2 * t, t / 4], dim).detach().requires_grad_()
        for t, dim in zip(leaves(*shape, device=device), in_dims, strict=False)
    )
    actual = vmap(lambda *t: op(*t, **scaled), in_dims)(*args)
    expected = vmap(lambda *t: plain(*t, **scaled), in_dims)(*args)
    assert_close(actual, expected)
    assert_symmetric(actual)
    assert_close(vmap(op, in_dims)(*args), vmap(plain, in_dims)(*args))
    if len(in_dims) == 2:
        assert_close(vmap(lambda a, b: op(a, b, None, **scaled), in_dims)(*args), expected)
    incoming = normal(*actual.shape, device=device, seed=9)
    assert_close(torch.autograd.grad(actual, args, incoming), torch.autograd.grad(expected, args, incoming))


@pytest.mark.parametrize("kwargs", [{}, scaled, {"check": True}, {**scaled, "check": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_opcheck(dtype: torch.dtype, kwargs: dict[str, Any], device: str) -> None:
    for shape in ((4, 3), (2, 4, 3), (257, 2)):
        a, b, c = leaves(*shape, dtype=dtype, device=device)
        for args in ((a, b), (a, b, c), tuple(LAYOUTS["stepped"](t.detach()) for t in (a, b, c))):
            opcheck(op, args, kwargs)
    opcheck(op, (a, b, None), kwargs)


@pytest.mark.parametrize(
    "backend, with_c, sizes",
    [
        ("inductor", True, (5, 40)),
        *[("aot_eager", with_c, (7, 255, 256, 257, 600, 5)) for with_c in (False, True)],
    ],
    ids=str,
)
def test_compiled_once_on_each_side_of_the_blocked_path(
    backend: str, with_c: bool, sizes: tuple[int, ...], device: str
) -> None:
    counter = CompileCounterWithBackend(backend)

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def compiled(*args: Tensor) -> Tensor:
        return torchpar.symmetric_matmul(*args, **scaled)

    counts = []
    for n in sizes:
        args = leaves(n, 3, device=device)[: 2 + with_c]
        actual, expected = compiled(*args), formula(*args, **scaled)
        assert_close(actual, expected)
        assert_symmetric(actual)
        assert metadata(actual) == metadata(expected)
        incoming = normal(n, n, device=device, seed=9)
        assert_close(
            torch.autograd.grad(actual, args, incoming), torch.autograd.grad(expected, args, incoming)
        )
        counts.append(counter.frame_count)
    assert counts[-1] - counts[0] <= 1  # PyTorch begins the first one anew for a float constant


def test_compiled_with_the_check(device: str) -> None:
    compiled = torch.compile(lambda a, b: op(a, b, check=True), fullgraph=True, backend="aot_eager")
    for n in (5, 300):
        a, b, _ = operands(n, 3, device=device)
        assert_close(compiled(a, b), a @ b.mT)
        with pytest.raises(RuntimeError, match=r"torchpar::symmetric_matmul: a @ b\.mT is not symmetric"):
            compiled(a, b.flip(0))


class Module(torch.nn.Module):
    def forward(self, *args: Tensor) -> Tensor:
        return torchpar.symmetric_matmul(*args, **scaled)


@pytest.mark.parametrize("with_c", [False, True])
def test_export(with_c: bool, device: str) -> None:
    n, k = Dim("n", min=2), Dim("k", min=2)
    dims = ({0: n, 1: k}, {0: n, 1: k}, {0: n, 1: n})[: 2 + with_c]
    exported = torch.export.export(
        Module(), operands(5, 3, device=device)[: 2 + with_c], dynamic_shapes={"args": dims}
    )
    for program in (exported, exported.run_decompositions()):
        (node,) = [node for node in program.graph.nodes if node.op == "call_function"]
        assert (node.target, dict(node.kwargs)) == (op, scaled)
        for shape in ((5, 3), (300, 4)):
            args = operands(*shape, device=device)[: 2 + with_c]
            assert_close(program.module()(*args), plain(*args, **scaled))


def test_autocast(device: str) -> None:
    a, b, c = args = leaves(4, 3, dtype=torch.float32, device=device)
    with torch.autocast(device, torch.bfloat16):
        actual = torchpar.symmetric_matmul(a, b.bfloat16(), c=c, **scaled)
        assert op(a.double(), b.double()).dtype == torch.float64
        assert op(a, b, check=True).dtype == torch.bfloat16
    assert actual.dtype == torch.bfloat16
    lowered = [t.bfloat16() for t in args]
    assert torch.equal(actual, op(*lowered, **scaled))
    assert op(*args).dtype == torch.float32
    actual = torch.autograd.grad(actual.float().sum(), args)
    assert [g.dtype for g in actual] == [torch.float32] * 3
    assert_close(actual, torch.autograd.grad(plain(*args, **scaled).sum(), args), rtol=0.02, atol=0.02)
