# SPDX-License-Identifier: MIT
"""Calls that C++ plays: equal to Python's, only where nothing has changed, and without Python.

The keys of the CPU stand for CUDA's. Launches are executed by an emulator, or taken by a stand-in
for the driver's function, which has the parameters as a GPU gets them.
"""

import ctypes
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from playing import MODULE, entered, needs_cpp, played, playing
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import torchpar
from torchpar.library import triton_op

pytestmark = needs_cpp
NAMES = (f"player_tests::op{i}" for i in itertools.count())
A, B = torch.randn(2, 5, 7)
SCALED = "(Tensor x, Tensor y, *, float scale=1.0) -> Tensor"


@pytest.fixture
def by_cpp() -> Iterator[None]:
    with playing():
        yield


def warm(call: Callable[[], Any]) -> tuple[Any, int, int]:
    """`played` of a call whose tapes have been recorded."""
    for _ in range(3):
        call()
    return played(call)


def make(function: Callable[..., Any], backward: Any = None, **options: Any) -> Any:
    """An operator of ``function``, as its users call it."""
    op = triton_op(next(NAMES), function, mutates_args=(), trusted=True, **options)
    if backward is not None:
        op.register_autograd(backward, setup_context=save)
    return op


def save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs, output)


def scaled(x: Tensor, y: Tensor) -> Tensor:
    return x * 2 + y


def scaled_backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
    return 2 * g, g


def gradients(op: Callable[..., Tensor], *operands: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in operands]
    return torch.autograd.grad(op(*leaves).square().sum(), leaves)


# Values, and no Python


def test_a_repeated_call_enters_no_python(by_cpp):
    ops = torch.ops.torchpar
    leaves = [t.clone().requires_grad_() for t in (A, B)]
    with torch.no_grad():
        for call in (partial(ops.maximum, A, B), partial(ops.matmul_t, A)):
            assert warm(call)[1:] == (1, 0)
            assert entered(call) == []
    forward = partial(ops.maximum, *leaves)
    warm(forward)
    assert entered(forward) == []
    g = torch.ones(5, 7)
    both = partial(lambda: torch.autograd.grad(forward(), leaves, g))
    warm(both)
    assert entered(both) == []
    assert entered(lambda: ops.maximum(A.double(), B)) != []


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_gradients_are_pythons(by_cpp, needs):
    op = make(scaled, scaled_backward)
    for _ in range(4):
        x, y = (t.clone().requires_grad_(need) for t, need in zip((A, B), needs, strict=True))
        leaves = [t for t in (x, y) if t.requires_grad]
        g = torch.randn(5, 7)
        found, tapes, _ = played(lambda: torch.autograd.grad(op(x, y), leaves, g))  # noqa: B023
        right = [one for one, need in zip((2 * g, g), needs, strict=True) if need]
        assert all(map(torch.equal, found, right))
    assert tapes == 2  # forward and backward


