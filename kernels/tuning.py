# SPDX-License-Identifier: MIT
"""Tile sizes of the matrix kernels: measured where the device has been tuned, estimated elsewhere.

Nothing is searched for at run time. `python -m torchpar tune` measures the `configurations` of a kernel at
some problems, and writes the fastest to a table of the device:

    {"device": "NVIDIA H200", "triton": "3.9.0", "torch": "2.15.0", "kernels": "9f2c…", "date": "2026-11-20",
     "tiles": {"symmetric_product": {"bfloat16": [
         [4096, 4096, 4096, 1, [128, 256, 64, 8, 4, "tma"]], [256, 256, 256, 1, null]]}}}

A problem is ``[m, n, k, batch, tiles]``. `KINDS` names its operands. ``null`` means that PyTorch's library
was faster. Tables lie in ``tuned/`` beside this file, named after the device. A table in the user's cache
(`user_folder`) has priority.
"""

import json
import os
import warnings
from collections.abc import Sequence
from functools import cache, lru_cache
from math import ceil, log2
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .launch import forget_plans

SHIPPED = Path(__file__).resolve().parent / "tuned"

# Bytes of shared memory per block, by capability (CUDA C++ Programming Guide, "Technical Specifications per
# Compute Capability"). 0 stands for gfx942; sm_86, sm_89 and sm_120 have 101376.
SHARED_MEMORY = {0: 65536, 80: 166912, 87: 166912, 90: 232448, 100: 232448, 103: 232448}


_WITH_TMA = (90, 100, 103)  # sm_120 has too little shared memory for tiles that gain by it


class Tiles(NamedTuple):
    """Tile sizes and launch options of a matrix kernel.

    The variant "tma" is for `_WITH_TMA`. `symmetric_product` by TMA with a block_n of 2·block_m has tiles of
    that shape below the diagonal, and square ones on it; "specialized" is its alone. "split" is
    `linear_sigmoid`'s: several programs compute a tile (`splits`).
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    variant: str = "pointers"


class Device(NamedTuple):
    """A device as far as tiles depend on it; capability 90 is sm_90, and 0 is not NVIDIA's."""

    name: str
    capability: int
    multiprocessors: int


class Kind(NamedTuple):
    """A kind of operands, and the tiles for it.

    ``speed`` is a multiprocessor's, in products per µs, from an H200: measured in bfloat16, else as NVIDIA
    specifies it beside bfloat16.
    """

    dtype: torch.dtype
    precision: str
    speed: float
    unaligned: Tiles  # an address per element takes registers: larger tiles would spill
    tiles: tuple[Tiles, ...]


