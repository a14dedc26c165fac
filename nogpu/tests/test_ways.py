# SPDX-License-Identifier: MIT
"""Ways to run the emulator: the cache, the command, pytest's plugin, and scripts that say "cuda".

Here are the ways that people use wrongly, or otherwise than `test_emulate` does.
"""

import errno
import gc
import io
import os
import runpy
import signal
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import triton
import triton.language as tl
from foreign_warnings import filters
from processes import ROOT, forked
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.driver import driver as active_driver

from nogpu import command, emulate
from nogpu.cuda.stand_in import cuda_is_cpu
from nogpu.machine import gpu
from nogpu.native import cache
from nogpu.native import core as native
from nogpu.triton import host_memory

pytest_plugins = ["pytester"]

# By its path: `runpy.run_module` takes no module of a plugin that pytest has loaded.
MAIN = str(ROOT / "src" / "nogpu" / "__main__.py")


@triton.jit
def double(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, 2 * tl.load(x + i))


def test_a_tensor_too_large_to_be_emulated_is_refused(monkeypatch):
    monkeypatch.setattr("nogpu.triton.host_memory.free_memory", lambda: 2**27)
    x = torch.zeros(2**25)
    with (
        emulate("sm_90"),
        pytest.raises(MemoryError, match=r"x \(float32 \[33554432\]\) takes 0.3 GiB"),
    ):
        double[(1,)](x, x, BLOCK=32)
    with emulate("sm_90") as gpu:
        double[(1,)](x[:32].clone(), torch.zeros(32), BLOCK=32)
    assert len(gpu.launches) == 1


def test_free_memory_is_that_of_the_machine_or_of_its_container(tmp_path):
    machine, container = tmp_path / "meminfo", tmp_path / "cgroup"
    assert host_memory.free_memory(machine, container) is None
    machine.write_text("MemTotal:  9000 kB\nMemAvailable:  5000 kB\n", "utf-8")
    assert host_memory.free_memory(machine, container) == 5000 * 1024
    container.mkdir()
    for name, text in {"max": "max\n", "current": "3000\n", "stat": "inactive_file 500\n"}.items():
        (container / f"memory.{name}").write_text(text, "utf-8")
    assert host_memory.free_memory(machine, container) == 5000 * 1024
    (container / "memory.max").write_text("4000\n", "utf-8")
    assert host_memory.free_memory(machine, container) == 1500
    assert 0 < host_memory.free_memory() < 2**50


def test_the_command_does_not_wait_for_threads_from_before_the_script(tmp_path):
    (tmp_path / "script.py").write_text("", "utf-8")
    end = threading.Event()
    other = threading.Thread(target=end.wait)
    other.start()
    ended = threading.Thread(
        target=lambda: command.main([str(tmp_path / "script.py")]), daemon=True
    )
    ended.start()
    ended.join(60)
    waits = ended.is_alive()
    end.set()
    other.join()
    assert not waits


