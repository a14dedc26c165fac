# SPDX-License-Identifier: MIT
"""The core in C and the executor in Python follow undefined bits alike, and report them alike.

A kernel of one warp applies random instructions to registers of which some were never written, and
to memory of which some was never written. Then both have the same values, undefined bits and causes
in all registers.
"""

import random
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from launch import Gpu
from test_core import check
from test_instructions import by, slow

from nogpu import emulate
from nogpu.machine import execute, simt
from nogpu.machine.block import Block
from nogpu.machine.gpu_state import SCHEDULES
from nogpu.machine.parse import PtxError
from nogpu.machine.registers import Tainted, content
from nogpu.native import core as native
from nogpu.native.encoding import Program
from nogpu.native.layout import OF_THREADS

pytestmark = pytest.mark.skipif(
    native.library() is None, reason="no C compiler, or NOGPU_EXECUTOR=python"
)

# Operands by letters: registers of 16, 32 and 64 bits h, r, d; predicates p; guards g; a source may
# be a constant where the letter is large, and c is a small one.
INTEGERS = [
    f"{name}.{kind}{size} {to}, {to}, {to.upper()}"
    for size, to in ((16, "h"), (32, "r"), (64, "d"))
    for name, kind in (
        *((name, kind) for name in ("add", "sub", "mul.lo", "min", "max") for kind in "su"),
        *((name, "b") for name in ("and", "or", "xor")),
    )
]
WIDTHS = [
    f"{name} {operands.replace('x', to).replace('X', to.upper())}"
    for size, to in ((16, "h"), (32, "r"), (64, "d"))
    for name, operands in (
        (f"mov.b{size}", "x, X"),
        (f"not.b{size}", "x, x"),
        (f"neg.s{size}", "x, x"),
        (f"abs.s{size}", "x, x"),
        (f"mad.lo.s{size}", "x, x, X, x"),
        (f"shl.b{size}", "x, x, c"),
        (f"shr.u{size}", "x, x, c"),
        (f"shr.s{size}", "x, x, c"),
        (f"shl.b{size}", "x, x, r"),
        (f"selp.b{size}", "x, x, X, p"),
        (f"setp.lt.s{size}", "p, x, X"),
        (f"setp.eq.b{size}", "p, x, x"),
    )
]
OTHERS = """
mul.wide.s16 r, h, h
mul.wide.u32 d, r, R
mul.hi.u32 r, r, r
mad.wide.s32 d, r, R, d
bfe.u32 r, r, 3, 9
bfe.s64 d, d, 30, 20
prmt.b32 r, r, r, 0x5410
prmt.b32 r, r, r, 0x9b3c
and.pred p, p, p
or.pred p, p, p
xor.pred p, p, p
not.pred p, p
mov.pred p, p
add.f32 r, r, r
mul.f32 r, r, R
fma.rn.f32 r, r, r, r
fma.rn.ftz.f32 r, r, r, r
max.f32 r, r, r
setp.gt.f32 p, r, r
ex2.approx.f32 r, r
div.full.f32 r, r, r
add.f64 d, d, d
add.f16x2 r, r, r
fma.rn.bf16x2 r, r, r, r
max.f16x2 r, r, r
neg.bf16x2 r, r
add.f16 h, h, h
mul.bf16 h, h, h
cvt.rn.f16x2.f32 r, r, r
cvt.rn.bf16.f32 h, r
cvt.f32.f16 r, h
cvt.rn.f32.s32 r, r
cvt.rzi.s32.f32 r, r
cvt.s64.s32 d, r
cvt.u64.u32 d, r
cvt.u32.u64 r, d
cvt.s32.s16 r, h
cvt.u16.u32 h, r
cvt.s32.s8 r, r
cvt.u32.u8 r, r
mov.b64 d, {r, r}
mov.b64 {r, r}, d
mov.b32 r, {h, h}
mov.b32 {h, _}, r
shfl.sync.bfly.b32 r, r, 5, 31, -1
shfl.sync.idx.b32 r|p, r, r, 31, -1
shfl.sync.up.b32 r, r, 3, 0, -1
redux.sync.add.s32 r, r, -1
ld.global.b32 r, [%given]
ld.global.b32 r, [%at]
ld.global.u8 h, [%at+1]
ld.global.s16 r, [%at+2]
ld.global.v2.b32 {r, r}, [%at]
ld.global.v2.b16 {h, _}, [%at+4]
""".strip().splitlines()
WHOLE = ("shfl", "redux")
PREFIXES = {"h": "%h", "r": "%r", "d": "%d", "p": "%p"}
COUNT = 8  # registers of each kind


