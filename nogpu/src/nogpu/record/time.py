# SPDX-License-Identifier: MIT
"""An estimate of a launch's time on several GPUs, with what binds it.

A multiprocessor computes tiles, the results of programs, one after the other or several at once.
The launch lasts as long as the multiprocessor with the most tiles:

    busy = max(units + special functions + results, latency, memory)
    time = launch + busy · (1 + clock · ln(1 + busy / 100 µs))

``units`` is the time of the unit that has most to do: the warps, with their products and copies,
the L2 cache, shared memory, or the issue of instructions. ``latency`` is the time of the tiles that
follow one another in one place of the multiprocessor:

    tile = beginning + steps · (own⁴ + (load / loads in flight)⁴)^¼ + special functions + results

A step of a tile's loop takes its own time in the units, and waits for its loads, several of which
are in flight. ``memory`` is what DRAM takes if all is read and written once.

The rates are those of data sheets, and the numbers of `Fitted` are of one H200. The times of other
GPUs are scaled by their data sheets. An H100's were compared with measurements, and no other's.
"""

from collections.abc import Mapping
from math import ceil, log1p
from typing import TYPE_CHECKING, NamedTuple

from nogpu.data_sheets import DATA_SHEETS, DataSheet
from nogpu.machine.instruction_counts import SECTOR, WAVEFRONT, Column
from nogpu.machine.kinds import operation, spaces, tensor_flops
from nogpu.machine.parse import Instruction

if TYPE_CHECKING:
    from nogpu.record.launch import Launch

# Of a multiprocessor in a clock. NVIDIA, "CUDA C++ Programming Guide", "Arithmetic Instructions";
# "Nsight Compute: Profiling Guide"; the L2 cache's bytes by "NVIDIA A100 Tensor Core GPU
# Architecture" (5120 bytes for two halves, to 108 multiprocessors).
SPECIAL, ISSUED, L2_BYTES = 16, 4, 64
# The share of the peak that products without wgmma reach on Hopper: Luo et al., "Benchmarking and
# Dissecting the Nvidia Hopper GPU Architecture via Microbenchmarking", 2024.
WITHOUT_WGMMA = 0.62
F64 = 0.75  # of the peak of tensor cores in float64: chosen, and not fitted
ASYNCHRONOUS = ("copy", "TMA load", "TMA store", "TMA reduction")
MEMORY = 0.92  # of its peak: 4.38 TB/s of an H200's 4.8 in the sum of two tensors


class Fitted(NamedTuple):
    """The numbers that were fitted to an H200's times, whose L2 cache was flushed before.

    Attributes:
        launch: µs that events measure of a launch which does next to nothing.
        descriptors: µs to make TMA descriptors.
        load: µs until a load arrives, while others load, too.
        beginning: µs of a tile beyond its steps and its result.
        stored: bytes of results that a multiprocessor stores in a clock.
        l2: the share of `L2_BYTES` that it loads.
        shared: the share of its bandwidth that shared memory has for the operands of products.
        copy: clocks in which the warps multiply nothing, for a warp's copy of 512 bytes.
        fma: the share of the peak that units for multiply-adds reach.
        clock: how much longer a launch of tensor cores takes, see above.
        single: a load of single elements of 16 bits takes so many times as long.
    """

    launch: float = 5.63
    descriptors: float = 0.79
    load: float = 0.82
    beginning: float = 0.33
    stored: float = 12.8
    l2: float = 0.85
    shared: float = 0.64
    copy: float = 4.1
    fma: float = 0.66
    clock: float = 0.055
    single: float = 1.6


FITTED = Fitted()
GRAPH_LAUNCH = 2.1  # µs, in place of `launch`, within a CUDA graph


class Work(NamedTuple):
    """The work of a launch, as far as its time depends on it. Sums are those of the whole launch.

    Attributes:
        programs: of the grid.
        resident: programs that a multiprocessor runs at once.
        tiles: results, of which a persistent program computes several.
        steps: of a tile's loop, each of which waits for a load.
        buffers: loads that are in flight at once.
        tensor: FLOPs of tensor cores by format.
        has_wgmma: whether they are those of Hopper's instruction.
        flops: FLOPs of the other units by format.
        special: results of special functions.
        copies: requests by warps to load or to copy from global memory, without TMA.
        instructions: of warps; 0 if they were not counted.
        loaded: bytes that the multiprocessors load.
        stored: bytes that they store.
        shared: bytes that they read and write in shared memory, without asynchronous copies.
        memory: bytes that DRAM reads and writes if the L2 cache keeps all that is used again.
        has_descriptors: whether programs make TMA descriptors.
        late_rounds: by how many tiles the last ones take longer than others.
        single_loads: whether elements of 16 bits are loaded one by one.
    """

    programs: int
    resident: int
    tiles: float
    steps: float
    buffers: float
    tensor: Mapping[str, float]
    has_wgmma: bool
    flops: Mapping[str, float]
    special: float
    copies: float
    instructions: float
    loaded: float
    stored: float
    shared: float
    memory: float
    has_descriptors: bool = False
    late_rounds: float = 0.0
    single_loads: bool = False


