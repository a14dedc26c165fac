# SPDX-License-Identifier: MIT
"""Behaviours of `torch.library`'s decorators, each also asked of `torchpar.library`'s."""

import itertools
import threading
from typing import Any, NamedTuple

import pytest
import torch
from commands import forked
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import torchpar

NAMES = (f"library_anchor::op{i}" for i in itertools.count())

both = pytest.mark.parametrize(
    "library", [torch.library, torchpar.library], ids=["torch", "torchpar"]
)

# Those that compile: PyTorch's part takes as long as ours, and changes with PyTorch only.
both_compiled = pytest.mark.parametrize(
    "library",
    [pytest.param(torch.library, marks=pytest.mark.slow), torchpar.library],
    ids=["torch", "torchpar"],
)


def double(x: Tensor) -> Tensor:
    return 2 * x


def write_double(x: Tensor) -> None:
    array = x.numpy()
    array *= 2  # a write of which PyTorch knows nothing


def add_one(x: Tensor, w: Tensor) -> Tensor:
    x.add_(1)
    return w * 2


def make(library: Any, function: Any = double, mutates_args: Any = (), **how: Any) -> Any:
    return library.custom_op(next(NAMES), function, mutates_args=mutates_args, **how)


# Operators that write to arguments


@both
def test_a_write_in_inference_mode_raises_the_version(library: Any) -> None:
    op, w = make(library, write_double, {"x"}), torch.full((2,), 5.0, requires_grad=True)
    x = torch.ones(2)
    y = (x * w).sum()
    with torch.inference_mode():
        op(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    with torch.inference_mode():
        op(torch.ones(2))  # has no version


@both
@pytest.mark.parametrize("kind", ["Tensor", "Tensor?", "Tensor[]", "Tensor?[]"])
def test_a_write_raises_the_versions_of_what_is_written(library: Any, kind: str) -> None:
    written, read = torch.zeros(2), torch.zeros(2)
    argument = [written] if "[]" in kind else written
    schema = f"({kind.replace('Tensor', 'Tensor(a!)', 1)} x, Tensor y) -> ()"
    op = make(library, lambda x, y: None, {"x"}, schema=schema)
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        version = written._version
        with mode():
            op(argument, read)
        assert (written._version > version, read._version) == (True, 0)


@both
def test_a_result_of_an_operator_that_writes_has_no_gradient_and_says_so(library: Any) -> None:
    op, w = make(library, add_one, {"x"}), torch.ones(2, requires_grad=True)
    x = torch.zeros(2)
    y = op(x, w)
    assert y.requires_grad
    assert x.tolist() == [1, 1]
    assert x._version > 0
    with pytest.raises(RuntimeError, match="Trying to backward through"):
        (y + w).sum().backward()


@both_compiled
def test_an_operator_that_writes_needs_no_fake(library: Any) -> None:
    op = make(library, write_double, {"x"})
    op(torch.ones(2, device="meta"))
    with FakeTensorMode():
        op(torch.ones(2))
    torch.library.opcheck(op, (torch.ones(2),))

    def function(x: Tensor) -> Tensor:
        x = x.clone()
        op(x)
        return x

    x = torch.ones(2)
    assert torch.equal(torch.compile(function, backend="aot_eager", fullgraph=True)(x), 2 * x)


@both
@pytest.mark.parametrize(
    "schema, mutates", [("(Tensor x) -> ()", {"x"}), ("(Tensor(a!) x) -> ()", ())]
)
def test_a_schema_that_contradicts_mutates_args(library: Any, schema: str, mutates: Any) -> None:
    with pytest.raises(ValueError, match="the op mutates"):
        make(library, lambda x: None, mutates, schema=schema)


@both
def test_mutates_args_that_are_no_arguments(library: Any) -> None:
    for mutates in ("x", {"y"}):
        with pytest.raises(ValueError, match="mutates_args"):
            make(library, double, mutates)


@both
def test_unknown_writes_raise_all_versions(library: Any) -> None:
    def function(x: Tensor, y: Tensor) -> None:
        x.zero_()

    x, y = torch.ones(2), torch.ones(2)
    make(library, function, "unknown")(x, y)
    assert x._version > 0
    assert y._version > 0


def test_forward_mode_in_another_thread_does_not_refuse_a_write() -> None:
    op, failed = make(torchpar.library, write_double, {"x"}), []

    def call() -> None:
        try:
            op(torch.ones(2))
        except RuntimeError as e:
            failed.append(e)

    with forward_ad.dual_level():
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        assert failed == []
        with pytest.raises(RuntimeError, match="forward mode cannot follow"):
            op(forward_ad.make_dual(torch.ones(2), torch.ones(2)))


def test_forward_mode_in_another_thread_changes_no_call() -> None:
    """PyTorch counts the levels of forward mode for all threads together."""
    op, x, found = make(torchpar.library), torch.ones(2, requires_grad=True), []
    op.register_autograd(
        lambda ctx, g: 2 * g,
        setup_context=lambda ctx, inputs, output: modes.append(torch.is_grad_enabled()),
        formula=lambda x: found.append("formula"),
    )
    modes: list[bool] = []
    asymmetric = torch.tensor([[1.0, 2.0], [3.0, 4.0]])

    def call() -> None:
        found.append(op(x).tolist())
        try:
            torchpar.symmetric_matmul(asymmetric, torch.eye(2), check=True)
        except RuntimeError:
            found.append("refused")

    with forward_ad.dual_level():
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    assert found == [[2, 2], "refused"]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones(2), torch.full((2,), 5.0))
        op.register_autograd(lambda ctx, g: 2 * g, formula=lambda x: 2 * x)
        assert forward_ad.unpack_dual(op(dual)).tangent.tolist() == [10, 10]


