# SPDX-License-Identifier: MIT
"""Text about a file of CUDA C++: how to launch its kernels, and what each takes of a GPU."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from keyword import iskeyword
from pathlib import Path

import numpy as np

from nogpu.console import in_columns
from nogpu.cpp.declarations import Declaration, Declared, blank, structures
from nogpu.cpp.launching import DEFAULT_ARCH, FLOATS, Module, compile_source
from nogpu.cpp.nvrtc import TEXT, CompileError
from nogpu.data_sheets import ARCHITECTURES, WARPS
from nogpu.machine.parse import Kernel, Parameter, PtxError, entries, parse
from nogpu.record.resources import resources

BLOCKS = (128, 256, 512, 1024)  # threads, whose occupancy is shown
# Of examples: a matrix of 32 by 32 has as many elements as an array.
INTEGER, ELEMENTS = 32, 1024


def summary(path: str | Path, arch: str = DEFAULT_ARCH) -> str:
    """Return how to launch a file's kernels, and a table of registers, memory and occupancy.

    Raises:
        CompileError: NVRTC refuses the file.
        OSError: the file cannot be read.
    """
    file = Path(path).absolute()
    module = compile_source(file.read_text("utf-8"), str(file))
    lines = [f"{Path(path).name} has no kernel, which is a function with __global__"]
    if module.names:
        lines = [*_example(module, path, arch), "", *_table(module, arch)]
    return "\n".join(lines)


def print_summary(path: str | Path, arch: str = DEFAULT_ARCH) -> int:
    """Print the summary of a file, or why NVRTC refuses it; return the exit status."""
    try:
        print(summary(path, arch))
    except CompileError as e:
        print(e, file=sys.stderr)
        return 1
    except (OSError, UnicodeDecodeError) as e:
        print(f"python -m nogpu: error: {path} cannot be read: {e}", file=sys.stderr)
        return 2
    return 0


def command_line(arguments: Sequence[str]) -> int:
    """Print the summary of the file that a command names; return the exit status."""
    parser = argparse.ArgumentParser(
        "python -m nogpu", description="Say how to launch a file of CUDA C++, and what it takes."
    )
    parser.add_argument("--arch", choices=tuple(ARCHITECTURES), default=DEFAULT_ARCH)
    parser.add_argument("file", type=Path, help="a file of CUDA C++")
    options = parser.parse_args(arguments)
    return print_summary(options.file, options.arch)


def _example(module: Module, path: str | Path, arch: str) -> list[str]:
    """Return a script that launches the kernels, and what is to be said of it."""
    calls = [_call(module, one, arch) for one in module.declared.values()]
    lines = [line for call in calls for line in ("", *call)]
    needs_torch = any("torch." in line for line in lines)
    lines = [
        f"This script launches the kernels of {Path(path).name}, by `python -m nogpu launch.py`:",
        "",
        "import nogpu.cuda",
        "import numpy as np",
        *(["import torch"] if needs_torch else []),
        "",
        f'kernels = nogpu.cuda.load("{Path(path).as_posix()}")',
        *_constants(module, arch),
        *lines,
        "",
        f"Its sizes are examples: put in your own. Arrays have {ELEMENTS:,} elements, and integers "
        f"are {INTEGER}.",
        "[grid, block] are integers, or up to three each.",
    ]
    if re.search(r"extern\s+__shared__", module.source):
        lines[-1] += (
            " The third number of [grid, block, bytes] is the size of extern __shared__ memory."
        )
    if left_out := _of_host(module.source):
        lines.append(
            f"Code for the CPU is left out ({', '.join(left_out)}): the script takes its place."
        )
    return lines


def _constants(module: Module, arch: str) -> list[str]:
    """Return calls that fill the variables in constant memory, as cudaMemcpyToSymbol does."""
    lines = []
    for name, (dtype, size) in module.constants(arch).items():
        count = size // np.dtype(dtype).itemsize
        lines.append(f'kernels.copy_to("{name}", np.zeros({count}, np.{dtype}))')
    return lines


def _of_host(source: str) -> list[str]:
    """Return what a source has for the CPU: main, functions of CUDA, and launches."""
    code = TEXT.sub(blank, source)
    found = re.findall(r"\b(main|cuda[A-Z]\w*)\s*\(", code)
    return [*dict.fromkeys(found), *(["<<<…>>>"] if "<<<" in code else [])]


def _call(module: Module, declared: Declaration, arch: str) -> list[str]:
    """Return a launch of a kernel, and arguments for it."""
    kernel = _parsed(module, declared, arch)
    signature = kernel.signature if kernel is not None else []
    lines, names = list[str](), list[str]()
    if declared.template:
        lines.append(f"# a template: <{declared.template}> is your choice")
    types = _types_of(declared)
    for n, one in enumerate(declared.parameters):
        name = one.name or f"argument{n}"
        name += "_" * (iskeyword(name) or name in ("np", "torch", "nogpu", "kernels"))
        kind = re.sub(r"\w+", lambda word: types.get(word[0], word[0]), one.type)
        known = Declared(one.name, kind)
        fields = structures(module.source).get(kind.split("::")[-1])
        if fields:
            values = [_value(each.declared, None) for each in fields]
            value = f"({', '.join(values)}{',' * (len(values) == 1)})"
        else:
            value = _value(known, signature[n] if signature else None)
        lines.append(f"{name} = {value}  # {one.type}")
        names.append(name)
    body = _body(module, declared)
    size = "1, 32"
    if re.search(r"(?:threadIdx|blockIdx)\s*\.\s*z", body):
        size = "1, (4, 4, 2)"
    elif re.search(r"(?:threadIdx|blockIdx)\s*\.\s*y", body):
        size = "(2, 2), (16, 16)"
    if kernel is not None and kernel.dynamic_shared:
        size += f", {4 * ELEMENTS}"
    return [*lines, f'kernels["{declared.instance}"][{size}]({", ".join(names)})']


def _parsed(module: Module, declared: Declaration, arch: str) -> Kernel | None:
    """Return a kernel of the PTX; None if a template is not for the types of its example."""
    try:
        text, entry = module.entry(declared.instance, arch)
        return parse(text, entry, (1, 1, 1))
    except (CompileError, PtxError):
        return None


def _types_of(declared: Declaration) -> dict[str, str]:
    """Return the types that an example gives for the parameters of a template."""
    names = re.findall(r"\b(?:typename|class)\s+(\w+)", declared.template)
    return dict.fromkeys(names, "float")


def _body(module: Module, declared: Declaration) -> str:
    """Return the lines from a kernel's declaration to that of the next one."""
    lines = TEXT.sub(blank, module.source).splitlines()
    starts = sorted(one.line for one in module.declared.values())
    ends = [line for line in starts if line > declared.line]
    return "\n".join(lines[declared.line - 1 : ends[0] - 1 if ends else None])


