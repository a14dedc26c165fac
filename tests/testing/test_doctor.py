# SPDX-License-Identifier: MIT
"""The doctor finds what works, and names a remedy for what does not."""

import errno
import importlib.util
import json
import runpy
import socket
import sys
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

import torchpar
from benchmarks.records import OPERATORS
from torchpar.library import build, player
from torchpar.testing import doctor
from torchpar.testing.doctor import Finding

SPEC = importlib.util.find_spec
WITHOUT_TRITON = "problem" if torch.cuda.is_available() else "note"


def test_this_machine_is_well(monkeypatch, capsys):
    """With any versions: those of a stranger's machine may be newer than the tested ones."""
    monkeypatch.setattr(doctor, "TESTED", dict.fromkeys(doctor.TESTED, ("0.0", "99.99")))
    assert doctor.main([]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert last.startswith("problems: 0, notes: ")
    assert not any("not tested" in line for line in lines)
    for name in OPERATORS:
        assert any(f" {name}, cpu " in line and "right, by ATen" in line for line in lines)


def test_a_problem_is_marked_and_makes_the_status_1(monkeypatch, capsys):
    """An arrow leads to its remedy."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none")
    monkeypatch.setattr(sys, "argv", ["torchpar", "doctor"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("torchpar", run_name="__main__")
    assert ended.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    (at,) = (i for i, line in enumerate(lines) if line.startswith(" !"))
    assert lines[at].startswith(" ! gloo ")
    assert lines[at + 1].strip() == "→ unset GLOO_SOCKET_IFNAME, which names no interface"
    assert lines[-1].startswith("problems: 1, notes: ")


@pytest.mark.parametrize(
    "area, name, replaced, by, finding",
    [
        ("versions", "triton", "importlib.util.find_spec",
         lambda name: None if name == "triton" else SPEC(name),
         (WITHOUT_TRITON, "missing; the operators have no GPU kernels", "pip install triton")),
        ("versions", "torch", "torch.__version__", "2.99.0+cu132",
         ("note", "2.99.0+cu132, not tested",
          "if something fails, take a version from 2.11 to 2.15")),
        ("versions", "python", "platform.python_version", lambda: "3.10.13",
         ("note", "3.10.13, not tested",
          "if something fails, take a version from 3.11 to 3.14")),
        *(("versions", "python", "platform.python_version", partial(str, version),
           ("ok", version, "")) for version in ("3.11.0", "3.13.0", "3.14.10")),
        ("processor", "threads", "torch.get_num_threads", lambda: 1000,
         ("problem", "1000, on ", "export OMP_NUM_THREADS=")),
    ],
)  # fmt: skip
def test_situations(area, name, replaced, by, finding):
    with patch(replaced, by):
        (found,) = (one for one in getattr(doctor, area)() if one.name == name)
    state, value, remedy = finding
    assert found.state == state
    assert found.value.startswith(value)
    assert found.remedy.startswith(remedy)


@pytest.mark.parametrize(
    "found, state, value",
    [
        ("127.0.0.1", "ok", "box, 127.0.0.1; ranks on several machines need GLOO_SOCKET_IFNAME"),
        ("203.0.113.7", "note", "box has only addresses of other machines; torchrun takes them"),
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "problem",
         "box has no address (Name or service not known); torchrun waits for one, and starts no"),
        (TimeoutError(), "problem", "box has no address (no answer within 10 s); torchrun waits"),
    ],
)  # fmt: skip
def test_a_host_name_for_which_torchrun_waits(monkeypatch, found, state, value):
    def look_up(name: str, port: None, **_: object) -> object:
        assert name == "box"
        if isinstance(found, Exception):
            raise found
        return resolve(found, port, type=socket.SOCK_STREAM)

    resolve = socket.getaddrinfo
    monkeypatch.setattr(socket, "gethostname", lambda: "box")
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    finding = doctor.host_name()
    assert (finding.name, finding.state) == ("host name", state)
    assert finding.value.startswith(value)
    remedy = "torchrun --local_addr=127.0.0.1 for ranks on this machine, or write the name into "
    assert finding.remedy == ("" if state == "ok" else remedy + "/etc/hosts")
    assert next(doctor.communication()) == finding


@pytest.mark.parametrize(
    "enabled, value", [(False, "by the times of an H200, scaled"), (True, "measured by Triton")]
)
def test_a_gpu_and_the_choice_of_its_tiles(monkeypatch, enabled, value):
    autotune = pytest.importorskip(
        "torchpar.kernels.autotune", reason="Triton compiles the kernels"
    )
    monkeypatch.setattr(autotune, "ENABLED", enabled)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    properties = SimpleNamespace(name="NVIDIA Test", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    gpu, calls, tiles = doctor.gpus()
    assert calls.name == "calls of operators"
    assert gpu == Finding("cuda:0", "NVIDIA Test, 80 GiB")
    assert tiles.value.startswith(value)


def test_who_leads_calls_on_a_gpu(monkeypatch, tmp_path):
    """C++ that was built for another PyTorch is named, and not taken."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(player.core, "module", None)
    monkeypatch.setattr(build, "__file__", str(tmp_path / "build.py"))  # nothing is installed here
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", sys.executable)
    slow = "by Python, which takes the host 20 µs and more"
    remedy = "python -m torchpar build compiles them, so that a call costs an eighth to a half"
    assert doctor._calls() == Finding("calls of operators", slow, "note", remedy)
    old = build.library_name([sys.executable]).replace(torch.__version__, "2.9.1+cu126")
    (tmp_path / old).touch()
    (tmp_path / "torchpar").mkdir()
    (tmp_path / "torchpar" / build.library_name([sys.executable])).touch()  # of an older torchpar
    slow += f"; the C++ here is for torch 2.9.1+cu126, and not {torch.__version__}"
    assert doctor._calls() == Finding("calls of operators", slow, "note", remedy)
    monkeypatch.setenv("CXX", "no-such-compiler")
    remedy = f"install a C++ compiler such as g++; then {remedy}"
    assert doctor._calls() == Finding("calls of operators", slow, "note", remedy)
    monkeypatch.setattr(player.core, "module", SimpleNamespace())
    assert doctor._calls().value == "by C++, for layouts that were called before"
    monkeypatch.setattr(player.core, "module", None)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert doctor._calls().state == "ok"


def test_the_emulator(monkeypatch):
    pytest.importorskip("triton", reason="Triton compiles the kernels")
    from nogpu.native import core as native

    monkeypatch.setattr(native, "library", lambda: None)
    kernel, core = doctor.emulator()
    assert kernel == Finding("maximum, sm_90", "right, as compiled for an H100 and executed here")
    assert (core.state, core.value) == ("note", "Python executes all instructions")
    right = torch.maximum
    monkeypatch.setattr(torch, "maximum", lambda a, b: right(a, b) + 1)
    (found,) = doctor.examine(doctor.emulator)
    assert found.state == "problem"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (found,) = doctor.examine(doctor.emulator)
    assert found.value == "not tried: TRITON_INTERPRET is set, so that kernels are not compiled"
    assert (found.state, found.remedy) == ("note", "unset it")


def test_json(monkeypatch, capsys):
    assert doctor.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == 0
    assert list(found["areas"]) == [
        "versions",
        "processor",
        "gpus",
        "emulator",
        "communication",
        "operators",
    ]
    assert found["areas"]["versions"][0] == Finding("torchpar", torchpar.__version__)._asdict()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1000)
    assert doctor.main(["--json"]) == 1
    assert json.loads(capsys.readouterr().out)["problems"] == 1


