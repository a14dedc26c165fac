# SPDX-License-Identifier: MIT
"""Calls whose operands have the layouts of an earlier call, whose launch is looked up."""

from collections.abc import Callable, Hashable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels are written in Triton")
from triton import knobs

import nogpu
import torchpar
from torchpar.kernels import launch, linear_sigmoid, matmul_t, maximum, tiles
from torchpar.kernels.rule import Tiles
from torchpar.library import CustomOpDef
from torchpar.library.dispatch_keys import OTHER_KEYS

X = torch.linspace(-1, 1, 40 * 24).view(40, 24)
W, BIAS, ROW = X[:16].clone(), torch.linspace(0, 1, 16), torch.linspace(-1, 1, 24)
C = torch.eye(40)
SPLIT = Tiles(32, 32, 32, 4, 3, "split_k")
CALLS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], Callable[..., Tensor]]] = {
    "maximum": (torchpar.maximum, (X, X.flip(0)), torch.maximum),
    "maximum of a row": (torchpar.maximum, (X, ROW), torch.maximum),
    "maximum of a column": (torchpar.maximum, (X[:, :1], X.half()), torch.maximum),
    "matmul_t": (torchpar.matmul_t, (X,), lambda x: x @ x.mT),
    "symmetric_matmul": (
        lambda a, b, c: torchpar.symmetric_matmul(a, b, c, alpha=0.5, beta=2.0),
        (X, X, C),
        lambda a, b, c: 0.5 * a @ b.mT + 2 * c,
    ),
    "linear_sigmoid": (
        torchpar.linear_sigmoid,
        (X, W, BIAS),
        lambda x, w, b: torch.nn.functional.linear(x, w, b).sigmoid(),
    ),
}


ALIKE = ("maximum of a column", "symmetric_matmul", "linear_sigmoid")  # as others, here


def mostly(name: str, *others: str) -> list[Any]:
    """In any run ``name``, and in slow tests the others, whose calls pass the same lines."""
    return [name, *(pytest.param(other, marks=pytest.mark.slow) for other in others)]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A GPU that is emulated, in TF32, for which no operand is copied; whether each look-up finds a
    launch."""
    found: list[int] = []

    class Counting(dict[Hashable, Any]):
        def __getitem__(self, key: Hashable) -> Any:
            found.append(self.get(key) is not None)
            return super().__getitem__(key)

    monkeypatch.setattr(launch, "_launches", Counting())
    with nogpu.emulate(), torch.backends.flags(fp32_precision="tf32"):
        yield found


def layouts(name: str, operands: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """The operands, and their values at other addresses, and in other layouts."""
    yield operands
    yield tuple(torch.cat((t.flatten()[:1], t.flatten()))[1:].view_as(t) for t in operands)
    if name == "maximum":  # its kernels are compiled in the least time
        yield tuple(t.double() for t in operands)
        yield tuple(t.mT.contiguous().mT for t in operands)
        yield tuple(t[:8] for t in operands)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in ALIKE else []) for name in CALLS],
)
def test_a_call_is_launched_at_once_for_the_same_layouts_alone(name: str, gpu: list[int]) -> None:
    op, operands, native = CALLS[name]
    for given in layouts(name, operands):
        gpu.clear()
        results = [op(*given) for _ in range(3)]
        assert gpu == [0, 1, 1]
        for result in results:
            expected = native(*given)
            assert torch.allclose(result, expected, rtol=2**-9, atol=2**-9)
            assert result.stride() == expected.stride()
            assert torch.equal(result, results[0])


def pass_over_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Call trusted kernels directly although a dispatch mode is active."""
    python = torch.DispatchKeySet(torch.DispatchKey.Python).raw_repr()
    monkeypatch.setattr("torchpar.library.call_path.OTHER_KEYS", OTHER_KEYS & ~python)


