# SPDX-License-Identifier: MIT
"""Text about a file of CUDA C++: how to launch its kernels, and what each takes of a GPU."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from keyword import iskeyword
from pathlib import Path

from nogpu.console import in_columns
from nogpu.cpp.declarations import Declaration, Declared
from nogpu.cpp.launching import DEFAULT_ARCH, Module, compile_source
from nogpu.cpp.nvrtc import CompileError
from nogpu.data_sheets import ARCHITECTURES
from nogpu.machine.parse import entries, parse
from nogpu.record.resources import resources

BLOCKS = (128, 256, 512, 1024)  # threads, whose occupancy is shown
MOST_THREADS = 64 * 32  # of a multiprocessor


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
        lines = [*_example(module, Path(path).name), "", *_table(module, arch)]
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


def _example(module: Module, name: str) -> list[str]:
    """Return a script that launches the kernels."""
    lines = [
        f"Launch the kernels of {name} from Python, by `python -m nogpu launch.py`:",
        "",
        "    import nogpu.cuda",
        "    import numpy as np",
        "",
        f'    kernels = nogpu.cuda.load("{name}")',
    ]
    for one in module.declared.values():
        names = [p.name or f"argument{n}" for n, p in enumerate(one.parameters)]
        arguments = ", ".join(name + "_" * iskeyword(name) for name in names)
        lines.append(f'    kernels["{one.instance}"][grid, block]({arguments})')
        lines += [f"    # a template: <{one.template}> is your choice"] if one.template else []
        types = [f"{p.name}: {_meaning(p)}" for p in one.parameters if p.name]
        lines += [f"    # {'; '.join(types)}"] if types else []
    shared = " A third number, [grid, block, bytes], is the size of extern __shared__ memory."
    needs = shared if re.search(r"extern\s+__shared__", module.source) else ""
    lines += ["", f"grid and block are an integer or up to three.{needs}"]
    return lines


def _meaning(parameter: Declared) -> str:
    """Say what a parameter is in Python."""
    dtype = parameter.dtype
    if parameter.is_pointer:
        return f"an array of {dtype}" if dtype else f"an array ({parameter.type})"
    return f"a number{'' if dtype else ' or a structure'} ({parameter.type})"


def _table(module: Module, arch: str) -> list[str]:
    """Return what each kernel takes of a GPU, by ptxas."""
    text = module.ptx(arch)
    rows = [["kernel", "line", "registers", "spilled", "stack", "shared", *map(_column, BLOCKS)]]
    names, others = entries(text), list[str]()
    for one in module.declared.values():
        found = [entry for entry in names if _is_of(one, entry)]
        if not found:
            others.append(
                f"{one.name}, line {one.line}: a template, whose instances ptxas does not see"
            )
            continue
        kernel = parse(text, found[0], (1, 1, 1))
        static = sum(size for _, size in kernel.shared.values())
        try:
            used = resources(text, arch, found[0])
        except (OSError, RuntimeError) as e:
            others.append(f"{one.name}, line {one.line}: {e}")
            continue
        cells = [str(used.registers), f"{used.spilled_bytes} B", f"{used.stack_bytes} B"]
        for threads in BLOCKS:
            blocks = used.resident_programs(threads // 32, static, arch)
            cells.append(f"{blocks * threads / MOST_THREADS:.0%}")
        rows.append([one.name, str(one.line), *cells[:3], f"{static:,} B", *cells[3:]])
    table = [
        f"For {arch}; occupancy by the threads of a block, without dynamic shared memory:",
        *in_columns(rows).splitlines(),
    ]
    return [*(table if len(rows) > 1 else []), *others]


def _column(threads: int) -> str:
    return f"{threads} threads"


def _is_of(declared: Declaration, entry: str) -> bool:
    name = declared.name
    return entry == name or entry.startswith(f"_Z{len(name)}{name}")
