# SPDX-License-Identifier: MIT
"""The core in C (core.c): build it once, encode kernels for it, and run warps by it.

It executes the common instructions of a warp, and leaves the others, and whatever may be a fault,
to `machine`. Without a C compiler `machine` executes all of them. TORCHPAR_PTX=python has the same
effect.
"""

import atexit
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from torchpar.ptx.machine.memory import LARGEST_UNIT
from torchpar.ptx.machine.parse import (
    Address,
    Constant,
    Instruction,
    Kernel,
    Register,
    Symbol,
    flat,
    qualifiers,
)
from torchpar.ptx.machine.registers import DTYPES, HALVES, SHARED_BASE, UNWRITTEN

if TYPE_CHECKING:
    from torchpar.ptx.machine.block import Block, Warp
    from torchpar.ptx.machine.counters import Counts
    from torchpar.ptx.machine.memory import Allocation, Events, Space

SOURCES = tuple(
    Path(__file__).with_name(f"{name}.c")
    for name in ("blocks", "tma", "atomics", "knowledge", "core")
)
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC")
ROW, OPERANDS, ALL_LANES, NO_LIMIT = 256, 16, 2**32 - 1, 2**31 - 1
BUDGET, PYTHON, GROW, REACHED, STOPPED, REFINE = range(6)  # why `run` returns
(
    LEFT,
    ELEMENTWISE,
    BRANCH,
    LOAD,
    STORE,
    SHUFFLE,
    PACK,
    LOAD_MATRIX,
    PRODUCT,
    NOTHING,
    COPY,
    ELECT,
    STORE_MATRIX,
    REDUCE,
    RETURN,
    BARRIER,
    COMMIT,
    WAIT,
    PROXY_FENCE,
    PRODUCT_FENCE,
    ASYNC_PRODUCT,
    ATOMIC,
    MBARRIER_INIT,
    MBARRIER_INVAL,
    MBARRIER_ARRIVE,
    MBARRIER_WAIT,
    LOAD_BOX,
    STORE_BOX,
    BULK_COMMIT,
    BULK_WAIT,
    MAP_REPLACE,
    MAP_PUBLISH,
    MAP_ACQUIRE,
) = range(33)
# Of which some access few bytes of shared memory
SHARED_KINDS = (LOAD, STORE, COPY, ATOMIC, MBARRIER_INIT, MAP_REPLACE)
ROOM = 2**20  # bytes that must be free in the cache: more than the core and some kernels take
OF_COPIES, OF_PRODUCTS = range(2)  # families of groups
MOST_ELEMENTS = 4  # of an atomic
IN_ROW, IN_LIST = 1, 2
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
MBARRIERS = {
    "mbarrier.init": MBARRIER_INIT,
    "mbarrier.inval": MBARRIER_INVAL,
    "mbarrier.arrive": MBARRIER_ARRIVE,
    "mbarrier.arrive.expect_tx": MBARRIER_ARRIVE,
    "mbarrier.try_wait.parity": MBARRIER_WAIT,
}
# Instructions that change no result
HINTS = ("setmaxnreg", "nanosleep", "griddepcontrol", "prefetch", "discard")
# Of operands of wgmma, and the bytes of a number
KINDS = {"bf16": 0, "f16": 1, "tf32": 2, "s8": 3, "u8": 4, "e4m3": 5, "e5m2": 6}
KIND_BYTES = {kind: 4 if kind == "tf32" else 2 if "f16" in kind else 1 for kind in KINDS}
SPACES = {"global": 0, "shared": 1, "local": 2}


class _Instruction(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("kind", "guard", "target", "line")),
        *((name, ctypes.c_int32) for name in ("results", "sources")),
        ("to", ctypes.c_int32 * OPERANDS),
        ("from_", ctypes.c_int32 * OPERANDS),
        ("offset", ctypes.c_int64),
        ("second_offset", ctypes.c_int64),
        ("function", ctypes.c_void_p),
        *((name, ctypes.c_uint8) for name in ("negated", "whole", "flush", "space")),
        *((name, ctypes.c_uint8) for name in ("width", "is_signed", "mode", "transposed")),
        *((name, ctypes.c_uint8) for name in ("count", "is_atomic", "releases", "acquires")),
        ("slot", ctypes.c_int32),
        ("table", ctypes.c_void_p),
    )


class _Allocation(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("start", "base", "end")),
        *((name, ctypes.c_void_p) for name in ("data", "writes", "reads", "others", "barriers")),
        ("touched", ctypes.c_void_p),
        ("sectors", ctypes.c_int64),
        ("spare", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("unit", "barrier_count")),
    )