@pytest.mark.parametrize(
    "name", ["maximum", *mostly("matmul_t", "maximum of a row", "linear_sigmoid")]
)
def test_values_of_calls_that_autograd_makes_directly(
    name: str, gpu: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An emulator has a dispatch mode, which would intercept them; kernels need none."""
    pass_over_modes(monkeypatch)
    direct = []
    call = CustomOpDef._call_directly
    monkeypatch.setattr(
        CustomOpDef, "_call_directly", lambda *args: direct.append(1) or call(*args)
    )
    op, operands, native = CALLS[name]
    for _ in range(2):
        assert torch.allclose(op(*operands), native(*operands), rtol=2**-9, atol=2**-9)
        leaves = [t.detach().requires_grad_() for t in operands]
        results = op(*leaves), native(*leaves)
        g = torch.linspace(-1, 1, results[0].numel()).view_as(results[0])
        found, expected = (torch.autograd.grad(y, leaves, g) for y in results)
        for one, other in zip(found, expected, strict=True):
            assert torch.allclose(one, other, rtol=2**-7, atol=2**-7)
    assert len(direct) == 6, "forward without and with a gradient, and backward, twice"


def test_a_matrix_c_is_added_after_a_call_that_left_it_out(gpu: list[int]) -> None:
    square = X[:24]
    torchpar.symmetric_matmul(square, square, square, beta=0.0)
    for _ in range(2):
        found = torchpar.symmetric_matmul(square, square, C[:24, :24].contiguous(), beta=1.0)
        expected = square @ square.mT + C[:24, :24]
        assert torch.allclose(found, expected, rtol=2**-9, atol=2**-9)


def test_other_values_and_other_factors_are_not_remembered(gpu: list[int]) -> None:
    for alpha in (1.0, 1.0, -3.0):
        found = torchpar.symmetric_matmul(X, X, C, alpha=alpha, beta=1.0)
        assert torch.allclose(found, alpha * X @ X.mT + C, rtol=2**-9, atol=2**-9)
    for x in (X, -2 * X):
        assert torch.allclose(torchpar.matmul_t(x), x @ x.mT, rtol=2**-8, atol=2**-8)
    assert gpu == [0, 1, 1, 0, 1]


@pytest.mark.parametrize("name", mostly("matmul_t", "symmetric_matmul", "linear_sigmoid"))
def test_another_precision_is_not_remembered(name: str, gpu: list[int]) -> None:
    """Without a mode the precision is TF32 here."""
    op, operands, native = CALLS[name]
    exact = native(*[t.double() for t in operands])
    for mode in (None, "tf32x3", "tf32x3", None, "tf32"):
        with torchpar.fp32_products(mode):
            error = (op(*operands) - exact).abs().max()
        assert (error < 2**-17) == (mode == "tf32x3")
    assert gpu == [0, 0, 1, 1, 1]


LAUNCHERS: dict[str, partial[Tensor | None]] = {
    "matmul_t": partial(matmul_t.matmul_t, X, "tf32x3", None),
    "linear_sigmoid": partial(linear_sigmoid.linear_sigmoid, X, W, BIAS, "tf32x3", None),
    "symmetric_matmul": partial(matmul_t.symmetric_matmul, X, X, "tf32x3", None, C, 0.5, 2.0),
}


@pytest.mark.parametrize("name", mostly("matmul_t", "linear_sigmoid", "symmetric_matmul"))
def test_a_launch_without_a_choice_is_none_of_calls_with_a_choice(
    name: str, gpu: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mode beside another flag leaves no choice to the rule."""
    first = LAUNCHERS[name]()
    monkeypatch.setattr(tiles, "library_is_faster", lambda choice: True)
    for _ in range(2):
        assert LAUNCHERS[name](only_if_faster=True) is None
        assert torch.equal(LAUNCHERS[name](), first)


@pytest.mark.parametrize("name", mostly("matmul_t", "linear_sigmoid", "symmetric_matmul"))
def test_operands_are_checked_for_new_layouts_alone(name: str, gpu: list[int]) -> None:
    checked: list[object] = []

    def check(*operands: Tensor | None) -> None:
        checked.append(operands)

    for _ in range(2):
        LAUNCHERS[name](check=check)
    assert len(checked) == 1


def refuse(*operands: Tensor | None) -> None:
    raise RuntimeError("refused")


@pytest.mark.parametrize("name", mostly("matmul_t", "linear_sigmoid", "symmetric_matmul"))
def test_a_launch_that_was_not_checked_is_none_of_an_operator(name: str, gpu: list[int]) -> None:
    LAUNCHERS[name]()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="refused"):
            LAUNCHERS[name](check=refuse)


