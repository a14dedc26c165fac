# SPDX-License-Identifier: MIT
"""A right operator, A·Bᵀ, of which each faulty one replaces one part by a wrong one."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchpar.library import custom_op


def kernel(a: Tensor, b: Tensor) -> Tensor:
    return a @ b.mT


def fake(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(*a.shape[:-1], b.shape[-2])


def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
    a, b = ctx.saved_tensors
    return g @ b, g.mT @ a


def batch(op: Any, size: int, in_dims: Sequence[int | None], a: Tensor, b: Tensor) -> tuple[Tensor, int]:
    a, b = (
        t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
        for t, dim in zip((a, b), in_dims, strict=True)
    )
    return op(a, b), 0


def sharding(a: Any, b: Any) -> list[Any]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    return [
        ([Replicate()], [Replicate(), Replicate()]),
        ([Shard(0)], [Shard(0), Replicate()]),
        ([Partial()], [Shard(1), Shard(1)]),
    ]


RIGHT = {f.__name__: f for f in (kernel, fake, setup_context, backward, batch, sharding)}
RIGHT |= {"formula": kernel, "autocast": lambda op: op.register_autocast()}


def make(name: str, **replaced: Callable[..., Any]) -> Any:
    """Register ``torch.ops.torchpar_faulty.<name>``, with other parts than the right ones."""
    part = RIGHT | replaced
    op = custom_op(f"torchpar_faulty::{name}", part["kernel"], mutates_args=())
    op.register_fake(part["fake"])
    op.register_autograd(part["backward"], setup_context=part["setup_context"], formula=part["formula"])
    op.register_vmap(lambda info, dims, *args: part["batch"](op, info.batch_size, dims, *args))
    part["autocast"](op)
    op.register_sharding(part["sharding"])
    return op


# The faults, by the part that they replace


def backward_without_b(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
    _, b = ctx.saved_tensors
    return g @ b, torch.zeros_like(b)


def backward_of_contiguous(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
    memory = torch.empty(0, dtype=g.dtype).set_(g.detach().untyped_storage())
    return backward(ctx, memory.repeat(g.numel())[: g.numel()].view(g.shape))


def backward_of_constants(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
    a, b = ctx.saved_tensors
    return g @ b.detach(), g.mT @ a.detach()


def backward_of_shards(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
    a, b = backward(ctx, g)
    return (a, b * 2) if hasattr(g, "placements") else (a, b)


def careless_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.saved_tensors_of_mine = inputs


def careless_backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
    a, b = ctx.saved_tensors_of_mine
    return g @ b, g.mT @ a


def kernel_that_writes(a: Tensor, b: Tensor) -> Tensor:
    result = a @ b.mT
    a.add_(1)
    return result


def noisy_kernel(a: Tensor, b: Tensor) -> Tensor:
    return a @ b.mT + 1e-14 * torch.rand(()).to(a)


def contiguous_kernel(a: Tensor, b: Tensor) -> Tensor:
    return kernel(*(t.as_strided(t.shape, torch.empty(t.shape).stride()) for t in (a, b)))


def overflowing_kernel(a: Tensor, b: Tensor) -> Tensor:
    return (1e4 * a) @ (1e4 * b).mT / 1e8


def widening_kernel(a: Tensor, b: Tensor) -> Tensor:
    return a.double() @ b.double().mT


def kernel_of_the_first(a: Tensor, b: Tensor) -> Tensor:
    first = a.flatten().tolist()[0]  # an IndexError if it is empty
    return a @ b.mT + 0 * first


def transposing_batch(*args: Any) -> tuple[Tensor, int]:
    result, dim = batch(*args)
    return result.mT, dim


def doubling_batch(*args: Any) -> tuple[Tensor, int]:
    result, dim = batch(*args)
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


LAYOUTS, GRADIENTS = "layouts and sizes", "incoming gradients of any layout"
# By name: the parts that are replaced, the rule that finds it, its outcome, and words of its detail.
FAULTS: dict[str, tuple[dict[str, Callable[..., Any]], str, str, str]] = {
    "strides_of_the_fake": ({"fake": lambda a, b: fake(b, a).mT}, "fake tensors", "wrong", "strides"),
    "dtype_of_the_fake": ({"fake": lambda a, b: fake(a, b).float()}, "fake tensors", "wrong", "dtype"),
    "device_of_the_fake": ({"fake": lambda a, b: fake(a, b).to("meta")}, "fake tensors", "wrong", "device"),
    "missing_gradient": ({"backward": backward_without_b}, "gradcheck", "wrong", "Jacobian"),
    "strides_of_the_gradient": ({"backward": backward_of_contiguous}, GRADIENTS, "wrong", "transposed"),
    "second_derivative": ({"backward": backward_of_constants}, "gradgradcheck", "wrong", "Jacobian"),
    "undeclared": ({"kernel": kernel_that_writes}, "schema", "wrong", "opcheck"),
    "writes": ({"kernel": kernel_that_writes}, "operands and results", "wrong", "operand 0 is written to"),
    "transposing_vmap": ({"batch": transposing_batch}, "vmap over all operands", "wrong", "shape"),
    "doubling_vmap": ({"batch": doubling_batch}, "vmap over one operand", "wrong", "off by"),
    "vmap_of_both": ({"batch": batch_of_both}, "vmap over one operand", "wrong", "shape"),
    "missing_sum": ({"sharding": sharding_without_sum}, "DTensor", "wrong", "off by"),
    "wrong_shards": ({"sharding": sharding_of_both}, "DTensor", "wrong", "shape"),
    "gradients_of_shards": ({"backward": backward_of_shards}, "DTensor", "wrong", "off by"),
    "noise": ({"kernel": noisy_kernel}, "same bits twice", "wrong", "other bits"),
    "contiguous_operands": ({"kernel": contiguous_kernel}, LAYOUTS, "wrong", "transposed"),
    "autocast_to_one_dtype": (
        {"autocast": lambda op: op.register_autocast("cpu", torch.bfloat16)},
        "autocast",
        "wrong",
        "expected torch.float16",
    ),
    "unsaved": (
        {"setup_context": careless_context, "backward": careless_backward},
        "changes after the call",
        "wrong",
        "of operands",
    ),
    "overflow": ({"kernel": overflowing_kernel}, "low precision", "wrong", "torch.float16"),
    "promotion": ({"kernel": widening_kernel}, "low precision", "wrong", "dtype torch.float64"),
    "formula": ({"formula": lambda a, b: -(a @ b.mT)}, "torch.func: vjp", "wrong", "off by"),
    "empty": ({"kernel": kernel_of_the_first}, LAYOUTS, "crashes", "IndexError"),
}
