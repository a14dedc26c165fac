# SPDX-License-Identifier: MIT
"""Right kernels that look like faulty ones: a report of an error in one of them is false.

Several are those of `faults` without the fault. Two patterns come from the compiler. A tensor with
fewer elements than the program has threads is held by several warps, which read what another
overwrites in place, and drop what they read. Lanes that hold the same sum may differ in its last
bit, because one product of x·x + y·y is fused into the sum, and each lane fuses another one.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

Result = tuple[Tensor, Tensor, Tensor | float]  # found, expected in float64, bound
U = 2.0**-24

RIGHT: dict[str, Callable[[], list[Result]]] = {}


def right(run: Callable[[], list[Result]]) -> Callable[[], list[Result]]:
    """Register a function that launches right kernels, under its name."""
    RIGHT[run.__name__.replace("_", " ")] = run
    return run


def whole(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers from 1 to 7, whose sums are exact."""
    return (torch.arange(torch.Size(shape).numel()) * 3 % 7 + 1).reshape(shape).to(dtype)


def flags(count: int = 1) -> Tensor:
    return torch.zeros(count, dtype=torch.int32)


# Programs that wait for each other.


@triton.jit
def lock_kernel(x, sums, lock, BLOCK: tl.constexpr):
    j = tl.arange(0, BLOCK)
    value = tl.load(x + tl.program_id(0) * BLOCK + j)
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    tl.store(sums + j, tl.load(sums + j) + value)
    tl.debug_barrier()
    tl.atomic_xchg(lock, 0)


@right
def lock_with_barrier() -> list[Result]:
    x, sums = whole(6, 256), torch.zeros(256)
    lock_kernel[(6,)](x, sums, flags(), BLOCK=256, num_warps=4)
    return [(sums, x.double().sum(0), 0)]


