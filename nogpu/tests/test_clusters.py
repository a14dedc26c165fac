# SPDX-License-Identifier: MIT
"""Clusters: right values and no faults, and each fault of a cluster by a small faulty program.

Some programs are those of Triton without one of their cluster barriers. Others are texts of PTX, in
which the CTAs of a cluster do different things.
"""

import re
from collections.abc import Callable
from contextlib import nullcontext
from unittest.mock import patch

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from launch import Gpu
from triton.tools.tensor_descriptor import TensorDescriptor

from nogpu import emulate
from nogpu.machine.gpu_state import SCHEDULES
from nogpu.machine.parse import PtxError, parse
from nogpu.native import core as native

EXECUTORS = ("core", "python")
slow = pytest.mark.slow
# Triton 3.6 compiles neither reductions nor transpositions over CTAs.
needs_triton = pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8), reason="Triton before 3.8"
)
BARRIER = re.compile(r"barrier\.cluster\.arrive\S*;\s*barrier\.cluster\.wait\S*;")


def by(executor: str):
    return patch.object(native, "library", lambda: None) if executor == "python" else nullcontext()


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# Kernels of Triton


@triton.jit
def add(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n) + tl.load(y + i, mask=i < n), mask=i < n)


@triton.jit
def softmax(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + tl.program_id(0) * n + i, mask=i < n, other=float("-inf"))
    power = tl.exp(value - tl.max(value, 0))
    tl.store(out + tl.program_id(0) * n + i, power / tl.sum(power, 0), mask=i < n)


@triton.jit
def transpose(x, out, BLOCK: tl.constexpr):
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    tl.store(out + i * BLOCK + j, tl.trans(tl.load(x + i * BLOCK + j)))