class _Space(ctypes.Structure):
    _fields_ = (
        ("allocations", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("last", ctypes.c_void_p),
    )


class _Events(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("lines", "what", "agents", "times", "blocks")),
        ("atomic", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("count", "capacity")),
    )


class _Warp(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("program", "rows", "states", "versions", "widths")),
        *((name, ctypes.c_void_p) for name in ("counts", "events")),
        ("spaces", ctypes.c_void_p * 3),
        ("times", ctypes.c_void_p),
        ("copies", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("count", "stores")),
        *((name, ctypes.c_int32) for name in ("pc", "block", "index", "knows_others")),
        *((name, ctypes.c_int32) for name in ("load_name", "store_name", "atomic_name")),
        *((name, ctypes.c_int32) for name in ("load_box_name", "store_box_name", "fence_name")),
        *((name, ctypes.c_int32) for name in ("elected", "finer")),
        ("coarse", ctypes.c_void_p),
        ("active", ctypes.c_uint32),
        *((name, ctypes.c_void_p) for name in ("fence", "runner", "undo", "foreign")),
    )


class UndoStruct(ctypes.Structure):
    _fields_ = (
        ("bytes", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("used", "capacity")),
    )


class CopiesStruct(ctypes.Structure):
    _fields_ = (
        ("parts", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("count", "capacity")),
        *((name, ctypes.c_int32) for name in ("agent", "name", "time", "done")),
    )


@lru_cache(1)
def library() -> ctypes.CDLL | None:
    """Return the compiled core, or None where Python executes everything."""
    if os.environ.get("TORCHPAR_PTX") == "python":
        return None
    try:
        compiler = _compiler()
        path = _path(" ".join(compiler))
        core = ctypes.CDLL(str(_kept(path) or _build(compiler, path)))
    except (OSError, ValueError) as e:
        message = f"no core in C, so that Python executes all instructions, slowly: {e}"
        print(f"torchpar.ptx: {message}", file=sys.stderr, flush=True)
        return None
    core.run.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32)
    core.function_of.restype = core.atomic_of.restype = ctypes.c_void_p
    core.read_copies.argtypes = core.write_copies.argtypes = (ctypes.c_void_p,)
    core.free_copies.argtypes = (ctypes.POINTER(CopiesStruct),)
    core.run_blocks.argtypes = (
        *(ctypes.c_void_p for _ in range(2)),
        ctypes.c_int64,
        ctypes.c_int32,
        ctypes.c_void_p,
    )
    core.run_blocks.restype = ctypes.c_int64
    core.free_runner.argtypes = core.clear_releases.argtypes = (ctypes.c_void_p,)
    core.add_times.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    core.add_times.restype = ctypes.c_void_p
    core.add_map.argtypes = (
        *(ctypes.c_void_p for _ in range(2)),
        ctypes.c_int64,
        *(ctypes.c_int32 for _ in range(2)),
    )
    core.add_release.argtypes = (
        ctypes.c_void_p,
        ctypes.c_uint64,
        ctypes.c_int64,
        *(ctypes.c_void_p for _ in range(2)),
    )
    core.read_many.argtypes = (
        *(ctypes.c_void_p for _ in range(3)),
        ctypes.c_int64,
        ctypes.c_int,
        ctypes.c_int32,
        ctypes.c_void_p,
    )
    core.decode_matrix.argtypes = (
        *(ctypes.c_void_p for _ in range(3)),
        ctypes.c_int64,
        ctypes.c_int,
        ctypes.c_int,
    )
    return core


def cache_folder(name: str) -> Path:
    """Return where the user's cache has ``name`` of torchpar, by the XDG specification.

    It ignores XDG_CACHE_HOME if that is empty or relative.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    for folder in (given, os.path.expanduser("~/.cache")):
        if os.path.isabs(folder):
            return Path(folder) / "torchpar" / name
    return Path("/.cache/torchpar") / name  # a user without a home, as of some containers


@lru_cache(None)
def writable(folder: Path) -> Path:
    """Return a folder of the cache, or a temporary one if that cannot be written, and say so."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:  # os.access is always true for root
            file.write(bytes(ROOM))
            file.flush()  # a full disk has names of files, and no room for a byte
        return folder
    except OSError as e:
        made = tempfile.mkdtemp(prefix="torchpar-")
        atexit.register(_remove, made, os.getpid())
        reason = f"{folder} cannot be written ({e.strerror}), so that nothing is kept in it"
        advice = "set XDG_CACHE_HOME to a folder that can be written"
        print(f"torchpar.ptx: {reason}; {advice}", file=sys.stderr, flush=True)
        return Path(made)


