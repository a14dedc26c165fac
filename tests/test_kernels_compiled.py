# SPDX-License-Identifier: MIT
"""The machine code of the kernels, compiled for GPUs that are not there.

A stand-in for the driver names an architecture, so that the launchers themselves choose the configuration
and Triton specialises it as in a launch; the tensors are on the meta device.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from unittest.mock import patch

import machine_code
import pytest
import torch
import triton
import triton.language as tl
from machine_code import MachineCode, machine_codes
from torch import Tensor

from benchmarks.autotune import Driver, target
from torchpar.kernels import candidates, tuning
from torchpar.kernels import exact_matmul as exact_kernels
from torchpar.kernels import linear_sigmoid as linear_sigmoid_kernels
from torchpar.kernels import matmul_t as matmul_t_kernels
from torchpar.kernels import maximum as maximum_kernels
from torchpar.kernels import sigmoid_backward as sigmoid_backward_kernels
from torchpar.kernels.candidates import Tiles

TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
LIMITS = {80: 166912, 90: 232448, 100: 232448}  # bytes of shared memory of a block, by NVIDIA's documents
ops = torch.ops.torchpar


slow = pytest.mark.slow


@pytest.fixture(params=[90, *(pytest.param(other, marks=slow) for other in (80, 100))], ids="sm_{}".format)
def capability(request) -> Iterator[int]:
    with target(request.param):
        yield request.param


@pytest.fixture(scope="module")
def codes() -> dict:
    """Machine code that tests share, by capability, launcher and arguments."""
    return {}


@pytest.fixture
def compiled(capability, codes, tmp_path):
    """``compiled(launcher, *args)``: the machine code of the kernel that the launcher launches."""

    def run(launcher, *args) -> MachineCode:
        if launcher not in (symmetric_product, linear_sigmoid):
            (code,) = machine_codes(partial(launcher, *args), tmp_path)
            return code
        key = (capability, launcher, *args)
        if key not in codes:
            (codes[key],) = machine_codes(partial(launcher, *args), tmp_path)
            assert codes[key].opcodes  # read while the file is there
        return codes[key]

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


def symmetric_product(dtype, precision, n, tiles, wrap) -> None:
    x = meta(n, n, dtype=dtype)
    matmul_t_kernels.symmetric_product(x, x, precision, wrap, tiles=tiles)


def linear_sigmoid(dtype, precision, n, tiles, wrap) -> None:
    x, bias = meta(n, n, dtype=dtype), meta(n, dtype=dtype)
    linear_sigmoid_kernels.linear_sigmoid(x, x, bias, precision, wrap, tiles=tiles)


def linear_sigmoid_of(dtype, precision, shape, tiles, wrap) -> None:
    m, n, k = shape
    x, weight, bias = (meta(*sizes, dtype=dtype) for sizes in ((m, k), (n, k), (n,)))
    linear_sigmoid_kernels.linear_sigmoid(x, weight, bias, precision, wrap, tiles=tiles)


matrix_launchers = pytest.mark.parametrize(
    "launcher", [symmetric_product, linear_sigmoid], ids=lambda f: f.__name__
)
ODD = 509  # no stride is divisible by 16


def assert_pipelined(code: MachineCode, specialized: bool) -> None:
    """In each loop over k, tiles are loaded while others are multiplied. Specialized warps have two loops."""
    load = r"(LDGSTS|UTMALDG)\b.*"
    loops = code.innermost_loops(r"\w*MMA\b.*") or code.innermost_loops(r"[FD]FMA2?\b.*")
    loading = code.innermost_loops(load) if specialized else loops
    loads = [sum(bool(re.fullmatch(load, one.opcode)) for one in loop) for loop in loading]
    assert loops, "no loop multiplies"
    assert loads, "no loop loads"
    assert all(loads), "a loop loads nothing asynchronously"
    assert specialized or code.count(load) > sum(loads), "nothing is loaded before the loop"
    for loop in loops:
        waits = [one for one in loop if one.opcode == "WARPGROUP.DEPBAR.LE" and one.operands == "gsb0, 0x0"]
        assert len(waits) <= 1, f"wgmmas are serialised: {len(waits)} waits for all of them"


KINDS = [(kind, 90) for kind in candidates.KINDS if kind != "float16"]  # which is as bfloat16
OTHERS = [pytest.param("bfloat16", other, marks=slow) for other in (80, 100)]


@matrix_launchers
@pytest.mark.parametrize("kind, capability", KINDS + OTHERS, indirect=["capability"])
def test_all_tiles_fit_and_are_pipelined(compiled, capability, launcher, kind):
    dtype, precision, _, unaligned, _ = candidates.KINDS[kind]
    found = candidates.configurations(launcher.__name__, dtype, precision, capability)
    for n, tiles in [(ODD, unaligned), *((4096, tiles) for tiles in found)]:
        code = compiled(launcher, dtype, precision, n, tiles)
        try:
            assert_fits(code, capability)
            if n != ODD:
                assert_pipelined(code, tiles.variant == "specialized")
        except AssertionError as error:
            raise AssertionError(f"{tiles}, n = {n}: {error}") from error


@pytest.mark.parametrize("n", [4096, ODD])
def test_a_product_added_to_float32_fits(compiled, capability, n):
    def launch(wrap) -> None:
        x, h = meta(n, n, dtype=torch.bfloat16), meta(n, n, dtype=torch.float32)
        matmul_t_kernels.symmetric_product(x, x, "ieee", wrap, h, 0.5, 0.9, out=h, tma=False)

    code = compiled(launch)
    assert_fits(code, capability)
    if n != ODD:
        assert_pipelined(code, specialized=False)
        assert code.count(r"STG\.E.*\.128.*") > 0


@pytest.mark.parametrize("kind, capability", KINDS[:2] + OTHERS, indirect=["capability"])
def test_tiles_of_odd_results_and_of_split_k_fit(capability, kind, tmp_path):
    dtype, precision, *_ = candidates.KINDS[kind]
    for tiles in candidates.configurations("linear_sigmoid", dtype, precision, capability):
        split = tiles.variant == "split_k"
        if not (split or tuning.can_store(tiles, aligned=False)):
            continue
        shape = (64, 1024, 8192) if split else (512, 1001, 4096)
        code, *sums = machine_codes(partial(linear_sigmoid_of, dtype, precision, shape, tiles), tmp_path)
        try:
            assert len(sums) == split
            assert_fits(code, capability)
            assert_pipelined(code, specialized=False)
            for one in sums:
                assert_fits(one, capability)
                assert one.count(r"LDG\.E.*\.128.*") >= one.options["SPLIT_K"], "the parts take more loads"
        except AssertionError as error:
            raise AssertionError(f"{tiles}, {shape}: {error}") from error


@triton.jit
def serialised_kernel(x_ptr, out_ptr, k, BLOCK: tl.constexpr):
    """Two products in each step, each of which is needed at once."""
    i = tl.arange(0, BLOCK)
    x_tile = x_ptr + (i[:, None] * k + i[None, :])
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for _ in range(0, k, BLOCK):
        x = tl.load(x_tile)
        acc = tl.maximum(tl.dot(x, x.T, acc), 0.0)
        acc = tl.maximum(tl.dot(x.T, x, acc), 0.0)
        x_tile += BLOCK
    tl.store(out_ptr + (i[:, None] * BLOCK + i[None, :]), acc)


@pytest.mark.parametrize("capability", [90], indirect=True)
@pytest.mark.parametrize("num_stages, message", [(3, "2 waits for all"), (1, "nothing asynchronously")])
def test_check_rejects_what_is_not_pipelined(compiled, capability, num_stages, message):
    def launch(wrap) -> None:
        x = meta(64, 4096, dtype=torch.bfloat16)
        wrap(serialised_kernel)[(1,)](x, meta(64, 64, dtype=torch.float32), 4096, 64, num_stages=num_stages)

    with pytest.raises(AssertionError, match=message):
        assert_pipelined(compiled(launch), specialized=False)


def test_innermost_loops():
    text = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/               @P0 BRA `(.L_x_3) ;
.L_x_1:
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
        /*0030*/                   BRA.U !UP0, `(.L_x_1) ;
        /*0040*/                   STG.E.128 desc[UR6][R2.64], R24 ;
        /*0050*/              @!P1 BRA `(.L_x_0) ;
        /*0060*/                   EXIT ;
.L_x_3:
        /*0070*/                   NANOSLEEP 0x64 ;
        /*0080*/                   BRA `(.L_x_1) ;
.L_x_4:
        /*0090*/                   BRA `(.L_x_4);
"""
    instructions = machine_code.read(text)

    def loops(opcode: str) -> list[list[str]]:
        return [
            [one.opcode.split(".")[0] for one in loop]
            for loop in machine_code.innermost_loops(instructions, opcode)
        ]

    outer = ["BRA", "HGMMA", "BRA", "STG", "BRA", "NANOSLEEP", "BRA"]
    assert loops("HGMMA.*") == [["HGMMA", "BRA"]]
    assert loops("STG.*") == loops("NANOSLEEP") == [outer]
    assert loops("MOV") == loops("EXIT") == []


