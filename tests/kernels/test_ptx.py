# SPDX-License-Identifier: MIT
"""The kernels' own PTX, executed on a CPU under three schedules, and faults that the executor must
notice."""

import math
import re
from collections.abc import Sequence
from itertools import cycle

import kernel_cases as cases
import mutants
import pytest
import torch
from exact_operands import HARD
from kernel_cases import BF16, F16, F32, F64, Case
from launching import Gpu
from products import PRODUCTS

from benchmarks.records.record import FLOATS, INTEGERS
from nogpu import emulate
from nogpu.instructions import copies
from nogpu.machine.counters import summarize
from nogpu.machine.gpu_state import SCHEDULES, Schedule
from nogpu.machine.parse import PtxError
from nogpu.machine.trace import Trace
from torchpar.kernels import exact_matmul, matmul_t
from torchpar.kernels.rule import KINDS, Tiles, configurations, unaligned_tiles

slow = pytest.mark.slow
LARGE, WIDE_TF32 = Tiles(128, 256, 64, 8, 4, "tma"), Tiles(64, 128, 32, 4, 3, "tma")
# Quick to compile, where tiles are not the subject.
SMALL, EXACT_SMALL = Tiles(16, 16, 16, 4, 2), Tiles(16, 16, 16, 1, 2)

MIXED = (
    (torch.float16, torch.int64),
    (torch.float64, torch.bool),
    (torch.float32, torch.float16),
    (torch.bool, torch.int8),
    (torch.int8, torch.uint8),
)
DTYPES = (*((dtype,) for dtype in FLOATS + INTEGERS), *MIXED)
REVERSED = (5, 4, 3, 2, 1, 0)
OPERANDS = {  # by a function that draws one
    "scalars": lambda d: (d(), d()),
    "no element": lambda d: (d(3, 0), d(3, 1)),
    "129": lambda d: (d(129), d(129)),
    "a last block of one": lambda d: (d(8193), d(8193)),
    "same permutation": lambda d: (d(5, 6, 7).permute(2, 0, 1), d(5, 6, 7).permute(2, 0, 1)),
    "a scalar": lambda d: (d(4099), d()),
    "permuted": lambda d: (d(5, 6, 7, 3), d(3, 5, 7, 6).permute(1, 3, 2, 0)),
    "a row": lambda d: (d(33, 129), d(129)),
    "a column": lambda d: (d(129, 33), d(129, 1)),
    "a long row": lambda d: (d(3, 2049), d(1, 2049)),
    "outer": lambda d: (d(65, 1), d(1, 129)),
    "4 dimensions": lambda d: (d(3, 1, 5, 1), d(1, 4, 1, 7)),
    "5 dimensions": lambda d: (d(2, 1, 4, 1, 3), d(1, 5, 1, 6, 1)),  # in two launches
    "6 dimensions": lambda d: (
        d(3, 1, 2, 1, 2, 1).permute(REVERSED),
        d(1, 2, 1, 3, 1, 2).permute(REVERSED),
    ),
}
# Of these, gradients come in all layouts; of the others, too, in the slow cases.
OF_ALL_LAYOUTS = (
    "scalars",
    "no element",
    "129",
    "a last block of one",
    "a row",
)
SUMMED = {  # by one launch, and by two
    "a row": lambda d: (d(33, 129), d(129)),
    "a row, many rows": lambda d: (d(1, 16), d(601, 16)),
    "a column": lambda d: (d(129, 33), d(129, 1)),
    "a column, many columns": lambda d: (d(3, 1), d(3, 4112)),
}
MORE_SUMMED = {
    "127 columns": lambda d: (d(3, 127), d(127)),
    "one row": lambda d: (d(1, 513), d(1, 1)),
    "no row": lambda d: (d(1, 1, 16), d(3, 1, 16)),
    "a row of a batch": lambda d: (d(2, 5, 48), d(48)),
    "a channel of the last dimension": lambda d: (d(2, 5, 4, 3).permute(0, 3, 1, 2), d(3, 1, 1)),
    "a scalar": lambda d: (d(5001), d()),
    "outer": lambda d: (d(65, 1), d(1, 129)),
}
FAR, LIMITS = (
    torch.linspace(-80, 20, 331),
    torch.tensor([-math.inf, -1e4, 0, 1e4, math.inf, math.nan]),
)
# Of 16 bits, −z·log2(e) is rounded to float32 and not corrected: an error of 80·2⁻²³ at most.
FAR_SIGMOID = {F16: 2**-11 + 84 * 2**-23, F32: cases.SIGMOID[F32], F64: cases.SIGMOID[F64]}
FLOAT_CHAIN = exact_matmul.FLOAT_CHAIN
BY_FLOAT16 = {"floats": True, "capability": 80}


