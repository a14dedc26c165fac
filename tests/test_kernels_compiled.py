# SPDX-License-Identifier: MIT
"""The machine code of the kernels, compiled for GPUs that are not there.

A stand-in for the driver names an architecture, so that the launchers themselves choose the configuration
and Triton specialises it as in a launch; the tensors are on the meta device.
"""

import re
from collections.abc import Iterable, Iterator
from functools import partial
from unittest.mock import patch

import pytest
import torch
import triton
from machine_code import MachineCode, machine_codes
from torch import Tensor

from benchmarks.driver import target
from torchpar.kernels import exact_matmul, matmul_t, maximum, sigmoid_backward
from torchpar.kernels import linear_sigmoid as linear
from torchpar.kernels.tiles import KINDS, Tiles, configurations

TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
# Bytes of shared memory of a block, by NVIDIA's documents
LIMITS = {80: 166912, 90: 232448, 100: 232448, 103: 232448}
ODD = 509  # no stride is divisible by 16

slow = pytest.mark.slow
newest = pytest.mark.skipif(TRITON < (3, 9), reason="earlier compilers spill more on these GPUs")
OTHERS = [pytest.param(other, marks=(slow, newest)) for other in (80, 100)]


@pytest.fixture(params=[90, *OTHERS], ids="sm_{}".format)
def capability(request) -> Iterator[int]:
    with target(request.param):
        yield request.param


@pytest.fixture
def compiled(capability, tmp_path):
    """``compiled(launcher, *args)``: the machine code of the kernel that the launcher launches."""

    def run(launcher, *args) -> MachineCode:
        (code,) = machine_codes(partial(launcher, *args), tmp_path)
        return code

    return run


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def assert_fits(code: MachineCode, capability: int, aside: int = 0) -> None:
    """ptxas may put ``aside`` bytes away to have another program in a multiprocessor."""
    assert code.resources["STACK"] <= aside, f"registers spill: {code.resources}"
    assert code.resources["LOCAL"] == 0
    assert code.shared_memory <= LIMITS[capability]
    assert code.tensor_memory <= 512


# The matrix kernels


def symmetric_product(dtype, precision, sizes, tiles, wrap) -> None:
    x = meta(*sizes[1:], dtype=dtype)
    matmul_t.symmetric_product(x, x, precision, wrap, tiles=tiles)


def with_a_matrix_to_add(dtype, precision, sizes, tiles, wrap) -> None:
    """``a @ b.mT / 3 + c``."""
    m, n, k = sizes
    a, b, c = (meta(*shape, dtype=dtype) for shape in ((m, k), (n, k), (m, n)))
    matmul_t.symmetric_product(a, b, precision, wrap, c, 1 / 3, 1.0, tiles=tiles)


def linear_sigmoid(dtype, precision, sizes, tiles, wrap) -> None:
    m, n, k = sizes
    x, weight, bias = (meta(*shape, dtype=dtype) for shape in ((m, k), (n, k), (n,)))
    linear.linear_sigmoid(x, weight, bias, precision, wrap, tiles=tiles)


def assert_pipelined(code: MachineCode) -> None:
    """In each loop over k, tiles are loaded while others are multiplied."""
    load = r"(LDGSTS|UTMALDG)\b.*"
    loops = code.innermost_loops(r"\w*MMA\b.*") or code.innermost_loops(r"[FD]FMA2?\b.*")
    loads = [sum(bool(re.fullmatch(load, one.opcode)) for one in loop) for loop in loops]
    assert loops, "no loop multiplies"
    assert all(loads), "a loop loads nothing asynchronously"
    assert code.count(load) > sum(loads), "nothing is loaded before the loop"
    for loop in loops:
        waits = [one for one in loop if one.opcode == "WARPGROUP.DEPBAR.LE" and one.operands == "gsb0, 0x0"]
        assert len(waits) <= 1, f"wgmmas are serialised: {len(waits)} waits for all of them"


def sums_of_a_thread(tiles: Tiles) -> tuple[float, int]:
    """Their number, and that of the operands' elements that a block holds meanwhile."""
    loaded = (tiles.block_m + tiles.block_n) * tiles.block_k * tiles.num_stages
    return tiles.block_m * tiles.block_n / tiles.num_warps, loaded