def test_an_operator_of_several_results_and_a_constant(by_cpp):
    def two(x: Tensor, scale: float, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = x.t() * scale
        return y, (y if bias is None else y + bias).relu()

    op = make(two)
    for x, scale, bias in itertools.product((A, B, A[::2]), (2.0, 3.0), (None, torch.ones(1))):
        for _ in range(2):
            (first, second), tapes, _ = played(lambda: op(x, scale, bias))  # noqa: B023
            y = x.t() * scale
            assert torch.equal(first, y)
            assert torch.equal(second, (y if bias is None else y + bias).relu())
        assert tapes == 1


# What a key tells apart


@pytest.mark.parametrize(
    "first, second",
    [
        ((A, B), (A.t(), B.t())),
        ((A, B), (A.double(), B.double())),
        ((A, B), (A[:4], B[:4])),
        ((torch.randn(40)[:35].view(5, 7), B), (torch.randn(40)[1:36].view(5, 7), B)),
        ((A, B), (A, B.t().contiguous().t())),
        ((A, A), (A, B)),
        ((A, B), (A, A)),
        ((A, B), (A, B[:, :1])),
    ],
)
def test_a_tape_is_of_one_layout(by_cpp, first, second):
    op = make(lambda x, y: scaled(x, y), schema="(Tensor x, Tensor y) -> Tensor")
    for operands in (first, second, first, second):
        result, tapes, missed = played(lambda: op(*operands))  # noqa: B023
        assert torch.equal(result, scaled(*operands))
        assert result.stride() == scaled(*operands).stride()
    assert (tapes, missed) == (1, 0)


def test_the_key_has_what_beside_the_arguments_a_rule_reads(by_cpp):
    asked = []

    def function(x: Tensor) -> Tensor:
        asked.append(torch.backends.cuda.matmul.fp32_precision)
        return x + 1

    op = make(function)
    for precision in ("ieee", "tf32", "ieee", "tf32"):
        with torch.backends.flags(fp32_precision=precision):
            op(A)
            op(A)
    assert asked == ["ieee", "tf32"]
    with torch.inference_mode():
        assert op(A).is_inference()
        assert warm(lambda: op(A))[1:] == (1, 0)
    assert not op(A).is_inference()


# What C++ leaves to Python


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextmanager
def filling() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("context", [filling, partial(torch.autocast, "cpu"), Passing])
def test_an_unusual_call_is_pythons_at_first(by_cpp, context):
    op = make(scaled)
    calls = []
    warm(lambda: op(A, B))
    with context(), patch.dict(op._kernels, {None: lambda x, y: calls.append(1) or x + y}):
        result, tapes, _ = played(lambda: op(A, B))
    if context is Passing:  # the mode is told of the operator, and passes it on to C++
        assert (tapes, calls) == (1, [])
    else:
        assert (tapes, calls) == (0, [1])
        assert torch.equal(result, A + B)
    assert played(lambda: op(A, B))[1:] == (1, 0)


CONSTANT = torch.ones(7)


@pytest.mark.parametrize(
    "function, reason",
    [
        (lambda x: x * x.sum().item(), "reads values, or returns a size that depends on them"),
        (lambda x: x + CONSTANT, "takes a tensor that is no argument of the call"),
        (
            lambda x: torch.ops.aten.index_put(x, [None, x[0].argsort()], x),
            "a list in which not all are tensors",
        ),
        (lambda x: x * x.nonzero().shape[0], "aten.nonzero.default reads values"),
        (lambda x: x.to_sparse().to_dense() * 2, "Sparse"),
        (lambda x: x.as_strided((3,), (1,), 0) * 1, "from the beginning of the memory"),
        (lambda x: torch.empty(0).set_(x.untyped_storage()) * 1, "argument of type UntypedStorage"),
        (
            lambda x: x * torch.rand(7, generator=torch.Generator().manual_seed(1)),
            "argument of type Generator",
        ),
    ],
)
def test_a_call_that_cannot_be_played_says_why(by_cpp, function, reason):
    op = make(function, schema="(Tensor x) -> Tensor")
    for x in (A, B, A, B):
        result, tapes, _ = played(lambda: op(x))  # noqa: B023
        assert torch.equal(result, function(x))
        assert tapes == 0
    assert reason in op._player.refusal


def test_a_rule_that_is_registered_again_counts(by_cpp):
    op = make(scaled, scaled_backward)
    assert torch.equal(gradients(op, A, B)[1], 2 * scaled(A, B))
    warm(lambda: gradients(op, A, B))
    op.register_autograd(lambda ctx, g: (g, 5 * g), setup_context=save)
    for _ in range(3):
        assert torch.equal(gradients(op, A, B)[1], 10 * scaled(A, B))
    op.register_kernel("cpu", lambda x, y: x - y)
    for _ in range(3):
        assert torch.equal(op(A, B), A - B)


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")  # 2.11
def test_somebody_elses_kernel_wins(by_cpp):
    op = make(scaled, scaled_backward)
    warm(lambda: gradients(op, A, B))
    with torch.library._scoped_library("player_tests", "IMPL") as library:
        library.impl(op._name, lambda x, y: x - y, "CPU", allow_override=True)
        assert torch.equal(op(A, B), A - B)
        assert torch.equal(gradients(op, A, B)[0], 4 * (A - B))


def test_errors_are_pythons(by_cpp):
    def backward(ctx: Any, g: Tensor) -> None:
        raise KeyError("in the backward")

    op = make(scaled, backward)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="must match the size"):
            op(A, B[:, :3])
        with pytest.raises(KeyError, match="in the backward"):
            gradients(op, A, B)
        with pytest.raises(RuntimeError, match="y is None, expected Tensor"):
            op(A, None)


