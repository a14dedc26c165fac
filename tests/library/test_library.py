# SPDX-License-Identifier: MIT
"""`torchpar.library` in place of `torch.library`: its calls, its errors, and PyTorch's private
names.

A failure after an upgrade of PyTorch says which assumption of torchpar/library no longer holds.
That `torch.library` still has the gaps for which it is there, docs/citizen.md says, whose code
tests/test_docs.py runs. When that fails, let `register_autograd` call PyTorch's, and drop
`formula`.
"""

import inspect
import itertools
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from commands import run
from samples import LAYOUTS
from torch import Tensor
from torch._inductor.compile_fx import compile_fx, compile_fx_aot
from torch._library.triton import get_triton_kernels_for_op, triton_ops_to_kernels
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import Replicate
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import torchpar
from benchmarks.records import OPERATORS, kernel_names
from torchpar.library import CustomOpDef
from torchpar.library.call_path import _BELOW_ADINPLACEORVIEW, _BELOW_AUTOGRAD, key_of
from torchpar.library.private import dispatch_modes
from torchpar.ops._operator import supports_tma
from torchpar.ops.matrix import _has_numbers, fp32_precision
from torchpar.ops.maximum import _empty_elementwise
from torchpar.testing import check_operator

# Of PyTorch's own export (2.11).
pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec")

NAMES = (f"library_tests::op{i}" for i in itertools.count())


def double(x: Tensor) -> Tensor:
    return 2 * x


def make(function: Any = double, mutates_args: Any = (), **how: Any) -> CustomOpDef:
    return torchpar.library.custom_op(next(NAMES), function, mutates_args=mutates_args, **how)


X, Y = (torch.linspace(start, start + 1, 4, dtype=torch.float64) for start in (0, 2))


def test_everything_takes_what_pytorchs_takes() -> None:
    pairs = [
        (getattr(torchpar.library, f), getattr(torch.library, f))
        for f in ("custom_op", "triton_op")
    ]
    methods = inspect.getmembers(torch.library.CustomOpDef, inspect.isfunction)
    pairs += [(getattr(CustomOpDef, name), f) for name, f in methods if not name.startswith("_")]
    assert len(pairs) > 9
    for ours, theirs in pairs:
        own, expected = (inspect.signature(f).parameters.values() for f in (ours, theirs))
        for select in (lambda p: p.kind is p.KEYWORD_ONLY, lambda p: p.kind is not p.KEYWORD_ONLY):
            mine, wanted = (list(filter(select, parameters)) for parameters in (own, expected))
            assert len(mine) >= len(wanted), theirs
            assert sum(p.default is p.empty for p in mine) <= sum(
                p.default is p.empty for p in wanted
            )
        keywords = [{p.name for p in ps if p.kind is p.KEYWORD_ONLY} for ps in (expected, own)]
        assert keywords[0] <= keywords[1], theirs


# In opcheck.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_functions_of_torch_library_take_the_object() -> None:
    op = make(tags=torch.Tag.core)
    assert torch.Tag.core in op._opoverload.tags
    torch.library.register_fake(op, torch.empty_like)
    torch.library.register_autograd(op, lambda ctx, g: 2 * g)
    torch.library.register_vmap(op, lambda info, in_dims, x: (op(x), in_dims[0]))
    torch.library.register_autocast(op, "cpu", torch.float16)
    with pytest.raises(
        ValueError, match=r"the device type is torch\.float16, expected 'cpu', .* second"
    ):
        op.register_autocast(torch.float16)
    torch.library.opcheck(op, (X.clone().requires_grad_(),))
    with torch.autocast("cpu"):
        assert op(X.float()).dtype == torch.float16
    assert_close(torch.func.vmap(op)(X[None]), 2 * X[None])