def test_launches_that_copy_operands_or_have_two_kernels_are_looked_up(gpu: list[int]) -> None:
    wide = torch.linspace(-1, 1, 16 * 256).view(16, 256)
    calls: list[tuple[Callable[[Tensor], Tensor], Tensor, Callable[[Tensor], Tensor]]] = [
        (
            lambda x: matmul_t.matmul_t(x, "ieee", None),  # by columns
            X,
            lambda x: x @ x.mT,
        ),
        (
            lambda x: matmul_t.matmul_t(x, "tf32x3", None),
            X[:16].reshape(2, 2, 4, 24).movedim(0, 1),  # no view of it has three dimensions
            lambda x: x @ x.mT,
        ),
        (
            lambda x: linear_sigmoid.linear_sigmoid(x, wide, None, "tf32x3", None, tiles=SPLIT),
            wide,
            lambda x: (x @ wide.mT).sigmoid(),
        ),
        (
            lambda y: torch.ops.torchpar.linear_sigmoid_backward(y, y)[1],
            torch.linspace(0, 1, 600 * 3).view(600, 3),
            lambda y: (y * y * (1 - y)).sum(0),
        ),
    ]
    for call, x, native in calls:
        gpu.clear()
        for given in (x, -x, x / 2):
            assert torch.allclose(call(given), native(given), rtol=2**-12, atol=2**-12)
        assert gpu == [0, 1, 1]


@pytest.mark.parametrize("name", mostly("matmul_t", "linear_sigmoid", "symmetric_matmul"))
def test_calls_that_autograd_makes_directly_have_the_precision_of_the_mode(
    name: str, gpu: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pass_over_modes(monkeypatch)
    direct: list[str] = []
    call = CustomOpDef._call_directly
    monkeypatch.setattr(
        CustomOpDef, "_call_directly", lambda self, *args: direct.append(1) or call(self, *args)
    )
    op, operands, native = CALLS[name]

    def results(op: Callable[..., Tensor], dtype: torch.dtype, mode: str | None) -> list[Tensor]:
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in operands]
        with torchpar.fp32_products(mode):
            y, again = op(*leaves), op(*[t.detach() for t in leaves])
        assert torch.equal(y, again)
        g = torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)
        return [y, torch.autograd.grad(y, leaves, g)[0]]

    exact = results(native, torch.float64, None)
    for mode in ("tf32x3", None):
        found = results(op, torch.float32, mode)
        errors = [(a - b).abs().max() for a, b in zip(found, exact, strict=True)]
        if mode == "tf32x3":
            assert max(errors) < 2**-15
            assert len(direct) >= 3, "with and without a gradient, and in the backward"
        else:
            assert errors[0] > 2**-15


def test_wrong_arguments_are_refused_after_right_ones(gpu: list[int]) -> None:
    for _ in range(2):
        torchpar.linear_sigmoid(X, W, BIAS)
        torchpar.symmetric_matmul(X, X, C, beta=1.0)
    for wrong in ((X, W, BIAS[:-1]), (X, W[:, :-1], BIAS), (X.double(), W, BIAS), (X[0, 0], W)):
        with pytest.raises(RuntimeError, match="linear_sigmoid"):
            torchpar.linear_sigmoid(*wrong)
    with pytest.raises(RuntimeError, match="without beta"):
        torchpar.symmetric_matmul(X, X, C)
    with pytest.raises(RuntimeError, match="c is None"):
        torchpar.symmetric_matmul(X, X, beta=1.0)


