# SPDX-License-Identifier: MIT
"""The estimated time of a matrix kernel, from its configuration and the sizes alone.

What a launch does is counted here without executing it; the model is `nogpu.estimate`, so that this
module needs nogpu.
"""

import re
from collections.abc import Iterable, Sequence
from math import ceil, gcd

from nogpu import DATA_SHEETS, Estimate, Fitted, Resources, Work, estimate
from torchpar.kernels.device import GPUS
from torchpar.kernels.rule import (
    BYTES,
    KINDS,
    SECOND,
    Device,
    Product,
    Tiles,
    configurations,
    count_tiles,
    resident_programs,
    split_k,
)
from torchpar.kernels.tiles import Choice

FORMATS = {"bfloat16": "f16", "float16": "f16", "tf32": "tf32", "tf32x3": "tf32", "float64": "f64"}
# Registers of a thread beside its part of the result, by ptxas on the library's configurations.
_REGISTERS, _BY_TMA, _SPLIT = 48, 40, 40
# FLOPs that threads take to split a float32 of the first operand into two numbers of TF32, fitted
# to an H200's times.
SPLIT_FLOPS = 60.0
FITTED = Fitted()


def candidates(choice: Choice, tried: Iterable[str]) -> list[Tiles]:
    """Return the rule's configurations, and those of ``tried`` that load these operands.

    Args:
        tried: texts of configurations, such as "128x256x64 w8 s4 tma".
    """
    product, kind, device = choice.product, choice.kind, choice.device
    found = dict.fromkeys(choice.times)
    pattern = re.compile(r"(\d+)x(\d+)x(\d+) w(\d+) s(\d+) (\w+)")
    have = {(one.block_m, one.by_tma) for one in configurations(product, kind, device.capability)}
    takes_pointers = any(not one.by_tma for one in choice.suitable)
    for match in filter(None, map(pattern.fullmatch, tried)):
        tiles = Tiles(*map(int, match.groups()[:5]), match[6])  # type: ignore[call-arg,arg-type]
        fits = tiles.num_stages * (tiles.block_m + tiles.block_n) * tiles.block_k
        fits = fits * KINDS[kind].dtype.itemsize <= DATA_SHEETS[device.name].shared_of_program
        loads = choice.allows_tma if tiles.by_tma else takes_pointers
        runs = device.capability == 90 or (tiles.block_m, tiles.by_tma) in have
        if fits and loads and runs and tiles.variant in product.variants:
            found[tiles] = None
    return list(found)


def work_of_tiles(
    product: Product,
    kind: str,
    tiles: Tiles,
    sizes: Sequence[int],
    device: Device,
    with_c: bool = False,
) -> Work:
    """Return what the kernel does for products of ``sizes`` (m, n, k and batch)."""
    m, n, k, batch = sizes
    rows, columns, depth, _, stages, _ = tiles
    item, symmetric = KINDS[kind].dtype.itemsize, product.is_symmetric
    parts, columns_each = split_k(tiles, device, m, n, k)
    count = count_tiles(tiles, m, n, symmetric) * batch * parts
    steps = ceil(columns_each / depth)
    all_steps = count * steps
    loads = (rows + columns) * depth * item  # bytes of a step
    # Most rows that do not begin at multiples of 128 bytes lie in one line more.
    lines = 2 - gcd(k * item, 128) / 128
    result = rows * columns * (item if parts == 1 else max(4, item))
    single_stores = item == 2 and n % 8 != 0
    # The transpose of a symmetric tile is stored, too.
    stored = result * (2 if symmetric else 1) * (3 if single_stores else 1) * (1.5 if with_c else 1)
    at_once = _resident(product, kind, tiles, device)
    programs = min(count, resident_programs(tiles, device)) if tiles.by_tma else count
    products = 2.0 * rows * columns * depth * all_steps
    in_tensor = FORMATS.get(kind)
    has_wgmma = device.capability == 90 and rows >= 64 and kind not in ("float32", "float64")
    flops = {}
    if in_tensor is None:
        flops["f32"] = products
    elif kind == "tf32x3":
        flops["f32"] = SPLIT_FLOPS * rows * depth * all_steps
        products *= 3
    read = (m + (0 if symmetric else n)) * k * batch * item
    written = m * n * batch * item if parts == 1 else m * n * parts * 4
    if with_c:
        read += m * n * batch * item // 2
    return Work(
        programs=programs,
        resident=at_once,
        tiles=count,
        steps=steps,
        buffers=stages,
        tensor={in_tensor: products} if in_tensor is not None else {},
        has_wgmma=has_wgmma,
        flops=flops,
        special=0 if symmetric or parts > 1 else 2.0 * rows * columns * count,
        copies=0 if tiles.by_tma else loads * all_steps / 512,
        instructions=0,
        loaded=loads * lines * all_steps,
        stored=stored * count,
        shared=_numbers_read(kind, tiles, has_wgmma) * item * all_steps,
        memory=read + written,
        has_descriptors=tiles.by_tma,
        late_rounds=_late(product, kind, tiles),
        single_loads=item == 2 and k % 8 != 0,
    )


