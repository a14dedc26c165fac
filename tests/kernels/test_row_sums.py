# SPDX-License-Identifier: MIT
"""Gradients that a kernel sums: their errors, their bits, and what passes through memory.

An emulated GPU executes the operators of the backward. `test_ptx.py` compares exact sums.
"""

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from samples import LAYOUTS, assert_accurate, bits, metadata, normal, to_numpy
from torch import Tensor

import torchpar
from benchmarks.records.record import FLOATS, Shapes

pytest.importorskip("triton", reason="the kernels are written in Triton")

import triton

from nogpu import Launch, emulate
from torchpar.kernels import row_sums

TRITON = tuple(map(int, triton.__version__.split(".")[:2]))

F16, BF16, F32, F64 = FLOATS
slow = pytest.mark.slow
ops = torch.ops.torchpar
# Sums that follow one another in a program, and in the tree of its threads; so again in the launch
# that adds the sums of the programs.
DEPTH = 2 * (row_sums.MOST_STEPS + 10)


def assert_sum(actual: Tensor, native: Tensor, terms: Tensor, dims: list[int]) -> None:
    """A sum of ``terms``, float64, over ``dims``; PyTorch's own error is chance for few results."""
    expected = terms.sum(dims).view(actual.shape) if dims else terms.view(actual.shape)
    stored = torch.finfo(actual.dtype).eps / 2
    computed = torch.finfo(torch.promote_types(actual.dtype, F32)).eps / 2
    size = (terms.abs().sum(dims) if dims else terms.abs()).view(actual.shape)
    limit = stored * expected.abs() + DEPTH * computed * size + torch.finfo(actual.dtype).tiny
    assert ((actual.double() - expected).abs() <= limit).all()
    if actual.numel() > 100 and actual.dtype != F64:
        assert_accurate(actual, native, to_numpy(expected))