class Estimate(NamedTuple):
    """The estimated time of a launch on a GPU.

    Attributes:
        binds: what takes longest: a unit, "memory", "latency" or "launch".
        terms: µs of each term on the busiest multiprocessor, the longest first. They overlap.
        waves: how often the programs that run at once fill the GPU; a last one may be part filled.
    """

    gpu: str
    microseconds: float
    binds: str
    terms: dict[str, float]
    waves: float

    def __str__(self) -> str:
        article = "a" if self.gpu[0] == "B" else "an"
        return (
            f"about {shown(self.microseconds)} on {article} {self.gpu}, bound by {self.binds}; "
            f"{self.waves:.2f} waves"
        )


def shown(microseconds: float) -> str:
    """Return a time as text: "101.3 µs"."""
    return f"{microseconds:.1f} µs" if microseconds < 1000 else f"{microseconds:,.0f} µs"


def estimate(work: Work, gpu: str, fitted: Fitted = FITTED, in_graph: bool = False) -> Estimate:
    """Return the estimated time of a launch, by the formula at the head of this module.

    Args:
        work: what the launch does.
        fitted: the numbers that are no data sheet's.
        gpu: one of `DATA_SHEETS`.
        in_graph: the launch is one of a CUDA graph, and its operands are in the L2 cache.
    """
    sheet = DATA_SHEETS[gpu]
    tiles_each = ceil(work.tiles / sheet.multiprocessors)  # of the busiest multiprocessor
    # µs of one tile
    units = _units(work, sheet, fitted)
    special = work.special / work.tiles / (SPECIAL * sheet.ghz * 1e3)
    results = work.stored / work.tiles / (fitted.stored * sheet.ghz * 1e3)
    slower_clock = DATA_SHEETS["H200"].ghz / sheet.ghz
    loading = fitted.load * (fitted.single if work.single_loads else 1) * slower_clock
    own, steps = max(units.values()), max(work.steps, 1)
    in_flight = 1 if work.single_loads else work.buffers
    waiting = (loading + units["L2 cache"] / steps) / in_flight
    step = ((own / steps) ** 4 + waiting**4) ** 0.25
    tile = fitted.beginning * slower_clock + steps * step + special + results
    rounds = ceil(tiles_each / work.resident) + work.late_rounds
    terms = {name: tiles_each * one for name, one in units.items()}
    terms |= {"special functions": tiles_each * special, "results": tiles_each * results}
    terms["latency"] = rounds * tile
    terms["memory"] = 0 if in_graph else work.memory / (sheet.memory * MEMORY * 1e6)
    all_units = tiles_each * (own + special + results)
    busy = max(all_units, terms["latency"], terms["memory"])
    slower = fitted.clock * log1p(busy / 100) if set(work.tensor) - {"f64"} else 0.0
    launch = GRAPH_LAUNCH if in_graph else fitted.launch
    terms["launch"] = launch + fitted.descriptors * work.has_descriptors
    names = [name for name in terms if name != "latency"]
    binds = max(names, key=terms.__getitem__)
    # Latency is the word only where the units and memory would have been done far earlier.
    if terms["latency"] > 1.25 * max(all_units, terms["memory"], terms["launch"]):
        binds = "latency"
    waves = work.programs / (work.resident * sheet.multiprocessors)
    in_order = dict(sorted(terms.items(), key=lambda one: -one[1]))
    return Estimate(gpu, terms["launch"] + busy * (1 + slower), binds, in_order, waves)


def _units(work: Work, sheet: DataSheet, fitted: Fitted) -> dict[str, float]:
    """Return the µs of a tile on a multiprocessor by unit.

    The warps that multiply also copy, and do not multiply meanwhile.
    """
    clocks = sheet.ghz * 1e3 * work.tiles
    each = sheet.multiprocessors / work.tiles / 1e6
    tensor = others = 0.0
    for kind, count in work.tensor.items():
        reached = 1.0 if work.has_wgmma or sheet.capability != 90 else WITHOUT_WGMMA
        reached = F64 if kind == "f64" else reached
        tensor += each * count / (sheet.tensor.get(kind, sheet.tensor["f16"]) * reached)
    for kind, count in work.flops.items():
        others += each * count / (sheet.flops.get(kind, sheet.flops["f32"]) * fitted.fma)
    return {
        "tensor cores" if tensor > others else "floating point": tensor
        + others
        + work.copies * fitted.copy / clocks,
        "L2 cache": work.loaded / (L2_BYTES * fitted.l2 * clocks),
        "shared memory": work.shared / (WAVEFRONT * fitted.shared * clocks),
        "instructions": work.instructions / (ISSUED * clocks),
    }


