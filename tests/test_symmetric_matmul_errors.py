# SPDX-License-Identifier: MIT
"""What symmetric_matmul refuses, and how it says so; and ``check=True``, which looks into the promise."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from samples import FLOATS, assert_symmetric, normal
from test_symmetric_matmul import op, operands, polynomials
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, vmap
from torch.testing import assert_close

import torchpar

ones = torch.ones


def unlike(
    name: str, found: tuple[int, ...], expected: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> str:
    return f"{name} is ({found}, {dtype}, {{device}}), expected ({expected}, torch.float32, {{device}})"


FLOATING = "expected float16, bfloat16, float32 or float64"
ERRORS: list[tuple[tuple[Tensor, ...], str]] = [
    ((ones(3, 2).int(), ones(3, 2).int()), f"a has dtype torch.int32, {FLOATING}"),
    ((ones(3, 2) + 1j, ones(3, 2) + 1j), f"a has dtype torch.complex64, {FLOATING}"),
    ((ones(3), ones(3)), "a has shape (3,), expected (*, n, k)"),
    ((ones(()), ones(())), "a has shape (), expected (*, n, k)"),
    ((ones(3, 2), ones(2, 3)), unlike("b", (2, 3), (3, 2))),
    ((ones(4, 3, 2), ones(3, 2)), unlike("b", (3, 2), (4, 3, 2))),
    ((ones(3, 2), ones(3, 2).half()), unlike("b", (3, 2), (3, 2), torch.float16)),
    ((ones(3, 2), ones(3, 2), ones(3, 2)), unlike("c", (3, 2), (3, 3))),
    ((ones(3, 2), ones(3, 2), ones(())), unlike("c", (), (3, 3))),
    ((ones(4, 3, 2), ones(4, 3, 2), ones(3, 3)), unlike("c", (3, 3), (4, 3, 3))),
    ((ones(3, 2), ones(3, 2), ones(3, 3).double()), unlike("c", (3, 3), (3, 3), torch.float64)),
]


def _in_fake_mode(args: tuple[Tensor, ...]) -> None:
    with FakeTensorMode() as mode:
        op(*map(mode.from_tensor, args))


CALLS: dict[str, Callable[[tuple[Tensor, ...]], Any]] = {
    "eager": lambda args: op(*args),
    "with gradient": lambda args: op(*(t if t.dtype == torch.int32 else t.requires_grad_() for t in args)),
    "fake": _in_fake_mode,
    "grad": lambda args: grad(lambda scale: (scale * op(*args)).sum())(ones(())),
    "vmap": lambda args: vmap(op)(*(t.expand(2, *t.shape) for t in args)),
    "vmap of the first": lambda args: vmap(op, (0, *[None] * (len(args) - 1)))(
        args[0].expand(5, *args[0].shape), *args[1:]
    ),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("args, message", ERRORS, ids=lambda value: value if isinstance(value, str) else "")
def test_errors(args: tuple[Tensor, ...], message: str, call: str, device: str) -> None:
    args = tuple(t.detach().to(device) for t in args)
    expected = f"torchpar::symmetric_matmul: {message.format(device=repr(args[0].device))}"
    with pytest.raises(RuntimeError, match=re.escape(expected)) as caught:
        CALLS[call](args)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("moved", ["b", "c"])
def test_mixed_devices(moved: str, device: str) -> None:
    tensors = {"a": ones(3, 2), "b": ones(3, 2), "c": ones(3, 3)}
    tensors = {name: t.to("meta" if name == moved else device) for name, t in tensors.items()}
    with pytest.raises(RuntimeError, match=rf"torchpar::symmetric_matmul: {moved} is .*meta.*expected"):
        torchpar.symmetric_matmul(**tensors)


# check=True: the promise, looked into.


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n", [1, 64, 300])
def test_the_check_accepts_polynomials_after_several_roundings(
    n: int, dtype: torch.dtype, device: str
) -> None:
    a, b = polynomials(n, dtype, device)
    for _ in range(3):
        product = op(a, b, check=True)
        a, b = op(a, b, product, alpha=0.5, beta=-0.25, check=True), product.clone()
    assert a.isfinite().all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("k", [1, 64, 4096])
def test_the_check_rejects_what_is_not_symmetric(k: int, dtype: torch.dtype, device: str) -> None:
    a, b = (normal(64, k, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    with pytest.raises(RuntimeError, match=r"symmetric_matmul: a @ b\.mT is not symmetric") as caught:
        op(a, b, check=True)
    assert "\n" not in str(caught.value)
    assert_symmetric(op(a, b))  # unchecked, it is taken at its word
    c = torch.eye(64).to(a)
    op(a, a, c, beta=1, check=True)
    c[3, 5] = 0.5
    with pytest.raises(RuntimeError, match="symmetric_matmul: c is not symmetric: it differs"):
        op(a, a, c, beta=1, check=True)


def test_the_check_leaves_out_what_is_not_read(device: str) -> None:
    a = normal(3, 2, device=device)
    for c in (normal(3, 3, device=device), torch.full((3, 3), math.nan, dtype=a.dtype, device=device)):
        assert_close(op(a, a, c, beta=0, check=True), a @ a.mT)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 3, 2), (2, 0, 2)], ids=str)
def test_the_check_of_nothing(shape: tuple[int, ...], device: str) -> None:
    assert_close(op(*operands(*shape, device=device), check=True), op(*operands(*shape, device=device)))
