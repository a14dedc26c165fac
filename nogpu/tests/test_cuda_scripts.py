# SPDX-License-Identifier: MIT
"""Scripts and tests that say "cuda": the plugin's flag, stand-ins for libraries, and advice."""

import textwrap

import pytest
import torch
from processes import ROOT

from nogpu import command
from nogpu.cuda import advice
from nogpu.cuda.advice import advise
from nogpu.numba.numba_stand_in import has_numba_cuda

pytest_plugins = ["pytester"]

NEEDS_CUDA = 'a script that launches kernels only for device="cuda" needs --cuda-is-cpu'
TEST = """
import pytest
import torch
import triton
import triton.language as tl

DEVICE = torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@triton.jit
def scale(x, out, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(out + i, 2 * tl.load(x + i, mask=i < n), mask=i < n)


def test_scale():
    x = torch.randn(1000, device="cuda")
    out = torch.empty_like(x)
    scale[(4,)](x, out, 1000, B=256)
    torch.testing.assert_close(out, 2 * x)


def test_wrong():
    x = torch.randn(1000, device=DEVICE)
    scale[(4,)](x, torch.empty_like(x), 1001, B=256)
"""


pytestmark = pytest.mark.usefixtures("without_simulator")


def run_tests(pytester, tests: str, *flags: str):
    pytester.makeconftest("import torch\nFOUND = torch.cuda.is_available()")
    pytester.makepyfile(tests)
    pytester.makeini(f"[pytest]\npythonpath = {ROOT}")
    return pytester.runpytest_inprocess(*flags)


def test_the_plugin_lets_cuda_be_the_cpu(pytester):
    """Also where modules are imported, and afterwards no more."""
    found = run_tests(pytester, TEST, "--nogpu", "--cuda-is-cpu")
    found.assert_outcomes(passed=1, failed=1)
    assert "out of bounds in scale" in found.stdout.str()
    assert torch.cuda.is_available.__module__ == "torch.cuda"


def test_an_error_is_told_of_the_flag_once():
    """Pytest raises the error of a module's fixture again in each of its tests."""
    error = RuntimeError("Found no NVIDIA driver on your system")
    for _ in range(3):
        advise(error)
    assert error.__notes__ == [NEEDS_CUDA]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the test's tensor would be made")
def test_a_test_that_says_cuda_is_told_of_the_flag(pytester):
    test = "import torch\ndef test():\n    torch.ones(3, device='cuda')"
    found = run_tests(pytester, test, "--nogpu")
    found.assert_outcomes(failed=1)
    assert NEEDS_CUDA in found.stdout.str()


def test_the_flag_alone_names_no_gpu(pytester):
    found = run_tests(pytester, "def test(): ...", "--cuda-is-cpu")
    assert found.ret == pytest.ExitCode.USAGE_ERROR
    found.stderr.fnmatch_lines(["*--cuda-is-cpu needs --nogpu, which executes the kernels*"])


def run_script(tmp_path, code: str, *flags: str) -> int:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(code), "utf-8")
    return command.main([*flags, str(script)])


def test_stand_ins_for_libraries_multiply_or_fail_when_they_are_used(tmp_path):
    code = """
        import torch
        from triton._C.libtriton import nvidia

        cublas = nvidia.cublas.CublasLt(torch.empty(1024, device="cuda", dtype=torch.uint8))
        add = torch.cuda._compile_kernel('extern "C"', "add")
        a, b, c = (torch.randn(n, 7, device="cuda").half() for n in (5, 3, 5))
        out = torch.empty(5, 3, device="cuda", dtype=torch.half)
        cublas.matmul(a, b, out)
        assert torch.equal(out, (a.float() @ b.float().T).half())
        cublas.gemm(a, b, c[:, :3], out, 2.0, 0.5)
        assert torch.equal(out, (2 * (a.float() @ b.float().T) + 0.5 * c[:, :3].float()).half())
        for use in (lambda: add((1,), (1,), []), lambda: cublas.block_scaled_matmul_nvfp4(a)):
            try:
                use()
            except NotImplementedError as e:
                assert "not emulated" in str(e)
            else:
                raise AssertionError("not refused")
        try:
            cublas.matmul(a, c[:, :3], out)
        except RuntimeError as e:
            assert "expected (M, K), (N, K) and (M, N)" in str(e)
    """
    assert run_script(tmp_path, code, "--cuda-is-cpu") == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("end", ["sys.exit('no GPU')", "sys.exit(0)", "raise ValueError('no GPU')"])
def test_a_script_that_ends_itself_without_a_gpu_is_told_of_the_flag(end, tmp_path, capsys):
    code = f"import sys, torch\nif not torch.cuda.is_available(): {end}"
    try:
        assert run_script(tmp_path, code) == 0
    except (SystemExit, ValueError) as e:
        notes = getattr(e, "__notes__", [])
    else:
        notes = []
    assert NEEDS_CUDA in capsys.readouterr().out + "".join(notes)


