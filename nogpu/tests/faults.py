# SPDX-License-Identifier: MIT
"""Small Triton kernels with one fault each, of the kinds that people make.

A comment ``# FAULT`` stands at the line with the mistake. Where the fault shows at other lines,
such as at the load that leaves the tensor because of a wrong grid, ``# NAMED`` stands at each line
that a report may name. A line that is both has both. The results are whole numbers, and exact.
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

Pair = tuple[Tensor, Tensor]  # what a launch computed, and what is right

BOUNDS = "out of bounds"
UNINITIALISED = "uninitialised"
RACE = "race"  # between warps or lanes of one program
PROGRAMS = "race between programs"
MISALIGNED = "misaligned"
FENCE = "missing fence"
DEADLOCK = "deadlock"
ENDLESS = "endless loop"
ASSERTION = "assertion"
DIVISION = "division by zero"
VALUES = "wrong values"  # nothing but a comparison of the result can name it


@dataclass(frozen=True)
class Fault:
    """A fault, and where it is.

    Args:
        run: makes tensors, launches, and returns what was computed beside what is right.
        kind: the class of the fault.
        kernels: those that ``run`` launches.
        needs_arch: the first architecture that has the fault.
    """

    run: Callable[[], list[Pair]]
    kind: str
    kernels: tuple[Any, ...]
    needs_arch: int

    def marked(self, mark: str) -> list[tuple[str, int]]:
        """Path and number of each line with the mark."""
        found = []
        for function in (*(kernel.fn for kernel in self.kernels), self.run):
            lines, first = inspect.getsourcelines(function)
            for n, line in enumerate(lines, first):
                if re.search(rf"# (\w+, )?{mark}\b", line):
                    found.append((inspect.getsourcefile(function) or "", n))
        return found

    def named(self) -> list[tuple[str, int]]:
        """The lines of which a report must name one."""
        return self.marked("NAMED") or self.marked("FAULT")


FAULTS: dict[str, Fault] = {}


def fault(kind: str, *kernels: Any, needs_arch: int = 80):
    """Register a function that launches faulty kernels, under its name."""

    def register(run):
        FAULTS[run.__name__.replace("_", " ")] = Fault(run, kind, kernels, needs_arch)
        return run

    return register


def whole(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers from 1 to 7, of which no two neighbours are equal."""
    return (torch.arange(torch.Size(shape).numel()) * 3 % 7 + 1).reshape(shape).to(dtype)


# Outside a tensor.


@triton.jit
def load_without_mask_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i)  # FAULT
    tl.store(out + i, 2 * value, mask=i < n)


@fault(BOUNDS, load_without_mask_kernel)
def load_without_mask() -> list[Pair]:
    x, out = whole(200), torch.zeros(200)
    load_without_mask_kernel[(2,)](x, out, 200, BLOCK=128)
    return [(out, 2 * x)]


@triton.jit
def store_without_mask_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n, other=0.0)
    tl.store(out + i, 2 * value)  # FAULT


@fault(BOUNDS, store_without_mask_kernel)
def store_without_mask() -> list[Pair]:
    x, out = whole(250), torch.zeros(250)
    store_without_mask_kernel[(2,)](x, out, 250, BLOCK=128)
    return [(out, 2 * x)]


@triton.jit
def less_or_equal_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i <= n  # FAULT
    value = tl.load(x + i, mask=inside)  # NAMED
    tl.store(out + i, 2 * value, mask=inside)


@fault(BOUNDS, less_or_equal_kernel)
def less_or_equal() -> list[Pair]:
    x, out = whole(200), torch.zeros(200)
    less_or_equal_kernel[(2,)](x, out, 200, BLOCK=128)
    return [(out, 2 * x)]


@triton.jit
def stride_of_another_tensor_kernel(x, y, out, x_stride, out_stride, n, BLOCK: tl.constexpr):
    row, j = tl.program_id(0), tl.arange(0, BLOCK)
    a = tl.load(x + row * x_stride + j, mask=j < n)
    b = tl.load(y + row * x_stride + j, mask=j < n)  # FAULT
    tl.store(out + row * out_stride + j, a + b, mask=j < n)


@fault(BOUNDS, stride_of_another_tensor_kernel)
def stride_of_another_tensor() -> list[Pair]:
    x, y, out = whole(8, 400)[:, :24], whole(8, 24), torch.zeros(8, 24)
    stride_of_another_tensor_kernel[(8,)](x, y, out, x.stride(0), out.stride(0), 24, BLOCK=32)
    return [(out, x + y)]


