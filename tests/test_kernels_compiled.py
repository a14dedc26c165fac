# SPDX-License-Identifier: MIT
"""The CUDA path without a GPU: machine code of the kernels, and the graph that tracers see.

A stand-in for the driver names an architecture, so that the launchers themselves choose the configuration
and Triton specialises it as in a launch; the tensors are on the meta device, or fake ones on "cuda".
"""

import re
from collections.abc import Iterator
from functools import partial
from unittest.mock import patch

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from benchmarks import sass
from benchmarks.compiled import Driver, MachineCode, machine_codes, target
from torchpar.kernels import linear_sigmoid as linear_sigmoid_kernels
from torchpar.kernels import matmul_t as matmul_t_kernels
from torchpar.kernels import maximum as maximum_kernels
from torchpar.kernels import sigmoid_backward as sigmoid_backward_kernels
from torchpar.kernels import tuning
from torchpar.kernels.tuning import Tiles

TORCH, TRITON = (tuple(map(int, module.__version__.split(".")[:2])) for module in (torch, triton))
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
    """Where ``aside`` bytes are allowed, ptxas puts them away to have another program in a multiprocessor."""
    assert code.resources["STACK"] <= aside, f"registers spill: {code.resources}"
    assert code.resources["LOCAL"] == 0
    assert code.shared_memory <= LIMITS[capability]


# The matrix kernels


def symmetric_product(dtype, precision, n, tiles, wrap) -> None:
    x = meta(n, n, dtype=dtype)
    matmul_t_kernels.symmetric_product(x, x, precision, wrap, tiles=tiles)


def linear_sigmoid(dtype, precision, n, tiles, wrap) -> None:
    x, bias = meta(n, n, dtype=dtype), meta(n, dtype=dtype)
    linear_sigmoid_kernels.linear_sigmoid(x, x, bias, precision, wrap, tiles=tiles)


def linear_sigmoid_of(dtype, precision, shape, transposed, tiles, wrap) -> None:
    m, n, k = shape
    x, weight = (
        meta(k, rows, dtype=dtype).mT if transposed else meta(rows, k, dtype=dtype) for rows in (m, n)
    )
    linear_sigmoid_kernels.linear_sigmoid(x, weight, meta(n, dtype=dtype), precision, wrap, tiles=tiles)


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


@matrix_launchers
@pytest.mark.parametrize("kind", [kind for kind in tuning.KINDS if kind != "float16"])  # it is as bfloat16
def test_all_tiles_fit_and_are_pipelined(compiled, capability, launcher, kind):
    dtype, precision, _, unaligned, _ = tuning.KINDS[kind]
    found = tuning.configurations(launcher.__name__, dtype, precision, capability)
    for n, tiles in [(ODD, unaligned), *((4096, tiles) for tiles in found)]:
        code = compiled(launcher, dtype, precision, n, tiles)
        try:
            assert_fits(code, capability)
            if n != ODD:
                assert_pipelined(code, tiles.variant == "specialized")
        except AssertionError as error:
            raise AssertionError(f"{tiles}, n = {n}: {error}") from error