# By pointers, symmetric_product takes the square tiles. Of tiles of one shape, the first is a default.
_16_BIT = (
    Tiles(128, 256, 64, 8, 4, "tma"),
    Tiles(64, 128, 64, 4, 4, "tma"),
    Tiles(128, 128, 64, 8, 4, "tma"),
    Tiles(128, 128, 64, 4, 3, "tma"),
    Tiles(128, 256, 64, 8, 3),
    Tiles(256, 128, 64, 8, 3),
    Tiles(128, 128, 64, 8, 3),
    Tiles(64, 128, 64, 4, 3),
    Tiles(64, 64, 64, 4, 3),  # small products do not repay the making of descriptors
    Tiles(64, 64, 128, 4, 3),
    Tiles(64, 64, 32, 8, 3),
    Tiles(64, 64, 128, 4, 3, "tma"),
    Tiles(64, 64, 64, 4, 4, "split"),
    Tiles(128, 128, 64, 4, 3, "specialized"),
)
_TF32 = (  # with a fourth stage, transposed operands and a matrix C would not fit into sm_100's shared memory
    *dict.fromkeys(tiles._replace(block_k=tiles.block_k // 2, num_stages=3) for tiles in _16_BIT),
    Tiles(64, 64, 16, 4, 3),
)
_FLOAT32 = (
    Tiles(128, 128, 16, 8, 3),
    Tiles(64, 128, 16, 8, 2),
    Tiles(64, 64, 16, 8, 2),
    Tiles(64, 64, 32, 8, 2),
    Tiles(64, 64, 16, 8, 2, "split"),
)
_FLOAT64 = (
    Tiles(64, 128, 16, 8, 2),
    Tiles(64, 64, 16, 4, 2),
    Tiles(64, 64, 32, 8, 2),
    Tiles(64, 64, 16, 4, 3),
    Tiles(64, 64, 32, 8, 2, "split"),
)
FAR = 6.0  # octaves from a measured problem, over all sizes; such as a fourth of m, n and k
SECOND_LAUNCH = 3.0  # µs on a GPU, an estimate
BYTES_PER_US = 4e6  # of an H200's memory
KERNELS = ("symmetric_product", "linear_sigmoid")
KINDS = {
    "bfloat16": Kind(torch.bfloat16, "ieee", 3e6, Tiles(64, 64, 32, 8, 3), _16_BIT),
    "float16": Kind(torch.float16, "ieee", 3e6, Tiles(64, 64, 32, 8, 3), _16_BIT),
    "tf32": Kind(torch.float32, "tf32", 1.5e6, Tiles(64, 64, 16, 4, 3), _TF32),
    "float32": Kind(torch.float32, "ieee", 2e5, Tiles(64, 64, 16, 8, 3), _FLOAT32),
    "float64": Kind(torch.float64, "ieee", 2e5, Tiles(64, 64, 16, 4, 3), _FLOAT64),
}
_Entry = tuple[tuple[int, ...], Tiles | None]  # m, n, k and batch, and their tiles


def device(t: Tensor) -> Device:
    """The current device, or Triton's interpreter where ``t`` is on a CPU."""
    if t.device.type == "cpu":
        return Device("interpreter", 0, 3)
    return _device(triton.runtime.driver.active.get_current_device())


@cache
def _device(index: int) -> Device:
    target = triton.runtime.driver.active.get_current_target()
    capability = target.arch if target.backend == "cuda" else 0
    if index >= torch.cuda.device_count():  # a kernel is compiled for a device that is not here
        return Device(f"{target.backend} {target.arch}", capability, 132)
    present = torch.cuda.get_device_properties(index)
    return Device(present.name, capability, present.multi_processor_count)


@cache
def _kind(dtype: torch.dtype, precision: str) -> str:
    return "tf32" if (dtype, precision) == (torch.float32, "tf32") else str(dtype).removeprefix("torch.")


def configurations(kernel: str, dtype: torch.dtype, precision: str, capability: int) -> list[Tiles]:
    """The configurations of ``kernel`` that a device of ``capability`` can run."""
    found = []
    for tiles in KINDS[_kind(dtype, precision)].tiles:
        m, n, k, _, stages, variant = tiles
        symmetric = kernel == "symmetric_product"
        exists = {
            # Of the two widest, one spills on sm_80 and the other later.
            "pointers": m == n if symmetric else m + n < 384 or (m > n) == (capability < 90),
            "split": not symmetric,
            "tma": capability == 90 or (capability in _WITH_TMA and n == 128),  # elsewhere the others spill
            "specialized": symmetric and capability == 90,  # Triton 3.6 compiles it for no other
        }[variant]
        elements = (stages - (capability == 0)) * (m + n) * k  # AMD keeps a stage in registers
        if variant in ("tma", "specialized"):  # which store from shared memory
            elements += m * m if symmetric else m * n // 2
        programs = resident_programs(tiles)
        if exists and programs * elements * dtype.itemsize <= SHARED_MEMORY.get(capability, 101376):
            found.append(tiles)
    return found


def default_tiles(
    kernel: str, precision: str, sizes: Sequence[int], *operands: Tensor, tma: bool = True
) -> Tiles:
    """Tiles for products of ``sizes`` (m, n, k and batch) without a table: those of the least estimate."""
    kind, present = _kind(operands[0].dtype, precision), device(operands[0])
    usable = tuple(v for v in variants(kernel, sizes[1], *operands, tma=tma) if v != "specialized")
    if not usable:
        return KINDS[kind].unaligned
    return _least(kernel, kind, present, tuple(map(_hint, sizes)), usable)


@lru_cache(4096)
def _least(
    kernel: str, kind: str, present: Device, sizes: tuple[int, ...], variants: tuple[str, ...]
) -> Tiles:
    """Of the ``variants``, the tiles with the least estimated time."""
    m, n, k, batch = sizes
    dtype, precision, speed = KINDS[kind][:3]
    aligned = n * dtype.itemsize % 16 == 0

    def estimate(tiles: Tiles) -> float:
        """In µs: waves of tiles over the multiprocessors. Operands go through shared memory."""
        block_m, block_n = tiles[:2]
        rows, columns = ceil(m / block_m), ceil(n / block_n)
        if kernel != "symmetric_product":
            units = rows * columns
        elif block_m == block_n:
            units = rows * (rows + 1) // 2
        else:  # full tiles, and pairs of the square tiles on the diagonal
            units = columns**2 + ceil(columns / 2)
        count, span = splits(tiles, present, m, n, k) if tiles.variant == "split" else (1, k)
        waves = ceil(units * batch * count / present.multiprocessors)
        time = waves * span * (block_m * block_n + 64 * (block_m + block_n)) / speed
        return time if count == 1 else time + SECOND_LAUNCH + 8 * m * n * count / BYTES_PER_US

    possible = configurations(kernel, dtype, precision, present.capability)
    return min((one for one in possible if one.variant in variants and _stores(one, aligned)), key=estimate)


def _stores(tiles: Tiles, aligned: bool) -> bool:
    """Whether the registers suffice to store a tile where rows of the result do not begin at 16 bytes."""
    return aligned or tiles.block_m * tiles.block_n <= 64 * 128


def splits(tiles: Tiles, present: Device, m: int, n: int, k: int) -> tuple[int, int]:
    """Among how many programs a tile of linear_sigmoid is split, and the columns of x that each takes.

    A graph of symbolic sizes has one program.
    """
    if any(isinstance(size, torch.SymInt) for size in (m, n, k)):
        return 1, k
    units = ceil(m / tiles.block_m) * ceil(n / tiles.block_n)
    steps = ceil(k / tiles.block_k)
    count = max(1, min(present.multiprocessors // units, steps // 4, 16))
    steps_each = ceil(steps / count)
    return ceil(steps / steps_each), steps_each * tiles.block_k


def resident_programs(tiles: Tiles) -> int:
    """How many persistent programs a multiprocessor runs at a time."""
    return 2 if tiles.num_warps == 4 and tiles.variant == "tma" else 1


def chosen(
    kernel: str, precision: str, sizes: Sequence[int], *operands: Tensor, tma: bool = True
) -> Tiles | None:
    """Tiles for products of ``sizes`` (m, n, k and batch); None where PyTorch's library is faster.

    They are those of the table's nearest problem, or the default ones if none is nearer than `FAR`. No guard
    is added for a symbolic size: a compiled graph keeps the tiles of the sizes that it was traced with.
    """
    kind = _kind(operands[0].dtype, precision)
    entry = _nearest(device(operands[0]), kernel, kind, tuple(map(_hint, sizes)))
    if entry:
        tiles = entry[1]
        aligned = _hint(sizes[1]) * operands[0].element_size() % 16 == 0
        usable = variants(kernel, sizes[1], *operands, tma=tma)
        if tiles is None or (tiles.variant in usable and _stores(tiles, aligned)):
            return tiles
    return default_tiles(kernel, precision, sizes, *operands, tma=tma)


@lru_cache(4096)
def _nearest(present: Device, kernel: str, kind: str, sizes: tuple[int, ...]) -> _Entry | None:
    def distance(entry: _Entry) -> float:
        return sum(abs(log2(max(a, 1) / b)) for a, b in zip(sizes, entry[0], strict=True))

    nearest = min(_table(present).get((kernel, kind), ()), key=distance, default=None)
    return nearest if nearest and distance(nearest) <= FAR else None


def _hint(size: int) -> int:
    """The value that a symbolic size was traced with, without a guard; 1024 where there is none."""
    return size.node.hint or 1024 if isinstance(size, torch.SymInt) else size


def variants(kernel: str, n: int, *operands: Tensor, tma: bool = True) -> tuple[str, ...]:
    """The variants of ``kernel`` that operands and a result of ``n`` columns allow; maybe none.

    The symmetric product stores its mirror as well, for which rows of the result must begin at 16 bytes.
    """
    symmetric = kernel == "symmetric_product"
    if not _moves_16_bytes(n if symmetric else 0, *operands):
        return ()
    found = ("pointers",) if symmetric else ("pointers", "split")
    if not tma or operands[0].dtype == torch.float64 or not all(map(loads_by_tma, operands)):
        return found
    plain = symmetric and all(t.stride(-1) == 1 and (t.dim() == 2 or t.shape[0] == 1) for t in operands)
    return (*found, "tma", "specialized") if plain else (*found, "tma")


def loads_by_tma(t: Tensor) -> bool:
    """Whether a TMA descriptor can describe the matrices of ``t (*, rows, cols)`` or their transposes."""
    if t.dim() < 2:
        return False
    *batch, row, col = t.stride()
    step, unit = row if col == 1 else col, 16 // t.element_size()
    steps = (step, *(s for s, n in zip(batch, t.shape, strict=False) if n != 1))
    if 1 not in (row, col) or t.storage_offset() % unit or any(s <= 0 or s % unit for s in steps):
        return False
    try:
        return t.data_ptr() % 16 == 0
    except RuntimeError:  # a tracer's tensor has no address; the compiler will allocate it aligned
        return True


def _moves_16_bytes(columns: int, *operands: Tensor) -> bool:
    """Whether operands can be loaded, and rows of a result of ``columns`` stored, 16 bytes at a time."""
    for t in operands:
        unit = 16 // t.element_size()
        steps = [size if stride == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True)]
        if any(step % unit for step in (columns, t.storage_offset(), *steps)):
            return False
    return True


# Tables on disk


def user_folder() -> Path:
    """The folder of the user's own tables: $TORCHPAR_CACHE, or torchpar's folder in the user's cache."""
    if folder := os.environ.get("TORCHPAR_CACHE"):
        return Path(folder)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # there may be no home
    return Path(cache) / "torchpar" / "tuned"


def file_name(device_name: str) -> str:
    """The name of a device's table: lower case, with "-" for spaces and slashes."""
    return device_name.lower().replace(" ", "-").replace("/", "-") + ".json"


def load(present: Device) -> dict[str, Any] | None:
    """The table of a device as it was saved, or None; a damaged one gives a warning, and None."""
    for folder in (user_folder(), SHIPPED):
        path = folder / file_name(present.name)
        try:
            table: dict[str, Any] = json.loads(path.read_text())
            _parse(table, present)
            return table
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
        except (OSError, ValueError, RecursionError) as error:
            hint = "default tiles are used; `python -m torchpar tune` writes a new table"
            warnings.warn(f"{path}: {error}; {hint}", stacklevel=2)
            break
    return None


def save(present: Device, table: dict[str, Any]) -> Path:
    """Write the table of a device, atomically, and use it from now on; return its path.

    Its folder is beside the kernels in a checkout, and otherwise `user_folder`. It is also `user_folder` if
    that has a table of the device already, which has priority. A wrong ``table`` raises a ValueError.
    """
    _parse(table, present)
    checkout = (SHIPPED.parent.parent / "pyproject.toml").exists() and os.access(SHIPPED.parent, os.W_OK)
    own = os.environ.get("TORCHPAR_CACHE") or (user_folder() / file_name(present.name)).exists()
    path = (SHIPPED if checkout and not own else user_folder()) / file_name(present.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        partial.write_text(json.dumps(table, indent=1) + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    forget_tables()
    return path


def forget_tables() -> None:
    """Read the tables again when tiles are chosen next."""
    _table.cache_clear()
    _nearest.cache_clear()
    forget_plans()


@cache
def _table(present: Device) -> dict[tuple[str, str], list[_Entry]]:
    table = load(present)
    return _parse(table, present) if table else {}


def _parse(table: Any, present: Device) -> dict[tuple[str, str], list[_Entry]]:
    """The entries of a table; a ValueError says what is wrong with it."""
    found: dict[tuple[str, str], list[_Entry]] = {}
    try:
        if table["device"] != present.name:
            raise ValueError(f"the table is of {table['device']!r}, expected {present.name!r}")
        for kernel, kinds in table["tiles"].items():
            for kind, entries in kinds.items():
                if kernel not in KERNELS or kind not in KINDS:
                    raise ValueError(f"{kernel} of {kind} is not among {', '.join((*KERNELS, *KINDS))}")
                possible = (None, *configurations(kernel, *KINDS[kind][:2], present.capability))
                for entry in entries:
                    sizes, tiles = tuple(entry[:4]), None if entry[4] is None else Tiles(*entry[4])
                    known = all(type(size) is int and 0 < size < 2**63 for size in sizes)
                    if not known or tiles not in possible:
                        expected = "four sizes above 0 and a configuration of this device"
                        raise ValueError(f"{kernel}, {kind}: {entry}, expected {expected}")
                    tiles = possible[possible.index(tiles)]  # 64, where the file has 64.0
                    found.setdefault((kernel, kind), []).append((sizes, tiles))
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"not the layout of a table ({type(error).__name__}: {error})") from error
    return found
