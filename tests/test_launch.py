# SPDX-License-Identifier: MIT
"""Launch plans: kept by layout, with what a launch passes to the driver. A stand-in takes the launches."""

import struct
from collections.abc import Iterator
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels are written in Triton")
from benchmarks.host import idle_driver
from torchpar.kernels import launch, linear_sigmoid, matmul_t, maximum, sigmoid_backward
from torchpar.kernels.candidates import Tiles
from torchpar.kernels.launch import Plan

N, K = 96, 64
TMA = Tiles(64, 128, 64, 4, 4, "tma")
SPLIT = Tiles(64, 64, 16, 4, 4, "split_k")
FIRST = 9  # of the launcher's arguments, the kernel's; before it are the grid, the stream and hooks


class Log(NamedTuple):
    """The plans whose kernels Triton specialised; the grid and the arguments of each launch."""

    compiled: list[Plan]
    launched: list[tuple[tuple[int, ...], tuple]]


# Triton keeps a compiled kernel with the launcher that it had first, so that all tests share one.
LOG = Log([], [])


@pytest.fixture(autouse=True)
def log() -> Iterator[Log]:
    log = LOG
    log.compiled.clear()
    log.launched.clear()
    compile_kernel = Plan._compile

    def record(self: Plan, *args):
        log.compiled.append(self)
        return compile_kernel(self, *args)

    launch.forget_plans()
    with (
        idle_driver(lambda *args: log.launched.append((args[:3], args[FIRST:]))),
        patch.object(Plan, "_compile", record),
    ):
        yield log
    launch.forget_plans()


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("tiles", [None, TMA])
def test_a_kept_plan_passes_what_triton_passed(log, tiles):
    x, c = meta(N, K), meta(N, N)
    for _ in range(3):
        matmul_t.symmetric_product(x, x, "ieee", None, c, 1 / 3, -2.0, out=c, tiles=tiles)
    assert len(log.compiled) == 1
    first, *others = log.launched
    assert len(others) == 2
    for grid, arguments in others:
        assert grid == first[0]
        assert all(
            a is b if isinstance(a, Tensor) else a == b for a, b in zip(arguments, first[1], strict=True)
        )
    assert [*first[1][:4]] == [x, x, c, c]
    assert struct.pack("<2q", *first[1][4:6]) == struct.pack("<2d", 1 / 3, -2.0)


def test_each_call_passes_its_own_tensors_and_factors(log):
    results = [
        matmul_t.symmetric_product(x, x, "ieee", None, alpha=alpha)
        for x, alpha in ((meta(N, K), 2.0), (meta(N, K), 3.0))
    ]
    assert len(log.compiled) == 1
    for (_, arguments), result, alpha in zip(log.launched, results, (2.0, 3.0), strict=True):
        assert arguments[3] is result
        assert struct.pack("<q", arguments[4]) == struct.pack("<d", alpha)


@pytest.mark.parametrize(
    "other",
    [
        lambda: meta(N + 32, K),
        lambda: meta(K, N).mT,
        lambda: meta(N, K, dtype=torch.float16),
        lambda: meta(1, N, K),
        lambda: meta(N * K + 1)[1:].view(N, K),  # 2 bytes on, though nothing has an address here
    ],
    ids=["shape", "strides", "dtype", "dimensions", "offset"],
)
def test_another_layout_has_a_plan_of_its_own(log, other):
    for x in (meta(N, K), other()):
        matmul_t.symmetric_product(x, x, "ieee", None)
    assert len(log.compiled) == 2


def test_an_address_off_16_bytes_has_a_plan_of_its_own(log):
    """Triton assumes the alignment that the first call's tensors had."""
    room = torch.empty(N * N + 8, dtype=torch.bfloat16)
    aligned, other = room[: N * N], room[1 : 1 + N * N]
    assert aligned.data_ptr() % 16 == 0
    for a in (aligned, other, aligned, other):
        maximum.maximum(a, aligned, aligned, None)
    assert len(log.compiled) == 2


def test_a_given_result_is_a_part_of_the_layout(log):
    x, room = torch.ones(N, K, dtype=torch.bfloat16), torch.empty(N * N + 8, dtype=torch.bfloat16)
    for out in (room[: N * N], room[1 : 1 + N * N], torch.empty(N * N)):
        matmul_t.symmetric_product(x, x, "ieee", None, out=out.view(N, N), tiles=Tiles(64, 64, 32, 8, 3))
        matmul_t.half_sum(room[: N * N].view(N, N), None, out=out.view(N, N))
    assert len(log.compiled) == 6


def test_two_operands_are_not_one(log):
    """``x`` and a copy of it have one layout; a plan for X·Xᵀ would not look at the copy."""
    x = meta(N, K)
    matmul_t.symmetric_product(x, x, "ieee", None, tiles=TMA)
    matmul_t.symmetric_product(x, meta(N, K), "ieee", None, tiles=TMA)
    assert [plan.constants["SAME"] for plan in log.compiled] == [True, False]


def test_the_stride_of_a_batch_of_one_suits_tma(log):
    """A slice of an expanded batch has a stride of 0."""
    for x in (meta(N, K), meta(N, K).expand(3, N, K)[:1]):
        matmul_t.symmetric_product(x, x, "ieee", None, tiles=TMA)
    a_batch = 9  # after four tensors, two factors, batches, n and k
    assert [arguments[a_batch] for _, arguments in log.launched] == [N * K] * 2


def test_all_launchers_keep_plans(log):
    x, bias, out, wide = meta(N, N), meta(N), meta(N, N), meta(N, 8 * K)
    for _ in range(2):
        matmul_t.half_sum(x, None)
        matmul_t.mirror(x, None)
        linear_sigmoid.linear_sigmoid(x, x, bias, "ieee", None)
        linear_sigmoid.linear_sigmoid(wide, wide, bias, "ieee", None, tiles=SPLIT)
        sigmoid_backward.sigmoid_backward(x, x, out, None)
        maximum.maximum(x, x, out, None)
        maximum.maximum(x, x[0].expand(N, N), out, None)
        maximum.maximum_backward(x, x, x, out, out, None)
    assert len(log.compiled) == 9
    assert len(log.launched) == 18


def test_plans_are_forgotten(log):
    x = meta(N, K)
    for _ in range(2):
        matmul_t.symmetric_product(x, x, "ieee", None)
        launch.forget_plans()
    assert len(log.compiled) == 2


def test_plans_are_bounded(log):
    with patch.object(launch, "_MOST", 3):
        for n in range(16, 16 * 6, 16):
            matmul_t.half_sum(meta(n, n), None)
            assert len(launch._plans) <= 3