def tensor_core(capability: int, dtype: torch.dtype) -> str:
    """The instruction that multiplies on the tensor cores, as a pattern."""
    if dtype == torch.float64:
        return r"DMMA\..*"
    if capability == 100:
        return "UTCHMMA"
    mnemonic = {80: "HMMA", 90: "HGMMA"}[capability]
    suffix = {torch.bfloat16: r"\.BF16", torch.float16: "", torch.float32: r"\.TF32"}[dtype]
    return rf"{mnemonic}\.\w+\.F32{suffix}"


@matrix_launchers
@pytest.mark.parametrize(
    "dtype, precision, n",
    [
        *((torch.bfloat16, "ieee", n) for n in (4096, ODD)),
        (torch.float16, "ieee", 4096),
        (torch.float32, "tf32", 4096),
        (torch.float64, "ieee", 4096),
    ],
)
def test_matrix_kernel_uses_tensor_cores(compiled, capability, launcher, dtype, precision, n):
    code = compiled(launcher, dtype, precision, n, None)
    if dtype == torch.float64 and capability == 100 and TRITON < (3, 8):
        # Before Triton 3.8, float64 does not use the tensor cores of this architecture.
        assert code.count("DFMA")
    else:
        assert code.count(tensor_core(capability, dtype))
    if n == 4096:  # a mask that varied along a row would split the stores into single elements
        assert code.count(r"STG\.E.*\.128.*|UTMASTG.*")


