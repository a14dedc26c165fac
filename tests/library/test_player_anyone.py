# SPDX-License-Identifier: MIT
"""Operators of anyone that C++ plays: only where calls do the same, and equal to Python's.

Each test is a way in which a function that nobody has promised anything of could be played wrongly.
"""

import itertools
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from playing import needs_cpp, played, playing
from torch import Tensor
from torch._subclasses import FakeTensorMode

from torchpar.library import CustomOpDef, custom_op, player, triton_op
from torchpar.library.player import RECORDINGS
from torchpar.library.tape import TapeRecorder, recording

pytestmark = needs_cpp
NAMES = (f"anyone_tests::op{i}" for i in itertools.count())
A, B = torch.randn(2, 5, 7)
X = "(Tensor x) -> Tensor"
XK = "(Tensor x, float k) -> Tensor"


@pytest.fixture(autouse=True)
def by_cpp() -> Iterator[None]:
    with playing():
        yield


def make(function: Callable[..., Any], schema: str = X, **options: Any) -> Any:
    return triton_op(next(NAMES), function, mutates_args=(), schema=schema, **options)


def calls(call: Callable[[], Tensor], right: Callable[[], Tensor], count: int = 6) -> int:
    """How many of the calls played a tape; each of them must be right."""
    found = 0
    for _ in range(count):
        result, tapes, _ = played(call)
        assert torch.equal(result, right())
        found += tapes
    return found


def gradient(op: Any, x: Tensor, *args: Any) -> Tensor:
    leaf = x.detach().requires_grad_()
    (found,) = torch.autograd.grad(op(leaf, *args).square().sum(), leaf)
    return found


def save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*(t for t in inputs if isinstance(t, Tensor)))


# Equal calls are played, and those of other operators are not


def test_a_call_is_played_after_three_equal_ones():
    ran = []

    def function(x: Tensor) -> Tensor:
        ran.append(1)
        return x * 2

    op = make(function)
    assert calls(lambda: op(A), lambda: A * 2) == 6 - RECORDINGS
    assert len(ran) == RECORDINGS
    assert player.why_not(op) == ""
    assert calls(lambda: op(A.t()), lambda: A.t() * 2) == 6 - RECORDINGS


def test_a_backward_is_played_after_three_equal_ones():
    op = make(lambda x: x * 2)
    op.register_autograd(lambda ctx, g: 2 * g)
    for _ in range(8):
        assert torch.equal(gradient(op, A), 8 * A)
    found, tapes, missed = played(partial(gradient, op, A))
    assert torch.equal(found, 8 * A)
    assert (tapes, missed) == (2, 0)


@pytest.mark.parametrize(
    "op, reason",
    [
        (lambda f: make(f, played=False), "played=False was given"),
        (lambda f: custom_op(next(NAMES), f, mutates_args=(), schema=X), "not made by triton_op"),
    ],
)
def test_functions_that_are_not_to_be_played_are_not(op, reason):
    one = op(lambda x: x * 2)
    assert calls(lambda: one(A), lambda: A * 2) == 0
    assert reason in player.why_not(one)


# Threads


def test_a_function_may_wait_for_a_thread_that_calls_an_operator():
    inner = make(lambda x: x + 1)

    def function(x: Tensor) -> Tensor:
        thread = threading.Thread(target=inner, args=(B,))
        thread.start()
        thread.join(20)
        assert not thread.is_alive()
        return x * 2

    outer = make(function)
    assert calls(lambda: outer(A), lambda: A * 2) == 6 - RECORDINGS


