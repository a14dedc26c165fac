# SPDX-License-Identifier: MIT
"""Trusted operators: autograd calls their kernel at once, unless something would intercept the
call."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import torchpar
from torchpar.library import CustomOpDef

NAMES = (f"trusted_tests::op{i}" for i in itertools.count())
X = torch.linspace(1, 2, 4)


def double(x: Tensor) -> Tensor:
    return 2 * x


def make(function: Any = double, trusted: bool = True, mutates_args: Any = ()) -> CustomOpDef:
    op = torchpar.library.triton_op(
        next(NAMES), function, mutates_args=mutates_args, trusted=trusted
    )
    if not mutates_args:
        op.register_autograd(lambda ctx, g: 2 * g)
    return op


def packet(op: CustomOpDef) -> Callable[..., Tensor]:
    return getattr(torch.ops.trusted_tests, op._name)  # type: ignore[no-any-return]


class Log(TorchDispatchMode):
    """The operators that are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return torch.full((4,), 5.0)


def seen_by_a_mode(op: CustomOpDef) -> object:
    with Log() as log:
        packet(op)(X)
    return op._qualname in log.seen


def seen_by_a_subclass(op: CustomOpDef) -> object:
    return torch.equal(packet(op)(X.as_subclass(Subclass)), torch.full((4,), 5.0))


def faked(op: CustomOpDef) -> object:
    with FakeTensorMode() as mode:
        return type(packet(op)(mode.from_tensor(X))) is not Tensor


def on_meta(op: CustomOpDef) -> object:
    op.register_fake(lambda x: x.new_empty(7))
    return packet(op)(X.to("meta")).shape == (7,)


def of_a_negative(op: CustomOpDef) -> object:
    negative = torch.complex(X, X).conj().imag
    seen: list[bool] = []
    op.register_kernel(None, lambda x: seen.append(x.is_neg()) or 2 * x)
    op._trusted = op._kernels[None]
    return torch.equal(packet(op)(negative), -2 * X) and seen == [False]


def of_a_functional_tensor(op: CustomOpDef) -> object:
    x = torch._to_functional_tensor(X.clone())
    seen: list[bool] = []
    op.register_kernel(None, lambda x: seen.append(torch._is_functional_tensor(x)) or 2 * x)
    op._trusted = op._kernels[None]
    torch._enable_functionalization(reapply_views=False)
    try:
        packet(op)(x)
    finally:
        torch._disable_functionalization()
    return seen == [False]


def of_a_sparse_tensor(op: CustomOpDef) -> object:
    ran: list[int] = []
    op._trusted = lambda x: ran.append(1) or 2 * x
    packet(op)(X.to_sparse())
    return ran == []


def with_a_users_kernel_for_another_key(op: CustomOpDef) -> object:
    library = torch.library.Library("trusted_tests", "IMPL")
    library.impl(op._name, lambda x: torch.full((4,), 7.0), "BackendSelect")
    found = packet(op)(X)
    library._destroy()
    return bool((found == 7).all())


def of_a_zero(op: CustomOpDef) -> object:
    return not packet(op)(torch._efficientzerotensor(4)).any()


def profiled(op: CustomOpDef) -> object:
    with torch.profiler.profile(acc_events=True) as found:
        packet(op)(X)
    return op._qualname in {event.name for event in found.events()}


def with_a_users_kernel(op: CustomOpDef) -> object:
    torch.library.impl(op._qualname, "CPU", lambda x: 3 * x)
    return torch.equal(packet(op)(X), 3 * X)


def with_another_kernel(op: CustomOpDef) -> object:
    op.register_kernel("cpu", lambda x: 3 * x)
    return torch.equal(packet(op)(X), 3 * X)


def with_another_kernel_for_all_devices(op: CustomOpDef) -> object:
    op.register_kernel(None, lambda x: 3 * x)
    return torch.equal(packet(op)(X), 3 * X)


def with_a_kernel_that_returns_its_argument(op: CustomOpDef) -> object:
    op.register_kernel("cpu", lambda x: x)
    with pytest.raises(RuntimeError, match="alias"):
        packet(op)(X)
    return True


def in_forward_mode(op: CustomOpDef) -> object:
    with forward_ad.dual_level():
        dual = packet(op)(forward_ad.make_dual(X, X))
        tangent = forward_ad.unpack_dual(dual).tangent
    return tangent is not None and torch.equal(tangent, 2 * X)


def in_a_batch(op: CustomOpDef) -> object:
    op.register_vmap(lambda info, in_dims, x: (5 * x, in_dims[0]))
    return torch.equal(torch.func.vmap(packet(op))(X[None]), 5 * X[None])


INTERCEPTED = (
    seen_by_a_mode, seen_by_a_subclass, faked, on_meta, of_a_negative, of_a_functional_tensor,
    of_a_sparse_tensor, of_a_zero, profiled, with_a_users_kernel_for_another_key,
    with_a_users_kernel, with_another_kernel, with_another_kernel_for_all_devices,
    with_a_kernel_that_returns_its_argument, in_forward_mode, in_a_batch,
)  # fmt: skip


@pytest.mark.parametrize("how", INTERCEPTED, ids=lambda how: how.__name__)
def test_what_intercepts_a_call_still_does(how: Callable[[CustomOpDef], object]) -> None:
    op = make()
    assert torch.equal(packet(op)(X), 2 * X), "a call before, which nothing intercepts"
    assert how(op)


@pytest.mark.parametrize("how", [seen_by_a_mode, on_meta, of_a_negative, with_a_users_kernel])
def test_without_the_question_calls_are_not_intercepted(
    how: Callable[[CustomOpDef], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CustomOpDef, "_is_direct", lambda self, keyset, args: True)
    assert not how(make())


def test_a_call_is_dispatched_once_and_an_operator_of_a_user_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[object] = []
    run = CustomOpDef._run
    monkeypatch.setattr(CustomOpDef, "_run", lambda *a, **k: ran.append(1) or run(*a, **k))
    for trusted, count in ((True, 0), (False, 1)):
        op = make(trusted=trusted)
        for x in (X, X.clone().requires_grad_()):
            ran.clear()
            y = packet(op)(x)
            assert torch.equal(y, 2 * X)
            assert len(ran) == count
            if x.requires_grad:
                assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.full((4,), 2.0))


def test_results_are_no_views_and_are_what_the_schema_says() -> None:
    def view(x: Tensor) -> Tensor:
        return (2 * x).view(2, 2)

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        return (2 * x,)  # type: ignore[return-value]

    def nothing(x: Tensor) -> Tensor:
        return None  # type: ignore[return-value]

    for x in (X, X.clone().requires_grad_()):
        assert not packet(make(view))(x)._is_view()
    with pytest.raises(RuntimeError, match="as its schema says"):
        packet(make(both))(X)
    for x in (X, X.clone().requires_grad_()):
        with pytest.raises(RuntimeError, match="returns NoneType, expected"):
            packet(make(nothing))(x)


def test_an_operator_that_writes_raises_versions() -> None:
    def write(x: Tensor) -> None:
        x.numpy()[:] *= 2  # behind PyTorch's back, as a kernel

    op, x = make(write, mutates_args=("x",)), X.clone()
    packet(op)(x)
    assert torch.equal(x, 2 * X)
    assert x._version == 1
