# SPDX-License-Identifier: MIT
"""The machine code of the kernels for GPUs that are not there: spills, loops that load while they
multiply.

A stand-in for the driver names an architecture, so that the launchers themselves choose the
configuration and Triton specialises it as in a launch; the tensors are on the meta device.
"""

import re
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, NamedTuple

import kernel_cases as cases
import pytest
import torch
import triton
from products import PRODUCTS
from torch import Tensor

from benchmarks.compile_kernels import resources
from benchmarks.driver import Compiled, compile_launches, target
from torchpar.kernels import Tracer, matmul_t, maximum, muon, sigmoid_backward
from torchpar.kernels.rule import KINDS, Tiles, configurations, unaligned_tiles

TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
ODD = 509  # no stride is divisible by 16

newest = pytest.mark.skipif(TRITON < (3, 9), reason="earlier compilers spill more on these GPUs")
not_3_8 = pytest.mark.skipif(
    TRITON == (3, 8), reason="Triton 3.8 spills, and keeps the digits of A twice"
)

# Bytes of shared memory that a block may have
BLOCK_SHARED = {80: 166912, 90: 232448, 100: 232448, 103: 232448}

# Machine code: instructions and loops

_LINE = re.compile(
    r"\s*(?:(\.L_\w+):|/\*[0-9a-f]{4,}\*/\s+(?:@(!?\w+)\s+)?(\w[\w.]*)\s*([^;]*?)\s*;)"
)


class Instruction(NamedTuple):
    """An instruction, such as ``@!P0 BRA `(.L_x_1)``."""

    predicate: str
    opcode: str
    operands: str


def read(text: str) -> tuple[list[Instruction], list[range]]:
    """The instructions of one kernel, as `nvdisasm -c` prints them, and the positions of its loops.

    A wait that is seldom long is put behind the end, and branches back from there: no loop has an
    end.
    """
    labels: dict[str, int] = {}
    found: list[Instruction] = []
    loops: list[range] = []
    for match in filter(None, map(_LINE.match, text.splitlines())):
        label, *fields = match.groups("")
        if label:
            labels[label] = len(found)
            continue
        found.append(Instruction(*fields))
        target = re.search(r"`\((\.L_\w+)\)", found[-1].operands)
        if found[-1].opcode.startswith("BRA") and target and target[1] in labels:
            begin = labels[target[1]]
            if not any(one.opcode == "EXIT" and not one.predicate for one in found[begin:]):
                loops.append(range(begin, len(found)))
    return found, loops


class MachineCode:
    """The machine code of a kernel, and the constants of its launch.

    ``resources`` of a thread: REG, its registers; STACK and LOCAL, bytes that did not fit into
    them.
    """

    def __init__(self, compiled: Compiled):
        self.options, self.metadata = compiled.options, compiled.kernel.metadata
        tools = Path(str(triton.__file__)).parent / "backends/nvidia/bin"
        with NamedTemporaryFile(suffix=".cubin") as cubin:
            Path(cubin.name).write_bytes(compiled.kernel.asm["cubin"])
            command = [tools / "nvdisasm", "-c", "-ndf", cubin.name]
            code = subprocess.run(command, check=True, capture_output=True, text=True)
        self.resources = resources(compiled.kernel)
        self.instructions, self.loops = read(code.stdout)

    def count(self, pattern: str) -> int:
        return count(self.instructions, pattern)

    def innermost_loops(self, pattern: str, least: int = 1) -> list[list[Instruction]]:
        """The loops in which ``least`` opcodes match ``pattern``, without those around such a
        loop."""
        found = [
            loop
            for loop in self.loops
            if count(self.instructions[loop.start : loop.stop], pattern) >= least
        ]
        inner = [loop for loop in found if not any(set(other) < set(loop) for other in found)]
        return [self.instructions[loop.start : loop.stop] for loop in inner]


def count(instructions: list[Instruction], pattern: str) -> int:
    return sum(bool(re.fullmatch(pattern, one.opcode)) for one in instructions)


def machine_codes(launch: Callable[[Tracer], object]) -> list[MachineCode]:
    return [MachineCode(one) for one in compile_launches(launch)]


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def assert_fits(code: MachineCode, capability: int, aside: int = 0) -> None:
    """ptxas may put ``aside`` bytes away to have another program in a multiprocessor."""
    assert code.resources["STACK"] <= aside, f"registers spill: {code.resources}"
    assert code.resources["LOCAL"] == 0
    assert code.metadata.shared <= BLOCK_SHARED[capability]
    assert code.metadata.tmem_size <= 512  # columns of tensor memory