def test_gradients_of_calls_by_position_and_by_name() -> None:
    def axpy(x: Tensor, y: Tensor, *, scale: float = 2.0) -> Tensor:
        return scale * x + y.sin()

    def setup_context(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.scale = keyword_only_inputs["scale"]

    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        return g * ctx.scale, g * ctx.saved_tensors[0].cos()

    op, x = make(axpy), X.clone().requires_grad_()
    op.register_autograd(backward, setup_context=setup_context)
    for call in (lambda f: f(x, Y), lambda f: f(y=Y, x=x, scale=3.0), lambda f: f(x, f(x, Y))):
        for f in (op, op._opoverload):
            y, expected = call(f), call(axpy)
            assert_close(y, expected)
            assert_close(*(torch.autograd.grad(t.sum(), x) for t in (y, expected)))
    broadcast = X, Y[:1]  # whose gradient of y is not reduced
    assert_close(
        torch.func.jvp(op, broadcast, broadcast), torch.func.jvp(axpy, broadcast, broadcast)
    )
    op.register_vmap(lambda info, in_dims, x, y, *, scale: (op(x, y, scale=scale), in_dims[0]))
    assert_close(torch.func.vmap(op)(X, Y), axpy(X, Y))
    op.register_sharding(lambda x, y, *, scale: [([Replicate()], [Replicate(), Replicate()])])
    assert (
        check_operator(op, [(X, Y)], reference=axpy, rules="DTensor")["DTensor"].outcome == "works"
    )


@pytest.mark.parametrize("saved", [None, (), (None, X)])
def test_derivatives_that_save_nothing_or_none(saved: Any) -> None:
    op = make()
    setup_context = (
        None if saved is None else lambda ctx, inputs, output: ctx.save_for_backward(*saved)
    )
    op.register_autograd(lambda ctx, g: 2 * g, setup_context=setup_context)
    assert_close(torch.func.jvp(op, (X,), (Y,)), (2 * X, 2 * Y))
    assert_close(torch.func.grad(lambda x: op(x).sum())(X), torch.full_like(X, 2))


@pytest.mark.parametrize("grad", ["of the operand", "none", "off"])
def test_results_may_be_changed_in_place(grad):
    """A kernel that returns a view of new memory returns no view to anyone."""
    op = make(lambda x: (2 * x).view(2, 2), schema="(Tensor x) -> Tensor")
    op.register_autograd(lambda ctx, g: 2 * g.flatten())
    x = X.clone().requires_grad_(grad == "of the operand")
    factor = torch.tensor(3.0, dtype=X.dtype, requires_grad=True)
    with torch.set_grad_enabled(grad != "off"):
        y = op(x)
    y.mul_(factor).sum().backward()
    assert_close(factor.grad, (2 * X).sum())
    if x.requires_grad:
        assert_close(x.grad, torch.full_like(X, 6))


WRONG_RESULTS: dict[str, Any] = {
    "int": ("(Tensor x) -> Tensor", lambda x: 3),
    "NoneType": ("(Tensor x) -> Tensor", lambda x: None),
    "tuple": ("(Tensor x) -> Tensor", lambda x: (x + 1, x + 2)),
    "Tensor": ("(Tensor x) -> (Tensor, Tensor)", lambda x: x + 1),
    "list": ("(Tensor x) -> (Tensor, Tensor)", lambda x: [x + 1, x + 2]),
    r"\['Tensor', 'int'\]": ("(Tensor x) -> (Tensor, Tensor)", lambda x: (x + 1, 3)),
}


@pytest.mark.parametrize("kind", WRONG_RESULTS)
def test_results_that_the_schema_does_not_have_are_refused(kind):
    schema, function = WRONG_RESULTS[kind]
    op = make(function, schema=schema)
    with pytest.raises(RuntimeError, match=rf"returns {kind}, expected .*, as its schema says"):
        op(X)


def test_a_list_of_gradients_for_one_tensor_is_refused():
    op = make()
    op.register_autograd(lambda ctx, g: ([2 * g],))
    with pytest.raises(RuntimeError, match="backward returns 1 gradients for x, expected one"):
        op(X.clone().requires_grad_()).sum().backward()


def test_results_without_a_derivative() -> None:
    results = "(Tensor, Tensor, Tensor, SymInt)"
    op = make(lambda x: (2 * x, x.sign(), x.argsort(), len(x)), schema=f"(Tensor x) -> {results}")
    op.register_autograd(
        lambda ctx, g, *_: 2 * g,
        setup_context=lambda ctx, inputs, output: ctx.mark_non_differentiable(output[1]),
    )
    zeros = torch.zeros_like(X), torch.zeros_like(X, dtype=torch.int64)
    assert_close(torch.func.jvp(lambda x: op(x)[:3], (X,), (Y,))[1], (2 * Y, *zeros))
    assert_close(torch.func.grad(lambda x: op(x)[0].sum())(X), torch.full_like(X, 2))
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


def test_wrong_rules_are_named() -> None:
    op = make()
    op.register_vmap(lambda info, dims, x: op(x))
    with pytest.raises(RuntimeError, match="vmap rule returns Tensor, expected a tuple"):
        torch.vmap(op)(X)
    op.register_vmap(lambda info, dims, x: (op(x), op(x)))
    with pytest.raises(RuntimeError, match=r"returns \['Tensor', 'Tensor'\], expected a tuple"):
        torch.vmap(op)(X)
    op.register_autograd(lambda ctx, g: g.sum(0, keepdim=True))
    with pytest.raises(RuntimeError, match=r"a gradient of shape \(1,\), expected \(4,\)"):
        torch.func.jvp(op, (X,), (Y,))


def test_a_launch_without_a_gpu_says_what_to_do() -> None:
    triton = pytest.importorskip("triton", reason="the operator launches a kernel")

    @triton.jit
    def kernel(x_ptr):
        pass

    def launch(x: Tensor) -> Tensor:
        kernel[(1,)](x)
        return torch.empty_like(x)

    op = torchpar.library.triton_op(next(NAMES), launch, mutates_args=())
    rows = check_operator(op, [(X,)], reference=double, rules="values").rows
    way = 'has no kernel for the CPU; register one by register_kernel("cpu")'
    assert rows[0].detail.startswith(f"RuntimeError: {op._qualname} {way}")
    op.register_kernel("cpu")(launch)  # a kernel for CPUs that is wrong, and not missing
    with pytest.raises(RuntimeError, match="active drivers") as raised:
        op(X)
    assert not hasattr(raised.value, "__notes__")
    op.register_kernel("cpu")(double)
    rows = check_operator(op, [(X,)], reference=double, rules="fake tensors").rows
    assert "launches a kernel on fake tensors; launch it as torch.library.wrap" in rows[0].detail


def test_an_error_beside_a_launch_has_no_note_of_launches() -> None:
    def fail(x: Tensor) -> Tensor:
        raise RuntimeError("0 active drivers ([]). There should only be one.")

    op = torchpar.library.triton_op(next(NAMES), fail, mutates_args=())
    for x in (X, FakeTensorMode().from_tensor(X)):
        with pytest.raises(RuntimeError, match="active drivers") as raised:
            op(x)
        assert not hasattr(raised.value, "__notes__")


def test_vmap_without_a_rule_says_what_to_do() -> None:
    op = make(lambda xs: xs[0] * 2, schema="(Tensor[] xs) -> Tensor")
    with pytest.raises(RuntimeError, match=f"{op._qualname}: .* register one by register_vmap"):
        torch.vmap(lambda x: op([x]))(X)
    write = make(lambda x: x.add_(1) and None, {"x"}, schema="(Tensor(a!) x) -> ()")
    with pytest.raises(RuntimeError, match=f"{write._qualname} writes to an argument"):
        torch.vmap(write)(X)


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
    copy = make(
        lambda out, x: (out.copy_(x), None)[1], {"out"}, schema="(Tensor(a!) out, Tensor x) -> ()"
    )
    out, x = torch.zeros_like(X), X.clone().requires_grad_()
    copy(out, x)  # it may read what requires a gradient
    assert torch.equal(out, X)
    for write in (lambda: copy(x, out), lambda: op([x])):
        with pytest.raises(
            RuntimeError, match="has no gradient, and an argument that it writes to requires"
        ):
            write()


def test_kernels_for_devices() -> None:
    op = make(device_types="cpu")
    op.register_fake(torch.empty_like)
    assert_close(op(X), 2 * X)
    assert op(X.to("meta")).is_meta
    op.register_kernel("cpu")(lambda x: 3 * x)
    assert_close((op(X), op._opoverload(X)), (3 * X, 3 * X))
    again = torchpar.library.custom_op(op._qualname, double, mutates_args=())  # as in a notebook
    assert_close(again(X), 2 * X)


def test_errors() -> None:
    op = make()
    x = X.clone().requires_grad_()
    with pytest.raises(ValueError, match="expected 'namespace::name'"):
        torchpar.library.custom_op("name", double, mutates_args=())
    with pytest.raises(RuntimeError, match="has no backward"):
        op(x).sum().backward()
    with pytest.raises(ValueError, match="expected at most one"):
        op.register_autograd(double, formula=double, jvp=double)
    with pytest.raises(ValueError, match="pass both"):
        op.register_autograd(double, decompose=double)
    with pytest.raises(NotImplementedError, match="register another"):
        op.set_kernel_enabled("cpu", False)
    op.register_autograd(lambda ctx, g: (g, g))
    with pytest.raises(RuntimeError, match="expected 1, got 2"):
        op(x).sum().backward()
    for function in (lambda x: x.view(-1), lambda x: x):
        with pytest.raises(RuntimeError, match="may not alias any inputs"):
            make(function, schema="(Tensor x) -> Tensor")(X)
    wrong = {"garbage": "Tried to parse", "(*, Tensor x) -> Tensor": "is a keyword-only tensor"}
    for schema, message in wrong.items():
        with pytest.raises((RuntimeError, ValueError), match=message):
            torchpar.library.custom_op(op._qualname, double, mutates_args=(), schema=schema)
    # A refused definition leaves the operator before it.
    assert torch.equal(op._opoverload(X), 2 * X)
    with pytest.raises(ValueError, match="there is none"):
        make(double, schema="(Tensor x) -> ()").register_sharding(double)
    with pytest.raises(ValueError, match="a list of results as one tensor; return a tuple"):
        make(double, schema="(Tensor[] xs) -> Tensor[]").register_sharding(double)


def test_a_list_may_hold_none() -> None:
    schema = "(Tensor x, Tensor?[] parts) -> Tensor"
    op = make(lambda x, parts: x + sum(t for t in parts if t is not None), schema=schema)
    op.register_autograd(lambda ctx, g: (g, [g, None]))
    part = X.clone().requires_grad_()
    op(X, [part, None]).sum().backward()
    assert_close(part.grad, torch.ones_like(part))


def test_defaults_are_left_out() -> None:
    op = make(lambda x, scale=2.0: x * scale, schema="(Tensor x, float scale=2.0) -> Tensor")
    op.register_autograd(lambda ctx, g: 2 * g)
    x = X.clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(op(x).sum(), x)[0], torch.full_like(x, 2))
    with pytest.raises(RuntimeError, match="expected 2, got 1"):
        op(x, 3.0).sum().backward()
    op.register_vmap(lambda info, in_dims, x, scale: (op(x, scale), in_dims[in_dims[1] or 0]))
    assert_close(torch.func.vmap(op)(X[None]), 2 * X[None])


