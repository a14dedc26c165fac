# SPDX-License-Identifier: MIT
"""Registration of the operators, the cost of importing them, and each private name of PyTorch that they use.

A failure here after an upgrade of PyTorch says which assumption of torchpar/library.py no longer holds.
"""

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from operators import BACKWARDS, OPERATORS
from samples import LAYOUTS
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.compile_fx import compile_fx, compile_fx_aot
from torch._library.triton import get_triton_kernels_for_op, triton_ops_to_kernels
from torch._prims_common import compute_elementwise_output_strides
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

import torchpar
from torchpar.library import supports_tma

# Of PyTorch's own export (2.11).
pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec")

SCHEMAS = {name: operator.schema for name, operator in OPERATORS.items()} | {
    name: name + backward.schema for name, backward in BACKWARDS.items()
}


def test_the_record_has_all_operators() -> None:
    assert set(torchpar.ops.__all__) - {"exact_matmul_t"} == set(OPERATORS)  # which is exact_matmul(x, x)


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_and_tags(name: str) -> None:
    overload = getattr(torch.ops.torchpar, name).default
    assert str(overload._schema) == f"torchpar::{SCHEMAS[name]}"
    assert torch.Tag.pt2_compliant_tag in overload.tags
    for key in ("CompositeExplicitAutograd", "Meta", "Autograd"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(overload.name(), key)


IMPORT = """
import json, sys, torch
before = set(sys.modules)
import torchpar
added = sorted(set(sys.modules) - before)
x = torch.ones(3, 4, requires_grad=True)
y = torchpar.linear_sigmoid(x, x, x[:, 0])
torchpar.maximum(torchpar.matmul_t(y), y).sum().backward()
torchpar.symmetric_matmul(torch.ones(300, 2), torch.ones(300, 2), check=True)
called = sorted(set(sys.modules) - before)
import torch.distributed.tensor
from torchpar.library import _sharding_rules
waiting = len(_sharding_rules)
torch.ops.torchpar.maximum(y, y)
print(json.dumps([added, called, waiting, len(_sharding_rules)]))
"""


def test_import_adds_only_what_is_ours_and_the_cpu_paths_need_no_triton() -> None:
    # Modules are counted, not milliseconds: the import would be slow because of Triton and of PyTorch's own
    # modules that are not loaded yet.
    result = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    imported, called, waiting, left = json.loads(result.stdout)
    assert waiting > left == 0, "sharding rules wait for DTensor"
    assert "torchpar.ops.matmul_t" in imported
    assert [module for module in imported if module.partition(".")[0] != "torchpar"] == []
    assert [module for module in imported if module.startswith("torchpar.kernels")] == []
    packages = {module.partition(".")[0] for module in called}
    assert packages.isdisjoint({"triton", "torchvision", "lightning", "pytorch_lightning", "matplotlib"})


KERNELS = {name: operator.kernels for name, operator in OPERATORS.items()} | {
    name: backward.kernels for name, backward in BACKWARDS.items()
}


@pytest.mark.parametrize("name", KERNELS)
def test_compilers_find_the_kernels_source(name: str) -> None:
    # AOTAutograd's cache key holds this source; without it an edited kernel would run as it was before.
    from torch._inductor.codegen.wrapper import user_defined_triton_kernel_transitive_closure_source_code
    from triton import JITFunction

    assert set(triton_ops_to_kernels) >= {f"torchpar::{op}" for op in SCHEMAS}
    kernels = list(get_triton_kernels_for_op(f"torchpar::{name}"))
    assert all(isinstance(kernel, JITFunction) for kernel in kernels)
    assert {kernel.fn.__name__ for kernel in kernels} >= KERNELS[name]
    for kernel in kernels:
        assert f"def {kernel.fn.__name__}" in user_defined_triton_kernel_transitive_closure_source_code(
            kernel
        )


class Product(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torchpar.matmul_t(x)


class _Traced(Exception):
    pass


def _stop(*args: Any, **kwargs: Any) -> Any:
    raise _Traced


def _compile(options: dict[str, Any]) -> Callable[..., Any]:
    return lambda exported, x: compile_fx(exported.module(), [x], _stop, options)


BY_CPP = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 15)


@pytest.mark.parametrize(
    "trace, expected",
    [
        pytest.param(_compile({}), True, id="Inductor"),
        pytest.param(_compile({"cpp_wrapper": True}), BY_CPP, id="Inductor's C++ wrapper"),
        pytest.param(_compile({"fx_wrapper": True}), False, id="Inductor's FX wrapper"),
        pytest.param(lambda e, x: compile_fx_aot(e.module(), [x], _stop), BY_CPP, id="AOTInductor"),
        pytest.param(lambda e, x: e.run_decompositions(decompose_custom_triton_ops=True), False, id="export"),
        pytest.param(lambda e, x: torch.compile(e.module(), backend="aot_eager")(x), False, id="aot_eager"),
    ],
)
def test_supports_tma_where_a_compiler_allocates_for_descriptors(
    monkeypatch: pytest.MonkeyPatch, trace: Callable[..., Any], expected: bool
) -> None:
    answers = []

    def ask() -> bool:  # while the operator is traced
        answers.append(supports_tma(torch.library.wrap_triton))
        return False

    x = torch.ones(3, 2)
    exported = torch.export.export(Product(), (x,))
    monkeypatch.setattr("torch.export._trace.custom_triton_ops_decomposition_disabled", ask)
    with suppress(_Traced):
        trace(exported, x)
    assert set(answers) == {expected}


@pytest.mark.parametrize("name", OPERATORS)
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_compilers_take_operands_of_data_dependent_size(name: str) -> None:
    operator = OPERATORS[name]
    torch._dynamo.reset()  # it compiles a function a few times only

    def function(x: Tensor) -> Tensor:
        x = x[x[:, 0] > 0]
        if name == "maximum":
            return operator.op(x, 1 - x).square().sum()
        sizes = operator.sized({"n": x.shape[0], "k": 3, "o": 4})
        args = [
            x.reshape(shape) if "n" in letters and "k" in letters else x.new_ones(shape)
            for letters, shape in zip(operator.shapes, sizes, strict=True)
        ]
        return operator.op(*args).square().sum()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    x = torch.linspace(-1, 2, 900).view(300, 3).requires_grad_()
    assert_close(torch.autograd.grad(compiled(x), x), torch.autograd.grad(function(x), x))
    assert_close(compiled(x.detach()), function(x.detach()))


def test_compilers_look_through_an_operator_and_other_tracers_do_not() -> None:
    graphs = []

    def compiler(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    def targets(graph: torch.fx.GraphModule) -> set[Any]:
        return {node.target for node in graph.graph.nodes if node.op == "call_function"}

    x = torch.ones(3, 2)
    assert targets(make_fx(torchpar.matmul_t)(x)) == {torch.ops.torchpar.matmul_t.default}
    # register_torch_dispatch for FunctionalTensorMode is what AOTAutograd decomposes by.
    compiled = torch.compile(torchpar.matmul_t, backend=aot_autograd(fw_compiler=compiler), fullgraph=True)
    assert_close(compiled(x), torchpar.matmul_t(x))
    (graph,) = graphs
    assert torch.ops.aten.mm.default in targets(graph)
    assert all(target.namespace == "aten" for target in targets(graph))


def test_compute_elementwise_output_strides_is_atens() -> None:
    shapes = list(itertools.product((1, 2), repeat=3))
    layouts = ["contiguous", "transposed", "permuted", "stepped", "expanded"]
    for a_shape, b_shape, *names in itertools.product(shapes, shapes, layouts, layouts):
        a, b = (LAYOUTS[n](torch.empty(s)) for s, n in zip((a_shape, b_shape), names, strict=True))
        shape = torch.broadcast_shapes(a_shape, b_shape)
        strides = compute_elementwise_output_strides(a.expand(shape), b.expand(shape))
        assert strides == torch.maximum(a, b).stride()


def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def backward(ctx: Any, g: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    return 3 * x**2 * g


def test_register_autograd_of_pytorch_still_needs_our_workaround() -> None:
    """It supports neither grad nor jvp: pytorch#168393, #170834, #179652.

    Once the oldest torch that pyproject.toml allows does, let `register_autograd` in torchpar/library.py
    call it (if its calls have become as cheap), and drop `formula`, peek_interpreter_stack and forward_ad.
    """
    name = "torchpar_tests::cube"
    torch.library.custom_op(name, lambda x: x**3, mutates_args=(), schema="(Tensor x) -> Tensor")
    torch.library.register_autograd(name, backward, setup_context=setup_context)
    cube = torch.ops.torchpar_tests.cube
    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    assert_close(torch.autograd.grad(cube(leaf).sum(), leaf), (3 * x**2,))  # as it is meant to be used
    working = []
    for transform in (lambda f: grad(lambda x: f(x).sum())(x), lambda f: jvp(f, (x,), (x,))[1]):
        with suppress(RuntimeError):
            working.append(torch.allclose(transform(cube), transform(lambda x: x**3)))
    assert working != [True, True]


class Square(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * dx


def test_jvp_of_a_function_still_needs_our_workaround() -> None:
    """`with_derivatives` turns forward mode on in a function's jvp. When this fails, it need not any more."""
    x = torch.ones(1)
    second = [
        jvp(lambda x, f=f: jvp(f, (x,), (x.detach(),))[1], (x,), (x,))[1]
        for f in (torch.square, Square.apply)
    ]
    assert_close(second, [2 * x, 0 * x])


def test_pytorch_says_whether_onednn_multiplies_bfloat16() -> None:
    # Inductor asks by this name, too.
    assert isinstance(torch.ops.mkldnn._is_mkldnn_bf16_supported(), bool)
    assert isinstance(torch.cpu._is_amx_tile_supported(), bool)


def test_private_names_tell_of_transforms_and_forward_mode() -> None:
    seen = []

    def function(x: Tensor) -> Tensor:
        seen.append(peek_interpreter_stack() is not None)
        return x.sum()

    for transform in (lambda f: f, vmap, grad, lambda f: f):
        transform(function)(torch.ones(3))
    assert seen == [False, True, True, False]
    assert forward_ad._current_level == -1
    with forward_ad.dual_level():
        assert forward_ad._current_level == 0
