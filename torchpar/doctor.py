# SPDX-License-Identifier: MIT
"""Examination of this machine: ``python -m torchpar doctor``.

It looks at versions, processor, GPUs, kernels, communication and folders, and computes each operator once
beside float64. Each finding that needs attention has a remedy.
"""

import argparse
import importlib.util
import io
import json
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
import torch.distributed as dist

import torchpar
from torchpar import self_test
from torchpar.ops import _cpu_table, _processor
from torchpar.ops._processor import cpuinfo

# The oldest and the newest versions that the tests have run with.
TESTED = {
    "python": ("3.11", "3.12"),
    "torch": ("2.11", "2.15"),
    "triton": ("3.6", "3.9"),
    "numpy": ("2.3", "2.5"),
}
EXTRAS = {
    "examples": ("torchvision", "tyro", "rich", "matplotlib"),
    "baselines": ("numba", "mpi4py"),
    "lightning": ("lightning", "tensorboard"),
}
# The flags in /proc/cpuinfo that stand for each instruction set.
INSTRUCTION_SETS = {
    "AVX2": {"avx2"},
    "AVX-512": {"avx512f"},
    "VNNI": {"avx512_vnni", "avx_vnni"},
    "AMX": {"amx_tile"},
}

State = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """A fact about this machine.

    Attributes:
        state: "ok"; "note" if something optional is missing; "problem" if something fails.
        remedy: what to do about it, or "".
        area: such as "versions".
    """

    name: str
    value: str
    state: State = "ok"
    remedy: str = ""
    area: str = ""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m torchpar doctor", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    options = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # terminals that have only ASCII print ? for an arrow
    start = time.perf_counter()
    findings = list(examine())
    seconds = time.perf_counter() - start
    problems = sum(finding.state == "problem" for finding in findings)
    if options.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        _print(findings)
        notes = sum(finding.state == "note" for finding in findings)
        print(f"\nproblems: {problems}, notes: {notes}, {seconds:.1f} s")
    return 1 if problems else 0


def _print(findings: Sequence[Finding]) -> None:
    width = max(len(finding.name) for finding in findings)
    area = ""
    for finding in findings:
        if finding.area != area:
            area = finding.area
            print(f"\n{area}")
        mark = {"ok": " ", "note": "-", "problem": "!"}[finding.state]
        print(f" {mark} {finding.name:{width}}  {finding.value}")
        if finding.remedy:
            print(f"   {'':{width}}  → {finding.remedy}")


def examine() -> Iterator[Finding]:
    """All findings; an area whose examination fails is itself a problem."""
    for area in (versions, extras, processor, gpus, kernels, communication, folders, operators):
        try:
            for finding in area():
                yield replace(finding, area=area.__name__)
        except Exception as e:
            remedy = "please report it, with this output"
            yield Finding("examination", _line(e), "problem", remedy, area.__name__)


def versions() -> Iterator[Finding]:
    yield Finding("torchpar", torchpar.__version__)
    installed = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("triton", "numpy"):
        if importlib.util.find_spec(name) is not None:  # also under another name of its distribution
            installed[name] = importlib.import_module(name).__version__
            continue
        without = "the operators have no GPU kernels" if name == "triton" else "torchpar needs it"
        state: State = "problem" if name == "numpy" or torch.cuda.is_available() else "note"
        yield Finding(name, f"missing; {without}", state, f"pip install {name}")
    for name, text in installed.items():
        oldest, newest = TESTED[name]
        if _numbers(oldest) <= _numbers(text) <= _numbers(newest):
            yield Finding(name, text)
        else:
            remedy = f"if something fails, take a version from {oldest} to {newest}"
            yield Finding(name, f"{text}, not tested", "note", remedy)


def extras() -> Iterator[Finding]:
    for extra, packages in EXTRAS.items():
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        if missing:
            remedy = f"pip install 'torchpar[{extra}]'"
            yield Finding(extra, f"without {', '.join(missing)}", "note", remedy)
        else:
            yield Finding(extra, ", ".join(f"{name} {version(name)}" for name in packages))