@both
def test_the_graph_names_the_operator(library: Any) -> None:
    op, x = make(library), torch.ones(2, requires_grad=True)
    op.register_autograd(lambda ctx, g: 2 * g)
    name = f"GeneratedBackwardFor_{op._qualname.replace('::', '_')}_default"
    assert op(x).grad_fn.name().startswith(name)


SCRIPT = """
import torch

@torch.library.custom_op("anchor_script::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x

@double.register_fake
def _(x):
    return torch.empty_like(x)

print(double(torch.ones(1)).item(), double(torch.ones(1, device="meta")).device)
"""


@pytest.mark.slow
def test_a_script_defines_operators_at_its_top(fork_server: None, tmp_path: Any) -> None:
    """PyTorch looks for the caller of `register_fake` some frames above; test_library.py asks
    the same of ours."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    assert forked(str(script))[:2] == (0, "2.0 meta\n")


@both
def test_a_fake_knows_its_source(library: Any) -> None:
    op = make(library)
    op.register_fake(torch.empty_like)  # whose line is this one
    entry = torch._library.simple_registry.singleton.find(op._qualname)
    assert entry.fake_impl.kernel.source.startswith(__file__) or library is torch.library


# What derivatives see


@both
def test_the_context_is_the_users(library: Any) -> None:
    op, x = make(library), torch.ones(2, requires_grad=True)

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.call, ctx.are_smooth, ctx.results = inputs[0].shape, 1, 2

    op.register_autograd(
        lambda ctx, g: g * 2 * ctx.results * len(ctx.call), setup_context=setup_context
    )
    op(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [4, 4]


@both
def test_setup_context_is_called_where_a_gradient_is_needed(library: Any) -> None:
    op, calls = make(library), []
    op.register_autograd(
        lambda ctx, g: 2 * g, setup_context=lambda ctx, inputs, output: calls.append(1)
    )
    x = torch.ones(2, requires_grad=True)
    op(x.detach())
    with torch.no_grad():
        op(x)
    assert calls == []
    op(x)
    assert calls == [1]


@both
@pytest.mark.parametrize("materializes", [True, False])
def test_gradients_of_unused_results(library: Any, materializes: bool) -> None:
    op, seen = make(library, lambda x: (2 * x, 3 * x), schema="(Tensor x) -> (Tensor, Tensor)"), []

    def backward(ctx: Any, g: Any, h: Any) -> Tensor:
        seen.append(h)
        return 2 * g

    op.register_autograd(
        backward, setup_context=lambda ctx, inputs, output: ctx.set_materialize_grads(materializes)
    )
    x = torch.ones(2, requires_grad=True)
    op(x)[0].sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2, 2]
    assert (seen[0].tolist() == [0, 0]) if materializes else (seen[0] is None)


@both
def test_needs_input_grad_and_the_number_of_gradients(library: Any) -> None:
    schema = "(Tensor x, float a=1., float b=2., float c=3.) -> Tensor"
    op, seen = make(library, lambda x, a=1.0, b=2.0, c=3.0: x * a * b * c, schema=schema), []
    x = torch.ones(2, requires_grad=True)

    def register(count: int) -> None:
        def backward(ctx: Any, g: Tensor) -> Any:
            seen.append(ctx.needs_input_grad)
            return (g, None, None, None, None)[:count]

        op.register_autograd(
            backward, setup_context=lambda ctx, inputs, output: seen.append(list(inputs[1:]))
        )

    for count in (1, 4):
        register(count)
        torch.autograd.grad(op(x).sum(), x)
        assert seen == [[1, 2, 3], (True,)]
        seen.clear()
    for count in (0, 2, 3):
        register(count)
        with pytest.raises(RuntimeError, match=rf"expected 1 or 4, got {count}"):
            op(x).sum().backward()


@both
def test_needs_input_grad_of_lists(library: Any) -> None:
    def function(ts: list[Tensor], sizes: list[int], scale: float = 1.0) -> Tensor:
        return ts[0] * ts[1] * scale

    op, seen = make(library, function), []

    def backward(ctx: Any, g: Tensor) -> Any:
        seen.append(ctx.needs_input_grad)
        return [g, None], None, None

    op.register_autograd(backward)
    x, y = torch.ones(2, requires_grad=True), torch.ones(2)
    op([x, y], [1, 2, 3]).sum().backward()
    op([x, y], [1, 2, 3], 2.0).sum().backward()
    assert [[*map(lambda s: list(s) if isinstance(s, list) else s, one)] for one in seen] == [
        [[True, False], False],
        [[True, False], False, False],
    ]


@both
def test_a_list_of_gradients_has_one_for_each_tensor(library: Any) -> None:
    op = make(
        library,
        lambda a, b, c: a[0] + b[0] + c,
        schema="(Tensor[] a, Tensor[] b, Tensor c) -> Tensor",
    )
    x, y, z, w = (torch.ones(2, requires_grad=True) for _ in range(4))
    for gradients, message in (
        # Four, as there are tensors.
        (lambda g: ([g], [g, g], g), "1 gradients for a, expected a list of 2"),
        (lambda g: (g, [g], g), "one gradient for a, expected a list of 2"),
        (lambda g: ([g, g], [g], [g]), "1 gradients for c, expected one"),
        (lambda g: ([g, g], [g], (g,)), "1 gradients for c, expected one"),
    ):
        op.register_autograd(lambda ctx, g, gradients=gradients: gradients(g))
        with pytest.raises(RuntimeError, match=f"structure|{message}"):
            op([x, y], [z], w).sum().backward()
    op.register_autograd(lambda ctx, g: ([None, 2 * g], [3 * g], 4 * g))
    found = torch.autograd.grad(op([x, y], [z], w).sum(), (y, z, w))
    assert [g.tolist() for g in found] == [[2, 2], [3, 3], [4, 4]]


# Compiled autograd


class Asked(NamedTuple):
    """An operator, and a loss of it and of two vectors, which compiled autograd differentiates."""

    schema: str
    kernel: Any
    backward: Any
    loss: Any
    setup_context: Any = None

    def made(self, library: Any) -> Any:
        op = make(library, self.kernel, schema=self.schema)
        op.register_fake(self.kernel)
        op.register_autograd(self.backward, setup_context=self.setup_context)
        return lambda x, y: self.loss(op, x, y)


def save_inputs(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def keep_second(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.second = inputs[1]


def keep_keyword(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    ctx.times = keyword_only_inputs["times"]


def mark_second(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.mark_non_differentiable(output[1])


def two_and_four_times(x: Tensor) -> tuple[Tensor, Tensor]:
    return 2 * x, 4 * x[1:].float()


def gradient_of_two_and_four_times(ctx: Any, g: Tensor, h: Tensor) -> Tensor:
    return 2 * g + torch.nn.functional.pad(4 * h.double(), (1, 0))


def undefined(t: Tensor) -> Tensor:
    """``t``, for which autograd passes on no gradient."""
    return torch._C._functions.UndefinedGrad()(t)


ASKED = {
    "saved tensors": Asked(
        "(Tensor x, Tensor y) -> Tensor",
        lambda x, y: x.sin() * y,
        lambda ctx, g: (g * ctx.saved_tensors[0].cos() * ctx.saved_tensors[1], g * 0.5),
        lambda op, x, y: op(op(x, y), y) * x,
        save_inputs,
    ),
    "no setup_context": Asked(
        "(Tensor x) -> Tensor", double, lambda ctx, g: 2 * g, lambda op, x, y: op(x * y)
    ),
    "attributes": Asked(
        "(Tensor x, float a=2.) -> Tensor",
        lambda x, a=2.0: a * x,
        lambda ctx, g: (ctx.second * g, None),
        lambda op, x, y: op(x, len(x) + 0.5) + op(x, 3.0) * op(y),
        keep_second,
    ),
    "keyword-only": Asked(
        "(Tensor x, *, int times=3) -> Tensor",
        lambda x, *, times=3: times * x,
        lambda ctx, g: ctx.times * g,
        lambda op, x, y: op(x, times=5) + op(y),
        keep_keyword,
    ),
    "None": Asked(
        "(Tensor x, Tensor? y=None) -> Tensor",
        lambda x, y=None: 2 * x if y is None else x * y,
        lambda ctx, g: (2 * g, None) if ctx.second is None else (g * ctx.second, g),
        lambda op, x, y: op(x) + op(x, y) + op(x, None),
        keep_second,
    ),
    "lists": Asked(
        "(Tensor[] xs, Tensor y) -> Tensor[]",
        lambda xs, y: [(i + 2) * x * y for i, x in enumerate(xs)],
        lambda ctx, gs: ([(i + 2) * g * ctx.second for i, g in enumerate(gs)], sum(gs)),
        lambda op, x, y: op([x, y, y], x)[1] * op([y] * len(x), y)[-1],
        keep_second,
    ),
    "a list with None": Asked(
        "(Tensor x, Tensor?[] ys) -> Tensor",
        lambda x, ys: x + sum(y for y in ys if y is not None),
        lambda ctx, g: (2 * g, [3 * g, None]),
        lambda op, x, y: op(x, [y, None]),
    ),
    "needs_input_grad": Asked(
        "(Tensor x, Tensor[] ys) -> Tensor",
        lambda x, ys: 2 * x + 3 * ys[0],
        lambda ctx, g: (
            2 * g if ctx.needs_input_grad[0] else None,
            [3 * g if needed else None for needed in ctx.needs_input_grad[1]],
        ),
        lambda op, x, y: op(x, [y]) * op(x.detach(), [y]) * op(x, [y.detach(), y.detach()]),
    ),
    **{
        f"result {i} of two": Asked(
            "(Tensor x) -> (Tensor, Tensor)",
            two_and_four_times,
            gradient_of_two_and_four_times,
            lambda op, x, y, i=i: op(x)[i] * y[1:].sum(),
        )
        for i in (0, 1)
    },
    "both results": Asked(
        "(Tensor x) -> (Tensor, Tensor)",
        two_and_four_times,
        gradient_of_two_and_four_times,
        lambda op, x, y: sum(t.sum() for t in op(x * y)) * y,
    ),
    "no result with a gradient": Asked(
        "(Tensor x) -> (Tensor, Tensor)",
        two_and_four_times,
        gradient_of_two_and_four_times,
        lambda op, x, y: undefined(op(2 * x)[0]) * y + x,
    ),
    "gradients that are not materialized": Asked(
        "(Tensor x) -> (Tensor, Tensor)",
        two_and_four_times,
        lambda ctx, g, h: 2 * g if h is None else None,
        lambda op, x, y: op(x * y)[0],
        lambda ctx, inputs, output: ctx.set_materialize_grads(False),
    ),
    "a result marked as non-differentiable": Asked(
        "(Tensor x) -> (Tensor, Tensor)",
        lambda x: (2 * x, x.sign()),
        lambda ctx, g, _: 2 * g,
        lambda op, x, y: op(x)[0] * op(x)[1] * y,
        mark_second,
    ),
    "integers": Asked(
        "(Tensor x) -> (Tensor, Tensor, SymInt)",
        lambda x: (2 * x, x.argsort(), x.shape[0]),
        lambda ctx, g, *_: 2 * g,
        lambda op, x, y: op(x)[0] * op(y)[1] * op(x)[2],
    ),
    "complex": Asked(
        "(Tensor x, Tensor y) -> Tensor",
        lambda x, y: x * y,
        lambda ctx, g: (g * ctx.saved_tensors[1].conj(), g * ctx.saved_tensors[0].conj()),
        lambda op, x, y: op(torch.complex(x, y), torch.complex(y, 2 * x)).imag,
        save_inputs,
    ),
    "no gradient of one argument": Asked(
        "(Tensor x, Tensor y) -> Tensor",
        lambda x, y: x + y.sign(),
        lambda ctx, g: (g, None),
        lambda op, x, y: op(x, y) * x,
    ),
}


def vectors(size: int) -> tuple[Tensor, Tensor]:
    x, y = (torch.linspace(start, 2, size, dtype=torch.float64) for start in (-1, 1))
    return x.requires_grad_(), y.requires_grad_()


def eagerly(loss: Any) -> None:
    loss().backward()


def uncompiled(loss: Any) -> None:
    """By compiled autograd, whose graph is called as it is."""
    y = loss()
    with torch._dynamo.compiled_autograd._enable(lambda graph: graph):
        y.backward()


def compiling(backend: str, compiles_forward: bool) -> Any:
    def compile_graph(graph: Any) -> Any:
        return torch.compile(graph, backend=backend, fullgraph=True, dynamic=True)

    def way(loss: Any) -> None:
        with torch._dynamo.compiled_autograd._enable(compile_graph):
            (torch.compile(loss, backend=backend)() if compiles_forward else loss()).backward()

    return way


def configured(loss: Any) -> None:
    """Forward and backward in one compiled function, as PyTorch's setting has it."""
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda: loss().backward(), backend="eager")()