@matrix_launchers
def test_matrix_kernel_of_ieee_float32_does_not(compiled, launcher):
    code = compiled(launcher, torch.float32, "ieee", 4096, None)
    assert not code.count(r"\w*MMA\b.*"), "a tensor core rounds its float32 operands to fewer bits"
    block_m, block_n = (code.options.get(name, code.options.get("BLOCK")) for name in ("BLOCK_M", "BLOCK_N"))
    # Of one thread in one step along k; FFMA2 makes two.
    products = block_m * block_n * code.options["BLOCK_K"] // (32 * code.options["num_warps"])
    assert code.count(r"FFMA\b.*") + 2 * code.count(r"FFMA2\b.*") >= products


@pytest.mark.parametrize("capability", [90], indirect=True)
def test_check_rejects_a_spill(compiled, capability):
    code = compiled(symmetric_product, torch.bfloat16, "ieee", 4096, Tiles(256, 256, 64, 8, 3))
    with pytest.raises(AssertionError, match="spill"):
        assert_fits(code, capability)


@pytest.mark.parametrize("capability", [80, 90], indirect=True)
def test_check_tells_instructions_apart(compiled, capability):
    code = compiled(linear_sigmoid, torch.float16, "ieee", 4096, None)
    for other in (torch.bfloat16, torch.float32, torch.float64):
        assert not code.count(tensor_core(capability, other))


# Which way the symmetric product's tiles go

LOW_PRECISION = pytest.mark.parametrize(
    "dtype, precision", [(torch.bfloat16, "ieee"), (torch.float32, "tf32")], ids=str
)


with_tma = pytest.mark.parametrize("capability", [90, pytest.param(100, marks=slow)], indirect=True)


def by_tma(code: MachineCode) -> bool:
    """Whether all tiles go by TMA; if not, none may."""
    loads, stores = code.count(r"UTMALDG\..*"), code.count(r"UTMASTG\..*")
    assert bool(loads) == bool(stores)
    return bool(loads)


def two_operands(dtype, precision, shape, transposed, tiles, wrap) -> None:
    """``a @ b.mT / 3 + c``, a, b and c each as it is or transposed."""
    n, k = shape
    sides = {"a": (n, k), "b": (n, k), "c": (n, n)}
    a, b, c = (
        meta(*shape[::-1], dtype=dtype).mT if name in transposed else meta(*shape, dtype=dtype)
        for name, shape in sides.items()
    )
    matmul_t_kernels.symmetric_product(a, b, precision, wrap, c, 1 / 3, 1.0, tiles=tiles)