@triton.jit
def offset_beyond_int32_kernel(x, out, scale, n, BLOCK: tl.constexpr):
    """The nearest of x for each place of out, by a scale with 16 binary places."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    source = (i * scale) >> 16  # FAULT
    value = tl.load(x + source, mask=i < n)  # NAMED
    tl.store(out + i, value, mask=i < n)


@fault(BOUNDS, offset_beyond_int32_kernel)
def offset_beyond_int32() -> list[Pair]:
    x, out = whole(40000), torch.zeros(400)
    offset_beyond_int32_kernel[(4,)](x, out, (40000 << 16) // 400, 400, BLOCK=128)
    return [(out, x[::100])]


@triton.jit
def negative_index_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    before = tl.load(x + i - 1, mask=inside, other=0.0)  # FAULT
    tl.store(out + i, tl.load(x + i, mask=inside) - before, mask=inside)


@fault(BOUNDS, negative_index_kernel)
def negative_index() -> list[Pair]:
    x, out = whole(200), torch.zeros(200)
    negative_index_kernel[(2,)](x, out, 200, BLOCK=128)
    return [(out, torch.diff(x, prepend=torch.zeros(1)))]


@triton.jit
def ignored_label_kernel(scores, labels, out, columns):
    row = tl.program_id(0)
    label = tl.load(labels + row)
    tl.store(out + row, tl.load(scores + row * columns + label))  # FAULT


@fault(BOUNDS, ignored_label_kernel)
def ignored_label() -> list[Pair]:
    """A label of −100 says that a row has no label."""
    scores, out = whole(4, 24), torch.zeros(4)
    labels = torch.tensor([-100, 3, 23, 0])
    ignored_label_kernel[(4,)](scores, labels, out, 24)
    right = scores.gather(1, labels.clamp(0)[:, None])[:, 0]
    return [(out, right.where(labels >= 0, 0.0))]


@triton.jit
def block_larger_than_row_kernel(x, out, columns, BLOCK: tl.constexpr):
    row, j = tl.program_id(0), tl.arange(0, BLOCK)
    line = tl.load(x + row * columns + j)  # FAULT
    tl.store(out + row, tl.sum(line, axis=0))


@fault(BOUNDS, block_larger_than_row_kernel)
def block_larger_than_row() -> list[Pair]:
    x, out = whole(4, 100), torch.zeros(4)
    block_larger_than_row_kernel[(4,)](x, out, 100, BLOCK=triton.next_power_of_2(100))
    return [(out, x.sum(1))]


@triton.jit
def tile_kernel(x, out, columns, BM: tl.constexpr, BN: tl.constexpr):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    place = m[:, None] * columns + n[None, :]
    value = tl.load(x + place)  # NAMED
    tl.store(out + place, 2 * value)


@fault(BOUNDS, tile_kernel)
def swapped_grid() -> list[Pair]:
    x, out = whole(32, 128), torch.zeros(32, 128)
    grid = (128 // 32, 32 // 32)  # FAULT
    tile_kernel[grid](x, out, 128, BM=32, BN=32)
    return [(out, 2 * x)]


@triton.jit
def whole_blocks_kernel(x, out, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i)  # NAMED
    tl.store(out + i, 2 * value)


@fault(BOUNDS, whole_blocks_kernel)
def one_program_too_many() -> list[Pair]:
    x, out = whole(256), torch.zeros(256)
    grid = (256 // 128 + 1,)  # FAULT
    whole_blocks_kernel[grid](x, out, BLOCK=128)
    return [(out, 2 * x)]


@triton.jit
def strided_tile_kernel(x, out, rows, columns, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    value = tl.load(x + m[:, None] * rows + n[None, :] * columns)  # NAMED
    tl.store(out + m[:, None] * N + n[None, :], 2 * value)


@fault(BOUNDS, strided_tile_kernel)
def swapped_strides() -> list[Pair]:
    x, out = whole(16, 64), torch.zeros(16, 64)
    columns, rows = x.stride()  # FAULT
    strided_tile_kernel[(1,)](x, out, rows, columns, M=16, N=64)
    return [(out, 2 * x)]


@triton.jit
def one_step_too_many_kernel(x, out, columns, BLOCK: tl.constexpr):
    row, j = tl.program_id(0), tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns + 1, BLOCK):  # FAULT
        sums += tl.load(x + row * columns + start + j)  # NAMED
    tl.store(out + row, tl.sum(sums, axis=0))


@fault(BOUNDS, one_step_too_many_kernel)
def one_step_too_many() -> list[Pair]:
    x, out = whole(3, 128), torch.zeros(3)
    one_step_too_many_kernel[(3,)](x, out, 128, BLOCK=64)
    return [(out, x.sum(1))]


@triton.jit
def pointer_advanced_twice_kernel(x, out, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    place = x + row * columns + tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, columns, BLOCK):
        sums += tl.load(place)  # NAMED
        place += BLOCK
        sums *= 2
        place += BLOCK  # FAULT
    tl.store(out + row, tl.sum(sums, axis=0))


@fault(BOUNDS, pointer_advanced_twice_kernel)
def pointer_advanced_twice() -> list[Pair]:
    x, out = whole(3, 128), torch.zeros(3)
    pointer_advanced_twice_kernel[(3,)](x, out, 128, BLOCK=64)
    return [(out, 4 * x[:, :64].sum(1) + 2 * x[:, 64:].sum(1))]


@triton.jit
def wider_pointer_kernel(kept, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wide = kept.to(tl.pointer_type(tl.int32))  # FAULT
    value = tl.load(wide + i, mask=i < n, other=0)  # NAMED
    tl.store(out + i, value != 0, mask=i < n)


@fault(BOUNDS, wider_pointer_kernel)
def wider_pointer() -> list[Pair]:
    kept, out = whole(128) > 3, torch.zeros(128, dtype=torch.bool)
    wider_pointer_kernel[(1,)](kept, out, 128, BLOCK=128)
    return [(out, kept)]


@triton.jit
def pointers_in_memory_kernel(pointers, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(pointers + tl.program_id(0)).to(tl.pointer_type(tl.float32))
    value = tl.load(x + i, mask=i < n)  # NAMED
    tl.store(out + tl.program_id(0) * n + i, value, mask=i < n)


@fault(BOUNDS, pointers_in_memory_kernel)
def pointers_of_temporaries() -> list[Pair]:
    x, n, large = (
        whole(2, 100),
        100,
        2**18,
    )  # memory that is given back to the system when it is freed
    parts = [torch.nn.functional.pad(row, (0, large)) for row in x]
    pointers = torch.tensor([(2 * part).data_ptr() for part in parts])  # FAULT
    out = torch.zeros(2, n)
    pointers_in_memory_kernel[(2,)](pointers, out, n, BLOCK=128)
    return [(out, 2 * x)]


@triton.jit
def load_by_descriptor_kernel(x, out, BM: tl.constexpr):
    row = tl.program_id(0) * BM
    value = x.load([row, 0])  # NAMED
    m = tl.arange(0, BM)
    tl.store(out + row + m, tl.sum(value, axis=1), mask=row + m < 40)


@fault(BOUNDS, load_by_descriptor_kernel, needs_arch=90)
def descriptor_of_too_many_rows() -> list[Pair]:
    x, out = whole(40, 32), torch.zeros(40)
    rows = triton.cdiv(40, 16) * 16
    box = TensorDescriptor(x, [rows, 32], [32, 1], [16, 32])  # FAULT
    load_by_descriptor_kernel[(3,)](box, out, BM=16)
    return [(out, x.sum(1))]


def scratch_memory(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8)


@triton.jit
def store_by_descriptor_kernel(x, out, rows, columns, BM: tl.constexpr, BN: tl.constexpr):
    row, m, n = tl.program_id(0) * BM, tl.arange(0, BM), tl.arange(0, BN)
    i = row + m[:, None]
    value = tl.load(x + i * columns + n[None, :], mask=i < rows, other=0.0)
    box = tl.make_tensor_descriptor(out, [rows + BM, columns], [columns, 1], [BM, BN])  # FAULT
    box.store([row, 0], 2 * value)  # NAMED


@fault(BOUNDS, store_by_descriptor_kernel, needs_arch=90)
def own_descriptor_of_too_many_rows() -> list[Pair]:
    x, out = whole(40, 32), torch.zeros(40, 32)
    triton.set_allocator(scratch_memory)
    store_by_descriptor_kernel[(3,)](x, out, 40, 32, BM=16, BN=32)
    return [(out, 2 * x)]


# Memory that nobody wrote.


@triton.jit
def add_rows_kernel(x, out, n, BLOCK: tl.constexpr):
    j = tl.arange(0, BLOCK)
    value = tl.load(x + tl.program_id(0) * n + j, mask=j < n)
    tl.atomic_add(out + j, value, mask=j < n)  # NAMED


@fault(UNINITIALISED, add_rows_kernel)
def empty_accumulated() -> list[Pair]:
    x = whole(4, 50)
    out = torch.empty(50)  # FAULT
    add_rows_kernel[(4,)](x, out, 50, BLOCK=64)
    return [(out, x.sum(0))]


@triton.jit
def add_bias_kernel(x, bias, out, n, BLOCK: tl.constexpr):
    j, row = tl.arange(0, BLOCK), tl.program_id(0)
    b = tl.load(bias + j, mask=j < n)  # NAMED
    tl.store(out + row * n + j, tl.load(x + row * n + j, mask=j < n) + b, mask=j < n)


@fault(UNINITIALISED, add_bias_kernel)
def empty_bias() -> list[Pair]:
    x, out = whole(4, 50), torch.zeros(4, 50)
    bias = torch.empty(50)  # FAULT
    add_bias_kernel[(4,)](x, bias, out, 50, BLOCK=64)
    return [(out, x)]


@triton.jit
def accumulate_in_scratch_kernel(x, scratch, out, columns, BLOCK: tl.constexpr):
    row, j = tl.program_id(0), tl.arange(0, BLOCK)
    for start in range(0, columns, BLOCK):
        before = tl.load(scratch + row * BLOCK + j)  # NAMED
        value = tl.load(x + row * columns + start + j)
        tl.store(scratch + row * BLOCK + j, before + value)
    tl.store(out + row, tl.sum(tl.load(scratch + row * BLOCK + j), axis=0))


@fault(UNINITIALISED, accumulate_in_scratch_kernel)
def uninitialised_accumulator() -> list[Pair]:
    x, out = whole(4, 128), torch.zeros(4)
    scratch = torch.empty(4, 64)  # FAULT
    accumulate_in_scratch_kernel[(4,)](x, scratch, out, 128, BLOCK=64, num_warps=1)
    return [(out, x.sum(1))]


@triton.jit
def partial_sums_kernel(x, partial, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n, other=0.0)
    tl.store(partial + tl.program_id(0), tl.sum(value, axis=0))


@triton.jit
def sum_kernel(partial, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(partial + i, mask=i < n, other=0.0)  # NAMED
    tl.store(out, tl.sum(value, axis=0))


@fault(UNINITIALISED, partial_sums_kernel, sum_kernel)
def grid_rounded_down() -> list[Pair]:
    x, partial, out = whole(1000), torch.empty(8), torch.zeros(1)
    grid = (1000 // 128,)  # FAULT
    partial_sums_kernel[grid](x, partial, 1000, BLOCK=128)
    sum_kernel[(1,)](partial, out, 8, BLOCK=8)
    return [(out, x.sum(0, keepdim=True))]


@triton.jit
def copy_rows_kernel(x, padded, columns, WIDTH: tl.constexpr):
    row, j = tl.program_id(0), tl.arange(0, WIDTH)
    inside = j < columns
    value = tl.load(x + row * columns + j, mask=inside)
    tl.store(padded + row * WIDTH + j, value, mask=inside)  # FAULT


@triton.jit
def sum_padded_rows_kernel(padded, out, WIDTH: tl.constexpr):
    row, j = tl.program_id(0), tl.arange(0, WIDTH)
    value = tl.load(padded + row * WIDTH + j)  # NAMED
    tl.store(out + row, tl.sum(value, axis=0))


@fault(UNINITIALISED, copy_rows_kernel, sum_padded_rows_kernel)
def padding_not_written() -> list[Pair]:
    x, padded, out = whole(3, 50), torch.empty(3, 64), torch.zeros(3)
    copy_rows_kernel[(3,)](x, padded, 50, WIDTH=64)
    sum_padded_rows_kernel[(3,)](padded, out, WIDTH=64)
    return [(out, x.sum(1))]


# Warps or lanes of one program.


@triton.jit
def barrier_left_out_kernel(x, scratch, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(scratch + i, tl.load(x + i))  # FAULT, NAMED
    back = tl.load(scratch + BLOCK - 1 - i)  # NAMED
    tl.store(out + i, back)


@fault(RACE, barrier_left_out_kernel)
def barrier_left_out() -> list[Pair]:
    x, scratch, out = whole(256), torch.zeros(256), torch.zeros(256)
    barrier_left_out_kernel[(1,)](x, scratch, out, BLOCK=256)
    return [(out, x.flip(0))]


@triton.jit
def shift_in_place_kernel(x, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    after = tl.load(x + i + 1, mask=i + 1 < n, other=0.0)  # NAMED
    tl.store(x + i, after, mask=i < n)  # FAULT, NAMED


@fault(RACE, shift_in_place_kernel)
def shift_in_place() -> list[Pair]:
    x = whole(250)
    right = torch.cat([x[1:], torch.zeros(1)])
    shift_in_place_kernel[(1,)](x, 250, BLOCK=256)
    return [(x, right)]


@triton.jit
def histogram_without_atomics_kernel(x, weights, sums, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    bins = tl.load(x + i, mask=i < n, other=0)
    weight = tl.load(weights + i, mask=i < n, other=0.0)
    before = tl.load(sums + bins, mask=i < n)  # NAMED
    tl.store(sums + bins, before + weight, mask=i < n)  # FAULT, NAMED


@fault(RACE, histogram_without_atomics_kernel)
def histogram_without_atomics() -> list[Pair]:
    x, weights, sums = whole(200, dtype=torch.int32), torch.arange(200.0), torch.zeros(8)
    histogram_without_atomics_kernel[(1,)](x, weights, sums, 200, BLOCK=256)
    return [(sums, torch.zeros(8).index_add_(0, x, weights))]


@triton.jit
def duplicate_indices_kernel(x, places, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    place = tl.load(places + i)
    tl.store(out + place, tl.load(x + i))  # FAULT


@fault(RACE, duplicate_indices_kernel)
def duplicate_indices() -> list[Pair]:
    """Tokens are added to their experts, of which several tokens may have the same."""
    x, places, out = whole(128), torch.arange(128) // 2, torch.zeros(64)
    duplicate_indices_kernel[(1,)](x, places, out, BLOCK=128)
    return [(out, out.clone().zero_().index_add_(0, places, x))]


@triton.jit
def read_back_in_another_layout_kernel(x, buffer, out, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    place = m[:, None] * N + n[None, :]
    value = tl.load(x + place)
    tl.store(buffer + place, 2 * value.to(tl.float32))  # NAMED
    back = tl.load(buffer + place)  # FAULT, NAMED
    tl.store(out + place, back + value)


@fault(RACE, read_back_in_another_layout_kernel)
def read_back_in_another_layout() -> list[Pair]:
    """The compiler gives 8 elements to a thread of the load, and 4 to one of the store, although
    their pointers are equal (triton#10924)."""
    x, buffer, out = whole(8, 256, dtype=torch.float16), torch.zeros(8, 256), torch.zeros(8, 256)
    read_back_in_another_layout_kernel[(1,)](x, buffer, out, M=8, N=256)
    return [(out, 3 * x)]


@triton.jit
def recurrence_in_a_pipelined_loop_kernel(sums, x, steps, BLOCK: tl.constexpr):
    j = tl.arange(0, BLOCK)
    for step in tl.range(1, steps, num_stages=3):
        before = tl.load(sums + (step - 1) * BLOCK + j)  # FAULT, NAMED
        value = tl.load(x + step * BLOCK + j)
        tl.store(sums + step * BLOCK + j, before + value)  # NAMED


@fault(RACE, recurrence_in_a_pipelined_loop_kernel)
def recurrence_in_a_pipelined_loop() -> list[Pair]:
    """The compiler starts the copy of a step before the store of the step before it, as in
    triton#8259."""
    x, sums = whole(8, 128), torch.zeros(8, 128)
    sums[0] = x[0]
    recurrence_in_a_pipelined_loop_kernel[(1,)](sums, x, 8, BLOCK=128)
    return [(sums, x.cumsum(0))]


@triton.jit
def copy_reads_what_was_stored_kernel(x, scratch, out, columns, BM: tl.constexpr, BN: tl.constexpr):
    m, n = tl.arange(0, BM), tl.arange(0, BN)
    place = m[:, None] * columns + n[None, :]
    box = tl.make_tensor_descriptor(scratch, [BM, columns], [columns, 1], [BM, BN])
    tl.store(scratch + place, 2 * tl.load(x + place))
    tl.debug_barrier()  # FAULT
    value = box.load([0, 0])  # NAMED
    tl.store(out + place, value)


@fault(FENCE, copy_reads_what_was_stored_kernel, needs_arch=90)
def copy_reads_what_was_stored() -> list[Pair]:
    """A barrier orders the stores before the copy, but no fence makes the copy's proxy see them."""
    x, scratch, out = whole(16, 32), torch.zeros(16, 32), torch.zeros(16, 32)
    triton.set_allocator(scratch_memory)
    copy_reads_what_was_stored_kernel[(1,)](x, scratch, out, 32, BM=16, BN=32)
    return [(out, 2 * x)]


# Several programs. Each is one warp where the fault is not between warps.


@triton.jit
def sums_of_pairs_kernel(x, out, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    value = tl.load(x + pid * BLOCK + tl.arange(0, BLOCK))
    tl.store(out + pid // 2, tl.sum(value, axis=0))  # FAULT


@fault(PROGRAMS, sums_of_pairs_kernel)
def two_programs_on_one_element() -> list[Pair]:
    x, out = whole(4, 64), torch.zeros(2)
    sums_of_pairs_kernel[(4,)](x, out, BLOCK=64, num_warps=1)
    return [(out, x.reshape(2, 128).sum(1))]


@triton.jit
def last_block_wraps_kernel(x, n, BLOCK: tl.constexpr):
    i = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)) % n  # FAULT
    value = tl.load(x + i)  # NAMED
    tl.store(x + i, 2 * value)  # NAMED


@fault(PROGRAMS, last_block_wraps_kernel)
def last_block_wraps() -> list[Pair]:
    x = whole(100)
    right = 2 * x
    last_block_wraps_kernel[(2,)](x, 100, BLOCK=64, num_warps=1)
    return [(x, right)]


@triton.jit
def column_mask_forgotten_kernel(x, out, rows, columns, BM: tl.constexpr, BN: tl.constexpr):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    place = m[:, None] * columns + n[None, :]
    inside = (m[:, None] < rows) & (n[None, :] < columns)
    value = tl.load(x + place, mask=inside, other=0.0)
    tl.store(out + place, 2 * value, mask=m[:, None] < rows)  # FAULT


@fault(PROGRAMS, column_mask_forgotten_kernel)
def column_mask_forgotten() -> list[Pair]:
    """The last row of the output is not written on purpose, so that no store leaves the tensor."""
    x, out = whole(9, 40), torch.zeros(9, 40)
    column_mask_forgotten_kernel[(1, 2)](x, out, 8, 40, BM=8, BN=32, num_warps=1)
    return [(out[:8], 2 * x[:8])]


@triton.jit
def atomic_left_out_kernel(x, out, BLOCK: tl.constexpr):
    value = tl.load(x + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
    before = tl.load(out)  # NAMED
    tl.store(out, before + tl.sum(value, axis=0))  # FAULT, NAMED


@fault(PROGRAMS, atomic_left_out_kernel)
def atomic_left_out() -> list[Pair]:
    x, out = whole(4, 64), torch.zeros(1)
    atomic_left_out_kernel[(4,)](x, out, BLOCK=64, num_warps=1)
    return [(out, x.sum().reshape(1))]


@triton.jit
def lock_released_early_kernel(x, sums, lock, BLOCK: tl.constexpr):
    j = tl.arange(0, BLOCK)
    value = tl.load(x + tl.program_id(0) * BLOCK + j)
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    total = tl.load(sums + j) + value  # NAMED
    tl.debug_barrier()
    tl.atomic_xchg(lock, 0)  # FAULT
    tl.store(sums + j, total)  # NAMED


@fault(PROGRAMS, lock_released_early_kernel)
def lock_released_early() -> list[Pair]:
    x, sums, lock = whole(4, 64), torch.zeros(64), torch.zeros(1, dtype=torch.int32)
    lock_released_early_kernel[(4,)](x, sums, lock, BLOCK=64, num_warps=1)
    return [(sums, x.sum(0))]


@triton.jit
def lock_without_barrier_kernel(x, sums, lock, BLOCK: tl.constexpr):
    j = tl.arange(0, BLOCK)
    value = tl.load(x + tl.program_id(0) * BLOCK + j)
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    total = tl.load(sums + j)  # NAMED
    tl.store(sums + j, total + value)  # NAMED
    tl.atomic_xchg(lock, 0)  # FAULT


@fault(PROGRAMS, lock_without_barrier_kernel)
def lock_without_barrier() -> list[Pair]:
    """Other warps may store after the one that releases the lock."""
    x, sums, lock = whole(4, 128), torch.zeros(128), torch.zeros(1, dtype=torch.int32)
    lock_without_barrier_kernel[(4,)](x, sums, lock, BLOCK=128, num_warps=4)
    return [(sums, x.sum(0))]


@triton.jit
def flag_by_plain_store_kernel(x, data, flag, out, BLOCK: tl.constexpr):
    j = tl.arange(0, BLOCK)
    if tl.program_id(0) == 0:
        tl.store(data + j, 2 * tl.load(x + j))
        tl.debug_barrier()
        tl.store(flag, 1)  # FAULT, NAMED
    else:
        while tl.load(flag, volatile=True) == 0:  # NAMED
            pass
        tl.debug_barrier()
        value = tl.load(data + j)  # NAMED
        tl.store(out + j, value)


@fault(PROGRAMS, flag_by_plain_store_kernel)
def flag_by_plain_store() -> list[Pair]:
    x, data, out = whole(64), torch.zeros(64), torch.zeros(64)
    flag = torch.zeros(1, dtype=torch.int32)
    flag_by_plain_store_kernel[(2,)](x, data, flag, out, BLOCK=64, num_warps=1)
    return [(out, 2 * x)]


@triton.jit
def flag_before_data_kernel(x, totals, flags, out, BLOCK: tl.constexpr):
    """Each program adds its sum to the total of the one before it."""
    pid = tl.program_id(0)
    own = tl.sum(tl.load(x + pid * BLOCK + tl.arange(0, BLOCK)), axis=0)
    if pid > 0:
        while tl.atomic_add(flags + pid - 1, 0) == 0:
            pass
        own += tl.load(totals + pid - 1)  # NAMED
    tl.atomic_xchg(flags + pid, 1)  # FAULT
    tl.store(totals + pid, own)  # NAMED
    tl.store(out + pid, own)


@fault(PROGRAMS, flag_before_data_kernel)
def flag_before_data() -> list[Pair]:
    x, totals, out = whole(4, 64), torch.zeros(4), torch.zeros(4)
    flags = torch.zeros(4, dtype=torch.int32)
    flag_before_data_kernel[(4,)](x, totals, flags, out, BLOCK=64, num_warps=1)
    return [(out, x.sum(1).cumsum(0))]


@triton.jit
def sums_not_awaited_kernel(x, partial, out, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    value = tl.load(x + pid * BLOCK + tl.arange(0, BLOCK))
    tl.store(partial + pid, tl.sum(value, axis=0))  # NAMED
    tl.debug_barrier()
    if pid == PARTS - 1:  # FAULT
        total = tl.sum(tl.load(partial + tl.arange(0, PARTS)), axis=0)  # NAMED
        tl.store(out, total)


@fault(PROGRAMS, sums_not_awaited_kernel)
def sums_not_awaited() -> list[Pair]:
    x, partial, out = whole(4, 64), torch.zeros(4), torch.zeros(1)
    sums_not_awaited_kernel[(4,)](x, partial, out, PARTS=4, BLOCK=64, num_warps=1)
    return [(out, x.sum().reshape(1))]


@triton.jit
def relaxed_counter_kernel(x, partial, arrived, out, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """The program that arrives last adds the sums of all."""
    pid = tl.program_id(0)
    value = tl.load(x + pid * BLOCK + tl.arange(0, BLOCK))
    tl.store(partial + pid, tl.sum(value, axis=0))
    tl.debug_barrier()
    before = tl.atomic_add(arrived, 1, sem="relaxed")  # FAULT
    if before == PARTS - 1:
        tl.debug_barrier()
        total = tl.sum(tl.load(partial + tl.arange(0, PARTS)), axis=0)  # NAMED
        tl.store(out, total)


@fault(PROGRAMS, relaxed_counter_kernel)
def relaxed_counter() -> list[Pair]:
    x, partial, out = whole(4, 64), torch.zeros(4), torch.zeros(1)
    arrived = torch.zeros(1, dtype=torch.int32)
    relaxed_counter_kernel[(4,)](x, partial, arrived, out, PARTS=4, BLOCK=64, num_warps=1)
    return [(out, x.sum().reshape(1))]


@triton.jit
def counter_of_one_block_kernel(x, partial, arrived, out, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    value = tl.load(x + pid * BLOCK + tl.arange(0, BLOCK))
    tl.store(partial + pid, tl.sum(value, axis=0))
    tl.debug_barrier()
    before = tl.atomic_add(arrived, 1, scope="cta")  # FAULT, NAMED
    if before == PARTS - 1:
        tl.debug_barrier()
        total = tl.sum(tl.load(partial + tl.arange(0, PARTS)), axis=0)  # NAMED
        tl.store(out, total)


@fault(PROGRAMS, counter_of_one_block_kernel)
def counter_of_one_block() -> list[Pair]:
    """The scope of the atomic is a program, and other programs are beyond it."""
    x, partial, out = whole(4, 64), torch.zeros(4), torch.zeros(1)
    arrived = torch.zeros(1, dtype=torch.int32)
    counter_of_one_block_kernel[(4,)](x, partial, arrived, out, PARTS=4, BLOCK=64, num_warps=1)
    return [(out, x.sum().reshape(1))]


@triton.jit
def stencil_in_place_kernel(x, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    left = tl.load(x + i - 1, mask=(i > 0) & (i < n), other=0.0)  # NAMED
    right = tl.load(x + i + 1, mask=i + 1 < n, other=0.0)  # NAMED
    tl.debug_barrier()
    tl.store(x + i, left + right, mask=i < n)  # FAULT, NAMED


@fault(PROGRAMS, stencil_in_place_kernel)
def stencil_in_place() -> list[Pair]:
    x = whole(250)
    padded = torch.nn.functional.pad(x, (1, 1))
    stencil_in_place_kernel[(4,)](x, 250, BLOCK=64, num_warps=1)
    return [(x, padded[:-2] + padded[2:])]


# Alignment, and hints that are not true.


@triton.jit
def wrong_multiple_kernel(x, out, stride, BLOCK: tl.constexpr):
    row, j = tl.program_id(0), tl.arange(0, BLOCK)
    start = tl.multiple_of(row * stride, 4)  # FAULT
    value = tl.load(x + start + j)  # NAMED
    tl.store(out + row * BLOCK + j, value)


@fault(MISALIGNED, wrong_multiple_kernel)
def wrong_multiple() -> list[Pair]:
    """A hint for rows of a multiple of 4 elements, with rows of 130."""
    x, out = whole(3, 130), torch.zeros(3, 128)
    wrong_multiple_kernel[(3,)](x, out, 130, BLOCK=128, num_warps=1)
    return [(out, x[:, :128])]


@triton.jit
def pointer_said_to_be_aligned_kernel(x, out, BLOCK: tl.constexpr):
    j, first = tl.arange(0, BLOCK), tl.program_id(0) * BLOCK
    place = tl.multiple_of(x + first, 16)  # FAULT
    value = tl.load(place + j)  # NAMED
    tl.store(out + first + j, value)


@fault(MISALIGNED, pointer_said_to_be_aligned_kernel)
def pointer_said_to_be_aligned() -> list[Pair]:
    x, out = whole(257), torch.zeros(256)
    pointer_said_to_be_aligned_kernel[(2,)](x[1:], out, BLOCK=128, num_warps=1)
    return [(out, x[1:])]


@triton.jit
def count_in_wider_elements_kernel(x, counts, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    bins = tl.load(x + i, mask=i < n, other=0)
    place = (counts + bins).to(tl.pointer_type(tl.int64))  # FAULT
    tl.atomic_add(place, tl.full([BLOCK], 1, tl.int64), mask=i < n)  # NAMED


@fault(MISALIGNED, count_in_wider_elements_kernel)
def count_in_wider_elements() -> list[Pair]:
    x, counts = whole(100, dtype=torch.int32), torch.zeros(16, dtype=torch.int32)
    count_in_wider_elements_kernel[(1,)](x, counts, 100, BLOCK=128, num_warps=1)
    return [(counts, torch.bincount(x, minlength=16).int())]


@triton.jit
def wrong_contiguity_kernel(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    even = tl.max_contiguous(tl.multiple_of(2 * i, BLOCK), BLOCK)  # FAULT
    tl.store(out + i, tl.load(x + even))


@fault(VALUES, wrong_contiguity_kernel)
def wrong_contiguity() -> list[Pair]:
    x, out = whole(256), torch.zeros(128)
    wrong_contiguity_kernel[(1,)](x, out, BLOCK=128, num_warps=1)
    return [(out, x[::2])]


# Programs that do not end.


@triton.jit
def lock_never_released_kernel(x, sums, lock, BLOCK: tl.constexpr):
    j = tl.arange(0, BLOCK)
    value = tl.load(x + tl.program_id(0) * BLOCK + j)
    while tl.atomic_cas(lock, 0, 1) == 1:  # FAULT
        pass
    tl.store(sums + j, tl.load(sums + j) + value)
    tl.debug_barrier()


@fault(DEADLOCK, lock_never_released_kernel)
def lock_never_released() -> list[Pair]:
    x, sums, lock = whole(4, 64), torch.zeros(64), torch.zeros(1, dtype=torch.int32)
    lock_never_released_kernel[(4,)](x, sums, lock, BLOCK=64, num_warps=1)
    return [(sums, x.sum(0))]


@triton.jit
def barrier_of_all_programs_kernel(x, arrived, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i)
    tl.atomic_add(arrived, 1)
    while tl.atomic_add(arrived, 0) < tl.num_programs(0):  # NAMED
        pass
    tl.store(x + i, 2 * value)


@fault(DEADLOCK, barrier_of_all_programs_kernel)
def more_programs_than_fit() -> list[Pair]:
    """Of 1024 threads each, a multiprocessor holds two, and an H100 264."""
    x = whole(400, 1024)
    right, arrived = 2 * x, torch.zeros(1, dtype=torch.int32)
    grid = (400,)  # FAULT
    barrier_of_all_programs_kernel[grid](x, arrived, BLOCK=1024, num_warps=32)
    return [(x, right)]


@triton.jit
def next_program_first_kernel(x, flags, out, BLOCK: tl.constexpr):
    pid, j = tl.program_id(0), tl.arange(0, BLOCK)
    own = tl.load(x + pid * BLOCK + j)
    while tl.atomic_add(flags + (pid + 1) % tl.num_programs(0), 0) == 0:  # FAULT
        pass
    tl.store(out + pid * BLOCK + j, 2 * own)
    tl.debug_barrier()
    tl.atomic_xchg(flags + pid, 1)


@fault(DEADLOCK, next_program_first_kernel)
def programs_wait_in_a_circle() -> list[Pair]:
    x, out, flags = whole(4, 64), torch.zeros(4, 64), torch.zeros(4, dtype=torch.int32)
    next_program_first_kernel[(4,)](x, flags, out, BLOCK=64, num_warps=1)
    return [(out, 2 * x)]


@triton.jit
def search_that_stays_kernel(x, values, out, n):
    """The place of a value in sorted x."""
    value = tl.load(values + tl.program_id(0))
    low, high = 0, n
    while low < high:  # NAMED
        middle = (low + high) // 2  # NAMED
        if tl.load(x + middle) <= value:  # NAMED
            low = middle  # FAULT, NAMED
        else:
            high = middle  # NAMED
    tl.store(out + tl.program_id(0), low)


@fault(ENDLESS, search_that_stays_kernel)
def search_that_stays() -> list[Pair]:
    x, values = torch.arange(100.0), torch.tensor([3.5, 50.0])
    out = torch.zeros(2, dtype=torch.int64)
    search_that_stays_kernel[(2,)](x, values, out, 100, num_warps=1)
    return [(out, torch.searchsorted(x, values, right=True))]


@triton.jit
def step_of_zero_kernel(x, out, columns, BLOCK: tl.constexpr, LANES: tl.constexpr):
    row, j = tl.program_id(0), tl.arange(0, BLOCK)
    start = 0
    while start < columns:  # NAMED
        inside = start + j < columns  # NAMED
        value = tl.load(x + row * columns + start + j, mask=inside)  # NAMED
        tl.store(out + row * columns + start + j, 2 * value, mask=inside)  # NAMED
        start += BLOCK // LANES  # FAULT, NAMED


@fault(ENDLESS, step_of_zero_kernel)
def step_of_zero() -> list[Pair]:
    x, out = whole(2, 100), torch.zeros(2, 100)
    step_of_zero_kernel[(2,)](x, out, 100, BLOCK=64, LANES=128, num_warps=1)
    return [(out, 2 * x)]


# Assertions and arithmetic.


@triton.jit
def embedding_kernel(table, tokens, out, words, WIDTH: tl.constexpr):
    pid, j = tl.program_id(0), tl.arange(0, WIDTH)
    token = tl.load(tokens + pid)
    tl.device_assert((token >= 0) & (token < words), "a token is outside the table")  # NAMED
    row = tl.minimum(tl.maximum(token, 0), words - 1)
    tl.store(out + pid * WIDTH + j, tl.load(table + row * WIDTH + j))


@fault(ASSERTION, embedding_kernel)
def token_outside_table() -> list[Pair]:
    table, out = whole(10, 32), torch.zeros(3, 32)
    tokens = torch.tensor([3, 10, 0])  # FAULT
    embedding_kernel[(3,)](table, tokens, out, 10, WIDTH=32, debug=True)
    return [(out, table[tokens.clamp(0, 9)])]


@triton.jit
def mean_of_groups_kernel(sums, counts, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    total = tl.load(sums + i, mask=i < n, other=0)
    count = tl.load(counts + i, mask=i < n, other=1)
    tl.store(out + i, total // count, mask=i < n)  # FAULT


@fault(DIVISION, mean_of_groups_kernel)
def empty_group() -> list[Pair]:
    sums, counts = whole(30, dtype=torch.int32) * 6, whole(30, dtype=torch.int32)
    counts[7] = sums[7] = 0
    out = torch.zeros(30, dtype=torch.int32)
    mean_of_groups_kernel[(1,)](sums, counts, out, 30, BLOCK=32)
    return [(out, sums // counts.clamp(1))]


# Nothing is wrong but the values.


@triton.jit
def block_smaller_than_row_kernel(x, out, columns, BLOCK: tl.constexpr):
    row, j = tl.program_id(0), tl.arange(0, BLOCK)
    line = tl.load(x + row * columns + j, mask=j < columns, other=0.0)  # FAULT
    tl.store(out + row, tl.sum(line, axis=0))


@fault(VALUES, block_smaller_than_row_kernel)
def block_smaller_than_row() -> list[Pair]:
    x, out = whole(4, 100), torch.zeros(4)
    block_smaller_than_row_kernel[(4,)](x, out, 100, BLOCK=64)
    return [(out, x.sum(1))]


@triton.jit
def maximum_without_other_kernel(x, out, columns, BLOCK: tl.constexpr):
    row, j = tl.program_id(0), tl.arange(0, BLOCK)
    line = tl.load(x + row * columns + j, mask=j < columns)  # FAULT
    tl.store(out + row, tl.max(line, axis=0))


@fault(VALUES, maximum_without_other_kernel)
def maximum_without_other() -> list[Pair]:
    """Triton does not define the elements beyond the mask, and its compiler makes them 0."""
    x, out = -whole(3, 50), torch.zeros(3)
    maximum_without_other_kernel[(3,)](x, out, 50, BLOCK=64)
    return [(out, x.amax(1))]


@triton.jit
def last_step_dropped_kernel(x, out, columns, BLOCK: tl.constexpr):
    row, j = tl.program_id(0), tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for step in range(columns // BLOCK):  # FAULT
        k = step * BLOCK + j
        sums += tl.load(x + row * columns + k, mask=k < columns, other=0.0)
    tl.store(out + row, tl.sum(sums, axis=0))


@fault(VALUES, last_step_dropped_kernel)
def last_step_dropped() -> list[Pair]:
    x, out = whole(4, 100), torch.zeros(4)
    last_step_dropped_kernel[(4,)](x, out, 100, BLOCK=32)
    return [(out, x.sum(1))]


@triton.jit
def double_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, 2 * tl.load(x + i, mask=i < n), mask=i < n)


@fault(VALUES, double_kernel)
def transposed_taken_as_contiguous() -> list[Pair]:
    x, out = whole(16, 8).T, torch.zeros(8, 16)
    double_kernel[(1,)](x, out, 128, BLOCK=128)  # FAULT
    return [(out, 2 * x)]


@triton.jit
def wrong_axis_kernel(x, out, SIZE: tl.constexpr):
    m, n = tl.arange(0, SIZE), tl.arange(0, SIZE)
    value = tl.load(x + m[:, None] * SIZE + n[None, :])
    tl.store(out + m, tl.sum(value, axis=0))  # FAULT


@fault(VALUES, wrong_axis_kernel)
def wrong_axis() -> list[Pair]:
    x, out = whole(32, 32), torch.zeros(32)
    wrong_axis_kernel[(1,)](x, out, SIZE=32)
    return [(out, x.sum(1))]


@triton.jit
def sums_not_reset_kernel(x, out, rows, columns, BLOCK: tl.constexpr):
    j = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)  # FAULT
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        for start in range(0, columns, BLOCK):
            sums += tl.load(x + row * columns + start + j)
        tl.store(out + row, tl.sum(sums, axis=0))


@fault(VALUES, sums_not_reset_kernel)
def sums_not_reset() -> list[Pair]:
    x, out = whole(4, 64), torch.zeros(4)
    sums_not_reset_kernel[(2,)](x, out, 4, 64, BLOCK=32)
    return [(out, x.sum(1))]


@triton.jit
def box_by_number_of_tile_kernel(x, out, BM: tl.constexpr, BN: tl.constexpr):
    pid = tl.program_id(0)
    value = x.load([pid, 0])  # FAULT
    tl.store(out + pid * BM + tl.arange(0, BM), tl.sum(value, axis=1))


@fault(VALUES, box_by_number_of_tile_kernel)
def box_by_number_of_tile() -> list[Pair]:
    """A box begins at an element, not at a multiple of its size."""
    x, out = whole(32, 32), torch.zeros(32)
    box = TensorDescriptor.from_tensor(x, [16, 32])
    box_by_number_of_tile_kernel[(2,)](box, out, BM=16, BN=32)
    return [(out, x.sum(1))]
