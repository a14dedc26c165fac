# SPDX-License-Identifier: MIT
"""Products on tensor cores: `mma.sync` of a warp, `wgmma` of four warps, and the fragments that they take.

A fragment is the part of a matrix that a thread holds in registers. All of them are made of 8 rows, of which
each thread holds 4 consecutive bytes (8 of float64): the (lane % 4)-th ones of row lane // 4. Section 9.7.14
shows those of mma, ldmatrix and stmatrix, and 9.7.15.5 those of wgmma.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from .arithmetic import decode as decode_float
from .copies import address_reader, finish
from .machine import InFlight, Operation, Run, Warp, instruction, reader, unknown, write
from .memory import Event
from .parse import Instruction, PtxError
from .tensors import swizzle

# The type of an operand as it lies in memory or in registers.
OPERANDS = {
    "bf16": np.uint16,
    "f16": np.uint16,
    "tf32": np.uint32,
    "s8": np.int8,
    "u8": np.uint8,
    "f64": np.float64,
}
SUMS = {"f32": np.float32, "s32": np.int32, "f64": np.float64}


def values(kind: str, raw: Any) -> Any:
    """The numbers, in float64, that tensor cores take from operands; of tf32 they ignore the last 13 bits."""
    if kind == "tf32":
        return (raw & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    return (decode_float(kind, raw) if kind in ("bf16", "f16") else raw).astype(np.float64)


def gather(registers: list[Any], kind: str) -> list[Any]:
    """For each register the 8 rows of which its threads hold parts, ``(8, columns)``."""
    dtype = np.dtype(OPERANDS[kind])
    return [np.ascontiguousarray(one).view(dtype).reshape(8, -1) for one in registers]


def quadrants(parts: list[Any]) -> Any:
    """16 rows of the fragments (upper left, lower left, upper right, lower right, …)."""
    return np.block([parts[0::2], parts[1::2]])


# ldmatrix, stmatrix: 8 × 8 matrices of 16 bits; lane 8·i + r has the address of row r of the i-th matrix


def _matrices(i: Instruction) -> tuple[int, bool]:
    _, *modifiers = (part.removesuffix("::cta") for part in i.parts)
    count = next(int(one[1]) for one in modifiers if one in ("x1", "x2", "x4"))
    if not set(modifiers) <= {"sync", "aligned", "m8n8", f"x{count}", "trans", "shared", "b16"}:
        raise unknown(i)
    return count, "trans" in modifiers


@instruction("ldmatrix", whole=True)
def _load_matrices(i: Instruction) -> Run:
    count, transposed = _matrices(i)
    puts, addresses = [write(one) for one in i.operands[0]], address_reader(i.operands[1])

    def run(warp: Warp) -> None:
        rows = warp.block.shared.load(warp, addresses(warp)[: 8 * count], 16, i.line)
        for n, put in enumerate(puts):
            matrix = rows[8 * n : 8 * n + 8].view(np.uint16)
            if transposed:
                matrix = np.ascontiguousarray(matrix.T)
            put(warp, matrix.view(np.uint32).reshape(32))

    return run


@instruction("stmatrix", results=0, whole=True)
def _store_matrices(i: Instruction) -> Run:
    count, transposed = _matrices(i)
    addresses, reads = address_reader(i.operands[0]), [reader(one, np.uint32) for one in i.operands[1]]

    def run(warp: Warp) -> None:
        matrices = [np.ascontiguousarray(read(warp)).view(np.uint16).reshape(8, 8) for read in reads]
        rows = np.concatenate([matrix.T if transposed else matrix for matrix in matrices])
        raw = np.ascontiguousarray(rows).view(np.uint8).reshape(8 * count, 16)
        warp.block.shared.store(warp, addresses(warp)[: 8 * count], raw, i.line)

    return run


# mma.sync


@instruction("mma.sync.aligned", whole=True)
def _multiply(i: Instruction) -> Run:
    """D = A·B + C for A of 8 or 16 rows, and B given as its transpose of 8 rows."""
    shape, *layout, sums, a_kind, b_kind, c_kind = i.parts[3:]
    if layout not in (["row", "col"], ["row", "col", "satfinite"]) or sums != c_kind or a_kind != b_kind:
        raise unknown(i)
    m, n, k = (int(one) for one in shape[1:].replace("n", " ").replace("k", " ").split())
    assert n == 8
    dtype = np.dtype(SUMS[sums])
    raw = np.uint64 if a_kind == "f64" else np.uint32
    a, b = ([reader(one, raw) for one in operand] for operand in i.operands[1:3])
    c, puts = [reader(one, dtype) for one in i.operands[3]], [write(one) for one in i.operands[0]]

    def run(warp: Warp) -> None:
        parts = gather([read(warp) for read in a], a_kind)
        left = values(a_kind, quadrants(parts) if m == 16 else np.concatenate(parts, 1))
        right = values(b_kind, np.concatenate(gather([read(warp) for read in b], b_kind), 1))
        assert left.shape[1] == right.shape[1] == k
        # Each pair of sums is of a row of 8: C is (m / 8) blocks of (8, 8).
        added = (
            np.stack([read(warp) for read in c], 1)
            .reshape(8, 4, m // 8, 2)
            .transpose(2, 0, 1, 3)
            .reshape(m, 8)
        )
        total = add(left @ right.T, added, "satfinite" in layout)
        fragments = total.reshape(m // 8, 32, 2)
        for position, put in enumerate(puts):
            put(warp, np.ascontiguousarray(fragments[position // 2, :, position % 2]))

    return run


def add(product: Any, sums: Any, saturate: bool = False) -> Any:
    """The float64 product plus the sums, in their type. Integers wrap, or saturate."""
    if sums.dtype == np.int32:
        exact = product.astype(np.int64) + sums
        return (np.clip(exact, -(2**31), 2**31 - 1) if saturate else exact).astype(np.int32)
    return (product + sums).astype(sums.dtype)


# wgmma: each of the four warps of a warpgroup has 16 of the 64 rows


class Matrix:
    """An operand of wgmma in shared memory, ``(rows, 32 bytes)``, as its descriptor says: 9.7.15.5.1.

    Swizzled "K-major" operands lie in groups of 8 rows of as many bytes as the swizzle has; the stride is
    that of groups. "MN-major" ones lie in 8 columns of so many bytes: the stride is that of 8 columns, and
    the leading one that of further rows. Without a swizzle, these are strides of matrices of 8 rows of 16
    bytes.

    ``chunks`` are the addresses of its units of 16 bytes: of a row if ``by_rows``, or of a column.
    """

    def __init__(self, descriptor: int, rows: int, by_rows: bool, kind: str, line: int):
        if descriptor & (3 << 14 | 3 << 30 | 0xFFFF << 46):
            raise PtxError(line, f"the descriptor {descriptor:#x} has bits that are unknown here")
        start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
        size = {0: 16, 1: 128, 2: 64, 3: 32}[descriptor >> 62 & 3]
        self.by_rows, self.kind = by_rows, kind
        if by_rows:
            row, chunk = np.arange(rows)[:, None], np.arange(2)[None, :]
            chunks = start + row // 8 * stride + row % 8 * size + chunk * (leading if size == 16 else 16)
        else:
            assert np.dtype(OPERANDS[kind]).itemsize == 2
            byte, column = 16 * np.arange(rows // 8)[:, None], np.arange(16)[None, :]
            across, down = (stride, leading) if size == 16 else (leading, stride)
            chunks = start + byte // size * across + byte % size + column // 8 * down + column % 8 * size
        self.chunks = swizzle(chunks, size)

    def part(self, first: int, rows: int) -> "Matrix":
        """Some of its rows."""
        self.chunks = (
            self.chunks[first : first + rows]
            if self.by_rows
            else self.chunks[first // 8 : (first + rows) // 8]
        )
        return self

    def read(self, space: Any, line: int) -> Any:
        """Its values ``(rows, k)``."""
        raw = space.peek(self.chunks, 16, line).view(OPERANDS[self.kind])
        matrix = (
            raw.reshape(len(raw), -1) if self.by_rows else raw.transpose(0, 2, 1).reshape(8 * len(raw), -1)
        )
        return values(self.kind, np.ascontiguousarray(matrix))


@instruction("wgmma.fence.sync.aligned", results=0, whole=True)
def _fence(i: Instruction) -> Run:
    def run(warp: Warp) -> None:
        warp.fenced = list(warp.registers)

    return run


@instruction("wgmma.commit_group.sync.aligned", results=0, whole=True)
def _commit(i: Instruction) -> Run:
    def run(warp: Warp) -> None:
        warp.product_groups.append(warp.products)
        warp.products = []

    return run


@instruction("wgmma.wait_group.sync.aligned", results=0, whole=True)
def _wait(i: Instruction) -> Run:
    left = i.operands[0].bits

    def run(warp: Warp) -> None:
        done = warp.product_groups[: max(0, len(warp.product_groups) - left)]
        finish(warp, warp.product_groups, min(left, len(warp.product_groups)))
        for one in (one for group in done for one in group):
            one.deliver()
        warp.block.trace(warp, "multiplied", [one.event for group in done for one in group])

    return run


class Product(Operation):
    """A wgmma of a warp: ``sums`` are its results, which `deliver` puts into the registers."""

    sums: Any
    deliver: Callable[[], None]


@instruction("wgmma.mma_async.sync.aligned", whole=True)
def _multiply_async(i: Instruction) -> Run:
    """D = A·B + D, or A·B; A is in registers or, as B, in shared memory. Both may be read until the wait."""
    shape, *rest = i.parts[4:]
    *saturate, sums, a_kind, b_kind = rest
    n, k = (int(one) for one in shape.removeprefix("m64n").split("k"))
    if a_kind != b_kind or saturate not in ([], ["satfinite"]):
        raise unknown(i)
    to, a, b, accumulate, *signs = i.operands
    transposes = [one.bits for one in signs[2:]]
    if [one.bits for one in signs[:2]] not in ([1, 1], []) or len(transposes) not in (0, 1, 2):
        raise unknown(i)
    dtype = np.dtype(SUMS[sums])
    from_registers = isinstance(a, tuple)
    b_by_rows = not (transposes and transposes[-1])
    a_by_rows = not (len(transposes) == 2 and transposes[0])
    a_indices = [one.index for one in a] if from_registers else []
    indices = [one.index for one in to]
    descriptors = [reader(one, np.uint64) for one in ([] if from_registers else [a]) + [b]]
    keep = reader(accumulate, np.bool_)
    assert len(to) == n // 2
    assert k * np.dtype(OPERANDS[a_kind]).itemsize == 32

    def run(warp: Warp) -> None:
        block, registers = warp.block, warp.registers
        checks = block.launch.checks
        where = []
        for read, rows, by_rows in zip(descriptors[::-1], (n, 64), (b_by_rows, a_by_rows), strict=False):
            described = read(warp)
            if (described != described[0]).any():
                raise PtxError(i.line, "the threads of a warp give different descriptors")
            where.append(Matrix(int(described[0]), rows, by_rows, a_kind, i.line))
        right = where[0]
        left = None if from_registers else where[1].part(16 * (warp.index % 4), 16)
        event = block.events.add(Event(i.line, f"a product of warp {warp.index}", generic=False))
        for matrix in where:
            block.shared.begin_read(warp, matrix.chunks, 16, event, fence=True)
        if checks:
            if warp.fenced is None:
                raise PtxError(i.line, "no wgmma.fence before")
            for index in a_indices + ([] if not keep(warp)[0] else indices):
                if registers[index] is not warp.fenced[index] and not isinstance(registers[index], InFlight):
                    raise PtxError(i.line, "takes a register that was written after the last wgmma.fence")
        before = [registers[index] for index in indices]
        taken = [registers[index] for index in a_indices]
        adds = bool(keep(warp)[0])
        operation = Product(event, [], event, after=warp.last_product)
        block.trace(warp, "multiply", [event])

        def complete() -> None:
            if from_registers:
                if checks and any(
                    registers[index] is not one for index, one in zip(a_indices, taken, strict=True)
                ):
                    raise PtxError(i.line, "a register of A changes while it is multiplied")
                first = values(a_kind, quadrants(gather([registers[index] for index in a_indices], a_kind)))
            else:
                first = left.read(block.shared, i.line)
            second = right.read(block.shared, i.line)
            product = first @ second.T
            old = np.zeros((16, n), dtype)
            if adds:
                old = before[0].operation.sums if isinstance(before[0], InFlight) else collect(before)
            operation.sums = add(product, old, bool(saturate))

        def collect(given: list[Any]) -> Any:
            fragments = np.stack([one.view(dtype) for one in given], 1).reshape(8, 4, n // 8, 2, 2)
            return fragments.transpose(3, 0, 2, 1, 4).reshape(16, n)

        token = InFlight(operation)

        def deliver() -> None:
            fragments = (
                operation.sums.reshape(2, 8, n // 8, 4, 2).transpose(1, 3, 2, 0, 4).reshape(32, n // 2)
            )
            fragments = np.ascontiguousarray(fragments.T).view(np.uint32)
            for position, index in enumerate(indices):
                if registers[index] is token:
                    registers[index] = fragments[position]
                elif checks and not isinstance(registers[index], InFlight):
                    raise PtxError(i.line, "a register of the sum was written before the wait")

        operation.steps.append(complete)
        operation.deliver = deliver
        for index in indices:
            registers[index] = token
        warp.last_product = operation
        warp.products.append(operation)
        block.start(operation)

    return run