def test_a_factor_of_zero_leaves_its_term_out_after_other_factors(gpu: list[int]) -> None:
    nan = torch.full_like(X, torch.nan)
    for _ in range(2):
        torchpar.symmetric_matmul(nan, nan, C, alpha=1.0, beta=1.0)
    assert torch.equal(torchpar.symmetric_matmul(nan, nan, C, alpha=0.0, beta=1.0), C)
    found = torchpar.symmetric_matmul(X, X, torch.full_like(C, torch.nan), alpha=1.0, beta=0.0)
    assert torch.allclose(found, X @ X.mT, rtol=2**-9, atol=2**-9)


def test_a_launch_at_once_calls_tritons_hooks(gpu: list[int]) -> None:
    entered: list[str] = []
    ran: list[int] = []

    def enter(metadata: Any) -> None:
        entered.append(metadata.get()["name"])

    torchpar.maximum(X, X)
    kernel = maximum.maximum_flat_kernel
    knobs.runtime.launch_enter_hook.add(enter)
    kernel.add_pre_run_hook(lambda *args, **options: ran.append(len(args)))
    try:
        for _ in range(2):
            torchpar.maximum(X, X)
    finally:
        knobs.runtime.launch_enter_hook.remove(enter)
        kernel.pre_run_hooks.clear()
    torchpar.maximum(X, X)
    assert entered == ["maximum_flat_kernel"] * 2
    assert len(ran) == 2
    assert gpu == [0, 1, 1, 1]


def test_emulations_of_other_gpus_have_launches_of_their_own() -> None:
    launch.forget_launches()
    for arch in ("sm_90", "sm_80", "sm_90"):
        for multiprocessors in (4, 7):
            with nogpu.emulate(arch, multiprocessors=multiprocessors) as emulated:
                torchpar.maximum(X, X)
                assert [one.arch for one in emulated.launches] == [arch]
    assert len(launch._launches) == 4
    launch.forget_launches()


def test_truth_values_are_bytes_each_time(gpu: list[int]) -> None:
    for _ in range(3):
        assert torch.equal(torchpar.maximum(X > 0, X < -0.5), (X > 0) | (X < -0.5))
    assert gpu == [0, 0, 0, 1, 0, 1], "the launch is that of bytes"


def test_a_parameter_of_one_number_again(gpu: list[int]) -> None:
    one, two = torch.nn.Parameter(torch.tensor(1.0)), torch.tensor(2.0)
    with torch.no_grad():
        for a, b in ((one, two), (two, one), (one, one), (one, two)):
            assert torch.equal(torchpar.maximum(a, b), torch.maximum(a, b))


def test_gradients_of_the_same_layouts_again(gpu: list[int]) -> None:
    g = torch.linspace(-2, 2, 40 * 24).view(40, 24)
    for a, b in ((X, X.flip(0)), (X, ROW), (X, ROW.expand(40, 24)), (X, X.flip(0)), (X[:1], ROW)):
        of_g = g[: len(a)]
        for _ in range(2):
            leaves = [t.detach().requires_grad_() for t in (a, b)]
            found, expected = (
                torch.autograd.grad(op(*leaves), leaves, of_g)
                for op in (torchpar.maximum, torch.maximum)
            )
            for one, other in zip(found, expected, strict=True):
                assert one.shape == other.shape
                assert torch.allclose(one, other, rtol=2**-18, atol=2**-18)
    for rows in (40, 40, 7):
        y = X[:rows].sigmoid()
        dz, db = torch.ops.torchpar.linear_sigmoid_backward(g[:rows], y)
        assert torch.allclose(dz, g[:rows] * y * (1 - y), rtol=2**-18)
        assert torch.allclose(db, dz.sum(0), rtol=2**-14, atol=2**-18)
        half = torch.ops.torchpar.matmul_t_backward(C[:rows, :rows], X[:rows])
        assert torch.allclose(half, 2 * X[:rows], rtol=2**-9, atol=2**-9)
