# SPDX-License-Identifier: MIT
"""Products on tensor cores: `mma.sync` of a warp, `wgmma` of four warps, and the fragments that
they take.

A fragment is the part of a matrix that a thread holds in registers. All of them are made of 8 rows,
of which each thread holds some consecutive bytes: the (lane % 4)-th ones of row lane // 4. Section
9.7.14 shows those of mma, ldmatrix and stmatrix, and 9.7.15.5 those of wgmma.
"""

from functools import lru_cache

import numpy as np

from nogpu.instructions.rounding import FLOAT8
from nogpu.instructions.tma import swizzle
from nogpu.machine.block import Warp
from nogpu.machine.decode import Run, action, instruction
from nogpu.machine.memory import Space
from nogpu.machine.operation import Operation
from nogpu.machine.parse import Instruction, PtxError
from nogpu.machine.registers import UNWRITTEN, Unready, Values, reader, writer
from nogpu.machine.registers import decode as decode_float

# The types of operands in memory and in registers, and those of sums
OPERANDS = {
    "bf16": "u2",
    "f16": "u2",
    "tf32": "u4",
    "s8": "i1",
    "u8": "u1",
    "e4m3": "u1",
    "e5m2": "u1",
    "f64": "f8",
}
SUMS = {"f16": "f2", "f32": "f4", "s32": "i4", "f64": "f8"}