def test_wrong_operators_are_found(monkeypatch):
    for name in OPERATORS:
        right = getattr(torchpar, name)
        monkeypatch.setattr(torchpar, name, lambda *operands, right=right: right(*operands) + 1e-3)
    findings = list(doctor.operators())
    assert {finding.name.partition(",")[0] for finding in findings} == set(OPERATORS)
    assert {finding.state for finding in findings} == {"problem"}


def test_an_examination_that_fails_is_a_problem():
    def fail() -> None:
        raise OSError("no home\nin sight")

    remedy = "please report it, with this output"
    assert list(doctor.examine(fail)) == [
        Finding("examination", "OSError: no home", "problem", remedy)
    ]


def test_an_examination_that_finds_nothing_is_a_problem():
    assert [*doctor.examine(lambda: iter(()))] == [
        doctor.Finding("examination", "it has found nothing", "problem", doctor.REPORT)
    ]
    ok = doctor.Finding("a", "b")
    assert [*doctor.examine(lambda: iter([ok]))] == [ok]


def test_a_full_disk_has_another_remedy():
    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (found,) = doctor.examine(fail)
    assert found.remedy.startswith("make room, or let TMPDIR and XDG_CACHE_HOME name folders")


def test_an_unwritable_cache_has_its_variable_as_remedy(monkeypatch):
    def fail() -> None:
        raise OSError(errno.ENOTDIR, "Not a directory", "/dev/null/i")

    (found,) = doctor.examine(fail)
    assert found.remedy.startswith("make room, or let TMPDIR and XDG_CACHE_HOME name folders")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/dev/null/i/j")
    (found,) = doctor.examine(fail)
    assert found.remedy == "let TORCHINDUCTOR_CACHE_DIR name a folder that can be written"


def test_help_is_no_docstring(capsys):
    with pytest.raises(SystemExit):
        doctor.main(["--help"])
    assert "`" not in capsys.readouterr().out
