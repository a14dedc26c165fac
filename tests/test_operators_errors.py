# SPDX-License-Identifier: MIT
"""What an operator does not take: the error names operator and argument, what it got and what it takes.

The same in eager mode, under torch.func, and in a trace, where PyTorch's own operators would take some of it.
"""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from samples import OPERATORS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, vmap

import torchpar

ones = torch.ones
uint16 = torch.zeros(3, dtype=torch.uint16)
FLOATING = "float16, bfloat16, float32 or float64"

ERRORS: list[tuple[str, tuple[Tensor, ...], str]] = [
    ("maximum", (ones(3, dtype=torch.complex64), ones(3)), "a has dtype torch.complex64, expected a real"),
    ("maximum", (ones(3), ones(3, dtype=torch.complex128)), "b has dtype torch.complex128, expected a real"),
    ("maximum", (uint16, uint16), "a has dtype torch.uint16, expected a real"),
    ("maximum", (ones(3), uint16), "b has dtype torch.uint16, expected a real"),
    ("maximum", (ones(3), ones(4)), "b has shape (4,), which does not broadcast with a's (3,)"),
    ("maximum", (ones(2, 3), ones(2, 0)), "b has shape (2, 0), which does not broadcast with a's (2, 3)"),
    ("matmul_t", (ones(3, 3, dtype=torch.int64),), f"x has dtype torch.int64, expected {FLOATING}"),
    ("matmul_t", (ones(3, 3, dtype=torch.bool),), f"x has dtype torch.bool, expected {FLOATING}"),
    ("matmul_t", (ones(3, 3, dtype=torch.complex64),), f"x has dtype torch.complex64, expected {FLOATING}"),
    ("matmul_t", (ones(3),), "x has shape (3,), expected (*, n, k)"),
    ("matmul_t", (ones(()),), "x has shape (), expected (*, n, k)"),
    ("linear_sigmoid", (ones(()), ones(4, 3)), "x has shape (), expected (*, in_features)"),
    (
        "linear_sigmoid",
        (ones(3, dtype=torch.int32), ones(4, 3, dtype=torch.int32)),
        f"x has dtype torch.int32, expected {FLOATING}",
    ),
    (
        "linear_sigmoid",
        (ones(3, dtype=torch.complex64), ones(4, 3, dtype=torch.complex64)),
        f"x has dtype torch.complex64, expected {FLOATING}",
    ),
    ("linear_sigmoid", (uint16, uint16[None]), f"x has dtype torch.uint16, expected {FLOATING}"),
    ("linear_sigmoid", (ones(2, 3), ones(3)), "weight has shape (3,), expected (out_features, 3)"),
    ("linear_sigmoid", (ones(2, 3), ones(4, 1)), "weight has shape (4, 1), expected (out_features, 3)"),
    ("linear_sigmoid", (ones(2, 3), ones(1, 4, 3)), "weight has shape (1, 4, 3), expected (out_features, 3)"),
    ("linear_sigmoid", (ones(2, 3), ones(4, 3), ones(1)), "bias has shape (1,), expected (4,)"),
    ("linear_sigmoid", (ones(2, 3), ones(4, 3), ones(())), "bias has shape (), expected (4,)"),
    ("linear_sigmoid", (ones(2, 3), ones(4, 3), ones(2, 4)), "bias has shape (2, 4), expected (4,)"),
    (
        "linear_sigmoid",
        (ones(2, 3), ones(4, 3).double()),
        "weight has dtype torch.float64, expected x's torch.float32",
    ),
    (
        "linear_sigmoid",
        (ones(2, 3), ones(4, 3), ones(4).bfloat16()),
        "bias has dtype torch.bfloat16, expected x's torch.float32",
    ),
]


def eagerly(op: Callable[..., Any], args: tuple[Tensor, ...]) -> None:
    op(*args)


def with_gradient(op: Callable[..., Any], args: tuple[Tensor, ...]) -> None:
    op(*(arg.requires_grad_() if arg.is_floating_point() else arg for arg in args))