def tensor_core(capability: int, kind: str) -> str:
    """The instruction that multiplies on the tensor cores, as a pattern."""
    if kind == "float64":
        return r"DMMA\..*"
    if capability == 100:
        return "UTCHMMA"
    mnemonic = "HGMMA" if capability == 90 else "HMMA"
    return mnemonic + {"bfloat16": r"\.\w+\.F32\.BF16", "tf32": r"\.\w+\.F32\.TF32"}[kind]


@pytest.mark.parametrize(
    "launcher, kind, n",
    [
        (symmetric_product, "bfloat16", 4096),
        *(pytest.param(symmetric_product, "bfloat16", n, marks=slow) for n in (ODD, 2048, 512)),
        pytest.param(symmetric_product, "tf32", 4096, marks=slow),
        (symmetric_product, "float32", 4096),
        pytest.param(symmetric_product, "float64", 4096, marks=slow),
        (linear_sigmoid, "bfloat16", ODD),
        pytest.param(linear_sigmoid, "float32", 4096, marks=slow),
    ],
)
def test_default_tiles(compiled, capability, launcher, kind, n):
    code = compiled(launcher, *KINDS[kind][:2], (n, n, n), None)
    assert_fits(code, capability)
    if kind == "float32":
        assert not code.count(r"\w*MMA\b.*"), "a tensor core rounds its float32 operands to fewer bits"
    else:
        assert code.count(tensor_core(capability, kind))
    if n != ODD:
        assert_pipelined(code)
        # A mask that varied along a row would split the stores into single elements.
        assert code.count(r"STG\.E.*\.128.*|UTMASTG.*")


@slow
@pytest.mark.parametrize("launcher", [symmetric_product, linear_sigmoid])
@pytest.mark.parametrize(
    "kind, capability",
    [
        *((kind, 90) for kind in KINDS if kind != "float16"),  # it has bfloat16's tiles
        *(pytest.param("bfloat16", other, marks=newest) for other in (80, 100)),
    ],
    indirect=["capability"],
)
def test_tiles_of_the_most_registers_fit_and_are_pipelined(capability, tmp_path, launcher, kind):
    """Of each variant those in which a thread holds most sums, for these spill first."""
    dtype, precision = KINDS[kind][:2]
    launches = [(launcher, (ODD, ODD, ODD), KINDS[kind].unaligned)]
    most: dict[str, Tiles] = {}
    for tiles in configurations(launcher.__name__, dtype, precision, capability):
        most[tiles.variant] = max(tiles, most.get(tiles.variant, tiles), key=sums_of_a_thread)
    for tiles in most.values():
        launches.append((launcher, (4096, 4096, 4096), tiles))
        if launcher is symmetric_product and tiles.variant != "pointers":
            launches.append((with_a_matrix_to_add, (4096, 4096, 1024), tiles))
        elif tiles.variant == "split_k":
            launches.append((launcher, (64, 1024, 8192), tiles))
        elif launcher is linear_sigmoid and tiles.block_m * tiles.block_n <= 64 * 128:
            launches.append((launcher, (512, 1001, 4096), tiles))
    for launch, sizes, tiles in launches:
        code, *_ = machine_codes(partial(launch, dtype, precision, sizes, tiles), tmp_path)
        try:
            assert_fits(code, capability)
            if sizes != (ODD, ODD, ODD):
                assert_pipelined(code)
        except AssertionError as error:
            raise AssertionError(f"{tiles}, {sizes}: {error}") from error


@pytest.mark.parametrize("capability", [90], indirect=True)
def test_check_rejects_one_stage(compiled, capability):
    sizes = (4096, 4096, 4096)
    code = compiled(symmetric_product, torch.bfloat16, "ieee", sizes, Tiles(64, 64, 64, 4, 1))
    with pytest.raises(AssertionError, match="loads nothing asynchronously"):
        assert_pipelined(code)


# The exact product