def instructions(seed: int, count: int, has_branches: bool) -> list[str]:
    """Random instructions, of which every third one has a guard.

    Args:
        has_branches: a part of the threads leaves some of them out.
    """
    rng, taken = random.Random(seed), list[str]()

    def operand(match: re.Match[str]) -> str:
        letter = match[0]
        if letter == "c":
            return str(rng.randrange(20))
        if letter.isupper() and rng.randrange(3) == 0:
            return str(rng.choice([0, 1, 7, 255, 256, 0x7FF0]))
        made = f"{PREFIXES[letter.lower()]}{rng.randrange(COUNT)}"
        if made in taken and taken[0] == "{":  # an instruction writes each register once
            return operand(match)
        taken.append(made)
        return made

    found, end = list[str](), count
    for n in range(count):
        if n == end:
            found.append(f"$L_{end}:")
        if has_branches and n % 20 == 0:
            end = n + rng.randrange(1, 8)
            found.append(f"@%g{rng.randrange(3)} bra $L_{end};")
        name, operands = rng.choice((INTEGERS, WIDTHS, OTHERS, OTHERS)[rng.randrange(4)]).split(
            " ", 1
        )
        taken[:] = operands[:1]
        if name.startswith(WHOLE) and n < end < count:  # all threads must come there
            continue
        code = re.sub(r"\b[hrdpcHRD]\b", operand, operands)
        guard = rng.choice(["@%g0 ", "@!%g1 ", "@%g2 ", "@!%g2 "])
        is_guarded = rng.randrange(3) == 0 and not name.startswith(WHOLE)
        found.append(f"{guard if is_guarded else ''}{name} {code};")
        if re.fullmatch(r"(add|mul|max|div|ex2)(\..*)?\.f(32|64)", name):
            result, size = code.split(",")[0], name[-2:]
            found += [  # which operand's bits NaN has differs
                f"setp.nan.f{size} %is_nan, {result}, {result};",
                f"selp.b{size} {result}, 0, {result}, %is_nan;",
            ]
    return found


def kernel(code: list[str]) -> str:
    registers = [
        f".reg .{kind} {PREFIXES[letter]}<{COUNT}>;"
        for letter, kind in (("h", "b16"), ("r", "b32"), ("d", "b64"), ("p", "pred"))
    ]
    return "\n".join(
        [
            ".version 9.0",
            ".target sm_90a",
            ".visible .entry k(.param .u64 k_given, .param .u64 k_never)",
            ".reqntid 32",
            "{",
            *registers,
            ".reg .b32 %lane;",
            ".reg .b64 %given, %at;",
            ".reg .pred %g<3>, %is_nan;",
            "mov.u32 %lane, %tid.x;",
            "ld.param.b64 %given, [k_given];",
            "mad.wide.u32 %given, %lane, 8, %given;",
            "ld.param.b64 %at, [k_never];",
            "mad.wide.u32 %at, %lane, 8, %at;",
            "setp.lt.u32 %g0, %lane, 20;",
            "setp.lt.u32 %g1, %lane, 7;",
            "setp.gt.u32 %g2, %lane, 90;",  # in no thread
            # Half of the registers are written.
            *(f"ld.global.b16 %h{n}, [%given+{8 * n}];" for n in range(0, COUNT, 2)),
            *(f"ld.global.b32 %r{n}, [%given+{8 * n}];" for n in range(0, COUNT, 2)),
            *(f"ld.global.b64 %d{n}, [%given+{8 * n}];" for n in range(0, COUNT, 2)),
            *(f"setp.lt.s32 %p{n}, %r{n}, 0;" for n in range(0, COUNT, 2)),
            *code,
            "ret;",
            "}",
        ]
    )