def in_fake_mode(op: Callable[..., Any], args: tuple[Tensor, ...]) -> None:
    with FakeTensorMode() as mode:
        op(*map(mode.from_tensor, args))


def in_grad(op: Callable[..., Any], args: tuple[Tensor, ...]) -> None:
    grad(lambda scale: (scale * op(*args)).sum())(ones(()))


def in_vmap(op: Callable[..., Any], args: tuple[Tensor, ...]) -> None:
    vmap(op)(*(arg.expand(2, *arg.shape) for arg in args))


def in_vmap_of_the_first(op: Callable[..., Any], args: tuple[Tensor, ...]) -> None:
    first, *others = args
    vmap(op, in_dims=(-1, *[None] * len(others)))(first.unsqueeze(-1).expand(*first.shape, 5), *others)


@pytest.mark.parametrize(
    "call", [eagerly, with_gradient, in_fake_mode, in_grad, in_vmap, in_vmap_of_the_first]
)
@pytest.mark.parametrize(
    "name, args, message", ERRORS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_errors(
    name: str,
    args: tuple[Tensor, ...],
    message: str,
    call: Callable[[Callable[..., Any], tuple[Tensor, ...]], None],
    device: str,
) -> None:
    expected = re.escape(f"torchpar::{name}: {message}")
    with pytest.raises(RuntimeError, match=expected):
        call(OPERATORS[name].op, tuple(arg.detach().to(device) for arg in args))


@pytest.mark.parametrize("call", [eagerly, with_gradient, in_grad])
@pytest.mark.parametrize(
    "name, args, moved, message",
    [
        ("maximum", (ones(3), ones(3)), 1, "b is on {moved}, expected a's device {device}"),
        ("maximum", (ones(3), ones(3)), 0, "b is on {device}, expected a's device {moved}"),
        ("linear_sigmoid", (ones(2, 3), ones(4, 3)), 1, "weight is on {moved}, expected x's {device}"),
        ("linear_sigmoid", (ones(2, 3), ones(4, 3)), 0, "weight is on {device}, expected x's {moved}"),
        ("linear_sigmoid", (ones(2, 3), ones(4, 3), ones(4)), 2, "bias is on {moved}, expected x's {device}"),
    ],
)
def test_mixed_devices(
    name: str,
    args: tuple[Tensor, ...],
    moved: int,
    message: str,
    call: Callable[[Callable[..., Any], tuple[Tensor, ...]], None],
    device: str,
) -> None:
    for elsewhere in ["meta"] + ["cpu"] * (device == "cuda"):
        mixed = [arg.detach().to(device) for arg in args]
        there = mixed[moved] = mixed[moved].to(elsewhere)
        here = mixed[moved - 1].device
        expected = message.format(moved=there.device, device=here)
        with pytest.raises(RuntimeError, match=re.escape(f"torchpar::{name}: {expected}")):
            call(OPERATORS[name].op, tuple(mixed))


def test_a_scalar_elsewhere_than_on_the_cpu_is_refused(device: str) -> None:
    with pytest.raises(RuntimeError, match="torchpar::maximum: b is on meta"):
        torchpar.maximum(ones(3, device=device), ones((), device="meta"))


def test_autocast_makes_one_dtype_of_floats_only(device: str) -> None:
    x, weight = ones(2, 3, device=device), ones(4, 3, device=device)
    with torch.autocast(device, torch.bfloat16):
        assert torchpar.linear_sigmoid(x, weight.bfloat16()).dtype == torch.bfloat16
        for wrong in (weight.double(), weight.long()):
            with pytest.raises(RuntimeError, match="torchpar::linear_sigmoid: weight has dtype"):
                torchpar.linear_sigmoid(x, wrong)
        with pytest.raises(RuntimeError, match=r"torchpar::matmul_t: x has dtype torch\.int64"):
            torchpar.matmul_t(x.long())