def extreme_digits(k, tiles=EXACT_SMALL, **options) -> Case:
    """S₃ of the first chain is odd: above 2²⁴ a float32 would lose its last bit."""
    rows = [cases.rows_of_extreme_digits(k, odd) for odd in (1, 2)]
    return cases.exact(*rows, dtypes=[torch.int64], tiles=tiles, **options)


DEFAULTS = {
    "matmul_t, large": cases.symmetric(264, 72, tiles=LARGE, multiprocessors=2),
    "matmul_t, transposed, with C": cases.symmetric(
        136, 72, tiles=mutants.WIDE, transposed="ac", other=True, c=True
    ),
    "matmul_t, small": cases.symmetric(72, 40),
    "matmul_t, unaligned": cases.symmetric(71, 35),
    "matmul_t, by pointers, full tiles": cases.symmetric(64, 128, tiles=Tiles(64, 64, 64, 4, 3)),
    "matmul_t, TF32": cases.symmetric(72, 72, F32, "tf32", WIDE_TF32),
    "matmul_t, float32": cases.symmetric(40, 20, F32, tiles=Tiles(32, 32, 16, 4, 2)),
    "matmul_t, float64": cases.symmetric(17, 17, F64, tiles=SMALL, c=True),
    "matmul_t, no rows": cases.symmetric(0, 3, batch=(3,)),
    "matmul_t, one number": cases.symmetric(1, 1, F64, tiles=SMALL),
    "matmul_t, stepped": cases.symmetric(
        33, 33, F32, tiles=SMALL, batch=(2,), other=True, c=True, layout="stepped"
    ),
    "matmul_t, expanded": cases.symmetric(
        37, 9, F32, tiles=SMALL, batch=(3,), other=True, c=True, layout="expanded"
    ),
    "half_sum": cases.half_sum(33, block=16),
    "half_sum, no rows": cases.half_sum(0),
    "half_sum, largest numbers": cases.half_sum(33, F16, unit=65504 / 3, block=16),
    "half_sum, stepped": cases.half_sum(65, F32, layout="stepped", block=32),
    "half_sum, expanded": cases.half_sum(65, F32, layout="expanded", block=32),
    "mirror": cases.mirror(70),
    "linear_sigmoid, large": cases.sigmoid(72, 264, 264, tiles=LARGE, multiprocessors=1),
    "linear_sigmoid, large, unaligned rows": cases.sigmoid(72, 71, 40, tiles=mutants.WIDE),
    "linear_sigmoid, small": cases.sigmoid(40, 72, 72, bias=False, transposed="w"),
    "linear_sigmoid, split": cases.sigmoid(
        24, 40, 584, tiles=Tiles(32, 32, 64, 4, 2, "split_k"), multiprocessors=2
    ),
    "linear_sigmoid, float32": cases.sigmoid(30, 40, 20, F32, tiles=Tiles(16, 32, 16, 4, 2)),
    "linear_sigmoid, float64": cases.sigmoid(30, 40, 20, F64, tiles=SMALL),
    "linear_sigmoid, no rows": cases.sigmoid(0, 3, 2, F16),
    "linear_sigmoid, no columns": cases.sigmoid(3, 0, 2, F16),
    "linear_sigmoid, one row": cases.sigmoid(1, 129, 2, F16),
    "linear_sigmoid, many rows of tiles": cases.sigmoid(
        132, 36, 20, F32, tiles=Tiles(16, 32, 16, 4, 2)
    ),
    "sigmoid_backward": cases.sigmoid_gradient(70, 72),
    "sigmoid_backward, many rows": cases.sigmoid_gradient(300, 10, F32),
    "sigmoid_backward, no columns": cases.sigmoid_gradient(3, 0),
    "sigmoid_backward, one number": cases.sigmoid_gradient(1, 1, F64),
    "sigmoid_backward, stepped": cases.sigmoid_gradient(129, 65, F32, layout="stepped"),
    "sigmoid_backward, expanded": cases.sigmoid_gradient(33, 129, F32, layout="expanded"),
    "exact_matmul": cases.exact((33, 40), (20, 40)),
    "exact_matmul, symmetric": cases.exact((40, 20)),
    "exact_matmul, special values": cases.exact(
        (33, 40), (20, 40), special=True, tiles=Tiles(16, 16, 32, 1, 2)
    ),
    "exact_matmul of bfloat16": cases.exact(
        (33, 40),
        (20, 40),
        operand_dtype=BF16,
        dtypes=[BF16, F32],
        special=True,
        tiles=Tiles(16, 16, 32, 1, 2),
    ),
    "exact_matmul, no rows": cases.exact((0, 2), (3, 2)),
    "exact_matmul, no batches": cases.exact((0, 3, 5)),
    "exact_matmul by float16, batches": cases.exact(
        (2, 1, 33, 35),
        (2, 1, 5, 35),
        layouts=["offset", "expanded"],
        tiles=EXACT_SMALL,
        **BY_FLOAT16,
    ),
    "exact_matmul by float16, longest chain": extreme_digits(2 * FLOAT_CHAIN + 1, **BY_FLOAT16),
    "matmul_t, in place": cases.symmetric(
        37, 20, F16, tiles=SMALL, batch=(3,), c=True, in_place=True
    ),
    **{
        f"matmul_t, factors {factors}": cases.symmetric(
            17, 17, F64, tiles=SMALL, other=True, c=True, factors=factors
        )
        for factors in ((1 / 3, 0.0), (0.0, -1 / 3), (-1e300, 0.0))
    },
    **{
        f"sigmoid of {dtype}": cases.sigmoid_of(FAR.to(dtype), bound)
        for dtype, bound in FAR_SIGMOID.items()
    },
    **{f"limits of sigmoid, {dtype}": cases.sigmoid_of(LIMITS.to(dtype)) for dtype in FAR_SIGMOID},
    # Of 16 bits Triton 3.6 compares some pairs, which is not modeled.
    **{
        f"maximum, {name}": cases.larger(draw, F32, layouts=None if name in OF_ALL_LAYOUTS else 1)
        for name, draw in OPERANDS.items()
    },
    **{f"maximum, sum of {name}": cases.larger_sums(draw, F32) for name, draw in SUMMED.items()},
    "maximum, gradient of a": cases.larger_sums(OPERANDS["129"], F32, needed="a"),
    "maximum, gradient of b, a row": cases.larger_sums(SUMMED["a row"], F32, needed="b"),
    **{
        f"maximum of {dtypes}": cases.larger(OPERANDS["129"], *dtypes, layouts=1)
        for dtypes in DTYPES
        if dtypes not in MIXED[1:3]
    },
}


