# SPDX-License-Identifier: MIT
"""A right operator, A·Bᵀ, of which each faulty one replaces one part by a wrong one."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

library = torch.library.Library("torchpar_faulty", "DEF")


def kernel(a: Tensor, b: Tensor) -> Tensor:
    return a @ b.mT


def fake(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(*a.shape[:-1], b.shape[-2])


def setup_context(ctx: Any, a: Tensor, b: Tensor) -> None:
    ctx.save_for_backward(a, b)


def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
    a, b = ctx.saved_tensors
    return g @ b, g.mT @ a


def batch(op: Any, size: int, in_dims: Sequence[int | None], a: Tensor, b: Tensor) -> tuple[Tensor, int]:
    a, b = (
        t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
        for t, dim in zip((a, b), in_dims, strict=True)
    )
    return op(a, b), 0


def autocast(op: Any, dtype: torch.dtype, a: Tensor, b: Tensor) -> Tensor:
    return op(*(t if t.dtype == torch.float64 else t.to(dtype) for t in (a, b)))


def sharding(a: Any, b: Any) -> list[Any]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    return [
        ([Replicate()], [Replicate(), Replicate()]),
        ([Shard(0)], [Shard(0), Replicate()]),
        ([Partial()], [Shard(1), Shard(1)]),
    ]


RIGHT = {f.__name__: f for f in (kernel, fake, setup_context, backward, batch, autocast, sharding)} | {
    "formula": kernel
}


def make(name: str, **replaced: Callable[..., Any]) -> Any:
    """Register ``torch.ops.torchpar_faulty.<name>``, with other parts than the right ones."""
    part = RIGHT | replaced
    library.define(f"{name}(Tensor a, Tensor b) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, part["kernel"], "CompositeExplicitAutograd")
    qualified = f"torchpar_faulty::{name}"
    op = getattr(torch.ops.torchpar_faulty, name).default
    torch.library.register_fake(qualified, part["fake"], lib=library)

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
            part["setup_context"](ctx, a, b)
            with _AutoDispatchBelowAutograd():
                return op(a, b)

        backward = staticmethod(part["backward"])

    def autograd(a: Tensor, b: Tensor) -> Tensor:
        if peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
            return part["formula"](a, b)
        return Product.apply(a, b)

    library.impl(name, autograd, "Autograd")
    torch.library.register_vmap(
        qualified, lambda info, dims, *args: part["batch"](op, info.batch_size, dims, *args), lib=library
    )

    def autocast(a: Tensor, b: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu")
        with torch.autocast("cpu", enabled=False):
            return part["autocast"](op, dtype, a, b)

    library.impl(name, autocast, "AutocastCPU")
    from torch.distributed.tensor.experimental import register_sharding

    register_sharding(op)(part["sharding"])
    return op


# The faults, by the part that they replace


def transposed_fake(a: Tensor, b: Tensor) -> Tensor:
    return fake(b, a).mT


def float32_fake(a: Tensor, b: Tensor) -> Tensor:
    return fake(a, b).float()


def meta_fake(a: Tensor, b: Tensor) -> Tensor:
    return fake(a, b).to("meta")


def backward_without_b(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
    _, b = ctx.saved_tensors
    return g @ b, torch.zeros_like(b)


def backward_of_contiguous(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
    memory = torch.empty(0, dtype=g.dtype).set_(g.detach().untyped_storage())
    return backward(ctx, memory.repeat(g.numel())[: g.numel()].view(g.shape))


def backward_of_constants(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
    a, b = ctx.saved_tensors
    return g @ b.detach(), g.mT @ a.detach()


def kernel_that_writes(a: Tensor, b: Tensor) -> Tensor:
    result = a @ b.mT
    a.add_(1)
    return result


def kernel_that_returns_an_operand(a: Tensor, b: Tensor) -> Tensor:
    return a.mT.mT


def transposing_batch(op: Any, size: int, in_dims: Any, a: Tensor, b: Tensor) -> tuple[Tensor, int]:
    result, dim = batch(op, size, in_dims, a, b)
    return result.mT, dim


def doubling_batch(op: Any, size: int, in_dims: Any, a: Tensor, b: Tensor) -> tuple[Tensor, int]:
    result, dim = batch(op, size, in_dims, a, b)
    return result * 2, dim


def batch_of_both(op: Any, size: int, in_dims: Any, a: Tensor, b: Tensor) -> tuple[Tensor, int]:
    a, b = (
        t.movedim(dim or 0, 0).reshape(size, -1, t.shape[-1]) for t, dim in zip((a, b), in_dims, strict=True)
    )
    return op(a, b), 0


def sharding_without_sum(a: Any, b: Any) -> list[Any]:
    from torch.distributed.tensor import Replicate, Shard

    return [*sharding(a, b)[:2], ([Replicate()], [Shard(1), Shard(1)])]


def sharding_of_both(a: Any, b: Any) -> list[Any]:
    from torch.distributed.tensor import Shard

    return [*sharding(a, b), ([Shard(0)], [Shard(0), Shard(0)])]


def backward_of_shards(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
    a, b = backward(ctx, g)
    return (a, b * 2) if hasattr(g, "placements") else (a, b)


def noisy_kernel(a: Tensor, b: Tensor) -> Tensor:
    return a @ b.mT + 1e-14 * torch.rand(()).to(a)


def contiguous_kernel(a: Tensor, b: Tensor) -> Tensor:
    return kernel(*(t.as_strided(t.shape, torch.empty(t.shape).stride()) for t in (a, b)))


def bfloat16_autocast(op: Any, dtype: torch.dtype, a: Tensor, b: Tensor) -> Tensor:
    return autocast(op, torch.bfloat16, a, b)


def careless_context(ctx: Any, a: Tensor, b: Tensor) -> None:
    ctx.saved_tensors_of_mine = a, b


def careless_backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
    a, b = ctx.saved_tensors_of_mine
    return g @ b, g.mT @ a


def overflowing_kernel(a: Tensor, b: Tensor) -> Tensor:
    return (1e4 * a) @ (1e4 * b).mT / 1e8


def widening_kernel(a: Tensor, b: Tensor) -> Tensor:
    return a.double() @ b.double().mT


def kernel_of_the_first(a: Tensor, b: Tensor) -> Tensor:
    first = a.flatten().tolist()[0]  # an IndexError if it is empty
    return a @ b.mT + 0 * first


def negative_formula(a: Tensor, b: Tensor) -> Tensor:
    return -(a @ b.mT)


# By name: the parts that are replaced, the rule that finds it, its outcome, and words of its detail.
FAULTS: dict[str, tuple[dict[str, Callable[..., Any]], str, str, str]] = {
    "strides_of_the_fake": ({"fake": transposed_fake}, "fake tensors", "wrong", "strides"),
    "dtype_of_the_fake": ({"fake": float32_fake}, "fake tensors", "wrong", "dtype"),
    "device_of_the_fake": ({"fake": meta_fake}, "fake tensors", "wrong", "device"),
    "missing_gradient": ({"backward": backward_without_b}, "gradcheck", "wrong", "Jacobian"),
    "strides_of_the_gradient": (
        {"backward": backward_of_contiguous},
        "incoming gradients of any layout",
        "wrong",
        "transposed",
    ),
    "second_derivative": ({"backward": backward_of_constants}, "gradgradcheck", "wrong", "Jacobian"),
    "undeclared": ({"kernel": kernel_that_writes}, "schema", "wrong", "opcheck"),
    "writes": ({"kernel": kernel_that_writes}, "operands and results", "wrong", "operand 0 is written to"),
    "alias": (
        {"kernel": kernel_that_returns_an_operand},
        "operands and results",
        "wrong",
        "memory of operand 0",
    ),
    "transposing_vmap": ({"batch": transposing_batch}, "vmap over all operands", "wrong", "shape"),
    "doubling_vmap": ({"batch": doubling_batch}, "vmap over one operand", "wrong", "off by"),
    "vmap_of_both": ({"batch": batch_of_both}, "vmap over one operand", "wrong", "shape"),
    "missing_sum": ({"sharding": sharding_without_sum}, "DTensor", "wrong", "off by"),
    "wrong_shards": ({"sharding": sharding_of_both}, "DTensor", "wrong", "shape"),
    "gradients_of_shards": ({"backward": backward_of_shards}, "DTensor", "wrong", "off by"),
    "noise": ({"kernel": noisy_kernel}, "same bits twice", "wrong", "other bits"),
    "contiguous_operands": ({"kernel": contiguous_kernel}, "layouts and sizes", "wrong", "transposed"),
    "autocast_to_one_dtype": ({"autocast": bfloat16_autocast}, "autocast", "wrong", "expected torch.float16"),
    "unsaved": (
        {"setup_context": careless_context, "backward": careless_backward},
        "changes after the call",
        "wrong",
        "of operands",
    ),
    "overflow": ({"kernel": overflowing_kernel}, "low precision", "wrong", "torch.float16"),
    "promotion": ({"kernel": widening_kernel}, "low precision", "wrong", "dtype torch.float64"),
    "formula": ({"formula": negative_formula}, "torch.func: vjp", "wrong", "off by"),
    "empty": ({"kernel": kernel_of_the_first}, "layouts and sizes", "crashes", "IndexError"),
}