def processor() -> Iterator[Finding]:
    model = cpuinfo("model name") or platform.processor() or platform.machine()
    sets = ", ".join(instruction_sets()) or "no AVX2"
    yield Finding("model", f"{model}, {sets}; ATen uses {torch.backends.cpu.get_cpu_capability()}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = torch.get_num_threads()
    text = f"{threads}, on {cores} cores"
    if cores and threads > cores:
        yield Finding("threads", text, "problem", f"export OMP_NUM_THREADS={cores}")
    else:
        yield Finding("threads", text)
    library = "oneDNN, if they are large" if _processor.has_onednn() else "PyTorch's BLAS library"
    yield Finding("float32 products", f"by {library}")
    loaded, tune = _cpu_table.load(), "python -m torchpar tune --device cpu"
    if loaded:
        path, table = loaded
        dtypes = dict.fromkeys(entry[0] for entry in table["symmetric"])
        gains = (f"{one} {_cpu_table.choice(getattr(torch, one), 1024, 1024).gain:.2f}" for one in dtypes)
        text = f"{path.name}, of torch {table['torch']}; X·Xᵀ of 1024 × 1024, speed-up over torch.mm with "
        text += f"{torch.get_num_threads()} threads: {', '.join(gains)}"
        if table["torch"].partition("+")[0] == torch.__version__.partition("+")[0]:
            yield Finding("measured products", text)
        else:
            yield Finding("measured products", f"{text}; this torch is {torch.__version__}", "note", tune)
    else:
        kind = _processor.processor_kind()
        yield Finding("measured products", f"none for {kind}; the defaults are used", "note", tune)
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if compiler:
        yield Finding("C++ compiler", compiler)
    else:
        remedy = "apt-get install g++, or set CXX"
        yield Finding("C++ compiler", "missing; torch.compile on CPUs needs one", "note", remedy)
    fast = _processor.has_bfloat16()
    yield Finding("bfloat16 products", "fast" if fast else "slow; Muon multiplies float32")


def gpus() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        remedy = "if there is one, look at the driver, such as by nvidia-smi, and at CUDA_VISIBLE_DEVICES"
        if torch.version.cuda is None and torch.version.hip is None:
            remedy = "this torch is built for CPUs; for a GPU install another build"
        yield Finding("CUDA or ROCm", "PyTorch finds no GPU; the operators run on the CPU", "note", remedy)
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        text = f"{properties.name}, {_architecture(index)}, {properties.total_memory / 2**30:.0f} GiB"
        yield Finding(f"cuda:{index}", text)


def kernels() -> Iterator[Finding]:
    """Whether each GPU has measured tiles for each kernel, and whether a kernel compiles."""
    if importlib.util.find_spec("triton") is None:
        yield Finding("Triton", "missing; the operators run on CPUs only", "note", "pip install triton")
        return
    from torchpar.kernels import tiles

    for index in range(torch.cuda.device_count()):
        with torch.cuda.device(index):
            present = tiles.device(torch.empty(0, device="cuda"))
        table = tiles.load_table(present)
        for kernel in tiles.KERNELS:
            kinds = sorted(table["tiles"].get(kernel, ())) if table else []
            if kinds:
                yield Finding(f"{kernel}, cuda:{index}", f"measured tiles for {', '.join(kinds)}")
            else:
                remedy = f"CUDA_VISIBLE_DEVICES={index} python -m torchpar tune"
                yield Finding(f"{kernel}, cuda:{index}", "estimated tiles, perhaps slower", "note", remedy)
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        yield Finding("Triton's compiler", "kernels are interpreted", "note", "unset TRITON_INTERPRET")
        return
    architecture = _architecture(0) if torch.cuda.is_available() else "sm_90"
    seconds = _compile(architecture)
    yield Finding("Triton's compiler", f"maximum compiled for {architecture} in {seconds:.2f} s")


def _architecture(index: int) -> str:
    """The architecture of a GPU, such as "sm_90" or "gfx942"."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return str(properties.gcnArchName.partition(":")[0])
    return f"sm_{properties.major}{properties.minor}"


def _compile(architecture: str) -> float:
    """Compile a kernel without the cache, and return the seconds that it took."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    from torchpar.kernels.maximum import maximum_flat_kernel

    pointers = dict.fromkeys(("a_ptr", "b_ptr", "out_ptr"), "*fp32")
    constants = {"A_REPEATS": False, "B_REPEATS": False, "BLOCK": 1024}
    signature = {**pointers, "numel": "i32", **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(maximum_flat_kernel, signature, constants)
    target = GPUTarget("hip", architecture, 64)
    if architecture.startswith("sm_"):
        target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    with (
        tempfile.TemporaryDirectory() as folder,
        # Triton 3.9 warns if the second is unset.
        patch.dict(os.environ, TRITON_CACHE_DIR=folder, TRITON_DEFAULT_FP_FUSION="1"),
    ):
        start = time.perf_counter()
        compile_kernel(source, target=target)
        return time.perf_counter() - start


def communication() -> Iterator[Finding]:
    if not dist.is_available():
        yield Finding("torch.distributed", "missing", "problem", "install another build of torch")
        return
    try:
        group: Any = dist.ProcessGroupGloo(dist.HashStore(), 0, 1)  # type: ignore[attr-defined]
        group.allreduce([torch.ones(1)]).wait()
        yield Finding("gloo", "starts")
    except (RuntimeError, AttributeError) as e:
        remedy = "export GLOO_SOCKET_IFNAME=lo, or another interface"
        if "GLOO_SOCKET_IFNAME" in os.environ:
            remedy = "unset GLOO_SOCKET_IFNAME, which names no interface"
        yield Finding("gloo", _line(e), "problem", remedy)
    nccl = dist.is_nccl_available()
    state: State = "note" if torch.cuda.device_count() > 1 and not nccl else "ok"
    remedy = "install a build of torch with NCCL" if state == "note" else ""
    yield Finding("NCCL", "available" if nccl else "missing", state, remedy)
    launcher = shutil.which(
        "mpirun", path=os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", "")))
    )
    if launcher and importlib.util.find_spec("mpi4py"):
        yield Finding("MPI", launcher)
    else:
        missing = "mpi4py" if launcher else "mpirun"
        remedy = "pip install 'torchpar[baselines]'"
        if not sys.platform.startswith("linux"):
            remedy = "install an MPI, and pip install mpi4py"
        yield Finding("MPI", f"no {missing}", "note", remedy)


def folders() -> Iterator[Finding]:
    if importlib.util.find_spec("triton"):
        home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")  # there may be no home
        cache = Path(os.environ.get("TRITON_CACHE_DIR") or Path(home) / ".triton" / "cache")
        yield _folder("Triton's cache", cache, 2**28, "export TRITON_CACHE_DIR=FOLDER")
    from torchpar.kernels import folders

    yield _folder("measured tables", folders.user_folder(), 2**20, "export TORCHPAR_CACHE=FOLDER")


def _folder(name: str, folder: Path, needed: int, remedy: str) -> Finding:
    """Whether a folder, which need not exist yet, can be written to and has ``needed`` bytes of space."""
    try:
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free
    except OSError:
        return Finding(name, f"{folder} cannot be read", "note", remedy)
    text = f"{folder}, {free / 2**30:.1f} GiB free"
    if not os.access(there, os.W_OK):
        return Finding(name, f"{folder} cannot be written", "note", remedy)
    return Finding(name, text, "ok" if free >= needed else "note", "" if free >= needed else remedy)


def operators() -> Iterator[Finding]:
    for device in ("cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))):
        for name, test in self_test.TESTS.items():
            try:
                error, bound = self_test.run(test, device)
            except Exception as e:
                remedy = "see the findings above, or report it"
                yield Finding(f"{name}, {device}", _line(e), "problem", remedy)
                continue
            if bool((error <= bound).all()):
                by = ", by ATen" if device == "cpu" else ""
                yield Finding(f"{name}, {device}", f"right{by}, error {error.max():.0e}")
            else:
                text = f"WRONG by {error.max():.0e}, expected at most {bound.max():.0e}"
                yield Finding(f"{name}, {device}", text, "problem", "please report it, with this output")


def instruction_sets() -> list[str]:
    """The names in INSTRUCTION_SETS that the processor supports."""
    flags = set(cpuinfo("flags").split())
    return [name for name, either in INSTRUCTION_SETS.items() if flags & either]


def _numbers(text: str) -> tuple[int, ...]:
    """Major and minor version."""
    return tuple(int(part) for part in text.split(".")[:2])


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