# The cache


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A command that "compiles" in no time, by copying the core; each call is noted."""
    core = native.library()
    if core is None:
        pytest.skip("no C compiler, or NOGPU_EXECUTOR=python")
    script, calls = tmp_path / "cc.sh", tmp_path / "calls"
    script.write_text(
        f"""echo call >>'{calls}'
        while [ "$1" != -o ]; do shift; done
        cp '{core._name}' "$2"
        """
    )
    monkeypatch.setenv("CC", f"sh '{script}' -O2")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda: len(calls.read_text().splitlines())


DAMAGES = {
    "empty": lambda core: core.write_bytes(b""),
    "garbage": lambda core: core.write_bytes(b"garbage" * 999),
    "truncated": lambda core: core.write_bytes(core.read_bytes()[:4096]),
    "another": lambda core: core.write_bytes(core.read_bytes() + b"\0"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_core_is_built_anew(damage, compiler, tmp_path):
    cores = tmp_path / "cache" / "nogpu" / "core"
    assert native.library.__wrapped__() is not None
    assert native.library.__wrapped__() is not None
    assert compiler() == 1  # the second one is of the cache
    (core,) = cores.iterdir()
    whole = core.read_bytes()
    core.unlink()  # this process has mapped it
    core.write_bytes(whole)
    DAMAGES[damage](core)
    assert native.library.__wrapped__() is not None
    assert compiler() == 2
    (core,) = cores.iterdir()
    assert core.read_bytes() == whole


@pytest.mark.parametrize(
    "command, said",
    [
        ("/bin/false", "`/bin/false` ends with status 1 and no core"),
        ("/bin/true", "`/bin/true` ends with status 0 and no core"),
        ("no-such-compiler -O2", "No such file or directory: 'no-such-compiler'"),
        ("gcc 'x", 'CC is "gcc \'x", expected a command (No closing quotation)'),
        ("sh -c 'echo one >&2; echo an error: two >&2; exit 3'", "no core: an error: two"),
    ],
)
def test_without_a_core_one_line_says_why(command, said, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("CC", command)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native.library.__wrapped__() is None
    *others, line = capfd.readouterr().err.splitlines()
    assert line.startswith("nogpu: no core in C, so that Python executes")
    assert line.endswith(said)
    assert others in ([], ["nogpu: compiles its core, once"])
    assert not list(tmp_path.rglob("core*/*"))


@pytest.mark.parametrize("given", ["", "relative", None])
def test_a_cache_that_is_no_absolute_path_is_ignored(given, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    if given is None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", given)
    with emulate():
        assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / ".cache" / "nogpu" / "ptx")


def test_a_cache_that_cannot_be_written_is_replaced(compiler, tmp_path, monkeypatch, capfd):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert native.library.__wrapped__() is not None
    x, out = torch.ones(32), torch.empty(32)
    with emulate() as gpu:
        double[(1,)](x, out, BLOCK=32)
    assert out.tolist() == [2.0] * 32
    assert gpu.faults == []
    lines = [line for line in capfd.readouterr().err.splitlines() if "cannot be written" in line]
    assert len(lines) == 2  # for the core, and for Triton's cache
    assert f"{file}/nogpu/ptx cannot be written (Not a directory)" in lines[1]


def test_a_cache_on_a_full_disk_is_replaced(tmp_path, monkeypatch, capfd):
    """As /dev/full is: it can be opened, and takes no byte."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with open("/dev/full", "wb") as full:
        monkeypatch.setattr(cache.tempfile, "TemporaryFile", lambda dir: full)
        assert cache.writable.__wrapped__(tmp_path) != tmp_path
    assert f"{tmp_path} cannot be written (No space left on device)" in capfd.readouterr().err


# Launches


@pytest.mark.parametrize("number", [0, -1, "a", 1.5])
def test_a_number_of_multiprocessors_is_checked(number):
    with pytest.raises(ValueError, match=r"multiprocessors is .*, expected an integer from 1 on"):
        emulate(multiprocessors=number).__enter__()
    with emulate(multiprocessors=1) as gpu:
        assert gpu.multiprocessors == 1


def test_a_negative_grid_is_refused():
    x = torch.ones(32)
    with emulate() as gpu, pytest.raises(ValueError, match="expected no negative number"):
        double[(-1,)](x, x, BLOCK=32)
    assert gpu.launches == []


def test_a_grid_beyond_that_of_a_gpu_is_refused():
    with emulate(), pytest.raises(ValueError, match="at most 2,147,483,647 programs"):
        double[(2**31,)](torch.ones(8), torch.empty(8), BLOCK=8)


def test_emulators_of_two_threads_have_their_own_launches():
    both_in, launched = threading.Barrier(2), threading.Barrier(2)

    def work(arch):
        with emulate(arch) as emulator:
            both_in.wait(60)
            double[(1,)](torch.ones(8), torch.empty(8), BLOCK=8)
            launched.wait(60)
        return [launch.arch for launch in emulator.launches]

    before = active_driver._active, CUDABackend.make_cubin, os.environ.get("TRITON_CACHE_DIR")
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, ("sm_80", "sm_90"))) == [["sm_80"], ["sm_90"]]
    after = active_driver._active, CUDABackend.make_cubin, os.environ.get("TRITON_CACHE_DIR")
    assert after == before


