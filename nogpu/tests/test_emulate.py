# SPDX-License-Identifier: MIT
"""The emulator of a GPU: right kernels have right values and no fault, wrong ones are named.

Kernels are compiled for each architecture, and their PTX is executed.
"""

import os
import re
import subprocess
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from processes import ROOT, forked
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.driver import driver as active_driver

from nogpu import command, emulate
from nogpu.cuda.stand_in import cuda_is_cpu
from nogpu.record import resources
from nogpu.record.faults import Fault
from nogpu.record.source import STARTED_IN

pytest_plugins = ["pytester"]
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
slow = pytest.mark.slow


@triton.jit
def add(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    tl.store(out + i, tl.load(x + i, mask=inside) + tl.load(y + i, mask=inside), mask=inside)


@triton.jit
def add_unmasked(x, y, out, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i) + tl.load(y + i))


@triton.jit
def multiply(a, b, c, k, BLOCK: tl.constexpr, STEP: tl.constexpr):
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, k, STEP):
        steps = start + tl.arange(0, STEP)
        left = tl.load(a + m[:, None] * k + steps[None, :])
        right = tl.load(b + n[None, :] * k + steps[:, None])
        total = tl.dot(left, right, total)
    width = tl.num_programs(1) * BLOCK
    tl.store(c + m[:, None] * width + n[None, :], total)