def of_maximum(g: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients by the formula, in the shape of g."""
    ties = torch.where(a == b, g / 2, g)
    return torch.where(a < b, 0, ties), torch.where(b < a, 0, ties)


def check_maximum(shapes: Shapes, dtype: torch.dtype, layout: str = "contiguous") -> list[Launch]:
    """Compare the gradients of operands of ``shapes``; return the launches."""
    a, b = (normal(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes))
    g = normal(*torch.maximum(a, b).shape, dtype=dtype, seed=2)
    g = g[:1].expand(g.shape) if layout == "repeated" else LAYOUTS[layout](g)
    with emulate() as gpu:
        first, found = (ops.maximum_backward(g, a, b) for _ in range(2))
    assert gpu.report().errors == []
    wide = of_maximum(g.double(), a.double(), b.double())
    for t, x, again, terms in zip((a, b), found, first, wide, strict=True):
        assert torch.equal(bits(x), bits(again))
        added = g.dim() - t.dim()
        dims = [d for d in range(g.dim()) if d < added or t.shape[d - added] != g.shape[d]]
        assert_sum(x, terms.to(dtype).sum_to_size(t.shape), terms, dims)
    fake = (torch.empty_strided(t.shape, t.stride(), dtype=dtype, device="meta") for t in (g, a, b))
    for x, y in zip(ops.maximum_backward(*fake), found, strict=True):
        assert metadata(x)[:-1] == metadata(y)[:-1]
    return gpu.launches[: len(gpu.launches) // 2]


@pytest.mark.parametrize(
    "shapes, dtype",
    [
        (((129, 127), (127,)), F32),
        (((127, 1), (127, 129)), BF16),
        pytest.param(((300, 129), (129,)), F16, marks=slow),
    ],
    ids=str,
)
def test_gradients_of_a_broadcast_operand(shapes: Shapes, dtype: torch.dtype) -> None:
    check_maximum(shapes, dtype)


@pytest.mark.parametrize(
    "shapes",
    [
        ((0, 3), (3,)),
        ((2, 3, 4, 5), (3, 1, 1)),
        ((3, 1, 8, 1), (1, 4, 1, 5)),
        *(
            pytest.param(shapes, marks=slow)
            for shapes in (
                ((3, 0), (3, 1)),
                ((0, 3), (1, 1)),
                ((3, 1, 5), (3, 4, 5)),
                ((2, 1, 4, 1, 3), (1, 5, 1, 6, 1)),
                ((1, 5, 7), (5, 7)),
            )
        ),
    ],
    ids=str,
)
def test_gradients_that_pytorch_sums(shapes: Shapes) -> None:
    launches = check_maximum(shapes, F32)
    kernels = {"maximum_backward_strided_kernel", "maximum_backward_flat_kernel"}
    assert {launch.kernel for launch in launches} <= kernels


@slow
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "shapes",
    [
        ((129,), (1, 129)),
        ((2049, 130), (130,)),
        ((130, 2049), (130, 1)),
        ((2, 9001), (2, 1)),
        ((70001,), ()),
        ((65, 1), (1, 129)),
    ],
    ids=str,
)
def test_long_sums(shapes: Shapes, dtype: torch.dtype) -> None:
    check_maximum(shapes, dtype)


@slow
@pytest.mark.parametrize("layout", ["transposed", "stepped", "expanded", "repeated"])
@pytest.mark.parametrize("shapes", [((129, 127), (127,)), ((127, 1), (127, 129))], ids=str)
def test_incoming_gradients_of_any_layout(shapes: Shapes, layout: str) -> None:
    check_maximum(shapes, F32, layout)


def test_operands_of_one_shape_but_for_its_ones_are_not_summed() -> None:
    a, b = normal(1, 7, 5).mT, normal(5, 7)
    g = normal(1, 5, 7)
    with emulate() as gpu:
        da, db = ops.maximum_backward(g, a, b)
    assert [launch.kernel for launch in gpu.launches] == ["maximum_backward_strided_kernel"]
    assert (da.shape, db.shape) == (a.shape, b.shape)
    wide = of_maximum(g, a, b)
    assert torch.equal(da, wide[0])
    assert torch.equal(db, wide[1][0])


def test_dtypes_and_devices_of_gradients() -> None:
    a, b, c = normal(5, 70), normal(70, dtype=F16, seed=1), torch.tensor(0.25, dtype=F64)
    for operands in ((a, b), (a, c)):
        pair = [t.clone().requires_grad_() for t in operands]
        with emulate():
            found = torch.autograd.grad(torchpar.maximum(*pair).sum(), pair)
        expected = torch.autograd.grad(torch.maximum(*pair).sum(), pair)
        for x, y, t in zip(found, expected, pair, strict=True):
            assert (x.dtype, x.shape) == (t.dtype, t.shape)
            assert torch.equal(x, y)  # sums of halves are exact


def count_stores(launches: list[Launch]) -> int:
    accesses = [one for launch in launches for one in launch.counters.in_space("global")]
    return sum(one.bytes for one in accesses if one.what == "store")


@pytest.mark.parametrize("shapes", [((8, 64), (8, 64)), ((8, 64), (64,))], ids=str)
def test_only_the_gradients_that_are_needed_are_written(shapes: Shapes) -> None:
    pair = [normal(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    expected = torch.autograd.grad(
        torch.maximum(*(wide := [t.clone().requires_grad_() for t in pair])).sum(), wide
    )
    for needed in ((True, False), (False, True)):
        mine = [t.clone().requires_grad_(need) for t, need in zip(pair, needed, strict=True)]
        with emulate() as gpu:
            y = torchpar.maximum(*mine)
            before = len(gpu.launches)
            y.sum().backward()
        for t, need, gradient in zip(mine, needed, expected, strict=True):
            if need:
                torch.testing.assert_close(t.grad, gradient)
                assert count_stores(gpu.launches[before:]) == t.nbytes
            else:
                assert t.grad is None


def transferred(launches: list[Launch]) -> int:
    """The bytes of the sectors of global memory that launches read and write."""
    return sum(32 * launch.counters.sums("global").transactions for launch in launches)


def least(*tensors: Tensor) -> int:
    return sum(t.nbytes for t in tensors)


@pytest.mark.parametrize("kept", ["row", "column"])
def test_each_number_passes_through_memory_once(kept: str) -> None:
    g, a = normal(64, 1024), normal(64, 1024, seed=1)
    b = normal(1024, seed=2) if kept == "row" else normal(64, 1, seed=2)
    with emulate(multiprocessors=16) as gpu:
        ops.maximum_backward(g, a, b)
    (launch,) = gpu.launches
    assert launch.kernel == "maximum_backward_sums_kernel"
    assert launch.programs >= 2 * 16
    assert transferred(gpu.launches) <= 1.1 * least(g, a, b, a, b)
    gpu.assert_counters(max_sector_ratio=1, max_spilled_bytes=0)
    if TRITON >= (3, 8):  # earlier ones make sums with bank conflicts
        gpu.assert_counters(max_bank_conflicts=0)
    # A gradient of b that is written as a whole takes more, before it is summed.
    with emulate() as gpu:
        ops.maximum_backward(g, a, b.expand(g.shape).clone())
    assert transferred(gpu.launches) > 1.1 * least(g, a, b, a, b)


def check_layer(m: int, n: int, dtype: torch.dtype, layout: str = "contiguous") -> list[Launch]:
    """Compare dL/dZ and dL/db of a layer with a sigmoid; return the launches."""
    y = normal(m, n, dtype=dtype).sigmoid()
    g = normal(m, n, dtype=dtype, seed=1)
    g = g[:1].expand(g.shape) if layout == "repeated" else LAYOUTS[layout](g)
    with emulate(multiprocessors=16) as gpu:
        first, found = (ops.linear_sigmoid_backward(g, y) for _ in range(2))
    assert gpu.report().errors == []
    assert torch.equal(bits(first[1]), bits(found[1]))
    wide = g.double() * y.double() * (1 - y.double())
    native: Any = torch.ops.aten.sigmoid_backward(g, y)
    assert_accurate(found[0], native, to_numpy(wide), roundings=3)
    # Each term has three roundings, too.
    assert_sum(found[1], native.sum(0), wide, [0])
    return gpu.launches[: len(gpu.launches) // 2]


@pytest.mark.parametrize(
    "m, n, dtype, launches", [(127, 129, F32, 1), (257, 129, BF16, 2)], ids=str
)
def test_gradients_of_a_layer_take_at_most_two_launches(
    m: int, n: int, dtype: torch.dtype, launches: int
) -> None:
    kernels = [launch.kernel for launch in check_layer(m, n, dtype)]
    assert kernels == ["sigmoid_backward_kernel", "add_partial_sums_kernel"][:launches]


@slow
@pytest.mark.parametrize("hint", [8, 1024])
def test_the_division_of_other_sizes_is_right(hint: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph with symbolic sizes keeps that of the sizes that it was traced with."""
    monkeypatch.setattr(row_sums, "hint", lambda size: hint)
    check_layer(300, 70, F32)
    check_maximum(((300, 70), (70,)), F32)
    check_maximum(((70, 5000), (70, 1)), F32)


@slow
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "stepped", "expanded", "repeated"])
@pytest.mark.parametrize("m, n", [(0, 3), (3, 0), (1, 129), (2049, 127), (9001, 2)])
def test_gradients_of_a_layer_of_any_layout(m: int, n: int, layout: str) -> None:
    for dtype in FLOATS:
        check_layer(m, n, dtype, layout)