# The operators: their registration, the cost of importing them, and how compilers see them


def test_the_record_has_all_operators() -> None:
    # exact_matmul_t(x) is exact_matmul(x, x), and fp32_products is no operator.
    others = {"exact_matmul_t", "fp32_products"}
    assert set(torchpar.ops.__all__) - others == set(OPERATORS)


SCRIPT = """
import json, sys, torch
sys.modules.update(rich=None, triton=None, torchvision=None,
lightning=None)  # importing one of them fails
before = set(sys.modules)
import torchpar
added = sorted(set(sys.modules) - before)
x = torch.ones(3, 4, requires_grad=True)
y = torchpar.linear_sigmoid(x, x, x[:, 0])
torchpar.maximum(torchpar.matmul_t(y), y).sum().backward()
torchpar.symmetric_matmul(torch.ones(300, 2), torch.ones(300, 2), check=True)
import torchpar.optim, torchpar.testing.doctor
from torchpar.testing import check_operator, check_optimizer
import torch.distributed.tensor
from torchpar.library.sharding import sharding_rules
waiting = len(sharding_rules)
torch.ops.torchpar.maximum(y, y)

@torchpar.library.custom_op("library_script::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x

@double.register_fake
def _(x):
    return torch.empty_like(x)

defined = [double(torch.ones(1)).item(), str(double(torch.ones(1, device="meta")).device)]
print(json.dumps([added, [waiting, len(sharding_rules)], defined]))
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a script reports of its first import, and of an operator that it defines at its top."""
    path = tmp_path_factory.mktemp("script") / "script.py"
    path.write_text(SCRIPT)
    status, out, err = run(sys.executable, str(path))
    assert status == 0, err
    return json.loads(out)