def test_launches_of_another_thread_are_in_no_tape():
    from triton.runtime.jit import JITFunction

    run = JITFunction.run
    seen = []

    def function(x: Tensor) -> Tensor:
        seen.append(JITFunction.run is run)
        return x * 2

    op = make(function)
    threads = [threading.Thread(target=lambda: [op(A) for _ in range(9)]) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert seen[:1] == [False]
    assert JITFunction.run is run


# Numbers among the arguments


def test_a_number_that_changes_in_each_call_ends_the_recording():
    op = make(lambda x, k: x * k, XK)
    assert calls(lambda: op(A, 0.5), lambda: A * 0.5) == 6 - RECORDINGS
    for step in range(100):
        assert torch.equal(op(A, float(step)), A * float(step))
    assert "differ in too many calls" in player.why_not(op)
    assert len(op._player._equal) == len(op._player._numbers) == 0
    # What was recorded is still played, and nothing else is.
    assert calls(lambda: op(A, 0.5), lambda: A * 0.5) == 6
    assert calls(lambda: op(B[:3], 0.5), lambda: B[:3] * 0.5) == 0


def test_a_number_that_changes_makes_no_derivatives_without_end():
    op = make(lambda x, k: x * k, XK)

    def keep(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.k = inputs[1]

    op.register_autograd(lambda ctx, g: (ctx.k * g, None), setup_context=keep)
    for step in range(100):
        for _ in range(5):
            assert torch.equal(gradient(op, A, float(step)), step * (2.0 * (A * step)))
    assert len(op._player._derivatives) <= player._MOST_OPTIONS


# Rules of autograd


def test_setup_context_is_called_only_where_a_gradient_is_needed():
    needs = []

    def keep(ctx: Any, inputs: Any, output: Any) -> None:
        needs.append(ctx.needs_input_grad)

    op = make(lambda x: x * 2)
    op.register_autograd(lambda ctx, g: 2 * g, setup_context=keep)
    with torch.no_grad():
        calls(lambda: op(A), lambda: A * 2)
    assert needs == []
    for _ in range(9):
        assert torch.equal(gradient(op, A), 8 * A)
    assert {*needs} == {(True,)}
    assert len(needs) < 9  # it is not called where C++ differentiates


def test_a_setup_context_that_reads_values_is_called_each_time():
    def keep(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.largest = inputs[0].max().item()

    op = make(lambda x: x * 2)
    op.register_autograd(lambda ctx, g: ctx.largest * g, setup_context=keep)
    for x in (A, A, A, A, A, A, A, B, A):
        assert torch.equal(gradient(op, x), x.max().item() * (2 * (2 * x)))


@pytest.mark.parametrize("kind", [float, tuple])
def test_what_is_kept_on_ctx_must_not_change(kind):
    state = {"factor": 2.0}

    def keep(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.factor = state["factor"] if kind is float else (state["factor"], inputs[0].shape)

    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * (ctx.factor if kind is float else ctx.factor[0])

    op = make(lambda x: x * 2)
    op.register_autograd(backward, setup_context=keep)
    for step in range(12):
        state["factor"] = float(step)
        assert torch.equal(gradient(op, A), step * (2 * (2 * A)))
    assert "do not do the same" in player.why_not(op)


class Functions(Tensor):
    """A subclass that no dispatch key tells of."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        return result.as_subclass(Tensor) * 10 if func.__name__ == "mul" else result


class Dispatched(Tensor):
    """A subclass whose products are ten times as large."""

    plain: Tensor

    @staticmethod
    def __new__(cls, plain: Tensor) -> "Dispatched":
        made = Tensor._make_wrapper_subclass(cls, plain.shape, plain.stride(), dtype=plain.dtype)  # type: ignore[attr-defined]
        made.plain = plain
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = [one.plain if isinstance(one, Dispatched) else one for one in args]
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.detach.default:
            return Dispatched(result)
        return 10 * result if func is torch.ops.aten.mul.Tensor else result


def test_hooks_of_saved_tensors_may_return_a_subclass():
    def hooked(op: Any, unpack: Any) -> Tensor:
        leaf = A.detach().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            result = op(leaf)
        (found,) = torch.autograd.grad(result.sum(), leaf)
        return found

    op = make(lambda x: x * x)
    op.register_autograd(lambda ctx, g: ctx.saved_tensors[0].mul(g) + 0, setup_context=save)
    for _ in range(9):
        assert torch.equal(hooked(op, lambda t: t), A)
        assert torch.equal(hooked(op, Dispatched), 10 * A)
    assert played(lambda: hooked(op, lambda t: t))[1] == 2


def test_a_saved_argument_may_be_a_subclass():
    op = make(lambda x: x * x)
    op.register_autograd(lambda ctx, g: ctx.saved_tensors[0].mul(g) + 0, setup_context=save)
    for _ in range(9):
        for kind, factor in ((Tensor, 1), (Functions, 10)):
            leaf = A.clone().as_subclass(kind).requires_grad_()
            op(leaf).as_subclass(Tensor).sum().backward()
            assert torch.equal(leaf.grad.as_subclass(Tensor), factor * A)


# Kernels of others


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")  # up to torch 2.13
def test_other_kernels_win_before_and_after():
    op = make(lambda x: x * 2)
    with torch.library._scoped_library("anyone_tests", "IMPL") as library:
        library.impl(op._name, lambda x: x * 5, "CPU")
        assert calls(lambda: op(A), lambda: A * 5) == 0
        assert "somebody else" in player.why_not(op)
    op = make(lambda x: x * 2)
    assert calls(lambda: op(A), lambda: A * 2) == 6 - RECORDINGS
    with torch.library._scoped_library("anyone_tests", "IMPL") as library:
        library.impl(op._name, lambda x: x * 5, "CPU")
        assert calls(lambda: op(A), lambda: A * 5) == 0
    op.register_kernel("cpu", lambda x: x * 7)
    assert calls(lambda: op(A), lambda: A * 7) == 0
    assert "kernel of its own" in player.why_not(op)


def test_a_kernel_for_another_device_forbids_nothing():
    op = make(lambda x: x * 2)
    op.register_kernel("cuda", lambda x: x * 7)
    assert calls(lambda: op(A), lambda: A * 2) == 6 - RECORDINGS
    op = make(lambda x: x * 2)
    op.register_kernel(None, lambda x: x * 7)
    assert calls(lambda: op(A), lambda: A * 7) == 0
    assert "not the one that triton_op was given" in player.why_not(op)


# Devices


def test_tensors_of_two_gpus_are_not_played():
    """Fake tensors stand for those of GPUs."""
    for other, reason in (("cpu", ""), ("cuda:0", ""), ("cuda:1", "several devices")):
        with FakeTensorMode():
            x = torch.empty(3, device="cuda:0")
            recorder = TapeRecorder([x], False)
            with recording(recorder):
                y = recorder.alias(x) * 2
                torch.empty(3, device=other)
        assert (recorder.tape([y]) is None) == bool(reason)
        assert reason in recorder.refusal


# What no key has


STATE: dict[str, Any] = {}


def counted(x: Tensor) -> Tensor:
    STATE["count"] = STATE.get("count", 0) + 1
    return x * STATE["count"]


def drawn(x: Tensor) -> Tensor:
    STATE["drawn"] = torch.initial_seed() + len(STATE.setdefault("all", [])) % 7
    STATE["all"].append(STATE["drawn"])
    return x + STATE["drawn"] % 1000


@pytest.mark.parametrize(
    "function, right",
    [
        (counted, lambda: A * STATE["count"]),
        (drawn, lambda: A + STATE["drawn"] % 1000),
    ],
)
def test_a_function_whose_calls_differ_is_not_played(function, right):
    STATE.clear()
    op = make(function)
    assert calls(lambda: op(A), right) == 0
    assert "do not do the same" in player.why_not(op)


def test_a_difference_discards_the_tapes_of_other_layouts():
    op = make(lambda x: x * STATE["factor"])
    STATE["factor"] = 2
    assert calls(lambda: op(A), lambda: A * 2) == 6 - RECORDINGS
    assert torch.equal(op(B[:2]), B[:2] * 2)
    STATE["factor"] = 3
    assert torch.equal(op(B[:2]), B[:2] * 3)
    assert calls(lambda: op(A), lambda: A * 3) == 0


def by_numpy(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y.numpy()[:] = 2 * x.numpy()
    return y


def by_address(x: Tensor) -> Tensor:
    return x * (2 if x.data_ptr() else 3)


def by_list(x: Tensor) -> Tensor:
    return x * 2 + 0 * len(x.tolist())


def by_array(x: Tensor) -> Tensor:
    import numpy as np

    y = torch.zeros_like(x)
    np.copyto(np.asarray(y), 2 * np.asarray(x))
    return y


def by_dlpack(x: Tensor) -> Tensor:
    import numpy as np

    y = torch.zeros_like(x)
    y.copy_(torch.from_dlpack(np.from_dlpack(x) * 2))
    return y


def by_a_thread(x: Tensor) -> Tensor:
    """What another thread does, no recorder sees."""
    y = torch.empty_like(x)
    thread = threading.Thread(target=lambda: torch.mul(x, 2, out=y))
    thread.start()
    thread.join()
    return y


@pytest.mark.parametrize(
    "function, reason",
    [
        (by_numpy, "by numpy"),
        (by_address, "by data_ptr"),
        (by_list, "by tolist"),
        (by_array, "by __array__"),
        (by_dlpack, "by __dlpack__"),
        (by_a_thread, "written by nothing that a tape holds"),
        (lambda x: x * 2 if x.sum() > -1e9 else x * 3, "reads values"),
    ],
)
def test_what_a_tape_cannot_hold_is_refused(function, reason):
    op = make(function)
    for x in (A, B, A.clone(), B.clone()):
        assert calls(lambda: op(x), lambda: x * 2, 2) == 0  # noqa: B023
    assert reason in player.why_not(op)


def test_attributes_of_tensors_are_seen_by_the_function():
    op = make(lambda x: x * getattr(x, "scale", 2))
    x = A.clone()
    for scale in (3, 4, 5, 6, 7):
        x.scale = scale
        assert calls(lambda: op(x), lambda: x * scale, 1) == 0  # noqa: B023
    assert "attributes" in player.why_not(op)


def test_random_numbers_of_pytorch_are_drawn_anew():
    op = make(lambda x: x + torch.rand(5, 7))
    for seed in range(6):
        torch.manual_seed(seed)
        result, tapes, _ = played(lambda: op(A))
        torch.manual_seed(seed)
        assert torch.equal(result, A + torch.rand(5, 7))
    assert tapes == 1


def test_the_condition_is_the_authors():
    """What changes after the recordings, and what no key has, is not seen: docs/operators.md."""
    op: CustomOpDef = make(lambda x: x * STATE["factor"])
    STATE["factor"] = 2
    assert calls(lambda: op(A), lambda: A * 2) == 6 - RECORDINGS
    STATE["factor"] = 3
    assert torch.equal(op(A), A * 2)
    other = make(lambda x: x * STATE["factor"], played=False)
    assert calls(lambda: other(A), lambda: A * 3) == 0
