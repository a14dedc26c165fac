# SPDX-License-Identifier: MIT
"""A right operator, A·Bᵀ, of which each faulty one replaces one part by a wrong one."""

import itertools
import os
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from samples import normal
from torch import Tensor

from torchpar.library import batch_first, custom_op


def kernel(a: Tensor, b: Tensor) -> Tensor:
    return a @ b.mT


def shape_of(a: Tensor, b: Tensor) -> tuple[int, ...]:
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return (*batch, *a.shape[-2:-1], b.shape[-2])


def fake(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(shape_of(a, b))


def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
    a, b = ctx.saved_tensors
    return g @ b.conj(), g.mT @ a.conj()


def batch(
    op: Any, size: int, in_dims: Sequence[int | None], *operands: Tensor
) -> tuple[Tensor, int]:
    return op(*(batch_first(t, dim, size) for t, dim in zip(operands, in_dims, strict=True))), 0


def sharding(a: Any, b: Any) -> list[Any]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    return [
        ([Replicate()], [Replicate(), Replicate()]),
        ([Shard(0)], [Shard(0), Replicate()]),
        ([Partial()], [Shard(1), Shard(1)]),
    ]


RIGHT = {f.__name__: f for f in (kernel, fake, setup_context, backward, batch, sharding)}
RIGHT |= {"formula": kernel, "autocast": lambda op: op.register_autocast()}


SCHEMA = "(Tensor a, Tensor b) -> Tensor"


def make(name: str, **replaced: Callable[..., Any]) -> Any:
    """Register ``torch.ops.torchpar_faulty.<name>``, with other parts than the right ones."""
    part = RIGHT | replaced
    op = custom_op(f"torchpar_faulty::{name}", part["kernel"], mutates_args=(), schema=SCHEMA)
    op.register_fake(part["fake"])
    op.register_autograd(
        part["backward"], setup_context=part["setup_context"], formula=part["formula"]
    )
    op.register_vmap(lambda info, dims, *args: part["batch"](op, info.batch_size, dims, *args))
    part["autocast"](op)
    op.register_sharding(part["sharding"])
    return op


# The faults, by the part that they replace


def backward_without_b(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
    _, b = ctx.saved_tensors
    return g @ b, torch.zeros_like(b)


def backward_of_float32(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
    a, b = (t.float() for t in ctx.saved_tensors)
    return (g.float() @ b).to(g.dtype), (g.float().mT @ a).to(g.dtype)


def backward_that_writes(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
    found = backward(ctx, g)
    g.detach().mul_(2)
    return found


def backward_of_one_number(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
    return backward(ctx, g if any(g.stride()) else 2 * g)


def backward_of_contiguous(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
    memory = torch.empty(0, dtype=g.dtype).set_(g.detach().untyped_storage())
    return backward(ctx, memory.repeat(g.numel())[: g.numel()].view(g.shape))


def backward_of_constants(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
    a, b = ctx.saved_tensors
    return g @ b.detach(), g.mT @ a.detach()


def careless_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.saved_tensors_of_mine = inputs


def careless_backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
    a, b = ctx.saved_tensors_of_mine
    return g @ b, g.mT @ a


def kernel_that_writes(a: Tensor, b: Tensor) -> Tensor:
    result = a @ b.mT
    a.add_(1)
    return result


def backward_of_real(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
    a, b = ctx.saved_tensors
    return g @ b, g.mT @ a


def zero_for_complex(ctx: Any, g: Tensor) -> tuple[Tensor, ...]:
    found = backward(ctx, g)
    return tuple(map(torch.zeros_like, found)) if g.is_complex() else found


def backward_of_memory(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
    return backward(ctx, g.conj() if g.is_conj() else g)


def fake_on_a_cpu(a: Tensor, b: Tensor) -> Tensor:
    return torch.empty(shape_of(a, b), dtype=a.dtype, device="cpu")


def fake_of_numbers(a: Tensor, b: Tensor) -> Tensor:
    *others, columns = shape_of(a, b)
    return a.new_empty(*others, int(columns))


def kernel_in_channels_last(a: Tensor, b: Tensor) -> Tensor:
    is_last = (
        a.dim() == 4
        and not a.is_contiguous()
        and a.is_contiguous(memory_format=torch.channels_last)
    )
    return kernel(a, b).contiguous(
        memory_format=torch.channels_last if is_last else torch.contiguous_format
    )


def squeezing_batch(
    op: Any, size: int, in_dims: Sequence[int | None], *operands: Tensor
) -> tuple[Tensor, int]:
    result, dim = batch(op, size, in_dims, *operands)
    return (result.squeeze(0), dim) if result.shape[0] == 1 else (result, dim)


def kernel_without_nan(a: Tensor, b: Tensor) -> Tensor:
    return kernel(a.nan_to_num(0.0), b)


CALLS = itertools.count()


def kernel_that_differs_in_one_call_of_ten(a: Tensor, b: Tensor) -> Tensor:
    return kernel(a, b) * (1 + 1e-12 * (next(CALLS) % 10 == 9))


def kernel_with_a_constant(a: Tensor, b: Tensor) -> Tensor:
    return kernel(a, b) + torch.tensor(1e-9 / 3).to(a)  # of the default dtype


def kernel_with_uninitialized_memory(a: Tensor, b: Tensor) -> Tensor:
    memory = torch.empty(1, dtype=a.dtype)  # deterministic mode fills it with NaN
    return torch.where(memory.isnan(), 2, 1) * kernel(a, b)


def kernel_of_threads(a: Tensor, b: Tensor) -> Tensor:
    return kernel(a, b) * torch.get_num_threads()


def backward_that_takes_the_first(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
    a, b = ctx.saved_tensors
    return torch.where(a >= b, g, 0), torch.where(a >= b, 0, g)


def contiguous_kernel(a: Tensor, b: Tensor) -> Tensor:
    return kernel(*(t.as_strided(t.shape, torch.empty(t.shape).stride()) for t in (a, b)))


def doubling_batch(*args: Any) -> tuple[Tensor, int]:
    result, dim = batch(*args)
    return result * 2, dim


def sharding_without_sum(a: Any, b: Any) -> list[Any]:
    from torch.distributed.tensor import Replicate, Shard

    return [*sharding(a, b)[:2], ([Replicate()], [Shard(1), Shard(1)])]


def sharding_of_parts(a: Any, b: Any) -> list[Any]:
    replicated, _, (part, _) = sharding(a, b)
    return [replicated, (part, [*part, *part])]


BUFFERS: dict[object, Tensor] = {}


def kernel_with_a_buffer(a: Tensor, b: Tensor) -> Tensor:
    result = kernel(a, b)
    return BUFFERS.setdefault((result.shape, result.dtype), result).copy_(result)


def beyond(limit: int, t: Tensor) -> Tensor:
    """Zeros in place of the elements beyond a limit, as a wrong mask or grid leaves them."""
    flat = t.flatten()
    return torch.where(torch.arange(len(flat)) < limit, flat, 0).view(t.shape)


def kernel_with_a_limit(limit: int) -> Callable[..., Tensor]:
    return lambda a, b: beyond(limit, kernel(a, b))


def backward_with_a_limit(limit: int) -> Callable[..., tuple[Tensor, ...]]:
    return lambda ctx, g: tuple(beyond(limit, t) for t in backward(ctx, g))


def kernel_of_strided(a: Tensor, b: Tensor) -> Tensor:
    result = kernel(a, b)
    return result if a.is_contiguous() else beyond(1024, result)


def backward_of_strided(ctx: Any, g: Tensor) -> tuple[Tensor, ...]:
    da, db = backward(ctx, g)
    return (da, db) if g.is_contiguous() else (beyond(1024, da), db)


def without_the_last(t: Tensor) -> Tensor:
    return beyond(t.numel() - 1, t)


def kernel_of_multiples(a: Tensor, b: Tensor) -> Tensor:
    """As a grid of n // 128 blocks with a wrong rest leaves it."""
    result = kernel(a, b)
    return result if result.numel() % 128 else without_the_last(result)


def kernel_of_4096(a: Tensor, b: Tensor) -> Tensor:
    result = kernel(a, b)
    return without_the_last(result) if result.numel() == 4096 else result


def backward_of_multiples(ctx: Any, g: Tensor) -> tuple[Tensor, ...]:
    da, db = backward(ctx, g)
    return da, (db if db.numel() % 128 else without_the_last(db))


# Numbers of elements, drawn so that no row is fitted to them.
LIMITS = [int(2 ** random.Random(i).uniform(5, 16)) for i in range(3)]


def backward_of_positive_zeros(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
    (a, _), (da, db) = ctx.saved_tensors, backward(ctx, g)
    return da.where((a != 0) | ~a.signbit(), 0), db


def kernel_of_dimensions(count: int) -> Callable[..., Tensor]:
    """The kernel, which errs for a first operand of ``count`` dimensions."""
    return lambda a, b: kernel(a, b) * (2 if a.dim() == count else 1)


def kernel_after(change: Callable[[Tensor], object]) -> Callable[..., Tensor]:
    """The kernel, which leaves something behind in the process."""

    def changing(a: Tensor, b: Tensor) -> Tensor:
        result = kernel(a, b)
        change(a)
        return result

    return changing


def backward_that_seeds(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return backward(ctx, g)


KEPT: list[Tensor] = []
LEFT = {  # changes of the process, and words of the detail
    "seed": (lambda a: torch.manual_seed(0), "the forward: changes PyTorch's random numbers"),
    "draw": (lambda a: torch.rand(1), "changes PyTorch's random numbers"),
    "python": (lambda a: random.random(), "changes Python's random numbers"),
    "numpy": (lambda a: np.random.rand(), "changes NumPy's random numbers"),  # noqa: NPY002  # as others do
    "denormal": (
        lambda a: torch.set_flush_denormal(True),
        "changes flush-denormal, from False to True",
    ),
    "precision": (
        lambda a: torch.set_float32_matmul_precision("medium"),
        "changes the float32 matmul precision, from highest to medium",
    ),
    "environment": (lambda a: os.environ.update(TORCHPAR_LEFT="1"), "environment variables"),
    "operands": (lambda a: KEPT.append(a.detach()), "memory: each call keeps the memory of an "),
    "buffers": (lambda a: KEPT.append(torch.empty(3)), "memory: 4 calls leave 4 tensors"),
}


GRADIENTS = "incoming gradients of any layout"
MAXIMUM = {  # another operator, without rules of vmap and of sharding
    "kernel": torch.maximum,
    "formula": torch.maximum,
    "fake": lambda a, b: torch.empty_like(a),
    "autocast": lambda op: None,
}
# By name: the parts that are replaced, the rule that finds it, and words of the row's detail.
FAULTS: dict[str, tuple[dict[str, Callable[..., Any]], str, str]] = {
    "strides_of_the_fake": ({"fake": lambda a, b: fake(b, a).mT}, "fake tensors", "strides"),
    "dtype_of_the_fake": ({"fake": lambda a, b: fake(a.double(), b)}, "low precision", "fake"),
    "shape_of_the_fake": (
        {"fake": lambda a, b: fake(b, a)},
        "fake tensors",
        "as given: shape (6, 5), expected (5, 6)",
    ),
    "values_of_float32": (
        {"kernel": lambda a, b: kernel(a.float(), b.float()).to(a.dtype)},
        "gradcheck",
        "the values of float64 are computed in a lower precision",
    ),
    "gradients_of_float32": (
        {"backward": backward_of_float32},
        "gradgradcheck",
        "the gradients of float64 are computed in a lower precision",
    ),
    "missing_gradient": ({"backward": backward_without_b}, "gradcheck", "Jacobian"),
    "undeclared_in_backward": (
        {"backward": backward_that_writes},
        GRADIENTS,
        "writes to its incoming",
    ),
    "strides_of_the_gradient": ({"backward": backward_of_contiguous}, GRADIENTS, "transposed"),
    "gradient_of_a_sum": (
        {"backward": backward_of_one_number},
        GRADIENTS,
        "expanded everywhere: [0] off by",
    ),
    "second_derivative": ({"backward": backward_of_constants}, "gradgradcheck", "Jacobian"),
    "undeclared": ({"kernel": kernel_that_writes}, "schema", "was mutated"),
    "doubling_vmap": ({"batch": doubling_batch}, "vmap over one operand", "off by"),
    "missing_sum": ({"sharding": sharding_without_sum}, "DTensor", "off by"),
    "product_of_sums": ({"sharding": sharding_of_parts}, "DTensor", "off by"),
    "noise": (
        {"kernel": lambda a, b: a @ b.mT + 1e-14 * torch.rand(()).to(a)},
        "same bits twice",
        "other bits",
    ),
    "contiguous_operands": ({"kernel": contiguous_kernel}, "layouts and sizes", "transposed"),
    "autocast_to_one_dtype": (
        {"autocast": lambda op: op.register_autocast("cpu", torch.bfloat16)},
        "autocast",
        "expected torch.float16",
    ),
    "unsaved": (
        {"setup_context": careless_context, "backward": careless_backward},
        "changes after the call",
        "of operands",
    ),
    "overflow": (
        {"kernel": lambda a, b: (1e4 * a) @ (1e4 * b).mT / 1e8},
        "low precision",
        "torch.float16",
    ),
    "formula": ({"formula": lambda a, b: -(a @ b.mT)}, "torch.func: vjp", "the sign is flipped"),
    "complex_gradient": ({"backward": backward_of_real}, "gradcheck", "Jacobian"),
    "complex_gradient_0": ({"backward": zero_for_complex}, GRADIENTS, "0, of"),
    "conjugate_bit": ({"backward": backward_of_memory}, GRADIENTS, "conjugated"),
    "device_of_the_fake": ({"fake": fake_on_a_cpu}, "fake tensors", "device cpu, expected meta"),
    "numbers_of_the_fake": ({"fake": fake_of_numbers}, "fake tensors", "fixes the size 6"),
    "channels_last": ({"kernel": kernel_in_channels_last}, "fake tensors", "channels last"),
    "squeezing_vmap": ({"batch": squeezing_batch}, "vmap over one operand", "a batch of 1"),
    "without_nan": ({"kernel": kernel_without_nan}, "NaN", "NaN at 0 of 30 places, expected at 6"),
    "same_memory": ({"kernel": kernel_with_a_buffer}, "same bits twice", "return the same memory"),
    "one_call_in_ten": (
        {"kernel": kernel_that_differs_in_one_call_of_ten},
        "same bits twice",
        "other bits",
    ),
    "default_dtype": ({"kernel": kernel_with_a_constant}, "global settings", "default dtype"),
    "deterministic_mode": (
        {"kernel": kernel_with_uninitialized_memory},
        "global settings",
        "deterministic algorithms: off by",
    ),
    "threads": ({"kernel": kernel_of_threads}, "global settings", "threads"),
    "ties": (
        MAXIMUM | {"backward": backward_that_takes_the_first},
        "ties and zeros",
        "the same numbers",
    ),
    **{
        f"limit_of_{limit}": (
            {"kernel": kernel_with_a_limit(limit)},
            "larger sizes",
            "is 0, expected",
        )
        for limit in LIMITS
    },
    "limit_of_the_gradient": (
        {"backward": backward_with_a_limit(LIMITS[0])},
        "larger sizes",
        "is 0, expected",
    ),
    **{
        f"larger_{part.__name__}": (
            {part.__name__.partition("_")[0]: part},
            "larger sizes",
            words,
        )
        for part, words in (
            (kernel_of_strided, "all sizes, transposed: past 4096 elements: off by"),
            (backward_of_strided, "all sizes, transposed: past 4096 elements: [0] off by"),
            (kernel_of_multiples, "all sizes, as powers of 2: of 1024 elements: off by"),
            (kernel_of_4096, "all sizes, as powers of 2: of 4096 elements: off by"),
            (backward_of_multiples, "all sizes, as powers of 2: of 1024 elements: [1] off by"),
        )
    },
    "infinity": (
        {"kernel": lambda a, b: kernel(a.masked_fill(a.isneginf(), 0), b)},
        "infinities",
        "-inf in operand 0: off by inf",
    ),
    "negative_zeros": (
        {"backward": backward_of_positive_zeros},
        "ties and zeros",
        "some negative zeros: [0] ",
    ),
    "one_dimension": (
        {"kernel": kernel_of_dimensions(1)},
        "layouts and sizes",
        "operands (0,) of 1 dimension: off by",
    ),
    "five_dimensions": (
        {"kernel": kernel_of_dimensions(5)},
        "layouts and sizes",
        "of 5 dimensions: off by",
    ),
    **{
        f"leaves_{name}": (
            {"kernel": kernel_after(change)},
            "settings left as they were",
            words,
        )
        for name, (change, words) in LEFT.items()
    },
    "leaves_seed_in_backward": (
        {"backward": backward_that_seeds},
        "settings left as they were",
        "the backward: changes PyTorch's random numbers",
    ),
    "one_dtype": (
        MAXIMUM | {"kernel": lambda a, b: torch.maximum(a, b.to(a.dtype))},
        "autocast",
        "dtype torch.bfloat16, expected torch.float32",
    ),
}
COMPLEX = (
    normal(5, 4) + 1j * normal(5, 4, seed=2),
    normal(6, 4, seed=1) + 1j * normal(6, 4, seed=3),
)
# By name: the samples of faults that matrices do not show.
SAMPLES: dict[str, tuple[Tensor, ...]] = {
    **dict.fromkeys(["complex_gradient", "complex_gradient_0", "conjugate_bit"], COMPLEX),
    "channels_last": (normal(2, 3, 5, 4), normal(2, 3, 6, 4, seed=1)),
    **dict.fromkeys(["ties", "one_dtype"], (normal(5, 4), normal(5, 4, seed=1))),
}