def test_a_script_defines_operators_at_its_top(script: Any) -> None:
    """PyTorch looks for the caller of `register_fake` some frames above."""
    assert script[2] == [2.0, "meta"]


def test_import_adds_only_what_is_ours_and_the_cpu_paths_need_no_triton(script: Any) -> None:
    # Modules are counted, not milliseconds: the import would be slow because of Triton and of
    # PyTorch's own modules that are not loaded yet.
    imported, (waiting, left), _ = script
    assert waiting > left == 0, "sharding rules wait for DTensor"
    assert "torchpar.ops.matmul_t" in imported
    assert [module for module in imported if module.partition(".")[0] != "torchpar"] == []
    assert [module for module in imported if module.startswith("torchpar.kernels.")] == []


@pytest.mark.parametrize("name", kernel_names())
def test_compilers_find_the_kernels_source(name: str) -> None:
    # AOTAutograd's cache key holds this source; without it an edited kernel would run as it was
    # before.
    from torch._inductor.codegen.wrapper import (
        user_defined_triton_kernel_transitive_closure_source_code,
    )
    from triton import JITFunction

    assert torch.Tag.pt2_compliant_tag in getattr(torch.ops.torchpar, name).default.tags
    assert f"torchpar::{name}" in triton_ops_to_kernels
    kernels = list(get_triton_kernels_for_op(f"torchpar::{name}"))
    assert all(isinstance(kernel, JITFunction) for kernel in kernels)
    assert {kernel.fn.__name__ for kernel in kernels} >= kernel_names()[name]
    for kernel in kernels:
        assert (
            f"def {kernel.fn.__name__}"
            in user_defined_triton_kernel_transitive_closure_source_code(kernel)
        )