def numbers(kind: str, raw: Values) -> Values:
    """The numbers, in float64, that tensor cores take from operands; of tf32 they ignore the last
    13 bits."""
    if kind == "tf32":
        return (raw & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    if kind in FLOAT8:
        return FLOAT8[kind][raw]
    return (decode_float(kind, raw) if kind in ("bf16", "f16") else raw).astype(np.float64)


def gather(registers: list[Values], dtype: str, rows: int = 8, together: int = 1) -> Values:
    """The matrix of which registers hold the fragments: blocks of 8 rows, the columns of blocks in
    turn.

    Args:
        together: how many registers hold a thread's part of a block.
    """
    held = np.stack(registers, 1).reshape(8, 4, -1, rows // 8, together).view(dtype)
    return held.transpose(3, 0, 2, 1, 4).reshape(rows, -1)


def scatter(matrix: Values) -> Values:
    """The registers of a matrix of sums, two of which hold a thread's part of a block; of float16
    one holds both numbers."""
    rows, columns = matrix.shape
    held = matrix.reshape(rows // 8, 8, columns // 8, 4, 2).transpose(1, 3, 2, 0, 4).reshape(32, -1)
    held = held.view(np.uint32) if matrix.dtype == np.float16 else held
    return np.ascontiguousarray(held.T)


def gather_sums(registers: list[Values], dtype: str, rows: int) -> Values:
    """The matrix of the sums that registers hold."""
    return gather(registers, dtype, rows, 1 if dtype == SUMS["f16"] else 2)


def add(product: Values, sums: Values, saturate: bool = False) -> Values:
    """The float64 product plus the sums, in their type. Integers wrap, or saturate."""
    if sums.dtype != np.int32:
        return (product + sums).astype(sums.dtype)
    exact = product.astype(np.int64) + sums
    return (np.clip(exact, -(2**31), 2**31 - 1) if saturate else exact).astype(np.int32)


# ldmatrix, stmatrix: 8 × 8 matrices of 16 bits; lane 8·i + r has the address of row r of the i-th
# matrix


def _transposed(i: Instruction, count: int) -> bool:
    _, *modifiers = (part.removesuffix("::cta") for part in i.parts)
    assert set(modifiers) <= {"sync", "aligned", "m8n8", f"x{count}", "trans", "shared", "b16"}
    return "trans" in modifiers


@instruction("ldmatrix", whole=True)
def _load_matrices(i: Instruction) -> Run:
    puts, addresses = [writer(one, "u32") for one in i.operands[0]], reader(i.operands[1])
    transposed = _transposed(i, len(puts))

    def run(warp: Warp) -> None:
        rows, _ = warp.block.shared.load(warp, addresses(warp)[: 8 * len(puts)], 16, i.line)
        matrices = rows.view(np.uint16).reshape(-1, 8, 8)
        matrices = np.ascontiguousarray(matrices.transpose(0, 2, 1)) if transposed else matrices
        for put, matrix in zip(puts, matrices.view(np.uint32).reshape(-1, 32), strict=True):
            put(warp, matrix)

    return run


@instruction("stmatrix", results=0, whole=True)
def _store_matrices(i: Instruction) -> Run:
    addresses, reads = reader(i.operands[0]), [reader(one, "u32") for one in i.operands[1]]
    transposed = _transposed(i, len(reads))

    def run(warp: Warp) -> None:
        matrices = np.stack([read(warp) for read in reads]).view(np.uint16).reshape(-1, 8, 8)
        matrices = np.ascontiguousarray(matrices.transpose(0, 2, 1)) if transposed else matrices
        rows = matrices.view(np.uint8).reshape(-1, 16)
        warp.block.shared.store(warp, addresses(warp)[: len(rows)], rows, i.line)

    return run


@instruction("mma.sync.aligned", whole=True)
def _multiply(i: Instruction) -> Run:
    """D = A·B + C for A of 8 or 16 rows, and B given as its transpose of 8 rows."""
    shape, *layout, sums, a_kind, b_kind, c_kind = i.parts[3:]
    saturate = layout[2:] == ["satfinite"]
    assert layout[:2] == ["row", "col"]
    assert saturate or len(layout) == 2
    assert sums == c_kind
    assert OPERANDS[a_kind][1] == OPERANDS[b_kind][1]
    m, n, k = (int(one) for one in shape[1:].replace("n", " ").replace("k", " ").split())
    assert n == 8
    raw = "b64" if a_kind == "f64" else "b32"
    a, b = ([reader(one, raw) for one in operand] for operand in i.operands[1:3])
    held = "b32" if sums == "f16" else sums
    c, puts = (
        [reader(one, held) for one in i.operands[3]],
        [writer(one, held) for one in i.operands[0]],
    )

    def run(warp: Warp) -> None:
        left = numbers(a_kind, gather([read(warp) for read in a], OPERANDS[a_kind], m))
        right = numbers(b_kind, gather([read(warp) for read in b], OPERANDS[b_kind]))
        assert left.shape[1] == right.shape[1] == k
        total = add(left @ right.T, gather_sums([one(warp) for one in c], SUMS[sums], m), saturate)
        for put, register in zip(puts, scatter(total), strict=True):
            put(warp, register)

    return run


# wgmma: each of the four warps of a warpgroup has 16 of the 64 rows


class Matrix:
    """An operand of wgmma in shared memory, ``(rows, 32 bytes)``, as its descriptor says:
    9.7.15.5.1.

    Swizzled "K-major" operands lie in groups of 8 rows of as many bytes as the swizzle has; the
    stride is that of groups. "MN-major" ones lie in 8 columns of so many bytes: the stride is that
    of 8 columns, and the leading one that of further rows.

    Operands without a swizzle lie in blocks of 8 lines of 16 bytes, which are 8 rows of a K-major
    operand, or 8 columns of an MN-major one. The stride is that of blocks along the rows, and the
    leading one that of blocks along the columns.

    ``chunks`` are the addresses of its units of 16 bytes: of a row if ``by_rows``, or of a column.
    A descriptor has too few bits for the block's ``window`` of addresses, to which it belongs.
    """

    def __init__(
        self, descriptor: Values, rows: range, by_rows: bool, kind: str, line: int, window: int
    ):
        if descriptor.tobytes() != descriptor[:1].tobytes() * len(descriptor):
            raise PtxError(line, "the threads of a warp give different descriptors")
        self.by_rows, self.kind = by_rows, kind
        self.of_chunk = 16 // np.dtype(OPERANDS[kind]).itemsize  # numbers
        rows_of_chunk = 0 if by_rows else self.of_chunk
        self.chunks = _chunks(int(descriptor[0]), rows, rows_of_chunk, line, window)
        self.address, self.rows = self.chunks.ctypes.data, len(rows)

    def check(self, warp: Warp, event: int, line: int) -> None:
        """Note that an operation reads it."""
        space = warp.block.shared
        if warp.native is None or not warp.native.read_at(
            warp, space, self.address, self.chunks.size, 16, event, True
        ):
            space.read(warp, self.chunks, 16, event, line, fence=True)

    def read(self, warp: Warp, space: Space) -> Values:
        """Its numbers ``(rows, k)``."""
        if warp.native is not None:
            found = warp.native.numbers(space, self.address, self.rows, self.by_rows, self.kind)
            if found is not None:
                return found
        raw = space.peek(self.chunks, 16).view(OPERANDS[self.kind])
        raw = raw if self.by_rows else np.ascontiguousarray(raw.transpose(0, 2, 1))
        return numbers(self.kind, raw.reshape(self.rows, -1))


@lru_cache(4096)
def _chunks(bits: int, rows: range, rows_of_chunk: int, line: int, window: int = 0) -> Values:
    """Return the addresses of an operand's chunks, by its descriptor.

    A chunk has ``rows_of_chunk`` numbers of a column; if that is 0, numbers of a row. ``window`` is
    that of the block.
    """
    start, leading, stride = ((bits >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    start |= window
    mode = bits >> 62 & 3
    unknown = 3 << 14 | 3 << 30 | 0x7FFF << 47  # bit 46 is the version of sm_100's descriptors
    if not mode:  # bits 49 to 51 are where the pattern of the swizzle begins
        unknown &= ~(7 << 49)
    if bits & unknown:
        raise PtxError(line, f"the descriptor {bits:#x} has bits that are unknown here")
    size = 256 >> mode if mode else 16  # bytes of a line
    if not mode and rows_of_chunk:  # with a swizzle the leading stride is along the rows
        leading, stride = stride, leading
    if not rows_of_chunk:
        row, chunk = np.array(rows)[:, None], np.arange(2)
        chunks = start + row // 8 * stride + row % 8 * size + (16 if mode else leading) * chunk
        return np.ascontiguousarray(swizzle(chunks, size))
    byte = 16 // rows_of_chunk * np.array(rows[::rows_of_chunk])[:, None]
    column = np.arange(2 * rows_of_chunk)
    chunks = start + byte // size * leading + byte % size
    return np.ascontiguousarray(swizzle(chunks + column // 8 * stride + column % 8 * size, size))


@action("wgmma.fence.sync.aligned", whole=True)
def _fence(warp: Warp, i: Instruction) -> None:
    warp.fence = warp.registers.stamp()
    if warp.native is not None:
        warp.native.tell_fence(warp.fence)


class Wgmma(Operation):
    """A wgmma of a warp. It reads A and B until it is waited for; then the registers of D have the
    sums.

    ``left`` are the registers of A, or the matrix; ``sums`` are those of D, if it is added to.
    """

    def __init__(
        self,
        warp: Warp,
        i: Instruction,
        kind: str,
        dtype: str,
        left: list[int] | Matrix,
        right: Matrix,
        adds: bool,
    ):
        super().__init__(warp, i.line, "a product", after=warp.last_product)
        self.warp, self.kind, self.dtype = warp, kind, dtype
        self.left, self.right = left, right
        self.to = [one.index for one in i.operands[0]]
        registers = warp.registers
        of_a = left if isinstance(left, list) else []
        self.taken = dict(zip(of_a, registers.get_many(of_a), strict=True)) if of_a else {}
        self.sums = registers.get_many(self.to) if adds else None
        for matrix in (right, *([] if isinstance(left, list) else [left])):
            matrix.check(warp, self.read, i.line)
        held = [*self.taken.items(), *zip(self.to, self.sums or [], strict=adds)]
        ready = [n for n, value in held if not isinstance(value, Unready)]
        if warp.fence is None or not all(registers.is_unchanged(n, warp.fence) for n in ready):
            raise PtxError(i.line, "takes a register that was written after the last wgmma.fence")
        if any(isinstance(one, Unready) for one in self.taken.values()) or any(
            one is UNWRITTEN for one in self.sums or []
        ):
            raise TypeError
        self.token = Unready(self)
        registers.set_same(self.to, self.token)

    def fetch(self) -> None:
        if isinstance(self.left, list):
            now = [self.warp.registers[index] for index in self.taken]
            if any(a is not b for a, b in zip(now, self.taken.values(), strict=True)):
                raise PtxError(self.line, "a register of A changes while it is multiplied")
            left = numbers(self.kind, gather(now, OPERANDS[self.kind], 16))
        else:
            left = self.left.read(self.warp, self.warp.block.shared)
        product = left @ self.right.read(self.warp, self.warp.block.shared).T
        old: Values = np.zeros(product.shape, self.dtype)
        if self.sums is not None:
            # Another product, which has completed.
            before = getattr(self.sums[0], "operation", None)
            old = before.result if before else gather_sums(self.sums, self.dtype, 16)
        self.result = add(product, old)

    def wait(self, warp: Warp, left: int = 0) -> None:
        super().wait(warp, left)
        held = warp.registers.get_many(self.to)
        if not all(isinstance(one, Unready) for one in held):
            raise PtxError(self.line, "a register of the sum was written before the wait")
        if all(one is self.token for one in held):  # and no later product writes them
            warp.registers.set_many(self.to, scatter(self.result).view(np.uint32))

    def wait_early(self, warp: Warp) -> None:
        """Wait for this product and those before it, which their groups then no longer have."""
        for group in warp.groups["wgmma"]:
            while group:
                one = group.pop(0)
                one.wait(warp)
                if one is self:
                    return


@instruction("wgmma.mma_async.sync.aligned", whole=True)
def _multiply_async(i: Instruction) -> Run:
    """D = A·B + D, or A·B; A is in registers or, as B, in shared memory."""
    shape, sums, kind, b_kind = i.parts[4:]
    n, k = (int(one) for one in shape.removeprefix("m64n").split("k"))
    to, a, b, accumulate, *signs = i.operands
    from_registers = isinstance(a, list)
    assert [one.bits for one in signs[:2]] in ([1, 1], [])
    # Of A, if it is in shared memory, and of B.
    by_rows = [not one.bits for one in signs[2:]] or [True]
    assert OPERANDS[kind][1] == OPERANDS[b_kind][1]
    assert len(to) == n // (4 if sums == "f16" else 2)
    assert k * np.dtype(OPERANDS[kind]).itemsize == 32
    left, right = None if from_registers else reader(a, "u64"), reader(b, "u64")
    keep = reader(accumulate, "pred")

    def run(warp: Warp) -> None:
        window = warp.block.window
        matrix = Matrix(right(warp), range(n), by_rows[-1], b_kind, i.line, window)
        first: list[int] | Matrix = []
        if left is None:
            first = [one.index for one in a]
        else:
            rows = range(64)[16 * (warp.index % 4) :][:16]
            first = Matrix(left(warp), rows, by_rows[0], kind, i.line, window)
        adds = bool(keep(warp)[0])
        warp.last_product = Wgmma(warp, i, kind, SUMS[sums], first, matrix, adds)
        warp.groups["wgmma"][-1].append(warp.last_product)
        warp.last_product.start(warp.block)

    return run