WAYS = {
    "uncompiled": uncompiled,
    "eager forward": compiling("aot_eager", False),
    "compiled forward": compiling("aot_eager", True),
    "by the setting": configured,
    "by Inductor": compiling("inductor", True),
}
of_pytorch = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
# The compiler takes half a second for an operator, a compiled forward three, and Inductor ten.
QUICK = [("uncompiled", name) for name in ASKED] + [("eager forward", "keyword-only")]
FEW = ("attributes", "lists", "result 0 of two", "integers")
LONG = [("eager forward", name) for name in ASKED if name != "keyword-only"]
LONG += [(way, name) for way in ("compiled forward", "by the setting") for name in FEW]
LONG += [("by Inductor", "lists")]
OF_PYTORCH = [(way, "lists") for way in ("eager forward", "compiled forward", "by the setting")]


@of_pytorch
@pytest.mark.parametrize(
    "way, name, library",
    [
        *(pytest.param(*one, torchpar.library, id=f"{'-'.join(one)}-torchpar") for one in QUICK),
        *(
            pytest.param(*one, library, marks=pytest.mark.slow, id=f"{'-'.join(one)}-{of}")
            for library, of, ways in (
                (torchpar.library, "torchpar", LONG),
                (torch.library, "torch", [*QUICK, *OF_PYTORCH]),
            )
            for one in ways
        ),
    ],
)
def test_compiled_autograd(library: Any, way: str, name: str) -> None:
    loss = ASKED[name].made(library)
    if library is torch.library and name == "a list with None":
        with pytest.raises(RuntimeError, match="structure"):
            eagerly(lambda: loss(*vectors(3)).sum())
        return
    if way != "uncompiled":
        torch.compiler.reset()
    for size in (3, 5):
        actual, expected = vectors(size), vectors(size)
        WAYS[way](lambda xs=actual: loss(*xs).sum())
        eagerly(lambda xs=expected: loss(*xs).sum())
        for x, y in zip(actual, expected, strict=True):
            assert (x.grad is None) == (y.grad is None)
            if x.grad is not None:
                # Other operators run by Inductor.
                bound = 1e-12 if way == "by Inductor" else 0
                torch.testing.assert_close(x.grad, y.grad, rtol=bound, atol=bound)