def candidates_of(kernel: str, capability: int) -> dict[str, Case]:
    """Configurations of a matrix kernel, with edges, and with more steps than stages.

    Those of TF32 are all there; those that two capabilities have take turns with them. bfloat16 and
    float16 share their configurations: each has every second one, and the other ones on the other
    capability. So have float32 and float64.
    """
    found = {}
    for name, kind in KINDS.items():
        possible = configurations(PRODUCTS[kernel], name, capability)
        unaligned = unaligned_tiles(PRODUCTS[kernel], name, capability)
        chosen = [*dict.fromkeys([*unaligned, *possible])]
        if name.startswith("tf32"):
            of_80 = configurations(PRODUCTS[kernel], name, 80)
            shared = [tiles for tiles in possible if tiles in of_80]
            chosen = [
                tiles
                for tiles in chosen
                if tiles not in shared or shared.index(tiles) % 2 == (capability == 80)
            ]
        else:
            chosen = chosen[(capability == 80) ^ (name == "float16") :: 2]
        for tiles in chosen:
            m, n, k = (
                tiles.block_m + 8,
                tiles.block_n - 8,
                (tiles.num_stages + 1) * tiles.block_k + 8,
            )
            options = {"tiles": tiles, "capability": capability, "multiprocessors": 1}
            if tiles.variant == "split_k":
                m, n, k, options["multiprocessors"] = 8, 8, 2 * k, 2
            if kernel == "linear_sigmoid":
                case = cases.sigmoid(m, n, k, kind.dtype, kind.precision, **options)
            else:
                n = m if tiles.by_tma else tiles.block_m - 8
                case = cases.symmetric(
                    n, k, kind.dtype, kind.precision, other=True, c=True, **options
                )
            found[f"{kernel}, {name}, {tiles.variant}, {tiles[:5]}, sm_{capability}"] = case
    return found