@LOW_PRECISION
@pytest.mark.parametrize("transposed", ["", "ab", "bc"])
def test_large_tiles_go_by_tma_where_there_is_one(compiled, capability, dtype, precision, transposed):
    code = compiled(two_operands, dtype, precision, (4096, 1024), transposed, None)
    assert by_tma(code) == (capability >= 90)
    assert code.count(tensor_core(capability, dtype))
    assert code.shared_memory <= LIMITS[capability]
    if capability >= 90:
        assert_fits(code, capability)
        assert code.count(r"UTMASTG\..*") % 2 == 0, "a tile and its mirror"
        assert not code.count(r"(STG|LDGSTS).*"), "something went past the TMA"
    elif "c" not in transposed:
        assert_fits(code, capability)
        assert code.count(r"STG\.E.*\.128.*") == code.count(r"STG.*"), "a store is not coalesced"


@with_tma
@LOW_PRECISION
def test_all_tiles_by_tma_fit_with_a_matrix_to_add(compiled, capability, dtype, precision):
    for tiles in candidates.configurations("symmetric_product", dtype, precision, capability):
        if tiles.variant != "pointers":
            code = compiled(two_operands, dtype, precision, (4096, 1024), "", tiles)
            assert_fits(code, capability)
            assert_pipelined(code, tiles.variant == "specialized")


@pytest.mark.parametrize("capability", [90], indirect=True)
@pytest.mark.parametrize(
    "m, n, loads, stores",
    [(8192, 4096, True, True), (8192, 1001, True, False), (64, 1024, False, False), (1, 12288, False, False)],
)
def test_linear_sigmoid_goes_by_tma(compiled, capability, m, n, loads, stores):
    """Unless it is small, whatever the columns of its result; and is stored so if its rows allow."""
    code = compiled(linear_sigmoid_of, torch.bfloat16, "ieee", (m, n, 784), None)
    assert_fits(code, capability)
    assert bool(code.count(r"UTMALDG\..*")) == loads
    assert bool(code.count(r"UTMASTG\..*")) == stores
    resident = candidates.resident_programs(Tiles(1, 1, 1, code.options["num_warps"], 1, "tma"))
    assert not loads or code.grid == (132 * resident, 1, 1)


@with_tma
@pytest.mark.parametrize(
    "shape, stride, tma",
    [
        ((4096, 1024), (1024, 1), True),
        ((4096, 1024), (1, 4096), True),
        ((4096, 1024), (1032, 1), True),
        ((4096, 1024), (1028, 1), False),  # rows that begin 8 bytes off
        ((4096, 1024), (2048, 2), False),  # neither rows nor columns are contiguous
        ((4096, 1024), (0, 1), False),  # one row, expanded
        ((4095, 1024), (1024, 1), False),  # the result's rows begin 14 bytes off
        ((512, 1024), (1024, 1), False),  # too small to need it
    ],
)
def test_pointers_are_used_where_tma_cannot_be(compiled, capability, shape, stride, tma):
    x = meta(2**24, dtype=torch.bfloat16).as_strided(shape, stride)
    code = compiled(matmul_t_kernels.symmetric_product, x, x, "ieee")
    assert by_tma(code) == tma
    assert_fits(code, capability, aside=32)


@with_tma
def test_persistent_programs_are_as_many_as_multiprocessors(compiled, capability):
    tiles = Tiles(128, 128, 64, 8, 3, "tma")
    code = compiled(two_operands, torch.bfloat16, "ieee", (4096, 1024), "", tiles)
    assert_fits(code, capability)
    assert by_tma(code)
    assert code.grid == (candidates.device(meta(1, dtype=torch.bfloat16)).multiprocessors, 1, 1)


@pytest.mark.parametrize("capability", [80], indirect=True)
def test_factors_keep_their_bits(compiled, capability):
    """A launch and Inductor pass a Python float as float32; and a new factor compiles nothing anew."""
    code = compiled(two_operands, torch.float64, "ieee", (512, 512), "", None)
    assert code.signature["alpha_bits"] == code.signature["beta_bits"] == "i64"
    alpha, beta = code.arguments[4:6]
    assert torch.tensor([alpha, beta]).view(torch.float64).tolist() == [1 / 3, 1.0]