@of_pytorch
@both
def test_compiled_autograd_cannot_add_none_to_a_gradient(library: Any) -> None:
    """PyTorch's graph adds what backward returned; docs/citizen.md says to return zeros."""
    op = make(library, lambda x, y: x + y, schema="(Tensor x, Tensor y) -> Tensor")
    x, y = vectors(3)
    op.register_autograd(lambda ctx, g: (g, None))
    with pytest.raises(TypeError, match="must be Tensor, not NoneType"):
        uncompiled(lambda: (op(x, y) * y).sum())
    op.register_autograd(lambda ctx, g: (g, torch.zeros_like(g)))
    uncompiled(lambda: (op(x, y) * y).sum())
    assert y.grad is not None
    assert torch.equal(y.grad, x + y)


@of_pytorch
@both
def test_compiled_autograd_names_an_operator_without_a_backward(library: Any) -> None:
    op, x = make(library), torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match=f"Trying to backward through .*{op._name}"):
        uncompiled(lambda: op(x).sum())


# Definitions


@both
def test_tags(library: Any) -> None:
    for tags in (
        torch.Tag.pointwise,
        [torch.Tag.pointwise],
        (torch.Tag.pt2_compliant_tag, torch.Tag.pointwise),
    ):
        found = make(library, tags=tags)._opoverload.tags
        assert {torch.Tag.pointwise, torch.Tag.pt2_compliant_tag} <= set(found)


