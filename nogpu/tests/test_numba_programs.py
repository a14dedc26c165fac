# SPDX-License-Identifier: MIT
"""Programs of numba.cuda, right and wrong, and what the report says of each."""

import json
import re
import runpy
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from nogpu import command, cuda_is_cpu, emulate
from nogpu.numba.numba_kernels import LaunchError
from nogpu.numba.numba_stand_in import _changes, has_numba_cuda

if not has_numba_cuda():
    reason = "numba-cuda is not installed: pip install 'numba-cuda[cu13]'"
    pytest.skip(reason, allow_module_level=True)
# numba-cuda takes the place of numba.cuda by a .pth, which is read in site-packages alone.
if find_spec("_numba_cuda_redirector"):
    import_module("_numba_cuda_redirector")

FOLDER = Path(__file__).with_name("numba_programs")
PROGRAMS = sorted(FOLDER.glob("*.py"))
# The first comment of a program, and of a wrong one the fault's name. A comment "# fault" stands at
# each line that the report may name.
COMMENT = re.compile(r"^# (Right|Wrong): (?:([\w ]+): )?", re.MULTILINE)
# What ends a wrong program, as it would on a GPU, or because it is refused.
ENDED_BY = (LaunchError, NotImplementedError)


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Grid size"),
    pytest.mark.filterwarnings("ignore:.*Host array"),
    pytest.mark.usefixtures("without_simulator"),
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.stem)
def test_program_of_numba(program, tmp_path, capsys):
    text, report = program.read_text("utf-8"), tmp_path / "report.json"
    kind, name = COMMENT.search(text).groups()
    lines = {n for n, line in enumerate(text.splitlines(), 1) if line.endswith("# fault")}
    status = 1
    with suppress(*ENDED_BY):
        status = command.main(["--cuda-is-cpu", f"--json={report}", str(program)])
    found = json.loads(report.read_text("utf-8"))["faults"]
    faults = [one for one in found if one["kind"] != "note"]
    out = capsys.readouterr().out
    if kind == "Right":
        assert (status, faults) == (0, []), out
        assert lines == set()
        return
    assert {(one["name"], one["source"]["line"] in lines) for one in faults} == {(name, True)}, out
    assert status == int(any(one["kind"] == "error" for one in faults)), out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize(
    "program",
    [one for one in PROGRAMS if COMMENT.search(one.read_text("utf-8"))[1] == "Right"],
    ids=lambda program: program.stem,
)
def test_right_program_of_numba_on_a_gpu(program):
    """A program checks its values itself."""
    runpy.run_path(str(program), run_name="__main__")


def test_half_of_the_programs_are_wrong():
    kinds = [COMMENT.search(program.read_text("utf-8"))[1] for program in PROGRAMS]
    assert kinds.count("Right") >= 10
    assert kinds.count("Wrong") >= 10


def test_replaced_names_are_those_of_numba_cuda():
    with emulate() as gpu, cuda_is_cpu(gpu):
        from numba.cuda.cudadrv import driver
    for place, changed in _changes(gpu):
        for name in changed:
            of_driver = place is driver.driver and name.startswith("cu")
            assert hasattr(driver.binding if of_driver else place, name), f"{place} lacks {name}"