def test_symmetric_product_compiles_for_amd(monkeypatch):
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver("gfx942"))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    kernels = []

    class Compile:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args, **options: kernels.append(self.kernel.warmup(*args, grid=grid, **options))

    two_operands(torch.bfloat16, "ieee", (4096, 1024), "", None, Compile)
    assert "v_mfma" in kernels[0].asm["amdgcn"]
    assert kernels[0].metadata.shared <= 65536


# The exact product


def exact_product(shape, transposed, symmetric, dtype, wrap) -> None:
    m, n, k = shape
    sizes = [(k, rows) if transposed else (rows, k) for rows in (m, n)]
    a, b = (meta(*size, dtype=torch.float32) for size in sizes)
    a, b = (a.mT, b.mT) if transposed else (a, b)
    e, f = (meta(rows, dtype=torch.int32) for rows in (m, n))
    if symmetric:
        b, f = a, e
    exact_kernels.exact_product(a, b, e, f, wrap, out=meta(m, n, dtype=dtype))


def products_of_float32(opcodes: Iterable[str]) -> int:
    return sum({"FFMA": 1, "FFMA2": 2}.get(opcode.split(".")[0], 0) for opcode in opcodes)


def assert_exact(code: MachineCode, capability: int, once: bool) -> None:
    """One loop multiplies int8 on the tensor cores. What it multiplies is loaded and cut in registers.

    ``once``: each element is cut by one thread, by three fused products and sums.
    """
    assert_fits(code, capability, aside=32)
    (loop,) = code.innermost_loops(r"(IMMA|IGMMA|UTCIMMA)\b.*") or [[]]
    opcodes = [one.opcode for one in loop]
    assert opcodes, "no loop multiplies int8"
    assert not [opcode for opcode in opcodes if re.match("(LDL|STL)", opcode)], "the loop spills"
    assert not [opcode for opcode in opcodes if re.match("(F2I|FRND)", opcode)], "a slow conversion"
    assert any(opcode.startswith("LDGSTS") for opcode in opcodes), "nothing is loaded asynchronously"
    block_m, block_n, block_k = (code.options[f"BLOCK_{axis}"] for axis in "MNK")
    threads = 32 * code.options["num_warps"]
    cut = 3 * (block_m + block_n) * block_k // threads
    found = products_of_float32(opcodes)
    assert found == cut or (found > cut and not once), f"an element is cut {found / cut} times"
    # NaN and infinities have a product of their own, of float16.
    others = products_of_float32(code.opcodes.elements()) - found
    assert others < block_m * block_n * 16 // threads, "a product of float32"


EXACT = {  # shape, transposed
    "by rows": ((4096, 4096, 4096), False),
    "by columns": ((4096, 4096, 4096), True),
    "partial tiles": ((4096, 1001, 784), False),
    "any strides, long": ((509, 509, 2**15 + 1), True),
}


def worse_with(versions: Sequence[tuple[int, int]], reason: str) -> pytest.MarkDecorator:
    return pytest.mark.xfail(TRITON in versions, reason=reason, raises=AssertionError, strict=True)


TWICE = worse_with([(3, 8)], "Triton 3.8 keeps the digits of A in shared memory and in registers")
SPILLS = worse_with([(3, 8)], "Triton 3.8 spills registers")
SEVERAL = worse_with([(3, 6), (3, 7)], "Triton before 3.8 multiplies int8 from registers")
EXACT_ELSEWHERE = [
    *((symmetric, case, 90) for symmetric in (False, True) for case in ("by columns", "partial tiles")),
    pytest.param(False, "by rows", 90, marks=TWICE),
    pytest.param(True, "by rows", 90, marks=TWICE),
    (False, "any strides, long", 90),
    pytest.param(True, "any strides, long", 90, marks=SPILLS),
    pytest.param(False, "by rows", 80, marks=(slow, SPILLS)),
    pytest.param(False, "by rows", 100, marks=(slow, SEVERAL)),
    *(pytest.param(True, "any strides, long", other, marks=(slow, SPILLS)) for other in (80, 100)),
]


