# SPDX-License-Identifier: MIT
"""The instructions of the PTX ISA 9.0, and a program that executes each one that is known once.

`page` is what docs/ptx_instructions.md says of them.
"""

from nogpu.machine.decode import builder_of, unknown
from nogpu.native.encoding import PUBLICATION

PUBLISH = f"tensormap.cp_fenceproxy:{PUBLICATION}"
MBARRIER, TMA = "shared::cta.b64", "global.shared::cta.bulk_group"
# By section; a form behind ":" where the name alone is not enough to tell.
SECTIONS = {
    "9.7.1 integers": """add sub mul:mul.lo.s32 mad:mad.lo.s32 mul24 mad24 sad div rem abs neg min
        max popc clz bfind fns brev bfe bfi szext bmsk dp4a dp2a""",
    "9.7.2 integers with carry": "add.cc addc sub.cc subc mad.cc:mad.lo.cc.u32 madc",
    "9.7.3 to 9.7.5 floating point": """testp copysign fma rcp:rcp.rn.f32 sqrt:sqrt.rn.f32
        rsqrt:rsqrt.approx.f32 sin:sin.approx.f32 cos:cos.approx.f32 lg2:lg2.approx.f32
        ex2:ex2.approx.f32 tanh:tanh.approx.f32""",
    "9.7.6 and 9.7.7 comparisons": "set setp selp slct",
    "9.7.8 logic and shifts": "and or xor not cnot lop3:lop3.b32 shf shl shr",
    "9.7.9 moves": f"""mov shfl.sync prmt:prmt.b32 ld ldu st st.async:st.async.weak st.bulk
        multimem.ld_reduce multimem.st multimem.red prefetch prefetchu applypriority discard
        createpolicy isspacep cvta cvt cvt.pack:cvt.pack.sat mapa:mapa.shared::cluster.u32
        getctarank:getctarank.shared::cluster.u32
        cp.async:cp.async.ca.shared.global cp.async.commit_group cp.async.wait_group
        cp.async.wait_all cp.async.bulk:cp.async.bulk.shared::cta.global
        cp.reduce.async.bulk:cp.reduce.async.bulk.global cp.async.bulk.prefetch
        cp.async.bulk.commit_group cp.async.bulk.wait_group
        cp.async.bulk.tensor:cp.async.bulk.tensor.2d.{TMA}
        cp.reduce.async.bulk.tensor:cp.reduce.async.bulk.tensor.2d.global.shared::cta
        cp.async.bulk.prefetch.tensor tensormap.replace:tensormap.replace.tile""",
    "9.7.10 and 9.7.11 textures and surfaces": "tex tld4 txq istypep suld sust sured suq",
    "9.7.12 control flow": "bra brx.idx call ret exit",
    "9.7.13 synchronization": f"""bar:bar.sync barrier:barrier.sync bar.warp.sync bar.red
        barrier.cluster:barrier.cluster.arrive membar fence atom red red.async:red.async.relaxed
    vote.sync match.any.sync
        match.all.sync activemask:activemask.b32 redux.sync
        griddepcontrol:griddepcontrol.wait elect.sync
        mbarrier.init:mbarrier.init.{MBARRIER} mbarrier.inval:mbarrier.inval.{MBARRIER}
        mbarrier.expect_tx mbarrier.complete_tx mbarrier.arrive:mbarrier.arrive.{MBARRIER}
        mbarrier.arrive.expect_tx:mbarrier.arrive.expect_tx.{MBARRIER} mbarrier.arrive_drop
        mbarrier.test_wait mbarrier.try_wait:mbarrier.try_wait.parity.{MBARRIER}
        mbarrier.pending_count cp.async.mbarrier.arrive
        {PUBLISH}
        clusterlaunchcontrol.try_cancel clusterlaunchcontrol.query_cancel""",
    "9.7.14 products of a warp": """wmma.load wmma.store wmma.mma mma:mma.sync.aligned mma.sp
        ldmatrix stmatrix movmatrix""",
    "9.7.15 products of a warpgroup": """wgmma.mma_async:wgmma.mma_async.sync.aligned
        wgmma.mma_async.sp wgmma.fence:wgmma.fence.sync.aligned
        wgmma.commit_group:wgmma.commit_group.sync.aligned
        wgmma.wait_group:wgmma.wait_group.sync.aligned""",
    "9.7.16 products of sm_100": """tcgen05.alloc tcgen05.dealloc tcgen05.relinquish_alloc_permit
        tcgen05.ld tcgen05.st tcgen05.wait:tcgen05.wait::ld tcgen05.cp tcgen05.shift
        tcgen05.mma:tcgen05.mma.cta_group::1 tcgen05.mma.sp tcgen05.mma.ws
        tcgen05.fence:tcgen05.fence::after_thread_sync
        tcgen05.commit:tcgen05.commit.cta_group::1""",
    "9.7.17 stack": "stacksave stackrestore alloca",
    "9.7.18 video": """vadd vsub vabsdiff vmin vmax vshl vshr vmad vset vadd2 vsub2 vavrg2 vabsdiff2
        vmin2 vmax2 vset2 vadd4 vsub4 vavrg4 vabsdiff4 vmin4 vmax4 vset4""",
    "9.7.19 others": "brkpt trap nanosleep pmevent setmaxnreg",
}  # fmt: skip
# One warp executes these. %lane, the address d1 of 32 words, a word s of shared memory of each
# thread, a row t of 16 bytes of it, and an mbarrier at m are given.
SIMPLE = """
add.s32 r1, %lane, 1; sub.s32 r2, r1, 1; mul.lo.s32 r2, r1, r1; mad.lo.s32 r2, r1, r1, r1;
mul24.lo.s32 r2, r1, r1; mad24.lo.s32 r2, r1, r1, r1; sad.s32 r2, r1, r1, r1; div.s32 r2, r1, 3;
rem.s32 r2, r1, 3; abs.s32 r2, r1; neg.s32 r2, r1; min.s32 r2, r1, 3; max.s32 r2, r1, 3;
popc.b32 r2, r1; clz.b32 r2, r1; bfind.u32 r2, r1; fns.b32 r2, r1, 0, 1; brev.b32 r2, r1;
bfe.u32 r2, r1, 1, 2; bfi.b32 r2, r1, r1, 1, 2; szext.clamp.s32 r2, r1, 4; bmsk.clamp.b32 r2, 1, 4;
dp4a.s32.s32 r2, r1, r1, r1; add.cc.u32 r2, r1, r1; addc.u32 r2, r1, r1; sub.cc.u32 r2, r1, r1;
subc.u32 r2, r1, r1; mad.lo.cc.u32 r2, r1, r1, r1; madc.hi.u32 r2, r1, r1, r1;
cvt.rn.f32.s32 f1, r1; testp.finite.f32 p, f1; copysign.f32 f2, f1, f1; fma.rn.f32 f2, f1, f1, f1;
rcp.rn.f32 f2, f1; sqrt.rn.f32 f2, f1; rsqrt.approx.f32 f2, f1; sin.approx.f32 f2, f1;
cos.approx.f32 f2, f1; lg2.approx.f32 f2, f1; ex2.approx.f32 f2, f1; tanh.approx.f32 f2, f1;
set.gt.u32.f32 r2, f1, f1; setp.gt.f32 p, f1, f1; selp.b32 r2, r1, r1, p;
slct.b32.s32 r2, r1, r1, r1; and.b32 r2, r1, 1; or.b32 r2, r1, 1; xor.b32 r2, r1, 1; not.b32 r2, r1;
lop3.b32 r2, r1, r1, r1, 0x80; shf.l.wrap.b32 r2, r1, r1, 3; shl.b32 r2, r1, 3; shr.u32 r2, r1, 3;
mov.b32 r2, r1; shfl.sync.bfly.b32 r2, r1, 1, 0x1f, -1; prmt.b32 r2, r1, r1, 0x3210;
ld.global.b32 r2, [d1]; st.global.b32 [d1], r2; prefetch.global.L2 [d1];
discard.global.L2 [d1], 128;
createpolicy.fractional.L2::evict_last.b64 d2, 1.0; cvta.to.global.u64 d2, d1;
cp.async.ca.shared.global [s], [d1], 4, 4; cp.async.commit_group; cp.async.wait_group 0;
bar.sync 0; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {r2}, [t]; barrier.sync 0;
stmatrix.sync.aligned.m8n8.x1.shared.b16 [t], {r2}; bra next;
next: bar.warp.sync -1; membar.gl; fence.acq_rel.gpu; atom.global.add.u32 r2, [d1], 1;
red.global.add.u32 [d1], 1; vote.sync.any.pred p, p, -1; match.any.sync.b32 r2, r1, -1;
match.all.sync.b32 r2|p, r1, -1; activemask.b32 r2; redux.sync.add.s32 r2, r1, -1;
griddepcontrol.launch_dependents; griddepcontrol.wait; nanosleep.u32 100;
setmaxnreg.inc.sync.aligned.u32 64;
vabsdiff4.u32.u32.u32 r2, r1, r1, r1; tcgen05.fence::after_thread_sync;
mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32
    {f1, f2, f3, f4}, {z, z, z, z}, {z, z}, {z, z, z, z};
elect.sync r2|p, -1;
@p mbarrier.init.shared::cta.b64 [m], 1; bar.sync 0;
@p mbarrier.arrive.shared::cta.b64 _, [m]; mbarrier.try_wait.parity.shared::cta.b64 q, [m], 0;
@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [m], 4;
@p st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [s], r1, [m];
mbarrier.try_wait.parity.shared::cta.b64 q, [m], 1; mapa.shared::cluster.u32 r2, s, 0;
getctarank.shared::cluster.u32 r2, s; barrier.cluster.arrive.release.aligned;
barrier.cluster.wait.acquire.aligned; bar.sync 0; @p mbarrier.inval.shared::cta.b64 [m];
mov.u32 r2, 0;
list: .branchtargets last, last;
brx.idx r2, list;
last: ret;
"""
TRAPS = "trap", "brkpt"  # each ends its program
# Not known, of families that are
REFUSED = {
    "st.bulk": "st.bulk.weak.shared::cta [s], 16, 0;",
    "red.async": "red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.add.u32 "
    "[s], r1, [m];",
    "cvt.pack": "cvt.pack.sat.s16.s32 r2, r1, r1;",
}
# Executed by kernels of Triton: their operands are layouts in memory
BY_KERNELS = ("tcgen05", "wgmma", "cp.async.bulk", "cp.reduce", "tensormap", "call",
              "mbarrier.arrive.expect_tx")  # fmt: skip


def entries() -> list[tuple[str, str, str]]:
    """The section, the name and a form of each instruction."""
    return [
        (section, name, form or name)
        for section, names in SECTIONS.items()
        for name, _, form in (one.partition(":") if "::" not in one.split(":")[0] else (one, "", "")
                              for one in names.split())
    ]  # fmt: skip


def is_known(form: str) -> bool:
    is_refused = any(form == one or form.startswith(f"{one}.") for one in REFUSED)
    return builder_of(form)[0] is not unknown and not is_refused


def name_of(opcode: str) -> str:
    """The instruction that an opcode is a form of: the longest that matches."""
    found = [
        (len(start), name)
        for _, name, form in entries()
        for start in {name, form}
        if opcode == start or opcode.startswith((f"{start}.", f"{start}::"))
    ]
    return max(found)[1] if found else ""


def page() -> list[str]:
    """The lines of the table."""
    lines = ["| section | known | not known |", "|---|---|---|"]
    for section in SECTIONS:
        mine = [(name, is_known(form)) for of, name, form in entries() if of == section]
        known, unknown = (
            ", ".join(f"`{name}`" for name, one in mine if one is wanted)
            for wanted in (True, False)
        )
        lines.append(f"| {section} | {known} | {unknown} |")
    return lines