STOP = Mock(side_effect=NotImplementedError)  # a compiler that has seen the traced operator


@pytest.fixture(scope="module")
def exported() -> torch.export.ExportedProgram:
    return torch.export.export(torchpar.nn.LinearSigmoid(2, 4), (torch.ones(3, 2),))


def _compile(options: dict[str, Any]) -> Callable[..., Any]:
    return lambda exported, x: compile_fx(exported.module(), [x], STOP, options)


@pytest.mark.parametrize(
    "trace, expected",
    [
        pytest.param(_compile({}), True, id="Inductor"),
        pytest.param(_compile({"cpp_wrapper": True}), False, id="Inductor's C++ wrapper"),
        pytest.param(_compile({"fx_wrapper": True}), False, id="Inductor's FX wrapper"),
        pytest.param(lambda e, x: compile_fx_aot(e.module(), [x], STOP), False, id="AOTInductor"),
        pytest.param(
            lambda e, x: e.run_decompositions(decompose_custom_triton_ops=True), False, id="export"
        ),
        pytest.param(
            lambda e, x: torch.compile(e.module(), backend="aot_eager")(x), False, id="aot_eager"
        ),
    ],
)
def test_supports_tma_where_a_compiler_allocates_for_descriptors(
    monkeypatch: pytest.MonkeyPatch,
    exported: torch.export.ExportedProgram,
    trace: Callable[..., Any],
    expected: bool,
) -> None:
    answers = []

    def ask() -> bool:  # while the operator is traced
        answers.append(supports_tma(torch.library.wrap_triton))
        return False

    monkeypatch.setattr("torch.export._trace.custom_triton_ops_decomposition_disabled", ask)
    with suppress(NotImplementedError):
        trace(exported, torch.ones(3, 2))
    assert set(answers) == {expected}


# One elementwise operator, and one product.
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name != "maximum")) for name in OPERATORS],
)
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_compilers_take_operands_of_data_dependent_size(name: str) -> None:
    operator = OPERATORS[name]
    torch._dynamo.reset()  # it compiles a function a few times only

    def function(x: Tensor) -> Tensor:
        x = x[x[:, 0] > 0]
        sizes = operator.sized({"n": x.shape[0], "k": 3, "o": 4})
        shapes = [x.shape] * 2 if name == "maximum" else sizes
        return operator.op(*(x.mean() * x.new_ones(shape) for shape in shapes)).square().sum()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    x = torch.linspace(-1, 2, 900).view(300, 3).requires_grad_()
    assert_close(torch.autograd.grad(compiled(x), x), torch.autograd.grad(function(x), x))
    assert_close(compiled(x.detach()), function(x.detach()))


def test_an_elementwise_result_has_atens_strides() -> None:
    shapes = list(itertools.product((1, 2), repeat=3))
    layouts = ["contiguous", "transposed", "permuted", "stepped", "expanded"]
    for a_shape, b_shape, *names in itertools.product(shapes, shapes, layouts, layouts):
        a, b = (LAYOUTS[n](torch.empty(s)) for s, n in zip((a_shape, b_shape), names, strict=True))
        found, expected = _empty_elementwise((a, b), a.dtype, a.device), torch.maximum(a, b)
        assert (found.shape, found.stride()) == (expected.shape, expected.stride())


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_the_flag_of_float32_is_that_of_torch_backends(precision: str) -> None:
    products: Any = torch.backends.cuda.matmul
    before = products.fp32_precision
    try:
        products.fp32_precision = precision
        assert fp32_precision(X.float()) == (precision, True)
        assert fp32_precision(X.bfloat16()) == fp32_precision(X) == ("ieee", True)
    finally:
        products.fp32_precision = before