@both
def test_overloads_of_a_name(library: Any) -> None:
    name = next(NAMES)
    one = library.custom_op(name, double, mutates_args=())
    two = library.custom_op(
        f"{name}.two", lambda x, y: x + y, mutates_args=(), schema="(Tensor x, Tensor y) -> Tensor"
    )
    x, packet = torch.ones(2), getattr(torch.ops.library_anchor, name.partition("::")[2])
    assert [
        f(*a).tolist() for f, a in ((one, (x,)), (two, (x, x)), (packet, (x,)), (packet, (x, x)))
    ] == [[2, 2]] * 4


@both
def test_factories(library: Any) -> None:
    def ones(device: torch.device) -> Tensor:
        return torch.ones(2, device=device)

    op = make(library, ones, device_types="cpu")
    assert op(device="cpu").tolist() == op("cpu").tolist() == [1, 1]
    with pytest.raises(RuntimeError, match="does not have a kernel registered for cuda"):
        op("cuda")
    with pytest.raises(ValueError, match=r"device: torch\.device"):
        make(library, lambda: torch.ones(2), device_types="cpu", schema="() -> Tensor")


def test_a_factory_with_a_default_device_runs_its_kernel() -> None:
    """PyTorch passes no argument on that equals its default, and its own rule has an IndexError
    there."""
    schema = '(int n, Device? device="cuda") -> Tensor'
    op = make(
        torchpar.library, lambda n, device=None: torch.ones(n), device_types="cpu", schema=schema
    )
    op.register_kernel("cuda")(lambda n, device=None: torch.full((n,), 2.0))
    assert [op(1).item(), op(1, "cuda").item(), op(1, "cpu").item(), op(1, None).item()] == [
        2,
        2,
        1,
        1,
    ]