def test_a_view_is_returned_as_new_memory_is(by_cpp):
    """Autograd lets nobody change a view that a function returns."""
    op = make(lambda x: (x * 2)[1:], schema="(Tensor x) -> Tensor")
    op.register_autograd(lambda ctx, g: torch.nn.functional.pad(2 * g, (0, 0, 1, 0)))
    for _ in range(3):
        x = A.clone().requires_grad_()
        y = op(x)
        y.add_(1)
        y.sum().backward()
        assert torch.equal(y, 2 * A[1:] + 1)
        assert x.grad is not None
        assert x.grad[:, 0].tolist() == [0.0, 2.0, 2.0, 2.0, 2.0]


def test_threads_play_at_the_same_time(by_cpp):
    op = make(scaled, scaled_backward)
    wrong: list[int] = []

    def work(seed: int) -> None:
        x, y = torch.randn(2, 3 + seed % 3, 7, generator=torch.Generator().manual_seed(seed))
        for _ in range(30):
            found = gradients(op, x, y)
            if not torch.equal(found[0], 4 * scaled(x, y)):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert wrong == []


# Launches


def test_launches_of_an_emulator_are_equal(by_cpp):
    pytest.importorskip("triton", reason="the kernels are written in Triton")
    from nogpu import emulate

    x, weight, bias = torch.randn(48, 32), torch.randn(64, 32), torch.randn(64)
    calls: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (torchpar.maximum, (A, B)),
        (torchpar.maximum, (A, B[:, :1])),
        (torchpar.matmul_t, (x.bfloat16(),)),
        (torchpar.linear_sigmoid, (x.bfloat16(), weight.bfloat16(), bias.bfloat16())),
    ]
    for op, operands in calls:
        with emulate("sm_90") as gpu, _disable_current_modes():
            right = op(*operands), *gradients(op, *operands)
            launches = len(gpu.launches)
            for _ in range(3):
                before = len(gpu.launches)
                result, tapes, missed = played(lambda: (op(*operands), *gradients(op, *operands)))  # noqa: B023
                assert all(map(torch.equal, result, right))
                assert len(gpu.launches) - before == launches
            assert tapes >= 3
            assert missed == 0


class Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint),
    )


LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.POINTER(Config),
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.POINTER(ctypes.c_int64)),
    ctypes.c_void_p,
)


@contextmanager
def driver(status: int = 0) -> Iterator[list[tuple[tuple[int, ...], int, int, list[int]]]]:
    """The launches of a stand-in for cuLaunchKernelEx: grid, threads, bytes and 4 parameters."""
    from benchmarks.driver import gpu_of_cpu_tensors

    launched = []

    def launch(config: Any, function: int, parameters: Any, extra: object) -> int:
        one = config.contents
        values = [parameters[i].contents.value for i in range(4)]
        launched.append((tuple(one.grid), one.block[0], one.shared, values))
        return status

    taken = LAUNCH(launch)
    MODULE.set_launch(ctypes.cast(taken, ctypes.c_void_p).value)
    with gpu_of_cpu_tensors(), playing(calls_python=False):
        yield launched