OTHERS = {
    "matmul_t, batches by TMA": cases.symmetric(
        72, 72, tiles=Tiles(64, 64, 128, 4, 3, "tma"), batch=(2, 2), multiprocessors=1
    ),
    "matmul_t, batches of float64": cases.symmetric(40, 24, F64, batch=(3,), transposed="a"),
    "matmul_t, both transposed": cases.symmetric(
        264, 72, F16, tiles=LARGE, transposed="ab", other=True
    ),
    "matmul_t, flat": cases.symmetric(
        520, 72, tiles=Tiles(128, 256, 64, 8, 3, "flat"), multiprocessors=2
    ),
    "matmul_t, one tile of four": cases.symmetric(520, 40, tiles=LARGE, multiprocessors=3),
    "matmul_t, expanded last": cases.symmetric(
        37, 9, F32, batch=(3,), other=True, c=True, layout="expanded last"
    ),
    "half_sum of float64": cases.half_sum(65, F64),
    "half_sum, more batches": cases.half_sum(65, F16, batch=(3, 2), layout="transposed"),
    "half_sum, expanded last": cases.half_sum(65, F32, layout="expanded last"),
    "mirror, batches": cases.mirror(65, F16, batch=(3, 2)),
    "linear_sigmoid, split, larger tiles": cases.sigmoid(
        24, 40, 584, tiles=mutants.SPLIT, multiprocessors=2
    ),
    "linear_sigmoid, x transposed, by TMA": cases.sigmoid(
        136, 264, 136, tiles=LARGE, transposed="xw"
    ),
    "linear_sigmoid, stepped": cases.sigmoid(129, 65, 33, F32, layout="stepped"),
    "linear_sigmoid, offset": cases.sigmoid(65, 129, 33, F32, layout="offset"),
    "linear_sigmoid, expanded": cases.sigmoid(65, 129, 33, F32, layout="expanded"),
    "linear_sigmoid, expanded last": cases.sigmoid(65, 129, 33, F32, layout="expanded last"),
    "linear_sigmoid, unaligned float32": cases.sigmoid(33, 35, 37, F32, transposed="x"),
    "sigmoid_backward of float64": cases.sigmoid_gradient(600, 70, F64),
    "sigmoid_backward of float16": cases.sigmoid_gradient(256, 64, F16),
    "sigmoid_backward, two columns": cases.sigmoid_gradient(513, 2, F32),
    "sigmoid_backward, expanded last": cases.sigmoid_gradient(65, 33, F32, layout="expanded last"),
    "matmul_t, batches": cases.symmetric(40, 72, F16, batch=(2,)),
    "matmul_t, TF32, small": cases.symmetric(40, 40, F32, "tf32"),
    "matmul_t, float64, larger tiles": cases.symmetric(40, 20, F64, c=True),
    "matmul_t, stepped, more tiles": cases.symmetric(
        65, 33, F32, batch=(2,), other=True, c=True, layout="stepped"
    ),
    "matmul_t, TF32, large": cases.symmetric(72, 72, F32, "tf32", Tiles(128, 256, 32, 8, 3, "tma")),
    "matmul_t, transposed, with C, large": cases.symmetric(
        136, 72, tiles=LARGE, transposed="ac", other=True, c=True
    ),
    "half_sum, stepped, large": cases.half_sum(65, F32, layout="stepped"),
    **{f"maximum of {dtypes}": cases.larger(OPERANDS["129"], *dtypes) for dtypes in MIXED[1:3]},
    **{
        f"maximum, {name}, all layouts": cases.larger(draw, F32)
        for name, draw in OPERANDS.items()
        if name not in OF_ALL_LAYOUTS
    },
    # Each dtype with some operands, and each operand with some dtypes.
    **{
        f"maximum, {name} of {dtypes}": cases.larger(draw, *dtypes)
        for dtypes, (name, draw) in zip(cycle(MIXED[:4]), OPERANDS.items(), strict=False)
    },
    **{
        f"maximum, {name} of {dtypes}": cases.larger(OPERANDS[name], *dtypes, layouts=1)
        for n, dtypes in enumerate(DTYPES)
        for name in ("a last block of one", "a row", "a column")[n % 3 : n % 3 + 2]
    },
    **{
        f"maximum, sum of {name} of {dtype}": cases.larger_sums(draw, dtype)
        for name, draw in SUMMED.items()
        for dtype in FLOATS
    },
    **{
        f"maximum, sum of {name} of {dtype}": cases.larger_sums(draw, dtype)
        for n, (name, draw) in enumerate(MORE_SUMMED.items())
        for dtype in (FLOATS[n % len(FLOATS)], FLOATS[(n + 1) % len(FLOATS)])
    },
    **{
        f"maximum, sum of {name}, all layouts": cases.larger_sums(
            draw, F32, needed=needed, layouts=None
        )
        for name, draw in SUMMED.items()
        for needed in ("a", "b", "ab")
    },
    **{
        f"maximum, sum of {name} of {dtypes}": cases.larger_sums(SUMMED[name], *dtypes, needed="b")
        for name in ("a row", "a column")
        for dtypes in ((torch.int64, F16), (torch.bool, F64), (F16, F32))
    },
    "exact_matmul, large tiles": cases.exact((136, 160), (72, 160), tiles=Tiles(128, 64, 32, 8, 3)),
    "exact_matmul, int64, chains": cases.exact(
        (40, 200), (24, 200), dtypes=[torch.int64], terms=64
    ),
    "exact_matmul, transposed, odd": cases.exact(
        (33, 37), (35, 37), special=True, layouts=["transposed", "transposed"]
    ),
    "exact_matmul, longest chain": extreme_digits(
        exact_matmul.CHAIN + 1, Tiles(16, 16, 32, 1, 3), capability=80
    ),
    "exact_matmul of float16": cases.exact(
        (33, 129), (20, 129), operand_dtype=F16, dtypes=[F16, torch.int64], special=True, terms=64
    ),
    "exact_matmul of bfloat16, symmetric": cases.exact(
        (40, 20), operand_dtype=BF16, dtypes=[BF16], layouts=["transposed"]
    ),
    "exact_matmul of bfloat16, sm_80": cases.exact(
        (40, 72), (24, 72), operand_dtype=BF16, dtypes=[BF16], capability=80
    ),
    "exact_matmul of bfloat16 by float16": cases.exact(
        (33, 40), (20, 40), operand_dtype=BF16, dtypes=[BF16, F32], special=True, **BY_FLOAT16
    ),
    **{
        f"exact_matmul of {dtype}, {name}": cases.exact(
            *HARD[name], operand_dtype=dtype, dtypes=[dtype], tiles=Tiles(16, 16, 32, 1, 2)
        )
        for name, dtype in (("subnormal", BF16), ("ties of X", F16), ("ties of sums", BF16))
    },
    "exact_matmul by float16": cases.exact((2, 33, 35), layouts=["stepped"], **BY_FLOAT16),
    "exact_matmul by float16, batches, large tiles": cases.exact(
        (2, 1, 33, 35), (2, 1, 5, 35), layouts=["offset", "expanded"], **BY_FLOAT16
    ),
    "exact_matmul, aligned": cases.exact((40, 64), (24, 64)),
    "exact_matmul, special values, odd": cases.exact((20, 20), (20, 20), special=True),
    "exact_matmul by float16, large tiles": cases.exact(
        (144, 48), layouts=["transposed"], **BY_FLOAT16
    ),
    "exact_matmul by float16, chains": cases.exact(
        (2, 3, 129), (2, 33, 129), layouts=["contiguous", "transposed"], terms=64, **BY_FLOAT16
    ),
    "exact_matmul by float16, symmetric, chains": cases.exact(
        (33, 65), layouts=["stepped"], terms=64, **BY_FLOAT16
    ),
    **{
        f"exact_matmul by float16, {name}": cases.exact(
            *pair, dtypes=[F32, torch.int64], tiles=EXACT_SMALL, **BY_FLOAT16
        )
        for name, pair in HARD.items()
    },
    **{
        f"exact_matmul by float16, special {shapes}": cases.exact(
            *shapes, special=True, tiles=EXACT_SMALL, **BY_FLOAT16
        )
        for shapes in (((7, 40), (80, 40)), ((80, 40), (60, 40)), ((80, 40),))
    },
    "exact_matmul, sm_80": cases.exact((40, 72), (24, 72), capability=80),
    "sigmoid_backward, sm_80": cases.sigmoid_gradient(300, 70, F32, capability=80),
    "half_sum, sm_80": cases.half_sum(65, capability=80),
    "maximum, sum of a row, sm_80": cases.larger_sums(SUMMED["a row"], F16, capability=80),
    "maximum, sm_80": cases.larger(OPERANDS["a row"], F16, capability=80),
}
PIPELINED = {
    name: case
    for kernel in PRODUCTS
    for capability in (90, 80)
    for name, case in candidates_of(kernel, capability).items()
}
OTHERS |= PIPELINED