@both
def test_keyword_only_tensors_are_refused(library: Any) -> None:
    for kind in ("Tensor", "Tensor?", "Tensor[]"):
        with pytest.raises(NotImplementedError, match="only"):
            make(library, double, schema=f"(Tensor x, *, {kind} y) -> Tensor")


def test_results_that_alias_arguments_are_refused_at_the_definition() -> None:
    def definitions() -> Any:
        yield {"schema": "(Tensor(a) x) -> Tensor(a)"}
        yield {"schema": "(Tensor(a!) x) -> Tensor(a!)", "mutates_args": {"x"}}
        yield from (
            {"tags": getattr(torch.Tag, n)} for n in ("inplace", "out") if hasattr(torch.Tag, n)
        )

    for how in definitions():
        with pytest.raises(NotImplementedError, match="a result is an argument or a view of one"):
            make(torchpar.library, **how)


@both
def test_an_error_about_aliasing_names_the_operator_and_the_module(library: Any) -> None:
    op = make(library, lambda x: x, schema="(Tensor x) -> Tensor")
    # That of PyTorch's own wrapper.
    module = __name__ if library is torchpar.library else "custom_ops"
    with pytest.raises(RuntimeError, match=rf"{op._name} .*{module}.* may not alias"):
        op(torch.ones(2))


