# SPDX-License-Identifier: MIT
"""Which tiles a matrix kernel takes: measured ones where the device has been tuned, else safe defaults.

A table holds, for each kernel and kind of operand, what was fastest up to a size, the library included:

    {"device": "NVIDIA H200", "triton": "3.9.0", "torch": "2.15.0", "date": "2026-11-20",
     "tiles": {"symmetric_product": {"bfloat16": [
         {"up_to": 512, "tiles": null}, {"up_to": null, "tiles": [128, 128, 64, 8, 4, true, false]}]}}}

The size is the geometric mean of m, n and k, the batch left out. The kinds are those of `operand_kind`:
"bfloat16", "float32 tf32", with " batched" behind from `BATCHED` matrices on; a kind that the table lacks
takes the defaults. ``null`` tiles mean that the library was faster; ``up_to`` null stands last, for all
that is larger. Tables lie in ``tuned/`` beside this file, named after the device; one in the user's
cache (`user_folder`) comes first.
"""

import json
import os
import warnings
from bisect import bisect_left
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

SHIPPED = Path(__file__).resolve().parent / "tuned"
BATCHED = 32  # matrices: from there on a batch fills a GPU whatever their size

# Bytes a block may have, by capability (CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability"); 0 is gfx942, and sm_86, sm_89 and sm_120 have 101376.
SHARED_MEMORY = {0: 65536, 80: 166912, 87: 166912, 90: 232448, 100: 232448, 103: 232448}
_ACCUMULATOR_REGISTERS = 192  # of the 255 that a thread may have
_TMA_FROM = 90
_SHAPES = dict.fromkeys(
    ("symmetrized_product", "linear_sigmoid"), ((64, 64), (64, 128), (128, 64), (128, 128), (128, 256))
) | {"symmetric_product": ((64, 64), (128, 128))}


class Tiles(NamedTuple):
    """Tile sizes and launch options of a matrix kernel; ``tma`` and ``persistent`` where it has them."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool = False
    persistent: bool = False


class Block(NamedTuple):
    """Elements and warps of a program of an elementwise kernel."""

    block: int
    num_warps: int


class Device(NamedTuple):
    """What the choice depends on; capability 90 is sm_90, and 0 what is not NVIDIA's."""

    name: str
    capability: int
    multiprocessors: int


_Entries = tuple[list[int], list[Tiles | None]]  # m·n·k of the sizes up to which, and what for


def device(t: Tensor) -> Device:
    """The present device, which launchers are called with; Triton's interpreter where ``t`` is on a CPU."""
    if t.device.type == "cpu":
        return Device("interpreter", 0, 1)
    return _device(triton.runtime.driver.active.get_current_device())


@cache
def _device(index: int) -> Device:
    target = triton.runtime.driver.active.get_current_target()
    capability = target.arch if target.backend == "cuda" else 0
    if index >= torch.cuda.device_count():  # compiled for, and not present
        return Device(f"{target.backend} {target.arch}", capability, 132)
    present = torch.cuda.get_device_properties(index)
    return Device(present.name, capability, present.multi_processor_count)


def default_tiles(dtype: torch.dtype, precision: str, m: int, n: int, *operands: Tensor) -> Tiles:
    """Tiles for an ``(m, n)`` product of ``operands`` of ``dtype``.

    None spills registers on sm_80, sm_90 or sm_100, unless a matrix is added as well. What cannot be loaded
    or stored 16 bytes at a time takes an address per element, and so a smaller tile.
    """
    vectorised = _moves_16_bytes(n, *operands)
    if dtype == torch.float64:
        return Tiles(64, 64, 16, 4, 2 if vectorised else 3)
    large = m >= 1024 and n >= 1024
    if dtype == torch.float32 and precision == "ieee":
        if not vectorised:
            return Tiles(64, 64, 16, 8, 3)
        return Tiles(128, 128, 16, 8, 3) if large else Tiles(64, 64, 16, 8, 2)
    tma = bool(operands) and device(operands[0]).capability >= _TMA_FROM
    if dtype == torch.float32:
        if not vectorised:
            return Tiles(64, 64, 16, 4, 3)
        return Tiles(128, 128, 16, 8, 4, tma) if large else Tiles(64, 64, 32, 8, 3)
    return Tiles(128, 128, 64, 8, 3, tma) if vectorised and large else Tiles(64, 64, 32, 8, 3)


