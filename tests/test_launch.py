# SPDX-License-Identifier: MIT
"""Launch plans: kept by layout, with what a launch passes to the driver. A stand-in takes the launches."""

import struct
from collections.abc import Iterator
from contextvars import copy_context
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels are written in Triton")
from benchmarks.host import idle_driver
from torchpar.kernels import exact_matmul, launch, linear_sigmoid, matmul_t, maximum, sigmoid_backward
from torchpar.kernels.launch import Plan
from torchpar.kernels.tiles import Tiles

N, K = 96, 64
TMA = Tiles(64, 128, 64, 4, 4, "tma")
SPLIT = Tiles(64, 64, 16, 4, 4, "split_k")
FIRST = 9  # of the launcher's arguments, the kernel's; before it are the grid, the stream and hooks


class Log(NamedTuple):
    """The plans whose kernels Triton specialised; the grid and the arguments of each launch."""

    compiled: list[Plan]
    launched: list[tuple[tuple[int, ...], tuple]]


LOG = Log([], [])  # Triton keeps a compiled kernel with the launcher that it had first: all tests share one


@pytest.fixture(autouse=True)
def log() -> Iterator[Log]:
    compile_kernel = Plan._compile

    def record(self: Plan, *args):
        LOG.compiled.append(self)
        return compile_kernel(self, *args)

    LOG.compiled.clear()
    LOG.launched.clear()
    launch.forget_plans()
    with (
        idle_driver(lambda *args: LOG.launched.append((args[:3], args[FIRST:]))),
        patch.object(Plan, "_compile", record),
    ):
        yield LOG
    launch.forget_plans()


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("tiles", [None, TMA])
def test_a_kept_plan_passes_what_triton_passed(log, tiles):
    calls = [(meta(N, K), meta(N, N), alpha) for alpha in (1 / 3, 1 / 3, 2.0)]
    for x, c, alpha in calls:
        matmul_t.symmetric_product(x, x, "ieee", None, c, alpha, -2.0, out=c, tiles=tiles)
    assert len(log.compiled) == 1
    for (x, c, alpha), (grid, arguments) in zip(calls, log.launched, strict=True):
        assert list(map(id, arguments[:4])) == list(map(id, (x, x, c, c)))
        assert struct.pack("<2q", *arguments[4:6]) == struct.pack("<2d", alpha, -2.0)
        assert (grid, arguments[6:]) == (log.launched[0][0], log.launched[0][1][6:])


def test_another_layout_has_a_plan_of_its_own(log):
    off_16_bytes = meta(N * K + 1)[1:].view(N, K)  # though nothing has an address here
    others = meta(N + 32, K), meta(K, N).mT, meta(N, K, dtype=torch.float16), meta(1, N, K), off_16_bytes
    for count, x in enumerate((meta(N, K), *others), 1):
        matmul_t.symmetric_product(x, x, "ieee", None)
        assert len(log.compiled) == count


def test_an_address_off_16_bytes_has_a_plan_of_its_own(log):
    """Triton assumes the alignment that the first call's tensors had, and the result that it was given."""
    room = torch.empty(N * N + 8, dtype=torch.bfloat16)
    aligned, other = room[: N * N].view(N, N), room[1 : 1 + N * N].view(N, N)
    assert aligned.data_ptr() % 16 == 0
    for a in (aligned, other, aligned, other):
        maximum.maximum(a, aligned, aligned, None)
    assert len(log.compiled) == 2
    for out in (aligned, other, torch.empty(N, N)):
        matmul_t.half_sum(aligned, None, out=out)
    assert len(log.compiled) == 5


def test_operands_of_one_layout(log):
    """A plan for X·Xᵀ would not look at a copy of X. The stride of a batch of one does not matter to TMA."""
    x, context = meta(N, K), dict(copy_context())
    for a, b in ((x, x), (x, meta(N, K)), [meta(N, K).expand(3, N, K)[:1]] * 2):
        matmul_t.symmetric_product(a, b, "ieee", None, tiles=TMA)
    assert [plan.constants["SAME"] for plan in log.compiled] == [True, False, True]
    a_batch = 9  # after four tensors, two factors, batches, n and k
    assert [arguments[a_batch] for _, arguments in log.launched] == [N * K] * 3
    assert dict(copy_context()) == context, "the allocator that the user has set"