@both
def test_defaults_of_every_type(library: Any) -> None:
    seen: list[Any] = []

    def function(
        x: Tensor,
        a: int | None = None,
        b: float = 3.14,
        c: bool = True,
        d: int = 3,
        e: str = "foo",
        f: torch.dtype = torch.float,
        g: torch.dtype | None = None,
        h: torch.device = torch.device("cpu:0"),  # noqa: B008  # a default of the schema
    ) -> Tensor:
        seen.append((a, b, c, d, e, f, g, h))
        return x.clone()

    op = make(library, function)
    op(torch.ones(2))
    assert seen == [(None, 3.14, True, 3, "foo", torch.float, None, torch.device("cpu:0"))]


# Registration again, by the object, the name and the overload


@both
def test_rules_are_replaced(library: Any) -> None:
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return func(*args, **(kwargs or {}))

    op, x = make(library), torch.ones(2)
    for factor in (3.0, 4.0):
        op.register_torch_dispatch(
            Mode, lambda mode, func, types, args, kwargs, f=factor: args[0] * f
        )
        op.register_fake(lambda x, n=int(factor): x.new_empty(n))
        op.register_vmap(lambda info, in_dims, x, f=factor: (x * f, in_dims[0]))
        with Mode():
            assert op(x).tolist() == [factor] * 2
        with FakeTensorMode():
            assert op(torch.empty(2)).shape == (factor,)
        assert torch.func.vmap(op)(x[None]).tolist() == [[factor] * 2]


@both
@pytest.mark.parametrize("by", ["object", "name", "overload"])
def test_rules_are_registered_by_object_name_and_overload(library: Any, by: str) -> None:
    op = make(library)
    target = {"object": op, "name": op._qualname, "overload": op._opoverload}[by]
    torch.library.register_fake(target, lambda x: x.new_empty(7))
    torch.library.register_vmap(target, lambda info, in_dims, x: (x * 5, in_dims[0]))
    torch.library.register_autograd(target, lambda ctx, g: g * 3)
    torch.library.register_kernel(target, "cpu", lambda x: x * 4)
    torch.library.register_autocast(target, "cpu", torch.float16)
    x = torch.ones(2, requires_grad=True)
    y = op(x)
    y.sum().backward()
    assert (y.tolist(), x.grad.tolist()) == ([4, 4], [3, 3])
    assert torch.func.vmap(op)(torch.ones(1, 2)).tolist() == [[5, 5]]
    with FakeTensorMode():
        assert op(torch.empty(2)).shape == (7,)
    with torch.autocast("cpu"):
        assert op(x).dtype == torch.float16
    if library is torchpar.library:  # the derivative is also that of forward mode
        assert torch.func.jvp(op, (torch.ones(2),), (torch.ones(2),))[1].tolist() == [3, 3]


@both
def test_a_definition_replaces_the_one_by_the_other_library(library: Any) -> None:
    name = next(NAMES)
    for one in (torch.library, torchpar.library, library):
        op = one.custom_op(name, double, mutates_args=())
    assert op(torch.ones(2)).tolist() == [2, 2]