def test_emulators_may_end_in_the_order_they_began():
    def entered():
        with emulate() as emulator:
            yield emulator

    before = active_driver._active
    first, second = entered(), entered()
    next(first)
    one = next(second)
    first.close()
    double[(1,)](torch.ones(8), torch.empty(8), BLOCK=8)
    assert len(one.launches) == 1
    second.close()
    assert active_driver._active is before


def test_hooks_of_launches_are_called(monkeypatch):
    calls = []
    monkeypatch.setattr(
        triton.knobs.runtime, "launch_enter_hook", lambda data: calls.append(data.get()["name"])
    )
    monkeypatch.setattr(
        triton.knobs.runtime, "launch_exit_hook", lambda data: calls.append(data.get()["stream"])
    )
    x = torch.ones(32)
    with emulate():
        double[(1,)](x, torch.empty(32), BLOCK=32)
    assert calls == ["double", 0]


# The command

KERNEL = """
    import os, signal, sys, threading, time
    import torch, triton, triton.language as tl

    @triton.jit
    def copy(x, out, n, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out + i, tl.load(x + i), mask=i < n)
"""
WRONG = "copy[(2,)](torch.ones(100), torch.empty(100), 100, BLOCK=64)"


@pytest.fixture
def script(tmp_path):
    """A function that writes a script, with a kernel before it."""

    def write(text: str) -> str:
        path = tmp_path / "script.py"
        path.write_text(textwrap.dedent(KERNEL) + textwrap.dedent(text))
        return str(path)

    return write