def check(
    case: Case, is_pipelined: bool = False, schedules: Sequence[Schedule] = SCHEDULES
) -> None:
    """All schedules give the expected results, and the same bits. On sm_80 the strictest is tried
    alone.

    ``is_pipelined``: where the kernel waits for a step's operands, those of others are on the way.
    """
    expected, first = case.expected(), None
    for schedule in schedules if case.capability == 90 else SCHEDULES[1:2]:
        gpu = Gpu(schedule)
        found = case.execute(gpu)
        if is_pipelined:
            total = summarize(gpu.counted[0], lambda source: source).total
            # Single elements of 16 bits are not copied asynchronously.
            assert total.most_in_flight > 0 or not total.waits, "copies and products take turns"
        assert case.agrees(found, expected), schedule
        first = first or found
        assert cases.same_bits(found, first), schedule


# Slow tests, since another case has the same kernel in another dtype, size or layout.
ALIKE = {
    "matmul_t, small",
    "matmul_t, in place",
    "exact_matmul by float16, batches",
    "sigmoid of torch.float64",
    "matmul_t, by pointers, full tiles",
    "matmul_t, TF32",
    "matmul_t, float64",
    "matmul_t, factors (0.0, -0.3333333333333333)",
    "matmul_t, factors (-1e+300, 0.0)",
    "matmul_t, expanded",
    "half_sum, expanded",
    "linear_sigmoid, small",
    "linear_sigmoid, large, unaligned rows",
    "linear_sigmoid, float64",
    "linear_sigmoid, many rows of tiles",
    "sigmoid_backward, expanded",
    "exact_matmul",
    "exact_matmul, symmetric",
    "maximum, a last block of one",
    "maximum, same permutation",
    "maximum, permuted",
    "maximum, a long row",
    "maximum, outer",
    "maximum, 4 dimensions",
    "maximum, 5 dimensions",
    *(f"maximum of {(dtype,)}" for dtype in (torch.int8, torch.int16, torch.int32)),
}