def test_the_judge_of_sums_rejects_a_sum_in_16_bits() -> None:
    terms = normal(3000, 3, dtype=F64)
    total = torch.zeros(3, dtype=BF16)
    for row in terms.to(BF16):
        total += row
    with pytest.raises(AssertionError):
        assert_sum(total, terms.sum(0).to(BF16), terms, [0])
    assert_sum(terms.sum(0).to(BF16), terms.sum(0).to(BF16), terms, [0])


@pytest.mark.parametrize("shape", [(), pytest.param((4,), marks=slow), (3, 1)])
def test_operands_that_repeat_alike(shape: tuple[int, ...]) -> None:
    """No operand of (3, 4) has strides without 0, and only one gradient is needed."""
    a = torch.zeros(shape).expand(3, 4)
    b = torch.tensor([0.5, -0.5, 0.0, 2.0])[: max(1, math.prod(shape))].view(shape)
    gradients = []
    for run in (torch.maximum, torchpar.maximum):
        leaf = b.clone().requires_grad_()
        with emulate("sm_90") if run is torchpar.maximum else nullcontext():
            run(a, leaf).sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_no_gradient_is_needed() -> None:
    x = torch.ones(2, 3)
    with emulate("sm_90") as gpu:
        da, db = torch.ops.torchpar.maximum_backward(x, x, x, False, False)
    assert da.shape == db.shape == (0,)
    assert not gpu.launches
