# SPDX-License-Identifier: MIT
"""A kernel is checked alone: its values beside a reference, and its faults."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from nogpu import check_kernel
from nogpu.check.compare import difference
from nogpu.check.table import KernelTable

ROWS = ("races", "bounds", "uninitialised memory", "execution", "registers and spills")


@triton.jit
def add_kernel(x, y, out, n, FAULT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    step = 2 if FAULT == "twice" else 1
    tl.store(out + at, tl.load(x + at, inside) + step * tl.load(y + at, inside), inside)


def check_add(fault: str = "", grid: tuple[int, ...] = (2,), **how: object) -> KernelTable:
    x, y = torch.randn(100, dtype=torch.float64), torch.randn(100, dtype=torch.float64)
    out = torch.full_like(x, -1.0)
    found = check_kernel(
        add_kernel,
        grid,
        (x, y, out, 100),
        lambda x, y, out, n: {"out": x + y},
        FAULT=fault,
        BLOCK=64,
        **how,
    )
    assert (out == -1).all()  # the arguments stay as they are
    return found


def test_a_kernel_is_compared_with_its_reference():
    right = check_add()
    assert right.ok
    assert [row.name for row in right.rows] == ["values", *ROWS]
    assert check_add("twice")["values"].outcome == "wrong"
    assert check_add(grid=(1,))["values"].detail.startswith("out: ")
    x = torch.ones(4)
    found = check_kernel(
        add_kernel, (1,), (x, x, x.clone(), 4), lambda x, y, out, n: {"x": x}, FAULT="", BLOCK=4
    )
    assert found["values"].detail == "out: has changed, and the reference does not name it"
    assert check_add(arch="sm_80").name == "add_kernel for sm_80"


def test_what_is_right_before_the_launch_does_not_hide_what_is_left_out():
    x, y = torch.randn(100), torch.randn(100)
    left = x, y, x + y, 50  # as memory of `torch.empty` can be
    found = check_kernel(
        add_kernel, (4,), left, lambda x, y, out, n: {"out": x + y}, FAULT="", BLOCK=32
    )
    assert found["values"].outcome == "wrong"
    said = (
        "; the kernel leaves out 50 of 100 elements, which were right until the check changed them"
    )
    assert found["values"].detail.endswith(said)

    def first_half(x: Tensor, y: Tensor, out: Tensor, n: int) -> dict[str, Tensor]:
        return {"out": torch.cat([(x + y)[:n], out[n:]])}  # the reference uses what out holds

    assert check_kernel(add_kernel, (4,), left, first_half, FAULT="", BLOCK=32).ok

    def and_zeros(x: Tensor, y: Tensor, out: Tensor, n: int) -> dict[str, Tensor]:
        return {"out": torch.cat([(x + y)[:n], torch.zeros(50)])}

    zeros = x, y, torch.zeros(100), 50
    assert check_kernel(add_kernel, (4,), zeros, and_zeros, FAULT="", BLOCK=32).ok


def test_an_empty_grid_launches_nothing():
    found = check_add(grid=(0,))
    assert found["values"].outcome == "wrong"
    assert {(row.outcome, row.detail) for row in found.rows[1:]} == {
        ("not run", "the grid has no programs")
    }
    assert [row.name for row in found.rows] == [row.name for row in check_add().rows]


def test_wrong_arguments_of_check_kernel():
    x = torch.ones(4)
    with pytest.raises(ValueError, match="names 'result', expected one of x, y, out"):
        check_kernel(add_kernel, (1,), (x, x, x, 4), lambda *_: {"result": x}, FAULT="", BLOCK=4)
    with pytest.raises(ValueError, match="reference's 'out' is a float, expected a tensor"):
        check_kernel(add_kernel, (1,), (x, x, x, 4), lambda *_: {"out": 1.0}, FAULT="", BLOCK=4)
    with pytest.raises(ValueError, match="an object of type function, expected a function with t"):
        check_kernel(check_add, (1,), (x, x, x, 4), lambda *_: {"out": x}, FAULT="", BLOCK=4)
    with pytest.raises(ValueError, match="type Tensor, expected tensors by the names"):
        check_kernel(add_kernel, (1,), (x, x, x, 4), lambda *_: x, FAULT="", BLOCK=4)
    with pytest.raises(ValueError, match=r"'out' has shape \(3,\), expected the argument's: \(4,"):
        check_kernel(add_kernel, (1,), (x, x, x, 4), lambda *_: {"out": x[:3]}, FAULT="", BLOCK=4)
    with pytest.raises(ValueError, match="the grid is an object of type int, expected a tuple"):
        check_kernel(add_kernel, 1, (x, x, x, 4), lambda *_: {"out": x}, FAULT="", BLOCK=4)
    with pytest.raises(ValueError, match="expected a function with"):
        check_kernel(None, (1,), (x,), lambda x: {"x": x})


@triton.jit
def strided_add_kernel(x, y, out, n, X, Y, OUT, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.load(x + i * X, i < n) + tl.load(y + i * Y, i < n)
    tl.store(out + i * OUT, sums, i < n)


def check_strided(*tensors, strides=None) -> KernelTable:
    strides = strides or [t.stride(0) for t in tensors]
    given = (*tensors, len(tensors[0]), *strides)
    return check_kernel(
        strided_add_kernel, (8,), given, lambda x, y, out, *_: {"out": x + y}, BLOCK=16
    )


def test_arguments_keep_their_strides_and_what_they_share():
    x, y = torch.randn(100), torch.randn(200)
    assert check_strided(x, y[::2], torch.zeros(100, 3)[:, 1]).ok
    assert check_strided(x, x, torch.zeros(100)).ok
    assert check_strided(x, y[:100], x).ok  # in place
    # A stride of 0 is another one than the kernel is told; and programs write what others read.
    assert not check_strided(torch.randn(1).expand(100), x, torch.zeros(100), strides=[1, 1, 1]).ok
    assert check_strided(y[:100], x, y[50:150])["races"].outcome == "wrong"


def test_integers_are_compared_exactly():
    x = torch.arange(100)
    assert check_strided(x, x, torch.empty_like(x)).ok
    found = check_kernel(
        strided_add_kernel,
        (8,),
        (x, x, torch.empty_like(x), 100, 1, 1, 1),
        lambda x, y, out, *_: {"out": x + y + 1},
        BLOCK=16,
    )
    assert found["values"].detail.startswith("out: ")


def test_an_infinity_is_off_by_infinity():
    infinite, finite = torch.tensor([1.0, float("inf")]), torch.tensor([1.0, 2.0])
    where = "[1] of shape (2,) is inf, expected 2"
    assert difference(infinite, finite) == f"off by inf, of 2.0e+00: {where}"
    where = "[0] of shape (2,) is 1, expected 2"
    assert difference(infinite, infinite + finite) == f"off by 1.0e+00, of inf: {where}"


def test_a_conjugated_result_is_called_so():
    right = torch.tensor([1 + 2j, 3 - 1j])
    assert difference(right.conj().resolve_conj(), right).endswith("; conjugated")
    assert not difference(right + 1, right).endswith("; conjugated")