def _value(declared: Declared, parameter: Parameter | None) -> str:
    """Return an example of an argument, as code."""
    dtype = declared.dtype
    if declared.is_pointer and dtype == "bfloat16":
        return f"torch.zeros({ELEMENTS}, dtype=torch.bfloat16)"
    if declared.is_pointer:
        return f"np.zeros({ELEMENTS}, np.{dtype or 'float32'})"
    is_float = dtype.lstrip("b").startswith("float")
    if is_float or (parameter is not None and parameter.kind in FLOATS):
        return "1.0"
    if dtype == "bool":
        return "True"
    if not dtype and parameter is not None and parameter.size not in (1, 2, 4, 8):
        return f"bytes({parameter.size})"
    is_bytes = not dtype and parameter is not None and parameter.kind == "b8"
    return f"bytes({parameter.size})" if is_bytes and parameter else str(INTEGER)


def _table(module: Module, arch: str) -> list[str]:
    """Return what each kernel takes of a GPU, by ptxas, or why ptxas refuses it."""
    text = module.ptx(arch)
    rows = [["kernel", "line", "registers", "spilled", "stack", "shared", *map(_column, BLOCKS)]]
    names, refused, others = entries(text), dict[int, str](), list[str]()
    for one in module.declared.values():
        found = [entry for entry in names if _is_of(one, entry)]
        if not found:
            others.append(
                f"{one.name}, line {one.line}: a template, whose instances ptxas does not see"
            )
            continue
        cells = [one.name, str(one.line)]
        try:
            kernel = parse(text, found[0], (1, 1, 1))
            used = resources(text, arch, found[0])
        except (OSError, RuntimeError, PtxError) as e:
            refused[len(rows)] = str(e)
            rows.append([*cells, *[""] * (len(rows[0]) - len(cells))])
            continue
        static = sum(size for _, size in kernel.shared.values())
        cells += [str(used.registers), f"{used.spilled_bytes} B", f"{used.stack_bytes} B"]
        cells.append(f"{static:,} B")
        for threads in BLOCKS:
            blocks = used.resident_programs(threads // 32, static, arch)
            cells.append(f"{blocks * threads / (32 * WARPS):.0%}")
        rows.append(cells)
    lines = in_columns(rows).splitlines()
    lines = [f"{line}  {refused[n]}" if n in refused else line for n, line in enumerate(lines)]
    title = f"For {arch}; occupancy by the threads of a block, without dynamic shared memory:"
    return [*([title, *lines] if len(rows) > 1 else []), *others]


def _column(threads: int) -> str:
    return f"{threads} threads"


def _is_of(declared: Declaration, entry: str) -> bool:
    name = declared.name
    return entry == name or entry.startswith(f"_Z{len(name)}{name}")