def test_the_report_lies_where_the_command_was_given(script, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "other"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert command.main(["--report", "r.html", script(f"os.chdir('other')\n{WRONG}")]) == 1
    assert "out of bounds in copy" in (tmp_path / "r.html").read_text("utf-8")
    assert list(folder.iterdir()) == []


def test_a_report_overwrites_no_other_file_than_a_page(script, tmp_path, capsys):
    good = tmp_path / "good.py"
    good.write_text("precious")
    with pytest.raises(SystemExit, match="2"):
        command.main([f"--report={good}", script("")])
    assert f"{good} exists, and is no page; name a file that ends in .html" in (
        capsys.readouterr().err
    )
    assert good.read_text() == "precious"


def test_a_report_may_go_through_a_pipe(script):
    reading, writing = os.pipe()
    with ThreadPoolExecutor(1) as pool, open(reading, "rb") as pipe:
        page = pool.submit(pipe.read)
        try:
            assert command.main([f"--report=/dev/fd/{writing}", script(WRONG)]) == 1
        finally:
            os.close(writing)
        assert b"</html>" in page.result()


@pytest.mark.parametrize("change", ["sys.stdout = io.StringIO()", "sys.stdout.close()"])
def test_the_report_is_printed_also_if_the_script_prints_elsewhere(change, tmp_path, monkeypatch):
    printed, others = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", printed)
    monkeypatch.setattr(sys, "stderr", others)
    script = _empty(tmp_path)
    script.write_text(f"import io, sys; {change}")
    assert command.main([str(script)]) == 0
    assert "launches: 0" in (others if printed.closed else printed).getvalue()


@pytest.mark.parametrize(
    "flags", [["--", "a", "--", "b"], ["--"], ["a", "--"], ["--", "--", "--arch"]]
)
@pytest.mark.parametrize("before", [[], ["--"]])
def test_a_script_has_all_its_flags(before, flags, tmp_path, capsys):
    script = _empty(tmp_path)
    script.write_text("import sys; print(sys.argv[1:])")
    assert command.main([*before, str(script), *flags]) == 0
    assert capsys.readouterr().out.startswith(f"{flags}\n")


def test_only_the_script_is_required(capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main([])
    assert capsys.readouterr().err.endswith("the following arguments are required: script\n")


NEEDS_CUDA = 'a script that launches kernels only for device="cuda" needs --cuda-is-cpu'


@pytest.mark.skipif(torch.cuda.is_available(), reason="the script's tensor would be made")
def test_a_script_for_a_gpu_is_told_of_the_flag(script):
    with pytest.raises((AssertionError, RuntimeError)) as caught:
        command.main([script("torch.ones(3, device='cuda')")])
    assert caught.value.__notes__ == [NEEDS_CUDA]


@pytest.mark.parametrize(
    "flags, text, said",
    [
        ([], "", f"no kernel was launched; {NEEDS_CUDA}\n"),
        (
            ["--cuda-is-cpu"],
            "torch.ones(3, device='cuda')",
            "no kernel was launched; only kernels that the script's own process launches are "
            "executed\n",
        ),
        (
            [],
            "from nogpu import emulate\nwith emulate('sm_80'):\n    pass",
            "no kernel was launched here; the script's own emulate or check_kernel reports its "
            "launches\n",
        ),
    ],
)
def test_a_script_without_a_launch_is_told_why(flags, text, said, script, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "numba.core.config", raising=False)  # of another test
    assert command.main([*flags, script(text)]) == 0
    assert capsys.readouterr().out.endswith(said)


def test_a_script_without_a_launch_has_no_page_and_no_times(script, tmp_path, capsys):
    page, numbers = tmp_path / "page.html", tmp_path / "report.json"
    flags = ["--counters", "--time", f"--report={page}", f"--json={numbers}"]
    assert command.main([*flags, script("")]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("launches: 0; ")
    assert said.err == f"{page} is not written: no kernel was launched\n"
    assert not page.exists()
    assert '"launches": 0' in numbers.read_text()
    assert command.main([*flags, script(WRONG)]) == 1
    assert "The times are estimates." in capsys.readouterr().out
    assert page.exists()


@pytest.mark.parametrize(
    "text, own",
    [
        ("def check():\n    assert False, 'wrong'\ncheck()", ["in <module>", "in check"]),
        ("x = = 1", [""]),
    ],
)
def test_a_traceback_begins_in_the_script(text, own, script, capsys, monkeypatch):
    """As when Python runs it: without the frames of the command."""
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    path = script(text)
    with pytest.raises((AssertionError, SyntaxError)) as caught:
        command.main([path])
    capsys.readouterr()
    sys.excepthook(caught.type, caught.value, caught.value.__traceback__)
    said = capsys.readouterr().err
    frames = [line for line in said.splitlines() if line.startswith("  File ")]
    assert len(frames) == len(own)
    for line, function in zip(frames, own, strict=True):
        assert line.startswith(f'  File "{path}", line ')
        assert line.endswith(function)
    assert sys.excepthook is sys.__excepthook__


def test_a_script_that_fails_before_its_launch_is_told_of_its_error_only(script, capsys):
    with pytest.raises(RuntimeError) as caught:
        command.main([script("raise RuntimeError('of the script')")])
    assert not hasattr(caught.value, "__notes__")
    assert "no kernel was launched" not in capsys.readouterr().out


def test_a_page_that_cannot_be_written_stays_as_it_was(script, tmp_path, monkeypatch):
    page, path = tmp_path / "page.html", script(WRONG)
    page.write_text("precious")
    monkeypatch.setattr(command.Path, "write_text", _full)
    with pytest.raises(SystemExit, match=r"page\.html cannot be written \(No space left"):
        command.main([f"--report={page}", path])
    assert page.read_text() == "precious"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["page.html", "script.py"]


def _full(path, text, *args, **kwargs):
    path.write_bytes(b"a part")
    raise OSError(errno.ENOSPC, "No space left on device")


def _empty(folder):
    path = folder / "empty.py"
    path.touch()
    return path


def test_a_script_and_its_page_have_names_of_any_bytes(tmp_path):
    path = tmp_path / os.fsdecode(b"\xff.py")
    try:
        path.write_text(textwrap.dedent(KERNEL) + WRONG)
    except OSError:
        pytest.skip("names of files are UTF-8 here")
    assert command.main([f"--report={tmp_path / 'page.html'}", str(path)]) == 1
    assert "?.py" in (tmp_path / "page.html").read_text("utf-8")


def test_a_terminal_with_only_ascii_has_the_report(script, monkeypatch, capsys):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "argv", ["nogpu", script(WRONG)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(MAIN, run_name="__main__")
    assert ended.value.code == 1
    assert b"copy[2?1?1]\n" in terminal.buffer.getvalue()
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("fork_server")
def test_a_full_disk_is_named_in_one_line(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    code = """if True:
        import os, runpy, sys
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
        runpy.run_path(sys.argv.pop(1), run_name="__main__")
    """
    status, _, error = forked("-c", code, MAIN, str(_empty(tmp_path)))
    assert status == 1
    assert error.startswith("python -m nogpu: error: the output cannot be written")
    assert "Traceback" not in error


def test_threads_of_the_script_are_waited_for(script, capsys):
    text = f"""
        from concurrent.futures import ThreadPoolExecutor

        def late():
            time.sleep(0.2)
            {WRONG}

        ThreadPoolExecutor(1).submit(int).result()  # a pool that nobody shuts down
        threading.Thread(target=late).start()
    """
    assert command.main([script(text)]) == 1
    assert "launches: 1; 1 error" in capsys.readouterr().out


def test_a_fork_of_the_script_has_no_report(script, capfd):
    text = """
        child = os.fork()
        if child:
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    process = os.getpid()
    try:
        assert command.main([script(text)]) == 0
    finally:
        if os.getpid() != process:
            os._exit(7)
    assert capfd.readouterr().out.startswith("7\nlaunches: 0")


def test_a_script_may_leave_its_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "folder"
    folder.mkdir()
    body = f"import os\nos.chdir('/')\n{textwrap.dedent(KERNEL)}\n{WRONG}\nprint(__file__)"
    (folder / "script.py").write_text(body)
    assert command.main(["folder/script.py"]) == 1
    printed = capsys.readouterr().out
    assert printed.startswith(str(folder / "script.py"))
    assert "tl.store(out + i, tl.load(x + i), mask=i < n)" in printed


def test_a_flag_behind_the_script_is_the_scripts_and_a_line_says_so(tmp_path, capsys):
    path = tmp_path / "script.py"
    path.write_text("import sys\nprint(sys.argv[1:])\n")
    assert command.main(["--counters", str(path), "--epochs", "1"]) == 0
    assert capsys.readouterr().err == ""
    assert command.main([str(path), "--schedules=all", "--help"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("['--schedules=all', '--help']\n")
    assert err == (
        "--schedules=all stands behind the script, which takes it; a flag of python -m nogpu "
        "stands before the script\n"
    )


@pytest.fixture
def default_signals():
    """What handles signals in a new process; other tests of this one may have set handlers."""
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("default_signals")
def test_sigterm_within_a_destructor_ends_the_script(tmp_path, capsys):
    """Python drops the exceptions of destructors, such as those of tensors in the emulator."""
    path = tmp_path / "script.py"
    path.write_text(
        "import signal, time\n\n"
        "class Memory:\n"
        "    def __del__(self):\n        signal.raise_signal(signal.SIGTERM)\n\n"
        "Memory()\ntime.sleep(30)\nprint('to its end')\n"
    )
    hook = sys.unraisablehook
    with pytest.raises(SystemExit) as ended:
        command.main([str(path)])
    assert ended.value.code == 143
    assert "to its end" not in capsys.readouterr().out
    assert sys.unraisablehook is hook


@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize("name, status", [("SIGINT", 130), ("SIGTERM", 143)])
def test_an_interrupted_launch_is_shown(name, status, script, capsys, monkeypatch):
    turns = gpu.Block.turns

    def interrupted(block):
        if block.position == (1, 0, 0):
            signal.raise_signal(signal.Signals[name])
        return turns(block)

    monkeypatch.setattr(gpu.Block, "turns", interrupted)
    monkeypatch.setattr(native, "library", lambda: None)
    try:
        found = command.main(["--counters", script(WRONG)])
    except SystemExit as e:
        found = e.code
    assert found == status
    printed = capsys.readouterr().out
    assert "copy[2×1×1] for sm_90" in printed
    assert "launches: 1; 0 errors" in printed
    assert " has ended the launch early: counts are incomplete\n" in printed
    assert "no kernel was launched" not in printed
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.usefixtures("default_signals")
def test_a_fork_of_the_script_is_terminated_as_without_the_command(script, capfd):
    text = """
        ready, started = os.pipe()
        child = os.fork()
        if not child:
            os.write(started, b"1")
            time.sleep(5)
            os._exit(0)
        os.read(ready, 1)
        os.kill(child, signal.SIGTERM)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    assert command.main([script(text)]) == 0
    assert capfd.readouterr().out.startswith(f"{-signal.SIGTERM}\n")


def test_kernels_end_without_a_driver():
    def launch():
        kernel = triton.JITFunction(double.fn)
        with emulate():
            kernel[(1,)](torch.ones(32), torch.empty(32), BLOCK=32)

    with patch.object(sys, "unraisablehook") as hook:
        launch()
        gc.collect()
    assert hook.call_args_list == []


# The plugin of pytest


def plugged(pytester, tests: str, *flags: str):
    """The outcome of tests, with a kernel before them."""
    pytester.makepyfile(f"import pytest, unittest\n{textwrap.dedent(KERNEL)}{tests}")
    lines = "\n    ".join(["error", *filters([ROOT])])
    pytester.makeini(f"[pytest]\npythonpath = {ROOT}\nfilterwarnings =\n    {lines}")
    return pytester.runpytest_inprocess("--nogpu", *flags)


FIXTURES = """
def launch(n):
    x, out = torch.ones(n, device="cpu"), torch.empty(n, device="cpu")
    copy[(2,)](x, out, n, BLOCK=64)
    return out

@pytest.fixture(scope="module")
def of_module():
    with torch.device("meta"):  # a mode, which is left in another test
        yield launch(128)
    launch(100)

@pytest.fixture
def wrong_setup():
    return launch(100)

@pytest.fixture
def wrong_teardown():
    yield
    launch(100)

def test_first(of_module):
    assert of_module.tolist() == [1.0] * 128

def test_setup(wrong_setup):
    raise AssertionError("not reached")

def test_teardown(wrong_teardown): ...

@pytest.mark.xfail(strict=True)
def test_same_fault_again():
    launch(100)

class TestOld(unittest.TestCase):
    @unittest.expectedFailure
    def test_expected(self):
        launch(100)

    def test_wrong(self):
        launch(100)

    def test_right(self):
        launch(128)

def test_last(of_module): ...
"""


def test_the_plugin_executes_kernels_of_fixtures(pytester):
    found = plugged(pytester, FIXTURES, "-rA")
    found.assert_outcomes(passed=4, failed=1, errors=3, xfailed=2)
    said = found.stdout.str()
    for line in (
        "ERROR at setup of test_setup",
        "ERROR at teardown of test_teardown",
        "ERROR at teardown of test_last",
        "TestOld.test_wrong",
    ):
        assert line in said
    assert said.count("error: out of bounds in copy") >= 4


@pytest.mark.parametrize("end", ["", "\n    raise AssertionError('of the test')"])
def test_the_plugin_prints_a_fault_once(pytester, end):
    launch = FIXTURES.partition("@pytest")[0]
    found = plugged(pytester, f"{launch}def test_wrong():\n    launch(100){end}", "-rN")
    found.assert_outcomes(failed=1)
    said = found.stdout.str().partition(" kernels, executed by nogpu ")[0]
    assert said.count("error: out of bounds in copy") == 1
    assert ("of the test" in said) == bool(end)


def test_the_plugin_executes_all_schedules(pytester):
    tests = """
def test_copy(request):
    from nogpu import emulate
    x, out = torch.ones(128), torch.empty(128)
    copy[(2,)](x, out, 128, BLOCK=64)
    (three,) = request.config.pluginmanager.get_plugin("nogpu.hooks").gpu.launches
    with emulate() as gpu:
        copy[(2,)](x, out, 128, BLOCK=64)
    assert three.instructions == 3 * gpu.launches[0].instructions > 0
"""
    plugged(pytester, tests, "--nogpu-schedules=all").assert_outcomes(passed=1)


def test_the_plugin_refuses_the_interpreter(pytester, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytester.makepyfile("def test(): ...")
    done = pytester.runpytest_inprocess("--nogpu")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines(["*TRITON_INTERPRET is set, so that kernels are not compiled*"])


def test_the_plugin_is_active_when_a_session_stops_early(pytester):
    tests = """
@pytest.fixture(scope="module")
def of_module():
    yield
    x = torch.ones(128)
    copy[(2,)](x, torch.empty(128), 128, BLOCK=64)
    print("torn", "down")

def test_first(of_module):
    raise AssertionError("stop")

def test_second(of_module): ...
"""
    found = plugged(pytester, tests, "-x", "-s")
    found.assert_outcomes(failed=1)
    assert "torn down" in found.stdout.str()
    assert "active drivers" not in found.stdout.str() + found.stderr.str()


# Scripts that say "cuda"


def product():
    return torch.ones(4, 4, device="cuda") @ torch.ones(4, 4, device="cuda")


def within(context, make):
    with context:
        return make()


class AddOne(torch.autograd.Function):
    """A function whose backward makes a tensor on the GPU."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad + torch.ones(4, device="cuda")


def gradient(differentiate):
    x = torch.ones(4, device="cuda", requires_grad=True)
    return differentiate(AddOne.apply(x).sum(), x).tolist()


def in_thread():
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: torch.ones(4, device="cuda").is_cuda).result()


def loaded(place):
    file = io.BytesIO()
    torch.save({"x": torch.ones(4)}, file)
    file.seek(0)
    return torch.load(file, map_location=place)["x"].tolist()


@torch.no_grad()
def casts():
    @torch.amp.custom_fwd(device_type="cuda", cast_inputs=torch.float16)
    def forward(ctx, x):
        return x.dtype

    return forward(SimpleNamespace(), torch.ones(4, device="cuda"))


def random_twice():
    """A number from each of two forks of one state."""
    forks = (torch.random.fork_rng(devices=["cuda"]) for _ in range(2))
    return len({within(fork, lambda: torch.rand(1, device="cuda").item()) for fork in forks})


def recorded(stream):
    event = stream.record_event()
    event.wait(stream)
    stream.wait_event(event)
    torch.ones(4, device="cuda").record_stream(stream)
    return stream.query() and event.query()


AS_ON_CUDA = {
    "autocast": (lambda: within(torch.autocast("cuda"), product).dtype, torch.float16),
    "autocast by name": (
        lambda: within(torch.amp.autocast(device_type="cuda", dtype=torch.bfloat16), product).dtype,
        torch.bfloat16,
    ),
    "no autocast": (
        lambda: within(torch.autocast("cuda", enabled=False), product).dtype,
        torch.float32,
    ),
    "autocast is enabled": (
        lambda: within(torch.autocast("cuda"), lambda: torch.is_autocast_enabled("cuda")),
        True,
    ),
    "cast inputs": (lambda: within(torch.autocast("cuda"), casts), torch.float16),
    "backward": (lambda: gradient(lambda y, x: y.backward() or x.grad), [2.0] * 4),
    "grad": (lambda: gradient(lambda y, x: torch.autograd.grad(y, x)[0]), [2.0] * 4),
    "threads": (in_thread, True),
    "streams": (lambda: recorded(torch.cuda.Stream()), True),
    "capturing": (lambda: torch.cuda.is_current_stream_capturing(), False),
    "memory": (lambda: torch.cuda.mem_get_info(), (80 * 2**30, 80 * 2**30)),
    "text": (lambda: type(torch.cuda.memory_summary()), str),
    "resets": (lambda: torch.cuda.reset_max_memory_allocated(), None),
    "seeds": (lambda: (torch.cuda.manual_seed_all(3), torch.cuda.initial_seed()), (None, 3)),
    "states": (lambda: torch.cuda.set_rng_state(torch.cuda.get_rng_state()), None),
    "forks": (random_twice, 1),
    "pinned factories": (lambda: torch.ones(4, pin_memory=True).tolist(), [1.0] * 4),
    "load": (lambda: loaded("cuda"), [1.0] * 4),
    "load to a device": (lambda: loaded(torch.device("cuda", 0)), [1.0] * 4),
    "load by a table": (lambda: loaded({"cpu": "cuda:0"}), [1.0] * 4),
    "accelerator": (lambda: torch.accelerator.synchronize(), None),
    "type": (lambda: torch.ones(4).type("torch.cuda.HalfTensor").dtype, torch.float16),
    "types": (lambda: torch.ones(4).type(torch.cuda.HalfTensor).dtype, torch.float16),
    "index": (lambda: torch.ones(4, device="cuda").get_device(), 0),
    "equal devices": (
        lambda: torch.device("cuda", 0) == torch.ones(4, device="cuda").device,
        True,
    ),
    "devices": (lambda: isinstance(torch.cuda.device("cuda:0"), torch.cuda.device), True),
    "device of a tensor": (
        lambda: within(torch.cuda.device_of(torch.ones(4)), torch.cuda.current_device),
        0,
    ),
    "stream context": (
        lambda: within(torch.cuda.StreamContext(torch.cuda.Stream()), torch.cuda.current_device),
        0,
    ),
    "current device": (lambda: torch.cuda.set_device(torch.device("cuda", 0)), None),
    "statistics": (lambda: torch.cuda.memory_stats()["allocated_bytes.all.peak"], 0),
    "threads of a block": (lambda: torch.cuda.get_device_properties(0).max_threads_per_block, 1024),
    "times of graphs": (lambda: triton.testing.do_bench_cudagraph(lambda: None), 1.0),
    "all times": (lambda: triton.testing.do_bench(lambda: None, return_mode="all"), [1.0]),
}


@pytest.mark.parametrize("name", AS_ON_CUDA)
def test_what_scripts_do_with_cuda(name):
    call, expected = AS_ON_CUDA[name]
    with emulate() as gpu, cuda_is_cpu(gpu):
        found = call()
    assert found == expected


NO_DEVICE = {
    "a name": lambda: torch.ones(4, device="cuda:1"),
    "an index": lambda: torch.ones(4, device=1),
    "a device": lambda: torch.ones(4).to(torch.device("cuda", 1)),
    "to an index": lambda: torch.ones(4).to(1),
    "to cuda": lambda: torch.ones(4).cuda(1),
    "the current device": lambda: torch.cuda.set_device(1),
    "a block": lambda: torch.cuda.device(1),
}


@pytest.mark.parametrize("name", NO_DEVICE)
def test_a_second_gpu_is_refused(name):
    with emulate() as gpu, cuda_is_cpu(gpu):
        with pytest.raises(RuntimeError, match="the device is cuda:1, expected cuda:0: one GPU"):
            NO_DEVICE[name]()
        with pytest.raises(RuntimeError, match="Invalid device string"):
            torch.ones(4, device="cuda:x")


def test_afterwards_cuda_is_as_before():
    before = [*vars(torch.cuda).items(), *vars(torch.Tensor).items(), *vars(torch).items()]
    with emulate() as gpu, cuda_is_cpu(gpu):
        product()
    after = [*vars(torch.cuda).items(), *vars(torch.Tensor).items(), *vars(torch).items()]
    assert [a for a, b in zip(before, after, strict=True) if a[1] is not b[1]] == []
    with torch.autocast("cpu"):
        assert not torch.is_autocast_enabled("cuda")
