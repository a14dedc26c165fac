# SPDX-License-Identifier: MIT
"""The choice of tiles, and of the library: by device, dtype, sizes and alignment."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton compiles the configurations")

from products import PRODUCTS

from torchpar.kernels import rule, tiles
from torchpar.kernels.linear_sigmoid import LINEAR_SIGMOID
from torchpar.kernels.matmul_t import SYMMETRIC_MATMUL
from torchpar.kernels.rule import KINDS, Tiles
from torchpar.kernels.tiles import Choice

DEVICE = rule.Device("NVIDIA Test", 90, 132)
WIDE, LARGE = Tiles(128, 256, 64, 8, 4, "tma"), Tiles(128, 128, 64, 8, 4, "tma")
FLAT = Tiles(128, 256, 64, 8, 3, "flat")
NARROW = Tiles(64, 128, 64, 4, 4, "tma")
PAIRED = Tiles(128, 128, 64, 4, 3, "tma")
SQUARE, DEEP, TINY = (
    Tiles(128, 128, 64, 8, 3),
    Tiles(64, 64, 128, 4, 3),
    Tiles(32, 32, 64, 4, 4),
)
UNALIGNED, SPLIT = Tiles(64, 64, 32, 8, 3), Tiles(64, 64, 64, 4, 4, "split_k")


@pytest.fixture(autouse=True)
def device(monkeypatch):
    monkeypatch.setattr(tiles, "device", lambda t: DEVICE)


def operand(n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(n, k, dtype=dtype, device="meta")


@pytest.mark.parametrize("capability", [0, 80, 90, 100, 120])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_configurations_are_those_that_a_device_can_run(product, kind, capability):
    found = rule.configurations(product, kind, capability)
    itemsize, is_symmetric = KINDS[kind].dtype.itemsize, product is SYMMETRIC_MATMUL
    assert 1 <= len(set(found)) == len(found) <= 10
    for one in found:
        assert all(size.bit_count() == 1 for size in one[:4]), "a power of 2, as Triton takes them"
        elements = (one.num_stages - (capability == 0)) * (one.block_m + one.block_n) * one.block_k
        if one.by_tma:  # which stores from shared memory
            elements += one.block_m**2 if is_symmetric else one.block_m * one.block_n // 2
        shared = (
            rule.resident_programs(one, DEVICE._replace(multiprocessors=1)) * elements
            if one.by_tma
            else elements
        )
        # By the makers' documents.
        limit = {0: 65536, 80: 166912, 120: 101376}.get(capability, 232448)
        assert shared * itemsize <= limit
        assert not is_symmetric or one.block_n == one.block_m or one.by_tma
    similar = {80: 87, 100: 103}.get(capability, capability)
    assert rule.configurations(product, kind, similar) == found
    variants = {"pointers"} if is_symmetric else {"pointers", "split_k"}
    if capability in (90, 100) and (itemsize == 2 or kind.startswith("tf32")):
        variants.add("tma")
        if (is_symmetric, capability, itemsize) == (True, 90, 2):
            variants.add("flat")
    assert {one.variant for one in found} == variants


@pytest.mark.parametrize(
    "kernel, sizes, expected",
    [  # tiles, over 132 multiprocessors
        ("symmetric_matmul", (4096, 4096, 4096, 1), WIDE),  # 264: two waves
        ("symmetric_matmul", (8192, 8192, 4096, 1), FLAT),  # 1056: eight waves, as if not flat
        (
            "symmetric_matmul",
            (4224, 4224, 4224, 1),
            LARGE,
        ),  # 561: five waves, and three of wide ones
        ("symmetric_matmul", (2048, 2048, 2048, 1), NARROW),  # 264, of which two run at a time
        ("symmetric_matmul", (768, 768, 768, 1), DEEP),  # 78
        ("symmetric_matmul", (256, 256, 256, 1), TINY),  # 36
        ("symmetric_matmul", (256, 256, 256, 256), Tiles(64, 128, 64, 4, 3, "flat")),
        ("symmetric_matmul", (768, 768, 768, 12), WIDE),  # 132
        ("linear_sigmoid", (8192, 4096, 1024, 1), WIDE),
        ("linear_sigmoid", (1024, 4096, 1024, 1), PAIRED),
        ("linear_sigmoid", (512, 4096, 1024, 1), SQUARE),  # 128
        ("linear_sigmoid", (64, 1001, 784, 1), TINY),  # few tiles, which store single elements
        ("linear_sigmoid", (64, 1024, 8192, 1), SPLIT),  # few tiles, and a second launch
        # Pointers would load single elements.
        ("linear_sigmoid", (64, 1024, 1000, 1), Tiles(64, 64, 128, 4, 3, "tma")),
        ("linear_sigmoid", (512, 512, 121, 1), DEEP),
    ],
)
def test_the_rule_takes_the_least_predicted_time(monkeypatch, kernel, sizes, expected):
    m, n, k, _ = sizes
    case = PRODUCTS[kernel], "ieee", sizes, (operand(m, k), operand(n, k))
    choice = Choice(*case)
    assert choice.tiles == expected
    times = choice.times
    assert times[expected] == min(times.values()) < max(times.values())
    monkeypatch.setattr(tiles, "device", lambda t: DEVICE._replace(capability=80))
    assert not Choice(*case).tiles.by_tma


@pytest.mark.parametrize(
    "n, stride, expected, by_pointers",
    [
        (4096, (1024, 1), WIDE, SQUARE),
        (4096, (1, 4096), WIDE, SQUARE),
        (4096, (1032, 1), WIDE, UNALIGNED),  # Triton asks for multiples of 16 elements
        (4096, (1028, 1), UNALIGNED, UNALIGNED),  # rows begin on 8 bytes
        (4095, (1024, 1), UNALIGNED, UNALIGNED),  # the result's rows begin 14 bytes off
        (4096, (8 * 1024, 8), UNALIGNED, UNALIGNED),  # neither rows nor columns are contiguous
        (4096, (0, 1), SQUARE, SQUARE),  # one row, expanded
    ],
)
def test_tiles_and_the_library_by_alignment(n, stride, expected, by_pointers):
    x = torch.empty(2**25, dtype=torch.bfloat16, device="meta").as_strided((n, 1024), stride)
    for tma, chosen in ((True, expected), (False, by_pointers)):
        choice = Choice(SYMMETRIC_MATMUL, "ieee", (n, n, 1024, 1), [x], tma)
        assert choice.tiles == chosen
        assert tiles.library_is_faster(choice) == (chosen == UNALIGNED)


@pytest.mark.parametrize("m, n, k", [(0, 64, 64), (1, 12288, 4096), (8, 2**31, 16)])
def test_sizes_that_no_descriptor_has_go_by_pointers(m, n, k):
    choice = Choice(LINEAR_SIGMOID, "ieee", (m, n, k, 1), [operand(m, k), operand(n, k)])
    assert choice.tiles.variant == "pointers"


def test_a_fourth_stage_of_tf32_is_for_sm_90():
    """With transposed operands and a matrix C it takes 262,224 bytes of sm_100's 232,448."""
    for capability, stages in ((90, 4), (100, 3), (103, 3)):
        found = rule.configurations(SYMMETRIC_MATMUL, "tf32", capability)
        assert Tiles(128, 128, 32, 8, stages, "tma") in found
        assert Tiles(128, 128, 32, 8, 7 - stages, "tma") not in found


BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


# The table of docs/tuning.md
@pytest.mark.parametrize(
    "kernel, dtype, precision, shape, library",
    [
        ("symmetric_matmul", BF16, "ieee", (1024, 16), False),
        ("symmetric_matmul", BF16, "ieee", (256, 256), False),
        ("symmetric_matmul", BF16, "ieee", (1024, 4096), True),
        ("symmetric_matmul", BF16, "ieee", (2048, 8192), False),
        ("symmetric_matmul", BF16, "ieee", (64, 16384), True),
        ("symmetric_matmul", F16, "ieee", (1032, 1032), False),  # by TMA
        ("symmetric_matmul", BF16, "ieee", (1031, 1031), True),  # single elements
        ("symmetric_matmul", F32, "tf32", (1024, 1024), False),
        ("symmetric_matmul", F32, "tf32x3", (1024, 1024), False),
        ("symmetric_matmul", F32, "tf32x3", (256, 256), False),
        ("symmetric_matmul", F32, "tf32x3", (256, 4096), True),  # the library cuts long sums
        ("symmetric_matmul", F32, "ieee", (512, 512), True),
        ("symmetric_matmul", F32, "ieee", (768, 768), False),
        ("symmetric_matmul", F64, "ieee", (512, 512), True),
        ("symmetric_matmul", F32, "ieee", (2048, 2048), False),
        ("symmetric_matmul", F32, "ieee", (1008, 4096), True),
        ("symmetric_matmul", F64, "ieee", (1008, 4096), True),
        ("symmetric_matmul", F32, "ieee", (4097, 4096), True),
        ("symmetric_matmul", F64, "ieee", (4096, 4096), False),
        ("symmetric_matmul", F64, "ieee", (4097, 4096), True),
        ("linear_sigmoid", BF16, "ieee", (512, 512, 121), False),
        ("linear_sigmoid", BF16, "ieee", (64, 64, 10000), True),  # split, it launches twice
        ("linear_sigmoid", BF16, "ieee", (8192, 512, 784), False),
        ("linear_sigmoid", BF16, "ieee", (8192, 510, 784), True),  # rows of 1020 bytes
        ("linear_sigmoid", BF16, "ieee", (8192, 4096, 2048), False),
        ("linear_sigmoid", BF16, "ieee", (8192, 4096, 4096), True),
        ("linear_sigmoid", F32, "tf32", (4096, 4096, 1024), False),
        ("linear_sigmoid", F32, "tf32", (1024, 512, 128), False),
        # Copies by columns take what the sigmoid's pass would.
        ("linear_sigmoid", F32, "ieee", (512, 512, 121), True),
        ("linear_sigmoid", F32, "ieee", (8192, 512, 784), True),
        ("linear_sigmoid", F32, "ieee", (1024, 1024, 1024), True),
        ("linear_sigmoid", F32, "ieee", (64, 128, 784), False),  # split
        ("linear_sigmoid", F32, "tf32x3", (1024, 1024, 1024), False),
        ("linear_sigmoid", F64, "ieee", (8192, 4096, 128), False),
        ("linear_sigmoid", F64, "ieee", (8192, 512, 784), True),
    ],
)
def test_the_library_computes_where_the_kernel_is_not_expected_to_win(
    kernel, dtype, precision, shape, library
):
    m, n, k = shape if len(shape) == 3 else (shape[0], *shape)
    operands = [operand(m, k, dtype), operand(n, k, dtype)][: len(shape) - 1]
    choice = Choice(PRODUCTS[kernel], precision, (m, n, k, 1), operands)
    assert tiles.library_is_faster(choice) == library