def test_the_slow_cases_are_cases() -> None:
    assert set(DEFAULTS) > ALIKE


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[slow] * (name in ALIKE or name in OTHERS))
        for name in (*DEFAULTS, *OTHERS)
    ],
)
def test_kernel(name):
    """Under the two schedules that differ most. The slow cases are alike, and take the third alone.

    The configurations take turns with the schedules.
    """
    is_slow = name in ALIKE or name in OTHERS
    schedules = SCHEDULES[2:] if is_slow else SCHEDULES[:2]
    if name in PIPELINED:
        schedules = [SCHEDULES[[*PIPELINED].index(name) % len(SCHEDULES)]]
    check((DEFAULTS | OTHERS)[name], name in PIPELINED, schedules)


def test_a_loop_whose_copies_wait_for_its_products_is_noticed():
    case = cases.symmetric(32, 96, F32, tiles=Tiles(32, 32, 16, 4, 2))
    with pytest.raises(AssertionError, match="take turns"):
        check(case, is_pipelined=True)


@slow
@pytest.mark.parametrize("variant, stages", [("flat", 3), ("tma", 4)])
def test_a_flat_loop_loads_the_next_tile_before_it_stores_one(variant, stages):
    tiles, steps = Tiles(128, 256, 64, 8, stages, variant), 5
    gpu = Gpu(SCHEDULES[0])
    gpu.trace = Trace()
    cases.symmetric(512, steps * tiles.block_k, tiles=tiles, multiprocessors=1).execute(gpu)
    spans = [one for one in gpu.trace.spans if one.what.startswith("a bulk")]
    first_store = min(one.begin for one in spans if one.what == "a bulk store")
    loads = sum(one.what == "a bulk load" and one.begin < first_store for one in spans)
    of_next = 2 * (stages - 1) if variant == "flat" else 0
    assert loads == 2 * steps + of_next


@slow
def test_three_products_of_tf32_are_about_as_exact_as_float32():
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    exact = x.double() @ x.double().T
    errors = {}
    for precision in ("tf32", "tf32x3"):
        with emulate("sm_90"):
            found = matmul_t.symmetric_matmul(x, x, precision, None)
        errors[precision] = (found.double() - exact).abs().max()
    bound = 2 * (torch.mm(x, x.T).double() - exact).abs().max()
    assert errors["tf32x3"] <= bound < errors["tf32"]


def test_longer_chains_of_float16_are_wrong():
    with pytest.raises(AssertionError):
        check(extreme_digits(2 * FLOAT_CHAIN + 1, terms=2 * FLOAT_CHAIN, **BY_FLOAT16))


# What the executor must notice, in small programs of 64 threads, which have 4096 bytes of shared
# memory

