# SPDX-License-Identifier: MIT
"""Operators after public reports of faults of PyTorch's custom operators."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.experimental import register_sharding
from torch.utils.checkpoint import checkpoint

import torchpar

slow = pytest.mark.slow
BACKENDS = ["aot_eager", "inductor"]


@torchpar.library.custom_op("reported::scaled", mutates_args=())
def scaled(x: Tensor, scale: Tensor) -> Tensor:
    return x * scale


@torchpar.library.custom_op("reported::gram", mutates_args=())
def gram(x: Tensor, shift: Tensor) -> Tensor:
    y = x @ x.T
    y += shift
    return y


scaled.register_fake(lambda x, scale: torch.empty_like(x))
gram.register_fake(lambda x, shift: x.new_empty(len(x), len(x)))


def save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def gradient_of_scaled(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
    """The scale counts as a constant."""
    return g * ctx.saved_tensors[1], None


def gradient_of_gram(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
    return (g + g.T) @ ctx.saved_tensors[0], g


scaled.register_autograd(gradient_of_scaled, setup_context=save)
gram.register_autograd(gradient_of_gram, setup_context=save)


@slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_tensor_in_two_places_has_the_gradient_of_each(backend):
    """A compiler lost that of one place (pytorch#181146, pytorch#183604)."""

    def loss(x):
        y = 3 * x
        return scaled(y, y).sum() + scaled(x, y).sum()

    x = torch.tensor([1.0, -2.0, 5.0], requires_grad=True)
    for f in (loss, torch.compile(loss, backend=backend, fullgraph=True)):
        # Of 9x² only the first factor counts, which gives 9x. The second term adds 3x.
        assert torch.equal(*torch.autograd.grad(f(x), x), 12 * x.detach())


@slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_result_that_was_made_in_place_has_its_gradient(backend):
    """A compiler took the version before the change (pytorch#180642)."""

    def loss(x, shift):
        y = gram(x, shift)
        y += 1
        return (y * y).sum()

    x = torch.tensor([[1.0, 2.0], [0.0, -1.0]], requires_grad=True)
    shift = torch.tensor([[3.0, 0.0], [1.0, -2.0]], requires_grad=True)
    g = 2 * (x @ x.T + shift + 1).detach()
    for f in (loss, torch.compile(loss, backend=backend, fullgraph=True)):
        found = torch.autograd.grad(f(x, shift), (x, shift))
        assert torch.equal(found[0], (g + g.T) @ x.detach())
        assert torch.equal(found[1], g)


@slow
def test_forward_mode_goes_through_a_batch():
    """PyTorch refused the tangents of a batch (pytorch#182842)."""
    gram.register_vmap(lambda info, dims, x, shift: (x @ x.mT + shift, 0))
    x = torch.arange(12.0).reshape(3, 2, 2)
    tangent, shift = torch.ones_like(x), torch.eye(2)
    batched = torch.func.vmap(gram, (0, None))
    value, found = torch.func.jvp(lambda x: batched(x, shift), (x,), (tangent,))
    assert torch.equal(value, x @ x.mT + shift)
    assert torch.equal(found, tangent @ x.mT + x @ tangent.mT)


@slow
def test_pytorch_cannot_shard_a_list_of_results(world):
    """When it can (pytorch#191488), let `CustomOpDef.register_sharding` take lists, too."""

    @torch.library.custom_op("reported::doubles", mutates_args=())
    def doubles(xs: list[Tensor]) -> list[Tensor]:
        return [2 * x for x in xs]

    doubles.register_fake(lambda xs: [torch.empty_like(x) for x in xs])

    @register_sharding(torch.ops.reported.doubles.default)
    def _(xs):
        return [([Replicate()] * len(xs), [Replicate()] * len(xs))]

    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    x: DTensor = distribute_tensor(torch.ones(4), mesh, [Replicate()])
    with pytest.raises((RuntimeError, AssertionError)):
        doubles([x, x])


@torchpar.library.custom_op("reported::reverse", mutates_args=("target",))
def reverse(source: Tensor, target: Tensor) -> None:
    for n, one in enumerate(source):
        target[len(target) - 1 - n] = one


@slow
def test_workarounds_keep_the_clone_of_a_tensor_that_an_operator_writes():
    """Inductor leaves the clone out (pytorch#198031), as docs/errors.md says."""

    def writes(x):
        reverse(x.clone(), x)
        return 2 * x

    def copies(x):
        before, made = x.clone(), torch.empty_like(x)
        reverse(before, made)
        x.copy_(made)
        return 2 * x

    x = torch.arange(8.0)
    expected = 2 * x.flip(0)
    assert torch.equal(writes(x.clone()), expected)
    assert torch.equal(torch.compile(copies, fullgraph=True)(x.clone()), expected)
    found = torch.compile(writes, fullgraph=True)(x.clone())
    assert not torch.equal(found, expected), "torch mended pytorch#198031: change docs/errors.md"


@torchpar.library.custom_op("reported::rounded", mutates_args=())
def rounded(x: Tensor) -> Tensor:
    return x.round()


rounded.register_fake(lambda x: torch.empty_like(x))
rounded.register_autograd(lambda ctx, g: 3 * g)


@slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_torch_func_takes_the_rule_of_the_gradient(backend):
    """It took the function's derivative, and not that of autograd.Function (pytorch#193279)."""
    gradient = torch.func.grad(lambda x: rounded(x).sum())
    x = torch.tensor([0.2, 1.7])
    for f in (gradient, torch.compile(gradient, backend=backend, fullgraph=True)):
        assert torch.equal(f(x), torch.full((2,), 3.0))


@slow
@pytest.mark.parametrize("name", ["maximum", "matmul_t", "linear_sigmoid"])
def test_a_checkpoint_saves_what_hooks_have_copied(name):
    """Hooks copied what an operator had not yet written (pytorch#193671)."""
    functions = {
        "maximum": lambda x: torch.ops.torchpar.maximum(x, x.mT),
        "matmul_t": torch.ops.torchpar.matmul_t,
        "linear_sigmoid": lambda x: torch.ops.torchpar.linear_sigmoid(x, x, x[0]),
    }

    def loss(x):
        return functions[name](x).square().sum()

    def copies(x):
        with torch.autograd.graph.saved_tensors_hooks(Tensor.clone, lambda saved: saved):
            return loss(x)

    x = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (expected,) = torch.autograd.grad(loss(x), x)
    inside = checkpoint(copies, x, use_reentrant=False)
    with torch.autograd.graph.saved_tensors_hooks(Tensor.clone, lambda saved: saved):
        around = checkpoint(loss, x, use_reentrant=False)
    for found in (inside, around):
        assert torch.equal(*torch.autograd.grad(found, x), expected)