@pytest.mark.parametrize("symmetric, case, capability", EXACT_ELSEWHERE, indirect=["capability"])
def test_exact_product(compiled, capability, case, symmetric):
    shape, transposed = EXACT[case]
    if symmetric:
        shape = (shape[0], shape[0], shape[2])
    code = compiled(exact_product, shape, transposed, symmetric, torch.float32)
    once = capability >= 90 and case == "by rows"
    assert_exact(code, capability, once)
    if once:
        assert code.count("UTCIMMA" if capability == 100 else r"IGMMA\..*") >= 10
    if case == "by rows":
        assert code.count(r"STG\.E.*\.128.*") == code.count(r"STG.*"), "a store is not coalesced"


def test_exact_sums(compiled, capability, request):
    request.applymarker({80: SPILLS, 90: TWICE, 100: SEVERAL}[capability])
    code = compiled(exact_product, (4096, 4096, 4096), False, False, torch.int64)
    assert_exact(code, capability, once=capability >= 90)
    assert not code.count("(DMUL|DADD|DFMA|HMMA|HGMMA|UTCHMMA).*"), "T is made of integers"


@pytest.mark.parametrize("capability", [100], indirect=True)
@pytest.mark.parametrize("symmetric", [False, True])
def test_exact_product_has_room_in_tensor_memory(compiled, capability, symmetric):
    code = compiled(exact_product, (4096, 4096, 4096), False, symmetric, torch.float32)
    assert code.tensor_memory <= 512
    assert code.count(r"(UTC)?IMMA\b.*"), "nothing multiplies int8"


@pytest.mark.parametrize("capability", [90], indirect=True)
@pytest.mark.parametrize(
    "tiles, message",
    [
        (Tiles(128, 128, 32, 8, 3), "spill"),
        (Tiles(64, 64, 32, 4, 1), "asynchronously"),
        pytest.param(Tiles(64, 64, 32, 8, 3), "cut 2.5 times", marks=TWICE),
    ],
)
def test_check_rejects_other_tiles_of_the_exact_product(compiled, capability, tiles, message):
    with patch.object(exact_kernels, "_tiles", return_value=tiles):
        code = compiled(exact_product, (4096, 4096, 4096), False, False, torch.float32)
    with pytest.raises(AssertionError, match=message):
        assert_exact(code, capability, once=True)


@pytest.mark.parametrize("capability", [90], indirect=True)
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_check_rejects_another_product(compiled, capability, precision):
    code = compiled(symmetric_product, torch.float32, precision, 4096, None)
    with pytest.raises(AssertionError, match="no loop multiplies int8"):
        assert_exact(code, capability, once=False)


# The kernels that are bound by memory


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_sigmoid_backward(compiled, capability, dtype):
    g = meta(4096, 4096, dtype=dtype)
    code = compiled(sigmoid_backward_kernels.sigmoid_backward, g, g, torch.empty_like(g))
    assert_fits(code, capability)
    assert code.count(r"LDG\.E.*\.128.*")
    assert code.count(r"STG\.E.*\.128.*")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "launcher", [matmul_t_kernels.half_sum, matmul_t_kernels.mirror], ids=lambda f: f.__name__
)
def test_symmetric_sum(compiled, capability, launcher, dtype):
    code = compiled(launcher, meta(4096, 4096, dtype=dtype))
    assert_fits(code, capability)
    assert code.count(r"(LDG|STG)\.E.*\.128.*") == code.count(r"(LDG|STG).*"), "an access is not vectorised"


NUMEL = 2**24 + 1  # odd: whatever has a mask cannot be vectorised
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAXIMUM_DTYPES = (torch.bool, torch.int16, *FLOATS)


@pytest.mark.parametrize("dtype", MAXIMUM_DTYPES, ids=str)
def test_flat_maximum_moves_16_bytes_at_once(compiled, capability, dtype):
    a = meta(NUMEL, dtype=dtype)
    code = compiled(maximum_kernels.maximum, a, a, torch.empty_like(a))
    assert_fits(code, capability)
    accesses = code.options["BLOCK"] * dtype.itemsize // 16 // 128  # of each of 128 threads
    assert code.count(r"LDG\.E.*\.128.*") == 2 * accesses
    assert code.count(r"STG\.E.*\.128.*") == accesses