PROGRAM = """
.entry program(.param .u64 from, .param .u64 to)
.reqntid 64
{
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .b32 %r<99>;
    .reg .b64 %rd<9>;
    ld.param.b64 %rd0, [from];
    ld.param.b64 %rd1, [to];
    mov.u32 %r0, %tid.x;
    mul.wide.s32 %rd2, %r0, 4;
    add.s64 %rd3, %rd0, %rd2;
    add.s64 %rd4, %rd1, %rd2;
    mov.b32 %r90, global_smem;
    shl.b32 %r91, %r0, 2;
    add.s32 %r1, %r90, %r91;         // the thread's own word of shared memory
    xor.b32 %r92, %r91, 128;
    add.s32 %r2, %r90, %r92;         // that of a thread of the other warp
    setp.lt.u32 %p0, %r0, 32;        // the first warp
    setp.lt.u32 %p1, %r0, 16;        // a half of it
    BODY
    ret;
}
"""
COPY = "cp.async.ca.shared.global [%r1], [%rd3], 4, 4; cp.async.commit_group;"
EXCHANGE = """
    ld.global.b32 %r3, [%rd3];
    st.shared.b32 [%r1], %r3;
    bar.sync 0;
    ld.shared.b32 %r4, [%r2];
    st.global.b32 [%rd4], %r4;
"""
HALF = "cvt.u16.u32 %rs0, %r0; mov.b32 %r3, {%rs1, %rs0};"  # %rs1 was not written
FAULTS = {
    "an unknown instruction": (
        "vadd4.u32 %r3, %r0, %r0, %r0;",
        "line 22: the executor does not know vadd4.u32",
    ),
    "an unknown form": ("slct.b32.u32 %r3, %r0, %r0, %r0;", "does not know slct.b32.u32"),
    "an unwritten register": (
        "add.s32 %r3, %r4, 1; st.global.b32 [%rd4], %r3;",
        "a register that was never written; the value is stored",
    ),
    "an unwritten address": (
        "cvt.u64.u32 %rd5, %r4; add.s64 %rd5, %rd4, %rd5; st.global.b32 [%rd5], %r0;",
        "a register that was never written; the value is a part of an address",
    ),
    "an unwritten predicate": (
        "setp.eq.b32 %p3, %r4, 0; @%p3 st.global.b32 [%rd4], %r0;",
        "a register that was never written; the value decides what is executed",
    ),
    "a half-written register": (
        HALF + "st.global.b32 [%rd4], %r3;",
        "a register that was never written; the value is stored",
    ),
    "the half that was not written": (
        HALF + "mov.b32 {%rs2, _}, %r3; cvt.u32.u16 %r4, %rs2; st.global.b32 [%rd4], %r4;",
        "a register that was never written; the value is stored",
    ),
    "the threads that a predicate leaves out": (
        "@%p1 add.s32 %r3, %r0, 1; st.global.b32 [%rd4], %r3;",
        "a thread whose mask is false; the value is stored",
    ),
    "unwritten shared memory": (
        "ld.shared.b32 %r3, [%r1];",
        "of shared memory.* was not written",
    ),
    "unwritten global memory": ("ld.global.b32 %r3, [%rd4];", "was not written before"),
    "past the end": ("ld.global.b32 %r3, [%rd3+256];", "ends outside|outside of each allocation"),
    "past the end of shared memory": ("st.shared.b32 [%r1+4096], %r0;", "outside"),
    "an unaligned address": ("ld.global.b64 %rd5, [%rd3];", "not a multiple of 8"),
    "no barrier before a read": (
        EXCHANGE.replace("bar.sync 0;", ""),
        "warp . reads .*, which a store of warp . writes|was not written",
    ),
    "no barrier before a write": (
        EXCHANGE + "st.shared.b32 [%r1], %r4;",
        "warp . (reads|overwrites) .* without waiting",
    ),
    "a barrier of half a warp": (
        "@%p1 bra skip; bar.sync 0; skip: ret;",
        "part of warp 0 executes bar.sync",
    ),
    "a barrier of one warp": ("@%p0 bar.sync 0;", "warps wait for what nobody will do"),
    "an endless loop": ("again: bra again;", "does not end"),
    "two values at one place": ("st.shared.b32 [%r90], %r0;", "different values"),
    "a copy that was not waited for": (
        COPY + "ld.shared.b32 %r3, [%r1];",
        "reads .*, which a copy .* writes",
    ),
    "a wait for too few copies": (
        COPY * 2 + "cp.async.wait_group 1; ld.shared.b32 %r3, [%r1];",
        "which a copy",
    ),
    "a copy that another warp waited for": (
        COPY + "bar.sync 0; cp.async.wait_group 0; ld.shared.b32 %r3, [%r2];",
        "which a copy",
    ),
    "no mbarrier": (
        "setp.eq.b32 %p2, %r0, 0; @%p2 mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 16;",
        "was not written|there is no mbarrier",
    ),
}


def execute(body: str, schedule=SCHEDULES[0], grid=(1, 1, 1)) -> torch.Tensor:
    gpu = Gpu(schedule)
    given = gpu.tensor(torch.arange(64, dtype=torch.int32))
    result = torch.empty(64, dtype=torch.int32, device="meta")
    gpu.launch(PROGRAM.replace("BODY", body), [given, result], grid, shared=4096)
    return gpu.read(result)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda one: one.order)
@pytest.mark.parametrize("name", FAULTS)
def test_fault_of_a_program_is_noticed(name, schedule, monkeypatch):
    monkeypatch.setattr(Gpu, "limit", 1000)
    body, message = FAULTS[name]
    with pytest.raises(PtxError, match=message):
        execute(body, schedule)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda one: one.order)
