# SPDX-License-Identifier: MIT
"""Nodes that C++ adds to autograd's graph: hooks, errors and ends as of PyTorch's own nodes."""

import gc
import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from playing import needs_cpp, played, playing
from torch import Tensor

from torchpar.library import triton_op

pytestmark = needs_cpp
overrides = pytest.mark.filterwarnings("ignore:Warning only once for all operators")  # 2.11
NAMES = (f"player_graph_tests::op{i}" for i in itertools.count())


@pytest.fixture(autouse=True)
def by_cpp() -> Iterator[None]:
    with playing():
        yield


def square() -> Any:
    """y = x², which saves x."""
    op = triton_op(next(NAMES), lambda x: x * x, mutates_args=(), trusted=True, schema=ONE)

    def save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    op.register_autograd(lambda ctx, g: 2 * g * ctx.saved_tensors[0], setup_context=save)
    return warm(op)


def root() -> Any:
    """y = √x, which saves y."""
    op = triton_op(next(NAMES), lambda x: x.sqrt(), mutates_args=(), trusted=True, schema=ONE)

    def save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    op.register_autograd(lambda ctx, g: g / (2 * ctx.saved_tensors[0]), setup_context=save)
    return warm(op)


ONE = "(Tensor x) -> Tensor"


def leaf() -> Tensor:
    return torch.tensor([1.0, 4.0, 9.0], requires_grad=True)


def warm(op: Any) -> Any:
    """The operator, whose next calls and gradients for a `leaf` are played."""
    for _ in range(3):
        op(leaf()).sum().backward()
    return op


def play(op: Any, x: Tensor) -> Tensor:
    y, tapes, missed = played(lambda: op(x))
    assert (tapes, missed) == (1, 0)
    return y  # type: ignore[no-any-return]


def gradient(y: Tensor, x: Tensor, scale: float = 1.0, **options: Any) -> Tensor:
    return torch.autograd.grad(y, x, torch.full_like(y, scale), **options)[0]


def test_a_node_has_the_operators_name():
    y = play(square(), leaf())
    assert y.grad_fn.name().startswith("GeneratedBackwardFor_player_graph_tests_op")
    assert y.grad_fn.name().endswith("_defaultBackward")
    assert [edge[0].name() for edge in y.grad_fn.next_functions] == [
        "torch::autograd::AccumulateGrad"
    ]


@pytest.mark.parametrize("make", [square, root])
def test_saved_tensors_end_with_the_first_gradient(make):
    x, op = leaf(), make()
    y = play(op, x)
    right = gradient(y, x, retain_graph=True)
    assert torch.equal(gradient(y, x), right)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        gradient(y, x)


@pytest.mark.parametrize("make, of_result", [(square, False), (root, True)])
def test_a_saved_tensor_that_was_changed_is_an_error(make, of_result):
    x = leaf()
    y = play(make(), x)
    with torch.no_grad():
        (y if of_result else x).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient(y, x)


def test_a_saved_result_keeps_no_cycle():
    class Hook:
        def __call__(self, grads: object) -> None: ...

    y, hook = play(root(), leaf()), Hook()
    y.grad_fn.register_prehook(hook)  # which ends with the node
    alive = weakref.ref(hook)
    gc.disable()
    try:
        del hook
        assert alive() is not None
        del y
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("make", [square, root])
def test_second_gradients_are_right(make):
    x = leaf().double().detach().requires_grad_()
    op = make()
    for _ in range(3):
        assert torch.autograd.gradcheck(op, x)
        assert torch.autograd.gradgradcheck(op, x)


def test_hooks_see_what_is_saved_and_the_gradients():
    op, x, packed, seen = square(), leaf(), [], []

    def pack(t: Tensor) -> Tensor:
        packed.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: 3 * t):
        y = op(x)
    y.grad_fn.register_hook(lambda inputs, outputs: seen.append((inputs, outputs)))
    assert torch.equal(gradient(y, x), 6 * x)
    assert packed[0] is x
    (((g,), (of_result,)),) = seen
    assert torch.equal(g, 6 * x)
    assert torch.equal(of_result, torch.ones(3))


def test_a_result_without_a_gradient_counts_as_zeros():
    op = triton_op(
        next(NAMES),
        lambda x: (x * x, x * 3),
        mutates_args=(),
        trusted=True,
        schema="(Tensor x) -> (Tensor, Tensor)",
    )

    def save(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs)

    op.register_autograd(lambda ctx, g, h: 2 * g * ctx.saved_tensors[0] + 3 * h, setup_context=save)
    for _ in range(4):
        for number, right in ((0, [2.0, 8.0, 18.0]), (1, [3.0, 3.0, 3.0])):
            x = leaf()
            found, tapes, _ = played(lambda: gradient(op(x)[number], x))  # noqa: B023
            assert found.tolist() == right
    assert tapes == 2


