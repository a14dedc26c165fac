# SPDX-License-Identifier: MIT
"""Kernels that the imported modules of a project define, whether they are launched or not."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from triton.runtime.jit import JITFunction, KernelInterface

from nogpu.report.suite import Kernel


def defined_kernels(root: Path) -> dict[Kernel, int]:
    """Return the kernels below a folder, and the line of each.

    Functions that a kernel calls are no kernels. Packages that are installed below the folder, as
    in a virtual environment, are left out.
    """
    functions = {}
    for module in list(sys.modules.values()):
        if not isinstance(module, ModuleType) or not _is_below(vars(module).get("__file__"), root):
            continue
        for value in list(vars(module).values()):
            function = _jitted(value)
            code = _code_of(function)
            if code is not None and _is_below(code.co_filename, root):
                functions[code.co_filename, code.co_name] = function
    called = {name for function in functions.values() for name in _called(function)}
    return {
        name: code.co_firstlineno
        for name, function in functions.items()
        if name not in called and (code := _code_of(function)) is not None
    }


def _is_below(file: str | None, root: Path) -> bool:
    path = Path(file or "")
    return path.is_relative_to(root) and "site-packages" not in path.parts


def _jitted(value: Any) -> Any:
    """Return the function of `triton.jit` that a value is, or that an autotuner around it tunes."""
    while isinstance(value, KernelInterface) and not isinstance(value, JITFunction):
        value = value.fn
    return value if isinstance(value, JITFunction) else None


def _code_of(function: Any) -> CodeType | None:
    return getattr(getattr(function, "fn", None), "__code__", None)


def _called(function: Any) -> Iterator[Kernel]:
    """Yield the jitted functions that one names, also as attributes of modules."""
    code, names = _code_of(function), function.fn.__globals__
    assert code is not None
    named = [names.get(name) for name in code.co_names]
    modules = [one for one in named if isinstance(one, ModuleType)]
    named += [getattr(one, name, None) for one in modules for name in code.co_names]
    for value in named:
        other = _code_of(_jitted(value))
        if other is not None:
            yield other.co_filename, other.co_name