@contextmanager
def in_python() -> Iterator[list[str]]:
    """Note the instructions that Python executes."""
    noted, steps = list[str](), {one: one.step for one in (execute, simt)}

    def noting(module, warp, i):
        noted.append(i.opcode)
        return steps[module](warp, i)

    with ExitStack() as patches:
        for one in steps:
            patches.enter_context(patch.object(one, "step", partial(noting, one)))
        yield noted


def registers(gpu: Gpu, code: list[str], block: tuple[int, int, int] | None) -> list[object]:
    """Return all registers of the warp at the end.

    Args:
        block: the sizes of a block of CUDA C++; None: it is Triton's.
    """
    ended, end = [], Block.end

    def noting(block: Block) -> None:
        ended.append(block)
        end(block)

    rng = np.random.default_rng(0)
    given = torch.from_numpy(rng.integers(-(2**63), 2**63, 64))
    never = gpu.allocate("x", 512)
    never.data[:512] = rng.integers(0, 256, 512, np.uint8)
    # Of each 8 bytes the second, fifth and sixth ones are written.
    never.give(np.isin(np.arange(512) % 8, (1, 4, 5)))
    gpu.space.is_deferred = True
    with patch.object(Block, "end", noting):
        gpu.launch(kernel(code), [gpu.tensor(given), never.base], block=block)
    warp = ended[0].warps[0] if ended else gpu.core_blocks.template.warps[0]
    return [warp.registers[n] for n in range(len(gpu.kernel.registers))]


def described(held: list[object], with_causes: bool) -> list[object]:
    return [
        (content(one), one.cause if with_causes and isinstance(one, Tainted) else None)
        for one in held
    ]