@pytest.mark.parametrize(
    "kernel, wrong, expected",
    [
        ("symmetric_matmul", Tiles(64, 128, 64, 4, 3), "block_n of 1·block_m"),
        ("symmetric_matmul", Tiles(64, 256, 64, 4, 3, "tma"), "block_n of 1·block_m or 2·block_m"),
        ("symmetric_matmul", Tiles(64, 64, 64, 4, 3, "split_k"), "one of the variants"),
        ("linear_sigmoid", FLAT, "one of the variants"),
        ("linear_sigmoid", Tiles(64, 64, 64, 4, 3, "other"), "one of the variants"),
    ],
)
def test_tiles_that_a_kernel_does_not_have_are_refused(kernel, wrong, expected):
    x = operand(1024, 1024)
    with pytest.raises(ValueError, match=expected):
        Choice(PRODUCTS[kernel], "ieee", (1024, 1024, 1024, 1), [x]).check(wrong)


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="precision is 'TF32', expected one of"):
        rule.kind_of(torch.float32, "TF32")


def test_choice_by_a_symbolic_size_adds_no_guard():
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    env = ShapeEnv()
    symbol = env.create_unspecified_symbol(1040, source=torch._dynamo.source.ConstantSource("n"))
    n = env.create_symintnode(symbol, hint=1040)
    x = operand(1024, 1024)
    choice = Choice(SYMMETRIC_MATMUL, "ieee", (n, n, n, 1), [x])
    assert choice.tiles == Choice(SYMMETRIC_MATMUL, "ieee", (1040, 1040, 1040, 1), [x]).tiles
    assert not tiles.library_is_faster(choice)
    assert rule.split_k(SPLIT, DEVICE, 64, 64, n) == (1, n), (
        "the number of programs would be a guard"
    )
    assert rule.hint(env.create_unbacked_symint()) == 1024
    assert all("Mod" in str(guard.expr) for guard in env.guards), "not of alignment"
    assert n > 1000
    assert not all("Mod" in str(guard.expr) for guard in env.guards), "a guard would have been seen"
