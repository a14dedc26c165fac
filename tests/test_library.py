# SPDX-License-Identifier: MIT
"""`torchpar.library` in place of `torch.library`: signatures, methods, errors, and ways to call."""

import inspect
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import torchpar
from torchpar.library import CustomOpDef

NAMES = (f"library_tests::op{i}" for i in count())


def double(x: Tensor) -> Tensor:
    return 2 * x


def make(function: Any = double, mutates_args: Any = (), **how: Any) -> CustomOpDef:
    return torchpar.library.custom_op(next(NAMES), function, mutates_args=mutates_args, **how)


def axpy(x: Tensor, y: Tensor, *, scale: float = 2.0) -> Tensor:
    return scale * x + y.sin()


@pytest.fixture(scope="module")
def op() -> CustomOpDef:
    op = make(axpy)

    def setup_context(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.scale = keyword_only_inputs["scale"]

    op.register_fake(lambda x, y, scale=2.0: torch.empty_like(x))
    op.register_autograd(
        lambda ctx, g: (g * ctx.scale, g * ctx.saved_tensors[0].cos()), setup_context=setup_context
    )
    op.register_vmap(lambda info, in_dims, x, y, scale=2.0: (op(x, y, scale=scale), 0))
    return op


X, Y = (torch.linspace(start, start + 1, 4, dtype=torch.float64) for start in (0, 2))


def test_everything_takes_what_pytorchs_takes() -> None:
    pairs = [(getattr(torchpar.library, f), getattr(torch.library, f)) for f in ("custom_op", "triton_op")]
    methods = inspect.getmembers(torch.library.CustomOpDef, inspect.isfunction)
    pairs += [(getattr(CustomOpDef, name), f) for name, f in methods if not name.startswith("_")]
    assert len(pairs) > 9
    for ours, theirs in pairs:
        own, expected = (inspect.signature(f).parameters.values() for f in (ours, theirs))
        for select in (lambda p: p.kind is p.KEYWORD_ONLY, lambda p: p.kind is not p.KEYWORD_ONLY):
            mine, wanted = (list(filter(select, parameters)) for parameters in (own, expected))
            assert len(mine) >= len(wanted), theirs
            assert sum(p.default is p.empty for p in mine) <= sum(p.default is p.empty for p in wanted)
        keywords = [{p.name for p in ps if p.kind is p.KEYWORD_ONLY} for ps in (expected, own)]
        assert keywords[0] <= keywords[1], theirs


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # in opcheck
def test_functions_of_torch_library_take_the_object() -> None:
    op = make(tags=torch.Tag.core)
    assert torch.Tag.core in op._opoverload.tags
    torch.library.register_fake(op, torch.empty_like)
    torch.library.register_autograd(op, lambda ctx, g: 2 * g)
    torch.library.register_vmap(op, lambda info, in_dims, x: (op(x), in_dims[0]))
    torch.library.register_autocast(op, "cpu", torch.float16)
    torch.library.opcheck(op, (X.clone().requires_grad_(),))
    with torch.autocast("cpu"):
        assert op(X.float()).dtype == torch.float16
    assert_close(torch.func.vmap(op)(X[None]), 2 * X[None])


CALLS = [
    lambda f, x: f(x, Y),
    lambda f, x: f(y=Y, x=x, scale=3.0),
    lambda f, x: f(x, f(x, Y)),
]


@pytest.mark.parametrize("call", CALLS)
def test_gradients_of_calls_by_position_and_by_name(op: CustomOpDef, call: Any) -> None:
    seen = []
    for f in (op, op._opoverload, axpy):
        x = X.clone().requires_grad_()
        y = call(f, x)
        basis = torch.eye(4, dtype=X.dtype)
        (rows,) = torch.autograd.grad(y, x, basis, is_grads_batched=True, retain_graph=True)
        seen.append((y.detach(), torch.autograd.grad(y.sum(), x)[0], rows))
    assert_close(seen[0], seen[2])
    assert_close(seen[1], seen[2])


def test_autocast_in_the_dtype_that_is_asked_for(op: CustomOpDef) -> None:
    op.register_autocast()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert op(X.float(), Y.float()).dtype == dtype
            assert op(X, Y).dtype == torch.float64


def test_lists_of_tensors() -> None:
    op = make(lambda ts, w: sum(ts) * w, schema="(Tensor[] ts, Tensor w) -> Tensor")

    def backward(ctx: Any, g: Tensor) -> tuple[list[Tensor], Tensor]:
        *ts, w = ctx.saved_tensors
        assert ctx.needs_input_grad == ([True, False], True)
        return [g * w, None], (g * sum(ts)).sum()

    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[0], inputs[1])

    op.register_autograd(backward, setup_context=setup_context)
    x, w = X.clone().requires_grad_(), torch.tensor(3.0, dtype=X.dtype, requires_grad=True)
    assert_close(torch.autograd.grad(op([x, Y], w).sum(), (x, w)), (torch.full_like(X, 3), (X + Y).sum()))


@pytest.mark.parametrize("saved", [None, (), (None, X)])
def test_derivatives_that_save_nothing_or_none(saved: Any) -> None:
    op = make()
    setup_context = None if saved is None else lambda ctx, inputs, output: ctx.save_for_backward(*saved)
    op.register_autograd(lambda ctx, g: 2 * g, setup_context=setup_context)
    assert_close(torch.func.jvp(op, (X,), (Y,)), (2 * X, 2 * Y))
    assert_close(torch.func.grad(lambda x: op(x).sum())(X), torch.full_like(X, 2))