def exact_product(sizes, transposed, symmetric, dtype, wrap) -> None:
    m, n, k = sizes
    shapes = [(k, rows) if transposed else (rows, k) for rows in (m, n)]
    a, b = (meta(*shape, dtype=torch.float32) for shape in shapes)
    a, b = (a.mT, b.mT) if transposed else (a, b)
    e, f = (meta(rows, dtype=torch.int32) for rows in (m, n))
    if symmetric:
        b, f = a, e
    exact_matmul.exact_product(a, b, e, f, wrap, out=meta(m, n, dtype=dtype))


def products_of_float32(opcodes: Iterable[str]) -> int:
    return sum({"FFMA": 1, "FFMA2": 2}.get(opcode.split(".")[0], 0) for opcode in opcodes)


def assert_exact(code: MachineCode, capability: int, once: bool) -> None:
    """One loop multiplies digits on the tensor cores. What it multiplies is loaded and cut in registers.

    ``once``: each element is cut by one thread, by three fused products and sums.
    """
    floats, of_int8 = code.options["FLOAT"], r"(IMMA|IGMMA|UTCIMMA)\b.*"
    assert_fits(code, capability, aside=0 if floats else 32)
    assert bool(code.count(of_int8)) != floats, "other digits"
    loop, *of_signs = code.innermost_loops("UTCHMMA" if floats else of_int8)
    assert len(of_signs) <= floats, "more loops multiply"
    opcodes = [one.opcode for one in loop]
    assert not [opcode for opcode in opcodes if re.match("LDL|STL|F2I|I2F|FRND", opcode)], (
        "spills, conversions"
    )
    assert any(opcode.startswith("LDGSTS") for opcode in opcodes), "nothing is loaded asynchronously"
    block_m, block_n, block_k = (code.options[f"BLOCK_{axis}"] for axis in "MNK")
    threads = 32 * code.options["num_warps"]
    cut = 3 * (block_m + block_n) * block_k // threads
    found = products_of_float32(opcodes)
    assert found == cut or (found > cut and not once), f"an element is cut {found / cut} times"
    # NaN and infinities have a product of their own, of float16.
    others = products_of_float32(code.opcodes.elements()) - found
    assert others < block_m * block_n * 16 // threads, "a product of float32"


SQUARE, LONG = (4096, 4096, 4096), (ODD, ODD, 2**15 + 1)


@pytest.mark.skipif(TRITON == (3, 8), reason="Triton 3.8 spills, and keeps the digits of A twice")
@pytest.mark.parametrize(
    "sizes, transposed, symmetric, dtype, capability",
    [
        (SQUARE, False, True, torch.float32, 90),
        (LONG, True, True, torch.float32, 90),
        pytest.param(SQUARE, False, False, torch.int64, 90, marks=slow),
        *(
            pytest.param(*case, torch.float32, other, marks=(slow, newest))
            for case in ((SQUARE, False, False), (LONG, True, True))
            for other in (80, 90, 100)
        ),
    ],
    indirect=["capability"],
)
def test_exact_product(compiled, capability, sizes, transposed, symmetric, dtype):
    code = compiled(exact_product, sizes, transposed, symmetric, dtype)
    by_rows = sizes == SQUARE and not transposed
    assert_exact(code, capability, once=capability >= 90 and by_rows)
    if by_rows and capability == 90:
        assert code.count(r"IGMMA\..*") >= 10
    if by_rows and dtype == torch.float32:
        assert code.count(r"STG\.E.*\.128.*") == code.count(r"STG.*"), "a store is not coalesced"
    if dtype == torch.int64:
        assert not code.count("(DMUL|DADD|DFMA|HMMA|HGMMA|UTCHMMA).*"), "T is made of integers"


@newest
@slow
@pytest.mark.parametrize("capability", [103, 100], indirect=True)
@pytest.mark.parametrize(
    "sizes, transposed, symmetric, dtype",
    [
        (SQUARE, False, True, torch.float32),
        pytest.param(SQUARE, False, False, torch.int64, marks=slow),
        pytest.param(LONG, True, False, torch.float32, marks=slow),
    ],
)
def test_exact_product_of_float_digits(
    compiled, capability, monkeypatch, sizes, transposed, symmetric, dtype
):
    if capability == 100:
        monkeypatch.setattr(exact_matmul, "SLOW_INT8", 100)
    code = compiled(exact_product, sizes, transposed, symmetric, dtype)
    assert_exact(code, capability, once=sizes == SQUARE)
    assert code.count("UTCHMMA") >= 10