NUMBA = """
    import numpy as np, torch
    from numba import cuda

    @cuda.jit
    def double(x):
        x[cuda.grid(1)] *= 2

    @cuda.jit(device=True)
    def twice(x):
        return 2 * x

    assert not cuda.is_available()
"""
# The line that asks for a GPU, and whether it needs a tensor of the emulated one.
OF_NUMBA = {
    "a launch": ("double[1, 32](np.ones(32))", False),
    "a launch with a tensor": ("double[1, 32](torch.ones(32, device='cuda'))", True),
    "a signature": ("cuda.jit('void(float32[:])')(double.py_func)", False),
    "a copy": ("cuda.to_device(np.ones(32))", False),
    "a tensor's interface": ("cuda.as_cuda_array(torch.ones(32, device='cuda'))", True),
    "the GPUs": ("len(cuda.gpus)", False),
}


# Where the flag is missing, or numba-cuda, and what the line says.
SAID = advice.NEEDS_FLAG if has_numba_cuda() else advice.NO_NUMBA_CUDA
executed = pytest.mark.skipif(
    has_numba_cuda(), reason="numba-cuda executes it, as test_numba_programs.py tests"
)


@pytest.mark.filterwarnings("ignore:.*Grid size")
@pytest.mark.skipif(torch.cuda.is_available(), reason="Numba has a GPU")
@pytest.mark.parametrize("cuda_is_cpu", [False, pytest.param(True, marks=executed)])
@pytest.mark.parametrize("name", OF_NUMBA)
def test_a_script_that_launches_kernels_of_numba_ends_in_a_line(
    name, cuda_is_cpu, tmp_path, capsys
):
    pytest.importorskip("numba.cuda", reason="the script launches by numba.cuda")
    line, needs_flag = OF_NUMBA[name]
    if needs_flag and not cuda_is_cpu:
        pytest.skip("only --cuda-is-cpu has tensors to pass")
    flags = ["--cuda-is-cpu"] * cuda_is_cpu
    assert run_script(tmp_path, f"{NUMBA}    {line}", *flags) == 1
    found = capsys.readouterr()
    assert f"        {line}\n    {SAID}\nlaunches: 0; 1 error, 0 warn" in found.out
    assert found.err.endswith(f"python -m nogpu: error: {SAID}\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="Numba has a GPU")
@pytest.mark.parametrize("line", ["", "raise ValueError('mine')", "double[1,]"])
def test_a_script_may_define_kernels_of_numba_and_fail_for_another_reason(line, tmp_path, capsys):
    pytest.importorskip("numba.cuda", reason="the script launches by numba.cuda")
    lines = """
    try:
        cuda.to_device(np.ones(32))
    except Exception:
        print("no GPU")
    """
    if not line:
        assert run_script(tmp_path, NUMBA + lines) == 0
        assert capsys.readouterr().out.startswith("no GPU\nlaunches: 0; 0 errors")
        return
    with pytest.raises(ValueError, match=r"mine|griddim") as caught:
        run_script(tmp_path, NUMBA + lines + line)
    assert not advice.is_of_numba(caught.value)


def test_a_test_that_launches_a_kernel_of_numba_is_told_what_executes_it(pytester):
    pytest.importorskip("numba.cuda", reason="the script launches by numba.cuda")
    test = "from numba import cuda\ndef test():\n    cuda.to_device([1.0])"
    for flags in ([], ["--cuda-is-cpu"]):
        found = run_tests(pytester, test, "--nogpu", *flags)
        if flags and has_numba_cuda():
            found.assert_outcomes(passed=1)
            continue
        found.assert_outcomes(failed=1)
        assert SAID in found.stdout.str()


@pytest.mark.parametrize("is_there", [False, True])
def test_a_script_whose_kernels_the_simulator_executes_is_told_what_checks_them(
    is_there, monkeypatch
):
    monkeypatch.setattr(advice, "has_numba_cuda", lambda: is_there)
    assert ("pip install 'numba-cuda[cu13]'" in advice.why_simulated()) is not is_there
    assert advice.why_simulated().endswith("unset NUMBA_ENABLE_CUDASIM")


def test_a_grid_without_a_program_is_named(tmp_path, capsys):
    code = """
        import torch, triton, triton.language as tl

        @triton.jit
        def double(x):
            tl.store(x, 2 * tl.load(x))

        double[(0,)](torch.ones(1))
    """
    assert run_script(tmp_path, code) == 0
    out = capsys.readouterr().out
    assert "no kernel was launched; the grid of double is (0, 1, 1), without a program; " in out
    assert NEEDS_CUDA not in out


def test_a_file_that_is_no_program_is_not_told_of_the_flag(tmp_path, capsys):
    with pytest.raises(SyntaxError) as caught:
        run_script(tmp_path, "This page says cuda")
    assert not getattr(caught.value, "__notes__", [])
    assert NEEDS_CUDA not in capsys.readouterr().out