@triton.jit
def matmul(a, b, c, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        left = tl.load(a + m[:, None] * K + k[None, :])
        total = tl.dot(left, tl.load(b + k[:, None] * N + n[None, :]), total)
    tl.store(c + m[:, None] * N + n[None, :], total)


@triton.jit
def descriptor_matmul(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        total = tl.dot(a.load([m, k]), b.load([k, n]), total)
    c.store([m, n], total)


def run_softmax(ctas: int) -> None:
    x, out = normal(2, 200), torch.empty(2, 200)
    softmax[(2,)](x, out, 200, BLOCK=256, num_ctas=ctas)
    torch.testing.assert_close(out.double(), torch.softmax(x.double(), 1), rtol=1e-5, atol=0)


def run_add(ctas: int) -> None:
    x, y, out = normal(1000), normal(1000, seed=1), torch.zeros(1024)
    add[(2,)](x, y, out, 1000, BLOCK=512, num_ctas=ctas)
    assert torch.equal(out, torch.cat([x + y, torch.zeros(24)]))


def run_transpose(ctas: int) -> None:
    x, out = normal(32, 32), torch.empty(32, 32)
    transpose[(1,)](x, out, BLOCK=32, num_ctas=ctas)
    assert torch.equal(out, x.T)


def check_product(c: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Each sum of K products of float16 is within K roundings to float32, and one to c's dtype."""
    exact, sizes = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    bound = a.shape[1] * 2.0**-24 * sizes + torch.finfo(c.dtype).eps / 2 * exact.abs()
    assert ((c.double() - exact).abs() <= bound).all()


def run_matmul(ctas: int) -> None:
    a, b = normal(256, 64, dtype=torch.float16), normal(64, 128, dtype=torch.float16, seed=1)
    c = torch.empty(256, 128)
    matmul[(2, 1)](a, b, c, 128, 64, BM=128, BN=128, BK=32, num_ctas=ctas)
    check_product(c, a, b)


def run_descriptors(ctas: int) -> None:
    a, b = normal(256, 64, dtype=torch.float16), normal(64, 128, dtype=torch.float16, seed=1)
    c = torch.empty(256, 128)
    blocks = zip((a, b, c), ([128, 32], [32, 128], [128, 128]), strict=True)
    given = [TensorDescriptor.from_tensor(t, block) for t, block in blocks]
    descriptor_matmul[(2, 1)](*given, 64, BM=128, BN=128, BK=32, num_ctas=ctas)
    check_product(c, a, b)


def often(run: Callable[[int], None], ctas: int, executor: str, arch: str):
    default = {(run_softmax, 2, "core"), (run_softmax, 2, "python"), (run_matmul, 2, "core")}
    is_default = arch == "sm_90" and (run, ctas, executor) in default
    return pytest.param(run, ctas, executor, arch, marks=[] if is_default else slow)


@needs_triton
@pytest.mark.parametrize(
    "run, ctas, executor, arch",
    [
        often(run, ctas, executor, arch)
        for run in (run_add, run_softmax, run_transpose, run_matmul, run_descriptors)
        for ctas in (2, 4)
        for executor in EXECUTORS
        for arch in ("sm_90", "sm_100")
    ],
)
def test_kernels_of_triton_have_right_values(run, ctas, executor, arch):
    with by(executor), emulate(arch, schedules="all") as gpu:
        run(ctas)
    assert gpu.faults == []
    assert gpu.launches[0].ctas == ctas
    assert f"clusters of {ctas} CTAs" in str(gpu.launches[0])


def without(number: int) -> Callable[[str], str]:
    """Return a change of a PTX text that removes one of its cluster barriers."""

    def change(text: str) -> str:
        found = list(BARRIER.finditer(text))
        assert len(found) == 4
        return text[: found[number].start()] + text[found[number].end() :]

    return change


@needs_triton
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(
    "number, expected",
    [(0, "uninitialised memory"), (1, "race"), (2, "race"), (3, "ended CTA")],
)
def test_each_cluster_barrier_of_a_softmax_is_needed(number, expected, executor):
    with by(executor), emulate() as gpu:
        gpu.change = without(number)
        softmax[(1,)](normal(2, 200), torch.empty(2, 200), 200, BLOCK=256, num_ctas=2)
    found = {fault.name for fault in gpu.faults if fault.kind == "error"}
    assert expected in found | ({"uninitialised memory"} if "race" in found else set())
    assert all("CTA" in fault.message for fault in gpu.faults)


# Texts of PTX. The parameter p is a tensor of 32 or more numbers of 32 bits.

HEAD = """
.version 9.0
.target sm_90a
.visible .entry k(.param .u64 p)
.reqntid 32
.explicitcluster
.reqnctapercluster {ctas}
{{
.reg .b64 %at, %d;
.reg .b32 %rank, %other, %mine, %theirs, %lane, %v, %x;
.reg .pred %first, %is0, %is1, %done;
mov.u32 %rank, %cluster_ctarank;
xor.b32 %other, %rank, 1;
mov.u32 %lane, %tid.x;
setp.eq.u32 %first, %lane, 0;
setp.eq.u32 %is0, %rank, 0;
setp.ne.u32 %is1, %rank, 0;
mov.b32 %mine, global_smem;
shl.b32 %v, %lane, 2;
add.s32 %mine, %mine, %v;
mapa.shared::cluster.u32 %theirs, %mine, %other;
ld.param.b64 %at, [p];
mad.wide.u32 %at, %lane, 4, %at;
mul.wide.u32 %d, %rank, 128;
add.s64 %at, %at, %d;
{code}
ret;
}}
"""
SYNC = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
FILL = "mad.lo.u32 %v, %rank, 100, %lane; st.shared.b32 [%mine], %v;"
READ = "ld.shared::cluster.b32 %x, [%theirs]; st.global.b32 [%at], %x;"


def executed(code: str, executor: str = "core", schedule: int = 0, ctas: int = 2) -> np.ndarray:
    """Return what a cluster stores, 32 numbers of each CTA."""
    gpu = Gpu(SCHEDULES[schedule])
    out = gpu.tensor(torch.full((64,), -1, dtype=torch.int32))
    with by(executor):
        gpu.launch(HEAD.format(code=code, ctas=ctas), [out], (2, 1, 1), 256)
    return gpu.read(out).numpy().reshape(2, 32)


@pytest.mark.parametrize("schedule", range(3))
@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_cta_reads_and_writes_the_shared_memory_of_another(executor, schedule):
    lanes = np.arange(32)
    found = executed(FILL + SYNC + READ + SYNC, executor, schedule)
    assert found.tolist() == [(lanes + 100).tolist(), lanes.tolist()]
    written = "mad.lo.u32 %v, %rank, 100, %lane; st.shared::cluster.b32 [%theirs], %v;"
    code = f"{written} {SYNC} ld.shared.b32 %x, [%mine]; st.global.b32 [%at], %x;"
    assert executed(code, executor, schedule).tolist() == found.tolist()


@pytest.mark.parametrize(
    "name, expected",
    [
        ("%cluster_ctarank", [0, 1]),
        ("%cluster_nctarank", [2, 2]),
        ("%cluster_ctaid.x", [0, 1]),
        ("%cluster_nctaid.x", [2, 2]),
        ("%cluster_nctaid.y", [1, 1]),
        ("%clusterid.x", [0, 0]),
        ("%nclusterid.x", [1, 1]),
        ("%ctaid.x", [0, 1]),
        ("%nctaid.x", [2, 2]),
    ],
)
def test_special_registers(name, expected):
    found = executed(f"mov.u32 %v, {name}; st.global.b32 [%at], %v;")
    assert found[:, 0].tolist() == expected


def test_addresses_have_the_rank_of_their_cta():
    code = "getctarank.shared::cluster.u32 %v, [%theirs]; st.global.b32 [%at], %v;"
    assert executed(code.replace("[%theirs]", "%theirs"))[:, 0].tolist() == [1, 0]
    with pytest.raises(PtxError, match="a cluster of 2 CTAs has no rank 2"):
        executed("mapa.shared::cluster.u32 %v, %mine, 2;")


# Both CTAs wait at an mbarrier of their own; each arrives at that of the other one.
INIT = "@%first mbarrier.init.shared::cta.b64 [%mine], 1;"
FENCE = "@%first fence.mbarrier_init.release.cluster;"
RELAXED = "barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned;"
WAIT = """mov.b32 %x, global_smem;
wait: mbarrier.try_wait.parity.shared::cta.b64 %done, [%x], 0; @!%done bra wait;"""
# Each CTA stores its numbers behind the mbarrier of the other one, before it arrives.
SEND = "mad.lo.u32 %v, %rank, 100, %lane; st.shared::cluster.b32 [%theirs+128], %v;"
TAKE = "ld.shared.b32 %x, [%mine+128]; st.global.b32 [%at], %x;"
ARRIVE_BY_ALL = "mbarrier.arrive.shared::cluster.b64 _, [%other];"


def exchange(**left_out: bool) -> str:
    """Return a program that exchanges numbers by mbarriers, without some of its parts."""
    parts = {
        "init": INIT.replace(", 1;", ", 32;"),
        "fence": FENCE,
        "cluster": RELAXED,
        "send": SEND,
        "address": "mov.b32 %x, global_smem; mapa.shared::cluster.u32 %other, %x, %other;",
        "arrive": ARRIVE_BY_ALL,
        "wait": WAIT,
        "take": TAKE,
    }
    return "\n".join(text for name, text in parts.items() if not left_out.get(name))


@pytest.mark.parametrize("schedule", range(3))
@pytest.mark.parametrize("executor", EXECUTORS)
def test_an_mbarrier_of_another_cta_orders_what_was_sent(executor, schedule):
    lanes = np.arange(32)
    expected = [(lanes + 100).tolist(), lanes.tolist()]
    assert executed(exchange(), executor, schedule).tolist() == expected


STORE = (
    "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%theirs+128], %v, [%other];"
)


def asynchronous(bytes_expected: int) -> str:
    """Return a program that sends its numbers by ``st.async``."""
    expect = f"@%first mbarrier.arrive.expect_tx.shared::cta.b64 _, [%mine], {bytes_expected};"
    text = exchange(arrive=True).replace("], 32;", "], 1;")
    return text.replace(SEND, expect + SEND.split(";")[0] + ";").replace(WAIT, STORE + WAIT)


@pytest.mark.parametrize("schedule", range(3))
@pytest.mark.parametrize("executor", EXECUTORS)
def test_asynchronous_stores_are_counted_by_an_mbarrier(executor, schedule):
    lanes = np.arange(32)
    expected = [(lanes + 100).tolist(), lanes.tolist()]
    assert executed(asynchronous(128), executor, schedule).tolist() == expected


FAULTS = {
    "a read without a cluster barrier": (
        FILL + READ + SYNC,
        r"CTA [01] was not written|of CTA [01] writes",
    ),
    "a read after a relaxed barrier": (FILL + RELAXED + READ + SYNC, "which a store of warp 0"),
    "no barrier behind a read": (
        FILL + SYNC + READ,
        "(which has ended|which may have ended: this CTA does not wait for the access)",
    ),
    "a write that nobody waits for": (
        "st.shared::cluster.b32 [%theirs], %lane;",
        "(which has ended|which may have ended: this CTA does not wait for the access)",
    ),
    "an arrival that nobody waits for": (exchange(wait=True, take=True), "ended"),
    "an mbarrier without a fence": (exchange(fence=True), "which a store of warp 0 of CTA"),
    "a CTA that waits elsewhere": (
        f"{INIT} @%is1 bra elsewhere; {SYNC} bra end; elsewhere: {WAIT} end:",
        r"wait for what nobody will do: 0 of CTA 0 at .*, 0 of CTA 1 at .* 1 arrival\)",
    ),
    "a wait without an arrival": ("barrier.cluster.wait.aligned;", "at which it did not arrive"),
    "two arrivals": ("barrier.cluster.arrive.aligned; " * 2, "arrives twice at the cluster"),
    "no arrival at the mbarrier": (exchange(arrive=True), "its mbarrier expects 32 arrivals"),
    "numbers taken before they came": (exchange(wait=True), "was not written|which .* writes"),
    "too many bytes expected": (asynchronous(132), "its mbarrier expects 4 bytes"),
    "too few bytes expected": (
        asynchronous(124),
        "got (unexpected bytes|4 bytes that it did not expect)",
    ),
}


@pytest.mark.parametrize("schedule", range(3))
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("name", FAULTS)
def test_fault_of_a_cluster_is_found(name, executor, schedule):
    code, message = FAULTS[name]
    with pytest.raises(PtxError, match=message):
        executed(code, executor, schedule)


def test_a_cta_that_has_ended_is_not_waited_for():
    """9.7.13: the barrier is that of threads that have not ended."""
    code = f"@%is1 bra end; {SYNC} st.global.b32 [%at], %lane; end:"
    assert executed(code).tolist() == [list(range(32)), [-1] * 32]


def test_a_grid_is_a_multiple_of_the_cluster():
    with pytest.raises(ValueError, match=r"the grid is \(2, 1, 1\) CTAs, expected a multiple of"):
        executed("", ctas=4)
    text = HEAD.format(code="", ctas="2, 4, 1")
    assert parse(text).cluster == (2, 4, 1)
