# SPDX-License-Identifier: MIT
"""Examination of this machine: ``python -m torchpar doctor``.

The doctor examines versions, processor, GPUs, the emulator of GPUs, and communication. It computes
each operator once, and compares the result with PyTorch's in the same precision and in float64.
Each finding that needs attention has a remedy.
"""

import argparse
import errno
import importlib.util
import io
import json
import os
import platform
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import torchpar
from torchpar.console import cache_remedy
from torchpar.errors import ConfigError, first_line
from torchpar.library import player
from torchpar.ops.environment import cpuinfo
from torchpar.optional import INSTALL_NOGPU, has_nogpu
from torchpar.parallel.launch.interface import address_of_host, is_loopback
from torchpar.parallel.launch.rendezvous import LOOKUP, run_in_daemon
from torchpar.testing.operators.compare import accurate, same_bits
from torchpar.testing.operators.tensors import normal_like

# The oldest and the newest versions that the tests have run with.
TESTED = {
    "python": ("3.11", "3.14"),
    "torch": ("2.11", "2.15"),
    "numpy": ("2.3", "2.5"),
    "triton": ("3.6", "3.9"),
}

State = Literal["ok", "note", "problem"]
MARKS: dict[State, str] = {"ok": " ", "note": "-", "problem": "!"}
REPORT = "please report it, with this output"
# A full disk, a folder that cannot be written, and no folder for temporary files
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOENT, errno.ENOTDIR)
ROOM = "make room, or let TMPDIR and XDG_CACHE_HOME name folders that can be written"


class Finding(NamedTuple):
    """A fact about this machine.

    Attributes:
        state: "ok"; "note" if something optional is missing; "problem" if something fails.
        remedy: an action against a problem, or "".
    """

    name: str
    value: str
    state: State = "ok"
    remedy: str = ""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "python -m torchpar doctor",
        description="Say what works on this machine, and how to mend what does not.",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    areas = (versions, processor, gpus, emulator, communication, operators)
    if parser.parse_args(arguments).json:
        return _print_json({area.__name__: list(examine(area)) for area in areas})
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Terminals that have only ASCII print ? for an arrow.
        sys.stdout.reconfigure(errors="replace")
    states: list[State] = []
    for area in areas:
        print(f"\n{area.__name__}")
        for finding in examine(area):
            states.append(finding.state)
            print(f" {MARKS[finding.state]} {finding.name:22}  {finding.value}")
            if finding.remedy:
                print(f"   {'':22}  → {finding.remedy}")
    print(f"\nproblems: {states.count('problem')}, notes: {states.count('note')}")
    return int("problem" in states)


def _print_json(findings: dict[str, list[Finding]]) -> int:
    states = [finding.state for found in findings.values() for finding in found]
    areas = {name: [finding._asdict() for finding in found] for name, found in findings.items()}
    counts = {"problems": states.count("problem"), "notes": states.count("note")}
    print(json.dumps({"areas": areas, **counts}, indent=1))
    return int("problem" in states)