def work_of(launch: "Launch") -> Work:
    """Return what an executed launch does, by its counters. Each CTA of a cluster is a program."""
    counters, programs, warps = launch.counters, launch.programs * launch.ctas, launch.warps
    total = counters.total
    loads = stores = waits = 0.0  # of a program
    copies = loaded = stored = operands = 0.0
    by_tma = is_asynchronous = has_wgmma = False
    for i, row in zip(launch.counts.kernel.instructions, launch.counts.table.tolist(), strict=True):
        name, requests = i.parts[0], row[Column.REQUESTS]
        if name == "wgmma" and i.parts[1] == "mma_async":
            has_wgmma = True
            operands += row[Column.EXECUTIONS] * _operand_bytes(i)
        if name in ("mbarrier", "cp") and "bulk" not in i.parts:
            waits += row[Column.WAITS] / programs / (1 if name == "mbarrier" else warps)
        if not requests or name == "tensormap" or spaces(i) == ("constant",):
            continue
        what = operation(i)
        of_tma = what.startswith("TMA")
        by_tma |= of_tma
        each = requests / programs / (1 if of_tma else warps)
        if what in ("store", "atomic", "TMA store", "TMA reduction"):
            stores = max(stores, each)
            stored += row[Column.SECTORS] * SECTOR
            continue
        loads = max(loads, each)
        loaded += row[Column.SECTORS] * SECTOR
        copies += 0 if of_tma else requests
        is_asynchronous |= of_tma or what == "copy"
    tiles = programs * max(1.0, stores)
    # The last wait of a pipeline of copies waits for nothing that is used.
    drained = 0 if by_tma else 1
    steps = max(1.0, (waits - drained if is_asynchronous else loads) * programs / tiles)
    in_shared = sum(
        one.transactions for one in counters.in_space("shared") if one.what not in ASYNCHRONOUS
    )
    of_step = loaded / tiles / steps
    buffers = 1.0
    if is_asynchronous and of_step:  # a step's own, the next one's, and those in flight
        buffers = max(1.0, min(launch.shared // of_step, total.most_in_flight + 2))
    return Work(
        programs=programs,
        resident=launch.programs_of_multiprocessor or 1,
        tiles=tiles,
        steps=steps,
        buffers=buffers,
        tensor=total.tensor_flops,
        has_wgmma=has_wgmma,
        flops=total.flops,
        special=total.special,
        copies=copies,
        instructions=total.instruction_count,
        loaded=loaded,
        stored=stored,
        shared=in_shared * WAVEFRONT + operands,
        memory=(counters.distinct_read + counters.distinct_written) * SECTOR,
        has_descriptors=by_tma,
    )


def _operand_bytes(i: Instruction) -> float:
    """Return the bytes of shared memory that a warp's part of a product reads.

    All four warps of a group read B once, and each a quarter of A.
    """
    _, flops = tensor_flops(i)
    shape = next(part for part in i.parts if part[0] == "m" and part[1:2].isdigit())
    columns = int(shape.partition("n")[2].partition("k")[0])
    depth = flops * 4 / (2 * 64 * columns)
    return (64 + columns) * depth * (256 / 8 / depth) / 4  # a row of depth elements has 32 bytes


def estimates(launch: "Launch") -> dict[str, Estimate]:
    """Return the estimate by GPU, first of those for which the kernel was compiled.

    GPUs before Hopper have no clusters.
    """
    work, capability = work_of(launch), int(launch.arch.removeprefix("sm_"))
    names = [name for name in DATA_SHEETS if launch.ctas == 1 or DATA_SHEETS[name].capability >= 90]
    names.sort(key=lambda name: DATA_SHEETS[name].capability != capability)
    return {name: estimate(work, name) for name in names}


ESTIMATE_ACCURACY = """\
The times are estimates. Of matrix kernels whose counts follow from their tiles, half were within 7%
of the times of an H200 and of an H100, and nine of ten within 20%. Other kernels, other GPUs,
programs of unequal length and clusters were not compared."""
"""The distance of the estimates from measured times, as text for a report."""