@triton.jit
def last_arrival_kernel(x, partial, arrived, out, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    value = tl.load(x + pid * BLOCK + tl.arange(0, BLOCK))
    tl.store(partial + pid, tl.sum(value, axis=0))
    tl.debug_barrier()
    if tl.atomic_add(arrived, 1) == PARTS - 1:
        tl.debug_barrier()
        tl.store(out, tl.sum(tl.load(partial + tl.arange(0, PARTS)), axis=0))


@right
def last_arrival_adds_all() -> list[Result]:
    x, partial, out = whole(8, 256), torch.empty(8), torch.empty(1)
    last_arrival_kernel[(8,)](x, partial, flags(), out, PARTS=8, BLOCK=256)
    return [(out, x.double().sum().reshape(1), 0)]


@triton.jit
def chain_kernel(x, totals, ready, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    own = tl.sum(tl.load(x + pid * BLOCK + tl.arange(0, BLOCK)), axis=0)
    if pid > 0:
        while tl.atomic_add(ready + pid - 1, 0) == 0:
            pass
        own += tl.load(totals + pid - 1)
    tl.store(totals + pid, own)
    tl.debug_barrier()
    tl.atomic_xchg(ready + pid, 1)


@right
def chain_of_sums() -> list[Result]:
    x, totals = whole(8, 128), torch.empty(8)
    chain_kernel[(8,)](x, totals, flags(8), BLOCK=128)
    return [(totals, x.double().sum(1).cumsum(0), 0)]


@triton.jit
def all_programs_kernel(x, out, arrived, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Each program writes a part of x, awaits all, and reads the part of the next program."""
    pid, j = tl.program_id(0), tl.arange(0, BLOCK)
    tl.store(x + pid * BLOCK + j, pid * BLOCK + j)
    tl.debug_barrier()
    tl.atomic_add(arrived, 1)
    while tl.atomic_add(arrived, 0) < PARTS:
        pass
    tl.debug_barrier()
    value = tl.load(x + (pid + 1) % PARTS * BLOCK + j)
    tl.store(out + pid * BLOCK + j, value)


@right
def barrier_of_programs_that_fit() -> list[Result]:
    x = torch.empty(8, 128, dtype=torch.int32)
    out = torch.empty_like(x)
    all_programs_kernel[(8,)](x, out, flags(), PARTS=8, BLOCK=128)
    return [(out, torch.arange(1024.0).double().reshape(8, 128).roll(-1, 0), 0)]


@triton.jit
def ticket_kernel(out, tickets, BLOCK: tl.constexpr):
    """The order of a counter is enough where nothing else is shared."""
    ticket = tl.atomic_add(tickets, 1, sem="relaxed")
    tl.store(out + ticket * BLOCK + tl.arange(0, BLOCK), ticket)


@right
def relaxed_tickets() -> list[Result]:
    out = torch.empty(6, 64, dtype=torch.int32)
    ticket_kernel[(6,)](out, flags(), BLOCK=64)
    return [(out, torch.arange(6.0).double()[:, None].expand(6, 64), 0)]


# Threads of one program.


@triton.jit
def double_in_place_kernel(x, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + i, 2 * tl.load(x + i, mask=i < n), mask=i < n)


@right
def in_place_with_copies() -> list[Result]:
    """Each of 4 warps holds the 16 elements."""
    x = whole(50)
    expected = 2 * x.double()
    double_in_place_kernel[(4,)](x, 50, BLOCK=16, num_warps=4)
    return [(x, expected, 0)]


@triton.jit
def normalise_in_place_kernel(x, squares, columns, BLOCK: tl.constexpr):
    row, j = tl.program_id(0), tl.arange(0, BLOCK)
    line = tl.load(x + row * columns + j, mask=j < columns, other=0.0)
    total = tl.sum(line * line, axis=0)
    tl.store(squares + row, total)
    tl.store(x + row * columns + j, line / tl.sqrt(total), mask=j < columns)


@right
def normalise_in_place() -> list[Result]:
    """Lanes differ in the last bit of the sum, and warps hold copies of the row."""
    x = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    squares, exact = torch.empty(4), x.double()
    total = exact.square().sum(1)
    normalise_in_place_kernel[(4,)](x, squares, 50, BLOCK=64, num_warps=4)
    expected = exact / total.sqrt()[:, None]
    # A sum of 50 squares is wrong by 51 U of itself, half of which its root keeps; √ and / by 4 U.
    return [(squares, total, 51 * U * total), (x, expected, 60 * U * expected.abs())]


@triton.jit
def dot_rows_kernel(a, b, out, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS,), a.dtype.element_ty)
    for start in range(0, columns, BLOCK):
        j = start + tl.arange(0, BLOCK)
        place, mask = row[:, None] * columns + j[None, :], j[None, :] < columns
        total += tl.sum(tl.load(a + place, mask, 0.0) * tl.load(b + place, mask, 0.0), axis=1)
    tl.store(out + row, total)


@right
def dot_products_near_zero() -> list[Result]:
    """Lanes hold sums that differ by more than the last bits, as the products cancel."""
    results: list[Result] = []
    for dtype, u in ((torch.float32, U), (torch.float64, 2.0**-53)):
        generator = torch.Generator().manual_seed(0)
        a, b = torch.randn(2, 40, 300, dtype=dtype, generator=generator)
        out = torch.empty(40, dtype=dtype)
        dot_rows_kernel[(10,)](a, b, out, 300, ROWS=4, BLOCK=64, num_warps=4)
        products = a.double() * b.double()
        results.append((out, products.sum(1), 320 * u * products.abs().sum(1)))
    return results


@triton.jit
def reverse_through_scratch_kernel(x, scratch, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(scratch + i, tl.load(x + i))
    tl.debug_barrier()
    tl.store(out + i, tl.load(scratch + BLOCK - 1 - i))


@right
def scratch_with_barrier() -> list[Result]:
    x, scratch, out = whole(256), torch.empty(256), torch.empty(256)
    reverse_through_scratch_kernel[(1,)](x, scratch, out, BLOCK=256)
    return [(out, x.double().flip(0), 0)]


@triton.jit
def recurrence_kernel(sums, x, steps, BLOCK: tl.constexpr):
    """Each thread reads what it stored itself, in a loop that is not pipelined."""
    j = tl.arange(0, BLOCK)
    for step in tl.range(1, steps, num_stages=1):
        before = tl.load(sums + (step - 1) * BLOCK + j)
        tl.store(sums + step * BLOCK + j, before + tl.load(x + step * BLOCK + j))


@right
def recurrence() -> list[Result]:
    x, sums = whole(8, 128), torch.empty(8, 128)
    sums[0] = x[0]
    recurrence_kernel[(1,)](sums, x, 8, BLOCK=128)
    return [(sums, x.double().cumsum(0), 0)]


@triton.jit
def mark_kernel(places, marks, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(places + i, mask=i < n, other=0)
    tl.store(marks + place, 1, mask=i < n)


@right
def equal_values_at_one_place() -> list[Result]:
    """Threads and programs that store the same value do no harm, though PTX calls it a race."""
    places, marks = whole(100, dtype=torch.int32), torch.zeros(9, dtype=torch.int8)
    mark_kernel[(2,)](places, marks, 100, BLOCK=64)
    return [(marks, torch.tensor([0, 1, 1, 1, 1, 1, 1, 1, 0]).double(), 0)]


@triton.jit
def count_kernel(x, counts, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bins = tl.load(x + i, mask=i < n, other=0)
    tl.atomic_add(counts + bins, 1, mask=i < n, sem="relaxed")


@right
def histogram_by_atomics() -> list[Result]:
    x, counts = whole(300, dtype=torch.int32), flags(8)
    count_kernel[(3,)](x, counts, 300, BLOCK=128)
    return [(counts, torch.bincount(x, minlength=8).double(), 0)]


# Bounds, and memory that nobody wrote.


@triton.jit
def add_kernel(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + i, mask=i < n)
    b = tl.load(y + i, mask=i < n)
    tl.store(out + i, a + b, mask=i < n)


@right
def programs_that_write_nothing() -> list[Result]:
    x, y, out = whole(100), whole(100), torch.empty(100)
    add_kernel[(5,)](x, y, out, 100, BLOCK=64)
    return [(out, 2 * x.double(), 0)]


@right
def empty_tensor() -> list[Result]:
    x = torch.empty(0)
    add_kernel[(1,)](x, x, x, 0, BLOCK=64)
    return [(x, x.double(), 0)]


@triton.jit
def copy_strided_kernel(x, out, n, stride, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i * stride, tl.load(x + i, mask=i < n), mask=i < n)


@right
def interleaved_outputs() -> list[Result]:
    """Two launches write the even and the odd elements of what `torch.empty` made."""
    x, out = whole(100), torch.empty(200)
    for first in (0, 1):
        copy_strided_kernel[(2,)](x, out[first:], 100, 2, BLOCK=64)
    return [(out, x.double().repeat_interleave(2), 0)]


@right
def neighbouring_bytes() -> list[Result]:
    """Programs write bytes of the same words."""
    x, out = whole(99, dtype=torch.int8), torch.empty(99, dtype=torch.int8)
    copy_strided_kernel[(33,)](x, out, 99, 1, BLOCK=4)
    copy_strided_kernel[(100,)](x, out, 99, 1, BLOCK=1)
    return [(out, x.double(), 0)]


@triton.jit
def maximum_kernel(x, out, columns, BLOCK: tl.constexpr):
    """What a load leaves undefined is not used."""
    row, j = tl.program_id(0), tl.arange(0, BLOCK)
    line = tl.load(x + row * columns + j, mask=j < columns)
    tl.store(out + row, tl.max(tl.where(j < columns, line, -float("inf")), axis=0))


@right
def undefined_but_unused() -> list[Result]:
    x, out = -whole(4, 50), torch.empty(4)
    maximum_kernel[(4,)](x, out, 50, BLOCK=64)
    return [(out, x.double().amax(1), 0)]


@triton.jit
def strided_maximum_kernel(x, out, stride, columns, BLOCK: tl.constexpr):
    row, j = tl.program_id(0), tl.arange(0, BLOCK)
    line = tl.load(x + row * stride + j, mask=j < columns, other=-float("inf"))
    tl.store(out + row, tl.max(line, axis=0))


@right
def view_of_a_larger_tensor() -> list[Result]:
    """The stride leaves elements of `torch.empty` unread between the rows."""
    x = torch.empty(5, 80)
    x[:, 10:60] = -whole(5, 50)
    out = torch.empty(5)
    strided_maximum_kernel[(5,)](x[:, 10:60], out, x.stride(0), 50, BLOCK=64)
    return [(out, x[:, 10:60].double().amax(1), 0)]


@triton.jit
def boxes_kernel(x, out, BM: tl.constexpr, BN: tl.constexpr):
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    out.store([m, n], 2 * x.load([m, n]))


@right
def boxes_that_end_outside() -> list[Result]:
    """A copy by descriptor reads 0 outside the tensor, and writes nothing there."""
    x, out = whole(40, 36), torch.empty(40, 36)
    boxes = [TensorDescriptor.from_tensor(one, [16, 32]) for one in (x, out)]
    boxes_kernel[(3, 2)](*boxes, BM=16, BN=32)
    return [(out, 2 * x.double(), 0)]