def _numbers_read(kind: str, tiles: Tiles, has_wgmma: bool) -> float:
    """Return how many numbers of shared memory the products of a step read."""
    if has_wgmma:  # each 64 rows read all columns
        return tiles.block_k * (tiles.block_m + tiles.block_m // 64 * tiles.block_n)
    if kind in ("float32", "float64"):
        return 0  # in the share of the peak that these units reach
    return 2.0 * tiles.block_k * (tiles.block_m + tiles.block_n)


def _late(product: Product, kind: str, tiles: Tiles) -> float:
    """Return by how many tiles a program ends later that computes two tiles on the diagonal, one
    after the other."""
    one_by_one = tiles.block_m < 128 or kind == "tf32x3"
    is_wide = product.is_symmetric and tiles.variant == "tma" and tiles.block_n > tiles.block_m
    return 0.5 if is_wide and one_by_one else 0.0


def _resident(product: Product, kind: str, tiles: Tiles, device: Device) -> int:
    """Return how many programs a multiprocessor runs at once."""
    item = KINDS[kind].dtype.itemsize
    words = tiles.block_m * tiles.block_n // (32 * tiles.num_warps) * max(item // 4, 1)
    registers = words + (_BY_TMA if tiles.by_tma else _REGISTERS)
    registers += _SPLIT if kind == "tf32x3" else 0
    shared = tiles.num_stages * (tiles.block_m + tiles.block_n) * tiles.block_k * item
    if tiles.by_tma and not product.is_symmetric:
        shared += tiles.block_m * tiles.block_n * item // 2
    elif tiles.by_tma:
        shared += tiles.block_m * tiles.block_m * item
    used = Resources(min(registers, 255), 0)
    at_once = max(1, used.resident_programs(tiles.num_warps, shared, f"sm_{device.capability}"))
    if tiles.by_tma:
        at_once = min(at_once, resident_programs(tiles, device) // device.multiprocessors)
    return at_once


def estimate_tiles(
    product: Product,
    kind: str,
    tiles: Tiles,
    sizes: Sequence[int],
    gpu: str,
    *,
    with_c: bool = False,
    fitted: Fitted = FITTED,
) -> Estimate:
    """Return the estimated time of an operator's call, copies and the sum of parts included."""
    m, n, k, batch = sizes
    device, dtype = GPUS[gpu], KINDS[kind].dtype
    work = work_of_tiles(product, kind, tiles, sizes, device, with_c)
    found = estimate(work, gpu, fitted)
    moved = []
    parts, _ = split_k(tiles, device, m, n, k)
    if parts > 1:
        moved.append(2 * parts * m * n * max(4, dtype.itemsize))
    if kind == "float32":  # copies by columns
        moved += [2 * 4 * k * size * batch for size in ([m] if product.is_symmetric else [m, n])]
    others = sum(SECOND + one / BYTES for one in moved)
    return found._replace(microseconds=found.microseconds + others)