# The matrix kernels


def machine_codes_of(case: cases.Case) -> list[MachineCode]:
    with torch.device("meta"):
        operands = case.draw()
    return machine_codes(lambda wrap: case.launch(wrap, operands))


def matrix_kernel(
    kernel: str, kind: str, sizes: tuple[int, int, int], tiles: Tiles | None = None, **options: Any
) -> list[MachineCode]:
    m, n, k = sizes
    if kernel == "linear_sigmoid":
        return machine_codes_of(cases.sigmoid(m, n, k, *KINDS[kind][:2], tiles))
    return machine_codes_of(cases.symmetric(m, k, *KINDS[kind][:2], tiles, **options))


def assert_pipelined(code: MachineCode, products: int = 1) -> None:
    """In each loop over k, tiles are loaded while others are multiplied.

    ``products``: how many in a step may be waited for. Copies in flight are counted in `test_ptx`.
    Of three products, the loop that computes a tile again by one product is left out: it is rare.
    """
    load, multiply = r"(LDGSTS|UTMALDG)\b.*", r"\w*MMA\b.*"
    loops = code.innermost_loops(multiply) or code.innermost_loops(r"[FD]FMA2?\b.*")
    if products > 1:
        of_one = min(count(loop, multiply) for loop in loops)
        loops = code.innermost_loops(multiply, products * of_one)
        assert loops, "no loop makes as many products"
        # The loop over tiles and that over k may be one, and then have the rare loop inside.
        products += any(count(loop, multiply) > products * of_one for loop in loops)
    loads = [count(loop, load) for loop in loops]
    assert loops, "no loop multiplies"
    assert all(loads), "a loop loads nothing asynchronously"
    assert code.count(load) > sum(loads), "nothing is loaded before the loop"
    for loop in loops:
        waits = [
            one
            for one in loop
            if one.opcode == "WARPGROUP.DEPBAR.LE" and one.operands == "gsb0, 0x0"
        ]
        assert len(waits) <= products, f"wgmmas are serialised: {len(waits)} waits for all of them"


def tensor_core(capability: int, kind: str, rows: int) -> str:
    """The instruction that multiplies tiles of so many rows on the tensor cores, as a pattern.

    That of a whole warpgroup has 64 rows.
    """
    if kind == "float64":
        return r"DMMA\..*"
    if capability == 100 and rows >= 64:
        return "UTCHMMA"
    mnemonic = "HGMMA" if capability == 90 and rows >= 64 else "HMMA"
    return mnemonic + {"bfloat16": r"\.\w+\.F32\.BF16", "tf32": r"\.\w+\.F32\.TF32"}[kind]


def check_default_tiles(kernel: str, kind: str, n: int, capability: int) -> None:
    (code,) = matrix_kernel(kernel, kind, (n, n, n))
    assert_fits(code, capability)
    if kind == "float32":
        assert not code.count(r"\w*MMA\b.*"), (
            "a tensor core rounds its float32 operands to fewer bits"
        )
    else:
        rows = code.options.get("BLOCK") or code.options["BLOCK_M"]
        assert code.count(tensor_core(capability, kind, rows))
    if n != ODD:
        assert_pipelined(code)
        # A mask that varied along a row would split the stores into single elements.
        assert code.count(r"STG\.E.*\.128.*|UTMASTG.*")


def check_tiles_of_most_registers(kernel: str, kind: str, capability: int) -> None:
    """Of each variant those in which a thread holds most sums, for these spill first."""

    def sums_of_a_thread(tiles: Tiles) -> tuple[float, int]:
        """Their number, and that of the operands' elements that a block holds meanwhile."""
        loaded = (tiles.block_m + tiles.block_n) * tiles.block_k * tiles.num_stages
        return tiles.block_m * tiles.block_n / tiles.num_warps, loaded

    case = PRODUCTS[kernel], kind, capability
    launches: list[Any] = [((ODD, ODD, ODD), tiles, {}) for tiles in unaligned_tiles(*case)]
    most: dict[str, Tiles] = {}
    for tiles in configurations(*case):
        most[tiles.variant] = max(tiles, most.get(tiles.variant, tiles), key=sums_of_a_thread)
    for tiles in most.values():
        if kernel == "symmetric_matmul" and tiles.variant != "pointers":
            # Tiles of C take more registers. Without it, the default tiles are tried.
            with_c = {"other": True, "c": True, "factors": (1 / 3, 1.0)}
            launches.append(((4096, 4096, 1024), tiles, with_c))
            continue
        launches.append(((4096, 4096, 4096), tiles, {}))
        if kind != "bfloat16":
            continue  # other sizes are tried in bfloat16
        if tiles.variant == "split_k":
            launches.append(((64, 1024, 8192), tiles, {}))
        elif kernel == "linear_sigmoid" and tiles.block_m * tiles.block_n <= 64 * 128:
            launches.append(((512, 1001, 4096), tiles, {}))
    for sizes, tiles, options in launches:
        print(tiles, sizes)
        code, *_ = matrix_kernel(kernel, kind, sizes, tiles, **options)
        assert_fits(code, capability)
        if sizes != (ODD, ODD, ODD):
            # Triton waits for each of the three products, whose operand is in registers.
            assert_pipelined(code, 3 if kind == "tf32x3" else 1)