def chosen(
    kernel: str, dtype: torch.dtype, precision: str, m: int, n: int, k: int, batch: int, *operands: Tensor
) -> Tiles | None:
    """Tiles for ``batch`` products ``(m, k)·(k, n)``; None where the library was measured to be faster."""
    table = _table(device(operands[0]))
    if entries := table.get((kernel, operand_kind(dtype, precision, batch))):
        limits, tiles = entries
        best = tiles[bisect_left(limits, m * n * k)]
        # Tables are measured on operands that load 16 bytes at a time; others may spill with their tiles.
        if best is None or _moves_16_bytes(n, *operands):
            return best
    return default_tiles(dtype, precision, m, n, *operands)


def operand_kind(dtype: torch.dtype, precision: str, batch: int = 1) -> str:
    """The key of a table's entries."""
    return _operand_kind(dtype, precision, bool(batch >= BATCHED))


@cache
def _operand_kind(dtype: torch.dtype, precision: str, batched: bool) -> str:
    name = str(dtype).removeprefix("torch.")
    return name + f" {precision}" * (dtype == torch.float32) + " batched" * batched


_KINDS = {
    operand_kind(dtype, precision, batch): dtype
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    for precision in ("ieee", "tf32")
    for batch in (1, BATCHED)
}


def candidates(kernel: str, dtype: torch.dtype, precision: str, capability: int) -> list[Tiles] | list[Block]:
    """The configurations worth measuring for ``kernel`` on a device of ``capability`` that can hold them."""
    if kernel == "maximum":
        sizes = (2048, 4096, 8192, 16384, 32768)  # bytes of the result
        return [Block(size // dtype.itemsize, warps) for size in sizes for warps in (2, 4, 8)]
    modes = [(False, False)]
    tensor_cores = dtype.itemsize == 2 or precision == "tf32"
    if kernel == "symmetric_product" and capability >= _TMA_FROM and tensor_cores:
        modes += [(True, False), (True, True)]
    found = [
        Tiles(block_m, block_n, row // dtype.itemsize, num_warps, num_stages, *mode)
        for block_m, block_n in _SHAPES[kernel]
        for row in (64, 128)  # bytes
        for num_warps in (4, 8)
        for num_stages in ((3, 4) if tensor_cores else (2, 3))
        for mode in modes
        if not (mode[1] and block_m == 64)  # small products have too few tiles to share out
    ]
    return [tiles for tiles in found if not _excess(kernel, dtype, tiles, capability)]


def _excess(kernel: str, dtype: torch.dtype, tiles: Tiles, capability: int) -> str:
    """What of ``tiles`` no device of this capability has; empty if nothing."""
    if [type(option) for option in tiles] != [int] * 5 + [bool] * 2:
        return f"{list(tiles)} are not five numbers and two truth values"
    if any(size not in (8, 16, 32, 64, 128, 256) for size in tiles[:3]) or tiles[3] not in (1, 2, 4, 8, 16):
        return f"{list(tiles)} are no powers of two that a tile may have"
    if not 1 <= tiles.num_stages <= 8:
        return f"{tiles.num_stages} stages, of 8"
    if tiles.block_k * dtype.itemsize < 32:
        return f"{tiles.block_k} columns are fewer than a product of tiles takes"
    if kernel == "symmetric_product" and tiles.block_m != tiles.block_n:
        return f"a tile of {tiles.block_m} by {tiles.block_n} is not square"
    if tiles.tma and capability < _TMA_FROM:
        return "the device has no TMA"
    words = 2 if dtype == torch.float64 else 1
    registers = words * tiles.block_m * tiles.block_n // (32 * tiles.num_warps)
    if registers > _ACCUMULATOR_REGISTERS:
        return f"{registers} registers a thread for the sums, of {_ACCUMULATOR_REGISTERS}"
    buffers = tiles.num_stages - (capability == 0)  # AMD keeps one in registers
    shared = buffers * (tiles.block_m + tiles.block_n) * tiles.block_k * dtype.itemsize
    limit = SHARED_MEMORY.get(capability, 101376)
    return f"{shared} bytes of shared memory, of {limit}" if shared > limit else ""


def loads_by_tma(t: Tensor) -> bool:
    """Whether a TMA descriptor can describe the matrices of ``t (batch, rows, cols)`` or their transposes."""
    batch, row, col = t.stride()
    step = row if col == 1 else col
    return bool(
        1 in (row, col)
        and step > 0
        and all(s * t.element_size() % 16 == 0 for s in (step, t.storage_offset(), batch * (t.shape[0] > 1)))
        and _address(t) % 16 == 0
    )


def _address(t: Tensor) -> int:
    try:
        return t.data_ptr()
    except RuntimeError:  # a tracer's tensor has none; what a compiler allocates is aligned
        return 0


def _moves_16_bytes(columns: int, *operands: Tensor) -> bool:
    """Whether operands can be loaded, and rows of a result of ``columns`` stored, 16 bytes at a time."""
    for t in operands:
        unit = 16 // t.element_size()
        if columns % unit or t.storage_offset() % unit:
            return False
        for size, stride in zip(t.shape, t.stride(), strict=True):
            if (size if stride == 1 else stride) % unit:
                return False
    return True


# Tables on disk


def user_folder() -> Path:
    """Where the user's own tables lie: under $TORCHPAR_CACHE, or torchpar's part of the cache folder."""
    if folder := os.environ.get("TORCHPAR_CACHE"):
        return Path(folder)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # there may be no home
    return Path(cache) / "torchpar" / "tuned"


def file_name(device_name: str) -> str:
    """The name of a device's table: lower case, with "-" for spaces and slashes."""
    return device_name.lower().replace(" ", "-").replace("/", "-") + ".json"


def load(device_name: str, capability: int = 100, folder: Path | None = None) -> dict[str, Any] | None:
    """A device's table as it was saved, or None; a warning if it is damaged, foreign or impossible there.

    It is looked for in ``folder``, by default in `user_folder` and then beside the kernels.
    """
    for place in (user_folder(), SHIPPED) if folder is None else (folder,):
        path = place / file_name(device_name)
        try:
            table: dict[str, Any] = json.loads(path.read_text())
            _parse(table, device_name, capability)
            return table
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
        except (OSError, ValueError, RecursionError) as error:
            hint = "default tiles are used, `python -m torchpar tune` writes it anew"
            warnings.warn(f"{path}: {error}; {hint}", stacklevel=2)
            break
    return None


def save(device_name: str, table: dict[str, Any], folder: Path | None = None) -> Path:
    """Write a device's table at once or not at all, and use it from now on.

    It goes to ``folder``, by default beside the kernels if this is a checkout, else to `user_folder`, and
    there in any case if that has one of the device, which would come before it.

    Raises:
        ValueError: it is not a table of that device.
    """
    _parse(table, device_name)
    if folder is None:
        checkout = (SHIPPED.parent.parent / "pyproject.toml").exists() and os.access(SHIPPED.parent, os.W_OK)
        own = "TORCHPAR_CACHE" in os.environ or (user_folder() / file_name(device_name)).exists()
        folder = SHIPPED if checkout and not own else user_folder()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(device_name)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(table, indent=1) + "\n")
    partial.replace(path)
    _table.cache_clear()
    return path


@cache
def _table(present: Device) -> dict[tuple[str, str], _Entries]:
    table = load(present.name, present.capability)
    return _parse(table, present.name, present.capability) if table else {}


def _parse(table: Any, device_name: str, capability: int = 100) -> dict[tuple[str, str], _Entries]:
    """The entries of a table; a ValueError says what is wrong with it."""
    try:
        if table["device"] != device_name:
            raise ValueError(f"it is of {table['device']!r}, expected {device_name!r}")
        return {
            (kernel, kind): _parse_entries(kernel, kind, entries, capability)
            for kernel, kinds in table["tiles"].items()
            for kind, entries in kinds.items()
        }
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"it is not laid out as a table ({type(error).__name__}: {error})") from error


def _parse_entries(kernel: str, kind: str, entries: Any, capability: int) -> _Entries:
    where = f"{kernel}, {kind}"
    if kernel not in _SHAPES:
        raise ValueError(f"{kernel!r} is no kernel, expected one of {', '.join(_SHAPES)}")
    if kind not in _KINDS:
        raise ValueError(f"{where}: no such kind, expected one of {', '.join(_KINDS)}")
    dtype = _KINDS[kind]
    limits = [entry["up_to"] for entry in entries]
    rising = all(type(a) is int and a > 0 and (b is None or a < b) for a, b in pairwise(limits))
    if not rising or limits[-1:] != [None]:
        raise ValueError(f"{where}: up_to is {limits}, expected rising sizes and null at the end")
    tiles = [None if entry["tiles"] is None else Tiles(*entry["tiles"]) for entry in entries]
    for choice in tiles:
        if choice and (excess := _excess(kernel, dtype, choice, capability)):
            raise ValueError(f"{where}: {excess}")
    return [limit**3 for limit in limits[:-1]], tiles
