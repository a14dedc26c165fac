# SPDX-License-Identifier: MIT
"""Encode the instructions of a kernel for the core in C."""

import ctypes
from collections.abc import Callable, Iterable
from typing import ClassVar, TypeVar

import numpy as np

from nogpu.machine.allocation import LARGEST_UNIT
from nogpu.machine.packed_definedness import MOVES, converts_integers, is_sum
from nogpu.machine.parse import (
    EVERY_THREAD,
    Address,
    Constant,
    Instruction,
    Kernel,
    Register,
    Symbol,
    flat,
    qualifiers,
)
from nogpu.machine.registers import DTYPES, FLOATS, HALVES, SHARED_BASE
from nogpu.native.layout import (
    ACTIVE,
    ASYNC_PRODUCT,
    ATOMIC,
    BARRIER,
    BRANCH,
    BRANCH_INDEX,
    BULK_COMMIT,
    BULK_WAIT,
    COMMIT,
    COPY,
    ELECT,
    ELEMENTWISE,
    GENERIC,
    GRID_TRIGGER,
    GRID_WAIT,
    IN_LIST,
    IN_ROW,
    JOINED,
    LEFT,
    LOAD,
    LOAD_BOX,
    LOAD_MATRIX,
    MAP_ACQUIRE,
    MAP_PUBLISH,
    MAP_REPLACE,
    MATCH,
    MBARRIER_ARRIVE,
    MBARRIER_INIT,
    MBARRIER_INVAL,
    MBARRIER_WAIT,
    MOST_ELEMENTS,
    MOVED,
    NEVER,
    NOTHING,
    OF_AND,
    OF_COPIES,
    OF_EITHER,
    OF_HALVES,
    OF_OR,
    OF_PRODUCTS,
    OF_SUM,
    OF_THREADS,
    OF_WARP,
    OPERANDS,
    PACK,
    PRODUCT,
    PRODUCT_FENCE,
    PROXY_FENCE,
    REDUCE,
    RETURN,
    ROW,
    SELECTED,
    SHUFFLE,
    STORE,
    STORE_BOX,
    STORE_MATRIX,
    SYNC_WARP,
    VOTE,
    WAIT,
    InstructionStruct,
)

# The fields of a tensormap, of 128 bytes. NVIDIA documents the fields and not their places: these
# are ours. tma.c reads them.
MAP_BYTES = 128
FIELDS = {
    "global_address": (0, "b64"),
    "rank": (8, "b32"),  # less one
    "box_dim": (12, "b32"),
    "global_dim": (32, "b32"),
    "element_stride": (52, "b32"),
    "global_stride": (72, "b64"),
    "elemtype": (104, "b32"),
    "interleave_layout": (108, "b32"),
    "swizzle_mode": (112, "b32"),
    "fill_mode": (116, "b32"),
}
PUBLICATION = (
    "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned"
)
LOADED = "cp.async.bulk.tensor.{}.shared::{}.global.mbarrier::complete_tx::bytes"
STORED = "cp.async.bulk.tensor.{}.global.shared::cta.bulk_group"
# Of which some access few bytes of shared memory
SHARED_KINDS = (LOAD, STORE, COPY, ATOMIC, MBARRIER_INIT, MAP_REPLACE)
MBARRIERS = {
    "mbarrier.init": MBARRIER_INIT,
    "mbarrier.inval": MBARRIER_INVAL,
    "mbarrier.arrive": MBARRIER_ARRIVE,
    "mbarrier.arrive.expect_tx": MBARRIER_ARRIVE,
    "mbarrier.try_wait.parity": MBARRIER_WAIT,
}
# Instructions that change no result
HINTS = ("setmaxnreg", "nanosleep", "prefetch", "discard")
# Of operands of wgmma, and the bytes of a number
KINDS = {"bf16": 0, "f16": 1, "tf32": 2, "s8": 3, "u8": 4, "e4m3": 5, "e5m2": 6}
KIND_BYTES = {kind: 4 if kind == "tf32" else 2 if "f16" in kind else 1 for kind in KINDS}
LOGICAL = {"and": OF_AND, "or": OF_OR, "xor": OF_EITHER, "not": OF_EITHER}
SPACES = {"global": 0, "shared": 1, "local": 2}