def test_a_result_of_integers_has_zeros_for_its_gradient():
    op = triton_op(
        next(NAMES),
        lambda x: (x * 2, x.argsort()),
        mutates_args=(),
        trusted=True,
        schema="(Tensor x) -> (Tensor, Tensor)",
    )
    op.register_autograd(lambda ctx, g, of_integers: 2 * g + 0 * of_integers)
    for _ in range(4):
        x = leaf()
        (y, order), tapes, _ = played(lambda: op(x))  # noqa: B023
        assert not order.requires_grad
        assert gradient(y, x).tolist() == [2, 2, 2]
    assert tapes == 1


@overrides
def test_an_argument_that_somebody_elses_kernel_returns_keeps_its_place():
    op = square()
    with torch.library._scoped_library("player_graph_tests", "IMPL") as library:
        library.impl(op._name, lambda x: x, "CPU")
        x = leaf()
        y = op(x)
        assert x.is_leaf
        assert torch.equal(gradient(y, x), 2 * x)


@overrides
def test_python_that_computes_sees_no_gradient():
    def cube(x: Tensor) -> Tensor:
        seen.append(torch.is_grad_enabled())
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            return gradient(z**3, z)

    op, seen = square(), []
    with torch.library._scoped_library("player_graph_tests", "IMPL") as library:
        library.impl(op._name, cube, "CPU")
        for x in (leaf(), leaf().detach()):
            assert torch.equal(op(x), 3 * x**2)
    assert seen[0] is False


def test_hooks_of_launches_that_a_hook_of_saved_tensors_adds_count():
    runtime = pytest.importorskip("triton", reason="the hooks are Triton's").knobs.runtime
    op, tapes = square(), []

    def pack(t: Tensor) -> Tensor:
        runtime.launch_enter_hook.add(print)
        try:
            tapes.append(played(lambda: getattr(torch.ops, space).__getattr__(name)(B))[1])
        finally:
            runtime.launch_enter_hook.remove(print)
        return t

    space, _, name = op._qualname.partition("::")
    B = leaf().detach()
    op(B)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        op(leaf())
    assert tapes == [0]


def test_a_gradient_with_a_derivative_of_forward_mode_keeps_it():
    op, x = square(), leaf()
    with torch.autograd.forward_ad.dual_level():
        g = torch.autograd.forward_ad.make_dual(torch.ones(3), torch.full((3,), 2.0))
        (found,) = torch.autograd.grad(op(x), x, g)
        tangent = torch.autograd.forward_ad.unpack_dual(found).tangent
    assert torch.equal(tangent, 4 * x)


def test_anomalies_name_the_forward_call():
    op, x = square(), leaf()
    with (
        pytest.warns(UserWarning, match="Anomaly Detection has been enabled"),
        torch.autograd.detect_anomaly(check_nan=True),
        pytest.warns(UserWarning, match="op = square|in test_anomalies_name_the_forward_call"),
        pytest.raises(RuntimeError, match=r"GeneratedBackwardFor.* returned nan values"),
    ):
        gradient(op(x), x, float("nan"))


def test_a_long_graph_ends_without_a_deep_stack():
    op = square()
    y = leaf().detach().mul_(0).add_(1).requires_grad_()
    for _ in range(30_000):
        y = op(y)
    del y


def test_compiled_autograd_follows_pythons_rule():
    op = square()
    for scale in (1.0, 2.0):
        x = leaf()
        y = play(op, x) * scale
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            y.sum().backward()
        assert torch.equal(x.grad, 2 * scale * x)
    torch._dynamo.reset()


def test_compiled_autograd_takes_zeros_of_the_size_at_hand():
    """For a result that nothing depends on, whose size is no other tensor's."""
    op = triton_op(
        next(NAMES),
        lambda x, n: (x * 2, x.new_zeros(n)),
        mutates_args=(),
        trusted=True,
        schema="(Tensor x, int n) -> (Tensor, Tensor)",
    )
    op.register_autograd(lambda ctx, g, unused: (2 * g * unused.shape[0], None))
    for n in (3, 4, 5):
        for _ in range(3):
            op(leaf(), n)[0].sum().backward()
    for n in (3, 4, 5):
        x = torch.ones(2 * n, requires_grad=True)
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            op(x, n)[0].sum().backward()
            assert x.grad.tolist() == 2 * n * [2 * n]
    torch._dynamo.reset()