# Operators of Triton kernels


def scaled(x: Tensor, by: float = 2.0) -> Tensor:
    return x * by


def write_scaled(x: Tensor, by: float = 2.0) -> None:
    x.mul_(by)


def graph_of(function: Any, *args: Any) -> str:
    """The names of the operators of a compiled function, below autograd."""
    names: list[str] = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch.compile(function, backend=aot_autograd(fw_compiler=record), fullgraph=True)(*args)
    return " ".join(names)


@both_compiled
def test_a_compiler_looks_into_a_triton_op(library: Any) -> None:
    op, x = library.triton_op(next(NAMES), scaled, mutates_args=()), torch.ones(3)
    assert op(x).tolist() == [2, 2, 2]
    assert op(x, 3.0).tolist() == op(x, by=3.0).tolist() == [3, 3, 3]
    assert graph_of(lambda x: op(x, 3.0), x) == "aten.mul.Tensor"
    assert op._qualname.replace("::", ".") in str(torch.export.export(Call(op), (x,)).graph)
    torch.library.opcheck(op, (x,), test_utils=("test_schema", "test_faketensor"))


class Call(torch.nn.Module):
    def __init__(self, op: Any):
        super().__init__()
        self.op = op

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


@both_compiled
def test_a_triton_op_that_writes(library: Any) -> None:
    op, x = library.triton_op(next(NAMES), write_scaled, mutates_args={"x"}), torch.ones(3)
    op(x)
    assert (x.tolist(), x._version > 0) == ([2, 2, 2], True)
    y = torch.ones(3)
    torch.compile(lambda y: op(y, 3.0), backend="aot_eager", fullgraph=True)(y)
    assert y.tolist() == [3, 3, 3]


@both_compiled
def test_derivatives_of_a_triton_op(library: Any) -> None:
    op, x = (
        library.triton_op(next(NAMES), scaled, mutates_args=()),
        torch.ones(3, requires_grad=True),
    )
    with pytest.raises(RuntimeError, match="Trying to backward through"):
        op(x).sum().backward()

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.by = inputs[1]

    op.register_autograd(lambda ctx, g: (g * ctx.by, None), setup_context=setup_context)
    for function in (
        op,
        torch.compile(lambda x, by=2.0: op(x, by), backend="aot_eager", fullgraph=True),
    ):
        for by in (2.0, 5.0):
            assert torch.autograd.grad(function(x, by).sum(), x)[0].tolist() == [by] * 3
    op.register_autograd(lambda ctx, g: (g, None, None), setup_context=setup_context)
    with pytest.raises(RuntimeError, match="expected 2, got 3"):
        op(x, 5.0).sum().backward()


@both
def test_a_triton_op_has_kernels_for_other_devices(library: Any) -> None:
    op = library.triton_op(next(NAMES), scaled, mutates_args=())
    op.register_kernel("cpu")(lambda x, by=2.0: x + 10 * by)
    assert op(torch.ones(1)).item() == 21
    assert op(torch.ones(1, device="meta")).shape == (1,)


def test_a_compiler_does_not_look_past_the_kernel_of_a_device() -> None:
    op = torchpar.library.triton_op(next(NAMES), scaled, mutates_args=())
    op.register_kernel("cpu")(lambda x, by=2.0: x + 10 * by)
    compiled = torch.compile(lambda x: op(x), backend="aot_eager", fullgraph=True)
    assert compiled(torch.ones(1)).item() == 21  # by PyTorch's triton_op it is 2


def test_a_compiler_finds_the_device_of_tensors_in_a_list() -> None:
    def double(xs: list[Tensor]) -> Tensor:
        return 2 * xs[0]

    op = torchpar.library.triton_op(next(NAMES), double, mutates_args=())
    op.register_kernel("cpu")(lambda xs: xs[0] + 20)
    compiled = torch.compile(lambda x: op([x]), backend="aot_eager", fullgraph=True)
    assert compiled(torch.ones(1)).item() == 21