# The exact product


def assert_exact(code: MachineCode, capability: int, once: bool) -> None:
    """One loop multiplies digits on the tensor cores. What it multiplies is loaded and cut in
    registers.

    ``once``: each element is cut by one thread, by three fused products and sums.
    """
    floats, of_int8 = code.options["FLOAT"], r"(IMMA|IGMMA|UTCIMMA)\b.*"
    assert_fits(code, capability, aside=0 if floats else 32)
    assert bool(code.count(of_int8)) != floats, "other digits"
    loop, *of_signs = code.innermost_loops("UTCHMMA" if floats else of_int8)
    assert len(of_signs) <= floats, "more loops multiply"
    assert not count(loop, "(LDL|STL|F2I|I2F|FRND).*"), "spills, conversions"
    assert count(loop, "LDGSTS.*"), "nothing is loaded asynchronously"
    block_m, block_n, block_k = (code.options[f"BLOCK_{axis}"] for axis in "MNK")
    threads = 32 * code.options["num_warps"]
    cut = 3 * (block_m + block_n) * block_k // threads
    found, everywhere = (
        count(some, r"FFMA\b.*") + 2 * count(some, r"FFMA2\b.*")
        for some in (loop, code.instructions)
    )
    assert found == cut or (found > cut and not once), f"an element is cut {found / cut} times"
    # NaN and infinities have a product of their own, of float16.
    assert everywhere - found < block_m * block_n * 16 // threads, "a product of float32"


SQUARE, LONG = (4096, 4096), (ODD, 2**15 + 1)


def check_exact(shape: Any, symmetric: bool, dtype: Any, floats: bool, capability: int) -> None:
    by_rows = shape == SQUARE
    layouts = ["contiguous" if by_rows else "transposed"] * 2
    shapes = [shape] if symmetric else [shape, shape]
    case = cases.exact(
        *shapes, dtypes=[dtype], layouts=layouts, floats=floats, capability=capability
    )
    (code,) = machine_codes_of(case)
    assert_exact(code, capability, once=by_rows and capability >= 90)
    if floats:
        assert code.count("UTCHMMA") >= 10
        return
    if by_rows and capability == 90:
        assert code.count(r"IGMMA\..*") >= 10
    if by_rows and dtype == torch.float32:
        assert code.count(r"STG\.E.*\.128.*") == code.count(r"STG.*"), "a store is not coalesced"
    if dtype == torch.int64:
        assert not code.count("(DMUL|DADD|DFMA|HMMA|HGMMA|UTCHMMA).*"), "T is made of integers"


# The kernels that are bound by memory


def check_vectorised(dtype: torch.dtype, capability: int) -> None:
    """All accesses of the kernels of half sums and mirrors are of 16 bytes."""
    g = meta(4096, 4096, dtype=dtype)
    for launcher in (matmul_t.half_sum, matmul_t.mirror):
        (code,) = machine_codes(partial(launcher, g))
        assert_fits(code, capability)
        loads, stores = (code.count(rf"{name}\.E.*\.128.*") for name in ("LDG", "STG"))
        assert loads == code.count("LDG.*"), "a load is not vectorised"
        assert stores == code.count("STG.*"), "a store is not vectorised"


def sums(dtype: torch.dtype, n: int = 4096) -> list[Any]:
    """Launches that sum gradients over rows and over columns, with a result of g's shape and
    without."""
    x, row, column = (meta(*shape, dtype=dtype) for shape in ((8192, n), (n,), (8192, 1)))
    launches: list[Any] = [partial(sigmoid_backward.sigmoid_backward, x, x, x)]
    for repeated in (row, column):
        for dx in (x, None):
            wide = repeated.expand(x.shape)
            launches.append(partial(maximum.maximum_backward, x, x, wide, dx, repeated))
    return launches