def examine(area: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The findings in an area. An examination that fails, or finds nothing, is a problem."""
    findings = 0
    try:
        for finding in area():
            findings += 1
            yield finding
        if not findings:
            yield Finding("examination", "it has found nothing", "problem", REPORT)
    except Exception as e:
        remedy = REPORT
        if isinstance(e, OSError):
            remedy = cache_remedy(e) or (ROOM if e.errno in UNWRITABLE else REPORT)
        yield Finding("examination", first_line(e), "problem", remedy)


def versions() -> Iterator[Finding]:
    yield Finding("torchpar", torchpar.__version__)
    for name, (oldest, newest) in TESTED.items():
        if name == "python":
            text = platform.python_version()
        # From the module, because its distribution may have another name.
        elif importlib.util.find_spec(name) is not None:
            text = str(importlib.import_module(name).__version__)
        else:
            state: State = "problem" if torch.cuda.is_available() else "note"
            yield Finding(
                name, "missing; the operators have no GPU kernels", state, f"pip install {name}"
            )
            continue
        if _major_and_minor(oldest) <= _major_and_minor(text) <= _major_and_minor(newest):
            yield Finding(name, text)
        else:
            remedy = f"if something fails, take a version from {oldest} to {newest}"
            yield Finding(name, f"{text}, not tested", "note", remedy)


def processor() -> Iterator[Finding]:
    model = cpuinfo("model name") or platform.processor() or platform.machine()
    yield Finding("model", f"{model}; ATen uses {torch.backends.cpu.get_cpu_capability()}")
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    threads = torch.get_num_threads()
    remedy = f"export OMP_NUM_THREADS={cores}" if threads > cores else ""
    yield Finding("threads", f"{threads}, on {cores} cores", "problem" if remedy else "ok", remedy)


def gpus() -> Iterator[Finding]:
    """Each GPU, and the choice of tiles of the matrix kernels."""
    if not torch.cuda.is_available():
        remedy = (
            "if there is one, look at the driver, such as by nvidia-smi, and at "
            "CUDA_VISIBLE_DEVICES"
        )
        if torch.version.cuda is None and torch.version.hip is None:
            remedy = "this torch is built for CPUs; for a GPU install another build"
        yield Finding(
            "CUDA or ROCm", "PyTorch finds no GPU; the operators run on the CPU", "note", remedy
        )
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield Finding(
            f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        )
    if importlib.util.find_spec("triton") is None:
        return  # as "versions" says
    yield _calls()
    from torchpar.kernels import autotune

    measured = "measured by Triton's autotuner at the first call for each layout"
    predicted = "by the times of an H200, scaled to this GPU; TORCHPAR_AUTOTUNE=1 measures them"
    yield Finding("tiles", measured if autotune.ENABLED else predicted)


def _calls() -> Finding:
    """The way of the operators' calls on a GPU: by C++ where it was built for this PyTorch."""
    name, slow = "calls of operators", "by Python, which takes the host 20 µs and more"
    if player.core.module is not None:
        return Finding(name, "by C++, for layouts that were called before")
    if torch.version.cuda is None:
        return Finding(name, f"{slow}; C++ leads them on NVIDIA's GPUs")
    from torchpar.library import build

    if others := build.other_torches():
        slow += f"; the C++ here is for torch {', '.join(others)}, and not {torch.__version__}"
    remedy = "python -m torchpar build compiles them, so that a call costs an eighth to a half"
    try:
        build.find_compiler()
    except ConfigError:
        remedy = f"install a C++ compiler such as g++; then {remedy}"
    return Finding(name, slow, "note", remedy)


def emulator() -> Iterator[Finding]:
    """Whether Triton kernels can be compiled for a GPU that is not here, and executed."""
    if importlib.util.find_spec("triton") is None:
        return  # as "versions" says
    if not has_nogpu():
        yield Finding("nogpu", "missing; kernels for a GPU are not tried", "note", INSTALL_NOGPU)
        return
    from nogpu import emulate, has_core, why_not_compiled

    if reason := why_not_compiled():
        value, _, remedy = reason.partition("; ")
        yield Finding("maximum, sm_90", f"not tried: {value}", "note", remedy)
        return
    a, b = (normal_like(torch.empty(64, 80, device="cpu"), seed) for seed in range(2))
    with emulate("sm_90") as gpu:
        same_bits((torchpar.maximum(a, b),), (torch.maximum(a, b),))
    if not gpu.launches or gpu.faults:
        yield Finding("maximum, sm_90", str(gpu.report()), "problem", REPORT)
    else:
        yield Finding("maximum, sm_90", "right, as compiled for an H100 and executed here")
    if not has_core():
        remedy = "install a C compiler such as gcc; the emulator is then at least 60 times as fast"
        yield Finding("core", "Python executes all instructions", "note", remedy)
    else:
        yield Finding("core", "compiled; it executes most instructions")


def communication() -> Iterator[Finding]:
    yield host_name()
    try:
        group: Any = dist.ProcessGroupGloo(dist.HashStore(), 0, 1)  # type: ignore[attr-defined]
        group.allreduce([torch.ones(1, device="cpu")]).wait()
        yield Finding("gloo", "starts")
    except (RuntimeError, AttributeError) as e:
        remedy = "export GLOO_SOCKET_IFNAME=lo, or another interface"
        if "GLOO_SOCKET_IFNAME" in os.environ:
            remedy = "unset GLOO_SOCKET_IFNAME, which names no interface"
        yield Finding("gloo", first_line(e), "problem", remedy)


def host_name() -> Finding:
    """Whether this host's name has an address, which torchrun takes for that of rank 0."""
    name = socket.gethostname()
    remedy = (
        "torchrun --local_addr=127.0.0.1 for ranks on this machine, or write the name into "
        "/etc/hosts"
    )
    try:
        address = run_in_daemon(address_of_host).result(LOOKUP)
    except (OSError, UnicodeError) as e:  # TimeoutError is an OSError
        reason = getattr(e, "strerror", None) or str(e) or f"no answer within {LOOKUP:g} s"
        fault = f"{name} has no address ({reason}); torchrun waits for one, and starts no rank"
        return Finding("host name", fault, "problem", remedy)
    if not address:
        fault = f"{name} has only addresses of other machines; torchrun takes them for this one's"
        return Finding("host name", fault, "note", remedy)
    more = "; ranks on several machines need GLOO_SOCKET_IFNAME" if is_loopback(address) else ""
    return Finding("host name", f"{name}, {address}{more}")


def operators() -> Iterator[Finding]:
    for device in ("cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))):
        sizes = enumerate((400, 400, 72))  # rows; several blocks on a CPU
        a, b, weight = (
            normal_like(torch.empty(rows, 80, device=device), seed) for seed, rows in sizes
        )
        calls: dict[str, tuple[Callable[..., Tensor], *tuple[Tensor, ...]]] = {
            "maximum": (torch.maximum, a, b),
            "matmul_t": (lambda x: x @ x.T, a),
            "symmetric_matmul": (lambda x, y: x @ y.T, a, a),
            "linear_sigmoid": (lambda x, w: torch.sigmoid(x @ w.T), a, weight),
            "exact_matmul": (lambda x, y: x @ y.T, a, b),
        }
        for name, (formula, *operands) in calls.items():
            try:
                actual, native = (getattr(torchpar, name)(*operands),), (formula(*operands),)
                if name == "maximum":
                    same_bits(actual, native)
                else:
                    accurate(actual, native, (formula(*(t.double() for t in operands)),))
                yield Finding(f"{name}, {device}", "right, by ATen" if device == "cpu" else "right")
            except Exception as e:
                yield Finding(f"{name}, {device}", first_line(e), "problem", REPORT)


def _major_and_minor(text: str) -> tuple[int, ...]:
    """Major and minor version."""
    return tuple(int(part) for part in text.split(".")[:2])