def maximum_backward(g: Tensor, a: Tensor, b: Tensor, wrap) -> None:
    maximum_kernels.maximum_backward(g, a, b, torch.empty_like(a), torch.empty_like(a), wrap)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_flat_maximum_backward_moves_16_bytes_at_once(compiled, capability, dtype):
    a = meta(NUMEL, dtype=dtype)
    for g, operands in ((a, 3), (meta(dtype=dtype).expand(NUMEL), 2)):
        code = compiled(maximum_backward, g, a, a)
        assert_fits(code, capability)
        accesses = code.options["BLOCK"] * dtype.itemsize // 16 // 128
        assert code.count(r"LDG\.E.*\.128.*") == operands * accesses
        assert code.count(r"STG\.E.*\.128.*") == 2 * accesses


@triton.jit
def masked_maximum_kernel(
    a_ptr, b_ptr, out_ptr, numel, A_REPEATS: tl.constexpr, B_REPEATS: tl.constexpr, BLOCK: tl.constexpr
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    a = tl.load(a_ptr + offsets, mask=mask)
    b = tl.load(b_ptr + offsets, mask=mask)
    tl.store(out_ptr + offsets, tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL), mask=mask)


def test_check_rejects_a_mask_everywhere(compiled):
    a = meta(NUMEL, dtype=torch.float32)
    with patch.object(maximum_kernels, "maximum_flat_kernel", masked_maximum_kernel):
        code = compiled(maximum_kernels.maximum, a, a, torch.empty_like(a))
    assert not code.count(r"(LDG|STG)\.E.*\.128.*")


BROADCAST = {  # b's strides
    "a row": (0, 1),
    "a column": (1, 0),
    "a row for each of a batch": (16384, 0, 1),
}


FEW_ELSEWHERE = [
    *((dtype, 90) for dtype in MAXIMUM_DTYPES),
    *(pytest.param(torch.float32, other, marks=slow) for other in (80, 100)),
]


@pytest.mark.parametrize("case", BROADCAST)
@pytest.mark.parametrize("dtype, capability", FEW_ELSEWHERE, ids=str, indirect=["capability"])
def test_broadcast_maximum_moves_16_bytes_at_once(compiled, capability, dtype, case):
    strides = BROADCAST[case]
    a = meta(*(64, 64, 16384)[-len(strides) :], dtype=dtype)
    b = meta(64, 16384, dtype=dtype).as_strided(a.shape, strides)
    launchers = [(lambda a, b, wrap: maximum_kernels.maximum(a, b, torch.empty_like(a), wrap), 1, 1)]
    if dtype.is_floating_point:
        launchers.append((lambda a, b, wrap: maximum_backward(a, a, b, wrap), 2, 2))
    for launcher, whole, results in launchers:
        code = compiled(launcher, a, b)
        assert_fits(code, capability)
        elements = code.options["BLOCK_ROWS"] * code.options["BLOCK_COLS"]
        accesses = elements * dtype.itemsize // 16 // 128  # of each of 128 threads
        assert code.options["BLOCK_ROWS"] > 1 or dtype.itemsize <= results
        assert code.count(r"STG.*") == code.count(r"STG\.E.*\.128.*") == results * accesses
        loads, wide = code.count(r"LDG.*"), code.count(r"LDG\.E.*\.128.*")
        if case == "a column":  # of b, at most an access per row
            assert whole * accesses <= wide <= loads <= whole * accesses + code.options["BLOCK_ROWS"]
        else:  # of a row, one access serves all rows
            assert wide == loads == whole * accesses + (1 if case == "a row" else accesses)


def test_check_rejects_a_column_read_for_every_element(compiled):
    a = meta(64, 16384, dtype=torch.float32)
    b = meta(128, dtype=torch.float32)[::2, None].expand_as(a)
    with patch.object(maximum_kernels, "_repeats", lambda strides: ""):
        code = compiled(maximum_kernels.maximum, a, b, torch.empty_like(a))
    assert code.count(r"LDG.*") == 4 + 16


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("columns", [4096, 4095])
@pytest.mark.parametrize("strides", [(1, 0), (0, 1), (1, 4096)], ids=["a column", "a row", "transposed"])
def test_strided_maximum(compiled, capability, dtype, columns, strides):
    """4095 columns: every element has a mask and an access of its own."""
    out = meta(4096, columns, dtype=dtype)
    b = meta(4096 * 4096, dtype=dtype).as_strided(out.shape, strides)
    assert_fits(compiled(maximum_kernels.maximum, out, b, torch.empty_like(out)), capability)
    if dtype.is_floating_point:
        assert_fits(compiled(maximum_backward, out, out, b), capability)