def test_results_without_a_derivative() -> None:
    op = make(lambda x: (2 * x, x.sign(), x.argsort()), schema="(Tensor x) -> (Tensor, Tensor, Tensor)")
    op.register_autograd(
        lambda ctx, g, *_: 2 * g,
        setup_context=lambda ctx, inputs, output: ctx.mark_non_differentiable(output[1]),
    )
    zeros = torch.zeros_like(X), torch.zeros_like(X, dtype=torch.int64)
    assert_close(torch.func.jvp(op, (X,), (Y,))[1], (2 * Y, *zeros))
    indices = make(lambda x: x.argsort(), schema="(Tensor x) -> Tensor")  # needs no backward
    assert_close(torch.func.jvp(lambda x: x * indices(x), (X,), (Y,))[1], Y * X.argsort())


def test_gradients_that_are_none_and_gradients_that_forward_mode_cannot_use() -> None:
    op = make(lambda x, y: x + y.sign(), schema="(Tensor x, Tensor y) -> Tensor")
    op.register_autograd(lambda ctx, g: (g, None))
    for f, expected in ((lambda x: op(x, x), Y), (lambda y: op(X, y), torch.zeros_like(X))):
        assert_close(torch.func.jvp(f, (X,), (Y,))[1], expected)
    op.register_autograd(lambda ctx, g: (g.detach() * 1, None))
    with pytest.raises(RuntimeError, match="cannot differentiate; return None for 0"):
        torch.func.jvp(lambda x: op(x, X), (X,), (Y,))  # which must not be 0


def test_an_operator_that_writes() -> None:
    def add_one(ts: list[Tensor], out: Tensor | None = None) -> None:
        for t in (*ts, *[out][: out is not None]):
            t.add_(1)

    op = make(add_one, mutates_args={"ts", "out"})
    tensors = [torch.zeros(2) for _ in range(3)]
    versions = [t._version for t in tensors]
    op(tensors[:2], tensors[2])
    op(tensors[:2])
    assert [t.tolist() for t in tensors] == [[2, 2], [2, 2], [1, 1]]
    assert all(t._version > version for t, version in zip(tensors, versions, strict=True))
    with pytest.raises(ValueError, match="writes to an argument and cannot have a gradient"):
        op.register_autograd(lambda ctx: None)
    with pytest.raises(RuntimeError, match="has no gradient"):
        op([X.clone().requires_grad_()])


def test_kernels_for_devices() -> None:
    op = make(device_types="cpu")
    op.register_fake(torch.empty_like)
    assert_close(op(X), 2 * X)
    assert op(X.to("meta")).is_meta
    op.register_kernel("cpu")(lambda x: 3 * x)
    assert_close((op(X), op._opoverload(X)), (3 * X, 3 * X))
    again = torchpar.library.custom_op(op._qualname, double, mutates_args=())  # as in a notebook
    assert_close(again(X), 2 * X)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap without a rule
def test_errors() -> None:
    op = make()
    x = X.clone().requires_grad_()
    with pytest.raises(ValueError, match="expected 'namespace::name'"):
        torchpar.library.custom_op("name", double, mutates_args=())
    with pytest.raises(RuntimeError, match="has no backward"):
        op(x).sum().backward()
    with pytest.raises(RuntimeError, match="has no backward"):
        torch.func.jvp(op, (X,), (X,))  # by PyTorch's decorator it is 0
    assert_close(torch.func.vmap(op)(X), 2 * X)
    with pytest.raises(ValueError, match="expected at most one"):
        op.register_autograd(double, formula=double, jvp=double)
    with pytest.raises(ValueError, match="pass both"):
        op.register_autograd(double, decompose=double)
    with pytest.raises(NotImplementedError, match="register another"):
        op.set_kernel_enabled("cpu", False)
    op.register_autograd(lambda ctx, g: (g, g))
    with pytest.raises(RuntimeError, match="returns 2 gradients, expected 1"):
        op(x).sum().backward()
    for args in ((), (X, X), (1,)):
        with pytest.raises(RuntimeError, match="library_tests::op"):
            op(*args)
    with pytest.raises(ValueError, match="is a keyword-only tensor"):
        make(double, schema="(*, Tensor x) -> Tensor").register_sharding(double)
    with pytest.raises(ValueError, match="there is none"):
        make(double, schema="(Tensor x) -> ()").register_sharding(double)


def test_a_result_that_is_an_argument_is_refused() -> None:
    for function in (lambda x: x.view(-1), lambda x: x):
        with pytest.raises(RuntimeError, match="may not alias any inputs"):
            make(function, schema="(Tensor x) -> Tensor")(X)


def test_a_backward_may_leave_defaults_out() -> None:
    op = make(lambda x, scale=2.0: x * scale, schema="(Tensor x, float scale=2.0) -> Tensor")
    op.register_autograd(lambda ctx, g: 2 * g)
    x = X.clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(op(x).sum(), x)[0], torch.full_like(x, 2))
    with pytest.raises(RuntimeError, match="returns 1 gradients, expected 2"):
        op(x, 3.0).sum().backward()


def test_an_operator_may_read_what_requires_a_gradient_and_write_to_something_else() -> None:
    op = make(lambda out, x: (out.copy_(x), None)[1], schema="(Tensor(a!) out, Tensor x) -> ()")
    out, x = torch.zeros_like(X), X.clone().requires_grad_()
    op(out, x)
    assert torch.equal(out, X)
    with pytest.raises(RuntimeError, match="an argument that it writes to requires one"):
        op(x, out)


def test_a_refused_definition_leaves_the_operator_before_it() -> None:
    op = make(double)
    for schema in ("garbage", "(*, Tensor x) -> Tensor"):
        with pytest.raises((RuntimeError, ValueError)):
            torchpar.library.custom_op(op._qualname, double, mutates_args=(), schema=schema)
    assert torch.equal(op._opoverload(X), 2 * X)