def _remove(folder: str, process: int) -> None:
    if os.getpid() == process:  # and not a fork of it
        shutil.rmtree(folder, ignore_errors=True)


def _compiler() -> list[str]:
    """Return the command of the C compiler, which CC may give with flags or a launcher.

    Raises:
        ValueError: there is none.
    """
    given = os.environ.get("CC", "")
    try:
        command = shlex.split(given)
    except ValueError as e:
        raise ValueError(f"CC is {given!r}, expected a command ({e})") from None
    found = shutil.which("cc") or shutil.which("gcc")
    if not command and found is None:
        raise ValueError("there is no C compiler, cc or gcc; install one, or set CC")
    return command or [str(found)]


def _path(compiler: str) -> Path:
    """Return where the core is kept, by its source and the machine's processor.

    Its file's name has the hash of its content, too, between this name and its suffix.
    """
    features = ""
    if (info := Path("/proc/cpuinfo")).exists():
        lines = info.read_text().splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    texts = (source.read_text("utf-8") for source in SOURCES)
    told = "\n".join([*texts, compiler, platform.machine(), features, *FLAGS])
    return cache_folder("core") / f"core-{_hash(told.encode())}.so"


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _with_hash(path: Path, content: str) -> Path:
    return path.with_name(f"{path.stem}-{content}{path.suffix}")


def _kept(path: Path) -> Path | None:
    """Return the core of the cache, if its content is what was built: other files may crash."""
    for one in sorted(path.parent.glob(_with_hash(path, "*").name)):
        try:
            if _with_hash(path, _hash(one.read_bytes())) == one:
                return one
        except OSError:  # it cannot be read, or another process has removed it
            continue
        with suppress(OSError):
            one.unlink()
    return None