def assert_loads_ahead(code: MachineCode, others: int) -> None:
    """All accesses are of 16 bytes but ``others``, and tiles are loaded while others are summed."""
    for name in ("LDG(STS)?", "STG"):
        single = code.count(rf"{name}\b.*") - code.count(rf"{name}\.E.*\.128.*")
        assert single <= others, f"{name} is not vectorised"
    (loop,) = code.innermost_loops(r"LDGSTS\b.*")
    assert count(loop, r"LDGSTS\b.*") == 2, "a loop loads two arrays"
    assert not count(loop, r"LDG\b.*")
    assert code.count(r"LDGSTS\b.*") == 2 * 4, "three tiles are loaded before the loop"


def check_vectorised_sums(dtype: torch.dtype, capability: int) -> None:
    for launch in sums(dtype):
        code, *adding = machine_codes(launch)
        for one in (code, *adding):
            assert_fits(one, capability)
        # A program has few sums. A column is loaded by single elements.
        assert_loads_ahead(code, 2)


def check_maximum(strides: tuple[int, ...], dtype: torch.dtype, capability: int) -> None:
    """With b of other ``strides``; or flat, of an odd number: whatever has a mask cannot be
    vectorised."""
    if flat := not strides:
        a = b = meta(2**24 + 1, dtype=dtype)
    else:
        a = meta(*(64, 64, 16384)[-len(strides) :], dtype=dtype)
        b = meta(64, 16384, dtype=dtype).as_strided(a.shape, strides)
    launches: list[Any] = [(maximum.maximum, (a, b, a), 1)]
    if dtype.is_floating_point:
        gradients = (a, a[:1].expand_as(a)) if flat else (a,)
        launches += [(maximum.maximum_backward, (g, a, b, a, a), 2) for g in gradients]
    for launcher, operands, results in launches:
        (code,) = machine_codes(partial(launcher, *operands))
        assert_fits(code, capability)
        loads, stores = (code.count(rf"{name}\.E.*\.128.*") for name in ("LDG", "STG"))
        rows = code.options.get("BLOCK_ROWS", 1)
        block = rows * code.options["BLOCK" if flat else "BLOCK_COLS"]
        accesses = block * dtype.itemsize // 16 // 128  # of each of 128 threads
        assert stores == results * accesses
        if flat:
            assert loads == (results + (operands[0].stride(0) > 0)) * accesses
            continue
        assert code.count("STG.*") == stores
        assert rows > 1 or dtype.itemsize <= results
        # Of a row of b one access serves all rows; of a column at most one is needed for each.
        of_b = {(0, 1): 1, (1, 0): rows}.get(strides, accesses)
        assert code.count("LDG.*") <= results * accesses + of_b
        assert loads >= results * accesses + (of_b if strides != (1, 0) else 0)


def check_muon(dtype: torch.dtype, capability: int) -> None:
    """Accesses are of 16 bytes where a thread has as many, and nothing is rounded otherwise than by
    PyTorch's functions."""
    x, out = meta(1024, 4096, dtype=dtype), meta(1024, 4096, dtype=torch.bfloat16)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    norm, lr = meta(dtype=wide), meta(dtype=torch.float32)
    words = [1, 2, 3, 4]

    def launch(wrap: Tracer) -> None:
        muon._prepare_normalize(x, norm, out).run(wrap, (x, norm, out), words[:2])
        for rate in (None, lr):
            muon._prepare_update(x, out, rate).run(wrap, (x, out, rate), words)

    compiled = compile_launches(launch)
    assert len(compiled) == 3
    for number, code in enumerate(map(MachineCode, compiled)):
        assert_fits(code, capability)
        of_x = dtype.itemsize // 2  # accesses of a thread, which has 8 elements
        loads, stores = (code.count(rf"{name}\.E.*\.128.*") for name in ("LDG", "STG"))
        assert loads == of_x + (number > 0)  # of the result in bfloat16
        assert stores == (of_x if number else 1)
        assert code.count("STG.*") == stores
        ptx = compiled[number].kernel.asm["ptx"]
        divided = re.findall(r"\bdiv\.\w+\.f\d+", ptx)
        assert set(divided) == ({f"div.rn.f{wide.itemsize * 8}"} if number == 0 else set())
        # sm_80 subtracts numbers of bfloat16 by fma, with a factor of -1.
        fused = re.search(r"\bfma\.rn\.f\d+", ptx)
        assert number == 0 or not fused, "a product is not rounded"