@slow
@pytest.mark.parametrize("capability", [90], indirect=True)
def test_check_rejects_other_tiles_of_the_exact_product(compiled, capability):
    for tiles, message in ((Tiles(128, 128, 32, 8, 3), "spill"), (Tiles(64, 64, 32, 4, 1), "asynchronously")):
        with patch.object(exact_matmul, "_tiles", return_value=tiles):
            code = compiled(exact_product, SQUARE, False, False, torch.float32)
        with pytest.raises(AssertionError, match=message):
            assert_exact(code, capability, once=True)


# The kernels that are bound by memory


@slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_symmetric_sums_and_sigmoid_backward(compiled, capability, dtype):
    g = meta(4096, 4096, dtype=dtype)
    for launcher, *args in (
        (matmul_t.half_sum, g),
        (matmul_t.mirror, g),
        (sigmoid_backward.sigmoid_backward, g, g, g),
    ):
        code = compiled(launcher, *args)
        assert_fits(code, capability)
        loads, stores = (code.count(rf"{name}\.E.*\.128.*") for name in ("LDG", "STG"))
        assert loads == code.count("LDG.*"), "a load is not vectorised"
        # The sums over rows are few.
        assert stores >= code.count("STG.*") - (len(args) == 3), "a store is not vectorised"


MAXIMUM_DTYPES = [torch.bfloat16, *(pytest.param(t, marks=slow) for t in (torch.bool, torch.float32))]


@pytest.mark.parametrize("dtype", MAXIMUM_DTYPES, ids=str)
def test_flat_maximum_moves_16_bytes_at_once(compiled, capability, dtype):
    """Of an odd number of elements: whatever has a mask cannot be vectorised."""
    a = meta(2**24 + 1, dtype=dtype)
    launches = [(maximum.maximum, (a, a, a), 2, 1)]
    if dtype.is_floating_point:
        backward = maximum.maximum_backward
        launches += [(backward, (a, a, a, a, a), 3, 2), (backward, (a[:1].expand_as(a), a, a, a, a), 2, 2)]
    for launcher, operands, loads, stores in launches:
        code = compiled(launcher, *operands)
        assert_fits(code, capability)
        accesses = code.options["BLOCK"] * dtype.itemsize // 16 // 128  # of each of 128 threads
        assert code.count(r"LDG\.E.*\.128.*") == loads * accesses
        assert code.count(r"STG\.E.*\.128.*") == stores * accesses


@pytest.mark.parametrize(
    "strides",
    [
        pytest.param((0, 1), id="a row"),
        pytest.param((1, 0), id="a column", marks=slow),
        pytest.param((16384, 0, 1), id="a row for each of a batch", marks=slow),
    ],
)
@pytest.mark.parametrize("dtype", MAXIMUM_DTYPES, ids=str)
def test_broadcast_maximum_moves_16_bytes_at_once(compiled, capability, dtype, strides):
    a = meta(*(64, 64, 16384)[-len(strides) :], dtype=dtype)
    b = meta(64, 16384, dtype=dtype).as_strided(a.shape, strides)
    launches = [(maximum.maximum, (a, b, a), 1)]
    if dtype.is_floating_point:
        launches.append((maximum.maximum_backward, (a, a, b, a, a), 2))
    for launcher, operands, results in launches:
        code = compiled(launcher, *operands)
        assert_fits(code, capability)
        rows = code.options["BLOCK_ROWS"]
        accesses = rows * code.options["BLOCK_COLS"] * dtype.itemsize // 16 // 128  # of each of 128 threads
        assert rows > 1 or dtype.itemsize <= results
        assert code.count(r"STG.*") == code.count(r"STG\.E.*\.128.*") == results * accesses
        # Of a row of b one access serves all rows; of a column at most one is needed for each.
        of_b = {(0, 1): 1, (1, 0): rows}.get(strides, accesses)
        assert code.count(r"LDG.*") <= results * accesses + of_b
        assert code.count(r"LDG\.E.*\.128.*") >= results * accesses + (of_b if strides != (1, 0) else 0)