KERNEL = """
import numpy as np, torch
from numba import cuda

@cuda.jit
def double(x):
    x[cuda.grid(1)] *= 2

"""
REFUSED = {
    "cuda.managed_array(4)": "managed_array(); take mapped_array()",
    "cuda.stream().add_callback(print)": "add_callback() and async_done(); call",
    "cuda.to_device(np.ones(4)).get_ipc_handle()": "get_ipc_handle(), for memory of another",
    "cuda.current_context().device.MAX_PITCH": "the attribute MAX_PITCH of the emulated GPU",
    "cuda.jit(double.py_func, link=['more.cu'])[1, 4](np.ones(4))": "the kernel links CUDA C++ or",
    "with torch.cuda.graph(torch.cuda.CUDAGraph()): double[1, 4](torch.ones(4, device='cuda'))": (
        "a launch of numba.cuda is not captured in a CUDA graph"
    ),
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_is_refused_is_named(line, tmp_path, capsys):
    (tmp_path / "script.py").write_text(KERNEL + line)
    with pytest.raises(NotImplementedError, match=re.escape(REFUSED[line])):
        command.main(["--cuda-is-cpu", str(tmp_path / "script.py")])
    out = capsys.readouterr().out
    assert "✗ error: not executed" in out
    assert f"script.py:9\n        {line}\n" in out


def test_a_kernel_takes_tensors(tmp_path, capsys):
    lines = """
x = torch.arange(8.0, device="cuda")
double[1, 6](x[2:])
assert x.tolist() == [0, 1, 4, 6, 8, 10, 12, 14]
double[1, 9](x)
double[1, 8](torch.ones(8))
"""
    (tmp_path / "script.py").write_text(KERNEL + lines)
    with pytest.raises(TypeError, match="a tensor of the host; pass its cuda"):
        command.main(["--cuda-is-cpu", str(tmp_path / "script.py")])
    out = capsys.readouterr().out
    assert "thread (8, 0, 0) stores element 8 of the storage of x, which is outside of x" in out


def test_a_launch_has_the_limits_of_one_in_cpp(tmp_path):
    launches = {
        "double[1, 2048](np.ones(4))": (
            "the block of double is (2048, 1, 1), 2,048 threads; expected 1 to 1,024 threads"
        ),
        "double[(1, 70_000), 1](np.ones(4))": (
            "the grid of double is (1, 70000, 1), expected 1 to (2147483647, 65535, 65535)"
        ),
        "double[1, 1, 0, 50_000](np.ones(4))": (
            "double takes 50,000 bytes of shared memory, 0 of them for its variables; a block of "
            "numba.cuda has at most 49,152"
        ),
        "cuda.jit(launch_bounds=64)(double.py_func)[1, 65](np.ones(65))": (
            "the block of double has 65 threads, and launch_bounds promises at most 64; launch"
        ),
    }
    for line, message in launches.items():
        (tmp_path / "script.py").write_text(KERNEL + line)
        with pytest.raises(LaunchError, match=re.escape(message)):
            command.main(["--cuda-is-cpu", str(tmp_path / "script.py")])


def test_dynamic_shared_memory_has_the_bytes_of_the_launch(tmp_path, capsys):
    lines = """
@cuda.jit
def reverse(x):
    buffer = cuda.shared.array(0, np.float64)
    buffer[cuda.threadIdx.x] = x[cuda.threadIdx.x]
    cuda.syncthreads()
    x[cuda.threadIdx.x] = buffer[cuda.blockDim.x - 1 - cuda.threadIdx.x]

reverse[1, 32, 0, 256](np.ones(32))
reverse[1, 32](np.ones(32))
"""
    (tmp_path / "script.py").write_text(KERNEL + lines)
    assert command.main(["--cuda-is-cpu", str(tmp_path / "script.py")]) == 1
    out = capsys.readouterr().out
    message = (
        "thread (0, 0, 0) stores byte 0 of dynamic shared memory, and the launch gives it 0 bytes; "
        "pass enough bytes as the fourth of [grid, block, stream, bytes], or a smaller index"
    )
    assert message in out
    assert "(launch 2)" in out


def test_kernels_outlive_an_emulator():
    with emulate() as gpu, cuda_is_cpu(gpu):
        from numba import cuda

        @cuda.jit
        def double(x):
            x[cuda.grid(1)] *= 2

        double[1, 4](np.ones(4))
    assert not cuda.is_available()
    with emulate() as gpu, cuda_is_cpu(gpu):
        x = np.arange(4)
        double[1, 4](x)
        double[1, 4](cuda.to_device(x))
    assert x.tolist() == [0, 2, 4, 6]
    assert [one.kernel for one in gpu.launches] == ["double", "double"]
    assert gpu.faults == []