def test_all_launchers_keep_plans_until_they_are_forgotten(log):
    x, bias, out, wide = meta(N, N), meta(N), meta(N, N), meta(N, 8 * K)
    for calls in (1, 2, 3):
        matmul_t.half_sum(x, None)
        matmul_t.mirror(x, None)
        linear_sigmoid.linear_sigmoid(x, x, bias, "ieee", None)
        linear_sigmoid.linear_sigmoid(wide, wide, bias, "ieee", None, tiles=SPLIT)
        sigmoid_backward.sigmoid_backward(x, x, out, None)
        maximum.maximum(x, x, out, None)
        maximum.maximum(x, x[0].expand(N, N), out, None)
        maximum.maximum_backward(x, x, x, out, out, None)
        assert len(log.launched) == 9 * calls
        assert len(log.compiled) == (9 if calls < 3 else 18)
        if calls == 2:
            launch.forget_plans()


def test_plans_are_bounded(log):
    with patch.object(launch, "_MAX_PLANS", 3):
        for n in range(16, 16 * 6, 16):
            matmul_t.half_sum(meta(n, n), None)
            assert len(launch._plans) <= 3


class Launch:
    """``wrap``, which notes a launch and compiles nothing."""

    def __call__(self, kernel: Any) -> "Launch":
        return self

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def note(*args: Any, **options: Any) -> None:
            self.programs, self.options = grid[0], options

        return note


def test_programs_of_products():
    """By TMA as many as run at a time; by pointers one for each tile."""
    x, noted = meta(4096, 64), Launch()
    for tiles, triangle, square in (
        (TMA, 264, 264),  # two of 4 warps on each of 132 multiprocessors
        (Tiles(128, 128, 64, 8, 3, "tma"), 132, 132),
        (Tiles(128, 128, 64, 8, 3), 528, 1024),
    ):
        matmul_t.symmetric_product(x, x, "ieee", noted, tiles=tiles)
        assert noted.programs == triangle
        linear_sigmoid.linear_sigmoid(x, x, None, "ieee", noted, tiles=tiles)
        assert noted.programs == square


def test_programs_of_the_other_kernels():
    """More would do nothing, and no test of values would notice."""
    g, flat, rows = meta(257, 65), meta(8193), meta(33, 129)
    for launcher, args, programs in (
        (matmul_t.half_sum, (meta(3, 200, 200),), 3 * 10),
        (matmul_t.mirror, (meta(128, 128),), 3),
        (sigmoid_backward.sigmoid_backward, (g, g, g), 2 * 2),
        (maximum.maximum, (flat, flat, flat), 9),
        (maximum.maximum, (rows, rows[0].expand(33, 129), rows), 5),
        (maximum.maximum_backward, (rows, rows, rows[0].expand(33, 129), rows, rows), 9),
    ):
        noted = Launch()
        launcher(*args, noted)
        assert noted.programs == programs, launcher.__name__


@pytest.mark.parametrize(
    "n, strides, symmetric, block, programs",
    [
        (1152, (64, 1), False, (128, 64, 8), 9 * 18),
        (1024, (64, 1), False, (64, 32, 8), 16 * 32),  # 8 · 16 large tiles for 132 multiprocessors
        (1152, (1, 1152), False, (128, 64, 8), 9 * 18),
        (1088, (64, 1), True, (64, 64, 4), 17 * 18 // 2),
        (1088, (1, 1088), True, (64, 64, 8), 17 * 18 // 2),
        (1024, (64, 1), True, (32, 32, 4), 32 * 33 // 2),
        (1152, (66, 1), False, (64, 32, 8), 18 * 36),  # rows begin on 8 bytes
        (1152, (128, 2), False, (64, 32, 8), 18 * 36),  # neither rows nor columns are contiguous
    ],
)
def test_tiles_of_the_exact_product(n, strides, symmetric, block, programs):
    noted = Launch()
    a, b = (torch.empty_strided((n, 64), strides, device="meta") for _ in range(2))
    e = meta(n, dtype=torch.int32)
    out = meta(n, n, dtype=torch.float32)
    exact_matmul.exact_product(a, a if symmetric else b, e, e, noted, out=out)
    assert tuple(noted.options[name] for name in ("BLOCK_M", "BLOCK_N", "num_warps")) == block
    assert noted.programs == programs