def _build(compiler: list[str], path: Path) -> Path:
    """Compile the core, and keep it in the cache.

    Raises:
        OSError: the compiler cannot be executed, or fails, or the core cannot be written.
    """
    print("torchpar.ptx: compiles its core, once", file=sys.stderr, flush=True)
    # In the system's folder, so that a build that is killed leaves nothing in the cache.
    with tempfile.TemporaryDirectory(prefix="torchpar-") as folder:
        made = Path(folder) / path.name
        command = [*compiler, *FLAGS, "-o", str(made), str(SOURCES[0]), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode or not made.exists():
            lines = done.stderr.strip().splitlines()
            said = next((line for line in lines if "error" in line), lines[-1] if lines else "")
            status = f"`{shlex.join(compiler)}` ends with status {done.returncode} and no core"
            raise OSError(f"{status}: {said}" if said else status)
        content = made.read_bytes()
    kept = _with_hash(writable(path.parent) / path.name, _hash(content))
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        whole = Path(folder) / kept.name
        whole.write_bytes(content)
        whole.replace(kept)  # at once, for other processes that look for it
    return kept


def elected(completion: str, warp: int) -> int:
    """Return the thread that `elect` chooses: the PTX ISA leaves it open."""
    return {"early": 0, "late": 31}.get(completion, 7 * warp % 32)


def _thread_bytes(code: _Instruction) -> int:
    """Return how many bytes of memory a thread accesses at least at once."""
    if code.kind == MBARRIER_INIT:
        return 8
    if code.kind in (COPY, ATOMIC, MAP_REPLACE):
        return int(code.width)
    return int(code.width * (code.results if code.kind == LOAD else code.sources - 1))


class Program:
    """A kernel's instructions for the core, and the rows of its constants and special registers."""

    def __init__(self, kernel: Kernel, core: ctypes.CDLL):
        self.core, self.kernel = core, kernel
        self.widths = [DTYPES[kind].itemsize for kind in kernel.registers]
        self.constants: dict[tuple[int, int], int] = {}  # rows by bits and width
        self.specials: dict[tuple[str, int], int] = {}  # rows by name and width
        self.instructions = (_Instruction * len(kernel.instructions))()
        self.is_for_blocks = not kernel.local_bytes  # for blocks.c, as far as is known
        self.is_for_cores = True  # for cores.py, as far as is known
        self.atomics = 0  # instructions of blocks.c, which are numbered
        self._tables: list[Any] = []  # of registers, which the instructions point to
        slots, _ = kernel.slots
        for code, i, slot in zip(self.instructions, kernel.instructions, slots, strict=True):
            code.slot = slot
            self._encode(code, i)
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
        self.width_array = np.array(self.widths, np.uint8)
        self.rows = np.zeros((len(self.widths), ROW), np.uint8)
        for (bits, width), row in self.constants.items():
            self.rows[row, : 32 * width] = np.frombuffer(
                bits.to_bytes(width, "little") * 32, np.uint8
            )
        count = len(kernel.registers)
        self.states = np.full(len(self.widths), IN_ROW, np.uint8)
        self.states[:count] = IN_LIST
        self.addresses = (
            ctypes.addressof(self.instructions),
            self.width_array.ctypes.data,
        )

    # Operands

    def _row(self, operand: Any, width: int) -> int:
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
            return self._new(self.constants, (SHARED_BASE + operand.offset, width), width)
        is_known = operand.name in (*self.kernel.parameters, *self.kernel.constants)
        is_known |= operand.name in self.kernel.locals
        is_known |= operand.name.startswith(("%tid", "%ctaid", "%ntid", "%nctaid", "%laneid"))
        if not is_known or operand.offset:
            raise LookupError
        return self._new(self.specials, (operand.name, width), width)

    def _new(self, rows: dict[Any, int], key: Any, width: int) -> int:
        if key not in rows:
            rows[key] = len(self.widths)
            self.widths.append(width)
        return rows[key]

    # Instructions

    def _encode(self, code: _Instruction, i: Instruction) -> None:
        """Fill in ``code``; what the core does not know is left to Python."""
        code.kind, code.line, code.target, code.whole = LEFT, i.line, i.target, i.whole
        code.guard, code.negated = (-1 if i.guard is None else i.guard.index), i.negated
        encode = self.ENCODERS.get(i.parts[0], Program._elementwise)
        try:
            kind = encode(self, code, i)
        except (LookupError, ValueError):  # another number of operands, too
            return
        code.kind = kind

    def _operands(self, code: _Instruction, to: Iterable[int], sources: Iterable[int]) -> None:
        results, given = list(to), list(sources)
        if max(len(results), len(given)) > OPERANDS:
            raise LookupError
        code.results, code.sources = len(results), len(given)
        code.to[: len(results)] = results
        code.from_[: len(given)] = given

    def _elementwise(self, code: _Instruction, i: Instruction) -> int:
        parts = [part for part in i.parts if part != "ftz"]
        if i.parts[0] != "cvt":
            parts = [part for part in parts if part != "rn"]
        return self._apply(code, ".".join(parts), i.operands, "ftz" in i.parts)

    def _apply(
        self, code: _Instruction, name: str, operands: list[Any], flush: bool = False
    ) -> int:
        widths = (ctypes.c_uint8 * 4)()
        entry = self.core.entry_of(name.encode(), widths)
        expected = [width for width in widths if width]
        if entry < 0 or len(operands) != len(expected):
            raise LookupError
        if name.startswith(("bfe", "prmt")) and not isinstance(operands[-1], Constant):
            raise LookupError
        if name.startswith("bfe"):
            start, count = (one.bits for one in operands[2:])
            if not 0 < count <= 8 * expected[0] - start:
                raise LookupError
        if not isinstance(operands[0], Register):
            raise LookupError
        # The core flushes float32 alone.
        if flush and (not name.endswith(".f32") or "f64" in name):
            raise LookupError
        to, *sources = map(self._row, operands, expected)
        self._operands(code, [to], sources)
        code.flush, code.function = flush, self.core.function_of(entry)
        return ELEMENTWISE

    def _move(self, code: _Instruction, i: Instruction) -> int:
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

    def _branch(self, code: _Instruction, i: Instruction) -> int:
        if i.target < 0:
            raise LookupError
        return BRANCH

    def _load(self, code: _Instruction, i: Instruction) -> int:
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

    def _store(self, code: _Instruction, i: Instruction) -> int:
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

    def _access(self, code: _Instruction, i: Instruction, count: int) -> None:
        (*rest, kind), order, in_shared = qualifiers(i)
        in_local = rest[:1] == ["local"]
        dtype = DTYPES.get(kind)
        if order or dtype is None or rest[in_local:] != [f"v{count}"] * (count > 1):
            raise LookupError
        code.space = SPACES["shared" if in_shared else "local" if in_local else "global"]
        code.width, code.is_signed = dtype.itemsize, dtype.kind == "i"

    def _base(self, code: _Instruction, address: Any) -> int:
        if not isinstance(address, Address) or address.coordinates:
            raise LookupError
        code.offset = address.offset
        if isinstance(address.base, Register):
            return address.base.index
        return self._row(address.base, 4 if address.base == Symbol("global_smem") else 8)

    def _shuffle(self, code: _Instruction, i: Instruction) -> int:
        source, lane, clamp, members = i.operands[-4:]
        targets = [one for operand in i.operands[:-4] for one in flat(operand)]
        modes = ("up", "down", "bfly", "idx")
        if members != Constant(-1) or i.parts[2] not in modes or i.parts[3] != "b32":
            raise LookupError
        code.mode = modes.index(i.parts[2])
        results = [self._row(one, width) for one, width in zip(targets, (4, 1), strict=False)]
        self._operands(code, results, [self._row(one, 4) for one in (source, lane, clamp)])
        return SHUFFLE

    def _load_matrix(self, code: _Instruction, i: Instruction) -> int:
        to, source = i.operands
        results = [self._row(one, 4) for one in flat(to)]
        self._operands(code, results, [self._base(code, source)])
        code.space, code.transposed = SPACES["shared"], "trans" in i.parts
        return LOAD_MATRIX

    def _store_matrix(self, code: _Instruction, i: Instruction) -> int:
        to, source = i.operands
        values = [self._row(one, 4) for one in flat(source)]
        self._operands(code, [], [self._base(code, to), *values])
        code.space, code.transposed = SPACES["shared"], "trans" in i.parts
        return STORE_MATRIX

    def _elect(self, code: _Instruction, i: Instruction) -> int:
        lane, chosen, members = i.operands
        if members != Constant(-1):
            raise LookupError
        self._operands(code, [self._result(lane, 4), self._row(chosen, 1)], [])
        return ELECT

    def _reduce(self, code: _Instruction, i: Instruction) -> int:
        name, kind = i.parts[2:]
        to, source, members = i.operands
        if members != Constant(-1) or kind not in ("s32", "u32", "b32"):
            raise LookupError
        entry = self.core.entry_of(f"{name}.{kind}".encode(), (ctypes.c_uint8 * 4)())
        if entry < 0:
            raise LookupError
        code.function = self.core.function_of(entry)
        self._operands(code, [self._row(to, 4)], [self._row(source, 4)])
        return REDUCE

    def _product(self, code: _Instruction, i: Instruction) -> int:
        if i.parts[3:] not in (
            ["m16n8k16", "row", "col", "f32", kind, kind, "f32"] for kind in ("f16", "bf16")
        ):
            raise LookupError
        to, *sources = ([self._row(one, 4) for one in operand] for operand in i.operands)
        self._operands(code, to, [one for each in sources for one in each])
        code.mode = i.parts[7] == "f16"
        return PRODUCT

    # What blocks.c executes

    def _barrier(self, code: _Instruction, i: Instruction) -> int:
        if i.opcode == "bar.warp.sync":
            return NOTHING
        if i.parts[1] != "sync" or not all(isinstance(one, Constant) for one in i.operands):
            raise LookupError
        numbers = [one.bits for one in i.operands]
        code.mode, code.offset = numbers[0], numbers[1] // 32 if len(numbers) > 1 else 0
        return BARRIER

    def _return(self, code: _Instruction, i: Instruction) -> int:
        return RETURN

    def _group(self, code: _Instruction, i: Instruction, family: int) -> int:
        """``commit_group`` and ``wait_group``."""
        code.mode = family
        if i.parts[2] == "commit_group" or i.parts[1] == "commit_group":
            return COMMIT
        (count,) = i.operands
        if not isinstance(count, Constant):
            raise LookupError
        code.offset = count.bits
        return WAIT

    def _fence(self, code: _Instruction, i: Instruction) -> int:
        if i.opcode.startswith("fence.mbarrier_init"):
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

    def _mbarrier(self, code: _Instruction, i: Instruction) -> int:
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

    def _tensormap(self, code: _Instruction, i: Instruction) -> int:
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

    def _box(self, code: _Instruction, i: Instruction) -> int:
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

    def _bases(self, code: _Instruction, first: Any, second: Any) -> list[int]:
        """Return the rows of two addresses, of which ``code`` takes the offsets."""
        other = self._base(code, second)
        code.second_offset = code.offset
        return [self._base(code, first), other]

    def _hint(self, code: _Instruction, i: Instruction) -> int:
        return NOTHING

    def _atomic(self, code: _Instruction, i: Instruction) -> int:
        (name, *vector, kind), order, in_shared = qualifiers(i)
        is_red = i.parts[0] == "red"
        address, *operands = i.operands if is_red else i.operands[1:]
        values, count = [flat(one) for one in operands], len(flat(operands[0]))
        function = self.core.atomic_of(f"{name}.{kind}".encode())
        if not function or vector not in ([], [f"v{count}"]) or count > MOST_ELEMENTS:
            raise LookupError
        code.width, code.count = DTYPES[HALVES.get(kind, kind)].itemsize, count
        code.space = SPACES["shared" if in_shared else "global"]
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

    def _result(self, operand: Any, width: int) -> int:
        return -1 if operand == Symbol("_") else self._row(operand, width)

    def _async_product(self, code: _Instruction, i: Instruction) -> int:
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

    def _copy(self, code: _Instruction, i: Instruction) -> int:
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

    ENCODERS: ClassVar[dict[str, Any]] = {
        "mov": _move,
        "bra": _branch,
        "ld": _load,
        "st": _store,
        "shfl": _shuffle,
        "ldmatrix": _load_matrix,
        "mma": _product,
        "bar": _barrier,
        "barrier": _barrier,
        "cp": _copy,
        "ret": _return,
        "atom": _atomic,
        "red": _atomic,
        "fence": _fence,
        "stmatrix": _store_matrix,
        "elect": _elect,
        "redux": _reduce,
        "mbarrier": _mbarrier,
        "tensormap": _tensormap,
        **dict.fromkeys(HINTS, _hint),
        "wgmma": _async_product,
    }


def program_of(kernel: Kernel) -> Program | None:
    """Return the kernel for the core, if there is one."""
    core = library()
    if core is None:
        return None
    if kernel.program is None:
        kernel.program = Program(kernel, core)
    found: Program = kernel.program
    return found


class Registers:
    """The registers of a warp: a row of the core, or an object in a list, or both.

    Objects of Python, such as `registers.Tainted`, are in the list alone.
    """

    def __init__(self, dtypes: list[Any], rows: Any, states: Any, versions: Any):
        self.dtypes, self.rows, self.states, self.versions = dtypes, rows, states, versions
        self.held: list[Any] = [UNWRITTEN] * len(dtypes)

    def __getitem__(self, index: int) -> Any:
        if self.states[index] & IN_LIST:
            return self.held[index]
        dtype = self.dtypes[index]
        value = self.rows[index, : 32 * dtype.itemsize].view(dtype).copy()
        self.held[index] = value
        self.states[index] |= IN_LIST
        return value

    def __setitem__(self, index: int, value: Any) -> None:
        self.held[index] = value
        self.versions[index] += 1
        if isinstance(value, np.ndarray):
            dtype = self.dtypes[index]
            self.rows[index, : 32 * dtype.itemsize].view(dtype)[:] = value
            self.states[index] = IN_ROW | IN_LIST
        else:
            self.states[index] = IN_LIST

    def get_many(self, indices: Any) -> list[Any]:
        if (self.states[indices] & IN_LIST).all():
            return [self.held[index] for index in indices]
        return [self[index] for index in indices]

    def set_many(self, indices: Any, values: Any) -> None:
        """Put rows of 32 values of 32 bits into registers."""
        self.rows[indices, :128] = values.view(np.uint8)
        self.versions[indices] += 1
        self.states[indices] = IN_ROW

    def set_same(self, indices: Any, value: Any) -> None:
        """Let all of these registers hold an object of Python."""
        for index in indices:
            self.held[index] = value
        self.versions[indices] += 1
        self.states[indices] = IN_LIST

    def stamp(self) -> Any:
        """Return what tells later which registers have been written since."""
        return self.versions.copy()

    def is_unchanged(self, index: int, stamp: Any) -> bool:
        return bool(self.versions[index] == stamp[index])

    def restamp(self, index: int, stamp: Any) -> None:
        """Let a register count as unchanged."""
        stamp[index] = self.versions[index]


class LaunchState:
    """What the core knows of a launch: its events and its global memory."""

    def __init__(self, program: Program, events: "Events", space: "Space", counts: "Counts"):
        self.program = program
        self.dtypes = [DTYPES[kind] for kind in program.kernel.registers]
        self.events, self.space = EventsView(events), SpaceView(space)
        self.counts = counts
        self.no_space = _Space()
        self.rows: Any = None  # of the warps of a block, when it begins

    def begin(self, block: "Block") -> None:
        """Make what all blocks begin with, when the first one begins."""
        program, warps = self.program, len(block.warps)
        self.rows = np.repeat(program.rows[None], warps, 0)
        for warp, rows in zip(block.warps, self.rows, strict=True):
            for (name, width), row in program.specials.items():
                values = warp.special(name).astype(f"u{width}")
                rows[row, : 32 * width] = values.view(np.uint8)
        self.states = np.repeat(program.states[None], warps, 0)
        self.positions = [  # what differs by block
            (row, width, "xyz".index(name[-1]))
            for (name, width), row in program.specials.items()
            if name.startswith("%ctaid.")
        ]
        self.warps = (_Warp * warps)()
        code, widths = program.addresses
        for n, struct in enumerate(self.warps):
            struct.program, struct.widths, struct.index = code, widths, n
            struct.counts = self.counts.table.ctypes.data
            struct.events = ctypes.addressof(self.events.struct)
            struct.spaces[0] = ctypes.addressof(self.space.struct)
            struct.spaces[2] = ctypes.addressof(self.no_space)
            struct.load_name = self.events.events.name(f"a load of warp {n}")
            struct.store_name = self.events.events.name(f"a store of warp {n}")
            struct.atomic_name = self.events.events.name(f"an atomic of warp {n}")
            struct.load_box_name = self.events.events.name(f"a bulk load of warp {n}")
            struct.store_box_name = self.events.events.name(f"a bulk store of warp {n}")
            struct.fence_name = self.events.events.name(f"the fence of warp {n}")
            struct.elected = elected(block.gpu.schedule.completion, n)


class EventsView:
    """`memory.Events` for the core."""

    def __init__(self, events: "Events"):
        self.events, self.struct = events, _Events()
        events.view = self
        self.update()

    def update(self) -> None:
        for name in ("lines", "what", "agents", "times", "blocks", "atomic"):
            setattr(self.struct, name, getattr(self.events, name).ctypes.data)
        self.struct.capacity = len(self.events.lines)


class AllocationView:
    """A `memory.Allocation` for the core."""

    def __init__(self, allocation: "Allocation"):
        self.allocation, self.struct = allocation, _Allocation()
        self.spare: Any = None  # lent by `blocks`
        allocation.view = self
        self.update()

    def update(self) -> None:
        """Take its arrays anew, some of which have been replaced."""
        struct, one = self.struct, self.allocation
        struct.start, struct.base, struct.end = one.start, one.base, one.end
        struct.data, struct.writes = one.data.ctypes.data, one.writes.ctypes.data
        struct.reads = one.reads.ctypes.data
        if one.touched is not None:
            struct.touched, struct.sectors = one.touched.ctypes.data, one.touched.shape[1]
        else:
            struct.touched = None
        struct.others = None if one.others is None else one.others.ctypes.data
        struct.unit, struct.barrier_count = one.unit, len(one.barriers)
        self.barriers = np.array(list(one.barriers), np.int64)
        struct.barriers = self.barriers.ctypes.data


class SpaceView:
    """A `memory.Space` for the core."""

    def __init__(self, space: "Space"):
        self.space, self.struct = space, _Space()
        space.view = self
        self.update()

    def update(self) -> None:
        """Take its allocations anew."""
        views = [one.view or AllocationView(one) for one in self.space.allocations]
        self.pointer = ctypes.addressof(self.struct)
        self.pointers = (ctypes.c_void_p * max(len(views), 1))(
            *(ctypes.addressof(view.struct) for view in views)
        )
        self.struct.allocations = ctypes.addressof(self.pointers)
        self.struct.count, self.struct.last = len(views), None


class BlockState:
    """The registers of a block's warps, and what the core knows of its memory."""

    def __init__(self, launch: LaunchState, block: "Block"):
        if launch.rows is None:
            launch.begin(block)
        self.rows, self.states = launch.rows.copy(), launch.states.copy()
        self.versions = np.zeros(self.states.shape, np.uint32)
        for row, width, axis in launch.positions:
            self.rows[:, row, : 32 * width].view(f"u{width}")[:] = block.position[axis]
        self.warps = type(launch.warps).from_buffer_copy(launch.warps)
        self.spaces = [SpaceView(block.shared)]
        if block.local.allocations:
            self.spaces.append(SpaceView(block.local))
        addresses = [ctypes.addressof(view.struct) for view in self.spaces]
        rows, states, versions = (
            array.ctypes.data for array in (self.rows, self.states, self.versions)
        )
        size = self.states.shape[1]
        for n, (warp, struct) in enumerate(zip(block.warps, self.warps, strict=True)):
            struct.rows, struct.states = rows + n * size * ROW, states + n * size
            struct.versions, struct.block = versions + n * size * 4, block.number
            struct.spaces[1 : 1 + len(addresses)] = addresses
            warp.registers = Registers(
                launch.dtypes, self.rows[n], self.states[n], self.versions[n]
            )
            warp.core = WarpState(launch, struct)


class WarpState:
    """A warp for the core."""

    def __init__(self, launch: LaunchState, struct: _Warp):
        self.launch, self.struct, self.pointer = launch, struct, ctypes.addressof(struct)
        self.library = launch.program.core

    def run(self, warp: "Warp", budget: int) -> int:
        """Execute instructions of the core, at most ``budget``, and return how many."""
        struct, events = self.struct, self.launch.events
        struct.pc, struct.active = warp.pc, warp.active_bits()
        self._tell_knowledge(warp)
        events.struct.count = events.events.count
        limit = min(warp.parked) if warp.parked else NO_LIMIT
        struct.count = 0
        why = self.library.run(self.pointer, budget, limit)
        events.events.count = events.struct.count
        while why == GROW:
            events.events.grow()
            why = self.library.run(self.pointer, budget - struct.count, limit)
            events.events.count = events.struct.count
        if struct.stores:
            warp.block.gpu.changes += struct.stores
            struct.stores = 0
        warp.pc, done = struct.pc, int(struct.count)
        warp.count += done
        return done

    def repeat(self, warp: "Warp") -> bool:
        """Let the core execute the instruction that Python has begun, and return whether it did."""
        struct, events = self.struct, self.launch.events
        struct.pc, struct.active, struct.count = warp.pc - 1, warp.active_bits(), 0
        self._tell_knowledge(warp)
        events.struct.count = events.events.count
        self.library.run(self.pointer, 1, NO_LIMIT)
        events.events.count = events.struct.count
        if struct.count:  # Python counts it
            self.launch.counts.execute(warp.pc - 1, -len(warp.lanes()), -1)
        return bool(struct.count)

    def _tell_knowledge(self, warp: "Warp") -> None:
        knowledge = warp.knowledge
        self.struct.times = knowledge.address + warp.index * knowledge.stride
        self.struct.knows_others = bool(knowledge.foreign[warp.index])

    def read(
        self, warp: "Warp", space: "Space", addresses: Any, width: int, event: int, fence: bool
    ) -> bool:
        """`Space.read` of an asynchronous operation, if it is no fault."""
        at = np.ascontiguousarray(addresses, np.int64)
        return self.read_at(warp, space, at.ctypes.data, at.size, width, event, fence)

    def read_at(
        self,
        warp: "Warp",
        space: "Space",
        addresses: int,
        count: int,
        width: int,
        event: int,
        fence: bool,
    ) -> bool:
        """The same, of ``count`` addresses that lie in memory."""
        if space.view is None:
            return False
        self._tell_knowledge(warp)
        knowledge = warp.knowledge
        fenced = knowledge.fenced_address + warp.index * knowledge.stride if fence else None
        pointer = space.view.pointer
        return bool(
            self.library.read_many(self.pointer, pointer, addresses, count, width, event, fenced)
        )

    def numbers(self, space: "Space", chunks: int, rows: int, by_rows: bool, kind: str) -> Any:
        """`tensor_cores.Matrix.read`, or None if the core does not know the kind."""
        if kind not in KINDS or space.view is None:
            return None
        found = np.empty((rows, 32 // KIND_BYTES[kind]))
        done = self.library.decode_matrix(
            found.ctypes.data, space.view.pointer, chunks, rows, by_rows, KINDS[kind]
        )
        return found if done else None

    def tell_fence(self, versions: Any) -> None:
        """Note the versions of the registers at a wgmma.fence."""
        self.struct.fence = versions.ctypes.data

    def copies(self, group: Any) -> "CopiesState":
        """Begin a group of copies, to which the core adds."""
        found = CopiesState(self.library, self.launch.events.events, group)
        self.struct.copies = ctypes.addressof(found.struct)
        return found

    def end_copies(self) -> None:
        self.struct.copies = None


class CopiesState:
    """What the core has added to a group of copies."""

    def __init__(self, core: ctypes.CDLL, events: "Events", group: Any):
        name = events.name(group.name)
        self.core, self.struct = core, CopiesStruct(None, 0, 0, group.agent, name, group.time, 0)
        weakref.finalize(self, core.free_copies, self.struct)  # of a launch that has failed

    def read(self) -> None:
        self.core.read_copies(ctypes.addressof(self.struct))

    def write(self) -> None:
        self.core.write_copies(ctypes.addressof(self.struct))