def test_a_driver_gets_addresses_and_numbers():
    pytest.importorskip("triton", reason="the kernels are written in Triton")
    with driver() as launched:
        for _ in range(3):
            launched.clear()
            y = torch.ops.torchpar.maximum(A, B)
        ((grid, threads, _, parameters),) = launched
        assert (grid, threads) == ((1, 1, 1), 128)
        count = parameters.pop() & 2**32 - 1
        assert (parameters, count) == ([A.data_ptr(), B.data_ptr(), y.data_ptr()], 35)


def test_launches_that_are_forgotten_are_recorded_again():
    pytest.importorskip("triton", reason="the kernels are written in Triton")
    from torchpar.kernels.launch import forget_launches

    with driver():
        call = partial(torch.ops.torchpar.maximum, A, B)
        assert warm(call)[1:] == (1, 0)
        forget_launches()
        assert played(call)[1:] == (0, 1)
        assert played(call)[1:] == (1, 0)


def test_somebody_who_watches_launches_sees_them():
    pytest.importorskip("triton", reason="the kernels are written in Triton")
    from triton.knobs import runtime

    from torchpar.kernels import maximum

    with driver() as launched:
        call = partial(torch.ops.torchpar.maximum, A, B)
        warm(call)
        seen: list[object] = []
        runtime.launch_enter_hook.add(seen.append)
        try:
            assert played(call)[1] == 0
        finally:
            runtime.launch_enter_hook.remove(seen.append)
        assert played(call)[1] == 1  # whose launcher would have called the hook
        maximum.maximum_flat_kernel.pre_run_hooks.append(lambda *args, **options: seen.append(1))
        try:
            assert played(call)[1] == 0
        finally:
            maximum.maximum_flat_kernel.pre_run_hooks.clear()
        assert seen == [1]
        launched.clear()
        assert played(call)[1] == len(launched) == 1


def test_a_thread_without_a_context_takes_the_way_of_python():
    pytest.importorskip("triton", reason="the kernels are written in Triton")
    with driver(status=201):
        for _ in range(3):
            result, tapes, missed = played(lambda: torch.ops.torchpar.maximum(A, B))
            assert result.shape == A.shape
        assert (tapes, missed) == (0, 1)
    with driver(status=1):
        torch.ops.torchpar.maximum(A, B)
        with pytest.raises(RuntimeError, match="cuLaunchKernelEx: error 1"):
            torch.ops.torchpar.maximum(A, B)


# The operator as a function


class Counting(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


def test_an_operator_is_called_without_pytorchs_parser(by_cpp):
    """Where a mode, a subclass or another kind of argument is to be seen, PyTorch parses."""
    op = make(lambda x, y, *, scale=1.0: x * scale + y, schema=SCALED)
    warm(lambda: op(A, B))
    with patch.object(op, "_opoverload", None):
        assert torch.equal(op(A, B), A + B)
    assert torch.equal(op(A, B, scale=2.0), 2 * A + B)
    with pytest.raises(RuntimeError, match="must match the size"):
        op(A, B[:, :3])
    for wrong in ((A,), (A, 1.0), (A, B, B)):
        with pytest.raises((RuntimeError, TypeError)):
            op(*wrong)
    with Counting() as mode:
        op(A, B)
    assert any(op._name in one for one in mode.calls)
    traced = torch.fx.symbolic_trace(lambda x, y: op(x, y))
    assert op._name in traced.code
    with torch.profiler.profile(acc_events=True) as profile:
        op(A, B)
    assert op._qualname in {event.name for event in profile.events()}
    compiled = torch.compile(lambda x, y: op(x, y) * 2, backend="eager", fullgraph=True)
    assert torch.equal(compiled(A, B), 2 * (A + B))


def test_an_operator_of_several_results_returns_a_tuple(by_cpp):
    op = make(lambda x: (x * 2, x + 1), schema="(Tensor x) -> (Tensor, Tensor)")
    warm(lambda: op(A))
    result = op(A)
    assert type(result) is tuple
    assert all(map(torch.equal, result, (A * 2, A + 1)))