def test_program_without_faults(schedule):
    assert execute(EXCHANGE, schedule).tolist() == [*range(32, 64), *range(32)]
    body = (
        COPY
        + "cp.async.wait_group 0; bar.sync 0; ld.shared.b32 %r3, [%r2]; st.global.b32 [%rd4], %r3;"
    )
    assert execute(body, schedule).tolist() == [*range(32, 64), *range(32)]
    # Of a half-written register, the half that was written can be taken.
    body = HALF + "mov.b32 {_, %rs2}, %r3; cvt.u32.u16 %r4, %rs2; st.global.b32 [%rd4], %r4;"
    assert execute(body, schedule).tolist() == [*range(64)]
    # Threads that diverge meet again, also where none of them executes the last instruction before.
    body = """@%p1 bra join; mov.b32 %r3, 1; setp.ge.u32 %p2, %r0, 64; @%p2 mov.b32 %r3, 2;
        join: bar.sync 0; st.global.b32 [%rd4], %r0;"""
    assert execute(body, schedule).tolist() == [*range(64)]
    # The loop runs as many times as the number of the thread.
    body = """mov.b32 %r3, 0; again: setp.ge.s32 %p2, %r3, %r0; @%p2 bra done; add.s32 %r3, %r3,
    1; bra again;
        done: bar.sync 0; st.global.b32 [%rd4], %r3;"""
    assert execute(body, schedule).tolist() == [*range(64)]


def test_blocks_race():
    with pytest.raises(PtxError, match=r"two programs write byte 0 of"):
        execute("st.global.b32 [%rd4], %r0;", grid=(2, 1, 1))
    body = "mov.u32 %r3, %ctaid.x; setp.eq.b32 %p3, %r3, 0; @%p3 st.global.b32 [%rd4], %r0;"
    with pytest.raises(PtxError, match=r"reads .*, which .* of another program writes"):
        execute(body + "@!%p3 ld.global.b32 %r3, [%rd4];", grid=(2, 1, 1))


# The same for what only whole kernels have: a pattern, its replacement, and the message

TMA = cases.symmetric(64, 136, tiles=mutants.TMA, multiprocessors=1)
BROKEN = {
    "no fence before a bulk store": (
        r"fence\.proxy\.async\.shared::cta;",
        "",
        "needs a fence between the",
    ),
    "no wait before the next bulk store": (
        r"cp\.async\.bulk\.wait_group\.read\s+0;\n\tbar",
        "bar",
        "overwrites .*, which a bulk store .* reads",
    ),
    "no acquired tensormap": (
        r"@%p\d+ fence\.proxy\.tensormap.*",
        "",
        "not acquired by the tensormap proxy",
    ),
    "no wait for a bulk load": (
        r"@!complete bra.uni waitLoop;",
        "",
        "reads .*, which a bulk load .* writes",
    ),
    "too few bytes expected": (
        r"(expect_tx.*, )\d+;",
        r"\g<1>16;",
        "warps wait for what nobody will do",
    ),
    "no wgmma.fence": (r"wgmma\.fence\.sync\.aligned;", "", r"wgmma\.fence"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_fault_of_a_kernel_is_noticed(name):
    pattern, replacement, message = BROKEN[name]
    with pytest.raises(PtxError, match=message):
        TMA.execute(Gpu(SCHEDULES[1], change=lambda text: re.sub(pattern, replacement, text)))


def test_a_copy_that_does_not_wait_for_products_is_noticed():
    """After as many steps as there are stages, it overwrites what a product reads."""
    case = cases.symmetric(64, 328, tiles=mutants.TMA, multiprocessors=1)

    def change(text: str) -> str:
        return re.sub(r"wgmma\.wait_group\.sync\.aligned \d;", "", text)

    with pytest.raises(PtxError, match=r"overwrites .* which a product of warp . reads"):
        case.execute(Gpu(SCHEDULES[1], change=change))


def test_the_first_read_of_a_sum_waits_for_its_product():
    """ptxas says C7517 of this mutant: it injects the wait that is missing behind the loop."""

    def change(text: str) -> str:
        assert "wgmma.wait_group.sync.aligned 0;" in text
        return text.replace("wgmma.wait_group.sync.aligned 0;", "")

    for schedule in SCHEDULES:
        assert TMA.agrees(TMA.execute(Gpu(schedule, change=change)), TMA.expected())


@slow
def test_most_mutants_are_noticed():
    drawn = mutants.draw()
    unnoticed = [one.describe() for one in drawn if not one.noticed()]
    assert len(drawn) >= 60
    assert len(unnoticed) <= len(drawn) // 10, "\n".join(unnoticed)


def test_wgmma_needs_a_fence_after_cp_async(monkeypatch):
    """Triton 3.6 makes none, so that its kernels are executed without this rule."""
    monkeypatch.setattr(copies, "COPIES_NEED_FENCE", True)
    gpu = Gpu(SCHEDULES[0], change=lambda text: text.replace("fence.proxy.async.shared::cta;", ""))
    with pytest.raises(
        PtxError, match=r"a copy of warp . wrote .*needs a fence between the proxies"
    ):
        DEFAULTS["matmul_t, by pointers, full tiles"].execute(gpu)
