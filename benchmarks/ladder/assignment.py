# SPDX-License-Identifier: MIT
"""Remarks on what a course's assignment forbids, which a right result does not show.

The assignment asks for loops, for njit, and for kernels by given launches. It forbids functions of
NumPy, delays, and other launches. The source of a function, and of those of its file that it calls,
is read for calls of other libraries' functions, products by ``@``, and delays. A remark is no
verdict.
"""

import ast
import asyncio
import inspect
import os
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from torchpar.baselines.grader import code_of

ASKED = {
    "max_cpu": "loops of Python",
    "max_numba": "loops by njit",
    "max_gpu": "a kernel",
    "matmul_transpose_trivial": "loops of Python",
    "matmul_transpose_numba": "loops by njit",
    "matmul_transpose_gpu": "a kernel",
}
LIBRARIES = ("numpy", "scipy", "torch", "torchpar")
# Functions of these libraries that compute nothing, or a size.
PLAIN = {
    *("array", "asarray", "ascontiguousarray", "asanyarray", "empty", "empty_like", "zeros"),
    *("zeros_like", "ones", "full", "copy", "reshape", "shape", "size", "arange", "dtype"),
    *("tensor", "as_tensor", "from_numpy", "device", "synchronize", "is_available", "ndindex"),
    *("full_like", "ceil", "floor"),
}
METHODS = {"dot", "matmul", "mm", "maximum", "clip", "einsum"}  # of arrays
DELAYS = (time.sleep, asyncio.sleep)
CLOCKS = (time.time, time.perf_counter, time.monotonic, time.process_time)


class Launch(NamedTuple):
    """A launch of a kernel: its blocks, and the threads of a block if they are known."""

    blocks: int
    threads: int | None = None

    def __str__(self) -> str:
        blocks = f"{self.blocks} block{'s' * (self.blocks > 1)}"
        return blocks + (f" of {self.threads} threads" if self.threads else "")


def on_launches(name: str, launches: Sequence[Launch], shape: Sequence[int]) -> Iterator[str]:
    """Remark on launches that the assignment does not ask for; once on each kind.

    Args:
        shape: of the arguments. Of the maximum, a launch may have a block for each of its rows.
    """
    rows, columns = shape[0], shape[-1]
    asked, text = {
        "max_gpu": (
            (Launch(1000, 1000), Launch(rows, columns)),
            "1000 blocks of 1000 threads for 1000×1000",
        ),
        "matmul_transpose_gpu": ((Launch(1, 1024),), "one block of 1024 threads"),
    }.get(name, ((), ""))
    for one in dict.fromkeys(launches):
        is_asked = any(
            one.blocks == other.blocks and one.threads in (None, other.threads) for other in asked
        )
        if asked and not is_asked:
            size = "×".join(map(str, shape))
            yield f"it launches {one} at {size}, and the assignment asks for {text}"


def on_source(name: str, function: Callable[..., object]) -> Iterator[str]:
    """Remark on what the source of a function of the assignment does in place of what is asked."""
    if name not in ASKED:
        return
    asked, is_compiled = ASKED[name], False
    for one in reached(function):
        is_compiled |= hasattr(one, "py_func")
        yield from (f"{text}, and the assignment asks for {asked}" for text in calls(one))
        for line in delays(one):
            yield f"line {line} delays it, which the assignment forbids"
    if name.endswith("_numba") and not is_compiled:
        yield f"Numba compiles nothing of it, and the assignment asks for {asked}"
    if asked == "loops of Python" and is_compiled:
        yield f"Numba compiles a part of it, and the assignment asks for {asked}"


def reached(function: Callable[..., object]) -> list[Any]:
    """A function, and those of its folder that it mentions, directly or by others."""
    found: list[Any] = [function]
    code = code_of(function)
    folder = Path(os.path.realpath(code.co_filename)).parent if code else None
    for one in found:
        for node in nodes_of(one):
            other = resolved(node, one) if isinstance(node, ast.Name | ast.Attribute) else None
            code = code_of(other)
            if code is None or any(other is known for known in found):
                continue
            if Path(os.path.realpath(code.co_filename)).parent == folder:
                found.append(other)
    return found


def tree_of(function: object) -> ast.AST:
    """The syntax of a function, with the lines of its file; that of nothing if it has no source."""
    code = code_of(function)
    try:
        lines, first = inspect.getsourcelines(code) if code else ([], 1)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, SyntaxError, TypeError):  # a lambda is a part of a line
        return ast.Module([], [])
    return ast.increment_lineno(tree, first - 1)


def nodes_of(function: object) -> list[Any]:
    """The expressions and statements of a function, by their lines."""
    nodes = [node for node in ast.walk(tree_of(function)) if hasattr(node, "lineno")]
    return sorted(nodes, key=lambda node: int(node.lineno))


def resolved(node: ast.AST, function: Any) -> Any:
    """The object that a name, or an attribute of modules, has in a function; None if unknown."""
    if isinstance(node, ast.Attribute):
        owner = resolved(node.value, function)
        return getattr(owner, node.attr, None) if isinstance(owner, ModuleType) else None
    if not isinstance(node, ast.Name):
        return None
    names = getattr(getattr(function, "py_func", function), "__globals__", {})
    return names.get(node.id)


def calls(function: Any) -> Iterator[str]:
    """Calls of libraries that compute, and products by ``@``."""
    for node in nodes_of(function):
        if isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.MatMult):
            yield f"line {node.lineno} computes by @"
        if not isinstance(node, ast.Call):
            continue
        called, text = resolved(node.func, function), ast.unparse(node.func)
        short = text.rpartition(".")[2]
        module = str(getattr(called, "__module__", None) or type(called).__module__)
        is_librarys = module.partition(".")[0] in LIBRARIES and not isinstance(called, type)
        is_method = called is None and isinstance(node.func, ast.Attribute) and short in METHODS
        if is_method or (is_librarys and short not in PLAIN):
            yield f"line {node.lineno} calls {text}"


def delays(function: Any) -> Iterator[int]:
    """The lines that wait: by a call, or by a loop until a time."""
    for node in nodes_of(function):
        if isinstance(node, ast.Call) and resolved(node.func, function) in DELAYS:
            yield node.lineno
        if isinstance(node, ast.While):
            clocks = (one for one in ast.walk(node.test) if isinstance(one, ast.Call))
            if any(resolved(one.func, function) in CLOCKS for one in clocks):
                yield node.lineno