def test_a_batch_of_gradients_has_no_numbers() -> None:
    """torch.vmap has other batched tensors, which `peek_interpreter_stack` finds."""
    x, found = torch.ones(3, requires_grad=True), []
    y = 2 * x
    y.register_hook(lambda g: found.append(_has_numbers(g)))
    torch.autograd.grad(y, x, torch.ones(2, 3), is_grads_batched=True, retain_graph=True)
    torch.autograd.grad(y, x, torch.ones(3))
    assert found == [False, True]


def test_compiled_autograd_tells_functions_apart_by_their_keys() -> None:
    ops, x = [make(), make()], X.clone().requires_grad_()
    for op in ops:
        op.register_autograd(lambda ctx, g: 2 * g)
    keys = [op(x).grad_fn._compiled_autograd_key() for op in (*ops, ops[0])]
    assert keys[0] == keys[2] != keys[1]


def test_the_keys_below_a_key_are_pytorchs() -> None:
    expected = torch._C._after_ADInplaceOrView_keyset.raw_repr()
    assert _BELOW_ADINPLACEORVIEW.raw_repr() == expected
    python = torch.DispatchKeySet(torch.DispatchKey.PythonDispatcher).raw_repr()
    # PyTorch's own rules of autograd pass over PythonDispatcher.
    assert _BELOW_AUTOGRAD.raw_repr() == torch._C._after_autograd_keyset.raw_repr() | python


@pytest.mark.parametrize("kind", ["cpu", "cuda", "meta", "mps", "xpu", "hpu"])
def test_the_key_of_a_device_is_pytorchs(kind: str) -> None:
    assert key_of(kind) == torch._C._dispatch_key_for_device(kind)


def test_dispatch_modes_are_those_that_are_active() -> None:
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(dispatch_modes())  # the mode rests while it handles a call
            return func(*args, **(kwargs or {}))

    seen: list[object] = []
    assert dispatch_modes() == []
    with Mode() as outer:
        assert dispatch_modes() == [outer]
        with FakeTensorMode() as inner:
            assert {*dispatch_modes()} == {outer, inner}
        double(X)
    assert seen == [[]]
    assert dispatch_modes() == []


@pytest.mark.skipif(
    not hasattr(torch._ops.OpOverload, "_enable_pyobj_dispatch"), reason="it came with torch 2.14"
)
@pytest.mark.parametrize(
    "schema, expected",
    [
        ("(Tensor x, Tensor[] rest) -> Tensor", True),
        ("(Tensor x, Tensor? rest) -> Tensor", False),
        ("(Tensor x, Tensor[] rest, float scale=1.0) -> Tensor", False),
        ("(Tensor x, Tensor[] rest, *, float scale=1.0) -> Tensor", False),
    ],
)
def test_enable_pyobj_dispatch_is_for_tensors_alone(schema: str, expected: bool) -> None:
    op = make(lambda x, rest: 2 * x, schema=schema)
    assert op._opoverload._is_pyobj_dispatcher_enabled() == expected
    assert torch.equal(op(X, [Y] if "[]" in schema else Y), 2 * X)


def test_a_launch_makes_the_gpu_of_its_tensors_current(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[torch.device] = []

    def enter(gpu: torch.device) -> nullcontext[None]:
        entered.append(gpu)
        return nullcontext()

    gpu = torch.device("cuda", 1)
    monkeypatch.setattr("torchpar.library.constructors._gpu_of", lambda args: gpu)
    monkeypatch.setattr(torch.cuda, "device", enter)
    op = torchpar.library.triton_op(next(NAMES), double, mutates_args=())
    for current, expected in ((1, []), (0, [gpu])):
        monkeypatch.setattr(torch.cuda, "current_device", lambda current=current: current)
        assert torch.equal(op(X), 2 * X)
        assert entered == expected


@pytest.mark.parametrize("by", ["the operator", "its packet"])
def test_a_profiler_records_a_call(by: str) -> None:
    op = make()
    call = op if by == "the operator" else getattr(torch.ops.library_tests, op._name)
    with torch.profiler.profile(acc_events=True) as profiled:
        call(X)
    assert op._qualname in {event.name for event in profiled.events()}