@triton.jit
def sum_by_atomics(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(out, tl.sum(tl.load(x + i, mask=i < n, other=0.0)))


@triton.jit
def sum_without_atomics(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.sum(tl.load(x + i, mask=i < n, other=0.0))
    tl.store(out, tl.load(out) + total)


@triton.jit
def sum_under_lock(x, lock, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.sum(tl.load(x + i, mask=i < n, other=0.0))
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    tl.store(out, tl.load(out) + total)
    tl.debug_barrier()
    tl.atomic_xchg(lock, 0)


@triton.jit
def sum_after_unlock(x, lock, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.sum(tl.load(x + i, mask=i < n, other=0.0))
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    before = tl.load(out)
    tl.atomic_xchg(lock, 0)
    tl.store(out, before + total)


@triton.jit
def wait_for_the_last(flag):
    if tl.program_id(0) == 0:
        while tl.atomic_add(flag, 0) == 0:
            pass
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.atomic_xchg(flag, 1)


@triton.jit
def wait_for_nobody(flag):
    while tl.atomic_add(flag, 0) == 0:
        pass


@triton.jit
def add_in_place(x, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + i) + 1)


@triton.jit
def add_by_address(table, BLOCK: tl.constexpr):
    x = tl.load(table).to(tl.pointer_type(tl.float32)) + tl.arange(0, BLOCK)
    tl.store(x, tl.load(x) + 1)


@triton.jit
def print_and_check(x, BLOCK: tl.constexpr):
    value = tl.load(x + tl.arange(0, BLOCK))
    tl.device_print("value", value)
    tl.device_assert(value < 40.0, "too large")


def only(faults: list[Fault], name: str) -> Fault:
    errors = [fault for fault in faults if fault.kind == "error"]
    assert {fault.name for fault in errors} == {name}, errors
    return errors[0]


def line_of(kernel, text: str) -> tuple[str, int]:
    """The file and the line of a kernel's source that has ``text``."""
    lines = Path(__file__).read_text().splitlines()
    start = kernel.fn.__code__.co_firstlineno
    return __file__, next(n for n in range(start, len(lines)) if text in lines[n - 1])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_right_kernels_have_right_values_and_no_faults(arch):
    x, y = torch.randn(1000), torch.randn(1000)
    a, b = torch.randn(128, 64).half(), torch.randn(128, 64).half()
    with emulate(arch, schedules="all") as gpu:
        out, product = torch.empty(1000), torch.empty(128, 128)
        add[(4,)](x, y, out, 1000, BLOCK=256)
        if arch != "sm_100":
            multiply[(2, 2)](a, b, product, 64, BLOCK=64, STEP=32)
    assert torch.equal(out, x + y)
    if arch != "sm_100":
        exact = a.double() @ b.double().T
        bound = 64 * 2**-24 * (a.double().abs() @ b.double().abs().T)
        assert ((product - exact).abs() <= bound).all()
    assert gpu.faults == []
    assert gpu.launches[0].kernel == "add"
    assert gpu.launches[0].grid == (4, 1, 1)
    assert str(gpu.report()).endswith(
        f"launches: {len(gpu.launches)}; 0 errors, 0 warnings, 0 notes"
    )


def test_an_access_outside_of_a_tensor_names_the_element_and_the_line():
    x, out = torch.randn(1000), torch.zeros(1000)
    with emulate() as gpu:
        add_unmasked[(4,)](x, x, out, BLOCK=256)
    fault = only(gpu.faults, "out of bounds")
    assert fault.source == line_of(add_unmasked, "tl.store(")
    assert fault.program == (3, 0, 0)
    assert "loads element 1000 of the storage of x, which is outside of x" in fault.message
    assert any("stores element 1000 of the storage of out" in one.message for one in gpu.faults)
    assert torch.equal(out, x + x)  # the others are computed
    assert fault.launched == (__file__, _line_in(__file__, "add_unmasked[(4,)](x, x, out"))
    shown = __file__.removeprefix(f"{STARTED_IN}/")
    assert f"launched at {shown}:" in str(fault)
    assert f"Launched at {shown}, line " in gpu.report().as_html("add")


def _line_in(path: str, code: str) -> int:
    lines = Path(path).read_text("utf-8").splitlines()
    return next(n for n, line in enumerate(lines, 1) if line.strip().startswith(code))


@triton.jit
def add_numbered(x1, x2, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x1 + i) + tl.load(x2 + i), mask=i < n)


def test_tensors_of_one_line_whose_names_differ_in_a_number_are_two_faults():
    x1, x2 = torch.randn(1000), torch.randn(1000)
    with emulate() as gpu:
        add_numbered[(4,)](x1, x2, torch.zeros(1000), 1000, BLOCK=256)
    names = [re.search(r"storage of (\w+)", one.message)[1] for one in gpu.faults]
    assert names == ["x1", "x2"]


@triton.jit
def shift_in_place(x, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    left = tl.load(x + i - 32, mask=(i >= 32) & (i < n), other=0.0)
    tl.store(x + i, left, mask=i < n)
    again = tl.load(x + i - 32, mask=(i >= 32) & (i < n), other=0.0)
    tl.store(x + i, again, mask=i < n)


def test_a_line_of_the_source_is_one_fault_that_names_the_other_line():
    with emulate() as gpu:
        shift_in_place[(1,)](torch.randn(500), 500, BLOCK=512)
    errors = [one for one in gpu.faults if one.kind == "error"]
    sources = [one.source for one in errors]
    assert len(sources) == len(set(sources))  # a line is four instructions of the PTX
    _, load = line_of(shift_in_place, "again =")
    _, store = line_of(shift_in_place, "tl.store(x + i, again")
    (fault,) = (one for one in errors if one.source[1] == load)
    assert fault.count > 1
    other = (
        f"which a store of warp 0 writes ({Path(__file__).name}:{store}), without waiting for it"
    )
    assert f"warp 1 reads x[96], {other}; the value is stored" in fault.message


def test_memory_that_nobody_has_written():
    x = torch.randn(1000)
    with emulate() as gpu:
        scratch, out = torch.empty(1000), torch.empty(1000)
        add[(4,)](x, scratch, out, 1000, BLOCK=256)
        fault = only(gpu.faults, "uninitialised memory")
        assert "y[0] was not written before; the value is stored" in fault.message
        assert fault.source == line_of(add, "tl.store(")
    with emulate() as gpu:
        scratch, out = torch.empty(1000), torch.empty(1000)
        scratch.fill_(1)
        add[(4,)](x, scratch, out, 1000, BLOCK=256)
        add[(4,)](x, out, scratch, 1000, BLOCK=256)  # a kernel has written out
        assert gpu.faults == []
        part = torch.empty(1000)
        add[(2,)](x, x, part, 512, BLOCK=256)
        add[(4,)](x, part, out, 1000, BLOCK=256)
        assert "y[512] was not written" in only(gpu.faults, "uninitialised memory").message


def test_programs_that_change_one_element():
    x = torch.randint(-9, 9, (1000,)).float()  # whose sums are exact in any order
    with emulate() as gpu:
        out, lock = torch.zeros(1), torch.zeros(1, dtype=torch.int32)
        sum_by_atomics[(4,)](x, out, 1000, BLOCK=256)
        sum_under_lock[(4,)](x, lock, out, 1000, BLOCK=256)
        assert gpu.faults == []
        torch.testing.assert_close(out, 2 * x.sum()[None])
        sum_without_atomics[(4,)](x, out, 1000, BLOCK=256)
    fault = only(gpu.faults, "race between programs")
    assert fault.source == line_of(sum_without_atomics, "tl.store(")
    with emulate() as gpu:
        sum_after_unlock[(4,)](x, lock, out, 1000, BLOCK=256)
    assert "race between programs" in {fault.name for fault in gpu.faults}
    lines = {fault.source for fault in gpu.faults if fault.name == "race between programs"}
    assert line_of(sum_after_unlock, "tl.store(") in lines


def test_a_program_may_wait_for_a_later_one_but_not_for_none():
    flag = torch.zeros(1, dtype=torch.int32)
    with emulate() as gpu:
        wait_for_the_last[(4,)](flag)
        assert gpu.faults == []
        assert flag.item() == 1
        flag.zero_()
        wait_for_nobody[(4,)](flag)
    fault = only(gpu.faults, "deadlock")
    assert "no other program writes" in fault.message
    assert fault.program in [(n, 0, 0) for n in range(4)]
    assert fault.launch == 2
    assert "(launch 2)" in str(fault)


def test_copies_of_a_small_tensor_in_several_warps_are_no_fault():
    """Several warps load what one of them overwrites, and discard it."""
    x = torch.arange(8.0)
    with emulate(schedules="all") as gpu:
        add_in_place[(1,)](x, BLOCK=8, num_warps=4)
    assert [fault for fault in gpu.faults if fault.kind == "error"] == []
    assert x.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]


def test_schedules_begin_with_the_same_memory():
    """Also that of tensors which are found by their addresses, and memory that is read-only."""
    x = torch.zeros(8)
    table = torch.tensor([x.data_ptr()])
    with emulate(schedules="all") as gpu:
        add_by_address[(1,)](table, BLOCK=8, num_warps=1)
    assert gpu.faults == []
    assert x.tolist() == [1.0] * 8


def test_operators_of_the_host_write_memory():
    x = torch.ones(8)
    with emulate() as gpu:
        first, second, third = torch.empty(8), torch.empty(8), torch.empty(8)
        torch.add(x, x, out=first)
        torch.sum(torch.ones(2, 8), 0, out=second)
        add[(1,)](first, second, third, 8, BLOCK=8)
        assert torch.empty(2, 2, layout=torch.sparse_coo).is_sparse
    assert gpu.faults == []
    assert third.tolist() == [4.0] * 8


def test_printing_and_assertions():
    with emulate() as gpu:
        print_and_check[(1,)](torch.arange(0.0, 32.0), BLOCK=32, num_warps=1, debug=True)
        assert gpu.faults == []
        printed = gpu.launches[0].printed
        assert len(printed) == 32
        assert printed[5].endswith("5.000000")
        assert printed[5] in str(gpu.report())
        print_and_check[(1,)](torch.arange(16.0, 48.0), BLOCK=32, num_warps=1, debug=True)
    fault = next(fault for fault in gpu.faults if fault.name == "assertion")
    assert "too large" in fault.message
    assert fault.source == line_of(print_and_check, "tl.device_assert(")


def test_what_is_not_emulated_is_refused():
    with pytest.raises(ValueError, match="arch is 'sm_70', expected one of sm_80, sm_90, sm_100"):
        emulate("sm_70").__enter__()
    with pytest.raises(ValueError, match="schedules is 'some'"):
        emulate(schedules="some").__enter__()


def test_afterwards_launches_go_where_they_went_before():
    before = triton.runtime.driver._active
    with emulate():
        assert triton.runtime.driver._active is not before
    assert triton.runtime.driver._active is before


SCRIPT = """
    import sys
    import torch
    import triton
    import triton.language as tl

    @triton.jit
    def copy(x, out, n, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out + i, tl.load(x + i), mask=i < n)

    x = torch.randn(int(sys.argv[1]), device="cuda")
    out = torch.empty_like(x)
    copy[(triton.cdiv(len(x), 64),)](x, out, len(x), BLOCK=64)
    print(torch.equal(x, out), x.is_cuda, torch.cuda.get_device_name())
"""


@pytest.mark.slow  # a process of its own
def test_the_command_runs_a_script_that_says_cuda(tmp_path, fork_server):
    script, page = tmp_path / "script.py", tmp_path / "page.html"
    script.write_text(textwrap.dedent(SCRIPT))
    command = ["-m", "nogpu", "--cuda-is-cpu"]
    code, out, err = forked(*command, "--arch", "sm_80", str(script), "128")
    assert code == 0, err
    assert out.splitlines()[0] == "True True NVIDIA A100"
    assert out.splitlines()[-1] == "launches: 1; 0 errors, 0 warnings, 0 notes"
    code, out, err = forked(*command, "--report", str(page), str(script), "100")
    assert code == 1, err
    store = SCRIPT.splitlines().index("        tl.store(out + i, tl.load(x + i), mask=i < n)")
    assert f"{script.name}:{store + 1} (line" in out
    assert "error: out of bounds in copy" in page.read_text("utf-8")
    assert ">1 launch<" in page.read_text("utf-8")
    code, _, err = forked(*command, str(tmp_path / "none.py"))
    assert code == 2
    assert "none.py is no file; name a Python script, or a file of CUDA C++" in err
    code, out, _ = forked(*command, "--help")
    assert code == 0
    assert "python -m nogpu judge --help" in out


@pytest.fixture
def home(monkeypatch, request):
    """The home folder, whose caches hold the emulator's library: that of `pytester` is empty."""
    before = os.environ["HOME"]
    request.getfixturevalue("pytester")
    monkeypatch.setenv("HOME", before)


@pytest.mark.slow  # a process of its own
def test_the_plugin_fails_tests_whose_kernels_are_wrong(home, pytester):
    imports = "import torch, triton, triton.language as tl\n"
    kernel = textwrap.dedent(SCRIPT).partition("@triton.jit")[2].partition("x = torch")[0]
    tests = """
def test_right():
    copy[(2,)](torch.randn(128), torch.empty(128), 128, BLOCK=64)

def test_wrong():
    copy[(2,)](torch.randn(100), torch.empty(100), 100, BLOCK=64)
"""
    pytester.makepyfile(f"{imports}@triton.jit{kernel}{tests}")
    pytester.makeini("[pytest]\npythonpath = " + str(ROOT))
    found = pytester.runpytest_subprocess("--nogpu")
    found.assert_outcomes(passed=1, failed=1)
    found.stdout.fnmatch_lines(["*error: out of bounds in copy*"])


def test_memory_that_the_host_fills_by_other_means_is_written():
    with emulate() as gpu:
        first, second, third = torch.empty(64), torch.empty(64), torch.empty(64)
        first.numpy()[:] = 1
        second.numpy()[3] = 1  # the other elements hold whatever they held
        add[(1,)](first, second, third, 64, BLOCK=64)
    assert gpu.faults == []


def test_tensors_may_share_memory_that_numpy_owns():
    whole = np.zeros(96, np.float32)
    low, high = torch.from_numpy(whole[:64]), torch.from_numpy(whole[32:])
    with emulate() as gpu:
        add[(1,)](low, high, high, 64, BLOCK=64)  # a program reads and writes the same elements
        add[(1,)](torch.from_numpy(whole), low, torch.zeros(64), 64, BLOCK=64)
    assert {fault.name for fault in gpu.faults} == {"race"}
    with emulate() as gpu:
        inner, outer = torch.from_numpy(whole[8:16]), torch.from_numpy(whole)
        add[(1,)](inner, outer, torch.zeros(8), 8, BLOCK=64)
    assert [fault.name for fault in gpu.faults] == []


@triton.autotune([triton.Config({"BLOCK": 32}), triton.Config({"BLOCK": 64})], key=["n"])
@triton.jit
def tuned_add(x, y, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, at < n) + tl.load(y + at, at < n), at < n)


def test_autotuned_kernels_say_which_configuration_they_take():
    """A later GPU chooses for itself."""
    x, out = torch.ones(100), torch.zeros(100)
    with emulate() as gpu:
        tuned_add[lambda meta: (triton.cdiv(100, meta["BLOCK"]),)](x, x, out, 100)
    assert out.tolist() == [2.0] * 100
    assert "BLOCK: 32" in gpu.launches[0].configuration
    assert "autotuned: BLOCK: 32" in str(gpu.report())
    assert tuned_add.cache == {}


def test_a_grid_that_no_gpu_takes_is_refused():
    with emulate(), pytest.raises(ValueError, match="at most 65,535"):
        add[(1, 70_000)](torch.ones(1), torch.ones(1), torch.ones(1), 1, BLOCK=1)


def test_an_emulator_within_another_one_takes_the_launches():
    x, out = torch.ones(8), torch.empty(8)
    with emulate("sm_80") as outer:
        late = torch.empty(8)
        with emulate("sm_100") as inner:
            add[(1,)](x, x, late, 8, BLOCK=8)
        add[(1,)](x, late, out, 8, BLOCK=8, num_warps=1)
    assert [launch.arch for launch in outer.launches + inner.launches] == ["sm_80", "sm_100"]
    assert outer.faults == inner.faults == []
    assert out.tolist() == [3.0] * 8


def within(context, make):
    with context:
        return make()


ON_CUDA = {
    "a device with an index": lambda: torch.ones(64, device=torch.device("cuda", 0)),
    "an index": lambda: torch.ones(64, device=0),
    "to an index": lambda: torch.ones(64).to(0),
    "to a name": lambda: torch.ones(64).to("cuda:0", non_blocking=True),
    "from pinned memory": lambda: torch.ones(64).pin_memory().cuda(non_blocking=True),
    "a generator": lambda: torch.rand(
        64, device="cuda", generator=torch.Generator(device="cuda").manual_seed(1)
    ),
    "a block of a device": lambda: within(torch.device("cuda"), lambda: torch.ones(64)),
    "a module": lambda: torch.nn.Linear(64, 1).cuda().weight.detach()[0],
    "autocast": lambda: within(torch.autocast("cuda"), lambda: torch.ones(64, device="cuda")),
    "memory": lambda: torch.ones(64, device="cuda") * torch.cuda.device_count(),
}


@pytest.mark.parametrize("form", ON_CUDA)
def test_each_way_to_say_cuda_means_the_cpu(form):
    with emulate() as gpu, cuda_is_cpu(gpu):
        x = ON_CUDA[form]()
        out = torch.empty_like(x, device="cuda")
        assert x.is_cuda
        add[(1,)](x, x, out, 64, BLOCK=64)
    assert torch.equal(out, x + x)
    assert gpu.faults == []


@pytest.mark.parametrize("arch, shared", [("sm_80", 166_912), ("sm_90", 232_448)])
def test_the_device_has_the_properties_of_the_gpu(arch, shared):
    with emulate(arch) as gpu, cuda_is_cpu(gpu):
        found = torch.cuda.get_device_properties(0)
    assert found.shared_memory_per_block_optin == shared
    assert found.multi_processor_count == gpu.multiprocessors


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_functions_run_uncompiled_and_their_kernels_are_executed(backend):
    @torch.compile(backend=backend)
    def double(x):
        out = torch.empty_like(x)
        add[(1,)](x, x, out, 64, BLOCK=64)
        return out

    with emulate() as gpu:
        assert double(torch.ones(64)).tolist() == [2.0] * 64
    assert [launch.kernel for launch in gpu.launches] == ["add"]


def test_the_command_refuses_what_cannot_work_before_the_script_runs(tmp_path, capsys, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit(7)")
    for flags, said in (
        ([f"--report={tmp_path}", str(script)], "cannot be written; name a file"),
        ([f"--report={tmp_path}/missing/page.html", str(script)], "cannot be written"),
        ([str(tmp_path)], "is no file; name a Python script"),
    ):
        with pytest.raises(SystemExit, match="2"):
            command.main(flags)
        assert said in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="2"):
        command.main([str(script)])
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
    with pytest.raises(ValueError, match="TRITON_INTERPRET is set"), emulate("sm_90"):
        pass


@triton.jit
def sort_rows(x, out, N: tl.constexpr):
    """Many values live at once."""
    i = tl.arange(0, N)
    a = tl.load(x + i)
    for step in tl.static_range(1, 4):
        a = a + tl.sum(a * step, 0) * tl.load(x + step * N + i)
    tl.store(out + i, a)


def taken_by(kernel, arch: str, folder: Path) -> tuple[int, int]:
    """Registers, and words of the stack, by NVIDIA's cuobjdump of the machine code."""
    ptxas = get_ptxas(int(arch.removeprefix("sm_"))).path
    text, code = folder / "kernel.ptx", folder / "kernel.cubin"
    text.write_text(kernel.asm["ptx"], "utf-8")
    target = re.search(r"\.target (\w+)", kernel.asm["ptx"])[1]
    subprocess.run([ptxas, f"--gpu-name={target}", text, "-o", code], check=True)
    dump = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", code]
    said = subprocess.run(dump, check=True, capture_output=True, text=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", said).groups()
    return int(registers), int(stack) // 4


@pytest.mark.parametrize(
    "arch", ["sm_90", *(pytest.param(a, marks=slow) for a in ARCHITECTURES[::2])]
)
def test_a_kernel_has_the_registers_and_spills_that_ptxas_says(arch, tmp_path, monkeypatch):
    """ptxas is asked when a program reads them, as Triton's tutorial 02 does before its launch."""
    asked, assemble = [], resources.assemble
    monkeypatch.setattr(resources, "assemble", lambda *a: asked.append(a) or assemble(*a))
    resources.resources.cache_clear()
    x, out = torch.randn(4 * 4096), torch.empty(4096)
    for most in (None, 24):
        options = {"maxnreg": most} if most else {}
        with emulate(arch) as gpu:
            kernel = sort_rows.warmup(x, out, N=4096, num_warps=4, grid=(1,), **options)
            kernel._init_handles()
            properties = active_driver.active.utils.get_device_properties(0)
            count = len(asked)
            found = kernel.n_regs, kernel.n_spills
        assert (count, len(asked)) == ((1, 2) if most else (0, 1))
        assert found == taken_by(kernel, arch, tmp_path)
        assert found == (kernel.n_regs, kernel.n_spills)
        assert bool(found[1]) == bool(most)  # what does not fit is on the stack
        assert kernel.n_max_threads == 128
        assert properties["max_num_regs"] // (found[0] * 128) > 0
        assert gpu.launches == []


def test_an_interrupted_script_shows_what_was_executed(tmp_path, capsys):
    script = tmp_path / "script.py"
    script.write_text("raise KeyboardInterrupt")
    assert command.main([str(script)]) == 130
    assert "launches: 0" in capsys.readouterr().out


def test_an_address_is_found_in_a_tensor_that_has_others_within():
    whole = np.zeros(96, np.float32)
    outer, inner = torch.from_numpy(whole), torch.from_numpy(whole[8:16])
    table = torch.tensor([outer.data_ptr() + 4 * 32])
    with emulate() as gpu:
        add_by_address[(1,)](table, BLOCK=8, num_warps=1)
    assert gpu.faults == []
    assert whole.sum() == inner.numel() == 8