# By which schedule, and for which block: the core executes the whole block, or a warp for a while.
WAYS = {
    "blocks": (0, None),
    "warps": (1, None),
    "blocks of threads": (0, (32, 1, 1)),
    "warps of threads": (1, (32, 1, 1)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", [*range(6), *map(slow, range(6, 150))])
def test_random_instructions(seed, way):
    schedule, block = WAYS[way]
    code = instructions(seed, 60, way != "blocks")  # where no warp diverges
    with by("python"):
        expected = registers(Gpu(SCHEDULES[schedule]), code, block)
    with in_python() as noted:
        found = registers(Gpu(SCHEDULES[schedule]), code, block)
    # A block that the core executes as a whole does not know why what it has loaded is undefined.
    has_causes = schedule == 1 or not any("[%at" in one for one in code)
    assert described(found, has_causes) == described(expected, has_causes)
    # Under the second one Python loads what nobody has written, and lets warps diverge.
    left = {"ld", "bra", "ret"} if schedule == 1 else set()
    assert {one.split(".")[0] for one in noted} <= left


def test_the_comparison_notices_a_wrong_rule(monkeypatch):
    """Of a core for which all bits of a sum are undefined where one is."""
    code = ["and.b32 %r0, %r0, 255;", "mov.b32 %r2, {%h0, %h1};", "add.s32 %r0, %r0, %r2;"]
    with by("python"):
        expected = described(registers(Gpu(SCHEDULES[0]), code, None), True)
    assert described(registers(Gpu(SCHEDULES[0]), code, None), True) == expected
    monkeypatch.setattr(Program, "_rule", lambda self, i: OF_THREADS)
    others = described(registers(Gpu(SCHEDULES[0]), [*code, "// another kernel"], None), True)
    different = [one for one, other in zip(others, expected, strict=True) if one != other]
    assert len(different) == 2  # the pair and the sum


FAULTS = {
    "stored": ("add.s32 %r1, %r1, %r0;", "st.global.b32 [%given], %r1;"),
    "stored of a pair": ("mov.b32 %r1, {%h1, %h0};", "st.global.b16 [%given], %r1;"),
    "left out and stored": ("@%g0 mov.b32 %r1, 1;", "st.global.b32 [%given], %r1;"),
    "loaded and stored": ("ld.global.b32 %r1, [%at];", "st.global.b32 [%given], %r1;"),
    "address": ("cvt.u64.u32 %d1, %r1;", "add.s64 %d1, %given, %d1;", "ld.global.b32 %r0, [%d1];"),
    "branch": ("setp.lt.s32 %p1, %r1, 0;", "@%p1 bra $L_end;", "$L_end:"),
    "guard": ("setp.lt.s32 %p1, %r1, 0;", "@%p1 mov.b32 %r0, 0;"),
}


@pytest.mark.parametrize(
    "name, way",
    [  # registers of CUDA C++ begin as zeros
        (name, way)
        for name in FAULTS
        for way, (_, block) in WAYS.items()
        if block is None or name == "loaded and stored"
    ],
)
def test_undefined_bits_that_matter_are_named_alike(name, way):
    (schedule, block), said = WAYS[way], []
    for executor in ("python", "core"):
        with by(executor), pytest.raises(PtxError) as error:
            registers(Gpu(SCHEDULES[schedule]), list(FAULTS[name]), block)
        said.append(str(error.value))
    assert said[0] == said[1]
    assert {"address": "an address", "branch": "decides", "guard": "decides"}.get(
        name, "is stored"
    ) in said[0]


@pytest.mark.parametrize("way", WAYS)
def test_undefined_bits_that_are_not_stored_do_not_matter(way):
    """The upper half of a register, and a thread that an instruction leaves out."""
    schedule, block = WAYS[way]
    code = [
        "mov.b32 %r1, {%h0, %h1};",
        "st.global.b16 [%given], %r1;",
        "@%g0 mov.b32 %r3, 1;",
        "@%g0 st.global.b32 [%given], %r3;",
    ]
    with in_python() as noted:
        registers(Gpu(SCHEDULES[schedule]), code, block)
    assert set(noted) <= {"ret"}


# Cross entropy of few columns


@triton.jit
def cross_entropy_kernel(x, y, losses, columns, BLOCK: tl.constexpr):
    """The loss of a row, whose gradient overwrites it, as Liger's kernel does."""
    row = tl.program_id(0).to(tl.int64)
    x += row * columns
    label = tl.load(y + row)
    logit = tl.load(x + label)
    most, total = float("-inf"), 0.0
    for start in range(0, columns, BLOCK):
        i = start + tl.arange(0, BLOCK)
        value = tl.load(x + i, i < columns, float("-inf"))
        larger = tl.maximum(most, tl.max(value))
        total = total * tl.exp(most - larger) + tl.sum(tl.exp(value - larger))
        most = larger
    for start in range(0, columns, BLOCK):
        i = start + tl.arange(0, BLOCK)
        value = tl.load(x + i, i < columns, float("-inf"))
        value = tl.exp(value - most) / total
        tl.store(x + i, tl.where(i != label, value, value - 1), i < columns)
    tl.debug_barrier()
    tl.store(losses + row, most + tl.log(total) - logit)


@triton.jit
def masked_sum_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i, i < n)
    tl.store(out, tl.sum(tl.where(i < n, value + 1, 0.0)))


def cross_entropy() -> list[tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    x, y, losses = torch.randn(2, 41), torch.randint(41, (2,)), torch.empty(2)
    given = x.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(given, y, reduction="none")
    expected.sum().backward()
    cross_entropy_kernel[(2,)](x, y, losses, 41, 64, num_warps=32)
    return [(losses, expected.detach()), (x, given.grad)]


def masked_sum() -> list[tuple[torch.Tensor, ...]]:
    x, out = torch.arange(128.0), torch.empty(1)
    masked_sum_kernel[(1,)](x, out, 41, 128, num_warps=8)
    return [(out, x[:41].double().sum(0, keepdim=True) + 41)]


@pytest.mark.parametrize("run", [cross_entropy, masked_sum])
def test_the_core_executes_small_shapes_alone(run):
    """Warps hold copies of the 64 elements, and read what others overwrite in place."""
    with emulate("sm_90") as gpu, in_python() as noted:
        results = run()
    assert noted == []
    assert gpu.faults == []
    for found, expected in results:
        torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("run", [cross_entropy, masked_sum])
def test_both_executors_do_the_same_with_small_shapes(run):
    check(run)