@pytest.mark.parametrize("kind", [kind for kind in tuning.KINDS if kind != "float16"])
def test_all_tiles_of_linear_sigmoid_fit_with_odd_results_and_split(
    compiled, capability, kind, tmp_path, monkeypatch
):
    dtype, precision, *_ = tuning.KINDS[kind]
    for tiles in tuning.configurations("linear_sigmoid", dtype, precision, capability):
        cases = [((512, 1001, 4096), False)] if tuning._stores(tiles, aligned=False) else []
        cases += [((512, 4096, 1024), True)] if tiles.variant == "tma" else []
        if tiles.variant == "split":
            cases = [((64, 1024, 8192), False), ((64, 1001, 8192), False)]
        for shape, transposed in cases:
            launch = partial(linear_sigmoid_of, dtype, precision, shape, transposed, tiles)
            code, *sums = machine_codes(launch, tmp_path)
            try:
                assert len(sums) == (tiles.variant == "split")
                assert_fits(code, capability)
                assert_pipelined(code, specialized=False)
                for one in sums:
                    assert_fits(one, capability)
                    loads = one.count(r"LDG\.E.*\.128.*") >= one.options["SPLITS"]
                    assert loads == (shape[1] % 8 == 0), "the parts are not loaded 16 bytes at a time"
            except AssertionError as error:
                raise AssertionError(f"{tiles}, {shape}, {transposed=}: {error}") from error


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
    instructions = sass.read(text)

    def loops(opcode: str) -> list[list[str]]:
        return [
            [one.opcode.split(".")[0] for one in loop] for loop in sass.innermost_loops(instructions, opcode)
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
    if dtype == torch.float64 and capability == 100 and TRITON < (3, 7):
        assert code.count("DFMA")  # Triton 3.6 has no float64 tensor cores for this architecture
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
    for tiles in tuning.configurations("symmetric_product", dtype, precision, capability):
        if tiles.variant != "pointers":
            code = compiled(two_operands, dtype, precision, (4096, 1024), "", tiles)
            assert_fits(code, capability)
            assert_pipelined(code, tiles.variant == "specialized")


@pytest.mark.parametrize("capability", [90], indirect=True)
@pytest.mark.parametrize(
    "m, n, loads, stores",
    [(8192, 4096, True, True), (8192, 1001, True, False), (64, 1024, False, False)],
)
def test_linear_sigmoid_goes_by_tma(compiled, capability, m, n, loads, stores):
    """Unless it is small, whatever the columns of its result; and is stored so if its rows allow."""
    code = compiled(linear_sigmoid_of, torch.bfloat16, "ieee", (m, n, 784), False, None)
    assert_fits(code, capability)
    assert bool(code.count(r"UTMALDG\..*")) == loads
    assert bool(code.count(r"UTMASTG\..*")) == stores
    resident = tuning.resident_programs(Tiles(1, 1, 1, code.options["num_warps"], 1, "tma"))
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
    assert code.grid == (tuning.device(meta(1, dtype=torch.bfloat16)).multiprocessors, 1, 1)


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


@pytest.mark.parametrize("case", BROADCAST)
@pytest.mark.parametrize("dtype", MAXIMUM_DTYPES, ids=str)
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


# What tracers see. The autograd engine asks CUDA for a context even where tensors are fake, so the operators
# that make up the backward are traced by themselves.


def fake(shape: str, sizes: dict[str, int | torch.SymInt]) -> Tensor:
    """A tensor on "cuda" with a dimension per letter; without letters, a scalar on the CPU."""
    return torch.empty([sizes[letter] for letter in shape], device="cuda" if shape else "cpu")


def trace(op, shapes: tuple[str, ...]) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    """The graph of ``op`` on fake tensors with symbolic sizes, and what its fake returns."""
    env = ShapeEnv()
    sizes: dict[str, int | torch.SymInt] = {"z": 0}
    for letter, hint in {"b": 3, "m": 80, "n": 48, "k": 33}.items():
        source = ConstantSource(letter)
        symbol = env.create_symbol(hint, source=source, dynamic_dim=DimDynamic.DYNAMIC)
        sizes[letter] = env.create_symintnode(symbol, hint=hint, source=source)

    def results(*args: Tensor) -> tuple[Tensor, ...]:
        result = op(*args)
        return result if isinstance(result, tuple) else (result,)

    with FakeTensorMode(shape_env=env):
        args = [fake(shape, sizes) for shape in shapes]
        return aot_export_joint_simple(results, args, trace_joint=False), results(*args)


def kernel_names(graph: fx.GraphModule) -> list[str]:
    indices = [node.kwargs["kernel_idx"] for node in graph.graph.nodes if "kernel_idx" in node.kwargs]
    kernels = [kernel_side_table.get_kernel(index).fn for index in indices]
    # Launch options make torch wrap a kernel in an Autotuner, whose `fn` is the kernel.
    return [getattr(kernel, "fn", kernel).__name__ for kernel in kernels]


def launches(graph: fx.GraphModule) -> dict[str, list[str]]:
    """The kernels in a graph, and the arguments that each is taken to write."""
    nodes = [node for node in graph.graph.nodes if "kernel_idx" in node.kwargs]
    for node in nodes:
        assert "triton_kernel_wrapper" in str(node.target)
        ((columns, *_),) = node.kwargs["grid"]
        assert isinstance(columns, fx.Node), "the grid is fixed at the sizes it was traced with"
    clones = [node.kwargs["tensors_to_clone"] for node in nodes]
    return dict(zip(kernel_names(graph), clones, strict=True))


traced = pytest.mark.parametrize(
    "op, shapes, expected",
    [
        (ops.maximum, ("mk", "mk"), {"maximum_flat_kernel": ["out_ptr"]}),
        (ops.maximum, ("mk", "k"), {"maximum_strided_kernel": ["out_ptr"]}),
        (ops.maximum, ("mk", ""), {"maximum_flat_kernel": ["out_ptr"]}),
        (
            ops.maximum_backward,
            ("mk", "mk", "mk"),
            {"maximum_backward_flat_kernel": ["da_ptr", "db_ptr"]},
        ),
        (
            ops.maximum_backward,
            ("bmk", "bmk", "k"),
            {"maximum_backward_strided_kernel": ["da_ptr", "db_ptr"]},
        ),
        (ops.maximum_backward, ("mk", "mk", ""), {"maximum_backward_flat_kernel": ["da_ptr", "db_ptr"]}),
        (ops.matmul_t, ("mk",), {"symmetric_product_kernel": ["out_ptr"]}),
        (ops.matmul_t, ("bmk",), {"symmetric_product_kernel": ["out_ptr"]}),
        (ops.matmul_t_backward, ("bmm", "bmk"), {"symmetric_sum_kernel": ["out_ptr"]}),
        (ops.linear_sigmoid, ("mk", "nk"), {"linear_sigmoid_kernel": ["out_ptr"]}),
        (ops.linear_sigmoid, ("bmk", "nk", "n"), {"linear_sigmoid_kernel": ["out_ptr"]}),
        (
            ops.linear_sigmoid_backward,
            ("bmn", "bmn"),
            {"sigmoid_backward_kernel": ["dz_ptr", "partial_ptr"]},
        ),
    ],
)
one_capability = pytest.mark.parametrize("capability", [90], indirect=True)


@one_capability
@traced
def test_tracers_see_the_kernel_and_what_it_writes(capability, op, shapes, expected):
    graph, fakes = trace(op, shapes)
    assert launches(graph) == expected
    (outputs,) = graph.graph.find_nodes(op="output")[0].args
    for output, promised in zip(outputs, fakes, strict=True):
        result = output.meta["val"]
        assert result.size() == promised.size()
        assert result.stride() == promised.stride()
        assert (result.dtype, result.device) == (promised.dtype, promised.device)


def aten(graph: fx.GraphModule) -> list[str]:
    """The names of ATen's operators in a graph."""
    return [
        node.target.__name__.partition(".")[0] for node in graph.graph.nodes if "aten" in str(node.target)
    ]


@one_capability
@pytest.mark.parametrize(
    "op, module", [(ops.matmul_t, matmul_t_kernels), (ops.linear_sigmoid, linear_sigmoid_kernels)]
)
def test_the_library_multiplies_where_the_table_says_so(capability, op, module, monkeypatch):
    monkeypatch.setattr(module, "chosen", lambda *args, **kwargs: None)
    graph, _ = trace(op, ("mk",) if op is ops.matmul_t else ("mk", "nk"))
    assert "mm" in aten(graph)
    # The library's product need not be symmetric: one kernel mirrors it.
    assert launches(graph) == ({"symmetric_sum_kernel": ["out_ptr"]} if op is ops.matmul_t else {})


@one_capability
@pytest.mark.parametrize("op, shapes", [(ops.matmul_t, ("mz",)), (ops.linear_sigmoid, ("mz", "nz"))])
def test_the_library_answers_without_columns(capability, op, shapes):
    """The kernels assume at least one."""
    graph, _ = trace(op, shapes)
    assert "mm" in aten(graph)
    assert set(launches(graph)) <= {"symmetric_sum_kernel"}


@one_capability
@pytest.mark.parametrize("rows, sums", [(1, 0), (256, 0), (257, 1)])
def test_the_backward_of_few_rows_takes_three_launches(capability, rows, sums):
    """This one, which writes both gradients, and the products for those of x and of the weight."""
    with FakeTensorMode():
        g = torch.empty(rows, 48, dtype=torch.bfloat16, device="cuda")
        graph = aot_export_joint_simple(
            lambda g, y: ops.linear_sigmoid_backward(g, y), [g, g], trace_joint=False
        )
    assert kernel_names(graph) == ["sigmoid_backward_kernel"]
    assert aten(graph).count("sum") == aten(graph).count("_to_copy") == sums


@one_capability
def test_the_backward_of_maximum_is_one_launch(capability):
    with FakeTensorMode():
        a, b = (torch.empty(64, 48, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        for g in (a, a[0, 0].expand(64, 48)):
            graph = aot_export_joint_simple(
                lambda g, a, b: ops.maximum_backward(g, a, b), [g, a, b], trace_joint=False
            )
            assert kernel_names(graph) == ["maximum_backward_flat_kernel"]
            launched = set(aten(graph)) - {"empty", "empty_like", "empty_strided", "expand"}
            assert launched <= {"_assert_tensor_metadata"}


@one_capability
def test_float16_gradients_take_two_products(capability):
    """Half of a small one would lose bits, and the sum of two large ones would overflow."""
    with FakeTensorMode():
        g, x = (torch.empty(64, 64, dtype=torch.float16, device="cuda") for _ in range(2))
        graph = aot_export_joint_simple(
            lambda g, x: (ops.matmul_t_backward(g, x),), [g, x], trace_joint=False
        )
    assert aten(graph).count("mm") == 2
    assert not launches(graph)


BY_CPP = "symmetric_product_tma_kernel" if TORCH >= (2, 15) else "symmetric_product_kernel"


@one_capability
@pytest.mark.parametrize(
    "cpp_wrapper, expected", [(False, "symmetric_product_tma_kernel"), (True, BY_CPP)], ids=str
)
def test_inductor_takes_tma_where_its_wrapper_allocates_for_it(capability, cpp_wrapper, expected):
    graphs = []

    def stop(graph: fx.GraphModule, *args, **kwargs) -> None:
        graphs.append(graph)
        raise InterruptedError

    with FakeTensorMode():
        x = torch.empty(4096, 4096, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(InterruptedError):
        compile_fx(fx.symbolic_trace(lambda x: (ops.matmul_t(x),)), [x], stop, {"cpp_wrapper": cpp_wrapper})
    assert kernel_names(graphs[0]) == [expected]


@one_capability
def test_check_rejects_a_kernel_that_cannot_be_analysed(capability, monkeypatch):
    """PyTorch then assumes that the kernel writes all its arguments."""
    monkeypatch.setattr(Driver, "get_current_target", lambda self: None)
    with pytest.raises(RuntimeError, match="mutat"):
        trace(ops.matmul_t, ("mk",))


def _contiguous(native):
    return lambda *args: native(*args).contiguous()


def _backward(g: Tensor, y: Tensor) -> Tensor:
    return g * y * (1 - y)


def _shares(g: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return torch.addcmul(g, a, b), torch.addcmul(g, b, a)  # as every elementwise operator of three tensors


def _strided(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Neither contiguous nor dense."""
    return torch.ones(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2]


@pytest.mark.parametrize(
    "op, native, args",
    [
        (ops.maximum, torch.maximum, (torch.ones(5, 4, 3).permute(2, 0, 1), _strided(3, 5, 4))),
        (ops.maximum, torch.maximum, (torch.ones(5, 4, 3).permute(2, 0, 1), torch.ones(3, 5, 4).mT.mT)),
        (ops.maximum, torch.maximum, (torch.ones(3, 4).T, torch.ones(1, 3))),
        (ops.maximum, torch.maximum, (torch.ones(0, 4), torch.ones(4, dtype=torch.float16))),
        (ops.maximum, torch.maximum, (torch.ones(4, dtype=torch.int32), _strided(4, dtype=torch.float16))),
        (ops.maximum_backward, _shares, (torch.ones(4, 3).T, torch.ones(4, 3).T, torch.ones(3, 4))),
        (ops.maximum_backward, _shares, (_strided(3, 4), torch.ones(3, 4), torch.ones(4))),
        (
            ops.maximum_backward,
            _shares,
            (torch.ones(()).expand(3, 4), torch.ones(4, 3).T, torch.ones(4, 3).T),
        ),
        (ops.maximum_backward, _shares, (torch.ones(3), torch.ones(3).half(), torch.ones(3).int().float())),
        (ops.matmul_t, _contiguous(lambda x: x @ x.mT), (_strided(2, 5, 3),)),
        (ops.matmul_t, _contiguous(lambda x: x @ x.mT), (torch.ones(3, 5, dtype=torch.bfloat16).T,)),
        (ops.matmul_t, _contiguous(lambda x: x @ x.mT), (torch.ones(5, 0),)),
        (
            ops.matmul_t_backward,
            _contiguous(lambda g, x: (g + g.mT) @ x),
            (torch.ones(()).expand(5, 5), torch.ones(3, 5).T),
        ),
        (
            ops.linear_sigmoid,
            _contiguous(lambda x, w, b: torch.nn.functional.linear(x, w, b).sigmoid()),
            (torch.ones(3, 2, 5).permute(2, 1, 0), torch.ones(3, 4).T, torch.ones(()).expand(4)),
        ),
        (
            ops.linear_sigmoid_backward,
            lambda g, y: (_backward(g, y).contiguous(), _backward(g, y).sum((0, 1))),
            (torch.ones(()).expand(2, 3, 4), torch.ones(4, 3, 2).permute(2, 1, 0)),
        ),
    ],
)
def test_fake_has_the_metadata_of_the_native_operator(op, native, args):
    expected = native(*args)
    with FakeTensorMode():
        fakes = op(*(torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda") for t in args))
    if isinstance(expected, Tensor):
        expected, fakes = (expected,), (fakes,)
    for result, want in zip(fakes, expected, strict=True):
        assert (result.shape, result.stride(), result.dtype) == (want.shape, want.stride(), want.dtype)
        assert result.device == torch.device("cuda", 0)