# All kernels, and the checks that must fail


def rows(
    check: Any,
    *choices: Any,
    at: Any = (90, 80, 100),
    slow: bool = False,
    marks: Any = (),
    spills: bool = True,
) -> Iterator[Any]:
    """A check for all combinations and capabilities; unless ``slow``, the first one is not slow on
    sm_90. ``spills``: whether earlier compilers spill more outside sm_90."""
    for number, args in enumerate(product(*choices)):
        for capability in at:
            own = [pytest.mark.slow] if slow or number or capability != 90 else []
            own += [newest] if spills and capability != 90 else []
            name = "-".join(
                str(getattr(one, "__name__", one)) for one in (check, *args, capability)
            )
            yield pytest.param(partial(check, *args), capability, marks=[*own, *marks], id=name)


F32, F64, I64 = torch.float32, torch.float64, torch.int64
OF_MAXIMUM = (torch.bfloat16, torch.bool, F32)
TABLE = [
    *rows(check_default_tiles, ["symmetric_matmul"], ["bfloat16"], [4096, ODD, 2048, 512]),
    *rows(
        check_default_tiles,
        ["symmetric_matmul"],
        ["float32", "tf32", "float64"],
        [4096],
        slow=True,
    ),
    *rows(check_default_tiles, ["linear_sigmoid"], ["bfloat16"], [ODD]),
    *rows(check_default_tiles, ["linear_sigmoid"], ["float32"], [4096], slow=True),
    # float16 has bfloat16's tiles
    *rows(check_tiles_of_most_registers, PRODUCTS, ["bfloat16"], slow=True),
    *rows(
        check_tiles_of_most_registers,
        PRODUCTS,
        ["tf32", "tf32x3", "float32", "float64"],
        at=[90],
        slow=True,
    ),
    *rows(check_exact, [SQUARE], [True], [F32], [False], at=[90], marks=[not_3_8]),
    *rows(check_exact, [LONG], [True], [F32], [False], marks=[not_3_8]),
    *rows(check_exact, [SQUARE], [False], [F32], [False], slow=True, marks=[newest]),
    *rows(check_exact, [SQUARE], [False], [I64], [False], at=[90], slow=True, marks=[not_3_8]),
    *rows(check_exact, [SQUARE], [True], [F32], [True], at=[103, 100]),
    *rows(check_exact, [SQUARE], [False], [I64], [True], at=[103, 100]),
    *rows(check_exact, [LONG], [False], [F32], [True], at=[103, 100]),
    *rows(check_vectorised, [torch.bfloat16, F64], slow=True),
    *rows(check_vectorised_sums, [torch.bfloat16, F64], slow=True),
    *rows(check_muon, [torch.bfloat16, F32, F64], at=[90]),
    *rows(check_muon, [torch.bfloat16, F32, F64], at=[80, 100], slow=True, spills=False),
    # Flat; a row, a column, and a row for each of a batch
    *rows(check_maximum, [(), (0, 1), (1, 0), (16384, 0, 1)], OF_MAXIMUM),
]


@pytest.mark.parametrize("check, capability", TABLE)
def test_machine_code(check, capability):
    with target(capability):
        check(capability)


def test_check_rejects_one_stage():
    tiles = Tiles(32, 32, 32, 4, 1)
    with target(90):
        (code,) = matrix_kernel("symmetric_matmul", "bfloat16", (4096, 4096, 4096), tiles)
    with pytest.raises(AssertionError, match="loads nothing asynchronously"):
        assert_pipelined(code)


@pytest.mark.slow
@pytest.mark.parametrize(
    "tiles, message",
    [(Tiles(128, 128, 32, 8, 3), "spill"), (Tiles(64, 64, 32, 4, 1), "asynchronously")],
)
def test_check_rejects_other_tiles_of_the_exact_product(tiles, message):
    with target(90):
        (code,) = machine_codes_of(cases.exact(SQUARE, SQUARE, tiles=tiles))
    with pytest.raises(AssertionError, match=message):
        assert_exact(code, 90, once=True)


@pytest.mark.slow
def test_check_rejects_sums_of_unaligned_rows():
    with target(90):
        code, *_ = machine_codes(sums(F32, 4095)[0])
    with pytest.raises(AssertionError, match="not vectorised"):
        assert_loads_ahead(code, 2)