def _thread_bytes(code: InstructionStruct) -> int:
    """Return how many bytes of memory a thread accesses at least at once."""
    if code.kind == MBARRIER_INIT:
        return 8
    if code.kind in (COPY, ATOMIC, MAP_REPLACE):
        return int(code.width)
    return int(code.width * (code.results if code.kind == LOAD else code.sources - 1))


K = TypeVar("K")


class Program:
    """A kernel's instructions for the core, and the rows of its constants and special registers."""

    def __init__(self, kernel: Kernel, core: ctypes.CDLL):
        self.library, self.kernel = core, kernel
        self.widths = [DTYPES[kind].itemsize for kind in kernel.registers]
        self.constants: dict[tuple[int, int], int] = {}  # rows by bits and width
        self.places: dict[tuple[int, int], int] = {}  # likewise, in a block's shared memory
        self.specials: dict[tuple[str, int], int] = {}  # rows by name and width
        self.instructions = (InstructionStruct * len(kernel.instructions))()
        # For blocks.c, as far as is known
        self.is_for_blocks = not kernel.local_bytes or kernel.block is not None
        self.is_for_workers = True  # for workers.py, as far as is known
        self.atomics = 0  # instructions of blocks.c, which are numbered
        self.controls_grids = False  # by griddepcontrol
        self._tables: list[
            ctypes.Array[ctypes.c_int32]
        ] = []  # of registers, which the instructions point to
        slots = kernel.slots.of_instructions
        for code, i, slot in zip(self.instructions, kernel.instructions, slots, strict=True):
            code.slot = slot
            self._encode(code, i)
        # Instructions that the core leaves to Python, unless it executes a whole block.
        self.left = [one.kind == LEFT or one.kind >= RETURN for one in self.instructions]
        # The least bytes that a thread accesses of shared memory.
        self.shared_unit = min(
            (
                _thread_bytes(code)
                for code in self.instructions
                if code.kind in SHARED_KINDS and code.space == SPACES["shared"]
            ),
            default=LARGEST_UNIT,
        )
        self.shared_unit = min(self.shared_unit, LARGEST_UNIT)
        self.local_unit = LARGEST_UNIT
        if kernel.block is not None:  # an address may be in any memory
            widths = [
                _thread_bytes(code) for code in self.instructions if code.kind in (*SHARED_KINDS,)
            ]
            self.shared_unit = self.local_unit = min([LARGEST_UNIT, *widths])
        self.width_array = np.array(self.widths, np.uint8)
        self.rows = np.zeros((len(self.widths), ROW), np.uint8)
        for (bits, width), row in (*self.constants.items(), *self.places.items()):
            self.rows[row, : 32 * width] = np.frombuffer(
                bits.to_bytes(width, "little") * 32, np.uint8
            )
        count = len(kernel.registers)
        self.states = np.full(len(self.widths), IN_ROW, np.uint8)
        if kernel.block is None:
            self.states[:count] = IN_LIST | NEVER
        self.addresses = (
            ctypes.addressof(self.instructions),
            self.width_array.ctypes.data,
        )

    # Operands

    def _row(self, operand: object, width: int) -> int:
        """Return the row of an operand of ``width`` bytes.

        Raises:
            LookupError: it has none.
        """
        if isinstance(operand, Register):
            if self.widths[operand.index] != width:
                raise LookupError
            return operand.index
        if isinstance(operand, Constant):
            # A predicate is 0 or 1.
            bits = operand.bits % 2 ** (8 * width) if width > 1 else int(operand.bits != 0)
            return self._new(self.constants, (bits, width), width)
        if not isinstance(operand, Symbol) or operand.name == "_":
            raise LookupError
        if operand.name == "global_smem":
            return self._new(self.places, (SHARED_BASE + operand.offset, width), width)
        name = operand.name.partition("+")[0]
        is_known = name in self.kernel.parameters or operand.name in self.kernel.constants
        is_known |= operand.name in self.kernel.locals
        is_known |= operand.name.startswith(("%tid", "%ctaid", "%ntid", "%nctaid", "%laneid"))
        if not is_known or operand.offset:
            raise LookupError
        return self._new(self.specials, (operand.name, width), width)

    def _new(self, rows: dict[K, int], key: K, width: int) -> int:
        if key not in rows:
            rows[key] = len(self.widths)
            self.widths.append(width)
        return rows[key]

    # Instructions

    def _encode(self, code: InstructionStruct, i: Instruction) -> None:
        """Fill in ``code``; what the core does not know is left to Python."""
        code.kind, code.line, code.target, code.whole = LEFT, i.line, i.target, i.whole
        code.members = -1
        code.guard, code.negated = (-1 if i.guard is None else i.guard.index), i.negated
        encode = self.ENCODERS.get(i.parts[0], Program._elementwise)
        try:
            kind = encode(self, code, i)
        except (LookupError, ValueError):  # another number of operands, too
            return
        code.kind = kind
        code.rule = self._rule(i)
        places = MOVES.get(i.parts[0], (1,))  # that of a shuffle is the first one, too
        code.moved = sum(1 << max(n - 1, 0) for n in places)

    def _rule(self, i: Instruction) -> int:
        """Return how undefined bits of operands make those of the results (`definedness`)."""
        name, parts = i.parts[0], i.parts
        is_move = name in MOVES and not any(part in FLOATS for part in parts[1:-1])
        if is_move or converts_integers(parts):
            return MOVED
        if name in LOGICAL:
            return LOGICAL[name]
        if is_sum(parts):
            return OF_SUM
        if name == "selp" and isinstance(i.operands[3], Register):
            return SELECTED
        if name != "setp" and any(part.endswith("x2") for part in parts[1:]):
            return JOINED if name == "cvt" else OF_HALVES  # the core knows cvt of two numbers
        return OF_WARP if i.whole and name != "shfl" else OF_THREADS

    def _operands(self, code: InstructionStruct, to: Iterable[int], sources: Iterable[int]) -> None:
        results, given = list(to), list(sources)
        if max(len(results), len(given)) > OPERANDS:
            raise LookupError
        code.results, code.sources = len(results), len(given)
        code.to[: len(results)] = results
        code.from_[: len(given)] = given

    def _elementwise(self, code: InstructionStruct, i: Instruction) -> int:
        parts = [part for part in i.parts if part != "ftz"]
        if i.parts[0] != "cvt":
            parts = [part for part in parts if part != "rn"]
        return self._apply(code, ".".join(parts), i.operands, "ftz" in i.parts)

    def _apply(
        self, code: InstructionStruct, name: str, operands: list[object], flush: bool = False
    ) -> int:
        widths = (ctypes.c_uint8 * 4)()
        entry = self.library.entry_of(name.encode(), widths)
        expected = [width for width in widths if width]
        if entry < 0 or len(operands) != len(expected):
            raise LookupError
        if name.startswith(("bfe", "prmt")) and not isinstance(operands[-1], Constant):
            raise LookupError
        if name.startswith("bfe"):
            start, count = (one.bits for one in operands[2:] if isinstance(one, Constant))
            if not 0 < count <= 8 * expected[0] - start:
                raise LookupError
        if not isinstance(operands[0], Register):
            raise LookupError
        # The core flushes float32 alone.
        if flush and (not name.endswith(".f32") or "f64" in name):
            raise LookupError
        to, *sources = map(self._row, operands, expected)
        self._operands(code, [to], sources)
        code.flush, code.function = flush, self.library.function_of(entry)
        return ELEMENTWISE

    def _move(self, code: InstructionStruct, i: Instruction) -> int:
        if not any(isinstance(one, list) for one in i.operands):
            code.mode = 1  # a copy
            return self._elementwise(code, i)
        total = DTYPES[i.parts[1]].itemsize
        to, source = (flat(one) for one in i.operands)
        width = total // len(source)
        sources = [self._row(one, width) for one in source]
        code.width = total // len(to)
        results = [-1 if one == Symbol("_") else self._row(one, code.width) for one in to]
        self._operands(code, results, sources)
        return PACK

    def _members(self, code: InstructionStruct, operand: object) -> None:
        """Note the threads that execute an instruction together."""
        if self.kernel.block is not None:
            code.members = self._row(operand, 4)
        elif operand not in EVERY_THREAD:
            raise LookupError

    def _branch_by_index(self, code: InstructionStruct, i: Instruction) -> int:
        self._operands(code, [], [self._row(i.operands[0], 4)])
        self._tables.append((ctypes.c_int32 * len(i.table))(*i.table))
        code.table = ctypes.addressof(self._tables[-1])
        code.second_offset = len(i.table)
        return BRANCH_INDEX if self.kernel.block is not None else LEFT

    def _vote(self, code: InstructionStruct, i: Instruction) -> int:
        if self.kernel.block is None:
            raise LookupError
        to, source, members = i.operands
        code.mode = ("all", "any", "uni", "ballot").index(i.parts[2])
        self._members(code, members)
        self._operands(code, [self._row(to, 4 if code.mode == 3 else 1)], [self._row(source, 1)])
        return VOTE

    def _match(self, code: InstructionStruct, i: Instruction) -> int:
        if self.kernel.block is None or i.parts[1] != "any":
            raise LookupError
        to, source, members = i.operands
        self._members(code, members)
        width = DTYPES[i.parts[-1]].itemsize
        self._operands(code, [self._row(to, 4)], [self._row(source, width)])
        return MATCH

    def _active(self, code: InstructionStruct, i: Instruction) -> int:
        if self.kernel.block is None:
            raise LookupError
        self._operands(code, [self._row(i.operands[0], 4)], [])
        return ACTIVE

    def _branch(self, code: InstructionStruct, i: Instruction) -> int:
        if i.target < 0:
            raise LookupError
        return BRANCH

    def _load(self, code: InstructionStruct, i: Instruction) -> int:
        to, source = i.operands
        if i.parts[1] == "param":
            if not isinstance(source.base, Symbol) or len(i.parts) != 3:
                raise LookupError
            dtype, own = DTYPES[i.parts[2]], DTYPES[to.kind]
            name = f"mov.b{8 * dtype.itemsize}"
            if dtype.itemsize < own.itemsize:  # it is extended
                sign = "s" if dtype.kind == "i" else "u"
                name = f"cvt.{sign}{8 * own.itemsize}.{sign}{8 * dtype.itemsize}"
            return self._apply(code, name, [to, source.base])
        self._access(code, i, len(flat(to)))
        results = [-1 if one == Symbol("_") else one.index for one in flat(to)]
        if any(row >= 0 and self.widths[row] < code.width for row in results):
            raise LookupError
        self._operands(code, results, [self._base(code, source)])
        return LOAD

    def _store(self, code: InstructionStruct, i: Instruction) -> int:
        to, source = i.operands
        self._access(code, i, len(flat(source)))
        values = [
            one.index if isinstance(one, Register) else self._row(one, code.width)
            for one in flat(source)
        ]
        if any(self.widths[row] < code.width for row in values):
            raise LookupError
        self._operands(code, [], [self._base(code, to), *values])
        return STORE

    def _access(self, code: InstructionStruct, i: Instruction, count: int) -> None:
        (*rest, kind), order, in_shared = qualifiers(i)
        in_local = rest[:1] == ["local"]
        dtype = DTYPES.get(kind)
        if order == "volatile" and in_shared and self.kernel.block is not None:
            order = ""  # as in Python, whose rules for shared memory know no order
        if order or dtype is None or rest[in_local:] != [f"v{count}"] * (count > 1):
            raise LookupError
        code.space = SPACES["shared" if in_shared else "local" if in_local else "global"]
        code.width, code.is_signed = dtype.itemsize, dtype.kind == "i"
        if self._is_generic(code, i):
            code.space = GENERIC

    def _is_generic(self, code: InstructionStruct, i: Instruction) -> bool:
        """Whether the address tells the memory that it is in."""
        named = {"global", "const"} & set(i.parts)
        return self.kernel.block is not None and code.space == SPACES["global"] and not named

    def _base(self, code: InstructionStruct, address: object) -> int:
        if not isinstance(address, Address) or address.coordinates:
            raise LookupError
        code.offset = address.offset
        if isinstance(address.base, Register):
            return address.base.index
        return self._row(address.base, 4 if address.base == Symbol("global_smem") else 8)

    def _shuffle(self, code: InstructionStruct, i: Instruction) -> int:
        source, lane, clamp, members = i.operands[-4:]
        targets = [one for operand in i.operands[:-4] for one in flat(operand)]
        modes = ("up", "down", "bfly", "idx")
        if i.parts[2] not in modes or i.parts[3] != "b32":
            raise LookupError
        self._members(code, members)
        code.mode = modes.index(i.parts[2])
        results = [self._row(one, width) for one, width in zip(targets, (4, 1), strict=False)]
        self._operands(code, results, [self._row(one, 4) for one in (source, lane, clamp)])
        return SHUFFLE

    def _load_matrix(self, code: InstructionStruct, i: Instruction) -> int:
        to, source = i.operands
        results = [self._row(one, 4) for one in flat(to)]
        self._operands(code, results, [self._base(code, source)])
        code.space, code.transposed = SPACES["shared"], "trans" in i.parts
        return LOAD_MATRIX

    def _store_matrix(self, code: InstructionStruct, i: Instruction) -> int:
        to, source = i.operands
        values = [self._row(one, 4) for one in flat(source)]
        self._operands(code, [], [self._base(code, to), *values])
        code.space, code.transposed = SPACES["shared"], "trans" in i.parts
        return STORE_MATRIX

    def _elect(self, code: InstructionStruct, i: Instruction) -> int:
        lane, chosen, members = i.operands
        if members not in EVERY_THREAD:
            raise LookupError
        self._operands(code, [self._result(lane, 4), self._row(chosen, 1)], [])
        return ELECT

    def _reduce(self, code: InstructionStruct, i: Instruction) -> int:
        name, kind = i.parts[2:]
        to, source, members = i.operands
        if kind not in ("s32", "u32", "b32"):
            raise LookupError
        self._members(code, members)
        entry = self.library.entry_of(f"{name}.{kind}".encode(), (ctypes.c_uint8 * 4)())
        if entry < 0:
            raise LookupError
        code.function = self.library.function_of(entry)
        self._operands(code, [self._row(to, 4)], [self._row(source, 4)])
        return REDUCE

    def _product(self, code: InstructionStruct, i: Instruction) -> int:
        if i.parts[3:] not in (
            ["m16n8k16", "row", "col", "f32", kind, kind, "f32"] for kind in ("f16", "bf16")
        ):
            raise LookupError
        to, *sources = ([self._row(one, 4) for one in operand] for operand in i.operands)
        self._operands(code, to, [one for each in sources for one in each])
        code.mode = i.parts[7] == "f16"
        return PRODUCT

    # What blocks.c executes

    def _barrier(self, code: InstructionStruct, i: Instruction) -> int:
        if i.opcode == "bar.warp.sync" and self.kernel.block is None:
            return NOTHING
        if i.opcode == "bar.warp.sync":
            self._members(code, i.operands[0])
            return SYNC_WARP
        if self.kernel.block is not None and "red" in i.parts:
            return self._reduction(code, i)
        if "sync" not in i.parts[1:3] or not all(isinstance(one, Constant) for one in i.operands):
            raise LookupError
        numbers = [one.bits for one in i.operands]
        code.mode, code.offset = numbers[0], -(-numbers[1] // 32) if len(numbers) > 1 else 0
        return BARRIER

    def _reduction(self, code: InstructionStruct, i: Instruction) -> int:
        """``bar.red``: a barrier that counts votes."""
        to, number, *count, source = i.operands
        kinds = [part for part in i.parts if part in ("popc", "and", "or")]
        if count or not isinstance(number, Constant):
            raise LookupError
        code.mode, code.count = number.bits, 1 + ("popc", "and", "or").index(kinds[0])
        self._operands(code, [self._row(to, 4 if code.count == 1 else 1)], [self._row(source, 1)])
        return BARRIER

    def _return(self, code: InstructionStruct, i: Instruction) -> int:
        return RETURN

    def _group(self, code: InstructionStruct, i: Instruction, family: int) -> int:
        """``commit_group`` and ``wait_group``."""
        code.mode = family
        if i.parts[2] == "commit_group" or i.parts[1] == "commit_group":
            return COMMIT
        (count,) = i.operands
        if not isinstance(count, Constant):
            raise LookupError
        code.offset = count.bits
        return WAIT

    def _fence(self, code: InstructionStruct, i: Instruction) -> int:
        if (
            self.kernel.block is not None
            and i.parts[0] in ("membar", "fence")
            and "proxy" not in i.opcode
        ):
            raise LookupError
        if i.opcode.startswith("fence.mbarrier_init") and self.kernel.cluster == (1, 1, 1):
            return NOTHING
        if i.opcode == "fence.proxy.async.shared::cta":
            return PROXY_FENCE
        if i.opcode != "fence.proxy.tensormap::generic.acquire.gpu":
            raise LookupError
        address, size = i.operands
        if size != Constant(MAP_BYTES):
            raise LookupError
        self._operands(code, [], [self._base(code, address)])
        return MAP_ACQUIRE

    def _mbarrier(self, code: InstructionStruct, i: Instruction) -> int:
        name = i.opcode.removesuffix(".shared.b64").removesuffix(".shared::cta.b64")
        kind, given = MBARRIERS[name], list(i.operands)
        code.space, code.mode = SPACES["shared"], name == "mbarrier.arrive.expect_tx"
        results = []
        if kind == MBARRIER_WAIT:
            results.append(self._row(given.pop(0), 1))
        if kind == MBARRIER_ARRIVE and given.pop(0) != Symbol("_"):
            raise LookupError
        address, *counts = given
        if len(counts) > 1:
            raise LookupError
        sources = [self._base(code, address), *(self._row(one, 4) for one in counts)]
        self._operands(code, results, sources)
        return kind

    def _tensormap(self, code: InstructionStruct, i: Instruction) -> int:
        """``replace`` and ``cp_fenceproxy``."""
        to, *given = i.operands
        code.space = SPACES["shared"]
        if i.parts[1] == "cp_fenceproxy":
            source, size = given
            if i.opcode != PUBLICATION or size != Constant(MAP_BYTES):
                raise LookupError
            self._operands(code, [], self._bases(code, to, source))
            return MAP_PUBLISH
        start, kind = FIELDS[i.parts[3]]
        *ordinal, value = given
        if i.parts[:3] != ["tensormap", "replace", "tile"] or i.parts[4:] != [
            "shared::cta",
            "b1024",
            kind,
        ]:
            raise LookupError
        code.width = DTYPES[kind].itemsize
        start += ordinal[0].bits * code.width if ordinal else 0
        self._operands(code, [], [self._base(code, to), self._row(value, code.width)])
        code.second_offset = code.offset + start
        return MAP_REPLACE

    def _box(self, code: InstructionStruct, i: Instruction) -> int:
        """Bulk copies of boxes, and their groups."""
        if i.parts[3:4] == ["commit_group"]:
            return BULK_COMMIT
        if i.parts[3:4] == ["wait_group"]:
            (count,) = i.operands
            if not isinstance(count, Constant):
                raise LookupError
            code.offset, code.mode = count.bits, "read" in i.parts
            return BULK_WAIT
        rank = i.parts[4]
        is_store = i.opcode == STORED.format(rank)
        if not is_store and i.opcode not in [
            LOADED.format(rank, one) for one in ("cta", "cluster")
        ]:
            raise LookupError
        shared, tensor, *barrier = i.operands[::-1] if is_store else i.operands
        corner = [self._row(one, 4) for one in tensor.coordinates]
        rows = self._bases(code, shared, Address(tensor.base, tensor.offset, []))
        counting = rows[0]
        if not is_store:
            if barrier[0].offset or not isinstance(barrier[0].base, Register):
                raise LookupError
            counting = barrier[0].base.index
        self._operands(code, [], [*rows, counting, *corner])
        code.mode = len(corner)
        return STORE_BOX if is_store else LOAD_BOX

    def _bases(self, code: InstructionStruct, first: object, second: object) -> list[int]:
        """Return the rows of two addresses, of which ``code`` takes the offsets."""
        other = self._base(code, second)
        code.second_offset = code.offset
        return [self._base(code, first), other]

    def _control_grids(self, code: InstructionStruct, i: Instruction) -> int:
        self.controls_grids = True
        return {"wait": GRID_WAIT, "launch_dependents": GRID_TRIGGER}[i.parts[1]]

    def _hint(self, code: InstructionStruct, i: Instruction) -> int:
        return NOTHING

    def _atomic(self, code: InstructionStruct, i: Instruction) -> int:
        (name, *vector, kind), order, in_shared = qualifiers(i)
        is_red = i.parts[0] == "red"
        address, *operands = i.operands if is_red else i.operands[1:]
        values, count = [flat(one) for one in operands], len(flat(operands[0]))
        function = self.library.atomic_of(f"{name}.{kind}".encode())
        if not function or vector not in ([], [f"v{count}"]) or count > MOST_ELEMENTS:
            raise LookupError
        code.width, code.count = DTYPES[HALVES.get(kind, kind)].itemsize, count
        code.space = SPACES["shared" if in_shared else "global"]
        if self._is_generic(code, i):
            code.space = GENERIC
        code.function, code.mode = function, name != "exch"  # which does not read
        # Of the scope of a program, it is no atomic for other programs.
        code.is_atomic = in_shared or "cta" not in i.parts
        code.releases = order in ("release", "acq_rel")
        code.acquires = order in ("acquire", "acq_rel")
        results = [] if is_red else [self._result(one, code.width) for one in flat(i.operands[0])]
        sources = [self._row(one, code.width) for each in values for one in each]
        self._operands(code, results, [self._base(code, address), *sources])
        code.target, self.atomics = self.atomics, self.atomics + 1
        return ATOMIC

    def _result(self, operand: object, width: int) -> int:
        return -1 if operand == Symbol("_") else self._row(operand, width)

    def _async_product(self, code: InstructionStruct, i: Instruction) -> int:
        """`wgmma`, with its groups and fences."""
        if i.parts[1] == "fence":
            return PRODUCT_FENCE
        if i.parts[1] != "mma_async":
            return self._group(code, i, OF_PRODUCTS)
        shape, sums, kind, b_kind = i.parts[4:]
        to, a, b, accumulate, *signs = i.operands
        width, by_columns = KIND_BYTES[kind], [one.bits for one in signs[2:]]
        if (
            sums not in ("f32", "s32")
            or KIND_BYTES[b_kind] != width
            or not shape.endswith(f"k{32 // width}")
            or [one.bits for one in signs[:2]] not in ([1, 1], [])
            or (width != 2 and any(by_columns))
        ):
            raise LookupError
        of_a = a if isinstance(a, list) else []
        sources = [self._row(accumulate, 1), self._row(b, 8)]
        if not of_a:
            sources.append(self._row(a, 8))
        self._operands(code, [], sources)
        table = [self._row(one, 4) for one in (*to, *of_a)]
        self._tables.append((ctypes.c_int32 * len(table))(*table))
        code.table = ctypes.addressof(self._tables[-1])
        code.results, code.second_offset, code.is_signed = len(to), len(of_a), sums == "s32"
        code.mode, code.width = KINDS[kind], KINDS[b_kind]
        if by_columns:
            code.transposed = by_columns[-1] << 1 | (by_columns[0] if not of_a else 0)
        return ASYNC_PRODUCT

    def _copy(self, code: InstructionStruct, i: Instruction) -> int:
        if i.parts[2:3] == ["bulk"]:
            return self._box(code, i)
        if i.parts[2:3] in (["commit_group"], ["wait_group"]):
            return self._group(code, i, OF_COPIES)
        kinds = [part.partition("::")[0] for part in i.parts[3:] if part[:2] != "L2"]
        if i.parts[1:3] not in (["async", "cg"], ["async", "ca"]) or kinds != ["shared", "global"]:
            raise LookupError
        to, source, size, *given = i.operands
        rows = [*self._bases(code, to, source), *(self._row(one, 4) for one in given)]
        code.width, code.space = size.bits, SPACES["shared"]
        self._operands(code, [], rows)
        return COPY

    ENCODERS: ClassVar[dict[str, Callable[["Program", InstructionStruct, Instruction], int]]] = {
        "mov": _move,
        "bra": _branch,
        "brx": _branch_by_index,
        "vote": _vote,
        "match": _match,
        "activemask": _active,
        "ld": _load,
        "st": _store,
        "shfl": _shuffle,
        "ldmatrix": _load_matrix,
        "mma": _product,
        "bar": _barrier,
        "barrier": _barrier,
        "cp": _copy,
        "ret": _return,
        "exit": _return,
        "atom": _atomic,
        "red": _atomic,
        "fence": _fence,
        "stmatrix": _store_matrix,
        "elect": _elect,
        "redux": _reduce,
        "mbarrier": _mbarrier,
        "tensormap": _tensormap,
        "griddepcontrol": _control_grids,
        **dict.fromkeys(HINTS, _hint),
        "wgmma": _async_product,
    }
